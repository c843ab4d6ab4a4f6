"""What the data sets' readers share: records, tables of rows, pictures."""

import hashlib
import os
import re
import secrets
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from core.files import atomic_write, jsonl_rows, parse_json
from core.pairs import MAX_TEXT, InputError, encodable, is_int, shown
from core.pictures import opened, upright_rgb

PICTURES = (".png", ".jpg", ".jpeg", ".webp")  # what counts as a frame in a video's folder


@dataclass
class FoundPair:
    """A training row as it was found; Dropped is raised for one that makes no pair."""

    id: str  # may repeat: annotate.py numbers the later ones
    question: str  # with the earlier turns, if there were any
    better: str  # the preferred response
    worse: str  # the other one
    images: list  # of each image its path, its bytes, or None if there is no such file
    source: str  # the data set's name, or a part of it (MM-RLHF-Long)
    video: list | None = None  # the same of a video's frames

    def __post_init__(self):
        self.id = encodable(str(self.id))
        for name in ("question", "better", "worse"):
            setattr(self, name, "" if getattr(self, name) is None else text_of(self, name))
        better, worse = self.better.strip(), self.worse.strip()
        if not better or not worse:
            raise Dropped("empty answer", self.source)
        if better == worse:
            raise Dropped("same answers", self.source)
        if self.video == []:
            raise Dropped("missing frames", self.source)

    @property
    def pictures(self):
        return self.video or self.images


@dataclass
class BenchmarkItem:
    """A benchmark row; pictures are named as the row names them."""

    id: str | int  # may repeat
    question: str
    responses: list[str]  # two, in the order of the row
    choice: int  # 1 or 2, the better one
    image: str | dict | list | None  # a path, or a parquet cell {bytes, path}, or a list of these
    video: str | list | None  # a folder of frames, or a list of them
    groups: dict[str, str]  # grouping -> the row's group: the columns of the benchmark's tables

    def __post_init__(self):
        self.question = encodable(self.question)
        self.responses = encodable(self.responses)


@dataclass
class AnswerList:
    """A benchmark row with any number of answers; the fields are those of a BenchmarkItem."""

    id: str | int
    question: str
    responses: list[str]  # two or more
    ranks: list[int]  # of each answer: 1 is the best, 2 the next; equal ones are ties
    image: str | dict | list | None
    video: str | list | None
    groups: dict[str, str]

    def __post_init__(self):
        self.question = encodable(self.question)
        self.responses = encodable(self.responses)
        if not isinstance(self.responses, list) or len(self.responses) < 2:
            raise ValueError(f"responses is {shown(self.responses)}; expected two texts or more")
        if not is_ranking(self.ranks, len(self.responses)):
            expected = f"{len(self.responses)} whole numbers, 1 for the best, not all the same"
            raise ValueError(f"ranks is {shown(self.ranks)}; expected {expected}")


def is_ranking(ranks, count):
    if not isinstance(ranks, list) or len(ranks) != count:
        return False
    return all(is_int(rank) for rank in ranks) and min(ranks) == 1 and max(ranks) > 1


@dataclass
class Task:
    """A question with one right answer, as downstream_grpo.py trains on."""

    id: str
    source: str  # the data set's name
    question: str
    answer: str  # the right one
    images: list  # as in FoundPair
    video: list | None = None  # as in FoundPair

    def __post_init__(self):
        self.id = encodable(str(self.id))
        self.question = text_of(self, "question")
        self.answer = text_of(self, "answer")


class Dropped(Exception):
    """Raised for a row that makes no record."""

    def __init__(self, reason, source=None):
        super().__init__(reason)
        self.reason = reason
        self.source = source  # where it is counted; None: under the data set's name


def text_of(record, name):
    """A field that has to be a text, without halves of surrogate pairs."""
    text = getattr(record, name)
    if not isinstance(text, str):
        raise TypeError(f"the {name} is {shown(text)}; expected a text")
    if len(text) > MAX_TEXT:
        raise Dropped(f"text above {MAX_TEXT:,} characters", getattr(record, "source", None))
    return encodable(text)


# ------------------------------------------------------------------------------------------------
# Rows


def read_records(data_set, path):
    """(where, record) of each row of a data set. A Dropped that read_row() raises is its record."""
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    for number, (where, row) in enumerate(table_rows(path, data_set.FILES)):
        check_fields(row, data_set.FIELDS, where, data_set.NAME)
        try:
            if data_set.KIND == "task":
                check_no_null(row, data_set.FIELDS)
            record = data_set.read_row(row, number, folder)
        except Dropped as dropped:
            record = dropped
            record.source = record.source or data_set.NAME
        except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as problem:
            raise bad_row(data_set, where, problem) from None
        yield where, record


def bad_row(data_set, where, problem):
    """The error for a row that read_row() could not read."""
    file = data_set.__name__.replace(".", "/") + ".py"
    return InputError(
        f"{where} does not read as a row of {data_set.NAME} ({repr(problem)[:200]}); see {file}"
    )


def check_fields(row, fields, where, name):
    """InputError unless the row is an object that has all fields."""
    there = row if isinstance(row, dict) else {}
    missing = [field for field in fields if field not in there]
    if missing:
        expected = f"an object with {', '.join(fields)}"
        raise InputError(f"{where} lacks {', '.join(missing)}; a row of {name} is {expected}")


def check_no_null(row, fields):
    """Dropped if one of the fields is null, as columns of a table are where there was nothing."""
    for field in fields:
        if row[field] is None:
            raise Dropped(f"{field} is null")


def table_rows(path, patterns):
    """(where, row) of a file, or of a folder's files that match the first pattern with a match."""
    for file in table_files(Path(path), patterns):
        if file.suffix == ".jsonl":
            yield from jsonl_rows(file)
        elif file.suffix == ".json":
            yield from json_rows(file)
        elif file.suffix == ".parquet":
            yield from parquet_rows(file)
        else:
            ending = file.suffix or "no suffix"
            raise InputError(f"{file}: expected a .jsonl, .json or .parquet file, got {ending}")


def table_files(path, patterns):
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder; fix the path, or download it first")
    for pattern in patterns:
        files = sorted(path.glob(pattern))
        if files:
            return files
    expected = " or ".join(patterns)
    raise InputError(f"{path} has no {expected}; give the download's folder or one of its files")


def json_rows(path):
    """Of a file that is a list of rows, or an object of one, as {"pairs": [...]}."""
    expected = "one list of objects"
    table = parse_json(path.read_bytes(), path, expected)
    if isinstance(table, dict) and len(table) == 1:
        (inner,) = table.values()
        table = inner if isinstance(inner, list) else table
    if not isinstance(table, list):
        raise InputError(f"{path}: expected {expected}, got {type(table).__name__}")
    for number, row in enumerate(table, 1):
        yield f"{path}, item {number}", row


def parquet_rows(path):
    import pyarrow.parquet

    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(path)
        # few rows at a time: a picture may have megabytes
        for batch in table.iter_batches(batch_size=32):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError) as problem:
        message = f"{path}, after row {number}: not readable as parquet ({problem})"
        raise InputError(f"{message}. Is the file cut off?") from None


def split_last_turn(better, worse):
    """
    (question, better, worse) of two conversations that are the same up to the last turn.

    Earlier turns become part of the question.

    >>> shared = [("user", "Q"), ("bot", "A"), ("user", "R")]
    >>> split_last_turn([*shared, ("bot", "B")], [*shared, ("bot", "C")])
    ('user: Q\\nbot: A\\nuser: R', 'B', 'C')
    """
    if better[:-1] != worse[:-1]:
        raise Dropped("different histories")
    history = better[:-1]
    if len(history) == 1:
        question = history[0][1]
    else:
        question = "\n".join(f"{speaker}: {text}" for speaker, text in history)
    return question, better[-1][1], worse[-1][1]


# ------------------------------------------------------------------------------------------------
# Pictures


def find_file(folder, name, *subfolders):
    """
    The path of the file that a row names, in the folder or its subfolders; None if there is none.

    The longest end of the name that exists counts, so a path on another machine's disk is found by
    its last parts. A URL is returned as it is, and so are bytes; a parquet cell {bytes, path} may
    hold the bytes.
    """
    if isinstance(name, bytes):
        return name
    if isinstance(name, dict):
        if name["bytes"] is not None:
            return name["bytes"]
        name = name["path"]
    if not name:
        return None
    if "://" in name:
        return name
    if "\0" in name:
        return None
    parts = Path(name).parts
    for start in range(len(parts)):
        for subfolder in ("", *subfolders):
            path = os.path.join(folder, subfolder, *parts[start:])
            if os.path.exists(path):
                return path
    return None


def find_images_or_video(row, folder):
    """(images, video) of a row with image, images or video (a folder or a list of frames)."""
    images, video = named_pictures(row)
    if isinstance(video, list):
        return [], [find_file(folder, frame) for frame in video]
    if video:
        return [], frames_in(find_file(folder, video))
    return [find_file(folder, image) for image in images], None


def named_pictures(row):
    """The same as the row names them; a video comes before images."""
    if row.get("video"):
        return [], row["video"]
    images = row.get("images") or row.get("image") or []
    return images if isinstance(images, list) else [images], None


def frames_in(folder):
    """The paths of a video's frames, in the order of the numbers in their names: 9 before 10."""
    if not folder or not os.path.isdir(folder):
        return []
    frames = [path for path in Path(folder).iterdir() if path.suffix.lower() in PICTURES]
    return [str(path) for path in sorted(frames, key=numbers_in_name)]


def numbers_in_name(path):
    """A sort key: the name's digits as numbers, the rest as text."""
    key = []
    for part in re.split(r"([0-9]+)", path.name):
        key.append((int(part), "") if part.isdecimal() else (-1, part))
    return key


def store_picture(picture, folder):
    """(path, hash of the pixels); bytes become a file in the folder. May raise BadPicture."""
    pixels, file_format = check_picture(picture)
    if isinstance(picture, str):
        return picture, pixels
    name = hashlib.sha256(picture).hexdigest()[:32]
    path = Path(folder, name[:2], f"{name}.{file_format.lower()}")
    if not path.exists():
        suffix = f".{secrets.token_hex(8)}.part"  # two rows with one picture may come at once
        with atomic_write(path, suffix) as file:
            file.write(picture)
    return str(path), pixels


@lru_cache(256)  # the pairs of one prompt follow each other in the sources
def check_picture(picture):
    """(hash of the pixels, file format) of a path or bytes. BadPicture if it cannot be used."""
    with opened(picture) as image:
        pixels = upright_rgb(image)
        data = repr(pixels.size).encode() + pixels.tobytes()
        return hashlib.sha256(data).hexdigest()[:32], image.format
