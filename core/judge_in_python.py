"""A judge to call from Python: a decision between two answers, an order of several."""

from collections import Counter
from typing import NamedTuple

from core.files import InputError
from core.judgements import BenchmarkRow
from core.judging import collect


class Decision(NamedTuple):
    choice: int | None  # 1 or 2, the better answer
    probability: float  # its share of the votes
    votes: tuple  # for 1, for 2, none
    reasoning: str  # of a sample that chose so


class Judge:
    """What evaluate.Judge makes from the words of the command line: a backend and a protocol."""

    def __init__(self, backend, protocol):
        self.backend = backend
        self.protocol = protocol

    def judgements(self, question, images, pairs):
        """The judgements of each pair of answers, those in the order as given first."""
        rows = []
        for number, answers in enumerate(pairs):
            row = BenchmarkRow(
                id=str(number),
                source="",
                question=question,
                images=[str(path) for path in images],
                video=None,
                responses=list(answers),
                choice=1,  # not known; what is asked for does not depend on it
                bench="",
                row=number,
                groups={},
                set=str(number),
            )
            rows.append(row)
        done = {}
        for line in collect(rows, self.backend, done, self.protocol).values():
            raise InputError(f"pair {line['row']} cannot be judged: {line['reason']}")
        judgements = [[] for _ in rows]
        for key in sorted(done):
            judgements[done[key].row].append(self.protocol.read(done[key]))
        return judgements

    def __call__(self, question, images, answer1, answer2):
        (judgements,) = self.judgements(question, images, [(answer1, answer2)])
        verdicts = [judgement.verdict for judgement in judgements]
        votes = (verdicts.count(1), verdicts.count(2), verdicts.count(None))
        lead = votes[0] - votes[1] or sum(lead_in_log_odds(judgement) for judgement in judgements)
        if lead == 0:
            return Decision(None, 0.0, votes, "")
        choice = 1 if lead > 0 else 2
        first = verdicts.index(choice)
        probability = votes[choice - 1] / len(verdicts)
        return Decision(choice, probability, votes, judgements[first].text)

    def rank(self, question, images, answers):
        """Every answer against every other one, in both orders; without a verdict both get half."""
        duels = []
        for i in range(len(answers)):
            duels += [(i, j) for j in range(i)]
        pairs = [(answers[i], answers[j]) for i, j in duels]
        points = {1: 1.0, None: 0.5, 2: 0.0}
        won = Counter({i: 0.0 for i in range(len(answers))})
        for (i, j), judgements in zip(duels, self.judgements(question, images, pairs)):
            score = sum(points[judgement.verdict] for judgement in judgements)
            share = score / len(judgements)
            won[i] += share / (len(answers) - 1)
            won[j] += (1 - share) / (len(answers) - 1)
        return won.most_common()


def lead_in_log_odds(judgement):
    """How much surer of answer 1 than of answer 2: in a tied vote, the surer samples decide."""
    if None in (judgement.choice, judgement.logp1, judgement.logp2):
        return 0.0
    log_odds = judgement.logp1 - judgement.logp2
    return log_odds if judgement.order == 0 else -log_odds
