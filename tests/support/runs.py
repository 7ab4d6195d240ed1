"""What a run folder says of its training."""

from pathlib import Path

from megarecur.train.metrics import read_rows


def losses(run_dir: Path) -> dict[int, float]:
    """Training loss by step."""
    rows = [row for row in read_rows(run_dir / "metrics.jsonl") if "train/loss" in row]
    assert len({row["step"] for row in rows}) == len(rows), "a step was logged twice"
    return {row["step"]: row["train/loss"] for row in rows}


def weights(run_dir: Path, step: int) -> bytes:
    """Every tensor of a checkpoint, moments included."""
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    return (folder / "rank-00000.safetensors").read_bytes()
