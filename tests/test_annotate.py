"""
Stage 1 over real files and real HTTP: the stand-in annotator of toy/server.py with its faults, and
a real vLLM server. Nothing is mocked; what is killed is killed by SIGKILL.
"""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import urllib.request
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import annotator, png, read_rows, vllm_server, write_rows

import annotate
from core import replies
from core.files import InputError
from core.pairs import CRITIQUE_PROMPT, read_pairs, swap
from stable_reinforce import parse
from toy import world

ROOT = Path(__file__).resolve().parent.parent
WRITTEN = ("mix", "pairs", "sft", "rl", "dropped")
WRITTEN = (*[f"{name}.jsonl" for name in WRITTEN], "report.md", "report.png")
NOWHERE = "http://127.0.0.1:9/v1"


@pytest.fixture
def in_toy_world(toy_world, monkeypatch):
    monkeypatch.chdir(toy_world)


@pytest.fixture(scope="session")
def whole(toy_world):
    """(folder, the server's counts) of an unbroken run over all toy sources."""
    with contextlib.chdir(toy_world), annotator("--key", "out/toy/data/key.jsonl") as stand_in:
        return annotate_toy(stand_in.url, toy_world / "whole"), stand_in.stats


def annotate_toy(url, out, *words):
    preset = f"@{ROOT}/toy/annotate.args"
    annotate.main([preset, "--base_url", url, "--out", str(out), *map(str, words)])
    return Path(out)


def annotate_own(path, out, *words, url=NOWHERE):
    """A run over your own pairs; without a server, it comes as far as the first request."""
    words = ["--base_url", url, "--retries", "0", *map(str, words)]
    annotate.main(["--data", f"pairs={path}", "--out", str(out), *words])


def mix(data, out, *words):
    """(counts, pairs) of the mix alone."""
    args = annotate.parser().parse_args(["--data", *data, "--out", str(out), *map(str, words)])
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    counts = annotate.mix(annotate.collect(args.data, out), args, out)
    return counts, read_pairs(out / "mix.jsonl")


def own_rows(number=1, **more):
    rows = []
    for i in range(number):
        rows.append({"prompt": f"Q{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} | more)
    return rows


def toy_rows(folder, number):
    """(file of pairs, answer key); the pictures are described in words, the stand-in can judge."""
    rng = random.Random(0)
    rows, key = [], []
    for _ in range(number):
        item = rng.choice(world.twins(rng, medium="text"))
        right = item["right"]
        chosen, rejected = item["answers"][right], item["answers"][1 - right]
        rows.append({"prompt": item["question"], "chosen": chosen, "rejected": rejected})
        key.append({"key": world.key_of(item["question"], []), **item})
    return write_rows(folder / "key.jsonl", rows), write_rows(folder / "pairs.jsonl", key)


def imbalance(pairs):
    """How many more pairs have the better response first than second."""
    choices = Counter(pair.choice for pair in pairs)
    return choices[1] - choices[2]


def read_written(out):
    return {name: (out / name).read_bytes() for name in WRITTEN}


# ------------------------------------------------------------------------------------------------
# From the sources to the three sets


def test_pairs_become_the_three_sets(tmp_path):
    path, key = toy_rows(tmp_path, 60)
    with annotator("--key", key) as stand_in:
        annotate_own(path, tmp_path / "out", url=stand_in.url)
        stats = stand_in.stats
    check_sets(tmp_path / "out", stats)
    with annotator("--key", key) as stand_in:
        before = read_written(tmp_path / "out")
        changeable = ["--concurrency", "3", "--timeout", "9", "--retries", "1"]
        annotate_own(path, tmp_path / "out", *changeable, url=stand_in.url)
        assert stand_in.stats["requests"] == 0 and read_written(tmp_path / "out") == before


def check_sets(out, stats):
    """The server saw every pair as it is in its key, and every attempt once, with its own seed."""
    pairs, sft, rl = [read_pairs(out / f"{name}.jsonl") for name in ("pairs", "sft", "rl")]
    attempts = Counter(pair.attempts for pair in pairs)
    assert set(attempts) == {1, 2, 3, 4}
    assert [p.id for p in sft] == [p.id for p in pairs if p.attempts <= 3]
    assert [p.id for p in rl] == [p.id for p in pairs if p.attempts >= 2]
    assert all(parse(pair.annotation).choice == pair.choice for pair in sft)
    assert all(pair.annotation is None for pair in pairs if pair.attempts == 4)
    assert len({pair.id for pair in pairs}) == len(pairs) and abs(imbalance(pairs)) <= 1
    for pair in pairs:
        assert all(os.path.exists(picture) for picture in pair.images + (pair.video or []))
    assert stats["attempt"] == {"0": len(pairs), "1": len(rl), "2": attempts[3] + attempts[4]}
    assert stats["unknown"] == stats["bad"] == 0
    journal = read_rows(out / "journal.jsonl")[1:]
    replies = {(row["id"], row["attempt"]) for row in journal}
    assert len(journal) == stats["requests"] == len(replies)


@pytest.mark.slow
def test_the_toy_sources_become_the_three_sets(whole):
    check_sets(*whole)
    assert len(read_pairs(whole[0] / "pairs.jsonl")) > 500


@pytest.mark.slow
def test_a_second_run_asks_nothing_and_changes_nothing(whole, in_toy_world):
    out, _ = whole
    before = read_written(out)
    with annotator() as stand_in:
        annotate_toy(stand_in.url, out)
        assert stand_in.stats["requests"] == 0
    assert read_written(out) == before


@pytest.mark.slow
def test_the_report_says_what_became_of_every_row(whole):
    out, _ = whole
    text = (out / "report.md").read_text()
    pairs = read_pairs(out / "pairs.jsonl")
    attempts = Counter(pair.attempts for pair in pairs)
    columns = [len(pairs), len(pairs), *[attempts[k] for k in (1, 2, 3, 4)], 0]
    assert "| all | " + " | ".join(f"{number:,}" for number in columns) + " |" in text
    assert f"{attempts[1] + 2 * attempts[2] + 3 * attempts[3] + 3 * attempts[4]:,} replies" in text
    assert "| WildVision-Battle | different histories | 5 |" in text
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")


def test_both_orders_and_contradicted_pairs(tmp_path):
    """An annotator that is always wrong contradicts every pair; one that is always right none."""
    path, key = toy_rows(tmp_path, 10)
    for right, contradicted in ((0, True), (1, False)):
        out = tmp_path / f"right-{right}"
        with annotator("--key", key, "--right_easy", right, "--right_hard", right) as stand_in:
            annotate_own(path, out, "--both_orders", url=stand_in.url)
        pairs = read_pairs(out / "pairs.jsonl")
        assert len(pairs) == 20 and imbalance(pairs) == 0
        assert {pair.extra["contradicted"] for pair in pairs} == {contradicted}
        for pair, other in zip(pairs[::2], pairs[1::2]):
            assert other.id == pair.id + "#swapped"
            assert (swap(other).responses, swap(other).choice) == (pair.responses, pair.choice)


def test_critiques_of_single_responses(tmp_path):
    path, key = toy_rows(tmp_path, 10)
    out = tmp_path / "out"
    with annotator("--key", key, "--right_easy", 1, "--right_hard", 1) as stand_in:
        annotate_own(path, out, "--mode", "critique", url=stand_in.url)
        annotate_own(path, out, "--mode", "critique", url=stand_in.url)
        assert stand_in.stats["critic"] == stand_in.stats["requests"] == 20
        annotate_own(path, out, url=stand_in.url)  # the same mix, judged: in a journal of its own
    judged = read_pairs(out / "pairs.jsonl")
    criticized = read_pairs(out / "critic.jsonl")
    assert [pair.id for pair in criticized] == [pair.id for pair in judged]
    for pair in criticized:
        praise = [critique.endswith("It is right.") for critique in pair.critiques]
        assert praise == [pair.choice == 1, pair.choice == 2]


def test_a_critique_is_of_the_next_response():
    pair = annotate.pairs.Pair("x", "toy", "Q", [], None, responses=["a", "b"], choice=1)
    verdict = replies.Verdict(choice=None, offset=0)
    (turn,) = annotate.next_request(pair, [verdict], "critique")
    assert turn["content"][-1]["text"] == CRITIQUE_PROMPT.format(question="Q", answer="b")
    assert annotate.next_request(pair, [verdict] * 2, "critique") is None


@pytest.mark.slow
def test_a_real_vllm_server_is_an_annotator_like_any_other(tmp_path, in_toy_world):
    """A toy model with random weights reaches no verdict: all attempts are made, all pairs fail."""
    pytest.importorskip("vllm")
    words = [sys.executable, "toy/model.py", "--out", str(tmp_path / "model"), "--seed", "0"]
    subprocess.run(words, cwd=ROOT, check=True)
    limits = ["--max-model-len", 2048, "--max-num-seqs", 8]
    limits += ["--limit-mm-per-prompt", '{"image":8}']
    with vllm_server(tmp_path / "model", tmp_path / "log", "toy", *limits) as url:
        out = tmp_path / "out"
        annotate_toy(url, out, "--limit", "24", "--model", "toy", "--max_tokens", "48")
    pairs, journal = read_pairs(out / "pairs.jsonl"), read_rows(out / "journal.jsonl")[1:]
    assert len(pairs) == 24 and sum(bool(pair.images) for pair in pairs) > 15
    assert {pair.attempts for pair in pairs} <= {1, 2, 3, 4}
    assert all(row["tokens"][0] > 100 for row in journal)
    assert len(journal) == sum(min(3, pair.attempts) for pair in pairs)


# ------------------------------------------------------------------------------------------------
# The mix


def test_all_of_mm_rlhf_and_so_many_of_the_others(tmp_path):
    human = [row | {"id": i, "prompt": f"H{i}"} for i, row in enumerate(own_rows(60))]
    others = write_rows(tmp_path / "pairs.jsonl", own_rows(80))
    data = [f"pairs={others}", f"MM-RLHF={write_rows(tmp_path / 'dpo_pairs.jsonl', human)}"]
    counts, pairs = mix(data, tmp_path / "a", "--others", 30)
    sources = Counter(pair.source for pair in pairs)
    assert sources == {"MM-RLHF-Other": 60, "pairs": 30}
    assert counts == {
        "MM-RLHF-Other": {"pairs": 60, "taken": 60},
        "pairs": {"pairs": 80, "taken": 30},
    }
    assert imbalance(pairs) == 0
    changes = [pair.source != after.source for pair, after in pairwise(pairs)]
    assert sum(changes) > 10  # it is shuffled
    ids = [pair.id for pair in pairs]
    turned = mix(data[::-1], tmp_path / "b", "--others", 30)[1]
    assert [pair.id for pair in turned] == ids
    other_seed = mix(data, tmp_path / "c", "--others", 30, "--seed", 1)[1]
    assert [pair.id for pair in other_seed] != ids
    few = mix(data, tmp_path / "d", "--others", 30, "--limit", 7)[1]
    assert [pair.id for pair in few] == ids[:7] and abs(imbalance(few)) == 1


def test_a_row_that_makes_no_pair_is_counted_and_listed(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    rows = own_rows(4, image="a.png")
    rows[0]["image"] = "none.png"
    rows[1]["images"] = ["a.png", "https://example.org/a.png"]
    rows[2]["chosen"] = " "
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    counts, pairs = mix([f"pairs={path}"], tmp_path / "out")
    reasons = ["missing image", "picture is a URL", "empty answer"]
    assert counts["pairs"] == dict.fromkeys([*reasons, "pairs", "taken"], 1) and len(pairs) == 1
    assert read_rows(tmp_path / "out/dropped.jsonl") == [
        {"source": "pairs", "where": f"{path}, line {number}", "reason": reason}
        for number, reason in enumerate(reasons, 1)
    ]


def test_no_pair_twice(tmp_path):
    """Whatever the order of the responses, upper case, the id and the pictures' file format."""
    from PIL import Image

    (tmp_path / "a.png").write_bytes(png())
    Image.open(tmp_path / "a.png").save(tmp_path / "b.webp", lossless=True)
    (tmp_path / "other.png").write_bytes(png(colour="blue"))
    row = {"prompt": "What colour?", "chosen": "red", "rejected": "blue", "image": "a.png"}
    rows = [
        row,
        row | {"chosen": "blue", "rejected": "red"},
        row | {"prompt": "what  COLOUR?", "image": "b.webp", "id": "x"},
        row | {"image": "other.png"},
        row | {"image": None},
    ]
    counts, pairs = mix([f"pairs={write_rows(tmp_path / 'pairs.jsonl', rows)}"], tmp_path / "out")
    assert counts["pairs"] == {"pairs": 3, "seen before": 2, "taken": 3} and len(pairs) == 3


def test_of_two_equal_pairs_that_of_mm_rlhf_stays(tmp_path):
    others = write_rows(tmp_path / "pairs.jsonl", own_rows())
    human = write_rows(tmp_path / "dpo_pairs.jsonl", own_rows(id="h"))
    _, pairs = mix([f"pairs={others}", f"MM-RLHF={human}"], tmp_path / "out")
    assert [pair.id for pair in pairs] == ["h"]


def test_ids_that_repeat_are_numbered(tmp_path):
    rows = own_rows(4)
    for row, pair_id in zip(rows, ("a", "a", "a#2", "a")):
        row["id"] = pair_id
    _, pairs = mix([f"pairs={write_rows(tmp_path / 'pairs.jsonl', rows)}"], tmp_path / "out")
    assert sorted(pair.id for pair in pairs) == ["a", "a#2", "a#2#2", "a#3"]


def test_pictures_are_stored_once_and_their_paths_lead_there(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    image = {"bytes": png(), "path": "a.png"}
    rows = []
    for i in range(3):
        rows.append({"idx": i, "question": f"Q{i}", "chosen": "a", "rejected": "b", "image": image})
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    _, pairs = mix([f"RLAIF-V={tmp_path}"], tmp_path / "out")
    assert len(pairs) == 3
    (path,) = {os.path.realpath(pair.images[0]) for pair in pairs}
    assert Path(path).read_bytes() == png()
    assert Path(path).is_relative_to(tmp_path.resolve() / "out/images")


def test_decontamination_by_id_text_and_picture(tmp_path):
    """One of each, in the formats of the three benchmarks."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = []
    for colour in ("red", "blue", "green", "yellow", "black"):
        (tmp_path / f"{colour}.png").write_bytes(png(colour=colour))
        row = {"id": f"train-{colour}", "prompt": f"Q {colour}", "image": f"{colour}.png"}
        rows.append(row | {"chosen": f"A {colour}", "rejected": f"B {colour}"})
    data = [f"pairs={write_rows(tmp_path / 'pairs.jsonl', rows)}"]

    image = {"bytes": png(colour="white"), "path": "w.png"}
    same_id = {"id": "train-red", "query": "?", "response": ["x", "y"], "image": image}
    parquet.write_table(pa.Table.from_pylist([same_id]), tmp_path / "vl.parquet")
    same_text = {"id": "n", "prompt": "q  BLUE", "chosen": "b blue", "rejected": "A blue"}
    write_rows(tmp_path / "mm.jsonl", [same_text | {"image": "gone.png"}])
    same_picture = {"ID": "m", "Text": "?", "Image": "green.png", "Output1": "x", "Output2": "y"}
    (tmp_path / "all.json").write_text(json.dumps([same_picture]))

    files = [tmp_path / name for name in ("vl.parquet", "mm.jsonl", "all.json")]
    counts, pairs = mix(data, tmp_path / "out", "--decontaminate", *files)
    reasons = [f"in a benchmark, by {kind}" for kind in ("id", "text", "picture")]
    assert counts["pairs"] == dict.fromkeys(reasons, 1) | {"pairs": 2, "taken": 2}
    assert {pair.id for pair in pairs} == {"train-yellow", "train-black"}


@pytest.mark.parametrize("row", [{"a": 1}, []])
def test_a_file_that_is_no_benchmark(tmp_path, row):
    data = [f"pairs={write_rows(tmp_path / 'pairs.jsonl', own_rows())}"]
    benchmark = write_rows(tmp_path / "odd.jsonl", [row])
    with pytest.raises(InputError, match="line 1 has no question with two responses; --decont"):
        mix(data, tmp_path / "out", "--decontaminate", benchmark)


def test_unreadable_pictures_of_a_benchmark_match_nothing_and_are_counted(tmp_path, capsys):
    (tmp_path / "cut.png").write_bytes(png((64, 64))[:-40])
    (tmp_path / "a.png").write_bytes(png())
    names = ("none.png", "http://a/b.png", "cut.png", "a.png")
    row = {"prompt": "?", "chosen": "x", "rejected": "y"}
    benchmark = write_rows(tmp_path / "pairs.jsonl", [row | {"image": name} for name in names])
    train = write_rows(tmp_path / "train.jsonl", own_rows(1, image="a.png") + own_rows(3)[1:])
    counts, _ = mix([f"pairs={train}"], tmp_path / "out", "--decontaminate", benchmark)
    assert counts["pairs"] == {"in a benchmark, by picture": 1, "pairs": 2, "taken": 2}
    assert "3 of its pictures cannot be read" in capsys.readouterr().out


@pytest.mark.slow
def test_toy_benchmarks_share_no_id_and_no_picture_with_the_training_data(tmp_path, in_toy_world):
    patterns = (
        "VL*/data/*.parquet",
        "VL*/data.jsonl",
        "Multi*/data/*.json",
        "MM*/*.jsonl",
        "*.jsonl",
    )
    files = [next(Path("out/toy/data/test").glob(pattern)) for pattern in patterns]
    data = [f"{name}=out/toy/data/train/{name}" for name in ("RLAIF-V", "MM-RLHF")]
    counts, _ = mix(data, tmp_path, "--decontaminate", *files)
    reasons = {reason for outcomes in counts.values() for reason in outcomes}
    assert not {"in a benchmark, by id", "in a benchmark, by picture"} & reasons


# ------------------------------------------------------------------------------------------------
# A run that is stopped


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_run_killed_again_and_again_ends_like_the_unbroken_one(tmp_path, in_toy_world):
    """By SIGKILL, at random moments. Of the calls, only those under way are made again."""
    words = ["toy/server.py", "--key", "out/toy/data/key.jsonl", "--port", "0", "--latency", "0.05"]
    words = [sys.executable, str(ROOT / words[0]), *words[1:]]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            url = process.stdout.readline().split()[-1]
            annotate_toy(url, tmp_path / "whole", "--limit", "150")
            before = answered(url)
            kills = kill_until_done(
                url, tmp_path / "killed", "--limit", "150", "--concurrency", "4"
            )
            calls = answered(url) - before
        finally:
            process.kill()
    assert kills >= 5
    journal = read_rows(tmp_path / "killed/journal.jsonl")[1:]
    assert len({(row["id"], row["attempt"]) for row in journal}) == len(journal)
    assert len(journal) <= calls <= len(journal) + 4 * kills
    assert read_written(tmp_path / "killed") == read_written(tmp_path / "whole")


def answered(url):
    stats = urllib.request.urlopen(url.removesuffix("/v1") + "/stats", timeout=20).read()
    return json.loads(stats)["answered"]


def kill_until_done(*arguments):
    """Runs annotate_toy(*arguments) in processes of their own until one ends; returns the kills."""
    rng = random.Random(0)
    kills = 0
    while True:
        context = multiprocessing.get_context("fork")
        child = context.Process(target=annotate_toy, args=arguments, daemon=True)
        child.start()
        child.join(rng.uniform(0.05, 0.9))
        if child.exitcode is not None:
            assert child.exitcode == 0
            return kills
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        kills += 1


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(file of pairs, folder) of a run over three pairs of your own."""
    folder = tmp_path_factory.mktemp("finished")
    path = write_rows(folder / "pairs.jsonl", own_rows(3))
    with annotator() as stand_in:
        annotate_own(path, folder / "out", url=stand_in.url)
    return path, folder / "out"


@pytest.mark.parametrize(
    "words, change",
    [
        (["--model", "other"], "model was 'gpt-4o', is now 'other'"),
        (["--temperature", "0.5"], "temperature was 0.0, is now 0.5"),
        (["--request", '{"top_p": 0.5}'], "request was {}, is now {'top_p': 0.5}"),
        (["--seed", "1"], "seed was 0, is now 1"),
        (["--limit", "5"], "limit was None, is now 5"),
        (["--both_orders"], "both_orders was False, is now True"),
    ],
)
def test_other_settings_are_refused(finished, words, change):
    path, out = finished
    with pytest.raises(InputError) as error:
        annotate_own(path, out, *words)
    assert change in str(error.value) and "another --out" in str(error.value)


def test_the_journal_of_another_mix_is_refused(finished, tmp_path):
    _, out = finished
    other = write_rows(tmp_path / "pairs.jsonl", own_rows(4))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/journal.jsonl").write_bytes((out / "journal.jsonl").read_bytes())
    with pytest.raises(InputError, match=r"pairs was '.*', is now"):
        annotate_own(other, tmp_path / "out")


@pytest.mark.parametrize(
    "row",
    [
        [],
        {"id": "x", "tokens": [1, 1]},
        {"id": "x", "tokens": [1, 1], "text": 3},
        {"id": "x", "tokens": [1], "text": ""},
    ],
)
def test_a_row_of_the_journal_that_is_no_reply_is_named(tmp_path, row):
    path = write_rows(tmp_path / "journal.jsonl", [{}, row])
    with annotate.files.Journal(path) as journal, pytest.raises(InputError) as error:
        replies.Replies(journal, {}, most=3)
    message = f"line 2: {json.dumps(row)} is not a reply; expected an object with id"
    assert message in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"made with": {}}', "[" * 100_000])
def test_a_damaged_mix_is_told(tmp_path, content):
    path = write_rows(tmp_path / "pairs.jsonl", own_rows(2))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mix.json").write_text(content)
    with pytest.raises(InputError, match=r"mix\.json is (damaged|not JSON)") as error:
        annotate_own(path, tmp_path / "out")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_after_an_error_in_the_data_the_same_out_can_be_used(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        annotate_own(tmp_path / "none.jsonl", tmp_path / "out")
    _, pairs = mix([f"pairs={write_rows(tmp_path / 'pairs.jsonl', own_rows(3))}"], tmp_path / "out")
    assert len(pairs) == 3


def test_a_picture_that_is_gone_when_it_is_to_be_sent(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    path = write_rows(tmp_path / "pairs.jsonl", own_rows(image="a.png"))
    mix([f"pairs={path}"], tmp_path / "out")
    (tmp_path / "a.png").unlink()
    with pytest.raises(InputError, match=r"an image cannot be read: .*a\.png"):
        annotate_own(path, tmp_path / "out")


def test_a_picture_outside_of_the_data_is_sent_only_if_its_folder_is_named(tmp_path):
    (tmp_path / "private.png").write_bytes(png())
    path = write_rows(tmp_path / "data/pairs.jsonl", own_rows(image="../private.png"))
    with annotator() as server:
        with pytest.raises(
            InputError, match=r"private\.png', outside of the data's folder.*--media_root"
        ):
            annotate_own(path, tmp_path / "out", url=server.url)
        assert server.stats["requests"] == 0
        annotate_own(path, tmp_path / "out", "--media_root", str(tmp_path), url=server.url)
        assert server.stats["requests"] > 0


# ------------------------------------------------------------------------------------------------
# Calls that fail


FAULTS = {"429": 0.04, "429_after": 0.04, "500": 0.05, "reset": 0.05, "hang": 0.02}
FAULTS |= {"html": 0.04, "empty": 0.03, "truncated": 0.03}


@pytest.mark.slow
def test_with_every_fault_in_30_of_100_calls_nothing_is_lost(tmp_path, in_toy_world):
    """What is sent again is no attempt: the same bytes as from a server without faults."""
    key = ["--key", "out/toy/data/key.jsonl"]
    with annotator(*key) as stand_in:
        annotate_toy(stand_in.url, tmp_path / "well", "--limit", "120")
    words = []
    for name, probability in FAULTS.items():
        words += [f"--p_{name}", probability]
    with annotator(*key, *words, "--hang", "20", "--retry_after", "0.2") as stand_in:
        annotate_toy(stand_in.url, tmp_path / "ill", "--limit", "120", "--timeout", "1")
        faults = stand_in.stats["faults"]
    assert all(faults[name] for name in FAULTS) and sum(faults.values()) > 35
    assert read_written(tmp_path / "ill") == read_written(tmp_path / "well")


def test_a_refusal_is_an_attempt(tmp_path):
    path = write_rows(tmp_path / "pairs.jsonl", own_rows(10))
    with annotator("--p_refusal", "1") as stand_in:
        annotate_own(path, tmp_path, url=stand_in.url)
        assert stand_in.stats["requests"] == 30
    pairs = read_pairs(tmp_path / "pairs.jsonl")
    assert {(pair.attempts, pair.annotation) for pair in pairs} == {(4, None)}
    assert read_pairs(tmp_path / "sft.jsonl") == []
    assert len(read_pairs(tmp_path / "rl.jsonl")) == 10


def test_a_pair_without_an_answer_is_left_for_the_next_run(tmp_path, capsys):
    """It is in no set for training and costs nothing else; the next run asks for it alone."""
    path, out = write_rows(tmp_path / "pairs.jsonl", own_rows(40)), tmp_path / "out"
    # twenty failures in a row would stop the run: 0.4 ** 20
    failure = pytest.raises(InputError, match=r"pairs got no answer .*; the same command asks")
    with annotator("--p_500", "0.4") as stand_in, failure:
        annotate_own(path, out, "--concurrency", 20, url=stand_in.url)
    attempts = Counter(pair.attempts for pair in read_pairs(out / "pairs.jsonl"))
    assert set(attempts) == {None, 4} and len(read_pairs(out / "rl.jsonl")) == attempts[4]
    assert "is left for the next run: no reply after 1 tries" in capsys.readouterr().out
    done = len(read_rows(out / "journal.jsonl")) - 1
    with annotator() as stand_in:
        annotate_own(path, out, url=stand_in.url)
        assert stand_in.stats["requests"] == 120 - done
    assert {pair.attempts for pair in read_pairs(out / "pairs.jsonl")} == {4}


def test_a_server_that_answers_nobody_stops_the_run(tmp_path):
    path = write_rows(tmp_path / "pairs.jsonl", own_rows(40))
    with pytest.raises(InputError, match=r"8 pairs in a row got no answer, the last one: .*Conn"):
        annotate_own(path, tmp_path / "out", "--concurrency", 2)


def test_refused_requests_stop_the_run_only_if_no_other_had_a_reply(tmp_path):
    path, out = write_rows(tmp_path / "pairs.jsonl", own_rows(40)), tmp_path / "out"
    words = ["--request", '{"n": 2}', "--concurrency", "4"]  # the stand-in answers 400
    failure = pytest.raises(InputError, match=r"8 pairs in a row got no answer.*n is 2; not")
    with annotator() as stand_in, failure:
        annotate_own(path, out, *words, url=stand_in.url)
    reply = {"id": "another", "attempt": 1, "text": "", "finish": "stop", "tokens": [1, 1]}
    with open(out / "journal.jsonl", "a") as journal:
        journal.write(json.dumps(reply) + "\n")
    failure = pytest.raises(InputError, match="40 of 40 pairs got no answer")
    with annotator() as stand_in, failure:
        annotate_own(path, out, *words, url=stand_in.url)
    assert stand_in.stats["bad"] == 40


# ------------------------------------------------------------------------------------------------
# Flags


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "--data"),
        (["--data", "LLaVA=x"], "expected NAME=PATH or NAME=hub:owner/name@revision with one of"),
        (["--data", "RLAIF-V"], "got 'RLAIF-V'"),
        (["--data", "RLAIF-V="], "got 'RLAIF-V='"),
        (["--data", "pairs=x", "--limit", "0"], "expected a whole number, 1 or more, got '0'"),
        (["--data", "pairs=x", "--timeout", "nan"], "expected a number from 0.1 to 86400, got"),
        (["--data", "pairs=x", "--request", "[1]"], "expected a JSON object"),
        (["--data", "pairs=x", "--mode", "both"], "choice"),
    ],
)
def test_flags_that_are_not_taken(capsys, words, message):
    with pytest.raises(SystemExit):
        annotate.main(words)
    assert message in capsys.readouterr().err


def test_a_null_in_request_removes_a_field(tmp_path):
    """The stand-in takes no top_logprobs but 0 and null."""
    path = write_rows(tmp_path / "pairs.jsonl", own_rows())
    with annotator() as stand_in:
        request = '{"temperature": null, "top_logprobs": null}'
        annotate_own(path, tmp_path / "out", "--request", request, url=stand_in.url)
        assert stand_in.stats["bad"] == 0


def test_a_source_without_one_usable_pair(tmp_path):
    path = write_rows(tmp_path / "pairs.jsonl", own_rows(2, image="none.png"))
    with pytest.raises(InputError, match=r"has not one usable pair .{'missing image': 2}"):
        mix([f"pairs={path}"], tmp_path / "out")
    with pytest.raises(InputError, match=r"has not one usable pair .no rows"):
        mix([f"pairs={write_rows(tmp_path / 'pairs.jsonl', [])}"], tmp_path / "out")


def test_a_hub_address_needs_a_revision(tmp_path):
    with pytest.raises(InputError, match="expected hub:owner/name@revision"):
        mix(["RLAIF-V=hub:openbmb/RLAIF-V-Dataset"], tmp_path)


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached(tmp_path):
    """In a process of its own: the hub's client reads its address once."""
    offline = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    words = ["--data", "POVID=hub:a/b@main", "--out", str(tmp_path), "--base_url", NOWHERE]
    done = subprocess.run(
        [sys.executable, "annotate.py", *words],
        cwd=ROOT,
        env=os.environ | offline | {"HF_HUB_ETAG_TIMEOUT": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and done.stderr.startswith("annotate.py: hub:a/b@main could not")
