"""What a judge is asked: prompts by name, prompts of one's own, and how their verdicts are read."""

import http.server
import json
import threading
from pathlib import Path

import pytest
from conftest import png
from evaluation import args_of, judged, make_row, says

import evaluate
from core.files import InputError
from core.judge_prompt import NAMES, load_prompt
from core.judgements import Protocol, digest
from core.judging import collect
from core.pairs import JUDGING_PROMPT, Pair, judging_turns
from viewer.report import results_table

RELEASED = Path(__file__).resolve().parents[2] / "shared/real/prompt/released.json"
GOOD = """
text = '''Q: {question} A: {answer1} B: {answer2} as {"verdict": "[[A]]"}'''
pictures = "after"
verdicts = ["[[A]]", "[[B]]"]
max_pixels = 1000
max_new_tokens = 50
"""


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text(GOOD)
    return path


def test_the_paper_is_asked_as_in_training():
    pair = Pair("x", "s", "{answer1} {}?", ["a.png"], None, ["{question}", "b"], 1)
    for swapped in (False, True):
        assert load_prompt("paper").turns(pair, swapped) == judging_turns(pair, swapped)
    text = judging_turns(pair)[0]["content"][-1]["text"]
    assert text == JUDGING_PROMPT.format(
        question="{answer1} {}?", answer1="{question}", answer2="b"
    )
    assert load_prompt("paper").digest() == digest(JUDGING_PROMPT)


@pytest.mark.skipif(not RELEASED.is_file(), reason="no real rows here")
def test_the_released_checkpoint_is_asked_as_its_authors_did():
    real = json.loads(RELEASED.read_text())
    row = real["row"]
    answers = [row["chosen"], row["rejected"]]
    pair = Pair(row["id"], "s", row["prompt"], [row["image"]], None, answers, 1)
    (turn,) = load_prompt("r1_reward").turns(pair)
    assert [part["type"] for part in turn["content"]] == real["content_order"]
    assert turn["content"][1]["text"] == real["released_text"]
    args = args_of("--prompt", "r1_reward")
    assert args.max_pixels == real["max_pixels"] and args.max_new_tokens == real["max_new_tokens"]


def test_flags_go_before_what_a_prompt_was_published_with(own):
    args = args_of("--prompt", own, "--max_new_tokens", 70)
    assert (args.max_new_tokens, args.max_pixels) == (70, 1000)
    args = args_of()
    assert (args.max_new_tokens, args.max_pixels) == (4096, None)


def test_a_prompt_of_ones_own(own):
    prompt = load_prompt(str(own))
    pair = Pair("x", "s", "Q", ["a.png"], None, ["a", "b"], 1)
    text, image = prompt.turns(pair, swapped=True)[0]["content"]
    assert text["text"] == 'Q: Q A: b B: a as {"verdict": "[[A]]"}'
    assert image["type"] == "image"
    found = [prompt.choice_of(text) for text in ("A is right. [[A]]", "<think>[[A]]</think> [[B]]")]
    assert found == [1, 2]
    for text in ("[[A]] or [[B]]", "A", "<answer>1</answer>", "<think>[[A]]", "[[C]]"):
        assert prompt.choice_of(text) is None


@pytest.mark.parametrize(
    "old, new, problem",
    [
        ("{answer2}", "{answer_b}", "'text' is .*; expected a string with {question}, {answer1}"),
        ("after", "below", '\'pictures\' is "below"; expected "before" or "after"'),
        ('"[[B]]"', '"[[A]]."', "'verdicts' is .*none of them in the other"),
        ("1000", "0", "'max_pixels' is 0; expected a whole number"),
        ("max_pixels", "pixels", "'pixels' is none of text, pictures, verdicts"),
        ("text =", "# text =", "has no 'text'"),
        ("50", "", "Invalid value .at line 6"),
    ],
)
def test_a_prompt_that_is_not_taken_is_named(own, old, new, problem):
    own.write_text(GOOD.replace(old, new))
    with pytest.raises(InputError, match=f"--prompt .*own.toml.*{problem}") as error:
        args_of("--prompt", own)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_prompt_that_is_nowhere_is_told_with_the_names():
    assert NAMES == ("paper", "r1_reward")
    with pytest.raises(
        InputError, match=r"--prompt r1: No such file .*; expected paper, r1_reward"
    ):
        args_of("--prompt", "r1")


def test_a_run_belongs_to_its_prompt(tmp_path, own):
    benches = {"pairs": [make_row(0)]}
    done = judged(benches["pairs"], Protocol("both", 2), lambda *_: says(1))

    def check(*words):
        evaluate.check_or_write_config(args_of("--out", tmp_path, *words), benches, done)
        return json.loads((tmp_path / "config.json").read_text())

    assert check()["prompt"] == digest(JUDGING_PROMPT)
    assert "prompt_name" not in check("--prompt", "paper")
    for other in ("r1_reward", own):
        with pytest.raises(InputError, match="prompt was"):
            check("--prompt", other, "--max_pixels", 9, "--max_new_tokens", 4096)


def test_a_run_that_is_scored_again_tells_its_prompt(tmp_path, capsys):
    args = args_of("--out", tmp_path, "--prompt", "r1_reward", "--samples", 2)
    evaluate.check_or_write_config(args, {"pairs": [make_row(0)]}, {})
    again = args_of("--score_only", "--out", tmp_path)
    assert (again.prompt, again.max_pixels, again.samples) == ("r1_reward", 501_760, 2)
    result = {"about": {"rows": 0, "rows left out, not judged to the end": 1}, "left_out": []}
    results = {"args": vars(again), "benches": {"pairs": result | {"lines": {}}}}
    assert "orders: both, prompt: r1_reward" in results_table(results)


class SaysB(http.server.BaseHTTPRequestHandler):
    asked = ()

    def do_POST(self):
        SaysB.asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        choice = {"message": {"content": "So. [[B]]"}, "finish_reason": "stop"}
        body = json.dumps({"choices": [choice], "usage": {}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_a_server_is_asked_and_read_by_the_prompt(tmp_path, own):
    (tmp_path / "a.png").write_bytes(png())
    row = make_row(0)
    row.images = [str(tmp_path / "a.png")]
    done = {}
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), SaysB) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        args = args_of("--base_url", url, "--prompt", own, "--samples", 2)
        collect([row], evaluate.make_backend(args), done, evaluate.protocol_of(args))
        asked = SaysB.asked
        decision = evaluate.Judge("m", base_url=url, prompt=own, orders="dataset")(
            "Q", [], "a", "b"
        )
        server.shutdown()
    assert [judgement.choice for judgement in done.values()] == [2, 2]
    assert (decision.choice, decision.reasoning) == (2, "So. [[B]]")
    content = asked["messages"][0]["content"]
    assert [part["type"] for part in content] == ["text", "image_url"]
    assert asked["max_completion_tokens"] == 50
