"""Vision Transformers (Dosovitskiy et al. 2021) in Hugging Face's format.

They are read only: pictures have no export in this version.
"""

from __future__ import annotations

from torch import Tensor

from megarecur.config.model import ModelConfig
from megarecur.config.run import Config
from megarecur.convert.architecture import Architecture, Entry, Names, Values, linear
from megarecur.recurrence.inventory import CLASS_TOKEN

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
"""Activations, from theirs to our `feed_forward`."""


def read_config(values: Values, problems: list[str]) -> Values:
    """Return our `model` section of a ViT's config.json."""
    return {
        "hidden_size": values.get("hidden_size"),
        "num_heads": values.get("num_attention_heads"),
        "ffn_hidden_size": values.get("intermediate_size"),
        "positions": "learned",
        "norm": "layer",
        "norm_eps": values.get("layer_norm_eps", 1e-12),
        "norm_position": "pre",
        "feed_forward": ACTIVATIONS.get(values.get("hidden_act", "gelu"), "gelu"),
        "causal": False,
        "attention_bias": "all",
        "feed_forward_bias": True,
        "dropout": values.get("hidden_dropout_prob", 0.0),
        "attention_dropout": values.get("attention_probs_dropout_prob", 0.0),
        "init_std": values.get("initializer_range", 0.02),
    }


def read_task(values: Values, problems: list[str]) -> Values:
    """Return our `task` section of a ViT's config.json."""
    names = values.get("id2label")
    classes = len(names) if isinstance(names, dict) else values.get("num_labels", 2)
    if not isinstance(classes, int) or classes < 2:
        problems.append(f"num_labels={classes!r}: only a model with 2 or more classes converts")
    channels = values.get("num_channels", 3)
    if channels not in (1, 3):
        problems.append(
            f"num_channels={channels!r} is not supported; only a model with num_channels=3 or 1 "
            "converts"
        )
    sizes = {"image_size": 224, "patch_size": 16}
    for key, default in sizes.items():
        sizes[key] = size = values.get(key, default)
        if not isinstance(size, int) or size < 1:
            problems.append(f"{key}={size!r}: must be a whole number above 0; a square converts")
    return {
        "kind": "image",
        "num_classes": classes,
        "pooling": "class_token",
        "channels": channels,
        **sizes,
    }


def refuse_to_write(model: ModelConfig, blocks: list[int]) -> Values:
    """Refuse an export."""
    raise NotImplementedError("pictures have no export")


def kernel_shape(config: Config) -> tuple[int, ...]:
    """Return the shape of the convolution that embeds patches."""
    task = config.task
    assert task is not None and task.patch_size is not None
    return config.model.hidden_size, task.num_channels, task.patch_size, task.patch_size


def count_classes(config: Config) -> int:
    """Return the rows of the classifier."""
    assert config.task is not None and config.task.num_classes is not None
    return config.task.num_classes


def logits_of(tensor: Tensor, model: ModelConfig) -> tuple[Tensor]:
    """Return our rows of the classifier, where two classes are one logit: the difference of
    theirs."""
    return (tensor[1:] - tensor[:1] if len(tensor) == 2 else tensor,)


def names(model: ModelConfig) -> Names:
    """Return the names of tensors in the files of transformers 4 and 5."""
    layer = linear("layernorm_before", "attention_norm", True)
    for part in ("query", "key", "value"):
        layer += linear(f"attention.attention.{part}", f"attention.{part}", True)
    layer += linear("attention.output.dense", "attention.output", True)
    layer += linear("layernorm_after", "feed_forward_norm", True)
    layer += linear("intermediate.dense", "feed_forward.up", True)
    layer += linear("output.dense", "feed_forward.down", True)
    hidden = model.hidden_size

    embeddings, patches = "vit.embeddings", "vit.embeddings.patch_embeddings.projection"
    first = [
        Entry(
            f"{embeddings}.cls_token",
            (CLASS_TOKEN,),
            lambda tensor, model: (tensor.flatten(),),
            shape=lambda config: (1, 1, hidden),
        ),
        Entry(
            f"{embeddings}.position_embeddings",
            ("embedding.positions",),
            lambda tensor, model: (tensor[0],),
            shape=lambda config: (1, config.num_positions, hidden),
        ),
        Entry(
            f"{patches}.weight",
            ("patches.weight",),
            lambda tensor, model: (tensor.flatten(1),),
            shape=kernel_shape,
        ),
        Entry(f"{patches}.bias", ("patches.bias",)),
    ]
    last = linear("vit.layernorm", "final_norm", True)
    last += [
        Entry(
            "classifier.weight",
            ("task.output.weight",),
            logits_of,
            shape=lambda config: (count_classes(config), hidden),
        ),
        Entry(
            "classifier.bias",
            ("task.output.bias",),
            logits_of,
            shape=lambda config: (count_classes(config),),
        ),
    ]
    return Names(
        layers="vit.encoder.layer",
        layer=layer,
        first=first,
        last=last,
        head="",
        ignored=("vit.pooler.dense.weight", "vit.pooler.dense.bias", "vit.embeddings.mask_token"),
    )


VIT = Architecture(
    model_type="vit",
    hf_class="ViTForImageClassification",
    read_config=read_config,
    read_task=read_task,
    write_config=refuse_to_write,
    wanted={},
    names=names,
    required=("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"),
    accepted={
        "hidden_act": (*ACTIVATIONS, None),
        "qkv_bias": (True, None),
        "problem_type": ("single_label_classification", None),
    },
)
