"""Profiling of a window of optimizer steps by torch's profiler, for Perfetto or TensorBoard, and on
CUDA of the allocations of memory, for pytorch.org/memory_viz."""

from __future__ import annotations

from pathlib import Path

import torch

from megarecur.config.train import ProfileConfig
from megarecur.files import publish
from megarecur.parallel.mesh import Mesh

MOST_ALLOCATIONS = 200_000
"""Maximum events of a memory snapshot; the last ones are kept."""


class Profiler:
    """Profiler of steps [start, start + steps), counted from 0; writes a trace to RUN/profile, and
    on CUDA a snapshot of memory with the stacks of its allocations.

    Named ranges in the trace: data, forward, backward, optimizer, save; and every step of the map.
    """

    def __init__(self, config: ProfileConfig | None, run_dir: Path, mesh: Mesh) -> None:
        recorded = config is not None and (config.all_ranks or mesh.rank == 0)
        self.config = config if recorded else None
        self.path = run_dir / "profile" / f"rank-{mesh.rank:05d}.json.gz"
        self.device = mesh.device
        self.profile: torch.profiler.profile | None = None

    def begin(self, step: int) -> None:
        """Start recording if `step`, counted from 0, is the first step of the window."""
        if self.config is None or step != self.config.start:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.profile = torch.profiler.profile(
            activities=activities, record_shapes=True, profile_memory=True
        )
        self.profile.start()
        if self.device.type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=MOST_ALLOCATIONS)

    def end(self, step: int) -> str:
        """Stop recording after the window's last step; returns a note on the trace, else ""."""
        if self.profile is None or self.config is None:
            return ""
        if step + 1 < self.config.start + self.config.steps:
            return ""
        return self.close()

    def close(self) -> str:
        """Write the trace if recording is active; returns a note that names its file, else ""."""
        profile, self.profile = self.profile, None
        if profile is None:
            return ""
        profile.stop()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_name("tmp-" + self.path.name)
        profile.export_chrome_trace(str(aside))
        publish(aside, self.path)
        note = f"profile written to {self.path}; open it at ui.perfetto.dev"
        return note if self.device.type != "cuda" else f"{note}\n{self.write_snapshot()}"

    def write_snapshot(self) -> str:
        """Write the allocations of the window and stop recording them; returns a note."""
        name = self.path.name.removesuffix(".json.gz") + ".memory.pickle"
        path = self.path.with_name(name)
        aside = path.with_name("tmp-" + name)
        torch.cuda.memory._dump_snapshot(str(aside))
        torch.cuda.memory._record_memory_history(enabled=None)
        publish(aside, path)
        return f"memory snapshot written to {path}; open it at pytorch.org/memory_viz"
