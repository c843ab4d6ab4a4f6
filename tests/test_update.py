"""
What rl.py does with the mathematics: advantages, mini-batches, old log-probabilities, losses,
optimizer steps.

The policy is a table with one log-probability for each token id, the optimizer is plain gradient
descent, and the results are compared with the formulas written once more, with Python's numbers and
a loop for each sum.
"""

import itertools
import math
import os
import random
from collections import Counter
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

import rl
from core import metrics, training
from core.encoding import Sample
from core.neighbours import ALGORITHMS

SIZES = {
    "--rollout_batch": 4,
    "--samples": 2,
    "--train_batch": 4,
    "--lr": 0.5,
    "--max_new_tokens": 8,
    "--micro_tokens": 12,
}


def make_args(**flags):
    words = ["--data", "-", "--out", "out/none"]
    for name, value in (SIZES | {f"--{name}": value for name, value in flags.items()}).items():
        words += [name] if value is True else [name, str(value)]
    return rl.parser().parse_args(words)


# --------------------------------------------------------------------------------------------------
# A policy that is a table, and a trainer that is plain gradient descent


class Table(torch.nn.Module):
    def __init__(self, values):
        super().__init__()
        self.logps = torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))

    def forward(self, batch, entropy=False):
        logps = self.logps[batch["response_ids"]]
        mask = batch["response_mask"]
        spread = torch.zeros(mask.shape, dtype=logps.dtype)
        entropy = -3 * logps.detach()  # not the entropy, but a number that is easy to follow
        return {
            "logps": spread.masked_scatter(mask, logps),
            "entropy": spread.masked_scatter(mask, entropy),
        }


class GradientDescent:
    """What an update calls of DeepSpeed's engine, stage 0; it takes the mean over ranks, too."""

    def __init__(self, policy):
        self.module = policy
        self.optimizer = SimpleNamespace(param_groups=[{"lr": None}])

    def __call__(self, batch, entropy=False):
        return self.module(batch, entropy)

    def train(self):
        self.module.train()

    def zero_optimization(self):
        return False

    def backward(self, loss):
        loss.backward()

    def buffered_allreduce_fallback(self):
        if dist.get_world_size() > 1:
            dist.all_reduce(self.module.logps.grad)
            self.module.logps.grad /= dist.get_world_size()

    def step(self):
        with torch.no_grad():
            self.module.logps -= self.optimizer.param_groups[0]["lr"] * self.module.logps.grad

    def zero_grad(self):
        self.module.logps.grad = None


pytestmark = pytest.mark.usefixtures("one_rank")

# --------------------------------------------------------------------------------------------------
# The problem: eight samples of four prompts, tokens from a vocabulary of six

POLICY = [-1.0, -2.0, -1.0, -3.0, -2.0, -1.0]
REFERENCE = [-2.0, -1.0, -1.0, -1.0, -3.0, -2.0]
RESPONSES = [[0, 1, 2], [3], [4, 5], [0, 0, 3, 1], [2], [5, 4, 3], [1, 2], [3, 3, 5, 0, 1]]
REWARDS = [2.0, 0.0, 1.0, 1.0, 2.0, 2.0, 0.0, 1.0]
# what the sampler says of each token: far away for some, so that every clip has something to do
# sampled = policy - offset: ratios 1, e, 1/e, 1, e^9 = 8,103, 1/e
SAMPLED_OFFSETS = [0, 1, -1, 0, 9, -1]


def make_samples(rank=0, world=1):
    """This rank's samples."""
    samples = []
    for place, response in enumerate(RESPONSES):
        sampled = [POLICY[token] - SAMPLED_OFFSETS[token] for token in response]
        sample = Sample([0, 0], [0, 0], {}, response_ids=list(response), sampled_logps=sampled)
        sample.place = place
        sample.group = place // 2
        samples.append(sample)
    return share(samples, rank, world)


def share(items, rank, world):
    return items[rank * len(items) // world : (rank + 1) * len(items) // world]


def run_steps(args, steps=1, rank=0, world=1):
    """
    `steps` rollouts of the same samples through rl.py's own functions: the table after each, the
    losses, the kept flags of the last, the log's row of the last.
    """
    trainer = GradientDescent(Table(POLICY))
    reference = Table(REFERENCE).requires_grad_(False) if args.kl_coef else None
    processor = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0))
    run = rl.Run(args, rank, world, torch.device("cpu"), processor, None, trainer, reference)
    judge = SimpleNamespace(counts={"calls": 0, "failed": 0, "unparsable": 0})
    rewards = torch.tensor(share(REWARDS, rank, world), dtype=torch.float64)
    tables, losses, kept, row = [], [], None, None
    for step in range(steps):
        samples = make_samples(rank, world)
        mini_batches = rl.split_into_mini_batches(samples, step, args)
        rl.set_old_logps(run, mini_batches)
        rl.set_reference_logps(run, mini_batches)
        kept = rl.set_advantages(samples, rewards, args)
        updates = rl.learn(run, mini_batches, step, {"skipped": 0})
        tables.append(trainer.module.logps.detach().tolist())
        losses += [update.loss for update in updates]
        row = metrics.update_metrics(updates, judge, {"update": 1.0})
    return tables, losses, kept.tolist(), row


# --------------------------------------------------------------------------------------------------
# The same, once more, with Python's numbers


class Seen(NamedTuple):
    """A token as an update saw it."""

    ratio: float
    low: bool  # clipped
    high: bool
    entropy: float
    log_ratio: float


def mean_and_std(values):
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))


OVER_THE_BATCH = ("stable_reinforce", "reinforce++", "ppo", "dual_clip", "cpgd", "topr")
OVER_TOKENS = ("stable_reinforce", "reinforce++", "ppo", "dual_clip", "cpgd", "dapo", "cispo")


class Formulas:
    """Each algorithm as its paper has it, a loop for each sum."""

    def __init__(self, args):
        self.args = args
        self.kl_coef = args.kl_coef
        self.table = list(POLICY)

    def kl_of_tokens(self, place):
        old = self.old[place]
        return [logp - REFERENCE[token] for logp, token in zip(old, RESPONSES[place])]

    def advantages(self):
        """{(place, position): A} and the kept flags."""
        rewards, totals = self.rewards()
        if self.args.algo in OVER_THE_BATCH:
            return self.batch_advantages(rewards, totals)
        found = {}
        for p, response in enumerate(RESPONSES):
            a = self.group_advantage(p, totals)
            for i in range(len(response)):
                found[p, i] = a
        return found, [True] * len(RESPONSES)

    def rewards(self):
        """{(place, position): reward} and each sample's total, less a penalty k1."""
        rewards, totals = {}, list(REWARDS)
        for p, response in enumerate(RESPONSES):
            kl = [0.0] * len(response)
            if self.args.kl_coef and self.args.kl == "k1":
                kl = self.kl_of_tokens(p)
            totals[p] -= self.args.kl_coef * sum(kl)
            for i in range(len(response)):
                rewards[p, i] = REWARDS[p] - self.args.kl_coef * sum(kl[i:])
        return rewards, totals

    def batch_advantages(self, rewards, totals):
        algo, sigma = self.args.algo, self.args.sigma
        per_token = self.args.kl_coef and self.args.kl == "k1" and algo != "topr"
        values = list(rewards.values()) if per_token else totals
        mean, std = mean_and_std(values)
        found, kept = {}, [True] * len(RESPONSES)
        for (p, i), reward in rewards.items():
            a = (reward if per_token else totals[p]) - mean
            if algo not in ("ppo", "topr"):
                a /= std
            if algo == "stable_reinforce" and sigma and abs(a) > sigma:
                a, kept[p] = 0.0, False
            found[p, i] = a
        return found, kept

    def group_advantage(self, p, totals):
        mates = [totals[q] for q in range(len(RESPONSES)) if q // 2 == p // 2]
        mean, std = mean_and_std(mates)
        if self.args.algo == "rloo":
            return totals[p] - (sum(mates) - totals[p]) / (len(mates) - 1)
        if self.args.algo == "dr_grpo":
            return totals[p] - mean
        return (totals[p] - mean) / (std + 1e-4)

    def token_terms(self, place, advantages):
        """
        Of each token of a sample: objective, its derivative by the token's log-probability, ratio,
        clipped below, clipped above.
        """
        args, algo = self.args, self.args.algo
        low, high = 1 - args.eps, 1 + (args.eps if args.eps_high is None else args.eps_high)
        if algo == "dapo" and args.eps_high is None:
            high = 1.28
        terms = []
        whole = sum(self.table[t] - self.old[place][i] for i, t in enumerate(RESPONSES[place]))
        for i, token in enumerate(RESPONSES[place]):
            new, old, a = self.table[token], self.old[place][i], advantages[place, i]
            if args.tis:
                a *= min(math.exp(old - (POLICY[token] - SAMPLED_OFFSETS[token])), args.tis)
            ratio = math.exp(new - old)
            if algo == "rloo":
                terms.append((a * new, a, ratio, False, False))
            elif algo == "topr":
                weight = 1.0 if a >= 0 else min(math.exp(whole), 1.0)
                terms.append((weight * a * new, weight * a, ratio, False, a < 0 and whole > 0))
            elif algo == "cispo":
                top = 1 + (4.0 if args.eps_high is None else args.eps_high)
                weight = min(ratio, top)
                terms.append((weight * a * new, weight * a, ratio, False, ratio > top))
            else:
                terms.append(self.clipped_term(new - old, a, low, high))
        return terms

    def clipped_term(self, log_ratio, a, low, high):
        """A token's terms for PPO's loss and those that change one thing in it."""
        args, algo = self.args, self.args.algo
        ratio = slope = math.exp(log_ratio)
        if algo == "stable_reinforce" and args.clip:
            bound = math.log(args.clip)
            ratio = math.exp(max(-bound, min(bound, log_ratio)))
            slope = ratio if abs(log_ratio) < bound else 0.0
        clipped_low, clipped_high = a < 0 and ratio < low, a > 0 and ratio > high
        moved, bounds = ratio, (low, high)
        if algo == "cpgd":
            moved, slope, bounds = log_ratio, 1.0, (math.log(low), math.log(high))
        value = min(moved * a, max(bounds[0], min(bounds[1], moved)) * a)
        if clipped_low or clipped_high:
            slope = 0.0
        if algo == "dual_clip" and a < 0 and ratio > 3:
            value, slope = 3 * a, 0.0
        return value, slope * a, ratio, clipped_low, clipped_high

    def weight(self, place, batch):
        """What a token of this sample counts in the loss of its mini-batch."""
        algo = self.args.algo
        if algo in OVER_TOKENS:
            return 1 / sum(len(RESPONSES[p]) for p in batch)
        if algo == "grpo":
            return 1 / len(RESPONSES[place]) / len(batch)
        if algo == "dr_grpo":
            return 1 / self.args.max_new_tokens / len(batch)
        return 1 / len(batch)  # rloo, topr

    def penalty(self, token):
        """k2 or k3, and its derivative by the token's log-probability."""
        difference = self.table[token] - REFERENCE[token]
        if self.args.kl == "k2":
            return difference**2 / 2, difference
        return math.exp(-difference) - 1 + difference, 1 - math.exp(-difference)

    def update(self, batch, advantages, rate):
        """One step of gradient descent on a mini-batch of places; returns its loss."""
        loss, gradient = 0.0, Counter()
        for place in batch:
            weight = self.weight(place, batch)
            for i, (value, slope, ratio, low, high) in enumerate(
                self.token_terms(place, advantages)
            ):
                token = RESPONSES[place][i]
                loss -= weight * value
                gradient[token] -= weight * slope
                if self.kl_coef and self.args.kl != "k1":
                    kl, kl_slope = self.penalty(token)
                    loss += self.kl_coef * weight * kl
                    gradient[token] += self.kl_coef * weight * kl_slope
                log_ratio = self.table[token] - self.old[place][i]
                self.seen.append(Seen(ratio, low, high, -3 * self.table[token], log_ratio))
        for token, slope in gradient.items():
            self.table[token] -= rate * slope
        return loss

    def run(self, steps=1):
        args, tables, losses, number, kept = self.args, [], [], 0, None
        for step in range(steps):
            self.seen = []
            sampled = [[POLICY[t] - SAMPLED_OFFSETS[t] for t in response] for response in RESPONSES]
            current = [[self.table[t] for t in response] for response in RESPONSES]
            self.old = sampled if args.old_logps == "vllm" else current
            advantages, kept = self.advantages()
            prompts = list(range(len(RESPONSES) // 2))
            random.Random(f"{args.seed} {step} mini-batches").shuffle(prompts)
            order = [place for prompt in prompts for place in (2 * prompt, 2 * prompt + 1)]
            batches = [
                order[i : i + args.train_batch] for i in range(0, len(order), args.train_batch)
            ]
            for batch in batches * args.epochs:
                rate = args.lr * min(1, (number + 1) / (args.warmup + 1))
                number += 1
                losses.append(self.update(batch, advantages, rate))
            tables.append(list(self.table))
        return tables, losses, kept


def check(args, steps=1):
    formulas = Formulas(args)
    tables, losses, kept = formulas.run(steps)
    found_tables, found_losses, found_kept, row = run_steps(args, steps)
    assert found_losses == pytest.approx(losses, rel=1e-4, abs=1e-6)
    assert found_kept == kept
    for found, expected in zip(found_tables, tables):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    return row, formulas.seen


# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"epochs": 3},
        {"epochs": 2, "eps": 0.01},
        {"old_logps": "vllm"},
        {"train_batch": 8, "epochs": 2},
        {"train_batch": 2},
        {"kl_coef": 0.5, "kl": "k1"},
        {"kl_coef": 0.5, "kl": "k2"},
        {"kl_coef": 0.5, "kl": "k3"},
        {"max_new_tokens": 5},
    ],
    ids=lambda flags: " ".join(f"{k}={v}" for k, v in flags.items()) or "as it is",
)
@pytest.mark.parametrize("algo", list(ALGORITHMS))
def test_every_algorithm_takes_the_steps_of_its_formulas(algo, flags):
    check(make_args(algo=algo, **flags))


@pytest.mark.parametrize(
    "flags",
    [
        {"clip": 0},
        {"clip": 2},
        {"clip": 5},
        {"eps_high": 0.28},
        {"eps": 0.5},
        {"sigma": 1.0},
        {"sigma": 0},
        {"sigma": 1.0, "kl_coef": 0.1, "kl": "k1"},
        {"clip": 2, "sigma": 1.2, "epochs": 2},
    ],
    ids=lambda flags: " ".join(f"{k}={v}" for k, v in flags.items()),
)
def test_stable_reinforce_follows_its_flags(flags):
    check(make_args(old_logps="vllm", **flags))


@pytest.mark.parametrize("algo, eps_high", [("dapo", 0.5), ("cispo", 1.5)])
def test_the_upper_clip_is_the_flags(algo, eps_high):
    check(make_args(algo=algo, eps_high=eps_high, old_logps="vllm", epochs=2))


@pytest.mark.parametrize("tis", [0.5, 2, 1000])
@pytest.mark.parametrize("algo", [name for name in ALGORITHMS if name != "topr"])
def test_truncated_importance_weights_are_of_the_old_policy_against_the_sampler(algo, tis):
    check(make_args(algo=algo, tis=tis, epochs=2))


@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_the_rate_rises_over_the_warm_up_and_goes_on_across_rollouts(warmup):
    check(make_args(warmup=warmup), steps=3)


def test_a_filter_that_drops_one_token_counts_the_judgement():
    args = make_args(sigma=1.0, kl_coef=0.5, kl="k1")
    *_, kept, _ = run_steps(args)
    assert kept == Formulas(args).run()[2]
    assert 0 < sum(kept) < 8


def test_statistics_are_means_over_tokens_and_maxima():
    row, seen = check(make_args(old_logps="vllm", clip=100, train_batch=8, micro_tokens=1))
    assert len(seen) == sum(map(len, RESPONSES))
    bound = math.log(100)
    log_ratios = [max(-bound, min(bound, token.log_ratio)) for token in seen]
    expected = {
        "ratio_mean": [math.exp(x) for x in log_ratios],
        "entropy": [token.entropy for token in seen],
        "clipped_low": [token.low for token in seen],
        "clipped_high": [token.high for token in seen],
        "preclipped": [abs(token.log_ratio) > bound for token in seen],
        "kl": [math.exp(x) - 1 - x for x in log_ratios],
    }
    for name, values in expected.items():
        assert row[name] == pytest.approx(sum(values) / len(values), rel=1e-4), name
    assert row["clipped_low"] + row["clipped_high"] > 0
    assert row["log_ratio_max"] == pytest.approx(9.0)
    assert row["ratio_max"] == pytest.approx(100.0)


# --------------------------------------------------------------------------------------------------
# Mini-batches


def places_of(step, **flags):
    args = make_args(**{"rollout_batch": 24, "samples": 1, "train_batch": 8} | flags)
    samples = [SimpleNamespace(place=place) for place in range(24)]
    mini_batches = rl.split_into_mini_batches(samples, step, args)
    return [[sample.place for sample in mini_batch] for mini_batch in mini_batches]


def test_mini_batches_are_a_shuffled_partition_new_in_every_step():
    batches = places_of(0)
    assert [len(batch) for batch in batches] == [8, 8, 8]
    assert sorted(itertools.chain(*batches)) == list(range(24))
    assert sorted(batches[0]) != list(range(8))
    assert places_of(0) == batches
    assert places_of(1) != batches
    assert places_of(0, seed=1) != batches


@pytest.mark.parametrize("train_batch, prompts_of_each", [(8, [2, 2, 2]), (6, [2, 2, 2, 2])])
def test_samples_of_a_prompt_are_in_the_same_mini_batch(train_batch, prompts_of_each):
    """With 4 samples a prompt, 6 prompts: as far as the size of a mini-batch allows."""
    batches = places_of(0, rollout_batch=6, samples=4, train_batch=train_batch)
    assert sorted(itertools.chain(*batches)) == list(range(24))
    assert [len({place // 4 for place in batch}) for batch in batches] == prompts_of_each


def test_two_ranks_cut_the_same_mini_batches():
    args = make_args(rollout_batch=24, samples=1, train_batch=8)
    samples = [SimpleNamespace(place=place) for place in range(24)]
    halves = [rl.split_into_mini_batches(half, 3, args) for half in (samples[:12], samples[12:])]
    for number, places in enumerate(places_of(3)):
        found = [sample.place for half in halves for sample in half[number]]
        assert sorted(found) == sorted(places)


# --------------------------------------------------------------------------------------------------
# Two ranks

TWO_RANKS = [{"algo": name, "epochs": 2} for name in ALGORITHMS] + [
    {"kl_coef": 0.5, "kl": "k1", "sigma": 1.2},
    {"algo": "grpo", "kl_coef": 0.5, "kl": "k3"},
    {"tis": 2.0},
]


def second_rank(rank, port, folder):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    training.start_ranks(0)
    found = []
    for flags in TWO_RANKS:
        # micro-batches of one sample: a rank with fewer samples has empty ones at the end
        args = make_args(**flags | {"micro_tokens": 1, "seed": 2})
        found.append(run_steps(args, 2, rank, 2))
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_two_ranks_with_unequal_shares_take_the_steps_of_one(tmp_path):
    port = training.free_port()
    torch.multiprocessing.spawn(second_rank, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    sizes = set()
    for step in (0, 1):
        args = make_args(seed=2)
        mini_batches = rl.split_into_mini_batches(make_samples(0, 2), step, args)
        sizes |= {len(mini_batch) for mini_batch in mini_batches}
    assert sizes == {0, 2, 4}  # of some mini-batches a rank has all samples or none
    for flags, one, two in zip(TWO_RANKS, first, second):
        args = make_args(**flags | {"seed": 2})
        tables, losses, kept = Formulas(args).run(2)
        assert one[0] == two[0], flags
        assert one[2] + two[2] == kept, flags
        assert one[1] == two[1] == pytest.approx(losses, rel=1e-4, abs=1e-6), flags
        for found, expected in zip(one[0], tables):
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-6), flags
