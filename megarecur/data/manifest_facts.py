"""The types and limits of the values in a manifest.json, which may come from anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from megarecur.reading import check_plain_name

Natural = Annotated[StrictInt, Field(ge=0, lt=1 << 62)]
Positive = Annotated[StrictInt, Field(gt=0, lt=1 << 62)]
Id = Annotated[StrictInt, Field(ge=0, lt=1 << 31)]
Hash = Annotated[StrictStr, Field(pattern=r"^[0-9a-f]{16}$")]
Hash128 = Annotated[StrictStr, Field(pattern=r"^[0-9a-f]{32}$")]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Side = Annotated[list[Natural], Field(min_length=2, max_length=2)]


class _Facts(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)


class FileFacts(_Facts):
    """Bytes and hash of a file of the corpus."""

    bytes: Natural
    xxh64: Hash


class SourceFacts(_Facts):
    """An input file of the preparation."""

    name: StrictStr


class SampleFacts(_Facts):
    """Labelled samples of text."""

    kind: Literal["sequence", "pair", "token"]
    name: StrictStr
    classes: Annotated[list[StrictStr], Field(min_length=1)]
    of_classes: list[Natural]
    num_samples: Positive
    longest: Natural
    ahead: StrictBool = False


class ImageFacts(SampleFacts):
    """Labelled pictures."""

    kind: Literal["image"]  # type: ignore[assignment]
    smallest: Side
    largest: Side
    channels: Literal[1, 3]
    mean: list[Number]
    std: list[Number]


class PairFacts(_Facts):
    """Pairs of sentences. Younger keys are missing in the first corpora."""

    kind: Literal["translation"]
    num_pairs: Positive
    start_id: Id
    pad_id: Id
    longest_source: Natural
    longest_target: Natural
    longest_pair: Natural
    dropped: dict[StrictStr, Natural]
    source_tokens: Natural = 0
    target_tokens: Positive = 1
    target_bytes: Natural = 0


class ManifestFacts(BaseModel):
    """Every field of a manifest; see `Manifest`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1]
    split: StrictStr
    tokenizer: StrictStr
    tokenizer_fingerprint: StrictStr
    vocab_size: Id
    eos_id: Id
    dtype: Literal["uint8", "uint16", "uint32", "int32", "int64"]
    num_tokens: Natural
    num_documents: Natural
    num_bytes: Natural
    duplicates_removed: Natural
    documents_skipped: Natural
    preparation: StrictStr
    sources: list[SourceFacts]
    files: dict[str, FileFacts]
    near_duplicates_removed: Natural = 0
    task: Annotated[SampleFacts | ImageFacts | PairFacts, Field(discriminator="kind")] | None = None
    identity: Hash128 | Literal[""] = ""


def find_manifest_fault(values: Mapping[str, Any]) -> str | None:
    """Return the first value of a manifest that is missing, of another type or out of bounds; None
    if all are right."""
    try:
        facts = ManifestFacts.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        return f"{where}: {first['msg']} (got {first['input']!a:.80})"
    try:
        for name in (*facts.files, facts.tokenizer):
            check_plain_name(name)
    except ValueError as error:
        return str(error)
    task = facts.task
    if isinstance(task, SampleFacts) and len(task.of_classes) != len(task.classes):
        return f"task: has counts of {len(task.of_classes)} of {len(task.classes)} classes"
    if isinstance(task, ImageFacts) and not len(task.mean) == len(task.std) == task.channels:
        return f"task: mean and std do not have {task.channels} numbers"
    missing = [name for name in ("index.json", "documents.npy") if name not in facts.files]
    return f"files: {missing[0]} is not listed" if missing else None
