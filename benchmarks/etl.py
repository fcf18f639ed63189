"""Images/s of `pipeline shards` beside img2dataset, a plain Pillow script, and the codecs alone.

    make bench-etl

All contestants read the same files, use two processes and write 224-pixel JPEGs of quality 95; each result is
the median over rounds of the whole command, start-up included; ratios are medians of the rounds' own ratios,
because this machine's speed drifts. `codec` is the limit: decode, resize and encode in a bare loop, from
memory. img2dataset lives in an environment of its own (PEERS). At 320 pixels, the default, 390×320 JPEGs are decoded
to check them and copied; `codec` decodes only, and cp -r neither decodes nor syncs.

PNGs of 1024×1024 and DICOMs of 2,000×2,400 pixels and 12 bits, uncompressed, are converted to 320 pixels in one thread
from memory, without the command; their bare loops are OpenCV's and pydicom's.
"""

import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import click
import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image
from pydicom import dcmread
from pydicom.pixels import apply_voi_lut

from benchmarks.scale import PROCESSES, QUALITY, SIZE, draw_frontals, link_films, run_pillow
from pipeline.images import SCALES, ImageOptions, prepare, resize
from pipeline.labels import COLUMNS
from pipeline.synthetic.sample import FOLDER
from tests.dicoms import make_dicom

Pixels = npt.NDArray[np.number]
PIPELINE = Path(sys.executable).with_name("pipeline")
IMG2DATASET = """
import sys
from img2dataset import download
if __name__ == "__main__":
    download(url_list=sys.argv[1], output_folder=sys.argv[2], input_format="txt", output_format="webdataset",
             image_size=224, resize_mode="keep_ratio", encode_format="jpg", encode_quality=95, processes_count=2,
             thread_count=16, number_sample_per_shard=1000, enable_wandb=False, retries=0)
"""


def make_source(folder: Path, images: int, large: bool) -> tuple[Path, list[Path]]:
    """A CheXpert folder of `images` synthetic frontals: hard links to 400, or to 40 of 2828×2320 if large."""
    originals = draw_frontals(folder)[: 40 if large else 400]
    if large:
        for path in originals:
            image = Image.open(path).resize((2828, 2320), Image.Resampling.BICUBIC)
            grain = np.random.default_rng(0).normal(0, 3, (2320, 2828))
            pixels = np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8)
            path.write_bytes(simplejpeg.encode_jpeg(pixels[..., None], quality=90, colorspace="GRAY"))
    paths = [f"{FOLDER}/train/patient{number:05d}/study1/view1_frontal.jpg" for number in range(images)]
    lines = [f"{path},Female,60,Frontal,AP,1.0" + "," * 13 for path in paths]
    return link_films(folder, [",".join(COLUMNS), *lines], originals), [folder / path for path in paths]


def run_ours(source: Path, paths: list[Path], out: Path, size: int) -> None:
    per_shard = min(1000, len(paths) // 16)  # enough shards for the two processes to share
    command = [PIPELINE, "shards", source, out, "--size", size, "--dev", 0, "--workers", PROCESSES]
    command += ["--samples-per-shard", per_shard]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)


def run_img2dataset(source: Path, paths: list[Path], out: Path, peers: Path) -> None:
    urls = out.with_suffix(".txt")
    urls.write_text("\n".join(path.as_uri() for path in paths))
    script = out.with_suffix(".py")
    script.write_text(IMG2DATASET)
    environment = os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1"}
    subprocess.run([peers, script, urls, out], check=True, capture_output=True, env=environment)
    done = sum(json.loads(stats.read_text())["successes"] for stats in out.glob("*_stats.json"))
    if done != len(paths):
        raise RuntimeError(f"img2dataset wrote {done} of {len(paths)} images")


def copy_files(source: Path, _: list[Path], out: Path) -> None:
    subprocess.run(["/bin/cp", "-r", source, out], check=True)


def run_codec(paths: list[Path], size: int) -> float:
    """Images/s of the bare loop in two processes, from memory."""
    with get_context("spawn").Pool(PROCESSES) as pool:
        halves = [paths[number::PROCESSES] for number in range(PROCESSES)]
        return sum(pool.map(partial(codec_loop, size=size), halves))


def codec_loop(paths: list[Path], size: int) -> float:
    """Images/s of decode, resize and encode: nothing checked, nothing stripped, nothing written."""
    contents = [path.read_bytes() for path in paths[:400]]
    height, width, _, _ = simplejpeg.decode_jpeg_header(contents[0])
    shape = (size, round(width * size / height))
    part = next((part for part in SCALES if 2 * height >= 3 * part * size), 1)  # as `pipeline shards`
    minimum = height // part if part > 1 else 0
    start = time.perf_counter()
    for number in range(len(paths)):
        data = contents[number % len(contents)]
        pixels = simplejpeg.decode_jpeg(data, colorspace="GRAY", min_height=minimum, min_width=minimum)
        if shape != (height, width):
            small = resize(pixels[:, :, 0], *shape)
            cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    return len(paths) / (time.perf_counter() - start)


def decode_png(data: bytes) -> npt.NDArray[np.uint8]:
    return np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE), np.uint8)


def encode_png(data: bytes) -> object:
    return cv2.imencode(".jpg", resize(decode_png(data), 320, 320), [cv2.IMWRITE_JPEG_QUALITY, QUALITY])


def decode_dicom(data: bytes) -> Pixels:
    """Levels of any type: the loop makes neither 8 bits nor a JPEG of them."""
    dataset = dcmread(io.BytesIO(data))
    levels = apply_voi_lut(dataset.pixel_array, dataset)
    return np.asarray(cv2.resize(levels, (320, 384), interpolation=cv2.INTER_AREA))


def compare_decoders(pngs: Path | None, rounds: int) -> None:
    """Print the CPU milliseconds of `prepare` beside bare loops, in turn."""
    cv2.setNumThreads(1)
    noise = np.random.default_rng(0)
    smooth = cv2.GaussianBlur(noise.random((2400, 2000)), (0, 0), 9)
    levels = np.rint(cv2.normalize(smooth, np.empty_like(smooth), 0, 4095, cv2.NORM_MINMAX)).astype(np.uint16)
    gray = (levels[:1024, :1024] / 17 + noise.normal(0, 1.5, (1024, 1024))).astype(np.uint8)
    images = [file.read_bytes() for file in sorted(pngs.glob("*.png"))[:40]] if pngs else []
    images = images or [cv2.imencode(".png", gray)[1].tobytes()]
    options = ImageOptions(320, "no", "jpeg", QUALITY, 50_000_000)
    cases: list[tuple[str, list[bytes], Callable[[bytes], object]]] = [
        ("PNG, decoder alone", images, decode_png),
        ("PNG, codec", images, encode_png),
        ("DICOM with a window", [make_dicom(levels, WindowCenter=2000, WindowWidth=3000)], decode_dicom),
        ("DICOM without", [make_dicom(levels)], decode_dicom),
    ]
    for case, data, bare in cases:
        turns = [(measure(bare, data), measure(lambda file: prepare(file, options), data)) for _ in range(5 * rounds)]
        loop, ours = (statistics.median(times) for times in zip(*turns, strict=True))
        ratio = statistics.median(limit / own for limit, own in turns)
        print(f"  {case:20} bare loop {loop:5.1f} ms, `prepare` {ours:5.1f} ms: {ratio:.2f} of its speed")


def measure(convert: Callable[[bytes], object], files: list[bytes]) -> float:
    """CPU milliseconds per file."""
    start = time.process_time()
    for data in files:
        convert(data)
    return 1000 * (time.process_time() - start) / len(files)


@click.command()
@click.option("--peers", type=click.Path(path_type=Path), help="Python that has img2dataset.")
@click.option("--images", default=60_000, show_default=True, help="390×320 sources; a twentieth of 2828×2320 ones.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--pngs", type=click.Path(path_type=Path), help="Folder of real PNGs; synthetic ones without it.")
def main(peers: Path | None, images: int, rounds: int, pngs: Path | None) -> None:
    """Print CPU times for PNGs and DICOMs, then images/s and ratios for small, large and copied JPEGs."""
    print("PNG and DICOM to 320 pixels, one thread")
    compare_decoders(pngs, rounds)
    for large, size in ((False, SIZE), (True, SIZE), (False, 320)):
        count = images // 20 if large else images
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            source, paths = make_source(folder, count, large)
            contestants: dict[str, Callable[..., None]] = {"pipeline shards": partial(run_ours, size=size)}
            contestants |= {"Pillow script": run_pillow} if size == SIZE else {"cp -r": copy_files}
            if peers and not large and size == SIZE:
                contestants["img2dataset"] = partial(run_img2dataset, peers=peers)
            rates: dict[str, list[float]] = {name: [] for name in (*contestants, "codec")}
            for _ in range(rounds):
                for contestant, run in contestants.items():
                    out = folder / "out"
                    start = time.perf_counter()
                    run(source, paths, out)
                    rates[contestant].append(count / (time.perf_counter() - start))
                    shutil.rmtree(out)
                rates["codec"].append(run_codec(paths, size))
            print(f"{'2828×2320' if large else '390×320'} to {size}, {count:,} images, {rounds} rounds")
            ours = rates["pipeline shards"]
            for contestant, values in rates.items():
                ratio = statistics.median(a / b for a, b in zip(ours, values, strict=True))
                print(f"  {contestant:16} {statistics.median(values):8,.0f} images/s   ours is {ratio:.2f} of it")


if __name__ == "__main__":
    main()
