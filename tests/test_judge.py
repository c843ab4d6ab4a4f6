"""
judge.py over real HTTP: the stand-in with every fault, servers that are dead, slow, lie or talk garbage, and the options of C.11.

$ python -m pytest tests/test_judge.py
"""
import contextlib
import doctest
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import judge
from judge import ConsistencyJudge, JudgeDead, question, rule
from toy import server, world

AGREES = "<think>The first is right. Response 1 is better.</think><answer>1</answer>"
SLIPS = "<think>The first is right. Response 1 is better.</think><answer>2</answer>"
NOTHING = "<think>Response 1 is better.</think> So be it."


def args(*words):
    p = judge.parser()
    return p.parse_args(["--data", "-", "--judge_patience", "3", "--judge_retries", "4", *map(str, words)])


def texts(n):
    """n different judgements, every second one slips."""
    return [f"<think>Case {i}. Response 1 is better.</think><answer>{1 + i % 2}</answer>" for i in range(n)]


@pytest.fixture
def stand_in():
    """start(flags) -> the stand-in's server; all are closed at the end."""
    started = []

    def start(*flags):
        started.append(server.Server(server.parser().parse_args(["--port", "0", *map(str, flags)])))
        return started[-1]

    yield start
    for s in started:
        s.close()


@pytest.fixture
def answering():
    """start(reply, seconds) -> the URL of a server whose every completion is reply(question)."""
    started = []

    def start(reply, seconds=0.0, status=200):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]["content"]
                time.sleep(seconds)
                body = json.dumps({"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [
                    {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": reply(asked)}}]}).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=http.serve_forever, daemon=True).start()
        started.append(http)
        return f"http://127.0.0.1:{http.server_port}/v1"

    yield start
    for http in started:
        http.shutdown()
        http.server_close()


def test_doctests():
    assert doctest.testmod(judge).failed == 0


def test_the_stand_in_judges_and_what_has_no_verdict_is_not_asked(stand_in):
    s = stand_in()
    j = ConsistencyJudge(args("--judge_url", s.url))
    assert j.consistency([AGREES, SLIPS, NOTHING, AGREES]) == [1, 0, None, 1]
    assert s.stats["judge"] == {"yes": 1, "no": 1}  # equal questions are asked once
    assert j.counts | {"tokens": 0} == {"asked": 4, "calls": 2, "cached": 1, "no_verdict": 1, "failed": 0, "unparsable": 0, "tokens": 0}
    assert j.consistency([SLIPS]) == [0] and s.stats["judge"]["no"] == 1  # nor ever again
    assert j.counts["tokens"] > 0


def test_every_fault_is_waited_out(stand_in):
    s = stand_in("--retry_after", 0.05, *(w for name in ("429", "429_after", "500", "reset", "html", "empty", "truncated") for w in (f"--p_{name}", 0.05)))
    said = ConsistencyJudge(args("--judge_url", s.url, "--judge_patience", 60)).consistency(texts(200))
    assert said == [1, 0] * 100
    assert sum(s.stats["faults"].values()) > 20


def test_a_dead_judge_stops_after_its_patience_and_says_what_to_look_at():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    start = time.time()
    with pytest.raises(JudgeDead, match="has not replied for 2 s.*judge_patience.*Is it up"):
        ConsistencyJudge(args("--judge_url", url, "--judge_patience", 2)).consistency([AGREES])
    assert 2 <= time.time() - start < 10


def test_a_judge_that_hangs_is_dead_too(answering):
    url = answering(lambda q: "yes", seconds=30)
    with pytest.raises(JudgeDead):
        ConsistencyJudge(args("--judge_url", url, "--judge_timeout", 0.5, "--judge_patience", 2)).consistency([AGREES])


def test_a_slow_judge_is_waited_for_and_calls_run_side_by_side(answering):
    url, start = answering(lambda q: "Yes.", seconds=0.5), time.time()
    assert ConsistencyJudge(args("--judge_url", url)).consistency(texts(32)) == [1] * 32
    assert time.time() - start < 8  # one after the other: 16 s


def test_garbage_is_no_agreement(answering):
    replies = iter(["I cannot tell.", "10 of 10", "", "yes or no", "Response 1"])
    j = ConsistencyJudge(args("--judge_url", answering(lambda q: next(replies)), "--judge_concurrency", 1))
    assert j.consistency(texts(5)) == [None] * 5
    assert j.counts["unparsable"] == 5


def test_one_question_that_fails_is_none_and_the_others_stand(answering):
    """A server that chokes on one question only: no patience is lost, no reward is made up."""
    def reply(asked):
        if "Case 3." in asked:
            raise BrokenPipeError  # the connection breaks
        return "yes"

    j = ConsistencyJudge(args("--judge_url", answering(reply, seconds=0.05), "--judge_concurrency", 2, "--judge_patience", 30, "--judge_retries", 2))
    said = j.consistency(texts(40))
    assert said == [1, 1, 1, None] + [1] * 36
    assert j.counts["failed"] == 1


def test_a_wrong_model_name_stops_at_once(answering):
    url = answering(lambda q: "no such model", status=404)
    with pytest.raises(ValueError, match="--model"):
        ConsistencyJudge(args("--judge_url", url)).consistency([AGREES])


def test_options_of_c11():
    some = texts(2000)
    assert ConsistencyJudge(args("--judge", "rule")).consistency(some) == [1, 0] * 1000
    assert ConsistencyJudge(args("--judge", "none")).consistency(some + [NOTHING]) == [0] * 2000 + [None]
    coin = ConsistencyJudge(args("--judge", "random")).consistency(some)
    assert 900 < sum(coin) < 1100 and coin == ConsistencyJudge(args("--judge", "random")).consistency(some) != ConsistencyJudge(args("--judge", "random"), seed=1).consistency(some)
    flipped = ConsistencyJudge(args("--judge", "rule", "--judge_noise", ".2")).consistency(some)
    assert 320 < sum(a != b for a, b in zip(flipped, [1, 0] * 1000)) < 480
    with pytest.raises(ValueError, match="legal: 0 to 1"):
        ConsistencyJudge(args("--judge_noise", "1.5"))


def test_the_last_conclusion_counts_and_a_long_reasoning_is_cut_to_its_end():
    assert rule("<think>Response 2 is better. No, Response 1 is much better.</think><answer>1</answer>") == 1
    assert rule("<think>Both are fine.</think><answer>1</answer>") == 0
    asked = question(f"<think>{'word ' * 500}Response 2 is better.</think><answer>1</answer>")
    assert len(asked.split()) < 150 and "Response 2 is better.\n\nVerdict: Response 1 is better." in asked


def test_the_script_scores_a_file_and_names_a_bad_line(tmp_path):
    run = lambda data: subprocess.run([sys.executable, ROOT / "judge.py", "--judge", "rule", "--data", data, "--out", tmp_path / "out.jsonl"],
                                      capture_output=True, text=True)
    data = tmp_path / "said.jsonl"
    data.write_text("".join(json.dumps({"text": t, "label": k}) + "\n" for t, k in ((AGREES, 1), (SLIPS, 1), (NOTHING, None))))
    done = run(data)
    assert done.returncode == 0 and "consistent 1 of 3 (33.3 %), not 1, no answer 1" in done.stdout and "agreement with the labels: 1 of 2" in done.stdout
    assert [json.loads(line)["consistency"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == [1, 0, None]
    data.write_text('{"text": "a"}\n{"text": 3}\n')
    done = run(data)
    assert done.returncode != 0 and "line 2" in done.stderr and "Traceback" not in done.stderr


def test_the_toy_base_model_behind_a_real_vllm_server_is_a_judge(tmp_path):
    """As the paper has Qwen2.5-VL-7B-Instruct: of 200 judgements of the toy world at least 97 % are judged rightly."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(ROOT / "toy/base"), "--served-model-name", "toy/base",
               "--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "32", "--enforce-eager", "--host", "127.0.0.1", "--port", str(port)]
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
        rng, said = random.Random(11), []
        for i in range(200):
            item = world.twins(rng, medium=("image", "video", "text")[i % 3])[0]
            said.append(world.judgement(item, (0, 1), 1 + i % 2, ("careful", "hasty", "verbose", "inconsistent")[i // 2 % 4]))
        j = ConsistencyJudge(args("--judge_url", f"http://127.0.0.1:{port}/v1", "--judge_model", "toy/base", "--judge_patience", 120))
        agree = [a == rule(t) for a, t in zip(j.consistency(said), said)]
        assert sum(agree) >= 194, sum(agree)
    finally:
        os.killpg(it.pid, signal.SIGKILL)
        it.wait()
