"""Sentence pairs: every format gives one corpus, filters are counted, mistakes are named."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from support.commands import megarecur
from support.preparing import tree
from support.sentences import draw_pairs, train_joint, write_sides

from megarecur.data.pairs import PairCorpus
from megarecur.data.tokenizer import load_tokenizer
from megarecur.data_prep import pairs as preparing
from megarecur.data_prep.bitext import Bitext, Keys
from megarecur.data_prep.pairs import PairFilters, PairRequest, prepare_pairs
from megarecur.data_prep.readers import Reading
from megarecur.errors import ConfigError, DataError, MegarecurError

PAIRS = draw_pairs(60)
DE_EN = Keys("de", "en")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text files train.de and train.en, and a joint vocabulary."""
    folder = tmp_path_factory.mktemp("pairs")
    train_joint(write_sides(folder, "train", PAIRS), folder / "joint.model")
    return folder


def of_text(folder: Path, name: str = "train", **options: Any) -> PairRequest:
    """The request of a pair of text files."""
    sides = Bitext((str(folder / f"{name}.de"),), (str(folder / f"{name}.en"),))
    return PairRequest(train=sides, tokenizer=str(folder / "joint.model"), **options)


def read_back(path: Path) -> list[tuple[str, ...]]:
    corpus = PairCorpus(path)
    (model,) = path.glob("tokenizer.*")
    tokenizer = load_tokenizer(model)
    pairs = [corpus.pair(number, 1000) for number in range(corpus.num_pairs)]
    assert all(side[-1] == tokenizer.eos_id for pair in pairs for side in pair)
    return [tuple(tokenizer.decode(side[:-1].tolist()) for side in pair) for pair in pairs]


# ------------------------------------------------------------------------------------- formats


def write_formats(folder: Path) -> dict[str, tuple[Bitext, Keys]]:
    """Write the pairs in every format; returns how each is read."""
    lines = ["".join(pair[side] + "\n" for pair in PAIRS) for side in (0, 1)]
    for side, text in zip(("de", "en"), lines, strict=True):
        (folder / f"all.{side}.xz").write_bytes(lzma.compress(text.encode()))
        (folder / f"first.{side}").write_text("\ufeff" + "".join(text.splitlines(True)[:25]))
        # Windows line ends, and none at the end.
        rest = "\r\n".join(text.splitlines()[25:])
        (folder / f"rest.{side}.gz").write_bytes(gzip.compress(rest.encode()))
    rows = "".join(f"{n}\t{de}\t{en}\n" for n, (de, en) in enumerate(PAIRS))
    (folder / "header.tsv").write_text("id\tde\ten\n" + rows)
    (folder / "plain.tsv").write_text(rows)
    flat = [{"de": de, "en": en} for de, en in PAIRS]
    (folder / "flat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in flat))
    nested = "".join(json.dumps({"id": 1, "translation": row}) + "\n" for row in flat)
    (folder / "nested.jsonl.gz").write_bytes(gzip.compress(nested.encode()))
    table = pyarrow.table({"de": [p[0] for p in PAIRS], "en": [p[1] for p in PAIRS]})
    parquet.write_table(table, folder / "flat.parquet")
    table = pyarrow.table({"id": list(range(len(PAIRS))), "translation": flat})
    parquet.write_table(table, folder / "nested.parquet")
    with pyarrow.ipc.new_stream(str(folder / "nested.arrow"), table.schema) as stream:
        stream.write_table(table)
    with pyarrow.ipc.new_file(str(folder / "file.arrow"), table.schema) as file:
        file.write_table(table)

    def text(*names: str) -> Bitext:
        return Bitext(
            *(tuple(str(folder / n.replace("L", s)) for n in names) for s in ("de", "en"))
        )

    def rows_of(name: str, columns: Sequence[str] = ()) -> tuple[Bitext, Keys]:
        return Bitext(tables=(str(folder / name),)), replace(DE_EN, columns=tuple(columns))

    return {
        "xz": (text("all.L.xz"), Keys()),
        "two files": (text("first.L", "rest.L.gz"), Keys()),
        "header.tsv": rows_of("header.tsv"),
        "plain.tsv": rows_of("plain.tsv", ("id", "de", "en")),
        **{
            name: rows_of(name)
            for name in ("flat.jsonl", "nested.jsonl.gz", "flat.parquet", "nested.parquet",
                         "nested.arrow", "file.arrow")
        },
    }  # fmt: skip


def test_every_format_gives_the_same_corpus(folder: Path, tmp_path: Path) -> None:
    made = prepare_pairs(of_text(folder), tmp_path / "text", workers=1)["train"]
    assert read_back(tmp_path / "text/train") == PAIRS
    expected = tree(tmp_path / "text/train")
    for name, (bitext, keys) in write_formats(tmp_path).items():
        request = replace(of_text(folder), train=bitext, keys=keys)
        found = prepare_pairs(request, tmp_path / f"out-{name}", workers=1)["train"]
        assert found.task == made.task and found.num_bytes == made.num_bytes, name
        own = tree(tmp_path / f"out-{name}/train")
        assert {k: v for k, v in own.items() if k != "manifest.json"} == {
            k: v for k, v in expected.items() if k != "manifest.json"
        }, name


def test_the_manifest_describes_the_pairs(folder: Path, tmp_path: Path) -> None:
    made = prepare_pairs(of_text(folder), tmp_path / "out", workers=1)["train"]
    lengths = PairCorpus(tmp_path / "out/train").lengths_P2
    held = made.task
    assert held is not None and held["kind"] == "translation" and held["num_pairs"] == len(PAIRS)
    assert (held["longest_source"], held["longest_target"]) == tuple(lengths.max(axis=0))
    assert held["longest_pair"] == lengths.sum(axis=1).max()
    assert held["source_tokens"] + held["target_tokens"] == made.num_tokens == lengths.sum()
    tokenizer = load_tokenizer(folder / "joint.model")
    assert (held["start_id"], held["pad_id"]) == (tokenizer.bos_id, tokenizer.pad_id) == (1, 3)
    assert [source["pairs"] for source in made.sources] == [60, 60]
    # Scores per byte are of targets alone.
    of_targets = sum(len(target.encode()) for _, target in PAIRS)
    assert held["target_bytes"] == of_targets != made.num_bytes - of_targets
    expected = of_targets / held["target_tokens"]
    assert PairCorpus(tmp_path / "out/train").bytes_per_label == expected


# ------------------------------------------------------------------------------------- filters


def test_filters_are_counted_each_for_itself(folder: Path, tmp_path: Path) -> None:
    (de, en), others = PAIRS[0], PAIRS[1:9]
    extra = [
        ("", en), (de, " \t"), ("", ""),  # empty
        ("a dog", "a dog"),  # identical
        (de, en), (de, en),  # duplicates
        ("ein " * 40, "a " * 40),  # too long
        ("ein", "a dog runs over the big green street and the men play"),  # ratio
    ]  # fmt: skip
    write_sides(tmp_path, "train", [(de, en), *others, *extra])
    (tmp_path / "joint.model").write_bytes((folder / "joint.model").read_bytes())
    plain = of_text(tmp_path)
    made = prepare_pairs(plain, tmp_path / "plain", workers=1)["train"]
    nothing = dict.fromkeys(preparing.REASONS, 0)
    assert made.task is not None and made.task["dropped"] == {**nothing, "empty": 3}
    assert made.task["num_pairs"] == 9 + 5
    strict = PairFilters(max_ratio=4.0, max_length=60, deduplicate=True, drop_identical=True)
    request = replace(plain, filters=strict, val=plain.train, test=plain.train)
    made = prepare_pairs(request, tmp_path / "strict", workers=1)
    assert list(made) == ["train", "val", "test"]
    counts = {split: (manifest.task or {})["dropped"] for split, manifest in made.items()}
    assert counts["train"] == {
        "unreadable": 0, "empty": 3, "identical": 1, "duplicates": 2, "too_long": 1, "ratio": 1,
    }  # fmt: skip
    assert read_back(tmp_path / "strict/train") == [(de, en), *others]
    assert made["train"].duplicates_removed == 2
    # Scores are of whole sets.
    assert counts["val"] == counts["test"] == {**nothing, "empty": 3}


def test_a_sentence_that_is_not_text_takes_its_other_side_along(
    folder: Path, tmp_path: Path
) -> None:
    write_sides(tmp_path, "train", PAIRS[:3])
    (tmp_path / "joint.model").write_bytes((folder / "joint.model").read_bytes())
    lines = [pair[0].encode() for pair in PAIRS[:3]]
    lines[1] = b"ein \xff Hund"
    (tmp_path / "train.de").write_bytes(b"\n".join(lines) + b"\n")
    request = of_text(tmp_path)
    with pytest.raises(DataError, match=r"train\.de: line 2: byte \d+ \(0xff\) is not UTF-8"):
        prepare_pairs(request, tmp_path / "out", workers=1)
    skipping = replace(request, reading=Reading(errors="skip"))
    made = prepare_pairs(skipping, tmp_path / "out", workers=1)["train"]
    assert read_back(tmp_path / "out/train") == [PAIRS[0], PAIRS[2]]
    assert made.task is not None and made.task["dropped"]["unreadable"] == 1


# -------------------------------------------------------------------------------------- resume


def test_an_interrupted_preparation_resumes_with_any_number_of_workers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "PART_BYTES", 800)
    request = replace(of_text(folder), val=of_text(folder).train)
    prepare_pairs(request, tmp_path / "whole", workers=2)
    tokenise, left = preparing.tokenise_pairs, 3

    def stop(task: preparing.PairTask) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return tokenise(task)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(preparing, "tokenise_pairs", stop)
        prepare_pairs(request, tmp_path / "again", workers=1)
    done = {p.name: p.stat().st_ino for p in (tmp_path / "again.partial").glob("*.tokens")}
    assert len(done) == 3 and not (tmp_path / "again").exists()

    def check(*arguments: Any) -> None:
        found = {p.name: p.stat().st_ino for p in (tmp_path / "again.partial").glob("*.tokens")}
        assert len(found) > 6 and found.items() >= done.items()

    assemble = preparing._assemble
    monkeypatch.setattr(preparing, "count_all", None)  # The reading is not repeated.
    monkeypatch.setattr(preparing, "_assemble", lambda *a: (check(), assemble(*a)))
    prepare_pairs(request, tmp_path / "again", workers=1)
    assert tree(tmp_path / "again") == tree(tmp_path / "whole")
    assert not (tmp_path / "again.partial").exists()
    monkeypatch.setattr(preparing, "hold", None)  # What exists is not made again.
    prepare_pairs(request, tmp_path / "again")


# ----------------------------------------------------------------------------------- bad input


def refusal(request: PairRequest, out: Path) -> str:
    with pytest.raises(MegarecurError) as caught:
        prepare_pairs(request, out, workers=1)
    assert isinstance(caught.value, ConfigError | DataError) and not out.exists()
    return str(caught.value)


def test_files_of_different_numbers_of_lines_are_named_together(
    folder: Path, tmp_path: Path
) -> None:
    write_sides(tmp_path, "val", PAIRS[:7])
    (tmp_path / "val.en").write_text("one\ntwo")
    (tmp_path / "short.en").write_text("".join(f"{pair[1]}\n" for pair in PAIRS[:-1]))
    request = of_text(folder)
    request = replace(
        request,
        train=replace(request.train, targets=(str(tmp_path / "short.en"),)),
        val=Bitext((str(tmp_path / "val.de"),), (str(tmp_path / "val.en"),)),
    )
    message = refusal(request, tmp_path / "out")
    for text in (
        f"{folder / 'train.de'} has 60 lines, but {tmp_path / 'short.en'} has 59",
        f"{tmp_path / 'val.de'} has 7 lines, but {tmp_path / 'val.en'} has 2",
        "use files of the same sentences",
    ):
        assert text in message, message


def test_a_tokenizer_without_padding_or_end_is_refused(folder: Path, tmp_path: Path) -> None:
    files = [str(folder / "train.de"), str(folder / "train.en")]
    bare = train_joint(files, tmp_path / "bare.model", pad=False)
    for tokenizer in (bare, "bytes"):
        message = refusal(replace(of_text(folder), tokenizer=tokenizer), tmp_path / "out")
        assert message.startswith(f"{tokenizer}: has no padding token") and "--pad" in message
    import tokenizers

    for names, text in (
        (["<pad>"], "has no end-of-text token"),
        (["</s>"], "has no padding token"),
    ):
        vocabulary = {name: i for i, name in enumerate([*names, "ein", "a", "<unk>"])}
        model = tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")
        tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
        request = replace(of_text(folder), tokenizer=str(tmp_path / "tokenizer.json"))
        assert text in refusal(request, tmp_path / "out")
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "ein"}')
    assert load_tokenizer(tmp_path / "tokenizer.json").pad_id == 1


def test_requests_that_cannot_be(folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"de": "ein", "fr": "un"}\n{"de": null, "en": "a"}\n')
    parquet.write_table(pyarrow.table({"de": ["ein"]}), tmp_path / "one.parquet")
    (tmp_path / "empty.de").write_text("\n\n")
    (tmp_path / "empty.en").write_text("a\nb\n")
    one, text = (str(rows),), of_text(folder).train
    for change, words in (
        ({"train": Bitext(text.sources)}, "--source without --target"),
        ({"val": Bitext((), text.targets)}, "--val-target without --val-source"),
        ({"train": Bitext()}, "needs --source and --target, or INPUT"),
        ({"train": replace(text, tables=one)}, "both name the pairs of train"),
        ({"train": replace(text, sources=text.sources * 2)}, "names 2 files and --target 1"),
        ({"train": Bitext(one, one)}, f"{rows}: is a table"),
        ({"test": Bitext(tables=text.sources)}, "train.de: is not a table"),
        ({"train": Bitext(tables=one)}, "line 1 has no 'source' nor 'target' (found ['de', 'fr'])"),
        ({"train": Bitext(tables=one), "keys": DE_EN}, "line 2 has null for 'de'"),
        ({"train": Bitext(tables=one), "keys": DE_EN}, "2 mistakes"),
        (
            {"train": Bitext(tables=(str(tmp_path / "one.parquet"),)), "keys": DE_EN},
            "one.parquet: has no column en (it has de); name the columns by --source-key",
        ),
        ({"train": Bitext(tables=one), "keys": Keys(columns=("a",))}, "--column names the columns"),
        ({"train": Bitext(("nowhere.de",), ("nowhere.en",))}, "nowhere.de: no such file"),
        (
            {"train": Bitext((f"{tmp_path}/empty.de",), (f"{tmp_path}/empty.en",))},
            "train: has no pair left (2 empty)",
        ),
    ):
        message = refusal(replace(of_text(folder), **change), tmp_path / "out")
        assert words in message, message
    for filters, words in (({"max_ratio": 0.5}, "--max-ratio 0.5"), ({"max_length": 0}, "0 must")):
        with pytest.raises(ConfigError, match=words):
            PairFilters(**filters)
    prepare_pairs(of_text(folder), tmp_path / "made", workers=1)
    other = replace(of_text(folder), filters=PairFilters(deduplicate=True))
    with pytest.raises(DataError, match="prepared with other options"):
        prepare_pairs(other, tmp_path / "made", workers=1)
    with pytest.raises(DataError, match="is a file; choose another"):
        prepare_pairs(of_text(folder), rows)


# ------------------------------------------------------------------------------------- commands


def test_the_commands_as_a_user_gives_them(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    files = [folder / "train.de", folder / "train.en"]
    model, out = tmp_path / "joint.model", tmp_path / "out"
    code, printed, _ = megarecur(
        capfd, "prep", "tokenizer", *files, "--text-split", "line", "--pad", "--vocab-size", 330,
        "--out", model,
    )  # fmt: skip
    assert code == 0 and printed.strip() == str(model)
    sides = ("--source", files[0], "--target", files[1])
    command = ("prep", "pairs", *sides, "--val-source", files[0], "--val-target", files[1],
               "--tokenizer", model, "--max-length", 30, "--out", out)  # fmt: skip
    code, printed, errors = megarecur(capfd, *command)
    assert code == 0, errors
    assert f"{out}/train: " in printed and f"{out}/val: 60 pairs" in printed
    assert "too long" in printed.splitlines()[0] and printed.splitlines()[1].endswith("none")
    code, printed, errors = megarecur(capfd, "prep", "inspect", f"{out}/val", "--samples", 60)
    assert code == 0, errors
    rows = [line.split("│") for line in printed.splitlines() if line.count("│") == 4]
    assert [tuple(cell.strip() for cell in row[2:4]) for row in rows] == PAIRS
    code, _, errors = megarecur(
        capfd, "prep", "pairs", *sides, "--tokenizer", "bytes", "--out", tmp_path / "other"
    )
    assert code == 2 and "bytes: has no padding token" in errors and "Traceback" not in errors
