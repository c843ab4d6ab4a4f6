"""
sft.py run for real on random toy models: DeepSpeed on two ranks by torchrun, data workers, kill -9, vLLM. What the scripts
compute is held against transformers' own loss, against all logits at once, and against a plain loop of torch.
"""
import json
import math
import multiprocessing
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
import sft
from annotate import messages, read_pairs, write_pairs
from stable_reinforce import parse
from toy import model as toy_model, world

SIZES = ["--min_pixels", "3136", "--max_pixels", "12544"]


def make_pairs(folder, n, seed=0, media=("image", "image", "video", "text", "images")):
    """n pairs of the toy world, of every kind in turn, with pictures on disk."""
    from PIL import Image

    rng, pairs = random.Random(seed), []
    for i in range(n):
        kind = media[i % len(media)]
        item = rng.choice(world.twins(rng, medium="image" if kind == "images" else kind))
        files = []
        for k in range({"image": 1, "images": 2, "video": 3, "text": 0}[kind]):
            files.append(str(Path(folder, f"{seed}-{i}-{k}.png")))
            Image.fromarray(world.draw(item["scene"], item["difficulty"], rng)).save(files[-1])
        shown = rng.sample((0, 1), 2)
        choice = shown.index(item["right"]) + 1
        pairs.append({
            "id": f"pair-{seed}-{i}", "source": "toy", "question": item["question"], "images": [] if kind == "video" else files,
            "video": files if kind == "video" else None, "responses": [item["answers"][k] for k in shown], "choice": choice, "attempts": 1,
            "annotation": world.judgement(item, shown, choice, rng.choice(world.MANNERS)),
            "critiques": [f"{world.describe(item['scene'])}. {'Right' if k == item['right'] else 'Wrong'}." for k in shown]})
    return pairs


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with base/ (a random toy model), pairs.jsonl and val.jsonl."""
    import deepspeed  # noqa: here once, so that the processes that launch() forks need not

    folder = tmp_path_factory.mktemp("sft")
    toy_model.make(folder / "base", 0)
    write_pairs(folder / "pairs.jsonl", make_pairs(folder, 40))
    write_pairs(folder / "val.jsonl", make_pairs(folder, 6, seed=1))
    return folder


@pytest.fixture(scope="module")
def loaded(place):
    policy = sft.load_policy(place / "base", dtype=torch.float32)
    processor = sft.load_processor(place / "base", 3136, 12544)
    return policy.eval(), processor


@pytest.fixture(scope="module")
def rows(place, loaded):
    """Ten rows: images, videos, texts, two images."""
    return [sft.rows_of(pair, loaded[1], None, 4096)[0] for pair in read_pairs(place / "pairs.jsonl", 10)]


def in_a_process(pipe, words, environment):
    """What launch() forks: sft.main() with these words; the error, if any, goes into the pipe."""
    os.environ |= environment
    multiprocessing.set_start_method("fork", force=True)  # of the workers that read pictures: else they begin from nothing, each time
    out = os.open(os.environ.get("SFT_OUTPUT", os.devnull), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.argv = ["sft.py", *map(str, words)]
    try:
        sft.main()
        pipe.send("")
    except BaseException as problem:
        pipe.send(f"{type(problem).__name__}: {problem}")
        raise


def children(pid):
    return subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()


def gone(pids, seconds=4):
    """Those that nobody waits for any more would keep their memory for ever."""
    assert pids
    deadline = time.time() + seconds
    while left := [pid for pid in pids if subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True, text=True).stdout.strip("Z\n ")]:
        assert time.time() < deadline, f"{left} live on after their rank was killed"
        time.sleep(0.1)


# Forked from a server that has imported what is slow and started nothing: a fork of pytest's own process, with the threads that other
# tests have left in it, dies.
CLEAN = multiprocessing.get_context("forkserver")
CLEAN.set_forkserver_preload(["torch", "transformers", "sft"])


def launch(*words, wait=True, **environment):
    """Run the script; returns the error's text, "" if there is none."""
    here, there = multiprocessing.Pipe()
    process = CLEAN.Process(target=in_a_process, args=(there, words, environment))
    process.start()
    there.close()
    if not wait:
        return process
    try:
        return here.recv()
    except EOFError:
        return "died"
    finally:
        process.join(60)


def log_of(folder):
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------
# Log-probabilities


def reference(policy, batch, entropy=False):
    """The same through all logits at once, (N,)."""
    hidden = policy.model.base_model(**{k: batch[k] for k in sft.INPUTS if k in batch}, use_cache=False).last_hidden_state
    logp = torch.nn.functional.linear(hidden.flatten(0, 1)[batch["at"]], policy.model.lm_head.weight).log_softmax(-1)
    return logp.gather(1, batch["tokens"][:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def test_the_loss_is_transformers_own(loaded, rows):
    from transformers import AutoModelForImageTextToText

    rows = [row for row in rows if "pixel_values_videos" not in row]  # see text_after_video
    batch = sft.collate(rows, 0)
    labels = torch.full_like(batch["input_ids"], -100)
    for i, row in enumerate(rows):
        labels[i, len(row["prompt"]):sft.length(row)] = torch.tensor(row["response"])
    own = AutoModelForImageTextToText.from_pretrained(loaded[0].model.name_or_path, dtype=torch.float32).eval()
    with torch.no_grad():
        mask = torch.arange(labels.shape[1]) < torch.tensor([[sft.length(row)] for row in rows])
        expected = own(**{k: batch[k] for k in sft.INPUTS if k in batch}, attention_mask=mask.long(), labels=labels).loss
        text, pair, _ = sft.losses(loaded[0], batch)
    torch.testing.assert_close(text / batch["mask"].sum(), expected, atol=1e-6, rtol=1e-6)
    assert pair == 0


def test_chunks_give_the_log_probabilities_the_entropy_and_the_gradient_of_all_logits(loaded, rows, monkeypatch):
    monkeypatch.setattr(sft.TokenLogps, "CHUNK", 20 * 704)  # 20 tokens of the 250 or so at once
    policy, batch = loaded[0], sft.collate(rows, 0)
    weight = torch.rand(batch["mask"].shape, generator=torch.Generator().manual_seed(0)) - 0.5  # both signs, as advantages have
    gradients = []
    for ours in (True, False):
        policy.zero_grad()
        if ours:
            logp, entropy = sft.token_logps(policy, batch, entropy=True)
            assert logp.dtype == entropy.dtype == torch.float32 and logp[~batch["mask"]].abs().sum() == 0 and not entropy.requires_grad
            logp, entropy = logp[batch["mask"]], entropy[batch["mask"]]
        else:
            logp, entropy = reference(policy, batch)
        (logp * weight[batch["mask"]]).sum().backward()
        gradients.append([logp.detach(), entropy.detach(), *(p.grad.clone() for p in policy.model.parameters())])
    assert len(gradients[0][0]) > 200
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_logits_of_any_size_have_log_probabilities():
    """The softmax is shifted by its maximum: exp(1e4) overflows."""
    hidden = torch.tensor([[1e4, 0.0], [-1e4, 0.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    logp, entropy = sft.TokenLogps.apply(hidden, weight, torch.tensor([0, 0]), True)
    logp.sum().backward()
    assert logp.tolist() == [0.0, -1e4] and entropy.tolist() == [0.0, 0.0]
    assert hidden.grad.tolist() == [[0.0, 0.0], [1.0, -1.0]] and weight.grad.isfinite().all()


def test_a_reward_head_reads_the_last_token(place):
    """Two responses that differ in their last token alone: read at the token before, they would have one score."""
    policy, processor = sft.load_policy(place / "base", "scalar"), sft.load_processor(place / "base")
    row = sft.encode(processor, messages(read_pairs(place / "pairs.jsonl", 1)[0]), "the answer is 1")
    other = row | {"response": [*row["response"][:-1], row["response"][0]]}
    scores = policy(sft.collate([row, other, row], processor.tokenizer.pad_token_id))["score"]
    assert scores[0] == scores[2] and (scores[0] - scores[1]).abs() > 1e-4


def test_the_tower_looks_once_at_a_picture_that_several_samples_have(loaded, rows):
    """Same log-probabilities and gradient as with a copy of the pictures for every sample."""
    policy, looked, results = loaded[0], [], []
    hook = policy.model.base_model.visual.register_forward_pre_hook(lambda _, given: looked.append(len(given[0])))
    shared = [row | {"response": row["response"][:n]} for row in rows for n in (9, 5, 7)]
    copied = [{k: v.copy() if k in sft.MEDIA else v for k, v in row.items()} for row in shared]
    for some in (shared, copied):
        policy.zero_grad()
        logp = sft.token_logps(policy, sft.collate(some, 0))
        (logp * torch.arange(len(some))[:, None]).sum().backward()
        results.append([logp.detach(), *(p.grad.clone() for p in policy.model.parameters())])
    hook.remove()
    assert 3 * looked[0] == looked[1] > 0
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_attention_is_causal_and_has_no_mask_though_rows_are_padded(loaded, rows, monkeypatch):
    """With a mask, torch's kernels read all of T x T, and the fastest one of a GPU takes none."""
    seen, attend = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v, attn_mask=None, is_causal=False, **more: (
        seen.append((q.shape[0] == len(rows), attn_mask, is_causal)), attend(q, k, v, attn_mask=attn_mask, is_causal=is_causal, **more))[1])
    assert len({sft.length(row) for row in rows}) > 1
    sft.token_logps(loaded[0], sft.collate(rows, 0))
    language = [causal for text, mask, causal in seen if text]
    assert language and all(language) and all(mask is None for _, mask, _ in seen)


def test_the_product_is_the_matrix_product(loaded):
    """Values and gradients, with a bias and without, with each input frozen; every linear layer of a policy makes it."""
    draw = lambda *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
    up = draw(3, 5, 6)
    for given in ((draw(3, 5, 8), draw(6, 8), draw(6)), (draw(3, 5, 8), draw(6, 8), None)):
        for frozen in range(3):
            inputs = [v if v is None or i == frozen else v.clone().requires_grad_() for i, v in enumerate(given)]
            leaves = [v for v in inputs if v is not None and v.requires_grad]
            ours, torchs = sft.Product.apply(*inputs), torch.nn.functional.linear(*inputs)
            torch.testing.assert_close(ours, torchs, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(torch.autograd.grad(ours, leaves, up), torch.autograd.grad(torchs, leaves, up), atol=1e-5, rtol=1e-5)
    kinds = {type(module) for module in loaded[0].model.modules() if isinstance(module, torch.nn.Linear)}
    assert kinds == {sft.Linear, sft.Head}


def test_a_second_backward_gives_the_gradient_again():
    """The first one uses up the softmax that had waited for it."""
    hidden, weight = (torch.randn(n, 8, generator=torch.Generator().manual_seed(n), requires_grad=True) for n in (5, 20))
    logp, _ = sft.TokenLogps.apply(hidden, weight, torch.arange(5), False)
    first, second = (torch.autograd.grad(logp.sum(), (hidden, weight), retain_graph=True) for _ in range(2))
    torch.testing.assert_close(first, second)
    expected = torch.autograd.grad((hidden @ weight.T).log_softmax(-1).diagonal().sum(), (hidden, weight))
    torch.testing.assert_close(first, expected)


def test_freed_memory_is_not_given_back_to_the_system():
    """Else its pages would be cleared again for the next tensors: 585,000 page faults in twenty rounds."""
    rounds = """if True:
        import resource, torch, sft
        sft.keep_memory()
        for n in range(22):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt if n == 2 else before if n else 0
            some = [torch.ones(7_500_000) for _ in range(4)]  # 30 MB each
            del some
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""
    done = subprocess.run([sys.executable, "-c", rounds], cwd=ROOT, capture_output=True, text=True)
    assert int(done.stdout) < 100_000, done


def test_a_row_has_the_same_log_probabilities_alone_and_in_any_company(loaded, rows):
    """Text-only, image, two images, video; padding and neighbours change nothing, neither does the grey patch."""
    with torch.no_grad():
        together = sft.token_logps(loaded[0], sft.collate(rows, 0))
        for i, row in enumerate(rows):
            alone = sft.token_logps(loaded[0], sft.collate([row], 0))[0]
            torch.testing.assert_close(together[i, :len(alone)], alone, atol=2e-5, rtol=1e-5)
        backwards = sft.token_logps(loaded[0], sft.collate(rows[::-1], 0))
    torch.testing.assert_close(backwards.flip(0), together, atol=2e-5, rtol=1e-5)


def test_log_probabilities_depend_on_pixels_and_on_positions_in_the_picture(loaded, rows):
    """The released code's update never saw a picture, and counted positions in one dimension; neither raises an error."""
    image = rows[0]
    with torch.no_grad():
        seen = sft.token_logps(loaded[0], sft.collate([image], 0))
        blank = sft.token_logps(loaded[0], sft.collate([image | {"pixel_values": image["pixel_values"] * 0}], 0))
        batch = sft.collate([image], 0)
        batch.pop("mm_token_type_ids")
        flat = sft.token_logps(loaded[0], batch)
    assert (seen - blank).abs().max() > 1e-3 and (seen - flat).abs().max() > 1e-3


def test_text_goes_on_after_the_last_position_of_a_video(loaded, rows):
    """Four frames are two grids of 2 x 2 tokens, a second apart, 4 positions a second: times s and s + 4, so the text goes on at s + 5."""
    row = rows[2]
    batch = sft.collate([rows[3], row], 0)  # a text beside it, padded at the end
    assert row["video_grid_thw"].tolist() == [[2, 4, 4]] and row["second_per_grid_ts"].tolist() == [1.0]
    about = lambda batch: loaded[0].model.base_model.get_rope_index(
        batch["input_ids"], batch["mm_token_type_ids"], attention_mask=batch.get("attention_mask"),
        **{k: batch[k] for k in ("video_grid_thw", "second_per_grid_ts")})
    positions, _ = about(batch)
    s = row["types"].index(2)
    text = torch.arange(sft.length(row) - s - 8) + s + 5
    assert positions[:, 1, s:s + 8].tolist() == [[s] * 4 + [s + 4] * 4, [s, s, s + 1, s + 1] * 2, [s, s + 1] * 4]
    assert (positions[:, 1, :s] == torch.arange(s)).all() and (positions[:, 1, s + 8:sft.length(row)] == text).all()
    assert (positions[:, 0, :sft.length(rows[3])] == torch.arange(sft.length(rows[3]))).all()
    batch = sft.collate([rows[3], row], 0, left=True)  # to generate from
    again, deltas = about(batch)
    assert (again[:, 1, -sft.length(row):] == positions[:, 1, :sft.length(row)]).all()
    assert deltas.flatten().tolist() == [0, -3]  # 8 tokens took 5 positions


def test_no_row_is_a_batch_with_a_gradient_of_zero_for_every_parameter(loaded, rows):
    """Ranks that have run out of micro-batches, or have text only, take part in every reduction."""
    for some in ([], [rows[3]]):
        assert "pixel_values" not in sft.collate(some, 0)
        loaded[0].zero_grad()
        logp = sft.token_logps(loaded[0], sft.collate(some, 0))
        assert logp.shape[0] == len(some)
        logp.sum().backward()
        assert all(p.grad is not None for p in loaded[0].parameters())
        assert bool(sum(p.grad.abs().sum() for p in loaded[0].parameters()) > 0) == bool(some)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_the_other_qwens(family, loaded, rows):
    """Their classes with tiny shapes: log-probabilities as by all logits, images and texts, every parameter in the gradient."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    ours = loaded[0].model.config
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "rope_parameters")
    text = {k: getattr(ours.text_config, k) for k in same} | {"tie_word_embeddings": True}
    vision = dict(depth=2, hidden_size=128 if family == "qwen2_vl" else 64, embed_dim=64, intermediate_size=128, num_heads=4,
                  out_hidden_size=128, patch_size=14, deepstack_visual_indexes=[0, 1])
    if family == "qwen3_vl":
        text["head_dim"] = 32
    ids = {k: getattr(ours, k) for k in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")}
    config = AutoConfig.for_model(family, text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    torch.manual_seed(0)
    policy = sft.Policy(AutoModelForImageTextToText.from_config(config)).eval()
    for some in (rows[:2], [rows[3]]):
        batch = sft.collate(some, 0)
        policy.zero_grad()
        logp = sft.token_logps(policy, batch)[batch["mask"]]
        torch.testing.assert_close(logp, reference(policy, batch)[0], atol=1e-5, rtol=1e-5)
        logp.sum().backward()
        assert all(p.grad is not None for p in policy.parameters())


# ---------------------------------------------------------------------------------------------------
# Rows and batches


def test_token_ids_stay_as_they_were_sampled(loaded, place):
    """A sampled "<", "th", "ink" stays three tokens, though as text it would be another split; the rest of the row is the prompt's."""
    processor = loaded[1]
    row = sft.encode(processor, messages(read_pairs(place / "pairs.jsonl", 1)[0]))
    letters = [i for c in "<think>" for i in processor.tokenizer(c)["input_ids"]]
    assert letters != processor.tokenizer("<think>")["input_ids"]
    batch = sft.collate([row | {"response": letters}], 0)
    assert batch["tokens"].tolist() == letters and batch["input_ids"][0, -len(letters):].tolist() == letters
    assert batch["mm_token_type_ids"][0].tolist() == row["types"] + [0] * len(letters) and sum(row["types"]) == 4
    assert batch["input_ids"][0, batch["at"]].tolist() == row["prompt"][-1:] + letters[:-1]  # each is predicted by the one before


def test_an_example_of_micro_batches():
    """Budget 20: 9 alone (two would pad to 18, but the next is its pair's), pairs stay together, 3 x 5 and 4 x 5 fit."""
    row = lambda n, name: {"prompt": [0] * n, "response": [], "name": name}
    groups = [[row(5, "a")], [row(9, "b")], [row(4, "c")], [row(30, "d")], [row(5, "e")], [row(3, "f")]]
    assert [[r["name"] for r in rows] for rows in sft.micro_batches(groups, 20)] == [["d"], ["b", "a"], ["e", "c", "f"]]
    pairs = [[row(5, "a"), row(4, "b")], [row(6, "c"), row(1, "d")], [row(2, "e"), row(3, "f")]]
    assert [[r["name"] for r in rows] for rows in sft.micro_batches(pairs, 18)] == [["c", "d"], ["a", "b"], ["e", "f"]]
    assert [[r["name"] for r in rows] for rows in sft.micro_batches(pairs, 24)] == [["c", "d", "a", "b"], ["e", "f"]]


def test_batches_hold_every_pair_once_an_epoch_and_depend_on_the_seed_alone(place):
    pairs = read_pairs(place / "pairs.jsonl")
    numbers = list(range(3, 40))
    batches = sft.global_batches(pairs, numbers, 16, 2, seed=5)
    assert [len(b) for b in batches] == [12, 12, 13, 12, 12, 13]  # none above 16, no runt at the end
    assert sorted(sum(batches[:3], [])) == sorted(sum(batches[3:], [])) == numbers and batches[:3] != batches[3:]
    assert batches == sft.global_batches(pairs, numbers, 16, 2, seed=5) != sft.global_batches(pairs, numbers, 16, 2, seed=6)


def test_the_learning_rate():
    """Ten steps, two of warm-up: a third and two thirds of the peak, the peak, then down to a tenth."""
    rates = [sft.schedule(step, 10, 3.0, 2, "linear") for step in range(10)]
    torch.testing.assert_close(torch.tensor(rates[:4]), torch.tensor([1.0, 2.0, 3.0, 3 - 2.7 / 8]))
    cosine = [sft.schedule(step, 10, 1.0, 0, "cosine") for step in range(11)]
    torch.testing.assert_close(torch.tensor([cosine[0], cosine[5], cosine[10]]), torch.tensor([1.0, 0.55, 0.1]))
    assert sft.schedule(7, 10, 1.0, 2, "constant") == 1.0


def test_pictures_keep_within_the_bounds_and_so_does_whoever_loads_the_folder(loaded, tmp_path):
    from PIL import Image
    from transformers import AutoProcessor

    processor = loaded[1]
    Image.new("RGB", (700, 350), "red").save(tmp_path / "large.png")
    turns = messages({"question": "Q", "images": [str(tmp_path / "large.png")], "video": None, "responses": ["a", "b"]})
    row = sft.encode(processor, turns)
    assert row["image_grid_thw"].tolist() == [[1, 4, 10]]  # 56 x 140 pixels of at most 12544
    processor.save_pretrained(tmp_path)
    text = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    plain = AutoProcessor.from_pretrained(tmp_path)(text=[text], images=[Image.open(tmp_path / "large.png")])
    assert plain["input_ids"][0] == row["prompt"]


def test_a_prompts_length_is_known_from_its_pictures_headers(loaded, tmp_path):
    from PIL import Image

    sizes = {"tiny": (9, 5), "own": (56, 56), "wide": (300, 17), "large": (700, 350)}
    files = {name: str(tmp_path / f"{name}.png") for name in sizes}
    for name, size in sizes.items():
        Image.new("RGB", size, "red").save(files[name])
    pair = {"question": "Which <b>shape</b>?\n\n", "images": [], "video": None, "responses": ["a", "b  "]}
    for images in ([], *([file] for file in files.values()), [*files.values()]):
        turns = messages(pair | {"images": images})
        assert sft.prompt_length(loaded[1], turns) == len(sft.encode(loaded[1], turns)["prompt"]), images
    turns = messages(pair | {"video": [files["own"]] * 4})
    assert sft.prompt_length(loaded[1], turns) == len(sft.encode(loaded[1], turns)["prompt"])


# ---------------------------------------------------------------------------------------------------
# Ranks, stages, micro-batches

STEPS, LR = 5, 1e-4


def plain_loop(folder, rows):
    """(losses, norms, weights) of the same training in plain torch: one batch, mean over its tokens, AdamW, clip at 1."""
    policy = sft.load_policy(folder / "base", dtype=torch.float32)
    policy.train()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0)
    found, norms, batch = [], [], sft.collate(rows, 0)
    for _ in range(STEPS):
        logp, _ = reference(policy, batch)
        loss = -logp.mean()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found, norms, {name: p.detach() for name, p in policy.named_parameters()}


def worker(folder):
    """On two ranks, for each stage and several budgets: the same training, then a step with a loss that is no number."""
    folder, found = Path(folder), {}
    rank, world_size, device = sft.setup(0)
    for zero, budget, recompute in ((0, 600, False), (1, 600, False), (2, 1, False), (2, 10**6, False), (2, 600, True), (3, 600, True)):
        policy = sft.load_policy(folder / "base", dtype=torch.float32, recompute=recompute)
        processor = sft.load_processor(folder / "base")
        rows = [sft.rows_of(pair, processor, None, 4096)[0] for pair in read_pairs(folder / "pairs.jsonl", 7)]
        mine = [rows[3:4], rows[:3] + rows[4:]][rank]  # one rank has a single text, the other all that has pictures
        engine, passes = sft.make_engine(policy, zero, LR, device), []
        policy.model.base_model.language_model.layers[0].input_layernorm.register_forward_hook(lambda *_: passes.append(1))
        tokens = sum(len(row["response"]) for row in rows)
        broken = math.nan

        def loss_of(rows):
            return -sft.token_logps(engine, sft.collate(rows, 0)).sum() / tokens

        batches = sft.micro_batches([[row] for row in mine], budget)
        steps = [sft.update(engine, batches, loss_of, LR) for _ in range(STEPS)]
        # with recomputation each layer runs once more in the backward; without .train(), which from_pretrained takes away, it did not
        assert len(passes) == STEPS * len(batches) * (1 + recompute), (zero, budget, recompute, len(passes))
        weights = {}
        for name, p in policy.named_parameters():
            with sft.gathered([p]):
                weights[name] = p.detach().clone()
        spoilt = sft.update(engine, batches, lambda rows: loss_of(rows) * broken, LR)
        moved = 0.0
        for name, p in policy.named_parameters():
            with sft.gathered([p]):
                moved = max(moved, float((p - weights[name]).abs().max()))
        again = sft.update(engine, batches, loss_of, 0.0)[0]
        found[f"{zero} {budget}"] = {"losses": [s[0] for s in steps], "norms": [s[1] for s in steps], "spoilt": spoilt,
                                     "moved": moved, "again": again}
        pairs = read_pairs(folder / "val.jsonl")[:5]  # one rank judges three of them, the other two
        found["val" if zero < 3 else "val at 3"] = sft.validate(engine, processor, pairs, 4096, 400, 12) if budget == 600 else {}
        if zero == 3:
            sft.save_policy(policy, processor, folder / "saved", rank)
        if rank == 0:
            torch.save(weights, folder / f"weights-{zero}-{budget}.pt")
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))


def test_two_ranks_any_stage_any_budget_train_as_one_plain_loop_does(place, rows):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__, place],
                          capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((place / "found.json").read_text())
    losses, norms, weights = plain_loop(place, rows[:7])
    val, at_3 = found.pop("val"), found.pop("val at 3")
    for name, row in found.items():
        torch.testing.assert_close(torch.tensor(row["losses"]), torch.tensor(losses), atol=1e-5, rtol=0, msg=name)
        torch.testing.assert_close(torch.tensor(row["norms"]), torch.tensor(norms), atol=1e-5, rtol=1e-5, msg=name)
        ours = torch.load(place / f"weights-{name.replace(' ', '-')}.pt")
        for key, value in weights.items():
            torch.testing.assert_close(ours[key], value, atol=1e-5, rtol=0, msg=f"{name} {key}")
        # a loss that is no number: told, nothing moved, and the next step is as if it had not been
        assert math.isnan(row["spoilt"][0]) and row["spoilt"][1] == math.inf and row["moved"] == 0
        assert abs(row["again"] - found["0 600"]["again"]) < 1e-5 and row["again"] < losses[-1]
    # what ZeRO-3 exported, and what two ranks found in validation: as one process with the saved folder does
    policy = sft.load_policy(place / "saved", dtype=torch.float32)
    processor = sft.load_processor(place / "saved")
    for key, value in policy.named_parameters():
        torch.testing.assert_close(value, weights[key], atol=1e-5, rtol=0)
    pairs = read_pairs(place / "val.jsonl")[:5]
    batch = sft.collate(sum((sft.rows_of(pair, processor, None, 4096) for pair in pairs), []), 0)
    with torch.no_grad():
        loss = float(sft.losses(policy.eval(), batch)[0] / batch["mask"].sum())
    rows = [sft.encode(processor, messages(pair)) for pair in pairs]
    said = [sample["ids"] for sample, in sft.HF(policy, processor, "cpu").generate(rows, temperature=0.0, max_tokens=12)]
    choices = [parse(processor.tokenizer.decode(ids)).choice for ids in said]
    assert val["val_n"] == 5 and abs(val["val_loss"] - loss) < 1e-5 and val["val_format"] == 0
    assert val["val_accuracy"] == sum(choice == pair["choice"] for choice, pair in zip(choices, pairs)) / 5
    assert set(at_3) == {"val_loss", "val_n"} and abs(at_3["val_loss"] - loss) < 1e-5


# ---------------------------------------------------------------------------------------------------
# The script


def test_a_run_that_is_killed_continues_bit_for_bit(place, tmp_path):
    """kill -9 at three random moments, the same command after each: the curve of the run that was never killed."""
    words = ["--model", place / "base", "--data", place / "pairs.jsonl", "--val", place / "val.jsonl", "--batch", "4",
             "--lr", "1e-3", "--epochs", "2", "--save_every", "2", "--eval_every", "5", "--eval_n", "2", "--max_new_tokens", "4",
             "--micro_tokens", "600", "--workers", "1", "--no-recompute", *SIZES]
    assert launch(*words, "--out", tmp_path / "whole") == ""
    moment, kills = random.Random(time.time_ns()), 0
    for last in sorted(moment.sample(range(2, 20), 2)):
        process = launch(*words, "--out", tmp_path / "killed", wait=False)
        while process.is_alive() and not any(row.get("step", 0) >= last for row in (log_of(tmp_path / "killed") if
                                                                                   (tmp_path / "killed" / "log.jsonl").exists() else [])):
            time.sleep(0.01)
        time.sleep(moment.random() * 0.2)
        if process.is_alive():
            kills += 1
            workers = children(process.pid)
            os.kill(process.pid, signal.SIGKILL)
            gone(workers)
        process.join()
    assert launch(*words, "--out", tmp_path / "killed") == "" and kills
    steps = lambda name: [{k: v for k, v in row.items() if k != "seconds"} for row in log_of(tmp_path / name) if "step" in row]
    curves = [steps("whole"), steps("killed")]
    assert curves[0] == curves[1] and [row["step"] for row in curves[0]] == list(range(21))
    first = log_of(tmp_path / "killed")[0]
    assert first["args"]["lr"] == 1e-3 and first["versions"]["torch"].startswith("2.") and first["ranks"] == 1
    assert sum("resumed" in row for row in log_of(tmp_path / "killed")) >= 1
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == (tmp_path / "killed" / "model.safetensors").read_bytes()
    assert not (tmp_path / "whole" / "checkpoints").exists()
    assert "holds a model already" in launch(*words, "--out", tmp_path / "whole")


ENGINE = """
import json, os, sys
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR")
from PIL import Image
from vllm import LLM, SamplingParams
from annotate import messages, read_pairs
folder, data, barred, out = sys.argv[1:]
llm = LLM(folder, dtype="float32", max_model_len=1024, enforce_eager=True, seed=0, enable_chunked_prefill=False,
          max_num_batched_tokens=8192, limit_mm_per_prompt={"image": 2})
chats = [[{"role": t["role"], "content": [{"type": "image_pil", "image_pil": Image.open(p["image"])} if p["type"] == "image" else p
                                          for p in t["content"]]} for t in messages(pair)] for pair in read_pairs(data)]
said = llm.chat(chats, SamplingParams(temperature=0, max_tokens=16, logit_bias={i: -100 for i in json.loads(barred)}), use_tqdm=False)
json.dump([[list(o.prompt_token_ids), list(o.outputs[0].token_ids)] for o in said], open(out, "w"))
"""


def test_the_exported_folder_loads_in_vllm_and_says_the_same(place, tmp_path):
    """With a reward head beside it, too: one folder for all. Large pictures are sized by the folder's own processor."""
    from PIL import Image

    policy = sft.load_policy(place / "base", "critic", torch.float32)
    processor = sft.load_processor(place / "base", 3136, 12544)
    sft.save_policy(policy, processor, tmp_path / "saved")
    pairs = make_pairs(tmp_path, 4, seed=2, media=("image", "text", "images"))
    Image.new("RGB", (300, 200), "blue").save(pairs[0]["images"][0])
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    done = subprocess.run([sys.executable, "-c", ENGINE, tmp_path / "saved", tmp_path / "pairs.jsonl",
                           json.dumps(sft.barred(processor, 704)), tmp_path / "said.json"],
                          cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    again = sft.load_policy(tmp_path / "saved", dtype=torch.float32)
    processor = sft.load_processor(tmp_path / "saved")
    rows = [sft.encode(processor, messages(pair)) for pair in read_pairs(tmp_path / "pairs.jsonl")]
    ours = [sample["ids"] for sample, in sft.HF(again, processor, "cpu").generate(rows, temperature=0.0, max_tokens=16)]
    for (prompt, said), row, ids in zip(json.loads((tmp_path / "said.json").read_text()), rows, ours):
        assert prompt == row["prompt"] and said == ids
    torch.testing.assert_close(again.head.state_dict(), policy.head.state_dict(), atol=0, rtol=0)
    assert again.kind == "critic"


@pytest.mark.parametrize("head", ["scalar", "critic"])
def test_a_reward_head_learns_and_comes_back(place, tmp_path, head):
    """On pairs whose worse answer ends in a mark, 12 steps are enough; the saved folder scores as the trained one did."""
    pairs = [pair | {"responses": [r + ("" if i == pair["choice"] - 1 else " zzz") for i, r in enumerate(pair["responses"])],
                     "critiques": ["right" if i == pair["choice"] - 1 else "wrong" for i in (0, 1)]}
             for pair in make_pairs(tmp_path, 64, seed=3)]
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    words = ["--model", place / "base", "--data", tmp_path / "pairs.jsonl", "--head", head, "--batch", "16", "--lr", "3e-3",
             "--epochs", "5", "--eval_every", "100", "--eval_n", "16", "--max_new_tokens", "3", "--save_every", "0", "--workers", "0",
             "--no-recompute", *SIZES]
    assert launch(*words, "--out", tmp_path / "out") == ""
    log = [row for row in log_of(tmp_path / "out") if "step" in row]
    assert log[-1]["val_n"] == 16 and log[-1]["val_loss"] < 0.5 * log[0]["val_loss"], log
    if head == "scalar":
        assert log[-1]["val_accuracy"] == 1 and log[-1]["loss"] < 0.1
    policy = sft.load_policy(tmp_path / "out", dtype=torch.float32)
    processor = sft.load_processor(tmp_path / "out")
    assert policy.kind == head
    groups = [sft.rows_of(pair, processor, head, 4096) for pair in read_pairs(tmp_path / "pairs.jsonl", 4)]
    with torch.no_grad():
        _, pair, right = sft.losses(policy.eval(), sft.collate(sum(groups, []), 0))
    assert right == 4 and pair < 4 * 0.3


def test_a_frozen_tower_stays_and_every_row_of_the_log_is_told(place, tmp_path):
    """Also: a pair too long for the context is dropped and counted, and so is one without annotation."""
    pairs = make_pairs(tmp_path, 12, seed=4)
    pairs[1]["annotation"], pairs[5]["question"] = None, "why " * 500
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    words = ["--model", place / "base", "--data", tmp_path / "pairs.jsonl", "--batch", "5", "--lr", "1e-2", "--eval_n", "0", "--zero", "1",
             "--context", "600", "--workers", "2", "--freeze_vision", "--warmup", "0", *SIZES]
    assert launch(*words, "--out", tmp_path / "out") == ""
    log = [row for row in log_of(tmp_path / "out") if row.get("step")]
    assert [row["step"] for row in log] == [1, 2, 3] and log[-1]["dropped"] == {"too long": 1, "no annotation": 1, "no critiques": 0}
    assert sum(row["pairs"] for row in log) == 10 and all(row["seconds"] > 0 and row["norm"] > 0 for row in log)
    before, after = (sft.load_policy(folder, dtype=torch.float32) for folder in (place / "base", tmp_path / "out"))
    changed = {name for (name, a), b in zip(before.named_parameters(), after.parameters()) if not torch.equal(a, b)}
    assert changed and not any("visual" in name for name in changed)


def test_what_is_wrong_is_said_where_it_is(place, tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    pairs = make_pairs(tmp_path, 6, seed=5, media=("image",))
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    words = ["--data", tmp_path / "pairs.jsonl", "--batch", "2", "--eval_n", "0", "--no-recompute", "--out", tmp_path / "out", *SIZES]
    # a rate at which the weights overflow: the ids of the batch are kept
    error = launch("--model", place / "base", *words, "--workers", "0", "--lr", "1e30", "--warmup", "0", "--clip_grad", "0")
    assert "FloatingPointError" in error and "--lr 1e+30 is too high" in error
    kept = json.loads((tmp_path / "out" / "not_finite.json").read_text())
    assert kept["step"] in (2, 3) and len(kept["ids"]) == 2 and set(kept["ids"]) < {pair["id"] for pair in pairs}
    # a picture that is no picture, found by a worker; then one that is not there
    Path(pairs[3]["images"][0]).write_text("no picture")
    error = launch("--model", place / "base", *words, "--workers", "1")
    assert "pairs.jsonl, line 4 (pair-5-3): an image cannot be read" in error
    os.remove(pairs[3]["images"][0])
    error = launch("--model", place / "base", *words, "--workers", "1")
    assert error.startswith("FileNotFoundError") and "pairs.jsonl, line 4 (pair-5-3): there is no" in error
    # a model that reads no images
    Qwen2ForCausalLM(Qwen2Config(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                                 num_key_value_heads=2)).save_pretrained(tmp_path / "text")
    error = launch("--model", tmp_path / "text", *words)
    assert "is a 'qwen2'; legal: a model that reads images and text" in error


def test_a_checkpoint_of_another_run_is_refused(place, tmp_path):
    words = ["--data", place / "pairs.jsonl", "--batch", "8", "--eval_n", "0", "--no-recompute", "--out", tmp_path / "out",
             "--save_every", "1", "--workers", "0", *SIZES]
    process = launch("--model", place / "base", *words, wait=False)
    while process.is_alive() and not list((tmp_path / "out").glob("checkpoints/step-*[0-9]")):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    toy_model.make(tmp_path / "wide", 0, hidden=192)
    error = launch("--model", tmp_path / "wide", *words)
    assert error.startswith("Unusable") and "belongs to qwen2_5_vl" in error and "use that --model and --zero, or another --out" in error
    assert "--lr 1.0 (there: 1e-05); go on with its flags, or choose another --out" in launch("--model", place / "base", *words, "--lr", "1")
    assert launch("--model", place / "base", *words) == ""


def test_flags_can_stand_in_a_file_several_on_a_line(tmp_path):
    (tmp_path / "a.args").write_text("--data x.jsonl --out out   # a comment\n\n# another\n--lr 3e-4 --no-recompute\n")
    args = sft.parser().parse_args([f"@{tmp_path / 'a.args'}", "--lr", "1"])
    assert (args.data, args.out, args.lr, args.recompute) == ("x.jsonl", "out", 1.0, False)
    defaults = sft.parser().parse_args(["--data", "x", "--out", "y"])
    assert (defaults.lr, defaults.batch, defaults.epochs, defaults.model) == (1e-5, 256, 1, "Qwen/Qwen2.5-VL-7B-Instruct")  # the paper's


if __name__ == "__main__":
    worker(sys.argv[1])
