"""The README.md of a model that a run leaves: what it is, how to use it, how it was made."""

import hashlib
import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from core.pairs import JUDGING_PROMPT
from core.tables import markdown_table

MARK = "<!-- written by core/model_card.py -->"  # a README.md without it is not ours
DATA_FLAGS = ("data", "val", "eval_data")
FIGURES = ("val_", "eval_")  # how the names of held-out figures begin

KINDS = {  # of model: what it is, what it does
    "judge": (
        "a multimodal reward model that reasons",
        "It is shown a question, pictures and two answers, thinks, and says which is better.",
    ),
    "reward head": (
        "a multimodal reward model with a scalar head, a baseline of R1-Reward's Table 5",
        "It scores each of two answers to a question about pictures; the higher score is better.",
    ),
    "policy": (
        "a model that answers questions about pictures, trained against a reward model",
        "The reward model compared its answers, and GRPO trained it on who won.",
    ),
}

SERVE = """Behind an OpenAI-compatible server, which `evaluate.py --base_url` can ask, too:

```sh
vllm serve {folder} --host 127.0.0.1 --port 8000
```
"""

ASK = """```python
from evaluate import Judge

judge = Judge({text})
print(judge("How many cars are there?", ["street.jpg"], "There are two cars.", "There are three."))
```

```sh
python evaluate.py --model {folder} \\
    --question "How many cars are there?" --images street.jpg --answers "Two." "Three."
```
"""

PROMPT = f"""It was trained to judge when asked exactly this, after the pictures; ask in both orders of the answers:

```text
{JUDGING_PROMPT}
```
"""  # noqa: E501

SCORE = """No benchmark was scored for this card. This does it:

```sh
python evaluate.py --model {folder} --out out/eval --bench VL-RewardBench=data/VL-RewardBench
```
"""


@dataclass(frozen=True)
class Card:
    """What the models of a stage have in common."""

    kind: str  # of KINDS
    defaults: dict  # {flag: its default}

    def text(self, folder, out):
        """The README.md of a model in `folder`, by the log of the run in `out`."""
        log = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
        start = [row for row in log if "args" in row][-1]  # of a run that was continued the last
        name = Path(folder).resolve().relative_to(Path(out).resolve().parent)
        title, about = KINDS[self.kind]
        base = start["args"]["model"]
        license_name = read_front_matter(base).get("license")
        parts = [
            front_matter(base, license_name),
            f"{MARK}\n\n# {name}: {title}\n\n{about}\n",
            f"## Held-out figures\n\n{held_out_figures(log)}",
            *self.use(folder),
            f"## How it was made\n\n{how_it_was_made(start)}",
            data_table(start),
            changed_flags(start["args"], self.defaults),
            f"## Licence\n\n{license_name or 'Unknown here'}; see the base model, `{base}`.\n",
        ]
        return "\n".join(parts)

    def use(self, folder):
        """How the model is used and scored."""
        words = {"folder": shlex.quote(f"{folder}"), "text": json.dumps(f"{folder}")}
        if self.kind == "policy":
            return ["## Use\n", SERVE.format(**words)]
        use = ["## Use\n\nFrom the folder of the scripts that trained it:\n"]
        use.append(ASK.format(**words))
        if self.kind == "judge":
            use += [SERVE.format(**words), PROMPT]
        return [*use, f"## Benchmarks\n\n{SCORE.format(**words)}"]


# --------------------------------------------------------------------------------------------------
# The base model


def front_matter(base, license_name):
    """What the hub reads: YAML between two lines of ---."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=name_on_hub(base),
        library_name="transformers",
        license=license_name,
        pipeline_tag="image-text-to-text",
    )
    return f"---\n{data.to_yaml()}\n---\n"


def name_on_hub(base):
    """The name of the base model on the hub; of a run's model, that of the run's base."""
    if not Path(base).exists():
        return base
    if is_ours(Path(base, "README.md")):
        return read_front_matter(base).get("base_model")
    return None  # where a folder came from is not known: its card may name another model's base


def read_front_matter(base):
    """{field: value} of a model's README.md; of one on the hub, if it was fetched with it."""
    from huggingface_hub import metadata_load, try_to_load_from_cache

    path = Path(base, "README.md")
    if not Path(base).exists():
        path = try_to_load_from_cache(base, "README.md")
        if not isinstance(path, str):
            return {}
    if not Path(path).is_file():
        return {}
    try:
        return metadata_load(path) or {}
    except Exception:  # whatever a card of others makes of it: a run must not fail at its end
        return {}


def is_ours(path):
    return path.is_file() and MARK in path.read_text(encoding="utf-8", errors="replace")


# --------------------------------------------------------------------------------------------------
# The run


def held_out_figures(log):
    """The first ones of a run and the last ones."""
    measured = []
    for row in log:
        if any(key.startswith(FIGURES) for key in row):
            measured.append(row)
    if not measured:
        return "None: the run had no held-out data.\n"
    first, last = measured[0], measured[-1]
    rows = []
    for key in last:
        if key.startswith(FIGURES):
            rows.append([f"`{key}`", short(first.get(key)), short(last[key])])
    return markdown_table(["", f"step {first['step']}", f"step {last['step']}"], rows)


def short(value):
    return "" if value is None else f"{value:.4g}"


def how_it_was_made(start):
    script, *words = start["command"]
    command = shlex.join([Path(script).name, *words])
    versions = ", ".join(f"{name} {version}" for name, version in start["versions"].items())
    changed = ", with uncommitted changes" if start["changed"] else ""
    ranks = "one rank" if start["ranks"] == 1 else f"{start['ranks']} ranks"
    return (
        f"From `{start['args']['model']}`, by\n\n```sh\n{command}\n```\n\n"
        f"on {ranks} ({start['device']}), commit {start['commit'] or 'unknown'}{changed}; "
        f"{versions}.\n"
    )


def files_of(args):
    """{path of a data file: its sha256}; of a folder None."""
    files = {}
    for flag in DATA_FLAGS:
        given = getattr(args, flag, None) or []
        paths = [given] if isinstance(given, str) else [path for _, path in given]
        for path in paths:
            files[path] = sha256(path) if Path(path).is_file() else None
    return files


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def data_table(start):
    counts = {}
    for name in ("pairs", "tasks"):
        if name in start:
            counts[f"{name} to train on"] = start[name]
    counts["held out"] = start["held_out"]
    rows = [[f"`{path}`", digest or "a folder"] for path, digest in start["files"].items()]
    numbers = ", ".join(f"{number:,} {name}" for name, number in counts.items())
    return f"{markdown_table(['data', 'sha256'], rows)}{numbers}.\n"


def changed_flags(args, defaults):
    rows = []
    for name, default in json.loads(json.dumps(defaults)).items():
        if name in args and args[name] != default:
            values = [f"`{json.dumps(value)}`" for value in (args[name], default)]
            rows.append([f"`--{name}`", *values])
    table = markdown_table(["flag", "here", "default"], rows)
    return f"Flags that differ from the defaults:\n\n{table}"
