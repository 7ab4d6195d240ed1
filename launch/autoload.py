"""Entry point that torch calls at the end of its own import (see pyproject.toml)."""

from __future__ import annotations


def make_torchvision_importable() -> None:
    """Let `import torchvision`, and libraries that do so, work beside a CPU build of torch.

    A failing entry point would fail torch's import, so nothing happens if this package cannot be
    found.
    """
    try:
        from megarecur.data import torchvision_stub
    except ImportError:
        return
    torchvision_stub.make_torchvision_importable()
