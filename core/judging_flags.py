"""The flags of evaluate.py that say what judges, and how it is asked."""

from core import flags, judge_prompt, pictures


def add_model_flags(add):
    add(
        "--model",
        default="out/rl",
        help="folder or hub name, of a judge or a reward head; with --base_url its name there",
    )
    url_help = "an OpenAI-compatible server; without it: vLLM in this process"
    add("--base_url", type=flags.server_url, help=url_help)
    scores_help = "given rewards: JSON lines of bench, row, scores (two; of a list: one an answer)"
    add("--scores", metavar="FILE", help=scores_help)
    add(
        "--judgements",
        metavar="FILE",
        help="given judgements: JSON lines of bench, row or id, order or better_first, text or "
        "choice (see sources/given_judgements.py), or those of the paper's released scripts",
    )
    pictures.add_media_root_flag(add)
    concurrency_help = "requests to a server at a time"
    flags.add_request_flag(add)
    flags.add_price_flag(add, "for the estimate at the beginning")
    add("--concurrency", type=flags.whole(1, 10_000), default=32, help=concurrency_help)
    context_help = "tokens of prompt and judgement (vLLM)"
    add("--context", type=flags.whole(1), default=16384, help=context_help)
    add("--tensor_parallel", type=flags.whole(1), default=1, help="GPUs that share one model")


def add_judgement_flags(add):
    add(
        "--orders",
        choices=("both", "dataset", "chosen_first"),
        help="half of the samples in each order (default); or all as the file lists the answers; "
        "or all with the better answer first (the released protocol)",
    )
    add(
        "--samples",
        type=flags.whole(1, 10_000),
        help="a row, in all orders; default 16; paper: 15 and 16",
    )
    add(
        "--temperature",
        type=flags.number(),
        default=1.0,
        help="1 in C.5; 0 = greedy, the paper's main results: one sample an order",
    )
    names = ", ".join(judge_prompt.NAMES[1:])
    add(
        "--prompt",
        default="paper",
        metavar="NAME or FILE",
        help=f"what the judge is asked: paper (Table 1), {names} or a TOML file, see "
        "core/judge_prompt.py",
    )
    tokens_help = "of a judgement; without it: as the prompt was published, 4096 for the paper's"
    add("--max_new_tokens", type=flags.whole(1), help=tokens_help)
    add(
        "--max_pixels",
        type=flags.whole(1),
        help="larger images and frames are scaled down; without it: the prompt's bound, if it has "
        "one, or the model's own",
    )
    add(
        "--max_frames",
        type=flags.whole(1),
        default=32,
        help="of a video, evenly spaced, in process as through a server; released: 32",
    )
    add(
        "--early_stop",
        action="store_true",
        help="a row ends after three equal answers in a row, at most --samples (C.10)",
    )
    add(
        "--parse",
        choices=("strict", "lenient"),
        default="strict",
        help="lenient also reads a verdict that is not a digit in an <answer> block "
        "(core/lenient.py), of a run that is there too (--score_only); what is kept stays strict",
    )
    add(
        "--seed",
        type=flags.random_seed,
        default=0,
        help="of the samples, each has its own, and of the vote",
    )
