"""Files that appear whole, JSON lines that are checked, and a journal that survives a kill."""

import contextlib
import fcntl
import json
import os
from pathlib import Path


class InputError(ValueError):
    """Something that the user can fix. A stage prints it without a traceback."""


@contextlib.contextmanager
def atomic_write(path, suffix=".part"):
    """
    A binary file that appears under its name when the block ends, or not at all.

    It is written under path + suffix; writers of one path at the same time need different suffixes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + suffix)
    with part.open("wb") as file:
        yield file
    os.replace(part, path)


def fsync_tree(folder):
    """Wait until everything in a folder is on the disk, names and contents."""
    for path in sorted(Path(folder).rglob("*"), reverse=True):
        fsync(path)
    fsync(folder)


def fsync(path):
    """Wait until a file, or a folder's list of names, is on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def lock(file, path):
    """Keep other processes from `path` until `file` is closed or this process ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            f"another run is writing to {path}; wait until it ends, or choose another --out"
        ) from None


def in_short(error):
    """The first line of an error that a library raised, cut."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160]


def check_apart(out, model):
    """A run must not write over the model that it reads."""
    if Path(out).resolve() == Path(model).resolve():
        raise InputError(
            f"--out {out} is what --model names, too: a model in that folder would be written "
            "over; choose another --out"
        )


def parse_json(text, where, expected="one JSON object on each line"):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{where} is not JSON ({error}); expected {expected}. Is the file cut off?"
        ) from None


def read_object(path, fields, advice):
    """The JSON object of a file, which has these {field: its type}."""
    found = parse_json(Path(path).read_bytes(), path, "one JSON object")
    for field, kind in fields.items():
        is_there = isinstance(found, dict) and field in found
        if not is_there or not isinstance(found[field], kind):
            expected = f"an object with {', '.join(fields)}"
            raise InputError(f"{path} is damaged at {field!r}; expected {expected}. {advice}")
    return found


def jsonl_rows(path):
    """(where, row) for each line of a JSONL file. `where` names file and line, for messages."""
    for _, where, row in _rows_with_offsets(path):
        yield where, row


def _rows_with_offsets(path):
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            if not line.strip():
                raise InputError(f"{where} is empty; expected one JSON object on each line")
            yield offset, where, parse_json(line, where)
            offset += len(line)


class Journal:
    """
    JSON lines that are only ever appended, by one process at a time.

    A process that is killed, even by SIGKILL, loses nothing that was appended. There is no fsync:
    a power cut may take the last seconds.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("a+b")
        try:
            lock(self.file, path)
        except InputError:
            self.file.close()
            raise
        self._cut_half_a_line()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.file.close()

    def append(self, rows):
        """Writes rows and returns the offset of each."""
        end = self.file.seek(0, os.SEEK_END)
        offsets = []
        lines = b""
        for row in rows:
            offsets.append(end + len(lines))
            lines += json.dumps(row).encode() + b"\n"
        self.file.write(lines)
        self.file.flush()
        return offsets

    def rows(self):
        """(where, offset, row) for each row, in the order in which they were appended."""
        for offset, where, row in _rows_with_offsets(self.path):
            yield where, offset, row

    def rows_made_with(self, settings):
        """
        (where, offset, row) for each row behind the first one, which holds the settings that all
        of them depend on. An empty journal gets that row here; other settings are refused.
        """
        rows = self.rows()
        first = next(rows, None)
        if first is None:
            self.append([settings])
            return
        _, _, before = first
        check_same_settings(self.path, before, settings)
        yield from rows

    def read(self, offset):
        """The row at an offset."""
        self.file.seek(offset)
        return json.loads(self.file.readline())

    def _cut_half_a_line(self):
        """What a killed process was writing: everything after the last newline."""
        size = self.file.seek(0, os.SEEK_END)
        end = size
        while end > 0:
            self.file.seek(end - 1)
            if self.file.read(1) == b"\n":
                break
            end -= 1
        if end < size:
            self.file.truncate(end)
            print(f"{self.path}: cut off the last {size - end} bytes, a half-written line")


def check_same_settings(
    where, before, now, advice="Use the same settings to continue it, or choose another --out"
):
    """A run may only continue with the settings that it began with."""
    if not isinstance(before, dict):
        raise InputError(f"{where} does not begin with the settings of a run. {advice}")
    changes = [
        f"{name} was {before.get(name)!r}, is now {now.get(name)!r}"
        for name in sorted(before | now)
        if before.get(name) != now.get(name)
    ]
    if changes:
        raise InputError(f"{where} belongs to another run: {'; '.join(changes)}. {advice}")
