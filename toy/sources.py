"""
The toy world as every training source and benchmark of the paper, each in the schema it has on the hub, so that toy and
real data go through the same readers (annotate.py, evaluate.py, downstream_grpo.py).

$ python toy/sources.py --out out/toy/data --seed 0
$ python toy/sources.py --out out/toy/small --seed 0 --scale 0.1

  train/   RLAIF-V, VLFeedback, POVID, WildVision-Battle, MM-RLHF, R1-Reward-RL, and pairs.jsonl, as people's own data
           would be (prompt, chosen, rejected, image or none). Of each set of twins, one. planted.json counts the rows
           broken on purpose, {source: {reason: rows}}: a reader drops each of these, and no other.
  dev/     to choose settings by, and test/, to report: VL-RewardBench, Multimodal-RewardBench, MM-RLHF-RewardBench, and
           pairs.jsonl in the project's own format. Full sets of twins: who reads only the text is right half of the time.
  tasks/   questions with a short answer for downstream_grpo.py; its test tasks once more as V*, its training tasks as
           arXivQA and as ThinkLite-VL. In the test tasks, too, each answer of a set is right once.
  key.jsonl  toy/server.py's answer key, an item a line, by key_of(the question as a reader restores it, its pictures).
             It has neither the broken rows nor the questions of V* and arXivQA with their options.

Paths are relative to the folder of the file that holds them; in VLFeedback to merged_images, in POVID to coco. The same
--seed gives the same bytes; each source of each split has its own random stream.

Differs from the real files:
1) pictures are PNG and called .png where the hub has .jpg; so VL-RewardBench's two files hold the same bytes
2) the question of a WildVision row of turn 2 is restored by told(): with the history, which both models share here. In
   real rows each may have answered turn 1 in its own way; such rows are planted as broken ("different histories")
3) reasoning ids that VL-RewardBench repeats belong to two different pictures
4) no toxicity in Multimodal RewardBench, which does not release its own
Not verified, no real row being at hand: POVID's keys, and whether its image names begin with COCO_train2014_; WildVision's
file name; the keys inside RLAIF-V's origin_split; in R1-Reward-RL, whether the text ends with the answer or with the output
format (here: every other row) and whether the hub's column `image`, a string of 165 kB, is base64; the type of id in
ThinkLite-VL and of question_id in V*.
"""
import argparse
import base64
import hashlib
import io
import json
import random
import shutil
import sys
import time
from pathlib import Path

if not __package__:  # run as a script: `toy` is found from the folder above
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from annotate import JUDGING_PROMPT
from toy import world

MARKER = "made_by_toy_sources.json"
FIRST = {"train": 0, "dev": 100_000, "test": 200_000}  # the ids of two splits never meet: decontamination drops nothing

# Which families play which group of a benchmark. The numbers are the real files' rows; here they are shares.
SEEN, REASONED, GENERAL = ["colour", "shape", "absence"], ["count", "comparison"], ["position"]
VL_REWARD_BENCH = {  # how the id begins: (rows, query_source, families)
    "hallucination_pair-": (448, "POVID_preference_data_for_VLLMs", SEEN), "mathverse_": (167, "", REASONED),
    "mmmu_pro_test_Chemistry_": (151, "", REASONED), "RLAIF-V-": (233, "COCO", SEEN), "RLHF-V-": (68, "VQAv2", SEEN),
    "jailbreak-": (7, "jailbreak", GENERAL), "svit-conversation-": (1, "svit", GENERAL),
    "politics-": (1, "politics", GENERAL), "LRVInstruction-": (1, "LRVInstruction", GENERAL),
    "wildvision-battle-": (173, "wildvision-battle", GENERAL)}
MULTIMODAL_REWARD_BENCH = [  # (how the ID begins, Category, rows, families)
    ("visitbench", "open_generation/correctness_task", 221, SEEN),
    ("nocaps", "open_generation/correctness_task", 402, SEEN),
    ("visitbench", "open_generation/preference_task", 265, GENERAL),
    ("nocaps", "open_generation/preference_task", 389, GENERAL),
    ("mmmu-s", "knowledge", 330, ["shape", "position"]), ("mmmu-v", "knowledge", 300, ["shape", "position"]),
    ("mathvista", "reasoning", 514, ["count"]), ("EMMA-Coding", "reasoning", 584, ["comparison"]),
    ("PAIRS", "safety", 508, ["absence"]), ("RealworldQA", "vqa", 600, world.FAMILIES),
    ("MMBench", "vqa", 598, world.FAMILIES)]
MM_RLHF = {"long": ["colour", "position", "count"], "short": ["shape", "colour", "comparison"], "mcq": REASONED,
           "safety": ["absence", "shape"], "video": world.FAMILIES}
MM_RLHF_REWARD_BENCH = {"mcq": 42, "long": 37, "short": 34, "safety": 32, "video": 25}

# Rows at --scale 1, the broken ones apart: 9,600 pairs in the shares of Table 2. A prompt of VLFeedback counts as one pair,
# its best answer against a worst one.
TRAIN = {"RLAIF-V": 1835, "VLFeedback": 1970, "POVID": 420, "WildVision-Battle": 254,
         "MM-RLHF": {"long": 1744, "short": 1962, "mcq": 352, "safety": 422}, "R1-Reward-RL": 320, "pairs": 320}
TEST = {"VL-RewardBench": 600, "Multimodal-RewardBench": 600, "MM-RLHF-RewardBench": 170, "pairs": 1200}  # dev: half of it
TASKS = {"train": 600, "test": 200}
BROKEN = {"missing image": 2, "unreadable image": 3, "empty answer": 4}
PLANTED = {"RLAIF-V": BROKEN, "VLFeedback": BROKEN | {"tie": 6, "non-numeric rating": 5}, "POVID": BROKEN,
           "WildVision-Battle": BROKEN | {"tie": 7, "different histories": 5},
           "MM-RLHF": BROKEN | {"tie": 6, "missing frames": 2}, "R1-Reward-RL": BROKEN | {"no verdict": 3}, "pairs": BROKEN}
MODELS = ["LLaVA-v1.5-7b", "LLaVA-v1.5-13b", "LLaVA-RLHF-7b", "LLaVA-RLHF-13b", "Qwen-VL-Chat", "IDEFICS-9b", "Fuyu-8b",
          "InstructBLIP-7b", "InstructBLIP-13b", "VisualGLM-6b", "MMICL-13b", "GPT-4V"]
ASPECTS = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")


class Source:
    """One source being written: its folder, its own stream of random numbers, its lines of the answer key."""

    def __init__(self, root, split, name, seed):
        self.folder = root / split / ("" if name in ("pairs", "tasks") else name)
        self.split, self.name, self.key, self.files = split, name, [], []
        self.rng = random.Random(f"{seed} {split} {name}")  # a string is seeded by its SHA-512: never by PYTHONHASHSEED

    def twins(self, families=world.FAMILIES, n=2, medium="image"):
        """A full set of n items; a comparison has but three answers."""
        family = self.rng.choice([f for f in families if n <= 3 or f != "comparison"])
        return world.twins(self.rng, family, n, medium=medium)

    def rows(self, n):
        """(number, fault or None, item) for n rows and the broken ones, in random places; of a set of twins, one."""
        faults = [None] * n + [fault for fault, times in PLANTED[self.name].items() for _ in range(times)]
        self.rng.shuffle(faults)
        for i, fault in enumerate(faults):
            yield i, fault, self.rng.choice(self.twins())

    def draw(self, item, fault=None):
        """The item's scene, drawn once, four times or never, as bytes of PNG files; the key learns of it."""
        from PIL import Image

        files = []
        for _ in range({"image": 1, "video": 4, "text": 0}[item["medium"]]):
            data = io.BytesIO()
            Image.fromarray(world.draw(item["scene"], item["difficulty"], self.rng)).save(data, "PNG", compress_level=1)
            files.append(data.getvalue())
        if not fault:
            key = world.key_of(item["question"], files)
            self.key.append({"key": key, "split": self.split, "source": self.name, **item})
        return files

    def save(self, item, stem, fault=None):
        """Draws and writes stem.png, or the frames into the folder stem. -> bytes, what a row says of them."""
        files = self.draw(item, fault)
        if item["medium"] == "video":
            for t, data in enumerate([] if fault == "missing frames" else files):
                self.write(f"{stem}/{t:04d}.png", data)
            return files, {"video": stem}
        if files:
            self.write(f"{stem}.png", damaged(files[0], fault))
        return files, {"image": f"{stem}.png"} if files else {}

    def preference(self, item, fault):
        """[chosen, rejected]: the right answer and a wrong one; where that is the fault, one of them is empty."""
        right = item["answers"][item["right"]]
        pair = [right, self.rng.choice([a for a in item["answers"] if a != right])]
        if fault == "empty answer":
            pair[self.rng.randrange(2)] = self.rng.choice(("", " \n"))
        return pair

    def write(self, path, data):
        """data None = the file is missing on purpose."""
        if data is not None:
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / path).write_bytes(data)

    def json(self, path, rows):
        """A .jsonl has an object a line, a .json is one list."""
        self.files.append((path, len(rows)))
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        self.write(path, (lines if path.endswith(".jsonl") else json.dumps(rows, indent=2)).encode())

    def parquet(self, path, rows, **kinds):
        """kinds: the type of each column that is no string."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        text = pa.string()
        types = {"bytes": pa.binary(), "int32": pa.int32(), "int64": pa.int64(), "bool": pa.bool_(),
                 "strings": pa.list_(text), "ints": pa.list_(pa.int64()),
                 "image": pa.struct([("bytes", pa.binary()), ("path", text)]),
                 "turns": pa.list_(pa.struct([("role", text), ("content", text)]))}
        schema = pa.schema([(name, types[kinds[name]] if name in kinds else text) for name in rows[0]])
        self.files.append((path, len(rows)))
        self.write(path, b"")  # makes the folder
        table = pa.Table.from_pylist(rows, schema=schema)
        pq.write_table(table, self.folder / path, use_dictionary=False)  # pictures never repeat


def damaged(data, fault):
    """A picture file as the fault leaves it: None = no file; cut off = no decoder reads it."""
    return {"missing image": None, "unreadable image": data[:40]}.get(fault, data)


def cell(data, path, fault=None):
    """A picture as a parquet column holds it."""
    return None if fault == "missing image" else {"bytes": damaged(data, fault), "path": path}


# ---------------------------------------------------------------------------------------------------
# Training sources


def rlaif_v(source, rows):
    table = []
    about = json.dumps({"model": "LLaVA-v1.5-7b", "labeller": "LLaVA-NeXT-34b", "type": "question answering"})
    for i, fault, item in source.rows(rows):
        (data,), (chosen, rejected) = source.draw(item, fault), source.preference(item, fault)
        table.append({"ds_name": "RLAIF-V", "image": cell(data, f"toy-{i}.png", fault), "question": item["question"],
                      "chosen": chosen, "rejected": rejected, "origin_dataset": "toy", "origin_split": about, "idx": str(i),
                      "image_path": f"toy-{i}.png"})
    half = len(table) // 2
    source.parquet("RLAIF-V-Dataset_000.parquet", table[:half], image="image")
    source.parquet("RLAIF-V-Dataset_001.parquet", table[half:], image="image")


def vlfeedback(source, rows):
    """
    Four answers a prompt. The right one is rated above the wrong ones in each aspect, and these alike. In a broken row all
    are rated alike, and the right one may besides have a rating that is no number, or be empty: no pair comes of it.
    """
    table, rng = [], source.rng
    for i, fault, _ in source.rows(rows):
        item, models, completions = rng.choice(source.twins(n=4)), rng.sample(MODELS, 4), []
        source.save(item, f"merged_images/svit-conversation-{i}", fault)
        alike = fault in ("tie", "non-numeric rating", "empty answer")
        rated = {aspect: (low := rng.randint(1, 4), low if alike else rng.randint(low + 1, 5)) for aspect in ASPECTS}
        for k, answer in enumerate(item["answers"]):
            right = k == item["right"]
            notes = {a: {"Rating": str(rated[a][right]), "Rationale": "It says what it sees."} for a in ASPECTS}
            if right and fault == "non-numeric rating":
                notes[rng.choice(ASPECTS)]["Rating"] = rng.choice(("N/A", ""))
            completions.append({"annotations": notes, "model": models[k],
                                "response": "" if right and fault == "empty answer" else answer})
        table.append({"id": f"svit-conversation-{i}", "prompt": item["question"], "models": models,
                      "completions": completions, "img_path": f"svit-conversation-{i}.png"})
    source.json("vlfeedback_80k.jsonl", table)


def povid(source, rows):
    table = []
    for i, fault, item in source.rows(rows):
        source.save(item, f"coco/COCO_train2014_{i:012d}", fault)
        chosen, rejected = ([{"from": "human", "value": f"<image>\n{item['question']}"}, {"from": "gpt", "value": answer}]
                            for answer in source.preference(item, fault))
        table.append({"id": f"hallucination_pair-{i}", "image": f"COCO_train2014_{i:012d}.png", "conversations": chosen,
                      "rejected_conversations": rejected})
    source.json("POVID_preference_data_for_VLLMs_version_1.json", table)


def told(turns):
    """
    The question that the last of these turns answers: after what was said before, if anything was.

    >>> told([{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}])
    'Q'
    >>> told([{"role": r, "content": c} for r, c in (("user", "Q"), ("assistant", "A"), ("user", "R"), ("assistant", "B"))])
    'user: Q\\nassistant: A\\nuser: R'
    """
    asked = turns[:-1]
    return asked[0]["content"] if len(asked) == 1 else "\n".join(f"{turn['role']}: {turn['content']}" for turn in asked)


def wildvision(source, rows):
    table, rng = [], source.rng
    for i, fault, item in source.rows(rows):
        (a, b), slot, talks = rng.sample(MODELS, 2), rng.randrange(2), []
        turn = 2 if fault == "different histories" or rng.random() < 0.15 else 1
        for side, answer in enumerate(source.preference(item, fault)[::-1 if slot else 1]):
            first = ["Is this a photograph?", "No." if side and fault == "different histories" else "No, a drawing."]
            texts = (first if turn == 2 else []) + [item["question"], answer]
            talks.append([{"role": ("user", "assistant")[t % 2], "content": text} for t, text in enumerate(texts)])
        data, = source.draw(item | {"question": told(talks[0])}, fault)
        winner = rng.choice(("tie", "tie (bothbad)")) if fault == "tie" else ("model_a", "model_b")[slot]
        table.append({"question_id": f"{rng.getrandbits(128):032x}", "model_a": a, "model_b": b, "conversation_a": talks[0],
                      "conversation_b": talks[1], "language": "English", "image": cell(data, f"{i}.png", fault),
                      "turn": turn, "anony": True, "winner": winner, "tstamp": 1_715_000_000 + i, "judge": "arena_user"})
    source.parquet("data/train-00000-of-00001.parquet", table, conversation_a="turns", conversation_b="turns",
                   image="image", turn="int32", anony="bool", tstamp="int32")


def mm_rlhf(source, rows):
    """Two to four answers a prompt; the wrong ones share a rank, so each pair of different rank has the right one."""
    rng, faults, prompts, left = source.rng, [fault for _, fault, _ in source.rows(0)], [], dict(rows)
    while faults or any(left.values()):
        fault = faults.pop() if faults else None
        category = rng.choice(list(left)) if fault else next(c for c in left if left[c])
        n = 2 if fault else min(rng.choice((2, 2, 3, 4)), left[category] + 1)
        video = fault == "missing frames" or not fault and category in ("long", "short") and rng.random() < 0.08
        item = rng.choice(source.twins(MM_RLHF[category], n, "video" if video else "image"))
        name, right = f"{len(prompts):06d}", item["answers"][item["right"]]
        _, media = source.save(item, f"{category}/{'clip-' if video else ''}{name}", fault)
        both = [source.preference(item, fault)] if fault else [(right, a) for a in item["answers"] if a != right]
        prompts.append([])
        for chosen, rejected in both:
            row = {"id": f"{name}_62{name}", **media, "prompt": item["question"], "chosen": chosen, "rejected": rejected}
            if rng.random() < 0.5:
                row |= {"chosen_reason": "The answer is correct.", "rejected_reason": "The answer is wrong."}
            if fault == "tie" or rng.random() < 0.2:
                row |= {"is_tie": fault == "tie", "ls_factor": 1.0}
            prompts[-1].append(row)
        left[category] -= 0 if fault else n - 1
    rng.shuffle(prompts)
    source.json("dpo_pairs.jsonl", [row for pairs in prompts for row in pairs])


def r1_reward_rl(source, rows):
    """The released RL set, as the authors' README shows it (pictures apart) and as the hub holds it (pictures inside)."""
    head = JUDGING_PROMPT.partition("[Question]:")[0]
    tail = "  \n\n###### **Output Format (strictly follow):**  \n" + JUDGING_PROMPT.splitlines()[-1]
    table = []
    for i, fault, item in source.rows(rows):
        choice, name = source.rng.choice((1, 2)), f"RLAIF-V-image/toy-{i}"
        files, _ = source.save(item, name, fault)
        a, b = source.preference(item, fault)[::1 if choice == 1 else -1]
        text = f"{head}###### [Question]:\n{item['question']}  \n\n###### [Response 1]:\n{a}  \n\n#### [Response 2]:\n{b}"
        content = [{"type": "text", "text": text + (tail if i % 2 else "")},
                   {"type": "image", "image": f"/authors/disk/{name}.png"}]
        data = damaged(files[0], fault)
        table.append({"question": item["question"], "message": json.dumps([{"role": "user", "content": content}]),
                      "answer": [f"<answer>{'' if fault == 'no verdict' else choice}</answer>"],
                      "image": None if data is None else base64.b64encode(data).decode()})
    source.json("R1-Reward-RL.jsonl", [{k: row[k] for k in ("message", "question", "answer")} for row in table])
    source.parquet("data/train-00000-of-00001.parquet", table, answer="strings")


def own(source, rows):
    """People's own data; about every fourth row has no picture: its prompt tells the scene."""
    table = []
    for i, fault, item in source.rows(rows):
        if i % 4 == 3 and "image" not in str(fault):
            item = source.rng.choice(source.twins(medium="text"))
        _, media = source.save(item, f"pairs/{i}", fault)
        chosen, rejected = source.preference(item, fault)
        table.append({"id": f"own-{i}", "prompt": item["question"], "chosen": chosen, "rejected": rejected, **media})
    source.json("pairs.jsonl", table)


# ---------------------------------------------------------------------------------------------------
# Benchmarks. The items of a set show their answers in one order, so that each slot is right in half of the rows exactly.


def mixed(blocks, rng):
    """Blocks of rows in random order, one list: any beginning of the file holds a bit of everything."""
    rng.shuffle(blocks)
    return [row for block in blocks for row in block]


def vl_reward_bench(source, rows):
    hub, released = [], []
    for prefix, (share, query_source, families) in VL_REWARD_BENCH.items():
        for k in range(max(1, round(share * rows / 1250 / 2))):
            models = source.rng.sample(MODELS, 2)
            for item in source.twins(families):
                row, right, question, answers = len(hub), item["right"], item["question"], item["answers"]
                (data,), media = source.save(item, f"vl_reward/img/image_{row}")
                same = families is REASONED and k % 7 == 0  # the twin gets the same id
                name = f"{prefix}{FIRST[source.split] + row - (row % 2 if same else 0)}"
                hub.append({"id": name, "query": question, "response": answers, "image": cell(data, f"image_{row}.png"),
                            "human_ranking": [right, 1 - right], "models": models, "judge": "human", "rationale": "",
                            "query_source": query_source,
                            "ground_truth": item["claims"][right] if families is REASONED else ""})
                released.append({"id": name, "prompt": question, "chosen": answers[right], "rejected": answers[1 - right],
                                 **media, "chosen_reason": "", "rejected_reason": ""})
    both = mixed([list(zip(hub, released))[i:i + 2] for i in range(0, len(hub), 2)], source.rng)  # twins stay together
    hub, released = ([row[k] for row in both] for k in (0, 1))
    source.parquet("data/test-00000-of-00001.parquet", hub, response="strings", image="image", human_ranking="ints",
                   models="strings")
    source.json("data.jsonl", released)


def multimodal_reward_bench(source, rows):
    table, total = [], sum(share for _, _, share, _ in MULTIMODAL_REWARD_BENCH)
    for prefix, category, share, families in MULTIMODAL_REWARD_BENCH:
        for _ in range(max(1, round(share * rows / total / 2))):
            for item in source.twins(families):
                number = FIRST[source.split] + len(table)
                source.save(item, f"data/images/{prefix}/{number}")
                table.append({"ID": f"{prefix}_{number}", "Text": item["question"],
                              "Image": f"images/{prefix}/{number}.png", "Output1": item["answers"][0],
                              "Output2": item["answers"][1], "Better": f"Output{item['right'] + 1}", "Category": category})
    source.json("data/all_data.json", mixed([table[i:i + 2] for i in range(0, len(table), 2)], source.rng))


def mm_rlhf_reward_bench(source, rows):
    """A set of n: n ids with n - 1 rows each; every ordered pair of its answers occurs once as (chosen, rejected)."""
    sets, number = [], FIRST[source.split]
    for category, share in MM_RLHF_REWARD_BENCH.items():
        left = max(6, round(share * rows / sum(MM_RLHF_REWARD_BENCH.values())))
        while left >= 3:
            n = 4 if left >= 12 else 3
            left -= n * (n - 1)
            sets.append([])
            for item in source.twins(MM_RLHF[category], n, "video" if category == "video" else "image"):
                number += 1
                _, media = source.save(item, f"{category}/{number}")
                right = item["answers"][item["right"]]
                sets[-1] += [{"id": f"{number}_62{number}", **media, "prompt": item["question"], "chosen": right,
                              "rejected": wrong, "chosen_reason": "The answer is correct.",
                              "rejected_reason": "The answer is wrong."}
                             for wrong in item["answers"] if wrong != right]
    source.json("mm_reward_bench.jsonl", mixed(sets, source.rng))


def pairs(source, rows):
    """The project's own format. Families in turn: any beginning of the file is balanced. Every 25th set is a video."""
    table = []
    for k in range(rows // 2):
        medium = "video" if k % 25 == 24 else "image"
        for j, item in enumerate(source.twins([world.FAMILIES[k % len(world.FAMILIES)]], medium=medium)):
            files, media = source.save(item, f"pairs/{k}-{j}")
            frames = [f"pairs/{k}-{j}/{t:04d}.png" for t in range(len(files))]
            table.append({"id": f"toy-{source.split}-{k}-{j}", "source": "toy", "question": item["question"],
                          "images": [] if medium == "video" else [media["image"]],
                          "video": frames if medium == "video" else None, "responses": item["answers"],
                          "choice": item["right"] + 1, "attempts": None, "annotation": None, "family": item["family"],
                          "difficulty": item["difficulty"], "medium": medium})
    source.json("pairs.jsonl", table)


# ---------------------------------------------------------------------------------------------------
# Tasks for downstream_grpo.py, to be answered in a word. As many claims as the family has: one answer alone can be true.


def tasks(source, rows):
    made = {}
    for split, n in rows.items():
        source.split, table, sets = split, made.setdefault(split, []), 0
        while len(table) < n:
            family, sets = world.FAMILIES[sets % len(world.FAMILIES)], sets + 1
            items = source.twins([family], 3 if family == "comparison" else 4)
            for item in items if split == "test" else [source.rng.choice(items)]:
                name = f"{split}-{len(table)}"
                (data,), media = source.save(item | {"answers": item["claims"]}, f"images/{name}")
                row = {"id": f"toy-{name}", "question": item["question"], "images": [media["image"]],
                       "answer": item["claims"][item["right"]], "family": family, "difficulty": item["difficulty"]}
                table.append((row, item, data))
        source.json(f"{split}.jsonl", [row for row, _, _ in table])
    vstar(source, made["test"])
    half = len(made["train"]) // 2
    arxivqa(source, made["train"][:half])
    table = [{"id": i, "problem": f"<image>{row['question']}", "answer": row["answer"], "image": data}
             for i, (row, _, data) in enumerate(made["train"][half:])]
    source.parquet("ThinkLite-VL-hard-11k/ThinkLite-VL-Hard-11k.parquet", table, id="int64", image="bytes")


def vstar(source, made):
    table = []
    for i, (row, item, data) in enumerate(made):
        category = "relative_position" if item["family"] == "position" else "direct_attributes"
        options = "".join(f"({letter}) {claim}\n" for letter, claim in zip("ABCD", item["claims"]))
        text = f"{row['question']}\n{options}Answer with the option's letter from the given choices directly."
        table.append({"image": f"{category}/sa_{i}.png", "text": text, "category": category, "question_id": str(i),
                      "label": "ABCD"[item["right"]]})
        source.write(f"vstar_bench/{category}/sa_{i}.png", data)
    source.json("vstar_bench/test_questions.jsonl", table)


def arxivqa(source, made):
    """The label is a letter in most rows and the whole option in some, as in the real file."""
    table = []
    for i, (row, item, data) in enumerate(made):
        options = [f"{letter}. {claim}" for letter, claim in zip("ABCD", item["claims"])]
        table.append({"id": row["id"], "image": f"images/0000.{i:05d}_0.png", "options": options,
                      "question": row["question"],
                      "label": options[item["right"]] if i % 10 == 3 else "ABCD"[item["right"]],
                      "rationale": f"The picture shows {world.describe(item['scene'])}."})
        source.write(f"ArxivQA/images/0000.{i:05d}_0.png", data)
    source.json("ArxivQA/arxivqa.jsonl", table)


# ---------------------------------------------------------------------------------------------------

WRITERS = {"RLAIF-V": rlaif_v, "VLFeedback": vlfeedback, "POVID": povid, "WildVision-Battle": wildvision,
           "MM-RLHF": mm_rlhf, "R1-Reward-RL": r1_reward_rl, "VL-RewardBench": vl_reward_bench,
           "Multimodal-RewardBench": multimodal_reward_bench, "MM-RLHF-RewardBench": mm_rlhf_reward_bench}


def jobs(scale):
    """(split, source, what writes it, rows): all that is built, in order. Rows are even: whole sets of twins."""
    even = lambda rows: max(8, 2 * round(rows * scale / 2))
    n = lambda rows: {k: even(v) for k, v in rows.items()} if isinstance(rows, dict) else even(rows)
    for name, rows in TRAIN.items():
        yield "train", name, WRITERS.get(name, own), n(rows)
    for split, part in (("dev", 0.5), ("test", 1)):
        for name, rows in TEST.items():
            yield split, name, WRITERS.get(name, pairs), n(rows * part)
    yield "tasks", "tasks", tasks, n(TASKS)


def build(root, seed, scale):
    """Writes everything under root and prints a table of it."""
    print(f"{'file':62}{'rows':>7}{'planted':>9}{'seconds':>9}")
    with open(root / "key.jsonl", "w") as key:
        for split, name, writer, rows in jobs(scale):
            started = time.monotonic()
            source = Source(root, split, name, seed)
            writer(source, rows)
            key.writelines(json.dumps(line) + "\n" for line in source.key)
            for i, (path, n) in enumerate(source.files):
                bad = sum(PLANTED[name].values()) if split == "train" and i == 0 else ""
                spent = f"{time.monotonic() - started:9.1f}" if i == 0 else ""  # of all files of the source
                print(f"{(source.folder / path).relative_to(root)!s:62}{n:7}{bad:>9}{spent}", flush=True)
    (root / "train" / "planted.json").write_text(json.dumps(PLANTED, indent=2))


def check(folder, marker):
    """True if the folder holds what would be made; an error if it holds anything else."""
    if not folder.exists() or folder.is_dir() and not any(folder.iterdir()):
        return False
    try:
        made = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        raise SystemExit(f"--out {folder}: is there and was not made by toy/sources.py (it has no {MARKER}); "
                         "choose a folder that is new or empty")
    differs = [f"{k} is {made.get(k)}, asked for is {marker[k]}" for k in marker if made.get(k) != marker[k]]
    if differs:
        raise SystemExit(f"--out {folder}: was made otherwise: {'; '.join(differs)}; "
                         f"choose another folder, or remove this one: rm -r {folder}")
    return True


def parser():
    p = argparse.ArgumentParser(description="The toy world as the paper's training sources and benchmarks.")
    p.add_argument("--out", default="out/toy/data", help="folder to make; one that is there already is never overwritten")
    p.add_argument("--seed", type=int, default=0, help="of every picture and word; the same seed, the same bytes")
    p.add_argument("--scale", type=float, default=1.0, help="1 = about 9,600 training pairs; no source falls below 8 rows")
    return p


def main(words=None):
    args = parser().parse_args(words)
    if not 0 < args.scale < float("inf"):
        raise SystemExit(f"--scale {args.scale}: legal: a number above 0; 1.0 = about 9,600 training pairs")
    out, started = Path(args.out), time.monotonic()
    code = hashlib.sha256(Path(__file__).read_bytes() + Path(world.__file__).read_bytes()).hexdigest()[:12]
    marker = {"seed": args.seed, "scale": args.scale, "version": code}  # a changed world is not taken for the old one
    if check(out, marker):
        print(f"{out}: already there")
        return
    part = out.with_name(out.name + ".tmp")  # renamed when whole: a killed run leaves no half of a data set
    if part.exists() and not (part / MARKER).exists():
        raise SystemExit(f"--out {out}: {part} is in the way and not made by toy/sources.py; move it away")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    (part / MARKER).write_text(json.dumps(marker))
    build(part, args.seed, args.scale)
    part.rename(out)
    print(f"{out}: made in {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    main()
