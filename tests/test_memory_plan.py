"""core/memory_plan.py: the sums, by hand for the paper's run."""

import argparse
import time
from pathlib import Path

import pytest
import stages
import torch
from conftest import ROOT

import rl
import sft
from bench import shapes
from core import memory_plan, runs
from core.files import InputError
from core.memory_plan import GB, Machine, plan_memory, why_not
from core.pairs import Pair, write_pairs
from toy import model as toy_model

GPU = 80 * 2**30  # bytes of a GPU of 80 GB
FREE = 79.2 * 2**30  # of which so many are free


@pytest.fixture(scope="module")
def seven_b():
    config, _ = shapes.config_and_tokenizer("7b")
    return memory_plan.model_size(config)


def flags_of(*words):
    return rl.parser().parse_args([str(word) for word in words])


def test_the_papers_model_on_four_gpus(seven_b):
    """
    8.29e9 weights, ZeRO-3, --micro_tokens 16384, --memory 0.4, by hand, in GB:

    a quarter of the weights at 2 bytes: 4.15, of the gradients at 4 bytes: 8.29, of AdamW's three
    numbers at 4 bytes: 24.88; CUDA 1. Buffers: a bucket of 5e8 and 1e9 whole weights at 2 bytes: 3.
    Activations: the inputs of 28 layers, 28 x 16384 x 3584 x 2 = 3.29; of the tower's 32 blocks for
    8192 tokens of pictures, 32 x 32768 x 1280 x 2 = 2.68; one layer open,
    16384 x (17 x 3584 + 6 x 18944) x 2 = 5.72, which is more than the LM head's
    2.5 x 4 x 2**26 + 6 x 152064 x 3584 = 3.94. vLLM: 0.4 x 85.9 = 34.36 awake.
    """
    plan = plan_memory(seven_b, flags_of(), 4, GPU)
    assert seven_b.weights == seven_b.trained == 8_292_166_656
    assert plan.resting / GB == pytest.approx(4.15 + 8.29 + 24.88 + 1, abs=0.02)
    assert plan.activations / GB == pytest.approx(3.29 + 2.68 + 5.72, abs=0.02)
    assert plan.rollout / GB == pytest.approx(38.32 + 34.36, abs=0.05)
    assert plan.update / GB == pytest.approx(38.32 + 3 + 11.69 + 1.5, abs=0.05)
    assert why_not(seven_b, flags_of(), 4, Machine(FREE, 1, GPU)) is None


def test_without_recomputation_zero_3_holds_all_weights_whole(seven_b):
    """Buffers: a bucket of 5e8 and 8.29e9 weights, at 2 bytes."""
    plan = plan_memory(seven_b, flags_of("--no-recompute"), 4, GPU)
    assert plan.buffers / GB == pytest.approx(1 + 16.58, abs=0.02)


def test_what_does_not_fit_is_refused_with_the_flags_that_make_it_fit(seven_b):
    one_gpu = Machine(FREE, 1, GPU)
    reason = why_not(seven_b, flags_of("--zero", 2), 4, one_gpu)
    assert "needs 85.1 GB on each GPU, and 85.0 GB are free" in reason
    assert "optimizer 24.9 GB" in reason and "vllm awake 34.4 GB" in reason
    assert reason.endswith("any of these makes it fit: --zero 3, --memory 0.3, --memory 0.25")
    assert why_not(seven_b, flags_of("--zero", 2, "--memory", 0.25), 4, one_gpu) is None
    assert "use more ranks" in why_not(seven_b, flags_of(), 1, one_gpu)
    small = why_not(seven_b, flags_of("--memory", 0.2), 4, one_gpu)
    assert small.endswith("expected at least --memory 0.21")


def test_four_layers_of_it_fit_one_gpu():
    """2.69e9 weights at 2 + 4 + 12 bytes are 48 GB."""
    config, _ = shapes.config_and_tokenizer("7b", 4)
    size = memory_plan.model_size(config)
    flags = flags_of("--memory", 0.25, "--zero", 2)
    assert plan_memory(size, flags, 1, GPU).resting / GB == pytest.approx(49.5, abs=0.5)
    assert why_not(size, flags, 1, Machine(FREE, 1, GPU)) is None


def test_the_ranks_of_a_machine_without_gpus_share_its_memory(seven_b):
    reason = why_not(seven_b, flags_of("--zero", 1), 2, Machine(24e9, 2))
    assert "for 2 rank(s) on this machine, and 24.0 GB are free" in reason


def test_a_micro_batch_is_at_most_what_a_rank_has_of_a_batch():
    flags = flags_of("--micro_tokens", 10**9, "--context", 100, "--train_batch", 8)
    assert memory_plan.micro_batch_tokens(flags, 4) == 2 * 100
    both_answers_of_each_pair = sft.parser().parse_args(
        ["--data", "-", "--out", "-", "--batch", "8", "--context", "100"]
    )
    assert memory_plan.micro_batch_tokens(both_answers_of_each_pair, 4) == 4 * 100
    assert memory_plan.micro_batch_tokens(flags_of("--micro_tokens", 64), 4) == 64


def test_a_frozen_tower_is_not_trained():
    config, _ = shapes.config_and_tokenizer("tiny")
    whole, frozen = memory_plan.model_size(config), memory_plan.model_size(config, True)
    assert frozen.weights == whole.weights > frozen.trained > 0
    plans = [plan_memory(size, flags_of(), 1) for size in (whole, frozen)]
    assert plans[0].weights == plans[1].weights
    assert plans[0].optimizer > plans[1].optimizer


def test_a_7b_checkpoint_is_116_gb(seven_b):
    one = memory_plan.checkpoint_bytes(seven_b.weights, seven_b.trained, 2, size=2)
    assert one / GB == pytest.approx(8.292 * 14, abs=0.1)
    needed = memory_plan.disk_needed(one, 2 * seven_b.weights, held=0)
    assert needed / GB == pytest.approx(2 * 116.1 + 16.6, abs=0.1)
    assert memory_plan.disk_needed(one, 0, held=1) == one
    reason = memory_plan.why_no_disk("out/rl", needed, one, 200e9)
    assert "a checkpoint is 116.1 GB" in reason and "200.0 GB are free" in reason
    assert memory_plan.why_no_disk("out/rl", needed, one, 300e9) is None


@pytest.fixture(scope="module")
def run_of_77m(tmp_path_factory):
    """A folder with a model of 77M weights and pairs, whose prompts have 164 tokens."""
    folder = tmp_path_factory.mktemp("run")
    toy_model.make(folder / "model", **shapes.TOYS["small"])
    question = ("toy", "Which colour is it?", [], None, ["red", "blue"], 1)
    write_pairs(folder / "pairs.jsonl", [Pair(str(number), *question) for number in range(10)])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine, samples", [("vllm", 2), ("hf", 10)], ids=["the step is most", "activations are most"]
)
def test_a_run_on_a_cpu_takes_what_is_planned(run_of_77m, engine, samples):
    """The peak of one step of rl.py, against the plan for as many tokens as its update has."""
    out = run_of_77m / engine
    flags = [
        *("--model", run_of_77m / "model", "--data", run_of_77m / "pairs.jsonl", "--out", out),
        *("--judge", "rule", "--engine", engine, "--check_every", 0, "--workers", 0),
        *("--rollout_batch", samples, "--train_batch", samples, "--max_new_tokens", 8),
        *("--zero", 2, "--no-recompute", "--micro_tokens", samples * (164 + 8)),
    ]
    (process,) = stages.start("rl", *flags, printed=run_of_77m / f"{engine}.txt")
    measured = peak_until_step(1, out, process)
    stages.kill(process)
    model = memory_plan.size_of(run_of_77m / "model", False)
    planned = plan_memory(model, flags_of(*flags), world=1).peak
    assert model.weights > 76e6
    assert planned == pytest.approx(measured, rel=0.15)


def peak_until_step(step, out, process):
    """The most memory that a process had resident until it logged a step."""
    log, peak = out / "log.jsonl", 0
    while not (log.exists() and f'"step": {step},' in log.read_text()):
        assert process.is_alive()
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = 1024 * int(status.partition("VmHWM:")[2].split()[0])
        time.sleep(0.05)
    return peak


def test_a_run_that_cannot_fit_stops_before_anything_is_loaded(monkeypatch, one_rank):
    monkeypatch.setattr(memory_plan, "free_host_memory", lambda: 1e9)
    flags = flags_of("--model", ROOT / "toy" / "base")
    with pytest.raises(InputError, match=r"needs 2\.\d GB .* 1\.0 GB are free"):
        memory_plan.check_memory(flags, torch.device("cpu"))


def test_the_toy_is_silent_and_a_tight_run_says_a_line(monkeypatch, one_rank, capsys):
    flags = flags_of("--model", ROOT / "toy" / "base", "--micro_tokens", 512)
    memory_plan.check_memory(flags, torch.device("cpu"))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(memory_plan, "free_host_memory", lambda: 2.5e9)
    memory_plan.check_memory(flags, torch.device("cpu"))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("memory: 1.8 GB while it trains, 1.8 GB while vLLM samples; 2.5 GB free")


def test_save_times(monkeypatch):
    """By steps, by minutes since the last one, and after the last step; with neither, never."""
    now = [0.0]
    monkeypatch.setattr(runs.time, "monotonic", lambda: now[0])

    def due(every, minutes, steps=10):
        times = runs.SaveTimes(argparse.Namespace(save_every=every, save_minutes=minutes), steps)
        found = []
        for done in range(1, steps + 1):
            now[0] += 60
            if times.is_due(done):
                found.append(done)
        return found

    assert due(0, 0) == []
    assert due(4, 0) == [4, 8, 10]
    assert due(0, 3) == [3, 6, 9, 10]
    assert due(5, 3) == [3, 5, 8, 10]
