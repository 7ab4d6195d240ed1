"""Export a run's model for transformers with every block stored once: config, names, modelling
file.

`hub_model.py` is that file; it is copied unchanged into every exported folder, so that
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` finds the classes there, or
`AutoModelForSeq2SeqLM` those of an encoder-decoder. Parameters keep their values: nothing is
reordered or summed. They keep our names, but those of an encoder are in a module `encoder`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megarecur.config.model import ModelConfig
from megarecur.config.recurrence import Loop, Looped, RecurrenceConfig, Ring
from megarecur.config.run import Config
from megarecur.errors import ConfigError
from megarecur.model.runner import initial_site
from megarecur.parallel.random import key, split_key
from megarecur.recurrence.inventory import (
    EMBEDDINGS,
    ENCODER_NORM,
    adapter_targets,
    build_inventory,
    has_injection_bias,
    injection_block,
)
from megarecur.recurrence.layer_map import LayerMap, count_uses
from megarecur.recurrence.schemes import build_map, layer_map
from megarecur.recurrence.stacks import Stack, list_stacks

MODELLING = "modeling_megarecur.py"
MODEL_TYPE, CONFIG_CLASS = "megarecur", "MegarecurConfig"
BASE_CLASS, MODEL_CLASS = "MegarecurModel", "MegarecurForCausalLM"
PAIR_CLASS = "MegarecurForConditionalGeneration"
CARD = "README.md"

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
    "sinusoid_layout",
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
    "head_bias",
    "scale_embeddings",
)
"""Keys of config.json's section `block`."""
TRAINING = ("max_positions", "dropout", "attention_dropout", "z_loss", "init_scaling", "tie",
            "source_vocab_size")  # fmt: skip
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
    stack, model = list_stacks(config)[-1], config.model
    problems = find_obstacles(config)
    if problems:
        raise ConfigError(
            "cannot export with shared blocks:" + "".join(f"\n  {p}" for p in problems)
        )
    resolved = model.model_dump(mode="json")
    values = describe_classes(config)
    values |= {theirs: resolved[ours] for ours, theirs in SHAPES.items()}
    if config.reads_memory:  # The head has its own norm.
        resolved["final_norm"] = config.has_final_norm
    values |= describe_task(config) | describe_map(stack)
    if config.encoder is not None:
        values |= {"encoder": describe_encoder(config), "is_encoder_decoder": True}
    return values | {
        "max_position_embeddings": count_positions(config),
        "trained_length": config.data.seq_length,
        "block": {key: resolved[key] for key in BLOCK},
        "adapters": describe_adapters(config),
        "use_cache": not config.classifies,
    }


def describe_map(stack: Stack) -> dict[str, Any]:
    """Return the values of one stack's layers; its blocks are numbered from 0."""
    recurrence = stack.recurrence
    steps, loop = layer_map(recurrence), describe_loop(recurrence)
    return {
        "num_hidden_layers": len(steps),
        "layer_map": [step.block for step in steps],
        "num_loops": None if loop is None else count_loops(recurrence, steps),
        "loop": loop,
        "levels": describe_levels(recurrence),
        "injection": describe_injection(stack, steps),
        "normalized_steps": [i for i, step in enumerate(steps) if step.normalize],
    }


def describe_encoder(config: Config) -> dict[str, Any]:
    """Return the values that the encoder of an encoder-decoder has of its own."""
    model = config.model
    rows = model.source_vocab_size if config.separate_source else None
    own = {
        "vocab_size": rows or model.vocab_size,
        "shared_embedding": not config.separate_source,
    }
    return own | describe_map(list_stacks(config)[0])


def describe_classes(config: Config) -> dict[str, Any]:
    """Return transformers' name of the model and the paths of its classes."""
    module = Path(MODELLING).stem
    found = {"AutoConfig": f"{module}.{CONFIG_CLASS}", "AutoModel": f"{module}.{BASE_CLASS}"}
    if config.encoder is not None:
        name = PAIR_CLASS
        del found["AutoModel"]
        found["AutoModelForSeq2SeqLM"] = f"{module}.{name}"
    elif config.task is None or not config.classifies:
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


def describe_levels(ring: RecurrenceConfig) -> dict[str, Any] | None:
    """Return the ranks of level signals, if the scheme has levels."""
    if not isinstance(ring, Ring):
        return None
    return {"rank": ring.level_rank, "feed_forward_rank": ring.feed_forward_rank}


def describe_injection(stack: Stack, steps: LayerMap) -> dict[str, Any] | None:
    """Return which layers' inputs are kept, each until the next, which layers read them, and
    how."""
    recurrence = stack.recurrence
    # A single loop may read nothing where several loops do.
    shown = layer_map(recurrence, 2) if isinstance(recurrence, Looped) else steps
    if not any(step.reads for step in shown):
        return None
    block = injection_block(stack)
    values: dict[str, Any] = {
        "kind": "add" if block is None else "linear",
        "bias": block is not None and has_injection_bias(recurrence),
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
            "seed": stack.config.seed,
            "key": split_key(key(stack.config.seed, 0, initial_site(stack))),
        }
    return values


def find_obstacles(config: Config) -> list[str]:
    """Return the values that the modelling file cannot express, by key."""
    model, recurrence, problems = config.model, config.recurrence, []
    sections = {"recurrence.halting": config.halting, "temporal": config.temporal}
    if config.encoder is not None:
        sections = {"encoder.halting": list_stacks(config)[0].config.halting, **sections}
    command = "generate" if config.encoder is None else "translate"
    for name, section in sections.items():
        if section is not None and not config.classifies:
            problems.append(
                f"{name}: only classifiers have it in the modelling files, and this run predicts "
                f"text; use it here, with `megarecur {command}` and `megarecur eval`"
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
        rf"({'|'.join(EMBEDDINGS)}|{ENCODER_NORM}|final_norm|head|temporal|task)\.|"
        r"blocks\.\d+\.(injection|attention|cross_attention|feed_forward|loops|gate|memory|halting)"
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
    uses = count_uses(build_map(config))
    return [
        name
        for name, spec in build_inventory(config).items()
        if spec.loop is None or spec.block is None or spec.loop < uses[spec.block]
    ]


def hub_name(config: Config, name: str) -> str:
    """Return the name of a parameter in the modelling file: that of a decoder's in a model without
    an encoder, and `encoder.` before that of an encoder's."""
    if config.encoder is None:
        return name
    part, _, rest = name.partition(".")
    if part == EMBEDDINGS[0]:
        return f"encoder.{EMBEDDINGS[1]}.{rest}"
    if part == ENCODER_NORM:
        return f"encoder.final_norm.{rest}"
    if part != "blocks":
        return name
    number, _, rest = rest.partition(".")
    above = int(number) - config.encoder.num_blocks
    return f"encoder.blocks.{number}.{rest}" if above < 0 else f"blocks.{above}.{rest}"


def model_card(config: Config, name: str) -> str:
    """Return a model card: what an encoder-decoder is, and how to translate with it."""
    assert config.encoder is not None
    stacks = [
        f"- {stack.name}: {stack.recurrence.kind}, {len(layer_map(stack.recurrence))} layers of "
        f"{stack.recurrence.num_blocks} blocks"
        for stack in list_stacks(config)
    ]
    return CARD_TEXT.format(name=name, stacks="\n".join(stacks))


CARD_TEXT = """# {name}

An encoder-decoder whose layers share blocks, trained with megarecur.

{stacks}

```python
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)
model = AutoModelForSeq2SeqLM.from_pretrained("FOLDER", trust_remote_code=True)
found = model.generate(**tokenizer(["A sentence."], padding=True, return_tensors="pt"))
print(tokenizer.batch_decode(found, skip_special_tokens=True))
```

`generate` searches with a beam of 4, as `megarecur translate --beam 4 --penalty fairseq
--length-penalty 1.0` does; `num_beams`, `length_penalty` and `max_new_tokens` change that.
"""
"""The model card of an encoder-decoder; FOLDER is the exported folder or its name on the Hub."""
