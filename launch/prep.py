"""The commands `megarecur prep ...`: from text to a tokenizer and shards."""

from __future__ import annotations

import time
from collections.abc import Callable
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from megarecur.errors import ConfigError
from megarecur.launch.limits import (
    MAX_COUNT,
    MAX_INTEGER,
    MAX_LOCAL,
    MAX_PARTS,
    MAX_RANKS,
    MAX_TOKENS,
)
from megarecur.launch.output import say

if TYPE_CHECKING:
    from megarecur.data.corpus import Manifest

MOST_SAMPLES = 10**9

app = typer.Typer(help="Turn text into a tokenizer and shards.", no_args_is_help=True)

Inputs = Annotated[
    list[str],
    typer.Argument(
        metavar="INPUT...",
        help="txt, jsonl, csv, tsv (plain, gz, xz, zst, bz2), parquet, arrow, mds: files, folders; "
        "hf:NAME[:CONFIG][@SPLIT] for a Hugging Face dataset.",
    ),
]
Errors = Literal["fail", "skip", "replace"]
Quoting = Literal["auto", "quoted", "none"]
ERRORS = "Bytes that are not UTF-8, holes of zero bytes, null: fail, skip the document, or replace."
EXCLUDE = "Pattern of files and folders to exclude."
VAL_TEXT, TEST_TEXT = "The same for DIR/val.", "The same for DIR/test."
QUOTING = "Quoting of csv and tsv cells (auto: csv only)."
READING = {
    "text_key": (
        "text",
        Annotated[str, typer.Option(help="Field of a row (jsonl, csv, parquet) with the text.")],
    ),
    "template": (
        "",
        Annotated[str, typer.Option(help="Template of fields instead: '{title}\\n\\n{body}'.")],
    ),
    "text_split": (
        "file",
        Annotated[
            Literal["file", "line", "blank_line", "separator"],
            typer.Option(help="End of a document in txt files."),
        ],
    ),
    "separator": (
        "",
        Annotated[
            str, typer.Option(help="The whole line that ends one, for --text-split separator.")
        ],
    ),
    "errors": ("fail", Annotated[Errors, typer.Option(help=ERRORS)]),
    "exclude": (None, Annotated[list[str] | None, typer.Option(metavar="GLOB", help=EXCLUDE)]),
    "quoting": ("auto", Annotated[Quoting, typer.Option(help=QUOTING)]),
}
"""Options for reading files as documents: type and default of each."""


def takes_reading(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of READING to a command, as its argument `reading`."""

    def run(**options: Any) -> None:
        from megarecur.data_prep.readers import Reading

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
    vocab_size: Annotated[int, typer.Option(min=1, max=1 << 26, help="Number of ids.")],
    model_type: Annotated[Literal["bpe", "unigram"], typer.Option()] = "bpe",
    byte_fallback: Annotated[bool, typer.Option(help="Unknown text becomes bytes.")] = True,
    character_coverage: Annotated[
        float, typer.Option(min=0.98, max=1.0, help="Share of characters kept.")
    ] = 0.9995,
    sample_bytes: Annotated[
        int, typer.Option(max=MAX_INTEGER, min=0, help="Maximum bytes of training text (0: all).")
    ] = 8 << 20,
    seed: Annotated[int, typer.Option(max=MAX_INTEGER, min=0, help="Seed of the sample.")] = 1,
    pad: Annotated[
        bool, typer.Option(help="Add a padding token (id 3), which `prep pairs` needs.")
    ] = False,
    *,
    reading: Any,
) -> None:
    """Train a sentencepiece model."""
    from megarecur.data_prep.progress import ProgressReport
    from megarecur.data_prep.tokenizer import train_tokenizer

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
        pad=pad,
        progress=ProgressReport(),
    )
    say(path)


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
    eos: Annotated[
        str | None,
        typer.Option(
            metavar="TOKEN", help="End-of-document token, by name or id (default: the tokenizer's)."
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option(max=MAX_LOCAL, min=0, help="Processes (default: 0, one per core).")
    ] = 0,
    launch: Annotated[
        Literal["slurm"] | None, typer.Option(help="Run as Slurm jobs, with the options below.")
    ] = None,
    tasks: Annotated[
        int | None,
        typer.Option(max=MAX_RANKS, min=1, help="Tasks that each phase is divided into."),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(metavar="PROFILE", help="Profile of configs/cluster, or a YAML file."),
    ] = None,
    at_once: Annotated[
        int | None, typer.Option(max=MAX_RANKS, min=1, help="Max concurrent tasks (default: all).")
    ] = None,
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
    """Tokenise text into shards; the same command resumes after an interruption."""
    from megarecur.data_prep.plan import Request
    from megarecur.data_prep.progress import ProgressReport

    own = {"--cluster": cluster, "--at-once": at_once, "--dry-run": dry_run or None}
    own |= {} if phase else {"--tasks": tasks}
    if launch is None and (lonely := [name for name, value in own.items() if value is not None]):
        raise ConfigError(f"{lonely[0]}: only for jobs; add --launch slurm, or omit it")
    if (launch or phase) and tasks is None:
        raise ConfigError("--launch slurm: needs --tasks, the number of tasks of each phase")
    request = Request(
        tuple(inputs), tokenizer, reading, val_fraction, deduplicate, near_duplicates, eos=eos
    )
    from megarecur.launch.prep_array import cores, refuse_while_queued, submit_preparation

    if launch is not None and phase is None:
        assert tasks is not None
        todo = submit_preparation(
            request, out, tasks, cluster=cluster, at_once=at_once, workers=workers, dry_run=dry_run
        )
        if not todo:
            say(f"{out}: is prepared")
        return
    if phase is not None:
        from megarecur.data_prep.array import run_task

        assert tasks is not None
        number, started = workers or cores(), time.monotonic()
        say(f"{phase}: task {task} of {tasks} in {number} processes", flush=True)
        made = run_task(request, out, phase, task, tasks, workers=number, progress=ProgressReport())
        report(made, out)
        say(f"{phase}: task {task} has finished in {time.monotonic() - started:.1f} s")
        return
    from megarecur.data_prep.shards import prepare_shards

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
        eos=eos,
        progress=ProgressReport(),
    )
    report(made, out)


@app.command()
def pairs(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[INPUT]...",
            help="Tables of both sides, instead of --source and --target: jsonl, csv, tsv, "
            "parquet, arrow, mds, hf:NAME.",
        ),
    ] = None,
    *,
    source: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE", help="Text of the source side, a sentence per line; repeat for more."
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Text of the target side, in the same order."),
    ] = None,
    val_source: Annotated[list[str] | None, typer.Option(metavar="FILE", help=VAL_TEXT)] = None,
    val_target: Annotated[list[str] | None, typer.Option(metavar="FILE", help=VAL_TEXT)] = None,
    val: Annotated[
        list[str] | None, typer.Option(metavar="INPUT", help="Tables for DIR/val.")
    ] = None,
    test_source: Annotated[list[str] | None, typer.Option(metavar="FILE", help=TEST_TEXT)] = None,
    test_target: Annotated[list[str] | None, typer.Option(metavar="FILE", help=TEST_TEXT)] = None,
    test: Annotated[
        list[str] | None, typer.Option(metavar="INPUT", help="Tables for DIR/test.")
    ] = None,
    source_key: Annotated[
        str, typer.Option(help="Field of a row with the source, also inside a translation column.")
    ] = "source",
    target_key: Annotated[str, typer.Option(help="Field of a row with the target.")] = "target",
    column: Annotated[
        list[str] | None,
        typer.Option(help="Name of the next column of csv and tsv without a header."),
    ] = None,
    tokenizer: Annotated[
        str,
        typer.Option(
            help="Tokenizer of both sides, with a padding token (`prep tokenizer --pad`)."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder to make: DIR/train, DIR/val, DIR/test.")],
    max_ratio: Annotated[
        float | None,
        typer.Option(
            help="Drop pairs of train with more tokens of one side per token of the "
            "other (default: off)."
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            max=MAX_TOKENS, help="Drop pairs of train with more tokens on a side (default: off)."
        ),
    ] = None,
    deduplicate: Annotated[bool, typer.Option(help="Keep equal pairs of train once.")] = False,
    drop_identical: Annotated[
        bool, typer.Option(help="Drop pairs of train whose sides are equal.")
    ] = False,
    eos: Annotated[
        str | None,
        typer.Option(
            metavar="TOKEN",
            help="Token that ends sentences, by name or id (default: the tokenizer's).",
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option(max=MAX_LOCAL, min=0, help="Processes (default: 0, one per core).")
    ] = 0,
    quoting: Annotated[Quoting, typer.Option(help=QUOTING)] = "auto",
    errors: Annotated[Errors, typer.Option(help=ERRORS)] = "fail",
    exclude: Annotated[list[str] | None, typer.Option(metavar="GLOB", help=EXCLUDE)] = None,
) -> None:
    """Make corpora of sentence pairs for translation; the same command resumes.

    Pairs with an empty side are always dropped. The other filters are off by default and for train
    alone. What is dropped is counted by reason, printed, and kept in manifest.json.
    """
    from megarecur.data_prep.bitext import Bitext, Keys
    from megarecur.data_prep.pairs import (
        PairFilters,
        PairRequest,
        describe_dropped,
        prepare_pairs,
    )
    from megarecur.data_prep.progress import ProgressReport
    from megarecur.data_prep.readers import Reading

    def bitext(*given: list[str] | None) -> Bitext:
        return Bitext(*(tuple(entries or ()) for entries in given))

    request = PairRequest(
        train=bitext(source, target, inputs),
        val=bitext(val_source, val_target, val),
        test=bitext(test_source, test_target, test),
        tokenizer=tokenizer,
        keys=Keys(source_key, target_key, tuple(column or ())),
        filters=PairFilters(max_ratio, max_length, deduplicate, drop_identical),
        reading=Reading(errors=errors, exclude=tuple(exclude or ()), quoting=quoting),
        eos=eos,
    )
    made = prepare_pairs(request, out, workers=workers, progress=ProgressReport())
    for split, manifest in made.items():
        held = manifest.task or {}
        dropped = describe_dropped(held["dropped"])
        say(
            f"{out / split}: {held['num_pairs']:,} pairs, {held['source_tokens']:,} source and "
            f"{held['target_tokens']:,} target tokens, up to {held['longest_source']} and "
            f"{held['longest_target']} in a sentence; dropped: {dropped or 'none'}"
        )


@app.command()
def task(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help="listops, logic, flip_flop, pathfinder or labelled."),
    ],
    inputs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[INPUT]...", help="Files to read instead of drawing samples."),
    ] = None,
    *,
    out: Annotated[Path, typer.Option(help="The folder to make: DIR/train, DIR/val, tests.")],
    seed: Annotated[int, typer.Option(max=MAX_INTEGER, min=0, help="Seed of all draws.")] = 1,
    train: Annotated[
        int | None,
        typer.Option(max=MOST_SAMPLES, help="Samples to draw; of logic, before they are divided."),
    ] = None,
    val: Annotated[
        int | None, typer.Option(max=MOST_SAMPLES, help="Samples to draw for validation.")
    ] = None,
    test: Annotated[
        list[str] | None,
        typer.Option(
            help="One more corpus. listops: a variant (d8, d14, d20, lra, iid_arg, ood_10arg, "
            "ood_15arg, 200-300 to 900-1000); flip_flop: p_i or p_i x length, as 0.98x1024; "
            "pathfinder: dashes of a contour; labelled: a file."
        ),
    ] = None,
    test_count: Annotated[
        int | None, typer.Option(max=MOST_SAMPLES, help="Samples to draw of each test.")
    ] = None,
    variant: Annotated[str | None, typer.Option(help="listops, of train and val: d20.")] = None,
    max_depth: Annotated[
        int | None, typer.Option(max=MAX_PARTS, help="listops, instead of the variant's.")
    ] = None,
    max_args: Annotated[
        int | None, typer.Option(max=MAX_PARTS, help="listops, instead of the variant's.")
    ] = None,
    min_length: Annotated[
        int | None, typer.Option(max=MAX_TOKENS, help="listops: tokens at least.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(max=MAX_TOKENS, help="listops: tokens at most.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(max=1 << 20, help="flip_flop: symbols of a string; 512.")
    ] = None,
    p_ignore: Annotated[float | None, typer.Option(help="flip_flop: p_i of train; 0.8.")] = None,
    contour_length: Annotated[
        int | None, typer.Option(max=MAX_PARTS, help="pathfinder: dashes of a contour; 14.")
    ] = None,
    train_operators: Annotated[
        int | None,
        typer.Option(max=MAX_PARTS, help="logic: maximum operators in train (default: 6)."),
    ] = None,
    text_key: Annotated[
        list[str] | None, typer.Option(help="labelled: field of the text; twice for pairs.")
    ] = None,
    label_key: Annotated[str | None, typer.Option(help="labelled: field of the label.")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--class", help="labelled: a class to read (default: all)."),
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
    quoting: Annotated[Quoting | None, typer.Option(help=f"labelled: {QUOTING}")] = None,
    errors: Annotated[Errors | None, typer.Option(help=f"labelled: {ERRORS}")] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help=f"labelled: {EXCLUDE}")
    ] = None,
) -> None:
    """Draw or read labelled samples: ListOps, logical inference, flip-flop, Pathfinder, or your
    own."""
    from megarecur.data_prep.progress import ProgressReport
    from megarecur.data_prep.tasks import TaskRequest, prepare_task

    request = TaskRequest(
        name, tuple(inputs or ()), seed, train=train, val=val, tests=tuple(test or ()),
        test_count=test_count, variant=variant, max_depth=max_depth, max_args=max_args,
        min_length=min_length, max_length=max_length, length=length, p_ignore=p_ignore,
        train_operators=train_operators, text_keys=tuple(text_key) if text_key else None,
        label_key=label_key, classes=tuple(only or ()), columns=tuple(column or ()),
        tokenizer=tokenizer, val_fraction=val_fraction, quoting=quoting, errors=errors,
        exclude=tuple(exclude or ()), contour_length=contour_length,
    )  # fmt: skip
    for split, manifest in prepare_task(request, out, ProgressReport()).items():
        made = manifest.task or {}
        most = max(made["of_classes"]) / sum(made["of_classes"])
        say(
            f"{out / split}: {made['num_samples']} samples, {len(made['classes'])} classes (the "
            f"largest {100 * most:.1f} %), up to {made['longest']} tokens"
        )


@app.command()
def images(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Labelled pictures: a folder with a sub-folder per class (or train/ and val/ with "
            "such), parquet or Arrow files of Hugging Face, IDX (MNIST), npz, tar of WebDataset.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder to make: DIR/train, and DIR/val.")],
    val: Annotated[
        list[str] | None,
        typer.Option(
            metavar="INPUT",
            help="Pictures for DIR/val (default: files and folders named val or test, if any).",
        ),
    ] = None,
    val_fraction: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the pictures for DIR/val instead.")
    ] = 0.0,
    resize: Annotated[
        int | None,
        typer.Option(
            min=1, max=1 << 16, help="Pixels of the short side (default: sizes are kept)."
        ),
    ] = None,
    channels: Annotated[
        int | None,
        typer.Option(
            min=1, max=3, help="1 (grey) or 3 (default: 1 if all pictures are grey, else 3)."
        ),
    ] = None,
    background: Annotated[
        str, typer.Option(metavar="COLOUR", help="Colour below transparent pixels.")
    ] = "white",
    image_key: Annotated[
        str | None, typer.Option(help="Column or array with the pictures (default: found).")
    ] = None,
    label_key: Annotated[
        str | None, typer.Option(help="Column, array or json field of labels (default: found).")
    ] = None,
    class_names: Annotated[
        str | None,
        typer.Option(metavar="NAME,NAME,...", help="Names of the classes 0, 1, 2 and so on."),
    ] = None,
    skip_damaged: Annotated[
        bool, typer.Option("--skip-damaged", help="Skip and count pictures that do not decode.")
    ] = False,
    as_tokens: Annotated[
        Literal["grey"] | None,
        typer.Option(
            help="Write sequences of pixels instead of pictures, a token for each grey value, as "
            "Long Range Arena's Image has them."
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option(max=MAX_LOCAL, min=0, help="Processes (default: 0, one per core).")
    ] = 0,
    exclude: Annotated[list[str] | None, typer.Option(metavar="GLOB", help=EXCLUDE)] = None,
) -> None:
    """Make corpora of labelled pictures; the same command resumes after an interruption.

    JPEG and PNG are kept byte for byte, unless a picture is turned by its EXIF tag, transparent or
    resized. Mean and standard deviation of the training pictures are measured.
    """
    from megarecur.data_prep.image_encoding import Encoding
    from megarecur.data_prep.image_inputs import FieldNames
    from megarecur.data_prep.images import ImageRequest, describe_corpus, prepare_images
    from megarecur.data_prep.progress import ProgressReport

    if channels == 2:
        raise ConfigError("--channels 2: pictures have 1 or 3; correct it")
    request = ImageRequest(
        inputs=tuple(inputs),
        val=tuple(val or ()),
        val_fraction=val_fraction,
        encoding=Encoding(channels, resize, background),
        keys=FieldNames(image_key, label_key),
        class_names=tuple(class_names.split(",")) if class_names else (),
        skip_damaged=skip_damaged,
        exclude=tuple(exclude or ()),
    )
    if as_tokens is not None:
        from megarecur.data_prep.pixels import prepare_grey

        made = prepare_grey(request, out, workers=workers, progress=ProgressReport())
        for split, manifest in made.items():
            held = manifest.task or {}
            say(
                f"{out / split}: {held['num_samples']:,} pictures of {held['longest']:,} pixels, "
                f"{len(held['classes'])} classes"
            )
        return
    made = prepare_images(request, out, workers=workers, progress=ProgressReport())
    for split, manifest in made.items():
        say(f"{out / split}: {describe_corpus(manifest)}")


@app.command()
def inspect(
    corpus: Annotated[Path, typer.Argument(metavar="CORPUS", help="A folder of shards.")],
    samples: Annotated[int, typer.Option(max=MAX_TOKENS, min=0, help="Documents to decode.")] = 3,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer, if it is not found automatically.")
    ] = None,
    draw: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Draw pictures of the corpus with their classes."),
    ] = None,
) -> None:
    """Show what a corpus holds: samples, lengths, bytes per token; or pictures, sizes, classes."""
    from megarecur.data_prep.contact_sheet import draw_corpus
    from megarecur.data_prep.inspect import inspect_corpus, render_inspection
    from megarecur.launch.terminal import show

    if draw is not None:
        draw_corpus(corpus, draw)
        say(draw)
    found = inspect_corpus(corpus, num_samples=samples, tokenizer=tokenizer)
    show(lambda _: render_inspection(found))


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="The folder to make.")] = Path("data/quickstart"),
    vocab_size: Annotated[int, typer.Option(min=1, max=1 << 26, help="Number of ids.")] = 2048,
) -> None:
    """Prepare the demo's corpus: the sources of the running Python's standard library."""
    from megarecur.data_prep.progress import ProgressReport
    from megarecur.data_prep.stdlib import prepare_quickstart

    report(prepare_quickstart(out, vocab_size=vocab_size, progress=ProgressReport()), out)


@app.command()
def teacher(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A run with distill.teacher.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Overrides of the config."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder to make.")] = Path("data/teacher"),
    top_k: Annotated[
        int, typer.Option(max=MAX_COUNT, min=1, help="Tokens to store per position.")
    ] = 64,
) -> None:
    """Store a teacher's predictions on all samples of a run, for distill.stored."""
    from megarecur.config.load import load_config
    from megarecur.config.parallel import ParallelConfig
    from megarecur.data.open import open_data
    from megarecur.data_prep.progress import ProgressReport
    from megarecur.parallel.mesh import Mesh, pick_device
    from megarecur.train.distill import load_teacher, with_teacher
    from megarecur.train.stored_teacher import ENTRY_BYTES, write_down

    asked = load_config(config, overrides or [])
    if asked.distill is None or asked.distill.teacher is None:
        raise ConfigError(f"{config}: has no distill.teacher; add one")
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
            lambda batch: model.target(batch.to(mesh.device))(slice(None)),
            out,
            top_k,
            lambda done: progress.advance(done * top_k * ENTRY_BYTES, done),
        )
    data.close()
    say(f"{out}: the {top_k} likeliest tokens of {tokens} positions; use distill.stored={out}")


def report(manifests: dict[str, Manifest], out: Path) -> None:
    """Print one line per corpus."""
    for name, manifest in manifests.items():
        say(
            f"{out / name}: {manifest.num_documents} documents, {manifest.num_tokens} tokens, "
            f"{manifest.num_bytes / manifest.num_tokens:.2f} bytes per token"
        )
