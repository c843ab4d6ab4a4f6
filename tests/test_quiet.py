"""core/quiet.py: what is silenced, and that everything else is still shown."""

import ctypes
import io
import logging
import os
import warnings
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from core.quiet import hush, make_bar, no_warnings_from_torchs_core

RENAMED = "`torch.distributed.all_gather_into_tensor` is deprecated. Please use another one."
WORKERS = "This DataLoader will create 4 worker processes in total. Our suggested max number is 2."


@pytest.mark.parametrize(
    "text, category, is_shown",
    [
        (RENAMED, FutureWarning, False),
        (RENAMED, UserWarning, True),
        (WORKERS, UserWarning, False),
        ("This DataLoader has another fault", UserWarning, True),
        ("`torch.cuda.amp` is deprecated", FutureWarning, True),
    ],
)
def test_two_kinds_of_warnings_are_left_out(text, category, is_shown):
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        hush()
        warnings.warn(text, category, stacklevel=1)
    assert len(shown) == is_shown


@pytest.mark.parametrize(
    "logger, text",
    [
        ("vllm.triton_utils.importing", "Triton is installed, but doesn't include CPU backend."),
        ("torch.utils.cpp_extension", "No CUDA runtime is found, using CUDA_HOME='/usr/local'"),
    ],
)
def test_a_logger_loses_one_of_its_messages(logger, text, caplog):
    logger = logging.getLogger(logger)
    logger.warning(text)
    logger.warning("another message")
    assert [record.message for record in caplog.records] == ["another message"]


def test_who_asks_for_transformers_warnings_gets_them(monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    hush()
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY")
    hush()
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "error"


def test_a_bar_appears_after_ten_seconds(monkeypatch):
    screen = io.StringIO()
    bar = make_bar(tqdm, ([1, 2],), {"desc": "Loading weights", "file": screen, "mininterval": 0})
    assert list(bar) == [1, 2]
    assert screen.getvalue() == ""
    bar = make_bar(tqdm, ([1, 2],), {"desc": "Loading weights", "file": screen, "mininterval": 0})
    bar.start_t -= 11
    assert list(bar) == [1, 2]
    assert "Loading weights: 100%" in screen.getvalue()


def test_torchs_core_warns_again_when_vllm_has_started():
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    level = ctypes.c_int.in_dll(library, "FLAGS_caffe2_log_level")
    before = level.value
    with pytest.raises(ValueError), no_warnings_from_torchs_core():
        assert level.value == 2 > before  # of errors; a warning is 1
        raise ValueError
    assert level.value == before
