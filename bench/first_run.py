r"""
The first run on a machine with 1 to 8 NVIDIA GPUs, which `make gpu` starts: is all of the project's
GPU side right, and how fast is it? Nothing is downloaded, the weights are random. 15 to 25 minutes,
by estimate: it has not run on a GPU yet.

Each part is processes of its own with a limit of time, so that one that fails or hangs leaves the
others; its log is OUT/NAME.log. OUT/report.md has a verdict for each thing that was tried and, for
each that failed, the likely cause. The models, in OUT/models, stay for the next time.

The model is the largest that fits: a whole 7B on four GPUs of 80 GB, a 7B with fewer layers on one.
What needs one process runs a model that fits one GPU, what needs several one that fits all.

A machine with GPUs, and a CPU, where the sizes are tiny and some parts say that they need a GPU:
$ python bench/first_run.py
$ python bench/first_run.py --shape tiny --ranks 2 --patience 6 --out out/gpu-tiny
Some parts alone:
$ python bench/first_run.py --only machine kernels
"""

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from bench import scale, verdicts
from bench.findings import FAILED, NO_GPU, OK, SLOW, Finding
from bench.output import made_by
from bench.scale import Scale
from bench.shapes import QWENS, TOYS, model_folder
from core import agreement
from core.files import InputError
from core.flags import above_zero, command_line, run_stage, whole
from core.memory_plan import free_host_memory
from core.runs import git
from core.tables import markdown_table

ROOT = Path(__file__).resolve().parent.parent
WORST_FIRST = (FAILED, SLOW, NO_GPU, OK)
ROWS, SAMPLES = 8, 2  # of evaluate.py
CHECKPOINT_SHAPE = {True: "small", False: "tiny"}  # on GPUs or not: a 7B's checkpoint is 116 GB


@dataclass
class Command:
    """A script of the project, its flags, on how many ranks."""

    script: str
    words: list
    ranks: int = 1

    def line(self):
        python = [sys.executable]
        if self.ranks > 1:
            python += ["-m", "torch.distributed.run", "--standalone"]
            python += [f"--nproc_per_node={self.ranks}"]
        return [*python, self.script, *map(str, self.words)]


@dataclass
class Part:
    name: str
    what: str  # it tries
    minutes: float  # that it may take on GPUs, times --patience
    commands: list[Command]
    judge: Callable  # its log -> findings


@dataclass
class Result:
    part: Part
    findings: list[Finding]
    seconds: float
    log: Path
    cause: str  # likely, of what failed

    @property
    def failed(self):
        return any(finding.verdict == FAILED for finding in self.findings)


# --------------------------------------------------------------------------------------------------
# The parts


@dataclass
class Setting:
    """What the parts are made for."""

    one: Scale  # the model that one GPU holds
    together: Scale  # the model that all hold together
    budgets: list[int]
    out: Path
    on_gpus: bool

    @property
    def pairs(self):
        return self.out / "models" / "pairs.jsonl"

    @property
    def bound(self):
        return agreement.bound_of(torch.device("cuda" if self.on_gpus else "cpu"))

    def model(self, run):
        return model_folder(self.out / "models", run.shape, run.layers)

    def fresh(self, name):
        """A folder for what a part of this name writes. It is removed before the part begins."""
        return self.out / "runs" / name


def make_parts(setting):
    parts = [machine(setting), models(setting), kernels(setting), check(setting, setting.one)]
    if setting.together.ranks > 1:
        parts.append(check(setting, setting.together))
    parts += [steps(setting), evaluation(setting, setting.one)]
    if setting.together.ranks > 1:
        parts.append(evaluation(setting, setting.together))
    return [*parts, speed(setting), sleep(setting), checkpoint(setting)]


def machine(setting):
    words = ["--disk", setting.out, "--runs", setting.one, setting.together]
    what = "GPUs, versions, compiler, disk, planned memory"
    commands = [Command("bench/check_machine.py", words)]
    return Part("machine", what, 2, commands, verdicts.of_findings)


def models(setting):
    run = setting.together
    shapes = {f"{each.shape}:{each.layers}" for each in (setting.one, run)}
    shapes.add(f"{CHECKPOINT_SHAPE[setting.on_gpus]}:0")
    words = [
        *("--out", setting.out / "models", "--pairs", run.rollout_batch),
        *("--image_tokens", run.sizes.image_tokens, "--words", run.sizes.words),
        *("--models", *sorted(shapes)),
    ]
    commands = [Command("bench/make_models.py", words)]
    return Part("models", "folders with random weights", 4, commands, verdicts.of_findings)


def kernels(setting):
    words = []
    if not setting.on_gpus:
        words = ["--width", 80, "--patches", 256, "--pictures", 1]
        words += ["--tokens", 64, "--hidden", 128, "--vocabulary", 704]
    what = "kernels of the trainer against float32"
    commands = [Command("bench/check_kernels.py", words)]
    return Part("kernels", what, 2, commands, verdicts.of_findings)


def rl_words(setting, run, name):
    return [
        *("--model", setting.model(run), "--data", setting.pairs, "--out", setting.fresh(name)),
        *("--judge", "rule", *run.trainer_words()),
    ]


def check(setting, run):
    name = f"check-{run.ranks}"
    commands = [Command("rl.py", [*rl_words(setting, run, name), "--check"], run.ranks)]
    what = f"rl.py --check, {run.named()}"
    return Part(name, what, 4, commands, verdicts.of_same_policy)


def steps(setting):
    """Random weights earn no reward: all of a step runs, and its gradient is zero."""
    words = [*rl_words(setting, setting.together, "steps"), "--steps", 2]
    commands = [Command("rl.py", words, setting.together.ranks)]
    rows = setting.fresh("steps") / "log.jsonl"
    judge = functools.partial(verdicts.of_steps, path=rows, expected=2, bound=setting.bound)
    return Part(
        "steps", f"two whole steps of rl.py, {setting.together.named()}", 5, commands, judge
    )


def evaluation(setting, run):
    name = f"evaluate-{run.ranks}"
    words = [
        *("--model", setting.model(run), "--bench", f"pairs={setting.pairs}", "--limit", ROWS),
        *("--samples", SAMPLES, "--max_new_tokens", run.sizes.new_tokens),
        *("--context", run.sizes.context, "--out", setting.fresh(name), "--page", 0),
    ]
    commands = [Command("evaluate.py", words, run.ranks)]
    judge = functools.partial(verdicts.of_evaluation, expected=ROWS * SAMPLES)
    return Part(name, f"evaluate.py, {run.named()}", 4, commands, judge)


def speed(setting):
    run, sizes = setting.together, setting.together.sizes
    words = [
        *("--shape", run.shape, "--layers", run.layers, "--work", setting.out / "models"),
        *("--samples", sizes.samples, "--new_tokens", sizes.new_tokens),
        *("--image_tokens", sizes.image_tokens, "--words", sizes.words),
        *("--context", sizes.context, "--memory", run.memory, "--zero", 3 if run.ranks > 1 else 2),
        *("--repeats", sizes.repeats, "--recompute", "--budgets", *setting.budgets),
        *("--out", setting.out / "speed.md"),
    ]
    commands = [Command("bench/gpu.py", words, run.ranks)]
    judge = functools.partial(verdicts.of_speed, whole_7b=run.is_whole_7b)
    return Part("speed", f"bench/gpu.py, {run.named()}", 8, commands, judge)


def sleep(setting):
    run = setting.one
    words = ["--model", setting.model(run), "--data", setting.pairs, "--memory", run.memory]
    words += ["--context", run.sizes.context, "--tokens", min(64, run.sizes.new_tokens)]
    commands = [Command("bench/check_sleep.py", words)]
    return Part("sleep", f"vLLM's sleep and wake, {run.named()}", 3, commands, verdicts.of_findings)


def checkpoint(setting):
    run = Scale(
        CHECKPOINT_SHAPE[setting.on_gpus], 0, setting.together.ranks, setting.together.memory
    )
    words = ["--model", setting.model(run), "--data", setting.pairs]
    words += ["--out", setting.fresh("checkpoint")]
    commands = [Command("bench/check_checkpoint.py", words, run.ranks) for _ in range(2)]
    what = f"a checkpoint written and resumed, {run.named()}"
    return Part("checkpoint", what, 2, commands, verdicts.of_checkpoint)


# --------------------------------------------------------------------------------------------------
# One part


def run_part(part, out, patience, run_command):
    """Its commands one after another, until one fails, and what its log says."""
    shutil.rmtree(out / "runs" / part.name, ignore_errors=True)
    log = out / f"{part.name}.log"
    log.write_text("")
    start = time.monotonic()
    problem = None
    for command in part.commands:
        left = start + 60 * patience * part.minutes - time.monotonic()
        problem = run_command(command, log, left)
        if problem:
            break
    return conclude(part, log, problem, time.monotonic() - start)


def conclude(part, log, problem, seconds):
    """The Result of a part. problem: how a command ended, if not well."""
    text = log.read_text(errors="replace")
    findings, missing = [], None
    try:
        findings = part.judge(text)
    except (ValueError, KeyError, TypeError) as error:  # a log that nobody has seen yet
        missing = f"{type(error).__name__}: {error}"
    if problem and not any(finding.verdict == FAILED for finding in findings):
        missing = f"{problem}: {verdicts.last_error(text)}"
    if missing:
        findings = [*findings, Finding(FAILED, missing)]
    return Result(part, findings, seconds, log, verdicts.likely_cause(text))


def run_in_processes(command, log, seconds):
    """Run a command into a log. How it ended, None if well."""
    line = command.line()
    with log.open("a") as file:
        file.write(f"$ {' '.join(line)}\n")
        file.flush()
        process = subprocess.Popen(
            line, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(max(1, seconds))
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s without an end"
        finally:
            end_group(process)
    return f"ended with code {code}" if code else None


def end_group(process):
    """A process and all that it has started: torchrun ends its ranks if it is asked to."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# --------------------------------------------------------------------------------------------------
# The report


def worst(results):
    found = {finding.verdict for result in results for finding in result.findings}
    return next(verdict for verdict in WORST_FIRST if verdict in found)


def report(results, setting):
    rows = []
    for result in results:
        name, seconds = result.part.name, f"{result.seconds:.0f}"
        for finding in result.findings:
            rows.append([name, finding.verdict, finding.text.replace("|", "/"), seconds])
            name = seconds = ""  # once a part
    counts = Counter(row[1] for row in rows)
    told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in WORST_FIRST)
    parts = [
        f"# First run: {worst(results)}",
        f"{told}. One GPU: {setting.one.named()}; all: {setting.together.named()}; "
        f"commit {git('rev-parse', '--short', 'HEAD')}; {made_by('first_run.py')}",
        markdown_table(["part", "verdict", "what was seen", "seconds"], rows).strip(),
    ]
    failures = [about_failure(result) for result in results if result.failed]
    if failures:
        parts += ["## What failed", *failures]
    return "\n\n".join(parts) + "\n"


def about_failure(result):
    """What to do about it, for somebody who does not know the project."""
    cause = result.cause or "not known; the end of the log is the first thing to read"
    commands = [" ".join(command.line()) for command in result.part.commands]
    return (
        f"**{result.part.name}** ({result.part.what}). Likely cause: {cause}. Please send "
        f"`{result.log}`. Alone: `{commands[-1]}`"
    )


# --------------------------------------------------------------------------------------------------
# All of it


def make_setting(args):
    """What fits this machine, where the flags leave it open."""
    cards = scale.visible_cards()
    ranks = args.ranks or len(cards)
    if ranks == 0:
        raise InputError("torch sees no GPU; expected one, or --shape tiny --ranks 2")
    if cards and ranks > len(cards):
        raise InputError(f"--ranks {ranks}: there are {len(cards)} GPUs; expected at most as many")
    out = Path(args.out)
    (out / "models").mkdir(parents=True, exist_ok=True)
    if args.shape:
        one, together = (Scale(args.shape, args.layers, n, args.memory) for n in (1, ranks))
    elif cards:
        room = (scale.machine_of(cards), free_host_memory(), shutil.disk_usage(out).free)
        one, together = (scale.largest_that_fits(n, *room) for n in (1, ranks))
    else:
        raise InputError("without a GPU name a size: --shape tiny")
    budgets = [512, 1024]
    if cards:
        budgets = scale.budgets_that_fit(together, scale.machine_of(cards))
    return Setting(one, together, budgets, out, on_gpus=bool(cards))


def run_all(parts, setting, patience, run_command=run_in_processes):
    """The results of the parts; the report is written after each of them."""
    results = []
    for number, part in enumerate(parts, 1):
        print(f"{number} of {len(parts)}: {part.name}, {part.what}", flush=True)
        results.append(run_part(part, setting.out, patience, run_command))
        for finding in results[-1].findings:
            print(f"    {finding}", flush=True)
        (setting.out / "report.md").write_text(report(results, setting))
    return results


def parser():
    p = command_line(__doc__)
    add = p.add_argument
    add("--out", default="out/gpu", help="folder for the report, logs and models")
    add(
        "--ranks", type=whole(1, 8), help="GPUs to use, or processes on a CPU; without it: all GPUs"
    )
    add("--shape", choices=[*QWENS, *TOYS], help="without it: the largest model that fits")
    add("--layers", type=whole(), default=0, help="with --shape: of the language model; 0 = all")
    memory_help = "with --shape: share of a GPU for vLLM while it samples"
    add("--memory", type=above_zero(1), default=0.3, help=memory_help)
    add("--patience", type=above_zero(), default=2.0, help="times the minutes that a part may take")
    add(
        "--only",
        nargs="+",
        metavar="PART",
        help="names of parts; models are made by the part models",
    )
    return p


def main():
    args = parser().parse_args()
    setting = make_setting(args)
    parts = chosen(make_parts(setting), args.only)
    results = run_all(parts, setting, args.patience)
    print("\n" + report(results, setting))
    print(f"{setting.out}/report.md: the page above")
    sys.exit(int(any(result.failed for result in results)))


def chosen(parts, names):
    if not names:
        return parts
    known = [part.name for part in parts]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(f"--only {unknown[0]}: expected some of {', '.join(known)}")
    return [part for part in parts if part.name in names]


if __name__ == "__main__":
    run_stage("first_run.py", main, if_stopped="the report has the parts that were done")
