"""
core/policy.py and toy/cpu.py on the toy's model: log-probabilities against all logits at once and
against transformers' own loss, pictures, positions, reward heads, what is saved.
"""

import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from core.encoding import MODEL_INPUTS, VISION_INPUTS, collate, encode, load_processor
from core.pairs import user_turn
from core.policy import LMHead, Policy, TokenLogps, load_policy, save_policy, token_logps
from toy import cpu

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "toy" / "base"
RESPONSE = "<think>Response 1 names the colour. Response 2 does not.</think><answer>1</answer>"


def save_picture(path, seed):
    """56 x 56 pixels in four random colours."""
    from PIL import Image

    colours = Image.frombytes("RGB", (2, 2), random.Random(seed).randbytes(12))
    colours.resize((56, 56), Image.Resampling.NEAREST).save(path)
    return str(path)


@pytest.fixture(scope="module")
def processor():
    return load_processor(BASE, 3136, 12544)


@pytest.fixture(scope="module")
def policy():
    return load_policy(BASE, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def samples(processor, tmp_path_factory):
    return make_samples(processor, tmp_path_factory.mktemp("pictures"))


def make_samples(processor, folder):
    """Two images, one image, a video, a text, each with a response of another length; twice."""
    pictures = [save_picture(folder / f"{seed}.png", seed) for seed in range(14)]
    found = []
    for half in (pictures[:7], pictures[7:]):
        prompts = [(half[:2], None), (half[2:3], None), ([], half[3:]), ([], None)]
        for images, video in prompts:
            response = RESPONSE[5 * len(found) :]
            found.append(encode(processor, user_turn(images, video, "Which is it?"), response))
    return found


def reference(policy, batch):
    """Log-probabilities and entropies (N,) through all logits at once."""
    inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    hidden = policy.model.base_model(**inputs, use_cache=False).last_hidden_state
    logits = hidden.flatten(0, 1)[batch["predict_from"]] @ policy.model.lm_head.weight.T
    log_probs = logits.log_softmax(-1)
    logps = log_probs.gather(1, batch["response_ids"][:, None])[:, 0]
    return logps, -(log_probs.exp() * log_probs).sum(-1)


def gradients(policy):
    return [parameter.grad.clone() for parameter in policy.parameters()]


# --------------------------------------------------------------------------------------------------
# Log-probabilities


def test_the_loss_is_transformers_own(policy, samples):
    from transformers import AutoModelForImageTextToText

    # without videos: see continue_after_videos
    samples = [sample for sample in samples if "pixel_values_videos" not in sample.vision]
    batch = collate(samples, 0)
    labels = torch.full_like(batch["input_ids"], -100)
    mask = torch.zeros_like(labels)
    for row, sample in enumerate(samples):
        mask[row, : sample.length] = 1
        start = len(sample.prompt_ids)
        labels[row, start : sample.length] = torch.tensor(sample.response_ids)
    inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    model = AutoModelForImageTextToText.from_pretrained(BASE, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(**inputs, attention_mask=mask, labels=labels).loss
        logps, _ = token_logps(policy, batch)
    loss = -logps.sum() / batch["response_mask"].sum()
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)


def test_chunks_give_what_all_logits_at_once_give(policy, samples, monkeypatch):
    """Log-probabilities, entropies, and the gradient of every parameter."""
    monkeypatch.setattr(TokenLogps, "CHUNK", 20 * 704)  # 20 tokens
    batch = collate(samples, 0)
    mask = batch["response_mask"]
    assert mask.sum() > 5 * 20
    weights = torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)) - 0.5
    weights = weights[mask]  # of both signs, as advantages are
    policy.zero_grad()
    logps, entropy = token_logps(policy, batch, entropy=True)
    assert logps.dtype == entropy.dtype == torch.float32
    assert logps[~mask].abs().sum() == 0
    assert not entropy.requires_grad
    (logps[mask] * weights).sum().backward()
    ours = [logps[mask], entropy[mask], *gradients(policy)]
    policy.zero_grad()
    logps, entropy = reference(policy, batch)
    (logps * weights).sum().backward()
    torch.testing.assert_close(ours, [logps, entropy, *gradients(policy)], atol=2e-5, rtol=1e-4)


def test_a_second_backward_gives_the_gradient_again():
    """The first one uses up the softmax that was kept for it."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 8, generator=draw, requires_grad=True)
    weight = torch.randn(20, 8, generator=draw, requires_grad=True)
    logps, _ = TokenLogps.apply(hidden, weight, torch.arange(5), False)
    first = torch.autograd.grad(logps.sum(), (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(logps.sum(), (hidden, weight))
    direct = (hidden @ weight.T).log_softmax(-1).diagonal().sum()
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(first, torch.autograd.grad(direct, (hidden, weight)))


@pytest.mark.parametrize("with_entropy", [False, True])
def test_large_logits_give_numbers(with_entropy, monkeypatch):
    """Logits of 10,000, whose exponential no float holds."""
    monkeypatch.setattr(TokenLogps, "CHUNK", 3)  # a token at a time: the backward computes anew
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.9999]], requires_grad=True)
    logps, entropy = TokenLogps.apply(hidden, weight, torch.tensor([2, 0]), with_entropy)
    logps.sum().backward()
    direct = (hidden.double() @ weight.double().T).log_softmax(-1)
    torch.testing.assert_close(logps.double(), direct[[0, 1], [2, 0]], atol=1e-2, rtol=1e-6)
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()
    if with_entropy:
        expected = -(direct.exp() * direct).sum(-1)
        torch.testing.assert_close(entropy.double(), expected, atol=1e-2, rtol=0)


def test_a_sample_has_the_same_log_probabilities_alone_and_in_any_company(policy, samples):
    """Padding and neighbours change nothing, neither does the dummy picture of a text."""
    with torch.no_grad():
        together, _ = token_logps(policy, collate(samples, 0))
        reversed_order, _ = token_logps(policy, collate(samples[::-1], 0))
        torch.testing.assert_close(reversed_order.flip(0), together, atol=2e-5, rtol=1e-5)
        for row, sample in zip(together, samples):
            alone, _ = token_logps(policy, collate([sample], 0))
            count = len(sample.response_ids)
            torch.testing.assert_close(row[:count], alone[0], atol=2e-5, rtol=1e-5)


def test_attention_is_causal_and_has_no_mask_though_rows_are_padded(policy, samples, monkeypatch):
    """With a mask, torch's kernels read all of T x T, and the fastest one of a GPU takes none."""
    attend = torch.nn.functional.scaled_dot_product_attention
    of_text = []

    def watch(query, key, value, attn_mask=None, is_causal=False, **options):
        if len(query) == len(samples):
            of_text.append((attn_mask, is_causal))
        return attend(query, key, value, attn_mask=attn_mask, is_causal=is_causal, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    assert len({sample.length for sample in samples}) > 1
    token_logps(policy, collate(samples, 0))
    assert set(of_text) == {(None, True)}


# --------------------------------------------------------------------------------------------------
# Pictures


def test_the_tower_sees_a_picture_of_several_samples_once(policy, samples):
    """
    Of samples whose prompts differ, as the two orders of a pair: same log-probabilities and
    gradient as with a copy of the pictures for every sample.
    """
    shared = []
    for sample in samples:
        for count in (9, 5, 7):
            response_ids = sample.response_ids[:count]
            prompt_ids = list(sample.prompt_ids)
            shared.append(
                dataclasses.replace(sample, prompt_ids=prompt_ids, response_ids=response_ids)
            )
    copied = [dataclasses.replace(sample, vision=dict(sample.vision)) for sample in shared]
    patches, results = [], []
    visual = policy.model.base_model.visual
    hook = visual.register_forward_pre_hook(lambda _, inputs: patches.append(len(inputs[0])))
    for batch in (collate(shared, 0), collate(copied, 0)):
        policy.zero_grad()
        logps, _ = token_logps(policy, batch)
        (logps * torch.arange(len(logps))[:, None]).sum().backward()
        results.append([logps, *gradients(policy)])
    hook.remove()
    assert patches == [patches[0], 3 * patches[0]]
    torch.testing.assert_close(*results, atol=2e-5, rtol=1e-4)


def test_log_probabilities_depend_on_pixels_and_on_positions_in_the_picture(policy, samples):
    """The authors' update never saw a picture, and counted positions in one dimension."""
    sample = samples[0]
    grey = sample.vision | {"pixel_values": sample.vision["pixel_values"] * 0}
    batch = collate([sample], 0)
    without_types = {name: batch[name] for name in batch if name != "mm_token_type_ids"}
    with torch.no_grad():
        seen, _ = token_logps(policy, batch)
        blank, _ = token_logps(policy, collate([dataclasses.replace(sample, vision=grey)], 0))
        flat, _ = token_logps(policy, without_types)
    assert (seen - blank).abs().max() > 1e-3
    assert (seen - flat).abs().max() > 1e-3


def test_text_continues_after_the_last_position_of_a_video(policy, samples):
    """
    Four frames are two grids of 2 x 2 tokens, a second apart, at 4 positions a second: the times
    are s and s + 4, so the text continues at s + 5.
    """
    video, text = samples[2], samples[3]
    assert video.vision["video_grid_thw"].tolist() == [[2, 4, 4]]
    assert video.vision["second_per_grid_ts"].tolist() == [1.0]
    start = video.token_types.index(2)
    expected = [
        [*range(start), *[start] * 4, *[start + 4] * 4],
        [*range(start), *[start, start, start + 1, start + 1] * 2],
        [*range(start), *[start, start + 1] * 4],
    ]
    after = list(range(start + 5, start + 5 + video.length - start - 8))
    expected = torch.tensor([[*positions, *after] for positions in expected])
    names = ("video_grid_thw", "second_per_grid_ts")
    rope_index = policy.model.base_model.get_rope_index

    batch = collate([text, video], 0)
    grids = {name: batch[name] for name in names}
    positions, _ = rope_index(batch["input_ids"], batch["mm_token_type_ids"], **grids)
    assert torch.equal(positions[:, 1, : video.length], expected)
    assert torch.equal(positions[0, 0, : text.length], torch.arange(text.length))

    batch = collate([text, video], 0, left=True)  # to generate from
    positions, deltas = rope_index(
        batch["input_ids"],
        batch["mm_token_type_ids"],
        attention_mask=batch["attention_mask"],
        **grids,
    )
    assert torch.equal(positions[:, 1, -video.length :], expected)
    assert deltas.flatten().tolist() == [0, -3]  # 8 tokens took 5 positions


def test_every_batch_gives_every_parameter_a_gradient(policy, samples):
    """Ranks with nothing left, or with texts alone, take part in every reduction."""
    for some in ([], [samples[3]]):
        batch = collate(some, 0)
        assert not set(batch) & set(VISION_INPUTS)
        policy.zero_grad()
        logps, _ = token_logps(policy, batch)
        assert len(logps) == len(some)
        logps.sum().backward()
        assert all(parameter.grad is not None for parameter in policy.parameters())
        size = sum(gradient.abs().sum() for gradient in gradients(policy))
        assert (size > 0) == bool(some)


OTHER_QWENS = ["qwen2_vl", "qwen3_vl"]


def make_policy(family, ours):
    """A policy of another class of model in a tiny shape, with the tokens of the config `ours`."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
    names = [*names.split(), "num_key_value_heads", "rope_parameters"]
    text = {name: getattr(ours.text_config, name) for name in names}
    text["tie_word_embeddings"] = True
    vision = {
        "depth": 2,
        "hidden_size": 128 if family == "qwen2_vl" else 64,
        "embed_dim": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "out_hidden_size": 128,
        "patch_size": 14,
        "deepstack_visual_indexes": [0, 1],
    }
    if family == "qwen3_vl":
        text["head_dim"] = 32
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = AutoConfig.for_model(
        family,
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        **{name: getattr(ours, name) for name in ids},
    )
    torch.manual_seed(0)
    return Policy(AutoModelForImageTextToText.from_config(config)).eval()


@pytest.mark.parametrize("family", OTHER_QWENS)
def test_the_other_qwens(family, policy, samples):
    """As by all logits, and every parameter has a gradient."""
    other = make_policy(family, policy.model.config)
    for some in (samples[:2], [samples[3]]):
        batch = collate(some, 0)
        other.zero_grad()
        logps, _ = token_logps(other, batch)
        logps = logps[batch["response_mask"]]
        torch.testing.assert_close(logps, reference(other, batch)[0], atol=1e-5, rtol=1e-5)
        logps.sum().backward()
        assert all(parameter.grad is not None for parameter in other.parameters())


# --------------------------------------------------------------------------------------------------
# Reward heads, saving


def test_a_reward_head_reads_the_last_token_of_each_response(samples):
    torch.manual_seed(0)
    policy = load_policy(BASE, "critic", torch.float32).eval()
    with torch.no_grad():
        output = policy(collate(samples, 0))
        before = []
        for score, sample in zip(output["score"], samples):
            batch = collate([sample], 0)
            inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
            hidden = policy.model.base_model(**inputs, use_cache=False).last_hidden_state[0]
            torch.testing.assert_close(score, policy.head(hidden[-1])[0], atol=1e-5, rtol=1e-4)
            before.append(score - policy.head(hidden[-2])[0])
    assert torch.stack(before).abs().min() > 1e-3  # the token before would give another score
    assert output["logps"].shape == collate(samples, 0)["response_mask"].shape


def test_a_scalar_head_takes_the_place_of_the_lm_head(samples):
    policy = load_policy(BASE, "scalar", torch.float32)
    output = policy(collate(samples, 0), entropy=True)
    assert output["score"].shape == (len(samples),)
    assert output["logps"] is None
    assert output["entropy"] is None


@pytest.mark.parametrize("head", [None, "scalar"])
def test_what_is_saved_comes_back(head, processor, tmp_path):
    policy = load_policy(BASE, head, torch.float32)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.01
    save_policy(policy, processor, tmp_path)
    again = load_policy(tmp_path, dtype=torch.float32)
    assert again.head_kind == head
    torch.testing.assert_close(again.state_dict(), policy.state_dict(), atol=0, rtol=0)
    assert not (tmp_path / "part").exists()
    assert (tmp_path / "reward_head").exists() == bool(head)
    assert load_processor(tmp_path).image_processor.size["longest_edge"] == 12544


def test_a_saved_model_does_not_say_how_to_sample(processor, tmp_path):
    """Its base does, as Qwen2.5-VL does, and a server would go by it."""
    name = "generation_config.json"
    of_base = json.loads((BASE / name).read_text())
    assert of_base["top_k"] == 1 and of_base["repetition_penalty"] == 1.05
    save_policy(load_policy(BASE), processor, tmp_path)
    saved = json.loads((tmp_path / name).read_text())
    assert saved.keys() == {"eos_token_id", "pad_token_id", "transformers_version"}
    assert saved["eos_token_id"] == of_base["eos_token_id"]
    assert saved["pad_token_id"] == of_base["pad_token_id"]


def test_a_frozen_tower_has_no_gradient(samples):
    policy = load_policy(BASE, dtype=torch.float32, freeze_vision=True)
    token_logps(policy, collate(samples, 0))[0].sum().backward()
    for name, parameter in policy.named_parameters():
        assert (parameter.grad is None) == ("visual" in name), name


# --------------------------------------------------------------------------------------------------
# What makes a CPU faster


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_the_onednn_product_is_the_matrix_product(with_bias, frozen):
    """Values and gradients, whichever input has none."""
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(3, 5, 8, generator=draw), torch.randn(6, 8, generator=draw)]
    if with_bias:
        inputs.append(torch.randn(6, generator=draw))
    for number, tensor in enumerate(inputs):
        tensor.requires_grad_(number != frozen)
    leaves = [tensor for tensor in inputs if tensor.requires_grad]
    grad = torch.randn(3, 5, 6, generator=draw)
    ours = cpu.product_with_gradient(*inputs)
    direct = torch.nn.functional.linear(*inputs)
    torch.testing.assert_close(ours, direct, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(ours, leaves, grad),
        torch.autograd.grad(direct, leaves, grad),
        atol=1e-5,
        rtol=1e-5,
    )


def test_a_policy_that_was_sped_up_gives_the_same(policy, samples, monkeypatch):
    monkeypatch.setattr(TokenLogps, "linear", TokenLogps.linear)  # put back afterwards
    fast = load_policy(BASE, dtype=torch.float32).eval()
    cpu.speed_up_policy(fast)
    linear = {type(m) for m in fast.model.modules() if isinstance(m, (torch.nn.Linear, LMHead))}
    assert linear == {cpu.OneDNNLinear, LMHead}
    batch = collate(samples, 0)
    results = []
    for each in (fast, policy):
        each.zero_grad()
        logps, _ = token_logps(each, batch)
        logps.mean().backward()
        results.append([logps, *gradients(each)])
    torch.testing.assert_close(*results, atol=2e-5, rtol=1e-4)


@pytest.mark.slow
def test_freed_memory_is_not_given_back_to_the_system():
    """Else its pages would be cleared again for the next tensors: 585,000 page faults."""
    program = ROOT / "tests" / "programs" / "count_page_faults.py"
    done = subprocess.run([sys.executable, program], cwd=ROOT, capture_output=True, text=True)
    assert int(done.stdout) < 100_000, done
