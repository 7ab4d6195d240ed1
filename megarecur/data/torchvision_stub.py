"""Make torchvision importable beside a CPU build of torch, for the libraries that import it.

`streaming` and `transformers` import torchvision. The build of PyPI is linked to CUDA: beside a CPU
build of torch its extension cannot be loaded, and its import fails ("operator torchvision::nms does
not exist"). Nothing here uses its operators, so their schemas alone are enough.

torch calls `make_torchvision_importable` at the end of its own import
(`megarecur.launch.autoload`), so this file imports nothing of ours and raises no error. Code that
uses those libraries calls it too, in case torch did not (this package is not installed, or
TORCH_DEVICE_BACKEND_AUTOLOAD=0).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

OPERATORS = ("nms", "qnms")
"""Operators that torchvision's import needs."""
_libraries: list[Any] = []  # an operator lives as long as its library object


def make_torchvision_importable() -> None:
    """Define the schemas of torchvision's operators if its extension cannot be loaded. Changes
    nothing with a GPU build of torch, or with a fitting torchvision."""
    import torch

    if torch.version.cuda is not None or torch.version.hip is not None or _libraries:
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or hasattr(torch.ops.torchvision, OPERATORS[0]):
        return
    extensions = list(Path(spec.origin).parent.glob("_C*.so"))
    if not extensions or loads(str(extensions[0])):
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in OPERATORS:
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)


def loads(extension: str) -> bool:
    """Return True if torch can load a library of operators, which then defines them."""
    import torch

    try:
        torch.ops.load_library(extension)
    except OSError:
        return False
    return True
