"""What the hardware could do at most, for MFU, and how much memory a process took."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping

import torch

from megarecur.model.transformer import Transformer
from megarecur.parallel.shards import Shard

# Dense bf16 products, from the makers' data sheets (SXM parts), FLOP/s.
BF16_PEAK = {
    "A100": 312e12,
    "H100": 989e12,
    "GH200": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that MFU is counted against: the data sheet's for a known GPU, else a measured GEMM.

    On a CPU the better of fp32 and the compute dtype, since a product may run in either.
    """
    if device.type == "cuda":
        words = torch.cuda.get_device_name(device).replace("-", " ").split()
        known = [BF16_PEAK[word] for word in words if word in BF16_PEAK]
        if known and dtype == torch.bfloat16 and "PCIe" not in words:
            return known[0]
        return measure_gemm(device, dtype, size=8192)
    return max(measure_gemm(device, d) for d in {torch.float32, dtype})


def measure_gemm(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """FLOP/s of the best of a few square matrix products; tens of milliseconds."""
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
    """Bytes: the most that tensors took on a GPU, or that this process took on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure_state(model: Transformer, shards: Mapping[str, Shard]) -> dict[str, int]:
    """Bytes that a run keeps on this process between optimizer steps, by kind.

    Args:
        model: what is trained.
        shards: the engine's, parameters and moments.
    """
    held = {"parameters": 0, "moments": 0}
    for name, shard in shards.items():
        kind = "parameters" if name in model.parameters_by_name else "moments"
        held[kind] += sum(tensor.nbytes for *_, tensor in shard.chunks)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    copies = [weight.copy for weight in model.weights() if weight.copy is not None]
    held["gradients"] = sum(gradient.nbytes for gradient in gradients)
    held["copies"] = sum(copy.nbytes for copy in copies)
    return held
