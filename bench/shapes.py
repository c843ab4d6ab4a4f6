"""
Models of random weights at the shapes of Qwen2.5-VL, and pairs for them to judge. Nothing is
downloaded: the tokenizer is the toy world's with fillers up to the real vocabulary, the pictures
are noise.
"""

import functools
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from core.model_folder import appears_whole
from core.pairs import Pair
from toy import model as toy_model
from toy import world


@dataclass
class Shape:
    """Of Qwen2.5-VL's language model."""

    width: int
    mlp: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    tied: bool  # the LM head is the embedding


QWENS = {
    "7b": Shape(3584, 18944, 28, 28, 4, 152064, False),
    "3b": Shape(2048, 11008, 36, 16, 2, 151936, True),
}
TOYS = {  # of 77M and 0.8M weights
    "small": {"hidden": 1024, "layers": 8},
    "tiny": {"hidden": 128, "layers": 3},
}
TOKENS = 151_665  # Qwen's; the rest of the vocabulary is padding


def with_fillers(tokenizer, size):
    """The toy's tokenizer with `size` tokens. Texts are cut as before: no merge has a filler."""
    learned = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocab = {}
    for token, number in learned["vocab"].items():
        if token not in toy_model.SPECIAL:
            vocab[token] = number
    without_special = size - len(toy_model.SPECIAL)
    for number in range(len(vocab), without_special):
        vocab[f"<filler {number}>"] = number
    return toy_model.qwen_tokenizer(vocab, learned["merges"])


@functools.cache
def tokenizer_of(is_qwen):
    """The toy's, with as many tokens as Qwen's if that is asked for. It takes seconds to make."""
    if is_qwen:
        return with_fillers(tokenizer_of(False), TOKENS)
    return toy_model.make_tokenizer()


def config_and_tokenizer(name, layers=0):
    """Of a shape. layers: of the language model; 0 = as it has."""
    tokenizer = tokenizer_of(name in QWENS)
    if name in QWENS:
        return qwen_config(QWENS[name], layers, tokenizer), tokenizer
    size = dict(TOYS[name])
    if layers:
        size["layers"] = layers
    return toy_model.make_config(tokenizer, **size), tokenizer


def qwen_config(shape, layers, tokenizer):
    from transformers import Qwen2_5_VLConfig

    text_ids, model_ids = toy_model.special_token_ids(tokenizer)
    text_config = {
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": layers or shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": shape.tied,
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [16, 24, 24],
            "rope_theta": 1e6,
        },
        **text_ids,
    }
    vision_config = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": shape.width,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    return Qwen2_5_VLConfig(
        text_config=text_config,
        vision_config=vision_config,
        tie_word_embeddings=shape.tied,
        **model_ids,
    )


def model_folder(work, shape, layers):
    """Where scripts that share a folder have a model; layers: 0 = as the shape has."""
    return Path(work, f"{shape}-{layers}")


def make_model(folder, shape, layers, image_tokens, device):
    """Write the model's folder, as Qwen/Qwen2.5-VL-7B-Instruct is one."""
    from transformers import AutoModelForImageTextToText

    config, tokenizer = config_and_tokenizer(shape, layers)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):  # billions of random numbers: minutes on a CPU
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    toy_model.set_generation_config(model)
    processor = toy_model.make_processor(tokenizer)
    longest = max(640, image_tokens) * 28**2
    for reader in (processor.image_processor, processor.video_processor):
        reader.size = {"shortest_edge": 4 * 28**2, "longest_edge": longest}
    with appears_whole(folder) as part:
        toy_model.save(model, processor, part)


def make_pairs(folder, number, image_tokens, words_each, seed, rank=0):
    """Pairs of random words about pictures of noise, which are written into the folder."""
    from PIL import Image

    rng = random.Random(f"{seed} {rank}")
    side = 28 * round(image_tokens**0.5)
    words = [*world.COLOURS, *world.SHAPES, "the", "is", "picture", "nothing", "left", "right"]
    pairs = []
    for i in range(number):
        path = Path(folder, f"{rank}-{i}.png")
        noise = rng.randbytes(3 * side**2)
        Image.frombytes("RGB", (side, side), noise).save(path, compress_level=0)
        responses = [" ".join(rng.choices(words, k=words_each)) for _ in range(2)]
        pair = Pair(
            id=str(i),
            source="",
            question="What does the image show?",
            images=[str(path)],
            video=None,
            responses=responses,
            choice=1 + i % 2,
        )
        pairs.append(pair)
    return pairs
