"""DICOM files to stored images, beside a bare loop of pydicom and OpenCV, on one core.

    taskset -c 0 .venv/bin/python -m benchmarks.dicom

Synthetic films of 2,000×2,400 pixels and 12 bits, uncompressed, from memory, to 320 pixels. The bare loop decodes,
applies the window and resizes, and makes neither 8 bits nor a JPEG of it; ours does all that a shard needs.
"""

import io
import statistics
import time
from collections.abc import Callable

import cv2
import numpy as np
from pydicom import Dataset, dcmread, uid
from pydicom.dataset import FileMetaDataset
from pydicom.pixels import apply_voi_lut

from pipeline.images import ImageOptions, prepare

ROUNDS = 15
OPTIONS = ImageOptions(320, "no", "jpeg", 95, 50_000_000)


def make_film(**tags: object) -> bytes:
    levels = cv2.GaussianBlur(np.random.default_rng(0).random((2400, 2000)), (0, 0), 9)
    film = Dataset()
    film.file_meta = FileMetaDataset()
    film.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    film.SOPClassUID, film.SOPInstanceUID = uid.DigitalXRayImageStorageForPresentation, "1.2.3"
    film.Rows, film.Columns, film.SamplesPerPixel, film.PhotometricInterpretation = (2400, 2000, 1, "MONOCHROME2")
    film.BitsAllocated, film.BitsStored, film.HighBit, film.PixelRepresentation = 16, 12, 11, 0
    film.PixelData = (
        (cv2.normalize(levels, np.empty_like(levels), 0, 4095, cv2.NORM_MINMAX)).astype(np.uint16).tobytes()
    )
    for name, value in tags.items():
        setattr(film, name, value)
    file = io.BytesIO()
    film.save_as(file, enforce_file_format=True)
    return file.getvalue()


def bare(data: bytes) -> object:
    film = dcmread(io.BytesIO(data))
    return cv2.resize(apply_voi_lut(film.pixel_array, film), (320, 384), interpolation=cv2.INTER_AREA)


def measure(function: Callable[[bytes], object], data: bytes) -> float:
    start = time.perf_counter()
    function(data)
    return 1000 * (time.perf_counter() - start)


for case, film in {"a window": make_film(WindowCenter=2000, WindowWidth=3000), "no window": make_film()}.items():
    turns = [(measure(bare, film), measure(lambda data: prepare(data, OPTIONS), film)) for _ in range(ROUNDS)]
    theirs, ours = (statistics.median(times) for times in zip(*turns, strict=True))
    ratio = statistics.median(slow / fast for slow, fast in turns)
    print(f"{case:10} bare {theirs:5.1f} ms, ours {ours:5.1f} ms: {ratio:.2f} of its speed")
