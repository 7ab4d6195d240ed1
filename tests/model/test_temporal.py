"""The temporal latent bottleneck: against plain models, in pieces, padded, packed, on any mesh.

Parity with the authors' code is in test_parity.py. Shapes: B samples, S positions, M slots.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from support.configs import make_config
from support.engines import trace_compiled
from support.harness import compare
from support.meshes import config_of, later, reference, trace
from support.models import Batch, build, gradients, make_batch, objective, step_once
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megarecur.config.run import Config
from megarecur.data.open import open_data
from megarecur.errors import ConfigError
from megarecur.inference.cache import Cache
from megarecur.inference.early import ExitRule
from megarecur.inference.generate import generate
from megarecur.launch.check import describe
from megarecur.launch.terminal import make_console
from megarecur.model.temporal import Carried
from megarecur.model.transformer import Transformer
from megarecur.parallel.mesh import Mesh
from megarecur.plan.cost import (
    Seen,
    count_flops,
    count_memory_flops,
    count_parameters,
    count_remade_bytes,
    estimate_memory,
)
from megarecur.recurrence.schemes import build_map, layer_map
from megarecur.train.evaluate import stream_corpus
from megarecur.train.metrics import read_rows
from megarecur.train.trainer import FINISHED, train

CHUNK, SLOTS = 4, 3
TEMPORAL = {"chunk_length": CHUNK, "num_slots": SLOTS}
POSITIONS = ["xpos", "rope", "alibi", "learned", "sinusoidal", "none"]


def small(scheme: str = "reuse_map", temporal: Any = TEMPORAL, **sections: Any) -> Config:
    """In fp64; weights start large, so that every term of the model matters."""
    model = {"vocab_size": 23, "init_std": 0.15, **sections.pop("model", {})}
    own = {"precision": "fp64", **sections.pop("train", {})}
    if not model.get("causal", True):  # An encoder needs a task.
        sections["task"] = {"kind": "token", "num_classes": 23, "head_size": 0}
    return make_config("none", scheme, model=model, train=own, temporal=temporal, **sections)


def hidden(config: Config, batch: Batch, model: Transformer | None = None) -> tuple[Tensor, Tensor]:
    """(hidden states [B, S, D] that leave the map, memory [B, M, D])."""
    model, reads = model or build(config), {}
    ctx = model.context(batch, step=0, training=False)
    x, _ = model.run(build_map(config), model.embed(batch.tokens_BS, ctx), ctx, reads)
    return x, reads["memory"]


def packed(batch: Batch, documents_BS: list[list[int]]) -> Batch:
    """The same tokens as documents; -1 is padding."""
    documents = torch.tensor(documents_BS)
    first = (documents[:, :, None] == documents[:, None, :]).long().argmax(-1)
    positions = torch.arange(documents.shape[1]) - first
    return replace(batch, documents_BS=documents, positions_BS=positions, single_document=False)


# ------------------------------------------------------------------------- against plain models


@pytest.mark.parametrize("scheme", ["reuse_map", "loop", "block_recurrence"])
def test_one_chunk_of_a_muted_memory_is_no_recurrence(scheme: str) -> None:
    """Bit by bit, with the gradients of all that both have."""
    batch = make_batch(2, 7)
    plain_config = small(scheme, None)
    temporal_config = small(scheme, {"chunk_length": 7, "num_slots": SLOTS})
    plain, model = build(plain_config), build(temporal_config)
    for name, parameter in model.parameters_by_name.items():
        if name.endswith("memory_attention.output.weight"):
            parameter.data.zero_()
    model.refresh()
    found = []
    for config, some in ((plain_config, plain), (temporal_config, model)):
        loss, logits = objective(some, layer_map(config.recurrence), batch)
        loss.backward()
        found.append((loss, logits, gradients(some)))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    for name, gradient in found[0][2].items():
        assert torch.equal(found[1][2][name], gradient), name


@pytest.mark.parametrize("scheme", ["reuse_map", "loop"])
def test_a_token_is_seen_by_later_ones_only_and_beyond_its_chunk(scheme: str) -> None:
    batch, config = make_batch(1, 12), small(scheme)
    model = build(config)
    before = hidden(config, batch, model)[0]
    for place in (0, 5, 11):
        batch.tokens_BS[0, place] = (batch.tokens_BS[0, place] + 1) % 23
        after = hidden(config, batch, model)[0]
        changed = (after != before).any(-1)[0].tolist()
        assert changed == [i >= place for i in range(12)]
        before = after


def test_an_encoder_sees_its_chunk_and_the_memory() -> None:
    batch = make_batch(1, 8)
    config = small(model={"causal": False, "positions": "xpos"})
    model = build(config)
    before = hidden(config, batch, model)[0]
    batch.tokens_BS[0, 2] = (batch.tokens_BS[0, 2] + 1) % 23
    assert (hidden(config, batch, model)[0] != before).any(-1).all()
    before = hidden(config, batch, model)[0]
    batch.tokens_BS[0, 5] = (batch.tokens_BS[0, 5] + 1) % 23
    changed = (hidden(config, batch, model)[0] != before).any(-1)[0].tolist()
    assert changed == [False] * 4 + [True] * 4


def test_slots_from_zero_stay_alike_and_random_ones_do_not_collapse() -> None:
    """The first documents why zero is not the default."""
    batch, spread = make_batch(2, 40), {}
    for initial in ("zero", "random"):
        temporal = {**TEMPORAL, "initial_memory": initial, "updates": 2, "num_slots": 6}
        config = small(temporal=temporal, model={"init_std": 0.02, "hidden_size": 64})
        memory = hidden(config, batch, Transformer(config))[1]
        normed = memory / memory.norm(dim=-1, keepdim=True).clamp(min=1e-30)
        likeness = normed @ normed.transpose(1, 2)
        spread[initial] = likeness[:, ~torch.eye(6, dtype=torch.bool)]
        if initial == "zero":
            assert memory.norm() > 0.0
            torch.testing.assert_close(memory, memory[:, :1].expand_as(memory))
    assert spread["zero"].min() > 0.999999 and spread["random"].abs().mean() < 0.25


# ---------------------------------------------------------------------------------- in pieces


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("positions", ["xpos", "learned"])
def test_chunk_by_chunk_equals_one_call(positions: str, causal: bool) -> None:
    batch = make_batch(2, 11)
    config = small("loop", model={"positions": positions, "causal": causal})
    model, steps = build(config), build_map(config)
    whole, memory = hidden(config, batch, model)
    carried = Carried()
    parts = [model.read_piece(steps, part, carried) for part in batch.tokens_BS.split(CHUNK, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-12, atol=1e-12)
    assert carried.memory_BMD is not None and carried.length == 11
    torch.testing.assert_close(carried.memory_BMD, memory, rtol=1e-12, atol=1e-12)
    with pytest.raises(ConfigError, match="11 tokens were read before, which are no whole chunks"):
        model.read_piece(steps, batch.tokens_BS, carried)


@pytest.mark.parametrize("sizes", [[1] * 13, [3, 6, 1, 3], [9, 4]])
@pytest.mark.parametrize("state", ["prelude", "random"])
def test_a_decoder_takes_pieces_of_any_length(state: str, sizes: list[int]) -> None:
    """From a random state too, which is another in every chunk."""
    batch = replace(make_batch(2, 13), sample_ids_B=torch.arange(2))
    loop = {"kind": "loop", "prelude": 1, "core": 1, "coda": 1, "num_loops": 2}
    loop |= {"injection": "add", "initial_state": state}
    config = small(model={"num_kv_heads": 2}, recurrence=loop)
    model, steps = build(config), build_map(config)
    if state == "random":
        found = model.context(batch, step=0, training=False).chunks
        assert found is not None
        x = torch.zeros(2, CHUNK, config.model.hidden_size, dtype=torch.float64)
        first, second = (
            model.runner.runner.initial_state(x, chunk.ctx) for chunk in found.chunks[:2]
        )
        assert not torch.isclose(first, second).any()
    carried = Cache().carry()
    parts = [model.read_piece(steps, part, carried) for part in batch.tokens_BS.split(sizes, 1)]
    whole = hidden(config, batch, model)[0]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_cached_text_is_that_of_the_whole_forward(positions: str) -> None:
    """Past the rows of a learned table too: positions restart with chunks."""
    config = small("dense", model={"positions": positions, "init_std": 0.4})
    model = build(config)
    said = [
        list(generate(model, prompt, max_new_tokens=7, seed=2, use_cache=cached))
        for prompt in ([1, 2], [3, 4, 5, 6, 7])
        for cached in (True, False)
    ]
    assert said[::2] == said[1::2] and len(set(said[0] + said[2])) > 2


def test_what_cannot_be_continued_is_refused() -> None:
    encoder = build(small(model={"causal": False}))
    with pytest.raises(ConfigError, match="causal=false with temporal memory"):
        generate(encoder, [1], max_new_tokens=1)
    rule = ExitRule("confidence", 0.5)
    with pytest.raises(ConfigError, match="exit: a token that exits early"):
        generate(build(small("cycle")), [1], max_new_tokens=1, exit_rule=rule)


# ----------------------------------------------------------------- halting, chunk by chunk (GUTLB)


def halting(**sections: Any) -> Config:
    """One gated block that halts globally in every chunk, at different steps."""
    model = {"gate": True, "positions": "xpos", "init_std": 0.4, **sections.pop("model", {})}
    universal = {"kind": "universal", "depth": 5, "halting": {"mode": "global", "threshold": 0.9}}
    return small(recurrence=universal, model=model, **sections)


def cost_of(config: Config, model: Transformer, batch: Batch) -> tuple[Tensor, Tensor, int]:
    """(hidden states, sum over documents of the cost of halting, different numbers of steps)."""
    ctx = model.context(batch, step=0, training=True)
    x = model.embed(batch.tokens_BS, ctx)
    x, terms = model.run(build_map(config), x, ctx, {})
    assert len(ctx.recorder.counts) == len(ctx.chunks.chunks)
    steps = sum(ctx.recorder.counts)[:-2]
    assert steps.sum() == (batch.documents_BS >= 0).sum()
    return x, terms["halting"].total, int((steps > 0).sum())


@pytest.mark.parametrize("causal", [True, False])
def test_halting_is_decided_by_chunk_and_its_cost_is_the_mean_over_chunks(causal: bool) -> None:
    """Documents that begin with a chunk halt, and cost, as if alone; so do they beside padding."""
    config = halting(model={"causal": causal})
    batch, model = make_batch(1, 16), build(config)
    together = packed(batch, [[0] * 8 + [1] * 6 + [-1] * 2])
    x, cost, depths = cost_of(config, model, together)
    assert depths > 1
    total = torch.zeros_like(cost)
    for start, stop in ((0, 8), (8, 14)):
        length = stop - start
        own = Batch(
            batch.tokens_BS[:, start:stop], batch.labels_BS[:, start:stop],
            torch.arange(length)[None], torch.zeros(1, length, dtype=torch.long),
            batch.sample_ids_B,
        )  # fmt: skip
        alone, own_cost, _ = cost_of(config, model, own)
        torch.testing.assert_close(x[:, start:stop], alone, rtol=1e-11, atol=1e-11)
        total = total + own_cost
    torch.testing.assert_close(cost, total, rtol=1e-11, atol=1e-11)


def test_halting_chunks_stream_and_refuse_a_cache() -> None:
    config, batch = halting(), make_batch(2, 11)
    model, steps, carried = build(config), build_map(config), Carried()
    parts = [model.read_piece(steps, part, carried) for part in batch.tokens_BS.split(CHUNK, 1)]
    whole = hidden(config, batch, model)[0]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-11, atol=1e-11)
    with pytest.raises(ConfigError, match="needs the states of all tokens of a chunk"):
        model.read_piece(steps, batch.tokens_BS, Cache().carry())


@pytest.mark.parametrize("masked", [True, False])
def test_streaming_evaluation_reads_documents_to_their_end(corpus: Path, masked: bool) -> None:
    """As if each was one sequence; without masks all text is one document."""
    extra = {"data": {"mask_documents": masked, "seq_length": 14}, "train": {"precision": "fp64"}}
    config = config_of(corpus, "loop", 1, temporal=TEMPORAL, model={"init_std": 0.15}, **extra)
    opened = open_data(config, Mesh())
    config, text = opened.config, opened.validation[0]
    model, losses = build(config), []
    begins = text.documents.tolist() if masked else [0]
    for begin, end in pairwise([*begins, text.num_tokens]):
        tokens = torch.from_numpy(text.read(begin, end - begin).astype("int64"))[None]
        whole = replace(make_batch(1, end - begin - 1), tokens_BS=tokens[:, :-1])
        logits = model.logits(hidden(config, whole, model)[0])[0].detach()
        losses += torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")
    score = stream_corpus(model, text, config, Mesh())
    assert score.tokens == len(losses)
    assert score.loss == pytest.approx(float(torch.stack(losses).mean()), rel=1e-11)
    if masked:
        first = stream_corpus(model, text, config, Mesh(), max_documents=1)
        count = begins[1] - begins[0] - 1
        assert first.tokens == count
        assert first.loss == pytest.approx(float(torch.stack(losses[:count]).mean()), rel=1e-11)
    with pytest.raises(ConfigError, match="no temporal memory that could be carried"):
        plain = config.model_copy(update={"temporal": None})
        stream_corpus(build(plain), text, plain, Mesh())


# ----------------------------------------------------------------------------- padded and packed


def test_padding_changes_nothing() -> None:
    """Chunks that are padding leave memory and tokens as they were."""
    batch, config = make_batch(1, 12), small(temporal={**TEMPORAL, "backward_chunks": 2})
    model = build(config)
    alone = replace(batch, **{k: v[:, :6] for k, v in vars(batch).items()
                              if isinstance(v, Tensor) and v.ndim == 2})  # fmt: skip
    padded = packed(batch, [[0] * 6 + [-1] * 6])
    padded.positions_BS[:] = torch.arange(12)
    found = []
    for some in (alone, padded):
        x, memory = hidden(config, some, model)
        (x[:, :6].square().sum() + memory.sum()).backward()
        found.append((x[:, :6].detach(), memory.detach(), gradients(model)))
        model.zero_grad()
    tokens = model.embed(padded.tokens_BS, model.context(padded, step=0, training=False))
    assert torch.equal(hidden(config, padded, model)[0][:, 8:], tokens[:, 8:])
    torch.testing.assert_close(found[0], found[1], rtol=1e-11, atol=1e-11)


DOCUMENTS = [[0] * 3 + [1] * 6 + [2] * 2 + [3] * 5, [0] * 8 + [1] * 5 + [-1] * 3]


@pytest.mark.parametrize("causal", [True, False])
def test_nothing_leaks_from_document_to_document(causal: bool) -> None:
    """Within a chunk and through the memory; within a document everything later changes."""
    batch = packed(make_batch(2, 16), DOCUMENTS)
    config = small("loop", model={"causal": causal})
    model = build(config)
    before = hidden(config, batch, model)[0]
    for sample, documents in enumerate(DOCUMENTS):
        for place in (1, 4, 9):
            other = replace(batch, tokens_BS=batch.tokens_BS.clone())
            other.tokens_BS[sample, place] = (other.tokens_BS[sample, place] + 1) % 23
            changed = (hidden(config, other, model)[0] != before).any(-1)
            assert not changed[1 - sample].any()
            for i, document in enumerate(documents):
                same = document == documents[place]
                chunk = i // CHUNK - place // CHUNK
                expected = same and (i >= place if causal else chunk >= 0)
                assert bool(changed[sample, i]) == expected, (place, i)


def test_documents_that_begin_with_a_chunk_are_as_if_alone() -> None:
    batch, config = make_batch(1, 16), small()
    model = build(config)
    together = hidden(config, packed(batch, [[0] * 8 + [1] * 8]), model)[0]
    for start in (0, 8):
        own = Batch(
            batch.tokens_BS[:, start : start + 8], batch.labels_BS[:, :8], torch.arange(8)[None],
            torch.zeros(1, 8, dtype=torch.long), batch.sample_ids_B,
        )  # fmt: skip
        torch.testing.assert_close(
            together[:, start : start + 8], hidden(config, own, model)[0], rtol=1e-12, atol=1e-12
        )


# ------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize(("backward", "reached"), [(None, 0), (3, 4), (2, 8)])
def test_truncated_backward_ends_where_it_says(backward: int | None, reached: int) -> None:
    """The last chunk's loss reaches the tokens of so many chunks, the values stay the same."""
    config = small(temporal={**TEMPORAL, "backward_chunks": backward})
    model, batch = build(config), make_batch(1, 16)
    ctx = model.context(batch, step=0, training=False)
    embedded = model.embed(batch.tokens_BS, ctx).detach().requires_grad_()
    x, _ = model.run(build_map(config), embedded, ctx, {})
    x[:, 12:].square().sum().backward()
    assert embedded.grad is not None
    reaches = (embedded.grad != 0.0).any(-1)[0].tolist()
    assert reaches == [i >= reached for i in range(16)]
    whole = hidden(small(), batch, build(small()))[0]
    assert torch.equal(x, whole)


def test_recomputed_with_dropout_to_the_last_bit() -> None:
    """Slots and chunks have masks of their own, which recomputation finds again."""
    model = {"dropout": 0.2, "attention_dropout": 0.2}
    found = []
    for recompute in (False, True):
        config = small("loop", train={"recompute": recompute}, model=model)
        some = build(config)
        loss, _ = objective(some, build_map(config), make_batch(2, 12), training=True)
        loss.backward()
        found.append((loss, gradients(some)))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(g, found[1][1][name]) for name, g in found[0][1].items())


# ------------------------------------------------------------------------------ on meshes, trained


DROPOUT = {"dropout": 0.1, "attention_dropout": 0.1}
LONG = {"chunk_length": 4, "num_slots": 3, "updates": 2}
GUTLB: dict[str, Any] = {
    "model": {"gate": True, "positions": "xpos"},
    "recurrence": {"kind": "universal", "depth": 4, "halting": {"mode": "global"}},
}


@pytest.mark.parametrize(
    ("scheme", "tensor", "processes", "extra"),
    [
        ("loop", 2, 2, {"model": {"positions": "xpos", "norm": "layer", "attention_bias": "all",
                                  "feed_forward_bias": True, **DROPOUT}}),
        ("reuse_map", 1, 2, {"model": DROPOUT, "parallel": {"zero_stage": 3}}),
        later("cycle", 1, 2, {"model": DROPOUT, "data": {"mask_documents": False}}),
        later("loop", 1, 2, {"parallel": {"zero_stage": 1}, "train": {"recompute": True}}),
        later("loop", 2, 4, {"parallel": {"zero_stage": 3}, "train": {"recompute": True}}),
        later("cycle", 1, 1, {"train": {"recompute": True}, "adapters": {"rank": 2}}),
        *(later("dense", tensor, processes, {**GUTLB, "parallel": {"zero_stage": stage}})
          for tensor, processes, stage in ((2, 4, 0), (2, 2, 0), (1, 2, 1), (1, 2, 3))),
    ],
)  # fmt: skip
def test_ranks_equal_one_process(world, corpus, scheme, tensor, processes, extra) -> None:
    config = config_of(corpus, scheme, tensor, temporal=LONG, **extra)
    compare(world(processes).run(trace, config, 2)[0], reference(config, 2))


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
def test_one_graph_serves_all_chunks(corpus, masked) -> None:
    data = {"mask_documents": masked}
    config = config_of(corpus, "cycle", 1, model=DROPOUT, data=data, temporal=LONG)
    found, graphs = trace_compiled(config, 3)
    compare(found, reference(config, 3))
    assert graphs == 1


def test_a_resumed_run_is_the_same_to_the_last_bit(corpus: Path, tmp_path: Path) -> None:
    """Trained, interrupted, evaluated, with samples of text and the measures of its steps."""

    def config_in(name: str, steps: int) -> Config:
        config = config_of(
            corpus, "loop", 1, temporal={**LONG, "backward_chunks": 2}, model=DROPOUT,
            train={"steps": steps, "global_batch_size": 2, "sample_prompts": ("def",),
                   "sample_tokens": 6, "eval_samples": 2},
            checkpoint={"every": 1},
        )  # fmt: skip
        return config.model_copy(update={"run_dir": str(tmp_path / name)})

    assert train(config_in("whole", 2)) == FINISHED
    assert train(config_in("parts", 1)) == FINISHED
    assert train(config_in("parts", 2)) == FINISHED
    names = sorted(p.name for p in (tmp_path / "whole/checkpoints/step-00000002").glob("*.safe*"))
    assert names
    for name in names:
        whole, parts = (
            (tmp_path / run / "checkpoints/step-00000002" / name).read_bytes()
            for run in ("whole", "parts")
        )
        assert whole == parts, name
    rows = read_rows(tmp_path / "whole/metrics.jsonl")
    assert any("val/loss" in row for row in rows)
    assert any("recurrence/residual_norm/01.02" in row for row in rows)


# ------------------------------------------------------------------------------- costs and config


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("chunk_length", [16, 24])
def test_flops_are_those_of_the_model_and_linear_in_length(chunk_length: int) -> None:
    """Torch's own counter sees the products; 24 leaves a shorter last chunk."""
    temporal = {"chunk_length": chunk_length, "num_slots": 4, "updates": 2}
    shape = {"num_kv_heads": 2, "ffn_hidden_size": 64, "norm": "layer"}
    config = small(
        temporal=temporal, model=shape, data={"seq_length": 64, "mask_documents": False},
        train={"precision": "fp32"},
    )  # fmt: skip
    chunks = [chunk_length] * (64 // chunk_length) + [64 % chunk_length]
    pairs = sum(length**2 for length in chunks) / 64  # the counter sees those of no mask
    flops = count_flops(config, build_map(config), Seen(pairs, pairs))
    memory = estimate_memory(config, ())
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel is opaque to the counter
        forward, everything, _ = step_once(config)
    assert forward == pytest.approx(2 * 64 * flops.forward, rel=1e-4)
    # Nothing reads what the last chunk writes, so that its backward is not run.
    assert everything == pytest.approx(2 * 64 * flops.hardware, rel=3e-2)
    assert memory.mask == 0 and count_memory_flops(config) > 0
    twice = config.model_copy(update={"data": config.data.model_copy(update={"seq_length": 1536})})
    four = config.model_copy(update={"data": config.data.model_copy(update={"seq_length": 6144})})
    assert count_flops(twice, build_map(config)) == count_flops(four, build_map(config))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_memory_is_nearly_what_is_kept(recompute: str) -> None:
    config = small(
        temporal={"chunk_length": 32, "num_slots": 8}, data={"seq_length": 128},
        model={"hidden_size": 128, "ffn_hidden_size": 512},
        train={"precision": "fp32", "recompute": recompute},
    )  # fmt: skip
    _, _, kept = step_once(config)
    estimate = estimate_memory(config, build_map(config))
    logits = 2 * 128 * 23 * 4
    remade = 2 * 128 * count_remade_bytes(config, build_map(config))  # one step of one chunk
    assert estimate.activations - remade == pytest.approx(kept - logits, rel=0.1)


def test_parameters_are_those_of_the_formula_and_check_tells() -> None:
    """Reading: 4 d^2 and two norms a block; writing: 4 d^2 + 3 d f' and three norms a layer."""
    plain, temporal = small(temporal=None), small(temporal={**TEMPORAL, "updates": 2})
    d, blocks = 32, 3
    attention = 2 * d * d + 2 * d * d // 2  # two of the four key heads
    more = blocks * (attention + 2 * d) + 2 * (attention + 3 * d * d + 3 * d) + SLOTS * d
    assert count_parameters(temporal).total - count_parameters(plain).total == more
    console = make_console()
    with console.capture() as captured:
        console.print(describe(temporal))
    text = captured.get()
    assert "3 slots, carried over 8 chunks of 4 tokens, random at first, 2 updates each" in text
    assert "writing memory" in text and "temporal.update_ffn_hidden_size" in text


@pytest.mark.parametrize(
    ("temporal", "sections", "message"),
    [
        ({"num_slots": 0}, {}, "temporal.num_slots"),
        ({"chunk_length": 0}, {}, "temporal.chunk_length"),
        ({"chunk_length": 33}, {}, "chunk_length=33 is above data.seq_length=32"),
        ({"chunk_length": 5}, {"train": {"compile": True}}, "chunk_length=5 must divide data.seq_"),
        ({"backward_chunks": 1}, {}, "backward_chunks=1 cuts the memory off wherever it is read"),
        ({"backward_chunks": 1, "pooling": "mean"}, {}, "backward_chunks=1 cuts the memory off"),
        ({"backward_chunks": 9}, {}, "backward_chunks=9 is more than the 8 chunk"),
        ({"updates": 0}, {}, "temporal.updates"),
        ({"initial_memory": "ones"}, {}, "temporal.initial_memory"),
        ({}, {"parallel": {"pipeline": 2}}, "temporal memory across more than one pipeline stage"),
        ({}, {"parallel": {"tensor": 2, "sequence_parallel": True}}, "sequence_parallel=true with"),
        ({"update_ffn_hidden_size": 5}, {"parallel": {"tensor": 2}}, "does not divide temporal.up"),
        ({}, {"model": {"norm_position": "sandwich"}}, "norm_position=pre .it is sandwich"),
        ({}, {"model": {"attention_softcap": 2.0}}, "attention_softcap=2.0 with temporal memory"),
    ],
)
def test_what_cannot_be_is_refused(
    temporal: dict[str, Any], sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        small(temporal={**TEMPORAL, **temporal}, **sections)
