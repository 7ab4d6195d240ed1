"""The list of a corpus's shards, index.json: mosaicml-streaming's, checked before it is used.

Corpora of this project and those of other programs are read by the same function. The index is
data from elsewhere: no name in it leads outside the corpus's folder, and no column runs code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError

from megarecur.errors import DataError
from megarecur.reading import check_inside, read_object

Natural = Annotated[StrictInt, Field(ge=0, lt=1 << 32)]
"""MDS addresses the bytes of a shard by 32 bits."""
MEND = "copy it again from its source, or convert it again"


class _Record(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)


class FileEntry(_Record):
    """A file of a shard: compressed, or as it is read."""

    basename: StrictStr
    bytes: Natural
    hashes: dict[StrictStr, StrictStr] | None = None


class ShardEntry(_Record):
    """One shard of index.json."""

    format: Literal["mds"]
    samples: Natural
    column_names: list[StrictStr]
    column_encodings: list[StrictStr]
    column_sizes: list[Natural | None]
    raw_data: FileEntry
    zip_data: FileEntry | None = None
    compression: StrictStr | None = None


def read_index(path: Path) -> list[dict[str, Any]]:
    """Return the shards that PATH/index.json lists, with the fields of `ShardEntry`.

    Raises:
        DataError: it is missing, damaged or not MDS, names a file outside its folder, or has a
            column that could run code when it is read.
    """
    file = path / "index.json"
    try:
        shards = read_object(file)["shards"]
        if not isinstance(shards, list):
            raise ValueError("its shards are no list")
        names = [name for shard in shards for name in _check_entry(shard)]
        check_inside(path, names)
    except KeyError as error:
        raise DataError(f"{file}: cannot be used ({error} is missing); {MEND}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{file}: cannot be used ({where}: {first['msg']}); {MEND}") from None
    except (ValueError, OSError) as error:
        raise DataError(f"{file}: cannot be used ({error}); {MEND}") from None
    if not shards:
        raise DataError(f"{file}: lists no shards; {MEND}")
    return shards


def _check_entry(shard: Any) -> list[str]:
    """Return the names of a shard's files."""
    if isinstance(shard, dict) and shard.get("format") != "mds":
        raise ValueError(f"its shards are {shard.get('format')!a:.40}, not mds")
    entry = ShardEntry.model_validate(shard)
    if any("pkl" in encoding for encoding in entry.column_encodings):
        raise ValueError("a column is pickled, and reading it would run code")
    count = len(entry.column_names)
    if not count == len(entry.column_encodings) == len(entry.column_sizes):
        raise ValueError("columns, encodings and sizes do not match")
    if entry.zip_data is not None and entry.compression is None:
        raise ValueError("a shard is compressed, but its compression is not given")
    return [part.basename for part in (entry.raw_data, entry.zip_data) if part is not None]
