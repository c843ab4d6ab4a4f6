"""
What the tests of toy/sources.py share: the toy world in full, its files read by json and pyarrow
alone, its rows read by the project's readers, and its answer key.
"""

import contextlib
import io
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
import pytest
from conftest import read_rows
from PIL import Image

from core.pairs import read_pairs
from core.pictures import BadPicture
from sources import BENCHMARKS, TRAINING
from sources.reading import (
    Dropped,
    check_picture,
    find_file,
    frames_in,
    read_records,
)
from toy import sources, world

SPLITS = ("dev", "test")
PLACES = []  # (split, benchmark)
for _split in SPLITS:
    PLACES += [(_split, name) for name in sources.TEST]


class Row(NamedTuple):
    """A pair of a training source or of a benchmark."""

    question: str
    pictures: list[bytes]
    answers: list[str]
    right: int  # 0 or 1


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """Everything at the default scale, made once; what was printed is in the folder above."""
    out = tmp_path_factory.getbasetemp() / "toy_world_in_full" / "data"
    if not out.exists():
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            sources.main(["--out", str(out)])
        (out.parent / "printed").write_text(printed.getvalue())
    return out


# --------------------------------------------------------------------------------------------------
# Files


@cache
def table(path):
    return pq.read_table(path).to_pylist()


def is_of_kind(value, kind):
    """
    kind: a type, a tuple of types, a set of values, {field: kind} for a dict with exactly these
    fields, or [kind] for a list.
    """
    if isinstance(kind, dict):
        if not isinstance(value, dict) or set(value) != set(kind):
            return False
        return all(is_of_kind(value[field], kind[field]) for field in kind)
    if isinstance(kind, list):
        return isinstance(value, list) and all(is_of_kind(part, kind[0]) for part in value)
    if isinstance(kind, set):
        return value in kind
    return type(value) in (kind if isinstance(kind, tuple) else (kind,))


def assert_kind(rows, kind):
    assert rows
    for row in rows:
        assert is_of_kind(row, kind), row


def assert_columns(path, **columns):
    assert {field.name: str(field.type) for field in pq.read_schema(path)} == columns


# --------------------------------------------------------------------------------------------------
# Rows


def bytes_of(picture):
    return picture if isinstance(picture, bytes) else Path(picture).read_bytes()


def training_file(root, name):
    return root / "train" / ("pairs.jsonl" if name == "pairs" else name)


@cache
def training_rows(root, name):
    """(rows, why the others are none: {reason: rows})"""
    rows, dropped = [], Counter()
    for _, record in read_records(TRAINING[name], str(training_file(root, name))):
        try:
            if isinstance(record, Dropped):
                raise record
            for picture in record.pictures:
                check_picture(picture)
        except (Dropped, BadPicture) as problem:
            dropped[problem.reason] += 1
            continue
        pictures = [bytes_of(picture) for picture in record.pictures]
        rows.append(Row(record.question, pictures, [record.better, record.worse], 0))
    return rows, dropped


@cache
def benchmark_rows(root, split, name):
    if name == "pairs":
        return [row_of_pair(pair) for pair in read_pairs(root / split / "pairs.jsonl")]
    rows = []
    for where, item in read_records(BENCHMARKS[name], str(root / split / name)):
        folder = Path(where.rpartition(", ")[0]).parent
        if item.video:
            files = frames_in(find_file(folder, item.video))
        else:
            files = [find_file(folder, item.image)]
        pictures = [bytes_of(file) for file in files]
        rows.append(Row(item.question, pictures, item.responses, item.choice - 1))
    return rows


def row_of_pair(pair):
    pictures = [bytes_of(path) for path in pair.video or pair.images]
    return Row(pair.question, pictures, pair.responses, pair.choice - 1)


def task_rows(root, split):
    """(the row of JSON, its Row)"""
    folder = root / "tasks"
    for task in read_rows(folder / f"{split}.jsonl"):
        pictures = [bytes_of(folder / path) for path in task["images"]]
        yield task, Row(task["question"], pictures, [task["answer"]], 0)


# --------------------------------------------------------------------------------------------------
# The answer key


@cache
def key(root):
    found = defaultdict(list)
    for row in read_rows(root / "key.jsonl"):
        scene = [cell and tuple(cell) for cell in row["scene"]]
        found[row["key"]].append(row | {"scene": scene})
    return found


def key_of(row):
    return world.key_of(row.question, row.pictures)


def item_of(root, row):
    """The one item of the answer key that a row belongs to."""
    items = key(root)[key_of(row)]
    (item,) = [item for item in items if set(row.answers) <= set(item["answers"])]
    return item


def is_true(item, answer):
    """By the world's rule, which knows nothing of how the scene was made."""
    claim = item["claims"][item["answers"].index(answer)]
    return world.truth(item["family"], item["scene"], item["subject"], claim)


def check_pictures_are_the_worlds(rows):
    for row in rows:
        for data in row.pictures:
            with Image.open(io.BytesIO(data)) as image:
                assert (image.size, image.mode, image.format) == ((56, 56), "RGB", "PNG")
