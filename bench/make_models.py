"""
Folders of models with random weights and a file of pairs about pictures of noise, for
bench/first_run.py: OUT/SHAPE-LAYERS for each of --models, and OUT/pairs.jsonl. What is there
already stays.

$ python bench/make_models.py --out out/gpu/models --models 7b:4 7b:0
"""

import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from bench import findings
from bench.shapes import QWENS, TOYS, make_model, make_pairs, model_folder
from core.flags import command_line
from core.pairs import write_pairs


def shape_and_layers(text):
    """The type of a flag: 7b:4 is the shape 7b with 4 layers, 7b:0 as many as it has."""
    shape, _, layers = text.partition(":")
    if shape not in (*QWENS, *TOYS) or not layers.isdigit():
        raise ValueError
    return shape, int(layers)


def make(folder, shape, layers, image_tokens, device):
    start = time.perf_counter()
    if not (folder / "config.json").exists():
        make_model(folder, shape, layers, image_tokens, device)
    size = sum(file.stat().st_size for file in folder.iterdir())
    seconds = time.perf_counter() - start
    free = shutil.disk_usage(folder).free
    text = f"{folder.name}: {size / 1e9:.1f} GB in {seconds:.0f} s, {free / 1e9:.0f} GB left"
    return findings.Finding(findings.OK, text)


def parser():
    p = command_line(__doc__)
    add = p.add_argument
    add("--out", required=True, help="folder of the models' folders")
    models_help = "SHAPE:LAYERS of the language model; 0 layers = as the shape has"
    add("--models", type=shape_and_layers, nargs="+", required=True, help=models_help)
    add("--pairs", type=int, default=64, help="how many pairs")
    add("--image_tokens", type=int, default=576, help="of a pair's picture; a square number")
    add("--words", type=int, default=200, help="of each of the two answers")
    return p


def main():
    args = parser().parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    found = []
    for shape, layers in args.models:
        torch.manual_seed(0)
        folder = model_folder(out, shape, layers)
        found.append(make(folder, shape, layers, args.image_tokens, device))
    pairs = make_pairs(out, args.pairs, args.image_tokens, args.words, seed=0)
    write_pairs(out / "pairs.jsonl", pairs)
    findings.print_and_exit(found)


if __name__ == "__main__":
    main()
