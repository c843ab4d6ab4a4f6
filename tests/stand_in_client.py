"""What the tests of toy/server.py share: items with their answer key, requests, a client."""

import asyncio
import base64
import contextlib
import functools
import http.client
import io
import json
import random
import socket
import time

from conftest import write_rows

from core.pairs import JUDGING_PROMPT
from judge import CONSISTENCY_PROMPT
from toy import world

CHAT = "/v1/chat/completions"
TWINS = 300  # questions; each is two items, and each of these is asked in both orders
ORDERS = ((0, 1), (1, 0))

# --------------------------------------------------------------------------------------------------
# Items


def picture(item, seed=0):
    from PIL import Image

    data = io.BytesIO()
    pixels = world.draw(item["scene"], item["difficulty"], random.Random(seed))
    Image.fromarray(pixels).save(data, "PNG")
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


def key_row(item):
    return {name: value for name, value in item.items() if name != "images"}


def write_key(path, rows):
    return write_rows(path, [key_row(row) for row in rows])


# --------------------------------------------------------------------------------------------------
# Requests


def image_part(data):
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def ask(item, shown=(0, 1), **options):
    """The body of a request for a judgement."""
    answer1, answer2 = (item["answers"][i] for i in shown)
    text = JUDGING_PROMPT.format(question=item["question"], answer1=answer1, answer2=answer2)
    content = text
    if item["images"]:
        content = [*map(image_part, item["images"]), {"type": "text", "text": text}]
    messages = [{"role": "system", "content": "-"}, {"role": "user", "content": content}]
    return {"model": "any", "messages": messages, **options}


def ask_judge(reasoning, choice):
    text = CONSISTENCY_PROMPT.format(reasoning=reasoning, choice=choice)
    return {"model": "any", "messages": [{"role": "user", "content": text}]}


def both_orders(rows):
    """(item, order) of every item in both orders."""
    shown = []
    for item in rows:
        shown += [(item, order) for order in ORDERS]
    return shown


def requests_for(shown, **options):
    return [ask(item, order, **options) for item, order in shown]


# --------------------------------------------------------------------------------------------------
# A client


def port_of(server):
    return int(server.url.split(":")[2].split("/")[0])


def head_and_body(data):
    head = f"POST {CHAT} HTTP/1.1\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


async def exchange(reader, writer, data):
    """One request on an open connection -> (status, headers, body)."""
    writer.write(head_and_body(data))
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    body = await reader.readexactly(int(headers["content-length"]))
    return int(first.split()[1]), headers, body


async def client(server, todo, answers):
    """Sends request after request, on one connection as long as it lives."""
    line = None
    while todo:
        number, request = todo.pop()
        line = line or await asyncio.open_connection("127.0.0.1", port_of(server))
        try:
            answers[number] = await exchange(*line, json.dumps(request).encode())
        except ConnectionResetError:
            answers[number] = "reset"
        except asyncio.IncompleteReadError:
            answers[number] = "closed"
        if isinstance(answers[number], str):
            line[1].close()
            line = None
    if line:
        line[1].close()


def post_all(server, requests, clients=64):
    """
    The answers in the order asked: (status, headers, body), or "reset", or "closed" without one.
    """
    todo = list(enumerate(requests))[::-1]
    answers = [None] * len(requests)

    async def post():
        number = min(clients, len(todo))
        await asyncio.gather(*(client(server, todo, answers) for _ in range(number)))

    asyncio.run(post())
    return answers


def texts(server, requests):
    replies = []
    for status, _, body in post_all(server, requests):
        assert status == 200
        replies.append(json.loads(body)["choices"][0]["message"]["content"])
    return replies


def say(server, request):
    return texts(server, [request])[0]


@contextlib.contextmanager
def connection(server):
    line = http.client.HTTPConnection("127.0.0.1", port_of(server), timeout=20)
    with contextlib.closing(line):
        yield line


def post(server, body, path=CHAT):
    """One request by http.client -> its response, and its body."""
    if not isinstance(body, bytes):
        body = json.dumps(body)
    with connection(server) as line:
        line.request("POST", path, body)
        response = line.getresponse()
        return response, response.read()


def get(server, path):
    with connection(server) as line:
        line.request("GET", path)
        response = line.getresponse()
        return response.status, json.loads(response.read())


def plug(server):
    """A bare socket, connected."""
    return socket.create_connection(("127.0.0.1", port_of(server)), timeout=20)


def plug_and_ask(server, request):
    line = plug(server)
    line.sendall(head_and_body(json.dumps(request).encode()))
    return line


def wait_until(condition):
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.01)
    raise TimeoutError


def assert_share(hits, expected, n):
    """Held to 4 standard errors."""
    error = (expected * (1 - expected) / n) ** 0.5
    assert abs(hits / n - expected) < 4 * error + 1e-9, f"{hits} of {n} are not {expected}"
