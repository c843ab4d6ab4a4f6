"""
The mathematics of R1-Reward (arXiv:2505.02835): verdicts, rewards, advantages, losses.

Tensors and strings in; tensors, numbers and a dict of statistics out. Nothing here knows of a model,
a rank, a file or a flag, and nothing but torch is needed, so any trainer can import it. In the order
of one training step:

    parse, format_reward, result_reward, consistency_reward, final_reward    section 3.2, Eq. 1 and 2
    advantages                         section 3.1: z-score over the global batch, 3-sigma filter
    pre_clip, policy_loss              section 3.1, Algorithm 1: StableReinforce
    kl_k1, kl_k2, kl_k3                a penalty towards a reference model (the paper's coefficient is 0)
    group_advantages, *_loss, ALGORITHMS    section 2 and appendix B: the neighbours, chosen by name

Differs from the authors' released code, which departs from the paper:
1) the filter keeps |A| <= 3 in standardised units (released: A within the RAW mean +- 3, then |A| <= 10)
2) what cannot be parsed earns 0 (released: an exception in the result verifier earns 1)
3) the judge's reply begins with yes or no, or is a lone digit (released: a "0" anywhere in it means disagreement)
4) right but inconsistent earns 1, as in Eq. 2 (released: consistency is -1 there, so 0.5)
5) the format asks for a verdict of 1 or 2 and allows white space between the blocks (released: the other way round)
Where the paper is silent:
6) sigma_A is the population standard deviation over the judgements of the global batch, whatever their
   lengths; it gives the paper's -15.96 for 255 rewards of 1 and one of 0 (released: over tokens)
7) 1/|t| sum_t is the mean over all response tokens of the global batch; mean="sequences" is the other
   reading (released: mean of each judgement, then over judgements)

Every example below is run by test_stable_reinforce.py. $ python -m pytest test_stable_reinforce.py
"""
import math
import re

import torch

# ---------------------------------------------------------------------------------------------------
# Verdicts: text -> what was decided. Total (every string has a verdict) and linear in the text.

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
JUDGEMENT = re.compile(r"\s*<think>(.*)</think>\s*<answer>\s*([12])\s*</answer>\s*", re.DOTALL)


class Verdict(tuple):
    """What parse() found: (choice, think, well_formed), by name or by position."""

    def __new__(cls, choice, think, well_formed):
        return super().__new__(cls, (choice, think, well_formed))

    def __getnewargs__(self):  # what pickle and copy call __new__ with
        return tuple(self)

    choice = property(lambda self: self[0])  # 1, 2, or None: no verdict
    think = property(lambda self: self[1])  # the reasoning, "" if no closed <think> block
    well_formed = property(lambda self: self[2])  # the format of Table 1, and nothing else


def parse(text):
    """
    The verdict is the whole content of the last <answer> block; one that a </think> still follows was only a thought.

    >>> parse("<think>2 is right.</think><answer>2</answer>")
    (2, '2 is right.', True)
    >>> parse("So: <answer> 1 </answer>").choice, parse("<answer>1/2</answer>").choice, parse("1").choice
    (1, None, None)
    """
    think_start, think_end = text.find("<think>"), text.rfind("</think>")
    think = text[think_start + len("<think>"):think_end] if 0 <= think_start < think_end else ""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end)
    verdict = text[start + len("<answer>"):end].strip() if 0 <= start < end else ""
    choice = int(verdict) if verdict in ("1", "2") and think_end < start else None  # neither "12" nor other scripts' digits
    well_formed = all(text.count(tag) == 1 for tag in TAGS) and JUDGEMENT.fullmatch(text) is not None
    return Verdict(choice, think, well_formed)


def parse_consistency(reply):
    """
    The consistency judge's reply to a yes-or-no question: 1, 0, or None (no answer, or none of the two).
    The first word decides, unless it is "yes or no"; a lone digit counts as well, a digit inside a sentence never.

    >>> [parse_consistency(r) for r in ("Yes.", "no, it ends with 2", "1", "10 of 10", "yes/no", "", None)]
    [1, 0, 1, None, None, None, None]
    """
    found = re.match(r"[\W_]*((?:yes|no)\b(?!\s*(?:/|or\b|and\b)\s*(?:yes|no)\b)|[01](?=[\W_]*$))", reply or "", re.IGNORECASE)
    return None if found is None else int(found[1].lower() in ("yes", "1"))


# ---------------------------------------------------------------------------------------------------
# Rewards (section 3.2): verdict -> number


def format_reward(text):
    """
    1.0 for exactly <think>...</think><answer>1|2</answer>, white space around and between allowed.

    >>> format_reward("<think>a</think>\\n<answer>1</answer>"), format_reward("<answer>1</answer>")
    (1.0, 0.0)
    """
    return float(parse(text).well_formed)


def result_reward(text, choice):
    """
    1.0 if the verdict is the human's choice; no verdict is 0.0, never 1.0 (deviation 2).

    >>> result_reward("<answer>2</answer>", 2), result_reward("<answer>2</answer>", 1), result_reward("2", 2)
    (1.0, 0.0, 0.0)
    """
    if choice not in (1, 2):
        raise ValueError(f"choice is {choice!r}; legal: 1 or 2, the better response as shown to the model")
    return float(parse(text).choice == choice)


def consistency_reward(reply):
    """
    1.0 only if the judge says that reasoning and verdict agree; a judge that is silent, down or unclear earns 0.0.

    >>> consistency_reward("Yes"), consistency_reward("No"), consistency_reward("I am not sure"), consistency_reward(None)
    (1.0, 0.0, 0.0, 0.0)
    """
    return float(parse_consistency(reply) == 1)


def final_reward(result, consistency, format, weight=0.5, form="gated"):
    """
    Eq. 2, form="gated":    result * (1 + weight * consistency) + 0.5 * format
    Eq. 1, form="external": result + weight * consistency + 0.5 * format    (C.3: worse)
    Floats or tensors. Gated, consistency counts only when the result is right.

    >>> final_reward(1.0, 1.0, 1.0), final_reward(0.0, 1.0, 1.0), final_reward(0.0, 1.0, 1.0, form="external")
    (2.0, 0.5, 1.0)
    """
    if form == "gated":
        return result * (1 + weight * consistency) + 0.5 * format
    if form == "external":
        return result + weight * consistency + 0.5 * format
    raise ValueError(f"form is {form!r}; legal: 'gated' (Eq. 2) or 'external' (Eq. 1)")


# ---------------------------------------------------------------------------------------------------
# Advantages (section 3.1): rewards -> A


def advantages(rewards, sigma=3.0, reduce=None, scale=True, mask=None):
    """
    A = (r - mu) / (std + 1e-8) over the global batch, then 0 where |A| > sigma. Returns (A, kept), shaped as rewards.

    sigma=None keeps all; scale=False only subtracts mu. `reduce` sums a float64 tensor over the ranks, which makes
    mu and std those of the global batch; without it the batch is what is given. Rewards are (B,), one a judgement,
    or (B, T) with a mask, one a token. Equal rewards give exactly 0, so does a batch of one; an empty batch is empty.

    >>> advantages(torch.tensor([1., 0., 0., 1.]))[0].tolist()
    [1.0, -1.0, -1.0, 1.0]
    >>> rewards = torch.tensor([1.] * 255 + [0.])    # section 2.1: the lone failure standardises to -15.96...
    >>> advantages(rewards, sigma=None)[0][-1].item(), advantages(rewards)[0][-1].item()
    (-15.968716621398926, 0.0)
    """
    if sigma is not None and not (sigma > 0 and scale):
        raise ValueError(f"sigma is {sigma}, scale {scale}; legal: sigma above 0 (in standard deviations, so scale=True), or None")
    reduce = reduce or (lambda sums: sums)
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask.bool()
    if mask.shape != rewards.shape:
        raise ValueError(f"shapes: rewards {tuple(rewards.shape)}, mask {tuple(mask.shape)}; they must be the same")
    r = torch.where(mask, rewards.double(), 0.0)  # float64: sums over ranks do not depend on how the batch is cut
    # two passes: a mean that is nearly right, then the moments of what is left of the rewards around it
    n, total = reduce(torch.stack([mask.sum().double(), r.sum()]))
    _check_finite(r, total)
    n = n.clamp_min(1)  # of no rewards at all the mean is 0, not NaN
    left = torch.where(mask, r - total / n, 0.0)
    rest, variance = reduce(torch.stack([left.sum(), left.square().sum()])) / n  # population: divided by n, not n - 1
    adv = torch.where(mask, left - rest, 0.0)  # rest: the rounding of the mean. Equal rewards give 0 exactly
    if scale:
        adv = adv / (variance.sqrt() + 1e-8)
    kept = adv.abs() <= (math.inf if sigma is None else sigma)  # deviation 1: around 0, in units of std; 3 itself stays
    return torch.where(kept, adv, 0.0).to(torch.promote_types(rewards.dtype, torch.float32)), kept


def _check_finite(rewards, total):
    """A NaN here would become every row's advantage: stop, on all ranks, and name the row."""
    if not torch.isfinite(total):
        rows = (~torch.isfinite(rewards)).nonzero().tolist()
        raise ValueError(f"rewards are not finite: rows {rows[:8]} here" if rows else "rewards are not finite on another rank")


# ---------------------------------------------------------------------------------------------------
# The loss (section 3.1, Algorithm 1): log-probabilities and A -> one number


def pre_clip(log_ratio, delta=1e3):
    """
    Clamp log(pi / pi_old) to [-log delta, log delta] BEFORE the exponential: no overflow, and gradient exactly 0 outside.
    delta=None: off. Table 6 gives bounds of the logarithm (5, 10, 100): delta is e^5 = 148, e^10 = 22026, e^100 = off.

    >>> pre_clip(torch.tensor([9.9, 0.1, -9.9])).exp().round(decimals=3).tolist()
    [1000.0, 1.1050000190734863, 0.0010000000474974513]
    """
    if delta is None:
        return log_ratio
    if not delta > 1:
        raise ValueError(f"delta is {delta}; legal: above 1 (1e3 in the paper), or None for no pre-clip")
    return log_ratio.clamp(-math.log(delta), math.log(delta))


def policy_loss(logp, logp_old, adv, mask, clip=1e3, eps=0.2, norm=None, eps_high=None, mean="tokens", max_tokens=1024):
    """
    StableReinforce: -(1/norm) sum_t min(rho A, clip(rho, 1 - eps, 1 + eps_high) A), rho = exp(pre_clip(logp - logp_old)).

    logp, logp_old, mask (B, T); adv (B,) or (B, T); clip = delta of the pre-clip, None: off, which is PPO's loss.
    mean: how tokens are averaged, see average(). norm=None counts those given here; a trainer passes the count over the
    whole global batch, and then micro-batches and ranks add up to the loss of the whole. Padding may hold anything, NaN too.

    >>> logp, old = torch.full((1, 4), -.1), torch.tensor([[-10., -.2, -.2, -5.]])    # section 2.1, four tokens
    >>> adv, token = torch.tensor([[-1., -1., .5, -.5]]), torch.eye(4)[:, None]
    >>> [round(policy_loss(logp, old, adv, one, clip=None)[0].item(), 1) for one in token]
    [19930.4, 1.1, -0.6, 67.1]
    >>> [round(policy_loss(logp, old, adv, one)[0].item(), 1) for one in token]
    [1000.0, 1.1, -0.6, 67.1]
    """
    B, T = logp.shape  # judgements, response tokens
    diff, adv, mask = _inputs(logp, logp_old, adv, mask)  # (B, T) each; diff = log(pi / pi_old), 0 on padding
    low, high = 1 - eps, 1 + (eps if eps_high is None else eps_high)
    ratio = pre_clip(torch.where(adv != 0, diff, 0.0), clip).exp()  # (B, T) a filtered A = 0 adds 0, never 0 * inf
    gain = torch.min(ratio * adv, ratio.clamp(low, high) * adv)  # (B, T)
    ratio = pre_clip(diff.detach(), clip).exp()  # of every token: for the statistics
    stats = _stats(diff, ratio, mask, clip, (ratio < low) & (adv < 0), (ratio > high) & (adv > 0))
    stats["token_loss_max"] = torch.cat([gain.new_zeros(1), -gain.detach().flatten()]).max()  # |A| delta at most, with a pre-clip
    return -average(gain, mask, mean, norm, max_tokens), stats


MEANS = ("tokens", "sequences", "sums", "constant")


def normaliser(mask, mean="tokens"):
    """
    What a loss is divided by: the response tokens, or the judgements that have any. Sum it over micro-batches and ranks.

    >>> m = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    >>> normaliser(m).item(), normaliser(m, "sequences").item()
    (4, 2)
    """
    if mean not in MEANS:
        raise ValueError(f"mean is {mean!r}; expected one of {', '.join(MEANS)}")
    if mean == "tokens":
        return mask.bool().sum()
    return mask.bool().any(1).sum()


def average(x, mask, mean="tokens", norm=None, max_tokens=1024):
    """
    One number of a value a token, x (B, T). norm counts what normaliser() counts; None: those given here.
      tokens     the mean over all tokens
      sequences  the mean of each judgement, then over judgements (GRPO)
      sums       the sum of each judgement, then the mean over judgements (RLOO, TOPR)
      constant   as sums, and divided by max_tokens (Dr. GRPO)

    >>> x, mask = torch.ones(2, 4), torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    >>> [average(x, mask, mean, max_tokens=4).item() for mean in MEANS]    # 5/5, (4/4 + 1/1)/2, 5/2, 5/(2 * 4)
    [1.0, 1.0, 2.5, 0.625]
    """
    count = normaliser(mask, mean)
    norm = count.clamp_min(1) if norm is None else norm
    x = torch.where(mask.bool(), x, 0.0)
    if mean == "sequences":
        x = x / mask.sum(1, keepdim=True).clamp_min(1)  # (B, T) a judgement's tokens share the weight 1
    if mean == "constant":
        x = x / max_tokens
    return x.sum() / norm


def _inputs(logp, logp_old, adv, mask):
    """log-ratio and A per token, both 0 on padding, and the boolean mask: (B, T), float32 at least (bf16 has 3 digits)."""
    B, T = logp.shape
    if logp_old.shape != (B, T) or mask.shape != (B, T) or adv.shape not in ((B,), (B, T)):
        raise ValueError(f"shapes: logp {tuple(logp.shape)} is (B, T); logp_old {tuple(logp_old.shape)} and mask {tuple(mask.shape)} "
                         f"must be (B, T), adv {tuple(adv.shape)} (B,) or (B, T)")
    dtype, mask = torch.promote_types(logp.dtype, torch.float32), mask.bool()
    adv = (adv[:, None] if adv.dim() == 1 else adv).detach().to(dtype).expand(B, T)
    diff = torch.where(mask, logp.to(dtype) - logp_old.detach().to(dtype), 0.0)
    return diff, torch.where(mask, adv, 0.0), mask


@torch.no_grad()
def _stats(diff, ratio, mask, clip, clipped_low, clipped_high):
    """Over the response tokens given here; `tokens` is the weight to average them with, the maxima are maxed."""
    n = mask.sum()
    mean = lambda x: torch.where(mask, x.to(ratio.dtype), 0.0).sum() / n.clamp_min(1)
    top = lambda x: torch.where(mask, x, 0.0).amax() if x.numel() else x.sum()
    preclipped = torch.zeros_like(mask) if clip is None else diff.abs() > math.log(clip)
    log_ratio = pre_clip(diff, clip)
    return {
        "tokens": n,
        "ratio_mean": mean(ratio),
        "ratio_max": top(ratio),  # after the pre-clip: delta at most
        "log_ratio_max": top(diff.abs()),  # before it
        "preclipped": mean(preclipped),  # share of tokens
        "clipped_low": mean(clipped_low),  # share that the loss clips below; PPO: no gradient, ratio < 1 - eps and A < 0
        "clipped_high": mean(clipped_high),  # and above; PPO: no gradient, ratio > 1 + eps_high and A > 0
        "kl": mean(torch.expm1(log_ratio) - log_ratio),  # KL(old || new), from samples of old: mean of rho - 1 - log rho
    }


# ---------------------------------------------------------------------------------------------------
# KL per token, from samples of pi (Schulman 2020, "Approximating KL Divergence"; rho = pi_ref / pi)


def kl_k1(logp, logp_ref):
    """
    -log rho: unbiased, may be negative. For the reward: as a loss its expected gradient is 0.

    >>> kl_k1(torch.tensor([-1.]), torch.tensor([-1.5])).item()
    0.5
    """
    return logp - logp_ref


def kl_k2(logp, logp_ref):
    """
    (log rho)^2 / 2: biased, low variance; as a loss its expected gradient is that of the KL.

    >>> kl_k2(torch.tensor([-1.]), torch.tensor([-1.5])).item()
    0.125
    """
    return 0.5 * (logp - logp_ref).square()


def kl_k3(logp, logp_ref):
    """
    rho - 1 - log rho: unbiased, never negative (GRPO's choice); as a loss its expected gradient is that of KL(ref || pi).
    log rho is held at 20 or less: a token that the reference finds e^20 times likelier adds a constant 4.9e8 and no gradient,
    where exp would overflow from 89 on.

    >>> round(kl_k3(torch.tensor([-1.]), torch.tensor([-1.5])).item(), 5)
    0.10653
    """
    log_rho = (logp_ref - logp).clamp_max(20.0)
    return torch.expm1(log_rho) - log_rho  # expm1: near 0, exp(x) - 1 is rounding noise


KL = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


# ---------------------------------------------------------------------------------------------------
# The neighbours (section 2, appendix B): each differs from StableReinforce only where its docstring says


def returns_to_go(rewards, kl, mask, beta):
    """
    Reinforce++ with a KL penalty (arXiv:2501.03262): R_t = r - beta * sum of KL from t on; then advantages(R, mask=mask).

    >>> returns_to_go(torch.tensor([1.]), torch.tensor([[.25, .5]]), torch.ones(1, 2), beta=1.).tolist()
    [[0.25, 0.5]]
    """
    if kl.shape != mask.shape or rewards.shape != mask.shape[:1]:
        raise ValueError(f"shapes: rewards {tuple(rewards.shape)} must be (B,), kl {tuple(kl.shape)} and mask {tuple(mask.shape)} (B, T)")
    kl = torch.where(mask.bool(), kl.detach(), 0.0)  # (B, T)
    return torch.where(mask.bool(), rewards[:, None] - beta * kl.flip(1).cumsum(1).flip(1), 0.0)


def group_advantages(rewards, groups, kind="grpo", floor=1e-4):
    """
    Rewards against the others of the same prompt; groups (B,) holds the prompt's number. Returns (A, kept), all kept.
      grpo     (r - mean) / (std + floor); population std, ours                   arXiv:2402.03300
      dr_grpo  r - mean: else prompts that are too easy or too hard weigh more    arXiv:2503.20783
      rloo     r - mean of the OTHERS = (r - mean) n / (n - 1); needs n >= 2      arXiv:2402.14740
    The floor of 1e-4 keeps real-valued rewards that differ by rounding from becoming advantages of 1; rewards of 0, 0.5, ... do not feel it.

    >>> r, g = torch.tensor([1., 0., 0., 3., 3.]), torch.tensor([7, 7, 7, 9, 9])
    >>> [[round(a, 3) for a in group_advantages(r, g, kind)[0].tolist()] for kind in ("dr_grpo", "rloo")]
    [[0.667, -0.333, -0.333, 0.0, 0.0], [1.0, -0.5, -0.5, 0.0, 0.0]]
    """
    if kind not in ("grpo", "dr_grpo", "rloo"):
        raise ValueError(f"kind is {kind!r}; legal: 'grpo', 'dr_grpo', 'rloo'")
    _check_finite(rewards, rewards.double().sum())
    names, group = torch.unique(groups, return_inverse=True)  # (G,), (B,)
    n = torch.bincount(group, minlength=len(names)).double()  # (G,)
    if kind == "rloo" and (n < 2).any():
        raise ValueError(f"rloo needs at least 2 samples of a prompt; group {names[n < 2][0].item()} has 1")
    mean = lambda x: (torch.zeros_like(n).index_add(0, group, x) / n)[group]  # (B,) each row gets its group's mean
    left = rewards.double() - mean(rewards.double())
    adv = left - mean(left)  # exactly 0 in a group of equal rewards
    if kind == "grpo":
        adv = adv / (mean(adv.square()).sqrt() + floor)
    if kind == "rloo":
        adv = adv * (n / (n - 1))[group]
    return adv.to(torch.promote_types(rewards.dtype, torch.float32)), torch.ones_like(adv, dtype=torch.bool)


def ppo_loss(logp, logp_old, adv, mask, eps=0.2, norm=None):
    """
    PPO (arXiv:1707.06347) and Reinforce++: StableReinforce's loss without the pre-clip. A ratio that overflows makes the
    gradient NaN where A > 0 (the clipped branch is taken, and its backward pass has 0 * inf) and infinite where A < 0, as in
    the released PPO losses: left so, since the paper compares with it.

    >>> round(ppo_loss(torch.tensor([[-.1]]), torch.tensor([[-10.]]), torch.tensor([-1.]), torch.ones(1, 1))[0].item(), 1)
    19930.4
    """
    return policy_loss(logp, logp_old, adv, mask, None, eps, norm)


def grpo_loss(logp, logp_old, adv, mask, eps=0.2, norm=None):
    """
    GRPO (arXiv:2402.03300): no pre-clip, and every answer weighs the same, (1/G) sum_i (1/|o_i|) sum_t. Its KL term is apart.

    >>> logp, mask = torch.zeros(2, 4), torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    >>> grpo_loss(logp, logp, torch.tensor([1., -1.]), mask)[0].item()    # -(1 - 1) / 2; over tokens -(4 - 1) / 5
    -0.0
    """
    return policy_loss(logp, logp_old, adv, mask, None, eps, norm, mean="sequences")


def dr_grpo_loss(logp, logp_old, adv, mask, eps=0.2, norm=None, max_tokens=1024):
    """
    Dr. GRPO (arXiv:2503.20783): no pre-clip, and a constant where GRPO has |o_i|; norm counts the answers.

    >>> logp, mask = torch.zeros(2, 4), torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    >>> dr_grpo_loss(logp, logp, torch.tensor([1., -1.]), mask, max_tokens=4)[0].item()    # -(4 - 1) / (2 * 4)
    -0.375
    """
    return policy_loss(logp, logp_old, adv, mask, None, eps, norm, mean="constant", max_tokens=max_tokens)


def dapo_loss(logp, logp_old, adv, mask, eps=0.2, eps_high=0.28, norm=None):
    """
    DAPO (arXiv:2503.14476): no pre-clip, clip-higher, mean over tokens. (Its dynamic sampling is the loop's affair.)

    >>> round(dapo_loss(torch.tensor([[0.]]), torch.tensor([[-1.]]), torch.tensor([1.]), torch.ones(1, 1))[0].item(), 2)
    -1.28
    """
    return policy_loss(logp, logp_old, adv, mask, None, eps, norm, eps_high)


def cispo_loss(logp, logp_old, adv, mask, eps=None, eps_high=4.0, norm=None):
    """
    CISPO (MiniMax-M1, arXiv:2506.13585): -(1/norm) sum_t sg(clip(rho, 1 - eps, 1 + eps_high)) A logp. The weight is
    clipped, not the update: every token keeps a gradient. No lower bound there (eps=None); M1 prints no eps_high, 4 gives
    ScaleRL's upper bound of 5 (arXiv:2510.13786).

    >>> logp = torch.tensor([[-1.]], requires_grad=True)
    >>> cispo_loss(logp, torch.tensor([[-9.]]), torch.tensor([2.]), torch.ones(1, 1))[0].item()    # rho = e^8 -> 5
    10.0
    """
    diff, adv, mask = _inputs(logp, logp_old, adv, mask)
    low, high = 0.0 if eps is None else 1 - eps, 1 + eps_high
    ratio = diff.detach().exp()  # (B, T) may overflow to inf, which clamps as well as any number
    stats = _stats(diff, ratio, mask, None, ratio < low, ratio > high)
    gain = ratio.clamp(low, high) * adv * torch.where(mask, logp.to(diff.dtype), 0.0)
    return -average(gain, mask, "tokens", norm), stats


def topr_loss(logp, logp_old, adv, mask, norm=None):
    """
    TOPR (arXiv:2503.14286): one weight a judgement, 1 if A >= 0, else min(pi / pi_old, 1) of the whole sequence;
    -(1/norm) sum_i weight_i A_i log pi(sequence_i), and norm counts the judgements.

    >>> logp, old = torch.tensor([[-1., -1.]]), torch.tensor([[-1., -.5]])
    >>> round(topr_loss(logp, old, torch.tensor([-1.]), torch.ones(1, 2))[0].item(), 4)    # e^-.5 * -1 * -2, negated
    -1.2131
    """
    if adv.dim() != 1:
        raise ValueError(f"shapes: adv is {tuple(adv.shape)}; TOPR weighs whole judgements, so it must be (B,)")
    diff, adv, mask = _inputs(logp, logp_old, adv, mask)
    whole = diff.detach().sum(1, keepdim=True)  # (B, 1) log of the sequence's ratio
    weight = torch.where(adv < 0, whole.clamp_max(0).exp(), 1.0)  # (B, T) min before exp: never overflows
    stats = _stats(diff, diff.detach().exp(), mask, None, torch.zeros_like(mask), (adv < 0) & (whole > 0))
    return -average(weight * adv * torch.where(mask, logp.to(adv.dtype), 0.0), mask, "sums", norm), stats


def rloo_loss(logp, logp_old, adv, mask, norm=None):
    """
    RLOO (arXiv:2402.14740): plain REINFORCE, -(1/norm) sum_i A_i log pi(sequence_i); no ratio, so for fresh samples only.

    >>> rloo_loss(torch.tensor([[-1., -2.]]), torch.tensor([[-1., -2.]]), torch.tensor([.5]), torch.ones(1, 2))[0].item()
    1.5
    """
    diff, adv, mask = _inputs(logp, logp_old, adv, mask)
    stats = _stats(diff, diff.detach().exp(), mask, None, torch.zeros_like(mask), torch.zeros_like(mask))
    return -average(adv * torch.where(mask, logp.to(adv.dtype), 0.0), mask, "sums", norm), stats


def _batch(**options):  # the batch's statistics: groups are not looked at
    return lambda rewards, groups=None, reduce=None, **more: advantages(rewards, reduce=reduce, **options | more)


def _group(kind):  # the prompt's statistics: a group stays on one rank, so nothing is reduced
    return lambda rewards, groups, reduce=None: group_advantages(rewards, groups, kind)


ALGORITHMS = {  # name: (advantages(rewards, groups, reduce) -> (A, kept), loss(logp, logp_old, A, mask, norm=), its average())
    "stable_reinforce": (_batch(), policy_loss, "tokens"),
    "reinforce++": (_batch(sigma=None), ppo_loss, "tokens"),
    "ppo": (_batch(sigma=None, scale=False), ppo_loss, "tokens"),  # the batch mean stands where PPO has a critic
    "grpo": (_group("grpo"), grpo_loss, "sequences"),
    "dr_grpo": (_group("dr_grpo"), dr_grpo_loss, "constant"),
    "rloo": (_group("rloo"), rloo_loss, "sums"),
    "dapo": (_group("grpo"), dapo_loss, "tokens"),
    "cispo": (_group("grpo"), cispo_loss, "tokens"),
    "topr": (_batch(sigma=None, scale=False), topr_loss, "sums"),
}
# where a KL penalty k1 may stand at each token's own place; with the others its sum over the judgement is taken from the reward
TOKEN_REWARDS = ("stable_reinforce", "reinforce++", "ppo")
