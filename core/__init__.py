"""What several stages stand on, an idea a file."""
