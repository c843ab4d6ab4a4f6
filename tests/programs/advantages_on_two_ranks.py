"""
Advantages of one batch on two real ranks against those of the same batch on one, wherever it is
cut in two. For test_stable_reinforce.py.

$ python tests/programs/advantages_on_two_ranks.py FOLDER    # an empty one, where the ranks meet
"""

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from stable_reinforce import advantages


def sum_over_ranks(sums):
    dist.all_reduce(sums)
    return sums


def compare_cuts(rank):
    generator = torch.Generator().manual_seed(5)
    rewards = torch.rand(256, generator=generator, dtype=torch.float64).round(decimals=1)
    rewards[200] = -40
    expected, expected_kept = advantages(rewards)
    assert expected_kept.sum() == 255
    for cut in (0, 5, 128, 256):  # 0 and 256: one of the ranks has nothing
        mine = slice(0, cut) if rank == 0 else slice(cut, None)
        advantage, kept = advantages(rewards[mine], reduce=sum_over_ranks)
        assert torch.allclose(advantage, expected[mine], atol=1e-13, rtol=1e-13)
        assert torch.equal(kept, expected_kept[mine])
    alone, _ = advantages(rewards[:5])  # without reduce the numbers are others
    assert not torch.allclose(alone, expected[:5])


def check_equal_rewards(rank):
    advantage, _ = advantages(torch.full((3 + rank,), 0.1), reduce=sum_over_ranks)
    assert (advantage == 0).all()


def check_bad_reward(rank):
    """A NaN on rank 1 stops both ranks."""
    rewards = torch.tensor([1.0, 0.0 if rank == 0 else torch.nan])
    try:
        advantages(rewards, reduce=sum_over_ranks)
    except ValueError as error:
        expected = "on another rank" if rank == 0 else "rows [[1]] here"
        assert expected in str(error), error
    else:
        raise AssertionError("a reward that is not finite went unnoticed")


def run(rank, folder):
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/ranks",
        rank=rank,
        world_size=2,
        timeout=timedelta(minutes=1),  # for the other rank, should it have failed
    )
    compare_cuts(rank)
    check_equal_rewards(rank)
    check_bad_reward(rank)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    # forked, since importing torch takes longer than the rest; the first failure ends both
    torch.multiprocessing.start_processes(run, args=(sys.argv[1],), nprocs=2, start_method="fork")
