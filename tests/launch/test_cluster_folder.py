"""slurm/cluster.sh reads settings only from a folder that no other user has made."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("how", ["writable", "linked"])
def test_a_cluster_is_not_one_that_another_user_has_prepared(tmp_path: Path, how: str) -> None:
    """Its settings would be run by the shell, as root."""
    folder, hacked = tmp_path / "slurm-cluster", tmp_path / "hacked"
    real = folder if how == "writable" else tmp_path / "theirs"
    (real / "run").mkdir(parents=True)
    (real / "run" / "settings").write_text(f"touch {hacked}\n")
    (real / ".slurm-cluster").touch()
    if how == "writable":
        folder.chmod(0o777)
    else:
        folder.symlink_to(real)
    for command in ("status", "down"):
        done = subprocess.run(
            ["bash", ROOT / "slurm" / "cluster.sh", command],
            env=os.environ | {"TMPDIR": str(tmp_path), "SLURM_CLUSTER_DIR": ""},
            capture_output=True,
            text=True,
        )
        fault = "other users can write it (mode 777)" if how == "writable" else "is a link"
        assert done.returncode == 1 and fault in done.stderr, done.stderr
        assert not hacked.exists() and real.exists()
