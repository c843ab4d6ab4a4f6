"""evaluate.py --bench lists: any number of answers, judged as duels; and Judge.rank, the same."""

import contextlib
import dataclasses
import doctest
import json
import random
from itertools import combinations, pairwise, permutations

import numpy as np
import pytest
from conftest import png, write_rows
from evaluation import (
    RLHF,
    JudgeByRule,
    args_of,
    judged,
    make_row,
    random_judge,
    says,
    score,
    toy_rows,
    value,
)

import evaluate
from core import lists, one_question
from core.files import InputError
from core.judge_in_python import Judge
from core.judgements import BenchmarkRow, LeftOut, Protocol, read_judgements
from core.lists import best_first, ranked_lists, score_lists
from sources import own_lists
from sources.benchmark_rows import rows_of_benchmark
from sources.given_judgements import GivenJudgements
from toy import server

TWO = Protocol("both", samples=2)
ROWS = [
    {"id": "a", "question": "Q?", "responses": ["good", "bad", "so so"], "ranks": [1, 3, 2]},
    {"id": "b", "prompt": "P?", "responses": ["bad", "good", "worse", "bad too"], "choice": 2},
    {"question": "R?", "responses": ["good", "bad"], "choice": 1, "source": "short"},
]


def test_the_examples_of_the_docstrings():
    assert doctest.testmod(lists).failed == doctest.testmod(own_lists).failed == 0


def list_file(tmp_path, rows=ROWS):
    return write_rows(tmp_path / "lists.jsonl", rows)


def rows_of(tmp_path, rows=ROWS, limit=None):
    return list(rows_of_benchmark(own_lists, list_file(tmp_path, rows), tmp_path, limit))


def test_a_list_is_a_duel_of_each_two_answers(tmp_path):
    rows = rows_of(tmp_path)
    assert [row.row for row in rows] == list(range(3 + 6 + 1))
    assert [row.set for row in rows] == ["0"] * 3 + ["1"] * 6 + ["2"]
    assert [row.id for row in rows[:3]] == ["a 1-2", "a 1-3", "a 2-3"]
    assert rows[0].question == "Q?" and rows[9].id == "row-2 1-2"
    assert [row.choice for row in rows[:3]] == [1, 1, 2]
    decided = [row.responses for row in rows[3:9] if row.is_decided]
    assert decided == [["bad", "good"], ["good", "worse"], ["good", "bad too"]]
    assert [row.groups["source"] for row in rows[8:]] == ["lists", "short"]
    for row in rows:
        assert row.is_decided == (row.duel.ranks != [2, 1, 2, 2] or "good" in row.responses)
        assert BenchmarkRow.from_json(json.loads(json.dumps(row.to_json())), "") == row
        assert row.swapped().swapped() == row
        assert row.swapped().duel.answers == row.duel.answers[::-1]
    assert rows_of(tmp_path, limit=2) == rows[:9]


def test_a_list_may_have_pictures_or_a_video(tmp_path):
    (tmp_path / "clip").mkdir()
    for name in ("clip/2.png", "clip/10.png", "a.png"):
        (tmp_path / name).write_bytes(png())
    pictures = [{"image": "a.png"}, {"images": ["a.png", "b.png"]}, {"video": "clip"}]
    pictures += [{"video": ["clip/10.png", "none.png"]}]
    rows = rows_of(tmp_path, [ROWS[2] | fields for fields in pictures])
    assert [row.images for row in rows[:2]] == [
        [str(tmp_path / "a.png")],
        [str(tmp_path / "a.png"), str(tmp_path / "b.png")],
    ]
    assert rows[2].video == [str(tmp_path / "clip/2.png"), str(tmp_path / "clip/10.png")]
    assert rows[3].video == [str(tmp_path / "clip/10.png"), str(tmp_path / "none.png")]
    words = ["--bench", f"lists={list_file(tmp_path, [ROWS[2] | pictures[1]])}"]
    with pytest.raises(InputError, match=r"1 of 2 images are missing, the first is .*b\.png"):
        evaluate.read_rows(args_of(*words, "--out", tmp_path / "out"))


# --- the scores


def many_lists(count=40):
    rng = random.Random(0)
    rows = []
    for number in range(count):
        size = rng.choice([2, 3, 4, 5])
        responses = [f"answer {i} " + "x" * rng.randrange(9) for i in range(size)]
        ranks = [rng.randrange(3) for _ in range(size)]
        if len(set(ranks)) == 1:
            ranks[0] += 1
        ranks = [1 + rank - min(ranks) for rank in ranks]
        rows.append({"question": f"Q{number}", "responses": responses, "ranks": ranks})
    return rows


def slow_correlation(x, y):
    """Pearson's of mean ranks, by comparing each with each."""
    ranks = []
    for values in (x, y):
        below = [sum(other < one for other in values) for one in values]
        equal = [sum(other == one for other in values) for one in values]
        ranks.append([b + (e - 1) / 2 for b, e in zip(below, equal)])
    if min(map(np.std, ranks)) == 0:
        return 0.0
    return np.corrcoef(*ranks)[0, 1]


def slow_best_first(scores, ranks):
    """Over all orders in which equal scores may come."""
    right = []
    for order in permutations(range(len(scores))):
        if all(scores[a] >= scores[b] for a, b in pairwise(order)):
            right.append(ranks[order[0]] == 1)
    return np.mean(right)


def slow_shares(row, first_row, done, samples):
    """Of each answer, its wins over its duels, from the judgements themselves."""
    size = len(row["responses"])
    won = np.zeros(size)
    for number, (a, b) in enumerate(combinations(range(size), 2), first_row):
        for order in (0, 1):
            for sample in range(samples // 2):
                choice = done["lists", number, order, sample].choice
                winner = None if choice is None else (a, b)[(choice - 1) ^ order]
                for answer in (a, b):
                    won[answer] += 0.5 if winner is None else float(winner == answer)
    return (won / samples / (size - 1)).round(9)


def test_every_score_of_lists_equals_a_slow_scorers(tmp_path):
    found = many_lists()
    rows = rows_of(tmp_path, found)
    protocol = Protocol("both", samples=4)
    done = judged(rows, protocol, random_judge(0, p=0.6))
    ranking = score_lists(rows, done, protocol)
    first_row = 0
    best, correlations, chances, as_listed = [], [], [], []
    for row in found:
        size, ranks = len(row["responses"]), row["ranks"]
        shares = slow_shares(row, first_row, done, samples=4)
        first_row += size * (size - 1) // 2
        best.append(slow_best_first(shares, ranks))
        chances.append(ranks.count(1) / size)
        as_listed.append(ranks[0] == 1)
        if len(set(ranks)) > 2:
            correlations.append(slow_correlation(shares, [-rank for rank in ranks]))
    assert first_row == len(rows) and ranking["lists"] == 40
    assert ranking["rankings"] == len(correlations) > 10
    lines = ranking["lines"]
    assert lines["the judge"]["best answer first"][0] == pytest.approx(
        100 * np.mean(best), abs=0.01
    )
    expected = pytest.approx(np.mean(correlations), abs=0.001)
    assert lines["the judge"]["rank correlation"][0] == expected
    assert lines["random"]["best answer first"][0] == pytest.approx(
        100 * np.mean(chances), abs=0.01
    )
    assert lines["random"]["rank correlation"] == [0, 0, 0]
    first = lines["as listed (first answer)"]["best answer first"]
    assert first[0] == pytest.approx(100 * np.mean(as_listed), abs=0.01) and first[1] < first[2]


def test_the_accuracy_on_pairs_is_that_of_duels_with_a_better_answer(tmp_path):
    rows = rows_of(tmp_path, many_lists())
    decided = [row for row in rows if row.is_decided]
    assert len(decided) < len(rows)
    result = score(rows, TWO, random_judge(0))
    plain = [dataclasses.replace(row, duel=None) for row in decided]
    assert result["lines"] == score(plain, TWO, random_judge(0))["lines"]
    assert result["about"]["duels of equally good answers"] == len(rows) - len(decided)
    assert "Acc+" in result["lines"]["one sample"]


@pytest.mark.parametrize("early_stop", [False, True])
@pytest.mark.parametrize("orders", ["both", "dataset", "chosen_first"])
def test_a_judge_that_is_always_right_ranks_every_list(tmp_path, orders, early_stop):
    rows = rows_of(tmp_path)
    right = judge_by_words()
    protocol = Protocol(orders, samples=6, early_stop=early_stop)
    done = judged(rows, protocol, right)
    lines = score_lists(rows, done, protocol)["lines"]
    assert lines["the judge"]["best answer first"][0] == 100
    assert lines["the judge"]["rank correlation"][0] == 1
    assert value(score(rows, protocol, right), "one sample") == 100


def judge_by_words():
    """Always right about ROWS; equally bad answers are no verdict."""
    worth = {"good": 3, "so so": 2}

    def rule(row, order, sample):
        first, second = (worth.get(text, 1) for text in row.responses[:: -1 if order else 1])
        return says(None if first == second else 1 + (second > first))

    return rule


def test_of_equal_shares_any_answer_may_be_first():
    assert best_first([1, 1, 0], [1, 2, 3]) == 0.5
    assert best_first([0, 0, 0], [1, 2, 2]) == pytest.approx(1 / 3)
    assert best_first([0, 1, 1], [2, 1, 1]) == 1


def by_the_texts(row, order, sample):
    """Depends on the two answers, and not on which row of which benchmark they are in."""
    rng = random.Random(f"{row.responses} {order} {sample}")
    return says(rng.choice([1, 1, 2, None]))


def test_rank_in_python_is_the_ranking_of_the_benchmark(tmp_path):
    found = many_lists(8)
    rows = rows_of(tmp_path, found)
    ranked, missing = ranked_lists(rows, judged(rows, TWO, by_the_texts), TWO)
    assert missing == 0 and len(ranked) == 8
    judge = Judge(JudgeByRule(by_the_texts), TWO)
    for one, row in zip(ranked, found):
        in_python = judge.rank(row["question"], [], row["responses"])
        assert dict(in_python) == dict(enumerate(one.shares))
        assert [share for _, share in in_python] == sorted(one.shares, reverse=True)


def test_rank_needs_two_answers():
    judge = Judge(JudgeByRule(judge_by_words()), TWO)
    found = judge.rank("Q", [], ["bad", "good", "worse", "so so"])
    assert found == [
        (1, 1.0),
        (3, pytest.approx(2 / 3)),
        (0, pytest.approx(1 / 6)),
        (2, found[2][1]),
    ]
    with pytest.raises(InputError, match="two answers or more, got 1"):
        judge.rank("Q", [], ["alone"])


# --- a run


def run_with(monkeypatch, backend, tmp_path, *words):
    """(part of results.json, table.md, what page.html shows) of a run over ROWS."""
    monkeypatch.setattr(evaluate, "make_backend", lambda args: backend)
    flags = ["--samples", "2", "--out", str(tmp_path / "out"), *words]
    if "--score_only" not in words:
        flags += ["--bench", f"lists={list_file(tmp_path)}"]
    evaluate.main(flags)
    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text())["benches"]["lists"]
    page = (out / "page.html").read_text().split("const data = ")[1].split(";\n")[0]
    return results, (out / "table.md").read_text(), json.loads(page)["items"]


def test_a_run_shows_the_ranking_beside_the_trivial_ones(monkeypatch, tmp_path):
    result, table, items = run_with(monkeypatch, JudgeByRule(judge_by_words()), tmp_path)
    assert "| the judge | 100.00 [100.00, 100.00] | 1.00 [1.00, 1.00] |" in table
    assert "| as listed (first answer) | 66.67 [0.00, 100.00] | 0.50 [0.50, 0.50] |" in table
    assert "| random | 36.11 [25.00, 50.00] | 0.00 [0.00, 0.00] |" in table
    assert "3 lists, ranked by the share" in table and "rank correlation (1 with ranks)" in table
    assert result["about"]["rows"] == 7
    assert [item["row"] for item in items] == [0, 1, 2]
    assert items[0]["responses"] == ["good", "bad", "so so"] and items[0]["ranks"] == [1, 3, 2]
    assert items[0]["won"] == [1.0, 0.0, 0.5] and items[0]["id"] == "a"
    assert [duel["answers"] for duel in items[0]["duels"]] == [[1, 2], [1, 3], [2, 3]]
    assert [duel["better"] for duel in items[1]["duels"]] == [2, None, None, 2, 2, None]
    again, table_again, _ = run_with(monkeypatch, None, tmp_path, "--score_only")
    assert (again, table_again) == (result, table)


class Killed(Exception):
    pass


class DiesAfter(JudgeByRule):
    """Judges so many jobs, and then ends as a killed run does."""

    def __init__(self, jobs):
        super().__init__(judge_by_words())
        self.left = jobs

    def answer(self, jobs):
        for answered in super().answer(jobs):
            if not self.left:
                raise Killed
            self.left -= 1
            yield answered


def test_a_killed_run_over_lists_continues(monkeypatch, tmp_path):
    whole = run_with(monkeypatch, JudgeByRule(judge_by_words()), tmp_path)
    path = tmp_path / "out/judgements.jsonl"
    lines = path.read_text()
    path.unlink()
    with pytest.raises(Killed):
        run_with(monkeypatch, DiesAfter(7), tmp_path)
    assert len(read_judgements(tmp_path / "out")) == 7
    partly, table, items = run_with(monkeypatch, None, tmp_path, "--score_only")
    assert partly["ranking"]["lists"] == 1 and "**2 more are left out" in table
    assert [item["won"] is None for item in items] == [False, True]
    rest = DiesAfter(13)
    assert run_with(monkeypatch, rest, tmp_path) == whole and rest.left == 0
    assert sorted(path.read_text().splitlines()) == sorted(lines.splitlines())


def test_a_list_with_a_duel_that_is_left_out_is_not_ranked(monkeypatch, tmp_path):
    class Refuses(JudgeByRule):
        def answer(self, jobs):
            for job, judgements in super().answer(jobs):
                yield job, LeftOut("too long") if job.row.row in (1, 4) else judgements

    result, table, items = run_with(monkeypatch, Refuses(judge_by_words()), tmp_path)
    assert result["ranking"]["lists"] == 1 and "1 lists, ranked by" in table
    assert "rank correlation" not in result["ranking"]["lines"]["the judge"]
    assert "2 of 10 rows left out" in table and "- lists row 4: too long" in table
    assert "With all 1 rows without judgement counted as wrong" in table
    assert [item["won"] is None for item in items] == [True, True, False]
    nothing = JudgeByRule(judge_by_words())
    result, table, _ = run_with(monkeypatch, nothing, tmp_path, "--retry_left_out")
    assert result["ranking"]["lists"] == 3 and "left out" not in table.split("Percent")[0]


def test_no_list_that_is_judged_to_the_end_is_told(monkeypatch, tmp_path):
    with pytest.raises(Killed):
        run_with(monkeypatch, DiesAfter(3), tmp_path)
    _, table, _ = run_with(monkeypatch, None, tmp_path, "--score_only")
    assert "0 lists, ranked by" in table and "**3 more are left out" in table


def test_rewards_of_all_answers_of_a_list(tmp_path):
    scores = [[0.9, 0.1, 0.5], [0, 1, 0, 0], [1, 2]]
    lines = [{"bench": "lists", "row": i, "scores": of_list} for i, of_list in enumerate(scores)]
    file = write_rows(tmp_path / "rewards.jsonl", lines)
    words = ["--bench", f"lists={list_file(tmp_path)}", "--scores", str(file)]
    evaluate.main([*words, "--out", str(tmp_path / "out")])
    result = json.loads((tmp_path / "out/results.json").read_text())["benches"]["lists"]
    judge = result["ranking"]["lines"]["the judge"]
    assert judge["best answer first"][0] == 66.667 and judge["rank correlation"][0] == 1
    assert value(result, "one sample") == pytest.approx(100 * 6 / 7, abs=0.01)
    write_rows(file, [*lines[:1], lines[1] | {"scores": [1, 2]}, lines[2]])
    with pytest.raises(
        InputError, match="line 2: expected bench, row and scores, 4 finite numbers"
    ):
        evaluate.main([*words, "--out", str(tmp_path / "other")])


def test_a_pair_has_two_rewards(tmp_path):
    rewards = evaluate.judging.RewardsInFile(
        "f", [("f, line 1", {"bench": "pairs", "row": 0, "scores": [1, 2, 3]})]
    )
    with pytest.raises(InputError, match="f, line 1: expected bench, row and scores, two finite"):
        rewards.score([make_row(0)])


def test_judgements_of_duels_made_elsewhere(tmp_path):
    """Each duel in the one order in which it was shown: the answers of a list keep their places."""
    rows = rows_of(tmp_path)
    right = judge_by_words()
    lines = []
    for number, row in enumerate(rows):
        order = number % 2
        choice = right(row, order, 0)["text"][-10:-9]
        choice = int(choice) if choice.isdecimal() else None
        lines.append({"bench": "lists", "id": row.id, "order": order, "choice": choice})
    given = GivenJudgements(write_rows(tmp_path / "given.jsonl", lines), {"lists": rows})
    assert (given.orders, given.samples) == ("dataset", 1)
    done = {}
    protocol = Protocol("dataset", 1)
    evaluate.judging.collect(given.benches["lists"], given, done, protocol)
    ranking = score_lists(given.benches["lists"], done, protocol)
    assert ranking["lists"] == 3
    assert ranking["lines"]["the judge"]["best answer first"][0] == 100
    assert ranking["lines"]["the judge"]["rank correlation"][0] == 1


@pytest.mark.parametrize(
    "duel",
    [
        {"list_number": 0},
        {"list_number": 0, "answers": [0, 3], "ranks": [1, 2, 2]},
        [0, 1],
        {"list_number": "0", "answers": [0, 1], "ranks": [1, 2]},
    ],
)
def test_a_damaged_duel_of_a_kept_row_is_named(tmp_path, duel):
    row = rows_of(tmp_path)[0].to_json() | {"duel": duel}
    with pytest.raises(InputError, match=r"rows\.jsonl, line 1: 'duel' is"):
        BenchmarkRow.from_json(row, "rows.jsonl, line 1")


@contextlib.contextmanager
def right_server(toy):
    """The address of a stand-in that is right about all it knows."""
    words = ["--port", "0", "--key", str(toy.parent / "key.jsonl")]
    words += ["--right_easy", "1", "--right_hard", "1"]
    stand_in = server.Server(server.parser().parse_args(words))
    try:
        yield stand_in.url
    finally:
        stand_in.close()


def test_lists_with_pictures_are_judged_by_a_server(toy, tmp_path):
    rows_of_id = {}
    for row in toy_rows(toy, tmp_path, RLHF)[RLHF]:
        if row.images:
            rows_of_id.setdefault(row.id, []).append(row)
    found = []
    for rows in rows_of_id.values():
        worse = [row.responses[1] for row in rows]
        fields = {"question": rows[0].question, "image": rows[0].images[0]}
        answers = [*worse, rows[0].responses[0]]
        found.append(fields | {"responses": answers, "choice": len(answers)})
    words = ["--bench", f"lists={list_file(tmp_path, found)}", "--media_root", str(toy)]
    words += ["--samples", "2", "--page", "0", "--out", str(tmp_path / "out"), "--model", "toy"]
    with right_server(toy) as url:
        evaluate.main([*words, "--base_url", url])
    result = json.loads((tmp_path / "out/results.json").read_text())["benches"]["lists"]
    lines = {name: line["best answer first"] for name, line in result["ranking"]["lines"].items()}
    assert result["ranking"]["lists"] == len(found) > 3
    assert lines["the judge"] == [100, 100, 100]
    assert lines["as listed (first answer)"] == [0, 0, 0] and 0 < lines["random"][0] <= 50


# --- what a judge in Python does not take


@pytest.mark.parametrize("name", [*evaluate.OF_RUNS, *one_question.FLAGS])
def test_a_judge_in_python_refuses_what_is_for_the_command_line(name):
    assert f"--{name}" in evaluate.parser()._option_string_actions
    with pytest.raises(
        InputError, match=rf"Judge\(\.\.\., {name}=\.\.\.\).*evaluate\.py, --{name}"
    ):
        evaluate.Judge("m", base_url="http://127.0.0.1:9/v1", **{name: "x"})


def test_a_judge_in_python_takes_every_other_flag():
    parser = evaluate.parser()
    used = ("model", "base_url", "request", "concurrency", "context", "tensor_parallel")
    used += ("orders", "samples", "temperature", "prompt", "max_new_tokens", "max_pixels")
    used += ("max_frames", "early_stop", "parse", "seed")
    names = {action.dest for action in parser._actions} - {"help"}
    assert names == {*used, *evaluate.OF_RUNS, *one_question.FLAGS}
