"""The client over real HTTP: toy/server.py with every fault, and what is sent."""

import asyncio
import base64
import dataclasses
import io
import json
import socket
import threading
import time
from pathlib import Path

import pytest
from conftest import unused_port
from PIL import Image

from core.endpoint import Endpoint, NoReply, parse_completion, to_openai
from core.pairs import JUDGING_PROMPT, InputError, Pair, judging_turns
from judge import CONSISTENCY_PROMPT

FAULTS = ("429", "429_after", "500", "reset", "hang", "html", "empty", "truncated")


def ask_all(endpoint, count, **fields):
    """Replies to `count` consistency questions, or what was raised instead."""

    async def run():
        calls = []
        for number in range(count):
            text = CONSISTENCY_PROMPT.format(reasoning=f"{number}. Response 1 is better.", choice=1)
            calls.append(endpoint.ask("m", [{"role": "user", "content": text}], **fields))
        async with endpoint.client:
            return await asyncio.gather(*calls, return_exceptions=True)

    return asyncio.run(run())


# ------------------------------------------------------------------------------------------------
# Calls


def test_a_reply_has_text_finish_and_tokens(stand_in):
    (reply,) = ask_all(Endpoint(stand_in().url), 1, temperature=0, max_tokens=8)
    assert (reply.text, reply.finish, reply.completion_tokens) == ("yes", "stop", 1)
    assert reply.prompt_tokens > 10 and reply.tokens is None and reply.top_logprobs is None


@pytest.mark.slow
def test_no_call_is_lost_when_a_third_of_them_fail(stand_in):
    words = [word for fault in FAULTS for word in (f"--p_{fault}", 0.04)]
    it = stand_in(*words, "--hang", 20, "--retry_after", 0.2)
    endpoint = Endpoint(it.url, timeout=8)
    replies = ask_all(endpoint, 200)
    assert [reply.text for reply in replies] == ["yes"] * 200
    assert all(it.stats["faults"][fault] for fault in FAULTS)
    assert it.stats["answered"] == 200
    assert endpoint.retried.total() == sum(it.stats["faults"].values())


def test_retry_after_is_waited_for(stand_in):
    it = stand_in("--p_429_after", 1, "--retry_after", 1.2)
    start = time.monotonic()
    (failure,) = ask_all(Endpoint(it.url, retries=1), 1)
    assert time.monotonic() - start > 1.2  # without it: 0.5 s
    assert isinstance(failure, NoReply) and not failure.refused
    assert it.stats["requests"] == 2


@pytest.mark.parametrize("fault", ["429", "500", "reset", "html", "empty", "truncated"])
def test_a_server_that_always_fails_is_no_reply_and_not_a_refusal(stand_in, fault):
    (failure,) = ask_all(Endpoint(stand_in(f"--p_{fault}", 1).url, retries=0), 1)
    assert isinstance(failure, NoReply) and not failure.refused
    assert "no reply after 1 tries" in failure.reason


def test_a_server_that_hangs_or_is_not_there_is_no_reply(stand_in):
    hanging = Endpoint(stand_in("--p_hang", 1).url, timeout=0.2, retries=0)
    absent = Endpoint(f"http://127.0.0.1:{unused_port()}/v1", retries=0)
    for endpoint, error in ((hanging, "no reply within 0.2 s"), (absent, "ConnectError")):
        (failure,) = ask_all(endpoint, 1)
        assert error in failure.reason and not failure.refused


def test_a_request_that_the_server_will_not_take_is_not_repeated(stand_in):
    it = stand_in()
    (failure,) = ask_all(Endpoint(it.url), 1, n=2)  # 400
    assert failure.refused and "n is 2" in failure.reason
    assert it.stats["requests"] == 1


def test_a_wrong_address_names_the_flags_of_the_script(stand_in):
    url = stand_in().url.removesuffix("/v1") + "/v2"
    (failure,) = ask_all(Endpoint(url, url_flag="--judge_url", model_flag="--judge_model"), 1)
    assert isinstance(failure, InputError)
    assert "404" in str(failure)
    assert str(failure).endswith("check OPENAI_API_KEY, --judge_url and --judge_model")


def completion(choice):
    return json.dumps({"choices": [choice]}).encode()


@pytest.mark.parametrize(
    "message, text",
    [({"content": "hi"}, "hi"), ({"content": None, "refusal": "no"}, "no"), ({}, "")],
)
def test_a_refusal_by_the_model_is_a_text(message, text):
    reply = parse_completion(completion({"message": message, "finish_reason": "stop"}))
    assert (reply.text, reply.finish, reply.prompt_tokens) == (text, "stop", 0)


def test_log_probabilities_are_read():
    options = [{"token": "1", "logprob": 0}, {"token": " 1", "logprob": -1}]
    content = [{"token": "1", "top_logprobs": options}]
    reply = parse_completion(
        completion({"message": {"content": "1"}, "logprobs": {"content": content}})
    )
    assert reply.tokens == ["1"]
    assert reply.top_logprobs == [{"1": 0.0, " 1": -1.0}]
    del content[0]["top_logprobs"]
    broken = {"message": {"content": "1"}, "logprobs": {"content": content}}
    assert parse_completion(completion(broken)) is None


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[]",
        b"null",
        b'{"error": {}}',
        b'{"choices": []}',
        b'{"choices": null}',
        completion({"message": {"content": "x"}})[:-9],
        completion({}),
        completion({"message": {"content": [1]}}),
        b"\xff\xfe",
    ],
)
def test_other_bodies_are_no_reply(body):
    assert parse_completion(body) is None


# ------------------------------------------------------------------------------------------------
# The key


def test_only_a_server_on_this_machine_needs_no_key():
    for url in ("http://localhost:1/v1", "http://127.0.0.1/v1", "http://[::1]:8000/v1"):
        Endpoint(url)
    for url in ("https://api.openai.com/v1", "http://127.0.0.1.example.org/v1"):
        with pytest.raises(InputError, match=f"OPENAI_API_KEY is not set, and {url} is not on"):
            Endpoint(url)


def test_the_key_is_sent_and_not_printed(monkeypatch):
    """A server that repeats the key in its complaint."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def complain():
            connection, _ = listening.accept()
            with connection:
                head = connection.recv(2**20).decode()
                sent = head.partition("uthorization: ")[2].partition("\r\n")[0]
                body = json.dumps({"error": {"message": f"wrong key: {sent}"}})
                connection.sendall(
                    "HTTP/1.1 401 Unauthorized\r\nContent-Type: application/json\r\n"
                    f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
                )

        thread = threading.Thread(target=complain)
        thread.start()
        endpoint = Endpoint(f"http://127.0.0.1:{listening.getsockname()[1]}/v1")
        (failure,) = ask_all(endpoint, 1)
        thread.join()
    assert isinstance(failure, InputError)
    assert "wrong key: Bearer ***" in str(failure) and "secret" not in str(failure)


# ------------------------------------------------------------------------------------------------
# What is sent


def picture(size=(8, 8), kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, kind)
    return file.getvalue()


def sent_pictures(pair, **limits):
    """(mime type, bytes) of each picture, and the text."""
    (turn,) = to_openai(judging_turns(pair), **limits)
    *pictures, text = turn["content"]
    urls = [part["image_url"]["url"].split(";base64,") for part in pictures]
    return [(head, base64.b64decode(data)) for head, data in urls], text["text"]


@pytest.fixture
def pair():
    return Pair("x", "toy", "Q", images=[], video=None, responses=["a", "b"], choice=1)


def test_pictures_are_sent_as_they_are_and_large_or_rare_ones_as_small_jpegs(tmp_path, pair):
    files = {"a.png": picture(), "big.png": picture((400, 100)), "rare.bmp": picture(kind="BMP")}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    turned = Image.new("RGB", (30, 10))
    exif = turned.getexif()
    exif[0x0112] = 6  # to be shown a quarter turned
    turned.save(tmp_path / "turned.jpg", exif=exif)
    pair.images = [str(tmp_path / name) for name in (*files, "turned.jpg")]
    pictures, text = sent_pictures(pair, max_pixels=250, max_frames=4)
    assert text == JUDGING_PROMPT.format(question="Q", answer1="a", answer2="b")
    assert pictures[0] == ("data:image/png", files["a.png"])
    assert [mime for mime, _ in pictures[1:]] == ["data:image/jpeg"] * 3
    sizes = [Image.open(io.BytesIO(data)).size for _, data in pictures]
    assert sizes == [(8, 8), (31, 7), (8, 8), (9, 27)]


def test_evenly_spaced_frames_of_a_video_are_sent(tmp_path, pair):
    pair.video = [str(tmp_path / f"{number}.png") for number in range(10)]
    for number, path in enumerate(pair.video):
        Path(path).write_bytes(picture((number + 1, 1)))
    for max_frames, expected in ((4, [1, 4, 7, 10]), (1, [1]), (20, list(range(1, 11)))):
        pictures, _ = sent_pictures(pair, max_pixels=250, max_frames=max_frames)
        assert [Image.open(io.BytesIO(data)).width for _, data in pictures] == expected


def test_a_picture_that_is_gone_or_damaged_is_named(tmp_path, pair):
    (tmp_path / "cut.png").write_bytes(picture(kind="BMP")[:-20])
    for name in ("none.png", "cut.png"):
        broken = dataclasses.replace(pair, images=[str(tmp_path / name)])
        with pytest.raises(InputError, match=f"an image cannot be read: .*{name}"):
            sent_pictures(broken, max_pixels=250, max_frames=1)
