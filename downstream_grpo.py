"""
Stage 5: what a reward model is for (section C.9). A smaller MLLM answers questions, the reward model compares its answers, and
GRPO trains it on who won.

    1. rollout        8 answers a prompt, sampled by vLLM from this very policy, at temperature 1, --chunk prompts at a time
    2. score          all 8 x 7 ordered pairs of a prompt's answers go to the reward model (while the next chunk is sampled)
    3. advantages     GRPO: against the other answers of the same prompt
    4. to 8.          old log-probs, update, sync, comparison of the engines: rl.py's

The reward. p_ij is the reward model's verdict for r_i when the pair is shown as (r_i, r_j): with --verdict reason 1 or 0, read
from the reasoning it writes; with --verdict token the share of "1" in the probabilities of "1" and "2" after an empty thought,
one token and no reasoning. Eq. 3 and its normalisation, which the paper does not print:

    s_ij = (p_ij + 1 - p_ji) / 2        Score(r_i) = sum over j != i of s_ij        reward = Score(r_i) / (n - 1) + w * exact match

A reward model that leans to the first place adds the same b to p_ij and to p_ji, and s_ij loses it; what sees nothing but the
place (p_ij = b always) gives every answer 1/2 a duel. s_ij + s_ji = 1: the scores of a prompt always have the same mean, and only
their spread teaches. It is logged (spread; flat: the share of prompts that teach nothing), and so is judge_right, how often
the right answer beats a wrong one.

Where the paper is silent: 1) equal answers of a prompt are one answer, judged once; between them s = 1/2; 2) a duel in which either
order has no verdict is a draw; 3) an answer that is empty or cut off loses to every whole one, unasked; 4) a batch of 256 is 256
prompts; 5) temperature 0 for the reward model. Beyond it: 6) --pairs ring|k: only neighbours on a ring of the different answers,
up to k apart, 2kn calls for n(n-1); Score is then (n - 1) times the mean over the answers that were compared. With --pairs all the log
has the rank correlation that a ring would have had; 7) --exact_weight w mixes in the ground truth; 8) --judge random and exact.

The toy: the reward model of rl.py behind a vLLM server, in another terminal; a policy that is careless, not blind (toy/careless.py):
$ VLLM_CPU_KVCACHE_SPACE=1 python -m vllm.entrypoints.openai.api_server --model out/toy/rl --dtype float32 --enforce-eager \
    --max-model-len 1024 --host 127.0.0.1 --port 8020
$ python toy/careless.py --out out/toy/careless
$ python downstream_grpo.py @toy/downstream.args
One node with 4 GPUs of 80 GB for the policy and a server on others, the paper's setting (not yet run at this scale):
$ torchrun --nproc_per_node=4 downstream_grpo.py --data 'V*=data/vstar_bench' arXivQA=data/ArxivQA ThinkLite-VL=data/ThinkLite-VL-hard-11k \
    --judge_url http://judge:8000/v1 --judge_model out/rl --judge_concurrency 256 --out out/downstream

Reads  --model (see sft.py), --data (FORMATS below: question, pictures, ground truth), the reward model behind --judge_url.
Writes --out: the model, log.jsonl (a row a step), rollouts-*.jsonl (answers, scores), curves.png, checkpoints/, images/.
"""
import argparse
import json
import math
import os
import re
import sys
from collections import Counter, namedtuple
from functools import lru_cache
from pathlib import Path

import torch

from annotate import Unanswered, Unusable, as_sent, command_line, keep, locate, messages, table_rows, turn
from judge import ConsistencyJudge, coin
from rl import (FREE, Clock, Shown, advantages_of, compare, compare_now, fitting, learn, loop_flags, means, mini_batches, of_updates,
                old_logps, prepare, rewards_or_stop, rollout, sample, seed_of, shares, validate)
from sft import Log, checkpoints, end_run, header, load_processor, reduced, resumed, save_checkpoint, setup, to_sample
from stable_reinforce import parse

# ---------------------------------------------------------------------------------------------------
# Tasks: {"id", "source", "question", "images", "video", "answer"}. A format's function makes of a row {id, question, answer, images}.


def plain(row, number, folder):
    """A file of one's own: a line has question and answer, perhaps id, image or images."""
    images = row.get("images") or row.get("image") or []
    return {"id": row.get("id", f"task-{number}"), "question": row["question"], "answer": str(row["answer"]),
            "images": images if isinstance(images, list) else [images]}


def vstar(row, number, folder):
    return {"id": f"V*-{row['question_id']}", "question": row["text"], "answer": row["label"], "images": [row["image"]]}


def arxivqa(row, number, folder):
    """The label is a letter, a letter in brackets, or the whole option; an option may lack its letter."""
    options = [o if re.match(rf"\(?{letter}[.):]", o) else f"{letter}. {o}" for letter, o in zip("ABCDEFGHIJ", row["options"])]
    said = re.match(r"[\[(]?([A-J])(?![a-zA-Z])", row["label"].strip())
    found = "ABCDEFGHIJ".index(said[1]) if said else row["options"].index(row["label"]) if row["label"] in row["options"] else len(options)
    if found >= len(options):
        return "no label"
    question = "\n".join([row["question"], *options, "Answer with the option's letter from the given choices directly."])
    return {"id": f"arXivQA-{row['id']}", "question": question, "answer": "ABCDEFGHIJ"[found], "images": [row["image"]]}


def thinklite(row, number, folder):
    question = row["problem"].replace("<image>", "").strip()
    return {"id": f"ThinkLite-VL-{row['id']}", "question": question, "answer": str(row["answer"]), "images": [row["image"]]}


FORMATS = {  # name: (what reads a row, where the rows are in the download, the fields each has)
    "tasks": (plain, ["*.jsonl"], "question answer"),
    "V*": (vstar, ["test_questions.jsonl"], "question_id text label image"),
    "arXivQA": (arxivqa, ["arxivqa.jsonl"], "id question options label image"),
    "ThinkLite-VL": (thinklite, ["*.parquet", "data/*.parquet"], "id problem answer image"),
}


def read_tasks(files, out, limit=None):
    """[(name, path), ...] -> tasks. Rows without their picture or ground truth are dropped, and counted on stderr."""
    tasks, dropped = [], Counter()
    for name, path in files:
        read, patterns, fields = FORMATS[name]
        folder = path if os.path.isdir(path) else os.path.dirname(path)
        for number, (where, row) in enumerate(table_rows(path, patterns)):
            lacks = [f for f in fields.split() if not isinstance(row, dict) or row.get(f) is None]
            if lacks:
                raise Unusable(f"{where} has no {', '.join(lacks)}; legal for {name}: an object with {', '.join(fields.split())}")
            task = read(row, number, folder)
            if isinstance(task, str):
                dropped[f"{name}: {task}"] += 1
                continue
            images = [keep(i, out / "images")[0] if isinstance(i, bytes) else locate(folder, i) for i in task["images"]]
            if not all(i and os.path.isfile(i) for i in images):
                dropped[f"{name}: missing image"] += 1
                continue
            tasks.append(task | {"source": name, "images": images, "video": None})
    if dropped:
        print(f"dropped: {dict(dropped)}", file=sys.stderr)
    if not tasks:
        raise Unusable(f"no task in {files}; legal: NAME=PATH with NAME one of {', '.join(FORMATS)}, "
                       "or the path of a JSONL file of question and answer")
    return tasks[:limit]


def exact(text, answer):
    """
    Is the ground truth what was answered? Looks into the last <answer> or \\\\boxed{} if there is one; of an option the letter counts.

    >>> exact("Red.", "red"), exact("It is red.", "red"), exact("Hence <answer>(B) two</answer>", "B"), exact("1,200", "1200.0")
    (1.0, 0.0, 1.0, 1.0)
    """
    said = (re.findall(r"<answer>(.*?)</answer>|\\boxed\{([^{}]*)\}", text, re.S) or [(text, "")])[-1]
    said, true = (re.sub(r"(?<=\d),(?=\d{3})", "", t).strip().rstrip(".").casefold() for t in (said[0] or said[1], answer))
    if re.fullmatch("[a-j]", true) and (letter := re.match(r"\(?([a-j])(?:[).:]|$)", said)):
        said = letter[1]
    number = r"-?\d+(\.\d+)?"
    return float(said == true or bool(re.fullmatch(number, said) and re.fullmatch(number, true)) and float(said) == float(true))


# ---------------------------------------------------------------------------------------------------
# 2. Score: duels, the reward model, Eq. 3


def duels(m, pairs):
    """
    Which of m different answers are compared: all pairs, or neighbours on a ring up to k apart. Each is judged in both orders.

    >>> duels(3, "all"), duels(5, "ring"), len(duels(8, "all")), len(duels(8, 2))
    ([(0, 1), (0, 2), (1, 2)], [(0, 1), (0, 4), (1, 2), (2, 3), (3, 4)], 28, 16)
    """
    k = m - 1 if pairs == "all" else min(m - 1, 1 if pairs == "ring" else pairs)
    return sorted({tuple(sorted((i, (i + d) % m))) for i in range(m) for d in range(1, k + 1)})


def scores(p, counts, pairs):
    """
    Eq. 3, for m different answers of which answer a was given counts[a] times: (m,) float64. p[a, b] in [0, 1]: a shown first
    beats b; NaN: no verdict. Between equal answers s = 1/2.

    >>> p = torch.tensor([[0., 1., 1.], [1., 0., 1.], [0., 0., 0.]])   # 0 and 1: always the first; both beat 2
    >>> scores(p, torch.tensor([1, 1, 1]), "all").tolist(), scores(p, torch.tensor([2, 1, 1]), "all").tolist()
    ([1.5, 1.5, 0.0], [2.0, 2.0, 0.0])
    """
    m, n = len(counts), counts.sum()
    s = ((p.double() + 1 - p.double().T) / 2).nan_to_num(0.5)  # NaN in either order: a draw
    met = torch.eye(m, dtype=torch.bool)
    for a, b in duels(m, pairs):
        met[a, b] = met[b, a] = True
    weight = met * (counts - torch.eye(m))  # (m, m) how many others of the n gave b
    s.fill_diagonal_(0.5)
    return (n - 1) * (weight * s).sum(1) / weight.sum(1).clamp_min(1)


def rank_correlation(x, y):
    """
    Spearman's, ties sharing their mean rank; None where either is flat.

    >>> x = torch.tensor([1., 5., 9.])
    >>> rank_correlation(torch.tensor([1., 2., 3.]), x), rank_correlation(torch.tensor([1., 1., 1.]), x)
    (1.0, None)
    """
    x, y = x.double().round(decimals=6), y.double().round(decimals=6)  # sums of the same scores in another order are ties
    x, y = (((v[:, None] > v).sum(1) + ((v[:, None] == v).sum(1) - 1) / 2).double() for v in (x, y))
    x, y = x - x.mean(), y - y.mean()
    size = (x.norm() * y.norm()).item()
    return round((x @ y).item() / size, 6) if size else None


Duel = namedtuple("Duel", "question images first second answer")  # as shown; it is the key under which the verdict is kept
PREFIX = "<think></think><answer>"  # --verdict token: what comes next is the verdict


class RewardModel:
    """What judge.ConsistencyJudge asks in place of an endpoint: a duel in, the probability of its first answer out, as a text."""

    def __init__(self, endpoint, args):
        self.endpoint, self.args = endpoint, args
        alone = lambda images: turn({"images": images, "video": None}, "")
        self.pictures = lru_cache(1024)(lambda images: as_sent(alone(images), args.max_pixels or 2**62, 0)[0]["content"][:-1])

    async def ask(self, model, turns, **_):
        duel, = (t["content"] for t in turns)
        pair = {"question": duel.question, "images": (), "video": None, "responses": (duel.first, duel.second)}
        shown = [{"role": "user", "content": self.pictures(duel.images) + messages(pair)[0]["content"]}]
        if self.args.verdict == "reason":
            reply = await self.endpoint.ask(model, shown, temperature=0, max_tokens=self.args.judge_tokens)
            choice = parse(reply["text"]).choice
            return reply | {"text": "none" if choice is None else str(2.0 - choice)}
        # the reply is made to begin with PREFIX; one token follows (vLLM continues an assistant's turn so)
        shown.append({"role": "assistant", "content": PREFIX})
        reply = await self.endpoint.ask(model, shown, temperature=0, max_tokens=1, logprobs=True, top_logprobs=20,
                                        add_generation_prompt=False, continue_final_message=True)
        if not reply.get("likeliest"):
            raise Unanswered("the reply has no log-probabilities, which --verdict token asks for", False)
        seen = {token.strip(): math.exp(logp) for token, logp in reversed(reply["likeliest"][0].items())}  # of "1" and " 1" the likelier
        one, two = seen.get("1", 0.0), seen.get("2", 0.0)
        # a server tells of its 20 likeliest tokens: of a digit among the rest nothing is known
        known = {"1", "2"} <= seen.keys() or one + two > 0.5
        return reply | {"text": str(one / (one + two)) if known else "none"}


class Duels(ConsistencyJudge):
    """judge.py's judge, for duels: concurrent, each different duel asked once, patient, and dead when nothing comes."""

    def __init__(self, args, seed=0):
        super().__init__(args, seed)
        self.endpoint = RewardModel(self.endpoint, args) if args.judge == "model" else None

    async def judge(self, asked):
        """Probabilities that the first answer is better; NaN: no verdict."""
        self.counts["asked"] += len(asked)
        if self.args.judge == "model":
            if len(self.cache) > 200_000:  # some 500 MB of long answers
                self.cache.clear()
            unparsable = self.counts["unparsable"]
            await self.ask(asked)
            said = [self.cache.get(d, "none") for d in asked]
            self.counts["unparsable"] = unparsable + sum(self.cache.get(d) == "none" for d in asked)
            said = [math.nan if text == "none" else float(text) for text in said]
        elif self.args.judge == "random":
            said = [float(coin(self.seed, "coin", d) < 0.5) for d in asked]
        else:
            said = [(1 + exact(d.first, d.answer) - exact(d.second, d.answer)) / 2 for d in asked]
        return [1 - p if coin(self.seed, "noise", d) < self.args.judge_noise else p for d, p in zip(asked, said)]


def whole(row):
    """The answer that is compared, or None: there is none."""
    return row["text"].strip() if row["finish"] == "stop" and row["text"].strip() else None


def score(rows, judge, args):
    """Asks for the duels of these rows, whole prompts. Returns finish() -> [(rewards of a prompt's rows (n,), what to log of it), ...]."""
    asked, plans = [], []
    for start in range(0, len(rows), args.samples):
        group = rows[start:start + args.samples]
        answers = list(dict.fromkeys(map(whole, group)))
        task, pairs = group[0]["pair"], duels(len(answers), args.pairs)
        # neighbours in the queue share pictures, question and first answer: the server has their prefix in its cache
        calls = [(a, b) for a, b in sorted(pairs + [(b, a) for a, b in pairs]) if None not in (answers[a], answers[b])]
        plans.append((group, answers, calls, len(asked)))
        asked += [Duel(task["question"], tuple(task["images"]), answers[a], answers[b], task["answer"]) for a, b in calls]
    pending = judge.submit(asked)

    def finish():
        said, found = pending.result(), []
        for group, answers, calls, at in plans:
            given = [answers.index(whole(row)) for row in group]  # (n,)
            p = torch.full((len(answers),) * 2, math.nan, dtype=torch.float64)
            for a, answer in enumerate(answers):
                if answer is None:  # it loses
                    p[a], p[:, a] = 0.0, 1.0
            for (a, b), value in zip(calls, said[at:at + len(calls)]):
                p[a, b] = value
            counts = torch.bincount(torch.tensor(given))
            won = scores(p, counts, args.pairs)
            right = torch.tensor([exact(answer or "", group[0]["pair"]["answer"]) for answer in answers], dtype=torch.float64)
            share = won[given] / (args.samples - 1)
            duel = [((p[a, b] + 1 - p[b, a]) / 2).item() for a, b in duels(len(answers), args.pairs) if right[a] != right[b]
                    for a, b in [(a, b) if right[a] else (b, a)]]
            ring = rank_correlation(share, scores(p, counts, "ring")[given]) if args.pairs == "all" else None
            rewards = share + args.exact_weight * right[given]
            found.append((rewards, {
                "score": share, "exact": right[given], "distinct": len(answers), "duels": len(calls),
                "spread": share.std(unbiased=False).item(), "flat": float(rewards.max() == rewards.min()),
                "no_verdict": sum(math.isnan(v) for v in said[at:at + len(calls)]),
                "judge_right": [0.5 if math.isnan(v) else v for v in duel], "ring_rank": [] if ring is None else [ring]}))
        return found

    return finish


# ---------------------------------------------------------------------------------------------------
# Held-out tasks, the log


def turns(task):
    return turn(task, task["question"])


def prompt(processor, task):
    return to_sample(processor, turns(task))


def held_out(engine, processor, tasks, judge, state, args, save):
    """Exact match, greedy and at temperature 1; win rate of the greedy answers over those before training, in both orders."""
    prompts, out = [prompt(processor, task) for task in tasks], {}
    for name, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        seeds = [seed_of("eval", task["id"]) for task in tasks]
        rows = rollout(engine, processor, tasks, prompts, seeds, 1, temperature, args.max_new_tokens)
        right, n = reduced([sum(exact(whole(row) or "", row["pair"]["answer"]) for row in rows), len(rows)])
        out[f"eval_{name}"] = right / max(1, n)
    now = list(map(whole, rows))
    before = state.setdefault("before", now)
    met = [i for i, (a, b) in enumerate(zip(now, before)) if a != b and None not in (a, b)]
    asked = [Duel(tasks[i]["question"], tuple(tasks[i]["images"]), *order, tasks[i]["answer"])
             for i in met for order in ((now[i], before[i]), (before[i], now[i]))]
    said = rewards_or_stop(judge.submit(asked).result, save)
    s = dict(zip(met, ((p + 1 - q) / 2 for p, q in zip(said[::2], said[1::2]))))
    wins = [0.5 if a == b or math.isnan(s.get(i, 0.0)) else float(b is None) if None in (a, b) else s[i]
            for i, (a, b) in enumerate(zip(now, before))]
    changed, won = reduced([sum(a != b for a, b in zip(now, before)), sum(wins)])
    return out | {"eval_win": won / max(1, n), "eval_changed": changed / max(1, n), "eval_n": n}


def summary(rows, rewards, parts, updates, judge, seconds):
    """The row of the log: means over all ranks' answers, prompts or duels, as each key has it."""
    each = lambda key: [v for part in parts for v in (part[key] if isinstance(part[key], list) else [part[key]])]
    found = means({"reward": rewards, "exact": torch.cat(each("exact")), "length": [len(row["response"]) for row in rows],
                   "truncated": [row["finish"] == "length" for row in rows],  # of answers
                   **{key: each(key) for key in ("distinct", "spread", "flat", "ring_rank")},  # of prompts
                   "judge_right": each("judge_right")})  # of duels
    duels, silent = reduced([sum(each("duels")), sum(each("no_verdict"))])
    return found | {"duels": duels, "no_verdict": silent} | of_updates(updates, judge, seconds)


PANELS = {"exact match": ["exact", "eval_greedy", "eval_sampled"], "win rate over the start": ["eval_win"],
          "spread of the scores": ["spread"], "share of prompts": ["flat"], "right beats wrong": ["judge_right"],
          "different answers of a prompt": ["distinct"], "entropy": ["entropy"], "length, tokens": ["length"]}


def keep_rollouts(path, step, rows, rewards, parts):
    said = [[x.item() for part in parts for x in part[key]] for key in ("score", "exact")]
    with path.open("a", encoding="utf-8") as file:
        for row, reward, share, right in zip(rows, rewards.tolist(), *said):
            file.write(json.dumps({"step": step, "id": row["pair"]["id"], "answer": row["pair"]["answer"], "text": row["text"],
                                   "finish": row["finish"], "exact": right, "score": share, "reward": reward}) + "\n")


# ---------------------------------------------------------------------------------------------------


def source(text):
    """NAME=PATH -> (name, path); a path alone is a file of tasks."""
    name, _, path = text.partition("=") if text.partition("=")[0] in FORMATS else ("tasks", "", text)
    return name, path


def pairs_flag(text):
    if text not in ("all", "ring") and not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r}; legal: all, ring, or how far apart on the ring, 1 or more")
    return int(text) if text.isdecimal() else text


def parser():
    p = command_line(__doc__)
    add = p.add_argument_group("data").add_argument
    add("--data", type=source, nargs="+", required=True,
        metavar="[NAME=]PATH", help=f"tasks to train on; NAME: {', '.join(FORMATS)}; none = tasks")
    add("--eval_data", type=source, nargs="+", default=[], metavar="[NAME=]PATH", help="held-out tasks; none = no held-out figures")
    add("--eval_n", type=int, default=500, help="the first so many of them")
    add("--out", default="out/downstream", help="folder to write; the same command continues from its last checkpoint")
    add = p.add_argument_group("reward (C.9.1)").add_argument
    add("--pairs", type=pairs_flag, default="all", help="duels of a prompt: all (the paper), ring, or k neighbours on each side")
    add("--exact_weight", type=float, default=0.0, help="of the exact match with the ground truth; all duels together weigh 1")
    add("--chunk", type=int, default=64, help="prompts of a rank that are sampled at once, while the duels of those before are judged")
    add = p.add_argument_group("reward model").add_argument
    add("--judge", choices=["model", "random", "exact"], default="model", help="random: a coin; exact: the ground truth, an upper bound")
    add("--verdict", choices=["reason", "token"], default="reason", help="reason: full reasoning; token: one forced token's probabilities")
    add("--judge_url", default="http://127.0.0.1:8000/v1", help="OpenAI-compatible endpoint of the reward model; its key in OPENAI_API_KEY")
    add("--judge_model", default="out/rl", help="its name there; with vLLM the folder it was started with")
    add("--judge_tokens", type=int, default=1024, help="longest judgement, tokens; cut off = no verdict")
    add("--judge_noise", type=float, default=0.0, help="share of its verdicts that are flipped")
    add("--judge_concurrency", type=int, default=64, help="calls at once, for each rank")
    add("--judge_timeout", type=float, default=120, help="seconds for a call before it is tried again")
    add("--judge_retries", type=int, default=6, help="times a failed call is tried again; then the duel is a draw")
    add("--judge_patience", type=float, default=600, help="seconds without any reply after which the run stops")
    loop_flags(p)
    add = p.add_argument_group("held-out figures and checks").add_argument
    add("--eval_every", type=int, default=20, help="steps between held-out figures, with --eval_data")
    add("--check_every", type=int, default=20, help="steps between comparisons of vLLM and the trainer; 0 = never")
    p.set_defaults(model="Qwen/Qwen2.5-VL-3B-Instruct", algo="grpo", samples=8, passes=1.0,  # C.9
                   train_batch=2048,  # one update a rollout (ours)
                   both_orders=False, check=False)  # what rl.py's functions look at and has no meaning here
    return p


def main():
    args = parser().parse_args()
    rank, world, device = setup(args.seed)
    validate(args, world)
    if args.samples < 2 or args.chunk < 1:
        raise Unusable(f"--samples is {args.samples}, --chunk {args.chunk}; legal: 2 answers or more, to compare; 1 prompt or more")
    out, tp = Path(args.out), args.tensor_parallel
    group, groups = rank // tp, world // tp
    tasks = read_tasks(args.data, out)
    held = read_tasks(args.eval_data, out, args.eval_n) if args.eval_data else []
    processor = load_processor(args.model, args.min_pixels, args.max_pixels)
    tasks, held = (fitting(some, turns, processor, args, rank, world) if some else [] for some in (tasks, held))
    held = held[group::groups]
    steps = args.steps or math.ceil(args.passes * len(tasks) / args.rollout_batch)
    first = max(checkpoints(out / "checkpoints"), default=0)
    coming = shares(Shown(tasks, prompt, processor, args), first, steps, args, rank, world, device)
    engine, trainer, reference = prepare(args, processor, rank, world, device)
    policy, pad = trainer.module, processor.tokenizer.pad_token_id
    judge = Duels(args, args.seed)
    _, state = resumed(out, trainer, args, FREE, skipped=0)
    log = Log(out, header(args, world, device) | {"tasks": len(tasks), "held_out": reduced(len(held)) / tp}, first, steps, args.tracker)
    if first or device.type == "cuda":
        engine.sync(policy)  # vLLM has the weights of --model
    if held and not first:
        log.row(0, **held_out(engine, processor, held, judge, state, args, lambda: None))

    for step in range(first, steps):
        clock, compared = Clock(), compare_now(step, first, args)
        save = lambda: save_checkpoint(out / "checkpoints", trainer, step, state)

        # 1. and 2. rollout; the reward model judges a chunk while the next is sampled, all by the same weights
        mine, rows, pending = next(coming), [], []
        for at in range(0, len(mine), args.chunk):
            new = sample(engine, processor, mine[at:at + args.chunk], step, args, rank, compared)
            pending.append(score(new, judge, args))
            rows += new
        clock("rollout")
        engine.sleep()
        checked = compare(trainer, processor, rows, step, args, device) if compared else {}

        # 3. to 6. as in rl.py
        batches = mini_batches(rows, step, args)
        old_logps(batches, trainer, reference, args, pad, device)
        clock("old_logps")
        found = rewards_or_stop(lambda: [part for finish in pending for part in finish()], save)
        rewards, parts = torch.cat([r for r, _ in found]), [part for _, part in found]
        clock("judge")
        advantages_of(rows, rewards, args)
        updates = learn(trainer, batches, step, state, args, pad, device)
        clock("update")

        # 7. sync
        engine.sync(policy)
        clock("sync")
        done, figures = step + 1, {}
        if held and (done % args.eval_every == 0 or done == steps):
            figures = held_out(engine, processor, held, judge, state, args, save)
        keep_rollouts(out / f"rollouts-{rank}.jsonl", done, rows, rewards, parts)
        log.row(done, **summary(rows, rewards, parts, updates, judge, clock.seconds), **checked, **figures)
        if done == steps or args.save_every and done % args.save_every == 0:
            save_checkpoint(out / "checkpoints", trainer, done, state)

    end_run(out, policy, processor, log, PANELS, rank)


if __name__ == "__main__":
    try:
        main()
    except (Unusable, FileNotFoundError) as problem:  # its owner can mend it: no traceback
        sys.exit(f"downstream_grpo.py: {problem}")
