"""
The policy of downstream_grpo.py on the toy: toy/base after a little training on answers of which
half are wrong.

It still knows what toy/base knows, and answers as carelessly as it was last taught. So there is
something to gain: not from the pictures, but the habit of saying what it sees. That is planted, as
the hasty judgements are.

$ python toy/careless.py --out out/toy/careless
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from core.flags import command_line
from toy import model as toy_model
from toy import pretrain, world


def careless(rng, wrong):
    """A question about a picture, with its answer or, for a share of `wrong`, another one."""
    item = rng.choice(world.twins(rng, n=3))
    claim = item["claims"][item["right"]]
    if rng.random() < wrong:
        claim = rng.choice([other for other in item["claims"] if other != claim])
    return pretrain.dialogue_about(item, [(item["question"], claim)], rng)


def parser():
    p = command_line(__doc__)
    add = p.add_argument
    add("--model", default="toy/base", help="folder of the model that becomes careless")
    add("--out", required=True, help="folder to write it to")
    add("--wrong", type=float, default=0.5, help="share of wrong answers")
    add("--steps", type=int, default=120, help="updates of 32 answers")
    add("--seed", type=int, default=0, help="of the answers")
    return p


def main():
    args = parser().parse_args()
    model, processor = toy_model.load(args.model)
    rng = random.Random(f"{args.seed} careless")

    def batches(done):
        return [careless(rng, args.wrong) for _ in range(32)]

    rates = {"lr_matrix": 2e-3, "lr": 3e-4}
    seconds = pretrain.train(model, processor, batches, args.steps, **rates, log_every=20)
    toy_model.save(model, processor, args.out)
    print(f"{args.out}: {seconds:.0f} s")


if __name__ == "__main__":
    main()
