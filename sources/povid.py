"""
POVID: correct answers against answers with planted hallucinations. Table 2: 17,184 pairs.

Conversations are in LLaVA's form. The pictures are COCO's and not part of the download: put COCO's
train2014 into its folder.
"""

from sources.reading import FoundPair, find_file, split_last_turn

KIND = "training"
NAME = "POVID"
FILES = ["POVID*.json", "*.json"]
FIELDS = ["id", "image", "conversations", "rejected_conversations"]

ROLES = {"human": "user", "gpt": "assistant"}


def read_row(row, number, folder):
    better = conversation(row["conversations"])
    worse = conversation(row["rejected_conversations"])
    question, better, worse = split_last_turn(better, worse)
    return FoundPair(
        id=row["id"],
        question=question,
        better=better,
        worse=worse,
        images=[find_file(folder, row["image"], "coco", "train2014", "coco/train2014")],
        source=NAME,
    )


def conversation(turns):
    """[(role, text)] of LLaVA's turns."""
    found = []
    for turn in turns:
        role = ROLES.get(turn["from"], turn["from"])
        text = turn["value"].replace("<image>", "").strip()
        found.append((role, text))
    return found
