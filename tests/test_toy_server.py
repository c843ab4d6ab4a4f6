"""
The stand-in for annotator and judge (toy/server.py), over real HTTP on loopback: what it says against its answer key and
its promised shares, what repeats exactly, and each fault seen from a socket. Statistics are held to 4 standard errors.

$ python -m pytest tests/test_toy_server.py
"""
import asyncio
import base64
import collections
import contextlib
import doctest
import functools
import http.client
import io
import json
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from annotate import JUDGING_PROMPT
from judge import CONSISTENCY_PROMPT
from stable_reinforce import parse, parse_consistency
from toy import server, world

ROOT = Path(__file__).resolve().parent.parent
CHAT = "/v1/chat/completions"
TWINS = 300  # questions; each is two items, and each of these is asked in both orders


@contextlib.contextmanager
def running(*words):
    """A server in this process, with these flags."""
    it = server.Server(server.parser().parse_args(["--port", "0", *map(str, words)]))
    try:
        yield it
    finally:
        it.close()


def picture(item, seed=0):
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(world.draw(item["scene"], item["difficulty"], random.Random(seed))).save(data, "PNG")
    return data.getvalue()


def with_key(item, images):
    return item | {"key": world.key_of(item["question"], images), "images": images}


@functools.cache
def items():
    """Image items with difficulties spread evenly over 0 to 1."""
    rows = []
    for i in range(TWINS):
        for item in world.twins(random.Random(i), difficulty=(i + 0.5) / TWINS):
            rows.append(with_key(item, [picture(item, i)]))
    return rows


def write_key(path, rows):
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "images"}) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def key(tmp_path_factory):
    return write_key(tmp_path_factory.mktemp("key") / "key.jsonl", items())


def url_of(image):
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(image).decode()}}


def ask(item, shown=(0, 1), **options):
    """The body of a request for a judgement, as a dict."""
    answer1, answer2 = (item["answers"][i] for i in shown)
    text = JUDGING_PROMPT.format(question=item["question"], answer1=answer1, answer2=answer2)
    content = [*map(url_of, item["images"]), {"type": "text", "text": text}] if item["images"] else text
    messages = [{"role": "system", "content": "-"}, {"role": "user", "content": content}]
    return {"model": "any", "messages": messages, **options}


def ask_judge(reasoning, choice):
    text = CONSISTENCY_PROMPT.format(reasoning=reasoning, choice=choice)
    return {"model": "any", "messages": [{"role": "user", "content": text}]}


def both_orders(rows, **options):
    """(item, order, request) of every item in both orders."""
    return [(item, shown, ask(item, shown, **options)) for item in rows for shown in ((0, 1), (1, 0))]


async def exchange(pipe, data):
    """One request on an open connection -> (status, headers, body); a connection that ends raises."""
    reader, writer = pipe
    writer.write(b"POST %s HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % (CHAT.encode(), len(data)) + data)
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(first.split()[1]), headers, await reader.readexactly(int(headers["content-length"]))


def post_all(it, requests, workers=64):
    """What came back, in the order asked: (status, headers, body), or "reset", or "closed" without an answer."""
    todo, got = list(enumerate(requests))[::-1], [None] * len(requests)

    async def work():
        pipe = None
        while todo:
            i, request = todo.pop()
            pipe = pipe or await asyncio.open_connection("127.0.0.1", port(it))
            try:
                got[i] = await exchange(pipe, json.dumps(request).encode())
            except (ConnectionResetError, asyncio.IncompleteReadError) as error:
                got[i] = "reset" if isinstance(error, ConnectionResetError) else "closed"
                pipe[1].close()
                pipe = None
        if pipe:
            pipe[1].close()

    async def all_of_them():
        await asyncio.gather(*(work() for _ in range(min(workers, len(todo)))))

    asyncio.run(all_of_them())
    return got


def port(it):
    return int(it.url.split(":")[2].split("/")[0])


def texts(it, requests):
    replies = [json.loads(body) for status, _, body in post_all(it, requests) if status == 200]
    assert len(replies) == len(requests)
    return [reply["choices"][0]["message"]["content"] for reply in replies]


def say(it, request):
    return texts(it, [request])[0]


def post(it, body, path=CHAT, headers={}):
    """One request by http.client -> its response, and its body."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port(it), timeout=20)) as line:
        line.request("POST", path, body if isinstance(body, bytes) else json.dumps(body), headers)
        response = line.getresponse()
        return response, response.read()


def get(it, path):
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port(it), timeout=20)) as line:
        line.request("GET", path)
        response = line.getresponse()
        return response.status, json.loads(response.read())


def plug(it, request):
    """A bare socket on which the request was sent."""
    data = json.dumps(request).encode()
    line = socket.create_connection(("127.0.0.1", port(it)), timeout=20)
    line.sendall(b"POST %s HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % (CHAT.encode(), len(data)) + data)
    return line


def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def near(share, expected, n):
    assert abs(share - expected) < 4 * (expected * (1 - expected) / n) ** 0.5 + 1e-9, f"{share} is not {expected} (n = {n})"


# ---------------------------------------------------------------------------------------------------
# The annotator


def test_the_shares_in_the_docstring_are_those_of_the_defaults():
    easy, hard = server.parser().get_default("right_easy"), server.parser().get_default("right_hard")
    wrong = [1 - easy + (easy - hard) * (i + 0.5) / 1000 for i in range(1000)]
    shares = [sum(q**k * (1 - q) for q in wrong) / 10 for k in range(3)] + [sum(q**3 for q in wrong) / 10]
    promised = re.findall(r"(\d+\.\d) %", server.__doc__)
    assert [f"{s:.1f}" for s in shares] == promised == ["70.0", "18.9", "6.5", "4.6"]
    assert shares[0] <= 75 and 2 <= shares[3] <= 9  # a quarter needs a second attempt, a few per cent fail
    assert doctest.testmod(server).failed == 0


def test_it_is_right_as_often_as_promised_at_each_difficulty_and_attempt(key):
    """Three rounds over 1,200 pairs as shown. A third of the difficulties, at 1/6, 1/2, 5/6, is right .867, .70, .533."""
    asked = both_orders(items())
    n, hits = len(asked), []
    with running("--key", key) as it:
        for _ in range(3):
            verdicts = [parse(text) for text in texts(it, [request for *_, request in asked])]
            assert all(v.well_formed for v in verdicts)
            hits.append([shown[v.choice - 1] == item["right"] for v, (item, shown, _) in zip(verdicts, asked)])
        stats = it.stats
    for i, expected in enumerate((0.8667, 0.7, 0.5333)):
        third = [hit for hit, (item, *_) in zip(hits[0], asked) if i <= 3 * item["difficulty"] < i + 1]
        near(sum(third) / len(third), expected, len(third))
    near(sum(hits[1]) / n, 0.7, n)  # each attempt is as good as the first
    first_hit = collections.Counter(attempts.index(True) if True in attempts else 3 for attempts in zip(*hits))
    for i, expected in enumerate((0.700, 0.1892, 0.0651, 0.0457)):
        near(first_hit[i] / n, expected, n)
    for order in ((0, 1), (1, 0)):  # neither order, and neither twin, is better off
        one = [hit for hit, (_, shown, _) in zip(hits[0], asked) if shown == order]
        near(sum(one) / len(one), 0.7, len(one))
    pairs = list(zip(hits[0][::2], hits[0][1::2]))  # an item's two orders: drawn apart, .49 + .5**2 / 12 of them both right
    near(sum(map(all, pairs)) / len(pairs), 0.5108, len(pairs))
    right = sum(map(sum, hits))
    assert stats["requests"] == stats["answered"] == 3 * n and (stats["right"], stats["wrong"]) == (right, 3 * n - right)
    assert stats["attempt"] == {"0": n, "1": n, "2": n}


def test_the_manners_have_their_shares(key):
    """Of a right verdict the manner is known exactly: its text is world.judgement's."""
    asked = both_orders(items())
    with running("--key", key, "--right_easy", 1, "--right_hard", 1) as it:
        seen = collections.Counter()
        for text, (item, shown, _) in zip(texts(it, [request for *_, request in asked]), asked):
            choice = shown.index(item["right"]) + 1
            seen.update(m for m in world.MANNERS if text == world.judgement(item, shown, choice, m))
        assert sum(seen.values()) == len(asked) == it.stats["right"] and dict(seen) == it.stats["manner"]
    for manner, expected in zip(world.MANNERS, world.SHARES):
        near(seen[manner] / len(asked), expected, len(asked))
    with running("--key", key, "--manners", "careful=1") as it:
        texts(it, [request for *_, request in asked[:50]])
        assert it.stats["manner"] == dict.fromkeys(world.MANNERS, 0) | {"careful": 50}


def test_a_wrong_judgement_describes_what_it_believes(key):
    asked = both_orders([item for item in items() if item["family"] in ("colour", "shape", "position")])
    with running("--key", key, "--right_easy", 0, "--right_hard", 0, "--manners", "careful=1") as it:
        for text, (item, shown, _) in zip(texts(it, [request for *_, request in asked]), asked):
            choice = shown.index(1 - item["right"]) + 1
            assert parse(text).choice == choice and text != world.judgement(item, shown, choice, "careful")
        assert it.stats["wrong"] == len(asked)


def test_replies_repeat_in_another_life_whatever_the_order_of_arrival(key):
    asked = [request for *_, request in both_orders(items()[:50])]
    with running("--key", key) as it:
        lives = [[body for _, _, body in post_all(it, asked)] for _ in range(3)]
    assert lives[0] != lives[1] != lives[2]
    mixed = [(i, attempt) for i in range(len(asked)) for attempt in range(3)]
    random.Random(0).shuffle(mixed)
    with running("--key", key, "--latency", 0.002) as it:  # a seed names the attempt
        got = post_all(it, [asked[i] | {"seed": attempt} for i, attempt in mixed])
    assert all(body == lives[attempt][i] for (i, attempt), (_, _, body) in zip(mixed, got))
    with running("--key", key, "--seed", 1) as it:
        assert [body for _, _, body in post_all(it, asked)] != lives[0]


def test_the_orders_of_a_pair_count_their_attempts_apart(key):
    item = items()[-1]
    with running("--key", key, "--p_500", 0.5) as it:  # a fault is no attempt
        replies = []
        while len(replies) < 3:
            response, body = post(it, ask(item))
            replies += [json.loads(body)["choices"][0]["message"]["content"]] if response.status == 200 else []
        while post(it, ask(item, (1, 0)))[0].status != 200:
            pass
        assert it.stats["attempt"] == {"0": 2, "1": 1, "2": 1} and it.stats["faults"]["500"] > 0
    with running("--key", key) as it:
        assert replies == [say(it, ask(item, seed=attempt)) for attempt in range(3)]
        assert say(it, ask(item, seed=-5)) and say(it, ask(item, seed=2**70)) and it.stats["attempt"]["other"] == 2


def test_of_two_wrong_answers_it_takes_either(tmp_path):
    rows = []
    for i in range(200):
        item = world.twins(random.Random(i), family="colour", n=3, medium="text")[i % 3]
        rows.append(with_key(item, []))
    with running("--key", write_key(tmp_path / "key.jsonl", rows)) as it:
        wrong = [tuple(i for i in range(3) if i != item["right"]) for item in rows]
        got = [parse(text).choice for text in texts(it, [ask(item, shown) for item, shown in zip(rows, wrong)])]
        assert it.stats["neither"] == 200 and it.stats["right"] == it.stats["wrong"] == 0
        near(got.count(1) / 200, 0.5, 200)
        texts(it, [ask(item, (item["right"], (item["right"] + 1) % 3)) for item in rows])
        assert it.stats["right"] + it.stats["wrong"] == 200


def test_items_may_share_their_picture_and_question(tmp_path):
    one = items()[0]
    other = one | {"answers": [f"I say: {a}" for a in one["answers"]], "right": 1 - one["right"]}
    with running("--key", write_key(tmp_path / "key.jsonl", [one, other]), "--right_easy", 1, "--right_hard", 1) as it:
        for item in (one, other):
            assert parse(say(it, ask(item))).choice == item["right"] + 1
        mixed = one | {"answers": [one["answers"][0], other["answers"][1]]}
        assert parse(say(it, ask(mixed))).choice is None and it.stats["unknown"] == 1


def test_an_unknown_pair_gets_no_verdict(key):
    item = items()[0]
    strangers = [item | {"images": [item["images"][0] + b"\0"]}, item | {"images": []}, item | {"question": "Why?"},
                 item | {"answers": ["x", item["answers"][1]]}, item | {"answers": [item["answers"][0]] * 2}]
    with running("--key", key) as it:
        for text in texts(it, [ask(stranger) for stranger in strangers]):
            assert parse(text) == (None, "", False) and "1" not in text and "2" not in text
        assert it.stats["unknown"] == it.stats["answered"] == len(strangers) and it.stats["attempt"] == {}
    with running() as it:
        assert parse(say(it, ask(item))).choice is None


def test_text_only_and_video_pairs(tmp_path):
    told, shot = (world.twins(random.Random(7), medium=medium)[0] for medium in ("text", "video"))
    rows = [with_key(told, []), with_key(shot, [picture(shot, seed) for seed in range(4)])]
    with running("--key", write_key(tmp_path / "key.jsonl", rows), "--right_easy", 1, "--right_hard", 1) as it:
        for item in rows:
            for shown in ((0, 1), (1, 0)):
                assert shown[parse(say(it, ask(item, shown))).choice - 1] == item["right"]
        text = ask(rows[0])["messages"][1]["content"]
        listed = {"messages": [{"role": "user", "content": [{"type": "text", "text": text}]}]}
        assert parse(say(it, listed)).choice == rows[0]["right"] + 1
        assert parse(say(it, ask(rows[1] | {"images": rows[1]["images"][::-1]}))).choice is None  # frames have an order


# ---------------------------------------------------------------------------------------------------
# The judge


@pytest.mark.parametrize("reasoning, choice, agrees", [
    ("Claims: red 1, blue 2. Response 2 is better.", 2, 1),
    ("Claims: red 1, blue 2. Response 2 is better.", 1, 0),
    ("Response 1 is better, I thought; but look again. Response 2 is better.", 2, 1),
    ("Response 1 is better, I thought; but look again. Response 2 is better.", 1, 0),
    ("I see 2 circles, so Response 1 is right.", 1, 0),  # not the sentence
    ("", 1, 0),
    ("The sign says \"2\" and the answer is 2. Response 1 is better.", 1, 1),  # digits that are only quoted
    ("Response 1 is better. The other gets 2 of 10. <answer>2</answer>", 1, 1),
    ("Response 12 is better. Response 3 is better. Response \uff11 is better.", 1, 0),  # no such responses
    ("Response 1 is better.\n\nVerdict: Response 2 is better.\n\nDoes it? no", 2, 1),  # the prompt's own words inside
])
def test_the_judge_looks_at_the_last_conclusion(reasoning, choice, agrees):
    with running() as it:
        assert parse_consistency(say(it, ask_judge(reasoning, choice))) == agrees
        assert it.stats["judge"] == {"yes": agrees, "no": 1 - agrees}


def test_the_judge_tells_the_inconsistent_manner(key):
    asked = both_orders(items()[:60])
    with running("--key", key) as it:
        replies = texts(it, [request for *_, request in asked])
        verdicts = [parse(text) for text in replies]
        agree = [parse_consistency(text) for text in texts(it, [ask_judge(v.think, v.choice) for v in verdicts])]
        assert agree.count(0) == it.stats["manner"]["inconsistent"] > 0 and None not in agree


# ---------------------------------------------------------------------------------------------------
# The protocol


def test_the_openai_client_works_against_it(key):
    import openai

    item = items()[0]
    with running("--key", key) as it, openai.OpenAI(base_url=it.url, api_key="-", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == [server.NAME]
        reply = client.chat.completions.create(**ask(item, seed=3, temperature=1.0, max_tokens=500))
        text = reply.choices[0].message.content
        assert parse(text).well_formed and reply.choices[0].finish_reason == "stop" and reply.model == "any"
        assert reply.usage.completion_tokens == len(text.split()) and reply.usage.prompt_tokens > 50
        short = client.chat.completions.create(**ask(item, seed=3, max_completion_tokens=4))
        assert short.choices[0].message.content.split() == text.split()[:4] and short.choices[0].finish_reason == "length"
        assert short.usage.completion_tokens == 4
        with pytest.raises(openai.BadRequestError, match="n is 2"):
            client.chat.completions.create(**ask(item, n=2))
    errors = {"429": openai.RateLimitError, "500": openai.InternalServerError, "reset": openai.APIConnectionError,
              "hang": openai.APITimeoutError}
    for fault, error in errors.items():
        with running(f"--p_{fault}", 1) as it:
            with openai.OpenAI(base_url=it.url, api_key="-", max_retries=0, timeout=0.2) as client, pytest.raises(error):
                client.chat.completions.create(**ask(item))
            assert it.stats["faults"][fault] == 1


def test_the_openai_client_gets_through_by_retrying(key):
    import openai

    requests = [ask(item, seed=0) for item in items()[:40]]

    async def all_at_once(url):
        async with openai.AsyncOpenAI(base_url=url, api_key="-", max_retries=20) as client:
            return await asyncio.gather(*(client.chat.completions.create(**request) for request in requests))

    with running("--key", key) as calm, running("--key", key, "--p_429_after", 0.4, "--retry_after", 0.02) as it:
        with openai.OpenAI(base_url=it.url, api_key="-", max_retries=20) as client:
            one_by_one = [client.chat.completions.create(**request) for request in requests]
        at_once = asyncio.run(all_at_once(it.url))
        said = [[reply.choices[0].message.content for reply in replies] for replies in (one_by_one, at_once)]
        assert said[0] == said[1] == texts(calm, requests)
        assert it.stats["faults"]["429_after"] > 20 and it.stats["answered"] == 80


USER = {"role": "user", "content": "Hello"}
PICTURE, TEXT = url_of(b"any bytes"), {"type": "text", "text": "Hello"}
BROKEN, WEB, WEB64 = ({"type": "image_url", "image_url": {"url": url}}
                      for url in ("data:image/png;base64,?", "http://a/b.png", "http://a;base64,aGk="))


@pytest.mark.parametrize("body, says", [
    (b"{", "not JSON"), (b"\xff\xfe\xff", "not JSON"), (b"", "not JSON"), (b"[" * 100_000, "not JSON"),
    ([], "messages"), ({"messages": "Hello"}, "messages"),
    ({"messages": [USER]}, "JUDGING_PROMPT"),
    ({"messages": []}, "neither a string"), ({"messages": [{"role": "user"}]}, "neither a string"),
    ({"messages": [USER | {"content": []}]}, "neither a string"),
    ({"messages": [USER | {"content": "\ud800"}]}, "neither a string"),
    ({"messages": [USER | {"content": [PICTURE]}]}, "only text part"),
    ({"messages": [USER | {"content": [TEXT, PICTURE]}]}, "only text part"),
    ({"messages": [USER | {"content": [TEXT, TEXT]}]}, "only text part"),
    ({"messages": [USER | {"content": [WEB, TEXT]}]}, "nothing is fetched"),
    ({"messages": [USER | {"content": [WEB64, TEXT]}]}, "nothing is fetched"),
    ({"messages": [USER | {"content": [BROKEN, TEXT]}]}, "base64"),
    ({"messages": [USER], "n": 2}, "n is 2"), ({"messages": [USER], "stream": True}, "stream is true"),
    ({"messages": [USER], "logprobs": True}, "logprobs is true"), ({"messages": [USER], "top_logprobs": 5}, "is 5"),
    ({"messages": [USER], "max_tokens": 0}, "max_tokens is 0"), ({"messages": [USER], "seed": "1"}, 'seed is "1"'),
    ({"messages": [USER], "seed": True}, "seed is true"), ({"messages": [USER], "max_completion_tokens": 1.5}, "is 1.5"),
])
def test_a_request_it_does_not_understand_is_told_so(bad_server, body, says):
    before = bad_server.stats
    response, answer = post(bad_server, body)
    assert response.status == 400 and says in json.loads(answer)["error"]["message"], answer
    assert json.loads(answer)["error"]["type"] == "invalid_request_error"
    assert bad_server.stats == before | {"requests": before["requests"] + 1, "bad": before["bad"] + 1}


@pytest.fixture(scope="module")
def bad_server(key):
    with running("--key", key) as it:
        yield it


def test_pages_and_paths(bad_server):
    assert get(bad_server, "/health")[0] == get(bad_server, "/v1/models")[0] == 200
    assert get(bad_server, "/stats") == (200, bad_server.stats)
    assert get(bad_server, "/nowhere")[0] == 404 and post(bad_server, b"", "/v1/completions")[0].status == 404
    assert bad_server.socket.family == socket.AF_INET and bad_server.url.startswith("http://127.0.0.1:")


def test_a_body_that_is_too_long_is_refused_and_the_connection_lives(bad_server):
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port(bad_server), timeout=20)) as line:
        line.request("POST", CHAT, bytes(server.MAX_BODY + 1))
        response = line.getresponse()
        assert response.status == 413 and str(server.MAX_BODY) in json.loads(response.read())["error"]["message"]
        line.request("GET", "/health")
        assert line.getresponse().status == 200


@pytest.mark.parametrize("head", [b"nonsense", b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: -1",
                                  b"POST /v1/chat/completions HTTP/1.1\r\nTransfer-Encoding: chunked", b"GET / FTP/9\r\n"])
def test_what_is_not_http_with_a_length_is_refused(bad_server, head):
    with socket.create_connection(("127.0.0.1", port(bad_server)), timeout=20) as line:
        line.sendall(head + b"\r\n\r\n")
        assert line.makefile("rb").read().startswith(b"HTTP/1.1 400 ")  # read() to the end: it also hangs up
    with socket.create_connection(("127.0.0.1", port(bad_server)), timeout=20) as line:
        line.sendall(b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert line.recv(1) == b""
    assert get(bad_server, "/health")[0] == 200


# ---------------------------------------------------------------------------------------------------
# The faults


def test_each_http_fault_is_what_it_claims():
    request = ask(items()[0])
    got = {}
    for fault in ("429", "429_after", "500", "html", "empty", "truncated", "refusal"):
        with running(f"--p_{fault}", 1, "--retry_after", 7) as it:
            got[fault] = post(it, request)
            stats = it.stats
        assert stats["faults"] == dict.fromkeys(stats["faults"], 0) | {fault: 1}
        assert stats["requests"] == 1 and stats["answered"] == (fault == "refusal")
    status = {fault: response.status for fault, (response, _) in got.items()}
    assert status == {"429": 429, "429_after": 429, "500": 500, "html": 200, "empty": 200, "truncated": 200, "refusal": 200}
    after = {fault: response.getheader("Retry-After") for fault, (response, _) in got.items()}
    assert after == dict.fromkeys(got) | {"429_after": "7"}
    assert all(json.loads(got[fault][1])["error"]["message"] for fault in ("429", "429_after", "500"))
    assert got["html"][0].getheader("Content-Type") == "text/html" and b"<html>" in got["html"][1]
    assert json.loads(got["empty"][1])["choices"] == []
    assert got["truncated"][0].getheader("Content-Type") == "application/json"
    assert len(got["truncated"][1]) == int(got["truncated"][0].getheader("Content-Length")) > 100
    with pytest.raises(json.JSONDecodeError):
        json.loads(got["truncated"][1])
    choice = json.loads(got["refusal"][1])["choices"][0]
    assert parse(choice["message"]["content"]).choice is None and choice["finish_reason"] == "stop"


def test_a_refusal_is_an_attempt(key):
    item = items()[0]
    with running("--key", key, "--p_refusal", 1) as it:
        assert {say(it, ask(item)) for _ in range(3)} == {server.REFUSAL}
        assert it.stats["attempt"] == {"0": 1, "1": 1, "2": 1}
        assert parse_consistency(say(it, ask_judge("Response 1 is better.", 1))) is None
        assert it.stats["faults"]["refusal"] == it.stats["answered"] == 4 and it.stats["right"] == it.stats["wrong"] == 0


def test_a_reset_is_a_reset():
    """At a socket, for http.client calls an orderly close a ConnectionResetError too."""
    with running("--p_reset", 1) as it, plug(it, ask(items()[0])) as line:
        with pytest.raises(ConnectionResetError):
            line.recv(1)


def test_a_hang_hangs_and_then_ends():
    with running("--p_hang", 1, "--hang", 0.4) as it, plug(it, ask(items()[0])) as line:
        start = time.monotonic()
        line.settimeout(0.2)
        with pytest.raises(TimeoutError):
            line.recv(1)
        line.settimeout(20)
        assert line.recv(1) == b"" and 0.35 < time.monotonic() - start < 5
    with running("--p_hang", 1, "--hang", 1000) as it, plug(it, ask(items()[0])):
        until(lambda: it.stats["faults"]["hang"])
        start = time.monotonic()
        it.close()  # waits for nobody
        assert time.monotonic() - start < 5
        it.close()  # twice does no harm
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port(it)))


def test_latency_and_a_client_that_does_not_wait(key):
    with running("--key", key, "--latency", 0.2) as it:
        start = time.monotonic()
        texts(it, [ask(item) for item in items()[:40]])
        assert 0.2 < time.monotonic() - start < 5  # the slowest of forty, and they wait at the same time
        plug(it, ask(items()[100])).close()
        until(lambda: it.stats["hung_up"])
        assert it.stats["answered"] == 40 and it.stats["attempt"] == {"0": 40}


def test_latency_does_not_change_which_requests_fail(key):
    requests = [ask(items()[0])] * 60
    with running("--key", key, "--p_500", 0.5) as fast, running("--key", key, "--p_500", 0.5, "--latency", 0.002) as slow:
        status = [[answer[0] for answer in post_all(it, requests, workers=1)] for it in (fast, slow)]
        assert status[0] == status[1] and {200, 500} == set(status[0])


def kind(got):
    """Name of an outcome, as the server's counters have it, from what the client saw alone."""
    if isinstance(got, str):
        return {"reset": "reset", "closed": "hang"}[got]
    status, headers, body = got
    if status != 200:
        return {429: "429_after" if "retry-after" in headers else "429"}.get(status, str(status))
    if headers["content-type"] == "text/html":
        return "html"
    try:
        choices = json.loads(body)["choices"]
    except json.JSONDecodeError:
        return "truncated"
    text = choices[0]["message"]["content"] if choices else ""
    named = {"": "empty", server.REFUSAL: "refusal", server.UNKNOWN: "unknown", "yes": "yes", "no": "no"}
    return named.get(text) or f"choice {parse(text).choice}"


def test_ten_thousand_requests_with_every_fault(key):
    """64 at a time. What the clients saw is what the server counted, and afterwards it answers."""
    flags = [f"--p_{name}={p}" for name, p in {"429": 0.04, "429_after": 0.04, "500": 0.04, "reset": 0.03, "hang": 0.01,
                                               "html": 0.03, "empty": 0.03, "truncated": 0.03, "refusal": 0.03}.items()]
    asked = both_orders(items())
    requests = [request for *_, request in asked] * 7 + [ask(items()[0] | {"question": "Why?"})] * 400
    requests += [ask_judge("Response 1 is better.", 1 + i % 2) for i in range(800)] + [{"messages": [USER]}] * 400
    random.Random(0).shuffle(requests)
    assert len(requests) == 10_000
    with running("--key", key, "--hang", 0.2, "--latency", 0.001, *flags) as it:
        seen = collections.Counter(map(kind, post_all(it, requests)))
        stats = it.stats
        for name, n in stats["faults"].items():
            assert n == seen.pop(name) > 50, name
        assert stats["requests"] == 10_000 and stats["hung_up"] == 0
        assert stats["unknown"] == seen.pop("unknown") and stats["bad"] == seen.pop("400")
        assert stats["judge"] == {"yes": seen.pop("yes"), "no": seen.pop("no")}
        verdicts = seen.pop("choice 1") + seen.pop("choice 2")
        assert stats["right"] + stats["wrong"] == sum(stats["manner"].values()) == verdicts and not seen
        faults = sum(stats["faults"].values()) - stats["faults"]["refusal"]
        assert stats["requests"] == stats["answered"] + stats["bad"] + faults
        assert get(it, "/health")[0] == 200 and get(it, "/stats")[1] == stats


# ---------------------------------------------------------------------------------------------------
# The command


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_the_command_prints_its_address_and_ends_cleanly(key, stop):
    command = [sys.executable, "toy/server.py", "--key", str(key), "--port"]
    process = subprocess.Popen([*command, "0"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        url = re.fullmatch(r"listening on (http://127\.0\.0\.1:(\d+)/v1)\n", process.stdout.readline())
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", int(url[2]), timeout=20)) as line:  # stays open
            line.request("POST", CHAT, json.dumps(ask(items()[0])))
            assert parse(json.loads(line.getresponse().read())["choices"][0]["message"]["content"]).choice in (1, 2)
            taken = subprocess.run([*command, url[2]], cwd=ROOT, capture_output=True, text=True, timeout=60)
            assert taken.returncode == 2 and "in use" in taken.stderr
            process.send_signal(stop)
            out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 0 and err == "" and json.loads(out)["answered"] == 1


@pytest.mark.parametrize("words, says", [
    (["--p_500", "1.5"], "legal: 0 to 1"), (["--p_reset", "nan"], "legal: 0 to 1"), (["--p_hang", "-0.1"], "legal: 0 to 1"),
    (["--right_easy", "2"], "legal: 0 to 1"), (["--latency", "-1"], "0 or more"), (["--hang", "inf"], "0 or more"),
    (["--manners", "hasty"], "legal: name=share"), (["--manners", "hasty=.5,hasty=.5"], "legal: name=share"),
    (["--manners", "hasty=.5"], "add up to 1"), (["--manners", "rude=1"], "hasty, careful"),
    (["--manners", "hasty=x"], "legal"), (["--manners", "hasty=-1,careful=2"], "legal"),
])
def test_illegal_flags_are_refused(capsys, words, says):
    with pytest.raises(SystemExit) as stop:
        server.parser().parse_args(words)
    assert stop.value.code == 2 and says in capsys.readouterr().err


def test_shares_of_faults_above_one_are_refused(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["server.py", "--p_500", "0.6", "--p_429", "0.6"])
    with pytest.raises(SystemExit) as stop:
        server.main()
    assert stop.value.code == 2 and "add up to 1.2" in capsys.readouterr().err


@pytest.mark.parametrize("change, says", [
    ("{", "is not JSON"), ("\n", "is not JSON"), ("[]", "has no 'key'"), ({"subject": None}, "'subject' is null; legal"),
    ({"family": "size"}, "'family' is \"size\"; legal: colour"), ({"difficulty": 1.5}, "legal: a number, 0 to 1"),
    ({"medium": "audio"}, "legal: image, video, text"), ({"answers": ["a", "a"]}, "two or more different"),
    ({"right": 2}, "'right' is 2"), ({"claims": ["a"]}, "as many strings"), ({"key": 1}, "key_of"),
    ({"scene": [["circle"]]}, "null or [shape, colour]"),
])
def test_a_bad_answer_key_is_named_by_file_and_line(tmp_path, change, says):
    good = {k: v for k, v in items()[0].items() if k != "images"}
    line = change if isinstance(change, str) else json.dumps(good | change)
    (tmp_path / "bad.jsonl").write_text(f"{json.dumps(good)}\n{line}\n")
    with pytest.raises(ValueError) as error:
        server.load_key([tmp_path / "bad.jsonl"])
    assert "bad.jsonl: line 2" in str(error.value) and says in str(error.value)


def test_a_missing_answer_key_and_a_missing_field_are_named(tmp_path):
    with pytest.raises(ValueError, match="none.jsonl: No such file"):
        server.load_key([tmp_path / "none.jsonl"])
    for field in server.FIELDS:
        row = {k: v for k, v in items()[0].items() if k not in ("images", field)}
        with pytest.raises(ValueError, match=f"line 1 has no '{field}'"):
            server.load_key([write_key(tmp_path / "key.jsonl", [row])])
