"""NCCL's flight recorder: the last collectives of every rank, written when a run hangs.

`launch` asks a run that stalls for its stacks by SIGQUIT. The handler, in C, answers even if the
main thread waits inside a collective; it cannot write the recorder. So a thread waits for the
stacks to appear, and then writes the record beside them: nccl-RANK.pickle, for torch's analyser
(`torchfrtrace`). Not run on GPUs yet.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megarecur.files import replace_file
from megarecur.train.signals import RECORD, STACKS_VARIABLE, rank_of_process

POLL_SECONDS = 0.5


def find_dump() -> Callable[[], bytes] | None:
    """Return torch's function that returns the record as a pickle; None in builds without NCCL."""
    bindings = getattr(torch._C, "_distributed_c10d", None)
    return getattr(bindings, "_dump_nccl_trace", None)


def watch_for_hangs(device: torch.device) -> Path | None:
    """Start the thread on CUDA, if a watcher collects stacks; returns the file that it will write.

    The file exists from the start, empty, so that a watcher knows that it is to be filled.
    """
    folder, dump = os.environ.get(STACKS_VARIABLE), find_dump()
    if device.type != "cuda" or folder is None or dump is None:
        return None
    rank = rank_of_process()
    stacks, record = Path(folder) / f"stacks-{rank}.txt", Path(folder) / RECORD.format(rank)
    record.touch()
    threading.Thread(target=write_after, args=(stacks, record, dump), daemon=True).start()
    return record


def write_after(stacks: Path, record: Path, dump: Callable[[], bytes]) -> None:
    """Wait until there are stacks, and write the record."""
    while not (stacks.exists() and stacks.stat().st_size):
        time.sleep(POLL_SECONDS)
    replace_file(record, dump())
