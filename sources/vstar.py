"""V*: small details in large photographs, questions with four options."""

from sources.reading import Task, find_file

KIND = "task"
NAME = "V*"
FILES = ["test_questions.jsonl"]
FIELDS = ["question_id", "text", "label", "image"]


def read_row(row, number, folder):
    return Task(
        id=f"V*-{row['question_id']}",
        source=NAME,
        question=row["text"],
        answer=row["label"],
        images=[find_file(folder, row["image"])],
    )
