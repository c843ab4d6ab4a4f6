"""
A stand-in for the annotator (a large MLLM behind an API) and for the consistency judge: an
OpenAI-compatible server on this machine without any model. It sees nothing and reasons about
nothing. The text of a request says which part it plays:

  annotator   JUDGING_PROMPT filled in, after the pair's pictures as data URLs. It looks the pair up
              in an answer key, and errs more where the picture is harder to see: it is right with
              probability --right_easy at difficulty 0, --right_hard at 1, linear between, drawn
              anew at each attempt. With the defaults, and difficulties uniform in 0 to 1, 70.0 % of
              the pairs are right at the first attempt, 18.9 % at the second, 6.5 % at the third;
              4.6 % fail three times. When wrong, it describes what it believes (misread in
              toy/world.py). Of two wrong answers it takes either by a coin. A pair that is not in
              the key gets a sentence without a verdict.
  critic      CRITIQUE_PROMPT filled in, after the pictures: it errs in the same way, and ends with
              "It is right." or "It is wrong."
  judge       CONSISTENCY_PROMPT filled in: a rule. "yes" if the last "Response N is better" of the
              reasoning has the verdict's number, otherwise "no".

Attempts count from 0: the requests answered before for the same pair in the same order, since the
server started; or the request's `seed`, if it has one. A verdict depends on --seed, the pair as
shown and the attempt, and on nothing else. Faults are drawn apart from that, and except for a
refusal they are no attempts. A token is a word.

$ python toy/server.py --key out/toy/key.jsonl --port 8010
$ python toy/server.py --key out/toy/key.jsonl --latency 0.05 --p_429_after 0.02 --p_reset 0.01

POST /v1/chat/completions; GET /v1/models, /health, and /stats: what was asked, answered and broken
so far, where requests = answered + bad + hung_up (the client left before its answer) + all faults
but refusals, which are answers.
In a test: server = Server(parser().parse_args(["--port", "0"])); server.url, server.stats,
server.close().
"""

import asyncio
import base64
import contextlib
import hashlib
import json
import random
import re
import signal
import socket
import struct
import sys
import threading
from http import HTTPStatus
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from core.files import InputError
from core.flags import command_line, number, random_seed
from toy import stand_in, world
from toy.stand_in import load_key

__all__ = ["Server", "load_key", "parser"]

NAME = "toy-stand-in"  # of the model that is not there
CHAT = "POST /v1/chat/completions"
MAX_BODY = 64 * 2**20  # bytes
REFUSAL = "I'm sorry, but I can't help with comparing these two responses."
UNKNOWN = "I cannot tell which response is better: this pair is not in my answer key."
HTML = b"<!DOCTYPE html><html><body><h1>Service under maintenance</h1></body></html>"
FAULTS = {  # name: help
    "429": "status 429 without Retry-After",
    "429_after": "status 429 with Retry-After: --retry_after",
    "500": "status 500",
    "reset": "the connection is reset (TCP RST)",
    "hang": "nothing is sent for --hang seconds, then the connection ends",
    "html": "status 200 and an HTML page",
    "empty": 'status 200 and "choices": []',
    "truncated": "status 200 and half a JSON body, declared to be that long",
    "refusal": "status 200 and a refusal: an answer, and an attempt",
}

# --------------------------------------------------------------------------------------------------
# Flags


def parser():
    p = command_line(__doc__)
    add = p.add_argument_group("server").add_argument
    add("--port", type=int, default=8010, help="on 127.0.0.1 only; 0 = a free one, it is printed")
    add("--seed", type=random_seed, default=0, help="of verdicts, manners and faults")
    add = p.add_argument_group("annotator").add_argument
    key_help = "answer keys (key.jsonl); none = every pair is unknown"
    add("--key", nargs="+", action="extend", default=[], metavar="FILE", help=key_help)
    stand_in.add_flags(add)
    add = p.add_argument_group(
        f"faults of {CHAT}; p_* are shares of the requests, together at most 1"
    ).add_argument
    latency_help = "mean seconds before an answer (uniform, 0.5 to 1.5 of it)"
    add("--latency", type=number(), default=0.0, help=latency_help)
    for fault, help_text in FAULTS.items():
        add(f"--p_{fault}", type=number(0, 1), default=0.0, help=help_text)
    add("--retry_after", type=number(), default=1.0, help="seconds, for --p_429_after")
    add("--hang", type=number(), default=60.0, help="seconds, for --p_hang")
    return p


def fault_shares(args):
    shares = {fault: getattr(args, f"p_{fault}") for fault in FAULTS}
    total = sum(shares.values())
    if total > 1 + 1e-9:
        raise InputError(f"the --p_* add up to {total:g}; expected at most 1")
    return shares


# --------------------------------------------------------------------------------------------------
# What a client sends, and what it gets


class BadRequest(Exception):
    """A request that is the client's fault: (message, HTTP status)."""


def last_user_content(request):
    """Check a chat request. Returns the content of its last user message."""
    if not isinstance(request, dict) or not isinstance(request.get("messages"), list):
        expected = 'expected a JSON object with "messages": [...]'
        raise BadRequest(f"the body is no chat request; {expected}", 400)
    for name, only in {"n": 1, "stream": False, "logprobs": False, "top_logprobs": 0}.items():
        value = request.get(name)
        if value not in (None, only):
            raise BadRequest(f"{name} is {json.dumps(value)}; not supported, leave it out", 400)
    for name in ("max_tokens", "max_completion_tokens", "seed"):
        value = request.get(name)
        valid = value is None or (type(value) is int and (value >= 1 or name == "seed"))
        if not valid:
            expected = "an integer" if name == "seed" else "an integer, 1 or more"
            raise BadRequest(f"{name} is {json.dumps(value)}; expected {expected}", 400)
    content = None
    for message in request["messages"]:
        if isinstance(message, dict) and message.get("role") == "user":
            content = message.get("content")
    return content


def text_and_images(content):
    """Text and bytes of the pictures of a message: a string, or pictures and then one text."""
    if isinstance(content, str):
        content = [{"text": content}]
    try:
        *pictures, last = content
        last["text"].encode()  # half of a surrogate pair, which JSON can hold, has no bytes
        return last["text"], [bytes_of(picture["image_url"]["url"]) for picture in pictures]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise BadRequest(
            "the last user message is neither a string nor a list of image_url parts "
            "(data:...;base64,... URLs; nothing is fetched) that ends with its only text part",
            400,
        ) from None


def bytes_of(url):
    kind, data = url.split(";base64,")
    if not kind.startswith("data:"):
        raise ValueError("not a data URL")
    return base64.b64decode(data, validate=True)


def completion(request, text, prompt=""):
    """A chat completion: the same request and text give the same bytes."""
    limit = request.get("max_completion_tokens") or request.get("max_tokens")
    words = text.split()
    finish, content, count = "stop", text, len(words)
    if limit is not None and len(words) > limit:
        finish, content, count = "length", " ".join(words[:limit]), limit
    asked = len(prompt.split())
    digest = hashlib.sha256((prompt + text).encode()).hexdigest()
    message = {"role": "assistant", "content": content}
    return {
        "id": f"chatcmpl-{digest[:24]}",
        "object": "chat.completion",
        "created": 0,
        "model": request.get("model") or NAME,
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": {
            "prompt_tokens": asked,
            "completion_tokens": count,
            "total_tokens": asked + count,
        },
    }


def response(status, body, *headers, kind="application/json"):
    """The bytes of an HTTP response. body: bytes, or what becomes JSON."""
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    lines = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        f"Content-Type: {kind}",
        f"Content-Length: {len(body)}",
        *headers,
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


def error(status, message, *headers):
    kinds = {429: "rate_limit_error", 500: "server_error"}
    about = {
        "message": f"{NAME}: {message}",
        "type": kinds.get(status, "invalid_request_error"),
        "param": None,
        "code": None,
    }
    return response(status, {"error": about}, *headers)


def read_head(head):
    """
    The bytes before the body -> (method and path, length of the body, whether the connection stays
    open). The length is None where the end of the body is not known.

    >>> read_head(b"GET /stats?all HTTP/1.1\\r\\nConnection: close\\r\\n\\r\\n")
    ('GET /stats', 0, False)
    """
    first, *lines = head.decode("latin-1").strip().split("\r\n")
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip().lower()
    asked, _, version = first.rpartition(" ")
    length = headers.get("content-length", "0")
    known = version.startswith("HTTP/1.") and "transfer-encoding" not in headers
    known = known and re.fullmatch("[0-9]{1,18}", length)
    default = "close" if version == "HTTP/1.0" else "keep-alive"
    keep = headers.get("connection", default) != "close"
    return asked.split("?")[0], int(length) if known else None, keep


# --------------------------------------------------------------------------------------------------


class Server:
    """
    Runs in a thread of its own until close(). All its state belongs to that thread's event loop, so
    nothing is locked.
    """

    def __init__(self, args):
        self.args = args
        self.faults = fault_shares(args)
        self.key = load_key(args.key)
        self.attempts = {}  # (pictures and question, answer 1, answer 2): answered so far
        self.dice = random.Random(f"faults {args.seed}")
        names = ("requests", "answered", "bad", "hung_up", "right", "wrong", "neither", "unknown")
        self.counts = dict.fromkeys(names, 0) | {
            "manner": dict.fromkeys(world.MANNERS, 0),
            "attempt": {},
            "judge": {"yes": 0, "no": 0},
            "critic": 0,
            "faults": dict.fromkeys(self.faults, 0),
        }
        self.socket = socket.create_server(("127.0.0.1", args.port))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/v1"
        self.ready = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()
        self.ready.wait()

    @property
    def stats(self):
        """A copy of the counts."""
        return json.loads(json.dumps(self.counts))

    def close(self):
        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(self.stop.set)
            self.thread.join()

    def run(self):
        asyncio.run(self.serve())

    async def serve(self):
        self.loop, self.stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self.connection, sock=self.socket, backlog=1024)
        self.ready.set()
        await self.stop.wait()
        server.close()  # asyncio.run cancels the open connections as it ends

    async def connection(self, reader, writer):
        """One client: request after request, until either side ends it."""
        left = (ConnectionError, asyncio.IncompleteReadError)
        no_http = asyncio.LimitOverrunError
        closed = asyncio.CancelledError
        try:
            with contextlib.suppress(*left, no_http, closed):
                while await self.exchange(reader, writer):
                    await writer.drain()
        finally:
            writer.close()

    async def exchange(self, reader, writer):
        """Reads one request and answers it. Returns whether the connection stays open."""
        asked, length, keep = read_head(await reader.readuntil(b"\r\n\r\n"))
        pages = self.pages()
        if asked in pages and length == 0:
            writer.write(response(200, pages[asked]))
            return keep
        self.counts["requests"] += 1
        unread = length or 0  # bytes of the body
        try:
            check_head(asked, length, pages)
            body = await reader.readexactly(length)
            unread = 0
            if asked != CHAT:
                raise BadRequest(f"no {asked} here; expected {CHAT}, {', '.join(pages)}", 404)
            answer = await self.chat(body, reader, writer)
        except BadRequest as bad:
            self.counts["bad"] += 1
            message, status = bad.args
            answer = error(status, message)
        if answer is None:
            return False
        writer.write(answer)
        await skip(reader, unread)  # a client that is still sending has not looked yet
        return keep and length is not None

    def pages(self):
        model = {"id": NAME, "object": "model", "created": 0, "owned_by": "toy/server.py"}
        return {
            "GET /v1/models": {"object": "list", "data": [model]},
            "GET /health": {"status": "ok"},
            "GET /stats": self.counts,
        }

    async def chat(self, body, reader, writer):
        """The response to a chat request; None: it gets none, and the connection ends."""
        shares = self.faults.values()
        none = max(0, 1 - sum(shares))
        fault = self.dice.choices([*self.faults, None], [*shares, none])[0]
        # drawn in any case, so that --latency changes no other draw
        wait = self.args.latency * self.dice.uniform(0.5, 1.5)
        if wait:
            await asyncio.sleep(wait)
        if reader.at_eof():  # the client has left: this is no attempt
            self.counts["hung_up"] += 1
            return None
        if fault not in (None, "refusal"):
            self.counts["faults"][fault] += 1
            return await self.fail(fault, reader, writer)
        try:
            request = json.loads(body)
        except (ValueError, RecursionError) as problem:
            raise BadRequest(f"the body is not JSON: {problem}", 400) from None
        text, images = text_and_images(last_user_content(request))
        reply = self.reply(text.strip(), images, request.get("seed"), fault)
        self.counts["answered"] += 1
        return response(200, completion(request, reply, text))

    async def fail(self, fault, reader, writer):
        if fault == "reset":  # lingering for 0 seconds: the kernel sends RST instead of FIN
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
            return None
        if fault == "hang":
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reader.read(), self.args.hang)  # until the client gives up
            return None
        complete = json.dumps(completion({}, REFUSAL)).encode()
        retry_after = f"Retry-After: {self.args.retry_after:g}"
        return {
            "429": error(429, "too many requests (a planted fault)"),
            "429_after": error(429, "too many requests (a planted fault)", retry_after),
            "500": error(500, "internal error (a planted fault)"),
            "html": response(200, HTML, kind="text/html"),
            "empty": response(200, completion({}, "") | {"choices": []}),
            "truncated": response(200, complete[: len(complete) // 2]),
        }[fault]

    def reply(self, text, images, seed, fault):
        """What is said to a request; it is counted."""
        if pair := stand_in.JUDGING.fullmatch(text):
            return self.annotate(pair, images, seed, fault)
        question = stand_in.CONSISTENCY.fullmatch(text)
        single = stand_in.CRITIQUE.fullmatch(text)
        if question is None and single is None:
            expected = "JUDGING_PROMPT, CRITIQUE_PROMPT (core/pairs.py) or CONSISTENCY_PROMPT"
            raise BadRequest(f"expected {expected} (judge.py), filled in, as the text", 400)
        if fault:
            self.counts["faults"][fault] += 1
            return REFUSAL
        if question:
            answer = stand_in.consistent(question["reasoning"], question["choice"])
            self.counts["judge"][answer] += 1
            return answer
        self.counts["critic"] += 1
        item = stand_in.item_of_answer(self.key, single["question"], images, single["answer"])
        if item is None:
            return UNKNOWN
        index = item["answers"].index(single["answer"])
        return stand_in.critique(item, index, seed or 0, self.args)

    def annotate(self, pair, images, seed, fault):
        answers = [pair["answer1"], pair["answer2"]]
        item = stand_in.item_of_pair(self.key, pair["question"], images, answers)
        if item:
            attempt = self.count_attempt(item, answers, seed)
        if fault:
            self.counts["faults"][fault] += 1
            return REFUSAL
        if not item:
            self.counts["unknown"] += 1
            return UNKNOWN
        shown = [item["answers"].index(answer) for answer in answers]
        text, outcome, manner = stand_in.verdict(item, shown, attempt, self.args)
        self.counts[outcome] += 1
        self.counts["manner"][manner] += 1
        return text

    def count_attempt(self, item, answers, seed):
        """The number of this attempt, from 0."""
        shown = (item["key"], *answers)
        before = self.attempts.get(shown, 0)
        self.attempts[shown] = before + 1
        attempt = before if seed is None else seed
        name = str(attempt) if 0 <= attempt < 10 else "other"  # a seed may be any integer
        self.counts["attempt"][name] = self.counts["attempt"].get(name, 0) + 1
        return attempt


def check_head(asked, length, pages):
    if length is None:
        raise BadRequest("expected HTTP/1.1 with a Content-Length", 400)
    if length > MAX_BODY:
        raise BadRequest(f"the body has {length} bytes; expected at most {MAX_BODY}", 413)


async def skip(reader, count):
    while count:
        part = await reader.read(min(count, 2**20))
        if not part:
            return
        count -= len(part)


def main():
    p = parser()
    args = p.parse_args()
    try:
        server = Server(args)
    except (InputError, OSError, OverflowError) as problem:  # a bad key, shares, port
        p.error(str(problem))
    end = threading.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: end.set())
    print(f"listening on {server.url}", flush=True)
    end.wait()
    server.close()
    print(json.dumps(server.stats, indent=1))


if __name__ == "__main__":
    main()
