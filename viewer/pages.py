"""HTML pages that need no network: judgements to read (C.6), a blind vote on two runs (C.7)."""

import dataclasses
import html
import json
import os
import random
from collections import Counter, defaultdict
from operator import itemgetter
from pathlib import Path

from core.endpoint import data_url
from core.files import InputError, parse_json, read_object
from core.lists import shares_won
from core.pairs import shown
from core.scoring import has_doubts
from stable_reinforce import parse

TEMPLATE = Path(__file__).with_name("judgements.html")
MAX_PIXELS = 400 * 400  # of a picture inside a page


def write_page(path, title, items, blind):
    """judgements.html with the items inside; blind: the page of the vote."""
    data = json.dumps({"title": title, "blind": blind, "items": items})
    data = data.replace("<", "\\u003c")  # no text of an item ends the script
    page = TEMPLATE.read_text(encoding="utf-8")
    page = page.replace("<title></title>", f"<title>{html.escape(title)}</title>")
    page = page.replace("/*DATA*/null", data)
    Path(path).write_text(page, encoding="utf-8")


def embedded_pictures(row):
    """A row's pictures, small, as data URLs. A run that is scored again may have lost some."""
    paths = row.images + (row.video or [])
    return [data_url(path, MAX_PIXELS, quality=75) for path in paths if os.path.isfile(path)]


# --- judgements to read


def page_items(benches, done, limit):
    """Of each benchmark the first rows that have judgements, at most `limit`."""
    judgements = defaultdict(list)
    for key in sorted(done):
        judgements[key[:2]].append(done[key])
    items = []
    for rows in benches.values():
        notes = list_notes(rows, judgements)
        judged_rows = [row for row in rows if row.key in judgements]
        items += [page_item(row, judgements[row.key], notes) for row in judged_rows[:limit]]
    return items


def list_notes(rows, judgements):
    """{number of a list: how the judge ranks its answers}, of lists whose duels are all judged."""
    duels = defaultdict(list)
    for row in rows:
        if row.duel:
            duels[row.duel.list_number].append((row, judgements.get(row.key)))
    notes = {}
    for number, judged_rows in duels.items():
        if all(of_row for _, of_row in judged_rows):
            shares = shares_won(judged_rows)
            order = sorted(enumerate(shares, 1), key=itemgetter(1), reverse=True)
            won = ", ".join(f"{answer} (won {share:.0%})" for answer, share in order)
            right = ", ".join(map(str, judged_rows[0][0].duel.ranks))
            notes[number] = (
                f"list {number}, as the judge ranks it: {won}; ranks of the file: {right}"
            )
    return notes


def page_item(row, judgements, notes):
    shown_judgements = []
    for judgement in judgements:
        doubts = has_doubts(judgement.text)
        shown_judgements.append(dataclasses.asdict(judgement) | {"again": doubts})
    return {
        "bench": row.bench,
        "row": row.row,
        "id": row.id,
        "question": row.question,
        "responses": row.responses,
        "choice": row.choice if row.is_decided else None,
        "list": notes.get(row.duel.list_number) if row.duel else None,
        "group": " / ".join(row.groups.values()),
        "images": embedded_pictures(row),
        "judgements": shown_judgements,
    }


# --- the blind vote


def write_blind_vote(folder, benches, ours, theirs, limit, seed):
    """
    ab.html shows the reasonings of two runs side by side without their verdicts, on sides drawn at
    random; ab_key.json says which side is ours. ours, theirs: {key: judgement}.
    """
    rng = random.Random(f"{seed} vote")
    items, key = [], []
    for number, (row, at) in enumerate(_shared_judgements(benches, ours, theirs, rng)[:limit]):
        our_side = rng.choice(("left", "right"))
        runs = (ours, theirs) if our_side == "left" else (theirs, ours)
        swapped = ours[at].order == 1
        item = {
            "item": number,
            "question": row.question,
            "responses": row.responses[::-1] if swapped else row.responses,
            "images": embedded_pictures(row),
            "sides": [reasoning(run[at].text) for run in runs],
        }
        items.append(item)
        key.append(our_side)
    if not items:
        raise InputError(
            "--ab: the two runs share no judgement; give two runs on the same benchmarks, "
            "in the same orders"
        )
    write_page(Path(folder, "ab.html"), "Which reasoning is better?", items, blind=True)
    Path(folder, "ab_key.json").write_text(json.dumps(key))


def rows_of_both(benches, others):
    """{bench: the rows that have the same number and answers in another run}."""
    common = {}
    for bench, rows in benches.items():
        contents = {(row.row, row.content()) for row in others.get(bench, [])}
        common[bench] = [row for row in rows if (row.row, row.content()) in contents]
    return common


def _shared_judgements(benches, ours, theirs, rng):
    """(row, key of a judgement that both runs have), one a row, shuffled."""
    rows = {}
    for rows_of_bench in benches.values():
        rows |= {row.key: row for row in rows_of_bench}
    keys = [key for key in sorted(ours.keys() & theirs.keys()) if key[:2] in rows]
    rng.shuffle(keys)
    one_of_a_row = {key[:2]: key for key in keys}
    return [(rows[row_key], key) for row_key, key in one_of_a_row.items()]


def reasoning(text):
    """A judgement's text without the verdict."""
    return parse(text).think or text.split("<answer>")[0]


VOTES = ("win", "loss", "tie")


def print_tally(out, votes):
    """Table 9."""
    key = Path(out, "ab_key.json")
    if not key.is_file():
        raise InputError(f"{key}: no such file; give the --out that --ab was run with")
    sides = parse_json(key.read_bytes(), key, "a list of left and right")
    if not isinstance(sides, list) or any(side not in ("left", "right") for side in sides):
        raise InputError(f"{key}: expected a list of left and right; run --ab again")
    for name, shares in tally_votes(sides, votes).items():
        win, loss, tie, votes = shares
        print(f"{name}: win {win} %, loss {loss} %, tie {tie} % of {votes}")


def tally_votes(key, files):
    """
    Table 9: {file: (win, loss, tie in percent, votes)}, and "majority": the votes of most files on
    each item; without a majority an item is a tie.
    """
    votes_on_item = defaultdict(list)
    tallies = {}
    for path in files:
        votes = read_votes(path, key)
        tallies[str(path)] = vote_shares(votes.values())
        for item, vote in votes.items():
            votes_on_item[item].append(vote)
    tallies["majority"] = vote_shares(majority(votes) for votes in votes_on_item.values())
    return tallies


def read_votes(path, key):
    """{item: "win", "loss" or "tie" of our run}."""
    outcomes = {}
    votes = read_object(path, {"votes": dict}, "Give files saved from ab.html")["votes"]
    for item, side in votes.items():
        known_item = item.isdecimal() and int(item) < len(key)
        if not known_item or side not in ("left", "right", "tie"):
            expected = f"left, right or tie, on items 0 to {len(key) - 1}, as ab.html saves them"
            raise InputError(f"{path}: expected {expected}, got {shown({item: side})}")
        if side == "tie":
            outcomes[item] = "tie"
        else:
            outcomes[item] = "win" if side == key[int(item)] else "loss"
    return outcomes


def vote_shares(votes):
    counts = Counter(votes)
    total = counts.total()
    shares = [round(100 * counts[vote] / max(1, total), 1) for vote in VOTES]
    return (*shares, total)


def majority(votes):
    vote, count = Counter(votes).most_common(1)[0]
    return vote if count * 2 > len(votes) else "tie"
