"""
Multimodal RewardBench 2 (arXiv 2512.16899), a benchmark since the paper: its reasoning task.

Of its 1,000 pairs the 350 whose answers are both texts: what the prompt of Table 1 takes. In the
others, and in the three tasks of making pictures, an answer has pictures of its own. So the numbers
of its authors, over all 1,000, are no rows to compare with. A question may have several pictures; a
mark in its text, <image_0> for the first, says where each stood.

Its file is the hub's (rl-research/multimodal-rewardbench-2), or the reasoning.json that the
authors' scripts make (facebookresearch/MMRB2).
"""

from sources.reading import BenchmarkItem, Dropped

KIND = "benchmark"
NAME = "Multimodal-RewardBench-2"
FILES = ("reasoning/*.parquet", "reasoning.json", "benchmark/reasoning.json")
FIELDS = ("chosen", "prompt_source")
PUBLISHED = {  # grouping: {group: rows}, of the pairs that are taken
    "source": {
        "mindcube": 195,
        "blink": 100,
        "realunify": 19,
        "visulogic": 19,
        "muirbench": 10,
        "vstar": 7,
    }
}
PAPER_COLUMNS, PAPER_ROWS = (), {}


def read_row(row, number, folder):
    if "prompt_text" not in row:
        row = as_on_the_hub(row)
    if row["response_a_images"] or row["response_b_images"]:
        raise Dropped("an answer has pictures")
    return BenchmarkItem(
        id=row["pair_id"],
        question=row["prompt_text"],
        responses=[row["response_a_text"], row["response_b_text"]],
        choice={"A": 1, "B": 2}[row["chosen"].upper()],
        image=row["prompt_images"],
        video=None,
        groups={"source": row["prompt_source"]},
    )


def as_on_the_hub(row):
    """A row of reasoning.json with the fields of the hub's."""
    parts = {
        "prompt": row["prompt_content"],
        "response_a": row["response_a"]["response_content"],
        "response_b": row["response_b"]["response_content"],
    }
    fields = {"pair_id": row["id"]}
    for name, part in parts.items():
        fields[f"{name}_text"], fields[f"{name}_images"] = text_and_pictures(part)
    return row | fields


def text_and_pictures(parts):
    """
    The text has a mark where each picture stood.

    >>> text_and_pictures([["text", "Is"], ["image", "a.png"], ["text", "red?"]])
    ('Is\\n<image_0>\\nred?', ['a.png'])
    """
    texts, pictures = [], []
    for kind, content in parts:
        if kind == "image":
            texts.append(f"<image_{len(pictures)}>")
            pictures.append(content)
        else:
            texts.append(content)
    return "\n".join(texts), pictures


def check_rows(rows):
    return ["note: of its 4,000 pairs those of the reasoning task whose answers are both texts"]
