"""
The algorithms that StableReinforce is compared with (section 2, appendix B). Each differs from it
only where its docstring says so. ALGORITHMS has all of them, StableReinforce too, by name.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from stable_reinforce import (
    advantages,
    average,
    check_finite,
    largest,
    per_token,
    policy_loss,
    ratio_statistics,
)

# --------------------------------------------------------------------------------------------------
# KL to a reference, for each token, from samples of pi (Schulman 2020, "Approximating KL
# Divergence"). The paper's coefficient is 0. rho = pi_ref / pi


def kl_k1(logps, reference_logps):
    """
    -log rho: unbiased, may be negative. For the reward: as a loss its expected gradient is 0.

    >>> kl_k1(torch.tensor([-1.]), torch.tensor([-1.5])).item()
    0.5
    """
    return logps - reference_logps


def kl_k2(logps, reference_logps):
    """
    (log rho)^2 / 2: biased, low variance; as a loss its expected gradient is that of the KL.

    >>> kl_k2(torch.tensor([-1.]), torch.tensor([-1.5])).item()
    0.125
    """
    return 0.5 * (logps - reference_logps).square()


def kl_k3(logps, reference_logps):
    """
    rho - 1 - log rho: unbiased, never negative (GRPO's choice); as a loss its expected gradient is
    that of KL(ref || pi).

    log rho is held at 20 or less: a token that the reference finds e^20 times likelier adds a
    constant 4.9e8 and no gradient, where exp would overflow from 89 on.

    >>> round(kl_k3(torch.tensor([-1.]), torch.tensor([-1.5])).item(), 5)
    0.10653
    """
    log_rho = (reference_logps - logps).clamp_max(20.0)
    return torch.expm1(log_rho) - log_rho  # expm1: near 0, exp(x) - 1 is rounding noise


KL = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


def returns_to_go(rewards, kl, mask, coefficient):
    """
    Reinforce++ with a KL penalty (arXiv:2501.03262): each token's reward less the penalty from
    there on, R_t = r - coefficient * sum of KL from t on. Then advantages(R, mask=mask).

    >>> kl, mask = torch.tensor([[.25, .5]]), torch.ones(1, 2)
    >>> returns_to_go(torch.tensor([1.]), kl, mask, coefficient=1.).tolist()
    [[0.25, 0.5]]
    """
    if kl.shape != mask.shape or rewards.shape != mask.shape[:1]:
        raise ValueError(
            f"expected shapes (B,), (B, T), (B, T); got rewards {tuple(rewards.shape)}, "
            f"kl {tuple(kl.shape)}, mask {tuple(mask.shape)}"
        )
    mask = mask.bool()
    kl = torch.where(mask, kl.detach(), 0.0)
    penalty = kl.flip(1).cumsum(1).flip(1)
    return torch.where(mask, rewards[:, None] - coefficient * penalty, 0.0)


# --------------------------------------------------------------------------------------------------
# Advantages of a group: the other samples of the same prompt


def group_advantages(rewards, groups, kind="grpo", floor=1e-4):
    """
    Rewards against the others of the same prompt; groups (B,) holds the prompt's number. Return
    (A, kept), all kept.

        grpo     (r - mean) / (std + floor); population std, ours                  arXiv:2402.03300
        dr_grpo  r - mean: or prompts that are too easy or too hard weigh more     arXiv:2503.20783
        rloo     r - mean of the OTHERS = (r - mean) n / (n - 1); needs n >= 2     arXiv:2402.14740

    The floor keeps real-valued rewards that differ by rounding from becoming advantages of 1;
    rewards of 0, 0.5, 1 do not feel it.

    >>> rewards, groups = torch.tensor([1., 0., 0., 3., 3.]), torch.tensor([7, 7, 7, 9, 9])
    >>> [round(a, 3) for a in group_advantages(rewards, groups, "dr_grpo")[0].tolist()]
    [0.667, -0.333, -0.333, 0.0, 0.0]
    >>> group_advantages(rewards, groups, "rloo")[0].tolist()
    [1.0, -0.5, -0.5, 0.0, 0.0]
    """
    if kind not in ("grpo", "dr_grpo", "rloo"):
        raise ValueError(f"expected kind 'grpo', 'dr_grpo' or 'rloo', got {kind!r}")
    check_finite(rewards, rewards.double().sum())
    names, group = torch.unique(groups, return_inverse=True)  # group: (B,), 0, 1, 2, ...
    sizes = torch.bincount(group, minlength=len(names)).double()
    if kind == "rloo" and (sizes < 2).any():
        lone = names[sizes < 2][0].item()
        raise ValueError(f"rloo needs at least 2 samples of a prompt; group {lone} has 1")
    centred = rewards.double() - group_mean(rewards.double(), group, sizes)
    A = centred - group_mean(centred, group, sizes)  # exactly 0 in a group of equal rewards
    if kind == "grpo":
        A = A / (group_mean(A.square(), group, sizes).sqrt() + floor)
    if kind == "rloo":
        A = A * (sizes / (sizes - 1))[group]
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    return A.to(dtype), torch.ones_like(A, dtype=torch.bool)


def group_mean(values, group, sizes):
    """The mean of its group for each value, (B,)."""
    sums = torch.zeros_like(sizes).index_add(0, group, values)
    return (sums / sizes)[group]


# --------------------------------------------------------------------------------------------------
# Losses. All return (loss, statistics) as policy_loss does.


def ppo_loss(logps, old_logps, advantage, mask, eps=0.2, denominator=None):
    """
    PPO (arXiv:1707.06347) and Reinforce++: StableReinforce's loss without the pre-clip.

    A ratio that overflows makes the gradient NaN where A > 0 (the clipped branch is taken, and its
    backward pass has 0 * inf) and infinite where A < 0, as in the released PPO losses: left so,
    since the paper compares with it.

    >>> logps, old = torch.tensor([[-.1]]), torch.tensor([[-10.]])
    >>> round(ppo_loss(logps, old, torch.tensor([-1.]), torch.ones(1, 1))[0].item(), 1)
    19930.4
    """
    return policy_loss(
        logps, old_logps, advantage, mask, clip=None, eps=eps, denominator=denominator
    )


def grpo_loss(logps, old_logps, advantage, mask, eps=0.2, denominator=None):
    """
    GRPO (arXiv:2402.03300): no pre-clip, and every answer weighs the same, (1/G) sum_i (1/|o_i|)
    sum_t.

    >>> logps, mask = torch.zeros(2, 4), torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    >>> grpo_loss(logps, logps, torch.tensor([1., -1.]), mask)[0].item()    # -(1 - 1) / 2
    -0.0
    """
    return policy_loss(
        logps,
        old_logps,
        advantage,
        mask,
        clip=None,
        eps=eps,
        loss_agg="sequences",
        denominator=denominator,
    )


def dr_grpo_loss(logps, old_logps, advantage, mask, eps=0.2, denominator=None, max_tokens=1024):
    """
    Dr. GRPO (arXiv:2503.20783): no pre-clip, and a constant where GRPO has |o_i|.

    >>> logps, mask = torch.zeros(2, 4), torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    >>> A = torch.tensor([1., -1.])
    >>> dr_grpo_loss(logps, logps, A, mask, max_tokens=4)[0].item()    # -(4 - 1) / (2 * 4)
    -0.375
    """
    return policy_loss(
        logps,
        old_logps,
        advantage,
        mask,
        clip=None,
        eps=eps,
        loss_agg="constant",
        denominator=denominator,
        max_tokens=max_tokens,
    )


def dapo_loss(logps, old_logps, advantage, mask, eps=0.2, eps_high=0.28, denominator=None):
    """
    DAPO (arXiv:2503.14476): no pre-clip, a higher upper clip, the mean over tokens. Its dynamic
    sampling is not here.

    >>> logps, old = torch.tensor([[0.]]), torch.tensor([[-1.]])
    >>> round(dapo_loss(logps, old, torch.tensor([1.]), torch.ones(1, 1))[0].item(), 2)
    -1.28
    """
    return policy_loss(
        logps,
        old_logps,
        advantage,
        mask,
        clip=None,
        eps=eps,
        eps_high=eps_high,
        denominator=denominator,
    )


def cispo_loss(logps, old_logps, advantage, mask, eps=None, eps_high=4.0, denominator=None):
    """
    CISPO (MiniMax-M1, arXiv:2506.13585): the mean of -sg(clip(rho, 1 - eps, 1 + eps_high)) A logp.
    The weight is clipped, not the update: every token keeps a gradient. There is no lower bound
    there (eps=None). M1 prints no eps_high; 4 gives ScaleRL's bound of 5 (arXiv:2510.13786).

    >>> logps = torch.tensor([[-1.]], requires_grad=True)
    >>> A, mask = torch.tensor([2.]), torch.ones(1, 1)
    >>> cispo_loss(logps, torch.tensor([[-9.]]), A, mask)[0].item()    # rho = e^8 -> 5
    10.0
    """
    log_ratio, A, mask = per_token(logps, old_logps, advantage, mask)
    low = 0.0 if eps is None else 1 - eps
    high = 1 + eps_high
    ratio = log_ratio.detach().exp()  # may overflow to inf, which the clip bounds like any number
    objective = ratio.clamp(low, high) * A * logps.to(A.dtype)
    statistics = ratio_statistics(log_ratio, ratio, mask, None, ratio < low, ratio > high)
    return -average(objective, mask, "tokens", denominator), statistics


def dual_clip_loss(logps, old_logps, advantage, mask, eps=0.2, c=3.0, denominator=None):
    """
    PPO with a dual clip (arXiv:1912.09729; verl's default, c = 3): no pre-clip, but where A < 0 a
    token's loss is at most c |A|, and beyond that it has no gradient. The bound holds ratios above
    c, where the pre-clip holds those above 1000. As in verl, exp takes at most 20.

    >>> logps, old = torch.tensor([[-.1]]), torch.tensor([[-10.]])
    >>> dual_clip_loss(logps, old, torch.tensor([-1.]), torch.ones(1, 1))[0].item()
    3.0
    """
    log_ratio, A, mask = per_token(logps, old_logps, advantage, mask)
    low, high = 1 - eps, 1 + eps
    ratio = log_ratio.clamp(-20.0, 20.0).exp()
    objective = torch.min(ratio * A, ratio.clamp(low, high) * A)
    objective = torch.where(A < 0, objective.clamp_min(c * A), objective)
    clipped_low = (ratio < low) & (A < 0)
    clipped_high = (ratio > high) & (A > 0)
    statistics = ratio_statistics(log_ratio, ratio.detach(), mask, None, clipped_low, clipped_high)
    statistics["token_loss_max"] = largest(-objective.detach(), mask)
    return -average(objective, mask, "tokens", denominator), statistics


def cpgd_loss(logps, old_logps, advantage, mask, eps=0.2, denominator=None):
    """
    CPGD (arXiv:2505.12504): PPO's clipped objective of log rho in the place of rho, so a token's
    gradient is A or 0, however far it has moved. Its policy drift, a KL penalty, is not here.

    >>> logps, old = torch.tensor([[-.1]]), torch.tensor([[-10.]])
    >>> round(cpgd_loss(logps, old, torch.tensor([-1.]), torch.ones(1, 1))[0].item(), 1)
    9.9
    """
    log_ratio, A, mask = per_token(logps, old_logps, advantage, mask)
    low = math.log(1 - eps) if eps < 1 else -math.inf
    high = math.log(1 + eps)
    objective = torch.min(log_ratio * A, log_ratio.clamp(low, high) * A)
    clipped_low = (log_ratio < low) & (A < 0)
    clipped_high = (log_ratio > high) & (A > 0)
    ratio = log_ratio.detach().exp()
    statistics = ratio_statistics(log_ratio, ratio, mask, None, clipped_low, clipped_high)
    statistics["token_loss_max"] = largest(-objective.detach(), mask)
    return -average(objective, mask, "tokens", denominator), statistics


def topr_loss(logps, old_logps, advantage, mask, denominator=None):
    """
    TOPR (arXiv:2503.14286): one weight for a whole judgement, 1 if A >= 0, else min(pi / pi_old, 1)
    of the whole sequence; -weight_i A_i log pi(sequence_i), the mean over judgements.

    >>> logps, old = torch.tensor([[-1., -1.]]), torch.tensor([[-1., -.5]])
    >>> loss, _ = topr_loss(logps, old, torch.tensor([-1.]), torch.ones(1, 2))
    >>> round(loss.item(), 4)    # e^-.5 * -1 * -2, negated
    -1.2131
    """
    if advantage.dim() != 1:
        raise ValueError(
            f"expected advantage of shape (B,), since TOPR weighs whole judgements; got "
            f"{tuple(advantage.shape)}"
        )
    log_ratio, A, mask = per_token(logps, old_logps, advantage, mask)
    sequence = log_ratio.detach().sum(1, keepdim=True)  # (B, 1)
    truncated = sequence.clamp_max(0).exp()  # the minimum comes first: exp never overflows
    weight = torch.where(A < 0, truncated, 1.0)
    objective = weight * A * logps.to(A.dtype)
    clipped_high = (A < 0) & (sequence > 0)
    statistics = ratio_statistics(
        log_ratio, log_ratio.detach().exp(), mask, None, torch.zeros_like(mask), clipped_high
    )
    return -average(objective, mask, "sums", denominator), statistics


def rloo_loss(logps, old_logps, advantage, mask, denominator=None):
    """
    RLOO (arXiv:2402.14740): plain REINFORCE, -A_i log pi(sequence_i), the mean over judgements. It
    has no ratio, so it is for fresh samples only.

    >>> logps = torch.tensor([[-1., -2.]])
    >>> rloo_loss(logps, logps, torch.tensor([.5]), torch.ones(1, 2))[0].item()
    1.5
    """
    log_ratio, A, mask = per_token(logps, old_logps, advantage, mask)
    objective = A * logps.to(A.dtype)
    nothing = torch.zeros_like(mask)
    statistics = ratio_statistics(log_ratio, log_ratio.detach().exp(), mask, None, nothing, nothing)
    return -average(objective, mask, "sums", denominator), statistics


# --------------------------------------------------------------------------------------------------
# By name


def filtered_over_batch(rewards, groups=None, reduce=None, sigma=3.0, mask=None):
    return advantages(rewards, sigma, reduce, mask=mask)


def standardised_over_batch(rewards, groups=None, reduce=None, mask=None):
    return advantages(rewards, None, reduce, mask=mask)


def centred_over_batch(rewards, groups=None, reduce=None, mask=None):
    return advantages(rewards, None, reduce, scale=False, mask=mask)


# a prompt's samples are all on one rank, so nothing is reduced over ranks
def grpo_advantages(rewards, groups, reduce=None):
    return group_advantages(rewards, groups, "grpo")


def dr_grpo_advantages(rewards, groups, reduce=None):
    return group_advantages(rewards, groups, "dr_grpo")


def rloo_advantages(rewards, groups, reduce=None):
    return group_advantages(rewards, groups, "rloo")


@dataclass(frozen=True)
class Algorithm:
    """How rewards become advantages, and advantages a loss."""

    advantages: Callable  # (rewards, groups, reduce) -> (A, kept)
    loss: Callable  # (logps, old_logps, advantage, mask, denominator=...) -> (loss, statistics)
    loss_agg: str  # how the loss averages over tokens, see stable_reinforce.average
    options: tuple = ()  # which other arguments the loss takes
    token_rewards: bool = False  # a penalty k1 is part of each token's reward, else of the sum

    def loss_options(self, args):
        """The flags that this loss takes. Without --eps_high it has its own."""
        given = {"clip": args.clip or None, "eps": args.eps, "max_tokens": args.max_new_tokens}
        if args.eps_high is not None:
            given["eps_high"] = args.eps_high
        return {name: value for name, value in given.items() if name in self.options}


ALGORITHMS = {
    "stable_reinforce": Algorithm(
        filtered_over_batch, policy_loss, "tokens", ("clip", "eps", "eps_high"), token_rewards=True
    ),
    "reinforce++": Algorithm(
        standardised_over_batch, ppo_loss, "tokens", ("eps",), token_rewards=True
    ),
    # the mean of the batch takes the place of PPO's critic
    "ppo": Algorithm(centred_over_batch, ppo_loss, "tokens", ("eps",), token_rewards=True),
    "grpo": Algorithm(grpo_advantages, grpo_loss, "sequences", ("eps",)),
    "dr_grpo": Algorithm(dr_grpo_advantages, dr_grpo_loss, "constant", ("eps", "max_tokens")),
    "rloo": Algorithm(rloo_advantages, rloo_loss, "sums"),
    "dapo": Algorithm(grpo_advantages, dapo_loss, "tokens", ("eps", "eps_high")),
    "cispo": Algorithm(grpo_advantages, cispo_loss, "tokens", ("eps_high",)),
    "dual_clip": Algorithm(
        standardised_over_batch, dual_clip_loss, "tokens", ("eps",), token_rewards=True
    ),
    "cpgd": Algorithm(standardised_over_batch, cpgd_loss, "tokens", ("eps",), token_rewards=True),
    "topr": Algorithm(centred_over_batch, topr_loss, "sums"),
}
