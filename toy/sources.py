"""
The toy world as every training source and benchmark of the paper, each in the schema that it has on
the hub, so that toy and real data go through the same readers.

$ python toy/sources.py --out out/toy/data --seed 0
$ python toy/sources.py --out out/toy/small --seed 0 --scale 0.1

  train/     RLAIF-V, VLFeedback, POVID, WildVision-Battle, MM-RLHF, R1-Reward-RL, and pairs.jsonl,
             as people's own data would be (prompt, chosen, rejected, image or none). Of each set
             of twins, one. planted.json counts the rows that are broken on purpose: {source:
             {reason: rows}}. A reader drops each of these and no other.
  dev/       to choose settings by, and test/, to report: VL-RewardBench, Multimodal-RewardBench,
             MM-RLHF-RewardBench, and pairs.jsonl in the project's own format. Full sets of twins:
             who reads only the text is right half of the time.
  tasks/     questions with a short answer for downstream_grpo.py; the test tasks once more as V*,
             the training tasks as arXivQA and ThinkLite-VL. In the test tasks, too, each answer of
             a set is right once.
  key.jsonl  the answer key of toy/server.py, an item a line, found by key_of(the question as a
             reader restores it, its pictures). It has neither the broken rows nor the questions of
             V* and arXivQA with their options.

Paths are relative to the folder of the file that holds them; in VLFeedback to merged_images, in
POVID to coco. The same --seed gives the same bytes; each source of each split has its own random
numbers.

Differs from the real files:
1) pictures are PNG and called .png where the hub has .jpg; so VL-RewardBench's two files hold the
   same bytes
2) the question of a WildVision row of turn 2 contains the first turn, which both models share here.
   In real rows each may have answered turn 1 in its own way; such rows are planted as broken
   ("different histories")
3) the reasoning ids that VL-RewardBench repeats belong to two different pictures
4) no toxicity in Multimodal RewardBench, which does not release its own
Not verified, since no real row was at hand: POVID's keys, and whether its image names begin with
COCO_train2014_; WildVision's file name; the keys inside RLAIF-V's origin_split; in R1-Reward-RL,
whether the text ends with the answer or with the output format (here: every other row) and whether
the hub's column `image`, a string of 165 kB, is base64; the type of id in ThinkLite-VL and of
question_id in V*.
"""

import hashlib
import json
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from core.files import InputError
from core.flags import command_line, run_stage
from toy import benchmark_sets, source_files, training_sets, world
from toy.source_files import PLANTED, Source

MARKER = "made_by_toy_sources.json"
# Rows at --scale 1, without the broken ones: 9,600 pairs in the shares of Table 2. A prompt of
# VLFeedback counts as one pair, its best answer against a worst one.
TRAIN = {
    "RLAIF-V": 1835,
    "VLFeedback": 1970,
    "POVID": 420,
    "WildVision-Battle": 254,
    "MM-RLHF": {"long": 1744, "short": 1962, "mcq": 352, "safety": 422},
    "R1-Reward-RL": 320,
    "pairs": 320,
}
TEST = {  # dev: half of it
    "VL-RewardBench": 600,
    "Multimodal-RewardBench": 600,
    "MM-RLHF-RewardBench": 170,
    "pairs": 1200,
}
TASKS = {"train": 600, "test": 200}
WRITERS = {
    "RLAIF-V": training_sets.rlaif_v,
    "VLFeedback": training_sets.vlfeedback,
    "POVID": training_sets.povid,
    "WildVision-Battle": training_sets.wildvision,
    "MM-RLHF": training_sets.mm_rlhf,
    "R1-Reward-RL": training_sets.r1_reward_rl,
    "pairs": training_sets.own_pairs,
    "VL-RewardBench": benchmark_sets.vl_reward_bench,
    "Multimodal-RewardBench": benchmark_sets.multimodal_reward_bench,
    "MM-RLHF-RewardBench": benchmark_sets.mm_rlhf_reward_bench,
}


def rows_at(scale, rows):
    """Rows, or rows of each part, at a scale: even numbers, so that sets of twins are whole."""
    if isinstance(rows, dict):
        return {part: rows_at(scale, count) for part, count in rows.items()}
    return max(8, 2 * round(rows * scale / 2))


def jobs(scale):
    """(split, source, what writes it, rows) of all that is built, in order."""
    for name, rows in TRAIN.items():
        yield "train", name, WRITERS[name], rows_at(scale, rows)
    for split, part in (("dev", 0.5), ("test", 1)):
        for name, rows in TEST.items():
            writer = benchmark_sets.held_out_pairs if name == "pairs" else WRITERS[name]
            yield split, name, writer, rows_at(scale, rows * part)
    yield "tasks", "tasks", benchmark_sets.tasks, rows_at(scale, TASKS)


def build(root, seed, scale):
    """Writes everything under root and prints a table of it."""
    print(f"{'file':62}{'rows':>7}{'planted':>9}{'seconds':>9}")
    with open(root / "key.jsonl", "w") as key:
        for split, name, writer, rows in jobs(scale):
            start = time.monotonic()
            source = Source(root, split, name, seed)
            writer(source, rows)
            key.writelines(json.dumps(line) + "\n" for line in source.key)
            print_files(source, root, time.monotonic() - start)
    (root / "train" / "planted.json").write_text(json.dumps(PLANTED, indent=2))


def print_files(source, root, seconds):
    """A line for each file; the first one has the broken rows and the seconds of all."""
    planted = sum(PLANTED[source.name].values()) if source.split == "train" else ""
    spent = f"{seconds:9.1f}"
    for path, rows in source.files:
        file = str((source.folder / path).relative_to(root))
        print(f"{file:62}{rows:7}{planted:>9}{spent}", flush=True)
        planted = spent = ""


def already_made(folder, marker):
    """Whether the folder holds what would be made. An error if it holds anything else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        made = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        raise InputError(
            f"--out {folder} was not made by toy/sources.py (it has no {MARKER}); "
            "choose a folder that is new or empty"
        ) from None
    differences = []
    for name, value in marker.items():
        if made.get(name) != value:
            differences.append(f"its {name} is {made.get(name)}, asked for is {value}")
    if differences:
        raise InputError(
            f"--out {folder} holds other data: {'; '.join(differences)}; choose another folder, "
            f"or remove this one: rm -r {folder}"
        )
    return True


def version():
    """Of the code that draws the data: data of an older one is not taken for the present one's."""
    digest = hashlib.sha256()
    for module in (world, source_files, training_sets, benchmark_sets):
        digest.update(Path(module.__file__).read_bytes())
    digest.update(Path(__file__).read_bytes())
    return digest.hexdigest()[:12]


def parser():
    p = command_line(__doc__)
    add = p.add_argument
    add("--out", default="out/toy/data", help="folder to make; one that exists is never changed")
    add("--seed", type=int, default=0, help="of every picture and word; the same seed, same bytes")
    scale_help = "1 = about 9,600 training pairs; no source falls below 8 rows"
    add("--scale", type=float, default=1.0, help=scale_help)
    return p


def main(words=None):
    args = parser().parse_args(words)
    if not 0 < args.scale < float("inf"):
        raise InputError(f"--scale: expected a number above 0, got {args.scale}")
    out, start = Path(args.out), time.monotonic()
    marker = {"seed": args.seed, "scale": args.scale, "version": version()}
    if already_made(out, marker):
        print(f"{out}: already there")
        return
    part = out.with_name(out.name + ".tmp")  # renamed when complete
    if part.exists() and not (part / MARKER).exists():
        raise InputError(f"--out {out}: {part} is in the way and not ours; move it away")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    (part / MARKER).write_text(json.dumps(marker))
    build(part, args.seed, args.scale)
    part.rename(out)
    print(f"{out}: made in {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    run_stage("toy/sources.py", main, if_stopped="the same command starts again")
