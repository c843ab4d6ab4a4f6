"""
The neighbours of StableReinforce, core/neighbours.py: KL to a reference, advantages of a group, and
the algorithms by name. Their losses are tested with StableReinforce's, in test_stable_reinforce.py.
"""

import math
import random
from statistics import fmean, pstdev

import pytest
import torch
from torch.testing import assert_close

from core import neighbours
from core.neighbours import ALGORITHMS, group_advantages
from test_stable_reinforce import (
    float64,
    lone_failure,
    loss_and_gradient,
    random_batch,
)

# --------------------------------------------------------------------------------------------------
# KL to a reference


def test_kl_estimators_average_to_the_kl():
    """Exactly, over a distribution of three tokens: E[k1] = E[k3] = KL(pi || ref); k2 nearly."""
    pi = float64([0.5, 0.3, 0.2])
    reference = float64([0.4, 0.4, 0.2])
    exact = 0.5 * math.log(0.5 / 0.4) + 0.3 * math.log(0.3 / 0.4)
    mean = {}
    for name, estimator in neighbours.KL.items():
        mean[name] = (pi * estimator(pi.log(), reference.log())).sum().item()
    assert mean["k1"] == pytest.approx(exact)
    assert mean["k3"] == pytest.approx(exact)
    assert mean["k2"] == pytest.approx((0.5 * 0.22314**2 + 0.3 * 0.28768**2) / 2, rel=1e-4)
    assert mean["k2"] != pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("log_ratio", [-2.0, -0.1, 0.0, 0.7])
def test_kl_estimators_of_one_token(log_ratio):
    """log_ratio is log pi - log ref."""
    logp = torch.tensor(log_ratio)
    reference = torch.tensor(0.0)
    k3 = math.exp(-log_ratio) - 1 + log_ratio
    assert neighbours.kl_k1(logp, reference).item() == pytest.approx(log_ratio)
    assert neighbours.kl_k2(logp, reference).item() == pytest.approx(log_ratio**2 / 2)
    assert neighbours.kl_k3(logp, reference).item() == pytest.approx(k3, abs=1e-6)
    assert neighbours.kl_k3(logp, reference) >= 0


def test_k3_keeps_its_digits_near_zero():
    """exp(x) - x - 1 at 1e-3 in float32 has one right digit; the value is x^2 / 2 + x^3 / 6."""
    k3 = neighbours.kl_k3(torch.tensor(0.0), torch.tensor(1e-3)).item()
    assert k3 == pytest.approx(5.00167e-7, rel=1e-3)


def test_k3_stays_finite_where_the_policy_has_left_the_reference():
    """exp(89) overflows in float32; from a log-ratio of 20 on the term is constant."""
    logps = torch.tensor([-100.0, -1000.0, -1.0], requires_grad=True)
    k3 = neighbours.kl_k3(logps, torch.tensor([-1.0, -1.0, -90.0]))
    k3.sum().backward()
    constant = math.exp(20) - 21
    assert k3.tolist() == pytest.approx([constant, constant, 88.0], rel=1e-6)
    assert logps.grad.tolist() == [0.0, 0.0, 1.0]  # the last: 1 - rho, which cannot overflow


def test_k2_as_a_loss_has_the_gradient_of_the_kl_and_k1_has_none():
    logits = float64([0.3, -0.2, 0.5]).requires_grad_()
    reference = float64([0.4, 0.4, 0.2]).log()
    logps = logits.log_softmax(0)
    weights = logps.exp().detach()  # the expectation over samples, which has no gradient
    losses = {
        "exact": (logps.exp() * (logps - reference)).sum(),
        "k1": (weights * neighbours.kl_k1(logps, reference)).sum(),
        "k2": (weights * neighbours.kl_k2(logps, reference)).sum(),
    }
    gradients = {}
    for name, loss in losses.items():
        (gradients[name],) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert_close(gradients["k2"], gradients["exact"])
    assert_close(gradients["k1"], torch.zeros_like(logits), atol=1e-12, rtol=0)


# --------------------------------------------------------------------------------------------------
# Advantages of a group


def slow_group_advantage(reward, group, kind):
    """`group` is a list of the rewards of one prompt, `reward` among them."""
    if kind == "rloo":
        return reward - (sum(group) - reward) / (len(group) - 1)
    centred = reward - fmean(group)
    if kind == "dr_grpo":
        return centred
    return centred / (pstdev(group) + 1e-4)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_group_advantages_against_the_slow_version(kind):
    rng = random.Random(0)
    groups = rng.choices([3, 8, 5], k=30)
    rewards = rng.choices([0, 0.5, 1.5, 2], k=30)
    expected = []
    for reward, number in zip(rewards, groups):
        group = [other for other, its_number in zip(rewards, groups) if its_number == number]
        expected.append(slow_group_advantage(reward, group, kind))
    advantage, kept = group_advantages(float64(rewards), torch.tensor(groups), kind)
    assert_close(advantage, float64(expected), atol=1e-9, rtol=1e-9)
    assert kept.dtype == torch.bool
    assert kept.shape == (30,)
    assert kept.all()


def test_rewards_that_differ_by_rounding_are_no_preference():
    """With a floor of 1e-8, scores that differ by 1e-5 would be advantages of 1.4 and -1.4."""
    one_prompt = torch.zeros(4)
    rewards = float64([0.5, 0.5, 0.50001, 0.49999])
    assert group_advantages(rewards, one_prompt)[0].abs().max() < 0.1
    assert group_advantages(rewards, one_prompt, floor=1e-8)[0].abs().max() > 1.3
    half_points = float64([0.0, 0.5, 1.0, 0.5])  # differ by far more, and do not feel it
    advantage, _ = group_advantages(half_points, one_prompt)
    without_floor, _ = group_advantages(half_points, one_prompt, floor=1e-8)
    assert_close(advantage, without_floor, rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo"])
@pytest.mark.parametrize("n", range(1, 30))
def test_a_group_of_equal_rewards_gives_exactly_zero(kind, n):
    rewards = float64([0.1] * n + [1.0])
    advantage, _ = group_advantages(rewards, torch.tensor([0] * n + [5]), kind)
    assert (advantage == 0).all()


def test_rloo_needs_two_samples_of_a_prompt():
    advantage, _ = group_advantages(float64([1, 0]), torch.tensor([4, 4]), "rloo")
    assert advantage.tolist() == [1, -1]
    with pytest.raises(ValueError, match="group 5 has 1"):
        group_advantages(float64([1, 0, 1]), torch.tensor([4, 4, 5]), "rloo")


def test_group_advantages_have_no_filter():
    advantage, kept = group_advantages(lone_failure(12), torch.zeros(12))
    assert advantage[-1].item() == pytest.approx(-math.sqrt(11), rel=1e-3)
    assert kept.all()


def test_group_advantages_are_float32_at_least():
    groups = torch.tensor([4, 4])
    from_integers, _ = group_advantages(torch.tensor([1, 0]), groups)
    assert from_integers.dtype == torch.float32
    large = torch.tensor([60000.0, 60000], dtype=torch.float16)  # their sum is beyond float16
    from_float16, _ = group_advantages(large, groups)
    assert from_float16.dtype == torch.float32
    assert from_float16.tolist() == [0, 0]


def test_group_advantages_of_nothing():
    advantage, _ = group_advantages(torch.tensor([]), torch.tensor([], dtype=torch.long))
    assert advantage.shape == (0,)


# --------------------------------------------------------------------------------------------------
# The neighbours, by name


def test_cispo_may_have_a_lower_bound():
    batch = random_batch(spread=2.0)
    logps, old_logps, advantage, mask = batch
    loss, _ = neighbours.cispo_loss(*batch, eps=0.2, eps_high=0.28)
    weight = (logps - old_logps).exp().clamp(0.8, 1.28)
    assert_close(loss, -(weight * advantage[:, None] * logps * mask).sum() / mask.sum())


def test_a_dual_clip_bounds_the_loss_of_a_token_that_is_pushed_down():
    """At a ratio of 4 the loss is 3 |A| without a gradient; at 2, and where A > 0, it is PPO's."""
    logps = float64([[4.0], [2.0], [4.0]]).log()
    batch = (logps, torch.zeros(3, 1), float64([-2, -2, 2]), torch.ones(3, 1))
    loss, gradient = loss_and_gradient(neighbours.dual_clip_loss, *batch)
    assert loss == pytest.approx((3 * 2 + 2 * 2 - 1.2 * 2) / 3)
    assert_close(gradient, float64([[0], [2 * 2 / 3], [0]]))


def test_the_gradient_of_cpgd_is_the_advantage_or_nothing():
    """However far a token has moved; nothing where PPO's clip has nothing."""
    logps = float64([[4.0], [0.25], [4.0], [0.25], [1.1]]).log()
    advantage = float64([-1, -1, 1, 1, 1])
    batch = (logps, torch.zeros(5, 1), advantage, torch.ones(5, 1))
    _, gradient = loss_and_gradient(neighbours.cpgd_loss, *batch)
    assert_close(gradient, float64([[1], [0], [0], [-1], [-1]]) / 5)
    _, statistics = neighbours.cpgd_loss(*batch)
    assert statistics["clipped_low"] == statistics["clipped_high"] == pytest.approx(1 / 5)


def test_the_widest_clip_of_cpgd_has_no_lower_bound():
    logps = float64([[-20.0]])
    batch = (logps, torch.zeros(1, 1), float64([-1]), torch.ones(1, 1))
    loss, gradient = loss_and_gradient(neighbours.cpgd_loss, *batch, eps=1)
    assert loss == -20
    assert gradient == 1


NEVER_OVERFLOW = (
    neighbours.topr_loss,
    neighbours.cispo_loss,
    neighbours.dual_clip_loss,
    neighbours.cpgd_loss,
)


@pytest.mark.parametrize("loss_function", NEVER_OVERFLOW)
@pytest.mark.parametrize("log_ratio", [1e4, -1e4])
def test_bounded_losses_never_overflow(loss_function, log_ratio):
    logps = torch.full((2, 3), min(log_ratio, 0.0))
    old_logps = torch.full((2, 3), min(-log_ratio, 0.0))
    batch = (logps, old_logps, torch.tensor([1.0, -1.0]), torch.ones(2, 3))
    loss, gradient = loss_and_gradient(loss_function, *batch)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    _, statistics = loss_function(*batch)
    assert statistics["preclipped"] == 0


# The rewards of two prompts, 2 1 0 and 1 1 0. All six: mean 5/6, population variance 17/36.
# The first three: mean 1, variance 2/3; the others: mean 2/3, variance 2/9.
Z_SCORES = [1.69775, 0.24254, -1.21268, 0.24254, 0.24254, -1.21268]
CENTRED = [7 / 6, 1 / 6, -5 / 6, 1 / 6, 1 / 6, -5 / 6]
FIRST = 1 / (math.sqrt(2 / 3) + 1e-4)
SECOND = (1 / 3) / (math.sqrt(2 / 9) + 1e-4)
GROUP_Z_SCORES = [FIRST, 0, -FIRST, SECOND, SECOND, -2 * SECOND]
BY_HAND = {
    "stable_reinforce": Z_SCORES,
    "reinforce++": Z_SCORES,
    "ppo": CENTRED,
    "grpo": GROUP_Z_SCORES,
    "dr_grpo": [1, 0, -1, 1 / 3, 1 / 3, -2 / 3],
    "rloo": [1.5, 0, -1.5, 0.5, 0.5, -1],
    "dapo": GROUP_Z_SCORES,
    "cispo": GROUP_Z_SCORES,
    "dual_clip": Z_SCORES,
    "cpgd": Z_SCORES,
    "topr": CENTRED,
}
OVER_THE_BATCH = ("stable_reinforce", "reinforce++", "ppo", "dual_clip", "cpgd", "topr")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_advantages_of_each_algorithm_by_hand(name):
    sums_over_ranks = []

    def reduce(sums):
        sums_over_ranks.append(sums)
        return sums

    rewards = float64([2, 1, 0, 1, 1, 0])
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    advantage, kept = ALGORITHMS[name].advantages(rewards, groups, reduce)
    assert_close(advantage, float64(BY_HAND[name]), atol=1e-5, rtol=0)
    assert kept.all()
    assert len(sums_over_ranks) == (
        2 if name in OVER_THE_BATCH else 0
    )  # a prompt stays on one rank


def test_only_stable_reinforce_filters():
    for name, algorithm in ALGORITHMS.items():
        _, kept = algorithm.advantages(lone_failure(11), torch.zeros(11))
        assert kept[-1] == (name != "stable_reinforce"), name
        assert kept[:-1].all(), name


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
def test_token_rewards_are_for_the_algorithms_that_can_use_them(algorithm):
    mask = torch.tensor([[True, True], [True, False]])
    returns = float64([[2, 1], [0, math.nan]])
    logps = torch.zeros(2, 2)

    def loss_of_tokens():
        advantage, _ = algorithm.advantages(returns, torch.zeros(2), mask=mask)
        assert advantage.sign().tolist() == [[1, 0], [-1, 0]]
        return algorithm.loss(logps, logps, advantage, mask)

    if algorithm.token_rewards:
        loss_of_tokens()
    else:
        with pytest.raises((TypeError, ValueError), match=r"mask|whole judgements"):
            loss_of_tokens()
