"""The prompts of each step: every pass in its own order, read ahead, only those that fit."""

import contextlib
import functools
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from core.encoding import encode_prompt, prompt_length
from core.pairs import InputError, check_pairs, read_pairs, swap
from core.pictures import BadPicture
from core.runs import checkpoints
from core.sampler import MAX_PICTURES
from core.seeds import seed_from
from core.training import all_reduce, read_ahead


@dataclass
class Plan:
    """What a run will do: its data and its steps."""

    train: list  # pairs; in stage 5 tasks
    held_out: list  # all ranks'
    my_held_out: list  # this rank's; the ranks of one vLLM have the same
    batches: Iterator  # this rank's prompts of each step, a list of Samples
    first_step: int  # after those of the checkpoint that is continued
    steps: int

    def is_due(self, done, every):
        """Every so many steps, 0 = never, and after the last one."""
        return done == self.steps or (every > 0 and done % every == 0)


def make_plan(train, held_out, make_turns, processor, args, rank, world, device):
    """Drop what does not fit, and fork workers that read ahead, before anything large is loaded."""
    train = drop_too_long(train, make_turns, processor, args, rank, world)
    if held_out:
        held_out = drop_too_long(held_out, make_turns, processor, args, rank, world)
    steps = number_of_steps(args, len(train))
    group, groups = rank // args.tensor_parallel, world // args.tensor_parallel
    first_step = max(checkpoints(Path(args.out, "checkpoints")), default=0)
    if first_step > steps:
        raise InputError(
            f"--steps or --passes make {steps} steps, but the run in --out {args.out} has taken "
            f"{first_step}; expected at least as many, or another --out"
        )
    dataset = PromptDataset(train, make_turns, processor, args)
    batches = prompt_batches(dataset, first_step, steps, rank, world, device)
    return Plan(train, held_out, held_out[group::groups], batches, first_step, steps)


def read_held_out(path, limit):
    """Held-out pairs, their orders drawn by a coin, so that neither order is the rule."""
    if not path:
        return []
    held_out = read_pairs(path, limit)
    check_pairs(path, held_out)
    for number, pair in enumerate(held_out):
        if seed_from("order", number) % 2:
            held_out[number] = swap(pair)
    return held_out


def number_of_steps(args, pairs):
    if args.steps:
        return args.steps
    orders = 2 if args.both_orders else 1
    return math.ceil(args.passes * pairs * orders / args.rollout_batch)


def encode_prompts(items, make_turns, processor):
    """Prompts, Samples without a response, of pairs or tasks."""
    prompts = []
    for item in items:
        prompt = encode_prompt(processor, make_turns(item))
        prompt.pair = item
        prompts.append(prompt)
    return prompts


def pair_at(pairs, step, place, args):
    """The pair at a place of a step's global batch. Every pass over the pairs has its own order."""
    number = step * args.rollout_batch + place
    if args.both_orders:  # a pair and its swap are neighbours
        number //= 2
    epoch, position = divmod(number, len(pairs))
    pair = pairs[permutation(len(pairs), args.seed, epoch)[position]]
    if args.both_orders and place % 2 == 1:
        return swap(pair)
    return pair


@functools.lru_cache(2)
def permutation(n, seed, epoch):
    order = list(range(n))
    random.Random(f"{seed} {epoch} pairs").shuffle(order)
    return order


@contextlib.contextmanager
def naming(item):
    """What cannot be read is reported with the id of its pair or task."""
    try:
        yield
    except BadPicture as error:
        raise InputError(f"{item.id[:80]}: {error}") from None


class PromptDataset(torch.utils.data.Dataset):
    """The prompt, a Sample without a response, at (step, place in its global batch)."""

    def __init__(self, pairs, make_turns, processor, args):
        self.pairs = pairs
        self.make_turns = make_turns  # a pair or a task -> chat turns
        self.processor = processor
        self.args = args

    def __getitem__(self, step_and_place):
        step, place = step_and_place
        pair = pair_at(self.pairs, step, place, self.args)
        with naming(pair):
            (prompt,) = encode_prompts([pair], self.make_turns, self.processor)
        prompt.place = place
        return prompt


def prompt_batches(dataset, first_step, steps, rank, world, device):
    """
    This rank's prompts of each step, a list for each. Workers read them one step ahead; they are
    forked here, so call this while the process is small: each worker keeps what it inherits.
    """
    args = dataset.args
    size = args.rollout_batch // (world // args.tensor_parallel)
    start = rank // args.tensor_parallel * size
    my_places = range(start, start + size)
    places = ((step, place) for step in range(first_step, steps) for place in my_places)
    ahead = -(-size // max(1, args.workers))
    prompts = read_ahead(dataset, places, args.workers, ahead, device.type == "cuda")
    return group_into(prompts, size, steps - first_step)


def group_into(prompts, size, number):
    for _ in range(number):
        yield [next(prompts) for _ in range(size)]


def drop_too_long(items, make_turns, processor, args, rank, world):
    """
    The pairs or tasks whose prompt leaves room for --max_new_tokens in --context. Any other would
    stop vLLM in the middle of a run.
    """
    lengths = [0] * len(items)
    for number in range(rank, len(items), world):
        with naming(items[number]):
            lengths[number] = prompt_length(processor, make_turns(items[number]))
    longest = args.context - args.max_new_tokens
    kept = []
    for item, length in zip(items, all_reduce(lengths)):
        if length <= longest and len(item.images) <= MAX_PICTURES:
            kept.append(item)
    dropped = len(items) - len(kept)
    report = (
        f"{dropped} of {len(items)} prompts dropped: they have more than {MAX_PICTURES} images, or "
        f"with --max_new_tokens {args.max_new_tokens} exceed --context {args.context} "
        "(--max_pixels makes images smaller)"
    )
    if not kept:
        raise InputError(report)
    if dropped and rank == 0:
        print(report, file=sys.stderr)
    return kept
