"""
A step of stage 5 at a size that computes, with --samples samples of each prompt: in one row of a
batch, as rl.py and downstream_grpo.py have them, and in a row each.

Random weights and noise pictures, see bench/shapes.py; the reward model is left out. Each of the
two has processes of its own, for its memory, and they take turns.

$ python bench/shared_prompts.py --out out/bench/shared_prompts.md
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import rl
import toy.cpu
from bench import gpu, shapes
from bench.output import made_by, print_and_save, spread
from core import training
from core.encoding import collate, load_processor
from core.flags import command_line
from core.pairs import judging_turns
from core.prompts import encode_prompts
from core.seeds import seed_from
from core.tables import markdown_table

PHASES = ("rollout", "old log-probabilities", "updates", "sync")
ROWS = {"shared": "one row a prompt", "apart": "a row a sample"}


# --------------------------------------------------------------------------------------------------
# One process


def measure_steps(args):
    """--repeats steps: {"seconds": {phase: [...]}, "peak": bytes, "tokens": padded, of a step}."""
    _, world, device = training.start_ranks(args.seed)
    toy.cpu.speed_up_process()
    processor = load_processor(args.work)
    run = rl.start_run(gpu.flags_of_rl(args.work, args.budget, args), processor, 0, world, device)
    pairs = shapes.make_pairs(args.work, args.prompts, args.image_tokens, args.words, args.seed)
    prompts = encode_prompts(pairs, judging_turns, processor)
    measure = gpu.Measure(device)
    for step in range(args.repeats + 1):
        seeds = [seed_from(args.seed, step, number) for number in range(len(prompts))]
        samples = take_step(run, prompts, seeds, args, measure)
    tokens = 0
    for batch in training.row_batches(samples, args.budget):
        tokens += collate(batch, run.pad_id)["input_ids"].numel()
    return {
        "seconds": {phase: measure.seconds[phase][1:] for phase in PHASES},  # the first warms up
        "peak": max(measure.memory.values()),
        "tokens": tokens,
    }


def take_step(run, prompts, seeds, args, measure):
    """One rollout with two updates, as rl.py's."""
    with measure("rollout"):
        samples = rl.sample_responses(run, prompts, seeds, args.samples, 1.0)
    if args.rows == "apart":
        samples = [replace(sample, prompt_ids=list(sample.prompt_ids)) for sample in samples]
    gpu.measure_learning(run, samples, measure)
    return samples


# --------------------------------------------------------------------------------------------------
# Both, in turns


def take_turns(args):
    """{rows: what each of its processes measured}"""
    found = defaultdict(list)
    for turn in range(args.turns):
        for rows in ROWS if turn % 2 else reversed(ROWS):
            command = [sys.executable, __file__, *sys.argv[1:], "--work", args.work, "--rows", rows]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[rows].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"turn {turn + 1}, {ROWS[rows]}: {found[rows][-1]['seconds']}", file=sys.stderr)
    return found


def seconds_of(processes, phase):
    return [seconds for process in processes for seconds in process["seconds"][phase]]


def steps_of(processes):
    """Seconds of each whole step."""
    return [sum(phases) for phases in zip(*(seconds_of(processes, phase) for phase in PHASES))]


def row_of(label, shared, apart):
    ratio = statistics.median(apart) / statistics.median(shared)
    return [label, spread(shared), spread(apart), f"{ratio:.2f}"]


def report(args, found):
    shared, apart = found["shared"], found["apart"]
    rows = [row_of(name, seconds_of(shared, name), seconds_of(apart, name)) for name in PHASES]
    rows.append(row_of("whole step", steps_of(shared), steps_of(apart)))
    rows.append(row_of("memory, GB", *peaks_of(shared, apart)))
    tokens = [found[rows][0]["tokens"] for rows in ROWS]
    rows.append(["padded tokens", *(f"{n:,}" for n in tokens), f"{tokens[1] / tokens[0]:.2f}"])
    about = (
        f"{args.prompts} prompts with a picture of {args.image_tokens} tokens, {args.samples} "
        f"samples of {args.new_tokens} tokens each, at the shape {args.shape}, "
        f"{torch.get_num_threads()} thread(s); seconds: median (least-most) of "
        f"{args.turns} x {args.repeats} steps; {made_by('shared_prompts.py')}"
    )
    head = ["", *ROWS.values(), "ratio"]
    table = markdown_table(head, rows).strip()
    return f"## One copy of a prompt for all its samples\n\n{about}\n\n{table}\n"


def peaks_of(*ways):
    return [[process["peak"] / 1e9 for process in processes] for processes in ways]


def parser():
    p = command_line(__doc__)
    add = p.add_argument
    add("--shape", choices=list(shapes.TOYS), default="small", help="of the model")
    add("--layers", type=int, default=0, help="of the language model; 0 = as the shape has")
    add("--prompts", type=int, default=4, help="of a step")
    add("--samples", type=int, default=8, help="of each prompt")
    add("--new_tokens", type=int, default=64, help="of each sample")
    add("--image_tokens", type=int, default=256, help="of a prompt's picture; a square number")
    add("--words", type=int, default=20, help="of each of the two answers")
    add("--budget", type=int, default=4096, help="rl.py's --micro_tokens")
    add("--repeats", type=int, default=2, help="steps of a process, after one that does not count")
    add("--turns", type=int, default=2, help="processes for each of the two")
    add("--context", type=int, default=2048, help="longest prompt and sample, tokens")
    add("--seed", type=int, default=0, help="of weights, prompts and samples")
    add("--out", help="file for the table, in markdown")
    add("--work", help=argparse.SUPPRESS)
    add("--rows", choices=list(ROWS), help=argparse.SUPPRESS)
    p.set_defaults(zero=2, recompute=False, memory=0.5, attn="sdpa", lr=1e-6)
    return p


def main():
    args = parser().parse_args()
    if args.rows:
        print(json.dumps(measure_steps(args)))
        return
    with tempfile.TemporaryDirectory() as args.work:
        device = torch.device("cpu")
        shapes.make_model(args.work, args.shape, args.layers, args.image_tokens, device)
        print_and_save(report(args, take_turns(args)), args.out)


if __name__ == "__main__":
    main()
