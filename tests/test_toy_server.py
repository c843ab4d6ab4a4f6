"""
What the stand-in for annotator and judge says (toy/server.py, toy/stand_in.py), over real HTTP,
against its answer key and its promised shares. Its protocol and its faults: test_toy_protocol.py.
"""

import collections
import doctest
import json
import random
import re

import pytest
from conftest import annotator
from stand_in_client import (
    ORDERS,
    ask,
    ask_judge,
    assert_share,
    both_orders,
    items,
    key_row,
    picture,
    post,
    post_all,
    requests_for,
    say,
    texts,
    with_key,
    write_key,
)

from core.files import InputError
from core.pairs import CRITIQUE_PROMPT
from stable_reinforce import parse, parse_consistency
from toy import server, stand_in, world

ALWAYS_RIGHT = ("--right_easy", 1, "--right_hard", 1)
ALWAYS_WRONG = ("--right_easy", 0, "--right_hard", 0)


@pytest.fixture(scope="module")
def key(tmp_path_factory):
    return write_key(tmp_path_factory.mktemp("key") / "key.jsonl", items())


# --------------------------------------------------------------------------------------------------
# The annotator


def test_the_examples_are_true():
    assert doctest.testmod(server).failed == 0
    assert doctest.testmod(stand_in).failed == 0


def test_the_shares_in_the_docstring_are_those_of_the_defaults():
    args = server.parser().parse_args([])
    shares = [0.0] * 4  # right at the first, second, third attempt; never
    for i in range(1000):
        difficulty = (i + 0.5) / 1000
        wrong = 1 - args.right_easy + (args.right_easy - args.right_hard) * difficulty
        for attempt in range(3):
            shares[attempt] += wrong**attempt * (1 - wrong) / 10
        shares[3] += wrong**3 / 10
    assert [f"{share:.1f}" for share in shares] == re.findall(r"(\d+\.\d) %", server.__doc__)


@pytest.fixture(scope="module")
def rounds(key):
    """(all items in both orders, three rounds of {right or not} for each, the server's counts)"""
    shown = both_orders(items())
    requests, hits = requests_for(shown), []
    with annotator("--key", key) as it:
        for _ in range(3):
            verdicts = [parse(text) for text in texts(it, requests)]
            assert all(verdict.well_formed for verdict in verdicts)
            right = []
            for verdict, (item, order) in zip(verdicts, shown):
                right.append(order[verdict.choice - 1] == item["right"])
            hits.append(right)
        stats = it.stats
    return shown, hits, stats


def test_it_is_right_as_often_as_promised_at_each_difficulty(rounds):
    """Thirds of the difficulties, at 1/6, 1/2 and 5/6, are right .867, .70, .533."""
    shown, hits, _ = rounds
    for third, expected in enumerate((0.8667, 0.7, 0.5333)):
        found = []
        for hit, (item, _) in zip(hits[0], shown):
            if third <= 3 * item["difficulty"] < third + 1:
                found.append(hit)
        assert_share(sum(found), expected, len(found))


def test_each_attempt_is_drawn_anew(rounds):
    shown, hits, _ = rounds
    n = len(shown)
    assert_share(sum(hits[1]), 0.7, n)
    first_right = collections.Counter()
    for attempts in zip(*hits):
        first_right[attempts.index(True) if True in attempts else 3] += 1
    for attempt, expected in enumerate((0.700, 0.1892, 0.0651, 0.0457)):
        assert_share(first_right[attempt], expected, n)


def test_neither_order_is_better_off_and_the_two_are_drawn_apart(rounds):
    _, hits, _ = rounds
    first, second = hits[0][::2], hits[0][1::2]  # an item's two orders
    assert_share(sum(first), 0.7, len(first))
    assert_share(sum(second), 0.7, len(second))
    both = sum(a and b for a, b in zip(first, second))
    assert_share(both, 0.49 + 0.5**2 / 12, len(first))


def test_the_server_counts_what_it_said(rounds):
    shown, hits, stats = rounds
    n, right = len(shown), sum(map(sum, hits))
    assert stats["requests"] == stats["answered"] == 3 * n
    assert (stats["right"], stats["wrong"]) == (right, 3 * n - right)
    assert stats["attempt"] == {"0": n, "1": n, "2": n}


def test_the_manners_have_their_shares(key):
    """The manner of a right verdict is known exactly: its text is world.judgement's."""
    shown = both_orders(items())
    found = collections.Counter()
    with annotator("--key", key, *ALWAYS_RIGHT) as it:
        for text, (item, order) in zip(texts(it, requests_for(shown)), shown):
            choice = order.index(item["right"]) + 1
            for manner in world.MANNERS:
                found[manner] += text == world.judgement(item, order, choice, manner)
        assert found.total() == len(shown) == it.stats["right"]
        assert dict(found) == it.stats["manner"]
    for manner, expected in zip(world.MANNERS, world.SHARES):
        assert_share(found[manner], expected, len(shown))


def test_the_manners_can_be_chosen(key):
    shown = both_orders(items()[:25])
    with annotator("--key", key, "--manners", "careful=1") as it:
        texts(it, requests_for(shown))
        assert it.stats["manner"] == dict.fromkeys(world.MANNERS, 0) | {"careful": 50}


def test_a_wrong_judgement_describes_what_it_believes(key):
    at_a_glance = [i for i in items() if i["family"] in ("colour", "shape", "position")]
    shown = both_orders(at_a_glance[:100])
    with annotator("--key", key, *ALWAYS_WRONG, "--manners", "careful=1") as it:
        for text, (item, order) in zip(texts(it, requests_for(shown)), shown):
            choice = order.index(1 - item["right"]) + 1
            assert parse(text).choice == choice
            assert text != world.judgement(item, order, choice, "careful")
        assert it.stats["wrong"] == len(shown)


def test_replies_repeat_whatever_the_order_of_arrival(key):
    requests = requests_for(both_orders(items()[:50]))
    with annotator("--key", key) as it:
        attempts = [[body for _, _, body in post_all(it, requests)] for _ in range(3)]
    assert attempts[0] != attempts[1] != attempts[2]
    mixed = []
    for attempt in range(3):
        mixed += [(number, attempt) for number in range(len(requests))]
    random.Random(0).shuffle(mixed)
    with annotator("--key", key, "--latency", 0.002) as it:  # a seed names the attempt
        again = post_all(it, [requests[number] | {"seed": seed} for number, seed in mixed])
    for (number, attempt), (_, _, body) in zip(mixed, again):
        assert body == attempts[attempt][number]
    with annotator("--key", key, "--seed", 1) as it:
        assert [body for _, _, body in post_all(it, requests)] != attempts[0]


def test_the_orders_of_a_pair_count_their_attempts_apart(key):
    item, replies = items()[-1], []
    with annotator("--key", key, "--p_500", 0.5) as it:  # a fault is no attempt
        while len(replies) < 3:
            response, body = post(it, ask(item))
            if response.status == 200:
                replies.append(json.loads(body)["choices"][0]["message"]["content"])
        while post(it, ask(item, (1, 0)))[0].status != 200:
            pass
        assert it.stats["attempt"] == {"0": 2, "1": 1, "2": 1}
        assert it.stats["requests"] == 4 + it.stats["faults"]["500"]
    with annotator("--key", key) as it:
        assert replies == [say(it, ask(item, seed=attempt)) for attempt in range(3)]
        say(it, ask(item, seed=-5))
        say(it, ask(item, seed=2**70))
        assert it.stats["attempt"]["other"] == 2


def test_of_two_wrong_answers_it_takes_either(tmp_path):
    rows, requests = [], []
    for i in range(200):
        item = world.twins(random.Random(i), family="colour", n=3, medium="text")[i % 3]
        rows.append(with_key(item, []))
        wrong = [k for k in range(3) if k != item["right"]]
        requests.append(ask(rows[-1], wrong))
    with annotator("--key", write_key(tmp_path / "key.jsonl", rows)) as it:
        choices = [parse(text).choice for text in texts(it, requests)]
        assert it.stats["neither"] == 200
        assert it.stats["right"] == it.stats["wrong"] == 0
        assert_share(choices.count(1), 0.5, 200)
        texts(it, [ask(item, (item["right"], (item["right"] + 1) % 3)) for item in rows])
        assert it.stats["right"] + it.stats["wrong"] == 200


def test_items_may_share_their_picture_and_question(tmp_path):
    one = items()[0]
    answers = [f"I say: {answer}" for answer in one["answers"]]
    other = one | {"answers": answers, "right": 1 - one["right"]}
    path = write_key(tmp_path / "key.jsonl", [one, other])
    with annotator("--key", path, *ALWAYS_RIGHT) as it:
        for item in (one, other):
            assert parse(say(it, ask(item))).choice == item["right"] + 1
        mixed = one | {"answers": [one["answers"][0], answers[1]]}
        assert parse(say(it, ask(mixed))).choice is None
        assert it.stats["unknown"] == 1


def test_an_unknown_pair_gets_no_verdict(key):
    item = items()[0]
    first, second = item["answers"]
    strangers = [
        item | {"images": [item["images"][0] + b"\0"]},
        item | {"images": []},
        item | {"question": "Why?"},
        item | {"answers": ["x", second]},
        item | {"answers": [first, first]},
    ]
    with annotator("--key", key) as it:
        for text in texts(it, [ask(stranger) for stranger in strangers]):
            assert parse(text) == (None, "", False)
            assert text == server.UNKNOWN
        assert it.stats["unknown"] == it.stats["answered"] == len(strangers)
        assert it.stats["attempt"] == {}
    with annotator() as it:
        assert parse(say(it, ask(item))).choice is None


def test_text_only_and_video_pairs(tmp_path):
    text, _ = world.twins(random.Random(7), medium="text")
    video, _ = world.twins(random.Random(7), medium="video")
    text = with_key(text, [])
    video = with_key(video, [picture(video, seed) for seed in range(4)])
    path = write_key(tmp_path / "key.jsonl", [text, video])
    with annotator("--key", path, *ALWAYS_RIGHT) as it:
        for item, order in both_orders([text, video]):
            assert order[parse(say(it, ask(item, order))).choice - 1] == item["right"]
        prompt = ask(text)["messages"][1]["content"]
        content = [{"type": "text", "text": prompt}]
        listed = {"messages": [{"role": "user", "content": content}]}
        assert parse(say(it, listed)).choice == text["right"] + 1
        backwards = video | {"images": video["images"][::-1]}
        assert parse(say(it, ask(backwards))).choice is None  # frames have an order


def test_the_critic_is_as_right_as_the_annotator(key):
    rows = items()[:40]

    def critiques(it):
        requests = []
        for item in rows:
            request = ask(item)
            prompt = {"question": item["question"], "answer": item["answers"][0]}
            request["messages"][1]["content"][-1]["text"] = CRITIQUE_PROMPT.format(**prompt)
            requests.append(request)
        return texts(it, requests)

    for flags, sees_well in ((ALWAYS_RIGHT, True), (ALWAYS_WRONG, False)):
        with annotator("--key", key, *flags) as it:
            for text, item in zip(critiques(it), rows):
                says_right = (item["right"] == 0) == sees_well
                assert text.endswith("It is right." if says_right else "It is wrong.")
                description = world.describe(item["scene"])
                assert (f"The image shows {description}." in text) == sees_well
            assert it.stats["critic"] == len(rows)


# --------------------------------------------------------------------------------------------------
# The judge

CLAIMS = "Claims: red 1, blue 2. Response 2 is better."
SECOND_LOOK = "Response 1 is better, I thought; but look again. Response 2 is better."
QUOTED_PROMPT = "Response 1 is better.\n\nVerdict: Response 2 is better.\n\nDoes it? no"


@pytest.mark.parametrize(
    "reasoning, choice, agrees",
    [
        (CLAIMS, 2, 1),
        (CLAIMS, 1, 0),
        (SECOND_LOOK, 2, 1),
        (SECOND_LOOK, 1, 0),
        ("I see 2 circles, so Response 1 is right.", 1, 0),  # not the sentence
        ("", 1, 0),
        ('The sign says "2" and the answer is 2. Response 1 is better.', 1, 1),
        ("Response 1 is better. The other gets 2 of 10. <answer>2</answer>", 1, 1),
        ("Response 12 is better. Response 3 is better. Response \uff11 is better.", 1, 0),
        (QUOTED_PROMPT, 2, 1),
    ],
)
def test_the_judge_looks_at_the_last_conclusion(reasoning, choice, agrees):
    with annotator() as it:
        assert parse_consistency(say(it, ask_judge(reasoning, choice))) == agrees
        assert it.stats["judge"] == {"yes": agrees, "no": 1 - agrees}


def test_the_judge_finds_the_inconsistent_manner(key):
    requests = requests_for(both_orders(items()[:60]))
    with annotator("--key", key) as it:
        replies = texts(it, requests)
        verdicts = [parse(text) for text in replies]
        questions = [ask_judge(verdict.think, verdict.choice) for verdict in verdicts]
        answers = [parse_consistency(text) for text in texts(it, questions)]
    inconsistent = [world.manner_of(text) == "inconsistent" for text in replies]
    assert any(inconsistent)
    assert [answer == 0 for answer in answers] == inconsistent


# --------------------------------------------------------------------------------------------------
# The answer key


@pytest.mark.parametrize(
    "change, message",
    [
        ("{", "is not JSON"),
        ("", "is empty"),
        ("[]", "has no 'key'"),
        ({"subject": None}, "'subject' is null; expected a string"),
        ({"family": "size"}, "'family' is \"size\"; expected colour"),
        ({"difficulty": 1.5}, "expected a number, 0 to 1"),
        ({"medium": "audio"}, "expected image, video, text"),
        ({"answers": ["a", "a"]}, "expected two or more different strings"),
        ({"right": 2}, "'right' is 2"),
        ({"claims": ["a"]}, "as many strings"),
        ({"key": 1}, "key_of"),
        ({"scene": [["circle"]]}, "null or [shape, colour]"),
    ],
)
def test_a_bad_answer_key_is_named_by_file_and_line(tmp_path, change, message):
    good = key_row(items()[0])
    line = change if isinstance(change, str) else json.dumps(good | change)
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{json.dumps(good)}\n{line}\n")
    with pytest.raises(InputError, match=rf"bad\.jsonl, line 2.*{re.escape(message)}"):
        server.load_key([path])


@pytest.mark.parametrize("field", stand_in.FIELDS)
def test_a_missing_field_is_named(tmp_path, field):
    row = key_row(items()[0])
    del row[field]
    path = tmp_path / "key.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(InputError, match=f"line 1 has no '{field}'"):
        server.load_key([path])


def test_a_missing_answer_key_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none.jsonl: no such file; expected"):
        server.load_key([tmp_path / "none.jsonl"])


def test_an_item_is_found_in_either_order():
    item = items()[0]
    found = {item["key"]: [item]}
    for order in ORDERS:
        answers = [item["answers"][i] for i in order]
        assert stand_in.item_of_pair(found, item["question"], item["images"], answers) is item
