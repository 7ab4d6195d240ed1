"""Small configs for tests."""

import inspect
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megarecur.config.load import validate
from megarecur.config.run import Config

# Real text on every machine: documentation of the standard library, a document per paragraph.
TEXT = "\n\n".join(
    f"{name}: {inspect.getdoc(value)}".replace("\n\n", "\n")
    for owner in (str, dict)
    for name, value in sorted(vars(owner).items())
    if callable(value) and not name.startswith("__")
)

SCHEMES: dict[str, dict[str, Any]] = {
    "dense": {"kind": "dense", "num_layers": 3},
    "sequence": {"kind": "sequence", "num_blocks": 2, "depth": 4},
    "cycle": {"kind": "cycle", "num_blocks": 2, "depth": 5},
    "cycle_reverse": {"kind": "cycle_reverse", "num_blocks": 2, "depth": 4},
    "reuse_map": {"kind": "reuse_map", "reuse_map": [3, 1, 2]},
    "block_recurrence": {"kind": "block_recurrence", "num_blocks": 2, "num_loops": 3},
    "loop": {"kind": "loop", "prelude": 1, "core": 1, "coda": 1, "num_loops": 3},
    "custom": {"kind": "custom", "order": [0, 1, 2, 1, 0, 2, 2]},
}

ENTRY = {"kind": "reuse_map", "reuse_map": [3, 1, 2], "injection": "add"}
"""A block's entry state is added to its later repetitions."""


def make_config(
    corpus: Path | str = "corpus", scheme: str = "reuse_map", **sections: dict[str, Any]
) -> Config:
    """A tiny run on a byte corpus; keyword arguments update whole sections, or, with a `kind`,
    replace them."""
    values: dict[str, Any] = {
        "run_dir": "run",
        "seed": 3,
        "model": {"hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "ffn_hidden_size": 64},
        "recurrence": SCHEMES[scheme],
        "data": {
            "train": [{"path": f"{corpus}/train"}],
            "val": [{"path": f"{corpus}/val"}],
            "tokenizer": "bytes",
            "seq_length": 32,
        },
        "optimizer": {"lr": 1e-3, "eps": 1e-5},
        "train": {"steps": 10, "global_batch_size": 8, "micro_batch_size": 2, "log_every": 1},
        "checkpoint": {},
    }
    for section, update in sections.items():
        if isinstance(update, dict) and "kind" not in update:
            values[section] = {**values.get(section, {}), **update}
        else:
            values[section] = update
    return validate(values, "test")


def write_corpus(out: Path) -> Path:
    """Prepare `TEXT` as a corpus of bytes, `train` and `val`, in a folder; returns the folder."""
    from megarecur.data_prep.readers import Reading
    from megarecur.data_prep.shards import prepare_shards

    with TemporaryDirectory() as folder:
        source = Path(folder, "text.txt")
        source.write_text(TEXT, encoding="utf-8")
        reading = Reading(text_split="blank_line")
        prepare_shards([source], out, "bytes", reading, val_fraction=0.1, workers=1)
    return out
