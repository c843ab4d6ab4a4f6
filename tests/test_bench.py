"""
Each script of bench/ at its smallest: it runs, and prints and writes its table. The numbers mean nothing here. About a minute on
two idle cores: the scripts run two at a time.

$ python -m pytest tests/test_bench.py
"""
import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from test_layout import commands
from toy.sources import Source, pairs

SCRIPTS = sorted(path.stem for path in (ROOT / "bench").glob("*.py"))
TRL = ROOT / "out" / "trl" / ".venv"  # where make bench has it
SMALLEST = {
    "annotate": "--pairs 20 --latency 0.05 --concurrency 4",
    "token_logps": "--vocabulary 512 --hidden 128 --tokens 32 --rows 2 --prompt 4 --repeats 1",
    "evaluate": f"--model {ROOT}/toy/base --data DATA --limit 3 --samples 2 --max_new_tokens 8 --seconds 1",
    "step": "--data DATA --samples 4 --tokens 4 --scale 8 --rounds 1 --trl_rows 4 --trl TRL",
    "gpu": "--shape tiny --samples 2 --new_tokens 4 --image_tokens 4 --words 4 --budgets 256 512 --repeats 1",
}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """{script: (its process, the file it was to write)}, when asked for; all are under way from the start."""
    folder = tmp_path_factory.mktemp("bench")
    source = Source(folder, "test", "pairs", 0)
    pairs(source, 24)

    def run(name):
        out = folder / f"{name}.md"
        words = SMALLEST[name].replace("DATA", str(source.folder / "pairs.jsonl")).replace("TRL", str(TRL))
        return subprocess.run([sys.executable, ROOT / "bench" / f"{name}.py", *words.split(), "--out", out], text=True, capture_output=True,
                              timeout=300, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}), out

    with ThreadPoolExecutor(2) as pool:
        jobs = {name: pool.submit(run, name) for name in ("step", "gpu", "evaluate", "token_logps", "annotate")}
        yield lambda name: jobs[name].result()
        pool.shutdown(cancel_futures=True)  # when only some tests are run


def tables(ran, section):
    """The rows of the tables that a script wrote, which are those it printed."""
    process, out = ran
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-3000:]
    text = out.read_text()
    assert text.startswith(f"## {section}") and str(ROOT) not in text.partition("`python")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def load(name):
    """The module of a script: bench/evaluate.py and evaluate.py have the same name."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / "bench" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_scripts_are_tried():
    assert sorted(SMALLEST) == SCRIPTS


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_commands_of_each_docstring_are_taken(name):
    module = load(name)
    found = list(commands(module.__doc__, "$ "))
    assert found and all(script == f"bench/{name}.py" for script, _ in found)
    for _, words in found:
        module.parser().parse_args(words)


@pytest.mark.parametrize("shape, size", [("3b", 3_754_622_976), ("7b", 8_292_166_656)])
def test_the_large_shapes_are_qwens(shape, size):
    """As many weights as Qwen2.5-VL-3B-Instruct and -7B-Instruct have; its tokenizer's size, and the toy's own tokens."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    config, tokenizer = load("gpu").configured(shape)
    with torch.device("meta"):
        assert sum(p.numel() for p in Qwen2_5_VLForConditionalGeneration(config).parameters()) == size
    assert len(tokenizer) == 151_665 and tokenizer.decode(tokenizer("the image 12").input_ids) == "the image 12"
    assert len(tokenizer("1<|image_pad|>2<|im_end|>").input_ids) == 4


def test_token_logps(done):
    rows = tables(done("token_logps"), "Log-probabilities")
    assert [row[0] for row in rows[2:]] == ["all logits", "token_logps", "ratio"]
    assert float(rows[2][4]) == pytest.approx(float(rows[3][4]), rel=1e-4)  # the same gradient


def test_annotate(done):
    rows = tables(done("annotate"), "Annotation")
    assert [row[0] for row in rows[2:]] == ["text", "image"] and all(int(row[1]) >= 15 for row in rows[2:])


def test_evaluate(done):
    rows = tables(done("evaluate"), "Judging")
    assert [row[0] for row in rows[2:]] == ["engine", "loop"]


def test_gpu(done):
    rows = tables(done("gpu"), "A step at the shape tiny")
    assert {"rollout", "updates", "sync", "whole step"} <= {row[0] for row in rows}
    assert [row[4] for row in rows if row[0] in ("256", "512")] == ["-", "-"]  # MFU of a CPU


def test_step(done):
    rows = tables(done("step"), "One RL step")
    cell = next(row for row in rows if row[0] == "4 x 4")
    assert float(cell[2]) > 0 and float(cell[4].split()[0]) > 0
    assert {"4", "8"} <= {row[0] for row in rows}  # a sample's time at both sizes


def test_step_against_trl(done):
    process, out = done("step")
    if not (TRL / "bin" / "python").exists():
        assert "TRL is left out" in process.stderr
        pytest.skip(f"TRL has no environment in {TRL}: python bench/step.py --setup_trl {TRL}")
    cell = next(row for row in tables((process, out), "One RL step") if row[0] == "4 x 4")
    assert float(cell[6].split()[0]) > 0
