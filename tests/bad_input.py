"""What the tests of bad input share: the files they name, and a script run as a user runs it."""

import importlib
import json
import re
import shlex
import sys

import pytest

from core import flags
from core.flags import LONGEST

NAMES = {"all": "annotate sft rl judge evaluate downstream", "train": "sft rl downstream"}

# ------------------------------------------------------------------------------------------------
# Files

PAIR = {
    "id": "p",
    "source": "toy",
    "question": "Which?",
    "images": [],
    "video": None,
    "responses": ["left", "right"],
    "choice": 1,
    "attempts": 2,
    "annotation": "<think>The left.</think><answer>1</answer>",
}
OWN_PAIR = {"prompt": "Which?", "chosen": "left", "rejected": "right"}
TASK = {"question": "1 + 1?", "answer": "2"}
JUDGEMENT = {"text": "<think>The left.</think><answer>1</answer>", "label": 1}
VL_ROW = {
    "id": "mmmu-1",
    "query": "Which?",
    "response": ["left", "right"],
    "human_ranking": [0, 1],
    "image": "red.png",
}
SCORES = {"bench": "pairs", "row": 0, "scores": [0.9, 0.1]}

LEFT_OUT = object()  # as a field's value: the row is without it


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


FILES = {
    "pairs.jsonl": lines(PAIR, PAIR | {"id": "q"}),
    "own.jsonl": lines(OWN_PAIR),
    "tasks.jsonl": lines(TASK),
    "texts.jsonl": lines(JUDGEMENT),
    "scores.jsonl": lines(SCORES, SCORES | {"row": 1}),
    "empty.jsonl": b"",
    "blank.jsonl": b"\n" + lines(PAIR),
    "cut.jsonl": lines(PAIR)[:-30],
    "binary.jsonl": bytes(range(256)),
    "list.jsonl": b"[1, 2]\n",
    "number.jsonl": b"7\n",
    "deep.jsonl": b"[" * 100_000 + b"\n",
    "latin.jsonl": '{"id": "caf\xe9"}\n'.encode("latin-1"),
    "twins.jsonl": lines(PAIR, PAIR),
    "gone-picture.jsonl": lines(PAIR | {"images": ["gone.png"]}),
    "own-gone.jsonl": lines(OWN_PAIR | {"image": "gone.png"}),
    "task-gone.jsonl": lines(TASK | {"image": "gone.png"}),
    "table.csv": b"id,question\n",
    "cut.parquet": b"PAR1" + bytes(50),
    "object.json": b"{}",
    "cut.json": b"[{}, ",
    "folder/notes.txt": b"no data here",
    "votes.json": b'{"votes": {"0": "left"}}',
    "votes-item.json": b'{"votes": {"9": "left"}}',
    "votes-side.json": b'{"votes": {"0": "up"}}',
    "votes-list.json": b'{"votes": ["left"]}',
    "votes-number.json": b'{"votes": 3}',
    "no-model/notes.txt": b"",
    "config-cut/config.json": b'{"model_type": "qwen2_vl"',
    "config-list/config.json": b"[]",
    "text-model/config.json": b'{"model_type": "qwen2"}',
    "code-model/config.json": b'{"model_type": "own", "auto_map": {}}',
    "config-alone/config.json": b'{"model_type": "qwen2_vl", "vision_config": {}}',
    "quote.args": b"--seed 1\n--model 'x\n",
    "binary.args": b"\xff\xfe\x00",
    "loop.args": b"--seed 1 @loop.args",
    "typo.args": b"--bacth 3",
    "bounds.args": b"--batch 0  # none",
    "file": b"",
}


@pytest.fixture(scope="session")
def bad_files(tmp_path_factory):
    """A folder with all FILES."""
    folder = tmp_path_factory.mktemp("bad")
    for name, data in FILES.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    return folder


# ------------------------------------------------------------------------------------------------
# A script

# what a test does not name is as it should be; OUT is a new folder
WHOLE = {
    "annotate": {
        "--data": "pairs=own.jsonl",
        "--out": "OUT",
        "--base_url": "http://127.0.0.1:9/v1",  # nobody answers there
        "--retries": "0",
    },
    "sft": {"--data": "pairs.jsonl", "--out": "OUT", "--eval_n": "1"},
    "rl": {
        "--data": "pairs.jsonl",
        "--out": "OUT",
        "--rollout_batch": "4",
        "--train_batch": "2",
        "--judge": "rule",
    },
    "judge": {"--data": "texts.jsonl", "--judge": "rule", "--out": "OUT/rows.jsonl"},
    "evaluate": {"--bench": "pairs=pairs.jsonl", "--out": "OUT"},
    "downstream_grpo": {
        "--data": "tasks.jsonl",
        "--out": "OUT",
        "--rollout_batch": "2",
        "--train_batch": "16",
        "--judge": "exact",
    },
}


def command(script, words, out, complete=True):
    """The words of a command line, completed by what the script needs."""
    words = shlex.split(words)
    if complete:
        for flag, value in WHOLE[script].items():
            if flag not in words:
                words += [flag, value]
    return [word.replace("OUT", str(out)) for word in words]


@pytest.fixture
def bad_stage(bad_files, tmp_path, monkeypatch, capsys):
    """run(script, words) -> (exit status, stderr), in this process, by the end of each script."""
    monkeypatch.chdir(bad_files)
    forbid_models(monkeypatch)

    def run(script, words, complete=True):
        module = importlib.import_module(script)
        words = command(script, words, tmp_path / "out", complete)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *words])
        status = 0
        try:
            flags.run_stage(f"{script}.py", module.main)
        except SystemExit as stop:
            status = stop.code
        printed = capsys.readouterr().err
        if isinstance(status, str):  # what the interpreter makes of it
            return 1, printed + status + "\n"
        return status, printed

    return run


def forbid_models(monkeypatch):
    """Flags and files are looked at before a model is loaded, and its folder before its files."""
    import torch

    import downstream_grpo
    from core import encoding, judging, model_folder, training

    def too_late(args, *_, **__):
        model_folder.load_config(getattr(args, "model", args))
        raise AssertionError("a model is loaded, and the bad input was not noticed")

    monkeypatch.setattr(encoding, "load_processor", too_late)
    monkeypatch.setattr(downstream_grpo, "load_processor", too_late)
    monkeypatch.setattr(judging, "VLLMBackend", too_late)
    one_rank = (0, 1, torch.device("cpu"))
    monkeypatch.setattr(training, "start_ranks", lambda seed: one_rank)
    monkeypatch.setattr("toy.cpu.speed_up_process", lambda: None)


def check(ended, script, message):
    """One harmless line that begins with the script and says what is wrong."""
    status, printed = ended
    printed = without_bars(printed)
    assert status not in (0, None), printed
    assert "Traceback" not in printed
    assert printed.endswith("\n") and printed.count("\n") == 1, printed
    line = printed[:-1]
    assert line.isprintable() and len(line) <= LONGEST, line
    assert line.startswith(f"{script}.py: ")
    assert message in line, f"expected: {message}\nfound: {line}"


def without_bars(printed):
    """A bar draws itself anew after each carriage return, and ends with a new line."""
    return "".join(line for line in re.findall(r"[^\n]*\n", printed) if "\r" not in line)


def cases(table):
    """A case (script, words, message) for each script of a line `scripts | words | message`."""
    found = []
    for line in table.splitlines():
        if not line or line.startswith("#"):
            continue
        scripts, words, message = (part.strip() for part in line.split(" | "))
        if message.startswith(("expected", "invalid")):
            message = f"argument {words.split()[0]}: {message}"
        for script in NAMES.get(scripts, scripts).replace("downstream", "downstream_grpo").split():
            found.append(pytest.param(script, words, message, id=f"{script} {words}"))
    return found


def row_file(path, row, changes):
    """A file with a good row, and one with some fields changed, or something that is no row."""
    changed = changes
    if isinstance(changes, dict):
        changed = {key: v for key, v in (row | changes).items() if v is not LEFT_OUT}
    path.write_bytes(lines(row, changed))
    return path
