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
import io
import json
import random
import subprocess
import sys
import tarfile
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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

    dataset = litdata.StreamingDataset(str(source / "litdata"), shuffle=True, drop_last=True, transform=transform)
    for batch in litdata.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=WORKERS):
        yield batch["image"], batch["labels"], batch["key"]


def prepare_litdata(source: Path) -> None:
    import litdata

    inputs = list(zip(*read_csv(source), strict=True))
    litdata.optimize(
        _to_litdata, inputs, str(source / "litdata"), chunk_bytes="64MB", num_workers=WORKERS, start_method="spawn"
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


def energon(shards: Path) -> Batches:
    """The same tars; crude samples, which its documentation offers for own fields, and the gray decoder."""
    from megatron import energon as mega
    from torchvision.transforms import v2

    transform = v2.Compose([v2.Resize((SIZE, SIZE)), v2.PILToTensor()])

    class Films(mega.DefaultTaskEncoder):
        decoder = mega.SampleDecoder(image_decode="pill")
        cookers = (mega.Cooker(mega.stateless(lambda sample: sample)),)

        @mega.stateless
        def encode_sample(self, sample: dict[str, Any]) -> tuple[Any, Any, str]:
            return transform(sample["jpg"]), read_labels(sample["json"]), sample["json"]["key"]

        @mega.stateless
        def batch(self, samples: list[tuple[Any, Any, str]]) -> tuple[Any, Any, list[str]]:
            images, labels, keys = zip(*samples, strict=True)
            return mega.batch_stack(images), mega.batch_stack(labels), list(keys)

    dataset = mega.get_train_dataset(
        shards / "energon",
        batch_size=BATCH,
        shuffle_buffer_size=1000,
        max_samples_per_sequence=100,
        worker_config=mega.WorkerConfig(rank=0, world_size=1, num_workers=WORKERS),
        task_encoder=Films(),
        repeat=False,
    )
    yield from mega.get_loader(dataset)


def prepare_energon(shards: Path) -> None:
    """Its index, beside links to the shards: DALI's has the same file names."""
    from megatron.energon.flavors import BaseWebdatasetFactory

    folder = shards / "energon"
    folder.mkdir()
    files = [Path(file) for file in _list_shards(shards)]
    for file in files:
        (folder / file.name).hardlink_to(file)
    BaseWebdatasetFactory.prepare_dataset(
        folder, [file.name for file in files], split_parts_ratio=[("train", 1.0)], workers=WORKERS
    )
    (folder / ".nv-meta" / "dataset.yaml").write_text("__module__: megatron.energon\n__class__: CrudeWebdataset\n")


def turboloader(shards: Path) -> Batches:
    """Its fused pass in C++ over one tar, as float32 RGB, which is all that it offers; labels by its indices."""
    return _turboloader(shards, shards / "turboloader.tar")


def turboloader_raw(shards: Path) -> Batches:
    """Pixels decoded beforehand, mapped into memory."""
    return _turboloader(shards, shards / "turboloader.tbl")


def _turboloader(shards: Path, file: Path) -> Batches:
    import torch
    import turboloader

    keys, _, states = zip(*read_tars(shards), strict=True)
    labels = torch.from_numpy(np.array(states))
    loader = turboloader.DataLoader(
        str(file), BATCH, num_workers=WORKERS, shuffle=True, image_size=SIZE, output_format="pytorch"
    )
    for images, facts in loader:
        if facts.get("decode_failures"):
            raise ValueError("TurboLoader could not decode an image")
        rows = facts["indices"]
        yield images[:, :1], labels[rows], [keys[row] for row in rows]


def prepare_turboloader(shards: Path) -> None:
    """One tar of images alone: it opens one, and counts every member."""
    with tarfile.open(shards / "turboloader.tar", "w") as out:
        for key, jpeg, _ in read_tars(shards):
            member = tarfile.TarInfo(f"{key}.jpg")
            member.size = len(jpeg)
            out.addfile(member, io.BytesIO(jpeg))


def prepare_turboloader_raw(shards: Path) -> None:
    import turboloader

    prepare_turboloader(shards)
    tar, file = shards / "turboloader.tar", shards / "turboloader.tbl"
    turboloader.preprocess_to_tbl(str(tar), str(file), SIZE, num_workers=WORKERS)


def grain(shards: Path) -> Batches:
    """Its records, shuffled over all of them; it has no decoder, and OpenCV's is the fastest that it leaves open."""
    import grain
    import msgpack

    def load(record: bytes) -> tuple[Any, Any, str]:
        sample = msgpack.unpackb(record)
        return _load_by_opencv(sample["jpg"]), np.array(sample["labels"], np.float32), sample["key"]

    def collate(samples: list[tuple[Any, Any, str]]) -> tuple[Any, Any, list[str]]:
        images, labels, keys = zip(*samples, strict=True)
        return np.stack(images), np.stack(labels), list(keys)

    source = grain.sources.ArrayRecordDataSource(str(shards / "grain.array_record"))
    options = grain.ReadOptions(num_threads=WORKERS, prefetch_buffer_size=4)
    films = grain.MapDataset.source(source).shuffle(seed=0).map(load)
    yield from films.batch(BATCH, drop_remainder=True, batch_fn=collate).to_iter_dataset(options)


def prepare_grain(shards: Path) -> None:
    import msgpack
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(shards / "grain.array_record"), "group_size:1,uncompressed")
    for key, jpeg, labels in read_tars(shards):
        writer.write(msgpack.packb({"key": key, "jpg": jpeg, "labels": labels.tolist()}))
    writer.close()


def datasets_streaming(shards: Path) -> Batches:
    """The same tars as a stream; its Image feature decodes with Pillow, in gray."""
    import datasets
    from torch.utils.data import DataLoader
    from torchvision.transforms import v2

    transform = v2.Compose([v2.Resize((SIZE, SIZE)), v2.PILToTensor()])

    def load(sample: dict[str, Any]) -> dict[str, Any]:
        return {"images": transform(sample["jpg"]), "labels": read_labels(sample["json"])}

    films = datasets.load_dataset("webdataset", data_files=_list_shards(shards), split="train", streaming=True)
    films = films.cast_column("jpg", datasets.Image(mode="L")).shuffle(0, buffer_size=1000)
    films = films.map(load, remove_columns=["jpg", "json", "__url__"])
    for batch in DataLoader(films, BATCH, num_workers=WORKERS):
        yield batch["images"], batch["labels"], batch["__key__"]


def datasets_arrow(source: Path) -> Batches:
    """A table with the JPEGs in it, shuffled over all rows."""
    import datasets
    import torch
    from torch.utils.data import DataLoader
    from torchvision.transforms import v2

    transform = v2.Compose([v2.Resize((SIZE, SIZE)), v2.PILToTensor()])

    def load(samples: dict[str, Any]) -> dict[str, Any]:
        images = [transform(image) for image in samples["image"]]
        return samples | {"image": images, "labels": [torch.tensor(row) for row in samples["labels"]]}

    films = datasets.load_from_disk(str(source / "datasets")).with_transform(load)
    for batch in DataLoader(films, BATCH, shuffle=True, num_workers=WORKERS, drop_last=True):
        yield batch["image"], batch["labels"], batch["key"]


def prepare_datasets_arrow(source: Path) -> None:
    import datasets

    paths, labels = read_csv(source)
    keys = [key_of(path) for path in paths]
    columns = {"image": [str(path) for path in paths], "labels": labels.tolist(), "key": keys}
    films = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image(mode="L"))
    films.cast_column("labels", datasets.List(datasets.Value("float32"))).save_to_disk(source / "datasets")


def decoder_torchcodec(shards: Path) -> Batches:
    """The decoder that torchvision hands over to."""
    import cv2
    from torchcodec.decoders import decode_jpeg

    def load(jpeg: bytes) -> npt.NDArray[np.uint8]:
        return cv2.resize(decode_jpeg(jpeg, mode="GRAY")[0].numpy(), (SIZE, SIZE))[None]

    return _bare_loop(shards, load)


def _load_by_opencv(jpeg: bytes) -> npt.NDArray[np.uint8]:
    import cv2

    pixels = np.asarray(cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_GRAYSCALE), np.uint8)
    return np.asarray(cv2.resize(pixels, (SIZE, SIZE)), np.uint8)[None]


def _bare_loop(shards: Path, load: Callable[[bytes], npt.NDArray[np.uint8]]) -> Batches:
    """Batches loaded from memory, one a thread, into the same three over and over."""
    import cv2

    cv2.setNumThreads(0)
    samples = list(read_tars(shards))
    buffers = [np.empty((BATCH, 1, SIZE, SIZE), np.uint8) for _ in range(WORKERS + 1)]

    def fill(number: int) -> tuple[Any, Any, list[str]]:
        keys, jpegs, labels = zip(*samples[number * BATCH : (number + 1) * BATCH], strict=True)
        images = buffers[number % len(buffers)]
        for at, jpeg in enumerate(jpegs):
            images[at] = load(jpeg)
        return images, np.array(labels), list(keys)

    count = len(samples) // BATCH
    with ThreadPoolExecutor(WORKERS) as pool:
        ahead = deque(pool.submit(fill, number) for number in range(WORKERS))
        for number in range(count):
            batch = ahead.popleft().result()
            if number + WORKERS < count:
                ahead.append(pool.submit(fill, number + WORKERS))
            yield batch


PEERS: dict[str, Callable[[Path], Batches]] = {
    peer.__name__: peer
    for peer in (
        *(webdataset_usual, webdataset_best, spdl, litdata, mosaicml, dali, torchxrayvision, energon, turboloader),
        *(turboloader_raw, grain, datasets_streaming, datasets_arrow, decoder_torchcodec),
    )
}
PREPARE = {
    prepare.__name__.removeprefix("prepare_"): prepare
    for prepare in (
        *(prepare_litdata, prepare_mosaicml, prepare_dali, prepare_energon, prepare_turboloader),
        *(prepare_turboloader_raw, prepare_grain, prepare_datasets_arrow),
    )
}


def read_csv(source: Path) -> tuple[list[Path], npt.NDArray[np.float32]]:
    """Image files and labels [N, 14] of a CheXpert folder."""
    with (source / "train.csv").open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    labels = [[float(cell or 0) for cell in row[5:]] for row in rows]
    return [source.parent / row[0] for row in rows], np.array(labels, np.float32)


def read_tars(shards: Path) -> Iterator[tuple[str, bytes, npt.NDArray[np.float32]]]:
    """Key, JPEG and labels [14] of each sample, by the standard library."""
    for file in _list_shards(shards):
        with tarfile.open(file) as tar:
            parts = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name, jpeg in parts.items():
            if name.endswith(".jpg"):
                key = name.removesuffix(".jpg")
                states = json.loads(parts[f"{key}.json"])["labels"].values()
                yield key, jpeg, np.array([float(state or 0) for state in states], np.float32)


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
