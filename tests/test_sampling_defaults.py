"""
How a server samples is said by the request: every stage states it, --request changes it, a server
that does not know a field is asked without it, and one that ignores it is told of.
"""

import asyncio
import contextlib
import dataclasses
import json
import re
from collections import deque

import pytest
from conftest import completion, http_server, send, write_rows
from evaluation import args_of, judged, make_row, says, score
from test_endpoint import ask_all

import annotate
import downstream_grpo
import evaluate
import judge
from core.duels import Duel
from core.endpoint import PLAIN_SAMPLING, Endpoint, NoReply
from core.files import InputError
from core.judgements import Protocol
from core.judging import warn_of_equal_samples
from viewer.report import results_table

ALL = set(PLAIN_SAMPLING)
JUDGEMENT = "<think>Response 1 is better.</think><answer>1</answer>"


@contextlib.contextmanager
def recording(unknown=(), text="yes"):
    """(URL of a server that refuses these fields, the requests that it gets)."""
    requests = []

    def respond(handler, request):
        requests.append(request)
        for name in unknown:
            if name in request:
                said = "x" * 400 + f" body -> {name}: Extra inputs are not permitted"
                send(handler, {"error": {"message": said}}, 400)
                return
        send(handler, completion(text))

    with http_server(respond) as url:
        yield url, requests


def stated(request):
    return {name: request[name] for name in ALL & set(request)}


# --- the client


def test_a_request_states_how_to_sample():
    with recording() as (url, requests):
        ask_all(Endpoint(url), 1, temperature=0.7)
    assert stated(requests[0]) == {
        "top_p": 1,
        "top_k": -1,  # off; a 0, which vLLM takes too, is refused by SGLang
        "min_p": 0,
        "repetition_penalty": 1,
    }
    assert requests[0]["temperature"] == 0.7


def test_openais_own_server_gets_no_field_that_it_does_not_know(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789")
    assert Endpoint("https://api.openai.com/v1").sampling == {}
    assert Endpoint("https://api.openai.com.example.org/v1").sampling == PLAIN_SAMPLING


def test_the_fields_of_a_call_win_and_the_users_win_over_them():
    with recording() as (url, requests):
        user = {"top_p": 0.9, "min_p": None, "max_tokens": None, "seed": 1}
        ask_all(Endpoint(url, request=user), 1, top_k=5, top_p=0.5, max_tokens=8)
    assert stated(requests[0]) == {"top_p": 0.9, "top_k": 5, "repetition_penalty": 1}
    assert requests[0]["seed"] == 1 and "max_tokens" not in requests[0]


def test_a_field_that_a_server_does_not_know_is_left_out_and_told_once(capsys):
    with recording(unknown=("top_k", "min_p")) as (url, requests):
        endpoint = Endpoint(url)
        replies = ask_all(endpoint, 20)
        assert [reply.text for reply in replies] == ["yes"] * 20
        assert set(endpoint.sampling) == {"top_p", "repetition_penalty"}
        assert set(stated(requests[-1])) == {"top_p", "repetition_penalty"}
    told = capsys.readouterr().out
    for name in ("top_k", "min_p"):
        assert told.count(f"{url} refuses the field {name}, which is left out from now on") == 1
    assert told.count("a default that the server has for it changes its samples") == 2


def test_a_field_that_the_user_adds_is_not_left_out():
    with recording(unknown=("top_k",)) as (url, requests):
        (failure,) = ask_all(Endpoint(url, request={"top_k": 5}), 1)
    assert isinstance(failure, NoReply) and failure.refused and len(requests) == 1


def test_a_field_that_was_taken_before_is_not_why_a_request_is_refused():
    """A refusal may quote the whole request."""

    def respond(handler, request):
        if request.get("too_long"):
            send(handler, {"error": {"message": f"too long: {json.dumps(request)}"}}, 400)
        else:
            send(handler, completion("yes"))

    async def ask(endpoint):
        turns = [{"role": "user", "content": "Q"}]
        await endpoint.ask("m", turns)
        await endpoint.ask("m", turns, too_long=True)

    with http_server(respond) as url:
        endpoint = Endpoint(url)
        with pytest.raises(NoReply, match="too long"):
            asyncio.run(ask(endpoint))
    assert endpoint.sampling == PLAIN_SAMPLING


# --- the stages


def annotate_with(url, tmp_path, *words):
    row = {"prompt": "Q", "chosen": "good", "rejected": "bad"}
    path = write_rows(tmp_path / "pairs.jsonl", [row])
    words = ["--base_url", url, "--retries", "0", *words]
    annotate.main(["--data", f"pairs={path}", "--out", str(tmp_path / "out"), *words])


def judge_with(url, tmp_path, *words):
    args = judge.parser().parse_args(["--data", "-", "--judge_url", url, *words])
    judge.ConsistencyJudge(args).consistency([JUDGEMENT])


def compare_answers_with(url, tmp_path, *words):
    words = ["--data", "V*=x", "--judge_url", url, *words]
    reward_model = downstream_grpo.RewardModel(downstream_grpo.parser().parse_args(words))
    reward_model.submit([Duel("Which?", (), "x", "y", "z")]).result()


def evaluate_with(url, tmp_path, *words):
    args = args_of("--base_url", url, "--samples", 2, *words)
    jobs = list(evaluate.protocol_of(args).next_jobs(make_row(0), {}))
    assert len(list(evaluate.make_backend(args).answer(deque(jobs)))) == 2


STAGES = [
    (annotate_with, "--request"),
    (judge_with, "--judge_request"),
    (compare_answers_with, "--judge_request"),
    (evaluate_with, "--request"),
]


@pytest.mark.parametrize("ask, flag", STAGES)
def test_every_stage_states_how_to_sample_and_takes_more_fields(ask, flag, tmp_path):
    for words, expected in (
        ((), PLAIN_SAMPLING),
        ((flag, '{"top_p": 0.9, "min_p": null}'), PLAIN_SAMPLING | {"top_p": 0.9}),
    ):
        folder = tmp_path / str(len(words))
        folder.mkdir()
        with recording(text=JUDGEMENT) as (url, requests):
            ask(url, folder, *words)
        assert requests
        if words:
            expected = {name: expected[name] for name in ALL - {"min_p"}}
        assert all(stated(request) == expected for request in requests)
        assert all("temperature" in request for request in requests)


def test_a_judgement_depends_on_the_fields_of_its_request(tmp_path):
    def check(*words):
        args = args_of("--base_url", "http://127.0.0.1:9/v1", "--out", tmp_path, *words)
        evaluate.check_or_write_config(args, {"pairs": rows}, done)

    rows, done = [make_row(0)], {}
    check()
    done = judged(rows, Protocol("both", samples=2), lambda *_: says(1))
    check()
    with pytest.raises(InputError, match=re.escape("request was {}, is now {'top_k': 5}")):
        check("--request", '{"top_k": 5}')
    with pytest.raises(InputError, match="--request is for a server"):
        args_of("--request", '{"top_k": 5}')


def test_answers_of_the_judge_depend_on_the_fields_of_its_request(tmp_path, stand_in):
    data = write_rows(tmp_path / "data.jsonl", [{"text": JUDGEMENT}])

    def run(*words):
        words = ["--data", str(data), "--judge_url", it.url, *words]
        args = judge.parser().parse_args(words)
        with judge.answers_kept(judge.ConsistencyJudge(args), tmp_path / "journal"):
            pass

    it = stand_in()
    run()
    run()
    with pytest.raises(InputError, match="judge_request was None, is now"):
        run("--judge_request", '{"top_k": 5}')


# --- a server that ignores it


def samples_of(rows, different):
    """Sixteen samples a row; of the first `different` rows they are different texts."""

    def rule(row, order, sample):
        text = f"<think>{sample if row.row < different else 0}</think><answer>1</answer>"
        return says(1) | {"text": text}

    return judged(rows, Protocol("both", samples=16), rule)


@pytest.mark.parametrize("different, warns", [(0, True), (1, True), (2, False), (12, False)])
def test_samples_that_are_all_the_same_are_told(different, warns):
    rows = [make_row(i) for i in range(12)]
    done = samples_of(rows, different)
    args = args_of("--base_url", "http://127.0.0.1:9/v1")
    notes = warn_of_equal_samples(rows, done, args)
    assert len(notes) == warns
    if warns:
        assert f"in {24 - 2 * different} of 24 cells" in notes[0]
        assert "seems to ignore the sampling settings" in notes[0]
        protocol = Protocol("both", samples=16)
        result = {"check": notes, "left_out": []} | score(rows, protocol, lambda *_: says(1))
        assert notes[0] in results_table({"args": vars(args), "benches": {"pairs": result}})


def test_equal_samples_are_no_news_where_nothing_is_sampled_or_nothing_is_compared():
    rows = [make_row(i) for i in range(12)]
    done = samples_of(rows, 0)
    server = ("--base_url", "http://127.0.0.1:9/v1")
    assert warn_of_equal_samples(rows, done, args_of()) == []  # no server
    assert warn_of_equal_samples(rows, done, args_of(*server, "--temperature", 0)) == []
    single = {key: judgement for key, judgement in done.items() if judgement.sample == 0}
    assert warn_of_equal_samples(rows, single, args_of(*server)) == []
    others = [dataclasses.replace(row, bench="other") for row in rows]
    assert warn_of_equal_samples(others, done, args_of(*server)) == []
