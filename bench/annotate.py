"""
Calls a second of annotate.py against an endpoint that takes a second to answer (toy/server.py, a process of its own) at concurrency
64. The ideal is concurrency / latency: 64 a second. Pairs of text alone, then pairs with a picture, each a run of annotate.py.

The rate is that of the middle: from when 15 % of the calls are answered until 85 % are, since fewer than 64 are under way at the
start and at the end. The time of the whole run is beside it.

$ python bench/annotate.py --out out/bench/annotate.md
"""
import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script: annotate.py is in the folder above
import annotate
from toy.sources import Source


def run(medium, args):
    """(calls, seconds, calls a second in the middle)."""
    with tempfile.TemporaryDirectory() as folder:
        source, rows = Source(Path(folder), "train", "pairs", args.seed), []
        for i in range(args.pairs):
            item = source.rng.choice(source.twins(medium=medium))
            media, (chosen, rejected) = source.save(item, f"pairs/{i}")[1], source.preference(item, None)
            rows.append({"prompt": item["question"], "chosen": chosen, "rejected": rejected, **media})
        source.json("pairs.jsonl", rows)
        source.json("key.jsonl", source.key)
        words = ["--key", source.folder / "key.jsonl", "--port", "0", "--latency", str(args.latency), "--seed", str(args.seed)]
        server = subprocess.Popen([sys.executable, ROOT / "toy" / "server.py", *words], stdout=subprocess.PIPE, text=True)
        url, seen, over = server.stdout.readline().split()[-1], [], threading.Event()

        def watch():
            while not over.wait(0.05):
                with urllib.request.urlopen(url.removesuffix("/v1") + "/stats") as page:
                    seen.append((time.monotonic(), json.load(page)["answered"]))

        watcher, start = threading.Thread(target=watch), time.monotonic()
        watcher.start()
        try:
            annotate.main(["--data", f"pairs={source.folder}/pairs.jsonl", "--base_url", url, "--model", "toy-stand-in",
                           "--price", "0", "0", "--concurrency", str(args.concurrency), "--out", f"{folder}/out"])
        finally:
            seconds = time.monotonic() - start
            over.set()
            watcher.join()
            server.terminate()
            server.wait()
    (a, first), (b, last) = (next(x for x in seen if x[1] >= share * seen[-1][1]) for share in (0.15, 0.85))
    return seen[-1][1], seconds, (last - first) / (b - a)


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--pairs", type=int, default=800, help="of text, and as many with a picture")
    p.add_argument("--latency", type=float, default=1.0, help="mean seconds to an answer (uniform, half to one and a half of it)")
    p.add_argument("--concurrency", type=int, default=64, help="calls at a time")
    p.add_argument("--seed", type=int, default=0, help="of the pairs and the answers")
    p.add_argument("--out", help="file for the table, in markdown")
    return p


def main():
    args = parser().parse_args()
    ideal = args.concurrency / args.latency
    lines = ["## Annotation", "",
             f"annotate.py, {args.concurrency} calls at a time that take {args.latency:g} s each: {ideal:.0f} calls a second at best. "
             f"{time.strftime('%Y-%m-%d')}; `python bench/annotate.py {' '.join(sys.argv[1:])}`", "",
             "| pairs | calls | calls a second | of the ideal | whole run, s |", "|---|---|---|---|---|"]
    for medium in ("text", "image"):
        calls, seconds, rate = run(medium, args)
        lines.append(f"| {medium} | {calls:,} | {rate:.1f} | {rate / ideal:.1%} | {seconds:.1f} |")
    print("\n".join(lines))
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
