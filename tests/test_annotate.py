"""
Stage 1 over real files and real HTTP: every source in its own schema with bad rows planted (toy/sources.py), the stand-in
annotator with every fault (toy/server.py), a real vLLM server. Nothing is mocked; what is killed is killed by SIGKILL.
"""
import base64
import collections
import contextlib
import doctest
import email.utils
import io
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

import annotate
from annotate import CRITIQUE_PROMPT, JUDGING_PROMPT, PAIR, Endpoint, Unusable, messages, read_pairs, swap, write_pairs
from stable_reinforce import parse
from toy import server, sources

ROOT = Path(__file__).resolve().parent.parent
MADE = ("mix.jsonl", "pairs.jsonl", "sft.jsonl", "rl.jsonl", "report.md", "report.png", "dropped.jsonl")
lines = lambda path: [json.loads(line) for line in open(path)]
count = lambda values: dict(collections.Counter(values))


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A folder in which the paths of toy/annotate.args lead to a small toy world."""
    home = tmp_path_factory.mktemp("annotate")
    sources.main(["--out", str(home / "out/toy/data"), "--scale", "0.1"])
    return home


@pytest.fixture(autouse=True)
def at_home(home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@contextlib.contextmanager
def annotator(*flags):
    it = server.Server(server.parser().parse_args(["--port", "0", "--key", "out/toy/data/key.jsonl", *map(str, flags)]))
    try:
        yield it
    finally:
        it.close()


def toy(url, out, *flags):
    annotate.main([f"@{ROOT}/toy/annotate.args", "--base_url", url, "--out", str(out), *map(str, flags)])
    return Path(out)


def mine(folder, rows, name="pairs.jsonl"):
    """People's own data, as a file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def plain(n=1, **more):
    return [{"prompt": f"Q{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} | more for i in range(n)]


def own(path, out, *flags, url="http://127.0.0.1:9/v1"):
    """A run over one's own data; with no server there, up to the first request."""
    annotate.main(["--data", f"pairs={path}", "--out", str(out), "--base_url", url, "--retries", "0", *map(str, flags)])


def mixed(data, out, *flags):
    """The mix alone."""
    args = annotate.parser().parse_args(["--data", *data, "--out", str(out), *map(str, flags)])
    Path(out).mkdir(parents=True, exist_ok=True)
    return annotate.mix(args, Path(out)), read_pairs(Path(out) / "mix.jsonl")


def png(size=(8, 8), colour="red", kind="PNG"):
    from PIL import Image

    data = io.BytesIO()
    Image.new("RGB", size, colour).save(data, kind)
    return data.getvalue()


@pytest.fixture(scope="session")
def whole(home):
    """An unbroken run over all toy sources, with what the server saw."""
    with contextlib.chdir(home), annotator() as it:
        return toy(it.url, "whole"), it.stats


# ---------------------------------------------------------------------------------------------------
# From the sources to the three files


def test_the_toy_sources_become_the_three_files(whole):
    out, stats = whole
    pairs, sft, rl = (read_pairs(out / f"{name}.jsonl") for name in ("pairs", "sft", "rl"))
    attempts = count(pair["attempts"] for pair in pairs)
    assert set(attempts) == {1, 2, 3, 4} and len(pairs) > 500
    assert [p["id"] for p in sft] == [p["id"] for p in pairs if p["attempts"] <= 3]
    assert [p["id"] for p in rl] == [p["id"] for p in pairs if p["attempts"] >= 2]
    assert all(parse(p["annotation"]).choice == p["choice"] for p in sft)
    assert all(p["annotation"] is None for p in pairs if p["attempts"] == 4)
    assert len({p["id"] for p in pairs}) == len(pairs) and abs(sum(3 - 2 * p["choice"] for p in pairs)) <= 1
    assert all(os.path.exists(path) for p in pairs for path in p["images"] + (p["video"] or []))
    # the server saw each pair as it is in its key, pictures to the byte, and each attempt once
    seen = {"0": len(pairs), "1": len(rl), "2": attempts[3] + attempts[4]}
    assert stats["attempt"] == seen and stats["unknown"] == stats["bad"] == 0
    journal = lines(out / "journal.jsonl")[1:]
    assert len(journal) == stats["requests"] == len({(row["id"], row["attempt"]) for row in journal})


def test_a_second_run_asks_nothing_and_changes_nothing(whole):
    before = {name: (whole[0] / name).read_bytes() for name in MADE}
    with annotator() as it:
        toy(it.url, whole[0])
        assert it.stats["requests"] == 0
    assert before == {name: (whole[0] / name).read_bytes() for name in MADE}


def test_the_report_says_what_became_of_every_row(whole):
    text = (whole[0] / "report.md").read_text()
    pairs = read_pairs(whole[0] / "pairs.jsonl")
    attempts = count(pair["attempts"] for pair in pairs)
    assert f"| all | {len(pairs):,} | {len(pairs):,} | " + " | ".join(f"{attempts[k]:,}" for k in (1, 2, 3, 4)) + " | 0 |" in text
    assert f"{sum(min(a, 3) * n for a, n in attempts.items()):,} replies" in text
    assert "| WildVision-Battle | different histories | 5 |" in text
    assert (whole[0] / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name, at", [(name, name) for name in sources.PLANTED if name != "pairs"] + [
    ("pairs", "pairs.jsonl"), ("R1-Reward-RL", "R1-Reward-RL/R1-Reward-RL.jsonl"),
    ("MM-RLHF", "MM-RLHF/dpo_pairs.jsonl"), ("RLAIF-V", "RLAIF-V/RLAIF-V-Dataset_001.parquet")])
def test_a_reader_drops_every_planted_row_and_no_other(tmp_path, name, at):
    """What is left is right: its better answer is the one that the answer key has as right, for these very pictures."""
    path, (spool, part) = f"out/toy/data/train/{at}", (tmp_path / "s.jsonl", at.endswith("parquet"))
    annotate.collect(name, path, tmp_path, spool)
    rows = lines(spool)
    dropped = count(row["drop"] for row in rows if "drop" in row)
    assert part or dropped == sources.PLANTED[name]
    key = server.load_key(["out/toy/data/key.jsonl"])
    for pair in (row["pair"] for row in rows if "pair" in row):
        files = [Path(p).read_bytes() for p in pair["video"] or pair["images"]]
        known = key[sources.world.key_of(pair["question"], files)]
        assert any(item["answers"][item["right"]] == pair["responses"][0] and pair["responses"][1] in item["answers"] for item in known)
    assert all(row["where"].startswith(path) for row in rows if "drop" in row)
    if name == "MM-RLHF":
        assert {row["pair"]["source"] for row in rows if "pair" in row} == {f"MM-RLHF-{c}" for c in ("Long", "Short", "Mcq", "Safety")}


def test_vlfeedback_as_datasets_turns_it_round(tmp_path):
    """A list of dictionaries, or a dictionary of lists: the same pair."""
    note = lambda n: {aspect: {"Rating": str(n), "Rationale": ""} for aspect in sources.ASPECTS}
    listed = [{"annotations": note(n), "model": "m", "response": f"answer {n}"} for n in (2, 5, 1, 3)]
    turned = {"annotations": {a: {"Rating": ["2", "5", "1", "3"]} for a in sources.ASPECTS}, "response": [a["response"] for a in listed]}
    row = {"id": "x", "prompt": "Q", "img_path": "none.png"}
    found = [annotate.vlfeedback(row | {"completions": c}, 0, str(tmp_path)) for c in (listed, turned)]
    assert found[0] == found[1] and found[0]["responses"] == ["answer 5", "answer 1"]
    listed[1]["annotations"]["Helpfulness"]["Rating"] = "nan"  # does not count as a number
    assert annotate.vlfeedback(row | {"completions": listed}, 0, str(tmp_path))["responses"][0] == "answer 3"


def test_frames_are_in_the_order_of_their_numbers(tmp_path):
    for name in ("f10.jpg", "f9.jpg", "f1.PNG", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    assert [Path(p).name for p in annotate.frames(tmp_path)] == ["f1.PNG", "f9.jpg", "f10.jpg"]


def test_a_path_on_another_disk_is_found_by_its_end(tmp_path):
    (tmp_path / "images/a").mkdir(parents=True)
    (tmp_path / "images/a/1.png").write_bytes(b"")
    found = str(tmp_path / "images/a/1.png")
    assert annotate.locate(str(tmp_path), "/authors/disk/images/a/1.png") == annotate.locate(str(tmp_path), "a/1.png", "images") == found
    assert annotate.locate(str(tmp_path), "/authors/disk/2.png") is None


@pytest.mark.parametrize("change, reason", [
    ({"image": "none.png"}, "missing image"), ({"image": "cut.png"}, "unreadable image"), ({"image": "no.png"}, "unreadable image"),
    ({"image": "https://example.org/a.png"}, "picture is a URL"), ({"images": ["a.png", "none.png"]}, "missing image"),
    ({"video": "none"}, "missing frames"), ({"chosen": " "}, "empty answer"), ({"rejected": None}, "empty answer"),
    ({"chosen": "bad 0 "}, "same answers")])
def test_a_row_that_makes_no_pair_is_dropped_with_its_reason_and_place(tmp_path, change, reason):
    data = png((64, 64), kind="JPEG")
    for name, what in {"a.png": data, "cut.png": data[:-200], "no.png": b"text"}.items():
        (tmp_path / name).write_bytes(what)
    path = mine(tmp_path, plain() + [{"prompt": "Q", "chosen": "x", "rejected": "y", "image": "a.png"}])
    rows = lines(path)
    path = mine(tmp_path, [rows[0] | change, rows[1]])
    counts, pairs = mixed([f"pairs={path}"], tmp_path / "out")
    assert counts["pairs"] == {reason: 1, "pairs": 1, "taken": 1} and len(pairs) == 1
    assert lines(tmp_path / "out/dropped.jsonl") == [{"source": "pairs", "where": f"{path}, line 1", "reason": reason}]


def test_a_picture_inside_parquet_becomes_a_file_with_its_very_bytes(whole):
    for pair in read_pairs(whole[0] / "pairs.jsonl"):
        if pair["source"] == "RLAIF-V":
            path = Path(pair["images"][0])
            assert path.parent.parent.samefile(whole[0] / "images")
            assert path.stem == annotate.hashlib.sha256(path.read_bytes()).hexdigest()[:32] and path.suffix == ".png"


# ---------------------------------------------------------------------------------------------------
# The mix


def test_all_of_mm_rlhf_and_so_many_of_the_others(tmp_path):
    data = [f"{name}=out/toy/data/train/{name}" for name in ("RLAIF-V", "POVID", "MM-RLHF")]
    counts, pairs = mixed(data, tmp_path / "a", "--others", 30)
    human = [pair for pair in pairs if pair["source"].startswith("MM-RLHF")]
    assert len(human) == sum(c["pairs"] for name, c in counts.items() if name.startswith("MM-RLHF")) > 250
    assert len(pairs) == len(human) + 30 == sum(c["taken"] for c in counts.values())
    assert {p["source"] for p in pairs} >= {"RLAIF-V", "POVID"}
    assert abs(sum(3 - 2 * p["choice"] for p in pairs)) <= 1
    assert 20 < sum(a["source"].startswith("MM") != b["source"].startswith("MM") for a, b in zip(pairs, pairs[1:]))  # shuffled
    order = [p["id"] for p in pairs]
    assert [p["id"] for p in mixed(data[::-1], tmp_path / "c", "--others", 30)[1]] == order  # whatever was read first
    assert [p["id"] for p in mixed(data, tmp_path / "d", "--others", 30, "--seed", 1)[1]] != order
    few = mixed(data, tmp_path / "e", "--others", 30, "--limit", 7)[1]
    assert [p["id"] for p in few] == order[:7] and abs(sum(3 - 2 * p["choice"] for p in few)) == 1


def test_no_pair_twice(tmp_path):
    """The same question, answers and pixels: in the other order, in other case, under another id, from another kind of file."""
    from PIL import Image

    (tmp_path / "a.png").write_bytes(png())
    Image.open(tmp_path / "a.png").save(tmp_path / "b.webp", lossless=True)
    (tmp_path / "other.png").write_bytes(png(colour="blue"))
    row = {"prompt": "What colour?", "chosen": "red", "rejected": "blue", "image": "a.png"}
    rows = [row, row | {"chosen": "blue", "rejected": "red"}, row | {"prompt": "what  COLOUR?", "image": "b.webp", "id": "x"},
            row | {"image": "other.png"}, row | {"image": None}]
    counts, pairs = mixed([f"pairs={mine(tmp_path, rows)}"], tmp_path / "out")
    assert counts["pairs"] == {"pairs": 3, "seen before": 2, "taken": 3} and len(pairs) == 3


def test_ids_that_repeat_are_told_apart(tmp_path):
    rows = [row | {"id": name} for row, name in zip(plain(4), ("a", "a", "a#2", "a"))]
    ids = [p["id"] for p in mixed([f"pairs={mine(tmp_path, rows)}"], tmp_path / "out")[1]]
    assert sorted(ids) == ["a", "a#2", "a#2#2", "a#3"]


def test_text_that_cannot_be_encoded_is_mended_on_the_way_in(tmp_path):
    (tmp_path / "odd.jsonl").write_text('{"prompt": "half \\ud83d", "chosen": "whole \\ud83d\\ude00", "rejected": "x"}\n')
    pair = mixed([f"pairs={tmp_path / 'odd.jsonl'}"], tmp_path / "out")[1][0]
    assert pair["question"] == "half ?" and "whole \U0001f600" in pair["responses"]


def test_decontamination_by_id_text_and_picture(tmp_path):
    """Of each kind one, in each of the benchmarks' formats; the sums are printed in the report's table."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    colours = ("red", "blue", "green", "yellow", "black")
    for colour in colours:
        (tmp_path / f"{colour}.png").write_bytes(png(colour=colour))
    rows = [{"id": f"train-{c}", "prompt": f"Q {c}", "chosen": f"A {c}", "rejected": f"B {c}", "image": f"{c}.png"} for c in colours]
    train = mine(tmp_path, rows)
    hub = {"id": "train-red", "query": "?", "response": ["x", "y"], "image": {"bytes": png(colour="white"), "path": "w.png"}}
    parquet.write_table(pa.Table.from_pylist([hub]), tmp_path / "vl.parquet")
    mine(tmp_path, [{"id": "n", "prompt": "q  BLUE", "chosen": "b blue", "rejected": "A blue", "image": "gone.png"}], "vl.jsonl")
    table = [{"ID": "m", "Text": "?", "Image": "green.png", "Output1": "x", "Output2": "y", "Better": "Output1", "Category": "vqa"}]
    (tmp_path / "all.json").write_text(json.dumps(table))
    files = [str(tmp_path / name) for name in ("vl.parquet", "vl.jsonl", "all.json")]
    counts, pairs = mixed([f"pairs={train}"], tmp_path / "out", "--decontaminate", *files)
    assert counts["pairs"] == {"in a benchmark, by id": 1, "in a benchmark, by text": 1, "in a benchmark, by picture": 1,
                               "pairs": 2, "taken": 2}
    assert {p["id"] for p in pairs} == {"train-yellow", "train-black"}
    with pytest.raises(Unusable, match="no question with two answers; legal for --decontaminate"):
        mixed([f"pairs={train}"], tmp_path / "other", "--decontaminate", str(mine(tmp_path, [{"a": 1}], "odd.jsonl")))
    with pytest.raises(Unusable, match="line 1 has no question with two answers"):
        mixed([f"pairs={train}"], tmp_path / "list", "--decontaminate", str(mine(tmp_path, [[]], "list.jsonl")))


def test_pictures_of_a_benchmark_that_cannot_be_read_match_nothing_and_are_counted(tmp_path, capsys):
    """Not there, a URL, cut off: none of them stops the run."""
    (tmp_path / "cut.png").write_bytes(png((64, 64))[:-40])
    (tmp_path / "a.png").write_bytes(png())
    rows = [{"prompt": "?", "chosen": "x", "rejected": "y", "image": i} for i in ("none.png", "http://a/b.png", "cut.png", "a.png")]
    train = mine(tmp_path, plain(1, image="a.png") + plain(3)[1:], "train.jsonl")
    counts, _ = mixed([f"pairs={train}"], tmp_path / "out", "--decontaminate", str(mine(tmp_path, rows)))
    assert counts["pairs"] == {"in a benchmark, by picture": 1, "pairs": 2, "taken": 2}
    assert "3 of its pictures cannot be read" in capsys.readouterr().out


def test_the_toy_benchmarks_share_no_id_and_no_picture_with_the_training_sources(tmp_path):
    files = [str(next(Path("out/toy/data/test").glob(p))) for p in (
        "VL*/data/*.parquet", "VL*/data.jsonl", "Multi*/data/*.json", "MM*/*.jsonl", "pairs.jsonl")]
    counts, _ = mixed([f"{n}=out/toy/data/train/{n}" for n in ("RLAIF-V", "MM-RLHF")], tmp_path, "--decontaminate", *files)
    reasons = {reason for c in counts.values() for reason in c}
    assert not [r for r in reasons if "by" in r and ("id" in r or "picture" in r)]


# ---------------------------------------------------------------------------------------------------
# The journal


@contextlib.contextmanager
def journal_of(path, config):
    with open(path, "a+b") as file:
        yield annotate.Journal(file, config)


def run_until_killed(words, seconds):
    """A run in a process of its own, killed at that moment; its exit code, or None if it was killed."""
    child = multiprocessing.get_context("fork").Process(target=annotate.main, args=(words,), daemon=True)
    child.start()
    child.join(seconds)
    if child.exitcode is None:
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        return None
    return child.exitcode


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_job_killed_again_and_again_ends_as_the_unbroken_one(tmp_path):
    """SIGKILL at random moments. No finished call is made again: what is lost was in flight."""
    flags, rng, kills = ["--limit", "150"], random.Random(0), 0
    command = [sys.executable, str(ROOT / "toy/server.py"), "--key", "out/toy/data/key.jsonl", "--port", "0", "--latency", "0.05"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as it:
        try:
            url = it.stdout.readline().split()[-1]
            answered = lambda: json.loads(urllib.request.urlopen(url.removesuffix("/v1") + "/stats", timeout=20).read())["answered"]
            toy(url, tmp_path / "whole", *flags)
            before = answered()
            words = [f"@{ROOT}/toy/annotate.args", "--base_url", url, "--out", str(tmp_path / "killed"), *flags, "--concurrency", "4"]
            while (code := run_until_killed(words, rng.uniform(0.05, 0.9))) is None:
                kills += 1
            assert code == 0 and kills >= 5
            calls = answered() - before
        finally:
            it.kill()
    journal = lines(tmp_path / "killed/journal.jsonl")[1:]
    assert len({(row["id"], row["attempt"]) for row in journal}) == len(journal) <= calls <= len(journal) + 4 * kills
    for name in MADE:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_half_written_last_line_is_cut_off(whole, tmp_path, capsys):
    """At every byte of it, and down to nothing: an empty journal is a new one."""
    data = (whole[0] / "journal.jsonl").read_bytes()
    head = data[:data.index(b"\n") + 1]
    last = b'{"id": "x", "attempt": 1, "text": "a\\nb", "finish": "stop", "tokens": [1, 2]}\n'
    for cut in range(1, len(last)):
        (tmp_path / "j").write_bytes(head + last[:-cut])
        with journal_of(tmp_path / "j", json.loads(head)) as journal:
            assert not journal.replies and (tmp_path / "j").read_bytes() == head
        assert cut == len(last) or f"its {len(last) - cut} bytes are cut off" in capsys.readouterr().out
    (tmp_path / "j").write_bytes(head[:10])
    with journal_of(tmp_path / "j", json.loads(head)):
        pass
    assert json.loads((tmp_path / "j").read_bytes()) == json.loads(head)


@pytest.mark.parametrize("flags, says", [
    (["--model", "other"], "model is 'toy-stand-in' there, 'other' now"), (["--temperature", "0.5"], "temperature is 0.0 there, 0.5 now"),
    (["--request", '{"top_p": 0.5}'], "request is {} there"), (["--seed", "1"], "seed is 0 there, 1 now"),
    (["--limit", "5"], "limit is None there, 5 now"), (["--both_orders"], "both_orders is False there")])
def test_another_configuration_is_refused_with_what_differs(whole, flags, says):
    with pytest.raises(SystemExit) as stop:
        toy("http://127.0.0.1:9/v1", whole[0], *flags)
    assert says in str(stop.value) and "another --out" in str(stop.value)


def test_what_may_change_when_a_run_goes_on(whole):
    with annotator() as it:
        toy(it.url, whole[0], "--concurrency", "3", "--timeout", "9", "--retries", "1")
        assert it.stats["requests"] == 0


def test_two_at_once_are_refused(whole, tmp_path):
    (tmp_path / "j").write_bytes(b"")
    with journal_of(tmp_path / "j", {}), pytest.raises(Unusable, match="another annotate.py is writing"), journal_of(tmp_path / "j", {}):
        pass


@pytest.mark.parametrize("line, says", [
    ("{\n", "line 2 is no JSON"), ("\n", "line 2 is empty"), ("[]\n", "line 2: [] is no reply; legal: id"),
    ('{"id": "x", "tokens": [1, 1]}\n', "line 2: "), ('{"id": "x", "text": 3, "tokens": [1, 1]}\n', "is no reply")])
def test_a_damaged_journal_is_named_by_its_line(tmp_path, line, says):
    (tmp_path / "j").write_text("{}\n" + line)
    with pytest.raises(Unusable) as error, journal_of(tmp_path / "j", {}):
        pass
    assert says in str(error.value)


# ---------------------------------------------------------------------------------------------------
# Calls


FAULTS = {"429": 0.04, "429_after": 0.04, "500": 0.05, "reset": 0.05, "hang": 0.02, "html": 0.04, "empty": 0.03, "truncated": 0.03}


def test_with_every_fault_in_30_of_100_calls_nothing_is_lost(whole, tmp_path):
    """Retries are no attempts: the same pairs.jsonl, to the byte, as from a server without faults."""
    flags = [word for name, p in FAULTS.items() for word in (f"--p_{name}", p)]
    with annotator() as it:
        toy(it.url, tmp_path / "well", "--limit", "120")
    with annotator(*flags, "--hang", "20", "--retry_after", "0.2") as it:
        toy(it.url, tmp_path / "ill", "--limit", "120", "--timeout", "1")
        stats = it.stats
    assert all(stats["faults"][name] for name in FAULTS) and sum(stats["faults"].values()) > 35
    for name in MADE:
        assert (tmp_path / "ill" / name).read_bytes() == (tmp_path / "well" / name).read_bytes(), name


def test_a_refusal_is_an_attempt(tmp_path):
    with annotator("--p_refusal", "1") as it:
        out = toy(it.url, tmp_path, "--limit", "10")
        assert it.stats["requests"] == 30
    assert {(p["attempts"], p["annotation"]) for p in read_pairs(out / "pairs.jsonl")} == {(4, None)}
    assert (len(read_pairs(out / "sft.jsonl")), len(read_pairs(out / "rl.jsonl"))) == (0, 10)


def test_replies_that_are_none_and_refusals_of_each_kind():
    """What the body of a 200 may be. A refusal in its own field counts as text; a cut-off or foreign body is none at all."""
    body = lambda **message: json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()
    texts = [annotate.completion(b) for b in (body(content="hi"), body(content=None, refusal="no"), body(content=None), body())]
    assert [t["text"] for t in texts] == ["hi", "no", "", ""] and texts[0]["tokens"] == [0, 0]
    likely = lambda *tokens: {"content": [{"token": tokens[0],
                                           "top_logprobs": [{"token": t, "logprob": -i} for i, t in enumerate(tokens)]}]}
    body_with = lambda logprobs: json.dumps({"choices": [{"message": {"content": "1"}, "logprobs": logprobs}]}).encode()
    found = annotate.completion(body_with(likely("1", " 1")))
    assert found["said"] == ["1"] and found["likeliest"] == [{"1": 0.0, " 1": -1.0}]
    assert "likeliest" not in texts[0] and annotate.completion(body_with({"content": [{"token": "1"}]})) is None
    for none in (b"", b"<html>", b"[]", b"null", b'{"error": {}}', b'{"choices": []}', b'{"choices": null}', body(content="x")[:-9],
                 b'{"choices": [{}]}', body(content=[1]), b"\xff\xfe"):
        assert annotate.completion(none) is None, none


def test_retry_after_is_honoured(tmp_path):
    with annotator("--p_429_after", "0.3", "--retry_after", "1.2", "--seed", "1") as it:
        start = time.monotonic()
        toy(it.url, tmp_path, "--limit", "8")
        assert time.monotonic() - start > 1.2 and it.stats["faults"]["429_after"] >= 1
    soon = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert 25 < annotate.wanted_pause({"retry-after": soon}) <= 30
    past = email.utils.formatdate(time.time() - 30, usegmt=True)
    assert [annotate.wanted_pause({"retry-after": v}) for v in (past, "-1", "soon", "nan")] == [0, 0, 0, 0]
    assert annotate.wanted_pause({"retry-after": "inf"}) == annotate.wanted_pause({"retry-after": "86400"}) == 3600


def test_a_server_that_takes_a_second_is_kept_busy(tmp_path):
    """64 at a time: at best 64 calls a second. The pictures are 512 x 512; the bound is loose, the CPU is shared."""
    from PIL import Image

    small = Image.frombytes("RGB", (40, 40), random.Random(0).randbytes(4800))
    small.resize((512, 512), Image.Resampling.BICUBIC).save(tmp_path / "a.jpg", quality=95)
    path = mine(tmp_path, plain(64, image="a.jpg"))
    with annotator("--latency", "1") as it:
        start = time.monotonic()
        own(path, tmp_path / "out", "--concurrency", 64, url=it.url)
        calls = it.stats["answered"]
    assert calls == 3 * 64 and calls / (time.monotonic() - start) > 25


def test_a_pair_that_gets_no_answer_waits_for_the_next_run(tmp_path, capsys):
    """It is in no set, costs nothing else, and the command says so; the next run asks for it alone."""
    path = mine(tmp_path, plain(40))
    with annotator("--p_500", "0.4") as it, pytest.raises(SystemExit, match="pairs got no answer .*; the same command asks"):
        own(path, tmp_path / "out", "--concurrency", 20, url=it.url)  # so many failures in a row would stop the run: 0.4 ** 20
    attempts = [p["attempts"] for p in read_pairs(tmp_path / "out/pairs.jsonl")]
    assert set(attempts) == {None, 4} and len(read_pairs(tmp_path / "out/rl.jsonl")) == attempts.count(4)
    assert "is left for the next run: 1 times in a row no answer" in capsys.readouterr().out
    done = len(lines(tmp_path / "out/journal.jsonl")) - 1
    with annotator() as it:
        own(path, tmp_path / "out", url=it.url)
        assert it.stats["requests"] == 120 - done
    assert {p["attempts"] for p in read_pairs(tmp_path / "out/pairs.jsonl")} == {4}


def test_requests_that_the_endpoint_will_not_have_stop_a_run_only_if_it_had_no_reply_at_all(tmp_path):
    path = mine(tmp_path, plain(40))
    wrong = ["--request", '{"n": 2}']  # the stand-in answers 400
    with annotator() as it, pytest.raises(SystemExit, match="8 pairs in a row got no answer.*n is 2; not supported"):
        own(path, tmp_path / "out", *wrong, "--concurrency", 4, url=it.url)
    with open(tmp_path / "out/journal.jsonl", "a") as journal:
        journal.write('{"id": "another", "attempt": 1, "text": "", "finish": "stop", "tokens": [1, 1]}\n')
    with annotator() as it, pytest.raises(SystemExit, match="40 of 40 pairs got no answer"):
        own(path, tmp_path / "out", *wrong, "--concurrency", 4, url=it.url)
        assert it.stats["bad"] == 40


def test_an_endpoint_that_answers_nobody_stops_the_run(tmp_path):
    path = mine(tmp_path, plain(40))
    with pytest.raises(SystemExit, match="8 pairs in a row got no answer, the last one: .* APIConnectionError"):
        own(path, tmp_path / "out", "--concurrency", 2)


def test_a_wrong_address_stops_the_run(tmp_path):
    with annotator() as it, pytest.raises(SystemExit, match="404.*mend OPENAI_API_KEY, --model or --base_url"):
        own(mine(tmp_path, plain()), tmp_path / "out", url=it.url.removesuffix("/v1") + "/v2")


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(tmp_path, monkeypatch, capfd):
    """A server that repeats the key in its complaint does not get it printed."""
    with pytest.raises(Unusable, match="OPENAI_API_KEY is not set, and https://api.openai.com/v1 is not on this machine"):
        Endpoint("https://api.openai.com/v1")
    with pytest.raises(Unusable, match="OPENAI_API_KEY is not set"):
        Endpoint("http://127.0.0.1.example.org/v1")
    for here in ("http://localhost:1/v1", "http://127.0.0.1/v1", "http://[::1]:8000/v1"):
        assert Endpoint(here).key == "EMPTY"
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        def complain():
            line, _ = listening.accept()
            with line:
                head = line.recv(2**20).decode()
                told = head.partition("uthorization: ")[2].partition("\r\n")[0]
                body = json.dumps({"error": {"message": f"wrong key: {told}"}})
                head = f"HTTP/1.1 401 Unauthorized\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
                line.sendall(f"{head}\r\n\r\n{body}".encode())

        thread = threading.Thread(target=complain)
        thread.start()
        with pytest.raises(SystemExit, match=r"wrong key: Bearer \*\*\*"):
            own(mine(tmp_path, plain()), tmp_path / "out", url=f"http://127.0.0.1:{listening.getsockname()[1]}/v1")
        thread.join()
    assert "secret" not in "".join(capfd.readouterr())
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file() and b"secret" in p.read_bytes()]


def test_what_is_sent(tmp_path):
    """Pictures first, as they are; large or rare ones smaller and as JPEG; of a video so many frames; the text last."""
    from PIL import Image

    files = {"a.png": png(), "big.png": png((400, 100)), "rare.bmp": png(kind="BMP")}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    turned = Image.new("RGB", (30, 10))
    exif = turned.getexif()
    exif[0x0112] = 6  # to be shown a quarter turned
    turned.save(tmp_path / "turned.jpg", exif=exif)
    frames = [str(tmp_path / f"{i}.png") for i in range(10)]
    for i, path in enumerate(frames):
        Path(path).write_bytes(png((i + 1, 1)))
    pair = {"question": "Q", "responses": ["x", "y"], "images": [str(tmp_path / n) for n in (*files, "turned.jpg")], "video": frames}
    (turn,) = annotate.as_sent(messages(pair), max_pixels=250, max_frames=4)
    *pictures, text = turn["content"]
    assert text == {"type": "text", "text": JUDGING_PROMPT.format(question="Q", answer1="x", answer2="y")}
    urls = [p["image_url"]["url"].split(";base64,") for p in pictures]
    data = [base64.b64decode(u[1]) for u in urls]
    images = [Image.open(io.BytesIO(d)) for d in data]
    assert data[0] == files["a.png"] and [u[0] for u in urls[:3]] == ["data:image/png", "data:image/jpeg", "data:image/jpeg"]
    assert images[1].size == (31, 7) and images[2].size == (8, 8) and images[3].size == (9, 27)
    assert [i.size[0] for i in images[4:]] == [1, 4, 7, 10]  # first and last, evenly between
    assert len(annotate.as_sent(messages(pair), 250, 1)[0]["content"]) == 6


def test_both_orders_and_contradicted_pairs(tmp_path):
    """An annotator that is always wrong contradicts every pair; one that is always right none."""
    for right, contradicted in (("0", True), ("1", False)):
        with annotator("--right_easy", right, "--right_hard", right) as it:
            out = toy(it.url, tmp_path / right, "--limit", "20", "--both_orders")
        pairs = read_pairs(out / "pairs.jsonl")
        assert len(pairs) == 40 and {p["contradicted"] for p in pairs} == {contradicted}
        assert sum(p["choice"] for p in pairs) == 60
        for a, b in zip(pairs[::2], pairs[1::2]):
            assert b["id"] == a["id"] + "#swapped" and swap(b)["responses"] == a["responses"] and swap(b)["choice"] == a["choice"]


def test_critiques_of_single_answers(tmp_path):
    with annotator("--right_easy", "1", "--right_hard", "1") as it:
        out = toy(it.url, tmp_path, "--limit", "15", "--mode", "critique")
        toy(it.url, tmp_path, "--limit", "15", "--mode", "critique")
        assert it.stats["critic"] == it.stats["requests"] == 30
        toy(it.url, tmp_path, "--limit", "15")  # the same mix, judged: a journal of its own
    for pair, judged in zip(read_pairs(out / "critic.jsonl"), read_pairs(out / "pairs.jsonl"), strict=True):
        assert [c.endswith("It is right.") for c in pair["critiques"]] == [pair["choice"] == 1, pair["choice"] == 2]
        assert pair["id"] == judged["id"] and judged["attempts"] == 1
    asked = annotate.due(pair | {"images": []}, [(None, 0)], "critique")[0]["content"][-1]["text"]
    assert asked == CRITIQUE_PROMPT.format(question=pair["question"], answer=pair["responses"][1])


def test_a_real_vllm_server_is_an_annotator_like_any_other(tmp_path):
    """A toy model with random weights reaches no verdict: every attempt is made, every pair fails, nothing else differs."""
    pytest.importorskip("vllm")
    subprocess.run([sys.executable, "toy/model.py", "--out", str(tmp_path / "model"), "--seed", "0"], cwd=ROOT, check=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tmp_path / "model"), "--dtype", "float32",
               "--max-model-len", "2048", "--max-num-seqs", "8", "--enforce-eager", "--host", "127.0.0.1", "--port", str(port),
               "--served-model-name", "toy", "--limit-mm-per-prompt", '{"image": 8}']
    env = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}
    log = tmp_path / "log"
    with log.open("w") as file:
        it = subprocess.Popen(command, env=env, stdout=file, stderr=file, start_new_session=True)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                if urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200:
                    break
            assert it.poll() is None, log.read_text()[-3000:]
            time.sleep(0.5)
        out = toy(f"http://127.0.0.1:{port}/v1", tmp_path / "out", "--limit", "24", "--model", "toy", "--max_tokens", "48")
    finally:
        os.killpg(it.pid, signal.SIGKILL)
        it.wait()
    pairs, journal = read_pairs(out / "pairs.jsonl"), lines(out / "journal.jsonl")[1:]
    assert len(pairs) == 24 and sum(bool(p["images"]) for p in pairs) > 15
    assert {p["attempts"] for p in pairs} <= {1, 2, 3, 4} and all(row["tokens"][0] > 100 for row in journal)
    assert len(journal) == sum(min(3, p["attempts"]) for p in pairs)


# ---------------------------------------------------------------------------------------------------
# Bad inputs: each with an error of its own


def refused(words, capsys=None):
    with pytest.raises(SystemExit) as stop:
        annotate.main(words)
    return str(stop.value) if stop.value.code != 2 else capsys.readouterr().err


@pytest.mark.parametrize("data, says", [
    ("LLaVA=x", "'LLaVA=x' names no source; legal: NAME=PATH or NAME=hub:owner/name@revision, NAME being one of RLAIF-V, VLFeedback"),
    ("RLAIF-V", "names no source"), ("RLAIF-V=", "names no source")])
def test_an_unknown_source(capsys, data, says):
    assert says in refused(["--data", data], capsys)


@pytest.mark.parametrize("flag, value, says", [
    ("--limit", "0", "1 or more"), ("--concurrency", "0", "1 or more"), ("--temperature", "-1", "0 or more"),
    ("--timeout", "nan", "0.1 or more"),
    ("--request", "[1]", "is no JSON object"), ("--request", "{", "is no JSON object"), 
    ("--max_pixels", "x", "invalid"), ("--mode", "both", "choice")])
def test_illegal_flags(capsys, flag, value, says):
    assert says in refused(["--data", "pairs=x", flag, value], capsys)


def test_data_has_to_be_given(capsys):
    assert "--data" in refused([], capsys)


@pytest.mark.parametrize("name, path, says", [
    ("pairs", "none.jsonl", "none.jsonl: no such file or folder; mend the path, or download it first"),
    ("RLAIF-V", "empty", "has no *.parquet or data/*.parquet; legal: the folder of the download, or one of its files"),
    ("MM-RLHF", "text.txt", "is .txt; legal: .jsonl, .json, .parquet"),
    ("pairs", "half.jsonl", "half.jsonl, line 2 is no JSON"), ("pairs", "gap.jsonl", "gap.jsonl, line 2 is empty"),
    ("pairs", "bytes.jsonl", "bytes.jsonl, line 1 is no JSON"), ("POVID", "half.json", "half.json is no JSON"),
    ("POVID", "object.json", "object.json is dict; legal: one list of objects"),
    ("RLAIF-V", "cut.parquet", "cut.parquet, after row 0: no parquet"),
    ("MM-RLHF", "wrong.jsonl", "wrong.jsonl, line 1 has no id, chosen; legal for MM-RLHF: an object with id, prompt, chosen, rejected"),
    ("pairs", "list.jsonl", "line 1 has no prompt, chosen, rejected"),
    ("pairs", "number.jsonl", "line 1 is not as rows of pairs are (AttributeError"),
    ("VLFeedback", "odd.jsonl", "line 1 is not as rows of VLFeedback are"),
    ("R1-Reward-RL", "message.jsonl", "see r1_reward_rl() in annotate.py"),
    ("pairs", "nothing.jsonl", "not one pair came of it (no rows"),
    ("pairs", "absent.jsonl", "not one pair came of it ({'missing image': 2}"),
    ("RLAIF-V", "hub:openbmb/RLAIF-V-Dataset", "legal: hub:owner/name@revision"),
])
def test_bad_files_are_named_with_the_place_and_what_is_legal(tmp_path, monkeypatch, name, path, says):
    monkeypatch.chdir(tmp_path)
    good = json.dumps(plain()[0]) + "\n"
    for file, text in {
            "text.txt": "", "half.jsonl": good + good[:20], "gap.jsonl": good + "\n" + good, "half.json": "[{", "object.json": "{}",
            "wrong.jsonl": '{"prompt": "Q", "rejected": "x"}\n', "list.jsonl": "[]\n", "nothing.jsonl": "",
            "number.jsonl": '{"prompt": 1, "chosen": "a", "rejected": "b"}\n',
            "odd.jsonl": '{"id": 1, "prompt": "", "completions": [1], "img_path": ""}\n',
            "message.jsonl": '{"message": "{", "answer": ["1"]}\n',
            "absent.jsonl": json.dumps(plain(image="a.png")[0]) + "\n" + json.dumps(plain(image="b.png")[0]) + "\n"}.items():
        Path(file).write_text(text)
    Path("empty").mkdir()
    Path("bytes.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    Path("cut.parquet").write_bytes(b"PAR1" + bytes(100))
    said = refused(["--data", f"{name}={path}", "--out", "out", "--base_url", "http://127.0.0.1:9/v1"])
    assert said.startswith("annotate.py: ") and says in said


def test_the_hub_out_of_reach(tmp_path):
    """In a process of its own: the hub's client reads its address once."""
    code = f"import annotate; annotate.main(['--data', 'POVID=hub:a/b@main', '--out', {str(tmp_path)!r}])"
    env = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "hub:a/b@main: not fetched" in done.stderr and "give its folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_key_that_is_not_set(tmp_path):
    said = refused(["--data", f"pairs={mine(tmp_path, plain())}", "--out", str(tmp_path / "out"), "--base_url", "https://example.org/v1"])
    assert said == "annotate.py: OPENAI_API_KEY is not set, and https://example.org/v1 is not on this machine; export OPENAI_API_KEY=..."


def test_a_picture_that_goes_after_it_was_read(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    path = mine(tmp_path, plain(image="a.png"))
    for spoil in (lambda p: p.write_bytes(b"no"), Path.unlink):
        with pytest.raises(SystemExit, match="a.png: is no picture any more .* Bring it back"):
            mixed([f"pairs={path}"], tmp_path / "out")
            spoil(tmp_path / "a.png")
            own(path, tmp_path / "out")


def test_after_an_error_in_the_data_the_same_out_serves(tmp_path):
    """A mended path or file needs no new folder: nothing is fixed before the mix is whole."""
    assert "no such file" in refused(["--data", f"pairs={tmp_path}/none.jsonl", "--out", str(tmp_path / "out")])
    assert len(mixed([f"pairs={mine(tmp_path, plain(3))}"], tmp_path / "out")[1]) == 3


# ---------------------------------------------------------------------------------------------------
# The pair

GOOD = {"id": "x", "source": "toy", "question": "Q", "images": ["a/b.png"], "video": None, "responses": ["a", "b"], "choice": 1,
        "attempts": None, "annotation": None}


def test_pairs_survive_writing_and_reading(tmp_path):
    odd = {"extra": [1], "annotation": "\u2028 \ud83d x"}
    pairs = [GOOD | odd | {"images": [str(tmp_path / "a.png")], "video": [str(tmp_path / "v/1.png")]}] * 2
    write_pairs(tmp_path / "deep/pairs.jsonl", pairs)
    assert '"../a.png"' in (tmp_path / "deep/pairs.jsonl").read_text()
    back = read_pairs(tmp_path / "deep/pairs.jsonl")
    tidy = lambda pair: pair | {"images": list(map(os.path.normpath, pair["images"])), "video": list(map(os.path.normpath, pair["video"]))}
    assert list(map(tidy, back)) == pairs and len(read_pairs(tmp_path / "deep/pairs.jsonl", limit=1)) == 1


def test_a_pair_that_is_wrong_leaves_the_old_file(tmp_path):
    write_pairs(tmp_path / "p", [GOOD])
    with pytest.raises(ValueError, match="pair 1 of .*'choice' is 3; legal: 1 or 2"):
        write_pairs(tmp_path / "p", [GOOD, GOOD | {"choice": 3}])
    assert len(read_pairs(tmp_path / "p")) == 1


@pytest.mark.parametrize("field, value", [
    ("id", ""), ("id", 1), ("source", None), ("question", 1), ("images", None), ("images", [""]), ("video", []), ("video", "a"),
    ("responses", ["a"]), ("responses", ["a", " "]), ("choice", "1"), ("choice", True), ("attempts", 5),
    ("attempts", True), ("annotation", 1)])
def test_each_field_of_a_pair_is_checked(tmp_path, field, value):
    path = mine(tmp_path, [GOOD, GOOD | {field: value}])
    with pytest.raises(ValueError) as error:
        read_pairs(path)
    assert f"line 2: '{field}' is " in str(error.value) and f"legal: {PAIR[field][0]}" in str(error.value)
    with pytest.raises(ValueError, match=f"line 1 has no '{field}'"):
        read_pairs(mine(tmp_path, [{k: v for k, v in GOOD.items() if k != field}]))


def test_a_file_of_pairs_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file; legal: a JSONL file of pairs"):
        read_pairs(tmp_path / "none.jsonl")


def test_the_examples_in_the_docstrings_are_true():
    assert doctest.testmod(annotate).failed == 0 and doctest.testmod(annotate).attempted == 5
