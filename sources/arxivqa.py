"""arXivQA: figures of papers, questions with options."""

import re

from sources.reading import Dropped, Task, find_file

KIND = "task"
NAME = "arXivQA"
FILES = ["arxivqa.jsonl"]
FIELDS = ["id", "question", "options", "label", "image"]
LETTERS = "ABCDEFGHIJ"
INSTRUCTION = "Answer with the option's letter from the given choices directly."
# as labels spell it: B, b, (B), [B], **B**, - B, "B", Answer: B
BARE_LETTER = re.compile(r"(?:answer:)?[\W_]*([a-j])[\W_]*", re.IGNORECASE)
# with something behind it: B. Blue, (B) Blue, B: Blue, - B) Blue, [B] Blue
LETTER_IN_FRONT = re.compile(r"(?:answer:)?[\s*\"'(\[-]*([A-J])\s*[.):\],]")


def read_row(row, number, folder):
    if None in row["options"]:
        raise Dropped("an option is null")
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
    """
    The label is a letter, the whole option with or without its letter, or text behind a letter.

    >>> answer_letter("**b**", ["Red", "Blue"]), answer_letter("A cat", ["A dog", "A cat"])
    ('B', 'B')
    >>> answer_letter("Blue", ["A) Red", "B) Blue"]), answer_letter("[A] Red", ["Red", "Blue"])
    ('B', 'A')
    """
    label = label.strip()
    texts = [text_of_option(option) for option in options]
    letter = BARE_LETTER.fullmatch(label)
    if letter is None and label in options:
        return LETTERS[options.index(label)]
    if letter is None and label in texts:
        return LETTERS[texts.index(label)]
    letter = letter or LETTER_IN_FRONT.match(label)
    if letter and LETTERS.index(letter[1].upper()) < len(options):
        return letter[1].upper()
    raise Dropped("no label")


def text_of_option(option):
    """The option without its letter."""
    letter = LETTER_IN_FRONT.match(option)
    return option[letter.end() :].strip() if letter else option.strip()
