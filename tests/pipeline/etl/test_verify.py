import hashlib
import re
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from pipeline.base.files import write_table
from pipeline.manifest import Manifest, read_manifest, read_table, write_manifest
from tests.conftest import Shards, default_options, flip, make_shards, run_pipeline

Damage = Callable[[Path, Manifest], list[str]]  # does it, and returns the lines that must be printed


def first_row(folder: Path, manifest: Manifest) -> tuple[Path, str, int, int]:
    """Shard, key, offset and length of the first sample of train."""
    split = manifest.split("train")
    row = read_table(folder, split).to_pylist()[0]
    return folder / split.shards[0].file, row["key"], row["offset"], row["length"]


def edit_table(folder: Path, manifest: Manifest, column: str, value: int) -> None:
    """Set a column's first value in train's table, and the manifest's hash of it."""
    split = manifest.split("train")
    table = read_table(folder, split)
    values = [value, *table[column].to_pylist()[1:]]
    number = table.column_names.index(column)
    table = table.set_column(number, column, pa.array(values, table.schema.field(column).type))
    digest = write_table(folder / split.table, table)
    write_manifest(folder, change(manifest, replace(split, table_sha256=digest)))


def change(manifest: Manifest, train: object) -> Manifest:
    return replace(manifest, splits={**manifest.splits, "train": train})  # type: ignore[dict-item]


def accept(folder: Path, manifest: Manifest) -> None:
    """Write the manifest as if the first shard of train were meant to be as it is."""
    split = manifest.split("train")
    shard, *others = split.shards
    data = (folder / shard.file).read_bytes()
    shard = replace(shard, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    write_manifest(folder, change(manifest, replace(split, shards=(shard, *others))))


def flip_image(folder: Path, manifest: Manifest) -> list[str]:
    path, key, offset, length = first_row(folder, manifest)
    flip(path, offset + length // 2)
    return [f"{path}: sample {key}: its bytes do not match the checksum in the index"]


def flip_json(folder: Path, manifest: Manifest) -> list[str]:
    path, key, _, _ = first_row(folder, manifest)
    age = re.search(rb'"age": (\d+)', path.read_bytes())
    assert age
    flip(path, age.end() - 1)
    return [f"{path}: sample {key}: age is {int(age[1]) ^ 1} in its JSON, {int(age[1])} in the table"]


def flip_padding(folder: Path, manifest: Manifest) -> list[str]:
    path, _, offset, length = first_row(folder, manifest)
    flip(path, offset + length + 1)
    return [f"{path}: damaged: its sha256 is not the manifest's"]


def exchange(folder: Path, manifest: Manifest) -> list[str]:
    first, second = (folder / manifest.split(name).shards[-1].file for name in ("train", "dev"))
    data = first.read_bytes()
    second.rename(first)
    second.write_bytes(data)
    return [f"{first}: holds what belongs in {second.name}", f"{second}: holds what belongs in {first.name}"]


def damage_several(folder: Path, manifest: Manifest) -> list[str]:
    lines = flip_image(folder, manifest)
    path, shard = folder / manifest.split("valid").shards[0].file, manifest.split("train").shards[1].file
    path.unlink()
    (folder / "croissant.json").unlink()
    flip(folder / shard, 0)
    lines += [f"{folder / shard}: byte 0: not a usable tar header: bad checksum", f"{path}: the shard is missing"]
    return [*lines, f"{folder / 'croissant.json'}: missing"]


def exchange_manifest(folder: Path, manifest: Manifest) -> list[str]:
    other = folder.parent / "other"
    make_shards(folder.parent / "CheXpert-v1.0-small", other, default_options(size=32))
    (other / "manifest.json").rename(folder / "manifest.json")
    splits = read_manifest(folder).splits.values()
    reason = "its sha256 is not the manifest's; it is damaged or belongs to other shards"
    lines = [f"{folder / split.table}: {reason}" for split in splits]
    for path, size in {folder / shard.file: shard.bytes for split in splits for shard in split.shards}.items():
        lines.append(f"{path}: damaged: {path.stat().st_size} bytes, not {size} as in the manifest")
    return [*lines, f"{folder / 'croissant.json'}: not that of this manifest"]


def shift_offset(folder: Path, manifest: Manifest) -> list[str]:
    path, key, offset, length = first_row(folder, manifest)
    edit_table(folder, manifest, "offset", offset + 512)
    place = f"{length} bytes at {offset}, not {length} at {offset + 512} as in the table"
    return [f"{path}: sample {key}: {key}.jpg is {place}"]


def move_row(folder: Path, manifest: Manifest) -> list[str]:
    edit_table(folder, manifest, "shard", 1)
    return [f"{folder / 'train.arrow'}: its rows do not lie in the shards as the manifest counts them"]


def miscount(folder: Path, manifest: Manifest) -> list[str]:
    split = manifest.split("train")
    write_manifest(folder, change(manifest, replace(split, patients=split.patients + 1)))
    return [f"{folder / split.table}: {split.patients} patients, not {split.patients + 1} as in the manifest"]


def repeat_split(folder: Path, manifest: Manifest) -> list[str]:
    """All of train once more, as another split."""
    split = manifest.split("train")
    keys, patients = (read_table(folder, split)[column].unique().to_pylist() for column in ("key", "patient"))
    path, shards = folder / "more.arrow", tuple(replace(shard, file=f"more-{shard.file}") for shard in split.shards)
    shutil.copy(folder / "train.arrow", path)
    for shard in split.shards:
        shutil.copy(folder / shard.file, folder / f"more-{shard.file}")
    more = replace(split, table="more.arrow", shards=shards)
    write_manifest(folder, replace(manifest, splits={**manifest.splits, "more": more}))
    lines = [f"{path}: sample {key}: is in train too" for key in keys]
    lines += [f"{path}: {patient} is in train too; splits must not share patients" for patient in patients]
    return [*lines[:20], f"{path}: and {len(lines) - 20} more"]


def rename_member(folder: Path, manifest: Manifest) -> list[str]:
    path, key, _, _ = first_row(folder, manifest)
    data = path.read_bytes().replace(b"patient", b"Patient", 1)
    header = data[:148] + b" " * 8 + data[156:512]
    path.write_bytes(header[:148] + b"%06o\0 " % sum(header) + data[156:])
    accept(folder, manifest)
    return [f"{path}: member 0: {key.replace('p', 'P', 1)}.jpg in the tar, {key}.jpg in the table"]


def append_zeros(folder: Path, manifest: Manifest) -> list[str]:
    path, _, _, _ = first_row(folder, manifest)
    path.write_bytes(path.read_bytes() + bytes(512))
    accept(folder, manifest)
    return [f"{path}: 1536 bytes after the last member, not two empty blocks"]


DAMAGES = [flip_json, flip_padding, exchange, damage_several, exchange_manifest, shift_offset]
DAMAGES += [move_row, miscount, repeat_split, rename_member, append_zeros]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: getattr(damage, "__name__", ""))
def test_damage_is_named(chexpert: Path, shards: Shards, damage: Damage) -> None:
    folder, manifest = shards
    lines = damage(folder, manifest)
    run = run_pipeline("verify", folder, "--workers", 2 if damage is damage_several else 1, code=1)
    assert run.stdout.splitlines() == lines
    remedy = "to restore them, run the command that wrote them again"
    assert re.fullmatch(rf"Error: {folder}: \d+ problems? in \d+ files?; {remedy}", run.stderr.splitlines()[-1])


@pytest.mark.parametrize("options", [(), ("--deep",)])
def test_healthy_shards_pass(shards: Shards, options: tuple[str, ...]) -> None:
    folder, manifest = shards
    run = run_pipeline("verify", folder, *options)
    written = [shard for split in manifest.splits.values() for shard in split.shards]
    samples, size = sum(shard.samples for shard in written), sum(shard.bytes for shard in written) / 1e6
    counts = f"3 splits, {len(written)} shards, {samples} samples, {size:,.1f} MB"
    assert re.fullmatch(rf"{folder}: OK: {counts} in \d+\.\d s\n", run.stdout)
    assert run.stderr == f"Verifying: {len(written)} of {len(written)} shards\nnext: pipeline audit {folder}\n"


def deep_only(folder: Path, lines: list[str]) -> None:
    run_pipeline("verify", folder)
    run = run_pipeline("verify", folder, "--deep", code=1)
    assert run.stdout.splitlines() == lines


@pytest.mark.parametrize("damage", [flip_json, flip_image])
def test_deep_compares_each_sample_with_its_row(shards: Shards, damage: Damage) -> None:
    lines = damage(*shards)
    accept(*shards)
    deep_only(shards[0], lines)


def test_deep_decodes_each_image(shards: Shards) -> None:
    folder, manifest = shards
    path, key, offset, length = first_row(folder, manifest)
    data = bytearray(path.read_bytes())
    data[offset + 2 : offset + length] = bytes(length - 2)
    path.write_bytes(data)
    accept(folder, manifest)
    edit_table(folder, read_manifest(folder), "crc", zlib.crc32(data[offset : offset + length]))
    reason = "tjDecompressHeader3(): Could not determine subsampling level of JPEG image"
    deep_only(folder, [f"{path}: sample {key}: does not decode: {reason}"])


def test_leftovers_are_warnings(shards: Shards) -> None:
    folder, manifest = shards
    (folder / ".train-000000.tar.0123abcd.tmp").touch()
    (folder / ".partial").mkdir()
    shutil.copy(folder / manifest.split("dev").shards[0].file, folder / "test-000000.tar")
    left = "left over from an interrupted run; delete it"
    reasons = {".partial": left, ".train-000000.tar.0123abcd.tmp": left}
    reasons["test-000000.tar"] = "the manifest does not list it"
    warnings = [f"Warning: {folder / name}: {reason}" for name, reason in reasons.items()]
    assert run_pipeline("verify", folder).stderr.splitlines()[1:-1] == warnings


def test_images_of_two_splits_and_of_one_level_are_warned_of(tmp_path: Path) -> None:
    splits: list[object] = []
    for name, levels in (("train", (50, 60)), ("test", (60, 70))):
        for level in levels:
            Image.new("L", (32, 32), level).save(tmp_path / f"{name}{level}.png")
        lines = ["path,patient,Edema", *(f"{name}{level}.png,{name}{level},1" for level in levels)]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines) + "\n")
        splits += ["--split", f"{name}={tmp_path / name}.csv"]
    words = ("--set", "table", "--columns", "path=path,patient=patient,Edema=Edema", "--dev", 0, *splits)
    out = tmp_path / "out"
    twice = "Warning: 1 images of test, such as test60, are in train too: results on them are too good"
    assert twice in run_pipeline("shards", tmp_path, out, *words, "--workers", 1).stderr.splitlines()
    manifest = read_manifest(out)
    for name, split in manifest.splits.items():
        digest = write_table(out / split.table, read_table(out, split).drop_columns(["note"]))
        manifest = replace(manifest, splits={**manifest.splits, name: replace(split, table_sha256=digest)})
    write_manifest(out, manifest)
    flat = "Warning: 4 of the images: one level of gray; the first is test60"
    for deep in ((), ("--deep",)):
        lines = run_pipeline("verify", out, *deep).stderr.splitlines()
        assert (twice in lines, flat in lines) == (True, bool(deep))
