"""
Judgements that were made elsewhere (evaluate.py --judgements), scored like our own.

A line of the file is one judgement of one row:
  bench           the NAME of a --bench
  row or id       the row's number in the benchmark's file, from 0 on; or its id, if no other row
                  has the same. Answers 1 and 3 of the list x are the row with the id "x 1-3"
  order           0 if the answers were shown as the row lists them, 1 if the other way round;
                  or better_first, true or false, in its place
  text or choice  what the judge said; 1 or 2, as the answers were shown, or null for no verdict.
                  Where there are both, choice counts; --parse lenient reads the text of a null

A line with `rewards` and `critic` is one that the paper's released scripts wrote (inference/ of
yfzhang114/r1_reward): a row of the benchmark with the judge's text, and no number. These scripts
show the better answer first, always, and their reward of a text without a verdict is that of a 2.
"""

from collections import Counter, defaultdict
from typing import NamedTuple

from core.files import InputError
from core.judgements import LeftOut
from core.pairs import encodable, is_int, is_string, shown
from sources.reading import table_rows
from stable_reinforce import parse

EXPECTED = (
    "expected bench, row or id, order (0 or 1) or better_first (true or false), and text or choice "
    "(1, 2 or null)"
)
READ = object()  # a choice that the line does not state: as our own judgements are read


class Given(NamedTuple):
    """A judgement as its line has it."""

    order: int
    text: str
    choice: int | object | None  # READ where the line has none


class GivenJudgements:
    """
    The backend of --judgements. What the file holds decides on `orders` and `samples`.

    If each row was shown in one order alone, `benches` lists its answers in that order.
    """

    def __init__(self, path, benches):
        self.path = path
        self.rows = RowsByName(path, benches)
        self.given = {}  # key of a row: its lines
        self.released = Counter()  # lines of the released scripts: how their rewards are
        for where, line in table_rows(path, ()):
            row, given = self._read(line, where)
            self.given.setdefault(row.key, []).append(given)
        for bench in benches:
            if not any(key[0] == bench for key in self.given):
                raise InputError(f"--judgements {path} has none of --bench {bench}; leave it out")
        self.benches = benches
        self._find_protocol()

    def answer(self, jobs):
        while jobs:
            job = jobs.popleft()
            lines = [one for one in self.given.get(job.row.key, []) if one.order == job.order]
            wanted = lines[job.first : job.first + job.count]
            if len(wanted) < job.count:
                yield job, LeftOut(f"{self.path} has {len(lines)} judgements of it in this order")
            else:
                yield job, [judgement_of(job, number, one) for number, one in enumerate(wanted)]

    def notes(self):
        """What was read, in lines of text."""
        lines = sum(len(given) for given in self.given.values())
        rows = sum(len(rows) for rows in self.benches.values())
        notes = [
            f"{self.path}: {lines} judgements of {len(self.given)} of {rows} rows; orders: "
            f"{self.orders}, {self.samples} a row"
        ]
        if self.unused:
            notes.append(f"{self.unused} of them are not used: other rows have fewer")
        if self.released:
            notes.append(
                f"{self.released.total()} were made by the paper's released scripts, which show "
                f"the better answer first; {self.released['other']} of their rewards say otherwise "
                "than the verdict that is read here from the text"
            )
        return notes

    def _read(self, line, where):
        """(the row, the Given) of a line."""
        if not isinstance(line, dict):
            raise InputError(f"{where}: {EXPECTED}; got {shown(line)}")
        if "rewards" in line and "critic" in line:
            return self._read_released(line, where)
        row = self.rows.find(line, where)
        return row, Given(order_of(line, row, where), *said_in(line, where))

    def _read_released(self, line, where):
        text, rewards = line["critic"], line["rewards"]
        if not is_string(text) or not is_two_numbers(rewards):
            raise InputError(
                f"{where}: rewards is {shown(rewards)} and critic {shown(text)}; expected two "
                "numbers and a text, as the released scripts write them"
            )
        row = self.rows.find_released(line, where)
        given = Given(row.choice - 1, encodable(text), READ)
        says_first = rewards[0] > rewards[1]
        self.released["same" if says_first == (parse(given.text).choice == 1) else "other"] += 1
        return row, given

    def _find_protocol(self):
        """Both orders, as soon as one row has both; or each row in the one that it was shown in."""
        counts = {}  # key: lines in order 0, in order 1
        for key, lines in self.given.items():
            orders = [line.order for line in lines]
            counts[key] = orders.count(0), orders.count(1)
        in_an_order = []
        for both in counts.values():
            in_an_order += [count for count in both if count]
        usual = Counter(in_an_order).most_common(1)[0][0]
        self.unused = sum(max(0, count - usual) for count in in_an_order)
        if any(0 not in both for both in counts.values()):
            self.orders, self.samples = "both", 2 * usual
            return
        self.samples = usual
        rows = [self.rows.by_number[key] for key in counts]
        if all(self.given[row.key][0].order == row.choice - 1 for row in rows):
            self.orders = "chosen_first"
            return
        self.orders = "dataset"
        for bench, rows in self.benches.items():
            self.benches[bench] = [self._as_shown(row) for row in rows]

    def _as_shown(self, row):
        """The row with its answers in the order in which the judge was shown them."""
        lines = self.given.get(row.key)
        if not lines or lines[0].order == 0:
            return row
        self.given[row.key] = [line._replace(order=0) for line in lines]
        return row.swapped()


def judgement_of(job, number, given):
    judgement = job.judgement(number, given.text)
    if given.choice is not READ:
        judgement.choice = given.choice
    return judgement


class RowsByName:
    """Rows of benchmarks by their numbers, by ids that are unique, and by their texts."""

    def __init__(self, path, benches):
        self.path = path
        self.benches = benches
        self.by_number = {}
        self.by_id = defaultdict(list)
        self.by_texts = defaultdict(list)
        self.found = Counter()  # texts: lines that were found by them
        for rows in benches.values():
            for row in rows:
                better, worse = row.responses if row.choice == 1 else row.responses[::-1]
                self.by_number[row.key] = row
                self.by_id[row.bench, row.id].append(row)
                self.by_texts[row.id, row.question, better, worse].append(row)

    def find(self, line, where):
        """The row that a line names by row or by id."""
        bench = line.get("bench")
        if not is_string(bench) or bench not in self.benches:
            expected = f"expected a NAME of --bench: {', '.join(self.benches)}"
            raise InputError(f"{where}: bench is {shown(bench)}; {expected}")
        name = "row" if "row" in line else "id"
        value = line.get(name)
        if name == "row":
            found = [self.by_number.get((bench, value))] if is_int(value) else [None]
        else:
            found = self.by_id.get((bench, str(value)), [None])
        if len(found) > 1:
            raise InputError(
                f"{where}: id {shown(value)} is that of {len(found)} rows of {bench}; name the row "
                "by its number in the file: row, from 0 on"
            )
        if found[0] is None:
            raise InputError(
                f"{where}: {name} is {shown(value)}, and {bench} has no such row; {EXPECTED}"
            )
        if name == "row" and "id" in line and str(line["id"]) != found[0].id:
            raise InputError(
                f"{where}: row {value} of {bench} has the id {shown(found[0].id)}, the line says "
                f"{shown(line['id'])}; are they of the same version of the file?"
            )
        return found[0]

    def find_released(self, line, where):
        """The row that is written out in a line; rows that are the same take lines in turn."""
        texts = released_texts(line)
        rows = self.by_texts.get(texts) if all(map(is_string, texts)) else None
        if not rows:
            raise InputError(
                f"{where}: id {shown(texts[0])}: no row of {', '.join(self.benches)} has this id, "
                "question and these answers; give the --bench file that the script read"
            )
        self.found[texts] += 1
        return rows[(self.found[texts] - 1) % len(rows)]


def released_texts(line):
    """(id, question, better answer, worse answer) of a line of the released scripts."""
    if "Better" in line:  # Multimodal RewardBench
        outputs = ("Output2", "Output1") if line["Better"] == "Output2" else ("Output1", "Output2")
        fields = ("ID", "Text", *outputs)
    else:
        fields = ("id", "prompt", "chosen", "rejected")
    row_id, *texts = [line.get(field) for field in fields]
    return str(row_id), *map(encodable, texts)


def order_of(line, row, where):
    order, better_first = line.get("order"), line.get("better_first")
    if is_int(order) and order in (0, 1) and better_first is None:
        return order
    if isinstance(better_first, bool) and order is None:
        return row.choice - 1 if better_first else 2 - row.choice
    raise InputError(
        f"{where}: order is {shown(order)} and better_first {shown(better_first)}; {EXPECTED}"
    )


def said_in(line, where):
    """(text, choice) of a line."""
    text, choice = line.get("text", ""), line.get("choice", READ)
    is_choice = choice is READ or choice is None or (is_int(choice) and choice in (1, 2))
    if not is_string(text) or not is_choice or ("text" not in line and choice is READ):
        raise InputError(
            f"{where}: text is {shown(line.get('text'))} and choice {shown(line.get('choice'))}; "
            f"{EXPECTED}"
        )
    return encodable(text), choice


def is_two_numbers(value):
    if not isinstance(value, list) or len(value) != 2:
        return False
    return all(type(number) in (int, float) for number in value)
