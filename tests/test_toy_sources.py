"""
The toy world in the paper's file formats (toy/sources.py): what each file holds, read back with json and pyarrow alone;
that every label is true and no reader of the text alone can know it; that the broken rows are the ones that were planted.

$ python -m pytest tests/test_toy_sources.py
"""
import base64
import doctest
import hashlib
import io
import json
import os
import random
import re
import resource
import shlex
import subprocess
import sys
from collections import Counter, defaultdict
from fractions import Fraction
from functools import cache
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from toy import server, sources, world

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--scale", "0.02"]
BENCHES = ["VL-RewardBench", "Multimodal-RewardBench", "MM-RLHF-RewardBench", "pairs"]
PLACES = [(split, bench) for split in ("dev", "test") for bench in BENCHES]


def make(*words, **env):
    command = [sys.executable, ROOT / "toy" / "sources.py", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | env)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Everything at the default scale, made once; how long that took on the processor is measured on the way."""
    out = tmp_path_factory.mktemp("full") / "data"
    spent = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])  # not the wall clock: others may be at work
    before = spent()
    done = make("--out", out, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    (out.parent / "seconds").write_text(str(spent() - before))
    (out.parent / "printed").write_text(done.stdout)
    return out


def hashes(folder):
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@cache
def table(path):
    return pq.read_table(path).to_pylist()


@cache
def key(root):
    found = defaultdict(list)
    for row in lines(root / "key.jsonl"):
        found[row["key"]].append(row | {"scene": [cell and tuple(cell) for cell in row["scene"]]})
    return found


def fits(value, kind):
    """Is a value of this kind: a type, a tuple of types, a set of values, {field: kind} with no other field, or [kind]?"""
    if isinstance(kind, dict):
        return isinstance(value, dict) and set(value) == set(kind) and all(fits(value[k], kind[k]) for k in kind)
    if isinstance(kind, list):
        return isinstance(value, list) and all(fits(v, kind[0]) for v in value)
    if isinstance(kind, set):
        return value in kind
    return type(value) in (kind if isinstance(kind, tuple) else (kind,))


def all_fit(rows, kind):
    assert rows
    for row in rows:
        assert fits(row, kind), row


def has_types(path, **columns):
    assert {f.name: str(f.type) for f in pq.read_schema(path)} == columns


# ---------------------------------------------------------------------------------------------------
# Readers, as plain as possible. Training: (question, picture files, chosen, rejected) a pair, or why there is none.


def load(path):
    return path.read_bytes() if path.is_file() else None


def media(folder, row):
    if "video" in row:
        frames = sorted((folder / row["video"]).iterdir()) if (folder / row["video"]).is_dir() else []
        return [f.read_bytes() for f in frames] or "missing frames"
    return [load(folder / row["image"])] if "image" in row else []


def pair(question, files, chosen, rejected):
    if isinstance(files, str):
        return files
    if None in files:
        return "missing image"
    for data in files:
        try:
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                assert image.size == (56, 56) and image.mode == "RGB" and image.format == "PNG"
        except OSError:
            return "unreadable image"
    return (question, files, chosen, rejected) if chosen.strip() and rejected.strip() else "empty answer"


def rlaif_v(folder):
    for path in sorted(folder.glob("RLAIF-V-Dataset_*.parquet")):
        for row in table(path):
            yield pair(row["question"], [row["image"] and row["image"]["bytes"]], row["chosen"], row["rejected"])


def vlfeedback(folder):
    for row in lines(folder / "vlfeedback_80k.jsonl"):
        scored, why = [], "tie"
        for c in row["completions"]:
            ratings = [a["Rating"] for a in c["annotations"].values()]
            if not all(r.isdigit() for r in ratings):
                why = "non-numeric rating"
            elif not c["response"].strip():
                why = "empty answer"
            else:
                scored.append((Fraction(sum(map(int, ratings)), 3), c["response"]))
        best, worst = max(scored), min(scored)
        files = [load(folder / "merged_images" / row["img_path"])]
        yield pair(row["prompt"], files, best[1], worst[1]) if best[0] > worst[0] else why


def povid(folder):
    for row in json.loads((folder / "POVID_preference_data_for_VLLMs_version_1.json").read_text()):
        (asked, chosen), (again, rejected) = row["conversations"], row["rejected_conversations"]
        assert asked == again and asked["value"].startswith("<image>\n")
        question, files = asked["value"].removeprefix("<image>\n"), [load(folder / "coco" / row["image"])]
        yield pair(question, files, chosen["value"], rejected["value"])


def wildvision(folder):
    for row in table(folder / "data" / "train-00000-of-00001.parquet"):
        a, b = row["conversation_a"], row["conversation_b"]
        assert len(a) == len(b) == 2 * row["turn"]
        files, texts = [row["image"] and row["image"]["bytes"]], [a[-1]["content"], b[-1]["content"]]
        if row["winner"].startswith("tie"):
            yield "tie"
        elif a[:-1] != b[:-1]:
            yield "different histories"
        else:
            yield pair(sources.told(a), files, *(texts if row["winner"] == "model_a" else texts[::-1]))


def mm_rlhf(folder):
    for row in lines(folder / "dpo_pairs.jsonl"):
        yield "tie" if row.get("is_tie") else pair(row["prompt"], media(folder, row), row["chosen"], row["rejected"])


def r1_reward_rl(folder):
    for row in lines(folder / "R1-Reward-RL.jsonl"):
        (turn,) = json.loads(row["message"])
        text, image = turn["content"]
        asked, a, b = re.search(r"\[Question\]:\n(.*?)\s*#+ \[Response 1\]:\n(.*?)\s*#+ \[Response 2\]:\n(.*?)"
                                r"(?:\s*#+ \*\*Output Format.*)?$", text["text"], re.DOTALL).groups()
        assert asked == row["question"]
        verdict = re.fullmatch("<answer>([12])</answer>", row["answer"][0])
        files = [load(folder / "RLAIF-V-image" / Path(image["image"]).name)]
        yield pair(asked, files, *((a, b) if verdict[1] == "1" else (b, a))) if verdict else "no verdict"


def own(folder):
    for row in lines(folder / "pairs.jsonl"):
        yield pair(row["prompt"], media(folder, row), row["chosen"], row["rejected"])


READERS = {"RLAIF-V": rlaif_v, "VLFeedback": vlfeedback, "POVID": povid, "WildVision-Battle": wildvision,
           "MM-RLHF": mm_rlhf, "R1-Reward-RL": r1_reward_rl, "pairs": own}


@cache
def train(root, name):
    read = list(READERS[name](root / "train" / ("" if name == "pairs" else name)))
    return [p for p in read if not isinstance(p, str)], Counter(p for p in read if isinstance(p, str))


@cache
def bench(root, split, name):
    """(question, picture files, answers as the dataset orders them, index of the right one) a row."""
    folder = root / split / ("" if name == "pairs" else name)
    if name == "VL-RewardBench":
        return [(r["query"], [r["image"]["bytes"]], r["response"], r["human_ranking"].index(0))
                for r in table(folder / "data" / "test-00000-of-00001.parquet")]
    if name == "Multimodal-RewardBench":
        outputs, rows = ["Output1", "Output2"], json.loads((folder / "data" / "all_data.json").read_text())
        return [(r["Text"], [load(folder / "data" / r["Image"])], [r[o] for o in outputs], outputs.index(r["Better"]))
                for r in rows]
    if name == "MM-RLHF-RewardBench":
        rows = lines(folder / "mm_reward_bench.jsonl")
        return [(r["prompt"], media(folder, r), [r["chosen"], r["rejected"]], 0) for r in rows]
    return [(r["question"], [load(folder / f) for f in r["video"] or r["images"]], r["responses"], r["choice"] - 1)
            for r in lines(folder / "pairs.jsonl")]


def item_of(root, question, files, answers):
    """The one item of the answer key that these belong to."""
    found = [row for row in key(root)[world.key_of(question, files)] if set(answers) <= set(row["answers"])]
    assert len(found) == 1
    return found[0]


def is_true(item, answer):
    """By the annotator's rule, which knows nothing of how the scene was made."""
    return world.truth(item["family"], item["scene"], item["subject"], item["claims"][item["answers"].index(answer)])


# ---------------------------------------------------------------------------------------------------
# The build


def test_the_default_build_takes_less_than_20_seconds_of_one_core(root):
    seconds = float((root.parent / "seconds").read_text())
    print(f"{seconds:.1f} s, {sum(p.stat().st_size for p in root.rglob('*') if p.is_file()) / 1e6:.0f} MB")
    assert seconds < 20


def test_the_table_names_every_file_with_its_rows(root):
    printed = dict(re.findall(r"^(\S+\.(?:jsonl?|parquet)) +(\d+)", (root.parent / "printed").read_text(), re.MULTILINE))
    there = {str(p.relative_to(root)) for p in root.rglob("*") if p.suffix in (".json", ".jsonl", ".parquet")}
    assert set(printed) == there - {"key.jsonl", "train/planted.json", sources.MARKER}
    for name, rows in printed.items():
        n = {".json": lambda p: len(json.loads(p.read_text())), ".jsonl": lambda p: len(lines(p)),
             ".parquet": lambda p: pq.read_metadata(p).num_rows}[Path(name).suffix](root / name)
        assert n == int(rows), name


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    for name, seed, noise in (("a", 5, "1"), ("b", 5, "2"), ("c", 6, "1")):
        assert make("--out", tmp_path / name, "--seed", seed, *SMALL, PYTHONHASHSEED=noise).returncode == 0
    a, b, c = (hashes(tmp_path / name) for name in "abc")
    assert a == b
    for path in {p for p in set(a) & set(c) if p != "train/planted.json"}:
        assert a[path] != c[path], path


def test_what_is_there_is_never_overwritten(tmp_path, capsys, monkeypatch):
    out, part = tmp_path / "data", tmp_path / "data.tmp"
    out.mkdir()  # empty: may be taken

    def killed(source, rows):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(sources.WRITERS, "POVID", killed)
        sources.main(["--out", str(out), *SMALL])
    assert not any(out.iterdir()) and part.exists()
    sources.main(["--out", str(out), *SMALL])  # takes the half of a data set away
    assert not part.exists()
    before = hashes(out)
    sources.main(["--out", str(out), *SMALL])
    assert capsys.readouterr().out.endswith(f"{out}: already there\n")
    for words, says in ((["--seed", "1"], "seed is 0, asked for is 1"),
                        (["--scale", "0.03"], "scale is 0.02, asked for is 0.03")):
        with pytest.raises(SystemExit, match=f"--out {out}: .*{says}.*rm -r"):
            sources.main(["--out", str(out), *SMALL, *words])
    (tmp_path / "mine.tmp").mkdir()
    with pytest.raises(SystemExit, match="mine.tmp is in the way"):
        sources.main(["--out", str(tmp_path / "mine"), *SMALL])
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("x")
    for path in ("theirs", "theirs/thesis.tex"):
        with pytest.raises(SystemExit, match="not made by toy/sources.py"):
            sources.main(["--out", str(tmp_path / path), *SMALL])
    for scale in ("0", "-1", "nan", "inf"):
        with pytest.raises(SystemExit, match="--scale .*legal"):
            sources.main(["--out", str(tmp_path / "new"), "--scale", scale])
    assert hashes(out) == before and not (tmp_path / "new").exists()


def test_the_documented_commands_and_examples_hold():
    commands = [line[2:] for line in sources.__doc__.splitlines() if line.startswith("$ python toy/sources.py ")]
    assert len(commands) == 2
    for command in commands:
        sources.parser().parse_args(shlex.split(command)[2:])
    assert doctest.testmod(sources).attempted and not doctest.testmod(sources).failed


# ---------------------------------------------------------------------------------------------------
# The schemas of the training sources, field by field

PICTURE = "struct<bytes: binary, path: string>"


def test_rlaif_v(root):
    folder, text = root / "train" / "RLAIF-V", "string"
    shards = sorted(folder.iterdir())
    assert [p.name for p in shards] == ["RLAIF-V-Dataset_000.parquet", "RLAIF-V-Dataset_001.parquet"]
    for shard in shards:
        has_types(shard, ds_name=text, image=PICTURE, question=text, chosen=text, rejected=text, origin_dataset=text,
                  origin_split=text, idx=text, image_path=text)
        all_fit([json.loads(row["origin_split"]) for row in table(shard)], {"model": str, "labeller": str, "type": str})
    assert [row["idx"] for shard in shards for row in table(shard)] == [str(i) for i in range(1845)]


def test_vlfeedback(root):
    rows = lines(root / "train" / "VLFeedback" / "vlfeedback_80k.jsonl")
    note = {"Rating": str, "Rationale": str}
    notes = {"Helpfulness": note, "Ethical Considerations": note, "Visual Faithfulness": note}
    completions = [{"annotations": notes, "model": str, "response": str}]
    all_fit(rows, {"id": str, "prompt": str, "models": [str], "completions": completions, "img_path": str})
    for row in rows:
        assert len(set(row["models"])) == 4 and [c["model"] for c in row["completions"]] == row["models"]


def test_vlfeedback_rates_the_right_answer_above_the_wrong_ones_and_these_alike(root):
    best = Counter()
    for row in lines(root / "train" / "VLFeedback" / "vlfeedback_80k.jsonl"):
        rated = [tuple(c["annotations"][a]["Rating"] for a in sources.ASPECTS) for c in row["completions"]]
        times = Counter(rated).most_common()
        if len(times) == 2 and all(r.isdigit() for ratings in rated for r in ratings):
            (wrong, three), (right, one) = times
            assert (three, one) == (3, 1) and all(r > w for r, w in zip(right, wrong))
            best[rated.index(right)] += 1
    assert sum(best.values()) >= 1232 and all(n > 240 for n in best.values()) and len(best) == 4  # in any place


def test_povid(root):
    folder = root / "train" / "POVID"
    rows = json.loads((folder / "POVID_preference_data_for_VLLMs_version_1.json").read_text())
    talk = [{"from": {"human", "gpt"}, "value": str}]
    all_fit(rows, {"id": str, "image": str, "conversations": talk, "rejected_conversations": talk})
    for row in rows:
        assert re.fullmatch(r"hallucination_pair-\d+", row["id"])
        assert re.fullmatch(r"COCO_train2014_\d{12}\.png", row["image"])
        assert [t["from"] for t in row["conversations"] + row["rejected_conversations"]] == ["human", "gpt"] * 2


def test_wildvision(root):
    path = root / "train" / "WildVision-Battle" / "data" / "train-00000-of-00001.parquet"
    turns = "list<element: struct<role: string, content: string>>"
    text = dict.fromkeys(("question_id", "model_a", "model_b", "language", "winner", "judge"), "string")
    has_types(path, **text, image=PICTURE, conversation_a=turns, conversation_b=turns, turn="int32", anony="bool",
              tstamp="int32")
    rows = table(path)
    assert {row["winner"] for row in rows} == {"model_a", "model_b", "tie", "tie (bothbad)"}
    assert 0.05 < sum(row["turn"] == 2 for row in rows) / len(rows) < 0.35
    for row in rows:
        assert row["model_a"] != row["model_b"] and row["turn"] in (1, 2)
        assert [t["role"] for t in row["conversation_a"]] == ["user", "assistant"] * row["turn"]
    assert any(question.startswith("user: ") for question, *_ in train(root, "WildVision-Battle")[0])


def test_mm_rlhf(root):
    folder = root / "train" / "MM-RLHF"
    rows, of = lines(folder / "dpo_pairs.jsonl"), defaultdict(list)
    optional = {"chosen_reason": str, "rejected_reason": str, "is_tie": bool, "ls_factor": float}
    needed = {"id": str, "prompt": str, "chosen": str, "rejected": str}
    for row in rows:
        assert ("image" in row) != ("video" in row)
        medium = {"image": str} if "image" in row else {"video": str}
        assert fits(row, needed | medium | {k: v for k, v in optional.items() if k in row}), row
        of[row["id"]].append(row)
    for field in optional:
        assert 0 < sum(field in row for row in rows) < len(rows)
    assert {len(pairs) for pairs in of.values()} == {1, 2, 3}
    for pairs in of.values():
        assert len({p["chosen"] for p in pairs}) == 1 and len({p["rejected"] for p in pairs}) == len(pairs)
    good = Counter((row.get("image") or row["video"]).split("/")[0] for row in rows)
    for category, n in sources.TRAIN["MM-RLHF"].items():  # and at most all of the broken ones
        assert n <= good[category] <= n + 17
    videos = [row for row in rows if "video" in row]
    assert 40 < len(videos) < len(rows) / 10
    for row in videos[:20]:
        if (folder / row["video"]).is_dir():
            assert sorted(p.name for p in (folder / row["video"]).iterdir()) == [f"{t:04d}.png" for t in range(4)]


def test_r1_reward_rl_holds_the_same_in_both_files(root):
    folder = root / "train" / "R1-Reward-RL"
    apart, hub = lines(folder / "R1-Reward-RL.jsonl"), table(folder / "data" / "train-00000-of-00001.parquet")
    has_types(folder / "data" / "train-00000-of-00001.parquet", question="string", message="string",
              answer="list<element: string>", image="string")
    all_fit(apart, {"message": str, "question": str, "answer": [str]})
    assert [{k: row[k] for k in ("message", "question", "answer")} for row in hub] == apart
    for row in hub:
        (turn,) = json.loads(row["message"])
        assert turn["role"] == "user" and [part["type"] for part in turn["content"]] == ["text", "image"]
        path = turn["content"][1]["image"]
        assert path.startswith("/authors/disk/") and not Path(path).exists()
        assert load(folder / "RLAIF-V-image" / Path(path).name) == (row["image"] and base64.b64decode(row["image"]))
    answers = Counter(row["answer"][0] for row in apart)
    assert set(answers) == {"<answer>1</answer>", "<answer>2</answer>", "<answer></answer>"} and min(answers.values()) == 3


def test_own_pairs_have_a_picture_or_none(root):
    rows = lines(root / "train" / "pairs.jsonl")
    for row in rows:
        medium = {"image": str} if "image" in row else {}
        assert fits(row, {"id": str, "prompt": str, "chosen": str, "rejected": str} | medium), row
    assert 0.15 < sum("image" not in row for row in rows) / len(rows) < 0.35
    assert all(row["prompt"].startswith("A picture has ") for row in rows if "image" not in row)


# ---------------------------------------------------------------------------------------------------
# The benchmarks


@pytest.mark.parametrize("split", ["dev", "test"])
def test_vl_reward_bench(root, split):
    folder = root / split / "VL-RewardBench"
    hub, released = table(folder / "data" / "test-00000-of-00001.parquet"), lines(folder / "data.jsonl")
    has_types(folder / "data" / "test-00000-of-00001.parquet", id="string", query="string",
              response="list<element: string>", image=PICTURE, human_ranking="list<element: int64>",
              models="list<element: string>", judge="string", rationale="string", query_source="string",
              ground_truth="string")
    all_fit(released, {"id": str, "prompt": str, "chosen": str, "rejected": str, "image": str, "chosen_reason": {""},
                       "rejected_reason": {""}})
    assert len(hub) == len(released)
    assert sorted(row["image"] for row in released) == sorted(f"vl_reward/img/image_{i}.png" for i in range(len(hub)))
    groups = [benchmark_rule(row["id"]) for row in hub]
    assert set(groups[:60]) == set(groups)  # rows are mixed: the first of them hold every group
    for row, other in zip(hub, released):
        assert row["human_ranking"] in ([0, 1], [1, 0]) and len(row["response"]) == len(set(row["response"])) == 2
        best = row["response"][row["human_ranking"].index(0)]
        assert (row["id"], row["query"], best) == (other["id"], other["prompt"], other["chosen"])
        assert other["rejected"] in row["response"]
        assert load(folder / other["image"]) == row["image"]["bytes"]
        assert bool(row["query_source"]) != row["id"].startswith(("mathverse_", "mmmu_pro_"))
    repeated = Counter(row["id"] for row in hub)
    assert {n for n in repeated.values()} == {1, 2}
    assert all(name.startswith(("mathverse_", "mmmu_pro_")) for name, n in repeated.items() if n == 2)


def benchmark_rule(name):
    """The benchmark's own: by the first word of the lower-cased id."""
    word = re.split("[-_]", name.lower())[0]
    return {"rlaif": "hallucination", "rlhf": "hallucination", "hallucination": "hallucination", "mathverse": "reasoning",
            "mmmu": "reasoning"}.get(word, "general")


def paper_rule(name):
    """That of the paper's scorer: the same words, looked for in the id as it is; so RLAIF and RLHF are not found."""
    return "reasoning" if "mathverse" in name or "mmmu" in name else "hallucination" if any(
        word in name for word in ("hallucination", "rlaif", "rlhf")) else "general"


@pytest.mark.parametrize("split", ["dev", "test"])
def test_the_two_groupings_of_vl_reward_bench_differ_as_in_the_real_file(root, split):
    names = [row["id"] for row in table(root / split / "VL-RewardBench" / "data" / "test-00000-of-00001.parquet")]
    groups = ("general", "hallucination", "reasoning")
    for rule, real in ((benchmark_rule, (183, 749, 318)), (paper_rule, (484, 448, 318))):
        found = Counter(map(rule, names))
        assert all(abs(found[group] / len(names) - n / 1250) < 0.02 for group, n in zip(groups, real)), found
    words = "hallucination mathverse mmmu RLAIF RLHF svit jailbreak politics LRVInstruction wildvision".split()
    assert {re.match("[A-Za-z]+", name)[0] for name in names} == set(words)
    if split == "test":
        assert Counter(map(benchmark_rule, names)) == {"hallucination": 360, "reasoning": 152, "general": 94}
        assert Counter(map(paper_rule, names)) == {"hallucination": 216, "reasoning": 152, "general": 238}


@pytest.mark.parametrize("split", ["dev", "test"])
def test_multimodal_reward_bench(root, split):
    rows = json.loads((root / split / "Multimodal-RewardBench" / "data" / "all_data.json").read_text())
    categories = {"open_generation/correctness_task", "open_generation/preference_task", "knowledge", "reasoning", "safety",
                  "vqa"}
    all_fit(rows, {"ID": str, "Text": str, "Image": str, "Output1": str, "Output2": str, "Better": {"Output1", "Output2"},
                   "Category": categories})
    assert len({row["ID"] for row in rows}) == len(rows)
    for category, start, real in (("correctness_task", "", 623), ("preference_task", "", 654), ("knowledge", "", 630),
                                  ("reasoning", "math", 514), ("reasoning", "emma", 584), ("safety", "pairs", 508),
                                  ("vqa", "", 1198)):
        share = sum(r["Category"].endswith(category) and r["ID"].lower().startswith(start) for r in rows) / len(rows)
        assert abs(share - real / 4711) < 0.015, category


@pytest.mark.parametrize("split", ["dev", "test"])
def test_mm_rlhf_reward_bench(root, split):
    rows, of = lines(root / split / "MM-RLHF-RewardBench" / "mm_reward_bench.jsonl"), defaultdict(list)
    for row in rows:
        medium = "image" if "image" in row else "video"
        fields = ("id", medium, "prompt", "chosen", "rejected", "chosen_reason", "rejected_reason")
        assert fits(row, dict.fromkeys(fields, str))
        of[row["id"]].append(row)
    words = {word: {name for name, (row, *_) in of.items() if word in row.get("image", row.get("video"))}
             for word in ("mcq", "long", "short", "safety", "video")}
    assert sum(map(len, words.values())) == len(of)  # each id has one of the five words in its path
    assert {len(pairs) for pairs in of.values()} == {2, 3}
    n = {word: sum(len(of[name]) for name in names) for word, names in words.items()}
    assert n == ({"mcq": 42, "long": 36, "short": 36, "safety": 30, "video": 24} if split == "test" else n)
    assert min(n.values()) >= 6 and all(("video" in row) == (row["id"] in words["video"]) for row in rows)


@pytest.mark.parametrize("split", ["dev", "test"])
def test_the_projects_own_pairs(root, split):
    rows = lines(root / split / "pairs.jsonl")
    all_fit(rows, {"id": str, "source": str, "question": str, "images": [str], "video": (list, type(None)),
                   "responses": [str], "choice": {1, 2}, "attempts": {None}, "annotation": {None},
                   "family": set(world.FAMILIES), "difficulty": float, "medium": {"image", "video"}})
    assert len({row["id"] for row in rows}) == len(rows) >= (1200 if split == "test" else 600)
    assert Counter(row["choice"] for row in rows) == {1: len(rows) // 2, 2: len(rows) // 2}
    assert Counter(row["family"] for row in rows) == dict.fromkeys(world.FAMILIES, len(rows) // 6)
    assert all(len(row["responses"]) == 2 and len(row["images"]) == (row["medium"] == "image") for row in rows)
    assert all(row["video"] == sorted(row["video"]) and len(row["video"]) == 4 for row in rows if row["medium"] == "video")
    assert 0 < sum(row["medium"] == "video" for row in rows) < len(rows) / 20
    assert abs(sum(row["difficulty"] for row in rows) / len(rows) - 0.5) < 0.06


# ---------------------------------------------------------------------------------------------------
# Labels, twins, keys


@pytest.mark.parametrize("name", READERS)
def test_every_training_label_is_true_and_what_is_broken_was_planted(root, name):
    usable, dropped = train(root, name)
    assert dropped == json.loads((root / "train" / "planted.json").read_text())[name] == sources.PLANTED[name]
    rows = sources.TRAIN[name]
    assert 0 <= len(usable) - (sum(rows.values()) if isinstance(rows, dict) else rows) <= 1
    for question, files, chosen, rejected in usable:
        item = item_of(root, question, files, (chosen, rejected))
        assert (item["split"], item["source"], item["answers"][item["right"]]) == ("train", name, chosen)
        assert is_true(item, chosen) and not is_true(item, rejected)


def test_the_training_pairs_have_the_shares_of_table_2_and_all_difficulties(root):
    n = {name: len(train(root, name)[0]) for name in READERS}
    assert 9550 < sum(n.values()) < 9650
    papers = {"RLAIF-V": 74_802, "VLFeedback": 80_258, "POVID": 17_184, "WildVision-Battle": 10_383}
    for name, paper in papers.items():
        assert abs(n[name] / sum(n[k] for k in papers) - paper / sum(papers.values())) < 0.002
    assert n["MM-RLHF"] == sum(sources.TRAIN["MM-RLHF"].values())
    items = [row for rows in key(root).values() for row in rows if row["split"] == "train"]
    for tenth in range(10):
        assert 0.085 < sum(int(10 * row["difficulty"]) == tenth for row in items) / len(items) < 0.115
    assert Counter(row["medium"] for row in items).keys() == {"image", "video", "text"}
    assert all(0.09 < n / len(items) < 0.25 for n in Counter(row["family"] for row in items).values())


@pytest.mark.parametrize("split, name", PLACES)
def test_every_benchmark_label_is_true(root, split, name):
    for question, files, answers, right in bench(root, split, name):
        item = item_of(root, question, files, answers)
        assert [is_true(item, a) for a in answers] == [right == 0, right == 1]
        assert item["answers"][item["right"]] == answers[right]
        assert (item["split"], item["source"]) == (split, name)


@pytest.mark.parametrize("split, name", PLACES)
def test_the_text_alone_tells_nothing(root, split, name):
    """Half, exactly: the longer answer, the shorter one, the first one, and one who knows every text's answers by heart."""
    rows = bench(root, split, name)
    more = [len(answers[right]) - len(answers[1 - right]) for _, _, answers, right in rows]
    assert sum(n > 0 for n in more) == sum(n < 0 for n in more)  # equal lengths count half
    if name != "MM-RLHF-RewardBench":  # shows the chosen one first
        assert sum(right == 0 for _, _, _, right in rows) == len(rows) / 2
    seen = defaultdict(Counter)
    for question, _, answers, right in rows:
        seen[question, frozenset(answers)][answers[right]] += 1
    assert sum(max(times.values()) for times in seen.values()) == len(rows) / 2


@pytest.mark.parametrize("split", ["dev", "test"])
def test_the_text_alone_gets_one_id_of_each_set_at_acc_plus(root, split):
    """Acc+ asks for all rows of an id: who knows the texts by heart gets one of the n ids of a set, at most a third."""
    found = {}
    for question, files, answers, _ in bench(root, split, "MM-RLHF-RewardBench"):
        item = item_of(root, question, files, answers)
        found[item["key"]] = (question, frozenset(item["answers"])), item["answers"][item["right"]]
    by_text = defaultdict(Counter)
    for text, right in found.values():
        by_text[text][right] += 1
    best = sum(max(times.values()) for times in by_text.values()) / len(found)
    assert 1 / 4 <= best <= 1 / 3 and len(found) == (60 if split == "test" else len(found))


def test_each_line_of_the_key_is_used_and_the_stand_in_takes_it(root):
    used = {world.key_of(p[0], p[1]) for name in READERS for p in train(root, name)[0]}
    used |= {world.key_of(q, files) for place in PLACES for q, files, _, _ in bench(root, *place)}
    used |= {world.key_of(row["question"], [load(root / "tasks" / row["images"][0])])
             for split in ("train", "test") for row in lines(root / "tasks" / f"{split}.jsonl")}
    assert used == set(key(root))
    assert len(server.load_key([root / "key.jsonl"])) == len(used)
    all_fit(lines(root / "key.jsonl"), {
        "key": str, "split": {"train", "dev", "test"}, "source": str, "family": set(world.FAMILIES), "difficulty": float,
        "medium": {"image", "video", "text"}, "question": str, "answers": [str], "claims": [str], "right": int,
        "scene": [(list, type(None))], "subject": str})


def test_frames_are_keyed_in_the_order_of_their_names(root):
    question, files, *_ = next(row for row in bench(root, "test", "MM-RLHF-RewardBench") if len(row[1]) == 4)
    assert len(set(files)) == 4
    assert world.key_of(question, files) in key(root) and world.key_of(question, files[::-1]) not in key(root)


def test_no_picture_is_in_two_splits(root):
    """By bytes, whatever the file; tasks count as train and test."""
    seen = defaultdict(set)
    for path in root.rglob("*.png"):
        parts = path.relative_to(root).parts
        asked = "test" if "vstar_bench" in parts or path.name.startswith("test-") else "train"
        split = asked if parts[0] == "tasks" else parts[0]
        seen[hashlib.sha256(path.read_bytes()).digest()].add(split)
    for path in root.rglob("*.parquet"):
        split = "train" if "tasks" in path.parts else path.relative_to(root).parts[0]
        for row in table(path):
            data = row["image"]["bytes"] if isinstance(row["image"], dict) else row["image"]
            if data is not None:
                seen[hashlib.sha256(base64.b64decode(data) if isinstance(data, str) else data).digest()].add(split)
    assert all(len(splits) == 1 for splits in seen.values()) and len(seen) > 8000
    assert set().union(*seen.values()) == {"train", "dev", "test"}


def test_no_id_is_in_two_splits(root):
    """Decontamination drops by id, so equal ids must mean equal rows."""
    dev, test = ({row["id"] for row in lines(root / split / "VL-RewardBench" / "data.jsonl")} for split in ("dev", "test"))
    povid = root / "train" / "POVID" / "POVID_preference_data_for_VLLMs_version_1.json"
    assert not dev & test and not {row["id"] for row in json.loads(povid.read_text())} & (dev | test)
    dev, test = ({row["id"] for row in lines(root / split / "MM-RLHF-RewardBench" / "mm_reward_bench.jsonl")}
                 for split in ("dev", "test"))
    trained = {row["id"] for row in lines(root / "train" / "MM-RLHF" / "dpo_pairs.jsonl")}
    assert not dev & test and not trained & (dev | test)


# ---------------------------------------------------------------------------------------------------
# The tasks


def test_a_task_has_one_true_answer(root):
    for split in ("train", "test"):
        rows = lines(root / "tasks" / f"{split}.jsonl")
        all_fit(rows, {"id": str, "question": str, "images": [str], "answer": str, "family": set(world.FAMILIES),
                       "difficulty": float})
        seen = defaultdict(Counter)
        for row in rows:
            item = item_of(root, row["question"], [load(root / "tasks" / row["images"][0])], [row["answer"]])
            assert (item["split"], item["source"], item["answers"]) == (split, "tasks", item["claims"])
            every = {"colour": list(world.COLOURS), "shape": world.SHAPES, "position": world.PLACES, "count": world.COUNTS,
                     "absence": world.SHAPES}.get(row["family"], item["claims"])  # not the claims alone
            assert [c for c in every if world.truth(item["family"], item["scene"], item["subject"], c)] == [row["answer"]]
            seen[row["question"], frozenset(item["claims"])][row["answer"]] += 1
    assert all(set(times) == claims and len(set(times.values())) == 1 for (_, claims), times in seen.items())  # of test


def test_the_tasks_in_the_public_formats(root):
    folder = root / "tasks"
    test, tasks = lines(folder / "test.jsonl"), lines(folder / "train.jsonl")
    half = len(tasks) // 2
    same = lambda path, row: (folder / path).read_bytes() == (folder / row["images"][0]).read_bytes()

    vstar = lines(folder / "vstar_bench" / "test_questions.jsonl")
    all_fit(vstar, {"image": str, "text": str, "category": {"direct_attributes", "relative_position"}, "question_id": str,
                    "label": set("ABCD")})
    for row, task in zip(vstar, test, strict=True):
        question, *options, ask = row["text"].split("\n")
        assert question == task["question"] and ask == "Answer with the option's letter from the given choices directly."
        assert f"({row['label']}) {task['answer']}" in options and same(f"vstar_bench/{row['image']}", task)

    arxiv = lines(folder / "ArxivQA" / "arxivqa.jsonl")
    all_fit(arxiv, {"id": str, "image": str, "options": [str], "label": str, "rationale": str, "question": str})
    for row, task in zip(arxiv, tasks[:half], strict=True):
        assert f"{row['label'][0]}. {task['answer']}" in row["options"] and row["question"] == task["question"]
        assert len(row["label"]) == 1 or row["label"] in row["options"]
        assert same(f"ArxivQA/{row['image']}", task)

    path = folder / "ThinkLite-VL-hard-11k" / "ThinkLite-VL-Hard-11k.parquet"
    has_types(path, id="int64", problem="string", answer="string", image="binary")
    for row, task in zip(table(path), tasks[half:], strict=True):
        assert (row["problem"], row["answer"]) == (f"<image>{task['question']}", task["answer"])
        assert row["image"] == (folder / task["images"][0]).read_bytes()


# ---------------------------------------------------------------------------------------------------
# The checks, checked


def test_the_schema_check_sees_a_wrong_type_a_missing_and_a_new_field():
    kind = {"a": str, "b": [int], "c": {1, 2}, "d": (int, type(None))}
    assert fits({"a": "", "b": [1], "c": 2, "d": None}, kind)
    for wrong in ({"a": 1}, {"b": [""]}, {"c": 3}, {"d": "1"}, {"e": 1}):
        assert not fits({"a": "", "b": [1], "c": 2, "d": 1} | wrong, kind)
    assert not fits({"a": ""}, kind)


def test_the_twin_check_sees_a_shortcut(monkeypatch, root):
    """One twin of each set left out at random, and who knows the texts by heart is above a half."""
    rng, rows = random.Random(0), bench(root, "test", "pairs")
    half = [rng.choice(rows[i:i + 2]) for i in range(0, len(rows), 2)]
    monkeypatch.setattr(sys.modules[__name__], "bench", lambda *place: half)
    with pytest.raises(AssertionError):
        test_the_text_alone_tells_nothing(root, "test", "pairs")
