"""A benchmark's file, or a file of pairs, as rows to judge."""

import os
from collections import Counter
from pathlib import Path

from core.endpoint import evenly_spaced
from core.files import InputError
from core.judgements import BenchmarkRow, row_without_empty_answers
from core.lists import duel_rows
from core.pairs import iter_pairs, pair_from_row, row_from_pair
from core.pictures import BadPicture
from sources.reading import (
    AnswerList,
    Dropped,
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


def rows_of_benchmark(data_set, path, out, limit=None):
    """The rows of a benchmark, or the duels of its lists; limit: of these rows or lists."""
    items = first_row = 0
    dropped = Counter()
    for number, (where, item) in enumerate(read_records(data_set, path)):
        if items == limit:
            break
        if isinstance(item, Dropped):
            dropped[item.reason] += 1
            continue
        items += 1
        rows = rows_of_item(data_set, item, number, first_row, where, out)
        first_row += len(rows)
        for row in rows:
            check_row(row, where)
        yield from rows
    if dropped and os.environ.get("RANK", "0") == "0":
        print(f"{path}: {dropped.total()} rows are not taken: {dict(dropped)}")


def rows_of_item(data_set, item, number, first_row, where, out):
    """One row; or the duels of a list, which count from first_row on."""
    try:
        images, video = find_pictures(item, where, out)
    except (BadPicture, LookupError, TypeError, AttributeError) as problem:
        raise bad_row(data_set, where, problem) from None
    fields = {
        "id": str(item.id),
        "source": data_set.NAME,
        "question": item.question,
        "images": images,
        "video": video,
        "bench": data_set.NAME,
        "groups": item.groups,
    }
    if isinstance(item, AnswerList):
        return duel_rows(item.responses, item.ranks, number, first_row, **fields)
    sets_by_id = getattr(data_set, "SETS_BY_ID", False)
    row = BenchmarkRow(
        responses=item.responses,
        choice=item.choice,
        row=number,
        set=str(item.id) if sets_by_id else str(number),
        **fields,
    )
    return [row]


def find_pictures(item, where, out):
    """(images, video): paths. A picture inside a table becomes a file in out/media."""
    file = where.rpartition(", ")[0]
    folder = os.path.dirname(file)
    named = item.image or []
    if not isinstance(named, list):
        named = [named]
    images = [find_picture(folder, name, out) for name in named]
    if not item.video:
        return images, None
    if isinstance(item.video, list):
        return images, [find_path(folder, frame) for frame in item.video]
    path = find_path(folder, item.video)
    return images, frames_in(path) or [path]  # deviation 5


def find_picture(folder, name, out):
    image = find_path(folder, name)
    if isinstance(image, bytes):
        image, _ = store_picture(image, Path(out, "media"))
    return image


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
