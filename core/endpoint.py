"""One client for OpenAI-compatible servers. What is not the model's doing never becomes a reply."""

import asyncio
import base64
import email.utils
import io
import json
import math
import os
import random
import re
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from core.files import InputError
from core.pictures import is_plain, opened, upright_rgb

LARGEST_BODY = 32 * 2**20  # bytes of a response; 32,000 tokens with 5 alternatives each are 20 MB
LONGEST_TEXT = 2**20  # characters of a reply
MOST_TOKENS = 2**31  # that a server may claim to have read or written
LONGEST_RETRY_AFTER = 120.0  # seconds; a server that wants more is asked again after these
SILENCE = 5.0  # seconds until it is said what is being waited for
SILENCE_AGAIN = 600.0  # seconds until the same is said again
# What changes no distribution. A server such as vLLM's takes what is not stated from the model's
# generation_config.json; Qwen2.5-VL's makes all samples the same.
PLAIN_SAMPLING = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}


@dataclass
class Reply:
    text: str
    finish: str | None  # "stop", "length", ...
    prompt_tokens: int
    completion_tokens: int
    tokens: list[str] | None = None  # of the text; only if log-probabilities were asked for
    top_logprobs: list[dict] | None = None  # at each token: {what could be there: log-probability}


class NoReply(Exception):
    """A request that got no reply, for a reason that is not the model's."""

    def __init__(self, cause, detail="", refused=False, retry_after=None, message=""):
        self.cause = cause  # in words that are the same each time, such as "status 500"
        self.detail = detail  # what the server said, for example
        self.reason = f"{cause}: {detail}" if detail else cause
        self.refused = refused  # the server will not take this request, however often it is sent
        self.retry_after = retry_after  # seconds that the server asks for
        self.message = message  # all that the server said, which may hold anything
        super().__init__(self.reason)

    def refuses_field(self, name):
        return self.refused and re.search(rf"\b{name}\b", self.message) is not None


class Endpoint:
    """
    An OpenAI-compatible server. Its key is OPENAI_API_KEY; one on this machine needs none.

    A try takes at most `timeout` seconds in all, and what fails is sent again, `retries` times: by
    this class and not by OpenAI's client, which would wait without a word. Redirects are not
    followed, so that the key goes to no other server.

    Fields of a request, the later ones win: PLAIN_SAMPLING, except at OpenAI's server, which has no
    other defaults and does not know them all; those of the call; `request`. None removes a field.
    """

    def __init__(
        self,
        base_url,
        timeout=180,
        retries=12,
        request=None,
        url_flag="--base_url",
        model_flag="--model",
    ):
        import openai

        self.base_url = base_url
        self.url_flag = url_flag
        self.flags = f"OPENAI_API_KEY, {url_flag} and {model_flag}"
        self.key = read_key(base_url)
        self.timeout = timeout
        self.retries = retries
        self.request = request or {}
        is_openai = urlsplit(base_url).hostname == "api.openai.com"
        self.sampling = {} if is_openai else dict(PLAIN_SAMPLING)
        self.known_fields = set()  # of it, by the requests that were answered
        self.retried = Counter()  # what was sent again, by cause
        self.last_reply = time.monotonic()
        self.told = {}  # cause of a wait: when it was last printed
        http_client = openai.DefaultAsyncHttpxClient(
            timeout=None, follow_redirects=False, event_hooks={"response": [bound_size]}
        )
        self.client = openai.AsyncOpenAI(
            base_url=base_url,
            api_key=self.key or "EMPTY",
            max_retries=0,
            timeout=None,
            default_headers={"Accept-Encoding": "identity"},
            http_client=http_client,
        )

    async def ask(self, model, turns, **fields):
        """A Reply, or NoReply. A refusal by the model is a reply like any other."""
        start = time.monotonic()
        for attempt in range(self.retries + 1):
            try:
                return await self.ask_once(model, turns, **fields)
            except NoReply as problem:
                if problem.refused:
                    raise
                failure = problem
            if attempt < self.retries:
                await self._wait(failure, attempt, start)
        tries = f"no reply after {self.retries + 1} tries, the last failure: "
        raise NoReply(tries + failure.cause, failure.detail)

    async def ask_once(self, model, turns, **fields):
        """A Reply, or NoReply after a single try."""
        fields |= self.request
        while True:
            stated = {name: self.sampling[name] for name in self.sampling if name not in fields}
            sent = {name: value for name, value in (stated | fields).items() if value is not None}
            try:
                reply = await self._send(model, turns, sent)
            except NoReply as failure:
                if not self._leave_out_unknown(stated, failure):
                    raise
            else:
                self.known_fields.update(stated)
                return reply

    def _leave_out_unknown(self, stated, failure):
        """Whether the request was refused for fields of PLAIN_SAMPLING that the server lacks."""
        new = [name for name in stated if name not in self.known_fields]
        unknown = [name for name in new if failure.refuses_field(name)]
        for name in unknown:
            if self.sampling.pop(name, None) is not None:
                say(
                    f"{self.base_url} refuses the field {name}, which is left out from now on: a "
                    "default that the server has for it changes its samples"
                )
        return bool(unknown)

    async def _send(self, model, turns, fields):
        import openai

        timer = asyncio.get_running_loop().call_later(SILENCE, self._tell_of_silence)
        create = self.client.chat.completions.with_raw_response.create
        try:
            async with asyncio.timeout(self.timeout):
                response = await create(model=model, messages=turns, extra_body=fields)
        except TimeoutError:
            raise NoReply(f"no reply within {self.timeout:g} s") from None
        except openai.APIStatusError as error:
            raise self._status_failure(error.response) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            raise NoReply(type(cause).__name__, self._quote(str(cause))) from None
        finally:
            timer.cancel()
        body = response.http_response.content
        reply = parse_completion(body)
        if reply is None:
            quoted = self._quote(decoded(body))
            raise NoReply("the reply was not a chat completion", quoted)
        self.last_reply = time.monotonic()
        return reply

    def _status_failure(self, response):
        """What to raise for a status that is no success."""
        status = response.status_code
        failure = f"status {status}"
        message = error_message(response.content)
        said = self._quote(message)
        if status < 400:
            target = self._quote(response.headers.get("location", ""))
            return InputError(
                f"{self.base_url}: status {status}, a redirect to {target}. Redirects are not "
                f"followed; give the final address in {self.url_flag}"
            )
        if status in (401, 403, 404):
            return InputError(f"{self.base_url}: {failure}: {said}; check {self.flags}")
        if status < 500 and status not in (408, 409, 429):
            return NoReply(failure, said, refused=True, message=message)
        return NoReply(failure, said, retry_after=retry_after(response.headers.get("retry-after")))

    def _quote(self, text):
        """What a server sent, as the terminal may see it: one line, short, without the key."""
        return repr(mask(text[:2000], self.key)[:150])

    async def _wait(self, failure, attempt, start):
        """Waits before the next try: as long as the server asks for, or half a second to eight."""
        self.retried[failure.cause] += 1
        seconds = failure.retry_after
        if seconds is None:
            # not all at the same moment
            seconds = 2.0 ** min(attempt - 1, 3) * random.uniform(0.75, 1)
        if time.monotonic() - start + seconds > SILENCE:
            self._tell(failure.cause, f"{failure.reason}, again in {seconds:.0f} s")
        await asyncio.sleep(seconds)

    def _tell_of_silence(self):
        if time.monotonic() - self.last_reply >= SILENCE:
            self._tell("silence", "no reply yet")

    def _tell(self, cause, text):
        """Says what is being waited for, each cause once in ten minutes."""
        now = time.monotonic()
        if now - self.told.get(cause, -math.inf) < SILENCE_AGAIN:
            return
        self.told[cause] = now
        say(f"waiting for {self.base_url}: {text}")


def say(line):
    from tqdm import tqdm

    with tqdm.external_write_mode():  # a progress bar moves out of the way
        print(line, flush=True)


async def bound_size(response):
    """A hook of OpenAI's HTTP client: no response takes more memory than LARGEST_BODY."""
    import httpx2  # the HTTP library of OpenAI's client

    encoding = response.headers.get("content-encoding", "identity")
    if encoding != "identity":  # not asked for; a few of its bytes can become gigabytes
        raise NoReply(f"the reply was compressed ({encoding[:20]!r})")
    stream = response.stream

    class BoundedStream(httpx2.AsyncByteStream):
        async def __aiter__(self):
            size = 0
            async for part in stream:
                size += len(part)
                if size > LARGEST_BODY:
                    raise NoReply(f"the reply was larger than {LARGEST_BODY // 2**20} MB")
                yield part

        async def aclose(self):
            await stream.aclose()

    response.stream = BoundedStream()


def read_key(base_url):
    """OPENAI_API_KEY; None if it is not set, and the server is on this machine."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key:
        host = urlsplit(base_url).hostname or ""
        if re.fullmatch(r"localhost|127(\.\d+){3}|::1", host):
            return None
        raise InputError(
            f"OPENAI_API_KEY is not set, and {base_url} is not on this machine; "
            "run: export OPENAI_API_KEY=..."
        )
    if not re.fullmatch(r"[!-~]+", key) or re.search(r"[\"'\\]", key):
        raise InputError(
            "OPENAI_API_KEY holds a space, a line break or another character that no key has; "
            "set it again: export OPENAI_API_KEY=..."
        )
    return key


def mask(text, key):
    """
    The text without the key, and without any eight of its characters in a row.

    >>> mask("sent: Bearer sk-0123456789, known: sk-01234...", "sk-0123456789")
    'sent: Bearer ***, known: ***...'
    """
    if not key:
        return text
    text = text.replace(key, "***")
    for length in range(len(key) - 1, 7, -1):
        for first in range(len(key) - length + 1):
            text = text.replace(key[first : first + length], "***")
    return text


def retry_after(header):
    """
    The seconds that a Retry-After asks for, at most two minutes; None if it asks for nothing.

    >>> retry_after("30"), retry_after("1e9"), retry_after("Wed, 21 Oct 2115 07:28:00 GMT")
    (30.0, 120.0, 120.0)
    >>> [retry_after(header) for header in ("0", "nan", "soon", None)]
    [None, None, None, None]
    """
    try:
        seconds = float(header)
    except TypeError:
        return None
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return min(seconds, LONGEST_RETRY_AFTER) if seconds > 0 else None


def error_message(body):
    """What an OpenAI-compatible server says about an error, or the beginning of what was sent."""
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return decoded(body)
    return message if isinstance(message, str) else decoded(body)


def decoded(body):
    return body[:2000].decode(errors="replace")


def parse_completion(body):
    """The Reply in the bytes of a chat completion; None if they are HTML, half of one, ..."""
    try:
        completion = json.loads(body)
        choice = completion["choices"][0]
        message = choice["message"]
        usage = completion.get("usage") or {}
        reply = Reply(
            text=_text(message),
            finish=choice.get("finish_reason"),
            prompt_tokens=_count(usage.get("prompt_tokens")),
            completion_tokens=_count(usage.get("completion_tokens")),
        )
        if choice.get("logprobs"):
            content = choice["logprobs"].get("content") or []
            reply.tokens = [_token(token) for token in content]
            reply.top_logprobs = [_options(token["top_logprobs"]) for token in content]
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    return reply if isinstance(reply.finish, str | None) else None


def _text(message):
    text = message.get("content")
    if text in (None, ""):
        text = message.get("refusal") or ""
    if len(text) > LONGEST_TEXT:
        raise ValueError("no model writes this much")
    text.encode()  # fails for a list or a number, and for half of a surrogate pair
    return text


def _count(tokens):
    tokens = tokens or 0
    if not isinstance(tokens, int) or not 0 <= tokens < MOST_TOKENS:
        raise ValueError("no number of tokens")
    return tokens


def _token(token):
    if not isinstance(token["token"], str):
        raise TypeError("no token")
    return token["token"]


def _options(top_logprobs):
    options = {_token(option): float(option["logprob"]) for option in top_logprobs}
    if not all(-math.inf < logp < 1 for logp in options.values()):  # 0 but for rounding
        raise ValueError("no log-probability")
    return options


def cost(tokens_read, tokens_written, price):
    """
    The cost of a server's tokens; `price` is that of a million which it reads, and writes.

    >>> cost(1_000_000, 500_000, (2.5, 10))
    '$7.50 at $2.5 and $10 a million'
    """
    read, written = price
    dollars = (tokens_read * read + tokens_written * written) / 1e6
    return f"${dollars:,.2f} at ${read:g} and ${written:g} a million"


def background_loop():
    """An event loop that runs in a thread of its own until the process ends."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


# ------------------------------------------------------------------------------------------------
# Pictures


def to_openai(turns, max_pixels, max_frames):
    """Turns as an API takes them: pictures as data URLs, of a video at most `max_frames` frames."""
    converted = []
    for turn in turns:
        content = []
        for part in turn["content"]:
            content += _openai_parts(part, max_pixels, max_frames)
        converted.append(turn | {"content": content})
    return converted


def _openai_parts(part, max_pixels, max_frames):
    if part["type"] == "text":
        return [part]
    if part["type"] == "video":
        paths = evenly_spaced(part["video"], max_frames)
    else:
        paths = [part["image"]]
    urls = [data_url(path, max_pixels) for path in paths]
    return [{"type": "image_url", "image_url": {"url": url}} for url in urls]


def evenly_spaced(items, count):
    """
    At most `count` of the items, the first and the last among them.

    >>> evenly_spaced("abcdefg", 3), evenly_spaced("abc", 1), evenly_spaced("ab", 5)
    (['a', 'd', 'g'], ['a'], ['a', 'b'])
    """
    count = min(count, len(items))
    gaps = max(1, count - 1)
    return [items[i * (len(items) - 1) // gaps] for i in range(count)]


def data_url(path, max_pixels, quality=95):
    """A picture's file as it is, or a JPEG if it is too large, of a rare kind or not upright."""
    with opened(path) as image:
        small = image.width * image.height <= max_pixels
        if small and image.format in ("PNG", "JPEG", "WEBP") and is_plain(image):
            data, mime = Path(path).read_bytes(), image.get_format_mimetype()
        else:
            data, mime = _small_jpeg(upright_rgb(image), max_pixels, quality), "image/jpeg"
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def _small_jpeg(image, max_pixels, quality):
    from PIL import Image

    scale = min(1, (max_pixels / (image.width * image.height)) ** 0.5)
    size = [max(1, int(side * scale)) for side in image.size]
    file = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=quality)
    return file.getvalue()
