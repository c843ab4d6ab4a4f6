"""
A real Qwen2.5-VL of 0.8M parameters: tokenizer, processor, chat template, configuration, random
weights, in a folder that transformers and vLLM load as they load Qwen/Qwen2.5-VL-7B-Instruct.

The special tokens and the splitting of text are Qwen's; each digit is a token of its own. The
vocabulary is a byte-level BPE of about 700 tokens, trained on the toy world's texts.

$ python toy/model.py --out out/toy/random --seed 0
"""

import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from core.flags import command_line
from core.pairs import JUDGING_PROMPT
from core.quiet import hush_bars
from judge import CONSISTENCY_PROMPT
from toy import world

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# As Qwen2.5-VL's: a default system turn; images and videos become one pad each, which the processor
# repeats.
CHAT = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' or 'video' in part %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Of Qwen2.5-VL-7B-Instruct's generation_config.json: whoever does not say how to sample gets this.
QWENS_SAMPLING = {
    "do_sample": True,
    "repetition_penalty": 1.05,
    "temperature": 0.1,
    "top_k": 1,
    "top_p": 0.001,
}
OTHER_WORDS = (
    "system\nYou are a helpful assistant.\nuser\nassistant\nWhat does the image show? "
    "What does the video show? What shows it? Which response claims equal? Repeat:"
)


def corpus(seed=0, n=3000):
    """Texts of every kind that the toy model reads or writes, for the tokenizer."""
    rng = random.Random(f"{seed} corpus")
    for _ in range(n):
        medium = rng.choice(("image", "image", "video", "text"))
        item = rng.choice(world.twins(rng, medium=medium))
        text = world.judgement(item, (0, 1), rng.choice((1, 2)), rng.choice(world.MANNERS))
        first, second = item["answers"]
        yield JUDGING_PROMPT.format(question=item["question"], answer1=first, answer2=second)
        yield text
        yield CONSISTENCY_PROMPT.format(reasoning=text, choice=1) + " yes no Yes No"
        yield OTHER_WORDS


def make_tokenizer():
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        min_frequency=20,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    return qwen_tokenizer(learned["vocab"], learned["merges"])


def qwen_tokenizer(vocab, merges):
    """Qwen's tokenizer with another vocabulary. The special tokens are added at its end."""
    from transformers import Qwen2TokenizerFast

    return Qwen2TokenizerFast(
        vocab=vocab,
        merges=[tuple(merge) for merge in merges],
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        bos_token=None,
        additional_special_tokens=SPECIAL,
        chat_template=CHAT,
        model_max_length=4096,
    )


def special_token_ids(tokenizer):
    """The ids that a configuration names: (of the text model, of the whole model)."""
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL)))
    of_text = {
        "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    of_model = {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }
    return of_text, of_model


def make_processor(tokenizer):
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    # pixels of an image: 4 to 16 tokens
    size = {"shortest_edge": world.SIZE**2, "longest_edge": 4 * world.SIZE**2}
    images, videos = Qwen2VLImageProcessor(size=size), Qwen2VLVideoProcessor(size=size)
    return Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=CHAT)


def make_config(tokenizer, hidden=128, layers=3):
    from transformers import Qwen2_5_VLConfig

    if hidden % 64:  # heads of 32, two for each key-value head
        raise ValueError(f"hidden: expected a multiple of 64, got {hidden}")
    text_ids, model_ids = special_token_ids(tokenizer)
    text_config = {
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 32,
        "num_key_value_heads": hidden // 64,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.08,  # with 0.02, Qwen's, it learns to see several times slower
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [4, 6, 6],  # of 32 / 2 a head
            "rope_theta": 1e4,
        },
        "tie_word_embeddings": True,
        **text_ids,
    }
    vision_config = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "out_hidden_size": hidden,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 56,
        "fullatt_block_indexes": [1],
        "initializer_range": 0.08,
    }
    return Qwen2_5_VLConfig(
        text_config=text_config, vision_config=vision_config, tie_word_embeddings=True, **model_ids
    )


def make(out, seed=0, **size):
    """Write the folder, with random weights; returns (model, processor)."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    tokenizer = make_tokenizer()
    config = make_config(tokenizer, **size)
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    set_generation_config(model)
    processor = make_processor(tokenizer)
    if out:
        save(model, processor, out)
    return model, processor


def set_generation_config(model):
    from transformers import GenerationConfig

    text = model.config.text_config
    ids = {"eos_token_id": text.eos_token_id, "pad_token_id": text.pad_token_id}
    model.generation_config = GenerationConfig(**ids, **QWENS_SAMPLING)


def load(folder):
    """(model, processor)"""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    hush_bars()
    model = AutoModelForImageTextToText.from_pretrained(folder)
    return model, AutoProcessor.from_pretrained(folder)


def save(model, processor, folder):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def parser():
    p = command_line(__doc__)
    p.add_argument("--out", required=True, help="folder to write, as from_pretrained reads it")
    p.add_argument("--seed", type=int, default=0, help="of the random weights")
    return p


def main():
    args = parser().parse_args()
    model, processor = make(args.out, args.seed)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{args.out}: {parameters:,} parameters, {len(processor.tokenizer)} tokens")


if __name__ == "__main__":
    main()
