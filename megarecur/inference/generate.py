"""Generate text: forward pass, choice of the next token, decoding as ids arrive.

    ids = generate(model, tokenizer.encode("def f("), max_new_tokens=100, temperature=0.8, seed=1)
    for piece in stream_text(tokenizer, prompt, ids): ...

Every random value is a pure function of (seed, sample, position), so that a sample does not depend
on the cache or on which other samples are drawn. Shapes: B samples, S positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from megarecur.config.run import Config
from megarecur.data.tokenizer import Tokenizer
from megarecur.errors import ConfigError, refuse_undecodable
from megarecur.inference.cache import Cache, context_after
from megarecur.inference.early import ExitRule, cut_loops, early_logits, refuse_rule
from megarecur.model.context import Context
from megarecur.model.transformer import Transformer
from megarecur.parallel.mesh import Mesh
from megarecur.parallel.pipeline import Pipeline
from megarecur.parallel.random import key, random_bits
from megarecur.plan.schedule import Scheduled, Schedules
from megarecur.plan.walk import Stage
from megarecur.recurrence.depth import refuse_depth
from megarecur.recurrence.layer_map import StackName

REPLACEMENT = "\ufffd"


def generate(
    model: Transformer,
    tokens: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    sample: int = 0,
    eos_ids: Collection[int] = (),
    missing_ids: Collection[int] = (),
    num_loops: int | None = None,
    use_cache: bool = True,
    mesh: Mesh | None = None,
    schedules: Schedules | None = None,
    exit_rule: ExitRule | None = None,
) -> Iterator[int]:
    """Yield the ids that continue a prompt, one by one.

    Args:
        model: this rank's part; all ranks of a replica yield the same ids.
        tokens: ids of the prompt, at least one.
        max_new_tokens: maximum number of ids to yield.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: choose among the k likeliest tokens.
        top_p: choose among the likeliest tokens that together reach this probability.
        seed: with `sample`, decides all random choices.
        sample: number of the sample, for several continuations of one prompt.
        eos_ids: any of them ends the text and is not yielded.
        missing_ids: ids never chosen: rows of the vocabulary without a piece of the tokenizer.
        num_loops: loops to run instead of the trained number, if the scheme repeats a group.
        use_cache: keep keys and values; False recomputes all of them for every token.
        schedules: the walks of the run; None builds them.
        exit_rule: lets new tokens exit after earlier loops; requires the cache and no pipeline.

    Raises:
        ConfigError: raised at once, for options out of range, ids unknown to the model, and more
        tokens than learned positions.
    """
    mesh = mesh or Mesh(device=next(model.parameters()).device)
    refusal = ""
    if exit_rule is not None:
        refusal = refuse_rule(exit_rule, model.config, num_loops)
        if mesh.pp > 1 or not use_cache:
            refusal = "exit needs the cache, and a model on one pipeline rank; omit exit"
    if use_cache and model.config.halting is not None:
        refusal = refuse_cache(model.config)
    check_options(
        model.config, tokens, max_new_tokens, temperature, top_k, top_p, num_loops, refusal
    )
    loops = cut_loops(model.config, num_loops) if exit_rule is not None else None
    missing = torch.tensor(sorted({*missing_ids} - {*eos_ids}), dtype=torch.long)
    missing = missing.to(mesh.device)
    scheduled = (schedules or Schedules(model.config)).forward(num_loops)

    def continue_prompt() -> Iterator[int]:
        tokens_1S = torch.tensor([list(tokens)], device=mesh.device)
        sample_1 = torch.tensor([sample], device=mesh.device)
        cache = Cache(len(tokens) + max_new_tokens) if use_cache else None
        new_1S = tokens_1S
        for position in range(len(tokens), len(tokens) + max_new_tokens):
            logits_1V: Tensor | None
            if exit_rule and loops and cache is not None and cache.length:
                logits_1V = early_logits(model, loops, new_1S, cache, exit_rule, seed, sample_1)
            else:
                logits_1V = next_logits(model, mesh, scheduled, new_1S, cache, seed, sample_1)
            chosen_1 = torch.zeros_like(sample_1)
            if logits_1V is not None:
                chosen_1 = choose(
                    logits_1V.index_fill(-1, missing, -torch.inf),
                    sample_1,
                    torch.full_like(sample_1, position),
                    temperature=temperature,
                    top_k=top_k,
                    top_p=top_p,
                    seed=seed,
                )
            chosen_1 = mesh.broadcast_over_pp(chosen_1, scheduled.walk[-1].rank)
            chosen = int(chosen_1.item())
            if chosen in eos_ids:
                return
            yield chosen
            tokens_1S = torch.cat([tokens_1S, chosen_1[None]], dim=1)
            new_1S = chosen_1[None] if use_cache else tokens_1S

    # Checks run here, because a generator would run none before its first item is requested.
    return continue_prompt()


def refuse_cache(config: Config) -> str:
    """Return why a model that halts cannot keep keys and values: a later token may take steps that
    an earlier one skipped, and would miss its keys and values there."""
    halting = config.halting
    assert halting is not None
    return (
        f"recurrence.halting.mode={halting.mode} needs the states of all tokens at every step; "
        "recompute them (--no-cache)"
    )


@torch.no_grad()
def next_logits(
    model: Transformer,
    mesh: Mesh,
    scheduled: Scheduled,
    tokens_BS: Tensor,
    cache: Cache | None = None,
    seed: int = 0,
    samples_B: Tensor | None = None,
) -> Tensor | None:
    """Return logits [B, V] of the token that follows, given tokens that follow the cached ones;
    None except on the pipeline rank of the head."""
    ctx = context_after(model, tokens_BS, cache, seed, samples_B)
    with model.tp.whole_sequences():
        x = run_forward(model, mesh, scheduled, tokens_BS, ctx)
        if cache is not None:
            cache.advance(tokens_BS.shape[1])
        return None if x is None else model.all_logits(x[:, -1:])[:, 0]


class Forward:
    """The stages' computation of one batch without training (`parallel.pipeline.Program`)."""

    def __init__(self, model: Transformer, tokens_BS: Tensor, ctx: Context) -> None:
        self.model, self.tokens_BS, self.ctx = model, tokens_BS, ctx
        self.x: Tensor | None = None
        """The output of the last stage, if this rank has it."""

    def forget(self, microbatch: int) -> None:
        """Keeps no state per micro batch."""

    def shape(self, microbatch: int, stack: StackName) -> tuple[int, ...]:
        """Return the shape of the hidden state."""
        return self.model.hidden_shape(self.tokens_BS, self.ctx.positions.cp)

    def forward(
        self, stage: Stage, microbatch: int, x: Tensor | None, reads: dict[str, Tensor]
    ) -> tuple[Tensor, None]:
        """Return (outgoing hidden state, None)."""
        if stage.first:
            x = self.model.enter(self.tokens_BS, self.ctx, reads)
        assert x is not None
        x, _ = self.model.run(stage.steps, x, self.ctx, reads)
        if stage.last:
            self.x = x
        return x, None


def run_forward(
    model: Transformer, mesh: Mesh, scheduled: Scheduled, tokens_BS: Tensor, ctx: Context
) -> Tensor | None:
    """Return the hidden state [B, S, D] that leaves the map, on the pipeline rank of its last
    step."""
    program = Forward(model, tokens_BS, ctx)
    Pipeline(mesh, scheduled.walk, program, model.dtype).run(scheduled.order[mesh.pp_rank])
    return program.x


def choose(
    logits_BV: Tensor,
    samples_B: Tensor,
    positions_B: Tensor,
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Choose tokens [B] at positions of samples: the likeliest, or drawn by (seed, sample,
    position).

    The largest of logit + Gumbel noise is distributed as softmax(logits) (Gumbel 1954), and
    rounding the logits changes the choice no more often than it changes the distribution.
    """
    if temperature == 0.0:
        return logits_BV.argmax(-1)
    scores_BV = logits_BV.to(torch.float64) / temperature
    if top_k is not None and top_k < scores_BV.shape[-1]:
        kept = scores_BV.topk(top_k)
        scores_BV = torch.full_like(scores_BV, -torch.inf).scatter(-1, kept.indices, kept.values)
    if top_p < 1.0:
        p_BV, order = scores_BV.softmax(-1).sort(descending=True, stable=True)
        # The token that reaches top_p is kept, so the first always is.
        dropped = torch.zeros_like(p_BV, dtype=torch.bool)
        dropped.scatter_(-1, order, p_BV.cumsum(-1) - p_BV >= top_p)
        scores_BV = scores_BV.masked_fill(dropped, -torch.inf)
    where = key(seed, "next token")
    bits_BV = random_bits(where, (samples_B, positions_B), scores_BV.shape[-1])
    uniform_BV = (bits_BV.to(torch.float64) + 0.5) / 2**32 + 0.5
    return (scores_BV - (-uniform_BV.log()).log()).argmax(-1)


def check_options(
    config: Config,
    tokens: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    num_loops: int | None,
    refusal: str = "",
) -> None:
    """Reject invalid generation options; all mistakes, `refusal` included, are lines of one
    ConfigError."""
    model, problems = config.model, [refusal] if refusal else []
    if config.encoder is not None:
        problems.append(
            "encoder: the run is an encoder-decoder, which continues no text; translate sentences "
            "with `megarecur translate`"
        )
    if config.classifies:
        problems.append(
            "task: the run is a classifier without a language-model head; score it with "
            "`megarecur eval`"
        )
    if max_new_tokens < 1:
        problems.append(f"max_new_tokens={max_new_tokens} must be at least 1; raise it")
    if not 0.0 <= temperature < float("inf"):
        problems.append(
            f"temperature={temperature} must be 0 (the likeliest token) or above; raise it"
        )
    if top_k is not None and top_k < 1:
        problems.append(f"top_k={top_k} must be at least 1; omit it to choose among all tokens")
    if not 0.0 < top_p <= 1.0:
        problems.append(f"top_p={top_p} must be above 0 and at most 1; correct it")
    if config.temporal is not None and not model.causal:
        problems.append(
            "model.causal=false with temporal memory: tokens of a chunk see later ones, so "
            "no text can be continued; use a run with causal=true"
        )
    if num_loops is not None and (refusal := refuse_depth(config, num_loops)):
        problems.append(refusal)
    if not tokens:
        problems.append("the prompt has no tokens; give it some text")
    unknown = [i for i in tokens if not 0 <= i < (model.vocab_size or 0)]
    if unknown:
        problems.append(
            f"id {unknown[0]} of the prompt is outside model.vocab_size={model.vocab_size}; "
            "use the tokenizer that the run was made with"
        )
    limit = model.max_positions or config.data.seq_length
    # The last new token is never read, so it needs no position.
    most = limit + 1 - len(tokens)
    restarts = config.temporal is not None  # with every chunk
    if model.positions == "learned" and max_new_tokens > most and not restarts:
        problems.append(
            f"{len(tokens)} tokens of prompt and max_new_tokens={max_new_tokens} exceed the "
            f"{limit} learned positions of the model; "
            + (f"set max_new_tokens to at most {most}" if most > 0 else "shorten the prompt")
        )
    if problems:
        raise ConfigError("cannot generate:" + "".join(f"\n  {line}" for line in problems))


def encode_prompt(tokenizer: Tokenizer, text: str, bos_id: int | None = None) -> list[int]:
    """Encode a prompt, `bos_id` in front. An empty prompt starts from the end-of-document token.

    Raises:
        ConfigError: the prompt is not valid Unicode, for example from a terminal with another
        encoding.
    """
    refuse_undecodable("the prompt", text)
    ids = [] if bos_id is None else [bos_id]
    return ids + tokenizer.encode(text) or [tokenizer.eos_id]


class TextStream:
    """The text of ids that continue a prompt, as soon as its characters are complete.

    A token's text depends on its neighbours (spaces, characters cut into bytes), so the difference
    that new tokens make to the text of the last ones is returned.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self.tokenizer, self.known = tokenizer, list(prompt)
        self.start, self.read = 0, len(self.known)
        """known[start:read] is context whose text has been returned."""

    def add(self, token: int) -> str:
        """Return the text that is complete with the next token; "" if there is none."""
        self.known.append(token)
        return self._advance(at_end=False)

    def end(self) -> str:
        """Return the rest of the text."""
        return self._advance(at_end=True)

    def _advance(self, at_end: bool) -> str:
        known, start, read = self.known, self.start, self.read
        before, text = (self.tokenizer.decode(part) for part in (known[start:read], known[start:]))
        if len(text) <= len(before) or (text.endswith(REPLACEMENT) and not at_end):
            return ""  # perhaps a character with missing bytes
        # The tokens just returned suffice as context for the next.
        self.start, self.read = read, len(known)
        return text[len(before) :]


def stream_text(tokenizer: Tokenizer, prompt: Sequence[int], ids: Iterable[int]) -> Iterator[str]:
    """Yield the text of ids that continue a prompt, as soon as its characters are complete."""
    stream = TextStream(tokenizer, prompt)
    yield from filter(None, map(stream.add, ids))
    yield from filter(None, [stream.end()])
