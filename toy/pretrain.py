"""
The toy base model: what Qwen2.5-VL-7B-Instruct is to the paper.

It sees (captions), answers short questions, reads and copies text, and judges whether the end of a
reasoning leads to a verdict, so that, behind a server, it can be the consistency judge. It has
never compared two responses: that is left to sft.py and rl.py. It is no stage of the paper, so it
is plain torch in one process.

What made it cheap, in order: a first phase that only repeats words (the copying heads that the rest
depends on form within 150 steps so, and took several hundred in the mixture); several questions on
one picture in one dialogue; Muon for the matrices; pictures that grow harder; a batch in two halves
by length.

$ python toy/pretrain.py --out out/toy/base         # train one; prints what it can do at the end
$ python toy/pretrain.py --measure out/toy/base     # what one that exists can do
"""

import random
import sys
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from core.flags import command_line
from core.pairs import JUDGING_PROMPT
from core.sampler import forbidden_token_ids
from judge import CONSISTENCY_PROMPT
from stable_reinforce import parse_consistency
from toy import model as toy_model
from toy import world

FRAMES = {"image": 1, "video": 4, "text": 0}
GRAIN = 34  # less than the hardest pictures have: a base model has seen easier ones than it judges
WORDS = [
    *(*world.SHAPES, *world.COLOURS, *world.COUNTS, *world.PLACES, "1", "2", "nothing", "equal"),
    *("missing", "first", "second", "<think>", "</think>", "<answer>", "</answer>", "Claims:"),
    *("Correct:", "Response", "is better.", "Let me look"),
]

# --------------------------------------------------------------------------------------------------
# What it is taught. A dialogue is {"images": [arrays], "video": whether they are frames,
# "turns": [(the user's text, the reply), ...]}.


def dialogue_about(item, turns, rng, **drawn):
    """A dialogue that begins with an item's picture or frames."""
    pictures = []
    for _ in range(FRAMES[item["medium"]]):
        pictures.append(world.draw(item["scene"], item["difficulty"], rng, **drawn))
    return {"images": pictures, "video": item["medium"] == "video", "turns": turns}


def dialogue_without_picture(turns):
    return {"images": [], "video": False, "turns": turns}


def what_is_shown(medium):
    return f"What does the {medium} show?"


def what_shows(item, claim):
    """A question and its reply: the evidence for a claim."""
    return f"{item['question']} What shows it?", world.evidence(item, item["scene"], claim)


def see(rng, hardest=1.0):
    """A picture: questions about it, and its description somewhere among them."""
    medium = rng.choice(("image",) * 7 + ("video", "text", "text"))
    n = rng.choice((2, 3))
    item = rng.choice(world.twins(rng, n=n, medium=medium, difficulty=hardest * rng.random()))
    claim = item["claims"][item["right"]]
    turns = [(item["question"], claim)]
    more = world.questions_about(item["scene"])
    for kind in rng.sample(sorted(more), min(len(more), rng.randrange(3, 7))):
        turns.append(rng.choice(more[kind]))
    turns.append(what_shows(item, claim))
    if medium != "text":  # a text describes its scene in the first question, which must stay first
        rng.shuffle(turns)
        # the description comes last half of the time: questions after it can be answered from it
        # and teach no sight
        last = rng.random() < 0.5
        place = len(turns) if last else rng.randrange(len(turns))
        turns.insert(place, (what_is_shown(medium), world.describe(item["scene"])))
    return dialogue_about(item, turns, rng, grain=GRAIN)


def read(rng, hardest=1.0):
    """
    Two responses to a question: what each says, what each claims. Half of the time in the long
    judging prompt, with a picture.
    """
    long = rng.random() < 0.5
    item = rng.choice(world.twins(rng, difficulty=hardest * rng.random()))
    first, second = item["answers"]
    question = item["question"]
    turns = []
    for k in (0, 1):
        turns.append((f"What does Response {k + 1} say?", item["answers"][k]))
        turns.append((f"What does Response {k + 1} claim?", item["claims"][k]))
    for claim, place in zip(item["claims"], ("first", "second")):
        turns.append((f"Which response claims {claim}?", place))
    if long:
        claim = item["claims"][item["right"]]
        turns.append((question, claim))
        turns.append((what_is_shown("image"), world.describe(item["scene"])))
        turns.append(what_shows(item, claim))
    rng.shuffle(turns)
    context = f"[Question]: {question}; [Response 1]: {first}; [Response 2]: {second}"
    if long:
        context = JUDGING_PROMPT.format(question=question, answer1=first, answer2=second)
    turns[0] = (f"{context}\n\n{turns[0][0]}", turns[0][1])
    if long:
        return dialogue_about(item, turns, rng, grain=GRAIN)
    return dialogue_without_picture(turns)


def repeat(rng, hardest=1.0):
    text = " ".join(rng.choice(WORDS) for _ in range(rng.randrange(4, 16)))
    return dialogue_without_picture([(f"Repeat: {text}", text)])


def consistency(rng, hardest=1.0):
    """The consistency judge's question, about the whole of a reasoning or its end."""
    medium = rng.choice(("image", "image", "video", "text"))
    item = rng.choice(world.twins(rng, medium=medium))
    shown, verdict = rng.sample((0, 1), 2), rng.choice((1, 2))
    text = world.judgement(item, shown, verdict, rng.choice(world.MANNERS[:3]))
    words = text[len("<think>") : text.index("</think>")].split()
    reasoning = " ".join(words[-rng.choice((4, 8, 12, 16, 100)) :])
    choice = rng.choice((1, 2))
    question = CONSISTENCY_PROMPT.format(reasoning=reasoning, choice=choice)
    agrees = reasoning.endswith(f"Response {choice} is better.")
    return dialogue_without_picture([(question, "yes" if agrees else "no")])


TASKS = {see: 0.5, read: 0.34, repeat: 0.08, consistency: 0.08}  # shares of the dialogues


def judging(item, shown, manner, rng):
    """
    Table 1's prompt with an annotator's right judgement: not for the base model, for those that
    come after it.
    """
    first, second = (item["answers"][i] for i in shown)
    text = JUDGING_PROMPT.format(question=item["question"], answer1=first, answer2=second)
    right = shown.index(item["right"]) + 1
    turns = [(text, world.judgement(item, shown, right, manner))]
    return dialogue_about(item, turns, rng)


# --------------------------------------------------------------------------------------------------
# Dialogues -> tensors -> texts


def messages_of(dialogue):
    media = [{"type": "image"}] * len(dialogue["images"])
    if dialogue["video"]:
        media = [{"type": "video"}]
    messages = []
    for text, reply in dialogue["turns"]:
        messages.append({"role": "user", "content": [*media, {"type": "text", "text": text}]})
        messages.append({"role": "assistant", "content": reply})
        media = []  # only in the first turn
    return messages


def encode(processor, dialogues, replies=True):
    """
    A batch of inputs. With replies, it has labels: -100 everywhere but on the replies and their
    <|im_end|>. Without, it is to generate from.
    """
    texts, images, videos = [], [], []
    for dialogue in dialogues:
        messages = messages_of(dialogue)
        if replies:
            text = processor.apply_chat_template(messages, tokenize=False)
        else:
            text = processor.apply_chat_template(
                messages[:-1], tokenize=False, add_generation_prompt=True
            )
        texts.append(text)
        frames = [torch.from_numpy(image).permute(2, 0, 1) for image in dialogue["images"]]
        if dialogue["video"]:
            videos.append(torch.stack(frames))
        else:
            images += frames
    options = {"videos_kwargs": {"do_sample_frames": False}} if videos else {}
    batch = processor(
        text=texts,
        images=images or None,
        videos=videos or None,
        padding=True,
        padding_side="right" if replies else "left",
        return_tensors="pt",
        **options,
    )
    batch.pop("second_per_grid_ts", None)  # 2 frames a second is the model's default too
    if replies:
        on_reply = reply_mask(batch["input_ids"], processor.tokenizer)
        batch["labels"] = batch["input_ids"].where(on_reply, -100)
    return batch


def reply_mask(ids, tokenizer):
    """Which tokens belong to a reply: from its first token to its <|im_end|>."""
    names = ["<|im_start|>", "assistant", "<|im_end|>"]
    start, assistant, end = tokenizer.convert_tokens_to_ids(names)
    begins = torch.zeros_like(ids, dtype=torch.bool)
    after_end = torch.zeros_like(begins)
    # a reply follows <|im_start|>, assistant and a newline
    is_start, is_assistant = ids == start, ids == assistant
    begins[:, 3:] = is_start[:, :-3] & is_assistant[:, 1:-2]
    after_end[:, 1:] = ids[:, :-1] == end
    return last_place(begins) > last_place(after_end)


def last_place(marks):
    """Where the last mark up to each place is; -1 before the first one."""
    places = torch.arange(marks.shape[1])
    return torch.where(marks, places, -1).cummax(1).values


@torch.no_grad()
def generate(
    model, processor, dialogues, max_new_tokens=90, temperature=0.0, seed=0, prefix="", batch=100
):
    """The replies to the first turns; prefix: how each reply is made to begin."""
    model.eval()
    torch.manual_seed(seed)
    tokenizer = processor.tokenizer
    forbidden = forbidden_token_ids(processor, len(tokenizer))
    sampling = {"do_sample": False}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    texts = []
    for start in range(0, len(dialogues), batch):
        asked = dialogues[start : start + batch]
        asked = [dialogue | {"turns": dialogue["turns"][:1]} for dialogue in asked]
        inputs = encode(processor, asked, replies=False)
        if prefix:
            append_tokens(inputs, tokenizer(prefix)["input_ids"])
        out = model.generate(
            **inputs,
            **sampling,
            repetition_penalty=1.0,
            max_new_tokens=max_new_tokens,
            suppress_tokens=forbidden,
        )
        out = out[:, inputs["input_ids"].shape[1] :]
        replies = tokenizer.batch_decode(out, skip_special_tokens=True)
        texts += [prefix + reply for reply in replies]
    return texts


def append_tokens(inputs, ids):
    """The same text tokens after each row of a batch."""
    ids = torch.tensor(ids).expand(len(inputs["input_ids"]), -1)
    more = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": torch.zeros_like(ids),
    }
    for name, tokens in more.items():
        inputs[name] = torch.cat([inputs[name], tokens], 1)


# --------------------------------------------------------------------------------------------------
# Training


def rough_length(dialogue):
    return sum(len(text) + len(reply) + 40 for text, reply in dialogue["turns"])


def update(model, processor, dialogues, optimizers):
    """
    One step on the mean loss over the reply tokens of a batch, in two halves by length: that saves
    padding.
    """
    dialogues = sorted(dialogues, key=rough_length)
    half = len(dialogues) // 2
    halves = [part for part in (dialogues[:half], dialogues[half:]) if part]
    parts = [encode(processor, part) for part in halves]
    tokens = sum((part["labels"] != -100).sum() for part in parts)
    total = 0.0
    for part in parts:
        labels = part.pop("labels")[:, 1:]
        on_reply = labels != -100
        logits = model(**part).logits[:, :-1][on_reply]
        loss = torch.nn.functional.cross_entropy(logits, labels[on_reply], reduction="sum") / tokens
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return total


class Progress:
    """Prints the mean loss every few steps."""

    def __init__(self, steps, every):
        self.steps = steps
        self.every = every
        self.losses = []
        self.start = time.time()

    @property
    def seconds(self):
        return time.time() - self.start

    def add(self, step, loss):
        """step: how many are done."""
        self.losses.append(loss)
        if step % self.every == 0 or step == self.steps:
            mean = sum(self.losses) / len(self.losses)
            print(f"step {step}/{self.steps}  loss {mean:.3f}  {self.seconds:.0f} s", flush=True)
            self.losses = []


def train(model, processor, batches, steps, lr_matrix=0.02, lr=3e-3, decay_from=0.5, log_every=100):
    """
    Muon for the matrices, AdamW for the rest; the rates rise for 20 steps, stay, then fall
    linearly. batches(share of the training that is done) returns the dialogues of a step.
    """
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and "embed_tokens" not in name
        (matrices if is_matrix else others).append(parameter)
    optimizers = [
        torch.optim.Muon(matrices, lr=lr_matrix, momentum=0.95, weight_decay=0.05),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0),
    ]
    progress = Progress(steps, log_every)
    for step in range(steps):
        done = step / steps
        left = min(1, (1 - done) / (1 - decay_from))
        height = min((step + 1) / 20, 0.03 + 0.97 * left)
        model.train()
        for optimizer, peak in zip(optimizers, (lr_matrix, lr)):
            set_rate(optimizer, peak * height)
        loss = update(model, processor, batches(done), optimizers)
        progress.add(step + 1, loss)
    return progress.seconds


def set_rate(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def pretrain(model, processor, args):
    rng = random.Random(f"{args.seed} pretrain")

    def batches(done):
        if done * args.steps < 100:
            return [repeat(rng) for _ in range(args.batch)]
        hardest = min(1.0, 0.1 + 0.9 * done / 0.4)  # pictures grow harder over the first 40 %
        tasks = rng.choices(list(TASKS), TASKS.values(), k=args.batch)
        return [task(rng, hardest) for task in tasks]

    return train(model, processor, batches, args.steps)


# --------------------------------------------------------------------------------------------------
# What it can do


def measure(model, processor, n=600, seed=1):
    """{figure: share right} on fresh pictures of all difficulties."""
    rng, right = random.Random(f"{seed} measure"), defaultdict(list)
    items = [rng.choice(world.twins(rng, n=rng.choice((2, 3)))) for _ in range(n)]
    questions = [dialogue_about(item, [(item["question"], "")], rng) for item in items]
    for item, reply in zip(items, generate(model, processor, questions, 8)):
        hit = reply.strip() == item["claims"][item["right"]]
        right["short answers"].append(hit)
        right[f"short answers, {world.third_of(item)} third"].append(hit)
        right[f"short answers, {item['family']}"].append(hit)
    questions = [dialogue_about(item, [(what_is_shown("image"), "")], rng) for item in items]
    for item, reply in zip(items, generate(model, processor, questions, 20)):
        cells = world.describe(item["scene"]).split(", ")
        described = [*reply.strip().split(", "), *[None] * 4]
        hits = [cell == other for cell, other in zip(cells, described)]
        right["captions, cells"] += hits
        right[f"captions, cells, {world.third_of(item)} third"] += hits
    for task, normal in ((read, str.strip), (repeat, str.strip), (consistency, parse_consistency)):
        dialogues = [task(rng) for _ in range(n // 2)]
        for dialogue, reply in zip(dialogues, generate(model, processor, dialogues, 60)):
            expected = dialogue["turns"][0][1]
            right[task.__name__].append(normal(reply) == normal(expected))
    right["two responses in the format: first choice"] = forced_choice(model, processor, rng, n)
    return {figure: sum(hits) / len(hits) for figure, hits in right.items()}


@torch.no_grad()
def forced_choice(model, processor, rng, n):
    """
    Whether the likelier verdict, after the judging prompt and an empty thought, is right: half of
    the time by chance.
    """
    hits = []
    one, two = processor.tokenizer.convert_tokens_to_ids(["1", "2"])
    for _ in range(n // 100):
        items = []
        for _ in range(50):
            items += world.twins(rng)
        orders = [rng.sample((0, 1), 2) for _ in items]
        dialogues = []
        for item, shown in zip(items, orders):
            dialogue = judging(item, shown, "hasty", rng)
            prompt, _ = dialogue["turns"][0]
            dialogues.append(dialogue | {"turns": [(prompt, "<think></think><answer>")]})
        batch = encode(processor, dialogues)
        batch.pop("labels")
        before_end = batch["attention_mask"].sum(1) - 3  # before <|im_end|> and the newline
        logits = model.eval()(**batch).logits[torch.arange(len(items)), before_end]
        for item, shown, row in zip(items, orders, logits):
            likelier = shown[1] if row[two] > row[one] else shown[0]
            hits.append(likelier == item["right"])
    return hits


def parser():
    p = command_line(__doc__)
    add = p.add_argument
    add("--out", help="folder to write the model to; it must not exist")
    add("--measure", metavar="FOLDER", help="only measure the model in this folder")
    add("--steps", type=int, default=2400, help="updates; the first 100 only repeat words")
    add("--batch", type=int, default=32, help="dialogues an update")
    add("--hidden", type=int, default=128, help="width; a multiple of 64")
    add("--seed", type=int, default=0, help="of weights and dialogues")
    return p


def main():
    p = parser()
    args = p.parse_args()
    if bool(args.out) == bool(args.measure):
        p.error("give either --out FOLDER (train) or --measure FOLDER")
    if args.measure:
        model, processor = toy_model.load(args.measure)
    else:
        if Path(args.out).exists():
            p.error(f"--out {args.out} exists; remove it or choose another folder")
        model, processor = toy_model.make(None, args.seed, hidden=args.hidden)
        seconds = pretrain(model, processor, args)
        toy_model.save(model, processor, args.out)
        parameters = sum(p.numel() for p in model.parameters())
        threads = torch.get_num_threads()
        print(f"{args.out}: {parameters:,} parameters, {seconds:.0f} s on {threads} threads")
    for figure, share in measure(model, processor).items():
        print(f"{figure:45s} {100 * share:5.1f} %")


if __name__ == "__main__":
    main()
