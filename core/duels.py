"""
The answers to a prompt, and who beats whom among them (C.9.1): which are compared, what the reward
model is asked, and Eq. 3.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from core.exact_match import exact


class Duel(NamedTuple):
    """Two answers as the reward model sees them. What the verdict depends on, and no more."""

    question: str
    images: tuple
    first: str
    second: str
    answer: str  # the ground truth, for --judge exact


def duel(task, first, second):
    return Duel(task.question, tuple(task.images), first, second, task.answer)


@dataclass
class Contest:
    """The answers to one prompt, and the duels between them."""

    samples: list  # of the prompt
    answers: list  # the different ones; None: an answer that is not finished
    calls: list[tuple]  # (a, b): answer a is shown first, b second
    verdicts: list[float] | None = None  # of the calls: how surely a beats b; NaN: no verdict

    def duels(self):
        """The duels of the calls."""
        task, answers = self.samples[0].pair, self.answers
        return [duel(task, answers[a], answers[b]) for a, b in self.calls]


@dataclass
class Score:
    """What the duels of a prompt's answers gave: tensors have a number for each sample."""

    rewards: torch.Tensor
    share: torch.Tensor  # of its duels that an answer won, Score / (n - 1)
    exact: torch.Tensor
    distinct: int  # different answers
    judge_right: list[float]  # the right answer's share of each duel with a wrong one
    no_verdict: int
    ring_rank: float | None  # rank correlation with what --pairs ring would have given

    @property
    def spread(self):
        return self.share.std(unbiased=False).item()

    @property
    def flat(self):
        return float(self.rewards.max() == self.rewards.min())


def finished_answer(sample):
    """The answer that is compared, or None: it is empty or was cut off."""
    text = sample.text.strip()
    return text if sample.finish == "stop" and text else None


def make_contest(samples, pairs):
    """The contest of the answers to one prompt: equal answers are one."""
    answers = list(dict.fromkeys(finished_answer(sample) for sample in samples))
    calls = []
    for a, b in pairings(len(answers), pairs):
        if answers[a] is not None and answers[b] is not None:
            calls += [(a, b), (b, a)]
    # calls with the same first answer are neighbours: the server has their prefix in its cache
    return Contest(samples, answers, sorted(calls))


def score(contest, pairs, exact_weight):
    """The rewards of a prompt's answers, when the contest has its verdicts."""
    answers = contest.answers
    given = torch.tensor([answers.index(finished_answer(sample)) for sample in contest.samples])
    counts = torch.bincount(given)
    p = verdict_table(contest)
    n = len(given)
    share = scores(p, counts, pairs)[given] / (n - 1)
    truth = contest.samples[0].pair.answer
    right = torch.tensor([exact(answer or "", truth) for answer in answers], dtype=torch.float64)
    ring_rank = None
    if pairs == "all":
        ring_rank = rank_correlation(share, scores(p, counts, "ring")[given])
    return Score(
        rewards=share + exact_weight * right[given],
        share=share,
        exact=right[given],
        distinct=len(answers),
        judge_right=shares_of_right(p, right, pairs),
        no_verdict=sum(math.isnan(verdict) for verdict in contest.verdicts),
        ring_rank=ring_rank,
    )


def verdict_table(contest):
    """p[a, b], see scores(): an answer that is not finished loses, without a call."""
    m = len(contest.answers)
    p = torch.full((m, m), math.nan, dtype=torch.float64)
    for (a, b), verdict in zip(contest.calls, contest.verdicts):
        p[a, b] = verdict
    if None in contest.answers:
        unfinished = contest.answers.index(None)
        p[unfinished, :] = 0.0
        p[:, unfinished] = 1.0
    return p


def shares_of_right(p, right, pairs):
    """The right answer's share of each duel with a wrong one."""
    s = win_shares(p)
    shares = []
    for a, b in pairings(len(right), pairs):
        if right[a] > right[b]:
            shares.append(s[a, b].item())
        elif right[b] > right[a]:
            shares.append(s[b, a].item())
    return shares


# --------------------------------------------------------------------------------------------------
# Eq. 3


def pairings(m, pairs):
    """
    Which of m different answers are compared: all pairs, or neighbours on a ring up to `pairs`
    apart ("ring": 1). Each is judged in both orders.

    >>> pairings(3, "all"), pairings(5, "ring")
    ([(0, 1), (0, 2), (1, 2)], [(0, 1), (0, 4), (1, 2), (2, 3), (3, 4)])
    >>> len(pairings(8, "all")), len(pairings(8, 2))
    (28, 16)
    """
    farthest = m - 1
    if pairs == "ring":
        farthest = min(farthest, 1)
    elif pairs != "all":
        farthest = min(farthest, pairs)
    compared = set()
    for first in range(m):
        for distance in range(1, farthest + 1):
            second = (first + distance) % m
            compared.add((min(first, second), max(first, second)))
    return sorted(compared)


def scores(p, counts, pairs):
    """
    Eq. 3 for m different answers, of which answer a was given counts[a] times: (m,) float64.

    p[a, b] in [0, 1] says how surely a, shown first, beats b; NaN: no verdict, which is a draw.
    Between equal answers s = 1/2.

    >>> p = torch.tensor([[0., 1., 1.], [1., 0., 1.], [0., 0., 0.]])   # 0 and 1: always the first
    >>> scores(p, torch.tensor([1, 1, 1]), "all").tolist()
    [1.5, 1.5, 0.0]
    >>> scores(p, torch.tensor([2, 1, 1]), "all").tolist()
    [2.0, 2.0, 0.0]
    """
    m, n = len(counts), counts.sum()
    itself = torch.eye(m, dtype=torch.bool)
    compared = itself.clone()
    for a, b in pairings(m, pairs):
        compared[a, b] = compared[b, a] = True
    others = counts - itself.long()  # (m, m) how often answer b was given, apart from a itself
    opponents = compared * others
    wins = (opponents * win_shares(p)).sum(1)
    return (n - 1) * wins / opponents.sum(1).clamp_min(1)


def win_shares(p):
    """s_ij = (p_ij + 1 - p_ji) / 2: a leaning to the first place cancels. (m, m), in float64."""
    p = p.double()
    s = ((p + 1 - p.T) / 2).nan_to_num(0.5)
    return s.fill_diagonal_(0.5)


def rank_correlation(x, y):
    """
    Spearman's; ties share their mean rank. None where either is flat.

    >>> x = torch.tensor([1., 5., 9.])
    >>> rank_correlation(torch.tensor([1., 2., 3.]), x), rank_correlation(torch.ones(3), x)
    (1.0, None)
    """
    x, y = ranks(x), ranks(y)
    x, y = x - x.mean(), y - y.mean()
    size = (x.norm() * y.norm()).item()
    return round((x @ y).item() / size, 6) if size else None


def ranks(values):
    # the same scores summed in another order are ties
    values = values.double().round(decimals=6)
    below = (values[:, None] > values).sum(1)
    equal = (values[:, None] == values).sum(1)
    return below + (equal - 1) / 2.0
