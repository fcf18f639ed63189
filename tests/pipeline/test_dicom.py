"""DICOM films, beside pydicom's own functions for gray levels; and what must not get through."""

import io
import logging
import sys
import tarfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.base.errors import DataError
from pipeline.images import ImageError, ImageOptions, prepare
from tests.conftest import run_pipeline

pydicom = pytest.importorskip("pydicom")
from pydicom import Dataset, dcmread, uid  # noqa: E402
from pydicom.dataset import FileMetaDataset  # noqa: E402
from pydicom.pixels import apply_modality_lut, apply_voi_lut  # noqa: E402

FILMS = sorted((Path(pydicom.__file__).parent / "data" / "test_files").rglob("*"))
FILMS = [path for path in FILMS if path.is_file()]
RAW = ImageOptions(None, "no", "raw", 95, 1_000_000)
PLAIN = {
    (True, True): uid.ImplicitVRLittleEndian,
    (False, True): uid.ExplicitVRLittleEndian,
    (False, False): uid.ExplicitVRBigEndian,
}
Array = npt.NDArray[Any]


def make_film(pixels: Array, syntax: str = uid.ExplicitVRLittleEndian, **tags: object) -> bytes:
    """A DICOM of 16-bit pixels, of which 12 are stored; tags that are None are left out."""
    film = Dataset()
    film.file_meta = FileMetaDataset()
    film.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    film.SOPClassUID, film.SOPInstanceUID = uid.DigitalXRayImageStorageForPresentation, "1.2.3.4567"
    film.PatientName, film.PatientID, film.PatientBirthDate = "DOE^JANE", "MRN-4711", "19300101"
    film.Rows, film.Columns = pixels.shape
    known: dict[str, object] = {
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 8 * pixels.itemsize,
        "BitsStored": 12,
        "HighBit": 11,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
    }
    film.PixelData = pixels.tobytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, value in (known | tags).items():
            if value is not None:
                setattr(film, name, value)
    if syntax != uid.ExplicitVRLittleEndian:
        if syntax == uid.DeflatedExplicitVRLittleEndian:
            film.file_meta.TransferSyntaxUID = syntax
        else:
            film.compress(syntax, generate_instance_uid=False)
    file = io.BytesIO()
    film.save_as(file, enforce_file_format=True)
    return file.getvalue()


def table(entries: Array, first: int, bits: int) -> list[Dataset]:
    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [len(entries), first, bits])
    item.add_new("LUTData", "US", entries.tolist())
    return [item]


@pytest.fixture(scope="module")
def levels() -> Array:
    """A smooth 40×48 image of 12 bits."""
    rows, columns = np.mgrid[:40, :48]
    return np.asarray((np.sin(rows / 9) + np.cos(columns / 7) + 2) / 4 * 4095, np.uint16)


def read_by_pydicom(data: bytes) -> tuple[Array, str]:
    """Gray levels 0 to 255, by pydicom's functions over the pixels, and the transfer syntax."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        film = dcmread(io.BytesIO(data), force=True)
        if "TransferSyntaxUID" not in film.file_meta:
            film.file_meta.TransferSyntaxUID = PLAIN[film.original_encoding]
        measured = apply_modality_lut(film.pixel_array, film)
        shown = apply_voi_lut(measured, film)
        low, high = measured.min(), measured.max()
        if film.get("VOILUTSequence"):
            low, high = min(film.VOILUTSequence[0].LUTData), max(film.VOILUTSequence[0].LUTData)
        elif shown is not measured:
            low, high = apply_voi_lut(np.array([-1e9, 1e9]), film)
    gray = (shown - float(low)) / ((float(high) - float(low)) or 1) * 255
    inverted = film.PhotometricInterpretation == "MONOCHROME1"
    return 255 - gray if inverted else gray, film.file_meta.TransferSyntaxUID.name


def test_films_that_pydicom_ships_have_the_levels_of_its_functions() -> None:
    compared: dict[str, int] = {}
    refused: dict[str, list[str]] = {}
    for path in FILMS:
        data = path.read_bytes()
        try:
            pixels = prepare(data, RAW).pixels
        except ImageError as error:
            reason = str(error).removeprefix("not a readable ").removeprefix("DICOM: ")
            refused.setdefault(reason, []).append(path.name)
            continue
        expected, syntax = read_by_pydicom(data)
        assert np.abs(pixels - expected).max() <= 0.5 + 1e-9, path.name
        compared[syntax] = compared.get(syntax, 0) + 1
    assert compared == {
        "Explicit VR Little Endian": 36,
        "Implicit VR Little Endian": 2,
        "Explicit VR Big Endian": 4,
        "Deflated Explicit VR Little Endian": 1,
        "JPEG 2000 Image Compression": 2,
        "JPEG 2000 Image Compression (Lossless Only)": 2,
        "JPEG-LS Lossless Image Compression": 1,
        "JPEG-LS Lossy (Near-Lossless) Image Compression": 2,
        "RLE Lossless": 2,
    }
    assert {reason: len(names) for reason, names in refused.items() if len(names) > 2} == {
        "its pixels are not gray": 31,
        "more than one frame": 7,
        "it has no pixels, or ends early": 70,
        "JPEG, PNG or DICOM: cannot identify image file": 11,
    }
    assert {reason: names for reason, names in refused.items() if len(names) <= 2} == {
        "a JPEG of 12 bits, whose decoder is under the GPL: pip install pylibjpeg-libjpeg": [
            "JPEG-lossy.dcm",
            "JPGExtended.dcm",
        ],
        # 14,876,737 pixels wide and high, its damaged stream says
        "its pixels are of another size than its header says (JPEG 2000 Image Compression)": [
            "JPEG2000-embedded-sequence-delimiter.dcm"
        ],
        "its pixels are damaged, or end early (Explicit VR Little Endian)": ["MR_truncated.dcm"],
        "its NumberOfFrames is missing, or is not a number from 1 to 2147483647": ["badVR.dcm"],
    }


RISING, FALLING = np.arange(0, 4096, dtype=np.uint16), np.arange(4095, -1, -1, dtype=np.uint16)


@pytest.mark.parametrize(
    "tags",
    [
        {},
        {"PhotometricInterpretation": "MONOCHROME1"},
        {"WindowCenter": 1500, "WindowWidth": 900},
        {"WindowCenter": [2000, 100], "WindowWidth": [700, 10], "PhotometricInterpretation": "MONOCHROME1"},
        {"WindowCenter": 1500, "WindowWidth": 900, "VOILUTFunction": "SIGMOID"},
        {"WindowCenter": 1500, "WindowWidth": 1, "VOILUTFunction": "LINEAR_EXACT"},
        {"WindowCenter": 1500, "WindowWidth": 900, "RescaleSlope": 0.5, "RescaleIntercept": -1000},
        {"WindowCenter": -900, "WindowWidth": 900, "RescaleSlope": -0.5, "RescaleIntercept": 10},
        {"WindowCenter": None, "WindowWidth": "", "RescaleSlope": 2, "RescaleIntercept": -7},
        {"VOILUTSequence": table(FALLING, 0, 12)},
        {"VOILUTSequence": table(RISING[:1000] // 4, 500, 16), "WindowCenter": 5, "WindowWidth": 9},
        {"VOILUTSequence": table(RISING, -100, 12), "RescaleSlope": 1, "RescaleIntercept": -50},
        {"ModalityLUTSequence": table(FALLING * 2, 0, 16), "WindowCenter": 4000, "WindowWidth": 2000},
    ],
)
@pytest.mark.parametrize("signed", [False, True])
def test_every_kind_of_table_and_window(levels: Array, tags: dict[str, Any], signed: bool) -> None:
    film = make_film((levels.astype(np.int16) - 2048) if signed else levels, **tags)
    np.testing.assert_allclose(prepare(film, RAW).pixels, read_by_pydicom(film)[0], atol=0.5 + 1e-9)


def test_only_the_stored_bits_count(levels: Array) -> None:
    expected = prepare(make_film(levels), RAW).pixels
    assert (expected.min(), expected.max()) == (0, 255)
    for pixels, tags in (
        (levels, {"HighBit": None}),
        (levels | 0x7000, {}),  # an overlay in the bits above
        ((levels << 4) | 0x5, {"HighBit": 15}),
    ):
        np.testing.assert_array_equal(prepare(make_film(pixels, **tags), RAW).pixels, expected)
    np.testing.assert_array_equal(prepare(make_film(levels)[128 + 4 :], RAW).pixels, expected)  # no preamble


@pytest.mark.parametrize(
    "syntax",
    [uid.JPEG2000Lossless, uid.JPEGLSLossless, uid.RLELossless, uid.DeflatedExplicitVRLittleEndian],
)
def test_compressed_ones_are_the_same_and_damaged_ones_refused(levels: Array, syntax: uid.UID) -> None:
    film = make_film(levels, syntax, PixelRepresentation=0)
    pixels = prepare(film, RAW).pixels
    np.testing.assert_array_equal(pixels, prepare(make_film(levels), RAW).pixels)
    for cut in (len(film) // 2, len(film) - 200):
        with pytest.raises(ImageError, match=r"^not a readable DICOM: its? "):
            prepare(film[:cut], RAW)
    if syntax.is_encapsulated and syntax != uid.RLELossless:
        forged = make_film(levels, syntax, Rows=40).replace(
            b"\x28\0\x10\0US\x02\0\x28\0", b"\x28\0\x10\0US\x02\0\x29\0"
        )
        name = syntax.name
        with pytest.raises(ImageError, match="of another size than its header says") as refused:
            prepare(forged, RAW)
        assert name in str(refused.value)


def test_a_decoder_that_panics_ends_nothing() -> None:
    film = make_film(np.arange(0, 4000, 40, dtype=np.uint16).reshape(10, 10), uid.RLELossless)
    first = (
        film.index(b"\2\0\0\0\x40\0\0\0") + 64
    )  # byte of the first of two segments: a run of 128 overruns the image
    with pytest.raises(ImageError) as refused:
        prepare(film[:first] + b"\x81" + film[first + 1 :], RAW)
    damaged = "not a readable DICOM: its pixels are damaged, or end early (RLE Lossless)"
    assert str(refused.value) == damaged


def test_hostile_ones_are_refused_with_a_reason(levels: Array) -> None:
    tiny = RAW._replace(max_pixels=100)
    bomb = make_film(np.zeros((4000, 4000), np.uint16), uid.DeflatedExplicitVRLittleEndian)
    damaged = "its pixels are damaged, or end early (Explicit VR Little Endian)"
    not_applied = "its window or lookup table cannot be applied"
    odd_table = table(RISING, 0, 99)
    numbers = "is missing, or is not a number from"
    for tags, reason in (
        ({"BurnedInAnnotation": "YES"}, "it has annotations burned in, which may name the patient"),
        ({"NumberOfFrames": 2}, "more than one frame"),
        ({"SamplesPerPixel": 3}, "its pixels are not gray"),
        ({"PhotometricInterpretation": "DOE^JANE"}, "its pixels are not gray"),
        ({"Rows": 0}, f"its Rows {numbers} 1 to 65535"),
        ({"BitsStored": 17}, f"its BitsStored {numbers} 1 to 16"),
        ({"HighBit": 3}, f"its HighBit {numbers} 11 to 15"),
        ({"PixelRepresentation": None}, f"its PixelRepresentation {numbers} 0 to 1"),
        ({"WindowCenter": 5, "WindowWidth": 0}, not_applied),
        ({"RescaleSlope": "1e300", "RescaleIntercept": "1e308"}, not_applied),
        ({"VOILUTSequence": odd_table}, not_applied),
        ({"PixelData": b"12"}, damaged),
    ):
        with pytest.raises(ImageError) as refused:
            prepare(make_film(levels, **tags), RAW)
        assert str(refused.value).removesuffix(" (BurnedInAnnotation)") == f"not a readable DICOM: {reason}"
    for data, options, reason in (
        (make_film(levels)[:-1000], RAW, damaged),
        (bomb, tiny, "its deflated part ends early, or has more than 16,777,616 bytes"),
        (b"\0" * 128 + b"DICM", RAW, "it has no pixels, or ends early"),
        (make_film(levels).replace(b"\x10\0US", b"\x10\0FD"), RAW, "its header is damaged"),
    ):
        with pytest.raises(ImageError) as refused:
            prepare(data, options)
        assert str(refused.value) == f"not a readable DICOM: {reason}"
    huge = make_film(levels, Rows=65535, Columns=65535)
    with pytest.raises(ImageError, match=r"^65535×65535 is more than 1,000,000 pixels \(--max-pixels\)$"):
        prepare(huge, RAW)


def test_without_pydicom_the_command_says_what_to_install(
    levels: Array, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pydicom", None)
    message = r"^pydicom is missing: pip install 'chexpert-pipeline\[dicom\]'$"
    with pytest.raises(DataError, match=message):
        prepare(b"\0" * 128 + b"DICM", RAW)


def secrets(path: Path) -> Iterator[bytes]:
    """The values of four or more characters of tags that may tell of a patient."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            film = dcmread(path, force=True)
            elements = [*film.file_meta, *film.iterall()]
        except Exception:  # those without any tag
            return
        for element in elements:
            if element.VR in ("PN", "DA", "LO", "SH", "UI"):
                values = element.value if element.VM > 1 else [element.value]
                yield from (str(value).encode() for value in values if len(str(value)) >= 4)


def test_no_text_of_a_film_is_in_anything_written_or_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder, out = tmp_path / "films", tmp_path / "out"
    folder.mkdir()
    hidden: set[bytes] = set()
    rows = ["Image,MRN,edema"]
    for number, path in enumerate(FILMS):
        hidden |= set(secrets(path))
        (folder / f"{number}.dcm").write_bytes(path.read_bytes())
        rows.append(f"{number}.dcm,M{number},{number % 2}")
    assert len(hidden) > 500
    (folder / "labels.csv").write_text("\n".join(rows))
    caplog.clear()
    columns = ("--set", "table", "--columns", "path=Image,patient=MRN,Edema=edema", "--dev", 0)
    made = run_pipeline("shards", folder, out, *columns, "--max-bad", 1, "--size", 64, "--workers", 1)
    assert made.returncode == 0, made.stderr
    assert "52 images" in made.stdout + made.stderr

    def try_prepare(path: Path) -> bytes:
        try:
            return prepare(
                path.read_bytes(), RAW._replace(encoding="jpeg")
            ).data  # gray levels as such may spell words
        except ImageError as error:
            return str(error).encode()

    with (
        caplog.at_level(logging.DEBUG),
        ThreadPoolExecutor(4) as pool,
        warnings.catch_warnings(record=True) as said,
    ):
        warnings.simplefilter("always")
        prepared = [*pool.map(try_prepare, FILMS)]
    assert said == []
    assert caplog.text == ""
    written = [path.read_bytes() for path in out.rglob("*") if path.is_file()]
    heard = [text.encode() for text in (made.stdout, made.stderr, *capfd.readouterr())]
    everything = b"\n".join([*written, *heard, *prepared])
    ours = {b"patient", b"0005", b"000000000"}  # a column's name, and digits of tar headers
    assert {text for text in hidden - ours if text in everything} == set()


def test_a_table_of_films_becomes_shards(levels: Array, tmp_path: Path) -> None:
    folder, out = tmp_path / "films", tmp_path / "out"
    folder.mkdir()
    syntaxes = (uid.ExplicitVRLittleEndian, uid.JPEG2000Lossless, uid.RLELossless, uid.JPEGLSLossless)
    names = ("a.dcm", "b.dicom", "c.DCM", "d.dcm")
    for name, syntax in zip(names, syntaxes, strict=True):
        (folder / name).write_bytes(make_film(levels, syntax, WindowCenter=1500, WindowWidth=2000))
    (folder / "labels.csv").write_text(
        "Image,MRN,edema\n" + "".join(f"{name},{name[0]},1\n" for name in names)
    )
    options = (
        "--columns",
        "path=Image,patient=MRN,Edema=edema",
        "--dev",
        0,
        "--size",
        32,
        "--encoding",
        "png",
    )
    made = run_pipeline("shards", folder, out, "--set", "table", *options, "--workers", 1)
    assert made.returncode == 0, made.stderr
    assert run_pipeline("verify", out, "--deep").returncode == 0
    expected = prepare(
        make_film(levels, WindowCenter=1500, WindowWidth=2000), RAW._replace(size=32, encoding="png")
    )
    assert expected.pixels.shape == (32, 38)
    with tarfile.open(out / "train-000000.tar") as tar:
        files = [tar.extractfile(member) for member in tar if member.name.endswith(".png")]
        assert [file.read() for file in files if file] == [expected.data] * 4
