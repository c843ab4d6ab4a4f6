"""What the scripts say to the folder of a run that is damaged or another run's: a line each."""

import importlib
import shutil

import pytest
from bad_input import PAIR, TASK, check, lines
from conftest import ROOT, png

from core.encoding import load_processor

JUDGEMENT = {
    "bench": "pairs",
    "row": 0,
    "id": "p",
    "order": 0,
    "sample": 0,
    "text": "",
    "choice": 1,
    "logp1": None,
    "logp2": None,
    "tokens": 0,
    "finish": "stop",
}
ROW = PAIR | {"bench": "pairs", "row": 0, "groups": {"source": "toy"}, "set": "0"}
REPLY = {"id": "row-0", "attempt": 1, "text": "a", "finish": "stop", "tokens": [1, 1]}

ASK = "--concurrency 1"
GIVEN = "--scores scores.jsonl --page 0"
AGAIN = "--score_only --page 0"
DEAD = "--judge model --judge_url http://127.0.0.1:9/v1 --judge_retries 0 --judge_patience 0"
KEPT = "rows.jsonl.journal"
KEY = b'["left", "right"]'

# script, words, a file in OUT, what it holds now (a list: rows that are appended), the one line
RUNS = [
    # the mix of annotate.py
    ("annotate", ASK, "mix.json", b'{"made', "OUT/mix.json is not JSON"),
    ("annotate", ASK, "mix.json", b"", "OUT/mix.json is not JSON"),
    ("annotate", ASK, "mix.json", b"\xff", "OUT/mix.json is not JSON"),
    ("annotate", ASK, "mix.json", b"[]", "OUT/mix.json"),
    ("annotate", ASK, "mix.json", b"{}", "OUT/mix.json"),
    ("annotate", ASK, "mix.json", b'{"made with": 3, "counts": {}}', "OUT/mix.json"),
    ("annotate", ASK, "mix.json", b'{"made with": {}, "counts": 3}', "OUT/mix.json"),
    ("annotate", ASK, "mix.jsonl", b"", "OUT/journal.jsonl belongs to another run: pairs was"),
    ("annotate", ASK, "mix.jsonl", None, "OUT/mix.jsonl: no such file; expected"),
    # its journal
    (
        "annotate",
        ASK,
        "journal.jsonl",
        b"7\n",
        "OUT/journal.jsonl does not begin with the settings",
    ),
    (
        "annotate",
        ASK,
        "journal.jsonl",
        b"[]\n",
        "OUT/journal.jsonl does not begin with the settings",
    ),
    ("annotate", ASK, "journal.jsonl", b"{}\n", "OUT/journal.jsonl belongs to another run"),
    ("annotate", ASK, "journal.jsonl", b"x\n", "OUT/journal.jsonl, line 1 is not JSON"),
    ("annotate", ASK, "journal.jsonl", b"\n", "OUT/journal.jsonl, line 1 is empty"),
    ("annotate", ASK, "journal.jsonl", [7], "OUT/journal.jsonl, line 2: 7 is not a reply"),
    ("annotate", ASK, "journal.jsonl", [{"id": "x"}], "OUT/journal.jsonl, line 2: "),
    ("annotate", ASK, "journal.jsonl", [REPLY | {"id": []}], "OUT/journal.jsonl, line 2: "),
    ("annotate", ASK, "journal.jsonl", [REPLY | {"text": 5}], "OUT/journal.jsonl, line 2: "),
    ("annotate", ASK, "journal.jsonl", [REPLY | {"text": None}], "OUT/journal.jsonl, line 2: "),
    ("annotate", ASK, "journal.jsonl", [REPLY | {"tokens": 5}], "OUT/journal.jsonl, line 2: "),
    ("annotate", ASK, "journal.jsonl", [REPLY | {"tokens": [1]}], "OUT/journal.jsonl, line 2: "),
    ("annotate", ASK, "journal.jsonl", [REPLY | {"tokens": ["1", 2]}], "OUT/journal.jsonl, line 2"),
    # other flags than the run had
    ("annotate", f"{ASK} --model x", "", None, "another run: model was 'gpt-4o', is now 'x'"),
    ("annotate", f"{ASK} --seed 1", "", None, "OUT/mix.json belongs to another run: seed was 0"),
    ("annotate", f"{ASK} --limit 9", "", None, "another run: limit was None, is now 9"),
    ("annotate", f"{ASK} --both_orders", "", None, "another run: both_orders was False"),
    ("annotate", f"{ASK} --request '{{\"n\": 1}}'", "", None, "another run: request was {}"),
    ("annotate", ASK, "", None, "1 of 1 pairs got no answer (see above); the same command asks"),
    # the answers that judge.py kept
    ("judge", DEAD, "", None, "http://127.0.0.1:9/v1: no reply for 0 s (--judge_patience)"),
    ("judge", DEAD, KEPT, b"7\n", "OUT/rows.jsonl.journal does not begin with the settings"),
    ("judge", DEAD, KEPT, b"x\n", "OUT/rows.jsonl.journal, line 1 is not JSON"),
    ("judge", DEAD, KEPT, [7], "OUT/rows.jsonl.journal, line 2"),
    ("judge", DEAD, KEPT, [{"question": 7, "answer": 1}], "OUT/rows.jsonl.journal, line 2"),
    ("judge", f"{DEAD} --judge_model x", "", None, "OUT/rows.jsonl.journal belongs to another run"),
    # the settings of evaluate.py
    ("evaluate", GIVEN, "config.json", b"{", "OUT/config.json is not JSON"),
    ("evaluate", GIVEN, "config.json", b"[]", "OUT/config.json"),
    ("evaluate", GIVEN, "config.json", b'{"model": 1}', "OUT/config.json"),
    ("evaluate", AGAIN, "config.json", b"{", "OUT/config.json is not JSON"),
    ("evaluate", AGAIN, "config.json", b"{}", "OUT/config.json"),
    ("evaluate", f"{GIVEN} --seed 1", "", None, "OUT/config.json belongs to another run: seed was"),
    ("evaluate", f"{GIVEN} --max_pixels 9", "", None, "another run: max_pixels was None, is now 9"),
    (
        "evaluate",
        "--base_url http://127.0.0.1:9/v1",
        "",
        None,
        "OUT/config.json belongs to another",
    ),
    # its rows
    ("evaluate", AGAIN, "rows.jsonl", None, "OUT/rows.jsonl: no such file, so there was no run"),
    ("evaluate", AGAIN, "rows.jsonl", b"{", "OUT/rows.jsonl, line 1 is not JSON"),
    ("evaluate", AGAIN, "rows.jsonl", b"7\n", "OUT/rows.jsonl, line 1"),
    ("evaluate", AGAIN, "rows.jsonl", b"{}\n", "OUT/rows.jsonl, line 1"),
    ("evaluate", AGAIN, "rows.jsonl", lines(ROW | {"row": "0"}), "OUT/rows.jsonl, line 1"),
    ("evaluate", AGAIN, "rows.jsonl", lines(ROW | {"choice": 3}), "OUT/rows.jsonl, line 1"),
    ("evaluate", AGAIN, "rows.jsonl", lines(ROW | {"groups": 7}), "OUT/rows.jsonl, line 1"),
    ("evaluate", AGAIN, "rows.jsonl", lines(ROW | {"images": 7}), "OUT/rows.jsonl, line 1"),
    # its judgements: four lines are there
    ("evaluate", AGAIN, "judgements.jsonl", [7], "judgements.jsonl, line 5: not a judgement"),
    ("evaluate", AGAIN, "judgements.jsonl", [{}], "judgements.jsonl, line 5: not a judgement"),
    ("evaluate", AGAIN, "judgements.jsonl", [JUDGEMENT], "is there already; remove that line"),
    ("evaluate", GIVEN, "judgements.jsonl", [JUDGEMENT], "is there already; remove that line"),
    ("evaluate", AGAIN, "judgements.jsonl", [JUDGEMENT | {"row": "7"}], "line 5: 'row' is '7'"),
    ("evaluate", AGAIN, "judgements.jsonl", [JUDGEMENT | {"choice": "1"}], "'choice' is '1'"),
    ("evaluate", AGAIN, "judgements.jsonl", [JUDGEMENT | {"logp1": "x"}], "'logp1' is 'x'"),
    ("evaluate", AGAIN, "judgements.jsonl", [JUDGEMENT | {"tokens": None}], "'tokens' is None"),
    ("evaluate", AGAIN, "judgements.jsonl", b"\xff\n", "judgements.jsonl, line 1"),
    ("evaluate", AGAIN, "judgements.jsonl", b"\n", "judgements.jsonl, line 1: not a judgement"),
    # another run beside it
    ("evaluate", f"{AGAIN} --compare gone", "", None, "gone/rows.jsonl: no such file"),
    ("evaluate", f"{AGAIN} --compare file", "", None, "file/rows.jsonl"),
    ("evaluate", "--score_only --ab gone", "", None, "gone/rows.jsonl: no such file"),
    # votes
    ("evaluate", "--tally votes.json", "", None, "OUT/ab_key.json: no such file; give the --out"),
    ("evaluate", "--tally gone.json", "ab_key.json", KEY, "gone.json: No such file or directory"),
    ("evaluate", "--tally folder", "ab_key.json", KEY, "folder: Is a directory; give a file"),
    ("evaluate", "--tally cut.json", "ab_key.json", KEY, "cut.json is not JSON"),
    ("evaluate", "--tally binary.jsonl", "ab_key.json", KEY, "binary.jsonl is not JSON"),
    ("evaluate", "--tally object.json", "ab_key.json", KEY, "object.json"),
    ("evaluate", "--tally number.jsonl", "ab_key.json", KEY, "number.jsonl"),
    ("evaluate", "--tally votes-number.json", "ab_key.json", KEY, "votes-number.json"),
    (
        "evaluate",
        "--tally votes-item.json",
        "ab_key.json",
        KEY,
        "left, right or tie, on items 0 to",
    ),
    (
        "evaluate",
        "--tally votes-side.json",
        "ab_key.json",
        KEY,
        "left, right or tie, on items 0 to",
    ),
    ("evaluate", "--tally votes-list.json", "ab_key.json", KEY, "votes-list.json"),
    ("evaluate", "--tally votes.json", "ab_key.json", b"{", "OUT/ab_key.json is not JSON"),
    ("evaluate", "--tally votes.json", "ab_key.json", b"7", "expected a list of left and right"),
    ("evaluate", "--tally votes.json", "ab_key.json", b"[1]", "expected a list of left and right"),
]


@pytest.fixture(scope="module")
def earlier_runs(tmp_path_factory, bad_files):
    """What a run of each script left behind: of annotate.py one whose annotator never answered."""
    return {"folder": tmp_path_factory.mktemp("earlier")}


def out_flag(script, out):
    return out / "rows.jsonl" if script == "judge" else out


def earlier_run(runs, script, bad_stage):
    """A folder of an earlier run, made when it is first wanted."""
    out = runs["folder"] / script
    if not out.exists():
        words = {"annotate": ASK, "evaluate": GIVEN, "judge": DEAD}[script]
        bad_stage(script, f"{words} --out {out_flag(script, out)}")
    return out


@pytest.mark.parametrize(
    "script, words, file, data, message", RUNS, ids=[ascii(run[:4])[:90] for run in RUNS]
)
def test_a_run_that_cannot_be_continued_is_one_line(
    bad_stage, earlier_runs, tmp_path, script, words, file, data, message
):
    out = tmp_path / "out"
    shutil.copytree(earlier_run(earlier_runs, script, bad_stage), out)
    if isinstance(data, list):
        data = (out / file).read_bytes() + lines(*data)
    if data is not None:
        (out / file).write_bytes(data)
    elif file:
        (out / file).unlink()
    reads_bench = "--score_only" not in words and "--tally" not in words
    words = f"{words} --out {out_flag(script, out)}"
    ended = bad_stage(script, words, complete=reads_bench)
    check(ended, script, message.replace("OUT", str(out)))


@pytest.mark.slow  # transformers takes long to import
@pytest.mark.parametrize("script", ["rl", "downstream_grpo"])
def test_fewer_steps_than_were_taken_are_one_line(bad_stage, tmp_path, monkeypatch, script):
    out = tmp_path / "out"
    (out / "checkpoints" / "step-000005").mkdir(parents=True)
    module = importlib.import_module(script)
    namespace = module.encoding if script == "rl" else module
    monkeypatch.setattr(namespace, "load_processor", lambda *_: load_processor(ROOT / "toy/weak"))
    ended = bad_stage(script, "--steps 3 --train_batch 4 --rollout_batch 4 --samples 2")
    message = f"--steps or --passes make 3 steps, but the run in --out {out} has taken 5"
    check(ended, script, message)


@pytest.mark.parametrize("words", ["--data private.jsonl", "--eval_data private.jsonl"])
def test_a_picture_outside_of_the_tasks_folder_is_not_sent(bad_stage, bad_files, tmp_path, words):
    (tmp_path / "private.png").write_bytes(png())
    rows = lines(TASK | {"image": str(tmp_path / "private.png")})
    (bad_files / "private.jsonl").write_bytes(rows)
    ended = bad_stage("downstream_grpo", f"{words} --judge model")
    check(ended, "downstream_grpo", "private.png', outside of the data's folder; it is sent")
