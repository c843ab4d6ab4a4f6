"""core/training.py: micro-batches, the learning rate, and the optimizer step on two real ranks."""

import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from programs.train_two_ranks import CASES, LR, STEPS, load_samples

from core.encoding import collate, load_processor
from core.policy import load_policy, token_logps
from core.training import learning_rate, micro_batches
from toy import cpu


def group(**lengths):
    return [SimpleNamespace(name=name, length=length) for name, length in lengths.items()]


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


def train_in_plain_torch(folder):
    """The training of train_two_ranks.py as one batch on one rank: (losses, norms, weights)."""
    policy = load_policy(folder / "base", dtype=torch.float32).train()
    cpu.speed_up_policy(policy)
    batch = collate(load_samples(folder, load_processor(folder / "base")), 0)
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
        assert first["metrics"] == first["micro_batches"] and sum(first["metrics"]) == 1
        assert second["metrics"] == second["micro_batches"] and sum(second["metrics"]) == 6
        # recomputation runs each layer again in the backward pass, which it does in training only
        calls = STEPS * len(first["micro_batches"]) * (2 if recompute else 1)
        assert first["layer_calls"] == calls, name
        # a loss that is not a number changes no weight and leaves nothing for the next step
        broken_loss, broken_norm = first["broken"]
        assert math.isnan(broken_loss) and broken_norm == math.inf and first["moved"] == 0
        assert first["loss_again"] == pytest.approx(ranks[0]["0-600"]["loss_again"], rel=1e-5)
        assert first["loss_again"] < losses[-1]
    saved = load_policy(toy_folder / "saved", dtype=torch.float32)  # what ZeRO-3 exported
    torch.testing.assert_close(dict(saved.named_parameters()), weights, atol=1e-5, rtol=0)
