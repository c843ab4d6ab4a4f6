"""
Data sets, a file each: which files of the download hold its rows, and how to read one.

A file has
  KIND      "training" (preference pairs), "benchmark" or "task" (questions with one right answer)
  NAME      the NAME of --data NAME=PATH or --bench NAME=PATH
  FILES     patterns of the files with rows in the download's folder; the first that matches counts
  FIELDS    the fields that every row must have
  read_row(row, number, folder)
            the row as a FoundPair, a BenchmarkItem, an AnswerList or a Task (see reading.py), or
            raises Dropped

To add a data set, add a file: the folder is listed, and the name is not written anywhere else.
"""

import importlib
import pkgutil
from types import ModuleType


def data_sets(kind: str) -> dict[str, ModuleType]:
    """The data sets of one kind by name."""
    found = {}
    for file in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{file.name}")
        if getattr(module, "KIND", None) == kind:
            found[module.NAME] = module
    return found


TRAINING = data_sets("training")
BENCHMARKS = data_sets("benchmark")
TASKS = data_sets("task")
