"""
Several runs of evaluate.py, with other seeds of training, as one table: means, +- the sample
standard deviation over the seeds.

A setting is NAME=FOLDER/PREFIX: its runs are the folders whose names begin so, each with the
results.json that evaluate.py wrote.

$ python toy/seeds_report.py "cold start=out/toy/pipeline/eval-sft-" \\
    "StableReinforce=out/toy/pipeline/eval-rl-" --out results/toy_pipeline.md
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from core.files import InputError
from core.flags import command_line, run_stage
from core.tables import markdown_table
from toy.compare import setting, spread

METHODS = (
    "one sample",
    "right in both orders",
    "voting@5",
    "voting@15",
    "confidence-weighted@16",
    "early stopping, at most 16",
    "any@16",
)


def read_results(name, prefix):
    """The parts of each run's results.json, {benchmark: its part}."""
    paths = Path(prefix).parent.glob(f"{Path(prefix).name}*/results.json")
    found = [json.loads(path.read_text())["benches"] for path in sorted(paths)]
    if not found:
        raise InputError(
            f"{name}={prefix}: no run there; expected NAME=FOLDER/PREFIX, the beginning of the "
            "names of folders, each with a results.json"
        )
    return found


def cell(runs, bench, method):
    values = []
    for run in runs:
        line = run[bench]["lines"].get(method)
        if line is not None and line["overall"][0] is not None:
            values.append(line["overall"][0])
    return spread(values) if values else ""


def common_benches(settings):
    """The benchmarks that every run has."""
    benches = []
    for runs in settings.values():
        benches += [set(run) for run in runs]
    return sorted(set.intersection(*benches))


def table(settings):
    """Methods that no run has are left out."""
    rows = []
    for bench in common_benches(settings):
        for name, runs in settings.items():
            number = runs[0][bench]["about"]["rows"]
            row = {"benchmark": bench, "rows": str(number), "model": name, "seeds": str(len(runs))}
            for method in METHODS:
                row[method] = cell(runs, bench, method)
            rows.append(row)
    titles = [title for title in rows[0] if any(row[title] for row in rows)]
    cells = [[row[title] for title in titles] for row in rows]
    return markdown_table(titles, cells)


def parser():
    p = command_line(__doc__)
    add = p.add_argument
    add("settings", nargs="+", type=setting, metavar="NAME=FOLDER/PREFIX", help="runs of a setting")
    add("--out", help="write the table there, too")
    return p


def main():
    args = parser().parse_args()
    settings = {name: read_results(name, prefix) for name, prefix in args.settings}
    text = table(settings)
    print(text)
    if args.out:
        Path(args.out).write_text(text)


if __name__ == "__main__":
    run_stage("toy/seeds_report.py", main)
