"""
What the stand-in of toy/server.py says: as annotator, as critic, as consistency judge. It has no
model: it looks pairs up in an answer key, and draws its mistakes.
"""

import argparse
import json
import random
import re
from pathlib import Path

from core.files import InputError, jsonl_rows
from core.flags import number
from core.pairs import CRITIQUE_PROMPT, JUDGING_PROMPT
from judge import CONSISTENCY_PROMPT
from toy import world

# --------------------------------------------------------------------------------------------------
# The answer key: an item of the toy world on each line, found by its pictures and question


def is_text(value):
    return isinstance(value, str)


def is_texts(value):
    return isinstance(value, list) and all(is_text(text) for text in value)


def is_scene(value):
    if not isinstance(value, list):
        return False
    return all(cell is None or (is_texts(cell) and len(cell) == 2) for cell in value)


def is_difficulty(value):
    return type(value) in (int, float) and 0 <= value <= 1


def is_index(value, answers):
    return type(value) is int and 0 <= value < len(answers)


FIELDS = {  # field: (what is expected, the check of a value and the row's answers)
    "key": ("a string, from key_of in toy/world.py", lambda v, _: is_text(v)),
    "family": (", ".join(world.FAMILIES), lambda v, _: v in world.FAMILIES),
    "difficulty": ("a number, 0 to 1", lambda v, _: is_difficulty(v)),
    "medium": ("image, video, text", lambda v, _: v in list(world.SHOWS)),
    "answers": (
        "two or more different strings",
        lambda v, _: is_texts(v) and len(set(v)) == len(v) >= 2,
    ),
    "claims": (
        "as many strings as there are answers",
        lambda v, answers: is_texts(v) and len(v) == len(answers),
    ),
    "right": ("the index of the right answer, from 0", is_index),
    "scene": ("a list of null or [shape, colour]", lambda v, _: is_scene(v)),
    "subject": ("a string", lambda v, _: is_text(v)),
}


def load_key(paths):
    """{key: [items]}; several items may share pictures and question."""
    items = {}
    for path in paths:
        if not Path(path).is_file():
            raise InputError(f"--key {path}: no such file; expected one that toy/sources.py wrote")
        for where, row in jsonl_rows(path):
            item = checked_item(row, f"--key {where}")
            items.setdefault(item["key"], []).append(item)
    return items


def checked_item(row, where):
    for field, (expected, is_valid) in FIELDS.items():
        if not isinstance(row, dict) or field not in row:
            raise InputError(f"{where} has no {field!r}; expected {', '.join(FIELDS)}")
        if not is_valid(row[field], row.get("answers")):
            value = json.dumps(row[field])
            raise InputError(f"{where}: {field!r} is {value}; expected {expected}")
    scene = [None if cell is None else tuple(cell) for cell in row["scene"]]
    return row | {"scene": scene}


def item_of_pair(key, question, images, answers):
    """The item of the answer key that has these two answers, or None."""
    for item in key.get(world.key_of(question, images), ()):
        if answers[0] != answers[1] and set(answers) <= set(item["answers"]):
            return item
    return None


def item_of_answer(key, question, images, answer):
    for item in key.get(world.key_of(question, images), ()):
        if answer in item["answers"]:
            return item
    return None


# --------------------------------------------------------------------------------------------------
# What is asked


def filled(template, **slots):
    """The pattern of a template whose {slots} are filled in."""
    pattern = re.escape(template)
    for name, expression in slots.items():
        pattern = pattern.replace(re.escape("{" + name + "}"), f"(?P<{name}>{expression})")
    return re.compile(pattern, re.DOTALL)


JUDGING = filled(JUDGING_PROMPT, question=".*?", answer1=".*?", answer2=".*?")
CRITIQUE = filled(CRITIQUE_PROMPT, question=".*?", answer=".*")
CONSISTENCY = filled(CONSISTENCY_PROMPT, reasoning=".*", choice="[12]")

# --------------------------------------------------------------------------------------------------
# What is said


def manners(text):
    """
    The type of --manners. Shares that are left out are 0.

    >>> manners("careful=.75,hasty=.25")
    {'hasty': 0.25, 'careful': 0.75, 'verbose': 0.0, 'inconsistent': 0.0}
    """
    shares = dict.fromkeys(world.MANNERS, 0.0)
    parts = [part.partition("=") for part in text.split(",")]
    names = [name.strip() for name, _, _ in parts]
    valid = len(set(names)) == len(names) and set(names) <= set(world.MANNERS)
    share = number(0, 1)
    try:
        shares |= {name: share(value) for name, (_, _, value) in zip(names, parts)}
    except (ValueError, argparse.ArgumentTypeError):
        valid = False
    if not valid or abs(sum(shares.values()) - 1) > 1e-6:
        raise argparse.ArgumentTypeError(
            f"expected name=share,... of {', '.join(world.MANNERS)}, each at most once, with "
            f"shares that add up to 1, got {text!r}"
        )
    return shares


def add_flags(add):
    """How well the annotator sees, and how it reasons."""
    easy_help = "probability of the right verdict at difficulty 0"
    add("--right_easy", type=number(0, 1), default=0.95, help=easy_help)
    add(
        "--right_hard",
        type=number(0, 1),
        default=0.45,
        help="the same at difficulty 1; linear between",
    )
    default = ",".join(f"{m}={s:g}" for m, s in zip(world.MANNERS, world.SHARES))
    manners_help = "shares of the manners of reasoning; the default is the toy world's"
    add("--manners", type=manners, default=default, help=manners_help)


def sees_well(item, args, rng):
    """The harder a picture is to see, the rarer."""
    probability = args.right_easy + (args.right_hard - args.right_easy) * item["difficulty"]
    return rng.random() < probability


def verdict(item, shown, attempt, args):
    """
    (the annotator's text, "right" or "wrong" or "neither", its manner). shown: two indices of
    item["answers"], in the order in which they are shown.
    """
    answers = [item["answers"][i] for i in shown]
    rng = random.Random(json.dumps([args.seed, item["key"], *answers, attempt]))
    # all three are drawn in any case, so that no option changes another's draw
    right = sees_well(item, args, rng)
    coin = rng.choice((1, 2))
    manner = rng.choices(list(args.manners), args.manners.values())[0]
    if item["right"] not in shown:
        outcome, choice = "neither", coin
    else:
        best = shown.index(item["right"]) + 1
        outcome, choice = ("right", best) if right else ("wrong", 3 - best)
    chosen, other = (shown[0], shown[1]) if choice == 1 else (shown[1], shown[0])
    seen = None
    if chosen != item["right"]:  # it describes a scene in which its verdict would be right
        seen = world.misread(item, [chosen, other], rng)
    return world.judgement(item, shown, choice, manner, seen), outcome, manner


def critique(item, i, attempt, args):
    """What a critic says of answer i: what it sees, what the answer claims, whether it is right."""
    rng = random.Random(
        json.dumps([args.seed, item["key"], "critique", item["answers"][i], attempt])
    )
    well = sees_well(item, args, rng)
    right = (i == item["right"]) == well  # who sees badly believes the opposite
    other = rng.choice([k for k in range(len(item["answers"])) if k != i])
    scene = item["scene"]
    if not well:
        scene = world.misread(item, [i, other if i == item["right"] else item["right"]], rng)
    look = f"{world.SHOWS[item['medium']]} shows {world.describe(scene)}."
    return f"{look} Claim: {item['claims'][i]}. It is {'right' if right else 'wrong'}."


def consistent(reasoning, choice):
    """
    The judge's rule.

    >>> consistent("Response 1 is better. No: Response 2 is better, it says 1.", "2")
    'yes'
    >>> consistent("I like 2.", "2")
    'no'
    """
    conclusions = re.findall("Response ([12]) is better", reasoning)
    return "yes" if conclusions[-1:] == [choice] else "no"
