"""Imports modules one after the other, and says of each which heavy libraries it has loaded."""

import importlib
import sys

HEAVY = {
    *("transformers", "vllm", "deepspeed", "openai", "PIL", "pyarrow", "qwen_vl_utils"),
    *("matplotlib", "torchvision"),
}

for name in sys.argv[1:]:
    importlib.import_module(name)
    loaded = sorted(HEAVY & set(sys.modules))
    print(f"{name}: {', '.join(loaded) or 'nothing heavy'}")
