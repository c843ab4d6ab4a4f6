"""
Judgements a second: evaluate.py's engine against the loop that one writes first, transformers' generate on one judgement at a
time (that is how the paper's released evaluators work). Same model, same pairs, same machine, sampled at temperature 1; loading
is timed apart. It also counts how often an image is processed.

$ python bench/evaluate.py --model out/toy/rl --data out/toy/data/dev/pairs.jsonl
"""
import argparse
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: evaluate.py is in the folder above
import evaluate as ev


def count_images(seen):
    """From now on each image that goes through Qwen's image processor is counted in seen."""
    from transformers import Qwen2VLImageProcessor

    real = Qwen2VLImageProcessor.preprocess

    def preprocess(self, images, *args, **kwargs):
        seen.update(images=len(images) if isinstance(images, (list, tuple)) else 1)
        return real(self, images, *args, **kwargs)
    Qwen2VLImageProcessor.preprocess = preprocess


def by_engine(args, rows):
    """(seconds to load, seconds to judge, judgements, tokens)."""
    start = time.monotonic()
    answers = ev.backend(args)
    ev.collect(rows[:2], answers, {}, args)  # the first requests compile and allocate
    loaded, done = time.monotonic(), {}
    ev.collect(rows[2:], answers, done, args)
    return loaded - start, time.monotonic() - loaded, len(done), sum(j["tokens"] for j in done.values())


def by_loop(args, rows, most):
    """The same, one judgement at a time; at most so many seconds."""
    import torch

    import sft

    start = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy, processor = sft.load_policy(args.model), sft.load_processor(args.model)
    model, end = policy.model.to(device).eval(), processor.tokenizer.eos_token_id
    loaded, made, tokens = time.monotonic(), 0, 0
    for row, (*_, order, _) in ((row, at) for row in rows[2:] for at in ev.plan(row, args)):
        if time.monotonic() > loaded + most:
            break
        batch = sft.collate([sft.encode(processor, ev.messages(row, order))], processor.tokenizer.pad_token_id, device)
        with torch.no_grad():
            out = model.generate(**{k: batch[k] for k in sft.INPUTS if k in batch}, max_new_tokens=args.max_new_tokens, do_sample=True,
                                 temperature=1.0, top_k=0, top_p=1.0, eos_token_id=end, pad_token_id=processor.tokenizer.pad_token_id)
        processor.tokenizer.decode(out[0])
        made, tokens = made + 1, tokens + out.shape[1] - batch["input_ids"].shape[1]
    return loaded - start, time.monotonic() - loaded, made, tokens


def section(args, result):
    """The numbers in markdown."""
    keys = list(result["engine"])
    lines = [[name, *(f"{result[name][k]:,}" for k in keys)] for name in ("engine", "loop")]
    rows = "\n".join("| " + " | ".join(line) + " |" for line in (["", *keys], ["---"] * (len(keys) + 1), *lines))
    return (f"## Judging\n\nevaluate.py's engine against a loop over judgements with transformers' generate: {result['times as fast']} "
            f"times as many pairs a second, {args.samples} judgements a pair. {time.strftime('%Y-%m-%d')}; "
            f"`python bench/evaluate.py {' '.join(sys.argv[1:])}`\n\n{rows}\n")


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="folder of a judge")
    p.add_argument("--data", required=True, help="JSONL file of pairs")
    p.add_argument("--limit", type=int, default=130, help="pairs")
    p.add_argument("--samples", type=int, default=16, help="judgements a pair")
    p.add_argument("--max_new_tokens", type=int, default=128, help="of a judgement")
    p.add_argument("--context", type=int, default=1024, help="of prompt and judgement")
    p.add_argument("--seconds", type=float, default=60, help="of the loop, which need not finish")
    p.add_argument("--out", help="file for the numbers: a markdown table if it ends in .md, else JSON")
    return p


def main():
    args = parser().parse_args()
    flags = ev.check_args(ev.parser().parse_args([
        "--bench", f"pairs={args.data}", "--model", args.model, "--limit", str(args.limit), "--samples", str(args.samples),
        "--out", os.devnull, "--max_new_tokens", str(args.max_new_tokens), "--context", str(args.context)]))
    rows, result, seen = ev.read_rows(flags)["pairs"], {}, Counter()
    count_images(seen)
    for name, run in (("engine", lambda: by_engine(flags, rows)), ("loop", lambda: by_loop(flags, rows, args.seconds))):
        seen.clear()
        load, seconds, made, tokens = run()
        result[name] = {"load": round(load, 1), "seconds": round(seconds, 2), "judgements": made, "tokens": tokens,
                        "pairs a second": round(made / args.samples / seconds, 3), "tokens a second": round(tokens / seconds),
                        "images processed a judgement": round(seen["images"] / made, 3)}
        print(name, result[name], flush=True)
    result["times as fast"] = round(result["engine"]["pairs a second"] / result["loop"]["pairs a second"], 1)
    print("times as fast", result["times as fast"])
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        text = section(args, result) if args.out.endswith(".md") else json.dumps(result | {"args": vars(args)}, indent=1)
        Path(args.out).write_text(text)


if __name__ == "__main__":
    main()
