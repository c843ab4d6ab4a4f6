"""
sft.py run for real on a random toy model: by torchrun, killed, resumed, with every kind of head,
and on inputs that are wrong.
"""

import json
import random
import time
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import stages
import torch
from conftest import make_toy_pairs

import sft
from core.encoding import Sample, collate, load_processor
from core.files import InputError
from core.model_card import KINDS
from core.pairs import read_pairs, write_pairs
from core.policy import load_policy

TOY_PICTURES = ["--min_pixels", "3136", "--max_pixels", "12544"]

# --------------------------------------------------------------------------------------------------
# Helpers


def run_sft(*words, out, **options):
    """What sft.py prints."""
    return stages.run("sft", *words, out=out, **options)


# --------------------------------------------------------------------------------------------------
# Data


def test_batches_hold_every_pair_once_an_epoch_and_depend_on_the_seed(tmp_path):
    pairs = make_toy_pairs(tmp_path, 40, media=("text",))
    numbers = list(range(3, 40))
    batches = sft.global_batches(pairs, numbers, 16, 2, seed=5)
    assert [len(b) for b in batches] == [12, 12, 13, 12, 12, 13]  # at most 16, no small one left
    first, second = batches[:3], batches[3:]
    assert sorted(chain(*first)) == sorted(chain(*second)) == numbers and first != second
    assert batches == sft.global_batches(pairs, numbers, 16, 2, seed=5)
    assert batches != sft.global_batches(pairs, numbers, 16, 2, seed=6)


def data_of(tmp_path, n, *words):
    write_pairs(tmp_path / "pairs.jsonl", make_toy_pairs(tmp_path, n, media=("text",)))
    words = ["--data", tmp_path / "pairs.jsonl", "--out", "out", *words]
    return sft.read_data(sft.parser().parse_args([str(word) for word in words]))


def test_a_run_without_a_pair_to_learn_from_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"3 pairs, all held out by --eval_n 256.*--val"):
        data_of(tmp_path, 3)
    assert len(data_of(tmp_path, 3, "--eval_n", 2)[2]) == 1


def test_flags_can_be_in_a_file_several_on_a_line(tmp_path):
    text = "--data x.jsonl --out out   # a comment\n\n# another\n--lr 3e-4 --no-recompute\n"
    (tmp_path / "a.args").write_text(text)
    args = sft.parser().parse_args([f"@{tmp_path / 'a.args'}", "--lr", "1"])
    assert (args.data, args.out, args.lr, args.recompute) == ("x.jsonl", "out", 1.0, False)


def test_the_defaults_are_the_papers():
    args = sft.parser().parse_args(["--data", "x", "--out", "y"])
    assert (args.lr, args.batch, args.epochs) == (1e-5, 256, 1)
    assert args.model == "Qwen/Qwen2.5-VL-7B-Instruct"


class StandInTrainer:
    """A token's log-probability is minus its id, the score of a sample its last token."""

    device = "cpu"

    def __call__(self, batch):
        logps = -batch["response_ids"].float()
        scores = batch["input_ids"].flatten()[batch["last_token"]].float()
        return {"logps": logps, "score": scores}


def test_the_parts_of_the_loss_add_up_to_means_over_the_global_batch():
    """Samples of 1 to 4 tokens: means of micro-batches' means would be something else."""
    responses = [[5], [2, 3, 4, 1], [1, 1, 3], [2, 4]]  # two pairs, the better response first
    samples = [Sample([7], [0], vision={}, response_ids=ids) for ids in responses]
    losses = []
    for pair in (samples[:2], samples[2:]):
        loss, _ = sft.micro_batch_loss(StandInTrainer(), 0, 10, 2, pair)
        losses.append(loss.item())
    margins = torch.tensor([5.0 - 1.0, 3.0 - 4.0])
    ranking = -torch.nn.functional.logsigmoid(margins).mean()
    assert sum(losses) == pytest.approx(26 / 10 + ranking.item())


# --------------------------------------------------------------------------------------------------
# Runs


@pytest.mark.slow
@pytest.mark.parametrize("head", [None, "critic"])
def test_the_loss_is_a_mean_over_the_global_batch_whatever_the_ranks(toy_folder, tmp_path, head):
    """
    One rank with a micro-batch a step, two ranks with many: the same losses and norms, hence means
    over all tokens and pairs, not means of ranks' or micro-batches' means.
    """
    words = ["--model", toy_folder / "base", "--data", toy_folder / "pairs.jsonl"]
    words += ["--val", toy_folder / "val.jsonl", "--eval_n", "5", "--max_new_tokens", "12"]
    words += ["--batch", "14", "--lr", "1e-3", "--warmup", "0.67", "--workers", "0"]
    words += ["--no-recompute", *TOY_PICTURES]
    if head:
        words += ["--head", head]
    run_sft(*words, "--micro_tokens", 50_000, "--zero", 0, out=tmp_path / "1")
    run_sft(*words, "--micro_tokens", "700", ranks=2, out=tmp_path / "2")
    one, two = stages.steps_of(tmp_path / "1"), stages.steps_of(tmp_path / "2")
    assert [row["step"] for row in one] == [0, 1, 2, 3]
    assert [row["lr"] for row in one[1:]] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3])
    for a, b in zip(one, two, strict=True):
        drops = a.pop("dropped", None)
        assert drops == b.pop("dropped", None)
        assert a == pytest.approx(b, abs=1e-5, rel=1e-5)


@pytest.mark.slow
def test_a_run_that_is_killed_continues_bit_for_bit(toy_folder, tmp_path):
    """Kill it twice at random moments: the log of the run that was never killed, and its model."""
    words = ["--model", toy_folder / "base", "--data", toy_folder / "pairs.jsonl"]
    words += ["--val", toy_folder / "val.jsonl", "--eval_n", "2", "--max_new_tokens", "4"]
    words += ["--eval_every", "5", "--save_every", "2", "--batch", "4", "--epochs", "2"]
    words += ["--lr", "1e-3", "--micro_tokens", "600", "--workers", "1", "--no-recompute"]
    words += TOY_PICTURES
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_sft(*words, out=whole)
    for step in sorted(random.Random(time.time_ns()).sample(range(2, 19), 2)):
        run_sft(*words, out=killed, kill_after_step=step)
    run_sft(*words, out=killed)
    steps = stages.steps_of(whole)
    assert stages.steps_of(killed) == steps and [row["step"] for row in steps] == list(range(21))
    rows = [json.loads(line) for line in (killed / "log.jsonl").read_text().splitlines()]
    assert rows[0]["args"]["lr"] == 1e-3 and rows[0]["versions"]["torch"].startswith("2.")
    assert sum("resumed" in row for row in rows) >= 1
    model = (whole / "model.safetensors").read_bytes()
    assert model == (killed / "model.safetensors").read_bytes()
    assert not (whole / "checkpoints").exists() and (whole / "curves.png").exists()
    card = (killed / "README.md").read_text()
    assert f"# killed: {KINDS['judge'][0]}" in card
    assert "40 pairs to train on, 2 held out." in card and "| `val_loss` |" in card
    before = (whole / "log.jsonl").read_bytes()
    run_sft(*words, out=whole)  # it is finished
    assert (whole / "log.jsonl").read_bytes() == before
    printed = run_sft(*words, "--epochs", "3", out=whole, fails=True)
    assert "--epochs was 2, is now 3" in printed


@pytest.mark.slow
@pytest.mark.parametrize("head", ["scalar", "critic"])
def test_a_reward_head_learns_and_comes_back(toy_folder, tmp_path, head):
    """On pairs whose worse response ends in a mark; the saved folder scores as the trained one."""
    pairs = [mark_worse(pair) for pair in make_toy_pairs(tmp_path, 64, seed=3)]
    data = tmp_path / "pairs.jsonl"
    write_pairs(data, pairs)
    words = ["--model", toy_folder / "base", "--data", data, "--head", head, "--batch", "16"]
    words += ["--lr", "3e-3", "--epochs", "5", "--eval_every", "100", "--eval_n", "16"]
    words += ["--max_new_tokens", "3", "--save_every", "0", "--workers", "0", "--no-recompute"]
    run_sft(*words, *TOY_PICTURES, out=tmp_path / "out")
    first, *_, last = stages.steps_of(tmp_path / "out")
    assert last["val_n"] == 16 and last["val_loss"] < 0.5 * first["val_loss"]
    if head == "scalar":
        assert last["val_accuracy"] == 1 and last["loss"] < 0.1
    policy = load_policy(tmp_path / "out", dtype=torch.float32).eval()
    assert policy.head_kind == head
    assert KINDS["reward head"][0] in (tmp_path / "out" / "README.md").read_text()
    processor = load_processor(tmp_path / "out")
    examples = [sft.encode_pair(pair, processor, head, 4096) for pair in read_pairs(data, 4)]
    samples = list(chain(*(example.samples for example in examples)))
    with torch.no_grad():
        sums = sft.loss_sums(policy, collate(samples, 0))
    assert sums.right == 4 and sums.ranking < 4 * 0.3


def mark_worse(pair):
    better = pair.choice - 1
    responses, critiques = list(pair.responses), ["wrong", "wrong"]
    responses[1 - better] += " zzz"
    critiques[better] = "right"
    return replace(pair, responses=responses, critiques=critiques)


@pytest.mark.slow
def test_what_cannot_be_learned_from_is_dropped_and_a_frozen_tower_stays(toy_folder, tmp_path):
    pairs = make_toy_pairs(tmp_path, 12, seed=4)
    pairs[1].annotation, pairs[5].question = None, "why " * 500
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    words = ["--model", toy_folder / "base", "--data", tmp_path / "pairs.jsonl", "--batch", "5"]
    words += ["--lr", "1e-2", "--eval_n", "0", "--zero", "1", "--context", "600"]
    words += ["--workers", "2", "--freeze_vision"]
    run_sft(*words, *TOY_PICTURES, out=tmp_path / "out")
    log = stages.steps_of(tmp_path / "out")
    assert [row["step"] for row in log] == [1, 2, 3]
    assert log[-1]["dropped"] == {"too long": 1, "no annotation": 1, "no critiques": 0}
    assert sum(row["pairs"] for row in log) == 10
    before = dict(load_policy(toy_folder / "base", dtype=torch.float32).named_parameters())
    after = dict(load_policy(tmp_path / "out", dtype=torch.float32).named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any("visual" in name for name in changed)


@pytest.mark.slow
def test_a_run_whose_pairs_were_all_dropped_saves_no_model(toy_folder, tmp_path):
    words = ["--model", toy_folder / "base", "--data", toy_folder / "pairs.jsonl", "--batch", "20"]
    words += ["--eval_n", "0", "--context", "20", "--workers", "0"]
    error = run_sft(*words, *TOY_PICTURES, out=tmp_path / "out", fails=True)
    assert "step 1 has no pair left: so far were dropped too long 20" in error
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.slow
def test_an_error_says_where_it_is_and_what_to_do(toy_folder, tmp_path):
    pairs = make_toy_pairs(tmp_path, 6, seed=5, media=("image",))
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    words = ["--data", tmp_path / "pairs.jsonl", "--batch", "2"]
    words += ["--eval_n", "0", "--no-recompute", *TOY_PICTURES]
    base = ["--model", toy_folder / "base"]
    # a rate at which the weights overflow
    unstable = ["--workers", "0", "--lr", "1e30", "--warmup", "0", "--clip_grad", "0"]
    error = run_sft(*base, *words, *unstable, out=tmp_path / "out", fails=True)
    assert "--lr 1e+30 is too high" in error
    kept = json.loads((tmp_path / "out" / "not_finite.json").read_text())
    assert kept["step"] in (2, 3)
    assert len(kept["ids"]) == 2 and set(kept["ids"]) < {pair.id for pair in pairs}
    # a picture that is none, found by a worker
    broken = Path(pairs[3].images[0])
    broken.write_text("no picture")
    error = run_sft(*base, *words, "--workers", "1", out=tmp_path / "out", fails=True)
    assert "pairs.jsonl, line 4 (pair-5-3): an image cannot be read" in error
