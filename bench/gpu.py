r"""
rl.py's step at the size of Qwen2.5-VL-3B or 7B: how fast is the update (tokens a second, MFU) by
--micro_tokens, how fast the rollout, what do sync, sleep and wake take, how much memory at most,
how many tokens a second and GPU in the whole step.

NOT YET RUN ON A GPU. --shape tiny and small run the same on a CPU, without sleep and wake; there
MFU is "-".

Model and pairs are bench/shapes.py's: random weights, pictures of noise of --image_tokens, answers
of --words random words. Random weights hardly ever end a sample, so each has --new_tokens. The
steps are rl.py's own functions.

MFU counts what the mathematics needs: 6 operations a weight and token, attention over pairs of
tokens (causal in the text), the LM head on response tokens only, the vision tower. What --recompute
does twice counts once. --layers 4 is for a GPU that is too small: the trainer needs 18 bytes a
weight in addition to the activations, so a whole 7B wants four GPUs of 80 GB.

One GPU, and four:
$ python bench/gpu.py --shape 7b --layers 4 --memory 0.25 --recompute --out out/bench/gpu.md
$ torchrun --nproc_per_node=4 bench/gpu.py --shape 7b --zero 3 --memory 0.4 --recompute \
    --out out/bench/gpu.md
A CPU:
$ python bench/gpu.py --shape tiny
"""

import contextlib
import resource
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import torch.distributed as dist

import rl
import toy.cpu
from bench.output import made_by, print_and_save
from bench.shapes import QWENS, TOYS, make_model, make_pairs, model_folder
from core import runs, training
from core.encoding import load_processor
from core.flags import command_line
from core.pairs import judging_turns
from core.prompts import encode_prompts
from core.seeds import seed_from
from core.shared_prompts import row_length, rows_of
from core.tables import markdown_table

PEAKS = {  # dense bfloat16 TFLOP/s of a GPU
    "H100": 989,
    "H200": 989,
    "H800": 989,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
    "B200": 2250,
}
PHASES = ("rollout", "sleep", "old log-probabilities", "updates", "sync")  # of a step

# --------------------------------------------------------------------------------------------------
# Measures


def operations(config, samples):
    """Floating-point operations of a forward and a backward pass over the samples."""
    text = config.text_config
    key_width = text.hidden_size // text.num_attention_heads * text.num_key_value_heads
    attention_weights = 2 * text.hidden_size**2 + 2 * text.hidden_size * key_width
    layer_weights = attention_weights + 3 * text.hidden_size * text.intermediate_size
    head_weights = text.hidden_size * text.vocab_size
    total = 0
    for row in rows_of(samples):  # the prompt, once for all of its samples
        prompt = len(row[0].prompt_ids)
        attended = prompt**2 + sum(sample.length**2 - prompt**2 for sample in row)
        per_layer = layer_weights * row_length(row) + text.hidden_size * attended
        total += 6 * text.num_hidden_layers * per_layer
        total += 6 * head_weights * sum(len(sample.response_ids) for sample in row)
        for grid in row[0].vision["image_grid_thw"]:
            total += operations_of_tower(config.vision_config, patches=int(grid.prod()))
    return total


def operations_of_tower(vision, patches):
    """On one picture."""
    block_weights = 4 * vision.hidden_size**2 + 3 * vision.hidden_size * vision.intermediate_size
    merged = vision.spatial_merge_size**2  # patches that become a token
    merged_width = merged * vision.hidden_size
    merger_weights = merged_width**2 + merged_width * vision.out_hidden_size
    weights = vision.depth * block_weights + merger_weights / merged
    # how many patches a patch attends to, in all blocks
    full = len(vision.fullatt_block_indexes)
    window = min(patches, (vision.window_size // vision.patch_size) ** 2)
    attended = full * patches + (vision.depth - full) * window
    return 6 * patches * weights + 12 * vision.hidden_size * patches * attended


class Measure:
    """with measure("name"): ... notes its seconds, and the most memory in use meanwhile."""

    def __init__(self, device):
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.seconds = defaultdict(list)
        self.memory = Counter()  # bytes

    def used(self):
        if self.on_gpu:  # by all processes: vLLM's allocations are not torch's
            free, total = torch.cuda.mem_get_info(self.device)
            return total - free
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    @contextlib.contextmanager
    def __call__(self, name):
        over, start = threading.Event(), time.perf_counter()
        watcher = threading.Thread(target=self.watch, args=(name, over))
        watcher.start()
        try:
            yield
            if self.on_gpu:
                torch.cuda.synchronize()
            self.seconds[name].append(time.perf_counter() - start)
        finally:
            over.set()
            watcher.join()

    def watch(self, name, over):
        while True:
            self.memory[name] = max(self.memory[name], self.used())
            if over.wait(0.05):
                return

    def median(self, name):
        return statistics.median(self.seconds[name][1:])  # the first one warms up

    def gib(self, name):
        return f"{self.memory[name] / 2**30:.1f}"


def measure_step(run, prompts, seeds, measure):
    """One step in rl.py's order, with two updates; returns its samples."""
    with measure("rollout"):
        samples = rl.sample_responses(run, prompts, seeds, 1, 1.0)
    with measure("sleep"):
        run.sampler.sleep()
    measure_learning(run, samples, measure)
    return samples


def measure_learning(run, samples, measure):
    """What rl.py does with its samples: old log-probabilities, two updates, the sync."""
    for number, sample in enumerate(samples):
        sample.advantages = torch.full((len(sample.response_ids),), number % 2 - 0.5)
    half = len(samples) // 2
    mini_batches = [samples[:half], samples[half:]]
    with measure("old log-probabilities"):
        rl.set_old_logps(run, mini_batches)
    with measure("updates"):
        for mini_batch in mini_batches:
            rl.optimizer_step(run, mini_batch, run.args.lr)
    with measure("sync"):
        rl.sync(run)


def measure_wake(run, measure):
    """From now on, time what happens inside the sync: vLLM takes its memory back."""
    real = run.sampler.llm.wake_up

    def wake_up(tags):
        with measure(f"wake, {tags[0]} (in the sync)"):
            real(tags=tags)

    run.sampler.llm.wake_up = wake_up


def measure_copies(run, measure, repeats):
    weights = [p.data for p in run.policy.parameters()]
    copies = [torch.empty_like(weight) for weight in weights]
    for _ in range(repeats + 1):
        with measure("copy of the weights"):
            for copy, weight in zip(copies, weights):
                copy.copy_(weight)


def measure_updates(run, samples, args, measure):
    """A row of the table for each size of micro-batches."""
    peak = 1e12 * (args.peak or peak_of(run.device))
    tokens = sum(sample.length for sample in samples)
    rows = []
    for budget in args.budgets:
        run.args.micro_tokens, name = budget, f"update {budget}"
        try:
            for _ in range(args.repeats + 1):
                with measure(name):
                    rl.optimizer_step(run, samples, args.lr)
        except torch.OutOfMemoryError:
            if run.world > 1:  # the other ranks would wait for this one
                raise
            rows.append([f"{budget:,}", "-", "out of memory", "-", "-", "-"])
            break
        seconds = measure.median(name)
        mfu = "-"
        if peak:
            mfu = f"{operations(run.policy.model.config, samples) / seconds / peak:.1%}"
        batches = len(training.row_batches(samples, budget))
        speed = f"{tokens / seconds:,.0f}"
        row = [f"{budget:,}", str(batches), f"{seconds:.3g}", speed, mfu, measure.gib(name)]
        rows.append(row)
    return rows


def peak_of(device):
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return next((tflops for gpu, tflops in PEAKS.items() if gpu in name), 0)


# --------------------------------------------------------------------------------------------------
# The report


def rows_of_phases(measure, samples):
    responses = sum(len(sample.response_ids) for sample in samples)
    tokens = sum(sample.length for sample in samples)
    others = []
    for name in measure.seconds:
        if name not in PHASES and not name.startswith("update "):
            others.append(name)
    rows = []
    for name in (*PHASES, *others):
        rows.append([name, f"{measure.median(name):.3g}", "", measure.gib(name)])
    rows[0][2] = f"{responses / measure.median('rollout'):,.0f} sampled"
    seconds = sum(measure.median(name) for name in PHASES)
    speed = f"{tokens / seconds:,.0f} of prompts and samples"
    memory = max(measure.memory.values()) / 2**30
    rows.append(["whole step", f"{seconds:.3g}", speed, f"{memory:.1f}"])
    return rows


def describe_run(run, samples, args):
    about = runs.run_header(args, run.world, run.device)
    weights = sum(getattr(p, "ds_numel", p.numel()) for p in run.policy.parameters())
    prompt = statistics.mean(len(sample.prompt_ids) for sample in samples)
    response = statistics.mean(len(sample.response_ids) for sample in samples)
    recompute = ", recomputation" if args.recompute else ""
    versions = [f"{name} {version}" for name, version in about["versions"].items()]
    versions = ", ".join(versions)
    parts = [
        f"{weights:,} random weights",
        f"{about['ranks']} rank(s), {about['device']}, {about['threads']} thread(s)",
        f"{args.samples} samples a rank, prompts of {prompt:.0f} tokens, samples of {response:.0f}",
        f"--micro_tokens {budget_of_step(args)}, ZeRO {args.zero}{recompute}",
        f"medians of {args.repeats}",
        versions,
        f"seed {args.seed}",
        made_by("gpu.py"),
    ]
    return "; ".join(parts)


def report(run, samples, measure, by_budget, args):
    layers = f", {args.layers} layers" if args.layers else ""
    head = ["phase", "seconds", "tokens a second and rank", "memory, GiB"]
    head_by_budget = ["--micro_tokens", "micro-batches", *head[1:3], "MFU", head[3]]
    parts = [
        f"## A step at the shape {args.shape}{layers}",
        describe_run(run, samples, args),
        markdown_table(head, rows_of_phases(measure, samples)).strip(),
        "The update by the size of its micro-batches:",
        markdown_table(head_by_budget, by_budget).strip(),
    ]
    return "\n\n".join(parts) + "\n"


def budget_of_step(args):
    """The last but one."""
    return args.budgets[-2:][0]


def parser():
    p = command_line(__doc__)
    add = p.add_argument
    add("--shape", choices=[*QWENS, *TOYS], default="7b", help="tiny and small are for a CPU")
    add("--layers", type=int, default=0, help="of the language model; 0 = as the shape has")
    add("--samples", type=int, default=64, help="of each rank in a rollout")
    add("--new_tokens", type=int, default=512, help="of each sample")
    add("--image_tokens", type=int, default=576, help="of a prompt's picture; a square number")
    add("--words", type=int, default=200, help="of each of the two answers")
    budgets_help = "--micro_tokens to try, rising; the step takes the last but one"
    default = [4096, 8192, 16384, 32768]
    add("--budgets", type=int, nargs="+", default=default, help=budgets_help)
    add("--repeats", type=int, default=3, help="of each measure, after one that does not count")
    add("--zero", type=int, default=2, help="DeepSpeed ZeRO stage")
    add("--recompute", action="store_true", help="gradient checkpointing")
    add("--attn", default="sdpa", help="attention of the trainer")
    add("--memory", type=float, default=0.5, help="share of the GPU for vLLM while it is awake")
    add("--context", type=int, default=4096, help="longest prompt and sample, tokens")
    add("--lr", type=float, default=1e-6, help="learning rate")
    add("--peak", type=float, default=0.0, help="dense bfloat16 TFLOP/s; 0 = by the GPU's name")
    add("--seed", type=int, default=0, help="of weights, prompts and samples")
    work_help = "folder for model and pictures, which all ranks see; none = a temporary one"
    add("--work", help=work_help)
    add("--out", help="file for the tables, in markdown")
    return p


def flags_of_rl(model, budget, args):
    words = ["--model", str(model), "--max_new_tokens", str(args.new_tokens)]
    words += ["--micro_tokens", str(budget)]
    words += ["--recompute" if args.recompute else "--no-recompute"]
    for name in ("context", "zero", "memory", "attn", "lr"):
        words += [f"--{name}", str(getattr(args, name))]
    return rl.parser().parse_args(words)


def shared_folder(args, rank):
    """The same on every rank."""
    folder = [None]
    if rank == 0:
        folder = [args.work or tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    return Path(folder[0])


def main():
    args = parser().parse_args()
    rank, world_size, device = training.start_ranks(args.seed)
    if device.type == "cpu":
        toy.cpu.speed_up_process()
    work = shared_folder(args, rank)
    model = model_folder(work, args.shape, args.layers)
    if rank == 0 and not (model / "config.json").exists():
        make_model(model, args.shape, args.layers, args.image_tokens, device)
    dist.barrier()
    processor = load_processor(model)
    flags = flags_of_rl(model, budget_of_step(args), args)
    run = rl.start_run(flags, processor, rank, world_size, device)
    pairs = make_pairs(work, args.samples, args.image_tokens, args.words, args.seed, rank)
    prompts = encode_prompts(pairs, judging_turns, processor)
    measure = Measure(device)
    if device.type == "cuda":
        rl.sync(run)  # as rl.py does before its first rollout
        measure_wake(run, measure)
    for step in range(args.repeats + 1):
        seeds = [seed_from(args.seed, rank, step, i) for i in range(args.samples)]
        samples = measure_step(run, prompts, seeds, measure)
    run.sampler.sleep()
    if args.zero < 3:  # ZeRO-3 leaves no weights to copy
        measure_copies(run, measure, args.repeats)
    for sample in samples:
        sample.old_logps = None
    by_budget = measure_updates(run, samples, args, measure)
    if rank == 0:
        print_and_save(report(run, samples, measure, by_budget, args), args.out)
    dist.barrier()
    if rank == 0 and not args.work:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
