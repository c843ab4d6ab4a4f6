"""A model's folder: it appears whole or not at all, and is checked before anything is loaded."""

import contextlib
import json
import os
import shutil
from pathlib import Path

from core.files import InputError, fsync, fsync_tree, in_short, parse_json

EXPECTED = "expected a Qwen2-VL, Qwen2.5-VL or Qwen3-VL"
INDEX = "model.safetensors.index.json"

# --------------------------------------------------------------------------------------------------
# Writing


@contextlib.contextmanager
def appears_whole(folder):
    """
    A folder to write a model's files into. When the block ends they move to `folder`.

    config.json goes first and comes last: nothing loads a folder without it, so that a run that is
    killed on the way leaves a folder that every loader refuses.
    """
    folder = Path(folder)
    part = folder / "model.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    fsync_tree(part)
    config = folder / "config.json"
    config.unlink(missing_ok=True)
    fsync(folder)
    for file in sorted(part.rglob("*")):
        target = folder / file.relative_to(part)
        if file.is_dir():
            target.mkdir(exist_ok=True)
        elif target != config:
            os.replace(file, target)
    fsync(folder)
    os.replace(part / "config.json", config)
    fsync(folder)
    shutil.rmtree(part)


# --------------------------------------------------------------------------------------------------
# Checking


def load_config(name):
    """
    Load the configuration of a model, by its folder or its name on the hub.

    A folder in which something is missing or cut off is refused: transformers would fill in what
    is missing, by a default or by random numbers.
    """
    from transformers import AutoConfig

    if os.path.exists(name):
        check_architecture(f"{name}", read_config(name))
        check_files(name)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if os.path.exists(name):
            raise InputError(f"{name}/config.json is damaged: {in_short(error)}") from None
        raise InputError(not_found(name, error)) from None
    check_architecture(name, config.to_dict())
    return config


def not_found(name, error):
    if "trust_remote_code" in str(error):
        return f"--model {name} needs code of its own, which these scripts never run; {EXPECTED}"
    return (
        f"--model {name}: there is no folder of this name, and no such model was found on the "
        "Hugging Face hub (or the hub cannot be reached from here); fix the path, or run the stage "
        "that makes the model first"
    )


def read_config(folder):
    path = Path(folder, "config.json")
    if not Path(folder).is_dir():
        raise InputError(f"--model {folder} is a file; expected the folder of a model")
    if not path.is_file():
        raise InputError(
            f"--model {folder} has no config.json, so it holds no whole model; if a run was saving "
            "its model there, start that run again: it continues"
        )
    config = parse_json(path.read_bytes(), path, "a model's configuration, one JSON object")
    if not isinstance(config, dict):
        raise InputError(f"{path} is not a JSON object; expected a model's configuration")
    return config


def check_architecture(name, config):
    from transformers.models.auto import modeling_auto

    known = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    kind = config.get("model_type")
    if kind in known and "vision_config" in config:
        return
    if "auto_map" in config and kind not in known:
        raise InputError(
            f"--model {name} needs code of its own (auto_map in its config.json), which these "
            f"scripts never run; {EXPECTED}"
        )
    raise InputError(
        f"--model {name} is a {kind!r} model; expected one that reads images and text: "
        "qwen2_5_vl, qwen2_vl or qwen3_vl"
    )


def check_files(folder):
    """Refuse a folder in which a file is missing or cut off."""
    folder = Path(folder)
    missing = [name for name, is_there in needed_files(folder).items() if not is_there]
    shards = weight_files(folder)
    missing += [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"--model {folder} is not whole: {', '.join(missing[:5])} missing. Copy the folder "
            "again, or run the stage that makes it again"
        )
    for name, expected in shards.items():
        lacking = sorted(expected - tensors_in(folder / name))
        if lacking:
            raise InputError(
                f"{folder / name} lacks {len(lacking)} tensors that {INDEX} lists, {lacking[0]!r} "
                "the first; copy the folder again"
            )
    head = folder / "reward_head" / "head.safetensors"
    if head.parent.is_dir():
        tensors_in(head)


def needed_files(folder):
    """{what a model needs beside its weights: whether it is there}."""
    names = {path.name for path in folder.iterdir()}
    return {
        "tokenizer_config.json": "tokenizer_config.json" in names,
        "tokenizer.json": "tokenizer.json" in names or {"vocab.json", "merges.txt"} <= names,
        "processor_config.json or preprocessor_config.json": bool(
            {"processor_config.json", "preprocessor_config.json"} & names
        ),
        "chat_template.jinja": has_chat_template(folder, names),
    }


def has_chat_template(folder, names):
    if {"chat_template.jinja", "chat_template.json"} & names:
        return True
    path = folder / "tokenizer_config.json"
    return path.is_file() and "chat_template" in parse_json(path.read_bytes(), path, "JSON")


def weight_files(folder):
    """{file of weights: the tensors that must be in it, as far as an index lists them}."""
    path = folder / INDEX
    if not path.is_file():
        return {"model.safetensors": set()}
    index = parse_json(path.read_bytes(), path, "an index of weights, one JSON object")
    files = {}
    try:
        for tensor, file in index["weight_map"].items():
            files.setdefault(file, set()).add(tensor)
    except (TypeError, KeyError, AttributeError):
        raise InputError(f"{path} has no 'weight_map'; copy the folder again") from None
    return files


def tensors_in(path):
    """The names of the tensors in a safetensors file, which must be as long as its header says."""
    size = path.stat().st_size if path.is_file() else 0
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size:
                raise ValueError("the header is longer than the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max(tensor["data_offsets"][1] for tensor in header.values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is cut off or damaged ({in_short(error)}); copy it again, or run the stage "
            "that makes it again"
        ) from None
    if size != end:
        raise InputError(
            f"{path} is cut off or damaged: it has {size} bytes, its header says {end}; copy it "
            "again, or run the stage that makes it again"
        )
    return set(header)
