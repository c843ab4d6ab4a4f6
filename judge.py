"""
The consistency judge (section 3.2, C.11): does the end of a reasoning lead to the verdict that was given? An MLLM behind any
OpenAI-compatible endpoint says so, at temperature 0; the paper's is Qwen2.5-VL-7B-Instruct. It sees text only.

What cannot be judged is None, is counted, and is no agreement. A judge from which nothing comes for --judge_patience seconds
stops the run, which keeps a checkpoint. For C.11: --judge_noise flips answers, --judge random is a coin, --judge none never
agrees, --judge rule is a regular expression and no judge: the last "Response 1|2 is better" (or preferred, superior, ...) of
the reasoning against the verdict.

Differs from the released code: 1) calls are concurrent and cached by content; 2) the reply must begin with yes or no (see
parse_consistency); 3) "no" earns 0, not -1; 4) the judge is told the last 100 words, not the last three lines.

Start the judge with vLLM, on a GPU of its own, and score a file of judgements (rows with "text" and perhaps "label", 0 or 1):
$ python -m vllm.entrypoints.openai.api_server --model Qwen/Qwen2.5-VL-7B-Instruct --host 127.0.0.1 --port 8000 --max-model-len 4096
$ python judge.py --judge_url http://127.0.0.1:8000/v1 --data out/rl/rollouts-0.jsonl --out out/consistency.jsonl
$ python judge.py --judge rule --data out/rl/rollouts-0.jsonl
"""
import asyncio
import hashlib
import json
import re
import sys
import threading
import time
from pathlib import Path

from annotate import Endpoint, Unanswered, command_line
from stable_reinforce import parse, parse_consistency

# Ours: the paper prints none. Yes or no, since a digit could be taken for a response's number.
CONSISTENCY_PROMPT = """Below are the end of a comparison of two responses and the verdict that was given.

Reasoning: {reasoning}

Verdict: Response {choice} is better.

Does the reasoning lead to this verdict? Answer yes or no."""
WORDS = 100  # of the reasoning's end: the conclusion is there, and a prefix of thousands of tokens is not paid for
BETTER = re.compile(r"(?:response|answer) ([12]) (?:is|was|seems|would be|remains) (?:\w+ )?"
                    r"(?:better|preferred|preferable|superior|stronger|best)", re.I)


def question(text):
    """
    What the judge is asked of a judgement, or None: nothing to ask, there is no verdict.

    >>> question("<think>Response 2 is better.</think><answer>2</answer>").splitlines()[2:5]
    ['Reasoning: Response 2 is better.', '', 'Verdict: Response 2 is better.']
    """
    choice, think, _ = parse(text)
    return None if choice is None else CONSISTENCY_PROMPT.format(reasoning=" ".join(think.split()[-WORDS:]), choice=choice)


def rule(text):
    """
    --judge rule: 1 if the last response that the reasoning calls better is the verdict's, 0 if another or none.

    >>> rule("<think>Response 1 is better? No: Response 2 is clearly better.</think><answer>2</answer>")
    1
    >>> rule("<think></think><answer>2</answer>")
    0
    """
    choice, think, _ = parse(text)
    return int(BETTER.findall(think)[-1:] == [str(choice)])


def coin(*what):
    """A number in [0, 1) of anything that prints: the same in every run and on every rank."""
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:8], "big") / 2**64


RULES = {  # --judge NAME: 1 or 0 of a judgement's text, without a model
    "rule": lambda text, seed: rule(text),
    "random": lambda text, seed: int(coin(seed, "coin", text) < 0.5),
    "none": lambda text, seed: 0,
}


class JudgeDead(RuntimeError):
    """No reply came for --judge_patience seconds."""


class ConsistencyJudge:
    """submit(texts) -> a future of [1 | 0 | None]. Calls run in a thread of their own, so that the trainer computes meanwhile."""

    @staticmethod
    def add_flags(group):
        add = group.add_argument
        add("--judge", choices=["model", *RULES], default="model",
            help="who judges consistency; all but model are for C.11")
        add("--judge_url", default="http://127.0.0.1:8000/v1",
            help="OpenAI-compatible endpoint of the judge; its key, where one is needed, in OPENAI_API_KEY")
        add("--judge_model", default="Qwen/Qwen2.5-VL-7B-Instruct", help="its name there (the paper's)")
        add("--judge_noise", type=float, default=0.0, help="share of its answers that are flipped (C.11)")
        add("--judge_concurrency", type=int, default=64, help="calls at once, for each rank")
        add("--judge_timeout", type=float, default=60, help="seconds for a call before it is tried again")
        add("--judge_retries", type=int, default=6, help="times a failed call is tried again; then it is None, which earns nothing")
        add("--judge_patience", type=float, default=600, help="seconds without any reply after which the run stops")

    def __init__(self, args, seed=0):
        if not 0 <= args.judge_noise <= 1:
            raise ValueError(f"--judge_noise is {args.judge_noise}; legal: 0 to 1, the share of answers that are flipped")
        self.args, self.seed, self.cache, self.failure = args, seed, {}, None  # cache: question -> reply
        self.counts = dict.fromkeys(("asked", "calls", "cached", "no_verdict", "failed", "unparsable", "tokens"), 0)
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.endpoint = None
        if args.judge == "model":
            self.endpoint = Endpoint(args.judge_url, args.judge_timeout, args.judge_retries)
            self.slots = asyncio.Semaphore(args.judge_concurrency)

    def submit(self, texts):
        return asyncio.run_coroutine_threadsafe(self.judge(texts), self.loop)

    def consistency(self, texts):
        return self.submit(texts).result()

    async def judge(self, texts):
        kind = self.args.judge
        self.counts["asked"] += len(texts)
        if kind == "model":
            says = await self.ask([question(text) for text in texts])
        else:
            says = [None if parse(text).choice is None else RULES[kind](text, self.seed) for text in texts]
        flip = lambda text: coin(self.seed, "noise", text) < self.args.judge_noise
        return [s if s is None else s ^ flip(text) for text, s in zip(texts, says)]

    async def ask(self, questions):
        """Replies of the model: each different question once, ever."""
        new = [q for q in dict.fromkeys(questions) if q is not None and q not in self.cache]
        self.counts["calls"] += len(new)
        self.counts["no_verdict"] += sum(q is None for q in questions)
        self.counts["cached"] += sum(q is not None for q in questions) - len(new)
        self.last_reply = time.monotonic()
        watch = asyncio.create_task(self.watch())
        work = asyncio.gather(*(self.one(q) for q in new))
        try:
            done, _ = await asyncio.wait({watch, work}, return_when=asyncio.FIRST_COMPLETED)
            if watch in done:
                watch.result()
            await work
        finally:
            watch.cancel()
            work.cancel()
            await asyncio.gather(watch, work, return_exceptions=True)  # both are seen to end: nothing complains at exit
        says = [None if q is None else parse_consistency(self.cache.get(q)) for q in questions]
        self.counts["unparsable"] += sum(s is None and self.cache.get(q) is not None for q, s in zip(questions, says))
        return says

    async def one(self, q):
        async with self.slots:
            began = time.monotonic()
            while True:
                try:
                    reply = await self.endpoint.ask(self.args.judge_model, [{"role": "user", "content": q}], temperature=0, max_tokens=8)
                    break
                except Unanswered as problem:
                    self.failure = str(problem)
                    if self.last_reply > began:  # others were answered meanwhile: it is this question
                        self.counts["failed"] += 1
                        return
                    await asyncio.sleep(0.5)  # nobody was: it is the judge, and --judge_patience decides
        self.last_reply = time.monotonic()
        self.cache[q] = reply["text"]
        self.counts["tokens"] += sum(reply["tokens"])

    async def watch(self):
        while time.monotonic() - self.last_reply < self.args.judge_patience:
            await asyncio.sleep(0.2)
        raise JudgeDead(f"{self.args.judge_url}: the judge has not replied for {self.args.judge_patience:g} s (--judge_patience). "
                        f"Is it up, and is {self.args.judge_model!r} the name of its model? The last failure: {self.failure}")


# ---------------------------------------------------------------------------------------------------


def read_texts(path):
    """Rows of a JSONL file with a "text", perhaps a "label" (0 or 1)."""
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as problem:
            raise ValueError(f"{path}, line {number} is no JSON ({problem}); legal: an object a line") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str) or row.get("label") not in (None, 0, 1):
            raise ValueError(f'{path}, line {number}: legal is an object with "text", a judgement, and perhaps "label", 0 or 1')
        rows.append(row)
    return rows


def parser():
    p = command_line(__doc__)
    p.add_argument("--data", required=True, help='JSONL: "text" is a whole judgement; perhaps "label", 1 = consistent, 0 = not')
    p.add_argument("--out", help='JSONL to write: the rows with "consistency" added, 1, 0 or null; none = only the summary')
    p.add_argument("--seed", type=int, default=0, help="of --judge random and --judge_noise")
    ConsistencyJudge.add_flags(p.add_argument_group("judge"))
    return p


def main():
    p = parser()
    args = p.parse_args()
    try:
        rows = read_texts(args.data)
        judge = ConsistencyJudge(args, args.seed)
        start = time.time()
        says = judge.consistency([row["text"] for row in rows])
    except (ValueError, OSError, JudgeDead) as problem:
        sys.exit(f"judge.py: {problem}")
    seconds = time.time() - start
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text("".join(json.dumps(row | {"consistency": s}) + "\n" for row, s in zip(rows, says)), encoding="utf-8")
    share = lambda k, n: f"{k} of {n} ({100 * k / max(1, n):.1f} %)"
    print(f"{args.judge}: consistent {share(says.count(1), len(rows))}, not {says.count(0)}, no answer {says.count(None)}")
    labels = [(s, row["label"]) for s, row in zip(says, rows) if row.get("label") is not None]
    if labels:
        print(f"agreement with the labels: {share(sum(s == label for s, label in labels), len(labels))}")
    print(f"{seconds:.1f} s, {len(rows) / max(seconds, 1e-9):.1f} judgements a second; "
          + ", ".join(f"{k} {v}" for k, v in judge.counts.items()))


if __name__ == "__main__":
    main()
