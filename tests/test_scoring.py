"""core/scoring.py: every score against a slow scorer, and the paper's whole-number results."""

import math
import random

import numpy as np
import pytest
from evaluation import (
    MM,
    RLHF,
    VL,
    JudgeByRule,
    always,
    greedy,
    judged,
    make_row,
    random_judge,
    says,
    score,
    toy_rows,
    value,
)

from core.judgements import Protocol
from core.judging import collect
from core.pairs import swap
from core.scoring import (
    TRIVIAL,
    Tally,
    accuracy_by_method,
    bootstrap_weights,
    columns_of,
    compare,
    diagnostics,
    interval,
    score_benchmark,
)
from sources import BENCHMARKS

SIX = Protocol("both", samples=6)
TWO = Protocol("both", samples=2)


def is_mean(percent, shares):
    return percent == pytest.approx(100 * np.mean(shares), abs=0.006)


class SlowScores:
    """The scores of some rows by definition; lists have an entry for each row."""

    def __init__(self, rows, done):
        self.first, self.second, self.both, self.flips, self.says_1 = [], [], [], [], []
        for row in rows:
            samples = [[done[(*row.key, order, i)].choice for i in range(3)] for order in (0, 1)]
            first, second = samples if row.choice == 1 else samples[::-1]
            self.first.append(np.mean([choice == 1 for choice in first]))
            self.second.append(np.mean([choice == 2 for choice in second]))
            pairs = [(a, b) for a in first for b in second]
            self.both.append(np.mean([(a, b) == (1, 2) for a, b in pairs]))
            verdicts = [(a == 1) != (b == 2) for a, b in pairs if a and b]
            if verdicts:
                self.flips.append(np.mean(verdicts))
            self.says_1 += [choice == 1 for choice in first + second if choice]
        self.hits = [(a + b) / 2 for a, b in zip(self.first, self.second)]

    def acc_plus(self, sets):
        shares = []
        for numbers in sets:
            first = np.prod([self.first[i] for i in numbers])
            second = np.prod([self.second[i] for i in numbers])
            shares.append((first + second) / 2)
        return shares


def test_every_score_equals_a_slow_scorers(toy, tmp_path):
    benches = toy_rows(toy, tmp_path, words=["--group", "family"])
    for bench, rows in benches.items():
        done = judged(rows, SIX, random_judge(bench))
        result, _ = score_benchmark(rows, done, SIX, {})
        slow = SlowScores(rows, done)
        assert is_mean(value(result, "one sample"), slow.hits)
        assert is_mean(value(result, "better answer first"), slow.first)
        assert is_mean(value(result, "better answer second"), slow.second)
        assert is_mean(value(result, "right in both orders"), slow.both)
        about = result["about"]
        assert is_mean(about["flips with the order"], slow.flips)
        assert is_mean(about["says 1"], slow.says_1)
        assert is_mean(about["no verdict"], [j.choice is None for j in done.values()])
        for grouping in rows[0].groups:
            means = []
            for group in sorted({row.groups[grouping] for row in rows}):
                hits = [h for h, r in zip(slow.hits, rows) if r.groups[grouping] == group]
                means.append(np.mean(hits))
                assert is_mean(value(result, "one sample", f"{grouping}: {group}"), hits)
            assert is_mean(value(result, "one sample", f"{grouping}: macro"), means)
        if bench == RLHF:
            ids = dict.fromkeys(row.id for row in rows)
            sets = [[i for i, row in enumerate(rows) if row.id == id] for id in ids]
            assert is_mean(value(result, "one sample", "Acc+"), slow.acc_plus(sets))
        else:
            assert "Acc+" not in result["lines"]["one sample"]


# --- the paper's numbers


def right_on(numbers):
    """A judge that is right on these rows, when the better answer is shown first."""
    return lambda row, order, sample: says(1 if row.row in numbers else 2)


def test_the_paper_row_of_table_3_comes_out_whole():
    """
    309/484 + 384/448 + 206/318 in the paper's groups, the better answer always first. Its macro,
    71.44, is the mean of the three after rounding.
    """
    groups = ["general"] * 484 + ["hallucination"] * 448 + ["reasoning"] * 318
    rows = []
    for number, group in enumerate(groups):
        rows.append(make_row(number, bench=VL, groups={"benchmark": "general", "paper": group}))
    right = {*range(309), *range(484, 484 + 384), *range(932, 932 + 206)}
    published = BENCHMARKS[VL].PUBLISHED
    result = score(rows, greedy("chosen_first"), right_on(right), published)
    columns = [f"paper: {group}" for group in ("general", "hallucination", "reasoning")]
    rounded = [round(value(result, "one sample", column), 2) for column in columns]
    assert value(result, "one sample") == 71.92
    assert rounded == [63.84, 85.71, 64.78] and round(sum(rounded) / 3, 2) == 71.44
    assert value(result, "one sample", "paper: macro") == 71.446


def test_the_paper_row_of_table_8_comes_out_whole():
    """34/42, 33/37, 28/34, 24/32, 18/25: Acc 137/170; no mistake in 25 of 46 ids: Acc+ 54.35."""
    rows, right = [], set()
    for group, n, ids, hits, broken_ids in (
        ("mcq", 42, 10, 34, 5),
        ("long", 37, 10, 33, 3),
        ("short", 34, 10, 28, 4),
        ("safety", 32, 6, 24, 4),
        ("video", 25, 10, 18, 5),
    ):
        numbers = range(len(rows), len(rows) + n)
        in_broken_ids = [number for number in numbers if (number - numbers[0]) % ids < broken_ids]
        right |= set(numbers) - set(in_broken_ids[: n - hits])
        for number in numbers:
            together = f"{group}-{(number - numbers[0]) % ids}"
            row = make_row(number, bench=RLHF, groups={"category": group}, together=together)
            rows.append(row)
    published = BENCHMARKS[RLHF].PUBLISHED
    result = score(rows, greedy("chosen_first"), right_on(right), published)
    columns = result["lines"]["one sample"]
    line = {name: round(numbers[0], 2) for name, numbers in columns.items()}
    assert line["overall"] == 80.59 and line["Acc+"] == 54.35
    by_group = [line[f"category: {group}"] for group in ("mcq", "long", "short", "safety", "video")]
    assert by_group == [80.95, 89.19, 82.35, 75.0, 72.0]
    _, low, high = columns["Acc+"]  # 1.96 standard errors of 25/46 on either side
    assert 54.35 - low == pytest.approx(14.4, abs=1.5)
    assert high - 54.35 == pytest.approx(14.4, abs=1.5)


def test_seven_columns_make_the_macro_of_multimodal_reward_bench():
    """Table 4's Overall is the mean of the seven; toxicity counts in the pooled number alone."""
    published = BENCHMARKS[MM].PUBLISHED
    rows, right = [], set()
    for c, group in enumerate([*published["columns"], "toxicity"]):
        for i in range(10):
            number = 10 * c + i
            rows.append(make_row(number, bench=MM, groups={"columns": group}))
            if i < c + 3:
                right.add(number)
    result = score(rows, greedy("dataset"), right_on(right), published)
    assert value(result, "one sample", "columns: macro") == 60
    assert value(result, "one sample") == 65


# --- judges that are biased, silent or trivial


@pytest.mark.parametrize("orders, accuracy", [("both", 50), ("chosen_first", 100)])
def test_a_judge_that_always_says_1(orders, accuracy, toy, tmp_path):
    """The released evaluator always shows the better answer first and gives it 100 %."""
    for rows in toy_rows(toy, tmp_path).values():
        result = score(rows, Protocol(orders, samples=2), always(1))
        assert value(result, "one sample") == value(result, "always 1") == accuracy
        flips = 100 if orders == "both" else None
        assert result["about"]["says 1"] == 100
        assert result["about"]["flips with the order"] == flips
        assert value(result, "coin") == value(result, "longer answer") == 50


@pytest.mark.parametrize(
    "text",
    [
        "I cannot tell.",
        "<answer>1/2</answer>",
        "<answer>12</answer>",
        "1",
        "<think>Response 1 is better",
        "",
    ],
)
def test_no_verdict_is_wrong_in_either_order(text):
    """The released scorers take what they cannot read for a 2, or leave it out."""
    rows = [make_row(0, choice=1), make_row(1, choice=2)]
    result = score(rows, TWO, lambda *_: {"text": text, "tokens": 4096, "finish": "length"})
    for method in ("one sample", "better answer first", "better answer second"):
        assert value(result, method) == 0
    assert result["about"]["no verdict"] == result["about"]["truncated"] == 100


def test_trivial_methods_on_a_biased_set():
    """The better answer is longer in three rows of four, as in 72 % of MM-RLHF's."""
    rows = []
    for i in range(16):
        choice = 1 + i % 2
        better_is_longer = i < 12
        responses = ["a longer answer", "short"]
        if better_is_longer != (choice == 1):
            responses.reverse()
        rows.append(make_row(i, choice, responses=responses))
    result = score(rows, greedy("dataset"), always(2))
    found = {method: value(result, method) for method in TRIVIAL}
    assert found == {"always 1": 50, "longer answer": 75, "shorter answer": 25, "coin": 50}
    assert value(result, "better answer first") == 0
    assert value(result, "better answer second") == 100


def test_rows_not_judged_to_the_end_are_left_out_and_counted():
    rows = [make_row(i) for i in range(10)]
    done = judged(rows[:7], TWO, always(1))
    del done["pairs", 3, 1, 0]
    about = score_benchmark(rows, done, TWO, {})[0]["about"]
    assert about["rows"] == 6 and about["rows left out, not judged to the end"] == 4


# --- weighted votes


def logps(p1):
    return {"logp1": math.log(p1), "logp2": math.log(1 - p1)}


def test_weighted_votes():
    """Two unsure right samples against a sure wrong one; and a tie goes to the surer side."""
    protocol = Protocol("dataset", samples=4)
    rows = [make_row(i) for i in range(40)]
    samples = [
        says(1, **logps(0.55)),
        says(1, **logps(0.55)),
        says(2, **logps(0.01)),
        says(2, **logps(0.3)),
    ]
    done = judged(rows, protocol, lambda row, order, sample: samples[sample])
    tally = Tally(rows, done, protocol)
    methods = accuracy_by_method(tally)
    assert methods["voting@4"].mean() == 0.5 and diagnostics(tally)["tied votes"] == 100
    assert methods["confidence-weighted@4"].mean() == 0
    samples[3] = says(1, logp1=math.log(0.6), logp2=None)  # 2 was too unlikely to be listed
    done = judged(rows, protocol, lambda row, order, sample: samples[sample])
    methods = accuracy_by_method(Tally(rows, done, protocol))
    assert methods["confidence-weighted@4"].mean() == 1


def test_absent_log_probabilities_are_counted():
    protocol = Protocol("both", samples=4)
    rows = [make_row(i) for i in range(4)]
    result = score(rows, protocol, always(1))
    assert result["about"]["verdicts without log-probability"] == 16
    assert "confidence-weighted@4" not in result["lines"]

    def half_of_them(row, order, sample):
        return says(1, logp1=-0.1, logp2=-3.0) if sample else says(1)

    result = score(rows, protocol, half_of_them)
    assert result["about"]["verdicts without log-probability"] == 8
    assert "confidence-weighted@4" in result["lines"]


# --- intervals and comparisons


@pytest.mark.parametrize("rows_a_set", [1, 3])
def test_the_interval_of_a_share(rows_a_set):
    """1.96 standard errors; three equal rows drawn together widen it by the root of three."""
    rows = [make_row(i, together=str(i // rows_a_set)) for i in range(600)]
    weights = bootstrap_weights(rows)
    right = np.array([[float(i // 3 % 10 < 7) for i in range(600)]])
    percent, low, high = interval(columns_of(right, rows, weights, {})["overall"])
    error = math.sqrt(0.7 * 0.3 / 600 * rows_a_set)
    assert percent == 70 and (high - low) / 2 == pytest.approx(196 * error, rel=0.1)


def test_whole_sets_are_scored_in_each_group():
    """Two sets of mcq, one of them all right; one of video, all right."""
    rows = []
    for number, name in enumerate(["mcq"] * 4 + ["video"] * 2):
        group = {"category": name}
        rows.append(make_row(number, groups=group, together=str(number // 2)))
    weights = bootstrap_weights(rows)
    columns = columns_of(np.array([[1.0, 1, 1, 0, 1, 1]]), rows, weights, {})
    found = {name: values[0] for name, values in columns.items() if name.startswith("Acc+ ")}
    of_groups = {"Acc+ category: mcq": 50, "Acc+ category: video": 100}
    assert found == {"Acc+ category: macro": 75} | of_groups
    result = score(rows, greedy("dataset"), always(1))
    assert result["groups"]["Acc+ category"] == {"mcq": 2, "video": 1}


def test_compared_runs_share_their_noise():
    rows = [make_row(i) for i in range(300)]

    def scores_of(p):
        done = judged(rows, TWO, random_judge(1, p))
        return score_benchmark(rows, done, TWO, {})[1]

    worse, better = scores_of(0.6), scores_of(0.7)
    same = compare(worse, worse)["one sample"]
    assert same["rows"] == 300 and same["overall"] == [0, 0, 0, 1.0]
    gain, low, high, p = compare(better, worse)["one sample"]["overall"]
    assert gain == pytest.approx(10, abs=4) and 0 < low < high and p <= 0.01


def test_runs_of_two_versions_of_a_file_are_compared_by_content():
    """Of the other file a row is gone, so numbers differ, and answers are listed the other way."""
    rows = [make_row(i, responses=(f"good {i}", "bad")) for i in range(30)]
    theirs = []
    for number, row in enumerate(rows[1:]):
        swapped = swap(row)
        swapped.row, swapped.set = number, str(number)
        theirs.append(swapped)
    theirs[3].question = "Another one?"
    ours = scores_of(rows, always_better)
    compared = compare(ours, scores_of(theirs, always(1)))
    assert compared["one sample"]["rows"] == 28
    assert compared["one sample"]["overall"][0] == 50
    assert compare(ours, ours)["one sample"]["rows"] == 30


def always_better(row, order, sample):
    return says(row.choice if order == 0 else 3 - row.choice)


def scores_of(rows, rule):
    return score_benchmark(rows, judged(rows, TWO, rule), TWO, {})[1]


def test_the_scaling_curve_begins_at_one_sample_and_a_coin_is_any():
    rows = [make_row(i) for i in range(50)]
    result = score(rows, Protocol("both", samples=8), random_judge(2))
    first, last = result["scaling"][1], result["scaling"][8]
    assert first["vote"][0] == first["any"][0] == value(result, "one sample")
    assert last["vote"][0] == value(result, "voting@8")
    assert last["any of a coin"] == pytest.approx(99.61, abs=0.01)


# --- early stopping


@pytest.mark.parametrize("orders", ["both", "dataset"])
def test_early_stopping_draws_what_the_replay_of_all_samples_would(orders):
    """No sample more than the rule needs, and the same answers as from a file with all 16."""
    rows = [make_row(i, 1 + i % 2) for i in range(200)]
    every = Protocol(orders, samples=16)
    early = Protocol(orders, samples=16, early_stop=True)
    full, drawn = judged(rows, every, random_judge(3)), judged(rows, early, random_judge(3))
    assert drawn.items() <= full.items() and len(drawn) < len(full) / 2
    costs = []
    for row in rows:
        sequence = every.judgements_so_far(row, full)
        cost = 1
        while early.outcome(sequence[:cost]) is None:
            cost += 1
        costs.append(cost)
        assert len(early.judgements_so_far(row, drawn)) == cost
    assert sum(costs) == len(drawn)

    result, _ = score_benchmark(rows, drawn, early, {})
    replayed, _ = score_benchmark(rows, full, every, {})
    about = result["about"]
    assert about["early stopping: samples"] == pytest.approx(np.mean(costs), abs=0.001)
    assert about["early stopping: tokens"] == pytest.approx(10 * np.mean(costs), abs=0.01)
    expected = replayed["about"]["early stopping: samples"]
    assert expected == pytest.approx(np.mean(costs), rel=0.12)
    method = "early stopping, at most 16"
    assert value(replayed, method) == pytest.approx(value(result, method), abs=6)
    assert replayed["about"]["tokens of all samples"] == 160


def test_early_stopping_continues_after_a_kill_without_asking_twice():
    """A kill may leave a row's first order without its second: only what is missing is asked."""
    rows = [make_row(i, 1 + i % 2) for i in range(60)]
    early = Protocol("both", samples=16, early_stop=True)
    drawn = judged(rows, early, random_judge(3))
    kept = {key: drawn[key] for key in drawn if random.Random(str(key[1:3])).random() < 0.7}
    asked = []

    def rule(row, order, sample):
        asked.append((*row.key, order, sample))
        return random_judge(3)(row, order, sample)

    done = dict(kept)
    collect(rows, JudgeByRule(rule), done, early)
    assert done == drawn and sorted(asked) == sorted(drawn.keys() - kept.keys())
