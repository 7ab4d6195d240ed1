"""The command `megarecur`: one small function per command, heavy imports inside it.

    megarecur check configs/quickstart.yaml train.steps=1000
    megarecur plot runs/quickstart

Exit codes: 0 done, 2 user error, 3 saved and stopped by a signal (resume me), 1 anything else.
"""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launch import prep
from megarecur.errors import ConfigError, MegarecurError

if TYPE_CHECKING:
    from megarecur.config.schema import Config

# A path or disk that the user can mend, met where no better message was made.
USERS_ERRNOS = {
    errno.EACCES, errno.EDQUOT, errno.EISDIR, errno.ENOENT, errno.ENOSPC, errno.ENOTDIR, errno.EROFS
}  # fmt: skip

app = typer.Typer(
    help="Pretraining of recurrent-depth and parameter-shared Transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(prep.app, name="prep")

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY.SUB=VALUE", help="Values to replace, in YAML."),
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]


def main() -> None:
    """Run the command line; a user's mistake is one message on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # A terminal without UTF-8 shows marks it lacks as `?`.
            stream.reconfigure(errors="replace")
    # An option with or without a value is more than the library offers.
    if sys.argv[1:2] == ["launch"]:
        sys.argv = ["--dry-run=print" if word == "--dry-run" else word for word in sys.argv]
    try:
        app()
    except MegarecurError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in USERS_ERRNOS or error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)


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
    from megarecur.config.load import load_config
    from megarecur.plan.describe import print_description
    from megarecur.recurrence.inventory import build_inventory, check_patterns

    check_picture(draw)
    resolved = with_vocab_size(load_config(config, overrides or ()))
    check_patterns(resolved.optimizer, build_inventory(resolved))
    print_description(resolved)
    if draw is not None:
        from megarecur.plot.layer_map import draw_config, save

        save(draw_config(resolved), draw)
        print(f"\nlayer map drawn to {draw}")


@app.command()
def plan(
    config: ConfigPath,
    world_size: Annotated[int, typer.Option(min=1, help="Ranks in all.")],
    overrides: Overrides = None,
    tensor: Annotated[
        int | None, typer.Option(min=1, help="Tensor-parallel ranks; searched if left out.")
    ] = None,
    pipeline: Annotated[
        int | None, typer.Option(min=1, help="Pipeline ranks; searched if left out.")
    ] = None,
    zero: Annotated[
        int | None,
        typer.Option(min=0, max=3, help="ZeRO stage; the config's, or what fits, if left out."),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="cpu, a100, h100, h200 or a YAML file."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw the order: .png or .svg.")
    ] = None,
) -> None:
    """Where a run would live on many ranks, and what a step would take: time, memory, bytes."""
    from megarecur.config.load import load_config

    check_picture(out, "--out")
    resolved = with_vocab_size(load_config(config, overrides or ()))
    from launch.plan import plan_config

    found = plan_config(resolved, world_size, tensor, pipeline, zero, cluster)
    if out is not None:
        from megarecur.plot.layer_map import save
        from megarecur.plot.timeline import draw_plan

        save(draw_plan(found), out)
        print(f"\norder drawn to {out}")


# ------------------------------------------------------------------------------------- training


@app.command()
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train a run, or go on with it: the same command resumes from the newest checkpoint."""
    from megarecur.train.signals import ignore_signals, note_signals, write_stacks_on_demand

    stop = note_signals()  # Before torch is imported: that takes seconds.
    write_stacks_on_demand()
    from megarecur.config.load import load_config

    resolved = load_config(config, overrides or ())
    from megarecur.train.trainer import train as train_run

    code = train_run(resolved, stop)
    ignore_signals()
    raise typer.Exit(code)


@app.command("launch")
def launch_processes(
    config: ConfigPath,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Processes on this machine, without Slurm.")
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes of a Slurm job.")] = None,
    gpus_per_node: Annotated[
        int, typer.Option(min=0, help="GPUs of each node, and processes unless these are given.")
    ] = 0,
    processes_per_node: Annotated[
        int | None, typer.Option(min=1, help="Processes of each node, where there are no GPUs.")
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="A profile of configs/cluster, or a YAML file."),
    ] = None,
    time: Annotated[
        str | None, typer.Option(metavar="LIMIT", help="Of the job, instead of the profile's.")
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY.SUB=A,B", help="A run for each value: one array of jobs."),
    ] = None,
    at_once: Annotated[
        int | None, typer.Option(help="Runs of a sweep that may run at the same time.")
    ] = None,
    dry_run: Annotated[
        str | None,
        typer.Option(metavar="[check]", help="Print the script; check: ask Slurm about it too."),
    ] = None,
    join: Annotated[int, typer.Option(hidden=True, help="Nodes that meet at MASTER_ADDR.")] = 1,
) -> None:
    """Train with several processes: on this machine (--nproc), or as a Slurm job (--nodes)."""
    if (nodes is None) == (nproc is None):
        raise ConfigError("launch: give --nproc for this machine, or --nodes for a Slurm job")
    if nproc is not None:
        from megarecur.config.load import load_config

        resolved = load_config(config, overrides or ())
        from launch.local import launch_local

        command = ["train", str(config), *(overrides or [])]
        raise typer.Exit(launch_local(resolved, command, nproc, join))
    if dry_run not in (None, "print", "check"):
        raise ConfigError(f"--dry-run={dry_run}: must be --dry-run or --dry-run=check")
    from launch.job import launch_slurm

    launch_slurm(
        config,
        overrides or (),
        nodes=nodes or 1,
        gpus_per_node=gpus_per_node,
        processes_per_node=processes_per_node,
        cluster=cluster,
        time=time,
        sweep=sweep or (),
        at_once=at_once,
        dry_run=dry_run,
    )


@app.command(hidden=True)
def supervise(run: RunPath) -> None:
    """Start, watch and bring back a run: what the batch script of a job does."""
    from launch.supervise import supervise as supervise_run

    raise typer.Exit(supervise_run(run.absolute()))


@app.command()
def verify(
    config: ConfigPath,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Processes; tensor x pipeline if left out.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps to compare.")] = 3,
    small: Annotated[
        bool, typer.Option("--small", help="Narrow and short; same blocks, heads and mesh.")
    ] = False,
) -> None:
    """Compare a config's mesh with one process: losses, norms and every raw gradient."""
    from megarecur.config.load import load_config

    resolved = with_vocab_size(load_config(config, overrides or ()))
    replica = resolved.parallel.tensor * resolved.parallel.pipeline
    from launch.verify import verify_config

    raise typer.Exit(verify_config(resolved, nproc or replica, steps, small))


@app.command(hidden=True)
def record(config: ConfigPath, folder: Path, steps: int) -> None:
    """Take steps and write what they gave: one side of `verify`."""
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
            help="The folder of a run, or the id of its Slurm job; left out: all in your queue.",
        ),
    ] = None,
) -> None:
    """How a run is doing: state, step, loss, speed, time left, restarts, newest checkpoint."""
    from launch.status import show_status

    show_status(what)


@app.command()
def logs(
    run: RunPath,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with new lines until the run is done.")
    ] = False,
    attempt: Annotated[
        int | None, typer.Option(min=1, help="Start to show; the newest if left out.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=0, help="Rank to show; all of them if left out.")
    ] = None,
) -> None:
    """The output of a Slurm run's ranks, each line with its rank in front."""
    from launch.logs import show_logs

    show_logs(run, follow, attempt, rank)


# ------------------------------------------------------------------------------- after training


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where to write; RUN/plots, or plots for several runs."),
    ] = None,
) -> None:
    """Draw a run's curves and its layer map as PNG and SVG; several runs together."""
    from megarecur.plot.run import plot_run, plot_runs

    several = len(runs) > 1
    for path in plot_runs(runs, out or Path("plots")) if several else plot_run(runs[0], out):
        print(path)


@app.command("eval")
def evaluate_run(
    run: RunPath,
    step: Annotated[
        int | None, typer.Option(help="Checkpoint to use; the newest if left out.")
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="Samples of each corpus; 0: all.")] = 0,
    data: Annotated[
        list[str] | None, typer.Option(help="Corpora to use instead of the config's data.val.")
    ] = None,
    depth: Annotated[
        str | None, typer.Option(metavar="1,2,4", help="Loops to run: one row for each number.")
    ] = None,
    draw: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also draw the loss by position: .png or .svg."),
    ] = None,
    streaming: Annotated[
        bool,
        typer.Option(
            help="Read documents to their end, the temporal memory carried along; --samples are "
            "documents then, and exits are not scored."
        ),
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Score a run on its validation corpora: loss, perplexity, bits per byte, early exits; of a
    task its accuracy."""
    from megarecur.config.schema import Source
    from megarecur.data.corpus import open_corpus
    from megarecur.parallel.mesh import Mesh, pick_device
    from megarecur.train.evaluate import evaluate, stream_corpus
    from megarecur.train.load import load_model, open_tokenizer

    check_picture(draw)
    mesh = Mesh(device=pick_device(device))
    model, loaded = load_model(run, step, mesh.device)
    depths = parse_depths(depth, loaded.config)
    sources = [Source(path=path) for path in data] if data else loaded.config.data.val
    if not sources:
        raise ConfigError(f"{run}: its config has no data.val; name a corpus with --data")
    paths = [source.path for source in sources]
    if loaded.config.task is not None:
        if draw is not None:
            raise ConfigError("--draw: draws the loss by position of text; the run has a task")
        if streaming:
            raise ConfigError("--streaming: reads text to its end; the run has a task")
        score_task_corpora(loaded, model, paths, depths, samples, mesh)
        return
    fingerprint = open_tokenizer(loaded).fingerprint
    corpora = [
        open_corpus(s.path, loaded.tokenizer, fingerprint, remote=s.remote, cache_gb=s.cache_gb)
        for s in sources
    ]
    curves = {}
    for loops in depths:
        if streaming:
            if samples and not loaded.config.data.mask_documents:
                raise ConfigError(
                    f"--samples {samples} with --streaming: the run was trained with "
                    "data.mask_documents=false, all text is one document; leave --samples out"
                )
            run_on = (loaded.config, mesh, samples, loops)
            scores = [stream_corpus(model, corpus, *run_on) for corpus in corpora]
        else:
            scores = evaluate(model, corpora, loaded.config, mesh, samples, loops)
        at = "" if loops is None else f"  depth {loops}:"
        for path, score in zip(paths, scores, strict=True):
            print(
                f"{path}:{at} loss {score.loss:.4f}  perplexity {score.perplexity:.2f}  "
                f"bits per byte {score.bits_per_byte:.4f}  "
                f"({score.tokens} tokens, step {loaded.state['step']})"
            )
            for i, loss in enumerate(score.exits):
                print(f"{path}:{at} exit {i + 1}: loss {loss:.4f}")
            curves[f"{path}{at.rstrip(':')}"] = score.by_position
    if draw is not None:
        from megarecur.plot.layer_map import save
        from megarecur.plot.run import draw_positions

        save(draw_positions(curves), draw)
        print(f"loss by position drawn to {draw}")


def score_task_corpora(
    loaded: Any, model: Any, paths: list[str], depths: list[int | None], samples: int, mesh: Any
) -> None:
    """A line for each corpus of a task, and its accuracy by length."""
    from megarecur.data.corpus import read_manifest
    from megarecur.data.samples import open_scored
    from megarecur.train.load import open_tokenizer
    from megarecur.train.task_scores import score_task

    open_tokenizer(loaded)
    config = loaded.config
    if not config.task.truncate and (config.model.positions != "learned" or config.temporal):
        # Longer samples than those of training are what many tests are for.
        longest = max((read_manifest(path).task or {}).get("longest", 0) for path in paths)
        length = max(config.data.seq_length, longest)
        config = config.model_copy(
            update={"data": config.data.model_copy(update={"seq_length": length})}
        )
    corpora = open_scored(config, paths, loaded.tokenizer)
    for loops in depths:
        at = "" if loops is None else f"  depth {loops}:"
        for path, corpus in zip(paths, corpora, strict=True):
            score = score_task(model, corpus, config, mesh, samples, num_loops=loops)
            assert score is not None
            values = score.values
            by_length = {n: values.pop(n) for n in list(values) if n.startswith("accuracy_by")}
            text = "  ".join(f"{n.replace('_', ' ')} {v:.4f}" for n, v in values.items())
            print(f"{path}:{at} {text}  ({score.scored} predictions, step {loaded.state['step']})")
            for name, value in by_length.items():
                print(f"{path}:{at} {name.partition('/')[2]} tokens: accuracy {value:.4f}")


@app.command()
def generate(
    run: RunPath,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add at most.")] = 200,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Choose among the k likeliest tokens.")] = None,
    top_p: Annotated[
        float, typer.Option(help="Choose among the likeliest that reach this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Decides all samples.")] = 1,
    samples: Annotated[int, typer.Option(min=1, help="Continuations to write.")] = 1,
    depth: Annotated[
        int | None, typer.Option(help="Loops to run instead of those trained with.")
    ] = None,
    exit: Annotated[
        str | None,
        typer.Option(
            metavar="RULE", help="Leave after earlier loops by: confidence, kl or entropy."
        ),
    ] = None,
    exit_threshold: Annotated[
        float | None,
        typer.Option(help="A probability (left out: 0.9), or nats for kl and entropy."),
    ] = None,
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Keep keys and values, or recompute them.")
    ] = True,
    step: Annotated[
        int | None, typer.Option(help="Checkpoint to use; the newest if left out.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Continue a text."""
    from megarecur.inference.early import make_rule
    from megarecur.inference.generate import encode_prompt, stream_text
    from megarecur.inference.generate import generate as generate_ids
    from megarecur.parallel.mesh import pick_device
    from megarecur.train.load import load_model, open_tokenizer, special_ids

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
            num_loops=depth,
            use_cache=cache,
            exit_rule=rule,
        )
        if samples > 1:
            print(f"--- sample {sample + 1} of {samples}")
        print(text, end="", flush=True)
        for piece in stream_text(tokenizer, prompt, ids):
            print(piece, end="", flush=True)
        print()
    if rule is not None and rule.loops:
        mean = sum(rule.loops) / len(rule.loops)
        print(f"{mean:.2f} loops a token, over {len(rule.loops)} tokens", file=sys.stderr)


@app.command()
def convert(
    hf_dir: Annotated[
        Path, typer.Argument(metavar="HF_DIR", help="Folder of a Hugging Face model.")
    ],
    to: Annotated[Path, typer.Option(metavar="RUN", help="Run folder to make.")],
    allow_pickles: Annotated[
        bool, typer.Option("--allow-pickles", help="Take tensors from pytorch_model.bin too.")
    ] = False,
    scheme: Annotated[
        str | None,
        typer.Option(
            help="Fold its layers into shared blocks: relaxed (cycle with adapters), cycle, "
            "sequence, middle_cycle, middle_sequence, reuse_map or loop."
        ),
    ] = None,
    loops: Annotated[
        int | None, typer.Option(help="Uses of each shared block; with loop, of the core.")
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(help="What makes a block: stepwise, average, lower, upper or random."),
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(help="Rank of the adapters of each loop; none if left out.")
    ] = None,
    lora_init: Annotated[
        str | None, typer.Option(help="svd (of what sharing loses) or zero.")
    ] = None,
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
        bool, typer.Option("--strict", help="Refuse to drop layers where loops do not divide them.")
    ] = False,
    seed: Annotated[int | None, typer.Option(help="Of random choices and Gaussian values.")] = None,
) -> None:
    """Make a run folder of a Hugging Face model; with --scheme, folded into shared blocks."""
    asked = {
        "loops": loops, "init": init, "lora_rank": lora_rank, "lora_init": lora_init,
        "norms": norms, "reuse_map": reuse_map, "prelude": prelude, "core": core, "coda": coda,
        "strict": strict or None, "seed": seed,
    }  # fmt: skip
    given = {name: value for name, value in asked.items() if value is not None}
    if scheme is not None:
        fold(hf_dir, to, scheme, given, allow_pickles)
        return
    if given:
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ConfigError(f"{names}: fold a model, which also needs --scheme")
    from megarecur.convert.hf import convert_hf

    print(convert_hf(hf_dir, to, allow_pickles=allow_pickles))


def fold(hf_dir: Path, to: Path, scheme: str, given: dict[str, Any], allow_pickles: bool) -> None:
    """Fold a model, telling how far it is; report, and draw what became of its layers."""
    from data_prep.progress import ProgressReport
    from megarecur.convert.folding import FoldOptions, parse_uses
    from megarecur.convert.recursive import fold_hf
    from megarecur.plot.fold import plot_fold

    if "reuse_map" in given:
        given["reuse_map"] = parse_uses(given["reuse_map"])
    options = FoldOptions(scheme, **given)
    progress = ProgressReport()
    made = fold_hf(
        hf_dir, to, options, allow_pickles=allow_pickles,
        progress=lambda total: progress.phase("folding", total), advance=progress.advance,
    )  # fmt: skip
    print((to / "fold.txt").read_text(encoding="utf-8"))
    for path in plot_fold(to):
        print(path)
    print(made)


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
            "trust_remote_code=True; the default where blocks are shared. --unrolled: blocks as "
            "often as they run, adapters added in, as an architecture of transformers' own.",
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; as trained if left out.")
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="Checkpoint to export; the newest if left out.")
    ] = None,
) -> None:
    """Write a run's model in another format."""
    from megarecur.convert.hf import export_hf

    if to != "hf":
        raise ConfigError(f"--to {to}: the format must be hf")
    print(export_hf(run, out, unrolled=unrolled, step=step, dtype=dtype))


# --------------------------------------------------------------------------------------- shared


def check_picture(path: Path | None, option: str = "--draw") -> None:
    """Refuse names of pictures that say no format, before any work is done."""
    if path is not None and path.suffix not in (".png", ".svg"):
        raise ConfigError(f"{option} {path}: the name must end in .png or .svg")


def parse_depths(text: str | None, config: Config) -> list[int | None]:
    """Numbers of loops from `1,2,4`; [None], the config's own, if left out.

    Raises:
        ConfigError: not numbers, or not depths that the scheme can run.
    """
    from megarecur.recurrence.depth import refuse_depth

    if text is None:
        return [None]
    parts = [part.strip() for part in text.split(",")]
    wrong = [f"depth {part!r}: is not a number" for part in parts if not part.isdigit()]
    depths = [int(part) for part in parts if part.isdigit()]
    wrong += [refusal for n in depths if (refusal := refuse_depth(config, n))]
    if wrong:
        raise ConfigError(f"--depth {text}:" + "".join(f"\n  {line}" for line in wrong))
    return [*depths]


def with_vocab_size(config: Config) -> Config:
    """The config with `model.vocab_size` stated, read from its tokenizer when left out.

    Raises:
        ConfigError: when there is no such tokenizer yet.
    """
    from megarecur.plan.describe import resolve_vocab_size

    return resolve_vocab_size(config, _tokenizer_vocab_size)


def _tokenizer_vocab_size(path: str) -> int:
    from megarecur.data.tokenizer import tokenizer_vocab_size

    if path != "bytes" and not Path(path).exists():
        raise ConfigError(
            f"data.tokenizer: {path} does not exist; prepare it with `megarecur prep`, "
            "or set model.vocab_size"
        )
    return tokenizer_vocab_size(path)


if __name__ == "__main__":
    main()
