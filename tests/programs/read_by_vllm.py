"""
vLLM on a folder as save_policy wrote it: what it reads of whole pictures with the folder's own
processor, its greedy answers, and what it says when it is to take new weights but has packed its
own. For tests/test_sampler.py.

$ python tests/programs/read_by_vllm.py FOLDER TURNS.json OUT.json
"""

import json
import os
import sys
from pathlib import Path

import torch
from PIL import Image

from core.encoding import load_processor
from core.sampler import VLLMSampler, generated
from core.training import start_ranks

folder, turns_file, out = sys.argv[1:]
start_ranks(0)
sampler = VLLMSampler(folder, load_processor(folder), torch.device("cpu"), context=1024)

from vllm import SamplingParams  # noqa: E402

chats = json.loads(Path(turns_file).read_text())
for turns in chats:
    for part in turns[0]["content"]:
        if part["type"] == "image":
            part["type"] = "image_pil"
            part["image_pil"] = Image.open(part.pop("image"))
params = SamplingParams(temperature=0, max_tokens=16, logit_bias=sampler.logit_bias)
answers = []
for output in sampler.llm.chat(chats, params, use_tqdm=False):
    answer = generated(output.outputs[0], with_logps=False)
    answers.append([list(output.prompt_token_ids), answer.ids, answer.ended])
error = ""
try:
    sampler.load_weights([])
except RuntimeError as problem:
    error = str(problem)
Path(out).write_text(json.dumps({"answers": answers, "error": error}))
os._exit(0)  # vLLM's own shutdown can hang
