"""
The toy base model: what Qwen2.5-VL-7B-Instruct is to the paper.

It sees (captions), answers short questions, reads and copies text, and judges whether the end of a reasoning leads to a
verdict, so that, behind a server, it can be the consistency judge. It has never compared two responses: that is left to
sft.py and rl.py. Plain torch on purpose, one process, no engine: this file is no stage of the paper.

What made it cheap, in order: a first phase of nothing but repeating words (the copying heads that everything else stands on
form within 150 steps so, and took several hundred in the mixture); several questions on one picture in one dialogue;
Muon for the matrices; pictures that grow harder; a batch in two halves by length.

$ python toy/pretrain.py --out out/toy/base                       # make one; prints the table of --measure at the end
$ python toy/pretrain.py --measure out/toy/base                   # the figures of one that is there
"""
import argparse
import random
import sys
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: `toy` is found from the folder above
import torch

from annotate import JUDGING_PROMPT
from judge import CONSISTENCY_PROMPT
from stable_reinforce import parse_consistency
from toy import model as toy_model, world

FRAMES = {"image": 1, "video": 4, "text": 0}
GRAIN = 34  # less than the world's hardest pictures have: a base model has seen milder ones than those it is to judge

# ---------------------------------------------------------------------------------------------------
# What it is taught. A dialogue is {"images": [arrays], "video": bool, "turns": [(user's text, reply), ...]}.


def look(item, turns, rng, **drawn):
    """A dialogue that begins with an item's picture or frames."""
    pictures = [world.draw(item["scene"], item["difficulty"], rng, **drawn) for _ in range(FRAMES[item["medium"]])]
    return {"images": pictures, "video": item["medium"] == "video", "turns": turns}


def ask_of(medium):
    return f"What does the {medium} show?"


def why(item, claim):
    return f"{item['question']} What shows it?", world.evidence(item, item["scene"], claim)


def see(rng, hardest=1.0):
    """A picture: questions about it, and its description somewhere among them."""
    medium = rng.choice(("image",) * 7 + ("video", "text", "text"))
    item = rng.choice(world.twins(rng, n=rng.choice((2, 3)), medium=medium, difficulty=hardest * rng.random()))
    claim = item["claims"][item["right"]]
    turns = [(item["question"], claim)]
    more = world.questions_about(item["scene"])
    turns += [rng.choice(more[kind]) for kind in rng.sample(sorted(more), min(len(more), rng.randrange(3, 7)))]
    turns.append(why(item, claim))
    if medium != "text":  # a text-only picture is told in the first question, which must stay the first
        rng.shuffle(turns)
        # the description comes last half of the time: what comes after it can be looked up there and teaches no sight
        turns.insert(len(turns) if rng.random() < 0.5 else rng.randrange(len(turns)), (ask_of(medium), world.describe(item["scene"])))
    return look(item, turns, rng, grain=GRAIN)


def read(rng, hardest=1.0):
    """Two responses to a question: what each says, what each claims; half of the time in the long judging prompt, with a picture."""
    long = rng.random() < 0.5
    item = rng.choice(world.twins(rng, difficulty=hardest * rng.random()))
    a, b = item["answers"]
    turns = [(f"What does Response {k + 1} {verb}?", item[kind][k])
             for k in (0, 1) for verb, kind in (("say", "answers"), ("claim", "claims"))]
    turns += [(f"Which response claims {item['claims'][k]}?", ("first", "second")[k]) for k in (0, 1)]
    if long:
        claim = item["claims"][item["right"]]
        turns += [(item["question"], claim), (ask_of("image"), world.describe(item["scene"])), why(item, claim)]
    rng.shuffle(turns)
    pair = f"[Question]: {item['question']}; [Response 1]: {a}; [Response 2]: {b}"
    context = JUDGING_PROMPT.format(question=item["question"], answer1=a, answer2=b) if long else pair
    turns[0] = (f"{context}\n\n{turns[0][0]}", turns[0][1])
    return look(item if long else {"medium": "text"}, turns, rng, grain=GRAIN)


def repeat(rng, hardest=1.0):
    words = [*world.SHAPES, *world.COLOURS, *world.COUNTS, *world.PLACES, "1", "2", "nothing", "equal", "missing", "first", "second",
             "<think>", "</think>", "<answer>", "</answer>", "Claims:", "Correct:", "Response", "is better.", "Let me look"]
    text = " ".join(rng.choice(words) for _ in range(rng.randrange(4, 16)))
    return look({"medium": "text"}, [(f"Repeat: {text}", text)], rng)


def consistency(rng, hardest=1.0):
    """The consistency judge's question, about the whole of a reasoning or its end."""
    item = rng.choice(world.twins(rng, medium=rng.choice(("image", "image", "video", "text"))))
    text = world.judgement(item, rng.sample((0, 1), 2), rng.choice((1, 2)), rng.choice(world.MANNERS[:3]))
    words = text[len("<think>"):text.index("</think>")].split()
    reasoning, choice = " ".join(words[-rng.choice((4, 8, 12, 16, 100)):]), rng.choice((1, 2))
    question = CONSISTENCY_PROMPT.format(reasoning=reasoning, choice=choice)
    agrees = reasoning.endswith(f"Response {choice} is better.")
    return look({"medium": "text"}, [(question, "yes" if agrees else "no")], rng)


TASKS = {see: 0.5, read: 0.34, repeat: 0.08, consistency: 0.08}  # shares of the dialogues


def judging(item, shown, manner, rng):
    """Table 1's prompt with an annotator's right judgement: not for the base model, for those that come after it."""
    a, b = (item["answers"][i] for i in shown)
    text = JUDGING_PROMPT.format(question=item["question"], answer1=a, answer2=b)
    return look(item, [(text, world.judgement(item, shown, shown.index(item["right"]) + 1, manner))], rng)


# ---------------------------------------------------------------------------------------------------
# Dialogues -> tensors -> texts


def encode(processor, dialogues, replies=True):
    """A batch of inputs. With replies: and labels, -100 but on the replies and their <|im_end|>. Without: to generate."""
    texts, images, videos = [], [], []
    for d in dialogues:
        media = [{"type": "video"}] if d["video"] else [{"type": "image"}] * len(d["images"])
        messages = []
        for text, reply in d["turns"]:
            messages.append({"role": "user", "content": (media if not messages else []) + [{"type": "text", "text": text}]})
            messages.append({"role": "assistant", "content": reply})
        texts.append(processor.apply_chat_template(messages if replies else messages[:-1], tokenize=False,
                                                   add_generation_prompt=not replies))
        frames = [torch.from_numpy(i).permute(2, 0, 1) for i in d["images"]]
        videos += [torch.stack(frames)] if d["video"] else []
        images += [] if d["video"] else frames
    batch = processor(text=texts, images=images or None, videos=videos or None, padding=True, return_tensors="pt",
                      padding_side="right" if replies else "left",
                      **({"videos_kwargs": {"do_sample_frames": False}} if videos else {}))
    batch.pop("second_per_grid_ts", None)  # metadata of the frames' times: 2 frames a second is the model's default too
    if replies:
        ids = batch["input_ids"]
        start, role, end = processor.tokenizer.convert_tokens_to_ids(["<|im_start|>", "assistant", "<|im_end|>"])
        begins, ends = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
        begins[:, 3:] = (ids[:, :-3] == start) & (ids[:, 1:-2] == role)  # <|im_start|>, assistant, newline, then the reply
        ends[:, 1:] = ids[:, :-1] == end
        last = lambda marks: torch.where(marks, torch.arange(ids.shape[1]), -1).cummax(1).values
        batch["labels"] = torch.where(last(begins) > last(ends), ids, -100)
    return batch


@torch.no_grad()
def generate(model, processor, dialogues, max_new_tokens=90, temperature=0.0, seed=0, prefix="", batch=100):
    """The replies to the first turns; prefix = how each reply is made to begin."""
    model.eval()
    torch.manual_seed(seed)
    barred = [[processor.tokenizer.convert_tokens_to_ids(t)] for t in toy_model.SPECIAL if "vision" in t or "pad" in t]
    texts = []
    for i in range(0, len(dialogues), batch):
        inputs = encode(processor, [dict(d, turns=d["turns"][:1]) for d in dialogues[i:i + batch]], replies=False)
        if prefix:
            ids = torch.tensor(processor.tokenizer(prefix)["input_ids"]).expand(len(inputs["input_ids"]), -1)
            for name, more in dict(input_ids=ids, attention_mask=ids * 0 + 1, mm_token_type_ids=ids * 0).items():
                inputs[name] = torch.cat([inputs[name], more], 1)
        sampling = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0) if temperature else dict(do_sample=False)
        out = model.generate(**inputs, max_new_tokens=max_new_tokens, bad_words_ids=barred, **sampling)
        out = out[:, inputs["input_ids"].shape[1]:]
        texts += [prefix + text for text in processor.tokenizer.batch_decode(out, skip_special_tokens=True)]
    return texts


def update(model, processor, dialogues, optimizers):
    """One step on the mean loss over the reply tokens of the batch, taken in two halves by length to save padding."""
    dialogues = sorted(dialogues, key=lambda d: sum(len(text) + len(reply) + 40 for text, reply in d["turns"]))
    half = len(dialogues) // 2
    parts = [encode(processor, part) for part in (dialogues[:half], dialogues[half:]) if part]
    tokens = sum((part["labels"] != -100).sum() for part in parts)
    total = 0.0
    for part in parts:
        labels = part.pop("labels")[:, 1:]
        logits = model(**part).logits[:, :-1][labels != -100]
        loss = torch.nn.functional.cross_entropy(logits, labels[labels != -100], reduction="sum") / tokens
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return total


def train(model, processor, batches, steps, lr_matrix=0.02, lr=3e-3, decay_from=0.5, log_every=100):
    """Muon for the matrices, AdamW for the rest; warm-up over 20 steps, then flat, then linear decay. batches(share done)."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in name]
    held = {id(p) for p in matrices}
    optimizers = [torch.optim.Muon(matrices, lr=lr_matrix, momentum=0.95, weight_decay=0.05),
                  torch.optim.AdamW([p for p in model.parameters() if id(p) not in held], lr=lr, betas=(0.9, 0.98), weight_decay=0)]
    start, recent = time.time(), []
    for step in range(steps):
        done = step / steps
        model.train()
        for optimizer, peak in zip(optimizers, (lr_matrix, lr)):
            for group in optimizer.param_groups:
                group["lr"] = peak * min((step + 1) / 20, 0.03 + 0.97 * min(1, (1 - done) / (1 - decay_from)))
        recent.append(update(model, processor, batches(done), optimizers))
        if (step + 1) % log_every == 0 or step + 1 == steps:
            print(f"step {step + 1}/{steps}  loss {sum(recent) / len(recent):.3f}  {time.time() - start:.0f} s", flush=True)
            recent = []
    return time.time() - start


# ---------------------------------------------------------------------------------------------------
# What it can do


def measure(model, processor, n=600, seed=1):
    """{figure: share right} on fresh pictures of all difficulties."""
    rng, right = random.Random(f"{seed} measure"), defaultdict(list)
    items = [rng.choice(world.twins(rng, n=rng.choice((2, 3)))) for _ in range(n)]
    third = lambda item: ("easy", "middle", "hard")[min(2, int(3 * item["difficulty"]))]
    said = generate(model, processor, [look(i, [(i["question"], "")], rng) for i in items], 8)
    for item, text in zip(items, said):
        for row in ("short answers", f"short answers, {third(item)} third", f"short answers, {item['family']}"):
            right[row].append(text.strip() == item["claims"][item["right"]])
    said = generate(model, processor, [look(i, [(ask_of("image"), "")], rng) for i in items], 20)
    for item, text in zip(items, said):
        cells, told = world.describe(item["scene"]).split(", "), text.strip().split(", ")
        for row in ("captions, cells", f"captions, cells, {third(item)} third"):
            right[row] += [a == b for a, b in zip(cells, told + [None] * 4)]
    for task, same in ((read, None), (repeat, None), (consistency, parse_consistency)):
        dialogues = [task(rng) for _ in range(n // 2)]
        for d, text in zip(dialogues, generate(model, processor, dialogues, 60)):
            right[task.__name__].append((same or str.strip)(text) == (same or str.strip)(d["turns"][0][1]))
    right["two responses in the format: first choice"] = forced_choice(model, processor, rng, n)
    return {row: sum(hits) / len(hits) for row, hits in right.items()}


@torch.no_grad()
def forced_choice(model, processor, rng, n):
    """Is "1" or "2" the likelier verdict after the judging prompt and an empty thought? Half right by chance."""
    hits, ids = [], [processor.tokenizer.convert_tokens_to_ids(c) for c in "12"]
    for _ in range(n // 100):
        items = [item for _ in range(50) for item in world.twins(rng)]
        shown = [rng.sample((0, 1), 2) for _ in items]
        dialogues = [judging(item, s, "hasty", rng) for item, s in zip(items, shown)]
        for d in dialogues:
            d["turns"] = [(d["turns"][0][0], "<think></think><answer>")]
        batch = encode(processor, dialogues)
        batch.pop("labels")
        at = batch["attention_mask"].sum(1) - 3  # before <|im_end|> and the newline
        logits = model.eval()(**batch).logits[torch.arange(len(items)), at]
        hits += [s[int(l[ids[1]] > l[ids[0]])] == item["right"] for l, s, item in zip(logits, shown, items)]
    return hits


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", help="folder to write the model to; it must not exist")
    p.add_argument("--measure", metavar="FOLDER", help="only measure the model in this folder")
    p.add_argument("--steps", type=int, default=2400, help="updates; the first 100 only repeat words")
    p.add_argument("--batch", type=int, default=32, help="dialogues an update")
    p.add_argument("--hidden", type=int, default=128, help="width; a multiple of 64")
    p.add_argument("--seed", type=int, default=0, help="of weights and dialogues")
    return p


def main():
    p = parser()
    args = p.parse_args()
    if bool(args.out) == bool(args.measure):
        p.error("give either --out FOLDER (train) or --measure FOLDER")
    if args.measure:
        from transformers import AutoModelForImageTextToText, AutoProcessor
        model, processor = AutoModelForImageTextToText.from_pretrained(args.measure), AutoProcessor.from_pretrained(args.measure)
    else:
        if Path(args.out).exists():
            p.error(f"--out {args.out} is there already; remove it or choose another")
        model, processor = toy_model.make(None, args.seed, hidden=args.hidden)
        rng = random.Random(f"{args.seed} pretrain")

        def batches(done):
            if done * args.steps < 100:
                return [repeat(rng) for _ in range(args.batch)]
            hardest = min(1.0, 0.1 + 0.9 * done / 0.4)  # pictures grow harder over the first 40 %
            return [task(rng, hardest) for task in rng.choices(list(TASKS), TASKS.values(), k=args.batch)]

        seconds = train(model, processor, batches, args.steps)
        model.save_pretrained(args.out)
        processor.save_pretrained(args.out)
        size = sum(p.numel() for p in model.parameters())
        print(f"{args.out}: {size:,} parameters, {seconds:.0f} s on {torch.get_num_threads()} threads")
    for row, share in measure(model, processor).items():
        print(f"{row:45s} {100 * share:5.1f} %")


if __name__ == "__main__":
    main()
