"""Corpora of pictures: every input gives the same pixels, and every mistake is named."""

import gzip
import io
import json
import os
import struct
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from numpy.typing import NDArray
from PIL import Image
from pyarrow import parquet
from support.image_corpora import draw_pixels, encode, write_folders
from typer.testing import CliRunner

from megarecur.data import pictures
from megarecur.data.images import ImageCorpus
from megarecur.data.pictures import decode
from megarecur.data_prep import image_inputs
from megarecur.data_prep.contact_sheet import choose, draw_corpus
from megarecur.data_prep.image_encoding import DamagedPicture, Encoding, encode_picture
from megarecur.data_prep.image_inputs import FieldNames
from megarecur.data_prep.images import ImageRequest, prepare_images
from megarecur.data_prep.inspect import inspect_corpus
from megarecur.errors import ConfigError, DataError
from megarecur.launch.cli import main
from megarecur.launch.prep import app

NAMES = ["cat", "dog", "owl"]
LABELS = [0, 1, 2, 0, 1, 2, 0, 1, 2]
PIXELS = [draw_pixels(i) for i in range(len(LABELS))]
"""Nine pictures of 8 x 8 pixels."""


def prepare(*inputs: Path, out: Path, **options: Any) -> dict[str, Any]:
    """Prepare pictures in this process, and return the manifests."""
    return prepare_images(ImageRequest(tuple(map(str, inputs)), **options), out, workers=1)


def read_all(path: Path) -> list[tuple[str, NDArray[Any]]]:
    """Class and pixels of all pictures of a corpus, in order."""
    corpus = ImageCorpus(path)
    return [
        (corpus.classes[label], np.asarray(decode(corpus.pictures.read(n), corpus.channels)))
        for n, label in enumerate(corpus.labels.tolist())
    ]


# ----------------------------------------------------------------------------------- inputs


def as_folders(folder: Path) -> Path:
    for i, label in enumerate(LABELS):
        (folder / NAMES[label]).mkdir(parents=True, exist_ok=True)
        (folder / NAMES[label] / f"{i}.png").write_bytes(encode(PIXELS[i]))
    (folder / NAMES[0] / "notes.txt").write_text("no picture")
    return folder


def as_table(folder: Path, described: bool = True, arrow: bool = False) -> Path:
    folder.mkdir()
    rows = [{"bytes": encode(pixels), "path": None} for pixels in PIXELS]
    table = pyarrow.table(
        {"image": rows, "label": LABELS if described else [NAMES[i] for i in LABELS]}
    )
    if described:
        features = {"image": {"_type": "Image"}, "label": {"names": NAMES, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
    if arrow:
        with (
            pyarrow.OSFile(str(folder / "data.arrow"), "wb") as file,
            pyarrow.ipc.new_stream(file, table.schema) as writer,
        ):
            writer.write_table(table, max_chunksize=4)
        return folder / "data.arrow"
    parquet.write_table(table, folder / "train-0.parquet", row_group_size=4)
    return folder


def as_tar(folder: Path) -> Path:
    folder.mkdir()
    with tarfile.open(folder / "shard-000.tar", "w") as archive:
        for i, label in enumerate(LABELS):
            other = {"cls": NAMES[label].encode()} if i % 2 else {
                "json": json.dumps({"label": NAMES[label], "width": 8}).encode()
            }  # fmt: skip
            for suffix, content in {"png": encode(PIXELS[i]), **other}.items():
                member = tarfile.TarInfo(f"a/{i:03}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return folder


def write_idx(path: Path, values: NDArray[np.uint8]) -> None:
    head = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    content = head + values.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


GREY = np.stack([draw_pixels(i, channels=1) for i in range(len(LABELS))])


def as_idx(folder: Path) -> Path:
    folder.mkdir()
    for split in ("train", "t10k"):
        write_idx(folder / f"{split}-images-idx3-ubyte.gz", GREY)
        write_idx(folder / f"{split}-labels-idx1-ubyte.gz", np.array(LABELS, np.uint8))
    return folder


@pytest.mark.parametrize(
    "make",
    [
        as_folders,
        as_table,
        lambda folder: as_table(folder, described=False),
        lambda folder: as_table(folder, arrow=True),
        as_tar,
    ],
    ids=["folders", "parquet", "parquet of names", "arrow", "tar"],
)
def test_inputs_give_the_same_pictures_and_classes(
    tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    source = make(tmp_path / "in")
    manifest = prepare(source, out=tmp_path / "out")["train"]
    task = manifest.task
    assert task is not None and task["classes"] == NAMES and task["of_classes"] == [3, 3, 3]
    assert task["kind"] == "image" and task["num_samples"] == 9 and task["channels"] == 3
    assert (task["height"], task["width"]) == (8, 8)
    values = np.stack(PIXELS) / 255
    np.testing.assert_allclose(task["mean"], values.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(task["std"], values.std((0, 1, 2)), rtol=1e-12)
    found = read_all(tmp_path / "out" / "train")
    expected = [(NAMES[label], pixels) for label, pixels in zip(LABELS, PIXELS, strict=True)]
    if make is as_folders:  # whose order is drawn from the names of files
        assert [name for name, _ in found] != sorted(name for name, _ in found)
        found.sort(key=lambda pair: pair[1].tobytes())
        expected.sort(key=lambda pair: pair[1].tobytes())
    for (name, pixels), (wanted, wanted_pixels) in zip(found, expected, strict=True):
        assert name == wanted and np.array_equal(pixels, wanted_pixels)


@pytest.mark.parametrize("kind", ["idx", "npz", "medmnist"])
def test_arrays_become_png_of_one_channel_and_names_are_given(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "in"
    if kind == "idx":
        as_idx(source)
    elif kind == "npz":
        source = tmp_path / "mnist.npz"
        labels = np.array(LABELS, np.uint8)
        np.savez(source, x_train=GREY, y_train=labels, x_test=GREY, y_test=labels)
    else:
        source = tmp_path / "pathmnist.npz"
        labels = np.array(LABELS, np.uint8)[:, None]
        np.savez(source, train_images=GREY, train_labels=labels, val_images=GREY,
                 val_labels=labels, test_images=GREY, test_labels=labels)  # fmt: skip
    made = prepare(source, out=tmp_path / "out", class_names=tuple(NAMES))
    assert set(made) == {"train", "val"}
    for split, manifest in made.items():
        assert manifest.task["channels"] == 1 and manifest.task["classes"] == NAMES
        found = read_all(tmp_path / "out" / split)
        assert [name for name, _ in found] == [NAMES[label] for label in LABELS]
        assert np.array_equal(np.stack([pixels for _, pixels in found]), GREY)


def test_rows_of_a_file_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_inputs, "UNIT_BYTES", 1)
    monkeypatch.setattr(image_inputs, "UNIT_ROWS", 4)
    for make in (as_table, as_idx):
        source = make(tmp_path / f"{make.__name__}-in")
        prepare(source, out=tmp_path / make.__name__)
        found = read_all(tmp_path / make.__name__ / "train")
        wanted = PIXELS if make is as_table else list(GREY)
        assert all(np.array_equal(a, b) for (_, a), b in zip(found, wanted, strict=True))
    units = image_inputs.find_inputs([str(tmp_path / "as_table-in")], "train", FieldNames(), ())
    assert [unit.first_row for unit in units.units["train"]] == [0, 4, 8]


def test_splits_are_found_by_their_names(tmp_path: Path) -> None:
    write_folders(tmp_path / "in" / "train")
    write_folders(tmp_path / "in" / "test", each=1, first=100)
    made = prepare(tmp_path / "in", out=tmp_path / "a")
    assert [made[split].task["num_samples"] for split in ("train", "val")] == [12, 3]
    write_folders(tmp_path / "in" / "val", each=2, first=200)
    made = prepare(tmp_path / "in", out=tmp_path / "b")
    assert made["val"].task["num_samples"] == 6, "a split for validation comes before one of tests"
    made = prepare(tmp_path / "in/train", out=tmp_path / "c", val=(str(tmp_path / "in/test"),))
    assert made["val"].task["num_samples"] == 3
    assert made["val"].task["mean"] == made["train"].task["mean"]
    with pytest.raises(ConfigError, match="the inputs have a split for validation"):
        prepare(tmp_path / "in", out=tmp_path / "d", val_fraction=0.5)


def test_a_share_is_chosen_by_the_hash_of_a_picture(tmp_path: Path) -> None:
    source = write_folders(tmp_path / "in", each=40)
    (source / "class_1" / "copy.png").write_bytes((source / "class_1" / "0.png").read_bytes())
    made = prepare(source, out=tmp_path / "out", val_fraction=0.3)
    counts = {split: manifest.task["num_samples"] for split, manifest in made.items()}
    assert sum(counts.values()) == 121 and 20 < counts["val"] < 54
    train, val = (
        {pixels.tobytes() for _, pixels in read_all(tmp_path / "out" / s)} for s in ("train", "val")
    )
    assert not train & val


def test_cifar_keeps_its_bytes(data_dir: Path, tmp_path: Path) -> None:
    file = data_dir / "images/cifar10/test-00000-of-00001.parquet"
    made = prepare(file, out=tmp_path / "out", val_fraction=0.2)
    assert sum(m.task["num_samples"] for m in made.values()) == 2000
    assert made["train"].task["classes"][:3] == ["airplane", "automobile", "bird"]
    assert made["train"].task["mean"] == pytest.approx([0.49, 0.48, 0.45], abs=0.01)
    rows = parquet.read_table(file).to_pylist()
    expected = {row["image"]["bytes"]: row["label"] for row in rows}
    for split in made:
        corpus = ImageCorpus(tmp_path / "out" / split)
        for number, label in enumerate(corpus.labels.tolist()):
            assert expected[corpus.pictures.read(number)] == label


def test_shards_are_those_of_mosaicml_streaming(tmp_path: Path) -> None:
    from megarecur.data.torchvision_stub import make_torchvision_importable

    make_torchvision_importable()
    from streaming import LocalDataset

    source = as_table(tmp_path / "in")
    prepare(source, out=tmp_path / "out")
    dataset = LocalDataset(str(tmp_path / "out" / "train"))
    assert len(dataset) == 9
    assert dataset[4]["image"] == encode(PIXELS[4]) and dataset[4]["label"] == 1


# --------------------------------------------------------------------------------- pictures


def pixels_of(content: bytes) -> NDArray[Any]:
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_and_png_are_kept(kind: str, channels: int) -> None:
    content = encode(draw_pixels(1, (6, 9), channels), kind)
    picture = encode_picture(content, Encoding())
    assert picture.content == content and picture.grey == (channels == 1)
    assert (picture.height, picture.width) == (6, 9)


@pytest.mark.parametrize("kind", ["BMP", "GIF", "TIFF", "PPM", "WEBP", "TGA"])
def test_other_formats_become_png_with_the_same_pixels(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encode(draw_pixels(1, (6, 9)), kind, **options)
    picture = encode_picture(content, Encoding())
    with Image.open(io.BytesIO(content)) as image:
        expected = np.asarray(image.convert("RGB"))
    assert picture.content.startswith(b"\x89PNG")
    assert np.array_equal(pixels_of(picture.content), expected)


def test_pictures_are_turned_as_exif_says() -> None:
    pixels = draw_pixels(1, (6, 9))
    exif = Image.Exif()
    for orientation, expected in ((1, pixels), (3, pixels[::-1, ::-1]), (6, np.rot90(pixels, -1))):
        exif[0x0112] = orientation
        content = encode(pixels, "PNG", exif=exif)
        picture = encode_picture(content, Encoding())
        assert np.array_equal(pixels_of(picture.content), expected)
        assert (picture.content == content) == (orientation == 1)
    content = encode(pixels, "JPEG", exif=exif)
    assert encode_picture(content, Encoding()).content.startswith(b"\xff\xd8"), "a photo stays JPEG"


def test_palettes_are_kept_and_alpha_is_composited() -> None:
    palette = Image.fromarray(draw_pixels(1)).quantize(8)
    file = io.BytesIO()
    palette.save(file, "PNG")
    picture = encode_picture(file.getvalue(), Encoding())
    assert picture.content == file.getvalue() and not picture.grey
    assert np.array_equal(decode(picture.content, 3), palette.convert("RGB"))
    half = np.full((2, 2, 4), (200, 100, 0, 128), np.uint8)
    for colour, expected in (("white", (227, 177, 127)), ("#000000", (100, 50, 0))):
        picture = encode_picture(encode(half), Encoding(background=colour))
        assert np.allclose(pixels_of(picture.content)[0, 0], expected, atol=1)
    grey = encode_picture(encode(np.zeros((2, 2, 2), np.uint8)), Encoding())
    assert grey.grey and (pixels_of(grey.content) == 255).all()
    file = io.BytesIO()
    palette.save(file, "PNG", transparency=0)
    assert encode_picture(file.getvalue(), Encoding()).content != file.getvalue()


def test_sixteen_bits_and_one_bit_become_eight() -> None:
    values = np.array([[0, 257, 65535], [32896, 128, 129]], np.uint16)
    picture = encode_picture(encode(values), Encoding())
    assert pixels_of(picture.content).tolist() == [[0, 1, 255], [128, 0, 1]] and picture.grey
    one = io.BytesIO()
    Image.fromarray(np.array([[True, False]])).save(one, "PNG")
    picture = encode_picture(one.getvalue(), Encoding())
    assert picture.grey and np.asarray(decode(picture.content, 1)).tolist() == [[255, 0]]
    cmyk = io.BytesIO()
    Image.fromarray(draw_pixels(1)).convert("CMYK").save(cmyk, "JPEG")
    assert decode(encode_picture(cmyk.getvalue(), Encoding()).content, 3).mode == "RGB"
    with pytest.raises(DamagedPicture, match=r"mode F with values from 0 to 0\.5"):
        encode_picture(encode(np.array([[0.0, 0.5]], np.float32), "TIFF"), Encoding())


def test_the_short_side_is_resized_and_channels_are_measured() -> None:
    pixels = draw_pixels(1, (30, 41))
    picture = encode_picture(encode(pixels, "JPEG"), Encoding(resize=10))
    assert (picture.height, picture.width) == (10, 13) and picture.content[:2] == b"\xff\xd8"
    picture = encode_picture(encode(pixels), Encoding(resize=10))
    expected = Image.fromarray(pixels).resize((13, 10), Image.Resampling.BILINEAR)
    assert np.array_equal(pixels_of(picture.content), expected)
    grey = encode_picture(encode(pixels), Encoding(channels=1))
    assert grey.sums_3.tolist() == [int(np.asarray(Image.fromarray(pixels).convert("L")).sum())] * 3


def test_a_decompression_bomb_is_refused_before_it_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(DamagedPicture, match=r"bomb: 60,000 x 2,000 pixels, above .*89,478,485"):
        encode_picture(bomb(60_000, 2000), Encoding())
    with pytest.raises(DamagedPicture, match="a decompression bomb"):
        encode_picture(bomb(60_000, 60_000), Encoding())
    monkeypatch.setattr(pictures, "MAX_PIXELS", 63)
    with pytest.raises(DamagedPicture, match="8 x 8 pixels"):
        encode_picture(encode(PIXELS[0]), Encoding())


def bomb(width: int, height: int) -> bytes:
    """A tiny PNG whose header states a huge size."""
    import zlib

    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + data + chunk(b"IEND", b"")


# ------------------------------------------------------------------------- workers and resuming


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


def test_workers_and_interruptions_do_not_change_a_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_inputs, "UNIT_FILES", 5)
    source = write_folders(tmp_path / "in", each=6)
    request = ImageRequest((str(source),), val_fraction=0.3)
    prepare_images(request, tmp_path / "a", workers=1)
    prepare_images(request, tmp_path / "b", workers=2)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr("megarecur.data_prep.images.write_split", fail)
        with pytest.raises(KeyboardInterrupt):
            prepare_images(request, tmp_path / "c", workers=1)
    assert not (tmp_path / "c").exists()
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "c.partial").glob("*.npz")}
    assert len(kept) == 4
    (tmp_path / "c.partial" / "read-000001.npz").unlink()
    done = []
    whole = encode_picture

    def count(*args: Any) -> Any:
        done.append(args)
        return whole(*args)

    monkeypatch.setattr("megarecur.data_prep.images.encode_picture", count)
    prepare_images(request, tmp_path / "c", workers=1)
    assert len(done) == 5, "finished pieces are read no more"
    assert files_of(tmp_path / "c") == files_of(tmp_path / "a")
    assert not (tmp_path / "c.partial").exists()
    prepare_images(request, tmp_path / "c", workers=1)
    assert len(done) == 5
    with pytest.raises(DataError, match="exists and was prepared with other options"):
        prepare_images(replace(request, val_fraction=0.4), tmp_path / "c", workers=1)


# ------------------------------------------------------------------------------------- bad input


def refused(source: Path, out: Path, **options: Any) -> str:
    """The error of a preparation, which must leave nothing behind."""
    with pytest.raises(DataError) as error:
        prepare(source, out=out, **options)
    assert not out.exists() and not out.with_name(out.name + ".partial").exists()
    return str(error.value)


def test_the_command_ends_with_one_error_and_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_folders(tmp_path / "in", classes=2)
    (source / "class_0" / "cut.png").write_bytes(encode(PIXELS[0])[:-30])
    out = str(tmp_path / "out")
    words = ["megarecur", "prep", "images", str(source), "--out", out, "--workers", "1"]
    for more, expected in (
        ([], "cut.png: cannot be decoded: "),
        (["--channels", "2"], "--channels 2: pictures have 1 or 3"),
        (["--val-fraction", "1"], "--val-fraction 1 must be at least 0 and below 1"),
    ):
        monkeypatch.setattr("sys.argv", [*words, *more])
        with pytest.raises(SystemExit) as ended:
            main()
        message = capsys.readouterr().err
        assert ended.value.code == 2 and "Traceback" not in message
        assert message.count("error: ") == 1 and expected in message
    assert {path.name for path in tmp_path.iterdir()} == {"in"}


def test_a_folder_without_classes_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    assert "has no folders of classes, no picture lies below" in refused(source, tmp_path / "out")
    (source / "a.png").write_bytes(encode(PIXELS[0]))
    assert "has no folders of classes, 1 picture(s) lie in it" in refused(source, tmp_path / "out")
    message = refused(source / "a.png", tmp_path / "out")
    assert "is one picture, without a label" in message


def test_one_class_only_is_refused(tmp_path: Path) -> None:
    source = write_folders(tmp_path / "in", classes=1)
    message = refused(source, tmp_path / "out")
    assert "all 4 pictures are of one class (class_0); classification needs at least" in message


def test_classes_of_validation_that_train_lacks_are_refused(tmp_path: Path) -> None:
    write_folders(tmp_path / "in" / "train", classes=2)
    write_folders(tmp_path / "in" / "val", classes=4)
    message = refused(tmp_path / "in", tmp_path / "out")
    assert (
        "validation has 4 classes and train 2: train has no picture of class_2, class_3" in message
    )


def test_damaged_pictures_are_named_together_or_skipped(tmp_path: Path) -> None:
    source = write_folders(tmp_path / "in")
    whole = encode(draw_pixels(1, (40, 40)), "JPEG")
    (source / "class_0" / "cut.jpg").write_bytes(whole[:-200])
    message = refused(source, tmp_path / "out")
    assert "cut.jpg: cannot be decoded: image file is truncated" in message and "\n" not in message
    (source / "class_1" / "bomb.png").write_bytes(bomb(60_000, 2000))
    (source / "class_1" / "words.png").write_bytes(b"no picture at all")
    message = refused(source, tmp_path / "out")
    assert message.startswith("3 mistakes in the pictures")
    for part in ("cut.jpg: cannot", "bomb.png: cannot be decoded: a decompression bomb: 60,000 x",
                 "words.png: cannot be decoded: it is no picture", "--skip-damaged"):  # fmt: skip
        assert part in message
    made = prepare(source, out=tmp_path / "out", skip_damaged=True)
    assert made["train"].documents_skipped == 3 and made["train"].task["num_samples"] == 12


def test_rows_without_picture_or_class_are_named(tmp_path: Path) -> None:
    rows = [{"bytes": encode(PIXELS[0]), "path": None}, {"bytes": None, "path": "gone.png"}]
    features = {"image": {"_type": "Image"}, "label": {"names": NAMES, "_type": "ClassLabel"}}
    table = pyarrow.table({"image": [*rows, rows[0]], "label": [-1, 0, 1]})
    table = table.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    parquet.write_table(table, tmp_path / "a.parquet")
    message = refused(tmp_path / "a.parquet", tmp_path / "out")
    assert "row 1 has label -1 in 'label', which is no class" in message
    assert "row 2 has no picture in 'image'" in message


def test_columns_that_are_not_found_are_named_by_options(tmp_path: Path) -> None:
    content = [encode(pixels) for pixels in PIXELS]
    parquet.write_table(pyarrow.table({"a": content, "b": LABELS}), tmp_path / "a.parquet")
    message = refused(tmp_path / "a.parquet", tmp_path / "out")
    assert "has no column of labels that it marks as such; it has a, b; name the one" in message
    names = FieldNames(label="c")
    assert "has no column c" in refused(tmp_path / "a.parquet", tmp_path / "out", keys=names)
    prepare(tmp_path / "a.parquet", out=tmp_path / "out", keys=FieldNames("a", "b"))
    assert [name for name, _ in read_all(tmp_path / "out/train")] == [str(i) for i in LABELS]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda f: (f / "train-labels-idx1-ubyte.gz").unlink(), "has no labels beside it"),
        (
            lambda f: write_idx(f / "train-labels-idx1-ubyte.gz", np.zeros(4, np.uint8)),
            r"has 9 pictures, but .* has labels of shape \[4\]",
        ),
        (
            lambda f: (f / "train-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8b broken"),
            "is damaged or no IDX file",
        ),
    ],
    ids=["no labels", "fewer labels", "damaged"],
)
def test_idx_files_that_do_not_fit_are_refused(
    tmp_path: Path, change: Callable[[Path], Any], expected: str
) -> None:
    source = as_idx(tmp_path / "in")
    change(source)
    with pytest.raises(DataError, match=expected):
        prepare(source, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_truncated_archive_is_refused(tmp_path: Path) -> None:
    source = as_tar(tmp_path / "in") / "shard-000.tar"
    os.truncate(source, 3000)
    assert "is damaged or no tar file" in refused(source, tmp_path / "out")


def test_options_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--background nocolour: is no colour"):
        Encoding(background="nocolour")
    with pytest.raises(ConfigError, match="--val and --val-fraction both make DIR/val"):
        ImageRequest(("a",), ("b",), 0.5)
    source = write_folders(tmp_path / "in")
    message = refused(source, tmp_path / "out", class_names=("a", "b"))
    assert (
        "--class-names has 2 names, for labels 0 to 1, but pictures have label class_0" in message
    )


def test_the_command_reports_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write_folders(tmp_path / "in", size=(8, 12)), tmp_path / "out"
    runner = CliRunner()
    words = ["images", str(source), "--out", str(out), "--val-fraction", "0.4", "--workers", "1"]
    result = runner.invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "3 classes" in result.output and "8 x 12 pixels, 3 channel(s), mean 0." in result.output
    sheet = tmp_path / "sheet.png"
    result = runner.invoke(app, ["inspect", str(out / "train"), "--draw", str(sheet)])
    assert result.exit_code == 0, result.output
    assert "class_0" in result.output and "8 x 12 pixels" in result.output
    assert inspect_corpus(out / "train").manifest.task["width"] == 12
    corpus = ImageCorpus(out / "train")
    with Image.open(sheet) as image:
        colours = image.convert("RGB").getcolors(1 << 20)
    assert colours is not None and len(colours) > 50
    first = choose(corpus, 3, seed=1)
    assert sorted(corpus.labels[first].tolist()) == [0, 1, 2], "each class in turn"
    with pytest.raises(DataError, match=r"is a \.png; name such a file"):
        draw_corpus(out / "train", tmp_path / "sheet.jpg")


def test_arrays_that_claim_more_than_they_hold(tmp_path: Path) -> None:
    """Terabytes in a header take no memory; nor does a file of another length."""
    shape = struct.pack(">HBB3I", 0, 8, 3, 1 << 31, 1 << 10, 1 << 10)
    for name, content in {
        "a-idx3-ubyte": shape + bytes(100),
        "b-idx3-ubyte.gz": gzip.compress(shape + bytes(100)),
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}: .*it claims 2251799813685248 bytes"):
            image_inputs.read_idx(tmp_path / name)
    small = struct.pack(">HBB3I", 0, 8, 3, 2, 4, 4)
    for extra in (bytes(31), bytes(33)):
        (tmp_path / "c-idx3-ubyte").write_bytes(small + extra)
        with pytest.raises(DataError, match="does not hold the 32 bytes that it claims"):
            image_inputs.read_idx(tmp_path / "c-idx3-ubyte")
    (tmp_path / "c-idx3-ubyte").write_bytes(small + bytes(32))
    assert image_inputs.read_idx(tmp_path / "c-idx3-ubyte").shape == (2, 4, 4)
    archive = tmp_path / "a.npz"
    np.savez_compressed(archive, x=np.zeros((4, 8, 8), np.uint8), y=np.zeros(4, np.int64))
    packed = archive.read_bytes()
    head = packed[packed.index(b"PK\x01\x02") :]
    size = struct.unpack("<I", head[24:28])[0]
    archive.write_bytes(
        packed.replace(head[20:28], head[20:24] + struct.pack("<I", size + (1 << 31)))
    )
    with pytest.raises(DataError, match=r"a.npz: is damaged \(it claims \d+ bytes"):
        image_inputs._load_npz(archive, FieldNames("x", "y"))
