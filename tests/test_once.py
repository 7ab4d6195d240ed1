"""Folders that workers of pytest share."""

from pathlib import Path

import pytest
from support.once import make_once


def test_a_folder_is_made_once_and_again_after_a_failure(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    made = []

    def make(folder: Path) -> None:
        assert not list(folder.iterdir())
        (folder / "half").touch()
        made.append(folder)
        if len(made) == 1:
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        make_once(tmp_path_factory, "test", make)
    first, second = (make_once(tmp_path_factory, "test", make) for _ in range(2))
    assert first == second == made[1] != made[0] and len(made) == 2
