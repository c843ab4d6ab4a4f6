"""
The weaker consistency judge of C.11 on the toy: toy/base with the matrices of one of its language layers rounded to -s, 0 and s,
each row with its own s. A lesion, not another training: smaller bases trained as toy/base is judge consistency no better than a coin.
Its mistakes are a model's: it misses more than a third of the agreements, nearly all of a run's whose verdict is 1, and lets no
contradiction pass.

$ python toy/weaker.py --out out/toy/weaker    # prints how often it is right, of conclusions that lead to the verdict and that do not
"""
import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: the repository is the package's parent
import torch

from stable_reinforce import parse_consistency
from toy import pretrain


@torch.no_grad()
def round_layer(model):
    """Every matrix of the middle one of three language layers to three values a row: its largest magnitude s, 0 or -s, the nearest.
    Either of the others rounded so leaves a model that hardly ever says yes or no."""
    for p in model.model.language_model.layers[1].parameters():
        if p.dim() == 2:
            s = p.abs().amax(1, keepdim=True).clamp_min(1e-9)
            p.copy_((p / s).round() * s)


def figures(model, processor, n=300, seed=5):
    """{"agree" | "disagree": share of such texts where the model says so}."""
    rng, right = random.Random(f"{seed} weaker"), {1: [], 0: []}
    dialogues = [pretrain.consistency(rng) for _ in range(n)]
    for dialogue, said in zip(dialogues, pretrain.generate(model, processor, dialogues, 8)):
        truth = parse_consistency(dialogue["turns"][0][1])
        right[truth].append(parse_consistency(said) == truth)
    return {name: sum(right[truth]) / len(right[truth]) for name, truth in (("agree", 1), ("disagree", 0))}


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="toy/base", help="folder of the model to make weaker")
    p.add_argument("--out", required=True, help="folder to write it to")
    return p


def main():
    args = parser().parse_args()
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, processor = AutoModelForImageTextToText.from_pretrained(args.model), AutoProcessor.from_pretrained(args.model)
    round_layer(model)
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    print(f"{args.out}: " + ", ".join(f"{name} {100 * share:.1f} %" for name, share in figures(model, processor).items()))


if __name__ == "__main__":
    main()
