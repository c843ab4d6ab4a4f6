"""
Every number of evaluate.py, from rows and judgements alone, without a model.

A method (one sample, voting@16, ...) gives each row the probability of being judged rightly, in one
or two variants whose mean counts: the better answer shown first and second, say. So the accuracies
of a method are an array (V, R), variants and rows; NaN where a row was not shown in that way.
"""

import hashlib
import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from core.judgements import BenchmarkRow, Judgement
from core.voting import (
    NONE,
    RIGHT,
    WRONG,
    Chances,
    Counts,
    chances,
    early_stop,
    fit_temperature,
    split_over_orders,
)

# Does the reasoning go back on itself (C.6)? Telltale words: a hint where to look, no measurement.
DOUBTS = re.compile(
    r"wait[,.:!]|re-?(?:read|check|exam)|re-eval|reconsider|recalculat|second thought|look again"
    r"|made a mistake|correct myself",
    re.IGNORECASE,
)
TRIVIAL = ("always 1", "longer answer", "shorter answer", "coin")  # methods without a judge
MAX_LOG_ODDS = 20  # of a calibrated vote: where one log-probability is not known
RESAMPLES = 1000  # of the bootstrap


# --- the judgements of a row


class Stopped(NamedTuple):
    """Early stopping on a row; or on all rows, as arrays (V, R)."""

    accuracy: float
    samples: float
    tokens: float


@dataclass
class JudgedRow:
    """A row that is judged to the end. Place 0: the better answer is shown first, 1: second."""

    row: BenchmarkRow
    judgements: list[Judgement]  # those that vote
    stopped: Stopped | None  # None: judged without early stopping
    tie_is_half: bool = False  # equal rewards count one half

    def __post_init__(self):
        self.counts = [[0, 0, 0], [0, 0, 0]]  # place, kind (see Counts): samples
        self.tokens = [[0, 0, 0], [0, 0, 0]]  # the same: tokens of these samples
        self.ties = [0, 0]  # place: those of the samples without verdict that have equal rewards
        for judgement in self.judgements:
            place, kind = self.place_of(judgement), self.kind_of(judgement)
            self.counts[place][kind] += 1
            self.tokens[place][kind] += judgement.tokens
            self.ties[place] += judgement.is_tie
        self.places = [place for place in (0, 1) if sum(self.counts[place]) > 0]

    def place_of(self, judgement):
        return judgement.order if self.row.choice == 1 else 1 - judgement.order

    def kind_of(self, judgement):
        if judgement.verdict is None:
            return NONE
        return RIGHT if judgement.verdict == self.row.choice else WRONG

    @cached_property
    def votes(self):
        """The Counts of each place that the row was shown in."""
        return tuple(Counts(*self.counts[place]) for place in self.places)

    def accuracy(self, place):
        """Of one sample. No verdict is wrong (deviation 2)."""
        right, wrong, none = self.counts[place]
        halves = self.ties[place] / 2 if self.tie_is_half else 0
        return _share(right + halves, right + wrong + none)

    def accuracy_of_verdicts(self, place):
        right, wrong, _ = self.counts[place]
        return _share(right, right + wrong)

    def logps_of_right_and_wrong(self, judgement):
        """Log-probabilities of the right and of the wrong verdict; -inf: not known."""
        first = -math.inf if judgement.logp1 is None else judgement.logp1
        second = -math.inf if judgement.logp2 is None else judgement.logp2
        return (first, second) if self.place_of(judgement) == 0 else (second, first)

    def replay_early_stop(self, start):
        """What early stopping would have done with these samples, beginning in either place."""
        accuracy, drawn = early_stop(self.votes, start)
        samples, tokens = 0.0, 0.0
        for place, drawn_counts in zip(self.places, drawn):
            for kind, count in enumerate(drawn_counts):
                # samples of a kind are exchangeable: each costs their mean length
                mean_length = self.tokens[place][kind] / max(1, self.counts[place][kind])
                samples += count
                tokens += count * mean_length
        return Stopped(accuracy, samples, tokens)


def _share(part, total):
    return part / total if total else math.nan


# --- the judgements of a benchmark


class Tally:
    """The rows of a benchmark that are judged to the end."""

    def __init__(self, rows, done, protocol):
        self.protocol = protocol
        self.done = done
        self.judged = []  # JudgedRow
        for row in rows:
            judgements = protocol.judgements_so_far(row, done)
            outcome = protocol.outcome(judgements)
            if outcome is None:
                continue
            stopped = None
            if protocol.early_stop:
                tokens = sum(judgement.tokens for judgement in judgements)
                stopped = Stopped(outcome.accuracy(row.choice), len(judgements), tokens)
                # later samples were drawn because of what these said, so they cannot vote
                judgements = judgements[: protocol.n_orders]
            tie_is_half = protocol.ties == "half"
            self.judged.append(JudgedRow(row, judgements, stopped, tie_is_half))
        self.rows = [judged.row for judged in self.judged]
        self.missing = len(rows) - len(self.rows)
        self.samples = 1 if protocol.early_stop else protocol.samples  # a row, to vote with
        self.can_vote = self.samples > 2

    def accuracy(self, place):
        """(R,): of one sample."""
        return np.array([judged.accuracy(place) for judged in self.judged])

    def chances(self, k):
        """The Chances of votes of k samples, each an array (V, R)."""
        variants = []
        for sizes in split_over_orders(self.protocol.n_orders, k):
            variants.append([chances(judged.votes, sizes) for judged in self.judged])
        return _as_arrays(Chances, variants)

    @cached_property
    def early_stopping(self):
        """Stopped, each an array (V, R): as it happened or replayed; None: too few samples."""
        if self.protocol.early_stop:
            variants = [[judged.stopped for judged in self.judged]]
        elif self.can_vote:
            variants = []
            for start in range(self.protocol.n_orders):
                variants.append([judged.replay_early_stop(start) for judged in self.judged])
        else:
            return None
        return _as_arrays(Stopped, variants)

    @cached_property
    def weighted_votes(self):
        return WeightedVotes(self.judged) if self.can_vote else None


def _as_arrays(record, variants):
    """Lists of records, one list a variant -> one record whose fields are arrays (V, R)."""
    return record(*np.moveaxis(np.array(variants, dtype=float), -1, 0))


class WeightedVotes:
    """
    Votes weighted by the verdict's probability (C.10), and calibrated votes (deviation 9).

    Arrays are (R, S): rows and their samples.
    """

    def __init__(self, judged_rows):
        logps = np.array([_logps_of_row(judged) for judged in judged_rows])
        self.right, self.wrong = np.moveaxis(logps, -1, 0)  # log-probability of either verdict
        kinds = np.array([_kinds_of_row(judged) for judged in judged_rows])
        self.has_verdict = kinds != NONE
        self.sign = np.where(kinds == RIGHT, 1, -1)
        of_verdict = np.where(kinds == RIGHT, self.right, self.wrong)
        self.of_verdict = np.where(self.has_verdict, of_verdict, -math.inf)
        self.half = np.array([[_half_of(judged.row)] for judged in judged_rows])

    @property
    def possible(self):
        return bool((self.of_verdict > -math.inf).any())

    def by_confidence(self):
        known = self.of_verdict > -math.inf
        confidence = np.exp(self.of_verdict)
        weights = np.where(known, confidence, confidence[known].mean())
        return self._accuracy(self.sign * weights)

    def calibrated(self):
        """A vote is 2 sigmoid(log-odds / T) - 1."""
        temperature = np.where(self.half == 0, *self.temperatures)
        return self._accuracy(np.tanh(self._log_odds / temperature / 2))

    @cached_property
    def temperatures(self):
        """The T of rows in half 0 and half 1, each fitted on the other half."""
        fitted = []
        for half in (0, 1):
            elsewhere = self.has_verdict & (self.half != half)
            fitted.append(fit_temperature(self._log_odds[elsewhere]))
        return fitted

    @cached_property
    def _log_odds(self):
        """Of the right answer; 0 where neither log-probability is known."""
        known = np.maximum(self.right, self.wrong) > -math.inf
        with np.errstate(invalid="ignore"):
            log_odds = np.where(known, self.right - self.wrong, 0.0)
        return np.clip(log_odds, -MAX_LOG_ODDS, MAX_LOG_ODDS)

    def _accuracy(self, votes):
        """(1, R): a tie counts one half, a row without a verdict 0 (deviation 7)."""
        lead = np.where(self.has_verdict, votes, 0).sum(1).round(12)
        accuracy = (1 + np.sign(lead)) / 2
        return np.where(self.has_verdict.any(1), accuracy, 0)[None]


def _logps_of_row(judged):
    return [judged.logps_of_right_and_wrong(judgement) for judgement in judged.judgements]


def _kinds_of_row(judged):
    return [judged.kind_of(judgement) for judgement in judged.judgements]


def _half_of(row):
    """0 or 1; the rows of a set are in the same half."""
    return hashlib.sha256(row.set.encode()).digest()[0] % 2


# --- methods and their accuracies


def accuracy_by_method(tally):
    """{method: (V, R)}, the lines of a table."""
    first, second = tally.accuracy(0), tally.accuracy(1)
    samples = tally.samples
    methods = {"one sample": _over_places(tally, first, second)}
    if tally.protocol.orders != "chosen_first":
        methods["better answer first"] = first[None]
        methods["better answer second"] = second[None]
    if tally.protocol.n_orders == 2:
        methods["right in both orders"] = _in_both_orders(tally, first, second)[None]
    if tally.can_vote:
        for k in sorted({5, 15, samples}):
            if k <= samples:
                methods[f"voting@{k}"] = tally.chances(k).right
        methods[f"any@{samples}"] = tally.chances(samples).any
    if tally.early_stopping is not None:
        name = f"early stopping, at most {tally.protocol.samples}"
        methods[name] = tally.early_stopping.accuracy
    if tally.weighted_votes and tally.weighted_votes.possible:
        methods[f"confidence-weighted@{samples}"] = tally.weighted_votes.by_confidence()
        methods[f"calibrated@{samples}"] = tally.weighted_votes.calibrated()
    return methods | _trivial_methods(tally, first, second)


def _in_both_orders(tally, first, second):
    if any(any(judged.ties) for judged in tally.judged):
        return np.minimum(first, second)  # rewards are the same in both orders, and so are ties
    return first * second


def _over_places(tally, first, second):
    """Both places as two variants, or the one place in which each row was shown."""
    if tally.protocol.n_orders == 2:
        return np.stack([first, second])
    return np.where(np.isnan(first), second, first)[None]


def _trivial_methods(tally, first, second):
    says_1_first = np.where(np.isnan(first), math.nan, 1.0)  # right where the better one is first
    says_1_second = np.where(np.isnan(second), math.nan, 0.0)
    better = [len(row.responses[row.choice - 1]) for row in tally.rows]
    worse = [len(row.responses[2 - row.choice]) for row in tally.rows]
    longer = (1 + np.sign(np.subtract(better, worse))) / 2
    return {
        "always 1": _over_places(tally, says_1_first, says_1_second),
        "longer answer": longer[None],
        "shorter answer": 1 - longer[None],
        "coin": np.full((1, len(tally.rows)), 0.5),
    }


# --- columns of a table, with intervals


def bootstrap_weights(rows):
    """
    (W, R): how often each row counts. First once each; then as often as it is drawn, the rows of a
    set always together.
    """
    numbers = {}  # set: its number
    for row in rows:
        numbers.setdefault(row.set, len(numbers))
    sets = len(numbers)
    drawn = np.random.default_rng(0).multinomial(sets, [1 / sets] * sets, RESAMPLES)
    drawn_rows = drawn[:, [numbers[row.set] for row in rows]]
    return np.concatenate([np.ones((1, len(rows))), drawn_rows])


def percent(accuracy, weights):
    """(W,): the weighted mean of the rows, (R,), that are not NaN."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return 100 * (weights @ np.nan_to_num(accuracy)) / (weights @ ~np.isnan(accuracy))


def interval(values):
    """[value, low, high] at 95 %; values: (W,), the value itself first."""
    if np.isnan(values[0]):
        return [None, None, None]
    low, high = np.nanpercentile(values[1:], (2.5, 97.5))
    return [round(float(value), 3) for value in (values[0], low, high)]


def columns_of(accuracies, rows, weights, published):
    """
    {column: (W,) in percent} of a method: overall, and of each grouping the groups and their mean;
    the same of whole sets (Acc+), where rows are in sets. published: {grouping: {group: rows}}.
    """
    accuracy = accuracies.mean(0)
    columns = {"overall": percent(accuracy, weights)}
    has_sets = len({row.set for row in rows}) < len(rows)
    if has_sets:
        accuracy_of_sets = _accuracy_of_sets(accuracies, rows)
        columns["Acc+"] = percent(accuracy_of_sets, weights)
    for grouping in rows[0].groups:
        known = published.get(grouping, {})
        columns |= _group_columns(accuracy, rows, weights, grouping, known)
        if has_sets:
            of_sets = _group_columns(accuracy_of_sets, rows, weights, grouping, known)
            columns |= {f"Acc+ {name}": values for name, values in of_sets.items()}
    return columns


def _accuracy_of_sets(accuracies, rows):
    """(R,): the accuracy on a whole set at its first row, NaN at its other rows."""
    sets = defaultdict(list)
    for number, row in enumerate(rows):
        sets[row.set].append(number)
    accuracy = np.full(len(rows), math.nan)
    for numbers in sets.values():
        accuracy[numbers[0]] = accuracies[:, numbers].prod(1).mean()
    return accuracy


def _group_columns(accuracy, rows, weights, grouping, published):
    group_of_row = np.array([row.groups[grouping] for row in rows])
    others = sorted(set(group_of_row.tolist()) - set(published))
    groups = {}
    for name in (*published, *others):
        groups[name] = percent(np.where(group_of_row == name, accuracy, math.nan), weights)
    counting = []  # in the mean: what is published, if anything is (toxicity is not)
    for name, values in groups.items():
        if name in (published or groups) and not np.isnan(values[0]):
            counting.append(values)
    macro = np.mean(counting, 0) if counting else np.full(len(weights), math.nan)
    named = {f"{grouping}: {name}": values for name, values in groups.items()}
    return {f"{grouping}: macro": macro} | named


# --- results


@dataclass
class Scores:
    """What compare() takes of a run on a benchmark."""

    rows: list[BenchmarkRow]
    accuracies: dict  # of each method, (V, R)
    published: dict  # {grouping: {group: rows}}

    def columns(self, method, weights):
        return columns_of(self.accuracies[method], self.rows, weights, self.published)

    def accuracies_of(self, numbers):
        """Those of these rows alone."""
        return {method: values[:, numbers] for method, values in self.accuracies.items()}


def score_benchmark(rows, done, protocol, published):
    """
    (every number of a benchmark as in results.json, its Scores). Duels of equally good answers have
    no right verdict: they count in the ranking of their list alone (core/lists.py).
    """
    decided = [row for row in rows if row.is_decided]
    tally = Tally(decided, done, protocol)
    groups = {}
    first_of_set = {row.set: row for row in reversed(tally.rows)}
    for grouping in rows[0].groups:
        groups[grouping] = dict(Counter(row.groups[grouping] for row in tally.rows))
        in_sets = Counter(row.groups[grouping] for row in first_of_set.values())
        groups[f"Acc+ {grouping}"] = dict(in_sets)
    about = diagnostics(tally)
    if len(decided) < len(rows):
        about["duels of equally good answers"] = len(rows) - len(decided)
    result = {"about": about, "groups": groups, "lines": {}, "scaling": {}}
    if not tally.rows:
        return result, Scores([], {}, published)
    weights = bootstrap_weights(tally.rows)
    scores = Scores(tally.rows, accuracy_by_method(tally), published)
    for method in scores.accuracies:
        columns = scores.columns(method, weights)
        result["lines"][method] = {name: interval(values) for name, values in columns.items()}
    if tally.can_vote:
        result["scaling"] = _scaling(tally, weights)
    return result, scores


def _scaling(tally, weights):
    """Figure 3: {k: {"vote", "any": [percent, low, high], "any of a coin": percent}}."""
    scaling = {}
    for k in range(1, tally.samples + 1):
        of_k = tally.chances(k)
        scaling[k] = {
            "any of a coin": 100 * (1 - 0.5**k),
            "vote": interval(percent(of_k.right.mean(0), weights)),
            "any": interval(percent(of_k.any.mean(0), weights)),
        }
    return scaling


def diagnostics(tally):
    """What is printed below a table: {name: number}, shares in percent."""
    numbers = {"rows": len(tally.rows), "rows left out, not judged to the end": tally.missing}
    if not tally.rows:
        return numbers
    judgements = []
    flips = []
    for judged in tally.judged:
        judgements += judged.judgements
        first, second = judged.accuracy_of_verdicts(0), judged.accuracy_of_verdicts(1)
        if not math.isnan(first + second):
            flips.append(first * (1 - second) + second * (1 - first))
    kept = [tally.done[judgement.key] for judgement in judgements]
    verdicts = [judgement for judgement in judgements if judgement.choice is not None]
    numbers |= {
        "judgements": len(judgements),
        "says 1": _percent_of([judgement.choice == 1 for judgement in verdicts]),
        "flips with the order": _percent_of(flips),
        "no verdict": _percent_of([judgement.choice is None for judgement in judgements]),
        "no verdict if read strictly": _percent_of([one.choice is None for one in kept]),
        "no verdict if read leniently": _percent_of([one.lenient_choice is None for one in kept]),
        "equal rewards": _percent_of([one.is_tie for one in judgements]) or None,
        "truncated": _percent_of([judgement.finish == "length" for judgement in judgements]),
        "doubts itself": _percent_of([has_doubts(judgement.text) for judgement in judgements]),
        "tokens a judgement": round(float(np.mean([j.tokens for j in judgements])), 1),
        "verdicts without log-probability": sum(
            judgement.logp1 is None and judgement.logp2 is None for judgement in verdicts
        ),
    }
    return numbers | _scaling_diagnostics(tally, judgements)


def _scaling_diagnostics(tally, judgements):
    numbers = {}
    if tally.can_vote:
        tokens = sum(judgement.tokens for judgement in judgements)
        numbers["tied votes"] = _percent_of(tally.chances(tally.samples).tie.mean(0))
        numbers["tokens of all samples"] = round(tokens / len(tally.rows), 1)
    if tally.early_stopping is not None:
        stopped = tally.early_stopping
        numbers["early stopping: samples"] = round(float(stopped.samples.mean()), 3)
        numbers["early stopping: tokens"] = round(float(stopped.tokens.mean()), 3)
    if tally.weighted_votes and tally.weighted_votes.possible:
        temperatures = tally.weighted_votes.temperatures
        numbers["calibration T, of either half"] = [round(T, 3) for T in temperatures]
    return numbers


def has_doubts(text):
    return DOUBTS.search(text) is not None


def _percent_of(shares):
    return round(100 * float(np.mean(shares)), 2) if len(shares) else None


def compare(ours, theirs):
    """
    Paired bootstrap of two Scores on the rows that both have, by their content: their numbers may
    differ. {method: {"rows": n, column: [ours - theirs in points, low, high, p]}}.
    """
    their_numbers = numbers_by_content(theirs.rows)
    our_shared, their_shared = [], []
    for content, number in numbers_by_content(ours.rows).items():
        if content in their_numbers:
            our_shared.append(number)
            their_shared.append(their_numbers[content])
    if not our_shared:
        return {}
    rows = [ours.rows[number] for number in our_shared]
    ours = Scores(rows, ours.accuracies_of(our_shared), ours.published)
    theirs = Scores(rows, theirs.accuracies_of(their_shared), ours.published)
    weights = bootstrap_weights(rows)
    compared = {}
    for method in ours.accuracies:
        if method in TRIVIAL or method not in theirs.accuracies:
            continue
        our_columns = ours.columns(method, weights)
        their_columns = theirs.columns(method, weights)
        compared[method] = {"rows": len(rows)}
        for name in our_columns:
            gains = our_columns[name] - their_columns[name]
            compared[method][name] = [*interval(gains), _p_value(gains[1:])]
    return compared


def numbers_by_content(rows):
    """
    {(id, question, better and worse answer, which of the rows that are the same): place in the
    list}. Two versions of a file may list the rows and the answers of a row in another order.
    """
    seen = Counter()
    numbers = {}
    for number, row in enumerate(rows):
        better, worse = row.responses if row.choice == 1 else row.responses[::-1]
        content = (row.id, row.question, better, worse)
        numbers[(*content, seen[content])] = number
        seen[content] += 1
    return numbers


def _p_value(resampled_gains):
    """Two-sided: how often the gain is on the other side of 0."""
    below = float((resampled_gains <= 0).mean())
    above = float((resampled_gains >= 0).mean())
    return max(1 / RESAMPLES, min(1.0, 2 * min(below, above)))
