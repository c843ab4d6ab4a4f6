"""
The contenders of bench/step.py, each in its process: a function of (args, cell, talk) that makes
rounds for ever. Imports and models come once.
"""

import dataclasses
import itertools
import json
import os
import sys
import time
from typing import NamedTuple

from core.pairs import judging_turns, read_pairs


class Cell(NamedTuple):
    """What a round makes."""

    samples: int
    tokens: int  # of each sample
    group: int = 2  # samples of a prompt
    products: str = "oneDNN"  # the library of matrix products, one of PRODUCTS

    def __str__(self):
        return f"{self.samples} x {self.tokens}, {self.group} a prompt, {self.products}"


PRODUCTS = ("oneDNN", "torch")  # toy/cpu.py's, and what torch calls by itself: MKL on x86


class NextCell(Exception):
    """The parent asks for another cell."""


class Talk:
    """
    A contender's end of the line: each round begins with a line from the parent and ends with a
    line of JSON to it.
    """

    def __init__(self):
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever libraries print goes to the log
        self.kept = {}  # what outlives a cell

    def begin(self):
        line = sys.stdin.readline()
        if not line:
            os._exit(0)
        self.start = time.perf_counter()
        if line.strip() != "go":
            raise NextCell(Cell(*json.loads(line)))

    @property
    def seconds(self):
        """Since the round began."""
        return time.perf_counter() - self.start

    def end(self, **values):
        print(json.dumps({"seconds": self.seconds} | values), file=self.out, flush=True)

    def keep(self, name, make):
        """What make() returned the first time."""
        if name not in self.kept:
            self.kept[name] = make()
        return self.kept[name]


def choose_products(cell):
    """Let toy/cpu.py compute with the cell's library."""
    import toy.cpu

    def has_onednn():
        return cell.products == "oneDNN"

    toy.cpu.has_onednn = has_onednn


def flags_of_rl(args, cell):
    """rl.py's flags for a cell: as many updates as TRL makes, one."""
    flags = {
        "model": args.model,
        "data": args.data,
        "out": f"{args.work}/{cell}",
        "judge": "rule",
        "zero": 0,  # one rank: nothing to split
        "check_every": 0,
        "rollout_batch": cell.samples // cell.group,
        "samples": cell.group,
        "train_batch": cell.samples,
        "max_new_tokens": cell.tokens,
        "context": args.context,
        "micro_tokens": args.micro_tokens,
        "steps": 1_000_000,
        "save_every": 0,
        # workers of the next cell would be forked from a process with threads, and hang
        "workers": 1 if args.threads == 1 else 0,
        "seed": args.seed,
    }
    words = ["--no-recompute"]
    for name, value in flags.items():
        words += [f"--{name}", str(value)]
    return words


def rl_py(args, cell, talk):
    import rl
    from bench.gpu import operations
    from core import runs, sampler

    learn = talk.keep("learn", lambda: rl.learn)
    start_run = talk.keep("start_run", lambda: rl.start_run)
    forbidden_token_ids = talk.keep("forbidden_token_ids", lambda: sampler.forbidden_token_ids)
    log = talk.keep("Log", lambda: runs.Log)

    class WaitingLog(log):
        def row(self, step, **values):
            super().row(step, **values)
            seconds = talk.seconds
            weights = [p.data for p in talk.kept["run"].policy.parameters()]
            copy = time_to_copy(weights)
            phases = {k.removeprefix("s_"): v for k, v in values.items() if k.startswith("s_")}
            talk.end(
                seconds=seconds,
                samples=values["samples"],
                tokens=values["length"] * values["samples"],
                operations=talk.kept["operations"],
                product=speed_of_product(),
                copy=copy,
                bytes=sum(weight.nbytes for weight in weights),
                phases=phases,
            )
            talk.begin()

    def start_run_once(args, *others):
        run = talk.keep("run", lambda: start_run(args, *others))
        return dataclasses.replace(run, args=args)

    def learn_and_count(run, mini_batches, *others):
        config = run.policy.model.config
        talk.kept["operations"] = sum(operations(config, samples) for samples in mini_batches)
        return learn(run, mini_batches, *others)

    def forbid_the_end(processor, vocabulary):
        forbidden = forbidden_token_ids(processor, vocabulary)
        return [*forbidden, processor.tokenizer.eos_token_id]

    runs.Log = WaitingLog
    rl.start_run = start_run_once
    rl.learn = learn_and_count
    sampler.forbidden_token_ids = forbid_the_end
    sys.argv = ["rl.py", *flags_of_rl(args, cell)]
    rl.main()


def speed_of_product(side=2048):
    """Operations a second of a matrix product, the best of five."""
    import torch

    from toy.cpu import product

    matrix, seconds = torch.randn(side, side), []
    for _ in range(5):
        start = time.perf_counter()
        product(matrix, matrix)
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds)


def time_to_copy(weights):
    copies = [weight.clone() for weight in weights]
    start = time.perf_counter()
    for copy, weight in zip(copies, weights):
        copy.copy_(weight)
    return time.perf_counter() - start


def floor(args, cell, talk):
    import rl
    from core import prompts

    processor, sampler, policy = talk.keep("models", lambda: load_floor(args))
    flags, pairs = rl.parser().parse_args(flags_of_rl(args, cell)), read_pairs(args.data)
    for step in itertools.count():
        places = range(flags.rollout_batch)
        shown = [prompts.pair_at(pairs, step, place, flags) for place in places]
        batch = prompts.encode_prompts(shown, judging_turns, processor)
        samples, generating = bare_generate(sampler, batch, cell)
        pad_id = processor.tokenizer.pad_token_id
        learning = bare_learn(policy, samples, flags.micro_tokens, pad_id)
        sampler.after_sync()  # the next round finds nothing cached
        talk.end(
            seconds=generating + learning,
            samples=len(samples),
            tokens=sum(len(sample.response_ids) for sample in samples),
            phases={"generate": generating, "forward and backward": learning},
        )
        talk.begin()


def load_floor(args):
    import torch

    import toy.cpu
    from core.encoding import load_processor
    from core.policy import load_policy
    from core.sampler import VLLMSampler
    from core.training import start_ranks

    _, _, device = start_ranks(args.seed)
    toy.cpu.speed_up_process()
    processor, policy = load_processor(args.model), load_policy(args.model, dtype=torch.float32)
    toy.cpu.speed_up_policy(policy)
    toy.cpu.speed_up_vllm()
    sampler = VLLMSampler(args.model, processor, device, context=args.context)
    return processor, sampler, policy


def bare_generate(sampler, batch, cell):
    """(samples, seconds)"""
    from vllm import SamplingParams

    from core.sampler import collapse_pads, vllm_media

    requests = []
    for prompt in batch:
        ids = collapse_pads(prompt.prompt_ids, sampler.pads)
        requests.append({"prompt_token_ids": ids, **vllm_media(prompt.media)})
    sampling = SamplingParams(
        n=cell.group, temperature=1.0, max_tokens=cell.tokens, ignore_eos=True, detokenize=False
    )
    start = time.perf_counter()
    outputs = sampler.llm.generate(requests, sampling, use_tqdm=False)
    seconds = time.perf_counter() - start
    samples = []
    for prompt, output in zip(batch, outputs):
        for completion in output.outputs:
            # no pads of pictures, behind which there are no pixels
            ids = [0 if token in sampler.logit_bias else token for token in completion.token_ids]
            samples.append(dataclasses.replace(prompt, response_ids=ids))
    return samples, seconds


def bare_learn(policy, samples, micro_tokens, pad_id):
    """Seconds of a forward and a backward pass."""
    from torch.nn.functional import cross_entropy

    from core.encoding import MODEL_INPUTS, collate
    from core.shared_prompts import shared_inputs
    from core.training import row_batches

    model = policy.model
    batches = [collate(batch, pad_id) for batch in row_batches(samples, micro_tokens)]
    start = time.perf_counter()
    for batch in batches:
        inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
        inputs |= shared_inputs(model.base_model, batch, inputs)
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        logits = model.lm_head(hidden[batch["predict_from"]])
        cross_entropy(logits, batch["response_ids"]).backward()
    seconds = time.perf_counter() - start
    model.zero_grad()
    return seconds


def trl(args, cell, talk):
    import torch
    from datasets import Dataset, Image
    from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    import toy.cpu
    from core.sampler import forbidden_token_ids

    made = {}  # of the round

    def reward(completions, completion_ids, choice, **_):
        made["samples"] = len(completions)
        made["tokens"] = sum(map(len, completion_ids))
        texts = [turns[0]["content"] for turns in completions]
        return [reward_of(text, right) for text, right in zip(texts, choice)]

    class Turns(TrainerCallback):
        def on_step_end(self, *_, **__):
            talk.end(**made, version=sys.modules["trl"].__version__)
            talk.begin()

    processor = AutoProcessor.from_pretrained(args.model, padding_side="left")
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.float32)
    toy.cpu.speed_up_linear_layers(model)
    vocabulary = model.config.get_text_config().vocab_size
    forbidden = forbidden_token_ids(processor, vocabulary)
    rows = min(args.trl_rows, cell.samples)
    config = GRPOConfig(
        output_dir=f"{args.work}/trl",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=cell.samples // rows,
        num_generations=trl_group(cell),
        max_completion_length=cell.tokens,
        max_steps=1_000_000,
        generation_kwargs={"suppress_tokens": [*forbidden, processor.tokenizer.eos_token_id]},
        shuffle_dataset=False,
        learning_rate=1e-6,
        seed=args.seed,
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        log_multimodal=False,
        dataloader_pin_memory=False,
    )
    data = Dataset.from_list(rows_for_trl(args, cell)).cast_column("image", Image())
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=data,
        processing_class=processor,
        callbacks=[Turns()],
    )
    trainer.train()


def trl_group(cell):
    """TRL compares the samples of a prompt: it needs two or more."""
    return max(2, cell.group)


def reward_of(text, right):
    from judge import rule
    from stable_reinforce import final_reward, format_reward, result_reward

    return final_reward(result_reward(text, right), float(rule(text)), format_reward(text))


def rows_for_trl(args, cell):
    """The prompts of ten steps, in rl.py's order."""
    import rl
    from core import prompts

    cell = cell._replace(group=trl_group(cell))
    flags, pairs = rl.parser().parse_args(flags_of_rl(args, cell)), read_pairs(args.data)
    rows = []
    for step, place in itertools.product(range(10), range(flags.rollout_batch)):
        pair = prompts.pair_at(pairs, step, place, flags)
        text = judging_turns(pair)[0]["content"][-1]["text"]
        prompt = [{"role": "user", "content": text}]
        rows.append({"prompt": prompt, "image": pair.images[0], "choice": pair.choice})
    return rows


CONTENDERS = {"rl.py": rl_py, "floor": floor, "TRL": trl}


def run_contender(args):
    """A contender's whole life."""
    talk, cell = Talk(), None
    while True:
        try:
            if cell is None:
                talk.begin()
            else:
                choose_products(cell)
                CONTENDERS[args.contender](args, cell, talk)
        except NextCell as asked:
            cell = asked.args[0]
