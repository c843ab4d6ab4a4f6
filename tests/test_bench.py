"""
Each script of bench/ at its smallest: it runs, and prints and writes its table. The numbers mean
nothing here. The scripts run two at a time.
"""

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT
from test_layout import commands

from bench import shapes, verdicts
from bench.findings import NO_GPU, OK
from toy.benchmark_sets import held_out_pairs
from toy.source_files import Source

SHARED = {"output", "contenders", "shapes", "findings", "scale", "verdicts"}  # no scripts
OF_FIRST_RUN = {"first_run", "make_models"}  # and check_*, which tests/test_first_run.py tries
SCRIPTS = sorted({path.stem for path in (ROOT / "bench").glob("*.py")} - SHARED)
TRL = ROOT / "out" / "trl" / ".venv"  # where make bench has it
SMALLEST = {
    "step": "--data DATA --samples 4 --tokens 4 --scale 8 --rounds 1 --trl_rows 4 --trl TRL",
    "gpu": "--shape tiny --samples 2 --new_tokens 4 --image_tokens 4 --words 4 --budgets 256 512 "
    "--repeats 1",
    "evaluate": "--model BASE --data DATA --limit 3 --samples 2 --max_new_tokens 8 --seconds 1",
    "shared_prompts": "--shape tiny --layers 1 --prompts 2 --samples 3 --new_tokens 4 "
    "--image_tokens 4 --words 4 --repeats 1 --turns 1",
    "token_logps": "--vocabulary 512 --hidden 128 --tokens 32 --rows 2 --prompt 4 --repeats 1",
    "vision_tower": "--layers 4 --width 80 --pictures 1 --repeats 1",
    "annotate": "--pairs 20 --latency 0.05 --concurrency 4",
}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """done(script) -> (its finished process, the file it was to write)"""
    folder = tmp_path_factory.mktemp("bench")
    source = Source(folder, "test", "pairs", 0)
    held_out_pairs(source, 24)
    paths = {"DATA": source.folder / "pairs.jsonl", "TRL": TRL, "BASE": ROOT / "toy" / "base"}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def run(name):
        out = folder / f"{name}.md"
        words = [str(paths.get(word, word)) for word in SMALLEST[name].split()]
        command = [sys.executable, ROOT / "bench" / f"{name}.py", *words, "--out", out]
        process = subprocess.run(
            command, text=True, capture_output=True, timeout=300, cwd=folder, env=environment
        )
        return process, out

    with ThreadPoolExecutor(2) as pool:
        jobs = {name: pool.submit(run, name) for name in SMALLEST}  # the longest ones first
        yield lambda name: jobs[name].result()
        pool.shutdown(cancel_futures=True)  # when only some tests are run


def tables(finished, title):
    """The rows of the tables that a script wrote, which are those that it printed."""
    process, out = finished
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-3000:]
    text = out.read_text()
    assert text in process.stdout
    assert text.startswith(f"## {title}")
    lines = [line.strip("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def load(name):
    """The module of a script: bench/evaluate.py and evaluate.py have the same name."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / "bench" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_scripts_are_tried():
    others = [name for name in SCRIPTS if name.startswith("check_") or name in OF_FIRST_RUN]
    assert sorted([*SMALLEST, *others]) == SCRIPTS


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_commands_of_each_docstring_are_taken(name):
    module = load(name)
    found = list(commands(module.__doc__, "$ "))
    assert {script for script, _ in found} == {f"bench/{name}.py"}
    for _, words in found:
        module.parser().parse_args(words)


@pytest.mark.parametrize("shape, weights", [("3b", 3_754_622_976), ("7b", 8_292_166_656)])
def test_the_large_shapes_have_as_many_weights_as_qwens(shape, weights):
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    config, _ = shapes.config_and_tokenizer(shape)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == weights


def test_fillers_change_no_text():
    _, tokenizer = shapes.config_and_tokenizer("7b")
    assert len(tokenizer) == shapes.TOKENS
    assert tokenizer.decode(tokenizer("the image 12").input_ids) == "the image 12"
    assert len(tokenizer("1<|image_pad|>2<|im_end|>").input_ids) == 4


def test_a_round_of_another_size_stops_the_race(tmp_path):
    step = load("step")

    class Rival:
        name = "slacker"

        def ask(self, line):
            return {"samples": 4, "tokens": 15, "seconds": 1.0}

    message = "slacker: expected 4 x 4, 2 a prompt, oneDNN, got 15 tokens in 4 samples"
    with pytest.raises(SystemExit, match=message):
        step.take_turns([Rival()], step.Cell(4, 4), rounds=1)


@pytest.mark.slow
def test_token_logps(done):
    rows = tables(done("token_logps"), "Log-probabilities")
    assert [row[0] for row in rows[2:]] == ["all logits", "token_logps", "ratio"]
    _, _, all_logits, ours, _ = rows
    assert float(all_logits[3]) == pytest.approx(float(ours[3]), rel=1e-4)
    assert float(all_logits[4]) == pytest.approx(float(ours[4]), rel=1e-4)


@pytest.mark.slow
def test_annotate(done):
    rows = tables(done("annotate"), "Annotation")
    assert [row[0] for row in rows[2:]] == ["text", "image"]


@pytest.mark.slow
def test_evaluate(done):
    rows = tables(done("evaluate"), "Judging")
    assert [row[0] for row in rows[2:]] == ["vLLM", "loop"]
    judgements = rows[0].index("judgements")
    assert rows[2][judgements] == "2"  # of three rows two warm up


@pytest.mark.slow
def test_gpu(done):
    rows = tables(done("gpu"), "A step at the shape tiny")
    assert {"rollout", "updates", "sync", "whole step"} <= {row[0] for row in rows}
    assert [row[4] for row in rows if row[0] in ("256", "512")] == ["-", "-"]  # MFU of a CPU
    _, out = done("gpu")
    update, step = verdicts.of_speed(out.read_text(), whole_7b=False)  # as make gpu reads it
    assert (update.verdict, step.verdict) == (NO_GPU, OK)


@pytest.mark.slow
def test_shared_prompts(done):
    rows = {row[0]: row[1:] for row in tables(done("shared_prompts"), "One copy of a prompt")}
    assert {"updates", "whole step", "memory, GB"} <= set(rows)
    shared, apart = (int(cell.replace(",", "")) for cell in rows["padded tokens"][:2])
    prompt = (apart - 6 * 4) / 6  # of each of six samples; all prompts are as long
    assert shared == 2 * prompt + 6 * 4


@pytest.mark.slow
def test_step(done):
    rows = tables(done("step"), "One RL step")
    cells = [row for row in rows if row[0] == "4 x 4, 2 a prompt, oneDNN"]
    assert [len(row) for row in cells] == [7, 3, 4]  # speed, phases, against a product
    assert {"4", "8"} <= {row[0] for row in rows}  # a sample's time at both sizes


@pytest.mark.slow
def test_step_against_trl(done):
    process, out = done("step")
    if not (TRL / "bin" / "python").exists():
        assert "TRL is left out" in process.stderr
        pytest.skip(f"TRL has no environment in {TRL}: python bench/step.py --setup_trl {TRL}")
    rows = tables((process, out), "One RL step")
    speed = next(row for row in rows if row[0] == "4 x 4, 2 a prompt, oneDNN")
    assert speed[6] != "-"


@pytest.mark.slow
def test_vision_tower(done):
    rows = tables(done("vision_tower"), "The vision tower")
    assert [row[0] for row in rows[2:]] == ["transformers", "ours", "ratio"]
    assert max(float(cell) for cell in rows[3][2:]) < 1e-4
