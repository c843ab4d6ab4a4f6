"""core/runs.py with a trainer that trains nothing: checkpoints, resuming, the log."""

import argparse
import errno
import itertools
import json
import os
import random
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import killed_at, read_rows

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
        (folder / tag / "weights").write_text("weights")

    def load_checkpoint(self, folder, tag):
        found = (folder / tag / "weights").exists()
        return (str(folder), {}) if found else (None, None)


def flags(**changed):
    return argparse.Namespace(**({"lr": 0.1, "workers": 1, "out": "out"} | changed))


def resume(folder, trainer=None, **changed):
    return runs.resume(folder, trainer or IdleTrainer(), flags(**changed), {"workers", "out"}, n=0)


def save(folder, step, **state):
    runs.save_checkpoint(
        folder / "checkpoints", IdleTrainer(), step, {"recipe": {"lr": 0.1}} | state
    )


VIEW = runs.View(step=["loss"], held_out=["val_loss"], curves={"loss": ["loss", "val_loss"]})


def write_rows(path, *rows, half=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + half)


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
    continued = runs.Log(tmp_path, header, step=2, steps=9, view=VIEW)
    row = {"step": 3, "loss": 0.25, "seconds": 1.5}
    continued.row(**row)
    continued.close()
    resumed = {"resumed": 2, "args": {}}
    assert read_rows(log) == [header, {"step": 1}, {"step": 2}, resumed, row]
    runs.Log(tmp_path, header, step=0, steps=9, view=VIEW).close()
    assert read_rows(log) == [header]  # a run without a checkpoint begins again


def test_an_alarm_is_said_once_until_it_is_over(tmp_path, capsys):
    log = runs.Log(tmp_path, {"args": {}}, step=0, steps=9, view=VIEW)
    row = {"reward": 1.0, "grad_norm": 0.5, "judge_calls": 0, "judge_failed": 0, "seconds": 1.0}
    for step, skipped in enumerate((0, 1, 1, 0, 1), 1):
        log.row(step, **row, skipped=skipped)
    log.close()
    warnings = [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]
    assert len(warnings) == 2
    assert "because a gradient was not finite: 1." in warnings[0]


class Clock:
    """Stands in for the time module: a clock that the test sets."""

    def __init__(self):
        self.seconds = 1000.0

    def monotonic(self):
        return self.seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(runs, "time", clock)
    return clock


def test_a_step_and_its_held_out_figures_are_a_line_each(tmp_path, clock, capsys):
    log = runs.Log(tmp_path, {"args": {}}, step=10, steps=12, view=VIEW)
    clock.seconds += 100  # until the first step
    log.row(10, val_loss=0.75)
    clock.seconds += 8
    log.row(11, loss=0.51234, val_loss=0.5, seconds=3.21, norm=7.0)
    assert capsys.readouterr().out.splitlines() == [
        "step 10/12  held out  loss 0.750",
        "step 11/12  loss 0.512  3.21s  left 8s",
        "step 11/12  held out  loss 0.500",
    ]


def test_the_curves_are_drawn_once_a_minute_and_at_the_end(tmp_path, clock, monkeypatch):
    log = runs.Log(tmp_path, {"args": {}}, step=0, steps=9, view=VIEW)
    drawn = []
    monkeypatch.setattr(runs, "plot_curves", lambda folder, panels: drawn.append(clock.seconds))
    for step in range(1, 6):
        clock.seconds += 25
        log.row(step, loss=0.5, seconds=25.0)
    log.close()
    assert drawn == [1075.0, 1125.0]
    assert drawn[-1] == clock.seconds


# --------------------------------------------------------------------------------------------------
# Kills and faults


def test_a_kill_at_any_file_operation_of_a_save_leaves_a_checkpoint(tmp_path):
    save(tmp_path / "before", 2, n=2)
    for number in itertools.count(1):
        out = shutil.copytree(tmp_path / "before", tmp_path / str(number))
        killed = killed_at(number, out, partial(save, out, 4, n=4))
        step, state = resume(out)
        assert step == state["n"] and step in (2, 4)
        save(out, 4, n=4)  # the run goes on
        assert os.listdir(out / "checkpoints") == ["step-000004"]
        if not killed:
            break
    assert step == 4 and number > 10


def test_a_step_that_is_saved_is_not_saved_again(tmp_path):
    """A run that stops where it began keeps what it has, however the second save ends."""
    save(tmp_path, 2, n=2)
    for number in (1, 2, 3, 10**6):
        killed_at(number, tmp_path, partial(save, tmp_path, 2, n=99))
        step, state = resume(tmp_path)
        assert step == state["n"] == 2


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    save(tmp_path, 2, n=2)

    def fail(*words, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(IdleTrainer, "save_checkpoint", fail)
    with pytest.raises(InputError, match=r"No space left on device.*checkpoint before it is kept"):
        save(tmp_path, 4, n=4)
    assert os.listdir(tmp_path / "checkpoints") == ["step-000002"]


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_that_is_damaged_or_holds_code_is_refused(tmp_path):
    save(tmp_path, 2, n=2)
    path = tmp_path / "checkpoints" / "step-000002"
    whole = (path / "rank-0.pt").read_bytes()
    torch.save(RunsCode(str(tmp_path / "code ran")), path / "rank-0.pt")
    with pytest.raises(InputError, match="step-000002 is damaged"):
        resume(tmp_path)
    assert not (tmp_path / "code ran").exists()
    (path / "rank-0.pt").write_bytes(whole[:500])
    with pytest.raises(InputError, match=r"step-000002 is damaged.*Remove it"):
        resume(tmp_path)
    (path / "rank-0.pt").write_bytes(whole)
    shutil.rmtree(path / "engine")
    with pytest.raises(InputError, match="lacks files of the engine"):
        resume(tmp_path)


def test_a_strange_folder_among_the_checkpoints_is_named_and_left_alone(tmp_path, capsys):
    save(tmp_path, 2, n=2)
    strange = tmp_path / "checkpoints" / "step-000009 (copy)"
    strange.mkdir()
    assert resume(tmp_path)[0] == 2
    assert "step-000009 (copy) is no checkpoint" in capsys.readouterr().err
    save(tmp_path, 4, n=4)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-000004", strange.name]


def test_a_damaged_line_of_a_log_is_named(tmp_path):
    log = tmp_path / "log.jsonl"
    write_rows(log, {"args": {}}, half='{"step": 1\n{"step": 2}\n')
    with pytest.raises(InputError, match=r"log\.jsonl, line 2 is not JSON"):
        runs.Log(tmp_path, {"args": {}}, step=2, steps=9, view=VIEW)


# --------------------------------------------------------------------------------------------------
# --out


def open_out(out, model="no/such/model"):
    runs.open_out(argparse.Namespace(out=str(out), model=str(model)), rank=0)


def test_out_must_not_be_the_model_nor_lie_in_it_or_around_it(tmp_path):
    model = tmp_path / "models" / "base"
    model.mkdir(parents=True)
    with pytest.raises(InputError, match="would be written over"):
        open_out(tmp_path / "models" / "x" / ".." / "base", model)
    for out in (model / "out", tmp_path / "models"):
        with pytest.raises(InputError, match="lie one in the other"):
            open_out(out, model)
    open_out(tmp_path / "models" / "other", model)


def test_out_must_be_a_folder(tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(InputError, match=r"--out .*file.*expected a folder"):
            open_out(out)


def test_one_run_at_a_time_writes_to_a_folder(tmp_path):
    open_out(tmp_path)
    with pytest.raises(InputError, match=r"another run is writing to .*--out"):
        open_out(tmp_path)


def test_another_model_in_out_is_refused_and_a_finished_run_is_known(tmp_path):
    assert not runs.is_finished(flags(out=tmp_path), set())
    (tmp_path / "config.json").touch()
    with pytest.raises(InputError, match="already holds a model"):
        runs.refuse_other_model(tmp_path)
    with pytest.raises(InputError, match="already holds a model"):
        runs.is_finished(flags(out=str(tmp_path)), {"out"})
    write_rows(tmp_path / "log.jsonl", {"args": vars(flags(out="elsewhere"))})
    assert runs.is_finished(flags(out=str(tmp_path)), {"out"})
    with pytest.raises(InputError, match=r"--lr was 0\.1, is now 0\.2"):
        runs.is_finished(flags(out=str(tmp_path), lr=0.2), {"out"})
