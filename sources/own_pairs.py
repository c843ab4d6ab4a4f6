"""
Your own pairs: {prompt, chosen, rejected}.

A row may have an id, and one of image, images (a list) and video (a folder or a list of frames).
"""

from sources.reading import FoundPair, find_images_or_video

KIND = "training"
NAME = "pairs"
FILES = ["pairs.jsonl"]
FIELDS = ["prompt", "chosen", "rejected"]


def read_row(row, number, folder):
    images, video = find_images_or_video(row, folder)
    return FoundPair(
        id=row.get("id", f"row-{number}"),
        question=row["prompt"],
        better=row["chosen"],
        worse=row["rejected"],
        images=images,
        source=NAME,
        video=video,
    )
