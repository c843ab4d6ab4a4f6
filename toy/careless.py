"""
The policy of downstream_grpo.py on the toy: toy/base after a little training on answers of which half are wrong.

It still knows what toy/base knows, and answers as carelessly as what it was last taught. So there is something to gain: nothing
that the pictures would have to teach it, but the habit of saying what it sees. That is planted, as the hasty judgements are.

$ python toy/careless.py --out out/toy/careless
"""
import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: the repository is the package's parent
from toy import pretrain, world


def careless(rng, wrong):
    """A question about a picture and its answer or, so often, another of the answers one could give."""
    item = rng.choice(world.twins(rng, n=3))
    claim = item["claims"][item["right"]]
    if rng.random() < wrong:
        claim = rng.choice([c for c in item["claims"] if c != claim])
    return pretrain.look(item, [(item["question"], claim)], rng)


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="toy/base", help="folder of the model that becomes careless")
    p.add_argument("--out", required=True, help="folder to write it to")
    p.add_argument("--wrong", type=float, default=0.5, help="share of wrong answers")
    p.add_argument("--steps", type=int, default=120, help="updates of 32 answers")
    p.add_argument("--seed", type=int, default=0)
    return p


def main():
    args = parser().parse_args()
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, processor = AutoModelForImageTextToText.from_pretrained(args.model), AutoProcessor.from_pretrained(args.model)
    rng = random.Random(f"{args.seed} careless")
    seconds = pretrain.train(model, processor, lambda done: [careless(rng, args.wrong) for _ in range(32)], args.steps, lr_matrix=2e-3,
                             lr=3e-4, log_every=20)
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    print(f"{args.out}: {seconds:.0f} s")


if __name__ == "__main__":
    main()
