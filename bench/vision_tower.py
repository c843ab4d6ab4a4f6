"""
The vision tower as core/vision_tower.py runs it against transformers' own ("sdpa"): time of a
forward and a backward pass, at the width of Qwen2.5-VL-7B's tower with fewer layers and random
weights. On a GPU in bfloat16, else in float32; the two take turns. The last columns are the largest
difference to transformers', as a share of the largest number.

$ python bench/vision_tower.py
"""

import copy
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from bench.output import made_by, print_and_save, spread
from core.flags import command_line
from core.tables import markdown_table
from core.vision_tower import speed_up_tower

SIZES = [(40, 64), (46, 54), (50, 50), (36, 70)]  # of pictures, in patches: some 640 tokens each


def make_tower(layers, width, device):
    """transformers' tower; every fourth layer attends over all of a picture."""
    from transformers import Qwen2_5_VLConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
        Qwen2_5_VisionTransformerPretrainedModel,
    )

    config = Qwen2_5_VLConfig().vision_config
    config.depth = layers
    config.hidden_size = width
    config.intermediate_size = width * 3420 // 1280
    config.num_heads = width // 80
    config.fullatt_block_indexes = list(range(3, layers, 4))
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return Qwen2_5_VisionTransformerPretrainedModel(config).to(device, dtype)


def make_pictures(number, device):
    """Random pixels and the grids of pictures."""
    sizes = [SIZES[picture % len(SIZES)] for picture in range(number)]
    grids = torch.tensor([(1, height, width) for height, width in sizes], device=device)
    pixels = torch.randn(int(grids.prod(1).sum()), 1176, device=device)
    return pixels, grids


def run(tower, pixels, grids):
    """Seconds of a pass; its features and the gradient of the patch embedding."""
    tower.zero_grad()
    synchronize(pixels.device)
    start = time.perf_counter()
    features = tower(pixels, grids).pooler_output
    features.square().sum().backward()
    synchronize(pixels.device)
    seconds = time.perf_counter() - start
    return seconds, features.detach(), tower.patch_embed.proj.weight.grad


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def difference(tensor, expected):
    """The largest difference, as a share of the largest number."""
    return float((tensor - expected).abs().max() / expected.abs().max())


def section(args, device, patches, seconds, differences):
    """The numbers in markdown."""
    rows = [["transformers", spread(seconds["transformers"]), "", ""]]
    rows.append(["ours", spread(seconds["ours"]), *[f"{share:.1e}" for share in differences]])
    ratio = statistics.median(seconds["ours"]) / statistics.median(seconds["transformers"])
    rows.append(["ratio", f"{ratio:.2f}", "", ""])
    where = "CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
    size = f"{args.layers} layers of width {args.width:,}"
    size += f", {args.pictures} pictures of {patches:,} patches in all"
    machine = f"{where}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
    about = f"{size}, forward and backward, {machine}; {made_by('vision_tower.py')}"
    head = ["", "seconds", "difference of features", "difference of the first gradient"]
    return f"## The vision tower\n\n{about}\n\n{markdown_table(head, rows).strip()}\n"


def parser():
    p = command_line(__doc__)
    add = p.add_argument
    add("--layers", type=int, default=4, help="of the tower; the 7B model's has 32")
    add("--width", type=int, default=1280, help="of the tower; a multiple of 80")
    add("--pictures", type=int, default=4, help="of 640 tokens each")
    add("--repeats", type=int, default=3, help="of each")
    add("--out", help="file for the numbers, in markdown")
    return p


def main():
    args = parser().parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    theirs = make_tower(args.layers, args.width, device)
    ours = copy.deepcopy(theirs)
    speed_up_tower(ours)
    towers = {"transformers": theirs, "ours": ours}
    pixels, grids = make_pictures(args.pictures, device)
    if device.type == "cuda":
        for tower in towers.values():
            run(tower, pixels, grids)  # the first pass chooses kernels
    seconds = {name: [] for name in towers}
    results = {}
    for _ in range(args.repeats):
        for name, tower in towers.items():
            elapsed, *results[name] = run(tower, pixels, grids)
            seconds[name].append(elapsed)
    differences = [difference(*pair) for pair in zip(results["ours"], results["transformers"])]
    print_and_save(section(args, device, len(pixels), seconds, differences), args.out)


if __name__ == "__main__":
    main()
