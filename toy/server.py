"""
A STAND-IN for the annotator (a large MLLM behind an API) and for the consistency judge: an OpenAI-compatible server on
loopback without any model. It sees nothing and reasons about nothing. The text of a request tells which part it plays:

  annotator   JUDGING_PROMPT filled in, after the pair's pictures as data URLs. The pair is looked up in an answer key, and
              the stand-in plays an MLLM that errs more where the picture is harder to see: right with probability
              --right_easy at difficulty 0, --right_hard at 1, linear between, drawn anew at each attempt. With the
              defaults, and difficulties uniform in 0 to 1, 70.0 % of the pairs are right at the first attempt, 18.9 % at
              the second, 6.5 % at the third; 4.6 % fail three times. When wrong it describes what a bad look believes
              (misread in toy/world.py). Of two wrong answers it takes either by a coin. A pair that is not in the key
              gets a sentence without a verdict.
  critic      CRITIQUE_PROMPT filled in, after the pictures: it errs alike, and ends with "It is right." or "It is wrong."
  judge       CONSISTENCY_PROMPT filled in: a rule. "yes" if the last "Response N is better" of the reasoning names the
              verdict's number, else "no".

Attempts count from 0: the requests answered before for the same pair in the same order, in this server's life; or the
request's `seed`, if it has one. A verdict depends on --seed, the pair as shown and the attempt, and on nothing else. Faults
are drawn apart from that, and but for a refusal they are no attempts. A token is a word.

$ python toy/server.py --key out/toy/key.jsonl --port 8010
$ python toy/server.py --key out/toy/key.jsonl --latency 0.05 --p_429_after 0.02 --p_reset 0.01 --p_refusal 0.01

POST /v1/chat/completions; GET /v1/models, /health, and /stats: what was asked, answered and broken so far, where
requests = answered + bad + hung_up (the client left before its answer) + all faults but refusals, which are answers.
In a test: server = Server(parser().parse_args(["--port", "0"])); server.url, server.stats, server.close().
"""
import argparse
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

if not __package__:  # run as a script: `toy` is found from the folder above
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from annotate import CRITIQUE_PROMPT, JUDGING_PROMPT
from judge import CONSISTENCY_PROMPT
from toy import world

NAME = "toy-stand-in"  # of the model that is not there
MAX_BODY = 64 * 2**20  # bytes
REFUSAL = "I'm sorry, but I can't help with comparing these two responses."
UNKNOWN = "I cannot tell which response is better: this pair is not in my answer key."
HTML = b"<!DOCTYPE html><html><body><h1>Service under maintenance</h1></body></html>"


def share(text):
    """A probability on the command line."""
    value = float(text)
    if not 0 <= value <= 1:  # NaN too
        raise argparse.ArgumentTypeError(f"{text} is no probability; legal: 0 to 1")
    return value


def seconds(text):
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no duration; legal: 0 or more seconds")
    return value


def manners(text):
    """
    Shares of the manners, those left out being 0.

    >>> manners("careful=.75,hasty=.25")
    {'hasty': 0.25, 'careful': 0.75, 'verbose': 0.0, 'inconsistent': 0.0}
    """
    legal = f"legal: name=share,... of {', '.join(world.MANNERS)}, each at most once, shares 0 to 1 that add up to 1"
    try:
        pairs = [(name.strip(), share(value)) for name, value in (part.split("=") for part in text.split(","))]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not name=share,...; {legal}")
    given = dict(pairs)
    if len(given) < len(pairs) or not set(given) <= set(world.MANNERS) or abs(sum(given.values()) - 1) > 1e-6:
        raise argparse.ArgumentTypeError(f"{text!r}; {legal}")
    return {name: given.get(name, 0.0) for name in world.MANNERS}


def parser():
    p = argparse.ArgumentParser(description="A stand-in for annotator and consistency judge, without any model.")
    g = p.add_argument_group("server")
    g.add_argument("--port", type=int, default=8010, help="on 127.0.0.1 and nowhere else; 0 = a free one, which is printed")
    g.add_argument("--seed", type=int, default=0, help="of verdicts, manners and faults")
    g = p.add_argument_group("annotator")
    g.add_argument("--key", nargs="+", action="extend", default=[], metavar="FILE",
                   help="answer keys (key.jsonl); none = every pair is unknown")
    g.add_argument("--right_easy", type=share, default=0.95, help="probability of the right verdict at difficulty 0")
    g.add_argument("--right_hard", type=share, default=0.45, help="the same at difficulty 1; linear between")
    g.add_argument("--manners", type=manners, default=",".join(f"{m}={s:g}" for m, s in zip(world.MANNERS, world.SHARES)),
                   help="shares of the manners of reasoning; the default is the toy world's")
    g = p.add_argument_group("faults of POST /v1/chat/completions; p_* are shares of the requests, at most 1 together")
    g.add_argument("--latency", type=seconds, default=0.0, help="mean seconds before an answer (uniform, 0.5 to 1.5 of it)")
    g.add_argument("--p_429", type=share, default=0.0, help="status 429 without Retry-After")
    g.add_argument("--p_429_after", type=share, default=0.0, help="status 429 with Retry-After: --retry_after")
    g.add_argument("--retry_after", type=seconds, default=1.0, help="seconds, for --p_429_after")
    g.add_argument("--p_500", type=share, default=0.0, help="status 500")
    g.add_argument("--p_reset", type=share, default=0.0, help="the connection is reset (TCP RST)")
    g.add_argument("--p_hang", type=share, default=0.0, help="nothing is sent for --hang seconds, then the connection ends")
    g.add_argument("--hang", type=seconds, default=60.0, help="seconds, for --p_hang")
    g.add_argument("--p_html", type=share, default=0.0, help="status 200 and an HTML page")
    g.add_argument("--p_empty", type=share, default=0.0, help='status 200 and "choices": []')
    g.add_argument("--p_truncated", type=share, default=0.0, help="status 200 and half a JSON body, declared as that long")
    g.add_argument("--p_refusal", type=share, default=0.0, help="status 200 and a refusal: an answer, and an attempt")
    return p


def fault_shares(args):
    faults = {"429": args.p_429, "429_after": args.p_429_after, "500": args.p_500, "reset": args.p_reset,
              "hang": args.p_hang, "html": args.p_html, "empty": args.p_empty, "truncated": args.p_truncated,
              "refusal": args.p_refusal}
    if sum(faults.values()) > 1 + 1e-9:
        raise ValueError(f"the --p_* add up to {sum(faults.values()):g}; legal: at most 1")
    return faults


# ---------------------------------------------------------------------------------------------------
# The answer key: one item of the toy world a line, with the key that its pictures and question give

strings = lambda v: isinstance(v, list) and all(isinstance(s, str) for s in v)
FIELDS = {  # field: (is it legal, what is)
    "key": (lambda v, row: isinstance(v, str), "a string, from key_of in toy/world.py"),
    "family": (lambda v, row: v in world.FAMILIES, ", ".join(world.FAMILIES)),
    "difficulty": (lambda v, row: type(v) in (int, float) and 0 <= v <= 1, "a number, 0 to 1"),
    "medium": (lambda v, row: v in ("image", "video", "text"), "image, video, text"),
    "answers": (lambda v, row: strings(v) and len(set(v)) == len(v) >= 2, "two or more different strings"),
    "claims": (lambda v, row: strings(v) and len(v) == len(row["answers"]), "as many strings as there are answers"),
    "right": (lambda v, row: type(v) is int and 0 <= v < len(row["answers"]), "the index of the right answer, from 0"),
    "scene": (lambda v, row: isinstance(v, list) and all(c is None or strings(c) and len(c) == 2 for c in v),
              "a list of null or [shape, colour]"),
    "subject": (lambda v, row: isinstance(v, str), "a string"),
}


def load_key(paths):
    """{key: [items]}; several items may share pictures and question."""
    items = {}
    for path in paths:
        try:
            lines = Path(path).read_bytes().splitlines()
        except OSError as error:
            raise ValueError(f"--key {path}: {error.strerror}; legal: a file with one JSON object a line")
        for number, line in enumerate(lines, 1):
            where = f"--key {path}: line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where} is not JSON ({error}); legal: one JSON object a line")
            for field, (check, legal) in FIELDS.items():
                if not isinstance(row, dict) or field not in row:
                    raise ValueError(f"{where} has no {field!r}; legal: an object with {', '.join(FIELDS)}")
                if not check(row[field], row):
                    raise ValueError(f"{where}: {field!r} is {json.dumps(row[field])}; legal: {legal}")
            row["scene"] = [cell and tuple(cell) for cell in row["scene"]]
            items.setdefault(row["key"], []).append(row)
    return items


# ---------------------------------------------------------------------------------------------------
# The two parts


def filled(template, **slots):
    """The pattern of a template whose {slots} are filled in."""
    pattern = re.escape(template)
    for name, what in slots.items():
        pattern = pattern.replace(re.escape("{" + name + "}"), f"(?P<{name}>{what})")
    return re.compile(pattern, re.DOTALL)


JUDGING = filled(JUDGING_PROMPT, question=".*?", answer1=".*?", answer2=".*?")
CRITIQUE = filled(CRITIQUE_PROMPT, question=".*?", answer=".*")
CONSISTENCY = filled(CONSISTENCY_PROMPT, reasoning=".*", choice="[12]")


def verdict(item, shown, attempt, args):
    """(the annotator's text, "right" or "wrong" or "neither", its manner); shown = two indices of item["answers"]."""
    rng = random.Random(json.dumps([args.seed, item["key"], *(item["answers"][i] for i in shown), attempt]))  # by SHA-512
    right = rng.random() < args.right_easy + (args.right_hard - args.right_easy) * item["difficulty"]
    coin = rng.choice((1, 2))  # all three are drawn in any case, so that no option shifts another's draw
    manner = rng.choices(list(args.manners), args.manners.values())[0]
    outcome, choice = "neither", coin
    if item["right"] in shown:
        best = shown.index(item["right"]) + 1
        outcome, choice = ("right", best) if right else ("wrong", 3 - best)
    taken, left = shown[choice - 1], shown[2 - choice]
    seen = None if taken == item["right"] else world.misread(item, [taken, left], rng)  # makes the first wrong one true
    return world.judgement(item, shown, choice, manner, seen), outcome, manner


def critique(item, i, attempt, args):
    """What a critic says of answer i: what it sees (a bad look believes the opposite), what the answer claims, is it right."""
    rng = random.Random(json.dumps([args.seed, item["key"], "critique", item["answers"][i], attempt]))
    well = rng.random() < args.right_easy + (args.right_hard - args.right_easy) * item["difficulty"]
    right = (i == item["right"]) == well
    other = rng.choice([k for k in range(len(item["answers"])) if k != i])
    scene = item["scene"] if well else world.misread(item, [i, other if i == item["right"] else item["right"]], rng)
    place = {"image": "The image", "video": "The video", "text": "The picture"}[item["medium"]]
    return f"{place} shows {world.describe(scene)}. Claim: {item['claims'][i]}. It is {'right' if right else 'wrong'}."


def consistent(reasoning, choice):
    """
    The judge's rule.

    >>> consistent("Response 1 is better. No: Response 2 is better, it says 1.", "2"), consistent("I like 2.", "2")
    ('yes', 'no')
    """
    return "yes" if re.findall("Response ([12]) is better", reasoning)[-1:] == [choice] else "no"


# ---------------------------------------------------------------------------------------------------
# What a client sends, and what it gets


class Bad(Exception):
    """A request that is the client's fault: (message, HTTP status)."""


def check(request):
    """A chat request -> the content of its last user message."""
    if not isinstance(request, dict) or not isinstance(request.get("messages"), list):
        raise Bad('the body is no chat request; legal: a JSON object with "messages": [...]', 400)
    for name, legal in dict(n=(None, 1), stream=(None, False), logprobs=(None, False), top_logprobs=(None, 0)).items():
        if request.get(name) not in legal:
            raise Bad(f"{name} is {json.dumps(request[name])}; not supported, leave it out: there is one whole reply", 400)
    for name, least in dict(max_tokens=1, max_completion_tokens=1, seed=float("-inf")).items():
        value = request.get(name)
        if value is not None and not (type(value) is int and value >= least):
            raise Bad(f"{name} is {json.dumps(value)}; legal: an integer{', 1 or more' if least == 1 else ''}", 400)
    users = [m for m in request["messages"] if isinstance(m, dict) and m.get("role") == "user"]
    return users[-1].get("content") if users else None


def text_and_images(content):
    """The text and the pictures' bytes of a message, which is a string, or pictures first and then one text."""
    try:
        *pictures, last = [{"text": content}] if isinstance(content, str) else content
        urls = [p["image_url"]["url"].split(";base64,") for p in pictures]
        last["text"].encode()  # a lone surrogate, which JSON can hold, has no bytes
        if not all(kind.startswith("data:") for kind, _ in urls):
            raise ValueError
        return last["text"], [base64.b64decode(data, validate=True) for _, data in urls]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise Bad("the last user message is neither a string nor a list of image_url parts (data:...;base64,... URLs; "
                  "nothing is fetched) that ends with its only text part", 400)


def completion(request, said, prompt=""):
    """A chat.completion. Nothing in it is of this moment: the same request and reply give the same bytes."""
    limit = request.get("max_completion_tokens") or request.get("max_tokens")
    words = said.split()
    cut = limit is not None and len(words) > limit
    message = {"role": "assistant", "content": " ".join(words[:limit]) if cut else said}
    n, m = len(prompt.split()), limit if cut else len(words)
    return {"id": "chatcmpl-" + hashlib.sha256((prompt + said).encode()).hexdigest()[:24], "object": "chat.completion",
            "created": 0, "model": request.get("model") or NAME,
            "choices": [{"index": 0, "message": message, "finish_reason": "length" if cut else "stop"}],
            "usage": {"prompt_tokens": n, "completion_tokens": m, "total_tokens": n + m}}


def response(status, body, *headers, kind="application/json"):
    """The bytes of an HTTP response; body: bytes, or what becomes JSON."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", f"Content-Type: {kind}", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + body


def error(status, message, *headers):
    kind = {429: "rate_limit_error", 500: "server_error"}.get(status, "invalid_request_error")
    body = {"error": {"message": f"{NAME}: {message}", "type": kind, "param": None, "code": None}}
    return response(status, body, *headers)


def read_head(head):
    """
    The bytes before the body -> (method and path, length of the body, does the connection go on).
    A length of None: where the body ends is not known.

    >>> read_head(b"GET /stats?all HTTP/1.1\\r\\nConnection: close\\r\\n\\r\\n")
    ('GET /stats', 0, False)
    """
    first, *lines = head.decode("latin-1").strip().split("\r\n")
    headers = {name.lower(): value.strip().lower() for name, _, value in (line.partition(":") for line in lines)}
    asked, _, version = first.rpartition(" ")
    length = headers.get("content-length", "0")
    known = version.startswith("HTTP/1.") and "transfer-encoding" not in headers and re.fullmatch("[0-9]{1,18}", length)
    keep = headers.get("connection", "close" if version == "HTTP/1.0" else "keep-alive") != "close"
    return asked.split("?")[0], int(length) if known else None, keep


# ---------------------------------------------------------------------------------------------------


class Server:
    """Runs in a thread of its own until close(). All state belongs to that thread's event loop, so nothing is locked."""

    def __init__(self, args):
        self.args, self.faults, self.key = args, fault_shares(args), load_key(args.key)
        self.attempts = {}  # (key, answer 1, answer 2): answered so far
        self.dice = random.Random(f"faults {args.seed}")
        self.counts = dict.fromkeys(("requests", "answered", "bad", "hung_up", "right", "wrong", "neither", "unknown"), 0)
        self.counts |= {"manner": dict.fromkeys(world.MANNERS, 0), "attempt": {}, "judge": {"yes": 0, "no": 0}, "critic": 0,
                        "faults": dict.fromkeys(self.faults, 0)}
        self.socket = socket.create_server(("127.0.0.1", args.port))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/v1"
        self.ready = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self.run()), daemon=True)
        self.thread.start()
        self.ready.wait()

    @property
    def stats(self):
        return {name: dict(n) if isinstance(n, dict) else n for name, n in self.counts.items()}

    def close(self):
        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(self.stop.set)
            self.thread.join()

    async def run(self):
        self.loop, self.stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self.connection, sock=self.socket, backlog=1024)
        self.ready.set()
        await self.stop.wait()
        server.close()  # asyncio.run cancels the open connections as it ends

    async def connection(self, reader, writer):
        """One client: request after request, until either side ends it."""
        try:
            while await self.exchange(reader, writer):
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.CancelledError):
            pass  # the client has left or sends no HTTP, or close() was called
        finally:
            writer.close()

    async def exchange(self, reader, writer):
        """Reads one request and answers it; True: the connection goes on."""
        asked, length, keep = read_head(await reader.readuntil(b"\r\n\r\n"))
        models = {"object": "list", "data": [{"id": NAME, "object": "model", "created": 0, "owned_by": "toy/server.py"}]}
        pages = {"GET /v1/models": models, "GET /health": {"status": "ok"}, "GET /stats": self.counts}
        if asked in pages and length == 0:
            writer.write(response(200, pages[asked]))
            return keep
        self.counts["requests"] += 1
        left = length or 0  # bytes of the body not read yet
        try:
            if length is None:
                raise Bad("legal: HTTP/1.1 with a Content-Length", 400)
            if length > MAX_BODY:
                raise Bad(f"the body has {length} bytes; legal: up to {MAX_BODY}", 413)
            body, left = await reader.readexactly(length), 0
            if asked != "POST /v1/chat/completions":
                raise Bad(f"there is no {asked}; legal: POST /v1/chat/completions, {', '.join(pages)}", 404)
            answer = await self.chat(body, reader, writer)
        except Bad as bad:
            self.counts["bad"] += 1
            message, status = bad.args
            answer = error(status, message)
        if answer is None:
            return False
        writer.write(answer)
        while left and (part := await reader.read(min(left, 2**20))):  # a client that is still sending has not looked yet
            left -= len(part)
        return keep and length is not None

    async def chat(self, body, reader, writer):
        """The response to one chat request; None: it gets none, and the connection ends."""
        args, shares = self.args, self.faults.values()
        fault = self.dice.choices([*self.faults, None], [*shares, max(0, 1 - sum(shares))])[0]
        wait = args.latency * self.dice.uniform(0.5, 1.5)  # drawn in any case: --latency changes no other draw
        if wait:
            await asyncio.sleep(wait)
        if reader.at_eof():  # it timed out and went: what nobody hears is no attempt
            self.counts["hung_up"] += 1
            return None
        if fault not in (None, "refusal"):
            self.counts["faults"][fault] += 1
            return await self.fail(fault, reader, writer)
        try:
            request = json.loads(body)
        except (ValueError, RecursionError) as problem:
            raise Bad(f"the body is not JSON: {problem}", 400)
        text, images = text_and_images(check(request))
        said = self.say(text.strip(), images, request.get("seed"), fault)
        self.counts["answered"] += 1
        return response(200, completion(request, said, text))

    async def fail(self, fault, reader, writer):
        args = self.args
        whole = json.dumps(completion({}, REFUSAL)).encode()
        if fault == "reset":  # lingering for 0 seconds: the kernel sends RST in place of FIN
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
            return None
        if fault == "hang":
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reader.read(), args.hang)  # it ends sooner if the client gives up
            return None
        return {
            "429": error(429, "too many requests (a planted fault)"),
            "429_after": error(429, "too many requests (a planted fault)", f"Retry-After: {args.retry_after:g}"),
            "500": error(500, "internal error (a planted fault)"),
            "html": response(200, HTML, kind="text/html"),
            "empty": response(200, completion({}, "") | {"choices": []}),
            "truncated": response(200, whole[:len(whole) // 2]),
        }[fault]

    def say(self, text, images, seed, fault):
        """What is said to a request, and counted."""
        counts, asked, pair = self.counts, CONSISTENCY.fullmatch(text), JUDGING.fullmatch(text)
        single = CRITIQUE.fullmatch(text)
        if asked is None and pair is None and single is None:
            raise Bad("the text is neither JUDGING_PROMPT nor CRITIQUE_PROMPT of annotate.py nor CONSISTENCY_PROMPT of judge.py, "
                      "filled in", 400)
        if single and not fault:
            known = [(item, item["answers"].index(single["answer"])) for item in self.key.get(world.key_of(single["question"], images), ())
                     if single["answer"] in item["answers"]]
            counts["critic"] += 1
            return critique(*known[0], seed or 0, self.args) if known else UNKNOWN
        item = None
        if pair:
            key = world.key_of(pair["question"], images)
            both = [pair["answer1"], pair["answer2"]]
            item = next((i for i in self.key.get(key, ()) if both[0] != both[1] and set(both) <= set(i["answers"])), None)
        if item:
            before = self.attempts.get((key, *both), 0)
            self.attempts[key, *both] = before + 1
            attempt = before if seed is None else seed
            name = str(attempt) if 0 <= attempt < 10 else "other"  # a seed may be any integer
            counts["attempt"][name] = counts["attempt"].get(name, 0) + 1
        if fault:
            counts["faults"][fault] += 1
            return REFUSAL
        if asked:
            said = consistent(asked["reasoning"], asked["choice"])
            counts["judge"][said] += 1
            return said
        if not item:
            counts["unknown"] += 1
            return UNKNOWN
        said, outcome, manner = verdict(item, [item["answers"].index(a) for a in both], attempt, self.args)
        counts[outcome] += 1
        counts["manner"][manner] += 1
        return said


def main():
    p = parser()
    args = p.parse_args()
    try:
        server = Server(args)
    except (ValueError, OSError, OverflowError) as problem:  # a bad key, shares above 1, a port that is taken or none
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
