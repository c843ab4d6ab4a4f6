"""evaluate.py --judgements: what others' files become, and what is refused in them."""

import json

import pytest
from conftest import write_rows
from evaluation import FILES, MM, RLHF, VL, bench_flags, judged, make_row, random_judge, toy_rows

import evaluate
from core.files import InputError
from core.judgements import Protocol
from sources.given_judgements import GivenJudgements
from viewer.pages import rows_of_both

VERDICT = "<think>because</think><answer>{}</answer>"


def results_of(out):
    return json.loads((out / "results.json").read_text())["benches"]


def lines_of(judgements):
    lines = []
    for judgement in judgements:
        line = {name: getattr(judgement, name) for name in ("bench", "row", "order", "text")}
        lines.append(line | {"text": VERDICT.format(judgement.choice)})
    return lines


def test_texts_of_others_are_scored_like_our_own(toy, tmp_path):
    rows = toy_rows(toy, tmp_path, VL, "pairs")
    protocol = Protocol("both", 4)
    both = rows[VL] + rows["pairs"]
    done = judged(both, protocol, random_judge(0))
    file = write_rows(tmp_path / "texts.jsonl", lines_of(done.values()))
    words = [*bench_flags(toy, VL, "pairs"), "--judgements", str(file), "--page", "0"]
    evaluate.main([*words, "--out", str(tmp_path / "out")])
    for bench, result in results_of(tmp_path / "out").items():
        own, _ = evaluate.scoring.score_benchmark(rows[bench], done, protocol, {})
        for method in ("one sample", "right in both orders", "any@4"):
            ours = own["lines"][method]["overall"]
            assert result["lines"][method]["overall"] == ours
        assert result["about"]["no verdict"] == own["about"]["no verdict"]
    again = ["--score_only", "--out", str(tmp_path / "out"), "--page", "0"]
    before = results_of(tmp_path / "out")
    evaluate.main(again)
    assert results_of(tmp_path / "out") == before


def given(tmp_path, lines, rows=None):
    rows = rows or [make_row(i, choice=1 + i % 2) for i in range(4)]
    file = write_rows(tmp_path / "given.jsonl", lines)
    return GivenJudgements(file, {"pairs": rows})


def by_id(number, **fields):
    return {"bench": "pairs", "id": f"id-{number}", "choice": 1} | fields


def test_a_row_may_be_named_by_its_id_and_its_order_by_what_is_first(tmp_path):
    lines = [by_id(i, better_first=first) for i in range(4) for first in (True, False)]
    both = given(tmp_path, lines)
    assert (both.orders, both.samples) == ("both", 2)
    assert [line.order for line in both.given["pairs", 1]] == [1, 0]
    first = given(tmp_path, [by_id(i, better_first=True) for i in range(4)])
    assert (first.orders, first.samples) == ("chosen_first", 1)


def test_rows_that_were_each_shown_in_one_order_are_listed_in_it(tmp_path):
    """As VL-RewardBench's own scorer draws them: a judge that says 1 is right in one half."""
    rows = [make_row(i, responses=("good", "bad")) for i in range(4)]
    lines = [by_id(i, order=i % 2) for i in range(4)]
    one = given(tmp_path, lines, rows)
    assert (one.orders, one.samples) == ("dataset", 1)
    assert [row.choice for row in one.benches["pairs"]] == [1, 2, 1, 2]
    assert one.benches["pairs"][1].responses == ["bad", "good"]
    done = {}
    evaluate.judging.collect(one.benches["pairs"], one, done, Protocol("dataset", 1))
    assert [done[key].verdict for key in sorted(done)] == [1, 1, 1, 1]


def test_a_stated_choice_counts_and_null_is_no_verdict(tmp_path):
    lines = [by_id(0, order=0, text=VERDICT.format(1), choice=2), by_id(1, order=0, choice=None)]
    lines += [by_id(2, order=0, text="1, I think"), by_id(3, order=0)]
    del lines[2]["choice"]
    some = given(tmp_path, lines)
    done = {}
    evaluate.judging.collect(some.benches["pairs"], some, done, Protocol("dataset", 1))
    assert [done[key].choice for key in sorted(done)] == [2, None, None, 1]


def test_rows_that_the_file_lacks_are_left_out_and_counted(toy, tmp_path, capsys):
    lines = [{"bench": "pairs", "row": i, "order": 0, "choice": 1} for i in range(100)]
    lines += [lines[0]]
    file = write_rows(tmp_path / "some.jsonl", lines)
    words = [*bench_flags(toy, "pairs"), "--judgements", str(file), "--page", "0"]
    evaluate.main([*words, "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "101 judgements of 100 of 120 rows; orders: dataset, 1 a row" in printed
    assert "1 of them are not used: other rows have fewer" in printed
    assert "WARNING: 20 of 120 rows left out, not in the file" in printed
    assert results_of(tmp_path / "out")["pairs"]["about"]["rows"] == 100


def test_a_file_is_not_mixed_with_another_judge(toy, tmp_path):
    lines = [{"bench": "pairs", "row": i, "order": 0, "choice": 1} for i in range(120)]
    file = write_rows(tmp_path / "some.jsonl", lines)
    words = [*bench_flags(toy, "pairs"), "--page", "0", "--out", str(tmp_path / "out")]
    evaluate.main([*words, "--judgements", str(file)])
    with pytest.raises(InputError, match=r"judgements was '.*some\.jsonl', is now None"):
        evaluate.main([*words, "--base_url", "http://127.0.0.1:9/v1"])
    write_rows(file, [line | {"choice": 2} for line in lines])
    with pytest.raises(InputError, match="belongs to another run: file was"):
        evaluate.main([*words, "--judgements", str(file)])


# --- the released scripts' files


def released_rows(toy, bench):
    """The rows as those scripts read them."""
    file = toy / ("VL-RewardBench/data.jsonl" if bench == VL else FILES[bench])
    text = file.read_text()
    return json.loads(text) if bench == MM else [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("bench", [VL, MM, RLHF])
def test_a_file_of_the_released_scripts_is_read(bench, toy, tmp_path, capsys):
    """Their rows have no number, ids repeat, and a text without a verdict is taken for a 2."""
    rows = released_rows(toy, bench)
    lines = []
    for number, row in enumerate(rows):
        says = ("1", "2", "neither")[number % 3]
        rewards = [1, 0] if says == "1" else [0, 1]
        lines.append(row | {"rewards": rewards, "critic": VERDICT.format(says), "qs": "Judge."})
    lines[1]["rewards"] = [1, 0]
    file = write_rows(tmp_path / "r1_reward.jsonl", lines)
    words = [*bench_flags(toy, bench), "--judgements", str(file), "--page", "0"]
    evaluate.main([*words, "--out", str(tmp_path / "out")])
    result = results_of(tmp_path / "out")[bench]
    ones = len(range(0, len(rows), 3))
    assert result["lines"]["one sample"]["overall"][0] == pytest.approx(
        100 * ones / len(rows), 0.01
    )
    assert result["about"]["rows"] == len(rows)
    printed = capsys.readouterr().out
    assert "show the better answer first; 1 of their rewards say otherwise" in printed
    assert "WARNING: the better answer is always shown first" in printed


def test_a_line_of_the_released_scripts_of_another_file_is_named(tmp_path):
    line = {"id": "id-0", "prompt": "Q?", "chosen": "x", "rejected": "yy"}
    line |= {"rewards": [1, 0], "critic": VERDICT.format(1)}
    assert given(tmp_path, [line]).orders == "chosen_first"
    for change in ({"chosen": "z"}, {"prompt": None}, {"id": 7}):
        with pytest.raises(
            InputError, match=r"line 1: id .*: no row of pairs has this id, question"
        ):
            given(tmp_path, [line | change])
    with pytest.raises(InputError, match="expected two numbers and a text, as the released"):
        given(tmp_path, [line | {"rewards": [1]}])


def test_lines_of_the_released_scripts_are_shared_among_rows_that_are_the_same(tmp_path):
    """VL-RewardBench lists a few rows twice; each of them has its own line."""
    rows = [make_row(number) for number in (0, 0, 1)]
    rows[1].row = 2
    line = {"id": "id-0", "prompt": "Q?", "chosen": "x", "rejected": "yy", "rewards": [1, 0]}
    lines = [line | {"critic": VERDICT.format(says)} for says in (1, 2, 2, 1)]
    taken = given(tmp_path, lines, rows).given
    texts = {key: [one.text[-10] for one in found] for key, found in taken.items()}
    assert texts == {("pairs", 0): ["1", "2"], ("pairs", 2): ["2", "1"]}


# --- what is refused

GOOD = {"bench": "pairs", "row": 0, "order": 0, "text": VERDICT.format(1)}
BAD = [
    ("a text", "expected bench, row or id, order"),
    ({"bench": VL}, "expected a NAME of --bench: pairs"),
    ({"bench": []}, "expected a NAME of --bench: pairs"),
    ({"row": 4}, "row is 4, and pairs has no such row"),
    ({"row": "0"}, 'row is "0", and pairs has no such row'),
    ({"row": True}, "row is true, and pairs has no such row"),
    ({"row": 0, "id": "id-1"}, 'row 0 of pairs has the id "id-0", the line says "id-1"'),
    ({"order": 2}, "order is 2 and better_first null"),
    ({"order": None}, "order is null and better_first null"),
    ({"better_first": True}, "order is 0 and better_first true"),
    ({"text": None}, "text is null and choice null"),
    ({"choice": 3}, "and choice 3"),
    ({"choice": "1"}, 'and choice "1"'),
    ({"choice": True}, "and choice true"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_a_line_that_cannot_be_used_is_named(tmp_path, change, message):
    line = change if isinstance(change, str) else GOOD | change
    with pytest.raises(InputError, match=r"given\.jsonl, line 2: ") as raised:
        given(tmp_path, [GOOD, line])
    assert message in str(raised.value) and len(str(raised.value)) < 400 + len(str(tmp_path))


def test_an_id_of_two_rows_is_refused(tmp_path):
    rows = [make_row(0), make_row(1)]
    rows[1].id = "id-0"
    with pytest.raises(InputError, match='id "id-0" is that of 2 rows of pairs; name the row by'):
        given(tmp_path, [by_id(0, order=0)], rows)


def test_a_benchmark_without_a_judgement_is_refused(tmp_path):
    file = write_rows(tmp_path / "given.jsonl", [GOOD])
    with pytest.raises(InputError, match=f"has none of --bench {VL}; leave it out"):
        GivenJudgements(file, {"pairs": [make_row(0)], VL: [make_row(0, bench=VL)]})


def test_two_runs_are_voted_on_where_they_show_the_same_answers(tmp_path):
    """A run's rows may be listed as its file says they were shown; --ab takes no such row."""
    rows = [make_row(i, responses=("good", "bad")) for i in range(4)]
    lines = [by_id(i, order=i % 2) for i in range(4)]
    listed = given(tmp_path, lines, rows).benches
    common = rows_of_both({"pairs": rows}, listed)
    assert [row.row for row in common["pairs"]] == [0, 2]
    assert rows_of_both({"pairs": rows}, {}) == {"pairs": []}
