"""Programs in which a run's numbers can be followed, beside its own log.jsonl and curves.png."""

import importlib.util

from core.files import InputError

TRACKERS = ("tensorboard", "wandb", "trackio")  # their packages have the same names
PROJECT = "r1-reward"


def check_tracker(name):
    """Stop before anything is loaded, on every rank: only the first one uses the package."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise InputError(
            f"--tracker {name}: its package is not installed; pip install {name}, or leave the "
            "flag out"
        )


def start_tracker(name, folder, step, settings):
    """
    An object with log(numbers, step) and finish(), or None.

    With `step` steps done, TensorBoard and trackio continue the run of this folder; wandb begins
    another one.
    """
    if name == "tensorboard":
        return TensorBoard(folder, step)
    if name == "wandb":
        import wandb

        return wandb.init(project=PROJECT, name=str(folder), dir=folder, config=settings)
    if name == "trackio":
        import trackio

        resume = "allow" if step else "never"
        return trackio.init(project=PROJECT, name=str(folder), config=settings, resume=resume)
    return None


class TensorBoard:
    def __init__(self, folder, step):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder, purge_step=step + 1)

    def log(self, numbers, step):
        for key, number in numbers.items():
            self.writer.add_scalar(key, number, step)

    def finish(self):
        self.writer.close()
