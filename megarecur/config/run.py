"""The complete config of a run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megarecur.config.adapters import AdaptersConfig
from megarecur.config.base import CONFIG_VERSION, UNREADABLE, Section, as_size, free
from megarecur.config.checkpoint import CheckpointConfig
from megarecur.config.data import DataConfig
from megarecur.config.model import ModelConfig
from megarecur.config.objective import DistillConfig, ExitConfig, ObjectiveConfig, TaskConfig
from megarecur.config.optimizer import OptimizerConfig
from megarecur.config.parallel import ParallelConfig
from megarecur.config.recurrence import HaltingConfig, RecurrenceConfig, Ring
from megarecur.config.temporal import TemporalConfig
from megarecur.config.train import AlarmConfig, HealthConfig, TrainConfig

NO_TOKENIZER = "none"
"""The word by which data.tokenizer says that samples are no text."""


def count_positions(task: dict[str, Any]) -> Any:
    """Return the positions of a picture, its patches and a class token, from the values of a
    section `task`; UNREADABLE if the patches cannot be counted."""
    image, patch = (as_size(task.get(key)) for key in ("image_size", "patch_size"))
    if image is None or patch is None or image % patch:
        return UNREADABLE
    return (image // patch) ** 2 + (task.get("pooling") == "class_token")


class PaperConfig(Section):
    """The row of a published table that this run reproduces; `megarecur check` compares."""

    row: Annotated[str, Field(min_length=1)]
    """Authors, year, table and row."""
    parameters: Annotated[int, Field(gt=0, le=10**18)]
    """Parameters as published, or by the published formula."""
    without_embedding: bool = False
    """Exclude embedding, positions and head from this number."""
    published: str = ""
    """Other results of the row: its score, in words."""
    difference: str = ""
    """Reason why the parameters here differ from the published ones, if they do."""


class Config(Section):
    """The config of a run. `load_config` also rejects conflicts between sections (config/rules.py);
    this class alone does not."""

    version: Literal[1] = CONFIG_VERSION
    """Version of the config's format."""
    run_dir: str = free(min_length=1)
    """Folder of the run, relative to the current directory."""
    init_from: str | None = free(None, min_length=1)
    """RUN or RUN@STEP: a new run starts from the parameters of another run, or of a converted
    model; moments and counters start at zero. A run that has checkpoints resumes from those.
    Default: random initial parameters."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    """Seed of all random numbers."""
    model: ModelConfig
    """The shape of a block, and the layers around the blocks."""
    recurrence: RecurrenceConfig
    """The scheme: the order in which blocks run; with an encoder, that of the decoder."""
    encoder: RecurrenceConfig | None = None
    """The scheme of an encoder, which reads a source sentence (kinds and fields as in recurrence).
    It makes the model an encoder-decoder, trained on corpora of `megarecur prep pairs`. Default: no
    encoder."""
    adapters: AdaptersConfig | None = None
    """Layer-wise LoRA: parameters of single loops. Default: none."""
    temporal: TemporalConfig | None = None
    """A memory carried from chunk to chunk. Default: a sequence is read in one piece."""
    data: DataConfig
    """Corpora, tokenizer and sequence length."""
    optimizer: OptimizerConfig
    """AdamW, Muon and the learning rate schedule."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """The loss."""
    exits: ExitConfig | None = None
    """Losses after earlier loops. Default: the loss of the last loop alone."""
    distill: DistillConfig | None = None
    """A teacher. Default: none."""
    task: TaskConfig | None = None
    """Classification. Default: next-token prediction."""
    parallel: ParallelConfig = free(ParallelConfig())
    """The mesh: how processes divide the model and its state."""
    train: TrainConfig
    """Steps, batches, precision and evaluation."""
    checkpoint: CheckpointConfig = free(CheckpointConfig())
    """Intervals between saves, and retention."""
    alarms: AlarmConfig = free(AlarmConfig())
    """Criteria of divergence."""
    health: HealthConfig = free(HealthConfig())
    """The check of every process before training."""
    paper: PaperConfig | None = free(None)
    """The published row that the run reproduces. Default: none."""

    @model_validator(mode="before")
    @classmethod
    def fill_in(cls, values: Any) -> Any:
        """Fill in the positions of pictures, the rows of a learned position table, and the width of
        the memory's layers."""
        if not isinstance(values, dict):
            return values
        model, data, task = values.get("model"), values.get("data"), values.get("task")
        if not (isinstance(model, dict) and isinstance(data, dict)):
            return values
        of_pictures = isinstance(task, dict) and task.get("kind") == "image"
        if isinstance(task, dict) and of_pictures:
            data = {"seq_length": count_positions(task), "tokenizer": NO_TOKENIZER, **data}
            values = {**values, "data": data}
        longest, temporal = data.get("seq_length"), values.get("temporal")
        if isinstance(temporal, dict):
            hidden = as_size(model.get("hidden_size")) or UNREADABLE
            values = {**values, "temporal": {"update_ffn_hidden_size": hidden, **temporal}}
            # The positions of a picture are added before it is cut into chunks.
            longest = longest if of_pictures else temporal.get("chunk_length")
        if model.get("positions") == "learned" and model.get("max_positions") is None:
            ends = 2 * bool(isinstance(task, dict) and task.get("augment"))
            longest = as_size(longest)
            if longest is not None and not isinstance(temporal, dict):
                longest += ends
            model = {**model, "max_positions": longest}
        return {**values, "model": model}

    @property
    def halting(self) -> HaltingConfig | None:
        """The section by which tokens halt; None if all steps run."""
        halting = getattr(self.recurrence, "halting", None)
        return None if halting is None or halting.mode == "none" else halting

    @property
    def classifies(self) -> bool:
        """True if the head of a task replaces the vocabulary's."""
        return self.task is not None and self.task.targets == "labels"

    @property
    def reads_images(self) -> bool:
        """True if samples are pictures, which the model reads as patches instead of tokens."""
        return self.task is not None and self.task.kind == "image"

    @property
    def reads_memory(self) -> bool:
        """True if the task's head reads the temporal memory instead of the states of tokens."""
        pooled = self.temporal is not None and self.temporal.pooling is not None
        return pooled and self.task is not None and self.task.kind != "token"

    @property
    def has_final_norm(self) -> bool:
        """True if there is a norm between the layer map and a head, or between a core and its
        coda."""
        if self.reads_memory and not getattr(self.recurrence, "final_norm_after_core", False):
            return False
        return self.model.final_norm and self.model.norm_position != "post"

    @property
    def ties_embeddings(self) -> bool:
        """True if embedding and head are one table."""
        return self.model.tie_embeddings and not self.classifies

    def encoder_view(self) -> Config:
        """Return the run as its encoder sees it: with its scheme, and tokens that see later
        ones."""
        model = self.model.model_copy(update={"causal": False})
        update = {"recurrence": self.encoder, "encoder": None, "exits": None, "model": model}
        return self.model_copy(update=update)

    @property
    def separate_source(self) -> bool:
        """True if source sentences have an embedding table of their own."""
        shared = self.model.tie == "all" or (self.model.tie is None and self.model.tie_embeddings)
        return self.encoder is not None and not shared

    @property
    def num_positions(self) -> int:
        """Positions of the longest sequence, with the START and END of a task."""
        return self.data.seq_length + 2 * (self.task is not None and self.task.augment)

    @property
    def tokens_per_sample(self) -> int:
        """Positions of a sample; for a pair, those of both sequences."""
        return self.num_positions * (1 + (self.task is not None and self.task.kind == "pair"))

    @property
    def tokens_per_microbatch(self) -> int:
        """Positions of a micro batch; of pairs of sentences, those of the targets, if both sides
        are equally long."""
        if self.train.batch_tokens is not None:
            return max(self.train.batch_tokens // 2, 1)
        return self.train.micro_batch_size * self.tokens_per_sample

    @property
    def tokens_per_rank(self) -> int:
        """Positions of a micro batch on one context rank."""
        return self.tokens_per_microbatch // self.parallel.context

    @property
    def num_blocks(self) -> int:
        """Number of blocks, those of an encoder included."""
        below = 0 if self.encoder is None else self.encoder.num_blocks
        return below + self.recurrence.num_blocks

    @property
    def of_loops(self) -> str:
        """Description of the parameters that belong to single loops; "" if loops share all of
        them."""
        if self.adapters is not None:
            return "adapters"
        if self.model.residual == "admin":
            return "residual scales"
        return "levels" if isinstance(self.recurrence, Ring) else ""
