"""
Stage 4: benchmarks in both answer orders, and every kind of test-time scaling from one file of
samples (section 4, C.4-C.7, C.10). For Tables 3, 4, 8, 9 and 12 and Figure 3.

    benchmarks -> rows -> judgements (a model, an endpoint, rewards or judgements made elsewhere)
               -> results.json, table.md, scaling.png, page.html

The better answer is shown first in half of the judgements and second in the other half, so a model
that always says 1 scores 50 %. Each judgement is appended to a file as it comes: a killed run
continues where it was, and every number is computed from that file, without a model. A row that
the judge does not take (longer than --context, refused by the server) is left out of all numbers,
and written to left_out.jsonl; beside the table stands how many were left out, and which. Any
number of answers to a question is judged as duels of each two (sources/own_lists.py), and an answer
ranks by the share of its duels that it wins.

Differs from the paper's evaluation and from its released code:
1) both orders (released: the better answer is always first); --orders chosen_first is that
   protocol, and its table warns
2) no verdict is wrong, and counted (released: taken for a 2, which was always wrong; in cal.py left
   out of the denominator); --parse lenient also reads verdicts that are not in the format
3) VL-RewardBench's hallucination group is found in upper and lower case: 183/749/318 rows; the
   paper's 484/448/318 are reported too
4) rows are known by their number: ids repeat (released: resuming skips the second row of an id)
5) a video's frames are in the order of their names, 32 of them or all of a shorter one (released:
   in the order of the directory, and some frames of a shorter one twice)
6) voting and "any" are exact expectations over all subsets of the samples, half of them in each
   order, not one draw
Where the paper says nothing:
7) a tied vote counts one half, no vote at all is wrong
8) early stopping takes the orders in turn; a sample without a verdict costs, breaks the run of
   equal ones and has no vote
9) calibrated weighting (the paper's future work): votes of sigmoid(log-odds / T) - 1/2, with the
   likeliest T on the other half of the rows; a verdict without log-probability, as all are that
   only --parse lenient reads, weighs as much as the mean of the others, and nothing if calibrated
10) a server is told how to sample, as vLLM in this process is: top_p 1, no top_k, no penalty, in
   place of what the model's generation_config.json says; --request changes that

The toy, on two CPU cores:
$ python evaluate.py @toy/evaluate.args --model out/toy/rl --out out/toy/eval
A GPU, then four of them (not yet run at this scale):
$ python evaluate.py --model out/rl --out out/eval --bench VL-RewardBench=data/VL-RewardBench
$ torchrun --nproc_per_node=4 evaluate.py --model out/rl --out out/eval \\
      --bench Multimodal-RewardBench=data/all_data.json
A model behind an endpoint (its key in OPENAI_API_KEY); a reward model of another project:
$ python evaluate.py --base_url http://127.0.0.1:8000/v1 --model NAME --samples 2 --out out/other \\
      --bench pairs=data/dev.jsonl
$ python evaluate.py --scores rewards.jsonl --out out/scalar --bench pairs=data/dev.jsonl
Your own lists of answers; one question:
$ python evaluate.py --model out/rl --out out/lists --bench lists=data/lists.jsonl
$ python evaluate.py --model out/rl --question "How many cars are there?" --images street.jpg \\
      --answers "Two." "Three."
Judgements made elsewhere, here by the paper's released script for VL-RewardBench:
$ python evaluate.py --judgements r1_reward.jsonl --out out/released \\
      --bench VL-RewardBench=data/VL-RewardBench/data.jsonl
The released checkpoint, asked what its authors asked it, in both orders (not run here):
$ python evaluate.py --model yifanzhang114/R1-Reward --prompt r1_reward --temperature 0 \\
      --out out/r1_reward --bench VL-RewardBench=data/VL-RewardBench
The numbers again, without a model, and the differences from another run:
$ python evaluate.py --score_only --out out/eval --compare out/other
Two runs side by side for people to vote on, blind (C.7), and the tally of their votes:
$ python evaluate.py --score_only --out out/eval --ab out/other
$ python evaluate.py --out out/eval --tally votes-a.json votes-b.json
"""

import argparse
import json
import os
from collections import defaultdict
from datetime import timedelta
from itertools import chain, islice
from pathlib import Path

from core import (
    files,
    flags,
    judge_in_python,
    judge_prompt,
    judging,
    judging_flags,
    one_question,
    pictures,
    scoring,
    training,
)
from core.judgements import (
    BenchmarkRow,
    Protocol,
    digest,
    judgements_file,
    left_out_file,
    read_judgements,
    read_left_out,
)
from core.lists import score_lists
from sources import BENCHMARKS, benchmark_rows, checking, reading
from sources.given_judgements import GivenJudgements
from viewer import pages, report

# the flags that a judgement depends on
MADE_BY = ("model", "base_url", "request", "scores", "judgements", "temperature", "max_new_tokens")
MADE_BY += ("max_pixels", "max_frames", "early_stop", "seed")


# --- 1. rows


def read_rows(args):
    """{bench: rows}, from the benchmarks' files or, without --bench, what the run in --out kept."""
    benches = read_benchmarks(args) if args.bench else read_kept_rows(args.out)
    if args.base_url and not args.score_only:
        rows = chain.from_iterable(benches.values())
        pictures.check_may_be_sent(rows, [path for _, path in args.bench], args)
    return benches


def read_benchmarks(args):
    benches = {}
    for name, path in args.bench:
        if name == "pairs":
            rows = islice(benchmark_rows.rows_of_pairs(path, args.group), args.limit)
        else:
            data_set = BENCHMARKS[name]
            rows = benchmark_rows.rows_of_benchmark(data_set, path, args.out, args.limit)
        benches[name] = list(rows)
        benchmark_rows.choose_frames(benches[name], args.max_frames)
        benchmark_rows.check_pictures(benches[name], path)
    return benches


def read_kept_rows(out):
    kept = Path(out, "rows.jsonl")
    if not kept.is_file():
        raise files.InputError(
            f"{kept}: no such file, so there was no run; give --bench, or the --out of a run"
        )
    benches = defaultdict(list)
    for where, line in files.jsonl_rows(kept):
        row = BenchmarkRow.from_json(line, where)
        benches[row.bench].append(row)
    return benches


# --- 2. judgements


def check_or_write_config(args, benches, done, rank=0):
    """
    Keeps rows and settings with the judgements. A file never holds judgements of two settings, but
    another --samples, --orders or --limit may continue it.
    """
    config = {flag: getattr(args, flag) for flag in (*MADE_BY, "samples", "orders")}
    config["prompt"] = judge_prompt.load_prompt(args.prompt).digest()
    if args.prompt != "paper":
        config["prompt_name"] = args.prompt
    config["file"] = digest_of_given_file(args)
    config["rows"] = {}
    kept_rows = []
    for bench, rows in benches.items():
        config["rows"][bench] = [row.content() for row in rows]
        kept_rows += [row.to_json() for row in rows]
    path = Path(args.out, "config.json")
    if path.is_file() and done:
        before = read_config(path)
        settings_before = comparable_settings(before, config["rows"])
        files.check_same_settings(
            path, settings_before, comparable_settings(config, before["rows"])
        )
        config["rows"] = before["rows"] | config["rows"]
    if rank == 0:
        write_json_lines(path, [config])
        write_json_lines(path.with_name("rows.jsonl"), kept_rows)


def digest_of_given_file(args):
    """Of --scores or --judgements: what was taken from a file is not mixed with another's."""
    path = args.scores or args.judgements
    return digest(Path(path).read_bytes().hex()) if path and Path(path).is_file() else ""


# of a run from before these flags
EARLIER_RUNS = {"request": {}, "judgements": None, "max_frames": 32, "file": ""}


def read_config(path):
    fields = dict.fromkeys((*MADE_BY, "orders"), object)
    fields |= {"prompt": str, "file": str, "samples": int, "rows": dict}
    fields = {name: kind for name, kind in fields.items() if name not in EARLIER_RUNS}
    config = files.read_object(path, fields, "Restore it, or choose another --out")
    if config["base_url"] and "request" not in config:
        config["request"] = "the server's own way of sampling"  # ours is stated since
    return EARLIER_RUNS | config


def comparable_settings(config, other_rows):
    """What must be the same. With another --limit one run has the first rows of the other."""
    settings = {name: config[name] for name in (*MADE_BY, "prompt", "file")}
    for bench, contents in config["rows"].items():
        if bench in other_rows:
            common = min(len(contents), len(other_rows[bench]))
            settings[f"rows of {bench}"] = digest(contents[:common])
    return settings


def write_json_lines(path, rows):
    with files.atomic_write(path) as file:
        for row in rows:
            file.write(json.dumps(row).encode() + b"\n")


def protocol_of(args):
    return Protocol(args.orders, args.samples, args.early_stop, args.parse, args.ties)


def has_reward_head(args):
    return not args.base_url and Path(args.model, "reward_head").is_dir()


def make_backend(args):
    """What judges, by the flags (see core/judging.py)."""
    if args.scores:
        rows = reading.table_rows(args.scores, ())
        return judging.RewardBackend(judging.RewardsInFile(args.scores, rows).score)
    if args.base_url:
        return judging.EndpointBackend(args)
    if has_reward_head(args):
        return judging.RewardBackend(load_reward_heads(args).score)
    return judging.VLLMBackend(args)


def load_reward_heads(args):
    from toy.cpu import speed_up_policy

    heads = judging.load_reward_heads(args)
    if heads.device.type == "cpu":
        speed_up_policy(heads.policy)
    return heads


# flags of a run over files, of no use to a judge of one question
OF_RUNS = ("bench", "limit", "group", "scores", "judgements", "media_root", "out", "ties")
OF_RUNS += ("price", "retry_left_out", "score_only", "compare", "page", "ab", "tally")


class Judge(judge_in_python.Judge):
    """
    A judge in Python: judge = Judge("out/rl"), or Judge("NAME", base_url="http://..."); other flags
    by their names. Each pair has `samples` judgements, half of them in each order.

    judge(question, images, answer1, answer2) -> Decision
    judge.rank(question, images, answers) -> [(index, share of duels won), ...], the best first
    """

    def __init__(self, model, samples=2, **options):
        for name in (*OF_RUNS, *one_question.FLAGS):
            if name in options:
                reason = f"{name} is for the command line; give it to evaluate.py, --{name}"
                raise files.InputError(f"Judge(..., {name}=...): {reason}, or leave it out")
        words = ["--model", str(model), "--samples", str(samples), "--out", os.devnull]
        for name, value in options.items():
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        args = check_args(parser().parse_args(words))
        super().__init__(make_backend(args), protocol_of(args))


# --- flags, and the run


def bench_file(text):
    """The type of --bench: NAME=PATH."""
    name, _, path = text.partition("=")
    names = (*BENCHMARKS, "pairs")
    if name not in names or not path:
        expected = f"NAME=PATH with a NAME of {', '.join(names)}"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return name, path


def parser():
    p = flags.command_line(__doc__)
    names = ", ".join((*BENCHMARKS, "pairs"))
    add = p.add_argument_group("data").add_argument
    add(
        "--bench",
        nargs="+",
        action="extend",
        type=bench_file,
        default=[],
        metavar="NAME=PATH",
        help=f"files or folders as published, of {names}; without it: those of the run in --out",
    )
    limit_help = "rows (or lists) of each benchmark, from the first on; without it: all"
    add("--limit", type=flags.whole(1), help=limit_help)
    add("--group", default="source", help="the field of pairs that makes their table's columns")
    one_question.add_question_flags(p.add_argument_group("or one question").add_argument)
    judging_flags.add_model_flags(p.add_argument_group("model").add_argument)
    judging_flags.add_judgement_flags(p.add_argument_group("judgements").add_argument)
    add_output_flags(p.add_argument_group("output").add_argument)
    return p


def add_output_flags(add):
    add("--out", help="folder to write; a run that was killed continues from what is there")
    add(
        "--retry_left_out",
        action="store_true",
        help="ask again for the rows of left_out.jsonl (too long for --context, refused by the "
        "server); without it they are not asked for again",
    )
    add(
        "--ties",
        choices=("wrong", "half"),
        default="wrong",
        help="what equal rewards of the two answers count",
    )
    add("--score_only", action="store_true", help="run no model: score what is in --out")
    add(
        "--compare", metavar="OUT", help="another run: differences, intervals, p (paired bootstrap)"
    )
    add(
        "--page",
        type=flags.whole(),
        default=200,
        help="rows (or lists) of each benchmark on page.html, rows on ab.html; 0 = no page",
    )
    add("--ab", metavar="OUT", help="another run: write ab.html, to vote between the two, blind")
    add("--tally", nargs="+", metavar="VOTES", help="files saved from ab.html: print Table 9")


def check_args(args):
    """Fills in what follows from other flags or the run, and refuses what would mislead."""
    if args.score_only:
        take_settings_of_run(args)
    else:
        judge_prompt.take_published_settings(args)
    check_what_goes_together(args)
    if args.judgements and not args.score_only:
        return args  # the file has its own orders and samples
    args.orders = args.orders or "both"
    orders = 2 if args.orders == "both" else 1
    if args.scores or has_reward_head(args):  # a reward has no samples
        if args.parse == "lenient" or args.prompt != "paper":
            problem = "--prompt and --parse lenient are of texts, and a reward model writes none"
            raise files.InputError(f"{problem}; leave them out")
        args.samples, args.temperature, args.early_stop = orders, 0.0, False
    if args.samples is None:
        args.samples = orders if args.temperature == 0 else 16
    if args.samples % orders:
        expected = "expected an even number with --orders both, half in each order"
        raise files.InputError(f"--samples {args.samples}: {expected}")
    if args.temperature == 0 and args.samples > orders:
        reason = "at --temperature 0 all samples of an order are the same"
        raise files.InputError(f"--samples {args.samples}: {reason}; expected {orders}")
    return args


def check_what_goes_together(args):
    names = [name for name, _ in args.bench]
    for name in names:
        if names.count(name) > 1:
            raise files.InputError(f"--bench {name} is given twice; a run takes one file of it")
    if not args.score_only:
        check_what_judges(args)
    if args.ab and not args.page:
        raise files.InputError("--page 0 leaves no row for the page of --ab; expected 1 or more")


def check_what_judges(args):
    given = [f"--{name}" for name in ("scores", "judgements", "base_url") if getattr(args, name)]
    if len(given) > 1:
        raise files.InputError(f"{' and '.join(given)} both say what judges; leave one out")
    for name in ("request", "price"):
        if getattr(args, name) and not args.base_url:
            problem = f"--{name} is for a server; give its --base_url, or leave it out"
            raise files.InputError(problem)
    if args.judgements:
        for name in ("orders", "samples", "early_stop", "limit", "prompt"):
            if getattr(args, name) not in (None, False, "paper"):
                reason = "the file of --judgements says what there is"
                raise files.InputError(f"--{name} is of no use: {reason}; leave it out")


def take_settings_of_run(args):
    if args.bench:
        raise files.InputError("--score_only takes the rows of the run in --out; leave --bench out")
    path = Path(args.out, "config.json")
    if not path.is_file():
        return
    config = read_config(path)
    for flag in MADE_BY:
        setattr(args, flag, config[flag])
    args.samples = args.samples or config["samples"]
    args.orders = args.orders or config["orders"]
    args.prompt = config.get("prompt_name", "paper")


def judge_missing(args, benches, given, rank, world):
    """Makes this rank's share of the judgements that are not there yet."""
    done = read_judgements(args.out)
    check_or_write_config(args, benches, done, rank)
    all_rows = []
    for rows in benches.values():
        all_rows += rows
    left_out = {} if args.retry_left_out else read_left_out(args.out)
    own_rows = [row for row in all_rows[rank::world] if row.key not in left_out]
    protocol = protocol_of(args)
    if any(protocol.next_jobs(row, done) for row in own_rows):
        # opened before the model is loaded: a folder that is in use is reported at once
        journal = files.Journal(judgements_file(args.out, rank))
        left_out_journal = files.Journal(left_out_file(args.out, rank))
        with journal, left_out_journal:
            backend = given or make_backend(args)
            judging.collect(own_rows, backend, done, protocol, journal, left_out_journal)


def wait_for_all_ranks(rank, world):
    """In torchrun's own store: ranks may be hours apart, and a process group would time out."""
    from torch.distributed import TCPStore

    port = int(os.environ["MASTER_PORT"])
    store = TCPStore(os.environ["MASTER_ADDR"], port, is_master=False)
    store.set(f"evaluated/{rank}", "yes")
    store.wait([f"evaluated/{other}" for other in range(world)], timedelta(days=30))


def score(benches, done, args, left_out):
    """({bench: its part of results.json}, {bench: scoring.Scores})."""
    results, scores = {}, {}
    protocol = protocol_of(args)
    for bench, rows in benches.items():
        data_set = BENCHMARKS.get(bench)  # of pairs there is none
        published = checking.published_groups(data_set)
        numbers, scores[bench] = scoring.score_benchmark(rows, done, protocol, published)
        lines = [left_out[row.key] for row in rows if is_left_out(row, done, protocol, left_out)]
        notes = judging.warn_of_equal_samples(rows, done, args)
        notes += checking.check_data(data_set, rows)
        ranking = score_lists(rows, done, protocol)
        results[bench] = {"check": notes, "left_out": lines, "ranking": ranking} | numbers
    return results, scores


def is_left_out(row, done, protocol, left_out):
    """A row that was judged to the end after all, with --retry_left_out, is not."""
    return row.key in left_out and bool(protocol.next_jobs(row, done))


def compare_with(folder, results, scores, args):
    """Adds to the results the differences from another run."""
    words = ["--score_only", "--out", folder, "--parse", args.parse, "--ties", args.ties]
    their_args = check_args(parser().parse_args(words))
    if their_args.orders != args.orders:
        orders = f"its orders are {their_args.orders}, this run's {args.orders}"
        raise files.InputError(f"--compare {folder}: {orders}; give a run in the same orders")
    benches = read_rows(their_args)
    _, their_scores = score(benches, read_judgements(folder), their_args, {})
    for bench in their_scores:
        if bench in scores:
            compared = scoring.compare(scores[bench], their_scores[bench])
            results[bench]["compared"] = compared


def run(args):
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    out = Path(args.out)
    files.check_apart(out, args.model)
    out.mkdir(parents=True, exist_ok=True)

    # 1. rows
    benches = read_rows(args)
    given = None
    if args.judgements and not args.score_only:
        given = GivenJudgements(args.judgements, benches)
        benches, args.orders, args.samples = given.benches, given.orders, given.samples
        if rank == 0:
            print("\n".join(given.notes()))

    # 2. the judgements that are not there yet, each written as it comes
    if not args.score_only:
        judge_missing(args, benches, given, rank, world)
        if world > 1:
            wait_for_all_ranks(rank, world)
        if rank > 0:
            return
    done = read_judgements(out)

    # 3. scores
    results, scores = score(benches, done, args, read_left_out(out))
    if args.compare:
        compare_with(args.compare, results, scores, args)

    # 4. results.json, table.md, scaling.png, page.html, ab.html
    results = {"args": vars(args), "benches": results}
    (out / "results.json").write_text(json.dumps(results, indent=1))
    table = report.results_table(results)
    (out / "table.md").write_text(table)
    print(table)
    report.plot_scaling(results, out / "scaling.png")
    if args.page:
        title = f"{report.name_of_judge(results['args'])}: judgements"
        as_read = {key: protocol_of(args).read(judgement) for key, judgement in done.items()}
        items = pages.page_items(benches, as_read, args.page)
        pages.write_page(out / "page.html", title, items, blind=False)
    if args.ab:
        theirs = read_judgements(args.ab)
        common = pages.rows_of_both(benches, read_kept_rows(args.ab))
        pages.write_blind_vote(out, common, done, theirs, args.page, args.seed)


def answer_question(args):
    """--question: no run, no files."""
    args.samples = args.samples or 2
    check_args(args)
    judge = judge_in_python.Judge(make_backend(args), protocol_of(args))
    one_question.answer(judge, args)


def main(words=None):
    training.die_with_torchrun()
    p = parser()
    args = p.parse_args(words)
    one_question.check_question(args, {name: p.get_default(name) for name in OF_RUNS})
    if args.question:
        return answer_question(args)
    if not args.out:
        p.error("the following arguments are required: --out")
    if args.tally:
        return pages.print_tally(args.out, args.tally)
    run(check_args(args))


if __name__ == "__main__":
    flags.run_stage("evaluate.py", main)
