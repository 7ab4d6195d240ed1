"""ZeRO 1, 2 and 3 (Rajbhandari et al. 2020) by DeepSpeed, for `parallel.zero_engine: deepspeed`.

DeepSpeed runs in fp32 throughout: our `Weight` owns the copies in the compute dtype. No other file
imports deepspeed, and this one does so only when an engine is built.
"""

from __future__ import annotations

import atexit
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megarecur.config.run import Config
from megarecur.errors import ConfigError
from megarecur.model.runner import ChunkedRunner, Runner
from megarecur.model.transformer import Transformer
from megarecur.optim.engine import (
    ADAMW_MOMENTS,
    UPDATES,
    Gradients,
    Outputs,
    flat_shard,
    is_partial,
    sum_over_holders,
    sum_partial,
)
from megarecur.optim.groups import build_groups
from megarecur.parallel.linear import Weight
from megarecur.parallel.mesh import Mesh, same_error
from megarecur.parallel.shards import TensorShard, whole
from megarecur.recurrence.inventory import check_patterns, is_frozen
from megarecur.recurrence.layer_map import Step

DEEPSPEED = "0.19.8"
"""The only supported version; this file relies on its internals."""
BUCKET = 50_000_000
"""Maximum elements that one call reduces, or prefetches (fp32: 200 MB)."""


@dataclass(frozen=True)
class Piece:
    """The part of one parameter that this rank owns: elements [start, stop) of its tensor-parallel
    rank's part, stored one-dimensionally."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    values: Tensor
    moments: dict[str, Tensor]


class DeepSpeedEngine:
    """The engine that shards optimizer state (stage 1), gradients (2) and parameters (3) over
    replicas."""

    def __init__(self, model: Transformer, config: Config, mesh: Mesh) -> None:
        with same_error(mesh):
            check_deepspeed(config)
        check_patterns(config.optimizer, model.inventory)
        self.model, self.mesh, self.stage = model, mesh, config.parallel.zero_stage
        self.offload = config.parallel.offload_optimizer
        train = config.train
        self.num_microbatches = train.global_batch_size // (mesh.readers * train.micro_batch_size)
        self.accumulated = 1 if mesh.pp > 1 else self.num_microbatches
        """Backward passes that DeepSpeed counts. Their number differs over pipeline ranks, so there
        DeepSpeed does not count them and reduces once."""
        self.loss_scale = float(self.accumulated * mesh.dp)
        """DeepSpeed divides by both; our objective is a sum over micro batches and replicas."""
        self.reduction = ExitStack()
        """With a pipeline, open from a step's first backward pass to its reduction."""
        self.shapes = {n: tuple(p.shape) for n, p in model.parameters_by_name.items()}
        self.trained: dict[str, Any] = {}
        """Trained parameters by name; `Any`, because DeepSpeed adds attributes to parameters."""
        self.summed: set[Any] = set()
        """Parameters whose gradient is summed over tensor-parallel ranks."""
        for name, parameter in model.parameters_by_name.items():
            parameter.requires_grad_(not is_frozen(config.optimizer, name))
            if parameter.requires_grad:
                self.trained[name] = parameter
                self.share(name, parameter)
        with same_error(mesh):
            if not self.trained:
                raise ConfigError(
                    f"parallel.zero_stage={self.stage}: every parameter of pipeline rank "
                    f"{mesh.pp_rank} is frozen; set zero_stage to 0, or place a trained block there"
                )
        ndims = {name: len(shape) for name, shape in self.shapes.items()}
        client = torch.optim.AdamW(
            build_groups(config.optimizer, model.parameters_by_name, ndims),
            config.optimizer.lr,
            config.optimizer.betas,
            config.optimizer.eps,
            fused=True,
        )
        deepspeed = import_deepspeed(mesh)
        if self.stage == 3:
            kinds = list({type(runner) for runner in model.runners()})
            deepspeed.utils.set_z3_leaf_modules(model, kinds)
            assert model.entry is not None
            model.entry.register_forward_pre_hook(self.start_of_pass)
            for runner in model.runners():
                anchor_runner(runner, mesh.device)
        self.engine, self.optimizer, *_ = deepspeed.initialize(
            model=model,
            model_parameters=list(self.trained.values()),
            optimizer=client,
            config=self.describe(config),
            mpu=Groups(mesh),
        )
        if self.stage < 3 and not self.offload:
            self.drop_masters()
        self.groups = client.param_groups
        self.state = client.state
        self.flats: list[Tensor] = (
            self.optimizer.fp32_partitioned_groups_flat
            if self.stage == 3
            else self.optimizer.single_partition_of_fp32_groups
        )
        for flat in self.flats:
            self.state[flat] = {moment: torch.zeros_like(flat) for moment in ADAMW_MOMENTS}
            self.state[flat]["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        if self.stage == 3:
            for weight in model.weights():
                weight.transient = True
                free_copy_with(weight)
        self.buffer: Tensor | None = None
        """With stage 1 or a pipeline, every `.grad` is a view of this buffer until gradients are
        reduced, so that uses add in place. Otherwise DeepSpeed needs autograd's hooks for that."""
        if self.stage == 1 or mesh.pp > 1:
            size = sum(p.numel() for p in self.trained.values())
            self.buffer = torch.zeros(size, device=mesh.device)
            for weight in model.weights():
                hooked = weight.parameter in self.summed and mesh.pp == 1
                weight.sum_in_place = weight.parameter.requires_grad and not hooked
        self.updates = torch.zeros(1, dtype=torch.float32)
        self.done = 0
        """Backward passes of this step; with a pipeline, all of them from the first one on."""
        self.reduced = False
        model.refresh()

    def share(self, name: str, parameter: Any) -> None:
        """Mark tensor-parallel shards for DeepSpeed, since otherwise the norm is silently wrong;
        and sum partial gradients over tensor parallelism before DeepSpeed sees them."""
        spec, tp = self.model.inventory[name], self.model.tp
        holders = spec.holders(tp.size)
        # Unmarked parameters count on the first rank alone, so one of several holders is marked.
        parameter.model_parallel = spec.cut is not None and tp.rank % holders == 0
        if is_partial(spec, tp):
            self.summed.add(parameter)
            if self.mesh.pp == 1:
                parameter.register_hook(
                    lambda gradient: sum_over_holders([(gradient, spec)], tp)[0].contiguous()
                )
        if name == self.model.tied and self.model.tied_peer < self.mesh.pp_rank:
            parameter.ds_pipe_replicated = True  # counted on the other rank

    def describe(self, config: Config) -> dict[str, Any]:
        """Build DeepSpeed's configuration from ours."""
        sizes = [math.prod(self.shapes[name]) for name in self.trained]
        bucket = min(BUCKET, sum(sizes) + 1) // 2 * 2
        vectors = [math.prod(shape) for shape in self.shapes.values() if len(shape) < 2]
        zero: dict[str, Any] = {
            "stage": self.stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "overlap_comm": self.mesh.device.type == "cuda",
            "contiguous_gradients": self.stage == 2,
        }
        if self.offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        if self.stage == 3:
            zero |= {
                "stage3_prefetch_bucket_size": bucket,
                # Norms and biases are small, so they stay whole.
                "stage3_param_persistence_threshold": max(vectors, default=0),
                # It would replace torch's linear function globally and permanently.
                "memory_efficient_linear": False,
            }
        return {
            "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
            "gradient_accumulation_steps": self.accumulated,
            "gradient_clipping": config.optimizer.clip_norm or 0.0,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": zero,
        }

    def drop_masters(self) -> None:
        """Alias the fp32 masters of stages 1 and 2, since the parameters are fp32 already."""
        masters = self.optimizer.single_partition_of_fp32_groups
        for master, parts in zip(
            masters, self.optimizer.parallel_partitioned_bit16_groups, strict=True
        ):
            master.data = parts[self.mesh.dp_rank]
        self.optimizer._link_all_hp_params()

    def start_of_pass(self, *_: Any) -> None:
        """In stage 3, let DeepSpeed learn the order of gathers from each pass for the next."""
        self.optimizer.parameter_offload.get_param_coordinator().reset_step()

    def expect(self, stages: Iterable[Sequence[Step]], num_microbatches: int) -> None:
        """Announce backward passes, which DeepSpeed counts itself."""

    def gradient_bytes(self) -> int:
        """Return the bytes of gradients in `.grad`; DeepSpeed hides its own buffers."""
        grads = [parameter.grad for parameter in self.trained.values()]
        return sum(grad.nbytes for grad in grads if grad is not None)

    def backward(self, outputs: Outputs, gradients: Gradients = None) -> None:
        """Add the gradient of a micro batch's share of the objective."""
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        gradients = gradients or [None] * len(outputs)
        scaled = [
            output * self.loss_scale if gradient is None else output
            for output, gradient in zip(outputs, gradients, strict=True)
        ]
        if self.mesh.pp > 1:
            self.open_reduction()
            torch.autograd.backward(scaled, gradients)
            return
        assert self.done < self.num_microbatches, "gradients() ends a step's backward passes"
        if self.done == 0:
            self.forget_gradients()
        self.done += 1
        self.engine.set_gradient_accumulation_boundary(self.done == self.num_microbatches)
        self.optimizer.clear_backward_seen_flag()
        if self.stage == 1:
            self.optimizer.setup_buckets()  # otherwise left to a hook, and none may run
        (loss,) = scaled
        self.engine.backward(loss)

    def open_reduction(self) -> None:
        """With a pipeline, keep DeepSpeed from reducing before the step's last backward pass is
        done."""
        if self.done == 0:
            self.forget_gradients()
            self.reduction.enter_context(self.engine.coalesce_grad_reduction())
            self.done = self.num_microbatches

    def reduce(self) -> None:
        """With a pipeline, sum gradients over all ranks that hold the same parameters, once per
        step."""
        if self.mesh.pp == 1 or self.reduced:
            return
        self.open_reduction()  # no stage of this rank had a backward pass
        sum_partial(self.trained, self.model)
        if self.model.tied in self.trained:
            gradient = self.trained[self.model.tied].grad
            gradient += self.mesh.exchange(gradient, self.model.tied_peer)
        self.reduction.close()
        self.reduced = True

    def forget_gradients(self) -> None:
        """Zero the gradients of the last step, because this step may not use all parameters."""
        if self.buffer is not None:
            pieces = self.buffer.zero_().split([p.numel() for p in self.trained.values()])
            for parameter, piece in zip(self.trained.values(), pieces, strict=True):
                parameter.grad = piece.view_as(parameter)
        if self.stage == 3:
            self.optimizer.grad_partitions_flat_buffer.zero_()
        elif self.offload:
            for flat in self.flats:
                assert flat.grad is not None
                flat.grad.zero_()

    def gradients(self) -> dict[str, Tensor]:
        """Return copies of raw gradients by global name, summed over replicas. Collective."""
        from deepspeed.utils import safe_get_full_grad

        self.reduce()
        assert self.done == self.num_microbatches, "gradients are reduced with the last micro batch"
        return {name: safe_get_full_grad(p).clone() for name, p in self.trained.items()}

    def step(self, lr: float) -> tuple[float, bool]:
        """Clip, update and gather. Returns (global norm before clipping, skipped because not
        finite)."""
        self.reduce()
        assert self.done == self.num_microbatches, "a step ends with its last micro batch"
        for group in self.groups:
            group["lr"] = lr * group["lr_multiplier"]
        self.engine.step()
        self.done, self.reduced = 0, False
        skipped = bool(self.optimizer.overflow)
        if not skipped:
            self.updates += 1
            self.align_tied()
            self.model.refresh()
        return float(self.engine.get_global_grad_norm()), skipped

    def align_tied(self) -> None:
        """Copy the embedding's table to the head if both are tied: their gradients were summed over
        replicas at different places of a buffer, so their last bits differ."""
        table = self.trained.get(self.model.tied)
        if table is not None:
            other = self.mesh.exchange(table.detach(), self.model.tied_peer)
            if self.model.tied_peer < self.mesh.pp_rank:
                table.data.copy_(other)

    def pieces(self) -> Iterator[tuple[str, Piece]]:
        """Yield the part of every trained parameter that this rank owns."""
        for name, parameter in self.trained.items():
            shape, start, stop = self.shapes[name], 0, 0
            flat, offset = self.flats[0], 0
            if self.stage == 3:
                size = parameter.partition_numel()
                group, offset, _ = self.optimizer.grad_position[
                    self.optimizer.get_param_id(parameter)
                ]
                flat = self.flats[group]
                start = min(size * self.mesh.dp_rank, math.prod(shape))
                stop = min(start + size, math.prod(shape))
            elif parameter._hp_mapping is not None:
                mapping = parameter._hp_mapping
                flat = self.flats[mapping.param_group_index]
                offset = mapping.hp_fragment_address.start
                start = mapping.lp_fragment_address.start
                stop = start + mapping.lp_fragment_address.numel
            part = slice(offset, offset + stop - start)
            moments = {moment: self.state[flat][moment][part] for moment in ADAMW_MOMENTS}
            yield name, Piece(name, shape, start, stop, flat.detach()[part], moments)

    def shards(self) -> dict[str, TensorShard]:
        """Return checkpoint entries; they alias the live tensors. Nothing is gathered."""
        entries: dict[str, TensorShard] = {}
        for name, piece in self.pieces():
            entries[name] = self.cut(piece, piece.values)
            for moment, values in piece.moments.items():
                entries[f"{moment}.{name}"] = self.cut(piece, values)
        for name, parameter in self.model.parameters_by_name.items():
            if name not in self.trained:
                entries[name] = self.frozen_shard(name, parameter)
        entries[UPDATES] = whole(self.updates)
        return entries

    def frozen_shard(self, name: str, parameter: Any) -> TensorShard:
        """Return the entry of a frozen parameter: a piece at stage 3, otherwise all of it."""
        if self.stage < 3:
            return self.model.shard(name, parameter.detach())
        shape, values = self.shapes[name], parameter.ds_tensor.detach()
        start = min(values.numel() * self.mesh.dp_rank, math.prod(shape))
        stop = min(start + values.numel(), math.prod(shape))
        return self.cut(Piece(name, shape, start, stop, values, {}), values)

    def cut(self, piece: Piece, values: Tensor) -> TensorShard:
        """Return values of a piece as rectangles of the whole tensor, without copying."""
        return flat_shard(
            self.model, self.mesh, piece.name, piece.shape, piece.start, piece.stop, values
        )

    def load(self, shards: dict[str, TensorShard]) -> None:
        """Load entries of `shards()` that were filled from a checkpoint. Collective."""
        for flat in self.flats:
            self.state[flat]["step"].fill_(self.updates.item())
        if self.stage == 3:
            self.optimizer._partition_all_parameters()
            for group in range(len(self.flats)):
                self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
        else:
            self.optimizer.update_lp_params()
        self.model.refresh()


@cache
def group_of_one(world: Any, rank: int) -> Any:
    """Return a group of this process alone, one per world. Torch names such groups by ranks and
    number, which repeats once other groups have ended."""
    return dist.new_group([rank], use_local_synchronization=True)


class Groups:
    """The mesh as DeepSpeed's `mpu`."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        alone = None
        if mesh.dp_group is None or mesh.tp_group is None or mesh.replica_group is None:
            alone = group_of_one(dist.group.WORLD, dist.get_rank())
        self.dp_group = mesh.dp_group if mesh.dp_group is not None else alone
        self.tp_group = mesh.tp_group if mesh.tp_group is not None else alone
        self.replica_group = mesh.replica_group if mesh.replica_group is not None else alone

    def get_data_parallel_group(self) -> Any:
        """Return the processes that share the optimizer's state."""
        return self.dp_group

    def get_data_parallel_world_size(self) -> int:
        """Return the number of processes in the data-parallel group."""
        return self.mesh.dp

    def get_data_parallel_rank(self) -> int:
        """Return this process's rank in the data-parallel group."""
        return self.mesh.dp_rank

    def get_model_parallel_group(self) -> Any:
        """Return all processes of a replica."""
        return self.replica_group

    def get_model_parallel_world_size(self) -> int:
        """Return the number of processes of a replica."""
        return self.mesh.pp * self.mesh.tp

    def get_model_parallel_rank(self) -> int:
        """Return this process's rank in its replica."""
        return self.mesh.pp_rank * self.mesh.tp + self.mesh.tp_rank

    def get_tensor_model_parallel_group(self) -> Any:
        """Return the processes that share each matrix."""
        return self.tp_group

    def get_tensor_model_parallel_world_size(self) -> int:
        """Return the number of processes that share each matrix."""
        return self.mesh.tp

    def get_tensor_model_parallel_rank(self) -> int:
        """Return this process's tensor-parallel rank."""
        return self.mesh.tp_rank

    def get_pipeline_model_parallel_world_size(self) -> int:
        """Return the number of pipeline ranks of a replica."""
        return self.mesh.pp


# ------------------------------------------------------------------- DeepSpeed, missing and present


def check_deepspeed(config: Config) -> None:
    """Reject a missing or unsupported version of DeepSpeed.

    Raises:
        ConfigError: the message names the extra to install.
    """
    stage = config.parallel.zero_stage
    try:
        found = version("deepspeed")
    except PackageNotFoundError:
        found = "none"
    if found != DEEPSPEED:
        raise ConfigError(
            f"parallel.zero_stage={stage} needs deepspeed {DEEPSPEED}, found {found}; "
            "pip install 'megarecur[zero]', or set parallel.zero_stage=0"
        )


def import_deepspeed(mesh: Mesh) -> Any:
    """Import the library for this process's device and group, without compilation and with little
    logging."""
    device = mesh.device.type
    # DeepSpeed asks for these even in a single process.
    os.environ.setdefault("LOCAL_RANK", str(mesh.device.index or 0))
    os.environ["DS_ACCELERATOR"] = device
    if not dist.is_initialized():
        open_own_group(device)
    import deepspeed
    import deepspeed.ops

    # Otherwise DeepSpeed tests what could be compiled, and compiles a collective never used here.
    deepspeed.ops.__compatible_ops__ = {}
    # DeepSpeed imports its Muon to check that the optimizer is another one. Its compilation would
    # import all of torch's compiler (1.4 s, 45 MB).
    from deepspeed.runtime import compiler

    kept, compiler.compile = compiler.compile, lambda: lambda function: function
    import deepspeed.runtime.zero.muon.muon_optimizer

    compiler.compile = kept
    # torch warns at every collective of stage 3
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    return deepspeed


def open_own_group(device: str) -> None:
    """Open a process group of this process alone, without addresses, until it ends."""
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())


# --------------------------------------------------------------------- stage 3 and shared blocks


class _Join(torch.autograd.Function):
    """Return x; `other` takes part in the graph with gradient 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, other: Tensor) -> Tensor:
        ctx.like = other.new_empty(0)
        ctx.shape = other.shape
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], ctx.like.new_zeros(()).expand(ctx.shape)


def anchor_runner(runner: Runner | ChunkedRunner, device: torch.device) -> None:
    """Make the gradient of the runner's input the last thing its backward pass computes, always.

    DeepSpeed reduces a leaf's gradients when that of its input is ready. With a frozen embedding
    the input has none, and with truncated loops no path may lead back to it. The runner's gradients
    would then be reduced too early or not at all. Register before DeepSpeed's own hooks.
    """
    anchor = torch.zeros((), device=device, requires_grad=True)

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not torch.is_grad_enabled():
            return None
        steps, x, *rest = args
        return (steps, _Join.apply(x, anchor), *rest)  # type: ignore[no-untyped-call]

    def after(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        joined: Tensor = _Join.apply(output, args[1])  # type: ignore[no-untyped-call]
        return joined

    runner.register_forward_pre_hook(before)
    runner.register_forward_hook(after)


def free_copy_with(weight: Weight) -> None:
    """Discard the compute copy whenever DeepSpeed releases the gathered parameter."""
    parameter: Any = weight.parameter
    let_go: Callable[..., None] = parameter.partition

    def partition(*args: Any, **kwargs: Any) -> None:
        weight.refresh()
        let_go(*args, **kwargs)

    parameter.partition = partition
