"""What people look at: tables, figures, judgements to read, a blind vote."""
