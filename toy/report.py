"""
The end of `make toy`: one table of the toy run, base model, cold start and reinforcement learning side by side, with what is
planted in the toy world said beside it.

$ python toy/report.py --out out/toy
"""
import argparse
import json
import os
import platform
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: `toy` is found from the folder above
from toy import world

PLANTED = """What is planted: the stand-in annotator's reasonings come in four manners ({shares}). Hasty ones do not describe
the picture: they are right about {seen}, and guess elsewhere; the likeliest manner, so the greedy one after the cold start, is hasty.
Most of what reinforcement learning gains here is that it finds the better manner, and a model made to begin carefully is about as
good without it. The consistency judge is a rule behind HTTP."""
NOTE = """Percent, each pair shown in both orders, half of the 16 samples in each; ± is half of a 95 % interval over rows. Always 1, the
longer answer and a coin score 50. The base model gives no verdict: it answers the question instead."""
LINES = ("one sample", "better answer first", "better answer second", "right in both orders", "voting@15", "early stopping, at most 16",
         "calibrated@16", "any@16")
MODELS = {"base": "base model", "sft": "cold start (SFT)", "rl": "StableReinforce"}


def processor():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def lines_of(out):
    """A row a benchmark and model: its name, its rows, the model, the cells of LINES: percent, and half of the 95 % interval."""
    rows = []
    for key, label in MODELS.items():
        path = out / f"eval-{key}" / "results.json"
        if not path.exists():
            continue
        for bench, r in json.loads(path.read_text())["benches"].items():
            found = {name: line["overall"] for name, line in r["lines"].items()}
            cells = [f"{v[0]:.1f} ± {(v[2] - v[1]) / 2:.1f}" if (v := found.get(name)) and v[0] is not None else "" for name in LINES]
            rows.append((bench, r["about"]["rows"], label, cells))
    return sorted(rows, key=lambda row: row[0])  # stable: base, SFT, RL stay in their order


def training(folder, keys):
    """{key: (its first value, its last)} of a log."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] if (folder / "log.jsonl").exists() else []
    found = {}
    for key in keys:
        values = [row[key] for row in rows if row.get(key) is not None]
        if values:
            found[key] = (values[0], values[-1])
    return found


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", default="out/toy", help="folder of the run; report.md is written there")
    return p


def main():
    args = parser().parse_args()
    out = Path(args.out)
    text = ["# R1-Reward on the toy world", "", NOTE, "",
            "| benchmark | rows | model | " + " | ".join(LINES) + " |", "|---|---:|---|" + "---:|" * len(LINES)]
    text += [f"| {bench} | {n} | {label} | " + " | ".join(cells) + " |" for bench, n, label, cells in lines_of(out)]
    shares = ", ".join(f"{manner} {share:.0%}" for manner, share in zip(world.MANNERS, world.SHARES))
    text += ["", PLANTED.format(shares=shares, seen=" and ".join(world.AT_A_GLANCE)), "", "| training | first | last |", "|---|---:|---:|"]
    for folder, keys in (("sft", ("val_loss", "val_format", "val_accuracy")),
                         ("rl", ("reward", "result", "consistency", "format", "length", "eval_greedy", "eval_sampled")),
                         ("downstream", ("exact", "eval_greedy", "eval_sampled", "eval_win"))):
        text += [f"| {folder}: {key} | {a:.3f} | {b:.3f} |" for key, (a, b) in training(out / folder, keys).items()]
    done = sorted((out / "done").glob("*"), key=lambda path: path.stat().st_mtime)
    text += ["", "| stage | seconds |", "|---|---:|", *(f"| {path.name} | {path.read_text().strip()} |" for path in done),
             f"| all | {sum(int(path.read_text()) for path in done)} |", "",
             f"{os.cpu_count()} cores, {processor()}, Python {platform.python_version()}.", "",
             f"Figures: {out}/sft/curves.png, {out}/rl/curves.png, {out}/eval-rl/scaling.png. Judgements to read: {out}/eval-rl/page.html. "
             f"Every group of every benchmark: {out}/eval-*/table.md."]
    (out / "report.md").write_text("\n".join(text) + "\n")
    print("\n".join(text) + f"\n\n{out}/report.md")


if __name__ == "__main__":
    main()
