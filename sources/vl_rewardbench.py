"""VL-RewardBench: the hub's parquet, or the JSONL of the paper's released code."""

import re

from sources.reading import BenchmarkItem

KIND = "benchmark"
NAME = "VL-RewardBench"
FILES = ("data/test-*.parquet", "test-*.parquet", "data.jsonl")
FIELDS = ("id", "image")
PUBLISHED = {  # grouping: {group: rows}
    "benchmark": {"general": 183, "hallucination": 749, "reasoning": 318},
    "paper": {"general": 484, "hallucination": 448, "reasoning": 318},
}
LATER_VERSION = {  # the same of the hub's file of 1,247 rows, by what other projects count in it
    "benchmark": {"general": 181, "hallucination": 749, "reasoning": 317},
    "paper": {"general": 482, "hallucination": 448, "reasoning": 317},
}
FIRST, OWN = "better answer always first", "benchmark's protocol"
PAPER_COLUMNS = (
    "overall",
    "paper: macro",
    "paper: general",
    "paper: hallucination",
    "paper: reasoning",
    "benchmark: macro",
    "benchmark: general",
    "benchmark: hallucination",
    "benchmark: reasoning",
)
PAPER_ROWS = {  # Table 3; (method, protocol): percent, None where the paper has no number
    ("R1-Reward", FIRST): (71.92, 71.44, 63.84, 85.71, 64.78),
    ("R1-Reward, voting@15", FIRST): (76.46, 76.36, 66.32, 89.06, 73.70),
    ("Gemini-1.5-Pro", OWN): (67.20, None, None, None, None, 62.50, 50.80, 72.50, 64.20),
}


def read_row(row, number, folder):
    if "chosen" in row:  # the JSONL
        question, responses, choice = row["prompt"], [row["chosen"], row["rejected"]], 1
    else:
        question, responses = row["query"], list(row["response"])
        choice = {(0, 1): 1, (1, 0): 2}[tuple(row["human_ranking"])]  # rank 0 is the better one
    groups = {
        "benchmark": group_of(str(row["id"])),
        "paper": group_of(str(row["id"]), any_case=False),
    }
    return BenchmarkItem(row["id"], question, responses, choice, row["image"], None, groups)


def group_of(row_id, any_case=True):
    """By the first word of the id. The paper's rule knows lower case alone (deviation 3)."""
    if any_case:
        row_id = row_id.lower()
    word = re.split("[-_]", row_id)[0]
    if word in ("rlaif", "rlhf", "hallucination"):
        return "hallucination"
    if word in ("mathverse", "mmmu"):
        return "reasoning"
    return "general"
