"""toy/released.py and its report: parts of the released code in the place of rl.py's."""

import json
import math
from pathlib import Path

import pytest
import torch
from test_policy import make_samples
from test_toy import SLIP, write_run

from core.encoding import Sample, collate, load_processor
from core.policy import load_policy, token_logps
from stable_reinforce import policy_loss
from toy import released, released_report, same_runs

BASE = Path(__file__).resolve().parent.parent / "toy" / "base"
ARGS = released.parser().parse_args(["--data", "-"])


def judged(rewards, lengths=None):
    """(advantages, kept) of the released filter."""
    lengths = lengths or [1] * len(rewards)
    samples = [Sample([0], [0], {}, response_ids=[7] * length) for length in lengths]
    kept = released.set_released_advantages(samples, torch.tensor(rewards), ARGS)
    assert [len(sample.advantages) for sample in samples] == lengths
    return [sample.advantages[0].item() for sample in samples], kept.tolist()


@pytest.mark.parametrize("right, wrong_are_kept", [(68, True), (69, False), (90, False)])
def test_from_69_in_100_right_ones_on_every_wrong_one_is_dropped(right, wrong_are_kept):
    """Well formed and consistent judgements earn 2 or 0.5."""
    advantages, kept = judged([2.0] * right + [0.5] * (100 - right))
    assert kept == [True] * right + [wrong_are_kept] * (100 - right)
    share = right / 100
    assert advantages[0] == pytest.approx(math.sqrt((1 - share) / share))
    wrong = -math.sqrt(share / (1 - share)) if wrong_are_kept else 0
    assert advantages[-1] == pytest.approx(wrong)


def test_a_longer_judgement_weighs_more():
    """Three tokens of 2 and one of 0.5, as three right judgements in four."""
    advantages, kept = judged([2.0, 0.5], [3, 1])
    assert kept == [True, False]
    assert advantages == pytest.approx([math.sqrt(1 / 3), 0])


def test_equal_rewards_teach_nothing():
    assert judged([2.0, 2.0, 2.0]) == ([0.0, 0.0, 0.0], [True, True, True])


def test_reasoning_that_does_not_lead_to_a_right_verdict_takes_half_of_it():
    parts = {
        "result": torch.tensor([1.0, 1.0, 1.0, 0.0]),
        "consistency": torch.tensor([1.0, 0.0, math.nan, math.nan]),
        "format": torch.tensor([1.0, 1.0, 1.0, 1.0]),
    }
    assert released.released_rewards(parts, ARGS).tolist() == [2.0, 1.0, 1.5, 0.5]


def test_a_blind_update_sees_the_text_alone(tmp_path):
    policy = load_policy(BASE, dtype=torch.float32).eval()
    pictures, _, video, text, *_ = make_samples(load_processor(BASE, 3136, 12544), tmp_path)

    def engine(batch, entropy):
        return policy(batch, entropy)

    with torch.no_grad():
        for sample, same in ((pictures, False), (video, False), (text, True)):
            batch = collate([sample], 0)
            seen, _ = token_logps(policy, batch)
            blind, _ = released.blind_token_logps(engine, batch)
            assert torch.allclose(blind, seen, atol=1e-4) == same
            grey = {name: batch[name] * 0 if "pixel" in name else batch[name] for name in batch}
            torch.testing.assert_close(released.blind_token_logps(engine, grey)[0], blind)
            reference, _ = released.blind_token_logps(policy, batch)
            torch.testing.assert_close(reference, seen)


def test_a_blind_update_cannot_be_compared_with_vllm():
    args = released.parser().parse_args(["--data", "-", "--update", "blind"])
    with pytest.raises(ValueError, match="--update blind: vLLM sees the pictures"):
        released.put_in(args)


def test_the_report_has_twelve_settings(tmp_path):
    for setting in ("sighted", "blind"):
        for bounds in released_report.BOUNDS:
            for clip in released_report.CLIPS:
                for seed in (0, 1):
                    greedy = 0.7 + 0.1 * seed
                    write_run(tmp_path / f"{setting}-{bounds}-{clip}-{seed}", greedy, SLIP)
    settings = released_report.read_settings(tmp_path)
    rows = released_report.table(settings).strip().splitlines()[2:]
    assert len(rows) == 12
    cells = [cell.strip() for cell in rows[2].strip("|").split("|")]
    assert cells[:5] == ["sees the pictures", "released bounds", "on", "2", "75.0 ± 7.1"]
    assert cells[6] == "50.0 ± 0.0"  # at step 2
    assert cells[9:] == [
        "0.0 ± 0.0",
        "20.0 ± 0.0",
        "3.0 ± 0.0",
        "7.5 ± 0.0",
        "8 of 800",
    ]
    released_report.figure(settings, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def log_of(folder, log_ratios):
    folder.mkdir()
    rows = [{"flags": "..."}, *({"step": 1, "log_ratio_max": value} for value in log_ratios)]
    (folder / "log.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def test_a_pre_clip_that_never_acts_is_the_same_run(tmp_path):
    quiet = log_of(tmp_path / "blind-none-0-2", [0.5, 6.9])
    assert "blind-none-1e3-2 is the same run" in same_runs.link_twin(quiet)
    assert same_runs.largest_log_ratio(tmp_path / "blind-none-1e3-2") == 6.9
    assert "is the same run" in same_runs.link_twin(quiet)  # once more
    loud = log_of(tmp_path / "blind-paper-0-2", [0.5, 6.91])
    assert "blind-paper-1e3-2 is another run" in same_runs.link_twin(loud)
    assert not (tmp_path / "blind-paper-1e3-2").exists()
    with pytest.raises(ValueError, match="expected a run without a pre-clip"):
        same_runs.link_twin(tmp_path / "blind-none-1e3-2")


def test_the_loss_and_its_gradient_are_the_same_to_the_bit_within_the_bounds():
    generator = torch.Generator().manual_seed(0)
    old_logps = torch.randn(8, 50, generator=generator)
    moved = torch.empty(8, 50).uniform_(-6.9, 6.9, generator=generator)
    advantages = torch.randn(8, generator=generator)
    results = []
    for clip in (1e3, None):
        logps = (old_logps + moved).requires_grad_()
        loss, _ = policy_loss(logps, old_logps, advantages, torch.ones(8, 50), clip=clip)
        loss.backward()
        results.append((loss.detach(), logps.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
