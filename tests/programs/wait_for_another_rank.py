"""
Two ranks, as on two GPUs, of which one waits for the other for longer than torch lets it by itself
(here a second, really ten minutes or more). For tests/test_gpu.py.

$ torchrun --nproc_per_node=2 tests/programs/wait_for_another_rank.py
"""

import time
from datetime import timedelta
from unittest import mock

import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # noqa: F401 (has a backend, "fake")

from core.files import InputError
from core.training import all_reduce, first_error, start_ranks, wait_or_stop

join_group = dist.init_process_group


def join_without_nccl(backend, **options):
    join_group(backend.replace("nccl", "fake"), **options)


def sleep_long():
    if rank == 1:
        time.sleep(3)
    return rank


def fail_late():
    if sleep_long() == 1:
        raise RuntimeError("no reply")


with (
    mock.patch("torch.distributed.distributed_c10d.default_pg_timeout", timedelta(seconds=1)),
    mock.patch("torch.cuda.is_available", lambda: True),
    mock.patch("torch.cuda.set_device"),
    mock.patch("torch.distributed.init_process_group", join_without_nccl),
):
    rank, world, device = start_ranks(0)
    assert (world, device.type) == (2, "cuda")
    assert wait_or_stop(sleep_long, None) == rank
    sleep_long()
    assert all_reduce([rank, 2.5]) == [1, 5]
    sleep_long()
    dist.barrier()
    saved = []
    try:
        wait_or_stop(fail_late, lambda: saved.append(rank))
    except InputError as error:
        assert saved == [rank]
        assert str(error) == "stopped, with a checkpoint: no reply"
    else:
        raise AssertionError("the other rank's error went unnoticed")
    assert first_error(None) is None
    dist.destroy_process_group()
