"""
The mathematics of R1-Reward (arXiv:2505.02835): verdicts, rewards, advantages, the loss.

Tensors and strings in; tensors and numbers out. Nothing here knows of a model, a rank, a file or a
flag, and nothing but torch is needed, so that any trainer can import it. In the order of a step:

    parse, format_reward, result_reward, consistency_reward, final_reward    3.2, Eq. 1 and 2
    advantages               3.1: z-scores over the global batch, and the 3-sigma filter
    pre_clip, policy_loss    3.1, Algorithm 1: StableReinforce

The algorithms that the paper compares with are in core/neighbours.py.

Differs from the authors' released code, which departs from the paper:
1) the filter keeps |A| <= 3 in standardised units (released: A within the RAW mean +- 3, then
   |A| <= 10)
2) what cannot be parsed earns 0 (released: an exception in the result verifier earns 1)
3) the judge's reply begins with yes or no, or is a lone digit (released: a "0" anywhere in it
   means disagreement)
4) right but inconsistent earns 1 for the result, as in Eq. 2 (released: consistency is -1: 0.5)
5) the format asks for a verdict of 1 or 2 and allows white space between the blocks (released:
   any verdict, and no white space)
Where the paper is silent:
6) sigma_A is the population standard deviation over the judgements of the global batch, whatever
   their lengths; it gives the paper's -15.96 for 255 rewards of 1 and one of 0 (released: over
   tokens)
7) 1/|t| sum_t is the mean over all response tokens of the global batch; loss_agg="sequences" is
   the other reading (released: the mean of each judgement, then over judgements)

Every example below is run by the tests. $ python -m pytest test_stable_reinforce.py
"""

import math
import re
from typing import NamedTuple

import torch

# --------------------------------------------------------------------------------------------------
# Verdicts: what was decided. Every text has one, found in time linear in its length.

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
JUDGEMENT = re.compile(
    r"\s*<think>(.*)</think>\s*<answer>\s*([12])\s*</answer>\s*",
    re.DOTALL,
)
YES_OR_NO = re.compile(
    r"""
    [\W_]*                                          # quotes, stars, white space
    (
        (?:yes|no)\b
        (?!\s*(?:/|or\b|and\b)\s*(?:yes|no)\b)      # "yes or no" is no answer
    |
        [01](?=[\W_]*$)                             # a digit counts only if nothing follows
    )
    """,
    re.IGNORECASE | re.VERBOSE,
)


class Verdict(NamedTuple):
    choice: int | None  # 1 or 2; None: no verdict
    think: str  # the reasoning; "" without a closed <think> block
    well_formed: bool  # exactly the format of Table 1


def parse(text):
    """
    The verdict is the whole content of the last <answer> block, unless a </think> follows it: then
    it was only a thought.

    >>> parse("<think>2 is right.</think><answer>2</answer>")
    Verdict(choice=2, think='2 is right.', well_formed=True)
    >>> parse("So: <answer> 1 </answer>").choice, parse("<answer>1/2</answer>").choice
    (1, None)
    """
    think_start = text.find("<think>")
    think_end = text.rfind("</think>")
    think = ""
    if 0 <= think_start < think_end:
        think = text[think_start + len("<think>") : think_end]

    answer_end = text.rfind("</answer>")
    answer_start = text.rfind("<answer>", 0, max(0, answer_end))
    choice = None
    if answer_start > think_end:
        answer = text[answer_start + len("<answer>") : answer_end].strip()
        if answer in ("1", "2"):
            choice = int(answer)

    one_of_each = all(text.count(tag) == 1 for tag in TAGS)
    well_formed = one_of_each and JUDGEMENT.fullmatch(text) is not None
    return Verdict(choice, think, well_formed)


def parse_consistency(reply):
    """
    Read the consistency judge's reply to a yes-or-no question: 1, 0, or None for no answer.

    The first word decides, unless it is "yes or no". A lone digit counts as well, a digit inside
    a sentence never.

    >>> [parse_consistency(reply) for reply in ("Yes.", "no, it ends with 2", "1", "10 of 10")]
    [1, 0, 1, None]
    """
    answer = YES_OR_NO.match(reply or "")
    if answer is None:
        return None
    return 1 if answer[1].lower() in ("yes", "1") else 0


# --------------------------------------------------------------------------------------------------
# Rewards (section 3.2): a judgement's text -> a number


def format_reward(text):
    """
    1.0 for exactly <think>...</think><answer>1 or 2</answer>; white space may stand around them.

    >>> format_reward("<think>a</think>\\n<answer>1</answer>"), format_reward("<answer>1</answer>")
    (1.0, 0.0)
    """
    return float(parse(text).well_formed)


def result_reward(text, choice):
    """
    1.0 if the verdict is the human's choice. No verdict earns 0.0, never 1.0 (deviation 2).

    >>> result_reward("<answer>2</answer>", 2), result_reward("<answer>2</answer>", 1)
    (1.0, 0.0)
    """
    if choice not in (1, 2):
        raise ValueError(f"expected a choice of 1 or 2 (the better response), got {choice!r}")
    return float(parse(text).choice == choice)


def consistency_reward(reply):
    """
    1.0 only if the judge says that reasoning and verdict agree. Silence or an unclear reply is 0.0.

    >>> consistency_reward("Yes"), consistency_reward("No"), consistency_reward("I am not sure")
    (1.0, 0.0, 0.0)
    """
    return float(parse_consistency(reply) == 1)


def final_reward(result, consistency, format, weight=0.5, form="gated"):
    """
    Eq. 2, form="gated":    result * (1 + weight * consistency) + 0.5 * format
    Eq. 1, form="external": result + weight * consistency + 0.5 * format    (C.3: worse)

    Numbers or tensors. Gated, consistency counts only when the result is right.

    >>> final_reward(1.0, 1.0, 1.0), final_reward(0.0, 1.0, 1.0)
    (2.0, 0.5)
    >>> final_reward(0.0, 1.0, 1.0, form="external")
    1.0
    """
    if form == "gated":
        return result * (1 + weight * consistency) + 0.5 * format
    if form == "external":
        return result + weight * consistency + 0.5 * format
    raise ValueError(f"expected form 'gated' (Eq. 2) or 'external' (Eq. 1), got {form!r}")


# --------------------------------------------------------------------------------------------------
# Advantages (section 3.1): rewards -> A


def advantages(rewards, sigma=3.0, reduce=None, scale=True, mask=None):
    """
    A = (r - mean) / std over the global batch, then 0 where |A| > sigma. Return (A, kept).

    sigma=None keeps all; scale=False only subtracts the mean. `reduce` sums a float64 tensor over
    the ranks, which makes mean and std those of the global batch. Rewards are (B,), one for each
    judgement, or (B, T) with a mask, one for each token. Equal rewards give exactly 0.

    >>> advantages(torch.tensor([1., 0., 0., 1.]))[0].tolist()
    [1.0, -1.0, -1.0, 1.0]
    >>> rewards = torch.tensor([1.] * 255 + [0.])    # section 2.1: a lone failure
    >>> advantages(rewards, sigma=None)[0][-1].item(), advantages(rewards)[0][-1].item()
    (-15.968716621398926, 0.0)
    """
    if sigma is not None and not (sigma > 0 and scale):
        raise ValueError(
            f"expected sigma above 0, in standard deviations (so scale=True), or None to keep all; "
            f"got sigma {sigma} with scale {scale}"
        )
    if mask is None:
        mask = torch.ones_like(rewards)
    if mask.shape != rewards.shape:
        raise ValueError(
            f"expected rewards and mask of the same shapes, got {tuple(rewards.shape)} and "
            f"{tuple(mask.shape)}"
        )
    mask = mask.bool()
    centred, variance = center(rewards, mask, reduce or identity)
    standardised = centred / (variance.sqrt() + 1e-8) if scale else centred
    bound = math.inf if sigma is None else sigma
    kept = standardised.abs() <= bound  # deviation 1: around 0, in standard deviations
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    return torch.where(kept, standardised, 0.0).to(dtype), kept


def center(rewards, mask, reduce):
    """
    Rewards minus their mean over all ranks, and their population variance.

    In float64, so that the sums do not depend on how the batch is cut into ranks, and in two
    passes: the second removes the rounding of the first mean, and equal rewards become exactly 0.
    """
    rewards = torch.where(mask, rewards.double(), 0.0)
    count, total = reduce(torch.stack([mask.sum().double(), rewards.sum()]))
    check_finite(rewards, total)
    count = count.clamp_min(1)  # the mean of nothing is 0, not NaN
    centred = torch.where(mask, rewards - total / count, 0.0)
    moments = reduce(torch.stack([centred.sum(), centred.square().sum()]))
    mean_left, variance = moments / count
    return torch.where(mask, centred - mean_left, 0.0), variance


def check_finite(rewards, total):
    """Stop on every rank: one NaN would become the advantage of every judgement."""
    if torch.isfinite(total):
        return
    rows = (~torch.isfinite(rewards)).nonzero().tolist()
    if rows:
        raise ValueError(f"rewards are not finite: rows {rows[:8]} here")
    raise ValueError("rewards are not finite on another rank")


def identity(sums):
    """The sum over ranks where there is one."""
    return sums


# --------------------------------------------------------------------------------------------------
# The loss (section 3.1, Algorithm 1): log-probabilities and A -> one number


def pre_clip(log_ratio, delta=1e3):
    """
    Clamp log(pi / pi_old) to [-log delta, log delta] BEFORE the exponential: it cannot overflow,
    and outside the gradient is exactly 0. delta=None: off.

    Table 6 states bounds of the logarithm (5, 10, 100): delta is e^5 = 148, e^10 = 22026, off.

    >>> pre_clip(torch.tensor([9.9, 0.1, -9.9])).exp().round(decimals=3).tolist()
    [1000.0, 1.1050000190734863, 0.0010000000474974513]
    """
    if delta is None:
        return log_ratio
    if not delta > 1:
        raise ValueError(f"expected delta above 1 (1e3 in the paper) or None (off), got {delta}")
    return log_ratio.clamp(-math.log(delta), math.log(delta))


def policy_loss(
    logps,
    old_logps,
    advantage,
    mask,
    clip=1e3,
    eps=0.2,
    eps_high=None,
    loss_agg="tokens",
    denominator=None,
    max_tokens=1024,
):
    """
    StableReinforce: the mean of -min(rho A, clip(rho, 1 - eps, 1 + eps_high) A) over tokens,
    with rho = exp(pre_clip(logps - old_logps)). Return (loss, statistics).

    logps, old_logps, mask: (B, T); advantage: (B,) or (B, T). clip is the pre-clip's delta; None
    turns it off, which leaves PPO's loss. loss_agg and denominator: see average(). Padding may hold
    anything, NaN too.

    >>> logps, old = torch.full((1, 4), -.1), torch.tensor([[-10., -.2, -.2, -5.]])    # section 2.1
    >>> A, tokens = torch.tensor([[-1., -1., .5, -.5]]), torch.eye(4)[:, None]
    >>> [round(policy_loss(logps, old, A, token, clip=None)[0].item(), 1) for token in tokens]
    [19930.4, 1.1, -0.6, 67.1]
    >>> [round(policy_loss(logps, old, A, token)[0].item(), 1) for token in tokens]
    [1000.0, 1.1, -0.6, 67.1]
    """
    log_ratio, A, mask = per_token(logps, old_logps, advantage, mask)
    low = 1 - eps
    high = 1 + (eps if eps_high is None else eps_high)
    not_filtered = torch.where(A != 0, log_ratio, 0.0)  # a filtered token adds 0, never 0 * inf

    ratio = pre_clip(not_filtered, clip).exp()
    objective = torch.min(ratio * A, ratio.clamp(low, high) * A)
    loss = -average(objective, mask, loss_agg, denominator, max_tokens)

    ratio = pre_clip(log_ratio.detach(), clip).exp()
    clipped_low = (ratio < low) & (A < 0)
    clipped_high = (ratio > high) & (A > 0)
    statistics = ratio_statistics(log_ratio, ratio, mask, clip, clipped_low, clipped_high)
    # at most |A| * delta with a pre-clip
    statistics["token_loss_max"] = largest(-objective.detach(), mask)
    return loss, statistics


def per_token(logps, old_logps, advantage, mask):
    """log(pi / pi_old), A and mask of each token, (B, T). float32 at least: bf16 has 3 digits."""
    same = logps.shape == old_logps.shape == mask.shape
    if logps.dim() != 2 or not same or advantage.shape not in (logps.shape[:1], logps.shape):
        raise ValueError(
            f"expected shapes (B, T), (B, T), (B,) or (B, T), (B, T); got {tuple(logps.shape)}, "
            f"old_logps {tuple(old_logps.shape)}, advantage {tuple(advantage.shape)}, "
            f"mask {tuple(mask.shape)}"
        )
    dtype = torch.promote_types(logps.dtype, torch.float32)
    mask = mask.bool()
    if advantage.dim() == 1:
        advantage = advantage[:, None].expand(logps.shape)
    A = torch.where(mask, advantage.detach().to(dtype), 0.0)
    log_ratio = logps.to(dtype) - old_logps.detach().to(dtype)
    return torch.where(mask, log_ratio, 0.0), A, mask


LOSS_AGGS = ("tokens", "sequences", "sums", "constant")


def average(values, mask, loss_agg="tokens", denominator=None, max_tokens=1024):
    """
    Reduce values of tokens, (B, T), to one number.

        tokens      the mean over all tokens
        sequences   the mean of each judgement, then over judgements (GRPO)
        sums        the sum of each judgement, then the mean over judgements (RLOO, TOPR)
        constant    like sums, divided by max_tokens (Dr. GRPO)

    denominator is what normaliser() counts; None: of what is given here. A trainer passes the count
    over the global batch, and then its micro-batches and ranks add up to the loss of the whole.

    >>> values, mask = torch.ones(2, 4), torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    >>> [average(values, mask, loss_agg, max_tokens=4).item() for loss_agg in LOSS_AGGS]
    [1.0, 1.0, 2.5, 0.625]
    """
    count = normaliser(mask, loss_agg)
    if denominator is None:
        denominator = count.clamp_min(1)
    values = torch.where(mask.bool(), values, 0.0)
    if loss_agg == "sequences":
        values = values / mask.sum(1, keepdim=True).clamp_min(1)
    if loss_agg == "constant":
        values = values / max_tokens
    return values.sum() / denominator


def normaliser(mask, loss_agg="tokens"):
    """
    What a loss is divided by: response tokens, or judgements that have any.

    >>> mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    >>> normaliser(mask).item(), normaliser(mask, "sequences").item()
    (4, 2)
    """
    if loss_agg not in LOSS_AGGS:
        raise ValueError(f"expected loss_agg to be one of {', '.join(LOSS_AGGS)}; got {loss_agg!r}")
    if loss_agg == "tokens":
        return mask.bool().sum()
    return mask.bool().any(1).sum()


@torch.no_grad()
def ratio_statistics(log_ratio, ratio, mask, clip, clipped_low, clipped_high):
    """
    What a loss did to the response tokens given here: means, to be weighted with `tokens`, and
    maxima, whose names end in _max.
    """
    bounded = pre_clip(log_ratio, clip)
    beyond = torch.zeros_like(mask)
    if clip is not None:
        beyond = log_ratio.abs() > math.log(clip)
    return {
        "tokens": mask.sum(),
        "ratio_mean": average(ratio, mask),
        "ratio_max": largest(ratio, mask),  # after the pre-clip: delta at most
        "log_ratio_max": largest(log_ratio.abs(), mask),  # before it
        "preclipped": share(beyond, mask),
        # PPO gives these tokens no gradient: ratio below 1 - eps and A < 0, above and A > 0
        "clipped_low": share(clipped_low, mask),
        "clipped_high": share(clipped_high, mask),
        # KL(old || new) from samples of old: the mean of rho - 1 - log rho
        "kl": average(torch.expm1(bounded) - bounded, mask),
    }


def share(flags, mask):
    return average(flags.float(), mask)


def largest(values, mask):
    """The largest value of a token; 0 if all are negative or masked."""
    values = torch.where(mask, values, 0.0)
    return values.amax().clamp_min(0) if values.numel() else values.sum()
