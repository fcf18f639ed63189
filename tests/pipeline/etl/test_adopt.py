import csv
import hashlib
import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipeline import DataError, open_shards
from pipeline.etl.adopt import write_index
from pipeline.etl.tar import map_file, walk_tar
from pipeline.etl.verify import verify_shards
from pipeline.images import resize
from pipeline.labels import LABELS, read_labels
from pipeline.manifest import read_manifest
from pipeline.policies import make_targets, parse_uncertain_policy
from pipeline.stream.samples import open_split
from tests.conftest import make_shards, run_pipeline

# webdataset leaves its last shard open until it is collected
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)

Sample = dict[str, Any]


def key_of(row: dict[str, str]) -> str:
    return "_".join(Path(row["Path"]).with_suffix("").parts[-3:])


def read_rows(chexpert: Path, split: str) -> list[dict[str, str]]:
    with (chexpert / f"{split}.csv").open() as file:
        return list(csv.DictReader(file))


def own_json(row: dict[str, str]) -> Sample:
    """The json of `pipeline shards`."""
    patient, study, view = key_of(row).split("_", 2)
    facts = {"key": key_of(row), "patient": patient, "study": int(study[5:]), "view": view.split("_")[1]}
    facts |= {"sex": row["Sex"], "age": int(row["Age"]), "projection": row["AP/PA"] or None}
    return facts | {"labels": {label: int(float(row[label])) if row[label] else None for label in LABELS}}


def flat_json(row: dict[str, str]) -> Sample:
    """A row as pandas reads it: blanks are NaN, labels floats."""
    numbers = {name: float(row[name] or "nan") for name in LABELS}
    return row | numbers | {"Age": int(row["Age"]), "AP/PA": row["AP/PA"] or float("nan")}


def write(folder: Path, pattern: str, samples: list[Sample], maxcount: int = 5) -> None:
    folder.mkdir(exist_ok=True)
    with webdataset.ShardWriter(str(folder / pattern), maxcount=maxcount, verbose=0) as writer:
        for sample in samples:
            writer.write(sample)


def make_samples(chexpert: Path, layout: str, split: str = "train") -> Iterator[Sample]:
    for number, row in enumerate(read_rows(chexpert, split)):
        image = {"__key__": key_of(row), "jpg": (chexpert.parent / path_of(chexpert, row)).read_bytes()}
        if layout == "own":
            yield image | {"json": own_json(row)}
        elif layout == "flat":
            yield image | {"json": flat_json(row), "cls": 1}
        elif layout == "csv":
            yield {"__key__": f"images/{key_of(row)}", "jpeg": image["jpg"]}
        elif layout == "img2dataset":
            key = f"{number:09d}"
            facts = {"url": f"file:///data/{row['Path']}", "key": key, "status": "success", "caption": None}
            yield {"__key__": key, "jpg": image["jpg"], "json": facts, "txt": "film"}


def path_of(chexpert: Path, row: dict[str, str]) -> Path:
    return chexpert / Path(*Path(row["Path"]).parts[1:])


@pytest.mark.parametrize("layout", ["own", "flat", "csv", "img2dataset"])
def test_shards_of_others_stream(chexpert: Path, tmp_path: Path, layout: str) -> None:
    folder = tmp_path / "wds"
    pattern = "%05d.tar" if layout == "img2dataset" else "chexpert-train-%06d.tar"
    name = "train" if layout == "img2dataset" else "chexpert-train"
    write(folder, pattern, list(make_samples(chexpert, layout)), maxcount=20)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    from_csv = layout in ("csv", "img2dataset")
    options = ["--csv", chexpert / "train.csv"] if from_csv else []
    run = run_pipeline("index", folder, *options, *(["--split", "train"] if layout == "img2dataset" else []))
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        f"{name:6}       48 samples      16 patients    3 shards",
        f"{folder}: indexed",
    ]
    assert run.stderr.splitlines()[-1] == f"next: pipeline verify {folder} --deep"
    assert {path: path.read_bytes() for path in folder.glob("*.tar")} == before

    manifest = read_manifest(folder)
    split = open_split(folder, manifest, name)
    table = read_labels(chexpert / "train.csv")
    assert split.table.select(table.column_names[1:]).equals(table.drop_columns(["path"]))
    target, _ = make_targets(split.table, parse_uncertain_policy("best"), "zeros", seed=0)
    images = [
        np.asarray(Image.open(path_of(chexpert, row)).resize((32, 32), Image.Resampling.HAMMING))
        for row in read_rows(chexpert, "train")
    ]
    seen = []
    opened = open_shards(folder)[name]
    for batch in (*opened.batches(8, 32, epoch=0), *opened.batches(10, 32, epoch=None)):
        rows = batch.step.images
        np.testing.assert_array_equal(batch.images[:, 0], np.array([images[row] for row in rows]))
        np.testing.assert_array_equal(batch.target, target[rows])
        seen += rows.tolist()
    assert sorted(seen) == sorted([*range(48)] * 2)
    originals = np.array(
        [np.asarray(Image.open(path_of(chexpert, row))) for row in read_rows(chexpert, "train")]
    )
    assert manifest.pixels == {
        "mean": pytest.approx(originals.mean(), abs=1e-3),
        "std": pytest.approx(originals.std(), abs=1e-3),
    }
    report = verify_shards(folder, deep=True, workers=1)
    assert (report.problems, report.warnings) == ({}, [])
    assert run_pipeline("stats", folder).stdout.startswith("48 images, 32 studies, 16 patients")


def test_verify_names_damage_in_shards_of_others(chexpert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "wds"
    write(folder, "train-%06d.tar", list(make_samples(chexpert, "flat")))
    write_index(folder)
    path = folder / "train-000003.tar"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"Age": 2', b'"Age": 3', 1))
    assert verify_shards(folder, deep=False, workers=1).problems == {
        path.name: [
            f"{path}: sample patient00006_study1_view1_frontal: age is 36 in its JSON, 26 in the table"
        ]
    }


def test_each_prefix_is_a_split(chexpert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "wds"
    for split in ("valid", "train"):
        write(folder, f"{split}-%06d.tar", list(make_samples(chexpert, "own", split)))
    manifest = write_index(folder)
    assert {name: split.samples for name, split in manifest.splits.items()} == {"train": 48, "valid": 12}
    assert manifest.options == {"indexed": True, "labels": "json", "encoding": "jpeg"}
    with pytest.raises(DataError) as caught:
        write_index(folder)
    assert str(caught.value) == (
        f"{folder}: has a manifest.json already; `pipeline verify {folder}` checks it; to index anew, remove it first"
    )


def first_sample(chexpert: Path) -> Sample:
    return next(make_samples(chexpert, "flat"))


def npy(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, pixels)
    return file.getvalue()


KEY = "patient00001_study1_view1_frontal"
NO_JPEG = "Could not determine subsampling level of JPEG image"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"json": None}, "no labels in its JSON; give them by `csv`"),
        ({"json": {"caption": "film"}}, "no labels in its JSON; give them by `csv`"),
        (
            {"json": b"{"},
            "its JSON: damaged: not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        ),
        ({"jpg": None}, "needs one .jpg, .jpeg, .png or .npy, but holds .cls, .json"),
        ({"jpeg": b"x"}, "needs one .jpg, .jpeg, .png or .npy, but holds .cls, .jpeg, .jpg, .json"),
        ({"jpg": None, "png": b"x"}, f"{KEY}.png does not decode: the file ends early"),
        (
            {"jpg": None, "npy": npy(np.zeros((4, 5), np.float32))},
            f"{KEY}.npy does not decode: not a .npy file of gray pixels, uint8 [H, W]",
        ),
        ({"jpg": b"x"}, f"{KEY}.jpg does not decode: tjDecompressHeader3(): {NO_JPEG}"),
        ({"Edema": 2}, "its JSON holds 2 as Edema"),
        ({"Edema": True}, "its JSON holds True as Edema"),
        (
            {"Edema": None, "Age": "old"},
            "its JSON holds 'old' as age, not a number of up to 3 digits",
        ),
        ({"Sex": "\ud800"}, r"its JSON holds '\ud800' as sex"),
        ({"Frontal/Lateral": "Oblique"}, "its JSON holds 'oblique' as view"),
        ({"Sex": ...}, "its JSON lacks sex"),
        ({"Fracture": ...}, "its JSON lacks Fracture"),
    ],
)
def test_unusable_sample_is_named(chexpert: Path, tmp_path: Path, changes: Sample, message: str) -> None:
    sample = first_sample(chexpert)
    for name, value in changes.items():
        (sample if name in ("jpg", "jpeg", "png", "npy", "json") else sample["json"])[name] = value
    sample["json"] = drop(sample["json"]) if isinstance(sample["json"], dict) else sample["json"]
    folder = tmp_path / "wds"
    write(folder, "train-%06d.tar", [{name: value for name, value in sample.items() if value is not None}])
    with pytest.raises(DataError) as caught:
        write_index(folder)
    assert str(caught.value) == f"{folder / 'train-000000.tar'}: sample {KEY}: {message}"
    assert not list(folder.glob("*.arrow"))


def drop(document: Sample) -> Sample:
    return {name: value for name, value in document.items() if value is not ...}


def test_unknown_or_unjoinable_sample_is_named(chexpert: Path, tmp_path: Path) -> None:
    sample = first_sample(chexpert)
    path = tmp_path / "wds" / "train-000000.tar"
    fields = "key, Path, url, caption"
    long = "patient00099_study1234567_view1_frontal"
    for key, message in (
        (
            "patient00099_study1_view1_frontal",
            f"patient00099_study1_view1_frontal is not in {chexpert / 'train.csv'}",
        ),
        (long, f"{long}: study numbers have up to 6 digits here"),
        ("film1", f"no patientN_studyN_viewN_frontal in its key, nor in {fields} of its JSON"),
    ):
        write(path.parent, "train-%06d.tar", [{"__key__": key, "jpg": sample["jpg"]}])
        run = run_pipeline("index", path.parent, "--csv", chexpert / "train.csv")
        assert (run.returncode, run.stderr) == (1, f"Error: {path}: sample {key}: {message}\n")


def test_repeats_are_refused(chexpert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "wds"
    samples = list(make_samples(chexpert, "own"))
    write(folder, "train-%06d.tar", [*samples[:5], samples[1]])
    with pytest.raises(DataError) as caught:
        write_index(folder)
    key = samples[1]["__key__"]
    assert str(caught.value) == f"{folder / 'train-000001.tar'}: sample {key}: is in train-000000.tar already"
    write(folder, "train-%06d.tar", samples[:6])
    write(folder, "valid-%06d.tar", samples[6:11])
    write_index(folder)
    (folder / "manifest.json").unlink()
    write(folder, "valid-%06d.tar", samples[5:10])
    with pytest.raises(DataError) as caught:
        write_index(folder)
    message = "patient00002 is in train and in valid; splits must not share patients"
    assert str(caught.value) == f"{folder}: {message}"


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        (None, {}, "{folder}: no .tar files there"),
        (
            "00000.tar",
            {},
            "{folder}/00000.tar: the name tells no split, as train-000000.tar does; give it by `split`",
        ),
        ("00000.tar", {"split": "../x"}, "split '../x' is not a name of letters a to z, digits, _ and -"),
        (
            "My Data-0.tar",
            {},
            "{folder}/My Data-0.tar: 'My Data' is not a split's name of letters a to z, digits, _ and -; "
            "rename the file, or give all shards one by `split`",
        ),
        (
            "train-00000-of-00003.tar",
            {},
            "{folder}/train-00001-of-00003.tar: missing; the names of the others say that there are 3",
        ),
        (
            "train-00004-of-00003.tar",
            {},
            "{folder}/train-00004-of-00003.tar: there is no such number among 3; rename or remove it",
        ),
        ("a-0.tar", {}, "{folder}/a-0.tar: the file is empty"),
    ],
)
def test_unusable_folder(tmp_path: Path, file: str | None, options: dict[str, str], message: str) -> None:
    if file is not None:
        (tmp_path / file).touch()
    with pytest.raises(DataError) as caught:
        write_index(tmp_path, **options)  # type: ignore[arg-type]
    assert str(caught.value) == message.format(folder=tmp_path)


def walk(path: Path) -> list[tuple[str, bytes]]:
    with map_file(path) as data:
        return [(name, data[offset : offset + size]) for name, offset, size in walk_tar(path, data)]


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_walk_reads_what_tarfile_writes(tmp_path: Path, layout: int) -> None:
    members = [
        ("a.jpg", b"x" * 513),
        ("ü/" + "b" * 60 + "/" + "c" * 90 + ".jpg", b""),
        ("d.json", b"{}" * 256),
    ]
    if layout != tarfile.USTAR_FORMAT:
        members.append(("e" * 300, b"y"))
    with tarfile.open(tmp_path / "x.tar", "w", format=layout, pax_headers={"comment": "global"}) as tar:
        folder = tarfile.TarInfo("ü")  # which is no member to read
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5  # a pax header for each, as webdataset's
            tar.addfile(info, io.BytesIO(data))
    assert walk(tmp_path / "x.tar") == members


def test_walk_refuses_other_members_and_damage(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"

    def refusal(name: str, **attributes: object) -> str:
        with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
            tar.addfile(tarfile.TarInfo("first"))
            info = tarfile.TarInfo(name)
            for attribute, value in attributes.items():
                setattr(info, attribute, value)
            tar.addfile(info)
        with pytest.raises(DataError) as caught:
            walk(path)
        return str(caught.value).removeprefix(f"{path}: byte 512: ")

    unusable = "not a usable tar header: "
    assert refusal("link", type=tarfile.SYMTYPE, linkname="x") == f"{unusable}link is not a regular file"
    assert refusal("fifo", type=tarfile.FIFOTYPE) == f"{unusable}fifo is not a regular file"
    assert refusal("/etc/x.jpg") == f"{unusable}/etc/x.jpg leads out of the folder"
    assert refusal("a/../../x.jpg") == f"{unusable}a/../../x.jpg leads out of the folder"
    room = 10240 - 1024
    assert refusal("x", size=10**6) == f"{unusable}a member of 1000000 bytes, where the file has {room} more"
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo("first"))
    whole = path.read_bytes()
    for data, reason in (
        (whole[:512], f"{unusable}empty header"),
        (whole[:700], f"{unusable}truncated header"),
        (whole[:1024], "an empty block, but not the end of the tar"),
        (whole[:-1] + b"x", "an empty block, but not the end of the tar"),
    ):
        path.write_bytes(data)
        with pytest.raises(DataError, match=rf"^{re.escape(str(path))}: byte 512: {reason}$"):
            walk(path)


def test_tables_of_others_are_not_replaced(chexpert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "wds"
    write(folder, "train-%06d.tar", list(make_samples(chexpert, "own", "train")))
    table = folder / "train.arrow"
    table.write_text("mine")
    message = f"^{table}: not written by this command, which would replace it; move it away$"
    with pytest.raises(DataError, match=message):
        write_index(folder)
    assert table.read_text() == "mine"
    table.unlink()
    manifest = write_index(folder)
    (folder / "manifest.json").unlink()  # as if it had been killed before its last step
    assert write_index(folder) == manifest


def test_names_that_count_are_one_split(chexpert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "wds"
    write(folder, "train-%05d-of-00003.tar", list(make_samples(chexpert, "own")), maxcount=18)
    manifest = write_index(folder)
    assert {name: [shard.samples for shard in split.shards] for name, split in manifest.splits.items()} == {
        "train": [18, 18, 12]
    }


def test_an_unfinished_run_of_shards_is_left_to_it(chexpert: Path, tmp_path: Path) -> None:
    image = path_of(chexpert, read_rows(chexpert, "valid")[-3])
    whole = image.read_bytes()
    image.write_bytes(b"")
    out = tmp_path / "out"
    with pytest.raises(DataError, match="images cannot be used"):
        make_shards(chexpert, out)
    assert list(out.glob(".partial/*.tar"))
    with pytest.raises(DataError) as caught:
        write_index(out)
    assert str(caught.value) == (
        f"{out}: `pipeline shards` has not finished it; continue with "
        f"`pipeline shards SOURCE {out}` and the options it had"
    )
    image.write_bytes(whole)
    manifest = make_shards(chexpert, out).manifest
    assert manifest == make_shards(chexpert, tmp_path / "undisturbed").manifest


def test_every_image_of_every_split_is_decoded(chexpert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "wds"
    write(folder, "train-%06d.tar", list(make_samples(chexpert, "own")))
    valid = list(make_samples(chexpert, "own", "valid"))
    png = io.BytesIO()
    Image.open(io.BytesIO(valid[7]["jpg"])).save(png, "PNG")
    valid[7]["jpg"] = png.getvalue()
    write(folder, "valid-%06d.tar", valid)
    run = run_pipeline("index", folder, "--workers", 2)
    key, path = valid[7]["__key__"], folder / "valid-000001.tar"
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == (
        f"Error: {path}: sample {key}: {key}.jpg does not decode: tjDecompressHeader3(): {NO_JPEG}"
    )
    assert not (folder / "manifest.json").exists()


@pytest.mark.parametrize(("encoding", "suffix"), [("png", "png"), ("raw", "npy")])
def test_other_encodings_stream(chexpert: Path, tmp_path: Path, encoding: str, suffix: str) -> None:
    folder = tmp_path / "wds"
    samples, images = list(make_samples(chexpert, "own")), []
    for sample in samples:
        image = Image.open(io.BytesIO(sample["jpg"]))
        images.append(np.asarray(image))
        png = io.BytesIO()
        image.save(png, "PNG")
        sample[suffix] = png.getvalue() if suffix == "png" else npy(images[-1])
    jpegs = [sample.pop("jpg") for sample in samples]
    write(folder, "train-%06d.tar", samples, maxcount=20)
    manifest = write_index(folder)
    assert manifest.options == {"indexed": True, "labels": "json", "encoding": encoding}
    for batch in open_shards(folder)["train"].batches(10, 64, epoch=None):
        expected = [resize(images[row], 64, 64) for row in batch.step.images]
        np.testing.assert_array_equal(batch.images[:, 0], np.array(expected))
    report = verify_shards(folder, deep=True, workers=1)
    assert (report.problems, report.warnings) == ({}, [])

    (folder / "manifest.json").unlink()
    samples[30]["jpg"] = jpegs[30]  # which is its image then
    write(folder, "train-%06d.tar", samples, maxcount=20)
    key = samples[30]["__key__"]
    with pytest.raises(DataError) as caught:
        write_index(folder)
    assert str(caught.value) == (
        f"{folder / 'train-000001.tar'}: sample {key}: {key}.jpg is jpeg, unlike train-000000.tar: "
        f"{samples[0]['__key__']}.{suffix}; index images of one encoding"
    )


def test_each_split_has_a_csv_of_its_own(chexpert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "wds"
    for split in ("train", "valid"):
        write(folder, f"{split}-%06d.tar", list(make_samples(chexpert, "csv", split)), maxcount=20)
    csvs = {split: chexpert / f"{split}.csv" for split in ("train", "valid")}
    train, valid = (f"{split}={path}" for split, path in csvs.items())
    for options, code, message in (
        ((train,), 1, f"Error: {folder / 'valid-000000.tar'}: no CSV for valid; add --csv valid=FILE"),
        (
            (train, valid, "test=x.csv"),
            1,
            "Error: --csv test=x.csv: no shards of test; there are train, valid",
        ),
        ((train, train), 2, "Error: --csv train given twice: a split takes one CSV"),
        ((train, "x.csv"), 2, "Error: --csv x.csv: with several, each is like train=FILE"),
    ):
        run = run_pipeline("index", folder, *(part for csv in options for part in ("--csv", csv)))
        assert (run.returncode, run.stderr.splitlines()[-1]) == (code, message)
    assert run_pipeline("index", folder, "--csv", valid, "--csv", train).returncode == 0
    manifest = read_manifest(folder)
    assert manifest.sources == {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in csvs.items()
    }
    for name, path in csvs.items():
        table = read_labels(path)
        read = open_split(folder, manifest, name).table
        assert read.select(table.column_names[1:]).equals(table.drop_columns(["path"]))
