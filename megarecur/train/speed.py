"""Peak FLOP/s of the hardware, for MFU, and memory use of the process."""

from __future__ import annotations

import resource
import sys
import time

import torch

from megarecur.model.transformer import Transformer
from megarecur.optim.engine import Engine

# Peak FLOP/s of dense bf16 products, from the vendor's data sheets (SXM variants).
BF16_PEAK = {
    "A100": 312e12,
    "H100": 989e12,
    "GH200": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the peak FLOP/s for MFU: from the data sheet of a known GPU, else a measured GEMM.

    On a CPU, the better of fp32 and the compute dtype, since a product may run in either.
    """
    if device.type == "cuda":
        words = torch.cuda.get_device_name(device).replace("-", " ").split()
        known = [BF16_PEAK[word] for word in words if word in BF16_PEAK]
        if known and dtype == torch.bfloat16 and "PCIe" not in words:
            return known[0]
        return measure_gemm(device, dtype, size=8192)
    return max(measure_gemm(device, d) for d in {torch.float32, dtype})


def measure_gemm(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """Return the FLOP/s of the best of a few square matrix products; takes tens of milliseconds."""
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def peak_memory(device: torch.device) -> int:
    """Return the peak bytes of tensors on a GPU, or of this whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure_state(model: Transformer, engine: Engine) -> dict[str, int]:
    """Return the bytes that this process keeps between optimizer steps, by kind."""
    held = {"parameters": 0, "moments": 0}
    for name, shard in engine.shards().items():
        kind = "parameters" if name in model.parameters_by_name else "moments"
        held[kind] += sum(tensor.nbytes for *_, tensor in shard.chunks)
    copies = [weight.copy for weight in model.weights() if weight.copy is not None]
    held["gradients"] = engine.gradient_bytes()
    held["copies"] = sum(copy.nbytes for copy in copies)
    return held
