"""
The toy world as the benchmarks and as the tasks of stage 5, in their schemas. A benchmark holds
full sets of twins, and the items of a set show their answers in one order: so each place is right
in exactly half of the rows.
"""

from toy import world
from toy.source_files import FIRST_ID, MODELS, mix_blocks, picture_cell
from toy.training_sets import GENERAL, MM_RLHF, REASONED, SEEN

# The numbers are rows of the real files; here they are shares.
VL_REWARD_BENCH = {  # how the id begins: (rows, query_source, families)
    "hallucination_pair-": (448, "POVID_preference_data_for_VLLMs", SEEN),
    "mathverse_": (167, "", REASONED),
    "mmmu_pro_test_Chemistry_": (151, "", REASONED),
    "RLAIF-V-": (233, "COCO", SEEN),
    "RLHF-V-": (68, "VQAv2", SEEN),
    "jailbreak-": (7, "jailbreak", GENERAL),
    "svit-conversation-": (1, "svit", GENERAL),
    "politics-": (1, "politics", GENERAL),
    "LRVInstruction-": (1, "LRVInstruction", GENERAL),
    "wildvision-battle-": (173, "wildvision-battle", GENERAL),
}
MULTIMODAL_REWARD_BENCH = [  # (how the ID begins, Category, rows, families)
    ("visitbench", "open_generation/correctness_task", 221, SEEN),
    ("nocaps", "open_generation/correctness_task", 402, SEEN),
    ("visitbench", "open_generation/preference_task", 265, GENERAL),
    ("nocaps", "open_generation/preference_task", 389, GENERAL),
    ("mmmu-s", "knowledge", 330, ["shape", "position"]),
    ("mmmu-v", "knowledge", 300, ["shape", "position"]),
    ("mathvista", "reasoning", 514, ["count"]),
    ("EMMA-Coding", "reasoning", 584, ["comparison"]),
    ("PAIRS", "safety", 508, ["absence"]),
    ("RealworldQA", "vqa", 600, world.FAMILIES),
    ("MMBench", "vqa", 598, world.FAMILIES),
]
MM_RLHF_REWARD_BENCH = {"mcq": 42, "long": 37, "short": 34, "safety": 32, "video": 25}


def share_in_sets(rows, total, count):
    """How many sets of twins play the part of so many rows of the real file."""
    return max(1, round(rows * count / total / 2))


def in_twos(rows):
    return [rows[i : i + 2] for i in range(0, len(rows), 2)]


def vl_reward_bench(source, count):
    """As the hub holds it, and as the paper's repository does."""
    rows = []  # (the hub's row, the other file's)
    for prefix, (share, query_source, families) in VL_REWARD_BENCH.items():
        for k in range(share_in_sets(share, 1250, count)):
            models = source.rng.sample(MODELS, 2)
            first = len(rows)
            for item in source.twins(families):
                # in some sets of reasoning the twin gets the same id
                repeats = families is REASONED and k % 7 == 0
                number = FIRST_ID[source.split] + (first if repeats else len(rows))
                reasoned = {"query_source": query_source, "models": models}
                reasoned["ground_truth"] = ""
                if families is REASONED:
                    reasoned["ground_truth"] = item["claims"][item["right"]]
                rows.append(
                    vl_reward_bench_rows(source, item, f"{prefix}{number}", len(rows), reasoned)
                )
    rows = mix_blocks(in_twos(rows), source.rng)  # twins stay together
    hub = [row for row, _ in rows]
    released = [row for _, row in rows]
    source.parquet(
        "data/test-00000-of-00001.parquet",
        hub,
        response="strings",
        image="image",
        human_ranking="ints",
        models="strings",
    )
    source.json("data.jsonl", released)


def vl_reward_bench_rows(source, item, name, number, about):
    right, question, answers = item["right"], item["question"], item["answers"]
    (data,), media = source.save(item, f"vl_reward/img/image_{number}")
    hub = {
        "id": name,
        "query": question,
        "response": answers,
        "image": picture_cell(data, f"image_{number}.png"),
        "human_ranking": [right, 1 - right],
        "models": about["models"],
        "judge": "human",
        "rationale": "",
        "query_source": about["query_source"],
        "ground_truth": about["ground_truth"],
    }
    released = {
        "id": name,
        "prompt": question,
        "chosen": answers[right],
        "rejected": answers[1 - right],
        **media,
        "chosen_reason": "",
        "rejected_reason": "",
    }
    return hub, released


def multimodal_reward_bench(source, count):
    table = []
    total = sum(share for _, _, share, _ in MULTIMODAL_REWARD_BENCH)
    for prefix, category, share, families in MULTIMODAL_REWARD_BENCH:
        for _ in range(share_in_sets(share, total, count)):
            for item in source.twins(families):
                number = FIRST_ID[source.split] + len(table)
                source.save(item, f"data/images/{prefix}/{number}")
                table.append(
                    {
                        "ID": f"{prefix}_{number}",
                        "Text": item["question"],
                        "Image": f"images/{prefix}/{number}.png",
                        "Output1": item["answers"][0],
                        "Output2": item["answers"][1],
                        "Better": f"Output{item['right'] + 1}",
                        "Category": category,
                    }
                )
    source.json("data/all_data.json", mix_blocks(in_twos(table), source.rng))


def mm_rlhf_reward_bench(source, count):
    """A set of n: n ids of n - 1 rows. Every ordered pair of answers is (chosen, rejected) once."""
    sets = []
    number = FIRST_ID[source.split]  # of the last id
    total = sum(MM_RLHF_REWARD_BENCH.values())
    for category, share in MM_RLHF_REWARD_BENCH.items():
        left = max(6, round(share * count / total))
        medium = "video" if category == "video" else "image"
        while left >= 3:
            n = 4 if left >= 12 else 3
            left -= n * (n - 1)
            rows = []
            for item in source.twins(MM_RLHF[category], n, medium):
                number += 1
                rows += mm_rlhf_reward_bench_rows(source, item, category, number)
            sets.append(rows)
    source.json("mm_reward_bench.jsonl", mix_blocks(sets, source.rng))


def mm_rlhf_reward_bench_rows(source, item, category, number):
    _, media = source.save(item, f"{category}/{number}")
    right = item["answers"][item["right"]]
    rows = []
    for wrong in item["answers"]:
        if wrong != right:
            rows.append(
                {
                    "id": f"{number}_62{number}",
                    **media,
                    "prompt": item["question"],
                    "chosen": right,
                    "rejected": wrong,
                    "chosen_reason": "The answer is correct.",
                    "rejected_reason": "The answer is wrong.",
                }
            )
    return rows


def held_out_pairs(source, count):
    """
    The project's own format. Families take turns, so any beginning of the file is balanced. Every
    25th set is a video.
    """
    table = []
    for k in range(count // 2):
        medium = "video" if k % 25 == 24 else "image"
        family = world.FAMILIES[k % len(world.FAMILIES)]
        for j, item in enumerate(source.twins([family], medium=medium)):
            pictures, media = source.save(item, f"pairs/{k}-{j}")
            images, video = [], None
            if medium == "image":
                images = [media["image"]]
            else:
                video = [f"pairs/{k}-{j}/{t:04d}.png" for t in range(len(pictures))]
            table.append(
                {
                    "id": f"toy-{source.split}-{k}-{j}",
                    "source": "toy",
                    "question": item["question"],
                    "images": images,
                    "video": video,
                    "responses": item["answers"],
                    "choice": item["right"] + 1,
                    "attempts": None,
                    "annotation": None,
                    "family": item["family"],
                    "difficulty": item["difficulty"],
                    "medium": medium,
                }
            )
    source.json("pairs.jsonl", table)


# --------------------------------------------------------------------------------------------------
# Tasks for downstream_grpo.py, to be answered in a word


def tasks(source, counts):
    """The project's own format, and the same tasks once more as V*, arXivQA and ThinkLite-VL."""
    made = {}
    for split, count in counts.items():
        source.split = split
        made[split] = make_tasks(source, split, count)
        source.json(f"{split}.jsonl", [row for row, _, _ in made[split]])
    vstar(source, made["test"])
    half = len(made["train"]) // 2
    arxivqa(source, made["train"][:half])
    thinklite_vl(source, made["train"][half:])


def make_tasks(source, split, count):
    """
    (row, item, bytes of its picture) of each task. An item has as many claims as its family
    allows: only one answer can be true. The test tasks have full sets.
    """
    made, sets = [], 0
    while len(made) < count:
        family = world.FAMILIES[sets % len(world.FAMILIES)]
        sets += 1
        items = source.twins([family], 3 if family == "comparison" else 4)
        if split == "train":
            items = [source.rng.choice(items)]
        for item in items:
            name = f"{split}-{len(made)}"
            (data,), media = source.save(item | {"answers": item["claims"]}, f"images/{name}")
            row = {
                "id": f"toy-{name}",
                "question": item["question"],
                "images": [media["image"]],
                "answer": item["claims"][item["right"]],
                "family": family,
                "difficulty": item["difficulty"],
            }
            made.append((row, item, data))
    return made


def vstar(source, made):
    table = []
    for i, (row, item, data) in enumerate(made):
        category = "relative_position" if item["family"] == "position" else "direct_attributes"
        lines = [row["question"]]
        lines += [f"({letter}) {claim}" for letter, claim in zip("ABCD", item["claims"])]
        lines.append("Answer with the option's letter from the given choices directly.")
        table.append(
            {
                "image": f"{category}/sa_{i}.png",
                "text": "\n".join(lines),
                "category": category,
                "question_id": str(i),
                "label": "ABCD"[item["right"]],
            }
        )
        source.write(f"vstar_bench/{category}/sa_{i}.png", data)
    source.json("vstar_bench/test_questions.jsonl", table)


def arxivqa(source, made):
    """The label is a letter in most rows and the whole option in some, as in the real file."""
    table = []
    for i, (row, item, data) in enumerate(made):
        options = [f"{letter}. {claim}" for letter, claim in zip("ABCD", item["claims"])]
        label = options[item["right"]] if i % 10 == 3 else "ABCD"[item["right"]]
        table.append(
            {
                "id": row["id"],
                "image": f"images/0000.{i:05d}_0.png",
                "options": options,
                "question": row["question"],
                "label": label,
                "rationale": f"The picture shows {world.describe(item['scene'])}.",
            }
        )
        source.write(f"ArxivQA/images/0000.{i:05d}_0.png", data)
    source.json("ArxivQA/arxivqa.jsonl", table)


def thinklite_vl(source, made):
    table = []
    for i, (row, _, data) in enumerate(made):
        problem = f"<image>{row['question']}"
        table.append({"id": i, "problem": problem, "answer": row["answer"], "image": data})
    path = "ThinkLite-VL-hard-11k/ThinkLite-VL-Hard-11k.parquet"
    source.parquet(path, table, id="int64", image="bytes")
