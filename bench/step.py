"""
One RL step: rl.py against TRL's GRPOTrainer and against a floor; the same prompts with pictures, the same number of tokens, one update.

  rl.py   its own main(). Two hooks: the end token is barred, so that all samples have the same length, and a step waits for its turn
  TRL     the latest release of PyPI in an environment of its own (--setup_trl), pictures included, transformers' generate (its vLLM
          inside the process does not start on a CPU), rl.py's rules as the reward; no logging, saving, evaluation, recomputation
  floor   what no loop can be without: bare vLLM for as many tokens, then a bare forward and backward by transformers over them in
          rl.py's micro-batches, with rl.py's matrix products. No prompts are built, nothing is seeded, scored, optimized or synced

Each contender lives in a process of its own, on one rank and --threads threads, in float32 on a CPU. They take turns round by round
while the others sleep, so that whatever else the machine does meets them alike; a cell's first round is not counted.
TRL wants 2 samples a prompt or more, so all have 2. Its micro-batch of --trl_rows sequences is about rl.py's --micro_tokens.

$ python bench/step.py --setup_trl out/trl/.venv
$ python bench/step.py --data out/toy/data/test/pairs.jsonl --out out/bench/step.md
"""
import argparse
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script: rl.py is in the folder above
from annotate import messages, read_pairs, write_pairs

# ---------------------------------------------------------------------------------------------------
# The contenders, each in its process: a function of (args, cell, talk) that makes rounds for ever. Imports and models come once.


class NextCell(Exception):
    """The parent asks for another number of samples or tokens."""


class Talk:
    """A contender's end of the line: each round begins with a line from the parent and ends with a line of JSON."""

    def __init__(self):
        self.out, self.once = os.fdopen(os.dup(1), "w"), {}
        os.dup2(2, 1)  # whatever libraries print goes to the log

    def begin(self):
        line = sys.stdin.readline()
        if not line:
            os._exit(0)
        self.start = time.perf_counter()
        if line.strip() != "go":
            raise NextCell(json.loads(line))

    def end(self, **said):
        print(json.dumps({"seconds": time.perf_counter() - self.start} | said), file=self.out, flush=True)

    def kept(self, make):
        """What make() returned the first time: models outlive a cell."""
        if "made" not in self.once:
            self.once["made"] = make()
        return self.once["made"]


def words(args, samples, tokens):
    """rl.py's flags for a cell: as many updates as TRL makes, one."""
    return ["--model", args.model, "--data", args.data, "--out", f"{args.work}/{samples}x{tokens}", "--judge", "rule", "--zero", "2",
            "--no-recompute", "--check_every", "0", "--rollout_batch", str(samples // 2), "--samples", "2", "--train_batch", str(samples),
            "--max_new_tokens", str(tokens), "--context", str(args.context), "--micro_tokens", str(args.micro_tokens), "--steps", "1000000",
            "--save_every", "0", "--workers", "1", "--seed", str(args.seed)]


def rl_py(args, cell, talk):
    import rl

    real = talk.once.setdefault("real", {k: getattr(rl, k) for k in ("barred", "prepare", "Log")})

    class Log(real["Log"]):
        def row(self, step, **values):
            super().row(step, **values)
            seconds = time.perf_counter() - talk.start
            weights = [p.data for p in talk.once["made"][1].module.parameters()]
            copies, start = [w.clone() for w in weights], time.perf_counter()
            for copy, weight in zip(copies, weights):
                copy.copy_(weight)
            talk.end(seconds=seconds, samples=values["samples"], tokens=values["length"] * values["samples"],
                     copy=time.perf_counter() - start, bytes=sum(w.nbytes for w in weights),
                     phases={k[2:]: v for k, v in values.items() if k.startswith("s_")})
            talk.begin()

    rl.Log = Log
    rl.prepare = lambda *a: talk.kept(lambda: real["prepare"](*a))
    rl.barred = lambda processor, n: [*real["barred"](processor, n), processor.tokenizer.eos_token_id]
    sys.argv = ["rl.py", *words(args, **cell)]
    rl.main()


def floor(args, cell, talk):
    import torch
    from transformers import AutoProcessor
    from vllm import SamplingParams

    import rl
    import sft

    def make():
        device, processor = sft.setup(args.seed)[2], AutoProcessor.from_pretrained(args.model)
        return (processor, rl.VLLM(args.model, processor, device, max_len=args.context),
                sft.load_policy(args.model, dtype=torch.float32).model)

    processor, engine, model = talk.kept(make)
    how = SamplingParams(n=2, temperature=1.0, max_tokens=cell["tokens"], ignore_eos=True, detokenize=False)
    flags, pairs, banned = rl.parser().parse_args(words(args, **cell)), read_pairs(args.data), {*engine.bias}
    for step in itertools.count():
        rows = [rl.prompt(processor, rl.shown(pairs, step, place, flags)) for place in range(flags.rollout_batch)]
        once = lambda ids: [t for t, before in zip(ids, [None, *ids]) if t not in engine.pads or t != before]
        asked = [{"prompt_token_ids": once(row["prompt"]), "multi_modal_data": {"image": row["media"][0]},
                  "mm_processor_kwargs": {"do_resize": False}} for row in rows]
        start = time.perf_counter()
        outputs = engine.llm.generate(asked, how, use_tqdm=False)
        clock = [time.perf_counter() - start]
        rows = [row | {"response": [0 if t in banned else t for t in o.token_ids]} for row, out in zip(rows, outputs) for o in out.outputs]
        batches = [sft.collate(b, processor.tokenizer.pad_token_id) for b in sft.micro_batches([[row] for row in rows], flags.micro_tokens)]
        start = time.perf_counter()
        for batch in batches:
            hidden = model.base_model(**{k: batch[k] for k in sft.INPUTS if k in batch}, use_cache=False).last_hidden_state.flatten(0, 1)
            torch.nn.functional.cross_entropy(model.lm_head(hidden[batch["at"]]), batch["tokens"]).backward()
        clock.append(time.perf_counter() - start)
        model.zero_grad()
        engine.reset()  # the next round finds nothing cached, as after a sync
        talk.end(seconds=sum(clock), samples=len(rows), tokens=sum(len(row["response"]) for row in rows),
                 phases=dict(zip(("generate", "forward and backward"), clock)))
        talk.begin()


def trl(args, cell, talk):
    import torch
    from datasets import Dataset, Image
    from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer, __version__ as trl_version

    import rl
    from judge import rule
    from stable_reinforce import final_reward, format_reward, result_reward

    made, done = cell["samples"], {}

    def reward(completions, completion_ids, choice, **_):
        done.update(samples=len(completions), tokens=sum(map(len, completion_ids)), version=trl_version)
        texts = [turns[0]["content"] for turns in completions]
        return [final_reward(result_reward(t, c), float(rule(t)), format_reward(t)) for t, c in zip(texts, choice)]

    class Turns(TrainerCallback):
        def on_step_end(self, *_, **__):
            talk.end(**done)
            talk.begin()

    processor = AutoProcessor.from_pretrained(args.model, padding_side="left")
    flags, pairs = rl.parser().parse_args(words(args, **cell)), read_pairs(args.data)
    shown = [rl.shown(pairs, step, place, flags) for step in range(10) for place in range(flags.rollout_batch)]
    rows = [{"prompt": [{"role": "user", "content": messages(pair)[0]["content"][-1]["text"]}], "image": pair["images"][0],
             "choice": pair["choice"]} for pair in shown]
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.float32)
    barred = [*rl.barred(processor, model.config.get_text_config().vocab_size), processor.tokenizer.eos_token_id]
    size = min(args.trl_rows, made)
    config = GRPOConfig(
        output_dir=f"{args.work}/trl", use_cpu=True, bf16=False, gradient_checkpointing=False, per_device_train_batch_size=size,
        gradient_accumulation_steps=made // size, num_generations=2, max_completion_length=cell["tokens"], max_steps=1_000_000,
        generation_kwargs={"suppress_tokens": barred}, shuffle_dataset=False, learning_rate=1e-6, seed=args.seed, disable_tqdm=True,
        logging_strategy="no", save_strategy="no", report_to="none", log_multimodal=False, dataloader_pin_memory=False)
    GRPOTrainer(model=model, reward_funcs=reward, args=config, train_dataset=Dataset.from_list(rows).cast_column("image", Image()),
                processing_class=processor, callbacks=[Turns()]).train()


CONTENDERS = {"rl.py": rl_py, "floor": floor, "TRL": trl}

# ---------------------------------------------------------------------------------------------------
# The parent: lets them take turns, and writes the tables


class Contender:
    def __init__(self, name, args, python=sys.executable):
        self.name, self.log = name, Path(args.work, f"{name}.log")
        environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        flags = ("data", "model", "work", "micro_tokens", "context", "trl_rows", "seed")
        line = [str(python), __file__, "--contender", name, *(w for k in flags for w in (f"--{k}", str(getattr(args, k))))]
        self.process = subprocess.Popen(line, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=self.log.open("w"))

    def ask(self, line):
        print(line, file=self.process.stdin, flush=True)
        said = self.process.stdout.readline()
        if not said:
            sys.exit(f"{self.name} stopped; the end of what it wrote:\n{self.log.read_text()[-3000:]}")
        return json.loads(said)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def setup_trl(folder):
    """The latest TRL beside the same torch and transformers that the project has."""
    uv, python = Path(sys.executable).with_name("uv"), Path(folder, "bin", "python")
    pins = [p for p in (ROOT / "requirements.txt").read_text().split() if p.startswith(("torch==", "torchvision==", "transformers=="))]
    bundles = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt")
    certs = ["--system-certs"] if any(Path(p).is_file() for p in bundles) else []
    if not python.exists():
        subprocess.run([uv, "venv", "--python", sys.executable, folder], check=True)
    subprocess.run([uv, "pip", "install", *certs, "--upgrade-package", "trl", "--python", python, "trl", "pillow", *pins], check=True)


def take_turns(rivals, cell, rounds):
    """{name: [what it said of each round]}; the round that loads and warms up is not among them."""
    found = {rival.name: [] for rival in rivals}
    for k in range(rounds * (4 if cell[0] <= 64 else 1) + 1):  # short rounds are noisier
        for rival in rivals[k % len(rivals):] + rivals[:k % len(rivals)]:  # nobody is always the first
            said = rival.ask("go" if k else json.dumps(dict(zip(("samples", "tokens"), cell))))
            if (round(said["samples"]), round(said["tokens"])) != (cell[0], cell[0] * cell[1]):
                sys.exit(f"{rival.name} made {said['tokens']} tokens in {said['samples']} samples where {cell[0]} of {cell[1]} were due")
            found[rival.name] += [said] * (k > 0)
            print(f"{cell[0]} x {cell[1]}, round {k}, {rival.name}: {said['seconds']:.2f} s", file=sys.stderr)
    return found


def spread(values):
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def table(head, body):
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (head, ["---"] * len(head), *body))


def report(args, found):
    """found: {(samples, tokens): {contender: [round, ...]}}; a ratio is taken round by round."""
    import torch

    import sft

    seconds = lambda at, name: [r["seconds"] for r in found[at][name]]
    ratio = lambda at, a, b: spread([x / y for x, y in zip(seconds(at, a), seconds(at, b))])
    median = lambda at, name, get: statistics.median(map(get, found[at][name]))
    phases = lambda at, name: ", ".join(f"{k} {v:.2f}" for k in found[at][name][0]["phases"]
                                        if (v := median(at, name, lambda r: r["phases"][k])) >= 0.005)
    cells = [at for at in found if "floor" in found[at]]
    against = lambda at: [spread(seconds(at, "TRL")), ratio(at, "TRL", "rl.py")] if "TRL" in found[at] else ["not measured", "-"]
    speed = [[f"{at[0]} x {at[1]}", spread(seconds(at, "rl.py")), f"{at[0] / median(at, 'rl.py', lambda r: r['seconds']):.1f}",
              spread(seconds(at, "floor")), ratio(at, "rl.py", "floor"), *against(at)] for at in cells]
    syncs = [r for rivals in found.values() for r in rivals["rl.py"]]
    about, others = sft.header(args, 1, torch.device("cpu")), {f"TRL {r['version']}" for at in cells for r in found[at].get("TRL", [])}
    machine = re.search("model name.*: (.*)", Path("/proc/cpuinfo").read_text())
    about = [*(f"{k} {v}" for k, v in about["versions"].items()), *others, f"commit {about['commit'][:7]}{' changed' * about['changed']}",
             f"{os.cpu_count()} cores", machine[1] if machine else platform.machine(), f"seed {args.seed}", time.strftime("%Y-%m-%d")]
    return "\n\n".join([
        "## One RL step",
        f"Seconds a step: median (least-most) of {args.rounds} rounds or more taken in turns, {args.threads} thread(s) each. Goals: "
        f"rl.py at most 1.15 floors, TRL at least 1.5 times as long as rl.py.\n{', '.join(about)}; "
        f"`python bench/step.py {' '.join(sys.argv[1:])}`",
        table(["samples x tokens", "rl.py", "samples a second", "floor", "rl.py / floor", "TRL", "TRL / rl.py"], speed),
        "Phases, median seconds:",
        table(["samples x tokens", "rl.py", "floor"], [[f"{at[0]} x {at[1]}", phases(at, "rl.py"), phases(at, "floor")] for at in cells]),
        f"rl.py's time a sample of {args.tokens[0]} tokens; it must not grow with their number:",
        table(["samples", "milliseconds a sample"], [[at[0], spread([1e3 * s / at[0] for s in seconds(at, "rl.py")])]
                                                     for at in sorted(found) if at[1] == args.tokens[0]]),
        "A weight sync against a copy of the same bytes (goal: at most 3 times as long):",
        table(["bytes", "sync, ms", "copy, ms", "ratio"], [[f"{syncs[0]['bytes']:,}", spread([1e3 * r["phases"]["sync"] for r in syncs]),
              spread([1e3 * r["copy"] for r in syncs]), spread([r["phases"]["sync"] / r["copy"] for r in syncs])]])]) + "\n"


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--model", default=str(ROOT / "toy" / "base"), help="folder of the policy")
    add("--data", default="out/toy/data/test/pairs.jsonl", help="JSONL of pairs; those with one picture are shown")
    add("--samples", type=int, nargs="+", default=[32, 256], help="a rollout")
    add("--tokens", type=int, nargs="+", default=[32, 128], help="a sample, exactly")
    add("--scale", type=int, nargs="*", default=[1024], help="more rollouts, for rl.py alone, at the first of --tokens")
    add("--rounds", type=int, default=3, help="that count, of each contender in each cell; four times as many up to 64 samples")
    add("--micro_tokens", type=int, default=12288, help="rl.py's and the floor's micro-batch, padded tokens")
    add("--trl_rows", type=int, default=32, help="TRL's micro-batch, sequences; a divisor of --samples")
    add("--context", type=int, default=1024, help="longest prompt and sample together, tokens")
    add("--threads", type=int, default=1, help="of each contender")
    add("--trl", default="out/trl/.venv", help="TRL's environment; TRL is left out where there is none")
    add("--setup_trl", metavar="DIR", help="make that environment, or bring it up to date, and stop")
    add("--seed", type=int, default=0, help="of the order of the pairs and of rl.py's samples")
    add("--out", help="file for the tables, in markdown")
    add("--contender", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    add("--work", help=argparse.SUPPRESS)
    return p


def serve(args):
    """A contender's whole life."""
    talk, cell = Talk(), None
    while True:
        try:
            talk.begin() if cell is None else CONTENDERS[args.contender](args, cell, talk)
        except NextCell as asked:
            cell = asked.args[0]


def main():
    args = parser().parse_args()
    if args.contender:
        serve(args)
    if args.setup_trl:
        return setup_trl(args.setup_trl)
    there = Path(args.trl, "bin", "python")
    if not there.exists():
        print(f"TRL is left out: there is no environment in {args.trl}; --setup_trl {args.trl} makes it", file=sys.stderr)
    with tempfile.TemporaryDirectory() as args.work:
        pairs = [pair for pair in read_pairs(args.data) if len(pair["images"]) == 1 and not pair["video"]]
        args.data = f"{args.work}/pairs.jsonl"
        write_pairs(args.data, pairs)
        ours = Contender("rl.py", args)
        rivals = [ours, Contender("floor", args), *([Contender("TRL", args, python=there)] if there.exists() else [])]
        found = {}
        for cell in itertools.product(args.samples, args.tokens):
            found[cell] = take_turns(rivals, cell, args.rounds)
        for n in args.scale:
            found[n, args.tokens[0]] = take_turns([ours], (n, args.tokens[0]), args.rounds)
        for rival in rivals:
            rival.close()
    text = report(args, found)
    print(text)
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(text)


if __name__ == "__main__":
    main()
