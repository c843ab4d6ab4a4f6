"""
The toy world: what is true, what is planted, that nobody can answer without the picture; and
toy/compare.py, toy/report.py on runs that are written by hand.
"""

import doctest
import json
import random
import subprocess
import sys
from collections import Counter
from itertools import chain

import numpy as np
import pytest
from conftest import ROOT, write_rows

from stable_reinforce import parse
from toy import compare, report, world


def twin_sets(count, seed=0, **options):
    rng = random.Random(seed)
    return [world.twins(rng, **options) for _ in range(count)]


def all_items(count, **options):
    return list(chain.from_iterable(twin_sets(count, **options)))


def which_hold(item, scene, claims):
    return [world.truth(item["family"], scene, item["subject"], claim) for claim in claims]


# --------------------------------------------------------------------------------------------------
# What is true


def test_the_examples_are_true():
    assert doctest.testmod(world).failed == 0


@pytest.mark.parametrize("family", world.FAMILIES)
@pytest.mark.parametrize("n", [2, 3])
def test_exactly_one_answer_is_true_of_each_scene(family, n):
    for items in twin_sets(200, family=family, n=n):
        for right, item in enumerate(items):
            assert item["right"] == right
            expected = [k == right for k in range(n)]
            assert which_hold(item, item["scene"], item["claims"]) == expected


def test_an_unknown_family_is_refused():
    with pytest.raises(ValueError, match="'size'; expected one of colour"):
        world.twins(random.Random(0), family="size")


def test_twins_differ_in_nothing_but_the_picture():
    for first, second in twin_sets(500):
        for field in first:
            if field in ("right", "scene"):
                assert first[field] != second[field]
            else:
                assert first[field] == second[field]


def longest(item):
    lengths = [len(answer) for answer in item["answers"]]
    return lengths.index(max(lengths))


def shortest(item):
    lengths = [len(answer) for answer in item["answers"]]
    return lengths.index(min(lengths))


def first_in_the_alphabet(item):
    return item["answers"].index(min(item["answers"]))


def hash_of_the_text(item):
    return sum(map(ord, item["question"] + item["answers"][0])) % 2


@pytest.mark.parametrize("rule", [longest, shortest, first_in_the_alphabet, hash_of_the_text])
def test_a_rule_that_reads_only_the_text_is_right_in_half_of_the_twins(rule):
    items = all_items(600)
    assert sum(rule(item) == item["right"] for item in items) == len(items) / 2


def test_the_longer_answer_is_right_in_half_of_single_twins_too():
    """Training draws one twin of a set: half within three standard errors."""
    rng = random.Random(5)
    items = [rng.choice(twins) for twins in twin_sets(4000)]
    share = sum(longest(item) == item["right"] for item in items) / len(items)
    assert abs(share - 0.5) < 3 * 0.5 / len(items) ** 0.5


def test_the_annotators_rule_with_perfect_sight_is_always_right():
    """The description in a careful reasoning, read back into a scene: the verdict holds in it."""
    for item in all_items(300):
        for shown in ((0, 1), (1, 0)):
            choice = shown.index(item["right"]) + 1
            text = world.judgement(item, shown, choice, "careful")
            cells = text[text.index("shows ") + 6 : text.index(". Claims")].split(", ")
            scene = [None if cell == "nothing" else tuple(cell.split()) for cell in cells]
            holds = which_hold(item, scene, [item["claims"][i] for i in shown])
            assert holds == [choice == 1, choice == 2]
            assert parse(text).choice == choice


@pytest.mark.parametrize("manner", world.MANNERS)
@pytest.mark.parametrize("choice", [1, 2])
def test_manners_are_what_they_are_called(manner, choice):
    for item, _ in twin_sets(100):
        text = world.judgement(item, (0, 1), choice, manner)
        verdict = parse(text)
        assert verdict.well_formed
        assert verdict.choice == choice
        assert world.manner_of(text) == manner
        concluded = int(verdict.think.split("Response ")[-1][0])
        assert (concluded == choice) == (manner != "inconsistent")
        assert ("shows" in verdict.think) == (manner != "hasty")


def test_what_has_no_verdict_has_no_manner():
    assert world.manner_of("no verdict") is None


def test_a_bad_look_sees_what_would_make_the_other_answer_right():
    rng = random.Random(2)
    for item in all_items(300):
        seen = world.misread(item, rng.sample((0, 1), 2), rng)
        expected = [k != item["right"] for k in (0, 1)]
        assert which_hold(item, seen, item["claims"]) == expected


FAMILY_OF = {
    "What colour": "colour",
    "Which shape is missing": "absence",
    "Which shape is ": "shape",
    "How many": "count",
    "Where is": "position",
    "Which are": "comparison",
}


def subject_in(question, family):
    words = question.rstrip("?").replace(",", "").split()
    if family == "comparison":
        return f"{words[-3]} {words[-1]}"
    return words[2] if family == "count" else words[-1]


def test_questions_about_a_scene_are_answered_truly():
    asked = Counter()
    for item, _ in twin_sets(300):
        scene = item["scene"]
        for question, claim in chain.from_iterable(world.questions_about(scene).values()):
            if question.startswith("What is at the "):
                place = question.removeprefix("What is at the ").rstrip("?")
                cell = scene[world.PLACES.index(place)]
                assert claim == ("nothing" if cell is None else " ".join(cell))
                continue
            family = next(FAMILY_OF[start] for start in FAMILY_OF if question.startswith(start))
            subject = subject_in(question, family)
            assert world.truth(family, scene, subject, claim), (scene, question, claim)
            asked[family] += 1
    assert set(asked) == set(world.FAMILIES)


# --------------------------------------------------------------------------------------------------
# Pictures

SCENE = [("circle", "red"), None, ("square", "blue"), ("diamond", "green")]


def test_pictures_repeat_by_seed():
    first, again, other = (world.draw(SCENE, 0.3, random.Random(seed)) for seed in (1, 1, 2))
    assert first.shape == (56, 56, 3)
    assert first.dtype == np.uint8
    assert (first == again).all()
    assert (first != other).any()


def contrast(difficulty):
    """Between the middle of a red circle and an empty cell, in standard deviations of the noise."""
    gaps = []
    for seed in range(40):
        picture = world.draw(SCENE, difficulty, random.Random(seed)).astype(float)
        circle, empty = picture[10:18, 10:18], picture[10:18, 38:46]
        gaps.append(abs(circle.mean((0, 1)) - empty.mean((0, 1))).max() / empty.std())
    return np.mean(gaps)


def test_difficulty_takes_contrast_away():
    assert contrast(0.0) > 3 * contrast(0.5)
    assert contrast(0.5) > contrast(1.0)


def test_the_contact_sheet_has_a_row_for_each_family(tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.setattr(sys, "argv", ["world.py", "--show", str(tmp_path / "new" / "sheet.png")])
    world.main()
    sheet = np.asarray(Image.open(tmp_path / "new" / "sheet.png"))
    coloured = (sheet.max(2).astype(int) - sheet.min(2) > 60).any(1)  # lines of a picture
    rows = [line for line in np.split(coloured, np.flatnonzero(~coloured)) if len(line) > 50]
    assert len(rows) == len(world.FAMILIES)


# --------------------------------------------------------------------------------------------------
# toy/compare.py

SLIP = (
    "<think>The image shows circle red. Claims: red first, blue second. Response 1 is better."
    "</think><answer>2</answer>"
)
GLANCE = "<think>Claims: red first, blue second. Response 2 is better.</think><answer>2</answer>"


def write_run(folder, greedy, text, consistency=0.5):
    """A run of two steps as rl.py logs it: 10 judgements a step, all with the same text."""
    step = {
        "loss": 0.1,
        "loss_max": 0.5,
        "log_ratio_max": 7.5,
        "token_loss_max": 3.0,
        "length": 20.0,
        "samples": 10,
        "preclipped": 0.01,
        "filtered": 0.1,
        "skipped": 0,
        "consistency": consistency,
        "seconds": 2.0,
        "entropy": 0.1,
    }
    held_out = {"eval_n": 600, "eval_sampled": 0.5, "eval_sampled_format": 1.0}
    log = [
        {"args": {}},
        {"step": 0, **held_out, "eval_greedy": 0.5},
        {"step": 1, **step},
        {"step": 2, **step, **held_out, "eval_greedy": greedy},
    ]
    rollouts = []
    for number in (1, 2):
        for i in range(10):
            asked = i < 4  # the judge, about four of them
            row = {"step": number, "text": text, "choice": 2}
            row |= {"result": float(i < 5), "kept": i != 5}
            rollouts.append(row | {"consistency": i % 2 if asked else None})
    write_rows(folder / "log.jsonl", log)
    write_rows(folder / "rollouts-0.jsonl", rollouts)


def run_compare(*words):
    command = [sys.executable, "toy/compare.py", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_runs_are_compared_in_a_table_and_curves(tmp_path):
    write_run(tmp_path / "a-0", 0.7, SLIP)
    write_run(tmp_path / "a-1", 0.8, SLIP, consistency=None)  # nobody was right
    write_run(tmp_path / "b-0", 0.6, GLANCE)
    out = tmp_path / "both"
    done = run_compare(f"A={tmp_path}/a-", f"B={tmp_path}/b-", "--out", out)
    assert done.returncode == 0, done.stderr
    found = {}
    for line in (tmp_path / "both.md").read_text().splitlines():
        if line:
            _, title, *cells = [cell.strip() for cell in line.split("|")]
            found[title] = cells[:2]
    judge = "ones that the judge takes for consistent, verdict 1 and verdict 2, %"
    nobody = "none (0 of 1 runs)"
    expected = {
        "": ["A", "B"],
        "seeds": ["2", "1"],
        "greedy accuracy, after, %": ["75.0 ± 7.1", "60.0"],
        "consistency of right verdicts, %, last step": ["50.0 (1 of 2 runs)", "50.0"],
        "contradictions among descriptions, last five steps, %": ["100.0 ± 0.0", "0.0"],
        f"contradictory {judge}": ["none (0 of 2 runs) and 50 ± 0", f"{nobody} and {nobody}"],
        "hasty, first five steps to last five, %": ["0 to 0", "100 to 100"],
        "tokens pre-clipped, of all": ["8 of 800", "4 of 400"],
        "judgements filtered, of all": ["4 of 40", "2 of 20"],
        "right judgements filtered, %": ["0.0 ± 0.0", "0.0"],
        "wrong judgements filtered, %": ["20.0 ± 0.0", "20.0"],
    }
    assert {title: found[title] for title in expected} == expected
    assert found[f"consistent {judge}"][1] == f"{nobody} and 50"
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


def test_the_curves_are_of_every_run(tmp_path):
    write_run(tmp_path / "a-0", 0.7, SLIP)
    write_run(tmp_path / "a-1", 0.8, SLIP)
    runs = compare.read_runs("A", f"{tmp_path}/a-")
    assert compare.values_by_step(runs, "eval_greedy") == {0: [0.5, 0.5], 2: [0.7, 0.8]}
    assert compare.values_by_step(runs, "loss_max") == {1: [0.5, 0.5], 2: [0.5, 0.5]}


def test_tokens_that_rose_are_counted_where_the_log_has_them():
    step = {"length": 20.0, "samples": 10}
    steps = [step | {"risen": 0.01}, step | {"risen": 0.0, "length": 60.0}]
    run = compare.Run(steps, [], None, None, {}, {})
    assert run.risen_in_a_thousand == pytest.approx(2.5)  # 2 of 200 and 0 of 600
    assert compare.Run([step], [], None, None, {}, {}).risen_in_a_thousand is None


def test_a_setting_without_runs_and_an_unfinished_run_are_refused(tmp_path):
    with pytest.raises(compare.InputError, match="c-: no run there; expected NAME=FOLDER/PREFIX"):
        compare.read_runs("C", f"{tmp_path}/c-")
    write_run(tmp_path / "a-0", 0.7, SLIP)
    rows = (tmp_path / "a-0" / "log.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "a-0" / "log.jsonl").write_text("".join(rows[:-1]))
    with pytest.raises(compare.InputError, match=r"a-0: expected two held-out accuracies.*got 1"):
        compare.read_runs("A", f"{tmp_path}/a-")


# --------------------------------------------------------------------------------------------------
# toy/report.py


def test_the_report_shows_scores_training_and_seconds(tmp_path):
    lines = {"one sample": {"overall": [60.0, 57.0, 63.0]}, "voting@15": {"overall": [None] * 3}}
    result = {"about": {"rows": 1200}, "lines": lines}
    for model in ("rl", "base"):
        folder = tmp_path / f"eval-{model}"
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps({"benches": {"pairs": result}}))
    write_rows(tmp_path / "sft" / "log.jsonl", [{"val_loss": 2.0}, {"val_loss": 1.5}])
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "world").write_text("12\n")
    (tmp_path / "done" / "sft").write_text("1300\n")
    text = report.report(tmp_path)
    assert "| pairs | 1,200 | base model | 60.0 ± 3.0 |" in text
    assert text.index("base model |") < text.index("StableReinforce |")
    assert "| sft: val_loss | 2.000 | 1.500 |" in text
    assert "| all | 1,312 |" in text
    assert "hasty 60%" in text
