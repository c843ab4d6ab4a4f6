"""A judge to call from Python: a decision between two answers, an order of several."""

from operator import itemgetter
from typing import NamedTuple

from core.files import InputError
from core.judging import collect
from core.lists import duel_rows, shares_won


class Decision(NamedTuple):
    choice: int | None  # 1 or 2, the better answer
    probability: float  # its share of the votes
    votes: tuple  # for 1, for 2, none
    reasoning: str  # of a sample that chose so
    orders_agree: bool | None  # whether each order alone says the same; None: there is one order


class Judge:
    """What evaluate.Judge makes from the words of the command line: a backend and a protocol."""

    def __init__(self, backend, protocol):
        self.backend = backend
        self.protocol = protocol

    def judged_duels(self, question, images, answers):
        """[(row, its judgements)] of each two answers; those in the order as given come first."""
        rows = duel_rows(
            answers,
            id="",
            source="",
            question=question,
            images=[str(path) for path in images],
            video=None,
            bench="",
            groups={},
        )
        done = {}
        for line in collect(rows, self.backend, done, self.protocol).values():
            raise InputError(f"answers {line['id'].strip()} cannot be judged: {line['reason']}")
        judgements = {row.key: [] for row in rows}
        for key in sorted(done):
            judgements[key[:2]].append(self.protocol.read(done[key]))
        return [(row, judgements[row.key]) for row in rows]

    def __call__(self, question, images, answer1, answer2):
        ((_, judgements),) = self.judged_duels(question, images, [answer1, answer2])
        return decide(judgements)

    def rank(self, question, images, answers):
        """Every answer against every other one, in both orders; without a verdict both get half."""
        if len(answers) < 2:
            raise InputError(f"rank compares two answers or more, got {len(answers)}")
        return ranking(self.judged_duels(question, images, answers))


def ranking(judged_duels):
    """[(index of an answer, its share of duels won)], the best first."""
    shares = shares_won(judged_duels)
    return sorted(enumerate(shares), key=itemgetter(1), reverse=True)


def decide(judgements):
    """The Decision that the judgements of a duel come to."""
    verdicts = [judgement.verdict for judgement in judgements]
    votes = (verdicts.count(1), verdicts.count(2), verdicts.count(None))
    agree = orders_agree(judgements)
    lead = votes[0] - votes[1] or sum(lead_in_log_odds(judgement) for judgement in judgements)
    if lead == 0:
        return Decision(None, 0.0, votes, "", agree)
    choice = 1 if lead > 0 else 2
    first = verdicts.index(choice)
    probability = votes[choice - 1] / len(verdicts)
    return Decision(choice, probability, votes, judgements[first].text, agree)


def orders_agree(judgements):
    leads = []
    for order in (0, 1):
        verdicts = [judgement.verdict for judgement in judgements if judgement.order == order]
        if not verdicts:
            return None
        leads.append(verdicts.count(1) - verdicts.count(2))
    return leads[0] * leads[1] > 0


def lead_in_log_odds(judgement):
    """How much surer of answer 1 than of answer 2: in a tied vote, the surer samples decide."""
    if None in (judgement.choice, judgement.logp1, judgement.logp2):
        return 0.0
    log_odds = judgement.logp1 - judgement.logp2
    return log_odds if judgement.order == 0 else -log_odds
