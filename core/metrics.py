"""What a step of reinforcement learning logs: seconds, means over ranks, what the updates did."""

import json
import math
import time
from collections import defaultdict
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch

from core.training import all_reduce
from stable_reinforce import parse


@dataclass
class Update:
    """What an optimizer step reports."""

    loss: float
    grad_norm: float  # before clipping; inf: not finite, so nothing was changed
    statistics: list[dict]  # of each micro-batch of this rank, see ratio_statistics


class Clock:
    """clock(phase): the seconds since the last call belong to that phase."""

    def __init__(self):
        self.seconds = {}
        self.last = time.perf_counter()

    def __call__(self, phase):
        now = time.perf_counter()
        self.seconds[phase] = now - self.last
        self.last = now


def global_means(values_by_key):
    """{key: this rank's values, NaN where there is none} -> their means over all ranks, or None."""
    sums, counts = [], []
    for values in values_by_key.values():
        values = torch.as_tensor(values, dtype=torch.float64)
        sums.append(values.nansum().item())
        counts.append(values.isfinite().sum().item())
    sums, counts = all_reduce(sums), all_reduce(counts)
    means = {}
    for key, total, count in zip(values_by_key, sums, counts):
        means[key] = total / count if count else None
    return means


def merge_statistics(updates):
    """Means over the response tokens, and maxima, of all updates and ranks."""
    sums, maxima = defaultdict(float), defaultdict(float)
    for statistics in chain(*(update.statistics for update in updates)):
        tokens = statistics["tokens"]
        sums["tokens"] += tokens
        for name, value in statistics.items():
            if name.endswith("_max"):
                maxima[name] = max(maxima[name], value)
            elif name != "tokens":
                sums[name] += value * tokens
    sums = reduce_values(sums, "sum")
    tokens = max(1, sums.pop("tokens"))
    means = {name: total / tokens for name, total in sums.items()}
    return means | reduce_values(maxima, "max")


def reduce_values(numbers, how):
    """{name: number} over all ranks, which have the same names in the same order."""
    return dict(zip(numbers, all_reduce(list(numbers.values()), how)))


def update_metrics(updates, judge, seconds):
    """What the log has of the updates, of the judge's calls and of the clock."""
    losses = [update.loss for update in updates]
    norms = [update.grad_norm for update in updates]
    failed = judge.counts["failed"] + judge.counts["unparsable"]
    calls, failed = all_reduce([judge.counts["calls"], failed])
    return {
        "loss": sum(losses) / len(losses),
        "loss_max": max(losses),
        "grad_norm": max(norms),
        "skipped": sum(not math.isfinite(norm) for norm in norms),
        **merge_statistics(updates),
        "judge_calls": calls,
        "judge_failed": failed,
        "seconds": sum(seconds.values()),
        **{f"s_{phase}": duration for phase, duration in seconds.items()},
    }


def log_row(samples, rewards, parts, kept, updates, judge, seconds):
    """A step's row of the log; results/README.md says what each key is."""
    lengths = [len(sample.response_ids) for sample in samples]
    row = global_means(
        {
            "reward": rewards,
            **parts,
            "length": lengths,
            "truncated": [sample.finish == "length" for sample in samples],
            "filtered": ~kept,
            "says_1": [parse(sample.text).choice == 1 for sample in samples],
        }
    )
    row["length_max"] = all_reduce(max(lengths, default=0), "max")
    row["samples"] = all_reduce(len(samples))
    row |= update_metrics(updates, judge, seconds)
    row["tokens_per_s"] = row["length"] * row["samples"] / row["seconds"]
    return row


def write_rollouts(out, rank, step, samples, rewards, parts, kept):
    with Path(out, f"rollouts-{rank}.jsonl").open("a", encoding="utf-8") as file:
        for number, sample in enumerate(samples):
            row = {
                "step": step,
                "id": sample.pair.id,
                "choice": sample.pair.choice,
                "text": sample.text,
                "finish": sample.finish,
                "reward": rewards[number].item(),
                "kept": kept[number].item(),  # False: dropped by the filter
            }
            for name, values in parts.items():
                row[name] = None if values[number].isnan() else values[number].item()
            file.write(json.dumps(row) + "\n")
