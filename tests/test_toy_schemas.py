"""
What each file of toy/sources.py holds, field by field, as the real data sets have it; read back by
json and pyarrow alone.
"""

import base64
import json
import re
from collections import Counter, defaultdict
from itertools import chain
from pathlib import Path

import pytest
from conftest import read_rows
from toy_data import (
    SPLITS,
    assert_columns,
    assert_kind,
    is_of_kind,
    root,
    table,
    training_rows,
)

from sources import mm_rlhf_rewardbench, multimodal_rewardbench, vl_rewardbench
from toy import benchmark_sets, sources, training_sets, world

__all__ = ["root"]  # the fixture

pytestmark = pytest.mark.slow  # the toy world in full
PICTURE = "struct<bytes: binary, path: string>"

# --------------------------------------------------------------------------------------------------
# Training sources


def test_rlaif_v(root):
    shards = sorted((root / "train" / "RLAIF-V").iterdir())
    names = ["RLAIF-V-Dataset_000.parquet", "RLAIF-V-Dataset_001.parquet"]
    assert [path.name for path in shards] == names
    texts = ["ds_name", "question", "chosen", "rejected", "origin_dataset", "origin_split"]
    texts += ["idx", "image_path"]
    ids = []
    for shard in shards:
        assert_columns(shard, **dict.fromkeys(texts, "string"), image=PICTURE)
        origins = [json.loads(row["origin_split"]) for row in table(shard)]
        assert_kind(origins, {"model": str, "labeller": str, "type": str})
        ids += [row["idx"] for row in table(shard)]
    assert ids == [str(i) for i in range(len(ids))]


def vlfeedback_rows(root):
    return read_rows(root / "train" / "VLFeedback" / "vlfeedback_80k.jsonl")


def test_vlfeedback(root):
    rows = vlfeedback_rows(root)
    note = {"Rating": str, "Rationale": str}
    notes = dict.fromkeys(training_sets.ASPECTS, note)
    completion = {"annotations": notes, "model": str, "response": str}
    kind = {
        "id": str,
        "prompt": str,
        "models": [str],
        "completions": [completion],
        "img_path": str,
    }
    assert_kind(rows, kind)
    for row in rows:
        assert len(set(row["models"])) == 4
        assert [completion["model"] for completion in row["completions"]] == row["models"]


def test_vlfeedback_rates_the_right_answer_above_the_wrong_ones_and_these_alike(root):
    places = Counter()  # of the right answer
    for row in vlfeedback_rows(root):
        ratings = []
        for completion in row["completions"]:
            notes = completion["annotations"]
            ratings.append(tuple(notes[aspect]["Rating"] for aspect in training_sets.ASPECTS))
        numbers = [rating.isdigit() for rating in chain.from_iterable(ratings)]
        if len(set(ratings)) == 1 or not all(numbers):
            continue  # broken on purpose
        (wrong, three), (right, one) = Counter(ratings).most_common()
        assert (three, one) == (3, 1)
        assert all(better > worse for better, worse in zip(right, wrong))
        places[ratings.index(right)] += 1
    assert sum(places.values()) == sources.TRAIN["VLFeedback"] + 5  # 5: a picture is broken
    assert set(places) == {0, 1, 2, 3}


def test_povid(root):
    path = root / "train" / "POVID" / "POVID_preference_data_for_VLLMs_version_1.json"
    rows = json.loads(path.read_text())
    talk = [{"from": {"human", "gpt"}, "value": str}]
    kind = {"id": str, "image": str, "conversations": talk, "rejected_conversations": talk}
    assert_kind(rows, kind)
    for row in rows:
        assert re.fullmatch(r"hallucination_pair-\d+", row["id"])
        assert re.fullmatch(r"COCO_train2014_\d{12}\.png", row["image"])
        asked, _ = row["conversations"]
        again, _ = row["rejected_conversations"]
        assert asked == again
        assert asked["value"].startswith("<image>\n")
        for turns in (row["conversations"], row["rejected_conversations"]):
            assert [turn["from"] for turn in turns] == ["human", "gpt"]


def test_wildvision(root):
    path = root / "train" / "WildVision-Battle" / "data" / "train-00000-of-00001.parquet"
    turns = "list<element: struct<role: string, content: string>>"
    texts = ("question_id", "model_a", "model_b", "language", "winner", "judge")
    columns = dict.fromkeys(texts, "string")
    columns |= {"conversation_a": turns, "conversation_b": turns, "image": PICTURE}
    columns |= {"turn": "int32", "anony": "bool", "tstamp": "int32"}
    assert_columns(path, **columns)
    rows = table(path)
    assert {row["winner"] for row in rows} == {"model_a", "model_b", "tie", "tie (bothbad)"}
    assert {row["turn"] for row in rows} == {1, 2}
    for row in rows:
        assert row["model_a"] != row["model_b"]
        for talk in (row["conversation_a"], row["conversation_b"]):
            assert [turn["role"] for turn in talk] == ["user", "assistant"] * row["turn"]
    pairs, _ = training_rows(root, "WildVision-Battle")
    assert any(pair.question.startswith("user: ") for pair in pairs)


def test_mm_rlhf(root):
    rows = read_rows(root / "train" / "MM-RLHF" / "dpo_pairs.jsonl")
    optional = {"chosen_reason": str, "rejected_reason": str, "is_tie": bool, "ls_factor": float}
    always = {"id": str, "prompt": str, "chosen": str, "rejected": str}
    prompts = defaultdict(list)
    for row in rows:
        medium = "image" if "image" in row else "video"
        there = {field: kind for field, kind in optional.items() if field in row}
        assert is_of_kind(row, always | {medium: str} | there), row
        prompts[row["id"]].append(row)
    for field in optional:
        assert {field in row for row in rows} == {True, False}
    assert {len(pairs) for pairs in prompts.values()} == {1, 2, 3}
    for pairs in prompts.values():
        assert len({pair["chosen"] for pair in pairs}) == 1
        assert len({pair["rejected"] for pair in pairs}) == len(pairs)


def test_mm_rlhf_has_its_categories_and_some_videos(root):
    folder = root / "train" / "MM-RLHF"
    rows = read_rows(folder / "dpo_pairs.jsonl")
    categories = Counter((row.get("image") or row["video"]).split("/")[0] for row in rows)
    broken = sum(sources.PLANTED["MM-RLHF"].values())
    for category, count in sources.TRAIN["MM-RLHF"].items():
        assert count <= categories[category] <= count + broken
    videos = [folder / row["video"] for row in rows if "video" in row]
    frames = [f"{t:04d}.png" for t in range(4)]
    found = [sorted(path.name for path in video.iterdir()) for video in videos if video.is_dir()]
    assert found == [frames] * (len(videos) - sources.PLANTED["MM-RLHF"]["missing frames"])
    assert 40 < len(videos) < len(rows) / 10


def test_r1_reward_rl_holds_the_same_in_both_files(root):
    folder = root / "train" / "R1-Reward-RL"
    path = folder / "data" / "train-00000-of-00001.parquet"
    apart, hub = read_rows(folder / "R1-Reward-RL.jsonl"), table(path)
    texts = dict.fromkeys(("question", "message", "image"), "string")
    assert_columns(path, **texts, answer="list<element: string>")
    assert_kind(apart, {"message": str, "question": str, "answer": [str]})
    for row, other in zip(hub, apart, strict=True):
        assert {field: row[field] for field in other} == other
        (turn,) = json.loads(row["message"])
        text, image = turn["content"]
        assert (turn["role"], text["type"], image["type"]) == ("user", "text", "image")
        assert image["image"].startswith("/authors/disk/")
        picture = folder / "RLAIF-V-image" / Path(image["image"]).name
        data = picture.read_bytes() if picture.exists() else None
        assert data == (row["image"] and base64.b64decode(row["image"]))
    answers = Counter(row["answer"][0] for row in apart)
    assert set(answers) == {"<answer>1</answer>", "<answer>2</answer>", "<answer></answer>"}


def test_own_pairs_have_a_picture_or_none(root):
    rows = read_rows(root / "train" / "pairs.jsonl")
    always = {"id": str, "prompt": str, "chosen": str, "rejected": str}
    for row in rows:
        medium = {"image": str} if "image" in row else {}
        assert is_of_kind(row, always | medium), row
        assert row["prompt"].startswith("A picture has ") == ("image" not in row)
    without = sum("image" not in row for row in rows)
    assert 0.15 < without / len(rows) < 0.35


# --------------------------------------------------------------------------------------------------
# Benchmarks


@pytest.mark.parametrize("split", SPLITS)
def test_vl_reward_bench(root, split):
    folder = root / split / "VL-RewardBench"
    path = folder / "data" / "test-00000-of-00001.parquet"
    texts = ("id", "query", "judge", "rationale", "query_source", "ground_truth")
    lists = {"response": "string", "models": "string", "human_ranking": "int64"}
    columns = dict.fromkeys(texts, "string") | {"image": PICTURE}
    columns |= {name: f"list<element: {kind}>" for name, kind in lists.items()}
    assert_columns(path, **columns)
    hub, released = table(path), read_rows(folder / "data.jsonl")
    kind = dict.fromkeys(("id", "prompt", "chosen", "rejected", "image"), str)
    assert_kind(released, kind | {"chosen_reason": {""}, "rejected_reason": {""}})
    for row, other in zip(hub, released, strict=True):
        best, worst = row["response"]
        if row["human_ranking"] == [1, 0]:
            best, worst = worst, best
        assert (row["id"], row["query"]) == (other["id"], other["prompt"])
        assert (best, worst) == (other["chosen"], other["rejected"])
        assert (folder / other["image"]).read_bytes() == row["image"]["bytes"]
        reasoned = row["id"].startswith(("mathverse_", "mmmu_pro_"))
        assert bool(row["query_source"]) != reasoned
    pictures = sorted(row["image"] for row in released)
    assert pictures == sorted(f"vl_reward/img/image_{i}.png" for i in range(len(hub)))


def names_in_vl_reward_bench(root, split):
    path = root / split / "VL-RewardBench" / "data" / "test-00000-of-00001.parquet"
    return [row["id"] for row in table(path)]


@pytest.mark.parametrize("split", SPLITS)
def test_only_reasoning_repeats_ids_in_vl_reward_bench(root, split):
    repeated = Counter(names_in_vl_reward_bench(root, split))
    assert set(repeated.values()) == {1, 2}
    twice = [name for name, times in repeated.items() if times == 2]
    assert all(name.startswith(("mathverse_", "mmmu_pro_")) for name in twice)


@pytest.mark.parametrize("split", SPLITS)
def test_the_two_groupings_of_vl_reward_bench_differ_as_in_the_real_file(root, split):
    names = names_in_vl_reward_bench(root, split)
    for grouping, rows in vl_rewardbench.PUBLISHED.items():
        any_case = grouping == "benchmark"
        groups = [vl_rewardbench.group_of(name, any_case) for name in names]
        found = Counter(groups)
        for group, count in rows.items():
            assert abs(found[group] / len(names) - count / sum(rows.values())) < 0.02
        assert set(groups[:60]) == set(rows)  # the beginning has some of everything
    beginnings = {re.match("[A-Za-z]+", prefix)[0] for prefix in benchmark_sets.VL_REWARD_BENCH}
    assert {re.match("[A-Za-z]+", name)[0] for name in names} == beginnings


@pytest.mark.parametrize("split", SPLITS)
def test_multimodal_reward_bench(root, split):
    path = root / split / "Multimodal-RewardBench" / "data" / "all_data.json"
    rows = json.loads(path.read_text())
    kind = dict.fromkeys(("ID", "Text", "Image", "Output1", "Output2", "Category"), str)
    assert_kind(rows, kind | {"Better": {"Output1", "Output2"}})
    assert len({row["ID"] for row in rows}) == len(rows)
    columns = Counter()
    for row in rows:
        columns[multimodal_rewardbench.column_of(row["ID"].lower(), row["Category"])] += 1
    published = multimodal_rewardbench.PUBLISHED["columns"]
    for column, count in published.items():
        assert abs(columns[column] / len(rows) - count / sum(published.values())) < 0.015
    assert set(columns) == set(published)


@pytest.mark.parametrize("split", SPLITS)
def test_mm_rlhf_reward_bench(root, split):
    rows = read_rows(root / split / "MM-RLHF-RewardBench" / "mm_reward_bench.jsonl")
    texts = ("id", "prompt", "chosen", "rejected", "chosen_reason", "rejected_reason")
    sizes, categories = Counter(), Counter()
    for row in rows:
        medium = "image" if "image" in row else "video"
        assert is_of_kind(row, dict.fromkeys((*texts, medium), str))
        category = mm_rlhf_rewardbench.category_of(row[medium])
        assert (category == "video") == (medium == "video")
        categories[category] += 1
        sizes[row["id"]] += 1
    assert set(sizes.values()) == {2, 3}
    published = mm_rlhf_rewardbench.PUBLISHED["category"]
    assert set(categories) == set(published)
    if split == "test":  # sets are whole: some rows more or fewer than the real file has
        assert all(abs(categories[name] - count) <= 2 for name, count in published.items())


@pytest.mark.parametrize("split", SPLITS)
def test_the_projects_own_pairs(root, split):
    rows = read_rows(root / split / "pairs.jsonl")
    kind = {
        "id": str,
        "source": str,
        "question": str,
        "images": [str],
        "video": (list, type(None)),
        "responses": [str],
        "choice": {1, 2},
        "attempts": {None},
        "annotation": {None},
        "family": set(world.FAMILIES),
        "difficulty": float,
        "medium": {"image", "video"},
    }
    assert_kind(rows, kind)
    half, sixth = len(rows) // 2, len(rows) // 6
    assert len({row["id"] for row in rows}) == len(rows)
    assert Counter(row["choice"] for row in rows) == {1: half, 2: half}
    families = Counter(row["family"] for row in rows)
    assert families == dict.fromkeys(world.FAMILIES, sixth)
    for row in rows:
        assert len(row["responses"]) == 2
        if row["medium"] == "image":
            assert (len(row["images"]), row["video"]) == (1, None)
        else:
            assert row["images"] == []
            assert row["video"] == sorted(row["video"])
            assert len(row["video"]) == 4
    videos = sum(row["medium"] == "video" for row in rows)
    assert 0 < videos < len(rows) / 20
    assert abs(sum(row["difficulty"] for row in rows) / len(rows) - 0.5) < 0.06


# --------------------------------------------------------------------------------------------------
# Tasks


def task_rows(root, split):
    return read_rows(root / "tasks" / f"{split}.jsonl")


@pytest.mark.parametrize("split", sources.TASKS)
def test_tasks(root, split):
    rows = task_rows(root, split)
    texts = dict.fromkeys(("id", "question", "answer"), str)
    others = {"images": [str], "family": set(world.FAMILIES), "difficulty": float}
    assert_kind(rows, texts | others)


def same_picture(root, path, task):
    folder = root / "tasks"
    return (folder / path).read_bytes() == (folder / task["images"][0]).read_bytes()


def test_vstar_has_the_test_tasks(root):
    rows = read_rows(root / "tasks" / "vstar_bench" / "test_questions.jsonl")
    kind = {
        "image": str,
        "text": str,
        "category": {"direct_attributes", "relative_position"},
        "question_id": str,
        "label": set("ABCD"),
    }
    assert_kind(rows, kind)
    for row, task in zip(rows, task_rows(root, "test"), strict=True):
        question, *options, request = row["text"].split("\n")
        assert question == task["question"]
        assert request == "Answer with the option's letter from the given choices directly."
        assert f"({row['label']}) {task['answer']}" in options
        assert same_picture(root, f"vstar_bench/{row['image']}", task)


def test_arxivqa_has_the_first_half_of_the_training_tasks(root):
    tasks = task_rows(root, "train")
    rows = read_rows(root / "tasks" / "ArxivQA" / "arxivqa.jsonl")
    texts = dict.fromkeys(("id", "image", "label", "rationale", "question"), str)
    assert_kind(rows, texts | {"options": [str]})
    for row, task in zip(rows, tasks[: len(tasks) // 2], strict=True):
        assert row["question"] == task["question"]
        assert f"{row['label'][0]}. {task['answer']}" in row["options"]
        assert len(row["label"]) == 1 or row["label"] in row["options"]
        assert same_picture(root, f"ArxivQA/{row['image']}", task)


def test_thinklite_vl_has_the_second_half_of_the_training_tasks(root):
    tasks = task_rows(root, "train")
    path = root / "tasks" / "ThinkLite-VL-hard-11k" / "ThinkLite-VL-Hard-11k.parquet"
    assert_columns(path, id="int64", problem="string", answer="string", image="binary")
    for row, task in zip(table(path), tasks[len(tasks) // 2 :], strict=True):
        assert row["problem"] == f"<image>{task['question']}"
        assert row["answer"] == task["answer"]
        assert row["image"] == (root / "tasks" / task["images"][0]).read_bytes()
