"""RLAIF-V: answers ranked by the feedback of open models. Table 2: 74,802 pairs."""

from sources.reading import FoundPair, find_file

KIND = "training"
NAME = "RLAIF-V"
FILES = ["*.parquet", "data/*.parquet"]
FIELDS = ["idx", "question", "chosen", "rejected", "image"]


def read_row(row, number, folder):
    return FoundPair(
        id=f"RLAIF-V-{row['idx']}",
        question=row["question"],
        better=row["chosen"],
        worse=row["rejected"],
        images=[find_file(folder, row["image"])],
        source=NAME,
    )
