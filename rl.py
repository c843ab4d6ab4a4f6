r"""
Stage 3: StableReinforce (section 3). The model judges pairs, is rewarded by Eq. 2, and learns from
its own judgements. One step, in the order of train():

    1. roll out     a judgement of each pair (or --samples), by vLLM, at temperature 1
    2. compare      now and then: are vLLM and the trainer the same policy?
    3. score        format and result by rule; consistency by the judge, which works while 4 does
    4. old logps    by the trainer; those of the first mini-batch are the update's own
    5. rewards      Eq. 2
    6. advantages   z-scores over the global batch; beyond 3 sigma they are dropped
    7. update       pre-clipped PPO: a rollout of 256 makes two updates of 128; in the first every
                    ratio is 1, so only the second can clip
    8. sync         every weight goes into vLLM

The mathematics is in stable_reinforce.py. Differs from the authors' released code:
1) the update sees the image (released: rollouts and reference do, the trained policy does not)
2) log-probabilities of vLLM and of the trainer are compared: in the first rollout, in the first
   after a sync, and every --check_every steps
3) a judgement cut off by --max_new_tokens has format 0; its verdict, if it has one, still counts;
   no verdict earns 0 (released: an exception earns 1)
Where the paper is silent:
4) samples are shuffled before they are cut into mini-batches
5) AdamW (0.9, 0.95), no weight decay, a constant rate after --warmup updates
6) k1 as a KL penalty is part of the reward (Reinforce++), k2 and k3 are part of the loss

The toy, two ranks on two CPU cores:
$ torchrun --nproc_per_node=2 rl.py @toy/rl.args --clip 1e3
One node with 4 GPUs of 80 GB, the paper's setting (not yet run at this scale): the files are where
the stages before it leave them, and the judge is a server on another GPU or machine:
$ torchrun --nproc_per_node=4 rl.py --clip 1e3 --judge_url http://localhost:8000/v1
Two nodes, on each with its NODE_RANK, with folders that both see:
$ torchrun --nnodes=2 --node_rank=$NODE_RANK --master_addr=$HOST --master_port=29500 \
    --nproc_per_node=4 rl.py --clip 1e3 --judge_url http://judge:8000/v1
Only the comparison of vLLM and the trainer, before and after syncs:
$ python rl.py --check

Reads  --model (see sft.py), --data (pairs, see annotate.py).
Writes --out: the model with its README.md, log.jsonl (a row for each step), rollouts-*.jsonl
       (judgements with their rewards), curves.png, checkpoints/.
"""

import argparse
import math
import random
import sys
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch

import toy.cpu
from core import (
    agreement,
    encoding,
    flags,
    metrics,
    neighbours,
    pairs,
    prompts,
    rl_flags,
    runs,
    training,
)
from core.memory_plan import check_memory
from core.policy import load_policy, token_logps, whole_weights
from core.sampler import HFSampler, VLLMSampler
from core.seeds import seed_from
from judge import ConsistencyJudge
from stable_reinforce import average, final_reward, format_reward, parse, result_reward


@dataclass
class Run:
    """What lives as long as the run."""

    args: argparse.Namespace
    rank: int
    world: int
    device: torch.device
    processor: object
    sampler: object  # vLLM, or transformers' generate
    trainer: object  # DeepSpeed's engine around the policy
    reference: object  # the policy as it was, for a KL penalty; or None

    @property
    def policy(self):
        return self.trainer.module

    @property
    def pad_id(self):
        return self.processor.tokenizer.pad_token_id

    def response_logps(self, policy, samples):
        budget = self.args.micro_tokens
        return training.response_logps(policy, samples, self.pad_id, self.device, budget)

    def save(self, step, state):
        runs.save_checkpoint(Path(self.args.out, "checkpoints"), self.trainer, step, state)


def start_run(args, processor, rank, world, device):
    """
    Load the sampler, the trainer and the reference. vLLM comes first: built after DeepSpeed's
    ZeRO-3, its own weights would be split too.
    """
    check_memory(args, device)
    policy = load(args, device, recompute=args.recompute, freeze_vision=args.freeze_vision)
    if args.engine == "hf":
        sampler = HFSampler(policy, processor, device)
    else:
        if device.type == "cpu":
            toy.cpu.speed_up_vllm()
        sampler = VLLMSampler(
            args.model,
            processor,
            device,
            seed=rank // args.tensor_parallel,
            tensor_parallel=args.tensor_parallel,
            context=args.context,
            memory=args.memory,
        )
    trainer = training.make_trainer(policy, args.zero, args.lr, device, clip_grad=args.clip_grad)
    reference = None
    if args.kl_coef:
        reference = load(args, device).to(device).eval().requires_grad_(False)
    return Run(args, rank, world, device, processor, sampler, trainer, reference)


def load(args, device, **options):
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    policy = load_policy(args.model, dtype=dtype, attn=args.attn, **options)
    if device.type == "cpu":
        toy.cpu.speed_up_policy(policy)
    return policy


# --------------------------------------------------------------------------------------------------
# 1. Roll out


def roll_out(run, batch, step, compare=False):
    """Sample responses to a batch of prompts: Samples with their place in the global batch."""
    args = run.args
    seeds = [seed_from(args.seed, step, prompt.place) for prompt in batch]
    keep_logps = compare or args.tis or args.old_logps == "vllm"
    samples = sample_responses(run, batch, seeds, args.samples, 1.0, keep_logps)
    for number, sample in enumerate(samples):
        sample.group = sample.place  # the place of its prompt
        sample.place = sample.group * args.samples + number % args.samples
    return share_of_rank(samples, run)


def sample_responses(run, batch, seeds, n, temperature, keep_logps=False):
    """n responses to each prompt, as Samples with text and finish."""
    args, tokenizer = run.args, run.processor.tokenizer
    generated = run.sampler.generate(batch, seeds, n, temperature, args.max_new_tokens, keep_logps)
    samples = []
    for prompt, responses in zip(batch, generated):
        for response in responses:
            ids = response.ids
            text_ids = ids[:-1] if response.ended else ids
            text = tokenizer.decode(text_ids, skip_special_tokens=False)
            sample = replace(
                prompt,
                response_ids=ids,
                text=text,
                finish="stop" if response.ended else "length",
                sampled_logps=response.logps,
            )
            samples.append(sample)
    return samples


def share_of_rank(samples, run):
    """The ranks of one vLLM have all sampled the same: each trains on its part, in whole groups."""
    args = run.args
    unit = args.samples * (2 if args.both_orders else 1)
    share = run.rank % args.tensor_parallel
    return [s for s in samples if s.place // unit % args.tensor_parallel == share]


# --------------------------------------------------------------------------------------------------
# 3. and 5. Score and reward. To add a reward, add it to rule_rewards() and to total_rewards().


def rule_rewards(samples):
    """The parts of a reward that need no model, each (B,). They are logged by their names."""
    results = [result_reward(sample.text, sample.pair.choice) for sample in samples]
    formats = []
    for sample in samples:
        complete = sample.finish == "stop"  # deviation 3
        formats.append(format_reward(sample.text) if complete else 0.0)
    return {"result": torch.tensor(results), "format": torch.tensor(formats)}


def worth_judging(samples, results, args):
    """Where consistency can matter: there is a verdict and, in Eq. 2, it is right."""
    worth = []
    for sample, result in zip(samples, results):
        counts = result == 1 or args.reward_form == "external"
        if counts and parse(sample.text).choice is not None:
            worth.append(sample)
    return worth


def consistency_of(samples, judged, answers):
    """(B,): 1 or 0, and NaN for the samples that were not judged."""
    consistency = torch.full((len(samples),), math.nan)
    answer_of = dict(zip(judged, answers))
    for number, sample in enumerate(samples):
        if sample in answer_of:
            consistency[number] = float(answer_of[sample] == 1)  # no answer is no agreement
    return consistency


def total_rewards(parts, args):
    """Eq. 2, or by flag Eq. 1, of the parts of a reward: (B,)."""
    consistency = parts["consistency"].nan_to_num()  # not asked about: it does not count
    rewards = final_reward(
        parts["result"], consistency, parts["format"], args.consistency_weight, args.reward_form
    )
    if args.both_orders:
        rewards = rewards + args.order_bonus * right_in_both_orders(parts["result"], args.samples)
    return rewards


def right_in_both_orders(results, samples):
    """1 for each of two judgements, the two orders of a pair, that are both right: (B,)."""
    orders = results.view(-1, 2, samples)  # (pairs, 2, samples)
    both = orders.amin(1, keepdim=True)
    return both.expand_as(orders).reshape(-1)


# --------------------------------------------------------------------------------------------------
# 4. Old log-probabilities


def split_into_mini_batches(samples, step, args):
    """
    This rank's samples of each mini-batch; which are together is the same on any ranks. The samples
    of a prompt are together as far as --train_batch allows.
    """
    groups = list(range(args.rollout_batch))
    random.Random(f"{args.seed} {step} mini-batches").shuffle(groups)
    places = [group * args.samples + number for group in groups for number in range(args.samples)]
    number_of = {place: index // args.train_batch for index, place in enumerate(places)}
    mini_batches = [[] for _ in range(len(places) // args.train_batch)]
    for sample in samples:
        mini_batches[number_of[sample.place]].append(sample)
    return mini_batches


def set_old_logps(run, mini_batches):
    """
    What the policy that sampled gave each token. The first mini-batch needs none: its update
    computes them itself, unless they are needed before it (k1) or again after it (--epochs).
    """
    args = run.args
    if args.old_logps == "vllm":
        for sample in chain(*mini_batches):
            sample.old_logps = torch.tensor(sample.sampled_logps, device=run.device)
        return
    if args.epochs == 1 and not penalty_in_reward(args):
        mini_batches = mini_batches[1:]
    samples = list(chain(*mini_batches))
    for sample, logps in zip(samples, run.response_logps(run.trainer, samples)):
        sample.old_logps = logps


def set_reference_logps(run, mini_batches):
    if run.reference is None:
        return
    samples = list(chain(*mini_batches))
    for sample, logps in zip(samples, run.response_logps(run.reference, samples)):
        sample.reference_logps = logps


def penalty_in_reward(args):
    return args.kl_coef > 0 and args.kl == "k1"


# --------------------------------------------------------------------------------------------------
# 6. Advantages


def set_advantages(samples, rewards, args):
    """Each sample gets its advantages, by --algo. Return which samples were kept, (B,)."""
    algorithm = neighbours.ALGORITHMS[args.algo]
    options = {}
    if args.algo == "stable_reinforce":
        options["sigma"] = args.sigma or None
    if penalty_in_reward(args):
        mask = response_mask(samples)
        old_logps = padded([sample.old_logps for sample in samples], mask)
        reference_logps = padded([sample.reference_logps for sample in samples], mask)
        penalty = neighbours.kl_k1(old_logps, reference_logps)
        if algorithm.token_rewards:
            rewards = neighbours.returns_to_go(rewards, penalty, mask, args.kl_coef)
            options["mask"] = mask
        else:
            rewards = rewards - args.kl_coef * penalty.sum(1)
    groups = torch.tensor([sample.group for sample in samples])
    advantages, kept = algorithm.advantages(rewards, groups, sum_over_ranks, **options)
    for sample, advantage in zip(samples, advantages):
        count = len(sample.response_ids)
        sample.advantages = advantage[:count] if advantage.dim() else advantage.expand(count)
    return kept.all(1) if kept.dim() == 2 else kept


def response_mask(samples):
    lengths = [len(sample.response_ids) for sample in samples]
    return torch.arange(max(lengths, default=0)) < torch.tensor(lengths)[:, None]


def sum_over_ranks(sums):
    return torch.tensor(training.all_reduce(sums.tolist()), dtype=torch.float64)


def padded(rows, mask):
    """(tokens,) tensors -> (B, R), 0 where the mask is False."""
    out = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    for number, row in enumerate(rows):
        out[number, : len(row)] = row
    return out


# --------------------------------------------------------------------------------------------------
# 7. Update


def learn(run, mini_batches, step, state):
    """The optimizer steps of a rollout: --epochs times through its mini-batches."""
    args = run.args
    updates = []
    first_update = step * len(mini_batches) * args.epochs
    for number, mini_batch in enumerate(mini_batches * args.epochs, first_update):
        lr = args.lr * min(1, (number + 1) / (args.warmup + 1))
        updates.append(optimizer_step(run, mini_batch, lr))
        training.stop_if_diverged(updates[-1].grad_norm, mini_batch, step, state, args)
    return updates


def optimizer_step(run, mini_batch, lr):
    """One update, on this rank's samples of a mini-batch."""
    loss_agg = neighbours.ALGORITHMS[run.args.algo].loss_agg
    tokens = sum(len(sample.response_ids) for sample in mini_batch)
    # over ALL ranks: then losses of micro-batches add up to the loss of the mini-batch
    denominator = training.all_reduce(tokens if loss_agg == "tokens" else len(mini_batch))
    loss_function = partial(micro_batch_loss, run, max(1.0, denominator))
    micro_batches = training.row_batches(mini_batch, run.args.micro_tokens)
    return metrics.Update(*training.update(run.trainer, micro_batches, loss_function, lr))


def micro_batch_loss(run, denominator, samples):
    """A micro-batch's part of the loss, and its statistics."""
    args = run.args
    algorithm = neighbours.ALGORITHMS[args.algo]
    batch = encoding.collate(samples, run.pad_id, run.device)  # with the pictures
    logps, entropy = token_logps(run.trainer, batch, entropy=True)  # (B, R)
    mask = batch["response_mask"]
    if any(sample.old_logps is None for sample in samples):
        old_logps = logps.detach()  # the first mini-batch: this very policy has sampled it
    else:
        old_logps = padded([sample.old_logps for sample in samples], mask)
    advantages = padded([sample.advantages for sample in samples], mask)
    if args.tis:  # vLLM sampled, the trainer differentiates
        sampled_logps = padded([torch.tensor(sample.sampled_logps) for sample in samples], mask)
        advantages = advantages * (old_logps - sampled_logps).exp().clamp_max(args.tis)
    if args.algo == "topr":  # it weighs judgements, whose tokens all have the same advantage
        advantages = torch.tensor([float(sample.advantages[0]) for sample in samples])
        advantages = advantages.to(run.device)
    loss, statistics = algorithm.loss(
        logps, old_logps, advantages, mask, denominator=denominator, **algorithm.loss_options(args)
    )
    if args.kl_coef and args.kl != "k1":
        reference_logps = padded([sample.reference_logps for sample in samples], mask)
        penalty = neighbours.KL[args.kl](logps, reference_logps)
        mean = average(penalty, mask, algorithm.loss_agg, denominator, args.max_new_tokens)
        loss = loss + args.kl_coef * mean
    statistics["entropy"] = average(entropy, mask)
    return loss, {name: float(value) for name, value in statistics.items()}


# --------------------------------------------------------------------------------------------------
# 8. Sync, 2. compare


def sync(run):
    """Every weight of the policy goes into vLLM."""
    sampler = run.sampler
    sampler.wake_weights()
    missing = sampler.weight_names()
    for some in whole_weights(run.policy.model):
        missing -= sampler.load_weights(some)
    if missing:
        names = ", ".join(sorted(missing))
        raise RuntimeError(f"the sync did not reach these weights of vLLM's model: {names}")
    sampler.after_sync()


def compare_now(step, first_step, args):
    """In the first rollout after a sync and every --check_every steps, from 0 on."""
    if args.engine == "hf" or not args.check_every:
        return False
    return step == first_step + 1 or step % args.check_every == 0


def compare(run, samples, step):
    """Stop a run whose vLLM and trainer are not the same policy. Return the gaps, for the log."""
    mean, largest = mismatch(run, samples)
    agreement.require_same_policy(mean, largest, step, run.device)
    return {"mismatch": mean, "mismatch_max": largest}


def mismatch(run, samples):
    return agreement.mismatch(samples, run.response_logps(run.trainer, samples))


def check(run, train_pairs):
    """--check: compare as loaded, after all weights were moved and synced, and moved back."""
    ranks = run.args.tensor_parallel  # of one vLLM, which have the same pairs
    groups = run.world // ranks
    compared = train_pairs[run.rank // ranks : 8 * groups : groups]
    batch = prompts.encode_prompts(compared, pairs.judging_turns, run.processor)
    seeds = [seed_from("check", number) for number in range(len(batch))]
    run.args.max_new_tokens = min(64, run.args.max_new_tokens)  # enough to compare
    rows = []
    for when, scale in (("as loaded", 0), ("moved, synced", 0.05), ("moved back, synced", -0.05)):
        if scale:
            agreement.move_weights(run.policy, scale)
            sync(run)
        samples = sample_responses(run, batch, seeds, 1, 1.0, keep_logps=True)
        run.sampler.sleep()
        mean, largest = mismatch(run, samples)
        rows.append((when, training.all_reduce(len(samples)), mean, largest))
    if run.rank == 0:
        agreement.print_check(rows, run.device)
    return agreement.all_within_bound(rows, run.device)


# --------------------------------------------------------------------------------------------------
# Held-out accuracy and the log


def held_out_accuracy(run, held_out):
    """Greedy and at temperature 1, over the held-out pairs of all ranks."""
    batch = prompts.encode_prompts(held_out, pairs.judging_turns, run.processor)
    seeds = [seed_from("eval", pair.id) for pair in held_out]
    accuracy = {"eval_n": int(training.all_reduce(len(held_out))) // run.args.tensor_parallel}
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        samples = sample_responses(run, batch, seeds, 1, temperature)
        values = {
            f"eval_{name}": [result_reward(sample.text, sample.pair.choice) for sample in samples],
            f"eval_{name}_format": [format_reward(sample.text) for sample in samples],
            f"eval_{name}_says_1": [parse(sample.text).choice == 1 for sample in samples],
        }
        accuracy |= metrics.global_means(values)
    return accuracy


def keep_best(run, row, state):
    """--save_best: the model of the best greedy accuracy so far."""
    if run.args.save_best and row.get("eval_greedy", -1.0) > state["best"]:
        state["best"] = row["eval_greedy"]
        out = Path(run.args.out)
        runs.save_model(out / "best", run.policy, run.processor, run.rank, out, "judge", parser())


VIEW = runs.View(
    step=["reward", "result", "consistency", "length", "grad_norm"],
    held_out=["eval_greedy", "eval_sampled", "eval_n"],
    curves={
        "rewards": ["result", "consistency", "format"],
        "held-out accuracy": ["eval_greedy", "eval_sampled"],
        "length, tokens": ["length", "length_max"],
        "loss": ["loss"],
        "entropy": ["entropy"],
        "largest |log ratio| before pre-clip": ["log_ratio_max"],
        "share of tokens": ["preclipped", "clipped_low", "clipped_high"],
        "share of judgements": ["filtered", "truncated"],
    },
)


def parser():
    p = flags.command_line(__doc__)
    rl_flags.add_pair_flags(p)
    ConsistencyJudge.add_flags(p.add_argument_group("judge"))
    rl_flags.add_loop_flags(p)
    rl_flags.add_check_flags(p)
    return p


def main():
    args = parser().parse_args()
    rank, world, device = training.start_ranks(args.seed)
    if device.type == "cpu":
        toy.cpu.speed_up_process()
    rl_flags.check_flags(args, world)
    if not args.check:
        runs.open_out(args, rank)
        runs.refuse_other_model(args.out)
    train_pairs = pairs.read_pairs(args.data)
    pairs.check_pairs(args.data, train_pairs)
    args.data_digest = pairs.digest_of(train_pairs)
    held_out = prompts.read_held_out(args.eval_data, args.eval_n)
    processor = encoding.load_processor(args.model, args.min_pixels, args.max_pixels)
    plan = prompts.make_plan(
        train_pairs, held_out, pairs.judging_turns, processor, args, rank, world, device
    )
    judge = ConsistencyJudge(args, args.seed)
    if not args.check:
        training.on_all_ranks(judge.check)
    run = start_run(args, processor, rank, world, device)
    if args.check:
        sys.exit(0 if check(run, plan.train) else 1)
    train(run, plan, judge)


def open_run(run, plan, view, what, **state):
    """Continue the run in --out, or begin one: its log, this rank's state, when it saves."""
    args, out = run.args, Path(run.args.out)
    done, state = runs.resume(out, run.trainer, args, rl_flags.MUTABLE_FLAGS, **state)
    assert done == plan.first_step  # known before, since the workers begin there
    header = runs.run_header(args, run.world, run.device)
    header |= {what: len(plan.train), "held_out": len(plan.held_out)}
    log = runs.Log(out, header, plan.first_step, plan.steps, view, args.tracker)
    # A run that is continued: vLLM still has the weights of --model. On a GPU in any case, where a
    # weight that cannot be loaded then shows before the first rollout.
    if plan.first_step or run.device.type == "cuda":
        sync(run)
    return log, state, runs.SaveTimes(args, plan.steps)


def train(run, plan, judge):
    args, out = run.args, Path(run.args.out)
    log, state, saving = open_run(run, plan, VIEW, "pairs", best=-1.0, skipped=0)
    if plan.held_out and not plan.first_step:
        log.row(0, **held_out_accuracy(run, plan.my_held_out))

    for step in range(plan.first_step, plan.steps):
        # 1. roll out
        clock = metrics.Clock()
        batch = next(plan.batches)
        clock("data")
        comparing = compare_now(step, plan.first_step, args)
        samples = roll_out(run, batch, step, comparing)
        clock("rollout")
        run.sampler.sleep()  # its memory is the trainer's now
        clock("sleep")

        # 2. compare, while the policy is still the one that sampled
        gaps = compare(run, samples, step) if comparing else {}
        clock("check")

        # 3. score by rule; the judge is asked now and works while the trainer does
        parts = rule_rewards(samples)
        judged = worth_judging(samples, parts["result"], args)
        pending = judge.submit([sample.text for sample in judged])

        # 4. log-probabilities of the policy that sampled and, for a KL penalty, of the reference
        mini_batches = split_into_mini_batches(samples, step, args)
        set_old_logps(run, mini_batches)
        set_reference_logps(run, mini_batches)
        clock("old_logps")

        # 5. rewards, when the judge is done
        answers = training.wait_or_stop(pending.result, partial(run.save, step, state))
        parts["consistency"] = consistency_of(samples, judged, answers)
        rewards = total_rewards(parts, args)
        clock("judge")

        # 6. advantages over the global batch, filtered
        kept = set_advantages(samples, rewards, args)

        # 7. update
        updates = learn(run, mini_batches, step, state)
        clock("update")

        # 8. sync
        sync(run)
        clock("sync")

        done = step + 1
        row = metrics.log_row(samples, rewards, parts, kept, updates, judge, clock.seconds) | gaps
        if plan.held_out and plan.is_due(done, args.eval_every):
            row |= held_out_accuracy(run, plan.my_held_out)
        metrics.write_rollouts(out, run.rank, done, samples, rewards, parts, kept)
        log.row(done, **row)
        keep_best(run, row, state)
        if saving.is_due(done):
            run.save(done, state)

    runs.finish_run(out, run.policy, run.processor, log, run.rank, "judge", parser())


if __name__ == "__main__":
    flags.run_stage("rl.py", main)
