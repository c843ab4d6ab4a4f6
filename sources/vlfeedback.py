"""
VLFeedback: four answers a prompt, rated 1 to 5 in three respects by GPT-4V. Table 2: 80,258 pairs.

One pair a prompt: the answer with the highest sum of ratings against the one with the lowest. An
answer without text, or with a rating that is not a number, does not count.
"""

import re

from sources.reading import Dropped, FoundPair, find_file

KIND = "training"
NAME = "VLFeedback"
FILES = ["*.jsonl", "*.parquet"]
FIELDS = ["id", "prompt", "completions", "img_path"]


def read_row(row, number, folder):
    responses = {}  # sum of the ratings -> the first response that has it
    reason = "tie"
    for completion in as_list(row["completions"]):
        ratings = [str(note["Rating"]).strip() for note in completion["annotations"].values()]
        if not (completion["response"] or "").strip():
            reason = "empty answer"
        elif not all(re.fullmatch("[0-9]+([.][0-9]+)?", rating) for rating in ratings):
            reason = "non-numeric rating"
        else:
            responses.setdefault(sum(map(float, ratings)), completion["response"])
    if len(responses) < 2:
        raise Dropped(reason)
    return FoundPair(
        id=row["id"],
        question=row["prompt"],
        better=responses[max(responses)],
        worse=responses[min(responses)],
        images=[find_file(folder, row["img_path"], "merged_images")],
        source=NAME,
    )


def as_list(completions):
    """The list of dicts that the JSONL has; parquet files have a dict of lists instead."""
    if isinstance(completions, list):
        return completions
    return [element(completions, i) for i in range(len(completions["response"]))]


def element(node, i):
    """Element i of every list in nested dicts."""
    if isinstance(node, dict):
        return {key: element(value, i) for key, value in node.items()}
    return node[i]
