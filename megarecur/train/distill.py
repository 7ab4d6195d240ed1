"""Distillation: a frozen teacher whose distribution of the next token the run learns from.

The teacher is another run of the same vocabulary, at one of its checkpoints. It is cut over tensor
ranks as the run itself. Of a pipeline it lives whole on the rank of the head, where the loss is. No
optimizer group, no stage of ZeRO and no checkpoint has its parameters. Or what it says was stored
before the run (`stored_teacher.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from megarecur.config.load import validate
from megarecur.config.schema import Config
from megarecur.data.corpus import Corpus
from megarecur.errors import ConfigError
from megarecur.model.transformer import Batch, Transformer
from megarecur.parallel.mesh import Mesh, same_error
from megarecur.recurrence.inventory import build_inventory
from megarecur.recurrence.schemes import layer_map
from megarecur.train import checkpoint
from megarecur.train.checkpoint_index import Index, read_fingerprint, read_index
from megarecur.train.initial import find_source
from megarecur.train.stored_teacher import StoredTeacher, check_stored

FIELD = "distill.teacher"


class Teacher(Protocol):
    """Whom a run learns from."""

    def logits(self, batch: Batch) -> Tensor:
        """[N, V] of a micro batch's tokens, or this rank's shard of the vocabulary."""


class LiveTeacher:
    """A model that is only asked.

    Args:
        model: with its parameters loaded.
    """

    def __init__(self, model: Transformer) -> None:
        self.model, self.steps = model, layer_map(model.config.recurrence)
        for parameter in model.parameters():
            parameter.requires_grad_(False)

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """[N, V] of a micro batch's tokens, or this rank's shard of the vocabulary; no dropout."""
        ctx = self.model.context(batch, step=0, training=False)
        x = self.model.embed(batch.tokens_BS, ctx)
        x, _ = self.model.run(self.steps, x, ctx, {})
        return self.model.logits(x).flatten(0, 1)


def with_teacher(config: Config, tokenizer: str, corpora: Sequence[Corpus], mesh: Mesh) -> Config:
    """The config with the fingerprint of its teacher's checkpoint filled in; collective.

    Args:
        config: with its vocabulary resolved.
        tokenizer: fingerprint of the run's own.
        corpora: that it trains on.
        mesh: the processes.

    Raises:
        ConfigError: no run, another vocabulary or tokenizer, another checkpoint than the one that
            the config names by its fingerprint, or a model that the mesh cannot cut; distributions
            that were stored for other samples.
        CheckpointError: no checkpoint that can be used.
        DataError: no stored distributions, or damaged ones.
    """
    if config.distill is None:
        return config
    distill = config.distill
    if distill.stored is not None:
        place = f"distill.stored={distill.stored}"
        with same_error(mesh):
            # Sizes on every rank, contents on one.
            hashed = config.data.verify and mesh.rank == 0
            found = check_stored(config, tokenizer, corpora, distill.stored, hashed)
    else:
        assert distill.teacher is not None
        place = f"{FIELD}={distill.teacher}"
        path = find_source(distill.teacher, mesh, FIELD)
        with same_error(mesh):
            index, found = read_index(path), read_fingerprint(path)
            check_vocabulary(config, index, tokenizer)
            if teacher_config(config, index).classifies:
                raise ConfigError(
                    f"{place} classifies (its config has a task), and says nothing of the next "
                    "token; name a run that predicts text"
                )
    with same_error(mesh):
        if distill.fingerprint not in (None, found):
            raise ConfigError(
                f"{place} has fingerprint {found}, distill.fingerprint={distill.fingerprint} is "
                "another teacher's; name the step of the run, or leave fingerprint out for a new "
                "run"
            )
    distill = distill.model_copy(update={"fingerprint": found})
    return config.model_copy(update={"distill": distill})


def check_vocabulary(config: Config, index: Index, tokenizer: str) -> None:
    """Refuse a teacher that speaks of other tokens."""
    assert config.distill is not None
    name = f"{FIELD}={config.distill.teacher}"
    theirs, ours = index.state["config"]["model"]["vocab_size"], config.model.vocab_size
    if theirs != ours:
        raise ConfigError(
            f"{name} has a vocabulary of {theirs}, this run one of {ours}; choose a teacher of the "
            "same tokenizer, or set model.vocab_size to the teacher's"
        )
    if index.state.get("tokenizer") not in (None, "", tokenizer):
        raise ConfigError(
            f"{name} was trained with a tokenizer of fingerprint {index.state['tokenizer']}, "
            f"data.tokenizer={config.data.tokenizer} has {tokenizer}: its tokens mean something "
            "else; use the teacher's tokenizer, or another teacher"
        )


def teacher_config(config: Config, index: Index) -> Config:
    """The teacher's config as it runs beside this one: on its mesh, in its precision.

    Raises:
        ConfigError: what cannot be, such as heads that the tensor ranks do not divide.
    """
    assert config.distill is not None
    values = dict(index.state["config"])
    values |= {"exits": None, "distill": None, "init_from": None}
    parallel = config.parallel
    values["parallel"] = {
        "tensor": parallel.tensor,
        "sequence_parallel": parallel.sequence_parallel,
    }
    values["data"] = {**values["data"], "seq_length": config.data.seq_length}
    own: dict[str, object] = {"compile": False, "recompute": False}
    if values["train"]["precision"] != "fp64":  # That is of parameters too, which stay as they are.
        precision = config.train.precision
        own["precision"] = "fp32" if precision == "fp64" else precision
    values["train"] = {**values["train"], **own}
    values["optimizer"] = {**values["optimizer"], "muon": None}
    return validate(values, f"{FIELD}={config.distill.teacher}")


def load_teacher(config: Config, mesh: Mesh, has_head: bool) -> Teacher | None:
    """The teacher, on ranks of the head; None on others, and where the config has none. Collective.

    Args:
        config: as `with_teacher` gives it.
        mesh: the processes.
        has_head: whether this rank computes the loss.

    Raises:
        CheckpointError: a damaged checkpoint.
    """
    if config.distill is None:
        return None
    if config.distill.stored is not None:
        return StoredTeacher(config.distill.stored, mesh.tensor_parallel()) if has_head else None
    assert config.distill.teacher is not None
    path = find_source(config.distill.teacher, mesh, FIELD)
    shards, model = {}, None
    if has_head:
        theirs = teacher_config(config, read_index(path))
        tp = mesh.tensor_parallel(config.parallel.sequence_parallel)
        model = Transformer(theirs, mesh.device, tp=tp)
        parameters = model.parameters_by_name
        shards = {n: model.shard(n, parameters[n].detach()) for n in build_inventory(theirs)}
    checkpoint.load(path, shards, group=mesh.save_group, partial=True)
    if model is None:
        return None
    model.refresh()
    return LiveTeacher(model)
