"""What to know of a benchmark's file before its numbers are believed."""

from collections import Counter

MOSTLY = 0.9  # share of the rows with the better answer on one side, from which on it is said


def check_data(data_set, rows):
    """Lines of text: how many rows each group has, and what is unusual."""
    notes = count_groups(data_set, rows)
    rows = [row for row in rows if row.is_decided]
    better_first = sum(row.choice == 1 for row in rows)
    most = max(better_first, len(rows) - better_first)
    if most >= MOSTLY * len(rows):
        which = "better" if better_first == most else "worse"
        how_often = "always" if most == len(rows) else f"in {most} of {len(rows)} rows"
        notes.append(
            f"note: in this file the {which} answer is {how_often} first; --orders dataset shows "
            "it so"
        )
    different = {(row.question, *row.responses, *row.images) for row in rows}
    repeated = len(rows) - len(different)
    if repeated:
        notes.append(f"note: {repeated} rows repeat another one")
    empty = sum(has_empty_answer(row) for row in rows)
    if empty:
        notes.append(f"note: {empty} rows have an empty answer")
    if hasattr(data_set, "check_rows"):
        notes += data_set.check_rows(rows)
    return notes


def count_groups(data_set, rows):
    """The rows of each group beside those of the published file, or of its later version."""
    published = published_groups(data_set)
    later = getattr(data_set, "LATER_VERSION", {})
    found = {}
    for grouping in published:
        found[grouping] = dict(Counter(row.groups[grouping] for row in rows))
    notes = []
    for grouping, counts in published.items():
        notes.append(f"{grouping}: {list_counts(sorted(found[grouping].items()))}")
        if found != later and found[grouping] != counts:
            notes.append(f"note: the published file has {list_counts(counts.items())}")
    if published and found == later:
        in_paper = sum(next(iter(published.values())).values())
        notes.append(
            f"note: {len(rows)} rows as in the file that the hub has had since; the paper's has "
            f"{in_paper}, so compare two runs on the rows that both have (--compare)"
        )
    return notes


def has_empty_answer(row):
    return any(not text.strip() for text in row.responses)


def published_groups(data_set):
    """{grouping: {group: rows}} of a benchmark; of pairs, None, nothing is published."""
    return getattr(data_set, "PUBLISHED", {})


def list_counts(counts):
    return ", ".join(f"{name} {count}" for name, count in counts)
