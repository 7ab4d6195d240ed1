"""Check the inputs of a run before its job waits in a queue: tokenizer, corpora, other runs.

Only inputs visible from this machine are checked; the others are listed for the user.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from megarecur.config.locate import NOT_A_FILE
from megarecur.config.run import Config
from megarecur.data.corpus import check_tokenizer, read_manifest
from megarecur.data.fit import find_misfits
from megarecur.data.foreign import is_foreign, missing_files
from megarecur.data.tokenizer import load_tokenizer
from megarecur.errors import ConfigError, DataError, MegarecurError
from megarecur.launch.folder import newest_checkpoint
from megarecur.launch.output import say
from megarecur.launch.profile import ClusterProfile
from megarecur.plan.cluster import load_cluster
from megarecur.plan.describe import resolve_vocab_size
from megarecur.recurrence.inventory import build_inventory, check_patterns

MOST_FILES = 3
"""Maximum number of missing files of a corpus that are named."""
REMEDY = (
    "name folders that only the nodes see with --node-path DIR, or as node_paths in the cluster's "
    "profile: they are not checked"
)


@dataclass
class Findings:
    """Problems found, and inputs that could not be checked; each line once."""

    problems: dict[str, None] = field(default_factory=dict)
    unchecked: dict[str, None] = field(default_factory=dict)


@dataclass(frozen=True)
class View:
    """The paths of a job that are visible from here, and their location."""

    profile: ClusterProfile
    node_paths: tuple[Path, ...] = ()
    early: bool = False
    """True long before the start, when missing inputs may still be created."""

    def find(self, path: str) -> Path | None:
        """Return the local location of a path of the config; None if only the nodes see it."""
        container = self.profile.container
        if container is not None and not os.path.isabs(path):
            if container.workdir is None:
                return None
            path = os.path.join(container.workdir, path)
        absolute = Path(os.path.abspath(path))
        if any(absolute.is_relative_to(folder) for folder in self.node_paths):
            return None
        if self.early and not absolute.exists():
            return None
        if container is None:
            return absolute
        for mount in container.mounts:
            source, _, target = mount.partition(":")
            target = target.partition(":")[0] or source
            if absolute.is_relative_to(target):
                return Path(source) / absolute.relative_to(target)
        return None


def check_early(config: Config) -> list[str]:
    """Check the existing inputs of a run; returns those that were not checked.

    Raises:
        ConfigError: the message lists every visible problem.
    """
    found = Findings()
    look_at(config, View(ClusterProfile(), early=True), found)
    if found.problems:
        lines = "".join(f"\n  {problem}" for problem in found.problems)
        raise ConfigError(f"{len(found.problems)} problem(s) of what the run reads{lines}")
    return list(found.unchecked)


def check_inputs(
    configs: Sequence[Config], profile: ClusterProfile | None = None, node_paths: Sequence[str] = ()
) -> list[str]:
    """Check all inputs of runs, and that they can write; returns those that were not checked.

    Args:
        profile: profile of the cluster; None means this machine.
        node_paths: folders that only the nodes see, besides those of the profile.

    Raises:
        ConfigError: the message lists every visible problem.
    """
    profile = profile or ClusterProfile()
    folders = tuple(Path(os.path.abspath(path)) for path in (*profile.node_paths, *node_paths))
    view, found = View(profile, folders), Findings()
    for config in configs:
        look_at(config, view, found)
    if found.problems:
        count = len(found.problems)
        lines = "".join(f"\n  {problem}" for problem in found.problems)
        hint = f"\n{REMEDY}" if profile_matters(found.problems) else ""
        raise ConfigError(
            f"{count} problem{'s' if count > 1 else ''} before the start{lines}{hint}"
        )
    return list(found.unchecked)


def profile_matters(problems: Sequence[str] | dict[str, None]) -> bool:
    """Return True if any problem is a path that may exist elsewhere."""
    return any(word in problem for problem in problems for word in ("not exist", "no corpus",
               "missing", "not a run folder", "cannot be read"))  # fmt: skip


def print_unchecked(lines: Sequence[str]) -> None:
    """Print the inputs that could not be checked."""
    for line in lines:
        say(f"not checked: {line}", file=sys.stderr)


def look_at(config: Config, view: View, found: Findings) -> None:
    """Check one run."""
    try:
        for where, check in checks_of(config, view, found):
            try:
                check()
            except MegarecurError as error:
                found.problems[f"{where}{error}"] = None
            except OSError as error:
                found.problems[f"{where}{error.filename}: {error.strerror}"] = None
    except OSError as error:  # The path is too long for any file.
        found.problems[f"{error.filename}: {error.strerror}; choose another path"] = None


def checks_of(
    config: Config, view: View, found: Findings
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield every check of a run, with the prefix of its messages."""
    data, run_dir = config.data, Path(config.run_dir)
    yield "", partial(check_folders if view.early else check_writable, run_dir)

    def visible(key: str, path: str) -> Path | None:
        place = view.find(path)
        if place is None:
            reason = "not here yet" if view.early else "only the nodes see it"
            found.unchecked[f"{key}={path}: {reason}"] = None
        return place

    fingerprint = None
    tokenizer = (
        Path(data.tokenizer)
        if data.tokenizer in NOT_A_FILE
        else visible("data.tokenizer", data.tokenizer)
    )
    if tokenizer is not None:
        try:
            fingerprint = check_model(config, tokenizer)
        except MegarecurError as error:
            found.problems[f"data.tokenizer: {error}"] = None
    for name, sources in (("train", data.train), ("val", data.val)):
        for i, source in enumerate(sources):
            key = f"data.{name}.{i}"
            if source.remote is not None:
                found.unchecked[f"{key}.remote={source.remote}: shards are fetched by the job"] = (
                    None
                )
            elif (place := visible(f"{key}.path", source.path)) is not None:
                yield (
                    f"{key}.path: ",
                    partial(check_corpus, place, config, fingerprint, name == "train"),
                )
    distill = config.distill
    sources_of = {"distill.teacher": distill.teacher if distill else None}
    if newest_checkpoint(run_dir) is None:  # otherwise the run resumes from that
        sources_of["init_from"] = config.init_from
    for key, named in sources_of.items():
        run, step = split_source(named or "")
        if named and (place := visible(key, run)) is not None:
            yield f"{key}={named}: ", partial(check_source, place, step)
            if view.early:
                yield "", partial(check_checkpoint, key, place, step, config)
    stored = distill.stored if distill else None
    if stored and (place := visible("distill.stored", stored)) is not None:
        yield "distill.stored: ", partial(check_folder, place)
    if config.checkpoint.mirror is not None:
        found.unchecked[f"checkpoint.mirror={config.checkpoint.mirror}: not connected to"] = None
    if config.parallel.pipeline > 1:
        yield "parallel.cluster: ", partial(load_cluster, config.parallel.cluster)


def check_model(config: Config, tokenizer: Path) -> str:
    """Load the tokenizer and count the model's parameters; returns the tokenizer's fingerprint.

    Raises:
        MegarecurError: the tokenizer is missing or does not fit the model, or patterns match
        nothing.
    """
    own = Path(config.run_dir) / tokenizer.name  # the copy in a run folder that was moved
    loaded = load_tokenizer(own if own.is_file() and not tokenizer.exists() else tokenizer)
    for key in ("vocab_size", "source_vocab_size"):
        rows = getattr(config.model, key)
        if rows is not None and rows < loaded.vocab_size:
            raise ConfigError(
                f"model.{key}={rows} is below the {loaded.vocab_size} ids of "
                f"data.tokenizer={config.data.tokenizer}; raise it or omit it"
            )
    resolved = resolve_vocab_size(config, lambda path: loaded.vocab_size)
    check_patterns(resolved.optimizer, build_inventory(resolved))
    return loaded.fingerprint


def check_corpus(path: Path, config: Config, fingerprint: str | None, trained: bool) -> None:
    """Look for the files of a corpus, and compare its tokenizer and content with the config's.

    Raises:
        DataError: files are missing or do not fit.
    """
    missing = missing_files(path)
    if missing:
        more = f" and {len(missing) - MOST_FILES} more" if len(missing) > MOST_FILES else ""
        raise DataError(
            f"{path}: {', '.join(missing[:MOST_FILES])}{more} missing; copy the corpus again, or "
            "prepare it again with `megarecur prep`"
        )
    if is_foreign(path):
        return
    manifest = read_manifest(path)
    if fingerprint is not None:
        check_tokenizer(path, manifest, config.data.tokenizer, fingerprint)
    if misfits := find_misfits(path, manifest, config, trained):
        raise DataError("\n  ".join(misfits))


def split_source(source: str) -> tuple[str, int | None]:
    """Split RUN or RUN@STEP; a folder may have an @ in its name."""
    run, at, step = source.rpartition("@")
    if (Path(source) / "config.yaml").is_file() or not at or not step.isdigit():
        return source, None
    return run, int(step)


def check_source(run: Path, step: int | None) -> None:
    """Look for a checkpoint of another run.

    Raises:
        ConfigError: the run folder or checkpoint does not exist.
    """
    if not (run / "config.yaml").is_file():
        raise ConfigError(
            f"{run} is not a run folder (it has no config.yaml); name the run_dir of a "
            "training run, or of `megarecur convert`"
        )
    if step is None and newest_checkpoint(run) is None:
        raise ConfigError(f"{run} has no checkpoint; train it first, or name another run")
    if step is not None and not (run / "checkpoints" / f"step-{step:08d}").is_dir():
        kept = sorted(int(p.name[5:]) for p in run.glob("checkpoints/step-????????"))
        shown = ", ".join(map(str, kept)) or "none"
        raise ConfigError(f"{run} has no checkpoint of step {step}; kept: {shown}")


def check_checkpoint(key: str, run: Path, step: int | None, config: Config) -> None:
    """Compare the parameters to start from, or the vocabulary of a teacher, with a config's.

    Raises:
        MegarecurError: parameters or vocabulary do not fit.
    """
    from megarecur.checkpoint.index import DamagedCheckpoint, read_index
    from megarecur.checkpoint.initial import check_fit
    from megarecur.train.distill import check_vocabulary, teacher_config

    newest = newest_checkpoint(run)
    step = step if newest is None or step is not None else newest.step
    path = run / "checkpoints" / f"step-{step or 0:08d}"
    try:
        index = read_index(path)
    except DamagedCheckpoint:
        return  # An older one may be good; the start reports that.
    if key == "init_from":
        check_fit(path, index, config)
        return
    check_vocabulary(config, index)
    if teacher_config(config, index).classifies:
        raise ConfigError(
            f"{key}={run} is a classifier and predicts no next token; name a run of text"
        )


def check_folder(path: Path) -> None:
    """Reject a folder that does not exist.

    Raises:
        ConfigError: the message names it.
    """
    if not path.is_dir():
        raise ConfigError(f"{path} does not exist; name the folder of `megarecur prep teacher`")


def check_folders(run_dir: Path) -> Path:
    """Reject a run folder whose path contains a file; returns the existing part of its path.

    Raises:
        ConfigError: the message names it.
    """
    there = next(
        path for path in (run_dir.absolute(), *run_dir.absolute().parents) if path.exists()
    )
    if not there.is_dir():
        raise ConfigError(f"run_dir={run_dir}: {there} is a file; choose another run_dir")
    return there


def check_writable(run_dir: Path) -> None:
    """Reject a run folder that cannot be created or written.

    Raises:
        ConfigError: the message names it.
    """
    there = check_folders(run_dir)
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(
            f"run_dir={run_dir}: {there} cannot be written; mount it for writing, or choose "
            "another run_dir"
        )
