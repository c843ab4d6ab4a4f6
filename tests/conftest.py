"""What several test files share: a small toy world, servers, processes, pictures."""

import contextlib
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from bad_input import bad_files, bad_stage  # noqa: F401 (fixtures)

from core.pairs import Pair, write_pairs
from toy import model as toy_model
from toy import server, world
from toy import sources as toy_sources

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    """No test may send the key of whoever runs it."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture(scope="module")
def one_rank():
    """A process group of this process alone, which leaves nothing behind for other processes."""
    import torch.distributed as dist

    from core.training import start_ranks

    before = dict(os.environ)
    start_ranks(0)
    yield
    dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def toy_world(tmp_path_factory):
    """A folder in which the paths of the presets toy/*.args lead to a small toy world."""
    folder = tmp_path_factory.mktemp("toy_world")
    toy_sources.main(["--out", str(folder / "out/toy/data"), "--scale", "0.1"])
    return folder


@pytest.fixture(scope="session")
def toy(toy_world):
    """The folder of the small toy world's benchmarks."""
    return toy_world / "out/toy/data/test"


def make_toy_pairs(folder, n, seed=0, media=("image", "image", "video", "text", "images")):
    """n annotated pairs of the toy world, of each kind in turn, with their pictures in `folder`."""
    rng = random.Random(seed)
    kinds = [media[i % len(media)] for i in range(n)]
    return [make_toy_pair(folder, f"{seed}-{i}", kind, rng) for i, kind in enumerate(kinds)]


def make_toy_pair(folder, name, kind, rng):
    from PIL import Image

    item = rng.choice(world.twins(rng, medium="image" if kind == "images" else kind))
    pictures = []
    for k in range({"image": 1, "images": 2, "video": 3, "text": 0}[kind]):
        pictures.append(str(Path(folder, f"{name}-{k}.png")))
        Image.fromarray(world.draw(item["scene"], item["difficulty"], rng)).save(pictures[-1])
    order = rng.sample((0, 1), 2)
    choice = order.index(item["right"]) + 1
    facts = world.describe(item["scene"])
    return Pair(
        id=f"pair-{name}",
        source="toy",
        question=item["question"],
        images=[] if kind == "video" else pictures,
        video=pictures if kind == "video" else None,
        responses=[item["answers"][k] for k in order],
        choice=choice,
        attempts=1,
        annotation=world.judgement(item, order, choice, rng.choice(world.MANNERS)),
        critiques=[f"{facts}. {'Right' if k == item['right'] else 'Wrong'}." for k in order],
    )


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory):
    """A folder with base/ (a random toy model), pairs.jsonl (40) and val.jsonl (6)."""
    folder = tmp_path_factory.mktemp("toy")
    toy_model.make(folder / "base", 0)
    write_pairs(folder / "pairs.jsonl", make_toy_pairs(folder, 40))
    write_pairs(folder / "val.jsonl", make_toy_pairs(folder, 6, seed=1))
    return folder


# ------------------------------------------------------------------------------------------------
# Servers


@contextlib.contextmanager
def annotator(*words):
    """The stand-in for annotator and judge, toy/server.py, in this process."""
    stand_in = server.Server(server.parser().parse_args(["--port", "0", *map(str, words)]))
    try:
        yield stand_in
    finally:
        stand_in.close()


@pytest.fixture
def stand_in():
    """start(flags) -> the stand-in's server; all are closed at the end."""
    with contextlib.ExitStack() as started:
        yield lambda *words: started.enter_context(annotator(*words))


class QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        """A client that gave up is no news."""


@contextlib.contextmanager
def http_server(respond):
    """The URL of a server on which respond(handler, request) answers each chat request."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            respond(self, request)

        def do_OPTIONS(self):
            """Before a browser lets a page ask another server, it asks whether it may."""
            allowed = {"Access_Control_Allow_Origin": "*", "Access_Control_Allow_Headers": "*"}
            send(self, b"", **allowed)

        def log_message(self, *_):
            pass

    with QuietServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def send(handler, body, status=200, **headers):
    """A whole response; header names are written with _ for -."""
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    handler.send_response(status)
    for name, value in ({"Content_Length": len(body)} | headers).items():
        handler.send_header(name.replace("_", "-"), str(value))
    handler.end_headers()
    handler.wfile.write(body)


def completion(text, **more):
    """What a chat completion is, as far as anything here reads it."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"content": text}}
    return {"choices": [choice | more]}


def unused_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@contextlib.contextmanager
def vllm_server(model, log, name, *words):
    """The URL of a vLLM server in a process of its own; `name` is what requests call the model."""
    port = unused_port()
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(model), "--served-model-name", name, "--dtype", "float32"),
        *("--enforce-eager", "--host", "127.0.0.1", "--port", str(port)),
        *map(str, words),
    ]
    limits = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=os.environ | limits, stdout=file, stderr=file, start_new_session=True
        )
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until_healthy(url, process, log):
    for _ in range(600):
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.5)
    raise TimeoutError(log.read_text()[-3000:])


# ------------------------------------------------------------------------------------------------
# Processes


def children_of(pid):
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return found.stdout.split()


def wait_until_gone(pids, seconds=4):
    """Fail if one of the processes lives on: it would keep its memory for ever."""
    assert pids
    deadline = time.time() + seconds
    while living := [pid for pid in pids if is_alive(pid)]:
        assert time.time() < deadline, f"{living} live on after their rank was killed"
        time.sleep(0.1)


def is_alive(pid):
    """Whether a process is there and not just waiting for its parent to take note of its end."""
    found = subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True, text=True)
    return found.stdout.strip("Z\n ") != ""


def killed_at(number, folder, action):
    """
    Run action() in a process of its own that dies, as by SIGKILL, just before its number-th file
    operation in `folder`. Return False if there were fewer.
    """
    pid = os.fork()
    if pid == 0:
        kill_this_process_at(number, folder)
        try:
            action()
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, KILLED)
    return code == KILLED


KILLED = 9


def kill_this_process_at(number, folder):
    left = number

    def hook(event, details):
        nonlocal left
        changes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
        if changes or (event == "open" and str(details[0]).startswith(str(folder))):
            left -= 1
            if left == 0:
                os._exit(KILLED)

    sys.addaudithook(hook)


# ------------------------------------------------------------------------------------------------
# Files


def write_rows(path, rows):
    """A JSONL file, in a folder that is made; its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def png(size=(8, 8), colour="red", kind="PNG"):
    """The bytes of a picture."""
    from PIL import Image

    data = io.BytesIO()
    Image.new("RGB", size, colour).save(data, kind)
    return data.getvalue()
