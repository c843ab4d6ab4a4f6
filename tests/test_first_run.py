"""
bench/first_run.py, which `make gpu` starts, at a tiny size: its parts once, and each with a fault
that it must name: one that is planted into the part's processes, or a log as it would print it.
Commands are forked (tests/stages.py), which saves their imports.
"""

import dataclasses
import errno
import functools
import os
import sys
import time
from types import SimpleNamespace

import pytest
import stages
import torch
from conftest import wait_until_gone, write_rows

from bench import check_sleep, findings, first_run, scale, verdicts
from bench.findings import FAILED, NO_GPU, OK, SLOW, Finding
from bench.first_run import Command, Part
from bench.scale import Card, Scale
from core.files import InputError
from core.memory_plan import Machine

GB = 1e9


def run_forked(command, log, seconds, before=None):
    """In the place of first_run.run_in_processes."""
    module = command.script.removesuffix(".py").replace("/", ".")
    options = {"printed": log, "ranks": command.ranks, "before": before}
    processes = stages.start(module, *command.words, **options)
    deadline = time.time() + seconds
    for process in processes:
        process.join(max(1, deadline - time.time()))
    codes = {process.exitcode for process in processes}
    for process in processes:
        process.kill()
    return None if codes == {0} else f"ended with codes {codes}"


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Two ranks on a CPU."""
    out = tmp_path_factory.mktemp("gpu")
    (out / "models").mkdir()
    one, together = (Scale("tiny", 0, ranks, 0.3) for ranks in (1, 2))
    return first_run.Setting(one, together, [512, 1024], out, on_gpus=False)


@pytest.fixture(scope="module")
def made(setting):
    """The setting, when its models and pairs are there."""
    (result,) = first_run.run_all([first_run.models(setting)], setting, 6, run_forked)
    assert [finding.verdict for finding in result.findings] == [OK]
    return setting


def on_one_rank(setting):
    return dataclasses.replace(setting, together=setting.one)


def result_of(part, setting, before=None):
    run_command = functools.partial(run_forked, before=before)
    return first_run.run_part(part, setting.out, 6, run_command)


def failures(result):
    return [finding.text for finding in result.findings if finding.verdict == FAILED]


# --------------------------------------------------------------------------------------------------
# Without a fault. rl.py --check has a fault below, tests/test_bench.py runs bench/gpu.py.


@pytest.mark.slow
def test_every_part_has_a_verdict(made):
    alone = on_one_rank(made)
    left_out = ("models", "check-1", "speed")
    parts = [part for part in first_run.make_parts(alone) if part.name not in left_out]
    results = first_run.run_all(parts, alone, 6, run_forked)
    found = {}
    for result in results:
        found[result.part.name] = [finding.verdict for finding in result.findings]
        assert not result.failed, result.log.read_text()[-3000:]
    assert found.pop("machine").count(NO_GPU) == 2
    assert found == {
        "kernels": [OK, NO_GPU, OK, NO_GPU, OK, OK],
        "steps": [OK, OK],
        "evaluate-1": [OK],
        "sleep": [NO_GPU, OK],
        "checkpoint": [OK, OK],
    }
    page = (made.out / "report.md").read_text()
    assert page.startswith("# First run: needs a GPU\n")
    assert all(f"| {part.name} | " in page for part in parts)
    assert "What failed" not in page


def test_one_gpu_needs_no_part_twice(setting):
    names = [part.name for part in first_run.make_parts(on_one_rank(setting))]
    assert "check-1" in names and "check-2" not in names
    assert len(names) == len(first_run.make_parts(setting)) - 2


def test_some_parts_alone(setting):
    parts = first_run.make_parts(setting)
    assert [part.name for part in first_run.chosen(parts, ["speed", "machine"])] == [
        "machine",
        "speed",
    ]
    with pytest.raises(InputError, match="--only kernel: expected some of machine, models, kern"):
        first_run.chosen(parts, ["kernel"])


# --------------------------------------------------------------------------------------------------
# Planted faults


def starve():
    from core import memory_plan

    memory_plan.free_host_memory = lambda: 1e8


def fill_the_disk():
    from bench import make_models

    def fail(folder, *_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

    make_models.make_model = fail


def break_kernels():
    """One raises, another one is wrong by a tenth."""
    from bench import check_kernels

    def fail(*_):
        raise RuntimeError("no kernel image is available for execution on the device")

    check_kernels.PatchProduct.forward = fail
    right = check_kernels.LMHead.forward

    def wrong(self, *inputs):
        logps, entropy = right(self, *inputs)
        return 1.1 * logps, entropy

    check_kernels.LMHead.forward = wrong


def load_a_wrong_weight():
    from core.sampler import VLLMSampler

    load = VLLMSampler.load_weights

    def load_wrong(self, named_tensors):
        changed = []
        for name, tensor in named_tensors:
            changed.append((name, 1.5 * tensor if name.endswith("0.attn.proj.weight") else tensor))
        return load(self, changed)

    VLLMSampler.load_weights = load_wrong


def let_rank_1_die():
    import rl

    update = rl.optimizer_step

    def die(*inputs):
        if os.environ["RANK"] == "1":
            os._exit(9)
        return update(*inputs)

    rl.optimizer_step = die


def forget_the_checkpoint():
    from core import runs

    runs.load_checkpoint = lambda *_: None


@pytest.mark.slow
def test_too_little_memory(setting):
    told = failures(result_of(first_run.machine(setting), setting, starve))
    assert [text.partition(":")[0] for text in told] == [
        "memory of tiny on 1 rank(s)",
        "memory of tiny on 2 rank(s)",
    ]
    assert "and 0.1 GB are free" in told[0]


@pytest.mark.slow
def test_a_full_disk(setting, tmp_path):
    elsewhere = dataclasses.replace(setting, out=tmp_path)
    result = result_of(first_run.models(elsewhere), elsewhere, fill_the_disk)
    (told,) = failures(result)
    assert "No space left on device" in told
    assert result.cause == "the disk is full"


@pytest.mark.slow
def test_kernels_that_fail(made):
    """One that raises leaves the others."""
    result = result_of(first_run.kernels(made), made, break_kernels)
    raised, in_tower, wrong = failures(result)
    assert raised.startswith("patch embedding: RuntimeError: no kernel image is available")
    assert in_tower.startswith("vision tower: RuntimeError")
    assert wrong.startswith("log-probabilities of tokens: difference 1")
    assert "an 8.0 (A100) or newer" in result.cause
    assert [finding.verdict for finding in result.findings].count(OK) == 1


@pytest.mark.slow
def test_a_wrong_weight_after_the_sync(made):
    result = result_of(first_run.check(made, made.one), made, load_a_wrong_weight)
    (told,) = failures(result)
    as_loaded, moved = told.split("as loaded ")[1].split(", moved, synced ")[0:2]
    assert float(as_loaded) < 1e-5 < float(moved.split(",")[0])
    assert "VLLM_USE_V2_MODEL_RUNNER=0" in result.cause
    page = first_run.report([result], made)
    assert "# First run: FAILED" in page
    assert f"Please send `{made.out / 'check-1.log'}`" in page


@pytest.mark.slow
def test_a_rank_that_dies(made):
    result = result_of(first_run.checkpoint(made), made, let_rank_1_die)
    (told,) = failures(result)
    assert told.startswith("ended with codes {1, 9}: ")
    assert result.cause.startswith("a rank ended and the others noticed")


@pytest.mark.slow
def test_a_checkpoint_that_is_not_loaded(made):
    alone = on_one_rank(made)
    (told,) = failures(result_of(first_run.checkpoint(alone), alone, forget_the_checkpoint))
    assert "resumed in" in told and "weights" in told


# --------------------------------------------------------------------------------------------------
# Logs of faults


CHECK = """
log-probabilities of vLLM and of the trainer (bound of the mean gap: 0.05)
                         judgements   mean gap    max gap
as loaded                        64   1.20e-03   2.10e-02   ok
moved, synced                    64   3.00e-01   9.10e-01   NOT THE SAME POLICY
moved back, synced               64   1.10e-03   2.00e-02   ok
"""
SPEED = """
| phase | seconds | tokens a second and rank | memory, GiB |
| --- | --- | --- | --- |
| rollout | 9.1 | 2,100 sampled | 60.1 |
| whole step | 52.1 | 1,842 of prompts and samples | 71.2 |

| --micro_tokens | micro-batches | seconds | tokens a second and rank | MFU | memory, GiB |
| --- | --- | --- | --- | --- | --- |
| 4,096 | 12 | 8.1 | 6,100 | 18.2% | 50.1 |
| 8,192 | 6 | 7.4 | 6,700 | 21.0% | 61.1 |
"""


def test_a_sync_that_reaches_other_weights():
    (finding,) = verdicts.of_same_policy(CHECK)
    assert finding.verdict == FAILED and "moved, synced 3.00e-01" in finding.text
    (finding,) = verdicts.of_same_policy(CHECK.replace("NOT THE SAME POLICY", "ok"))
    assert finding.verdict == OK
    with pytest.raises(verdicts.Incomplete, match="expected 3 comparisons"):
        verdicts.of_same_policy("".join(CHECK.splitlines(keepends=True)[:-1]))


def test_a_mismatch_in_a_step(tmp_path):
    log = tmp_path / "log.jsonl"
    read = functools.partial(verdicts.of_steps, "", log, expected=2)
    with pytest.raises(verdicts.Incomplete, match="expected 2 steps in "):
        read(bound=0.05)
    step = {"seconds": 4.5, "s_rollout": 3.0, "s_update": 1.25}
    rows = [
        {"args": {}},
        {"step": 1, "mismatch": 0.001} | step,
        {"step": 2, "mismatch": 0.2} | step,
    ]
    write_rows(log, rows)
    gap, seconds = read(bound=0.05)
    told = "mismatch of vLLM and the trainer in each step: 1.0e-03, 2.0e-01 (bound 0.05)"
    assert gap == Finding(FAILED, told)
    assert seconds == Finding(OK, "the last step took 4.5 s: rollout 3, update 1.2")
    assert read(bound=0.5)[0].verdict == OK
    write_rows(log, [*rows[:2], {"step": 2} | step])
    with pytest.raises(verdicts.Incomplete, match="not all have a mismatch"):
        read(bound=0.05)


def test_a_rank_without_its_judgements():
    log = "5 of 8 judgements in 10 s, 99 tokens/s\n8 of 8 judgements in 12 s, 120 tokens/s\n"
    (finding,) = verdicts.of_evaluation(log, expected=16)
    assert finding == Finding(FAILED, "8 of 16 judgements, 120 tokens a second")
    (finding,) = verdicts.of_evaluation(log + log.splitlines()[1], expected=16)
    assert finding == Finding(OK, "16 of 16 judgements, 240 tokens a second")


def test_a_slow_update_and_a_slow_step():
    update, step = verdicts.of_speed(SPEED, whole_7b=True)
    assert update.verdict == step.verdict == SLOW
    assert "18.2% at 4,096, 21.0% at 8,192; published 23.2 %" in update.text
    assert "1,842 tokens a second and rank, 71.2 GiB; published 2,000" in step.text
    update, step = verdicts.of_speed(SPEED.replace("21.0%", "41.0%"), whole_7b=False)
    assert update.verdict == step.verdict == OK
    assert "not a whole 7B" in step.text
    with pytest.raises(verdicts.Incomplete):
        verdicts.of_speed("torch.OutOfMemoryError: CUDA out of memory", whole_7b=True)


def test_sleep_that_gives_nothing_back_and_tokens_that_change(monkeypatch):
    in_use = iter([30 * GB, 28 * GB, 30 * GB, 1.9 * GB])
    monkeypatch.setattr(check_sleep, "used", lambda device: next(in_use))
    sampler, gpu = SimpleNamespace(sleep=lambda: None), torch.device("cuda")
    finding = check_sleep.memory_asleep(sampler, gpu, before=GB)
    told = "asleep vLLM holds 27.0 GB of 29.0 GB; planned: 1.5 GB at most"
    assert finding == Finding(FAILED, told)
    assert check_sleep.memory_asleep(sampler, gpu, before=GB).verdict == OK
    assert check_sleep.same_tokens([[1], [2, 3]], [[1], [2, 4]]).verdict == FAILED
    assert check_sleep.same_tokens([[1], [2, 3]], [[1], [2, 3]]).verdict == OK


def test_a_checkpoint_of_other_weights_and_an_update_that_moves_none():
    saved = "began: aa, saved: bb in 1.5 s\n"
    wrong = verdicts.of_checkpoint(saved + "resumed: cc in 0.5 s\n")
    assert [finding.verdict for finding in wrong] == [OK, FAILED]
    still = verdicts.of_checkpoint("began: bb, saved: bb in 1.5 s\nresumed: bb in 0.5 s\n")
    assert [finding.verdict for finding in still] == [FAILED, OK]
    with pytest.raises(verdicts.Incomplete):
        verdicts.of_checkpoint(saved)


@pytest.mark.parametrize(
    "line, cause",
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "memory of the"),
        ("ValueError: No available memory for the cache blocks.", "memory of the GPU"),
        ("RuntimeError: Cannot re-initialize CUDA in forked subprocess", "spawn"),
        ("main.c:5:10: fatal error: Python.h: No such file or directory", "python3-dev"),
        ("torch.distributed.DistBackendError: ncclSystemError: System call", "NCCL_DEBUG=INFO"),
        ("ranks died: Signal 9 (SIGKILL) received by PID 12", "memory was full"),
        ("RuntimeError: CUDA error: an illegal memory access was encountered", "LAUNCH_BLOCKING"),
        ("the run needs 96.1 GB on each GPU, and 79 GB are free", "--layers"),
        ("the NVIDIA driver on your system is too old; driver is too old", "update it"),
        ("something else", ""),
    ],
)
def test_likely_causes(line, cause):
    found = verdicts.likely_cause(f"INFO starting\n{line}\n")
    assert cause in found
    assert bool(found) == bool(cause)


# --------------------------------------------------------------------------------------------------
# Processes of a part


def script_part(tmp_path, text, minutes=1.0, ranks=1):
    script = tmp_path / "script.py"
    script.write_text(text)
    commands = [Command(str(script), ["--flag", 2], ranks)]
    return Part("scripted", "a script", minutes, commands, verdicts.of_findings)


@pytest.mark.slow
def test_several_ranks_are_started_by_torchrun(tmp_path):
    text = "import os, sys\nprint('ok: rank', os.environ['RANK'], *sys.argv[1:], flush=True)\n"
    part = script_part(tmp_path, text, ranks=2)
    result = first_run.run_part(part, tmp_path, 1, first_run.run_in_processes)
    found = sorted(str(finding) for finding in result.findings)
    assert found == ["ok: rank 0 --flag 2", "ok: rank 1 --flag 2"]


@pytest.mark.slow
def test_a_part_that_hangs_is_stopped_with_all_that_it_started(tmp_path):
    text = (
        "import subprocess, sys, time\n"
        "sleeper = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print('ok: began', flush=True)\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(sleeper.pid))\n"
        "time.sleep(60)\n"
    )
    part = script_part(tmp_path, text, minutes=3 / 60)
    start = time.monotonic()
    result = first_run.run_part(part, tmp_path, 1, first_run.run_in_processes)
    assert time.monotonic() - start < 20
    began, stopped = result.findings
    assert began == Finding(OK, "began")
    assert stopped.verdict == FAILED and "stopped after 3 s without an end" in stopped.text
    wait_until_gone([(tmp_path / "pid").read_text()])


def test_an_error_and_a_silent_end_are_failures(tmp_path):
    part = script_part(tmp_path, "raise ValueError('a cause')")
    result = first_run.run_part(part, tmp_path, 1, first_run.run_in_processes)
    assert failures(result) == ["ended with code 1: ValueError: a cause"]
    part = script_part(tmp_path, "print('nothing of note')")
    result = first_run.run_part(part, tmp_path, 1, first_run.run_in_processes)
    assert failures(result) == ["Incomplete: the log holds no finding"]


def test_a_check_that_raises_is_a_finding():
    def fail():
        raise ImportError("no module\nand more")

    found = findings.attempt("bindings", fail)
    assert found == Finding(FAILED, "bindings: ImportError: no module")
    assert findings.read_findings(f"noise\n{found}\n") == [found]


# --------------------------------------------------------------------------------------------------
# What fits


def machine_of(gigabytes):
    return Machine(0.98 * gigabytes * 2**30, 1, gigabytes * 2**30)


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks, gigabytes, expected",
    [
        (4, 80, Scale("7b", 0, 4, 0.3)),
        (1, 80, Scale("7b", 4, 1, 0.3)),
        (1, 140, Scale("7b", 16, 1, 0.25)),
        (1, 24, Scale("small", 0, 1, 0.25)),
    ],
)
def test_the_largest_model_that_fits_is_taken(ranks, gigabytes, expected):
    machine = machine_of(gigabytes)
    found = scale.largest_that_fits(ranks, machine, host_memory=1e12, disk=1e12)
    assert found == expected
    if expected.shape == "7b":
        little = scale.largest_that_fits(ranks, machine, host_memory=1e12, disk=2e9)
        assert little.shape == "small"
        budgets = scale.budgets_that_fit(found, machine)
        assert budgets == list(scale.BUDGETS[: len(budgets)])


def test_gpus_are_those_that_torch_sees(monkeypatch, tmp_path):
    python = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(python))

    def say(lines, stream=1, code=0):
        python.write_text(f"#!/bin/sh\nprintf '{lines}' >&{stream}\nexit {code}\n")
        python.chmod(0o755)

    say('a warning\\n[["NVIDIA H100", 85000, 84000], ["NVIDIA H100", 85000, 40000]]\\n')
    cards = scale.visible_cards()
    assert cards == [Card("NVIDIA H100", 85000, 84000), Card("NVIDIA H100", 85000, 40000)]
    assert scale.machine_of(cards).free == 40000
    say("Traceback\\nRuntimeError: the driver is too old\\n", stream=2, code=1)
    with pytest.raises(InputError, match="GPUs: RuntimeError: the driver is too old; see make"):
        scale.visible_cards()


@pytest.mark.parametrize(
    "words, error",
    [
        (["--shape", "tiny"], "torch sees no GPU; expected one, or --shape tiny --ranks 2"),
        (["--ranks", "1"], "without a GPU name a size: --shape tiny"),
    ],
)
def test_a_machine_without_gpus_needs_a_size(monkeypatch, tmp_path, words, error):
    monkeypatch.setattr(scale, "visible_cards", lambda: [])
    args = first_run.parser().parse_args([*words, "--out", str(tmp_path)])
    with pytest.raises(InputError, match=error):
        first_run.make_setting(args)
