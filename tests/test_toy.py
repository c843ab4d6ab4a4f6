"""
The toy world and its model's folder: what is true, what is planted, that no shortcut leads round the picture, and that
transformers and vLLM load the folder alike. The weights are random: what a trained base can do, toy/pretrain.py measures.
"""
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from annotate import JUDGING_PROMPT
from stable_reinforce import parse
from toy import model as toy_model, pretrain, weaker, world


def sets(n_sets, seed=0, **options):
    rng = random.Random(seed)
    return [world.twins(rng, **options) for _ in range(n_sets)]


@pytest.mark.parametrize("family", world.FAMILIES)
@pytest.mark.parametrize("n", [2, 3])
def test_exactly_one_answer_is_true_of_each_scene(family, n):
    for items in sets(200, family=family, n=n):
        assert [item["right"] for item in items] == list(range(n))
        for item in items:
            assert [world.truth(family, item["scene"], item["subject"], c) for c in item["claims"]] == [k == item["right"] for k in range(n)]


def test_twins_differ_in_nothing_but_the_picture():
    for items in sets(500):
        a, b = items
        assert {k: a[k] for k in a if k not in ("right", "scene")} == {k: b[k] for k in b if k not in ("right", "scene")}
        assert a["scene"] != b["scene"]


def test_no_shortcut_in_words():
    """Over full twin sets: any rule that reads only the text is right in exactly half; longer and shorter with them."""
    rules = {"longer": lambda i: max((0, 1), key=lambda k: len(i["answers"][k])), "shorter": lambda i: min((0, 1), key=lambda k: len(i["answers"][k])),
             "first": lambda i: 0, "alphabet": lambda i: min((0, 1), key=lambda k: i["answers"][k]),
             "hash": lambda i: sum(map(ord, i["question"] + i["answers"][0])) % 2}
    items = [item for twins in sets(600) for item in twins]
    for name, rule in rules.items():
        assert sum(rule(i) == i["right"] for i in items) == len(items) / 2, name


def test_no_shortcut_in_single_twins_either():
    """Training draws one twin of a set: the same rules, within three standard errors of a half."""
    rng = random.Random(5)
    items = [rng.choice(twins) for twins in sets(4000)]
    for rule in (lambda i: max((0, 1), key=lambda k: len(i["answers"][k])), lambda i: 0):
        assert abs(sum(rule(i) == i["right"] for i in items) / len(items) - 0.5) < 3 * 0.5 / len(items) ** 0.5


def test_the_annotators_rule_with_perfect_sight_is_always_right():
    """The description in a careful reasoning, read back into a scene, and the claim that holds in it."""
    for item in (item for twins in sets(300) for item in twins):
        for shown in ((0, 1), (1, 0)):
            text = world.judgement(item, shown, shown.index(item["right"]) + 1, "careful")
            told = text[text.index("shows ") + 6:text.index(". Claims")].split(", ")
            scene = [None if cell == "nothing" else tuple(cell.split()) for cell in told]
            holds = [world.truth(item["family"], scene, item["subject"], item["claims"][i]) for i in shown]
            assert sum(holds) == 1 and parse(text).choice == holds.index(True) + 1


@pytest.mark.parametrize("manner", world.MANNERS)
def test_manners_are_what_they_are_called(manner):
    for item in (twins[0] for twins in sets(100)):
        for choice in (1, 2):
            text = world.judgement(item, (0, 1), choice, manner)
            verdict = parse(text)
            assert verdict.well_formed and verdict.choice == choice and world.manner_of(text) == manner
            stated = int(verdict.think.split("Response ")[-1][0])
            assert (stated == choice) == (manner != "inconsistent")
            assert ("shows" in verdict.think) == (manner != "hasty")
    assert world.manner_of("no verdict") is None


def test_a_bad_look_is_convincing():
    rng = random.Random(2)
    for item in (item for twins in sets(300) for item in twins):
        seen = world.misread(item, rng.sample((0, 1), 2), rng)
        assert [world.truth(item["family"], seen, item["subject"], c) for c in item["claims"]] == [k != item["right"] for k in (0, 1)]


def test_questions_about_a_scene_are_answered_truly():
    families = {"What colour": "colour", "Which shape is ": "shape", "How many": "count", "Where is": "position", "Which are": "comparison"}
    seen = Counter()
    for item in (twins[0] for twins in sets(300)):
        for question, claim in sum(world.questions_about(item["scene"]).values(), []):
            if question.startswith("What is at"):
                cell = item["scene"][world.PLACES.index(question[len("What is at the "):-1])]
                assert claim == ("nothing" if cell is None else " ".join(cell))
                continue
            family = "absence" if question.endswith("missing?") else next(f for start, f in families.items() if question.startswith(start))
            words = question.rstrip("?").replace(",", "").split()
            subject = {"colour": words[-1], "shape": words[-1], "count": words[2], "position": words[-1], "comparison": f"{words[-3]} {words[-1]}",
                       "absence": "missing"}[family]
            assert world.truth(family, item["scene"], subject, claim), (item["scene"], question, claim)
            seen[family] += 1
    assert set(seen) == set(world.FAMILIES)


def test_pictures_repeat_by_seed_and_blur_with_difficulty():
    scene = [("circle", "red"), None, ("square", "blue"), ("diamond", "green")]
    a, b, c = (world.draw(scene, 0.3, random.Random(seed)) for seed in (1, 1, 2))
    assert a.shape == (56, 56, 3) and a.dtype == np.uint8 and (a == b).all() and (a != c).any()
    contrast = []
    for difficulty in (0.0, 0.5, 1.0):  # how far a red circle's middle is from the empty cell's, in the picture's grain
        pictures = [world.draw(scene, difficulty, random.Random(seed)).astype(float) for seed in range(40)]
        gaps = [abs(p[10:18, 10:18].mean((0, 1)) - p[10:18, 38:46].mean((0, 1))).max() / p[10:18, 38:46].std() for p in pictures]
        contrast.append(np.mean(gaps))
    assert contrast[0] > 3 * contrast[1] > 3 * contrast[2]


def test_the_contact_sheet(tmp_path):
    done = subprocess.run([sys.executable, "toy/world.py", "--show", tmp_path / "sheet.png"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "sheet.png").stat().st_size > 50_000, done.stderr


# ---------------------------------------------------------------------------------------------------
# the model's folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "random"
    toy_model.make(folder, seed=0)
    return folder


@pytest.fixture(scope="module")
def processor(folder):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder)


def test_tokens_are_qwens_where_it_matters(processor):
    tokenizer = processor.tokenizer
    for name in toy_model.SPECIAL:
        assert tokenizer.encode(name) == [tokenizer.convert_tokens_to_ids(name)]
    assert len(tokenizer.encode("1")) == len(tokenizer.encode("2")) == 1
    for text in ("</think><answer>1</answer>", "<answer> 2", "**1**", "12", "a1b2"):
        pieces = [tokenizer.decode([i]) for i in tokenizer.encode(text)]
        assert "".join(pieces) == text and all(p.isdigit() == any(c.isdigit() for c in p) and len(p) == 1 for p in pieces if any(c.isdigit() for c in p))
    for text in ("héllo 漢字", "\x00\t\n", "😀", JUDGING_PROMPT, "<think>a</think>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_tokenizer_comes_out_the_same_each_time(processor):
    made = toy_model.make_tokenizer()
    assert made.get_vocab() == processor.tokenizer.get_vocab()
    assert json.loads(made.backend_tokenizer.to_str())["model"] == json.loads(processor.tokenizer.backend_tokenizer.to_str())["model"]


def test_labels_cover_the_replies_and_nothing_else(processor):
    rng = random.Random(0)
    for task in (*pretrain.TASKS, pretrain.see):
        for dialogue in (task(rng) for _ in range(10)):
            labels = pretrain.encode(processor, [dialogue])["labels"][0]
            said = processor.tokenizer.decode(labels[labels != -100])
            assert said == "".join(reply + "<|im_end|>" for _, reply in dialogue["turns"])


def test_images_and_frames_become_four_tokens_a_picture_or_pair_of_frames(processor):
    rng = random.Random(0)
    for medium, token, n in (("image", "<|image_pad|>", 4), ("video", "<|video_pad|>", 8)):
        item = world.twins(rng, medium=medium)[0]
        ids = pretrain.encode(processor, [pretrain.look(item, [("What?", "x")], rng)])["input_ids"][0]
        assert (ids == processor.tokenizer.convert_tokens_to_ids(token)).sum() == n


# ---------------------------------------------------------------------------------------------------
# the model in its two engines

ENGINE = """
import json, os, random, sys
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR")
from PIL import Image
from vllm import LLM, SamplingParams
from toy import pretrain, world
base, out = sys.argv[1:]
llm = LLM(base, dtype="float32", max_model_len=1024, enforce_eager=True, seed=0, enable_chunked_prefill=False,
          max_num_batched_tokens=8192, limit_mm_per_prompt={"image": 1})
rng, rows = random.Random(3), []
for _ in range(8):
    item = world.twins(rng)[0]
    d = pretrain.judging(item, (0, 1), "careful", rng)
    rows.append((d["turns"][0][0], d["images"][0]))
chat = [[{"role": "user", "content": [{"type": "image_pil", "image_pil": Image.fromarray(image)}, {"type": "text", "text": text}]}] for text, image in rows]
said = llm.chat(chat, SamplingParams(temperature=1.0, max_tokens=24, logprobs=0, seed=7), use_tqdm=False)
json.dump([dict(text=text, image=image.tolist(), prompt=list(o.prompt_token_ids), ids=list(o.outputs[0].token_ids),
                logp=[next(iter(p.values())).logprob for p in o.outputs[0].logprobs]) for (text, image), o in zip(rows, said)], open(out, "w"))
"""


def test_vllm_and_transformers_agree_on_ids_and_log_probabilities(tmp_path):
    """The same picture and prompt: the same token ids, and each sampled token's log-probability to 1e-4."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = ROOT / "toy/base"
    processor = AutoProcessor.from_pretrained(folder)
    done = subprocess.run([sys.executable, "-c", ENGINE, folder, tmp_path / "said.json"], cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    worst = 0.0
    for row in json.loads((tmp_path / "said.json").read_text()):
        dialogue = {"images": [np.array(row["image"], dtype=np.uint8)], "video": False, "turns": [(row["text"], "")]}
        inputs = pretrain.encode(processor, [dialogue], replies=False)
        assert inputs["input_ids"][0].tolist() == row["prompt"]  # one pad in, four out, on both sides
        said = torch.tensor([row["ids"]])
        for name, more in (("input_ids", said), ("attention_mask", torch.ones_like(said)), ("mm_token_type_ids", torch.zeros_like(said))):
            inputs[name] = torch.cat([inputs[name], more], 1)
        with torch.no_grad():
            logp = model(**inputs).logits[0, -len(row["ids"]) - 1:-1].log_softmax(-1).gather(1, said.T)[:, 0]
        worst = max(worst, (logp - torch.tensor(row["logp"])).abs().max().item())
    assert 0 < worst < 1e-4


def test_the_weaker_judge_is_weaker_and_no_coin():
    """C.11: it misses agreements, lets next to no contradiction pass; the base that it is made of judges all of them rightly."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, processor = AutoModelForImageTextToText.from_pretrained(ROOT / "toy/base"), AutoProcessor.from_pretrained(ROOT / "toy/base")
    assert weaker.figures(model, processor, n=100) == {"agree": 1.0, "disagree": 1.0}
    weaker.round_layer(model)
    right = weaker.figures(model, processor, n=100)
    assert 0.4 < right["agree"] < 0.8 and right["disagree"] > 0.95


# ---------------------------------------------------------------------------------------------------
# runs side by side


def written_run(folder, greedy, text, consistency=0.5):
    """A run of two steps as rl.py logs it: 10 judgements a step, all the same text."""
    folder.mkdir(parents=True)
    step = {"loss": 0.1, "loss_max": 0.5, "log_ratio_max": 7.5, "token_loss_max": 3.0, "length": 20.0, "samples": 10, "preclipped": 0.01, "filtered": 0.1, "skipped": 0,
            "consistency": consistency, "seconds": 2.0, "entropy": 0.1}
    held = {"eval_n": 600, "eval_sampled": 0.5, "eval_sampled_format": 1.0}
    rows = [{"args": {}}, {"step": 0, **held, "eval_greedy": 0.5}, {"step": 1, **step}, {"step": 2, **step, **held, "eval_greedy": greedy}]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rollouts-0.jsonl").write_text("".join(json.dumps(
        {"step": s, "text": text, "choice": 2, "consistency": i % 2 if i < 4 else None}) + "\n" for s in (1, 2) for i in range(10)))


def test_runs_side_by_side(tmp_path):
    slip = "<think>The image shows circle red. Claims: red first, blue second. Response 1 is better.</think><answer>2</answer>"
    glance = "<think>Claims: red first, blue second. Response 2 is better.</think><answer>2</answer>"
    written_run(tmp_path / "a-0", 0.7, slip)
    written_run(tmp_path / "a-1", 0.8, slip, consistency=None)  # nobody was right
    written_run(tmp_path / "b-0", 0.6, glance)
    command = [sys.executable, "toy/compare.py", f"A={tmp_path}/a-", f"B={tmp_path}/b-", "--out", str(tmp_path / "both")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = {cells[1].strip(): [cell.strip() for cell in cells[2:4]]
            for cells in (line.split("|") for line in (tmp_path / "both.md").read_text().splitlines())}
    assert said["seeds"] == ["2", "1"] and said["greedy accuracy, after, %"] == ["75.0 ± 7.1", "60.0"]
    assert said["consistency of right verdicts, %, last step"] == ["50.0 (1 of 2 runs)", "50.0"]
    assert said["contradictions among descriptions, last five steps, %"] == ["100.0 ± 0.0", "0.0"]
    judge = "ones that the judge takes for consistent, verdict 1 and verdict 2, %"
    assert said[f"contradictory {judge}"] == ["none (0 of 2 runs) and 50 ± 0", "none (0 of 1 runs) and none (0 of 1 runs)"]
    assert said[f"consistent {judge}"][1] == "none (0 of 1 runs) and 50"
    assert said["hasty, first five steps to last five, %"] == ["0 to 0", "100 to 100"]
    assert said["tokens pre-clipped, of all"] == ["8 of 800", "4 of 400"] and said["judgements filtered, of all"] == ["4 of 40", "2 of 20"]
    assert (tmp_path / "both.png").stat().st_size > 10_000
    none = subprocess.run([*command[:2], f"A={tmp_path}/c-"], cwd=ROOT, capture_output=True, text=True)
    assert none.returncode == 1 and "no run there" in none.stderr
