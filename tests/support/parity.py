"""Recorded cases of other systems' code, and batches of their arrays.

Shapes: B samples, S positions.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.models import Batch
from torch import Tensor

Case = dict[str, Any]


FP32_TOL, FP64_FORWARD_TOL, FP64_TOL = 1e-4, 1e-12, 1e-11


def cases(system: str, prefix: str = "") -> list[Any]:
    """The cases of a system, or of one kind; one that skips, saying why, where there are none."""
    named = os.environ.get("MEGARECUR_DATA")
    data = Path(named) if named else Path(__file__).resolve().parents[3] / "shared" / "data"
    found = sorted((data / "parity" / system).glob(f"{prefix}*.json"))
    if not found:
        missing = f"no {system} cases under {data / 'parity'}; set MEGARECUR_DATA to the data"
        return [pytest.param(Path(), marks=pytest.mark.skip(reason=missing), id="missing")]
    return [pytest.param(path, id=path.stem) for path in found]


def read_case(path: Path) -> tuple[Case, dict[str, Tensor]]:
    """The JSON and the arrays beside it."""
    return json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))


def batch_of(tokens_BS: Tensor, labels_BS: Tensor) -> Batch:
    """One document per sample."""
    batch, length = tokens_BS.shape
    positions_BS = torch.arange(length).expand(batch, length)
    return Batch(
        tokens_BS, labels_BS, positions_BS, torch.zeros_like(tokens_BS), torch.arange(batch)
    )
