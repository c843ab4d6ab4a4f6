"""
Calls a second of annotate.py against an endpoint that takes a second to answer (toy/server.py, in a
process of its own) at concurrency 64. The ideal is concurrency / latency: 64 a second. First pairs
of text alone, then pairs with a picture, each in a run of annotate.py.

The rate is that of the middle: from when 15 % of the calls are answered until 85 % are, since at
the start and at the end fewer than 64 are in flight. The time of the whole run is in the table too.

$ python bench/annotate.py --out out/bench/annotate.md
"""

import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import annotate
from bench.output import made_by, print_and_save
from core.flags import command_line
from core.tables import markdown_table
from toy.source_files import Source

ROOT = Path(__file__).resolve().parent.parent


def write_source(folder, medium, args):
    """A source of pairs, and the answer key of its stand-in annotator."""
    source = Source(Path(folder), "train", "pairs", args.seed)
    rows = []
    for i in range(args.pairs):
        item = source.rng.choice(source.twins(medium=medium))
        _, media = source.save(item, f"pairs/{i}")
        chosen, rejected = source.preference(item, None)
        row = {"prompt": item["question"], "chosen": chosen, "rejected": rejected}
        rows.append(row | media)
    source.json("pairs.jsonl", rows)
    source.json("key.jsonl", source.key)
    return source.folder


@contextlib.contextmanager
def stand_in(key, args):
    """The URL of toy/server.py."""
    words = ["--key", key, "--port", 0, "--latency", args.latency, "--seed", args.seed]
    command = [sys.executable, ROOT / "toy" / "server.py", *words]
    server = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    try:
        yield server.stdout.readline().split()[-1]
    finally:
        server.terminate()
        server.wait()


class Watcher:
    """Inside a with block, notes (time, calls answered) twenty times a second."""

    def __init__(self, url):
        self.page = url.removesuffix("/v1") + "/stats"
        self.seen = []
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.watch)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()

    def watch(self):
        while not self.over.wait(0.05):
            with urllib.request.urlopen(self.page) as page:
                self.seen.append((time.monotonic(), json.load(page)["answered"]))

    @property
    def calls(self):
        _, answered = self.seen[-1]
        return answered

    def first_with(self, share):
        """(time, calls answered) when this share of the calls was answered."""
        for moment, answered in self.seen:
            if answered >= share * self.calls:
                return moment, answered

    def rate_in_the_middle(self):
        start, first = self.first_with(0.15)
        end, last = self.first_with(0.85)
        return (last - first) / (end - start)


def measure(medium, args):
    """(calls, seconds of the run, calls a second in the middle)"""
    with tempfile.TemporaryDirectory() as folder:
        source = write_source(folder, medium, args)
        words = ["--data", f"pairs={source}/pairs.jsonl", "--out", f"{folder}/out"]
        words += ["--model", "toy-stand-in", "--price", "0", "0"]
        words += ["--concurrency", str(args.concurrency)]
        with stand_in(source / "key.jsonl", args) as url:
            start = time.monotonic()
            with Watcher(url) as watcher:
                annotate.main([*words, "--base_url", url])
                seconds = time.monotonic() - start
        return watcher.calls, seconds, watcher.rate_in_the_middle()


def parser():
    p = command_line(__doc__)
    add = p.add_argument
    add("--pairs", type=int, default=800, help="of text, and as many with a picture")
    latency_help = "mean seconds before an answer (uniform, 0.5 to 1.5 of it)"
    add("--latency", type=float, default=1.0, help=latency_help)
    add("--concurrency", type=int, default=64, help="calls at a time")
    add("--seed", type=int, default=0, help="of the pairs and the answers")
    add("--out", help="file for the table, in markdown")
    return p


def main():
    args = parser().parse_args()
    ideal = args.concurrency / args.latency
    rows = []
    for medium in ("text", "image"):
        calls, seconds, rate = measure(medium, args)
        row = [medium, f"{calls:,}", f"{rate:.1f}", f"{rate / ideal:.1%}", f"{seconds:.1f}"]
        rows.append(row)
    head = ["pairs", "calls", "calls a second", "of the ideal", "whole run, s"]
    about = (
        f"annotate.py, {args.concurrency} calls at a time that take {args.latency:g} s each: "
        f"{ideal:.0f} calls a second at best. {made_by('annotate.py')}"
    )
    text = f"## Annotation\n\n{about}\n\n{markdown_table(head, rows).strip()}\n"
    print_and_save(text, args.out)


if __name__ == "__main__":
    main()
