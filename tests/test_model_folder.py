"""core/model_folder.py: a model's folder appears whole or not at all, and is checked whole."""

import itertools
import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, killed_at
from safetensors.torch import load_file, save_file

from core.encoding import load_processor
from core.files import InputError
from core.model_folder import INDEX, appears_whole, load_config, not_found
from core.policy import load_policy, save_policy

BASE = ROOT / "toy" / "base"
MARKS = ("a", "z")  # the first and the last file to move
NAMES = sorted(path.name for path in BASE.iterdir() if path.suffix != ".md")


def write_model(folder, mark=""):
    """The toy's model and a reward head; `mark` tells one version from another."""
    with appears_whole(folder) as part:
        for name in NAMES:
            shutil.copy(BASE / name, part)
        (part / "reward_head").mkdir()
        save_file({"0.weight": torch.zeros(1)}, part / "reward_head" / "head.safetensors")
        for name in MARKS:
            (part / name).write_text(mark)


def is_whole(folder):
    try:
        load_config(folder)
    except InputError:
        return False
    return True


def marks_of(folder):
    return {(folder / name).read_text() for name in MARKS}


@pytest.mark.slow
@pytest.mark.parametrize("overwrites", [False, True])
def test_a_kill_at_any_file_operation_leaves_a_whole_model_or_one_that_is_refused(
    tmp_path, overwrites, monkeypatch
):
    monkeypatch.setattr(os, "fsync", lambda number: None)  # no power is cut here
    for number in itertools.count(1):
        out = tmp_path / str(number)
        out.mkdir()
        if overwrites:
            write_model(out, "old")
        (out / "log.jsonl").touch()
        killed = killed_at(number, out, partial(write_model, out, "new"))
        if is_whole(out):
            names = {*os.listdir(out)} - {"model.part"}
            assert names == {*NAMES, *MARKS, "log.jsonl", "reward_head"}
            assert len(marks_of(out)) == 1  # not half of it the old model
            assert os.listdir(out / "reward_head") == ["head.safetensors"]
        write_model(out, "new")
        assert is_whole(out) and marks_of(out) == {"new"}
        assert not (out / "model.part").exists()
        if not killed:
            break
        shutil.rmtree(out)
    assert number > 30


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(BASE, tmp_path / "model"))


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "tokenizer_config.json",
        "tokenizer.json",
        "processor_config.json",
        "chat_template.jinja",
        "model.safetensors",
    ],
)
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    for load in (load_processor, load_policy):
        with pytest.raises(InputError, match=f"{name}.*again"):
            load(folder)


def test_a_shard_that_is_missing_or_lacks_a_tensor_is_named(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    first = min(weights)
    save_file({first: weights.pop(first)}, folder / "one.safetensors")
    places = dict.fromkeys(weights, "two.safetensors") | {first: "one.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    with pytest.raises(InputError, match=r"two\.safetensors missing"):
        load_config(folder)
    save_file(weights, folder / "two.safetensors")
    load_config(folder)
    weights.popitem()
    save_file(weights, folder / "two.safetensors")
    with pytest.raises(InputError, match=r"two\.safetensors lacks 1 tensors"):
        load_config(folder)


@pytest.mark.parametrize("size", [0, 5, 500, -1])
def test_weights_that_are_cut_off_are_refused(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match=r"model\.safetensors is cut off or damaged"):
        load_config(folder)


def test_a_missing_tensor_is_not_filled_with_random_numbers(folder):
    weights = load_file(folder / "model.safetensors")
    name = "model.visual.merger.mlp.0.weight"
    found = next(key for key in weights if key.endswith("mlp.0.weight"))
    del weights[found]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=f"lacks 1 of its tensors, '{name}'"):
        load_policy(folder, dtype=torch.float32)


def test_a_head_of_another_kind_than_the_folders_is_refused(folder):
    policy, processor = load_policy(folder, "scalar", torch.float32), load_processor(folder)
    save_policy(policy, processor, folder)
    assert load_policy(folder).head_kind == "scalar"
    with pytest.raises(InputError, match=r"--head critic: .* has a scalar head"):
        load_policy(folder, "critic")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json is not JSON"),
        ("[]", "config.json is not a JSON object"),
        ('{"model_type": "llama"}', "is a 'llama' model; expected one that reads images"),
        ('{"model_type": "mine", "auto_map": {}}', "needs code of its own"),
    ],
)
def test_a_configuration_that_is_not_ours_is_refused_in_a_line(folder, text, message):
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match=message) as error:
        load_config(folder)
    assert "trust_remote_code" not in str(error.value)


def test_a_damaged_tokenizer_is_refused_in_a_line(folder):
    (folder / "tokenizer.json").write_text('{"version":')
    with pytest.raises(InputError, match="its tokenizer or processor cannot be loaded"):
        load_processor(folder)


def test_a_name_that_is_not_there_is_said_to_be_so(tmp_path):
    with pytest.raises(InputError, match="there is no folder of this name"):
        load_config(f"{tmp_path}/typo")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file; expected the folder of a model"):
        load_config(tmp_path / "file")
    error = OSError("pass `trust_remote_code=True`")
    assert "trust" not in not_found("some/model", error)
