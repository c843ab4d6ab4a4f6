"""
rl.py's main() once for every algorithm, in one process a rank. For tests/test_rl.py.

$ torchrun --nproc_per_node=2 tests/programs/every_algorithm.py FLAGS OUT    # flags of rl.py
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist

import rl
from core.neighbours import ALGORITHMS

flags, out = sys.argv[1:-1], Path(sys.argv[-1])
for name in ALGORITHMS:
    sys.argv = ["rl.py", *flags, "--algo", name, "--out", str(out / name)]
    rl.main()
    if dist.get_rank() == 0:
        rows = [json.loads(line) for line in (out / name / "log.jsonl").read_text().splitlines()]
        (grad_norm,) = [row["grad_norm"] for row in rows if "reward" in row]
        print(f"RESULT {name}: {grad_norm}", flush=True)
