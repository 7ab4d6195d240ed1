"""Export a run's model for transformers with every block stored once: config, names, modelling
file.

`hub_model.py` is that file; it is copied unchanged into every exported folder, so that
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` finds the classes there.
Parameters keep our names and values: nothing is reordered or summed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megarecur.config.model import ModelConfig
from megarecur.config.recurrence import Loop, Looped, RecurrenceConfig, Ring
from megarecur.config.run import Config
from megarecur.errors import ConfigError
from megarecur.parallel.random import key, split_key
from megarecur.recurrence.inventory import adapter_targets, build_inventory, injection_block
from megarecur.recurrence.layer_map import LayerMap, count_uses
from megarecur.recurrence.schemes import layer_map
from megarecur.recurrence.stacks import Stack

MODELLING = "modeling_megarecur.py"
MODEL_TYPE, CONFIG_CLASS = "megarecur", "MegarecurConfig"
BASE_CLASS, MODEL_CLASS = "MegarecurModel", "MegarecurForCausalLM"

SHAPES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "init_std": "initializer_range",
    "tie_embeddings": "tie_word_embeddings",
}
"""Keys of our `model` section that have usual names in config.json."""
BLOCK = (
    "positions",
    "level_encoding",
    "rope_theta",
    "rope_interleaved",
    "rope_fraction",
    "rope_scaling_factor",
    "rope_scaling",
    "rope_theta_local",
    "xpos_scale_base",
    "norm",
    "norm_eps",
    "norm_position",
    "final_norm",
    "final_norm_eps",
    "residual",
    "parallel_residual",
    "feed_forward",
    "shared_feed_forward",
    "gate",
    "gate_hidden_size",
    "qk_norm",
    "qk_norm_over",
    "attention_scale",
    "attention_softcap",
    "logit_softcap",
    "causal",
    "sliding_window",
    "attention_types",
    "attention_bias",
    "feed_forward_bias",
    "scale_embeddings",
)
"""Keys of config.json's section `block`."""
TRAINING = ("max_positions", "dropout", "attention_dropout", "z_loss", "init_scaling")
"""Keys that do not change a trained model's computation, or are written elsewhere."""
UNLIMITED = 32768
"""max_position_embeddings for positions without an upper limit; a length that servers can
reserve."""


def modelling_code() -> bytes:
    """Return the modelling file."""
    return Path(__file__).with_name("hub_model.py").read_bytes()


def config_values(config: Config) -> dict[str, Any]:
    """Return config.json without special tokens and dtype.

    Raises:
        ConfigError: the message lists everything that the modelling file cannot express.
    """
    steps, model = layer_map(config.recurrence), config.model
    problems = find_obstacles(config, steps)
    if problems:
        raise ConfigError(
            "cannot export with shared blocks:" + "".join(f"\n  {p}" for p in problems)
        )
    resolved = model.model_dump(mode="json")
    values = describe_classes(config)
    values |= {theirs: resolved[ours] for ours, theirs in SHAPES.items()}
    loop = describe_loop(config.recurrence)
    if config.reads_memory:  # The head has its own norm.
        resolved["final_norm"] = config.has_final_norm
    values |= describe_task(config)
    return values | {
        "max_position_embeddings": count_positions(config),
        "trained_length": config.data.seq_length,
        "num_hidden_layers": len(steps),
        "layer_map": [step.block for step in steps],
        "num_loops": None if loop is None else count_loops(config.recurrence, steps),
        "loop": loop,
        "block": {key: resolved[key] for key in BLOCK},
        "adapters": describe_adapters(config),
        "levels": describe_levels(config),
        "injection": describe_injection(config, steps),
        "normalized_steps": [i for i, step in enumerate(steps) if step.normalize],
        "use_cache": not config.classifies,
    }


def describe_classes(config: Config) -> dict[str, Any]:
    """Return transformers' name of the model and the paths of its classes."""
    module = Path(MODELLING).stem
    found = {"AutoConfig": f"{module}.{CONFIG_CLASS}", "AutoModel": f"{module}.{BASE_CLASS}"}
    if config.task is None or not config.classifies:
        name = MODEL_CLASS
        found["AutoModelForCausalLM"] = f"{module}.{name}"
    else:
        of = "Token" if config.task.kind == "token" else "Sequence"
        name = f"MegarecurFor{of}Classification"
        del found["AutoModel"]
        found[f"AutoModelFor{of}Classification"] = f"{module}.{name}"
    return {"architectures": [name], "model_type": MODEL_TYPE, "auto_map": found}


def describe_task(config: Config) -> dict[str, Any]:
    """Return the additional values of a classifier."""
    if config.task is None or not config.classifies:
        return {}
    halting, temporal = config.halting, config.temporal
    task = config.task.model_dump(mode="json")
    return {
        "num_labels": config.task.num_classes,
        "task": {key: task[key] for key in ("kind", "pooling", "head_size", "augment")},
        "halting": halting and halting.model_dump(mode="json", exclude={"coefficient"}),
        "temporal": temporal and temporal.model_dump(mode="json", exclude={"backward_chunks"}),
    }


def count_positions(config: Config) -> int:
    """Return max_position_embeddings: the rows of a position table; otherwise positions have no
    upper limit, and the length of training is no reason to cut a text."""
    if config.model.max_positions is not None:
        return config.model.max_positions
    trained = config.num_positions
    return trained if config.model.positions == "learned" else max(trained, UNLIMITED)


def describe_loop(recurrence: RecurrenceConfig) -> dict[str, Any] | None:
    """Return the repeated part if the number of loops may be changed."""
    if not isinstance(recurrence, Looped):
        return None
    steps = layer_map(recurrence, 2)
    once = layer_map(recurrence, 1)
    core = len(steps) - len(once)
    prelude = recurrence.prelude if isinstance(recurrence, Loop) else 0
    return {
        "prelude": prelude,
        "core": core,
        "coda": len(once) - core - prelude,
        "reads_first": bool(steps[prelude].reads),
        "normalize": any(step.normalize for step in steps),
    }


def count_loops(recurrence: RecurrenceConfig, steps: LayerMap) -> int:
    """Return how often the map runs the repeated part."""
    once, twice = (len(layer_map(recurrence, loops)) for loops in (1, 2))
    return (len(steps) - once) // (twice - once) + 1


def describe_adapters(config: Config) -> dict[str, Any] | None:
    """Return the section `adapters`, with targets resolved."""
    if config.adapters is None:
        return None
    return config.adapters.model_dump(mode="json") | {"targets": list(adapter_targets(config))}


def describe_levels(config: Config) -> dict[str, Any] | None:
    """Return the ranks of level signals, if the scheme has levels."""
    ring = config.recurrence
    if not isinstance(ring, Ring):
        return None
    return {"rank": ring.level_rank, "feed_forward_rank": ring.feed_forward_rank}


def describe_injection(config: Config, steps: LayerMap) -> dict[str, Any] | None:
    """Return which layers' inputs are kept, each until the next, which layers read them, and
    how."""
    recurrence = config.recurrence
    # A single loop may read nothing where several loops do.
    shown = layer_map(recurrence, 2) if isinstance(recurrence, Looped) else steps
    if not any(step.reads for step in shown):
        return None
    block = injection_block(Stack("decoder", config))
    values: dict[str, Any] = {
        "kind": "add" if block is None else "linear",
        "bias": f"blocks.{block}.injection.bias" in build_inventory(config),
        "sources": [i for i, step in enumerate(steps) if step.writes],
        "steps": [i for i, step in enumerate(steps) if step.reads],
        "initial_state": "prelude",
    }
    if isinstance(recurrence, Loop):
        values["initial_state"] = recurrence.initial_state
    if values["initial_state"] == "random":
        assert isinstance(recurrence, Loop)
        values |= {
            "std": recurrence.initial_state_std,
            "seed": config.seed,
            "key": split_key(key(config.seed, 0, "initial state")),
        }
    return values


def find_obstacles(config: Config, steps: LayerMap) -> list[str]:
    """Return the values that the modelling file cannot express, by key."""
    model, recurrence, problems = config.model, config.recurrence, []
    for name, section in (("recurrence.halting", config.halting), ("temporal", config.temporal)):
        if section is not None and not config.classifies:
            problems.append(
                f"{name}: only classifiers have it in the modelling files, and this run predicts "
                "text; use it here, with `megarecur generate` and `megarecur eval`"
            )
    if config.temporal is not None and getattr(recurrence, "initial_state", "") == "random":
        problems.append(
            "recurrence.initial_state='random' with a section temporal: is not part of the "
            "modelling file"
        )
    known = {*SHAPES, *BLOCK, *TRAINING}
    for name, field in ModelConfig.model_fields.items():
        value = getattr(model, name)
        if name not in known and value != field.default:
            problems.append(
                f"model.{name}={value!r}: the modelling file does not support it; keep the model "
                "as a megarecur run"
            )
    own = (
        r"(embedding|final_norm|head|temporal|task)\.|"
        r"blocks\.\d+\.(injection|attention|feed_forward|loops|gate|memory|halting)"
    )
    for name in build_inventory(config):
        if not re.match(own, name):
            problems.append(
                f"parameter {name}: the modelling file does not support it; keep the model as a "
                "megarecur run"
            )
    return problems


def parameter_names(config: Config) -> list[str]:
    """Return the parameters that the map uses, without loops that do not run."""
    uses = count_uses(layer_map(config.recurrence))
    return [
        name
        for name, spec in build_inventory(config).items()
        if spec.loop is None or spec.block is None or spec.loop < uses[spec.block]
    ]
