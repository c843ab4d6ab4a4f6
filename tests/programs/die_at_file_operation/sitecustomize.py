"""
Counts the file operations of this process under a folder, and kills it at one of them.

Python imports this module when it starts, because its folder is in PYTHONPATH; tests/torture.py
sets the variables. The kill comes before the operation, and by SIGKILL: nothing is tidied up.
"""

import os
import signal
import sys

FOLDER = os.environ["FILE_OPERATIONS_UNDER"]
COUNTER = os.environ["FILE_OPERATIONS_COUNTER"]  # a byte is appended at each operation
DIE_AT = int(os.environ["FILE_OPERATIONS_DIE_AT"])  # 0: never
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate")


def is_change(event, arguments):
    if event == "open":
        _, _, flags = arguments
        return bool(flags & WRITING)
    return event in CHANGES


def is_inside(event, arguments):
    path = arguments[0]
    if not isinstance(path, (str, bytes, os.PathLike)):
        return False
    path = os.fsdecode(path)
    folder = None
    if event in ("os.remove", "os.rmdir"):
        folder = arguments[1]  # the descriptor of a folder that is being removed, or -1
    if folder is not None and folder >= 0:
        path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
    return os.path.abspath(path).startswith(FOLDER + os.sep)


def count(event, arguments):
    if not is_change(event, arguments) or not is_inside(event, arguments):
        return
    os.write(counter, b".")
    if os.fstat(counter).st_size == DIE_AT:
        os.kill(os.getpid(), signal.SIGKILL)


counter = os.open(COUNTER, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
sys.addaudithook(count)
