"""core/vision_tower.py against transformers' own vision tower: features and gradients."""

import inspect
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn

from core import vision_tower
from core.policy import load_policy

BASE = Path(__file__).resolve().parent.parent / "toy" / "base"
# frames, height and width in patches; a window has 4 x 4 patches, so some are cut at the edges
PICTURES = [(1, 4, 4), (1, 10, 6), (1, 6, 10), (1, 4, 4), (2, 8, 6), (1, 2, 2), (3, 4, 10)]


def load_towers(recompute=False):
    """Our tower and transformers'."""
    from transformers import AutoModelForImageTextToText

    ours = load_policy(BASE, dtype=torch.float32, recompute=recompute).model
    theirs = AutoModelForImageTextToText.from_pretrained(BASE, dtype=torch.float32)
    if recompute:
        theirs.gradient_checkpointing_enable()
    return [model.base_model.visual.train() for model in (ours, theirs)]


def features_and_gradients(tower):
    """
    Of PICTURES with random pixels: the features, and gradients of pixels and weights, each divided
    by its largest number.
    """
    grids = torch.tensor(PICTURES)
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randn(int(grids.prod(1).sum()), 1176, generator=draw, requires_grad=True)
    features = tower(pixels, grids).pooler_output
    features.backward(torch.randn(features.shape, generator=draw))
    found = {name: parameter.grad for name, parameter in tower.named_parameters()}
    found |= {"features": features.detach(), "pixels": pixels.grad}
    return {name: tensor / tensor.abs().max() for name, tensor in found.items()}


def varlen_attn_in_a_loop(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale):
    """torch's varlen_attn, which runs on a GPU only, written out: (T, heads, D) tensors."""
    assert cu_seq_q.dtype == torch.int32
    assert max_q == max_k == cu_seq_q.diff().max()
    outputs = []
    for start, end in zip(cu_seq_q.tolist(), cu_seq_k[1:].tolist()):
        scores = torch.einsum("qhd,khd->hqk", query[start:end], key[start:end]) * scale
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[start:end]))
    return torch.cat(outputs)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_tower_gives_what_transformers_gives(recompute):
    ours, theirs = load_towers(recompute)
    assert ours.config._attn_implementation == "sdpa"  # on a CPU one call saves no time
    expected = features_and_gradients(theirs)
    torch.testing.assert_close(features_and_gradients(ours), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("recompute", [False, True])
def test_attention_in_one_call_is_attention_in_each_window(recompute, monkeypatch):
    monkeypatch.setattr(vision_tower, "varlen_attn", varlen_attn_in_a_loop)
    ours, theirs = load_towers(recompute)
    vision_tower.use_varlen_attention(ours)
    calls = []
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *_, **__: calls.append(1)
    )
    found = features_and_gradients(ours)
    assert not calls
    monkeypatch.undo()
    expected = features_and_gradients(theirs)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_the_one_call_is_one_that_torch_takes():
    """The shapes of its output and gradients; without a GPU torch computes nothing more of it."""
    parameters = inspect.signature(varlen_attn).parameters
    assert list(inspect.signature(varlen_attn_in_a_loop).parameters)[:-1] == list(parameters)[:7]
    assert parameters["scale"].kind == inspect.Parameter.KEYWORD_ONLY
    with FakeTensorMode():
        heads = [torch.randn(1, 16, 100, 80, requires_grad=True) for _ in range(3)]
        bounds = torch.tensor([0, 64, 100], dtype=torch.int32)
        output, _ = vision_tower.attend_within_windows(
            None, *heads, None, scaling=0.1, cu_seq_lens_q=bounds, max_length_q=64
        )
        assert output.shape == (1, 100, 16, 80)
        output.sum().backward()
        assert all(tensor.grad.shape == tensor.shape for tensor in heads)


def test_weights_keep_their_names_and_shapes(tmp_path):
    ours, theirs = load_towers()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), atol=0, rtol=0)
    vision_tower.use_varlen_attention(ours)
    ours.config.save_pretrained(tmp_path)
    assert vision_tower.VARLEN not in (tmp_path / "config.json").read_text()


def test_a_patch_with_a_bias():
    """As Qwen3-VL has it."""
    torch.manual_seed(0)
    convolution = torch.nn.Conv3d(3, 8, kernel_size=(2, 14, 14), stride=(2, 14, 14))
    patches = torch.randn(5, 3, 2, 14, 14)
    product = vision_tower.PatchProduct(convolution)
    assert product.bias is convolution.bias
    torch.testing.assert_close(product(patches), convolution(patches).flatten(1))
