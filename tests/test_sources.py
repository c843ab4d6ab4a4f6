"""Each training source in its own schema: what its rows, files and pictures become."""

import base64
import contextlib
import doctest
import hashlib
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import png, write_rows

import sources
from core.files import InputError
from core.pictures import BadPicture
from sources import TASKS, TRAINING, arxivqa, collecting, r1_reward_rl, reading
from sources.reading import Dropped, FoundPair
from toy import server
from toy import sources as toy_sources

RATINGS = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")


def read(name, path):
    return list(reading.read_records(TRAINING[name], str(path)))


def read_one(name, row, folder):
    """What read_records() makes of one row in a folder."""
    path = write_rows(folder / "rows.jsonl", [row])
    ((_, record),) = read(name, path)
    return record


# ------------------------------------------------------------------------------------------------
# The folder


def test_the_training_sources_are_those_of_table_2_the_released_set_and_your_own():
    table_2 = {"RLAIF-V", "VLFeedback", "POVID", "WildVision-Battle", "MM-RLHF"}
    assert set(TRAINING) == table_2 | {"R1-Reward-RL", "pairs"}


def test_a_new_file_is_a_new_source(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text('KIND = "training"\nNAME = "Mine"\n')
    monkeypatch.setattr(sources, "__path__", [*sources.__path__, str(tmp_path)])
    try:
        assert set(sources.data_sets("training")) == {*TRAINING, "Mine"}
    finally:
        sys.modules.pop("sources.mine", None)


# ------------------------------------------------------------------------------------------------
# A row of each source


def completion(response, *ratings):
    notes = {name: {"Rating": rating, "Rationale": ""} for name, rating in zip(RATINGS, ratings)}
    return {"annotations": notes, "model": "m", "response": response}


def llava(*texts):
    return [{"from": who, "value": text} for who, text in zip(("human", "gpt") * 2, texts)]


def chat(*texts):
    return [{"role": who, "content": text} for who, text in zip(("user", "assistant") * 2, texts)]


def released(text, **more):
    content = [{"type": "text", "text": text}, {"type": "image", "image": "/their/disk/a.png"}]
    return {"message": json.dumps([{"role": "user", "content": content}])} | more


PROMPT = (
    "Judge. [Question]: Q\n#### [Response 1]: bad\n###### [Response 2]: good\n"
    "### Output Format (strictly follow)\nx"
)
ROWS = {
    "RLAIF-V": (
        {"idx": 7, "question": "Q", "chosen": "good", "rejected": "bad", "image": "a.png"},
        "RLAIF-V-7",
    ),
    "VLFeedback": (
        {
            "id": "x",
            "prompt": "Q",
            "completions": [
                completion("so so", "3", "4", "3"),
                completion("bad", "1", "2", "1"),
                completion("good", "5", "5", "5"),
                completion("as good", "5", "5", "5"),
                completion("", "5", "5", "5"),
            ],
            "img_path": "merged_images/a.png",
        },
        "x",
    ),
    "POVID": (
        {
            "id": "hallucination_pair-1",
            "image": "a.png",
            "conversations": llava("<image>\nQ", "good"),
            "rejected_conversations": llava("<image>\nQ", "bad"),
        },
        "hallucination_pair-1",
    ),
    "WildVision-Battle": (
        {
            "conversation_a": chat("Q", "bad"),
            "conversation_b": chat("Q", "good"),
            "image": {"bytes": None, "path": "a.png"},
            "winner": "model_b",
        },
        "wildvision-battle-0",
    ),
    "MM-RLHF": (
        {"id": 5, "prompt": "Q", "chosen": "good", "rejected": "bad", "image": "long/a.png"},
        "5",
    ),
    "R1-Reward-RL": (released(PROMPT, answer=["<answer>2</answer>"]), "R1-Reward-RL-0"),
    "pairs": ({"prompt": "Q", "chosen": "good", "rejected": "bad", "image": "a.png"}, "row-0"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_becomes_a_pair(tmp_path, name):
    (tmp_path / "a.png").write_bytes(png())
    row, pair_id = ROWS[name]
    assert read_one(name, row, tmp_path) == FoundPair(
        id=pair_id,
        question="Q",
        better="good",
        worse="bad",
        images=[str(tmp_path / "a.png")],
        source="MM-RLHF-Long" if name == "MM-RLHF" else name,
    )


@pytest.mark.parametrize(
    "name, change, reason",
    [
        ("VLFeedback", {"completions": [completion("a", "1"), completion("b", "1")]}, "tie"),
        (
            "VLFeedback",
            {"completions": [completion("a", "1"), completion(" ", "2")]},
            "empty answer",
        ),
        (
            "VLFeedback",
            {"completions": [completion("a", "1"), completion("b", "nan")]},
            "non-numeric rating",
        ),
        ("POVID", {"rejected_conversations": llava("P", "bad")}, "different histories"),
        ("WildVision-Battle", {"winner": "tie (bothbad)"}, "tie"),
        ("WildVision-Battle", {"winner": None}, "no winner"),
        ("MM-RLHF", {"is_tie": True}, "tie"),
        ("MM-RLHF", {"image": None, "video": "none"}, "missing frames"),
        ("R1-Reward-RL", {"answer": ["neither"]}, "no verdict"),
        ("R1-Reward-RL", released("Which is better?"), "unknown layout"),
        ("pairs", {"chosen": " "}, "empty answer"),
        ("pairs", {"rejected": None}, "empty answer"),
        ("pairs", {"chosen": "bad "}, "same answers"),
        ("pairs", {"video": "none"}, "missing frames"),
    ],
)
def test_a_row_that_makes_no_pair_is_dropped(tmp_path, name, change, reason):
    record = read_one(name, ROWS[name][0] | change, tmp_path)
    assert isinstance(record, Dropped) and record.reason == reason
    assert record.source.startswith(name)


def test_mm_rlhf_counts_its_ties_in_their_category(tmp_path):
    row = ROWS["MM-RLHF"][0] | {"is_tie": True}
    assert read_one("MM-RLHF", row, tmp_path).source == "MM-RLHF-Long"


def test_vlfeedback_may_be_a_list_of_dicts_or_a_dict_of_lists(tmp_path):
    row, _ = ROWS["VLFeedback"]
    completions = row["completions"]
    annotations = {}
    for name in RATINGS:
        ratings = [completion["annotations"][name]["Rating"] for completion in completions]
        annotations[name] = {"Rating": ratings}
    responses = [completion["response"] for completion in completions]
    turned = {"annotations": annotations, "response": responses}
    as_dict = read_one("VLFeedback", row | {"completions": turned}, tmp_path)
    assert as_dict == read_one("VLFeedback", row, tmp_path)


def test_the_picture_of_a_released_row_may_be_inside_it(tmp_path):
    row, _ = ROWS["R1-Reward-RL"]
    inside = "data:image/png;base64," + base64.b64encode(png()).decode()
    assert read_one("R1-Reward-RL", row | {"image": inside}, tmp_path).images == [png()]
    assert read_one("R1-Reward-RL", row | {"image": ""}, tmp_path).images == [None]


def test_earlier_turns_are_part_of_the_question(tmp_path):
    row, _ = ROWS["WildVision-Battle"]
    turns = {
        "conversation_a": chat("Q", "A", "R", "bad"),
        "conversation_b": chat("Q", "A", "R", "good"),
    }
    record = read_one("WildVision-Battle", row | turns, tmp_path)
    assert record.question == "user: Q\nassistant: A\nuser: R"
    assert (record.better, record.worse) == ("good", "bad")


def test_text_that_cannot_be_sent_is_replaced(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "half \\ud83d", "chosen": "\\ud83d\\ude00", "rejected": "x"}\n')
    ((_, record),) = read("pairs", path)
    assert (record.question, record.better) == ("half ?", "\U0001f600")


def test_the_examples_are_true():
    assert doctest.testmod(reading) == (0, 2)
    assert doctest.testmod(arxivqa) == (0, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", toy_sources.PLANTED)
def test_a_reader_drops_every_planted_row_and_no_other(toy_world, tmp_path, name):
    """The better response of the rest is the right one in the answer key, for these pictures."""
    data = toy_world / "out/toy/data"
    path = data / "train" / ("pairs.jsonl" if name == "pairs" else name)
    collecting.collect_source(TRAINING[name], str(path), tmp_path / "rows", tmp_path / "images")
    rows = [json.loads(line) for line in (tmp_path / "rows").open()]
    assert Counter(row["reason"] for row in rows if "reason" in row) == toy_sources.PLANTED[name]
    key = server.load_key([data / "key.jsonl"])
    for row in rows:
        if "pair" not in row:
            continue
        pair = row["pair"]
        pictures = [Path(picture).read_bytes() for picture in pair["video"] or pair["images"]]
        items = key[toy_sources.world.key_of(pair["question"], pictures)]
        better, worse = pair["responses"]
        right = [item for item in items if item["answers"][item["right"]] == better]
        assert any(worse in item["answers"] for item in right)


# ------------------------------------------------------------------------------------------------
# Tables


GOOD = json.dumps({"prompt": "Q", "chosen": "a", "rejected": "b"}) + "\n"


@pytest.mark.parametrize(
    "name, file, content, message",
    [
        ("pairs", "none.jsonl", None, "none.jsonl: no such file or folder"),
        ("MM-RLHF", "a.txt", b"", "expected a .jsonl, .json or .parquet file, got .txt"),
        ("pairs", "a.jsonl", (GOOD + GOOD[:20]).encode(), "a.jsonl, line 2 is not JSON"),
        ("pairs", "a.jsonl", b'{"prompt": "\xff"}\n', "a.jsonl, line 1 is not JSON"),
        ("pairs", "a.jsonl", (GOOD + "\n" + GOOD).encode(), "a.jsonl, line 2 is empty"),
        ("POVID", "a.json", b"[{", "a.json is not JSON"),
        ("POVID", "a.json", b"{}", "a.json: expected one list of objects, got dict"),
        ("POVID", "a.json", b"[{}]", "a.json, item 1 lacks id, image, conversations, rej"),
        ("RLAIF-V", "a.parquet", b"PAR1" + bytes(100), "after row 0: not readable as parquet"),
        (
            "MM-RLHF",
            "a.jsonl",
            b'{"prompt": "Q", "rejected": "x"}\n',
            "line 1 lacks id, chosen; a row of MM-RLHF is an object with id, prompt, chosen, rej",
        ),
        ("pairs", "a.jsonl", b"[]\n", "line 1 lacks prompt, chosen, rejected"),
        (
            "pairs",
            "a.jsonl",
            b'{"prompt": 1, "chosen": "a", "rejected": "b"}\n',
            "the question is 1; expected a text",
        ),
        (
            "R1-Reward-RL",
            "a.jsonl",
            b'{"message": "{", "answer": ["1"]}\n',
            "see sources/r1_reward_rl.py",
        ),
    ],
)
def test_a_bad_file_is_named_with_the_place(tmp_path, name, file, content, message):
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError) as error:
        read(name, tmp_path / file)
    assert message in str(error.value)


def test_a_folder_is_searched_for_the_first_pattern_that_matches(tmp_path):
    with pytest.raises(InputError, match=r"has no \*.parquet or data/\*.parquet; give the"):
        read("RLAIF-V", tmp_path)
    (tmp_path / "b.json").write_text("[1]")
    (tmp_path / "a.json").write_text("[2, 3]")
    (tmp_path / "c.jsonl").write_text("4\n")
    rows = [row for _, row in reading.table_rows(tmp_path, ["*.parquet", "*.json", "*.jsonl"])]
    assert rows == [2, 3, 1]


def test_parquet_rows_are_numbered_across_batches(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"image": {"bytes": png(), "path": "a.png"}, "number": number} for number in range(70)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = list(reading.table_rows(tmp_path / "a.parquet", []))
    assert [row for _, row in found] == rows
    assert found[69][0] == f"{tmp_path}/a.parquet, row 70"


# ------------------------------------------------------------------------------------------------
# Pictures


def test_a_path_on_another_disk_is_found_by_its_end(tmp_path):
    (tmp_path / "images/a").mkdir(parents=True)
    path = tmp_path / "images/a/1.png"
    path.write_bytes(b"")
    folder = str(tmp_path)
    assert reading.find_file(folder, "/their/disk/images/a/1.png") == str(path)
    assert reading.find_file(folder, "a/1.png", "images") == str(path)
    for name in ("/their/disk/2.png", None, "", "a\0b"):
        assert reading.find_file(folder, name) is None
    assert reading.find_file(folder, "https://a/b.png") == "https://a/b.png"
    assert reading.find_file(folder, {"bytes": b"x", "path": "images/a/1.png"}) == b"x"
    assert reading.find_file(folder, {"bytes": None, "path": "images/a/1.png"}) == str(path)


def test_frames_are_in_the_order_of_their_numbers(tmp_path):
    for name in ("f10.jpg", "f9.jpg", "f1.PNG", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    names = [Path(path).name for path in reading.frames_in(tmp_path)]
    assert names == ["f1.PNG", "f9.jpg", "f10.jpg"]
    assert reading.frames_in(tmp_path / "none") == reading.frames_in(None) == []


def test_a_row_may_name_images_or_a_video(tmp_path):
    (tmp_path / "v").mkdir()
    frame = tmp_path / "v/1.png"
    frame.write_bytes(b"")
    for row, expected in [
        ({}, ([], None)),
        ({"image": "v/1.png"}, ([str(frame)], None)),
        ({"images": ["v/1.png", "2.png"]}, ([str(frame), None], None)),
        ({"video": "v", "image": "2.png"}, ([], [str(frame)])),
        ({"video": ["v/1.png"]}, ([], [str(frame)])),
    ]:
        assert reading.find_images_or_video(row, str(tmp_path)) == expected


def test_bytes_become_a_file_and_paths_stay(tmp_path):
    data = png()
    path, pixels = reading.store_picture(data, tmp_path)
    assert Path(path).read_bytes() == data
    assert Path(path).name == hashlib.sha256(data).hexdigest()[:32] + ".png"
    assert reading.store_picture(path, tmp_path / "none") == (path, pixels)
    assert reading.store_picture(data, tmp_path) == (path, pixels)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [Path(path)]


def test_the_hash_is_of_the_pixels_whatever_the_format():
    red, _ = reading.check_picture(png())
    assert reading.check_picture(png(kind="BMP")) == (red, "BMP")
    assert reading.check_picture(png(colour="blue"))[0] != red
    assert reading.check_picture(png(size=(4, 16)))[0] != red


@pytest.mark.parametrize(
    "picture, reason",
    [
        ("https://example.org/a.png", "picture is a URL"),
        (None, "missing image"),
        ("none.png", "missing image"),
        (b"text", "unreadable image"),
        (png((64, 64), kind="JPEG")[:-200], "unreadable image"),
    ],
)
def test_a_picture_that_cannot_be_used_has_a_reason(tmp_path, picture, reason):
    with contextlib.chdir(tmp_path), pytest.raises(BadPicture) as error:
        reading.store_picture(picture, tmp_path)
    assert error.value.reason == reason


# --- hostile rows


def test_a_judging_prompt_without_end_is_read_in_linear_time():
    text = "[Question]: ; [Response 1]: " * 40_000
    assert r1_reward_rl.cut_prompt(text) is None
    assert r1_reward_rl.cut_prompt(
        text + "\n## [Response 2]: b\n# Output Format (strictly follow)x"
    )


@pytest.mark.parametrize(
    "field, value, problem",
    [
        ("question", 5, "the question is 5; expected a text"),
        ("answer", ["a"], "expected a text"),
        ("images", [5], "does not read as a row of tasks"),
        ("image", {"path": "a"}, "does not read as a row of tasks"),
    ],
)
def test_a_task_with_a_field_of_another_type_is_named(tmp_path, field, value, problem):
    row = {"question": "Q", "answer": "a"} | {field: value}
    path = write_rows(tmp_path / "tasks.jsonl", [row])
    with pytest.raises(InputError, match=r"tasks\.jsonl, line 1") as error:
        list(reading.read_records(TASKS["tasks"], path))
    assert problem in str(error.value)


@pytest.mark.parametrize(
    "name, row, reason",
    [
        ("tasks", {"question": None, "answer": "a"}, "question is null"),
        ("tasks", {"question": "Q", "answer": None}, "answer is null"),
        ("arXivQA", {"label": None}, "label is null"),
        ("arXivQA", {"options": ["x", None]}, "an option is null"),
    ],
)
def test_a_task_whose_field_is_null_is_dropped(tmp_path, name, row, reason):
    row = {"id": 1, "options": ["x", "y"], "image": "a.png", "question": "Q", "label": "A"} | row
    path = write_rows(tmp_path / "tasks.jsonl", [row])
    ((_, record),) = reading.read_records(TASKS[name], path)
    assert isinstance(record, Dropped) and (record.reason, record.source) == (reason, name)


@pytest.mark.parametrize("cell", [{"bytes": png(), "path": None}, {"bytes": None, "path": "a.png"}])
def test_a_picture_of_thinklite_may_be_a_cell_of_bytes_and_path(tmp_path, cell):
    (tmp_path / "a.png").write_bytes(png())
    row = {"id": 1, "problem": "<image>Q", "answer": 4, "image": cell}
    image = TASKS["ThinkLite-VL"].read_row(row, 0, tmp_path).images[0]
    assert image == (cell["bytes"] or str(tmp_path / "a.png"))


@pytest.mark.parametrize(
    "label, options, letter",
    [
        ("**b**", ["Red", "Blue"], "B"),
        ("Answer: A", ["A) Red", "B) Blue"], "A"),
        ("- B", ["A) Red", "B) Blue"], "B"),
        ("Blue", ["A) Red", "B) Blue"], "B"),
        ("A blue car", ["A red car", "A blue car"], "B"),
    ],
)
def test_a_label_of_arxivqa_is_read_as_it_is_spelled(label, options, letter):
    assert arxivqa.answer_letter(label, options) == letter


def test_the_letter_of_no_option_is_no_label():
    with pytest.raises(Dropped, match="no label"):
        arxivqa.answer_letter("C) 3", ["3", "4"])


def test_texts_of_tasks_and_benchmarks_have_no_half_surrogates(tmp_path):
    path = write_rows(tmp_path / "tasks.jsonl", [{"question": "\ud83d", "answer": 5}])
    ((_, task),) = reading.read_records(TASKS["tasks"], path)
    assert (task.question, task.answer) == ("?", "5")
    item = reading.BenchmarkItem("x", "\ud83d", ["\ud83d", "b"], 1, None, None, {})
    assert (item.question, item.responses) == ("?", ["?", "b"])


def test_a_text_above_a_million_characters_makes_no_pair():
    with pytest.raises(Dropped, match="text above 1,000,000 characters"):
        FoundPair("x", "Q", "a" * 1_000_001, "b", [], "toy")
