"""
Several runs of rl.py side by side, each setting with its seeds: one table, and curves as in Fig. 2 and 4.

A setting is NAME=FOLDER/PREFIX: its runs are the folders whose names begin so. Held-out accuracies are those of the run's own
--eval_data, first and last. Means over seeds, +- the sample standard deviation. Contradictions: of the judgements of the last
five steps that describe something and have a verdict, those whose last sentence names the other response.

$ python toy/compare.py "weight 0.5=out/toy/seeds/w0.5-" "weight 0=out/toy/seeds/w0-" --out results/toy_rl
"""
import argparse
import json
import statistics
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: `toy` is found from the folder above
from toy import world

PANELS = {"held-out accuracy, temperature 1": "eval_sampled", "held-out accuracy, greedy": "eval_greedy", "consistency": "consistency",
          "length, tokens": "length", "largest loss of a step": "loss_max", "largest |log ratio| before pre-clip": "log_ratio_max",
          "entropy": "entropy", "share of tokens pre-clipped": "preclipped"}


def run_of(folder):
    """What the table needs of one run."""
    rows = [row for row in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "step" in row]
    steps, held = [row for row in rows if "loss" in row], [row for row in rows if "eval_greedy" in row]
    if len(held) < 2:
        sys.exit(f"{folder}: {len(held)} held-out accuracies in log.jsonl; legal: two, before and after; run it to its end "
                 "with --eval_data")
    last, manners = steps[-1]["step"], {}
    said = [json.loads(line) for path in folder.glob("rollouts-*.jsonl") for line in path.read_text().splitlines()]
    agreed = {}  # what the judge said of those it was asked about: by whether the reasoning does lead to the verdict, and the verdict
    for row in said:
        if row["consistency"] is not None:
            agreed.setdefault((world.manner_of(row["text"]) != "inconsistent", row["choice"]), []).append(row["consistency"])
    for name, begin, end in (("first", 1, 5), ("last", last - 4, last)):
        manners[name] = Counter(world.manner_of(row["text"]) or "no verdict" for row in said if begin <= row["step"] <= end)
    worst = lambda key: max((row[key] for row in steps if row.get(key) is not None), default=float("nan"))
    tokens = [row["length"] * row["samples"] for row in steps]
    return {"steps": steps, "held": held, "manners": manners, "agreed": agreed,
            "loss_max": worst("loss_max"), "token_loss_max": worst("token_loss_max"), "log_ratio": worst("log_ratio_max"),
            "preclipped": sum(n * row["preclipped"] for n, row in zip(tokens, steps)), "tokens": sum(tokens),
            "filtered": sum(row["filtered"] * row["samples"] for row in steps), "judgements": sum(row["samples"] for row in steps),
            "skipped": sum(row["skipped"] for row in steps), "seconds": sum(row["seconds"] for row in steps)}


def spread(values, scale=1.0, digits=1):
    known = [v for v in values if v is not None]  # None: in a broken run nobody may be right, and nothing was judged
    mean = f"{scale * statistics.fmean(known):.{digits}f}" if known else "none"
    mean += f" ± {scale * statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return mean + (f" ({len(known)} of {len(values)} runs)" if len(known) < len(values) else "")


def contradictions(manners):
    describe = sum(manners[m] for m in ("careful", "verbose", "inconsistent"))
    return manners["inconsistent"] / max(1, describe)


def table(settings):
    names = list(settings)
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    row = lambda title, cell: lines.append(f"| {title} | " + " | ".join(cell(settings[name]) for name in names) + " |")
    row("seeds", lambda runs: str(len(runs)))
    row("held-out pairs", lambda runs: f"{runs[0]['held'][0]['eval_n']:.0f}")
    for key, title in (("eval_greedy", "greedy accuracy"), ("eval_sampled", "accuracy at temperature 1")):
        row(f"{title}, before, %", lambda runs: spread([run["held"][0][key] for run in runs], 100))
        row(f"{title}, after, %", lambda runs: spread([run["held"][-1][key] for run in runs], 100))
    row("format at temperature 1, after, %", lambda runs: spread([run["held"][-1]["eval_sampled_format"] for run in runs], 100))
    for key, title, scale in (("consistency", "consistency of right verdicts, %", 100), ("length", "length, tokens", 1)):
        for which, at in (("first", 0), ("last", -1)):
            row(f"{title}, {which} step", lambda runs: spread([run["steps"][at][key] for run in runs], scale))
    for manner in world.MANNERS:
        share = lambda run, when: 100 * run["manners"][when][manner] / max(1, run["manners"][when].total())
        row(f"{manner}, first five steps to last five, %", lambda runs: " to ".join(
            f"{statistics.fmean(share(run, when) for run in runs):.0f}" for when in ("first", "last")))
    row("contradictions among descriptions, last five steps, %",
        lambda runs: spread([contradictions(run["manners"]["last"]) for run in runs], 100))
    for truth, name in ((True, "consistent"), (False, "contradictory")):
        row(f"{name} ones that the judge takes for consistent, verdict 1 and verdict 2, %", lambda runs: " and ".join(
            spread([100 * statistics.fmean(run["agreed"][truth, v]) if (truth, v) in run["agreed"] else None for run in runs], 1, 0)
            for v in (1, 2)))
    row("largest loss of a mini-batch", lambda runs: spread([run["loss_max"] for run in runs], 1, 2))
    row("largest loss of a token", lambda runs: spread([run["token_loss_max"] for run in runs], 1, 2))
    row("largest log ratio, either sign", lambda runs: f"{max(run['log_ratio'] for run in runs):.1f}")
    total = lambda runs, key: sum(run[key] for run in runs)
    row("tokens pre-clipped, of all", lambda runs: f"{total(runs, 'preclipped'):.0f} of {total(runs, 'tokens'):.0f}")
    row("judgements filtered, of all", lambda runs: f"{total(runs, 'filtered'):.0f} of {total(runs, 'judgements'):.0f}")
    row("steps skipped: gradient not finite", lambda runs: str(sum(run["skipped"] for run in runs)))
    row("seconds a run", lambda runs: spread([run["seconds"] for run in runs], 1, 0))
    return "\n".join(lines)


def figure(settings, path):
    """A line a setting, the mean of its seeds, and a band from the lowest to the highest."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    canvas, axes = plt.subplots(2, 4, figsize=(16, 6.5), layout="constrained")
    for axis, (title, key) in zip(axes.flat, PANELS.items()):
        for name, runs in settings.items():
            points = {}
            for run in runs:
                for row in run["held"] if key.startswith("eval") else run["steps"]:
                    if row.get(key) is not None:
                        points.setdefault(row["step"], []).append(row[key])
            steps = sorted(points)
            axis.plot(steps, [statistics.fmean(points[s]) for s in steps], label=name)
            axis.fill_between(steps, [min(points[s]) for s in steps], [max(points[s]) for s in steps], alpha=0.2)
        axis.set(title=title, xlabel="step")
        if "loss" in key:
            axis.set_yscale("symlog", linthresh=0.1)
    axes[0, 0].legend(frameon=False)
    canvas.savefig(path, dpi=80)
    plt.close(canvas)


def runs_of(name, prefix):
    folders = sorted(path.parent for path in Path(prefix).parent.glob(Path(prefix).name + "*/log.jsonl"))
    if not folders:
        sys.exit(f"{name}={prefix}: no run there; legal: NAME=FOLDER/PREFIX, where the folders of runs, each with a log.jsonl, begin so")
    return [run_of(folder) for folder in folders]


def setting(text):
    name, equals, prefix = text.partition("=")
    if not (name and equals and prefix):
        raise argparse.ArgumentTypeError(f"{text!r}; legal: NAME=FOLDER/PREFIX")
    return name, prefix


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("settings", nargs="+", type=setting, metavar="NAME=FOLDER/PREFIX", help="the runs of a setting")
    p.add_argument("--out", help="write the table to OUT.md and the curves to OUT.png as well")
    return p


def main():
    args = parser().parse_args()
    settings = {name: runs_of(name, prefix) for name, prefix in args.settings}
    print(table(settings))
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out + ".md").write_text(table(settings) + "\n")
        figure(settings, args.out + ".png")
        print(f"\n{args.out}.md, {args.out}.png")


if __name__ == "__main__":
    main()
