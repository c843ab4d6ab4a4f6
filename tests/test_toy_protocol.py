"""
The protocol and the faults of the stand-in (toy/server.py), seen from a socket and by the OpenAI
client; its command line.
"""

import asyncio
import collections
import contextlib
import json
import random
import re
import signal
import socket
import subprocess
import sys

import pytest
from conftest import ROOT, annotator
from stand_in_client import (
    CHAT,
    ask,
    ask_judge,
    both_orders,
    connection,
    get,
    image_part,
    items,
    plug,
    plug_and_ask,
    post,
    post_all,
    requests_for,
    say,
    texts,
    wait_until,
    write_key,
)

from stable_reinforce import parse, parse_consistency
from toy import server


@pytest.fixture(scope="module")
def key(tmp_path_factory):
    return write_key(tmp_path_factory.mktemp("key") / "key.jsonl", items())


@pytest.fixture(scope="module")
def running(key):
    with annotator("--key", key) as it:
        yield it


# --------------------------------------------------------------------------------------------------
# The OpenAI client


def openai_client(it, **options):
    import openai

    options = {"max_retries": 0} | options
    return openai.OpenAI(base_url=it.url, api_key="-", **options)


def test_the_openai_client_works_with_it(running):
    with openai_client(running) as client:
        assert [model.id for model in client.models.list()] == [server.NAME]
        request = ask(items()[0], seed=3, temperature=1.0, max_tokens=500)
        completion = client.chat.completions.create(**request)
    (choice,) = completion.choices
    assert parse(choice.message.content).well_formed
    assert choice.finish_reason == "stop"
    assert completion.model == "any"
    text = request["messages"][1]["content"][-1]["text"]
    assert completion.usage.prompt_tokens == len(text.split())
    assert completion.usage.completion_tokens == len(choice.message.content.split())


def test_a_reply_is_cut_off_at_the_limit(running):
    full = say(running, ask(items()[0], seed=3))
    with openai_client(running) as client:
        request = ask(items()[0], seed=3, max_completion_tokens=4)
        completion = client.chat.completions.create(**request)
    (choice,) = completion.choices
    assert choice.message.content.split() == full.split()[:4]
    assert choice.finish_reason == "length"
    assert completion.usage.completion_tokens == 4


@pytest.mark.parametrize(
    "fault, error",
    [
        ("429", "RateLimitError"),
        ("500", "InternalServerError"),
        ("reset", "APIConnectionError"),
        ("hang", "APITimeoutError"),
    ],
)
def test_a_fault_is_the_error_that_the_openai_client_knows(fault, error):
    import openai

    with annotator(f"--p_{fault}", 1) as it:
        raises = pytest.raises(getattr(openai, error))
        with openai_client(it, timeout=0.2) as client, raises:
            client.chat.completions.create(**ask(items()[0]))
        assert it.stats["faults"][fault] == 1


def test_the_openai_client_gets_through_by_retrying(key, running):
    import openai

    requests = [ask(item, seed=0) for item in items()[:40]]

    async def all_at_once(url):
        async with openai.AsyncOpenAI(base_url=url, api_key="-", max_retries=20) as client:
            create = client.chat.completions.create
            return await asyncio.gather(*(create(**request) for request in requests))

    with annotator("--key", key, "--p_429_after", 0.4, "--retry_after", 0.02) as it:
        completions = asyncio.run(all_at_once(it.url))
        replies = [completion.choices[0].message.content for completion in completions]
        assert replies == texts(running, requests)
        assert it.stats["answered"] == 40
        assert it.stats["requests"] == 40 + it.stats["faults"]["429_after"]


# --------------------------------------------------------------------------------------------------
# What it refuses

USER = {"role": "user", "content": "Hello"}
PICTURE, TEXT = image_part(b"any bytes"), {"type": "text", "text": "Hello"}


def picture_at(url):
    return {"type": "image_url", "image_url": {"url": url}}


def with_content(content):
    return {"messages": [USER | {"content": content}]}


@pytest.mark.parametrize(
    "body, message",
    [
        (b"{", "not JSON"),
        (b"\xff\xfe\xff", "not JSON"),
        (b"", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        ([], "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [USER]}, "JUDGING_PROMPT"),
        ({"messages": []}, "neither a string"),
        ({"messages": [{"role": "user"}]}, "neither a string"),
        (with_content([]), "neither a string"),
        (with_content("\ud800"), "neither a string"),
        (with_content([PICTURE]), "only text part"),
        (with_content([TEXT, PICTURE]), "only text part"),
        (with_content([TEXT, TEXT]), "only text part"),
        (with_content([picture_at("http://a/b.png"), TEXT]), "nothing is fetched"),
        (with_content([picture_at("http://a;base64,aGk="), TEXT]), "nothing is fetched"),
        (with_content([picture_at("data:image/png;base64,?"), TEXT]), "base64"),
        ({"messages": [USER], "n": 2}, "n is 2"),
        ({"messages": [USER], "stream": True}, "stream is true"),
        ({"messages": [USER], "logprobs": True}, "logprobs is true"),
        ({"messages": [USER], "top_logprobs": 5}, "top_logprobs is 5"),
        ({"messages": [USER], "max_tokens": 0}, "max_tokens is 0"),
        ({"messages": [USER], "seed": "1"}, 'seed is "1"'),
        ({"messages": [USER], "seed": True}, "seed is true"),
        ({"messages": [USER], "max_completion_tokens": 1.5}, "is 1.5; expected an integer"),
    ],
)
def test_a_request_that_it_does_not_understand_gets_a_reason(running, body, message):
    before = running.stats
    response, answer = post(running, body)
    error = json.loads(answer)["error"]
    assert response.status == 400
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    counted = {"requests": before["requests"] + 1, "bad": before["bad"] + 1}
    assert running.stats == before | counted


def test_pages_and_paths(running):
    assert get(running, "/health")[0] == get(running, "/v1/models")[0] == 200
    assert get(running, "/stats") == (200, running.stats)
    assert get(running, "/nowhere")[0] == 404
    assert post(running, b"", "/v1/completions")[0].status == 404


def test_it_listens_on_this_machine_only(running):
    assert running.socket.getsockname()[0] == "127.0.0.1"


def test_a_body_that_is_too_long_is_refused_and_the_connection_lives(running):
    with connection(running) as line:
        line.request("POST", CHAT, bytes(server.MAX_BODY + 1))
        response = line.getresponse()
        assert response.status == 413
        assert str(server.MAX_BODY) in json.loads(response.read())["error"]["message"]
        line.request("GET", "/health")
        assert line.getresponse().status == 200


@pytest.mark.parametrize(
    "head",
    [
        b"nonsense",
        b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: -1",
        b"POST /v1/chat/completions HTTP/1.1\r\nTransfer-Encoding: chunked",
        b"GET / FTP/9\r\n",
    ],
)
def test_what_is_not_http_with_a_length_is_refused(running, head):
    with plug(running) as line:
        line.sendall(head + b"\r\n\r\n")
        answer = line.makefile("rb").read()  # to the end: it also hangs up
        assert answer.startswith(b"HTTP/1.1 400 ")
    assert get(running, "/health")[0] == 200


def test_a_head_without_an_end_is_hung_up_on(running):
    with plug(running) as line:
        line.sendall(b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert line.recv(1) == b""
    assert get(running, "/health")[0] == 200


# --------------------------------------------------------------------------------------------------
# The faults


def answer_with(fault):
    """The response to a request that meets a fault, and its body."""
    with annotator(f"--p_{fault}", 1, "--retry_after", 7) as it:
        response, body = post(it, ask(items()[0]))
        stats = it.stats
    assert stats["faults"] == dict.fromkeys(server.FAULTS, 0) | {fault: 1}
    assert stats["requests"] == 1
    assert stats["answered"] == (1 if fault == "refusal" else 0)
    assert response.getheader("Retry-After") == ("7" if fault == "429_after" else None)
    return response, body


@pytest.mark.parametrize("fault, status", [("429", 429), ("429_after", 429), ("500", 500)])
def test_a_status_comes_with_a_message(fault, status):
    response, body = answer_with(fault)
    assert response.status == status
    assert "planted fault" in json.loads(body)["error"]["message"]


def test_html_is_html():
    response, body = answer_with("html")
    assert response.status == 200
    assert response.getheader("Content-Type") == "text/html"
    assert b"<html>" in body


def test_empty_has_no_choices():
    response, body = answer_with("empty")
    assert response.status == 200
    assert json.loads(body)["choices"] == []


def test_truncated_is_half_a_body_as_long_as_it_says():
    response, body = answer_with("truncated")
    assert response.status == 200
    assert response.getheader("Content-Type") == "application/json"
    assert len(body) == int(response.getheader("Content-Length"))
    with pytest.raises(json.JSONDecodeError):
        json.loads(body)


def test_a_refusal_is_a_reply_without_a_verdict():
    response, body = answer_with("refusal")
    (choice,) = json.loads(body)["choices"]
    assert response.status == 200
    assert parse(choice["message"]["content"]).choice is None
    assert choice["finish_reason"] == "stop"


def test_a_refusal_is_an_attempt(key):
    item = items()[0]
    with annotator("--key", key, "--p_refusal", 1) as it:
        assert {say(it, ask(item)) for _ in range(3)} == {server.REFUSAL}
        assert it.stats["attempt"] == {"0": 1, "1": 1, "2": 1}
        assert parse_consistency(say(it, ask_judge("Response 1 is better.", 1))) is None
        assert it.stats["faults"]["refusal"] == it.stats["answered"] == 4
        assert it.stats["right"] == it.stats["wrong"] == 0


def test_a_reset_is_a_reset():
    """At a socket: http.client calls an orderly close a ConnectionResetError, too."""
    with (
        annotator("--p_reset", 1) as it,
        plug_and_ask(it, ask(items()[0])) as line,
        pytest.raises(ConnectionResetError),
    ):
        line.recv(1)


def test_a_hang_hangs_and_then_ends():
    with annotator("--p_hang", 1, "--hang", 0.4) as it, plug_and_ask(it, ask(items()[0])) as line:
        line.settimeout(0.2)
        with pytest.raises(TimeoutError):
            line.recv(1)
        line.settimeout(20)
        assert line.recv(1) == b""


def test_close_waits_for_nobody_and_may_be_called_twice():
    with annotator("--p_hang", 1, "--hang", 1000) as it, plug_and_ask(it, ask(items()[0])):
        wait_until(lambda: it.stats["faults"]["hang"])
        it.close()
        assert not it.thread.is_alive()
        it.close()
    with pytest.raises(ConnectionRefusedError):
        plug(it)


def test_latency_is_drawn_around_its_mean(key, monkeypatch):
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    monkeypatch.setattr(server.asyncio, "sleep", sleep)
    with annotator("--key", key, "--latency", 100) as it:
        texts(it, [ask(item) for item in items()[:40]])
    assert len(set(waits)) == 40
    assert 50 <= min(waits) < 75 < 125 < max(waits) <= 150


def test_a_client_that_leaves_has_made_no_attempt(key):
    with annotator("--key", key, "--latency", 0.2) as it:
        plug_and_ask(it, ask(items()[100])).close()
        wait_until(lambda: it.stats["hung_up"])
        assert it.stats["answered"] == 0
        assert it.stats["attempt"] == {}


def test_latency_does_not_change_which_requests_fail(key):
    def statuses(*words):
        with annotator("--key", key, "--p_500", 0.5, *words) as it:
            return [status for status, _, _ in post_all(it, [ask(items()[0])] * 60, clients=1)]

    fast = statuses()
    assert set(fast) == {200, 500}
    assert statuses("--latency", 0.002) == fast


# --------------------------------------------------------------------------------------------------
# Everything at once


def kind_of(answer):
    """The name that the server's counters have for an outcome, from what the client saw alone."""
    if isinstance(answer, str):
        return {"reset": "reset", "closed": "hang"}[answer]
    status, headers, body = answer
    if status == 429 and "retry-after" in headers:
        return "429_after"
    if status != 200:
        return str(status)
    if headers["content-type"] == "text/html":
        return "html"
    try:
        choices = json.loads(body)["choices"]
    except json.JSONDecodeError:
        return "truncated"
    text = choices[0]["message"]["content"] if choices else ""
    named = {"": "empty", server.REFUSAL: "refusal", server.UNKNOWN: "unknown"}
    if text in ("yes", "no"):
        return text
    return named.get(text) or f"choice {parse(text).choice}"


FAULTY = {
    "429": 0.04,
    "429_after": 0.04,
    "500": 0.04,
    "reset": 0.03,
    "hang": 0.01,
    "html": 0.03,
    "empty": 0.03,
    "truncated": 0.03,
    "refusal": 0.03,
}


@pytest.mark.slow
def test_ten_thousand_requests_with_every_fault(key):
    """64 at a time. What the clients saw is what the server counted, and afterwards it answers."""
    flags = [f"--p_{fault}={share}" for fault, share in FAULTY.items()]
    requests = requests_for(both_orders(items())) * 7
    requests += [ask(items()[0] | {"question": "Why?"})] * 400
    requests += [ask_judge("Response 1 is better.", 1 + i % 2) for i in range(800)]
    requests += [{"messages": [USER]}] * 400
    random.Random(0).shuffle(requests)
    assert len(requests) == 10_000
    with annotator("--key", key, "--hang", 0.2, "--latency", 0.001, *flags) as it:
        seen = collections.Counter(map(kind_of, post_all(it, requests)))
        stats = it.stats
        assert get(it, "/health")[0] == 200
        assert get(it, "/stats")[1] == stats
    verdicts = seen["choice 1"] + seen["choice 2"]
    expected = stats["faults"] | stats["judge"]
    expected |= {"unknown": stats["unknown"], "400": stats["bad"]}
    expected |= {"choice 1": seen["choice 1"], "choice 2": seen["choice 2"]}
    assert dict(seen) == expected
    assert min(stats["faults"].values()) > 50
    assert stats["right"] + stats["wrong"] == sum(stats["manner"].values()) == verdicts
    faults = sum(stats["faults"].values()) - stats["faults"]["refusal"]
    assert stats["requests"] == stats["answered"] + stats["bad"] + faults == 10_000
    assert stats["hung_up"] == 0


# --------------------------------------------------------------------------------------------------
# The command


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_the_command_prints_its_address_and_ends_cleanly(key, stop):
    command = [sys.executable, "toy/server.py", "--key", str(key), "--port"]
    pipe = subprocess.PIPE
    process = subprocess.Popen([*command, "0"], cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
    try:
        line = process.stdout.readline()
        address = re.fullmatch(r"listening on http://127\.0\.0\.1:(\d+)/v1\n", line)
        with socket.create_connection(("127.0.0.1", int(address[1]))):  # stays open
            taken = subprocess.run([*command, address[1]], cwd=ROOT, capture_output=True, text=True)
            assert taken.returncode == 2
            assert "in use" in taken.stderr
            process.send_signal(stop)
            out, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert error == ""
    assert json.loads(out)["requests"] == 0


@pytest.mark.parametrize(
    "words, message",
    [
        (["--p_500", "1.5"], "expected a number from 0 to 1"),
        (["--p_reset", "nan"], "expected a number from 0 to 1"),
        (["--p_hang", "-0.1"], "expected a number from 0 to 1"),
        (["--right_easy", "2"], "expected a number from 0 to 1"),
        (["--latency", "-1"], "expected a number, 0 or more"),
        (["--hang", "inf"], "expected a number, 0 or more"),
        (["--manners", "hasty"], "expected name=share"),
        (["--manners", "hasty=.5,hasty=.5"], "expected name=share"),
        (["--manners", "hasty=1,hasty=1.0"], "expected name=share"),
        (["--manners", "hasty=.5"], "add up to 1"),
        (["--manners", "rude=1"], "of hasty, careful"),
        (["--manners", "hasty=x"], "expected name=share"),
        (["--manners", "hasty=-1,careful=2"], "expected name=share"),
    ],
)
def test_flags_out_of_range_are_refused(capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        server.parser().parse_args(words)
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_shares_of_faults_above_one_are_refused(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["server.py", "--p_500", "0.6", "--p_429", "0.6"])
    with pytest.raises(SystemExit) as stop:
        server.main()
    assert stop.value.code == 2
    assert "add up to 1.2; expected at most 1" in capsys.readouterr().err
