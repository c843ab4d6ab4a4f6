"""MM-RLHF-RewardBench: image or video (a folder of frames), prompt, chosen and rejected."""

from pathlib import Path

from sources.reading import BenchmarkItem

KIND = "benchmark"
NAME = "MM-RLHF-RewardBench"
FILES = ("mm_reward_bench.jsonl",)
FIELDS = ("id", "prompt", "chosen", "rejected")
SETS_BY_ID = True  # the rows of an id are pairs of the same answers: Acc+ asks for all of them
PUBLISHED = {"category": {"mcq": 42, "long": 37, "short": 34, "safety": 32, "video": 25}}  # rows
FIRST, OWN = "better answer always first", "order not stated"
PAPER_COLUMNS = (
    "overall",
    "Acc+",
    *(f"category: {name}" for name in PUBLISHED["category"]),
)
PAPER_ROWS = {  # Table 8; (method, protocol): percent
    ("R1-Reward", FIRST): (80.59, 54.35, 80.95, 89.19, 82.35, 75.00, 72.00),
    ("R1-Reward, voting@15", FIRST): (86.47, 67.39, 83.33, 97.30, 91.18, 78.12, 80.00),
    ("Claude-3.7-Sonnet", OWN): (82.35, 65.22, 66.67, 91.89, 91.18, 87.50, 76.00),
}


def read_row(row, number, folder):
    image, video = row.get("image"), row.get("video")
    return BenchmarkItem(
        id=row["id"],
        question=row["prompt"],
        responses=[row["chosen"], row["rejected"]],
        choice=1,
        image=image,
        video=video,
        groups={"category": category_of(image or row["video"])},
    )


def category_of(path):
    """The folder of the picture that is named like one."""
    for part in Path(path).parts:
        if part in PUBLISHED["category"]:
            return part
    raise LookupError(f"{path!r} is in no folder of {', '.join(PUBLISHED['category'])}")
