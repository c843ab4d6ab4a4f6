"""A benchmark's rows, their judgements, which ones a protocol asks for, and the file of them."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, get_type_hints

from core.files import InputError, parse_json
from core.lenient import lenient_choice
from core.pairs import (
    Pair,
    encodable,
    is_int,
    is_string,
    pair_from_row,
    row_from_pair,
    shown,
    swap,
)
from core.voting import STOP_AFTER, decide, trailing_run
from stable_reinforce import parse


def digest(*parts):
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


@dataclass
class ListDuel:
    """Which two answers of a list a row compares (core/lists.py)."""

    list_number: int  # in the file
    answers: list[int]  # their places in the list, from 0 on, as the row has them
    ranks: list[int]  # of all answers of the list, 1 is the best; equal ones are ties


@dataclass(kw_only=True)
class BenchmarkRow(Pair):
    """A pair of a benchmark, known by its number in the file, because ids repeat (deviation 4)."""

    bench: str
    row: int  # its number in the benchmark's file
    groups: dict[str, str]  # grouping -> the row's group: the columns of the benchmark's tables
    set: str  # rows that Acc+ takes together have the same
    duel: ListDuel | None = None  # None: a pair of its own

    @property
    def key(self):
        return self.bench, self.row

    @property
    def is_decided(self):
        """Whether one answer is known to be the better one; if not, `choice` means nothing."""
        if self.duel is None:
            return True
        first, second = self.duel.answers
        return self.duel.ranks[first] != self.duel.ranks[second]

    def swapped(self):
        """The same row with its answers in the other order."""
        row = swap(self)
        if self.duel:
            row.duel = dataclasses.replace(self.duel, answers=self.duel.answers[::-1])
        return row

    def content(self):
        """A digest: rows of two runs are the same if it is."""
        return digest(self.id, self.question, self.responses, self.choice)

    def to_json(self):
        place = {"bench": self.bench, "row": self.row, "groups": self.groups, "set": self.set}
        if self.duel:
            place["duel"] = dataclasses.asdict(self.duel)
        return row_from_pair(self) | place

    @classmethod
    def from_pair(cls, pair, **place):
        """A pair with its place in a benchmark: bench, row, groups, set, and perhaps duel."""
        fields = {field.name: getattr(pair, field.name) for field in dataclasses.fields(Pair)}
        return cls(**fields, **place)

    @classmethod
    def from_json(cls, row, where):
        """The row that to_json() wrote; it may have an empty answer, which a pair may not."""
        place = {name: row.get(name) for name in PLACE} if isinstance(row, dict) else {}
        for name, value in place.items():
            expected, is_valid = PLACE[name]
            if not is_valid(value):
                raise InputError(f"{where}: {name!r} is {shown(value)}; expected {expected}")
        pair = pair_from_row(row_without_empty_answers(row), where)
        pair.responses = encodable(row["responses"])
        pair.extra = {name: value for name, value in pair.extra.items() if name not in place}
        place["duel"] = ListDuel(**place["duel"]) if place["duel"] else None
        return cls.from_pair(pair, **place)


def is_groups(value):
    return isinstance(value, dict) and all(is_string(group) for group in value.values())


def is_duel(value):
    if value is None:
        return True
    if not isinstance(value, dict) or set(value) != {"list_number", "answers", "ranks"}:
        return False
    answers, ranks = value["answers"], value["ranks"]
    if not is_int_list(answers) or not is_int_list(ranks) or not is_int(value["list_number"]):
        return False
    return len(answers) == 2 and all(0 <= answer < len(ranks) for answer in answers)


def is_int_list(value):
    return isinstance(value, list) and all(is_int(number) for number in value)


PLACE = {  # of a row in its benchmark: what is expected, the check
    "bench": ("a string", is_string),
    "row": ("a whole number", is_int),
    "groups": ("an object of strings", is_groups),
    "set": ("a string", is_string),
    "duel": ("null or an object with list_number, answers (two places) and ranks", is_duel),
}


def row_without_empty_answers(row):
    """A row of JSON in which an empty answer is "-", to check it as the row of a pair."""
    responses = row.get("responses") if isinstance(row, dict) else None
    if not isinstance(responses, list):
        return row
    return row | {"responses": ["-" if is_blank(text) else text for text in responses]}


def is_blank(text):
    return isinstance(text, str) and not text.strip()


@dataclass
class Judgement:
    """One sample of a judge on one row; a line of judgements.jsonl."""

    bench: str
    row: int
    id: str
    order: int  # 0: the answers were shown as the row lists them; 1: swapped
    sample: int  # its number among the samples of this row and order
    text: str
    choice: int | None  # 1 or 2, as the answers were shown; None: no verdict
    logp1: float | None  # log-probability of 1 where the verdict is; None: not known
    logp2: float | None
    tokens: int
    finish: str  # "stop", or "length" if it was truncated

    @property
    def key(self):
        return self.bench, self.row, self.order, self.sample

    @property
    def verdict(self):
        """1 or 2, as the row lists its answers; None: no verdict."""
        if self.choice is None or self.order == 0:
            return self.choice
        return 3 - self.choice

    @property
    def lenient_choice(self):
        """
        As --parse lenient reads it. What was cut off has no conclusion; equal rewards are a tie,
        known by their log-probabilities, and their text is no judgement.
        """
        if self.choice is not None or self.finish == "length" or self.logp1 is not None:
            return self.choice
        return lenient_choice(self.text)

    @property
    def is_tie(self):
        """Whether it comes from equal rewards."""
        return self.choice is None and self.logp1 is not None and self.logp1 == self.logp2


class LeftOut(NamedTuple):
    """What a backend yields in the place of judgements: this row can never be judged."""

    reason: str


def strict_choice(text):
    return parse(text).choice


class Job(NamedTuple):
    """Samples of a row in one order that a backend is asked for at once."""

    row: BenchmarkRow
    order: int
    first: int  # number of the first sample
    count: int

    def judgement(
        self, number, text, tokens=0, finish="stop", logps=(None, None), read=strict_choice
    ):
        """The job's number-th judgement; its choice is read from the text."""
        return Judgement(
            bench=self.row.bench,
            row=self.row.row,
            id=self.row.id,
            order=self.order,
            sample=self.first + number,
            text=text,
            choice=read(text),
            logp1=logps[0],
            logp2=logps[1],
            tokens=tokens,
            finish="length" if finish == "length" else "stop",
        )


@dataclass(frozen=True)
class Protocol:
    """How rows are judged."""

    orders: str  # "both" in halves; "dataset": as the file lists the answers; "chosen_first"
    samples: int  # a row, over both orders together
    early_stop: bool = False  # a row ends after three equal verdicts in a row (C.10)
    parse: str = "strict"  # or "lenient": how verdicts are read; what is kept is always strict
    ties: str = "wrong"  # or "half": what equal rewards of the two answers count

    @property
    def n_orders(self):
        return 2 if self.orders == "both" else 1

    def keys(self, row):
        """The keys of a row's judgements, in the sequence of early stopping (deviation 8)."""
        keys = []
        for i in range(self.samples):
            if self.orders == "both":
                order, sample = (row.row + i) % 2, i // 2
            elif self.orders == "dataset":
                order, sample = 0, i
            else:
                order, sample = row.choice - 1, i
            keys.append((*row.key, order, sample))
        return keys

    def read(self, judgement):
        """The judgement with its verdict as this protocol reads it."""
        if self.parse == "strict":
            return judgement
        return dataclasses.replace(judgement, choice=judgement.lenient_choice)

    def judgements_so_far(self, row, done):
        """A row's judgements in that sequence, up to the first one that is not done."""
        judgements = []
        for key in self.keys(row):
            if key not in done:
                break
            judgements.append(self.read(done[key]))
        return judgements

    def outcome(self, judgements):
        """What these judgements of a row come to; None: more are needed."""
        verdicts = [judgement.verdict for judgement in judgements]
        if self.early_stop:
            return decide(verdicts, self.samples)
        return decide(verdicts, self.samples, run=self.samples + 1)

    def next_jobs(self, row, done):
        """What to ask for next. With early stopping, only what is needed whatever it says."""
        keys = self.keys(row)
        if self.early_stop:
            judgements = self.judgements_so_far(row, done)
            if self.outcome(judgements) is not None:
                return []
            verdicts = [judgement.verdict for judgement in judgements]
            needed = STOP_AFTER - trailing_run(verdicts)
            keys = keys[len(verdicts) : len(verdicts) + needed]
        missing = sorted(key for key in keys if key not in done)
        return _group_into_jobs(row, missing)


def _group_into_jobs(row, keys):
    """Samples of one order that follow each other become one job."""
    jobs = []
    for *_, order, sample in keys:
        last = jobs[-1] if jobs else None
        if last and last.order == order and last.first + last.count == sample:
            jobs[-1] = last._replace(count=last.count + 1)
        else:
            jobs.append(Job(row, order, sample, 1))
    return jobs


# --- the file of judgements

JSON_TYPES = get_type_hints(Judgement)


def judgements_file(folder, rank=0):
    """Each rank writes a file of its own."""
    name = f"judgements-{rank}.jsonl" if rank else "judgements.jsonl"
    return Path(folder, name)


def read_judgements(folder):
    """{key: judgement} of a run. A last line without an end was cut off, or is being written."""
    done = {}
    for where, line in _whole_lines(folder, "judgements*.jsonl"):
        try:
            judgement = _judgement_from_json(line)
            if judgement.key in done:
                raise ValueError(f"{judgement.key} is there already")
        except ValueError as problem:
            advice = "remove that line, and the judgement is made again"
            raise InputError(f"{where}: {problem}; {advice}") from None
        done[judgement.key] = judgement
    return done


def _whole_lines(folder, pattern):
    """(where, line), without a half-written one at the end of a file."""
    for path in sorted(Path(folder).glob(pattern)):
        whole_lines = path.read_bytes().split(b"\n")[:-1]
        for number, line in enumerate(whole_lines, 1):
            yield f"{path}, line {number}", line


def _judgement_from_json(line):
    try:
        row = json.loads(line)
        fields = {field: row[field] for field in JSON_TYPES}
    except (ValueError, TypeError, KeyError, RecursionError) as problem:
        expected = f"expected an object with {', '.join(JSON_TYPES)}"
        raise ValueError(f"not a judgement ({repr(problem)[:80]}); {expected}") from None
    for field, value in fields.items():
        if not isinstance(value, JSON_TYPES[field]):
            raise ValueError(f"{field!r} is {repr(value)[:80]}")
    return Judgement(**fields)


# --- the file of rows that are left out


def left_out_file(folder, rank=0):
    return Path(folder, f"left_out-{rank}.jsonl" if rank else "left_out.jsonl")


def left_out_line(row, reason):
    printable = "".join(letter if letter.isprintable() else " " for letter in reason)
    reason = " ".join(printable.split())[:400]
    return {"bench": row.bench, "row": row.row, "id": row.id[:200], "reason": reason}


def read_left_out(folder):
    """{(bench, row): its line} of a run."""
    found = {}
    for where, line in _whole_lines(folder, "left_out*.jsonl"):
        row = parse_json(line, where)
        names = ("bench", "row", "id", "reason")
        if not isinstance(row, dict) or any(name not in row for name in names):
            raise InputError(
                f"{where}: expected an object with {', '.join(names)}; remove that line, and the "
                "row is asked for again"
            )
        found[row["bench"], row["row"]] = row
    return found
