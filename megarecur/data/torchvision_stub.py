"""Makes torchvision importable beside a CPU build of torch, for the libraries that import it.

`streaming` and `transformers` import torchvision. With torch's CPU build, torchvision's registry
build fails at import ("operator torchvision::nms does not exist"). Nothing here uses its operators,
so their schemas alone are enough.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

_libraries: list[Any] = []  # an operator lives as long as the library that defined it


def make_torchvision_importable() -> None:
    """Import torchvision; where its operators are missing, define their schemas and try again."""
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [name for name in list(sys.modules) if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        import torch

        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)
        importlib.import_module("torchvision")
