r"""
Stage 5: what a reward model is for (section C.9). A smaller MLLM answers questions, the reward
model compares its answers, and GRPO trains it on who won. One step, in the order of train():

    1. roll out     8 answers to a prompt, by vLLM, at temperature 1, --chunk prompts at a time
    2. score        all 8 x 7 ordered pairs of a prompt's answers go to the reward model, while the
                    next chunk is sampled
    3. the rest     as in rl.py, with GRPO: against the other answers to the same prompt

The reward. p_ij is the reward model's verdict for answer i when the pair is shown as (i, j): with
--verdict reason 1 or 0, from the reasoning it writes; with --verdict token the share of "1" in the
probabilities of "1" and "2" after an empty thought, one token and no reasoning. Eq. 3 and its
normalisation, which the paper does not print:

    s_ij = (p_ij + 1 - p_ji) / 2        Score_i = sum over j != i of s_ij
    reward_i = Score_i / (n - 1) + --exact_weight * exact match

A reward model that leans to the first place adds the same to p_ij and to p_ji, and s_ij loses it;
one that sees nothing but the place gives every answer 1/2. Since s_ij + s_ji = 1, the scores of a
prompt always have the same mean, and only their spread teaches. The log has it (spread; flat: the
share of prompts that teach nothing), and judge_right: how often the right answer beats a wrong one.

Where the paper is silent:
1) equal answers to a prompt are one answer, judged once; between them s = 1/2
2) a duel in which either order has no verdict is a draw
3) an answer that is empty or cut off loses to every complete one, without asking
4) a batch of 256 is 256 prompts
5) temperature 0 for the reward model
Beyond the paper:
6) --pairs ring or k: only neighbours on a ring of the different answers, up to k apart, 2kn calls
   in place of n(n-1); Score is then (n - 1) times the mean over the answers that were compared.
   With --pairs all the log has the rank correlation that a ring would have had
7) --exact_weight mixes in the ground truth
8) --judge random and --judge exact

The toy: the reward model of rl.py behind a vLLM server, in another terminal; a policy that is
careless, not blind (toy/careless.py):
$ VLLM_CPU_KVCACHE_SPACE=1 python -m vllm.entrypoints.openai.api_server --model out/toy/rl \
    --dtype float32 --enforce-eager --max-model-len 1024 --host 127.0.0.1 --port 8020
$ python toy/careless.py --out out/toy/careless
$ python downstream_grpo.py @toy/downstream.args
One node with 4 GPUs of 80 GB for the policy and a server on others, the paper's setting (not yet
run at this scale):
$ torchrun --nproc_per_node=4 downstream_grpo.py --data 'V*=data/vstar_bench' \
    arXivQA=data/ArxivQA ThinkLite-VL=data/ThinkLite-VL-hard-11k \
    --judge_url http://judge:8000/v1 --judge_model out/rl --judge_concurrency 256 \
    --out out/downstream

Reads  --model (see sft.py), --data (a file in sources/ for each kind of task), the reward model
       behind --judge_url.
Writes --out: the model with its README.md, log.jsonl (a row for each step), rollouts-*.jsonl
       (answers, scores), curves.png, checkpoints/, images/.
"""

import argparse
import asyncio
import json
import math
import sys
from collections import Counter
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path

import torch

import judge as judging
import rl
import toy.cpu
from core import endpoint, flags, metrics, pairs, pictures, prompts, rl_flags, runs, training
from core.duels import Duel, duel, finished_answer, make_contest, score
from core.encoding import load_processor
from core.exact_match import exact
from core.seeds import seed_from, uniform_from
from sources import TASKS, reading
from stable_reinforce import parse

# --------------------------------------------------------------------------------------------------
# Tasks


def read_tasks(data, out, limit=None):
    """Tasks of [(name, path), ...]. Rows without their image are dropped, and counted on stderr."""
    tasks, dropped = [], Counter()
    for name, path in data:
        for _, task in reading.read_records(TASKS[name], path):
            try:
                if isinstance(task, reading.Dropped):
                    raise task
                task.images = [image_file(image, out) for image in task.images]
                tasks.append(task)
            except reading.Dropped as reason:
                dropped[f"{name}: {reason}"] += 1
    if not tasks:
        paths = ", ".join(path for _, path in data)
        raise pairs.InputError(
            f"{paths}: no task is left, dropped: {dict(dropped)}; expected question and answer in "
            "each row, and pictures where the rows say"
        )
    if dropped:
        print(f"dropped: {dict(dropped)}", file=sys.stderr)
    return tasks[:limit]


def image_file(image, out):
    """The image's path; bytes become a file. Files are not decoded here: there are too many."""
    if isinstance(image, bytes):
        try:
            image, _ = reading.store_picture(image, out / "images")
        except pictures.BadPicture as problem:
            raise reading.Dropped(problem.reason) from None
    if image is None or not Path(image).is_file():
        raise reading.Dropped("missing image")
    return image


def task_turns(task):
    return pairs.user_turn(task.images, task.video, task.question)


# --------------------------------------------------------------------------------------------------
# The reward model


EMPTY_THOUGHT = "<think></think><answer>"  # --verdict token: the verdict comes next


class RewardModel:
    """Duels: the probability that the first answer is better, NaN for no verdict."""

    def __init__(self, args, seed=0):
        self.args = args
        self.seed = seed
        self.counts = judging.new_counts()
        self.loop = endpoint.background_loop()
        self.images = lru_cache(1024)(self.encode_images)
        if args.judge == "model":
            read = read_verdict if args.verdict == "reason" else read_token
            easy = Duel("Which is larger, 2 or 3?", (), "3 is larger.", "2 is larger.", "3")
            self.questions = judging.Questions(args, self.counts, self.request, read, easy)

    def check(self):
        """Asks one easy question: a server that cannot answer stops a run before it begins."""
        if self.args.judge == "model":
            judging.ask_now(self.questions, self.loop)

    def submit(self, asked):
        """A future of the probabilities of these duels, which are asked in another thread."""
        return asyncio.run_coroutine_threadsafe(self.judge(asked), self.loop)

    async def judge(self, asked):
        self.counts["asked"] += len(asked)
        if self.args.judge == "model":
            answers = await self.ask_model(asked)
        elif self.args.judge == "random":
            answers = [float(uniform_from(self.seed, "coin", duel) < 0.5) for duel in asked]
        else:
            answers = [exact_verdict(duel) for duel in asked]
        return [self.with_noise(duel, p) for duel, p in zip(asked, answers)]

    async def ask_model(self, asked):
        if len(self.questions.answers) > 200_000:  # some 500 MB of long answers
            self.questions.answers.clear()
        answers = await self.questions.ask(asked)
        found = [answers.get(duel, math.nan) for duel in asked]
        self.counts["unparsable"] += sum(math.isnan(answers.get(duel, 0.0)) for duel in asked)
        return found

    def with_noise(self, duel, p):
        """--judge_noise: that share of the verdicts is flipped."""
        flipped = uniform_from(self.seed, "noise", duel) < self.args.judge_noise
        return 1 - p if flipped else p

    def request(self, duel):
        """The chat turns of a duel, and the other fields of the call."""
        pair = pairs.Pair("", "", duel.question, [], None, [duel.first, duel.second], choice=1)
        (turn,) = pairs.judging_turns(pair)
        turns = [turn | {"content": self.images(duel.images) + turn["content"]}]
        if self.args.verdict == "reason":
            return turns, {"temperature": 0, "max_tokens": self.args.judge_tokens}
        # vLLM continues the assistant's turn
        turns.append({"role": "assistant", "content": EMPTY_THOUGHT})
        return turns, {
            "temperature": 0,
            "max_tokens": 1,
            "logprobs": True,
            "top_logprobs": 20,
            "add_generation_prompt": False,
            "continue_final_message": True,
        }

    def encode_images(self, images):
        turns = pairs.user_turn(list(images), None, "")
        return endpoint.to_openai(turns, self.args.max_pixels or 2**62, 0)[0]["content"][:-1]


def read_verdict(reply):
    choice = parse(reply.text).choice
    return math.nan if choice is None else 2.0 - choice


def read_token(reply):
    if not reply.top_logprobs:
        lacking = "the reply has no log-probabilities, which --verdict token needs"
        raise endpoint.NoReply(lacking, refused=True)
    probabilities = {}
    for token, logp in reply.top_logprobs[0].items():
        digit = token.strip()  # of "1" and " 1" the likelier one
        probabilities[digit] = max(probabilities.get(digit, 0.0), math.exp(logp))
    one, two = probabilities.get("1", 0.0), probabilities.get("2", 0.0)
    # the server lists its 20 likeliest tokens: of a digit among the rest nothing is known
    known = {"1", "2"} <= probabilities.keys() or one + two > 0.5
    return one / (one + two) if known else math.nan


def exact_verdict(duel):
    return (1 + exact(duel.first, duel.answer) - exact(duel.second, duel.answer)) / 2


# --------------------------------------------------------------------------------------------------
# 2. Score


def start_contests(samples, reward_model, args):
    """Ask for the duels of these samples, whole prompts: (contests, a future of their verdicts)."""
    contests, asked = [], []
    for start in range(0, len(samples), args.samples):
        contest = make_contest(samples[start : start + args.samples], args.pairs)
        contests.append(contest)
        asked += contest.duels()
    return contests, reward_model.submit(asked)


def finish_contests(started):
    """The contests of all chunks, when the last verdict is there."""
    finished = []
    for contests, pending in started:
        verdicts = iter(pending.result())
        for contest in contests:
            contest.verdicts = list(islice(verdicts, len(contest.calls)))
        finished += contests
    return finished


# --------------------------------------------------------------------------------------------------
# Held-out tasks and the log


def held_out_accuracy(run, tasks, reward_model, state, save):
    """Exact match, greedy and at temperature 1; wins of the greedy answers over the first ones."""
    batch = prompts.encode_prompts(tasks, task_turns, run.processor)
    seeds = [seed_from("eval", task.id) for task in tasks]
    figures = {}
    for name, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        samples = rl.sample_responses(run, batch, seeds, 1, temperature)
        now = [finished_answer(sample) for sample in samples]
        right = sum(exact(answer or "", task.answer) for answer, task in zip(now, tasks))
        right, n = training.all_reduce([right, len(tasks)])
        figures[f"eval_{name}"] = right / max(1, n)
    before = state.setdefault("before", now)
    wins = wins_over(now, before, tasks, reward_model, save)
    changed = sum(a != b for a, b in zip(now, before))
    changed, won = training.all_reduce([changed, sum(wins)])
    return figures | {
        "eval_win": won / max(1, n),
        "eval_changed": changed / max(1, n),
        "eval_n": int(n) // run.args.tensor_parallel,
    }


def wins_over(now, before, tasks, reward_model, save):
    """For each task the share of the duel, in both orders, that the answer of now wins."""
    asked = []
    for new, old, task in zip(now, before, tasks):
        if new != old and new is not None and old is not None:
            asked += [duel(task, new, old), duel(task, old, new)]
    verdicts = training.wait_or_stop(reward_model.submit(asked).result, save)
    p = dict(zip(asked, verdicts))
    wins = []
    for new, old, task in zip(now, before, tasks):
        if new == old:
            wins.append(0.5)
        elif new is None or old is None:
            wins.append(float(old is None))
        else:
            share = (p[duel(task, new, old)] + 1 - p[duel(task, old, new)]) / 2
            wins.append(0.5 if math.isnan(share) else share)
    return wins


def log_row(samples, contests, found, updates, reward_model, seconds):
    """A step's row of the log: means over all ranks' answers, prompts or duels."""
    row = metrics.global_means(
        {
            "reward": torch.cat([score.rewards for score in found]),
            "exact": torch.cat([score.exact for score in found]),
            "length": [len(sample.response_ids) for sample in samples],
            "truncated": [sample.finish == "length" for sample in samples],
            # of prompts
            "distinct": [score.distinct for score in found],
            "spread": [score.spread for score in found],
            "flat": [score.flat for score in found],
            "ring_rank": [score.ring_rank for score in found if score.ring_rank is not None],
            # of duels
            "judge_right": list(chain(*(score.judge_right for score in found))),
        }
    )
    calls = sum(len(contest.calls) for contest in contests)
    no_verdict = sum(score.no_verdict for score in found)
    row["duels"], row["no_verdict"] = training.all_reduce([calls, no_verdict])
    return row | metrics.update_metrics(updates, reward_model, seconds)


def write_rollouts(path, step, contests, found):
    with path.open("a", encoding="utf-8") as file:
        for contest, result in zip(contests, found):
            for number, sample in enumerate(contest.samples):
                row = {
                    "step": step,
                    "id": sample.pair.id,
                    "answer": sample.pair.answer,
                    "text": sample.text,
                    "finish": sample.finish,
                    "exact": result.exact[number].item(),
                    "score": result.share[number].item(),
                    "reward": result.rewards[number].item(),
                }
                file.write(json.dumps(row) + "\n")


VIEW = runs.View(
    # not the reward: what duels give to a prompt's answers always has the same mean
    step=["spread", "exact", "judge_right", "length", "grad_norm"],
    held_out=["eval_greedy", "eval_sampled", "eval_win", "eval_n"],
    curves={
        "exact match": ["exact", "eval_greedy", "eval_sampled"],
        "win rate over the start": ["eval_win"],
        "spread of the scores": ["spread"],
        "share of prompts": ["flat"],
        "right beats wrong": ["judge_right"],
        "different answers to a prompt": ["distinct"],
        "entropy": ["entropy"],
        "length, tokens": ["length"],
    },
)

# --------------------------------------------------------------------------------------------------


def data_flag(text):
    """NAME=PATH -> (name, path); a path alone is a file of tasks."""
    name, _, path = text.partition("=")
    found = (name, path) if name in TASKS else ("tasks", text)
    if not found[1]:
        raise argparse.ArgumentTypeError(
            f"expected NAME=PATH with a NAME of {', '.join(TASKS)}, or a PATH, got {text!r}"
        )
    return found


def pairs_flag(text):
    if text in ("all", "ring"):
        return text
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(
        f"expected all, ring, or how far apart on the ring (1 or more), got {text!r}"
    )


def parser():
    p = flags.command_line(__doc__)
    add_data_flags(p.add_argument_group("data").add_argument)
    add_reward_flags(p.add_argument_group("reward (C.9.1)").add_argument)
    add_judge_flags(p.add_argument_group("reward model").add_argument)
    rl_flags.add_loop_flags(p)
    add = p.add_argument_group("held-out figures and checks").add_argument
    add(
        "--eval_every",
        type=flags.whole(),
        default=20,
        help="steps between held-out figures; 0 = only at both ends",
    )
    add(
        "--check_every",
        type=flags.whole(),
        default=20,
        help="steps between comparisons of vLLM and the trainer; 0 = none",
    )
    p.set_defaults(
        model="Qwen/Qwen2.5-VL-3B-Instruct",  # this one and the next three: C.9
        algo="grpo",
        samples=8,
        passes=1.0,
        train_batch=2048,  # one update for each rollout (ours)
        both_orders=False,  # flags of rl.py that have no meaning here
        check=False,
        save_best=False,
    )
    return p


def add_data_flags(add):
    add(
        "--data",
        type=data_flag,
        nargs="+",
        action="extend",
        required=True,
        metavar="[NAME=]PATH",
        help=f"tasks to train on; NAME: {', '.join(TASKS)}; a PATH alone: your own tasks",
    )
    add(
        "--eval_data",
        type=data_flag,
        nargs="+",
        default=[],
        metavar="[NAME=]PATH",
        help="held-out tasks; without it there are no held-out figures",
    )
    add(
        "--eval_n",
        type=flags.whole(1),
        default=500,
        help="held-out tasks that are answered, from the first on",
    )
    add(
        "--out",
        default="out/downstream",
        help="folder to write; the same command continues a run in it",
    )


def add_reward_flags(add):
    add(
        "--pairs",
        type=pairs_flag,
        default="all",
        help="duels of a prompt: all (the paper), ring, or k neighbours on each side",
    )
    add(
        "--exact_weight",
        type=flags.number(),
        default=0.0,
        help="weight of the exact match with the ground truth; all duels together weigh 1",
    )
    add(
        "--chunk",
        type=flags.whole(1),
        default=64,
        help="prompts of a rank that are sampled together, while the duels before are judged",
    )


def add_judge_flags(add):
    pictures.add_media_root_flag(add)
    add(
        "--judge",
        choices=["model", "random", "exact"],
        default="model",
        help="random: a coin; exact: the ground truth, an upper bound",
    )
    add(
        "--verdict",
        choices=["reason", "token"],
        default="reason",
        help="reason: full reasoning; token: the probabilities of one forced token",
    )
    judging.add_server_flags(add, "the reward model", "out/rl", timeout=120.0)
    add(
        "--judge_tokens",
        type=flags.whole(1),
        default=1024,
        help="longest judgement, in tokens; cut off = no verdict",
    )


def main():
    args = parser().parse_args()
    rank, world, device = training.start_ranks(args.seed)
    if device.type == "cpu":
        toy.cpu.speed_up_process()
    rl_flags.check_flags(args, world)
    runs.open_out(args, rank)
    runs.refuse_other_model(args.out)
    if args.samples < 2:
        raise pairs.InputError(
            f"--samples is {args.samples}; expected 2 or more answers to a prompt, to compare"
        )
    tasks = read_tasks(args.data, Path(args.out))
    args.data_digest = pairs.digest_of(tasks)
    held_out = read_tasks(args.eval_data, Path(args.out), args.eval_n) if args.eval_data else []
    if args.judge == "model":
        data = [path for _, path in (*args.data, *args.eval_data)]
        pictures.check_may_be_sent(chain(tasks, held_out), data, args)
    processor = load_processor(args.model, args.min_pixels, args.max_pixels)
    plan = prompts.make_plan(tasks, held_out, task_turns, processor, args, rank, world, device)
    reward_model = RewardModel(args, args.seed)
    training.on_all_ranks(reward_model.check)
    run = rl.start_run(args, processor, rank, world, device)
    train(run, plan, reward_model)


def train(run, plan, reward_model):
    args, out = run.args, Path(run.args.out)
    log, state, saving = rl.open_run(run, plan, VIEW, "tasks", skipped=0)
    if plan.held_out and not plan.first_step:
        figures = held_out_accuracy(run, plan.my_held_out, reward_model, state, save=no_checkpoint)
        log.row(0, **figures)

    for step in range(plan.first_step, plan.steps):
        clock = metrics.Clock()
        save = partial(run.save, step, state)

        # 1. roll out, 2. score: the reward model judges a chunk while the next one is sampled
        batch = next(plan.batches)
        comparing = rl.compare_now(step, plan.first_step, args)
        samples, started = [], []
        for first in range(0, len(batch), args.chunk):
            chunk = rl.roll_out(run, batch[first : first + args.chunk], step, comparing)
            started.append(start_contests(chunk, reward_model, args))
            samples += chunk
        clock("rollout")
        run.sampler.sleep()
        gaps = rl.compare(run, samples, step) if comparing else {}

        # 3. old log-probabilities
        mini_batches = rl.split_into_mini_batches(samples, step, args)
        rl.set_old_logps(run, mini_batches)
        rl.set_reference_logps(run, mini_batches)
        clock("old_logps")

        # 4. rewards, when the reward model is done
        contests = training.wait_or_stop(partial(finish_contests, started), save)
        found = [score(contest, args.pairs, args.exact_weight) for contest in contests]
        rewards = torch.cat([result.rewards for result in found])
        clock("judge")

        # 5. advantages, 6. update, 7. sync
        rl.set_advantages(samples, rewards, args)
        updates = rl.learn(run, mini_batches, step, state)
        clock("update")
        rl.sync(run)
        clock("sync")

        done = step + 1
        row = log_row(samples, contests, found, updates, reward_model, clock.seconds) | gaps
        write_rollouts(out / f"rollouts-{run.rank}.jsonl", done, contests, found)
        if plan.held_out and plan.is_due(done, args.eval_every):
            save = partial(save_taken_step, run, log, done, row, state)
            row |= held_out_accuracy(run, plan.my_held_out, reward_model, state, save)
        log.row(done, **row)
        if saving.is_due(done):
            run.save(done, state)

    runs.finish_run(out, run.policy, run.processor, log, run.rank, "policy", parser())


def save_taken_step(run, log, done, row, state):
    """Where the reward model dies in the held-out figures, the step itself is complete."""
    log.row(done, **row)
    run.save(done, state)


def no_checkpoint():
    """Before the first step there is nothing to save."""


if __name__ == "__main__":
    flags.run_stage("downstream_grpo.py", main)
