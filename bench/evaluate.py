"""
Judgements a second: evaluate.py's vLLM backend against the loop that one writes first,
transformers' generate on one judgement at a time (so the paper's released evaluators work). Same
model, same pairs, same machine, sampled at temperature 1; loading is timed apart. It also counts
how often a picture is processed.

$ python bench/evaluate.py --model out/toy/rl --data out/toy/data/dev/pairs.jsonl
"""

import os
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate
from bench.output import made_by, print_and_save
from core import judging
from core.encoding import encode_prompt, load_processor
from core.flags import command_line
from core.pairs import judging_turns
from core.policy import load_policy
from core.sampler import HFSampler
from core.tables import markdown_table


@dataclass
class Result:
    load: float  # seconds until it is ready to judge
    seconds: float  # of judging
    judgements: int
    tokens: int
    pictures: int = 0  # how often one went through Qwen's image processor

    def cells(self, samples):
        """{column: value}; `samples` judgements make a pair."""
        pairs = self.judgements / samples
        return {
            "load": f"{self.load:,.1f}",
            "seconds": f"{self.seconds:,.2f}",
            "judgements": f"{self.judgements:,}",
            "tokens": f"{self.tokens:,}",
            "pairs a second": f"{pairs / self.seconds:,.3f}",
            "tokens a second": f"{self.tokens / self.seconds:,.0f}",
            "images processed a judgement": f"{self.pictures / self.judgements:,.3f}",
        }


def count_pictures(counts):
    """From now on, count each picture that goes through Qwen's image processor."""
    from transformers import Qwen2VLImageProcessor

    real = Qwen2VLImageProcessor.preprocess

    def preprocess(self, images, *args, **kwargs):
        counts["pictures"] += len(images) if isinstance(images, (list, tuple)) else 1
        return real(self, images, *args, **kwargs)

    Qwen2VLImageProcessor.preprocess = preprocess


def by_vllm(flags, rows):
    start = time.monotonic()
    backend, protocol = evaluate.make_backend(flags), evaluate.protocol_of(flags)
    judging.collect(rows[:2], backend, {}, protocol)  # the first requests compile and allocate
    loaded, done = time.monotonic(), {}
    judging.collect(rows[2:], backend, done, protocol)
    seconds = time.monotonic() - loaded
    tokens = sum(judgement.tokens for judgement in done.values())
    return Result(loaded - start, seconds, len(done), tokens)


def by_loop(flags, rows, limit):
    """One judgement at a time, for at most `limit` seconds."""
    import torch

    start = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy, processor = load_policy(flags.model), load_processor(flags.model)
    sampler = HFSampler(policy.to(device), processor, device)
    protocol = evaluate.protocol_of(flags)
    loaded = time.monotonic()
    result = Result(loaded - start, 0.0, 0, 0)
    for row in rows[2:]:
        for job in protocol.next_jobs(row, {}):
            turns = judging_turns(row, swapped=job.order == 1)
            for _ in range(job.count):
                if time.monotonic() > loaded + limit:
                    return result
                prompt = encode_prompt(processor, turns)
                ((generated,),) = sampler.generate(
                    [prompt], [result.judgements], max_tokens=flags.max_new_tokens
                )
                processor.tokenizer.decode(generated.ids)
                result.judgements += 1
                result.tokens += len(generated.ids)
                result.seconds = time.monotonic() - loaded
    return result


def section(args, results):
    """The numbers in markdown."""
    cells = {name: result.cells(args.samples) for name, result in results.items()}
    rates = {name: r.judgements / r.seconds for name, r in results.items()}
    head = ["", *cells["vLLM"]]
    rows = [[name, *values.values()] for name, values in cells.items()]
    about = (
        "evaluate.py's vLLM backend against a loop over judgements with transformers' generate: "
        f"{rates['vLLM'] / rates['loop']:.1f} times as many pairs a second, {args.samples} "
        f"judgements a pair. {made_by('evaluate.py')}"
    )
    return f"## Judging\n\n{about}\n\n{markdown_table(head, rows).strip()}\n"


def parser():
    p = command_line(__doc__)
    add = p.add_argument
    add("--model", required=True, help="folder of a judge")
    add("--data", required=True, help="JSONL file of pairs")
    add("--limit", type=int, default=130, help="pairs")
    add("--samples", type=int, default=16, help="judgements a pair")
    add("--max_new_tokens", type=int, default=128, help="of a judgement")
    add("--context", type=int, default=1024, help="of prompt and judgement")
    add("--seconds", type=float, default=60, help="of the loop, which need not finish")
    add("--out", help="file for the numbers, in markdown")
    return p


def flags_of_evaluate(args):
    words = ["--bench", f"pairs={args.data}", "--model", args.model, "--out", os.devnull]
    for name in ("limit", "samples", "max_new_tokens", "context"):
        words += [f"--{name}", str(getattr(args, name))]
    return evaluate.check_args(evaluate.parser().parse_args(words))


def main():
    args = parser().parse_args()
    flags = flags_of_evaluate(args)
    rows = evaluate.read_rows(flags)["pairs"]
    counts, results = Counter(), {}
    count_pictures(counts)
    results["vLLM"] = by_vllm(flags, rows)
    results["vLLM"].pictures = counts.pop("pictures", 0)
    results["loop"] = by_loop(flags, rows, args.seconds)
    results["loop"].pictures = counts.pop("pictures", 0)
    print_and_save(section(args, results), args.out)


if __name__ == "__main__":
    main()
