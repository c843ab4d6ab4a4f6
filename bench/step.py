"""
One RL step: rl.py against TRL's GRPOTrainer and against a floor. The same prompts with pictures,
the same number of tokens, one update.

  rl.py   its own main(). Two hooks: the end token is forbidden, so that all samples have the same
          length, and a step waits for its turn
  TRL     the latest release of PyPI in an environment of its own (--setup_trl), pictures included,
          transformers' generate, rl.py's rules as the reward; no logging, saving, evaluation,
          recomputation. Of 1.16 no other engine works on a CPU with pictures: vLLM inside the
          process does not start, a vLLM server takes new weights by NCCL only, and continuous
          batching refuses multimodal models
  floor   what no loop can do without: bare vLLM for as many tokens, then a bare forward and
          backward pass by transformers over them in rl.py's micro-batches, with rl.py's matrix
          products. No prompts are built, nothing is seeded, scored, optimized or synced

All compute their matrix products with the same library, one of --products after the other: oneDNN,
as a stage on a CPU does (toy/cpu.py), and what torch calls by itself.

Each contender lives in a process of its own, on one rank and --threads threads, in float32 on a
CPU. They take turns round by round while the others sleep, so that whatever else the machine does
slows them alike; a cell's first round is not counted. TRL needs 2 samples a prompt or more: where
the others have 1, it has 2, and as many samples. Its micro-batch of --trl_rows sequences is about
rl.py's --micro_tokens.

$ python bench/step.py --setup_trl out/trl/.venv
$ python bench/step.py --data out/toy/data/test/pairs.jsonl --out out/bench/step.md
Random weights and noise pictures, at a size that computes:
$ python bench/step.py --shape small --samples 16 --tokens 64 --groups 8 1 --scale --threads 2 \
    --micro_tokens 4096 --trl_rows 8 --rounds 3 --out out/bench/step_small.md
"""

import argparse
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from bench import shapes
from bench.contenders import CONTENDERS, PRODUCTS, Cell, run_contender
from bench.output import made_by, print_and_save, spread
from core.flags import command_line
from core.pairs import read_pairs, write_pairs
from core.tables import markdown_table

ROOT = Path(__file__).resolve().parent.parent


# --------------------------------------------------------------------------------------------------
# Turns


class Contender:
    def __init__(self, name, args, python=sys.executable):
        self.name = name
        self.log = Path(args.work, f"{name}.log")
        command = [str(python), __file__, "--contender", name]
        handed_on = ("data", "model", "work", "micro_tokens", "context", "trl_rows", "threads")
        for flag in (*handed_on, "seed"):
            command += [f"--{flag}", str(getattr(args, flag))]
        environment = os.environ | {
            "OMP_NUM_THREADS": str(args.threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self.process = subprocess.Popen(
            command,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
        )

    def ask(self, line):
        """Send a line; return what it says of the round, a dict."""
        print(line, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            end = self.log.read_text()[-3000:]
            sys.exit(f"{self.name} stopped; the end of what it wrote:\n{end}")
        return json.loads(answer)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def setup_trl(folder):
    """
    Install the latest TRL, with the same torch and transformers as the project has, and with the
    client that recipes/trl_grpo.py asks its judge with.
    """
    uv, python = Path(sys.executable).with_name("uv"), Path(folder, "bin", "python")
    shared = ("torch==", "torchvision==", "transformers==", "openai==")
    pins = (ROOT / "requirements.txt").read_text().split()
    pins = [pin for pin in pins if pin.startswith(shared)]
    bundles = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt")
    certificates = []
    if any(Path(path).is_file() for path in bundles):
        certificates = ["--system-certs"]
    if not python.exists():
        subprocess.run([uv, "venv", "--python", sys.executable, folder], check=True)
    install = [uv, "pip", "install", *certificates, "--upgrade-package", "trl"]
    packages = ["trl", "pillow", *pins]
    subprocess.run([*install, "--python", python, *packages], check=True)


def take_turns(rivals, cell, rounds):
    """{name: its rounds}, without the first one, which loads and warms up."""
    found = {rival.name: [] for rival in rivals}
    for number in range(rounds + 1):
        first = number % len(rivals)  # nobody is always the first
        for rival in rivals[first:] + rivals[:first]:
            answer = rival.ask("go" if number else json.dumps(cell))
            made = round(answer["samples"]), round(answer["tokens"])
            if made != (cell.samples, cell.samples * cell.tokens):
                sys.exit(
                    f"{rival.name}: expected {cell}, got {made[1]} tokens in {made[0]} samples"
                )
            if number:
                found[rival.name].append(answer)
            took = f"{answer['seconds']:.2f} s"
            print(f"{cell}, round {number}, {rival.name}: {took}", file=sys.stderr)
    return found


# --------------------------------------------------------------------------------------------------
# Tables. Rounds are what Contender.ask() returned.


def seconds_of(rounds):
    return [one["seconds"] for one in rounds]


def ratio(rounds, others):
    """Taken round by round. Undecided: some rounds are above 1 and some below."""
    ratios = [a / b for a, b in zip(seconds_of(rounds), seconds_of(others))]
    undecided = min(ratios) <= 1 <= max(ratios)
    return spread(ratios) + (", undecided" if undecided else "")


def phases_of(rounds):
    """Median seconds of each phase that takes any."""
    cells = []
    for phase in rounds[0]["phases"]:
        median = statistics.median(one["phases"][phase] for one in rounds)
        if median >= 0.005:
            cells.append(f"{phase} {median:.2f}")
    return ", ".join(cells)


def speed_table(found):
    rows = []
    for cell, rounds in found.items():
        if "floor" in rounds:
            ours, lowest = rounds["rl.py"], rounds["floor"]
            speed = cell.samples / statistics.median(seconds_of(ours))
            row = [str(cell), spread(seconds_of(ours)), f"{speed:.1f}"]
            row += [spread(seconds_of(lowest)), ratio(ours, lowest)]
            if "TRL" in rounds:
                row += [spread(seconds_of(rounds["TRL"])), ratio(rounds["TRL"], ours)]
            else:
                row += ["not measured", "-"]
            rows.append(row)
    head = ["samples x tokens", "rl.py", "samples a second", "floor", "rl.py / floor"]
    return markdown_table([*head, "TRL", "TRL / rl.py"], rows).strip()


def product_table(found):
    """What the mathematics of an update needs, against one large matrix product of this machine."""
    rows = []
    for cell, rounds in found.items():
        speeds = [one["operations"] / one["phases"]["update"] / 1e9 for one in rounds["rl.py"]]
        products = [one["product"] / 1e9 for one in rounds["rl.py"]]
        shares = [100 * speed / product for speed, product in zip(speeds, products)]
        rows.append([str(cell), spread(speeds), spread(products), spread(shares)])
    head = ["samples x tokens", "update, GFLOP/s", "product, GFLOP/s", "percent"]
    return markdown_table(head, rows).strip()


def phase_table(found):
    rows = []
    for cell, rounds in found.items():
        if "floor" in rounds:
            rows.append([str(cell), phases_of(rounds["rl.py"]), phases_of(rounds["floor"])])
    return markdown_table(["samples x tokens", "rl.py", "floor"], rows).strip()


def scale_table(found, tokens, products):
    rows = []
    for cell in sorted(found):
        if cell.tokens == tokens and cell.products == products:
            seconds = seconds_of(found[cell]["rl.py"])
            milliseconds = [1000 * value / cell.samples for value in seconds]
            rows.append([str(cell.samples), spread(milliseconds)])
    return markdown_table(["samples", "milliseconds a sample"], rows).strip()


def sync_table(found):
    syncs, copies = [], []
    for rounds in found.values():
        for one in rounds["rl.py"]:
            size = one["bytes"]
            syncs.append(1000 * one["phases"]["sync"])
            copies.append(1000 * one["copy"])
    ratios = [sync / copy for sync, copy in zip(syncs, copies)]
    row = [f"{size:,}", spread(syncs), spread(copies), spread(ratios)]
    return markdown_table(["bytes", "sync, ms", "copy, ms", "ratio"], [row]).strip()


def describe(args, found):
    from core.runs import run_header

    header = run_header(args, 1, torch.device("cpu"))
    parts = [f"{name} {version}" for name, version in header["versions"].items()]
    for rounds in found.values():
        if "TRL" in rounds:
            parts.append(f"TRL {rounds['TRL'][0]['version']}")
            break
    changed = " changed" if header["changed"] else ""
    machine = re.search("model name.*: (.*)", Path("/proc/cpuinfo").read_text())
    parts.append(f"commit {header['commit'][:7]}{changed}")
    parts.append(f"{os.cpu_count()} cores")
    parts.append(machine[1] if machine else platform.machine())
    parts.append(f"seed {args.seed}")
    return ", ".join(parts)


def report(args, found):
    """found: {cell: {contender: [round, ...]}}"""
    tokens = args.tokens[0]
    goals = "rl.py at most 1.15 floors, TRL at least 1.5 times as long as rl.py"
    title = "## One RL step"
    if args.shape:
        goals = "rl.py at most 1.10 floors, TRL at least 1.5 times as long, with 8 a prompt 3 times"
        title += f" at the shape {args.shape}"
    about = (
        f"Seconds a step: median (least-most) of {args.rounds} rounds or more taken in turns, "
        f"{args.threads} thread(s) each. A ratio with rounds on both sides of 1 is undecided. "
        f"Goals: {goals}.\n{describe(args, found)}; {made_by('step.py')}"
    )
    parts = [
        title,
        about,
        speed_table(found),
        "Phases, median seconds:",
        phase_table(found),
        "rl.py's update against a product of two matrices of 2,048 x 2,048 by the same library:",
        product_table(found),
    ]
    if args.scale:
        parts += [
            f"rl.py's time a sample of {tokens} tokens; it must not grow with their number:",
            scale_table(found, tokens, args.products[0]),
        ]
    parts += [
        "A weight sync against a copy of the same bytes (goal: at most 3 times as long):",
        sync_table(found),
    ]
    return "\n\n".join(parts) + "\n"


def parser():
    p = command_line(__doc__)
    add = p.add_argument
    add("--model", default=str(ROOT / "toy" / "base"), help="folder of the policy")
    data_help = "JSONL of pairs; those with one picture are shown"
    add("--data", default="out/toy/data/test/pairs.jsonl", help=data_help)
    add("--samples", type=int, nargs="+", default=[32, 256], help="a rollout")
    add("--tokens", type=int, nargs="+", default=[32, 128], help="a sample, exactly")
    add("--groups", type=int, nargs="+", default=[2], help="samples of a prompt")
    products_help = "library of matrix products, of all contenders; torch: MKL on x86"
    add("--products", choices=PRODUCTS, nargs="+", default=list(PRODUCTS), help=products_help)
    shape_help = "random weights of this shape and noise pictures, in place of --model and --data"
    add("--shape", choices=list(shapes.TOYS), help=shape_help)
    add("--image_tokens", type=int, default=256, help="of a noise picture; a square number")
    scale_help = "more rollouts, for rl.py alone, at the first of --tokens"
    add("--scale", type=int, nargs="*", default=[1024], help=scale_help)
    rounds_help = "of each contender in a cell; up to 64 samples of the toy's four times as many"
    add("--rounds", type=int, default=3, help=rounds_help)
    micro_help = "rl.py's and the floor's micro-batch, padded tokens"
    add("--micro_tokens", type=int, default=12288, help=micro_help)
    rows_help = "TRL's micro-batch, sequences; a divisor of --samples"
    add("--trl_rows", type=int, default=32, help=rows_help)
    add("--context", type=int, default=1024, help="longest prompt and sample together, tokens")
    add("--threads", type=int, default=1, help="of each contender")
    trl_help = "TRL's environment; without one, TRL is left out"
    add("--trl", default="out/trl/.venv", help=trl_help)
    add("--setup_trl", metavar="DIR", help="make that environment, or update it, and stop")
    add("--seed", type=int, default=0, help="of the order of the pairs and of rl.py's samples")
    add("--out", help="file for the tables, in markdown")
    add("--contender", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    add("--work", help=argparse.SUPPRESS)
    return p


def compete(args):
    """Every cell; return {cell: {contender: [round, ...]}}."""
    ours = Contender("rl.py", args)
    rivals = [ours, Contender("floor", args)]
    trl_python = Path(args.trl, "bin", "python")
    if trl_python.exists():
        rivals.append(Contender("TRL", args, trl_python))
    else:
        print(
            f"TRL is left out: there is no environment in {args.trl}; --setup_trl {args.trl} "
            "makes it",
            file=sys.stderr,
        )
    found = {}
    for values in itertools.product(args.samples, args.tokens, args.groups, args.products):
        cell = Cell(*values)
        found[cell] = take_turns(rivals, cell, rounds_of(cell, args))
    for samples in args.scale:
        cell = Cell(samples, args.tokens[0], args.groups[0], args.products[0])
        found[cell] = take_turns([ours], cell, rounds_of(cell, args))
    for rival in rivals:
        rival.close()
    return found


def make_shape(args):
    """A model with random weights takes the place of --model; return pairs with noise pictures."""
    args.model = f"{args.work}/model"
    device = torch.device("cpu")
    shapes.make_model(args.model, args.shape, 0, args.image_tokens, device)
    number = 4 * max(args.samples)
    return shapes.make_pairs(args.work, number, args.image_tokens, 20, args.seed)


def rounds_of(cell, args):
    short = cell.samples <= 64 and not args.shape
    return 4 * args.rounds if short else args.rounds  # short rounds are noisier


def main():
    args = parser().parse_args()
    if args.contender:
        run_contender(args)
    if args.setup_trl:
        setup_trl(args.setup_trl)
        return
    with tempfile.TemporaryDirectory() as args.work:
        if args.shape:
            pairs = make_shape(args)
        else:
            pairs = [p for p in read_pairs(args.data) if len(p.images) == 1 and not p.video]
        args.data = f"{args.work}/pairs.jsonl"
        write_pairs(args.data, pairs)
        found = compete(args)
    print_and_save(report(args, found), args.out)


if __name__ == "__main__":
    main()
