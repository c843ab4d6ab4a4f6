"""How large the first run on a machine is: the model that its GPUs hold, how much work it does."""

import functools
import itertools
import json
import subprocess
import sys
from dataclasses import dataclass

import rl
from bench.shapes import QWENS, config_and_tokenizer
from core import memory_plan
from core.files import InputError
from core.memory_plan import Machine


@dataclass(frozen=True)
class Sizes:
    """How much work the parts do."""

    image_tokens: int  # of a picture; a square number
    words: int  # of each of a pair's two answers
    new_tokens: int  # of a response
    context: int
    micro_tokens: int
    samples: int  # of each rank in an update
    repeats: int  # of each measure of speed


ON_GPUS = Sizes(576, 200, 256, 4096, 8192, samples=32, repeats=2)
ON_A_CPU = Sizes(4, 4, 4, 1024, 512, samples=2, repeats=1)
BUDGETS = (4096, 8192, 16384, 32768)  # --micro_tokens whose speed is measured on GPUs
# The largest that fits is taken: shapes with their layers (0 = all), and vLLM's share of a GPU.
CANDIDATES = (("7b", 0), ("7b", 16), ("7b", 8), ("7b", 4), ("3b", 8), ("3b", 2))
SHARES = (0.3, 0.4, 0.25)
DISK_SHARE = 0.4  # of the free disk for one model: there may be two


@dataclass(frozen=True)
class Scale:
    """A model and how many ranks train it. memory: vLLM's share of a GPU."""

    shape: str
    layers: int
    ranks: int
    memory: float

    def __str__(self):
        return f"{self.shape}:{self.layers}:{self.ranks}:{self.memory:g}"

    @property
    def sizes(self):
        return ON_GPUS if self.shape in QWENS else ON_A_CPU

    @property
    def is_whole_7b(self):
        return self.shape == "7b" and not self.layers

    def named(self):
        layers = f" with {self.layers} layers" if self.layers else ""
        return f"{self.shape}{layers} on {self.ranks} rank(s)"

    @property
    def rollout_batch(self):
        return 2 * self.sizes.samples * self.ranks

    def trainer_words(self):
        """The flags of rl.py that its memory depends on."""
        zero = 3 if self.ranks > 1 else 2
        sizes = self.sizes
        return [
            *("--zero", zero, "--memory", self.memory, "--context", sizes.context),
            *("--micro_tokens", sizes.micro_tokens, "--max_new_tokens", sizes.new_tokens),
            *("--rollout_batch", self.rollout_batch, "--train_batch", self.rollout_batch // 2),
        ]

    def flags(self, **changes):
        """As rl.py reads them."""
        words = [str(word) for word in self.trainer_words()]
        found = rl.parser().parse_args(words)
        vars(found).update(changes)
        return found

    def model_size(self):
        return size_of_shape(self.shape, self.layers)


@functools.cache
def size_of_shape(shape, layers):
    """Seconds, for the large ones."""
    config, _ = config_and_tokenizer(shape, layers)
    return memory_plan.model_size(config)


def read_scale(text):
    """The type of a flag: SHAPE:LAYERS:RANKS:MEMORY."""
    shape, layers, ranks, memory = text.split(":")
    return Scale(shape, int(layers), int(ranks), float(memory))


def largest_that_fits(ranks, machine, host_memory, disk):
    """Of the CANDIDATES on so many GPUs; the 77M model if none fits. disk: free bytes."""
    for (shape, layers), memory in itertools.product(CANDIDATES, SHARES):
        scale = Scale(shape, layers, ranks, memory)
        model = scale.model_size()
        reasons = (
            memory_plan.why_not(model, scale.flags(), ranks, machine),
            memory_plan.why_no_host(model, ranks, host_memory),
            2 * model.weights > DISK_SHARE * disk,
        )
        if not any(reasons):
            return scale
    return Scale("small", 0, ranks, 0.25)


def budgets_that_fit(scale, machine):
    """Of the BUDGETS, those with which the update fits; at least one."""
    model = scale.model_size()
    fitting = []
    for budget in BUDGETS:
        flags = scale.flags(micro_tokens=budget)
        if not memory_plan.why_not(model, flags, scale.ranks, machine):
            fitting.append(budget)
    return fitting or [scale.sizes.micro_tokens]


# --------------------------------------------------------------------------------------------------
# The machine, seen without starting CUDA in this process

LIST_CARDS = """
import json, torch
cards = []
for number in range(torch.cuda.device_count()):
    free, total = torch.cuda.mem_get_info(number)
    cards.append([torch.cuda.get_device_name(number), total, free])
print(json.dumps(cards))
"""


@dataclass(frozen=True)
class Card:
    name: str
    total: int  # bytes
    free: int


def visible_cards():
    """The GPUs that torch sees, as its ranks count them."""
    command = [sys.executable, "-c", LIST_CARDS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        raise InputError(f"torch cannot use the GPUs: {last_line(done.stderr)}; see make setup")
    return [Card(*card) for card in json.loads(last_line(done.stdout))]


def last_line(text):
    return (text.strip().splitlines() or [""])[-1]


def machine_of(cards):
    """As the memory plan takes it: each rank has a GPU, and the fullest one decides."""
    return Machine(min(card.free for card in cards), 1, min(card.total for card in cards))
