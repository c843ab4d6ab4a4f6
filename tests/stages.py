"""
Whole runs of the stages that train, on one rank or two, in processes of their own.

Python needs ten seconds to import what they import. So they are forked from a process that has
done so once and has started no thread.
"""

import importlib
import multiprocessing
import os
import sys
import time

from conftest import ROOT, children_of, read_rows, unused_port, wait_until_gone

FORKSERVER = multiprocessing.get_context("forkserver")
IMPORTED = ["core", "torch", "transformers", "deepspeed", "vllm", "matplotlib.pyplot"]
IMPORTED += ["sft", "rl", "downstream_grpo"]
FORKSERVER.set_forkserver_preload(IMPORTED)
# what differs from run to run; a run that is continued asks its judge again
CHANGING = ("seconds", "tokens_per_s", "judge_calls")


def start(stage, *words, printed, ranks=1, before=None):
    """
    Start a stage, or another script by the name of its module; return the processes of its ranks.
    They print into a file. before: a function of a test that each calls first.
    """
    words = [str(word) for word in words]
    environment = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
    environment["MASTER_PORT"] = unused_port()
    processes = []
    for rank in range(ranks):
        of_rank = environment | {"RANK": rank, "LOCAL_RANK": rank}
        settings = {name: str(value) for name, value in of_rank.items()} if ranks > 1 else {}
        arguments = (stage, words, settings, str(printed), before)
        process = FORKSERVER.Process(target=run_rank, args=arguments)
        process.start()
        processes.append(process)
    return processes


def run_rank(stage, words, environment, printed, before):
    import torch

    from core.flags import run_stage

    os.chdir(ROOT)
    os.setsid()  # like a process of its own, it does not hear the Ctrl-C of who runs the tests
    os.environ |= environment | {"OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # so that data workers start fast
    file = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = [f"{stage}.py", *words]
    if before:
        before()
    try:
        run_stage(f"{stage}.py", importlib.import_module(stage).main)
    except SystemExit as end:
        print(end.code or "", flush=True)
        os._exit(1 if end.code else 0)


def run(stage, *words, out, ranks=1, fails=False, kill_after_step=None):
    """Run a stage to its end, or kill it after a step; return what it has printed."""
    printed = out.with_name(f"{out.name}-printed.txt")
    printed.unlink(missing_ok=True)
    processes = start(stage, "--out", out, *words, printed=printed, ranks=ranks)
    if kill_after_step:
        wait_for_step(kill_after_step, out, processes[0])
        kill(processes[0])
        return printed.read_text()
    deadline = time.time() + 400
    for process in processes:
        process.join(max(1, deadline - time.time()))
    ended = {process.exitcode for process in processes}
    for process in processes:
        process.kill()
    text = printed.read_text(errors="replace")
    assert ended == ({1} if fails else {0}), f"{ended}: {text[-4000:]}"
    noise = [] if fails else noise_in(text, out)
    assert not noise, noise
    return text


def noise_in(text, out):
    """Lines that are not ours: in a run that is well, libraries have nothing to say."""
    ours = ("step ", "WARNING: ", "note: ", f"{out}: ")
    return [line for line in text.splitlines() if line and not line.startswith(ours)]


def wait_for_step(step, out, process):
    log, deadline = out / "log.jsonl", time.time() + 300
    while not (log.exists() and f'"step": {step},' in log.read_text()):
        assert time.time() < deadline and process.is_alive()
        time.sleep(0.02)


def kill(process):
    """kill -9, in the middle of a step; its data workers die, too."""
    workers = children_of(process.pid)
    process.kill()
    process.join()
    if workers:
        wait_until_gone(workers)


def steps_of(out):
    """The log's rows of steps, without what differs from run to run."""
    rows = []
    for row in read_rows(out / "log.jsonl"):
        if "step" in row:
            kept = [key for key in row if key not in CHANGING and not key.startswith("s_")]
            rows.append({key: row[key] for key in kept})
    return rows
