"""The tables of results/, and the numbers that the two READMEs take from them."""

import json
import re

import pytest
from conftest import ROOT

from toy import coin, seeds_report

RESULTS = ROOT / "results"
WRITTEN_BY_HAND = {"README.md", "LOG.md", "released_code.md"}
NUMBER = re.compile(r"\d[\d,]*\.\d+(?: ± \d+\.\d+)?")


def generated():
    """What the commands wrote: all text of results/ that nobody typed."""
    files = [*RESULTS.glob("*.md"), *RESULTS.glob("*.txt")]
    return "\n".join(path.read_text() for path in files if path.name not in WRITTEN_BY_HAND)


def section(text, title):
    start = text.index(title)
    return text[start : text.index("\n## ", start + 1)]


def numbers_of_readme():
    text = (ROOT / "README.md").read_text()
    caption = text[text.index("*StableReinforce on the toy world") : text.index("## Score a pair")]
    return NUMBER.findall(caption + section(text, "## What the toy shows"))


def test_the_numbers_of_the_readme_stand_in_results():
    written = generated()
    numbers = numbers_of_readme()
    assert len(numbers) > 20
    missing = [number for number in numbers if number not in written]
    assert missing == []


@pytest.mark.parametrize("page", ["README.md", "released_code.md"])
def test_the_means_of_results_stand_in_its_tables(page):
    written = generated()
    text = (RESULTS / page).read_text()
    means = [number for number in NUMBER.findall(text) if "±" in number]
    assert len(means) > 20
    assert [mean for mean in means if mean not in written] == []


def write_results(folder, one_sample, voting):
    folder.mkdir()
    lines = {
        "one sample": {"overall": [one_sample, 0, 100]},
        "voting@15": {"overall": [voting, 0, 100]},
    }
    part = {"about": {"rows": 100}, "lines": lines}
    (folder / "results.json").write_text(json.dumps({"benches": {"pairs": part}}))


def test_seeds_are_averaged_and_what_no_run_has_is_left_out(tmp_path):
    write_results(tmp_path / "sft-0", 60.0, 70.0)
    write_results(tmp_path / "sft-1", 64.0, None)
    write_results(tmp_path / "rl-0", 80.0, None)
    settings = {
        name: seeds_report.read_results(name, tmp_path / f"{name}-") for name in ("sft", "rl")
    }
    assert seeds_report.table(settings).strip().splitlines() == [
        "| benchmark | rows | model | seeds | one sample | voting@15 |",
        "| --- | --- | --- | --- | --- | --- |",
        "| pairs | 100 | sft | 2 | 62.0 ± 2.8 | 70.0 |",
        "| pairs | 100 | rl | 1 | 80.0 |  |",
    ]
    with pytest.raises(ValueError, match=r"other=.*no run there; expected NAME=FOLDER/PREFIX"):
        seeds_report.read_results("other", tmp_path / "other-")


class Task:
    def __init__(self, answer):
        self.answer = answer


def test_tasks_are_sorted_by_the_lead_of_their_likeliest_answer():
    tasks = [Task("red"), Task("two"), Task("none")]
    before = {
        0: [["red"], ["two"], ["none"]],
        1: [["red"] * 4, ["two", "two", "one", "one"], ["none", "none", "none", "one"]],
    }
    after = {0: [["red"], ["one"], ["none"]], 1: [["red"] * 4, ["one"] * 4, ["none"] * 4]}
    assert coin.table(tasks, before, after).strip().splitlines()[2:] == [
        "| all | 3 | 50.0 | 100.0 | 66.7 | 75.0 | 66.7 |",
        "| smallest leads | 1 | 0.0 | 100.0 | 0.0 | 50.0 | 0.0 |",
        "| middle | 1 | 50.0 | 100.0 | 100.0 | 75.0 | 100.0 |",
        "| largest leads | 1 | 100.0 | 100.0 | 100.0 | 100.0 | 100.0 |",
    ]
