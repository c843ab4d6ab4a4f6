"""
rl.py run for real on a tiny model: vLLM and DeepSpeed on two ranks, the comparison of vLLM and the
trainer with planted faults, the same steps on any number of ranks, killed and resumed, a judge that
dies. tests/test_update.py has the formulas.
"""

import os
import random
import subprocess
import sys
import threading
import time
import tracemalloc
from types import SimpleNamespace

import pytest
import stages
import torch
from conftest import ROOT, annotator, png, read_rows

import rl
from core import metrics, prompts, rl_flags
from core.encoding import Sample, collate, encode, encode_prompt, load_processor
from core.model_card import KINDS
from core.neighbours import ALGORITHMS
from core.pairs import Pair, judging_turns, swap, write_pairs
from core.policy import load_policy, save_policy, token_logps
from core.sampler import Generated
from stable_reinforce import advantages, policy_loss

BASE = ROOT / "toy" / "base"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
CONSISTENT = "<think>Claims. Response 1 is better.</think><answer>1</answer>"
INCONSISTENT = "<think>Claims. Response 2 is better.</think><answer>2</answer>"
COLOURS = ["red", "green", "blue", "yellow"]
FLAGS = [
    *("--judge", "rule", "--rollout_batch", "12", "--train_batch", "6", "--max_new_tokens", "24"),
    *("--context", "1024", "--lr", "1e-3", "--zero", "2", "--workers", "1"),
]


def toy_pairs(folder, n):
    """Pairs with an image, a video or nothing to see."""
    rng = random.Random(0)
    pairs = []
    for number in range(n):
        answers = rng.sample(COLOURS, 2)
        choice = rng.choice((1, 2))
        pictures = []
        for frame in range((1, 4, 0)[number % 3]):
            path = folder / f"{number}-{frame}.png"
            path.write_bytes(png((56, 56), answers[choice - 1]))
            pictures.append(str(path))
        images, video = (pictures, None) if number % 3 != 1 else ([], pictures)
        pair = Pair(str(number), "toy", "Which colour is it?", images, video, answers, choice)
        pairs.append(pair)
    return pairs


def teach_the_format(policy, processor, pairs, steps=20):
    """Short judgements that are right by chance: then rewards differ, and there is a gradient."""
    rng = random.Random(0)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    for _ in range(steps):
        samples = []
        for pair in rng.sample(pairs, 8):
            text = CONSISTENT if rng.random() < 0.5 else INCONSISTENT
            if rng.random() < 0.2:
                text = text.replace("</think><answer>1", "</think><answer>2")
            samples.append(encode(processor, judging_turns(pair), text))
        logps, _ = token_logps(policy, collate(samples, processor.tokenizer.pad_token_id))
        optimizer.zero_grad()
        loss = -logps.sum(1).mean()
        loss.backward()
        optimizer.step()


@pytest.fixture(scope="session")
def judge_folder(tmp_path_factory):
    """model/, which knows the format and nothing else, and pairs.jsonl."""
    folder = tmp_path_factory.mktemp("rl")
    pairs = toy_pairs(folder, 24)
    write_pairs(folder / "pairs.jsonl", pairs)
    policy, processor = load_policy(BASE, dtype=torch.float32), load_processor(BASE)
    teach_the_format(policy, processor, pairs[2::3])
    save_policy(policy, processor, folder / "model")
    return folder


@pytest.fixture(scope="module")
def base_pairs(tmp_path_factory):
    return toy_pairs(tmp_path_factory.mktemp("pairs"), 24)


def run(folder, *words, out, **options):
    """What rl.py prints."""
    data = ["--model", folder / "model", "--data", folder / "pairs.jsonl"]
    return stages.run("rl", *data, *FLAGS, *words, out=out, **options)


def torchrun(folder, program, *words, ranks):
    """A program that takes rl.py's flags, as a user starts it."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    data = ["--model", folder / "model", "--data", folder / "pairs.jsonl"]
    command = [sys.executable, *launcher, program, *data, *FLAGS, *words]
    return subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=500,
    )


def results_of_program(folder, name, *words, ranks):
    """{name: value} of the lines "RESULT name: value" that a program prints."""
    done = torchrun(folder, ROOT / "tests" / "programs" / name, *words, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert not done.stderr  # all libraries are imported there, and vLLM starts
    found = {}
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            name, _, value = line.removeprefix("RESULT ").partition(": ")
            found[name] = value
    return found


def args_of(*words):
    return rl.parser().parse_args(["--data", "-", *map(str, words)])


# --------------------------------------------------------------------------------------------------
# Data and flags


def ids_of_steps(pairs, steps, args):
    found = []
    for step in steps:
        for place in range(args.rollout_batch):
            found.append(prompts.pair_at(pairs, step, place, args).id)
    return found


def test_every_pass_has_every_pair_once_in_its_own_order(base_pairs):
    pairs, args = base_pairs[:12], args_of("--rollout_batch", 4)
    first, second = ids_of_steps(pairs, (0, 1, 2), args), ids_of_steps(pairs, (3, 4, 5), args)
    assert sorted(first) == sorted(second) == sorted(pair.id for pair in pairs)
    assert first != second


def test_both_orders_of_a_pair_are_neighbours(base_pairs):
    args = args_of("--rollout_batch", 4, "--both_orders")
    batch = [prompts.pair_at(base_pairs, 0, place, args) for place in range(4)]
    assert batch[1] == swap(batch[0])
    assert batch[3] == swap(batch[2])
    assert batch[0].id != batch[2].id


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        ([], 5 * 24 / 8),
        (["--both_orders"], 2 * 5 * 24 / 8),
        (["--passes", 0.4], 2),
        (["--steps", 7], 7),
    ],
)
def test_the_number_of_steps(words, steps):
    assert prompts.number_of_steps(args_of("--rollout_batch", 8, *words), 24) == steps


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train_batch", 100], "expected a divisor of --rollout_batch x --samples = 256"),
        (["--rollout_batch", 6, "--train_batch", 6], "--rollout_batch is 6; expected a multiple"),
        (["--tensor_parallel", 3], "--tensor_parallel is 3; expected a divisor"),
        (["--clip", 0.5], "--clip is 0.5; expected a number above 1, or 0"),
        (["--engine", "hf", "--tis", 2], "--engine hf has none, use --engine vllm"),
        (["--engine", "hf"], "use --zero 0, 1 or 2"),
        (["--algo", "topr", "--tis", 2], "use --old_logps vllm"),
        (["--algo", "grpo", "--eps_high", 0.3], "--eps_high has no meaning for --algo grpo"),
    ],
)
def test_flags_that_cannot_go_together(words, message):
    with pytest.raises(ValueError, match=message):
        rl_flags.check_flags(args_of(*words), 4)


class Places:
    """In place of prompts: which step and which place in its batch they are of."""

    def __init__(self, args):
        self.args = args

    def __getitem__(self, step_and_place):
        return step_and_place


@pytest.mark.parametrize("workers", [0, 1])
def test_each_rank_has_its_part_of_every_step_and_a_long_run_takes_no_memory(workers):
    dataset = Places(args_of("--rollout_batch", 8, "--workers", workers))
    tracemalloc.start()
    batches = prompts.prompt_batches(dataset, 2, 10**5, 1, 4, torch.device("cpu"))
    assert next(batches) == [(2, 2), (2, 3)]
    assert next(batches) == [(3, 2), (3, 3)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**23


def test_prompts_that_do_not_fit_are_dropped_and_counted(base_pairs, tmp_path, capsys):
    """A prompt too long for vLLM would stop a run after hours."""
    processor = load_processor(BASE)
    lengths = [encode(processor, judging_turns(pair)).length for pair in base_pairs]
    limit = sorted(lengths)[15]
    words = ["--context", limit + 24, "--max_new_tokens", 24]
    kept = drop_too_long(base_pairs, processor, *words)
    short = [pair for pair, length in zip(base_pairs, lengths) if length <= limit]
    assert kept == short
    assert 12 < len(kept) < 24
    assert f"{24 - len(kept)} of 24 prompts dropped" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"24 of 24 prompts dropped.*exceed --context 100"):
        drop_too_long(base_pairs, processor, "--context", 100, "--max_new_tokens", 24)


def drop_too_long(pairs, processor, *words):
    return prompts.drop_too_long(pairs, judging_turns, processor, args_of(*words), 0, 1)


def test_nine_images_are_too_many(base_pairs, tmp_path):
    (tmp_path / "image.png").write_bytes(png())
    images = [str(tmp_path / "image.png")] * 9
    crowded = Pair("many", "toy", "Which?", images, None, ["a", "b"], 1)
    kept = drop_too_long([base_pairs[0], crowded], load_processor(BASE))
    assert kept == base_pairs[:1]


def test_a_damaged_image_is_named_by_its_pair(tmp_path):
    processor = load_processor(BASE)
    path = tmp_path / "damaged.png"
    damaged = Pair("pair 17", "toy", "Which?", [str(path)], None, ["a", "b"], 1)
    path.write_bytes(png((560, 280))[:200])  # its header is complete: only a decoder notices
    dataset = prompts.PromptDataset([damaged], judging_turns, processor, args_of())
    with pytest.raises(ValueError, match="pair 17: an image cannot be read"):
        dataset[0, 0]
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="pair 17: an image cannot be read"):
        drop_too_long([damaged], processor)


# --------------------------------------------------------------------------------------------------
# Rewards and advantages


def test_whatever_token_ends_a_response_is_no_part_of_its_text():
    """A model may have several end tokens. Each is learnt, as a part of the response's ids."""
    processor = load_processor(BASE)
    ids = processor.tokenizer.encode("red or blue")
    responses = [Generated(ids, None, ended=True), Generated(ids, None, ended=False)]
    sampler = SimpleNamespace(generate=lambda *_: [responses])
    run = SimpleNamespace(args=args_of(), processor=processor, sampler=sampler)
    ended, cut_off = rl.sample_responses(run, [Sample([1], [0], {})], [0], 2, 1.0)
    assert (ended.finish, cut_off.finish) == ("stop", "length")
    assert ended.text == processor.tokenizer.decode(ids[:-1])
    assert cut_off.text == "red or blue"
    assert ended.response_ids == cut_off.response_ids == ids


def judgement(text, choice, finish="stop"):
    pair = Pair("0", "toy", "Which?", [], None, ["a", "b"], choice)
    return Sample([], [], {}, response_ids=[1, 2], pair=pair, text=text, finish=finish)


def rewards_of(samples, *words):
    """The rewards, and how many judgements the judge was asked about."""
    args = args_of("--judge", "rule", *words)
    judge = rl.ConsistencyJudge(args)
    parts = rl.rule_rewards(samples)
    judged = rl.worth_judging(samples, parts["result"], args)
    answers = judge.consistency([sample.text for sample in judged])
    parts["consistency"] = rl.consistency_of(samples, judged, answers)
    rewards = rl.total_rewards(parts, args)
    return [round(reward, 3) for reward in rewards.tolist()], len(judged)


def test_rewards_of_eq_2_and_whom_the_judge_sees():
    samples = [
        judgement(CONSISTENT, 1),
        judgement(INCONSISTENT.replace("<answer>2", "<answer>1"), 1),
        judgement(CONSISTENT, 2),  # wrong
        judgement("none", 1),
        judgement(CONSISTENT, 1, "length"),  # cut off: its format earns nothing
    ]
    assert rewards_of(samples) == ([2.0, 1.5, 0.5, 0.0, 1.5], 3)
    assert rewards_of(samples, "--reward_form", "external") == ([2.0, 1.5, 1.0, 0.0, 1.5], 4)
    without = [1.5, 1.5, 0.5, 0.0, 1.0]
    assert rewards_of(samples, "--consistency_weight", 0)[0] == without
    assert rewards_of(samples, "--judge", "none")[0] == without


def test_both_orders_earn_more_only_together():
    samples = [
        judgement(CONSISTENT, 1),
        judgement(INCONSISTENT, 2),
        judgement(CONSISTENT, 1),
        judgement(CONSISTENT, 2),
    ]
    assert rewards_of(samples, "--both_orders")[0] == [2.5, 2.5, 2.0, 0.5]


def test_advantages_beyond_sigma_are_dropped_and_sigma_0_keeps_all():
    samples = [judgement(CONSISTENT, 1) for _ in range(40)]
    rewards = torch.tensor([2.0] * 39 + [0.0])
    kept = rl.set_advantages(samples, rewards, args_of())
    assert kept.sum() == 39
    assert samples[-1].advantages.tolist() == [0.0, 0.0]
    assert samples[0].advantages[0] == advantages(rewards)[0][0]
    assert rl.set_advantages(samples, rewards, args_of("--sigma", 0)).all()
    assert samples[-1].advantages[0] < -6


def test_the_rollouts_say_what_the_filter_kept(tmp_path):
    samples = [judgement(CONSISTENT, 1), judgement(CONSISTENT, 2)]
    rewards, kept = torch.tensor([2.0, 0.5]), torch.tensor([True, False])
    metrics.write_rollouts(tmp_path, 1, 3, samples, rewards, rl.rule_rewards(samples), kept)
    rows = read_rows(tmp_path / "rollouts-1.jsonl")
    found = [(row["step"], row["reward"], row["result"], row["kept"]) for row in rows]
    assert found == [(3, 2.0, 1.0, True), (3, 0.5, 0.0, False)]


def test_a_k1_penalty_is_part_of_each_tokens_reward():
    samples = [judgement(CONSISTENT, 1) for _ in range(2)]
    for number, sample in enumerate(samples):
        sample.old_logps = torch.tensor([-1.0, -1.0])
        sample.reference_logps = torch.tensor([-1.0, -3.0 * number])
    rl.set_advantages(samples, torch.tensor([1.0, 1.0]), args_of("--kl_coef", 0.1, "--kl", "k1"))
    # the second sample's last token has left the reference
    assert samples[0].advantages[1] > samples[1].advantages[1]


# --------------------------------------------------------------------------------------------------
# The policy and its pictures


def test_the_gradient_depends_on_the_pixels(tmp_path):
    """In the authors' released update it did not: any picture gave the same loss and gradient."""
    policy, processor = load_policy(BASE, dtype=torch.float32), load_processor(BASE)
    gradients = []
    for colour in ("red", "blue"):
        path = tmp_path / f"{colour}.png"
        path.write_bytes(png((56, 56), colour))
        pair = Pair("0", "toy", "Which?", [str(path)], None, ["red", "blue"], 1)
        sample = encode_prompt(processor, judging_turns(pair))
        sample.response_ids = processor.tokenizer(CONSISTENT)["input_ids"]
        gradients.append(gradient_of(policy, sample))
    red, blue = gradients
    vision = [gradient for name, gradient in red.items() if "visual" in name]
    assert any(gradient.abs().max() > 0 for gradient in vision)
    changes = []
    for name, gradient in red.items():
        change = (gradient - blue[name]).abs().max() / gradient.abs().max().clamp_min(1e-12)
        changes.append(change)
    assert max(changes) > 1e-2


def gradient_of(policy, sample):
    policy.zero_grad()
    batch = collate([sample], pad_id=0)
    logps, _ = token_logps(policy, batch)
    loss, _ = policy_loss(logps, logps.detach(), torch.ones_like(logps), batch["response_mask"])
    loss.backward()
    found = {}
    for name, parameter in policy.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad.clone()
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "ranks"), [(2, 1), (3, 2)])
def test_the_comparison_passes_and_notices_every_planted_fault(judge_folder, zero, ranks):
    """Images, videos and text, before and after syncs that move every weight."""
    program = "compare_with_faults.py"
    assert results_of_program(judge_folder, program, "--zero", zero, ranks=ranks) == {
        "no fault": "True",
        "no embeddings": "RuntimeError",  # the sync itself says what is missing
        "other pixels": "False",
        "no pictures": "RuntimeError",  # the prompt has another length
        "nothing forgotten": "False",
    }


# --------------------------------------------------------------------------------------------------
# Whole runs


@pytest.mark.slow
def test_one_rank_and_two_take_the_same_steps_at_any_budget(judge_folder, tmp_path):
    """ZeRO 0 on one rank, ZeRO 2 and 3 on two, in micro-batches of other sizes."""
    three = ["--zero", 3, "--micro_tokens", 1000, "--workers", 0]
    run(judge_folder, "--steps", 2, "--zero", 0, out=tmp_path / "one")
    run(judge_folder, "--steps", 2, "--micro_tokens", 400, ranks=2, out=tmp_path / "two")
    run(judge_folder, "--steps", 2, *three, ranks=2, out=tmp_path / "three")
    one, two, three = (stages.steps_of(tmp_path / name) for name in ("one", "two", "three"))
    assert len(one) == 2
    assert one[0]["grad_norm"] > 1e-4
    assert 0 < one[0]["result"] < 1
    keys = ["reward", "result", "consistency", "format", "length", "filtered"]
    keys += ["loss", "grad_norm", "ratio_max", "entropy", "kl"]
    for other in (two, three):
        for expected, found in zip(one, other):
            for key in keys:
                close = pytest.approx(expected[key], rel=1e-4, abs=1e-5)
                assert found[key] == close, key
    assert two[1]["mismatch"] < 1e-4
    assert len(read_rows(tmp_path / "two" / "rollouts-1.jsonl")) == 12  # 6 a step


@pytest.mark.slow
def test_a_run_killed_and_resumed_is_the_unbroken_one(judge_folder, tmp_path):
    """Log, judgements and weights are the same bit for bit. Each model has its card."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    words = ["--engine", "hf", "--steps", 6, "--save_every", 2, "--samples", 2]
    words += ["--eval_data", judge_folder / "pairs.jsonl", "--eval_n", 2, "--save_best"]
    run(judge_folder, *words, out=whole)
    run(judge_folder, *words, out=broken, kill_after_step=3)
    assert "step-000002" in os.listdir(broken / "checkpoints")
    assert not (broken / "model.safetensors").exists()
    run(judge_folder, *words, out=broken)
    assert [row["step"] for row in stages.steps_of(whole)] == list(range(7))
    assert stages.steps_of(broken) == stages.steps_of(whole)
    for name in ("rollouts-0.jsonl", "model.safetensors"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), name
    assert (whole / "curves.png").stat().st_size > 10_000
    for folder in (whole, broken, whole / "best"):
        card = (folder / "README.md").read_text()
        assert KINDS["judge"][0] in card and "| `--save_best` | `true`" in card
        assert "| `eval_greedy` |" in card


def close_after_one_answer(judge):
    while not judge.stats["answered"]:
        time.sleep(0.05)
    judge.close()


@pytest.mark.slow
def test_a_judge_that_cannot_be_asked_stops_all_ranks_before_the_first_rollout(
    judge_folder, tmp_path
):
    with annotator() as judge:
        wrong = judge.url + "/wrong"  # 404
        words = ["--judge", "model", "--judge_url", wrong, "--out", tmp_path / "out"]
        done = torchrun(judge_folder, ROOT / "rl.py", *words, ranks=2)
    assert done.returncode != 0
    assert f"rl.py: {wrong}: status 404" in done.stderr
    assert "check OPENAI_API_KEY, --judge_url and --judge_model" in done.stderr
    assert not (tmp_path / "out" / "log.jsonl").exists()


@pytest.mark.slow
def test_a_dead_judge_stops_the_run_with_a_checkpoint(judge_folder, tmp_path):
    """No reward is made up, and with a judge that replies the same command goes on."""
    out = tmp_path / "out"
    words = ["--engine", "hf", "--steps", 2]
    asking = [*words, "--judge", "model", "--judge_patience", 2, "--judge_retries", 1]
    with annotator() as judge:
        # it answers the question at the start, and dies before the first judgement is there
        threading.Thread(target=close_after_one_answer, args=[judge], daemon=True).start()
        printed = run(judge_folder, *asking, "--judge_url", judge.url, out=out, fails=True)
    assert "rl.py: stopped, with a checkpoint" in printed
    assert "no reply for 2 s" in printed
    assert os.listdir(out / "checkpoints") == ["step-000000"]
    assert stages.steps_of(out) == []
    with annotator() as judge:
        run(judge_folder, *asking, "--judge_url", judge.url, out=out)
        assert sum(judge.stats["judge"].values()) > 0
    assert len(stages.steps_of(out)) == 2
    printed = run(judge_folder, *words, out=out, fails=True)
    assert "judge was 'model', is now 'rule'" in printed
    assert "choose another --out" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["--kl_coef", "0.1", "--kl", "k1"],
        ["--kl_coef", "0.1", "--kl", "k3", "--both_orders", "--epochs", "2"],
    ],
)
def test_a_run_with_a_penalty_towards_a_reference(judge_folder, tmp_path, words):
    run(judge_folder, "--engine", "hf", "--steps", 1, *words, out=tmp_path / "out")
    (row,) = stages.steps_of(tmp_path / "out")
    assert row["grad_norm"] > 0
    assert row["samples"] == 12


@pytest.mark.slow
def test_every_algorithm_takes_a_step_on_two_ranks(judge_folder, tmp_path):
    """
    Mini-batches of 3 samples on two ranks in micro-batches of one: a rank has one sample more, so
    the other has an empty micro-batch.
    """
    sizes = ["--rollout_batch", 6, "--samples", 2, "--train_batch", 3, "--micro_tokens", 1]
    words = ["--engine", "hf", "--steps", 1, *sizes, "--save_every", 0, tmp_path / "out"]
    norms = results_of_program(judge_folder, "every_algorithm.py", *words, ranks=2)
    assert list(norms) == list(ALGORITHMS)
    for name, norm in norms.items():
        assert 0 < float(norm) < 1000, name
