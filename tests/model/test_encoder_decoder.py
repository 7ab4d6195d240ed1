"""Encoder-decoders: two stacks in one layer map.

Compared with torch's own Transformer, with an untied twin, with another backend of attention, and
with the same sentences in other batches.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.engines import aot_eager
from support.harness import assert_gradients_close
from support.models import LiveStorages, assert_same, build
from support.pairs import (
    DENSE,
    collate,
    make_pair_batch,
    make_pairs,
    pair_config,
    rows_of,
    run,
    with_section,
)
from torch import Tensor, nn

from megarecur.config.run import Config
from megarecur.data.loader import MicroBatch
from megarecur.inference.cache import Cache, context_after
from megarecur.inference.decoder import TranslationDecoder
from megarecur.model.adapters import ResidualScale
from megarecur.model.compile import CompiledModel
from megarecur.model.transformer import Transformer
from megarecur.parallel.mesh import Mesh
from megarecur.plan.cost import count_kept_bytes, count_parameters
from megarecur.recurrence.depth import Depth, count_depths, draw_depth
from megarecur.recurrence.layer_map import Step
from megarecur.recurrence.schemes import build_map
from megarecur.train.scales import profile_scales

CYCLE = {"kind": "cycle", "num_blocks": 2, "depth": 4}
RING = {"kind": "ring", "depth": 3, "level_rank": 3, "feed_forward_rank": 2}
UNIVERSAL = {"kind": "universal", "depth": 3, "halting": {"mode": "token"}}
GLOBAL = {"kind": "universal", "depth": 3, "halting": {"mode": "global"}}
LOOP = {"kind": "loop", "prelude": 1, "core": 1, "coda": 1, "num_loops": 2}
SAMPLED = {**LOOP, "num_loops": {"sampler": "uniform", "min": 1, "max": 3}}
REUSE = {"kind": "reuse_map", "reuse_map": [2, 1], "injection": "add"}
BLOCKS = {"kind": "block_recurrence", "num_blocks": 2, "num_loops": 2}
POST = {"norm_position": "post"}

MIXED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "cycle below ring": (CYCLE, RING, POST),
    "ring below cycle": (RING, CYCLE, {}),
    "dense below sampled loop": (DENSE, SAMPLED, {}),
    "sampled loop below sampled loop": (SAMPLED, SAMPLED, {"norm_position": "sandwich"}),
    "universal with halting below dense": (UNIVERSAL, DENSE, {}),
    "global halting below token halting": (GLOBAL, UNIVERSAL, {}),
    "reuse map below block recurrence": (REUSE, BLOCKS, {"positions": "learned"}),
    "loop below reuse map": (LOOP, REUSE, {"norm_position": "peri", "qk_norm": True}),
    "cycle below cycle with Admin": (CYCLE, CYCLE, {**POST, "residual": "admin"}),
    "grouped queries, one table each": (
        DENSE, CYCLE, {"num_kv_heads": 2, "tie": "none", "norm_position": "output"},
    ),
    "tied to the head only": (CYCLE, DENSE, {"tie": "decoder", "positions": "sinusoidal"}),
    "alibi": (CYCLE, DENSE, {"positions": "alibi"}),
    "shared feed-forward": (DENSE, DENSE, {"shared_feed_forward": True}),
}  # fmt: skip


def mixed(name: str, **sections: Any) -> Config:
    encoder, recurrence, model = MIXED[name]
    return pair_config(encoder, recurrence, model=model | sections.pop("model", {}), **sections)


def test_the_map_joins_two_stacks() -> None:
    steps = build_map(pair_config({**LOOP, "num_loops": 1}, CYCLE))
    assert [(s.stack[0], s.block, s.loop_index) for s in steps] == [
        ("e", 0, 0), ("e", 1, 0), ("e", 2, 0),
        ("d", 3, 0), ("d", 4, 0), ("d", 3, 1), ("d", 4, 1),
    ]  # fmt: skip
    assert steps[0].writes == ("target",)
    assert steps[1].writes == steps[1].reads == ("encoder.prelude",)
    assert steps[3] == Step(3, 0, reads=("target", "encoder"), writes=("encoder",))
    assert all(s.reads == ("encoder",) for s in steps[4:])


def test_depths_of_both_stacks_are_drawn() -> None:
    config = mixed("sampled loop below sampled loop", train={"steps": 200})
    depths = count_depths(config)
    assert {(d.num_loops, d.encoder_loops) for d in depths if d} == {
        (a, b) for a in (1, 2, 3) for b in (1, 2, 3)
    }
    own = pair_config(DENSE, SAMPLED)
    assert draw_depth(own, 7) == Depth(*draw_depth(config, 7)[:2])
    steps = build_map(config, Depth(2, 2, 3, 3))
    assert [s.stack for s in steps] == ["encoder"] * 5 + ["decoder"] * 4


# --------------------------------------------------------------------------------- torch's own


def copy_attention(name: str, own: nn.MultiheadAttention, model: Transformer) -> None:
    given = model.parameters_by_name
    for kind, into in (("weight", own.in_proj_weight), ("bias", own.in_proj_bias)):
        parts = [given[f"{name}.{part}.{kind}"] for part in ("query", "key", "value")]
        into.data.copy_(torch.cat([part.data for part in parts]))
        getattr(own.out_proj, kind).data.copy_(given[f"{name}.output.{kind}"].data)


def copy_layer(block: int, layer: Any, model: Transformer) -> None:
    given, prefix = model.parameters_by_name, f"blocks.{block}"
    copy_attention(f"{prefix}.attention", layer.self_attn, model)
    norms = ["attention_norm", "feed_forward_norm"]
    if hasattr(layer, "multihead_attn"):
        copy_attention(f"{prefix}.cross_attention", layer.multihead_attn, model)
        norms.insert(1, "cross_attention_norm")
    modules = {"feed_forward.up": layer.linear1, "feed_forward.down": layer.linear2}
    modules |= {name: getattr(layer, f"norm{i}") for i, name in enumerate(norms, 1)}
    for name, module in modules.items():
        for kind in ("weight", "bias"):
            getattr(module, kind).data.copy_(given[f"{prefix}.{name}.{kind}"].data)


@pytest.mark.parametrize(("norm_position", "activation"), [("pre", "gelu"), ("post", "relu")])
def test_a_plain_model_is_torchs_transformer(norm_position: str, activation: str) -> None:
    config = pair_config(DENSE, {"kind": "dense", "num_layers": 3}, model={
        "norm_position": norm_position, "feed_forward": activation, "attention_bias": "all",
        "feed_forward_bias": True, "positions": "learned", "tie": "none",
    })  # fmt: skip
    model, batch = build(config), make_pair_batch(4)
    loss, logits, found = run(model, batch)
    shape = config.model
    args = (shape.hidden_size, shape.num_heads, shape.ffn_hidden_size, 0.0, activation)
    options = {"batch_first": True, "norm_first": norm_position == "pre", "dtype": torch.float64}
    encoder = [nn.TransformerEncoderLayer(*args, **options) for _ in range(2)]
    decoder = [nn.TransformerDecoderLayer(*args, **options) for _ in range(3)]
    for block, layer in enumerate((*encoder, *decoder)):
        copy_layer(block, layer, model)
    given, source = model.parameters_by_name, batch.source
    assert source is not None

    def embed(prefix: str, tokens_BS: Tensor) -> Tensor:
        positions = given[f"{prefix}.positions"][: tokens_BS.shape[1]]
        return given[f"{prefix}.weight"][tokens_BS] + positions

    def norm(x: Tensor, name: str) -> Tensor:
        if norm_position == "post":
            return x
        return nn.functional.layer_norm(
            x, x.shape[-1:], given[f"{name}.weight"], given[f"{name}.bias"]
        )

    x, padding = embed("source_embedding", source.tokens_BS), source.documents_BS < 0
    for layer in encoder:
        x = layer(x, src_key_padding_mask=padding)
    memory, y = norm(x, "encoder_norm"), embed("embedding", batch.tokens_BS)
    length = y.shape[1]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    for layer in decoder:
        y = layer(y, memory, tgt_mask=future, tgt_is_causal=True, memory_key_padding_mask=padding)
    theirs = norm(y, "final_norm") @ given["head.weight"].T
    real = batch.documents_BS >= 0
    torch.testing.assert_close(logits[real], theirs.detach()[real], rtol=1e-10, atol=1e-10)
    expected = nn.functional.cross_entropy(
        theirs.flatten(0, 1), batch.labels_BS.flatten(), reduction="sum"
    )
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    model.zero_grad()
    expected.backward()
    names = [name for name in found if not name.startswith("blocks.")]
    outer = {name: given[name].grad for name in names}
    assert_gradients_close({n: found[n] for n in names}, outer, 1e-11)
    for block, layer in enumerate((*encoder, *decoder)):
        gradient = layer.linear1.weight.grad
        torch.testing.assert_close(
            found[f"blocks.{block}.feed_forward.up.weight"], gradient, rtol=1e-9, atol=1e-11
        )
        if block >= 2:
            three = layer.multihead_attn.in_proj_weight.grad.chunk(3)
            for part, of_part in zip(("query", "key", "value"), three, strict=True):
                ours = found[f"blocks.{block}.cross_attention.{part}.weight"]
                torch.testing.assert_close(ours, of_part, rtol=1e-9, atol=1e-11)


# ------------------------------------------------------------------------------------ the stacks


@pytest.mark.parametrize("name", MIXED)
def test_every_scheme_works_in_both_stacks(name: str) -> None:
    """Every parameter has a gradient, and the backends agree with the mask of all pairs."""
    config = mixed(name, model={"dropout": 0.1})
    model, batch = build(config), make_pair_batch()
    found = run(model, batch, training=True)
    # The other factor of a signal starts at zero.
    unused = [n for n, g in found[2].items() if not g.any() and not n.endswith(".b")]
    assert not unused
    dense = Transformer(with_section(config, "train", attention="dense"))
    dense.load_state_dict(model.state_dict())
    expected = run(dense, batch, training=True)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=0)
    assert_gradients_close(found[2], expected[2], 1e-11)


@pytest.mark.parametrize("name", MIXED)
def test_a_sentence_does_not_depend_on_its_batch(name: str) -> None:
    config = mixed(name)
    model = build(config)
    sources, targets = make_pairs(4)
    together, logits, gradients = run(model, collate(sources, targets))
    alone = torch.zeros((), dtype=torch.float64)
    total: dict[str, Tensor] = {}
    for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
        loss, own, found = run(model, collate([source], [target], first=i))
        torch.testing.assert_close(own[0], logits[i, : own.shape[1]], rtol=1e-10, atol=1e-10)
        alone += loss
        total = {n: g + total.get(n, 0.0) for n, g in found.items()}
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=0)
    assert_gradients_close(gradients, total, 1e-11)


def test_a_shared_block_sums_the_gradients_of_an_untied_twin() -> None:
    shared = build(pair_config(CYCLE, CYCLE))
    twin = build(
        pair_config({"kind": "dense", "num_layers": 4}, {"kind": "dense", "num_layers": 4})
    )
    order = {0: 0, 1: 1, 2: 0, 3: 1, 4: 2, 5: 3, 6: 2, 7: 3}
    given = shared.parameters_by_name
    for name, parameter in twin.parameters_by_name.items():
        prefix, _, rest = name.partition(".")
        if prefix == "blocks":
            block, _, rest = rest.partition(".")
            name = f"blocks.{order[int(block)]}.{rest}"
        parameter.data.copy_(given[name].data)
    batch = make_pair_batch()
    loss, logits, found = run(shared, batch)
    expected_loss, expected_logits, untied = run(twin, batch)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-12, atol=1e-12)
    total: dict[str, Tensor] = {}
    for name, gradient in untied.items():
        prefix, _, rest = name.partition(".")
        if prefix == "blocks":
            block, _, rest = rest.partition(".")
            name = f"blocks.{order[int(block)]}.{rest}"
        total[name] = total[name] + gradient if name in total else gradient
    assert_gradients_close(found, total, 1e-11)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("policy", ["full", "selective", {"loops": [1]}])
def test_recompute_changes_no_bit(policy: Any) -> None:
    config = mixed("cycle below ring", model={"dropout": 0.2, "attention_dropout": 0.1})
    model, batch = build(config), make_pair_batch()
    expected = run(model, batch, training=True)
    again = pair_config(CYCLE, RING, train={"recompute": policy}, model={
        **POST, "dropout": 0.2, "attention_dropout": 0.1,
    })  # fmt: skip
    twin = Transformer(again)
    twin.load_state_dict(model.state_dict())
    assert_same(run(twin, batch, training=True), expected)


def test_a_target_does_not_see_padding_of_its_source() -> None:
    model, batch = build(pair_config(DENSE, DENSE)), make_pair_batch()
    assert batch.source is not None and not batch.source.single_document
    expected = run(model, batch)
    changed = batch.source.tokens_BS.clone()
    changed[batch.source.documents_BS < 0] = 3
    assert not torch.equal(changed, batch.source.tokens_BS)
    other = replace(batch, source=replace(batch.source, tokens_BS=changed))
    assert torch.equal(run(model, other)[0], expected[0])


def test_the_encoder_sees_later_tokens_and_the_decoder_does_not() -> None:
    model = build(pair_config(DENSE, DENSE))
    (source,), (target,) = make_pairs(1, seed=3)
    _, logits, _ = run(model, collate([source], [target]))
    changed = source.clone()
    changed[-1] += 1
    assert not torch.allclose(run(model, collate([changed], [target]))[1][:, 0], logits[:, 0])
    changed = target.clone()
    changed[-2] = (changed[-2] + 1) % 7
    other = run(model, collate([source], [changed]))[1]
    torch.testing.assert_close(other[:, :-1], logits[:, :-1], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(other[:, -1], logits[:, -1])


# ------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize(("hidden", "published"), [(512, 8_943_616), (1024, 35_713_024)])
def test_sizes_of_ringformer_are_published_ones(hidden: int, published: int) -> None:
    ring = {"kind": "ring", "depth": 6, "level_rank": hidden // 16,
            "feed_forward_rank": hidden // 16}  # fmt: skip
    config = pair_config(ring, ring, model={
        "hidden_size": hidden, "num_heads": 8, "ffn_hidden_size": 4 * hidden, "norm": "layer",
        "norm_position": "post", "feed_forward": "gelu", "positions": "sinusoidal", "tie": "none",
    })  # fmt: skip
    assert count_parameters(config).non_embedding == published


# ------------------------------------------------------------------------------------ generation


@pytest.mark.parametrize("name", MIXED)
def test_cached_decoding_is_the_whole_pass(name: str) -> None:
    """Token by token, with rows reordered halfway, as beams are."""
    config = mixed(name)
    if config.halting is not None:
        pytest.skip("a decoder that halts keeps no cache")
    model, steps = build(config), build_map(config)
    sources, targets = make_pairs(3, seed=5, longest=8)
    targets = [torch.cat([t, t, t])[:7] for t in targets]
    batch = collate(sources, targets)
    source = batch.source
    assert source is not None
    ctx, reads = model.context(batch, 0, training=False), dict[str, Tensor]()
    x = model.enter(batch.tokens_BS, ctx, reads, source)
    whole, _ = model.run(steps, x, ctx, reads)
    encoded, cache, order = model.encode(steps, source), Cache(), torch.arange(3)
    for position in range(6):
        if position == 3:
            order = torch.tensor([2, 0, 0, 1])
            cache.select(order)
            encoded, source = encoded[order], rows_of(batch, order.tolist()).source
            assert source is not None
        tokens = batch.tokens_BS[order, position : position + 1]
        ctx = context_after(model, tokens, cache, source=source)
        x = model.decode(steps, tokens, encoded, ctx)
        cache.advance(1)
        expected = whole[order, position : position + 1]
        torch.testing.assert_close(x, expected, rtol=1e-10, atol=1e-10)
    made = {(step.block, step.loop_index) for step in steps if step.stack == "decoder"}
    assert set(cache.of_source) == set(cache.entries) == made


POLICIES: list[Any] = ["none", "full", "selective"]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("model", [{}, {**POST, "residual": "admin", "dropout": 0.1}])
def test_kept_bytes_are_what_check_says(model: dict[str, Any], policy: Any) -> None:
    """Of sentences of one length, as `check` assumes them."""
    shape = {"hidden_size": 128, "ffn_hidden_size": 256, "max_positions": 64}
    train = {"micro_batch_size": 4, "recompute": policy}
    config = pair_config(CYCLE, CYCLE, "fp32", model=shape | model, train=train)
    config = with_section(config, "data", seq_length=64)
    sentences = [torch.arange(65) % 7 for _ in range(4)]
    batch = collate([row[:64] for row in sentences], sentences)
    built, steps = Transformer(config), build_map(config)
    ctx, reads = built.context(batch, 0, training=True), dict[str, Tensor]()
    known = [*built.parameters(), *(weight.value() for weight in built.weights())]
    with LiveStorages(known) as live:
        x = built.enter(batch.tokens_BS, ctx, reads, batch.source)
        x, _ = built.run(steps, x, ctx, reads)
    assert x.grad_fn is not None
    expected = 4 * 64 * count_kept_bytes(config, steps)
    assert expected * 0.9 < live.count_bytes() < expected * 1.1


# ----------------------------------------------------------------------------------------- Admin


class FirstPairs:
    """A loader of a run's first samples."""

    def first_samples(self, count: int) -> MicroBatch:
        return make_pair_batch(count)


def test_admin_scales_of_each_stack_begin_with_one() -> None:
    """Two scales per use of an encoder's block, three per use of a decoder's, by the recursion."""
    config = mixed("cycle below cycle with Admin")
    model = Transformer(config)
    profile_scales(model, config, FirstPairs(), Mesh())  # type: ignore[arg-type]
    inputs: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {"encoder": [], "decoder": []}
    count = min(config.train.global_batch_size, 4096 // config.data.seq_length)
    batch = make_pair_batch(count)
    assert batch.source is not None
    real = {"encoder": batch.source.documents_BS >= 0, "decoder": batch.documents_BS >= 0}
    for name, runner in (("encoder", model.encoder), ("decoder", model.runner)):
        assert runner is not None
        for scale in (m for m in runner.modules() if isinstance(m, ResidualScale)):
            scale.register_forward_pre_hook(
                lambda scale, given, kept=inputs[name]: kept.append((scale.weight.data, *given))
            )
    run(model, batch)
    assert [len(inputs[name]) for name in inputs] == [2 * 4, 3 * 4]
    for name, seen in inputs.items():
        ratio = 1.0
        for weight, x, branch in seen:
            torch.testing.assert_close(weight, torch.full_like(weight, ratio))
            kept = real[name]
            of_x, of_branch = ((t[kept].var(correction=0)) for t in (x * weight, branch))
            ratio = float((of_x + of_branch).sqrt().detach())
    named = [n for n in model.inventory if "_residual" in n]
    assert len(named) == 2 * 4 + 3 * 4


def test_a_random_initial_state_does_not_depend_on_the_beam() -> None:
    """Of the encoder's core and of the decoder's: one state for all hypotheses and batches."""
    random = {**LOOP, "initial_state": "random"}
    model = build(pair_config(random, random))
    steps = build_map(model.config)
    (source, other), _ = make_pairs(2, seed=4)

    def read(sources: list[Tensor]) -> Tensor:
        given = collate(sources, [torch.arange(3)] * len(sources)).source
        assert given is not None
        decoder = TranslationDecoder(model, steps, given)
        rows = torch.arange(len(sources))
        first = decoder.advance(torch.ones(len(sources), dtype=torch.long), rows)
        assert first.shape[0] == len(sources)
        return decoder.advance(torch.full((len(sources),), 2), rows.flip(0)).flip(0)

    alone, together = read([source]), read([other, source, source])
    torch.testing.assert_close(together[1], together[2], rtol=1e-10, atol=1e-10)
    assert alone.isfinite().all()


def test_few_graphs_of_the_loss_serve_every_length() -> None:
    """Tokens that count differ in number from batch to batch, and each would need a graph."""
    config = pair_config(DENSE, DENSE, "fp64")
    compiled_model, eager_model = Transformer(config), Transformer(config)
    compiled = CompiledModel(compiled_model, aot_eager)
    sizes = set()
    for seed in range(5):
        batch = make_pair_batch(3, seed)
        sizes.add(batch.tokens_BS.shape[1])
        loss, _, found = run(compiled_model, batch, training=True)
        wanted_loss, _, wanted = run(eager_model, batch, training=True)
        torch.testing.assert_close(loss, wanted_loss)
        assert_gradients_close(found, wanted, 1e-11)
    assert len(sizes) > 2
    assert [part.graphs <= 2 for part in compiled.loss] == [True, True]
