"""
Calls a second of annotate.py against an endpoint that takes a second to answer (toy/server.py, in a process of its own), at
concurrency 64. The ideal is concurrency / latency: 64 calls a second. Pairs of text and pairs with a picture, each a run of
annotate.py on --pairs pairs of the toy world; a pair is asked for until its verdict is right, three times at most.

The rate is that of the middle: from the moment when 15 % of the calls are answered until 85 % are, since at the start and at the
end fewer than 64 are under way. The whole run is beside it.

$ python bench/annotate.py --out out/bench/annotate.md
"""
import argparse
import io
import json
import random
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
from toy import world


def write(folder, medium, n, rng):
    """pairs.jsonl as people have it, with its pictures, and the stand-in's key.jsonl."""
    from PIL import Image

    rows, keys = [], []
    for i in range(n):
        item, pictures = rng.choice(world.twins(rng, medium=medium)), []
        if medium == "image":
            data = io.BytesIO()
            Image.fromarray(world.draw(item["scene"], item["difficulty"], rng)).save(data, "PNG")
            pictures.append(data.getvalue())
            Path(folder, f"{i}.png").write_bytes(data.getvalue())
        chosen = item["answers"][item["right"]]
        rejected = rng.choice([answer for answer in item["answers"] if answer != chosen])
        rows.append({"prompt": item["question"], "chosen": chosen, "rejected": rejected, "image": f"{i}.png" if pictures else None})
        keys.append({"key": world.key_of(item["question"], pictures), **item})
    for name, table in (("pairs.jsonl", rows), ("key.jsonl", keys)):
        Path(folder, name).write_text("".join(json.dumps(row) + "\n" for row in table))


def run(medium, args):
    """(calls, seconds, calls a second in the middle)."""
    with tempfile.TemporaryDirectory() as folder:
        write(folder, medium, args.pairs, random.Random(f"{args.seed} {medium}"))
        words = ["--key", f"{folder}/key.jsonl", "--port", "0", "--latency", str(args.latency), "--seed", str(args.seed)]
        server = subprocess.Popen([sys.executable, ROOT / "toy" / "server.py", *words], stdout=subprocess.PIPE, text=True)
        url = server.stdout.readline().split()[-1]
        seen, over, start = [], threading.Event(), time.monotonic()

        def watch():
            while not over.wait(0.05):
                with urllib.request.urlopen(url.removesuffix("/v1") + "/stats") as page:
                    seen.append((time.monotonic(), json.load(page)["answered"]))

        watcher = threading.Thread(target=watch)
        watcher.start()
        annotate.main(["--data", f"pairs={folder}/pairs.jsonl", "--base_url", url, "--model", "toy-stand-in", "--price", "0", "0",
                       "--concurrency", str(args.concurrency), "--out", f"{folder}/out"])
        seconds = time.monotonic() - start
        over.set()
        watcher.join()
        server.terminate()
        server.wait()
    calls = seen[-1][1]
    (a, first), (b, last) = (next(x for x in seen if x[1] >= share * calls) for share in (0.15, 0.85))
    return calls, seconds, (last - first) / (b - a)


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
    lines = ["## Annotation", f"annotate.py, {args.concurrency} calls at a time, {args.latency:g} s each on average: {ideal:.0f} calls a second at best. "
             f"Seed {args.seed}; {time.strftime('%Y-%m-%d')}; `python bench/annotate.py {' '.join(sys.argv[1:])}`", ""]
    lines += ["| pairs | calls | calls a second | of the ideal | whole run, s |", "|---|---|---|---|---|"]
    for medium in ("text", "image"):
        calls, seconds, rate = run(medium, args)
        lines.append(f"| {medium} | {calls:,} | {rate:.1f} | {rate / ideal:.1%} | {seconds:.1f} |")
    text = "\n".join([lines[0], "", *lines[1:]]) + "\n"
    print(text)
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(text)


if __name__ == "__main__":
    main()
