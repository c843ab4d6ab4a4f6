"""
The end of `make toy`: one table of the run, with base model, cold start and reinforcement learning,
and what is planted in the toy world.

$ python toy/report.py --out out/toy
"""

import json
import os
import platform
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from core.flags import command_line
from core.tables import markdown_table
from toy import world

NOTE = """\
Percent, each pair shown in both orders, half of the 16 samples (of the base model: 4) in each;
± is half of a 95 % interval over rows. Always 1, the longer answer and a coin score 50. The base
model gives no verdict: it answers the question instead."""
PLANTED = """\
What is planted: the stand-in annotator's reasonings come in four manners ({shares}). Hasty ones do
not describe the picture: they are right about {seen}, and guess elsewhere. The likeliest manner, so
the greedy one after the cold start, is hasty. Most of what reinforcement learning gains here is
that it finds the better manner, and a model made to begin carefully is about as good without it.
The consistency judge is a rule behind HTTP."""
METHODS = (
    "one sample",
    "better answer first",
    "better answer second",
    "right in both orders",
    "voting@15",
    "early stopping, at most 16",
    "calibrated@16",
    "any@16",
)
MODELS = {"base": "base model", "sft": "cold start (SFT)", "rl": "StableReinforce"}
LOGGED = {  # folder: keys of its log
    "sft": ("val_loss", "val_format", "val_accuracy"),
    "rl": ("reward", "result", "consistency", "format", "length", "eval_greedy", "eval_sampled"),
    "downstream": ("exact", "eval_greedy", "eval_sampled", "eval_win"),
}


def scores(out):
    """A row for each benchmark and model."""
    rows = []
    for key, model in MODELS.items():
        path = out / f"eval-{key}" / "results.json"
        if path.exists():
            for bench, result in json.loads(path.read_text())["benches"].items():
                cells = [cell(result["lines"].get(method)) for method in METHODS]
                rows.append([bench, result["about"]["rows"], model, *cells])
    return sorted(rows, key=lambda row: row[0])  # the models stay in their order


def cell(columns):
    """The overall accuracy of a method, with half of its interval."""
    if columns is None or columns["overall"][0] is None:
        return ""
    value, low, high = columns["overall"]
    return f"{value:.1f} ± {(high - low) / 2:.1f}"


def training(out):
    """First and last value of each number of the logs."""
    rows = []
    for folder, keys in LOGGED.items():
        path = out / folder / "log.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        logged = [json.loads(line) for line in lines]
        for key in keys:
            values = [row[key] for row in logged if row.get(key) is not None]
            if values:
                rows.append([f"{folder}: {key}", f"{values[0]:.3f}", f"{values[-1]:.3f}"])
    return rows


def seconds_of_stages(out):
    """What toy/run.sh noted, in its order."""
    files = sorted((out / "done").glob("*"), key=lambda path: path.stat().st_mtime)
    rows = [[path.name, int(path.read_text())] for path in files]
    return [*rows, ["all", sum(seconds for _, seconds in rows)]]


def processor():
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def report(out):
    shares = [f"{manner} {share:.0%}" for manner, share in zip(world.MANNERS, world.SHARES)]
    planted = PLANTED.format(shares=", ".join(shares), seen=" and ".join(world.AT_A_GLANCE))
    machine = f"{os.cpu_count()} cores, {processor()}, Python {platform.python_version()}."
    where = (
        f"Figures: {out}/sft/curves.png, {out}/rl/curves.png, {out}/eval-rl/scaling.png. "
        f"Judgements to read: {out}/eval-rl/page.html. Every group of every benchmark: "
        f"{out}/eval-*/table.md."
    )
    parts = [
        "# R1-Reward on the toy world",
        NOTE,
        table(["benchmark", "rows", "model", *METHODS], scores(out)),
        planted,
        table(["training", "first", "last"], training(out)),
        table(["stage", "seconds"], seconds_of_stages(out)),
        machine,
        where,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(head, rows):
    return markdown_table(head, rows).strip() if rows else ""


def parser():
    p = command_line(__doc__)
    p.add_argument("--out", default="out/toy", help="folder of the run; report.md is written there")
    return p


def main():
    out = Path(parser().parse_args().out)
    text = report(out)
    (out / "report.md").write_text(text)
    print(f"{text}\n{out}/report.md")


if __name__ == "__main__":
    main()
