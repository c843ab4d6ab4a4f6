"""What the scripts of bench/ share: how a number and its table are written down."""

import statistics
import sys
import time
from pathlib import Path


def made_by(script):
    """The day and the command that made a table."""
    words = " ".join([f"python bench/{script}", *sys.argv[1:]])
    return f"{time.strftime('%Y-%m-%d')}; `{words}`"


def spread(values):
    """Median, least and most."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def print_and_save(text, path):
    print(text)
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text)
