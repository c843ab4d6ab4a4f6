"""core/voting.py: voting and early stopping against brute force over all subsets and sequences."""

import doctest
import itertools
import random

import numpy as np
import pytest

from core import voting
from core.voting import Outcome, chances, decide, early_stop, fit_temperature, split_over_orders


def test_the_examples_are_true():
    assert doctest.testmod(voting).failed == 0


def vote(samples):
    """(accuracy, tie, any) of one vote: 1 right, -1 wrong, 0 no verdict."""
    tie = any(samples) and sum(samples) == 0
    accuracy = 0.5 if tie else float(sum(samples) > 0)
    return accuracy, tie, 1 in samples


def counts_of(samples):
    return samples.count(1), samples.count(-1), samples.count(0)


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_vote_and_any_equal_all_subsets(n):
    for right, wrong in itertools.product(range(n + 1), repeat=2):
        none = n - right - wrong
        if none < 0:
            continue
        samples = [1] * right + [-1] * wrong + [0] * none
        for k in range(1, n + 1):
            every = [vote(subset) for subset in itertools.combinations(samples, k)]
            expected = np.mean(every, axis=0)
            found = chances(((right, wrong, none),), (k,))
            assert found == pytest.approx(expected, abs=1e-12)


def test_vote_and_any_with_half_of_the_samples_in_each_order():
    rng = random.Random(1)
    for _ in range(30):
        first, second = ([rng.choice([1, 1, -1, 0]) for _ in range(4)] for _ in range(2))
        for k in range(1, 9):
            for of_first, of_second in split_over_orders(2, k):
                subsets = itertools.product(
                    itertools.combinations(first, of_first),
                    itertools.combinations(second, of_second),
                )
                expected = np.mean([vote(a + b) for a, b in subsets], axis=0)
                counts = (counts_of(first), counts_of(second))
                found = chances(counts, (of_first, of_second))
                assert found == pytest.approx(expected, abs=1e-12)


def stop(sequence):
    """(outcome, samples drawn) of early stopping, one sample after the other."""
    for drawn in range(1, len(sequence) + 1):
        outcome = decide(sequence[:drawn], len(sequence))
        if outcome is not None:
            return outcome, drawn


@pytest.mark.parametrize("orders", [1, 2])
def test_early_stopping_equals_every_sequence(orders):
    rng = random.Random(orders)
    for _ in range(12):
        samples = []  # of each order; 1 is the right verdict
        for _ in range(orders):
            samples.append([rng.choice([1, 1, 2, 2, None]) for _ in range(6 // orders)])
        counts = tuple((s.count(1), s.count(2), s.count(None)) for s in samples)
        for start in range(orders):
            accuracies, drawn_counts = [], []
            for permuted in itertools.product(*map(itertools.permutations, samples)):
                sequence = [permuted[(start + t) % orders][t // orders] for t in range(6)]
                outcome, drawn = stop(sequence)
                accuracies.append(outcome.accuracy(1))
                of_order = [[], []]
                for t in range(drawn):
                    of_order[(start + t) % orders].append(sequence[t])
                drawn_counts.append(
                    [(s.count(1), s.count(2), s.count(None)) for s in of_order[:orders]]
                )
            found = early_stop(counts, start)
            assert found.accuracy == pytest.approx(np.mean(accuracies))
            assert np.allclose(found.drawn, np.mean(drawn_counts, axis=0))


@pytest.mark.parametrize(
    "p, cost", [(0.5, 6.74), (0.6, 6.43), (0.7, 5.61), (0.8, 4.61), (0.9, 3.70), (1.0, 3.0)]
)
def test_early_stopping_costs_so_many_of_16_samples(p, cost):
    """
    Of independent samples. So three in a row save at least 58 %, whatever the model: the paper's
    35 % is no count of samples.
    """
    many = 10**9
    right = round(p * many)
    stopped = early_stop(((right, many - right, 0),), limit=16)
    assert sum(stopped.drawn[0]) == pytest.approx(cost, abs=0.005)


def test_no_verdict_breaks_a_run_and_has_no_vote():
    assert decide([1, 1, None, 1], limit=16) is None
    assert decide([1, 2, None, 1], limit=4) is Outcome.FIRST
    assert decide([None, None, None, None], limit=4) is Outcome.NO_VOTE
    assert Outcome.NO_VOTE.accuracy(1) == 0 and Outcome.TIE.accuracy(2) == 0.5


def test_the_temperature_is_found():
    rng = np.random.default_rng(0)
    log_odds = rng.normal(0, 6, 40000)  # of a judge that is 2.5 times as sure as it should be
    right = rng.random(40000) < 1 / (1 + np.exp(-log_odds / 2.5))
    of_right_answer = np.where(right, log_odds, -log_odds)
    assert fit_temperature(of_right_answer) == pytest.approx(2.5, rel=0.06)
