"""ThinkLite-VL: hard questions on charts, geometry and science."""

from sources.reading import Task, find_file

KIND = "task"
NAME = "ThinkLite-VL"
FILES = ["*.parquet", "data/*.parquet"]
FIELDS = ["id", "problem", "answer", "image"]


def read_row(row, number, folder):
    image = row["image"]  # the bytes of the file themselves
    if not isinstance(image, bytes):
        image = find_file(folder, image)
    return Task(
        id=f"ThinkLite-VL-{row['id']}",
        source=NAME,
        question=row["problem"].replace("<image>", "").strip(),
        answer=str(row["answer"]),
        images=[image],
    )
