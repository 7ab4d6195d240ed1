"""Compare a mesh with one eager process, `megarecur verify`: both run in separate processes."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from megarecur.config.load import to_yaml
from megarecur.config.mesh import check_world
from megarecur.config.parallel import ParallelConfig
from megarecur.config.run import Config
from megarecur.launch.local import launch_local
from megarecur.launch.output import say
from megarecur.train.verify import Row, certified, compare

EQUAL, DIFFERENT = 0, 1


def verify_config(config: Config, nproc: int, steps: int, small: bool) -> int:
    """Print the comparison. Returns the exit code: not 0 if anything differs.

    Raises:
        MeshError: the world does not fit the config.
    """
    check_world(config, nproc)
    config = certified(config, small, nproc // config.parallel.replica)
    with tempfile.TemporaryDirectory(prefix="megarecur-verify-") as name:
        folder = Path(name)
        eager = config.train.model_copy(update={"compile": False})
        alone = config.model_copy(update={"parallel": ParallelConfig(), "train": eager})
        for side, processes, own in (("alone", 1, alone), ("mesh", nproc, config)):
            path = folder / f"{side}.yaml"
            path.write_text(to_yaml(own), "utf-8")
            say(f"{side}: {steps} steps with {processes} process(es)", flush=True)
            command = ["record", str(path), str(folder / side), str(steps)]
            code = (
                subprocess.run([sys.executable, "-m", "megarecur.launch.cli", *command]).returncode
                if processes == 1
                else launch_local(own, command, processes)
            )
            if code:
                return code
        rows = compare(config, steps, folder / "alone", folder / "mesh")
    print_rows(rows, config)
    return EQUAL if all(row.equal for row in rows) else DIFFERENT


def print_rows(rows: list[Row], config: Config) -> None:
    """Print the table and the verdict."""
    mesh = config.parallel
    width = max(len(name) for name in rows[0].gradient_errors)
    say(f"{'raw gradient':{width}}  error at each step")
    for name in rows[0].gradient_errors:
        errors = [row.gradient_errors[name] for row in rows]
        wrong = any(not e <= row.tolerance for e, row in zip(errors, rows, strict=True))
        numbers = "  ".join(f"{error:.1e}" for error in errors)
        say(f"{name:{width}}  {numbers}{'  DIFFERS' if wrong else ''}")
    say("step  loss alone    loss on mesh  error    norm     worst gradient  (at most)")
    for row in rows:
        mark = "" if row.equal else "  DIFFERS"
        say(
            f"{row.step:4}  {row.losses[0]:.9f}  {row.losses[1]:.9f}   {row.loss_error:.1e}  "
            f"{row.norm_error:.1e}  {row.gradient_error:.1e}  ({row.tolerance:.0e})  "
            f"{row.gradient}{mark}"
        )
    layout = f"tensor={mesh.tensor} pipeline={mesh.pipeline} zero_stage={mesh.zero_stage}"
    equal = all(row.equal for row in rows)
    say(f"{layout}: {'equal to one process' if equal else 'NOT equal to one process'} "
          f"({config.train.precision}{', compiled' if config.train.compile else ''})")  # fmt: skip
