"""What several stages stand on, an idea a file."""

import os

from core.quiet import hush

# With --tensor_parallel vLLM starts processes of its own. They can be forked only while this one
# has not touched CUDA, and to ask torch whether there is a GPU touches it: let torch ask the
# driver's NVML instead, and let vLLM start fresh processes, whoever has asked before.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")

hush()
