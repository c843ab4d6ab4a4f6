"""
What the log of a part of bench/first_run.py says: a finding for each thing that a reader wants to
know, and the likely cause where the part failed.
"""

import json
import re

from bench.findings import NO_GPU, OK, SLOW, Finding, expect, read_findings

# Of EasyR1 for a Qwen2.5-VL-7B on 8 H100: tokens of prompts and responses a second and GPU, over a
# whole step, and the MFU of the update (github.com/hiyouga/EasyR1, its list of baselines).
PUBLISHED_SPEED, PUBLISHED_MFU = 2000, 23.2

# --------------------------------------------------------------------------------------------------
# Logs


class Incomplete(ValueError):
    """A log lacks what its part prints when it has come to its end."""


def of_findings(log):
    """The log of a check that prints findings itself."""
    found = read_findings(log)
    if not found:
        raise Incomplete("the log holds no finding")
    return found


def of_same_policy(log):
    """Of rl.py --check: three comparisons."""
    rows = re.findall(r"^(.*?) {2,}(\d+) +(\S+) +(\S+)   (ok|NOT THE SAME POLICY)$", log, re.M)
    bound = re.search(r"bound of the mean gap: (\S+)\)", log)
    if len(rows) != 3 or not bound:
        raise Incomplete(f"expected 3 comparisons in the log, found {len(rows)}")
    gaps = ", ".join(f"{when} {mean}" for when, _, mean, _, _ in rows)
    same = all(verdict == "ok" for *_, verdict in rows)
    text = f"vLLM and the trainer, mean gap of log-probabilities: {gaps} (bound {bound[1]})"
    return [expect(same, text)]


def of_steps(log, path, expected, bound):
    """Of rl.py, which writes its log to `path`: the mismatch of each step, the last one's time."""
    rows = []
    if path.exists():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for row in rows if "step" in row]
    if len(rows) != expected:
        raise Incomplete(f"expected {expected} steps in {path}, found {len(rows)}")
    gaps = [row.get("mismatch") for row in rows]
    if None in gaps:
        raise Incomplete(f"of {expected} steps, not all have a mismatch: {gaps}")
    told = ", ".join(f"{gap:.1e}" for gap in gaps)
    text = f"mismatch of vLLM and the trainer in each step: {told} (bound {bound:g})"
    found = [expect(max(gaps) <= bound, text)]
    phases = {name[2:]: number for name, number in rows[-1].items() if name.startswith("s_")}
    longest = sorted(phases, key=phases.get, reverse=True)[:6]
    told = ", ".join(f"{name} {phases[name]:.2g}" for name in longest)
    found.append(Finding(OK, f"the last step took {rows[-1]['seconds']:.3g} s: {told}"))
    return found


def of_evaluation(log, expected):
    """Of evaluate.py, each of whose ranks says how many judgements it has made."""
    speeds = re.findall(r"^(\d+) of (\d+) judgements in \d+ s, (\d+) tokens/s$", log, re.M)
    made = sum(int(number) for number, total, _ in speeds if number == total)
    speed = sum(int(speed) for number, total, speed in speeds if number == total)
    text = f"{made} of {expected} judgements, {speed:,} tokens a second"
    return [expect(made == expected, text)]


def of_speed(log, whole_7b):
    """Of bench/gpu.py: the update by --micro_tokens, the whole step, beside what is published."""
    rows = []
    for line in re.findall(r"^\|(.*)\|$", log, re.M):
        rows.append([cell.strip() for cell in line.split("|")])
    updates = [row for row in rows if len(row) == 6 and row[0][:1].isdigit()]
    steps = [row for row in rows if row[0] == "whole step"]
    if not updates or not steps:
        raise Incomplete("the log holds no table of updates or no whole step")
    return [speed_of_update(updates), speed_of_step(steps[0], whole_7b)]


def speed_of_update(updates):
    told = ", ".join(f"{mfu} at {budget}" for budget, *_, mfu, _ in updates)
    text = f"MFU of the update by --micro_tokens: {told}"
    known = [float(mfu.rstrip("%")) for *_, mfu, _ in updates if mfu != "-"]
    if not known:
        return Finding(NO_GPU, text)
    verdict = OK if max(known) >= PUBLISHED_MFU else SLOW
    return Finding(verdict, f"{text}; published {PUBLISHED_MFU} %")


def speed_of_step(row, whole_7b):
    _, seconds, speed, memory = row
    tokens = int(speed.split()[0].replace(",", ""))
    text = f"a whole step takes {seconds} s, {tokens:,} tokens a second and rank, {memory} GiB"
    if not whole_7b:
        return Finding(OK, f"{text}; not a whole 7B, so not to be set beside published speeds")
    verdict = OK if tokens >= PUBLISHED_SPEED else SLOW
    return Finding(verdict, f"{text}; published {PUBLISHED_SPEED:,}")


def of_checkpoint(log):
    """Of bench/check_checkpoint.py, called twice."""
    began = re.search(r"^began: (\w+), saved: (\w+) in (\S+) s$", log, re.M)
    resumed = re.search(r"^resumed: (\w+) in (\S+) s$", log, re.M)
    if not began or not resumed:
        raise Incomplete("the log does not say what was saved and what was resumed")
    first, saved, seconds = began.groups()
    moved = expect(first != saved, f"the update moved the weights: {first} to {saved}")
    text = f"saved in {seconds} s, resumed in {resumed[2]} s: weights {saved} and {resumed[1]}"
    return [moved, expect(saved == resumed[1], text)]


# --------------------------------------------------------------------------------------------------
# Likely causes, the surest sign first

SIGNS = (
    (
        "NOT THE SAME POLICY|are not the same policy",
        "vLLM's newer model runner, or a kernel of one of the two: run the part again with "
        "VLLM_USE_V2_MODEL_RUNNER=0, then rl.py with --attn eager",
    ),
    (
        "the sync did not reach these weights",
        "vLLM names these weights in another way than transformers; its version differs from "
        "requirements.txt",
    ),
    (
        "the run needs .* on each GPU|leaves vLLM .* and its weights",
        "the model is too large for what is free: name a smaller one with --layers",
    ),
    (
        "CUDA out of memory|OutOfMemoryError|No available memory for the cache blocks",
        "memory of the GPU: see nvidia-smi for other processes, else name fewer --layers",
    ),
    (
        "Cannot re-initialize CUDA in forked subprocess",
        "a process was forked after CUDA had started: VLLM_WORKER_MULTIPROC_METHOD=spawn",
    ),
    (
        "Python.h: No such file|Failed to find C compiler|fatal error: .*\\.h",
        "no C compiler or no Python headers: install gcc and python3-dev",
    ),
    (
        "no kernel image is available|not compatible with the current PyTorch",
        "torch is not built for this GPU: an 8.0 (A100) or newer is needed",
    ),
    (
        "driver version is insufficient|driver is too old|Found no NVIDIA driver",
        "the driver is older than CUDA 13 needs: update it",
    ),
    (
        "ncclInternalError|ncclSystemError|ncclUnhandledCudaError|ncclRemoteError|NCCL WARN",
        "the GPUs cannot reach each other: NCCL_DEBUG=INFO says why, NCCL_P2P_DISABLE=1 often "
        "helps; give a container shared memory (--ipc=host)",
    ),
    ("No space left on device|Disk quota exceeded", "the disk is full"),
    ("Bus error|bus error", "shared memory is full: start the container with --ipc=host"),
    (
        "Signal 9|SIGKILL|exitcode: -9",
        "a process was killed, mostly because the machine's memory was full: fewer --layers",
    ),
    (
        "illegal memory access|unspecified launch failure|CUBLAS_STATUS|CUDNN_STATUS",
        "a kernel failed on this GPU: CUDA_LAUNCH_BLOCKING=1 names it",
    ),
    (
        "gloo/transport|another rank has ended",
        "a rank ended and the others noticed: the first error in the log is the cause",
    ),
)


def likely_cause(log):
    """Of a failed part, by the first sign in its log; "" without one."""
    for sign, cause in SIGNS:
        if re.search(sign, log):
            return cause
    return ""


def last_error(log):
    """The last line of a log that looks like an error, or its last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b|\w+\.py: ", line)]
    return (errors or lines or ["nothing was printed"])[-1]
