"""The pair and its files: what is read, what is refused, and the journal of a killed process."""

import dataclasses
import json
import os

import pytest

from core.files import Journal, atomic_write, check_same_settings
from core.pairs import (
    CHECKS,
    CRITIQUE_PROMPT,
    JUDGING_PROMPT,
    InputError,
    Pair,
    check_pairs,
    critique_turns,
    digest_of,
    judging_turns,
    read_pairs,
    row_from_pair,
    swap,
    write_pairs,
)

ROW = {
    "id": "x",
    "source": "toy",
    "question": "Q",
    "images": ["a/b.png"],
    "video": None,
    "responses": ["a", "b"],
    "choice": 1,
    "attempts": None,
    "annotation": None,
}
PAIR = Pair(**ROW)


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ------------------------------------------------------------------------------------------------
# Pairs


def test_pairs_survive_writing_and_reading(tmp_path):
    path = tmp_path / "deep/pairs.jsonl"
    pair = dataclasses.replace(
        PAIR,
        images=[str(tmp_path / "a.png")],
        video=[str(tmp_path / "v/1.png")],
        annotation="\u2028 \ud83d x",  # a line separator and half of a surrogate pair
        critiques=["good", "bad"],
        extra={"contradicted": False, "key": [1]},
    )
    write_pairs(path, [pair, pair])
    assert '"../a.png"' in path.read_text()  # the folder can be moved
    pair.annotation = "\u2028 ? x"
    for back in read_pairs(path):
        back.images = [os.path.normpath(image) for image in back.images]
        back.video = [os.path.normpath(frame) for frame in back.video]
        assert back == pair
    assert len(read_pairs(path, limit=1)) == 1


def test_a_row_has_its_fields_in_order_and_no_empty_extras():
    assert list(row_from_pair(PAIR)) == list(ROW)
    more = dataclasses.replace(PAIR, critiques=["x", "y"], extra={"contradicted": True})
    assert list(row_from_pair(more)) == [*ROW, "critiques", "contradicted"]


def test_a_wrong_pair_leaves_the_old_file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    write_pairs(path, [PAIR])
    wrong = dataclasses.replace(PAIR, choice=3)
    with pytest.raises(InputError, match=r"pair 2 of .*'choice' is 3; expected 1 or 2"):
        write_pairs(path, [PAIR, wrong])
    assert len(read_pairs(path)) == 1


@pytest.mark.parametrize(
    "field, value",
    [
        ("id", ""),
        ("id", 1),
        ("source", None),
        ("question", 1),
        ("images", None),
        ("images", [""]),
        ("video", []),
        ("video", "a"),
        ("responses", ["a"]),
        ("responses", ["a", " "]),
        ("choice", "1"),
        ("choice", True),
        ("attempts", 5),
        ("attempts", True),
        ("annotation", 1),
        ("critiques", ["a"]),
    ],
)
def test_each_field_is_checked(tmp_path, field, value):
    path = write_rows(tmp_path / "pairs.jsonl", ROW, ROW | {field: value})
    with pytest.raises(InputError) as error:
        read_pairs(path)
    assert f"line 2: '{field}' is {json.dumps(value)}" in str(error.value)
    assert f"expected {CHECKS[field][0]}" in str(error.value)


@pytest.mark.parametrize("field", ROW)
def test_each_field_is_needed(tmp_path, field):
    row = {name: value for name, value in ROW.items() if name != field}
    with pytest.raises(InputError, match=f"line 1 has no '{field}'; expected"):
        read_pairs(write_rows(tmp_path / "pairs.jsonl", row))


@pytest.mark.parametrize(
    "text, message",
    [
        ("[]\n", "line 1: expected an object with id, .*, got list"),
        ("{\n", "line 1 is not JSON .*Is the file cut off"),
        ("\n", "line 1 is empty"),
        ('{"id": "\\\n', "line 1 is not JSON"),
    ],
)
def test_a_line_that_is_no_pair_is_named(tmp_path, text, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_pairs(path)


def test_a_missing_file_and_a_missing_picture_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file; expected a JSONL file of pairs"):
        read_pairs(tmp_path / "none.jsonl")
    (tmp_path / "there.png").touch()
    there = dataclasses.replace(PAIR, images=[str(tmp_path / "there.png")])
    gone = dataclasses.replace(PAIR, images=[], video=[str(tmp_path / "gone.png")])
    check_pairs("p.jsonl", [there])
    with pytest.raises(
        FileNotFoundError, match=r"p.jsonl, line 2 \(x\): .*gone.png does not exist"
    ):
        check_pairs("p.jsonl", [there, gone])


def test_no_text_has_half_of_a_surrogate_pair(tmp_path):
    half = "\ud83d x"
    row = ROW | {"id": half, "question": half, "responses": [half, "b"], "annotation": half}
    (pair,) = read_pairs(write_rows(tmp_path / "pairs.jsonl", row | {"critiques": [half, "c"]}))
    for text in (pair.id, pair.question, *pair.responses, pair.annotation, *pair.critiques):
        text.encode()
    assert pair.question == "? x"


@pytest.mark.parametrize("limit", [0, None])
def test_a_missing_file_is_told_even_if_nothing_of_it_is_read(tmp_path, limit):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_pairs(tmp_path / "none.jsonl", limit)


@pytest.mark.parametrize(
    "line, problem",
    [
        ('{"id": ' + "[" * 100_000, "line 1 is not JSON"),
        (json.dumps(ROW | {"question": "x" * 10_000_000}), "10,000,000 characters long"),
        (json.dumps(ROW | {"choice": "x" * 1000}), "'choice' is \"xxx"),
        (json.dumps(ROW | {"images": ["a\0.png"]}), "'images' is"),
    ],
)
def test_hostile_lines_are_refused_in_few_words(tmp_path, line, problem):
    path = tmp_path / "pairs.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(InputError) as error:
        read_pairs(path)
    assert problem in str(error.value)
    assert len(str(error.value)) - len(str(path)) < 300


def test_the_digest_of_pairs_is_of_all_that_is_trained_on():
    changes = [("question", "R"), ("responses", ["a", "c"]), ("choice", 2), ("annotation", "x")]
    digests = {digest_of([PAIR]), digest_of([PAIR, PAIR])}
    digests |= {digest_of([dataclasses.replace(PAIR, **{name: new})]) for name, new in changes}
    assert len(digests) == 2 + len(changes)
    assert digest_of([dataclasses.replace(PAIR)]) == digest_of([PAIR])


def test_pictures_come_first_and_swapping_concerns_the_responses_alone():
    pair = dataclasses.replace(PAIR, video=["1.png", "2.png"], critiques=["good", "bad"])
    image, video, text = judging_turns(pair)[0]["content"]
    assert image == {"type": "image", "image": "a/b.png"}
    assert video == {"type": "video", "video": ["1.png", "2.png"]}
    assert text["text"] == JUDGING_PROMPT.format(question="Q", answer1="a", answer2="b")
    assert judging_turns(pair, swapped=True) == judging_turns(swap(pair))
    assert swap(pair).critiques == ["bad", "good"]
    critique = critique_turns(pair, 1)[0]["content"][-1]["text"]
    assert critique == CRITIQUE_PROMPT.format(question="Q", answer="b")


# ------------------------------------------------------------------------------------------------
# Files


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new/file"
    with pytest.raises(KeyError), atomic_write(path) as file:
        file.write(b"half")
        raise KeyError
    assert not path.exists()
    with atomic_write(path) as file:
        file.write(b"all")
        assert not path.exists()
    assert path.read_bytes() == b"all"


def test_a_journal_gives_back_what_was_appended(tmp_path):
    with Journal(tmp_path / "new/journal.jsonl") as journal:
        first, second = journal.append([{"n": 1}, {"n": 2}])
        (third,) = journal.append([{"n": "\u2028"}])
        assert journal.append([]) == []
        assert journal.read(second) == {"n": 2}
        journal.append([{"n": 4}])  # reading does not move the end
    with Journal(tmp_path / "new/journal.jsonl") as journal:
        rows = list(journal.rows())
    assert [offset for _, offset, _ in rows][:3] == [first, second, third]
    assert [row["n"] for _, _, row in rows] == [1, 2, "\u2028", 4]
    assert rows[3][0].endswith("journal.jsonl, line 4")


def test_half_a_last_line_is_cut_off_at_every_byte_of_it(tmp_path, capsys):
    path = tmp_path / "journal.jsonl"
    whole = b'{"id": "w"}\n'
    last = b'{"id": "x", "text": "a\\nb"}\n'
    for size in range(len(last)):
        path.write_bytes(whole + last[:size])
        with Journal(path) as journal:
            assert [row for _, _, row in journal.rows()] == [{"id": "w"}]
        message = f"cut off the last {size} bytes, a half-written line"
        assert (message in capsys.readouterr().out) == (size > 0)
    path.write_bytes(whole[:5])
    with Journal(path) as journal:
        assert list(journal.rows()) == []


def test_two_writers_of_one_journal_are_refused(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path), pytest.raises(InputError, match=r"another run is writing to .*--out"):
        Journal(path)
    Journal(path).close()  # the lock ends with its holder


def test_a_damaged_journal_is_named_by_its_line(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_text("{}\n{\n")
    with Journal(path) as journal, pytest.raises(InputError, match="line 2 is not JSON"):
        list(journal.rows())


def test_other_settings_are_listed_with_both_values():
    check_same_settings("out", {"a": 1, "b": None}, {"a": 1})
    with pytest.raises(InputError) as error:
        check_same_settings("out", {"a": 1, "b": "x"}, {"a": 2, "c": 0}, "Choose another --out")
    assert str(error.value) == (
        "out belongs to another run: a was 1, is now 2; b was 'x', is now None; "
        "c was None, is now 0. Choose another --out"
    )
