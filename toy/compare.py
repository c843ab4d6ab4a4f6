"""
Several runs of rl.py compared, each setting with its seeds: one table, and curves as in Fig. 2 and
4.

A setting is NAME=FOLDER/PREFIX: its runs are the folders whose names begin so. Held-out accuracies
are the first and the last on the run's --eval_data. Means over seeds, +- the sample standard
deviation. Contradictions: of the judgements of the last five steps that describe something and
have a verdict, those whose last sentence names the other response.

$ python toy/compare.py "weight 0.5=out/toy/seeds/w0.5-" "weight 0=out/toy/seeds/w0-" \\
    --out results/toy_rl
"""

import argparse
import json
import statistics
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from core.files import InputError
from core.flags import command_line, run_stage
from core.tables import markdown_table
from toy import world

PANELS = {
    "held-out accuracy, temperature 1": "eval_sampled",
    "held-out accuracy, greedy": "eval_greedy",
    "consistency": "consistency",
    "length, tokens": "length",
    "largest loss of a step": "loss_max",
    "largest |log ratio| before pre-clip": "log_ratio_max",
    "entropy": "entropy",
    "share of tokens pre-clipped": "preclipped",
}


@dataclass
class Run:
    steps: list[dict]  # rows of log.jsonl with a loss
    held_out: list[dict]  # rows of log.jsonl with a held-out accuracy
    first_manners: Counter  # judgements of the first five steps by manner
    last_manners: Counter  # of the last five
    agreed: dict  # (is the reasoning consistent, the verdict): what the judge said, 1 or 0
    kept: dict  # is the verdict right, 1 or 0: whether the filter kept each such judgement

    def largest(self, key):
        values = [row[key] for row in self.steps if row.get(key) is not None]
        return max(values, default=float("nan"))

    def total(self, key):
        return sum(row[key] for row in self.steps)

    @property
    def tokens(self):
        return sum(row["length"] * row["samples"] for row in self.steps)

    @property
    def preclipped(self):
        return sum(row["preclipped"] * row["length"] * row["samples"] for row in self.steps)

    @property
    def risen_in_a_thousand(self):
        """Tokens that toy/stale.py counts; None in the log of any other script."""
        if "risen" not in self.steps[0]:
            return None
        risen = sum(row["risen"] * row["length"] * row["samples"] for row in self.steps)
        return 1000 * risen / self.tokens

    @property
    def filtered(self):
        return sum(row["filtered"] * row["samples"] for row in self.steps)

    @property
    def contradictions(self):
        """Their share among the descriptions of the last five steps."""
        manners = self.last_manners
        descriptions = manners["careful"] + manners["verbose"] + manners["inconsistent"]
        return manners["inconsistent"] / max(1, descriptions)


def json_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_run(folder):
    rows = [row for row in json_lines(folder / "log.jsonl") if "step" in row]
    steps = [row for row in rows if "loss" in row]
    held_out = [row for row in rows if "eval_greedy" in row]
    if len(held_out) < 2:
        raise InputError(
            f"{folder}: expected two held-out accuracies in log.jsonl, before and after, got "
            f"{len(held_out)}; run it to its end with --eval_data"
        )
    last = steps[-1]["step"]
    run = Run(steps, held_out, Counter(), Counter(), defaultdict(list), defaultdict(list))
    for path in folder.glob("rollouts-*.jsonl"):
        for row in json_lines(path):
            manner = world.manner_of(row["text"]) or "no verdict"
            if row["step"] <= 5:
                run.first_manners[manner] += 1
            if row["step"] > last - 5:
                run.last_manners[manner] += 1
            run.kept[row["result"]].append(row["kept"])
            if row["consistency"] is not None:
                consistent = manner != "inconsistent"
                run.agreed[consistent, row["choice"]].append(row["consistency"])
    return run


def read_runs(name, prefix):
    logs = Path(prefix).parent.glob(f"{Path(prefix).name}*/log.jsonl")
    folders = sorted(log.parent for log in logs)
    if not folders:
        raise InputError(
            f"{name}={prefix}: no run there; expected NAME=FOLDER/PREFIX, the beginning of the "
            "names of folders, each with a log.jsonl"
        )
    return [read_run(folder) for folder in folders]


# --------------------------------------------------------------------------------------------------
# The table: a column for each setting


def spread(values, digits=1):
    """Mean and standard deviation. In a broken run nothing may be judged: its value is None."""
    known = [value for value in values if value is not None]
    text = f"{statistics.fmean(known):.{digits}f}" if known else "none"
    if len(known) > 1:
        text += f" ± {statistics.stdev(known):.{digits}f}"
    if len(known) < len(values):
        text += f" ({len(known)} of {len(values)} runs)"
    return text


def percents(rows, key):
    values = [row[key] for row in rows]
    return spread([None if value is None else 100 * value for value in values])


def manner_shares(runs, manner):
    shares = []
    for manners in ([run.first_manners for run in runs], [run.last_manners for run in runs]):
        mean = statistics.fmean(m[manner] / max(1, m.total()) for m in manners)
        shares.append(f"{100 * mean:.0f}")
    return " to ".join(shares)


def taken_for_consistent(runs, consistent, verdict):
    """In percent, of those that the judge was asked about."""
    shares = []
    for run in runs:
        answers = run.agreed.get((consistent, verdict))
        shares.append(100 * statistics.fmean(answers) if answers else None)
    return spread(shares, digits=0)


def dropped_by_filter(runs, result):
    """In percent, of the judgements whose verdict is right (1) or not (0)."""
    shares = []
    for run in runs:
        kept = run.kept.get(result)
        shares.append(100 * (1 - statistics.fmean(kept)) if kept else None)
    return spread(shares)


def column(runs):
    """{title: cell} of a setting."""
    before, after = [run.held_out[0] for run in runs], [run.held_out[-1] for run in runs]
    first, last = [run.steps[0] for run in runs], [run.steps[-1] for run in runs]
    cells = {
        "seeds": str(len(runs)),
        "held-out pairs": f"{before[0]['eval_n']:.0f}",
        "greedy accuracy, before, %": percents(before, "eval_greedy"),
        "greedy accuracy, after, %": percents(after, "eval_greedy"),
        "accuracy at temperature 1, before, %": percents(before, "eval_sampled"),
        "accuracy at temperature 1, after, %": percents(after, "eval_sampled"),
        "format at temperature 1, after, %": percents(after, "eval_sampled_format"),
        "consistency of right verdicts, %, first step": percents(first, "consistency"),
        "consistency of right verdicts, %, last step": percents(last, "consistency"),
        "length, tokens, first step": spread([row["length"] for row in first]),
        "length, tokens, last step": spread([row["length"] for row in last]),
    }
    for manner in world.MANNERS:
        cells[f"{manner}, first five steps to last five, %"] = manner_shares(runs, manner)
    contradictions = [100 * run.contradictions for run in runs]
    cells["contradictions among descriptions, last five steps, %"] = spread(contradictions)
    for name, consistent in (("consistent", True), ("contradictory", False)):
        title = f"{name} ones that the judge takes for consistent, verdict 1 and verdict 2, %"
        verdicts = [taken_for_consistent(runs, consistent, verdict) for verdict in (1, 2)]
        cells[title] = " and ".join(verdicts)
    return cells | stability(runs)


def stability(runs):
    """The rest of column(): what a setting that breaks shows."""
    preclipped, tokens = (sum(run.preclipped for run in runs), sum(run.tokens for run in runs))
    filtered = sum(run.filtered for run in runs)
    judgements = sum(run.total("samples") for run in runs)
    log_ratio = max(run.largest("log_ratio_max") for run in runs)
    return {
        "largest loss of a mini-batch": spread([run.largest("loss_max") for run in runs], 2),
        "largest loss of a token": spread([run.largest("token_loss_max") for run in runs], 2),
        "largest log ratio, either sign": f"{log_ratio:.1f}",
        "tokens pre-clipped, of all": f"{preclipped:.0f} of {tokens:.0f}",
        "tokens that rose a thousandfold while A < 0, in a thousand": spread(
            [run.risen_in_a_thousand for run in runs], 2
        ),
        "judgements filtered, of all": f"{filtered:.0f} of {judgements:.0f}",
        "right judgements filtered, %": dropped_by_filter(runs, 1),
        "wrong judgements filtered, %": dropped_by_filter(runs, 0),
        "steps skipped: gradient not finite": str(sum(run.total("skipped") for run in runs)),
        "seconds a run": spread([run.total("seconds") for run in runs], digits=0),
    }


def table(settings):
    columns = [column(runs) for runs in settings.values()]
    rows = [[title, *(cells[title] for cells in columns)] for title in columns[0]]
    return markdown_table(["", *settings], rows)


def figure(settings, path):
    """A line for each setting, the mean of its seeds, in a band from the lowest to the highest."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    canvas, axes = plt.subplots(2, 4, figsize=(16, 6.5), layout="constrained")
    for axis, (title, key) in zip(axes.flat, PANELS.items()):
        for name, runs in settings.items():
            draw(axis, runs, key, label=name)
        axis.set(title=title, xlabel="step")
        if "loss" in key:
            axis.set_yscale("symlog", linthresh=0.1)
    axes[0, 0].legend(frameon=False)
    canvas.savefig(path, dpi=80)
    plt.close(canvas)


def draw(axis, runs, key, **style):
    """A line, the mean of the runs, and a band from their lowest to their highest."""
    points = values_by_step(runs, key)
    steps = sorted(points)
    means = [statistics.fmean(points[step]) for step in steps]
    lowest = [min(points[step]) for step in steps]
    highest = [max(points[step]) for step in steps]
    (line,) = axis.plot(steps, means, **style)
    axis.fill_between(steps, lowest, highest, alpha=0.2, color=line.get_color(), linewidth=0)


def values_by_step(runs, key):
    points = defaultdict(list)
    for run in runs:
        for row in run.held_out if key.startswith("eval") else run.steps:
            if row.get(key) is not None:
                points[row["step"]].append(row[key])
    return points


def setting(text):
    """The type of a setting on the command line."""
    name, _, prefix = text.partition("=")
    if not name or not prefix:
        raise argparse.ArgumentTypeError(f"expected NAME=FOLDER/PREFIX, got {text!r}")
    return name, prefix


def parser():
    p = command_line(__doc__)
    add = p.add_argument
    add("settings", nargs="+", type=setting, metavar="NAME=FOLDER/PREFIX", help="runs of a setting")
    add("--out", help="write the table to OUT.md and the curves to OUT.png as well")
    return p


def main():
    args = parser().parse_args()
    settings = {name: read_runs(name, prefix) for name, prefix in args.settings}
    text = table(settings)
    print(text)
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out + ".md").write_text(text)
        figure(settings, args.out + ".png")
        print(f"{args.out}.md, {args.out}.png")


if __name__ == "__main__":
    run_stage("toy/compare.py", main)
