"""
Judges that were run in lmms-eval or VLMEvalKit, for evaluate.py --judgements: with intervals, with
the votes for each place, and next to this project's judges (--compare). Both ask with prompts of
their own and show a pair in one order, which the length of its answers decides. A text without a
verdict is wrong here and in VLMEvalKit; lmms-eval asks another model, and then takes a coin.

lmms-eval   vl_rewardbench or multimodal_rewardbench with --log_samples: *_samples_*.jsonl
            (EvolvingLMMs-Lab/lmms-eval at 75571cf)
VLMEvalKit  VL-RewardBench with PRED_FORMAT=json: MODEL_VL-RewardBench.json
            (open-compass/VLMEvalKit at e8e78f0)

$ python recipes/lmms_eval_vlmevalkit.py --file 20261128_samples_vl_rewardbench.jsonl \\
    --bench VL-RewardBench=data/VL-RewardBench --out theirs.jsonl
$ python evaluate.py --judgements theirs.jsonl --parse lenient --out out/theirs \\
    --bench VL-RewardBench=data/VL-RewardBench

A row is found by its question and its answers. Rows that have the same take lines in turn.
"""

import ast
import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from core import files, flags
from core.files import InputError
from evaluate import bench_file
from sources import BENCHMARKS, reading

# how the prompts of lmms-eval show a question and two answers
PROMPTS = {
    "VL-RewardBench": r"\nQuestion: (.*?)\n\nAnswer 1: (.*)\n\nAnswer 2: (.*)\n\nPlease evaluate",
    "Multimodal-RewardBench": r"\[User Question\]\n(.*?)\n\n\[The Start of Assistant A's Answer\]\n"
    r"(.*)\n\[The End of Assistant A's Answer\]\n\n\[The Start of Assistant B's Answer\]\n"
    r"(.*)\n\[The End of Assistant B's Answer\]",
}
LMMS_EVAL = ("doc_id", "input", "filtered_resps")
VLMEVALKIT = ("index", "question", "response", "prediction")


def read_lmms_eval(line, bench):
    """((question, answer 1, answer 2) as they were shown, [what the judge said, ...])"""
    shown = re.search(PROMPTS[bench], line["input"], re.DOTALL).groups()
    texts = line.get("resps", line["filtered_resps"])  # the filter may have cut the thought out
    return shown, texts if isinstance(texts, list) else [texts]


def read_vlmevalkit(line, bench):
    """The same. The answers, a list written as text, change places if their length is odd."""
    answers = ast.literal_eval(line["response"])
    if len("".join(answers)) % 2 == 1:
        answers = answers[::-1]
    return (line["question"], *answers), [line["prediction"]]


def read_lines(file, bench):
    """(where, what was shown, what was said) of each line, in the order of the benchmark."""
    lines = list(reading.table_rows(file, ()))
    fields, read = VLMEVALKIT, read_vlmevalkit
    if lines and "filtered_resps" in lines[0][1]:
        fields, read = LMMS_EVAL, read_lmms_eval
    for where, line in lines:
        reading.check_fields(line, fields, where, file)
    for where, line in sorted(lines, key=lambda found: found[1][fields[0]]):
        try:
            yield where, *read(line, bench)
        except (AttributeError, TypeError, ValueError, SyntaxError) as problem:
            expected = f"expected a judgement of {bench}, as lmms-eval or VLMEvalKit writes it"
            raise InputError(f"{where}: {expected} ({repr(problem)[:80]})") from None


def read_rows(bench, path):
    """{(question, answer 1, answer 2): [(row, order), ...]} of a benchmark."""
    rows = defaultdict(list)
    for number, (_, item) in enumerate(reading.read_records(BENCHMARKS[bench], path)):
        first, second = item.responses
        rows[item.question, first, second].append((number, 0))
        rows[item.question, second, first].append((number, 1))
    return rows


def convert(file, bench, path):
    """The lines for evaluate.py --judgements."""
    rows, seen = read_rows(bench, path), Counter()
    for where, shown, texts in read_lines(file, bench):
        if shown not in rows:
            raise InputError(
                f"{where}: no row of {path} has this question and these answers; give the version "
                f"of {bench} that was judged"
            )
        row, order = rows[shown][seen[shown] % len(rows[shown])]
        seen[shown] += 1
        for text in texts:
            yield {"bench": bench, "row": row, "order": order, "text": text}


def parser():
    p = flags.command_line(__doc__)
    add = p.add_argument
    add("--file", required=True, help="what lmms-eval or VLMEvalKit wrote, .jsonl or .json")
    add("--bench", type=bench_file, required=True, metavar="NAME=PATH", help=" or ".join(PROMPTS))
    add("--out", required=True, help="file to write, for evaluate.py --judgements")
    return p


def main(words=None):
    args = parser().parse_args(words)
    bench, path = args.bench
    if bench not in PROMPTS:
        raise InputError(f"--bench {bench}: expected {' or '.join(PROMPTS)}; they have no other")
    lines = list(convert(args.file, bench, path))
    with files.atomic_write(args.out) as out:
        for line in lines:
            out.write(json.dumps(line).encode() + b"\n")
    print(f"{args.out}: {len(lines)} judgements")


if __name__ == "__main__":
    flags.run_stage("lmms_eval_vlmevalkit.py", main)
