"""
token_logps (core/policy.py) against the same log-probabilities through all logits at once: peak
memory and time of a forward and a backward pass at Qwen2.5-VL's vocabulary and 4,096 response
tokens. The model around it is one narrow layer of random weights, so that the output layer is
nearly all of the work: in a 7B model, where it is 7 %, the difference in time is lost.

Each variant runs in a process of its own; memory is the process's peak above what it held before
(the weights), time the median of the repeats. "all logits" also projects the response positions
alone, as a careful user would.

$ python bench/token_logps.py
"""

import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from bench.output import made_by, print_and_save
from core.encoding import MODEL_INPUTS, Sample, collate
from core.flags import command_line
from core.policy import Policy, token_logps
from core.tables import markdown_table

VARIANTS = ("all logits", "token_logps")


@dataclass
class Result:
    seconds: float
    memory: float  # bytes
    total: float  # of the log-probabilities
    grad_norm: float


def resident_memory():
    """Of this process, bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make_policy(args):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text_config = {
        "vocab_size": args.vocabulary,
        "hidden_size": args.hidden,
        "intermediate_size": 4 * args.hidden,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.hidden // 64,
        "num_key_value_heads": args.hidden // 128,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [8, 12, 12],
            "rope_theta": 1e6,
        },
    }
    vision_config = {
        "depth": 1,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_heads": 1,
        "out_hidden_size": args.hidden,
        "fullatt_block_indexes": [0],
    }
    config = Qwen2_5_VLConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=1,
        video_token_id=2,
        vision_start_token_id=3,
        vision_end_token_id=4,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return Policy(Qwen2_5_VLForConditionalGeneration(config))


def make_batch(args):
    """Random tokens."""
    generator = torch.Generator().manual_seed(1)

    def random_ids(count):
        return torch.randint(5, args.vocabulary, (count,), generator=generator).tolist()

    samples = []
    for _ in range(args.rows):
        prompt_ids, response_ids = random_ids(args.prompt), random_ids(args.tokens // args.rows)
        token_types = [0] * args.prompt
        sample = Sample(prompt_ids, token_types, vision={}, response_ids=response_ids)
        samples.append(sample)
    return collate(samples, pad_id=0)


def all_logits(policy, batch):
    inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    hidden = policy.model.base_model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
    logits = policy.model.lm_head(hidden[batch["predict_from"]])  # (N, V)
    logps = logits.float().log_softmax(-1)
    return logps.gather(1, batch["response_ids"][:, None])[:, 0]


def measure(variant, args):
    """The Result of one variant, in this process."""
    policy, batch = make_policy(args), make_batch(args)
    before = resident_memory()
    seconds = []
    for _ in range(args.repeats):
        policy.zero_grad()
        start = time.perf_counter()
        if variant == "token_logps":
            logps, _ = token_logps(policy, batch)
        else:
            logps = all_logits(policy, batch)
        total = logps.sum()
        total.backward()
        seconds.append(time.perf_counter() - start)
    gradients = [p.grad for p in policy.parameters() if p.grad is not None]
    grad_norm = torch.nn.utils.get_total_norm(gradients).item()
    memory = peak_memory() - before
    return Result(statistics.median(seconds), memory, total.item(), grad_norm)


def section(args, results):
    """The numbers in markdown."""
    rows = []
    for variant, result in results.items():
        rows.append(
            [
                variant,
                f"{result.seconds:.2f}",
                f"{result.memory / 2**30:.2f}",
                f"{result.total:.2f}",
                f"{result.grad_norm:.6g}",
            ]
        )
    full, ours = (results[variant] for variant in VARIANTS)
    time_ratio, memory_ratio = ours.seconds / full.seconds, ours.memory / full.memory
    rows.append(["ratio", f"{time_ratio:.2f}", f"{memory_ratio:.2f}", "", ""])
    head = ["", "seconds", "peak memory, GiB", "sum of log-probabilities", "gradient norm"]
    about = (
        f"{args.tokens:,} response tokens, vocabulary {args.vocabulary:,}, hidden {args.hidden}, "
        f"{args.layers} layer(s), forward and backward, {torch.get_num_threads()} thread(s), torch "
        f"{torch.__version__}; {made_by('token_logps.py')}"
    )
    title = "## Log-probabilities of response tokens"
    return f"{title}\n\n{about}\n\n{markdown_table(head, rows).strip()}\n"


def parser():
    p = command_line(__doc__)
    add = p.add_argument
    add("--vocabulary", type=int, default=152064, help="of Qwen2.5-VL-7B")
    add("--tokens", type=int, default=4096, help="response tokens in the batch")
    add("--rows", type=int, default=8, help="sequences they are spread over")
    add("--prompt", type=int, default=64, help="tokens of each prompt")
    add("--hidden", type=int, default=512, help="width; a multiple of 128")
    add("--layers", type=int, default=1, help="few, so that the output layer is most of the work")
    add("--repeats", type=int, default=3, help="of each variant")
    add("--out", help="file for the numbers, in markdown")
    variant_help = "measure only this one, in this process, and print it as JSON"
    add("--variant", choices=VARIANTS, help=variant_help)
    return p


def main():
    args = parser().parse_args()
    if args.variant:
        print(json.dumps(dataclasses.asdict(measure(args.variant, args))))
        return
    results = {}
    for variant in VARIANTS:
        command = [sys.executable, __file__, *sys.argv[1:], "--variant", variant]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results[variant] = Result(**json.loads(done.stdout.splitlines()[-1]))
    print_and_save(section(args, results), args.out)


if __name__ == "__main__":
    main()
