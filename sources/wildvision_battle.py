"""
WildVision-Battle: two models answer a person, who picks the winner. Table 2: 10,383 pairs.

The id is the row's number, because VL-RewardBench refers to its rows from here by number.
"""

from sources.reading import Dropped, FoundPair, find_file, split_last_turn

KIND = "training"
NAME = "WildVision-Battle"
FILES = ["data/*.parquet", "*.parquet"]
FIELDS = ["conversation_a", "conversation_b", "image", "winner"]


def read_row(row, number, folder):
    conversations = {
        "model_a": [(turn["role"], turn["content"]) for turn in row["conversation_a"]],
        "model_b": [(turn["role"], turn["content"]) for turn in row["conversation_b"]],
    }
    winner = row["winner"] or "none"
    if winner not in conversations:
        raise Dropped("tie" if winner.startswith("tie") else "no winner")
    loser = "model_b" if winner == "model_a" else "model_a"
    question, better, worse = split_last_turn(conversations[winner], conversations[loser])
    return FoundPair(
        id=f"wildvision-battle-{number}",
        question=question,
        better=better,
        worse=worse,
        images=[find_file(folder, row["image"])],
        source=NAME,
    )
