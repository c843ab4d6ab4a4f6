"""
vLLM on a toy model: what it samples for eight prompts with pictures, with log-probabilities. For
tests/test_toy_model.py.

$ python tests/programs/sample_from_toy_base.py FOLDER OUT.json
"""

import json
import os
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from PIL import Image
from vllm import SamplingParams

from core.sampler import start_vllm
from toy import pretrain, world

folder, out = sys.argv[1:]
llm = start_vllm(folder, 1024, seed=0, limit_mm_per_prompt={"image": 1})
rng = random.Random(3)
rows, chats = [], []
for _ in range(8):
    dialogue = pretrain.judging(world.twins(rng)[0], (0, 1), "careful", rng)
    ((text, _),), (image,) = dialogue["turns"], dialogue["images"]
    rows.append({"text": text, "image": image.tolist()})
    picture = {"type": "image_pil", "image_pil": Image.fromarray(image)}
    chats.append([{"role": "user", "content": [picture, {"type": "text", "text": text}]}])
params = SamplingParams(temperature=1.0, max_tokens=24, logprobs=0, seed=7)
for row, output in zip(rows, llm.chat(chats, params, use_tqdm=False)):
    (sampled,) = output.outputs
    row["prompt_ids"] = list(output.prompt_token_ids)
    row["response_ids"] = list(sampled.token_ids)
    row["logps"] = [next(iter(step.values())).logprob for step in sampled.logprobs]
Path(out).write_text(json.dumps(rows))
