"""
MM-RLHF: answers ranked by people; its authors made pairs of answers with different ranks.

The paper takes all of it. Table 2: 41,163 Long, 46,281 Short, 8,306 Mcq and 9,990 Safety pairs. A
folder in the picture's path names the category, which becomes part of the pair's source.
"""

from pathlib import Path

from sources.reading import Dropped, FoundPair, find_images_or_video

KIND = "training"
NAME = "MM-RLHF"
FILES = ["dpo_pairs.jsonl"]
FIELDS = ["id", "prompt", "chosen", "rejected"]

CATEGORIES = ("long", "short", "mcq", "safety", "video")


def read_row(row, number, folder):
    folders = Path(row.get("image") or row.get("video") or "").parts
    category = next((part for part in folders if part in CATEGORIES), "other")
    source = f"{NAME}-{category.capitalize()}"
    if row.get("is_tie"):
        raise Dropped("tie", source)
    images, video = find_images_or_video(row, folder)
    return FoundPair(
        id=row["id"],
        question=row["prompt"],
        better=row["chosen"],
        worse=row["rejected"],
        images=images,
        source=source,
        video=video,
    )
