"""
Move every weight of a policy, load them into vLLM one at a time and sixteen at a time, and compare
log-probabilities. For tests/test_sampler.py.

$ python tests/programs/sync_weights.py FOLDER TURNS.json OUT.json
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

import torch
import torch._dynamo.utils

from core.encoding import collate, encode_prompt, load_processor
from core.policy import load_policy, token_logps
from core.sampler import VLLMSampler
from core.training import start_ranks
from toy.cpu import speed_up_vllm

folder, turns_file, out = sys.argv[1:]
_, _, device = start_ranks(0)
processor = load_processor(folder)
policy = load_policy(folder, dtype=torch.float32).eval()
prompts = [encode_prompt(processor, turns) for turns in json.loads(Path(turns_file).read_text())]
seeds = list(range(len(prompts)))
speed_up_vllm()
sampler = VLLMSampler(folder, processor, device, context=1024)


def sample():
    """Two responses a prompt, with log-probabilities, and their largest gap to the policy's."""
    generated = sampler.generate(prompts, seeds, n=2, max_tokens=16, logps=True)
    gap = 0.0
    for prompt, responses in zip(prompts, generated):
        for response in responses:
            one = dataclasses.replace(prompt, response_ids=response.ids)
            with torch.no_grad():
                logps, _ = token_logps(policy, collate([one], 0))
            gap = max(gap, (logps[0] - torch.tensor(response.logps)).abs().max().item())
    return [[response.ids for response in responses] for responses in generated], gap


def move_weights(seed):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            step = 0.05 * parameter.std().nan_to_num().clamp_min(1e-3)
            parameter += step * torch.randn(parameter.shape, generator=draw)


def sync(size, leave_out=""):
    """Load the policy's weights, `size` of them a call; return those of vLLM it did not reach."""
    named = [(name, p.data) for name, p in policy.model.named_parameters() if name != leave_out]
    loaded = set()
    sampler.sleep()
    sampler.wake_weights()
    for start in range(0, len(named), size):
        loaded |= sampler.load_weights(named[start : start + size])
    sampler.after_sync()
    return sorted(sampler.weight_names() - loaded)


result = {"as loaded": sample(), "again": sample()}
sampler.step_tokens = 1  # a step after each prompt
result["in turns"] = sample()
for size in (1, 16):
    move_weights(seed=size)
    _, before = sample()
    missing = sync(size)
    result[f"{size} a call"] = [before, missing, sample()[1]]
result["left out"] = sync(16, leave_out="model.visual.blocks.0.attn.proj.weight")
result["compiled"] = dict(torch._dynamo.utils.counters["inductor"])
Path(out).write_text(json.dumps(result))
os._exit(0)  # vLLM's own shutdown can hang
