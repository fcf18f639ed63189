import errno
import fcntl
import hashlib
import io
import os
import signal
import tarfile
import zlib
from importlib.metadata import version
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import webdataset
from PIL import Image

from pipeline import DataError, open_shards
from pipeline.base.errors import MachineError
from pipeline.base.files import atomic_file, claimed, write_csv
from pipeline.etl import shards as etl
from pipeline.etl import writing
from pipeline.etl.writing import Reject, ShardRecord
from pipeline.labels import LABELS
from pipeline.manifest import Shard, read_manifest, read_table
from pipeline.sources.rows import MISSING, read_images
from tests.conftest import Shards, default_options, flip, hashes, make_shards, refused


def test_every_frontal_row_is_in_exactly_one_split(chexpert: Path, shards: Shards) -> None:
    folder, manifest = shards
    train, dev, valid = (read_table(folder, split).to_pandas().set_index("key") for split in manifest.splits.values())
    for rows, csv in ((pd.concat([train, dev]), "train.csv"), (valid, "valid.csv")):
        source = pd.read_csv(chexpert / csv).query("`Frontal/Lateral` == 'Frontal'")
        source.index = pd.Index(source["Path"].str.removesuffix(".jpg").str.split("/").str[-3:].str.join("_"))
        labels = [table.sort_index()[list(LABELS)].astype(float) for table in (rows, source)]
        pd.testing.assert_frame_equal(*labels, check_names=False, check_index_type=False)
    assert not {*train["patient"]} & {*dev["patient"]}
    assert not train.index.is_monotonic_increasing  # shuffled


def test_tars_hold_the_images_and_labels_of_the_arrow_table(chexpert: Path, shards: Shards) -> None:
    folder, manifest = shards
    for name, split in manifest.splits.items():
        rows = read_table(folder, split).to_pylist()
        assert len(rows) == split.samples == sum(shard.samples for shard in split.shards)
        for number, shard in enumerate(split.shards):
            data = (folder / shard.file).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.bytes, shard.sha256)
            keys = [row["key"] for row in rows if row["shard"] == number]
            with tarfile.open(folder / shard.file) as tar:
                members = tar.getmembers()
            assert [member.name for member in members] == [f"{key}.{end}" for key in keys for end in ("jpg", "json")]
            assert {(member.mtime, member.uid, member.gid, member.uname) for member in members} == {(0, 0, 0, "")}
            for row in (row for row in rows if row["shard"] == number):
                jpeg = data[row["offset"] : row["offset"] + row["length"]]
                assert zlib.crc32(jpeg) == row["crc"]
                place = row["key"].replace("_study", "/study").replace("_view", "/view")
                source = chexpert / ("valid" if name == "valid" else "train") / f"{place}.jpg"
                with Image.open(source) as original:
                    expected = np.asarray(original.resize((60, 48), Image.Resampling.LANCZOS), float)
                stored = np.asarray(Image.open(io.BytesIO(jpeg)), float)
                assert np.abs(stored - expected).mean() < 1.5  # noise, at quality 95


# webdataset leaves its last shard open until it is collected
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_the_same_samples(shards: Shards) -> None:
    folder, manifest = shards
    split = manifest.split("train")
    urls = [str(folder / shard.file) for shard in split.shards]
    samples = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode("pil")
    for sample, row in zip(samples, read_table(folder, split).to_pylist(), strict=True):
        assert (sample["__key__"], sample["jpg"].size) == (row["key"], (60, 48))
        assert sample["json"].pop("labels") == {label: row[label] for label in LABELS}
        assert sample["json"] == {name: row[name] for name in sample["json"]}


def test_same_bytes_at_any_number_of_workers(chexpert: Path, shards: Shards, tmp_path: Path) -> None:
    make_shards(chexpert, tmp_path / "two", workers=2)
    assert hashes(tmp_path / "two") == hashes(shards[0])


def test_pixel_statistics_are_those_of_the_stored_train_images(chexpert: Path, tmp_path: Path) -> None:
    manifest = make_shards(chexpert, tmp_path / "out", default_options(size=64)).manifest
    pixels = []
    for shard in manifest.split("train").shards:
        with tarfile.open(tmp_path / "out" / shard.file) as tar:
            images = [tar.extractfile(member) for member in tar if member.name.endswith(".jpg")]
            pixels += [np.asarray(Image.open(image)) for image in images if image]
    assert manifest.pixels["mean"] == pytest.approx(np.mean(pixels), abs=0.5)  # of every 16th pixel
    assert manifest.pixels["std"] == pytest.approx(np.std(pixels), abs=0.5)
    for path in chexpert.rglob("*.jpg"):
        Image.new("L", (80, 64), 7).save(path)
    assert make_shards(chexpert, tmp_path / "flat").manifest.pixels == {"mean": 7.0, "std": 1.0}


def test_files_of_others_are_neither_replaced_nor_removed(chexpert: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    reason = "not written by this command, which would replace it; remove it, or name another folder"
    for name in ("dev.arrow", "train-000000.tar", "rejects.csv", "croissant.json"):
        (out / name).write_text("mine")
        with refused(f"{out / name}: {reason}"):
            make_shards(chexpert, out)
        assert (out / name).read_text() == "mine"
        (out / name).unlink()
    (out / "imagenet-000000.tar").write_text("mine")
    make_shards(chexpert, out)
    assert (out / "imagenet-000000.tar").read_text() == "mine"


@pytest.fixture
def film(chexpert: Path) -> Path:
    """An image of train."""
    return chexpert / "train/patient00003/study2/view1_frontal.jpg"


def test_unusable_image_stops_the_run_which_other_versions_cannot_finish(
    chexpert: Path, film: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    film.unlink()
    os.mkfifo(film)  # which is not waited for
    count, rejects = "1 of 40 images cannot be used, more than `max_bad` 2.00%", out / ".partial/rejects.csv"
    with refused(f"{count}; {rejects} lists them; the first: {film}: the file is empty"):
        make_shards(chexpert, out, workers=2, max_bad=0.02)  # one of 40 is 2.5 %
    assert not [path for path in out.rglob("*") if path.name.endswith(".tmp")]
    with pytest.raises(DataError, match=r"not a folder of shards \(no manifest.json\)"):
        read_manifest(out)
    started, now = out / ".partial/options.json", version("simplejpeg")
    started.write_text(started.read_text().replace(f'"simplejpeg": "{now}"', '"simplejpeg": "0.1"'))
    with pytest.raises(DataError, match=rf"holds other shards: simplejpeg is 0.1, not {now}; remove it"):
        make_shards(chexpert, out, max_bad=0.5)


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE, errno.EMFILE])
def test_a_disk_that_fails_ends_the_run_and_rejects_nothing(
    film: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    monkeypatch.setattr(os, "open", Mock(side_effect=OSError(error, os.strerror(error))))
    advice = "; raise the limit, as by ulimit -n 4096" if error == errno.EMFILE else ""
    with refused(f"{film}: cannot be read: {os.strerror(error)}{advice}", MachineError):
        list(read_images([str(film)], [film.parent]))


def test_a_reject_that_is_a_workers_fault_is_told_by_the_files_that_are_seen_here(film: Path) -> None:
    shard = Shard("train-000000.tar", 0, 0, "")
    rejects = tuple(Reject("train", "key", str(file), MISSING) for file in (film.with_name("absent"), film))
    assert etl._name_unseen(ShardRecord(shard, 0, 0, [], rejects)) == f"does not see {film}"
    assert etl._name_unseen(ShardRecord(shard, 0, 0, [], rejects[:1])) == ""


def test_rejects_are_left_out_and_listed_and_tried_again(chexpert: Path, shards: Shards, tmp_path: Path) -> None:
    bad = {3: (None, MISSING), 4: (b"", "the file is empty"), 5: (b"\xff\xd8", "not a readable JPEG: ")}
    contents, expected = {}, {}
    for patient, (content, reason) in bad.items():
        image = chexpert / f"train/patient{patient:05d}/study2/view1_frontal.jpg"
        contents[image] = image.read_bytes()
        image.unlink() if content is None else image.write_bytes(content)
        expected[f"patient{patient:05d}_study2_view1_frontal"] = (str(image), reason)
    out, again = tmp_path / "out", tmp_path / "again"
    for folder in (out, again):
        with pytest.raises(DataError, match=r"images cannot be used, more than `max_bad` 0.00%"):
            make_shards(chexpert, folder)
    manifest = make_shards(chexpert, out, max_bad=0.1).manifest
    rows = list(pd.read_csv(out / "rejects.csv").itertuples())
    assert {row.key: (row.file, row.reason[: len(expected[row.key][1])]) for row in rows} == expected
    assert {row["key"]: row["reason"] for row in manifest.rejects} == {row.key: row.reason for row in rows}
    tables = [read_table(out, split).to_pandas() for split in manifest.splits.values()]
    assert not set(pd.concat(tables)["key"]) & expected.keys()
    assert sum(split.samples for split in manifest.splits.values()) == 37
    # Shards are restored with the rejects that they have.
    before = hashes(out)
    for path in (*out.glob("*.tar"), out / "train.arrow"):
        path.unlink()
    make_shards(chexpert, out, max_bad=0.1)
    assert hashes(out) == before
    # Stopped before the end, the images mended: the same command gives what it would have given.
    for image, content in contents.items():
        image.write_bytes(content)
    make_shards(chexpert, again)
    assert hashes(again) == hashes(shards[0])


def test_link_out_of_the_root_is_rejected_unless_its_target_is_named(
    chexpert: Path, film: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    secret = film.rename(tmp_path / "elsewhere" / "secret.jpg")
    film.symlink_to(secret)
    with pytest.raises(DataError, match=f"{film}: leads out of its folder to {secret}; allow that by --root$"):
        make_shards(chexpert, tmp_path / "out")
    assert make_shards(chexpert, tmp_path / "out", roots=[tmp_path / "elsewhere"]).manifest.rejects == ()


def test_encodings_and_squares_stream_alike(chexpert: Path, tmp_path: Path) -> None:
    batches = {}
    for encoding, suffix in (("jpeg", "jpg"), ("png", "png"), ("raw", "npy")):
        options = default_options(encoding=encoding, square="stretch", size=32, quality=100)
        manifest = make_shards(chexpert, tmp_path / encoding, options).manifest
        (batch,) = open_shards(tmp_path / encoding)["valid"].batches(8, 32, epoch=None)
        batches[encoding] = batch.images.astype(int)
        with tarfile.open(tmp_path / encoding / manifest.split("valid").shards[0].file) as tar:
            assert tar.getnames()[0].endswith(f".{suffix}")
    np.testing.assert_array_equal(batches["png"], batches["raw"])
    assert 0 < np.abs(batches["jpeg"] - batches["raw"]).mean() < 1
    raw, path = open_shards(tmp_path / "raw")["valid"], tmp_path / "raw" / "valid-000000.tar"
    for place in (7, 200):  # in the header of its first image, and in its pixels
        flip(path, raw.split.offset[0] + place)
        with pytest.raises(DataError, match=r"valid-000000.tar: sample .* do not match the checksum in the index$"):
            list(raw.batches(8, 32, epoch=None))
        flip(path, raw.split.offset[0] + place)


def kill_process(_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_step_whose_process_is_killed_is_named(
    chexpert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    for name, step in (("write_plan", "planning"), ("finish", "writing the tables of")):
        with monkeypatch.context() as patch:
            patch.setattr(writing, name, kill_process)
            with refused(f"{step} {out}: its process was killed; is there enough memory?"):
                make_shards(chexpert, out)
    assert make_shards(chexpert, out).is_new


def test_two_processes_do_not_write_to_one_folder(chexpert: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with claimed(out), refused(f"{out}: another process is writing to it; wait for it, or stop it"):
        make_shards(chexpert, out)
    make_shards(chexpert, out)
    assert not (out / ".lock").exists()
    out.chmod(0o500)  # finished shards may be read-only
    assert not make_shards(chexpert, out).is_new


def test_policies_not_given_are_those_of_the_shards_there(chexpert: Path, tmp_path: Path) -> None:
    for blank in ("ignore", None):
        manifest = make_shards(chexpert, tmp_path, policies={"uncertain": None, "blank": blank}).manifest
        assert manifest.policies == {"uncertain": "best", "blank": "ignore"}
    with pytest.raises(DataError, match=r"uncertain is best, not ones"):
        make_shards(chexpert, tmp_path, policies={"uncertain": "ones", "blank": None})


def test_texts_that_a_spreadsheet_would_run_are_quoted(tmp_path: Path) -> None:
    write_csv(tmp_path / "cells.csv", [("=1+1", "@x", 2, -0.5, "a,b", "plain")])
    assert (tmp_path / "cells.csv").read_text() == "'=1+1,'@x,2,'-0.5,\"a,b\",plain\n"


def test_two_writers_of_a_file_do_not_meet(tmp_path: Path) -> None:
    """As a Dask worker that was given up for lost, and the one that does its task again."""
    path = tmp_path / "train-000000.tar"
    with atomic_file(path) as first:
        first.write(b"whole")
        with atomic_file(path) as second:
            second.write(b"wh")
            second.flush()
            assert not path.exists()
        assert path.read_bytes() == b"wh"
    assert path.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_left_goes_and_nothing_else(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "last.pt"):
        (file,) = tmp_path.iterdir()
        left = file.with_name(".last.pt.0123abcd.tmp")
        left.touch()
    (tmp_path / ".mine.tmp").touch()
    with claimed(tmp_path):
        assert not left.exists()
        left.touch()  # by a worker of a cluster that is killed before the run ends
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", ".mine.tmp"}


def test_a_source_that_has_changed_restores_nothing(chexpert: Path, shards: Shards) -> None:
    folder, manifest = shards
    (folder / "train-000001.tar").unlink()
    first = read_table(folder, manifest.split("train"))["key"][7].as_py().replace("_", "/", 2)
    Image.new("L", (80, 64)).save(chexpert / "train" / f"{first}.jpg")
    reason = "the source no longer gives the bytes of these shards; remove the folder, or name another"
    with refused(f"{folder / 'train-000001.tar'}: {reason}"):
        make_shards(chexpert, folder)
    assert not (folder / "train-000001.tar").exists()


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))))
    reason = "its file system has no locks (Function not implemented); choose a folder on another one"
    with refused(f"{tmp_path}: {reason}"), claimed(tmp_path):
        pass
