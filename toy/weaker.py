"""
The weaker consistency judge of C.11 on the toy: toy/base with the matrices of one language layer
rounded to three values. It is damaged, not trained less: smaller bases trained as toy/base judge
consistency no better than a coin. Its mistakes are a model's: it misses more than a third of the
agreements, nearly all of those whose verdict is 1, and lets no contradiction pass.

$ python toy/weaker.py --out out/toy/weaker    # prints how often it is right, for either answer
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from core.flags import command_line
from stable_reinforce import parse_consistency
from toy import model as toy_model
from toy import pretrain


@torch.no_grad()
def round_layer(model):
    """
    Round each row of the matrices of the middle one of three language layers to -s, 0 or s, s being
    its largest magnitude. With another layer rounded, it hardly ever says yes or no.
    """
    for parameter in model.model.language_model.layers[1].parameters():
        if parameter.dim() == 2:
            s = parameter.abs().amax(1, keepdim=True).clamp_min(1e-9)
            parameter.copy_((parameter / s).round() * s)


def figures(model, processor, n=300, seed=5):
    """{"agree" or "disagree": the share of such texts where the model says so}."""
    rng, right = random.Random(f"{seed} weaker"), {1: [], 0: []}
    dialogues = [pretrain.consistency(rng) for _ in range(n)]
    replies = pretrain.generate(model, processor, dialogues, 8)
    for dialogue, reply in zip(dialogues, replies):
        _, truth = dialogue["turns"][0]
        truth = parse_consistency(truth)
        right[truth].append(parse_consistency(reply) == truth)
    return {
        "agree": sum(right[1]) / len(right[1]),
        "disagree": sum(right[0]) / len(right[0]),
    }


def parser():
    p = command_line(__doc__)
    p.add_argument("--model", default="toy/base", help="folder of the model to make weaker")
    p.add_argument("--out", required=True, help="folder to write it to")
    return p


def main():
    args = parser().parse_args()
    model, processor = toy_model.load(args.model)
    round_layer(model)
    toy_model.save(model, processor, args.out)
    shares = [f"{name} {100 * share:.1f} %" for name, share in figures(model, processor).items()]
    print(f"{args.out}: {', '.join(shares)}")


if __name__ == "__main__":
    main()
