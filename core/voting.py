"""
Test-time scaling as pure functions (C.5, C.10): voting, any, early stopping, calibration.

The samples of a row are given as counts, one Counts for each order in which its answers were shown.
Expectations are exact, over all subsets or sequences of these samples, and not one draw.
"""

import math
from collections import defaultdict
from enum import Enum
from functools import cache
from typing import NamedTuple

import numpy as np

STOP_AFTER = 3  # equal verdicts in a row end early stopping (C.10)


class Counts(NamedTuple):
    """Samples of a row in one order, by what they say."""

    right: int
    wrong: int
    none: int  # without a verdict


RIGHT, WRONG, NONE = range(3)  # the place of each kind in Counts


class Chances(NamedTuple):
    right: float  # the majority is right; a tie counts one half, no vote at all 0 (deviation 7)
    tie: float  # the vote is tied
    any: float  # at least one sample is right


@cache
def chances(counts, sizes):
    """
    What voting does over all subsets of so many samples of each order.

    >>> chances(((2, 1, 0),), (3,))
    Chances(right=1.0, tie=0, any=1.0)
    >>> chances(((1, 0, 1), (0, 1, 1)), (1, 1))
    Chances(right=0.375, tie=0.25, any=0.5)
    """
    votes = {(0, 0): 1.0}  # (right, wrong): probability
    for order_counts, size in zip(counts, sizes):
        total = defaultdict(float)
        for (right, wrong), p in _draws(*order_counts, size).items():
            for (right_before, wrong_before), p_before in votes.items():
                total[right_before + right, wrong_before + wrong] += p * p_before
        votes = total
    ahead = sum(p for (right, wrong), p in votes.items() if right > wrong)
    tie = sum(p for (right, wrong), p in votes.items() if right == wrong > 0)
    some = sum(p for (right, _), p in votes.items() if right > 0)
    return Chances(ahead + tie / 2, tie, some)


def _draws(right, wrong, none, size):
    """{(right, wrong): probability} of `size` samples drawn without putting back."""
    draws = {}
    subsets = math.comb(right + wrong + none, size)
    for r in range(min(right, size) + 1):
        fewest_wrong = max(0, size - r - none)
        for w in range(fewest_wrong, min(wrong, size - r) + 1):
            ways = math.comb(right, r) * math.comb(wrong, w) * math.comb(none, size - r - w)
            draws[r, w] = ways / subsets
    return draws


def split_over_orders(orders, k):
    """
    The ways to take k samples from the orders in halves; of an odd k either order gets one more.

    >>> split_over_orders(2, 5)
    [(2, 3), (3, 2)]
    """
    if orders == 1:
        return [(k,)]
    half, rest = k // 2, k - k // 2
    return [(half, rest)] if half == rest else [(half, rest), (rest, half)]


class Outcome(Enum):
    """What the samples of a row come to in the end."""

    FIRST = 1  # response 1 is better
    SECOND = 2
    TIE = "tie"
    NO_VOTE = "no vote"

    def accuracy(self, choice):
        if self is Outcome.TIE:
            return 0.5
        return float(self.value == choice)


def trailing_run(verdicts):
    """How many equal verdicts stand at the end; no verdict (None) breaks a run (deviation 8)."""
    length = 0
    for verdict in reversed(verdicts):
        if verdict is None or verdict != verdicts[-1]:
            break
        length += 1
    return length


def decide(verdicts, limit, run=STOP_AFTER):
    """
    The outcome after `run` equal verdicts in a row or `limit` samples (C.10); None: go on.

    >>> decide([1, 2, 2], 16), decide([1, 2, 2, 2], 16), decide([1, 2, 1, 2], 4)
    (None, <Outcome.SECOND: 2>, <Outcome.TIE: 'tie'>)
    """
    if trailing_run(verdicts) >= run:
        return Outcome(verdicts[-1])
    if len(verdicts) < limit:
        return None
    ones, twos = verdicts.count(1), verdicts.count(2)
    if ones != twos:
        return Outcome.FIRST if ones > twos else Outcome.SECOND
    return Outcome.TIE if ones > 0 else Outcome.NO_VOTE


class EarlyStop(NamedTuple):
    accuracy: float  # probability of being right
    drawn: tuple  # how many of the Counts of each order are drawn, expected


class _State(NamedTuple):
    """Where a sequence of samples has come to."""

    drawn: tuple  # (right, wrong, none) of each order
    last: int | None  # kind of the last sample
    run: int  # equal verdicts at the end

    def after(self, order, kind):
        """The state with one more sample."""
        drawn = [list(order_counts) for order_counts in self.drawn]
        drawn[order][kind] += 1
        if kind == NONE:
            run = 0
        elif kind == self.last:
            run = self.run + 1
        else:
            run = 1
        return _State(tuple(map(tuple, drawn)), kind, run)

    def accuracy(self, stop_after):
        if self.run == stop_after:
            return float(self.last == RIGHT)
        right = sum(order_counts[RIGHT] for order_counts in self.drawn)
        wrong = sum(order_counts[WRONG] for order_counts in self.drawn)
        if right == wrong > 0:
            return 0.5
        return float(right > wrong)


@cache
def early_stop(counts, start=0, limit=math.inf, run=STOP_AFTER):
    """
    Early stopping replayed on every possible sequence of a row's samples, at most `limit` of them,
    the orders in turn from order `start` on (deviation 8).
    """
    limit = min(limit, sum(map(sum, counts)))
    states = {_State(((0, 0, 0),) * len(counts), None, 0): 1.0}  # state: probability
    accuracy = 0.0
    expected = np.zeros((len(counts), 3))
    for step in range(limit + 1):
        order = (start + step) % len(counts)
        following = defaultdict(float)
        for state, p in states.items():
            if state.run == run or step == limit:
                accuracy += p * state.accuracy(run)
                expected += p * np.array(state.drawn)
                continue
            left = [there - drawn for there, drawn in zip(counts[order], state.drawn[order])]
            for kind in (RIGHT, WRONG, NONE):
                if left[kind] > 0:
                    following[state.after(order, kind)] += p * left[kind] / sum(left)
        states = following
    drawn = tuple(Counts(*row) for row in expected.tolist())
    return EarlyStop(accuracy, drawn)


def fit_temperature(log_odds):
    """The T from 0.05 to 50 that makes sigmoid(log-odds of the right answer / T) likeliest."""
    if len(log_odds) == 0:
        return 1.0
    temperatures = np.geomspace(0.05, 50, 200)
    losses = np.logaddexp(0, -log_odds[:, None] / temperatures).mean(0)
    return float(temperatures[losses.argmin()])
