"""The pages of viewer/ in a real browser, and Table 9."""

import asyncio
import json
import shutil
import subprocess

import pytest
from evaluation import VL, judged, make_row, says, toy_rows

from core.files import InputError
from core.judgements import Protocol
from core.lists import duel_rows
from viewer.pages import page_items, tally_votes, write_blind_vote, write_page

TWO = Protocol("both", samples=2)


NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"
)
BROWSER_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--remote-debugging-port=0",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)


class Browser:
    """A headless Chromium that reaches this machine alone, driven over its debugging protocol."""

    def __init__(self, folder):
        self.folder = folder
        self.commands = 0

    async def __aenter__(self):
        import aiohttp

        profile = self.folder / "profile"
        self.process = subprocess.Popen(
            [CHROMIUM, *BROWSER_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        port = await self.read_port(profile / "DevToolsActivePort")
        self.session = aiohttp.ClientSession()
        async with self.session.get(f"http://127.0.0.1:{port}/json") as reply:
            tabs = await reply.json()
        page = next(tab for tab in tabs if tab["type"] == "page")
        url = page["webSocketDebuggerUrl"]
        self.socket = await self.session.ws_connect(url, max_msg_size=0)
        return self

    async def read_port(self, file):
        for _ in range(300):
            if file.exists() and len(file.read_text().split()) == 2:
                return file.read_text().split()[0]
            await asyncio.sleep(0.1)
        raise AssertionError("the browser did not start")

    async def __aexit__(self, *_):
        await self.session.close()
        self.process.kill()
        self.process.wait()

    async def send(self, method, **params):
        self.commands += 1
        await self.socket.send_json({"id": self.commands, "method": method, "params": params})
        while True:
            reply = await self.socket.receive_json(timeout=60)
            if reply.get("id") == self.commands:
                assert "error" not in reply, reply
                return reply["result"]

    async def be_a_phone(self):
        size = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
        await self.send("Emulation.setDeviceMetricsOverride", **size)

    async def open(self, link, selector="#place"):
        await self.send("Page.enable")
        await self.send("Page.navigate", url=link)
        await self.wait_for(f"!!document.querySelector({selector!r})")

    async def wait_for(self, condition):
        for _ in range(600):
            if await self.js(f"document.readyState === 'complete' && {condition}"):
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"not within 30 s: {condition}")

    async def js(self, code):
        result = await self.send("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def text(self, selector):
        return await self.js(f"document.querySelector({selector!r}).textContent")

    async def select(self, index, value):
        """Chooses an entry, by its text or its number, in one of the menus."""
        what = "selectedIndex" if isinstance(value, int) else "value"
        await self.js(
            f"{{ const menu = document.querySelectorAll('nav select')[{index}];"
            f" menu.{what} = {value!r}; menu.dispatchEvent(new Event('change')); }}"
        )

    async def key(self, letter):
        await self.send("Input.dispatchKeyEvent", type="keyDown", key=letter, text=letter)
        await self.send("Input.dispatchKeyEvent", type="keyUp", key=letter, text="")


TRICKY_TEXT = "Wait, re-reading the question. </script><b>&amp;</b>"


def judge_of_every_kind(row, order, sample):
    """Right, the same whatever the order, wrong, doubting in markup, or cut off."""
    better = 3 - row.choice if order else row.choice
    kind = row.row % 5
    if kind == 3:
        return {"text": f"<think>{TRICKY_TEXT}</think><answer>{better}</answer>"}
    if kind == 4:
        return {"text": "<think>on and on", "tokens": 99, "finish": "length"}
    return says((better, 1, 3 - better)[kind])


@pytest.mark.slow
@needs_browser
def test_the_page_filters_by_click_and_key(toy, tmp_path):
    benches = toy_rows(toy, tmp_path, words=["--limit", 10])
    done = {}
    for rows in benches.values():
        done |= judged(rows, TWO, judge_of_every_kind)
    path = tmp_path / "page.html"
    write_page(path, "a <title> & more", page_items(benches, done, 10), blind=False)
    text = path.read_text()
    assert "http" not in text and text.count("</script>") == 1
    assert "<title>a &lt;title&gt; &amp; more</title>" in text

    async def look():
        async with Browser(tmp_path) as browser:
            await browser.open(path.as_uri())
            assert await browser.text("#place") == "1 of 40"
            assert await browser.text("h1") == "a <title> & more"
            images = "[...document.images]"
            assert await browser.js(f"{images}.length > 0")
            assert await browser.js(f"{images}.every(i => i.complete && i.naturalWidth === 56)")
            for letter in "jjk":
                await browser.key(letter)
            assert await browser.text("#place") == "2 of 40"
            for name, count in (
                ("errors", 24),
                ("flips with the order", 8),
                ("self-corrections", 8),
                ("no verdict or truncated", 8),
                ("all", 40),
            ):
                await browser.select(0, name)
                assert await browser.text("#place") == f"1 of {count}", name
                if name == "self-corrections":
                    assert TRICKY_TEXT in await browser.text("main")
            await browser.select(1, 4)
            assert await browser.text("#place") == "1 of 10"
            # a link opens its row, whatever is filtered; the address is a link to what is shown
            await browser.js("location.hash = '#row=VL-RewardBench/2'")
            await browser.wait_for("place.textContent === '3 of 40'")
            assert await browser.js("document.querySelector('select').value") == "all"
            await browser.key("j")
            assert await browser.js("location.hash") == "#row=VL-RewardBench/3"
            await browser.js("location.hash = '#row=VL-RewardBench/99'")
            await browser.wait_for("place.textContent === 'none'")
            assert "row=VL-RewardBench/99 is not on this page" in await browser.text("main")

    asyncio.run(look())


def look_at(tmp_path, items, *questions, link=""):
    """What JavaScript expressions are on a page of these items, at the width of a phone."""
    path = tmp_path / "page.html"
    write_page(path, "judgements", items, blind=False)

    async def look():
        async with Browser(tmp_path) as browser:
            await browser.be_a_phone()
            await browser.open(path.as_uri() + link)
            return [await browser.js(question) for question in questions]

    return asyncio.run(look())


TABLE = (
    "[...document.querySelectorAll('{} tr')].map(row => [...row.children].map(c => c.innerText))"
)
WIDTH = "document.documentElement.scrollWidth"


@pytest.mark.slow
@needs_browser
def test_the_page_counts_equal_texts_and_shows_votes_and_baselines(tmp_path):
    """Five judgements are right, two wrong and one without verdict; the longer answer is wrong."""
    row = make_row(7, choice=1, responses=("short", "much longer"))

    def rule(row, order, sample):
        choices = ((1, 1, 2, 1), (2, 2, 1, None))
        return says(choices[order][sample])

    items = page_items({"pairs": [row]}, judged([row], Protocol("both", samples=8), rule), 10)
    votes, texts, width = look_at(
        tmp_path,
        items,
        TABLE.format(".votes"),
        "[...document.querySelectorAll('main > div > p')].map(p => p.textContent)",
        WIDTH,
    )
    assert votes == [
        ["votes for", "answer 1, better", "answer 2", "no verdict"],
        ["answer 1 shown first", "3", "1", "0"],
        ["answer 2 shown first", "2", "1", "1"],
        ["the longer answer", "", "wrong", ""],
        ["the first answer", "right", "", ""],
    ]
    assert texts == [
        "answer 1 shown first: says 1, answer 1; 3 times, samples 0, 1, 3",
        "answer 1 shown first: says 2, answer 2; sample 2",
        "answer 2 shown first: says 2, answer 1; 2 times, samples 0, 1",
        "answer 2 shown first: says 1, answer 2; sample 2",
        "answer 2 shown first: no verdict; sample 3",
    ]
    assert width == 400


@pytest.mark.slow
@needs_browser
def test_a_list_is_one_item_with_its_ranking_and_its_duels(tmp_path):
    """The judge likes longer answers; the file ranks the third one first."""
    fields = {"question": "Q?", "images": [], "video": None, "bench": "lists", "groups": {}}
    answers = ["a" * 40, "bb" * 400, "c"]
    rows = duel_rows(answers, [2, 2, 1], number=4, id="x", source="", **fields)

    def the_longer(row, order, sample):
        first, second = row.responses[::-1] if order else row.responses
        return says(1 if len(first) > len(second) else 2)

    items = page_items({"lists": rows}, judged(rows, TWO, the_longer), 10)
    ranking, duels, about, width = look_at(
        tmp_path,
        items,
        TABLE.format("section table"),
        "[...document.querySelectorAll('summary')].map(s => [s.textContent, s.className])",
        "main.textContent",
        WIDTH,
        link="#row=lists/4",
    )
    assert [cells[:3] for cells in ranking[1:]] == [
        ["2", "100 %", "2"],
        ["1", "50 %", "2"],
        ["3", "0 %", "1"],
    ]
    assert duels == [
        ["answer 1 against answer 2, votes 0 to 2", "none"],
        ["answer 1 against answer 3, votes 2 to 0", "wrong"],
        ["answer 2 against answer 3, votes 2 to 0", "wrong"],
    ]
    assert "lists, list 4, x, : 0 of 4 judgements right" in about
    assert "the longest: answer 2; the first in the file: answer 1" in about
    assert width == 400
    (tmp_path / "partly").mkdir()
    partly = page_items({"lists": rows}, judged(rows[:2], TWO, the_longer), 10)
    (text,) = look_at(tmp_path / "partly", partly, "main.textContent")
    assert "as listed: not all duels are judged" in text
    assert "answer 2 against answer 3, not judged" in text


def reason_only(words):
    return lambda row, order, sample: {"text": f"<think>{words}</think><answer>1</answer>"}


@pytest.mark.slow
@needs_browser
def test_the_blind_vote_by_keyboard_saved_and_tallied(toy, tmp_path):
    """Table 9 from a browser: keys, closing the page in between, the saved file, the tally."""
    benches = toy_rows(toy, tmp_path, VL, "pairs", words=["--limit", 8])
    rows = benches[VL] + benches["pairs"]
    ours = judged(rows, TWO, reason_only("fine reasoning"))
    theirs = judged(rows, TWO, reason_only("poor reasoning"))
    write_blind_vote(tmp_path, benches, ours, theirs, limit=200, seed=0)
    key = json.loads((tmp_path / "ab_key.json").read_text())
    assert len(key) == 16 and set(key) == {"left", "right"}
    text = (tmp_path / "ab.html").read_text()
    data = text.split("const data")[1].split("\n")[0]
    assert "<answer>" not in text and "\\u003canswer" not in data and "model" not in data

    async def vote():
        async with Browser(tmp_path) as browser:
            download = {"behavior": "allow", "downloadPath": str(tmp_path)}
            await browser.send("Browser.setDownloadBehavior", **download)
            for items in (range(0, 9), range(9, 16)):
                await browser.open((tmp_path / "ab.html").as_uri())  # the second time it continues
                for item in items:
                    ours_is_left = (await browser.text("main .pair .box")).startswith("fine")
                    if item < 4:
                        await browser.key("s")
                    elif item < 15:
                        await browser.key("a" if ours_is_left else "d")
                    else:
                        await browser.key("d" if ours_is_left else "a")
            assert "16 voted" in await browser.text("#place")
            await browser.js("document.querySelector('#save').click()")
            for _ in range(100):
                if (tmp_path / "votes.json").exists():
                    return
                await asyncio.sleep(0.05)

    asyncio.run(vote())
    votes = tally_votes(key, [tmp_path / "votes.json"])
    expected = (68.8, 6.2, 25.0, 16)  # 11 wins, 1 loss, 4 ties
    assert votes["majority"] == votes[str(tmp_path / "votes.json")] == expected


def test_the_blind_vote_hides_verdicts_and_needs_shared_judgements(toy, tmp_path):
    benches = toy_rows(toy, tmp_path, "pairs", words=["--limit", 8])
    ours = judged(benches["pairs"], TWO, reason_only("ours"))
    write_blind_vote(tmp_path, benches, ours, dict(ours), limit=5, seed=0)
    text = (tmp_path / "ab.html").read_text()
    assert text.count('"item": ') == 5 and "answer\\u003e" not in text
    with pytest.raises(InputError, match="share no judgement"):
        write_blind_vote(tmp_path, benches, ours, {}, limit=5, seed=0)


def side_of(vote, our_side):
    """The side of the page that a win, loss or tie of ours is."""
    other = {"left": "right", "right": "left"}
    return {"win": our_side, "loss": other[our_side], "tie": "tie"}[vote]


def test_table_9_of_three_people(tmp_path):
    """145 wins, 25 losses, 30 ties of 200 by majority; where all three differ it is a tie."""
    key = ["left", "right"] * 100
    agreed = ["win"] * 145 + ["loss"] * 25 + ["tie"] * 20
    files = []
    for person, differs in enumerate(("tie", "win", "loss")):
        votes = {}
        for item, vote in enumerate(agreed + [differs] * 10):
            votes[str(item)] = side_of(vote, key[item])
        files.append(tmp_path / f"{person}.json")
        files[-1].write_text(json.dumps({"votes": votes}))
    assert tally_votes(key, files)["majority"] == (72.5, 12.5, 15.0, 200)
    files[0].write_text('{"votes": {"200": "left"}}')
    with pytest.raises(InputError, match="items 0 to 199"):
        tally_votes(key, files)
