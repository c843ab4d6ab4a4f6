"""
vLLM's sleep and wake, as rl.py uses them: how much memory sleep gives back, whether all weights are
back after it, and whether vLLM then says the same tokens as before. On a CPU vLLM does not sleep;
there only the weights are loaded anew.

$ python bench/check_sleep.py --model out/gpu/models/7b-4 --data out/gpu/models/pairs.jsonl
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import rl
import toy.cpu
from bench import findings
from core import training
from core.encoding import load_processor
from core.flags import command_line
from core.memory_plan import VLLM_ASLEEP, gb
from core.pairs import judging_turns, read_pairs
from core.policy import load_policy
from core.prompts import encode_prompts
from core.sampler import VLLMSampler


@dataclass
class Weights:
    """A policy in the place of a rl.Run: rl.sync() reads its weights and its sampler."""

    policy: object
    sampler: object


def used(device):
    """Bytes of the GPU, by all processes."""
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def ask(sampler, prompts, tokens):
    """The tokens of a greedy response and of a sampled one to each prompt."""
    seeds = list(range(len(prompts)))
    found = []
    for temperature in (0.0, 1.0):
        for (response,) in sampler.generate(prompts, seeds, 1, temperature, tokens):
            found.append(response.ids)
    return found


def memory_asleep(sampler, device, before):
    """Send vLLM to sleep. before: bytes in use when it was not there yet."""
    if device.type == "cpu":
        sampler.sleep()
        return findings.Finding(findings.NO_GPU, "the memory that sleep gives back")
    awake = used(device) - before
    sampler.sleep()
    asleep = used(device) - before
    text = f"asleep vLLM holds {gb(asleep)} of {gb(awake)}; planned: {gb(VLLM_ASLEEP)} at most"
    return findings.expect(asleep <= VLLM_ASLEEP, text)


def same_tokens(before, after):
    same = sum(first == second for first, second in zip(before, after))
    text = f"the same tokens after all weights were loaded anew: {same} of {len(before)} responses"
    return findings.expect(same == len(before), text)


def parser():
    p = command_line(__doc__)
    add = p.add_argument
    add("--model", required=True, help="a model's folder")
    add("--data", required=True, help="JSONL of pairs")
    add("--prompts", type=int, default=8, help="pairs that are asked about")
    add("--tokens", type=int, default=64, help="of each response")
    add("--context", type=int, default=4096, help="longest prompt and response, tokens")
    add("--memory", type=float, default=0.25, help="share of the GPU for vLLM")
    return p


def main():
    args = parser().parse_args()
    _, _, device = training.start_ranks(0)
    before = 0
    if device.type == "cuda":
        before = used(device)
    else:
        toy.cpu.speed_up_vllm()
    processor = load_processor(args.model)
    options = {"context": args.context, "memory": args.memory}
    sampler = VLLMSampler(args.model, processor, device, **options)
    prompts = encode_prompts(read_pairs(args.data)[: args.prompts], judging_turns, processor)
    first = ask(sampler, prompts, args.tokens)
    found = [memory_asleep(sampler, device, before)]
    policy = load_policy(args.model, dtype="auto")
    rl.sync(Weights(policy, sampler))
    found.append(same_tokens(first, ask(sampler, prompts, args.tokens)))
    findings.print_and_exit(found)


if __name__ == "__main__":
    main()
