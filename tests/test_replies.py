"""No pair is asked about more than three times, whatever stands in the journal."""

import json

import pytest
from conftest import annotator, http_server, read_rows, send, write_rows

import annotate
from core.files import InputError
from core.pairs import read_pairs


def run(path, out, url, *words):
    annotate.main(["--data", f"pairs={path}", "--out", str(out), "--base_url", url, *words])


@pytest.fixture
def path(tmp_path):
    rows = [{"prompt": f"Q{i}", "chosen": "good", "rejected": "bad"} for i in range(3)]
    return write_rows(tmp_path / "pairs.jsonl", rows)


@pytest.mark.parametrize(("mode", "each"), [("judge", 3), ("critique", 2)])
def test_doubled_lines_are_ignored_and_told(tmp_path, capsys, path, mode, each):
    out, words = tmp_path / "out", ["--mode", mode]
    with annotator() as stand_in:
        run(path, out, stand_in.url, *words)
        assert stand_in.stats["requests"] == 3 * each
    (name,) = out.glob("journal*.jsonl")
    journal = name.read_text().splitlines(keepends=True)
    # every line twice, and one attempt more than there are
    more = json.loads(journal[-1]) | {"attempt": each + 1}
    name.write_text("".join([journal[0], *journal[1:], *journal[1:], json.dumps(more) + "\n"]))
    with annotator() as stand_in:
        run(path, out, stand_in.url, *words)
        assert stand_in.stats["requests"] == 0
    printed = capsys.readouterr().out
    assert f"{name}, line {3 * each + 2}: ignored, because this attempt is in" in printed
    assert f"{3 * each + 1} such lines in all" in printed
    if mode == "judge":
        assert {pair.attempts for pair in read_pairs(out / "pairs.jsonl")} == {4}
        assert f"{3 * each} replies" in (out / "report.md").read_text()


def test_after_a_doubled_line_only_what_is_missing_is_asked(tmp_path, path):
    out = tmp_path / "out"
    with annotator() as stand_in:
        run(path, out, stand_in.url)
    name = out / "journal.jsonl"
    journal = name.read_text().splitlines(keepends=True)
    first = [line for line in journal[1:] if json.loads(line)["attempt"] == 1]
    name.write_text("".join([journal[0], *first, *first]))
    with annotator() as stand_in:
        run(path, out, stand_in.url)
        assert stand_in.stats["requests"] == 6
    attempts = [(row["id"], row["attempt"]) for row in read_rows(name)[7:]]
    assert len(set(attempts)) == 6 and {number for _, number in attempts} == {2, 3}


def test_ids_that_look_like_swapped_ones_are_told_apart(tmp_path):
    rows = []
    for number, name in enumerate(("a", "a#swapped", "b#swapped", "a#swapped#2")):
        row = {"id": name, "prompt": f"Q{number}", "chosen": "good", "rejected": "bad"}
        rows.append(row)
    path, out = write_rows(tmp_path / "pairs.jsonl", rows), tmp_path / "out"
    with annotator() as stand_in:
        run(path, out, stand_in.url, "--both_orders")
        assert stand_in.stats["requests"] == 8 * 3
    pairs = read_pairs(out / "pairs.jsonl")
    assert len({pair.id for pair in pairs}) == 8
    for pair, other in zip(pairs[::2], pairs[1::2]):
        assert other.id == pair.id + "#swapped" and other.question == pair.question
        assert not pair.id.endswith("#swapped")
    assert len(read_rows(out / "journal.jsonl")) == 1 + 8 * 3


def test_a_journal_that_begins_with_something_else_is_named(tmp_path, path):
    out = tmp_path / "out"
    with annotator() as stand_in:
        run(path, out, stand_in.url)
        (out / "journal.jsonl").write_text("[]\n")
        with pytest.raises(InputError, match="does not begin with the settings of a run"):
            run(path, out, stand_in.url)


def test_a_key_that_cannot_be_sent_stops_before_the_sources_are_read(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-a b")
    with pytest.raises(InputError, match="OPENAI_API_KEY holds a space"):
        run("none.jsonl", tmp_path / "out", "http://127.0.0.1:9/v1")
    assert not (tmp_path / "out").exists()


def test_one_cause_is_told_once_whatever_the_server_adds(tmp_path, capsys, path):
    """A server that numbers its refusals."""
    numbers = iter(range(100))
    with (
        http_server(lambda handler, _: send(handler, f"no. {next(numbers)}".encode(), 400)) as url,
        pytest.raises(InputError, match="3 of 3 pairs got no answer"),
    ):
        run(path, tmp_path / "out", url)
    assert capsys.readouterr().out.count("is left for the next run: status 400") == 1
