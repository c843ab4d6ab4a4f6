"""
The toy world in the paper's file formats (toy/sources.py): that every label is true and nobody who
reads only the text can know it; that the broken rows are those that were planted; that the build
repeats. What each file holds: test_toy_schemas.py.
"""

import base64
import doctest
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter, defaultdict

import pyarrow.parquet as pq
import pytest
import toy_data
from conftest import ROOT, read_rows
from toy_data import (
    PLACES,
    SPLITS,
    assert_kind,
    benchmark_rows,
    check_pictures_are_the_worlds,
    is_true,
    item_of,
    key,
    key_of,
    root,
    table,
    task_rows,
    training_rows,
)

from core.files import InputError
from sources import TRAINING
from toy import server, source_files, sources, training_sets, world

__all__ = ["root"]  # the fixture

SMALL = ["--scale", "0.02"]
VL_REWARD_BENCH = "VL-RewardBench/data/test-00000-of-00001.parquet"

# --------------------------------------------------------------------------------------------------
# The build


def hashes(folder):
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            name = str(path.relative_to(folder))
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def count_rows(path):
    if path.suffix == ".parquet":
        return pq.read_metadata(path).num_rows
    if path.suffix == ".jsonl":
        return len(read_rows(path))
    return len(json.loads(path.read_text()))


@pytest.mark.slow
def test_the_table_names_every_file_with_its_rows(root):
    text = (root.parent / "printed").read_text()
    printed = dict(re.findall(r"^(\S+\.(?:jsonl?|parquet)) +(\d+)", text, re.MULTILINE))
    tables = [path for path in root.rglob("*") if path.suffix in (".json", ".jsonl", ".parquet")]
    names = {str(path.relative_to(root)) for path in tables}
    assert set(printed) == names - {"key.jsonl", "train/planted.json", sources.MARKER}
    assert {name: count_rows(root / name) for name in printed} == {
        name: int(rows) for name, rows in printed.items()
    }


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    for name, seed, noise in (("a", "5", "1"), ("b", "5", "2"), ("c", "6", "1")):
        command = [sys.executable, "toy/sources.py", "--out", tmp_path / name, "--seed", seed]
        environment = os.environ | {"PYTHONHASHSEED": noise}
        subprocess.run([*command, *SMALL], cwd=ROOT, env=environment, check=True)
    first, again, other = (hashes(tmp_path / name) for name in "abc")
    assert first == again
    for path in set(first) & set(other) - {"train/planted.json"}:
        assert first[path] != other[path], path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    out = tmp_path_factory.mktemp("small") / "data"
    sources.main(["--out", str(out), *SMALL])
    return out


def test_what_is_there_is_not_made_again(small, capsys):
    before = hashes(small)
    sources.main(["--out", str(small), *SMALL])
    assert capsys.readouterr().out == f"{small}: already there\n"
    assert hashes(small) == before


@pytest.mark.parametrize(
    "words, message",
    [
        (["--seed", "1"], "its seed is 0, asked for is 1"),
        (["--scale", "0.03"], "its scale is 0.02, asked for is 0.03"),
    ],
)
def test_other_data_is_not_overwritten(small, words, message):
    with pytest.raises(InputError, match=f"--out {small} .*{message}.*rm -r {small}"):
        sources.main(["--out", str(small), *SMALL, *words])


def test_data_of_an_older_world_is_not_taken_for_the_present_ones(small, monkeypatch):
    monkeypatch.setattr(sources, "version", lambda: "another")
    with pytest.raises(InputError, match=r"its version is .*, asked for is another"):
        sources.main(["--out", str(small), *SMALL])


def test_a_killed_build_leaves_nothing_under_the_name(tmp_path, monkeypatch):
    out, part = tmp_path / "data", tmp_path / "data.tmp"
    out.mkdir()  # empty: may be used

    def killed(source, rows):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(sources.WRITERS, "RLAIF-V", killed)
        sources.main(["--out", str(out), *SMALL])
    assert not any(out.iterdir())
    assert part.exists()
    sources.main(["--out", str(out), *SMALL])
    assert not part.exists()
    assert (out / "key.jsonl").exists()


@pytest.mark.parametrize("name", ["theirs", "theirs/thesis.tex"])
def test_other_peoples_files_are_left_alone(tmp_path, name):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match=r"not made by toy/sources\.py"):
        sources.main(["--out", str(tmp_path / name), *SMALL])
    (tmp_path / "mine.tmp").mkdir()
    with pytest.raises(InputError, match=r"mine\.tmp is in the way"):
        sources.main(["--out", str(tmp_path / "mine"), *SMALL])


@pytest.mark.parametrize("scale", ["0", "-1", "nan", "inf"])
def test_a_scale_that_makes_nothing_is_refused(tmp_path, scale):
    with pytest.raises(InputError, match="--scale: expected a number above 0, got"):
        sources.main(["--out", str(tmp_path / "new"), "--scale", scale])
    assert not (tmp_path / "new").exists()


def test_the_documented_commands_and_examples_hold():
    start = "$ python toy/sources.py "
    commands = [line for line in sources.__doc__.splitlines() if line.startswith(start)]
    for command in commands:
        sources.parser().parse_args(shlex.split(command.removeprefix(start)))
    assert len(commands) == 2
    assert doctest.testmod(training_sets).failed == 0


# --------------------------------------------------------------------------------------------------
# Labels


@pytest.mark.slow
@pytest.mark.parametrize("name", sources.TRAIN)
def test_every_training_label_is_true(root, name):
    rows, _ = training_rows(root, name)
    expected = sources.TRAIN[name]
    if isinstance(expected, dict):
        expected = sum(expected.values())
    assert len(rows) in (expected, expected + 1)  # even
    check_pictures_are_the_worlds(rows)
    for row in rows:
        item = item_of(root, row)
        better, worse = row.answers
        assert (item["split"], item["source"]) == ("train", name)
        assert item["answers"][item["right"]] == better
        assert is_true(item, better)
        assert not is_true(item, worse)


@pytest.mark.slow
@pytest.mark.parametrize("name", sources.TRAIN)
def test_what_is_broken_was_planted(root, name):
    _, dropped = training_rows(root, name)
    planted = json.loads((root / "train" / "planted.json").read_text())
    assert dropped == planted[name] == source_files.PLANTED[name]


@pytest.mark.slow
def test_the_training_pairs_have_the_shares_of_table_2(root):
    rows, published = {}, {}
    for name in ("RLAIF-V", "VLFeedback", "POVID", "WildVision-Battle"):
        rows[name] = len(training_rows(root, name)[0])
        count = re.search(r"Table 2: ([\d,]+) pairs", TRAINING[name].__doc__)
        published[name] = int(count[1].replace(",", ""))
    for name, count in published.items():
        share = rows[name] / sum(rows.values())
        assert abs(share - count / sum(published.values())) < 0.002


@pytest.mark.slow
def test_the_training_pairs_have_all_difficulties_media_and_families(root):
    items = []
    for group in key(root).values():
        items += [item for item in group if item["split"] == "train"]
    tenths = Counter(int(10 * item["difficulty"]) for item in items)
    assert set(tenths) == set(range(10))
    assert 0.085 < min(tenths.values()) / len(items) < max(tenths.values()) / len(items) < 0.115
    assert {item["medium"] for item in items} == {"image", "video", "text"}
    families = Counter(item["family"] for item in items)
    assert set(families) == set(world.FAMILIES)
    assert 0.09 < min(families.values()) / len(items) < max(families.values()) / len(items) < 0.25


@pytest.mark.slow
@pytest.mark.parametrize("split, name", PLACES)
def test_every_benchmark_label_is_true(root, split, name):
    for row in benchmark_rows(root, split, name):
        item = item_of(root, row)
        assert [is_true(item, answer) for answer in row.answers] == [row.right == 0, row.right == 1]
        assert item["answers"][item["right"]] == row.answers[row.right]
        assert (item["split"], item["source"]) == (split, name)


# --------------------------------------------------------------------------------------------------
# Twins


def known_by_heart(rows):
    """How many rows somebody gets right who knows every text's answers, and sees no picture."""
    counts = defaultdict(Counter)
    for row in rows:
        counts[row.question, frozenset(row.answers)][row.answers[row.right]] += 1
    return sum(max(answers.values()) for answers in counts.values())


@pytest.mark.slow
@pytest.mark.parametrize("split, name", PLACES)
def test_the_text_alone_is_right_in_half(root, split, name):
    rows = benchmark_rows(root, split, name)
    differences = []
    for row in rows:
        differences.append(len(row.answers[row.right]) - len(row.answers[1 - row.right]))
    longer_is_right = sum(difference > 0 for difference in differences)
    assert longer_is_right == sum(difference < 0 for difference in differences)
    if name != "MM-RLHF-RewardBench":  # its chosen answer is the first one
        assert sum(row.right == 0 for row in rows) == len(rows) / 2
    assert known_by_heart(rows) == len(rows) / 2


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
def test_the_text_alone_gets_one_id_of_each_set_at_acc_plus(root, split):
    """Acc+ asks for all rows of an id: one of the 3 or 4 ids of a set can be known by heart."""
    found = {}
    for row in benchmark_rows(root, split, "MM-RLHF-RewardBench"):
        item = item_of(root, row)
        text = row.question, frozenset(item["answers"])
        found[item["key"]] = text, item["answers"][item["right"]]
    by_text = defaultdict(Counter)
    for text, right in found.values():
        by_text[text][right] += 1
    known = sum(max(answers.values()) for answers in by_text.values())
    assert 1 / 4 <= known / len(found) <= 1 / 3
    if split == "test":
        assert len(found) == 60


# --------------------------------------------------------------------------------------------------
# Keys and ids


@pytest.mark.slow
def test_each_line_of_the_key_is_used_and_the_stand_in_reads_it(root):
    used = set()
    for name in sources.TRAIN:
        used |= {key_of(row) for row in training_rows(root, name)[0]}
    for split, name in PLACES:
        used |= {key_of(row) for row in benchmark_rows(root, split, name)}
    for split in sources.TASKS:
        used |= {key_of(row) for _, row in task_rows(root, split)}
    assert used == set(key(root))
    assert set(server.load_key([root / "key.jsonl"])) == used
    kind = {
        "key": str,
        "split": {"train", "dev", "test"},
        "source": str,
        "family": set(world.FAMILIES),
        "difficulty": float,
        "medium": {"image", "video", "text"},
        "question": str,
        "answers": [str],
        "claims": [str],
        "right": int,
        "scene": [(list, type(None))],
        "subject": str,
    }
    assert_kind(read_rows(root / "key.jsonl"), kind)


@pytest.mark.slow
def test_frames_are_keyed_in_the_order_of_their_names(root):
    rows = benchmark_rows(root, "test", "MM-RLHF-RewardBench")
    row = next(row for row in rows if len(row.pictures) == 4)
    assert len(set(row.pictures)) == 4
    assert key_of(row) in key(root)
    assert key_of(row._replace(pictures=row.pictures[::-1])) not in key(root)


def split_of(path, root):
    """Tasks count as train and test."""
    split, *_ = path.relative_to(root).parts
    if split != "tasks":
        return split
    is_test = "vstar_bench" in path.parts or path.name.startswith("test-")
    return "test" if is_test else "train"


def pictures_in_table(path):
    for row in table(path):
        data = row["image"]["bytes"] if isinstance(row["image"], dict) else row["image"]
        if data is not None:
            yield base64.b64decode(data) if isinstance(data, str) else data


@pytest.mark.slow
def test_no_picture_is_in_two_splits(root):
    splits = defaultdict(set)  # {hash of the bytes: splits}
    for path in root.rglob("*.png"):
        splits[hashlib.sha256(path.read_bytes()).digest()].add(split_of(path, root))
    for path in root.rglob("*.parquet"):
        for data in pictures_in_table(path):
            splits[hashlib.sha256(data).digest()].add(split_of(path, root))
    assert {len(found) for found in splits.values()} == {1}
    assert set().union(*splits.values()) == {"train", "dev", "test"}


@pytest.mark.slow
def test_no_id_is_in_two_splits(root):
    """Decontamination drops by id, so equal ids must mean equal rows."""

    def ids(path):
        if path.endswith(".jsonl"):
            return {row["id"] for row in read_rows(root / path)}
        return {row["id"] for row in json.loads((root / path).read_text())}

    povid = ids("train/POVID/POVID_preference_data_for_VLLMs_version_1.json")
    mm_rlhf = ids("train/MM-RLHF/dpo_pairs.jsonl")
    for trained, file in (
        (povid, "VL-RewardBench/data.jsonl"),
        (mm_rlhf, "MM-RLHF-RewardBench/mm_reward_bench.jsonl"),
    ):
        dev, test = ids(f"dev/{file}"), ids(f"test/{file}")
        assert not dev & test
        assert not trained & (dev | test)


# --------------------------------------------------------------------------------------------------
# The tasks


def every_claim(task, item):
    """All that one could answer, not the item's claims alone."""
    possible = world.possible_claims(task["family"], item["subject"])
    return item["claims"] if task["family"] == "comparison" else possible


@pytest.mark.slow
@pytest.mark.parametrize("split", sources.TASKS)
def test_a_task_has_one_true_answer(root, split):
    for task, row in task_rows(root, split):
        item = item_of(root, row)
        assert (item["split"], item["source"]) == (split, "tasks")
        assert item["answers"] == item["claims"]
        true = []
        for claim in every_claim(task, item):
            if world.truth(item["family"], item["scene"], item["subject"], claim):
                true.append(claim)
        assert true == [task["answer"]]


@pytest.mark.slow
def test_each_answer_of_a_test_task_is_right_once_in_its_set(root):
    times = defaultdict(Counter)
    for task, row in task_rows(root, "test"):
        item = item_of(root, row)
        times[row.question, frozenset(item["claims"])][task["answer"]] += 1
    for (_, claims), answers in times.items():
        assert set(answers) == claims
        assert len(set(answers.values())) == 1


@pytest.mark.slow
def test_the_twin_check_sees_a_shortcut(root):
    """With one twin of each set left out, who knows the texts by heart is above a half."""
    rows = benchmark_rows(root, "test", "pairs")[::2]
    assert known_by_heart(rows) > len(rows) / 2


def test_the_schema_check_sees_a_wrong_type_a_missing_and_a_new_field():
    kind = {"a": str, "b": [int], "c": {1, 2}, "d": (int, type(None))}
    good = {"a": "", "b": [1], "c": 2, "d": None}
    assert toy_data.is_of_kind(good, kind)
    for wrong in ({"a": 1}, {"b": [""]}, {"c": 3}, {"d": "1"}, {"e": 1}):
        assert not toy_data.is_of_kind(good | wrong, kind)
    assert not toy_data.is_of_kind({"a": ""}, kind)
