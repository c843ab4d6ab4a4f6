"""The benchmarks' readers, on files in the benchmarks' own schemas, and the check of their rows."""

import dataclasses
import doctest
import json
import random
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from evaluation import (
    FILES,
    MM,
    RLHF,
    VL,
    always,
    args_of,
    judged,
    make_row,
    toy_rows,
)

import evaluate
from core.files import InputError
from core.judgements import Protocol
from sources import (
    BENCHMARKS,
    multimodal_rewardbench,
    multimodal_rewardbench_2,
    vl_rewardbench,
)
from sources.benchmark_rows import choose_frames, find_pictures, rows_of_benchmark
from sources.checking import check_data
from sources.reading import BenchmarkItem
from toy import world


def test_every_benchmark_is_read_with_its_labels(toy, tmp_path):
    """Against the toy world's key: the right answer of each row, whatever file it comes from."""
    benches = toy_rows(toy, tmp_path)
    counts = {bench: len(rows) for bench, rows in benches.items()}
    assert counts == {VL: 70, MM: 60, RLHF: 30, "pairs": 120}
    right = {}
    for line in (toy.parent / "key.jsonl").read_text().splitlines():
        item = json.loads(line)
        right.setdefault((item["source"], item["key"]), item["answers"][item["right"]])
    for bench, rows in benches.items():
        for row in rows:
            pictures = [Path(path).read_bytes() for path in row.images + (row.video or [])]
            key = world.key_of(row.question, pictures)
            assert row.responses[row.choice - 1] == right[bench, key], (bench, row.row)


def better_first(row):
    better, worse = row.responses if row.choice == 1 else row.responses[::-1]
    return row.id, row.question, better, worse, row.groups, Path(row.images[0]).read_bytes()


def test_both_files_of_vl_reward_bench_hold_the_same(toy, tmp_path):
    hub = list(rows_of_benchmark(vl_rewardbench, toy / FILES[VL], tmp_path))
    released_file = toy / "VL-RewardBench" / "data.jsonl"
    released = list(rows_of_benchmark(vl_rewardbench, released_file, tmp_path))
    assert [better_first(row) for row in hub] == [better_first(row) for row in released]
    assert Counter(row.choice for row in hub) == {1: 35, 2: 35}
    assert Counter(row.choice for row in released) == {1: 70}


@pytest.mark.parametrize("bench", [VL, MM, RLHF])
def test_a_benchmarks_folder_is_as_good_as_its_file(bench, toy, tmp_path):
    of_folder = list(rows_of_benchmark(BENCHMARKS[bench], toy / bench, tmp_path))
    of_file = list(rows_of_benchmark(BENCHMARKS[bench], toy / FILES[bench], tmp_path))
    assert of_folder == of_file


def test_the_groups_of_vl_reward_bench_in_any_case():
    """The released rule looks for lower case, so 301 rows of RLAIF-V and RLHF-V become general."""
    ids = (
        ["hallucination_pair-1"] * 448
        + ["RLAIF-V-1"] * 233
        + ["RLHF-V-1"] * 68
        + ["mathverse_1"] * 167
        + ["mmmu_pro_test_Chemistry_1"] * 151
        + ["wildvision-battle-1"] * 173
        + ["jailbreak-1"] * 7
        + ["svit-conversation-1", "politics-1", "LRVInstruction-1"]
    )
    published = vl_rewardbench.PUBLISHED
    assert Counter(map(vl_rewardbench.group_of, ids)) == published["benchmark"]
    in_paper = Counter(vl_rewardbench.group_of(row_id, any_case=False) for row_id in ids)
    assert in_paper == published["paper"]


@pytest.mark.parametrize(
    "row_id, category, column",
    [
        ("mathvista_3", "reasoning", "math"),
        ("EMMA-Coding_1", "reasoning", "coding"),
        ("PAIRS_1", "safety", "safety"),
        ("hateful_1", "safety", "toxicity"),
        ("nocaps_1", "open_generation/preference_task", "preference"),
    ],
)
def test_the_columns_of_multimodal_reward_bench(row_id, category, column):
    row = {"ID": row_id, "Category": category, "Text": "Q", "Image": ""}
    row |= {"Output1": "a", "Output2": "b", "Better": "Output2"}
    item = multimodal_rewardbench.read_row(row, 0, "")
    assert item.groups == {"columns": column} and item.choice == 2


def two_forms_of_mmrb2(tmp_path, rows):
    """Toy rows in the forms of Multimodal RewardBench 2: the hub's parquet and reasoning.json."""
    table, pairs = [], []
    for number, row in enumerate(rows):
        drawn = number % 3 == 2  # its second answer has a picture
        chosen = "AB"[row.choice - 1]
        data = [Path(path).read_bytes() for path in row.images]
        names = [str(Path(path).resolve()) for path in row.images]
        marks = [f"<image_{place}>" for place in range(len(data))]
        hub = {
            "pair_id": f"id-{number}",
            "prompt_text": "\n".join([*marks, row.question]),
            "prompt_images": [{"bytes": picture, "path": None} for picture in data],
            "prompt_source": "blink",
            "prompt_metadata": '{"id": "x"}',
            "response_a_text": row.responses[0],
            "response_a_images": [],
            "response_a_model": "m",
            "response_b_text": row.responses[1] + " <image_0>" * drawn,
            "response_b_images": [{"bytes": data[0], "path": None}] * drawn,
            "response_b_model": "n",
            "chosen": chosen.lower() if number % 2 else chosen,
            "human_annotations": "",
        }
        parts = [["image", name] for name in names] + [["text", row.question]]
        second = [["text", row.responses[1]], ["image", names[0]]]
        pair = {
            "id": hub["pair_id"],
            "prompt_content": parts,
            "prompt_source": "blink",
            "prompt_metadata": {"id": "x"},
            "response_a": {"model_name": "m", "response_content": [["text", row.responses[0]]]},
            "response_b": {"model_name": "n", "response_content": second[: 1 + drawn]},
            "chosen": chosen,
        }
        table.append(hub)
        pairs.append(pair)
    (tmp_path / "hub/reasoning").mkdir(parents=True)
    parquet = tmp_path / "hub/reasoning/test-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), parquet)
    (tmp_path / "own").mkdir()
    (tmp_path / "own/reasoning.json").write_text(json.dumps({"pairs": pairs}))
    return tmp_path / "hub", tmp_path / "own"


def test_both_forms_of_multimodal_reward_bench_2(toy, tmp_path, capsys):
    rows = toy_rows(toy, tmp_path, VL)[VL][:9]
    rows[0] = dataclasses.replace(rows[0], images=rows[0].images + rows[1].images)
    found = []
    for folder in two_forms_of_mmrb2(tmp_path, rows):
        found.append(list(rows_of_benchmark(multimodal_rewardbench_2, folder, tmp_path / "out")))
        assert "3 rows are not taken: {'an answer has pictures': 3}" in capsys.readouterr().out
        assert len(list(rows_of_benchmark(multimodal_rewardbench_2, folder, tmp_path, 4))) == 4
    for of_form in found:
        assert [row.row for row in of_form] == [0, 1, 3, 4, 6, 7]
        for row in of_form:
            known = rows[row.row]
            assert (row.choice, row.responses) == (known.choice, known.responses)
            assert row.question.endswith(f"<image_{len(known.images) - 1}>\n{known.question}")
            pictures = [Path(path).read_bytes() for path in row.images]
            assert pictures == [Path(path).read_bytes() for path in known.images]
    assert [row.question for row in found[0]] == [row.question for row in found[1]]
    notes = check_data(multimodal_rewardbench_2, found[0])
    assert any("the published file has mindcube 195, blink 100" in note for note in notes)
    assert sum(multimodal_rewardbench_2.PUBLISHED["source"].values()) == 350
    assert doctest.testmod(multimodal_rewardbench_2) == (0, 1)


def test_rows_with_the_same_id_are_both_judged(toy, tmp_path):
    """
    The released resume skips the second row of an id: 25 of VL-RewardBench's ids occur twice,
    MM-RLHF-RewardBench has 46 for 170 rows.
    """
    benches = toy_rows(toy, tmp_path, VL, RLHF)
    assert len({row.id for row in benches[VL]}) < 70
    assert len({row.id for row in benches[RLHF]}) < 30
    assert len(judged(benches[VL] + benches[RLHF], Protocol("both", 2), always(1))) == 2 * 100


def test_frames_are_in_the_order_of_their_numbers(tmp_path):
    """The released code shows them in the directory's order."""
    (tmp_path / "clip").mkdir()
    for number in (10, 9, 2, 1):
        (tmp_path / "clip" / f"frame_{number}.png").touch()
    item = BenchmarkItem("id", "Q", ["a", "b"], 1, image=None, video="clip", groups={})
    _, video = find_pictures(item, f"{tmp_path}/data.jsonl, line 1", tmp_path)
    names = [Path(path).stem for path in video]
    assert names == ["frame_1", "frame_2", "frame_9", "frame_10"]


def test_every_judge_is_shown_the_same_frames(toy, tmp_path):
    """They are chosen when rows are read, before a model or a server is asked."""
    rows = toy_rows(toy, tmp_path, RLHF)[RLHF]
    fewer = toy_rows(toy, tmp_path, RLHF, words=["--max_frames", 2])[RLHF]
    videos = [(row.video, same.video) for row, same in zip(rows, fewer) if row.video]
    assert videos and all(len(frames) > 2 for frames, _ in videos)
    assert all(two == [frames[0], frames[-1]] for frames, two in videos)
    row = dataclasses.replace(make_row(0), video=[f"{i}.png" for i in range(100)])
    choose_frames([row], 32)
    assert row.video == [f"{99 * i // 31}.png" for i in range(32)]


GOOD = {
    VL: {
        "id": "svit-1",
        "query": "Q",
        "response": ["a", "b"],
        "human_ranking": [0, 1],
        "image": "",
    },
    MM: {
        "ID": "vqa_1",
        "Text": "Q",
        "Image": "",
        "Output1": "a",
        "Output2": "b",
        "Better": "Output1",
        "Category": "vqa",
    },
    RLHF: {"id": "1", "image": "mcq/1.png", "prompt": "Q", "chosen": "a", "rejected": "b"},
}
ABSENT = object()


@pytest.mark.parametrize(
    "bench, change, problem",
    [
        (VL, {"human_ranking": [1, 1]}, "(1, 1)"),
        (VL, {"query": None}, "'question' is null"),
        (VL, {"response": ["one"]}, "two non-empty strings"),
        (VL, {"image": {"bytes": None}}, "KeyError('path')"),
        (MM, {"Better": "tie"}, "tie"),
        (MM, {"Category": "art"}, "art"),
        (MM, {"Text": ABSENT}, "lacks Text"),
        (MM, {"Image": "no.png"}, "1 of 1 images are missing"),
        (RLHF, {"image": "nowhere/1.png"}, "in no folder of mcq, long"),
        (RLHF, {"prompt": ABSENT}, "lacks prompt"),
        (RLHF, {"image": ABSENT, "video": "video/none"}, "missing"),
    ],
)
def test_a_broken_row_is_reported_with_its_place(bench, change, problem, tmp_path):
    row = {key: value for key, value in (GOOD[bench] | change).items() if value is not ABSENT}
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError) as raised:
        evaluate.read_rows(args_of("--bench", f"{bench}={path}", "--out", tmp_path))
    assert str(path) in str(raised.value) and problem in str(raised.value)


def test_the_check_sees_answers_of_other_questions():
    """Multimodal RewardBench's script joins questions by row number to data sets that changed."""
    rng = random.Random(0)
    words = ["mountain", "computer", "festival", "elephant", "building", "sandwich"]
    rows = []
    for i in range(120):
        word = rng.choice(words)
        responses = [f"It shows one {word} there", f"There are two {word}"]
        row = make_row(i, bench=MM, groups={"columns": "correctness"}, responses=responses)
        question = f"What about this {word} then?"
        rows.append(dataclasses.replace(row, id=f"visitbench_{i}", question=question))
    assert not any("WARNING" in note for note in check_data(multimodal_rewardbench, rows))
    moved = []
    for i, row in enumerate(rows):
        moved.append(dataclasses.replace(row, question=rows[(i + 7) % 120].question))
    notes = check_data(multimodal_rewardbench, moved)
    assert any("WARNING: the visitbench questions" in note for note in notes)


def test_the_check_does_not_warn_of_a_kind_with_a_single_question():
    """nocaps and image2struct ask the same of every picture."""
    rng = random.Random(0)
    words = ["shows", "caption", "picture", "detailed", "image", "please"]
    rows = []
    for i in range(120):
        responses = [" ".join(rng.sample(words, 3)), " ".join(rng.sample(words, 3))]
        row = make_row(i, bench=MM, groups={"columns": "correctness"}, responses=responses)
        question = "Please write a detailed caption of this image."
        rows.append(dataclasses.replace(row, id=f"nocaps_{i}", question=question))
    assert not any("WARNING" in note for note in check_data(multimodal_rewardbench, rows))


def test_the_check_counts_groups_orders_and_empty_answers(toy, tmp_path):
    benches = toy_rows(toy, tmp_path, VL, RLHF)
    notes = "\n".join(check_data(vl_rewardbench, benches[VL]))
    assert "benchmark: general 16, hallucination 38, reasoning 16" in notes
    assert "the published file has general 183" in notes
    notes = "\n".join(check_data(BENCHMARKS[RLHF], benches[RLHF]))
    assert "the better answer is always first" in notes
    rows = [make_row(0, responses=["", "b"]), make_row(1, choice=2)]
    assert "note: 1 rows have an empty answer" in check_data(None, rows)


def test_the_check_notes_answers_that_are_nearly_always_on_one_side():
    answers = [(f"a{i}", "b") for i in range(100)]
    rows = [make_row(i, 1 + (i < 89), responses=answers[i]) for i in range(100)]
    assert check_data(None, rows) == []
    (note,) = check_data(None, rows[:89])
    assert "the worse answer is always first" in note
    (note,) = check_data(None, rows[:98])
    assert "the worse answer is in 89 of 98 rows first" in note


def test_the_check_knows_the_later_file_of_vl_reward_bench():
    ids = ["hallucination_pair-1"] * 448 + ["RLAIF-V-1"] * 301
    ids += ["mathverse_1"] * 317 + ["wildvision-battle-1"] * 181
    rows = []
    for number, row_id in enumerate(ids):
        both = {"benchmark": vl_rewardbench.group_of(row_id)}
        both["paper"] = vl_rewardbench.group_of(row_id, any_case=False)
        rows.append(make_row(number, choice=1 + number % 2, groups=both, responses=("a", row_id)))
    notes = check_data(vl_rewardbench, rows)
    assert any("1247 rows as in the file that the hub has had since" in note for note in notes)
    assert not any("published file" in note for note in notes)
    notes = check_data(vl_rewardbench, rows[1:])
    assert any("the published file has general 183" in note for note in notes)


def test_an_empty_answer_is_read_and_kept(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(GOOD[VL] | {"response": ["", "b"]}) + "\n")
    args = args_of("--bench", f"{VL}={path}", "--scores", "x", "--out", tmp_path)
    benches = evaluate.read_rows(args)
    assert benches[VL][0].responses == ["", "b"]
    evaluate.check_or_write_config(args, benches, {})
    assert evaluate.read_rows(args_of("--score_only", "--out", tmp_path)) == benches
