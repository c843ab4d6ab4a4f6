"""
rl.py --check without a fault, then with one planted at a time. For tests/test_rl.py.

$ torchrun --nproc_per_node=2 tests/programs/compare_with_faults.py FLAGS    # flags of rl.py
"""

import os
import sys
from dataclasses import replace
from unittest import mock

from PIL import ImageOps

import rl
from core.encoding import load_processor
from core.pairs import read_pairs
from core.sampler import VLLMSampler
from core.training import start_ranks

generate = VLLMSampler.generate
load_weights = VLLMSampler.load_weights


def without_embeddings(sampler, named_tensors):
    """They are the weight of the language model's head, too."""
    named_tensors = [(name, x) for name, x in named_tensors if "embed_tokens" not in name]
    return load_weights(sampler, named_tensors)


def other_pixels(sampler, prompts, *args, **options):
    """Of the same size."""
    changed = []
    for prompt in prompts:
        images = prompt.media.images
        if images:
            images = [ImageOps.invert(image) for image in images]
        changed.append(replace(prompt, media=replace(prompt.media, images=images)))
    return generate(sampler, changed, *args, **options)


def without_pictures(sampler, prompts, *args, **options):
    blind = [replace(prompt, media=replace(prompt.media, images=None)) for prompt in prompts]
    return generate(sampler, blind, *args, **options)


def forget_nothing(sampler):
    """What was computed with the old weights stays in vLLM's caches."""


FAULTS = {
    "no fault": {"generate": generate},
    "no embeddings": {"load_weights": without_embeddings},
    "other pixels": {"generate": other_pixels},
    "no pictures": {"generate": without_pictures},
    "nothing forgotten": {"after_sync": forget_nothing},
}


def outcome_of(run, pairs, replaced):
    with mock.patch.multiple(VLLMSampler, **replaced):
        try:
            return str(rl.check(run, pairs))
        except RuntimeError as error:
            return type(error).__name__


args = rl.parser().parse_args(sys.argv[1:])
rank, world, device = start_ranks(0)
run = rl.start_run(args, load_processor(args.model), rank, world, device)
pairs = read_pairs(args.data)
for name, replaced in FAULTS.items():
    outcome = outcome_of(run, pairs, replaced)
    rl.sync(run)  # a fault leaves nothing behind for the next one
    if rank == 0:
        print(f"RESULT {name}: {outcome}", flush=True)
os._exit(0)  # vLLM may be left in any state
