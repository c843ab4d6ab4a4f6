"""
What parts of the released code do to training: the runs of `toy/ablations.sh released`, which are
made by toy/released.py, as a table and a figure. Means over seeds, +- the sample standard
deviation; bands from the lowest seed to the highest.

$ python toy/released_report.py --runs out/toy/released --out results/released_code
"""

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from core.flags import command_line, run_stage
from core.tables import markdown_table
from toy import compare
from toy.compare import percents, spread

UPDATES = {"sighted": "sees the pictures", "blind": "does not see them"}
BOUNDS = {"paper": "paper's, 3 sigma", "released": "released bounds", "none": "no filter"}
CLIPS = {"1e3": "on", "0": "off"}
PANELS = {
    "eval_sampled": "held-out accuracy, temperature 1",
    "filtered": "share of judgements dropped",
    "entropy": "entropy of a token",
}


def read_settings(folder):
    """{(update, bounds, clip): its runs}"""
    found = {}
    for update, bounds, clip in itertools.product(UPDATES, BOUNDS, CLIPS):
        name = f"{update}-{bounds}-{clip}"
        found[update, bounds, clip] = compare.read_runs(name, f"{folder}/{name}-")
    return found


def table(settings):
    first_run = next(iter(settings.values()))[0]
    early = first_run.held_out[1]["step"]
    head = f"update|filter|pre-clip|seeds|greedy, %|temperature 1, %|at step {early}, %|entropy"
    head += "|length, tokens|right judgements dropped, %|wrong judgements dropped, %"
    head += "|largest loss of a token|largest log ratio, either sign|tokens pre-clipped"
    rows = []
    for (update, bounds, clip), runs in settings.items():
        after = [run.held_out[-1] for run in runs]
        last = [run.steps[-1] for run in runs]
        row = [UPDATES[update], BOUNDS[bounds], CLIPS[clip], str(len(runs))]
        row += [percents(after, "eval_greedy"), percents(after, "eval_sampled")]
        row += [percents([run.held_out[1] for run in runs], "eval_sampled")]
        row += [spread([step["entropy"] for step in last], digits=3)]
        row += [spread([step["length"] for step in last])]
        row += [compare.dropped_by_filter(runs, 1), compare.dropped_by_filter(runs, 0)]
        row += [spread([run.largest("token_loss_max") for run in runs])]
        row += [spread([run.largest("log_ratio_max") for run in runs])]
        preclipped, tokens = (sum(r.preclipped for r in runs), sum(r.tokens for r in runs))
        row.append(f"{preclipped:.0f} of {tokens:.0f}")
        rows.append(row)
    return markdown_table(head.split("|"), rows)


def figure(settings, path):
    """
    A column for each kind of update, a colour for each filter. Runs without a pre-clip are dashed,
    and left out where they are the runs with one.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    canvas, axes = plt.subplots(
        len(PANELS), len(UPDATES), figsize=(11, 10), sharex=True, sharey="row", layout="constrained"
    )
    colours = dict(zip(BOUNDS, ("tab:blue", "tab:red", "tab:gray")))
    for (update, bounds, clip), runs in settings.items():
        on = CLIPS[clip] == "on"
        if not on and runs == settings[update, bounds, "1e3"]:
            continue
        column = list(UPDATES).index(update)
        for axis, key in zip(axes[:, column], PANELS):
            label = BOUNDS[bounds] + ("" if on else ", no pre-clip")
            style = "-" if on else "--"
            compare.draw(axis, runs, key, label=label, color=colours[bounds], linestyle=style)
    for axis, told in zip(axes[0], UPDATES.values()):
        axis.set_title(f"the update {told}")
    for axis in axes[-1]:
        axis.set_xlabel("step")
    for axis, title in zip(axes[:, 0], PANELS.values()):
        axis.set_ylabel(title)
    axes[0, 0].legend(frameon=False, fontsize=8)
    canvas.savefig(path, dpi=100)
    plt.close(canvas)


def parser():
    p = command_line(__doc__)
    p.add_argument("--runs", default="out/toy/released", help="folder of the runs")
    p.add_argument("--out", help="write OUT.table.md and OUT.png")
    return p


def main():
    args = parser().parse_args()
    settings = read_settings(args.runs)
    text = table(settings)
    print(text)
    if args.out:
        Path(args.out + ".table.md").write_text(text)
        figure(settings, args.out + ".png")


if __name__ == "__main__":
    run_stage("toy/released_report.py", main)
