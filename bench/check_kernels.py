"""
The kernels that the trainer stands on, each against the same sums in float32: forward and backward,
in bfloat16 on a GPU, at the widths of Qwen2.5-VL-7B. A line for each: the largest difference of the
output and of the gradients, as a share of the largest number, and the milliseconds of a forward and
a backward pass.

$ python bench/check_kernels.py
"""

import copy
import functools
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from bench import findings
from bench.vision_tower import difference, make_pictures, make_tower, synchronize
from core.encoding import Sample
from core.flags import command_line
from core.policy import LMHead
from core.shared_prompts import (
    STRETCHES,
    attend_within_samples,
    collate_shared,
    dense_mask,
    row_length,
)
from core.vision_tower import PatchProduct, attend_within_windows, speed_up_tower

PATCH = (3, 2, 14, 14)  # channels, frames, height, width
# Differences that rounding explains: some steps of the last digit. Sums over whole layers get more.
BOUNDS = {torch.bfloat16: 0.02, torch.float32: 1e-4}
THROUGH_LAYERS = 4


def random_tensor(device, *shape, scale=1.0):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return (scale * torch.randn(*shape, device=device)).to(dtype)


def outputs_and_gradients(function, inputs, weights):
    """Of a sum of the output with fixed random factors: [output, gradient of each input]."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    (output.float() * weights).sum().backward()
    return [output.detach().float(), *[leaf.grad.float() for leaf in leaves]]


def compare(name, ours, reference, inputs, looser=1):
    """A finding: ours on the inputs as they are, the reference on the same numbers in float32."""
    device, dtype = inputs[0].device, inputs[0].dtype
    with torch.no_grad():
        weights = torch.randn_like(ours(*inputs), dtype=torch.float32)
    found = outputs_and_gradients(ours, inputs, weights)
    expected = outputs_and_gradients(reference, [tensor.float() for tensor in inputs], weights)
    differences = [difference(*pair) for pair in zip(found, expected)]
    synchronize(device)
    start = time.perf_counter()
    outputs_and_gradients(ours, inputs, weights)
    synchronize(device)
    milliseconds = 1000 * (time.perf_counter() - start)
    bound = looser * BOUNDS[dtype]
    text = f"{name}: difference {differences[0]:.1e}, of gradients {max(differences[1:]):.1e}"
    text += f" (bound {bound:g}), {milliseconds:.3g} ms"
    return findings.expect(max(differences) <= bound, text)


# --------------------------------------------------------------------------------------------------
# The kernels


def patch_embedding(args, device):
    convolution = torch.nn.Conv3d(3, args.width, PATCH[1:], PATCH[1:], bias=False)
    convolution.weight.data = random_tensor(device, *convolution.weight.shape, scale=0.03)

    def ours(patches, weight):
        product = PatchProduct(convolution)
        return torch.func.functional_call(product, {"weight": weight}, patches)

    def reference(patches, weight):
        return torch.einsum("nchwd,ochwd->no", patches, weight)

    inputs = [random_tensor(device, args.patches, *PATCH), convolution.weight.data]
    return compare("patch embedding", ours, reference, inputs)


def window_attention(args, device):
    if device.type == "cpu":
        text = "attention within windows: torch's varlen_attn has no CPU kernel"
        return findings.Finding(findings.NO_GPU, text)
    heads, width = args.width // 80, 80
    windows = [64, 64, 32, 16, args.patches - 176]  # the last one is a whole picture
    ends = torch.tensor([0, *windows], device=device).cumsum(0)

    def ours(query, key, value):
        output, _ = attend_within_windows(
            *(None, query, key, value, None),
            scaling=width**-0.5,
            cu_seq_lens_q=ends.int(),
            max_length_q=max(windows),
        )
        return output

    def reference(query, key, value):
        outputs = []
        for start, end in zip(ends[:-1].tolist(), ends[1:].tolist()):
            part = [tensor[:, :, start:end] for tensor in (query, key, value)]
            outputs.append(attention_in_full(*part))
        return torch.cat(outputs, 2).transpose(1, 2)  # (1, T, heads, D)

    inputs = [random_tensor(device, 1, heads, args.patches, width) for _ in range(3)]
    return compare("attention within windows", ours, reference, inputs)


def causal_attention(args, device):
    """Of the language model: several heads share a key and a value."""
    inputs = [random_tensor(device, 2, heads, args.tokens, 128) for heads in (28, 4, 4)]
    ours = functools.partial(
        torch.nn.functional.scaled_dot_product_attention, is_causal=True, enable_gqa=True
    )
    later = torch.ones(args.tokens, args.tokens, dtype=torch.bool, device=device).triu(1)
    reference = functools.partial(attention_in_full, unseen=later)
    return compare("causal attention (sdpa)", ours, reference, inputs)


def shared_prompt_attention(args, device):
    if device.type == "cpu":
        text = "attention of samples that share a prompt: torch's varlen_attn has no CPU kernel"
        return findings.Finding(findings.NO_GPU, text)
    return compare("attention of samples that share a prompt", *shared_prompts(args, device))


def shared_prompts(args, device):
    """(ours, reference, inputs): a row of three samples, and one of two with padding behind."""
    half, quarter = args.tokens // 2, args.tokens // 4
    rows = [samples_of_prompt(half, 1, quarter, quarter), samples_of_prompt(quarter, half, 3)]
    width = max(row_length(row) for row in rows)
    batch = {name: tensor.to(device) for name, tensor in collate_shared(rows, width).items()}
    unseen = dense_mask(batch["response_number"], torch.float32) != 0

    def ours(query, key, value):
        output, _ = attend_within_samples(
            *(None, query, key, value, None),
            scaling=128**-0.5,
            shared_rows={name: batch[name] for name in STRETCHES},
        )
        return output

    def reference(query, key, value):
        return attention_in_full(query, key, value, unseen).transpose(1, 2)  # (B, T, heads, D)

    inputs = [random_tensor(device, len(rows), heads, width, 128) for heads in (28, 4, 4)]
    return ours, reference, inputs


def samples_of_prompt(length, *response_lengths):
    prompt = [0] * length
    return [Sample(prompt, prompt, {}, response_ids=[0] * count) for count in response_lengths]


def attention_in_full(query, key, value, unseen=None):
    """(B, heads, T, D) tensors; unseen: True where a query does not see a key."""
    sharing = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(sharing, 1) for tensor in (key, value))
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if unseen is not None:
        scores = scores.masked_fill(unseen, float("-inf"))
    return scores.softmax(-1) @ value


def vision_tower(args, device):
    """All of it: the two above, norms, rotary positions, the merger."""
    tower = make_tower(args.layers, args.width, device)
    pixels, grids = make_pictures(args.pictures, device)
    exact = copy.deepcopy(tower).float()
    speed_up_tower(tower)

    def features(of_tower, pixels):
        return of_tower(pixels, grids).pooler_output

    ours = functools.partial(features, tower)
    pixels = pixels.to(tower.dtype)
    return compare(
        "vision tower", ours, functools.partial(features, exact), [pixels], THROUGH_LAYERS
    )


def log_probabilities(args, device):
    """Of response tokens, through the LM head."""
    hidden = random_tensor(device, args.tokens, args.hidden)
    weight = random_tensor(device, args.vocabulary, args.hidden, scale=0.02)
    targets = torch.randint(args.vocabulary, (args.tokens,), device=device)

    def ours(hidden, weight):
        head = LMHead(torch.nn.Parameter(weight))
        logps, _ = torch.func.functional_call(head, {"weight": weight}, (hidden, targets))
        return logps

    def reference(hidden, weight):
        logps = torch.log_softmax(hidden @ weight.T, -1)
        return logps.gather(1, targets[:, None])[:, 0]

    return compare("log-probabilities of tokens", ours, reference, [hidden, weight])


KERNELS = (
    patch_embedding,
    window_attention,
    causal_attention,
    shared_prompt_attention,
    vision_tower,
    log_probabilities,
)


def parser():
    p = command_line(__doc__)
    add = p.add_argument
    add("--width", type=int, default=1280, help="of the vision tower; a multiple of 80")
    add("--layers", type=int, default=4, help="of the vision tower; the 7B model's has 32")
    add("--patches", type=int, default=2560, help="of a picture; at least 256")
    add("--pictures", type=int, default=2, help="that the whole tower sees")
    add("--tokens", type=int, default=1024, help="of a text")
    add("--hidden", type=int, default=3584, help="width of the language model")
    add("--vocabulary", type=int, default=152064, help="of the language model")
    return p


def main():
    args = parser().parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    found = []
    for kernel in KERNELS:
        check = functools.partial(kernel, args, device)
        found.append(findings.attempt(kernel.__name__.replace("_", " "), check))
    findings.print_and_exit(found)


if __name__ == "__main__":
    main()
