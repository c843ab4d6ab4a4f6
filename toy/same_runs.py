"""
Runs that need not be made twice: where no |log ratio| of a run without a pre-clip reached log 1000,
the run with it, all else being equal, is the same to the bit, since a clamp changes nothing within
its bounds. For each such run, PREFIX-0-SEED, this links PREFIX-1e3-SEED to it.

$ python toy/same_runs.py out/toy/released/sighted-paper-0-0 out/toy/released/blind-paper-0-0
"""

import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from core.files import InputError
from core.flags import command_line, run_stage

BOUND = math.log(1e3)


def largest_log_ratio(folder):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return max(row["log_ratio_max"] for row in rows if "log_ratio_max" in row)


def twin_of(folder):
    """The folder of the run with a pre-clip."""
    prefix, clip, seed = folder.name.rsplit("-", 2)
    if clip != "0":
        raise InputError(f"{folder}: expected a run without a pre-clip, PREFIX-0-SEED")
    return folder.with_name(f"{prefix}-1e3-{seed}")


def link_twin(folder):
    """Link the twin, if it is the same run; say what was found."""
    twin, largest = twin_of(folder), largest_log_ratio(folder)
    if largest >= BOUND:
        return f"{folder}: |log ratio| reached {largest:.1f}: {twin.name} is another run"
    if not twin.exists():
        twin.symlink_to(folder.name)
    return f"{folder}: |log ratio| stayed below {largest:.2f}: {twin.name} is the same run"


def parser():
    p = command_line(__doc__)
    p.add_argument("runs", nargs="+", type=Path, help="folders of runs with --clip 0")
    return p


def main():
    for folder in parser().parse_args().runs:
        print(link_twin(folder))


if __name__ == "__main__":
    run_stage("toy/same_runs.py", main)
