"""
What the project promises about kills, faults and memory, tried in numbers: `make torture`.

Every stage is killed by SIGKILL again and again, half of the times at a random moment and half at a
random one of its file operations (a file opened for writing, renamed or removed), and started
again by the same command until it ends. What it has then written must be what a run writes that
nobody touched. Of a run on two ranks the launcher is killed, or one of the ranks.

    python tests/torture.py                   all of it, more than an hour on two cores
    python tests/torture.py annotate sft      these alone

Each trial leaves its figures in out/torture/NAME.json; results/torture.md is made of all of them.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from victims import Torture, Trial, Victim  # noqa: E402

# of a log's row, what differs from run to run: times, the judge's calls that a continued run makes
# again, the comparison of vLLM and the trainer that it makes once more
CHANGING = ("s_", "seconds", "tokens_per_s", "judge_calls", "judge_retried", "mismatch")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")

# --------------------------------------------------------------------------------------------------
# What a run has written


def json_rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def steps_of(out):
    """The log's rows of steps, without what differs from run to run."""
    rows = []
    for row in json_rows(out / "log.jsonl"):
        if "step" in row:
            rows.append({key: row[key] for key in row if not key.startswith(CHANGING)})
    return rows


def bytes_of(*names):
    """A function of a folder: the bytes of these files in it."""

    def read(out):
        return {name: (out / name).read_bytes() for name in names}

    return read


def training_result(*names):
    def read(out):
        return steps_of(out), bytes_of("model.safetensors", *names)(out)

    return read


def evaluation_result(out):
    results = json.loads((out / "results.json").read_text())
    return sorted((out / "judgements.jsonl").read_text().splitlines()), results["benches"]


# --------------------------------------------------------------------------------------------------
# The trials


class World:
    """The toy world, and the models that the trials need; made once."""

    def __init__(self, folder):
        self.folder = folder
        self.data = folder / "out/toy/data"
        self.rl = folder / "rl"
        if not (folder / "made").exists():
            shutil.rmtree(folder, ignore_errors=True)
            self.make()
            (folder / "made").touch()

    def make(self):
        import torch
        from conftest import make_toy_pairs
        from test_rl import BASE, teach_the_format, toy_pairs

        from core.encoding import load_processor
        from core.pairs import write_pairs
        from core.policy import load_policy, save_policy
        from toy import sources

        sources.main(["--out", str(self.data), "--scale", "0.1"])
        self.rl.mkdir()
        pairs = toy_pairs(self.rl, 24)
        write_pairs(self.rl / "pairs.jsonl", pairs)
        policy, processor = load_policy(BASE, dtype=torch.float32), load_processor(BASE)
        teach_the_format(policy, processor, pairs[2::3])
        save_policy(policy, processor, self.rl / "model")
        write_pairs(self.folder / "pairs.jsonl", make_toy_pairs(self.folder, 40))


@contextlib.contextmanager
def stand_in(world, *words):
    """toy/server.py in a process of its own: its URL."""
    command = [sys.executable, ROOT / "toy/server.py", "--key", world.data / "key.jsonl"]
    command += ["--port", "0", *words]
    command = [str(word) for word in command]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process.stdout.readline().split()[-1]
        finally:
            process.kill()


def counts(url):
    """What the stand-in was asked and has answered."""
    address = url.removesuffix("/v1") + "/stats"
    return json.loads(urllib.request.urlopen(address, timeout=20).read())


ANNOTATED = ("mix", "pairs", "sft", "rl", "dropped")
ANNOTATED = (*[f"{name}.jsonl" for name in ANNOTATED], "report.md", "report.png")


def annotate_words(world, url, out, *words):
    train = world.data / "train"
    data = ["--data", f"RLAIF-V={train / 'RLAIF-V'}", f"pairs={train / 'pairs.jsonl'}"]
    server = ["--base_url", url, "--model", "toy", "--price", "0", "0"]
    return [ROOT / "annotate.py", *data, *server, "--out", out, *words]


def torture_annotate(world, folder, kills=200, concurrency=8):
    replies = Counter()

    def result(out):
        journal = json_rows(out / "journal.jsonl")[1:]
        replies["kept"] += len(journal)
        replies["twice"] += len(journal) - len({(row["id"], row["attempt"]) for row in journal})
        return bytes_of(*ANNOTATED)(out)

    with stand_in(world, "--latency", "0.05") as url:

        def command(out):
            return annotate_words(world, url, out, "--limit", "80", "--concurrency", concurrency)

        what = f"annotate.py, 80 pairs, {concurrency} calls at once"
        trial = Torture("annotate", what, command, result, folder).run(kills)
        requests = counts(url)["requests"]
    again = requests - replies["kept"]
    trial.failed += replies["twice"] > 0 or again > concurrency * trial.kills
    trial.notes.append(
        f"{requests} requests, {replies['kept']} replies kept, {replies['twice']} of them twice; "
        f"{again} requests were under way at a kill and made again (at most {concurrency} a kill)"
    )
    return trial


def bench_words(world):
    test = world.data / "test"
    vl = test / "VL-RewardBench/data/test-00000-of-00001.parquet"
    return ["--bench", f"pairs={test / 'pairs.jsonl'}", f"VL-RewardBench={vl}", "--page", "0"]


def torture_evaluate(world, folder, kills=40):
    with stand_in(world, "--latency", "0.03") as url:

        def command(out):
            words = ["--base_url", url, "--model", "toy", "--samples", "4", "--concurrency", "8"]
            words += ["--limit", "40", "--out", out]
            return [ROOT / "evaluate.py", *bench_words(world), *words]

        what = "evaluate.py, 80 rows, 4 samples, a server"
        return Torture("evaluate", what, command, evaluation_result, folder).run(kills)


def torture_evaluate_vllm(world, folder, kills=10):
    def command(out):
        words = ["--model", world.rl / "model", "--samples", "8", "--limit", "40", "--out", out]
        words += ["--max_new_tokens", "48", "--context", "1024"]
        return [ROOT / "evaluate.py", *bench_words(world), *words]

    what = "evaluate.py, 80 rows, 8 samples, vLLM"
    return Torture("evaluate_vllm", what, command, evaluation_result, folder).run(kills)


def torture_sft(world, folder, kills=20):
    def command(out):
        words = ["--model", ROOT / "toy/base", "--data", world.folder / "pairs.jsonl"]
        words += ["--eval_n", "4", "--max_new_tokens", "8", "--eval_every", "5", "--batch", "4"]
        words += ["--save_every", "2", "--epochs", "4", "--lr", "1e-3", "--workers", "1"]
        words += ["--min_pixels", "3136", "--max_pixels", "12544", "--no-recompute"]
        return [ROOT / "sft.py", *words, "--out", out]

    what = "sft.py, 36 steps, a checkpoint every 2"
    return Torture("sft", what, command, training_result(), folder).run(kills)


def rl_words(world, out, *words, ranks=2):
    launcher = TORCHRUN if ranks == 2 else ()
    words = [*launcher, ROOT / "rl.py", "--model", world.rl / "model", "--out", out, *words]
    words += ["--data", world.rl / "pairs.jsonl", "--rollout_batch", "12", "--train_batch", "6"]
    words += ["--max_new_tokens", "24", "--context", "1024", "--lr", "1e-3", "--zero", "2"]
    return [*words, "--workers", "1", "--no-recompute"]


def torture_rl(world, folder, kills=15):
    def command(out):
        words = ["--engine", "hf", "--judge", "rule", "--steps", "12", "--save_every", "2"]
        return rl_words(world, out, *words)

    what = "rl.py on two ranks, 12 steps, transformers' generate"
    result = training_result("rollouts-0.jsonl", "rollouts-1.jsonl")
    return Torture("rl", what, command, result, folder).run(kills)


def torture_rl_vllm(world, folder, kills=5):
    def command(out):
        words = ["--judge", "rule", "--steps", "8", "--save_every", "2"]
        return rl_words(world, out, *words)

    what = "rl.py on two ranks, 8 steps, vLLM"
    result = training_result("rollouts-0.jsonl", "rollouts-1.jsonl")
    return Torture("rl_vllm", what, command, result, folder).run(kills)


def torture_downstream(world, folder, kills=10):
    from test_downstream import WEAK, Server, the_longer_wins

    reward_model = Server(the_longer_wins)

    def command(out):
        tasks = world.data / "tasks"
        words = ["--model", WEAK, "--data", tasks / "train.jsonl", "--judge_url", reward_model.url]
        words += ["--eval_data", tasks / "test.jsonl", "--eval_n", "8", "--eval_every", "5"]
        words += ["--engine", "hf", "--chunk", "1", "--samples", "4", "--rollout_batch", "6"]
        words += ["--train_batch", "12", "--max_new_tokens", "8", "--context", "512", "--zero", "2"]
        words += ["--lr", "1e-3", "--steps", "10", "--save_every", "2", "--out", out]
        return [ROOT / "downstream_grpo.py", *words]

    what = "downstream_grpo.py, 10 steps, a server"
    result = training_result("rollouts-0.jsonl")
    with contextlib.closing(reward_model):
        return Torture("downstream", what, command, result, folder).run(kills)


# --------------------------------------------------------------------------------------------------
# Faults


FAULTS = ("429_after", "500", "reset", "html", "empty", "truncated")
THIRD = [word for fault in FAULTS for word in (f"--p_{fault}", "0.05")]  # 30 % in all


def torture_faults(world, folder):
    """annotate.py, 64 calls at once, 30 % of which fail in six ways: the unbroken run's bytes."""
    trial = Trial("annotate.py, 64 calls at once, 30 % of them fail")
    began = time.time()
    found = []
    for faults in ([], [*THIRD, "--retry_after", "0.1"]):
        out = folder / f"faults-{bool(faults)}"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        with stand_in(world, "--latency", "0.02", *faults) as url:
            words = annotate_words(world, url, out / "out", "--concurrency", "64")
            victim = Victim(words, out, out=out / "out")
            trial.failed += victim.wait() != 0
            trial.left += victim.left_after_death()
            if faults:
                trial.notes.append(
                    f"{counts(url)['answered']} replies in {counts(url)['requests']} requests"
                )
        found.append(bytes_of(*ANNOTATED)(out / "out"))
    trial.runs = 1
    trial.different = int(found[0] != found[1])
    trial.seconds = time.time() - began
    return trial


def torture_judge(world, folder):
    """rl.py with a judge that fails in 30 % of its calls, dies in the middle and comes back."""
    trial = Trial("rl.py, a judge that fails in 30 % of the calls, dies, and comes back")
    began = time.time()
    words = ["--engine", "hf", "--steps", "12", "--save_every", "4", "--judge_patience", "3"]
    words += ["--judge_timeout", "5"]
    found = []
    for name, faults in (("sound", []), ("faulty", [*THIRD, "--retry_after", "0.1"])):
        out = folder / name
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        status, starts = None, 0
        while status != 0 and starts < 6:
            with stand_in(world, *faults) as url:
                asking = [*words, "--judge_url", url]
                victim = Victim(
                    rl_words(world, out / "out", *asking, ranks=1), out, out=out / "out"
                )
                starts += 1
                log = out / "out" / "log.jsonl"
                while faults and starts == 1 and victim.wait(0.05) is None:
                    if log.exists() and '"step": 5,' in log.read_text():
                        break  # and the server is closed: the judge has died
                else:
                    status = victim.wait()
            status = victim.wait()
            trial.left += victim.left_after_death()
            if status:
                trial.notes.append(f"start {starts} ended with: {error_in(out)}")
        trial.failed += status != 0
        found.append(training_result("rollouts-0.jsonl")(out / "out"))
    trial.runs = 1
    trial.different = int(found[0] != found[1])
    trial.seconds = time.time() - began
    return trial


def error_in(folder):
    printed = (folder / "printed.txt").read_text(errors="replace")
    lines = re.split(r"[\r\n]", printed)  # a progress bar ends in \r
    return next((line for line in lines if "rl.py:" in line), "no error")


# --------------------------------------------------------------------------------------------------
# Memory


def measure_rl(world, folder, steps=300):
    """
    The memory of rl.py and of its workers, with vLLM. It may grow at first: oneDNN keeps what it
    has compiled for each new length of a batch, up to 1,024 of them.
    """
    trial = Trial(f"rl.py, {steps} steps, vLLM: memory")
    began = time.time()
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    words = ["--judge", "rule", "--steps", steps, "--save_every", 50, "--lr", "1e-5"]
    victim = Victim(rl_words(world, out, *words, ranks=1), folder, out=out)
    megabytes = {}
    while victim.wait(0.2) is None:
        done = len(steps_of(out)) if (out / "log.jsonl").exists() else 0
        if done and done % 10 == 0 and done not in megabytes:
            megabytes[done] = sum(memory_of(pid) for pid in victim.living())
    trial.failed += victim.process.returncode != 0
    trial.left += victim.left_after_death()
    trial.runs = 1
    last_third = [megabytes[step] for step in megabytes if step >= 2 * steps // 3]
    trial.different = int(max(last_third) > 1.01 * last_third[0])
    told = [f"{megabytes[step]:.0f} after step {step}" for step in sorted(megabytes)[::5]]
    trial.notes.append(
        f"MB: {', '.join(told)}; the largest in the last third {max(last_third):.0f}"
    )
    trial.seconds = time.time() - began
    return trial


def memory_of(pid):
    """Proportional resident memory in MB: what processes share is counted once."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    return 0.0


def measure_pairs(world, folder, number=200_000):
    """The peak memory of a process that reads so many pairs."""
    trial = Trial(f"read_pairs, {number:,} pairs of the toy world: memory")
    began = time.time()
    folder.mkdir(parents=True, exist_ok=True)
    rows = (world.folder / "pairs.jsonl").read_text().splitlines()
    path = folder / "many.jsonl"
    with path.open("w") as file:
        for copy in range(number):
            row = json.loads(rows[copy % len(rows)]) | {"id": f"pair-{copy}"}
            row["question"] += f" ({copy})"
            file.write(json.dumps(row) + "\n")
    program = "import resource, sys; from core.pairs import read_pairs; "
    program += "pairs = read_pairs(sys.argv[1]); print(len(pairs), "
    program += "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    command = [sys.executable, "-c", program, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    read, megabytes = done.stdout.split()
    trial.runs = 1
    trial.failed = int(int(read) != number)
    trial.different = int(float(megabytes) > 1024)
    trial.notes.append(
        f"{float(megabytes):.0f} MB at most, {path.stat().st_size / 2**20:.0f} MB on disk"
    )
    path.unlink()
    trial.seconds = time.time() - began
    return trial


# --------------------------------------------------------------------------------------------------
# The report


TRIALS = {
    "annotate": torture_annotate,
    "evaluate": torture_evaluate,
    "evaluate_vllm": torture_evaluate_vllm,
    "sft": torture_sft,
    "rl": torture_rl,
    "rl_vllm": torture_rl_vllm,
    "downstream": torture_downstream,
    "faults": torture_faults,
    "judge": torture_judge,
    "rl_memory": measure_rl,
    "pairs_memory": measure_pairs,
}

HEAD = """# Torture

By `make torture` ({commit}, {machine}). How each trial goes stands at the head of
tests/torture.py. A run is good if it has written what the unbroken run wrote: the same bytes, for
training the same log without its times, the same judgements and the same weights.

| trial | kills at random moments | at file operations | runs that ended | of them different | errors | processes left | seconds |
|---|---|---|---|---|---|---|---|
"""  # noqa: E501


def report(folder):
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    text = HEAD.format(commit=commit, machine=machine)
    notes = []
    for name in TRIALS:
        path = folder / f"{name}.json"
        if path.exists():
            trial = Trial(**json.loads(path.read_text()))
            cells = [trial.what, trial.at_moments, trial.at_operations, trial.runs]
            cells += [trial.different, trial.failed, trial.left, round(trial.seconds)]
            text += "| " + " | ".join(map(str, cells)) + " |\n"
            notes += [f"- {trial.what}: {note}" for note in trial.notes]
    return text + "\n" + "\n".join(notes) + "\n"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("trials", nargs="*", help=f"of {', '.join(TRIALS)}; without any: all")
    p.add_argument("--out", default="out/torture", help="folder for what the trials write")
    args = p.parse_args()
    unknown = set(args.trials) - set(TRIALS)
    if unknown:
        p.error(f"no trial of the name {', '.join(unknown)}; expected one of {', '.join(TRIALS)}")
    folder = Path(args.out).resolve()
    world = World(folder / "world")
    good = True
    for name in args.trials or TRIALS:
        trial = TRIALS[name](world, folder / name)
        (folder / f"{name}.json").write_text(json.dumps(asdict(trial)))
        good = good and trial.good
        print(f"{name}: {'good' if trial.good else 'BAD'} {trial}", flush=True)
    Path(ROOT / "results/torture.md").write_text(report(folder))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
