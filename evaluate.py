"""
Stage 4: three benchmarks in both answer orders, and every kind of test-time scaling from one file of samples (section 4, C.4-C.7, C.10).

    benchmarks -> rows -> judgements (a model, an endpoint, or rewards made elsewhere) -> results.json, table.md, scaling.png, page.html

The better answer is shown first in half of the judgements and second in the other half, so a model that always says 1 scores
50 %. Each judgement is appended to a file as it comes: a killed run goes on where it stood, and every number comes from that
file, without a model. Reproduces Tables 3, 4, 8, 9 and 12 and Figure 3.

Differs from the paper's evaluation and from its released code:
1) both orders (released: the better answer is always first); --orders chosen_first is that protocol, and its table warns
2) no verdict is wrong, and counted (released: counted as a 2; in its VL-RewardBench scorer taken out of the denominator)
3) VL-RewardBench's hallucination group is found in any case of letters, 183/749/318 rows; the paper's own, 484/448/318, stand beside it
4) rows are known by their number: ids repeat (released: resuming skips the second row of an id)
5) a video's frames are in the order of their names (released: in that of the directory)
6) voting and "any" are exact expectations over all subsets of the samples, with half of the samples in each order, not one draw
Where the paper is silent:
7) a tied vote is a coin, one half; no vote at all is wrong
8) early stopping takes the orders in turn; an unparsed sample costs, breaks the run and has no vote
9) calibrated weighting (the paper's future work): votes sigmoid(log-odds / T) - 1/2, T fitted by likelihood on the other half of the rows

The toy, on two CPU cores:
$ python evaluate.py @toy/evaluate.args --model out/toy/rl --out out/toy/eval
A GPU, then four of them (not yet run at this scale):
$ python evaluate.py --model out/rl --out out/eval --bench VL-RewardBench=data/VL-RewardBench/data/test-00000-of-00001.parquet
$ torchrun --nproc_per_node=4 evaluate.py --model out/rl --out out/eval --bench VL-RewardBench=data/VL.parquet MM-RLHF-RewardBench=data/MM.jsonl
One judgement in each order, by a model behind an endpoint (its key in OPENAI_API_KEY); then the numbers again, without any model:
$ python evaluate.py --base_url http://127.0.0.1:8000/v1 --model NAME --n 2 --out out/other --bench pairs=data/dev.jsonl
$ python evaluate.py --score_only --out out/eval --compare out/other
Two runs side by side for people to vote on, blind (C.7), and what they said:
$ python evaluate.py --score_only --out out/eval --ab out/other
$ python evaluate.py --score_only --out out/eval --tally votes-a.json votes-b.json
"""
import argparse
import base64
import fcntl
import hashlib
import html
import io
import json
import math
import os
import random
import re
import shlex
import time
from collections import Counter, defaultdict, deque, namedtuple
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path

from annotate import JUDGING_PROMPT, check_pair, messages, read_pairs
from stable_reinforce import parse

# ---------------------------------------------------------------------------------------------------
# Benchmarks -> rows. A row is a pair (see annotate.py) with bench, row, groups {grouping: group} and set, the rows judged together.

class Record(dict):
    """A row of a file that says where it stands when a field is missing."""

    def __missing__(self, field):
        raise ValueError(f"{self.where} has no {field!r}; it has {', '.join(map(str, self))}")

def records(path):
    """The rows of a .parquet, a .jsonl, or a .json with one list."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; legal: a .parquet, .jsonl or .json file in the benchmark's own format")
    if str(path).endswith(".parquet"):
        import pyarrow.parquet as pq
        rows = pq.read_table(path).to_pylist()
    else:
        text = Path(path).read_text(encoding="utf-8")
        try:  # a line at a time, so that an error has its line
            rows = json.loads(text) if str(path).endswith(".json") else [json.loads(line) for line in text.splitlines()]
        except ValueError as problem:
            broken = next((i for i, line in enumerate(text.splitlines(), 1) if not is_json(line)), "?")
            raise ValueError(f"{path}, line {broken} is no JSON ({problem})") from None
    for number, row in enumerate(rows):
        record = Record(row)
        record.where = f"{path}, row {number}"
        yield record

def is_json(line):
    try:
        return bool(json.loads(line)) or True
    except ValueError:
        return False

def make_row(bench, record, id, question, media, responses, choice, groups, together=None):
    """A row, checked as a pair is; only an empty response is legal here: a benchmark's rows are not ours to drop."""
    row = {"id": str(id), "source": bench, "question": question, **media, "responses": responses, "choice": choice,
           "attempts": None, "annotation": None}
    check_pair(row | {"responses": [r if r != "" else "-" for r in responses]}, record.where)
    return row | {"groups": groups, "set": together}

def image_or_frames(path, record):
    """The media of a record with `image`, a file, or `video`, a folder of frames; both beside the benchmark's file."""
    if record.get("video"):
        folder = Path(path).parent / record["video"]
        frames = sorted(p for p in folder.iterdir() if not p.name.startswith(".")) if folder.is_dir() else []
        if not frames:
            raise FileNotFoundError(f"{record.where}: no frames in {folder}; legal: a folder of images")
        return {"images": [], "video": [str(p) for p in frames]}  # deviation 5
    return {"images": [str(Path(path).parent / record["image"])] if record.get("image") else [], "video": None}

def vl_reward_bench_group(id, any_case=True):
    """
    The group that an id's first word tells.

    >>> vl_reward_bench_group("RLAIF-V-12"), vl_reward_bench_group("RLAIF-V-12", any_case=False)    # deviation 3
    ('hallucination', 'general')
    """
    word = re.split("[-_]", id)[0]
    word = word.lower() if any_case else word
    return "hallucination" if word in ("rlaif", "rlhf", "hallucination") else "reasoning" if word in ("mathverse", "mmmu") else "general"

def vl_reward_bench(path, media):
    """The hub's parquet (query, response, human_ranking, image inside), or the released JSONL (prompt, chosen, rejected, image)."""
    for number, r in enumerate(records(path)):
        id = str(r["id"])
        groups = {"benchmark": vl_reward_bench_group(id), "paper": vl_reward_bench_group(id, any_case=False)}
        if "chosen" in r:
            yield make_row("VL-RewardBench", r, id, r["prompt"], image_or_frames(path, r), [r["chosen"], r["rejected"]], 1, groups)
            continue
        file, ranking = Path(media, f"{number}{Path(r['image']['path'] or '').suffix or '.png'}"), r["human_ranking"]
        if ranking not in ([0, 1], [1, 0]):
            raise ValueError(f"{r.where}: 'human_ranking' is {ranking}; legal: [0, 1], the first is better, or [1, 0]")
        if not file.exists():  # pictures inside the table are written out once
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_name(f"{os.getpid()}.part")
            part.write_bytes(r["image"]["bytes"])
            part.rename(file)
        yield make_row("VL-RewardBench", r, id, r["query"], {"images": [str(file)], "video": None}, r["response"], ranking[0] + 1, groups)

def multimodal_reward_bench(path, media):
    """all_data.json as the benchmark's own script joins it: ID, Text, Image, Output1, Output2, Better, Category."""
    names = {"open_generation/correctness_task": "correctness", "open_generation/preference_task": "preference",
             "knowledge": "knowledge", "reasoning": "reasoning", "safety": "safety", "vqa": "vqa"}
    for r in records(path):
        id, better = str(r["ID"]), r["Better"]
        if r["Category"] not in names or better not in ("Output1", "Output2"):
            raise ValueError(f"{r.where}: 'Category' is {r['Category']!r}, 'Better' {better!r}; legal: {', '.join(names)}; Output1, Output2")
        column = names[r["Category"]]
        if column == "reasoning":
            column = "math" if id.lower().startswith("math") else "coding"
        if column == "safety" and not id.lower().startswith("pairs"):
            column = "toxicity"  # not in the paper's seven columns
        media = {"images": [str(Path(path).parent / r["Image"])] if r["Image"] else [], "video": None}
        yield make_row("Multimodal-RewardBench", r, id, r["Text"], media, [r["Output1"], r["Output2"]], int(better[-1]), {"columns": column})

def mm_rlhf_reward_bench(path, media):
    """JSONL: id, image or video, prompt, chosen, rejected. All rows of an id are pairs of the same answers: Acc+ asks for all of them."""
    for r in records(path):
        group = next((part for part in Path(r.get("image") or r["video"]).parts if part in PUBLISHED["MM-RLHF-RewardBench"]["category"]), None)
        if group is None:
            raise ValueError(f"{r.where}: no category in {r.get('image') or r['video']!r}; legal: a path with mcq, long, short, safety or video")
        yield make_row("MM-RLHF-RewardBench", r, r["id"], r["prompt"], image_or_frames(path, r), [r["chosen"], r["rejected"]], 1,
                       {"category": group}, str(r["id"]))

def pairs(path, media, group="source"):
    """Any file of pairs; its columns are the values of one field."""
    for pair in read_pairs(path):
        yield pair | {"groups": {group: str(pair.get(group))}, "set": None}

READERS = {"VL-RewardBench": vl_reward_bench, "Multimodal-RewardBench": multimodal_reward_bench,
           "MM-RLHF-RewardBench": mm_rlhf_reward_bench, "pairs": pairs}
PUBLISHED = {  # rows of each group
    "VL-RewardBench": {"benchmark": {"general": 183, "hallucination": 749, "reasoning": 318},
                       "paper": {"general": 484, "hallucination": 448, "reasoning": 318}},
    "Multimodal-RewardBench": {"columns": {"correctness": 623, "preference": 654, "knowledge": 630, "math": 514, "coding": 584,
                                           "safety": 508, "vqa": 1198}},
    "MM-RLHF-RewardBench": {"category": {"mcq": 42, "long": 37, "short": 34, "safety": 32, "video": 25}}}

def read_rows(args, folder):
    """{bench: its rows}, from the benchmarks' files or, without --bench, from what the run in the folder kept of them."""
    kept = Path(folder, "rows.jsonl")
    if not args.bench:
        if not kept.is_file():
            raise SystemExit(f"{kept}: no such file, so no run has been here; give --bench NAME=FILE, or the --out of a run")
        rows = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
        return {bench: [row for row in rows if row["bench"] == bench] for bench in dict.fromkeys(row["bench"] for row in rows)}
    benches = {}
    for name, path in args.bench:
        found = list(pairs(path, None, args.group) if name == "pairs" else READERS[name](path, Path(folder, "media", name)))
        benches[name] = [row | {"bench": name, "row": i, "set": row["set"] or str(i)} for i, row in enumerate(found)][:args.limit]
        files = [p for row in benches[name] for p in row["images"] + (row["video"] or [])]
        missing = [p for p in files if not os.path.isfile(p)]
        if missing or not found:
            raise FileNotFoundError(f"{path}: {len(missing)} of {len(files)} images are missing, the first is {missing[0]}; paths are "
                                    "relative to the benchmark's file" if found else f"{path} has no rows")
    return benches

def fits(rows):
    """
    z-score of: questions share more words with their own answers than with those of the row half the list away. Near 0 says that
    questions and answers were joined wrongly; None: there are too few words to tell.
    """
    words = lambda text: {w for w in re.findall(r"\w+", text.lower()) if len(w) > 3}
    asked, said = [words(r["question"]) for r in rows], [words(" ".join(r["responses"])) for r in rows]
    share = lambda i, j: len(asked[i] & said[j]) / max(1, len(asked[i]))
    gain = [share(i, i) - share(i, (i + len(rows) // 2) % len(rows)) for i in range(len(rows))]
    mean = sum(gain) / max(1, len(gain))
    spread = math.sqrt(sum((g - mean) ** 2 for g in gain) / max(1, len(gain) - 1))
    return mean / spread * math.sqrt(len(gain)) if spread and len(rows) >= 30 and sum(map(bool, gain)) >= 20 else None

def check_data(bench, rows):
    """What to know of a benchmark's file before its numbers are believed, as lines of text."""
    notes = []
    for grouping, published in PUBLISHED.get(bench, {}).items():
        there = Counter(row["groups"][grouping] for row in rows)
        notes.append(f"{grouping}: " + ", ".join(f"{g} {there[g]}" for g in sorted(there, key=[*published, *there].index)))
        if dict(there) != published:
            notes.append("note: the published file has " + ", ".join(f"{g} {n}" for g, n in published.items()))
    first = sum(row["choice"] == 1 for row in rows)
    if first in (0, len(rows)):
        notes.append(f"note: this file lists the {'better' if first else 'worse'} answer first in every row, so --orders dataset shows it there")
    repeated = sum(n - 1 for n in Counter((row["question"], *row["responses"], *row["images"]) for row in rows).values())
    empty = sum("" in row["responses"] for row in rows)
    notes += [f"note: {repeated} rows repeat another one"] * bool(repeated) + [f"note: {empty} rows have an empty answer"] * bool(empty)
    for kind in sorted({re.split(r"[-_\d]", row["id"])[0] for row in rows}) if bench == "Multimodal-RewardBench" else []:
        z = fits([row for row in rows if re.split(r"[-_\d]", row["id"])[0] == kind])
        if z is not None and z < 2:  # this benchmark's prompts are joined by row number to data sets that have changed since
            notes.append(f"WARNING: the {kind} questions do not seem to belong to their answers (z = {z:.1f}); join them anew")
    return notes

# ---------------------------------------------------------------------------------------------------
# The file of judgements

FIELDS = {"bench": str, "row": int, "id": str, "order": int, "sample": int, "text": str, "choice": (int, type(None)),
          "logp1": (float, type(None)), "logp2": (float, type(None)), "tokens": int, "finish": str}
where = lambda j: (j["bench"], j["row"], j["order"], j["sample"])

def read_judgements(folder):
    """{(bench, row, order, sample): judgement} of a run. A last line without its end was cut off by a kill and does not count."""
    done = {}
    for path in sorted(Path(folder).glob("judgements*.jsonl")):  # one file a rank
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
            try:
                j = json.loads(line)
                wrong = [f for f, kind in FIELDS.items() if not isinstance(j[f], kind)]
            except (ValueError, TypeError, KeyError) as problem:
                raise ValueError(f"{path}, line {number} is no judgement ({problem!r}); legal: {', '.join(FIELDS)}") from None
            if wrong or where(j) in done:
                raise ValueError(f"{path}, line {number}: " + (f"{wrong[0]!r} is {j[wrong[0]]!r}" if wrong else f"{where(j)} is there already"))
            done[where(j)] = j
    return done

class Journal:
    """The file of judgements being written: one process at a time, whole lines only, on disk as soon as they are made."""

    def __init__(self, folder, rank):
        self.file = open(Path(folder, f"judgements{f'-{rank}' if rank else ''}.jsonl"), "ab+")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SystemExit(f"{self.file.name}: another run is writing to it; wait for it, or choose another --out") from None
        self.file.seek(0)
        self.file.truncate(self.file.read().rfind(b"\n") + 1)  # half a line, left by a kill

    def write(self, judgements):
        self.file.write("".join(json.dumps(j, ensure_ascii=False) + "\n" for j in judgements).encode())
        self.file.flush()

def settle(args, benches):
    """Writes or checks config.json, what judgements depend on: two configurations never meet in one file."""
    digest = lambda *parts: hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    config = {"model": args.scores or args.model, "endpoint": args.base_url, "temperature": args.temperature, "max_new_tokens": args.max_new_tokens,
              "max_pixels": args.max_pixels, "seed": args.seed, "early_stop": args.early_stop, "prompt": digest(JUDGING_PROMPT),
              "rows": {b: [digest(r["id"], r["question"], r["responses"], r["choice"]) for r in rows] for b, rows in benches.items()}}
    path = Path(args.out, "config.json")
    if path.is_file():
        before = json.loads(path.read_text())
        differs = [f"{k} was {before.get(k)!r}, is {v!r}" for k, v in config.items() if k != "rows" and before.get(k) != v]
        for bench, now in config["rows"].items():
            then = before["rows"].setdefault(bench, now)
            n = min(len(then), len(now))  # with another --limit one is the beginning of the other
            differs += [f"{bench}: its rows have changed"] * (then[:n] != now[:n])
            before["rows"][bench] = max(then, now, key=len)
        if differs:
            raise SystemExit(f"--out {args.out} holds another run: {'; '.join(differs)}. Choose another folder, or the same settings")
        config["rows"] = before["rows"]
    for name, lines in (("config.json", [json.dumps(config)]), ("rows.jsonl", [json.dumps(r) for rows in benches.values() for r in rows])):
        part = Path(args.out, f"{name}.part")
        part.write_text("\n".join(lines) + "\n")
        part.rename(Path(args.out, name))

# ---------------------------------------------------------------------------------------------------
# Judgements: who is asked what. An `answers` takes a deque of jobs, which may grow meanwhile, and yields (job, [output, ...]) as
# each is finished. An output is a judgement without its place: text, choice, logp1, logp2, tokens, finish.

Job = namedtuple("Job", "row order first count")  # samples first .. first + count - 1 of a row in one order

def plan(row, args):
    """The (order, sample) of a row's n samples, in the order in which early stopping takes them (deviation 8)."""
    if args.orders == "both":
        return [((row["row"] + t) % 2, t // 2) for t in range(args.n)]
    return [(0 if args.orders == "dataset" else row["choice"] - 1, t) for t in range(args.n)]

def picks(row, taken, done):
    """The answers picked, 1 or 2 as the row lists them, None: no verdict; as far as judgements are there without a gap."""
    found = []
    for order, sample in taken:
        j = done.get((row["bench"], row["row"], order, sample))
        if j is None:
            break
        found.append(j["choice"] and (3 - j["choice"] if order else j["choice"]))
    return found

def stopped(found, limit, run=3):
    """
    Early stopping (C.10): the answer, once three in a row are equal or all samples are drawn; False: draw on. A tie is 1.5.

    >>> stopped([1, 2, 2], 16), stopped([1, 2, 2, 2], 16), stopped([1, 2, 1, 2], 4), stopped([None] * 4, 4)
    (False, 2, 1.5, None)
    """
    if len(found) >= run and found[-1] is not None and len(set(found[-run:])) == 1:
        return found[-1]
    if len(found) < limit:
        return False
    votes = Counter(p for p in found if p)
    return None if not votes else 1.5 if votes[1] == votes[2] else max(votes, key=votes.get)

def due(row, done, args):
    """The jobs to ask for next. With --early_stop no more samples than must be drawn whatever they say, so none is wasted."""
    ahead = [at for at in plan(row, args) if (row["bench"], row["row"], *at) not in done]
    if args.early_stop:
        found = picks(row, plan(row, args), done)
        run = next((i for i, p in enumerate(found[::-1]) if p is None or p != found[-1]), len(found))
        ahead = plan(row, args)[len(found):len(found) + 3 - min(run, 2)] if stopped(found, args.n) is False else []
    jobs = []
    for order in (0, 1):
        for sample in sorted(s for o, s in ahead if o == order):
            if jobs and jobs[-1].order == order and jobs[-1].first + jobs[-1].count == sample:
                jobs[-1] = jobs[-1]._replace(count=jobs[-1].count + 1)
            else:
                jobs.append(Job(row, order, sample, 1))
    return jobs

def collect(rows, answers, done, args, write=None):
    """Asks for every judgement of the rows that is not there yet; `done` grows, and `write` is told of each as it comes."""
    jobs, left, start, made, tokens, said = deque(), Counter(), time.monotonic(), 0, 0, 0.0  # left: samples on their way

    def more(row):
        for job in due(row, done, args):
            jobs.append(job)
            left[row["bench"], row["row"]] += job.count

    for row in rows:
        more(row)
    total = sum(left.values())
    for job, outputs in answers(jobs):
        place = {"bench": job.row["bench"], "row": job.row["row"], "id": job.row["id"], "order": job.order}
        judgements = [place | {"sample": sample} | output for sample, output in enumerate(outputs, job.first)]
        if write:
            write(judgements)
        done |= {where(j): j for j in judgements}
        left[place["bench"], place["row"]] -= len(outputs)
        if args.early_stop and not left[place["bench"], place["row"]]:
            more(job.row)
        made, tokens, spent = made + len(outputs), tokens + sum(o["tokens"] for o in outputs), time.monotonic() - start
        if write and (spent > said + 10 or not (jobs or +left)):
            said = spent
            print(f"{made} of {max(total, made)} judgements in {spent:.0f} s, {tokens / spent:.0f} tokens/s", flush=True)

def seed_of(job, seed):
    """Of a job's first sample; the next ones follow. So a sample is the same whatever it is asked together with."""
    text = json.dumps([seed, job.row["bench"], job.row["row"], job.order])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:3], "big") * 97 + job.first

def verdict_at(n, piece, text):
    """
    The index of the token that is the verdict, or None: the first digit met when walking back from the last </answer>.

    >>> said = ["<answer", ">", " ", "1", "</", "answer", ">\\n", "So 2", "."]
    >>> verdict_at(len(said), said.__getitem__, "".join(said))
    3
    """
    tail, closed = "", False
    for t in range(n - 1, -1, -1) if parse(text).choice else ():
        if closed and piece(t).strip() in ("1", "2"):
            return t
        tail = piece(t) + tail
        closed = closed or "</answer>" in tail
    return None

def engine(args):
    """The answers of a model in vLLM: images are read ahead by threads, and each is processed once for all samples of a job."""
    # The ranks of torchrun have nothing to tell each other here: each has an engine, and GPUs, of its own.
    torchrun = {k: os.environ.pop(k) for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if k in os.environ}
    if torchrun:
        first, shown = int(torchrun["LOCAL_RANK"]) * args.tensor_parallel, os.environ.get("CUDA_VISIBLE_DEVICES")
        mine = range(first, first + args.tensor_parallel)
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(shown.split(",")[i] if shown else str(i) for i in mine)
    import torch
    cpu = not torch.cuda.is_available()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if cpu:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from transformers import AutoProcessor
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from sft import read_media

    processor = AutoProcessor.from_pretrained(args.model)
    if args.max_pixels:
        processor.image_processor.size = processor.image_processor.size | {"longest_edge": args.max_pixels}
    digits = [processor.tokenizer.encode(d, add_special_tokens=False) for d in "12"]
    if any(len(d) != 1 for d in digits):
        raise SystemExit(f"--model {args.model}: its tokens of 1 and 2 are {digits}; legal: a model to which a digit is one token, as Qwen's")
    # on a CPU a seeded request whose prompt is read in pieces stops the engine
    special = dict(enforce_eager=True, dtype="float32", enable_chunked_prefill=False, max_num_batched_tokens=max(8192, args.max_model_len))
    llm = LLM(args.model, max_model_len=args.max_model_len, tensor_parallel_size=args.tensor_parallel, **(special if cpu else {})).llm_engine
    os.environ |= torchrun

    def request(job):
        turns = messages(job.row, job.order)
        images, videos, metadata = read_media(processor, turns)
        data = {"image": images} if images else {}
        data |= {"video": [(v, m | {"do_sample_frames": False}) for v, m in zip(videos, metadata)]} if videos else {}
        params = SamplingParams(n=job.count, temperature=args.temperature, max_tokens=args.max_new_tokens, seed=seed_of(job, args.seed),
                                logprob_token_ids=[d[0] for d in digits], flat_logprobs=True, output_kind=RequestOutputKind.FINAL_ONLY)
        return {"prompt": processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True), "multi_modal_data": data}, params

    def output(c):
        at = verdict_at(len(c.token_ids), lambda t: processor.tokenizer.decode([c.token_ids[t]]), c.text)
        logps = [None, None] if at is None else [float(c.logprobs[at][d[0]].logprob) for d in digits]
        return output_of(c.text, *logps, len(c.token_ids), c.finish_reason)

    def answers(jobs):
        ahead, flying, number = deque(), {}, 0
        with ThreadPoolExecutor(4) as pool:
            while jobs or ahead or flying:
                while jobs and len(ahead) < 64:
                    ahead.append((jobs[0], pool.submit(request, jobs.popleft())))
                while ahead and sum(job.count for job in flying.values()) < 512:
                    job, ready = ahead.popleft()
                    llm.add_request(str(number), *ready.result())
                    flying[str(number)], number = job, number + 1
                for finished in llm.step():
                    yield flying.pop(finished.request_id), [output(c) for c in finished.outputs]
    return answers


def output_of(text, logp1, logp2, tokens, finish):
    return {"text": text, "choice": parse(text).choice, "logp1": logp1, "logp2": logp2, "tokens": tokens,
            "finish": "length" if finish == "length" else "stop"}


def endpoint(args):
    """The answers of an OpenAI-compatible server: a request a sample, --concurrency at a time; log-probabilities if it gives them."""
    import openai

    client = openai.OpenAI(base_url=args.base_url, api_key=os.environ.get("OPENAI_API_KEY", "none"), max_retries=8, timeout=600)
    url = cache(lambda path: f"data:image/{Path(path).suffix[1:].lower().replace('jpg', 'jpeg')};base64,"
                + base64.b64encode(Path(path).read_bytes()).decode())
    extra = {"logprobs": True, "top_logprobs": 5}

    def ask(job):
        parts = messages(job.row | {"images": job.row["images"] + (job.row["video"] or []), "video": None}, job.order)[0]["content"]
        content = [{"type": "image_url", "image_url": {"url": url(p["image"])}} if p["type"] == "image" else p for p in parts]
        for attempt in range(5):
            try:
                reply = client.chat.completions.create(
                    model=args.model, messages=[{"role": "user", "content": content}], temperature=args.temperature,
                    max_completion_tokens=args.max_new_tokens, seed=seed_of(job, args.seed), **extra)
                choice = reply.choices[0]
                break
            except openai.BadRequestError as refused:
                if "logprobs" not in str(refused) or attempt == 4:
                    raise
                extra.clear()  # it has none to give
            except (openai.APIError, ValueError, AttributeError, IndexError, TypeError):  # what is no completion is asked for again
                if attempt == 4:
                    raise
        tokens = choice.logprobs.content if choice.logprobs and choice.logprobs.content else []
        text, logps = choice.message.content or "", [None, None]
        at = verdict_at(len(tokens), lambda t: tokens[t].token, text)
        for option in tokens[at].top_logprobs if at is not None else ():
            if option.token.strip() in ("1", "2") and logps[int(option.token) - 1] is None:
                logps[int(option.token) - 1] = float(option.logprob)
        return output_of(text, *logps, reply.usage.completion_tokens if reply.usage else len(tokens), choice.finish_reason)

    def answers(jobs):
        flying = {}
        with ThreadPoolExecutor(args.concurrency) as pool:
            while jobs or flying:
                while jobs and len(flying) < 2 * args.concurrency:
                    job = jobs.popleft()
                    one = job._replace(count=1)
                    flying |= {pool.submit(ask, one._replace(first=job.first + i)): one._replace(first=job.first + i) for i in range(job.count)}
                for future in wait(flying, return_when=FIRST_COMPLETED).done:
                    yield flying.pop(future), [future.result()]
    return answers


def scores(args):
    """The answers of rewards made elsewhere: JSONL of bench, row and scores, one for each response as the row lists them."""
    given = {}
    for r in records(args.scores):
        if not (isinstance(r["scores"], list) and len(r["scores"]) == 2 and all(math.isfinite(s) for s in r["scores"])):
            raise ValueError(f"{r.where}: 'scores' is {r['scores']}; legal: two finite numbers, of the first response and the second")
        given[r["bench"], r["row"]] = r["scores"]

    def answers(jobs):
        for job in jobs:
            if (at := (job.row["bench"], job.row["row"])) not in given:
                raise ValueError(f"--scores {args.scores} has nothing for row {at[1]} of {at[0]}; it has {len(given)} rows")
            yield job, [judged_by(given[at], job.order)] * job.count
    return answers


def judged_by(rewards, order):
    """The judgement that two rewards make: a softmax of them, no text; equal rewards are no verdict."""
    a, b = rewards[::-1] if order else rewards
    log_sum = max(a, b) + math.log1p(math.exp(-abs(a - b)))
    return output_of("", a - log_sum, b - log_sum, 0, "stop") | {"choice": None if a == b else 1 if a > b else 2}


# ---------------------------------------------------------------------------------------------------
# Test-time scaling: pure functions of counts. counts = ((right, wrong, none), ...), a row's samples with the better answer shown
# first, then second, or of one order alone.


@cache
def draws(right, wrong, none, k):
    """{(right, wrong): probability} among k of the samples, drawn without putting back."""
    ways = math.comb(right + wrong + none, k)
    return {(r, w): math.comb(right, r) * math.comb(wrong, w) * math.comb(none, k - r - w) / ways
            for r in range(min(right, k) + 1) for w in range(max(0, k - r - none), min(wrong, k - r) + 1)}


def halves(n, k):
    """How k samples are shared among the orders, n in each: equally; if k is odd, either has the odd one."""
    if len(n) == 1:
        return [(k,)]
    return sorted({(k // 2, k - k // 2), (k - k // 2, k // 2)})


@cache
def vote(counts, ks):
    """
    (probability that the majority of ks samples is right, probability of a tie), exact over all subsets; a tie counts one half
    (deviation 7), no vote at all is wrong.

    >>> vote(((2, 1, 0),), (3,)), vote(((1, 0, 1), (0, 1, 1)), (1, 1))
    ((1.0, 0.0), (0.375, 0.25))
    """
    margins = {(0, False): 1.0}  # (right - wrong, is there any vote)
    for (right, wrong, none), k in zip(counts, ks):
        step = defaultdict(float)
        for (margin, any_vote), p in margins.items():
            for (r, w), q in draws(right, wrong, none, k).items():
                step[margin + r - w, any_vote or r + w > 0] += p * q
        margins = step
    tie = margins.get((0, True), 0.0)
    return sum(p for (margin, _), p in margins.items() if margin > 0) + tie / 2, tie


@cache
def any_right(counts, ks):
    """
    The probability that at least one of ks samples is right. With two answers a coin has 1 - 2^-k.

    >>> any_right(((1, 3, 0),), (2,))
    0.5
    """
    return 1 - math.prod(math.comb(sum(c) - c[0], k) / math.comb(sum(c), k) for c, k in zip(counts, ks))


@cache
def early_stop(counts, start=0, limit=None, run=3):
    """
    Early stopping replayed on a row's samples in every possible sequence, the orders in turn from `start`: (probability of being
    right, ((right, wrong, none) expected to be drawn, ...)). limit = samples at most.

    >>> coin = 10**9    # samples: as good as independent ones
    >>> [round(sum(early_stop(((round(p * coin), coin - round(p * coin), 0),), limit=16)[1][0]), 2) for p in (.5, .7, .9)]
    [6.74, 5.61, 3.7]
    """
    limit = min(limit or math.inf, sum(map(sum, counts)))
    nothing = tuple((0,) * 3 for _ in counts)

    @cache
    def go_on(drawn, last, length):
        t = sum(map(sum, drawn))
        if length == run:
            return float(last == 0), nothing
        if t == limit:
            right, wrong = (sum(d[kind] for d in drawn) for kind in (0, 1))
            return (0.5 if right == wrong > 0 else float(right > wrong)), nothing
        side = (start + t) % len(counts)
        left = [n - d for n, d in zip(counts[side], drawn[side])]
        accuracy, used = 0.0, [[0.0] * 3 for _ in counts]
        for kind in (0, 1, 2):
            if left[kind]:
                p = left[kind] / sum(left)
                after = tuple(tuple(n + (s == side and k == kind) for k, n in enumerate(d)) for s, d in enumerate(drawn))
                a, more = go_on(after, kind, 0 if kind == 2 else length + 1 if kind == last else 1)
                accuracy += p * a
                used[side][kind] += p
                for s, d in enumerate(more):
                    for k, n in enumerate(d):
                        used[s][k] += p * n
        return accuracy, tuple(map(tuple, used))
    return go_on(nothing, None, 0)


def fit_temperature(log_odds):
    """The T that makes sigmoid(z / T) most likely, z being the log-odds given to the right answer; on a grid from 0.05 to 50."""
    import numpy as np

    grid = np.geomspace(0.05, 50, 200)
    z = np.asarray(log_odds)[:, None]
    return float(grid[np.logaddexp(0, -z / grid).mean(0).argmin()]) if len(z) else 1.0


# ---------------------------------------------------------------------------------------------------
# Scores. A line of a table is an array (V, R), the probability that each row is judged rightly in each of V variants (the two
# orders, say) which are averaged; NaN where there is none.


class Tally:
    """The judgements of one benchmark, by row and by the place of the better answer: 0 = shown first, 1 = second."""

    def __init__(self, rows, done, args):
        import numpy as np

        self.rows, self.missing, self.online = [], 0, []
        self.counts, self.tokens, self.votes, self.all = [], [], [], []
        for row in rows:
            taken = plan(row, args)
            found = picks(row, taken, done)
            if len(found) < len(taken) and (not args.early_stop or stopped(found, args.n) is False):
                self.missing += 1
                continue
            used = [done[row["bench"], row["row"], *at] for at in taken[:len(found)]]
            if args.early_stop:
                answer = stopped(found, args.n)
                self.online.append((0.5 if answer == 1.5 else float(answer == row["choice"]), len(used), sum(j["tokens"] for j in used)))
                used = used[:2 if args.orders == "both" else 1]  # the later ones are there because of what the earlier ones said
            counts, tokens, votes = np.zeros((2, 3), int), np.zeros((2, 3)), []
            for j in used:
                better = 3 - row["choice"] if j["order"] else row["choice"]  # the better answer's number as shown
                kind = 2 if j["choice"] is None else int(j["choice"] != better)
                counts[better - 1, kind] += 1
                tokens[better - 1, kind] += j["tokens"]
                logps = [-math.inf if p is None else p for p in (j["logp1"], j["logp2"])][::1 if better == 1 else -1]
                votes.append((kind, *logps))
            self.rows.append(row)
            self.counts.append(counts)
            self.tokens.append(tokens)
            self.votes.append(votes)
            self.all += used
        self.counts, self.tokens = np.array(self.counts).reshape(-1, 2, 3), np.array(self.tokens).reshape(-1, 2, 3)

    def sides(self, i):
        """Row i's counts, of the orders it was judged in."""
        return tuple(tuple(map(int, c)) for c in self.counts[i] if c.sum())

    def per_row(self, function, variants):
        """(V, R) of function(counts, variant) for each row."""
        import numpy as np
        return np.array([[function(self.sides(i), v) for i in range(len(self.rows))] for v in variants])


def lines(tally, args):
    """{name: (V, R)}: every way to judge, and the trivial ones."""
    import numpy as np

    R, out, both = len(tally.rows), {}, args.orders == "both"
    with np.errstate(invalid="ignore"):
        right = (tally.counts[:, :, 0] / tally.counts.sum(-1)).T  # (2, R): better first, better second
    out["one sample"] = right if both else np.nansum(right, 0, keepdims=True)
    if args.orders != "chosen_first":
        out["better answer first"], out["better answer second"] = right[:1], right[1:]
    if both:
        out["right in both orders"] = right[:1] * right[1:]
    n = tally.counts.sum((1, 2)).min() if R else 0
    if args.early_stop:
        out[f"early stopping, at most {args.n}"] = np.array([[accuracy for accuracy, _, _ in tally.online]])
    elif n > 2:
        for k in sorted({5, 15, n} & set(range(1, n + 1))):
            out[f"voting@{k}"] = tally.per_row(lambda c, ks: vote(c, ks)[0], halves(tally.sides(0), k))
        out[f"any@{n}"] = tally.per_row(any_right, halves(tally.sides(0), n))
        out[f"early stopping, at most {n}"] = tally.per_row(lambda c, start: early_stop(c, start)[0], (0, 1) if both else (0,))
        out |= weighted(tally, n)
    first = np.array([[row["choice"] == 1 for row in tally.rows]], float)
    longer = np.array([[(1 + np.sign(a - b)) / 2 for a, b in
                        (map(len, row["responses"][::1 if row["choice"] == 1 else -1]) for row in tally.rows)]])
    always = {"both": np.array([[1.0] * R, [0.0] * R]), "dataset": first, "chosen_first": first * 0 + 1}[args.orders]
    return out | {"always 1": always, "longer answer": longer, "shorter answer": 1 - longer, "coin": first * 0 + 0.5}


def weighted(tally, n):
    """Votes weighted by the verdict's probability as the model gave it, and calibrated (deviation 9)."""
    import numpy as np

    known = [math.exp(v[1 + v[0]]) for votes in tally.votes for v in votes if v[0] < 2 and v[1 + v[0]] > -math.inf]
    if not known:
        return {}
    usual = sum(known) / len(known)  # the weight of a verdict whose probability is unknown
    half = [hashlib.sha256(row["set"].encode()).digest()[0] % 2 for row in tally.rows]
    odds = lambda v: 0.0 if v[1] == v[2] == -math.inf else max(-20.0, min(20.0, v[1] - v[2]))  # towards the right answer
    fitted = [fit_temperature([odds(v) for votes, h in zip(tally.votes, half) if h != side for v in votes if v[0] < 2]) for side in (0, 1)]
    plain, calibrated = [], []
    for votes, h in zip(tally.votes, half):
        signed = [(1 - 2 * v[0]) * (math.exp(v[1 + v[0]]) if v[1 + v[0]] > -math.inf else usual) for v in votes if v[0] < 2]
        soft = [math.tanh(odds(v) / fitted[h] / 2) for v in votes if v[0] < 2]  # 2 sigmoid(z / T) - 1
        for found, into in ((signed, plain), (soft, calibrated)):
            into.append((1 + np.sign(round(sum(found), 12))) / 2 if found else 0.0)
    tally.temperatures = fitted
    return {f"confidence-weighted@{n}": np.array([plain]), f"calibrated@{n}": np.array([calibrated])}


def columns_of(bench, rows):
    """[(grouping, [group, ...])] in the published order, then others as they come."""
    return [(g, [*dict.fromkeys([*PUBLISHED.get(bench, {}).get(g, ()), *sorted({row["groups"][g] for row in rows})])])
            for g in (rows[0]["groups"] if rows else ())]


def scored(values, rows, weights):
    """A line (V, R) under rows weighted W times over, (W, R) -> {column: (W,)} in percent: overall, Acc+, each grouping's macro and groups."""
    import numpy as np

    there = ~np.isnan(values).any(0)
    mean = np.where(there, values.mean(0), 0.0)
    share = lambda chosen: 100 * (weights @ (mean * chosen)) / (weights @ chosen.astype(float)) if chosen.any() else np.full(len(weights), np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        out = {"overall": share(there)}
        sets = defaultdict(list)
        for i, row in enumerate(rows):
            sets[row["set"]].append(i)
        if len(sets) < len(rows):  # a set is right if all its rows are; within a set all weights are alike
            heads = [members[0] for members in sets.values()]
            whole = np.array([values[:, members].prod(1).mean() for members in sets.values()])
            fine = ~np.isnan(whole)
            heads = np.array(heads)[fine]
            out["Acc+"] = 100 * weights[:, heads] @ whole[fine] / weights[:, heads].sum(1)
        for grouping, groups in columns_of(rows[0]["bench"], rows):
            parts = {g: share(there & np.array([row["groups"][grouping] == g for row in rows])) for g in groups}
            inside = [p for g, p in parts.items() if g in PUBLISHED.get(rows[0]["bench"], {}).get(grouping, parts) and not np.isnan(p[0])]
            out[f"{grouping}: macro"] = np.mean(inside, 0) if inside else np.full(len(weights), np.nan)
            out |= {f"{grouping}: {g}": p for g, p in parts.items()}
    return out


def resamples(rows, times=1000, seed=0):
    """(1 + times, R) weights: first the rows as they are, then sets of rows drawn with putting back."""
    import numpy as np

    sets = {}
    index = [sets.setdefault(row["set"], len(sets)) for row in rows]
    drawn = np.random.default_rng(seed).multinomial(len(sets), [1 / len(sets)] * len(sets), times)
    return np.concatenate([np.ones((1, len(rows))), drawn[:, index]])


def interval(values):
    """[value, low, high]: the first is of the rows as they are, the rest are resampled."""
    import numpy as np
    return [round(float(v), 3) if v == v else None for v in (values[0], *np.nanpercentile(values[1:], (2.5, 97.5)))] if values[0] == values[0] else [None] * 3


AGAIN = re.compile(r"\b(wait|hold on|on second thought|let me (re|check|look again|think again)\w*|re-?(check|read|examin|consider|calculat|evaluat)\w*|"
                   r"i (made|was) (a mistake|wrong)|correct(ing)? myself)\b", re.IGNORECASE)  # C.6: the model doubts itself


def describe(tally, args):
    """What stands below a table: {name: number}, shares in percent."""
    import numpy as np

    share = lambda flags: round(100 * float(np.mean(flags)), 2) if len(flags) else None
    verdicts = [j["choice"] for j in tally.all if j["choice"]]
    with np.errstate(invalid="ignore"):
        a, b = (tally.counts[:, side, 0] / tally.counts[:, side, :2].sum(-1) for side in (0, 1))
    flips = (a * (1 - b) + b * (1 - a))[~np.isnan(a + b)]
    out = {"rows": len(tally.rows), "rows without all judgements, left out": tally.missing, "judgements": len(tally.all),
           "says 1": share([c == 1 for c in verdicts]), "flips with the order": share(flips),
           "no verdict": share([j["choice"] is None for j in tally.all]), "truncated": share([j["finish"] == "length" for j in tally.all]),
           "self-corrections": share([bool(AGAIN.search(j["text"])) for j in tally.all]),
           "tokens a judgement": round(float(np.mean([j["tokens"] for j in tally.all])), 1),
           "verdicts without log-probability": sum(j["choice"] is not None and j["logp1"] is None and j["logp2"] is None for j in tally.all)}
    n = args.n
    if args.early_stop:
        out |= {"early stopping: samples": round(float(np.mean([s for _, s, _ in tally.online])), 3),
                "early stopping: tokens": round(float(np.mean([t for _, _, t in tally.online])), 1)}
    elif n > 2:
        out["tied votes"] = share(tally.per_row(lambda c, ks: vote(c, ks)[1], halves(tally.sides(0), n)).mean(0))
        per_kind = np.divide(tally.tokens, tally.counts, out=np.zeros_like(tally.tokens), where=tally.counts > 0)  # mean length of a kind
        samples, tokens = [], []
        for i in range(len(tally.rows)):
            sides = [s for s in (0, 1) if tally.counts[i, s].sum()]
            used = np.mean([early_stop(tally.sides(i), start)[1] for start in range(len(sides))], 0)  # (sides, kinds)
            samples.append(used.sum())
            tokens.append((used * per_kind[i, sides]).sum())
        out |= {"early stopping: samples": round(float(np.mean(samples)), 3), "early stopping: tokens": round(float(np.mean(tokens)), 1),
                "all samples: tokens": round(float(tally.tokens.sum() / len(tally.rows)), 1)}
    if hasattr(tally, "temperatures"):
        out["calibration T of the two halves"] = [round(t, 3) for t in tally.temperatures]
    return out


def evaluate(bench, rows, done, args):
    """Every number of one benchmark: {"check": notes, "about": {...}, "lines": {line: {column: [value, low, high]}}, "scaling": {...}}."""
    import numpy as np

    tally = Tally(rows, done, args)
    result = {"check": check_data(bench, rows), "groups": {g: dict(Counter(row["groups"][g] for row in tally.rows)) for g, _ in columns_of(bench, rows)}}
    if not tally.rows:
        return result | {"about": {"rows": 0, "rows without all judgements, left out": tally.missing}, "lines": {}, "scaling": {}}, {}
    weights, values = resamples(tally.rows), lines(tally, args)
    result["lines"] = {name: {c: interval(v) for c, v in scored(line, tally.rows, weights).items()} for name, line in values.items()}
    result["about"], result["scaling"] = describe(tally, args), {}
    for k in range(1, args.n + 1) if args.n > 2 and not args.early_stop else ():
        ways = halves(tally.sides(0), k)
        overall = lambda f: interval(scored(tally.per_row(f, ways), tally.rows, weights)["overall"])
        result["scaling"][k] = {"vote": overall(lambda c, ks: vote(c, ks)[0]), "any": overall(any_right), "any of a coin": 100 * (1 - 0.5**k)}
    keys = [(row["bench"], row["row"], row["id"], row["choice"]) for row in tally.rows]
    return result, {name: dict(zip(keys, line.T)) for name, line in values.items()}


def compare(rows, mine, other):
    """Paired bootstrap: {line: {column: [difference in points, low, high, p]}} on the rows that both runs have, in percent."""
    import numpy as np

    out = {}
    for name in mine:
        key = lambda row: (row["bench"], row["row"], row["id"], row["choice"])
        shared = [row for row in rows if key(row) in mine[name] and key(row) in other.get(name, {})]
        if not shared or name in TRIVIAL:
            continue
        weights = resamples(shared)
        a, b = (scored(np.array([run[name][key(row)] for row in shared]).T, shared, weights) for run in (mine, other))
        out[name] = {"rows": len(shared)}
        for c in a:
            d = a[c] - b[c]
            p = min(1.0, 2 * min((d[1:] <= 0).mean(), (d[1:] >= 0).mean()))
            out[name][c] = [*interval(d), max(round(float(p), 4), 0.001)]
    return out


# ---------------------------------------------------------------------------------------------------
# The table, the figure and the page

TRIVIAL = ("always 1", "longer answer", "shorter answer", "coin")
FIRST = "paper's protocol: better answer always first"
PAPER = {  # (line, protocol, {column: percent}); R1-Reward and the best of the others
    "VL-RewardBench": [
        ("R1-Reward", FIRST, {"overall": 71.92, "paper: macro": 71.44, "paper: general": 63.84, "paper: hallucination": 85.71, "paper: reasoning": 64.78}),
        ("R1-Reward, voting@15", FIRST, {"overall": 76.46, "paper: macro": 76.36, "paper: general": 66.32, "paper: hallucination": 89.06,
                                         "paper: reasoning": 73.70}),
        ("Gemini-1.5-Pro", "benchmark's protocol", {"overall": 67.20, "benchmark: macro": 62.50, "benchmark: general": 50.80,
                                                    "benchmark: hallucination": 72.50, "benchmark: reasoning": 64.20})],
    "Multimodal-RewardBench": [
        (name, protocol, dict(zip(("columns: macro", *(f"columns: {g}" for g in PUBLISHED["Multimodal-RewardBench"]["columns"])), numbers)))
        for name, protocol, numbers in (("R1-Reward", FIRST, (82.2, 77.5, 74.0, 74.9, 83.1, 79.6, 99.6, 86.5)),
                                        ("R1-Reward, voting@15", FIRST, (83.3, 78.0, 77.2, 74.6, 81.3, 85.8, 99.4, 87.0)),
                                        ("Gemini 1.5 Pro", "benchmark's protocol", (71.9, 63.5, 67.7, 66.3, 68.9, 55.5, 94.5, 87.2)))],
    "MM-RLHF-RewardBench": [
        (name, protocol, dict(zip((*(f"category: {g}" for g in PUBLISHED["MM-RLHF-RewardBench"]["category"]), "overall", "Acc+"), numbers)))
        for name, protocol, numbers in (("R1-Reward", FIRST, (80.95, 89.19, 82.35, 75.00, 72.00, 80.59, 54.35)),
                                        ("R1-Reward, voting@15", FIRST, (83.33, 97.30, 91.18, 78.12, 80.00, 86.47, 67.39)),
                                        ("Claude-3.7-Sonnet", "order not stated", (66.67, 91.89, 91.18, 87.50, 76.00, 82.35, 65.22)))]}


def table(results):
    """results.json -> Markdown."""
    args, out = results["args"], [f"# {results['args']['scores'] or results['args']['model']}", ""]
    sampled = "rewards" if args["scores"] else f"{args['n']} samples a row at temperature {args['temperature']:g}"
    for bench, r in results["benches"].items():
        out += [f"## {bench}: {r['about']['rows']} rows, {sampled}, orders: {args['orders']}", ""]
        if args["orders"] == "chosen_first":
            out += ["**WARNING: the better answer is always shown first. A model that always says 1 has 100 % here; compare it with the line "
                    "`always 1`, and use --orders both for anything that you want to believe.**", ""]
        if not r["lines"]:
            out += ["No row has all its judgements yet.", ""]
            continue
        columns = list(next(iter(r["lines"].values())))
        count = {f"{grouping}: {g}": n for grouping, groups in r["groups"].items() for g, n in groups.items()}
        out += ["| | " + " | ".join(c + (f" ({count[c]})" if c in count else "") for c in columns) + " |", "|---|" + "---|" * len(columns)]
        number = lambda v: "" if v is None else f"{v:.2f}"
        for name, line in r["lines"].items():
            whole = lambda c: number(line[c][0]) + (f" [{number(line[c][1])}, {number(line[c][2])}]" if c in ("overall", "Acc+") and line[c][0] is not None else "")
            out.append(f"| {name} | " + " | ".join(whole(c) for c in columns) + " |")
        out += [f"| *{name} (paper; {protocol})* | " + " | ".join(number(there.get(c)) for c in columns) + " |" for name, protocol, there in PAPER.get(bench, ())]
        out += ["", "In percent, with 95 % intervals (bootstrap over rows). " + "; ".join(f"{k}: {v}" for k, v in r["about"].items() if v is not None) + "."]
        out += ["", *(f"- {note}" for note in r["check"]), ""]
        for name, differences in r.get("compared", {}).items():
            d = differences["overall"]
            out.append(f"- {name}, against {args['compare']} on {differences['rows']} shared rows: {d[0]:+.2f} points [{d[1]:+.2f}, {d[2]:+.2f}], p = {d[3]:.3g}")
        out += [""] * bool(r.get("compared"))
    return "\n".join(out)


def figure(results, path):
    """Figure 3: vote and any against the number of samples, a panel a benchmark."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = {bench: r["scaling"] for bench, r in results["benches"].items() if r["scaling"]}
    if not shown:
        return
    fig, axes = plt.subplots(1, len(shown), figsize=(4.2 * len(shown), 3.4), squeeze=False, layout="constrained")
    for axis, (bench, scaling) in zip(axes[0], shown.items()):
        ks = list(scaling)
        for name, colour in (("vote", "#1f5fa8"), ("any", "#b8602a")):
            value, low, high = zip(*(scaling[k][name] for k in ks))
            axis.plot(ks, value, "o-", color=colour, markersize=3, label=name)
            axis.fill_between(ks, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.plot(ks, [scaling[k]["any of a coin"] for k in ks], ":", color="grey", label="any, of a coin")
        axis.set(title=bench, xlabel="samples a row", ylabel="overall accuracy, %")
    axes[0][0].legend(frameon=False)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def data_url(path, side=448):
    """An image file as a page holds it: reduced, inside the page."""
    from PIL import Image

    data = io.BytesIO()
    with Image.open(path) as image:
        image = image.convert("RGB")
        image.thumbnail((side, side))
        image.save(data, "JPEG" if image.width * image.height > 128**2 else "PNG")
    return f"data:image/{'jpeg' if data.getvalue()[:2] == bytes((255, 216)) else 'png'};base64,{base64.b64encode(data.getvalue()).decode()}"


def page(path, title, items, blind):
    """Writes one HTML file that needs no network: evaluate.html with the items in it. blind: the page of the A/B vote."""
    text = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    data = json.dumps({"title": title, "blind": blind, "items": items}, ensure_ascii=False).replace("<", "\\u003c")
    Path(path).write_text(text.replace("<title></title>", f"<title>{html.escape(title)}</title>").replace("/*DATA*/null", data), encoding="utf-8")


def page_items(rows, done, limit):
    """What the page shows of the first rows of each benchmark that have judgements."""
    judged, items = defaultdict(list), []
    for j in done.values():
        judged[j["bench"], j["row"]].append(j)
    for bench, its in rows.items():
        for row in [row for row in its if (bench, row["row"]) in judged][:limit]:
            fields = {k: row[k] for k in ("bench", "row", "id", "question", "responses", "choice")}
            said = [{k: j[k] for k in ("order", "sample", "text", "choice", "finish")} | {"again": bool(AGAIN.search(j["text"]))}
                    for j in sorted(judged[bench, row["row"]], key=where)]
            items.append(fields | {"group": " / ".join(row["groups"].values()), "images": shown(row), "judgements": said})
    return items


def shown(row):
    return [data_url(p) for p in row["images"] + (row["video"] or []) if os.path.isfile(p)]


def blind_vote(rows, done, other, limit, seed, folder):
    """C.7: ab.html with the reasonings of two runs side by side, without verdicts, sides drawn at random; ab_key.json says who is where."""
    rng, items, key = random.Random(f"{seed} ab"), [], {}
    reasoning = lambda j: parse(j["text"]).think or j["text"].split("<answer>")[0]
    both = [(row, at) for its in rows.values() for row in its for at in ((row["bench"], row["row"], o, 0) for o in (0, 1)) if at in done and at in other]
    rng.shuffle(both)
    first = {at[:2]: (row, at) for row, at in both}  # one judgement a row
    for number, (row, at) in enumerate(list(first.values())[:limit]):
        ours_left = rng.random() < 0.5
        sides = [reasoning(run[at]) for run in ((done, other) if ours_left else (other, done))]
        responses = row["responses"][::-1] if at[2] else row["responses"]
        items.append({"item": number, "question": row["question"], "responses": responses, "images": shown(row), "sides": sides})
        key[number] = "left" if ours_left else "right"
    if not items:
        raise SystemExit("--ab: the two runs share no judgement; they must be of the same benchmarks and orders")
    page(Path(folder, "ab.html"), "Which reasoning is better?", items, blind=True)
    Path(folder, "ab_key.json").write_text(json.dumps(key))


def tally_votes(key, files):
    """Table 9: {who: (win, loss, tie, votes)} in percent for each file of votes, and for the majority of them on each item; no majority is a tie."""
    key, everyone, out = json.loads(Path(key).read_text()), defaultdict(list), {}
    share = lambda said: tuple(round(100 * said.count(v) / max(1, len(said)), 1) for v in ("win", "loss", "tie")) + (len(said),)
    for path in files:
        votes = json.loads(Path(path).read_text())["votes"]
        if bad := [(i, v) for i, v in votes.items() if i not in key or v not in ("left", "right", "tie")]:
            raise ValueError(f"{path}: vote {bad[0]}; legal: an item of this run's ab.html, and left, right or tie")
        said = {i: "tie" if v == "tie" else "win" if v == key[i] else "loss" for i, v in votes.items()}
        out[str(path)] = share(list(said.values()))
        for i, v in said.items():
            everyone[i].append(v)
    majority = lambda said: next((v for v in ("win", "loss") if said.count(v) * 2 > len(said)), "tie")
    return out | {"majority": share([majority(said) for said in everyone.values()])}


# ---------------------------------------------------------------------------------------------------
# In Python

Judged = namedtuple("Judged", "choice probability votes reasoning")


class Judge:
    """
    judge = Judge("out/rl"), or Judge("NAME", base_url="http://..."); n samples a pair, half of them in each order.

    judge(question, images, answer1, answer2) -> (choice 1, 2 or None, the share of the votes for it, (votes for 1, for 2, none),
    the reasoning of a sample that came to it); judge.rank(question, images, answers) -> [(index, share of duels won), ...].
    """

    def __init__(self, model, n=2, **flags):
        words = [word for k, v in flags.items() for word in (f"--{k}", str(v))]
        self.args = parser().parse_args(["--model", str(model), "--n", str(n), "--out", os.devnull, *words])
        check_args(self.args)
        self.answers = backend(self.args)

    def judged(self, question, images, pairs):
        """{(order, sample): judgement} for each pair of answers."""
        rows = [{"bench": "", "row": i, "id": str(i), "question": question, "images": [str(p) for p in images], "video": None,
                 "responses": list(pair), "choice": 1} for i, pair in enumerate(pairs)]
        done = {}
        collect(rows, self.answers, done, self.args)
        return [[done[row["bench"], row["row"], *at] for at in plan(row, self.args)] for row in rows]

    def __call__(self, question, images, answer1, answer2):
        judgements = self.judged(question, images, [(answer1, answer2)])[0]
        found = [j["choice"] and (3 - j["choice"] if j["order"] else j["choice"]) for j in judgements]
        votes = (found.count(1), found.count(2), found.count(None))
        if votes[0] == votes[1]:  # a tie: whoever is surer; else nobody
            lean = sum((1 - 2 * j["order"]) * (j["logp1"] - j["logp2"]) for j in judgements if j["choice"] and None not in (j["logp1"], j["logp2"]))
            choice = 1 if lean > 0 else 2 if lean < 0 else None
        else:
            choice = 1 if votes[0] > votes[1] else 2
        same = sorted((j["order"], j["text"]) for j, p in zip(judgements, found) if p == choice and choice)  # as asked before swapped
        return Judged(choice, votes[choice - 1] / sum(votes) if choice else 0.0, votes, same[0][1] if same else "")

    def rank(self, question, images, answers):
        """Every answer against every other, in both orders."""
        duels = [(i, j) for i in range(len(answers)) for j in range(i)]
        won = Counter({i: 0.0 for i in range(len(answers))})
        for (i, j), judgements in zip(duels, self.judged(question, images, [(answers[i], answers[j]) for i, j in duels])):
            for said in judgements:
                first = 0.5 if said["choice"] is None else float((said["choice"] == 1) != said["order"])  # for i
                won[i] += first / len(judgements)
                won[j] += (1 - first) / len(judgements)
        return sorted(((i, w / max(1, len(answers) - 1)) for i, w in won.items()), key=lambda pair: -pair[1])


# ---------------------------------------------------------------------------------------------------


def bench_file(text):
    name, found, path = text.partition("=")
    if name not in READERS or not path:
        raise argparse.ArgumentTypeError(f"{text!r}; legal: NAME=FILE, NAME one of {', '.join(READERS)}")
    return name, path


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, fromfile_prefix_chars="@")
    p.convert_arg_line_to_args = lambda line: shlex.split(line, comments=True)  # a file of flags: several on a line, # begins a comment
    g = p.add_argument_group("data")
    g.add_argument("--bench", nargs="+", type=bench_file, default=[], metavar="NAME=FILE",
                   help=f"benchmarks and their files, each as its authors give it; {', '.join(READERS)}; none = those of the run in --out")
    g.add_argument("--limit", type=int, help="the first so many rows of each benchmark; none = all")
    g.add_argument("--group", default="source", help="the field of a file of pairs whose values are the columns of its table")
    g = p.add_argument_group("model")
    g.add_argument("--model", default="out/rl", help="folder or name on the hub; with --base_url the name that the server knows")
    g.add_argument("--base_url", help="ask an OpenAI-compatible server; none = vLLM in this process")
    g.add_argument("--scores", metavar="FILE", help="no model: rewards made elsewhere, a JSON line for each row: bench, row, scores of the two responses")
    g.add_argument("--concurrency", type=int, default=32, help="requests to a server at a time")
    g = p.add_argument_group("judgements")
    g.add_argument("--orders", default="both", choices=("both", "dataset", "chosen_first"),
                   help="half of the samples in each order, or all as the file lists the answers, or all with the better first (the released protocol)")
    g.add_argument("--n", type=int, default=16, help="samples a row, over both orders together; 15 and 16 in the paper")
    g.add_argument("--temperature", type=float, default=1.0, help="1 in C.5; 0 = greedy, the paper's main results: then one sample an order")
    g.add_argument("--max_new_tokens", type=int, default=4096, help="of a judgement; longer ones are truncated, which is counted")
    g.add_argument("--max_pixels", type=int, help="of an image; larger ones are reduced; none = the bound the model was trained with")
    g.add_argument("--early_stop", action="store_true", help="stop a row after three equal answers in a row, at most --n (C.10)")
    g.add_argument("--seed", type=int, default=0, help="of the samples; each row, order and sample has its own")
    g = p.add_argument_group("output")
    g.add_argument("--out", required=True, help="folder; a run that was killed goes on from what stands there")
    g.add_argument("--score_only", action="store_true", help="no model: the numbers of what stands in --out")
    g.add_argument("--compare", metavar="OUT", help="another run's folder: differences with intervals and p, by paired bootstrap")
    g.add_argument("--page", type=int, default=200, help="rows of each benchmark on page.html, and of the A/B vote in all; 0 = no page")
    g.add_argument("--ab", metavar="OUT", help="another run's folder: write ab.html, in which people vote between the two, blind")
    g.add_argument("--tally", nargs="+", metavar="VOTES", help="files saved from ab.html: print Table 9")
    g = p.add_argument_group("system")
    g.add_argument("--max_model_len", type=int, default=16384, help="tokens of prompt and judgement together that vLLM makes room for")
    g.add_argument("--tensor_parallel", type=int, default=1, help="GPUs that share one copy of the model")
    return p


def check_args(args):
    """Stops at what would only fail, or mislead, after hours."""
    orders = 2 if args.orders == "both" else 1
    if args.scores:
        args.n, args.temperature, args.early_stop = orders, 0.0, False  # a reward has no samples
    if args.n < orders or args.n % orders:
        raise SystemExit(f"--n {args.n}: legal with --orders {args.orders}: {'an even number' if orders == 2 else '1 or more'}, half in each order")
    if args.temperature == 0 and args.n > orders:
        raise SystemExit(f"--temperature 0 makes the same judgement {args.n // orders} times; legal: --n {orders}")
    if args.tally and not Path(args.out, "ab_key.json").is_file():
        raise SystemExit(f"--tally: {args.out} has no ab_key.json; legal: the --out that --ab was run with")


def backend(args):
    return (scores if args.scores else endpoint if args.base_url else engine)(args)


def ranks():
    """(rank, world, wait until every rank is here) under torchrun or alone. Ranks meet once, in the end, through torchrun's own store."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return 0, 1, lambda: None
    from datetime import timedelta
    from torch.distributed import TCPStore
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)

    def meet():
        store.set(f"evaluated/{rank}", "yes")
        store.wait([f"evaluated/{r}" for r in range(world)], timedelta(days=30))
    return rank, world, meet


def main():
    args = parser().parse_args()
    check_args(args)
    if args.tally:
        for who, (win, loss, tie, n) in tally_votes(Path(args.out, "ab_key.json"), args.tally).items():
            print(f"{who}: win {win} %, loss {loss} %, tie {tie} %  ({n} items)")
        return
    rank, world, meet = ranks()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    # 1. rows, and what has been judged before
    benches = read_rows(args, out)
    rows = [row for its in benches.values() for row in its]
    done = read_judgements(out)

    # 2. the judgements that are not there yet, each written as it comes
    if not args.score_only:
        settle(args, benches)
        mine = [row for i, row in enumerate(rows) if i % world == rank]
        if any(due(row, done, args) for row in mine):
            collect(mine, backend(args), done, args, Journal(out, rank).write)
        meet()
        if rank > 0:
            return
        done = read_judgements(out)

    # 3. scores
    results, values = {"args": vars(args), "benches": {}}, {}
    for bench, its in benches.items():
        results["benches"][bench], values[bench] = evaluate(bench, its, done, args)
    if args.compare:
        theirs = read_rows(argparse.Namespace(bench=[]), args.compare)
        for bench in benches.keys() & theirs.keys():
            _, other = evaluate(bench, theirs[bench], read_judgements(args.compare), args)
            results["benches"][bench]["compared"] = compare(benches[bench], values[bench], other)

    # 4. results.json, table.md, scaling.png, page.html
    (out / "results.json").write_text(json.dumps(results, indent=1))
    (out / "table.md").write_text(table(results))
    print(table(results))
    figure(results, out / "scaling.png")
    if args.page:
        page(out / "page.html", f"{args.scores or args.model}, judged", page_items(benches, done, args.page), blind=False)
    if args.ab:
        blind_vote(benches, done, read_judgements(args.ab), args.page, args.seed, out)


if __name__ == "__main__":
    main()
