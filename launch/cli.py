"""The command `megarecur`: one small function per command, heavy imports inside it.

    megarecur check configs/quickstart.yaml train.steps=1000
    megarecur plot runs/quickstart

Exit codes: 0 done, 2 user error, 3 saved and stopped by a signal (resume me), 1 anything else.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megarecur.errors import ConfigError, MegarecurError

if TYPE_CHECKING:
    from megarecur.config.schema import Config

app = typer.Typer(
    help="Pretraining of recurrent-depth and parameter-shared Transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

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
    try:
        app()
    except MegarecurError as error:
        print(f"error: {error}", file=sys.stderr)
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

    if draw is not None and draw.suffix not in (".png", ".svg"):
        raise ConfigError(f"--draw {draw}: the name must end in .png or .svg")
    resolved = with_vocab_size(load_config(config, overrides or ()))
    print_description(resolved)
    if draw is not None:
        from megarecur.plot.layer_map import draw_config, save

        save(draw_config(resolved), draw)
        print(f"\nlayer map drawn to {draw}")


# ------------------------------------------------------------------------------------- training


@app.command()
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train a run, or go on with it: the same command resumes from the newest checkpoint."""
    from megarecur.config.load import load_config

    resolved = load_config(config, overrides or ())
    from megarecur.train.trainer import train as train_run

    raise typer.Exit(train_run(resolved))


@app.command("launch")
def launch_processes(
    config: ConfigPath,
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option(min=1, help="Processes on this machine.")] = 1,
) -> None:
    """Train with several processes, one replica each."""
    from megarecur.config.load import load_config

    resolved = load_config(config, overrides or ())
    from launch.local import launch_local

    raise typer.Exit(launch_local(resolved, str(config), overrides or [], nproc))


# ------------------------------------------------------------------------------- after training


@app.command()
def plot(
    run: RunPath,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to write; RUN/plots if left out.")
    ] = None,
) -> None:
    """Draw a run's curves and its layer map as PNG and SVG."""
    from megarecur.plot.run import plot_run

    for path in plot_run(run, out):
        print(path)


# --------------------------------------------------------------------------------------- shared


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
