"""The commands `megarecur prep ...`: from text to a tokenizer and shards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from megarecur.data.corpus import Manifest

app = typer.Typer(help="Turn text into a tokenizer and shards.", no_args_is_help=True)

Inputs = Annotated[
    list[str],
    typer.Argument(
        metavar="INPUT...", help="txt or jsonl, plain or gz/xz/zst: files, globs, folders."
    ),
]
TextKey = Annotated[str, typer.Option(help="Field of a jsonl line that holds the text.")]
TextSplit = Annotated[
    Literal["file", "blank_line", "separator"], typer.Option(help="What ends a document of a txt.")
]
Separator = Annotated[
    str, typer.Option(help="The whole line that ends one, for --text-split separator.")
]
Errors = Annotated[
    Literal["fail", "skip", "replace"],
    typer.Option(help="Bytes that are not UTF-8: fail, skip the document, or replace them."),
]
Exclude = Annotated[list[str] | None, typer.Option(help="Pattern of paths to leave out.")]


@app.command()
def tokenizer(
    inputs: Inputs,
    out: Annotated[Path, typer.Option(help="The .model file to write.")],
    vocab_size: Annotated[int, typer.Option(min=1, help="Number of ids.")],
    model_type: Annotated[Literal["bpe", "unigram"], typer.Option()] = "bpe",
    byte_fallback: Annotated[bool, typer.Option(help="Unknown text becomes bytes.")] = True,
    character_coverage: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of characters kept.")
    ] = 0.9995,
    sample_bytes: Annotated[
        int, typer.Option(min=0, help="Text to learn from at most; 0: all.")
    ] = 8 << 20,
    seed: Annotated[int, typer.Option(min=0, help="Chooses the sample.")] = 1,
    text_key: TextKey = "text",
    text_split: TextSplit = "file",
    separator: Separator = "",
    errors: Errors = "fail",
    exclude: Exclude = None,
) -> None:
    """Train a sentencepiece model."""
    from data_prep.progress import ProgressReport
    from data_prep.readers import Reading
    from data_prep.tokenizer import train_tokenizer

    path = train_tokenizer(
        inputs,
        out,
        Reading(text_key, text_split, separator, errors, tuple(exclude or ())),
        vocab_size=vocab_size,
        model_type=model_type,
        byte_fallback=byte_fallback,
        character_coverage=character_coverage,
        sample_bytes=sample_bytes,
        seed=seed,
        progress=ProgressReport(),
    )
    print(path)


@app.command()
def shards(
    inputs: Inputs,
    out: Annotated[Path, typer.Option(help="The folder to make: DIR/train, and DIR/val.")],
    tokenizer: Annotated[
        str, typer.Option(help="sentencepiece .model, Hugging Face tokenizer.json, or bytes.")
    ],
    val_fraction: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of documents for validation.")
    ] = 0.0,
    deduplicate: Annotated[bool, typer.Option(help="Keep exact duplicates once.")] = True,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0: one per core.")] = 0,
    text_key: TextKey = "text",
    text_split: TextSplit = "file",
    separator: Separator = "",
    errors: Errors = "fail",
    exclude: Exclude = None,
) -> None:
    """Tokenise text into shards; the same command goes on after an interruption."""
    from data_prep.progress import ProgressReport
    from data_prep.readers import Reading
    from data_prep.shards import prepare_shards

    report(
        prepare_shards(
            inputs,
            out,
            tokenizer,
            Reading(text_key, text_split, separator, errors, tuple(exclude or ())),
            val_fraction=val_fraction,
            deduplicate=deduplicate,
            workers=workers,
            progress=ProgressReport(),
        ),
        out,
    )


@app.command()
def inspect(
    corpus: Annotated[Path, typer.Argument(metavar="CORPUS", help="A folder of shards.")],
    samples: Annotated[int, typer.Option(min=0, help="Documents to decode.")] = 3,
    tokenizer: Annotated[str | None, typer.Option(help="If it is not found by itself.")] = None,
) -> None:
    """Show what a corpus holds: samples, lengths, bytes per token."""
    from rich.console import Console

    from data_prep.inspect import inspect_corpus, render_inspection

    found = inspect_corpus(corpus, num_samples=samples, tokenizer=tokenizer)
    Console().print(render_inspection(found))


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="The folder to make.")] = Path("data/quickstart"),
    vocab_size: Annotated[int, typer.Option(min=1, help="Number of ids.")] = 2048,
) -> None:
    """Prepare the demo's corpus: the sources of the running Python's standard library."""
    from data_prep.progress import ProgressReport
    from data_prep.stdlib import prepare_quickstart

    report(prepare_quickstart(out, vocab_size=vocab_size, progress=ProgressReport()), out)


def report(manifests: dict[str, Manifest], out: Path) -> None:
    """One line per corpus made."""
    for name, manifest in manifests.items():
        print(
            f"{out / name}: {manifest.num_documents} documents, {manifest.num_tokens} tokens, "
            f"{manifest.num_bytes / manifest.num_tokens:.2f} bytes per token"
        )
