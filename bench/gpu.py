"""
rl.py's step at the size of Qwen2.5-VL-3B or 7B: how fast is the update (tokens a second, MFU) by --micro_tokens, how fast the
rollout, what do sync, sleep and wake take, how much memory at most, how many tokens a second and GPU in the whole step.

NOT YET RUN ON A GPU. --shape tiny and small run the same on a CPU, without sleep and wake; there MFU is "-".

Nothing is downloaded: the weights are random, the tokenizer is the toy world's with fillers up to the real vocabulary, prompts are
noise pictures of --image_tokens and --words words for each of the two answers. Random weights hardly ever end a sample, so each
has --new_tokens. It calls rl.py's and sft.py's own functions: prepare, prompt, rollout, old_logps, train_step, sync, sleep.

MFU counts what the mathematics needs: 6 operations a weight and token, attention over pairs of tokens (causal in the text), the LM
head on response tokens only, the vision tower. What --recompute does twice counts once. --layers 4 is for a GPU that is too small:
AdamW needs 16 bytes a weight beside the activations, so a whole 7B wants two GPUs of 80 GB or more.

One GPU, and four:
$ python bench/gpu.py --shape 3b --out out/bench/gpu.md
$ torchrun --nproc_per_node=4 bench/gpu.py --shape 7b --recompute --out out/bench/gpu.md
A CPU:
$ python bench/gpu.py --shape tiny
"""
import argparse
import contextlib
import json
import random
import resource
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: rl.py is in the folder above
import torch
import torch.distributed as dist

import rl
import sft
from toy import model as toy_model, world

SHAPES = {  # Qwen2.5-VL's: width, MLP, layers, heads, key-value heads, vocabulary, tied; tiny and small are the toy's, of 0.8M and 77M
    "7b": (3584, 18944, 28, 28, 4, 152064, False), "3b": (2048, 11008, 36, 16, 2, 151936, True),
    "small": dict(hidden=1024, layers=8), "tiny": dict(hidden=128, layers=3)}
TOKENS = 151_665  # Qwen's; what the vocabulary has beyond them is padding
PEAK = {"H100": 989, "H200": 989, "H800": 989, "A100": 312, "A800": 312, "L40S": 362, "B200": 2250}  # dense bfloat16 TFLOP/s of a GPU

# ---------------------------------------------------------------------------------------------------
# A model and prompts


def filled(tokenizer, size):
    """The toy's tokenizer with `size` tokens; no merge leads to the fillers, so texts are cut as before."""
    from transformers import Qwen2TokenizerFast

    learned = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocab = {token: i for token, i in learned["vocab"].items() if token not in toy_model.SPECIAL}
    vocab |= {f"<filler {i}>": i for i in range(len(vocab), size - len(toy_model.SPECIAL))}
    return Qwen2TokenizerFast(vocab=vocab, merges=[tuple(m) for m in learned["merges"]], unk_token=None, bos_token=None,
                              eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=toy_model.SPECIAL,
                              chat_template=toy_model.CHAT)


def configured(shape, layers=0):
    """(configuration, tokenizer) of a shape; layers: of the language model, 0 = as it has."""
    from transformers import Qwen2_5_VLConfig

    tokenizer, shape = toy_model.make_tokenizer(), SHAPES[shape]
    if isinstance(shape, dict):
        return toy_model.make_config(tokenizer, **shape | {"layers": layers or shape["layers"]}), tokenizer
    tokenizer = filled(tokenizer, TOKENS)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in toy_model.SPECIAL}
    width, mlp, depth, heads, groups, vocabulary, tied = shape
    return Qwen2_5_VLConfig(
        text_config=dict(
            hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers or depth, num_attention_heads=heads,
            num_key_value_heads=groups, vocab_size=vocabulary, max_position_embeddings=128000, rms_norm_eps=1e-6, tie_word_embeddings=tied,
            rope_parameters={"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
            bos_token_id=None, eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"]),
        vision_config=dict(
            depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=width, patch_size=14, spatial_merge_size=2,
            temporal_patch_size=2, window_size=112, fullatt_block_indexes=[7, 15, 23, 31]),
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"], vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"], tie_word_embeddings=tied), tokenizer


def make(folder, args, device):
    """Write the model's folder, as Qwen/Qwen2.5-VL-7B-Instruct is one."""
    from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration

    config, tokenizer = configured(args.shape, args.layers)
    with torch.device(device):  # billions of random numbers: minutes on a CPU
        model = Qwen2_5_VLForConditionalGeneration(config).to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    end, pad = config.text_config.eos_token_id, config.text_config.pad_token_id
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad)
    processor = toy_model.make_processor(tokenizer)
    for part in (processor.image_processor, processor.video_processor):
        part.size = {"shortest_edge": 4 * 28**2, "longest_edge": max(640, args.image_tokens) * 28**2}
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def make_pairs(folder, args, rank):
    from PIL import Image

    rng, pairs, across = random.Random(f"{args.seed} {rank}"), [], round(args.image_tokens**0.5)
    words = [*world.COLOURS, *world.SHAPES, "the", "is", "picture", "nothing", "left", "right"]
    for i in range(args.samples):
        path = Path(folder, f"{rank}-{i}.png")
        Image.frombytes("RGB", (28 * across,) * 2, rng.randbytes(3 * (28 * across)**2)).save(path, compress_level=0)
        pairs.append({"id": str(i), "question": "What does the image show?", "images": [str(path)], "video": None, "choice": 1 + i % 2,
                      "responses": [" ".join(rng.choices(words, k=args.words)) for _ in range(2)]})
    return pairs


# ---------------------------------------------------------------------------------------------------
# Measures


def operations(config, rows):
    """Floating-point operations of one forward and backward over the rows."""
    t, v = config.text_config, config.vision_config
    key = t.hidden_size // t.num_attention_heads * t.num_key_value_heads
    layer = 2 * t.hidden_size**2 + 2 * t.hidden_size * key + 3 * t.hidden_size * t.intermediate_size
    block, merged = 4 * v.hidden_size**2 + 3 * v.hidden_size * v.intermediate_size, v.spatial_merge_size**2
    join = (merged * v.hidden_size)**2 + merged * v.hidden_size * v.out_hidden_size
    full, total = len(v.fullatt_block_indexes), 0
    for row in rows:
        n = sft.length(row)
        total += 6 * t.num_hidden_layers * (layer * n + t.hidden_size * n**2) + 6 * t.hidden_size * t.vocab_size * len(row["response"])
        for p in (int(grid.prod()) for grid in row["image_grid_thw"]):  # patches
            seen = full * p + (v.depth - full) * min(p, (v.window_size // v.patch_size)**2)  # by a patch, in all blocks
            total += 6 * p * (v.depth * block + join / merged) + 12 * v.hidden_size * p * seen
    return total


class Measure:
    """with measure("name"): ... appends its seconds, and the most memory in use meanwhile, bytes."""

    def __init__(self, device):
        self.gpu, self.seconds, self.memory = device.type == "cuda", {}, Counter()

    def used(self):
        if self.gpu:  # by all processes: vLLM's allocations are not torch's
            free, total = torch.cuda.mem_get_info()
            return total - free
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    @contextlib.contextmanager
    def __call__(self, name):
        over, start = threading.Event(), time.perf_counter()
        watcher = threading.Thread(target=self.watch, args=(name, over))
        watcher.start()
        try:
            yield
            if self.gpu:
                torch.cuda.synchronize()
            self.seconds.setdefault(name, []).append(time.perf_counter() - start)
        finally:
            over.set()
            watcher.join()

    def watch(self, name, over):
        while True:
            self.memory[name] = max(self.memory[name], self.used())
            if over.wait(0.05):
                return

    def median(self, name):
        return statistics.median(self.seconds[name][1:])  # the first one warms up


def updates(args, flags, trainer, rows, pad, device, config, measure):
    """[[budget, micro-batches, seconds, tokens a second, MFU, memory], ...]"""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    peak = args.peak or next((tflops for key, tflops in PEAK.items() if key in name), 0)
    found, tokens = [], sum(map(sft.length, rows))
    for budget in args.budgets:
        flags.micro_tokens, name = budget, f"update {budget}"
        try:
            for _ in range(args.repeats + 1):
                with measure(name):
                    rl.train_step(trainer, [dict(row) for row in rows], flags, pad, device, args.lr, Counter(), Counter())
        except torch.OutOfMemoryError:
            found.append([f"{budget:,}", "-", "out of memory", "-", "-", "-"])
            break
        seconds = measure.median(name)
        used = operations(config, rows) / seconds / (peak * 1e12) if peak else None
        found.append([f"{budget:,}", len(sft.micro_batches([[row] for row in rows], budget)), f"{seconds:.3g}", f"{tokens / seconds:,.0f}",
                      f"{used:.1%}" if used else "-", f"{measure.memory[name] / 2**30:.1f}"])
    return found


def step(flags, engine, trainer, processor, pairs, prompts, seeds, pad, device, measure, lr):
    """One step in rl.py's order, two updates; returns its rows."""
    with measure("rollout"):
        rows = rl.rollout(engine, processor, pairs, prompts, seeds, 1, 1.0, flags.max_new_tokens)
    with measure("sleep"):
        engine.sleep()
    for i, row in enumerate(rows):
        row["adv"] = torch.full((len(row["response"]),), float(i % 2) - 0.5)
    batches = [rows[:len(rows) // 2], rows[len(rows) // 2:]]
    with measure("old log-probabilities"):
        rl.old_logps(batches, trainer, None, flags, pad, device)
    with measure("updates"):
        for part in batches:
            rl.train_step(trainer, part, flags, pad, device, lr, Counter(), Counter())
    with measure("sync"):
        engine.sync(trainer.module)
    return rows


def table(head, body):
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (head, ["---"] * len(head), *body))


def report(args, flags, about, policy, rows, measure, made, tokens, by_budget):
    phases = ["rollout", "sleep", "old log-probabilities", "updates", "sync"]
    whole = sum(measure.median(name) for name in phases)
    others = [name for name in measure.seconds if name not in phases and not name.startswith("update ")]
    gib = lambda name: f"{measure.memory[name] / 2**30:.1f}"
    body = [["rollout", f"{measure.median('rollout'):.3g}", f"{made / measure.median('rollout'):,.0f} sampled", gib("rollout")]]
    body += [[name, f"{measure.median(name):.3g}", "", gib(name)] for name in (*phases[1:], *others)]
    body += [["whole step", f"{whole:.3g}", f"{tokens / whole:,.0f} of prompts and samples", f"{max(measure.memory.values()) / 2**30:.1f}"]]
    size = sum(getattr(p, "ds_numel", p.numel()) for p in policy.parameters())
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return "\n\n".join([
        f"## A step at the shape {args.shape}" + (f", {args.layers} layers" if args.layers else ""),
        f"{size:,} random weights; {about['ranks']} rank(s), {about['device']}, {about['threads']} thread(s); {args.samples} samples a "
        f"rank, prompts of {(tokens - made) / len(rows):.0f} tokens, samples of {made / len(rows):.0f}; --micro_tokens "
        f"{args.budgets[-2:][0]}, ZeRO {args.zero}{', recomputation' if args.recompute else ''}. Medians of {args.repeats}. {versions}; "
        f"seed {args.seed}; {time.strftime('%Y-%m-%d')}; `python bench/gpu.py {' '.join(sys.argv[1:])}`",
        table(["phase", "seconds", "tokens a second and rank", "memory, GiB"], body),
        "The update by the size of its micro-batches:",
        table(["--micro_tokens", "micro-batches", "seconds", "tokens a second and rank", "MFU", "memory, GiB"], by_budget)]) + "\n"


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--shape", choices=list(SHAPES), default="7b", help="tiny and small are for a CPU")
    add("--layers", type=int, default=0, help="of the language model; 0 = as the shape has")
    add("--samples", type=int, default=64, help="of each rank a rollout")
    add("--new_tokens", type=int, default=512, help="of each sample")
    add("--image_tokens", type=int, default=576, help="of each prompt's picture; a square number")
    add("--words", type=int, default=200, help="of each of the two answers")
    add("--budgets", type=int, nargs="+", default=[4096, 8192, 16384, 32768],
        help="--micro_tokens to try, rising; the step takes the last but one")
    add("--repeats", type=int, default=3, help="of each measure, after one that does not count")
    add("--zero", type=int, default=2, help="DeepSpeed ZeRO stage")
    add("--recompute", action="store_true", help="gradient checkpointing")
    add("--attn", default="sdpa", help="attention of the trainer")
    add("--memory", type=float, default=0.5, help="share of the GPU for vLLM while it is awake")
    add("--context", type=int, default=4096, help="longest prompt and sample, tokens")
    add("--lr", type=float, default=1e-6, help="learning rate")
    add("--peak", type=float, default=0.0, help="TFLOP/s of the GPU, dense bfloat16; 0 = by its name")
    add("--seed", type=int, default=0, help="of weights, prompts and samples")
    add("--work", help="folder for model and pictures, which all ranks see; none = a temporary one (one rank only)")
    add("--out", help="file for the tables, in markdown")
    return p


def main():
    args = parser().parse_args()
    rank, world_size, device = sft.setup(args.seed)
    folder = [args.work or (tempfile.mkdtemp() if rank == 0 else None)]
    dist.broadcast_object_list(folder)
    work, model = Path(folder[0]), f"{folder[0]}/{args.shape}-{args.layers}"
    if rank == 0 and not Path(model).exists():
        make(model, args, device)
    dist.barrier()
    flags = rl.parser().parse_args([
        "--model", model, "--max_new_tokens", str(args.new_tokens), "--context", str(args.context), "--zero", str(args.zero), "--memory",
        str(args.memory), "--attn", args.attn, "--micro_tokens", str(args.budgets[-2:][0]),
        "--recompute" if args.recompute else "--no-recompute"])
    processor = sft.load_processor(model)
    engine, trainer, _ = rl.prepare(flags, processor, rank, world_size, device)
    config, pad, measure = trainer.module.model.config, processor.tokenizer.pad_token_id, Measure(device)
    pairs = make_pairs(work, args, rank)
    prompts = [rl.prompt(processor, pair) for pair in pairs]
    if device.type == "cuda":
        real = engine.llm.wake_up

        def wake_up(tags):
            with measure(f"wake, {tags[0]} (in the sync)"):
                real(tags=tags)
        engine.sync(trainer.module)  # as rl.py does there before its first rollout
        engine.llm.wake_up = wake_up
    for k in range(args.repeats + 1):
        seeds = [rl.seed_of(args.seed, rank, k, i) for i in range(args.samples)]
        rows = step(flags, engine, trainer, processor, pairs, prompts, seeds, pad, device, measure, args.lr)
    weights = [p.data for p in trainer.module.parameters()]
    copies = [torch.empty_like(w) for w in weights]
    for _ in range(args.repeats + 1):
        with measure("copy of the weights"):
            for copy, weight in zip(copies, weights):
                copy.copy_(weight)
    del copies
    engine.sleep()
    rows = [{k: v for k, v in row.items() if k != "old"} for row in rows]
    by_budget = updates(args, flags, trainer, rows, pad, device, config, measure)
    if rank == 0:
        made, tokens = sum(len(row["response"]) for row in rows), sum(map(sft.length, rows))
        text = report(args, flags, sft.header(args, world_size, device), trainer.module, rows, measure, made, tokens, by_budget)
        print(text)
        if args.out:
            Path(args.out).parent.mkdir(parents=True, exist_ok=True)
            Path(args.out).write_text(text)
    dist.barrier()
    if rank == 0 and not args.work:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
