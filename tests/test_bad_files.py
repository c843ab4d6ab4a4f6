"""What the six scripts say to files and rows that they cannot use: a line each."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bad_input import (
    JUDGEMENT,
    LEFT_OUT,
    OWN_PAIR,
    PAIR,
    SCORES,
    TASK,
    VL_ROW,
    cases,
    check,
    command,
    row_file,
    without_bars,
)

ROOT = Path(__file__).resolve().parent.parent

# scripts | words | what the one line says
FILES = """
# --- pairs
sft rl          | --data gone.jsonl       | gone.jsonl: no such file; expected a JSONL
sft rl          | --data folder           | folder: this is a folder; expected a JSONL file
sft rl          | --data empty.jsonl      | empty.jsonl has no pairs; expected
sft rl          | --data blank.jsonl      | blank.jsonl, line 1 is empty; expected one JSON object
sft rl          | --data cut.jsonl        | cut.jsonl, line 1 is not JSON
sft rl          | --data binary.jsonl     | binary.jsonl, line 1 is not JSON
sft rl          | --data deep.jsonl       | deep.jsonl, line 1 is not JSON
sft rl          | --data latin.jsonl      | latin.jsonl, line 1 is not JSON
sft rl          | --data list.jsonl       | list.jsonl, line 1: expected an object with id, source
sft rl          | --data number.jsonl     | number.jsonl, line 1: expected an object with id, source
sft rl          | --data own.jsonl        | own.jsonl, line 1 has no 'id'; expected
sft rl          | --data tasks.jsonl      | tasks.jsonl, line 1 has no 'id'; expected
sft rl          | --data gone-picture.jsonl | line 1 (p): ./gone.png does not exist
sft rl          | --data file/pairs.jsonl | file/pairs.jsonl: no such file
sft             | --eval_n 2              | --data pairs.jsonl has 2 pairs, all held out by --eval_n
sft             | --val gone.jsonl        | gone.jsonl: no such file; expected a JSONL
sft             | --val empty.jsonl       | empty.jsonl has no pairs
sft             | --val cut.jsonl         | cut.jsonl, line 1 is not JSON
rl              | --eval_data gone.jsonl  | gone.jsonl: no such file; expected a JSONL
rl              | --eval_data empty.jsonl | empty.jsonl has no pairs
rl              | --eval_data cut.jsonl   | cut.jsonl, line 1 is not JSON
rl              | --eval_data gone-picture.jsonl | line 1 (p): ./gone.png does not exist

# --- sources
annotate        | --data pairs=gone.jsonl   | gone.jsonl: no such file or folder; fix the path
annotate        | --data pairs=folder       | folder has no pairs.jsonl; give the download's folder
annotate        | --data RLAIF-V=folder     | folder has no
annotate        | --data pairs=empty.jsonl  | --data pairs=empty.jsonl has not one usable pair
annotate        | --data pairs=blank.jsonl  | blank.jsonl, line 1 is empty; expected one JSON object
annotate        | --data pairs=cut.jsonl    | cut.jsonl, line 1 is not JSON
annotate        | --data pairs=binary.jsonl | binary.jsonl, line 1 is not JSON
annotate        | --data pairs=deep.jsonl   | deep.jsonl, line 1 is not JSON
annotate        | --data pairs=list.jsonl   | list.jsonl, line 1 lacks prompt, chosen, rejected
annotate        | --data pairs=pairs.jsonl  | pairs.jsonl, line 1 lacks prompt, chosen, rejected
annotate        | --data pairs=table.csv    | table.csv: expected a .jsonl, .json or .parquet file
annotate        | --data pairs=file         | file: expected a .jsonl, .json or .parquet
annotate        | --data pairs=cut.parquet  | cut.parquet, after row 0: not readable as parquet
annotate        | --data pairs=object.json  | object.json: expected one list of objects, got dict
annotate        | --data pairs=cut.json     | cut.json is not JSON
annotate        | --data pairs=own-gone.jsonl | has not one usable pair ({'missing image': 1})
annotate        | --data pairs=hub:a/b      | hub:a/b: expected hub:owner/name@revision
annotate        | --decontaminate gone.json | gone.json: no such file or folder
annotate        | --decontaminate folder    | folder
annotate        | --decontaminate cut.json  | cut.json is not JSON
annotate        | --decontaminate tasks.jsonl | tasks.jsonl, line 1 has no question with two
annotate        | --decontaminate table.csv | table.csv: expected a .jsonl, .json or .parquet file
annotate        | --others 0                | no pair is left

# --- judgements
judge           | --data gone.jsonl       | gone.jsonl: No such file or directory; check the path
judge           | --data folder           | folder: Is a directory; give a file
judge           | --data empty.jsonl      | empty.jsonl has no rows
judge           | --data blank.jsonl      | blank.jsonl, line 1 is empty; expected one JSON object
judge           | --data cut.jsonl        | cut.jsonl, line 1 is not JSON
judge           | --data binary.jsonl     | binary.jsonl, line 1 is not JSON
judge           | --data deep.jsonl       | deep.jsonl, line 1 is not JSON
judge           | --data list.jsonl       | list.jsonl, line 1: expected an object with "text"
judge           | --data pairs.jsonl      | pairs.jsonl, line 1: expected an object with "text"
judge           | --out folder            | folder: Is a directory; give a file
judge           | --out file/rows.jsonl   | file: File exists

# --- benchmarks
evaluate        | --bench pairs=gone.jsonl  | gone.jsonl: no such file; expected a JSONL
evaluate        | --bench pairs=folder      | folder: this is a folder; expected a JSONL file
evaluate        | --bench pairs=empty.jsonl | empty.jsonl has no rows
evaluate        | --bench pairs=cut.jsonl   | cut.jsonl, line 1 is not JSON
evaluate        | --bench pairs=own.jsonl   | own.jsonl, line 1 has no 'id'
evaluate        | --bench pairs=gone-picture.jsonl | 1 of 1 images are missing, the first is
evaluate        | --bench VL-RewardBench=gone | gone: no such file or folder; fix the path
evaluate        | --bench VL-RewardBench=folder | folder has no data/test-*.parquet or
evaluate        | --bench VL-RewardBench=empty.jsonl | empty.jsonl has no rows
evaluate        | --bench VL-RewardBench=cut.parquet | cut.parquet, after row 0: not readable as
evaluate        | --bench VL-RewardBench=table.csv | table.csv: expected a .jsonl, .json or .parquet
evaluate        | --bench VL-RewardBench=own.jsonl | own.jsonl, line 1 lacks id, image
evaluate        | --bench Multimodal-RewardBench=folder | folder has no
evaluate        | --bench Multimodal-RewardBench=own.jsonl | own.jsonl, line 1 lacks
evaluate        | --bench MM-RLHF-RewardBench=folder | folder has no
evaluate        | --bench MM-RLHF-RewardBench=own.jsonl | own.jsonl, line 1 lacks
evaluate        | --bench lists=gone.jsonl | gone.jsonl: no such file or folder; fix the path
evaluate        | --bench lists=folder    | folder has no lists.jsonl; give the download's folder
evaluate        | --bench lists=own.jsonl | own.jsonl, line 1 lacks responses
evaluate        | --bench Multimodal-RewardBench-2=own.jsonl | own.jsonl, line 1 lacks
evaluate        | --group nothing         | --group nothing: pairs.jsonl, line 1 has no such field
evaluate        | --scores gone.jsonl     | gone.jsonl: no such file or folder
evaluate        | --scores folder         | folder
evaluate        | --scores cut.jsonl      | cut.jsonl, line 1 is not JSON
evaluate        | --scores pairs.jsonl    | pairs.jsonl, line 1: expected bench, row and scores
evaluate        | --scores empty.jsonl    | --scores empty.jsonl lacks pairs row 0
evaluate        | --judgements gone.jsonl | gone.jsonl: no such file or folder
evaluate        | --judgements cut.jsonl  | cut.jsonl, line 1 is not JSON
evaluate        | --judgements pairs.jsonl | pairs.jsonl, line 1: bench is null; expected a NAME of
evaluate        | --judgements empty.jsonl | --judgements empty.jsonl has none of --bench pairs

# --- tasks
downstream      | --data gone.jsonl       | gone.jsonl: no such file or folder; fix the path
downstream      | --data folder           | folder has no *.jsonl; give the download's folder
downstream      | --data empty.jsonl      | no task is left, dropped: {}
downstream      | --data cut.jsonl        | cut.jsonl, line 1 is not JSON
downstream      | --data binary.jsonl     | binary.jsonl, line 1 is not JSON
downstream      | --data deep.jsonl       | deep.jsonl, line 1 is not JSON
downstream      | --data list.jsonl       | list.jsonl, line 1 lacks question, answer
downstream      | --data pairs.jsonl      | pairs.jsonl, line 1 lacks answer
downstream      | --data table.csv        | table.csv: expected a .jsonl, .json or .parquet file
downstream      | --data task-gone.jsonl  | task-gone.jsonl: no task is left, dropped:
downstream      | --data V*=folder        | folder has no test_questions.jsonl
downstream      | --data arXivQA=folder   | folder has no
downstream      | --data ThinkLite-VL=folder | folder has no
downstream      | --data MathVista=x      | MathVista=x: no such file or folder
downstream      | --eval_data gone.jsonl  | gone.jsonl: no such file or folder
downstream      | --eval_data empty.jsonl | no task is left, dropped: {}
downstream      | --eval_data cut.jsonl   | cut.jsonl, line 1 is not JSON

# --- folders to write
train           | --out file              | --out file: File exists; expected a folder that can be
train           | --out file/out          | --out file/out: Not a directory; expected a folder that
train           | --out folder --model folder | --out folder is what --model names, too: a model
train           | --out folder/out --model folder | --out folder/out and --model folder lie one
sft             | --out config-alone      | --out config-alone already holds a model; choose another
rl              | --out config-list       | --out config-list already holds a model; choose another
downstream      | --out config-cut        | --out config-cut already holds a model; choose another
annotate evaluate | --out folder --model folder | --out folder is what --model names, too: a model
annotate evaluate | --out file            | File exists; a file stands where a folder is
annotate evaluate | --out file/out        | Not a directory; a file stands where a
"""

MODELS = """
train           | --model ./gone          | --model ./gone: there is no folder of this name, and no
train           | --model file            | --model file is a file; expected the folder of a model
train           | --model no-model        | --model no-model has no config.json, so it holds no
train           | --model config-cut      | config-cut/config.json is not JSON
train           | --model config-list     | config-list/config.json is not a JSON object
train           | --model text-model      | --model text-model is a 'qwen2' model; expected one that
train           | --model code-model      | --model code-model needs code of its own (auto_map in
train           | --model config-alone    | --model config-alone is not whole: tokenizer_config.json
"""


@pytest.mark.parametrize("script, words, message", cases(FILES))
def test_a_file_that_cannot_be_used_is_one_line(bad_stage, script, words, message):
    check(bad_stage(script, words), script, message)


@pytest.mark.slow  # transformers takes long to import
@pytest.mark.parametrize("script, words, message", cases(MODELS))
def test_a_model_that_cannot_be_used_is_one_line(bad_stage, script, words, message):
    check(bad_stage(script, words), script, message)


# ------------------------------------------------------------------------------------------------
# Rows. Each is the second line of a file whose first line is as it should be.

# what is changed in a row, or what stands in its place: what the line says after "line 2"
PAIRS = [  # of sft.py, rl.py and evaluate.py --bench pairs=
    ("a text", ": expected an object with id, source, question"),
    ({"id": LEFT_OUT}, " has no 'id'; expected a non-empty string"),
    ({"id": ""}, ": 'id' is \"\"; expected a non-empty string"),
    ({"id": 7}, ": 'id' is 7; expected a non-empty string"),
    ({"source": None}, ": 'source' is null; expected a string"),
    ({"question": LEFT_OUT}, " has no 'question'; expected a string"),
    ({"question": ["Which?"]}, ": 'question' is [\"Which?\"]; expected a string"),
    ({"images": None}, ": 'images' is null; expected a list of paths, [] for none"),
    ({"images": "red.png"}, ": 'images' is \"red.png\"; expected a list of paths"),
    ({"images": [3]}, ": 'images' is [3]; expected a list of paths"),
    ({"images": [""]}, ": 'images' is [\"\"]; expected a list of paths"),
    ({"video": []}, ": 'video' is []; expected null or a non-empty list"),
    ({"video": "frames"}, ": 'video' is \"frames\"; expected null or a non-empty list"),
    ({"responses": ["one"]}, ": 'responses' is [\"one\"]; expected a list of two non-empty"),
    ({"responses": ["a", " "]}, ': \'responses\' is ["a", " "]; expected a list of two'),
    ({"responses": ["a", 2]}, ": 'responses' is [\"a\", 2]; expected a list of two non-empty"),
    ({"choice": LEFT_OUT}, " has no 'choice'; expected 1 or 2, the better response"),
    ({"choice": 0}, ": 'choice' is 0; expected 1 or 2, the better response"),
    ({"choice": "1"}, ": 'choice' is \"1\"; expected 1 or 2, the better response"),
    ({"choice": True}, ": 'choice' is true; expected 1 or 2, the better response"),
    ({"choice": 1.0}, ": 'choice' is 1.0; expected 1 or 2, the better response"),
    ({"attempts": 5}, ": 'attempts' is 5; expected 1, 2, 3, 4"),
    ({"annotation": 3}, ": 'annotation' is 3; expected a string or null"),
    ({"critiques": ["one"]}, ": 'critiques' is [\"one\"]; expected null or a list of two"),
    ({"question": 5 * ["\x1b[2J" * 200]}, ": 'question' is"),
]
OWN_PAIRS = [  # of annotate.py --data pairs=
    (7, " lacks prompt, chosen, rejected; a row of pairs is an object with"),
    ({"prompt": LEFT_OUT}, " lacks prompt; a row of pairs is an object with"),
    ({"chosen": LEFT_OUT}, " lacks chosen; a row of pairs is an object with"),
    ({"prompt": 7}, " does not read as a row of pairs"),
    ({"chosen": ["left"]}, " does not read as a row of pairs"),
    ({"rejected": {"text": "right"}}, " does not read as a row of pairs"),
    ({"image": 7}, " does not read as a row of pairs"),
    ({"images": [7]}, " does not read as a row of pairs"),
    ({"image": {"path": "red.png"}}, " does not read as a row of pairs"),
    ({"video": 7}, " does not read as a row of pairs"),
]
JUDGEMENTS = [  # of judge.py --data
    ({"text": LEFT_OUT}, ': expected an object with "text", a judgement'),
    ({"text": None}, ': expected an object with "text", a judgement'),
    ({"text": ["a"]}, ': expected an object with "text", a judgement'),
    ({"label": 2}, ": label is 2; expected 0, 1 or none"),
    ({"label": "yes"}, ': label is "yes"; expected 0, 1 or none'),
    ({"label": [1]}, ": label is [1]; expected 0, 1 or none"),
    ("a text", ': expected an object with "text", a judgement'),
]
VL_ROWS = [  # of evaluate.py --bench VL-RewardBench=
    ([], " lacks id, image; a row of VL-RewardBench is an object with"),
    ({"image": LEFT_OUT}, " lacks image; a row of VL-RewardBench is an object with"),
    ({"query": LEFT_OUT}, " does not read as a row of VL-RewardBench (KeyError('query'))"),
    ({"query": 7}, ": 'question' is 7; expected a string"),
    ({"response": None}, " does not read as a row of VL-RewardBench"),
    ({"response": ["one"]}, ": 'responses' is [\"one\"]; expected a list of two"),
    ({"response": ["one", 2]}, ": 'responses' is [\"one\", 2]; expected a list of two"),
    ({"human_ranking": [0, 0]}, " does not read as a row of VL-RewardBench (KeyError((0, 0)))"),
    ({"human_ranking": 1}, " does not read as a row of VL-RewardBench"),
    ({"human_ranking": [[0], 1]}, " does not read as a row of VL-RewardBench"),
    ({"image": 7}, " does not read as a row of VL-RewardBench"),
    ({"image": {"bytes": None}}, " does not read as a row of VL-RewardBench (KeyError('path'))"),
]
LISTS = [  # of evaluate.py --bench lists=
    ("a text", " lacks responses; a row of lists is an object with responses"),
    ({"question": LEFT_OUT}, " does not read as a row of lists (KeyError('prompt'))"),
    ({"question": 7}, ": 'question' is 7; expected a string"),
    (
        {"responses": ["one"]},
        ' does not read as a row of lists (ValueError(\'responses is ["one"];',
    ),
    ({"responses": "abc"}, ' does not read as a row of lists (ValueError(\'responses is "abc";'),
    ({"responses": ["a", "b", 3]}, ": 'responses' is [\"a\", 3]; expected a list of two"),
    ({"choice": 1}, " does not read as a row of lists (ValueError('choice is 1, ranks [1, 3, 2];"),
    ({"ranks": LEFT_OUT}, " does not read as a row of lists (ValueError('choice is null, ranks"),
    ({"ranks": [1, 2]}, " does not read as a row of lists (ValueError('ranks is [1, 2];"),
    ({"ranks": [0, 1, 2]}, " does not read as a row of lists (ValueError('ranks is [0, 1, 2];"),
    ({"ranks": [1, 1, 1]}, " does not read as a row of lists (ValueError('ranks is [1, 1, 1];"),
    ({"ranks": [1, 2, 2.5]}, " does not read as a row of lists (ValueError('ranks is [1, 2, 2.5];"),
    (
        {"ranks": LEFT_OUT, "choice": 4},
        " does not read as a row of lists (ValueError('choice is 4;",
    ),
    ({"ranks": LEFT_OUT, "choice": "1"}, " does not read as a row of lists (ValueError("),
    ({"image": 7}, " does not read as a row of lists"),
    ({"images": [7]}, " does not read as a row of lists"),
    ({"video": 7}, " does not read as a row of lists"),
]
LIST = {"id": "x", "question": "Which?", "responses": ["a", "b", "c"], "ranks": [1, 3, 2]}
SCORE_ROWS = [  # of evaluate.py --scores
    ("a text", ': expected bench, row and scores, two finite numbers, got "a text"'),
    ({"scores": LEFT_OUT}, ": expected bench, row and scores, two finite numbers, got"),
    ({"scores": [1]}, ": expected bench, row and scores, two finite numbers, got"),
    ({"scores": ["a", "b"]}, ": expected bench, row and scores, two finite numbers, got"),
    ({"scores": [1, float("nan")]}, ": expected bench, row and scores, two finite numbers, got"),
    ({"scores": [10**400, 1]}, ": expected bench, row and scores, two finite numbers, got"),
    ({"scores": "12"}, ": expected bench, row and scores, two finite numbers, got"),
    ({"scores": None}, ": expected bench, row and scores, two finite numbers, got"),
    ({"row": LEFT_OUT}, ": expected bench, row and scores, two finite numbers, got"),
    ({"row": [0]}, ": expected bench, row and scores, two finite numbers, got"),
    ({"row": 0}, ": pairs row 0 has scores already; remove one"),
    ({"bench": {}}, ": expected bench, row and scores, two finite numbers, got"),
]
TASKS = [  # of downstream_grpo.py --data
    (None, " lacks question, answer; a row of tasks is an object with question, answer"),
    ({"answer": LEFT_OUT}, " lacks answer; a row of tasks is an object with question, answer"),
    ({"question": 7}, " does not read as a row of tasks (TypeError('the question is 7;"),
    ({"question": ["1 + 1?"]}, " does not read as a row of tasks"),
    ({"answer": {"value": 2}}, " does not read as a row of tasks"),
    ({"image": 7}, " does not read as a row of tasks"),
    ({"images": [7]}, " does not read as a row of tasks"),
    ({"image": {"path": "red.png"}}, " does not read as a row of tasks"),
]
KINDS = {  # the row as it should be, how each script is given a file of them, what can be wrong
    "pair": (PAIR, {"sft": "--data", "rl": "--data", "evaluate": "--bench pairs="}, PAIRS),
    "own pair": (OWN_PAIR, {"annotate": "--data pairs="}, OWN_PAIRS),
    "judgement": (JUDGEMENT, {"judge": "--data"}, JUDGEMENTS),
    "VL-RewardBench": (VL_ROW, {"evaluate": "--bench VL-RewardBench="}, VL_ROWS),
    "list": (LIST, {"evaluate": "--bench lists="}, LISTS),
    "scores": (SCORES, {"evaluate": "--scores"}, SCORE_ROWS),
    "task": (TASK, {"downstream_grpo": "--data"}, TASKS),
}


def row_cases():
    found = []
    for kind, (row, scripts, changes) in KINDS.items():
        for script, words in scripts.items():
            for change, message in changes:
                name = f"{script} {kind} {json.dumps(change, default=lambda _: 'left out')[:60]}"
                found.append(pytest.param(script, words, row, change, message, id=ascii(name)))
    return found


@pytest.mark.parametrize("script, words, row, change, message", row_cases())
def test_a_row_that_cannot_be_used_is_one_line(
    bad_stage, tmp_path, script, words, row, change, message
):
    path = row_file(tmp_path / "rows.jsonl", row, change)
    separator = "" if words.endswith("=") else " "
    ended = bad_stage(script, f"{words}{separator}{path}")
    check(ended, script, f"{path}, line 2{message}")


# ------------------------------------------------------------------------------------------------
# The same in a process of its own

ALIKE = """
annotate        | --concurrency 0         | expected a whole number from 1 to 10000, got '0'
annotate        | --data pairs=gone.jsonl | gone.jsonl: no such file or folder; fix the path
sft             | --epochs 0              | expected a whole number from 1 to 1000, got '0'
sft             | --data cut.jsonl        | cut.jsonl, line 1 is not JSON
rl              | --eps nan               | expected a number from 0 to 1, got 'nan'
rl              | --data empty.jsonl      | empty.jsonl has no pairs
judge           | @quote.args             | @quote.args, line 2: No closing quotation
judge           | --data folder           | folder: Is a directory; give a file
evaluate        | --benches x             | unknown flag --benches; perhaps --bench is meant
evaluate        | --bench pairs=own.jsonl | own.jsonl, line 1 has no 'id'
downstream      | --clip 0.5              | --clip is 0.5; expected a number above 1, or 0
downstream      | --data binary.jsonl     | binary.jsonl, line 1 is not JSON
"""


@pytest.mark.slow
@pytest.mark.parametrize("script, words, message", cases(ALIKE))
def test_a_process_says_what_the_tests_see(bad_stage, bad_files, tmp_path, script, words, message):
    ended = bad_stage(script, words)
    check(ended, script, message)
    words = command(script, words, tmp_path / "other")  # the first one is locked
    line = [sys.executable, str(ROOT / f"{script}.py"), *words]
    process = subprocess.run(line, cwd=bad_files, capture_output=True, timeout=300)
    assert process.returncode == ended[0]
    assert without_bars(process.stderr.decode()) == without_bars(ended[1])


@pytest.mark.slow
def test_what_vllm_does_not_start_with_is_one_line(bad_files, tmp_path):
    words = f"--model {ROOT / 'toy' / 'weak'} --context 99999"
    line = [sys.executable, str(ROOT / "evaluate.py"), *command("evaluate", words, tmp_path)]
    process = subprocess.run(line, cwd=bad_files, capture_output=True, text=True, timeout=600)
    last = process.stderr.splitlines()[-1]
    assert process.returncode == 1 and "Traceback" not in process.stderr, process.stderr
    assert last.startswith("evaluate.py: vLLM does not start with --model "), last
    assert " --context 99999 --tensor_parallel 1: User-specified max_model_len (99999) is" in last
