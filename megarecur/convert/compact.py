"""A run's model for transformers with every block stored once: config.json, names, modelling file.

`hub_model.py` is that file; it goes into every exported folder as it is, so that
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` finds the classes there.
Parameters keep our names, and are used as they are: nothing is reordered or added up.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megarecur.config.schema import Config, Loop, ModelConfig, Ring
from megarecur.errors import ConfigError
from megarecur.recurrence.inventory import adapter_targets, build_inventory, injection_block
from megarecur.recurrence.layer_map import LayerMap, count_uses
from megarecur.recurrence.schemes import layer_map

MODELLING = "modeling_megarecur.py"
MODEL_TYPE, MODEL_CLASS, CONFIG_CLASS = "megarecur", "MegarecurForCausalLM", "MegarecurConfig"

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
"""Keys of our `model` section that config.json has under usual names."""
BLOCK = (
    "positions",
    "rope_theta",
    "rope_interleaved",
    "rope_fraction",
    "rope_scaling_factor",
    "rope_theta_local",
    "norm",
    "norm_eps",
    "norm_position",
    "parallel_residual",
    "feed_forward",
    "qk_norm",
    "attention_scale",
    "attention_softcap",
    "logit_softcap",
    "sliding_window",
    "attention_types",
    "attention_bias",
    "feed_forward_bias",
    "scale_embeddings",
)
"""Keys that its section `block` has."""
REFUSED = (
    "causal",
    "level_encoding",
    "xpos_scale_base",
    "final_norm",
    "final_norm_eps",
    "residual",
    "shared_feed_forward",
    "gate",
    "gate_hidden_size",
)
"""Keys that it lacks: a model with other values than their defaults is refused."""
TRAINING = ("max_positions", "dropout", "attention_dropout", "z_loss", "init_scaling")
"""Keys that change nothing that a trained model computes, or are written otherwise."""


def modelling_code() -> bytes:
    """The modelling file."""
    return Path(__file__).with_name("hub_model.py").read_bytes()


def config_values(config: Config) -> dict[str, Any]:
    """config.json, special tokens and dtype apart.

    Raises:
        ConfigError: naming everything that the modelling file cannot express.
    """
    steps, model = layer_map(config.recurrence), config.model
    problems = find_obstacles(config, steps)
    if problems:
        raise ConfigError(
            "cannot export with shared blocks:" + "".join(f"\n  {p}" for p in problems)
        )
    values: dict[str, Any] = {
        "architectures": [MODEL_CLASS],
        "model_type": MODEL_TYPE,
        "auto_map": {
            "AutoConfig": f"{Path(MODELLING).stem}.{CONFIG_CLASS}",
            "AutoModelForCausalLM": f"{Path(MODELLING).stem}.{MODEL_CLASS}",
        },
    }
    resolved = model.model_dump(mode="json")
    values |= {theirs: resolved[ours] for ours, theirs in SHAPES.items()}
    return values | {
        "max_position_embeddings": model.max_positions or config.data.seq_length,
        "num_hidden_layers": len(steps),
        "layer_map": [step.block for step in steps],
        "block": {key: resolved[key] for key in BLOCK},
        "adapters": describe_adapters(config),
        "injection": describe_injection(config, steps),
        "normalized_steps": [i for i, step in enumerate(steps) if step.normalize],
        "use_cache": True,
    }


def describe_adapters(config: Config) -> dict[str, Any] | None:
    """The section `adapters`, targets resolved."""
    if config.adapters is None:
        return None
    return config.adapters.model_dump(mode="json") | {"targets": list(adapter_targets(config))}


def describe_injection(config: Config, steps: LayerMap) -> dict[str, Any] | None:
    """Which layer's input is kept, which layers read it, and how."""
    readers = [i for i, step in enumerate(steps) if step.reads]
    if not readers:
        return None
    recurrence = config.recurrence
    return {
        "kind": "add" if injection_block(recurrence) is None else "linear",
        "source": next(i for i, step in enumerate(steps) if step.writes),
        "steps": readers,
        "initial_state": recurrence.initial_state if isinstance(recurrence, Loop) else "prelude",
    }


def find_obstacles(config: Config, steps: LayerMap) -> list[str]:
    """What the modelling file cannot express, by key and value."""
    model, recurrence, problems = config.model, config.recurrence, []
    if isinstance(recurrence, Loop) and recurrence.initial_state == "random":
        problems.append(
            "recurrence.initial_state='random': numbers drawn by (seed, sample, position) are not "
            "part of the modelling file; only 'zero' and 'prelude' can be exported"
        )
    if isinstance(recurrence, Ring):
        problems.append(
            "recurrence.kind='ring': norms and signals of levels are not part of the modelling file"
        )
    if model.positions == "xpos":
        problems.append("model.positions='xpos': is not part of the modelling file")
    if any(step.stack != "decoder" for step in steps):
        problems.append(f"recurrence.kind={recurrence.kind!r}: has more than a decoder")
    known = {*SHAPES, *BLOCK, *TRAINING}
    for key, field in ModelConfig.model_fields.items():
        value = getattr(model, key)
        if key not in known and value != field.default:
            problems.append(f"model.{key}={value!r}: is not part of the modelling file")
    own = r"(embedding|final_norm|head)\.|blocks\.\d+\.(injection|attention|feed_forward|loops)"
    for name in build_inventory(config):
        if not re.match(own, name):
            problems.append(f"parameter {name}: has no place in the modelling file")
    return problems


def parameter_names(config: Config) -> list[str]:
    """Of what the map uses: loops that do not run leave nothing behind."""
    uses = count_uses(layer_map(config.recurrence))
    return [
        name
        for name, spec in build_inventory(config).items()
        if spec.loop is None or spec.block is None or spec.loop < uses[spec.block]
    ]
