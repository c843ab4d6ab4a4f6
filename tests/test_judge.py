"""judge.py over real HTTP: servers that fail, hang or lie, and the judges of C.11."""

import contextlib
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import completion, http_server, send, unused_port, vllm_server
from stand_in_client import wait_until

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


@pytest.fixture
def answering():
    """start(reply, seconds, status) -> URL of a server whose completions are reply(question)."""
    with contextlib.ExitStack() as started:

        def start(reply, seconds=0.0, status=200):
            def respond(handler, request):
                time.sleep(seconds)
                text = reply(request["messages"][-1]["content"])
                send(handler, completion(text), status)

            return started.enter_context(http_server(respond))

        yield start


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
    with pytest.raises(
        JudgeDead, match=r"no reply for 2 s \(--judge_patience\); the last failure: Conn"
    ):
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


def test_a_stuck_question_is_one_unanswered_question(answering):
    """Nothing comes for longer than the patience, but the judge answers an easy question."""

    def reply(question):
        if "Case 3." in question:
            time.sleep(60)
        return "yes"

    words = ["--judge_timeout", 1, "--judge_retries", 1, "--judge_patience", 0.5]
    judge = make_judge("--judge_url", answering(reply), *words)
    assert judge.consistency(judgements(5)) == [1, 1, 1, None, 1]
    assert judge.counts["failed"] == 1


def test_a_judge_that_answers_only_the_easy_question_stops_the_run(answering):
    def reply(question):
        if "Case" in question:
            raise BrokenPipeError
        return "yes"

    judge = make_judge("--judge_url", answering(reply), "--judge_retries", 0)
    with pytest.raises(JudgeDead, match="none of 9 questions was answered; the last failure: no"):
        judge.consistency(judgements(9))


def test_a_dead_judge_says_what_failed(answering):
    url = answering(lambda _: "out of memory", status=500)
    judge = make_judge("--judge_url", url, "--judge_patience", 0.5)
    with pytest.raises(JudgeDead, match=r"last failure: status 500: .*out of memory"):
        judge.consistency([CONSISTENT])


def test_one_question_at_the_start_shows_whether_the_judge_can_be_asked(answering):
    asked = []
    judge = make_judge("--judge_url", answering(lambda question: asked.append(question) or "yes"))
    judge.check()
    assert len(asked) == 1
    assert set(judge.counts.values()) == {0}
    for status in (401, 404):
        url = answering(lambda _: "no", status=status)
        with pytest.raises(InputError, match=f"status {status}.*check OPENAI_API_KEY"):
            make_judge("--judge_url", url).check()
    url = answering(lambda _: "max_tokens is too large", status=400)
    with pytest.raises(InputError, match=r"refuses even an easy question: status 400.*max_tokens"):
        make_judge("--judge_url", url).check()
    make_judge("--judge", "rule").check()  # asks nobody


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


@pytest.mark.slow
def test_the_script_killed_in_the_middle_keeps_every_answer(tmp_path, stand_in):
    """Only the calls under way are made again, and a finished file costs no call."""
    it = stand_in("--latency", 0.1)
    data, out = tmp_path / "data.jsonl", tmp_path / "scored.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in judgements(200)))
    words = ["--judge_url", it.url, "--data", data, "--out", out, "--judge_concurrency", 4]
    words = [sys.executable, ROOT / "judge.py", *words]
    process = subprocess.Popen(list(map(str, words)))
    wait_until(lambda: it.stats["answered"] >= 40)
    process.kill()
    process.wait()
    assert not out.exists()
    for _ in range(2):
        subprocess.run(list(map(str, words)), check=True, capture_output=True)
        answers = [json.loads(line)["consistency"] for line in out.read_text().splitlines()]
        assert answers == [1, 0] * 100
        assert 200 <= it.stats["answered"] <= 204


@pytest.mark.parametrize("row", [3, {"question": 1, "answer": 1}, {"question": "a", "answer": 2}])
def test_a_line_that_is_no_kept_answer_is_named(tmp_path, monkeypatch, stand_in, row):
    data, out = tmp_path / "data.jsonl", tmp_path / "scored.jsonl"
    data.write_text(json.dumps({"text": CONSISTENT}) + "\n")
    words = ["--judge_url", stand_in().url, "--data", data, "--out", out]
    run_script(monkeypatch, *words)
    with open(f"{out}.journal", "a") as journal:
        journal.write(json.dumps(row) + "\n")
    with pytest.raises(InputError, match="line 3: expected a question and its answer"):
        run_script(monkeypatch, *words)


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
