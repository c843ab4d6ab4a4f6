"""
A world for two cores: pictures of coloured shapes, questions about them, right and wrong answers,
and how an annotator reasons about two of them. The same seed gives the same bytes.

A picture has 2 x 2 cells of 28 pixels, each one image token of Qwen2.5-VL; a cell holds a shape or
nothing. There are six families of questions (FAMILIES). `difficulty`, 0 to 1, makes a picture hard
to see: colours move towards their neighbour, shapes shrink and fade, noise and specks cover them.
It never changes what is true.

Nobody can answer without the picture: items come as twins, which share question and answers letter
by letter, and each answer is right in one twin. Any rule that reads only the text is right in
exactly half of the cases (tests/test_toy.py). Text-only items are the exception: their question
describes the scene.

What is planted, and must be said wherever a result is shown: the annotator's reasonings come in
four MANNERS of unequal worth, as people's do. Hasty ones glance: they see colours and shapes and
guess the rest. Inconsistent ones conclude one thing and answer the other. Reinforcement learning
can find the better manner, and most of what it gains here is that.

$ python toy/world.py --show out/toy/world.png      # pairs of each family, easy to hard
"""

import hashlib
import random
import sys
from collections import defaultdict
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from core.flags import command_line
from stable_reinforce import parse

COLOURS = {  # neighbours on this ring are easily mistaken for each other
    "red": (214, 48, 48),
    "orange": (234, 140, 34),
    "yellow": (226, 216, 52),
    "green": (52, 166, 74),
    "blue": (52, 92, 206),
    "purple": (150, 66, 180),
}
SHAPES = ["circle", "square", "triangle", "diamond"]
PLACES = ["top left", "top right", "bottom left", "bottom right"]
COUNTS = ["zero", "one", "two", "three", "four"]
FAMILIES = ["colour", "shape", "count", "position", "comparison", "absence"]
AT_A_GLANCE = ["colour", "shape"]  # families in which the hasty manner sees; elsewhere it guesses
MANNERS = ("hasty", "careful", "verbose", "inconsistent")
SHARES = (0.60, 0.18, 0.08, 0.14)  # of the manners in the annotator's reasonings: planted
THIRDS = ("easy", "middle", "hard")  # of the difficulties
CELL, SIZE = 28, 56  # pixels

# --------------------------------------------------------------------------------------------------
# Scenes and pictures. A scene is four cells in reading order, each (shape, colour) or None.


def neighbours(colour):
    """The two colours next to this one on the ring."""
    ring = list(COLOURS)
    i = ring.index(colour)
    return [ring[i - 1], ring[(i + 1) % len(ring)]]


def describe(scene):
    """
    The scene in words, the noun before the colour: so a reasoning can be followed by copying.

    >>> describe([("circle", "red"), None, ("square", "blue"), None])
    'circle red, nothing, square blue, nothing'
    """
    return ", ".join(describe_cell(cell) for cell in scene)


def describe_cell(cell):
    return "nothing" if cell is None else f"{cell[0]} {cell[1]}"


def draw(scene, difficulty, rng, grain=42):
    """
    Draw a scene as a (56, 56, 3) array of uint8. The noise has a standard deviation of
    6 + grain * difficulty.
    """
    import numpy as np

    gen = np.random.default_rng(rng.getrandbits(64))
    y, x = np.mgrid[0:CELL, 0:CELL] - (CELL - 1) / 2
    background = gen.uniform(105, 150)
    picture = np.full((SIZE, SIZE, 3), background)
    for i, cell in enumerate(scene):
        if cell is None:
            continue
        shape, colour = cell
        radius = gen.uniform(9.5, 11.5) * (1 - 0.35 * difficulty)
        dy = y - gen.uniform(-2.5, 2.5)
        dx = x - gen.uniform(-2.5, 2.5)
        mix = difficulty * gen.uniform(0.25, 0.45)  # below one half: the true colour is the nearest
        neighbour = rng.choice(neighbours(colour))
        tone = (1 - mix) * np.array(COLOURS[colour]) + mix * np.array(COLOURS[neighbour])
        ink = 1 - 0.5 * difficulty
        top, left = CELL * (i // 2), CELL * (i % 2)
        area = picture[top : top + CELL, left : left + CELL]
        area[inside(shape, dx, dy, radius)] = ink * tone + (1 - ink) * background
    for _ in range(rng.randrange(1 + round(10 * difficulty))):
        speck(picture, rng)
    picture += gen.normal(0, 6 + grain * difficulty, picture.shape)
    return picture.clip(0, 255).astype(np.uint8)


def inside(shape, dx, dy, radius):
    """Which pixels belong to a shape, given their distances from its centre."""
    if shape == "circle":
        return dx**2 + dy**2 <= radius**2
    if shape == "square":
        side = 0.88 * radius
        return (abs(dx) <= side) & (abs(dy) <= side)
    if shape == "triangle":
        return (dy <= 0.8 * radius) & (2 * abs(dx) <= dy + 1.2 * radius)
    return abs(dx) + 0.75 * abs(dy) <= 0.95 * radius  # diamond


def speck(picture, rng):
    """A small square of any colour, on anything."""
    top, left = rng.randrange(SIZE - 3), rng.randrange(SIZE - 3)
    side = rng.choice((2, 3))
    picture[top : top + side, left : left + side] = COLOURS[rng.choice(list(COLOURS))]


def fill_scene(fixed, rng, no_shapes=(), no_colour=None):
    """
    A scene with the cells {place: (shape, colour)}. The rest are nothing (one in four) or any cell
    without these shapes and this colour.
    """
    options = []
    for shape, colour in product(SHAPES, COLOURS):
        if shape not in no_shapes and colour != no_colour:
            options.append((shape, colour))
    scene = []
    for i in range(4):
        if i in fixed:
            scene.append(fixed[i])
        elif rng.random() < 0.25:
            scene.append(None)
        else:
            scene.append(rng.choice(options))
    return scene


# --------------------------------------------------------------------------------------------------
# Questions. Each has a family, a subject, and n claims of which any may be the true one.

QUESTIONS = {
    "colour": "What colour is the {}?",
    "shape": "Which shape is {}?",
    "position": "Where is the {}?",
    "count": "How many {} are there?",
    "comparison": "Which are more, {} or {}?",
    "absence": "Which shape is missing?",
}
SENTENCES = {
    "colour": "the {subject} is {claim}",
    "shape": "the {subject} shape is the {claim}",
    "position": "the {subject} is at the {claim}",
    "count": "the number of {subject} is {claim}",
    "comparison": "the {claim} are more",
    "absence": "the missing shape is the {claim}",
}


def subject_of(family, shape, colour, rng):
    """What a question is about: one word, or for a comparison two plurals."""
    if family == "comparison":
        first, second = rng.sample(SHAPES, 2)
        return f"{first}s {second}s"
    if family == "count":
        return f"{shape}s"
    if family == "absence":
        return "missing"
    return colour if family == "shape" else shape


def question_of(family, subject):
    if family == "comparison":
        return QUESTIONS[family].format(*subject.split())
    return QUESTIONS[family].format(subject)


def possible_claims(family, subject):
    if family == "comparison":
        return [*subject.split(), "equal"]
    return {"colour": list(COLOURS), "position": PLACES, "count": COUNTS}.get(family, SHAPES)


def near_misses(family, claim):
    """Claims that are only subtly wrong."""
    if family == "colour":
        return neighbours(claim)
    i = COUNTS.index(claim)
    return [count for k, count in enumerate(COUNTS) if abs(k - i) == 1]


def pick_claims(family, subject, n, rng):
    """n different claims; in some families, every other time two of them are near each other."""
    claims = possible_claims(family, subject)
    first = rng.choice(claims)
    rest = [claim for claim in claims if claim != first]
    rng.shuffle(rest)
    if family in ("colour", "count") and rng.random() < 0.5:
        near = near_misses(family, first)
        rest.sort(key=lambda claim: claim not in near)  # stable: near ones first
    picked = [first, *rest[: n - 1]]
    rng.shuffle(picked)
    return picked


def scene_in_which(claim, family, subject, colour, place, rng):
    """A scene in which this claim, and none of the others, is true."""
    if family == "colour":
        return fill_scene({place: (subject, claim)}, rng, no_shapes=[subject])
    if family == "shape":
        return fill_scene({place: (claim, subject)}, rng, no_colour=subject)
    if family == "position":
        return fill_scene({PLACES.index(claim): (subject, colour)}, rng, no_shapes=[subject])
    if family == "count":
        return scene_with_count(subject[:-1], COUNTS.index(claim), rng)
    if family == "comparison":
        return scene_compared(subject.split(), claim, rng)
    return scene_without(claim, rng)


def scene_with_count(shape, count, rng):
    places = rng.sample(range(4), count)
    fixed = {place: (shape, rng.choice(list(COLOURS))) for place in places}
    return fill_scene(fixed, rng, no_shapes=[shape])


def scene_without(shape, rng):
    """Each of the other three shapes, one of them perhaps twice: exactly one is missing."""
    others = [other for other in SHAPES if other != shape]
    places = rng.sample(range(4), 3)
    fixed = {place: (s, rng.choice(list(COLOURS))) for place, s in zip(places, others)}
    return fill_scene(fixed, rng, no_shapes=[shape])


def scene_compared(plurals, claim, rng):
    """One of two shapes more often than the other, or both equally often."""
    if claim == "equal":
        few, many = rng.choice([(1, 1), (2, 2)])
    else:
        few, many = rng.choice([(0, 1), (0, 2), (1, 2), (0, 3), (1, 3)])
    first, second = (plural[:-1] for plural in plurals)
    counts = (many, few) if claim == plurals[0] else (few, many)
    places = rng.sample(range(4), sum(counts))
    fixed = {}
    for i, place in enumerate(places):
        shape = first if i < counts[0] else second
        fixed[place] = (shape, rng.choice(list(COLOURS)))
    return fill_scene(fixed, rng, no_shapes=[first, second])


def answer_with(claim, family, subject, rng):
    """The claim as an answer, in a form that does not depend on whether it is true."""
    sentence = SENTENCES[family].format(subject=subject, claim=claim)
    if claim == "equal":
        sentence = "the {} and {} are equal".format(*subject.split())
    form = rng.randrange(3)
    if form == 0:
        return claim
    if form == 1:
        return f"{sentence[0].upper()}{sentence[1:]}."
    return f"Looking at the picture, {sentence}."


def twins(rng, family=None, n=2, difficulty=None, medium="image"):
    """
    n items that share question and answers; in item k answer k is right. An item is a dict, as in
    the answer key (key.jsonl): family, difficulty, medium (image, video, text), question, answers
    (texts), claims (words), right (an index), scene, subject.
    """
    family = family or rng.choice(FAMILIES)
    if family not in FAMILIES:
        raise ValueError(f"family is {family!r}; expected one of {', '.join(FAMILIES)}")
    difficulty = rng.random() if difficulty is None else difficulty
    shape, colour, place = rng.choice(SHAPES), rng.choice(list(COLOURS)), rng.randrange(4)
    subject = subject_of(family, shape, colour, rng)
    claims = pick_claims(family, subject, n, rng)
    answers = [answer_with(claim, family, subject, rng) for claim in claims]
    items = []
    for right, claim in enumerate(claims):
        scene = scene_in_which(claim, family, subject, colour, place, rng)
        question = question_of(family, subject)
        if medium == "text":
            question = f"A picture has {describe(scene)}. {question}"
        items.append(
            {
                "family": family,
                "difficulty": difficulty,
                "medium": medium,
                "question": question,
                "answers": answers,
                "claims": claims,
                "right": right,
                "scene": scene,
                "subject": subject,
            }
        )
    return items


def questions_about(scene):
    """Every short question to which a scene has one answer: {kind: [(question, claim), ...]}."""
    found = defaultdict(list)
    shapes = [cell[0] for cell in scene if cell]
    colours = [cell[1] for cell in scene if cell]
    for place, cell in zip(PLACES, scene):
        found["place"].append((f"What is at the {place}?", describe_cell(cell)))
        if cell is None:
            continue
        shape, colour = cell
        if shapes.count(shape) == 1:
            found["colour"].append((question_of("colour", shape), colour))
            found["position"].append((question_of("position", shape), place))
        if colours.count(colour) == 1:
            found["shape"].append((question_of("shape", colour), shape))
    for shape in SHAPES:
        found["count"].append((question_of("count", f"{shape}s"), COUNTS[shapes.count(shape)]))
        for other in SHAPES:
            counts = shapes.count(shape), shapes.count(other)
            if shape != other and sum(counts) > 0:
                question = question_of("comparison", f"{shape}s {other}s")
                found["comparison"].append((question, more_of(shape, other, *counts)))
    missing = [shape for shape in SHAPES if shape not in shapes]
    if len(missing) == 1:
        found["absence"].append((QUESTIONS["absence"], missing[0]))
    return found


def more_of(first, second, first_count, second_count):
    if first_count == second_count:
        return "equal"
    return f"{first}s" if first_count > second_count else f"{second}s"


def key_of(question, images):
    """
    The name of an item in the answer key (key.jsonl), from the question and the bytes of its image
    files or frames, in order.
    """
    digest = hashlib.sha256(question.encode())
    for data in images:
        digest.update(hashlib.sha256(data).digest())
    return digest.hexdigest()


def count_shape(scene, shape):
    return sum(cell is not None and cell[0] == shape for cell in scene)


def truth(family, scene, subject, claim):
    """Whether a claim is true of a scene, independent of how the scene was made."""
    if family == "colour":
        return (subject, claim) in scene
    if family == "shape":
        return (claim, subject) in scene
    if family == "position":
        cell = scene[PLACES.index(claim)]
        return cell is not None and cell[0] == subject
    if family == "count":
        return count_shape(scene, subject[:-1]) == COUNTS.index(claim)
    if family == "comparison":
        first, second = (plural[:-1] for plural in subject.split())
        counts = count_shape(scene, first), count_shape(scene, second)
        return more_of(first, second, *counts) == claim
    return count_shape(scene, claim) == 0


# --------------------------------------------------------------------------------------------------
# How an annotator reasons about two answers of an item

SHOWS = {"image": "The image", "video": "The video", "text": "The picture"}


def evidence(item, scene, claim, other=None):
    """
    What a reasoning cites for the claim that it takes to be right, in words of the description.
    A missing shape is not in the description; so what is there, the other claim, comes first.
    """
    if item["family"] == "comparison":
        counts = []
        for plural in item["subject"].split():
            counts.append(f"{plural} {COUNTS[count_shape(scene, plural[:-1])]}")
        return f"{', '.join(counts)}, {claim}"
    if item["family"] == "absence":
        return f"{other} there, {claim} missing" if other else f"{claim} missing"
    return f"{item['subject']} {claim}"


def judgement(item, shown, choice, manner, seen=None):
    """
    The annotator's text. shown: the indices of the two answers in the order in which they are
    shown; choice: the verdict, 1 or 2; seen: the scene it believes in, if not the true one. The
    inconsistent manner contradicts itself in its last sentence only, after evidence for its
    answer: so its evidence still teaches.
    """
    first, second = (item["claims"][i] for i in shown)
    chosen, other = (first, second) if choice == 1 else (second, first)
    scene = item["scene"] if seen is None else seen
    # "red first", not "red 1": a digit is two tokens here (space, digit), and copying over two
    # tokens is learnt far later
    claims = f"Claims: {first} first, {second} second."
    place = "first" if choice == 1 else "second"
    correct = f"Correct: {evidence(item, scene, chosen, other)} {place}."
    look = f"{SHOWS[item['medium']]} shows {describe(scene)}. {claims} {correct}"
    conclusion = choice
    if manner == "hasty":
        think = f"{claims} {correct}" if item["family"] in AT_A_GLANCE else claims
    elif manner == "verbose":
        think = (
            f"Let me look at the picture before I decide. {look} So this is what I take from it."
        )
    else:
        think = look
    if manner == "inconsistent":
        conclusion = 3 - choice
    return f"<think>{think} Response {conclusion} is better.</think><answer>{choice}</answer>"


def misread(item, shown, rng):
    """A scene in which the wrong one of the two shown answers would be right: a bad look."""
    wrong = next(i for i in shown if i != item["right"])
    claims = item["claims"][wrong], item["claims"][item["right"]]
    for _ in range(10000):  # a handful of tries as a rule; four circles taken for none needs most
        scene = list(item["scene"])
        kinds = rng.choice((SHAPES, [rng.choice(SHAPES)]))
        for i in rng.sample(range(4), rng.choice((1, 1, 2, 3, 4))):
            scene[i] = rng.choice([None, *product(kinds, COLOURS)])
        holds = [truth(item["family"], scene, item["subject"], claim) for claim in claims]
        if holds == [True, False]:
            return scene
    raise RuntimeError(f"no scene found in which {claims[0]!r} is right: {item}")


def manner_of(text):
    """
    The manner of a judgement, for the curves; None if it has no verdict.

    >>> text = "<think>Claims: red first, blue second. Response 2 is better.</think>"
    >>> manner_of(f"{text}<answer>2</answer>")
    'hasty'
    """
    verdict = parse(text)
    if verdict.choice is None:
        return None
    if "shows" not in verdict.think:
        return "hasty"
    if not verdict.think.rstrip().endswith(f"Response {verdict.choice} is better."):
        return "inconsistent"
    return "verbose" if "Let me look" in verdict.think else "careful"


def third_of(item):
    return THIRDS[min(2, int(3 * item["difficulty"]))]


# --------------------------------------------------------------------------------------------------
# The script: a contact sheet


def contact_sheet(rng, columns=5, zoom=3):
    """A row of pairs for each family, easy to hard, the right answer marked."""
    from PIL import Image, ImageDraw, ImageFont

    side, line, margin = SIZE * zoom, 15, 12
    width, height = 330 + margin, side + 4 * line + margin
    size = (columns * width + margin, len(FAMILIES) * height + margin + line)
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for column, row in product(range(columns), range(len(FAMILIES))):
        difficulty = column / (columns - 1)
        item = rng.choice(twins(rng, FAMILIES[row], difficulty=difficulty))
        x, y = margin + column * width, margin + line + row * height
        if row == 0:
            pen.text((x, 4), f"difficulty {difficulty:.2f}", "black", font)
        picture = Image.fromarray(draw(item["scene"], difficulty, rng))
        sheet.paste(picture.resize((side, side), Image.NEAREST), (x, y))
        y += side + 2
        pen.text((x, y), item["question"], "black", font)
        for k, answer in enumerate(item["answers"]):
            mark, colour = ("+", "#006400") if k == item["right"] else ("-", "#b00020")
            pen.text((x, y + (k + 1) * line), f"{mark} {answer}", colour, font)
    return sheet


def parser():
    p = command_line(__doc__)
    p.add_argument("--show", metavar="PNG", required=True, help="file for pairs of each family")
    p.add_argument("--seed", type=int, default=0, help="of the pairs")
    return p


def main():
    args = parser().parse_args()
    Path(args.show).parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(random.Random(f"{args.seed} show")).save(args.show)
    print(f"{args.show}: {len(FAMILIES)} families, easy to hard")


if __name__ == "__main__":
    main()
