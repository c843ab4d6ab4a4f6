"""
The mathematics of stable_reinforce.py and core/neighbours.py, in seconds on a CPU: the paper's
numbers as literals, slow independent versions of every formula (Python floats and loops),
invariances, gradients, and the faults of the released code.

$ python -m pytest test_stable_reinforce.py
"""

import doctest
import math
import random
import re
import subprocess
import sys
import timeit
from collections import Counter
from pathlib import Path
from statistics import fmean, pstdev
from time import process_time
from typing import NamedTuple

import pytest
import torch
from torch.testing import assert_close

import stable_reinforce as sr
from core import neighbours
from core.neighbours import ALGORITHMS, group_advantages, returns_to_go
from stable_reinforce import advantages, final_reward, parse, parse_consistency, policy_loss

GOOD = "<think>Response 2 is better.</think><answer>2</answer>"
TWO_RANKS = Path(__file__).parent / "tests" / "programs" / "advantages_on_two_ranks.py"


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


def random_numbers(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_batch(B=6, T=5, seed=0, spread=1.0):
    """
    logps, old_logps, advantage (B,) and mask. The first judgement has T tokens, the last has one;
    the standard deviation of the log-ratios is `spread`.
    """
    old_logps = -random_numbers(B, T, seed=seed).abs() - 0.1
    logps = old_logps + spread * random_numbers(B, T, seed=seed + 100)
    advantage = random_numbers(B, seed=seed + 200)
    lengths = torch.linspace(T, 1, B).long()
    mask = (torch.arange(T) < lengths[:, None]).double()
    return logps, old_logps, advantage, mask


def loss_and_gradient(loss_function, logps, *rest, **options):
    logps = logps.clone().requires_grad_()
    loss, _ = loss_function(logps, *rest, **options)
    loss.backward()
    return loss.detach(), logps.grad


@pytest.mark.parametrize("module", [sr, neighbours], ids=["stable_reinforce", "neighbours"])
def test_every_example_is_true(module):
    examples = doctest.testmod(module)
    assert examples.attempted > 10
    assert examples.failed == 0


# --------------------------------------------------------------------------------------------------
# Verdicts

VERDICTS = [
    (GOOD, 2, "Response 2 is better.", True),
    (" \n<think>a\nb</think>\n\n<answer> 1 </answer>\t", 1, "a\nb", True),
    # an empty thought is a block: consistency is what punishes it
    ("<think></think><answer>1</answer>", 1, "", True),
    ("<think>a</think>x<answer>1</answer>", 1, "a", False),
    ("x<think>a</think><answer>1</answer>", 1, "a", False),
    ("<think>a</think><answer>1</answer>.", 1, "a", False),
    ("<answer>1</answer>", 1, "", False),
    # decided first, thought later: no verdict
    ("<answer>1</answer><think>a</think>", None, "a", False),
    ("<think>say <answer>1</answer> or so</think>", None, "say <answer>1</answer> or so", False),
    # the last block decides
    ("<think>a</think><answer>1</answer><answer>2</answer>", 2, "a", False),
    ("<think>a</think><answer>1/2</answer>", None, "a", False),
    ("<think>a</think><answer>12</answer>", None, "a", False),
    ("<think>a</think><answer>1.0</answer>", None, "a", False),
    ("<think>a</think><answer>Response 1</answer>", None, "a", False),
    ("<think>a</think><answer>3</answer>", None, "a", False),
    ("<think>a</think><answer></answer>", None, "a", False),
    # digits, but not 1 and 2: full-width, superscript, Arabic-Indic
    ("<think>a</think><answer>１</answer>", None, "a", False),
    ("<think>a</think><answer>²</answer>", None, "a", False),
    ("<think>a</think><answer>١</answer>", None, "a", False),
    ("<think>a</think><answer><answer>1</answer></answer>", None, "a", False),
    ("<think>a<think>b</think>c</think><answer>1</answer>", 1, "a<think>b</think>c", False),
    ("<think>a</think><think>b</think><answer>1</answer>", 1, "a</think><think>b", False),
    ("</think><think><answer>1</answer>", 1, "", False),
    # cut off
    ("<think>a</think><answer>1", None, "a", False),
    ("<think>a", None, "", False),
    ("<THINK>a</THINK><ANSWER>1</ANSWER>", None, "", False),
    ("</answer>1<answer>", None, "", False),
    ("1", None, "", False),
    ("", None, "", False),
    # a NUL, half a surrogate pair
    ("\x00\ud800<answer>1</answer>", 1, "", False),
]


@pytest.mark.parametrize("text, choice, think, well_formed", VERDICTS)
def test_parse(text, choice, think, well_formed):
    assert parse(text) == (choice, think, well_formed)
    assert sr.format_reward(text) == (1.0 if well_formed else 0.0)
    assert sr.result_reward(text, 1) == (1.0 if choice == 1 else 0.0)
    assert sr.result_reward(text, 2) == (1.0 if choice == 2 else 0.0)


def slow_parse(text):
    """The rules of parse() on a list of text, tag, text, tag, ..., text."""
    pieces = re.split("(</?think>|</?answer>)", text)
    tags = pieces[1::2]
    outside = pieces[0] + pieces[4] + pieces[8] if len(tags) == 4 else ""

    choice = None
    if "</answer>" in tags:
        last = max(place for place, tag in enumerate(tags) if tag == "</answer>")
        opened = last > 0 and tags[last - 1] == "<answer>"
        if opened and "</think>" not in tags[last:]:
            choice = {"1": 1, "2": 2}.get(pieces[2 * last].strip())

    think = ""
    if "<think>" in tags and "</think>" in tags:
        first = tags.index("<think>")
        last = max(place for place, tag in enumerate(tags) if tag == "</think>")
        think = "".join(pieces[2 * first + 2 : 2 * last + 1])

    in_order = tags == ["<think>", "</think>", "<answer>", "</answer>"]
    well_formed = in_order and choice is not None and not outside.strip()
    return choice, think, well_formed


BITS = [*sr.TAGS * 3, *"12<x１ \n", "12", "think>", "answer>", "</", "so"]


def random_text(rng):
    """Seven times in ten any bits, else a good text with at most one mutation."""
    if rng.random() < 0.7:
        return "".join(rng.choices(BITS, k=rng.randrange(12)))
    space = rng.choice(["", "\n"])
    choice = rng.choice(["1", "2"])
    parts = ["<think>", "a", "</think>", space, "<answer>", choice, "</answer>"]
    if rng.random() < 0.5:
        parts[rng.randrange(len(parts))] = rng.choice(BITS)
    return "".join(parts)


def test_parse_against_the_slow_version_on_random_texts():
    rng = random.Random(0)
    seen = Counter()
    for _ in range(20_000):
        text = random_text(rng)
        verdict = parse(text)
        assert verdict == slow_parse(text), text
        seen[verdict.choice, verdict.well_formed] += 1
    assert seen.keys() == {(1, True), (2, True), (1, False), (2, False), (None, False)}
    assert min(seen.values()) > 300


def seconds_to_read(bit, size):
    """CPU seconds for texts made of one bit over and over, the best of three."""
    garbage = bit * (size // len(bit))
    texts = [
        garbage,
        f"<think>{garbage}</think><answer>1</answer>",
        f"{GOOD}{garbage}",
        f"{garbage}{GOOD}",
        f"<think>{garbage}</think>{garbage}",
    ]

    def read():
        for text in texts:
            parse(text)
            parse_consistency(text)
            parse_consistency(f"yes{text}")

    return min(timeit.repeat(read, timer=process_time, number=1, repeat=3))


@pytest.mark.parametrize(
    "bit",
    [
        *(*sr.TAGS, "<answer>1", "</think> ", "<think></think>", "<answer>1</answer>"),
        *(" ", "_", "<", "1", "0", "no ", "\ud800"),
    ],
)
def test_sixteen_times_the_text_is_not_256_times_the_work(bit):
    short = seconds_to_read(bit, 2**12)
    long = seconds_to_read(bit, 2**16)
    assert long < 64 * short


# the first word decides, so that nothing earns a reward by mistake
AGREES = ["yes", "Yes.", "  **YES**, both name Response 2", "Yes. No contradiction here."]
DISAGREES = ["no", "No: 1 against 2", "No inconsistency: both say 2"]
LONE_DIGITS = {"1": 1, "1.": 1, "__1__": 1, "0": 0, " 0\n": 0}
NO_ANSWER = [
    *("10", "1/0", "1 or 0", "01", "１", "٠"),
    *("not sure", "yesterday", "nothing", "I would say yes", "The verdict is 0"),
    *("yes/no", "Yes/No: No", "No / yes", "yes or no? No", "Yes and no"),
    *("<answer>yes</answer>", "{}", "<html>", "Error code: 500", "", "   ", None),
]


@pytest.mark.parametrize("reply", AGREES)
def test_a_judge_that_agrees(reply):
    assert parse_consistency(reply) == sr.consistency_reward(reply) == 1


@pytest.mark.parametrize("reply", DISAGREES)
def test_a_judge_that_disagrees(reply):
    assert parse_consistency(reply) == sr.consistency_reward(reply) == 0


@pytest.mark.parametrize("reply, agrees", LONE_DIGITS.items())
def test_a_judge_that_answers_by_a_digit(reply, agrees):
    assert parse_consistency(reply) == sr.consistency_reward(reply) == agrees


@pytest.mark.parametrize("reply", NO_ANSWER)
def test_a_judge_that_gives_no_answer_earns_nothing(reply):
    assert parse_consistency(reply) is None
    assert sr.consistency_reward(reply) == 0


def test_a_zero_somewhere_in_the_judges_reply_is_not_disagreement():
    """Released code: any "0" in a reply means disagreement, also one that the judge quotes."""
    assert parse_consistency("Yes, it counts 10 cars and concludes with Response 1") == 1


@pytest.mark.parametrize(
    "text", ["", "<answer>", "<answer>nan</answer>", "<answer>2/1</answer>", "\x00" * 9, GOOD[:-1]]
)
def test_a_judgement_that_cannot_be_parsed_earns_nothing(text):
    """Released code: an exception in the result verifier earns 1.0."""
    assert sr.result_reward(text, 1) == 0.0
    assert sr.result_reward(text, 2) == 0.0
    assert sr.format_reward(text) == 0.0


@pytest.mark.parametrize("choice", [0, 3, None, "1", -1])
def test_result_reward_refuses_any_choice_but_1_and_2(choice):
    with pytest.raises(ValueError, match=f"expected a choice of 1 or 2 .* got {choice!r}"):
        sr.result_reward(GOOD, choice)


# --------------------------------------------------------------------------------------------------
# Rewards


@pytest.mark.parametrize(
    "result, consistency, format, gated, external",
    [
        (0, 0, 0, 0.0, 0.0),
        (0, 0, 1, 0.5, 0.5),
        (0, 1, 0, 0.0, 0.5),
        (0, 1, 1, 0.5, 1.0),
        (1, 0, 0, 1.0, 1.0),
        (1, 0, 1, 1.5, 1.5),
        (1, 1, 0, 1.5, 1.5),
        (1, 1, 1, 2.0, 2.0),
    ],
)
def test_final_reward_on_all_eight(result, consistency, format, gated, external):
    numbers = (result, consistency, format)
    assert final_reward(*numbers) == gated  # Eq. 2
    assert final_reward(*numbers, form="external") == external  # Eq. 1
    tensors = [torch.tensor([float(number)]) for number in numbers]
    assert final_reward(*tensors).tolist() == [gated]
    assert final_reward(*tensors, form="external").tolist() == [external]


def test_the_weight_is_that_of_consistency_alone():
    assert final_reward(1.0, 1.0, 1.0, weight=0.1) == pytest.approx(1.6)
    assert final_reward(1.0, 1.0, 1.0, weight=1.0) == 2.5
    assert final_reward(1.0, 1.0, 0.0, weight=0.0) == 1.0
    assert final_reward(0.0, 0.0, 1.0, weight=1.0) == 0.5
    assert final_reward(1.0, 1.0, 0.0, weight=0.0, form="external") == 1.0
    assert final_reward(0.0, 1.0, 0.0, weight=1.0, form="external") == 1.0
    assert final_reward(0.0, 0.0, 1.0, weight=1.0, form="external") == 0.5


def test_final_reward_refuses_another_form():
    with pytest.raises(ValueError, match=r"expected form 'gated' .* got 'inside'"):
        final_reward(1.0, 1.0, 1.0, form="inside")


@pytest.mark.parametrize("consistency", [-1.0, 0.0, 0.25, 1.0, 7.0])
def test_gated_a_wrong_verdict_earns_the_same_whatever_the_judge_says(consistency):
    assert final_reward(0.0, consistency, 1.0) == 0.5
    assert final_reward(0.0, consistency, 0.0) == 0.0


def test_right_but_inconsistent_earns_1_not_one_half():
    """Released code: consistency is -1 for a no, so that Eq. 2 gives 1 - 0.5."""
    consistency = sr.consistency_reward("no")
    assert final_reward(result=1, consistency=consistency, format=0) == 1.0
    assert final_reward(result=1, consistency=-1, format=0) == 0.5


# --------------------------------------------------------------------------------------------------
# Advantages over the batch


def lone_failure(n):
    """n - 1 rewards of 1 and a last one of 0, whose z-score is -sqrt(n - 1)."""
    rewards = torch.ones(n, dtype=torch.float64)
    rewards[-1] = 0
    return rewards


def slow_z_scores(rewards):
    mean = fmean(rewards)
    std = pstdev(rewards)
    return [(reward - mean) / (std + 1e-8) for reward in rewards]


def slow_advantages(rewards, sigma):
    return [z if abs(z) <= sigma else 0.0 for z in slow_z_scores(rewards)]


def test_advantages_by_hand():
    """Mean 1, deviations 1, .5, -.5, -1, population variance 2.5 / 4, std .790569."""
    rewards = float64([2, 1.5, 0.5, 0])
    advantage, kept = advantages(rewards)
    by_hand = float64([1.264911, 0.632456, -0.632456, -1.264911])
    assert_close(advantage, by_hand, atol=1e-6, rtol=0)
    assert kept.all()
    centred, _ = advantages(rewards, sigma=None, scale=False)
    assert centred.tolist() == [1, 0.5, -0.5, -1]


def test_the_papers_batch_of_255_to_1():
    """
    Section 2.1: mean 255/256, population std sqrt(255)/256, so the failure is at -sqrt(255) =
    -15.9687 (printed: -15.96) and the others are at 1 / sqrt(255).
    """
    advantage, kept = advantages(lone_failure(256), sigma=None)
    assert math.trunc(advantage[-1].item() * 100) == -1596
    assert advantage[-1].item() == pytest.approx(-math.sqrt(255), abs=1e-5)
    assert advantage[0].item() == pytest.approx(1 / math.sqrt(255), abs=1e-6)
    assert kept.all()

    filtered, kept = advantages(lone_failure(256))
    assert kept.tolist() == [True] * 255 + [False]
    assert filtered[-1] == 0
    # mean and std are those of the whole batch, the failure included
    assert torch.equal(filtered[:255], advantage[:255])


@pytest.mark.parametrize("n, stays", [(9, True), (10, True), (11, False), (12, False)])
@pytest.mark.parametrize("sign", [1, -1], ids=["failure", "success"])
def test_the_bound_is_3_standard_deviations_and_3_itself_stays(n, stays, sign):
    """The lone one of ten is at exactly 3, of eleven at 3.162."""
    advantage, kept = advantages(sign * lone_failure(n))
    assert kept[:-1].all()
    assert kept[-1] == stays
    assert (advantage[-1] != 0) == stays


@pytest.mark.parametrize("n, stays", [(20, True), (21, False)])
def test_the_bound_for_two_failures(n, stays):
    """They are at -sqrt(n / 2 - 1): exactly -3 of 20, -3.082 of 21."""
    rewards = torch.ones(n)
    rewards[:2] = 0
    _, kept = advantages(rewards)
    assert kept.all() == stays


def test_the_bound_is_sigma():
    advantage, kept = advantages(lone_failure(12), sigma=4)
    assert kept.all()
    assert advantage[-1].item() == pytest.approx(-math.sqrt(11), abs=1e-6)
    rewards = float64([1, 0, 0])
    advantage, _ = advantages(rewards, sigma=None)
    _, kept = advantages(rewards, sigma=advantage[0].item())  # at the bound, to the last bit
    assert kept.all()


def test_one_wrong_judgement_of_eight_survives_the_filter():
    """
    Mean 1.75, std .661: A is .378 seven times and -2.646. Released code compares A with the raw
    mean +- 3, which is -1.25 to 4.75, and drops the only negative signal of the batch.
    """
    advantage, kept = advantages(2 * lone_failure(8))
    assert kept.all()
    assert_close(advantage, float64([0.37796] * 7 + [-2.64575]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("sigma", [3.0, 1.0, None])
@pytest.mark.parametrize("seed", range(8))
def test_advantages_against_the_slow_version(seed, sigma):
    rng = random.Random(seed)
    rewards = [2.0] * rng.randrange(2, 200)
    for row in range(0, len(rewards), 5):
        rewards[row] = rng.choice([0, 0.5, 1, 1.5, 2])
    bound = math.inf if sigma is None else sigma
    advantage, kept = advantages(float64(rewards), sigma)
    assert_close(advantage, float64(slow_advantages(rewards, bound)), atol=1e-9, rtol=1e-9)
    assert kept.tolist() == [abs(z) <= bound for z in slow_z_scores(rewards)]


def test_advantages_ignore_shift_scale_and_order():
    rewards = random_numbers(50, seed=1)
    advantage, kept = advantages(rewards, sigma=1.5)
    assert 0 < kept.sum() < 50  # the filter acts here
    assert_close(advantages(rewards * 40 - 7, sigma=1.5)[0], advantage, atol=1e-6, rtol=1e-6)
    assert_close(advantages(-rewards, sigma=1.5)[0], -advantage, atol=1e-9, rtol=0)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(2))
    assert_close(advantages(rewards[order], sigma=1.5)[0], advantage[order], atol=1e-12, rtol=0)


@pytest.mark.parametrize("value", [0.0, 0.1, 1.0, 1 / 3, 2.0, 1e6 + 0.1])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 255, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_zero(value, n, dtype):
    """0.1 + 0.1 + 0.1 is not 0.3, and what a mean is off by would be divided by 0 + 1e-8."""
    advantage, kept = advantages(torch.full((n,), value, dtype=dtype))
    assert advantage.tolist() == [0] * n
    assert advantage.dtype == dtype
    assert kept.all()


def test_advantages_of_nothing():
    advantage, kept = advantages(torch.tensor([]))
    assert advantage.shape == kept.shape == (0,)
    advantage, kept = advantages(torch.ones(2, 3), mask=torch.zeros(2, 3))
    assert (advantage == 0).all()
    assert kept.all()


def test_advantages_are_float32_at_least():
    from_integers, _ = advantages(torch.tensor([1, 0, 0, 1]))
    assert from_integers.tolist() == [1, -1, -1, 1]
    large = torch.tensor([60000.0, 60000], dtype=torch.float16)  # their sum is beyond float16
    from_float16, _ = advantages(large)
    assert from_float16.tolist() == [0, 0]
    assert from_integers.dtype == from_float16.dtype == torch.float32


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_an_error_that_names_its_row(bad):
    """Released code turns such advantages into 0 in silence."""
    with pytest.raises(ValueError, match=r"rows \[\[2\]\]"):
        advantages(torch.tensor([1.0, 0.0, bad]))
    with pytest.raises(ValueError, match=r"rows \[\[0\], (\[\d\], ){6}\[7\]\] here"):  # 8 of 20
        advantages(torch.full((20,), bad))
    with pytest.raises(ValueError, match=r"rows \[\[1\]\]"):
        group_advantages(torch.tensor([1.0, bad]), torch.tensor([0, 0]))


@pytest.mark.parametrize("sigma, scale", [(0, True), (-3, True), (3.0, False)])
def test_advantages_refuse_a_sigma_without_meaning(sigma, scale):
    with pytest.raises(ValueError, match=f"expected sigma above 0.* got sigma {sigma}"):
        advantages(torch.tensor([1.0, 0]), sigma=sigma, scale=scale)


@pytest.mark.slow
def test_advantages_are_the_same_on_two_real_ranks(tmp_path):
    command = [sys.executable, TWO_RANKS, tmp_path]
    both = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert both.returncode == 0, both.stderr


# --------------------------------------------------------------------------------------------------
# Advantages of tokens: Reinforce++ with a KL penalty in the reward


def test_returns_to_go_against_the_slow_version():
    _, _, rewards, mask = random_batch()
    kl = random_numbers(6, 5, seed=3)
    tokens = mask.bool()
    returns = returns_to_go(rewards, torch.where(tokens, kl, math.nan), mask, coefficient=0.3)
    assert (returns[~tokens] == 0).all()
    for row, token in tokens.nonzero().tolist():
        penalty = sum(kl[row, later].item() for later in range(token, 5) if tokens[row, later])
        expected = rewards[row].item() - 0.3 * penalty
        assert returns[row, token].item() == pytest.approx(expected)


def test_the_kl_penalty_is_a_reward_and_not_a_loss():
    _, _, rewards, mask = random_batch()
    kl = torch.ones(6, 5, requires_grad=True)
    assert not returns_to_go(rewards, kl, mask, coefficient=0.1).requires_grad


def test_advantages_of_tokens_look_at_response_tokens_only():
    mask = random_batch()[3].bool()
    returns = random_numbers(6, 5, seed=4)
    advantage, kept = advantages(torch.where(mask, returns, math.nan), sigma=1.2, mask=mask)
    expected = slow_advantages(returns[mask].tolist(), 1.2)
    assert_close(advantage[mask], float64(expected), atol=1e-9, rtol=0)
    assert not kept.all()
    assert kept[~mask].all()


@pytest.mark.parametrize("seed", range(20))
def test_the_advantage_of_padding_is_exactly_zero(seed):
    """Although the mean of the other tokens is rounded."""
    mask = random_batch()[3].bool()
    advantage, _ = advantages(random_numbers(6, 5, seed=seed) + 0.1, mask=mask)
    assert (advantage[~mask] == 0).all()


# --------------------------------------------------------------------------------------------------
# Slow versions of the losses


class Row(NamedTuple):
    """One judgement without its padding, in Python floats."""

    logps: list
    old_logps: list
    a: float

    def tokens(self):
        return zip(self.logps, self.old_logps)


def to_rows(logps, old_logps, advantage, mask):
    rows = []
    for i, a in enumerate(advantage.tolist()):
        tokens = mask[i].bool()
        rows.append(Row(logps[i, tokens].tolist(), old_logps[i, tokens].tolist(), a))
    return rows


def slow_average(losses, loss_agg, max_tokens=1024):
    """Of a list for each judgement, with the losses of its tokens."""
    sums = [sum(row) for row in losses]
    if loss_agg == "tokens":
        return sum(sums) / sum(len(row) for row in losses)
    if loss_agg == "sequences":
        return fmean(fmean(row) for row in losses)
    if loss_agg == "sums":
        return fmean(sums)
    if loss_agg == "constant":
        return fmean(sums) / max_tokens


def slow_token_loss(logp, old_logp, a, clip, eps, eps_high):
    """Algorithm 1 of the paper."""
    log_ratio = logp - old_logp
    if clip is not None:
        log_ratio = max(log_ratio, math.log(1 / clip))
        log_ratio = min(log_ratio, math.log(clip))
    ratio = math.exp(log_ratio)
    clipped = max(ratio, 1 - eps)
    clipped = min(clipped, 1 + (eps if eps_high is None else eps_high))
    return -min(ratio * a, clipped * a)


def slow_policy_loss(rows, clip=None, eps=0.2, eps_high=None, loss_agg="tokens", max_tokens=1024):
    losses = []
    for row in rows:
        bounds = (row.a, clip, eps, eps_high)
        losses.append([slow_token_loss(logp, old, *bounds) for logp, old in row.tokens()])
    return slow_average(losses, loss_agg, max_tokens)


def slow_cispo(rows, eps_high=4.0):
    losses = []
    for row in rows:
        for logp, old_logp in row.tokens():
            weight = min(math.exp(logp - old_logp), 1 + eps_high)
            losses.append(-weight * row.a * logp)
    return fmean(losses)


def slow_dual_clip(rows, eps=0.2):
    losses = []
    for row in rows:
        for logp, old_logp in row.tokens():
            loss = slow_token_loss(logp, old_logp, row.a, None, eps, None)
            losses.append(min(loss, -3 * row.a) if row.a < 0 else loss)
    return fmean(losses)


def slow_cpgd(rows, eps=0.2):
    losses = []
    for row in rows:
        for logp, old_logp in row.tokens():
            log_ratio = logp - old_logp
            clipped = max(log_ratio, math.log(1 - eps))
            clipped = min(clipped, math.log(1 + eps))
            losses.append(-min(log_ratio * row.a, clipped * row.a))
    return fmean(losses)


def slow_topr(rows):
    losses = []
    for row in rows:
        ratio = math.exp(sum(row.logps) - sum(row.old_logps))
        weight = 1 if row.a >= 0 else min(ratio, 1)
        losses.append(-weight * row.a * sum(row.logps))
    return fmean(losses)


def slow_rloo(rows):
    return fmean(-row.a * sum(row.logps) for row in rows)


SLOW = {  # name: (function, what it is given besides the algorithm's own options)
    "stable_reinforce": (slow_policy_loss, {"clip": 1e3}),
    "reinforce++": (slow_policy_loss, {}),
    "ppo": (slow_policy_loss, {}),
    "grpo": (slow_policy_loss, {"loss_agg": "sequences"}),
    "dr_grpo": (slow_policy_loss, {"loss_agg": "constant"}),
    "rloo": (slow_rloo, {}),
    "dapo": (slow_policy_loss, {"eps_high": 0.28}),
    "cispo": (slow_cispo, {}),
    "dual_clip": (slow_dual_clip, {}),
    "cpgd": (slow_cpgd, {}),
    "topr": (slow_topr, {}),
}
OTHER_VALUES = {"clip": 2.0, "eps": 0.05, "eps_high": 0.1, "max_tokens": 50}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ALGORITHMS)
def test_losses_against_the_slow_versions(name, seed):
    """With the default of every option, then with another value of all that the algorithm takes."""
    batch = random_batch(seed=seed, spread=4.0)  # some ratios are beyond 1e3
    rows = to_rows(*batch)
    slow_loss, given = SLOW[name]
    algorithm = ALGORITHMS[name]
    loss, _ = algorithm.loss(*batch)
    assert loss.item() == pytest.approx(slow_loss(rows, **given), rel=1e-9)

    options = {option: OTHER_VALUES[option] for option in algorithm.options}
    loss, _ = algorithm.loss(*batch, **options)
    assert loss.item() == pytest.approx(slow_loss(rows, **(given | options)), rel=1e-9)


@pytest.mark.parametrize("clip", [1e3, 148.0, 2.0, None])
@pytest.mark.parametrize("loss_agg", sr.LOSS_AGGS)
@pytest.mark.parametrize("eps_high", [None, 0.28])
def test_policy_loss_against_the_slow_version(clip, loss_agg, eps_high):
    options = {"clip": clip, "eps": 0.1, "eps_high": eps_high, "loss_agg": loss_agg}
    for seed in range(4):
        batch = random_batch(seed=seed, spread=4.0)
        loss, _ = policy_loss(*batch, **options)
        expected = slow_policy_loss(to_rows(*batch), **options)
        assert loss.item() == pytest.approx(expected, rel=1e-9)


# --------------------------------------------------------------------------------------------------
# The pre-clip and StableReinforce's loss


def test_the_papers_four_tokens():
    """Section 2.1: 19930.4, 1.1, -0.5 and 67.1 without the pre-clip. Padding is NaN here."""
    logps = torch.full((4, 8), math.nan)
    old_logps = torch.full((4, 8), math.nan)
    mask = torch.zeros(4, 8)
    logps[:, 0] = -0.1
    old_logps[:, 0] = torch.tensor([-10, -0.2, -0.2, -5])
    mask[:, 0] = 1
    batch = (logps, old_logps, torch.tensor([-1, -1, 0.5, -0.5]), mask)
    for clip, first in ((None, "1.9930e+04"), (1e3, "1.0000e+03")):
        losses = []
        for row in range(4):
            loss, _ = policy_loss(*[tensor[row : row + 1] for tensor in batch], clip=clip)
            losses.append(loss.item())
        expected = [first, "1.1052e+00", "-5.5259e-01", "6.7145e+01"]
        assert [f"{loss:.4e}" for loss in losses] == expected
        mean, _ = policy_loss(*batch, clip=clip)
        assert mean.item() == pytest.approx(sum(losses) / 4, rel=1e-6)


def test_pre_clip_is_the_identity_inside_and_constant_outside():
    log_ratio = float64([-1e4, -6.91, -6.90, -1, 0, 1, 6.90, 6.91, 1e4])
    bound = math.log(1e3)  # 6.9078
    clipped = [-bound, -bound, -6.90, -1, 0, 1, 6.90, bound, bound]
    assert sr.pre_clip(log_ratio).tolist() == clipped
    assert torch.equal(sr.pre_clip(log_ratio, None), log_ratio)


@pytest.mark.parametrize("delta", [0, 1, 0.5, -1e3, math.nan])
def test_pre_clip_refuses_a_delta_that_is_not_above_1(delta):
    with pytest.raises(ValueError, match=f"expected delta above 1 .* got {delta}"):
        sr.pre_clip(torch.zeros(1), delta)


def test_the_gradient_is_exactly_zero_outside_the_pre_clip():
    """Also where PPO's own clip would let it through: A < 0 and a huge ratio."""
    logps = torch.tensor([[-0.1, -0.1, -9.9, -1.9]])
    old_logps = torch.tensor([[-10.0, -10.0, -0.1, -2.0]])
    advantage = torch.tensor([[-1.0, 1.0, 1.0, -1.0]])
    batch = (logps, old_logps, advantage, torch.ones(1, 4))
    _, gradient = loss_and_gradient(policy_loss, *batch)
    assert gradient[0, :3].tolist() == [0, 0, 0]
    assert gradient[0, 3] > 0
    _, gradient = loss_and_gradient(policy_loss, *batch, clip=None)
    assert gradient[0, 0].item() == pytest.approx(math.exp(9.9) / 4, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [10, 100, 1e3, 1e4])
def test_loss_gradient_and_statistics_stay_finite(dtype, size):
    """Those of Reinforce++ do not: exp overflows, and 0 * inf in the backward pass is NaN."""
    logps = torch.tensor([[-size, 0.0, -size, 0.0]], dtype=dtype)
    old_logps = torch.tensor([[0.0, -size, 0.0, -size]], dtype=dtype)
    batch = (logps, old_logps, float64([[1, 1, -1, -1]]), torch.ones(1, 4))
    loss, gradient = loss_and_gradient(policy_loss, *batch)
    assert loss.isfinite()
    assert loss.dtype == torch.float32
    assert gradient.isfinite().all()
    assert gradient.dtype == dtype
    _, statistics = policy_loss(*batch)
    assert all(value.isfinite() for value in statistics.values())

    loss, gradient = loss_and_gradient(neighbours.ppo_loss, *batch)
    fits = size < 50
    assert loss.isfinite() == fits
    assert gradient.isfinite().all() == fits


@pytest.mark.parametrize("a, expected", [(1.0, "nan"), (-1.0, "inf")])
def test_an_overflowing_ratio_ruins_ppo_and_not_stable_reinforce(a, expected):
    batch = (torch.tensor([[199.0]]), torch.zeros(1, 1), torch.tensor([a]), torch.ones(1, 1))
    _, gradient = loss_and_gradient(neighbours.ppo_loss, *batch)
    assert str(gradient.item()) == expected
    loss, gradient = loss_and_gradient(policy_loss, *batch)
    assert loss.isfinite()
    assert gradient == 0


@pytest.mark.parametrize("clip", [1e3, None])
def test_a_filtered_judgement_adds_exactly_nothing(clip):
    """A = 0 with an overflowing ratio must be 0, not 0 * inf = NaN."""
    logps = torch.tensor([[-1.0], [0.0]])
    old_logps = torch.tensor([[-1.0], [-500.0]])
    batch = (logps, old_logps, torch.tensor([2.0, 0.0]), torch.ones(2, 1))
    loss, gradient = loss_and_gradient(policy_loss, *batch, clip=clip)
    assert loss == -1
    assert gradient.tolist() == [[-1], [0]]


def test_at_the_first_update_the_gradient_is_minus_the_advantage():
    logps, _, advantage, mask = random_batch()
    loss, gradient = loss_and_gradient(policy_loss, logps, logps, advantage, mask)
    weighted = advantage[:, None] * mask / mask.sum()
    assert_close(loss, -weighted.sum())
    assert_close(gradient, -weighted)


@pytest.mark.parametrize("eps_high, upper", [(None, 1.2), (0.5, 1.5)])
@pytest.mark.parametrize("a", [1.0, -1.0])
def test_where_ppo_clips_the_gradient_stops(eps_high, upper, a):
    ratios = [0.79, 0.81, 1.19, 1.21, 1.49, 1.51]
    log_ratios = float64([ratios]).log()
    batch = (log_ratios, torch.zeros_like(log_ratios), float64([a]), torch.ones(1, 6))
    _, gradient = loss_and_gradient(policy_loss, *batch, eps_high=eps_high)
    expected = []
    for ratio in ratios:
        stopped = ratio > upper if a > 0 else ratio < 0.8
        expected.append(0 if stopped else -a * ratio / 6)
    assert gradient[0].tolist() == pytest.approx(expected)


def test_what_the_filter_and_the_pre_clip_are_for():
    """A saturated batch whose lone failure was sampled from a stale policy, at a ratio of e^8."""
    logps = torch.full((256, 1), -1.0)
    old_logps = logps.clone()
    old_logps[-1] = -9.0
    mask = torch.ones(256, 1)
    others = 1 / math.sqrt(255) / 256
    largest = {}
    for name in ("reinforce++", "stable_reinforce"):
        advantage, _ = ALGORITHMS[name].advantages(lone_failure(256))
        batch = (logps, old_logps, advantage, mask)
        _, gradient = loss_and_gradient(ALGORITHMS[name].loss, *batch)
        largest[name] = gradient.abs().max().item()
    expected = math.exp(8) * math.sqrt(255) / 256  # 185.9
    assert largest["reinforce++"] == pytest.approx(expected, rel=1e-4)
    assert largest["stable_reinforce"] == pytest.approx(others, rel=1e-4)  # 0.00024

    # the pre-clip alone: e^8 > 1e3
    advantage, _ = advantages(lone_failure(256), sigma=None)
    _, gradient = loss_and_gradient(policy_loss, logps, old_logps, advantage, mask)
    assert gradient[-1] == 0
    assert gradient[0].item() == pytest.approx(-others, rel=1e-4)


def test_advantages_may_differ_from_token_to_token():
    """As if each token were a judgement of its own; equal ones are like a (B,) advantage."""
    logps, old_logps, advantage, mask = random_batch(spread=2.0)
    each = random_numbers(6, 5, seed=9)
    single = [tensor.reshape(30, 1) for tensor in (logps, old_logps, mask)]
    loss, _ = policy_loss(logps, old_logps, each, mask)
    expected, _ = policy_loss(single[0], single[1], each.reshape(30), single[2])
    assert_close(loss, expected)
    loss, _ = policy_loss(logps, old_logps, advantage[:, None].expand(6, 5), mask)
    expected, _ = policy_loss(logps, old_logps, advantage, mask)
    assert torch.equal(loss, expected)


# --------------------------------------------------------------------------------------------------
# What holds for every loss


@pytest.fixture(params=ALGORITHMS)
def algorithm(request):
    return ALGORITHMS[request.param]


def padded(values, mask, junk):
    """A row and three columns more, and junk in all padding."""
    wide = torch.full((7, 8), junk, dtype=values.dtype)
    wide[:6, :5] = torch.where(mask.bool(), values, junk)
    return wide


@pytest.mark.parametrize("junk", [0.0, 1e30, math.nan, math.inf, -math.inf])
def test_padding_changes_nothing_whatever_it_holds(algorithm, junk):
    logps, old_logps, advantage, mask = random_batch()
    loss, gradient = loss_and_gradient(algorithm.loss, logps, old_logps, advantage, mask)
    wide = (
        padded(logps, mask, junk),
        padded(old_logps, mask, junk),
        torch.cat([advantage, float64([7.0])]),
        padded(mask, mask, 0.0),
    )
    wide_loss, wide_gradient = loss_and_gradient(algorithm.loss, *wide)
    assert_close(wide_loss, loss, atol=1e-12, rtol=1e-12)
    assert_close(wide_gradient, padded(gradient, mask, 0.0), atol=1e-12, rtol=1e-12)


def test_the_advantage_of_padding_changes_nothing():
    logps, old_logps, _, mask = random_batch()
    each = random_numbers(6, 5, seed=9)
    loss, gradient = loss_and_gradient(policy_loss, logps, old_logps, each, mask)
    junk = torch.where(mask.bool(), each, math.nan)
    same_loss, same_gradient = loss_and_gradient(policy_loss, logps, old_logps, junk, mask)
    assert_close(same_loss, loss)
    assert_close(same_gradient, gradient)


@pytest.mark.parametrize("sizes", [[8], [1] * 8, [3, 5], [6, 1, 1]])
def test_micro_batches_add_up_to_the_whole_batch_in_any_order(algorithm, sizes):
    batch = random_batch(B=8, seed=4, spread=3.0)
    loss, gradient = loss_and_gradient(algorithm.loss, *batch)
    denominator = sr.normaliser(batch[-1], algorithm.loss_agg)
    total = 0.0
    parts = torch.zeros_like(gradient)
    order = torch.tensor([5, 0, 7, 2, 1, 6, 3, 4])
    for rows in order.split(sizes):
        part = [tensor[rows] for tensor in batch]
        result = loss_and_gradient(algorithm.loss, *part, denominator=denominator)
        total += result[0]
        parts[rows] = result[1]
    assert_close(total, loss, atol=1e-12, rtol=1e-12)
    assert_close(parts, gradient, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", sorted(ALGORITHMS.keys() - {"cispo", "topr"}))
def test_gradients_agree_with_finite_differences(name):
    """In float64, away from the kinks. The two that stop a gradient follow."""
    logps, *rest = random_batch(B=4, T=3, seed=2)

    def loss_of(logps):
        return ALGORITHMS[name].loss(logps, *rest)[0]

    assert torch.autograd.gradcheck(loss_of, logps.requires_grad_(), eps=1e-7, atol=1e-5)


def test_the_gradient_of_cispo_is_minus_the_clipped_ratio_times_the_advantage():
    batch = random_batch(spread=2.0)
    logps, old_logps, advantage, mask = batch
    _, gradient = loss_and_gradient(neighbours.cispo_loss, *batch)
    weight = (logps - old_logps).exp().clamp(max=5)
    assert (weight[mask.bool()] == 5).any()
    assert_close(gradient, -weight * advantage[:, None] * mask / mask.sum())


def test_the_gradient_of_topr_is_minus_its_weight_times_the_advantage():
    batch = random_batch()
    logps, old_logps, advantage, mask = batch
    _, gradient = loss_and_gradient(neighbours.topr_loss, *batch)
    truncated = ((logps - old_logps) * mask).sum(1).exp().clamp(max=1)
    weight = torch.where(advantage < 0, truncated, 1.0)
    assert (weight < 1).any()
    assert_close(gradient, -(weight * advantage)[:, None] * mask / 6)


def test_a_better_judgement_becomes_likelier(algorithm):
    batch = random_batch(spread=0.05)
    _, _, advantage, mask = batch
    _, gradient = loss_and_gradient(algorithm.loss, *batch)
    assert torch.equal(gradient.sign(), -advantage.sign()[:, None] * mask)


def test_no_gradient_flows_into_old_log_probabilities_or_advantages(algorithm):
    logps, old_logps, advantage, mask = random_batch()
    for tensor in (logps, old_logps, advantage):
        tensor.requires_grad_()
    loss, _ = algorithm.loss(logps, old_logps, advantage, mask)
    loss.backward()
    assert logps.grad is not None
    assert old_logps.grad is None
    assert advantage.grad is None


def test_at_ratio_1_the_losses_over_tokens_share_one_gradient():
    logps, _, advantage, mask = random_batch()
    _, expected = loss_and_gradient(policy_loss, logps, logps, advantage, mask)
    for name, algorithm in ALGORITHMS.items():
        if algorithm.loss_agg == "tokens":
            _, gradient = loss_and_gradient(algorithm.loss, logps, logps, advantage, mask)
            assert_close(gradient, expected, msg=name)


def test_a_batch_without_tokens_is_zero_and_not_nan(algorithm):
    zeros = torch.zeros(2, 3)
    loss, gradient = loss_and_gradient(algorithm.loss, zeros, zeros, torch.ones(2), zeros)
    assert loss == 0
    assert (gradient == 0).all()
    nothing = torch.zeros(0, 3)
    loss, statistics = algorithm.loss(nothing, nothing, torch.zeros(0), nothing)
    assert loss == 0
    assert all(value == 0 for value in statistics.values())


def test_shapes_that_would_broadcast_are_refused(algorithm):
    """(B, T) against (B, 1), or an advantage too few, would give a number that means nothing."""
    logps, old_logps, advantage, mask = random_batch()
    for bad in (
        (logps, old_logps[:, :1], advantage, mask),
        (logps, old_logps, advantage[:, None], mask),
        (logps, old_logps, advantage[None], mask),
        (logps, old_logps, advantage[:5], mask),
        (logps, old_logps, advantage, mask[:1]),
    ):
        with pytest.raises(ValueError, match=r"expected .*shape.* got"):
            algorithm.loss(*bad)


def test_other_shapes_and_names_that_are_refused():
    logps, old_logps, advantage, mask = random_batch()
    with pytest.raises(ValueError, match="expected rewards and mask of the same shapes"):
        advantages(advantage[:3], mask=torch.ones(3, 3))
    with pytest.raises(ValueError, match=r"expected shapes .* got rewards"):
        returns_to_go(advantage[:2], torch.zeros(1, 3), torch.ones(1, 3), 0.1)
    with pytest.raises(ValueError, match="since TOPR weighs whole judgements"):
        neighbours.topr_loss(logps, old_logps, advantage[:, None].expand(6, 5), mask)
    with pytest.raises(ValueError, match=r"expected loss_agg to be one of tokens, .* got 'batch'"):
        policy_loss(logps, old_logps, advantage, mask, loss_agg="batch")
    with pytest.raises(ValueError, match=r"expected loss_agg to be one of tokens, .* got 'batch'"):
        policy_loss(logps, old_logps, advantage, mask, loss_agg="batch", denominator=3)
    with pytest.raises(ValueError, match=r"expected shapes .* got \(6, 5, 1\)"):
        policy_loss(*[values[..., None] for values in (logps, old_logps, logps, mask)])
    with pytest.raises(ValueError, match=r"expected kind 'grpo', .* got 'best_of_n'"):
        group_advantages(advantage, torch.zeros(6), "best_of_n")


# --------------------------------------------------------------------------------------------------
# Statistics


def statistics_of(log_ratios, advantage, mask=None, loss_function=policy_loss, **options):
    """Those of one judgement, or of the rows given, with old log-probabilities of 0."""
    if mask is None:
        mask = torch.ones_like(log_ratios)
    _, statistics = loss_function(
        log_ratios, torch.zeros_like(log_ratios), advantage, mask, **options
    )
    return {name: value.item() for name, value in statistics.items()}


# five tokens and a sixth that is padding
SIX_TOKENS = float64([[8, -9, math.log(1.5), math.log(0.5), 0, 50]])
SIX_ADVANTAGES = float64([[1, -1, 1, -1, 1, 1]])
FIVE_OF_SIX = float64([[1, 1, 1, 1, 1, 0]])


def test_statistics_by_hand():
    """
    The bound is log 100 = 4.605: ratios after the pre-clip are 100, .01, 1.5, .5, 1. The first and
    the third are clipped above, the second and the fourth below.
    """
    statistics = statistics_of(SIX_TOKENS, SIX_ADVANTAGES, FIVE_OF_SIX, clip=100)
    kl = sum(ratio - 1 - math.log(ratio) for ratio in (100, 0.01, 1.5, 0.5, 1))
    expected = {
        "tokens": 5,
        "ratio_mean": 103.01 / 5,
        "ratio_max": 100,
        "log_ratio_max": 9,
        "preclipped": 0.4,
        "clipped_low": 0.4,
        "clipped_high": 0.4,
        "kl": kl / 5,
        "token_loss_max": 0.8,
    }
    assert statistics == pytest.approx(expected, rel=1e-6)


def test_statistics_where_ppo_does_not_clip():
    statistics = statistics_of(SIX_TOKENS, -SIX_ADVANTAGES, FIVE_OF_SIX, clip=None)
    assert statistics["clipped_low"] == statistics["clipped_high"] == statistics["preclipped"] == 0
    assert statistics["ratio_max"] == pytest.approx(math.exp(8))
    assert statistics["token_loss_max"] == pytest.approx(math.exp(8))  # A = -1 of the first token


def test_a_filtered_judgement_is_not_clipped_it_is_gone():
    statistics = statistics_of(SIX_TOKENS, 0 * SIX_ADVANTAGES, FIVE_OF_SIX)
    assert statistics["clipped_low"] == statistics["clipped_high"] == 0


def test_statistics_know_of_the_higher_clip():
    statistics = statistics_of(SIX_TOKENS, SIX_ADVANTAGES, FIVE_OF_SIX, eps_high=0.6)
    assert statistics["clipped_high"] == pytest.approx(0.2)  # 1.5 is inside now
    assert statistics["clipped_low"] == pytest.approx(0.4)


def test_maxima_of_ratios_below_1():
    mask = float64([[1, 1, 1, 1, 0, 0]])
    statistics = statistics_of(-SIX_TOKENS.abs(), SIX_ADVANTAGES, mask, clip=1e9)
    assert statistics["ratio_max"] == pytest.approx(1 / 1.5)  # not the 1 of the padding
    assert statistics["log_ratio_max"] == 9  # the largest in size, though negative


def test_the_largest_token_loss_is_0_where_all_are_gains():
    assert statistics_of(torch.zeros(1, 4), torch.ones(1))["token_loss_max"] == 0


def test_log_ratios_of_bfloat16_are_taken_in_float32():
    """-0.1 is -0.1001 in bfloat16; the difference to -10 would be rounded to 9.875."""
    logps = torch.tensor([[-0.1]], dtype=torch.bfloat16)
    old_logps = torch.tensor([[-10.0]], dtype=torch.bfloat16)
    _, statistics = policy_loss(logps, old_logps, torch.ones(1), torch.ones(1, 1))
    assert statistics["log_ratio_max"].item() == pytest.approx(9.899902)


def test_the_kl_of_a_policy_that_is_close_keeps_its_digits():
    """rho - 1 - log rho by subtraction would be rounding noise in float32."""
    statistics = statistics_of(torch.full((1, 4), 1e-4), torch.ones(1))
    assert statistics["kl"] == pytest.approx(5e-9, rel=1e-2)


def test_at_a_bound_itself_nothing_is_clipped():
    ratio_1 = torch.zeros(1, 1)
    assert statistics_of(ratio_1, -torch.ones(1), eps=0)["clipped_low"] == 0
    assert statistics_of(ratio_1, torch.ones(1), eps=0)["clipped_high"] == 0
    assert statistics_of(torch.ones(1, 1), torch.ones(1), clip=math.e)["preclipped"] == 0


def test_statistics_have_no_gradient(algorithm):
    logps, *rest = random_batch()
    _, statistics = algorithm.loss(logps.requires_grad_(), *rest)
    assert not any(value.requires_grad for value in statistics.values())


def test_statistics_of_topr_say_which_sequences_were_truncated():
    """Those with a ratio above 1 and A < 0: the first row of five."""
    log_ratios = float64([[0.5, 0.5], [-0.5, -0.5], [0.0, 0.0], [0.5, 0.5], [0.5, 0.5]])
    advantage = float64([-1, -1, -1, 1, 0])
    statistics = statistics_of(log_ratios, advantage, loss_function=neighbours.topr_loss)
    assert statistics["clipped_high"] == pytest.approx(1 / 5)
    assert statistics["clipped_low"] == 0
    assert statistics["ratio_max"] == pytest.approx(math.exp(0.5))


def test_statistics_of_cispo_say_which_weights_were_clipped():
    """Ratios of e^2 > 5 and of e^-2 < .5, two judgements each, and one of 1."""
    log_ratios = float64([[2, 2], [-2, -2], [-2, -2], [0, 0], [2, 2]])
    advantage = float64([-1, -1, -1, -1, 1])
    statistics = statistics_of(log_ratios, advantage, loss_function=neighbours.cispo_loss, eps=0.5)
    assert statistics["clipped_high"] == pytest.approx(2 / 5)
    assert statistics["clipped_low"] == pytest.approx(2 / 5)


def test_rloo_clips_nothing_at_any_ratio():
    log_ratios = float64([[10.0], [-10.0]])
    statistics = statistics_of(log_ratios, float64([-1, 1]), loss_function=neighbours.rloo_loss)
    assert statistics["ratio_max"] == pytest.approx(math.exp(10))
    assert statistics["clipped_high"] == statistics["clipped_low"] == statistics["preclipped"] == 0
