"""The readers on real rows of others' repositories, where these are at hand; none is kept here."""

import json
from collections import Counter
from pathlib import Path

import pytest
from conftest import write_rows
from evaluation import MM, RLHF, VL, greedy, random_judge, score

from sources import BENCHMARKS
from sources.arxivqa import answer_letter
from sources.benchmark_rows import rows_of_benchmark
from sources.checking import check_data
from sources.given_judgements import GivenJudgements
from sources.reading import Dropped

REAL = Path(__file__).resolve().parent.parent.parent / "shared" / "real"
pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason="the real rows are not here")


def rows_of(bench, file):
    return list(rows_of_benchmark(BENCHMARKS[bench], REAL / file, "no media"))


def counts_of(rows, grouping):
    return dict(Counter(row.groups[grouping] for row in rows))


@pytest.mark.parametrize("file", ["vl/data.jsonl", "vl/hub_rows.json"])
def test_both_groupings_of_vl_reward_bench(file):
    rows = rows_of(VL, file)
    in_benchmark = {"general": 183, "hallucination": 749, "reasoning": 318}
    assert counts_of(rows, "benchmark") == in_benchmark
    assert counts_of(rows, "paper") == {"general": 484, "hallucination": 448, "reasoning": 318}


def test_the_rows_and_sets_of_mm_rlhf_reward_bench():
    rows = rows_of(RLHF, "mm/mm_reward_bench.jsonl")
    in_rows = {"mcq": 42, "long": 37, "short": 34, "safety": 32, "video": 25}
    assert counts_of(rows, "category") == in_rows
    assert len({row.set for row in rows}) == 46
    result = score(rows, greedy("dataset"), random_judge(0), BENCHMARKS[RLHF].PUBLISHED)
    in_sets = {"mcq": 10, "long": 10, "short": 10, "safety": 6, "video": 10}
    assert result["groups"]["Acc+ category"] == in_sets
    columns = result["lines"]["one sample"]
    of_groups = [columns[f"Acc+ category: {name}"][0] * in_sets[name] for name in in_sets]
    assert sum(of_groups) == pytest.approx(columns["Acc+"][0] * 46, abs=0.1)


@pytest.mark.parametrize(
    "bench, file",
    [
        (VL, "vl/data.jsonl"),
        (VL, "vl/hub_rows.json"),
        (VL, "vl/hub_whole.json"),
        (RLHF, "mm/mm_reward_bench.jsonl"),
        (MM, "mrb/all_data.json"),
    ],
)
def test_nothing_is_wrong_with_files_as_they_are(bench, file):
    notes = check_data(BENCHMARKS[bench], rows_of(bench, file))
    assert notes and not [note for note in notes if "WARNING" in note]


def test_answers_that_are_nearly_always_on_one_side_are_noted():
    notes = check_data(BENCHMARKS[VL], rows_of(VL, "vl/hub_rows.json"))
    assert [note for note in notes if "the better answer is in 1245 of 1250 rows first" in note]


def test_the_hubs_later_file_is_known():
    """It lacks one row of reasoning and two of WildVision-Battle; which ones does not matter."""
    rows = rows_of(VL, "vl/hub_rows.json")
    left_out = [row for row in rows if row.id.startswith("wildvision")][:2]
    left_out += [row for row in rows if row.id.startswith("mathverse")][:1]
    rows = [row for row in rows if row not in left_out]
    notes = check_data(BENCHMARKS[VL], rows)
    assert len(rows) == 1247 and not [note for note in notes if "published file" in note]
    assert any("1247 rows as in the file that the hub has had since" in note for note in notes)
    notes = check_data(BENCHMARKS[VL], rows[1:])
    assert any("the published file has general 183" in note for note in notes)


@pytest.mark.parametrize(
    "bench, file",
    [(VL, "vl/data.jsonl"), (RLHF, "mm/mm_reward_bench.jsonl"), (MM, "mrb/all_data.json")],
)
def test_every_row_has_its_own_line_of_the_released_scripts(bench, file, tmp_path):
    """They write the benchmark's row with two more fields; ids repeat, and so do a few rows."""
    text = (REAL / file).read_text()
    rows = json.loads(text) if bench == MM else [json.loads(x) for x in text.splitlines()]
    lines = []
    for number, row in enumerate(rows):
        lines.append(row | {"rewards": [0, 1], "critic": f"<answer>{number}</answer>"})
    path = write_rows(tmp_path / "r1_reward.jsonl", lines)
    found = GivenJudgements(path, {bench: rows_of(bench, file)}).given
    assert [len(found[bench, number]) for number in range(len(rows))] == [1] * len(rows)
    texts = [found[bench, number][0].text for number in range(len(rows))]
    assert texts == [line["critic"] for line in lines]


def spellings():
    path = REAL / "tasks" / "arxivqa_labels.json"
    return json.loads(path.read_text()) if path.is_file() else []


@pytest.mark.parametrize("label, options, expected", spellings())
def test_every_spelling_of_a_label_of_arxivqa(label, options, expected):
    try:
        found = answer_letter(label, options)
    except Dropped:
        found = None
    assert found == expected
