"""HTML pages that need no network: judgements to read (C.6), a blind vote on two runs (C.7)."""

import html
import json
import os
import random
from collections import Counter, defaultdict
from itertools import groupby
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
    """Of each benchmark the first rows, or lists, that have judgements, at most `limit`."""
    judgements = defaultdict(list)
    for key in sorted(done):
        judgements[key[:2]].append(done[key])
    items = []
    for rows in benches.values():
        judged_rows = [(row, judgements.get(row.key, [])) for row in rows]
        together = [list(group) for _, group in groupby(judged_rows, key=number_of)]
        judged = [group for group in together if any(of_row for _, of_row in group)]
        items += [page_item(group) for group in judged[:limit]]
    return items


def number_of(judged_row):
    """The number of the row or, for all duels of a list, of their list."""
    row, _ = judged_row
    return row.duel.list_number if row.duel else row.row


def page_item(judged_rows):
    """A question with two answers and one duel, or a list of answers with all of its duels."""
    row, _ = judged_rows[0]
    duels = [duel_of(*judged_row) for judged_row in judged_rows]
    item = {
        "bench": row.bench,
        "row": number_of(judged_rows[0]),
        "id": row.id,
        "question": row.question,
        "responses": row.responses,
        "ranks": [1, 2] if row.choice == 1 else [2, 1],
        "won": None,
        "group": " / ".join(row.groups.values()),
        "images": embedded_pictures(row),
        "duels": duels,
    }
    if row.duel:
        item |= of_list(judged_rows)
    return item | {"longest": longest(item["responses"])}


def of_list(judged_rows):
    """What a list has in the place of a pair's fields. won: of each answer its share of duels."""
    row, _ = judged_rows[0]
    texts = {}
    for duel_row, _ in judged_rows:
        texts |= zip(duel_row.duel.answers, duel_row.responses)
    is_whole = all(judgements for _, judgements in judged_rows)
    return {
        "id": row.id.rpartition(" ")[0],
        "responses": [texts[place] for place in sorted(texts)],
        "ranks": row.duel.ranks,
        "won": shares_won(judged_rows) if is_whole else None,
    }


def duel_of(row, judgements):
    """A duel of two answers, which are named by their numbers in the item, from 1 on."""
    answers = [place + 1 for place in row.duel.answers] if row.duel else [1, 2]
    by_verdict = {1: answers[0], 2: answers[1], None: None}
    same = defaultdict(list)  # numbers of the samples that say exactly the same
    for judgement in judgements:
        key = judgement.order, judgement.text, judgement.finish, judgement.choice, judgement.verdict
        same[key].append(judgement.sample)
    texts = []
    for (order, text, finish, choice, verdict), samples in same.items():
        one = {
            "order": order,
            "samples": samples,
            "text": text,
            "truncated": finish == "length",
            "says": choice,
            "winner": by_verdict[verdict],
            "again": has_doubts(text),
        }
        texts.append(one)
    better = by_verdict[row.choice] if row.is_decided else None
    return {"answers": answers, "better": better, "texts": texts}


def longest(responses):
    """The number of the longest answer, None if there are several."""
    lengths = [len(text) for text in responses]
    return lengths.index(max(lengths)) + 1 if lengths.count(max(lengths)) == 1 else None


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
