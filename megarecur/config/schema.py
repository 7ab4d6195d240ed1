"""The schema of a run: pydantic models, frozen, unknown keys refused.

A field is `fixed` unless declared with `free(...)`: a run that resumes may change its free fields
only. Values left out that follow from others (`head_dim`, ...) are filled in at validation, so that
the resolved config of a run folder states every one of them.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

CONFIG_VERSION: Literal[1] = 1
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]


def free(default: Any = ..., **constraints: Any) -> Any:
    """A field that may differ when a run resumes."""
    return Field(default, json_schema_extra={"resume": "free"}, **constraints)


class Section(BaseModel):
    """One section of the config."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


# ---------------------------------------------------------------------------------------- model


GATED = ("swiglu", "geglu", "geglu_tanh")


class ModelConfig(Section):
    """One block's shape, and what surrounds the blocks."""

    hidden_size: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    """Fewer than `num_heads`: grouped-query attention. Left out: `num_heads`."""
    head_dim: PositiveInt
    """Left out: hidden_size / num_heads."""
    ffn_hidden_size: PositiveInt
    """Left out: 8/3 hidden_size rounded up to a multiple of 64 if gated, else 4 hidden_size."""
    vocab_size: PositiveInt | None = None
    """Rows of the embedding. Left out: the tokenizer's vocabulary."""
    positions: Literal["rope", "xpos", "alibi", "learned", "sinusoidal", "none"] = "rope"
    """xpos: rotary, with scores that decay by distance where tokens look back (Sun et al. 2023)."""
    level_encoding: Literal["none", "sinusoidal"] = "none"
    """sinusoidal: sinusoids of the position and of the level, which is the loop of the block, are
    added to the state before every step of the map (Dehghani et al. 2019). With one
    shared block the Universal baseline of RingFormer; `positions: none` then adds no others."""
    rope_theta: PositiveFloat = 10000.0
    rope_interleaved: bool = False
    """Rotate dims (2i, 2i+1) as pairs (Huginn, GPT-J) instead of (i, i + head_dim/2) (Llama)."""
    rope_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of head_dim that is rotated, from its first dim on (GPT-NeoX)."""
    rope_scaling_factor: PositiveFloat = 1.0
    """Positions are divided by it before they rotate (linear scaling); not those of sliding blocks
    with a base of their own."""
    rope_theta_local: PositiveFloat | None = None
    """Base of the rotation in sliding blocks (Gemma 3). Left out: as in the others."""
    max_positions: PositiveInt | None = None
    """Rows of the learned position table. Left out: data.seq_length, or temporal.chunk_length."""
    xpos_scale_base: PositiveFloat = 512.0
    """Positions after which xpos has scaled once by its whole factor."""
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: PositiveFloat = 1e-5
    final_norm: bool = True
    """false: the head reads the stream as it is (Ray Chowdhury & Caragea 2024), as it always does
    with norm_position post."""
    final_norm_eps: PositiveFloat | None = None
    """Of the final norm (RingFormer's vision model has 1e-6 there). Left out: norm_eps."""
    norm_position: Literal["pre", "post", "sandwich", "peri"] = "pre"
    """pre: x + f(N(x)); post: N(x + f(x)); sandwich: N2(x + f(N1(x))), as in Huginn;
    peri: x + N2(f(N1(x))), as in Gemma 2 (Peri-LN, Kim et al. 2025)."""
    residual: Literal["plain", "admin"] = "plain"
    """admin: N(x omega + f(x)), with one trained vector omega for attention and one for the
    feed-forward of each use of a block (Liu et al. 2020; Takase & Kiyono 2021), so that deep shared
    stacks train with norm_position post. A pass over the first samples sets their initial values.
    """
    parallel_residual: bool = False
    """x + attention(N1(x)) + feed_forward(N2(x)), as in GPT-NeoX; needs norm_position pre."""
    feed_forward: Literal["swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh"] = "swiglu"
    """The first three are gated; _tanh: with GELU's approximation by tanh (Gemma)."""
    shared_feed_forward: bool = False
    """One feed-forward for all blocks, owned by the first; attention and norms stay each block's
    own (Pires et al. 2023, One Wide Feedforward)."""
    gate: bool = False
    """y = g (a + FFN(N(a))) + (1 - g) x, with x what enters the block, a what leaves attention, and
    g = sigmoid(W2 gelu(W1 N(a) + b1) + b2) for each channel (Ray Chowdhury & Caragea 2024,
    section 3); needs norm_position pre. There is no dropout inside of g."""
    gate_hidden_size: PositiveInt | None = None
    """Between the gate's two matrices. Left out: ffn_hidden_size."""
    qk_norm: bool = False
    """RMS norms of every head's query and key, before they rotate (Qwen3, Gemma 3)."""
    attention_scale: PositiveFloat | None = None
    """What scores are multiplied with. Left out: head_dim ** -0.5."""
    attention_softcap: PositiveFloat | None = None
    """Scores become cap x tanh(score / cap) (Gemma 2); attention takes the (slower) math path."""
    logit_softcap: PositiveFloat | None = None
    """The same for the logits."""
    causal: bool = True
    """false: an encoder, in which a token sees all tokens of its document."""
    sliding_window: PositiveInt | None = None
    """Sliding blocks see so many tokens, the present one among them. All are computed and most
    masked: it saves no time, and the cache of generation keeps all."""
    attention_types: Annotated[tuple[Literal["sliding", "full"], ...], Field(min_length=1)] = (
        "full",
    )
    """Block b (of the blocks that exist, not of the layers that run) has entry b modulo length:
    [sliding, full] in Gemma 2. Left out: all sliding if there is a sliding_window."""
    attention_bias: Literal["none", "qk", "qkv", "all"] = "none"
    """Which attention projections carry a bias; `all` adds the output's."""
    feed_forward_bias: bool = False
    tie_embeddings: bool = True
    scale_embeddings: bool = False
    """Multiply token embeddings by sqrt(hidden_size)."""
    dropout: Probability = 0.0
    """On the embedding and on the output of every attention and feed-forward."""
    attention_dropout: Probability = 0.0
    """On attention weights; above 0 attention takes the (slower) math path."""
    z_loss: NonNegativeFloat = 0.0
    """Coefficient of mean(logsumexp(logits)^2) (PaLM, section 5)."""
    init_std: PositiveFloat = 0.02
    init_scaling: Literal["none", "depth", "xavier"] = "none"
    """depth: output projections of attention and feed-forward start at init_std/sqrt(2 x depth),
    depth being the unrolled one. xavier: every matrix that multiplies hidden states starts at
    sqrt(2/(in + out)) (Glorot & Bengio 2010), queries, keys and values at sqrt(1/(in + out));
    embeddings and the vocabulary's head at init_std."""

    @model_validator(mode="before")
    @classmethod
    def fill_in(cls, values: Any) -> Any:
        """Resolve the sizes that follow from others."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        hidden, heads = values.get("hidden_size"), values.get("num_heads")
        if not (isinstance(hidden, int) and isinstance(heads, int) and hidden > 0 and heads > 0):
            # Their own errors are reported; stand-ins keep derived fields out of that report.
            hidden, heads = 1, 1
        values.setdefault("num_kv_heads", heads)
        values.setdefault("head_dim", max(hidden // heads, 1))
        swiglu = values.get("feed_forward", "swiglu") in GATED
        values.setdefault("ffn_hidden_size", -(-8 * hidden // 192) * 64 if swiglu else 4 * hidden)
        if values.get("sliding_window") is not None:
            values.setdefault("attention_types", ("sliding",))
        if values.get("gate") is True and values.get("gate_hidden_size") is None:
            values["gate_hidden_size"] = values["ffn_hidden_size"]
        return values

    @model_validator(mode="after")
    def check_heads(self) -> ModelConfig:
        """Refuse shapes that attention cannot have."""
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}"
            )
        if self.positions in ("rope", "xpos") and self.head_dim % 2:
            raise ValueError(
                f"positions={self.positions} rotates pairs of dims, "
                f"head_dim={self.head_dim} is odd; choose an even head_dim or other positions"
            )
        if self.positions == "rope" and (self.rotary_dims % 2 or not self.rotary_dims):
            raise ValueError(
                f"rope_fraction={self.rope_fraction} of head_dim={self.head_dim} rotates "
                f"{self.rotary_dims} dims; choose a share that makes pairs"
            )
        return self

    @model_validator(mode="after")
    def check_options(self) -> ModelConfig:
        """Refuse options that would do nothing, or that exclude each other."""
        if self.positions != "rope":
            for key in ("rope_fraction", "rope_scaling_factor", "rope_theta_local"):
                if getattr(self, key) not in (None, 1.0):
                    raise ValueError(
                        f"{key}={getattr(self, key)} needs positions=rope, not {self.positions}; "
                        "leave it out"
                    )
        if self.positions != "xpos" and self.xpos_scale_base != 512.0:
            raise ValueError(
                f"xpos_scale_base={self.xpos_scale_base} needs positions=xpos, not "
                f"{self.positions}; leave it out"
            )
        if not self.final_norm and (self.norm_position == "post" or self.final_norm_eps):
            raise ValueError(
                f"final_norm=false with norm_position={self.norm_position} and final_norm_eps="
                f"{self.final_norm_eps}: one of them does nothing; leave out what is not meant"
            )
        if self.gate and (self.norm_position != "pre" or self.parallel_residual):
            raise ValueError(
                f"gate=true needs norm_position=pre without parallel_residual, not "
                f"norm_position={self.norm_position}, "
                f"parallel_residual={str(self.parallel_residual).lower()}; change one of them"
            )
        if not self.gate and self.gate_hidden_size is not None:
            raise ValueError(
                f"gate_hidden_size={self.gate_hidden_size} needs gate=true; leave it out"
            )
        if self.parallel_residual and self.norm_position != "pre":
            raise ValueError(
                f"parallel_residual=true needs norm_position=pre, not {self.norm_position}; "
                "change one of them"
            )
        if self.residual == "admin" and self.norm_position != "post":
            raise ValueError(
                f"residual=admin needs norm_position=post, not {self.norm_position}; change one of "
                "them"
            )
        sliding = "sliding" in self.attention_types
        if sliding and self.sliding_window is None:
            raise ValueError(
                "attention_types has sliding blocks without a sliding_window; name its tokens"
            )
        if self.sliding_window is not None and not sliding:
            raise ValueError(
                f"sliding_window={self.sliding_window} needs a sliding block in attention_types; "
                "leave one of them out"
            )
        if self.sliding_window is not None and not self.causal:
            raise ValueError(
                f"sliding_window={self.sliding_window} with causal=false is not available in this "
                "version; leave one of them out"
            )
        if self.rope_theta_local is not None and not sliding:
            raise ValueError(
                f"rope_theta_local={self.rope_theta_local} needs sliding blocks; set "
                "sliding_window, or leave it out"
            )
        return self

    @property
    def gated(self) -> bool:
        """Whether the feed-forward has a gate."""
        return self.feed_forward in GATED

    @property
    def rotary_dims(self) -> int:
        """Dims of a head that rotary positions rotate."""
        return int(self.head_dim * self.rope_fraction)

    def slides(self, block: int) -> bool:
        """Whether a block sees a window only."""
        return self.attention_types[block % len(self.attention_types)] == "sliding"


# ----------------------------------------------------------------------------------- recurrence


class Dense(Section):
    """Every block runs once: an ordinary Transformer."""

    kind: Literal["dense"]
    num_layers: PositiveInt

    @property
    def num_blocks(self) -> int:
        """Every layer is a block."""
        return self.num_layers


class Shared(Section):
    """Blocks shared by more layers, in an order that kind names (Takase & Kiyono 2021)."""

    num_blocks: PositiveInt
    depth: PositiveInt
    """Unrolled depth."""

    @model_validator(mode="after")
    def check_depth(self) -> Shared:
        """Every block must run at least once."""
        if self.depth < self.num_blocks:
            raise ValueError(
                f"depth={self.depth} leaves some of num_blocks={self.num_blocks} unused; "
                "depth must be at least num_blocks"
            )
        return self


class Sequence(Shared):
    """0 0 1 1 2 2 (Takase & Kiyono 2021, SEQUENCE)."""

    kind: Literal["sequence"]


class Cycle(Shared):
    """0 1 2 0 1 2 (Takase & Kiyono 2021, CYCLE)."""

    kind: Literal["cycle"]


class CycleReverse(Shared):
    """0 1 2 2 1 0 (Takase & Kiyono 2021, CYCLE (REV))."""

    kind: Literal["cycle_reverse"]


class ReuseMap(Section):
    """Intra-layer recurrence (Nguyen & Lin 2025): block i runs reuse_map[i] times in a row."""

    kind: Literal["reuse_map"]
    reuse_map: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]

    @property
    def num_blocks(self) -> int:
        """One per entry."""
        return len(self.reuse_map)


class Uniform(Section):
    """A whole number from min to max, all as likely."""

    sampler: Literal["uniform"]
    min: NonNegativeInt = 1
    max: NonNegativeInt

    @model_validator(mode="after")
    def check_range(self) -> Uniform:
        """Refuse an empty range."""
        if self.max < self.min:
            raise ValueError(f"max={self.max} is below min={self.min}; no depth is in between")
        return self


class AroundMean(Section):
    """A whole number of at least min around a mean; values above max count as max."""

    mean: PositiveFloat
    min: NonNegativeInt = 1
    max: PositiveInt | None = None

    @model_validator(mode="after")
    def check_range(self) -> AroundMean:
        """Refuse a mean that no number in range can have."""
        if self.mean <= self.min:
            raise ValueError(f"mean={self.mean} must be above min={self.min}")
        if self.max is not None and self.max < self.mean:
            raise ValueError(f"max={self.max} must not be below mean={self.mean}")
        return self


class Poisson(AroundMean):
    """min + Poisson(mean - min)."""

    sampler: Literal["poisson"]


class PoissonLogNormal(AroundMean):
    """min + Poisson(e^t), t ~ N(log(mean - min) - sigma^2/2, sigma).

    With min 1 the sampler of Geiping et al. 2025, section 3.3, whose "targeted mean recurrence
    r + 1" is the mean here.
    """

    sampler: Literal["poisson_lognormal"]
    sigma: PositiveFloat = 0.5


def sampler_tag(value: Any) -> str | None:
    """Which alternative of a number of loops a value of the file is meant to be."""
    if isinstance(value, dict):
        return value.get("sampler")
    return getattr(value, "sampler", "number")


Sampler = (
    Annotated[Uniform, Tag("uniform")]
    | Annotated[Poisson, Tag("poisson")]
    | Annotated[PoissonLogNormal, Tag("poisson_lognormal")]
)
BY_SAMPLER = Field(discriminator=Discriminator(sampler_tag))
NumForwardOnly = Annotated[Annotated[NonNegativeInt, Tag("number")] | Sampler, BY_SAMPLER]
NumWithGradient = Annotated[Annotated[PositiveInt, Tag("number")] | Sampler, BY_SAMPLER]


class Split(Section):
    """Loops without and loops with gradient, drawn apart; both are drawn from (seed, step)."""

    sampler: Literal["split"]
    forward_only: NumForwardOnly
    with_gradient: NumWithGradient

    @model_validator(mode="after")
    def check_least(self) -> Split:
        """Refuse steps that would train nothing."""
        refuse_zero("with_gradient", self.with_gradient)
        return self


NumLoops = Annotated[
    Annotated[PositiveInt, Tag("number")] | Sampler | Annotated[Split, Tag("split")], BY_SAMPLER
]


def refuse_zero(name: str, number: Any) -> None:
    """Raise ValueError where a sampler may give 0."""
    if getattr(number, "min", 1) < 1:
        raise ValueError(f"{name}.min=0 would run no loop at some steps; it must be at least 1")


def most_of(number: Any) -> int | None:
    """The most that a number of loops or its sampler may be; None without a bound."""
    if isinstance(number, Split):
        parts = most_of(number.forward_only), most_of(number.with_gradient)
        return None if parts[0] is None or parts[1] is None else parts[0] + parts[1]
    return number if isinstance(number, int) else number.max


class DepthCurriculum(Section):
    """Loops grow from `start` to what is drawn, over the first `steps` optimizer steps."""

    kind: Literal["linear", "1-sqrt"]
    """Share of the way after a share u of the steps: u, or 1 - sqrt(1 - u), which stays shallow
    longer (McLeish et al. 2025)."""
    steps: PositiveInt
    over: Literal["forward", "backward", "both"] = "both"
    """What grows: the loops that run, those that carry gradient, or both."""
    start: PositiveInt = 1


class Looped(Section):
    """A group of blocks that runs num_loops times."""

    num_loops: NumLoops
    """A number, or {sampler: uniform | poisson | poisson_lognormal | split, ...}: drawn for every
    optimizer step from (seed, step). Evaluation runs the rounded mean."""
    backward_loops: PositiveInt | None = None
    """Truncated backward: only the last so many loops carry gradient. Left out: all."""
    curriculum: DepthCurriculum | None = None

    @property
    def most_loops(self) -> int | None:
        """The most that an optimizer step may run; None without a bound."""
        return most_of(self.num_loops)

    @model_validator(mode="after")
    def check_depth(self) -> Looped:
        """Refuse depths that cannot run, and truncation that never truncates."""
        loops, backward = self.num_loops, self.backward_loops
        refuse_zero("num_loops", loops)
        if backward is not None and isinstance(loops, Split):
            raise ValueError("backward_loops: num_loops draws loops with gradient by itself")
        most, often = self.most_loops, "at most"
        if isinstance(loops, Poisson | PoissonLogNormal) and most is None:
            # Without a bound any depth may be drawn, but hardly ever one above twice the mean.
            most, often = math.ceil(2 * loops.mean), "with rare exceptions"
        if backward is not None and most is not None and backward > most:
            raise ValueError(
                f"backward_loops={backward} is more than the {most} loops that run {often}; "
                "lower it, or leave it out for the full backward"
            )
        start = self.curriculum.start if self.curriculum is not None else 1
        if most is not None and start > most:
            raise ValueError(
                f"curriculum.start={start} is more than the {most} loops that run {often}; lower it"
            )
        grows = self.curriculum is not None and self.curriculum.over == "backward"
        truncated = backward is not None or isinstance(loops, Split) or grows
        if truncated and getattr(self, "injection", None) == "none":
            raise ValueError(
                "injection=none with loops without gradient would not train what comes before "
                "the loop; choose an injection, or the full backward"
            )
        return self


class BlockRecurrence(Looped):
    """The whole stack repeated: 0 1 2 3 0 1 2 3."""

    kind: Literal["block_recurrence"]
    num_blocks: PositiveInt
    injection: Literal["none", "add"] = "add"
    """add: the embedding is added at the start of each later loop."""


class Loop(Looped):
    """Prelude, a core repeated num_loops times, coda (Geiping et al. 2025, Huginn)."""

    kind: Literal["loop"]
    prelude: NonNegativeInt
    core: PositiveInt
    coda: NonNegativeInt
    injection: Literal["none", "add", "linear"] = "linear"
    """How the prelude's output e enters the state s at the start of each loop: s + e, or a learned
    adapter W [s, e] from 2 hidden_size to hidden_size."""
    initial_state: Literal["prelude", "zero", "random"]
    """The state before the first loop; random: a truncated normal of (seed, step, sample, position,
    channel). Left out: zero with an injection, the prelude's output without."""
    initial_state_std: PositiveFloat
    """Standard deviation of the random initial state. Left out: sqrt(2/5), Huginn's."""
    final_norm_after_core: bool = False
    """Apply the final norm also to the state that leaves the core (Huginn). Needs a coda."""

    @property
    def num_blocks(self) -> int:
        """Of prelude, core and coda."""
        return self.prelude + self.core + self.coda

    @model_validator(mode="before")
    @classmethod
    def fill_in(cls, values: Any) -> Any:
        """Resolve the initial state."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        injected = values.get("injection", "linear") != "none"
        values.setdefault("initial_state", "zero" if injected else "prelude")
        values.setdefault("initial_state_std", 0.4**0.5)
        return values

    @model_validator(mode="after")
    def check_state(self) -> Loop:
        """Refuse loops that would never see their input."""
        if self.injection == "none" and self.initial_state != "prelude":
            raise ValueError(
                f"injection=none with initial_state={self.initial_state} never reads the input; "
                "choose an injection, or initial_state=prelude"
            )
        if self.final_norm_after_core and not self.coda:
            raise ValueError(
                "final_norm_after_core with coda=0 would norm the same state twice; "
                "give the loop a coda or leave it out"
            )
        return self


class Custom(Section):
    """Any order of blocks; ids count from 0 without gaps."""

    kind: Literal["custom"]
    order: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]

    @property
    def num_blocks(self) -> int:
        """As many as the order names."""
        return max(self.order) + 1

    @model_validator(mode="after")
    def check_order(self) -> Custom:
        """Refuse ids that would leave a block without a use."""
        missing = sorted(set(range(max(self.order) + 1)) - set(self.order))
        if missing:
            raise ValueError(f"order never runs block(s) {missing}; number blocks without gaps")
        return self


class Ring(Section):
    """RingFormer (Heo et al. 2025): one block runs depth times. Every use, a level, has norms of
    its own and low-rank level signals M x = A^T B x: of the block's input, added to queries, keys
    and values after their projection; and of the feed-forward's input, added to it.

    With model.norm_position post as in their translation model. With pre as in their vision model:
    the signals of attention read the stream before its norm, and that of the feed-forward is added
    before the norm, inside the branch.
    """

    kind: Literal["ring"]
    depth: PositiveInt
    """Levels."""
    level_rank: NonNegativeInt
    """Of M; hidden_size / 16 in the paper. 0: no signals."""
    feed_forward_rank: NonNegativeInt
    """Of the feed-forward's signal. Left out: level_rank."""
    signal_init: Literal["authors", "scaled"] = "authors"
    """A starts at 0. B is normal with deviation 1e-6 as the authors' (the first gradients of A may
    then vanish in AdamW's eps), or scaled: hidden_size ** -0.5."""

    @property
    def num_blocks(self) -> int:
        """One, run depth times."""
        return 1

    @model_validator(mode="before")
    @classmethod
    def fill_in(cls, values: Any) -> Any:
        """Resolve the rank of the feed-forward's signal."""
        if not isinstance(values, dict):
            return values
        return {"feed_forward_rank": values.get("level_rank", 0), **values}


class HaltingConfig(Section):
    """Tokens stop after as many steps as they need: a head gives the probability of stopping before
    each step, and what leaves is the expected state (Ray Chowdhury & Caragea 2024, section 3)."""

    mode: Literal["none", "token", "global"] = "none"
    """token: every token by its own state, attention reading the mixture so far (Universal
    Transformer). global: by means over its document, in a causal model over what comes before it
    (Gated Universal Transformer). none: all steps run."""
    transition: bool = True
    """The head reads the state before and after the step; false: before alone."""
    threshold: Annotated[float, Field(gt=0.0, le=1.0)] = 0.999
    """Probability of having stopped at which no further step is taken."""
    coefficient: NonNegativeFloat = 0.1
    """Of the expected number of steps in the objective."""


class Universal(Section):
    """One block, at most depth times: 0 0 0 (Dehghani et al. 2019)."""

    kind: Literal["universal"]
    depth: PositiveInt
    """Most steps. Where an encoder halts, a document of n tokens takes at most n + 1."""
    halting: HaltingConfig = HaltingConfig()

    @property
    def num_blocks(self) -> int:
        """All steps share it."""
        return 1


def refuse_halting(values: Any) -> Any:
    """Say so where a section `halting` is given to a map that cannot halt."""
    if isinstance(values, dict) and "halting" in values:
        kind = values.get("kind")
        if kind in KINDS_WITHOUT_HALTING:
            raise ValueError(
                f"halting: the map of kind={kind} cannot halt; set kind to universal, or leave "
                "halting out"
            )
    return values


AdapterTarget = Literal["query", "key", "value", "output", "gate", "up", "down"]


class AdaptersConfig(Section):
    """Layer-wise LoRA: every loop of a block adds scale B A x to the block's linear layers
    (Bae et al. 2025, Relaxed Recursive Transformers, section 3)."""

    rank: PositiveInt
    """Of A [rank, in] and B [out, rank]; where a side of the matrix is smaller, that."""
    scale: PositiveFloat = 1.0
    targets: Annotated[tuple[AdapterTarget, ...], Field(min_length=1)] | None = None
    """The linear layers that have one. Left out: all of the block."""
    norms: bool = False
    """Every loop also has norms of its own, in place of the block's."""
    biases: bool = False
    """Every loop also adds to the biases of these layers, where they have one."""


class TemporalConfig(Section):
    """Temporal latent bottleneck (Didolkar et al. 2022; Ray Chowdhury & Caragea 2024): tokens are
    read in chunks. Every step of the map also attends to a memory, and the memory is written from
    what a chunk came out as, for the next one. Compute grows linearly with the length of a text.

    Attention and positions stay inside a chunk. Where documents are masked, a document begins with
    the initial memory.
    """

    chunk_length: PositiveInt
    """Tokens of a chunk, whatever the length of a text; only the last one may be shorter."""
    num_slots: PositiveInt
    """Vectors of hidden_size that the memory has."""
    updates: PositiveInt = 1
    """Layers that write the memory, one after the other: attention to the chunk, feed-forward."""
    update_ffn_hidden_size: PositiveInt
    """Width of their feed-forward. Left out: hidden_size."""
    initial_memory: Literal["random", "zero"] = "random"
    """The memory before the first chunk, which is learned, starts as. random: standard normal.
    zero, as the authors have it: all slots then stay alike, as long as nothing is dropped."""
    backward_chunks: PositiveInt | None = None
    """Truncated backward: the memory is cut from its past before every so many chunks, counted from
    the end of a text. Left out: gradients pass through all chunks."""
    pooling: Literal["mean", "last"] | None = None
    """What a classifier of sequences or pairs reads in the place of states of tokens, after a norm:
    the mean over slots, or the last slot. Left out: nothing but later chunks reads the memory."""


RecurrenceConfig = Annotated[
    Dense
    | Sequence
    | Cycle
    | CycleReverse
    | ReuseMap
    | BlockRecurrence
    | Loop
    | Custom
    | Ring
    | Universal,
    Field(discriminator="kind"),
    BeforeValidator(refuse_halting),
]
KINDS_WITHOUT_HALTING = (
    "dense", "sequence", "cycle", "cycle_reverse", "reuse_map", "block_recurrence", "loop",
    "custom", "ring",
)  # fmt: skip


# ----------------------------------------------------------------------------------------- data


REMOTE_SCHEMES = ("s3", "gs", "sftp", "hf", "oci", "azure", "azure-dl", "dbfs", "alipan")


class Source(Section):
    """One corpus and its share of the samples. A corpus is its manifest's hash, not its path."""

    path: str = free()
    """Its folder; with a remote, the folder of the local cache."""
    weight: PositiveFloat = 1.0
    remote: str | None = free(None, min_length=1)
    """Where the corpus lies, if not in `path`: s3://, gs://, sftp://, hf:// or whatever else
    mosaicml-streaming downloads from, or a path. Shards are fetched before they are read."""
    cache_gb: PositiveFloat | None = free(None)
    """Bound of the local cache, in 10^9 bytes. Left out: all that was fetched is kept."""

    @model_validator(mode="after")
    def check_remote(self) -> Source:
        """Refuse a bound without a cache, and URLs that nothing reads."""
        if self.cache_gb is not None and self.remote is None:
            raise ValueError(
                f"cache_gb={self.cache_gb:g} bounds the cache of a remote; give remote, or leave "
                "cache_gb out"
            )
        scheme, found, _ = (self.remote or "").partition("://")
        if found and scheme not in REMOTE_SCHEMES:
            raise ValueError(
                f"remote={self.remote}: {scheme}:// is not read; use one of "
                f"{', '.join(REMOTE_SCHEMES)}, or a path"
            )
        return self


class DataConfig(Section):
    """What is read, and in which pieces."""

    train: Annotated[tuple[Source, ...], Field(min_length=1)]
    val: tuple[Source, ...] = free(())
    tokenizer: str = free()
    """A sentencepiece model, a Hugging Face tokenizer.json, or `bytes`. Its content is fixed."""
    seq_length: PositiveInt
    shuffle: bool = True
    shuffle_shards: NonNegativeInt = 0
    """0: shuffle over the whole corpus. n: in blocks of n shards, each shard once an epoch, so that
    a cache of two blocks is enough; no sample then crosses the end of a shard."""
    mask_documents: bool = True
    """Attention stays inside a document and positions restart with it."""
    verify: bool = free(True)
    """Check every shard against its hash before training; with a remote, what lies in the cache
    before it is read."""

    @model_validator(mode="after")
    def check_caches(self) -> DataConfig:
        """Refuse orders that a bounded cache cannot follow, and caches that would be shared."""
        if self.shuffle_shards and not self.shuffle:
            raise ValueError(
                f"shuffle_shards={self.shuffle_shards} needs shuffle=true; set it to 0 to read in "
                "order"
            )
        for i, source in enumerate(self.train):
            if source.cache_gb is not None and self.shuffle and not self.shuffle_shards:
                raise ValueError(
                    f"train.{i}.cache_gb={source.cache_gb:g} with shuffle_shards=0: a shuffle over "
                    "the whole corpus needs all of its shards at any time; set data.shuffle_shards "
                    f"to 4, for example, or leave data.train.{i}.cache_gb out"
                )
        sources = (*self.train, *self.val)
        for source in sources:
            if source.remote is not None and [s.path for s in sources].count(source.path) > 1:
                raise ValueError(
                    f"path={source.path} is the cache of {source.remote} and is named more than "
                    "once in train and val; give each source a folder of its own"
                )
        return self


# ------------------------------------------------------------------------------------ optimizer


class Constant(Section):
    """Warm up, then stay."""

    kind: Literal["constant"]
    warmup_steps: NonNegativeInt = 0


class Cosine(Section):
    """Warm up, then fall along half a cosine (Loshchilov & Hutter 2017)."""

    kind: Literal["cosine"]
    warmup_steps: NonNegativeInt = 0
    min_lr_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    """The learning rate at train.steps, as a share of the highest."""


class WarmupStableDecay(Section):
    """Warm up, stay, decay linearly over the last decay_steps (Hu et al. 2024, MiniCPM)."""

    kind: Literal["wsd"]
    warmup_steps: NonNegativeInt = 0
    decay_steps: PositiveInt
    min_lr_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0


class InverseSqrt(Section):
    """Warm up, then fall with the inverse square root of the step (Vaswani et al. 2017)."""

    kind: Literal["inverse_sqrt"]
    warmup_steps: PositiveInt
    """lr is the rate at their end."""


ScheduleConfig = Annotated[
    Constant | Cosine | WarmupStableDecay | InverseSqrt, Field(discriminator="kind")
]


class MuonConfig(Section):
    """Muon (Jordan et al. 2024) for the matrices of blocks; AdamW keeps everything else."""

    lr: PositiveFloat = 0.02
    """Its highest rate; the course over training is optimizer.schedule's."""
    momentum: Probability = 0.95
    nesterov: bool = True
    ns_steps: Annotated[int, Field(ge=1, lt=100)] = 5
    """Newton-Schulz iterations, in bf16."""
    weight_decay: NonNegativeFloat = 0.1
    adjust_lr: Literal["original", "match_rms_adamw"] = "original"
    """Rate of a matrix [A, B]: lr sqrt(max(1, A/B)), or 0.2 lr sqrt(max(A, B)), whose updates are
    as large as AdamW's (Liu et al. 2025), so that lr can be AdamW's too."""
    exclude: tuple[str, ...] = ()
    """Patterns of matrices left to AdamW."""


class OptimizerConfig(Section):
    """AdamW (Loshchilov & Hutter 2019). Patterns match global parameter names, `*` any text."""

    lr: PositiveFloat
    betas: tuple[Probability, Probability] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    """On matrices; norms, biases and other vectors are never decayed."""
    no_decay: tuple[str, ...] = ()
    """Patterns of further parameters without decay, such as `embedding.*`."""
    lr_multipliers: dict[str, NonNegativeFloat] = {}
    """Pattern to factor; the last pattern that matches wins."""
    frozen: tuple[str, ...] = ()
    """Patterns of parameters that are not trained."""
    clip_norm: PositiveFloat | None = 1.0
    """Largest global norm of the gradient; null: no clipping."""
    muon: MuonConfig | None = None
    """Left out: AdamW alone."""
    schedule: ScheduleConfig = Constant(kind="constant")


# ------------------------------------------------------------------------------ losses beside


class ExitConfig(Section):
    """Early exits: the final norm and the head also after every loop but the last (Bae et al. 2025,
    Relaxed Recursive Transformers). A run that has none yet is post-trained by a new run with
    init_from and this section; with the section from the start, exits are trained along.

    Kinds with loops: cycle (a loop is a pass over all blocks), block_recurrence, and loop without a
    coda, which an exit would skip. Loops without gradient have no exit in training.
    """

    mode: Literal["aggressive", "weighted"] = "aggressive"
    """What the loss after each loop counts for. aggressive: 1 after the last, `coefficient` after
    each earlier one. weighted: i over the sum of all i after loop i."""
    coefficient: NonNegativeFloat | Annotated[tuple[NonNegativeFloat, ...], Field(min_length=1)] = (
        0.1
    )
    """One number for all earlier loops; or a list, one for every loop, the last one included, where
    their number is fixed. 0: measured, not trained."""
    distill: bool = False
    """Train exits towards the last loop's distribution, which gets no gradient from it: the forward
    KL divergence in the place of cross-entropy."""
    distill_weight: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    """The divergence's share of an exit's loss with `distill`; cross-entropy has the rest."""

    @model_validator(mode="after")
    def check_weights(self) -> ExitConfig:
        """Refuse weights that another field overrides."""
        if self.mode == "weighted" and self.coefficient != 0.1:
            raise ValueError(
                f"coefficient={self.coefficient} has no effect with mode=weighted; leave it out, "
                "or set mode to aggressive"
            )
        if self.distill_weight != 1.0 and not self.distill:
            raise ValueError(
                f"distill_weight={self.distill_weight} has no effect without distill; set distill "
                "to true, or leave distill_weight out"
            )
        if isinstance(self.coefficient, tuple) and self.coefficient[-1] == 0.0:
            raise ValueError(
                f"coefficient={list(self.coefficient)} would not train the last loop; its last "
                "number, that of the last loop, must be above 0"
            )
        return self


class DistillConfig(Section):
    """Learn from the distributions of a frozen teacher (Hinton et al. 2015), micro batch by micro
    batch. With exits, it teaches the last loop; exits learn from that with exits.distill."""

    teacher: str | None = free(None, min_length=1)
    """RUN or RUN@STEP: a run of any kind with the same vocabulary and tokenizer, or a converted
    model. With a pipeline it is whole on the rank of the head."""
    stored: str | None = free(None, min_length=1)
    """In its place, the folder of what a teacher said about this run's samples beforehand
    (`megarecur prep teacher`)."""
    weight: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """The divergence's share of the loss; cross-entropy has the rest. 1: the teacher alone."""
    temperature: PositiveFloat = 1.0
    """Divides the logits of both; the divergence is multiplied by its square."""
    kind: Literal["forward_kl"] = "forward_kl"
    """KL(teacher || student)."""
    fingerprint: str | None = None
    """Of the teacher's checkpoint. Filled in when a run begins, which cannot go on with another
    teacher."""

    @model_validator(mode="after")
    def check_source(self) -> DistillConfig:
        """Refuse no teacher, and two."""
        if (self.teacher is None) == (self.stored is None):
            raise ValueError(
                f"teacher={self.teacher} with stored={self.stored}: name one of them, a run or a "
                "folder of stored distributions"
            )
        return self


class TaskConfig(Section):
    """Classify samples instead of predicting text (`megarecur prep task` makes the corpora). The
    head is the final norm, a hidden layer with ReLU and the classes; two classes are one logit."""

    kind: Literal["sequence", "pair", "token"]
    """sequence: a class per sample, from its pooled state. pair: a class per two sequences, from
    [u; v; u*v; |u-v|] of their pooled states. token: a class at each token that has a label."""
    targets: Literal["labels", "next_token"] = "labels"
    """next_token: of kind token, predict every next token by the ordinary head; labels say which
    predictions are scored."""
    num_classes: PositiveInt | None = None
    """As the corpora have; left out only with next_token."""
    pooling: Literal["mean", "end", "first"] = "mean"
    """Of the states of a sequence: their mean, the last one or the first one."""
    head_size: NonNegativeInt | None = None
    """Units of the hidden layer. Left out: model.hidden_size; 0: there is none."""
    augment: bool = False
    """A learned START comes before a sequence and a learned END after its last token."""
    truncate: bool = False
    """Cut sequences longer than data.seq_length, which are refused otherwise."""

    @model_validator(mode="after")
    def check_targets(self) -> TaskConfig:
        """Refuse options that contradict each other or do nothing."""
        if self.targets == "next_token":
            if self.kind != "token":
                raise ValueError(
                    f"targets=next_token is for kind=token, not {self.kind}; leave targets out"
                )
            if self.num_classes is not None:
                raise ValueError(
                    f"num_classes={self.num_classes} with targets=next_token: the classes are the "
                    "vocabulary; leave num_classes out"
                )
        elif self.num_classes is None or self.num_classes < 2:
            raise ValueError(
                f"num_classes={self.num_classes} must be at least 2, as the corpora have them"
            )
        if self.kind == "token" and (self.augment or self.pooling != "mean"):
            raise ValueError(
                "augment and pooling are for kind=sequence and pair; with kind=token leave them out"
            )
        return self


KINDS_WITH_EXITS = "cycle, block_recurrence, or loop with coda=0"


def count_fixed_loops(recurrence: Any) -> int | None:
    """Loops of a kind that can have exits; None where they are drawn."""
    if isinstance(recurrence, Cycle):
        return -(-recurrence.depth // recurrence.num_blocks)
    drawn = not isinstance(recurrence.num_loops, int) or recurrence.curriculum is not None
    return None if drawn else recurrence.num_loops


def refuse_exits(exits: ExitConfig, recurrence: Any) -> str:
    """Why a scheme cannot have these exits; "" if it can."""
    if not isinstance(recurrence, Cycle | Looped):
        return (
            f"exits: recurrence.kind={recurrence.kind} has no loops to exit after; leave exits "
            f"out, or choose a kind that has: {KINDS_WITH_EXITS}"
        )
    if isinstance(recurrence, Loop) and recurrence.coda:
        return (
            f"exits: an exit after a loop of the core would skip recurrence.coda="
            f"{recurrence.coda}; set coda to 0, or leave exits out"
        )
    loops, weights = count_fixed_loops(recurrence), exits.coefficient
    if loops == 1:
        return (
            "exits: recurrence runs one loop, which has no earlier one to exit after; leave exits "
            "out, or run more loops"
        )
    if isinstance(weights, tuple) and loops is None:
        return (
            f"exits.coefficient={list(weights)}: the number of loops differs from step to step; "
            "give one number for all earlier loops"
        )
    if isinstance(weights, tuple) and len(weights) != loops:
        return (
            f"exits.coefficient={list(weights)} has {len(weights)} numbers for {loops} loops; give "
            "one for every loop, the last one included, or one number for all earlier loops"
        )
    return ""


# ------------------------------------------------------------------------------ parallel, train


class ParallelConfig(Section):
    """The mesh; data = world size / (tensor x pipeline)."""

    tensor: PositiveInt = free(1)
    """Ranks that share each matrix (Shoeybi et al. 2019): heads, feed-forward and vocabulary are
    cut among them."""
    pipeline: PositiveInt = free(1)
    """Ranks that share out the blocks. Each block, its gradient and its moments live on one of
    them, however often it runs; activations travel."""
    placement: tuple[NonNegativeInt, ...] | None = free(None)
    """The pipeline rank of each block. Left out: neighbours together, such that the rank with the
    most to compute has as little as can be."""
    order: Literal["auto", "1f1b", "interleaved", "interleaved_zero_bubble", "zbv", "greedy"] = (
        free("auto")
    )
    """What the pipeline ranks do when; auto: the fastest by simulation."""
    split_backward: bool = free(True)
    """Let orders compute the gradients of weights apart from those of inputs, later, to fill
    waiting time."""
    cluster: str = free("h100")
    """Whose speeds decide between orders: the name of a described cluster, or a YAML file that
    describes one (`megarecur plan`)."""
    zero_stage: Literal[0, 1, 2, 3] = free(0)
    """What the replicas share out instead of keeping it whole (Rajbhandari et al. 2020): 1, the
    optimizer's moments; 2, gradients too; 3, parameters too, gathered for each forward and backward
    pass. Above 0 needs DeepSpeed: pip install 'megarecur[zero]'."""
    offload_optimizer: bool = free(False)
    """Keep the optimizer's moments, and step, in the memory of the CPU; zero_stage 1 or 2."""
    sequence_parallel: bool = free(False)
    """The ranks of tensor also share the residual stream, by position (Korthikanti et al. 2022):
    less memory, as much communication."""

    @model_validator(mode="after")
    def check_zero(self) -> ParallelConfig:
        """Refuse combinations of ZeRO that cannot be."""
        if self.zero_stage == 3 and self.pipeline > 1:
            raise ValueError(
                f"zero_stage=3 with pipeline={self.pipeline} would gather every stage's weights "
                "for every micro batch; use zero_stage 1, or pipeline 1"
            )
        if self.offload_optimizer and self.zero_stage not in (1, 2):
            raise ValueError(
                f"offload_optimizer=true needs zero_stage 1 or 2, it is {self.zero_stage}; "
                "choose one of them, or set offload_optimizer to false"
            )
        return self

    @model_validator(mode="after")
    def check_together(self) -> ParallelConfig:
        """Refuse settings that contradict each other."""
        if self.order in ("interleaved_zero_bubble", "zbv") and not self.split_backward:
            raise ValueError(
                f"order={self.order} computes gradients of weights apart from those of inputs; set "
                "split_backward to true, or order to auto"
            )
        if self.sequence_parallel and self.tensor == 1:
            raise ValueError("sequence_parallel needs tensor above 1; set it to false")
        return self


class ProfileConfig(Section):
    """Which optimizer steps torch's profiler records, into RUN/profile."""

    start: NonNegativeInt = 10
    """The first, counted from 0."""
    steps: PositiveInt = 3
    all_ranks: bool = False
    """Of every process; false: of the first."""


class TrainConfig(Section):
    """How long, in which pieces, and on what."""

    steps: PositiveInt = free()
    global_batch_size: PositiveInt
    """Samples per optimizer step, over all processes."""
    micro_batch_size: PositiveInt = free()
    """Samples per forward pass of one process."""
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    """Compute in; parameters, gradients and optimizer state are fp32 (fp64 for fp64, tests)."""
    device: Literal["auto", "cpu", "cuda"] = free("auto")
    recompute: bool = free(False)
    """Recompute every step of the map in backward instead of keeping its activations."""
    compile: Literal[False, True, "auto"] = free(False)
    """Compile the block with torch.compile: one graph for all blocks, loops and depths. Takes a C++
    compiler (CPU) or Triton and a C compiler (CUDA), and up to minutes at the start; auto: run
    eagerly where they are missing."""
    log_every: PositiveInt = free(10)
    eval_every: NonNegativeInt = free(0)
    """0: evaluate at the end only."""
    eval_samples: NonNegativeInt = free(0)
    """Samples of each validation corpus read per evaluation during training; 0: all."""
    eval_depths: tuple[PositiveInt, ...] = free(())
    """Numbers of loops to evaluate at as well, for schemes that repeat a group of blocks."""
    profile: ProfileConfig | None = free(None)
    """Left out: nothing is recorded."""
    sample_prompts: tuple[str, ...] = free(())
    """Texts that the model continues at every evaluation, shown in TensorBoard."""
    sample_tokens: PositiveInt = free(64)
    """Tokens of each continuation."""


class CheckpointConfig(Section):
    """When to save and what to keep."""

    every: NonNegativeInt = free(0)
    """0: at the end and on a signal only."""
    asynchronous: bool = free(True)
    """Write while training goes on, from copies in memory: of what this process writes, parameters
    and moments. false: training waits until all is on the disk."""
    keep_last: PositiveInt = free(2)
    """The newest so many stay."""
    keep_every: NonNegativeInt = free(0)
    """Checkpoints of steps that are multiples of this stay for ever; 0: none."""
    keep_best: NonNegativeInt = free(0)
    """So many with the lowest val/loss stay, and the file `best` names the first of them (true: 1).
    Evaluate where you save: only checkpoints whose very step was evaluated count."""
    mirror: str | None = free(None)
    """A folder or fsspec URL of this run's own, to which checkpoints are copied once they are
    complete. A run folder without a good checkpoint of its own resumes from there. Where it cannot
    be reached, a warning is given and the next save tries again."""


class AlarmConfig(Section):
    """What counts as divergence at a log step, and what is then done. null switches one off."""

    loss_spike: PositiveFloat | None = 8.0
    """The loss is so many standard deviations above its mean over the window."""
    residual_growth: PositiveFloat | None = 10.0
    """The largest norm of the residual stream is so many times its median over the window."""
    non_finite: PositiveInt | None = 5
    """So many gradients since the last log step were not finite."""
    window: Annotated[int, Field(ge=10)] = 50
    """Log steps without alarm that are remembered."""
    action: Literal["warn", "roll_back", "stop"] = "warn"
    """roll_back: go on from the parameters of the last checkpoint from before the alarm, with the
    samples that come next; those in between are skipped. stop: end with exit code 1, unsaved."""
    max_roll_backs: PositiveInt = 3
    """One alarm more than that stops the run."""


class HealthConfig(Section):
    """A check of every process before training, which takes seconds; see train/health.py."""

    enabled: Literal[False, True, "auto"] = free("auto")
    """auto: with more than one node, or several processes on CUDA. on, off."""
    slow_factor: Annotated[float, Field(gt=1.0)] = free(2.0)
    """Slow is what takes more than so many times the job's median: a matrix product, or
    communication within a node or with its neighbours."""
    on_slow: Literal["warn", "stop"] = free("warn")
    """What is broken stops the run in any case."""
    min_free_gpu: Annotated[float, Field(ge=0.0, lt=1.0)] = free(0.8)
    """Less free memory of a GPU than this share of the job's median counts as slow."""
    min_free_disk_gb: NonNegativeFloat = free(1.0)
    """The least free disk of the run folder, in 10^9 bytes."""


class PaperConfig(Section):
    """The row of a published table that this run is after; `megarecur check` compares."""

    row: Annotated[str, Field(min_length=1)]
    """Authors, year, table and row."""
    parameters: PositiveInt
    """As published, or as the published formula gives."""
    without_embedding: bool = False
    """Whether that leaves out embedding, positions and head."""
    published: str = ""
    """What else the row says: its score, in words."""
    difference: str = ""
    """Why our number is another, where it is."""


class Config(Section):
    """A run."""

    version: Literal[1] = CONFIG_VERSION
    run_dir: str = free()
    """Relative to where the command is run."""
    init_from: str | None = free(None, min_length=1)
    """RUN or RUN@STEP: a new run starts from the parameters of another run, or of a converted
    model; moments and counters start anew. A run that has checkpoints goes on from those."""
    seed: NonNegativeInt = 1
    model: ModelConfig
    recurrence: RecurrenceConfig
    adapters: AdaptersConfig | None = None
    """Left out: loops differ in nothing."""
    temporal: TemporalConfig | None = None
    """Left out: a sequence is read in one piece."""
    data: DataConfig
    optimizer: OptimizerConfig
    exits: ExitConfig | None = None
    """Left out: the loss is the last loop's alone."""
    distill: DistillConfig | None = None
    """Left out: there is no teacher."""
    task: TaskConfig | None = None
    """Left out: the next token is predicted."""
    parallel: ParallelConfig = free(ParallelConfig())
    train: TrainConfig
    checkpoint: CheckpointConfig = free(CheckpointConfig())
    alarms: AlarmConfig = free(AlarmConfig())
    health: HealthConfig = free(HealthConfig())
    paper: PaperConfig | None = free(None)
    """Left out: the run reproduces no published one."""

    @model_validator(mode="before")
    @classmethod
    def fill_in(cls, values: Any) -> Any:
        """Resolve the rows of a learned position table, and the width of a memory's layers."""
        if not isinstance(values, dict):
            return values
        model, data = values.get("model"), values.get("data")
        if not (isinstance(model, dict) and isinstance(data, dict)):
            return values
        longest, temporal = data.get("seq_length"), values.get("temporal")
        if isinstance(temporal, dict):
            hidden = model.get("hidden_size")
            hidden = hidden if isinstance(hidden, int) and hidden > 0 else 1  # It is reported.
            values = {**values, "temporal": {"update_ffn_hidden_size": hidden, **temporal}}
            longest = temporal.get("chunk_length")
        if model.get("positions") == "learned" and model.get("max_positions") is None:
            task = values.get("task")
            ends = 2 * bool(isinstance(task, dict) and task.get("augment"))
            if isinstance(longest, int) and not isinstance(temporal, dict):
                longest += ends
            model = {**model, "max_positions": longest}
        return {**values, "model": model}

    @property
    def halting(self) -> HaltingConfig | None:
        """How tokens halt; None where all steps run."""
        halting = getattr(self.recurrence, "halting", None)
        return None if halting is None or halting.mode == "none" else halting

    @model_validator(mode="after")
    def check_halting(self) -> Config:
        """Refuse what cannot be done where steps depend on the data."""
        if self.halting is None:
            return self
        halts = f"recurrence.halting.mode={self.halting.mode}"
        if self.parallel.sequence_parallel:
            raise ValueError(
                f"{halts} reads whole sequences, parallel.sequence_parallel=true cuts them; set it "
                "to false"
            )
        if self.train.compile:
            raise ValueError(
                f"train.compile={self.train.compile} with {halts} is not available in this "
                "version; set train.compile to false"
            )
        if self.of_loops:
            key = "adapters" if self.adapters is not None else "model.residual=admin"
            raise ValueError(
                f"{self.of_loops} belong to one loop each, and with {halts} replicas may run "
                f"different ones; leave {key} out"
            )
        return self

    @property
    def classifies(self) -> bool:
        """Whether a task's head takes the place of the vocabulary's."""
        return self.task is not None and self.task.targets == "labels"

    @property
    def reads_memory(self) -> bool:
        """Whether the task's head reads the temporal memory, not the states of tokens."""
        pooled = self.temporal is not None and self.temporal.pooling is not None
        return pooled and self.task is not None and self.task.kind != "token"

    @property
    def has_final_norm(self) -> bool:
        """Whether there is a norm between the map and a head, or a core and its coda."""
        if self.reads_memory and not getattr(self.recurrence, "final_norm_after_core", False):
            return False
        return self.model.final_norm and self.model.norm_position != "post"

    @property
    def ties_embeddings(self) -> bool:
        """Whether embedding and head are one table."""
        return self.model.tie_embeddings and not self.classifies

    @property
    def num_positions(self) -> int:
        """The longest sequence, a task's START and END included."""
        return self.data.seq_length + 2 * (self.task is not None and self.task.augment)

    @property
    def tokens_per_sample(self) -> int:
        """Places of a sample, two sequences for a pair."""
        return self.num_positions * (1 + (self.task is not None and self.task.kind == "pair"))

    @model_validator(mode="after")
    def check_task(self) -> Config:
        """Refuse encoders without a task, and what makes no sense with one."""
        model, task = self.model, self.task
        if task is None:
            if not model.causal:
                raise ValueError(
                    "model.causal=false sees the next token, which it would have to predict; add a "
                    "task section, or set causal to true"
                )
            return self
        problems = []
        if not model.causal and task.targets == "next_token":
            problems.append("model.causal=false sees the next token that task.targets asks for")
        for name in ("exits", "distill"):
            if getattr(self, name) is not None:
                problems.append(f"{name} is for runs that predict text")
        if model.causal and task.pooling == "first" and task.kind != "token":
            problems.append("task.pooling=first of a causal model has seen one token alone")
        if self.classifies and self.train.sample_prompts:
            problems.append("train.sample_prompts: a classifier writes no text")
        if self.classifies and model.logit_softcap is not None:
            problems.append(
                f"model.logit_softcap={model.logit_softcap} is for the vocabulary's head"
            )
        if not self.data.mask_documents:
            problems.append("data.mask_documents=false: samples never read each other")
        if self.data.shuffle_shards:
            problems.append(
                f"data.shuffle_shards={self.data.shuffle_shards} is for corpora of text"
            )
        if any(source.remote for source in (*self.data.train, *self.data.val)):
            problems.append("a remote is for corpora of text: copy the corpus here")
        if self.train.compile:
            problems.append(f"train.compile={self.train.compile} is not available with a task")
        if problems:
            raise ValueError(f"task: {'; '.join(problems)}; leave these out, or the task section")
        return self

    @model_validator(mode="after")
    def check_depths(self) -> Config:
        """Refuse to evaluate by depth what has one depth only."""
        if self.train.eval_depths and not isinstance(self.recurrence, Looped):
            raise ValueError(
                f"train.eval_depths={list(self.train.eval_depths)}: "
                f"recurrence.kind={self.recurrence.kind} has no loops; leave it out"
            )
        return self

    @model_validator(mode="after")
    def check_adapters(self) -> Config:
        """Refuse adapters of what does not exist."""
        if self.adapters is None:
            return self
        model, targets, rank = self.model, self.adapters.targets or (), self.adapters.rank
        if len(set(targets)) < len(targets):
            raise ValueError(f"adapters.targets={list(targets)}: names a layer twice")
        fed = {"gate", "up", "down"} & set(targets or get_args(AdapterTarget))
        if model.shared_feed_forward and fed:
            raise ValueError(
                f"adapters.targets: {', '.join(sorted(fed))} of one feed-forward for all blocks "
                "(model.shared_feed_forward) cannot be adapted in this version; name other targets"
            )
        if "gate" in targets and not model.gated:
            raise ValueError(
                f"adapters.targets={list(targets)}: model.feed_forward={model.feed_forward} has no "
                "gate; leave it out"
            )
        queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        sides = {"query": queries, "output": queries, "key": keys, "value": keys}
        most = max(
            min(model.hidden_size, sides.get(target, model.ffn_hidden_size))
            for target in targets or [*sides, "up"]
        )
        if rank > most:
            raise ValueError(
                f"adapters.rank={rank} is above the full rank {most} of every matrix it is for; "
                f"set it to at most {most}"
            )
        return self

    @property
    def of_loops(self) -> str:
        """What single loops have of their own, in words; "" where all are alike."""
        if self.adapters is not None:
            return "adapters"
        if self.model.residual == "admin":
            return "residual scales"
        return "levels" if isinstance(self.recurrence, Ring) else ""

    @model_validator(mode="after")
    def check_loops(self) -> Config:
        """Refuse loops without bound where each has parameters of its own."""
        if not (self.of_loops and isinstance(self.recurrence, Looped)):
            return self
        loops = self.recurrence.most_loops
        if loops is None:
            raise ValueError(
                f"{self.of_loops} belong to one loop each, and recurrence.num_loops="
                f"{self.recurrence.num_loops} has no last one; give its sampler a max"
            )
        beyond = [depth for depth in self.train.eval_depths if depth > loops]
        if beyond:
            raise ValueError(
                f"train.eval_depths={beyond}: {self.of_loops} are there for {loops} loops; leave "
                "out what is above"
            )
        return self

    @model_validator(mode="after")
    def check_levels(self) -> Config:
        """Refuse level signals that cannot be, and what levels have already."""
        ring, model = self.recurrence, self.model
        if not isinstance(ring, Ring):
            return self
        for name in ("level_rank", "feed_forward_rank"):
            rank = getattr(ring, name)
            if rank > model.hidden_size:
                raise ValueError(
                    f"recurrence.{name}={rank} is above model.hidden_size={model.hidden_size}, the "
                    "full rank of a level signal; set it to at most that"
                )
        signals = ring.level_rank or ring.feed_forward_rank
        if signals and model.norm_position not in ("pre", "post"):
            raise ValueError(
                f"recurrence.level_rank={ring.level_rank}: level signals are defined for "
                f"model.norm_position post and pre, not {model.norm_position}; choose one of them, "
                "or set level_rank and feed_forward_rank to 0"
            )
        if signals and model.parallel_residual:
            raise ValueError(
                "model.parallel_residual=true: level signals need attention and feed-forward one "
                "after the other; set it to false, or level_rank and feed_forward_rank to 0"
            )
        if self.adapters is None:
            return self
        if self.adapters.norms:
            raise ValueError(
                "adapters.norms=true: with recurrence.kind=ring every level has norms of its own; "
                "leave it out"
            )
        twice = {"query", "key", "value"} & set(self.adapters.targets or get_args(AdapterTarget))
        if ring.level_rank and twice:
            raise ValueError(
                f"adapters.targets: {', '.join(sorted(twice))} have level signals already "
                f"(recurrence.level_rank={ring.level_rank}); name other targets, or set level_rank "
                "to 0"
            )
        return self

    @model_validator(mode="after")
    def check_temporal(self) -> Config:
        """Refuse what a memory cannot be carried through, all at once."""
        if self.temporal is None:
            return self
        temporal, model, parallel, length = (
            self.temporal,
            self.model,
            self.parallel,
            self.data.seq_length,
        )
        chunk, problems = temporal.chunk_length, []
        if chunk > length:
            problems.append(
                f"temporal.chunk_length={chunk} is above data.seq_length={length}, so that no "
                "sequence has a second chunk; lower it, or leave temporal out"
            )
        if self.train.compile and length % chunk:
            problems.append(
                f"temporal.chunk_length={chunk} must divide data.seq_length={length} for "
                f"train.compile={self.train.compile}, which takes chunks of one length; change one "
                "of them, or set train.compile to false"
            )
        chunks = -(-length // chunk)
        if temporal.backward_chunks is not None and temporal.backward_chunks > chunks:
            problems.append(
                f"temporal.backward_chunks={temporal.backward_chunks} is more than the {chunks} "
                "chunk(s) of a sequence; lower it, or leave it out for the full backward"
            )
        if temporal.backward_chunks == 1 and not self.reads_memory:
            problems.append(
                "temporal.backward_chunks=1 cuts the memory off wherever it is read, so that what "
                "writes it would never be trained; set it to 2 or more, or leave it out"
            )
        if model.norm_position != "pre" or model.parallel_residual:
            problems.append(
                "temporal memory is read between attention and feed-forward, which needs "
                f"model.norm_position=pre (it is {model.norm_position}) and parallel_residual=false"
            )
        if self.reads_memory and self.task is not None and self.task.pooling != "mean":
            problems.append(
                f"task.pooling={self.task.pooling} with temporal.pooling={temporal.pooling}: the "
                "head reads one of them; leave the other out"
            )
        if model.attention_softcap is not None:
            problems.append(
                f"model.attention_softcap={model.attention_softcap} with temporal memory is not "
                "available in this version; leave one of them out"
            )
        if self.halting is not None and self.halting.mode == "token":
            problems.append(
                "recurrence.halting.mode=token with temporal memory is not available in this "
                "version; set mode to global or none, or leave temporal out"
            )
        if parallel.pipeline > 1:
            problems.append(
                f"temporal memory across more than one pipeline stage (parallel.pipeline="
                f"{parallel.pipeline}) is not available in this version; set pipeline to 1"
            )
        if parallel.sequence_parallel:
            problems.append(
                "parallel.sequence_parallel=true with temporal memory is not available in this "
                "version: a chunk is a piece of the sequence already; set it to false"
            )
        if temporal.update_ffn_hidden_size % parallel.tensor:
            problems.append(
                f"parallel.tensor={parallel.tensor} does not divide "
                f"temporal.update_ffn_hidden_size={temporal.update_ffn_hidden_size}; choose a size "
                "that does"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @model_validator(mode="after")
    def check_exits(self) -> Config:
        """Refuse exits from what has no loops."""
        if self.exits is not None and (refusal := refuse_exits(self.exits, self.recurrence)):
            raise ValueError(refusal)
        return self

    @model_validator(mode="after")
    def check_best(self) -> Config:
        """Refuse to look for the best of what is never scored."""
        if self.checkpoint.keep_best and not self.data.val:
            raise ValueError(
                f"checkpoint.keep_best={self.checkpoint.keep_best} needs data.val to score "
                "checkpoints; name a corpus there, or set keep_best to 0"
            )
        return self

    @model_validator(mode="after")
    def check_roll_back(self) -> Config:
        """Refuse to roll back where no checkpoint from before an alarm would be left."""
        saving, log_every = self.checkpoint, self.train.log_every
        if self.alarms.action != "roll_back" or saving.keep_every:
            return self
        if saving.every == 0:
            raise ValueError(
                "alarms.action=roll_back needs checkpoints to go back to; set checkpoint.every"
            )
        if (saving.keep_last - 1) * saving.every + 1 < log_every:
            raise ValueError(
                f"alarms.action=roll_back looks at every train.log_every={log_every} steps, when "
                f"checkpoint.keep_last={saving.keep_last} of checkpoint.every={saving.every} has "
                "nothing left from the log step before; raise keep_last or every, or lower "
                "log_every"
            )
        return self

    @model_validator(mode="after")
    def check_tensor(self) -> Config:
        """Refuse matrices that the ranks of tensor parallelism cannot share."""
        model, size = self.model, self.parallel.tensor
        problems = [
            f"model.{name}={value}"
            for name, value in (
                ("num_heads", model.num_heads),
                ("ffn_hidden_size", model.ffn_hidden_size),
                ("gate_hidden_size", model.gate_hidden_size),
            )
            if value is not None and value % size
        ]
        if model.num_kv_heads % size and size % model.num_kv_heads:
            problems.append(f"model.num_kv_heads={model.num_kv_heads} (nor divides it)")
        if self.parallel.sequence_parallel and self.num_positions % size:
            ends = " and 2 ends" * (self.num_positions > self.data.seq_length)
            problems.append(f"data.seq_length={self.data.seq_length}{ends} (sequence_parallel)")
        if problems:
            raise ValueError(
                f"parallel.tensor={size} does not divide {', '.join(problems)}; choose a size that "
                "does"
            )
        if size > 1 and self.train.compile:
            raise ValueError(
                f"train.compile={self.train.compile} with parallel.tensor={size} is not available "
                "in this version; set train.compile to false"
            )
        return self

    @model_validator(mode="after")
    def check_pipeline(self) -> Config:
        """Refuse more ranks than there are blocks, and placements that do not fit."""
        size, placement, blocks = (
            self.parallel.pipeline,
            self.parallel.placement,
            self.recurrence.num_blocks,
        )
        together = 1
        if isinstance(self.recurrence, Loop) and self.recurrence.final_norm_after_core:
            together = self.recurrence.coda
        most = blocks - together + 1
        stay = f", of which the last {together} stay together for final_norm_after_core"
        if size > most:
            raise ValueError(
                f"parallel.pipeline={size} is more than the {blocks} block(s) of recurrence.kind="
                f"{self.recurrence.kind}{stay if together > 1 else ''} have places for; set it to "
                f"at most {most}"
            )
        if size > 1 and self.model.shared_feed_forward:
            raise ValueError(
                f"model.shared_feed_forward=true with parallel.pipeline={size} would use one "
                "feed-forward on several ranks; set pipeline to 1"
            )
        if size > 1 and self.train.compile:
            raise ValueError(
                f"train.compile={self.train.compile} with parallel.pipeline={size} is not "
                "available in this version; set train.compile to false"
            )
        if size > 1 and self.optimizer.muon is not None:
            raise ValueError(
                f"optimizer.muon with parallel.pipeline={size} is not available in this version; "
                "set pipeline to 1, or leave muon out"
            )
        if placement is None:
            return self
        if len(placement) != blocks:
            wrong = (
                f"blocks {list(range(len(placement), blocks))} are missing"
                if len(placement) < blocks
                else f"blocks {list(range(blocks, len(placement)))} do not exist"
            )
            raise ValueError(
                f"parallel.placement={list(placement)}: {wrong}; name one rank for each of the "
                f"{blocks} block(s)"
            )
        beyond = sorted({rank for rank in placement if rank >= size})
        idle = sorted(set(range(size)) - set(placement))
        if beyond or idle:
            wrong = f"ranks {beyond} do not exist" if beyond else f"ranks {idle} have no block"
            raise ValueError(
                f"parallel.placement={list(placement)}: {wrong}; use every rank from 0 to "
                f"{size - 1} (parallel.pipeline={size})"
            )
        if len(set(placement[-together:])) > 1:
            raise ValueError(
                f"parallel.placement={list(placement)}: the last {together} blocks stay together "
                "for recurrence.final_norm_after_core; give them one rank"
            )
        return self

    @model_validator(mode="after")
    def check_muon(self) -> Config:
        """Refuse Muon where no process holds whole matrices and their gradients."""
        for name, plain in (("tensor", 1), ("zero_stage", 0)):
            value = getattr(self.parallel, name)
            if self.optimizer.muon is not None and value != plain:
                raise ValueError(
                    f"optimizer.muon needs whole matrices, parallel.{name}={value} cuts them; "
                    f"set parallel.{name} to {plain}, or leave muon out"
                )
        return self

    @model_validator(mode="after")
    def check_zero_precision(self) -> Config:
        """Refuse ZeRO in double precision, which DeepSpeed does not reduce."""
        if self.parallel.zero_stage and self.train.precision == "fp64":
            raise ValueError(
                f"parallel.zero_stage={self.parallel.zero_stage} runs in fp32 or bf16; "
                "set zero_stage to 0 for train.precision=fp64"
            )
        return self

    @model_validator(mode="after")
    def check_batch(self) -> Config:
        """Refuse batches that cannot be cut into micro batches."""
        train, schedule = self.train, self.optimizer.schedule
        if train.global_batch_size % train.micro_batch_size:
            raise ValueError(
                f"train.micro_batch_size={train.micro_batch_size} must divide "
                f"train.global_batch_size={train.global_batch_size}"
            )
        decay = schedule.decay_steps if isinstance(schedule, WarmupStableDecay) else 0
        if schedule.warmup_steps + decay > train.steps:
            raise ValueError(
                f"optimizer.schedule: warmup_steps={schedule.warmup_steps} and "
                f"decay_steps={decay} do not fit in train.steps={train.steps}"
            )
        loop = self.recurrence
        if isinstance(loop, Loop) and loop.final_norm_after_core and not self.has_final_norm:
            raise ValueError(
                "recurrence.final_norm_after_core needs a final norm, which "
                f"model.norm_position={self.model.norm_position} with final_norm="
                f"{self.model.final_norm} has not; choose pre or sandwich, and leave final_norm out"
            )
        limit, name, longest = self.model.max_positions, "data.seq_length", self.num_positions
        ends = " and 2 for START and END" * (self.num_positions > self.data.seq_length)
        value = f"{self.data.seq_length}{ends}"
        if self.temporal is not None:
            name, longest = "temporal.chunk_length", self.temporal.chunk_length
            value = str(longest)
        if self.model.positions == "xpos" and longest > 64 * self.model.xpos_scale_base:
            raise ValueError(
                f"{name}={value} is above 64 x model.xpos_scale_base={self.model.xpos_scale_base}: "
                "keys would be scaled beyond what floats hold; raise xpos_scale_base"
            )
        if self.model.positions == "learned" and limit and limit < longest:
            raise ValueError(
                f"model.max_positions={limit} is below {name}={value}; raise it or leave it out"
            )
        return self
