"""The commands `megarecur prep ...`: from text to a tokenizer and shards."""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from megarecur.errors import ConfigError

if TYPE_CHECKING:
    from megarecur.data.corpus import Manifest

app = typer.Typer(help="Turn text into a tokenizer and shards.", no_args_is_help=True)

Inputs = Annotated[
    list[str],
    typer.Argument(
        metavar="INPUT...",
        help="txt, jsonl, csv, tsv (plain, gz, xz, zst), parquet, arrow, mds: files, folders; "
        "hf:NAME[:CONFIG][@SPLIT] for a Hugging Face dataset.",
    ),
]
READING = {
    "text_key": (
        "text",
        Annotated[str, typer.Option(help="Field of a row (jsonl, csv, parquet) with the text.")],
    ),
    "template": (
        "",
        Annotated[str, typer.Option(help="Text made of fields instead: '{title}\\n\\n{body}'.")],
    ),
    "text_split": (
        "file",
        Annotated[
            Literal["file", "blank_line", "separator"],
            typer.Option(help="What ends a document of a txt."),
        ],
    ),
    "separator": (
        "",
        Annotated[
            str, typer.Option(help="The whole line that ends one, for --text-split separator.")
        ],
    ),
    "errors": (
        "fail",
        Annotated[
            Literal["fail", "skip", "replace"],
            typer.Option(help="Bytes that are not UTF-8: fail, skip the document, or replace."),
        ],
    ),
    "exclude": (
        None,
        Annotated[list[str] | None, typer.Option(help="Pattern of paths to leave out.")],
    ),
}
"""Options that say how files become documents: default and type of each."""


def takes_reading(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of READING for its argument `reading`."""

    def run(**options: Any) -> None:
        from data_prep.readers import Reading

        given = {name: options.pop(name) for name in READING}
        given["exclude"] = tuple(given["exclude"] or ())
        given["template"] = given["template"].replace("\\n", "\n").replace("\\t", "\t")
        command(reading=Reading(**given), **options)

    known = signature(command, eval_str=True)
    own = [p for p in known.parameters.values() if p.name != "reading"]
    shared = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (default, kind) in READING.items()
    ]
    run.__signature__ = known.replace(parameters=[*own, *shared])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in [*own, *shared]}
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run


@app.command()
@takes_reading
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
    *,
    reading: Any,
) -> None:
    """Train a sentencepiece model."""
    from data_prep.progress import ProgressReport
    from data_prep.tokenizer import train_tokenizer

    path = train_tokenizer(
        inputs,
        out,
        reading,
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
@takes_reading
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
    near_duplicates: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="Also drop documents at least this similar to an earlier one."
        ),
    ] = 0.0,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0: one per core.")] = 0,
    launch: Annotated[
        Literal["slurm"] | None, typer.Option(help="Let jobs of Slurm do it, by the options below.")
    ] = None,
    tasks: Annotated[
        int | None, typer.Option(min=1, help="Tasks that each phase is divided into.")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(metavar="PROFILE", help="Of configs/cluster, or a YAML file.")
    ] = None,
    at_once: Annotated[int | None, typer.Option(min=1, help="Tasks at a time; all.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the scripts of the jobs; submit nothing.")
    ] = False,
    phase: Annotated[
        Literal["read", "tokenise", "assemble"] | None, typer.Option(hidden=True)
    ] = None,
    task: Annotated[int, typer.Option(hidden=True)] = 0,
    *,
    reading: Any,
) -> None:
    """Tokenise text into shards; the same command goes on after an interruption."""
    from data_prep.plan import Request
    from data_prep.progress import ProgressReport

    own = {"--cluster": cluster, "--at-once": at_once, "--dry-run": dry_run or None}
    own |= {} if phase else {"--tasks": tasks}
    if launch is None and (lonely := [name for name, value in own.items() if value is not None]):
        raise ConfigError(f"{lonely[0]}: is for jobs; add --launch slurm, or leave it out")
    if (launch or phase) and tasks is None:
        raise ConfigError("--launch slurm: needs --tasks, the number that each phase is divided in")
    request = Request(tuple(inputs), tokenizer, reading, val_fraction, deduplicate, near_duplicates)
    from launch.prep_array import cores, refuse_while_queued, submit_preparation

    if launch is not None and phase is None:
        assert tasks is not None
        todo = submit_preparation(
            request, out, tasks, cluster=cluster, at_once=at_once, workers=workers, dry_run=dry_run
        )
        if not todo:
            print(f"{out}: is prepared")
        return
    if phase is not None:
        from data_prep.array import run_task

        assert tasks is not None
        number = workers or cores()
        made = run_task(request, out, phase, task, tasks, workers=number, progress=ProgressReport())
        report(made, out)
        return
    from data_prep.shards import prepare_shards

    refuse_while_queued(out)
    made = prepare_shards(
        inputs,
        out,
        tokenizer,
        reading,
        val_fraction=val_fraction,
        deduplicate=deduplicate,
        near_duplicates=near_duplicates,
        workers=workers,
        progress=ProgressReport(),
    )
    report(made, out)


@app.command()
def task(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="listops, logic, flip_flop or labelled.")
    ],
    inputs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[INPUT]...", help="Files to read, instead of drawing samples."),
    ] = None,
    *,
    out: Annotated[Path, typer.Option(help="The folder to make: DIR/train, DIR/val, tests.")],
    seed: Annotated[int, typer.Option(min=0, help="Decides all that is drawn.")] = 1,
    train: Annotated[
        int | None, typer.Option(help="Samples to draw; of logic, before they are divided.")
    ] = None,
    val: Annotated[int | None, typer.Option(help="Samples to draw for validation.")] = None,
    test: Annotated[
        list[str] | None,
        typer.Option(
            help="One more corpus. listops: a variant (d8, d14, d20, lra, iid_arg, ood_10arg, "
            "ood_15arg, 200-300 to 900-1000); flip_flop: p_i or p_i x length, as 0.98x1024; "
            "labelled: a file."
        ),
    ] = None,
    test_count: Annotated[int | None, typer.Option(help="Samples to draw of each test.")] = None,
    variant: Annotated[str | None, typer.Option(help="listops, of train and val: d20.")] = None,
    max_depth: Annotated[
        int | None, typer.Option(help="listops, instead of the variant's.")
    ] = None,
    max_args: Annotated[int | None, typer.Option(help="listops, instead of the variant's.")] = None,
    min_length: Annotated[int | None, typer.Option(help="listops: tokens at least.")] = None,
    max_length: Annotated[int | None, typer.Option(help="listops: tokens at most.")] = None,
    length: Annotated[int | None, typer.Option(help="flip_flop: symbols of a string; 512.")] = None,
    p_ignore: Annotated[float | None, typer.Option(help="flip_flop: p_i of train; 0.8.")] = None,
    train_operators: Annotated[
        int | None, typer.Option(help="logic: train has up to so many operators; 6.")
    ] = None,
    text_key: Annotated[
        list[str] | None, typer.Option(help="labelled: field of the text; twice for pairs.")
    ] = None,
    label_key: Annotated[str | None, typer.Option(help="labelled: field of the label.")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--class", help="labelled: a class that is read; left out: all are."),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(help="labelled: name of the next column of csv and tsv without a header."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="labelled: bytes (the default), words (of train), or a file."),
    ] = None,
    val_fraction: Annotated[
        float | None, typer.Option(help="labelled: share of the samples for validation.")
    ] = None,
) -> None:
    """Draw or read labelled samples: ListOps, logical inference, flip-flop, or your own."""
    from data_prep.progress import ProgressReport
    from data_prep.tasks import TaskRequest, prepare_task

    request = TaskRequest(
        name, tuple(inputs or ()), seed, train=train, val=val, tests=tuple(test or ()),
        test_count=test_count, variant=variant, max_depth=max_depth, max_args=max_args,
        min_length=min_length, max_length=max_length, length=length, p_ignore=p_ignore,
        train_operators=train_operators, text_keys=tuple(text_key) if text_key else None,
        label_key=label_key, classes=tuple(only or ()), columns=tuple(column or ()),
        tokenizer=tokenizer, val_fraction=val_fraction,
    )  # fmt: skip
    for split, manifest in prepare_task(request, out, ProgressReport()).items():
        made = manifest.task or {}
        most = max(made["of_classes"]) / sum(made["of_classes"])
        print(
            f"{out / split}: {made['num_samples']} samples, {len(made['classes'])} classes (the "
            f"largest {100 * most:.1f} %), up to {made['longest']} tokens"
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


@app.command()
def teacher(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A run with distill.teacher.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Changes to it.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder to make.")] = Path("data/teacher"),
    top_k: Annotated[int, typer.Option(min=1, help="Tokens to keep of each position.")] = 64,
) -> None:
    """Store what a teacher says about all samples of a run, for distill.stored."""
    from data_prep.progress import ProgressReport
    from megarecur.config.load import load_config
    from megarecur.config.schema import ParallelConfig
    from megarecur.parallel.mesh import Mesh, pick_device
    from megarecur.train.distill import load_teacher, with_teacher
    from megarecur.train.stored_teacher import ENTRY_BYTES, write_down
    from megarecur.train.trainer import open_data

    asked = load_config(config, overrides or [])
    if asked.distill is None or asked.distill.teacher is None:
        raise ConfigError(f"{config}: names no distill.teacher to ask; add one")
    mesh = Mesh(device=pick_device(asked.train.device))
    asked = asked.model_copy(update={"parallel": ParallelConfig()})
    data = open_data(asked, mesh)
    loader = data.loader
    asked = with_teacher(data.config, data.tokenizer, loader.corpora, mesh)
    model = load_teacher(asked, mesh, has_head=True)
    assert model is not None
    progress, length = ProgressReport(), asked.data.seq_length
    tokens = asked.train.steps * asked.train.global_batch_size * length
    with progress.phase("teacher", tokens * top_k * ENTRY_BYTES):
        write_down(
            asked,
            data.tokenizer,
            loader,
            lambda batch: model.logits(batch.to(mesh.device)),
            out,
            top_k,
            lambda done: progress.advance(done * top_k * ENTRY_BYTES, done),
        )
    data.close()
    print(f"{out}: the {top_k} likeliest tokens of {tokens} positions; use distill.stored={out}")


def report(manifests: dict[str, Manifest], out: Path) -> None:
    """One line per corpus made."""
    for name, manifest in manifests.items():
        print(
            f"{out / name}: {manifest.num_documents} documents, {manifest.num_tokens} tokens, "
            f"{manifest.num_bytes / manifest.num_tokens:.2f} bytes per token"
        )
