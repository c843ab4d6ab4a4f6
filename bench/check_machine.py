"""
Is this machine ready for the project? GPUs, driver, versions, compiler, disk and memory, a line
each; and for each of --runs whether what it plans to take is there (core/memory_plan.py).

$ python bench/check_machine.py --runs 7b:4:1:0.3 7b:0:4:0.3
"""

import functools
import importlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from bench import findings
from bench.findings import FAILED, NO_GPU, OK, Finding, expect
from bench.scale import read_scale
from core import memory_plan
from core.flags import command_line
from core.memory_plan import gb
from core.runs import installed_version

ROOT = Path(__file__).resolve().parent.parent
PINNED = ("torch", "torchvision", "transformers", "deepspeed", "vllm", "cuda-python")
OLDEST = (8, 0)  # compute capability of an A100: bfloat16 and flash attention
PICTURES_AND_LOGS = 1e9  # bytes


def gpus():
    count = torch.cuda.device_count()
    if not torch.cuda.is_available():
        return Finding(NO_GPU, "GPUs: torch sees none")
    names = {torch.cuda.get_device_name(number) for number in range(count)}
    oldest = min(torch.cuda.get_device_capability(number) for number in range(count))
    text = f"GPUs: {count} x {', '.join(sorted(names))}, driver {driver()}, CUDA"
    text += f" {torch.version.cuda}, compute capability {oldest[0]}.{oldest[1]}"
    return expect(oldest >= OLDEST, text)


def driver():
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return (done.stdout.splitlines() or ["unknown"])[0]


def versions():
    """What is installed, and where it is not what requirements.txt pins."""
    text = (ROOT / "requirements.txt").read_text()
    pins = dict(re.findall(r"^([\w-]+)==(\S+)", text, re.MULTILINE))
    told, others = [], []
    for name in PINNED:
        if name == "cuda-python" and not torch.cuda.is_available():
            continue
        version = installed_version(name)
        told.append(f"{name} {version}")
        if version is None or version.split("+")[0] != pins[name]:
            others.append(f"{name} {pins[name]}")
    line = f"Python {sys.version.split()[0]}, {', '.join(told)}"
    if others:
        line += f"; requirements.txt has {', '.join(others)}: run make setup"
    return expect(not others, line)


def compiler():
    """On a GPU triton compiles a launcher for each kernel, against Python's headers."""
    name = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    headers = sysconfig.get_path("include", "posix_prefix")
    problem = "neither gcc nor clang"
    if name:
        command = [name, "-fsyntax-only", "-x", "c", "-I", headers, "-"]
        done = subprocess.run(
            command, input="#include <Python.h>", capture_output=True, text=True, timeout=60
        )
        problem = (done.stderr.splitlines() or [""])[0]
        if done.returncode == 0:
            return Finding(OK, f"compiler: {name} finds {headers}/Python.h")
    verdict = FAILED if torch.cuda.is_available() else NO_GPU
    return Finding(verdict, f"compiler: {problem}; a GPU needs one, and Python's headers")


def cuda_bindings():
    """flashinfer's and torch's packages both write into the folder cuda/."""
    if not torch.cuda.is_available():
        return Finding(NO_GPU, "cuda.bindings, which flashinfer needs")
    importlib.import_module("cuda.bindings.driver")
    return Finding(OK, "cuda.bindings can be imported")


def disk(runs, folder):
    models = {(run.shape, run.layers): run.model_size() for run in runs}
    size = 2 if torch.cuda.is_available() else 4
    needed = size * sum(model.weights for model in models.values()) + PICTURES_AND_LOGS
    free = shutil.disk_usage(folder).free
    text = f"disk: {gb(free)} free, models and logs take {gb(needed)} at most"
    return expect(needed < free, text)


def planned_memory(run):
    """Of one run: beside what each GPU has, and what the machine has while models load."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    os.environ["LOCAL_WORLD_SIZE"] = str(run.ranks)
    machine = memory_plan.this_machine(device)
    model = run.model_size()
    reason = memory_plan.why_not(model, run.flags(), run.ranks, machine)
    if machine.gpu and not reason:
        host = memory_plan.free_host_memory()
        reason = memory_plan.why_no_host(model, run.ranks, host)
    plan = memory_plan.plan_memory(model, run.flags(), run.ranks, machine.gpu)
    return expect(
        not reason, f"memory of {run.named()}: {reason or memory_plan.told(plan, machine)}"
    )


def parser():
    p = command_line(__doc__)
    runs_help = "SHAPE:LAYERS:RANKS:MEMORY, the last one vLLM's share of a GPU"
    p.add_argument("--disk", default=".", help="folder on the disk to write to")
    p.add_argument("--runs", type=read_scale, nargs="+", default=[], help=runs_help)
    return p


def main():
    args = parser().parse_args()
    found = []
    for check in (gpus, versions, compiler, cuda_bindings):
        found.append(findings.attempt(check.__name__.replace("_", " "), check))
    found.append(findings.attempt("disk", functools.partial(disk, args.runs, args.disk)))
    for run in args.runs:
        check = functools.partial(planned_memory, run)
        found.append(findings.attempt(f"memory of {run.named()}", check))
    findings.print_and_exit(found)


if __name__ == "__main__":
    main()
