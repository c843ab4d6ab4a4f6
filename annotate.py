"""
Stage 1: from preference data to R1-Reward-200K (section 3.2, Tables 1 and 2).

  1. collect    read every source of Table 2, in the files it has on the hub; count the rows that
                make no pair, by reason
  2. mix        take all of MM-RLHF and 100,000 of the others, shuffle them, and show the better
                response first in half of the pairs; no pair twice
  3. annotate   ask an MLLM for a judgement until its verdict is the ground truth, at most 3 times;
                the number of attempts is the pair's difficulty
  4. write      all pairs; for SFT the solved ones, with their judgements; for RL those that took 2
                or 3 attempts and those that failed; a report

Where the paper says nothing, or this differs from it:
1) Attempt k is sent with seed k - 1. At temperature 0 a server that repeats itself exactly (vLLM)
   makes the same mistake three times; with, say, --temperature 0.7 the attempts differ.
2) VLFeedback: one pair a prompt, the best response against the worst by the mean of the ratings.
3) WildVision-Battle: the question of a later turn contains the earlier turns; rows whose two models
   had different earlier turns are dropped.
4) Pictures come first, then the text (the released RL set has the text first), as in evaluation.
   Pictures above --max_pixels are sent smaller; of a video, --max_frames evenly spaced frames.
5) "No pair twice": same question, same two responses in either order, same pixels. Of two such
   pairs, MM-RLHF's is kept.
6) --decontaminate: 864 of VL-RewardBench's 1,250 rows come from the training sources, which the
   paper does not mention. Off by default.
7) --both_orders: each pair is also annotated with its responses swapped. "contradicted": true marks
   a pair whose every verdict is wrong in both orders; its label may be the error.
8) --mode critique: a critique of each response, for the critic of Table 5 (sft.py --head critic),
   with a prompt of ours.
9) Any server but OpenAI's own is told to sample without top_p, top_k and penalty, whatever the
   model's generation_config.json says; --request changes that.

The toy: 6,000 pairs from seven sources. The stand-in for the annotator runs in another terminal:
$ python toy/sources.py --out out/toy/data --seed 0
$ python toy/server.py --key out/toy/data/key.jsonl --port 8010
$ python annotate.py @toy/annotate.args
The paper's data, annotated by gpt-4o with the key in OPENAI_API_KEY (not yet run at this scale).
POVID's pictures are COCO's: put train2014 into its folder.
$ python annotate.py --data RLAIF-V=data/RLAIF-V-Dataset VLFeedback=data/VLFeedback \\
    POVID=data/POVID WildVision-Battle=data/wildvision-battle MM-RLHF=data/MM-RLHF \\
    --out out/annotate --concurrency 64
Your own pairs {"prompt", "chosen", "rejected", "image"}, and any OpenAI-compatible server:
$ python annotate.py --data pairs=mine.jsonl --base_url http://localhost:8000/v1 \\
    --model Qwen/Qwen2.5-VL-7B-Instruct --price 0 0

Stop it at any time, with Ctrl-C or kill -9: the same command continues, and no reply is paid twice.
Reads   the data sets of sources/, from disk or the hub. URLs inside the data are never fetched.
        Each picture is decoded once, to find damaged files: 5 ms for a JPEG of 512 x 512, 20 ms for
        one of 1024 x 1024, on each of up to 16 cores.
Writes  to --out: pairs.jsonl, sft.jsonl, rl.jsonl, report.md and report.png, the same bytes however
        often it was stopped; also mix.jsonl, dropped.jsonl, journal.jsonl (every reply) and images/
        (the pictures out of parquet files).
"""

import argparse
import asyncio
import hashlib
import json
import shutil
import statistics
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

from core import files, flags, pairs, pictures
from core.endpoint import Endpoint, NoReply, cost, to_openai
from core.files import InputError
from core.replies import Replies
from core.tables import markdown_table
from sources import TRAINING
from sources.collecting import collect_source, download
from sources.duplicates import SWAPPED, benchmark_keys, usable_pairs
from stable_reinforce import parse

ATTEMPTS = 3  # section 3.2
SETS = {  # file -> attempts of the pairs in it (section 3.2); 4: all failed, None: no answer
    "pairs": (1, 2, 3, 4, None),
    "sft": (1, 2, 3),
    "rl": (2, 3, 4),
}
MIX_FLAGS = "data", "seed", "others", "limit", "both_orders", "decontaminate"
# the flags that a reply depends on
REPLY_FLAGS = "mode", "model", "temperature", "max_tokens", "max_pixels", "max_frames", "request"


# ------------------------------------------------------------------------------------------------
# 1. Collect


def collect(data, out):
    """
    Reads each source into a file of its pairs and of the reasons why other rows make none.

    Returns the files. One that an earlier run finished is not read again.
    """
    collected = []
    # MM-RLHF first: of two equal pairs the first one is kept
    for name, path in sorted(data, key=lambda source: source[0] != "MM-RLHF"):
        digest = hashlib.sha256(path.encode()).hexdigest()[:8]
        file = out / "read" / f"{name}-{digest}.jsonl"
        if not file.exists():
            if path.startswith("hub:"):
                path = download(path, out / "hub" / name)
            collect_source(TRAINING[name], path, file, out / "images")
        collected.append(file)
    return collected


# ------------------------------------------------------------------------------------------------
# 2. Mix: which pairs, in which order, and which response comes first. All of it is decided by
# hashes of the ids, so nothing depends on the order of reading.


def finished_mix(args, out):
    """{source: what became of its rows}, if an earlier run with these flags wrote the mix."""
    about = out / "mix.json"  # written last: if it is there, mix.jsonl is complete
    if not about.exists():
        return None
    fields = {"made with": dict, "counts": dict}
    made = files.read_object(about, fields, f"Remove it, and {out.name}/mix.jsonl is made again")
    files.check_same_settings(about, made["made with"], settings(args, MIX_FLAGS))
    return made["counts"]


def settings(args, names):
    return {name: getattr(args, name) for name in names}


def mix(collected, args, out):
    """Writes mix.jsonl; returns {source: what became of its rows}, as finished_mix() does."""
    benchmarks = benchmark_keys(args.decontaminate)
    with open(out / "dropped.jsonl", "w") as dropped:
        usable, counts = usable_pairs(collected, benchmarks, dropped)
    mixed = draw(usable, args)
    if not mixed:
        raise InputError("no pair is left; is --others 0, or does --decontaminate take all?")
    for pair in mixed:
        counts[pair.source]["taken"] += 1
    pairs.write_pairs(out / "mix.jsonl", in_both_orders(mixed) if args.both_orders else mixed)
    about = {"made with": settings(args, MIX_FLAGS), "counts": counts}
    with files.atomic_write(out / "mix.json") as file:
        file.write(json.dumps(about).encode())
    shutil.rmtree(out / "read")
    return counts


def draw(usable, args):
    """The pairs that are taken, in their final order, half of them swapped."""

    def by_hash(purpose):
        def key(pair):
            return hashlib.sha256(f"{args.seed} {purpose} {pair.id}".encode()).digest()

        return key

    human = [pair for pair in usable if pair.source.startswith("MM-RLHF")]
    others = [pair for pair in usable if not pair.source.startswith("MM-RLHF")]
    sample = sorted(others, key=by_hash("sample"))[: args.others]
    drawn = sorted(human + sample, key=by_hash("shuffle"))[: args.limit]
    half = sorted(drawn, key=by_hash("place"))[: len(drawn) // 2]
    to_swap = {pair.id for pair in half}
    return [pairs.swap(pair) if pair.id in to_swap else pair for pair in drawn]


def in_both_orders(mixed):
    for pair in mixed:
        yield pair
        yield replace(pairs.swap(pair), id=pair.id + SWAPPED)


# ------------------------------------------------------------------------------------------------
# 3. Annotate


def next_request(pair, verdicts, mode):
    """The messages of the pair's next attempt, or None if there is none left."""
    if mode == "critique":
        is_done = len(verdicts) >= len(pair.responses)
        return None if is_done else pairs.critique_turns(pair, len(verdicts))
    is_done = len(verdicts) >= ATTEMPTS or is_solved(pair, verdicts)
    return None if is_done else pairs.judging_turns(pair)


def is_solved(pair, verdicts):
    return bool(verdicts) and verdicts[-1].choice == pair.choice


class Annotator:
    """Asks for the replies that are missing, --concurrency pairs at a time."""

    def __init__(self, endpoint, replies, args, bar):
        self.endpoint = endpoint
        self.replies = replies
        self.args = args
        self.bar = bar
        self.failures = Counter()  # cause -> pairs left for the next run
        self.failed_in_a_row = 0  # since the last reply, over all workers
        self.done = 0
        self.solved = 0

    async def run(self, mixed):
        """Annotates all pairs; returns how many are left for the next run."""
        async with self.endpoint.client:
            workers = [self._worker(mixed) for _ in range(self.args.concurrency)]
            await asyncio.gather(*workers)
        return self.failures.total()

    async def _worker(self, mixed):
        for pair in mixed:  # one iterator, shared by all workers
            try:
                await self._annotate(pair)
            except NoReply as problem:
                self._leave(pair, problem)
            else:
                self._show_progress(pair)

    async def _annotate(self, pair):
        args = self.args
        verdicts = self.replies.verdicts[pair.id]
        while turns := next_request(pair, verdicts, args.mode):
            sent = await asyncio.to_thread(to_openai, turns, args.max_pixels, args.max_frames)
            request = {
                "temperature": args.temperature,
                "max_tokens": args.max_tokens,
                "seed": len(verdicts),  # deviation 1
            }
            reply = await self.endpoint.ask(args.model, sent, **request)
            self.failed_in_a_row = 0
            self.replies.append(pair, reply)

    def _leave(self, pair, problem):
        self.failures[problem.cause] += 1
        if self.failures[problem.cause] == 1:
            self.bar.write(f"pair {pair.id} is left for the next run: {problem.reason}")
        # once others have had replies, a request that is refused is this pair's own fault
        if not (problem.refused and self.replies.total):
            self.failed_in_a_row += 1
        if self.failed_in_a_row >= max(8, self.args.concurrency):
            raise InputError(
                f"{self.args.base_url}: {self.failed_in_a_row} pairs in a row got no answer, the "
                f"last one: {problem.reason}. All replies are kept; fix the cause and run again"
            )

    def _show_progress(self, pair):
        self.done += 1
        self.bar.update()
        status = {"retried": self.endpoint.retried.total()}
        if self.args.mode == "judge":
            self.solved += is_solved(pair, self.replies.verdicts[pair.id])
            status = {"solved": f"{self.solved / self.done:.1%}"} | status
        self.bar.set_postfix(status, refresh=False)


def reply_settings(mixed, args):
    """What the replies depend on."""
    prompt = pairs.JUDGING_PROMPT if args.mode == "judge" else pairs.CRITIQUE_PROMPT
    with open(mixed, "rb") as file:
        mix_digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    prompt_digest = hashlib.sha256(prompt.encode()).hexdigest()[:12]
    return settings(args, REPLY_FLAGS) | {"prompt": prompt_digest, "pairs": mix_digest}


def annotate(mixed, replies, endpoint, total, args):
    """Asks for every reply that is missing; returns how many pairs got no answer."""
    from tqdm import tqdm

    with tqdm(total=total, desc=args.mode, unit=" pairs", smoothing=0.05, mininterval=1) as bar:
        annotator = Annotator(endpoint, replies, args, bar)
        return asyncio.run(annotator.run(pairs.iter_pairs(mixed)))


# ------------------------------------------------------------------------------------------------
# 4. Write


def write(mixed, replies, counts, args, out):
    """The sets and the report, or with --mode critique the critic's set."""
    if args.mode == "critique":
        pairs.write_pairs(out / "critic.jsonl", criticized_pairs(mixed, replies))
        return
    for name, attempts in SETS.items():
        annotated = annotated_pairs(mixed, replies, args)
        chosen = (pair for pair in annotated if pair.attempts in attempts)
        pairs.write_pairs(out / f"{name}.jsonl", chosen)
    summary = summarize(annotated_pairs(mixed, replies, args))
    report = render_report(summary, counts, replies, args)
    with files.atomic_write(out / "report.md") as file:
        file.write(report.encode())
    draw_report(summary, out / "report.png")
    print(report)


def criticized_pairs(mixed, replies):
    for pair in pairs.iter_pairs(mixed):
        verdicts = replies.verdicts[pair.id]
        if len(verdicts) == len(pair.responses):
            pair.critiques = [replies.text(verdict) for verdict in verdicts]
            yield pair


def annotated_pairs(mixed, replies, args):
    """The pairs of the mix with what the annotator made of them."""
    for pair in pairs.iter_pairs(mixed):
        verdicts = replies.verdicts[pair.id]
        if is_solved(pair, verdicts):
            pair.attempts = len(verdicts)
            pair.annotation = replies.text(verdicts[-1])
        elif len(verdicts) >= ATTEMPTS:
            pair.attempts = ATTEMPTS + 1
        if args.both_orders:
            pair.extra["contradicted"] = is_contradicted(pair, replies)  # deviation 7
        yield pair


def is_contradicted(pair, replies):
    """Whether all attempts in both orders chose the other response."""
    if pair.id.endswith(SWAPPED):
        other_id = pair.id.removesuffix(SWAPPED)
    else:
        other_id = pair.id + SWAPPED
    wrong = 3 - pair.choice
    here = [verdict.choice for verdict in replies.verdicts[pair.id]]
    other = [verdict.choice for verdict in replies.verdicts[other_id]]
    return here == [wrong] * ATTEMPTS and other == [pair.choice] * ATTEMPTS


class Summary:
    """What the report counts."""

    def __init__(self):
        self.attempts = defaultdict(Counter)  # source -> attempts -> pairs
        self.choices = defaultdict(Counter)  # set -> better response -> pairs
        self.lengths = defaultdict(list)  # attempts -> characters of each judgement
        self.remarks = Counter()


def summarize(annotated):
    summary = Summary()
    for pair in annotated:
        summary.attempts[pair.source][pair.attempts] += 1
        for name, attempts in SETS.items():
            if pair.attempts in attempts:
                summary.choices[name][pair.choice] += 1
        if pair.annotation is not None:
            summary.lengths[pair.attempts].append(len(pair.annotation))
            is_malformed = not parse(pair.annotation).well_formed
            summary.remarks["solved, but not in the form of Table 1"] += is_malformed
        is_contradiction = pair.extra.get("contradicted", False)
        summary.remarks["contradicted in both orders"] += is_contradiction
    return summary


def render_report(summary, counts, replies, args):
    """report.md. It holds no time or date: the same replies make the same bytes."""
    total = summary.choices["pairs"].total()
    text = f"# {total:,} pairs judged by {args.model} at temperature {args.temperature:g}\n\n"
    text += sources_table(summary, counts)
    text += choices_table(summary)
    text += lengths_table(summary)
    for remark, number in summary.remarks.items():
        text += f"{number:,} {remark}. "
    text += "\n\n"
    text += cost_line(replies, args.price)
    text += dropped_table(counts)
    return text


def sources_table(summary, counts):
    rows = []
    for source in sorted(counts):
        row = [source, counts[source].get("pairs", 0), counts[source].get("taken", 0)]
        row += [summary.attempts[source][attempts] for attempts in SETS["pairs"]]
        rows.append(row)
    _, *columns = zip(*rows)
    rows.append(["all", *map(sum, columns)])
    head = ["source", "usable pairs", "taken", "1 attempt", "2", "3", "failed", "no answer"]
    return markdown_table(head, rows)


def choices_table(summary):
    rows = []
    for name in SETS:
        choices = summary.choices[name]
        rows.append([f"{name}.jsonl", choices[1], choices[2]])
    return markdown_table(["file", "answer 1 is better", "answer 2 is better"], rows)


def lengths_table(summary):
    if not summary.lengths:
        return ""
    rows = []
    for attempts, lengths in sorted(summary.lengths.items()):
        percentile = sorted(lengths)[int(0.95 * (len(lengths) - 1))]
        rows.append([str(attempts), len(lengths), int(statistics.median(lengths)), percentile])
    head = ["solved at attempt", "reasonings", "characters, median", "95th percentile"]
    return markdown_table(head, rows)


def cost_line(replies, price):
    tokens_in, tokens_out = replies.prompt_tokens, replies.completion_tokens
    tokens = f"{tokens_in:,} tokens in, {tokens_out:,} out"
    return f"{replies.total:,} replies, {tokens}: {cost(tokens_in, tokens_out, price)}.\n\n"


def dropped_table(counts):
    rows = []
    for source in sorted(counts):
        for reason, number in sorted(counts[source].items()):
            if reason not in ("pairs", "taken"):
                rows.append([source, reason, number])
    return markdown_table(["source", "dropped because", "rows"], rows) if rows else ""


def draw_report(summary, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    bars, histogram = figure.subplots(1, 2)
    sources = sorted(source for source in summary.attempts if summary.attempts[source])
    left_ends = [0.0] * len(sources)
    for attempts, colour in zip((1, 2, 3, 4), ("#4c9f70", "#e3b23c", "#e07b39", "#b23a48")):
        label = "failed" if attempts == 4 else str(attempts)
        of_source = [summary.attempts[source] for source in sources]
        shares = [numbers[attempts] / numbers.total() for numbers in of_source]
        bars.barh(sources, shares, left=left_ends, color=colour, label=label)
        left_ends = [end + share for end, share in zip(left_ends, shares)]
        lengths = summary.lengths[attempts]
        if lengths:
            histogram.hist(lengths, bins=40, histtype="step", color=colour, density=True)
    bars.set(xlabel="share of pairs", title="attempts until the verdict was right")
    histogram.set(xlabel="characters", yticks=[], title="length of the reasoning, by attempts")
    figure.legend(*bars.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def data_source(text):
    """The type of --data: [name, path] of NAME=PATH."""
    name, _, path = text.partition("=")
    if name not in TRAINING or not path:
        raise argparse.ArgumentTypeError(
            f"expected NAME=PATH or NAME=hub:owner/name@revision with one of the names "
            f"{', '.join(TRAINING)}, got {text!r}"
        )
    return [name, path]


def parser():
    p = flags.command_line(__doc__)
    add_data_flags(p.add_argument_group("data").add_argument)
    add_annotator_flags(p.add_argument_group("annotator").add_argument)
    sending = p.add_argument_group("sending; may change when a stopped run continues")
    add_sending_flags(sending.add_argument)
    return p


def add_data_flags(add):
    add(
        "--data",
        type=data_source,
        nargs="+",
        action="extend",
        required=True,
        metavar="NAME=PATH",
        help=f"data sets, by name: {', '.join(TRAINING)}; PATH is the download's folder, one of "
        "its files, or hub:owner/name@revision",
    )
    others_help = "pairs to draw from all but MM-RLHF, which is taken whole (section 3.2)"
    add("--others", type=flags.whole(), default=100_000, help=others_help)
    limit_help = "pairs to take from the whole mix at random; default: all"
    add("--limit", type=flags.whole(1), help=limit_help)
    seed_help = "of the sample, the order, which response comes first"
    add("--seed", type=flags.random_seed, default=0, help=seed_help)
    both_help = "annotate each pair also with its responses swapped, mark contradicted pairs (ours)"
    add("--both_orders", action="store_true", help=both_help)
    files_help = "benchmarks; training pairs with their ids, texts or pictures are dropped (ours)"
    add("--decontaminate", nargs="+", default=[], metavar="FILE", help=files_help)
    add("--out", default="out/annotate", help="folder for everything that is written")
    pictures.add_media_root_flag(add)


def add_annotator_flags(add):
    mode_help = "critique: write critic.jsonl from the same mix (deviation 8)"
    add("--mode", choices=("judge", "critique"), default="judge", help=mode_help)
    url_help = "any OpenAI-compatible server; its key in OPENAI_API_KEY"
    add("--base_url", type=flags.server_url, default="https://api.openai.com/v1", help=url_help)
    add("--model", default="gpt-4o", help="its name at the server")
    add("--temperature", type=flags.number(), default=0.0, help="0 in the paper (deviation 1)")
    add("--max_tokens", type=flags.whole(1), default=2048, help="of a reply (ours)")
    pixels_help = "larger pictures are sent scaled down (ours)"
    add("--max_pixels", type=flags.whole(1), default=1_003_520, help=pixels_help)
    add("--max_frames", type=flags.whole(1), default=8, help="of a video, evenly spaced (ours)")
    flags.add_request_flag(add)


def add_sending_flags(add):
    add("--concurrency", type=flags.whole(1, 10_000), default=32, help="requests at a time")
    timeout_help = "seconds that a request may take; then it is sent again"
    add("--timeout", type=flags.number(0.1, 86_400), default=180.0, help=timeout_help)
    retries_help = (
        "of a request, up to 8 seconds apart, or as the server asks up to 120; then its pair is "
        "left for the next run"
    )
    add("--retries", type=flags.whole(), default=60, help=retries_help)
    flags.add_price_flag(add, "for the report; the default was gpt-4o's", default=[2.5, 10.0])


def main(words=None):
    args = parser().parse_args(words)
    endpoint = Endpoint(args.base_url, args.timeout, args.retries, args.request)
    out = Path(args.out)
    files.check_apart(out, args.model)
    out.mkdir(parents=True, exist_ok=True)
    mixed = out / "mix.jsonl"

    counts = finished_mix(args, out)
    if counts is None:
        # 1. Collect: every source's rows as pairs, their pictures checked
        collected = collect(args.data, out)
        # 2. Mix: draw, shuffle and swap them into mix.jsonl
        counts = mix(collected, args, out)
    orders = 2 if args.both_orders else 1
    total = orders * sum(outcomes.get("taken", 0) for outcomes in counts.values())

    pictures.check_may_be_sent(pairs.iter_pairs(mixed), [path for _, path in args.data], args)
    journal_name, most = "journal.jsonl", ATTEMPTS
    if args.mode == "critique":
        journal_name, most = "journal-critique.jsonl", 2  # one of each response
    with files.Journal(out / journal_name) as journal:
        replies = Replies(journal, reply_settings(mixed, args), most)
        # 3. Annotate: ask for every reply that the journal does not have yet
        unanswered = annotate(mixed, replies, endpoint, total, args)
        # 4. Write: the sets and the report
        write(mixed, replies, counts, args, out)

    print(f"sent again: {dict(endpoint.retried) or 'nothing'}")
    if unanswered:
        raise InputError(
            f"{unanswered} of {total} pairs got no answer (see above); the same command asks for "
            "these again, and for nothing else"
        )


if __name__ == "__main__":
    flags.run_stage("annotate.py", main)
