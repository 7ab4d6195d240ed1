"""Distillation from a frozen teacher's next-token distribution.

The teacher is a checkpoint of another run with the same vocabulary. It is sharded over tensor ranks
like the run itself. With pipeline parallelism, the rank of the head, which computes the loss, holds
the whole teacher. Its parameters belong to no optimizer group, no ZeRO stage and no checkpoint.
Alternatively, the teacher's distributions are stored before the run (`stored_teacher.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megarecur.batch import Batch
from megarecur.checkpoint import checkpoint
from megarecur.checkpoint.index import Index, read_fingerprint, read_index
from megarecur.checkpoint.initial import find_source
from megarecur.config.load import validate
from megarecur.config.run import Config
from megarecur.data.corpus import Corpus
from megarecur.errors import ConfigError
from megarecur.model.transformer import Transformer
from megarecur.objective.teacher import Teacher
from megarecur.parallel.head_loss import Target
from megarecur.parallel.mesh import Mesh, same_error
from megarecur.recurrence.inventory import build_inventory
from megarecur.recurrence.schemes import layer_map
from megarecur.train.stored_teacher import StoredTeacher, check_stored

FIELD = "distill.teacher"


class LiveTeacher:
    """A frozen in-process teacher."""

    def __init__(self, model: Transformer) -> None:
        self.model, self.steps = model, layer_map(model.config.recurrence)
        for parameter in model.parameters():
            parameter.requires_grad_(False)

    @torch.no_grad()
    def target(self, batch: Batch) -> Target:
        """Return a function that computes logits of a slice of a micro batch's tokens,
        without dropout: [n, V], or this rank's shard of V."""
        ctx = self.model.context(batch, step=0, training=False)
        x = self.model.embed(batch.tokens_BS, ctx)
        x, _ = self.model.run(self.steps, x, ctx, {})
        return self.model.readout.target(x)


def with_teacher(config: Config, tokenizer: str, corpora: Sequence[Corpus], mesh: Mesh) -> Config:
    """Return the config with the fingerprint of its teacher's checkpoint filled in; collective.

    Args:
        config: the run, with its vocabulary resolved.

    Raises:
        ConfigError: the teacher is not a run folder, or has another vocabulary, tokenizer or
            fingerprint than the config; the mesh cannot shard its model; or the stored
            distributions are for other samples.
        CheckpointError: the teacher has no usable checkpoint.
        DataError: stored distributions are missing or damaged.
    """
    if config.distill is None:
        return config
    distill = config.distill
    if distill.stored is not None:
        place = f"distill.stored={distill.stored}"
        with same_error(mesh):
            # All ranks check sizes, rank 0 also hashes.
            hashed = config.data.verify and mesh.rank == 0
            found = check_stored(config, tokenizer, corpora, distill.stored, hashed)
    else:
        assert distill.teacher is not None
        place = f"{FIELD}={distill.teacher}"
        path = find_source(distill.teacher, mesh, FIELD)
        with same_error(mesh):
            index, found = read_index(path), read_fingerprint(path)
            check_vocabulary(config, index, tokenizer)
            teacher = teacher_config(config, index)
            if teacher.classifies or teacher.encoder is not None:
                how = "classifies (its config has a task)" if teacher.classifies else "translates"
                raise ConfigError(
                    f"{place} {how}, and says nothing of the next token; name a run that predicts "
                    "text"
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


def check_vocabulary(config: Config, index: Index, tokenizer: str | None = None) -> None:
    """Check that the teacher has the run's vocabulary and, if known, its tokenizer.

    Args:
        tokenizer: fingerprint of the run's tokenizer; None: unknown, not checked.

    Raises:
        ConfigError: they differ.
    """
    assert config.distill is not None
    name = f"{FIELD}={config.distill.teacher}"
    saved = (index.state.get("config") or {}).get("model", {})
    theirs, ours = saved.get("vocab_size"), config.model.vocab_size
    if theirs != ours:
        raise ConfigError(
            f"{name} has a vocabulary of {theirs}, this run one of {ours}; choose a teacher of the "
            "same tokenizer, or set model.vocab_size to the teacher's"
        )
    if tokenizer is not None and index.state.get("tokenizer") not in (None, "", tokenizer):
        raise ConfigError(
            f"{name} was trained with a tokenizer of fingerprint {index.state['tokenizer']}, "
            f"data.tokenizer={config.data.tokenizer} has {tokenizer}: its tokens mean something "
            "else; use the teacher's tokenizer, or another teacher"
        )


def teacher_config(config: Config, index: Index) -> Config:
    """Return the teacher's config for this run: on this run's mesh and in its precision.

    Raises:
        ConfigError: the combination is invalid, for example tensor ranks that do not divide the
            heads.
    """
    assert config.distill is not None
    values = dict(index.state.get("config") or {})
    values |= {"exits": None, "distill": None, "init_from": None}
    parallel = config.parallel
    values["parallel"] = {
        "tensor": parallel.tensor,
        "context": parallel.context,
        "sequence_parallel": parallel.sequence_parallel,
    }
    values["data"] = {**values.get("data", {}), "seq_length": config.data.seq_length}
    own: dict[str, object] = {"offload_activations": False, "compile": False, "recompute": "none"}
    if values["train"]["precision"] != "fp64":  # fp64 sets the parameters' dtype as well; keep it
        precision = config.train.precision
        own["precision"] = "fp32" if precision == "fp64" else precision
    values["train"] = {**values["train"], **own}
    values["optimizer"] = {**values["optimizer"], "muon": None}
    return validate(values, f"{FIELD}={config.distill.teacher}")


def load_teacher(config: Config, mesh: Mesh, has_head: bool) -> Teacher | None:
    """Load the teacher on ranks of the head; None on others and without distillation. Collective.

    Args:
        config: the config that `with_teacher` returns.
        has_head: whether this rank computes the loss.

    Raises:
        CheckpointError: a damaged checkpoint.
    """
    if config.distill is None:
        return None
    if config.distill.stored is not None:
        shares = mesh.tensor_parallel(), mesh.context_parallel()
        return StoredTeacher(config.distill.stored, *shares) if has_head else None
    assert config.distill.teacher is not None
    path = find_source(config.distill.teacher, mesh, FIELD)
    shards, model = {}, None
    if has_head:
        theirs = teacher_config(config, read_index(path))
        tp = mesh.tensor_parallel(config.parallel.sequence_parallel)
        model = Transformer(theirs, mesh.device, tp=tp, cp=mesh.context_parallel())
        parameters = model.parameters_by_name
        shards = {n: model.shard(n, parameters[n].detach()) for n in build_inventory(theirs)}
    checkpoint.load(path, shards, group=mesh.save_group, partial=True)
    if model is None:
        return None
    model.refresh()
    return LiveTeacher(model)
