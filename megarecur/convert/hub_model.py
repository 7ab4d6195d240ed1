"""A Transformer whose layers share blocks, for transformers; exported folders carry this file.

    model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
    model.generate(**tokenizer("def f(", return_tensors="pt"), max_new_tokens=50)

It needs only transformers (4.57 or later) and torch, not the code that trained the model. Every
block is stored and held once. `layer_map` lists the block that each layer runs, so depth (and the
cache of keys and values, with an entry per layer) may be many times the number of blocks.
Classifiers are AutoModelForSequenceClassification or AutoModelForTokenClassification:

    model(**tokenizer(texts, padding=True, return_tensors="pt")).logits

Encoder-decoders are AutoModelForSeq2SeqLM. Their encoder is a model of the same blocks, and each
block of the decoder attends to its output too:

    model.generate(**tokenizer(sentences, padding=True, return_tensors="pt"), num_beams=4)

Shapes: B samples, S new tokens, K keys or source tokens, D hidden, N heads, H head_dim,
V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.generation import LogitsProcessor, LogitsProcessorList
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithPast,
    Seq2SeqLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

BLOCK: dict[str, Any] = {
    "positions": "rope",  # rope, xpos, alibi, learned, sinusoidal, none
    "level_encoding": "none",  # none, sinusoidal
    "sinusoid_layout": "split",  # split, interleaved
    "rope_theta": 10000.0,
    "rope_interleaved": False,  # pairs (2i, 2i + 1) instead of (i, i + H/2)
    "rope_fraction": 1.0,  # of head_dim, which rotates
    "rope_scaling_factor": 1.0,
    "rope_scaling": None,  # or {kind: dynamic | yarn | llama3, factor, original_positions, ...}
    "rope_theta_local": None,  # of sliding blocks, which is not scaled
    "xpos_scale_base": 512.0,
    "norm": "rms",  # rms, layer
    "norm_eps": 1e-5,
    "norm_position": "pre",  # pre, post, sandwich, peri, output
    "final_norm": True,
    "final_norm_eps": None,  # left out: norm_eps
    "residual": "plain",  # plain, admin
    "parallel_residual": False,
    "feed_forward": "swiglu",  # swiglu, geglu, geglu_tanh, gelu, gelu_tanh, relu
    "shared_feed_forward": False,
    "gate": False,
    "gate_hidden_size": None,
    "qk_norm": False,
    "qk_norm_over": "head",  # head, all
    "attention_scale": None,  # left out: H ** -0.5
    "attention_softcap": None,
    "logit_softcap": None,
    "causal": True,
    "sliding_window": None,
    "attention_types": ["full"],  # block b has entry b modulo length
    "attention_bias": "none",  # none, qk, qkv, all
    "feed_forward_bias": False,
    "head_bias": False,
    "scale_embeddings": False,
}
"""Options of a block's computation, with their defaults in `MegarecurConfig.block`."""
ATTENTION_KEYWORDS = frozenset(
    [
        "attention_instances",
        "block_table",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "is_causal",
        "logits_indices",
        "logits_processor_args",
        "max_length_k",
        "max_length_q",
        "read_index",
        "seq_idx",
        "write_index",
    ]
)
"""Keywords of `forward` that attention functions and caches read (packed and paged attention,
vLLM's layers)."""
# Names and signatures differ between transformers 4 and 5.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__annotations__ else "past_key_values"
SIZED_BY_POSITIONS = "cache_position" in inspect.signature(Cache.get_mask_sizes).parameters
MASKS = {
    kind: (make, frozenset(inspect.signature(make).parameters))
    for kind, make in (
        ("full_attention", create_causal_mask),
        ("sliding_attention", create_sliding_window_causal_mask),
    )
}
"""Mask function of each kind of layer, and the arguments that it accepts."""


class Step(NamedTuple):
    """The computation of one layer."""

    block: int
    loop: int
    """Number of earlier uses of the block."""
    source: bool
    """True if the input of this layer is kept until the next source."""
    reads: bool
    """True if the kept value is injected again."""
    normalize: bool
    """True if the final norm is applied first."""


class MegarecurConfig(PretrainedConfig):
    """The configuration: shapes under their usual names, and these keys.

    layer_map: the block that every layer runs, from 0.
    block: see `BLOCK`.
    num_loops: how often a looped model repeats its core; setting it changes `layer_map` and
        `num_hidden_layers`. None: nothing is repeated, `layer_map` is fixed.
    loop: None, or {prelude, core, coda, reads_first, normalize}: numbers of blocks; whether the
        first loop reads the injected value too; whether the final norm comes before the coda.
    adapters: None, or {rank, scale, targets, norms, biases}: low-rank deltas of the linear layers,
        and of their biases, and norms that each use of a block has of its own.
    levels: None, or {rank, feed_forward_rank}: level signals and norms of each use of a block.
    injection: None, or {kind: add | linear, bias, sources, steps, initial_state, ...}: what enters
        the layers `sources` is kept, each until the next, and enters the layers `steps` again.
        initial_state: prelude; zero: the state starts anew there; random: the state starts as
        noise of deviation `std`, a function of `key` (made of `seed`), position and sample.
    normalized_steps: layers before which the final norm is applied.
    halting, temporal, task: None, or of classifiers (`MegarecurClassifier`).
    encoder: None, or the values that the encoder of an encoder-decoder has of its own: vocab_size,
        layer_map, num_loops, loop, levels, injection; and shared_embedding, which is True if it
        embeds source sentences with the decoder's table.
    trained_length: tokens of the samples in training; positions may allow more.
    """

    model_type = "megarecur"

    def __init__(
        self,
        vocab_size: int = 256,
        hidden_size: int = 64,
        intermediate_size: int = 256,
        num_attention_heads: int = 4,
        num_key_value_heads: int = 4,
        head_dim: int = 16,
        max_position_embeddings: int = 2048,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = True,
        layer_map: list[int] | None = None,
        block: dict[str, Any] | None = None,
        num_loops: int | None = None,
        loop: dict[str, Any] | None = None,
        adapters: dict[str, Any] | None = None,
        levels: dict[str, Any] | None = None,
        injection: dict[str, Any] | None = None,
        normalized_steps: list[int] | None = None,
        halting: dict[str, Any] | None = None,
        temporal: dict[str, Any] | None = None,
        task: dict[str, Any] | None = None,
        encoder: dict[str, Any] | None = None,
        trained_length: int | None = None,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.block = BLOCK | (block or {})
        self.sliding_window = self.block["sliding_window"]
        self.attn_logit_softcapping = self.block["attention_softcap"]
        self.adapters = adapters
        self.levels = levels
        self.injection = injection
        self.normalized_steps = list(normalized_steps or [])
        self.halting, self.temporal, self.task = halting, temporal, task
        self.encoder = encoder
        self.trained_length = trained_length
        self.use_cache = use_cache
        for derived in ("num_hidden_layers", "layer_types", "sliding_window"):
            kwargs.pop(derived, None)
        kwargs.pop("attn_logit_softcapping", None)
        self.loop = loop
        self.set_layers(list(layer_map or [0]))
        self.num_loops = num_loops
        # Some versions set it and others do not, so it is set here too.
        self.tie_word_embeddings = tie_word_embeddings
        kwargs["is_encoder_decoder"] = encoder is not None
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute and keep the layers in step with `num_loops`."""
        super().__setattr__(name, value)
        if name == "num_loops" and value is not None:
            self.unroll(value)

    def set_layers(self, layer_map: list[int]) -> None:
        """Set `layer_map` and the values derived from it."""
        self.layer_map = layer_map
        self.num_hidden_layers = len(layer_map)
        types = self.block["attention_types"]
        self.layer_types = [f"{types[number % len(types)]}_attention" for number in layer_map]

    def unroll(self, num_loops: int) -> None:
        """Repeat the core `num_loops` times."""
        loop = self.loop
        if loop is None:
            raise ValueError(
                f"num_loops={num_loops}: this model has no core to repeat; leave num_loops out"
            )
        if isinstance(num_loops, bool) or not isinstance(num_loops, int) or num_loops < 1:
            raise ValueError(f"num_loops={num_loops!r} must be a whole number from 1 on")
        start, core, coda = loop["prelude"], loop["core"], loop["coda"]
        stop = start + core
        self.set_layers([*range(start), *list(range(start, stop)) * num_loops,
                         *range(stop, stop + coda)])  # fmt: skip
        if self.injection is not None:
            starts = range(start, start + core * num_loops, core)
            steps = list(starts) if loop["reads_first"] else list(starts[1:])
            self.injection = self.injection | {"sources": [start], "steps": steps}
        if loop["normalize"]:
            self.normalized_steps = [self.num_hidden_layers - coda]

    def of_encoder(self) -> MegarecurConfig:
        """Return the configuration of the encoder, whose tokens see later ones."""
        own = dict(self.encoder)
        own.pop("shared_embedding")
        shapes = (
            "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
            "head_dim", "max_position_embeddings", "initializer_range", "adapters",
        )  # fmt: skip
        shared = {name: getattr(self, name) for name in shapes}
        config = type(self)(**shared, **own, block=self.block | {"causal": False})
        config._attn_implementation = self._attn_implementation
        return config

    def steps(self) -> list[Step]:
        """Return the computation of each layer."""
        uses, steps = Counter[int](), []
        injection = self.injection or {"sources": (), "steps": ()}
        for layer, number in enumerate(self.layer_map):
            source, reads = layer in injection["sources"], layer in injection["steps"]
            steps.append(Step(number, uses[number], source, reads, layer in self.normalized_steps))
            uses[number] += 1
        return steps


# ---------------------------------------------------------------------------------------- parts


class Norm(nn.Module):
    """RMS norm or LayerNorm, in at least fp32."""

    def __init__(self, size: int, kind: str, eps: float) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        gain = self.weight.to(wide.dtype)
        if self.bias is not None:
            bias = self.bias.to(wide.dtype)
            return F.layer_norm(wide, gain.shape, gain, bias, self.eps).to(x.dtype)
        scale = (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return (wide * scale * gain).to(x.dtype)


class LowRank(nn.Module):
    """A low-rank delta scale B A x that one use of a block adds to a linear layer, with a delta of
    its bias."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float, biases: bool) -> None:
        super().__init__()
        rows, columns = linear.weight.shape
        rank = min(rank, rows, columns)
        self.lora_a = nn.Parameter(torch.zeros(rank, columns))
        self.lora_b = nn.Parameter(torch.zeros(rows, rank))
        biases = biases and linear.bias is not None
        self.lora_bias = nn.Parameter(torch.zeros(rows)) if biases else None
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.lora_a) * self.scale, self.lora_b, self.lora_bias)


class Signal(nn.Module):
    """The signal a b x that one level adds (Heo et al. 2025, RingFormer)."""

    def __init__(self, rows: int, columns: int, rank: int) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.zeros(rank, columns))
        self.a = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.b), self.a)


class ResidualScale(nn.Module):
    """The residual x omega + f(x) (Liu et al. 2020, Admin)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        return (x * self.weight + branch).to(x.dtype)


Rotation = tuple[Tensor, Tensor]
"""Rotation angles as cos and sin [B, S, 1, dims/2]."""


class View(NamedTuple):
    """Mask and rotations of a call for one kind of layer."""

    mask: Any
    """The mask for attention functions; None lets them use `is_causal`."""
    queries: Rotation | None
    keys: Rotation | None


class Call(NamedTuple):
    """The arguments that all layers of a call share."""

    cache: Any
    cache_position: Tensor
    """Positions of the new tokens in the cache, [S]."""
    keywords: dict[str, Any]
    """Keywords of attention functions and caches."""
    attentions: bool
    """True if attention weights are requested."""
    source: Tensor | None = None
    """Source of keys and values if it differs from that of queries, [B, S, D]."""
    memory: Tensor | None = None
    """The memory that blocks of models with a temporal memory read, [B, M, D]."""
    source_mask: Tensor | None = None
    """The mask of attention to the output of an encoder; None: all of it is seen."""
    source_cache: Any = None
    """The EncoderDecoderCache that keeps its keys and values, once per block."""


class Encoded(NamedTuple):
    """The output of an encoder."""

    states: Tensor
    """[B, K, D]."""
    mask: Tensor | None
    """The mask for attention functions; None: all of it is seen."""


class Use(nn.Module):
    """One use of a block: the attributes that attention functions need, without parameters."""

    def __init__(
        self, config: MegarecurConfig, step: Step, layer: int, *, across: bool = False
    ) -> None:
        """Build it; across: for attention to the output of an encoder."""
        super().__init__()
        self.config, self.step, self.layer_idx = config, step, layer
        self.layer_type = config.layer_types[layer]
        self.head_dim, self.is_causal = config.head_dim, config.block["causal"] and not across
        reads = config.encoder is not None and not across
        self.across = Use(config, step, layer, across=True) if reads else None
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.block["attention_scale"] or self.head_dim**-0.5
        self.softcap = config.block["attention_softcap"]
        slides = self.layer_type == "sliding_attention"
        self.sliding_window = config.sliding_window if slides else None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, call: Call) -> Any:
        """Return [B, S, N, H] and weights [B, N, S, K] or None from q [B, N, S, H], and k and v of
        fewer heads, by the configured implementation."""
        implementation = self.config._attn_implementation
        function = eager_attention
        # torch's implementation supports no cap and returns no weights.
        if implementation != "sdpa" or (self.softcap is None and not call.attentions):
            function = ALL_ATTENTION_FUNCTIONS.get(implementation, eager_attention)
        return function(
            self, q, k, v, mask,
            dropout=0.0, scaling=self.scaling, softcap=self.softcap,
            sliding_window=self.sliding_window, **call.keywords,
        )  # fmt: skip


def eager_attention(
    module: Use,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Compute attention by the formula; with a cap, scores become cap x tanh(score / cap)."""
    key, value = (t.repeat_interleave(module.num_key_value_groups, dim=1) for t in (key, value))
    scores = query @ key.transpose(-1, -2)
    scores = scores.to(torch.promote_types(query.dtype, torch.float32)) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    least = torch.finfo(scores.dtype).min
    if attention_mask is None:
        if module.is_causal and scores.shape[-2] > 1:
            future = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(future, least)
    elif attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, least)
    else:
        scores = scores + attention_mask
    weights = scores.softmax(-1).to(value.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class Own:
    """The modules that belong to one use of a block: LowRank by the layer's name, Norm by the
    norm's, Signal and ResidualScale.

    Neither a module nor a dict: hooks that place weights move every argument of either kind, and
    offloaded modules cannot be moved.
    """

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        self.parts = parts

    def __contains__(self, name: str) -> bool:
        return name in self.parts

    def __getitem__(self, name: str) -> nn.Module:
        return self.parts[name]


NOTHING = Own({})
"""For blocks whose uses have no modules of their own."""


def parameter_of(module: nn.Module, name: str) -> Tensor:
    """Return a parameter outside its module's `forward`: hooks that offload weights keep it
    elsewhere, and place it for calls only."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        return getattr(module, name)
    hook.pre_forward(module)
    value = getattr(module, name)
    hook.post_forward(module, None)
    return value


def apply(
    linear: nn.Linear, x: Tensor, own: Own, name: str, stream: Tensor | None = None
) -> Tensor:
    """Apply a linear layer with the deltas of this use of the block, if any; those of levels read
    the stream."""
    y = linear(x)
    if name in own:
        y = y + own[name](x)
    if f"signal_{name}" in own:
        y = y + own[f"signal_{name}"](x if stream is None else stream)
    return y


def rotate(x: Tensor, rotation: Rotation | None, interleaved: bool) -> Tensor:
    """Rotate the first dims of queries or keys [B, S, N, H], as many as there are angles."""
    if rotation is None:
        return x
    cos, sin = rotation
    dims = 2 * cos.shape[-1]
    x, rest = x[..., :dims], x[..., dims:]
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = x.chunk(2, -1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((turned.to(rest.dtype), rest), -1)


def norm_heads(norm: Norm, x: Tensor) -> Tensor:
    """Norm every head of queries or keys [B, S, N, H], or all heads together."""
    return norm(x) if len(norm.weight) == x.shape[-1] else norm(x.flatten(2)).view_as(x)


def count_normed(config: MegarecurConfig) -> dict[str, int]:
    """Return the sizes of the norms of queries and keys."""
    over_all = config.block["qk_norm_over"] == "all"
    heads = {"query_norm": config.num_attention_heads, "key_norm": config.num_key_value_heads}
    return {name: config.head_dim * (n if over_all else 1) for name, n in heads.items()}


def alibi_slopes(num_heads: int) -> Tensor:
    """Return 2^(-8k/N) (Press et al. 2022); for numbers of heads that are not powers of two as in
    MPT."""
    count = 2 ** math.ceil(math.log2(num_heads))
    slopes = 2.0 ** (-8.0 / count * torch.arange(1, count + 1))
    if count != num_heads:
        slopes = torch.cat([slopes[1::2], slopes[::2]])[:num_heads]
    return slopes


def grow_base(theta: float, lengths: Tensor, scaling: dict[str, Any], dims: int) -> Tensor:
    """Return the base of rotation for texts of these lengths (dynamic NTK scaling)."""
    original, factor = scaling["original_positions"], scaling["factor"]
    stretch = factor * lengths.clamp(min=original) / original - (factor - 1.0)
    return theta * stretch ** (dims / (dims - 2))


def scale_frequencies(
    frequencies: Tensor, theta: float, scaling: dict[str, Any] | None
) -> tuple[Tensor, float]:
    """Return frequencies of rotation [dims/2] by Llama 3 or YaRN, and a factor of cos and sin."""
    if scaling is None:
        return frequencies, 1.0
    original, factor = scaling["original_positions"], scaling["factor"]
    if scaling["kind"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = frequencies * (original / (2 * math.pi))
        share = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        return frequencies * (share + (1.0 - share) / factor), 1.0
    dims, ends = 2 * len(frequencies), (scaling["beta_fast"], scaling["beta_slow"])
    low, high = (
        dims * math.log(original / (2 * math.pi * turns)) / (2 * math.log(theta)) for turns in ends
    )
    if scaling["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    if low == high:
        high += 0.001
    place = torch.arange(dims // 2, device=frequencies.device).to(frequencies.dtype)
    slow = ((place - low) / (high - low)).clamp(0.0, 1.0)
    gain = scaling["attention_factor"] or 0.1 * math.log(factor) + 1.0
    return frequencies * (slow / factor + (1.0 - slow)), gain


def sinusoids(positions: Tensor, size: int, dtype: torch.dtype, layout: str) -> Tensor:
    """Return sines, then cosines, or both by turns: positions [...] to [..., D]."""
    half = (size + 1) // 2
    last = max(half - 1, 1) if layout == "split" else size / 2
    exponent = torch.arange(half, device=positions.device).to(dtype) / last
    angle = positions[..., None].to(dtype) * 10000.0 ** (-exponent)
    waves = angle.sin(), angle.cos()
    both = torch.cat(waves, -1) if layout == "split" else torch.stack(waves, -1).flatten(-2)
    return both[..., :size]


class MultiHead(nn.Module):
    """The linear layers of attention; query head i reads key head i // (heads / key heads)."""

    def __init__(self, config: MegarecurConfig) -> None:
        super().__init__()
        hidden, self.head_dim = config.hidden_size, config.head_dim
        queries = config.num_attention_heads * self.head_dim
        keys = config.num_key_value_heads * self.head_dim
        kinds = {"none": "", "qk": "qk", "qkv": "qkv", "all": "qkvo"}
        biased = kinds[config.block["attention_bias"]]
        self.query = nn.Linear(hidden, queries, "q" in biased)
        self.key = nn.Linear(hidden, keys, "k" in biased)
        self.value = nn.Linear(hidden, keys, "v" in biased)
        self.output = nn.Linear(queries, hidden, "o" in biased)

    def split(self, x: Tensor) -> Tensor:
        """Split heads: [B, S, N H] to [B, N, S, H]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class Attention(MultiHead):
    """Self-attention with positions and a cache."""

    def __init__(self, config: MegarecurConfig, head_norms: bool) -> None:
        super().__init__(config)
        self.query_norm = self.key_norm = None
        for name, size in count_normed(config).items() if head_norms else ():
            setattr(self, name, Norm(size, "rms", config.block["norm_eps"]))
        self.interleaved = config.block["rope_interleaved"]

    def forward(
        self, x: Tensor, stream: Tensor, view: View, use: Use, call: Call, own: Own
    ) -> tuple[Tensor, Tensor | None]:
        source = x if call.source is None else call.source
        q, k, v = (
            apply(linear, y, own, name, stream).unflatten(-1, (-1, self.head_dim))
            for linear, y, name in (
                (self.query, x, "query"), (self.key, source, "key"), (self.value, source, "value"),
            )
        )  # fmt: skip
        if "query_norm" in own:
            q, k = norm_heads(own["query_norm"], q), norm_heads(own["key_norm"], k)
        elif self.query_norm is not None and self.key_norm is not None:
            q, k = norm_heads(self.query_norm, q), norm_heads(self.key_norm, k)
        q = rotate(q, view.queries, self.interleaved)
        k = rotate(k, view.keys, self.interleaved)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        # A paged cache decides per layer what to read.
        call = call._replace(keywords=dict(call.keywords))
        if call.cache is not None:
            k, v = update(call, k, v, use.layer_idx)
        out, weights = use.attend(q, k, v, view.mask, call)
        return apply(self.output, out.reshape(*x.shape[:-1], -1), own, "output"), weights


def update(call: Call, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Put keys and values into the cache; return all of the layer so far."""
    if SIZED_BY_POSITIONS:
        return call.cache.update(k, v, layer, {"cache_position": call.cache_position})
    return call.cache.update(k, v, layer, kwargs=call.keywords)


class EncoderAttention(MultiHead):
    """Attention of a decoder to the output of the encoder, without positions.

    Keys and values do not depend on the use of a block, so a cache keeps them once per block.
    """

    def forward(
        self, x: Tensor, encoded: Tensor, use: Use, call: Call
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from [B, S, D] to [B, K, D]."""
        k, v = self.read(encoded, call.source_cache, use.step.block)
        q, call = self.split(self.query(x)), call._replace(keywords={})
        out, weights = use.across.attend(q, k, v, call.source_mask, call)
        return self.output(out.reshape(*x.shape[:-1], -1)), weights

    def read(self, encoded: Tensor, cache: Any, block: int) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, N, K, H], from the cache if it has them."""
        if cache is not None and cache.is_updated.get(block):
            layer = cache.cross_attention_cache.layers[block]
            return layer.keys, layer.values
        k, v = self.split(self.key(encoded)), self.split(self.value(encoded))
        if cache is not None:
            k, v = cache.cross_attention_cache.update(k, v, block)
            cache.is_updated[block] = True
        return k, v


class FeedForward(nn.Module):
    """The feed-forward down(f(gate(x)) up(x)), or down(f(up(x))) without a gate."""

    def __init__(self, config: MegarecurConfig, size: int | None = None) -> None:
        super().__init__()
        kind, bias = config.block["feed_forward"], config.block["feed_forward_bias"]
        sizes = config.hidden_size, size or config.intermediate_size
        gated = kind in ("swiglu", "geglu", "geglu_tanh")
        self.gate = nn.Linear(*sizes, bias) if gated else None
        self.up = nn.Linear(*sizes, bias)
        self.down = nn.Linear(*sizes[::-1], bias)
        self.kind = kind

    def activate(self, x: Tensor) -> Tensor:
        """Return f(x)."""
        if self.kind in ("swiglu", "relu"):
            return F.silu(x) if self.kind == "swiglu" else F.relu(x)
        return F.gelu(x, approximate="tanh" if "tanh" in self.kind else "none")

    def forward(self, x: Tensor, own: Own) -> Tensor:
        up = apply(self.up, x, own, "up")
        inner = up if self.gate is None else apply(self.gate, x, own, "gate")
        inner = self.activate(inner)
        return apply(self.down, inner if self.gate is None else inner * up, own, "down")


class Gate(nn.Module):
    """The gate sigmoid(down(gelu(up(x)))): the share of a block's output that replaces its
    input."""

    def __init__(self, config: MegarecurConfig) -> None:
        super().__init__()
        sizes = config.hidden_size, config.block["gate_hidden_size"]
        self.up, self.down = nn.Linear(*sizes), nn.Linear(*sizes[::-1])

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.down(F.gelu(self.up(x))))


class Block(GradientCheckpointingLayer):
    """One set of weights, used by any number of layers.

    Norm positions: pre, x + f(N(x)); post, N(x + f(x)); sandwich, N2(x + f(N1(x)));
    peri, x + N2(f(N1(x))); output, x + N(f(x)).
    """

    def __init__(self, config: MegarecurConfig, number: int, uses: int) -> None:
        super().__init__()
        block, adapters, levels = config.block, config.adapters, config.levels
        self.position, self.parallel = block["norm_position"], block["parallel_residual"]
        injection, self.injection = config.injection, None
        mixes = injection is not None and injection["kind"] == "linear"
        if mixes and config.layer_map[injection["sources"][0]] == number:
            sizes = 2 * config.hidden_size, config.hidden_size
            self.injection = nn.Linear(*sizes, bias=injection.get("bias", False))
        across = ["cross_attention"] * (config.encoder is not None)
        parts = ["attention", *across, "feed_forward"]
        names = [f"{part}_norm" for part in parts if self.position != "output"]
        if self.position in ("sandwich", "peri", "output"):
            names += [f"{part}_output_norm" for part in parts]
        own_norms = levels is not None or (adapters is not None and adapters["norms"])
        for name in () if own_norms else names:
            self.add_module(name, Norm(config.hidden_size, block["norm"], block["norm_eps"]))
        self.attention = Attention(config, block["qk_norm"] and not own_norms)
        self.cross_attention = EncoderAttention(config) if across else None
        shared = block["shared_feed_forward"] and number > 0
        self.feed_forward = None if shared else FeedForward(config)
        self.gate = Gate(config) if block["gate"] else None
        self.loops = nn.ModuleList()
        scaled = block["residual"] == "admin"
        if adapters is None and levels is None and not scaled:
            return
        for _ in range(uses):
            own = nn.ModuleDict()
            if adapters is not None:
                self.add_deltas(own, adapters)
            if levels is not None:
                self.add_signals(own, config.hidden_size, levels)
            for name in names if own_norms else ():
                own[name] = Norm(config.hidden_size, block["norm"], block["norm_eps"])
            head_norms = count_normed(config) if own_norms and block["qk_norm"] else {}
            for name, size in head_norms.items():
                own[name] = Norm(size, "rms", block["norm_eps"])
            for part in parts if scaled else ():
                own[f"{part}_residual"] = ResidualScale(config.hidden_size)
            self.loops.append(own)

    def add_deltas(self, own: nn.ModuleDict, adapters: dict[str, Any]) -> None:
        """Add one use's adapters."""
        for target in adapters["targets"]:
            owner = self.feed_forward if target in ("gate", "up", "down") else self.attention
            linear, biases = getattr(owner, target), adapters.get("biases", False)
            own[target] = LowRank(linear, adapters["rank"], adapters["scale"], biases)

    def add_signals(self, own: nn.ModuleDict, hidden: int, levels: dict[str, Any]) -> None:
        """Add one use's level signals."""
        for name in ("query", "key", "value") if levels["rank"] else ():
            rows = getattr(self.attention, name).out_features
            own[f"signal_{name}"] = Signal(rows, hidden, levels["rank"])
        if levels["feed_forward_rank"]:
            own["signal_feed_forward"] = Signal(hidden, hidden, levels["feed_forward_rank"])

    def forward(
        self,
        x: Tensor,
        injected: Tensor | None,
        encoding: Tensor | None,
        feed: Callable[[Tensor, Own], Tensor] | None,
        view: View,
        use: Use,
        call: Call,
        encoded: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Run one layer; `injected` is added or mixed in first, then the level's encoding is added.

        `feed` is called if the block has no feed-forward of its own. A decoder's block reads
        `encoded`, the output of the encoder [B, K, D].

        Returns the new state, [B, S, D], and attention weights if they are requested: of attention
        to tokens and, in a decoder, to the output of the encoder.
        """
        own = Own(self.loops[use.step.loop]) if len(self.loops) else NOTHING
        feed = self.feed_forward if feed is None else feed
        if injected is not None:
            both = None if self.injection is None else torch.cat([x, injected], dim=-1)
            x = x + injected if both is None else self.injection(both)
        if encoding is not None:
            x = x + encoding.to(x.dtype)

        def norm(name: str, y: Tensor) -> Tensor:
            return (own[name] if name in own else getattr(self, name))(y)

        if call.source is not None:
            source = call.source if encoding is None else call.source + encoding.to(x.dtype)
            source = source if self.position == "post" else norm("attention_norm", source)
            call = call._replace(source=source)

        def join(y: Tensor, branch: Tensor, name: str) -> Tensor:
            return own[name](y, branch) if name in own else y + branch

        def informed(y: Tensor) -> Tensor:
            return y + own["signal_feed_forward"](y) if "signal_feed_forward" in own else y

        weights: list[Tensor | None] = []

        def attend(y: Tensor) -> Tensor:
            # Level signals read the stream before its norm.
            stream = x if self.position == "pre" else y
            mixed, seen = self.attention(y, stream, view, use, call, own)
            weights.append(seen)
            return mixed

        def look(y: Tensor) -> Tensor:
            """Return the stream after attention to the output of the encoder, if there is one."""
            if self.cross_attention is None:
                return y
            name = "cross_attention"
            plain = self.position in ("post", "output")
            read = y if plain else norm(f"{name}_norm", y)
            found, seen = self.cross_attention(read, encoded, use, call)
            weights.append(seen)
            if self.position == "post":
                return norm(f"{name}_norm", join(y, found, f"{name}_residual"))
            if self.position == "sandwich":
                return norm(f"{name}_output_norm", y + found)
            return y + (found if self.position == "pre" else norm(f"{name}_output_norm", found))

        def run(x: Tensor) -> Tensor:
            if self.position == "post":
                x = norm("attention_norm", join(x, attend(x), "attention_residual"))
                x = look(x)
                fed = feed(informed(x), own)
                return norm("feed_forward_norm", join(x, fed, "feed_forward_residual"))
            if self.position == "output":
                x = look(x + norm("attention_output_norm", attend(x)))
                return x + norm("feed_forward_output_norm", feed(x, own))
            mixed = attend(norm("attention_norm", x))
            if self.position == "pre":
                if self.parallel:
                    return x + mixed + feed(norm("feed_forward_norm", x), own)
                a = look(self.read(x + mixed, call))
                u = norm("feed_forward_norm", informed(a))
                out = a + feed(u, own)
                return out if self.gate is None else torch.lerp(x, out, self.gate(u))
            if self.position == "peri":
                x = look(x + norm("attention_output_norm", mixed))
                fed = feed(norm("feed_forward_norm", x), own)
                return x + norm("feed_forward_output_norm", fed)
            x = look(norm("attention_output_norm", x + mixed))
            fed = feed(norm("feed_forward_norm", x), own)
            return norm("feed_forward_output_norm", x + fed)

        return run(x), tuple(weights)

    def read(self, x: Tensor, call: Call) -> Tensor:
        """Return the stream after reading the memory; here there is none."""
        return x


# ------------------------------------------------------------------------------- initial states

WORD = 0xFFFFFFFF


def times(x: Tensor, factor: int) -> Tensor:
    """Return x factor modulo 2^32, without a product that overflows int64 (compilers may break
    those)."""
    high = (x * (factor >> 16)) & 0xFFFF
    return (x * (factor & 0xFFFF) + (high << 16)) & WORD


def scramble(x: Tensor) -> Tensor:
    """Apply the lowbias32 finaliser (C. Wellons)."""
    x = times(x ^ (x >> 16), 0x7FEB352D)
    x = times(x ^ (x >> 15), 0x846CA68B)
    return x ^ (x >> 16)


def truncated_normal(key: list[int], coordinates: tuple[Tensor, ...], size: int) -> Tensor:
    """Return standard normal values cut at 3, fp32 [..., size]: a function of two key words, of
    coordinates that broadcast to the leading shape, and of the index in the last dim."""
    row = torch.full((), key[0] & WORD, device=coordinates[0].device)
    for coordinate in coordinates:
        row = scramble(row ^ scramble(coordinate & WORD))
    columns = torch.arange(size, device=row.device)
    bits = times(row[..., None] ^ scramble((columns + key[1]) & WORD), 0x9E3779B1)
    signed = torch.where(bits > WORD >> 1, bits - (WORD + 1), bits)
    bits = times(bits ^ ((signed >> 15) & WORD), 0x85EBCA6B)
    signed = torch.where(bits > WORD >> 1, bits - (WORD + 1), bits)
    uniform = (signed.to(torch.float64) + 0.5) / (WORD + 1) + 0.5
    low = 0.5 * (1.0 + math.erf(-3.0 / math.sqrt(2.0)))
    quantile = low + (1.0 - 2.0 * low) * uniform
    return (torch.erfinv(2.0 * quantile - 1.0) * math.sqrt(2.0)).to(torch.float32)


# ---------------------------------------------------------------------------------------- model


class MegarecurModel(PreTrainedModel):
    """The embedding and the layers of the map, with the final norm last."""

    config_class = MegarecurConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"^head\.", r"^task\."]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    block_class = Block

    def __init__(self, config: MegarecurConfig) -> None:
        if config.block["positions"] == "alibi":  # ALiBi adds a bias to scores.
            self._supports_flash_attn = self._supports_flex_attn = False
        super().__init__(config)
        block, hidden = config.block, config.hidden_size
        self.embedding = self.make_embedding()
        if block["positions"] == "learned":
            table = torch.zeros(config.max_position_embeddings, hidden)
            self.embedding.positions = nn.Parameter(table)
        uses = Counter(config.layer_map)
        self.blocks = nn.ModuleList(
            self.block_class(config, number, uses[number])
            for number in range(max(config.layer_map) + 1)
        )
        self.final_norm = None
        if block["norm_position"] != "post" and block["final_norm"]:
            eps = block["final_norm_eps"] or block["norm_eps"]
            self.final_norm = Norm(hidden, block["norm"], eps)
        self.plans: dict[int | None, list[Use]] = {}
        self.plan()
        self.add_head()
        self.post_init()

    def make_embedding(self) -> nn.Module:
        """Return the table of the vocabulary, which also holds those of learned positions."""
        return nn.Embedding(self.config.vocab_size, self.config.hidden_size)

    def look_up(self, input_ids: Tensor) -> Tensor:
        """Return embeddings [B, S, D]."""
        return self.embedding(input_ids)

    def add_head(self) -> None:
        """Add no head after the final norm."""

    def plan(self) -> list[Use]:
        """Return the layers to run, by the config's `num_loops`."""
        config = self.config
        if config.num_loops not in self.plans:
            steps = config.steps()
            loops = max(step.loop for step in steps) + 1
            own = max(len(block.loops) for block in self.blocks)
            if own and loops > own:
                raise ValueError(
                    f"num_loops={config.num_loops} runs a block {loops} times, and what single "
                    f"uses have of their own is there for {own}; choose fewer loops"
                )
            self.plans[config.num_loops] = [Use(config, s, i) for i, s in enumerate(steps)]
        return self.plans[config.num_loops]

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise new models; loaded models have all values."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, LowRank):
            nn.init.normal_(module.lora_a, std=module.lora_a.shape[1] ** -0.5)
            nn.init.zeros_(module.lora_b)
        elif isinstance(module, Signal):
            nn.init.normal_(module.b, std=module.b.shape[1] ** -0.5)
            nn.init.zeros_(module.a)
        elif isinstance(module, Norm | ResidualScale):
            nn.init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        if isinstance(getattr(module, "positions", None), Tensor):
            nn.init.normal_(module.positions, std=std)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        if hasattr(self.embedding, "positions"):
            value.positions = self.embedding.positions
        self.embedding = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_loops: int | None = None,
        sample_ids: Tensor | None = None,
        cache: Any = None,
        encoded: Encoded | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return hidden states [B, S, D] after the final norm.

        Args:
            input_ids: [B, S].
            attention_mask: [B, K], 0 at padding; or [B, 1, S, K]: bool or whole numbers, or floats
                that are added to scores; or one of these by the kind of layer.
            position_ids: [B, S]; by default counted by a mask [B, K], or from the cache on.
            past_key_values: the cache; `cache` is its name in transformers 5.24 and later.
            inputs_embeds: [B, S, D], in place of input_ids.
            use_cache: by default the config's value, and False in training.
            output_attentions: weights by layer, computed by the formula.
            output_hidden_states: input of the first layer and output of each, the last one normed.
            return_dict: False returns a tuple.
            num_loops: loops of the core instead of the config's.
            sample_ids: [B], for random initial states; 0 by default, whatever the place in the
            batch.
            encoded: the output of the encoder that a decoder reads.
            kwargs: `ATTENTION_KEYWORDS`; others are rejected.
        """
        if num_loops not in (None, self.config.num_loops):
            former, self.config.num_loops = self.config.num_loops, num_loops
            try:
                return MegarecurModel.forward(
                    self, input_ids, attention_mask, position_ids, past_key_values, inputs_embeds,
                    use_cache, output_attentions, output_hidden_states, return_dict, None,
                    sample_ids, cache, encoded, **kwargs,
                )  # fmt: skip
            finally:
                self.config.num_loops = former
        config = self.config
        cache_position = kwargs.pop("cache_position", None)
        unknown = sorted(kwargs.keys() - ATTENTION_KEYWORDS)
        if unknown:
            raise TypeError(f"{type(self).__name__}.forward has no argument {', '.join(unknown)}")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        cache = past_key_values if cache is None else cache
        if use_cache is None:
            use_cache = config.use_cache and not self.training
        recomputes = self.training and torch.is_grad_enabled() and self.is_gradient_checkpointing
        if recomputes:  # A second forward pass would fill it twice.
            use_cache, cache = False, None
        if cache is None and use_cache:
            cache = DynamicCache()
        given = cache
        if encoded is not None and cache is not None:
            if not isinstance(cache, EncoderDecoderCache):
                given = EncoderDecoderCache(cache, DynamicCache())
            cache = given.self_attention_cache
        x = self.look_up(input_ids) if inputs_embeds is None else inputs_embeds
        length = x.shape[1]
        if cache_position is None:
            past = cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
            cache_position = torch.arange(length, device=x.device) + past
        if position_ids is None:
            position_ids = count_positions(attention_mask, cache_position)
        x = self.place(self.scaled(x), position_ids)
        views = self.views(x, position_ids, cache_position, cache, attention_mask)
        attentions = choose(output_attentions, config, "output_attentions")
        call, source = Call(cache, cache_position, kwargs, attentions), None
        if encoded is not None:
            source, call = encoded.states, call._replace(source_mask=encoded.mask)
            call = call._replace(source_cache=given)
        x, states, weights = self.walk(x, views, call, position_ids, sample_ids, source)
        x = x if self.final_norm is None else self.final_norm(x)
        states[-1] = x
        output = BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=x,
            **{CACHE: given if use_cache else None},
            hidden_states=tuple(states)
            if choose(output_hidden_states, config, "output_hidden_states")
            else None,
            attentions=tuple(own for own, *_ in weights) if attentions else None,
            cross_attentions=tuple(w[1] for w in weights) if attentions and encoded else None,
        )
        return output.to_tuple() if return_dict is False else output

    def walk(
        self,
        x: Tensor,
        views: dict[str, View],
        call: Call,
        position_ids: Tensor,
        sample_ids: Tensor | None,
        encoded: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor], list[Any]]:
        """Run all layers. Return the final state, each layer's input and output, and attention
        weights. A decoder's layers read `encoded`, the output of the encoder [B, K, D]."""
        states, weights, kept = [x], [], None
        encodings = self.encodings(position_ids, x)
        for use in self.plan():
            step = use.step
            if step.normalize and self.final_norm is not None:
                x = self.final_norm(x)
            if step.source:
                kept = x
                x = self.initial_state(x, position_ids, sample_ids)
            block = self.blocks[step.block]
            # This is not a module: hooks that place a block's weights would move it with the
            # arguments.
            feed = self.blocks[0].feed_forward.forward if block.feed_forward is None else None
            x, seen = block(
                x, kept if step.reads else None,
                None if encodings is None else encodings[step.loop],
                feed, views[use.layer_type], use, call, encoded,
            )  # fmt: skip
            states.append(x)
            weights.append(seen)
        return x, states, weights

    def initial_state(self, x: Tensor, positions: Tensor, samples: Tensor | None) -> Tensor:
        """Return the initial state of the first loop of a core."""
        injection = self.config.injection
        if injection["initial_state"] == "prelude":
            return x
        if injection["initial_state"] == "zero":
            return torch.zeros_like(x)
        if samples is None:
            samples = torch.zeros(1, dtype=torch.long, device=x.device)
        noise = truncated_normal(injection["key"], (samples[:, None], positions), x.shape[-1])
        return (noise * injection["std"]).to(x.dtype).expand_as(x)

    def scaled(self, x: Tensor) -> Tensor:
        """Return embeddings [B, S, D], scaled if the model does so."""
        if not self.config.block["scale_embeddings"]:
            return x
        wide = torch.promote_types(x.dtype, torch.float32)
        return (x.to(wide) * self.config.hidden_size**0.5).to(x.dtype)

    def place(self, x: Tensor, positions: Tensor) -> Tensor:
        """Add positions to embeddings [B, S, D], if the scheme does so."""
        hidden, block = self.config.hidden_size, self.config.block
        wide = torch.promote_types(x.dtype, torch.float32)
        if block["positions"] == "learned":
            x = x + F.embedding(positions, parameter_of(self.embedding, "positions"))
        if block["positions"] == "sinusoidal":
            x = x + sinusoids(positions, hidden, wide, block["sinusoid_layout"]).to(x.dtype)
        return x

    def encodings(self, positions: Tensor, x: Tensor) -> list[Tensor] | None:
        """Return the encodings added to the state before every layer, by loop: sinusoids of
        positions and of the loop's number."""
        if self.config.block["level_encoding"] != "sinusoidal":
            return None
        wide, hidden = torch.promote_types(x.dtype, torch.float32), x.shape[-1]
        layout = self.config.block["sinusoid_layout"]
        places = sinusoids(positions, hidden, wide, layout)
        loops = torch.arange(max(use.step.loop for use in self.plan()) + 1, device=x.device)
        return [places + level for level in sinusoids(loops, hidden, wide, layout)]

    def views(
        self, x: Tensor, positions: Tensor, cache_position: Tensor, cache: Any, attention_mask: Any
    ) -> dict[str, View]:
        """Return masks and rotations by the kind of layer, made once for all layers."""
        block, views = self.config.block, {}
        for kind in dict.fromkeys(self.config.layer_types):
            local = kind == "sliding_attention" and block["rope_theta_local"] is not None
            queries, keys = self.rotations(x, positions, local)
            mask = self.mask(kind, x, positions, cache_position, cache, attention_mask)
            views[kind] = View(mask, queries, keys)
        return views

    def rotations(
        self, x: Tensor, positions: Tensor, local: bool
    ) -> tuple[Rotation | None, Rotation | None]:
        """Return the rotations of queries and keys; local: with the base of sliding blocks."""
        block = self.config.block
        if block["positions"] not in ("rope", "xpos"):
            return None, None
        dims = int(self.config.head_dim * block["rope_fraction"])
        wide = torch.promote_types(x.dtype, torch.float32)
        pairs, places = torch.arange(0, dims, 2, device=x.device), positions[..., None, None]
        theta, scaling = block["rope_theta"], block["rope_scaling"]
        factor, exponent = block["rope_scaling_factor"], -pairs.to(wide) / dims
        if local:
            theta, scaling, factor = block["rope_theta_local"], None, 1.0
        if scaling is not None and scaling["kind"] == "dynamic":
            lengths = (positions.amax(-1) + 1)[:, None, None, None].to(wide)
            frequencies, gain = grow_base(theta, lengths, scaling, dims) ** exponent, 1.0
        else:
            frequencies, gain = scale_frequencies(theta**exponent / factor, theta, scaling)
        angle = places.to(wide) * frequencies
        cos, sin = angle.cos() * gain, angle.sin() * gain
        if block["positions"] == "rope":
            return (cos, sin), (cos, sin)
        scale = (pairs.to(wide) + 0.4 * dims) / (1.4 * dims)
        scale = scale ** (places.to(wide) / block["xpos_scale_base"])
        return (cos * scale, sin * scale), (cos / scale, sin / scale)

    def mask(
        self,
        kind: str,
        x: Tensor,
        positions: Tensor,
        cache_position: Tensor,
        cache: Any,
        attention_mask: Any,
    ) -> Any:
        """Return the mask of one kind of layer for attention functions."""
        if isinstance(attention_mask, dict):
            attention_mask = attention_mask[kind]
        if isinstance(attention_mask, Tensor) and attention_mask.dim() not in (2, 4):
            raise ValueError(
                f"attention_mask has {attention_mask.dim()} dims; give one of [B, K] or "
                "[B, 1, S, K]"
            )
        if isinstance(attention_mask, Tensor) and attention_mask.dim() == 4:
            whole = not attention_mask.is_floating_point()
            mask = attention_mask.bool() if whole else attention_mask
        elif not self.config.block["causal"]:
            mask = see_all(attention_mask, self.config)
        else:
            make, known = MASKS[kind]
            values = {
                "config": self.config,
                "input_embeds": x,
                "inputs_embeds": x,
                "attention_mask": attention_mask,
                "past_key_values": cache,
                "cache": cache,
                "cache_position": cache_position,
                "position_ids": positions,
            }
            mask = make(**{name: value for name, value in values.items() if name in known})
        if self.config.block["positions"] == "alibi":
            return self.biased(kind, x, cache_position, cache, mask)
        if isinstance(mask, Tensor) and mask.is_floating_point():
            mask = mask.to(x.dtype)
        return mask

    def biased(
        self, kind: str, x: Tensor, cache_position: Tensor, cache: Any, mask: Tensor | None
    ) -> Tensor:
        """Return the mask with ALiBi's bias of scores, [B, N, S, K]."""
        if self.config._attn_implementation not in ("sdpa", "eager"):
            raise ValueError(
                f"attn_implementation={self.config._attn_implementation} has no bias of scores, "
                "which positions=alibi need; choose sdpa or eager"
            )
        length, first = x.shape[1], 0
        count = length if mask is None else mask.shape[-1]
        if cache is not None:
            layer = self.config.layer_types.index(kind)
            query = cache_position if SIZED_BY_POSITIONS else length
            count, first = cache.get_mask_sizes(query, layer)
        keys = torch.arange(count, device=x.device) + first
        distance = (cache_position[:, None] - keys).abs().to(torch.float32)
        slopes = alibi_slopes(self.config.num_attention_heads).to(x.device)
        bias = (-slopes[:, None, None] * distance)[None].to(x.dtype)
        if mask is None and not self.config.block["causal"]:
            return bias
        if mask is None:
            mask = (keys <= cache_position[:, None])[None, None]
        if mask.dtype == torch.bool:
            # Not -inf, which would give NaN if padding sees nothing.
            return torch.where(mask, bias, torch.finfo(x.dtype).min)
        return (mask + bias).clamp(min=torch.finfo(x.dtype).min)


def choose(given: bool | None, config: MegarecurConfig, name: str) -> bool:
    """Return an option of `forward`, or the config's."""
    return bool(getattr(config, name, False) if given is None else given)


def see_all(attention_mask: Tensor | None, config: MegarecurConfig) -> Tensor | None:
    """Return the mask for attention functions by which every token sees all tokens [B, K] but
    padding."""
    if attention_mask is None or "flash" in config._attn_implementation:
        return attention_mask
    return attention_mask.bool()[:, None, None]


def count_positions(attention_mask: Any, cache_position: Tensor) -> Tensor:
    """Return [B or 1, S]: positions among the tokens that are not padding, or in the cache."""
    length = len(cache_position)
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    return cache_position[None]


class Bias(nn.Module):
    """The bias of a head that is the table of the embedding."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, logits: Tensor) -> Tensor:
        return logits + self.bias


class MegarecurForCausalLM(MegarecurModel, GenerationMixin):
    """The model with a language-model head; a tied head is the embedding itself, with no parameters
    but a bias."""

    def add_head(self) -> None:
        config = self.config
        sizes, biased = (config.hidden_size, config.vocab_size), config.block["head_bias"]
        if config.tie_word_embeddings:
            self.head = Bias(sizes[1]) if biased else None
        else:
            self.head = nn.Linear(*sizes, bias=biased)

    def get_output_embeddings(self) -> nn.Module | None:
        return None if isinstance(self.head, Bias) else self.head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.head = value

    def project(self, x: Tensor, logits_to_keep: int | Tensor) -> Tensor:
        """Return logits [B, S, V] of states [B, S, D], of the tokens to keep."""
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        x = x[:, kept]
        if self.head is None or isinstance(self.head, Bias):
            table = parameter_of(self.embedding, "weight")
            logits = F.linear(x.to(table.device), table)  # Layers may be spread over devices.
            logits = logits if self.head is None else self.head(logits)
        else:
            logits = self.head(x)
        cap = self.config.block["logit_softcap"]
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def generate(self, *args: Any, num_loops: int | None = None, **kwargs: Any) -> Any:
        """Generate like transformers; num_loops: loops of the core instead of the config's."""
        former = self.config.num_loops
        if num_loops is not None:
            self.config.num_loops = num_loops
        # transformers 4 reuses a static cache of an earlier call, whatever its number of layers.
        kept = getattr(self, "_cache", None)
        if len(getattr(kept, "layers", ())) not in (0, self.config.num_hidden_layers):
            del self._cache
        try:
            return super().generate(*args, **kwargs)
        finally:
            if num_loops is not None:
                self.config.num_loops = former

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_loops: int | None = None,
        sample_ids: Tensor | None = None,
        cache: Any = None,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Return logits [B, S, V], and the loss of labels [B, S] (-100: none), which are shifted
        here.

        logits_to_keep: number of last tokens, or indices, to return logits of; others as in
        `MegarecurModel`.
        """
        outputs = super().forward(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache,
            output_attentions, output_hidden_states, None, num_loops, sample_ids, cache, **kwargs,
        )  # fmt: skip
        logits, loss = self.project(outputs.last_hidden_state, logits_to_keep), None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )  # fmt: skip
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output.to_tuple() if return_dict is False else output


# ----------------------------------------------------------------------------- encoder-decoders


class MegarecurEncoder(MegarecurModel):
    """The encoder of an encoder-decoder; its tokens see all of their sentence."""

    def __init__(self, config: MegarecurConfig, decoder: MegarecurModel) -> None:
        # In a tuple, so that the decoder is no part of its encoder.
        self.decoder = (decoder,)
        super().__init__(config)

    @property
    def shares_embedding(self) -> bool:
        """True if source sentences are embedded with the decoder's table."""
        return self.decoder[0].config.encoder["shared_embedding"]

    def make_embedding(self) -> nn.Module:
        """Return a table of its own, or none, which still may hold learned positions."""
        return nn.Module() if self.shares_embedding else super().make_embedding()

    def look_up(self, input_ids: Tensor) -> Tensor:
        """Return embeddings [B, S, D]."""
        return (self.decoder[0] if self.shares_embedding else self).embedding(input_ids)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        sample_ids: Tensor | None = None,
    ) -> Any:
        """Return hidden states [B, S, D] after the norm of the encoder; arguments as in
        `MegarecurModel`."""
        chosen = self.decoder[0].config
        if self.config._attn_implementation != chosen._attn_implementation:
            self.config._attn_implementation = chosen._attn_implementation
        return super().forward(
            input_ids, attention_mask, None, None, inputs_embeds, False,
            choose(output_attentions, chosen, "output_attentions"),
            choose(output_hidden_states, chosen, "output_hidden_states"),
            return_dict, sample_ids=sample_ids,
        )  # fmt: skip


class EndAtLimit(LogitsProcessor):
    """Lets only the end token follow at the maximum length, with the probability that it has;
    transformers' own processor takes it for certain, which prefers the hypotheses that are cut."""

    def __init__(self, max_length: int, end: Tensor) -> None:
        self.max_length, self.end = max_length, end

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[-1] != self.max_length - 1:
            return scores
        kept = torch.full_like(scores, -math.inf)
        kept[:, self.end] = scores[:, self.end]
        return kept


class MegarecurForConditionalGeneration(MegarecurForCausalLM):
    """An encoder, and a decoder that attends to its output; the decoder is the model itself.

    Source sentences end with the end token. The decoder starts from `decoder_start_token_id`.
    """

    def __init__(self, config: MegarecurConfig) -> None:
        self._supports_flex_attn = False  # It has no mask of all tokens but padding here.
        super().__init__(config)

    def add_head(self) -> None:
        super().add_head()
        self.encoder = MegarecurEncoder(self.config.of_encoder(), self)

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        return self.encoder

    def get_decoder(self) -> nn.Module:
        return self

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Return the decoder's input of labels [B, S]: the start token, and all labels but the
        last."""
        config = self.config
        start = getattr(config, "decoder_start_token_id", None)
        if start is None:
            start = self.generation_config.decoder_start_token_id
        if start is None:
            raise ValueError(
                "labels without decoder_input_ids need decoder_start_token_id; set it in the config"
            )
        pad = getattr(config, "pad_token_id", None)
        shifted = F.pad(labels[:, :-1], (1, 0), value=start)
        return shifted.masked_fill(shifted == -100, start if pad is None else pad)

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        """Keep the probability of a forced end token."""
        found = super()._get_logits_processor(*args, **kwargs)
        return LogitsProcessorList(
            EndAtLimit(p.max_length, p.eos_token_id)
            if type(p).__name__ == "ForcedEOSTokenLogitsProcessor"
            else p
            for p in found
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Any = None,
        encoder_outputs: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_loops: int | None = None,
        sample_ids: Tensor | None = None,
        cache: Any = None,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Return logits [B, S, V] of target tokens, and the loss of labels [B, S] (-100: none),
        which are the tokens that follow.

        Args:
            input_ids: source sentences [B, K], each with its end token.
            attention_mask: [B, K], 0 at padding of the source.
            decoder_input_ids: [B, S]; by default the start token and the labels but the last.
            decoder_attention_mask: as `attention_mask` of `MegarecurModel`.
            encoder_outputs: the encoder's output, in place of source sentences.
            inputs_embeds: [B, K, D], in place of input_ids.
            decoder_inputs_embeds: [B, S, D], in place of decoder_input_ids.
            num_loops: loops of the decoder's core instead of the config's.
            logits_to_keep: as in `MegarecurForCausalLM`; others as in `MegarecurModel`.
        """
        config = self.config
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids, attention_mask, inputs_embeds, output_attentions, output_hidden_states,
                sample_ids=sample_ids,
            )  # fmt: skip
        states = encoder_outputs[0]
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        encoded = Encoded(states, see_all(attention_mask, config))
        outputs = MegarecurModel.forward(
            self, decoder_input_ids, decoder_attention_mask, None, past_key_values,
            decoder_inputs_embeds, use_cache, output_attentions, output_hidden_states, None,
            num_loops, sample_ids, cache, encoded, **kwargs,
        )  # fmt: skip
        logits, loss = self.project(outputs.last_hidden_state, logits_to_keep), None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, shift_labels=labels, vocab_size=config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )  # fmt: skip
        output = Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE: outputs.get(CACHE)},
            decoder_hidden_states=outputs.hidden_states,
            decoder_attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=states,
            encoder_hidden_states=getattr(encoder_outputs, "hidden_states", None),
            encoder_attentions=getattr(encoder_outputs, "attentions", None),
        )
        return output.to_tuple() if return_dict is False else output


# ---------------------------------------------------------------------------------- classifiers

START, END = -1, -2
"""Placeholder ids for the learned START and END of a sequence."""


class CrossAttention(MultiHead):
    """Attention between tokens and a memory, without positions."""

    def __init__(self, config: MegarecurConfig) -> None:
        super().__init__(config)
        self.scale = config.block["attention_scale"] or self.head_dim**-0.5

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend from [B, S, D] to [B, K, D]; mask [B, 1, 1, K] is True where allowed."""
        q, k, v = (
            self.split(layer(y))
            for layer, y in ((self.query, x), (self.key, source), (self.value, source))
        )
        out = F.scaled_dot_product_attention(
            q, k, v, mask, scale=self.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return self.output(out.transpose(1, 2).flatten(2))


class HaltingHead(nn.Module):
    """The probability of stopping: sigmoid(down(gelu(up(z))))."""

    def __init__(self, hidden: int, read: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(read, hidden), nn.Linear(hidden, 1)

    def forward(self, z: Tensor) -> Tensor:
        logits = self.down(F.gelu(self.up(z))).squeeze(-1)
        return torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))


class TaskBlock(Block):
    """A block that may read a memory between attention and feed-forward; the first block has the
    halting head."""

    def __init__(self, config: MegarecurConfig, number: int, uses: int) -> None:
        super().__init__(config, number, uses)
        hidden, block = config.hidden_size, config.block
        if config.halting is not None:
            self.halting = HaltingHead(hidden, hidden * (1 + config.halting["transition"]))
        if config.temporal is not None:
            self.memory_attention_norm = Norm(hidden, block["norm"], block["norm_eps"])
            self.memory_norm = Norm(hidden, block["norm"], block["norm_eps"])
            self.memory_attention = CrossAttention(config)

    def read(self, x: Tensor, call: Call) -> Tensor:
        """Return the stream with the memory's read-out added."""
        if call.memory is None:
            return x
        source = self.memory_norm(call.memory)
        return x + self.memory_attention(self.memory_attention_norm(x), source)


class UpdateLayer(nn.Module):
    """The update m + CrossAttention(N1(m) -> N2(x)), then m + FFN(N3(m))."""

    def __init__(self, config: MegarecurConfig) -> None:
        super().__init__()
        hidden, block = config.hidden_size, config.block
        self.memory_norm, self.input_norm, self.feed_forward_norm = (
            Norm(hidden, block["norm"], block["norm_eps"]) for _ in range(3)
        )
        self.attention = CrossAttention(config)
        self.feed_forward = FeedForward(config, config.temporal["update_ffn_hidden_size"])

    def forward(self, memory: Tensor, x: Tensor, real: Tensor) -> Tensor:
        """Map [B, M, D] to [B, M, D], reading the tokens [B, C, D] that are not padding."""
        written, mask = self.input_norm(x), real[:, None, None]
        memory = memory + self.attention(self.memory_norm(memory), written, mask)
        return memory + self.feed_forward(self.feed_forward_norm(memory), NOTHING)


class Temporal(nn.Module):
    """The memory carried from chunk to chunk: its initial slots and the layers that write it."""

    def __init__(self, config: MegarecurConfig) -> None:
        super().__init__()
        temporal, hidden = config.temporal, config.hidden_size
        self.memory = nn.Parameter(torch.zeros(temporal["num_slots"], hidden))
        self.updates = nn.ModuleList(UpdateLayer(config) for _ in range(temporal["updates"]))
        self.pooling = temporal["pooling"]
        if self.pooling is not None:
            self.norm = Norm(hidden, config.block["norm"], config.block["norm_eps"])

    def write(self, memory: Tensor, x: Tensor, real: Tensor) -> Tensor:
        """Return the memory after a chunk; that of ended sequences is unchanged."""
        # Ended sequences read something, which is discarded; attention to nothing gives NaN.
        present = real.any(1, keepdim=True)
        new = memory
        for update in self.updates:
            new = update(new, x, real | ~present)
        return torch.where(present[..., None], new, memory)

    def pool(self, memory: Tensor) -> Tensor:
        """Return [B, D] of the memory after the last chunk."""
        normed = self.norm(memory)
        return normed.mean(1) if self.pooling == "mean" else normed[:, -1]


class TaskHead(nn.Module):
    """The head: START and END of sequences, a hidden layer with ReLU, and the classes."""

    def __init__(self, config: MegarecurConfig) -> None:
        super().__init__()
        task, hidden = config.task, config.hidden_size
        if task["augment"]:
            self.start, self.end = (nn.Parameter(torch.zeros(hidden)) for _ in range(2))
        features = hidden * (4 if task["kind"] == "pair" else 1)
        size = hidden if task["head_size"] is None else task["head_size"]
        self.hidden = nn.Linear(features, size) if size else None
        self.output = nn.Linear(
            size or features, 1 if config.num_labels == 2 else config.num_labels
        )

    def forward(self, features: Tensor) -> Tensor:
        """Return logits of classes; one logit z of two classes is [0, z]."""
        if self.hidden is not None:
            features = F.relu(self.hidden(features))
        logits = self.output(features)
        if logits.shape[-1] > 1:
            return logits
        return torch.cat([torch.zeros_like(logits), logits], dim=-1)


class MegarecurClassifier(MegarecurModel):
    """The layers of the map around a temporal memory, or until tokens halt, and a task's head.

    Pairs of sequences are input_ids [B, 2, S]. Padding may be on either side. Shapes: C tokens of a
    chunk, M memory slots; B is twice as many where sequences are pairs.
    """

    block_class = TaskBlock
    _can_compile_fullgraph = False

    def add_head(self) -> None:
        self.temporal = None if self.config.temporal is None else Temporal(self.config)
        self.task = TaskHead(self.config)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, Temporal):
            nn.init.normal_(module.memory)
        if isinstance(module, TaskHead) and hasattr(module, "start"):
            nn.init.normal_(module.start, std=std)
            nn.init.normal_(module.end, std=std)

    def classify(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Map [B, S] to [B, C] of sequences, or [B, S, C] of tokens."""
        task, config = self.config.task, self.config
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        real = attention_mask.bool()
        order = (~real).long().argsort(dim=1, stable=True)  # Padding moves to the end.
        ids, real = input_ids.gather(1, order), real.gather(1, order)
        if task["augment"]:
            ids, real = with_ends(ids, real)
        places = torch.arange(ids.shape[1], device=ids.device)
        chunk = ids.shape[1] if config.temporal is None else config.temporal["chunk_length"]
        positions = (places % chunk)[None].expand(ids.shape)
        x = self.scaled(self.embedding(ids.clamp(min=0)))
        if task["augment"]:
            kinds = ids[..., None]
            x = torch.where(kinds == END, parameter_of(self.task, "end").to(x), x)
            x = torch.where(kinds == START, parameter_of(self.task, "start").to(x), x)
        x = self.place(x, positions)
        memory = None
        if self.temporal is not None:
            memory = parameter_of(self.temporal, "memory").repeat(len(x), 1, 1)
        outputs = []
        for start in range(0, ids.shape[1], chunk):
            own = slice(start, start + chunk)
            before, seen = x[:, own], real[:, own]
            after = self.run_chunk(before, positions[:, own], seen, memory)
            after = torch.where(seen.any(1)[:, None, None], after, before)
            outputs.append(after)
            if self.temporal is not None:
                memory = self.temporal.write(memory, after, seen)
        if self.temporal is not None and self.temporal.pooling and task["kind"] != "token":
            return self.task(self.pair(self.temporal.pool(memory)))
        x = torch.cat(outputs, 1)
        x = x if self.final_norm is None else self.final_norm(x)
        if task["kind"] == "token":
            logits = self.task(x)
            return torch.zeros_like(logits).scatter(1, order[..., None].expand_as(logits), logits)
        return self.task(self.pair(pool(x, real, task["pooling"])))

    def run_chunk(
        self, x: Tensor, positions: Tensor, real: Tensor, memory: Tensor | None
    ) -> Tensor:
        """Run the whole map on a chunk [B, C, D]."""
        config = self.config
        # Rows without tokens here see padding, and are discarded.
        mask = (real | ~real.any(1, keepdim=True))[:, None, None]
        if config.block["causal"]:
            count = x.shape[1]
            mask = mask & torch.ones(count, count, dtype=torch.bool, device=x.device).tril()
        mask = mask.expand(-1, -1, x.shape[1], -1)
        if config._attn_implementation not in ("sdpa", "eager"):
            raise ValueError(
                f"attn_implementation={config._attn_implementation}: classifiers need sdpa or eager"
            )
        views: dict[str, View] = self.views(x, positions, positions[0], None, mask)
        call = Call(None, positions[0], {}, False, memory=memory)
        if config.halting is not None:
            return self.halt(x, positions, real, views, call)
        return self.walk(x, views, call, positions, None)[0]

    def halt(
        self, x: Tensor, positions: Tensor, real: Tensor, views: dict[str, View], call: Call
    ) -> Tensor:
        """Return the stick-breaking mixture of the states that a shared block visits, until no
        token continues (Ray Chowdhury & Caragea 2024, section 3)."""
        halting, block = self.config.halting, self.blocks[0]
        causal = self.config.block["causal"]
        wide = torch.promote_types(x.dtype, torch.float32)
        encodings = self.encodings(positions, x)
        lengths = real.sum(1, keepdim=True)
        state = mixture = x
        total, going = torch.zeros_like(x, dtype=wide), real
        stopped, left = (torch.full(real.shape, v, dtype=wide, device=x.device) for v in (0.0, 1.0))
        for number, use in enumerate(self.plan()):
            if not causal:
                going = going & (number < lengths + 1)
            if number and not bool(going.any()):
                break
            source = mixture if halting["mode"] == "token" and number else None
            candidate, _ = block(
                state, None, None if encodings is None else encodings[number],
                None, views[use.layer_type], use, call._replace(source=source),
            )  # fmt: skip
            read = [state, candidate] if halting["transition"] else [state]
            if halting["mode"] == "global":
                means = [mean(y.to(wide), real, causal) for y in read]
                p = block.halting(torch.cat(means, -1).to(x.dtype)).expand(real.shape)
            else:
                p = block.halting(torch.cat(read, -1))
            share = left * p
            total = total + share[..., None] * state.to(wide)
            stopped, left = stopped + share, left * (1.0 - p)
            mixed = total + (1.0 - stopped)[..., None] * candidate.to(wide)
            going = going & (stopped < halting["threshold"])
            mixture = torch.where(going[..., None], mixed.to(x.dtype), mixture)
            state = torch.where(going[..., None], candidate, state)
        return mixture

    def pair(self, pooled: Tensor) -> Tensor:
        """Return [B, D] of sequences; for pairs, whose sides are neighbours, [u; v; u*v; |u-v|]."""
        if self.config.task["kind"] != "pair":
            return pooled
        u, v = pooled[0::2], pooled[1::2]
        return torch.cat([u, v, u * v, (u - v).abs()], dim=-1)

    def check(self, input_ids: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
        """Reject unknown or missing arguments."""
        if kwargs:
            names = ", ".join(sorted(kwargs))
            raise TypeError(f"{type(self).__name__}.forward has no argument {names}")
        dims = 3 if self.config.task["kind"] == "pair" else 2
        if input_ids is None or input_ids.dim() != dims:
            shape = None if input_ids is None else tuple(input_ids.shape)
            wanted = "[B, 2, S]" if dims == 3 else "[B, S]"
            raise ValueError(f"input_ids has shape {shape}; give {wanted}")
        return input_ids


def mean(x: Tensor, real: Tensor, causal: bool) -> Tensor:
    """Return [B, S, D], means over the tokens up to each, or [B, 1, D], over all tokens except
    padding."""
    if causal:
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
    shares = real / real.sum(1, keepdim=True).clamp(min=1).to(x.dtype)
    return shares[:, None] @ x


def pool(x: Tensor, real: Tensor, pooling: str) -> Tensor:
    """Return [B, D]: the mean, last or first of the states that are not padding."""
    if pooling == "first":
        return x[:, 0]
    lengths = real.sum(1)
    if pooling == "end":
        return x[torch.arange(len(x), device=x.device), lengths - 1]
    wide = torch.promote_types(x.dtype, torch.float32)
    total = torch.where(real[..., None], x, 0.0).sum(1, dtype=wide)
    return (total / lengths[:, None]).to(x.dtype)


def with_ends(ids: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Put START before each sequence and END after its last token; padding is at the end."""
    rows, lengths = torch.arange(len(ids), device=ids.device), real.sum(1)
    wider = F.pad(F.pad(ids, (1, 0), value=START), (0, 1))
    wider[rows, lengths + 1] = END
    places = torch.arange(wider.shape[1], device=ids.device)
    return wider, places < lengths[:, None] + 2


class MegarecurForSequenceClassification(MegarecurClassifier):
    """A class per sequence, or per pair of sequences."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return logits [B, C] of input_ids [B, S], or [B, 2, S] of pairs; the mean loss of labels
        [B]."""
        kwargs.pop("num_items_in_batch", None)
        ids = self.check(input_ids, kwargs)
        if ids.dim() == 3:
            ids = ids.flatten(0, 1)
            attention_mask = None if attention_mask is None else attention_mask.flatten(0, 1)
        logits = self.classify(ids, attention_mask)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels.flatten())
        output = SequenceClassifierOutput(loss=loss, logits=logits)
        return output.to_tuple() if return_dict is False else output


class MegarecurForTokenClassification(MegarecurClassifier):
    """A class per token."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return logits [B, S, C] of input_ids [B, S]; the mean loss of labels [B, S], -100:
        none."""
        kwargs.pop("num_items_in_batch", None)
        logits = self.classify(self.check(input_ids, kwargs), attention_mask)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        output = TokenClassifierOutput(loss=loss, logits=logits)
        return output.to_tuple() if return_dict is False else output
