"""How toy/sources.py writes a source: its items, its pictures, its tables, its broken rows."""

import io
import json
import random

from toy import world

FIRST_ID = {"train": 0, "dev": 100_000, "test": 200_000}  # so that no id is in two splits
MODELS = [
    "LLaVA-v1.5-7b",
    "LLaVA-v1.5-13b",
    "LLaVA-RLHF-7b",
    "LLaVA-RLHF-13b",
    "Qwen-VL-Chat",
    "IDEFICS-9b",
    "Fuyu-8b",
    "InstructBLIP-7b",
    "InstructBLIP-13b",
    "VisualGLM-6b",
    "MMICL-13b",
    "GPT-4V",
]
BROKEN = {"missing image": 2, "unreadable image": 3, "empty answer": 4}
PLANTED = {  # the broken rows of each training source: {reason: rows}
    "RLAIF-V": BROKEN,
    "VLFeedback": BROKEN | {"tie": 6, "non-numeric rating": 5},
    "POVID": BROKEN,
    "WildVision-Battle": BROKEN | {"tie": 7, "different histories": 5},
    "MM-RLHF": BROKEN | {"tie": 6, "missing frames": 2},
    "R1-Reward-RL": BROKEN | {"no verdict": 3},
    "pairs": BROKEN,
}


class Source:
    """A source of one split while it is written. Its random numbers are its own."""

    def __init__(self, root, split, name, seed):
        in_split_folder = name in ("pairs", "tasks")
        self.folder = root / split if in_split_folder else root / split / name
        self.split = split
        self.name = name
        self.key = []  # its lines of the answer key
        self.files = []  # (path, rows) of its tables
        self.rng = random.Random(f"{seed} {split} {name}")

    def twins(self, families=world.FAMILIES, n=2, medium="image"):
        """A full set of n items. A comparison has only three answers."""
        if n > 3:
            families = [family for family in families if family != "comparison"]
        return world.twins(self.rng, self.rng.choice(families), n, medium=medium)

    def faults(self, n):
        """None for each of n good rows, and the fault of each broken one, in random order."""
        faults = [None] * n
        for fault, times in PLANTED[self.name].items():
            faults += [fault] * times
        self.rng.shuffle(faults)
        return faults

    def rows(self, n):
        """(number, fault or None, item) of n good rows and the broken ones; one twin of a set."""
        for number, fault in enumerate(self.faults(n)):
            yield number, fault, self.rng.choice(self.twins())

    def draw(self, item, fault=None):
        """The item's picture or frames as the bytes of PNG files. Adds it to the answer key."""
        from PIL import Image

        pictures = []
        for _ in range({"image": 1, "video": 4, "text": 0}[item["medium"]]):
            data = io.BytesIO()
            pixels = world.draw(item["scene"], item["difficulty"], self.rng)
            Image.fromarray(pixels).save(data, "PNG", compress_level=1)
            pictures.append(data.getvalue())
        if not fault:
            key = world.key_of(item["question"], pictures)
            self.key.append({"key": key, "split": self.split, "source": self.name, **item})
        return pictures

    def save(self, item, stem, fault=None):
        """
        Draw an item and write stem.png, or frames into the folder stem. Returns the bytes of its
        pictures, and the fields that name them in a row.
        """
        pictures = self.draw(item, fault)
        if item["medium"] == "text":
            return pictures, {}
        if item["medium"] == "image":
            self.write(f"{stem}.png", damage(pictures[0], fault))
            return pictures, {"image": f"{stem}.png"}
        if fault != "missing frames":
            for t, data in enumerate(pictures):
                self.write(f"{stem}/{t:04d}.png", data)
        return pictures, {"video": stem}

    def preference(self, item, fault):
        """[chosen, rejected]: the right answer and a wrong one; one may be empty as the fault."""
        right = item["answers"][item["right"]]
        wrong = self.rng.choice([answer for answer in item["answers"] if answer != right])
        pair = [right, wrong]
        if fault == "empty answer":
            pair[self.rng.randrange(2)] = self.rng.choice(("", " \n"))
        return pair

    def write(self, path, data):
        """With data None, the file is missing on purpose."""
        if data is not None:
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / path).write_bytes(data)

    def json(self, path, rows):
        """A .jsonl file has an object on each line, a .json file is one list."""
        self.files.append((path, len(rows)))
        if path.endswith(".jsonl"):
            text = "".join(json.dumps(row) + "\n" for row in rows)
        else:
            text = json.dumps(rows, indent=2)
        self.write(path, text.encode())

    def parquet(self, path, rows, **kinds):
        """kinds: the type of each column that is no string."""
        import pyarrow.parquet as pq

        self.files.append((path, len(rows)))
        self.write(path, b"")  # makes the folder
        # no dictionary: pictures never repeat
        pq.write_table(arrow_table(rows, kinds), self.folder / path, use_dictionary=False)


def arrow_table(rows, kinds):
    import pyarrow as pa

    text = pa.string()
    types = {
        "bytes": pa.binary(),
        "int32": pa.int32(),
        "int64": pa.int64(),
        "bool": pa.bool_(),
        "strings": pa.list_(text),
        "ints": pa.list_(pa.int64()),
        "image": pa.struct([("bytes", pa.binary()), ("path", text)]),
        "turns": pa.list_(pa.struct([("role", text), ("content", text)])),
    }
    columns = [(name, types[kinds[name]] if name in kinds else text) for name in rows[0]]
    return pa.Table.from_pylist(rows, schema=pa.schema(columns))


def damage(data, fault):
    """A picture's file as the fault leaves it: None is no file, a cut-off one nobody can decode."""
    if fault == "missing image":
        return None
    return data[:40] if fault == "unreadable image" else data


def picture_cell(data, path, fault=None):
    """A picture as a parquet column holds it."""
    data = damage(data, fault)
    return None if data is None else {"bytes": data, "path": path}


def mix_blocks(blocks, rng):
    """Blocks of rows in random order, as one list: its beginning holds some of everything."""
    rng.shuffle(blocks)
    rows = []
    for block in blocks:
        rows += block
    return rows
