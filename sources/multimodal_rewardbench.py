"""Multimodal RewardBench: all_data.json, as its own script joins it from other data sets."""

import math
import re
from collections import defaultdict

import numpy as np

from sources.reading import BenchmarkItem

KIND = "benchmark"
NAME = "Multimodal-RewardBench"
FILES = ("data/all_data.json", "all_data.json")
FIELDS = ("ID", "Text", "Image", "Output1", "Output2", "Better", "Category")
PUBLISHED = {  # grouping: {group: rows}; toxicity is in none of the paper's seven columns
    "columns": {
        "correctness": 623,
        "preference": 654,
        "knowledge": 630,
        "math": 514,
        "coding": 584,
        "safety": 508,
        "vqa": 1198,
    }
}
FIRST, OWN = "better answer always first", "benchmark's protocol"
PAPER_COLUMNS = ("columns: macro", *(f"columns: {name}" for name in PUBLISHED["columns"]))
PAPER_ROWS = {  # Table 4; (method, protocol): percent
    ("R1-Reward", FIRST): (82.2, 77.5, 74.0, 74.9, 83.1, 79.6, 99.6, 86.5),
    ("R1-Reward, voting@15", FIRST): (83.3, 78.0, 77.2, 74.6, 81.3, 85.8, 99.4, 87.0),
    ("Gemini 1.5 Pro", OWN): (71.9, 63.5, 67.7, 66.3, 68.9, 55.5, 94.5, 87.2),
}


def read_row(row, number, folder):
    return BenchmarkItem(
        id=row["ID"],
        question=row["Text"],
        responses=[row["Output1"], row["Output2"]],
        choice={"Output1": 1, "Output2": 2}[row["Better"]],
        image=row["Image"],
        video=None,
        groups={"columns": column_of(str(row["ID"]).lower(), row["Category"])},
    )


def column_of(row_id, category):
    if category == "reasoning":
        return "math" if row_id.startswith("math") else "coding"
    if category == "safety":
        return "safety" if row_id.startswith("pairs") else "toxicity"
    return {
        "open_generation/correctness_task": "correctness",
        "open_generation/preference_task": "preference",
        "knowledge": "knowledge",
        "vqa": "vqa",
    }[category]


def check_rows(rows):
    """
    Warnings about the file. The benchmark's script joins questions by their row number to data sets
    that have changed since, so that some questions may belong to other answers.
    """
    rows_of_kind = defaultdict(list)
    for row in rows:
        kind = re.split(r"[-_\d]", row.id)[0]
        rows_of_kind[kind].append(row)
    warnings = []
    for kind, its_rows in sorted(rows_of_kind.items()):
        z = overlap_z_score(its_rows)
        if z < 2:
            problem = f"the {kind} questions do not seem to belong to their answers (z = {z:.1f})"
            warnings.append(f"WARNING: {problem}; join the file anew")
    return warnings


def overlap_z_score(rows):
    """
    Do questions share more words with their own answers than with those half the list away?
    inf: too few words to tell, or too few questions that differ (nocaps has a single one).
    """
    half = len(rows) // 2
    gains = []
    for row, other_row in zip(rows, rows[half:] + rows[:half]):
        if row.question == other_row.question:
            continue
        question = long_words(row.question)
        own = len(question & long_words(" ".join(row.responses)))
        other = len(question & long_words(" ".join(other_row.responses)))
        gains.append((own - other) / max(1, len(question)))
    if np.count_nonzero(gains) < 20:
        return math.inf
    with np.errstate(divide="ignore"):  # all gains may be equal
        return np.mean(gains) / np.std(gains, ddof=1) * math.sqrt(len(gains))


def long_words(text):
    return {word for word in re.findall(r"\w+", text.lower()) if len(word) > 3}
