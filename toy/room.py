"""
Is there anything to learn in the toy world? A plain fine-tuning of the base model on an annotator's judgements, and what
comes out: accuracy by manner, by difficulty, without the picture. sft.py and rl.py are the real thing; this file only asks
whether the world deserves them. Its figures stand in README.md.

$ python toy/room.py --model toy/base --steps 350 --lr 3e-3 --n 600
"""
import argparse
import random
import sys
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: `toy` is found from the folder above
import torch

from stable_reinforce import parse
from toy import pretrain, world


def annotated(rng):
    """A pair that the annotator solved in three attempts (toy/server.py's defaults), with its judgement in some manner."""
    while True:
        item = rng.choice(world.twins(rng, medium=rng.choice(("image",) * 18 + ("video", "text"))))
        wrong = 1 - (0.95 + (0.45 - 0.95) * item["difficulty"])
        if rng.random() > wrong**3:
            return pretrain.judging(item, rng.sample((0, 1), 2), rng.choices(world.MANNERS, world.SHARES)[0], rng)


def fine_tune(model, processor, steps, batch, lr, rng):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0)
    start, recent = time.time(), []
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / 10, max(0.1, 1 - step / steps))
        recent.append(pretrain.update(model, processor, [annotated(rng) for _ in range(batch)], [optimizer]))
        if (step + 1) % 50 == 0 or step + 1 == steps:
            print(f"step {step + 1}/{steps}  loss {sum(recent) / len(recent):.3f}  {time.time() - start:.0f} s", flush=True)
            recent = []


def held_out(n, rng):
    """n pairs in full sets of twins, each set shown in one order: [(dialogue, right verdict, item), ...]."""
    rows = []
    while len(rows) < n:
        shown = rng.sample((0, 1), 2)
        for item in world.twins(rng):
            rows.append((pretrain.judging(item, shown, "hasty", rng), shown.index(item["right"]) + 1, item))
    return rows


def report(name, said, rows):
    """One line of the table, and the accuracies by manner, by difficulty, by family."""
    share = lambda flags: 100 * sum(flags) / len(flags)
    hits, third = defaultdict(list), ("easy", "middle", "hard")
    for text, (_, choice, item) in zip(said, rows):
        right = parse(text).choice == choice
        for group in ("all", world.manner_of(text), third[min(2, int(3 * item["difficulty"]))], item["family"]):
            hits[group].append(right)
    well, ones = share([parse(text).well_formed for text in said]), share([parse(text).choice == 1 for text in said])
    print(f"\n{name}: right {share(hits['all']):.1f} %, format {well:.1f} %, says 1 {ones:.1f} % (n {len(said)})")
    for groups in (world.MANNERS, third, world.FAMILIES):
        print("   " + ", ".join(f"{g} {share(hits[g]):.1f} ({len(hits[g])})" for g in groups if hits[g]), flush=True)


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="toy/base", help="folder of the base model")
    p.add_argument("--steps", type=int, default=250, help="updates of fine-tuning; 0 = measure the model as it is")
    p.add_argument("--batch", type=int, default=32, help="judgements an update")
    p.add_argument("--lr", type=float, default=5e-3, help="peak learning rate of AdamW")
    p.add_argument("--n", type=int, default=600, help="held-out pairs")
    p.add_argument("--seed", type=int, default=0, help="of pairs, manners and samples")
    p.add_argument("--out", help="folder for the fine-tuned model; none = it is thrown away")
    return p


def main():
    from transformers import AutoModelForImageTextToText, AutoProcessor

    args = parser().parse_args()
    model, processor = AutoModelForImageTextToText.from_pretrained(args.model), AutoProcessor.from_pretrained(args.model)
    torch.manual_seed(args.seed)
    fine_tune(model, processor, args.steps, args.batch, args.lr, random.Random(f"{args.seed} annotated"))
    if args.out:
        model.save_pretrained(args.out)
        processor.save_pretrained(args.out)
    rows = held_out(args.n, random.Random(f"{args.seed} held out"))
    dialogues = [row[0] for row in rows]
    blank = [dict(d, images=[image * 0 + 128 for image in d["images"]]) for d in dialogues]
    careful = "<think>The image shows"
    for name, turns, options in (
            ("greedy", dialogues, {}), ("temperature 1", dialogues, dict(temperature=1.0, seed=args.seed)),
            ("temperature 1, made to begin carefully", dialogues, dict(temperature=1.0, seed=args.seed, prefix=careful)),
            ("greedy, made to begin carefully", dialogues, dict(prefix=careful)), ("greedy, pictures blanked", blank, {})):
        report(name, pretrain.generate(model, processor, turns, **options), rows)
    longer = sum(max((0, 1), key=lambda k: len(item["answers"][k])) == item["right"] for _, _, item in rows)
    print(f"\nalways 1: {100 * sum(choice == 1 for _, choice, _ in rows) / len(rows):.1f} %, "
          f"longer answer: {100 * longer / len(rows):.1f} %")


if __name__ == "__main__":
    main()
