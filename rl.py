"""
Stage 3: StableReinforce (section 3). The model judges pairs, is rewarded by Eq. 2, and learns from its own judgements.

    1. rollout        one judgement a pair (or --samples), sampled by vLLM from this very policy, at temperature 1
    2. score          format and result by rule, consistency by the judge model (which works while 3 does)
    3. old_logps      by the trainer; those of the first mini-batch are the update's own
    4. final_reward   Eq. 2
    5. advantages     z-scores over the global batch; beyond 3 sigma they are dropped
    6. learn          mini-batches of pre-clipped PPO; two of 128 in a rollout of 256, since before the first nothing can clip
    7. sync           the weights stream into vLLM, one parameter at a time
    8. compare        now and then: are the two engines the same policy?

The mathematics is in stable_reinforce.py; this file moves data. Differs from the authors' released code:
1) the update sees the image (released: rollouts and reference do, the policy that is trained does not)
2) log-probabilities of vLLM and of the trainer are compared at the first sync and every --check_every steps
3) an answer cut off by --max_new_tokens is a failure of format; nothing that failed earns (released: an exception earns 1)
Where the paper is silent: 4) samples are shuffled before they are cut into mini-batches; 5) AdamW (0.9, 0.95), no weight
decay, constant rate after --warmup steps; 6) k1 as a KL penalty stands in the reward (Reinforce++), k2 and k3 in the loss.

The toy, two ranks on two CPU cores:
$ torchrun --nproc_per_node=2 rl.py @toy/rl.args --clip 1e3
One node with 4 GPUs of 80 GB, the paper's setting (not yet run at this scale), the judge behind another endpoint:
$ torchrun --nproc_per_node=4 rl.py --clip 1e3 --data data/rl.jsonl --model out/sft --judge_url http://localhost:8000/v1 --out out/rl
Two nodes, on each with its NODE_RANK, with folders that both see:
$ torchrun --nnodes=2 --node_rank=$NODE_RANK --master_addr=$HOST --master_port=29500 --nproc_per_node=4 \
    rl.py --clip 1e3 --data data/rl.jsonl --model out/sft --out out/rl
Only the comparison of the two engines, before and after syncs:
$ python rl.py --check --model out/sft --data data/rl.jsonl

Reads  --model (see sft.py), --data (pairs, see annotate.py; those whose prompt does not fit --context are dropped and counted).
Writes --out: the model, log.jsonl (a row a step), rollouts-*.jsonl (judgements with their rewards), curves.png, checkpoints/.
"""
import functools
import hashlib
import json
import math
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist

from annotate import Unusable, command_line, messages, read_pairs, swap
from judge import ConsistencyJudge
from sft import (HF, Log, as_it_is, barred, begin, checkpoints, collate, end_run, for_vllm, gathered, header, load_policy,
                 load_processor, make_engine, micro_batches, product, prompt_length, reduced, resumed, save_checkpoint, save_policy, setup,
                 start_vllm, to_sample, token_logps, trainer_flags, update)
from stable_reinforce import ALGORITHMS, KL, TOKEN_REWARDS, average, final_reward, format_reward, parse, result_reward, returns_to_go

PICTURES = 8  # of a prompt, at most

# ---------------------------------------------------------------------------------------------------
# The rollout engine. generate(prompts, ...) -> [[sample, ...] a prompt]; a sample is {"ids", "logps"}. The other engine is sft.HF.


def seed_of(*what):
    """A 31-bit seed of anything that prints: the same whatever the number of ranks."""
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:4], "big") >> 1


class VLLM:
    """One vLLM engine inside this rank's process, awake only while it generates where the device is a GPU."""

    def __init__(self, folder, processor, device, seed=0, tp=1, max_len=4096, memory=0.4):
        self.gpu = device.type == "cuda"
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights stream into this very process
        if not self.gpu:  # vLLM packs the matrices for a CPU, which would have to be done again in every sync
            import vllm.model_executor.layers.utils as layers
            layers.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: setattr(layer, "cpu_linear", product)
        where = dict(gpu_memory_utilization=memory, enable_sleep_mode=True) if self.gpu else {}
        self.llm = start_vllm(folder, max_len, seed=seed, tensor_parallel_size=tp, limit_mm_per_prompt={"image": PICTURES, "video": 1},
                              distributed_executor_backend="external_launcher", max_num_seqs=256, **where)
        self.pads = [processor.tokenizer.convert_tokens_to_ids(t) for t in ("<|image_pad|>", "<|video_pad|>")]
        self.bias = {i: -100.0 for i in barred(processor, self.llm.llm_engine.model_config.get_vocab_size())}
        self.eos = processor.tokenizer.eos_token_id

    def generate(self, prompts, seeds, n=1, temperature=1.0, max_tokens=1024, logps=False):
        """prompts: rows of encode() with their media. Exactly the policy: no top-p, no top-k, no penalty. logps take a tenth longer."""
        from vllm import SamplingParams

        asked = []
        for row in prompts:
            # one pad an image: vLLM itself multiplies them, whatever it is given
            ids = [t for t, before in zip(row["prompt"], [None, *row["prompt"]]) if not (t in self.pads and t == before)]
            asked.append({"prompt_token_ids": ids, **for_vllm(*row["media"])})
        common = dict(n=n, temperature=temperature, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0, max_tokens=max_tokens,
                      logprobs=0 if logps else None, detokenize=False, logit_bias=self.bias, stop_token_ids=[self.eos])
        outputs = self.llm.generate(asked, [SamplingParams(seed=s, **common) for s in seeds], use_tqdm=False)
        for row, out in zip(prompts, outputs):
            if list(out.prompt_token_ids) != row["prompt"]:
                raise RuntimeError(f"vLLM read a prompt of {len(out.prompt_token_ids)} tokens where the processor makes "
                                   f"{len(row['prompt'])}: the two see different pictures (sizes, number of images) or different templates")
        sampled = lambda o: [next(iter(step.values())).logprob for step in o.logprobs] if logps else None
        return [[{"ids": list(o.token_ids), "logps": sampled(o)} for o in out.outputs] for out in outputs]

    def weights(self, policy):
        """(name, tensor) of every parameter; under ZeRO-3 it is whole until the next one is asked for."""
        for name, p in policy.model.named_parameters():
            with gathered([p]):
                yield name, p.data

    def reset(self):
        """Forget what was computed with the old weights: prefixes, processed images, and the vision tower's features."""
        self.llm.reset_prefix_cache()
        self.llm.llm_engine.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()

    def sync(self, policy):
        if self.gpu:  # vLLM first empties torch's cache: what the trainer has freed is its memory again
            self.llm.wake_up(tags=["weights"])
        missing, = self.llm.apply_model(lambda model: {n for n, _ in model.named_parameters()} - model.load_weights(self.weights(policy)))
        if missing:
            raise RuntimeError(f"the sync did not reach all weights of vLLM's model: {', '.join(sorted(missing))}")
        self.reset()
        if self.gpu:
            self.llm.wake_up(tags=["kv_cache"])

    def sleep(self):
        if self.gpu:  # level 2: the weights come back by the next sync
            torch.cuda.synchronize()
            self.llm.sleep(level=2)


# ---------------------------------------------------------------------------------------------------
# 1. Rollout


def prompt(processor, pair):
    return to_sample(processor, messages(pair))


def rollout(engine, processor, pairs, prompts, seeds, n, temperature, max_tokens, logps=False):
    """Judgements of this rank's pairs: rows with response, text, finish; with logps also vLLM's log-probabilities."""
    rows = []
    for pair, row, samples in zip(pairs, prompts, engine.generate(prompts, seeds, n, temperature, max_tokens, logps)):
        for sample in samples:
            ids = sample["ids"]
            ended = ids[-1:] == [processor.tokenizer.eos_token_id]
            text = processor.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=False)
            rows.append(row | {"pair": pair, "response": ids, "text": text, "finish": "stop" if ended else "length",
                               "sampled": sample["logps"]})
    return rows


def shown(pairs, step, place, args):
    """The pair at a place of a step's global batch, as it is shown there; every pass over the data has its own order."""
    unit = 2 if args.both_orders else 1  # neighbours: a pair and its swap
    i = (step * args.rollout_batch + place) // unit
    pair = pairs[permutation(len(pairs), args.seed, i // len(pairs))[i % len(pairs)]]
    return swap(pair) if place % unit else pair


@functools.lru_cache(2)
def permutation(n, seed, epoch):
    order = list(range(n))
    random.Random(f"{seed} {epoch} pairs").shuffle(order)
    return order


def looked(item, look):
    """look(item), which reads its pictures; one that is damaged is told with the item's id."""
    try:
        return look(item)
    except (OSError, ValueError, SyntaxError) as problem:  # what it raises is up to PIL's decoder
        raise Unusable(f"{item['id']}: a picture cannot be read: {problem}") from None


def fitting(items, turns_of, processor, args, rank, world):
    """The pairs (or tasks) whose prompt leaves --max_new_tokens of --context: what does not fit would stop vLLM in the middle of a run."""
    tokens = [0] * len(items)
    for i in range(rank, len(items), world):
        tokens[i] = looked(items[i], lambda item: prompt_length(processor, turns_of(item)))
    kept = [item for item, n in zip(items, reduced(tokens))
            if n + args.max_new_tokens <= args.context and len(item["images"]) <= PICTURES]
    told = (f"{len(items) - len(kept)} of {len(items)} prompts dropped: with --max_new_tokens {args.max_new_tokens} they exceed --context "
            f"{args.context} (--max_pixels makes pictures smaller), or have more than {PICTURES} pictures")
    if not kept:
        raise Unusable(told)
    if rank == 0 and len(kept) < len(items):
        print(told, file=sys.stderr)
    return kept


class Shown(torch.utils.data.Dataset):
    """(place, pair, what the engine reads) by (step, place in its global batch)."""

    def __init__(self, pairs, prompt, processor, args):
        self.pairs, self.prompt, self.args = pairs, functools.partial(prompt, processor), args

    def __getitem__(self, at):
        pair = shown(self.pairs, *at, self.args)
        return at[1], pair, looked(pair, self.prompt)


def shares(items, first, steps, args, rank, world, device):
    """
    This rank's part of the global batch of each step, a list at a time. Processes read it, a step ahead. They are to be forked while
    this one is small: each keeps what it was born with.
    """
    size = args.rollout_batch // (world // args.tensor_parallel)
    start = rank // args.tensor_parallel * size
    places = ((step, place) for step in range(first, steps) for place in range(start, start + size))
    coming = iter(torch.utils.data.DataLoader(  # pin_memory: a thread takes in what the workers send
        items, batch_size=None, sampler=places, collate_fn=as_it_is, num_workers=args.workers, pin_memory=device.type == "cuda",
        prefetch_factor=-(-size // args.workers) if args.workers else None, worker_init_fn=begin, generator=torch.Generator()))
    return ([next(coming) for _ in range(size)] for _ in range(first, steps))


def sample(engine, processor, mine, step, args, rank, logps):
    """One of shares() -> rows of rollout(), each with its place among the step's samples and its group, the place of its pair."""
    places, pairs, prompts = zip(*mine)
    seeds = [seed_of(args.seed, step, place) for place in places]
    rows = rollout(engine, processor, pairs, prompts, seeds, args.samples, 1.0, args.max_new_tokens,
                   logps or args.tis or args.old_logps == "vllm")
    for i, row in enumerate(rows):
        row |= {"group": places[i // args.samples], "place": places[0] * args.samples + i}
    # the ranks of one engine sampled the same: each trains on its part
    unit, tp = args.samples * (2 if args.both_orders else 1), args.tensor_parallel
    return [row for row in rows if row["place"] // unit % tp == rank % tp]


# ---------------------------------------------------------------------------------------------------
# 2. Score


def score(rows, judge, args):
    """Rule-based rewards at once, consistency when the judge is done. Returns finish() -> rewards (B,), their parts."""
    result = torch.tensor([result_reward(row["text"], row["pair"]["choice"]) for row in rows])
    form = torch.tensor([format_reward(row["text"]) * (row["finish"] == "stop") for row in rows])  # deviation 3
    # no call where the answer cannot matter: no verdict; and, in Eq. 2, a wrong one
    asked = [i for i, row in enumerate(rows) if parse(row["text"]).choice and (result[i] or args.reward_form == "external")]
    pending = judge.submit([rows[i]["text"] for i in asked])

    def finish():
        consistency = torch.full((len(rows),), math.nan)  # where nobody was asked
        for i, says in zip(asked, pending.result()):
            consistency[i] = float(says == 1)  # None is no agreement
        rewards = final_reward(result, consistency.nan_to_num(), form, args.consistency_weight, args.reward_form)
        if args.both_orders:  # neighbours are the two orders of one pair; both right earns more, so a position is no shelter
            pairs = result.view(-1, 2, args.samples).amin(1, keepdim=True).expand(-1, 2, -1).reshape(-1)
            rewards = rewards + args.order_bonus * pairs
        return rewards, {"result": result, "consistency": consistency, "format": form}  # logged and kept, whatever is in it

    return finish


def rewards_or_stop(finish, save):
    """The rewards when the judge is done. If it is dead on any rank: all ranks keep a checkpoint, and stop."""
    try:
        found, dead = finish(), None
    except Exception as problem:  # whatever it was, the other ranks must not wait for this one
        found, dead = None, problem
    if reduced(float(dead is not None), "max"):
        save()
        sys.exit(f"{Path(sys.argv[0]).name}: stopped, with a checkpoint: {dead or 'the judge of another rank is dead'}")
    return found


def keep_rollouts(path, step, rows, rewards, parts):
    with path.open("a", encoding="utf-8") as file:
        for i, row in enumerate(rows):
            said = {k: None if v[i].isnan() else v[i].item() for k, v in parts.items()}
            file.write(json.dumps({"step": step, "id": row["pair"]["id"], "choice": row["pair"]["choice"], "text": row["text"],
                                   "finish": row["finish"], "reward": rewards[i].item(), **said}) + "\n")


# ---------------------------------------------------------------------------------------------------
# 3. to 6.: old log-probabilities, advantages, update


@torch.no_grad()
def logps_of(policy, rows, pad, device, budget):
    """Log-probabilities of each row's response under a policy (or the engine around it): a list of (tokens,) tensors."""
    found = [None] * len(rows)
    for batch in micro_batches([[row | {"n": i}] for i, row in enumerate(rows)], budget):
        logp = token_logps(policy, collate(batch, pad, device))
        for row, line in zip(batch, logp):
            found[row["n"]] = line[:len(row["response"])].clone()
    return found


def padded(lines, like):
    """A list of (tokens,) tensors -> (B, R), shaped as `like`."""
    out = torch.zeros_like(like, dtype=torch.float32)
    for i, line in enumerate(lines):
        out[i, :len(line)] = line
    return out


def mini_batches(rows, step, args):
    """This rank's rows of each mini-batch of a rollout. Which samples are together is the same on any number of ranks."""
    order = list(range(args.rollout_batch * args.samples))
    random.Random(f"{args.seed} {step} mini-batches").shuffle(order)
    number = {place: i // args.train_batch for i, place in enumerate(order)}
    return [[row for row in rows if number[row["place"]] == u] for u in range(len(order) // args.train_batch)]


def old_logps(batches, trainer, reference, args, pad, device):
    """Each row gets its old log-probabilities, except those whose update computes them anyway, and the reference's where there is one."""
    rows = [row for batch in batches for row in batch]
    if args.old_logps == "vllm":
        for row in rows:
            row["old"] = torch.tensor(row["sampled"], device=device)
    else:  # k1 needs all of them before the first update
        later = rows if args.kl_coef and args.kl == "k1" else rows[len(batches[0]):]
        for row, logp in zip(later, logps_of(trainer, later, pad, device, args.micro_tokens)):
            row["old"] = logp
    if reference:
        for row, logp in zip(rows, logps_of(reference, rows, pad, device, args.micro_tokens)):
            row["reference"] = logp


def reduce_sums(sums):
    return torch.tensor(reduced(sums.tolist()), dtype=torch.float64)


def advantages_of(rows, rewards, args):
    """The algorithm's own; each row gets its adv, (tokens,). Returns the kept flags."""
    own = {"sigma": args.sigma or None} if args.algo == "stable_reinforce" else {}
    groups = torch.tensor([row["group"] for row in rows])
    if args.kl_coef and args.kl == "k1":  # the penalty is part of the reward
        T = max((len(row["response"]) for row in rows), default=0)
        mask = torch.tensor([[t < len(row["response"]) for t in range(T)] for row in rows], dtype=torch.bool).view(len(rows), T)
        penalty = padded([KL["k1"](row["old"], row["reference"]) for row in rows], mask)
        if args.algo in TOKEN_REWARDS:  # Reinforce++: of each token's
            rewards, own = returns_to_go(rewards, penalty, mask, args.kl_coef), own | {"mask": mask}
        else:
            rewards = rewards - args.kl_coef * penalty.sum(1)
    adv, kept = ALGORITHMS[args.algo][0](rewards, groups, reduce_sums, **own)
    for row, a in zip(rows, adv):
        row["adv"] = a[:len(row["response"])] if a.dim() else a.expand(len(row["response"]))
    return kept.all(1) if kept.dim() == 2 else kept  # a judgement that loses one token counts as filtered


def loss_function(args):
    """(loss(logp, old, adv, mask, norm=), its mean, see average())."""
    _, loss, mean = ALGORITHMS[args.algo]
    options = {"stable_reinforce": dict(clip=args.clip or None, eps=args.eps, eps_high=args.eps_high),
               "dr_grpo": dict(eps=args.eps, max_tokens=args.max_new_tokens),
               "dapo": {k: v for k, v in (("eps", args.eps), ("eps_high", args.eps_high)) if v is not None},
               "cispo": dict(eps_high=args.eps_high or 4.0),
               "topr": {}, "rloo": {}}.get(args.algo, dict(eps=args.eps))
    return functools.partial(loss, **options), mean


def train_step(engine, rows, args, pad, device, lr, sums, top):
    """One optimizer step on this rank's rows of a mini-batch. Returns (loss, gradient norm); adds statistics to sums, maxima to top."""
    loss, mean = loss_function(args)
    # the normalisers: response tokens, or judgements, of the mini-batch on ALL ranks
    tokens, count = reduced([sum(len(row["response"]) for row in rows), len(rows)])
    norm = max(1.0, tokens if mean == "tokens" else count)

    def loss_of(batch):
        inputs = collate(batch, pad, device)
        logp, entropy = token_logps(engine, inputs, entropy=True)  # (B, R)
        mask = inputs["mask"]
        for row, line in zip(batch, logp.detach()):
            row.setdefault("old", line[:len(row["response"])].clone())  # the first mini-batch: provably equal, not computed twice
        old, adv = (padded([row[k] for row in batch], mask) for k in ("old", "adv"))
        if args.tis:  # truncated importance weights: vLLM sampled, the trainer differentiates
            adv = adv * (old - padded([torch.tensor(row["sampled"]) for row in batch], mask)).exp().clamp_max(args.tis)
        if args.algo == "topr":  # it weighs whole judgements, whose tokens all have the same A
            adv = torch.tensor([float(row["adv"][0]) for row in batch], device=device)
        value, stats = loss(logp, old, adv, mask, norm=norm)
        if args.kl_coef and args.kl != "k1":
            penalty = KL[args.kl](logp, padded([row["reference"] for row in batch], mask))
            value = value + args.kl_coef * average(penalty, mask, mean, norm, args.max_new_tokens)  # averaged as the loss is
        n = int(stats["tokens"])
        for name, v in (stats | {"tokens": 1, "entropy": entropy.sum() / max(1, n)}).items():
            if name.endswith("_max"):
                top[name] = max(top[name], float(v))
            else:
                sums[name] += float(v) * n  # shares and means of this micro-batch, weighted by its tokens
        return value

    return update(engine, micro_batches([[row] for row in rows], args.micro_tokens), loss_of, lr)


def learn(trainer, batches, step, state, args, pad, device):
    """The updates of a rollout. Returns their (loss, gradient norm), and sums and maxima of what else is known of them."""
    totals, sums, top = [], Counter(), Counter()
    for u in range(len(batches) * args.epochs):
        batch = batches[u % len(batches)]
        lr = args.lr * min(1, (step * len(batches) * args.epochs + u + 1) / (args.warmup + 1))
        totals.append(train_step(trainer, batch, args, pad, device, lr, sums, top))
        state["skipped"] = 0 if math.isfinite(totals[-1][1]) else state["skipped"] + 1
        if state["skipped"] == 3:
            torch.save(batch, Path(args.out, f"not-finite-{dist.get_rank()}.pt"))
            sys.exit(f"{Path(sys.argv[0]).name}: step {step + 1}: three gradients in a row were not finite; likely: --lr {args.lr} is too "
                     f"high; the last mini-batch is in {args.out}/not-finite-*.pt")
    return totals, sums, top


# ---------------------------------------------------------------------------------------------------
# 8. Are the two engines the same policy? (--check, the first sync, every --check_every steps)


@torch.no_grad()
def mismatch(trainer, processor, rows, device, budget):
    """(mean, maximum) over tokens and ranks of |log-probability by vLLM - by the trainer| of sampled judgements."""
    ours = logps_of(trainer, rows, processor.tokenizer.pad_token_id, device, budget)
    gap = torch.cat([(a.cpu() - torch.tensor(row["sampled"])).abs() for a, row in zip(ours, rows)] + [torch.zeros(0)]).double()
    total, n = reduced([gap.sum().item(), len(gap)])
    return total / max(1, n), reduced(gap.max().item() if len(gap) else 0.0, "max")


def bound_of(device):
    """Largest mean gap that rounding explains: float32 on a CPU, bfloat16 kernels on a GPU."""
    return 1e-5 if device.type == "cpu" else 0.05


def compare(trainer, processor, rows, step, args, device):
    """The mean and largest gap, for the log. Stops a run in which the engines are not the same policy."""
    mean, worst = mismatch(trainer, processor, rows, device, args.micro_tokens)
    if not mean <= bound_of(device):
        raise RuntimeError(f"step {step}: vLLM and the trainer are not the same policy: their log-probabilities differ by {mean:.2e} "
                           f"on average, {worst:.2e} at most; legal: a mean of {bound_of(device):g}. Likely: weights that did not reach "
                           "vLLM (the vision tower's, say), features cached before the sync, pictures of another size, another attention "
                           "kernel or precision")
    return {"mismatch": mean, "mismatch_max": worst}


def compare_now(step, first, args):
    return args.engine == "vllm" and args.check_every and (step == first + 1 or step % args.check_every == 0)


def check(engine, trainer, processor, pairs, args, device, rank):
    """The comparison alone: as loaded, after every weight was moved and synced, and moved back. The same pictures throughout."""
    policy, table = trainer.module, []
    prompts = [prompt(processor, pair) for pair in pairs]
    seeds = [seed_of("check", i) for i in range(len(pairs))]

    def measure(name):
        rows = rollout(engine, processor, pairs, prompts, seeds, 1, 1.0, min(64, args.max_new_tokens), logps=True)
        engine.sleep()
        mean, worst = mismatch(trainer, processor, rows, device, args.micro_tokens)
        table.append((name, reduced(len(rows)), mean, worst))

    def shake(scale):
        """Move every parameter, the vision tower's too, by the same random numbers on every rank."""
        with torch.no_grad():
            for i, p in enumerate(policy.model.parameters()):
                with gathered([p], write=True):
                    noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p)
                    p.data += scale * p.data.float().std().nan_to_num().clamp_min(1e-3).to(p.dtype) * noise

    measure("as loaded")
    for name, scale in (("weights moved, synced", 0.05), ("moved back, synced", -0.05)):
        shake(scale)
        engine.sync(policy)
        measure(name)
    limit = bound_of(device)
    if rank == 0:
        print(f"{'log-probabilities, vLLM and trainer':36s} {'judgements':>10s} {'mean gap':>10s} {'max gap':>10s}   "
              f"(bound of the mean {limit:g})")
        for name, n, mean, worst in table:
            print(f"{name:36s} {n:10.0f} {mean:10.2e} {worst:10.2e}   {'ok' if mean <= limit else 'NOT THE SAME POLICY'}")
    return all(mean <= limit for _, _, mean, _ in table)


# ---------------------------------------------------------------------------------------------------
# Held-out accuracy, the log, the curves


def held_out(engine, processor, pairs, args):
    """Greedy and at temperature 1: shares over all ranks' pairs."""
    prompts, seeds, out = [prompt(processor, pair) for pair in pairs], [seed_of("eval", pair["id"]) for pair in pairs], {}
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        rows = rollout(engine, processor, pairs, prompts, seeds, 1, temperature, args.max_new_tokens)
        right, form, ones, n = reduced([sum(result_reward(r["text"], r["pair"]["choice"]) for r in rows),
                                        sum(format_reward(r["text"]) for r in rows),
                                        sum(parse(r["text"]).choice == 1 for r in rows), len(rows)])
        out |= {f"eval_{name}": right / max(1, n), f"eval_{name}_format": form / max(1, n), f"eval_{name}_says_1": ones / max(1, n)}
    return out | {"eval_n": n}


PANELS = {"rewards": ["result", "consistency", "format"], "held-out accuracy": ["eval_greedy", "eval_sampled"],
          "length, tokens": ["length", "length_max"], "loss": ["loss"], "entropy": ["entropy"],
          "largest |log ratio| before pre-clip": ["log_ratio_max"],
          "share of tokens": ["preclipped", "clipped_low", "clipped_high"], "share of judgements": ["filtered", "truncated"]}


# flags that may change between a run and its continuation
FREE = {"out", "steps", "passes", "eval_data", "eval_n", "eval_every", "save_every", "save_best", "tracker", "check", "check_every",
        "micro_tokens", "workers", "memory", "attn", "recompute", "judge_url", "judge_concurrency", "judge_timeout", "judge_retries",
        "judge_patience"}


def validate(args, world):
    samples, share = args.rollout_batch * args.samples, world // args.tensor_parallel * (2 if args.both_orders else 1)
    if samples % args.train_batch:
        raise Unusable(f"--train_batch is {args.train_batch}; legal: a divisor of --rollout_batch * --samples = {samples}")
    if world % args.tensor_parallel or args.rollout_batch % share:
        raise Unusable(f"--rollout_batch is {args.rollout_batch}, --tensor_parallel {args.tensor_parallel} on {world} ranks; legal: tp "
                       f"divides the ranks, and ranks / tp{' * 2 orders' if args.both_orders else ''} divides the batch")
    if args.clip and args.clip <= 1 or args.sigma < 0:
        raise Unusable(f"--clip is {args.clip}, --sigma {args.sigma}; legal: clip above 1, sigma above 0, each 0 for off")
    if args.tis and args.algo == "topr":
        raise Unusable("--tis weighs single tokens, --algo topr whole judgements; use --old_logps vllm, with which TOPR's own weight is "
                       "that of the trainer against vLLM")
    if args.eps_high is not None and args.algo not in ("stable_reinforce", "dapo", "cispo"):
        raise Unusable(f"--eps_high means nothing to --algo {args.algo}; expected with stable_reinforce, dapo or cispo")
    if args.engine == "hf" and (args.tis or args.old_logps == "vllm" or args.check):
        raise Unusable("--tis, --old_logps vllm and --check compare with vLLM's log-probabilities; legal: with --engine vllm")
    if args.engine == "hf" and args.zero == 3:
        raise Unusable("--zero is 3 with --engine hf, which would gather all weights anew for each token; legal: --zero 0, 1 or 2")
    if samples == args.train_batch and args.epochs == 1 and args.algo == "stable_reinforce":
        print("note: one update a rollout: every ratio is 1, so neither the pre-clip nor PPO's clip can act", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------


def loop_flags(p):
    """Those of the parts that downstream_grpo.py imports."""
    add = p.add_argument_group("rollout").add_argument
    add("--model", default="out/sft", help="folder or hub name of the policy to train")
    add("--engine", choices=["vllm", "hf"], default="vllm", help="who samples; hf is slow and needs no vLLM")
    add("--rollout_batch", type=int, default=256, help="pairs (in stage 5 tasks) a step, over all ranks (256 in the paper)")
    add("--samples", type=int, default=1, help="judgements a pair, answers a task (1 and 8 in the paper; the group algorithms need more)")
    add("--max_new_tokens", type=int, default=1024, help="longest sample, tokens; a judgement cut off fails in format (ours)")
    add("--context", type=int, default=4096, help="longest prompt and judgement together, tokens (ours)")
    add("--tensor_parallel", type=int, default=1, help="tensor parallel size of vLLM: that many ranks share one engine")
    add("--memory", type=float, default=0.4, help="share of a GPU's memory for vLLM while it is awake (README.md has the sum)")
    add = p.add_argument_group("StableReinforce").add_argument
    add("--algo", choices=list(ALGORITHMS), default="stable_reinforce",
        help="the neighbours of appendix B bring their own statistics and loss")
    add("--clip", type=float, default=1e3, help="delta of the pre-clip: ratios stay within [1/delta, delta] (1e3 in the paper); 0 = off")
    add("--sigma", type=float, default=3.0, help="advantages beyond it are dropped, in standard deviations (3 in the paper); 0 = off")
    add("--eps", type=float, default=0.2, help="PPO's clip (0.2 in the paper)")
    add("--eps_high", type=float, help="its upper side, for stable_reinforce, dapo, cispo; none = as --eps, or the algorithm's own")
    add("--kl_coef", type=float, default=0.0, help="of a KL penalty towards --model (0 in the paper); 0 = no reference model")
    add("--kl", choices=list(KL), default="k3", help="its estimator: k1 in the reward, before the algorithm's own advantages; k2, k3 in the loss")
    add("--tis", type=float, default=0.0, help="truncated importance weights min(trainer / vLLM, this) on each token; 0 = off")
    add("--old_logps", choices=["trainer", "vllm"], default="trainer", help="vllm: take the sampler's, and save a forward pass")
    add = p.add_argument_group("optimisation").add_argument
    add("--train_batch", type=int, default=128, help="judgements an optimizer step, over all ranks (128 in the paper)")
    add("--epochs", type=int, default=1, help="times a rollout is gone through")
    add("--passes", type=float, default=5.0, help="times the data is gone through (5 in the paper)")
    add("--steps", type=int, default=0, help="rollouts; 0 = as --passes gives")
    add("--lr", type=float, default=1e-6, help="learning rate (1e-6 in the paper)")
    add("--warmup", type=int, default=0, help="optimizer steps of linear warm-up (ours)")
    trainer_flags(p)
    p.set_defaults(zero=3)


def parser():
    p = command_line(__doc__)
    add = p.add_argument_group("data").add_argument
    add("--data", help="JSONL of pairs (annotate.py's rl.jsonl: those the annotator needed two attempts for, or failed)")
    add("--eval_data", help="JSONL of held-out pairs; none = no held-out accuracy")
    add("--eval_n", type=int, default=500, help="the first so many of them")
    add("--out", default="out/rl", help="folder to write; the same command continues from its last checkpoint")
    add("--both_orders", action="store_true", help="beyond the paper: each pair also with its answers swapped, in the same batch")
    add("--order_bonus", type=float, default=0.5, help="with --both_orders: reward for each of two judgements that are both right")
    add = p.add_argument_group("reward (Eq. 1, Eq. 2)").add_argument
    add("--consistency_weight", type=float, default=0.5, help="lambda of Table 7 (0.5 in the paper)")
    add("--reward_form", choices=["gated", "external"], default="gated", help="gated: Eq. 2; external: Eq. 1")
    ConsistencyJudge.add_flags(p.add_argument_group("judge"))
    loop_flags(p)
    add = p.add_argument_group("held-out accuracy and checks").add_argument
    add("--eval_every", type=int, default=10, help="steps between held-out accuracies, with --eval_data")
    add("--save_best", action="store_true", help="also keep in best/ the model of the best held-out greedy accuracy")
    add("--check", action="store_true", help="only compare vLLM's and the trainer's log-probabilities, before and after syncs")
    add("--check_every", type=int, default=20, help="steps between such comparisons in a run; the first sync always has one; 0 = never")
    return p


def prepare(args, processor, rank, world, device):
    """Everything large that lives through the run: (rollout engine, trainer, reference). The rollout engine comes first: built
    while DeepSpeed's ZeRO-3 is there, its own weights would be cut up."""
    how = dict(dtype=torch.float32 if device.type == "cpu" else torch.bfloat16, attn=args.attn)
    policy = load_policy(args.model, recompute=args.recompute, freeze_vision=args.freeze_vision, **how)
    engine = None
    if args.engine == "vllm":
        engine = VLLM(args.model, processor, device, rank // args.tensor_parallel, args.tensor_parallel, args.context, args.memory)
    trainer = make_engine(policy, args.zero, args.lr, device, clip_grad=args.clip_grad)
    reference = load_policy(args.model, **how).to(device).eval().requires_grad_(False) if args.kl_coef else None
    return engine or HF(policy, processor, device), trainer, reference


class Clock:
    """clock(phase): the seconds since the last call were that phase's."""

    def __init__(self):
        self.seconds, self.last = {}, time.perf_counter()

    def __call__(self, phase):
        now = time.perf_counter()
        self.seconds[phase], self.last = now - self.last, now


def means(each):
    """{key: this rank's values, NaN where there is none} -> {key: their mean over all ranks; None of nothing}."""
    values = [torch.as_tensor(v, dtype=torch.float64) for v in each.values()]
    total = reduced([v.nansum().item() for v in values] + [v.isfinite().sum().item() for v in values])
    return {key: a / n if n else None for key, a, n in zip(each, total, total[len(values):])}


def of_updates(updates, judge, seconds):
    """What the log has of learn(), of the judge's calls, and of the clock."""
    totals, sums, top = updates
    counts = sums | {"judge_calls": judge.counts["calls"], "judge_failed": judge.counts["failed"] + judge.counts["unparsable"]}
    total = dict(zip(counts, reduced(list(counts.values()))))
    return {"loss": sum(loss for loss, _ in totals) / len(totals), "loss_max": max(loss for loss, _ in totals),
            "grad_norm": max(norm for _, norm in totals), "skipped": sum(not math.isfinite(norm) for _, norm in totals),
            **{k: total[k] / max(1, total["tokens"]) for k in sums if k != "tokens"}, **dict(zip(top, reduced(list(top.values()), "max"))),
            "judge_calls": total["judge_calls"], "judge_failed": total["judge_failed"],
            "seconds": sum(seconds.values()), **{f"s_{k}": v for k, v in seconds.items()}}


def summary(rows, rewards, parts, kept, updates, judge, seconds):
    """The row of the log. README.md has each key's formula and what a healthy run shows."""
    lengths = [len(row["response"]) for row in rows]
    found = means({"reward": rewards, **parts, "length": lengths, "truncated": [row["finish"] == "length" for row in rows],
                   "filtered": ~kept, "says_1": [parse(row["text"]).choice == 1 for row in rows]})
    found |= {"length_max": reduced(max(lengths, default=0), "max"), "samples": reduced(len(rows))}
    found |= of_updates(updates, judge, seconds)
    return found | {"tokens_per_s": found["length"] * found["samples"] / found["seconds"]}


def main():
    args = parser().parse_args()
    rank, world, device = setup(args.seed)
    validate(args, world)
    out, group, groups = Path(args.out), rank // args.tensor_parallel, world // args.tensor_parallel
    pairs = read_pairs(args.data)
    held = read_pairs(args.eval_data, args.eval_n) if args.eval_data else []
    held = [swap(pair) if seed_of("order", i) % 2 else pair for i, pair in enumerate(held)]  # a coin: neither order is the rule
    processor = load_processor(args.model, args.min_pixels, args.max_pixels)
    pairs, held = (fitting(some, messages, processor, args, rank, world) if some else [] for some in (pairs, held))
    steps = args.steps or math.ceil(args.passes * len(pairs) * (2 if args.both_orders else 1) / args.rollout_batch)
    first = max(checkpoints(out / "checkpoints"), default=0)
    coming = shares(Shown(pairs, prompt, processor, args), first, steps, args, rank, world, device)
    engine, trainer, reference = prepare(args, processor, rank, world, device)
    policy, pad = trainer.module, processor.tokenizer.pad_token_id
    if args.check:
        sys.exit(0 if check(engine, trainer, processor, pairs[group:8 * groups:groups], args, device, rank) else 1)

    judge = ConsistencyJudge(args, args.seed)
    _, state = resumed(out, trainer, args, FREE, best=-1.0, skipped=0)
    log = Log(out, header(args, world, device) | {"pairs": len(pairs), "held_out": len(held)}, first, steps, args.tracker)
    if first or device.type == "cuda":
        engine.sync(policy)  # vLLM has the weights of --model
    if held and not first:
        log.row(0, **held_out(engine, processor, held[group::groups], args))

    for step in range(first, steps):
        # 1. rollout
        clock, compared = Clock(), compare_now(step, first, args)
        mine = next(coming)
        clock("data")
        rows = sample(engine, processor, mine, step, args, rank, compared)
        clock("rollout")

        # vLLM's memory is the trainer's now
        engine.sleep()
        clock("sleep")

        # 8. compare, while the policy is still the one that sampled
        checked = compare(trainer, processor, rows, step, args, device) if compared else {}
        clock("check")

        # 2. score: the rules at once; the judge works while the trainer computes
        finish = score(rows, judge, args)

        # 3. old log-probabilities, of all but the first mini-batch
        batches = mini_batches(rows, step, args)
        old_logps(batches, trainer, reference, args, pad, device)
        clock("old_logps")

        # 4. final reward, when the judge is done
        rewards, parts = rewards_or_stop(finish, lambda: save_checkpoint(out / "checkpoints", trainer, step, state))
        clock("judge")

        # 5. advantages over the global batch, filtered
        kept = advantages_of(rows, rewards, args)

        # 6. update: the same mini-batches on any number of ranks, each rank with its own rows of them
        updates = learn(trainer, batches, step, state, args, pad, device)
        clock("update")

        # 7. sync
        engine.sync(policy)
        clock("sync")

        done, scores = step + 1, {}
        if held and (done % args.eval_every == 0 or done == steps):
            scores = held_out(engine, processor, held[group::groups], args)
            if args.save_best and scores["eval_greedy"] > state["best"]:
                state["best"] = scores["eval_greedy"]
                save_policy(policy, processor, out / "best", rank)
        keep_rollouts(out / f"rollouts-{rank}.jsonl", done, rows, rewards, parts)
        log.row(done, **summary(rows, rewards, parts, kept, updates, judge, clock.seconds), **checked, **scores)
        if done == steps or args.save_every and done % args.save_every == 0:
            save_checkpoint(out / "checkpoints", trainer, done, state)

    end_run(out, policy, processor, log, PANELS, rank)


if __name__ == "__main__":
    try:
        main()
    except (Unusable, FileNotFoundError) as problem:  # its owner can mend it: no traceback
        sys.exit(f"rl.py: {problem}")
