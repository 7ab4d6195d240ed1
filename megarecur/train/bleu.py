"""BLEU of greedy translations of validation pairs, during training."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from megarecur.config.run import Config
from megarecur.data.tokenizer import Tokenizer, load_tokenizer
from megarecur.inference.bleu import score_texts
from megarecur.inference.translate import Sentence, TranslateOptions, translate
from megarecur.model.transformer import Transformer
from megarecur.parallel.mesh import Mesh, same_error
from megarecur.progress import Note, note_nothing


@runtime_checkable
class Pairs(Protocol):
    """A corpus of pairs of sentences."""

    num_pairs: int

    def pair(self, number: int, most: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the ids of source and target, each with its end token and at most `most`."""


def score_bleu(
    model: Transformer,
    corpora: Sequence[object],
    names: Sequence[str],
    config: Config,
    mesh: Mesh,
    note: Note = note_nothing,
) -> dict[str, float]:
    """Return the metrics `bleu` of all corpora together and, if there are several, of each by name;
    collective.

    Replicas share the sentences. References are the decoded targets of the corpus, so that BLEU
    may differ from that of the original files where the tokenizer normalises text, or
    data.truncate cuts it.

    Args:
        corpora: corpora of pairs; the first train.eval_bleu pairs of each are translated.
        names: name of each corpus.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    found: list[tuple[list[str], list[str]]] = []
    for corpus, name in zip(corpora, names, strict=True):
        assert isinstance(corpus, Pairs), "an encoder-decoder reads corpora of pairs"
        texts, references = translate_pairs(model, corpus, config, mesh, tokenizer, note)
        note(f"{len(texts)} sentences of {name} translated")
        found.append((texts, references))
    if not found:
        return {}
    everything, expected = (list(chain(*sides)) for sides in zip(*found, strict=True))
    values = {"bleu": score_texts(everything, expected)["bleu"]}
    if len(found) > 1:
        for name, sides in zip(names, found, strict=True):
            values[f"{name}/bleu"] = score_texts(*sides)["bleu"]
    return values


def translate_pairs(
    model: Transformer,
    corpus: Pairs,
    config: Config,
    mesh: Mesh,
    tokenizer: Tokenizer,
    note: Note = note_nothing,
) -> tuple[list[str], list[str]]:
    """Return greedy translations of the first pairs of a corpus, and their references, on every
    rank; collective."""
    count, most = min(config.train.eval_bleu, corpus.num_pairs), config.data.seq_length
    mine = range(mesh.dp_rank, count, mesh.dp)
    options = TranslateOptions(beam=1, use_cache=config.halting is None)
    with same_error(mesh):
        pairs = [corpus.pair(number, most) for number in range(count)]
    sentences = [Sentence(pairs[i][0].tolist(), []) for i in mine]
    own = translate(
        model, tokenizer, sentences, options,
        lambda some, tokens: note(f"{some} more sentences translated"),
    )  # fmt: skip
    texts: dict[int, str] = {}
    for part in mesh.gather_objects(
        {i: each.texts[0] if each.texts else "" for i, each in zip(mine, own, strict=True)}
    ):
        texts |= part
    references = [tokenizer.decode(target.tolist()[:-1]) for _, target in pairs]
    return [texts[i] for i in range(count)], references
