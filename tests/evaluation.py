"""What the tests of stage 4 share: rows, judges that are functions, and the toy's benchmarks."""

import dataclasses
import os
import random

import evaluate
from core.judgements import BenchmarkRow, Protocol
from core.judging import collect
from core.scoring import score_benchmark

VL, MM, RLHF = "VL-RewardBench", "Multimodal-RewardBench", "MM-RLHF-RewardBench"
FILES = {
    VL: "VL-RewardBench/data/test-00000-of-00001.parquet",
    MM: "Multimodal-RewardBench/data/all_data.json",
    RLHF: "MM-RLHF-RewardBench/mm_reward_bench.jsonl",
    "pairs": "pairs.jsonl",
}


def bench_flags(toy, *benches):
    return ["--bench", *(f"{name}={toy / FILES[name]}" for name in benches or FILES)]


def args_of(*words):
    words = [str(word) for word in words]
    if "--out" not in words:
        words += ["--out", os.devnull]
    return evaluate.check_args(evaluate.parser().parse_args(words))


def toy_rows(toy, tmp_path, *benches, words=()):
    """{bench: rows} of the toy's benchmarks."""
    return evaluate.read_rows(args_of(*bench_flags(toy, *benches), "--out", tmp_path, *words))


def make_row(number, choice=1, groups=None, together=None, responses=("x", "yy"), bench="pairs"):
    return BenchmarkRow(
        id=f"id-{number}",
        source=bench,
        question="Q?",
        images=[],
        video=None,
        responses=list(responses),
        choice=choice,
        bench=bench,
        row=number,
        groups=groups or {"source": "a"},
        set=together or str(number),
    )


def says(choice, **fields):
    """What a judge says: the fields of a judgement."""
    text = "I cannot tell."
    if choice:
        text = f"<think>because</think><answer>{choice}</answer>"
    return {"text": text, "tokens": 10} | fields


class JudgeByRule:
    """A backend of a function (row, order, sample) -> says(...)."""

    def __init__(self, rule):
        self.rule = rule

    def answer(self, jobs):
        while jobs:
            job = jobs.popleft()
            judgements = []
            for number in range(job.count):
                fields = self.rule(job.row, job.order, job.first + number)
                judgement = job.judgement(number, fields["text"])
                judgements.append(dataclasses.replace(judgement, **fields))
            yield job, judgements


def judged(rows, protocol, rule):
    """{key: judgement}: all that the protocol asks for."""
    done = {}
    collect(rows, JudgeByRule(rule), done, protocol)
    return done


def always(choice):
    return lambda row, order, sample: says(choice)


def random_judge(seed, p=0.65):
    """Right with probability p, without a verdict with 0.05."""

    def rule(row, order, sample):
        rng = random.Random(f"{seed} {row.bench} {row.row} {order} {sample}")
        better = 3 - row.choice if order else row.choice
        choices = [better, 3 - better, None]
        (choice,) = rng.choices(choices, [p, 0.95 - p, 0.05])
        return says(choice, logp1=-rng.random(), logp2=-3 * rng.random())

    return rule


def score(rows, protocol, rule, published=None):
    """Every number of a benchmark, as in results.json."""
    done = judged(rows, protocol, rule)
    return score_benchmark(rows, done, protocol, published or {})[0]


def greedy(orders):
    """One judgement a row, in these orders."""
    return Protocol(orders, samples=1)


def value(result, method, column="overall"):
    return result["lines"][method][column][0]
