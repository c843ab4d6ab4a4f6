"""
What libraries print at every start and nobody can act on, silenced where it comes from: then a
line on the screen is one of ours, or worth reading. Errors are shown as before.
"""

import contextlib
import ctypes
import logging
import os
import warnings
from pathlib import Path


class Without:
    """A filter of a logger: records with this text are left out."""

    def __init__(self, text):
        self.text = text

    def filter(self, record):
        return self.text not in record.getMessage()


def hush():
    """To be called before any of the libraries is imported."""
    # Its warnings are about what changes in coming versions; requirements.txt names the version.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # DeepSpeed and vLLM use names that torch will rename.
    renamed = r"`torch\.distributed\.\w+` is deprecated"
    warnings.filterwarnings("ignore", message=renamed, category=FutureWarning)
    # --workers may be more than the processors: they also wait for the disk.
    warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
    # On a CPU vLLM does without triton, and torch without CUDA.
    leave_out("vllm.triton_utils.importing", "doesn't include CPU backend")
    leave_out("torch.utils.cpp_extension", "No CUDA runtime is found")


def leave_out(logger, text):
    logging.getLogger(logger).addFilter(Without(text))


def hush_bars():
    """transformers' progress bars appear only where they are of use, after ten seconds."""
    from transformers.utils.logging import set_tqdm_hook

    set_tqdm_hook(make_bar)


def make_bar(bar, args, options):
    return bar(*args, **options | {"delay": 10})


@contextlib.contextmanager
def no_warnings_from_torchs_core():
    """
    While vLLM starts on a CPU: it warns that it allocates from the memory of its own processor.
    The variable TORCH_CPP_LOG_LEVEL would do, but is read when torch is imported.
    """
    import torch

    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    level = ctypes.c_int.in_dll(library, "FLAGS_caffe2_log_level")
    before, errors = level.value, 2
    level.value = max(before, errors)
    try:
        yield
    finally:
        level.value = before
