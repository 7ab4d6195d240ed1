"""torch.compile of the block: one graph for all blocks, all loops and all depths.

Compiled is `Block.body`, in training: a function of tensors alone, weights included, so that blocks
of one shape share a graph. A second graph serves loops without gradient (where parameters are
frozen, one more each pattern of them). The two passes of the loss over the logits are compiled
apart. Injection, measures of the residual stream, embedding and head
stay outside; evaluation and generation run eagerly.

Torch's compiler, which takes seconds to import, is imported when something is compiled.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from megarecur.model.block import Block
from megarecur.model.transformer import Transformer
from megarecur.parallel.loss import LossKernels, differentiate_fused, summarize_fused

Backend = Callable[[fx.GraphModule, Sequence[Tensor]], Callable[..., Any]]


MOST_GRAPHS = 64
"""Of one function; beyond that torch refuses. Patterns of frozen parameters may need some."""


class Compiled:
    """A function, compiled whenever it meets a new kind of input; counts its graphs.

    Args:
        function: of tensors, and of objects that hold tensors.
        backend: makes code of a graph. None: Inductor.
    """

    def __init__(self, function: Callable[..., Any], backend: Backend | None = None) -> None:
        self.graphs = 0
        """Made so far, in this process."""
        self.backend = backend

        def call(*args: Any) -> Any:
            return function(*args)

        torch._dynamo.config.recompile_limit = MOST_GRAPHS
        # Torch keeps graphs, and limits their number, by code object: each of these has its own.
        call.__code__ = call.__code__.replace()
        # A break in the graph is an error; sizes are constants, as those of training are.
        self.compiled = torch.compile(call, backend=self.make, fullgraph=True, dynamic=False)

    def make(self, graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        """Called by torch for every new graph."""
        self.graphs += 1
        if self.backend is not None:
            return self.backend(graph, inputs)
        from torch._inductor.compile_fx import compile_fx

        code: Any = compile_fx(graph, inputs)
        return code

    def __call__(self, *args: Any) -> Any:
        """As the function."""
        return self.compiled(*args)


class CompiledModel:
    """Compiled parts of a model: one body for all blocks, and the loss."""

    def __init__(self, model: Transformer, backend: Backend | None = None) -> None:
        self.body = Compiled(Block.body, backend)
        self.loss = Compiled(summarize_fused, backend), Compiled(differentiate_fused, backend)
        for block in model.stack.blocks.values():
            assert isinstance(block, Block)
            block.compiled = self.body
        model.loss_kernels = LossKernels(*self.loss)
        config = model.config
        # Blocks that see a window have a mask; so that one graph serves them and others, all have.
        slides = config.model.sliding_window is not None
        model.always_mask = config.data.mask_documents or slides
        self.told: int | None = None
        """Graphs that `news` has told about."""

    @property
    def graphs(self) -> int:
        """Made so far for the block."""
        return self.body.graphs

    def news(self) -> str:
        """A line about graphs made since this was last called; none the first time: warming up."""
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
    """Why torch.compile cannot work here, and the remedy; None when a trial succeeds."""
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
        # Whatever a broken toolchain may raise: missing headers, no room for the cache, ...
        lines = [line for line in str(error).splitlines() if line.strip()]
        return f"compiling a trial failed ({lines[0] if lines else type(error).__name__})"
    return None
