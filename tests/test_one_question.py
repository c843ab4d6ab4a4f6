"""evaluate.py --question: one question in the shell, asked of a stand-in for a server."""

import json
import re

import pytest
from conftest import ROOT, completion, http_server, png, send
from test_layout import commands, shell_blocks

import evaluate
from core.files import InputError

ANSWERS = re.compile(r"\[Response 1\]: (.*); \[Response 2\]: (.*)\n\nOutput", re.DOTALL)
ASK = ["--question", "Which?", "--answers"]


def answers_in(request):
    """The two answers in the order in which a judge is shown them."""
    return ANSWERS.search(request["messages"][0]["content"][-1]["text"]).groups()


def the_longer(handler, request):
    first, second = answers_in(request)
    choice = 1 if len(first) > len(second) else 2
    send(handler, completion(f"<think>{choice} is longer.</think><answer>{choice}</answer>"))


def always_the_first(handler, request):
    send(handler, completion("<think>Why not.</think><answer>1</answer>"))


def no_verdict(handler, request):
    send(handler, completion("I cannot tell."))


def printed(capsys, respond, *words):
    with http_server(respond) as url:
        evaluate.main(["--model", "m", "--base_url", url, *words])
    return capsys.readouterr().out


def test_a_clear_question(capsys):
    out = printed(capsys, the_longer, *ASK, "Two.", "Three.")
    assert out == (
        "Answer 1 was shown first, answer 2 second; answer 2 is the better one:\n"
        "<think>2 is longer.</think><answer>2</answer>\n\n"
        "Answer 2 was shown first, answer 1 second; answer 2 is the better one:\n"
        "<think>1 is longer.</think><answer>1</answer>\n\n"
        "Answer 2 is better; votes: 0 for answer 1, 2 for answer 2, 0 without a verdict; "
        "both orders of the answers agree.\n"
    )


@pytest.mark.parametrize(
    "respond, words, conclusion",
    [
        (always_the_first, [], "Undecided; votes: 1 for answer 1, 1 for answer 2, 0 without"),
        (always_the_first, [], "the two orders of the answers do not agree."),
        (no_verdict, [], "Undecided; votes: 0 for answer 1, 0 for answer 2, 2 without a verdict"),
        (no_verdict, [], "second; no verdict:"),
        (the_longer, ["--samples", "6"], "votes: 0 for answer 1, 6 for answer 2, 0 without"),
        (the_longer, ["--orders", "dataset"], "only one order of the answers was judged."),
    ],
)
def test_what_is_said_of_the_votes(capsys, respond, words, conclusion):
    assert conclusion in printed(capsys, respond, *ASK, "Two.", "Three.", *words)


def test_one_json_object(capsys):
    out = printed(capsys, the_longer, *ASK, "Two.", "Three.", "--json")
    assert out.count("\n") == 1
    found = json.loads(out)
    judgements = found.pop("judgements")
    reasoning = "<think>2 is longer.</think><answer>2</answer>"
    assert found == {
        "choice": 2,
        "probability": 1.0,
        "votes": [0, 2, 0],
        "reasoning": reasoning,
        "orders_agree": True,
    }
    assert judgements[0] == {"first": 1, "second": 2, "better": 2, "text": reasoning}
    assert (judgements[1]["first"], judgements[1]["better"]) == (2, 2)


def test_more_answers_are_ranked(capsys):
    answers = ["aa", "aaaa", "a"]
    out = printed(capsys, the_longer, *ASK, *answers)
    assert out.endswith("answer  duels won\n2       100%\n1       50%\n3       0%\n")
    found = json.loads(printed(capsys, the_longer, *ASK, *answers, "--json"))
    assert [place["answer"] for place in found["ranking"]] == [2, 1, 3]
    assert len(found["judgements"]) == 6


def test_the_command_of_the_readme(capsys, tmp_path, monkeypatch):
    """As it stands there, but of a server."""
    readme = shell_blocks((ROOT / "README.md").read_text())
    (words,) = [words for _, words in commands(readme, "") if "--question" in words]
    (tmp_path / "street.jpg").write_bytes(png(kind="JPEG"))
    monkeypatch.chdir(tmp_path)
    assert "Answer 2 is better" in printed(capsys, the_longer, *words)
    assert {path.name for path in tmp_path.iterdir()} == {"street.jpg"}


def test_a_server_that_does_not_answer_is_one_line():
    def refuse(handler, request):
        send(handler, b"no such model", 404)

    with http_server(refuse) as url, pytest.raises(InputError, match="no such model"):
        evaluate.main(["--model", "m", "--base_url", url, *ASK, "a", "b"])
