"""
Your own lists of answers: {question, responses, choice or ranks}.

question or prompt  what was asked
responses           two texts or more, in any order
choice              the best of them: 1 for the first one, 2 for the second, and so on; or
ranks               a whole number for each of them: 1 for the best, 2 for the next. Equal numbers
                    are ties: which of the two is better is asked and not scored
id                  perhaps, and one of image, images (a list) and video (a folder or a list of
                    frames), as in a row of own pairs; and a source, the column of the table

A judge is asked about each two of the answers, in both orders: 6 duels of 4 answers.
"""

from core.pairs import is_int, shown
from sources.reading import AnswerList, named_pictures

KIND = "benchmark"
NAME = "lists"
FILES = ["lists.jsonl"]
FIELDS = ["responses"]
PAPER_COLUMNS, PAPER_ROWS = (), {}


def read_row(row, number, folder):
    images, video = named_pictures(row)
    return AnswerList(
        id=row.get("id", f"row-{number}"),
        question=row["question"] if "question" in row else row["prompt"],
        responses=row["responses"],
        ranks=ranks_of(row),
        image=images,
        video=video,
        groups={"source": str(row.get("source", NAME))},
    )


def ranks_of(row):
    """
    The ranks of the answers; of a choice, 1 for the best answer and 2 for all others.

    >>> ranks_of({"responses": ["a", "b", "c"], "choice": 2})
    [2, 1, 2]
    """
    choice, ranks = row.get("choice"), row.get("ranks")
    if (choice is None) == (ranks is None):
        raise ValueError(f"choice is {shown(choice)}, ranks {shown(ranks)}; expected one of them")
    if choice is None:
        return ranks
    places = range(1, len(row["responses"]) + 1)
    if not is_int(choice) or choice not in places:
        raise ValueError(f"choice is {shown(choice)}; expected a number from 1 to {len(places)}")
    return [1 if place == choice else 2 for place in places]
