"""The annotator's replies, in a journal that a stopped run goes on with."""

import json
from collections import defaultdict
from dataclasses import dataclass

from core.files import InputError
from stable_reinforce import parse


@dataclass
class Verdict:
    choice: int | None  # 1, 2, or None: the reply has no verdict
    offset: int  # of the reply in the journal


class Replies:
    """Every reply, in a journal whose first line is the settings that replies depend on."""

    def __init__(self, journal, made_with, most):
        self.journal = journal
        self.most = most  # replies for a pair
        self.verdicts = defaultdict(list)  # pair id -> [Verdict] in the order of the attempts
        self.total = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0
        ignored = []
        for where, offset, row in journal.rows_made_with(made_with):
            if not self._take(row, where, offset):
                ignored.append(where)
        if ignored:
            print(
                f"{ignored[0]}: ignored, because this attempt is in the journal already or is one "
                f"too many; {len(ignored)} such lines in all"
            )

    def _take(self, row, where, offset):
        """Learns a row of the journal; returns whether it is a reply that was missing."""
        try:
            is_new = row["attempt"] > len(self.verdicts[row["id"]])
            if is_new and len(self.verdicts[row["id"]]) < self.most:
                self._learn(row, offset)
                return True
        except (LookupError, TypeError, AttributeError, ValueError):
            expected = "an object with id, attempt, text, finish, tokens"
            found = json.dumps(row)[:80]
            raise InputError(f"{where}: {found} is not a reply; expected {expected}") from None
        return False

    def append(self, pair, reply):
        row = {
            "id": pair.id,
            "attempt": len(self.verdicts[pair.id]) + 1,
            "text": reply.text,
            "finish": reply.finish,
            "tokens": [reply.prompt_tokens, reply.completion_tokens],
        }
        (offset,) = self.journal.append([row])
        self._learn(row, offset)

    def _learn(self, row, offset):
        prompt_tokens, completion_tokens = row["tokens"]
        self.verdicts[row["id"]].append(Verdict(parse(row["text"]).choice, offset))
        self.total += 1
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens

    def text(self, verdict):
        return self.journal.read(verdict.offset)["text"]
