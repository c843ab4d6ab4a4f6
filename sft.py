"""
Stage 2: the long-CoT cold start (section 3.2), and the two baselines of Table 5.

The base model learns the format of a judgement from the annotator's. The loss is the mean of -log p
over all response tokens of the global batch, so it is the same on any number of ranks and at any
micro-batch size. With --head, this script trains the reward models that R1-Reward is compared with:
`scalar` (a two-layer MLP on the last token of a response, in place of the LM head) and `critic`
(the model first writes a critique of the single response, then the MLP scores it).

Where the paper is silent:
1) AdamW (0.9, 0.95), no weight decay, gradient norm clipped at 1; linear warm-up over 3 % of the
   steps, then a cosine down to 10 %
2) images of at most 640 tokens; a pair longer than the context is dropped and counted, never cut
3) the baselines: pair loss -log sigmoid(better - worse), mean over pairs; for the critic plus the
   loss on its critiques

The toy, on two CPU cores:
$ python sft.py @toy/sft.args
One node with 4 GPUs of 80 GB, the paper's setting (not yet run at this scale):
$ torchrun --nproc_per_node=4 sft.py --data out/annotate/sft.jsonl --out out/sft
Two nodes; run it on each with its own NODE_RANK, --out being a folder they share:
$ torchrun --nnodes=2 --node_rank=$NODE_RANK --master_addr=$HOST --master_port=29500 \\
    --nproc_per_node=4 sft.py --data out/annotate/sft.jsonl --out out/sft
A baseline of Table 5:
$ torchrun --nproc_per_node=4 sft.py --head scalar --data out/annotate/sft.jsonl --out out/scalar

Reads a JSONL file of pairs (see annotate.py) and a model's folder or name. Writes into --out: the
model in the format of from_pretrained and vLLM, with its README.md, log.jsonl (one row a step),
curves.png and checkpoints/. A run that was stopped is continued by the same command, from its last
checkpoint.
"""

import json
import math
import random
import shutil
import time
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from core import encoding, flags, runs, training
from core.files import InputError
from core.memory_plan import check_memory
from core.pairs import (
    Pair,
    check_pairs,
    critique_turns,
    digest_of,
    judging_turns,
    read_pairs,
    user_turn,
)
from core.pictures import BadPicture
from core.policy import load_policy
from core.sampler import HFSampler
from stable_reinforce import parse
from toy import cpu

MUTABLE_FLAGS = training.MUTABLE_FLAGS | {"out", "eval_every", "max_new_tokens"}
VIEW = runs.View(
    step=["loss", "norm", "tokens"],
    held_out=["val_loss", "val_format", "val_accuracy", "val_n"],
    curves={
        "loss, nats a token": ["loss", "val_loss"],
        "held-out pairs": ["val_format", "val_accuracy"],
        "norm of the gradient": ["norm"],
        "learning rate": ["lr"],
    },
)

# --------------------------------------------------------------------------------------------------
# From pairs to examples

TOO_LONG = "too long"
NO_ANNOTATION = "no annotation"
NO_CRITIQUES = "no critiques"
DROPPED = (TOO_LONG, NO_ANNOTATION, NO_CRITIQUES)


@dataclass
class Example:
    """What is learned from one pair."""

    # the judgement or, with a reward head, [the better response, the worse response]
    samples: list[encoding.Sample] = field(default_factory=list)
    dropped: str | None = None  # why the pair is not trained on, one of DROPPED


def encode_pair(pair, processor, head_kind, context):
    """Encode what a model with this head learns from a pair, if it fits the context."""
    if head_kind is None and pair.annotation is None:
        return Example(dropped=NO_ANNOTATION)
    if head_kind == "critic" and pair.critiques is None:
        return Example(dropped=NO_CRITIQUES)
    dialogues = dialogues_of(pair, head_kind)
    samples = [encoding.encode(processor, turns, response) for turns, response in dialogues]
    if training.longest_row(samples) > context:
        return Example(dropped=TOO_LONG)
    return Example(samples)


def dialogues_of(pair, head_kind):
    """Return the (turns, response) of each sample; for a reward head, the better one first."""
    if head_kind is None:
        return [(judging_turns(pair), pair.annotation)]
    better_first = (pair.choice - 1, 2 - pair.choice)
    if head_kind == "critic":
        return [(critique_turns(pair, i), pair.critiques[i]) for i in better_first]
    turns = user_turn(pair.images, pair.video, pair.question)
    return [(turns, pair.responses[i]) for i in better_first]


@dataclass
class Examples(torch.utils.data.Dataset):
    """The examples of a file of pairs by their number, for data workers."""

    path: str
    pairs: list[Pair]
    processor: object
    head_kind: str | None
    context: int

    def __getitem__(self, number):
        pair = self.pairs[number]
        try:
            return encode_pair(pair, self.processor, self.head_kind, self.context)
        except BadPicture as problem:
            where = f"{self.path}, line {number + 1} ({pair.id[:80]})"
            raise InputError(f"{where}: {problem}") from None


def read_data(args):
    """Return (pairs of --data, held-out pairs, the numbers of each step's pairs)."""
    pairs = read_pairs(args.data)
    check_pairs(args.data, pairs)
    numbers = range(len(pairs))
    shuffled = random.Random(f"{args.seed} held out").sample(numbers, len(pairs))
    if args.val and args.eval_n:
        held_out, numbers = read_pairs(args.val, args.eval_n), shuffled
        check_pairs(args.val, held_out)
    else:
        held_out = [pairs[i] for i in shuffled[: args.eval_n]]
        numbers = shuffled[args.eval_n :]
    check_something_to_learn(args, pairs, numbers)
    return pairs, held_out, global_batches(pairs, numbers, args.batch, args.epochs, args.seed)


def check_something_to_learn(args, pairs, numbers):
    """A run that takes no step would save the model that it was given."""
    if not numbers:
        raise InputError(
            f"--data {args.data} has {len(pairs)} pairs, all held out by --eval_n {args.eval_n}; "
            "use a smaller --eval_n, or --val"
        )


def global_batches(pairs, numbers, size, epochs, seed):
    """
    Return a list of at most `size` pair numbers for each step.

    Every epoch has its own order. Its batches differ in size by one at most, and each begins with
    its longest pairs.
    """
    rng = random.Random(f"{seed} order")
    n = len(numbers)
    steps = math.ceil(n / size)
    batches = []
    for _ in range(epochs):
        order = rng.sample(numbers, n)
        for step in range(steps):
            batch = order[step * n // steps : (step + 1) * n // steps]
            batches.append(sorted(batch, key=lambda i: characters(pairs[i]), reverse=True))
    return batches


def characters(pair):
    """Return a rough measure of a pair's length that needs no tokenizer."""
    texts = [pair.annotation or "", pair.question, *pair.responses]
    return sum(len(text) for text in texts)


def load_examples(args, pairs, local_batches, processor, head_kind):
    """Return an iterator over the examples of all local batches, which data workers read ahead."""
    examples = Examples(args.data, pairs, processor, head_kind, args.context)
    order = list(chain.from_iterable(local_batches))
    # two steps' worth, split among the workers
    ahead = 2 * args.batch // (dist.get_world_size() * max(1, args.workers)) + 1
    return training.read_ahead(examples, order, args.workers, ahead)


def sample_groups(examples):
    """Return the samples of each pair that is not dropped."""
    return [example.samples for example in examples if not example.dropped]


def response_tokens(groups):
    return sum(len(sample.response_ids) for sample in chain.from_iterable(groups))


def count_drops(examples, counts):
    for example in examples:
        if example.dropped:
            counts[example.dropped] += 1


def total_drops(counts):
    """Add up the ranks' counts of dropped pairs."""
    totals = training.all_reduce(list(counts.values()))
    return {reason: int(total) for reason, total in zip(counts, totals)}


def check_any_left(step, pairs_left, drops, context):
    """A step without a pair has no gradient; mostly none of the file's pairs fits."""
    if not pairs_left:
        reasons = ", ".join(f"{reason} {count}" for reason, count in drops.items() if count)
        raise InputError(
            f"step {step} has no pair left: so far were dropped {reasons}. Expected annotated "
            f"pairs that fit into --context {context}; raise it, or remove the long ones"
        )


# --------------------------------------------------------------------------------------------------
# Loss


class LossSums(NamedTuple):
    text: torch.Tensor | float  # -log p, over response tokens; 0 with a scalar head
    ranking: torch.Tensor | float  # -log sigmoid(better - worse), over pairs; 0 without a head
    right: int  # pairs whose better response has the higher score


def loss_sums(policy, batch):
    """Sum the losses of a collated batch. `policy` is a Policy or the trainer around it."""
    out = policy(batch)
    text = 0.0 if out["logps"] is None else -out["logps"].sum()
    if out["score"] is None:
        return LossSums(text, 0.0, 0)
    better, worse = out["score"][::2], out["score"][1::2]
    margin = better - worse
    ranking = -torch.nn.functional.logsigmoid(margin).sum()
    return LossSums(text, ranking, int((margin > 0).sum()))


def micro_batch_loss(trainer, pad_id, tokens, pairs, samples):
    """
    Return what a micro-batch adds to the loss of the global batch, and no metrics.

    `tokens` and `pairs` count the response tokens and the pairs of the global batch.
    """
    sums = loss_sums(trainer, encoding.collate(samples, pad_id, trainer.device))
    return sums.text / max(1, tokens) + sums.ranking / max(1, pairs), None


def check_finite(step, loss, grad_norm, batch, pairs, args):
    """Stop at a loss or gradient that is not finite, and write down the pairs it came from."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    path = Path(args.out, "not_finite.json")
    ids = [pairs[number].id for number in batch]
    path.write_text(json.dumps({"step": step, "ids": ids}))
    raise InputError(
        f"step {step}: the loss is {loss}, the gradient norm {grad_norm}. The weights are those "
        f"before the step; the ids of its pairs are in {path}. Likely causes: --lr {args.lr} is "
        "too high, or an image or its text is broken"
    )


# --------------------------------------------------------------------------------------------------
# Validation


@torch.no_grad()
def validate(trainer, processor, pairs, args):
    """
    Return val_loss, val_accuracy and, without a head, val_format, over the pairs of all ranks.

    Accuracy and format are those of greedy judgements (of the critic: of scores after its greedy
    critiques). ZeRO-3 would gather all weights again for every token, so it skips what has to be
    generated; evaluate.py measures it.
    """
    if not pairs:
        return {}
    trainer.eval()
    head_kind, pad_id = trainer.module.head_kind, processor.tokenizer.pad_token_id
    local_pairs = pairs[dist.get_rank() :: dist.get_world_size()]
    examples = [encode_pair(pair, processor, head_kind, args.context) for pair in local_pairs]
    groups = sample_groups(examples)

    sums = total_losses(trainer, groups, pad_id, args.micro_tokens)
    tokens, n = training.all_reduce([response_tokens(groups), len(groups)])
    metrics = {}
    if n:
        metrics["val_loss"] = sums.text / max(1, tokens) + sums.ranking / n
        metrics["val_n"] = int(n)
    can_generate = trainer.zero_optimization_stage() < 3
    if head_kind == "scalar":
        metrics["val_accuracy"] = sums.right / max(1, n)
    elif head_kind == "critic" and can_generate:
        own = own_critiques(trainer, processor, groups, args.max_new_tokens)
        sums = total_losses(trainer, own, pad_id, args.micro_tokens)
        metrics["val_accuracy"] = sums.right / max(1, n)
    elif head_kind is None and can_generate:
        metrics |= judge_pairs(trainer, processor, local_pairs, args.max_new_tokens)
    return metrics


def total_losses(trainer, groups, pad_id, micro_tokens):
    """Return the LossSums of the groups of all ranks."""
    totals = [0.0, 0.0, 0]
    for samples in training.micro_batches(groups, micro_tokens):
        sums = loss_sums(trainer, encoding.collate(samples, pad_id, trainer.device))
        totals = [total + float(value) for total, value in zip(totals, sums)]
    return LossSums(*training.all_reduce(totals))


def own_critiques(trainer, processor, groups, max_new_tokens):
    """Replace the annotator's critiques by the model's."""
    samples = list(chain.from_iterable(groups))
    critiques = generate_greedily(trainer, processor, samples, max_new_tokens)
    samples = [replace(sample, response_ids=own.ids) for sample, own in zip(samples, critiques)]
    return [samples[i : i + 2] for i in range(0, len(samples), 2)]


def judge_pairs(trainer, processor, local_pairs, max_new_tokens):
    """Return format and accuracy of one greedy judgement a pair, over the pairs of all ranks."""
    tokenizer = processor.tokenizer
    prompts = [encoding.encode(processor, judging_turns(pair)) for pair in local_pairs]
    judgements = generate_greedily(trainer, processor, prompts, max_new_tokens)
    right, well_formed = 0, 0
    for pair, judgement in zip(local_pairs, judgements):
        verdict = parse(tokenizer.decode(judgement.ids, skip_special_tokens=True))
        right += verdict.choice == pair.choice
        well_formed += verdict.well_formed and judgement.ended
    right, well_formed, n = training.all_reduce([right, well_formed, len(local_pairs)])
    return {"val_format": well_formed / n, "val_accuracy": right / n, "val_n": int(n)}


def generate_greedily(trainer, processor, prompts, max_new_tokens):
    """Return the model's response to each prompt at temperature 0, as Generated."""
    sampler = HFSampler(trainer.module, processor, trainer.device)
    generated = sampler.generate(prompts, temperature=0.0, max_tokens=max_new_tokens)
    return [responses[0] for responses in generated]


# --------------------------------------------------------------------------------------------------
# The stage


def parser():
    p = flags.command_line(__doc__)
    add = p.add_argument_group("model and data").add_argument
    add(
        "--model",
        default="Qwen/Qwen2.5-VL-7B-Instruct",
        help="folder or name of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL",
    )
    heads = ("scalar", "critic")
    add("--head", choices=heads, help="a baseline of Table 5; a model that has a head keeps it")
    add("--data", required=True, help="JSONL file of annotated pairs, as annotate.py writes it")
    add(
        "--val",
        help="JSONL file of held-out pairs; without it --eval_n pairs of --data are held out",
    )
    context_help = "tokens; longer pairs are dropped and counted"
    add("--context", type=flags.whole(1), default=8192, help=context_help)
    add("--out", required=True, help="folder for the model, the log and the checkpoints")
    add = p.add_argument_group("optimisation").add_argument
    add(
        "--lr", type=flags.above_zero(), default=1e-5, help="peak learning rate (1e-5 in the paper)"
    )
    batch_help = "most pairs a step, all ranks (256 in the paper)"
    add("--batch", type=flags.whole(1), default=256, help=batch_help)
    epochs_help = "passes over the data (1 in the paper)"
    add("--epochs", type=flags.whole(1, 1000), default=1, help=epochs_help)
    warmup_help = "share of the steps that warm up (ours)"
    add("--warmup", type=flags.number(0, 1), default=0.03, help=warmup_help)
    curves = ("cosine", "linear", "constant")
    add("--schedule", default="cosine", choices=curves, help="of --lr, down to a tenth (ours)")
    add("--weight_decay", type=flags.number(), default=0.0, help="of AdamW (ours)")
    add = p.add_argument_group("validation").add_argument
    every_help = "steps between validations; also first and last"
    add("--eval_every", type=flags.whole(1), default=50, help=every_help)
    add(
        "--eval_n", type=flags.whole(), default=256, help="pairs in a validation; 0 = no validation"
    )
    longest = "longest judgement or critique in validation; none is generated with --zero 3"
    add("--max_new_tokens", type=flags.whole(1), default=1024, help=longest)
    training.trainer_flags(p)
    # an image has 4 to 640 tokens (ours)
    p.set_defaults(min_pixels=4 * 28 * 28, max_pixels=640 * 28 * 28, save_every=50)
    return p


def load_model(args, device):
    """Return the policy and the processor of --model, if there is memory for the run."""
    check_memory(args, device)
    processor = encoding.load_processor(args.model, args.min_pixels, args.max_pixels)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    policy = load_policy(
        args.model, args.head, dtype, args.attn, args.recompute, args.freeze_vision
    )
    if device.type == "cpu":
        cpu.speed_up_process()
        cpu.speed_up_policy(policy)
    return policy, processor


def begin_log(args, batches, held_out, world, device, done):
    """Begin the run's log, or continue it after `done` steps."""
    counts = {"pairs": len(set(chain(*batches))), "held_out": len(held_out)}
    header = runs.run_header(args, world, device) | counts
    return runs.Log(args.out, header, done, len(batches), VIEW, args.tracker)


def checked_flags():
    args = parser().parse_args()
    training.check_trainer_flags(args)
    return args


def main():
    args = checked_flags()
    out = Path(args.out)

    # 1. Ranks, pairs. A step's longest come first: every world-th of them is a rank's fair share.
    rank, world, device = training.start_ranks(args.seed)
    runs.open_out(args, rank)
    pairs, held_out, batches = read_data(args)
    args.data_digest = digest_of(pairs)
    if runs.is_finished(args, MUTABLE_FLAGS):
        return end(out, rank, "this run is finished: its model is here")
    local_batches = [batch[rank::world] for batch in batches]
    steps = len(batches)
    warmup = round(args.warmup * steps)

    # 2. Model, trainer
    policy, processor = load_model(args, device)
    pad_id = processor.tokenizer.pad_token_id
    trainer = training.make_trainer(
        policy, args.zero, args.lr, device, args.weight_decay, args.clip_grad
    )

    # 3. Continue where a killed run had got to
    done, state = runs.resume(out, trainer, args, MUTABLE_FLAGS, dropped=dict.fromkeys(DROPPED, 0))
    log = begin_log(args, batches, held_out, world, device, done)
    upcoming = load_examples(args, pairs, local_batches[done:], processor, policy.head_kind)
    saving = runs.SaveTimes(args, steps)
    if done == 0 and held_out:
        log.row(0, **validate(trainer, processor, held_out, args))
    start = time.time()

    for step in range(done + 1, steps + 1):
        # 4. This rank's examples
        examples = [next(upcoming) for _ in local_batches[step - 1]]
        groups = sample_groups(examples)
        count_drops(examples, state["dropped"])

        # 5. Update by the mean over the global batch
        tokens, n = training.all_reduce([response_tokens(groups), len(groups)])
        dropped = total_drops(state["dropped"])
        check_any_left(step, n, dropped, args.context)
        lr = training.learning_rate(step - 1, steps, args.lr, warmup, args.schedule)
        loss_function = partial(micro_batch_loss, trainer, pad_id, tokens, n)
        local = training.micro_batches(groups, args.micro_tokens)
        loss, grad_norm, _ = training.update(trainer, local, loss_function, lr)
        check_finite(step, loss, grad_norm, batches[step - 1], pairs, args)

        # 6. Validate, log, save
        row = {"loss": loss, "lr": lr, "norm": grad_norm, "pairs": int(n), "tokens": int(tokens)}
        if step == steps or step % args.eval_every == 0:
            row |= validate(trainer, processor, held_out, args)
        row["dropped"] = dropped
        log.row(step, **row, seconds=time.time() - start)
        start = time.time()
        if step < steps and saving.is_due(step):
            runs.save_checkpoint(out / "checkpoints", trainer, step, state)

    # 7. Save the model
    runs.finish_run(out, policy, processor, log, rank, "judge", parser())
    end(out, rank, f"pairs dropped: {dropped}")


def end(out, rank, report):
    """The model is saved: the checkpoints have done their work."""
    if rank == 0:
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
        print(f"{out}: {report}")
    dist.destroy_process_group()


if __name__ == "__main__":
    flags.run_stage("sft.py", main)
