r"""
A checkpoint, written and resumed. The first call trains a model for one update, writes a checkpoint
into --out and prints a digest of all weights. The second one, which finds it there, loads it and
prints the digest of what it has got.

$ torchrun --nproc_per_node=2 bench/check_checkpoint.py --model out/gpu/models/small-0 \
    --data out/gpu/models/pairs.jsonl --out out/gpu/checkpoint
"""

import hashlib
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import torch.distributed as dist

import rl
from core import runs, training
from core.encoding import load_processor
from core.flags import command_line
from core.pairs import judging_turns, read_pairs
from core.policy import whole_weights
from core.prompts import encode_prompts

RESPONSE = 16  # tokens


def digest(model):
    """Of all weights; every rank takes part."""
    found = hashlib.sha256()
    for some in whole_weights(model):
        for _, weight in some:
            found.update(weight.detach().float().cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def samples_of(prompts):
    """Random responses, half of them to be made likelier, half of them less likely."""
    rng = random.Random(0)
    samples = []
    for number, prompt in enumerate(prompts):
        ids = rng.choices(range(256), k=RESPONSE)
        advantages = torch.full((RESPONSE,), number % 2 - 0.5)
        samples.append(replace(prompt, response_ids=ids, advantages=advantages))
    return samples


def parser():
    p = command_line(__doc__)
    add = p.add_argument
    add("--model", required=True, help="a model's folder")
    add("--data", required=True, help="JSONL of pairs")
    add("--out", required=True, help="folder of the checkpoint")
    add("--zero", type=int, default=3, help="DeepSpeed ZeRO stage")
    add("--samples", type=int, default=2, help="of each rank in the update")
    add("--micro_tokens", type=int, default=4096, help="of a micro-batch")
    add("--lr", type=float, default=1e-3, help="learning rate; one that moves bfloat16")
    return p


def start_run(args):
    """A rl.Run with a trainer and no sampler."""
    rank, world, device = training.start_ranks(0)
    words = ["--model", args.model, "--micro_tokens", str(args.micro_tokens)]
    flags = rl.parser().parse_args(words)
    policy = rl.load(flags, device, recompute=True)
    trainer = training.make_trainer(policy, args.zero, args.lr, device)
    processor = load_processor(args.model)
    return rl.Run(flags, rank, world, device, processor, None, trainer, None)


def main():
    args = parser().parse_args()
    run = start_run(args)
    out = Path(args.out)
    found = runs.checkpoints(out)
    start = time.perf_counter()
    if found:
        runs.load_checkpoint(found[max(found)], run.trainer)
        what = "resumed"
    else:
        first = digest(run.policy.model)
        mine = read_pairs(args.data)[run.rank :: run.world][: args.samples]
        prompts = encode_prompts(mine, judging_turns, run.processor)
        rl.optimizer_step(run, samples_of(prompts), args.lr)
        runs.save_checkpoint(out, run.trainer, 1, {})
        what = f"began: {first}, saved"
    text = f"{what}: {digest(run.policy.model)} in {time.perf_counter() - start:.1f} s"
    if run.rank == 0:
        print(text, flush=True)
    dist.barrier()


if __name__ == "__main__":
    main()
