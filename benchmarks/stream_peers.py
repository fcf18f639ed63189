"""The peers of `make bench-stream`, one function each: folder → batches of images, labels and keys.

    python -m benchmarks.stream_peers prepare NAME FOLDER       write what it reads, if it has a format of its own
    python -m benchmarks.stream_peers check NAME FOLDER FILE    read one pass, and save what came
    python -m benchmarks.stream_peers measure NAME FOLDER       print images/s of one pass

FOLDER is a CheXpert folder, or one of shards. Images come as uint8 or float [64, 1, 224, 224], labels as
float32 [64, 14] with 1, 0, -1, and 0 where blank. Every peer shuffles, has two workers or threads, decodes by
its own means, and has the best settings that its documentation offers; where it lets one choose, these are
gray, uint8, and the filter that ours uses, bilinear without antialiasing. This file runs in an environment
of its own (peers-stream.txt), and each function imports only what it measures.
"""
# mypy: disable-error-code="import-not-found, import-untyped, misc, no-any-return, no-untyped-call, untyped-decorator"

import csv
import json
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SIZE, BATCH, WORKERS = 224, 64, 2
WARM_UP = 10  # batches
Batches = Iterator[tuple[Any, Any, list[str]]]


def webdataset_usual(shards: Path) -> Batches:
    """What most examples do: PIL in RGB, torchvision transforms, float32."""
    import torch
    from torchvision.transforms import v2

    to_float = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    return _webdataset(shards, "pil", v2.Compose([v2.Grayscale(), v2.Resize((SIZE, SIZE)), *to_float]))


def webdataset_best(shards: Path) -> Batches:
    """The gray decoder, and uint8 between the processes; Pillow resizes faster than torchvision here."""
    from torchvision.transforms import v2

    return _webdataset(shards, "pill", v2.Compose([v2.Resize((SIZE, SIZE)), v2.PILToTensor()]))


def _webdataset(shards: Path, decoder: str, transform: Callable[..., Any]) -> Batches:
    import webdataset

    dataset = (
        webdataset.WebDataset(_list_shards(shards), shardshuffle=100)
        .shuffle(1000)
        .decode(decoder)
        .to_tuple("jpg", "json", "__key__")
        .map_tuple(transform, read_labels)
        .batched(BATCH)
    )
    yield from webdataset.WebLoader(dataset, batch_size=None, num_workers=WORKERS)


def spdl(source: Path) -> Batches:
    """A batch a thread by load_image_batch, from the files: half as fast again as an image at a time."""
    import spdl.io
    import torch
    from spdl.pipeline import PipelineBuilder

    paths, labels = read_csv(source)
    resize = spdl.io.get_video_filter_desc(
        scale_width=SIZE, scale_height=SIZE, scale_mode=None, scale_algo="bilinear", pix_fmt="gray8"
    )

    def load(rows: list[int]) -> tuple[Any, Any, list[str]]:
        files = [str(paths[row]) for row in rows]
        buffer = spdl.io.load_image_batch(files, width=None, height=None, pix_fmt=None, filter_desc=resize)
        images = spdl.io.to_torch(buffer).reshape(-1, 1, SIZE, SIZE)
        return images, torch.from_numpy(labels[rows]), [key_of(paths[row]) for row in rows]

    rows = random.Random(0).sample(range(len(paths)), len(paths))  # noqa: S311
    builder = PipelineBuilder().add_source(rows).aggregate(BATCH, drop_last=True)
    pipeline = builder.pipe(load, concurrency=WORKERS).add_sink(2).build(num_threads=WORKERS)
    with pipeline.auto_stop():
        yield from pipeline.get_iterator(timeout=60)


def litdata(source: Path) -> Batches:
    """JPEGs stored and decoded (as RGB) by its Image type, which its documentation prefers."""
    import litdata
    from torchvision.transforms import v2

    to_gray = v2.Compose([v2.Resize((SIZE, SIZE), antialias=False), v2.Grayscale()])

    def transform(sample: dict[str, Any]) -> dict[str, Any]:
        return sample | {"image": to_gray(sample["image"])}

    dataset = litdata.StreamingDataset(
        str(source / "litdata"), shuffle=True, drop_last=True, transform=transform
    )
    for batch in litdata.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=WORKERS):
        yield batch["image"], batch["labels"], batch["key"]


def prepare_litdata(source: Path) -> None:
    import litdata

    inputs = list(zip(*read_csv(source), strict=True))
    litdata.optimize(
        _to_litdata,
        inputs,
        str(source / "litdata"),
        chunk_bytes="64MB",
        num_workers=WORKERS,
        start_method="spawn",
    )


def _to_litdata(row: tuple[Path, npt.NDArray[np.float32]]) -> dict[str, Any]:
    import litdata

    return {"image": litdata.Image(path=str(row[0])), "labels": row[1], "key": key_of(row[0])}


def mosaicml(source: Path) -> Batches:
    """JPEGs stored and decoded by its jpeg encoding (Pillow), and uint8 between the processes."""
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader
    from torchvision.transforms import v2

    transform = v2.Compose([v2.Resize((SIZE, SIZE)), v2.PILToTensor()])

    class Films(StreamingDataset):
        def __getitem__(self, at: int) -> tuple[Any, Any, str]:
            sample = super().__getitem__(at)
            return transform(sample["image"]), sample["labels"], sample["key"]

    dataset = Films(local=str(source / "mosaicml"), shuffle=True, batch_size=BATCH)
    yield from DataLoader(dataset, BATCH, num_workers=WORKERS, drop_last=True)


def prepare_mosaicml(source: Path) -> None:
    from PIL import Image
    from streaming import MDSWriter

    columns = {"image": "jpeg", "labels": "ndarray:float32:14", "key": "str"}
    with MDSWriter(out=str(source / "mosaicml"), columns=columns) as writer:
        for path, labels in zip(*read_csv(source), strict=True):
            writer.write({"image": Image.open(path), "labels": labels, "key": key_of(path)})


def dali(shards: Path) -> Batches:
    """Its CPU operators, on our shards with its index files; the labels' json is parsed outside (3 % or less)."""
    import torch
    from nvidia.dali import fn, pipeline_def, types

    files = _list_shards(shards)

    @pipeline_def(batch_size=BATCH, num_threads=WORKERS, device_id=None)
    def films() -> tuple[Any, Any]:
        jpeg, document = fn.readers.webdataset(
            paths=files,
            index_paths=[file + ".idx" for file in files],
            ext=["jpg", "json"],
            random_shuffle=True,
            name="reader",
        )
        images = fn.decoders.image(jpeg, output_type=types.GRAY)
        images = fn.resize(images, size=[SIZE, SIZE], interp_type=types.INTERP_LINEAR, antialias=False)
        return fn.reshape(images, shape=[1, SIZE, SIZE], layout="CHW"), document

    pipeline = films()
    pipeline.build()
    for _ in range(pipeline.epoch_size("reader") // BATCH):
        images, documents = pipeline.run()
        parsed = [json.loads(bytes(documents.at(at))) for at in range(BATCH)]
        labels = torch.stack([read_labels(document) for document in parsed])
        yield torch.from_numpy(images.as_array()), labels, [document["key"] for document in parsed]


def prepare_dali(shards: Path) -> None:
    for file in _list_shards(shards):
        command = [str(Path(sys.executable).with_name("wds2idx")), file, file + ".idx"]
        subprocess.run(command, check=True, capture_output=True)


def torchxrayvision(source: Path) -> Batches:
    """Its CheXpert reader and its resizer, by OpenCV: three times as fast as its default, scikit-image."""
    import torchxrayvision
    from torch.utils.data import DataLoader

    dataset = torchxrayvision.datasets.CheX_Dataset(
        str(source),
        str(source / "train.csv"),
        views=["PA", "AP"],
        transform=torchxrayvision.datasets.XRayResizer(SIZE, engine="cv2"),
        unique_patients=False,
    )
    keys = [key_of(Path(path)) for path in dataset.csv["Path"]]
    for batch in DataLoader(dataset, BATCH, shuffle=True, num_workers=WORKERS, drop_last=True):
        yield batch["img"], batch["lab"], [keys[row] for row in batch["idx"]]


PEERS: dict[str, Callable[[Path], Batches]] = {
    "webdataset_usual": webdataset_usual,
    "webdataset_best": webdataset_best,
    "spdl": spdl,
    "litdata": litdata,
    "mosaicml": mosaicml,
    "dali": dali,
    "torchxrayvision": torchxrayvision,
}
PREPARE = {"litdata": prepare_litdata, "mosaicml": prepare_mosaicml, "dali": prepare_dali}


def read_csv(source: Path) -> tuple[list[Path], npt.NDArray[np.float32]]:
    """Image files and labels [N, 14] of a CheXpert folder."""
    with (source / "train.csv").open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    labels = [[float(cell or 0) for cell in row[5:]] for row in rows]
    return [source.parent / row[0] for row in rows], np.array(labels, np.float32)


def read_labels(document: dict[str, Any]) -> Any:
    """Labels [14] of a sample's json."""
    import torch

    return torch.tensor([float(state or 0) for state in document["labels"].values()])


def key_of(path: Path) -> str:
    """The key of an image in our shards."""
    return "_".join((*path.parts[-3:-1], path.stem))


def _list_shards(shards: Path) -> list[str]:
    return sorted(map(str, shards.glob("train-*.tar")))


def measure(batches: Batches) -> float:
    """Images/s, from the last batch of the warm-up to the last one of all."""
    count, start, end = 0, 0.0, 0.0
    for number, (images, labels, _) in enumerate(batches, start=1):
        if tuple(images.shape) != (BATCH, 1, SIZE, SIZE) or len(labels) != BATCH:
            raise ValueError(f"batch {number} has shapes {images.shape} and {labels.shape}")
        end = time.perf_counter()
        if number == WARM_UP:
            count, start = 0, end
        else:
            count += BATCH
    return count / (end - start)


def save_pass(batches: Batches, file: Path) -> None:
    """The first batch of a pass, and the keys of all, as .npz."""
    images, labels, keys = next(batches)
    images, labels = np.array(images), np.array(labels)  # copies: a peer may use the memory again
    keys = [*keys, *(key for _, _, of_batch in batches for key in of_batch)]
    np.savez(file, images=images, labels=labels, keys=np.array(keys))


def main(action: str, name: str, folder: Path, file: str = "") -> None:
    warnings.simplefilter("ignore")
    if action == "prepare":
        PREPARE.get(name, lambda folder: None)(folder)
    elif action == "check":
        save_pass(PEERS[name](folder), Path(file))
    else:
        print(measure(PEERS[name](folder)))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), *sys.argv[4:])
