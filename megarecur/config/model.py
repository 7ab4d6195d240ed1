"""The section `model`: the shape of a block, and the layers around the blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megarecur.config.base import (
    UNREADABLE,
    Coefficient,
    Deviation,
    Epsilon,
    Factor,
    Length,
    Probability,
    Section,
    Size,
    Theta,
    as_size,
    derived,
    show,
)
from megarecur.config.rope import AnyRopeScaling

GATED = ("swiglu", "geglu", "geglu_tanh")


class ModelConfig(Section):
    """The shape of a block, and the layers around the blocks."""

    hidden_size: Size
    """Width of the residual stream."""
    num_heads: Size
    """Query heads of attention."""
    num_kv_heads: Size = derived()
    """Key and value heads; fewer than num_heads give grouped-query attention. Default:
    num_heads."""
    head_dim: Size = derived()
    """Width of an attention head. Default: hidden_size / num_heads, rounded down."""
    ffn_hidden_size: Size = derived()
    """Width of the feed-forward. Default: 8/3 hidden_size rounded up to a multiple of 64 if
    feed_forward is gated, else 4 hidden_size."""
    vocab_size: Annotated[int, Field(gt=0, le=1 << 26)] | None = None
    """Rows of the embedding. Default: the size of the tokenizer's vocabulary."""
    source_vocab_size: Annotated[int, Field(gt=0, le=1 << 26)] | None = None
    """Rows of an embedding of source sentences that has a table of its own. Default:
    vocab_size."""
    positions: Literal[
        "rope", "xpos", "alibi", "learned", "sinusoidal", "sinusoidal_2d", "none"
    ] = "rope"
    """Position encoding. xpos: rotary, with scores that decay by distance where tokens look back
    (Sun et al. 2023). sinusoidal_2d, for images: a quarter of the channels each for the sines and
    cosines of a patch's column and row, of frequencies 10000^(-k / (D/4 - 1)) (Beyer et al. 2022);
    a class token has none. All others count the patches of a picture row after row, after a class
    token."""
    level_encoding: Literal["none", "sinusoidal"] = "none"
    """Encoding added to the state before every step of the layer map. sinusoidal: sinusoids of the
    position and of the level, which is the loop of the block (Dehghani et al. 2019). With one
    shared block this is the Universal baseline of RingFormer; `positions: none` then adds no
    others."""
    sinusoid_layout: Literal["split", "interleaved"] = "split"
    """Channels of sinusoidal positions and levels. split: all sines, then all cosines, of
    frequencies 10000^(-k / (D/2 - 1)) (tensor2tensor, fairseq); interleaved: sines and cosines by
    turns, of frequencies 10000^(-2k / D) (Vaswani et al. 2017; RingFormer)."""
    rope_theta: Theta = 10000.0
    """Base of the rotary frequencies."""
    rope_interleaved: bool = False
    """Rotate dims (2i, 2i+1) as pairs (Huginn, GPT-J) instead of (i, i + head_dim/2) (Llama)."""
    rope_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of head_dim that is rotated, starting at its first dim (GPT-NeoX)."""
    rope_scaling_factor: Factor = 1.0
    """Divisor of positions before rotation (linear scaling). Sliding blocks with rope_theta_local
    are not scaled."""
    rope_scaling: AnyRopeScaling | None = None
    """Other scaling of rotary positions: {kind: dynamic | yarn | llama3, ...}. Sliding blocks with
    rope_theta_local are not scaled. Default: none."""
    rope_theta_local: Theta | None = None
    """Base of the rotary frequencies in sliding blocks (Gemma 3). Default: rope_theta."""
    max_positions: Length | None = None
    """Rows of the learned position table. Default: data.seq_length, or temporal.chunk_length."""
    xpos_scale_base: Annotated[float, Field(gt=0.0, le=1e9)] = 512.0
    """Distance, in tokens, over which xpos applies its full decay once."""
    norm: Literal["rms", "layer"] = "rms"
    """RMS norm or layer norm."""
    norm_eps: Epsilon = 1e-5
    """Epsilon of all norms."""
    final_norm: bool = True
    """Norm the stream before the head. false: the head reads the stream unchanged (Ray Chowdhury &
    Caragea 2024), which norm_position post always does."""
    final_norm_eps: Epsilon | None = None
    """Epsilon of the final norm (1e-6 in RingFormer's vision model). Default: norm_eps."""
    norm_position: Literal["pre", "post", "sandwich", "peri", "output"] = "pre"
    """Position of norms N around a branch f. pre: x + f(N(x)); post: N(x + f(x)); sandwich: N2(x +
    f(N1(x))), as in Huginn; peri: x + N2(f(N1(x))), as in Gemma 2 (Peri-LN, Kim et al. 2025);
    output: x + N(f(x)), as in OLMo 2."""
    residual: Literal["plain", "admin"] = "plain"
    """Residual connection. plain: x + f(x). admin: N(x omega + f(x)), with one trained vector omega
    for attention and one for the feed-forward of each use of a block (Liu et al. 2020; Takase &
    Kiyono 2021), so that deep shared stacks train with norm_position post. A pass over the first
    samples sets omega."""
    parallel_residual: bool = False
    """Compute x + attention(N1(x)) + feed_forward(N2(x)), as in GPT-NeoX. Needs norm_position
    pre."""
    feed_forward: Literal["swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh", "relu"] = "swiglu"
    """Kind of feed-forward. The first three are gated; _tanh: GELU approximated by tanh (Gemma);
    relu: as in Vaswani et al. 2017 and fairseq."""
    shared_feed_forward: bool = False
    """Use one feed-forward in all blocks, owned by the first; each block keeps its own attention
    and norms (Pires et al. 2023, One Wide Feedforward)."""
    gate: bool = False
    """Gate each block: y = g (a + FFN(N(a))) + (1 - g) x, with x the input of the block, a the
    output of attention, and g = sigmoid(W2 gelu(W1 N(a) + b1) + b2) per channel (Ray Chowdhury &
    Caragea 2024, section 3). Needs norm_position pre. There is no dropout inside g."""
    gate_hidden_size: Size | None = None
    """Width between the two matrices of the gate. Default: ffn_hidden_size."""
    qk_norm: bool = False
    """Apply RMS norms to queries and keys before rotation."""
    qk_norm_over: Literal["head", "all"] = "head"
    """Extent of qk_norm. head: norm each head separately (Qwen3, Gemma 3); all: norm all heads
    together (OLMo 2)."""
    attention_scale: Factor | None = None
    """Factor on attention scores. Default: head_dim ** -0.5."""
    attention_softcap: Factor | None = None
    """Cap of attention scores: cap x tanh(score / cap) (Gemma 2); attention then takes the (slower)
    math path. Default: no cap."""
    logit_softcap: Factor | None = None
    """Cap of the logits: cap x tanh(logit / cap). Default: no cap."""
    causal: bool = True
    """Let a token see only the tokens before it. false: an encoder, in which a token sees all
    tokens of its document."""
    sliding_window: Length | None = None
    """Tokens that sliding blocks see, the current one included. Training computes the scores of a
    window only, unless train.attention=dense; generation caches all tokens. Default: no sliding
    blocks."""
    attention_types: Annotated[tuple[Literal["sliding", "full"], ...], Field(min_length=1)] = (
        "full",
    )
    """Attention of the blocks (not of the layers that run): block b has entry b modulo length, such
    as [sliding, full] in Gemma 2. Default: all sliding with a sliding_window, all full without."""
    attention_bias: Literal["none", "qk", "qkv", "all"] = "none"
    """Attention projections with a bias; `all` includes the output projection."""
    feed_forward_bias: bool = False
    """Give the linear layers of the feed-forward a bias."""
    head_bias: bool = False
    """Give the vocabulary's head a bias (RingFormer's translation model)."""
    tie_embeddings: bool = derived()
    """Use one table as embedding and as head. Default: true, unless tie is none."""
    tie: Literal["none", "decoder", "all"] | None = None
    """Tables of an encoder-decoder that are one. decoder: the embedding of targets is the head;
    all: that of source sentences too; none: three tables. Default: all with tie_embeddings, none
    without."""
    scale_embeddings: bool = False
    """Multiply token embeddings by sqrt(hidden_size)."""
    dropout: Probability = 0.0
    """Dropout on the embedding and on the output of every attention and feed-forward."""
    attention_dropout: Probability = 0.0
    """Dropout on attention weights; above 0 attention takes the (slower) math path."""
    z_loss: Coefficient = 0.0
    """Coefficient of mean(logsumexp(logits)^2) in the loss (PaLM, section 5)."""
    init_std: Deviation = 0.02
    """Standard deviation of initial weights."""
    init_scaling: Literal["none", "depth", "xavier"] = "none"
    """Scaling of initial weights. depth: output projections of attention and feed-forward start at
    init_std/sqrt(2 x depth), where depth is the unrolled one. xavier: every matrix that multiplies
    hidden states starts at sqrt(2/(in + out)) (Glorot & Bengio 2010), queries, keys and values at
    sqrt(1/(in + out)); embeddings and the vocabulary's head start at init_std."""

    @model_validator(mode="before")
    @classmethod
    def fill_in(cls, values: Any) -> Any:
        """Fill in the sizes that follow from others."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        hidden, heads = (as_size(values.get(key)) for key in ("hidden_size", "num_heads"))
        gated = values.get("feed_forward", "swiglu") in GATED
        head_dim = ffn_hidden_size = UNREADABLE
        if hidden is not None:
            ffn_hidden_size = -(-8 * hidden // 192) * 64 if gated else 4 * hidden
            head_dim = max(hidden // heads, 1) if heads is not None else UNREADABLE
        values.setdefault("num_kv_heads", UNREADABLE if heads is None else heads)
        values.setdefault("head_dim", head_dim)
        values.setdefault("tie_embeddings", values.get("tie") != "none")
        values.setdefault("ffn_hidden_size", ffn_hidden_size)
        if values.get("sliding_window") is not None:
            values.setdefault("attention_types", ("sliding",))
        if values.get("gate") is True and values.get("gate_hidden_size") is None:
            values["gate_hidden_size"] = values["ffn_hidden_size"]
        return values

    def find_problems(self) -> Iterator[str]:
        """Yield shapes that attention does not support, and options that exclude each other."""
        if self.num_heads % self.num_kv_heads:
            yield (
                f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}; choose "
                "a divisor, or omit it"
            )
        yield from self.find_rotary_problems()
        if self.positions == "sinusoidal_2d" and (self.hidden_size % 4 or self.hidden_size < 8):
            yield (
                f"positions=sinusoidal_2d needs a hidden_size of at least 8 that 4 divides, not "
                f"{self.hidden_size}; choose one, or other positions"
            )
        if self.tie is not None and self.tie_embeddings != (self.tie != "none"):
            yield (
                f"tie={self.tie} with tie_embeddings={show(self.tie_embeddings)} contradict each "
                "other; leave one of them out"
            )
        if self.qk_norm_over != "head" and not self.qk_norm:
            yield (
                f"qk_norm_over={self.qk_norm_over} needs qk_norm=true; set it to true, or "
                "leave qk_norm_over out"
            )
        if not self.final_norm and (self.norm_position == "post" or self.final_norm_eps):
            key = "final_norm" if self.norm_position == "post" else "final_norm_eps"
            yield (
                f"final_norm=false with norm_position={self.norm_position} and final_norm_eps="
                f"{show(self.final_norm_eps)}: one of them has no effect; leave {key} out"
            )
        if self.gate and (self.norm_position != "pre" or self.parallel_residual):
            yield (
                f"gate=true needs norm_position=pre without parallel_residual, not norm_position="
                f"{self.norm_position} with parallel_residual={show(self.parallel_residual)}; set "
                "norm_position to pre and parallel_residual to false, or gate to false"
            )
        if not self.gate and self.gate_hidden_size is not None:
            yield f"gate_hidden_size={self.gate_hidden_size} needs gate=true; omit it"
        if self.parallel_residual and self.norm_position != "pre":
            yield (
                f"parallel_residual=true needs norm_position=pre, not {self.norm_position}; set "
                "norm_position to pre, or parallel_residual to false"
            )
        if self.residual == "admin" and self.norm_position != "post":
            yield (
                f"residual=admin needs norm_position=post, not {self.norm_position}; set "
                "norm_position to post, or residual to plain"
            )
        yield from self.find_window_problems()

    def find_rotary_problems(self) -> Iterator[str]:
        """Yield shapes that rotary positions do not support, and options without effect."""
        if self.positions in ("rope", "xpos") and self.head_dim % 2:
            yield (
                f"positions={self.positions} rotates pairs of dims, and head_dim={self.head_dim} "
                "is odd; choose an even head_dim, or other positions"
            )
        if self.positions == "rope" and (self.rotary_dims % 2 or not self.rotary_dims):
            yield (
                f"rope_fraction={self.rope_fraction} of head_dim={self.head_dim} rotates "
                f"{self.rotary_dims} dims, which make no pairs; choose another rope_fraction, or "
                "omit it"
            )
        if self.positions != "rope":
            for key in ("rope_fraction", "rope_scaling_factor", "rope_theta_local", "rope_scaling"):
                value = getattr(self, key)
                if value not in (None, 1.0):
                    shown = (
                        f"{key}.kind={value.kind}" if key == "rope_scaling" else f"{key}={value}"
                    )
                    yield f"{shown} needs positions=rope, not {self.positions}; leave {key} out"
        if self.positions != "xpos" and self.xpos_scale_base != 512.0:
            yield (
                f"xpos_scale_base={self.xpos_scale_base} needs positions=xpos, not "
                f"{self.positions}; omit it"
            )
        if self.rope_scaling is None:
            return
        kind, dims = self.rope_scaling.kind, self.rotary_dims
        if self.rope_scaling_factor != 1.0:
            yield (
                f"rope_scaling_factor={self.rope_scaling_factor} with rope_scaling.kind={kind}: "
                "two ways to scale exclude each other; leave one of them out"
            )
        if kind == "yarn" and self.rope_theta <= 1.0:
            yield (
                f"rope_theta={self.rope_theta} with rope_scaling.kind=yarn: must be above 1; raise "
                "rope_theta"
            )
        if kind == "dynamic" and dims <= 2:
            yield (
                f"rope_scaling.kind=dynamic needs more than {dims} rotated dims of a head; raise "
                "head_dim or rope_fraction"
            )

    def find_window_problems(self) -> Iterator[str]:
        """Yield options that sliding blocks need or exclude, and options without effect."""
        sliding = "sliding" in self.attention_types
        if sliding and self.sliding_window is None:
            yield (
                f"attention_types={show(self.attention_types)} has sliding blocks without a "
                "sliding_window; set sliding_window to the tokens they see"
            )
        if self.sliding_window is not None and not sliding:
            yield (
                f"sliding_window={self.sliding_window} needs a sliding block in attention_types="
                f"{show(self.attention_types)}; leave one of them out"
            )
        if self.sliding_window is not None and not self.causal:
            yield (
                f"sliding_window={self.sliding_window} with causal=false is not available in this "
                "version; leave one of them out"
            )
        if self.rope_theta_local is not None and not sliding:
            yield (
                f"rope_theta_local={self.rope_theta_local} needs sliding blocks; set "
                "sliding_window, or leave rope_theta_local out"
            )

    @property
    def gated(self) -> bool:
        """True if the feed-forward is gated."""
        return self.feed_forward in GATED

    @property
    def rotary_dims(self) -> int:
        """Number of dims of a head that rotary positions rotate."""
        return int(self.head_dim * self.rope_fraction)

    def slides(self, block: int) -> bool:
        """Return True if a block's attention is restricted to the sliding window."""
        return self.attention_types[block % len(self.attention_types)] == "sliding"
