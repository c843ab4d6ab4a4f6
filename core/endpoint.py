"""One client for OpenAI-compatible servers. What is not the model's doing never becomes a reply."""

import asyncio
import base64
import io
import json
import os
import re
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

from core.files import InputError


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

    def __init__(self, reason, refused=False):
        super().__init__(reason)
        self.reason = reason
        self.refused = refused  # the server will not take this request, however often it is sent


class Endpoint:
    """An OpenAI-compatible server. Its key is OPENAI_API_KEY; one on this machine needs none."""

    def __init__(
        self, base_url, timeout=180, retries=12, url_flag="--base_url", model_flag="--model"
    ):
        import openai

        self.key = os.environ.get("OPENAI_API_KEY")
        if not self.key:
            host = urlparse(base_url).hostname or ""
            if not re.fullmatch(r"localhost|127(\.\d+){3}|::1", host):
                raise InputError(
                    f"OPENAI_API_KEY is not set, and {base_url} is not on this machine; "
                    "run: export OPENAI_API_KEY=..."
                )
            self.key = "EMPTY"
        self.retries = retries
        self.retried = Counter()  # what was sent again, by reason
        self.flags = f"OPENAI_API_KEY, {url_flag} and {model_flag}"
        # The client itself repeats what fails by rate limits, server errors, timeouts and broken
        # connections, and waits as long as Retry-After says.
        self.client = openai.AsyncOpenAI(
            base_url=base_url, api_key=self.key, timeout=timeout, max_retries=retries
        )

    async def ask(self, model, turns, **fields):
        """A Reply, or NoReply. A refusal by the model is a reply like any other."""
        for attempt in range(self.retries + 1):
            if attempt > 0:
                self.retried["reply was not a chat completion"] += 1
                await asyncio.sleep(min(8, 0.5 * 2**attempt))
            body = await self._send(model, turns, fields)
            reply = parse_completion(body)
            if reply is not None:
                return reply
        raise NoReply(f"no reply after {self.retries + 1} tries: none was a chat completion")

    async def _send(self, model, turns, fields):
        """The bytes of the response."""
        import openai

        try:
            response = await self.client.chat.completions.with_raw_response.create(
                model=model, messages=turns, extra_body=fields
            )
        except openai.APIStatusError as error:
            raise self._status_failure(error) from None
        except openai.APIConnectionError as error:  # a timeout is one, too
            failure = f"{type(error).__name__}, {error.__cause__!r}"
            raise self._failure_after_retries(failure) from None
        if response.retries_taken:
            self.retried["request failed"] += response.retries_taken
        return response.http_response.content

    def _status_failure(self, error):
        status = error.status_code
        reason = str(error).replace(self.key, "***")
        if status in (401, 403, 404):
            return InputError(f"{self.client.base_url}: {reason}; check {self.flags}")
        if status < 500 and status not in (408, 409, 429):
            return NoReply(reason, refused=True)
        return self._failure_after_retries(reason)

    def _failure_after_retries(self, reason):
        self.retried["request failed"] += self.retries
        return NoReply(f"no reply after {self.retries + 1} tries, the last failure: {reason}")


def parse_completion(body):
    """The Reply in the bytes of a chat completion; None if they are HTML, half of one, ..."""
    try:
        completion = json.loads(body)
        choice = completion["choices"][0]
        message = choice["message"]
        usage = completion.get("usage") or {}
        reply = Reply(
            text=message.get("content") or message.get("refusal") or "",
            finish=choice.get("finish_reason"),
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            completion_tokens=int(usage.get("completion_tokens") or 0),
        )
        if choice.get("logprobs"):
            content = choice["logprobs"].get("content") or []
            reply.tokens = [token["token"] for token in content]
            reply.top_logprobs = [_options(token["top_logprobs"]) for token in content]
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    return reply if isinstance(reply.text, str) else None


def _options(top_logprobs):
    return {option["token"]: float(option["logprob"]) for option in top_logprobs}


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
    """A picture's file as it is, or as a smaller JPEG if it is too large or of a rare kind."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.format in ("PNG", "JPEG", "WEBP") and image.width * image.height <= max_pixels:
                data, mime = Path(path).read_bytes(), Image.MIME[image.format]
            else:
                data, mime = _small_jpeg(image, max_pixels, quality), "image/jpeg"
    except Exception as error:  # a damaged file raises OSError, SyntaxError, struct.error, ...
        raise InputError(
            f"{path} cannot be read as a picture any more ({error!r}); restore it and run again"
        ) from None
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def _small_jpeg(image, max_pixels, quality):
    from PIL import Image, ImageOps

    scale = min(1, (max_pixels / (image.width * image.height)) ** 0.5)
    upright = ImageOps.exif_transpose(image).convert("RGB")
    size = [max(1, int(side * scale)) for side in upright.size]
    file = io.BytesIO()
    upright.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=quality)
    return file.getvalue()
