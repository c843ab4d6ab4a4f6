"""A benchmark's file, or a file of pairs, as rows to judge."""

import os
from pathlib import Path

from core.endpoint import evenly_spaced
from core.files import InputError
from core.judgements import BenchmarkRow, row_without_empty_answers
from core.pairs import iter_pairs, pair_from_row, row_from_pair
from core.pictures import BadPicture
from sources.reading import (
    bad_row,
    find_file,
    frames_in,
    read_records,
    store_picture,
)


def rows_of_pairs(path, group):
    """The values of one field of the pairs are the columns of their table."""
    for number, pair in enumerate(iter_pairs(path)):
        fields = row_from_pair(pair)
        if group not in fields:
            raise InputError(
                f"--group {group}: {path}, line {number + 1} has no such field; expected one of "
                f"{', '.join(fields)}"
            )
        groups = {group: str(fields[group])}
        place = {"bench": "pairs", "row": number, "groups": groups, "set": str(number)}
        yield BenchmarkRow.from_pair(pair, **place)


def rows_of_benchmark(data_set, path, out):
    sets_by_id = getattr(data_set, "SETS_BY_ID", False)
    for number, (where, item) in enumerate(read_records(data_set, path)):
        try:
            images, video = find_pictures(item, where, out)
        except (BadPicture, LookupError, TypeError, AttributeError) as problem:
            raise bad_row(data_set, where, problem) from None
        row = BenchmarkRow(
            id=str(item.id),
            source=data_set.NAME,
            question=item.question,
            images=images,
            video=video,
            responses=item.responses,
            choice=item.choice,
            bench=data_set.NAME,
            row=number,
            groups=item.groups,
            set=str(item.id) if sets_by_id else str(number),
        )
        check_row(row, where)
        yield row


def find_pictures(item, where, out):
    """(images, video): paths. A picture inside a table becomes a file in out/media."""
    file = where.rpartition(", ")[0]
    folder = os.path.dirname(file)
    images, video = [], None
    if item.image:
        image = find_path(folder, item.image)
        if isinstance(image, bytes):
            image, _ = store_picture(image, Path(out, "media"))
        images = [image]
    if item.video:
        path = find_path(folder, item.video)
        video = frames_in(path) or [path]  # deviation 5
    return images, video


def find_path(folder, name):
    """A missing file keeps its path: check_pictures() names it."""
    return find_file(folder, name) or os.path.join(folder, str(name))


def check_row(row, where):
    """As a pair is checked, except that a benchmark may have an empty answer."""
    pair_from_row(row_without_empty_answers(row_from_pair(row)), where)


def choose_frames(rows, max_frames):
    """Whatever judges the rows sees the same frames."""
    for row in rows:
        if row.video:
            row.video = evenly_spaced(row.video, max_frames)


def check_pictures(rows, path):
    if not rows:
        raise InputError(f"{path} has no rows")
    files = []
    for row in rows:
        files += row.images + (row.video or [])
    missing = [file for file in files if not os.path.isfile(file)]
    if missing:
        count = f"{len(missing)} of {len(files)} images are missing, the first is {missing[0]}"
        advice = "paths are relative to the folder of the benchmark's file"
        raise InputError(f"{path}: {count}; {advice}")
