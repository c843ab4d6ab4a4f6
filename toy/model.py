"""
A real Qwen2.5-VL of 0.8M parameters: tokenizer, processor, chat template, configuration, random weights, in one folder that
transformers, its processor and vLLM load as they load Qwen/Qwen2.5-VL-7B-Instruct.

The names and roles of the special tokens are Qwen's, and so is the splitting of text: every digit is a token of its own. The
vocabulary is a byte-level BPE trained on the toy world's texts, about 700 tokens, so any string still has its tokens.

$ python toy/model.py --out out/toy/random --seed 0
"""
import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: the repository is the package's parent
from annotate import JUDGING_PROMPT
from judge import CONSISTENCY_PROMPT
from toy import world

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>"]
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# As Qwen2.5-VL's: a default system turn; images and videos become one pad each, which the processor multiplies.
CHAT = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' or 'video' in part %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def corpus(seed=0, n=3000):
    """Texts of every kind that the toy model reads or writes, for the tokenizer."""
    rng = random.Random(f"{seed} corpus")
    for _ in range(n):
        medium = rng.choice(("image", "image", "video", "text"))
        item = rng.choice(world.twins(rng, medium=medium))
        text = world.judgement(item, (0, 1), rng.choice((1, 2)), rng.choice(world.MANNERS))
        yield JUDGING_PROMPT.format(question=item["question"], answer1=item["answers"][0], answer2=item["answers"][1])
        yield text
        yield CONSISTENCY_PROMPT.format(reasoning=text, choice=1) + " yes no Yes No"
        yield ("system\nYou are a helpful assistant.\nuser\nassistant\nWhat does the image show? What does the video show? "
               "What shows it? Which response claims equal? Repeat:")


def make_tokenizer():
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import Qwen2TokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=1000, min_frequency=20, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(corpus(), trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    return Qwen2TokenizerFast(vocab=learned["vocab"], merges=[tuple(m) for m in learned["merges"]],
                              unk_token=None, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token=None,
                              additional_special_tokens=SPECIAL, chat_template=CHAT, model_max_length=4096)


def make_processor(tokenizer):
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    size = {"shortest_edge": world.SIZE**2, "longest_edge": 4 * world.SIZE**2}  # pixels of an image: 4 to 16 tokens
    return Qwen2_5_VLProcessor(Qwen2VLImageProcessor(size=size), tokenizer, Qwen2VLVideoProcessor(size=size), chat_template=CHAT)


def make_config(tokenizer, hidden=128, layers=3):
    from transformers import Qwen2_5_VLConfig

    if hidden % 64:
        raise ValueError(f"hidden is {hidden}; legal: a multiple of 64 (heads of 32, two for each key-value head)")

    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    return Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=-(-len(tokenizer) // 64) * 64, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
            num_attention_heads=hidden // 32, num_key_value_heads=hidden // 64, max_position_embeddings=4096, rms_norm_eps=1e-6,
            initializer_range=0.08,  # 0.02, Qwen's, learns to see several times slower at this width
            rope_parameters={"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4},  # of 32 / 2 per head
            bos_token_id=None, eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"], tie_word_embeddings=True),
        vision_config=dict(
            depth=2, hidden_size=64, intermediate_size=128, num_heads=4, out_hidden_size=hidden, patch_size=14,
            spatial_merge_size=2, temporal_patch_size=2, window_size=56, fullatt_block_indexes=[1], initializer_range=0.08),
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"], vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"], tie_word_embeddings=True)


def make(out, seed=0, **size):
    """Write the folder, with random weights; returns (model, processor)."""
    import torch
    from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = make_tokenizer()
    config = make_config(tokenizer, **size)
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    text = config.text_config
    model.generation_config = GenerationConfig(eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id)
    processor = make_processor(tokenizer)
    if out:
        model.save_pretrained(out)
        processor.save_pretrained(out)
    return model, processor


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", required=True, help="folder to write, as from_pretrained reads it")
    p.add_argument("--seed", type=int, default=0, help="of the random weights")
    return p


def main():
    args = parser().parse_args()
    model, processor = make(args.out, args.seed)
    print(f"{args.out}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(processor.tokenizer)} tokens")


if __name__ == "__main__":
    main()
