"""
R1-Reward-RL: the 17,261 pairs that the paper's authors trained on and released.

A row holds a judging prompt, out of which question and responses are cut. Its picture is base64, or
a path on the authors' disk.
"""

import base64
import json
import re

from sources.reading import Dropped, FoundPair, find_file
from stable_reinforce import parse

KIND = "training"
NAME = "R1-Reward-RL"
FILES = ["data/*.parquet", "*.parquet", "*.jsonl"]
FIELDS = ["message", "answer"]

HEADINGS = [re.compile(rf"(?:\n#+ *|; )\[Response {number}\]:") for number in (1, 2)]
OUTPUT_FORMAT = re.compile(r"\n[#* ]*Output Format \(strictly follow\)")


def read_row(row, number, folder):
    message = row["message"]
    if isinstance(message, str):
        message = json.loads(message)
    parts = {part["type"]: part[part["type"]] for part in message[0]["content"]}
    prompt = cut_prompt(parts["text"])
    choice = parse("".join(row["answer"])).choice
    if prompt is None:
        raise Dropped("unknown layout")
    if choice is None:
        raise Dropped("no verdict")
    question, better, worse = (part.strip() for part in prompt)
    if choice == 2:
        better, worse = worse, better
    return FoundPair(
        id=f"R1-Reward-RL-{number}",
        question=question,
        better=better,
        worse=worse,
        images=[picture(row, parts, folder)],
        source=NAME,
    )


def cut_prompt(text):
    """[question, response 1, response 2] of a judging prompt; None: it has another layout."""
    rest = text.partition("[Question]:")[2]
    parts = []
    for heading in HEADINGS:
        found = heading.search(rest)
        if found is None:
            return None
        parts.append(rest[: found.start()])
        rest = rest[found.end() :]
    return [*parts, OUTPUT_FORMAT.split(rest, 1)[0]]


def picture(row, parts, folder):
    if "image" not in row:
        return find_file(folder, parts["image"])
    if not row["image"]:
        return None
    return base64.b64decode(row["image"].rpartition(",")[2])
