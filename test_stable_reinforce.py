"""
The mathematics of stable_reinforce.py, in seconds on a CPU: the paper's numbers as literals, slow independent versions
of every formula (python floats and loops), invariances, gradients, and the faults of the released code.

$ python -m pytest test_stable_reinforce.py
"""
import doctest
import itertools
import math
import pickle
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import stable_reinforce as sr
from stable_reinforce import advantages, final_reward, group_advantages, parse, parse_consistency, policy_loss, pre_clip

GOOD = "<think>Response 2 is better.</think><answer>2</answer>"


def batch(B=6, T=5, seed=0, spread=1.0, dtype=torch.float64):
    """Random log-probabilities, advantages and a ragged mask; the first judgement is full, the last has one token."""
    g = torch.Generator().manual_seed(seed)
    logp_old = -torch.rand(B, T, generator=g, dtype=dtype) - 0.1
    logp = logp_old + spread * torch.randn(B, T, generator=g, dtype=dtype)
    adv = torch.randn(B, generator=g, dtype=dtype)
    lengths = torch.linspace(T, 1, B).long()
    mask = (torch.arange(T) < lengths[:, None]).to(dtype)
    return logp, logp_old, adv, mask


def gradient(loss_fn, logp, *rest, **options):
    logp = logp.clone().requires_grad_()
    loss, _ = loss_fn(logp, *rest, **options)
    loss.backward()
    return loss.detach(), logp.grad


def test_every_public_function_has_an_example_and_every_example_is_true():
    for name, f in vars(sr).items():
        if callable(f) and getattr(f, "__module__", "") == "stable_reinforce" and not name.startswith("_") and name != "Verdict":
            assert ">>>" in (f.__doc__ or ""), f"{name} has no example"
    found = doctest.testmod(sr)
    assert found.attempted > 30 and found.failed == 0


# ---------------------------------------------------------------------------------------------------
# verdicts


@pytest.mark.parametrize("text, choice, think, well_formed", [
    (GOOD, 2, "Response 2 is better.", True),
    (" \n<think>a\nb</think>\n\n<answer> 1 </answer>\t", 1, "a\nb", True),
    ("<think></think><answer>1</answer>", 1, "", True),  # an empty thought is a block: consistency is what punishes it
    ("<think>a</think>x<answer>1</answer>", 1, "a", False),
    ("x<think>a</think><answer>1</answer>", 1, "a", False),
    ("<think>a</think><answer>1</answer>.", 1, "a", False),
    ("<answer>1</answer>", 1, "", False),
    ("<answer>1</answer><think>a</think>", None, "a", False),  # decided first, thought later: no verdict
    ("<think>say <answer>1</answer> or so</think>", None, "say <answer>1</answer> or so", False),
    ("<think>a</think><answer>1</answer><answer>2</answer>", 2, "a", False),  # the last block decides
    ("<think>a</think><answer>1/2</answer>", None, "a", False),
    ("<think>a</think><answer>12</answer>", None, "a", False),
    ("<think>a</think><answer>1.0</answer>", None, "a", False),
    ("<think>a</think><answer>Response 1</answer>", None, "a", False),
    ("<think>a</think><answer>3</answer>", None, "a", False),
    ("<think>a</think><answer></answer>", None, "a", False),
    ("<think>a</think><answer>１</answer>", None, "a", False),  # full-width digit
    ("<think>a</think><answer>²</answer>", None, "a", False),
    ("<think>a</think><answer>١</answer>", None, "a", False),  # Arabic-Indic digit
    ("<think>a</think><answer><answer>1</answer></answer>", None, "a", False),
    ("<think>a<think>b</think>c</think><answer>1</answer>", 1, "a<think>b</think>c", False),
    ("<think>a</think><think>b</think><answer>1</answer>", 1, "a</think><think>b", False),
    ("</think><think><answer>1</answer>", 1, "", False),
    ("<think>a</think><answer>1", None, "a", False),  # truncated
    ("<think>a", None, "", False),
    ("<THINK>a</THINK><ANSWER>1</ANSWER>", None, "", False),
    ("</answer>1<answer>", None, "", False),
    ("1", None, "", False),
    ("", None, "", False),
    ("\x00\ud800<answer>1</answer>", 1, "", False),  # a NUL, half a surrogate pair
])
def test_parse_table(text, choice, think, well_formed):
    assert parse(text) == (choice, think, well_formed)
    assert (parse(text).choice, parse(text).think, parse(text).well_formed) == (choice, think, well_formed)
    assert repr(sr.format_reward(text)) == ("1.0" if well_formed else "0.0")  # a float, not a bool
    assert [sr.result_reward(text, c) for c in (1, 2)] == [1.0 if choice == c else 0.0 for c in (1, 2)]


def slow_parse(text):
    """The same rules by walking over a list of tags and the text between them, one character at a time."""
    pieces, rest = [], ""
    i = 0
    while i < len(text):
        tag = next((t for t in sr.TAGS if text.startswith(t, i)), None)
        if tag:
            pieces += [rest, tag]
            rest, i = "", i + len(tag)
        else:
            rest, i = rest + text[i], i + 1
    pieces.append(rest)  # text, tag, text, tag, ..., text
    tags = pieces[1::2]
    closes = [k for k, t in enumerate(tags) if t == "</answer>"]
    choice = None
    if closes and closes[-1] > 0 and tags[closes[-1] - 1] == "<answer>" and "</think>" not in tags[closes[-1]:]:
        choice = {"1": 1, "2": 2}.get(pieces[2 * closes[-1]].strip())
    well_formed = tags == list(sr.TAGS) and choice is not None and not (pieces[0] + pieces[4] + pieces[8]).strip()
    opens, ends = [k for k, t in enumerate(tags) if t == "<think>"], [k for k, t in enumerate(tags) if t == "</think>"]
    think = "".join(pieces[2 * opens[0] + 2:2 * ends[-1] + 1]) if opens and ends and opens[0] < ends[-1] else ""
    return choice, think, well_formed


def test_parse_fuzz_against_the_slow_version():
    rng = random.Random(0)
    bits = list(sr.TAGS) * 3 + ["1", "2", " ", "\n", "12", "<", "think>", "answer>", "</", "x", "１", "is better", " ", ""]
    seen = {"well": 0, 1: 0, 2: 0, None: 0}
    for _ in range(20000):
        if rng.random() < 0.3:  # near the format: one mutation of a good text
            parts = ["<think>", "a", "</think>", rng.choice(["", "\n"]), "<answer>", rng.choice("12"), "</answer>"]
            for _ in range(rng.randrange(2)):
                parts[rng.randrange(len(parts))] = rng.choice(bits)
            text = "".join(parts)
        else:
            text = "".join(rng.choice(bits) for _ in range(rng.randrange(12)))
        assert parse(text) == slow_parse(text), text
        seen[parse(text).choice] += 1
        seen["well"] += parse(text).well_formed
    assert min(seen.values()) > 300, seen  # the fuzz reaches every outcome


@pytest.mark.parametrize("bit", ["<think>", "</think>", "<answer>", "</answer>", "<answer>1", "</think> ", " ", "<", "\ud800", "1",
                                 "<answer>1</answer>", "<think></think>", "no ", "_", "0"])
def test_parse_is_linear_a_megabyte_of_garbage_takes_no_time(bit):
    for size, seconds in ((2**15, 0.5), (2**20, 2)):  # the small one first: quadratic fails there, and does not hang
        text = bit * (size // len(bit))
        start = time.perf_counter()
        for shape in (text, f"<think>{text}</think><answer>1</answer>", GOOD + text, text + GOOD, f"<think>{text}</think>{text}"):
            assert parse(shape).choice in (1, 2, None)
            parse_consistency(shape)
            parse_consistency(f"yes{shape}")
        assert time.perf_counter() - start < seconds


@pytest.mark.parametrize("reply, agrees", [
    ("yes", 1), ("Yes.", 1), ("  **YES**, both name Response 2", 1), ("<answer>yes</answer>", None), ("1", 1), ("1.", 1), ("__1__", 1),
    ("no", 0), ("No: 1 against 2", 0), ("0", 0), (" 0\n", 0),
    ("10", None), ("1/0", None), ("1 or 0", None), ("01", None), ("not sure", None), ("yesterday", None), ("nothing", None),
    ("yes/no", None), ("Yes/No: No", None), ("yes or no? No", None), ("Yes and no", None), ("Yes. No contradiction here.", 1),
    ("No / yes", None), ("No inconsistency: both say 2", 0),  # the first word decides: never a reward by mistake
    ("The verdict is 0", None), ("I would say yes", None), ("１", None), ("٠", None), ("", None), ("   ", None), (None, None), ("{}", None),
])
def test_parse_consistency_table(reply, agrees):
    assert parse_consistency(reply) == agrees
    assert sr.consistency_reward(reply) == (1.0 if agrees == 1 else 0.0)


def test_a_verdict_survives_a_process_pool():
    verdict = pickle.loads(pickle.dumps(parse(GOOD)))
    assert verdict == parse(GOOD) and verdict.choice == 2 and type(verdict) is sr.Verdict


def test_a_zero_somewhere_in_the_judges_reply_is_not_disagreement():
    """Released code: `"0" in reply` is a mismatch, so an agreeing judge that quotes a number is turned round."""
    assert parse_consistency("Yes, it counts 10 cars and concludes with Response 1") == 1


def test_an_unparsable_judge_or_judgement_never_earns():
    """Released code: an exception in the result verifier earns 1.0."""
    for text in ("", "<answer>", "<answer>nan</answer>", "<answer>2/1</answer>", "\x00" * 100, GOOD[:-1]):
        assert sr.result_reward(text, 1) == sr.result_reward(text, 2) == sr.format_reward(text) == 0.0
    for reply in (None, "", "Error code: 500", "<html>", "maybe", "I cannot help with that"):
        assert sr.consistency_reward(reply) == 0.0


@pytest.mark.parametrize("choice", [0, 3, None, "1", -1])
def test_result_reward_refuses_an_illegal_label(choice):
    with pytest.raises(ValueError, match="legal: 1 or 2"):
        sr.result_reward(GOOD, choice)


# ---------------------------------------------------------------------------------------------------
# rewards


@pytest.mark.parametrize("result, consistency, format, gated, external", [
    (0, 0, 0, 0.0, 0.0), (0, 0, 1, 0.5, 0.5), (0, 1, 0, 0.0, 0.5), (0, 1, 1, 0.5, 1.0),
    (1, 0, 0, 1.0, 1.0), (1, 0, 1, 1.5, 1.5), (1, 1, 0, 1.5, 1.5), (1, 1, 1, 2.0, 2.0),
])
def test_final_reward_on_all_eight(result, consistency, format, gated, external):
    assert final_reward(result, consistency, format) == gated  # Eq. 2
    assert final_reward(result, consistency, format, form="external") == external  # Eq. 1
    t = [torch.tensor([float(x)]) for x in (result, consistency, format)]
    assert final_reward(*t).tolist() == [gated] and final_reward(*t, form="external").tolist() == [external]


def test_final_reward_weight_is_lambda_and_only_of_consistency():
    assert final_reward(1.0, 1.0, 1.0, weight=0.1) == pytest.approx(1.6) and final_reward(1.0, 1.0, 1.0, weight=1.0) == 2.5
    assert final_reward(1.0, 1.0, 0.0, weight=0.0) == 1.0 == final_reward(1.0, 1.0, 0.0, weight=0.0, form="external")
    assert final_reward(0.0, 1.0, 0.0, weight=1.0, form="external") == 1.0
    assert final_reward(0.0, 0.0, 1.0, weight=1.0, form="external") == 0.5
    assert final_reward(0.0, 0.0, 1.0, weight=1.0) == 0.5
    with pytest.raises(ValueError, match="gated"):
        final_reward(1.0, 1.0, 1.0, form="inside")


@pytest.mark.parametrize("judge", [-1.0, 0.0, 0.25, 1.0, 7.0])
def test_gated_a_wrong_verdict_earns_the_same_whatever_the_judge_says(judge):
    assert final_reward(0.0, judge, 1.0) == 0.5 and final_reward(0.0, judge, 0.0) == 0.0


def test_right_but_inconsistent_earns_1_not_one_half():
    """Released code: consistency is -1 there, so result * (1 - 0.5) = 0.5 and with the format 1.0; Eq. 2 gives 1.5."""
    assert final_reward(1.0, sr.consistency_reward("no"), 1.0) == 1.5


# ---------------------------------------------------------------------------------------------------
# advantages


def slow_advantages(rewards, sigma=3.0):
    mu, std = statistics.fmean(rewards), statistics.pstdev(rewards)
    z = [(r - mu) / (std + 1e-8) for r in rewards]
    return [a if sigma is None or abs(a) <= sigma else 0.0 for a in z]


def test_advantages_by_hand():
    """Rewards 2, 1.5, .5, 0: mean 1, deviations 1 .5 -.5 -1, population variance 2.5 / 4, std .790569."""
    adv, kept = advantages(torch.tensor([2, 1.5, 0.5, 0], dtype=torch.float64))
    torch.testing.assert_close(adv, torch.tensor([1.264911, 0.632456, -0.632456, -1.264911], dtype=torch.float64), atol=1e-6, rtol=0)
    assert kept.all()
    adv, _ = advantages(torch.tensor([2, 1.5, 0.5, 0], dtype=torch.float64), sigma=None, scale=False)
    assert adv.tolist() == [1, 0.5, -0.5, -1]


def test_the_papers_batch_of_255_to_1():
    """Section 2.1: mean 255/256, population std sqrt(255)/256, so -255 / sqrt(255) = -sqrt(255) = -15.9687 (printed -15.96)."""
    rewards = torch.tensor([1.0] * 255 + [0.0], dtype=torch.float64)
    adv, kept = advantages(rewards, sigma=None)
    assert adv[-1].item() == pytest.approx(-math.sqrt(255), abs=1e-5) and math.trunc(adv[-1].item() * 100) == -1596
    assert adv[0].item() == pytest.approx(1 / math.sqrt(255), abs=1e-6) and kept.all()
    filtered, kept = advantages(rewards)
    assert filtered[-1] == 0 and kept.sum() == 255 and not kept[-1]
    assert torch.equal(filtered[:255], adv[:255])  # the statistics are those of the whole batch, the failure included


def test_the_bound_is_3_in_standardised_units_and_3_itself_stays():
    """n - 1 rewards of 1 and one of 0: the lone one is at -sqrt(n - 1). Ten: exactly -3, kept. Eleven: -3.162, filtered."""
    for n, stays in ((9, True), (10, True), (11, False), (12, False)):
        for lone in (0.0, 1.0):  # a lone failure, a lone success
            rewards = torch.full((n,), 1 - lone)
            rewards[3] = lone
            adv, kept = advantages(rewards)
            assert kept[3].item() is stays and (adv[3] != 0).item() is stays and kept.sum() == n - (not stays)
    adv, kept = advantages(torch.tensor([1.0] * 11 + [0]), sigma=4)
    assert kept.all() and adv.min() == pytest.approx(-math.sqrt(11), abs=1e-4)
    for n, stays in ((20, True), (21, False)):  # two failures of n are at -sqrt(n / 2 - 1): exactly -3, and -3.082
        assert advantages(torch.tensor([1.0] * (n - 2) + [0, 0]))[1].all().item() is stays
    adv, _ = advantages(torch.tensor([1.0, 0, 0], dtype=torch.float64), sigma=None)
    assert advantages(torch.tensor([1.0, 0, 0], dtype=torch.float64), sigma=adv[0].item())[1].all()  # at the bound itself, to the last bit


def test_one_wrong_judgement_of_eight_survives_the_filter():
    """
    Rewards 2 x7 and 0: mean 1.75, A = .378 x7 and -2.646. Released code compares A with raw mean +- 3 = -1.25..4.75 and
    drops the only negative signal of the batch.
    """
    adv, kept = advantages(torch.tensor([2.0] * 7 + [0]))
    assert kept.all()
    torch.testing.assert_close(adv, torch.tensor([0.37796] * 7 + [-2.64575]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", range(8))
def test_advantages_against_the_slow_version(seed):
    rng = random.Random(seed)
    rewards = [rng.choice([0, 0.5, 1, 1.5, 2]) if rng.random() < 0.2 else 2.0 for _ in range(rng.randrange(2, 200))]
    for sigma in (3.0, 1.0, None):
        adv, kept = advantages(torch.tensor(rewards, dtype=torch.float64), sigma)
        slow = slow_advantages(rewards, sigma)
        torch.testing.assert_close(adv, torch.tensor(slow, dtype=torch.float64), atol=1e-9, rtol=1e-9)
        assert [bool(k) for k in kept] == [abs(a) <= (sigma or math.inf) for a in slow_advantages(rewards, None)]


def test_advantages_ignore_shift_scale_and_order():
    rewards = torch.rand(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    adv, kept = advantages(rewards, 1.5)
    assert 0 < kept.sum() < 50  # the filter acts here
    torch.testing.assert_close(advantages(rewards * 40 - 7, 1.5)[0], adv, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(advantages(-rewards, 1.5)[0], -adv, atol=1e-9, rtol=0)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(advantages(rewards[order], 1.5)[0], adv[order], atol=1e-12, rtol=0)


@pytest.mark.parametrize("value", [0.0, 0.1, 1.0, 1 / 3, 2.0, 1e6 + 0.1])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 255, 1000])
def test_equal_rewards_give_exactly_zero(value, n):
    """0.1 + 0.1 + 0.1 is not 0.3: a mean off by one rounding, divided by a std of 0 + 1e-8, must still be exactly 0."""
    for dtype in (torch.float32, torch.float64):
        adv, kept = advantages(torch.full((n,), value, dtype=dtype))
        assert (adv == 0).all() and kept.all() and adv.dtype == dtype and adv.shape == (n,)


def test_advantages_of_nothing_and_of_integers():
    adv, kept = advantages(torch.tensor([]))
    assert adv.shape == kept.shape == (0,)
    adv, kept = advantages(torch.ones(2, 3), mask=torch.zeros(2, 3))
    assert (adv == 0).all() and kept.all()
    assert advantages(torch.tensor([1, 0, 0, 1]))[0].tolist() == [1, -1, -1, 1]
    assert advantages(torch.tensor([1.0, 0], dtype=torch.bfloat16))[0].dtype == torch.float32


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_raises_and_names_its_row(bad):
    """Released code turns such advantages into 0 in silence."""
    with pytest.raises(ValueError, match=r"rows \[\[2\]\]"):
        advantages(torch.tensor([1.0, 0.0, bad]))
    with pytest.raises(ValueError, match=r"rows \[\[0\], (\[\d\], ){6}\[7\]\] here"):  # the first eight of many
        advantages(torch.full((20,), bad))
    with pytest.raises(ValueError, match=r"rows \[\[1\]\]"):
        group_advantages(torch.tensor([1.0, bad]), torch.tensor([0, 0]))


@pytest.mark.parametrize("sigma, scale", [(0, True), (-3, True), (3.0, False)])
def test_advantages_refuse_a_sigma_without_meaning(sigma, scale):
    with pytest.raises(ValueError, match="legal"):
        advantages(torch.tensor([1.0, 0]), sigma=sigma, scale=scale)


def test_token_level_advantages_look_at_response_tokens_only():
    """Reinforce++ with KL in the reward: R_t = r - beta * KL from t on, standardised over all response tokens."""
    _, _, rewards, mask = batch()
    for seed in range(20):  # padding is exactly 0, although the mean of the rest is rounded
        assert (advantages(torch.randn(6, 5, generator=torch.Generator().manual_seed(seed)) + 0.1, mask=mask)[0][~mask.bool()] == 0).all()
    live = torch.ones(6, 5, requires_grad=True)
    assert not sr.returns_to_go(rewards, live, mask, 0.1).requires_grad  # the penalty is a reward, not a loss
    kl = torch.rand(mask.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    returns = sr.returns_to_go(rewards, torch.where(mask.bool(), kl, math.nan), mask, beta=0.3)
    flat = []
    for i, t in itertools.product(*map(range, mask.shape)):
        if mask[i, t]:
            flat.append(rewards[i].item() - 0.3 * sum(kl[i, u].item() for u in range(t, mask.shape[1]) if mask[i, u]))
            assert returns[i, t].item() == pytest.approx(flat[-1])
    assert (returns[~mask.bool()] == 0).all()
    adv, kept = advantages(torch.where(mask.bool(), returns, math.nan), sigma=1.2, mask=mask)
    torch.testing.assert_close(adv[mask.bool()], torch.tensor(slow_advantages(flat, 1.2), dtype=torch.float64), atol=1e-9, rtol=0)
    assert (adv[~mask.bool()] == 0).all() and not kept.all() and kept[~mask.bool()].all()


RANK = """
import sys, torch, torch.distributed as dist
from stable_reinforce import advantages
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
def reduce(sums):
    dist.all_reduce(sums)
    return sums
rewards = torch.rand(256, generator=torch.Generator().manual_seed(5), dtype=torch.float64).round(decimals=1)
rewards[200] = -40
for cut in (0, 5, 128, 256):  # 0 and 256: one of the ranks has nothing
    part = slice(0, cut) if rank == 0 else slice(cut, None)
    (adv, kept), (whole, whole_kept) = advantages(rewards[part], 3.0, reduce), advantages(rewards, 3.0)
    torch.testing.assert_close(adv, whole[part], atol=1e-13, rtol=1e-13)
    assert torch.equal(kept, whole_kept[part]) and whole_kept.sum() == 255
    if rank == 0 and cut == 5:
        assert not torch.allclose(adv, advantages(rewards[part], 3.0)[0])  # without reduce it is another number
assert (advantages(torch.full((3 + rank,), .1), 3.0, reduce)[0] == 0).all()
try:
    advantages(torch.tensor([1., float("nan")] if rank == 1 else [1., 0.]), 3.0, reduce)
except ValueError as error:
    assert ("rows [[1]] here" if rank == 1 else "another rank") in str(error), error
    print("rank", rank, "fine")
dist.barrier()
dist.destroy_process_group()
"""


def test_advantages_are_the_same_on_two_real_ranks(tmp_path):
    command = [sys.executable, "-c", RANK]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              text=True, cwd=Path(__file__).parent) for rank in (0, 1)]
    try:
        for rank, process in enumerate(ranks):
            out, err = process.communicate(timeout=60)
            assert process.returncode == 0 and out == f"rank {rank} fine\n", err
    finally:
        for process in ranks:  # a rank that failed leaves the other one waiting for it
            process.kill()


# ---------------------------------------------------------------------------------------------------
# pre-clip and the loss


def slow_policy_loss(logp, logp_old, adv, mask, clip=1e3, eps=0.2, eps_high=None, mean="tokens"):
    """Algorithm 1 of the paper with python floats, token by token."""
    total, norm = 0.0, 0.0
    for row in range(len(logp)):
        losses = []
        for t in range(len(logp[row])):
            if mask[row][t]:
                log_ratio = logp[row][t] - logp_old[row][t]
                if clip is not None:
                    log_ratio = max(min(log_ratio, math.log(clip)), math.log(1 / clip))
                ratio = math.exp(log_ratio)
                a = adv[row]
                clipped = max(min(ratio, 1 + (eps if eps_high is None else eps_high)), 1 - eps)
                losses.append(-min(ratio * a, clipped * a))
        total += sum(losses) / len(losses) if mean == "sequences" else sum(losses)
        norm += 1 if mean == "sequences" else len(losses)
    return total / norm


def test_the_papers_four_tokens():
    """Section 2.1: loss = [19930.4, 1.1, -0.5, 67.1] without the pre-clip; with it the first is 1e3. Padding is NaN."""
    logp, logp_old = torch.full((4, 8), math.nan), torch.full((4, 8), math.nan)
    mask = torch.zeros(4, 8)
    logp[:, 0], logp_old[:, 0], mask[:, 0] = -0.1, torch.tensor([-10, -0.2, -0.2, -5]), 1
    adv = torch.tensor([-1, -1, 0.5, -0.5])
    for clip, first in ((None, "1.9930e+04"), (1e3, "1.0000e+03")):
        each = [policy_loss(*(x[i:i + 1] for x in (logp, logp_old, adv, mask)), clip=clip)[0].item() for i in range(4)]
        assert [f"{loss:.4e}" for loss in each] == [first, "1.1052e+00", "-5.5259e-01", "6.7145e+01"]
        assert policy_loss(logp, logp_old, adv, mask, clip=clip)[0].item() == pytest.approx(sum(each) / 4, rel=1e-6)
    assert policy_loss(logp, logp_old, adv, mask)[0] == policy_loss(logp, logp_old, adv, mask, clip=1e3, eps=0.2)[0]  # the defaults
    up = torch.tensor([[1.25]], dtype=torch.float64).log()  # beyond 1 + eps at the default of 0.2, inside at 0.3
    assert policy_loss(up, up * 0, torch.ones(1), up * 0 + 1)[0].item() == pytest.approx(-1.2)
    assert sr.normaliser(mask) == 4 and sr.normaliser(torch.ones(4, 8)) == 32


@pytest.mark.parametrize("clip", [1e3, 148.0, 2.0, None])
@pytest.mark.parametrize("mean", ["tokens", "sequences"])
@pytest.mark.parametrize("eps_high", [None, 0.28])
def test_policy_loss_against_the_slow_version(clip, mean, eps_high):
    for seed in range(4):
        data = batch(seed=seed, spread=4.0)
        got = policy_loss(*data, clip=clip, eps=0.1, eps_high=eps_high, mean=mean)[0].item()
        assert got == pytest.approx(slow_policy_loss(*(x.tolist() for x in data), clip, 0.1, eps_high, mean), rel=1e-9)


def test_pre_clip_is_the_identity_inside_constant_outside_and_off_by_none():
    x = torch.tensor([-1e4, -6.91, -6.90, -1, 0, 1, 6.90, 6.91, 1e4], dtype=torch.float64)
    bound = math.log(1e3)  # 6.9078
    assert pre_clip(x).tolist() == [-bound, -bound, -6.90, -1, 0, 1, 6.90, bound, bound]
    assert pre_clip(x, None) is x
    for delta in (0, 1, 0.5, -1e3, math.nan):
        with pytest.raises(ValueError, match="above 1"):
            pre_clip(x, delta)


def test_the_gradient_is_exactly_zero_outside_the_pre_clip():
    """Also where PPO's own clip would let it through: A < 0 and a huge ratio."""
    logp_old = torch.tensor([[-10.0, -10.0, -0.1, -2.0]])
    logp = torch.tensor([[-0.1, -0.1, -9.9, -1.9]])
    adv, mask = torch.tensor([[-1.0, 1.0, 1.0, -1.0]]), torch.ones(1, 4)
    _, grad = gradient(policy_loss, logp, logp_old, adv, mask)
    assert grad[0, :3].tolist() == [0, 0, 0] and grad[0, 3] > 0
    _, grad = gradient(policy_loss, logp, logp_old, adv, mask, clip=None)
    assert grad[0, 0] == pytest.approx(math.exp(9.9) / 4, rel=1e-4)  # what the pre-clip is there to stop


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [10, 100, 1e3, 1e4])
def test_loss_and_gradient_stay_finite(dtype, size):
    """Reinforce++ does not: exp overflows, and 0 * inf in the backward pass is NaN."""
    logp, logp_old = torch.tensor([[-size, 0.0] * 2], dtype=dtype), torch.tensor([[0.0, -size] * 2], dtype=dtype)
    adv = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    loss, grad = gradient(policy_loss, logp, logp_old, adv, torch.ones(1, 4))
    assert loss.isfinite() and loss.dtype == torch.float32 and grad.isfinite().all() and grad.dtype == dtype
    assert all(v.isfinite() for v in policy_loss(logp, logp_old, adv, torch.ones(1, 4))[1].values())
    loss, grad = gradient(sr.ppo_loss, logp, logp_old, adv, torch.ones(1, 4))
    assert loss.isfinite().item() is (size < 50) and grad.isfinite().all().item() is (size < 50)


def test_a_filtered_judgement_adds_exactly_nothing():
    """A = 0 with an overflowing ratio must be 0, not 0 * inf = NaN, with and without the pre-clip."""
    logp, logp_old, mask = torch.tensor([[-1.0], [0.0]]), torch.tensor([[-1.0], [-500.0]]), torch.ones(2, 1)
    for clip in (1e3, None):
        loss, grad = gradient(policy_loss, logp, logp_old, torch.tensor([2.0, 0.0]), mask, clip=clip)
        assert loss == -1 and grad.tolist() == [[-1], [0]]


def test_at_the_first_update_the_loss_is_minus_the_mean_advantage_and_the_gradient_minus_the_advantage():
    logp, _, adv, mask = batch()
    loss, grad = gradient(policy_loss, logp, logp, adv, mask)
    assert loss.item() == pytest.approx(-(adv[:, None] * mask).sum().item() / mask.sum().item())
    torch.testing.assert_close(grad, -adv[:, None] * mask / mask.sum())


@pytest.mark.parametrize("eps, eps_high", [(0.2, None), (0.2, 0.5)])
def test_where_ppo_clips_the_gradient_stops(eps, eps_high):
    high = 0.2 if eps_high is None else eps_high
    ratio = torch.tensor([[0.79, 0.81, 1.19, 1.21, 1.49, 1.51]], dtype=torch.float64)
    for sign in (1.0, -1.0):
        adv = torch.tensor([sign], dtype=torch.float64)
        old, mask = torch.zeros(1, 6, dtype=torch.float64), torch.ones(1, 6)
        _, grad = gradient(policy_loss, ratio.log(), old, adv, mask, eps=eps, eps_high=eps_high)
        for r, g in zip(ratio[0].tolist(), grad[0].tolist()):
            stopped = r > 1 + high if sign > 0 else r < 1 - eps
            assert g == (0 if stopped else pytest.approx(-sign * r / 6))


LOSSES = {"stable": policy_loss, "ppo": sr.ppo_loss, "grpo": sr.grpo_loss, "dr_grpo": sr.dr_grpo_loss, "dapo": sr.dapo_loss,
          "cispo": sr.cispo_loss, "topr": sr.topr_loss, "rloo": sr.rloo_loss}


@pytest.mark.parametrize("name", LOSSES)
def test_padding_changes_nothing_whatever_it_holds(name):
    logp, logp_old, adv, mask = batch()
    loss, grad = gradient(LOSSES[name], logp, logp_old, adv, mask)
    for junk in (0.0, 1e30, math.nan, math.inf, -math.inf):
        wide = [torch.cat([torch.where(mask.bool(), x, junk), torch.full((6, 3), junk, dtype=x.dtype)], 1) for x in (logp, logp_old)]
        empty = [torch.cat([x, torch.full((1, 8), junk, dtype=x.dtype)]) for x in wide]  # and a row that is all padding
        more = torch.nn.functional.pad(mask, (0, 3, 0, 1))
        same, wide_grad = gradient(LOSSES[name], *empty, torch.cat([adv, torch.tensor([7.0], dtype=adv.dtype)]), more)
        torch.testing.assert_close(same, loss, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(wide_grad[:6, :5], grad, atol=1e-12, rtol=1e-12)
        assert (wide_grad[more == 0] == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_add_up_to_the_whole_batch_and_order_does_not_matter(name):
    logp, logp_old, adv, mask = batch(B=8, seed=4, spread=3.0)
    loss, grad = gradient(LOSSES[name], logp, logp_old, adv, mask)
    mean = "sequences" if name in ("grpo", "dr_grpo", "topr", "rloo") else "tokens"
    order = torch.tensor([5, 0, 7, 2, 1, 6, 3, 4])
    for cuts in ([8], [1] * 8, [3, 5], [6, 1, 1]):
        total, parts, at = 0.0, torch.zeros_like(grad), 0
        for n in cuts:
            rows = order[at:at + n]
            one, parts[rows] = gradient(LOSSES[name], logp[rows], logp_old[rows], adv[rows], mask[rows], norm=sr.normaliser(mask, mean))
            total, at = total + one, at + n
        torch.testing.assert_close(total, loss, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(parts, grad, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name):
    """Numerical against analytical gradient in float64, away from the kinks. Stopped gradients are checked on their own below."""
    logp, logp_old, adv, mask = batch(B=4, T=3, seed=2)
    if name in ("cispo", "topr"):  # the weight is a constant to autograd: hold it fixed by moving logp_old along
        fixed = logp.clone()
        loss = lambda x: LOSSES[name](x, logp_old + (x - fixed).detach(), adv, mask)[0]
        weight = (fixed - logp_old).exp()
        if name == "cispo":
            want = -weight.clamp(max=5) * adv[:, None] * mask / mask.sum()
        else:
            whole = ((fixed - logp_old) * mask).sum(1)
            want = -(torch.where(adv < 0, whole.exp().clamp(max=1), 1.0) * adv)[:, None] * mask / 4
        torch.testing.assert_close(gradient(LOSSES[name], logp, logp_old, adv, mask)[1], want)
    else:
        loss = lambda x: LOSSES[name](x, logp_old, adv, mask)[0]
    assert torch.autograd.gradcheck(loss, logp.clone().requires_grad_(), eps=1e-7, atol=1e-5)


def test_the_sign_a_better_judgement_becomes_likelier():
    logp, logp_old, adv, mask = batch(spread=0.05)
    for name, loss_fn in LOSSES.items():
        _, grad = gradient(loss_fn, logp, logp_old, adv, mask)
        assert (grad.sign() == -adv.sign()[:, None] * mask).all(), name


def test_no_gradient_flows_into_old_log_probs_or_advantages():
    data = [x.requires_grad_() if i < 3 else x for i, x in enumerate(batch())]
    for loss_fn in LOSSES.values():
        loss_fn(*data)[0].backward()
    assert data[0].grad is not None and data[1].grad is None and data[2].grad is None


def test_advantages_may_differ_from_token_to_token():
    """(B, T) advantages: each token as a one-token judgement of its own, and a row of equal ones as a (B,) advantage."""
    logp, logp_old, adv, mask = batch(spread=2.0)
    each = torch.randn(6, 5, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    flat = [x.reshape(30, 1) for x in (logp, logp_old)]
    torch.testing.assert_close(policy_loss(logp, logp_old, each, mask)[0], policy_loss(*flat, each.reshape(30), mask.reshape(30, 1))[0])
    assert torch.equal(policy_loss(logp, logp_old, adv, mask)[0], policy_loss(logp, logp_old, adv[:, None].expand(6, 5), mask)[0])


def test_shapes_that_would_broadcast_are_refused():
    """(B, T) against (B, 1), or an advantage a token too short, would give a number and mean nothing."""
    logp, logp_old, adv, mask = batch()
    for bad in ((logp, logp_old[:, :1], adv, mask), (logp, logp_old, adv[:, None], mask), (logp, logp_old, adv[:5], mask),
                (logp, logp_old, adv, mask[:1]), (logp, logp_old, adv[None], mask)):
        for loss_fn in LOSSES.values():
            with pytest.raises(ValueError, match="shapes"):
                loss_fn(*bad)
    with pytest.raises(ValueError, match="shapes"):
        advantages(adv[:3], mask=torch.ones(3, 3))
    with pytest.raises(ValueError, match="shapes"):
        sr.returns_to_go(adv[:2], torch.zeros(1, 3), torch.ones(1, 3), 0.1)
    with pytest.raises(ValueError, match="expected one of tokens, sequences, sums, constant"):
        policy_loss(*batch(), mean="batch")
    with pytest.raises(ValueError, match="shapes: .* whole judgements"):
        sr.topr_loss(logp, logp_old, adv[:, None].expand(6, 5), mask)


def test_a_batch_without_tokens_is_zero_and_not_nan():
    for loss_fn in LOSSES.values():
        loss, grad = gradient(loss_fn, torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2), torch.zeros(2, 3))
        assert loss == 0 and (grad == 0).all()
        loss, stats = loss_fn(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0), torch.zeros(0, 3))
        assert loss == 0 and all(v == 0 for v in stats.values())


def test_statistics_by_hand():
    """
    Five tokens of log-ratio 8, -9, log 1.5, log .5, 0 and a sixth masked; A = 1 -1 1 -1 1. Bound log 100 = 4.605.
    Ratios after the pre-clip: 100, .01, 1.5, .5, 1; clipped above: the first and the third; below: the second and the fourth.
    """
    diff = torch.tensor([[8, -9, math.log(1.5), math.log(0.5), 0, 50.0]], dtype=torch.float64)
    adv, mask = torch.tensor([[1, -1, 1, -1, 1, 1.0]]), torch.tensor([[1, 1, 1, 1, 1, 0.0]])
    stats = {k: v.item() for k, v in policy_loss(diff, torch.zeros_like(diff), adv, mask, clip=100)[1].items()}
    kl = (100 - 1 - 4.60517) + (0.01 - 1 + 4.60517) + (0.5 - math.log(1.5)) + (-0.5 + math.log(2)) + 0
    assert stats == pytest.approx({"tokens": 5, "ratio_mean": 103.01 / 5, "ratio_max": 100, "log_ratio_max": 9, "preclipped": 0.4,
                                   "clipped_low": 0.4, "clipped_high": 0.4, "kl": kl / 5, "token_loss_max": 0.8}, rel=1e-6)
    stats = policy_loss(diff, torch.zeros_like(diff), -adv, mask, clip=None)[1]  # signs turned: PPO clips none of them
    assert stats["clipped_low"] == stats["clipped_high"] == stats["preclipped"] == 0
    assert stats["ratio_max"].item() == stats["token_loss_max"].item() == pytest.approx(math.exp(8))  # A = -1 of the first token
    stats = policy_loss(diff, torch.zeros_like(diff), adv * 0, mask)[1]  # a filtered judgement is not clipped, it is gone
    assert stats["clipped_low"] == stats["clipped_high"] == 0
    stats = policy_loss(diff, torch.zeros_like(diff), adv, mask, eps_high=0.6)[1]  # 1.5 is inside now
    assert stats["clipped_high"].item() == pytest.approx(0.2) and stats["clipped_low"].item() == pytest.approx(0.4)
    stats = policy_loss(-diff.abs(), torch.zeros_like(diff), adv, mask - torch.tensor([[0, 0, 0, 0, 1.0, 0]]), clip=1e9)[1]
    assert stats["ratio_max"].item() == pytest.approx(1 / 1.5)  # not the 1 of the padding
    assert stats["log_ratio_max"].item() == 9  # the largest in size, though negative
    diff = torch.tensor([[-0.1]], dtype=torch.bfloat16)  # bf16 rounds the difference to 9.875: it is taken in float32
    assert policy_loss(diff, torch.full_like(diff, -10.0), adv[:, :1], mask[:, :1])[1]["log_ratio_max"].item() == pytest.approx(9.899902)
    near = torch.full((1, 4), 1e-4)  # float32 close to the policy: rho - 1 - log rho by subtraction would be rounding noise
    assert policy_loss(near, near * 0, torch.ones(1), near * 0 + 1)[1]["kl"].item() == pytest.approx(5e-9, rel=1e-2)
    one = torch.ones(1, 1)  # at a bound itself nothing is clipped: ratio 1 with eps 0, log-ratio 1 with delta e
    assert policy_loss(one, one, -one[0], one, eps=0)[1]["clipped_low"] == policy_loss(one, one, one[0], one, eps=0)[1]["clipped_high"] == 0
    assert policy_loss(one, one * 0, one[0], one, clip=math.e)[1]["preclipped"] == 0
    diff = torch.zeros(1, 6)
    assert not any(v.requires_grad for v in policy_loss(diff.requires_grad_(), torch.zeros_like(diff), adv, mask)[1].values())


# ---------------------------------------------------------------------------------------------------
# KL, and the neighbours


def test_kl_estimators_average_to_the_kl():
    """Exactly, over a distribution of three tokens: E_pi[k1] = E_pi[k3] = KL(pi || ref); k2 only nearly."""
    pi, ref = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
    exact = sum(p * math.log(p / q) for p, q in zip(pi.tolist(), ref.tolist()))
    mean = {name: (pi * k(pi.log(), ref.log())).sum().item() for name, k in sr.KL.items()}
    assert mean["k1"] == pytest.approx(exact) and mean["k3"] == pytest.approx(exact)
    assert mean["k2"] == pytest.approx((0.5 * 0.22314**2 + 0.3 * 0.28768**2) / 2, rel=1e-4)
    assert mean["k2"] != pytest.approx(exact, rel=1e-3)
    for x in (-2.0, -0.1, 0.0, 0.7):  # x = log pi - log ref
        assert sr.kl_k1(torch.tensor(x), torch.tensor(0.0)).item() == pytest.approx(x)
        assert sr.kl_k2(torch.tensor(x), torch.tensor(0.0)).item() == pytest.approx(x * x / 2)
        assert sr.kl_k3(torch.tensor(x), torch.tensor(0.0)).item() == pytest.approx(math.exp(-x) - 1 + x, abs=1e-6)
        assert sr.kl_k3(torch.tensor(x), torch.tensor(0.0)).item() >= 0


def test_k3_keeps_its_digits_near_zero():
    """exp(x) - x - 1 at x = 1e-3 in float32 has one right digit; the value is x^2 / 2 + x^3 / 6."""
    got = sr.kl_k3(torch.tensor(0.0), torch.tensor(1e-3)).item()
    assert got == pytest.approx(5.00167e-7, rel=1e-3)


def test_k3_stays_finite_where_the_policy_has_left_the_reference():
    """exp(89) overflows in float32; from a log-ratio of 20 on the term is constant, as in other implementations."""
    logp = torch.tensor([-100.0, -1000.0, -1.0], requires_grad=True)
    value = sr.kl_k3(logp, torch.tensor([-1.0, -1.0, -90.0]))
    value.sum().backward()
    assert value.tolist() == pytest.approx([math.exp(20) - 21, math.exp(20) - 21, 88.0], rel=1e-6)
    assert logp.grad.tolist() == [0.0, 0.0, 1.0]  # 1 - rho on the other side, where nothing overflows


def test_an_overflowing_ratio_is_nan_where_a_is_positive_and_infinite_where_it_is_negative():
    for advantage, expected in ((1.0, "nan"), (-1.0, "inf")):
        _, grad = gradient(sr.ppo_loss, torch.tensor([[-1.0]]), torch.tensor([[-200.0]]), torch.tensor([advantage]), torch.ones(1, 1))
        assert str(grad.item()) == expected
        loss, grad = gradient(policy_loss, torch.tensor([[-1.0]]), torch.tensor([[-200.0]]), torch.tensor([advantage]), torch.ones(1, 1))
        assert loss.isfinite() and grad == 0  # the pre-clip comes before the exponential


def test_k2_as_a_loss_has_the_gradient_of_the_kl_and_k1_has_none():
    logits = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64).log()
    logp = logits.log_softmax(0)
    exact, = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits, retain_graph=True)
    pi = logp.exp().detach()  # the expectation over samples: weights without a gradient
    k1, k2 = (torch.autograd.grad((pi * sr.KL[k](logp, ref)).sum(), logits, retain_graph=True)[0] for k in ("k1", "k2"))
    torch.testing.assert_close(k2, exact)
    torch.testing.assert_close(k1, torch.zeros_like(k1), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_group_advantages_against_the_slow_version(kind):
    rng = random.Random(0)
    groups = [rng.choice([3, 8, 5]) for _ in range(30)]
    rewards = [rng.choice([0, 0.5, 1.5, 2]) for _ in groups]
    slow = []
    for r, g in zip(rewards, groups):
        others = [x for x, h in zip(rewards, groups) if h == g]
        if kind == "rloo":
            slow.append(r - (sum(others) - r) / (len(others) - 1))
        else:
            slow.append((r - statistics.fmean(others)) / (statistics.pstdev(others) + 1e-4 if kind == "grpo" else 1))
    adv, kept = group_advantages(torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups), kind)
    torch.testing.assert_close(adv, torch.tensor(slow, dtype=torch.float64), atol=1e-9, rtol=1e-9)
    assert kept.all() and kept.shape == adv.shape


def test_rewards_that_differ_by_rounding_are_no_preference():
    """Real-valued scores of one prompt that differ by 1e-5: with a floor of 1e-8 they would be advantages of 1.3 and -1.3."""
    rewards = torch.tensor([0.5, 0.5, 0.50001, 0.49999], dtype=torch.float64)
    assert group_advantages(rewards, torch.zeros(4))[0].abs().max() < 0.1
    assert group_advantages(rewards, torch.zeros(4), floor=1e-8)[0].abs().max() > 1.3
    half_points = torch.tensor([0.0, 0.5, 1.0, 0.5], dtype=torch.float64)  # verdicts differ by far more, and do not feel it
    torch.testing.assert_close(group_advantages(half_points, torch.zeros(4))[0], group_advantages(half_points, torch.zeros(4), floor=1e-8)[0],
                               rtol=1e-3, atol=0)


def test_group_advantages_at_the_edges():
    for n in range(1, 30):  # equal rewards: exactly 0, however the mean is rounded
        r, g = torch.tensor([0.1] * n + [1.0], dtype=torch.float64), torch.tensor([0] * n + [5])
        assert (group_advantages(r, g)[0] == 0).all() and (group_advantages(r, g, "dr_grpo")[0] == 0).all()
    with pytest.raises(ValueError, match="group 5 has 1"):
        group_advantages(r, g, "rloo")
    assert group_advantages(torch.tensor([1.0, 0]), torch.tensor([4, 4]), "rloo")[0].tolist() == [1, -1]
    lone, kept = group_advantages(torch.tensor([0.0] * 11 + [1]), torch.zeros(12))
    assert lone[-1].item() == pytest.approx(math.sqrt(11), rel=1e-3) and kept.all() and lone.dtype == torch.float32  # grpo, and no filter
    assert group_advantages(torch.tensor([1, 0]), torch.tensor([4, 4]))[0].dtype == torch.float32
    with pytest.raises(ValueError, match="legal"):
        group_advantages(r, g, "best_of_n")
    big = torch.tensor([60000.0, 60000], dtype=torch.float16)  # their sum is beyond float16
    assert (group_advantages(big, torch.tensor([4, 4]))[0] == 0).all()
    assert group_advantages(torch.tensor([]), torch.tensor([], dtype=torch.long))[0].shape == (0,)


def slow_sequence_losses(logp, logp_old, adv, mask):
    """RLOO, TOPR, CISPO (eps_high 4) with python floats: (rloo, topr, cispo)."""
    rloo = topr = cispo = tokens = 0.0
    for row in range(len(logp)):
        picked = [t for t in range(len(logp[row])) if mask[row][t]]
        whole, whole_old = sum(logp[row][t] for t in picked), sum(logp_old[row][t] for t in picked)
        rloo -= adv[row] * whole
        topr -= adv[row] * whole * (1 if adv[row] >= 0 else min(math.exp(whole - whole_old), 1))
        cispo -= sum(min(math.exp(logp[row][t] - logp_old[row][t]), 5) * adv[row] * logp[row][t] for t in picked)
        tokens += len(picked)
    return rloo / len(logp), topr / len(logp), cispo / tokens


def test_rloo_topr_and_cispo_against_the_slow_version():
    for seed in range(4):
        data = batch(seed=seed, spread=2.0)
        slow = slow_sequence_losses(*(x.tolist() for x in data))
        for loss_fn, want in zip((sr.rloo_loss, sr.topr_loss, sr.cispo_loss), slow):
            assert loss_fn(*data)[0].item() == pytest.approx(want, rel=1e-9)
    logp, logp_old, adv, mask = batch(spread=2.0)
    low = sr.cispo_loss(logp, logp_old, adv, mask, eps=0.2, eps_high=0.28)[0]
    want = -((logp - logp_old).exp().clamp(0.8, 1.28) * adv[:, None] * logp * mask).sum() / mask.sum()
    torch.testing.assert_close(low, want)


def test_grpo_dr_grpo_and_dapo_against_the_slow_version():
    for seed in range(4):
        data = batch(seed=seed, spread=2.0)
        lists = [x.tolist() for x in data]
        assert sr.ppo_loss(*data)[0].item() == pytest.approx(slow_policy_loss(*lists, clip=None))
        assert sr.grpo_loss(*data)[0].item() == pytest.approx(slow_policy_loss(*lists, clip=None, mean="sequences"))
        assert sr.dapo_loss(*data)[0].item() == pytest.approx(slow_policy_loss(*lists, clip=None, eps_high=0.28))
        per_token = slow_policy_loss(*lists, clip=None) * data[3].sum().item()
        assert sr.dr_grpo_loss(*data, max_tokens=50)[0].item() == pytest.approx(per_token / (6 * 50))
        assert sr.dr_grpo_loss(*data)[0].item() == pytest.approx(per_token / (6 * 1024))
        assert sr.ppo_loss(*data, eps=0.05)[0].item() == pytest.approx(slow_policy_loss(*lists, clip=None, eps=0.05))
        assert sr.grpo_loss(*data, eps=0.05)[0].item() == pytest.approx(slow_policy_loss(*lists, clip=None, eps=0.05, mean="sequences"))
        per_token = slow_policy_loss(*lists, clip=None, eps=0.05) * data[3].sum().item()
        assert sr.dr_grpo_loss(*data, eps=0.05)[0].item() == pytest.approx(per_token / (6 * 1024))
        slow = slow_policy_loss(*lists, clip=None, eps=0.05, eps_high=0.1)
        assert sr.dapo_loss(*data, eps=0.05, eps_high=0.1)[0].item() == pytest.approx(slow)


def test_topr_and_cispo_weights_never_overflow():
    logp, logp_old, mask = torch.zeros(2, 3), torch.full((2, 3), -1e4), torch.ones(2, 3)
    for adv in (torch.tensor([1.0, -1.0]), torch.tensor([-1.0, 1.0])):
        for loss_fn in (sr.topr_loss, sr.cispo_loss):
            for a, b in ((logp, logp_old), (logp_old, logp)):
                loss, grad = gradient(loss_fn, a, b, adv, mask)
                assert loss.isfinite() and grad.isfinite().all() and loss_fn(a, b, adv, mask)[1]["preclipped"] == 0


def test_statistics_of_the_neighbours_say_what_was_truncated():
    """
    Sequence log-ratios +1 (truncated, A < 0), -1 twice and 0 (A < 0, but not above 1), +1 (A > 0: weight 1 by rule).
    """
    logp_old, mask, adv = torch.zeros(5, 2), torch.ones(5, 2), torch.tensor([-1.0, -1, -1, -1, 1])
    logp = torch.tensor([[0.5, 0.5], [-0.5, -0.5], [-0.5, -0.5], [0.0, 0.0], [0.5, 0.5]])
    stats = sr.topr_loss(logp, logp_old, adv, mask)[1]
    assert stats["clipped_high"].item() == pytest.approx(1 / 5) and stats["clipped_low"] == 0
    assert stats["ratio_max"].item() == pytest.approx(math.exp(0.5)) == sr.rloo_loss(logp, logp_old, adv, mask)[1]["ratio_max"].item()
    stats = sr.cispo_loss(logp * 4, logp_old, adv, mask, eps=0.5)[1]  # ratios e^2 > 5 twice, e^-2 < .5 twice, and 1
    assert stats["clipped_high"].item() == pytest.approx(2 / 5) and stats["clipped_low"].item() == pytest.approx(2 / 5)
    stats = sr.rloo_loss(logp * 20, logp_old, adv, mask)[1]  # plain REINFORCE clips nothing, at any ratio
    assert stats["clipped_high"] == stats["clipped_low"] == stats["preclipped"] == 0


def test_algorithms_by_name():
    """Each row runs, in the shapes rl.py uses; and at ratio 1, with the same A, the token-mean losses share one gradient."""
    logp, logp_old, _, mask = batch(B=12)
    rewards, groups = torch.tensor([2.0] * 11 + [0]).double(), torch.arange(12) // 4
    adv = {name: row[0](rewards, groups) for name, row in sr.ALGORITHMS.items()}
    assert adv["stable_reinforce"][0][-1] == 0 and not adv["stable_reinforce"][1][-1]  # -sqrt(11) is beyond 3
    assert adv["reinforce++"][0][-1].item() == pytest.approx(-math.sqrt(11), abs=1e-6) and adv["reinforce++"][1].all()
    assert adv["ppo"][0][-1].item() == adv["topr"][0][-1].item() == pytest.approx(-11 / 6)
    assert adv["grpo"][0][-1].item() == pytest.approx(-math.sqrt(3), rel=1e-3) and adv["grpo"][0][:8].tolist() == [0] * 8
    assert adv["dr_grpo"][0][-1].item() == pytest.approx(-1.5) and adv["rloo"][0][-1].item() == pytest.approx(-2)
    same = {}
    for name, (_, loss_fn, mean) in sr.ALGORITHMS.items():
        norm = sr.normaliser(mask, mean)
        loss, grad = gradient(loss_fn, logp, logp_old, adv[name][0], mask, norm=norm)
        torch.testing.assert_close(loss, loss_fn(logp, logp_old, adv[name][0], mask)[0])  # `mean` names the loss's own norm
        assert grad.abs().sum() > 0
        if mean == "tokens":
            same[name] = gradient(loss_fn, logp, logp, adv["ppo"][0], mask)[1]
    for name, grad in same.items():
        torch.testing.assert_close(grad, same["stable_reinforce"], msg=name)


def test_the_table_of_algorithms_row_by_row():
    """Rewards 2 1 0 of one prompt, 1 1 0 of another; mean 5/6, population variance 17/36."""
    rewards, groups = torch.tensor([2.0, 1, 0, 1, 1, 0]).double(), torch.tensor([0, 0, 0, 1, 1, 1])
    z, centred = [1.69775, 0.24254, -1.21268], [7 / 6, 1 / 6, -5 / 6]
    # 1 or 1/3 over the population standard deviation, and GRPO's floor of 1e-4
    a, b = 1 / (math.sqrt(2 / 3) + 1e-4), (1 / 3) / (math.sqrt(2 / 9) + 1e-4)
    table = {
        "stable_reinforce": (policy_loss, "tokens", [z[0], z[1], z[2], z[1], z[1], z[2]]),
        "reinforce++": (sr.ppo_loss, "tokens", [z[0], z[1], z[2], z[1], z[1], z[2]]),
        "ppo": (sr.ppo_loss, "tokens", [centred[0], centred[1], centred[2], centred[1], centred[1], centred[2]]),
        "grpo": (sr.grpo_loss, "sequences", [a, 0, -a, b, b, -2 * b]),
        "dr_grpo": (sr.dr_grpo_loss, "constant", [1, 0, -1, 1 / 3, 1 / 3, -2 / 3]),
        "rloo": (sr.rloo_loss, "sums", [1.5, 0, -1.5, 0.5, 0.5, -1]),
        "dapo": (sr.dapo_loss, "tokens", [a, 0, -a, b, b, -2 * b]),
        "cispo": (sr.cispo_loss, "tokens", [a, 0, -a, b, b, -2 * b]),
        "topr": (sr.topr_loss, "sums", [centred[0], centred[1], centred[2], centred[1], centred[1], centred[2]]),
    }
    assert table.keys() == sr.ALGORITHMS.keys()
    for name, (loss_fn, mean, expected) in table.items():
        calls = []
        adv, kept = sr.ALGORITHMS[name][0](rewards, groups, lambda sums: calls.append(sums) or sums)
        assert sr.ALGORITHMS[name][1:] == (loss_fn, mean) and kept.all()
        assert len(calls) == (0 if name in ("grpo", "dr_grpo", "rloo", "dapo", "cispo") else 2)  # over ranks: two sums, or none
        torch.testing.assert_close(adv, torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=0)


def test_what_the_filter_and_the_pre_clip_are_for():
    """One saturated batch, its lone failure sampled from a stale policy: the largest gradient of any token, both ways."""
    moved = {}
    for name in ("reinforce++", "stable_reinforce"):
        advantage, loss_fn, _ = sr.ALGORITHMS[name]
        adv, _ = advantage(torch.tensor([1.0] * 255 + [0]))
        logp = torch.full((256, 1), -1.0, requires_grad=True)
        logp_old = torch.tensor([-1.0] * 255 + [-9.0])[:, None]  # the lone failure was sampled from another policy: ratio e^8
        loss_fn(logp, logp_old, adv, torch.ones(256, 1))[0].backward()
        moved[name] = logp.grad.abs().max().item()
    assert moved["reinforce++"] == pytest.approx(math.exp(8) * math.sqrt(255) / 256, rel=1e-4)  # 185.9
    assert moved["stable_reinforce"] == pytest.approx(1 / math.sqrt(255) / 256, rel=1e-4)  # 0.00024
    adv, _ = advantages(torch.tensor([1.0] * 255 + [0]), sigma=None)  # the pre-clip alone: e^8 > 1e3, so no gradient there
    _, grad = gradient(policy_loss, torch.full((256, 1), -1.0), logp_old, adv, torch.ones(256, 1))
    assert grad[-1] == 0 and grad[0].item() == pytest.approx(-1 / math.sqrt(255) / 256, rel=1e-4)
