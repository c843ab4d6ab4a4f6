"""The model: load, save, and log-probabilities of response tokens."""

import contextlib
import functools
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from core.encoding import MODEL_INPUTS, PIXELS
from core.files import InputError, in_short
from core.model_folder import appears_whole, load_config
from core.quiet import hush_bars
from core.shared_prompts import shared_inputs, use_varlen_attention
from core.vision_tower import speed_up_tower

# --------------------------------------------------------------------------------------------------
# Log-probabilities of tokens


class TokenLogps(torch.autograd.Function):
    """
    log softmax(hidden @ weight.T)[target] and its entropy, in float32, a chunk of tokens at a time.
    At most CHUNK logits exist at once: the backward pass computes the softmax of every chunk but
    the last again. The entropy is a statistic and has no gradient.
    """

    CHUNK = 2**26  # logits at once: 256 MB in float32
    linear = staticmethod(torch.nn.functional.linear)  # toy/cpu.py has one that is faster on a CPU

    @staticmethod
    def chunks(hidden, weight):
        size = max(1, TokenLogps.CHUNK // len(weight))
        return [slice(start, start + size) for start in range(0, len(hidden), size)]

    @staticmethod
    def logits(hidden, weight):
        if hidden.is_cuda and hidden.dtype != torch.float32:
            # the kernel sums in float32: take that, and do not round to bfloat16 in between
            return torch.mm(hidden, weight.T, out_dtype=torch.float32)
        return TokenLogps.linear(hidden, weight).float()

    @staticmethod
    def forward(ctx, hidden, weight, target_ids, with_entropy):  # (N, H), (V, H), (N,)
        logps = torch.empty(len(target_ids), dtype=torch.float32, device=hidden.device)
        log_totals = torch.empty_like(logps)
        entropy = torch.empty_like(logps) if with_entropy else None
        probs = logits = None
        for chunk in TokenLogps.chunks(hidden, weight):
            probs = logits = None  # make room for the next chunk's
            logits = TokenLogps.logits(hidden[chunk], weight)  # (n, V)
            target_logits = logits.gather(1, target_ids[chunk, None])[:, 0]
            largest = logits.amax(-1, keepdim=True)
            # shifted by the maximum: exp of a large logit is infinite
            shifted = logits - largest if with_entropy else logits.sub_(largest)
            probs = shifted.exp_()
            total = probs.sum(-1, keepdim=True)
            probs /= total
            log_totals[chunk] = (largest + total.log())[:, 0]
            logps[chunk] = target_logits - log_totals[chunk]
            if with_entropy:  # -sum p log p = log total - sum p logit
                entropy[chunk] = log_totals[chunk] - torch.linalg.vecdot(probs, logits)
        ctx.save_for_backward(hidden, weight, target_ids, log_totals)
        ctx.last_probs = probs
        if with_entropy:
            ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, target_ids, log_totals = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for chunk in reversed(TokenLogps.chunks(hidden, weight)):
            probs, ctx.last_probs = ctx.last_probs, None
            if probs is None:
                logits = TokenLogps.logits(hidden[chunk], weight)
                probs = logits.sub_(log_totals[chunk, None]).exp_()  # (n, V)
            # d logp / d logits = onehot(target) - probs
            grad_chunk = grad[chunk, None]
            grad_logits = probs.mul_(-grad_chunk)
            grad_logits.scatter_add_(1, target_ids[chunk, None], grad_chunk)
            grad_logits = grad_logits.to(weight.dtype)
            grad_hidden[chunk] = grad_logits @ weight
            if grad_weight is not None:
                add_product(grad_weight, grad_logits.T, hidden[chunk])
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None


def add_product(total, a, b):
    """total += a @ b, summed in float32."""
    if a.is_cuda and a.dtype != torch.float32:
        total += torch.mm(a, b, out_dtype=torch.float32)
    else:
        total.addmm_(a.float(), b.float())


class LMHead(torch.nn.Module):
    """
    The LM head: logits or, given target tokens, their log-probabilities and entropies. It is a
    module because ZeRO-3 gathers a weight only while its module runs.
    """

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, hidden, target_ids=None, with_entropy=False):
        if target_ids is None:
            return TokenLogps.linear(hidden, self.weight)
        return TokenLogps.apply(hidden, self.weight, target_ids, with_entropy)


# --------------------------------------------------------------------------------------------------
# The model


class Policy(torch.nn.Module):
    """
    A model of transformers (.model) and, for the reward models of Table 5, a .head that scores a
    response at its last token. head_kind: None, "scalar" (scores only) or "critic" (text as well).
    """

    def __init__(self, model, head_kind=None):
        super().__init__()
        self.model = model
        self.head_kind = head_kind
        self.head = None
        model.lm_head = LMHead(model.lm_head.weight)
        model.generation_config = without_sampling(model.generation_config)
        base = model.base_model
        base.get_rope_index = functools.partial(continue_after_videos, base.get_rope_index)
        speed_up_tower(base.visual)
        if torch.cuda.is_available() and model.dtype != torch.float32:
            use_varlen_attention(base.language_model)
        if head_kind:
            width = model.config.get_text_config().hidden_size
            self.head = torch.nn.Sequential(
                torch.nn.Linear(width, width), torch.nn.SiLU(), torch.nn.Linear(width, 1)
            )

    def forward(self, batch, entropy=False):
        """
        A batch of collate() -> {"logps": (S, R), "entropy": (S, R), "score": (S,)}, in float32.
        What was not asked for, or this head does not give, is None.
        """
        inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
        for name in PIXELS.values():
            inputs.pop(name, None)
        base = self.model.base_model
        inputs |= shared_inputs(base, batch, inputs)
        pictures, zero = self.encode_pictures(batch)
        output = base(**inputs, mm_encoder_outputs=pictures, use_cache=False)
        hidden = output.last_hidden_state + zero  # (B, T, H)
        hidden = hidden.flatten(0, 1)  # (B * T, H)
        result = {"logps": None, "entropy": None, "score": None}
        if self.head_kind != "scalar":
            # only the positions that predict a response token are projected to the vocabulary
            predicting = hidden[batch["predict_from"]]  # (N, H)
            logps, entropies = self.model.lm_head(predicting, batch["response_ids"], entropy)
            result["logps"] = spread(logps, batch["response_mask"])
            if entropy:
                result["entropy"] = spread(entropies, batch["response_mask"])
        if self.head is not None:
            result["score"] = self.head(hidden[batch["last_token"]])[:, 0].float()
        return result

    def encode_pictures(self, batch):
        """
        Features of the pictures as base_model takes them, and a zero to add to the hidden states.

        Every rank must run the same modules in the same order: ZeRO-3 gathers a module's weights,
        and ZeRO-2 reduces a gradient, on all ranks together. So the vision tower runs exactly once
        in every micro-batch: on images and frames together or, where there are none, on a dummy
        picture, whose features enter the graph as the zero.
        """
        kinds = [kind for kind, name in PIXELS.items() if name in batch]
        if not kinds:
            layers = self.run_tower(*self.dummy_picture())
            return {}, 0 * sum(torch.cat(layer).sum() for layer in layers)
        pixels, grids, numbers = zip(*[distinct_pictures(batch, kind) for kind in kinds])
        layers = self.run_tower(torch.cat(pixels), torch.cat(grids))
        features, start = {}, 0
        for kind, grid, number in zip(kinds, grids, numbers):
            end = start + len(grid)
            last, *earlier = [pick(layer[start:end], number) for layer in layers]
            features[kind] = SimpleNamespace(pooler_output=last, deepstack_features=earlier)
            start = end
        return features, 0

    def run_tower(self, pixels, grids):
        """
        Features of each picture, listed for the tower's last layer and, in a Qwen3-VL, for some
        earlier ones. To a Qwen a video is a picture that lasts longer, so one call serves both.
        """
        base = self.model.base_model
        output = base.get_image_features(pixels, grids, return_dict=True)
        return [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]

    def dummy_picture(self):
        """The pixels and the grid of the smallest picture there is, one token of grey."""
        vision = self.model.config.vision_config
        side = vision.spatial_merge_size
        patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.zeros(side**2, patch, device=self.model.device)
        return pixels, torch.tensor([[1, side, side]], device=self.model.device)


def without_sampling(generation_config):
    """The tokens of a generation_config alone: no temperature, top_p, top_k or penalty."""
    from transformers import GenerationConfig

    settings = generation_config.to_dict()
    tokens = {name: settings[name] for name in settings if name.endswith("_token_id")}
    return GenerationConfig(**tokens)


def distinct_pictures(batch, kind):
    """
    The pixels and grids of a batch's images or videos, each distinct one once; and, for each
    picture of the batch, the number of its distinct one.
    """
    first, number = batch[f"{kind}_index"].unique(return_inverse=True)
    grids = batch[f"{kind}_grid_thw"]
    pixels = batch[PIXELS[kind]].split(grids.prod(-1).tolist())
    return torch.cat(pick(pixels, first.tolist())), grids[first], number.tolist()


def pick(items, numbers):
    return [items[number] for number in numbers]


def spread(values, mask):
    """(N,) values -> the shape of the mask: where it is True, in order; 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def token_logps(policy, batch, entropy=False):
    """
    Log-probabilities of the response tokens and, if asked for, the entropy of the distribution
    that each comes from (else None): (S, R) in float32, 0 outside the response mask.
    """
    output = policy(batch, entropy)  # a Policy, or DeepSpeed's engine around it
    return output["logps"], output["entropy"]


def continue_after_videos(rope_index, input_ids, mm_token_type_ids, *args, **inputs):
    """
    Positions as Qwen2.5-VL was trained and as vLLM has them: text continues after the LARGEST
    position before it. transformers 5.19 leaves out how long a video lasts, so that the text after
    a video gets the positions of its frames.
    """
    # (3, B, T), (B, 1)
    positions, deltas = rope_index(input_ids, mm_token_type_ids, *args, **inputs)
    if inputs.get("video_grid_thw") is None:
        return positions, deltas
    mask = inputs.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(input_ids)
    for row in range(len(input_ids)):
        tokens = mask[row].nonzero()[:, 0]
        is_text = mm_token_type_ids[row, tokens] == 0
        position = positions[:, row, tokens]  # (3, t)
        text_starts = (is_text[1:] & ~is_text[:-1]).nonzero()[:, 0] + 1  # after each picture
        for start in text_starts.tolist():
            position[:, start:] += position[:, :start].max() + 1 - position[0, start]
        positions[:, row, tokens] = position
        deltas[row] = position.max() + 1 - len(tokens)
    return positions, deltas


# --------------------------------------------------------------------------------------------------
# Loading and saving


def load_policy(folder, head=None, dtype="auto", attn="sdpa", recompute=False, freeze_vision=False):
    """
    Load a policy from a folder or a hub name. head "scalar" or "critic" starts a new reward head;
    a folder that has one brings its own.
    """
    load_config(folder)  # a folder that is not whole is refused
    model = load_model(folder, dtype, attn)
    stored = Path(folder, "reward_head", "head.safetensors")
    head_weights = None
    if stored.is_file():
        kind, head_weights = load_head(stored)
        if head not in (None, kind):
            raise InputError(f"--head {head}: {folder} has a {kind} head; leave --head out")
        head = kind
    policy = Policy(model, head)
    if head_weights is not None:
        check_tensors(stored, policy.head.state_dict().keys() - head_weights.keys())
        policy.head.load_state_dict(head_weights)
    if policy.head is not None:
        policy.head.to(model.dtype)
    if freeze_vision:
        model.base_model.visual.requires_grad_(False)
    if recompute:
        model.gradient_checkpointing_enable()
    return policy


def load_model(folder, dtype, attn):
    """transformers' model with all of its weights; it would fill missing ones with random ones."""
    from transformers import AutoModelForImageTextToText

    hush_bars()
    # Each rank loads all of it on the CPU, and ZeRO-3 partitions it afterwards: transformers' own
    # loading under ZeRO-3 renames the keys of these models wrongly.
    load = AutoModelForImageTextToText.from_pretrained
    try:
        model, found = load(folder, dtype=dtype, attn_implementation=attn, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise InputError(f"--model {folder} cannot be loaded: {in_short(error)}") from None
    check_tensors(f"--model {folder}", found["missing_keys"])
    return model


def load_head(path):
    """Return the kind and the weights of a reward head."""
    from safetensors.torch import load_file, safe_open

    with safe_open(path, "pt") as file:
        kind = (file.metadata() or {}).get("head")
    if kind not in ("scalar", "critic"):
        raise InputError(f"{path} does not say its kind of head; expected a folder of sft.py")
    return kind, load_file(path)


def check_tensors(where, missing):
    if missing:
        raise InputError(
            f"{where} lacks {len(missing)} of its tensors, {min(missing)!r} the first; copy the "
            "folder again, or run the stage that makes it again"
        )


def save_policy(policy, processor, folder, rank=0, readme=None):
    """
    Write the folder that from_pretrained, vLLM and load_policy read. All ranks call it, rank 0
    writes; the model appears whole or not at all. Its generation_config.json names tokens and
    leaves sampling as it is. readme: the text of its README.md.
    """
    weights = gather_weights(policy.model, rank)
    head_weights = gather_weights(policy.head, rank) if policy.head is not None else {}
    if rank == 0:
        with appears_whole(folder) as part:
            policy.model.save_pretrained(part, state_dict=weights)
            processor.save_pretrained(part)
            if policy.head is not None:
                save_head(head_weights, policy.head_kind, part / "reward_head")
            if readme:
                (part / "README.md").write_text(readme, encoding="utf-8")
    if dist.is_initialized():
        dist.barrier()


def save_head(weights, kind, folder):
    """In a folder of its own: vLLM reads every safetensors file next to the model."""
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(weights, folder / "head.safetensors", {"head": kind})


def gather_weights(module, rank):
    """{name: weight} on rank 0's CPU."""
    weights = {}
    for some in whole_weights(module):
        if rank == 0:
            weights |= {name: weight.to("cpu", copy=True) for name, weight in some}
    return weights


WHOLE_AT_ONCE = 16  # weights under ZeRO-3: one at a time would be slow, all would fill the GPU


def whole_weights(module):
    """Yield lists of (name, weight) that are whole until the next list is asked for."""
    named = list(module.named_parameters())
    for start in range(0, len(named), WHOLE_AT_ONCE):
        some = named[start : start + WHOLE_AT_ONCE]
        with gather_zero3([parameter for _, parameter in some]):
            yield [(name, parameter.data) for name, parameter in some]


def gather_zero3(parameters, write=False):
    """
    Inside this block, parameters that ZeRO-3 has partitioned are whole on every rank. With write,
    what rank 0 changes in them is kept.
    """
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if write else None)
