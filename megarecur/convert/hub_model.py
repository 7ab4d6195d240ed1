"""A Transformer whose layers share blocks, for transformers; exported folders carry this file.

    model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
    model.generate(**tokenizer("def f(", return_tensors="pt"), max_new_tokens=50)

It needs transformers and torch, and nothing of the code that trained the model. Every block is
stored and held once; `layer_map` says which one each layer runs, so that depth (and the cache of
keys and values, which has an entry per layer) may be many times the number of blocks.
Shapes: B samples, S new tokens, K tokens so far, D hidden, N heads, H head_dim, V vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

BLOCK: dict[str, Any] = {
    "positions": "rope",  # rope, alibi, learned, sinusoidal, none
    "rope_theta": 10000.0,
    "rope_interleaved": False,  # pairs (2i, 2i + 1) instead of (i, i + H/2)
    "rope_fraction": 1.0,  # of head_dim, which rotates
    "rope_scaling_factor": 1.0,
    "rope_theta_local": None,  # of sliding blocks
    "norm": "rms",  # rms, layer
    "norm_eps": 1e-5,
    "norm_position": "pre",  # pre, post, sandwich, peri
    "parallel_residual": False,
    "feed_forward": "swiglu",  # swiglu, geglu, geglu_tanh, gelu, gelu_tanh
    "qk_norm": False,
    "attention_scale": None,  # left out: H ** -0.5
    "attention_softcap": None,
    "logit_softcap": None,
    "sliding_window": None,
    "attention_types": ["full"],  # block b has entry b modulo length
    "attention_bias": "none",  # none, qk, qkv, all
    "feed_forward_bias": False,
    "scale_embeddings": False,
}
"""What a block computes, with the values that `MegarecurConfig.block` may leave out."""


class MegarecurConfig(PretrainedConfig):
    """Shapes under their usual names, and what only such models have:

    layer_map: the block that every layer runs, from 0.
    block: see `BLOCK`.
    adapters: None, or {rank, scale, targets, norms, biases}: low-rank deltas of the linear layers,
        and of their biases, and norms that each use of a block has of its own.
    injection: None, or {kind: add | linear, source, steps, initial_state}: what enters layer
        `source` is kept, and enters the layers `steps` again; initial_state zero: the state starts
        anew there.
    normalized_steps: layers before which the final norm is applied.
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
        adapters: dict[str, Any] | None = None,
        injection: dict[str, Any] | None = None,
        normalized_steps: list[int] | None = None,
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
        self.layer_map = list(layer_map or [0])
        self.block = BLOCK | (block or {})
        self.adapters = adapters
        self.injection = injection
        self.normalized_steps = list(normalized_steps or [])
        self.use_cache = use_cache
        kwargs.pop("num_hidden_layers", None)
        self.num_hidden_layers = len(self.layer_map)
        # Some versions know it, others do not: set here too.
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


# ---------------------------------------------------------------------------------------- parts


class Norm(nn.Module):
    """RMS norm or LayerNorm, in fp32 at least."""

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
    """scale B A x, which one use of a block adds to a linear layer, and a delta of its bias."""

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


class View(NamedTuple):
    """What the tokens of a call see, apart from the hidden state."""

    mask: Tensor | None
    """Added to scores [B, N, S, K]; None: causal, or all."""
    is_causal: bool
    rotation: tuple[Tensor, Tensor] | None
    """cos and sin [B, S, 1, dims/2]."""


Own = nn.ModuleDict | None
"""What one use of a block has of its own: LowRank by the layer's name, Norm by the norm's."""


def apply(linear: nn.Linear, x: Tensor, own: Own, name: str) -> Tensor:
    """A linear layer, with the delta of this use of the block if it has one."""
    y = linear(x)
    return y if own is None or name not in own else y + own[name](x)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor], interleaved: bool) -> Tensor:
    """Rotate the first dims of queries or keys [B, S, N, H], as many as there are angles for."""
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


def alibi_slopes(num_heads: int) -> Tensor:
    """2^(-8k/N) (Press et al. 2022); head counts that are no power of two as in MPT."""
    count = 2 ** math.ceil(math.log2(num_heads))
    slopes = 2.0 ** (-8.0 / count * torch.arange(1, count + 1))
    if count != num_heads:
        slopes = torch.cat([slopes[1::2], slopes[::2]])[:num_heads]
    return slopes


class Attention(nn.Module):
    """Query head i reads key head i // (heads / key heads)."""

    def __init__(self, config: MegarecurConfig, head_norms: bool) -> None:
        super().__init__()
        block, self.head_dim = config.block, config.head_dim
        hidden, queries = config.hidden_size, config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        biased = {"none": "", "qk": "qk", "qkv": "qkv", "all": "qkvo"}[block["attention_bias"]]
        self.query = nn.Linear(hidden, queries, "q" in biased)
        self.key = nn.Linear(hidden, keys, "k" in biased)
        self.value = nn.Linear(hidden, keys, "v" in biased)
        self.output = nn.Linear(queries, hidden, "o" in biased)
        self.query_norm = Norm(self.head_dim, "rms", block["norm_eps"]) if head_norms else None
        self.key_norm = Norm(self.head_dim, "rms", block["norm_eps"]) if head_norms else None
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.interleaved, self.softcap = block["rope_interleaved"], block["attention_softcap"]
        self.scale = block["attention_scale"] or self.head_dim**-0.5

    def forward(self, x: Tensor, view: View, cache: Any, layer: int, own: Own) -> Tensor:
        q, k, v = (
            apply(linear, x, own, name).unflatten(-1, (-1, self.head_dim))
            for linear, name in ((self.query, "query"), (self.key, "key"), (self.value, "value"))
        )
        if own is not None and "query_norm" in own:
            q, k = own["query_norm"](q), own["key_norm"](k)
        elif self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if view.rotation is not None:
            q = rotate(q, view.rotation, self.interleaved)
            k = rotate(k, view.rotation, self.interleaved)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if cache is not None:
            k, v = cache.update(k, v, layer)
        k, v = (t.repeat_interleave(self.groups, dim=1) for t in (k, v))
        if self.softcap is not None:
            out = self.attend_capped(q, k, v, view)
        else:
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=view.mask, is_causal=view.is_causal, scale=self.scale
            )
        return apply(self.output, out.transpose(1, 2).flatten(2), own, "output")

    def attend_capped(self, q: Tensor, k: Tensor, v: Tensor, view: View) -> Tensor:
        """Scores become cap x tanh(score / cap)."""
        scores = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32))
        scores = self.softcap * torch.tanh(scores * self.scale / self.softcap)
        if view.mask is not None:
            scores = scores + view.mask
        elif view.is_causal:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        return scores.softmax(-1).to(v.dtype) @ v


class FeedForward(nn.Module):
    """down(f(gate(x)) up(x)), or down(f(up(x))) without a gate."""

    def __init__(self, config: MegarecurConfig) -> None:
        super().__init__()
        kind, bias = config.block["feed_forward"], config.block["feed_forward_bias"]
        sizes = config.hidden_size, config.intermediate_size
        gated = kind in ("swiglu", "geglu", "geglu_tanh")
        self.gate = nn.Linear(*sizes, bias) if gated else None
        self.up = nn.Linear(*sizes, bias)
        self.down = nn.Linear(*sizes[::-1], bias)
        self.is_silu, self.approximate = kind == "swiglu", "tanh" if "tanh" in kind else "none"

    def forward(self, x: Tensor, own: Own) -> Tensor:
        up = apply(self.up, x, own, "up")
        inner = up if self.gate is None else apply(self.gate, x, own, "gate")
        inner = F.silu(inner) if self.is_silu else F.gelu(inner, approximate=self.approximate)
        return apply(self.down, inner if self.gate is None else inner * up, own, "down")


class Block(nn.Module):
    """One set of weights, used by any number of layers.

    Norm positions: pre, x + f(N(x)); post, N(x + f(x)); sandwich, N2(x + f(N1(x)));
    peri, x + N2(f(N1(x))).
    """

    def __init__(self, config: MegarecurConfig, number: int, uses: int) -> None:
        super().__init__()
        block, adapters = config.block, config.adapters
        self.position, self.parallel = block["norm_position"], block["parallel_residual"]
        types = block["attention_types"]
        self.slides = types[number % len(types)] == "sliding"
        injection, self.injection = config.injection, None
        mixes = injection is not None and injection["kind"] == "linear"
        if mixes and config.layer_map[injection["source"]] == number:
            self.injection = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        names = ["attention_norm", "feed_forward_norm"]
        if self.position in ("sandwich", "peri"):
            names += ["attention_output_norm", "feed_forward_output_norm"]
        own_norms = adapters is not None and adapters["norms"]
        for name in () if own_norms else names:
            self.add_module(name, Norm(config.hidden_size, block["norm"], block["norm_eps"]))
        self.attention = Attention(config, block["qk_norm"] and not own_norms)
        self.feed_forward = FeedForward(config)
        self.loops = nn.ModuleList()
        for _ in range(uses if adapters is not None else 0):
            own = nn.ModuleDict()
            for target in adapters["targets"]:
                owner = self.feed_forward if target in ("gate", "up", "down") else self.attention
                own[target] = LowRank(
                    getattr(owner, target),
                    adapters["rank"],
                    adapters["scale"],
                    adapters.get("biases", False),
                )
            if own_norms:
                for name in names:
                    own[name] = Norm(config.hidden_size, block["norm"], block["norm_eps"])
                for name in ("query_norm", "key_norm") if block["qk_norm"] else ():
                    own[name] = Norm(config.head_dim, "rms", block["norm_eps"])
            self.loops.append(own)

    def forward(self, x: Tensor, view: View, cache: Any, layer: int, loop: int) -> Tensor:
        own = self.loops[loop] if len(self.loops) else None

        def norm(name: str, y: Tensor) -> Tensor:
            return (own[name] if own is not None and name in own else getattr(self, name))(y)

        def attend(y: Tensor) -> Tensor:
            return self.attention(y, view, cache, layer, own)

        if self.position == "post":
            x = norm("attention_norm", x + attend(x))
            return norm("feed_forward_norm", x + self.feed_forward(x, own))
        mixed = attend(norm("attention_norm", x))
        if self.position == "pre":
            if self.parallel:
                return x + mixed + self.feed_forward(norm("feed_forward_norm", x), own)
            x = x + mixed
            return x + self.feed_forward(norm("feed_forward_norm", x), own)
        if self.position == "peri":
            x = x + norm("attention_output_norm", mixed)
            fed = self.feed_forward(norm("feed_forward_norm", x), own)
            return x + norm("feed_forward_output_norm", fed)
        x = norm("attention_output_norm", x + mixed)
        fed = self.feed_forward(norm("feed_forward_norm", x), own)
        return norm("feed_forward_output_norm", x + fed)


# ---------------------------------------------------------------------------------------- model


class MegarecurForCausalLM(PreTrainedModel, GenerationMixin):
    """Embedding, the layers of the map, head."""

    config_class = MegarecurConfig
    _no_split_modules = ["Block"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: MegarecurConfig) -> None:
        super().__init__(config)
        block, hidden = config.block, config.hidden_size
        self.embedding = nn.Embedding(config.vocab_size, hidden)
        if block["positions"] == "learned":
            table = torch.zeros(config.max_position_embeddings, hidden)
            self.embedding.positions = nn.Parameter(table)
        uses = Counter(config.layer_map)
        self.blocks = nn.ModuleList(
            Block(config, number, uses[number]) for number in range(max(config.layer_map) + 1)
        )
        self.final_norm = None
        if block["norm_position"] != "post":
            self.final_norm = Norm(hidden, block["norm"], block["norm_eps"])
        # A tied head is the embedding itself, and no parameter.
        tied = config.tie_word_embeddings
        self.head = None if tied else nn.Linear(hidden, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Of models that start anew; loaded ones have everything."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
            if hasattr(module, "positions"):
                nn.init.normal_(module.positions, std=std)
        elif isinstance(module, LowRank):
            nn.init.normal_(module.lora_a, std=module.lora_a.shape[1] ** -0.5)
            nn.init.zeros_(module.lora_b)
        elif isinstance(module, Norm):
            nn.init.ones_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding = value

    def get_output_embeddings(self) -> nn.Module | None:
        return self.head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> Any:
        """As every causal model of transformers; attention_mask [B, K] marks padding with 0."""
        config = self.config
        if use_cache is None:
            use_cache = config.use_cache and not self.training
        cache = past_key_values
        if cache is None and use_cache:
            cache = DynamicCache()
        past = cache.get_seq_length() if cache is not None else 0
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(past, past + x.shape[1], device=x.device)[None]
        x = self.place(x, position_ids)
        views = self.views(x, position_ids, past, attention_mask)
        states, loops = [x], Counter[int]()
        injection = config.injection or {"source": None, "steps": ()}
        kept = x
        for layer, number in enumerate(config.layer_map):
            block = self.blocks[number]
            if layer in config.normalized_steps and self.final_norm is not None:
                x = self.final_norm(x)
            if layer == injection["source"]:
                kept = x
                if injection["initial_state"] == "zero":
                    x = torch.zeros_like(x)
            if layer in injection["steps"]:
                mix = block.injection
                x = x + kept if mix is None else mix(torch.cat([x, kept], dim=-1))
            x = block(x, views[block.slides], cache, layer, loops[number])
            loops[number] += 1
            states.append(x)
        x = x[:, -logits_to_keep:] if logits_to_keep else x
        x = x if self.final_norm is None else self.final_norm(x)
        logits = F.linear(x, self.embedding.weight) if self.head is None else self.head(x)
        cap = config.block["logit_softcap"]
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=config.vocab_size, **kwargs
            )
        if output_hidden_states is None:
            output_hidden_states = getattr(config, "output_hidden_states", False)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=cache if use_cache else None,
            hidden_states=tuple(states) if output_hidden_states else None,
        )
        return output.to_tuple() if return_dict is False else output

    def place(self, x: Tensor, positions: Tensor) -> Tensor:
        """Scale embeddings [B, S, D], and add positions where the scheme does."""
        hidden, block = self.config.hidden_size, self.config.block
        wide = torch.promote_types(x.dtype, torch.float32)
        if block["scale_embeddings"]:
            x = (x.to(wide) * hidden**0.5).to(x.dtype)
        if block["positions"] == "learned":
            x = x + F.embedding(positions, self.embedding.positions)
        if block["positions"] == "sinusoidal":
            half = (hidden + 1) // 2
            exponent = torch.arange(half, device=x.device).to(wide) / max(half - 1, 1)
            angle = positions[..., None].to(wide) * 10000.0 ** (-exponent)
            x = x + torch.cat([angle.sin(), angle.cos()], dim=-1)[..., :hidden].to(x.dtype)
        return x

    def views(
        self, x: Tensor, positions: Tensor, past: int, padding: Tensor | None
    ) -> dict[bool, View]:
        """Masks and rotations, made once for all layers; True: of sliding blocks."""
        block, length = self.config.block, x.shape[1]
        query = torch.arange(past, past + length, device=x.device)
        keys = torch.arange(past + length, device=x.device)
        if padding is not None and padding.dim() != 2:
            raise ValueError(f"attention_mask has {padding.dim()} dims; give one of [B, K]")
        if padding is not None and bool(padding.all()):
            padding = None

        def mask(window: int | None) -> Tensor | None:
            cut = window is not None and past + length > window
            plain = padding is None and block["positions"] != "alibi" and not cut
            if plain and (past == 0 or length == 1):
                return None
            allowed = keys <= query[:, None]
            if window is not None:
                allowed &= keys > query[:, None] - window
            allowed = allowed[None, None]
            if padding is not None:
                allowed = allowed & padding[:, None, None, :].bool()
            bias = torch.zeros((), dtype=x.dtype, device=x.device)
            if block["positions"] == "alibi":
                slopes = alibi_slopes(self.config.num_attention_heads).to(x.device)
                distance = (query[:, None] - keys).to(torch.float32)
                bias = (-slopes[:, None, None] * distance)[None].to(x.dtype)
            # Not -inf: where padding sees nothing, that would make numbers that are none.
            return torch.where(allowed, bias, torch.finfo(x.dtype).min)

        def rotation(theta: float, factor: float) -> tuple[Tensor, Tensor] | None:
            if block["positions"] != "rope":
                return None
            dims = int(self.config.head_dim * block["rope_fraction"])
            wide = torch.promote_types(x.dtype, torch.float32)
            exponent = torch.arange(0, dims, 2, device=x.device).to(wide) / dims
            angle = positions[..., None, None].to(wide) * (theta ** (-exponent) / factor)
            return angle.cos(), angle.sin()

        turned = rotation(block["rope_theta"], block["rope_scaling_factor"])
        local = block["rope_theta_local"]
        turned_local = turned if local is None else rotation(local, 1.0)
        full, sliding = mask(None), mask(block["sliding_window"])
        return {
            False: View(full, full is None and past == 0, turned),
            True: View(sliding, sliding is None and past == 0, turned_local),
        }
