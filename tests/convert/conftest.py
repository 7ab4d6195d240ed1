"""Fixtures of tests of conversion and export."""

from typing import Any

import pytest

from megarecur.data.torchvision_stub import make_torchvision_importable


@pytest.fixture(scope="session")
def transformers() -> Any:
    """Return Hugging Face's transformers; the import costs seconds."""
    make_torchvision_importable()
    return pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def hub_model(transformers: Any) -> Any:
    """Return the modelling file of exports, imported where it lies."""
    from megarecur.convert import hub_model

    return hub_model
