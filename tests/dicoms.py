"""Small DICOMs, and what the standard says they look like."""

import io
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import Dataset, dcmread, uid
from pydicom.dataset import FileMetaDataset

Array = npt.NDArray[Any]
Table = tuple[int, Sequence[int], int]  # the value of the first entry, the entries, and the bits of each


def make_dicom(pixels: Array, syntax: str = uid.ExplicitVRLittleEndian, **tags: object) -> bytes:
    """A DICOM of 16-bit pixels, of which 12 are stored; tags that are None are left out."""
    image = Dataset()
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    image.SOPClassUID, image.SOPInstanceUID = uid.DigitalXRayImageStorageForPresentation, "1.2.3.4567"
    image.PatientName, image.PatientID, image.PatientBirthDate = "DOE^JANE", "MRN-4711", "19300101"
    image.Rows, image.Columns = pixels.shape
    known: dict[str, object] = {"SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2"}
    known |= {"BitsAllocated": 8 * pixels.itemsize, "BitsStored": 12, "HighBit": 11}
    known["PixelRepresentation"] = int(pixels.dtype.kind == "i")
    image.PixelData = pixels.tobytes()
    set_tags(image, {name: value for name, value in (known | tags).items() if value is not None})
    if syntax == uid.ExplicitVRBigEndian:
        image.PixelData = pixels.astype(pixels.dtype.newbyteorder(">")).tobytes()
    if syntax in (uid.ImplicitVRLittleEndian, uid.ExplicitVRBigEndian, uid.DeflatedExplicitVRLittleEndian):
        image.file_meta.TransferSyntaxUID = syntax
    elif syntax in (uid.JPEGLossless, uid.JPEGLosslessSV1):
        return compress_lossless_jpeg(make_dicom(pixels, uid.ExplicitVRLittleEndian, **tags), syntax)
    elif syntax != uid.ExplicitVRLittleEndian:
        image.compress(syntax, generate_instance_uid=False)
    file = io.BytesIO()
    image.save_as(file, enforce_file_format=True)
    return file.getvalue()


def compress_lossless_jpeg(image: bytes, syntax: str) -> bytes:
    """The image as GDCM compresses it: pydicom has no encoder for lossless JPEG."""
    import gdcm  # which takes its time

    names = {uid.JPEGLossless: "JPEGLosslessProcess14", uid.JPEGLosslessSV1: "JPEGLosslessProcess14_1"}
    with tempfile.TemporaryDirectory() as folder:
        reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
        (Path(folder) / "a").write_bytes(image)
        reader.SetFileName(f"{folder}/a")
        reader.Read()
        change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, names[syntax])))
        change.SetInput(reader.GetImage())
        change.Change()
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        writer.SetFileName(f"{folder}/b")
        writer.Write()
        return (Path(folder) / "b").read_bytes()


def set_tags(dataset: Dataset, tags: Mapping[str, object]) -> None:
    """Also to values that pydicom warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, value in tags.items():
            setattr(dataset, name, value)


def change(image: bytes, **tags: object) -> bytes:
    """The image with other values of its tags; None makes one empty, as anonymizers do."""
    dataset = dcmread(io.BytesIO(image))
    set_tags(dataset, tags)
    file = io.BytesIO()
    dataset.save_as(file)
    return file.getvalue()


def make_table(descriptor: Sequence[int], data: object, kind: str = "US", first: str = "US") -> list[Dataset]:
    """A sequence of one lookup table, whose data and descriptor have these value representations."""
    item = Dataset()
    item.add_new("LUTDescriptor", first, list(descriptor))
    item.add_new("LUTData", kind, data)
    return [item]


def render(stored: Array, **facts: Any) -> Array:
    """Gray levels 0 to 255 of stored values, not rounded: PS3.3, C.7.5.1.1.2, C.11.1.1 and C.11.2.1, value by value.

    Of the facts slope, intercept, inverted, the tables modality and voi, window (center, width, function) and padding
    (its first and last value).
    """
    modality, voi, window, padding = (facts.get(name) for name in ("modality", "voi", "window", "padding"))
    slope, intercept = facts.get("slope", 1), facts.get("intercept", 0)
    present = set(stored.ravel().tolist())
    pixels = {value for value in present if padding is None or not padding[0] <= value <= padding[1]} or present

    def look_up(table: Table, value: float) -> int:
        first, entries, _ = table
        return entries[min(max(round(value) - first, 0), len(entries) - 1)]

    measured = {v: look_up(modality, v) if modality else v * slope + intercept for v in present}
    low, high = min(measured[v] for v in pixels), max(measured[v] for v in pixels)

    if voi:
        bits, highest = voi[2], max(voi[1])
        plausible = 2 ** (bits - 2) <= highest < 2**bits  # stated bits are often wrong
        white = 2 ** (bits if plausible else max(highest.bit_length(), 1)) - 1

    def show(x: float) -> float:
        if voi:
            return float(look_up(voi, x) / white)
        assert window
        center, width, function = window
        if function == "SIGMOID":
            return float(1 / (1 + np.exp(-4 * (x - center) / width)))
        if function == "LINEAR":
            center, width = center - 0.5, width - 1
        if x <= center - width / 2:
            return 0
        return 1 if x > center + width / 2 else (x - center) / width + 0.5

    gray = {v: 255 * show(x) for v, x in measured.items()} if voi or window else {}
    if len({round(gray[v]) for v in pixels if gray}) <= 1 and (not gray or low < high):  # none, or it misses them
        gray = {v: min(max(255 * (x - low) / ((high - low) or 1), 0), 255) for v, x in measured.items()}
    if facts.get("inverted"):
        gray = {v: 255 - level for v, level in gray.items()}
    if padding:
        gray |= {v: 0 for v in present if padding[0] <= v <= padding[1]}
    return np.array([gray[value] for value in stored.ravel().tolist()]).reshape(stored.shape)
