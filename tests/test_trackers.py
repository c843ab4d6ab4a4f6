"""
core/trackers.py with stand-ins for the three packages, which take what the real ones take and keep
what they are sent.
"""

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest

from core import trackers
from core.files import InputError
from core.trackers import start_tracker

SETTINGS = {"lr": 0.1}


@pytest.fixture
def calls(monkeypatch):
    """Every call of a stand-in: (its name, its arguments)."""
    calls = []

    def begin(of):
        def init(project, name, config, **options):
            calls.append((f"{of}.init", project, name, config, options))
            return SimpleNamespace(log=log, finish=finish)

        return init

    def log(metrics, step=None):
        calls.append(("log", metrics, step))

    def finish():
        calls.append(("finish",))

    class SummaryWriter:
        def __init__(self, log_dir, purge_step):
            calls.append(("SummaryWriter", str(log_dir), purge_step))

        def add_scalar(self, tag, value, step):
            log({tag: value}, step)

        def close(self):
            finish()

    stand_ins = {
        "wandb": {"init": begin("wandb")},
        "trackio": {"init": begin("trackio")},
        "torch.utils.tensorboard": {"SummaryWriter": SummaryWriter},
    }
    for name, content in stand_ins.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def send_a_step(name, step=0):
    tracker = start_tracker(name, "out/rl", step, SETTINGS)
    tracker.log({"reward": 1.5}, step=step + 1)
    tracker.finish()


@pytest.mark.parametrize("step, resume", [(0, "never"), (20, "allow")])
def test_trackio_continues_the_run_of_a_folder(calls, step, resume):
    send_a_step("trackio", step)
    begun = ("trackio.init", "r1-reward", "out/rl", SETTINGS, {"resume": resume})
    assert calls == [begun, ("log", {"reward": 1.5}, step + 1), ("finish",)]


def test_wandb(calls):
    send_a_step("wandb")
    begun = ("wandb.init", "r1-reward", "out/rl", SETTINGS, {"dir": "out/rl"})
    assert calls == [begun, ("log", {"reward": 1.5}, 1), ("finish",)]


def test_tensorboard_forgets_the_steps_after_the_checkpoint(calls):
    send_a_step("tensorboard", step=20)
    begun = ("SummaryWriter", "out/rl", 21)
    assert calls == [begun, ("log", {"reward": 1.5}, 21), ("finish",)]


def test_no_tracker():
    assert start_tracker("none", "out/rl", 0, SETTINGS) is None
    trackers.check_tracker("none")


@pytest.mark.parametrize("name", trackers.TRACKERS)
def test_a_tracker_that_is_not_installed_is_named(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", {name: None}.__getitem__)
    with pytest.raises(InputError, match=f"--tracker {name}: .*pip install {name}"):
        trackers.check_tracker(name)
    monkeypatch.setattr(importlib.util, "find_spec", {name: "found"}.__getitem__)
    trackers.check_tracker(name)
