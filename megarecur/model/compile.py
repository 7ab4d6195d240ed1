"""torch.compile of the block: one graph for all blocks, all loops and all depths.

In training, `Block.body` is compiled as a function of tensors only, weights included, so blocks of
the same shape share a graph. Loops without gradient need a second graph, and every pattern of
frozen parameters needs one more. Inside the graph the collectives of tensor parallelism and the sum
of weight gradients are opaque operators (`parallel.regions`, `parallel.linear`), so any layout runs
the same messages and the same queue of products as in eager mode. The two passes of the loss over
the logits are compiled separately. Injection, telemetry, embedding and head are not compiled.
Evaluation and generation run eagerly.

Torch's compiler takes seconds to import, so it is imported only when something is compiled.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from megarecur.model.block import Block
from megarecur.model.transformer import Transformer
from megarecur.parallel.loss import LossKernels, differentiate_fused, summarize_fused
from megarecur.private import UnsafeFolder, place_compile_cache

FRUGAL = {
    "ban_recompute_materialized_backward": False,
    "ban_recompute_used_far_apart": False,
    "ban_recompute_long_fusible_chains": False,
}
"""Limits of the partitioner of `torch._functorch`, lifted by `train.recompute: selective`. Without
them it keeps the fewest bytes from which elementwise operations alone make the rest: what comes
out of matrix products, attention and reductions stays, norms and activations are made again."""

Backend = Callable[[fx.GraphModule, Sequence[Tensor]], Callable[..., Any]]


MOST_GRAPHS = 64
"""Max graphs of one function, after which torch raises an error. Every pattern of frozen parameters
may need a graph."""


class Compiled:
    """A function that is compiled for every new kind of input, with a count of its graphs.

    Args:
        function: takes tensors and objects that hold tensors.
        backend: compiles a graph to code; None: Inductor.
        lengths_vary: let one graph serve sizes that turn out to vary; otherwise each needs its own.
        is_frugal: let backward make elementwise results again (`FRUGAL`).
    """

    def __init__(
        self,
        function: Callable[..., Any],
        backend: Backend | None = None,
        lengths_vary: bool = False,
        is_frugal: bool = False,
    ) -> None:
        self.graphs = 0
        """Number of graphs compiled in this process."""
        self.backend, self.is_frugal = backend, is_frugal

        def call(*args: Any) -> Any:
            return function(*args)

        if backend is None:
            place_compile_cache()
        torch._dynamo.config.recompile_limit = MOST_GRAPHS
        # Torch stores and limits graphs per code object, so give each `Compiled` its own.
        call.__code__ = call.__code__.replace()
        # A graph break raises an error. Sizes are constant in training on text, so they are
        # compiled in.
        dynamic = None if lengths_vary else False
        self.compiled = torch.compile(call, backend=self.make, fullgraph=True, dynamic=dynamic)

    def make(self, graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        """Compile a new graph; torch calls this for each."""
        self.graphs += 1
        backend = self.backend
        if backend is None:
            from torch._inductor.compile_fx import compile_fx

            backend = cast(Backend, compile_fx)
        with torch._functorch.config.patch(FRUGAL if self.is_frugal else {}):
            return backend(graph, inputs)

    def __call__(self, *args: Any) -> Any:
        """Call the compiled function."""
        return self.compiled(*args)


class CompiledModel:
    """The compiled parts of a model: one body for all blocks, and the loss."""

    def __init__(self, model: Transformer, backend: Backend | None = None) -> None:
        # Batches of a task, or of pairs of sentences, are padded to their longest sequence.
        config = model.config
        of_sequences = config.task is not None and not config.reads_images
        lengths_vary = of_sequences or config.encoder is not None
        is_frugal = config.train.recompute == "selective"
        self.body = Compiled(Block.body, backend, lengths_vary, is_frugal)
        # Tokens that count vary with the lengths, and so do the rows of their logits.
        self.loss = (
            Compiled(summarize_fused, backend, lengths_vary),
            Compiled(differentiate_fused, backend, lengths_vary),
        )
        for block in model.blocks().values():
            block.compiled = self.body
            for weight in block.weights:
                weight.open_handle()
        model.readout.compiled = LossKernels(*self.loss)
        model.always_separates = config.encoder is not None or (
            config.data.mask_documents and not config.reads_images
        )
        self.told: int | None = None
        """Number of graphs at the last call of `news`; None: not called yet."""

    @property
    def graphs(self) -> int:
        """Number of graphs compiled for the block."""
        return self.body.graphs

    def news(self) -> str:
        """Return a line about graphs compiled since the last call, empty if there are none.

        The first call ends the warm-up and returns an empty line.
        """
        made = sum(part.graphs for part in (self.body, *self.loss))
        told, self.told = self.told, made
        if told is None or told == made:
            return ""
        from torch._dynamo.utils import get_compilation_metrics

        reasons = [getattr(found, "recompile_reason", None) for found in get_compilation_metrics()]
        reason = next((found for found in reversed(reasons) if found), "no reason given")
        return (
            f"torch.compile after warming up: {made - told} more graphs (of the block "
            f"{self.graphs} in all), as {' '.join(reason.split())}"
        )


def find_obstacle(device: torch.device) -> str | None:
    """Return why torch.compile fails on the device, with the remedy; None if a trial succeeds."""
    try:
        place_compile_cache()
    except UnsafeFolder as error:
        return str(error)
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            return "there is no Triton for this device; install the triton that fits this torch"
        named = os.environ.get("CC")
        if not any(shutil.which(name) for name in ([named] if named else ["gcc", "clang", "cc"])):
            return f"Triton needs a C compiler, found none ({named or 'gcc, clang'}); install one"
    else:
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except (InvalidCxxCompiler, OSError):
            named = os.environ.get("CXX", "g++, clang++")
            return f"there is no C++ compiler ({named}); install one, such as g++"
    try:
        torch.compile(lambda x: x + 1, fullgraph=True)(torch.zeros(8, device=device))
    except Exception as error:
        # A broken toolchain may raise any error: missing headers, no space for the cache, ...
        lines = [line for line in str(error).splitlines() if line.strip()]
        return f"compiling a trial failed ({lines[0] if lines else type(error).__name__})"
    return None
