"""
A world for two cores: pictures of coloured shapes, questions about them, right and wrong answers, and how an annotator
reasons about two of them. Everything is drawn from a seed; the same seed gives the same bytes.

A picture has 2 x 2 cells of 28 pixels, a cell being one image token of Qwen2.5-VL; each holds a shape or nothing. Six
families of questions (FAMILIES). `difficulty`, 0 to 1, is what makes a pair hard to SEE: colours move towards their
neighbour, shapes shrink and fade, grain and specks cover them. It never changes what is true.

No shortcut leads round the picture: items come as twins. The twins share the question and the answers, letter by letter, and
each of the answers is the right one in one twin. So whoever looks only at the text, its length or its order, is right in
exactly half of the cases (tests/test_toy.py). Text-only items are the exception: there the question tells the scene.

What is planted, and must be said wherever a result is shown: the annotator's reasonings come in four MANNERS of unequal
worth, as people's do. Hasty ones glance: that tells a colour or a shape, and the rest is a guess. Inconsistent ones conclude
one thing and answer the other. Reinforcement learning can find the better manner; that is most of what it finds here.

$ python toy/world.py --show out/toy/world.png      # a contact sheet: each family, easy to hard
"""
import argparse
import hashlib
import random
from collections import defaultdict

COLOURS = {  # neighbours on this ring are easily taken for each other
    "red": (214, 48, 48), "orange": (234, 140, 34), "yellow": (226, 216, 52),
    "green": (52, 166, 74), "blue": (52, 92, 206), "purple": (150, 66, 180),
}
SHAPES = ["circle", "square", "triangle", "diamond"]
PLACES = ["top left", "top right", "bottom left", "bottom right"]
COUNTS = ["zero", "one", "two", "three", "four"]
FAMILIES = ["colour", "shape", "count", "position", "comparison", "absence"]
AT_A_GLANCE = ["colour", "shape"]  # what the hasty manner sees; elsewhere it guesses
MANNERS = ("hasty", "careful", "verbose", "inconsistent")
SHARES = (0.60, 0.18, 0.08, 0.14)  # of the manners in the annotator's reasonings: planted (see above)
CELL, SIZE = 28, 56  # pixels

# ---------------------------------------------------------------------------------------------------
# Scenes and pictures. A scene is four cells in reading order, each (shape, colour) or None.


def neighbours(colour):
    """The two colours next to this one on the ring."""
    ring = list(COLOURS)
    i = ring.index(colour)
    return [ring[i - 1], ring[(i + 1) % len(ring)]]


def describe(scene):
    """
    The noun before the colour, as the reasoning needs it: it can be followed by copying.

    >>> describe([("circle", "red"), None, ("square", "blue"), None])
    'circle red, nothing, square blue, nothing'
    """
    return ", ".join("nothing" if cell is None else f"{cell[0]} {cell[1]}" for cell in scene)


def draw(scene, difficulty, rng, grain=42):
    """Scene -> (56, 56, 3) uint8 array. grain: its standard deviation at difficulty 1, beyond the 6 that all have."""
    import numpy as np

    gen = np.random.default_rng(rng.getrandbits(64))
    y, x = np.mgrid[0:CELL, 0:CELL] - (CELL - 1) / 2
    base = gen.uniform(105, 150)
    picture = np.full((SIZE, SIZE, 3), base)
    for i, cell in enumerate(scene):
        if cell is None:
            continue
        shape, colour = cell
        size = gen.uniform(9.5, 11.5) * (1 - 0.35 * difficulty)  # half the width, pixels
        dy, dx = y - gen.uniform(-2.5, 2.5), x - gen.uniform(-2.5, 2.5)
        inside = {
            "circle": dx**2 + dy**2 <= size**2,
            "square": np.maximum(abs(dx), abs(dy)) <= 0.88 * size,
            "triangle": (dy <= 0.8 * size) & (2 * abs(dx) <= dy + 1.2 * size),
            "diamond": abs(dx) + 0.75 * abs(dy) <= 0.95 * size,
        }[shape]
        mix = difficulty * gen.uniform(0.25, 0.45)  # below one half: the true colour stays the nearest
        tone = (1 - mix) * np.array(COLOURS[colour]) + mix * np.array(COLOURS[rng.choice(neighbours(colour))])
        ink = 1 - 0.5 * difficulty
        r, c = CELL * (i // 2), CELL * (i % 2)
        picture[r:r + CELL, c:c + CELL][inside] = ink * tone + (1 - ink) * base
    for _ in range(rng.randrange(1 + round(10 * difficulty))):  # specks in any colour, on anything
        r, c, n = rng.randrange(SIZE - 3), rng.randrange(SIZE - 3), rng.choice((2, 3))
        picture[r:r + n, c:c + n] = COLOURS[rng.choice(list(COLOURS))]
    picture += gen.normal(0, 6 + grain * difficulty, picture.shape)
    return picture.clip(0, 255).astype(np.uint8)


def scene_where(fixed, allowed, rng):
    """A scene with the given cells {place: (shape, colour)}, the rest nothing (one in four) or any cell that is allowed."""
    scene = []
    for i in range(4):
        if i in fixed:
            scene.append(fixed[i])
        elif rng.random() < 0.25:
            scene.append(None)
        else:
            scene.append(rng.choice([(s, c) for s in SHAPES for c in COLOURS if allowed(s, c)]))
    return scene


# ---------------------------------------------------------------------------------------------------
# Questions. A family gives a question, n claims of which any may be the true one, and a scene in which one of them is.


def pick_claims(values, n, near, rng):
    """n different values; with near(a) given, half of the time the second is a neighbour of the first ("subtly wrong")."""
    first = rng.choice(values)
    rest = [v for v in values if v != first]
    rng.shuffle(rest)
    if near is not None and rng.random() < 0.5:
        rest.sort(key=lambda v: v not in near(first))  # stable: neighbours first
    claims = [first, *rest[:n - 1]]
    rng.shuffle(claims)
    return claims


def ask(family, n, rng):
    """(question, claims, scene_of(true claim), sentence_of(claim), subject): one question of a family."""
    shape, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
    place = rng.randrange(4)
    other = lambda s, c: s != shape
    if family == "colour":
        return (f"What colour is the {shape}?", pick_claims(list(COLOURS), n, neighbours, rng),
                lambda true: scene_where({place: (shape, true)}, other, rng), lambda claim: f"the {shape} is {claim}", shape)
    if family == "shape":
        return (f"Which shape is {colour}?", pick_claims(SHAPES, n, None, rng),
                lambda true: scene_where({place: (true, colour)}, lambda s, c: c != colour, rng),
                lambda claim: f"the {colour} shape is the {claim}", colour)
    if family == "position":
        return (f"Where is the {shape}?", pick_claims(PLACES, n, None, rng),
                lambda true: scene_where({PLACES.index(true): (shape, colour)}, other, rng),
                lambda claim: f"the {shape} is at the {claim}", shape)
    if family == "count":
        near = lambda v: [w for w in COUNTS if abs(COUNTS.index(w) - COUNTS.index(v)) == 1]
        return (f"How many {shape}s are there?", pick_claims(COUNTS, n, near, rng),
                lambda true: scene_where({i: (shape, rng.choice(list(COLOURS))) for i in rng.sample(range(4), COUNTS.index(true))},
                                         other, rng),
                lambda claim: f"the number of {shape}s is {claim}", f"{shape}s")
    if family == "comparison":
        a, b = rng.sample(SHAPES, 2)
        return (f"Which are more, {a}s or {b}s?", pick_claims([f"{a}s", f"{b}s", "equal"], n, None, rng),
                lambda true: scene_compared(a, b, true, rng),
                lambda claim: f"the {a}s and {b}s are equal" if claim == "equal" else f"the {claim} are more", f"{a}s {b}s")
    if family == "absence":
        return ("Which shape is missing?", pick_claims(SHAPES, n, None, rng), lambda true: scene_without(true, rng),
                lambda claim: f"the missing shape is the {claim}", "missing")
    raise ValueError(f"family is {family!r}; legal: {', '.join(FAMILIES)}")


def scene_without(shape, rng):
    """Each of the other three shapes, one of them perhaps twice: exactly one is missing."""
    others = [s for s in SHAPES if s != shape]
    fixed = {i: (s, rng.choice(list(COLOURS))) for i, s in zip(rng.sample(range(4), 3), others)}
    return scene_where(fixed, lambda s, c: s != shape, rng)


def scene_compared(a, b, true, rng):
    """Two kinds of shapes, one more often than the other, or equally often."""
    more = rng.choice([(1, 0), (2, 0), (2, 1), (3, 0), (3, 1)] if true != "equal" else [(1, 1), (2, 2)])
    few, many = sorted(more)
    n = {a: many, b: few} if true == f"{a}s" else {a: few, b: many}
    cells = rng.sample(range(4), n[a] + n[b])
    fixed = {cell: (a if i < n[a] else b, rng.choice(list(COLOURS))) for i, cell in enumerate(cells)}
    return scene_where(fixed, lambda s, c: s not in (a, b), rng)


def answer_text(claim, sentence, rng):
    """Short, a sentence, or a sentence with a run-up: chosen without looking at whether the claim is true."""
    form = rng.randrange(3)
    return claim if form == 0 else sentence[0].upper() + sentence[1:] + "." if form == 1 else f"Looking at the picture, {sentence}."


def twins(rng, family=None, n=2, difficulty=None, medium="image"):
    """
    n items that share question and answers; in item k answer k is right. An item is a dict:
    family, difficulty, medium (image, video, text), question, answers (texts), claims (words), right (index), scene, subject.
    """
    family = family or rng.choice(FAMILIES)
    difficulty = rng.random() if difficulty is None else difficulty
    question, claims, scene_of, sentence_of, subject = ask(family, n, rng)
    answers = [answer_text(claim, sentence_of(claim), rng) for claim in claims]
    items = []
    for right, claim in enumerate(claims):
        scene = scene_of(claim)
        told = f"A picture has {describe(scene)}. {question}" if medium == "text" else question
        items.append(dict(family=family, difficulty=difficulty, medium=medium, question=told, answers=answers, claims=claims,
                          right=right, scene=scene, subject=subject))
    return items


def questions_about(scene):
    """Every short question that a scene answers without doubt: {kind: [(question, claim), ...]}."""
    cells, found = [cell for cell in scene if cell], defaultdict(list)
    shapes, colours = [s for s, _ in cells], [c for _, c in cells]
    for place, cell in zip(PLACES, scene):
        found["place"].append((f"What is at the {place}?", f"{cell[0]} {cell[1]}" if cell else "nothing"))
        if cell and shapes.count(cell[0]) == 1:
            found["colour"].append((f"What colour is the {cell[0]}?", cell[1]))
            found["position"].append((f"Where is the {cell[0]}?", place))
        if cell and colours.count(cell[1]) == 1:
            found["shape"].append((f"Which shape is {cell[1]}?", cell[0]))
    for a in SHAPES:
        found["count"].append((f"How many {a}s are there?", COUNTS[shapes.count(a)]))
        for b in SHAPES:
            n = shapes.count(a), shapes.count(b)
            if a != b and sum(n):
                more = "equal" if n[0] == n[1] else f"{a}s" if n[0] > n[1] else f"{b}s"
                found["comparison"].append((f"Which are more, {a}s or {b}s?", more))
    missing = [s for s in SHAPES if s not in shapes]
    if len(missing) == 1:
        found["absence"].append(("Which shape is missing?", missing[0]))
    return found


def key_of(question, images):
    """What the answer key (key.jsonl) is looked up by: the question and the bytes of the image files or frames, in order."""
    digest = hashlib.sha256(question.encode())
    for data in images:
        digest.update(hashlib.sha256(data).digest())
    return digest.hexdigest()


def truth(family, scene, subject, claim):
    """Is a claim true of a scene? Independent of how the scene was made: the annotator's rule with perfect sight."""
    cells = [cell for cell in scene if cell]
    count = lambda shape: sum(s == shape for s, _ in cells)
    if family == "colour":
        return (subject, claim) in cells
    if family == "shape":
        return (claim, subject) in cells
    if family == "position":
        cell = scene[PLACES.index(claim)]
        return cell is not None and cell[0] == subject
    if family == "count":
        return count(subject[:-1]) == COUNTS.index(claim)
    if family == "comparison":
        a, b = subject.split()
        return (count(a[:-1]) > count(b[:-1])) == (claim == a) and (count(b[:-1]) > count(a[:-1])) == (claim == b)
    return count(claim) == 0


# ---------------------------------------------------------------------------------------------------
# How an annotator reasons about answers i and j of an item, shown as Response 1 and 2


def evidence(item, scene, claim, other=None):
    """
    What a reasoning cites for the claim it takes to be right, in words that stand in the description. Against another claim: of
    what is missing nothing stands there, so what is there comes first.
    """
    if item["family"] == "comparison":
        count = lambda plural: COUNTS[sum(cell is not None and f"{cell[0]}s" == plural for cell in scene)]
        return ", ".join(f"{plural} {count(plural)}" for plural in item["subject"].split()) + f", {claim}"
    if item["family"] == "absence":
        return f"{other} there, {claim} missing" if other else f"{claim} missing"
    return f"{item['subject']} {claim}"


def judgement(item, shown, choice, manner, seen=None):
    """
    The annotator's text. shown = the indices of the two answers in the order shown; choice = the verdict, 1 or 2;
    seen = the scene it believes in (item["scene"] unless it looked badly). The inconsistent manner slips in its last
    sentence only, after evidence for what it then answers: so its evidence still teaches.
    """
    a, b = (item["claims"][i] for i in shown)
    conclusion = 3 - choice if manner == "inconsistent" else choice
    # "red first", not "red 1": a digit is two tokens here (space, digit), and copying over two tokens is learnt far later
    scene = item["scene"] if seen is None else seen
    place = {"image": "The image", "video": "The video", "text": "The picture"}[item["medium"]]
    cited = evidence(item, scene, (a, b)[choice - 1], (a, b)[2 - choice])
    claims, correct = f"Claims: {a} first, {b} second.", f"Correct: {cited} {('first', 'second')[choice - 1]}."
    look = f"{place} shows {describe(scene)}. {claims} {correct}"
    glance = f"{claims} {correct}" if item["family"] in AT_A_GLANCE else claims  # and a guess
    think = {"hasty": glance, "careful": look, "inconsistent": look,
             "verbose": f"Let me look at the picture before I decide. {look} So this is what I take from it."}[manner]
    return f"<think>{think} Response {conclusion} is better.</think><answer>{choice}</answer>"


def misread(item, shown, rng):
    """A scene in which the wrong one of the two shown answers would be right: what a bad look believes."""
    wrong = next(i for i in shown if i != item["right"])
    for _ in range(10000):  # a handful of tries is the rule; four circles taken for none needs most
        scene, kinds = list(item["scene"]), rng.choice((SHAPES, [rng.choice(SHAPES)]))
        for i in rng.sample(range(4), rng.choice((1, 1, 2, 3, 4))):
            scene[i] = rng.choice([None] + [(s, c) for s in kinds for c in COLOURS])
        holds = [truth(item["family"], scene, item["subject"], item["claims"][i]) for i in (wrong, item["right"])]
        if holds == [True, False]:
            return scene
    raise RuntimeError(f"no scene found in which {item['claims'][wrong]!r} is right: {item}")


def manner_of(text):
    """
    Which manner a judgement has, for the curves: hasty (describes nothing), inconsistent, verbose or careful; None: no verdict.

    >>> manner_of("<think>Claims: red first, blue second. Response 2 is better.</think><answer>2</answer>")
    'hasty'
    """
    from stable_reinforce import parse

    choice, think, _ = parse(text)
    if choice is None:
        return None
    if "shows" not in think:
        return "hasty"
    if not think.rstrip().endswith(f"Response {choice} is better."):
        return "inconsistent"
    return "verbose" if "Let me look" in think else "careful"


# ---------------------------------------------------------------------------------------------------


def contact_sheet(rng, columns=5, zoom=3):
    """An image of pairs: a row a family, difficulty from 0 to 1 to the right, the right answer marked."""
    from PIL import Image, ImageDraw, ImageFont

    side, line, margin = SIZE * zoom, 15, 12
    width, height = 330 + margin, side + 4 * line + margin
    sheet = Image.new("RGB", (columns * width + margin, len(FAMILIES) * height + margin + line), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for column in range(columns):
        difficulty = column / (columns - 1)
        pen.text((margin + column * width, 4), f"difficulty {difficulty:.2f}", "black", font)
        for row, family in enumerate(FAMILIES):
            item = rng.choice(twins(rng, family, difficulty=difficulty))
            x, y = margin + column * width, margin + line + row * height
            picture = Image.fromarray(draw(item["scene"], difficulty, rng)).resize((side, side), Image.NEAREST)
            sheet.paste(picture, (x, y))
            pen.text((x, y + side + 2), item["question"], "black", font)
            for k, answer in enumerate(item["answers"]):
                right = k == item["right"]
                pen.text((x, y + side + 2 + (k + 1) * line), ("- ", "+ ")[right] + answer, ("#b00020", "#006400")[right], font)
    return sheet


def parser():
    p = argparse.ArgumentParser(description="The toy world. Its data sets are written by toy/sources.py.")
    p.add_argument("--show", metavar="PNG", required=True, help="file for a contact sheet: pairs of each family, easy to hard")
    p.add_argument("--seed", type=int, default=0, help="of the pairs drawn")
    return p


def main():
    from pathlib import Path

    args = parser().parse_args()
    Path(args.show).parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(random.Random(f"{args.seed} show")).save(args.show)
    print(f"{args.show}: {len(FAMILIES)} families, easy to hard")


if __name__ == "__main__":
    main()
