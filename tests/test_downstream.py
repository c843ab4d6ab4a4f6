"""
downstream_grpo.py: Eq. 3 by hand and over HTTP, whole runs of toy/weak on one rank and two, killed
and resumed, with a reward model that dies; the forced token of a real vLLM server.
"""

import contextlib
import doctest
import itertools
import json
import math
import os
import random
import re
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import stages
import torch
from conftest import ROOT, png, read_rows, vllm_server, write_rows

import downstream_grpo
from core import duels, exact_match
from core.duels import Duel, finished_answer
from core.encoding import MODEL_INPUTS, Sample, collate, encode, load_processor
from core.files import InputError
from core.model_card import KINDS
from core.pairs import Pair, judging_turns
from core.policy import load_policy, save_policy, token_logps
from judge import JudgeDead
from sources.reading import Dropped, Task

WEAK = ROOT / "toy" / "weak"
# the two answers in a prompt to the reward model
ANSWERS = re.compile(r"\[Response 1\]: (.*); \[Response 2\]: (.*)\n\nOutput Format", re.DOTALL)
EIGHT = [f"answer {number}" for number in (3, 7, 1, 5, 0, 2, 6, 4)]


def verdict(choice):
    return f"<think>So.</think><answer>{choice}</answer>"


def always_1(first, second):
    return verdict(1)


def number_in(answer):
    return int(answer.split()[1])


def the_larger_wins(first, second):
    return verdict(1 if number_in(first) > number_in(second) else 2)


def the_longer_wins(first, second):
    return verdict(1 if (len(first), first) > (len(second), second) else 2)


class Server:
    """A reward model over HTTP: reply(first, second) -> text, or {token: log-probability}."""

    def __init__(self, reply):
        self.reply = reply
        self.asked = []  # (first, second) of each call

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(handler):
                body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                data = json.dumps(self.completion(body)).encode()
                handler.send_response(200)
                handler.send_header("Content-Length", str(len(data)))
                handler.end_headers()
                handler.wfile.write(data)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def completion(self, body):
        text = body["messages"][0]["content"][-1]["text"]
        first, second = ANSWERS.search(text).groups()
        self.asked.append((first, second))
        reply = self.reply(first, second)
        choice = {"index": 0, "finish_reason": "stop"}
        if isinstance(reply, str):
            choice["message"] = {"role": "assistant", "content": reply}
        else:
            likeliest = [{"token": token, "logprob": logp} for token, logp in reply.items()]
            choice["message"] = {"role": "assistant", "content": "1"}
            choice["logprobs"] = {"content": [likeliest[0] | {"top_logprobs": likeliest}]}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        return {"object": "chat.completion", "model": "m", "choices": [choice], "usage": usage}

    def close(self):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def serve():
    """serve(reply) -> a server; all are closed at the end."""
    with contextlib.ExitStack() as started:
        yield lambda reply: started.enter_context(contextlib.closing(Server(reply)))


@pytest.fixture
def tasks(toy_world):
    """The folder of the toy's tasks and of their public forms."""
    return toy_world / "out/toy/data/tasks"


def args_of(*words):
    short = ["--data", "-", "--judge_patience", "3", "--judge_retries", "1"]
    return downstream_grpo.parser().parse_args([*short, *map(str, words)])


def samples_of(texts, finishes=None):
    """The answers to one prompt."""
    task = Task("0", "toy", "Which?", "answer 3", [])
    finishes = finishes or ["stop"] * len(texts)
    samples = []
    for text, finish in zip(texts, finishes):
        samples.append(Sample([], [], {}, pair=task, text=text, finish=finish))
    return samples


def score(texts, *words, finishes=None):
    """The Score of one prompt's answers, the share of its duels that each won, the reward model."""
    args = args_of("--samples", len(texts), *words)
    reward_model = downstream_grpo.RewardModel(args)
    samples = samples_of(texts, finishes)
    started = [downstream_grpo.start_contests(samples, reward_model, args)]
    (contest,) = downstream_grpo.finish_contests(started)
    found = duels.score(contest, args.pairs, args.exact_weight)
    rewards = found.share + args.exact_weight * found.exact
    assert found.rewards.tolist() == pytest.approx(rewards.tolist())
    return found, [round(share, 6) for share in found.share.tolist()], reward_model


# --------------------------------------------------------------------------------------------------
# Eq. 3


@pytest.mark.parametrize("module", [duels, exact_match])
def test_doctests(module):
    assert doctest.testmod(module).failed == 0


def test_a_known_order_is_found(serve):
    """8 answers, each worth its number: Score is the number, and 8 x 7 calls are made."""
    server = serve(the_larger_wins)
    found, share, reward_model = score(EIGHT, "--judge_url", server.url)
    assert [7 * x for x in share] == pytest.approx([number_in(text) for text in EIGHT], abs=1e-5)
    assert len(server.asked) == reward_model.counts["calls"] == 56
    assert found.spread == pytest.approx(torch.arange(8.0).std(unbiased=False).item() / 7)
    # "answer 3" is right, and larger than three of the seven others
    assert sorted(found.judge_right) == [0.0] * 4 + [1.0] * 3


@pytest.mark.parametrize(("pairs", "calls"), [("ring", 16), (2, 32), (100, 56)])
def test_fewer_duels_give_nearly_the_same_order(serve, pairs, calls):
    server = serve(the_larger_wins)
    found, _, _ = score(EIGHT, "--judge_url", server.url, "--pairs", pairs)
    numbers = torch.tensor([number_in(text) for text in EIGHT])
    correlation = duels.rank_correlation(found.share, numbers)
    assert len(server.asked) == calls
    assert found.ring_rank is None
    assert correlation == 1 if calls == 56 else 0.5 < correlation < 1


def test_all_duels_tell_what_a_ring_would_have_given():
    found, _, _ = score(EIGHT, "--judge", "random")
    ring, _, _ = score(EIGHT, "--judge", "random", "--pairs", "ring")
    assert found.ring_rank == duels.rank_correlation(ring.share, found.share)


def test_calls_with_the_same_first_answer_are_neighbours(serve):
    """The server keeps the prefix of images, question and first answer in its cache."""
    server = serve(always_1)
    score(EIGHT, "--judge_url", server.url, "--judge_concurrency", 1)
    firsts = [first for first, _ in server.asked]
    assert [first for first, _ in itertools.groupby(firsts)] == EIGHT


@pytest.mark.parametrize(
    ("kind", "reply"),
    [("reason", verdict(1)), ("reason", verdict(2)), ("token", {"1": -0.1, "2": -2.5})],
)
def test_a_reward_model_that_sees_only_places_teaches_nothing(serve, kind, reply):
    url = serve(lambda first, second: reply).url
    found, share, _ = score(EIGHT, "--judge_url", url, "--verdict", kind)
    assert share == [0.5] * 8
    assert found.flat == 1
    assert found.spread < 1e-9


def test_a_leaning_to_the_first_place_cancels(serve):
    def leaning(lean):
        def reply(first, second):
            p = 0.5 + 0.025 * (number_in(first) - number_in(second)) + lean
            return {"2": math.log(1 - p), " 1": math.log(p)}

        url = serve(reply).url
        return score(EIGHT, "--verdict", "token", "--judge_url", url)[1]

    upright = leaning(0.0)
    for lean in (0.2, -0.1):
        assert leaning(lean) == pytest.approx(upright, abs=1e-6)
    assert sorted(EIGHT, key=lambda text: upright[EIGHT.index(text)]) == sorted(EIGHT)


def test_equal_answers_are_one_answer(serve):
    server = serve(lambda first, second: verdict(1 if first == "x" else 2))
    texts = ["x", "y", "x", " x ", "y", "x", "x", "x"]
    found, share, _ = score(texts, "--judge_url", server.url)
    # x meets five other x (1/2 each) and two y (1 each); y meets six x (0) and a y (1/2)
    x, y = 4.5 / 7, 0.5 / 7
    assert share == pytest.approx([x, y, x, x, y, x, x, x], abs=1e-6)
    assert len(server.asked) == 2
    assert found.distinct == 2
    found, share, _ = score(["x"] * 8, "--judge_url", server.url)
    assert share == [0.5] * 8
    assert found.flat == 1
    assert len(server.asked) == 2


def test_a_duel_is_asked_once(serve):
    server = serve(lambda first, second: verdict(1 if first == "x" else 2))
    _, share, reward_model = score(["x", "y"], "--judge_url", server.url)
    another_truth = Duel("Which?", (), "x", "y", "z")
    reward_model.submit([another_truth] * 3).result()
    assert share == [1, 0]
    assert reward_model.counts["calls"] == 3
    assert reward_model.counts["cached"] == 2


def test_no_verdict_is_a_draw_and_an_unfinished_answer_loses_without_a_call(serve):
    def reply(first, second):
        if "odd" in (first, second):
            return "I like both."
        return verdict(1 if first == "good" else 2)

    server = serve(reply)
    texts = ["good", "bad", "odd", "  ", "long", "bad"]
    finishes = ["stop", "stop", "stop", "stop", "length", "stop"]
    found, share, model = score(texts, "--judge_url", server.url, finishes=finishes)
    assert len(server.asked) == 6
    assert {answer for asked in server.asked for answer in asked} == {"good", "bad", "odd"}
    # good beats two bad and two unfinished, and draws with odd; bad draws with bad and odd, and
    # beats two; odd draws with three, and beats two; an unfinished one draws with the other
    assert [round(5 * x, 4) for x in share] == [4.5, 3, 3.5, 0.5, 0.5, 3]
    assert found.no_verdict == model.counts["unparsable"] == 4


def test_a_coin_as_the_reward_model():
    _, share, model = score(EIGHT, "--judge", "random")
    assert len(set(share)) > 2
    assert model.counts["calls"] == 0
    assert score(EIGHT, "--judge", "random")[1] == share
    found, _, _ = score(EIGHT, "--judge", "random", "--exact_weight", 0.5)
    assert found.exact.tolist() == [1, 0, 0, 0, 0, 0, 0, 0]


def test_the_ground_truth_as_the_reward_model():
    found, share, _ = score(EIGHT, "--judge", "exact")
    assert share == pytest.approx([1.0] + [3 / 7] * 7, abs=1e-6)
    assert found.judge_right == [1.0] * 7
    _, share, _ = score(EIGHT, "--judge", "exact", "--judge_noise", 1)
    assert share == pytest.approx([0.0] + [4 / 7] * 7, abs=1e-6)


@pytest.mark.parametrize("kind", ["reason", "token"])
def test_a_dead_reward_model_gives_no_reward(kind):
    words = ["--judge_url", "http://127.0.0.1:9/v1", "--judge_patience", 1, "--verdict", kind]
    with pytest.raises(JudgeDead, match="no reply for 1 s"):
        score(EIGHT, *words)


def test_a_server_without_log_probabilities_is_named_as_such(serve):
    words = ["--judge_url", serve(always_1).url, "--judge_patience", 1]
    with pytest.raises(InputError, match="an easy question: the reply has no log-probabilities"):
        score(EIGHT[:2], *words, "--verdict", "token")


@pytest.mark.parametrize(
    ("likeliest", "p"),
    [
        ({"1": math.log(0.6), "2": math.log(0.2)}, 0.75),
        ({" 1": math.log(0.1), "1": math.log(0.6), "2": math.log(0.2)}, 0.75),
        ({"1": math.log(0.6)}, 1.0),
        ({"1": math.log(0.4)}, math.nan),  # of 2 nothing is known
        ({"x": math.log(0.9)}, math.nan),
    ],
)
def test_the_probability_of_the_forced_token(serve, likeliest, p):
    url = serve(lambda first, second: likeliest).url
    args = args_of("--judge_url", url, "--verdict", "token")
    (found,) = (
        downstream_grpo.RewardModel(args).submit([Duel("Which?", (), "x", "y", "z")]).result()
    )
    assert found == pytest.approx(p, nan_ok=True)


@pytest.mark.parametrize("value", ["0", "some"])
def test_pairs_is_all_ring_or_a_number(value, capsys):
    with pytest.raises(SystemExit):
        args_of("--pairs", value)
    assert "expected all, ring, or how far apart" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# Tasks


def read(out, name, path):
    return downstream_grpo.read_tasks([(name, path)], out)


def picture_of(task):
    return Path(task.images[0]).read_bytes()


@pytest.mark.slow
def test_every_format_gives_the_same_tasks(tasks, tmp_path):
    own = read(tmp_path, "tasks", tasks / "train.jsonl")
    half = len(own) // 2
    arxiv = read(tmp_path, "arXivQA", tasks / "ArxivQA")
    for task, same in zip(arxiv, own[:half], strict=True):
        assert f"\n{task.answer}. {same.answer}\n" in task.question
        assert task.question.startswith(same.question)
        assert picture_of(task) == picture_of(same)
    think = read(tmp_path, "ThinkLite-VL", tasks / "ThinkLite-VL-hard-11k")
    for task, same in zip(think, own[half:], strict=True):
        assert (task.question, task.answer) == (same.question, same.answer)
        assert picture_of(task) == picture_of(same)
    test = read(tmp_path, "tasks", tasks / "test.jsonl")
    vstar = read(tmp_path, "V*", tasks / "vstar_bench")
    for task, same in zip(vstar, test, strict=True):
        assert f"({task.answer}) {same.answer}" in task.question
        assert picture_of(task)
    named = [("tasks", tasks / "train.jsonl"), ("V*", tasks / "vstar_bench")]
    assert len(downstream_grpo.read_tasks(named, tmp_path)) == len(own) + len(vstar)


def test_rows_that_make_no_task_are_counted(tmp_path, capsys):
    row = {"id": 1, "question": "Q?", "options": ["A. x", "y"], "label": "B", "image": "a.png"}
    (tmp_path / "a.png").write_bytes(png())
    changes = [{}, {"label": "[A]"}, {"label": "y"}, {"label": "Both"}, {"label": "E"}]
    changes += [{"image": "none.png"}]
    write_rows(tmp_path / "arxivqa.jsonl", [row | change for change in changes])
    found = read(tmp_path, "arXivQA", tmp_path)
    assert [task.answer for task in found] == ["B", "A", "B"]
    assert "\nA. x\nB. y\n" in found[0].question
    assert "'arXivQA: no label': 2, 'arXivQA: missing image': 1" in capsys.readouterr().err


def test_bytes_of_an_image_become_a_file(tmp_path):
    path = downstream_grpo.image_file(png(), tmp_path)
    assert Path(path).read_bytes() == png()
    with pytest.raises(Dropped, match="unreadable image"):
        downstream_grpo.image_file(b"x", tmp_path)
    for image in (None, "https://example.org/1.png", str(tmp_path / "none.png")):
        with pytest.raises(Dropped, match="missing image"):
            downstream_grpo.image_file(image, tmp_path)


def test_a_task_without_an_answer_is_an_error(tmp_path):
    write_rows(tmp_path / "own.jsonl", [{"question": "Q?"}])
    with pytest.raises(ValueError, match=r"line 1.*answer"):
        read(tmp_path, "tasks", tmp_path / "own.jsonl")


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("B", "B", 1),
        ("(b)", "B", 1),
        ("B. two", "B", 1),
        ("Because", "B", 0),
        ("A red one", "A", 0),
        ("<answer>C</answer> so <answer> B </answer>", "B", 1),
        ("Thus \\boxed{12}.", "12", 1),
        ("12.0", "12", 1),
        ("12", "12.5", 0),
        ("top  left", "top left", 0),
        ("Top left.", "top left", 1),
        ("nan", "nan", 1),
        ("", "red", 0),
        ("<answer>" * 200_000 + "B", "B", 0),  # a search from each of them would take hours
        ("<answer>B</answer>" + "<answer>" * 200_000, "B", 1),
        ("<answer>C</answer><answer> \\boxed{B}", "B", 1),
    ],
)
def test_exact_match(text, answer, right):
    assert exact_match.exact(text, answer) == right


@pytest.mark.parametrize(
    ("text", "finish", "answer"),
    [(" red ", "stop", "red"), ("red", "length", None), ("  ", "stop", None)],
)
def test_only_a_finished_answer_is_compared(text, finish, answer):
    (sample,) = samples_of([text], [finish])
    assert finished_answer(sample) == answer


# --------------------------------------------------------------------------------------------------
# Whole runs

FLAGS = [
    *("--engine", "hf", "--chunk", 1, "--samples", 4, "--rollout_batch", 6, "--train_batch", 12),
    *("--max_new_tokens", 8, "--context", 512, "--lr", 1e-3, "--judge_retries", 1, "--zero", 2),
]


def run(tasks, *words, out, **options):
    """What downstream_grpo.py prints."""
    data = ["--model", WEAK, "--data", tasks / "train.jsonl"]
    return stages.run("downstream_grpo", *data, *FLAGS, *words, out=out, **options)


@pytest.mark.slow
def test_a_run_killed_and_resumed_is_the_unbroken_one(tasks, serve, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    words = ["--judge_url", serve(the_longer_wins).url, "--steps", 5, "--save_every", 2]
    words += ["--eval_data", tasks / "test.jsonl", "--eval_n", 8, "--eval_every", 5]
    run(tasks, *words, out=whole)
    run(tasks, *words, out=broken, kill_after_step=3)
    assert not (broken / "model.safetensors").exists()
    run(tasks, *words, out=broken)
    rows = stages.steps_of(whole)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert stages.steps_of(broken) == rows
    for name in ("rollouts-0.jsonl", "model.safetensors"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), name
    card = (broken / "README.md").read_text()
    assert KINDS["policy"][0] in card and "| `eval_win` | 0.5 |" in card
    assert rows[0]["eval_win"] == 0.5
    assert rows[-1]["eval_n"] == 8
    for row in rows[1:]:
        assert row["duels"] <= 6 * 4 * 3
        assert row["no_verdict"] == 0
    check_that_longer_answers_earn_more(read_rows(whole / "rollouts-0.jsonl"))


def check_that_longer_answers_earn_more(rollouts):
    for start in range(0, len(rollouts), 4):  # the answers to a prompt
        group = rollouts[start : start + 4]
        group.sort(key=lambda row: (len(row["text"].strip()), row["text"].strip()))
        rewards = [row["reward"] for row in group]
        assert rewards == sorted(rewards)


@pytest.mark.slow
def test_two_ranks_take_the_same_steps_as_one(tasks, serve, tmp_path):
    words = ["--judge_url", serve(the_longer_wins).url, "--steps", 2]
    run(tasks, *words, "--zero", 0, out=tmp_path / "one")
    run(tasks, *words, "--micro_tokens", 300, ranks=2, out=tmp_path / "two")
    one, two = stages.steps_of(tmp_path / "one"), stages.steps_of(tmp_path / "two")
    assert len(one) == 2
    assert one[0]["grad_norm"] > 1e-3
    assert one[0]["spread"] > 0.05
    keys = ["reward", "exact", "spread", "flat", "distinct", "duels", "judge_right", "ring_rank"]
    keys += ["loss", "grad_norm", "ratio_max", "entropy", "length"]
    for expected, found in zip(one, two):
        for key in keys:
            assert found[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-5), key


@pytest.mark.slow
def test_the_policy_learns_what_wins_and_a_dead_reward_model_stops_it(tasks, serve, tmp_path):
    """The reward model likes one answer above all. Its share grows in a few steps."""
    server = serve(lambda first, second: verdict(1 if first == "triangle" else 2))
    words = ["--judge_url", server.url, "--rollout_batch", 16, "--samples", 8, "--chunk", 8]
    words += ["--train_batch", 128, "--lr", 2e-3, "--save_every", 8]
    words += ["--eval_data", tasks / "test.jsonl", "--eval_every", 8]
    run(tasks, *words, "--steps", 8, out=tmp_path / "out")
    liked = [0] * 9
    for row in read_rows(tmp_path / "out" / "rollouts-0.jsonl"):
        liked[row["step"]] += row["text"] == "triangle"
    assert liked[8] / 128 > liked[1] / 128 + 0.1, liked
    assert stages.steps_of(tmp_path / "out")[-1]["eval_win"] > 0.5
    server.close()
    words += ["--steps", 1, "--eval_n", 1, "--judge_patience", 1]
    printed = run(tasks, *words, out=tmp_path / "dead", fails=True)
    assert f"downstream_grpo.py: {server.url}: no reply for 1 s" in printed
    assert not (tmp_path / "dead" / "checkpoints").exists()  # it did not begin


@pytest.mark.slow
def test_a_reward_model_that_dies_in_the_held_out_figures_costs_no_step(tasks, serve, tmp_path):
    out = tmp_path / "out"
    rollouts = out / "rollouts-0.jsonl"  # a step's are written before its held-out figures
    dead = []

    def dies_after_step_2(first, second):
        if not dead and rollouts.exists() and '"step": 2,' in rollouts.read_text():
            raise ConnectionError
        return the_longer_wins(first, second)

    words = ["--judge_url", serve(dies_after_step_2).url, "--judge_patience", 1, "--steps", 3]
    words += ["--eval_data", tasks / "test.jsonl", "--eval_n", 8, "--eval_every", 2, "--lr", 1e-2]
    printed = run(tasks, *words, out=out, fails=True)
    assert "downstream_grpo.py: stopped, with a checkpoint: http" in printed
    assert os.listdir(out / "checkpoints") == ["step-000002"]
    assert [row["step"] for row in stages.steps_of(out)] == [0, 1, 2]
    assert "eval_win" not in stages.steps_of(out)[-1]
    dead.append("no more")
    run(tasks, *words, out=out)
    assert [row["step"] for row in stages.steps_of(out)] == [0, 1, 2, 3]
    assert stages.steps_of(out)[-1]["eval_n"] == 8


# --------------------------------------------------------------------------------------------------
# A real server


def teach_to_answer(policy, processor, tasks, steps=30):
    """Without it neither digit is among the 20 likeliest tokens that a server lists."""
    rng = random.Random(0)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    for _ in range(steps):
        samples = []
        for task in rng.sample(tasks, 4):
            pair = Pair("", "", task.question, task.images, None, ["red", "blue"], 1)
            text = f"{downstream_grpo.EMPTY_THOUGHT}{rng.choice((1, 2))}</answer>"
            samples.append(encode(processor, judging_turns(pair), text))
        logps, _ = token_logps(policy, collate(samples, processor.tokenizer.pad_token_id))
        optimizer.zero_grad()
        (-logps.sum(1).mean()).backward()
        optimizer.step()


@torch.no_grad()
def probability_of_1(policy, processor, duel):
    """As transformers computes it."""
    answers = [duel.first, duel.second]
    pair = Pair("", "", duel.question, list(duel.images), None, answers, 1)
    sample = encode(processor, judging_turns(pair))
    tokenizer = processor.tokenizer
    sample.response_ids = tokenizer(downstream_grpo.EMPTY_THOUGHT)["input_ids"]
    batch = collate([sample], tokenizer.pad_token_id)
    inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    digits = tokenizer.convert_tokens_to_ids(["1", "2"])
    logits = policy.model(**inputs).logits[0, -1, digits]
    return logits.softmax(0)[0].item()


def prefix_cache(url, what):
    with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics") as page:
        text = page.read().decode()
    line = re.search(rf"^vllm:prefix_cache_{what}_total{{.*}} (\S+)$", text, re.MULTILINE)
    return float(line[1])


@pytest.mark.slow
def test_the_forced_token_of_a_real_server_is_that_of_transformers(tasks, tmp_path):
    """With pictures; and what calls have in common is computed once."""
    policy, processor = load_policy(WEAK, dtype=torch.float32), load_processor(WEAK)
    some = downstream_grpo.read_tasks([("tasks", tasks / "train.jsonl")], tmp_path)[:4]
    teach_to_answer(policy, processor, some)
    save_policy(policy, processor, tmp_path / "model")
    policy.eval()
    asked = []
    for task in some:
        for first in ("red", "a square", "two"):
            for second in ("red", "a square", "two"):
                if first != second:
                    asked.append(duels.duel(task, first, second))
    expected = [probability_of_1(policy, processor, duel) for duel in asked]
    words = ["--max-model-len", "1024"]
    with vllm_server(tmp_path / "model", tmp_path / "server.log", "judge", *words) as url:
        server = ["--judge_url", url, "--judge_model", "judge", "--judge_patience", 30]
        reward_model = downstream_grpo.RewardModel(args_of("--verdict", "token", *server))
        assert reward_model.submit(asked).result() == pytest.approx(expected, abs=1e-4)
        # images, instructions, question and first answer; a third of the calls begin anew
        assert prefix_cache(url, "hits") > 0.5 * prefix_cache(url, "queries")
        reward_model = downstream_grpo.RewardModel(args_of("--judge_tokens", 60, *server))
        for p in reward_model.submit(asked[:6]).result():
            assert math.isnan(p) or p in (0.0, 1.0)
