"""
The toy's model: its folder as transformers and vLLM load it, its tokenizer, what it is taught. What
a trained base can do, toy/pretrain.py measures.
"""

import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

from core.pairs import JUDGING_PROMPT
from toy import model as toy_model
from toy import pretrain, weaker, world


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    """That of a folder with random weights."""
    from transformers import AutoProcessor

    folder = tmp_path_factory.mktemp("toy") / "random"
    toy_model.make(folder, seed=0)
    return AutoProcessor.from_pretrained(folder)


@pytest.mark.parametrize("name", toy_model.SPECIAL)
def test_a_special_token_is_one_token(processor, name):
    tokenizer = processor.tokenizer
    assert tokenizer.encode(name) == [tokenizer.convert_tokens_to_ids(name)]


@pytest.mark.parametrize(
    "text", ["</think><answer>1</answer>", "<answer> 2", "**1**", "12", "a1b2"]
)
def test_each_digit_is_a_token_of_its_own(processor, text):
    tokenizer = processor.tokenizer
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode(text)]
    assert "".join(pieces) == text
    with_digit = [piece for piece in pieces if any(letter.isdigit() for letter in piece)]
    assert all(piece.isdigit() and len(piece) == 1 for piece in with_digit)


@pytest.mark.parametrize(
    "text", ["héllo 漢字", "\x00\t\n", "😀", JUDGING_PROMPT, "<think>a</think>"]
)
def test_any_text_has_tokens(processor, text):
    assert processor.tokenizer.decode(processor.tokenizer.encode(text)) == text


def test_the_tokenizer_comes_out_the_same_each_time(processor):
    def learned(tokenizer):
        return json.loads(tokenizer.backend_tokenizer.to_str())["model"]

    made = toy_model.make_tokenizer()
    assert made.get_vocab() == processor.tokenizer.get_vocab()
    assert learned(made) == learned(processor.tokenizer)


def test_a_width_without_whole_heads_is_refused(processor):
    with pytest.raises(ValueError, match="hidden: expected a multiple of 64, got 100"):
        toy_model.make_config(processor.tokenizer, hidden=100)


@pytest.mark.parametrize("task", pretrain.TASKS)
def test_labels_cover_the_replies_and_nothing_else(processor, task):
    rng = random.Random(0)
    for _ in range(10):
        dialogue = task(rng)
        labels = pretrain.encode(processor, [dialogue])["labels"][0]
        covered = processor.tokenizer.decode(labels[labels != -100])
        replies = [reply for _, reply in dialogue["turns"]]
        assert covered == "".join(f"{reply}<|im_end|>" for reply in replies)


@pytest.mark.parametrize(
    "medium, token, count", [("image", "<|image_pad|>", 4), ("video", "<|video_pad|>", 8)]
)
def test_a_picture_or_two_frames_become_four_tokens(processor, medium, token, count):
    rng = random.Random(0)
    item, _ = world.twins(rng, medium=medium)
    dialogue = pretrain.dialogue_about(item, [("What?", "x")], rng)
    ids = pretrain.encode(processor, [dialogue])["input_ids"][0].tolist()
    assert ids.count(processor.tokenizer.convert_tokens_to_ids(token)) == count


@pytest.mark.slow
def test_vllm_and_transformers_agree_on_ids_and_log_probabilities(tmp_path):
    """
    The same picture and prompt give the same token ids, and each sampled token the same
    log-probability.
    """
    out = tmp_path / "sampled.json"
    program = ROOT / "tests" / "programs" / "sample_from_toy_base.py"
    command = [sys.executable, program, ROOT / "toy" / "base", out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    model, processor = toy_model.load(ROOT / "toy" / "base")
    for row in json.loads(out.read_text()):
        image = np.array(row["image"], dtype=np.uint8)
        dialogue = {"images": [image], "video": False, "turns": [(row["text"], "")]}
        inputs = pretrain.encode(processor, [dialogue], replies=False)
        # both make four tokens of the one pad that stands for the picture
        assert inputs["input_ids"][0].tolist() == row["prompt_ids"]
        pretrain.append_tokens(inputs, row["response_ids"])
        with torch.no_grad():
            logits = model.eval()(**inputs).logits[0, -len(row["response_ids"]) - 1 : -1]
        sampled = torch.tensor(row["response_ids"])[:, None]
        logps = logits.log_softmax(-1).gather(1, sampled)[:, 0]
        torch.testing.assert_close(logps, torch.tensor(row["logps"]), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_the_weaker_judge_is_weaker_and_no_coin():
    """
    C.11: it misses agreements and lets next to no contradiction pass; the base that it is made from
    judges all of them rightly.
    """
    model, processor = toy_model.load(ROOT / "toy" / "base")
    assert weaker.figures(model, processor, n=100) == {"agree": 1.0, "disagree": 1.0}
    weaker.round_layer(model)
    right = weaker.figures(model, processor, n=100)
    assert 0.4 < right["agree"] < 0.8
    assert right["disagree"] > 0.95
