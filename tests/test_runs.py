"""core/runs.py with a trainer that trains nothing: checkpoints, resuming, the log."""

import argparse
import json
import random
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from core import runs
from core.files import InputError


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(dist, "barrier", lambda: None)


class IdleTrainer:
    def __init__(self, width=3):
        self.module = torch.nn.Linear(width, 1)
        self.module.model = SimpleNamespace(config=SimpleNamespace(model_type="qwen2_5_vl"))
        self.module.head_kind = None

    def zero_optimization_stage(self):
        return 0

    def save_checkpoint(self, folder, tag, save_latest):
        (folder / tag).mkdir()

    def load_checkpoint(self, folder, tag):
        assert (folder / tag).is_dir()


def flags(**changed):
    return argparse.Namespace(**({"lr": 0.1, "workers": 1, "out": "out"} | changed))


def resume(folder, trainer=None, **changed):
    return runs.resume(folder, trainer or IdleTrainer(), flags(**changed), {"workers", "out"}, n=0)


def write_rows(path, *rows, half=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + half)


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_new_run_begins_with_the_fresh_state(tmp_path):
    step, state = resume(tmp_path / "out")
    assert step == 0 and state["n"] == 0 and (tmp_path / "out").is_dir()


def test_a_run_continues_from_its_newest_complete_checkpoint(tmp_path):
    _, state = resume(tmp_path)
    for step in (2, 4):
        runs.save_checkpoint(tmp_path / "checkpoints", IdleTrainer(), step, state | {"n": step})
    drawn = random.random(), torch.rand(1)
    (tmp_path / "checkpoints" / "step-000006.part").mkdir()  # of a run killed while it saved
    assert list(runs.checkpoints(tmp_path / "checkpoints")) == [4]
    write_rows(tmp_path / "rollouts-0.jsonl", {"step": 4}, {"step": 5}, half='{"step"')
    step, state = resume(tmp_path, workers=7)
    assert step == state["n"] == 4
    assert (random.random(), torch.rand(1)) == drawn
    assert read_rows(tmp_path / "rollouts-0.jsonl") == [{"step": 4}]


def test_another_run_is_refused(tmp_path, monkeypatch):
    _, state = resume(tmp_path)
    runs.save_checkpoint(tmp_path / "checkpoints", IdleTrainer(), 1, state)
    with pytest.raises(InputError, match=r"lr was 0\.1, is now 0\.2.*choose another --out"):
        resume(tmp_path, lr=0.2)
    changed = r"--data: digest of its content was None, is now 'b'"
    with pytest.raises(InputError, match=changed):
        resume(tmp_path, data_digest="b")
    with pytest.raises(InputError, match=r"parameters was 4, is now 9.*--model"):
        resume(tmp_path, IdleTrainer(width=8))
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(InputError, match="number of ranks was 1, is now 2"):
        resume(tmp_path)


def test_the_log_continues_after_the_checkpoint(tmp_path):
    log, header = tmp_path / "log.jsonl", {"args": {}}
    write_rows(log, header, {"step": 1}, {"step": 2}, {"step": 3}, half='{"step": 4')
    continued = runs.Log(tmp_path, header, step=2, steps=9)
    continued.row(3, loss=0.25)
    continued.close()
    resumed = {"resumed": 2, "args": {}}
    assert read_rows(log) == [header, {"step": 1}, {"step": 2}, resumed, {"step": 3, "loss": 0.25}]
    runs.Log(tmp_path, header, step=0, steps=9).close()
    assert read_rows(log) == [header]  # a run without a checkpoint begins again
