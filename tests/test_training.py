"""core/training.py: micro-batches, the learning rate, and the optimizer step on two real ranks."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, wait_until_gone
from programs.train_two_ranks import CASES, LR, STEPS, load_samples

from core.encoding import collate, load_processor
from core.files import InputError
from core.policy import load_policy, token_logps
from core.training import (
    learning_rate,
    micro_batches,
    read_ahead,
    stop_if_diverged,
    wait_or_stop,
)
from toy import cpu


def group(**lengths):
    return [
        SimpleNamespace(name=name, prompt_ids=[0] * length, response_ids=[], length=length)
        for name, length in lengths.items()
    ]


def names(samples):
    return "".join(sample.name for sample in samples)


def test_micro_batches_fill_the_budget_and_keep_groups_together():
    singles = [group(a=5), group(b=9), group(c=4), group(d=30), group(e=5), group(f=3)]
    # budget 20: 30 is alone, two padded to 9 fit, three padded to 5 fit
    assert [names(batch) for batch in micro_batches(singles, 20)] == ["d", "ba", "ecf"]
    pairs = [group(a=5, b=4), group(c=6, d=1), group(e=2, f=3)]
    assert [names(batch) for batch in micro_batches(pairs, 18)] == ["cd", "ab", "ef"]
    assert [names(batch) for batch in micro_batches(pairs, 24)] == ["cdab", "ef"]


def test_the_learning_rate_warms_up_to_its_peak_and_falls_to_a_tenth():
    linear = [learning_rate(step, 10, 3.0, 2, "linear") for step in range(10)]
    assert linear[:4] == pytest.approx([1.0, 2.0, 3.0, 3 - 2.7 / 8])
    cosine = [learning_rate(step, 10, 1.0, 0, "cosine") for step in range(11)]
    assert [cosine[0], cosine[5], cosine[10]] == pytest.approx([1.0, 0.55, 0.1])
    assert learning_rate(7, 10, 1.0, 2, "constant") == 1.0


class Squares:
    """A dataset whose item 3 is damaged."""

    def __getitem__(self, number):
        if number == 3:
            raise InputError("pairs.jsonl, line 4: an image cannot be read")
        return number**2


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_data_worker_keeps_its_one_line(workers):
    items = read_ahead(Squares(), [1, 2, 3, 4], workers, ahead=2)
    assert [next(items), next(items)] == [1, 4]
    with pytest.raises(InputError) as error:
        next(items)
    assert str(error.value) == "pairs.jsonl, line 4: an image cannot be read"


def test_what_fails_while_a_step_waits_saves_a_checkpoint_and_stops():
    saved = []

    def fail():
        raise RuntimeError("no reply")

    with pytest.raises(InputError, match="stopped, with a checkpoint: no reply"):
        wait_or_stop(fail, lambda: saved.append(1))
    assert saved == [1]
    assert wait_or_stop(lambda: [1, 0], fail) == [1, 0]


def test_a_run_that_diverges_stops_and_writes_down_its_samples(tmp_path, one_rank):
    args = SimpleNamespace(out=tmp_path, lr=9.0)
    sample = SimpleNamespace(
        pair=SimpleNamespace(id="7"), text="x", finish="stop", advantages=torch.ones(2)
    )
    state = {"skipped": 0}
    for grad_norm in (math.inf, 1.0, math.inf, math.inf):
        stop_if_diverged(grad_norm, [sample], 5, state, args)
    with pytest.raises(InputError, match=r"step 6: three gradients.*--lr 9\.0 is too high"):
        stop_if_diverged(math.inf, [sample], 5, state, args)
    row = json.loads((tmp_path / "not-finite-0.jsonl").read_text())
    assert row == {"id": "7", "text": "x", "finish": "stop", "advantages": [1.0, 1.0]}


LAUNCHER = """
import subprocess, sys, time
rank = "from core.training import die_with_torchrun; import time; die_with_torchrun(); print(1)"
child = subprocess.Popen([sys.executable, "-c", rank + "; time.sleep(60)"], stdout=subprocess.PIPE)
child.stdout.read(1)
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_a_rank_dies_with_torchrun_even_if_that_is_killed():
    launcher = subprocess.Popen(
        [sys.executable, "-u", "-c", LAUNCHER],
        env=os.environ | {"TORCHELASTIC_RUN_ID": "none", "PYTHONUNBUFFERED": "1"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    rank = launcher.stdout.readline().strip()
    time.sleep(0.1)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    wait_until_gone([rank])


def train_in_plain_torch(folder):
    """
    The training of train_two_ranks.py as one batch on one rank, with a row for each sample:
    (losses, norms, weights).
    """
    policy = load_policy(folder / "base", dtype=torch.float32).train()
    cpu.speed_up_policy(policy)
    samples = load_samples(folder, load_processor(folder / "base"))
    alone = [replace(sample, prompt_ids=list(sample.prompt_ids)) for sample in samples]
    batch = collate(alone, 0)
    parameters = list(policy.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.95), weight_decay=0)
    losses, norms = [], []
    for _ in range(STEPS):
        logps, _ = token_logps(policy, batch)
        loss = -logps[batch["response_mask"]].mean()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms, {name: p.detach() for name, p in policy.named_parameters()}


@pytest.mark.slow
def test_two_ranks_at_any_stage_and_budget_train_like_a_plain_loop(toy_folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, ROOT / "tests" / "programs" / "train_two_ranks.py", toy_folder],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((toy_folder / f"found-{rank}.json").read_text()) for rank in (0, 1)]
    losses, norms, weights = train_in_plain_torch(toy_folder)
    for zero, budget, recompute in CASES:
        name = f"{zero}-{budget}"
        first, second = (found[name] for found in ranks)
        assert first["losses"] == second["losses"] == pytest.approx(losses, rel=1e-5), name
        assert first["norms"] == pytest.approx(norms, rel=1e-5), name
        trained = torch.load(toy_folder / f"weights-{name}.pt")
        torch.testing.assert_close(trained, weights, atol=1e-5, rtol=0)
        # both ranks have as many micro-batches, some empty; each returned its metrics
        assert len(first["micro_batches"]) == len(second["micro_batches"])
        assert first["metrics"] == first["micro_batches"] and sum(first["metrics"]) == 2
        assert second["metrics"] == second["micro_batches"] and sum(second["metrics"]) == 12
        # recomputation runs each layer again in the backward pass, which it does in training only
        calls = STEPS * len(first["micro_batches"]) * (2 if recompute else 1)
        assert first["layer_calls"] == calls, name
        # a loss that is not a number changes no weight and leaves nothing for the next step
        broken_loss, broken_norm = first["broken"]
        assert math.isnan(broken_loss) and broken_norm == math.inf and first["moved"] == 0
        assert first["loss_again"] == pytest.approx(ranks[0]["0-600"]["loss_again"], rel=1e-5)
        assert first["loss_again"] < losses[-1]
        assert first["linear_is_torchs"], name  # vLLM, in the same process, computes with it too
    saved = load_policy(toy_folder / "saved", dtype=torch.float32)  # what ZeRO-3 exported
    torch.testing.assert_close(dict(saved.named_parameters()), weights, atol=1e-5, rtol=0)
