"""arXivQA: figures of papers, questions with options."""

import re

from sources.reading import Dropped, Task, find_file

KIND = "task"
NAME = "arXivQA"
FILES = ["arxivqa.jsonl"]
FIELDS = ["id", "question", "options", "label", "image"]
LETTERS = "ABCDEFGHIJ"
INSTRUCTION = "Answer with the option's letter from the given choices directly."


def read_row(row, number, folder):
    options = []
    for letter, option in zip(LETTERS, row["options"]):
        has_letter = re.match(rf"\(?{letter}[.):]", option)
        options.append(option if has_letter else f"{letter}. {option}")
    return Task(
        id=f"arXivQA-{row['id']}",
        source=NAME,
        question="\n".join([row["question"], *options, INSTRUCTION]),
        answer=answer_letter(row["label"], row["options"]),
        images=[find_file(folder, row["image"])],
    )


def answer_letter(label, options):
    """The label is a letter, a letter in brackets, or the whole option."""
    letter = re.match(r"[\[(]?([A-J])(?![a-zA-Z])", label.strip())
    if letter and LETTERS.index(letter[1]) < len(options):
        return letter[1]
    if letter is None and label in options:
        return LETTERS[options.index(label)]
    raise Dropped("no label")
