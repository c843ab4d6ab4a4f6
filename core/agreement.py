"""
Are the sampler and the trainer the same policy? The log-probabilities that vLLM reported for what
it sampled are compared with the trainer's: at the first sync, now and then in a run, and alone by
rl.py --check. Weights that did not arrive, stale caches, other pictures show here.
"""

import torch

from core.policy import gather_zero3
from core.training import all_reduce

# A CPU only ever takes the older of vLLM's two model runners.
ADVICE = "On a GPU, see whether VLLM_USE_V2_MODEL_RUNNER=0 (vLLM's older model runner) fixes it"


def mismatch(samples, trainer_logps):
    """|log-probability by vLLM - by the trainer|: mean and maximum over tokens and ranks."""
    total, count, largest = 0.0, 0, 0.0
    for sample, logps in zip(samples, trainer_logps):
        gap = (logps.cpu() - torch.tensor(sample.sampled_logps)).abs().double()
        total += gap.sum().item()
        count += len(gap)
        largest = max(largest, gap.max().item())
    total, count = all_reduce([total, count])
    return total / max(1, count), all_reduce(largest, "max")


def bound_of(device):
    """The largest mean gap that rounding explains: float32 on a CPU, bfloat16 kernels on a GPU."""
    return 1e-5 if device.type == "cpu" else 0.05


def require_same_policy(mean, largest, step, device):
    bound = bound_of(device)
    if not mean <= bound:
        raise RuntimeError(
            f"step {step}: vLLM and the trainer are not the same policy: their log-probabilities "
            f"differ by {mean:.2e} on average and {largest:.2e} at most; expected a mean of at "
            f"most {bound:g}. Likely: weights that did not reach vLLM (the vision tower's, for "
            "example), features cached before the sync, images of another size, another attention "
            f"kernel or precision. {ADVICE}"
        )


@torch.no_grad()
def move_weights(policy, scale):
    """Move every parameter, the vision tower's too, by the same random numbers on every rank."""
    for number, parameter in enumerate(policy.model.parameters()):
        generator = torch.Generator().manual_seed(number)
        with gather_zero3([parameter], write=True):
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            spread = parameter.data.float().std().nan_to_num().clamp_min(1e-3)
            parameter.data += scale * spread.to(parameter.dtype) * noise


def print_check(rows, device):
    """rows: (when, judgements, mean gap, largest gap)"""
    bound = bound_of(device)
    print(f"log-probabilities of vLLM and of the trainer (bound of the mean gap: {bound:g})")
    print(f"{'':24s} {'judgements':>10s} {'mean gap':>10s} {'max gap':>10s}")
    for when, judgements, mean, largest in rows:
        verdict = "ok" if mean <= bound else "NOT THE SAME POLICY"
        print(f"{when:24s} {judgements:10.0f} {mean:10.2e} {largest:10.2e}   {verdict}")
    if not all_within_bound(rows, device):
        print(ADVICE)


def all_within_bound(rows, device):
    return all(mean <= bound_of(device) for _, _, mean, _ in rows)
