"""Training on one rank or many: process groups, DeepSpeed, micro-batches and the optimizer step."""

import argparse
import ctypes
import json
import math
import os
import random
import signal
import socket
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from core.encoding import collate
from core.files import InputError
from core.flags import number, random_seed, whole
from core.policy import token_logps
from core.shared_prompts import row_length, rows_of, rows_within
from core.trackers import TRACKERS, check_tracker

# --------------------------------------------------------------------------------------------------
# Ranks

# What ranks wait for may take long: the judgements of another rank, of which stage 5 asks for
# thousands a step; a checkpoint of 100 GB. A rank that has died does not keep the others waiting:
# torchrun ends them, and gloo notices.
LONGEST_WAIT = timedelta(hours=12)


def start_ranks(seed):
    """
    Join the process group of torchrun, or form a group of one, and seed this process.

    Return (rank, number of ranks, device). Tensors on GPUs travel by nccl, all others by gloo:
    nccl would end a rank that waits for the numbers of another one for more than ten minutes.
    """
    die_with_torchrun()
    cuda = torch.cuda.is_available()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads break in forked workers
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=LONGEST_WAIT)
    random.seed(seed)
    torch.manual_seed(seed)
    return dist.get_rank(), dist.get_world_size(), device


def die_with_torchrun():
    """
    A rank ends with the torchrun that started it, however that ends: it would train on, and write.

    Without torchrun the parent is a shell, which may well end before a run that nohup keeps.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()


def die_with_parent():
    """Ask the kernel to kill this process when its parent ends, even by SIGKILL."""
    parent = os.getppid()
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended meanwhile
        os.kill(os.getpid(), signal.SIGKILL)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def all_reduce(values, how="sum"):
    """
    Sum or maximum over all ranks, of a number or of each number in a list.

    float64, so that counts stay exact.
    """
    tensor = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized() and dist.get_world_size() > 1:
        operation = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[how]
        dist.all_reduce(tensor, operation)
    return tensor.tolist()


def on_all_ranks(work):
    """work() on each rank. If it fails on any, all raise the first rank's error."""
    try:
        result, error = work(), None
    except Exception as problem:  # whatever it is, the other ranks must not wait for this one
        result, error = None, problem
    reason = first_error(error)
    if reason is not None:
        raise InputError(reason)
    return result


def wait_or_stop(wait, save):
    """wait(); if it fails on any rank, as with a dead judge, all write a checkpoint and stop."""
    try:
        return on_all_ranks(wait)
    except InputError as error:
        save()
        raise InputError(f"stopped, with a checkpoint: {error}") from None


def first_error(error):
    """The text of the first rank's error; None if no rank has one."""
    own = None if error is None else str(error) or type(error).__name__
    texts = [own]
    if dist.is_initialized():
        texts = [None] * dist.get_world_size()
        dist.all_gather_object(texts, own)
    return next((text for text in texts if text is not None), None)


# --------------------------------------------------------------------------------------------------
# Data workers


def read_ahead(dataset, order, workers, ahead, pin_memory=False):
    """
    Yield the items of a dataset in this order. Workers, forked here, each read `ahead` of them.

    An InputError of a worker is raised here: sent as a value, it keeps its one line.
    """
    loader = torch.utils.data.DataLoader(
        ErrorsAsValues(dataset),
        batch_size=None,
        sampler=order,
        collate_fn=identity,
        num_workers=workers,
        prefetch_factor=ahead if workers else None,
        pin_memory=pin_memory,  # then a thread takes in what the workers send
        worker_init_fn=init_worker,
        generator=torch.Generator(),  # its own: the global random state stays as it is
    )
    return raise_errors(iter(loader))


class ErrorsAsValues(torch.utils.data.Dataset):
    """A dataset whose InputErrors are items: a data worker would wrap them in a traceback."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, key):
        try:
            return self.dataset[key]
        except InputError as error:
            return error


def raise_errors(items):
    for item in items:
        if isinstance(item, InputError):
            raise item
        yield item


def init_worker(worker_id):
    """Tie a data worker to its rank: it dies with it, and returns the free memory it inherited."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: its rank ends it, without a traceback
    # Else the workers of a killed rank wait for ever to hand over a sample.
    die_with_parent()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc
        libc.malloc_trim(0)


def identity(item):
    """Collate nothing. A lambda cannot be sent to workers that are spawned instead of forked."""
    return item


# --------------------------------------------------------------------------------------------------
# The trainer and its step


def make_trainer(policy, zero, lr, device, weight_decay=0.0, clip_grad=1.0):
    """
    Wrap a policy in DeepSpeed with AdamW (0.9, 0.95).

    `zero` says what is split among the ranks: 0 nothing, 1 the optimizer's state, 2 also the
    gradients, 3 also the weights. Stages 0 and 1 reduce the whole gradient once a step; 2 and 3
    reduce it in every micro-batch and hold a share. On a GPU the weights are bfloat16, the
    optimizer's copy of them and the summed gradients float32.
    """
    import logging

    import deepspeed

    cuda = device.type == "cuda"
    if cuda and zero == 0:
        raise InputError(
            "--zero 0 works on a CPU only; on a GPU use 1, 2 or 3, which keep float32 copies of "
            "the weights (on a single GPU, 1 splits nothing)"
        )
    deepspeed.utils.logger.setLevel(logging.WARNING)
    if not cuda:
        # DeepSpeed compiles a faster CPU reduction at run time, under a lock: one killed process
        # would leave all later ones waiting for it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        lr=lr,
        betas=(0.9, 0.95),
        weight_decay=weight_decay,
        fused=cuda,  # without a temporary tensor as large as this rank's weights
    )
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": False,  # update() decides when to step
        "gradient_clipping": clip_grad,
        "bf16": {"enabled": cuda},
        "data_types": {"grad_accum_dtype": "fp32"},
        # else ZeRO-3 replaces torch.nn.functional.linear in the whole process, which is vLLM's too
        "zero_optimization": {"stage": zero, "memory_efficient_linear": False},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    trainer, *_ = deepspeed.initialize(
        model=policy, optimizer=optimizer, config=config, dist_init_required=False
    )
    trainer.enable_backward_allreduce = zero > 0  # apply_gradient() reduces for stage 0
    return trainer


def micro_batches(groups, budget):
    """
    Pack this rank's groups, lists of samples that stay together, into micro-batches.

    Groups are sorted by length, longest first. A micro-batch is filled until its padded size, rows
    times longest row, would exceed `budget` tokens. All ranks get the same number, some of them
    empty at the end, because ZeRO-2 and ZeRO-3 communicate in every micro-batch.
    """
    batches, filled, width = [], 0, 0
    for group in sorted(groups, key=longest_row, reverse=True):
        rows = len(rows_of(group))
        if batches and (filled + rows) * width <= budget:
            batches[-1] += group
            filled += rows
        else:
            batches.append(list(group))
            filled, width = rows, longest_row(group)
    number = int(all_reduce(len(batches), "max"))
    while len(batches) < number:
        batches.append([])
    return batches


def row_batches(samples, budget):
    """This rank's samples in micro-batches; those of a prompt share rows."""
    return micro_batches(rows_within(samples, budget), budget)


def longest_row(samples):
    return max(row_length(row) for row in rows_of(samples))


@torch.no_grad()
def response_logps(policy, samples, pad_id, device, micro_tokens):
    """
    Log-probabilities of each sample's response under a policy, or the trainer around it: a tensor
    (response tokens,) for each sample.
    """
    found = {}
    for batch in row_batches(samples, micro_tokens):
        logps, _ = token_logps(policy, collate(batch, pad_id, device))
        for sample, row in zip(batch, logps):
            found[sample] = row[: len(sample.response_ids)].clone()
    return [found[sample] for sample in samples]


def update(trainer, batches, loss_function, lr):
    """
    Take one optimizer step on this rank's micro-batches.

    loss_function(samples) returns (loss, metrics) of a micro-batch. The loss is its part of a sum:
    normalised by counts over ALL ranks, so that the parts of all micro-batches on all ranks add up
    to the loss of the global batch. The metrics are returned as they are, in a list.

    Return (loss of the global batch, gradient norm before clipping, metrics). A gradient that is
    not finite changes nothing; its norm is returned as inf.
    """
    trainer.train()  # from_pretrained leaves a model in eval mode, where --recompute has no effect
    for group in trainer.optimizer.param_groups:
        group["lr"] = lr
    total, metrics = 0.0, []
    for samples in batches:
        loss, values = loss_function(samples)
        trainer.backward(loss * dist.get_world_size())  # DeepSpeed averages over ranks; we sum
        total += loss.item()
        metrics.append(values)
    grad_norm = apply_gradient(trainer)
    return all_reduce(total), grad_norm, metrics


def apply_gradient(trainer):
    """Let the optimizer step if the gradient is finite. Return the norm, inf if it is not."""
    if trainer.zero_optimization():
        trainer.step()
        return float(trainer.get_global_grad_norm()) if trainer.was_step_applied() else math.inf
    # Without ZeRO, DeepSpeed clips but does not report the norm: reduce and measure it here.
    trainer.buffered_allreduce_fallback()
    gradients = [p.grad for p in trainer.module.parameters() if p.grad is not None]
    grad_norm = float(torch.nn.utils.get_total_norm(gradients))
    finite = math.isfinite(grad_norm)
    if finite:
        trainer.step()
    trainer.zero_grad()
    return grad_norm if finite else math.inf


def stop_if_diverged(grad_norm, samples, step, state, args):
    """Stop after three gradients in a row that were not finite; state["skipped"] counts them."""
    if math.isfinite(grad_norm):
        state["skipped"] = 0
        return
    state["skipped"] += 1
    if state["skipped"] == 3:
        path = Path(args.out, f"not-finite-{dist.get_rank()}.jsonl")
        with path.open("w") as file:
            for sample in samples:
                row = {"id": sample.pair.id, "text": sample.text, "finish": sample.finish}
                row["advantages"] = sample.advantages.tolist()
                file.write(json.dumps(row) + "\n")
        raise InputError(
            f"step {step + 1}: three gradients in a row were not finite; likely --lr {args.lr} is "
            f"too high. The last mini-batch is in {args.out}/not-finite-*.jsonl"
        )


def learning_rate(step, steps, peak, warmup, kind, floor=0.1):
    """
    Return the learning rate of step 0, 1, ...

    It rises linearly over `warmup` steps and reaches the peak in the step after. Then it falls to
    floor * peak, in a "cosine" or "linear" curve, or stays "constant".
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    if kind == "constant":
        height = 1
    elif kind == "linear":
        height = 1 - progress
    else:
        height = (1 + math.cos(math.pi * progress)) / 2
    return peak * (floor + (1 - floor) * height)


# --------------------------------------------------------------------------------------------------
# Flags

# those of trainer_flags() that may change when a run is continued
MUTABLE_FLAGS = {
    "attn",
    "recompute",
    "micro_tokens",
    "workers",
    "save_every",
    "save_minutes",
    "tracker",
}


def trainer_flags(parser):
    """Add the flags that every script that trains has."""
    add = parser.add_argument_group("trainer").add_argument
    add(
        "--attn",
        default="sdpa",
        choices=("sdpa", "eager", "flash_attention_2"),
        help="attention; the last one needs a GPU and flash-attn",
    )
    add(
        "--min_pixels",
        type=whole(1),
        help="smaller pictures are enlarged; without it: as the model has it",
    )
    add(
        "--max_pixels",
        type=whole(1),
        help="larger pictures are shrunk; without it: as the model has it",
    )
    add("--freeze_vision", action="store_true", help="do not train the vision tower")
    add(
        "--recompute",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="recompute activations in the backward pass: a third more work, far less memory",
    )
    add("--clip_grad", type=number(), default=1.0, help="largest gradient norm; 0 = any (ours)")
    add(
        "--zero",
        type=whole(0, 3),
        default=2,
        choices=(0, 1, 2, 3),
        help="DeepSpeed ZeRO stage; 0 on a CPU only; 3 also splits the weights, which a 7B model "
        "next to vLLM needs on 4 GPUs of 80 GB",
    )
    add(
        "--micro_tokens",
        type=whole(1),
        default=16384,
        help="padded tokens of a micro-batch; changes speed and memory, not the result",
    )
    add(
        "--workers",
        type=whole(0, 1000),
        default=4,
        help="processes per rank that load pictures; 0 = none",
    )
    add(
        "--seed", type=random_seed, default=0, help="of the data's order, of samples, of a new head"
    )
    add("--save_every", type=whole(), default=20, help="steps between checkpoints; 0 = none")
    add(
        "--save_minutes",
        type=number(),
        default=0.0,
        help="minutes between checkpoints, which of a 7B model are 116 GB each; the newest one is "
        "kept; 0 = by --save_every alone, and with it at 0 none is written",
    )
    tracker_help = "log there, too; its package must be installed"
    add("--tracker", default="none", choices=("none", *TRACKERS), help=tracker_help)


def check_trainer_flags(args):
    """Stop at bounds that leave no size for a picture, and at a tracker that is not there."""
    check_tracker(args.tracker)
    if args.min_pixels and args.max_pixels and args.min_pixels > args.max_pixels:
        raise InputError(
            f"--min_pixels is {args.min_pixels}; expected at most --max_pixels, {args.max_pixels}"
        )
