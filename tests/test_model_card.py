"""core/model_card.py: the README.md of a model, by the log of its run and the card of its base."""

import hashlib
import json
import shlex
from types import SimpleNamespace

import pytest
from conftest import ROOT, write_rows
from huggingface_hub import metadata_load
from test_layout import shell_blocks

import evaluate
import rl
from core import model_card, runs
from core.flags import defaults
from core.pairs import JUDGING_PROMPT

QWEN = "Qwen/Qwen2.5-VL-7B-Instruct"
CARD = model_card.Card("judge", defaults(rl.parser()))


def make_run(out, *words):
    """A run's folder with a log, in which --lr and what `words` say differ from the defaults."""
    data = out.with_name("pairs.jsonl")
    data.write_text("{}\n")
    args = rl.parser().parse_args(["--data", str(data), "--lr", "3e-6", *map(str, words)])
    start = {
        "args": vars(args),
        "files": model_card.files_of(args),
        "command": ["/home/me/rl.py", "--lr", "3e-6", *map(str, words)],
        "versions": {"torch": "2.13.0"},
        "commit": "abc123",
        "changed": True,
        "device": "cpu",
        "ranks": 2,
        "pairs": 1234,
        "held_out": 8,
    }
    first = {"step": 0, "eval_greedy": 0.5, "eval_n": 8}
    last = {"step": 2, "reward": 1.0, "eval_greedy": 0.875, "eval_n": 8}
    rows = [start, first, {"step": 1, "reward": 1.0}, last, {"step": 3, "reward": 1.0}]
    write_rows(out / "log.jsonl", rows)
    return out


def test_what_a_card_says(tmp_path):
    out = make_run(tmp_path / "rl", "--model", QWEN, "--sigma", 0)
    text = CARD.text(out, out)
    assert text.startswith("---\nbase_model: Qwen/Qwen2.5-VL-7B-Instruct\n")
    assert "# rl: a multimodal reward model that reasons" in text
    assert "|  | step 0 | step 2 |" in text and "| `eval_greedy` | 0.5 | 0.875 |" in text
    assert "rl.py --lr 3e-6 --model Qwen/Qwen2.5-VL-7B-Instruct --sigma 0\n" in text
    assert "on 2 ranks (cpu), commit abc123, with uncommitted changes; torch 2.13.0." in text
    digest = hashlib.sha256(b"{}\n").hexdigest()
    assert f"pairs.jsonl` | {digest} |" in text and "1,234 pairs to train on, 8 held out." in text
    assert "| `--lr` | `3e-06` | `1e-06` |" in text and "| `--sigma` | `0.0` | `3.0` |" in text
    assert "`--clip`" not in text
    assert JUDGING_PROMPT in text


def test_the_commands_of_a_card_are_taken(tmp_path):
    out = make_run(tmp_path / "my rl")
    text = CARD.text(out / "best", out)
    assert f'judge = Judge("{out}/best")' in text and "# my rl/best: " in text
    commands = shell_blocks(text).replace("\\\n", "").splitlines()
    words = [shlex.split(line) for line in commands if line.startswith("python evaluate.py")]
    assert len(words) == 2
    for command in words:
        args = evaluate.parser().parse_args(command[2:])
        assert args.model == f"{out}/best" and (args.question or args.bench)


@pytest.mark.parametrize(
    "front, expected",
    [
        (None, {}),
        ("", {}),
        ("---\nlicense: [\n---\n", {}),
        ("---\n- no fields\n---\n", {}),
        ("---\nlicense: mit\nbase_model: someone/else\n---\n# Not ours\n", {"license": "mit"}),
    ],
)
def test_a_base_in_a_folder_is_not_known_by_its_card(tmp_path, front, expected):
    """Its licence is; whose base the card names is not ours to say."""
    base = tmp_path / "base"
    base.mkdir()
    if front is not None:
        (base / "README.md").write_text(front)
    out = make_run(tmp_path / "rl", "--model", base)
    (out / "README.md").write_text(CARD.text(out, out))
    found = metadata_load(out / "README.md")
    assert {name: found[name] for name in expected} == expected
    assert set(found) == {*expected, "library_name", "pipeline_tag"}
    licence = expected.get("license", "Unknown here")
    assert f"{licence}; see the base model, `{base}`." in (out / "README.md").read_text()


def test_base_and_licence_come_down_from_run_to_run(tmp_path, monkeypatch):
    """A model of the hub, whose card was fetched with it; a cold start of it; RL on that."""
    card = tmp_path / "card.md"
    card.write_text("---\nlicense: apache-2.0\nbase_model: Qwen/older\n---\n")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: str(card))
    sft = make_run(tmp_path / "sft", "--model", QWEN)
    (sft / "README.md").write_text(CARD.text(sft, sft))
    out = make_run(tmp_path / "rl", "--model", sft)
    (out / "README.md").write_text(CARD.text(out, out))
    for folder in (sft, out):
        assert metadata_load(folder / "README.md") == {
            "base_model": QWEN,
            "library_name": "transformers",
            "license": "apache-2.0",
            "pipeline_tag": "image-text-to-text",
        }


def test_heads_and_policies_are_not_called_judges(tmp_path):
    out = make_run(tmp_path / "x")
    head = model_card.Card("reward head", CARD.defaults).text(out, out)
    assert "vllm serve" not in head and JUDGING_PROMPT not in head and "Judge(" in head
    policy = model_card.Card("policy", CARD.defaults).text(out, out)
    assert "vllm serve" in policy and "Judge(" not in policy and "evaluate.py --model" not in policy


def test_a_run_without_held_out_data_says_so(tmp_path):
    out = make_run(tmp_path / "rl")
    start = json.loads((out / "log.jsonl").read_text().splitlines()[0])
    write_rows(out / "log.jsonl", [start, {"step": 1, "reward": 1.0}])
    assert "None: the run had no held-out data." in CARD.text(out, out)


def test_of_a_folder_there_is_no_digest(tmp_path):
    args = rl.parser().parse_args([])
    args.data = [("tasks", str(tmp_path)), ("tasks", str(tmp_path / "gone"))]
    assert model_card.files_of(args) == {str(tmp_path): None, str(tmp_path / "gone"): None}


def test_a_readme_of_somebody_else_is_kept(tmp_path, monkeypatch, capsys):
    saved = []
    monkeypatch.setattr(runs, "save_policy", lambda *words: saved.append(words[-1]))
    out = make_run(tmp_path / "rl")

    def save():
        judge = SimpleNamespace(head_kind=None)
        runs.save_model(out, judge, None, 0, out, "judge", rl.parser())
        return saved.pop()

    assert save() == CARD.text(out, out)
    (out / "README.md").write_text("my notes")
    assert save() is None
    assert "README.md is not this run's and is kept" in capsys.readouterr().out
    (out / "README.md").write_text(CARD.text(out, out))
    assert save() == CARD.text(out, out)


def test_the_toy_base_has_no_card_of_ours():
    assert not model_card.is_ours(ROOT / "toy/base/README.md")
