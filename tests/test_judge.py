"""judge.py over real HTTP: servers that fail, hang or lie, and the judges of C.11."""

import json
import random
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import unused_port, vllm_server

from core.pairs import InputError
from judge import ConsistencyJudge, JudgeDead, judge_question, main, parser, rule
from toy import world

ROOT = Path(__file__).resolve().parent.parent
CONSISTENT = "<think>The first is right. Response 1 is better.</think><answer>1</answer>"
INCONSISTENT = "<think>The first is right. Response 1 is better.</think><answer>2</answer>"
NO_VERDICT = "<think>Response 1 is better.</think> So be it."


def make_judge(*words, seed=0):
    quick = ["--data", "-", "--judge_patience", "3", "--judge_retries", "4"]
    return ConsistencyJudge(parser().parse_args([*quick, *map(str, words)]), seed)


def judgements(count):
    """Different ones; every second one is inconsistent."""
    return [
        f"<think>Case {i}. Response 1 is better.</think><answer>{1 + i % 2}</answer>"
        for i in range(count)
    ]


class QuietServer(ThreadingHTTPServer):
    def handle_error(self, *_):
        """A client that gave up is no news."""


@pytest.fixture
def answering():
    """start(reply, seconds, status) -> URL of a server whose completions are reply(question)."""
    started = []

    def start(reply, seconds=0.0, status=200):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                time.sleep(seconds)
                message = {"content": reply(request["messages"][-1]["content"])}
                choice = {"index": 0, "finish_reason": "stop", "message": message}
                body = json.dumps({"choices": [choice]}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        http = QuietServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=http.serve_forever, daemon=True).start()
        started.append(http)
        return f"http://127.0.0.1:{http.server_port}/v1"

    yield start
    for http in started:
        http.shutdown()
        http.server_close()


# ------------------------------------------------------------------------------------------------
# Questions and answers


def test_equal_questions_are_asked_once_and_without_a_verdict_nothing_is_asked(stand_in):
    it = stand_in()
    judge = make_judge("--judge_url", it.url)
    assert judge.consistency([CONSISTENT, INCONSISTENT, NO_VERDICT, CONSISTENT]) == [1, 0, None, 1]
    assert it.stats["judge"] == {"yes": 1, "no": 1}
    expected = {"asked": 4, "calls": 2, "cached": 1, "no_verdict": 1, "failed": 0, "unparsable": 0}
    assert judge.counts.pop("tokens") > 0
    assert judge.counts == expected


def test_a_question_of_an_earlier_call_is_not_asked_again(stand_in):
    it = stand_in()
    judge = make_judge("--judge_url", it.url)
    for _ in range(2):
        assert judge.consistency([INCONSISTENT]) == [0]
    assert it.stats["requests"] == 1


def test_a_reply_that_is_neither_yes_nor_no_is_no_agreement(answering):
    replies = iter(["I cannot tell.", "10 of 10", "", "yes or no", "Response 1"])
    judge = make_judge("--judge_url", answering(lambda _: next(replies)), "--judge_concurrency", 1)
    assert judge.consistency(judgements(5)) == [None] * 5
    assert judge.counts["unparsable"] == 5


def test_the_judge_reads_the_end_of_a_long_reasoning():
    text = f"<think>{'word ' * 500}Response 2 is better.</think><answer>1</answer>"
    question = judge_question(text)
    assert len(question.split()) < 150
    assert "Response 2 is better.\n\nVerdict: Response 1 is better." in question


def test_calls_run_at_the_same_time_and_do_not_block(answering):
    judge = make_judge("--judge_url", answering(lambda _: "Yes.", seconds=0.5))
    start = time.monotonic()
    future = judge.submit(judgements(32))
    assert time.monotonic() - start < 0.4
    assert future.result() == [1] * 32
    assert time.monotonic() - start < 8  # one after the other: 16 s


# ------------------------------------------------------------------------------------------------
# Servers that fail


@pytest.mark.slow
def test_every_fault_is_waited_out(stand_in):
    faults = ("429", "429_after", "500", "reset", "html", "empty", "truncated")
    words = [word for fault in faults for word in (f"--p_{fault}", 0.05)]
    it = stand_in("--retry_after", 0.05, *words)
    judge = make_judge("--judge_url", it.url, "--judge_patience", 60, "--judge_retries", 8)
    assert judge.consistency(judgements(200)) == [1, 0] * 100
    assert sum(it.stats["faults"].values()) > 20


@pytest.mark.slow
def test_a_judge_that_is_not_there_is_dead_after_its_patience():
    judge = make_judge("--judge_url", f"http://127.0.0.1:{unused_port()}/v1", "--judge_patience", 2)
    start = time.monotonic()
    with pytest.raises(JudgeDead, match=r"no reply for 2 s \(--judge_patience\). Is the server up"):
        judge.consistency([CONSISTENT])
    assert 2 <= time.monotonic() - start < 10


def test_a_judge_that_hangs_is_dead_too(answering):
    url = answering(lambda _: "yes", seconds=5)
    judge = make_judge("--judge_url", url, "--judge_timeout", 0.5, "--judge_patience", 1)
    with pytest.raises(JudgeDead):
        judge.consistency([CONSISTENT])


@pytest.mark.slow
def test_one_question_that_fails_is_none_and_costs_no_other(answering):
    def reply(question):
        if "Case 3." in question:
            raise BrokenPipeError  # the connection breaks
        return "yes"

    url = answering(reply, seconds=0.05)
    words = ["--judge_concurrency", 2, "--judge_patience", 30, "--judge_retries", 2]
    judge = make_judge("--judge_url", url, *words)
    assert judge.consistency(judgements(40)) == [1, 1, 1, None] + [1] * 36
    assert judge.counts["failed"] == 1


def test_a_wrong_model_name_stops_at_once(answering):
    judge = make_judge("--judge_url", answering(lambda _: "no such model", status=404))
    with pytest.raises(InputError, match="--judge_url and --judge_model"):
        judge.consistency([CONSISTENT])


# ------------------------------------------------------------------------------------------------
# C.11: judges without a model


def test_the_rule_takes_the_last_conclusion():
    text = "<think>Response 2 is better. No, Response 1 is much better.</think><answer>1</answer>"
    assert rule(text) == 1
    assert rule("<think>Both are fine.</think><answer>1</answer>") == 0
    assert make_judge("--judge", "rule").consistency(judgements(10)) == [1, 0] * 5


def test_none_never_agrees():
    judge = make_judge("--judge", "none")
    assert judge.consistency([CONSISTENT, INCONSISTENT, NO_VERDICT]) == [0, 0, None]


def test_random_is_a_coin_of_the_seed():
    texts = judgements(2000)
    coins = make_judge("--judge", "random").consistency(texts)
    assert 900 < sum(coins) < 1100
    assert coins == make_judge("--judge", "random").consistency(texts)
    assert coins != make_judge("--judge", "random", seed=1).consistency(texts)


def test_noise_flips_a_share_of_the_answers():
    answers = make_judge("--judge", "rule", "--judge_noise", 0.2).consistency(judgements(2000))
    flipped = sum(answer != truth for answer, truth in zip(answers, [1, 0] * 1000))
    assert 320 < flipped < 480
    always = make_judge("--judge", "rule", "--judge_noise", 1)
    assert always.consistency([CONSISTENT, NO_VERDICT]) == [0, None]


# ------------------------------------------------------------------------------------------------
# The script


def run_script(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["judge.py", *map(str, words)])
    main()


def test_the_script_scores_a_file(tmp_path, monkeypatch, capsys):
    rows = [
        {"text": CONSISTENT, "label": 1},
        {"text": INCONSISTENT, "label": 1},
        {"text": NO_VERDICT, "label": None},
    ]
    data, out = tmp_path / "data.jsonl", tmp_path / "out/scored.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_script(monkeypatch, "--judge", "rule", "--data", data, "--out", out)
    printed = capsys.readouterr().out
    assert "rule: consistent 1 of 3 (33.3 %), not 1, no answer 1" in printed
    assert "agreement with the labels: 1 of 2" in printed
    scored = [json.loads(line) for line in out.read_text().splitlines()]
    assert scored == [row | {"consistency": answer} for row, answer in zip(rows, [1, 0, None])]


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"text": 3}', 'line 2: expected an object with "text"'),
        ('{"text": "a", "label": 2}', "line 2: label is 2; expected 0, 1 or none"),
        ("{", "line 2 is not JSON"),
    ],
)
def test_the_script_names_a_wrong_line(tmp_path, monkeypatch, line, message):
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises(InputError, match=message):
        run_script(monkeypatch, "--judge", "rule", "--data", data)


# ------------------------------------------------------------------------------------------------
# A real model


@pytest.mark.slow
def test_the_toy_base_model_behind_vllm_is_a_judge(tmp_path):
    """As Qwen2.5-VL-7B-Instruct is in the paper: of 200 judgements it gets at least 97 % right."""
    rng = random.Random(11)
    texts = []
    for i in range(200):
        item = world.twins(rng, medium=("image", "video", "text")[i % 3])[0]
        manner = ("careful", "hasty", "verbose", "inconsistent")[i // 2 % 4]
        texts.append(world.judgement(item, (0, 1), 1 + i % 2, manner))
    limits = ["--max-model-len", 1024, "--max-num-seqs", 32]
    with vllm_server(ROOT / "toy/base", tmp_path / "log", "toy/base", *limits) as url:
        judge = make_judge("--judge_url", url, "--judge_model", "toy/base", "--judge_patience", 120)
        answers = judge.consistency(texts)
    right = sum(answer == rule(text) for answer, text in zip(answers, texts))
    assert right >= 194
