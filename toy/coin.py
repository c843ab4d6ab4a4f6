"""
Why a coin as the scorer spoils greedy answers and not sampled ones (Table 11). The policy before
answers each task often; the lead of a task is by how many of these answers the most frequent one is
ahead of the next. A policy after is asked greedily, and at temperature 1.

$ python toy/coin.py --data out/toy/held/tasks/train.jsonl --before out/toy/careless \\
    --after out/toy/grpo/random-0 --n 300
"""

import sys
from collections import Counter
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import toy.cpu
from core.encoding import load_processor
from core.exact_match import exact
from core.flags import command_line, run_stage, whole
from core.policy import load_policy
from core.prompts import encode_prompts
from core.sampler import HFSampler
from core.seeds import seed_from
from core.tables import markdown_table
from downstream_grpo import read_tasks, task_turns

THIRDS = ("smallest leads", "middle", "largest leads")


def answers_of(folder, tasks, samples, temperature):
    """Texts of a policy: a list for each task."""
    device = torch.device("cpu")
    processor = load_processor(folder)
    policy = load_policy(folder, dtype=torch.float32)
    toy.cpu.speed_up_policy(policy)
    sampler = HFSampler(policy, processor, device)
    prompts = encode_prompts(tasks, task_turns, processor)
    seeds = [seed_from("coin", task.id) for task in tasks]
    generated = sampler.generate(prompts, seeds, samples, temperature, max_tokens=16)
    decode = processor.tokenizer.decode
    texts = []
    for responses in generated:
        texts.append([decode(one.ids, skip_special_tokens=True).strip() for one in responses])
    return texts


def lead(texts):
    """
    >>> lead(["red", "red", "red", "blue"]), lead(["red"])
    (0.5, 1.0)
    """
    counts = [count for _, count in Counter(texts).most_common(2)] + [0]
    return (counts[0] - counts[1]) / len(texts)


def percent_right(answers, tasks):
    shares = []
    for texts, task in zip(answers, tasks):
        shares.append(fmean(exact(text, task.answer) for text in texts))
    return f"{100 * fmean(shares):.1f}"


def measure(folder, tasks, samples):
    """{temperature: answers} of a policy."""
    return {0: answers_of(folder, tasks, 1, 0.0), 1: answers_of(folder, tasks, samples, 1.0)}


def table(tasks, before, after):
    """before and after: {temperature: answers}."""
    leads = [lead(texts) for texts in before[1]]
    order = sorted(range(len(tasks)), key=lambda number: leads[number])
    cuts = [round(len(order) * i / len(THIRDS)) for i in range(len(THIRDS) + 1)]
    parts = {"all": order}
    parts |= {name: order[cuts[i] : cuts[i + 1]] for i, name in enumerate(THIRDS)}
    rows = []
    for name, numbers in parts.items():
        of_part = [tasks[number] for number in numbers]
        row = [name, str(len(numbers)), f"{100 * fmean(leads[number] for number in numbers):.1f}"]
        for temperature in (0, 1):
            for answers in (before, after):
                picked = [answers[temperature][number] for number in numbers]
                row.append(percent_right(picked, of_part))
        rows.append(row)
    head = "tasks|number|lead, %|greedy before|greedy after|sampled before|sampled after"
    return markdown_table(head.split("|"), rows)


def parser():
    p = command_line(__doc__)
    add = p.add_argument
    add("--data", required=True, help="JSONL of tasks")
    add("--before", required=True, help="folder of the policy before")
    add("--after", required=True, nargs="+", help="folders of policies after")
    add("--n", type=whole(1), default=300, help="tasks, from the first on")
    add("--samples", type=whole(2), default=16, help="answers to a task at temperature 1")
    add("--out", help="write the tables there, too")
    return p


def main():
    args = parser().parse_args()
    toy.cpu.speed_up_process()
    tasks = read_tasks([("tasks", args.data)], Path(args.data).parent, args.n)
    before = measure(args.before, tasks, args.samples)
    parts = []
    for folder in args.after:
        after = measure(folder, tasks, args.samples)
        parts.append(f"{folder}:\n\n{table(tasks, before, after)}")
    text = "\n".join(parts)
    print(text)
    if args.out:
        Path(args.out).write_text(text)


if __name__ == "__main__":
    run_stage("toy/coin.py", main)
