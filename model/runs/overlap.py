"""The images and patients that weights were trained on, to detect them in the data they score.

best.pt has an entry for each of the run's train and dev, which runs inherit by `init` and `teacher`:
    run       str    weights file that was trained on the entry; empty: these weights
    split     str    train; dev, which chose checkpoint and thresholds; unknown, if the weights file does not state it
    images    int64 [N]  CRC-32 and length of each image, as stored in the shards
    patients  int64 [P]  first 8 bytes of sha256(`namespace/id`)
    sets      list[str]  namespaces of the sets that published weights were trained on, if only these are known
The hash keeps IDs out of the file, but does not anonymize: anyone can try all patient IDs.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from model.checkpoint import UNKNOWN, Entry, hand_on, load_checkpoint, refused
from model.runs.config import read_members
from model.runs.run import Run, open_images, selected_splits
from pipeline.base.errors import DataError
from pipeline.console import say, say_once
from pipeline.identity import join_content, name_patients
from pipeline.measure.metrics import Ints

Seen = Sequence[Entry]


def list_seen(run: Run, splits: Sequence[str]) -> Seen:
    """The entries of a run that trains on these splits, then those of its initial weights and its teacher.

    Raises DataError before training if the initial weights or the teacher were trained on images of dev or valid.
    """
    before = list(run.start.seen) if run.start else []
    for folder in read_members(run.setup.teacher) if run.setup.teacher else ():
        before += hand_on(read_seen(folder), folder)
    for name in selected_splits(run) if before else ():
        if name != "train":
            check_seen(run, name, before, "keep its split (`dev`, `seed`), or start from another")
    own = []
    for name in splits:
        images, patients = (torch.from_numpy(np.unique(values)) for values in identify(run, name))
        own.append(Entry(run="", split=name, images=images, patients=patients, sets=[]))
    return own + before


def identify(run: Run, name: str) -> tuple[Ints, Ints]:
    """Each image's CRC and length as one number, and its patient's hash: int64 [N], as torch saves no uint64."""
    split, rows = open_images(run, name)
    table = split.table.take(rows)
    names = name_patients(table["patient"], run.shards.namespace).dictionary_encode()
    digests = (hashlib.sha256(name.encode()).digest() for name in names.dictionary.to_pylist())
    hashes = np.array([int.from_bytes(digest[:8], signed=True) for digest in digests], np.int64)
    return join_content(table).to_numpy().view(np.int64), hashes[names.indices.to_numpy()]


def read_seen(folder: Path) -> Seen:
    """The entries in the best.pt of a run. Raises CheckpointError."""
    saved = load_checkpoint(folder / "best.pt")
    with refused(folder / "best.pt"):
        return list(saved["seen"])


def check_seen(
    run: Run, name: str, seen: Seen, remedy: str = "evaluate on others, or go on with `shared_images`"
) -> dict[str, int]:
    """Count the patients and images of a split that weights were trained on; all scoring calls this.

    For the run's train split nothing is counted, and for a dev split only what is also in a train split. Unknown
    training data, and sets of which the images are not known, cannot be counted either, and are reported.
    Reports overlap. Raises DataError, with the remedy, if images or sets overlap and the run does not allow it; overlap
    of the run's own shards, as between their splits, is always allowed.
    """
    shards, at_home = run.shards, run.shards.digest == run.config.manifest
    if at_home and name == "train" and not run.config.adopted:
        return {}
    images, patients = identify(run, name)
    shared_images, shared_patients = (np.zeros(len(images), np.bool_) for _ in range(2))
    namespaces = {folder.patients for folder in shards.folders}
    for entry in seen:
        if name == entry["split"] == "dev":
            continue
        folder = entry["run"] or run.folder
        if entry["split"] == UNKNOWN:
            say_once(f"{folder}: what it was trained on is not known: if on images of {name}, figures are too good")
        if sets := sorted(namespaces & {*entry["sets"]}):
            text = f"{shards}, {name}: {folder} was trained on images of {', '.join(sets)}"
            if not (run.setup.shared_images or at_home):
                raise DataError(f"{text}; {remedy}")
            say_once(f"{text}: if on these, figures are too good")
        again, known = np.isin(images, entry["images"].numpy()), np.isin(patients, entry["patients"].numpy())
        shared_images |= again
        shared_patients |= known
        if count := int(again.sum()):
            text = f"{shards}, {name}: {folder} trained on {count:,} of these {len(images):,} images"
            if not (run.setup.shared_images or (at_home and not entry["run"])):
                raise DataError(f"{text}; {remedy}")
            say_once(f"{text}: its scores of them are too good")
        if count := len(np.unique(patients[known])):
            names = f"{count:,} patient names are among those that {folder} trained on"
            say_once(f"{shards}, {name}: {names}: if they are the same people, figures are too good")
    if any(entry["split"] == UNKNOWN or not namespaces.isdisjoint(entry["sets"]) for entry in seen):
        return {}
    return {"shared_patients": len(np.unique(patients[shared_patients])), "shared_images": int(shared_images.sum())}


def report_seen(contents: Sequence[int], seen: Seen, folder: Path) -> None:
    """Say how many of some images, by CRC-32 and length as uint64, a run was trained on, or that this is not known."""
    known = {content for entry in seen for content in entry["images"].numpy().view(np.uint64).tolist()}
    if count := sum(content in known for content in contents):
        say(f"{folder} was trained on {count:,} of these {len(contents):,} images: its scores of them are too good")
    for entry in seen:
        if entry["split"] == UNKNOWN or entry["sets"]:
            sets = f"it was trained on {', '.join(entry['sets'])}"
            data = sets if entry["sets"] else "what it was trained on is not known"
            say(f"{entry['run'] or folder}: {data}: if on these images, figures are too good")
