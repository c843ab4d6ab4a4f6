"""What a GPU needs of a process, as far as a machine without one can tell."""

import argparse
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_layout import STAGES

import sft
from core import agreement
from core.encoding import load_processor
from core.pairs import judging_turns, read_pairs
from core.prompts import PromptDataset, encode_prompts
from core.training import read_ahead

# Imports each stage in a process of its own, on a machine whose driver reports one GPU, asks
# whether there is one, and says whether a process that is forked then could use it.
FORK_AFTER_THE_QUESTION = """
import importlib, os, sys
import torch

torch.cuda._device_count_nvml = lambda: 1

def exit_code_of(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def can_fork(stage):
    importlib.import_module(stage)
    assert torch.cuda.is_available()
    pid = os.fork()
    if pid == 0:
        os._exit(torch.cuda._is_in_bad_fork())
    return exit_code_of(pid) == 0

for stage in sys.argv[1:]:
    pid = os.fork()
    if pid == 0:
        print(stage, can_fork(stage), os.environ["VLLM_WORKER_MULTIPROC_METHOD"], flush=True)
        os._exit(0)
    assert exit_code_of(pid) == 0
"""


@pytest.mark.slow
def test_no_stage_asks_for_a_gpu_in_a_way_that_keeps_vllm_from_starting():
    names = ("PYTORCH_NVML_BASED_CUDA_CHECK", "VLLM_WORKER_MULTIPROC_METHOD")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", FORK_AFTER_THE_QUESTION, *STAGES],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{stage} True spawn" for stage in STAGES]


@pytest.fixture
def forked_after_cuda(monkeypatch):
    """As in a process that is forked after CUDA has started: any use of the GPU is an error."""

    def refuse():
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "_lazy_init", refuse)


def test_data_workers_leave_the_gpu_alone(toy_folder, forked_after_cuda):
    """They are forked after CUDA has started."""
    processor = load_processor(toy_folder / "base")
    pairs = read_pairs(toy_folder / "pairs.jsonl")[:5]  # of every kind
    args = argparse.Namespace(rollout_batch=5, both_orders=False, seed=0)
    dataset = PromptDataset(pairs, judging_turns, processor, args)
    prompts = list(read_ahead(dataset, [(0, place) for place in range(5)], 1, ahead=5))
    ids = [prompt.prompt_ids for prompt in encode_prompts(pairs, judging_turns, processor)]
    assert sorted(prompt.prompt_ids for prompt in prompts) == sorted(ids)
    examples = sft.Examples("pairs.jsonl", pairs, processor, None, 4096)
    assert len(list(read_ahead(examples, range(5), 1, ahead=5))) == 5


@pytest.mark.slow
def test_a_rank_waits_long_for_the_numbers_of_another(tmp_path):
    """None of the numbers travels by nccl, and each wait is longer than torch allows by itself."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*torchrun, ROOT / "tests" / "programs" / "wait_for_another_rank.py"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_check_that_fails_names_vllms_older_model_runner(capsys):
    device = torch.device("cpu")
    agreement.print_check([("as loaded", 8, 1e-7, 1e-6)], device)
    assert "VLLM_USE_V2_MODEL_RUNNER" not in capsys.readouterr().out
    agreement.print_check([("as loaded", 8, 1e-7, 1e-6), ("moved, synced", 8, 0.3, 1)], device)
    assert "VLLM_USE_V2_MODEL_RUNNER=0" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        agreement.require_same_policy(0.3, 1.0, 1, device)
