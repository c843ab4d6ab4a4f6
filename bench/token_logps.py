"""
token_logps (sft.py) against the same log-probabilities through all logits at once: peak memory and time of a forward and a
backward at Qwen2.5-VL's vocabulary and 4,096 response tokens. The model around it is one narrow layer of random weights, so
that the output layer is nearly all of the work: in a 7B model, where it is 7 %, the difference in time is lost.

Each variant runs in a process of its own; memory is the process's peak above what it held before (the weights), time the
median of the repeats. "all logits" projects the response positions alone, too, as a careful user would.

$ python bench/token_logps.py
"""
import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: sft is found from the folder above
import torch

VARIANTS = ("all logits", "token_logps")


def resident():
    """(now, peak) of this process, bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make_policy(vocabulary, hidden, layers):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from sft import Policy

    config = Qwen2_5_VLConfig(
        text_config=dict(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
                         num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, bos_token_id=None, eos_token_id=0,
                         pad_token_id=0, rope_parameters={"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e6}),
        vision_config=dict(depth=1, hidden_size=64, intermediate_size=64, num_heads=1, out_hidden_size=hidden, fullatt_block_indexes=[0]),
        image_token_id=1, video_token_id=2, vision_start_token_id=3, vision_end_token_id=4, tie_word_embeddings=False)
    torch.manual_seed(0)
    return Policy(Qwen2_5_VLForConditionalGeneration(config))


def all_logits(policy, batch):
    from sft import INPUTS

    hidden = policy.model.base_model(**{k: batch[k] for k in INPUTS if k in batch}, use_cache=False).last_hidden_state.flatten(0, 1)
    logp = policy.model.lm_head(hidden[batch["at"]]).float().log_softmax(-1)  # (N, V)
    return logp.gather(1, batch["tokens"][:, None])[:, 0]


def measure(variant, args):
    """{"seconds", "bytes", "sum" of the log-probabilities, "norm" of the gradient} of one variant, in this process."""
    from sft import collate, token_logps

    policy = make_policy(args.vocabulary, args.hidden, args.layers)
    generator = torch.Generator().manual_seed(1)
    text = lambda n: torch.randint(5, args.vocabulary, (n,), generator=generator).tolist()
    rows = [{"prompt": text(args.prompt), "types": [0] * args.prompt, "response": text(args.tokens // args.rows)} for _ in range(args.rows)]
    batch = collate(rows, 0)
    before, seconds = resident()[0], []
    for _ in range(args.repeats):
        policy.zero_grad()
        start = time.perf_counter()
        total = (token_logps if variant == "token_logps" else all_logits)(policy, batch).sum()
        total.backward()
        seconds.append(time.perf_counter() - start)
    norm = torch.nn.utils.get_total_norm([p.grad for p in policy.parameters() if p.grad is not None])
    return {"seconds": statistics.median(seconds), "bytes": resident()[1] - before, "sum": total.item(), "norm": norm.item()}


def section(args, found):
    """The numbers in markdown."""
    full, ours = (found[v] for v in VARIANTS)
    body = [[v, f"{r['seconds']:.2f}", f"{r['bytes'] / 2**30:.2f}", f"{r['sum']:.2f}", f"{r['norm']:.6g}"] for v, r in found.items()]
    body.append(["ratio", f"{ours['seconds'] / full['seconds']:.2f}", f"{ours['bytes'] / full['bytes']:.2f}", "", ""])
    head = ["", "seconds", "peak memory, GiB", "sum of log-probabilities", "gradient norm"]
    rows = "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *body))
    return (f"## Log-probabilities of response tokens\n\n{args.tokens:,} response tokens, vocabulary {args.vocabulary:,}, forward and "
            f"backward, {torch.get_num_threads()} thread(s), torch {torch.__version__}; {time.strftime('%Y-%m-%d')}; "
            f"`python bench/token_logps.py {' '.join(sys.argv[1:])}`\n\n{rows}\n")


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--vocabulary", type=int, default=152064, help="of Qwen2.5-VL-7B")
    p.add_argument("--tokens", type=int, default=4096, help="response tokens in the batch")
    p.add_argument("--rows", type=int, default=8, help="sequences they are spread over")
    p.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    p.add_argument("--hidden", type=int, default=512, help="width; a multiple of 128")
    p.add_argument("--layers", type=int, default=1, help="few, so that the output layer is most of what is measured")
    p.add_argument("--repeats", type=int, default=3, help="of each variant")
    p.add_argument("--out", help="file for the numbers, a table in markdown")
    p.add_argument("--variant", choices=VARIANTS, help="measure only this one, in this process, and print it as JSON")
    return p


def main():
    args = parser().parse_args()
    if args.variant:
        print(json.dumps(measure(args.variant, args)))
        return
    found = {}
    for variant in VARIANTS:
        words = [sys.executable, __file__, *sys.argv[1:], "--variant", variant]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        found[variant] = json.loads(done.stdout.splitlines()[-1])
    full, ours = (found[v] for v in VARIANTS)
    print(f"{args.tokens} response tokens, vocabulary {args.vocabulary}, hidden {args.hidden}, {args.layers} layers, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for variant, row in found.items():
        print(f"{variant:12s} {row['seconds']:7.2f} s  {row['bytes'] / 2**30:6.2f} GiB  "
              f"sum {row['sum']:.2f}  gradient norm {row['norm']:.6g}")
    print(f"ratio        {ours['seconds'] / full['seconds']:7.2f}    {ours['bytes'] / full['bytes']:6.2f}")
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(section(args, found))


if __name__ == "__main__":
    main()
