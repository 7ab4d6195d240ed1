"""Translate sentences by a trained encoder-decoder: batches of like length, search, text.

    options = TranslateOptions(beam=4, penalty=LengthPenalty("wu", 0.6))
    sentences = encode_sentences(tokenizer, lines)
    check_translation(config, sentences, options)
    found = translate(model, tokenizer, sentences, options)

A sentence is encoded with its end token; the decoder starts from the tokenizer's begin token or,
without one, its end token, as in training. Sentences are searched in batches of like length; the
result is in their own order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from megarecur.config.run import Config
from megarecur.data.tokenizer import Tokenizer
from megarecur.errors import ConfigError
from megarecur.inference.beam import Hypothesis, LengthPenalty, StepDecoder, beam_search, sample
from megarecur.inference.decoder import TranslationDecoder, collate_sources
from megarecur.inference.generate import refuse_cache
from megarecur.model.transformer import Transformer
from megarecur.recurrence.depth import refuse_depth
from megarecur.recurrence.schemes import build_map

MORE_TOKENS = 50
"""Tokens by which a translation may be longer than its source (Vaswani et al. 2017, section
6.1)."""
MAX_HYPOTHESES, MAX_BATCH, MAX_BATCH_TOKENS, MAX_TOKENS = 1 << 10, 1 << 16, 1 << 30, 1 << 20
"""Maximum values of options, beyond which memory or patience ends: hypotheses of a sentence,
sentences and tokens of a batch, tokens of a translation."""


@dataclass(frozen=True)
class Sampling:
    """Options of drawing samples instead of searching; see `generate.choose`."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 1


@dataclass(frozen=True)
class TranslateOptions:
    """Options of a translation."""

    beam: int = 4
    penalty: LengthPenalty = field(default_factory=LengthPenalty)
    nbest: int = 1
    """Translations of each sentence: the best of the beam, or samples."""
    sampling: Sampling | None = None
    """Draw translations; None: search for the best."""
    batch: int = 64
    """Most sentences of a batch."""
    batch_tokens: int | None = None
    """Most source tokens of a batch, padding and all hypotheses counted; None: no limit."""
    max_tokens: int | None = None
    """Most tokens of a translation, its end included; None: those of the source and MORE_TOKENS
    more."""
    num_loops: int | None = None
    """Loops of the decoder to run instead of the trained number."""
    truncate: bool = False
    """Cut sources that exceed the positions of the model, or its data.seq_length."""
    use_cache: bool = True
    """Keep keys and values; False recomputes them for every token."""

    @property
    def width(self) -> int:
        """Hypotheses of a sentence."""
        return self.beam if self.sampling is None else self.nbest


@dataclass(frozen=True)
class Sentence:
    """A source sentence, and the beginning of its translation."""

    ids: list[int]
    """Its ids, with the end token."""
    prefix: list[int]
    """Ids with which its translation must begin."""


@dataclass(frozen=True)
class Translation:
    """The translations of a sentence, best first; samples in the order of their numbers. There are
    none if the model's probabilities are not finite."""

    hypotheses: list[Hypothesis]
    texts: list[str]


def encode_sentences(
    tokenizer: Tokenizer, lines: Sequence[str], prefixes: Sequence[str] | None = None
) -> list[Sentence]:
    """Return the sentences of lines of text, with prefixes of their translations if given."""
    return [
        Sentence([*tokenizer.encode(line), tokenizer.eos_id], tokenizer.encode(prefix))
        for line, prefix in zip(lines, prefixes or [""] * len(lines), strict=True)
    ]


def start_token(tokenizer: Tokenizer) -> int:
    """Return the id that the decoder reads first: begin or, without one, end (fairseq)."""
    return tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id


def limit_of(config: Config) -> int | None:
    """Return the most positions of a sentence; None if the position encoding has no limit."""
    model = config.model
    return (model.max_positions or config.data.seq_length) if model.positions == "learned" else None


def truncate_sources(config: Config, sentences: Sequence[Sentence]) -> list[Sentence]:
    """Return the sentences, cut to the positions of the model or to data.seq_length, with their end
    token."""
    most = limit_of(config) or config.data.seq_length
    return [
        s if len(s.ids) <= most else Sentence([*s.ids[: most - 1], s.ids[-1]], s.prefix)
        for s in sentences
    ]


def max_length(config: Config, sentence: Sentence, options: TranslateOptions) -> int:
    """Return the most tokens of a translation, its end included."""
    most = options.max_tokens or len(sentence.ids) + MORE_TOKENS
    limit = limit_of(config)  # The last token is never read.
    return most if limit is None else min(most, limit)


def check_translation(
    config: Config, sentences: Sequence[Sentence], options: TranslateOptions
) -> None:
    """Reject runs, options and sentences that cannot be translated.

    Raises:
        ConfigError: listing all mistakes.
    """
    if config.encoder is None:
        raise ConfigError(
            "cannot translate: encoder is not set, so the run is no encoder-decoder; continue text "
            "with `megarecur generate`, or train a run with an encoder on pairs of sentences"
        )
    problems = list(find_option_problems(config, options))
    if options.truncate:
        sentences = truncate_sources(config, sentences)
    vocabulary = config.model.vocab_size or 0
    problems += list(find_sentence_problems(config, sentences, options, vocabulary))
    if problems:
        raise ConfigError("cannot translate:" + "".join(f"\n  {line}" for line in problems))


def find_option_problems(config: Config, options: TranslateOptions) -> Iterator[str]:
    """Yield options out of range."""
    vocabulary, drawn = config.model.vocab_size or 0, options.sampling
    if drawn is None and not 1 <= options.beam <= vocabulary:
        yield (
            f"--beam {options.beam}: must be from 1 to the vocabulary's {vocabulary} tokens; "
            "set it to 4"
        )
    elif drawn is None and options.beam > MAX_HYPOTHESES:
        yield f"--beam {options.beam}: must be at most {MAX_HYPOTHESES}; set it to 4"
    if drawn is None and not 1 <= options.nbest <= options.beam:
        yield (
            f"--nbest {options.nbest}: must be from 1 to --beam {options.beam}; lower it, or raise "
            "the beam"
        )
    elif not 1 <= options.nbest <= MAX_HYPOTHESES:
        yield f"--nbest {options.nbest}: must be from 1 to {MAX_HYPOTHESES}; correct it"
    if not 0.0 <= options.penalty.alpha <= 100.0:
        yield f"--length-penalty {options.penalty.alpha}: must be from 0 to 100; set it to 0.6"
    for name, value, most in (
        ("batch", options.batch, MAX_BATCH),
        ("batch-tokens", options.batch_tokens, MAX_BATCH_TOKENS),
        ("max-tokens", options.max_tokens, MAX_TOKENS),
    ):
        if value is not None and value < 1:
            yield f"--{name} {value}: must be at least 1; raise it"
        elif value is not None and value > most:
            yield f"--{name} {value}: must be at most {most}; lower it"
    if drawn is not None and not 0.0 <= drawn.temperature < float("inf"):
        yield f"--temperature {drawn.temperature}: must be 0 or above; raise it"
    if drawn is not None and drawn.top_k is not None and drawn.top_k < 1:
        yield f"--top-k {drawn.top_k}: must be at least 1; omit it to choose among all tokens"
    if drawn is not None and not 0.0 < drawn.top_p <= 1.0:
        yield f"--top-p {drawn.top_p}: must be above 0 and at most 1; correct it"
    if options.num_loops is not None and (refusal := refuse_depth(config, options.num_loops)):
        yield refusal
    if config.halting is not None and options.use_cache:
        yield refuse_cache(config)


def find_sentence_problems(
    config: Config, sentences: Sequence[Sentence], options: TranslateOptions, vocabulary: int
) -> Iterator[str]:
    """Yield the first sentence that is too long, has too long a prefix, or has unknown ids."""
    limit = limit_of(config)
    long = [i for i, s in enumerate(sentences, 1) if limit is not None and len(s.ids) > limit]
    if long:
        yield (
            f"line {long[0]} of the source has {len(sentences[long[0] - 1].ids)} tokens with its "
            f"end, more than the {limit} learned positions of the model"
            f"{others(long)}; split long sentences, or cut them with --truncate"
        )
    full = [
        i
        for i, s in enumerate(sentences, 1)
        if s.prefix and len(s.prefix) >= max_length(config, s, options)
    ]
    if full:
        first = sentences[full[0] - 1]
        yield (
            f"line {full[0]} of the prefixes has {len(first.prefix)} tokens, which leaves no room "
            f"for an end within {max_length(config, first, options)} tokens{others(full)}; shorten "
            "it, or raise --max-tokens"
        )
    unknown = [i for i, s in enumerate(sentences, 1) if max(max(s.ids), *s.prefix, 0) >= vocabulary]
    if unknown:
        yield (
            f"line {unknown[0]} has ids outside model.vocab_size={vocabulary}{others(unknown)}; "
            "use the tokenizer that the run was made with"
        )


def others(lines: Sequence[int]) -> str:
    """Return a note about further lines with a mistake; "" if there is one line."""
    return f" ({len(lines) - 1} more lines too)" if len(lines) > 1 else ""


def plan_batches(sentences: Sequence[Sentence], options: TranslateOptions) -> list[list[int]]:
    """Return the numbers of the sentences of each batch: longest first, so that memory is not found
    too small at the end; a batch within the limits, or of one sentence."""
    order = sorted(range(len(sentences)), key=lambda i: (-len(sentences[i].ids), i))
    most = options.batch_tokens or 0
    batches: list[list[int]] = []
    for i in order:
        longest = len(sentences[batches[-1][0]].ids) if batches else 0
        fits = batches and len(batches[-1]) < options.batch
        if fits and most:
            fits = (len(batches[-1]) + 1) * longest * options.width <= most
        if fits:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def search_sentences(
    make_decoder: Callable[[list[list[int]]], StepDecoder],
    sentences: Sequence[Sentence],
    numbers: Sequence[int],
    max_lengths: Sequence[int],
    start: int,
    end: int,
    options: TranslateOptions,
    device: torch.device | str = "cpu",
) -> list[list[Hypothesis]]:
    """Return the hypotheses of one batch of sentences.

    Args:
        make_decoder: returns a decoder of the ids of source sentences.
        numbers: number of each sentence, which decides its random choices.
        max_lengths: the most tokens of each translation.
        start: the token that the decoder reads first.
        end: the token that ends a translation.
    """
    decoder = make_decoder([s.ids for s in sentences])
    prefixes = [s.prefix for s in sentences]
    drawn = options.sampling
    if drawn is None:
        return beam_search(
            decoder, len(sentences), beam=options.beam, start=start, end=end,
            max_lengths=max_lengths, penalty=options.penalty, prefixes=prefixes,
            nbest=options.nbest, device=device,
        )  # fmt: skip
    return sample(
        decoder, len(sentences), num_samples=options.nbest, start=start, end=end,
        max_lengths=max_lengths, sentence_ids=numbers, temperature=drawn.temperature,
        top_k=drawn.top_k, top_p=drawn.top_p, seed=drawn.seed, penalty=options.penalty,
        prefixes=prefixes, device=device,
    )  # fmt: skip


def translate(
    model: Transformer,
    tokenizer: Tokenizer,
    sentences: Sequence[Sentence],
    options: TranslateOptions,
    note: Callable[[int, int], None] = lambda sentences, tokens: None,
    first_number: int = 0,
) -> list[Translation]:
    """Return the translations of sentences, in their order. `check_translation` comes first.

    Args:
        model: the whole model; with tensor parallelism this rank's part, and all ranks call this.
        note: called after each batch with its sentences, and the tokens of their translations.
        first_number: number of the first sentence, for the random choices of samples.

    Raises:
        ConfigError: a prefix has a token that no translation contains.
    """
    config, device = model.config, next(model.parameters()).device
    if options.truncate:
        sentences = truncate_sources(config, sentences)
    steps = build_map(config, options.num_loops)
    start, end = start_token(tokenizer), tokenizer.eos_id
    banned = {*tokenizer.missing_ids(config.model.vocab_size or 0), start} - {end}
    if tokenizer.pad_id is not None:
        banned.add(tokenizer.pad_id)
    refused = [i for i, s in enumerate(sentences, 1) if banned & {*s.prefix}]
    if refused:
        raise ConfigError(
            f"line {refused[0]} of the prefixes has a start or padding token{others(refused)}, "
            "which no translation contains; remove it"
        )

    def make_decoder(sources: list[list[int]]) -> StepDecoder:
        source = collate_sources(sources).to(device)
        return TranslationDecoder(model, steps, source, banned=banned, use_cache=options.use_cache)

    found: dict[int, Translation] = {}
    for batch in plan_batches(sentences, options):
        chosen = [sentences[i] for i in batch]
        lengths = [max_length(config, s, options) for s in chosen]
        numbers = [first_number + i for i in batch]
        searched = search_sentences(
            make_decoder, chosen, numbers, lengths, start, end, options, device
        )
        for i, hypotheses in zip(batch, searched, strict=True):
            texts = [one_line(tokenizer.decode(h.tokens)) for h in hypotheses]
            found[i] = Translation(hypotheses, texts)
        note(len(batch), sum(len(h.tokens) + h.ended for each in searched for h in each))
    return [found[i] for i in range(len(sentences))]


def one_line(text: str) -> str:
    """Return a text with its line breaks replaced by spaces: a translation is one line."""
    return " ".join(text.split("\n")).replace("\r", " ")
