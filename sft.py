"""
Stage 2: the long-CoT cold start (section 3.2), and the two baselines of Table 5.

The base model learns the format of a judgement from the annotator's: the loss is the mean of -log p over all response tokens
of the global batch, the same on any number of ranks, at any micro-batch size. With --head it trains the reward models that
R1-Reward is compared with: `scalar` (a two-layer MLP on the last token of a response, in place of the LM head) and `critic`
(the model first writes a critique of the single response, then the MLP scores it).

rl.py and downstream_grpo.py build on what stands here: ranks and engine, pairs -> rows -> micro-batches, log-probabilities of
response tokens, checkpoints, the log.

Where the paper is silent (all flags):
1) AdamW (0.9, 0.95), no weight decay, gradient norm clipped at 1; linear warm-up over 3 % of the steps, then a cosine to 10 %
2) images of at most 640 tokens; a pair longer than the context is dropped and counted, never cut
3) the baselines: pair loss -log sigmoid(better - worse), mean over pairs; for the critic plus the loss on its critiques

The toy, on two CPU cores:
$ python sft.py @toy/sft.args
One node with 4 GPUs of 80 GB, the paper's setting (not yet run at this scale):
$ torchrun --nproc_per_node=4 sft.py --data data/sft.jsonl --out out/sft
Two nodes, on each with its NODE_RANK and a folder they share as --out:
$ torchrun --nnodes=2 --node_rank=$NODE_RANK --master_addr=$HOST --master_port=29500 --nproc_per_node=4 sft.py \\
    --data data/sft.jsonl --out out/sft
A baseline of Table 5:
$ torchrun --nproc_per_node=4 sft.py --head scalar --data data/sft.jsonl --out out/scalar

Reads a JSONL file of pairs (see annotate.py) and a model's folder or name. Writes into --out: the model as from_pretrained and
vLLM read it, log.jsonl (one row a step), curves.png, checkpoints/. The same command run again continues from the last checkpoint.
"""
import argparse
import ctypes
import functools
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from annotate import CRITIQUE_PROMPT, Unusable, command_line, messages, read_pairs, turn
from stable_reinforce import parse

MEDIA = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
PIXELS = (("image", "pixel_values"), ("video", "pixel_values_videos"))
INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", *MEDIA)  # of a batch, what the model itself takes

# ---------------------------------------------------------------------------------------------------
# Log-probabilities of response tokens, and the model around them


class TokenLogps(torch.autograd.Function):
    """
    log softmax(hidden @ weight.T)[token] and its entropy, in float32, a chunk of tokens at a time. No more than CHUNK logits exist
    at once: the last chunk's softmax waits for the backward, which makes those of the others again. The entropy is a statistic: it
    has no gradient.
    """
    CHUNK = 2**26  # logits at once: 256 MB in float32

    @staticmethod
    def chunks(hidden, weight):
        n = max(1, TokenLogps.CHUNK // len(weight))
        return [slice(i, i + n) for i in range(0, len(hidden), n)]

    @staticmethod
    def logits(hidden, weight):
        if hidden.is_cuda and hidden.dtype != torch.float32:  # the sums are float32 inside: keep them, do not round to bfloat16
            return torch.mm(hidden, weight.T, out_dtype=torch.float32)
        return product(hidden, weight).float()

    @staticmethod
    def forward(ctx, hidden, weight, tokens, entropy):  # (N, H), (V, H), (N,)
        logp, norm = (torch.empty(len(tokens), dtype=torch.float32, device=hidden.device) for _ in range(2))
        H, p = torch.empty_like(logp) if entropy else None, None  # (N,)
        for c in TokenLogps.chunks(hidden, weight):
            p = None  # before the next chunk's logits come
            logits = TokenLogps.logits(hidden[c], weight)  # (n, V)
            top = logits.amax(-1, keepdim=True)
            chosen = logits.gather(1, tokens[c, None])
            p = torch.sub(logits, top, out=None if entropy else logits).exp_()
            Z = p.sum(-1, keepdim=True)
            norm[c] = (top + Z.log())[:, 0]
            logp[c] = chosen[:, 0] - norm[c]
            p /= Z
            if entropy:  # -sum p log p = log Z - sum p logit
                H[c] = norm[c] - torch.linalg.vecdot(p, logits)
        ctx.save_for_backward(hidden, weight, tokens, norm)
        ctx.p = p
        if entropy:
            ctx.mark_non_differentiable(H)
        return logp, H

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, tokens, norm = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for c in reversed(TokenLogps.chunks(hidden, weight)):
            p, ctx.p = ctx.p, None
            if p is None:
                p = TokenLogps.logits(hidden[c], weight).sub_(norm[c, None]).exp_()  # (n, V)
            # d logp / d logits = onehot(token) - p
            d = p.mul_(-grad[c, None]).scatter_add_(1, tokens[c, None], grad[c, None])
            d = d.to(weight.dtype)
            grad_hidden[c] = d @ weight
            if grad_weight is not None and d.is_cuda and d.dtype != torch.float32:
                grad_weight += torch.mm(d.T, hidden[c], out_dtype=torch.float32)
            elif grad_weight is not None:
                grad_weight.addmm_(d.T.float(), hidden[c].float())
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None


class Head(torch.nn.Linear):
    """The LM head: logits of hidden states or, told the tokens, their log-probabilities. A module, so that ZeRO-3 gathers its weight."""

    def forward(self, hidden, tokens=None, entropy=False):
        return Linear.forward(self, hidden) if tokens is None else TokenLogps.apply(hidden, self.weight, tokens, entropy)


def text_after_video(rope_index, input_ids, mm_token_type_ids, *args, attention_mask=None, **grids):
    """
    Positions as Qwen2.5-VL was trained and as vLLM has them: text goes on after the LARGEST position before it. transformers 5.19
    leaves out how long a video lasts, and the text that follows gets the positions of its frames.
    """
    positions, deltas = rope_index(input_ids, mm_token_type_ids, *args, attention_mask=attention_mask, **grids)  # (3, B, T), (B, 1)
    if grids.get("video_grid_thw") is None:
        return positions, deltas
    for row in range(len(input_ids)):
        at = torch.arange(input_ids.shape[1], device=input_ids.device) if attention_mask is None else attention_mask[row].nonzero()[:, 0]
        types, own = mm_token_type_ids[row, at], positions[:, row, at]  # (t,), (3, t)
        for end in (types[1:] == 0).logical_and(types[:-1] != 0).nonzero()[:, 0].tolist():  # the last token of a picture or video
            own[:, end + 1:] += own[:, :end + 1].max() + 1 - own[0, end + 1]
        positions[:, row, at] = own
        deltas[row] = own.max() + 1 - len(at)
    return positions, deltas


class Policy(torch.nn.Module):
    """A model of transformers (`.model`) and, for the baselines of Table 5, a reward head (`.head`) on the last token."""

    def __init__(self, model, kind=None):
        super().__init__()
        self.model, self.kind = model, kind
        for module in model.modules():
            if type(module) is torch.nn.Linear:
                module.__class__ = Head if module is model.lm_head else Linear
        self.model.base_model.get_rope_index = functools.partial(text_after_video, self.model.base_model.get_rope_index)
        width = model.config.get_text_config().hidden_size
        self.head = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.SiLU(), torch.nn.Linear(width, 1)) if kind else None

    def forward(self, batch, entropy=False):
        """A batch of collate() -> {"logp": (B, R), "entropy": (B, R) or None, "score": (B,) or None}, float32."""
        inputs = {k: batch[k] for k in INPUTS if k in batch}
        seen, unseen = self.look(inputs, batch)
        hidden = self.model.base_model(**inputs, mm_encoder_outputs=seen, use_cache=False).last_hidden_state + unseen  # (B, T, H)
        hidden = hidden.flatten(0, 1)  # (B * T, H)
        mask, out = batch["mask"], {"logp": None, "entropy": None, "score": None}
        if self.kind != "scalar":
            # only the positions that predict a response token are projected
            flat = self.model.lm_head(hidden[batch["at"]], batch["tokens"], entropy)  # (N,) each, N response tokens
            spread = lambda v: v.new_zeros(mask.shape).masked_scatter(mask, v)  # (B, R), 0 where there is no token
            out["logp"], out["entropy"] = spread(flat[0]), spread(flat[1]) if entropy else None
        if self.head is not None:
            out["score"] = self.head(hidden[batch["last"]])[:, 0].float()
        return out

    def look(self, inputs, batch):
        """
        The pixels among the inputs -> ({"image": features, "video": features} for those there are, 0). The tower looks once in every
        micro-batch, at images and frames together, or at a grey patch, which adds 0: every rank must run the same modules in the same
        order, since ZeRO-3 gathers each module's weights and ZeRO-2 reduces each gradient together with the other ranks. A picture
        that several samples have is looked at once.
        """
        v, pixels, grids, which = self.model.config.vision_config, {}, {}, {}
        for kind, name in PIXELS:
            if name in inputs:
                of, grid = batch[f"{kind}_of"].tolist(), inputs[f"{kind}_grid_thw"]
                first = [of.index(i) for i in range(max(of) + 1)]
                pictures = inputs.pop(name).split(grid.prod(-1).tolist())
                pixels[kind], grids[kind], which[kind] = torch.cat([pictures[i] for i in first]), grid[first], of
        if not pixels:
            side, device = v.spatial_merge_size, self.model.device
            pixels["grey"] = torch.zeros(side**2, v.in_channels * v.temporal_patch_size * v.patch_size**2, device=device)
            grids["grey"] = torch.tensor([[1, side, side]], device=device)
        # to a Qwen a video is a picture that is longer in time: for both its functions are the same
        out = self.model.base_model.get_image_features(torch.cat([*pixels.values()]), torch.cat([*grids.values()]), return_dict=True)
        layers = [out.pooler_output, *(getattr(out, "deepstack_features", None) or [])]  # Qwen3-VL: also of its tower's earlier layers
        if "grey" in pixels:
            return {}, 0 * sum(picture.sum() for layer in layers for picture in layer)
        seen, start = {}, 0
        for kind, grid in grids.items():
            own = [[layer[start + i] for i in which[kind]] for layer in layers]
            seen[kind], start = SimpleNamespace(pooler_output=own[0], deepstack_features=own[1:]), start + len(grid)
        return seen, 0


def token_logps(policy, batch, entropy=False):
    """Log-probabilities of the response tokens, (B, R) in float32, 0 where batch["mask"] is; with entropy: (logp, entropy)."""
    out = policy(batch, entropy)  # policy: a Policy, or the engine around it
    return (out["logp"], out["entropy"]) if entropy else out["logp"]


# ---------------------------------------------------------------------------------------------------
# Loading and saving


def load_processor(folder, min_pixels=None, max_pixels=None):
    """That of a folder or a name on the hub, with its own or these bounds of an image: whoever loads what is saved sees the same."""
    from transformers import AutoConfig, AutoProcessor
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as LEGAL

    config = AutoConfig.from_pretrained(folder)
    if config.model_type not in LEGAL or not hasattr(config, "vision_config"):
        raise Unusable(f"{folder} is a {config.model_type!r}; legal: a model that reads images and text: qwen2_5_vl, qwen2_vl, qwen3_vl")
    processor = AutoProcessor.from_pretrained(folder)
    for part in (processor.image_processor, processor.video_processor):
        part.size = {"shortest_edge": min_pixels or part.size["shortest_edge"], "longest_edge": max_pixels or part.size["longest_edge"]}
    return processor


def load_policy(folder, head=None, dtype="auto", attn="sdpa", recompute=False, freeze_vision=False):
    """That of a folder or a name on the hub. head: None | "scalar" | "critic" begins a new head; a folder that has one brings its own."""
    from safetensors.torch import load_file, safe_open
    from transformers import AutoModelForImageTextToText

    # Loaded whole by each rank on the CPU; ZeRO-3 cuts it up afterwards (its loading in pieces renames keys wrongly for these models).
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, attn_implementation=attn)
    stored = Path(folder, "reward_head", "head.safetensors")
    if stored.is_file():
        with safe_open(stored, "pt") as file:
            head = file.metadata()["head"]
    policy = Policy(model, head)
    if stored.is_file():
        policy.head.load_state_dict(load_file(stored))
    if policy.head is not None:
        policy.head.to(model.dtype)
    if freeze_vision:
        model.base_model.visual.requires_grad_(False)
    if recompute:
        model.gradient_checkpointing_enable()
    return policy


def save_policy(policy, processor, folder, rank=0):
    """Write the folder that from_pretrained, vLLM and load_policy read. All ranks call it; rank 0 writes. Files appear whole."""
    model, state, kept = policy.model, {}, {}
    for tensors, module in ((state, model), (kept, policy.head)):
        for name, p in module.named_parameters() if module is not None else ():
            with gathered([p]):  # under ZeRO-3 one parameter at a time
                if rank == 0:
                    tensors[name] = p.detach().cpu().clone()
    if rank == 0:
        part = Path(folder, "part")
        shutil.rmtree(part, ignore_errors=True)
        model.save_pretrained(part, state_dict=state)
        processor.save_pretrained(part)
        if policy.head is not None:  # in a folder of its own: vLLM reads every safetensors file beside the model
            from safetensors.torch import save_file
            (part / "reward_head").mkdir()
            save_file(kept, part / "reward_head" / "head.safetensors", {"head": policy.kind})
        for file in sorted(part.rglob("*")):
            if file.is_file():
                target = Path(folder, file.relative_to(part))
                target.parent.mkdir(exist_ok=True)
                os.replace(file, target)
        shutil.rmtree(part)
    if dist.is_initialized():
        dist.barrier()


def gathered(parameters, write=False):
    """Under ZeRO-3 the whole of these parameters inside the block, on every rank. write: what rank 0 makes of them stays."""
    import contextlib
    if not any(hasattr(p, "ds_id") for p in parameters):
        return contextlib.nullcontext()
    import deepspeed
    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if write else None)


# ---------------------------------------------------------------------------------------------------
# Pairs -> rows -> batches. A row is one sequence: {"prompt": ids, "types": ids, "response": ids, + MEDIA arrays}; token ids are
# never turned into text and back, so a sampled response is row | {"response": its ids}.


def encode(processor, turns, response=None, media=None):
    """Chat turns (see annotate.messages) and the assistant's response, a text -> a row. Without a response: one to generate from."""
    images, videos, metadata = media or read_media(processor, turns)
    text = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    # what read_media has sized and sampled stays as it is
    inputs = processor(text=[text], images=images, videos=videos, do_resize=False,
                       **({"video_metadata": metadata, "do_sample_frames": False} if videos else {}))
    row = {"prompt": list(inputs["input_ids"][0]), "types": list(inputs["mm_token_type_ids"][0]), "response": []}
    row |= {k: torch.as_tensor(inputs[k]).numpy() for k in MEDIA if k in inputs}
    if response is not None:
        row["response"] = processor.tokenizer(response, add_special_tokens=False)["input_ids"] + [processor.tokenizer.eos_token_id]
    return row


def read_media(processor, turns):
    """(images, videos, their metadata) of chat turns, as qwen-vl-utils reads and sizes them within the processor's bounds."""
    from qwen_vl_utils import process_vision_info

    sizes = {"image": processor.image_processor.size, "video": processor.video_processor.size}
    bounds = {kind: {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]} for kind, size in sizes.items()}
    sized = [turn | {"content": [part | bounds.get(part["type"], {}) for part in turn["content"]]}
             for turn in turns if not isinstance(turn["content"], str)]
    images, videos, _ = process_vision_info(sized, return_video_kwargs=True, return_video_metadata=True,
                                            image_patch_size=processor.image_processor.patch_size)
    frames, metadata = zip(*videos) if videos else (None, None)
    return images, frames and list(frames), metadata and list(metadata)


def prompt_length(processor, turns):
    """len(encode(processor, turns)["prompt"]), of whose pictures only the headers are read: what does not fit is known before a run."""
    from PIL import Image
    from qwen_vl_utils import smart_resize

    parts, count = [part for turn in turns for part in turn["content"]], processor.image_processor
    if any(part["type"] == "video" for part in parts):
        return len(encode(processor, turns)["prompt"])
    text = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    tokens, side = len(processor.tokenizer(text)["input_ids"]), count.patch_size * count.merge_size
    for part in parts:
        if part["type"] == "image":
            with Image.open(part["image"]) as image:
                width, height = image.size
            bounds = dict(min_pixels=count.size["shortest_edge"], max_pixels=count.size["longest_edge"])
            height, width = smart_resize(height, width, side, **bounds)
            tokens += height * width // side**2 - 1  # the template has one
    return tokens


def to_sample(processor, turns):
    """Chat turns -> the row from which both engines generate: with its pictures as they were read, too."""
    media = read_media(processor, turns)
    return encode(processor, turns, media=media) | {"media": media}


def for_vllm(images, videos, metadata):
    """read_media's -> the part of a vLLM prompt that holds them: sized and sampled already."""
    data = {"image": images} if images else {}
    if videos:
        frames = [video.permute(0, 2, 3, 1).numpy().astype("uint8") for video in videos]
        data["video"] = [(f, about | {"do_sample_frames": False}) for f, about in zip(frames, metadata)]
    return {"multi_modal_data": data, "mm_processor_kwargs": {"do_resize": False}} if data else {}


def start_vllm(folder, context, **options):
    """vLLM as stages 3 and 4 start it, with what a CPU needs in the place of a GPU."""
    cuda = torch.cuda.is_available()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING" if cuda else "ERROR")
    if not cuda:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        # a seeded request whose prefill is cut in chunks stops vLLM on a CPU; there, batches are bounded by tokens, not by memory
        options |= dict(dtype="float32", enforce_eager=True, enable_chunked_prefill=False, max_num_batched_tokens=max(8192, context))
    from vllm import LLM
    return LLM(str(folder), max_model_len=context, **options)


def length(row):
    return len(row["prompt"]) + len(row["response"])


def collate(rows, pad, device="cpu", left=False):
    """
    Rows -> a batch: padded at the end, where no token sees it and attention needs no mask (kernels are faster without), or in front
    and with one (left), to generate from. Beside the model's inputs: mask (B, R), True where row i has a j-th response token;
    tokens (N,), those tokens; at (N,) the position in the flattened (B * T) that predicts each; last (B,) that of each row's last
    token; image_of, video_of: which of the distinct pictures each one is. No rows: two padding tokens and nothing to predict.
    """
    shown = rows or [{"prompt": [pad, pad], "types": [0, 0], "response": []}]
    T, R = max(map(length, shown)), max(len(row["response"]) for row in shown)
    ids, seen, types = (torch.full((len(shown), T), fill) for fill in (pad, 0, 0))
    mask, at, last = torch.zeros(len(rows), R, dtype=torch.bool), [], []
    for i, row in enumerate(shown):
        start = T - length(row) if left else 0
        prompt, end = start + len(row["prompt"]), start + length(row)
        ids[i, start:end] = torch.tensor(row["prompt"] + row["response"])
        seen[i, start:end] = 1
        types[i, start:prompt] = torch.tensor(row["types"])  # a response is text: 0. Without types the positions would silently be 1-D
        if rows:
            mask[i, :len(row["response"])] = True
            at.append(torch.arange(i * T + prompt - 1, i * T + end - 1))
            last.append(i * T + end - 1)
    batch = {"input_ids": ids, "mm_token_type_ids": types, "mask": mask, **({"attention_mask": seen} if left else {}),
             "last": torch.tensor(last, dtype=torch.long), "at": torch.cat(at) if at else torch.tensor([], dtype=torch.long),
             "tokens": torch.tensor([token for row in rows for token in row["response"]], dtype=torch.long)}
    for k in MEDIA:
        arrays = [torch.as_tensor(row[k]) for row in rows if k in row]
        if arrays:
            batch[k] = torch.cat(arrays)
    for kind, k in PIXELS:  # samples of one prompt have its very arrays
        known = {}
        of = [known.setdefault((id(row[k]), j), len(known)) for row in rows if k in row for j in range(len(row[f"{kind}_grid_thw"]))]
        if of:
            batch[f"{kind}_of"] = torch.tensor(of)
    return {k: v.to(device) for k, v in batch.items()}


def micro_batches(groups, budget):
    """
    This rank's groups (lists of rows that stay together) -> its micro-batches, lists of rows: sorted by length, longest first,
    each filled until rows x longest row exceeds the budget. All ranks get the same number, some of them empty at the end,
    because ZeRO-2 and 3 reduce and gather in every micro-batch.
    """
    batches = []
    for group in sorted(groups, key=lambda g: -max(map(length, g))):
        longest = max(map(length, batches[-1])) if batches else 0
        if not batches or (len(batches[-1]) + len(group)) * longest > budget:
            batches.append([])
        batches[-1] = batches[-1] + group
    return batches + [[]] * (int(reduced(len(batches), "max")) - len(batches))


# ---------------------------------------------------------------------------------------------------
# Ranks and the engine


def setup(seed):
    """(rank, world, device) of this process, under torchrun or alone. gloo and float32 on a CPU, nccl and bfloat16 on a GPU."""
    cuda = torch.cuda.is_available()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")
    if "RANK" not in os.environ:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        os.environ |= dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive the forks of data workers
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        keep_memory()
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    random.seed(seed)
    torch.manual_seed(seed)
    return dist.get_rank(), dist.get_world_size(), device


def begin(worker):
    """What a data worker does first: it will die with its rank, however that dies, and lets go of the free memory it has of it."""
    libc = ctypes.CDLL(None)
    libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: alone, it would wait for ever for somebody to take its pictures
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def reduced(value, how="sum"):
    """Sum or maximum of numbers over all ranks: a number for a number, a list for a list. float64, so counts stay exact."""
    many = torch.tensor(value, dtype=torch.float64)
    if dist.is_initialized() and dist.get_world_size() > 1:
        many = many.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(many, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[how])
    return many.tolist()


def make_engine(policy, zero, lr, device, weight_decay=0.0, clip_grad=1.0):
    """
    The DeepSpeed engine. zero: what is cut up among the ranks: 0 nothing, 1 optimizer, 2 and gradients, 3 and weights. 0 and 1
    reduce the gradient once a step and hold all of it; 2 and 3 reduce it in every micro-batch and hold a share. On a GPU weights
    are bfloat16, the optimizer's copy and the summed gradients float32.
    """
    import logging

    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    # A faster reduction for CPUs, compiled at run time under a lock: one killed process would leave all later ones waiting for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    cuda = device.type == "cuda"
    if cuda and zero == 0:
        raise Unusable("--zero is 0; legal on a GPU: 1, 2, 3 (float32 copies of the weights begin at 1, which on one GPU cuts nothing)")
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay)
    config = {
        "train_micro_batch_size_per_gpu": 1, "managed_gradient_accumulation": False,  # update() decides when a step is due
        "gradient_clipping": clip_grad, "bf16": {"enabled": cuda}, "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": zero}, "zero_allow_untested_optimizer": True, "steps_per_print": 10**9}
    engine = deepspeed.initialize(model=policy, optimizer=optimizer, config=config, dist_init_required=False)[0]
    engine.enable_backward_allreduce = zero > 0  # see update()
    return engine


def update(engine, batches, loss_of, lr):
    """
    One optimizer step. batches: this rank's micro_batches(); loss_of(rows) -> a micro-batch's part of the loss, divided by counts
    over ALL ranks, so that the parts add up to the loss of the global batch. -> (loss, gradient norm before clipping). A gradient
    that is not finite changes nothing, and the norm is inf.
    """
    world, total = dist.get_world_size(), 0.0
    engine.train()  # what from_pretrained made is not in training, and there --recompute would do nothing
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    for rows in batches:
        loss = loss_of(rows)
        engine.backward(loss * world)  # DeepSpeed takes the mean over ranks; the loss is a sum
        total += loss.item()
    if engine.zero_optimization():
        engine.step()
        return reduced(total), float(engine.get_global_grad_norm()) if engine.was_step_applied() else math.inf
    engine.buffered_allreduce_fallback()  # stage 0 clips without telling the norm: reduce here, measure, then step
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None]))
    if math.isfinite(norm):
        engine.step()
    engine.zero_grad()
    return reduced(total), norm if math.isfinite(norm) else math.inf


def schedule(step, steps, peak, warmup, kind, floor=0.1):
    """The learning rate of step 0, 1, ...: linear up over warmup steps, then "cosine" or "linear" to floor * peak, or "constant"."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    left = {"constant": 1, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[kind]
    return peak * (floor + (1 - floor) * left)


# ---------------------------------------------------------------------------------------------------
# What makes a CPU faster


def keep_memory():
    """What is freed stays with this process: a page that comes back from the system is cleared first, a tenth of a step on a CPU."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc: from the heap what is below 32 MiB, and of its end nothing goes back below 2 GiB
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def product(x, weight, bias=None):
    """x @ weight.T + bias. On a CPU by oneDNN: torch asks MKL, to which an AMD EPYC is half as fast (results/LOG.md)."""
    if not x.is_cuda and x.dtype == torch.float32 and torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return torch.nn.functional.linear(x, weight, bias)


class Product(torch.autograd.Function):
    """product() with a gradient."""

    @staticmethod
    def forward(ctx, x, weight, bias):  # (..., I), (O, I), (O,) or None
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        (x, weight), (of_x, of_weight, of_bias) = ctx.saved_tensors, ctx.needs_input_grad
        flat = grad.flatten(0, -2)
        return (product(grad, weight.T) if of_x else None, product(flat.T, x.flatten(0, -2).T) if of_weight else None,
                flat.sum(0) if of_bias else None)


class Linear(torch.nn.Linear):
    def forward(self, x):
        return (torch.nn.functional.linear if x.is_cuda else Product.apply)(x, self.weight, self.bias)


# ---------------------------------------------------------------------------------------------------
# Checkpoints and the log


def save_checkpoint(folder, engine, step, extra=None):
    """
    Everything that the next step depends on, in folder/step-N: weights, optimizer, the ranks' random states, and `extra`, a dict
    of each rank's own. Written beside and renamed when it is whole, then the older ones go: a kill at any moment leaves a good one.
    """
    rank, folder = dist.get_rank(), Path(folder)
    part, whole = folder / f"step-{step:06d}.part", folder / f"step-{step:06d}"
    if rank == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(part, tag="engine", save_latest=False)
    state = {"step": step, "extra": extra, "random": random.getstate(), "torch": torch.get_rng_state(),
             "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None, "shape": shape_of(engine)}
    torch.save(state, part / f"rank-{rank}.pt")
    dist.barrier()
    if rank == 0:
        if whole.exists():
            shutil.rmtree(whole)
        os.replace(part, whole)
        for old in folder.glob("step-*"):
            if old != whole:
                shutil.rmtree(old)
    dist.barrier()


def checkpoints(folder):
    """{step: its whole checkpoint}, the newest last."""
    return {int(path.name[5:]): path for path in sorted(Path(folder).glob("step-*")) if path.suffix != ".part"}


def load_checkpoint(folder, engine):
    """Puts the newest whole checkpoint's state back; returns (step, extra), or (0, None) where there is none."""
    found = [*checkpoints(folder).values()]
    if not found:
        return 0, None
    mine = found[-1] / f"rank-{dist.get_rank()}.pt"
    there, shape = len(list(found[-1].glob("rank-*.pt"))), shape_of(engine)
    if there != dist.get_world_size():
        raise Unusable(f"{found[-1]} was written by {there} ranks, this run has {dist.get_world_size()}; use as many, or another --out")
    state = torch.load(mine, weights_only=False)
    if state["shape"] != shape:
        raise Unusable(f"{found[-1]} belongs to {state['shape']}, this run to {shape}; use that --model and --zero, or another --out")
    engine.load_checkpoint(found[-1], tag="engine")
    random.setstate(state["random"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    return state["step"], state["extra"]


def keep_rows(path, step):
    """Drops what a killed run had written beyond the checkpoint it resumes from."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        part = path.with_suffix(".part")
        part.write_text("".join(kept), encoding="utf-8")
        os.replace(part, path)


def resumed(folder, engine, args, free, **fresh):
    """(steps done, this rank's state): of the last checkpoint in folder, which only the same flags, but for those in `free`, may
    continue; or 0 and the state of a fresh run."""
    done, state = load_checkpoint(Path(folder, "checkpoints"), engine)
    recipe = {k: v for k, v in vars(args).items() if k not in free}
    state = state or fresh | {"recipe": recipe}
    if state["recipe"] != recipe:
        differs = [f"--{k} {v} (there: {state['recipe'].get(k)})" for k, v in recipe.items() if v != state["recipe"].get(k)]
        raise Unusable(f"--out {folder} holds another run: {', '.join(differs)}; go on with its flags, or choose another --out")
    Path(folder).mkdir(parents=True, exist_ok=True)
    keep_rows(Path(folder, f"rollouts-{dist.get_rank()}.jsonl"), done)
    return done, state


def shape_of(engine):
    """What a checkpoint and a run must share: the architecture, its size, the head and how it is cut up."""
    model = engine.module.model
    sizes = [getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters()]
    return (f"{model.config.model_type}, {len(sizes)} tensors, {sum(sizes)} parameters, head {engine.module.kind}, "
            f"ZeRO {engine.zero_optimization_stage()}")


def header(args, world, device):
    """The first row of a log: what it takes to repeat the run."""
    import importlib.metadata as metadata

    git = lambda *words: subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    version = lambda name: next((metadata.version(n) for n in (name, f"{name}-cpu") if any(metadata.distributions(name=n))), None)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"args": vars(args), "command": sys.argv, "versions": {n: version(n) for n in ("torch", "transformers", "deepspeed", "vllm")},
            "commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
            "device": name, "ranks": world, "threads": torch.get_num_threads()}


class Log:
    """One line a step on the screen beside a bar, one row a step in folder/log.jsonl. Ranks other than 0 stay silent."""

    def __init__(self, folder, first_row, step, steps, tracker="none"):
        """step: the number of steps already done; rows beyond it, of a run that was killed, are dropped."""
        self.path, self.on, self.tracker = Path(folder, "log.jsonl"), dist.get_rank() == 0, None
        if not self.on:
            return
        from tqdm import tqdm

        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = self.path.read_text().splitlines() if step and self.path.exists() else []
        kept = [row for row in rows if json.loads(row).get("step", 0) <= step] if rows else []
        kept.append(json.dumps(first_row if not kept else {"resumed": step} | first_row))
        part = self.path.with_suffix(".part")
        part.write_text("\n".join(kept) + "\n")
        os.replace(part, self.path)
        self.bar = tqdm(total=steps, initial=step, dynamic_ncols=True)
        if tracker == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            self.tracker = SummaryWriter(folder, purge_step=step + 1)
        elif tracker == "wandb":
            import wandb
            self.tracker = wandb.init(project="r1-reward", dir=folder, config=first_row["args"])

    def row(self, step, **values):
        """step counts from 1. Numbers are printed short and written whole."""
        if not self.on:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        numbers = {k: v for k, v in values.items() if isinstance(v, (int, float))}
        self.bar.update(step - self.bar.n)
        self.bar.write(f"step {step}  " + "  ".join(f"{k} {v:.4g}" for k, v in numbers.items()), file=sys.stdout)
        sys.stdout.flush()
        if hasattr(self.tracker, "add_scalar"):
            for k, v in numbers.items():
                self.tracker.add_scalar(k, v, step)
        elif self.tracker is not None:
            self.tracker.log(numbers, step=step)

    def close(self):
        if self.on:
            self.bar.close()


def curves(folder, panels):
    """log.jsonl -> curves.png. panels: {title: the keys of its lines}."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in map(json.loads, Path(folder, "log.jsonl").read_text().splitlines()) if "step" in row]
    down, across = math.ceil(len(panels) / 4), min(4, len(panels))
    figure, axes = plt.subplots(down, across, figsize=(4 * across, 3.25 * down), layout="constrained", squeeze=False)
    for axis, (title, names) in zip(axes.flat, panels.items()):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            axis.plot(*zip(*points), label=name, marker="." if len(points) < 30 else None) if points else None
        axis.set(title=title, xlabel="step")
        axis.legend(frameon=False) if axis.lines else None
    figure.savefig(Path(folder, "curves.png"), dpi=110)
    plt.close(figure)


def end_run(out, policy, processor, log, panels, rank):
    """The end of a run: the model, and its curves."""
    save_policy(policy, processor, out, rank)
    log.close()
    if rank == 0:
        curves(out, panels)
        print(f"{out}: the model after {log.bar.total} steps, log.jsonl, curves.png")


# ---------------------------------------------------------------------------------------------------
# What is learnt from a pair

# flags that may change between a run and its continuation
FREE = {"out", "attn", "recompute", "workers", "eval_every", "max_new_tokens", "save_every", "tracker", "zero", "micro_tokens"}
DROPPED = ("too long", "no annotation", "no critiques")  # why a pair is not trained on


def critique_of(pair, i):
    """The turn to which the critic answers with its critique of response i."""
    return turn(pair, CRITIQUE_PROMPT.format(question=pair["question"], answer=pair["responses"][i]))


def rows_of(pair, processor, head, context):
    """A pair -> its rows: [the judgement] or, with a reward head, [the better response, the worse]. Or one of DROPPED."""
    order = (pair["choice"] - 1, 2 - pair["choice"])
    if head is None and pair["annotation"] is None:
        return "no annotation"
    if head == "critic" and pair.get("critiques") is None:
        return "no critiques"
    if head is None:
        rows = [encode(processor, messages(pair), pair["annotation"])]
    elif head == "scalar":
        rows = [encode(processor, turn(pair, pair["question"]), pair["responses"][i]) for i in order]
    else:
        rows = [encode(processor, critique_of(pair, i), pair["critiques"][i]) for i in order]
    return rows if max(map(length, rows)) <= context else "too long"


class Items(torch.utils.data.Dataset):
    """rows_of() by number, for data workers; an image that cannot be read is told with its file and line."""

    def __init__(self, path, pairs, processor, head, context):
        self.path, self.pairs, self.rest = path, pairs, (processor, head, context)

    def __getitem__(self, i):
        try:
            return rows_of(self.pairs[i], *self.rest)
        except OSError as problem:
            raise Unusable(f"{self.path}, line {i + 1} ({self.pairs[i]['id']}): an image cannot be read: {problem}") from None


def as_it_is(item):  # a lambda could not be sent to worker processes that are not forked: the rule from Python 3.14 on
    return item


def check_files(path, pairs):
    """Says which line names an image that is not there, before hours have gone by."""
    for i, pair in enumerate(pairs, 1):  # read_pairs gives one pair a line
        for file in pair["images"] + (pair["video"] or []):
            if not os.path.isfile(file):
                raise FileNotFoundError(f"{path}, line {i} ({pair['id']}): there is no {file}; restore it or remove the line")


def global_batches(pairs, numbers, size, epochs, seed):
    """Lists of at most `size` numbers of pairs, one a step: shuffled anew each epoch, near-equal in size, the longest pairs first."""
    batches, rng = [], random.Random(f"{seed} order")
    about = lambda i: len(pairs[i]["annotation"] or "") + len(pairs[i]["question"]) + sum(map(len, pairs[i]["responses"]))
    n, parts = len(numbers), -(-len(numbers) // size)
    for _ in range(epochs):
        order = rng.sample(numbers, n)
        batches += [sorted(order[i * n // parts:(i + 1) * n // parts], key=about, reverse=True) for i in range(parts)]
    return batches


def losses(policy, batch):
    """Sums: -log p over response tokens; -log sigmoid(better - worse) over pairs, 0 without a head; pairs scored right."""
    out = policy(batch)
    text = 0.0 if out["logp"] is None else -out["logp"].sum()
    if out["score"] is None:
        return text, 0.0, 0
    margin = out["score"][::2] - out["score"][1::2]  # rows_of puts the better first
    return text, -torch.nn.functional.logsigmoid(margin).sum(), int((margin > 0).sum())


# ---------------------------------------------------------------------------------------------------
# Validation


def barred(processor, vocabulary):
    """Ids that must not be sampled: markers of images and videos (there are no pixels behind them), padding of the vocabulary."""
    tokenizer = processor.tokenizer
    special = {i for token, i in tokenizer.get_vocab().items() if token.startswith("<|") and ("vision" in token or "_pad" in token)}
    return sorted(special | set(range(len(tokenizer), vocabulary)))


class HF:
    """transformers' generate on the trainer's own weights: validates here, and is the slow second rollout engine of rl.py, without vLLM."""

    def __init__(self, policy, processor, device):
        self.policy, self.pad, self.eos, self.device = policy, processor.tokenizer.pad_token_id, processor.tokenizer.eos_token_id, device
        self.barred = barred(processor, policy.model.config.get_text_config().vocab_size)

    @torch.no_grad()
    def generate(self, prompts, seeds=None, n=1, temperature=1.0, max_tokens=1024, logps=False, batch=32):
        """Rows without a response -> [[sample, ...] a row], a sample being {"ids", "logps": None}. A batch shares its first row's seed."""
        model, rows, out = self.policy.model, [row | {"response": []} for row in prompts for _ in range(n)], []
        training = model.training
        model.eval()  # in training, recomputation would switch the cache of keys and values off
        how = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0) if temperature else dict(
            do_sample=False, temperature=None, top_p=None, top_k=None)
        for i in range(0, len(rows), batch):
            inputs = collate(rows[i:i + batch], self.pad, self.device, left=True)
            if temperature:
                torch.manual_seed(seeds[i // n])  # so samples repeat for the same batch only
            ids = model.generate(**{k: inputs[k] for k in INPUTS if k in inputs}, max_new_tokens=max_tokens, suppress_tokens=self.barred,
                                 eos_token_id=self.eos, pad_token_id=self.pad, repetition_penalty=1.0, use_cache=True, **how)
            ids = ids[:, inputs["input_ids"].shape[1]:].tolist()
            out += [line[:line.index(self.eos) + 1] if self.eos in line else line for line in ids]
        model.train(training)
        samples = [{"ids": ids, "logps": None} for ids in out]
        return [samples[i * n:(i + 1) * n] for i in range(len(prompts))]

    def sync(self, policy):
        pass

    def sleep(self):
        pass


@torch.no_grad()
def validate(engine, processor, pairs, context, budget, max_new_tokens):
    """
    {"val_loss", "val_accuracy", ...} over all ranks; without a head also val_format, both from greedy judgements. ZeRO-3 would
    gather all weights anew for each token, so there what needs generation is left to evaluate.py.
    """
    policy, pad, end = engine.module, processor.tokenizer.pad_token_id, processor.tokenizer.eos_token_id
    device, head = policy.model.device, policy.kind
    hf = HF(policy, processor, device)
    greedy = lambda rows: [sample["ids"] for sample, in hf.generate(rows, temperature=0.0, max_tokens=max_new_tokens)]
    engine.eval()
    mine = pairs[dist.get_rank()::dist.get_world_size()]
    groups = [group for group in (rows_of(pair, processor, head, context) for pair in mine) if not isinstance(group, str)]
    sums = [0.0, 0.0, 0.0]  # of losses()
    for rows in micro_batches(groups, budget):
        sums = [a + float(b) for a, b in zip(sums, losses(engine, collate(rows, pad, device)))]
    text, pair, right, tokens, n = reduced([*sums, sum(len(row["response"]) for group in groups for row in group), len(groups)])
    found = {"val_loss": text / max(1, tokens) + pair / n, "val_n": int(n)} if n else {}
    if head == "scalar":
        return found | {"val_accuracy": right / max(1, n)}
    if engine.zero_optimization_stage() == 3:
        return found
    if head == "critic":  # its own critiques, not the annotator's
        rows = [row | {"response": []} for group in groups for row in group]
        rows = [row | {"response": ids} for row, ids in zip(rows, greedy(rows))]
        twos = [rows[i:i + 2] for i in range(0, len(rows), 2)]
        own = [losses(engine, collate(batch, pad, device))[2] for batch in micro_batches(twos, budget)]
        return found | {"val_accuracy": reduced(sum(own)) / max(1, n)}
    said = greedy([encode(processor, messages(pair)) for pair in mine])
    verdicts = [parse(processor.tokenizer.decode(ids, skip_special_tokens=True)) for ids in said]
    right, form = reduced([sum(v.choice == pair["choice"] for v, pair in zip(verdicts, mine)),
                           sum(v.well_formed and ids[-1] == end for v, ids in zip(verdicts, said))])
    return found | {"val_format": form / len(pairs), "val_accuracy": right / len(pairs), "val_n": len(pairs)}


# ---------------------------------------------------------------------------------------------------


PANELS = {"loss, nats a token": ["loss", "val_loss"], "held-out pairs": ["val_format", "val_accuracy"],
          "norm of the gradient": ["norm"], "learning rate": ["lr"]}


def trainer_flags(p):
    """Those that rl.py and downstream_grpo.py have too."""
    add = p.add_argument_group("trainer").add_argument
    add("--attn", default="sdpa", choices=("sdpa", "eager", "flash_attention_2"), help="attention; the last needs a GPU and flash-attn")
    add("--min_pixels", type=int, help="of an image or a frame; smaller ones are enlarged; none = as the model's processor has it")
    add("--max_pixels", type=int, help="of an image or a frame; larger ones shrink; none = as the model's processor has it")
    add("--freeze_vision", action="store_true", help="leave the vision tower as it is")
    add("--recompute", action=argparse.BooleanOptionalAction, default=True,
        help="compute activations again in the backward: a third more work, far less memory")
    add("--clip_grad", type=float, default=1.0, help="bound of the gradient's norm; 0 = none (ours)")
    add("--zero", type=int, default=2, choices=(0, 1, 2, 3),
        help="DeepSpeed ZeRO stage; 0 only on a CPU; 3 = cut the weights up too: a 7B model beside vLLM on 4 GPUs of 80 GB")
    add("--micro_tokens", type=int, default=16384, help="padded tokens of a micro-batch; changes speed and memory, no result")
    add("--workers", type=int, default=4, help="processes per rank that read pictures ahead; 0 = none")
    add("--seed", type=int, default=0, help="of the order of the data, of every sample, of a new head's weights")
    add("--save_every", type=int, default=20, help="steps between checkpoints; 0 = none on the way")
    add("--tracker", default="none", choices=("none", "tensorboard", "wandb"), help="log there as well; it must be installed")


def parser():
    p = command_line(__doc__)
    add = p.add_argument_group("model and data").add_argument
    add("--model", default="Qwen/Qwen2.5-VL-7B-Instruct", help="folder or name: a Qwen2-VL, Qwen2.5-VL or Qwen3-VL")
    add("--head", choices=("scalar", "critic"), help="train a baseline of Table 5 instead; a model that has a head keeps it")
    add("--data", required=True, help="JSONL file of pairs with annotations, as annotate.py writes")
    add("--val", help="JSONL file of held-out pairs; none = --eval_n pairs of --data are held out")
    add("--context", type=int, default=8192, help="tokens; longer pairs are dropped and counted")
    add("--out", required=True, help="folder for the model, the log and the checkpoints")
    add = p.add_argument_group("optimisation").add_argument
    add("--lr", type=float, default=1e-5, help="peak learning rate; 1e-5 in the paper")
    add("--batch", type=int, default=256, help="pairs a step over all ranks, at most; 256 in the paper")
    add("--epochs", type=int, default=1, help="1 in the paper")
    add("--warmup", type=float, default=0.03, help="share of the steps with rising learning rate (ours)")
    add("--schedule", default="cosine", choices=("cosine", "linear", "constant"), help="down to a tenth (ours)")
    add("--weight_decay", type=float, default=0.0, help="of AdamW (ours)")
    add = p.add_argument_group("validation").add_argument
    add("--eval_every", type=int, default=50, help="steps between validations; there is one before the first and after the last")
    add("--eval_n", type=int, default=256, help="pairs that a validation judges; 0 = no validation")
    add("--max_new_tokens", type=int, default=1024, help="of a judgement or critique in validation; with --zero 3 none is generated")
    trainer_flags(p)
    p.set_defaults(min_pixels=4 * 28 * 28, max_pixels=640 * 28 * 28, save_every=50)  # an image has 4 to 640 tokens (ours)
    return p


def main():
    args = parser().parse_args()
    # 1. ranks, model, engine
    rank, world, device = setup(args.seed)
    processor = load_processor(args.model, args.min_pixels, args.max_pixels)
    policy = load_policy(args.model, args.head, torch.bfloat16 if device.type == "cuda" else torch.float32, args.attn, args.recompute,
                         args.freeze_vision)
    engine = make_engine(policy, args.zero, args.lr, device, args.weight_decay, args.clip_grad)
    collated = lambda rows: collate(rows, processor.tokenizer.pad_token_id, device)

    # 2. pairs, in an order that depends on the seed alone
    pairs = read_pairs(args.data)
    check_files(args.data, pairs)
    order = random.Random(f"{args.seed} held out").sample(range(len(pairs)), len(pairs))
    held_out = read_pairs(args.val, args.eval_n) if args.val else [pairs[i] for i in order[:args.eval_n]]
    if args.val:
        check_files(args.val, held_out)
    batches = global_batches(pairs, order if args.val else order[args.eval_n:], args.batch, args.epochs, args.seed)

    # 3. where a run that was killed had got to
    done, state = resumed(args.out, engine, args, FREE, dropped=dict.fromkeys(DROPPED, 0))
    if not done and Path(args.out, "config.json").exists():
        raise Unusable(f"--out {args.out} holds a model already; choose another, or remove it")
    log = Log(args.out, header(args, world, device), done, len(batches), args.tracker)
    dropped, start = state["dropped"], time.time()

    # 4. train; each rank takes every world-th pair of a batch that is sorted by length, so that all have about as much to do
    shares = [batch[rank::world] for batch in batches[done:]]
    ahead = 2 * args.batch // (world * args.workers) + 1 if args.workers else None  # two steps' worth among the workers
    items = iter(torch.utils.data.DataLoader(
        Items(args.data, pairs, processor, policy.kind, args.context), batch_size=None, sampler=sum(shares, []),
        collate_fn=as_it_is, num_workers=args.workers, prefetch_factor=ahead, worker_init_fn=begin))
    validation = lambda: validate(engine, processor, held_out, args.context, args.micro_tokens, args.max_new_tokens) if held_out else {}
    if not done and held_out:
        log.row(0, **validation())
    for step, share in enumerate(shares, done + 1):
        groups = [next(items) for _ in share]
        for reason in DROPPED:
            dropped[reason] += groups.count(reason)
        groups = [group for group in groups if not isinstance(group, str)]
        tokens, n = reduced([sum(len(row["response"]) for group in groups for row in group), len(groups)])

        def loss_of(rows):  # means over the global batch: over its response tokens, over its pairs
            text, pair, _ = losses(engine, collated(rows))
            return text / max(1, tokens) + pair / max(1, n)

        lr = schedule(step - 1, len(batches), args.lr, round(args.warmup * len(batches)), args.schedule)
        loss, norm = update(engine, micro_batches(groups, args.micro_tokens), loss_of, lr)
        if not math.isfinite(loss + norm):
            path = Path(args.out, "not_finite.json")
            path.write_text(json.dumps({"step": step, "ids": [pairs[i]["id"] for i in batches[step - 1]]}))
            raise FloatingPointError(f"step {step}: loss {loss}, gradient norm {norm}; the weights are as before, the ids of its pairs in "
                                     f"{path}. Likely: --lr {args.lr} is too high, or an image or its text is broken")

        # 5. validate, log, save
        last, row = step == len(batches), {}
        if last or step % args.eval_every == 0:
            row = validation()
        counts = dict(zip(DROPPED, map(int, reduced(list(dropped.values())))))
        log.row(step, loss=loss, lr=lr, norm=norm, pairs=int(n), tokens=int(tokens), seconds=time.time() - start, **row, dropped=counts)
        start = time.time()
        if not last and args.save_every and step % args.save_every == 0:
            save_checkpoint(Path(args.out, "checkpoints"), engine, step, state)
    end_run(args.out, policy, processor, log, PANELS, rank)
    if rank == 0:
        shutil.rmtree(Path(args.out, "checkpoints"), ignore_errors=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (Unusable, FileNotFoundError) as problem:  # its owner can mend it: no traceback
        sys.exit(f"sft.py: {problem}")
