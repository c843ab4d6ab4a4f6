"""What makes the vision tower of a Qwen-VL fast. Names and shapes of its weights stay."""

import torch
from torch.nn.attention.varlen import varlen_attn

# transformers passes the bounds of all windows to an attention with "flash" in its name
VARLEN = "varlen_flash"


def speed_up_tower(tower):
    """Embed patches by a matrix product; on a GPU, attend within all windows in one call."""
    tower.patch_embed.proj = PatchProduct(tower.patch_embed.proj)
    half_precision = tower.dtype in (torch.bfloat16, torch.float16)
    if torch.cuda.is_available() and half_precision and tower.config._attn_implementation == "sdpa":
        use_varlen_attention(tower)


class PatchProduct(torch.nn.Module):
    """
    The convolution that embeds patches, whose kernel is as large as a patch: a matrix product.

    Forward and backward, Conv3d takes 10 times as long on a CPU, and on some GPUs in bfloat16 it
    takes seconds (https://github.com/huggingface/transformers/issues/45750).
    """

    def __init__(self, convolution):
        super().__init__()
        self.weight = convolution.weight  # (width, channels, frames, height, width of a patch)
        self.bias = convolution.bias

    def forward(self, patches):  # (N, channels, frames, height, width)
        matrix = self.weight.flatten(1)
        return torch.nn.functional.linear(patches.flatten(1), matrix, self.bias)  # (N, width)


def use_varlen_attention(tower):
    """Let one kernel attend within all windows or frames; "sdpa" takes a call for each of them."""
    from transformers import AttentionInterface

    AttentionInterface.register(VARLEN, attend_within_windows)
    tower.config._attn_implementation = VARLEN


def attend_within_windows(
    module, query, key, value, attention_mask, *, scaling, cu_seq_lens_q, max_length_q, **_
):
    """Attention as transformers calls it: (1, heads, T, D) tensors -> (1, T, heads, D)."""
    query, key, value = (
        tensor[0].transpose(0, 1) for tensor in (query, key, value)
    )  # (T, heads, D)
    bounds, longest = cu_seq_lens_q, max_length_q  # those of the keys are the same
    output = varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scaling)
    return output[None], None
