"""viewer/try.html in a real browser: asked of a server that answers by rule, and of a real vLLM."""

import asyncio
import base64
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from urllib.parse import urlencode

import pytest
from conftest import ROOT, children_of, http_server, png, send, unused_port, wait_until_gone
from test_lenient import OUTPUTS
from test_viewer import Browser, needs_browser

from core.endpoint import PLAIN_SAMPLING
from core.pairs import JUDGING_PROMPT
from stable_reinforce import parse

PAGE = ROOT / "viewer" / "try.html"
ANSWERS = re.compile(r"\[Response 1\]: (.*); \[Response 2\]: (.*)\n\nOutput", re.DOTALL)


def test_the_page_asks_what_every_stage_asks():
    text = PAGE.read_text()
    assert f'<script type="text/plain" id="prompt">{JUDGING_PROMPT}</script>' in text
    assert "http" not in text.replace("http://127.0.0.1:8000/v1", "")


def stream(handler, pieces):
    """The pieces of a reply, as servers stream them."""
    handler.send_response(200)
    handler.send_header("Content-Type", "text/event-stream")
    handler.send_header("Access-Control-Allow-Origin", "*")
    handler.end_headers()
    for piece in pieces:
        event = {"choices": [{"index": 0, "delta": {"content": piece}}]}
        handler.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
    handler.wfile.write(b"data: [DONE]\n\n")


def the_longer_wins(handler, request):
    text = request["messages"][0]["content"][-1]["text"]
    first, second = ANSWERS.search(text).groups()
    choice = 1 if len(first) > len(second) else 2
    stream(
        handler, ["<think>The longer ", f"one is {choice}.</think><ans", f"wer>{choice}</answer>"]
    )


def always_the_first(handler, request):
    stream(handler, ["<think>Why not.</think><answer>1</answer>"])


def no_such_model(handler, _):
    send(handler, b"no such model", 404, Access_Control_Allow_Origin="*")


def hang_up(handler, _):
    handler.connection.close()


def fill(question, answers):
    """JavaScript that fills the form."""
    lines = [f"form.question.value = {json.dumps(question)}"]
    lines += ["addAnswer()"] * (len(answers) - 2)
    for number, answer in enumerate(answers):
        lines.append(f"answerBoxes()[{number}].value = {json.dumps(answer)}")
    return "; ".join(lines)


async def judged(browser, link, question, answers, picture=None):
    """What the page shows in the end."""
    await browser.open(link, selector="#answers textarea")
    await browser.js(fill(question, answers))
    if picture:
        await browser.js(f"pictures = [{json.dumps(picture)}]; showPictures()")
    await browser.js("document.querySelector('#judge').click()")
    await browser.wait_for("!find('#judge').disabled")
    return await browser.text("#status"), await browser.text("#result")


def ask(tmp_path, respond, answers, picture=None, **query):
    """(status, result, the requests that a stand-in server got)."""
    requests = []

    def note(handler, request):
        requests.append(request)
        respond(handler, request)

    async def look(url):
        async with Browser(tmp_path) as browser:
            link = f"{PAGE.as_uri()}?{urlencode({'url': url, 'model': 'm'} | query)}"
            await browser.be_a_phone()
            found = await judged(browser, link, "Which is it?", answers, picture)
            assert await browser.js("document.documentElement.scrollWidth") == 400
            return found

    with http_server(note) as url:
        status, result = asyncio.run(look(url))
    return status, result, requests


@pytest.mark.slow
@needs_browser
def test_two_answers_are_judged_in_both_orders(tmp_path):
    picture = "data:image/png;base64," + base64.b64encode(png()).decode()
    status, result, requests = ask(tmp_path, the_longer_wins, ["short", "longer"], picture, votes=2)
    assert status == "4 judgements"
    assert result.startswith("Answer 2 is better; votes: 0 for answer 1, 4 for answer 2, 0 without")
    assert "both orders of the answers agree" in result
    assert len(requests) == 4
    asked = Counter()  # the requests come in any order
    for request in requests:
        image, text = request["messages"][0]["content"]
        assert image["image_url"]["url"] == picture
        asked[text["text"]] += 1
    orders = [("short", "longer"), ("longer", "short")]
    expected = [
        JUDGING_PROMPT.format(question="Which is it?", answer1=first, answer2=second)
        for first, second in orders
    ]
    assert asked == dict.fromkeys(expected, 2)
    assert {name: requests[0][name] for name in PLAIN_SAMPLING} == PLAIN_SAMPLING
    assert (requests[0]["model"], requests[0]["temperature"]) == ("m", 1)


@pytest.mark.slow
@needs_browser
def test_a_judge_that_likes_the_first_place_decides_nothing(tmp_path):
    _, result, _ = ask(tmp_path, always_the_first, ["a", "b"])
    assert result.startswith("Undecided; votes: 1 for answer 1, 1 for answer 2")
    assert "the two orders do not agree" in result


@pytest.mark.slow
@needs_browser
def test_several_answers_are_ranked_by_duels(tmp_path):
    answers = ["aa", "aaaa", "a", "aaa"]
    status, result, requests = ask(tmp_path, the_longer_wins, answers)
    assert status == "12 judgements"
    assert len(requests) == 12
    places = re.search(r"12100 %.*2467 %.*3133 %.*430 %", result)  # place, answer, duels won
    assert places, result


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize(
    ("respond", "message"),
    [
        (no_such_model, "status 404: no such model"),
        (hang_up, "does not answer"),
    ],
)
def test_an_error_is_said(tmp_path, respond, message):
    status, result, _ = ask(tmp_path, respond, ["a", "b"])
    assert message in status
    assert result == ""


@pytest.mark.slow
@needs_browser
def test_the_page_reads_verdicts_as_training_does(tmp_path):
    texts = [text for text, _ in OUTPUTS]

    async def look():
        async with Browser(tmp_path) as browser:
            await browser.open(PAGE.as_uri(), selector="#answers textarea")
            return await browser.js(f"{json.dumps(texts)}.map(verdictOf)")

    found = asyncio.run(look())
    assert found == [parse(text).choice for text in texts]
    assert {1, 2, None} == set(found)


@contextlib.contextmanager
def make_try(model):
    """The link that `make try` prints, while its server runs."""
    environment = os.environ | {"MODEL": model, "PORT": str(unused_port())}
    environment |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ROOT / "viewer" / "try.sh"
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stdout:
                if line.startswith("try: open "):
                    yield line.removeprefix("try: open ").strip()
                    break
        finally:
            server = children_of(process.pid)
            process.terminate()
            process.wait()
    wait_until_gone(server, seconds=30)


@pytest.mark.slow
@needs_browser
def test_make_try_prints_a_link_to_a_page_that_asks_a_real_vllm(tmp_path):
    async def look(link):
        async with Browser(tmp_path) as browser:
            picture = "data:image/png;base64," + base64.b64encode(png((56, 56))).decode()
            return await judged(browser, link, "Which?", ["red", "blue"], picture)

    with make_try("toy/weak") as link:
        assert re.match(r"http://127.0.0.1:\d+/try.html\?url=http://127.0.0.1:\d+/v1&model=", link)
        status, result = asyncio.run(look(link))
    assert status == "2 judgements"
    assert "votes:" in result


def test_make_try_says_what_it_needs(tmp_path):
    (tmp_path / "viewer").mkdir()
    script = shutil.copy(ROOT / "viewer" / "try.sh", tmp_path / "viewer")
    done = subprocess.run(
        [script], capture_output=True, text=True, env={"PATH": os.environ["PATH"]}
    )
    assert done.returncode == 1
    assert "run make toy first, or name one" in done.stderr
