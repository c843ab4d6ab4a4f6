"""
The recipes, called with the arguments that other projects pass: TRL in a run of its own where its
environment is there (bench/step.py --setup_trl), verl, OpenRLHF, files of lmms-eval and VLMEvalKit.
"""

import asyncio
import importlib.util
import json
import os
import subprocess

import pytest
from conftest import ROOT, make_toy_pairs, read_rows, write_rows
from evaluation import FILES, MM, VL
from test_downstream import Server, the_larger_wins, the_longer_wins

import evaluate
from core.encoding import load_processor
from core.files import InputError
from core.pairs import judging_turns
from recipes import lmms_eval_vlmevalkit, trl_grpo
from sources import BENCHMARKS
from sources.reading import read_records

TRL = ROOT / "out" / "trl" / ".venv" / "bin" / "python"
RIGHT = "<think>So Response 2 is better.</think><answer>2</answer>"
INCONSISTENT = "<think>So Response 1 is better.</think><answer>2</answer>"


def load(name):
    """A recipe as verl and OpenRLHF load a file with a reward function."""
    spec = importlib.util.spec_from_file_location("reward", ROOT / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def serve():
    """serve(reply) -> a server for one judge."""
    servers = []

    def start(reply):
        servers.append(Server(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


# ------------------------------------------------------------------------------------------------
# TRL


def called_by_trl(judge, answers, questions, pictures):
    """As GRPOTrainer._calculate_rewards calls a reward function, TRL 1.16."""
    completions = [[{"role": "assistant", "content": answer}] for answer in answers]
    return trl_grpo.duels_won(
        judge=judge,
        prompts=[[{"role": "user", "content": question}] for question in questions],
        completions=completions,
        completion_ids=[[1, 2]] * len(answers),
        image=[None] * len(answers),
        question=questions,
        picture=pictures,
        trainer_state=None,
        log_extra=print,
        log_metric=print,
    )


@pytest.fixture
def picture(tmp_path):
    (pair,) = make_toy_pairs(tmp_path, 1, media=("image",))
    return pair.images[0]


def test_an_answer_earns_its_share_of_the_duels_with_its_prompts_other_answers(serve, picture):
    server = serve(the_larger_wins)
    judge = evaluate.Judge("m", base_url=server.url, temperature=0)
    answers = ["answer 3", "answer 1", "answer 3", "answer 7", "answer 9", "answer 8"]
    questions = ["one"] * 3 + ["other"] * 3
    rewards = called_by_trl(judge, answers, questions, [picture] * 6)
    assert rewards == [0.75, 0.0, 0.75, 0.0, 1.0, 0.5]
    assert len(server.asked) == 2 * 3 * 2  # prompts, pairs, orders


def test_an_answer_that_is_alone_on_its_process_is_refused(serve, picture):
    judge = evaluate.Judge("m", base_url=serve(the_larger_wins).url)
    with pytest.raises(InputError, match="alone on its process"):
        called_by_trl(judge, ["answer 3", "answer 1"], ["one", "other"], [picture] * 2)


@pytest.mark.slow
@pytest.mark.skipif(not TRL.exists(), reason="no TRL: bench/step.py --setup_trl out/trl/.venv")
def test_trl_trains_a_policy_with_a_judge(serve, toy_world, tmp_path):
    server = serve(the_longer_wins)
    flags = {
        "--model": ROOT / "toy" / "weak",
        "--data": toy_world / "out/toy/data/tasks/train.jsonl",
        "--judge_url": server.url,
        "--judge_model": "m",
        "--out": tmp_path / "policy",
        "--steps": 2,
        "--prompts": 3,
        "--answers": 4,
        "--max_new_tokens": 12,
        "--lr": 1e-3,
    }
    words = [str(word) for flag in flags.items() for word in flag]
    done = subprocess.run(
        [TRL, ROOT / "recipes" / "trl_grpo.py", *words],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(server.asked) == 2 * 3 * 6 * 2  # steps, prompts, pairs, orders
    state = json.loads((tmp_path / "policy" / "trainer_state.json").read_text())
    steps = [row for row in state["log_history"] if "reward" in row]
    assert [row["rewards/duels_won/mean"] for row in steps] == pytest.approx([0.5, 0.5])
    assert all(row["reward_std"] > 0 and row["grad_norm"] > 0 for row in steps)
    trained = (tmp_path / "policy" / "model.safetensors").read_bytes()
    assert trained != (ROOT / "toy" / "weak" / "model.safetensors").read_bytes()


def test_a_task_without_its_picture_is_an_error_that_names_its_row(tmp_path):
    data = write_rows(tmp_path / "tasks.jsonl", [{"question": "Q", "answer": "A", "image": "no"}])
    words = ["--model", "m", "--data", str(data), "--judge_url", "http://127.0.0.1:9/v1"]
    words += ["--judge_model", "m", "--out", str(tmp_path / "out")]
    with pytest.raises(InputError, match="line 1: expected one image"):
        trl_grpo.read_rows(trl_grpo.parser().parse_args(words))


# ------------------------------------------------------------------------------------------------
# verl and OpenRLHF


def called_by_verl(compute_score, text, truth, **extra_info):
    """As NaiveRewardManager.run_single calls it."""
    extra_info |= {"num_turns": None, "rollout_reward_scores": {}}
    return compute_score(
        data_source="judgements", solution_str=text, ground_truth=truth, extra_info=extra_info
    )


def called_by_openrlhf(reward_func, query, prompt, label):
    """As SingleTurnAgentExecutor calls it and reads what it returns: its numbers."""

    async def execute():
        return await asyncio.to_thread(reward_func, [query], [prompt], [label])

    found = asyncio.run(execute())
    logs = {name: value.flatten()[0].item() for name, value in found["extra_logs"].items()}
    return found["rewards"].item(), found["scores"].item(), logs


@pytest.fixture(scope="module")
def prompt_and_query(tmp_path_factory):
    """
    prompt_and_query(response) -> a judging prompt with a picture as OpenRLHF has it in its data,
    and what it decodes after the rollout.
    """
    from PIL import Image

    processor = load_processor(ROOT / "toy" / "base")
    (pair,) = make_toy_pairs(tmp_path_factory.mktemp("pair"), 1, media=("image",))
    turns = judging_turns(pair)
    prompt = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    images = [Image.open(path) for path in pair.images]

    def make(response):
        inputs = processor(text=[prompt], images=images, add_special_tokens=False)
        ids = [*inputs["input_ids"][0], *processor.tokenizer(response)["input_ids"]]
        return prompt, processor.tokenizer.decode(ids, skip_special_tokens=False)

    return make


@pytest.mark.parametrize(
    ("text", "judge", "expected"),
    [
        (RIGHT, "", {"score": 1.5, "result": 1, "consistency": 0, "format": 1}),
        (RIGHT, "--judge rule", {"score": 2, "result": 1, "consistency": 1, "format": 1}),
        (INCONSISTENT, "--judge rule", {"score": 1.5, "result": 1, "consistency": 0, "format": 1}),
        ("It is 2.", "--judge rule", {"score": 0, "result": 0, "consistency": 0, "format": 0}),
    ],
)
def test_a_judge_is_trained_by_eq_2(text, judge, expected, prompt_and_query, monkeypatch):
    monkeypatch.setenv("JUDGE_FLAGS", judge)
    recipe = load("train_a_judge")
    assert called_by_verl(recipe.compute_score, text, "2") == expected
    prompt, query = prompt_and_query(text + "<|im_end|>")
    rewards, scores, logs = called_by_openrlhf(recipe.reward_func, query, prompt, "2")
    assert {"score": rewards, **logs} == expected
    assert scores == expected["result"]


def test_a_query_without_its_prompt_is_refused():
    with pytest.raises(ValueError, match="expected a query with its prompt"):
        load("train_a_judge").reward_func([RIGHT], ["Which is better?\nassistant\n"], ["2"])


def test_a_trained_judge_scores_answers_against_a_reference(
    serve, picture, prompt_and_query, monkeypatch
):
    server = serve(the_larger_wins)
    options = {"model": "m", "base_url": server.url, "temperature": 0}
    monkeypatch.setenv("JUDGE", json.dumps(options))
    recipe = load("score_with_a_judge")
    asked = {"question": "Q", "images": [picture]}
    for answer, share in (("answer 5", 1.0), ("answer 4", 0.5), ("answer 3", 0.0)):
        assert called_by_verl(recipe.compute_score, answer, "answer 4", **asked) == share
        prompt, query = prompt_and_query(answer + "<|im_end|>")
        label = json.dumps(asked | {"reference": "answer 4"})
        numbers = called_by_openrlhf(recipe.reward_func, query, prompt, label)
        assert numbers == (share, share, {})
    assert ("answer 5", "answer 4") in server.asked and ("answer 4", "answer 5") in server.asked


def test_a_scorer_without_a_judge_says_what_is_missing(monkeypatch):
    monkeypatch.delenv("JUDGE", raising=False)
    with pytest.raises(InputError, match="no JUDGE in the environment"):
        called_by_verl(load("score_with_a_judge").compute_score, "a", "b", question="Q", images=[])


# ------------------------------------------------------------------------------------------------
# lmms-eval and VLMEvalKit


def items_of(bench, toy):
    return [item for _, item in read_records(BENCHMARKS[bench], toy / FILES[bench])]


def shown_by_length(item):
    """The answers in the order in which both projects show those of VL-RewardBench."""
    turned = sum(len(answer) for answer in item.responses) % 2
    return item.responses[::-1] if turned else item.responses


def judged_right(number, item, shown, words):
    """The verdict of a judge that errs in every third row."""
    choice = shown.index(item.responses[item.choice - 1])
    return words[choice if number % 3 else 1 - choice]


def lmms_eval_sample(number, item):
    first, second = shown = shown_by_length(item)
    verdict = judged_right(number, item, shown, ("1", "2"))
    said = f"Answer 1 is short.\nOverall Judgment: Answer {verdict} is better."
    return {
        "doc_id": number,
        "target": "[0, 1]",
        "filtered_resps": said,
        "resps": [f"<think>Hm.</think>{said}"],
        "doc_hash": "0",
        "vlreward_score": {"question_id": item.id, "category": "general", "score": 1.0},
        "input": f" You are a judge.\n\nQuestion: {item.question}\n\nAnswer 1: {first}\n\n"
        f"Answer 2: {second}\n\nPlease evaluate both answers.",
    }


def lmms_eval_multimodal_sample(number, item):
    first, second = item.responses
    verdict = judged_right(number, item, item.responses, ("A", "B"))
    return {
        "doc_id": number,
        "filtered_resps": f"The first is short. [[{verdict}]]",
        "input": f"Please judge.\n\n[User Question]\n{item.question}\n\n"
        f"[The Start of Assistant A's Answer]\n{first}\n[The End of Assistant A's Answer]\n\n"
        f"[The Start of Assistant B's Answer]\n{second}\n[The End of Assistant B's Answer]",
    }


def vlmevalkit_row(number, item):
    verdict = judged_right(number, item, shown_by_length(item), ("1", "2"))
    return {
        "index": number,
        "question": item.question,
        "response": str(item.responses),
        "answer": "[0, 1]",
        "category": "general",
        "prediction": f"Overall Judgment: Answer {verdict} is better.",
    }


def converted(file, bench, toy, out):
    words = ["--file", str(file), "--bench", f"{bench}={toy / FILES[bench]}", "--out", str(out)]
    lmms_eval_vlmevalkit.main(words)
    return read_rows(out)


@pytest.mark.parametrize(
    ("bench", "line_of", "ending"),
    [
        (VL, lmms_eval_sample, "jsonl"),
        (MM, lmms_eval_multimodal_sample, "jsonl"),
        (VL, vlmevalkit_row, "json"),
    ],
)
def test_judgements_of_other_evaluators_are_scored(bench, line_of, ending, toy, tmp_path):
    lines = [line_of(number, item) for number, item in enumerate(items_of(bench, toy))]
    file = tmp_path / f"theirs.{ending}"
    if ending == "json":
        file.write_text(json.dumps(lines))
    else:
        write_rows(file, lines[::-1])
    out = tmp_path / "judgements.jsonl"
    assert [line["row"] for line in converted(file, bench, toy, out)] == list(range(len(lines)))
    words = ["--judgements", str(out), "--parse", "lenient", "--page", "0"]
    words += ["--bench", f"{bench}={toy / FILES[bench]}", "--out", str(tmp_path / "scored")]
    evaluate.main(words)
    results = json.loads((tmp_path / "scored" / "results.json").read_text())["benches"][bench]
    wrong = len(range(0, len(lines), 3))
    overall, _, _ = results["lines"]["one sample"]["overall"]
    assert overall == pytest.approx(100 * (1 - wrong / len(lines)), abs=0.001)
