"""
Any number of answers to one question, judged as duels: each answer against each other one.

How an answer ranks is the share of its duels that it wins, over all judgements of them; a judgement
without a verdict gives half to both.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch

from core.duels import pairings, rank_correlation
from core.judgements import BenchmarkRow, ListDuel
from core.scoring import bootstrap_weights, interval, percent

POINTS = {1: 1.0, None: 0.5, 2: 0.0}  # of a duel's first answer, by the verdict


def duel_rows(responses, ranks=None, number=0, first_row=0, **fields):
    """
    The duels of a list, as rows to judge.

    ranks: of each answer, 1 is the best, and equal ones are ties; None: not known. number: of the
    list in its file. first_row: the number of the first row. fields: of BenchmarkRow.

    >>> fields = dict(id="x", source="", question="Q", images=[], video=None, bench="", groups={})
    >>> rows = duel_rows(["a", "b", "c"], ranks=[2, 1, 2], **fields)
    >>> [(row.id, row.responses, row.choice, row.is_decided) for row in rows[:2]]
    [('x 1-2', ['a', 'b'], 2, True), ('x 1-3', ['a', 'c'], 1, False)]
    """
    ranks = ranks or [1] * len(responses)
    list_id = fields.pop("id")
    rows = []
    for row_number, (a, b) in enumerate(pairings(len(responses), "all"), first_row):
        row = BenchmarkRow(
            id=f"{list_id} {a + 1}-{b + 1}",
            responses=[responses[a], responses[b]],
            choice=1 if ranks[a] <= ranks[b] else 2,
            row=row_number,
            set=str(number),
            duel=ListDuel(number, [a, b], ranks),
            **fields,
        )
        rows.append(row)
    return rows


def shares_won(judged_rows):
    """Of each answer of a list, its share of its duels. judged_rows: [(row, its judgements)]."""
    size = len(judged_rows[0][0].duel.ranks)
    points = [0.0] * size
    for row, judgements in judged_rows:
        first, second = row.duel.answers
        won = sum(POINTS[judgement.verdict] for judgement in judgements) / len(judgements)
        points[first] += won
        points[second] += 1 - won
    return [round(won / (size - 1), 9) for won in points]


# --- scores


@dataclass
class RankedList:
    """A list of which all duels are judged to the end."""

    rows: list[BenchmarkRow]
    shares: list[float]  # of each answer, the duels won

    @property
    def ranks(self):
        return self.rows[0].duel.ranks

    @property
    def lengths(self):
        lengths = [0] * len(self.ranks)
        for row in self.rows:
            for answer, text in zip(row.duel.answers, row.responses):
                lengths[answer] = len(text)
        return lengths

    @property
    def is_ranking(self):
        """Whether the file tells more than which answer is the best."""
        return len(set(self.ranks)) > 2


def ranked_lists(rows, done, protocol):
    """([RankedList], the number of lists that are not judged to the end)."""
    lists = defaultdict(list)
    for row in rows:
        if row.duel:
            lists[row.duel.list_number].append(row)
    ranked = []
    for duels in lists.values():
        judged_rows = [(row, protocol.judgements_so_far(row, done)) for row in duels]
        if all(protocol.outcome(judgements) is not None for _, judgements in judged_rows):
            ranked.append(RankedList(duels, shares_won(judged_rows)))
    return ranked, len(lists) - len(ranked)


def score_lists(rows, done, protocol):
    """How well lists are ranked, as in results.json; None where there are none."""
    ranked, missing = ranked_lists(rows, done, protocol)
    if not ranked and not missing:
        return None
    lines = _lines(ranked) if ranked else {}
    return {
        "lists": len(ranked),
        "lists left out, not judged to the end": missing,
        "rankings": sum(one.is_ranking for one in ranked),
        "lines": lines,
    }


def _lines(ranked):
    """{who ranks: {column: interval}}."""
    weights = bootstrap_weights([one.rows[0] for one in ranked])
    scores = {"the judge": [], "as listed (first answer)": [], "longest answer": []}
    for one in ranked:
        scores["the judge"].append(one.shares)
        scores["as listed (first answer)"].append([-place for place in range(len(one.ranks))])
        scores["longest answer"].append(one.lengths)
    lines = {}
    for name, of_lists in scores.items():
        lines[name] = _line(
            [best_first(of_list, one.ranks) for of_list, one in zip(of_lists, ranked)],
            [_correlation(of_list, one) for of_list, one in zip(of_lists, ranked)],
            weights,
        )
    chances = [best_first([0] * len(one.ranks), one.ranks) for one in ranked]
    expected = [0.0 if one.is_ranking else np.nan for one in ranked]
    lines["random"] = _line(chances, expected, weights)
    return lines


def best_first(scores, ranks):
    """
    Is the answer with the highest score the best? Of equal scores any may come first.

    >>> best_first([0.2, 0.9, 0.9], [2, 1, 2]), best_first([0, 0, 0], [1, 2, 1])
    (0.5, 0.6666666666666666)
    """
    highest = max(scores)
    first = [rank for score, rank in zip(scores, ranks) if score == highest]
    return first.count(min(ranks)) / len(first)


def _correlation(scores, ranked):
    """Spearman's, of a list whose file has a ranking. All scores equal: 0."""
    if not ranked.is_ranking:
        return np.nan
    right = -torch.tensor(ranked.ranks)
    return rank_correlation(torch.tensor(scores), right) or 0.0


def _line(best, correlations, weights):
    columns = {"best answer first": interval(percent(np.array(best), weights))}
    if not np.isnan(correlations).all():
        mean = percent(np.array(correlations), weights) / 100
        columns["rank correlation"] = interval(mean)
    return columns
