"""Tables in Markdown."""


def markdown_table(head, rows):
    """A table of these rows. Integers get thousands separators, and are aligned to the right."""
    rules = ["---:" if isinstance(value, int) else "---" for value in rows[0]]
    lines = [_markdown_row(row) for row in (head, rules, *rows)]
    return "\n".join(lines) + "\n\n"


def _markdown_row(row):
    cells = [f"{value:,}" if isinstance(value, int) else str(value) for value in row]
    return "| " + " | ".join(cells) + " |"
