"""Commands that are killed by SIGKILL and started again, for tests/torture.py."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ROOT / "tests" / "programs"


@dataclass
class Trial:
    """What a stage has gone through, a row of results/torture.md."""

    what: str
    at_moments: int = 0  # kills at a random moment
    at_operations: int = 0  # kills at a random file operation
    runs: int = 0  # that ended, after however many kills
    different: int = 0  # of them: what they wrote was not what the unbroken run wrote
    failed: int = 0  # starts that ended with an error
    left: int = 0  # processes that outlived a killed run by five seconds
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def kills(self):
        return self.at_moments + self.at_operations

    @property
    def good(self):
        return not (self.different or self.failed or self.left)


# --------------------------------------------------------------------------------------------------
# Processes that are killed


class Victim:
    """A command in processes of its own, which carry a mark in their environment."""

    def __init__(self, words, folder, cwd=ROOT, out=None, die_at=0):
        self.mark = f"{os.getpid()}-{time.time_ns()}"
        self.counter = folder / "operations"
        self.counter.unlink(missing_ok=True)
        self.printed = (folder / "printed.txt").open("wb")
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(PROGRAMS / "die_at_file_operation"), str(ROOT)]),
            "FILE_OPERATIONS_UNDER": str(out),
            "FILE_OPERATIONS_COUNTER": str(self.counter),
            "FILE_OPERATIONS_DIE_AT": str(die_at),
            "TORTURE_MARK": self.mark,
        }
        self.process = subprocess.Popen(
            [sys.executable, *map(str, words)],
            cwd=cwd,
            env=environment,
            stdout=self.printed,
            stderr=self.printed,
        )

    def operations(self):
        return self.counter.stat().st_size if self.counter.exists() else 0

    def wait(self, seconds=None):
        """The exit status, or None if it is still running after so many seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(seconds)
        return None

    def living(self):
        """The processes of this command that are there and not just waiting to be noticed."""
        mark = f"TORTURE_MARK={self.mark}".encode()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
        return found

    def kill(self, pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def left_after_death(self, seconds=5):
        """How many of its processes live on; they are then killed, too."""
        self.process.wait()
        deadline = time.time() + seconds
        while (left := self.living()) and time.time() < deadline:
            time.sleep(0.1)
        for pid in left:
            self.kill(pid)
        self.printed.close()
        return len(left)

    def last_words(self):
        return Path(self.printed.name).read_text(errors="replace")[-3000:]


def ranks_of(victim):
    """The processes that torchrun has started."""
    found = subprocess.run(["pgrep", "-P", str(victim.process.pid)], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


class Torture:
    """Kill command(out) again and again, start it until it ends, and compare result(out)."""

    IN_A_ROW = 10  # kills without an end: then the command is left alone once

    def __init__(self, name, what, command, result, folder, cwd=ROOT):
        self.name = name
        self.command = command
        self.result = result
        self.folder = folder
        self.cwd = cwd
        self.rng = random.Random(name)
        self.trial = Trial(what)

    def run(self, kills):
        began = time.time()
        trial = self.trial
        expected = self.unbroken_run()
        out = self.folder / "killed"
        while trial.kills < kills:
            shutil.rmtree(out, ignore_errors=True)
            self.run_under_kills(out, kills)
            trial.runs += 1
            trial.different += self.result(out) != expected
            print(f"{self.name}: {trial}", flush=True)
        trial.seconds = time.time() - began
        return trial

    def unbroken_run(self):
        """What it writes. How long it takes, and with how many file operations, is kept."""
        out = self.folder / "whole"
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(out, ignore_errors=True)
        start = time.time()
        victim = Victim(self.command(out), self.folder, self.cwd, out)
        if victim.wait():
            raise SystemExit(f"{self.name}: the unbroken run failed: {victim.last_words()}")
        self.duration = time.time() - start
        self.operations = victim.operations()
        print(f"{self.name}: {self.duration:.1f} s, {self.operations} file operations", flush=True)
        return self.result(out)

    def run_under_kills(self, out, kills):
        ended = False
        starts = 0
        while not ended:
            if self.trial.kills >= kills or starts == self.IN_A_ROW:
                ended = self.start(out)
            elif self.rng.random() < 0.5:
                # the first ones more often: a run that was killed before has fewer of them to do
                ended = self.start(out, die_at=int(self.operations ** self.rng.random()))
            else:
                ended = self.start(out, seconds=self.rng.uniform(0.1, 0.9) * self.duration)
            starts += 1

    def start(self, out, die_at=0, seconds=None):
        """
        One start, that is killed at a file operation, after some seconds, or not at all. Return
        whether it ended by itself.
        """
        trial, words = self.trial, self.command(out)
        victim = Victim(words, self.folder, self.cwd, out, die_at)
        status = victim.wait(seconds)
        if status is None:
            ranks = ranks_of(victim) if "--standalone" in words else []
            victim.kill(self.rng.choice([victim.process.pid, *ranks]))
            trial.at_moments += 1
        elif status and die_at and victim.operations() >= die_at:
            trial.at_operations += 1
        elif status:
            trial.failed += 1
            print(victim.last_words(), flush=True)
            if trial.failed == 3:
                raise SystemExit(f"{self.name}: three starts have failed")
        trial.left += victim.left_after_death()
        return status == 0
