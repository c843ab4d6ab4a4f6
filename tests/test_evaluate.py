"""
evaluate.py: the file of judgements under kill -9, each backend run for real (vLLM, an HTTP server
with faults, reward heads, rewards from a file), two ranks, and the report.
"""

import contextlib
import dataclasses
import http.server
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

import pytest
from conftest import png, vllm_server, write_rows
from evaluation import (
    RLHF,
    VL,
    JudgeByRule,
    always,
    args_of,
    bench_flags,
    greedy,
    judged,
    make_row,
    says,
    score,
    toy_rows,
    value,
)

import evaluate
from core.encoding import collate, encode, encode_prompt, load_processor
from core.endpoint import PLAIN_SAMPLING
from core.files import InputError, Journal
from core.judgements import LeftOut, Protocol, judgements_file, read_judgements, read_left_out
from core.judging import RewardBackend, Rewards, collect, seed_of, verdict_index
from core.pairs import Pair, critique_turns, judging_turns, read_pairs, user_turn, write_pairs
from core.pictures import BadPicture
from core.policy import load_policy, save_policy
from core.sampler import HFSampler
from sources import BENCHMARKS
from stable_reinforce import parse
from toy import model, server
from viewer.report import plot_scaling, results_table

ROOT = Path(__file__).resolve().parent.parent
ENV = os.environ | {"OMP_NUM_THREADS": "1"}
TWO = Protocol("both", samples=2)


# --- what is asked for


def seeds_of(jobs):
    seeds = {}
    for job in jobs:
        for number in range(job.count):
            key = (job.row.row, job.order, job.first + number)
            seeds[key] = seed_of(job, seed=0) + number
    return seeds


def all_jobs(rows, protocol, done):
    return itertools.chain.from_iterable(protocol.next_jobs(row, done) for row in rows)


def test_a_sample_has_its_own_seed_whatever_it_is_asked_with():
    rows, protocol = [make_row(i) for i in range(40)], Protocol("both", samples=16)
    whole = seeds_of(all_jobs(rows, protocol, {}))
    assert len(whole) == len(set(whole.values())) == 40 * 16
    assert all(0 <= seed < 2**31 for seed in whole.values())
    done = judged(rows, protocol, always(1))
    for key in random.Random(0).sample(sorted(done), 200):
        del done[key]
    again = seeds_of(all_jobs(rows, protocol, done))
    assert len(again) == 200 and again.items() <= whole.items()


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--samples", "5"], "an even number"),
        (["--samples", "4", "--temperature", "0"], "are the same"),
    ],
)
def test_flags_that_would_mislead_are_refused(words, reason):
    with pytest.raises(InputError, match=reason):
        args_of(*words)


def test_an_unknown_benchmark_is_refused(capsys):
    with pytest.raises(SystemExit):
        evaluate.parser().parse_args(["--out", "x", "--bench", "Bench=file"])
    assert "NAME=PATH with a NAME of" in capsys.readouterr().err


@pytest.fixture(scope="module")
def tokenizer():
    return model.make_tokenizer()


@pytest.mark.parametrize("verdict", "12")
@pytest.mark.parametrize(
    "close", ["</answer>", " </answer>", "</answer>\n", "\n</answer> done, 2 or 1"]
)
def test_the_verdicts_token_is_found_by_walking_back(close, verdict, tokenizer):
    text = "<think>Not 2, and 1 is no <answer>2</answer> either.</think>\n<answer> "
    text += verdict + close
    ids = tokenizer.encode(text)
    index = verdict_index(text, ids, tokenizer.decode)
    assert tokenizer.decode([ids[index]]).strip() == verdict
    assert tokenizer.decode(ids[:index]).rstrip().endswith("<answer>")
    assert verdict_index("no verdict", ["1", "</answer>"]) is None


def test_the_verdicts_token_is_found_if_the_end_of_the_answer_is_split():
    tokens = ["<answer>", "1", "</", "ans", "wer", ">", *"2 or 1, " * 30]
    assert verdict_index("".join(tokens), tokens) == 1


# --- the file of judgements


def test_half_a_line_is_cut_off_and_a_broken_one_is_reported(tmp_path):
    rows = [make_row(i) for i in range(3)]
    done = judged(rows, TWO, always(1))
    path = judgements_file(tmp_path)
    with Journal(path) as journal:
        journal.append([dataclasses.asdict(judgement) for judgement in done.values()])
        with pytest.raises(InputError, match="another run is writing"):
            Journal(path)
    with path.open("ab") as file:
        file.write(b'{"bench": "pairs", "row": 2, "ord')
    assert read_judgements(tmp_path) == done
    with Journal(path) as journal:
        one_more = dataclasses.replace(done["pairs", 0, 0, 0], sample=1)
        journal.append([dataclasses.asdict(one_more)])
    assert len(read_judgements(tmp_path)) == 7
    lines = path.read_text().splitlines()
    for bad, problem in (
        (lines[0], "is there already"),
        ("{}", "not a judgement"),
        ("oops", "not a judgement"),
        (lines[1].replace('"tokens": 10', '"tokens": "10"'), "'tokens' is '10'"),
    ):
        path.write_text("\n".join([*lines, bad]) + "\n")
        with pytest.raises(InputError, match=f"line 8.*{problem}"):
            read_judgements(tmp_path)


def test_other_settings_are_refused_and_the_differences_listed(tmp_path):
    def check(benches, done, *words):
        args = args_of("--out", tmp_path, *words)
        evaluate.check_or_write_config(args, benches, done)

    benches = {"pairs": [make_row(i) for i in range(5)]}
    check(benches, {}, "--samples", 4)
    done = judged(benches["pairs"], TWO, always(1))
    check(benches, done, "--samples", 8, "--orders", "dataset")  # more of the same
    check({"pairs": benches["pairs"][:3]}, done)
    path = tmp_path / "config.json"  # as a run wrote it before these flags were there
    config = json.loads(path.read_text())
    earlier = {name: config[name] for name in config if name not in evaluate.EARLIER_RUNS}
    path.write_text(json.dumps(earlier))
    check(benches, done)
    server = ["--base_url", "http://127.0.0.1:9/v1"]
    path.write_text(json.dumps(earlier | {"base_url": server[1]}))
    with pytest.raises(InputError, match=r"request was .the server's own way of sampling"):
        check(benches, done, *server)
    path.write_text(json.dumps(earlier))
    with pytest.raises(InputError, match=r"temperature was 1.0, is now 0.5"):
        check(benches, done, "--temperature", 0.5)
    others = [dataclasses.replace(row, choice=2) for row in benches["pairs"]]
    with pytest.raises(InputError, match="rows of pairs was"):
        check({"pairs": others}, done)
    check(benches, {}, "--temperature", 0.5)  # nothing was made before, so nothing is mixed


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"row": "0"}, "'row' is \"0\"; expected a whole number"),
        ({"groups": None}, "'groups' is null"),
        ({"groups": {"source": ["a"]}}, "'groups' is"),
        ({"question": 5}, "'question' is 5"),
        ({"images": "a.png"}, "'images' is"),
        ({"choice": 3}, "'choice' is 3"),
        ({"responses": 1}, "'responses' is 1"),
    ],
)
def test_a_damaged_row_of_a_run_is_named(tmp_path, change, problem):
    write_rows(tmp_path / "rows.jsonl", [make_row(0).to_json(), make_row(1).to_json() | change])
    with pytest.raises(InputError) as error:
        evaluate.read_rows(args_of("--out", tmp_path))
    assert "rows.jsonl, line 2" in str(error.value) and problem in str(error.value)


def test_rows_of_a_run_come_back_as_they_were(tmp_path):
    rows = [
        make_row(0),
        dataclasses.replace(make_row(1), responses=["", "b"], extra={"family": "x"}),
        dataclasses.replace(make_row(2), video=["a.png", "b.png"], attempts=2),
    ]
    write_rows(tmp_path / "rows.jsonl", [row.to_json() for row in rows])
    assert evaluate.read_rows(args_of("--out", tmp_path)) == {"pairs": rows}


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"rows": 1}'])
def test_a_damaged_config_of_a_run_is_told(tmp_path, content):
    write_rows(tmp_path / "rows.jsonl", [make_row(0).to_json()])
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json is (damaged|not JSON)"):
        evaluate.main(["--score_only", "--out", str(tmp_path)])


def test_rows_of_a_folder_of_others_send_no_picture_of_this_disk(tmp_path):
    """rows.jsonl that was doctored: pictures outside of --out, or behind a URL."""
    (tmp_path / "private.png").write_bytes(png())
    words = ("--out", tmp_path / "out", "--base_url", "http://127.0.0.1:9/v1")
    for image, problem in (
        (str(tmp_path / "private.png"), "outside of the data's folder"),
        ("../private.png", "outside of the data's folder"),
        ("http://127.0.0.1:9/a.png", "outside of the data's folder"),
    ):
        row = dataclasses.replace(make_row(0), images=[image])
        write_rows(tmp_path / "out/rows.jsonl", [row.to_json()])
        with pytest.raises(InputError, match=problem):
            evaluate.read_rows(args_of(*words))
    # what is only scored sends nothing
    assert len(evaluate.read_rows(args_of(*words, "--score_only"))["pairs"]) == 1
    write_rows(tmp_path / "out/rows.jsonl", [row.to_json() | {"images": []}])
    assert len(evaluate.read_rows(args_of(*words))["pairs"]) == 1


# --- rows that no judge takes


def refuse_row(number, reason="too long", order=None):
    """A backend that is always right, except that it does not take one row, or order of it."""

    class Judge(JudgeByRule):
        def answer(self, jobs):
            for job, judgements in super().answer(jobs):
                refused = job.row.row == number and order in (None, job.order)
                yield job, LeftOut(reason) if refused else judgements

    return Judge(lambda row, order, sample: says(3 - row.choice if order else row.choice))


def run_with(monkeypatch, backend, tmp_path, *words):
    """(part of results.json, table.md) of a run over ten pairs, or of what is in --out."""
    monkeypatch.setattr(evaluate, "make_backend", lambda args: backend)
    path = tmp_path / "pairs.jsonl"
    write_pairs(path, [Pair(f"id-{i}", "a", "Q?", [], None, ["x", "y"], 1) for i in range(10)])
    flags = ["--samples", "2", "--out", str(tmp_path / "out"), *words]
    if "--score_only" not in words:
        flags += ["--bench", f"pairs={path}"]
    evaluate.main(flags)
    results = json.loads((tmp_path / "out/results.json").read_text())
    return results["benches"]["pairs"], (tmp_path / "out/table.md").read_text()


@pytest.mark.parametrize("order", [None, 1])
def test_a_row_that_is_not_taken_is_left_out_counted_and_named(
    monkeypatch, tmp_path, order, capsys
):
    backend = refuse_row(3, "too\x1b\nlong", order)
    result, table = run_with(monkeypatch, backend, tmp_path)
    assert result["about"]["rows"] == 9 and value(result, "one sample") == 100
    assert "## pairs: 9 of 10 rows" in table
    assert "1 of 10 rows left out" in table and "- pairs row 3: too long" in table
    assert "counted as wrong, one sample has 90.00 % overall" in table
    assert result["left_out"] == [{"bench": "pairs", "row": 3, "id": "id-3", "reason": "too long"}]
    assert "pairs row 3 is left out: too long" in capsys.readouterr().out
    again, table_again = run_with(monkeypatch, None, tmp_path, "--score_only")
    assert again == result and table_again == table


def test_a_row_that_was_left_out_is_asked_for_again_only_if_the_user_says(monkeypatch, tmp_path):
    first, _ = run_with(monkeypatch, refuse_row(3), tmp_path)
    # a restart has nothing to ask for: no backend is needed
    assert run_with(monkeypatch, None, tmp_path)[0] == first
    retried, table = run_with(monkeypatch, refuse_row(None), tmp_path, "--retry_left_out")
    assert retried["about"]["rows"] == 10 and retried["left_out"] == []
    assert "left out: no judge" not in table and "## pairs: 10 rows" in table
    # of what was asked before, nothing is asked again
    assert len(read_judgements(tmp_path / "out")) == 20


def test_a_line_of_left_out_rows_that_is_damaged_is_named(tmp_path):
    (tmp_path / "left_out.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"left_out\.jsonl, line 1: expected an object with bench"):
        read_left_out(tmp_path)


class RefusingHandler(http.server.BaseHTTPRequestHandler):
    """Refuses every request, or those about row 1, with status 400."""

    refuses_all = False
    usage = None

    def do_POST(self):
        request = self.rfile.read(int(self.headers["Content-Length"])).decode()
        refused = self.refuses_all or "too long" in request
        message = {"content": "<think>a</think><answer>1</answer>"}
        choice = {"message": message, "finish_reason": "stop"}
        body = {"choices": [choice], "usage": self.usage}
        if refused:
            body = {"error": {"message": "maximum context length exceeded"}}
        body = json.dumps(body).encode()
        self.send_response(400 if refused else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def refusing(**fields):
    handler = type("Handler", (RefusingHandler,), fields)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as it:
        threading.Thread(target=it.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{it.server_port}/v1"
        it.shutdown()


def test_a_request_that_the_server_refuses_does_not_end_the_run():
    rows = [make_row(i) for i in range(6)]
    rows[1] = dataclasses.replace(rows[1], question="too long")
    done = {}
    with refusing() as url:
        args = args_of("--base_url", url, "--samples", 2)
        left_out = collect(rows, evaluate.make_backend(args), done, evaluate.protocol_of(args))
    assert list(left_out) == [rows[1].key] and len(done) == 10
    assert "maximum context length exceeded" in left_out[rows[1].key]["reason"]


def test_the_cost_of_a_server_is_estimated_once(tmp_path, capsys):
    rows = [make_row(i) for i in range(50)]
    with refusing(usage={"prompt_tokens": 1000, "completion_tokens": 20}) as url:
        args = args_of("--base_url", url, "--samples", 2, "--concurrency", 1, "--price", 2.5, 10)
        backend, protocol = evaluate.make_backend(args), evaluate.protocol_of(args)
        with Journal(tmp_path / "judgements.jsonl") as journal:
            collect(rows, backend, {}, protocol, journal)
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "judgements left" in x]
    estimate = (
        "64 judgements left, about 0 minutes; tokens: 36,000 read so far, about 100,000 in all"
    )
    estimate += "; 720 written so far, about 2,000 in all"
    assert line == f"{estimate}; about $0.27 at $2.5 and $10 a million"


def test_a_server_that_refuses_everything_ends_the_run():
    rows = [make_row(i) for i in range(20)]
    with refusing(refuses_all=True) as url:
        args = args_of("--base_url", url, "--samples", 2)
        with pytest.raises(InputError, match="8 requests were refused and none was answered"):
            collect(rows, evaluate.make_backend(args), {}, evaluate.protocol_of(args))


def test_a_picture_that_was_damaged_meanwhile_leaves_out_its_row(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    rows = [make_row(0), dataclasses.replace(make_row(1), images=[str(tmp_path / "a.png")])]
    done = {}
    with refusing() as url:
        args = args_of("--base_url", url, "--samples", 2)
        left_out = collect(rows, evaluate.make_backend(args), done, evaluate.protocol_of(args))
    assert list(left_out) == [rows[1].key] and len(done) == 2


def test_reward_heads_leave_out_the_row_whose_picture_cannot_be_read():
    def score(rows):
        if any(row.row == 3 for row in rows):
            raise BadPicture("unreadable image", "a.png")
        return [Rewards(1.0, 0.0) for _ in rows]

    done = {}
    left_out = collect([make_row(i) for i in range(6)], RewardBackend(score), done, TWO)
    assert list(left_out) == [("pairs", 3)] and len(done) == 10
    assert "a.png (unreadable image)" in left_out["pairs", 3]["reason"]


# --- a server


@contextlib.contextmanager
def serving(toy, *words):
    key = toy.parent / "key.jsonl"
    args = server.parser().parse_args(["--port", "0", "--key", str(key), *map(str, words)])
    stand_in = server.Server(args)
    try:
        yield stand_in
    finally:
        stand_in.close()


def run_and_kill(words, out, lines):
    """Starts evaluate.py and kills it as soon as it has written so many judgements."""
    process = subprocess.Popen(
        [sys.executable, "evaluate.py", *words, "--out", out],
        cwd=ROOT,
        env=ENV,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    file = judgements_file(out)
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        if file.exists() and len(file.read_bytes().splitlines()) >= lines:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr.read()


FAULTS = ("429_after", "500", "reset", "html", "empty", "truncated")


@pytest.mark.slow
def test_kill_9_and_resume_loses_and_repeats_nothing(toy, tmp_path):
    """Over real HTTP, with rate limits, errors, broken connections and bodies of other kinds."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    faults = [word for kind in FAULTS for word in (f"--p_{kind}", "0.02")]
    right = ("--right_easy", 0.8, "--right_hard", 0.8)  # so four votes are better than one
    pace = ("--latency", 0.04, "--retry_after", 0.01)
    with serving(toy, *pace, *right, *faults) as stand_in:
        words = [*bench_flags(toy, "pairs", VL), "--base_url", stand_in.url, "--model", "toy"]
        words += ["--samples", "4", "--concurrency", "8", "--limit", "24", "--page", "0"]
        run_and_kill(words, killed, lines=40)
        before = read_judgements(killed)
        assert 40 <= len(before) < 192
        evaluate.main([*words, "--out", str(killed)])
        after = read_judgements(killed)  # refuses one that is repeated
        assert len(after) == 192 and before.items() <= after.items()
        # what was on its way at the kill is asked again, and no more
        assert stand_in.stats["answered"] <= 192 + 8 * 2 * 2
        evaluate.main([*words, "--out", str(whole)])
    assert read_judgements(whole) == after
    results = json.loads((killed / "results.json").read_text())
    for bench in ("pairs", VL):
        result = results["benches"][bench]
        about = result["about"]
        assert about["rows"] == 24 and 65 < value(result, "one sample") < 92
        assert value(result, "voting@4") > value(result, "one sample")
        # the server says that it has none, and is asked without
        assert about["verdicts without log-probability"] == about["judgements"]
    words = ["--score_only", "--out", str(killed), "--compare", str(whole), "--page", "0"]
    evaluate.main(words)
    again = json.loads((killed / "results.json").read_text())
    assert again["benches"][VL]["lines"] == results["benches"][VL]["lines"]
    assert again["args"]["samples"] == 4
    compared = again["benches"][VL]["compared"]["voting@4"]
    assert compared["overall"] == [0, 0, 0, 1.0]
    assert f"against {whole}" in (killed / "table.md").read_text()


class LogprobsHandler(http.server.BaseHTTPRequestHandler):
    """Says 2, with log-probabilities of 1, 2 and 1 after a space."""

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert request["top_logprobs"] == 5
        options = []
        for token, logprob in (("2", -0.1), (" 1", -2.5), ("1", -9.0)):
            options.append({"token": token, "logprob": logprob})
        content = []
        for token in ("So", "<answer>", "2", "</answer>"):
            top = options if token == "2" else []
            content.append({"token": token, "logprob": -0.1, "top_logprobs": top})
        choice = {
            "message": {"content": "So<answer>2</answer>"},
            "finish_reason": "stop",
            "logprobs": {"content": content},
        }
        body = json.dumps({"choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_a_server_that_gives_log_probabilities():
    """Those of 1 and 2 at the verdict; of 1 with and without a space the likelier."""
    done = {}
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), LogprobsHandler) as it:
        threading.Thread(target=it.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{it.server_port}/v1"
        args = args_of("--base_url", url, "--samples", 4)
        protocol = evaluate.protocol_of(args)
        collect([make_row(0)], evaluate.make_backend(args), done, protocol)
        it.shutdown()
    assert len(done) == 4
    for judgement in done.values():
        assert (judgement.choice, judgement.logp1, judgement.logp2) == (2, -2.5, -0.1)
        assert (judgement.tokens, judgement.finish) == (4, "stop")


@pytest.mark.slow
def test_two_ranks_share_the_rows(toy, tmp_path):
    with serving(toy) as stand_in:
        words = [*bench_flags(toy, "pairs"), "--base_url", stand_in.url, "--model", "toy"]
        words += ["--samples", "2", "--limit", "15", "--out", tmp_path]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        done = subprocess.run(
            [*torchrun, "--nproc_per_node=2", "evaluate.py", *words],
            cwd=ROOT,
            env=ENV,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    sizes = []
    for rank in (0, 1):
        sizes.append(len(judgements_file(tmp_path, rank).read_text().splitlines()))
    results = json.loads((tmp_path / "results.json").read_text())
    assert sizes == [16, 14] and results["benches"]["pairs"]["about"]["rows"] == 15


def test_judge_and_rank_in_python(toy, tmp_path):
    """The README's five lines, with a stand-in that is always right about what it knows."""
    with serving(toy, "--right_easy", 1, "--right_hard", 1) as stand_in:
        judge = evaluate.Judge("toy", samples=4, base_url=stand_in.url)
        benches = toy_rows(toy, tmp_path, VL, "pairs", words=["--limit", 6])
        for row in benches[VL] + [row for row in benches["pairs"] if row.images]:
            verdict = judge(row.question, row.images, *row.responses)
            assert verdict.choice == row.choice and verdict.probability == 1
            assert verdict.votes == ((4, 0, 0) if row.choice == 1 else (0, 4, 0))
            assert parse(verdict.reasoning).choice == row.choice
        assert judge("What?", [], "this", "that") == (None, 0.0, (0, 0, 4), "", False)

        rows_of_id = {}
        for row in toy_rows(toy, tmp_path, RLHF)[RLHF]:
            if row.images:
                rows_of_id.setdefault(row.id, []).append(row)
        rows = next(rows for rows in rows_of_id.values() if len(rows) > 1)
        answers = [row.responses[1] for row in rows] + [rows[0].responses[0]]
        ranked = judge.rank(rows[0].question, rows[0].images, answers)
        assert ranked[0] == (len(answers) - 1, 1.0)
        assert sum(share for _, share in ranked) == pytest.approx(len(answers) / 2)


# --- rewards


def rewards_of(row):
    """Equal in 6 rows, right in 84, wrong in 30."""
    if row.row < 6:
        return [1.5, 1.5]
    right = row.row < 90
    return [2.0, -1.0] if (row.choice == 1) == right else [-1.0, 2.0]


def test_rewards_from_a_file(toy, tmp_path):
    """Right by a higher reward in either order; equal rewards are no verdict."""
    lines = []
    for row in toy_rows(toy, tmp_path, "pairs")["pairs"]:
        lines.append(json.dumps({"bench": "pairs", "row": row.row, "scores": rewards_of(row)}))
    file = tmp_path / "rewards.jsonl"
    file.write_text("\n".join(lines) + "\n")
    words = [*bench_flags(toy, "pairs"), "--scores", str(file), "--page", "0"]
    evaluate.main([*words, "--out", str(tmp_path / "out")])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    result = results["benches"]["pairs"]
    for method in ("one sample", "better answer second", "right in both orders"):
        assert value(result, method) == 70
    assert result["about"]["no verdict"] == 5 and result["about"]["flips with the order"] == 0
    assert result["about"]["equal rewards"] == 5
    again = ["--score_only", "--ties", "half", "--out", str(tmp_path / "out"), "--page", "0"]
    evaluate.main(again)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    for method in ("one sample", "better answer second", "right in both orders"):
        assert value(results["benches"]["pairs"], method) == 72.5
    for bad, problem in (
        ("\n".join(lines[1:]), "lacks pairs row 0"),
        ('{"bench": "pairs", "row": 0, "scores": [1, NaN]}', "two finite numbers"),
    ):
        file.write_text(bad + "\n")
        with pytest.raises(InputError, match=problem):
            evaluate.main([*words, "--out", str(tmp_path / "other")])


def score_one_by_one(policy, processor, row, kind):
    """The rewards of both responses, as sft.py trains them."""
    import torch

    scores = []
    for index in (0, 1):
        if kind == "scalar":
            turns = user_turn(row.images, row.video, row.question)
            sample = encode(processor, turns, row.responses[index])
        else:
            sample = encode_prompt(processor, critique_turns(row, index))
            sampler = HFSampler(policy, processor, "cpu")
            ((critique,),) = sampler.generate([sample], temperature=0.0, max_tokens=8)
            sample.response_ids = critique.ids
        with torch.no_grad():
            batch = collate([sample], processor.tokenizer.pad_token_id)
            scores.append(policy(batch)["score"].item())
    return scores


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["scalar", "critic"])
def test_the_reward_heads_of_sft(kind, toy, tmp_path):
    """The verdict is the sign of the difference of two scores computed one at a time."""
    import torch

    model.make(tmp_path / "base", seed=1, hidden=64, layers=1)
    torch.manual_seed(2)
    policy = load_policy(tmp_path / "base", head=kind)
    processor = load_processor(tmp_path / "base")
    (tmp_path / "rm").mkdir()
    save_policy(policy, processor, tmp_path / "rm")
    args = args_of("--model", tmp_path / "rm", "--max_new_tokens", 8)
    assert args.samples == 2
    rows = toy_rows(toy, tmp_path, "pairs")["pairs"][40:60]
    done = {}
    collect(rows, evaluate.make_backend(args), done, evaluate.protocol_of(args))
    policy.eval()
    for row in rows[-12:]:
        scores = score_one_by_one(policy, processor, row, kind)
        for order in (0, 1):
            judgement = done["pairs", row.row, order, 0]
            first, second = scores if order == 0 else scores[::-1]
            assert judgement.choice == (1 if first > second else 2)
            log_odds = judgement.logp1 - judgement.logp2
            assert log_odds == pytest.approx(first - second, abs=1e-4)
    has_critiques = any(done["pairs", row.row, 0, 0].text for row in rows)
    assert has_critiques == (kind == "critic")


# --- vLLM, once: a toy model that has learnt to answer, with images, videos and texts


@pytest.fixture(scope="session")
def judge_model(toy, tmp_path_factory):
    """A toy model after a few steps on judgements that are only a verdict: it cannot judge."""
    import torch

    folder = tmp_path_factory.mktemp("model")
    model.make(folder, seed=0, hidden=64, layers=1)
    policy, processor = load_policy(folder), load_processor(folder)
    samples = []
    for i, pair in enumerate(read_pairs(toy / "pairs.jsonl", 40)):
        answer = f"<think>So.</think><answer>{1 + i // 2 % 2}</answer>"
        samples.append(encode(processor, judging_turns(pair, swapped=i % 2 == 1), answer))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-3)
    for step in range(50):
        chosen = random.Random(step).sample(samples, 8)
        batch = collate(chosen, processor.tokenizer.pad_token_id)
        loss = -policy(batch)["logps"].sum() / batch["response_mask"].sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_policy(policy, processor, folder)
    assert loss.item() < 0.2
    return folder


def digit_logps(policy, processor, pair, judgement):
    """Log-probabilities of 1 and 2 at the verdict of a judgement, by transformers."""
    import torch

    digits = [processor.tokenizer.encode(digit)[0] for digit in "12"]
    turns = judging_turns(pair, swapped=judgement.order == 1)
    sample = encode(processor, turns, judgement.text)
    at = max(i for i, token in enumerate(sample.response_ids) if token in digits)
    logps = []
    for digit in digits:
        cut = dataclasses.replace(sample, response_ids=[*sample.response_ids[:at], digit])
        with torch.no_grad():
            batch = collate([cut], processor.tokenizer.pad_token_id)
            logps.append(policy(batch)["logps"][0, -1].item())
    return logps


@pytest.mark.slow
def test_vllm_judges_and_its_log_probabilities_are_transformers(judge_model, toy, tmp_path):
    import torch

    pairs = read_pairs(toy / "pairs.jsonl")
    some = pairs[:10] + [pair for pair in pairs if pair.video][:2]
    some += [dataclasses.replace(pair, images=[], video=None) for pair in pairs[20:24]]
    write_pairs(tmp_path / "some.jsonl", some)
    program = ROOT / "tests" / "programs" / "judge_with_vllm.py"
    done = subprocess.run(
        [sys.executable, program, judge_model, tmp_path / "some.jsonl", tmp_path],
        cwd=ROOT,
        env=ENV | {"PYTHONPATH": str(ROOT), "VLLM_LOGGING_LEVEL": "INFO"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "INFO" in done.stderr and "INFO" not in done.stdout  # where only results belong
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert counts["all"] == counts["again"] == 16 * 8 and counts["kept"] < 90
    # another batch may differ in the last bits
    assert counts["same"] >= 126 and counts["early_differ"] <= 2
    assert 48 <= counts["early"] < 128
    assert counts["left_out"] == ["long"] and counts["beside_it"] == 8
    assert "maximum context length is 1024" in counts["reason"]

    judgements = read_judgements(tmp_path).values()
    verdicts = [judgement for judgement in judgements if judgement.choice]
    assert len(verdicts) > 60 and {judgement.choice for judgement in verdicts} == {1, 2}
    assert len({judgement.text for judgement in judgements}) > 1
    checked = sorted(verdicts, key=lambda judgement: (judgement.sample, judgement.row))[:14]
    checked += [judgement for judgement in verdicts if judgement.row in (10, 11)][:4]  # videos
    policy = load_policy(judge_model, dtype=torch.float32).eval()
    processor = load_processor(judge_model)
    worst = 0.0
    for judgement in checked:
        expected = digit_logps(policy, processor, some[judgement.row], judgement)
        for found, logp in zip((judgement.logp1, judgement.logp2), expected):
            worst = max(worst, abs(found - logp))
    assert 0 < worst < 1e-4  # float32 on both sides


def cells_of_several_texts(out):
    """Of a run's cells, a row in one order, those whose samples are not all the same."""
    texts = defaultdict(set)
    for judgement in read_judgements(out).values():
        texts[judgement.row, judgement.order].add(judgement.text)
    return sum(len(of_cell) > 1 for of_cell in texts.values())


@pytest.mark.slow
def test_a_server_gives_the_table_of_the_same_model_in_process(judge_model, toy, tmp_path):
    """Though its generation_config.json makes all samples the same for who does not say how."""
    folder = tmp_path / "model"
    shutil.copytree(judge_model, folder)
    with_sampling = json.loads((folder / "generation_config.json").read_text())
    with_sampling |= model.QWENS_SAMPLING
    (folder / "generation_config.json").write_text(json.dumps(with_sampling))
    words = [*bench_flags(toy, "pairs"), "--limit", "12", "--samples", "16", "--page", "0"]
    words += ["--max_new_tokens", "24"]
    here, served, ignored = tmp_path / "here", tmp_path / "served", tmp_path / "ignored"
    in_process = ["--model", folder, "--context", "1024", "--out", here]
    done = subprocess.run(
        [sys.executable, "evaluate.py", *words, *in_process],
        cwd=ROOT,
        env=ENV,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not done.stderr
    # a seeded request whose prompt is processed in chunks stops vLLM on a CPU
    at_once = ["--no-enable-chunked-prefill", "--max-num-batched-tokens", 8192]
    at_once += ["--max-model-len", 1024]
    with vllm_server(folder, tmp_path / "log", "judge", *at_once) as url:
        words += ["--base_url", url, "--model", "judge"]
        evaluate.main([*words, "--out", str(served)])
        nothing_said = json.dumps(dict.fromkeys(PLAIN_SAMPLING))
        evaluate.main([*words, "--out", str(ignored), "--request", nothing_said])

    assert cells_of_several_texts(here) >= 18 and cells_of_several_texts(served) >= 18  # of 24
    assert cells_of_several_texts(ignored) == 0
    for out in (here, served, ignored):
        table = (out / "table.md").read_text()
        assert ("WARNING: in 24 of 24 cells" in table) == (out == ignored)
    expected, found = (
        json.loads((out / "results.json").read_text())["benches"]["pairs"]["lines"]
        for out in (here, served)
    )
    for method in ("one sample", "voting@16", "any@16", "early stopping, at most 16"):
        _, low, high = expected[method]["overall"]
        assert low <= found[method]["overall"][0] <= high, method


# --- the report


@pytest.mark.parametrize("orders, warns", [("both", False), ("chosen_first", True)])
def test_the_table_warns_if_the_better_answer_is_always_first(orders, warns):
    rows = [make_row(i) for i in range(4)]
    result = {"check": [], "left_out": []} | score(
        rows, greedy(orders) if warns else TWO, always(1)
    )
    args = vars(args_of("--orders", orders, "--samples", 2))
    table = results_table({"args": args, "benches": {"pairs": result}})
    assert ("WARNING: the better answer is always shown first" in table) == warns
    assert f"orders: {orders}" in table and "source: a (4)" in table


def test_the_table_has_the_papers_rows_in_their_columns(toy, tmp_path):
    rows = toy_rows(toy, tmp_path, RLHF)[RLHF]
    published = BENCHMARKS[RLHF].PUBLISHED
    result = {"check": [], "left_out": []} | score(rows, TWO, always(1), published)
    results = {"args": vars(args_of("--samples", 2)), "benches": {RLHF: result}}
    lines = results_table(results).splitlines()
    head = next(line for line in lines if "| overall |" in line).split(" | ")
    ours = next(line for line in lines if "| *R1-Reward (in the paper" in line).split(" | ")
    cells = dict(zip(head, ours))
    assert (cells["overall"], cells["Acc+"]) == ("80.59", "54.35")
    assert len(head) == len(ours) and "75.00" in ours


def test_a_comparison_without_rows_in_a_place_is_left_out(tmp_path):
    """MM-RLHF-RewardBench lists the better answer first: shown as listed, it is never second."""
    rows = [make_row(i) for i in range(30)]
    protocol = Protocol("dataset", samples=1)
    for name in "ab":
        args = args_of("--orders", "dataset", "--samples", 1, "--out", tmp_path / name)
        evaluate.check_or_write_config(args, {"pairs": rows}, {})
        done = judged(rows, protocol, lambda row, *_: says(1 + row.row % 3 // 2))
        with Journal(judgements_file(tmp_path / name)) as journal:
            journal.append([dataclasses.asdict(judgement) for judgement in done.values()])
    words = ["--score_only", "--out", str(tmp_path / "a"), "--compare", str(tmp_path / "b")]
    evaluate.main(words)
    table = (tmp_path / "a" / "table.md").read_text()
    assert "- better answer first, against" in table
    assert "- better answer second, against" not in table


def test_the_figure_is_drawn(tmp_path):
    from PIL import Image

    rows = [make_row(i) for i in range(9)]
    result = score(rows, Protocol("both", samples=4), always(1))
    plot_scaling({"benches": {"pairs": result}}, tmp_path / "scaling.png")
    with Image.open(tmp_path / "scaling.png") as image:
        assert image.width > 400
