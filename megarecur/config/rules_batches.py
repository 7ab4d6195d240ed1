"""Rules about the data of an encoder-decoder: pairs of sentences, and batches by tokens."""

from __future__ import annotations

from megarecur.config.rule import Rule

BATCH_RULES = (
    Rule(
        keys=("train.batch_tokens", "encoder"),
        when=lambda c: c.train.batch_tokens is not None and c.encoder is None,
        reason="train.batch_tokens={train.batch_tokens} is for pairs of sentences, which only a "
        "config with an encoder reads",
        remedy="leave batch_tokens out, or add an encoder section",
    ),
    Rule(
        keys=("train.batch_tokens", "train.micro_batch_size"),
        when=lambda c: c.train.batch_tokens is not None and c.train.micro_batch_size != 1,
        reason="train.batch_tokens={train.batch_tokens} makes each micro batch one batch of pairs, "
        "not train.micro_batch_size={train.micro_batch_size}",
        remedy="set micro_batch_size to 1, or leave batch_tokens out",
    ),
    Rule(
        keys=("data.truncate", "encoder"),
        when=lambda c: c.data.truncate and c.encoder is None,
        reason="data.truncate=true cuts sentences of pairs, which only a config with an encoder "
        "reads",
        remedy="leave truncate out, or add an encoder section",
    ),
    Rule(
        keys=("encoder", "data.shuffle_shards"),
        when=lambda c: c.encoder is not None and bool(c.data.shuffle_shards),
        reason="data.shuffle_shards={data.shuffle_shards} is for corpora of text, and an encoder "
        "reads pairs of sentences",
        remedy="leave shuffle_shards out",
    ),
    Rule(
        keys=("encoder", "data.mask_documents"),
        when=lambda c: c.encoder is not None and not c.data.mask_documents,
        reason="data.mask_documents=false with an encoder: pairs of sentences never read each "
        "other",
        remedy="leave mask_documents out",
    ),
    Rule(
        keys=("encoder", "data.train.remote", "data.val.remote"),
        when=lambda c: (
            c.encoder is not None and any(source.remote for source in (*c.data.train, *c.data.val))
        ),
        reason="a remote is for corpora of text, and an encoder reads pairs of sentences",
        remedy="copy the corpus to this machine and leave remote out",
    ),
)
