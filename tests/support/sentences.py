"""Made-up sentence pairs, as files of two languages, and corpora of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from megarecur.data_prep.bitext import Bitext
from megarecur.data_prep.pairs import PairRequest, prepare_pairs
from megarecur.data_prep.readers import Reading
from megarecur.data_prep.tokenizer import train_tokenizer

WORDS = {
    "ein": "a", "der": "the", "große": "big", "kleine": "little", "Hund": "dog", "Mann": "man",
    "läuft": "runs", "schläft": "sleeps", "über": "over", "Straße": "street", "und": "and",
    "grüne": "green", "Männer": "men", "spielen": "play", "im": "in",
}  # fmt: skip


def draw_pairs(count: int, seed: int = 1, most: int = 12) -> list[tuple[str, str]]:
    """Draw distinct pairs of 2 to `most` words, word by word translations but for some words."""
    rng, pairs = random.Random(seed), {}
    while len(pairs) < count:
        words = rng.choices(list(WORDS), k=rng.randint(2, most))
        kept = [word for word in words if rng.random() < 0.9] or words
        pairs[" ".join(words)] = " ".join(WORDS[word] for word in kept)
    return list(pairs.items())


def write_sides(folder: Path, name: str, pairs: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """Write NAME.de and NAME.en; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = (folder / f"{name}.de", folder / f"{name}.en")
    for side, path in enumerate(paths):
        path.write_text("".join(pair[side] + "\n" for pair in pairs), encoding="utf-8")
    return str(paths[0]), str(paths[1])


def train_joint(files: Sequence[str], out: Path, pad: bool = True, vocab_size: int = 330) -> str:
    """Train a joint vocabulary of some files; returns its path."""
    train_tokenizer(files, out, Reading(text_split="line"), vocab_size=330, pad=pad)
    return str(out)


def write_pair_corpus(
    out: Path, count: int = 200, num_val: int = 30, seed: int = 1, tokenizer: str = ""
) -> Path:
    """Prepare OUT/train and OUT/val of drawn pairs, with OUT/joint.model unless one is given;
    returns OUT."""
    pairs = draw_pairs(count + num_val, seed)
    train = write_sides(out.parent / f"{out.name}-text", "train", pairs[:count])
    val = write_sides(out.parent / f"{out.name}-text", "val", pairs[count:])
    out.mkdir(parents=True, exist_ok=True)
    request = PairRequest(
        train=Bitext((train[0],), (train[1],)),
        val=Bitext((val[0],), (val[1],)),
        tokenizer=tokenizer or train_joint(train, out / "joint.model"),
    )
    prepare_pairs(request, out, workers=1)
    return out
