"""The flags that rl.py and downstream_grpo.py share, and what of them cannot go together."""

import sys

from core.files import InputError
from core.flags import above_zero, number, whole
from core.neighbours import ALGORITHMS, KL
from core.training import MUTABLE_FLAGS as TRAINER_MUTABLE_FLAGS
from core.training import check_trainer_flags, trainer_flags

GROUP_ALGORITHMS = ("grpo", "dr_grpo", "rloo", "dapo", "cispo")
# flags that may change when a run is continued
MUTABLE_FLAGS = TRAINER_MUTABLE_FLAGS | {
    "media_root",
    "out",
    "steps",
    "passes",
    "eval_data",
    "eval_n",
    "eval_every",
    "save_best",
    "check",
    "check_every",
    "memory",
    "judge_url",
    "judge_concurrency",
    "judge_timeout",
    "judge_retries",
    "judge_patience",
}


def add_pair_flags(p):
    """Those of rl.py alone."""
    add = p.add_argument_group("data").add_argument
    data_help = "JSONL of pairs, see annotate.py: those that took two attempts or failed"
    add("--data", default="out/annotate/rl.jsonl", help=data_help)
    add("--eval_data", help="JSONL of held-out pairs; without it there is no held-out accuracy")
    add(
        "--eval_n",
        type=whole(1),
        default=500,
        help="held-out pairs that are judged, from the first on",
    )
    add("--out", default="out/rl", help="folder to write; the same command continues a run in it")
    add(
        "--both_orders",
        action="store_true",
        help="beyond the paper: each pair also with its answers swapped, in the same batch",
    )
    add(
        "--order_bonus",
        type=number(),
        default=0.5,
        help="with --both_orders: reward for each of two judgements that are both right",
    )
    add = p.add_argument_group("reward (Eq. 1, Eq. 2)").add_argument
    add(
        "--consistency_weight",
        type=number(),
        default=0.5,
        help="weight of the consistency reward, lambda in Table 7 (0.5 in the paper)",
    )
    add(
        "--reward_form",
        choices=["gated", "external"],
        default="gated",
        help="gated: Eq. 2; external: Eq. 1",
    )


def add_check_flags(p):
    add = p.add_argument_group("held-out accuracy and checks").add_argument
    add(
        "--eval_every",
        type=whole(),
        default=10,
        help="steps between held-out accuracies; 0 = only at both ends",
    )
    add(
        "--save_best",
        action="store_true",
        help="also keep the model with the best held-out greedy accuracy, in best/",
    )
    add(
        "--check",
        action="store_true",
        help="only compare vLLM's and the trainer's log-probabilities, before and after syncs",
    )
    add(
        "--check_every",
        type=whole(),
        default=20,
        help="steps between such comparisons in a run, after that of the first sync; 0 = none",
    )


def add_loop_flags(parser):
    add_rollout_flags(parser.add_argument_group("rollout").add_argument)
    add_algorithm_flags(parser.add_argument_group("algorithm").add_argument)
    add_optimisation_flags(parser.add_argument_group("optimisation").add_argument)
    trainer_flags(parser)
    parser.set_defaults(zero=3)


def add_rollout_flags(add):
    add("--model", default="out/sft", help="folder or hub name of the policy to train")
    add(
        "--engine",
        choices=["vllm", "hf"],
        default="vllm",
        help="what samples; hf is slow and needs no vLLM",
    )
    add(
        "--rollout_batch",
        type=whole(1),
        default=256,
        help="prompts a step, over all ranks: pairs or tasks (256 in the paper)",
    )
    add(
        "--samples",
        type=whole(1, 10_000),
        default=1,
        help="responses to a prompt (in the paper 1 in rl.py, 8 in downstream_grpo.py); the group "
        "algorithms need more than 1",
    )
    add(
        "--max_new_tokens",
        type=whole(1),
        default=1024,
        help="longest response, in tokens; what is cut off there is not well-formed (ours)",
    )
    add(
        "--context",
        type=whole(1),
        default=4096,
        help="longest prompt and response together, in tokens; longer prompts are dropped and "
        "counted (ours)",
    )
    add("--tensor_parallel", type=whole(1), default=1, help="how many ranks share one vLLM")
    add(
        "--memory",
        type=above_zero(1),
        default=0.4,
        help="share of a GPU's memory for vLLM while it samples (results/README.md has the sum)",
    )


def add_algorithm_flags(add):
    add(
        "--algo",
        choices=list(ALGORITHMS),
        default="stable_reinforce",
        help="the others, of appendix B, bring their own advantages and loss",
    )
    add(
        "--clip",
        type=number(),
        default=1e3,
        help="stable_reinforce: delta of the pre-clip, ratios stay within [1/delta, delta] (1e3 in "
        "the paper); 0 = off",
    )
    add(
        "--sigma",
        type=number(),
        default=3.0,
        help="stable_reinforce: advantages beyond it, in standard deviations, are dropped (3 in "
        "the paper); 0 = off",
    )
    add(
        "--eps",
        type=number(0, 1),
        default=0.2,
        help="PPO's clip: ratios stay within 1 - eps and 1 + eps (0.2 in the paper)",
    )
    add(
        "--eps_high",
        type=number(),
        help="the upper side of --eps, for stable_reinforce, dapo, cispo; without it: like --eps, "
        "or the algorithm's own",
    )
    add(
        "--kl_coef",
        type=number(),
        default=0.0,
        help="weight of a KL penalty towards --model; 0 (the paper) = no reference model",
    )
    add(
        "--kl",
        choices=list(KL),
        default="k3",
        help="estimator of the KL penalty: k1 in the reward, before the algorithm's own "
        "advantages; k2 and k3 in the loss",
    )
    add(
        "--tis",
        type=number(),
        default=0.0,
        help="truncated importance weights min(trainer / vLLM, this) on each token; 0 = off",
    )
    add(
        "--old_logps",
        choices=["trainer", "vllm"],
        default="trainer",
        help="vllm: take the sampler's, which saves a forward pass",
    )


def add_optimisation_flags(add):
    add(
        "--train_batch",
        type=whole(1),
        default=128,
        help="responses an optimizer step, over all ranks (in the paper 128 in rl.py)",
    )
    add("--epochs", type=whole(1, 1000), default=1, help="passes over a rollout")
    add(
        "--passes",
        type=above_zero(1000),
        default=5.0,
        help="passes over the data (in the paper 5 in rl.py, 1 in downstream_grpo.py)",
    )
    add("--steps", type=whole(0, 10**6), default=0, help="rollouts; 0 = as many as --passes makes")
    add("--lr", type=above_zero(), default=1e-6, help="learning rate (in the paper 1e-6 in rl.py)")
    add("--warmup", type=whole(), default=0, help="optimizer steps of linear warm-up (ours)")


def check_flags(args, world):
    """Stop at flags that cannot go together, before anything is loaded."""
    check_batches(args, world)
    check_lengths(args)
    check_algorithm(args)
    check_engine(args)
    check_trainer_flags(args)
    if args.save_best and not args.eval_data:
        raise InputError("--save_best needs --eval_data, by which the best model is found")
    note_single_update(args)


def check_batches(args, world):
    samples = args.rollout_batch * args.samples
    if samples % args.train_batch:
        raise InputError(
            f"--train_batch is {args.train_batch}; expected a divisor of --rollout_batch x "
            f"--samples = {samples}"
        )
    if world % args.tensor_parallel:
        raise InputError(
            f"--tensor_parallel is {args.tensor_parallel}; expected a divisor of the number of "
            f"ranks, {world}"
        )
    shares = world // args.tensor_parallel * (2 if args.both_orders else 1)
    if args.rollout_batch % shares:
        orders = ", times two orders" if args.both_orders else ""
        raise InputError(
            f"--rollout_batch is {args.rollout_batch}; expected a multiple of {shares} (ranks / "
            f"--tensor_parallel{orders})"
        )


def check_lengths(args):
    if args.max_new_tokens >= args.context:
        raise InputError(
            f"--max_new_tokens is {args.max_new_tokens}; expected less than --context, "
            f"{args.context}, which holds the prompt, too"
        )


def check_algorithm(args):
    if 0 < args.clip <= 1:
        raise InputError(f"--clip is {args.clip:g}; expected a number above 1, or 0 for off")
    if args.tis and args.algo == "topr":
        raise InputError(
            "--tis weighs single tokens, but --algo topr weighs whole judgements; use --old_logps "
            "vllm, with which TOPR's own weight is that of the trainer against vLLM"
        )
    if args.eps_high is not None and "eps_high" not in ALGORITHMS[args.algo].options:
        raise InputError(
            f"--eps_high has no meaning for --algo {args.algo}; use it with stable_reinforce, "
            "dapo or cispo"
        )
    if args.algo in GROUP_ALGORITHMS and args.samples == 1:
        raise InputError(
            f"--samples is 1; --algo {args.algo} compares the responses to a prompt and learns "
            "nothing from one, use 2 or more"
        )


def check_engine(args):
    if args.engine == "vllm":
        return
    if args.tis or args.old_logps == "vllm" or args.check:
        raise InputError(
            "--tis, --old_logps vllm and --check use vLLM's log-probabilities; --engine hf has "
            "none, use --engine vllm"
        )
    if args.zero == 3:
        raise InputError(
            "--zero 3 with --engine hf would gather all weights for each token; use --zero 0, 1 "
            "or 2"
        )


def note_single_update(args):
    single = args.rollout_batch * args.samples == args.train_batch and args.epochs == 1
    if single and args.algo == "stable_reinforce":
        print(
            "note: with one update for each rollout every ratio is 1, so that neither the "
            "pre-clip nor PPO's clip can act",
            file=sys.stderr,
        )
