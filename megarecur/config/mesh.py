"""Check whether a world size fits a config, before any process starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from megarecur.config.rule import Rule
from megarecur.config.run import Config
from megarecur.errors import MeshError


def check_world(config: Config, world: int) -> None:
    """Reject a world size that does not fit the config, before any process group is made.

    Raises:
        MeshError: names the numbers.
    """
    for rule in world_rules(world):
        if message := rule.explain(config):
            raise MeshError(message)


def world_rules(world: int) -> tuple[Rule, ...]:
    """Return the rules between a config and the number of its processes."""

    def find_remainder(c: Config) -> Mapping[str, object]:
        replica = c.parallel.replica
        return {"world": world, "replica": replica} if world % replica else {}

    def count_replicas(c: Config) -> int:
        return 0 if find_remainder(c) else world // c.parallel.replica

    return (
        Rule(
            keys=("parallel.tensor", "parallel.pipeline", "parallel.context"),
            when=find_remainder,
            reason="{world} processes do not divide into replicas of parallel.tensor="
            "{parallel.tensor} x parallel.pipeline={parallel.pipeline} x parallel.context="
            "{parallel.context} = {replica}",
            remedy="start a multiple of {replica}",
        ),
        batch_rule(count_replicas),
        shard_rule(count_replicas),
    )


def shard_rule(count_replicas: Callable[[Config], int]) -> Rule:
    """Return the rule that the shard group divides the replicas; 0 replicas break no rule."""

    def find_group(c: Config) -> Mapping[str, object]:
        replicas, group = count_replicas(c), c.parallel.shard_group
        if not replicas or group is None or replicas % group == 0:
            return {}
        fitting = [size for size in range(1, replicas + 1) if replicas % size == 0]
        return {"replicas": replicas, "fitting": ", ".join(map(str, fitting))}

    return Rule(
        keys=("parallel.shard_group",),
        when=find_group,
        reason="parallel.shard_group={parallel.shard_group} does not divide the {replicas} "
        "replicas",
        remedy="set it to one of {fitting}, or omit it",
    )


def batch_rule(count_replicas: Callable[[Config], int]) -> Rule:
    """Return the rule that the replicas divide a batch; 0 replicas break no rule."""

    def find_batch(c: Config) -> Mapping[str, object]:
        replicas = count_replicas(c)
        micro_batches = c.train.global_batch_size // c.train.micro_batch_size
        if not replicas or micro_batches % replicas == 0:
            return {}
        fitting = [size for size in range(1, micro_batches + 1) if micro_batches % size == 0]
        return {"replicas": replicas, "fitting": ", ".join(map(str, fitting))}

    return Rule(
        keys=("train.global_batch_size", "train.micro_batch_size"),
        when=find_batch,
        reason="train.global_batch_size={train.global_batch_size} does not divide into "
        "{replicas} replicas x train.micro_batch_size={train.micro_batch_size}",
        remedy="use {fitting} replica(s), or another micro batch size",
    )
