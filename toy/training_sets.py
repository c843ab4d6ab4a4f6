"""
The toy world as the training sources of Table 2, in the schemas that they have on the hub. Each
function writes one source; of each set of twins, one.
"""

import base64
import json

from core.pairs import JUDGING_PROMPT
from toy import world
from toy.source_files import MODELS, damage, picture_cell

# Which families of questions play which part, here and in toy/benchmark_sets.py
SEEN = ["colour", "shape", "absence"]
REASONED = ["count", "comparison"]
GENERAL = ["position"]
MM_RLHF = {
    "long": ["colour", "position", "count"],
    "short": ["shape", "colour", "comparison"],
    "mcq": REASONED,
    "safety": ["absence", "shape"],
    "video": world.FAMILIES,
}
ASPECTS = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")


def rlaif_v(source, count):
    origin = {
        "model": "LLaVA-v1.5-7b",
        "labeller": "LLaVA-NeXT-34b",
        "type": "question answering",
    }
    table = []
    for i, fault, item in source.rows(count):
        (data,) = source.draw(item, fault)
        chosen, rejected = source.preference(item, fault)
        table.append(
            {
                "ds_name": "RLAIF-V",
                "image": picture_cell(data, f"toy-{i}.png", fault),
                "question": item["question"],
                "chosen": chosen,
                "rejected": rejected,
                "origin_dataset": "toy",
                "origin_split": json.dumps(origin),
                "idx": str(i),
                "image_path": f"toy-{i}.png",
            }
        )
    half = len(table) // 2
    source.parquet("RLAIF-V-Dataset_000.parquet", table[:half], image="image")
    source.parquet("RLAIF-V-Dataset_001.parquet", table[half:], image="image")


def vlfeedback(source, count):
    """
    Four answers a prompt. The right one is rated above the wrong ones in each aspect, and these
    alike. In a broken row all are rated alike, and the right one may also have a rating that is no
    number, or be empty: such a row makes no pair.
    """
    table, rng = [], source.rng
    for i, fault, _ in source.rows(count):
        item = rng.choice(source.twins(n=4))
        models = rng.sample(MODELS, 4)
        source.save(item, f"merged_images/svit-conversation-{i}", fault)
        ratings = rate(fault in ("tie", "non-numeric rating", "empty answer"), rng)
        completions = []
        for k, answer in enumerate(item["answers"]):
            right = k == item["right"]
            notes = annotations(ratings, right)
            if right and fault == "non-numeric rating":
                rating = rng.choice(("N/A", ""))
                notes[rng.choice(ASPECTS)]["Rating"] = rating
            if right and fault == "empty answer":
                answer = ""
            completions.append({"annotations": notes, "model": models[k], "response": answer})
        table.append(
            {
                "id": f"svit-conversation-{i}",
                "prompt": item["question"],
                "models": models,
                "completions": completions,
                "img_path": f"svit-conversation-{i}.png",
            }
        )
    source.json("vlfeedback_80k.jsonl", table)


def rate(alike, rng):
    """{aspect: (rating of a wrong answer, of the right one)}"""
    ratings = {}
    for aspect in ASPECTS:
        low = rng.randint(1, 4)
        high = low if alike else rng.randint(low + 1, 5)
        ratings[aspect] = low, high
    return ratings


def annotations(ratings, right):
    notes = {}
    for aspect, (low, high) in ratings.items():
        rating = high if right else low
        notes[aspect] = {"Rating": str(rating), "Rationale": "It says what it sees."}
    return notes


def povid(source, count):
    table = []
    for i, fault, item in source.rows(count):
        source.save(item, f"coco/COCO_train2014_{i:012d}", fault)
        talks = []
        for answer in source.preference(item, fault):
            asked = {"from": "human", "value": f"<image>\n{item['question']}"}
            talks.append([asked, {"from": "gpt", "value": answer}])
        table.append(
            {
                "id": f"hallucination_pair-{i}",
                "image": f"COCO_train2014_{i:012d}.png",
                "conversations": talks[0],
                "rejected_conversations": talks[1],
            }
        )
    source.json("POVID_preference_data_for_VLLMs_version_1.json", table)


def question_of_turns(turns):
    """
    The question that the last turn answers, after what was said before it.

    >>> turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    >>> question_of_turns(turns)
    'Q'
    >>> question_of_turns(turns + turns)
    'user: Q\\nassistant: A\\nuser: Q'
    """
    asked = turns[:-1]
    if len(asked) == 1:
        return asked[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in asked)


def wildvision(source, count):
    table, rng = [], source.rng
    for i, fault, item in source.rows(count):
        model_a, model_b = rng.sample(MODELS, 2)
        best = rng.randrange(2)  # 0: model_a
        turn = 2 if fault == "different histories" or rng.random() < 0.15 else 1
        answers = source.preference(item, fault)
        if best == 1:
            answers.reverse()
        talks = [
            conversation(item["question"], answers[0], turn, "No, a drawing."),
            conversation(
                item["question"],
                answers[1],
                turn,
                "No." if fault == "different histories" else "No, a drawing.",
            ),
        ]
        (data,) = source.draw(item | {"question": question_of_turns(talks[0])}, fault)
        winner = ("model_a", "model_b")[best]
        if fault == "tie":
            winner = rng.choice(("tie", "tie (bothbad)"))
        table.append(
            {
                "question_id": f"{rng.getrandbits(128):032x}",
                "model_a": model_a,
                "model_b": model_b,
                "conversation_a": talks[0],
                "conversation_b": talks[1],
                "language": "English",
                "image": picture_cell(data, f"{i}.png", fault),
                "turn": turn,
                "anony": True,
                "winner": winner,
                "tstamp": 1_715_000_000 + i,
                "judge": "arena_user",
            }
        )
    source.parquet(
        "data/train-00000-of-00001.parquet",
        table,
        conversation_a="turns",
        conversation_b="turns",
        image="image",
        turn="int32",
        anony="bool",
        tstamp="int32",
    )


def conversation(question, answer, turn, first_answer):
    """Question and answer; as a second turn, after a first one."""
    texts = [question, answer]
    if turn == 2:
        texts = ["Is this a photograph?", first_answer, *texts]
    roles = ("user", "assistant")
    return [{"role": roles[t % 2], "content": text} for t, text in enumerate(texts)]


def mm_rlhf(source, counts):
    """Two to four answers a prompt. The wrong ones share a rank: each pair has the right one."""
    rng, left = source.rng, dict(counts)
    # rows() draws items too, which are not used here; without these draws every byte would change
    faults = [fault for _, fault, _ in source.rows(0)]
    prompts = []
    while faults or any(left.values()):
        name = f"{len(prompts):06d}"
        if faults:
            fault = faults.pop()
            prompts.append(mm_rlhf_prompt(source, name, rng.choice(list(left)), 2, fault))
        else:
            category = next(category for category in left if left[category])
            n = min(rng.choice((2, 2, 3, 4)), left[category] + 1)
            prompts.append(mm_rlhf_prompt(source, name, category, n, None))
            left[category] -= n - 1
    rng.shuffle(prompts)
    rows = []
    for rows_of_prompt in prompts:
        rows += rows_of_prompt
    source.json("dpo_pairs.jsonl", rows)


def mm_rlhf_prompt(source, name, category, n, fault):
    """The rows of a prompt with n answers."""
    rng = source.rng
    video = fault == "missing frames"
    if not fault and category in ("long", "short"):
        video = rng.random() < 0.08
    item = rng.choice(source.twins(MM_RLHF[category], n, "video" if video else "image"))
    stem = f"{category}/clip-{name}" if video else f"{category}/{name}"
    _, media = source.save(item, stem, fault)
    right = item["answers"][item["right"]]
    pairs = [(right, answer) for answer in item["answers"] if answer != right]
    if fault:
        pairs = [source.preference(item, fault)]
    rows = []
    for chosen, rejected in pairs:
        row = {
            "id": f"{name}_62{name}",
            **media,
            "prompt": item["question"],
            "chosen": chosen,
            "rejected": rejected,
        }
        if rng.random() < 0.5:
            row["chosen_reason"] = "The answer is correct."
            row["rejected_reason"] = "The answer is wrong."
        if fault == "tie" or rng.random() < 0.2:
            row |= {"is_tie": fault == "tie", "ls_factor": 1.0}
        rows.append(row)
    return rows


def r1_reward_rl(source, count):
    """
    The released RL set, as the authors' README shows it (pictures apart) and as the hub holds it
    (pictures inside).
    """
    head = JUDGING_PROMPT.partition("[Question]:")[0]
    output_format = JUDGING_PROMPT.splitlines()[-1]
    tail = f"  \n\n###### **Output Format (strictly follow):**  \n{output_format}"
    rows, pictures = [], []
    for i, fault, item in source.rows(count):
        choice = source.rng.choice((1, 2))
        name = f"RLAIF-V-image/toy-{i}"
        files, _ = source.save(item, name, fault)
        answers = source.preference(item, fault)
        if choice == 2:
            answers.reverse()
        text = (
            f"{head}###### [Question]:\n{item['question']}  \n\n"
            f"###### [Response 1]:\n{answers[0]}  \n\n#### [Response 2]:\n{answers[1]}"
        )
        if i % 2:
            text += tail
        content = [
            {"type": "text", "text": text},
            {"type": "image", "image": f"/authors/disk/{name}.png"},
        ]
        verdict = "" if fault == "no verdict" else choice
        rows.append(
            {
                "message": json.dumps([{"role": "user", "content": content}]),
                "question": item["question"],
                "answer": [f"<answer>{verdict}</answer>"],
            }
        )
        data = damage(files[0], fault)
        pictures.append(None if data is None else base64.b64encode(data).decode())
    source.json("R1-Reward-RL.jsonl", rows)
    table = []
    for row, picture in zip(rows, pictures):
        columns = {name: row[name] for name in ("question", "message", "answer")}
        table.append(columns | {"image": picture})
    source.parquet("data/train-00000-of-00001.parquet", table, answer="strings")


def own_pairs(source, count):
    """People's own data. Every fourth row has no picture: its prompt describes the scene."""
    table = []
    for i, fault, item in source.rows(count):
        if i % 4 == 3 and fault not in ("missing image", "unreadable image"):
            item = source.rng.choice(source.twins(medium="text"))
        _, media = source.save(item, f"pairs/{i}", fault)
        chosen, rejected = source.preference(item, fault)
        row = {"id": f"own-{i}", "prompt": item["question"], "chosen": chosen}
        table.append(row | {"rejected": rejected} | media)
    source.json("pairs.jsonl", table)
