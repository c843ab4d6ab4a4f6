"""Which pairs are usable: those that are in no benchmark, and each only once."""

import hashlib
import json
import os
from collections import Counter, defaultdict
from itertools import count

from core.files import InputError, jsonl_rows
from core.pairs import pair_from_row
from core.pictures import BadPicture
from sources.reading import check_picture, find_images_or_video, table_rows

SWAPPED = "#swapped"  # ends the id of a pair in its second order (annotate.py --both_orders)


def usable_pairs(collected, benchmarks, dropped):
    """([pair], {source: what became of its rows}); a line in dropped.jsonl for every other row."""
    usable = {}  # id -> pair; in memory, some 4 KB each
    seen = set()
    counts = defaultdict(Counter)
    for where, row in collected_rows(collected):
        reason = row.get("reason")
        if reason is None:
            pair = pair_from_row(row["pair"], where)
            keys = dedup_keys(pair.id, pair.question, pair.responses, row["pixels"])
            content = (*keys["text"], *row["pixels"])
            reason = reason_to_leave_out(keys, benchmarks, content in seen)
            seen.add(content)
        counts[row["source"]][reason or "pairs"] += 1
        if reason is None:
            pair.id = free_id(pair.id, usable)
            usable[pair.id] = pair
        else:
            line = {"source": row["source"], "where": row["where"], "reason": reason}
            dropped.write(json.dumps(line) + "\n")
    return list(usable.values()), counts


def collected_rows(collected):
    for file in collected:
        yield from jsonl_rows(file)


def reason_to_leave_out(keys, benchmarks, seen_before):
    matches = [kind for kind in keys if keys[kind] & benchmarks[kind]]
    if matches:
        return "in a benchmark, by " + ", ".join(matches)
    return "seen before" if seen_before else None


def free_id(pair_id, taken):
    """
    The id, or with #2, #3, ... if it is taken, or if it ends like that of a swapped pair.

    >>> free_id("a", {}), free_id("a", {"a"}), free_id("a#swapped", {"a"})
    ('a', 'a#2', 'a#swapped#2')
    """
    if pair_id not in taken and not pair_id.endswith(SWAPPED):
        return pair_id
    for number in count(2):
        numbered = f"{pair_id}#{number}"
        if numbered not in taken:
            return numbered


def dedup_keys(pair_id, question, responses, pixels):
    """
    The id; a hash of question and responses that ignores case, spaces and the responses' order; the
    hashes of the pictures' pixels.
    """
    texts = [plain_text(question), *sorted(map(plain_text, responses))]
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:32]
    return {"id": {pair_id}, "text": {digest}, "picture": set(pixels)}


def plain_text(text):
    return " ".join(text.replace("<image>", " ").casefold().split())


def benchmark_keys(paths):
    """The dedup_keys of all rows of these benchmark files together."""
    known = defaultdict(set)
    for path in paths:
        unreadable = 0
        for where, row in table_rows(path, []):
            pair_id, question, responses = benchmark_texts(row, where)
            pixels = []
            for picture in benchmark_pictures(row, os.path.dirname(path)):
                try:
                    pixels.append(check_picture(picture)[0])
                except BadPicture:
                    unreadable += 1
            for kind, keys in dedup_keys(pair_id, question, responses, pixels).items():
                known[kind] |= keys
        if unreadable:
            print(f"{path}: {unreadable} of its pictures cannot be read, so they match nothing")
        else:
            print(f"{path}: read")
    return known


def benchmark_texts(row, where):
    """(id, question, responses) of a row of any of the three benchmarks, or of a file of pairs."""
    question = first_value(row, "query", "prompt", "Text", "question")
    responses = first_value(row, "response", "responses")
    if responses is None:
        responses = [first_value(row, "chosen", "Output1"), first_value(row, "rejected", "Output2")]
    if question is None or None in responses:
        raise InputError(
            f"{where} has no question with two responses; --decontaminate takes the files of "
            "VL-RewardBench, Multimodal RewardBench and MM-RLHF-RewardBench, and files of pairs"
        )
    return str(first_value(row, "id", "ID")), question, responses


def benchmark_pictures(row, folder):
    image = first_value(row, "image", "Image")
    images, video = find_images_or_video(row | {"image": image}, folder)
    return video or images


def first_value(row, *names):
    """The first of these fields that the row has; None if it has none, or is no object."""
    if isinstance(row, dict):
        for name in names:
            if row.get(name) is not None:
                return row[name]
    return None
