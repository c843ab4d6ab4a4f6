"""
downstream_grpo.py: Eq. 3 by hand and over real HTTP, the readers on the toy's files, whole runs of toy/weak on one rank and two, killed
and resumed, with a judge that dies; the forced token against transformers on a real vLLM server.

$ python -m pytest tests/test_downstream.py
"""
import doctest
import json
import math
import os
import random
import re
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
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import downstream_grpo as d
from judge import JudgeDead
from toy import pretrain, world

ENV = os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
SHOWN = re.compile(r"\[Response 1\]: (.*); \[Response 2\]: (.*)\n\nOutput Format", re.S)
verdict = lambda choice: f"<think>So.</think><answer>{choice}</answer>"


class Server:
    """A reward model over HTTP: reply(first, second) -> text, or {"1": probability, ...} for the forced token."""

    def __init__(self, reply):
        self.asked = asked = []

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                content = body["messages"][0]["content"]
                first, second = SHOWN.search(content[-1]["text"]).groups()
                asked.append((content[0].get("image_url", {}).get("url"), first, second, body))
                said = reply(first, second)
                choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said if isinstance(said, str) else "1"}}
                if not isinstance(said, str):
                    top = [{"token": t, "logprob": p, "bytes": None} for t, p in said.items()]
                    choice["logprobs"] = {"content": [top[0] | {"top_logprobs": top}]}
                data = json.dumps({"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice],
                                   "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def serve():
    started = []

    def start(reply):
        started.append(Server(reply))
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The toy's tasks and their public forms, a tenth of them."""
    folder = tmp_path_factory.mktemp("toy")
    subprocess.run([sys.executable, "toy/sources.py", "--out", folder / "data", "--scale", "0.1"], cwd=ROOT, env=ENV, check=True, stdout=subprocess.DEVNULL)
    return folder / "data" / "tasks"


def args(*words):
    return d.parser().parse_args(["--data", "-", "--judge_patience", "3", "--judge_retries", "1", *map(str, words)])


def rows_of(texts, finish=None):
    task = {"question": "Which?", "images": [], "answer": "answer 3"}
    return [{"text": text, "finish": finish[i] if finish else "stop", "pair": task} for i, text in enumerate(texts)]


def scored(texts, *words, finish=None):
    """(shares of duels won, what is logged, the judge) of one prompt's answers."""
    a = args("--samples", len(texts), *words)
    judge = d.Duels(a)
    (rewards, part), = d.score(rows_of(texts, finish), judge, a)()
    assert rewards.tolist() == pytest.approx((part["score"] + a.exact_weight * part["exact"]).tolist())
    return [round(x, 6) for x in part["score"].tolist()], part, judge


number = lambda text: int(text.split()[1])
EIGHT = [f"answer {i}" for i in (3, 7, 1, 5, 0, 2, 6, 4)]

# ---------------------------------------------------------------------------------------------------
# the score


def test_doctests():
    assert doctest.testmod(d).failed == 0


def test_a_known_order_is_found_and_costs_what_was_said(serve):
    """8 answers, each worth its number: Score(r_i) is its number, the spread that of 0..7 sevenths; 56 calls, 16 on a ring, 32 on one of 2."""
    server = serve(lambda a, b: verdict(1 if number(a) > number(b) else 2))
    share, part, judge = scored(EIGHT, "--judge_url", server.url)
    assert [round(7 * s) for s in share] == [number(t) for t in EIGHT] and all(abs(7 * s - round(7 * s)) < 1e-5 for s in share)
    assert len(server.asked) == judge.counts["calls"] == part["duels"] == 56
    assert part["spread"] == pytest.approx(torch.arange(8.).std(unbiased=False).item() / 7) and part["judge_right"].count(1.0) == 3 and len(part["judge_right"]) == 7
    for pairs, calls in (("ring", 16), (2, 32), (4, 56), (100, 56)):
        before = len(server.asked)
        some, fewer, _ = scored(EIGHT, "--judge_url", server.url, "--pairs", pairs)
        assert len(server.asked) - before == fewer["duels"] == calls and fewer["ring_rank"] == []
        assert some == share if calls == 56 else d.rank_correlation(torch.tensor(some), torch.tensor(share)) > 0.5
    assert part["ring_rank"] == [d.rank_correlation(torch.tensor(scored(EIGHT, "--judge_url", server.url, "--pairs", "ring")[0]), torch.tensor(share))]


def test_calls_that_share_their_beginning_stand_together(serve):
    """The server keeps the prefix of picture, question and first answer: each first answer is met in one run of calls."""
    server = serve(lambda a, b: verdict(1))
    scored(EIGHT, "--judge_url", server.url, "--judge_concurrency", 1)
    firsts = [first for _, first, _, _ in server.asked]
    assert sum(a != b for a, b in zip(firsts, firsts[1:])) == 7


@pytest.mark.parametrize("reply", [lambda a, b: verdict(1), lambda a, b: verdict(2), lambda a, b: {"1": -0.1, "2": -2.5}])
def test_a_judge_that_sees_only_places_says_nothing(serve, reply):
    server = serve(reply)
    share, part, _ = scored(EIGHT, "--judge_url", server.url, "--verdict", "reason" if isinstance(reply("", ""), str) else "token")
    assert share == [0.5] * 8 and part["flat"] == 1 and part["spread"] < 1e-9


def test_a_lean_to_the_first_place_cancels(serve):
    """Where the reward model leans to place 1 by 0.2, every s_ij is as it is without: the order of the answers is exact."""
    p = lambda a, b, lean: 0.5 + 0.05 * (number(a) - number(b)) * 0.5 + lean
    found = [scored(EIGHT, "--verdict", "token", "--judge_url", serve(lambda a, b: {"2": math.log(1 - p(a, b, lean)), " 1": math.log(p(a, b, lean))}).url)[0]
             for lean in (0.0, 0.2, -0.1)]
    assert all(other == pytest.approx(found[0], abs=1e-6) for other in found[1:])
    assert sorted(range(8), key=found[0].__getitem__) == sorted(range(8), key=lambda i: number(EIGHT[i]))


def test_equal_answers_are_one_and_ties_are_ties(serve):
    server = serve(lambda a, b: verdict(1 if a == "x" else 2))
    share, part, _ = scored(["x", "y", "x", " x ", "y", "x", "x", "x"], "--judge_url", server.url)
    # x meets five other x (1/2 each) and two y (1 each): 4.5 / 7; y: six x (0), one y (1/2): 0.5 / 7
    assert share == pytest.approx([4.5 / 7 if i not in (1, 4) else 0.5 / 7 for i in range(8)], abs=1e-6)
    assert len(server.asked) == 2 and part["distinct"] == 2 and sum(share) == pytest.approx(4, abs=1e-5)
    share, part, _ = scored(["x"] * 8, "--judge_url", server.url)
    assert share == [0.5] * 8 and part["flat"] == 1 and len(server.asked) == 2
    share, _, judge = scored(["x", "y"], "--judge_url", server.url)
    judge.submit([d.Duel("Which?", (), "x", "y", "z")] * 3).result()
    assert share == [1, 0] and judge.counts["calls"] == 3 and judge.counts["cached"] == 2  # another ground truth is another duel, three equal ones are one


def test_no_verdict_is_a_draw_and_an_answer_that_is_none_loses_unasked(serve):
    server = serve(lambda a, b: "I like both." if "odd" in (a, b) else verdict(1 if a == "good" else 2))
    share, part, judge = scored(["good", "bad", "odd", "  ", "long", "bad"], "--judge_url", server.url, finish=["stop"] * 4 + ["length", "stop"])
    assert not {"", "  ", "long"} & {t for _, a, b, _ in server.asked for t in (a, b)} and len(server.asked) == 6
    # good: two bad 2, odd 1/2, two failures 2; bad: the other bad 1/2, odd 1/2, failures 2; odd: three draws, failures 2; a failure: the other 1/2
    assert [round(5 * s, 4) for s in share] == [4.5, 3, 3.5, 0.5, 0.5, 3]
    assert part["no_verdict"] == 4 == judge.counts["unparsable"]


def test_the_random_judge_the_ground_truth_and_noise():
    share, part, judge = scored(EIGHT, "--judge", "random")
    assert len(set(share)) > 2 and scored(EIGHT, "--judge", "random")[0] == share and judge.counts["calls"] == 0
    assert scored(EIGHT, "--judge", "random", "--seed", 0)[0] == share
    share, part, _ = scored(EIGHT, "--judge", "exact")
    assert share == [round(x, 6) for x in [1 / 2 + 1 / 2] + [3 / 7] * 7] and part["judge_right"] == [1.0] * 7
    assert scored(EIGHT, "--judge", "exact", "--judge_noise", 1)[0] == [0] + [round(4 / 7, 6)] * 7
    assert scored(EIGHT, "--judge", "random", "--exact_weight", 0.5)[1]["exact"].tolist() == [1, 0, 0, 0, 0, 0, 0, 0]


def test_a_dead_judge_is_no_reward():
    for kind in ("reason", "token"):
        with pytest.raises(JudgeDead, match="has not replied for 1 s"):
            scored(EIGHT, "--judge_url", "http://127.0.0.1:9/v1", "--judge_patience", 1, "--verdict", kind)


def test_a_judge_that_gives_no_log_probabilities_is_told_apart(serve):
    with pytest.raises(JudgeDead, match="the reply has no log-probabilities, which --verdict token asks for"):
        scored(EIGHT[:2], "--judge_url", serve(lambda a, b: verdict(1)).url, "--judge_patience", 1, "--verdict", "token")


@pytest.mark.parametrize("words", [["--pairs", "0"], ["--pairs", "some"]])
def test_pairs_that_cannot_be(words, capsys):
    with pytest.raises(SystemExit):
        args(*words)
    assert "legal: all, ring, or how far apart" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------
# tasks


def test_every_format_gives_its_tasks(toy, tmp_path):
    own = d.read_tasks([("tasks", toy / "train.jsonl")], tmp_path)
    half = len(own) // 2
    arx = d.read_tasks([("arXivQA", toy / "ArxivQA")], tmp_path)
    think = d.read_tasks([("ThinkLite-VL", toy / "ThinkLite-VL-hard-11k")], tmp_path)
    assert len(arx) == half and len(think) == len(own) - half
    for task, same in zip(arx, own):
        option = next(line for line in task["question"].splitlines() if line.startswith(f"{task['answer']}. "))
        assert option[3:] == same["answer"] and task["question"].startswith(same["question"])
        assert Path(task["images"][0]).read_bytes() == Path(same["images"][0]).read_bytes()
    for task, same in zip(think, own[half:]):
        assert (task["question"], task["answer"]) == (same["question"], same["answer"])
        assert Path(task["images"][0]).read_bytes() == Path(same["images"][0]).read_bytes()
    test = d.read_tasks([("tasks", toy / "test.jsonl")], tmp_path)
    for task, same in zip(d.read_tasks([("V*", toy / "vstar_bench")], tmp_path), test, strict=True):
        assert f"({task['answer']}) {same['answer']}" in task["question"] and os.path.isfile(task["images"][0])
    assert len(d.read_tasks([("tasks", toy / "train.jsonl"), ("V*", toy / "vstar_bench")], tmp_path)) == len(own) + len(test)


def test_what_is_no_task_is_counted_or_named(tmp_path, capsys):
    row = {"id": 1, "question": "Q?", "options": ["A. x", "y"], "label": "B", "image": "a.png"}
    (tmp_path / "a.png").write_bytes(b"x")
    lines = [row, row | {"label": "[A]"}, row | {"label": "y"}, row | {"label": "Both"}, row | {"label": "E"}, row | {"image": "none.png"}]
    (tmp_path / "arxivqa.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tasks = d.read_tasks([("arXivQA", tmp_path)], tmp_path)
    assert [t["answer"] for t in tasks] == ["B", "A", "B"] and "\nA. x\nB. y\n" in tasks[0]["question"]
    assert "{'arXivQA: no label': 2, 'arXivQA: missing image': 1}" in capsys.readouterr().err
    (tmp_path / "own.jsonl").write_text('{"question": "Q?"}')
    with pytest.raises(d.Unusable, match="line 1 has no answer; legal for tasks: an object with question, answer"):
        d.read_tasks([("tasks", tmp_path / "own.jsonl")], tmp_path)


@pytest.mark.parametrize("text, answer, right", [
    ("B", "B", 1), ("(b)", "B", 1), ("B. two", "B", 1), ("Because", "B", 0), ("A red one", "A", 0), ("<answer>C</answer> so <answer> B </answer>", "B", 1),
    ("Thus \\boxed{12}.", "12", 1), ("12.0", "12", 1), ("12", "12.5", 0), ("top  left", "top left", 0), ("Top left.", "top left", 1), ("nan", "nan", 1), ("", "red", 0)])
def test_exact_match(text, answer, right):
    assert d.exact(text, answer) == right


# ---------------------------------------------------------------------------------------------------
# runs


def command(toy, *words, ranks=1):
    run = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return [sys.executable, *run, "downstream_grpo.py", "--model", "toy/weak", "--data", str(toy / "train.jsonl"), "--engine", "hf", "--chunk", "1", "--samples", "4",
            "--rollout_batch", "6", "--train_batch", "12", "--max_new_tokens", "8", "--context", "512", "--lr", "1e-3", "--judge_retries", "1", "--zero", "2", *map(str, words)]


def run(toy, *words, fails=False, ranks=1):
    done = subprocess.run(command(toy, *words, ranks=ranks), cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=300)
    assert (done.returncode != 0) == fails, (done.stdout + done.stderr)[-4000:]
    return done.stdout + done.stderr


def logged(out):
    """Rows of the log, without seconds, and without the calls, which a resumed run makes anew."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("s_") and k not in ("seconds", "judge_calls")} for row in rows if "step" in row and "args" not in row]


LONGER = lambda a, b: verdict(1 if (len(a), a) > (len(b), b) else 2)


def test_killed_and_resumed_it_is_the_unbroken_run(toy, serve, tmp_path):
    server = serve(LONGER)
    words = ["--judge_url", server.url, "--steps", 5, "--save_every", 2, "--eval_data", toy / "test.jsonl", "--eval_n", 8, "--eval_every", 5]
    run(toy, *words, "--out", tmp_path / "whole")
    broken = subprocess.Popen(command(toy, *words, "--out", tmp_path / "broken"), cwd=ROOT, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log, deadline = tmp_path / "broken" / "log.jsonl", time.time() + 120
    while time.time() < deadline and not (log.exists() and '"step": 3,' in log.read_text()):
        time.sleep(0.01)
    broken.send_signal(signal.SIGKILL)
    broken.wait()
    assert not (tmp_path / "broken" / "model.safetensors").exists()
    run(toy, *words, "--out", tmp_path / "broken")
    whole = logged(tmp_path / "whole")
    assert [row["step"] for row in whole] == [0, 1, 2, 3, 4, 5] and logged(tmp_path / "broken") == whole
    for name in ("rollouts-0.jsonl", "model.safetensors"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert whole[0]["eval_win"] == 0.5 and whole[-1]["eval_n"] == 8 and (tmp_path / "whole" / "curves.png").stat().st_size > 10_000
    assert all(row["duels"] <= 6 * 12 and row["no_verdict"] == 0 for row in whole[1:])
    said = [json.loads(line) for line in (tmp_path / "whole" / "rollouts-0.jsonl").read_text().splitlines()]
    for at in range(0, len(said), 4):  # within a prompt the longer answer never scores less
        group = sorted(said[at:at + 4], key=lambda r: (len(r["text"].strip()), r["text"].strip()))
        assert all(a["reward"] <= b["reward"] for a, b in zip(group, group[1:]))


def test_two_ranks_take_the_same_steps_as_one(toy, serve, tmp_path):
    words = ["--judge_url", serve(LONGER).url, "--steps", 2]
    run(toy, *words, "--out", tmp_path / "one", "--zero", 0)
    run(toy, *words, "--out", tmp_path / "two", "--zero", 2, "--micro_tokens", 300, ranks=2)
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert len(one) == 2 and one[0]["grad_norm"] > 1e-3 and one[0]["spread"] > 0.05
    for a, b in zip(one, two):
        for key in ("reward", "exact", "spread", "flat", "distinct", "duels", "judge_right", "ring_rank", "loss", "grad_norm", "ratio_max", "entropy", "length"):
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-5), key


def test_it_learns_what_wins_and_a_dead_judge_stops_it_with_a_checkpoint(toy, serve, tmp_path):
    """A reward model that likes one answer above all: its share grows in a few steps, and the win rate over the start with it."""
    server = serve(lambda a, b: verdict(1 if a == "triangle" else 2))
    words = ["--judge_url", server.url, "--steps", 8, "--rollout_batch", 16, "--samples", 8, "--train_batch", 128, "--chunk", 8, "--eval_data", toy / "test.jsonl", "--eval_every", 8,
             "--save_every", 8, "--lr", 2e-3, "--out", tmp_path / "out"]
    run(toy, *words)
    said = [json.loads(line) for line in (tmp_path / "out" / "rollouts-0.jsonl").read_text().splitlines()]
    share = lambda step: sum(r["text"] == "triangle" for r in said if r["step"] == step) / 128
    assert share(8) > share(1) + 0.1, [share(s) for s in range(1, 9)]
    assert logged(tmp_path / "out")[-1]["eval_win"] > 0.5
    server.close()
    words[words.index("--out") + 1] = tmp_path / "dead"
    told = run(toy, *words[:-4], "--eval_n", 1, "--judge_patience", 1, *words[-4:], fails=True)
    assert "downstream_grpo.py: stopped, with a checkpoint" in told and "has not replied for 1 s" in told
    assert "step-000000" in os.listdir(tmp_path / "dead" / "checkpoints")


# ---------------------------------------------------------------------------------------------------
# a real server


def test_the_forced_token_of_a_real_server_is_transformers_own(toy, tmp_path):
    """vLLM continues the reply after the empty thought: P("1") is what transformers computes, pictures included; and prefixes are met again."""
    from sft import INPUTS, collate, encode, load_policy, load_processor, save_policy
    policy, processor = load_policy(ROOT / "toy/weak", dtype=torch.float32), load_processor(ROOT / "toy/weak")
    rng = random.Random(0)  # a few steps of judgements, or neither digit is among the 20 likeliest tokens that a server tells of

    def judged():
        dialogue = pretrain.judging(rng.choice(world.twins(rng)), (0, 1), "hasty", rng)
        return dialogue | {"turns": [(dialogue["turns"][0][0], f"{d.PREFIX}{rng.choice((1, 2))}</answer>")]}

    pretrain.train(policy.model, processor, lambda done: [judged() for _ in range(8)], 60, log_every=60)
    save_policy(policy, processor, tmp_path)
    policy.eval()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tmp_path), "--dtype", "float32", "--enforce-eager",
                               "--max-model-len", "1024", "--host", "127.0.0.1", "--port", str(port)], cwd=ROOT, env=ENV | {"VLLM_CPU_KVCACHE_SPACE": "1"},
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        tasks = d.read_tasks([("tasks", toy / "train.jsonl")], toy)[:4]
        asked = [d.Duel(t["question"], tuple(t["images"]), *order, t["answer"]) for t in tasks
                 for order in ((a, b) for a in ("red", "a square", "two") for b in ("red", "a square", "two") if a != b)]
        expected, ids = [], processor.tokenizer.convert_tokens_to_ids(["1", "2"])
        for duel in asked:
            turns = d.messages({"question": duel.question, "images": duel.images, "video": None, "responses": (duel.first, duel.second)})
            row = encode(processor, turns)
            row["response"] = processor.tokenizer(d.PREFIX)["input_ids"]
            batch = collate([row], processor.tokenizer.pad_token_id)
            with torch.no_grad():
                logits = policy.model(**{k: batch[k] for k in INPUTS if k in batch}).logits[0, -1, ids]
            expected.append(torch.softmax(logits, 0)[0].item())
        url, deadline = f"http://127.0.0.1:{port}", time.time() + 180
        while time.time() < deadline and server.poll() is None:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=2)
                break
            except OSError:
                time.sleep(0.5)
        judge = d.Duels(args("--verdict", "token", "--judge_url", f"{url}/v1", "--judge_model", tmp_path, "--judge_patience", 30))
        assert judge.submit(asked).result() == pytest.approx(expected, abs=1e-4)
        metrics = urllib.request.urlopen(f"{url}/metrics").read().decode()
        queries, hits = (float(re.search(rf"^vllm:prefix_cache_{k}_total{{.*}} (\S+)$", metrics, re.M)[1]) for k in ("queries", "hits"))
        assert hits > 0.5 * queries  # picture, instructions, question and first answer; a third of the calls begin with something new
        reasoned = d.Duels(args("--judge_url", f"{url}/v1", "--judge_model", tmp_path, "--judge_tokens", 60, "--judge_patience", 30)).submit(asked[:6]).result()
        assert all(p != p or p in (0.0, 1.0) for p in reasoned)  # the base model may say anything; NaN is no verdict
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # its worker too
        server.wait(30)
