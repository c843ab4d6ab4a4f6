"""
rl.py run for real on a tiny Qwen2.5-VL: vLLM and DeepSpeed on two ranks, the comparison of the engines with faults put in, the same
step on any number of ranks, killed and resumed, a judge that dies.

$ python -m pytest tests/test_rl.py
"""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import rl
from annotate import swap, write_pairs
from stable_reinforce import advantages, policy_loss
from test_sft import children, gone
from toy import model as toy_model, pretrain, server, world

ENV = os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
GOOD, SLIP = ("<think>Claims. Response 1 is better.</think><answer>{}</answer>".format(c) for c in (1, 2))


@pytest.fixture(scope="session")
def world_files(tmp_path_factory):
    """(model's folder, pairs' file): a model that knows the format and nothing else, so that rewards differ and gradients exist."""
    folder, rng = tmp_path_factory.mktemp("rl"), random.Random(0)
    model, processor = toy_model.make(None, 0)

    def judgement():
        item, choice = world.twins(rng)[0], rng.choice((1, 2))
        dialogue = pretrain.judging(item, (0, 1), "hasty", rng)
        said = f"<think>Claims. Response {choice} is better.</think><answer>{choice if rng.random() < 0.8 else 3 - choice}</answer>"
        return dialogue | {"turns": [(dialogue["turns"][0][0], said)]}

    pretrain.train(model, processor, lambda done: [judgement() for _ in range(8)], 60, log_every=60)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    from PIL import Image
    pairs = []
    for i in range(24):
        medium = ("image", "image", "image", "video", "text", "image")[i % 6]
        item, files = world.twins(rng, medium=medium)[i % 2], []
        for t in range({"image": 1, "video": 4, "text": 0}[medium]):
            files.append(str(folder / f"{i}-{t}.png"))
            Image.fromarray(world.draw(item["scene"], 0.3, rng)).save(files[-1])
        pairs.append({"id": str(i), "source": "toy", "question": item["question"], "images": files if medium == "image" else [],
                      "video": files if medium == "video" else None, "responses": item["answers"], "choice": item["right"] + 1,
                      "attempts": None, "annotation": None})
    write_pairs(folder / "pairs.jsonl", pairs)
    return folder / "model", folder / "pairs.jsonl"


def command(world_files, *words, ranks=1):
    model, data = world_files
    run = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return [sys.executable, *run, str(ROOT / "rl.py"), "--model", str(model), "--data", str(data), "--judge", "rule", "--rollout_batch", "12",
            "--train_batch", "6", "--max_new_tokens", "24", "--context", "1024", "--lr", "1e-3", "--zero", "2", "--workers", "1", *map(str, words)]


def run(*words, fails=False, **options):
    done = subprocess.run(command(*words, **options), cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=400)
    assert (done.returncode != 0) == fails, (done.stdout + done.stderr)[-4000:]
    return done.stdout + done.stderr


def rows_of(out):
    """The log's rows of steps, without what differs from run to run: seconds."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("s_") and k not in ("seconds", "tokens_per_s")} for row in rows if "reward" in row]


def args(*words):
    return rl.parser().parse_args(["--data", "-", *map(str, words)])


# ---------------------------------------------------------------------------------------------------
# without a model


def test_every_pass_shows_every_pair_once_in_its_own_order():
    pairs = [{"id": i, "responses": ["a", "b"], "choice": 1} for i in range(12)]
    batch = lambda step, a: [rl.shown(pairs, step, place, a) for place in range(4)]
    a = args("--rollout_batch", 4)
    first, second = ([p["id"] for s in range(k, k + 3) for p in batch(s, a)] for k in (0, 3))
    assert sorted(first) == sorted(second) == list(range(12)) and first != second
    both = batch(0, args("--rollout_batch", 4, "--both_orders"))
    assert both[1] == swap(both[0]) and both[3] == swap(both[2])


@pytest.mark.parametrize("words, message", [
    (["--train_batch", 100], "legal: a divisor of"), (["--rollout_batch", 6, "--train_batch", 6], "divides the batch"),
    (["--clip", 0.5], "legal: clip above 1"), (["--sigma", -1], "each 0 for off"), (["--engine", "hf", "--tis", 2], "legal: with --engine vllm"),
    (["--engine", "hf"], "legal: --zero 0, 1 or 2")])
def test_settings_that_cannot_be(words, message):
    with pytest.raises(ValueError, match=message):
        rl.validate(args(*words), 4)


class Said:
    """What a judgement's row is to score()."""

    def __new__(cls, text, choice, finish="stop"):
        return {"text": text, "pair": {"choice": choice}, "finish": finish, "response": [1, 2]}


def rewards(rows, *words):
    a = args("--judge", "rule", *words)
    judge = rl.ConsistencyJudge(a)
    found, parts = rl.score(rows, judge, a)()
    return [round(r, 3) for r in found.tolist()], judge.counts["asked"]


def test_rewards_of_eq_2_and_who_is_asked():
    rows = [Said(GOOD, 1), Said(SLIP, 2), Said(GOOD, 2), Said("none", 1), Said(GOOD, 1, "length")]
    # right and consistent; right and not; wrong (not asked); nothing; cut off: no format
    assert rewards(rows) == ([2.0, 1.5, 0.5, 0.0, 1.5], 3)
    assert rewards(rows, "--reward_form", "external") == ([2.0, 1.5, 1.0, 0.0, 1.5], 4)
    assert rewards(rows, "--consistency_weight", 0)[0] == [1.5, 1.5, 0.5, 0.0, 1.0]
    assert rewards(rows, "--judge", "none")[0] == [1.5, 1.5, 0.5, 0.0, 1.0]


def test_both_orders_earn_more_only_together():
    rows = [Said(GOOD, 1), Said(SLIP, 2), Said(GOOD, 1), Said(GOOD, 2)]
    assert rewards(rows, "--both_orders")[0] == [2.5, 2.0, 2.0, 0.5]


def test_advantages_are_the_papers_and_sigma_0_keeps_all():
    rows = [{"response": [1, 2], "group": i} for i in range(40)]
    r = torch.tensor([2.0] * 39 + [0.0])
    kept = rl.advantages_of(rows, r, args())
    assert kept.sum() == 39 and rows[-1]["adv"].tolist() == [0.0, 0.0]
    assert rows[0]["adv"][0] == advantages(r)[0][0]
    assert rl.advantages_of(rows, r, args("--sigma", 0)).all() and rows[-1]["adv"][0] < -6


def test_k1_stands_in_the_reward_of_each_token():
    rows = [{"response": [1, 2], "group": i, "old": torch.tensor([-1.0, -1.0]), "reference": torch.tensor([-1.0, -3.0 * i])} for i in range(2)]
    rl.advantages_of(rows, torch.tensor([1.0, 1.0]), args("--kl_coef", 0.1, "--kl", "k1"))
    assert rows[0]["adv"][1] > rows[1]["adv"][1]  # the second went away from the reference


# ---------------------------------------------------------------------------------------------------
# with one

CHECK = """
import sys, rl
from toy import model
real = dict(rl.VLLM.__dict__)
def no_head(self, policy):  # it is the embedding's weight, too
    return ((name, p) for name, p in real["weights"](self, policy) if "embed_tokens" not in name)
def blind(self, prompts, *a, **k):
    return real["generate"](self, [p | {"media": ([i.rotate(180) for i in p["media"][0]] if p["media"][0] else None, *p["media"][1:])} for p in prompts], *a, **k)
def one_less(self, prompts, *a, **k):
    return real["generate"](self, [p | {"media": (None, *p["media"][1:])} for p in prompts], *a, **k)
args = rl.parser().parse_args(sys.argv[1:])
rank, world, device = rl.setup(0)
processor = rl.load_processor(args.model)
engine, trainer, _ = rl.prepare(args, processor, rank, world, device)
pairs = rl.read_pairs(args.data)[rank::world]
for name, patch in (("sound", {}), ("no tied head", {"weights": no_head}), ("other pixels", {"generate": blind}), ("no image", {"generate": one_less}),
                    ("no reset", {"reset": lambda self: None})):
    for key, value in (real | patch).items():
        if key in ("weights", "generate", "reset"):
            setattr(rl.VLLM, key, value)
    try:
        same = rl.check(engine, trainer, processor, pairs, args, device, rank)
    except Exception as problem:
        same = f"stopped: {type(problem).__name__}"
    if rank == 0:
        print("RESULT", name, same, flush=True)
sys.stdout.flush()
import os; os._exit(0)  # the engine may be left in any state
"""


@pytest.mark.parametrize("zero, ranks", [(2, 1), (3, 2)])
def test_the_comparison_passes_and_each_fault_fails_it(world_files, tmp_path, zero, ranks):
    """vLLM's log-probabilities against the trainer's: pictures, videos, text; before and after syncs that move every weight."""
    (tmp_path / "check.py").write_text(CHECK)
    words = command(world_files, "--zero", zero, ranks=ranks)
    words[words.index(str(ROOT / "rl.py"))] = str(tmp_path / "check.py")
    done = subprocess.run(words, cwd=ROOT, env=ENV | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=500)
    said = dict(line[7:].rsplit(" ", 1) if "stopped" not in line else line[7:].split(" stopped: ") for line in done.stdout.splitlines() if line.startswith("RESULT"))
    assert said.get("sound") == "True", (done.stdout + done.stderr)[-4000:]
    assert len(said) == 5 and all(v != "True" for k, v in said.items() if k != "sound"), said
    assert said["no tied head"] == "RuntimeError", said  # the sync itself says what is missing


def test_the_gradient_depends_on_the_pixels(world_files):
    """The authors' released update never saw the image: its loss and gradient were the same for any picture."""
    from PIL import Image

    policy, processor = rl.load_policy(world_files[0]), rl.load_processor(world_files[0])
    pair = next(p for p in rl.read_pairs(world_files[1]) if p["images"])
    found = []
    for colour in ("red", "blue"):
        row = rl.prompt(processor, pair)
        path = Path(pair["images"][0]).with_name(f"{colour}.png")
        Image.new("RGB", (56, 56), colour).save(path)
        row = rl.prompt(processor, pair | {"images": [str(path)]})
        row |= {"response": processor.tokenizer(GOOD)["input_ids"], "adv": torch.ones(len(processor.tokenizer(GOOD)["input_ids"]))}
        policy.zero_grad()
        batch = rl.collate([row], 0)
        logp = rl.token_logps(policy, batch)
        policy_loss(logp, logp.detach(), row["adv"][None], batch["mask"])[0].backward()
        found.append({name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None})
    assert any("visual" in name and g.abs().max() > 0 for name, g in found[0].items())
    assert max((a - found[1][name]).abs().max() / a.abs().max().clamp_min(1e-12) for name, a in found[0].items()) > 1e-2


def test_what_does_not_fit_is_dropped_before_the_run_and_counted(world_files, tmp_path, capsys):
    """A prompt too long for vLLM would stop a run after hours."""
    from PIL import Image

    processor = rl.load_processor(world_files[0])
    pairs = rl.read_pairs(world_files[1])
    exact = [len(rl.prompt(processor, pair)["prompt"]) for pair in pairs]
    limit = sorted(exact)[15]
    kept = rl.fitting(pairs, rl.messages, processor, args("--context", limit + 24, "--max_new_tokens", 24), 0, 1)
    assert [pair["id"] for pair in kept] == [pair["id"] for pair, n in zip(pairs, exact) if n <= limit] and 12 < len(kept) < 24
    assert f"{24 - len(kept)} of 24 prompts dropped" in capsys.readouterr().err
    Image.new("RGB", (560, 280)).save(tmp_path / "many.png")
    crowd = dict(pairs[0], images=[str(tmp_path / "many.png")] * 9)
    assert rl.fitting([pairs[0], crowd], rl.messages, processor, args(), 0, 1) == [pairs[0]]
    with pytest.raises(ValueError, match="24 of 24 prompts dropped.*exceed --context 100"):
        rl.fitting(pairs, rl.messages, processor, args("--context", 100, "--max_new_tokens", 24), 0, 1)
    assert "24 of 24 prompts dropped" in run(world_files, "--engine", "hf", "--context", 100, "--out", tmp_path / "out", fails=True)
    (tmp_path / "cut.png").write_bytes((tmp_path / "many.png").read_bytes()[:200])  # its header is whole: only a full look tells
    cut = dict(pairs[0], id="the damaged one", images=[str(tmp_path / "cut.png")])
    with pytest.raises(ValueError, match="the damaged one: a picture cannot be read"):
        rl.Shown([cut], rl.prompt, processor, args())[0, 0]
    (tmp_path / "none.png").write_bytes(b"")
    with pytest.raises(ValueError, match="the damaged one: a picture cannot be read"):
        rl.fitting([dict(cut, images=[str(tmp_path / "none.png")])], rl.messages, processor, args(), 0, 1)


def test_the_same_steps_on_one_rank_and_two_at_any_budget(world_files, tmp_path):
    """Samples by vLLM, rewards, filtered advantages, losses, gradient norms: alike to 1e-5 with 1 rank (ZeRO 0) and 2 (ZeRO 2 and 3)."""
    run(world_files, "--out", tmp_path / "one", "--steps", 2, "--zero", 0)
    run(world_files, "--out", tmp_path / "two", "--steps", 2, "--zero", 2, "--micro_tokens", 400, ranks=2)
    run(world_files, "--out", tmp_path / "three", "--steps", 2, "--zero", 3, "--micro_tokens", 1000, "--workers", 0, ranks=2)
    one, two, three = (rows_of(tmp_path / name) for name in ("one", "two", "three"))
    assert len(one) == 2 and one[0]["grad_norm"] > 1e-4 and 0 < one[0]["result"] < 1
    for other in (two, three):
        for a, b in zip(one, other):
            for key in ("reward", "result", "consistency", "format", "length", "filtered", "loss", "grad_norm", "ratio_max", "entropy", "kl"):
                same = a[key] if a[key] is None else pytest.approx(a[key], rel=1e-4, abs=1e-5)  # None: nobody was right, so none was judged
                assert b[key] == same, key
    assert two[1]["mismatch"] < 1e-4
    assert len((tmp_path / "two" / "rollouts-1.jsonl").read_text().splitlines()) == 12  # 6 a step


def test_killed_and_resumed_it_is_the_unbroken_run(world_files, tmp_path):
    """kill -9 in the middle of a step: the log, the judgements and the weights end bit for bit as if nothing had happened."""
    words = ["--engine", "hf", "--steps", 6, "--save_every", 2, "--samples", 2, "--zero", 2]
    run(world_files, *words, "--out", tmp_path / "whole")
    broken = subprocess.Popen(command(world_files, *words, "--out", tmp_path / "broken"), cwd=ROOT, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log, deadline = tmp_path / "broken" / "log.jsonl", time.time() + 200
    while time.time() < deadline and not (log.exists() and '"step": 3,' in log.read_text()):
        time.sleep(0.02)
    workers = children(broken.pid)
    broken.send_signal(signal.SIGKILL)
    broken.wait()
    gone(workers)
    assert "step-000002" in os.listdir(tmp_path / "broken" / "checkpoints") and not (tmp_path / "broken" / "model.safetensors").exists()
    run(world_files, *words, "--out", tmp_path / "broken")
    assert rows_of(tmp_path / "broken") == rows_of(tmp_path / "whole") and len(rows_of(tmp_path / "whole")) == 6
    for name in ("rollouts-0.jsonl", "model.safetensors"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert (tmp_path / "whole" / "curves.png").stat().st_size > 10_000


def test_a_dead_judge_stops_the_run_with_a_checkpoint_and_no_made_up_reward(world_files, tmp_path):
    words = ["--engine", "hf", "--steps", 2, "--out", tmp_path / "out"]
    said = run(world_files, *words, "--judge", "model", "--judge_url", "http://127.0.0.1:9/v1", "--judge_patience", 2, "--judge_retries", 1, fails=True)
    assert "stopped, with a checkpoint" in said and "has not replied for 2 s" in said
    assert "step-000000" in os.listdir(tmp_path / "out" / "checkpoints") and rows_of(tmp_path / "out") == []
    alive = server.Server(server.parser().parse_args(["--port", "0"]))
    run(world_files, *words, "--judge", "model", "--judge_url", alive.url, "--judge_patience", 5)  # with a judge that lives it goes on
    assert len(rows_of(tmp_path / "out")) == 2 and sum(alive.stats["judge"].values()) > 0
    alive.close()
    assert "another run: --judge rule (there: model)" in run(world_files, *words, fails=True)


@pytest.mark.parametrize("words", [["--kl_coef", "0.1", "--kl", "k1"], ["--kl_coef", "0.1", "--kl", "k3", "--both_orders", "--epochs", "2"]])
def test_penalties_towards_a_reference_run(world_files, tmp_path, words):
    run(world_files, "--engine", "hf", "--steps", 1, "--out", tmp_path / "out", *words)
    row, = rows_of(tmp_path / "out")
    assert row["grad_norm"] > 0 and row["samples"] == 12


def test_every_algorithm_takes_a_step_on_two_ranks_with_unequal_micro_batches(world_files, tmp_path):
    """Mini-batches of 3 samples on two ranks, micro-batches of one: one rank has one more, so the other has an empty one."""
    words = command(world_files, "--engine", "hf", "--steps", 1, "--rollout_batch", 6, "--samples", 2, "--train_batch", 3, "--micro_tokens", 1,
                    "--save_every", 0, tmp_path / "out", ranks=2)
    words[words.index(str(ROOT / "rl.py"))] = str(ROOT / "tests" / "programs" / "every_algorithm.py")
    done = subprocess.run(words, cwd=ROOT, env=ENV | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=500)
    said = [line.split(" ", 2) for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert [name for _, name, _ in said] == list(rl.ALGORITHMS), (done.stdout + done.stderr)[-4000:]
    for _, name, norms in said:
        norm, = json.loads(norms)
        assert 0 < norm < 1000, name
