"""DICOMs, beside the standard's formulas (tests/dicoms.py); and what must not get through."""

import io
import json
import logging
import sys
import tarfile
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from string import hexdigits
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import dicom
from pipeline.images import ImageError, ImageOptions, prepare
from pipeline.manifest import find_notes, read_manifest, read_table
from tests.conftest import refused, run_pipeline

pydicom = pytest.importorskip("pydicom")
from openjpeg.utils import encode_array  # noqa: E402
from pydicom import Dataset, dcmread, uid  # noqa: E402
from pydicom.encaps import encapsulate, get_frame  # noqa: E402

from tests.dicoms import change, make_dicom, make_table, render  # noqa: E402
from tests.layouts import TABLES  # noqa: E402

IMAGES = sorted(path for path in Path(pydicom.__file__).with_name("data").glob("test_files/**/*") if path.is_file())
RAW = ImageOptions(None, "no", "raw", 95, 1_000_000)
PLAIN = {(True, True): uid.ImplicitVRLittleEndian, (False, True): uid.ExplicitVRLittleEndian}
Array = npt.NDArray[Any]


def pixels_of(image: bytes) -> Array:
    return prepare(image, RAW).pixels


def unreadable(reason: str) -> AbstractContextManager[None]:
    return refused(f"not a readable DICOM: {reason}", ImageError)


def shard(tmp_path: Path, images: dict[str, bytes], *options: object, code: int = 0) -> tuple[Any, Path]:
    """Shards of a table of images, in which every other one has an edema: the finished command, and their folder."""
    folder, out = tmp_path / "images", tmp_path / "out"
    folder.mkdir(exist_ok=True)
    for name, image in images.items():
        (folder / name).write_bytes(image)
    rows = [f"{name},{name},{number % 2}\n" for number, name in enumerate(images)]
    (folder / "labels.csv").write_text("path,patient,Edema\n" + "".join(rows))
    words = ("--set", "table", "--columns", "path=path,patient=patient,Edema=Edema", "--dev", 0, "--workers", 1)
    return run_pipeline("shards", folder, out, *words, *options, code=code), out


def expect(image: bytes, stored: Array, **facts: Any) -> None:
    """The image's pixels are what the standard makes of the stored values."""
    np.testing.assert_allclose(pixels_of(image), render(stored, **facts), atol=0.5 + 1e-9)


def table(entries: Array, first: int, bits: int) -> list[Dataset]:
    """A lookup table as the standard wants it."""
    return make_table([len(entries) % 65536, first, bits], entries.tolist(), first="SS" if first < 0 else "US")


@pytest.fixture(scope="module")
def levels() -> Array:
    """A smooth 40×48 image of 12 bits."""
    rows, columns = np.mgrid[:40, :48]
    return np.asarray((np.sin(rows / 9) + np.cos(columns / 7) + 2) / 4 * 4095, np.uint16)


def read_facts(image: Dataset) -> dict[str, Any]:
    """What decides the gray levels of an image that is sound, as `render` takes it."""
    facts: dict[str, Any] = {"inverted": image.PhotometricInterpretation == "MONOCHROME1"}
    if "RescaleSlope" in image:
        facts |= {"slope": float(image.RescaleSlope), "intercept": float(image.RescaleIntercept)}
    if image.get("PixelPaddingValue") is not None:
        facts |= {"padding": (image.PixelPaddingValue, image.PixelPaddingValue)}
    for name, sequence in (("modality", "ModalityLUTSequence"), ("voi", "VOILUTSequence")):
        for item in (image.get(sequence) or [])[:1]:
            facts[name] = item.LUTDescriptor[1], item.LUTData, item.LUTDescriptor[2]
    if image.get("WindowCenter") is not None and image.get("WindowWidth") is not None:
        center, width = (np.atleast_1d(image[f"Window{name}"].value)[0] for name in ("Center", "Width"))
        facts["window"] = float(center), float(width), image.get("VOILUTFunction") or "LINEAR"
    return facts


def test_images_that_pydicom_ships_have_the_levels_of_the_standard() -> None:
    compared: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for path in IMAGES:
        try:
            pixels = prepare(path.read_bytes(), RAW).pixels
        except ImageError as error:
            reasons[str(error).removeprefix("not a readable ").removeprefix("DICOM: ")] += 1
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = dcmread(path, force=True)
            if "TransferSyntaxUID" not in image.file_meta:
                image.file_meta.TransferSyntaxUID = PLAIN.get(image.original_encoding, uid.ExplicitVRBigEndian)
            expected = render(image.pixel_array, **read_facts(image))
        assert np.abs(pixels - expected).max() <= 0.5 + 1e-9, path.name
        compared[image.file_meta.TransferSyntaxUID.name] += 1
    assert {"rendered": compared, "refused": reasons} == json.loads((TABLES / "pydicom.json").read_text())


RISING, FALLING = np.arange(0, 4096, dtype=np.uint16), np.arange(4095, -1, -1, dtype=np.uint16)


# Of each kind the tags of one are drawn, or of none: what follows counts less, but is read and checked.
KINDS: tuple[Sequence[dict[str, Any]], ...] = (
    [{"PhotometricInterpretation": "MONOCHROME1"}],
    [
        *({"RescaleSlope": s, "RescaleIntercept": i} for s, i in ((0.5, -1000), (-0.5, 10), (2, -7), (1, 0))),
        *({"ModalityLUTSequence": table(FALLING >> (12 - bits), 0, bits)} for bits in (8, 10, 11, 12)),
        *({"ModalityLUTSequence": table(FALLING << (bits - 12), 0, bits)} for bits in (13, 14, 15)),
        {"ModalityLUTSequence": table(FALLING * 2, 0, 16), "RescaleSlope": 3, "RescaleIntercept": 1},
    ],
    [
        *({"WindowCenter": center, "WindowWidth": width} for center, width in ((1500, 900), (4000, 2000), (-500, 900))),
        {"WindowCenter": [2000, 100], "WindowWidth": [700, 10]},
        {"WindowCenter": 1500, "WindowWidth": 900, "VOILUTFunction": "SIGMOID"},
        {"WindowCenter": 1500, "WindowWidth": 1, "VOILUTFunction": "LINEAR_EXACT"},
        {"WindowCenter": None, "WindowWidth": ""},
        {"WindowCenter": 9000, "WindowWidth": 100},
    ],
    [
        {"VOILUTSequence": table(FALLING, 0, 12)},
        {"VOILUTSequence": table(RISING[:1000] // 4, 500, 16)},
        {"VOILUTSequence": [*table(40 + RISING // 32, 9, 8), *table(FALLING, 0, 12)]},  # a part of its 8 bits
        {"VOILUTSequence": table(RISING, 0, 8)},  # it states too few
        {"VOILUTSequence": table(RISING, -100, 12), "RescaleSlope": 1, "RescaleIntercept": -50},
    ],
    [{"PixelPaddingValue": 0}],
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, derandomize=True)
@given(parts=st.tuples(*(st.sampled_from([{}, *kind]) for kind in KINDS)), signed=st.booleans())
def test_every_kind_of_table_and_window(levels: Array, parts: tuple[dict[str, Any], ...], signed: bool) -> None:
    stored = (levels.astype(np.int16) - 2048) if signed else levels
    image = make_dicom(stored, **{name: value for part in parts for name, value in part.items()})
    expect(image, stored, **read_facts(dcmread(io.BytesIO(image))))


@pytest.mark.parametrize("bits", [8, 12])
@pytest.mark.parametrize("count", [4096, 4095, 257])
@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian, uid.ExplicitVRBigEndian])
def test_tables_of_one_or_two_entries_a_word(levels: Array, bits: int, count: int, syntax: str) -> None:
    entries = np.arange(count) * (2**bits - 1) // (count - 1)
    order = ">u2" if syntax == uid.ExplicitVRBigEndian else "<u2"
    forms = [("US", entries.tolist()), ("OW", entries.astype("<u2").tobytes())]
    if bits == 8:
        packed = entries.astype("u1").tobytes() + b"\0" * (count % 2)
        forms += [("OW", packed), ("OB", packed), ("US", np.frombuffer(packed, "<u2").tolist())]
    for kind, data in forms:
        if kind == "OW":
            data = np.frombuffer(data, "<u2").astype(order).tobytes()
        voi = make_table([count, 0, bits], data, kind)
        expect(make_dicom(levels, syntax, VOILUTSequence=voi), levels, voi=(0, entries.tolist(), bits))
    longest = make_table([0, 0, 16], np.arange(65536, dtype=order).tobytes(), "OW")
    expect(make_dicom(levels, syntax, VOILUTSequence=longest), levels, voi=(0, range(65536), 16))


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian])
@pytest.mark.parametrize("first", [-1024, 40000])
def test_the_sign_of_the_first_entry_follows_from_what_precedes_it(levels: Array, first: int, syntax: str) -> None:
    signed = make_table([4096, first % 65536, 12], np.arange(4096).tolist())  # as US
    wrong = make_table([4096, (first + 32768) % 65536 - 32768, 12], np.arange(4096).tolist(), first="SS")
    for voi in (signed, wrong):
        image = make_dicom(levels, syntax, RescaleSlope=1, RescaleIntercept=first, VOILUTSequence=voi)
        expect(image, levels, intercept=first, voi=(first, range(4096), 12))
    stored = levels.astype(np.int16) - 2048
    modality = make_table([4096, 63488, 12], np.arange(4096).tolist())
    expect(make_dicom(stored, syntax, ModalityLUTSequence=modality), stored, modality=(-2048, range(4096), 12))


def test_empty_elements_are_as_absent(levels: Array) -> None:
    image = make_dicom(levels, RescaleSlope=1, RescaleIntercept=0, PixelPaddingValue=7, VOILUTFunction="SIGMOID")
    image = change(image, **dict.fromkeys(("RescaleSlope", "RescaleIntercept", "PixelPaddingValue"), None))
    expect(change(image, VOILUTSequence=[], ModalityLUTSequence=[]), levels)
    expect(change(image, WindowCenter=5, WindowWidth=None), levels)
    window = change(image, VOILUTFunction=None, WindowCenter=1500, WindowWidth=900, RescaleSlope="2")
    expect(window, levels, slope=2, window=(1500, 900, "LINEAR"))
    empty = make_table([4096, 0, 12], None)
    expect(change(window, VOILUTSequence=empty), levels, slope=2, window=(1500, 900, "LINEAR"))
    full = change(window, VOILUTSequence=[*empty, *table(FALLING, 0, 12)])
    expect(full, levels, slope=2, voi=(0, FALLING.tolist(), 12))


PADDINGS: list[tuple[int, int | None, dict[str, Any]]] = [
    *((value, None, {}) for value in (4095, 65535, -2000)),  # the second is beyond the bits stored
    (4000, 4095, {}),
    (4095, 4000, {"WindowCenter": 700, "WindowWidth": 400}),
    (-32768, -2000, {"RescaleSlope": -1, "RescaleIntercept": 9}),
]


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("padding", PADDINGS)
def test_padding_is_black_and_has_no_part_in_the_range(levels: Array, padding: Any, inverted: bool) -> None:
    value, limit, tags = padding
    stored = (levels // 4 + 200).astype(np.int16 if value < 0 else np.uint16)
    stored[:, :10] = value
    tags = tags | {"PixelPaddingValue": value, "PixelPaddingRangeLimit": limit}
    image = make_dicom(stored, PhotometricInterpretation=f"MONOCHROME{2 - inverted}", **tags)
    unsigned = image.replace(b"\x28\0\x20\1SS", b"\x28\0\x20\1US")
    np.testing.assert_array_equal(pixels_of(unsigned), pixels_of(image))
    ends = sorted((value, value if limit is None else limit))
    expect(image, stored, **(read_facts(dcmread(io.BytesIO(image))) | {"padding": ends}))
    assert set(pixels_of(image)[:, :10].ravel()) == {0}


def replace_stream(image: bytes, *streams: bytes, **tags: object) -> bytes:
    return change(image, PixelData=encapsulate([*streams], has_bot=False), **tags)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("syntax", [uid.JPEG2000Lossless, uid.JPEGLSLossless])
def test_the_bits_of_a_stream_count_more_than_those_of_its_header(levels: Array, bits: int, syntax: str) -> None:
    """Unsigned, and signed if stream and header agree on it, too."""
    unsigned = (levels.astype(np.uint32) << 4 >> (16 - bits)).astype(np.uint8 if bits == 8 else np.uint16)
    signed = (unsigned.astype(np.int32) - 2 ** (bits - 1)).astype(np.int8 if bits == 8 else np.int16)
    for stored in (unsigned, signed):
        image = make_dicom(stored, syntax, BitsStored=bits, HighBit=bits - 1)
        for stated in (8, 10, 12, 14, 16):
            wide = 8 if stated == 8 else 16
            expect(change(image, BitsAllocated=wide, BitsStored=stated, HighBit=stated - 1), stored)


def test_a_sign_that_stream_and_header_disagree_on_is_the_one_of_a_picture(levels: Array) -> None:
    image, signed = make_dicom(levels, uid.JPEG2000Lossless), levels.astype(np.int16) - 2048
    two = signed.view(np.uint16) & 4095  # signed values in an unsigned stream
    for stored, is_signed, expected in ((levels, 1, levels), (signed, 0, signed), (two, 1, signed)):
        stream = encode_array(stored, bits_stored=12, use_mct=False, codec_format=0)
        expect(replace_stream(image, stream, PixelRepresentation=is_signed), expected)
    # JPEG-LS says nothing of the sign, and padding says nothing of it either.
    padded = np.where(np.arange(48) < 10, -2000, levels // 4 + 200).astype(np.int16)
    image = make_dicom(padded, uid.JPEGLSLossless, PixelPaddingValue=-2000)
    for padded_image in (image, image.replace(b"\x28\0\x20\1SS", b"\x28\0\x20\1US")):  # as 63536
        expect(padded_image, padded, padding=(-2000, -2000))
    expect(change(make_dicom(levels, uid.JPEGLSLossless), PixelRepresentation=1), levels)
    # Sign bits that a stream of 16 bits lacks.
    masked = make_dicom(signed.view(np.uint16) & 4095, uid.JPEGLSLossless, BitsStored=16, HighBit=15)
    expect(change(masked, BitsStored=12, HighBit=11, PixelRepresentation=1), signed)


def test_more_frames_than_the_header_says_are_refused(levels: Array) -> None:
    images = [make_dicom(np.concatenate([levels, levels]), Rows=40)]
    for syntax in (uid.JPEG2000Lossless, uid.JPEGLSLossless, uid.RLELossless):
        image = make_dicom(levels, syntax)
        stream = get_frame(dcmread(io.BytesIO(image)).PixelData, 0, number_of_frames=1)
        images += [replace_stream(image, stream, stream)]
        if syntax != uid.RLELossless:  # one frame may lie in several fragments
            expect(replace_stream(image, stream[:100], stream[100:]), levels)
            images += [change(image, PixelData=encapsulate([stream, stream]))]
    for image in images:
        with unreadable("more than one frame"):
            prepare(image, RAW)


def test_images_are_decoded_side_by_side(levels: Array, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads are between the same two lines at the same time."""
    both, apply_voi = threading.Barrier(2, timeout=60), dicom._apply_voi

    def wait(*image: Any) -> Array | None:
        both.wait()
        return apply_voi(*image)

    monkeypatch.setattr(dicom, "_apply_voi", wait)
    filters, image = [*warnings.filters], make_dicom(levels)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(pixels_of, [image, image])
    np.testing.assert_array_equal(first, second)
    assert (warnings.filters, logging.getLogger("pydicom").propagate) == (filters, True)


def test_only_the_stored_bits_count(levels: Array) -> None:
    expected = pixels_of(make_dicom(levels))
    assert (expected.min(), expected.max()) == (0, 255)
    for image in (
        make_dicom(levels, HighBit=None),
        make_dicom(levels | 0x7000),  # an overlay in the bits above
        make_dicom((levels << 4) | 0x5, HighBit=15),
        make_dicom(levels)[128 + 4 :],  # no preamble
    ):
        np.testing.assert_array_equal(pixels_of(image), expected)


COMPRESSED = (uid.JPEG2000Lossless, uid.JPEGLSLossless, uid.RLELossless, uid.DeflatedExplicitVRLittleEndian)


@pytest.mark.parametrize("syntax", [*COMPRESSED, uid.JPEGLossless, uid.JPEGLosslessSV1])
def test_compressed_ones_are_the_same_and_damaged_ones_refused(levels: Array, syntax: uid.UID) -> None:
    image = make_dicom(levels, syntax, PixelRepresentation=0)
    np.testing.assert_array_equal(pixels_of(image), pixels_of(make_dicom(levels)))
    for cut in (len(image) // 2, len(image) - 200):
        with pytest.raises(ImageError, match=r"^not a readable DICOM: its? "):
            prepare(image[:cut], RAW)
    if syntax.is_encapsulated and syntax != uid.RLELossless:
        rows = b"\x28\0\x10\0US\x02\0"
        forged = make_dicom(levels, syntax, Rows=40).replace(rows + b"\x28\0", rows + b"\x29\0")
        with unreadable(f"its pixels are of another size than its header says ({syntax.name})"):
            prepare(forged, RAW)


def test_a_decoder_that_panics_ends_nothing() -> None:
    image = make_dicom(np.arange(0, 4000, 40, dtype=np.uint16).reshape(10, 10), uid.RLELossless)
    first = image.index(b"\2\0\0\0\x40\0\0\0") + 64  # the first of two segments: a run of 128 overruns the image
    with unreadable("its pixels are damaged, or end early (RLE Lossless)"):
        prepare(image[:first] + b"\x81" + image[first + 1 :], RAW)


def test_hostile_ones_are_refused_with_a_reason(levels: Array) -> None:
    sound, tiny = make_dicom(levels), RAW._replace(max_pixels=100)
    bomb = make_dicom(np.zeros((4000, 4000), np.uint16), uid.DeflatedExplicitVRLittleEndian)
    damaged = "its pixels are damaged, or end early (Explicit VR Little Endian)"
    numbers = "is missing, or is not a number from"
    burned = "it has annotations burned in, which may name the patient (BurnedInAnnotation)"
    unfit: list[dict[str, Any]] = [
        {"WindowCenter": 5, "WindowWidth": 0},
        {"RescaleSlope": "1e300", "RescaleIntercept": "1e309"},
        {"VOILUTSequence": table(RISING, 0, 99)},
        {"ModalityLUTSequence": make_table([4096, 0, 12], RISING[1:].tolist())},
        {"WindowCenter": 5, "WindowWidth": 9, "VOILUTFunction": "CUBIC"},
    ]
    tags: list[tuple[dict[str, Any], str]] = [
        ({"BurnedInAnnotation": "YES"}, burned),
        ({"NumberOfFrames": 2}, "more than one frame"),
        ({"SamplesPerPixel": 3}, "its pixels are not gray"),
        ({"PhotometricInterpretation": "DOE^JANE"}, "its pixels are not gray"),
        ({"Rows": 0}, f"its Rows {numbers} 1 to 65535"),
        ({"BitsStored": 17}, f"its BitsStored {numbers} 1 to 16"),
        ({"HighBit": 3}, f"its HighBit {numbers} 11 to 15"),
        ({"PixelRepresentation": None}, f"its PixelRepresentation {numbers} 0 to 1"),
        *((changes, "its window or lookup table cannot be applied") for changes in unfit),
        ({"PixelData": b"12"}, damaged),
    ]
    for image, options, reason in (
        *((make_dicom(levels, **changes), RAW, reason) for changes, reason in tags),
        (sound[:-1000], RAW, damaged),
        (bomb, tiny, "its deflated part ends early, or has more than 16,777,616 bytes"),
        (b"\0" * 128 + b"DICM", RAW, "it has no pixels, or ends early"),
        (sound.replace(b"\x10\0US", b"\x10\0FD"), RAW, "its header is damaged"),
        (sound.replace(b"1.2.1\0", b"1.2.5\0"), RAW, "its pixels are not RLE Lossless, as its header says"),
    ):
        with unreadable(reason):
            prepare(image, options)
    with refused("65535×65535 is more than 1,000,000 pixels (--max-pixels)", ImageError):
        prepare(make_dicom(levels, Rows=65535, Columns=65535), RAW)


def test_without_pydicom_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with refused("pydicom is missing: pip install 'chexpert-pipeline[dicom]'"):
        prepare(b"\0" * 128 + b"DICM", RAW)


def secrets(path: Path) -> Iterator[bytes]:
    """The values of four or more characters of tags that may tell of a patient; six if a hash may hold them, too."""
    elements: list[Any] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with suppress(Exception):  # of files without any tag
            image = dcmread(path, force=True)
            elements = [*image.file_meta, *image.iterall()]
        for element in elements:
            if element.VR in ("PN", "DA", "LO", "SH", "UI"):
                texts = map(str, element.value if element.VM > 1 else [element.value])
                yield from (t.encode() for t in texts if len(t) >= (6 if set(t) <= set(hexdigits) else 4))


def test_no_text_of_an_image_is_in_anything_written_or_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    hidden: set[bytes] = set().union(*map(secrets, IMAGES))
    assert len(hidden) > 500
    images = {f"image{number}.dcm": path.read_bytes() for number, path in enumerate(IMAGES)}
    caplog.clear()
    made, out = shard(tmp_path, images, "--max-bad", 1, "--size", 64)
    assert "52 images" in made.stdout + made.stderr

    def try_prepare(path: Path) -> bytes:
        try:
            return prepare(path.read_bytes(), RAW._replace(encoding="jpeg")).data  # gray levels as such may spell words
        except ImageError as error:
            return str(error).encode()

    with caplog.at_level(logging.DEBUG), ThreadPoolExecutor(4) as pool, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prepared = [*pool.map(try_prepare, IMAGES)]
    assert caught == []
    assert caplog.text == ""
    written = [path.read_bytes() for path in out.rglob("*") if path.is_file()]
    printed = [text.encode() for text in (made.stdout, made.stderr, *capfd.readouterr())]
    everything = b"\n".join([*written, *printed, *prepared])
    ours = {b"patient", b"000000000"}  # a column's name, and digits of tar headers
    assert {text for text in hidden - ours if text in everything} == set()


def test_a_table_becomes_shards_and_images_without_a_picture_are_counted(levels: Array, tmp_path: Path) -> None:
    """Of several compressions, with and without a suffix."""
    window: dict[str, Any] = {"WindowCenter": 1500, "WindowWidth": 2000}
    named = zip(("a.dcm", "b.dicom", "c.000001", "d"), (uid.ExplicitVRLittleEndian, *COMPRESSED[:3]), strict=True)
    images = {name: make_dicom(levels, syntax, **window) for name, syntax in named} | {
        "e": make_dicom(levels, WindowCenter=9000, WindowWidth=100),
        "f": make_dicom(levels * 0 + 7),
        "g": make_dicom(levels, WindowCenter=1500, WindowWidth=1),
    }
    made, out = shard(tmp_path, images, "--encoding", "png")
    expected = prepare(images["a.dcm"], RAW._replace(encoding="png")).data
    with tarfile.open(out / "train-000000.tar") as tar:
        files = [tar.extractfile(member) for member in tar if member.name.endswith(".png")]
        assert [file.read() for file in files if file].count(expected) == 4
    reasons = {"e": dicom.MISSED, "f": "one level of gray", "g": "fewer than 16 gray levels, though the file has more"}
    doubts = {f"1 of the images: {reason}; the first is {name}" for name, reason in reasons.items()}
    assert {line for line in made.stdout.splitlines() if "of the images" in line} == doubts
    table = read_table(out, read_manifest(out).split("train"))
    assert len(find_notes([table])) == 3
    verified = run_pipeline("verify", out, "--deep").stderr.splitlines()
    assert {line for line in verified if "of the images" in line} == {f"Warning: {line}" for line in doubts}
    shard(tmp_path, images, "--strict", "--encoding", "png", code=3)
