"""
What judges rows: vLLM in this process, an OpenAI-compatible server, reward heads, given rewards.

A backend has answer(jobs): it takes jobs from a deque, which may grow meanwhile, and yields
(job, its judgements) as they are finished, or (job, LeftOut) for a row that it cannot judge.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import time
from collections import Counter, defaultdict, deque
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import NamedTuple

import numpy as np
import torch

from core.encoding import collate, encode, encode_prompt, load_processor, prompt_ids, read_media
from core.endpoint import Endpoint, NoReply, background_loop, cost, to_openai
from core.judge_prompt import load_prompt
from core.judgements import LeftOut, digest, left_out_line
from core.pairs import InputError, critique_turns, user_turn
from core.pictures import BadPicture
from core.policy import load_policy
from core.sampler import HFSampler, start_vllm, vllm_media
from core.training import micro_batches
from stable_reinforce import parse

PREPARED_JOBS = 64  # jobs whose images are read ahead for vLLM
SAMPLES_IN_FLIGHT = 512  # at least; vLLM runs 256 at a time on a CPU, 1,024 on a large GPU
MOST_REFUSED = 8  # requests that a server refuses before it has answered any
TOKENS_OF_A_BATCH = 16384  # of the reward heads, padding included
ROWS_OF_A_BATCH = 64
ESTIMATE_AFTER = 36  # judgements, of what a server will take for all of them
NEARLY_ALL = 0.9  # cells whose samples are one text, before it is told
LARGEST_SCORE = 1e100  # of a reward in a file


def collect(rows, backend, done, protocol, journal=None, left_out_journal=None):
    """
    Makes the judgements of the rows that are not in `done`, and appends them to the journal.
    Returns {key of a row that is left out: the line about it}, which are appended to theirs.
    """
    jobs = deque()
    left_out = {}
    in_flight = Counter()  # samples of each row that were asked for and are not there yet
    progress = Progress()

    def ask_for(row):
        more = protocol.next_jobs(row, done)
        jobs.extend(more)
        count = sum(job.count for job in more)
        in_flight[row.key] += count
        progress.total += count

    for row in rows:
        ask_for(row)
    for job, judgements in backend.answer(jobs):
        row = job.row
        if isinstance(judgements, LeftOut):
            progress.total -= job.count
            if row.key not in left_out:
                left_out[row.key] = left_out_line(row, judgements.reason)
                report_left_out(left_out[row.key], left_out_journal)
            continue
        if journal is not None:
            journal.append([dataclasses.asdict(judgement) for judgement in judgements])
        for judgement in judgements:
            done[judgement.key] = judgement
        in_flight[row.key] -= job.count
        if in_flight[row.key] == 0:
            ask_for(row)  # early stopping may want more
        progress.add(judgements)
        if journal is not None:
            progress.print_estimate_once(backend)
            progress.print_now_and_then()
    return left_out


def report_left_out(line, journal):
    if journal is not None:
        journal.append([line])
        print(f"{line['bench']} row {line['row']} is left out: {line['reason']}", flush=True)


class Progress:
    """Prints every ten seconds how far the judging is."""

    def __init__(self):
        self.start = time.monotonic()
        self.printed = 0.0  # seconds after the start
        self.total = 0
        self.made = 0
        self.tokens = 0
        self.has_estimate = False

    def add(self, judgements):
        self.made += len(judgements)
        self.tokens += sum(judgement.tokens for judgement in judgements)

    def print_estimate_once(self, backend):
        """What a server, which counts the prompts' tokens, will have cost in all."""
        left = self.total - self.made
        read, written = getattr(backend, "prompt_tokens", 0), self.tokens
        if self.has_estimate or not read or self.made < ESTIMATE_AFTER or not left:
            return
        self.has_estimate = True
        minutes = left * (time.monotonic() - self.start) / self.made / 60
        times = self.total / self.made
        estimate = (
            f"{left} judgements left, about {minutes:.0f} minutes; "
            f"tokens: {read:,} read so far, about {read * times:,.0f} in all; "
            f"{written:,} written so far, about {written * times:,.0f} in all"
        )
        if backend.args.price:
            estimate += f"; about {cost(read * times, written * times, backend.args.price)}"
        print(estimate, flush=True)

    def print_now_and_then(self):
        seconds = time.monotonic() - self.start
        if seconds > self.printed + 10 or self.made == self.total:
            self.printed = seconds
            speed = self.tokens / seconds
            made = f"{self.made} of {self.total} judgements"
            print(f"{made} in {seconds:.0f} s, {speed:.0f} tokens/s", flush=True)


def seed_of(job, seed):
    """The seed of a job's first sample, whatever else is asked for; the next ones count on."""
    return int(digest(seed, *job.row.key, job.order)[:6], 16) * 100 + job.first


def verdict_index(text, tokens, decode=str):
    """The index of the token that is the verdict: the last digit before the last </answer>."""
    if parse(text).choice is None:
        return None
    end = "</answer>"
    tail, is_inside = "", False
    for index in reversed(range(len(tokens))):
        token = decode(tokens[index])
        if is_inside and token.strip() in ("1", "2"):
            return index
        tail = (token + tail)[: len(token) + len(end)]  # it may be split over tokens
        is_inside = is_inside or end in tail
    return None


# --- vLLM


@contextlib.contextmanager
def apart_from_torchrun(tensor_parallel):
    """Each rank starts a vLLM on GPUs of its own, which must not see torchrun's ranks."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    torchrun = {name: os.environ.pop(name) for name in names if name in os.environ}
    if torchrun:
        every_gpu = ",".join(map(str, range(64)))
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", every_gpu).split(",")
        first = int(torchrun["LOCAL_RANK"]) * tensor_parallel
        own_gpus = gpus[first : first + tensor_parallel]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(own_gpus)
    try:
        yield
    finally:
        os.environ.update(torchrun)


class VLLMBackend:
    """vLLM in this process. Threads read pictures ahead, once for all samples of a job."""

    def __init__(self, args):
        self.args = args
        self.prompt = load_prompt(args.prompt)
        self.processor = load_processor(args.model, max_pixels=args.max_pixels)
        tokenizer = self.processor.tokenizer
        self.digits = tokenizer.encode("12", add_special_tokens=False)
        if tokenizer.convert_ids_to_tokens(self.digits) != ["1", "2"]:
            raise InputError(
                f"--model {args.model} reads 12 as the tokens {self.digits}; "
                "expected a model with a token for each digit, as Qwen has"
            )
        with apart_from_torchrun(args.tensor_parallel):
            llm = start_vllm(
                args.model,
                args.context,
                tensor_parallel_size=args.tensor_parallel,
                limit_mm_per_prompt={"image": 16, "video": 1},
            )
        self.engine = llm.llm_engine
        at_once = self.engine.vllm_config.scheduler_config.max_num_seqs
        self.samples_in_flight = max(SAMPLES_IN_FLIGHT, at_once)

    def answer(self, jobs):
        from vllm.exceptions import VLLMClientError

        prepared = deque()  # (job, future of its request)
        in_flight = {}  # request id: job
        with ThreadPoolExecutor(4) as pool:
            while jobs or prepared or in_flight:
                while jobs and len(prepared) < PREPARED_JOBS:
                    job = jobs.popleft()
                    prepared.append((job, pool.submit(self._request, job)))
                samples = sum(job.count for job in in_flight.values())
                while prepared and samples < self.samples_in_flight:
                    job, request = prepared.popleft()
                    try:
                        in_flight[self._send(job, request)] = job
                    except (ValueError, VLLMClientError) as problem:
                        yield job, LeftOut(f"{problem}")
                    else:
                        samples += job.count
                for finished in self.engine.step():
                    job = in_flight.pop(finished.request_id)
                    completions = enumerate(finished.outputs)
                    yield job, [self._judgement(job, number, one) for number, one in completions]

    def _request(self, job):
        """(prompt, sampling parameters) for vLLM."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        turns = self.prompt.turns(job.row, swapped=job.order == 1)
        media = read_media(self.processor, turns)
        prompt = {"prompt_token_ids": prompt_ids(self.processor, turns)} | vllm_media(media)
        sampling = SamplingParams(
            n=job.count,
            temperature=self.args.temperature,
            max_tokens=self.args.max_new_tokens,
            seed=seed_of(job, self.args.seed),
            logprob_token_ids=self.digits,
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        return prompt, sampling

    def _send(self, job, request):
        row = job.row
        request_id = f"{row.bench} row {row.row}, order {job.order}, sample {job.first}"
        self.engine.add_request(request_id, *request.result())
        return request_id

    def _judgement(self, job, number, completion):
        decode = self.processor.tokenizer.decode
        text, token_ids = completion.text, completion.token_ids
        index = verdict_index(text, token_ids, decode)
        logps = (None, None)
        if index is not None:
            there = completion.logprobs[index]
            logps = [float(there[digit].logprob) for digit in self.digits]
        finish = completion.finish_reason
        read = self.prompt.choice_of
        return job.judgement(number, text, len(token_ids), finish, logps, read)


# --- a server


class EndpointBackend:
    """An OpenAI-compatible server; with log-probabilities if it gives them, which few do."""

    def __init__(self, args):
        self.args = args
        self.prompt = load_prompt(args.prompt)
        self.server = Endpoint(args.base_url, timeout=600, retries=30, request=args.request)
        self.loop = background_loop()  # the caller, a notebook for example, may have one running
        self.logprob_fields = {"logprobs": True, "top_logprobs": 5}
        self.has_replied = False
        self.prompt_tokens = 0  # of all replies
        self.refused = 0  # jobs

    def answer(self, jobs):
        in_flight = {}  # future: job
        try:
            while jobs or in_flight:
                while jobs and len(in_flight) < self.args.concurrency:
                    job = jobs.popleft()
                    future = asyncio.run_coroutine_threadsafe(self._judge(job), self.loop)
                    in_flight[future] = job
                for future in wait(in_flight, return_when=FIRST_COMPLETED).done:
                    yield in_flight.pop(future), self._result(future)
        finally:
            for future in in_flight:
                future.cancel()

    def _result(self, future):
        try:
            judgements = future.result()
        except BadPicture as problem:
            return LeftOut(str(problem))
        except NoReply as failure:
            if not failure.refused:
                raise self._no_answer(failure.reason) from None
            self.refused += 1
            # once others have had replies, a request that is refused is this row's own fault
            if self.refused == MOST_REFUSED and not self.has_replied:
                more = f"{self.refused} requests were refused and none was answered, the last one: "
                raise self._no_answer(more + failure.reason) from None
            return LeftOut(failure.reason)
        self.has_replied = True
        return judgements

    def _no_answer(self, reason):
        return InputError(
            f"--base_url {self.args.base_url}: {reason[:200]}; fix the cause and run again (with "
            "--retry_left_out, if rows were left out)"
        )

    async def _judge(self, job):
        turns = self.prompt.turns(job.row, swapped=job.order == 1)
        max_pixels = self.args.max_pixels or 2**62
        turns = await asyncio.to_thread(to_openai, turns, max_pixels, self.args.max_frames)
        judgements = []
        for number in range(job.count):
            reply = await self._ask(turns, seed_of(job, self.args.seed) + number)
            self.prompt_tokens += reply.prompt_tokens
            judgements.append(self._judgement(job, number, reply))
        return judgements

    async def _ask(self, turns, seed):
        fields = {
            "temperature": self.args.temperature,
            "max_completion_tokens": self.args.max_new_tokens,
            "seed": seed,
        }
        asked_for_logprobs = bool(self.logprob_fields)
        try:
            return await self.server.ask(self.args.model, turns, **fields, **self.logprob_fields)
        except NoReply as failure:
            if asked_for_logprobs and "logprobs" in failure.reason:
                self.logprob_fields = {}  # the server has none
                return await self._ask(turns, seed)
            raise

    def _judgement(self, job, number, reply):
        tokens = reply.tokens or []
        index = verdict_index(reply.text, tokens)
        logps = {}
        if index is not None:
            for token, logp in reversed(reply.top_logprobs[index].items()):
                logps[token.strip()] = (
                    logp  # the likeliest comes last and wins over "1" with a space
                )
        length = reply.completion_tokens or len(tokens)
        both = (logps.get("1"), logps.get("2"))
        read = self.prompt.choice_of
        return job.judgement(number, reply.text, length, reply.finish, both, read)


def warn_of_equal_samples(rows, done, args):
    """A warning, as lines of text, if a server's samples look as if it did not sample."""
    if not args.base_url or args.temperature == 0:
        return []
    keys = {row.key for row in rows}
    texts = defaultdict(list)  # of a cell: a row in one order
    for judgement in done.values():
        *row_key, order, _ = judgement.key
        if tuple(row_key) in keys:
            texts[*row_key, order].append(judgement.text)
    cells = [of_cell for of_cell in texts.values() if len(of_cell) > 1]
    equal = sum(len(set(of_cell)) == 1 for of_cell in cells)
    if not cells or equal < NEARLY_ALL * len(cells):
        return []
    return [
        f"**WARNING: in {equal} of {len(cells)} cells (a row in one order) all samples are the "
        f"same text at temperature {args.temperature:g}. The server seems to ignore the sampling "
        "settings; then voting, any and early stopping mean nothing.**"
    ]


# --- rewards


class Rewards(NamedTuple):
    first: float  # of the first response, as the row lists them
    second: float
    text: str = ""  # the critiques, if there are any


class RewardBackend:
    """Judges by score(rows) -> [Rewards]: the higher one is the verdict, equal ones are none."""

    def __init__(self, score):
        self.score = score

    def answer(self, jobs):
        known = {}  # a row is scored once for both orders
        while jobs:
            batch = [jobs.popleft() for _ in range(min(len(jobs), ROWS_OF_A_BATCH))]
            new = {job.row.key: job.row for job in batch if job.row.key not in known}
            known.update(zip(new, self._rewards(list(new.values()))))
            for job in batch:
                yield job, self._judgements(job, known[job.row.key])

    def _rewards(self, rows):
        """The Rewards of each row; LeftOut for one whose picture cannot be read."""
        try:
            return self.score(rows)
        except BadPicture as problem:
            if len(rows) == 1:
                return [LeftOut(str(problem))]
        found = []
        for row in rows:  # one by one: it is one of them
            found += self._rewards([row])
        return found

    def _judgements(self, job, rewards):
        if isinstance(rewards, LeftOut):
            return rewards
        judgement = self._judgement(job, rewards)
        samples = range(job.first, job.first + job.count)
        return [dataclasses.replace(judgement, sample=sample) for sample in samples]

    def _judgement(self, job, rewards):
        """The two log-probabilities are the rewards' log-softmax."""
        first, second = rewards.first, rewards.second
        if job.order == 1:
            first, second = second, first
        norm = float(np.logaddexp(first, second))
        judgement = job.judgement(0, rewards.text, logps=(first - norm, second - norm))
        choice = None
        if first != second:
            choice = 1 if first > second else 2
        return dataclasses.replace(judgement, choice=choice)


def is_score_row(row):
    if not isinstance(row, dict) or not isinstance(row.get("bench"), str):
        return False
    scores = row.get("scores")
    if type(row.get("row")) is not int or not isinstance(scores, list) or len(scores) < 2:
        return False
    return all(type(score) in (int, float) and abs(score) <= LARGEST_SCORE for score in scores)


class RewardsInFile:
    """
    Rewards made elsewhere: bench, row and scores of the two responses as the row lists them; or of
    all responses of a list, and row is the list's number.
    """

    def __init__(self, path, rows):
        self.path = path
        self.scores = {}  # key: the line's place in the file, its scores
        for where, row in rows:
            if not is_score_row(row):
                raise no_scores(where, row, "two finite numbers")
            key = row["bench"], row["row"]
            if key in self.scores:
                raise InputError(f"{where}: {key[0]} row {key[1]} has scores already; remove one")
            self.scores[key] = where, row

    def score(self, rows):
        return [self._rewards(row) for row in rows]

    def _rewards(self, row):
        number, answers, expected = row.row, [0, 1], 2
        if row.duel:
            number, answers, expected = row.duel.list_number, row.duel.answers, len(row.duel.ranks)
        if (row.bench, number) not in self.scores:
            there = f"it has scores for {len(self.scores)} rows"
            raise InputError(f"--scores {self.path} lacks {row.bench} row {number}; {there}")
        where, line = self.scores[row.bench, number]
        if len(line["scores"]) != expected:
            count = "two" if expected == 2 else expected
            raise no_scores(where, line, f"{count} finite numbers")
        first, second = (float(line["scores"][answer]) for answer in answers)
        return Rewards(first, second)


def no_scores(where, row, expected):
    """The error for a line that is not as expected."""
    found = json.dumps(row)[:80]
    return InputError(f"{where}: expected bench, row and scores, {expected}, got {found}")


class RewardHeads:
    """The reward heads of sft.py: scalar scores a response, critic its own critique of it."""

    def __init__(self, policy, processor, device, max_new_tokens):
        self.policy = policy.to(device).eval()
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.device = device
        self.max_new_tokens = max_new_tokens  # of a critique

    @torch.no_grad()
    def score(self, rows):
        if self.policy.head_kind == "scalar":
            samples = self._responses(rows)
            texts = [""] * len(samples)
        else:
            samples = self._critiques(rows)
            texts = [
                self.tokenizer.decode(sample.response_ids, skip_special_tokens=True)
                for sample in samples
            ]
        scores = self._scores(samples)
        rewards = []
        for first in range(0, len(samples), 2):
            second = first + 1
            text = f"{texts[first]}\n\n{texts[second]}".strip()
            rewards.append(Rewards(scores[first], scores[second], text))
        return rewards

    def _responses(self, rows):
        """Question and response: two samples a row."""
        samples = []
        for row in rows:
            turns = user_turn(row.images, row.video, row.question)
            samples += [encode(self.processor, turns, response) for response in row.responses]
        return samples

    def _critiques(self, rows):
        """Question, response and the critic's greedy critique: two samples a row."""
        samples = []
        for row in rows:
            samples += [encode_prompt(self.processor, critique_turns(row, i)) for i in (0, 1)]
        sampler = HFSampler(self.policy, self.processor, self.device)
        critiques = sampler.generate(samples, temperature=0.0, max_tokens=self.max_new_tokens)
        for sample, (critique,) in zip(samples, critiques):
            sample.response_ids = critique.ids
        return samples

    def _scores(self, samples):
        for place, sample in enumerate(samples):
            sample.place = place
        groups = [[sample] for sample in samples]
        scores = {}
        for batch in micro_batches(groups, TOKENS_OF_A_BATCH):
            inputs = collate(batch, self.tokenizer.pad_token_id, self.device)
            for sample, score in zip(batch, self.policy(inputs)["score"].tolist()):
                scores[sample.place] = score
        return scores


def load_reward_heads(args):
    """The RewardHeads of --model, on this rank's GPU if there is one."""
    policy = load_policy(args.model)
    processor = load_processor(args.model, max_pixels=args.max_pixels)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return RewardHeads(policy, processor, device, args.max_new_tokens)
