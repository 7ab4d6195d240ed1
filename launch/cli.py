"""The command `megarecur`: one small function per command, heavy imports inside it.

    megarecur check configs/quickstart.yaml train.steps=1000
    megarecur plot runs/quickstart

Exit codes: 0 done, 2 user error, 3 saved and stopped by a signal (resume me), 1 anything else.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from megarecur.errors import (
    SHORTAGES,
    ConfigError,
    MegarecurError,
    explain_memory_error,
    refuse_undecodable,
)
from megarecur.launch import prep
from megarecur.launch.limits import (
    MAX_COUNT,
    MAX_INTEGER,
    MAX_LOCAL,
    MAX_PARTS,
    MAX_RANKS,
    MAX_SIDE,
    MAX_STEP,
    MAX_TOKENS,
)
from megarecur.launch.output import say
from megarecur.reading import escape_logs

if TYPE_CHECKING:
    pass

# A path or disk that the user can fix, reported where no better message was made.
USERS_ERRNOS = {
    errno.EACCES, errno.EBUSY, errno.EDQUOT, errno.EIO, errno.EISDIR, errno.ELOOP,
    errno.ENAMETOOLONG, errno.ENOENT, errno.ENOSPC, errno.ENOTDIR, errno.EROFS, errno.ESTALE,
}  # fmt: skip

app = typer.Typer(
    help="Pretraining of recurrent-depth and parameter-shared Transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(prep.app, name="prep")
bench = typer.Typer(help="Measure this machine.", no_args_is_help=True)
app.add_typer(bench, name="bench")

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY.SUB=VALUE", help="Values to replace, in YAML."),
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]


def main() -> None:
    """Run the command line; a user error is one message on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A terminal without UTF-8 shows unsupported characters as `?`.
            stream.reconfigure(errors="replace")
    escape_logs()
    # The library does not support an option with an optional value.
    if sys.argv[1:2] == ["launch"]:
        sys.argv = ["--dry-run=print" if word == "--dry-run" else word for word in sys.argv]
    try:
        app()
    except MegarecurError as error:
        say(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno in SHORTAGES:
            place = f"{error.filename}: " if error.filename is not None else ""
            say(f"error: {place}{error.strerror}; {SHORTAGES[error.errno]}", file=sys.stderr)
            sys.exit(2)
        if error.errno not in USERS_ERRNOS or error.filename is None:
            raise
        say(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not (reason := explain_memory_error(error)):
            raise
        # Not 2, as a requeued job may get nodes with more memory.
        say(f"error: {reason}", file=sys.stderr)
        sys.exit(1)


def print_version(wanted: bool) -> None:
    """Print the version and exit, if --version is given."""
    if wanted:
        from importlib.metadata import version

        say(f"megarecur {version('megarecur')}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=print_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Pretraining of recurrent-depth and parameter-shared Transformers."""


# ------------------------------------------------------------------------------ before training


@app.command()
def check(
    config: ConfigPath,
    overrides: Overrides = None,
    draw: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw the layer map: .png or .svg.")
    ] = None,
) -> None:
    """Explain a run: layer map, parameters, FLOPs, memory, tokens."""
    from megarecur.launch.check import describe
    from megarecur.launch.configs import load_run_config, with_vocab_size
    from megarecur.launch.inputs import check_early
    from megarecur.launch.terminal import show
    from megarecur.plan.cost import check_size
    from megarecur.plan.schedule import Schedules
    from megarecur.recurrence.inventory import build_inventory, check_patterns

    check_picture(draw)
    resolved = with_vocab_size(load_run_config(config, overrides))
    check_patterns(resolved.optimizer, build_inventory(resolved))
    check_size(resolved)
    Schedules(resolved).close()  # Rejects impossible placements and orders.
    unchecked = check_early(resolved)
    show(lambda width: describe(resolved, width))
    for line in unchecked:
        say(f"not checked: {line}")
    if draw is not None:
        from megarecur.plot.layer_map import draw_config, save

        save(draw_config(resolved), draw)
        say(f"\nlayer map drawn to {draw}")


@app.command()
def plan(
    config: ConfigPath,
    world_size: Annotated[int, typer.Option(min=1, max=1 << 20, help="Number of ranks.")],
    overrides: Overrides = None,
    tensor: Annotated[
        int | None,
        typer.Option(max=MAX_RANKS, min=1, help="Tensor-parallel ranks (default: search)."),
    ] = None,
    pipeline: Annotated[
        int | None, typer.Option(max=MAX_RANKS, min=1, help="Pipeline ranks (default: search).")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            max=MAX_RANKS,
            min=1,
            help="Context-parallel ranks (default: search; the config's with --tensor and "
            "--pipeline).",
        ),
    ] = None,
    zero: Annotated[
        int | None,
        typer.Option(
            min=0, max=3, help="ZeRO stage (default: the config's, or the first that fits)."
        ),
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="cpu, a100, h100, h200, or a YAML file such as `bench hardware` writes.",
        ),
    ] = None,
    cluster: Annotated[str | None, typer.Option(hidden=True)] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw the order: .png or .svg.")
    ] = None,
) -> None:
    """Report where a run would live on many ranks, and predict a step's time, memory and
    traffic."""
    from megarecur.config.load import load_config
    from megarecur.launch.configs import with_vocab_size

    if cluster is not None:
        raise ConfigError(
            f"--cluster {cluster}: names a Slurm profile, of `launch` and `prep`; "
            f"name the hardware of a plan with --hardware {cluster}"
        )
    check_picture(out, "--out")
    resolved = with_vocab_size(load_config(config, overrides or ()))
    from megarecur.launch.plan import plan_config

    found = plan_config(resolved, world_size, tensor, pipeline, context, zero, hardware)
    if out is not None:
        from megarecur.plot.layer_map import save
        from megarecur.plot.timeline import draw_plan

        save(draw_plan(found), out)
        say(f"\norder drawn to {out}")


@bench.callback()
def measure() -> None:
    """Measure this machine."""


@bench.command()
def hardware(
    out: Annotated[Path, typer.Option(metavar="FILE", help="Description to write: .yaml.")],
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    ranks: Annotated[
        int | None,
        typer.Option(
            max=MAX_LOCAL,
            min=1,
            help="Processes that share the machine (default: one for each GPU, or one).",
        ),
    ] = None,
) -> None:
    """Measure products, attention, memory and collectives, for `plan --hardware FILE`."""
    from megarecur.launch.bench import bench_hardware

    bench_hardware(out, device, ranks)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a config, with which editors complete and explain keys."""
    from megarecur.config.json_schema import write_schema

    say(write_schema(), end="")


# ------------------------------------------------------------------------------------- training


@app.command()
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train a run, or resume it from its newest checkpoint by the same command."""
    from megarecur.train.signals import (
        die_with_launcher,
        ignore_signals,
        note_signals,
        write_stacks_on_demand,
    )

    stop = note_signals()  # Before torch is imported, which takes seconds.
    die_with_launcher()
    write_stacks_on_demand()
    from megarecur.launch.configs import load_run_config

    resolved = load_run_config(config, overrides)
    from megarecur.train.trainer import train as train_run

    code = train_run(resolved, stop)
    ignore_signals()
    raise typer.Exit(code)


@app.command("launch")
def launch_processes(
    config: ConfigPath,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None,
        typer.Option(max=MAX_LOCAL, min=1, help="Processes on this machine, without Slurm."),
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(max=MAX_RANKS, min=1, help="Nodes of a Slurm job.")
    ] = None,
    gpus_per_node: Annotated[
        int,
        typer.Option(
            max=MAX_LOCAL, min=0, help="GPUs of each node, and processes unless these are given."
        ),
    ] = 0,
    processes_per_node: Annotated[
        int | None,
        typer.Option(max=MAX_LOCAL, min=1, help="Processes of each node, where there are no GPUs."),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="A profile of configs/cluster, or a YAML file."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the job (default: that of the run folder).")
    ] = None,
    partition: Annotated[
        str | None, typer.Option(help="Partition (default: the profile's).")
    ] = None,
    time: Annotated[
        str | None, typer.Option(metavar="LIMIT", help="Time limit (default: the profile's).")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="A further option of sbatch, without dashes."),
    ] = None,
    node_path: Annotated[
        list[str] | None,
        typer.Option(metavar="DIR", help="Folder that only the nodes see; it is not checked."),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY.SUB=A,B", help="A run for each value: one array of jobs."),
    ] = None,
    at_once: Annotated[
        int | None,
        typer.Option(max=MAX_RANKS, help="Max concurrent runs of a sweep (default: all)."),
    ] = None,
    failed_only: Annotated[
        bool,
        typer.Option(
            "--failed-only", help="Only those runs of the sweep that ended without finishing."
        ),
    ] = False,
    replace: Annotated[
        bool,
        typer.Option("--replace", help="Cancel the run's current job and take over."),
    ] = False,
    after: Annotated[
        list[str] | None,
        typer.Option(metavar="JOB", help="Start when this job has ended, with any result."),
    ] = None,
    dry_run: Annotated[
        str | None,
        typer.Option(
            metavar="[check]", help="Print the script; check: validate it with Slurm too."
        ),
    ] = None,
    join: Annotated[int, typer.Option(hidden=True, help="Nodes that meet at MASTER_ADDR.")] = 1,
) -> None:
    """Train with several processes: on this machine (--nproc), or as a Slurm job (--nodes)."""
    if (nodes is None) == (nproc is None):
        raise ConfigError("launch: needs --nproc for this machine, or --nodes for a Slurm job")
    if nproc is not None:
        jobs_only = {
            "--name": name, "--partition": partition, "--time": time, "--option": option,
            "--sweep": sweep, "--at-once": at_once, "--failed-only": failed_only,
            "--replace": replace, "--after": after, "--dry-run": dry_run,
            "--processes-per-node": processes_per_node, "--gpus-per-node": gpus_per_node,
            "--node-path": node_path,
        }  # fmt: skip
        if lonely := [flag for flag, value in jobs_only.items() if value]:
            raise ConfigError(
                f"{', '.join(lonely)}: only for Slurm jobs; use --nodes instead of --nproc"
            )
        from megarecur.launch.local import train_local

        raise typer.Exit(train_local(config, overrides or (), nproc, join, cluster))
    if dry_run not in (None, "print", "check"):
        raise ConfigError(f"--dry-run={dry_run}: must be --dry-run or --dry-run=check")
    from megarecur.launch.submit import LaunchOptions, launch_slurm

    launch_slurm(
        config,
        overrides or (),
        LaunchOptions(
            nodes=nodes or 1,
            gpus_per_node=gpus_per_node,
            processes_per_node=processes_per_node,
            cluster=cluster,
            name=name,
            partition=partition,
            time=time,
            options=tuple(option or ()),
            node_paths=tuple(node_path or ()),
            sweep=tuple(sweep or ()),
            at_once=at_once,
            failed_only=failed_only,
            replace=replace,
            after=tuple(after or ()),
            dry_run=dry_run,
        ),
    )


@app.command(hidden=True)
def supervise(
    job: Annotated[Path, typer.Argument(metavar="JOB", help="Its folder, RUN/launch/jobs/ID.")],
) -> None:
    """Start, watch and requeue a run: the command of a job's batch script."""
    from megarecur.launch.supervise import supervise as supervise_run

    raise typer.Exit(supervise_run(job.absolute()))


@app.command()
def verify(
    config: ConfigPath,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None,
        typer.Option(
            max=MAX_LOCAL, min=1, help="Processes (default: tensor x pipeline x context)."
        ),
    ] = None,
    steps: Annotated[
        int, typer.Option(max=MAX_STEP, min=1, help="Optimizer steps to compare.")
    ] = 3,
    small: Annotated[
        bool, typer.Option("--small", help="Narrow and short; same blocks, heads and mesh.")
    ] = False,
) -> None:
    """Compare a config's mesh with one process: losses, norms and every raw gradient."""
    from megarecur.launch.configs import load_run_config, with_vocab_size

    resolved = with_vocab_size(load_run_config(config, overrides))
    from megarecur.launch.verify import verify_config

    raise typer.Exit(verify_config(resolved, nproc or resolved.parallel.replica, steps, small))


@app.command(hidden=True)
def record(config: ConfigPath, folder: Path, steps: int) -> None:
    """Run steps and write their results: one side of `verify`."""
    from megarecur.config.load import load_config

    resolved = load_config(config, ())
    from megarecur.train.verify import record as record_steps

    record_steps(resolved, steps, folder)


# ------------------------------------------------------------------------------------- watching


@app.command()
def status(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN|JOB]",
            help="Run folder, or id of its Slurm job (default: all in your queue).",
        ),
    ] = None,
) -> None:
    """Show the state of a run: step, loss, speed, time left, restarts, newest checkpoint."""
    from megarecur.launch.status import show_status

    show_status(what)


@app.command()
def logs(
    run: RunPath,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Follow new lines until the run is done.")
    ] = False,
    attempt: Annotated[
        int | None, typer.Option(max=MAX_STEP, min=1, help="Attempt to show (default: the newest).")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(max=MAX_RANKS, min=0, help="Rank to show (default: all).")
    ] = None,
) -> None:
    """Print the output of a Slurm run's ranks, each line with its rank in front."""
    from megarecur.launch.logs import show_logs

    show_logs(run, follow, attempt, rank)


# ------------------------------------------------------------------------------- after training


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Output folder (default: RUN/plots, or plots for several runs)."
        ),
    ] = None,
) -> None:
    """Draw a run's curves and its layer map as PNG and SVG; several runs together."""
    from megarecur.plot.run import plot_run, plot_runs

    several = len(runs) > 1
    for path in plot_runs(runs, out or Path("plots")) if several else plot_run(runs[0], out):
        say(path)


@app.command("eval")
def evaluate_run(
    run: RunPath,
    step: Annotated[
        int | None, typer.Option(max=MAX_STEP, help="Checkpoint to use (default: the newest).")
    ] = None,
    samples: Annotated[
        int, typer.Option(max=MAX_COUNT, min=0, help="Samples of each corpus (default: 0, all).")
    ] = 0,
    data: Annotated[
        list[str] | None, typer.Option(help="Corpora to use instead of the config's data.val.")
    ] = None,
    depth: Annotated[
        str | None, typer.Option(metavar="1,2,4", help="Numbers of loops; one row for each.")
    ] = None,
    draw: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Also draw the loss by position (a .png or .svg); for a task a folder, with the "
            "scores of classes, the confusion matrix, mistakes and steps.",
        ),
    ] = None,
    streaming: Annotated[
        bool,
        typer.Option(
            help="Read documents to their end, the temporal memory carried along; --samples are "
            "then documents, and exits are not scored."
        ),
    ] = False,
    image_size: Annotated[
        int | None,
        typer.Option(
            max=MAX_SIDE,
            min=1,
            help="Height and width of the pictures (default: those of training); learned positions "
            "are interpolated.",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME",
            help="Score on these tasks of lm-evaluation-harness instead, into RUN/scores.jsonl and "
            "RUN/plots/scores.png.",
        ),
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option(max=MAX_PARTS, min=0, help="Examples in front of each question (default: 0)."),
    ] = None,
    tasks_from: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of NAME.jsonl (or .xz, .gz, .zst) of each task (default: eval below "
            "MEGARECUR_DATA, else the harness fetches its data).",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(max=MAX_COUNT, min=1, help="Documents of each task (default: all)."),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            metavar="512,1024", help="Perplexity at these lengths of the samples, and by position."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    launch: Annotated[
        Literal["slurm"] | None, typer.Option(help="Submit the evaluation as a Slurm job.")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="The job's profile.")
    ] = None,
    gpus: Annotated[int, typer.Option(max=MAX_LOCAL, min=0, help="GPUs of the job.")] = 0,
) -> None:
    """Score a run on its validation corpora: loss, perplexity, bits per byte, early exits; for a
    task its accuracy, also by class, and its calibration. With --tasks, score it on tasks of
    lm-evaluation-harness."""
    corpora = {"--data": bool(data), "--samples": samples > 0}
    others = {"--draw": draw is not None, "--streaming": streaming,
              "--image-size": image_size is not None}  # fmt: skip
    of_tasks = {"--shots": shots is not None, "--tasks-from": tasks_from is not None,
                "--limit": limit is not None}  # fmt: skip
    refuse_beside("--tasks", tasks, {**corpora, **others, "--lengths": lengths is not None})
    refuse_beside("--lengths", lengths, others)
    if tasks is None and (lonely := [name for name, given in of_tasks.items() if given]):
        raise ConfigError(f"{', '.join(lonely)}: only for tasks; add --tasks, or omit them")
    if draw is not None and draw.suffix:  # Without one it names a folder.
        check_picture(draw)
    if launch is None and (cluster is not None or gpus):
        raise ConfigError("--cluster, --gpus: only for jobs; add --launch slurm, or omit them")
    if launch is not None:
        from megarecur.launch.evaluation import submit_evaluation

        options = {"step": step, "samples": samples or None, "depth": depth, "draw": draw,
                   "device": device, "image-size": image_size, "tasks": tasks, "shots": shots,
                   "tasks-from": tasks_from and tasks_from.absolute(), "limit": limit,
                   "lengths": lengths}  # fmt: skip
        words = [f"--{name}={value}" for name, value in options.items() if value is not None]
        words += [f"--data={path}" for path in data or ()] + ["--streaming"] * streaming
        job = submit_evaluation(run, words, cluster=cluster, gpus=gpus)
        say(f"submitted job {job.job_id}; its output: {job.paths.stdout}")
        return
    if tasks is not None:
        evaluate_tasks(run, tasks, shots or 0, depth, tasks_from, limit, step, device)
        return
    if lengths is not None:
        evaluate_lengths(run, lengths, step, data or (), samples, depth, device)
        return
    from megarecur.launch.classes import Scored, write_scores
    from megarecur.launch.score import score_run

    curves: dict[str, tuple[float, ...]] | None = {} if draw is not None else None
    scored: list[Scored] = []
    for line in score_run(
        run, step, data or (), samples, depth, streaming, curves, device, image_size, draw, scored
    ):
        say(line)
    if draw is not None and scored:
        say("\n".join(map(str, write_scores(draw, scored))))
    elif draw is not None and curves is not None:
        from megarecur.plot.layer_map import save
        from megarecur.plot.run import draw_positions

        save(draw_positions(curves), draw)
        say(f"loss by position drawn to {draw}")


def evaluate_tasks(
    run: Path,
    tasks: str,
    shots: int,
    depth: str | None,
    folder: Path | None,
    limit: int | None,
    step: int | None,
    device: str,
) -> None:
    """Score a run on tasks; print and draw the scores."""
    from megarecur.launch.tasks import draw_picture, draw_table, score_run_on_tasks
    from megarecur.launch.terminal import note_progress, show

    rows = score_run_on_tasks(
        run, tasks, shots=shots, depth=depth, folder=folder, limit=limit, step=step,
        device=device, note=note_progress("scoring"),
    )  # fmt: skip
    show(lambda width: draw_table(rows))
    say(draw_picture(run, rows))


def evaluate_lengths(
    run: Path,
    lengths: str,
    step: int | None,
    data: Sequence[str],
    samples: int,
    depth: str | None,
    device: str,
) -> None:
    """Score a run at other lengths of the samples; print and draw the scores."""
    from megarecur.launch.lengths import draw_pictures, draw_tables, score_lengths
    from megarecur.launch.terminal import note_progress, show

    found = score_lengths(
        run, lengths, step=step, data=data, samples=samples, depth=depth, device=device,
        note=note_progress("scoring"),
    )  # fmt: skip
    by_length, by_position = draw_tables(found)
    show(lambda width: by_length)
    say()
    show(lambda width: by_position)
    for path in draw_pictures(run, found):
        say(path)


@app.command()
def generate(
    run: RunPath,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="Text to continue.")],
    max_new_tokens: Annotated[
        int, typer.Option(max=MAX_TOKENS, help="Maximum number of new tokens.")
    ] = 200,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature; 0 takes the likeliest token.")
    ] = 0.8,
    top_k: Annotated[
        int | None, typer.Option(max=MAX_COUNT, help="Choose among the k likeliest tokens.")
    ] = None,
    top_p: Annotated[
        float, typer.Option(help="Choose among the likeliest tokens that reach this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=MAX_INTEGER, help="Seed of all samples.")] = 1,
    samples: Annotated[
        int, typer.Option(max=MAX_TOKENS, min=1, help="Continuations to write.")
    ] = 1,
    depth: Annotated[
        int | None, typer.Option(help="Loops to run instead of the trained number.")
    ] = None,
    exit: Annotated[
        str | None,
        typer.Option(metavar="RULE", help="Exit early by: confidence, kl or entropy."),
    ] = None,
    exit_threshold: Annotated[
        float | None,
        typer.Option(help="A probability (default: 0.9), or nats for kl and entropy."),
    ] = None,
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Keep keys and values, or recompute them.")
    ] = True,
    step: Annotated[
        int | None, typer.Option(max=MAX_STEP, help="Checkpoint to use (default: the newest).")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Continue a text."""
    from megarecur.checkpoint.load import load_model, open_tokenizer, special_ids
    from megarecur.inference.early import make_rule
    from megarecur.inference.generate import encode_prompt, stream_text
    from megarecur.inference.generate import generate as generate_ids
    from megarecur.parallel.mesh import pick_device

    refuse_undecodable("the prompt", text)
    model, loaded = load_model(run, step, pick_device(device))
    tokenizer = open_tokenizer(loaded)
    bos_id, eos_ids = special_ids(loaded, tokenizer)
    prompt = encode_prompt(tokenizer, text, bos_id)
    rule = make_rule(exit, exit_threshold)
    for sample in range(samples):
        ids = generate_ids(
            model,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            sample=sample,
            eos_ids=eos_ids,
            missing_ids=tokenizer.missing_ids(loaded.config.model.vocab_size or 0),
            num_loops=depth,
            use_cache=cache,
            exit_rule=rule,
        )
        if samples > 1:
            say(f"--- sample {sample + 1} of {samples}")
        say(text, end="", flush=True)
        for piece in stream_text(tokenizer, prompt, ids):
            say(piece, end="", flush=True)
        say()
    if rule is not None and rule.loops:
        mean = sum(rule.loops) / len(rule.loops)
        say(f"{mean:.2f} loops a token, over {len(rule.loops)} tokens", file=sys.stderr)


@app.command()
def serve(
    run: RunPath,
    host: Annotated[
        str, typer.Option(help="Address to listen at; any but the default is open to others.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen at; 0 takes a free one.")
    ] = 8000,
    step: Annotated[
        int | None, typer.Option(max=MAX_STEP, help="Checkpoint to use (default: the newest).")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    pages: Annotated[
        int | None,
        typer.Option(
            max=MAX_COUNT // 16,
            min=1,
            help="Pages of 16 tokens for keys and values (default: 16 texts of data.seq_length).",
        ),
    ] = None,
    max_texts: Annotated[
        int, typer.Option(max=MAX_TOKENS, min=1, help="Max texts that run at a time.")
    ] = 64,
    max_queue: Annotated[
        int, typer.Option(max=MAX_TOKENS, min=0, help="Max texts that wait besides.")
    ] = 256,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=MAX_TOKENS, help="Max new tokens of a text.")
    ] = 4096,
    max_body: Annotated[
        int, typer.Option(max=MAX_COUNT, min=1, help="Max bytes of a request's body.")
    ] = 1 << 20,
    max_depth: Annotated[
        int | None, typer.Option(help="Max loops of a request (default: the most of training).")
    ] = None,
    cuda_graphs: Annotated[
        bool, typer.Option(help="On a GPU, capture decode passes as CUDA graphs.")
    ] = True,
) -> None:
    """Serve a run over HTTP, by OpenAI's completions API."""
    from megarecur.serving.service import Limits
    from megarecur.serving.start import ServeOptions
    from megarecur.serving.start import serve as serve_run

    options = ServeOptions(
        host, port, step, device, pages, max_texts, max_depth,
        Limits(max_queue, max_body, max_new_tokens), cuda_graphs,
    )  # fmt: skip
    if code := serve_run(run, options, lambda line: say(line, flush=True)):
        raise typer.Exit(code)


@app.command()
def translate(
    run: RunPath,
    source: Annotated[
        Path, typer.Option(metavar="FILE", help="Sentences, one a line; - is standard input.")
    ],
    reference: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Translations by people, for BLEU and chrF."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Output, with its scores in FILE.json (default: standard output).",
        ),
    ] = None,
    beam: Annotated[int, typer.Option(help="Live hypotheses of a sentence; 1 is greedy.")] = 4,
    length_penalty: Annotated[float, typer.Option(help="Exponent of the length penalty.")] = 0.6,
    penalty: Annotated[
        Literal["wu", "fairseq"],
        typer.Option(help="wu: ((5 + n) / 6)^a. fairseq: n^a, as Hugging Face has it."),
    ] = "wu",
    nbest: Annotated[
        int,
        typer.Option(help="Translations of each sentence, as lines of number, score and text."),
    ] = 1,
    sample: Annotated[
        bool, typer.Option("--sample", help="Draw translations instead of searching.")
    ] = False,
    temperature: Annotated[float, typer.Option(help="Sampling temperature.")] = 1.0,
    top_k: Annotated[
        int | None, typer.Option(max=MAX_COUNT, help="Choose among the k likeliest tokens.")
    ] = None,
    top_p: Annotated[
        float, typer.Option(help="Choose among the likeliest tokens that reach this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=MAX_INTEGER, help="Seed of all samples.")] = 1,
    prefix: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Beginnings of the translations, one a line."),
    ] = None,
    depth: Annotated[
        int | None, typer.Option(help="Loops of the decoder instead of the trained number.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Most sentences of a batch.")] = 64,
    batch_tokens: Annotated[
        int | None,
        typer.Option(help="Most source tokens of a batch times the beam (default: no limit)."),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Most tokens of a translation (default: those of its source and 50)."),
    ] = None,
    truncate: Annotated[
        bool,
        typer.Option("--truncate", help="Cut sources to the positions or data.seq_length."),
    ] = False,
    draw: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw a line's cross-attention: .png or .svg."),
    ] = None,
    draw_line: Annotated[int, typer.Option(max=MAX_COUNT, help="Number of the line to draw.")] = 1,
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Keep keys and values, or recompute them.")
    ] = True,
    step: Annotated[
        int | None, typer.Option(max=MAX_STEP, help="Checkpoint to use (default: the newest).")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Translate a file by an encoder-decoder; with --reference, score it."""
    check_picture(draw)
    drawn = {"--temperature": temperature != 1.0, "--top-k": top_k is not None,
             "--top-p": top_p != 1.0, "--seed": seed != 1}  # fmt: skip
    if not sample and (lonely := [name for name, given in drawn.items() if given]):
        raise ConfigError(f"{', '.join(lonely)}: only for samples; add --sample, or omit them")
    from megarecur.data_prep.progress import ProgressReport
    from megarecur.inference.beam import LengthPenalty
    from megarecur.inference.translate import Sampling, TranslateOptions
    from megarecur.launch import translate as translation

    options = TranslateOptions(
        beam=beam,
        penalty=LengthPenalty(penalty, length_penalty),
        nbest=nbest,
        sampling=Sampling(temperature, top_k, top_p, seed) if sample else None,
        batch=batch,
        batch_tokens=batch_tokens,
        max_tokens=max_tokens,
        num_loops=depth,
        truncate=truncate,
        use_cache=cache,
    )
    progress = ProgressReport()
    done = translation.translate_files(
        run, translation.Files(source, reference, prefix, out), options, step, device,
        lambda total: progress.phase("translating", total, unit="sentences"), progress.advance,
        draw_line if draw is not None else None,
    )  # fmt: skip
    for line in done.lines if out is None else ():
        say(line)
    for line in done.summary:
        say(line, file=sys.stdout if out is not None else sys.stderr)
    if draw is not None:
        translation.draw_line(done, options, draw_line, draw)
        say(f"cross-attention drawn to {draw}", file=sys.stderr)


@app.command()
def convert(
    hf_dir: Annotated[
        Path, typer.Argument(metavar="HF_DIR", help="Folder of a Hugging Face model.")
    ],
    to: Annotated[Path, typer.Option(metavar="RUN", help="Run folder to make.")],
    allow_pickles: Annotated[
        bool, typer.Option("--allow-pickles", help="Read pytorch_model.bin too.")
    ] = False,
    scheme: Annotated[
        str | None,
        typer.Option(
            help="Fold its layers into shared blocks: relaxed (cycle with adapters), cycle, "
            "sequence, middle_cycle, middle_sequence, reuse_map or loop."
        ),
    ] = None,
    loops: Annotated[
        int | None,
        typer.Option(max=MAX_RANKS, help="Uses of each shared block; with loop, of the core."),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(
            max=MAX_RANKS,
            metavar="K",
            help="Make a plain model of K of its layers, without sharing.",
        ),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(help="Initialisation of blocks: stepwise, average, lower, upper or random."),
    ] = None,
    lora_rank: Annotated[
        int | None,
        typer.Option(
            max=MAX_SIDE, help="Rank of the adapters of each loop (default: no adapters)."
        ),
    ] = None,
    lora_init: Annotated[str | None, typer.Option(help="svd (of the residual) or zero.")] = None,
    norms: Annotated[
        str | None,
        typer.Option(help="fold (gains into the linears), share, or own (of every loop)."),
    ] = None,
    reuse_map: Annotated[
        str | None, typer.Option(metavar="4,2,1,1", help="Uses of each block, with reuse_map.")
    ] = None,
    prelude: Annotated[
        str | None, typer.Option(metavar="0-1", help="Layers before the loop.")
    ] = None,
    core: Annotated[str | None, typer.Option(metavar="2-5", help="Layers that loop.")] = None,
    coda: Annotated[str | None, typer.Option(metavar="6-7", help="Layers after the loop.")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Reject loops that do not divide the layers.")
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=MAX_INTEGER, help="Seed of random choices and Gaussian values."),
    ] = None,
) -> None:
    """Make a run folder from a Hugging Face model; with --scheme, fold it into shared blocks."""
    asked = {
        "loops": loops, "layers": layers, "init": init, "lora_rank": lora_rank,
        "lora_init": lora_init, "norms": norms, "reuse_map": reuse_map, "prelude": prelude,
        "core": core, "coda": coda, "strict": strict or None, "seed": seed,
    }  # fmt: skip
    given = {name: value for name, value in asked.items() if value is not None}
    if scheme is not None or layers is not None:
        fold(hf_dir, to, scheme or "cycle", given, allow_pickles)
        return
    if given:
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ConfigError(f"{names}: fold a model, which also needs --scheme (or --layers)")
    from megarecur.convert.hf import convert_hf

    say(convert_hf(hf_dir, to, allow_pickles=allow_pickles))


def fold(hf_dir: Path, to: Path, scheme: str, given: dict[str, Any], allow_pickles: bool) -> None:
    """Fold a model with a progress report; print the report and draw its layers."""
    from megarecur.convert.folding import FoldOptions, parse_uses
    from megarecur.convert.recursive import fold_hf
    from megarecur.data_prep.progress import ProgressReport
    from megarecur.plot.fold import plot_fold

    if "reuse_map" in given:
        given["reuse_map"] = parse_uses(given["reuse_map"])
    options = FoldOptions(scheme, **given)
    progress = ProgressReport()
    made = fold_hf(
        hf_dir, to, options, allow_pickles=allow_pickles,
        progress=lambda total: progress.phase("folding", total), advance=progress.advance,
    )  # fmt: skip
    say((to / "fold.txt").read_text(encoding="utf-8"))
    for path in plot_fold(to):
        say(path)
    say(made)


@app.command()
def merge(
    run: RunPath,
    out: Annotated[Path, typer.Option(metavar="RUN2", help="Run folder to make.")],
    last: Annotated[
        int | None,
        typer.Option(max=MAX_STEP, metavar="N", help="Average the newest N checkpoints."),
    ] = None,
    steps: Annotated[
        str | None, typer.Option(metavar="100,200", help="Average the checkpoints of these steps.")
    ] = None,
) -> None:
    """Average checkpoints of a run into a new run, in fp64."""
    from megarecur.convert.merge import merge_checkpoints
    from megarecur.data_prep.progress import ProgressReport

    progress = ProgressReport()
    say(
        merge_checkpoints(
            run, out, last=last, steps=None if steps is None else parse_steps(steps),
            progress=lambda total: progress.phase("averaging", total), advance=progress.advance,
        )
    )  # fmt: skip


@app.command()
def export(
    run: RunPath,
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make.")],
    to: Annotated[str, typer.Option(metavar="FORMAT", help="hf: a Hugging Face folder.")],
    unrolled: Annotated[
        bool | None,
        typer.Option(
            "--unrolled/--compact",
            show_default=False,
            help="--compact: shared blocks once, with a modelling file that transformers loads by "
            "trust_remote_code=True; the default if blocks are shared. --unrolled: blocks as "
            "often as they run, adapters added in, as an architecture of transformers' own.",
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16 (default: as trained).")
    ] = None,
    step: Annotated[
        int | None, typer.Option(max=MAX_STEP, help="Checkpoint to export (default: the newest).")
    ] = None,
) -> None:
    """Write a run's model in another format."""
    from megarecur.convert.hf import export_hf

    if to != "hf":
        raise ConfigError(f"--to {to}: the format must be hf")
    say(export_hf(run, out, unrolled=unrolled, step=step, dtype=dtype))


# --------------------------------------------------------------------------------------- shared


def parse_steps(text: str) -> list[int]:
    """Return the steps in a list such as 100,200."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ConfigError(f"--steps {text}: must be numbers such as 100,200; correct it")
    return [int(part) for part in parts]


def refuse_beside(option: str, value: str | None, others: dict[str, bool]) -> None:
    """Reject options that have no meaning beside another one."""
    wrong = [name for name, given in others.items() if given]
    if value is not None and wrong:
        raise ConfigError(f"{', '.join(wrong)}: not with {option}; omit one or the other")


def check_picture(path: Path | None, option: str = "--draw") -> None:
    """Reject names of pictures without a known format, before any work is done."""
    if path is not None and path.suffix not in (".png", ".svg"):
        raise ConfigError(f"{option} {path}: the name must end in .png or .svg")


if __name__ == "__main__":
    main()
