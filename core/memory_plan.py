"""
The memory and the disk that a run will take, worked out before it takes them: how many bytes, as
functions of the model's config, the flags and the number of ranks. A run that cannot fit is refused
with the flags to change.

On a GPU the weights are bfloat16; AdamW keeps float32 weights and two moments, and the gradients
are summed in float32. On a CPU all is float32. `--zero` says which of them the ranks share:
1 the optimizer's, 2 also the gradients, 3 also the weights. vLLM has its `--memory` of a GPU while
it is awake, and little while it sleeps.
"""

import copy
import functools
import math
import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist

from core.files import InputError, in_short
from core.model_folder import load_config
from core.policy import TokenLogps
from core.training import on_all_ranks

GB = 1e9
PROCESS = {"gpu": 1.0 * GB, "cpu": 0.7 * GB}  # CUDA's context and NCCL; the libraries
VLLM_ASLEEP = 1.5 * GB  # its CUDA graphs and what else sleep mode does not free
VLLM_CPU_CACHE = 2**30  # of keys and values, see core.sampler.start_vllm
BUCKET = 5e8  # DeepSpeed: gradients that are reduced together
LIVE = 1e9  # DeepSpeed: ZeRO-3 keeps at most so many weights whole
PICTURES = 0.5  # of a micro-batch's tokens at most so many are pictures'
USABLE = 0.95  # of what is free: the rest is lost between allocations
QUIET = 0.5  # of a machine's memory: a run on a CPU that takes less says nothing

# --------------------------------------------------------------------------------------------------
# The model


@dataclass(frozen=True)
class ModelSize:
    """What the sums need to know of a model."""

    weights: int
    trained: int
    layers: int
    width: int
    mlp: int
    vocabulary: int
    tower_layers: int
    tower_width: int
    tower_mlp: int
    patches: int  # that become one token


def model_size(config, freeze_vision=False):
    """The sizes of a model, counted without making its weights."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(copy.deepcopy(config))
    weights = [parameter.numel() for parameter in model.parameters()]
    frozen = 0
    if freeze_vision:
        frozen = sum(p.numel() for p in model.base_model.visual.parameters())
    text, vision = config.get_text_config(), config.vision_config
    tower_width = model.base_model.visual.patch_embed.embed_dim
    return ModelSize(
        weights=sum(weights),
        trained=sum(weights) - frozen,
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        mlp=text.intermediate_size,
        vocabulary=text.vocab_size,
        tower_layers=vision.depth,
        tower_width=tower_width,
        tower_mlp=getattr(vision, "intermediate_size", 4 * tower_width),
        patches=vision.spatial_merge_size**2,
    )


# --------------------------------------------------------------------------------------------------
# Memory of a rank


@dataclass(frozen=True)
class Plan:
    """Bytes that one rank takes of its GPU or, on a CPU, of the machine's memory."""

    process: float
    weights: float
    gradients: float
    optimizer: float
    reference: float
    buffers: float  # DeepSpeed's, while it trains
    activations: float
    optimizer_step: float  # what only its step needs, when the activations are gone
    vllm_awake: float
    vllm_asleep: float

    @property
    def resting(self):
        """What a rank holds whatever it does."""
        return self.process + self.weights + self.gradients + self.optimizer + self.reference

    @property
    def rollout(self):
        return self.resting + self.vllm_awake

    @property
    def update(self):
        working = self.buffers + max(self.activations, self.optimizer_step)
        return self.resting + working + self.vllm_asleep

    @property
    def peak(self):
        return max(self.rollout, self.update)


def plan_memory(model, flags, world, gpu=None):
    """
    The Plan of each of `world` ranks with the flags of rl.py or sft.py. gpu: all bytes that a GPU
    has; None on a CPU.
    """
    size = 2 if gpu else 4  # bytes of a weight
    of_optimizer, of_gradients, of_weights = (world if flags.zero >= k else 1 for k in (1, 2, 3))
    floats = 3 if gpu or flags.zero else 2  # without ZeRO, AdamW works on the weights themselves
    # torch's AdamW and, on a CPU, DeepSpeed around it work on copies of a rank's whole share
    copies = 3 if flags.zero and not gpu else 1
    awake, asleep = vllm_memory(model, flags, gpu)
    return Plan(
        process=PROCESS["gpu" if gpu else "cpu"],
        weights=size * model.weights / of_weights,
        gradients=4 * model.trained / of_gradients,
        optimizer=4 * floats * model.trained / of_optimizer,
        reference=size * model.weights if getattr(flags, "kl_coef", 0) else 0,
        buffers=trainer_buffers(model, flags, size, world),
        activations=activations(model, micro_batch_tokens(flags, world), flags.recompute, size),
        optimizer_step=4 * copies * model.trained / of_optimizer,
        vllm_awake=awake,
        vllm_asleep=asleep,
    )


def micro_batch_tokens(flags, world):
    """At most: --micro_tokens or, if that is less, all that a rank has of a batch."""
    samples = flags.train_batch if hasattr(flags, "train_batch") else 2 * flags.batch
    return min(flags.micro_tokens, math.ceil(samples / world) * flags.context)


def vllm_memory(model, flags, gpu):
    """(awake, asleep)"""
    if getattr(flags, "engine", None) != "vllm":
        return 0, 0
    if gpu is None:  # it does not sleep
        always = 4 * model.weights / flags.tensor_parallel + VLLM_CPU_CACHE
        return always, always
    return flags.memory * gpu, VLLM_ASLEEP


def trainer_buffers(model, flags, size, world):
    """DeepSpeed's: gradients on their way to other ranks, and weights that ZeRO-3 has gathered."""
    buffers = size * min(BUCKET, model.trained)
    if flags.zero == 3 and world > 1:
        # without recomputation a layer's weights stay whole until its backward pass
        whole = min(LIVE, model.weights) if flags.recompute else model.weights
        buffers += size * whole
    return buffers


def activations(model, tokens, recompute, size):
    """
    Of a micro-batch, at the most: in the backward pass of its last layer, or of the LM head.

    Recomputation keeps the input of each layer, and all of one layer at a time.
    """
    patches = PICTURES * tokens * model.patches
    layer, layer_open = of_layer(model.width, model.mlp, tokens, size)
    block, block_open = of_layer(model.tower_width, model.tower_mlp, patches, size)
    working = max(layer_open, block_open, of_head(model, tokens, size))
    if recompute:
        return model.layers * layer + model.tower_layers * block + working
    kept = (model.layers - 1) * layer_open + (model.tower_layers - 1) * block_open
    return kept + working


def of_layer(width, mlp, tokens, size):
    """
    (its input, all that its backward pass needs), as transformers 5.19 computes it: in bfloat16 the
    norms keep float32 copies. The last part are the gradients inside of the layer.
    """
    kept = (15 if size == 2 else 11) * width + 4 * mlp
    inside = 2 * width + 2 * mlp
    return size * tokens * width, size * tokens * (kept + inside)


def of_head(model, tokens, size):
    """Logits of two chunks and a half in float32, and the gradient of the head's weight."""
    chunk = min(TokenLogps.CHUNK, tokens * model.vocabulary)
    return 2.5 * 4 * chunk + (4 + size) * model.vocabulary * model.width


# --------------------------------------------------------------------------------------------------
# Does it fit?

# what may help, the cheapest first
CHANGES = (
    ("recompute", True),
    ("zero", 2),
    ("zero", 3),
    ("micro_tokens", 8192),
    ("micro_tokens", 4096),
    ("memory", 0.3),
    ("memory", 0.25),
)


@dataclass(frozen=True)
class Machine:
    """What there is for a run, in bytes."""

    free: float  # of a GPU or, on a CPU, for all ranks of a machine
    sharing: int  # ranks that share it: 1 on a GPU
    gpu: float | None = None  # all that a GPU has; None on a CPU


@functools.lru_cache(1)
def size_of(folder, freeze_vision):
    config = load_config(folder)
    try:
        return model_size(config, freeze_vision)
    except (ValueError, RuntimeError, TypeError, ArithmeticError) as error:
        raise InputError(f"--model {folder} cannot be loaded: {in_short(error)}") from None


def check_memory(args, device):
    """Tell the plan of a run beside what there is, before anything is loaded; stop at too much."""
    model = size_of(args.model, args.freeze_vision)
    rank, world = dist.get_rank(), dist.get_world_size()
    machine = this_machine(device)
    on_all_ranks(lambda: refuse(why_not(model, args, world, machine)))
    plan = plan_memory(model, args, world, machine.gpu)
    if rank == 0 and (machine.gpu or machine.sharing * plan.peak > QUIET * machine.free):
        print("memory: " + told(plan, machine), file=sys.stderr)
    if machine.gpu:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        on_all_ranks(lambda: refuse(why_no_host(model, ranks, free_host_memory())))


def refuse(reason):
    if reason:
        raise InputError(reason)


def told(plan, machine):
    line = f"{gb(plan.update)} while it trains"
    if plan.vllm_awake:
        line += f", {gb(plan.rollout)} while vLLM samples"
    shared = f", for each of {machine.sharing} ranks" if machine.sharing > 1 else ""
    return f"{line}{shared}; {gb(machine.free)} free ({in_words(plan)})"


def why_no_host(model, ranks, free):
    """Each rank loads the whole model into the machine's memory, and moves it to its GPU."""
    needed = ranks * (2 * model.weights + PROCESS["cpu"])
    if needed <= USABLE * free:
        return None
    return (
        f"{ranks} ranks load the model into the machine's memory, {gb(needed)}, and {gb(free)} are "
        "free; start fewer ranks, or free some"
    )


def this_machine(device):
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Machine(free, sharing=1, gpu=total)
    return Machine(free_host_memory(), sharing=ranks)


def free_host_memory():
    """What this machine or, if that is less, this container can still give."""
    amounts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = 1024 * int(amounts["MemAvailable"].split()[0])
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def why_not(model, flags, world, machine):
    """One line if a run cannot fit, with what to change; else None."""
    plan = plan_memory(model, flags, world, machine.gpu)
    if machine.gpu and plan.vllm_awake:
        needed = 2 * model.weights / flags.tensor_parallel + VLLM_ASLEEP
        if plan.vllm_awake < needed:
            return (
                f"--memory {flags.memory:g} leaves vLLM {gb(plan.vllm_awake)}, and its weights "
                f"take {gb(needed)}; expected at least --memory {needed / machine.gpu:.2f}"
            )
    if fits(plan, machine):
        return None
    where = "on each GPU" if machine.gpu else f"for {machine.sharing} rank(s) on this machine"
    return (
        f"the run needs {gb(machine.sharing * plan.peak)} {where}, and {gb(machine.free)} are "
        f"free ({in_words(plan)}); {advice(model, flags, world, machine)}"
    )


def fits(plan, machine):
    return machine.sharing * plan.peak <= USABLE * machine.free


def advice(model, flags, world, machine):
    """The single changes of flags that make a run fit."""
    helpful = []
    for name, value in CHANGES:
        changed = copy.copy(flags)
        setattr(changed, name, value)
        plan = plan_memory(model, changed, world, machine.gpu)
        if takes_less(flags, name, value) and fits(plan, machine):
            helpful.append(f"--{name}" if value is True else f"--{name} {value}")
    if helpful:
        return f"any of these makes it fit: {', '.join(helpful)}"
    return (
        "no single flag makes it fit: use more ranks, a smaller model, or several of --zero 3, "
        "--micro_tokens, --memory, --recompute"
    )


def takes_less(flags, name, value):
    """Whether a flag asks for less memory with this value than it does."""
    now = getattr(flags, name, None)
    if now is None:
        return False
    return value > now if name in ("zero", "recompute") else value < now


def in_words(plan):
    """The largest parts of a plan."""
    parts = {}
    for field in fields(plan):
        if field.name != "vllm_asleep":
            parts[field.name.replace("_", " ")] = getattr(plan, field.name)
    largest = sorted(parts, key=parts.get, reverse=True)[:5]
    return ", ".join(f"{name} {gb(parts[name])}" for name in largest if parts[name] >= 0.05 * GB)


def gb(count):
    return f"{count / GB:.1f} GB"


# --------------------------------------------------------------------------------------------------
# The disk


def checkpoint_bytes(weights, trained, zero, size):
    """
    What core.runs.save_checkpoint writes at a time, all ranks together, for a model of so many
    weights of `size` bytes.
    """
    floats = 3 if size == 2 or zero else 2  # of AdamW
    kept_weights = 0 if zero == 3 else weights  # ZeRO-3 restores them from the optimizer's copy
    return size * kept_weights + 4 * floats * trained


def disk_needed(one, model_bytes, held):
    """
    For the checkpoints of a run and its model. One checkpoint is kept; the next one is written
    beside it. held: how many are there already.
    """
    return (2 - min(1, held)) * one + model_bytes


def why_no_disk(out, needed, one, free):
    """One line if a run's checkpoints do not fit, else None."""
    if needed <= USABLE * free:
        return None
    return (
        f"--out {out}: a checkpoint is {gb(one)}; the last one, the one being written and the "
        f"model need {gb(needed)} more, and {gb(free)} are free. Free some, or choose an --out on "
        "another disk"
    )
