"""
Train a toy model on two ranks with every ZeRO stage and several micro-batch sizes: STEPS steps,
then one whose loss is not a number, then one at learning rate 0. For tests/test_training.py.

$ torchrun --nproc_per_node=2 tests/programs/train_two_ranks.py FOLDER    # has base/, pairs.jsonl
"""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import torch

from core.encoding import collate, encode, load_processor
from core.pairs import judging_turns, read_pairs
from core.policy import gather_weights, load_policy, save_policy, token_logps
from core.training import make_trainer, row_batches, start_ranks, update
from toy import cpu

STEPS, LR = 5, 1e-4
LINEAR = torch.nn.functional.linear
# (ZeRO stage, --micro_tokens, --recompute)
CASES = [
    (0, 600, False),
    (1, 600, False),
    (2, 1, False),
    (2, 10**6, False),
    (2, 600, True),
    (3, 600, True),
]


def load_samples(folder, processor):
    """Two responses to each prompt, in one list."""
    samples = []
    for pair in read_pairs(folder / "pairs.jsonl", 7):
        sample = encode(processor, judging_turns(pair), pair.annotation)
        half = sample.response_ids[: len(sample.response_ids) // 2]
        samples += [sample, replace(sample, response_ids=half)]
    return samples


def train(folder, rank, device, zero, budget, recompute):
    policy = load_policy(folder / "base", dtype=torch.float32, recompute=recompute)
    cpu.speed_up_policy(policy)  # MKL's sums depend on how a matrix lies in memory, oneDNN's do not
    processor = load_processor(folder / "base")
    samples = load_samples(folder, processor)
    tokens = sum(len(sample.response_ids) for sample in samples)
    # rank 0 has a single text, rank 1 all samples with pictures
    local = samples[6:8] if rank == 0 else samples[:6] + samples[8:]
    trainer = make_trainer(policy, zero, LR, device)
    layer_calls = []
    layer = policy.model.base_model.language_model.layers[0]
    layer.input_layernorm.register_forward_hook(lambda *_: layer_calls.append(1))

    def loss_function(batch):
        logps, _ = token_logps(trainer, collate(batch, 0))
        return -logps.sum() / tokens, len(batch)

    def broken_loss(batch):
        loss, metrics = loss_function(batch)
        return loss * math.nan, metrics

    batches = row_batches(local, budget)
    steps = [update(trainer, batches, loss_function, LR) for _ in range(STEPS)]
    calls = len(layer_calls)
    weights = gather_weights(policy, rank=0)  # on both
    broken_loss_value, broken_norm, _ = update(trainer, batches, broken_loss, LR)
    after = gather_weights(policy, rank=0)
    loss_again, _, metrics = update(trainer, batches, loss_function, 0.0)
    if zero == 3:
        save_policy(policy, processor, folder / "saved", rank)
    if rank == 0:
        torch.save(weights, folder / f"weights-{zero}-{budget}.pt")
    return {
        "losses": [loss for loss, _, _ in steps],
        "norms": [grad_norm for _, grad_norm, _ in steps],
        "metrics": metrics,
        "micro_batches": [len(batch) for batch in batches],
        "layer_calls": calls,
        "broken": [broken_loss_value, broken_norm],
        "moved": max(float((after[name] - weights[name]).abs().max()) for name in weights),
        "loss_again": loss_again,
        "linear_is_torchs": torch.nn.functional.linear is LINEAR,
    }


def main():
    folder = Path(sys.argv[1])
    rank, _, device = start_ranks(0)
    found = {
        f"{zero}-{budget}": train(folder, rank, device, zero, budget, recompute)
        for zero, budget, recompute in CASES
    }
    (folder / f"found-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
