"""The client against servers that redirect, never end, drip, lie, or send back the key."""

import asyncio
import gzip
import json
import time

import pytest
from conftest import completion, http_server, send

from core import endpoint, flags
from core.endpoint import Endpoint, NoReply, parse_completion
from core.files import InputError

SECRET = "sk-very-secret-0123456789"


def ask(url, seconds=60, **options):
    """The reply, or what was raised instead, or None after so many seconds."""

    async def run():
        it = Endpoint(url, **options)
        async with it.client, asyncio.timeout(seconds):
            return await it.ask("m", [{"role": "user", "content": "Q"}])

    try:
        return asyncio.run(run())
    except (NoReply, InputError) as failure:
        return failure
    except TimeoutError:
        return None


# ------------------------------------------------------------------------------------------------
# Where a request goes, and how much comes back


def test_redirects_are_not_followed(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    arrived = []
    with http_server(lambda *_: arrived.append("elsewhere")) as elsewhere:

        def redirect(handler, _):
            send(handler, b"", 307, Location=f"{elsewhere}/chat/completions")

        with http_server(redirect) as url:
            failure = ask(url)
    assert arrived == []
    assert isinstance(failure, InputError)
    assert f"status 307, a redirect to '{elsewhere}" in str(failure)
    assert "give the final address in --base_url" in str(failure)


def test_a_reply_without_end_is_left_at_32_megabytes(monkeypatch):
    sent = []

    def without_end(handler, _):
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(b" " * 2**20)
            sent.append(1)

    with http_server(without_end) as url:
        failure = ask(url, retries=0)
    assert "larger than 32 MB" in failure.reason and not failure.refused
    assert len(sent) < 60


def test_a_compressed_reply_is_not_unpacked():
    """A few of its bytes can become gigabytes. It is not asked for."""
    asked = []

    def bomb(handler, _):
        asked.append(handler.headers["Accept-Encoding"])
        send(handler, gzip.compress(b" " * 2**26), Content_Encoding="gzip")

    with http_server(bomb) as url:
        failure = ask(url, retries=0)
    assert "the reply was compressed ('gzip')" in failure.reason
    assert asked == ["identity"]


# ------------------------------------------------------------------------------------------------
# Time


def drip(handler, _):
    """A byte now and then, for longer than any test waits."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(1000):
        handler.wfile.write(b" ")
        time.sleep(0.1)


def test_a_server_that_drips_is_asked_again_after_the_timeout():
    with http_server(drip) as url:
        failure = ask(url, timeout=1, retries=1)
    assert failure.reason == "no reply after 2 tries, the last failure: no reply within 1 s"


def test_what_is_waited_for_is_said_once(monkeypatch, capsys):
    monkeypatch.setattr(endpoint, "SILENCE", 0.3)
    with http_server(drip) as url:
        ask(url, timeout=1, retries=1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"waiting for {url}: no reply yet"
    assert lines[1].startswith(f"waiting for {url}: no reply within 1 s, again in ")
    assert len(lines) == 2


@pytest.mark.parametrize(("header", "seconds"), [("30", 30), ("1e9", 120)])
def test_retry_after_is_said_and_waited_for_up_to_two_minutes(capsys, header, seconds):
    asked = []

    def busy(handler, request):
        asked.append(request)
        send(handler, {"error": {"message": "slow down"}}, 429, Retry_After=header)

    with http_server(busy) as url:
        assert ask(url, seconds=2) is None
    assert len(asked) == 1
    printed = capsys.readouterr().out
    assert printed == f"waiting for {url}: status 429: 'slow down', again in {seconds} s\n"


# ------------------------------------------------------------------------------------------------
# Replies that are none

OPTION = {"token": "1", "logprob": -0.1}
LOGPROBS = {"content": [OPTION | {"top_logprobs": [OPTION]}]}


def with_option(**changes):
    top = [OPTION | changes]
    return completion("1", logprobs={"content": [OPTION | {"top_logprobs": top}]})


def with_usage(usage):
    return completion("1") | {"usage": usage}


NONE = {
    "deep": b"[" * 10**6,
    "a deep choice": b'{"choices": [' + b'{"a":' * 10**5,
    "usage is infinite": with_usage({"prompt_tokens": 10**400}),
    "usage is 1e999": json.dumps(with_usage({"prompt_tokens": 7})).replace("7", "1e999").encode(),
    "usage is negative": with_usage({"prompt_tokens": 3, "completion_tokens": -1}),
    "usage is text": with_usage({"prompt_tokens": "12"}),
    "usage is a list": with_usage([1]),
    "text is a list": completion([{"type": "text", "text": "1"}]),
    "text is an empty list": completion([]),
    "text is a number": completion(0),
    "text is half a surrogate pair": completion("\ud800"),
    "text is 10 MB": completion("x" * 10**7),
    "refusal is a number": completion(None, message={"content": None, "refusal": 7}),
    "finish is a list": completion("1", finish_reason=["stop"]),
    "no choices": {"choices": {}},
    "a log-probability is null": with_option(logprob=None),
    "a log-probability is NaN": with_option(logprob=float("nan")),
    "a log-probability is infinite": with_option(logprob=10**400),
    "a log-probability is of more than 1": with_option(logprob=800.0),
    "an alternative is null": with_option(token=None),
    "a token is a number": completion("1", logprobs={"content": [{"token": 1}]}),
    "log-probabilities are text": completion("1", logprobs="1"),
}


@pytest.mark.parametrize("name", NONE)
def test_what_is_no_reply_is_noticed(name):
    body = NONE[name] if isinstance(NONE[name], bytes) else json.dumps(NONE[name]).encode()
    assert parse_completion(body) is None


def test_a_reply_that_is_none_is_asked_for_again():
    bodies = [*NONE.values(), completion("yes", logprobs=LOGPROBS)]
    remaining = iter(bodies)
    with http_server(lambda handler, _: send(handler, next(remaining))) as url:
        it = Endpoint(url)

        async def run():
            while True:
                try:
                    return await it.ask_once("m", [])
                except NoReply as failure:
                    assert failure.reason.startswith("the reply was not a chat completion")
                    assert len(failure.reason) < 300

        reply = asyncio.run(run())
    assert (reply.text, reply.tokens, reply.top_logprobs) == ("yes", ["1"], [{"1": -0.1}])


# ------------------------------------------------------------------------------------------------
# Secrets


@pytest.mark.parametrize("key", ["sk-a\nb", "sk a", "sk-\x1b[2J", "sk-é", 'sk-"', "sk-\u200b"])
def test_a_key_that_cannot_be_sent_is_refused_and_not_printed(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(InputError, match="OPENAI_API_KEY holds a space, a line break or") as error:
        Endpoint("http://127.0.0.1:9/v1")
    assert "sk" not in str(error.value)


def test_a_key_is_stripped():
    sent = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", f" {SECRET}\r\n")

        def answer(handler, _):
            sent.append(handler.headers["Authorization"])
            send(handler, completion("yes"))

        with http_server(answer) as url:
            assert ask(url).text == "yes"
    assert sent == [f"Bearer {SECRET}"]


@pytest.mark.parametrize("status", [200, 307, 400, 401, 500])
@pytest.mark.parametrize("shown", [SECRET, repr(f"Bearer {SECRET}".encode()), f"{SECRET[:16]}..."])
def test_a_server_that_gives_the_key_back_does_not_get_it_printed(
    monkeypatch, capsys, status, shown
):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setattr(endpoint, "SILENCE", 0.0)

    def echo(handler, _):
        send(handler, {"error": {"message": f"wrong key: {shown}"}}, status, Location=f"/{shown}")

    with http_server(echo) as url:
        failure = ask(url, retries=1)
    assert "***" in str(failure)
    assert "secret" not in str(failure) + capsys.readouterr().out


def test_what_a_server_says_cannot_move_the_cursor():
    with http_server(lambda handler, _: send(handler, b"\x1b[2J\r\n" * 10**5, 400)) as url:
        failure = ask(url)
    assert failure.refused
    assert failure.reason.isprintable() and len(failure.reason) < 400


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://user:hunter2@127.0.0.1:9/v1", "without user, password"),
        ("user:hunter2@host/v1", "without user, password"),
        ("https://host/v1?key=hunter2", "a key belongs in OPENAI_API_KEY"),
        ("https://host/v1#hunter2", "a key belongs in OPENAI_API_KEY"),
        ("127.0.0.1:8000/v1", "expected an address such as"),
        ("ftp://host/v1", "expected an address such as"),
        ("http://", "expected an address such as"),
        ("http://host:99999/v1", "expected an address such as"),
        ("http://[::1/v1", "expected an address such as"),
        ("http://a b/v1", "expected an address such as"),
        ("http://host/\x1b[2J", "expected an address such as"),
    ],
)
def test_an_address_that_is_wrong_or_holds_a_secret_is_refused(capsys, url, message):
    parser = flags.command_line("")
    parser.add_argument("--base_url", type=flags.server_url)
    with pytest.raises(SystemExit):
        parser.parse_args(["--base_url", url])
    printed = capsys.readouterr().err
    assert message in printed and "hunter2" not in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize("url", ["https://api.openai.com/v1", "http://[::1]:8000/v1/"])
def test_an_address_is_taken_as_it_is(url):
    assert flags.server_url(url) == url


@pytest.mark.parametrize("stage", ["annotate", "evaluate", "judge", "rl", "downstream_grpo"])
def test_every_stage_checks_the_address_of_its_server(capsys, stage):
    module = __import__(stage)
    flag = "--base_url" if stage in ("annotate", "evaluate") else "--judge_url"
    with pytest.raises(SystemExit):
        module.parser().parse_args([flag, "http://user:hunter2@host/v1"])
    printed = capsys.readouterr().err
    assert f"argument {flag}: expected an address without user" in printed
    assert "hunter2" not in printed
