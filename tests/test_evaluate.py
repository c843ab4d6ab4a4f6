"""
evaluate.py: the readers on files in the benchmarks' own schemas, every score against a slow scorer, voting and early stopping
against brute force, the paper's whole-number results, the file of judgements under kill -9, and each backend run for real: vLLM,
an HTTP server with faults, reward heads, rewards from a file, two ranks, a browser.

$ python -m pytest tests/test_evaluate.py
"""
import asyncio
import contextlib
import doctest
import http.server
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import evaluate as ev
from annotate import Unusable, messages, write_pairs
from stable_reinforce import parse
from toy import server, sources

ENV = os.environ | {"OMP_NUM_THREADS": "1"}
VL, MM, RLHF = "VL-RewardBench", "Multimodal-RewardBench", "MM-RLHF-RewardBench"
FILES = {VL: "VL-RewardBench/data/test-00000-of-00001.parquet", MM: "Multimodal-RewardBench/data/all_data.json",
         RLHF: "MM-RLHF-RewardBench/mm_reward_bench.jsonl", "pairs": "pairs.jsonl"}


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """The toy world's files, small; the folder of its test sets."""
    out = tmp_path_factory.mktemp("toy") / "data"
    sources.main(["--out", str(out), "--scale", "0.1"])
    return out / "test"


def flags(toy, *words, benches=(VL, MM, RLHF, "pairs")):
    return ["--bench", *(f"{name}={toy / FILES[name]}" for name in benches), *map(str, words)]


def args_of(*words):
    return ev.check_args(ev.parser().parse_args([*map(str, words), *([] if "--out" in words else ["--out", os.devnull])]))


def row(i, choice=1, group="a", together=None, responses=("x", "yy"), bench="pairs"):
    return {"bench": bench, "row": i, "id": f"id-{i}", "question": "Q?", "images": [], "video": None, "responses": list(responses),
            "choice": choice, "groups": {"source": group} if isinstance(group, str) else group, "set": together or str(i)}


def says(choice, **more):
    return ev.output_of(f"<think>because</think><answer>{choice}</answer>" if choice else "I cannot tell.", 10) | more


def judged(rows, args, rule):
    """All judgements of a judge that is a function (row, order, sample) -> output."""
    done = {}
    ev.collect(rows, lambda jobs: ((j, [rule(j.row, j.order, j.first + i) for i in range(j.count)]) for j in iter_jobs(jobs)), done, args)
    return done


def iter_jobs(jobs):
    while jobs:
        yield jobs.popleft()


def overall(result, line, column="overall"):
    return result["lines"][line][column][0]


# ---------------------------------------------------------------------------------------------------
# Benchmarks


def test_the_examples_in_evaluate_are_true():
    assert doctest.testmod(ev).failed == 0


def test_every_benchmark_is_read_with_its_labels(toy, tmp_path):
    """Against the toy world's key: the right answer of each row, whatever file it comes from."""
    args = args_of(*flags(toy, "--out", tmp_path))
    benches = ev.read_rows(args)
    assert {b: len(rows) for b, rows in benches.items()} == {VL: 70, MM: 60, RLHF: 30, "pairs": 120}
    right = {}
    for line in (toy.parent / "key.jsonl").read_text().splitlines():
        item = json.loads(line)
        right.setdefault((item["source"], item["key"]), item["answers"][item["right"]])
    from toy.world import key_of
    for bench, rows in benches.items():
        for r in rows:
            files = [Path(p).read_bytes() for p in r["images"] + (r["video"] or [])]
            assert r["responses"][r["choice"] - 1] == right[bench, key_of(r["question"], files)], (bench, r["row"])


def test_both_files_of_vl_reward_bench_hold_the_same(toy, tmp_path):
    hub = list(ev.bench_rows(VL, toy / FILES[VL], tmp_path, "source"))
    released = list(ev.bench_rows(VL, toy / "VL-RewardBench" / "data.jsonl", tmp_path, "source"))
    better = lambda r: (r["id"], r["question"], r["responses"][r["choice"] - 1], r["responses"][2 - r["choice"]], r["groups"],
                        Path(r["images"][0]).read_bytes())
    assert [better(r) for r in hub] == [better(r) for r in released]
    assert Counter(r["choice"] for r in hub) == {1: 35, 2: 35} and Counter(r["choice"] for r in released) == {1: 70}


@pytest.mark.parametrize("bench", [VL, MM, RLHF])
def test_a_benchmarks_folder_is_as_good_as_its_file(bench, toy, tmp_path):
    rows = [ev.read_rows(args_of("--bench", f"{bench}={toy / path}", "--out", tmp_path)) for path in (bench, FILES[bench])]
    assert rows[0] == rows[1]


def test_the_groups_of_vl_reward_bench_in_any_case():
    """The released rule misses RLAIF-V and RLHF-V because it looks for small letters: 301 rows fall among "general"."""
    ids = ["hallucination_pair-1"] * 448 + ["RLAIF-V-1"] * 233 + ["RLHF-V-1"] * 68 + ["mathverse_1"] * 167 + ["mmmu_pro_test_Chemistry_1"] * 151 \
        + ["wildvision-battle-1"] * 173 + ["jailbreak-1"] * 7 + ["svit-conversation-1", "politics-1", "LRVInstruction-1"]
    assert Counter(map(ev.vl_group, ids)) == ev.PUBLISHED[VL]["benchmark"]
    assert Counter(ev.vl_group(i, any_case=False) for i in ids) == ev.PUBLISHED[VL]["paper"]


def test_the_columns_of_multimodal_reward_bench():
    r = {"Text": "Q", "Image": "", "Output1": "a", "Output2": "b", "Better": "Output2"}
    column = lambda id, category: ev.multimodal_reward_bench(r | {"ID": id, "Category": category})[-1]["columns"]
    assert [column("mathvista_3", "reasoning"), column("EMMA-Coding_1", "reasoning"), column("PAIRS_1", "safety"), column("hateful_1", "safety"),
            column("nocaps_1", "open_generation/preference_task")] == ["math", "coding", "safety", "toxicity", "preference"]
    assert ev.multimodal_reward_bench(r | {"ID": "a", "Category": "vqa"})[3] == 2


def test_rows_with_the_same_id_are_both_judged(toy, tmp_path):
    """The released resume skips the second row of an id: 25 of VL-RewardBench's ids occur twice, MM-RLHF-RewardBench has 46 for 170 rows."""
    benches = ev.read_rows(args_of(*flags(toy, "--out", tmp_path)))
    assert len({r["id"] for r in benches[VL]}) < 70 and len({r["id"] for r in benches[RLHF]}) < 30
    args = args_of("--samples", 2)
    rows = benches[VL] + benches[RLHF]
    assert len(judged(rows, args, lambda *at: says(1))) == 2 * 100


def test_frames_are_in_the_order_of_their_numbers(tmp_path):
    """The released code shows them in the directory's order."""
    for n in (10, 9, 2, 1):
        (tmp_path / "clip").mkdir(exist_ok=True)
        (tmp_path / "clip" / f"frame_{n}.png").write_bytes(b"")
    assert [Path(p).stem for p in ev.media(tmp_path, tmp_path, video="clip")["video"]] == ["frame_1", "frame_2", "frame_9", "frame_10"]


@pytest.mark.parametrize("bench, change, says_so", [
    (VL, {"human_ranking": [1, 1]}, "(1, 1)"), (VL, {"query": None}, "'question' is null"), (VL, {"response": ["one"]}, "two strings"),
    (MM, {"Better": "tie"}, "tie"), (MM, {"Category": "art"}, "art"), (MM, {"Text": ...}, "'Text'"), (MM, {"Image": "no.png"}, "1 of 1 images are missing"),
    (RLHF, {"image": "nowhere/1.png"}, "list index"), (RLHF, {"prompt": ...}, "'prompt'"), (RLHF, {"image": ..., "video": "video/none"}, "missing"),
])
def test_a_broken_row_is_told_with_its_place(bench, change, says_so, tmp_path):
    good = {VL: {"id": "svit-1", "query": "Q", "response": ["a", "b"], "human_ranking": [0, 1], "image": ""},
            MM: {"ID": "vqa_1", "Text": "Q", "Image": "", "Output1": "a", "Output2": "b", "Better": "Output1", "Category": "vqa"},
            RLHF: {"id": "1", "image": "mcq/1.png", "prompt": "Q", "chosen": "a", "rejected": "b"}}[bench]
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({k: v for k, v in (good | change).items() if v is not ...}) + "\n")
    with pytest.raises(Unusable) as problem:
        ev.read_rows(args_of("--bench", f"{bench}={path}", "--out", tmp_path))
    assert str(path) in str(problem.value) and says_so in str(problem.value)


def test_the_data_check_sees_answers_of_other_questions(toy, tmp_path):
    """Its own script joins Multimodal RewardBench's prompts by row number; the data sets behind it have changed since."""
    rng, rows = random.Random(0), []
    for i in range(120):
        word = rng.choice(["mountain", "computer", "festival", "elephant", "building", "sandwich"])
        rows.append(row(i, bench=MM, group={"columns": "correctness"}, responses=(f"It shows one {word} there", f"There are two {word}"))
                    | {"id": f"visitbench_{i}", "question": f"What about this {word} then?"})
    assert not any("WARNING" in note for note in ev.check_data(MM, rows))
    moved = [r | {"question": rows[(i + 7) % 120]["question"]} for i, r in enumerate(rows)]
    assert any("WARNING: the visitbench questions" in note for note in ev.check_data(MM, moved))
    benches = ev.read_rows(args_of(*flags(toy, "--out", tmp_path)))
    notes = "\n".join(ev.check_data(VL, benches[VL]))
    assert "benchmark: general 16, hallucination 38, reasoning 16" in notes and "the published file has general 183" in notes
    assert any("the better answer always stands first" in note for note in ev.check_data(RLHF, benches[RLHF]))


def test_an_empty_answer_of_a_benchmark_is_kept_and_counted():
    rows = [row(0, responses=("", "b")), row(1)]
    assert "note: 1 rows have an empty answer" in ev.check_data("pairs", rows)


# ---------------------------------------------------------------------------------------------------
# Test-time scaling against brute force


def subsets(samples, k):
    return list(itertools.combinations(range(len(samples)), k))


def some_counts(n):
    return [(r, w, n - r - w) for r in range(n + 1) for w in range(n + 1 - r)]


@pytest.mark.parametrize("n", [1, 2, 5, 7, 10])
def test_vote_and_any_equal_all_subsets(n):
    for right, wrong, none in some_counts(n) if n < 8 else [(6, 3, 1), (5, 5, 0), (2, 7, 1), (0, 0, 10)]:
        samples = [1] * right + [-1] * wrong + [0] * none
        for k in range(1, n + 1):
            every = [[samples[i] for i in s] for s in subsets(samples, k)]
            scores = [0.0 if not any(s) else 0.5 if sum(s) == 0 else float(sum(s) > 0) for s in every]
            ties = [any(s) and sum(s) == 0 for s in every]
            assert ev.chances(((right, wrong, none),), (k,)) == pytest.approx((np.mean(scores), np.mean(ties), np.mean([1 in s for s in every])), abs=1e-12)


def test_vote_and_any_with_half_of_the_samples_in_each_order():
    rng = random.Random(1)
    for _ in range(30):
        sides = [[rng.choice([1, 1, -1, 0]) for _ in range(4)] for _ in range(2)]
        counts = tuple((s.count(1), s.count(-1), s.count(0)) for s in sides)
        for k in range(1, 9):
            for ks in ev.shares(2, k):
                every = [[sides[0][i] for i in a] + [sides[1][i] for i in b] for a in subsets(sides[0], ks[0]) for b in subsets(sides[1], ks[1])]
                scores = [0.0 if not any(s) else 0.5 if sum(s) == 0 else float(sum(s) > 0) for s in every]
                ties = [any(s) and sum(s) == 0 for s in every]
                assert ev.chances(counts, ks) == pytest.approx((np.mean(scores), np.mean(ties), np.mean([1 in s for s in every])), abs=1e-12)


@pytest.mark.parametrize("sides", [1, 2])
def test_early_stopping_equals_every_sequence(sides):
    rng = random.Random(sides)
    for _ in range(12):
        samples = [[rng.choice([1, 1, 2, 2, None]) for _ in range(6 // sides)] for _ in range(sides)]
        counts = tuple((s.count(1), s.count(2), s.count(None)) for s in samples)
        for start in range(sides):
            scores, used = [], []
            for orders in itertools.product(*map(itertools.permutations, samples)):
                sequence = [orders[(start + t) % sides][t // sides] for t in range(6)]
                n = next(n for n in range(1, 7) if ev.stopped(sequence[:n], 6) is not False)
                answer = ev.stopped(sequence[:n], 6)
                scores.append(0.5 if answer == 1.5 else float(answer == 1))
                drawn = [[sequence[t] for t in range(n) if (start + t) % sides == side] for side in range(sides)]
                used.append([[d.count(1), d.count(2), d.count(None)] for d in drawn])
            accuracy, expected = ev.early_stop(counts, start)
            assert accuracy == pytest.approx(np.mean(scores)) and np.allclose(expected, np.mean(used, 0))


@pytest.mark.parametrize("p, cost", [(0.5, 6.74), (0.6, 6.43), (0.7, 5.61), (0.8, 4.61), (0.9, 3.70), (1.0, 3.0)])
def test_early_stopping_costs_so_many_of_16_samples(p, cost):
    """Of independent samples; so three in a row save at least 58 %, whatever the model: the paper's 35 % is no count of samples."""
    many = 10**9
    right = round(p * many)
    assert sum(ev.early_stop(((right, many - right, 0),), limit=16)[1][0]) == pytest.approx(cost, abs=0.005)


def test_the_temperature_is_found():
    rng = np.random.default_rng(0)
    z = rng.normal(0, 6, 40000)
    right = rng.random(40000) < 1 / (1 + np.exp(-z / 2.5))  # z are the log-odds of an overconfident judge
    assert ev.fit_temperature(np.where(right, z, -z)) == pytest.approx(2.5, rel=0.06)


def test_weighted_votes():
    """Two unsure right ones against one sure wrong one: the majority is right, the weights are not; and a tie goes to the surer."""
    logs = lambda p1: {"logp1": math.log(p1), "logp2": math.log(1 - p1)}
    rows = [row(i) for i in range(40)]
    said = [says(1, **logs(0.55)), says(1, **logs(0.55)), says(2, **logs(0.01)), says(2, **logs(0.3))]
    args = args_of("--samples", 4, "--orders", "dataset")
    tally = ev.Tally(rows, judged(rows, args, lambda r, order, sample: said[sample]), args)
    found = ev.lines(tally, args)
    assert found["voting@4"].mean() == 0.5 and found["confidence-weighted@4"].mean() == 0 and ev.about(tally)["tied votes"] == 100
    said[3] = says(1, logp1=math.log(0.6), logp2=None)  # the other digit was not among the log-probabilities: as good as impossible
    tally = ev.Tally(rows, judged(rows, args, lambda r, order, sample: said[sample]), args)
    assert ev.lines(tally, args)["confidence-weighted@4"].mean() == 1


def test_absent_log_probabilities_are_counted():
    rows, args = [row(i) for i in range(4)], args_of("--samples", 4)
    none = ev.Tally(rows, judged(rows, args, lambda *at: says(1)), args)
    assert ev.about(none)["verdicts without log-probability"] == 16 and "confidence-weighted@4" not in ev.lines(none, args)
    some = ev.Tally(rows, judged(rows, args, lambda r, order, sample: says(1, **({"logp1": -0.1, "logp2": -3.0} if sample else {}))), args)
    assert ev.about(some)["verdicts without log-probability"] == 8 and "confidence-weighted@4" in ev.lines(some, args)


# ---------------------------------------------------------------------------------------------------
# Scores


def random_judge(seed, p=0.65):
    def rule(r, order, sample):
        rng = random.Random(f"{seed} {r['bench']} {r['row']} {order} {sample}")
        better = 3 - r["choice"] if order else r["choice"]
        return says(rng.choices([better, 3 - better, None], [p, 0.95 - p, 0.05])[0], logp1=-rng.random(), logp2=-3 * rng.random())
    return rule


def test_every_score_equals_a_slow_scorers(toy, tmp_path):
    args = args_of("--samples", 6)
    for bench, rows in ev.read_rows(args_of(*flags(toy, "--out", tmp_path, "--group", "family"))).items():
        done = judged(rows, args, random_judge(bench))
        result, _ = ev.evaluate(bench, rows, done, args)
        hits, firsts, seconds, both, flips, ones = [], [], [], [], [], []
        for r in rows:
            shown = {o: [done[bench, r["row"], o, s] for s in range(3)] for o in (0, 1)}
            first = [j for o in (0, 1) for j in shown[o] if (o == 0) == (r["choice"] == 1)]
            second = [j for o in (0, 1) for j in shown[o] if (o == 0) != (r["choice"] == 1)]
            firsts.append(np.mean([j["choice"] == 1 for j in first]))
            seconds.append(np.mean([j["choice"] == 2 for j in second]))
            hits.append((firsts[-1] + seconds[-1]) / 2)
            both.append(np.mean([a["choice"] == 1 and b["choice"] == 2 for a in first for b in second]))
            verdicts = [(a["choice"] == 1) != (b["choice"] == 2) for a in first for b in second if a["choice"] and b["choice"]]
            flips += [np.mean(verdicts)] if verdicts else []
            ones += [j["choice"] == 1 for j in first + second if j["choice"]]
        near = lambda a, b: a == pytest.approx(100 * np.mean(b), abs=0.006)
        assert near(overall(result, "one sample"), hits) and near(overall(result, "better answer first"), firsts)
        assert near(overall(result, "better answer second"), seconds) and near(overall(result, "right in both orders"), both)
        assert near(result["about"]["flips with the order"], flips) and near(result["about"]["says 1"], ones)
        assert near(result["about"]["no verdict"], [j["choice"] is None for j in done.values()])
        for grouping in rows[0]["groups"]:
            names = sorted({r["groups"][grouping] for r in rows})
            means = [np.mean([h for h, r in zip(hits, rows) if r["groups"][grouping] == g]) for g in names]
            assert near(overall(result, "one sample", f"{grouping}: macro"), means)
            for g, m in zip(names, means):
                assert near(overall(result, "one sample", f"{grouping}: {g}"), m)
        if bench == RLHF:
            sets = [[i for i, r in enumerate(rows) if r["id"] == id] for id in dict.fromkeys(r["id"] for r in rows)]
            plus = [np.mean([np.prod([side[i] for i in its]) for side in (firsts, seconds)]) for its in sets]
            assert near(overall(result, "one sample", "Acc+"), plus)
        else:
            assert "Acc+" not in result["lines"]["one sample"]


def test_the_paper_row_of_table_3_comes_out_whole():
    """309/484 + 384/448 + 206/318 in the paper's groups, the better answer always first; its macro, 71.44, is the mean of the rounded three."""
    rows = [row(i, bench=VL, group={"benchmark": "general", "paper": g}) for i, g in
            enumerate(["general"] * 484 + ["hallucination"] * 448 + ["reasoning"] * 318)]
    right = {i for start, n in ((0, 309), (484, 384), (932, 206)) for i in range(start, start + n)}
    args = args_of("--samples", 1, "--orders", "chosen_first", "--temperature", 0)
    result, _ = ev.evaluate(VL, rows, judged(rows, args, lambda r, *_: says(1 if r["row"] in right else 2)), args)
    groups = [round(overall(result, "one sample", f"paper: {g}"), 2) for g in ("general", "hallucination", "reasoning")]
    assert overall(result, "one sample") == 71.92 and groups == [63.84, 85.71, 64.78] and round(sum(groups) / 3, 2) == 71.44
    assert overall(result, "one sample", "paper: macro") == 71.446


def test_the_paper_row_of_table_8_comes_out_whole():
    """34/42, 33/37, 28/34, 24/32, 18/25: Acc 137/170; all rows right in 25 of 46 ids: Acc+ 54.35."""
    rows, right = [], set()
    for group, n, ids, hits, broken in (("mcq", 42, 10, 34, 5), ("long", 37, 10, 33, 3), ("short", 34, 10, 28, 4), ("safety", 32, 6, 24, 4), ("video", 25, 10, 18, 5)):
        its = [row(len(rows) + i, bench=RLHF, group={"category": group}, together=f"{group}-{i % ids}") for i in range(n)]
        miss = sorted((r for r in its if int(r["set"].split("-")[1]) < broken), key=lambda r: r["row"])[:n - hits]
        assert len(miss) == n - hits and len({r["set"] for r in miss}) == broken
        right |= {r["row"] for r in its} - {r["row"] for r in miss}
        rows += its
    args = args_of("--samples", 1, "--orders", "chosen_first", "--temperature", 0)
    result, _ = ev.evaluate(RLHF, rows, judged(rows, args, lambda r, *_: says(1 if r["row"] in right else 2)), args)
    line = {c: round(v[0], 2) for c, v in result["lines"]["one sample"].items()}
    assert line["overall"] == 80.59 and line["Acc+"] == 54.35  # 137/170, 25/46
    assert [line[f"category: {g}"] for g in ("mcq", "long", "short", "safety", "video")] == [80.95, 89.19, 82.35, 75.0, 72.0]
    low, high = result["lines"]["one sample"]["Acc+"][1:]
    assert 54.35 - low == pytest.approx(14.4, abs=1.5) and high - 54.35 == pytest.approx(14.4, abs=1.5)  # 1.96 standard errors of 25/46


def test_seven_columns_make_the_macro_of_multimodal_reward_bench():
    """Table 4's Overall is the mean of the seven columns; toxicity, which is none of them, counts in the pooled number alone."""
    columns = [*ev.PUBLISHED[MM]["columns"], "toxicity"]
    rows = [row(10 * c + i, bench=MM, group={"columns": g}) for c, g in enumerate(columns) for i in range(10)]
    args = args_of("--samples", 1, "--orders", "dataset", "--temperature", 0)
    result, _ = ev.evaluate(MM, rows, judged(rows, args, lambda r, *_: says(1 + (r["row"] % 10 >= r["row"] // 10 + 3))), args)
    assert overall(result, "one sample", "columns: macro") == 60 and overall(result, "one sample") == 65


@pytest.mark.parametrize("orders, accuracy, warns", [("both", 50, False), ("chosen_first", 100, True)])
def test_a_judge_that_always_says_1(orders, accuracy, warns, toy, tmp_path):
    """The released evaluator always shows the better answer first and gives it 100 %."""
    args = args_of("--orders", orders, "--samples", 2)
    benches = ev.read_rows(args_of(*flags(toy, "--out", tmp_path)))
    results = {"args": vars(args), "benches": {}}
    for bench, rows in benches.items():
        results["benches"][bench], _ = ev.evaluate(bench, rows, judged(rows, args, lambda *at: says(1)), args)
        for line in ("one sample", "always 1"):
            assert overall(results["benches"][bench], line) == accuracy
        assert results["benches"][bench]["about"]["says 1"] == 100
        assert results["benches"][bench]["about"]["flips with the order"] == (100 if orders == "both" else None)
        assert overall(results["benches"][bench], "coin") == overall(results["benches"][bench], "longer answer") == 50  # twins
    text = ev.table(results)
    assert ("WARNING: the better answer is always shown first" in text) == warns and f"orders: {orders}" in text


@pytest.mark.parametrize("text", ["I cannot tell.", "<answer>1/2</answer>", "<answer>12</answer>", "1", "<think>Response 1 is better", ""])
def test_no_verdict_is_wrong_in_either_order(text):
    """The released scorers take what they cannot read for a 2, or leave it out of the denominator."""
    rows, args = [row(0, 1), row(1, 2)], args_of("--samples", 2)
    result, _ = ev.evaluate("pairs", rows, judged(rows, args, lambda *at: ev.output_of(text, 4096, "length")), args)
    assert overall(result, "one sample") == overall(result, "better answer first") == overall(result, "better answer second") == 0
    assert result["about"]["no verdict"] == result["about"]["truncated"] == 100


def test_trivial_rows_of_a_biased_set():
    """Chosen longer in three rows of four, as in 72 % of MM-RLHF's: the line beside every table says so."""
    rows = [row(i, 1 + i % 2, responses=("a longer answer", "short") if (i < 12) == (i % 2 == 0) else ("short", "a longer answer")) for i in range(16)]
    args = args_of("--samples", 1, "--orders", "dataset")
    result, _ = ev.evaluate("pairs", rows, judged(rows, args, lambda *at: says(2)), args)
    assert {name: overall(result, name) for name in ev.TRIVIAL} == {"always 1": 50, "longer answer": 75, "shorter answer": 25, "coin": 50}
    assert overall(result, "better answer first") == 0 and overall(result, "better answer second") == 100


def test_the_interval_of_a_share():
    """1.96 standard errors; rows of a set are drawn together, so three alike rows a set widen it by the root of three."""
    weights = {k: ev.resamples([row(i, together=str(i // k)) for i in range(600)]) for k in (1, 3)}
    right = np.array([[float(i // 3 % 10 < 7) for i in range(600)]])
    for k, error in ((1, 1.96 * math.sqrt(0.7 * 0.3 / 600)), (3, 1.96 * math.sqrt(0.7 * 0.3 / 200))):
        value, low, high = ev.interval(ev.scored(right, [row(i, together=f"{i}") for i in range(600)], weights[k])["overall"])
        assert value == 70 and (high - low) / 2 == pytest.approx(100 * error, rel=0.1)


def test_compared_runs_share_their_noise():
    rows, args = [row(i) for i in range(300)], args_of("--samples", 2)
    values = {p: ev.evaluate("pairs", rows, judged(rows, args, random_judge(1, p)), args)[1] for p in (0.6, 0.7)}
    same = ev.compare(values[0.6], values[0.6])["one sample"]
    assert same["rows"] == 300 and same["overall"] == [0, 0, 0, 1.0]
    better = ev.compare(values[0.7], values[0.6])["one sample"]["overall"]
    assert better[0] == pytest.approx(10, abs=4) and 0 < better[1] < better[2] and better[3] <= 0.01


def test_the_scaling_curve_starts_at_one_sample_and_a_coin_is_any(toy, tmp_path):
    rows, args = [row(i) for i in range(50)], args_of("--samples", 8)
    result, _ = ev.evaluate("pairs", rows, judged(rows, args, random_judge(2)), args)
    assert result["scaling"][1]["vote"][0] == result["scaling"][1]["any"][0] == overall(result, "one sample")
    assert result["scaling"][8]["vote"][0] == overall(result, "voting@8") and result["scaling"][8]["any of a coin"] == pytest.approx(99.61, abs=0.01)
    ev.figure({"benches": {"pairs": result}}, tmp_path / "scaling.png")
    from PIL import Image
    with Image.open(tmp_path / "scaling.png") as image:
        assert image.width > 400


def test_rows_not_judged_to_the_end_are_left_out_and_said():
    rows, args = [row(i) for i in range(10)], args_of("--samples", 2)
    done = judged(rows[:7], args, lambda *at: says(1))
    del done["pairs", 3, 1, 0]
    about = ev.evaluate("pairs", rows, done, args)[0]["about"]
    assert about["rows"] == 6 and about["rows left out, not judged to the end"] == 4


# ---------------------------------------------------------------------------------------------------
# Asking: seeds, jobs, early stopping


def test_a_sample_has_its_own_seed_whatever_it_is_asked_with():
    rows, args = [row(i) for i in range(40)], args_of("--samples", 16)
    seeds = lambda jobs: {(j.row["row"], j.order, j.first + i): ev.seed_of(j, args) + i for j in jobs for i in range(j.count)}
    whole = seeds(job for r in rows for job in ev.due(r, {}, args))
    assert len(whole) == len(set(whole.values())) == 40 * 16 and all(0 <= s < 2**31 for s in whole.values())
    done = judged(rows, args, lambda *at: says(1))
    for at in random.Random(0).sample(sorted(done), 200):
        del done[at]
    again = seeds(job for r in rows for job in ev.due(r, done, args))
    assert len(again) == 200 and again.items() <= whole.items()


@pytest.mark.parametrize("orders", ["both", "dataset"])
def test_early_stopping_draws_what_the_replay_of_all_samples_would(orders):
    """No sample more than the rule needs, and the same answers as from a file with all 16."""
    rows = [row(i, 1 + i % 2) for i in range(200)]
    every, online = args_of("--samples", 16, "--orders", orders), args_of("--samples", 16, "--orders", orders, "--early_stop")
    full, drawn = judged(rows, every, random_judge(3)), judged(rows, online, random_judge(3))
    assert drawn.items() <= full.items() and len(drawn) < len(full) / 2
    cost = []
    for r in rows:
        sequence = [ev.picked(j) for j in ev.so_far(r, full, every)]
        n = next(n for n in range(1, 17) if ev.stopped(sequence[:n], 16) is not False)
        assert len(ev.so_far(r, drawn, online)) == n == sum(at[1] == r["row"] for at in drawn)
        cost.append(n)
    result, _ = ev.evaluate("pairs", rows, drawn, online)
    assert result["about"]["early stopping: samples"] == pytest.approx(np.mean(cost), abs=0.001)
    assert result["about"]["early stopping: tokens"] == pytest.approx(10 * np.mean(cost), abs=0.01)
    replay, _ = ev.evaluate("pairs", rows, full, every)
    assert replay["about"]["early stopping: samples"] == pytest.approx(np.mean(cost), rel=0.12)
    assert overall(replay, "early stopping, at most 16") == pytest.approx(overall(result, "early stopping, at most 16"), abs=6)
    assert replay["about"]["tokens of all samples"] == 160


def test_early_stopping_goes_on_after_a_kill_without_asking_twice():
    """A kill may leave a row's first order without its second: the gap is filled, what is there is not asked again."""
    rows, args = [row(i, 1 + i % 2) for i in range(60)], args_of("--samples", 16, "--early_stop")
    drawn = judged(rows, args, random_judge(3))
    left = {at: j for at, j in drawn.items() if random.Random(str(at[1:3])).random() < 0.7}
    written, done = [], dict(left)
    ev.collect(rows, lambda jobs: ((j, [random_judge(3)(j.row, j.order, j.first + i) for i in range(j.count)]) for j in iter_jobs(jobs)), done, args, written.extend)
    assert done == drawn and sorted(map(ev.where, written)) == sorted(drawn.keys() - left.keys())


@pytest.mark.parametrize("words, why", [(["--samples", "5"], "an even number"), (["--samples", "4", "--temperature", "0"], "are the same")])
def test_flags_that_would_mislead_are_refused(words, why):
    with pytest.raises(Unusable, match=why):
        args_of(*words)
    with pytest.raises(SystemExit):
        ev.parser().parse_args(["--out", "x", "--bench", "Bench=file"])


def test_the_verdicts_token_is_found_by_walking_back():
    from toy import model
    tokenizer = model.make_tokenizer()
    for close, verdict in itertools.product(["</answer>", " </answer>", "</answer>\n", "\n</answer> done, 2 or 1"], "12"):
        text = f"<think>Not 2, and 1 is no <answer>2</answer> either.</think>\n<answer> {verdict}{close}"
        ids = tokenizer.encode(text)
        at = ev.verdict_at(len(ids), lambda t: tokenizer.decode([ids[t]]), text)
        assert tokenizer.decode([ids[at]]).strip() == verdict
        assert "answer" in tokenizer.decode(ids[at:]) and tokenizer.decode(ids[:at]).rstrip().endswith("<answer>")
    assert ev.verdict_at(3, "1</answer>".__getitem__, "no verdict") is None


# ---------------------------------------------------------------------------------------------------
# The file of judgements


def test_a_half_written_line_is_cut_off_and_a_broken_one_is_told(tmp_path):
    rows, args = [row(i) for i in range(3)], args_of("--samples", 2)
    journal = ev.Journal(tmp_path, 0)
    done = judged(rows, args, lambda *at: says(1))
    journal.write(done.values())
    with pytest.raises(Unusable, match="another run is writing"):
        ev.Journal(tmp_path, 0)
    journal.file.write(b'{"bench": "pairs", "row": 2, "ord')
    journal.file.close()
    assert ev.read_judgements(tmp_path) == done
    ev.Journal(tmp_path, 0).write([done["pairs", 0, 0, 0] | {"sample": 1}])
    assert len(ev.read_judgements(tmp_path)) == 7
    path = tmp_path / "judgements.jsonl"
    lines = path.read_text().splitlines()
    for bad, why in ((lines[0], "is there already"), ("{}", "no judgement"), ("oops", "no judgement"), (lines[1].replace('"tokens": 10', '"tokens": "10"'), "'tokens'")):
        path.write_text("\n".join([*lines, bad]) + "\n")
        with pytest.raises(Unusable, match=f"line 8.*{why}"):
            ev.read_judgements(tmp_path)


def test_another_configuration_is_refused_and_says_what_differs(tmp_path):
    rows = {"pairs": [row(i) for i in range(5)]}
    args = args_of("--out", tmp_path, "--samples", 4)
    ev.settle(args, rows, {})
    done = {("pairs", 0, 0, 0): says(1)}
    ev.settle(args_of("--out", tmp_path, "--samples", 8, "--orders", "dataset"), rows, done)  # more samples of the same are no other configuration
    ev.settle(args, {"pairs": rows["pairs"][:3]}, done)  # nor are fewer rows
    with pytest.raises(Unusable, match="temperature was 1.0, is 0.5; .*another|temperature was 1.0, is 0.5"):
        ev.settle(args_of("--out", tmp_path, "--temperature", 0.5), rows, done)
    with pytest.raises(Unusable, match="pairs has other rows"):
        ev.settle(args, {"pairs": [r | {"choice": 2} for r in rows["pairs"]]}, done)
    ev.settle(args_of("--out", tmp_path, "--temperature", 0.5), rows, {})  # a run that made nothing yet binds nobody


def command(*words):
    return [sys.executable, str(ROOT / "evaluate.py"), *map(str, words)]


@contextlib.contextmanager
def serving(toy, *words):
    it = server.Server(server.parser().parse_args(["--port", "0", "--key", str(toy.parent / "key.jsonl"), *map(str, words)]))
    try:
        yield it
    finally:
        it.close()


def test_kill_9_and_resume_loses_and_repeats_nothing(toy, tmp_path):
    """Over real HTTP, with rate limits, server errors, broken connections and bodies that are no completion."""
    faults = [word for kind in ("429_after", "500", "reset", "html", "empty", "truncated") for word in (f"--p_{kind}", "0.02")]
    right = ("--right_easy", "0.8", "--right_hard", "0.8")  # of any picture: so four votes are better than one
    with serving(toy, "--latency", "0.04", "--retry_after", "0.01", *right, *faults) as stand_in:
        words = flags(toy, "--base_url", stand_in.url, "--model", "toy", "--samples", 4, "--concurrency", 8, "--limit", 24, "--page", 0, benches=("pairs", VL))
        process = subprocess.Popen(command(*words, "--out", tmp_path / "killed"), cwd=ROOT, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        file = tmp_path / "killed" / "judgements.jsonl"
        deadline = time.time() + 120
        while time.time() < deadline and process.poll() is None and not (file.exists() and len(file.read_bytes().splitlines()) >= 40):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.stderr.read()
        before = ev.read_judgements(tmp_path / "killed")
        assert 40 <= len(before) < 192
        ev.main([*words, "--out", str(tmp_path / "killed")])
        after = ev.read_judgements(tmp_path / "killed")
        assert len(after) == 192 and before.items() <= after.items()  # read_judgements refuses a repeated one
        assert stand_in.stats["answered"] <= 192 + 8 * 2 * 2  # what was on its way at the kill, and no more, was asked again
        ev.main([*words, "--out", str(tmp_path / "whole")])
    assert ev.read_judgements(tmp_path / "whole") == after
    results = json.loads((tmp_path / "killed" / "results.json").read_text())
    for bench in ("pairs", VL):
        r = results["benches"][bench]
        assert r["about"]["rows"] == 24 and 65 < overall(r, "one sample") < 92 and overall(r, "voting@4") > overall(r, "one sample")
        assert r["about"]["verdicts without log-probability"] == r["about"]["judgements"]  # the server has none: it says so, and is asked without
    start = time.time()
    ev.main(["--score_only", "--out", str(tmp_path / "killed"), "--compare", str(tmp_path / "whole"), "--page", "0"])
    assert time.time() - start < 20
    again = json.loads((tmp_path / "killed" / "results.json").read_text())
    assert again["benches"][VL]["lines"] == results["benches"][VL]["lines"] and again["args"]["samples"] == 4
    assert again["benches"][VL]["compared"]["voting@4"]["overall"] == [0, 0, 0, 1.0]
    assert "against" in (tmp_path / "killed" / "table.md").read_text()


def test_a_server_that_gives_log_probabilities():
    """Those of 1 and 2 where the verdict stands; of an option that comes twice, with and without a space, the likelier."""
    options = [{"token": t, "logprob": p} for t, p in (("2", -0.1), (" 1", -2.5), ("1", -9.0))]
    content = [{"token": t, "logprob": -0.1, "top_logprobs": options if t == "2" else []} for t in ("So", "<answer>", "2", "</answer>")]
    reply = {"choices": [{"message": {"content": "So<answer>2</answer>"}, "finish_reason": "stop", "logprobs": {"content": content}}]}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            assert json.loads(self.rfile.read(int(self.headers["Content-Length"])))["top_logprobs"] == 5
            body = json.dumps(reply).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as it:
        threading.Thread(target=it.serve_forever, daemon=True).start()
        args, done = args_of("--base_url", f"http://127.0.0.1:{it.server_port}/v1", "--samples", 4), {}
        ev.collect([row(0)], ev.backend(args), done, args)
        it.shutdown()
    assert len(done) == 4
    for j in done.values():
        assert (j["choice"], j["logp1"], j["logp2"], j["tokens"], j["finish"]) == (2, -2.5, -0.1, 4, "stop")


def test_two_ranks_share_the_rows(toy, tmp_path):
    with serving(toy) as stand_in:
        words = flags(toy, "--base_url", stand_in.url, "--model", "toy", "--samples", 2, "--limit", 15, "--out", tmp_path, benches=("pairs",))
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "evaluate.py", *words],
                              cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    sizes = [len((tmp_path / name).read_text().splitlines()) for name in ("judgements.jsonl", "judgements-1.jsonl")]
    assert sizes == [16, 14] and json.loads((tmp_path / "results.json").read_text())["benches"]["pairs"]["about"]["rows"] == 15


def test_judge_and_rank_in_python(toy, tmp_path):
    """The README's five lines. The stand-in is right at once about nine easy pairs of ten."""
    with serving(toy, "--right_easy", 1, "--right_hard", 1) as stand_in:
        judge = ev.Judge("toy", samples=4, base_url=stand_in.url)
        rows = ev.read_rows(args_of(*flags(toy, "--out", tmp_path), "--limit", 6))
        for r in rows[VL] + [r for r in rows["pairs"] if r["images"]]:
            said = judge(r["question"], r["images"], *r["responses"])
            assert said.choice == r["choice"] and said.probability == 1 and said.votes == ((4, 0, 0) if r["choice"] == 1 else (0, 4, 0))
            assert parse(said.reasoning).choice == r["choice"]
        groups = {}
        for r in ev.read_rows(args_of(*flags(toy, "--out", tmp_path, benches=(RLHF,))))[RLHF]:
            groups.setdefault(r["id"], []).append(r)
        its = next(g for g in groups.values() if g[0]["images"] and len(g) > 1)
        answers = [r["responses"][1] for r in its] + [its[0]["responses"][0]]
        ranked = judge.rank(its[0]["question"], its[0]["images"], answers)
        assert ranked[0] == (len(answers) - 1, 1.0) and sum(share for _, share in ranked) == pytest.approx(len(answers) / 2)
        unknown = judge("What?", [], "this", "that")
        assert unknown == (None, 0.0, (0, 0, 4), "")


# ---------------------------------------------------------------------------------------------------
# Rewards


def test_rewards_from_a_file(toy, tmp_path):
    """Right by a higher reward in either order; equal rewards are no verdict; a row without rewards stops the run."""
    rows = ev.read_rows(args_of(*flags(toy, "--out", tmp_path, benches=("pairs",))))["pairs"]
    pair = lambda r: [1.5, 1.5] if r["row"] < 6 else [2.0, -1.0] if (r["choice"] == 1) == (r["row"] < 90) else [-1.0, 2.0]
    lines = [json.dumps({"bench": "pairs", "row": r["row"], "scores": pair(r)}) for r in rows]
    file = tmp_path / "rewards.jsonl"
    file.write_text("\n".join(lines) + "\n")
    words = flags(toy, "--scores", file, "--out", tmp_path / "out", benches=("pairs",))
    ev.main([*words, "--page", "0"])
    r = json.loads((tmp_path / "out" / "results.json").read_text())["benches"]["pairs"]
    assert overall(r, "one sample") == overall(r, "better answer second") == overall(r, "right in both orders") == 70
    assert r["about"]["no verdict"] == 5 and r["about"]["flips with the order"] == 0
    for bad, why in (("\n".join(lines[1:]), "has nothing for pairs row 0"), ('{"bench": "pairs", "row": 0, "scores": [1, NaN]}', "two finite numbers")):
        file.write_text(bad + "\n")
        with pytest.raises(SystemExit, match=why):
            ev.main([*words[:-1], str(tmp_path / f"out-{len(why)}")])


@pytest.mark.parametrize("kind", ["scalar", "critic"])
def test_the_reward_heads_of_sft(kind, toy, tmp_path):
    """The verdict is the sign of the difference of the two scores, as sft.py computes them one response at a time."""
    import torch

    import sft
    from toy import model
    model.make(tmp_path / "base", seed=1, hidden=64, layers=1)
    torch.manual_seed(2)
    policy, processor = sft.load_policy(tmp_path / "base", head=kind), sft.load_processor(tmp_path / "base")
    (tmp_path / "rm").mkdir()
    sft.save_policy(policy, processor, tmp_path / "rm")
    args = args_of("--model", tmp_path / "rm", "--max_new_tokens", 8)
    assert args.samples == 2
    rows, done = ev.read_rows(args_of(*flags(toy, "--out", tmp_path, "--limit", 60, benches=("pairs",))))["pairs"][40:60], {}
    ev.collect(rows, ev.backend(args), done, args)
    policy.eval()
    for r in rows[-12:]:
        scores = []
        for i in (0, 1):
            asked = sft.encode(processor, ev.turn(r, r["question"]), r["responses"][i])
            if kind == "critic":
                asked = sft.encode(processor, sft.critique_of(r, i))
                asked |= {"response": sft.HF(policy, processor, policy.model.device).generate([asked], temperature=0.0, max_tokens=8)[0][0]["ids"]}
            with torch.no_grad():
                scores.append(policy(sft.collate([asked], processor.tokenizer.pad_token_id))["score"].item())
        for order in (0, 1):
            j = done["pairs", r["row"], order, 0]
            shown = scores[::-1] if order else scores
            assert j["choice"] == 1 + (shown[1] > shown[0]) and j["logp1"] - j["logp2"] == pytest.approx(shown[0] - shown[1], abs=1e-4)
    assert any(done["pairs", r["row"], 0, 0]["text"] for r in rows) == (kind == "critic")


# ---------------------------------------------------------------------------------------------------
# vLLM, once: a toy model that has learnt to answer, with images, videos and texts

VLLM = """
import json, sys
import evaluate as ev
folder, data, out = sys.argv[1:]
args = ev.check_args(ev.parser().parse_args(["--bench", f"pairs={data}", "--model", folder, "--out", out, "--samples", "8", "--max_new_tokens", "24",
                                             "--context", "1024", "--group", "medium"]))
rows = ev.read_rows(args)["pairs"]
answers = ev.backend(args)
done = {}
ev.collect(rows, answers, done, args, write=ev.Journal(out, 0).write)
kept = {at: j for i, (at, j) in enumerate(done.items()) if i % 3}
again = dict(kept)
ev.collect(rows, answers, again, args)
same = sum(again[at]["text"] == j["text"] for at, j in done.items())
early = ev.check_args(ev.parser().parse_args(["--model", folder, "--out", out, "--samples", "8", "--max_new_tokens", "24",
                                              "--orders", "dataset", "--early_stop"]))
few = {}
ev.collect(rows, answers, few, early)
other = sum(done[at]["text"] != j["text"] for at, j in few.items() if at in done)
json.dump({"all": len(done), "kept": len(kept), "same": same, "again": len(again), "few": len(few), "other": other}, open(out + "/said.json", "w"))
"""


@pytest.fixture(scope="session")
def judge_model(toy, tmp_path_factory):
    """A toy model after a few steps on judgements that are but a verdict: it can answer, not judge."""
    import torch

    import sft
    from annotate import read_pairs
    from toy import model
    folder = tmp_path_factory.mktemp("model")
    model.make(folder, seed=0, hidden=64, layers=1)
    policy, processor = sft.load_policy(folder), sft.load_processor(folder)
    pairs = read_pairs(toy / "pairs.jsonl", 40)
    rows = [sft.encode(processor, messages(p, i % 2), f"<think>So.</think><answer>{1 + i // 2 % 2}</answer>") for i, p in enumerate(pairs)]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-3)
    for step in range(50):
        batch = sft.collate([rows[i] for i in random.Random(step).sample(range(40), 8)], processor.tokenizer.pad_token_id)
        loss = -policy(batch)["logp"].sum() / batch["mask"].sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    sft.save_policy(policy, processor, folder)
    assert loss.item() < 0.2, loss.item()
    return folder


def test_vllm_judges_and_its_log_probabilities_are_transformers(judge_model, toy, tmp_path):
    import torch

    import sft
    from annotate import read_pairs
    pairs = read_pairs(toy / "pairs.jsonl")
    some = pairs[:10] + [p for p in pairs if p["video"]][:2] + [p | {"images": [], "video": None} for p in pairs[20:24]]
    write_pairs(tmp_path / "some.jsonl", some)
    done = subprocess.run([sys.executable, "-c", VLLM, judge_model, tmp_path / "some.jsonl", tmp_path], cwd=ROOT, env=ENV | {"PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads((tmp_path / "said.json").read_text())
    assert said["all"] == said["again"] == 16 * 8 and said["kept"] < 90
    assert said["same"] >= 126 and 48 <= said["few"] < 128 and said["other"] <= 2  # another batch may differ in the last bits
    judgements = ev.read_judgements(tmp_path)
    verdicts = [j for j in judgements.values() if j["choice"]]
    assert len(verdicts) > 60 and {j["choice"] for j in verdicts} == {1, 2} and len({j["text"] for j in judgements.values()}) > 1
    policy, processor = sft.load_policy(judge_model, dtype=torch.float32), sft.load_processor(judge_model)
    one, two = (processor.tokenizer.encode(d)[0] for d in "12")
    worst = 0.0
    for j in sorted(verdicts, key=lambda j: (j["sample"], j["row"]))[:14] + [j for j in verdicts if j["row"] in (10, 11)][:4]:
        r = some[j["row"]]
        encoded = sft.encode(processor, messages(r, j["order"]), j["text"])
        at = max(i for i, t in enumerate(encoded["response"]) if t in (one, two))
        for digit, key in ((one, "logp1"), (two, "logp2")):
            cut = encoded | {"response": encoded["response"][:at] + [digit]}
            with torch.no_grad():
                worst = max(worst, abs(policy.eval()(sft.collate([cut], processor.tokenizer.pad_token_id))["logp"][0, -1].item() - j[key]))
    assert 0 < worst < 1e-4  # float32 on both sides; images, videos and texts


# ---------------------------------------------------------------------------------------------------
# The page, in a real browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")


class Browser:
    """A headless Chromium without any network, driven over its own debugging protocol."""

    def __init__(self, folder):
        self.folder, self.number = folder, 0

    async def __aenter__(self):
        import aiohttp
        self.process = subprocess.Popen([CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-port=0",
                                         "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={self.folder / 'profile'}", "about:blank"],
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port = self.folder / "profile" / "DevToolsActivePort"
        for _ in range(300):
            if port.exists() and len(port.read_text().split()) == 2:
                break
            await asyncio.sleep(0.1)
        self.session = aiohttp.ClientSession()
        number = port.read_text().split()[0]
        async with self.session.get(f"http://127.0.0.1:{number}/json") as reply:
            page = next(t for t in await reply.json() if t["type"] == "page")
        self.socket = await self.session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0)
        return self

    async def __aexit__(self, *_):
        await self.session.close()
        self.process.kill()
        self.process.wait()

    async def send(self, method, **params):
        self.number += 1
        await self.socket.send_json({"id": self.number, "method": method, "params": params})
        while (reply := await self.socket.receive_json(timeout=60)).get("id") != self.number:
            pass
        assert "error" not in reply, reply
        return reply["result"]

    async def open(self, path):
        await self.send("Page.enable")
        await self.send("Page.navigate", url=path.as_uri())
        for _ in range(200):
            if await self.js("document.readyState === 'complete' && !!document.querySelector('#place')"):
                return
            await asyncio.sleep(0.05)
        raise AssertionError("the page did not come up")

    async def js(self, code):
        result = await self.send("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def key(self, letter):
        for kind in ("keyDown", "keyUp"):
            await self.send("Input.dispatchKeyEvent", type=kind, key=letter, text=letter if kind == "keyDown" else "")


def tricky(rows, args):
    """Judgements of every kind: right, wrong, flipped, self-corrected, without a verdict; and text that would break a careless page."""
    kinds = {0: lambda r, o, s: says(3 - r["choice"] if o else r["choice"]), 1: lambda r, o, s: says(1), 2: lambda r, o, s: says(r["choice"] if o else 3 - r["choice"]),
             3: lambda r, o, s: ev.output_of(f"<think>Wait, re-reading the question. </script><b>&amp;</b></think><answer>{3 - r['choice'] if o else r['choice']}</answer>"),
             4: lambda r, o, s: ev.output_of("<think>on and on", 99, "length")}
    return judged(rows, args, lambda r, o, s: kinds[r["row"] % 5](r, o, s))


@browser
def test_the_page_filters_by_click_and_key(toy, tmp_path):
    args = args_of(*flags(toy, "--out", tmp_path, "--limit", 10, "--samples", 2))
    benches = ev.read_rows(args)
    done = tricky([r for rows in benches.values() for r in rows], args)
    ev.page(tmp_path / "page.html", "a <title> & more", ev.page_items(benches, done, 10), blind=False)
    text = (tmp_path / "page.html").read_text()
    assert "http" not in text.replace("http-equiv", "") and text.count("</script>") == 1 and "<title>a &lt;title&gt; &amp; more</title>" in text

    async def look():
        async with Browser(tmp_path) as b:
            await b.open(tmp_path / "page.html")
            place = lambda: b.js("document.querySelector('#place').textContent")
            assert await place() == "1 of 40" and await b.js("document.querySelector('h1').textContent") == "a <title> & more"
            assert await b.js("[...document.images].length > 0 && [...document.images].every(i => i.complete && i.naturalWidth === 56)")
            await b.key("j")
            await b.key("j")
            await b.key("k")
            assert await place() == "2 of 40"
            for name, n in (("errors", 24), ("flips with the order", 8), ("self-corrections", 8), ("no verdict or truncated", 8), ("all", 40)):
                await b.js(f"{{ const f = document.querySelector('#filter'); f.value = {name!r}; f.dispatchEvent(new Event('change')); }}")
                assert await place() == f"1 of {n}", name
                if name == "self-corrections":
                    assert "</script><b>&amp;</b>" in await b.js("document.querySelector('main').innerText")
            assert await b.js("document.querySelectorAll('nav select').length") == 3
            await b.js("{ const f = document.querySelectorAll('nav select')[1]; f.selectedIndex = 4; f.dispatchEvent(new Event('change')); }")
            assert await place() == "1 of 10"
    asyncio.run(look())


@browser
def test_the_blind_vote_by_keyboard_saved_and_tallied(toy, tmp_path):
    """Table 9 from a browser: keys, closing the page in between, the saved file, the tally."""
    args = args_of(*flags(toy, "--out", tmp_path, "--limit", 8, "--samples", 2, benches=(VL, "pairs")))
    benches = ev.read_rows(args)
    rows = [r for its in benches.values() for r in its]
    ours, theirs = (judged(rows, args, lambda r, o, s: ev.output_of(f"<think>{word} reasoning</think><answer>1</answer>")) for word in ("fine", "poor"))
    ev.blind_vote(benches, ours, theirs, args)
    key = json.loads((tmp_path / "ab_key.json").read_text())
    text = (tmp_path / "ab.html").read_text()
    assert len(key) == 16 and set(key) == {"left", "right"} and "<answer>" not in text and "\\u003canswer" not in text and "model" not in text.split("const data")[1].split("\n")[0]

    async def vote():
        async with Browser(tmp_path) as b:
            await b.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
            for part in (range(0, 9), range(9, 16)):
                await b.open(tmp_path / "ab.html")  # the second time: goes on where it was
                for i in part:
                    left = await b.js("document.querySelectorAll('main .pair .box')[0].textContent.startsWith('fine')")
                    await b.key("s" if i < 4 else "a" if left == (i != 15) else "d")
            assert "16 voted" in await b.js("document.querySelector('#place').textContent")
            await b.js("document.querySelector('#save').click()")
            for _ in range(100):
                if (tmp_path / "votes.json").exists():
                    return
                await asyncio.sleep(0.05)
    asyncio.run(vote())
    votes = ev.tally_votes(key, [tmp_path / "votes.json"])
    assert votes["majority"] == votes[str(tmp_path / "votes.json")] == (68.8, 6.2, 25.0, 16)  # 11 wins, 1 loss, 4 ties


def test_table_9_of_three_people(tmp_path):
    """145 wins, 25 losses, 30 ties of 200 by majority; where all three differ it is a tie."""
    key = ["left", "right"] * 100
    verdict = lambda i: "win" if i < 145 else "loss" if i < 170 else "tie"
    side = lambda i, v: v if v == "tie" else key[i] if v == "win" else {"left": "right", "right": "left"}[key[i]]
    files = [tmp_path / f"{p}.json" for p in range(3)]
    for p, file in enumerate(files):
        said = {i: verdict(i) if i < 190 or p == 0 else ("win", "loss")[p - 1] for i in range(200)}
        file.write_text(json.dumps({"votes": {str(i): side(i, v) for i, v in said.items()}}))
    assert ev.tally_votes(key, files)["majority"] == (72.5, 12.5, 15.0, 200)
    files[0].write_text('{"votes": {"200": "left"}}')
    with pytest.raises(Unusable, match="items 0 to 199"):
        ev.tally_votes(key, files)
