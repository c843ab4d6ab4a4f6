"""What becomes of each row of a training set: a pair whose pictures were checked, or a reason."""

import json
import os
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from core.files import InputError, atomic_write
from core.pairs import Pair, row_from_pair
from core.pictures import BadPicture
from sources.reading import Dropped, FoundPair, read_records, store_picture


def collect_source(data_set, path, file, images):
    """
    Writes a line for each row: {source, where} and either {pair, pixels} or {reason}.

    Pictures that are inside the table become files in the folder `images`.
    """
    from tqdm import tqdm

    outcomes = Counter()
    records = read_records(data_set, path)
    records = iter(tqdm(records, desc=f"reading {data_set.NAME}", unit=" rows", mininterval=1))
    with ThreadPoolExecutor(min(16, os.cpu_count())) as pool, atomic_write(file) as lines:
        while batch := list(islice(records, 32)):
            stored = store_pictures(batch, images, pool)
            for where, record in batch:
                row = {"source": record.source, "where": where} | outcome(record, stored)
                outcomes[row.get("reason", "pairs")] += 1
                lines.write(json.dumps(row).encode() + b"\n")
        if not outcomes["pairs"]:
            found = dict(outcomes) or "no rows"
            raise InputError(
                f"--data {data_set.NAME}={path} has not one usable pair ({found}). "
                "Are the pictures where the rows say?"
            )


def store_pictures(batch, folder, pool):
    """{picture as found: (path, hash of its pixels), or the BadPicture that says what is wrong}."""
    found = set()  # the pairs of one prompt share their pictures
    for _, record in batch:
        if isinstance(record, FoundPair):
            found.update(record.pictures)

    def store(picture):
        try:
            return store_picture(picture, folder)
        except BadPicture as problem:
            return problem

    return dict(zip(found, pool.map(store, found)))


def outcome(record, stored):
    if isinstance(record, Dropped):
        return {"reason": record.reason}
    paths, pixels = [], []
    for picture in record.pictures:
        if isinstance(stored[picture], BadPicture):
            return {"reason": stored[picture].reason}
        path, pixel_hash = stored[picture]
        paths.append(os.path.abspath(path))
        pixels.append(pixel_hash)
    pair = Pair(
        id=record.id,
        source=record.source,
        question=record.question,
        images=[] if record.video else paths,
        video=paths if record.video else None,
        responses=[record.better, record.worse],
        choice=1,
    )
    return {"pair": row_from_pair(pair), "pixels": pixels}


def download(address, folder):
    """The folder with the files of hub:owner/name@revision. Not yet run against the hub."""
    from huggingface_hub import snapshot_download

    repository, _, revision = address.removeprefix("hub:").partition("@")
    if not revision:
        raise InputError(
            f"{address}: expected hub:owner/name@revision. Data sets on the hub change: "
            "without a revision nothing can be repeated"
        )
    try:
        snapshot_download(repository, repo_type="dataset", revision=revision, local_dir=folder)
    except Exception as problem:  # offline, no such data set, no permission: each raises its own
        raise InputError(
            f"{address} could not be downloaded ({problem}). Download it by other means and give "
            "its folder"
        ) from None
    for archive in folder.rglob("*.zip"):
        shutil.unpack_archive(archive, archive.parent)
    return str(folder)
