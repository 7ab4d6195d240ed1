"""Parity certificate: compare a config's mesh with one process, by losses, norms and gradients.

Both take the same few optimizer steps. `record` writes the results of each step as a checkpoint of
gradients, and `compare` compares two recordings. The error of a gradient is

    |g - g0| / max(|g0|, 1e-3 |G|)         g0: from one process; G: all of its gradients

Gradients are raw, before clipping and the update, since Adam hides their scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megarecur.checkpoint import checkpoint
from megarecur.config.load import validate
from megarecur.config.run import Config
from megarecur.data.open import open_data
from megarecur.model.compile import Backend, CompiledModel
from megarecur.optim.build import build_engine
from megarecur.optim.schedule import learning_rate
from megarecur.parallel.mesh import open_mesh
from megarecur.parallel.shards import whole
from megarecur.plan.schedule import Schedules
from megarecur.recurrence.inventory import build_inventory
from megarecur.train.compiler import choose_compiler
from megarecur.train.distill import load_teacher, with_teacher
from megarecur.train.scales import profile_scales
from megarecur.train.step import build_model, forward_backward, sum_losses

TOLERANCES = {"fp32": (2e-6, 2e-5), "fp64": (1e-11, 1e-11)}
"""Tolerances of the first step and of later steps, by precision."""
LEAST_EPS = 1e-5
"""Lower bound of AdamW's eps: a smaller one turns rounding of tiny gradients into updates."""


@dataclass(frozen=True)
class Row:
    """Comparison of one optimizer step."""

    step: int
    losses: tuple[float, float]
    """Losses of one process and of the mesh."""
    loss_error: float
    """Relative error of the loss."""
    norm_error: float
    gradient_errors: dict[str, float]
    tolerance: float

    @property
    def gradient(self) -> str:
        """Name of the gradient with the largest error."""
        errors = self.gradient_errors
        return max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))

    @property
    def gradient_error(self) -> float:
        """The largest error of a gradient."""
        return self.gradient_errors[self.gradient]

    @property
    def equal(self) -> bool:
        """Whether all errors are within the tolerance."""
        worst = max(self.loss_error, self.norm_error, self.gradient_error)
        return worst <= self.tolerance  # False for NaN


def certified(config: Config, small: bool, dp: int) -> Config:
    """Return the config to compare: in fp32 (or fp64), compiled if `train.compile` is true.

    Args:
        small: reduce widths and lengths; blocks, heads and mesh stay the same.

    Raises:
        ConfigError: such a config is invalid.
    """
    values = config.model_dump(mode="json")
    precision = "fp64" if config.train.precision == "fp64" else "fp32"
    compiled = config.train.compile is True
    values["train"] |= {"precision": precision, "compile": compiled, "profile": None}
    values["optimizer"]["eps"] = max(config.optimizer.eps, LEAST_EPS)
    if small:
        hidden = config.model.num_heads * 8
        values["model"] |= {"hidden_size": hidden, "head_dim": 8, "ffn_hidden_size": 2 * hidden}
        if config.model.gate:
            values["model"]["gate_hidden_size"] = 2 * hidden
        if config.adapters is not None:
            values["adapters"]["rank"] = min(config.adapters.rank, 8)
        for key in values["recurrence"].keys() & {"level_rank", "feed_forward_rank"}:
            values["recurrence"][key] = min(values["recurrence"][key], 8)
        parallel = config.parallel
        length = min(config.num_positions, 16 * parallel.tensor * parallel.context)
        values["data"]["seq_length"] = length - config.num_positions + config.data.seq_length
        if config.reads_images:
            values["task"]["patch_size"] = grow_patches(config, length)
            del values["data"]["seq_length"], values["model"]["max_positions"]
        elif config.task is not None:
            values["task"]["truncate"] = True
        if config.encoder is not None:
            values["data"]["truncate"] = True
            for key in values["encoder"].keys() & {"level_rank", "feed_forward_rank"}:
                values["encoder"][key] = min(values["encoder"][key], 8)
        if config.train.batch_tokens is not None:
            values["train"]["batch_tokens"] = 8 * length
        if config.model.positions == "learned" and not config.reads_images:
            values["model"]["max_positions"] = length
        if config.temporal is not None:
            chunk_length = min(config.temporal.chunk_length, -(-length // 4))
            values["temporal"] |= {"chunk_length": chunk_length, "update_ffn_hidden_size": hidden}
            if config.temporal.backward_chunks is not None:
                most = -(-length // chunk_length)
                backward = min(config.temporal.backward_chunks, most)
                values["temporal"]["backward_chunks"] = backward
        values["train"] |= {"micro_batch_size": 1, "global_batch_size": 2 * dp}
    return validate(values, "verify")


def grow_patches(config: Config, most: int) -> int:
    """Return the size of patches with which a picture has at most `most` positions, that ranks can
    share; without such a size, that of the run. Pictures keep their size, as corpora have it."""
    task, parallel = config.task, config.parallel
    assert task is not None and task.image_size is not None and task.patch_size is not None
    shares = parallel.tensor if parallel.sequence_parallel else 1
    for patch in range(task.patch_size, task.image_size + 1):
        positions = (task.image_size // patch) ** 2 + task.has_class_token
        if task.image_size % patch == 0 and positions <= most and positions % shares == 0:
            return patch
    return task.patch_size


def record(config: Config, steps: int, folder: Path, backend: Backend | None = None) -> None:
    """Take optimizer steps on this process's mesh; write the loss, norm and gradients of each.

    Args:
        config: the run.
        steps: number of optimizer steps.
        folder: where the results are written.
        backend: compiles graphs to code if `train.compile` is set; None: Inductor.

    Raises:
        MegarecurError: for any error that the user can fix.
    """
    with open_mesh(config) as mesh:
        data = open_data(config, mesh)
        config = with_teacher(data.config, data.tokenizer, data.loader.corpora, mesh)
        schedules = Schedules(config)
        model = build_model(config, mesh, schedules)
        profile_scales(model, config, data.loader, mesh)
        engine = build_engine(model, config, mesh)
        teacher = load_teacher(config, mesh, model.project is not None)
        compiling, _ = choose_compiler(config, mesh)
        if compiling:
            CompiledModel(model, backend)
        for step in range(steps):
            batches = [batch.to(mesh.device) for batch in data.loader.batch(step)]
            result = forward_backward(
                model, engine, config, batches, step, mesh, schedules=schedules, teacher=teacher
            )
            loss = sum_losses(result, mesh)
            shards = {name: model.shard(name, g) for name, g in engine.gradients().items()}
            norm, _ = engine.step(learning_rate(config.optimizer, step, config.train.steps))
            state = {"loss": loss, "norm": norm}
            checkpoint.save(folder, step, shards, state, group=mesh.save_group).result()
        data.close()


def compare(config: Config, steps: int, alone: Path, mesh: Path) -> list[Row]:
    """Compare two recordings of a config; returns one row per step."""
    rows = []
    for step in range(steps):
        name = f"step-{step:08d}"
        (loss, norm, expected), (other_loss, other_norm, found) = (
            read(folder / name, config) for folder in (alone, mesh)
        )
        total = torch.stack([g.norm() for g in expected.values()]).norm()
        errors = {
            key: float((found[key] - g).norm() / torch.maximum(g.norm(), 1e-3 * total))
            for key, g in expected.items()
        }
        rows.append(
            Row(
                step,
                (loss, other_loss),
                abs(other_loss - loss) / abs(loss),
                abs(other_norm - norm) / norm,
                errors,
                TOLERANCES[config.train.precision][min(step, 1)],
            )
        )
    return rows


def read(path: Path, config: Config) -> tuple[float, float, dict[str, Tensor]]:
    """Read the loss, norm and whole gradients (in fp64) of a recorded step."""
    dtype = torch.float64 if config.train.precision == "fp64" else torch.float32
    state, names = checkpoint.read_state(path), checkpoint.read_names(path)
    gradients = {
        name: torch.empty(spec.shape, dtype=dtype)
        for name, spec in build_inventory(config).items()
        if name in names
    }
    checkpoint.load(path, {name: whole(tensor) for name, tensor in gradients.items()})
    return state["loss"], state["norm"], {name: g.double() for name, g in gradients.items()}
