"""toy/stale.py: a sampler that lags behind, and is hotter than its log-probabilities say."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from core import neighbours
from stable_reinforce import policy_loss
from toy import stale

LAGGING = ["--data", "-", "--old_logps", "vllm", "--check_every", "0", "--sync_every", "5"]


class FakeSampler:
    pads = (7, 8)

    def generate(self, prompts, seeds, n, temperature, max_tokens, logps):
        return temperature


def test_only_a_rollout_is_hot():
    sampler = stale.HotSampler(FakeSampler(), 1.5)
    assert sampler.generate([], [], 1, 1.0, 10, True) == 1.5
    assert sampler.generate([], [], 1, 1.0, 10, False) == 1.0
    assert sampler.generate([], [], 1, 0.0, 10, False) == 0.0
    assert sampler.pads == (7, 8)


def test_a_run_starts_with_the_hot_sampler(monkeypatch):
    run = stale.rl.Run(None, 0, 1, None, None, FakeSampler(), None, None)
    monkeypatch.setattr(stale, "start_run", lambda *_: run)
    args = SimpleNamespace(sampler_temperature=1.5)
    assert stale.start_hot_run(args).sampler.temperature == 1.5


def test_every_third_sync_reaches_vllm(monkeypatch):
    synced = []
    monkeypatch.setattr(stale, "sync", synced.append)
    steps = itertools.count(1)
    for step in range(1, 8):
        stale.sync_now_and_then(steps, 3, step)
    assert synced == [3, 6]


def test_a_token_has_risen_if_it_is_a_thousand_times_likelier_and_a_is_negative():
    log_1000 = math.log(1000)
    logps = torch.tensor([[log_1000 + 0.1, log_1000 - 0.1, 0.0], [log_1000 + 0.1, 50.0, 0.0]])
    advantages = torch.tensor([-1.0, 1.0])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    batch = (logps, torch.zeros(2, 3), advantages, mask)
    loss, statistics = stale.count_risen(policy_loss, *batch)
    assert statistics["risen"] == 1 / 4
    expected, _ = policy_loss(*batch)
    assert loss == expected


def test_all_algorithms_are_counted_and_cispo_may_have_one_sample(monkeypatch):
    for name in neighbours.ALGORITHMS:  # all are put back afterwards
        monkeypatch.setitem(neighbours.ALGORITHMS, name, neighbours.ALGORITHMS[name])
    monkeypatch.setitem(neighbours.ALGORITHMS, "cispo_batch", None)
    for name in ("parser", "start_run", "sync"):
        monkeypatch.setattr(stale.rl, name, getattr(stale.rl, name))
    stale.add_cispo_batch()
    stale.put_in(stale.parser().parse_args([*LAGGING, "--steps", "10", "--eval_every", "5"]))
    zeros = torch.zeros(1, 2)
    for algorithm in neighbours.ALGORITHMS.values():
        _, statistics = algorithm.loss(zeros, zeros, torch.ones(1), torch.ones(1, 2))
        assert statistics["risen"] == 0
    args = stale.rl.parser().parse_args(["--data", "-", "--algo", "cispo_batch"])
    rewards = torch.tensor([1.0, 1.0, 0.0])
    advantages, _ = neighbours.ALGORITHMS[args.algo].advantages(rewards, torch.arange(3))
    assert advantages.tolist() == pytest.approx([2**-0.5, 2**-0.5, -(2**0.5)])


@pytest.mark.parametrize(
    "flags, problem",
    [
        (["--old_logps", "trainer"], "a sampler that lags behind is another policy"),
        (["--check_every", "10"], "a sampler that lags behind is another policy"),
        (["--eval_every", "7"], "expected multiples of --sync_every, 5"),
        (["--steps", "11"], "expected multiples of --sync_every, 5"),
    ],
)
def test_what_makes_no_sense_is_refused(flags, problem):
    words = [*LAGGING, "--steps", "10", "--eval_every", "5", *flags]
    with pytest.raises(ValueError, match=problem):
        stale.put_in(stale.parser().parse_args(words))
