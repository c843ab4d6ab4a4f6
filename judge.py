r"""
The consistency judge (section 3.2, C.11): does the end of a reasoning lead to the verdict?
An MLLM behind any OpenAI-compatible server says so, at temperature 0; the paper's is
Qwen2.5-VL-7B-Instruct. It sees text only.

What cannot be judged is None, is counted, and is no agreement. A judge that answers nothing for
--judge_patience seconds, and then not even an easy question, stops the run, which keeps a
checkpoint; so does one that answers none of many questions. For C.11: --judge_noise flips
answers, --judge random is a coin, --judge none never agrees, and --judge rule is a regular
expression instead of a model: the last "Response 1|2 is better" (or preferred, superior, ...) of
the reasoning against the verdict.

Differs from the released code:
1) calls are concurrent, and each question is asked once
2) the reply must begin with yes or no (see parse_consistency)
3) "no" earns 0, not -1
4) the judge reads the last 100 words of the reasoning, not its last three lines

Start the judge with vLLM, on a GPU of its own, and score a file of judgements (rows with "text" and
perhaps "label", 0 or 1):
$ python -m vllm.entrypoints.openai.api_server --model Qwen/Qwen2.5-VL-7B-Instruct \
    --host 127.0.0.1 --port 8000 --max-model-len 4096
$ python judge.py --judge_url http://127.0.0.1:8000/v1 --data out/rl/rollouts-0.jsonl \
    --out out/consistency.jsonl
$ python judge.py --judge rule --data out/rl/rollouts-0.jsonl

With --out each answer is kept as it comes, in OUT.journal: the same command asks for what is
missing, and for nothing else.
"""

import asyncio
import contextlib
import hashlib
import json
import re
import time

from core.endpoint import Endpoint, NoReply, background_loop
from core.files import InputError, Journal, atomic_write, jsonl_rows
from core.flags import (
    add_request_flag,
    command_line,
    number,
    random_seed,
    run_stage,
    server_url,
    whole,
)
from core.seeds import uniform_from
from stable_reinforce import parse, parse_consistency

# Ours: the paper prints none. It asks for yes or no, since a digit could be a response's number.
CONSISTENCY_PROMPT = """Below are the end of a comparison of two responses and the verdict that was given.

Reasoning: {reasoning}

Verdict: Response {choice} is better.

Does the reasoning lead to this verdict? Answer yes or no."""  # noqa: E501
WORDS = 100  # the conclusion is at the end, and nobody pays for a prefix of thousands of tokens
BETTER = re.compile(
    r"(?:response|answer) ([12]) (?:is|was|seems|would be|remains) (?:\w+ )?"
    r"(?:better|preferred|preferable|superior|stronger|best)",
    re.IGNORECASE,
)


EASY_JUDGEMENT = "<think>Response 1 is better.</think><answer>1</answer>"
MANY = 8  # different questions; if none of them is answered, the fault is the judge's


class JudgeDead(InputError):
    """No reply came for --judge_patience seconds, or none to many questions."""


def judge_question(text):
    """
    What the judge is asked about a judgement; None if it has no verdict.

    >>> text = "<think>Response 2 is better.</think><answer>2</answer>"
    >>> judge_question(text).splitlines()[2:5]
    ['Reasoning: Response 2 is better.', '', 'Verdict: Response 2 is better.']
    """
    verdict = parse(text)
    if verdict.choice is None:
        return None
    conclusion = " ".join(verdict.think.split()[-WORDS:])
    return CONSISTENCY_PROMPT.format(reasoning=conclusion, choice=verdict.choice)


def rule(text):
    """
    1 if the last response that the reasoning calls better is the verdict's, otherwise 0.

    >>> rule("<think>Response 1 is better? Response 2 is far better.</think><answer>2</answer>")
    1
    >>> rule("<think></think><answer>2</answer>")
    0
    """
    verdict = parse(text)
    conclusions = BETTER.findall(verdict.think)
    return int(bool(conclusions) and conclusions[-1] == str(verdict.choice))


def judge_without_model(kind, text, seed):
    """1, 0, or None for a text without a verdict."""
    if parse(text).choice is None:
        return None
    if kind == "rule":
        return rule(text)
    if kind == "random":
        return int(uniform_from(seed, "coin", text) < 0.5)
    return 0  # "none"


class Questions:
    """
    Questions to the model behind --judge_url: many at a time, each different one once.

    request(question) returns the turns and the other fields of the call; read(reply) returns the
    answer, which is kept. downstream_grpo.py asks its reward model in the same way.
    """

    def __init__(self, args, counts, request, read, easy):
        self.args = args
        self.counts = counts  # adds to "calls", "cached", "failed", "tokens"
        self.request = request
        self.read = read
        self.easy = easy  # a question that every judge can answer
        self.answers = {}  # of all questions so far
        self.keep = None  # called with each new question and its answer
        self.endpoint = Endpoint(
            args.judge_url,
            args.judge_timeout,
            args.judge_retries,
            args.judge_request,
            url_flag="--judge_url",
            model_flag="--judge_model",
        )
        self.slots = asyncio.Semaphore(args.judge_concurrency)
        self.last_reply = 0.0  # by time.monotonic()

    async def ask(self, questions):
        """{question: answer}. A question that alone got no answer is left out."""
        new = [q for q in dict.fromkeys(questions) if q not in self.answers]
        self.counts["calls"] += len(new)
        self.counts["cached"] += len(questions) - len(new)
        self.last_reply = time.monotonic()
        tasks = [asyncio.create_task(self._ask_one(question)) for question in new]
        try:
            await self._wait_for(tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if len(new) >= MANY and not any(question in self.answers for question in new):
            raise JudgeDead(
                f"{self.args.judge_url}: none of {len(new)} questions was answered; the last "
                f"failure: {tasks[-1].result()}"
            )
        return {q: self.answers[q] for q in questions if q in self.answers}

    async def _wait_for(self, tasks):
        """Waits while replies come; raises what any task raises."""
        pending = set(tasks)
        while pending:
            done, pending = await asyncio.wait(
                pending, timeout=0.2, return_when=asyncio.FIRST_EXCEPTION
            )
            for task in done:
                task.result()
            if pending and self._silence() >= self.args.judge_patience:
                failure = await self._ask_the_easy_one()
                if failure and self._silence() >= self.args.judge_patience:
                    raise JudgeDead(
                        f"{self.args.judge_url}: no reply for {self.args.judge_patience:g} s "
                        f"(--judge_patience); the last failure: {failure}"
                    )

    def _silence(self):
        return time.monotonic() - self.last_reply

    async def _ask_one(self, question):
        """Asks until there is an answer, or until the fault is not the judge's; returns it."""
        async with self.slots:
            turns, fields = self.request(question)
            while True:
                start = time.monotonic()
                try:
                    reply = await self.endpoint.ask(self.args.judge_model, turns, **fields)
                    answer = self.read(reply)
                except NoReply as failure:
                    # the judge answers others: what got no reply is this question alone
                    if self.last_reply > start or not await self._ask_the_easy_one():
                        self.counts["failed"] += 1
                        return failure.reason
                    await asyncio.sleep(0.5)  # the judge is down, and may come back
                else:
                    self.last_reply = time.monotonic()
                    self.counts["tokens"] += reply.prompt_tokens + reply.completion_tokens
                    self.answers[question] = answer
                    if self.keep:
                        self.keep(question, answer)
                    return None

    async def _ask_the_easy_one(self):
        """Once. Returns None if it is answered, otherwise why it is not."""
        turns, fields = self.request(self.easy)
        try:
            self.read(await self.endpoint.ask_once(self.args.judge_model, turns, **fields))
        except NoReply as failure:
            if failure.refused:
                raise InputError(
                    f"{self.args.judge_url}: refuses even an easy question: {failure.reason}"
                ) from None
            return failure.reason
        self.last_reply = time.monotonic()
        return None


def consistency_request(question):
    return [{"role": "user", "content": question}], {"temperature": 0, "max_tokens": 8}


def read_consistency(reply):
    return parse_consistency(reply.text)


def add_server_flags(add, who, model, timeout):
    add(
        "--judge_url",
        type=server_url,
        default="http://127.0.0.1:8000/v1",
        help=f"OpenAI-compatible server of {who}; its key, if it needs one, in OPENAI_API_KEY",
    )
    add("--judge_model", default=model, help="the model's name there (with vLLM: as it started)")
    add_request_flag(add, "--judge_request")
    add("--judge_noise", type=number(0, 1), default=0.0, help="share of flipped answers (C.11)")
    add(
        "--judge_concurrency", type=whole(1, 10_000), default=64, help="calls at once, on each rank"
    )
    add(
        "--judge_timeout",
        type=number(0.1, 86_400),
        default=timeout,
        help="seconds until a call is tried again",
    )
    add(
        "--judge_retries",
        type=whole(),
        default=6,
        help="how often a failed call is tried again; then it counts as no answer",
    )
    add(
        "--judge_patience",
        type=number(),
        default=600.0,
        help="seconds without any reply after which the run stops",
    )


def ask_now(questions, loop):
    """The easy question, which no later count contains."""
    asyncio.run_coroutine_threadsafe(questions.ask([questions.easy]), loop).result()
    questions.counts.update(new_counts())


def new_counts():
    names = ("asked", "calls", "cached", "no_verdict", "failed", "unparsable", "tokens")
    return dict.fromkeys(names, 0)


class ConsistencyJudge:
    """Judges in a thread of its own, so that the trainer computes meanwhile."""

    @staticmethod
    def add_flags(group):
        add = group.add_argument
        add(
            "--judge",
            choices=["model", "rule", "random", "none"],
            default="model",
            help="who judges consistency; all but model are for C.11",
        )
        add_server_flags(add, "the judge", "Qwen/Qwen2.5-VL-7B-Instruct", timeout=60.0)

    def __init__(self, args, seed=0):
        self.args = args
        self.seed = seed
        self.counts = new_counts()
        self.loop = background_loop()
        if args.judge == "model":
            easy = judge_question(EASY_JUDGEMENT)
            self.questions = Questions(
                args, self.counts, consistency_request, read_consistency, easy
            )

    def check(self):
        """Asks one easy question: a judge that cannot answer stops a run before it begins."""
        if self.args.judge == "model":
            ask_now(self.questions, self.loop)

    def submit(self, texts):
        """A future of [1 | 0 | None], one for each judgement."""
        return asyncio.run_coroutine_threadsafe(self._judge(texts), self.loop)

    def consistency(self, texts):
        return self.submit(texts).result()

    async def _judge(self, texts):
        self.counts["asked"] += len(texts)
        if self.args.judge == "model":
            answers = await self._ask_model(texts)
        else:
            answers = [judge_without_model(self.args.judge, text, self.seed) for text in texts]
        return [self._with_noise(answer, text) for answer, text in zip(answers, texts)]

    async def _ask_model(self, texts):
        questions = [judge_question(text) for text in texts]
        asked = [question for question in questions if question is not None]
        answers = await self.questions.ask(asked)
        unparsable = [q for q in asked if q in answers and answers[q] is None]
        self.counts["no_verdict"] += len(texts) - len(asked)
        self.counts["unparsable"] += len(unparsable)
        return [answers.get(question) for question in questions]

    def _with_noise(self, answer, text):
        is_flipped = uniform_from(self.seed, "noise", text) < self.args.judge_noise
        return 1 - answer if is_flipped and answer is not None else answer


# ------------------------------------------------------------------------------------------------
# The script: score a file


def read_rows(path):
    """Rows with "text" and perhaps "label"."""
    rows = []
    for where, row in jsonl_rows(path):
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise InputError(f'{where}: expected an object with "text", a judgement')
        if row.get("label") not in (None, 0, 1):
            raise InputError(f"{where}: label is {json.dumps(row['label'])}; expected 0, 1 or none")
        rows.append(row)
    if not rows:
        raise InputError(f"{path} has no rows; expected JSON lines with a judgement each")
    return rows


@contextlib.contextmanager
def answers_kept(judge, path):
    """Takes the answers that an earlier run kept in this journal, and keeps the new ones there."""
    questions = judge.questions
    prompt = hashlib.sha256(CONSISTENCY_PROMPT.encode()).hexdigest()[:12]
    made_with = {"judge_model": judge.args.judge_model, "prompt": prompt}
    if judge.args.judge_request:
        made_with["judge_request"] = judge.args.judge_request
    with Journal(path) as journal:
        for where, _, row in journal.rows_made_with(made_with):
            question, answer = read_kept_answer(row, where)
            questions.answers[question] = answer

        def keep(question, answer):
            journal.append([{"question": question, "answer": answer}])

        questions.keep = keep
        yield


def read_kept_answer(row, where):
    is_answer = isinstance(row, dict) and row.get("answer", "none") in (0, 1, None)
    if is_answer and isinstance(row.get("question"), str):
        return row["question"], row["answer"]
    raise InputError(
        f"{where}: expected a question and its answer, 0, 1 or null; remove this line, and the "
        "question is asked again"
    )


def write_rows(path, rows, answers):
    with atomic_write(path) as file:
        for row, answer in zip(rows, answers):
            file.write(json.dumps(row | {"consistency": answer}).encode() + b"\n")


def percent(part, whole):
    return f"{part} of {whole} ({100 * part / max(1, whole):.1f} %)"


def print_summary(rows, answers, judge, seconds):
    consistent = percent(answers.count(1), len(rows))
    print(
        f"{judge.args.judge}: consistent {consistent}, "
        f"not {answers.count(0)}, no answer {answers.count(None)}"
    )
    labels = [row.get("label") for row in rows]
    labelled = [(answer, label) for answer, label in zip(answers, labels) if label is not None]
    if labelled:
        agreed = sum(answer == label for answer, label in labelled)
        print(f"agreement with the labels: {percent(agreed, len(labelled))}")
    speed = len(rows) / max(seconds, 1e-9)
    counts = ", ".join(f"{name} {count}" for name, count in judge.counts.items())
    print(f"{seconds:.1f} s, {speed:.1f} judgements a second; {counts}")


def parser():
    p = command_line(__doc__)
    p.add_argument(
        "--data",
        required=True,
        help='JSONL: "text" is a whole judgement; perhaps "label", 1 = consistent, 0 = not',
    )
    out_help = 'write the rows here, with "consistency" added: 1, 0 or null; keeps what is answered'
    p.add_argument("--out", help=out_help)
    p.add_argument(
        "--seed", type=random_seed, default=0, help="of --judge random and --judge_noise"
    )
    ConsistencyJudge.add_flags(p.add_argument_group("judge"))
    return p


def main():
    args = parser().parse_args()
    rows = read_rows(args.data)
    judge = ConsistencyJudge(args, args.seed)
    kept = contextlib.nullcontext()
    if args.out and args.judge == "model":
        kept = answers_kept(judge, f"{args.out}.journal")
    start = time.monotonic()
    with kept:
        answers = judge.consistency([row["text"] for row in rows])
    seconds = time.monotonic() - start
    if args.out:
        write_rows(args.out, rows, answers)
    print_summary(rows, answers, judge, seconds)


if __name__ == "__main__":
    run_stage("judge.py", main, if_stopped="with --out, the same command continues from here")
