"""
Is there anything to learn in the toy world? A plain fine-tuning of the base model on an annotator's
judgements: its accuracy by manner, by difficulty, without the picture. sft.py and rl.py are the
real thing; this only asks whether the world deserves them. its figures are in results/README.md.

$ python toy/room.py --model toy/base --steps 350 --lr 3e-3 --n 600
"""

import random
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from core.flags import command_line
from stable_reinforce import parse
from toy import model as toy_model
from toy import pretrain, world


def annotated(rng):
    """
    A pair that the annotator solved in three attempts (toy/server.py's defaults), with its
    judgement in some manner.
    """
    while True:
        medium = rng.choice(("image",) * 18 + ("video", "text"))
        item = rng.choice(world.twins(rng, medium=medium))
        right = 0.95 + (0.45 - 0.95) * item["difficulty"]
        wrong = 1 - right
        if rng.random() > wrong**3:
            shown = rng.sample((0, 1), 2)
            manner = rng.choices(world.MANNERS, world.SHARES)[0]
            return pretrain.judging(item, shown, manner, rng)


def fine_tune(model, processor, args):
    rng = random.Random(f"{args.seed} annotated")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0)
    progress = pretrain.Progress(args.steps, every=50)
    model.train()
    for step in range(args.steps):
        left = 1 - step / args.steps
        pretrain.set_rate(optimizer, args.lr * min((step + 1) / 10, max(0.1, left)))
        dialogues = [annotated(rng) for _ in range(args.batch)]
        progress.add(step + 1, pretrain.update(model, processor, dialogues, [optimizer]))


def held_out(n, rng):
    """n pairs in full sets of twins, each set in one order: [(dialogue, right verdict, item)]."""
    rows = []
    while len(rows) < n:
        shown = rng.sample((0, 1), 2)
        for item in world.twins(rng):
            dialogue = pretrain.judging(item, shown, "hasty", rng)
            rows.append((dialogue, shown.index(item["right"]) + 1, item))
    return rows


def percent(flags):
    return f"{100 * sum(flags) / len(flags):.1f}"


def report(name, texts, rows):
    """One line of the table, and the accuracies by manner, by difficulty, by family."""
    hits = defaultdict(list)
    verdicts = [parse(text) for text in texts]
    for text, verdict, (_, choice, item) in zip(texts, verdicts, rows):
        right = verdict.choice == choice
        for group in ("all", world.manner_of(text), world.third_of(item), item["family"]):
            hits[group].append(right)
    well_formed = percent([verdict.well_formed for verdict in verdicts])
    says_1 = percent([verdict.choice == 1 for verdict in verdicts])
    accuracy = percent(hits["all"])
    print(
        f"\n{name}: right {accuracy} %, format {well_formed} %, says 1 {says_1} % (n {len(texts)})"
    )
    for groups in (world.MANNERS, world.THIRDS, world.FAMILIES):
        found = [group for group in groups if hits[group]]
        cells = [f"{group} {percent(hits[group])} ({len(hits[group])})" for group in found]
        print(f"   {', '.join(cells)}", flush=True)


def report_all(model, processor, rows, seed):
    dialogues = [dialogue for dialogue, _, _ in rows]
    careful = {"prefix": "<think>The image shows"}
    sampled = {"temperature": 1.0, "seed": seed}

    def report_replies(name, asked, **options):
        report(name, pretrain.generate(model, processor, asked, **options), rows)

    report_replies("greedy", dialogues)
    report_replies("temperature 1", dialogues, **sampled)
    report_replies("temperature 1, made to begin carefully", dialogues, **sampled, **careful)
    report_replies("greedy, made to begin carefully", dialogues, **careful)
    blank = []
    for dialogue in dialogues:
        grey = [image * 0 + 128 for image in dialogue["images"]]
        blank.append(dialogue | {"images": grey})
    report_replies("greedy, pictures blanked", blank)


def report_without_model(rows):
    always_1 = percent([choice == 1 for _, choice, _ in rows])
    longer = []
    for _, _, item in rows:
        first, second = map(len, item["answers"])
        longer.append((1 if second > first else 0) == item["right"])
    print(f"\nalways 1: {always_1} %, longer answer: {percent(longer)} %")


def parser():
    p = command_line(__doc__)
    add = p.add_argument
    add("--model", default="toy/base", help="folder of the base model")
    add("--steps", type=int, default=250, help="updates of fine-tuning; 0 = measure it as it is")
    add("--batch", type=int, default=32, help="judgements an update")
    add("--lr", type=float, default=5e-3, help="peak learning rate of AdamW")
    add("--n", type=int, default=600, help="held-out pairs")
    add("--seed", type=int, default=0, help="of pairs, manners and samples")
    add("--out", help="folder for the fine-tuned model; none = it is thrown away")
    return p


def main():
    args = parser().parse_args()
    model, processor = toy_model.load(args.model)
    torch.manual_seed(args.seed)
    fine_tune(model, processor, args)
    if args.out:
        toy_model.save(model, processor, args.out)
    rows = held_out(args.n, random.Random(f"{args.seed} held out"))
    report_all(model, processor, rows, args.seed)
    report_without_model(rows)


if __name__ == "__main__":
    main()
