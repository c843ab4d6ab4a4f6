"""rl.py's main() once for every algorithm, in one process a rank: the words after this file's name are flags that all share."""
import json
import sys
from pathlib import Path

import torch.distributed as dist

import rl

shared, out = sys.argv[1:-1], Path(sys.argv[-1])
for name in rl.ALGORITHMS:
    sys.argv = ["rl.py", *shared, "--algo", name, "--out", str(out / name)]
    rl.main()
    if dist.get_rank() == 0:
        rows = [json.loads(line) for line in (out / name / "log.jsonl").read_text().splitlines()]
        print("RESULT", name, [row["grad_norm"] for row in rows if "reward" in row], flush=True)
