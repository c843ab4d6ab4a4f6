"""
vLLM in a process of its own: python judge_with_vllm.py MODEL PAIRS OUT. Judges all pairs, then a
third of the judgements again, then with early stopping, then a prompt above --context; writes
OUT/counts.json.
"""

import dataclasses
import json
import sys

import evaluate
from core.files import Journal
from core.judgements import judgements_file
from core.judging import collect

folder, pairs, out = sys.argv[1:]
flags = ["--model", folder, "--out", out, "--samples", "8", "--max_new_tokens", "24"]
flags += ["--bench", f"pairs={pairs}", "--context", "1024", "--group", "medium"]


def args_of(*words):
    return evaluate.check_args(evaluate.parser().parse_args([*flags, *words]))


args = args_of()
protocol = evaluate.protocol_of(args)
early_protocol = evaluate.protocol_of(args_of("--orders", "dataset", "--early_stop"))
rows = evaluate.read_rows(args)["pairs"]
backend = evaluate.make_backend(args)

done = {}
collect(rows, backend, done, protocol, Journal(judgements_file(out)))

kept = {key: done[key] for i, key in enumerate(done) if i % 3}
again = dict(kept)
collect(rows, backend, again, protocol)

early = {}
collect(rows, backend, early, early_protocol)

too_long = dataclasses.replace(rows[0], id="long", row=99, question="word " * 2000)
beside_it = {}
left_out = collect([too_long, rows[1]], backend, beside_it, protocol)

counts = {
    "left_out": [line["id"] for line in left_out.values()],
    "reason": " ".join(line["reason"] for line in left_out.values()),
    "beside_it": len(beside_it),
    "all": len(done),
    "kept": len(kept),
    "again": len(again),
    "same": sum(again[key].text == done[key].text for key in done),
    "early": len(early),
    "early_differ": sum(early[key].text != done[key].text for key in early if key in done),
}
with open(f"{out}/counts.json", "w") as file:
    json.dump(counts, file)
