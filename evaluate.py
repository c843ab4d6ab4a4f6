"""
Stage 4: three benchmarks in both answer orders, and every kind of test-time scaling from one file of samples (section 4, C.4-C.7, C.10).

    benchmarks -> rows -> judgements (a model, an endpoint, or rewards made elsewhere) -> results.json, table.md, scaling.png, page.html

The better answer is shown first in half of the judgements and second in the other half, so a model that always says 1 scores
50 %. Each judgement is appended to a file as it comes: a killed run goes on where it stood, and every number is computed from
that file, without a model. For Tables 3, 4, 8, 9 and 12 and Figure 3.

Differs from the paper's evaluation and from its released code:
1) both orders (released: the better answer is always first); --orders chosen_first is that protocol, and its table warns
2) no verdict is wrong, and counted (released: taken for a 2, which was always wrong; in cal.py taken out of the denominator)
3) VL-RewardBench's hallucination group is found in any case of letters: 183/749/318 rows; the paper's 484/448/318 stand beside it
4) rows are known by their number: ids repeat (released: resuming skips the second row of an id)
5) a video's frames are in the order of their names (released: in that of the directory)
6) voting and "any" are exact expectations over all subsets of the samples, half of them in each order, not one draw
Where the paper is silent: 7) a tied vote is a coin, one half; no vote at all is wrong
8) early stopping takes the orders in turn; an unparsed sample costs, breaks the run and has no vote
9) calibrated weighting (the paper's future work): votes of sigmoid(log-odds / T) - 1/2, with the likeliest T on the other half of the rows

The toy, on two CPU cores:
$ python evaluate.py @toy/evaluate.args --model out/toy/rl --out out/toy/eval
A GPU, then four of them (not yet run at this scale):
$ python evaluate.py --model out/rl --out out/eval --bench VL-RewardBench=data/VL-RewardBench MM-RLHF-RewardBench=data/MM-RLHF-RewardBench
$ torchrun --nproc_per_node=4 evaluate.py --model out/rl --out out/eval --bench Multimodal-RewardBench=data/all_data.json
A model behind an endpoint, one judgement in each order (its key in OPENAI_API_KEY); a reward model that is not ours; the numbers again:
$ python evaluate.py --base_url http://127.0.0.1:8000/v1 --model NAME --samples 2 --out out/other --bench pairs=data/dev.jsonl
$ python evaluate.py --scores rewards.jsonl --out out/scalar --bench pairs=data/dev.jsonl
$ python evaluate.py --score_only --out out/eval --compare out/other
Two runs side by side for people to vote on, blind (C.7), and what they said:
$ python evaluate.py --score_only --out out/eval --ab out/other
$ python evaluate.py --out out/eval --tally votes-a.json votes-b.json
"""
import argparse
import asyncio
import fcntl
import hashlib
import html
import json
import math
import os
import random
import re
import threading
import time
from collections import Counter, defaultdict, deque, namedtuple
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from functools import cache
from itertools import islice, takewhile
from pathlib import Path

import numpy as np
import torch

from annotate import (JUDGING_PROMPT, Endpoint, Unanswered, Unusable, as_sent, at_least, check_pair, command_line, data_url, each_pair,
                      frames, keep, locate, located_lines, messages, table_rows, turn, whole)
from annotate import table as markdown
from sft import HF, collate, critique_of, encode, for_vllm, load_policy, load_processor, micro_batches, read_media, start_vllm
from stable_reinforce import parse

# ---------------------------------------------------------------------------------------------------
# Benchmarks -> rows. A row is a pair (see annotate.py) with bench, row (its number in it), groups {grouping: group} and set, the rows
# judged together. What reads a benchmark makes of each of its rows: id, question, responses, choice, image, video, groups.


def vl_group(id, any_case=True):
    """VL-RewardBench's group of an id, by its first word. The paper's rule looks for small letters alone (deviation 3)."""
    word = re.split("[-_]", id.lower() if any_case else id)[0]
    return "hallucination" if word in ("rlaif", "rlhf", "hallucination") else "reasoning" if word in ("mathverse", "mmmu") else "general"


def vl_reward_bench(r):
    """The hub's parquet (query, response, human_ranking, image), or the released JSONL (prompt, chosen, rejected, image)."""
    groups = {"benchmark": vl_group(str(r["id"])), "paper": vl_group(str(r["id"]), any_case=False)}
    if "chosen" in r:
        return r["id"], r["prompt"], [r["chosen"], r["rejected"]], 1, r["image"], None, groups
    better = {(0, 1): 1, (1, 0): 2}[tuple(r["human_ranking"])]
    return r["id"], r["query"], list(r["response"]), better, r["image"], None, groups


def multimodal_reward_bench(r):
    """all_data.json as the benchmark's own script joins it: ID, Text, Image, Output1, Output2, Better, Category."""
    id, better = str(r["ID"]).lower(), {"Output1": 1, "Output2": 2}[r["Better"]]
    column = {"open_generation/correctness_task": "correctness", "open_generation/preference_task": "preference",
              "knowledge": "knowledge", "vqa": "vqa", "reasoning": "math" if id.startswith("math") else "coding",
              "safety": "safety" if id.startswith("pairs") else "toxicity"}[r["Category"]]  # toxicity is beyond the seven columns
    return r["ID"], r["Text"], [r["Output1"], r["Output2"]], better, r["Image"], None, {"columns": column}


def mm_rlhf_reward_bench(r):
    """JSONL: id, image or video, prompt, chosen, rejected. The rows of an id are pairs of the same answers: Acc+ asks for all of them."""
    group = [part for part in Path(r.get("image") or r["video"]).parts if part in ("mcq", "long", "short", "safety", "video")][0]
    return r["id"], r["prompt"], [r["chosen"], r["rejected"]], 1, r.get("image"), r.get("video"), {"category": group}


BENCHMARKS = {  # name: (reader of a row, its files in a folder)
    "VL-RewardBench": (vl_reward_bench, ("data/test-*.parquet", "test-*.parquet", "data.jsonl")),
    "Multimodal-RewardBench": (multimodal_reward_bench, ("data/all_data.json", "all_data.json")),
    "MM-RLHF-RewardBench": (mm_rlhf_reward_bench, ("mm_reward_bench.jsonl",))}
PUBLISHED = {  # rows of each group
    "VL-RewardBench": {"benchmark": {"general": 183, "hallucination": 749, "reasoning": 318},
                       "paper": {"general": 484, "hallucination": 448, "reasoning": 318}},
    "Multimodal-RewardBench": {"columns": {"correctness": 623, "preference": 654, "knowledge": 630, "math": 514, "coding": 584,
                                           "safety": 508, "vqa": 1198}},
    "MM-RLHF-RewardBench": {"category": {"mcq": 42, "long": 37, "short": 34, "safety": 32, "video": 25}}}


def media(folder, out, image=None, video=None):
    """What a row names -> images and video of a pair. A picture inside a table goes to out/media; what is not there keeps its path."""
    place = lambda name: locate(folder, name) or os.path.join(folder, str(name))
    picture = place(image) if image else None
    if isinstance(picture, bytes):  # it lay inside a table
        kept = keep(picture, Path(out, "media"))
        if isinstance(kept, str):
            raise LookupError(kept)
        picture, _ = kept
    return {"images": [picture] if picture else [], "video": (frames(place(video)) or [place(video)]) if video else None}  # deviation 5


def bench_rows(name, path, out, group="source"):
    """The rows of one benchmark."""
    if name == "pairs":  # the project's own format; its columns are the values of one field
        for i, pair in enumerate(each_pair(path)):
            yield pair | {"bench": name, "row": i, "groups": {group: str(pair.get(group))}, "set": str(i)}
        return
    read, patterns = BENCHMARKS[name]
    for i, (where, r) in enumerate(table_rows(path, patterns)):
        folder = os.path.dirname(where.rpartition(", ")[0])  # of the file, from which its paths go on
        try:
            id, question, responses, choice, image, video, groups = read(r)
            row = {"id": str(id), "source": name, "question": question, **media(folder, out, image, video), "responses": responses,
                   "choice": choice, "attempts": None, "annotation": None}
        except (LookupError, TypeError, AttributeError) as problem:
            raise Unusable(f"{where} is not as rows of {name} are ({problem!r}); see {read.__name__}() in evaluate.py") from None
        # an empty answer, which no pair may have, is a benchmark's to have: check_data counts it
        check_pair(row | {"responses": ["-" if isinstance(text, str) and not text.strip() else text for text in responses]}, where)
        # known by its number (deviation 4)
        yield row | {"bench": name, "row": i, "groups": groups, "set": str(id) if name == "MM-RLHF-RewardBench" else str(i)}


def read_rows(args):
    """{bench: its rows}, from the benchmarks' files or, without --bench, from what the run in --out kept of them."""
    kept, benches = Path(args.out, "rows.jsonl"), defaultdict(list)
    if not args.bench:
        if not kept.is_file():
            raise Unusable(f"{kept}: no such file, so no run has been here; give --bench NAME=PATH, or the --out of a run")
        for *_, row in located_lines(kept):
            benches[row["bench"]].append(row)
    for name, path in args.bench:
        rows = benches[name] = list(islice(bench_rows(name, path, args.out, args.group), args.limit))
        files = [p for row in rows for p in row["images"] + (row["video"] or [])]
        missing = [p for p in files if not os.path.isfile(p)]
        if missing or not rows:
            raise Unusable(f"{path}: {len(missing)} of {len(files)} images are missing, the first is {missing[0]}; paths go on from the "
                           "folder of the benchmark's file" if rows else f"{path} has no rows")
    return benches


def fits(rows):
    """z-score: do questions share more words with their own answers than with those half the list away? inf: too few words to tell."""
    words = lambda text: {w for w in re.findall(r"\w+", text.lower()) if len(w) > 3}
    asked, said = [words(r["question"]) for r in rows], [words(" ".join(r["responses"])) for r in rows]
    far = said[len(rows) // 2:] + said[:len(rows) // 2]
    gain = np.array([(len(q & own) - len(q & other)) / max(1, len(q)) for q, own, other in zip(asked, said, far)])
    return math.inf if np.count_nonzero(gain) < 20 else gain.mean() / gain.std(ddof=1) * math.sqrt(len(gain))


def check_data(bench, rows):
    """What to know of a benchmark's file before its numbers are believed, as lines of text."""
    notes, tell = [], lambda counts: ", ".join(f"{g} {n}" for g, n in counts)
    for grouping, published in PUBLISHED.get(bench, {}).items():
        there = Counter(row["groups"][grouping] for row in rows)
        notes.append(f"{grouping}: {tell(sorted(there.items()))}")
        if there != published:
            notes.append(f"note: the published file has {tell(published.items())}")
    first = sum(row["choice"] == 1 for row in rows)
    if first in (0, len(rows)):
        notes.append(f"note: in this file the {'better' if first else 'worse'} answer always stands first; --orders dataset shows it so")
    repeated = len(rows) - len({(row["question"], *row["responses"], *row["images"]) for row in rows})
    empty = sum(not all(text.strip() for text in row["responses"]) for row in rows)
    notes += [f"note: {n} rows {what}" for n, what in ((repeated, "repeat another one"), (empty, "have an empty answer")) if n]
    kinds = defaultdict(list)
    for row in rows if bench == "Multimodal-RewardBench" else ():
        kinds[re.split(r"[-_\d]", row["id"])[0]].append(row)
    for kind, its in sorted(kinds.items()):  # its script joins prompts by row number to data sets that have changed since
        if (z := fits(its)) < 2:
            notes.append(f"WARNING: the {kind} questions do not seem to belong to their answers (z = {z:.1f}); join them anew")
    return notes


# ---------------------------------------------------------------------------------------------------
# The file of judgements

FIELDS = {"bench": str, "row": int, "id": str, "order": int, "sample": int, "text": str, "choice": (int, type(None)),
          "logp1": (float, type(None)), "logp2": (float, type(None)), "tokens": int, "finish": str}
address = lambda row: (row["bench"], row["row"])
digest = lambda *parts: hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
content = lambda row: digest(row["id"], row["question"], row["responses"], row["choice"])  # what makes a row of two runs the same
where = lambda j: (*address(j), j["order"], j["sample"])
picked = lambda j: j["choice"] and (3 - j["choice"] if j["order"] else j["choice"])  # 1 or 2 as the row lists its answers; None: no verdict
larger = lambda a, b: None if a == b else 1 if a > b else 2
# the flags that a judgement depends on
MADE_BY = ("model", "base_url", "scores", "temperature", "max_new_tokens", "max_pixels", "early_stop", "seed")


def read_judgements(folder):
    """{(bench, row, order, sample): judgement} of a run. A last line without its end was cut off by a kill and does not count."""
    done = {}
    for path in sorted(Path(folder).glob("judgements*.jsonl")):  # one file a rank
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
            try:
                j = json.loads(line)
                wrong = [f"{f!r} is {j[f]!r}" for f, kind in FIELDS.items() if not isinstance(j[f], kind)]
                wrong += [f"{where(j)} is there already"] * (where(j) in done)
            except (ValueError, TypeError, KeyError) as problem:
                wrong = [f"no judgement ({problem!r}); legal: {', '.join(FIELDS)}"]
            if wrong:
                raise Unusable(f"{path}, line {number}: {wrong[0]}; remove that line to have it made again")
            done[where(j)] = j
    return done


class Journal:
    """The file of judgements being written: by one process at a time, whole lines only, each as soon as it is made."""

    def __init__(self, folder, rank):
        self.file = open(Path(folder, f"judgements{f'-{rank}' if rank else ''}.jsonl"), "ab+")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
        except BlockingIOError:
            raise Unusable(f"{self.file.name}: another run is writing to it; wait for it, or choose another --out") from None
        self.file.seek(0)
        self.file.truncate(self.file.read().rfind(b"\n") + 1)  # half a line, left by a kill

    def write(self, judgements):
        self.file.write("".join(json.dumps(j) + "\n" for j in judgements).encode())
        self.file.flush()


def settle(args, benches, done, rank=0):
    """Keeps rows and configuration beside the judgements. Two configurations never meet in one file; another --samples or --orders may."""
    config = {k: vars(args)[k] for k in (*MADE_BY, "samples", "orders")} | {"prompt": digest(JUDGING_PROMPT)}
    config["rows"] = {bench: list(map(content, rows)) for bench, rows in benches.items()}
    path = Path(args.out, "config.json")
    if path.is_file() and done:
        before = json.loads(path.read_text())
        differs = [f"{k} was {before[k]!r}, is {config[k]!r}" for k in (*MADE_BY, "prompt") if before[k] != config[k]]
        for bench, then in before["rows"].items():
            now = config["rows"].setdefault(bench, then)
            n = min(len(then), len(now))  # with another --limit one is the beginning of the other
            differs += [f"{bench} has other rows"] * (then[:n] != now[:n])
        if differs:
            raise Unusable(f"--out {args.out} holds another run: {'; '.join(differs)}. Choose another folder, or the same settings")
    for name, found in (("config.json", [config]), ("rows.jsonl", sum(benches.values(), []))) if rank == 0 else ():
        with whole(path.with_name(name)) as file:
            file.write("".join(json.dumps(line) + "\n" for line in found).encode())


# ---------------------------------------------------------------------------------------------------
# Judges. Each backend is a function of a deque of jobs, which may grow meanwhile, that yields (job, [output, ...]) as they are
# finished. An output is a judgement without its place: text, choice, logp1, logp2, tokens, finish.

Job = namedtuple("Job", "row order first count")  # samples first .. first + count - 1 of a row in one order


def plan(row, args):
    """The places of a row's judgements (see where()), in the sequence in which early stopping takes them (deviation 8)."""
    if args.orders == "both":
        return [(*address(row), (row["row"] + t) % 2, t // 2) for t in range(args.samples)]
    return [(*address(row), 0 if args.orders == "dataset" else row["choice"] - 1, t) for t in range(args.samples)]


def so_far(row, done, args):
    """A row's judgements in the sequence of its plan, up to the first that is not there."""
    return [done[at] for at in takewhile(done.__contains__, plan(row, args))]


def stopped(found, limit, run=3):
    """
    Early stopping (C.10): the answer, once three in a row are equal or all samples are drawn; 1.5 is a tie; False: draw on.

    >>> stopped([1, 2, 2], 16), stopped([1, 2, 2, 2], 16), stopped([1, 2, 1, 2], 4), stopped([None] * 4, 4)
    (False, 2, 1.5, None)
    """
    if len(found) >= run and found[-1] and len(set(found[-run:])) == 1:
        return found[-1]
    ones, twos = found.count(1), found.count(2)
    return False if len(found) < limit else larger(ones, twos) or (1.5 if ones else None)


def due(row, done, args):
    """The jobs to ask for next. With --early_stop as many samples as must be drawn whatever they say: none is wasted."""
    ahead, jobs = plan(row, args), []
    if args.early_stop:
        found = [picked(j) for j in so_far(row, done, args)]
        alike = len(list(takewhile(lambda p: p and p == found[-1], reversed(found))))
        ahead = ahead[len(found):len(found) + 3 - alike] if stopped(found, args.samples) is False else []
    for *_, order, sample in sorted(at for at in ahead if at not in done):
        if jobs and (jobs[-1].order, jobs[-1].first + jobs[-1].count) == (order, sample):
            jobs[-1] = jobs[-1]._replace(count=jobs[-1].count + 1)
        else:
            jobs.append(Job(row, order, sample, 1))
    return jobs


def collect(rows, answers, done, args, write=None):
    """Asks for every judgement of the rows that is not there yet; `done` grows, and `write` is told of each as it comes."""
    jobs, flying, start, told, made, tokens = deque(), Counter(), time.monotonic(), 0.0, 0, 0  # flying: a row's samples on their way

    def ask(row):
        more = due(row, done, args)
        jobs.extend(more)
        flying[address(row)] += (n := sum(job.count for job in more))
        return n

    total = sum(map(ask, rows))
    for job, outputs in answers(jobs):
        place = {k: job.row[k] for k in ("bench", "row", "id")} | {"order": job.order}
        judgements = [place | {"sample": sample} | output for sample, output in enumerate(outputs, job.first)]
        if write:
            write(judgements)
        done |= {where(j): j for j in judgements}
        flying[address(job.row)] -= job.count
        if not flying[address(job.row)]:
            total += ask(job.row)  # early stopping may want more
        made, tokens, spent = made + job.count, tokens + sum(o["tokens"] for o in outputs), time.monotonic() - start
        if write and (spent > told + 10 or made == total):
            told = spent
            print(f"{made} of {total} judgements in {spent:.0f} s, {tokens / spent:.0f} tokens/s", flush=True)


def seed_of(job, args):
    """Of a job's first sample; the next ones count on. So a sample's seed is the same whatever it is asked together with."""
    return int(digest(args.seed, *address(job.row), job.order)[:6], 16) * 100 + job.first


def verdict_at(n, piece, text):
    """The index among n tokens of the one that is the verdict: the first digit met when walking back from the last </answer>."""
    tail, closed = "", False
    for t in range(n - 1, -1, -1) if parse(text).choice else ():
        if closed and piece(t).strip() in ("1", "2"):
            return t
        tail = piece(t) + tail
        closed = closed or "</answer>" in tail
    return None


def output_of(text, tokens=0, finish="stop", logp1=None, logp2=None):
    return {"text": text, "choice": parse(text).choice, "logp1": logp1, "logp2": logp2, "tokens": tokens,
            "finish": "length" if finish == "length" else "stop"}


def engine(args):
    """vLLM in this process: images are read ahead by threads, and each is processed once for all samples of a job."""
    # the ranks of torchrun need not meet: each has an engine, and GPUs, of its own
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    torchrun = {k: os.environ.pop(k) for k in names if k in os.environ}
    if torchrun:
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(64)))).split(",")
        first = int(torchrun["LOCAL_RANK"]) * args.tensor_parallel
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[first:first + args.tensor_parallel])
    processor = load_processor(args.model, max_pixels=args.max_pixels)
    digits = processor.tokenizer.encode("12", add_special_tokens=False)
    if processor.tokenizer.convert_ids_to_tokens(digits) != ["1", "2"]:
        raise Unusable(f"--model {args.model} reads 12 as the tokens {digits}; legal: a model to which each digit is one token, as Qwen's")
    llm = start_vllm(args.model, args.context, tensor_parallel_size=args.tensor_parallel,
                     limit_mm_per_prompt={"image": 16, "video": 1}).llm_engine
    os.environ |= torchrun
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    def request(job):
        turns = messages(job.row, job.order)
        prompt = {"prompt": processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)}
        prompt |= for_vllm(*read_media(processor, turns))
        return prompt, SamplingParams(n=job.count, temperature=args.temperature, max_tokens=args.max_new_tokens, seed=seed_of(job, args),
                                      logprob_token_ids=digits, flat_logprobs=True, output_kind=RequestOutputKind.FINAL_ONLY)

    def output(c):
        at = verdict_at(len(c.token_ids), lambda t: processor.tokenizer.decode([c.token_ids[t]]), c.text)
        logps = () if at is None else [float(c.logprobs[at][digit].logprob) for digit in digits]
        return output_of(c.text, len(c.token_ids), c.finish_reason, *logps)

    def answers(jobs):
        ahead, flying = deque(), {}  # requests that are being prepared; {their name in the engine: job}
        with ThreadPoolExecutor(4) as pool:
            while jobs or ahead or flying:
                while jobs and len(ahead) < 64:
                    job = jobs.popleft()
                    ahead.append((job, pool.submit(request, job)))
                while ahead and sum(job.count for job in flying.values()) < 512:  # the engine runs 256 at a time
                    job, ready = ahead.popleft()
                    name = f"{job.row['bench']} row {job.row['row']}, order {job.order}, sample {job.first}"
                    try:
                        llm.add_request(name, *ready.result())
                    except (ValueError, OSError) as problem:
                        raise Unusable(f"{name}: {problem}. If it is too long: --context") from None
                    flying[name] = job
                for finished in llm.step():
                    yield flying.pop(finished.request_id), [output(c) for c in finished.outputs]
    return answers


def endpoint(args):
    """An OpenAI-compatible server, --concurrency jobs at a time; log-probabilities if it gives them, which few do."""
    server, loop = Endpoint(args.base_url, timeout=600, retries=8), asyncio.new_event_loop()
    fixed = {"temperature": args.temperature, "max_completion_tokens": args.max_new_tokens}
    extra = {"logprobs": True, "top_logprobs": 5}
    threading.Thread(target=loop.run_forever, daemon=True).start()  # of its own: the caller, a notebook say, may have one running

    async def one(shown, seed):
        more = dict(extra)
        try:
            reply = await server.ask(args.model, shown, seed=seed, **fixed, **more)
        except Unanswered as refused:
            if more and "logprobs" in str(refused):
                extra.clear()  # it has none to give
                return await one(shown, seed)
            raise Unusable(f"--base_url {args.base_url}: {refused.args[0]}") from None
        said = reply.get("said", [])
        at = verdict_at(len(said), said.__getitem__, reply["text"])
        options = {} if at is None else reply["likeliest"][at]
        seen = {token.strip(): logp for token, logp in reversed(options.items())}  # of "1" and " 1" the likelier
        return output_of(reply["text"], reply["tokens"][1] or len(said), reply["finish"], seen.get("1"), seen.get("2"))

    async def ask(job):
        shown = await asyncio.to_thread(as_sent, messages(job.row, job.order), args.max_pixels or 2**62, max_frames=32)
        return [await one(shown, seed_of(job, args) + i) for i in range(job.count)]

    def answers(jobs):
        flying = {}
        try:
            while jobs or flying:
                while jobs and len(flying) < args.concurrency:
                    job = jobs.popleft()
                    flying[asyncio.run_coroutine_threadsafe(ask(job), loop)] = job
                for future in wait(flying, return_when=FIRST_COMPLETED).done:
                    yield flying.pop(future), future.result()
        finally:
            for future in flying:
                future.cancel()
    return answers


def rewarded(reward):
    """The backend of a function [row, ...] -> [((r1, r2), text), ...]: the higher reward is the verdict; equal ones are none."""
    def answers(jobs):
        known = {}
        while jobs:
            now = [jobs.popleft() for _ in range(min(len(jobs), 64))]
            new = {address(job.row): job.row for job in now if address(job.row) not in known}  # a row is scored once for both orders
            known |= zip(new, reward(list(new.values())))
            for job in now:
                (a, b), text = known[address(job.row)]
                a, b = (b, a) if job.order else (a, b)
                norm = float(np.logaddexp(a, b))
                yield job, [output_of(text, 0, "stop", a - norm, b - norm) | {"choice": larger(a, b)}] * job.count
    return answers


def scores(args):
    """Rewards made elsewhere: JSONL of bench, row and scores, of the first response and of the second as the row lists them."""
    given = {}
    for line, r in table_rows(args.scores, ()):
        try:
            given[address(r)] = a, b = tuple(map(float, r["scores"]))
        except (LookupError, TypeError, ValueError):
            a = b = math.nan
        if not math.isfinite(a + b):
            raise Unusable(f"{line} is {json.dumps(r)[:200]}; legal: bench, row and scores, two finite numbers")

    def reward(rows):
        lacks = [f"{row['bench']} row {row['row']}" for row in rows if address(row) not in given]
        if lacks:
            raise Unusable(f"--scores {args.scores} has nothing for {lacks[0]}; it has {len(given)} rows")
        return [(given[address(row)], "") for row in rows]
    return rewarded(reward)


def heads(args):
    """The reward heads of sft.py: scalar scores a response, critic its own critique of it."""
    policy, processor = load_policy(args.model), load_processor(args.model, max_pixels=args.max_pixels)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    policy.to(device).eval()

    @torch.no_grad()
    def reward(rows):
        texts, found = [""] * 2 * len(rows), {}
        if policy.kind == "scalar":
            asked = [encode(processor, turn(row, row["question"]), response) for row in rows for response in row["responses"]]
        else:
            asked = [encode(processor, critique_of(row, i)) for row in rows for i in (0, 1)]
            replies = HF(policy, processor, device).generate(asked, temperature=0.0, max_tokens=args.max_new_tokens)
            asked = [row | {"response": sample["ids"]} for row, (sample,) in zip(asked, replies)]
            texts = [processor.tokenizer.decode(row["response"], skip_special_tokens=True) for row in asked]
        for group in micro_batches([[row | {"number": i}] for i, row in enumerate(asked)], 16384):  # padded tokens
            said = policy(collate(group, processor.tokenizer.pad_token_id, device))["score"].tolist()
            found |= {row["number"]: score for row, score in zip(group, said)}
        return [((found[i], found[i + 1]), "\n\n".join(texts[i:i + 2]).strip()) for i in range(0, len(asked), 2)]
    return rewarded(reward)


has_head = lambda args: not args.base_url and Path(args.model, "reward_head").is_dir()
backend = lambda args: (scores if args.scores else endpoint if args.base_url else heads if has_head(args) else engine)(args)
Judged = namedtuple("Judged", "choice probability votes reasoning")


class Judge:
    """
    judge = Judge("out/rl"), or Judge("NAME", base_url="http://..."), other flags by name; samples a pair, half of them in each order.
    judge(question, images, answer1, answer2) -> choice (1, 2 or None), probability (its share of the votes), votes (for 1, for 2,
    none), reasoning (of a sample that chose so). judge.rank(question, images, answers) -> [(index, share of duels won), ...].
    """

    def __init__(self, model, samples=2, **flags):
        words = [word for k, v in flags.items() for word in ([f"--{k}"] if v is True else [f"--{k}", str(v)])]
        self.args = check_args(parser().parse_args(["--model", str(model), "--samples", str(samples), "--out", os.devnull, *words]))
        self.answers = backend(self.args)

    def judgements(self, question, images, pairs):
        """The judgements of each pair of answers, all asked for at once; of a pair, those in the order as asked come first."""
        rows = [{"bench": "", "row": i, "id": str(i), "question": question, "images": list(map(str, images)), "video": None,
                 "responses": list(pair), "choice": 1} for i, pair in enumerate(pairs)]
        done = {}
        collect(rows, self.answers, done, self.args)
        return [sorted(so_far(row, done, self.args), key=where) for row in rows]

    def __call__(self, question, images, answer1, answer2):
        said = self.judgements(question, images, [(answer1, answer2)])[0]
        found = [picked(j) for j in said]
        lean = found.count(1) - found.count(2) or sum(  # in a tie, whoever is surer
            (1 - 2 * j["order"]) * (j["logp1"] - j["logp2"]) for j in said if None not in (j["choice"], j["logp1"], j["logp2"]))
        choice = larger(lean, 0)
        reasoning = next((j["text"] for j, p in zip(said, found) if p and p == choice), "")
        votes = tuple(map(found.count, (1, 2, None)))
        return Judged(choice, votes[choice - 1] / len(found) if choice else 0.0, votes, reasoning)

    def rank(self, question, images, answers):
        """Every answer against every other one, in both orders; no verdict is half a point for either."""
        duels = [(i, j) for i in range(len(answers)) for j in range(i)]
        won = Counter({i: 0.0 for i in range(len(answers))})
        for (i, j), said in zip(duels, self.judgements(question, images, [(answers[i], answers[j]) for i, j in duels])):
            share = sum({1: 1.0, None: 0.5, 2: 0.0}[picked(s)] for s in said) / len(said)
            won[i] += share / (len(answers) - 1)
            won[j] += (1 - share) / (len(answers) - 1)
        return won.most_common()


# ---------------------------------------------------------------------------------------------------
# Scores. First test-time scaling, as pure functions of counts = ((right, wrong, none), ...): a row's samples with the better answer
# shown first, then second; or those of one order alone. ks = how many samples are taken of each.

TRIVIAL = ("always 1", "longer answer", "shorter answer", "coin")
# Does the reasoning go back on itself (C.6)? By telltale words: a hint where to look, no measurement.
DOUBTS = re.compile(r"wait[,.:!]|re-?(?:read|check|exam)|re-eval|reconsider|recalculat|second thought|look again|made a mistake"
                    r"|correct myself", re.I)


@cache
def chances(counts, ks):
    """
    Over all subsets of so many samples: the probabilities that the majority is right, that it is a tie, that any sample is right.
    A tie counts one half, no vote 0 (deviation 7).

    >>> chances(((2, 1, 0),), (3,)), chances(((1, 0, 1), (0, 1, 1)), (1, 1))
    ((1.0, 0, 1.0), (0.375, 0.25, 0.5))
    """
    found = {(0, 0): 1.0}  # (right, wrong): probability
    for (right, wrong, none), k in zip(counts, ks):
        step, ways = defaultdict(float), math.comb(right + wrong + none, k)
        for r in range(min(right, k) + 1):
            for w in range(max(0, k - r - none), min(wrong, k - r) + 1):
                p = math.comb(right, r) * math.comb(wrong, w) * math.comb(none, k - r - w) / ways  # drawn without putting back
                for (a, b), q in found.items():
                    step[a + r, b + w] += p * q
        found = step
    tie = sum(p for (r, w), p in found.items() if r == w > 0)
    return sum(p for (r, w), p in found.items() if r > w) + tie / 2, tie, sum(p for (r, _), p in found.items() if r)


def shares(orders, k):
    """k samples shared among the orders: in halves; of an odd k either order has the odd one: shares(2, 5) = [(2, 3), (3, 2)]."""
    return [(k,)] if orders == 1 else sorted({(k // 2, k - k // 2), (k - k // 2, k // 2)})


@cache
def early_stop(counts, start=0, limit=None, run=3):
    """
    Early stopping replayed on every possible sequence of a row's samples, the orders in turn from `start`, at most `limit` samples
    (deviation 8): (probability of being right, how many of the (right, wrong, none) of each order are expected to be drawn).
    """
    flat, limit = [n for c in counts for n in c], min(limit or math.inf, sum(map(sum, counts)))  # kind i % 3 of order i // 3
    states, accuracy, used = {((0,) * len(flat), None, 0): 1.0}, 0.0, [0.0] * len(flat)  # {(drawn, last kind, alike in a row): probability}
    for t in range(limit + 1):
        step = defaultdict(float)
        for (drawn, last, length), p in states.items():
            right, wrong = sum(drawn[0::3]), sum(drawn[1::3])
            if length == run or t == limit:
                accuracy += p * (last == 0 if length == run else 0.5 if right == wrong > 0 else right > wrong)
                used = [u + p * n for u, n in zip(used, drawn)]
                continue
            left = {i: flat[i] - drawn[i] for i in range(len(flat)) if i // 3 == (start + t) % len(counts) and flat[i] > drawn[i]}
            for i, n in left.items():
                alike = 0 if i % 3 == 2 else length + 1 if i % 3 == last else 1
                step[drawn[:i] + (drawn[i] + 1,) + drawn[i + 1:], i % 3, alike] += p * n / sum(left.values())
        states = step
    return accuracy, tuple(tuple(used[i:i + 3]) for i in range(0, len(used), 3))


def fit_temperature(log_odds):
    """The T from 0.05 to 50 that makes sigmoid(z / T) likeliest, z being the log-odds given to the right answer."""
    grid = np.geomspace(0.05, 50, 200)
    return float(grid[np.logaddexp(0, -log_odds[:, None] / grid).mean(0).argmin()]) if len(log_odds) else 1.0


class Tally:
    """
    The rows of one benchmark that are judged to the end, and their samples as arrays (R, S), of R rows S samples each: place of the
    better answer, 0 = shown first, 1 = second; kind, 0 = right, 1 = wrong, 2 = no verdict; right and wrong, the log-probabilities of
    the two verdicts. stops (V, R, 3) is early stopping: the probability of being right, samples drawn, their tokens.
    """

    def __init__(self, rows, done, args):
        self.orders = 2 if args.orders == "both" else 1
        self.n = 1 if args.early_stop else args.samples  # samples a row to vote with
        self.rows, self.used, ends = [], [], []
        for row in rows:
            its = so_far(row, done, args)
            answer = stopped([picked(j) for j in its], args.samples, 3 if args.early_stop else math.inf)
            if answer is not False:
                self.rows.append(row)
                self.used.append(its[:self.orders] if args.early_stop else its)  # later ones are there because of what these said
                ends.append((0.5 if answer == 1.5 else answer == row["choice"], len(its), sum(j["tokens"] for j in its)))
        self.missing = len(rows) - len(self.rows)
        if not self.rows:
            return
        read = lambda field, none: np.array([[none if j[field] is None else j[field] for j in its] for its in self.used])
        verdict, log1, log2 = read("choice", 0), read("logp1", -math.inf), read("logp2", -math.inf)
        self.place = read("order", 0) ^ np.array([[row["choice"] - 1] for row in self.rows])
        self.kind = np.where(verdict == 0, 2, verdict - 1 != self.place)
        self.right, self.wrong = np.where(self.place == 0, (log1, log2), (log2, log1))
        cells = (self.place[..., None, None] == [[0], [1]]) & (self.kind[..., None, None] == [0, 1, 2])  # (R, S, place, kind)
        self.counts, self.tokens = cells.sum(1), (cells * read("tokens", 0)[..., None, None]).sum(1)  # (R, place, kind)
        self.sides = [tuple(tuple(c) for c in row if any(c)) for row in self.counts.tolist()]  # of the orders there are
        self.stops = np.array([ends]) if args.early_stop else self.replay() if self.n > 2 else None
        self.weighted, self.T = weighted(self) if self.n > 2 else ({}, None)

    def chances(self, k):
        """(V, R, 3): chances() of each row."""
        return np.array([[chances(counts, ks) for counts in self.sides] for ks in shares(self.orders, k)])

    def replay(self):
        """What early stopping would have done with these samples, begun in either order."""
        lengths, out = self.tokens / np.maximum(self.counts, 1), []  # samples of a kind are alike: their mean length
        for start in range(self.orders):
            drawn = [early_stop(counts, start) for counts in self.sides]
            tokens = [(used * length[there]).sum() for (_, used), length, there in zip(drawn, lengths, self.counts.any(2))]
            out.append([(accuracy, np.sum(used), t) for (accuracy, used), t in zip(drawn, tokens)])
        return np.array(out)


def lines(tally, args):
    """{name: (V, R)}: the probability that each row is judged rightly, in V variants to be averaged (the two orders, say); NaN: in none."""
    n, places = tally.n, np.array([[1.0], [0.0]])  # who always says 1 is right where the better answer is shown first
    with np.errstate(invalid="ignore"):
        right = (tally.counts[:, :, 0] / tally.counts.sum(-1)).T  # (2, R), NaN in a place where the row was not shown
    shown = lambda right: right if tally.orders == 2 else np.nansum(right, 0, keepdims=True)
    out = {"one sample": shown(right)}
    if args.orders != "chosen_first":
        out |= {"better answer first": right[:1], "better answer second": right[1:]}
    if tally.orders == 2:
        out["right in both orders"] = right[:1] * right[1:]
    if n > 2:
        out |= {f"voting@{k}": tally.chances(k)[..., 0] for k in sorted({5, 15, n}) if k <= n} | {f"any@{n}": tally.chances(n)[..., 2]}
    if tally.stops is not None:
        out[f"early stopping, at most {args.samples}"] = tally.stops[..., 0]
    out |= tally.weighted
    gain = [len(row["responses"][row["choice"] - 1]) - len(row["responses"][2 - row["choice"]]) for row in tally.rows]
    longer = (1 + np.sign([gain])) / 2
    return out | dict(zip(TRIVIAL, (shown(np.where(np.isnan(right), right, places)), longer, 1 - longer, np.full_like(longer, 0.5))))


def weighted(tally):
    """({line: (1, R)}, T): votes weighted by the verdict's probability (C.10), and calibrated votes (deviation 9); T of either half."""
    own = np.choose(tally.kind, (tally.right, tally.wrong, -math.inf))  # log-probability of the verdict, (R, S)
    known = own > -math.inf
    if not known.any():
        return {}, None
    with np.errstate(invalid="ignore"):  # neither is known: no odds
        odds = np.clip(np.nan_to_num(tally.right - tally.wrong, nan=0.0), -20, 20)  # towards the right answer
    half = np.array([[hashlib.sha256(row["set"].encode()).digest()[0] % 2] for row in tally.rows])
    T = [fit_temperature(odds[(half != side) & (tally.kind < 2)]) for side in (0, 1)]
    weight = np.where(known, np.exp(own), np.exp(own[known]).mean())  # where it is not known: the usual one
    out, said = {}, tally.kind < 2
    for name, votes in (("confidence-weighted", (1 - 2 * tally.kind) * weight),
                        ("calibrated", np.tanh(odds / np.take(T, half) / 2))):  # 2 sigmoid(z / T) - 1
        lead = np.where(said, votes, 0).sum(1).round(12)
        out[f"{name}@{tally.n}"] = np.where(said.any(1), (1 + np.sign(lead)) / 2, 0)[None]
    return out, T


def scored(values, rows, weights):
    """A line (V, R), with rows counted so many times, (W, R) -> {column: (W,)} in percent: overall, Acc+, groups and their macro."""
    right, sets, published = values.mean(0), defaultdict(list), PUBLISHED.get(rows[0]["bench"], {})
    share = lambda right: 100 * (weights @ np.nan_to_num(right)) / (weights @ ~np.isnan(right))  # a row that is NaN does not count
    for i, row in enumerate(rows):
        sets[row["set"]].append(i)
    with np.errstate(invalid="ignore", divide="ignore"):
        out = {"overall": share(right)}
        if len(sets) < len(rows):  # a set is right if all its rows are; the first one stands for it, all having the same weight
            plus = np.full(len(rows), np.nan)
            plus[[its[0] for its in sets.values()]] = [values[:, its].prod(1).mean() for its in sets.values()]
            out["Acc+"] = share(plus)
        for grouping in rows[0]["groups"]:
            of = np.array([row["groups"][grouping] for row in rows])
            names = dict.fromkeys([*published.get(grouping, ()), *sorted(set(of.tolist()))])
            parts = {g: share(np.where(of == g, right, np.nan)) for g in names}
            counted = [p for g, p in parts.items() if g in published.get(grouping, parts) and not np.isnan(p[0])]  # toxicity is in none
            out[f"{grouping}: macro"] = np.mean(counted, 0) if counted else np.full(len(weights), np.nan)
            out |= {f"{grouping}: {g}": p for g, p in parts.items()}
    return out


def resamples(rows, times=1000, seed=0):
    """(1 + times, R) weights: first the rows as they are, then as many sets of rows drawn with putting back."""
    number = {}
    index = [number.setdefault(row["set"], len(number)) for row in rows]
    drawn = np.random.default_rng(seed).multinomial(len(number), [1 / len(number)] * len(number), times)
    return np.concatenate([np.ones((1, len(rows))), drawn[:, index]])


def interval(values):
    """[value, low, high] at 95 %, of the rows as they are and resampled."""
    found = (values[0], *np.nanpercentile(values[1:], (2.5, 97.5))) if not np.isnan(values[0]) else ()
    return [round(float(v), 3) for v in found] or [None] * 3


def about(tally):
    """What stands below a table: {name: number}, shares in percent."""
    share = lambda flags: round(100 * float(np.mean(flags)), 2) if len(flags) else None
    said, verdict = [j for its in tally.used for j in its], tally.kind < 2
    with np.errstate(invalid="ignore"):
        a, b = (tally.counts[:, :, 0] / tally.counts[:, :, :2].sum(-1)).T  # right, of the verdicts, in either place
    flips = (a * (1 - b) + b * (1 - a))[~np.isnan(a + b)]
    out = {"rows": len(tally.rows), "rows left out, not judged to the end": tally.missing, "judgements": len(said),
           "says 1": share((tally.kind == tally.place)[verdict]), "flips with the order": share(flips),
           "no verdict": share(~verdict), "truncated": share([j["finish"] == "length" for j in said]),
           "doubts itself": share([bool(DOUBTS.search(j["text"])) for j in said]),
           "tokens a judgement": round(float(np.mean([j["tokens"] for j in said])), 1),
           "verdicts without log-probability": int((verdict & (tally.right == -math.inf) & (tally.wrong == -math.inf)).sum())}
    if tally.n > 2:
        out["tied votes"] = share(tally.chances(tally.n)[..., 1].mean(0))
        out["tokens of all samples"] = round(float(tally.tokens.sum() / len(tally.rows)), 1)
    if tally.stops is not None:
        _, samples, tokens = tally.stops.mean((0, 1))
        out |= {"early stopping: samples": round(float(samples), 3), "early stopping: tokens": round(float(tokens), 3)}
    if tally.T:
        out["calibration T, of either half"] = [round(t, 3) for t in tally.T]
    return out


def evaluate(bench, rows, done, args):
    """Every number of one benchmark, and what compare() takes: (its rows, its lines)."""
    tally = Tally(rows, done, args)
    result = {"check": check_data(bench, rows), "about": {"rows": 0, "rows left out, not judged to the end": tally.missing},
              "groups": {g: dict(Counter(row["groups"][g] for row in tally.rows)) for g in rows[0]["groups"]},
              "lines": {}, "scaling": {}}
    if not tally.rows:
        return result, ([], {})
    weights, values = resamples(tally.rows), lines(tally, args)
    result["lines"] = {name: {c: interval(v) for c, v in scored(line, tally.rows, weights).items()} for name, line in values.items()}
    result["about"] = about(tally)
    overall = lambda line: interval(scored(line, tally.rows, weights)["overall"])
    for k in range(1, tally.n + 1) if tally.n > 2 else ():
        at = tally.chances(k)
        result["scaling"][k] = {"any of a coin": 100 * (1 - 0.5**k), "vote": overall(at[..., 0]), "any": overall(at[..., 2])}
    return result, (tally.rows, values)


def compare(mine, other):
    """Paired bootstrap on the rows that both runs have: {line: {"rows": n, column: [mine - other in points, low, high, p]}}."""
    theirs = {(row["row"], content(row)): i for i, row in enumerate(other[0])}
    both = [(i, theirs[at]) for i, row in enumerate(mine[0]) if (at := (row["row"], content(row))) in theirs]
    if not both:
        return {}
    rows, out = [mine[0][i] for i, _ in both], {}
    weights = resamples(rows)
    p = lambda d: max(0.001, min(1.0, 2 * float(min((d <= 0).mean(), (d >= 0).mean()))))  # two-sided
    for name in [name for name in mine[1] if name in other[1] and name not in TRIVIAL]:
        a, b = (scored(run[1][name][:, list(at)], rows, weights) for run, at in zip((mine, other), zip(*both)))
        out[name] = {"rows": len(rows)} | {c: [*interval(a[c] - b[c]), p(a[c][1:] - b[c][1:])] for c in a}
    return out


# ---------------------------------------------------------------------------------------------------
# Output: the table, the figure, the pages

FIRST, OWN = "better answer always first", "benchmark's protocol"
PAPER = {  # bench: (columns, {(line, protocol): percent in the order of the columns}); R1-Reward and the best of the others
    "VL-RewardBench": (("overall", "paper: macro", "paper: general", "paper: hallucination", "paper: reasoning",
                        "benchmark: macro", "benchmark: general", "benchmark: hallucination", "benchmark: reasoning"), {
        ("R1-Reward", FIRST): (71.92, 71.44, 63.84, 85.71, 64.78),
        ("R1-Reward, voting@15", FIRST): (76.46, 76.36, 66.32, 89.06, 73.70),
        ("Gemini-1.5-Pro", OWN): (67.20, None, None, None, None, 62.50, 50.80, 72.50, 64.20)}),
    "Multimodal-RewardBench": (("columns: macro", *(f"columns: {g}" for g in PUBLISHED["Multimodal-RewardBench"]["columns"])), {
        ("R1-Reward", FIRST): (82.2, 77.5, 74.0, 74.9, 83.1, 79.6, 99.6, 86.5),
        ("R1-Reward, voting@15", FIRST): (83.3, 78.0, 77.2, 74.6, 81.3, 85.8, 99.4, 87.0),
        ("Gemini 1.5 Pro", OWN): (71.9, 63.5, 67.7, 66.3, 68.9, 55.5, 94.5, 87.2)}),
    "MM-RLHF-RewardBench": (("overall", "Acc+", *(f"category: {g}" for g in PUBLISHED["MM-RLHF-RewardBench"]["category"])), {
        ("R1-Reward", FIRST): (80.59, 54.35, 80.95, 89.19, 82.35, 75.00, 72.00),
        ("R1-Reward, voting@15", FIRST): (86.47, 67.39, 83.33, 97.30, 91.18, 78.12, 80.00),
        ("Claude-3.7-Sonnet", "order not stated"): (82.35, 65.22, 66.67, 91.89, 91.18, 87.50, 76.00)})}


def table(results):
    """results.json -> Markdown."""
    args = results["args"]
    out = [f"# {args['scores'] or args['model']}", ""]
    cell = lambda c, v: "" if v[0] is None else f"{v[0]:.2f}" + (f" [{v[1]:.2f}, {v[2]:.2f}]" if c in ("overall", "Acc+") else "")
    for bench, r in results["benches"].items():
        made = f"{args['samples']} judgements a row at temperature {args['temperature']:g}"
        out += [f"## {bench}: {r['about']['rows']} rows, {made}, orders: {args['orders']}", ""]
        if args["orders"] == "chosen_first":
            out += ["**WARNING: the better answer is always shown first. A model that always says 1 has 100 % here (line `always 1`); "
                    "with --orders both it has 50 %.**", ""]
        if not r["lines"]:
            out += ["No row has all its judgements yet.", ""]
            continue
        columns = list(next(iter(r["lines"].values())))
        count = {f"{grouping}: {g}": f" ({n})" for grouping, groups in r["groups"].items() for g, n in groups.items()}
        body = [[name, *(cell(c, values[c]) for c in columns)] for name, values in r["lines"].items()]
        names, published = PAPER.get(bench, ((), {}))
        for (name, protocol), numbers in published.items():
            there = {c: f"{v:.2f}" for c, v in zip(names, numbers) if v is not None}
            body.append([f"*{name} (in the paper; {protocol})*", *(there.get(c, "") for c in columns)])
        below = "; ".join(f"{k}: {v}" for k, v in r["about"].items() if v is not None)
        out += [markdown(["", *(c + count.get(c, "") for c in columns)], body) + f"Percent, with 95 % intervals over rows. {below}.", ""]
        out += [f"- {note}" for note in r["check"]]
        for name, d in r.get("compared", {}).items():
            change, low, high, p = d["overall"]
            gain = f"{change:+.2f} points [{low:+.2f}, {high:+.2f}], p = {p:.3g}"
            out.append(f"- {name}, against {args['compare']}: {gain}, on {d['rows']} rows")
        out.append("")
    return "\n".join(out)


def figure(results, path):
    """Figure 3: vote and any against the number of samples, a panel a benchmark."""
    from matplotlib.figure import Figure
    panels = {bench: r["scaling"] for bench, r in results["benches"].items() if r["scaling"]}
    if not panels:
        return
    fig = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    for axis, (bench, scaling) in zip(fig.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for name, colour in (("vote", "#1f5fa8"), ("any", "#b8602a")):
            value, low, high = zip(*(at[name] for at in scaling.values()))
            axis.plot(list(scaling), value, "o-", color=colour, markersize=3, label=name)
            axis.fill_between(list(scaling), low, high, color=colour, alpha=0.15, linewidth=0)
        axis.plot(list(scaling), [at["any of a coin"] for at in scaling.values()], ":", color="grey", label="any, of a coin")
        axis.set(title=bench, xlabel="samples a row", ylabel="overall accuracy, %")
        axis.xaxis.get_major_locator().set_params(integer=True)
    fig.axes[0].legend(frameon=False)
    fig.savefig(path, dpi=150)


def page(path, title, items, blind):
    """One HTML file that needs no network: evaluate.html with the items in it. blind: the page of the vote."""
    text = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    data = json.dumps({"title": title, "blind": blind, "items": items}).replace("<", "\\u003c")  # no text ends the script
    text = text.replace("<title></title>", f"<title>{html.escape(title)}</title>").replace("/*DATA*/null", data)
    Path(path).write_text(text, encoding="utf-8")


def shown(row):
    """A row's pictures as a page holds them: reduced, and inside the page. They may be gone from a run that is scored again."""
    return [data_url(path, 400 * 400, quality=75) for path in row["images"] + (row["video"] or []) if os.path.isfile(path)]


def page_items(benches, done, limit):
    """The first rows of each benchmark that have judgements, as page.html shows them."""
    judged, items = defaultdict(list), []
    for at in sorted(done):
        judged[at[:2]].append(done[at] | {"again": bool(DOUBTS.search(done[at]["text"]))})
    for rows in benches.values():
        for row in [row for row in rows if address(row) in judged][:limit]:
            items.append({k: row[k] for k in ("bench", "row", "id", "question", "responses", "choice")} | {
                "group": " / ".join(row["groups"].values()), "images": shown(row), "judgements": judged[address(row)]})
    return items


def blind_vote(benches, done, other, args):
    """C.7: ab.html has the reasonings of two runs side by side without verdicts, sides drawn at random; ab_key.json says which is ours."""
    rng, items, key = random.Random(f"{args.seed} vote"), [], []
    reasoning = lambda j: parse(j["text"]).think or j["text"].split("<answer>")[0]
    rows = {address(row): row for its in benches.values() for row in its}
    shared = [at for at in sorted(done.keys() & other.keys()) if at[:2] in rows]
    rng.shuffle(shared)
    for number, at in enumerate(list({at[:2]: at for at in shared}.values())[:args.page]):  # one judgement a row
        row, ours = rows[at[:2]], rng.choice(("left", "right"))
        sides = [reasoning(run[at]) for run in ((done, other) if ours == "left" else (other, done))]
        items.append({"item": number, "question": row["question"], "responses": row["responses"][::-1 if at[2] else 1],
                      "images": shown(row), "sides": sides})
        key.append(ours)
    if not items:
        raise Unusable("--ab: the two runs share no judgement; legal: runs on the same benchmarks, in the same orders")
    page(Path(args.out, "ab.html"), "Which reasoning is better?", items, blind=True)
    Path(args.out, "ab_key.json").write_text(json.dumps(key))


def tally_votes(key, files):
    """Table 9: {file: (win, loss, tie in percent, votes)}, and of the majority of all files on each item; no majority is a tie."""
    everyone, out = defaultdict(list), {}
    share = lambda said: (*(round(100 * said.count(v) / max(1, len(said)), 1) for v in ("win", "loss", "tie")), len(said))
    for path in files:
        votes = json.loads(Path(path).read_text())["votes"]
        bad = [f"{i}: {v}" for i, v in votes.items() if not (i.isdecimal() and int(i) < len(key) and v in ("left", "right", "tie"))]
        if bad:
            raise Unusable(f"{path}: vote {bad[0]}; legal: left, right or tie, on items 0 to {len(key) - 1}, as ab.html saves them")
        said = {i: "tie" if v == "tie" else "win" if v == key[int(i)] else "loss" for i, v in votes.items()}
        out[str(path)] = share(list(said.values()))
        for i, v in said.items():
            everyone[i].append(v)
    majority = lambda said: next((v for v in ("win", "loss") if said.count(v) * 2 > len(said)), "tie")
    return out | {"majority": share([majority(said) for said in everyone.values()])}


# ---------------------------------------------------------------------------------------------------
# Flags, and the run


def bench_file(text):
    name, _, path = text.partition("=")
    if name not in (*BENCHMARKS, "pairs") or not path:
        raise argparse.ArgumentTypeError(f"{text!r}; legal: NAME=PATH, NAME one of {', '.join(BENCHMARKS)}, pairs")
    return name, path


def parser():
    p = command_line(__doc__)
    add = p.add_argument_group("data").add_argument
    add("--bench", nargs="+", type=bench_file, default=[], metavar="NAME=PATH",
        help=f"files or folders as their authors give them; {', '.join(BENCHMARKS)}, pairs; none = those of the run in --out")
    add("--limit", type=at_least(1), help="the first so many rows of each benchmark; none = all")
    add("--group", default="source", help="the field of a file of pairs whose values are the columns of its table")
    add = p.add_argument_group("model").add_argument
    add("--model", default="out/rl", help="folder or name on the hub, of a judge or with a reward head of sft.py; a server's name")
    add("--base_url", help="an OpenAI-compatible server; none = vLLM in this process")
    add("--scores", metavar="FILE", help="rewards made elsewhere instead: JSON lines of bench, row, scores of both responses")
    add("--concurrency", type=at_least(1), default=32, help="requests to a server at a time")
    add = p.add_argument_group("judgements").add_argument
    add("--orders", choices=("both", "dataset", "chosen_first"), help="half of the samples in each order (default), or all as the file "
        "lists the answers, or all with the better answer first (the released protocol)")
    add("--samples", type=at_least(1), help="samples a row, over both orders together; default 16; 15 and 16 in the paper")
    add("--temperature", type=at_least(0, float), default=1.0, help="1 in C.5; 0 = greedy, the paper's main results: one sample an order")
    add("--max_new_tokens", type=at_least(1), default=4096, help="of a judgement; longer ones are truncated, which is counted")
    add("--max_pixels", type=at_least(1), help="of an image or a frame; larger ones are reduced; none = the model's own bound")
    add("--early_stop", action="store_true", help="a row ends after three equal answers in a row, at most --samples (C.10)")
    add("--seed", type=int, default=0, help="of the samples, each row, order and sample having its own, and of the vote's page")
    add = p.add_argument_group("output").add_argument
    add("--out", required=True, help="folder; a run that was killed goes on from what stands there")
    add("--score_only", action="store_true", help="no model: the numbers of what stands in --out")
    add("--compare", metavar="OUT", help="another run's folder: differences with intervals and p, by paired bootstrap")
    add("--page", type=at_least(0), default=200, help="rows of each benchmark on page.html, and of the vote in all; 0 = no page")
    add("--ab", metavar="OUT", help="another run's folder: write ab.html, on which people vote between the two, blind")
    add("--tally", nargs="+", metavar="VOTES", help="files saved from ab.html: print Table 9")
    add = p.add_argument_group("system").add_argument
    add("--context", type=at_least(1), default=16384, help="tokens of prompt and judgement together, for vLLM")
    add("--tensor_parallel", type=at_least(1), default=1, help="GPUs that share one copy of the model")
    return p


def check_args(args):
    """Fills in what follows from other flags or, without a model, from the run; stops at what would mislead after hours."""
    if args.score_only and args.bench:
        raise Unusable("--score_only takes the rows that the run in --out kept; leave --bench out")
    if args.score_only and Path(args.out, "config.json").is_file():
        made = json.loads(Path(args.out, "config.json").read_text())
        vars(args).update({k: made[k] for k in MADE_BY}, samples=args.samples or made["samples"], orders=args.orders or made["orders"])
    args.orders = args.orders or "both"
    orders = 2 if args.orders == "both" else 1
    if args.scores or has_head(args):
        args.samples, args.temperature, args.early_stop = orders, 0.0, False  # a reward has no samples
    args.samples = args.samples or (orders if args.temperature == 0 else 16)
    if args.samples % orders:
        raise Unusable(f"--samples {args.samples}; legal with --orders both: an even number, half in each order")
    if args.temperature == 0 and args.samples > orders:
        raise Unusable(f"--samples {args.samples}: at --temperature 0 all samples of an order are the same; legal: {orders}")
    return args


def meet(rank, world):
    """Waits until every rank is here. In torchrun's own store, since ranks may be hours apart, which no process group bears."""
    from datetime import timedelta
    from torch.distributed import TCPStore
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    store.set(f"evaluated/{rank}", "yes")
    store.wait([f"evaluated/{r}" for r in range(world)], timedelta(days=30))


def run(args):
    rank, world, out = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    # 1. rows, and what has been judged before
    benches = read_rows(args)
    done = read_judgements(out)

    # 2. the judgements that are not there yet, each written as it comes
    if not args.score_only:
        settle(args, benches, done, rank)
        mine = [row for i, row in enumerate(row for rows in benches.values() for row in rows) if i % world == rank]
        if any(due(row, done, args) for row in mine):
            journal = Journal(out, rank)  # before the model: a folder in use is told at once
            collect(mine, backend(args), done, args, journal.write)
        if world > 1:
            meet(rank, world)
        if rank > 0:
            return
        done = read_judgements(out)

    # 3. scores
    found = {bench: evaluate(bench, rows, done, args) for bench, rows in benches.items()}
    if args.compare:
        theirs = check_args(parser().parse_args(["--score_only", "--out", args.compare]))
        if theirs.orders != args.orders:
            raise Unusable(f"--compare {args.compare}: its orders are {theirs.orders}, here {args.orders}; legal: runs in the same orders")
        others = read_judgements(args.compare)
        for bench, rows in read_rows(theirs).items():
            if bench in found:
                result, ours = found[bench]
                result["compared"] = compare(ours, evaluate(bench, rows, others, theirs)[1])
    results = {"args": vars(args), "benches": {bench: result for bench, (result, _) in found.items()}}

    # 4. results.json, table.md, scaling.png, page.html, ab.html
    (out / "results.json").write_text(json.dumps(results, indent=1))
    (out / "table.md").write_text(text := table(results))
    print(text)
    figure(results, out / "scaling.png")
    if args.page:
        page(out / "page.html", f"{args.scores or args.model}: judgements", page_items(benches, done, args.page), blind=False)
    if args.ab:
        blind_vote(benches, done, read_judgements(args.ab), args)


def main(words=None):
    args = parser().parse_args(words)
    try:
        if not args.tally:
            return run(check_args(args))
        key = Path(args.out, "ab_key.json")
        if not key.is_file():
            raise Unusable(f"{key}: no such file; legal: the --out that --ab was run with")
        for who, (win, loss, tie, n) in tally_votes(json.loads(key.read_text()), args.tally).items():
            print(f"{who}: win {win} %, loss {loss} %, tie {tie} % of {n}")
    except (Unusable, FileNotFoundError) as problem:
        raise SystemExit(f"evaluate.py: {problem}") from None


if __name__ == "__main__":
    main()
