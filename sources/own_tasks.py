"""Your own tasks: question and answer; a row may have an id, and image or images."""

from sources.reading import Task, find_images_or_video

KIND = "task"
NAME = "tasks"
FILES = ["*.jsonl"]
FIELDS = ["question", "answer"]


def read_row(row, number, folder):
    answer = row["answer"]
    images, _ = find_images_or_video(row | {"video": None}, folder)
    return Task(
        id=row.get("id", f"task-{number}"),
        source=NAME,
        question=row["question"],
        answer=str(answer) if isinstance(answer, (int, float)) else answer,
        images=images,
    )
