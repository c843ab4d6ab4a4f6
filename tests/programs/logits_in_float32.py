"""
The type of the logits that vLLM samples from, for a model in bfloat16. For tests/test_sampler.py.

$ python tests/programs/logits_in_float32.py FOLDER
"""

import os
import sys
from unittest import mock

import torch
import vllm

from core.encoding import load_processor
from core.sampler import VLLMSampler
from core.training import start_ranks

start_vllm = vllm.LLM


def start_in_bfloat16(folder, **options):
    return start_vllm(folder, **options | {"dtype": "bfloat16"})


def logits_of(model):
    hidden = torch.ones(1, model.config.get_text_config().hidden_size, dtype=torch.bfloat16)
    return model.compute_logits(hidden)


folder = sys.argv[1]
_, _, device = start_ranks(0)
with mock.patch("vllm.LLM", start_in_bfloat16):
    sampler = VLLMSampler(folder, load_processor(folder), device, context=1024)
weights = sampler.llm.apply_model(lambda model: next(model.parameters()).dtype)[0]
logits = sampler.llm.apply_model(lambda model: logits_of(model).dtype)[0]
print(f"RESULT {weights} {logits}", flush=True)
os._exit(0)  # vLLM's own shutdown can hang
