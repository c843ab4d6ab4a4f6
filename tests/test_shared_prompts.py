"""
core/shared_prompts.py: samples of one prompt in one row have the log-probabilities, the gradients
and the scores that they have in a row each.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_policy import OTHER_QWENS, gradients, make_policy, make_samples

from bench import check_kernels, findings
from core import shared_prompts
from core.encoding import Sample, collate, load_processor
from core.policy import load_policy, token_logps
from core.shared_prompts import row_length, rows_of, rows_within
from core.training import row_batches

BASE = Path(__file__).resolve().parent.parent / "toy" / "base"
COUNTS = (9, 1, 20, 5)  # tokens of a prompt's responses


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Eight: with two images, one, a video, none; twice."""
    return make_samples(load_processor(BASE, 3136, 12544), tmp_path_factory.mktemp("pictures"))


def several_of(prompts):
    """Responses of several lengths to each prompt."""
    several = []
    for number, prompt in enumerate(prompts):
        for count in COUNTS[number % 2 :]:
            several.append(replace(prompt, response_ids=prompt.response_ids[:count]))
    return several


def alone(samples):
    """The same samples with a row for each."""
    return [replace(sample, prompt_ids=list(sample.prompt_ids)) for sample in samples]


def results(policy, samples):
    """Log-probabilities, entropies and the gradient of a sum of the former."""
    policy.zero_grad()
    logps, entropy = token_logps(policy, collate(samples, 0), entropy=True)
    weights = torch.linspace(-1, 1, logps.numel()).view(logps.shape)
    (logps * weights).sum().backward()
    return [logps, entropy, *gradients(policy)]


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        size = other.abs().max() or 1  # a tower that saw no picture has a gradient of 0
        torch.testing.assert_close(one / size, other / size, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("recompute", [False, True])
def test_one_row_gives_what_separate_rows_give(prompts, attn, recompute):
    policy = load_policy(BASE, dtype=torch.float32, attn=attn, recompute=recompute).train()
    several = several_of(prompts)
    assert len(collate(several, 0)["input_ids"]) == len(prompts)
    assert len(collate(alone(several), 0)["input_ids"]) == len(several)
    assert_same(results(policy, several), results(policy, alone(several)))


def test_a_batch_of_one_prompt_without_pictures(prompts):
    policy = load_policy(BASE, dtype=torch.float32)
    several = several_of(prompts[3:4])
    assert_same(results(policy, several), results(policy, alone(several)))


@pytest.mark.parametrize("family", OTHER_QWENS)
def test_the_other_qwens(prompts, family):
    config = load_policy(BASE, dtype=torch.float32).model.config
    policy = make_policy(family, config)
    several = several_of(prompts[:2] + prompts[3:4])
    assert_same(results(policy, several), results(policy, alone(several)))


def varlen_attn_in_a_loop(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options):
    """torch's varlen_attn, which runs on a GPU only, written out: (T, heads, D) tensors."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert max_q == cu_seq_q.diff().max() and max_k == cu_seq_k.diff().max()
    assert options["window_size"] == (-1, 0) and options["enable_gqa"]
    repeats = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(repeats, 1) for tensor in (key, value))
    queries, keys = cu_seq_q.tolist(), cu_seq_k.tolist()
    outputs = []
    for start, end, first, last in zip(queries, queries[1:], keys, keys[1:]):
        scores = torch.einsum("qhd,khd->hqk", query[start:end], key[first:last])
        visible = torch.ones(scores.shape[1:], dtype=torch.bool)
        visible = visible.tril(last - first - (end - start))  # the last query sees all keys
        scores = (scores * options["scale"]).masked_fill(~visible, -torch.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[first:last]))
    return torch.cat(outputs)


def test_the_attention_of_a_gpu_gives_what_separate_rows_give(prompts, monkeypatch):
    monkeypatch.setattr(shared_prompts, "varlen_attn", varlen_attn_in_a_loop)
    several = several_of(prompts)
    usual = load_policy(BASE, dtype=torch.float32)
    ours = load_policy(BASE, dtype=torch.float32)
    shared_prompts.use_varlen_attention(ours.model.base_model.language_model)
    found = results(ours, several)
    batch_alone = alone(several)
    assert_same(found, results(usual, batch_alone))
    assert_same(results(ours, batch_alone), results(usual, batch_alone))


def test_the_check_for_a_gpu_compares_the_same(monkeypatch):
    """bench/check_kernels.py, which on a GPU calls torch's kernel."""
    monkeypatch.setattr(shared_prompts, "varlen_attn", varlen_attn_in_a_loop)
    args = check_kernels.parser().parse_args(["--tokens", "64"])
    case = check_kernels.shared_prompts(args, torch.device("cpu"))
    assert check_kernels.compare("attention", *case).verdict == findings.OK


def test_a_head_reads_the_last_token_of_each_response(prompts):
    torch.manual_seed(0)
    policy = load_policy(BASE, head="critic", dtype=torch.float32).eval()
    several = several_of(prompts)
    with torch.no_grad():
        together = policy(collate(several, 0))["score"]
        apart = policy(collate(alone(several), 0))["score"]
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------------------
# Rows


def of_prompt(prompt_ids, *lengths):
    return [Sample(prompt_ids, [0] * len(prompt_ids), {}, response_ids=[7] * n) for n in lengths]


def test_rows_hold_neighbours_of_the_same_prompt():
    first, second = [1, 2, 3], [1, 2, 3]  # equal, but of two prompts: their pictures may differ
    samples = of_prompt(first, 2, 4) + of_prompt(second, 5) + of_prompt(first, 1)
    assert rows_of(samples) == [samples[:2], samples[2:3], samples[3:]]
    assert [row_length(row) for row in rows_of(samples)] == [9, 8, 4]


def test_a_row_of_several_samples_keeps_within_the_budget():
    samples = of_prompt([1, 2, 3], 2, 4, 3, 1, 20)
    rows = rows_within(samples, 10)
    assert [[len(sample.response_ids) for sample in row] for row in rows] == [[20], [4, 3], [2, 1]]


@pytest.mark.usefixtures("one_rank")
def test_micro_batches_count_the_tokens_there_are_now():
    """Two rows of 3 + 4 + 4 tokens fit into 22; in rows of their own four samples would take 28."""
    samples = of_prompt([1, 2, 3], 4, 4) + of_prompt([4, 5, 6], 4, 4)
    (batch,) = row_batches(samples, 22)
    assert collate(batch, 0)["input_ids"].numel() == 22
    assert [len(batch) for batch in row_batches(samples, 21)] == [2, 2]


def test_what_a_token_sees():
    batch = collate(of_prompt([1, 2], 2, 1) + of_prompt([3], 1), 0)
    expected = [[0, 0, 1, 1, 2], [0, 1, 2, 2, 2]]
    assert batch["response_number"].tolist() == expected
    assert batch["tokens_before"].tolist() == [[0, 0, 0, 0, 2], [0, 0, 1, 1, 1]]
    mask = shared_prompts.dense_mask(batch["response_number"], torch.float32)
    assert (mask[0, 0] == 0).int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
