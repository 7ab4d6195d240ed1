"""Every backend of attention against the dense oracle: values and gradients, over drawn layouts.

Shapes: B samples, S positions, N query heads, M key heads, H head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from support.models import VOCABULARY, LargestTensor
from support.pairs import collate, make_pair_batch, pair_config
from support.pairs import run as run_pairs
from support.pictures import make_pictures, picture_config
from support.pictures import run as run_pictures
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch._subclasses.fake_tensor import FakeTensorMode

from megarecur.attention import flex, segments, varlen
from megarecur.attention.attend import attend
from megarecur.attention.documents import count_boundaries, from_lengths
from megarecur.attention.flex import key_ranges
from megarecur.attention.operation import _attend, run_backward, run_forward, unpack
from megarecur.attention.scores import Drop, Scores
from megarecur.attention.segments import Task
from megarecur.attention.visibility import Visibility, make_window, see_documents
from megarecur.model.context import see_source
from megarecur.model.transformer import Transformer
from megarecur.parallel.random import key_words

CPU = torch.device("cpu")
NO_EXPLAIN = (Phase.explicit, Phase.generate, Phase.shrink)


@dataclass(frozen=True)
class Layout:
    """A drawn micro batch."""

    documents_BS: Tensor
    heads: int
    key_heads: int
    head_dim: int
    causal: bool
    window: int
    slopes: bool
    softcap: float | None
    rate: float

    def oracle_mask(self, dtype: torch.dtype, slopes_N: Tensor | None) -> Tensor:
        """The mask of all pairs, from the definition."""
        documents = run_numbers(self.documents_BS)
        place = torch.arange(documents.shape[1])
        distance = place[:, None] - place[None]
        seen = (documents[:, :, None] == documents[:, None, :])[:, None]
        if self.causal:
            seen = seen & (distance >= 0)
            if self.window:
                seen = seen & (distance < self.window)
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, float("-inf"))
        if slopes_N is not None:
            mask = mask - slopes_N[:, None, None] * distance.abs()
        return mask.to(dtype)


def run_numbers(documents_BS: Tensor) -> Tensor:
    """Number runs of equal numbers; two runs of padding are not one document."""
    changes = torch.ones_like(documents_BS)
    changes[:, 1:] = (documents_BS[:, 1:] != documents_BS[:, :-1]).to(changes.dtype)
    return changes.cumsum(1)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    batch, length = draw(st.integers(1, 3)), draw(st.sampled_from([1, 7, 40, 150, 300]))
    most = draw(st.sampled_from([1, 5, 30, 140, 300]))
    rows = []
    for _ in range(batch):
        lengths = []
        while sum(lengths) < length:
            lengths.append(draw(st.integers(1, most)))
        numbers = np.repeat(np.arange(len(lengths)), lengths)[:length]
        padding = draw(st.integers(0, length // 2))
        if padding:
            numbers[length - padding :] = -1
        rows.append(numbers)
    key_heads, shared = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]))
    causal = draw(st.booleans())
    return Layout(
        torch.tensor(np.stack(rows)), key_heads * shared, key_heads,
        draw(st.sampled_from([4, 8])), causal,
        draw(st.sampled_from([0, 1, 3, 20, 200])) if causal else 0,
        draw(st.booleans()), draw(st.sampled_from([None, 2.0])),
        draw(st.sampled_from([0.0, 0.3])),
    )  # fmt: skip


def drawn_tensors(layout: Layout, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values and the gradient of the output, strided as halves of one product."""
    generator = torch.Generator().manual_seed(0)
    batch, length = layout.documents_BS.shape

    def make(heads: int) -> Tensor:
        whole = torch.randn(batch, length, 2 * heads, layout.head_dim, generator=generator)
        return whole.to(dtype)[:, :, :heads].requires_grad_()

    q, k, v = make(layout.heads), make(layout.key_heads), make(layout.key_heads)
    return q, k, v, make(layout.heads).detach()


def differentiate(
    layout: Layout, seen: Visibility, dtype: torch.dtype
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output and the gradients of queries, keys and values."""
    q, k, v, grad = drawn_tensors(layout, dtype)
    batch, length = layout.documents_BS.shape
    drop = None
    if layout.rate:
        samples, positions = torch.arange(batch)[:, None] + 7, torch.arange(length)[None] + 5
        drop = Drop(layout.rate, key_words(99, CPU), samples, positions, 3)
    out = attend((q, k, v), Scores(0.4, layout.softcap), seen, drop)
    return out.detach(), torch.autograd.grad(out, (q, k, v), grad)


def slopes_of(layout: Layout) -> Tensor | None:
    return torch.linspace(0.1, 0.7, layout.heads) if layout.slopes else None


def visible(layout: Layout, backend: str = "segments") -> Visibility:
    boundaries = count_boundaries(layout.documents_BS)
    return see_documents(
        boundaries, boundaries, backend, CPU, causal=layout.causal, window=layout.window,
        slopes_N=slopes_of(layout),
    )  # fmt: skip


def assert_equal(found: tuple, expected: tuple, tolerance: float) -> None:
    """Relative to a tensor's norm; gradients that cancel to nothing, to that of all gradients."""
    assert_close(found[0], expected[0], tolerance * expected[0].norm())
    total = torch.cat([gradient.flatten() for gradient in expected[1]]).norm()
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert_close(ours, theirs, tolerance * max(theirs.norm(), 0.3 * total))


def assert_close(found: Tensor, expected: Tensor, tolerance: Tensor) -> None:
    assert found.shape == expected.shape
    error = (found - expected).norm()
    assert error <= tolerance, f"{error:.2e} exceeds {tolerance:.2e}"


FP64 = torch.float64
TOLERANCE = {torch.float32: 2e-6, FP64: 1e-12}


@settings(max_examples=60, deadline=None, derandomize=True, phases=NO_EXPLAIN)
@given(layout=layouts(), dtype=st.sampled_from(list(TOLERANCE)))
def test_segments_equal_dense(layout: Layout, dtype: torch.dtype) -> None:
    expected = differentiate(
        layout, Visibility(mask=layout.oracle_mask(dtype, slopes_of(layout))), dtype
    )
    assert_equal(differentiate(layout, visible(layout), dtype), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("lengths", [[30], [17, 3, 20], [8, 122]])
def test_documents_at_the_end_of_a_sample(lengths: list[int], rate: float) -> None:
    """Causal documents are padded to common lengths, but there may be no token after them."""
    documents_BS = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    layout = Layout(documents_BS.repeat(2, 1), 4, 2, 8, True, 0, False, None, rate)
    expected = differentiate(layout, Visibility(mask=layout.oracle_mask(FP64, None)), FP64)
    assert_equal(differentiate(layout, visible(layout), FP64), expected, TOLERANCE[FP64])


@settings(max_examples=25, deadline=None, derandomize=True, phases=NO_EXPLAIN)
@given(layout=layouts())
def test_scores_in_pytorch_equal_dense(layout: Layout) -> None:
    """What GPUs run where no fused kernel serves; a CPU runs it if told to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments.Task, "is_fused", False)
        found = differentiate(layout, visible(layout), torch.float64)
    mask = layout.oracle_mask(torch.float64, slopes_of(layout))
    assert_equal(found, differentiate(layout, Visibility(mask=mask), torch.float64), 1e-12)


# ------------------------------------------------------------------------------------------- flex


def visible_pairs(seen: Visibility, shape: tuple[int, int, int]) -> Tensor:
    """The pairs [B, S, K] that a mask by blocks shows."""
    mask, (batch, length, num_keys) = seen.block_mask, shape
    rows, columns = torch.arange(length), torch.arange(num_keys)
    found = torch.zeros(batch, length, num_keys, dtype=torch.bool)
    for b in range(batch):
        for count_Q, order_QJ, whole in (
            (mask.kv_num_blocks[b, 0], mask.kv_indices[b, 0], False),
            (mask.full_kv_num_blocks[b, 0], mask.full_kv_indices[b, 0], True),
        ):
            for q, count in enumerate(count_Q.tolist()):
                for j in order_QJ[q, :count].tolist():
                    at = (rows // flex.BLOCK == q)[:, None] & (columns // flex.BLOCK == j)[None]
                    if not whole:
                        where = (torch.tensor(b), torch.tensor(0), rows[:, None], columns[None])
                        at = at & mask.mask_mod(*where)
                    assert not (found[b] & at).any(), "a block is visited twice"
                    found[b] |= at
    return found


@settings(max_examples=40, deadline=None, derandomize=True, phases=NO_EXPLAIN)
@given(layout=layouts())
def test_blocks_of_flex_show_what_dense_shows(layout: Layout) -> None:
    seen = visible(layout, "flex")
    expected = layout.oracle_mask(torch.float32, None)[:, 0] == 0.0
    batch, length = layout.documents_BS.shape
    assert torch.equal(visible_pairs(seen, (batch, length, length)), expected)
    low, high = key_ranges(seen.queries, seen.keys, layout.causal, layout.window)
    assert np.array_equal(high - low + 1, expected.sum(-1).numpy())


@settings(max_examples=12, deadline=None, derandomize=True, phases=NO_EXPLAIN)
@given(layout=layouts())
def test_flex_equals_dense(layout: Layout) -> None:
    """Uncompiled, on the CPU. Torch allows values only there; the gradient is its oracle's."""
    layout = replace(layout, rate=0.0)
    mask = layout.oracle_mask(torch.float64, slopes_of(layout))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "compiled_flex", lambda: flex.flex_attention)
        patch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *args: None)
        found = differentiate(layout, visible(layout, "flex"), torch.float64)
    assert_equal(found, differentiate(layout, Visibility(mask=mask), torch.float64), 1e-12)


# --------------------------------------------------------------------------- queries of other keys


@st.composite
def pairs(draw: st.DrawFn) -> list[list[tuple[int, int]]]:
    """(queries, keys) of each pair of documents of each sample, equally many in all."""
    batch, each = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    totals = draw(st.integers(3, 40)), draw(st.integers(3, 20))
    samples = []
    for _ in range(batch):
        cuts = []
        for total in totals:
            inner = sorted(draw(st.integers(0, total)) for _ in range(each - 1))
            cuts.append(np.diff([0, *inner, total]).tolist())
        samples.append(list(zip(*cuts, strict=True)))
    return samples


def see_pairs(samples: list[list[tuple[int, int]]], backend: str) -> Visibility:
    sides = []
    for side in (0, 1):
        lengths = np.array([[pair[side] for pair in sample] for sample in samples])
        total = int(lengths[0].sum())
        sides.append(from_lengths(lengths.ravel(), len(samples), total, lengths.shape[1]))
    return see_documents(*sides, backend, CPU)


@settings(max_examples=40, deadline=None, derandomize=True, phases=NO_EXPLAIN)
@given(samples=pairs(), shared=st.sampled_from([1, 2]), chosen=st.data())
def test_cross_attention_equals_dense(samples, shared, chosen) -> None:
    """A query without keys reads nothing; dense has no value for it."""
    seen = see_pairs(samples, "segments")
    kept = chosen.draw(st.lists(st.integers(0, len(samples) - 1), min_size=1, max_size=3))
    for rows in (None, kept):
        drawn = samples if rows is None else [samples[row] for row in rows]
        if rows is not None:
            seen = seen.select(torch.tensor(rows), len(samples))
        S, K = (sum(pair[side] for pair in drawn[0]) for side in (0, 1))
        allowed = torch.zeros(len(drawn), S, K, dtype=torch.bool)
        for b, sample in enumerate(drawn):
            ends = np.cumsum([(0, 0), *sample], 0)
            for (q0, k0), (q1, k1) in pairwise(ends):
                allowed[b, q0:q1, k0:k1] = True
        generator = torch.Generator().manual_seed(1)
        q, k, v, grad = (
            torch.randn(len(drawn), *shape, 4, generator=generator, dtype=torch.float64)
            for shape in ((S, 2 * shared), (K, 2), (K, 2), (S, 2 * shared))
        )
        reads = allowed.any(-1)
        mask = torch.zeros(allowed.shape, dtype=torch.float64)
        mask = mask.masked_fill(~allowed & reads[..., None], float("-inf"))[:, None]
        grad = grad * reads[..., None, None]
        results = []
        for view in (seen, Visibility(mask=mask)):
            leaves = [t.clone().requires_grad_() for t in (q, k, v)]
            out = attend(tuple(leaves), Scores(0.5), view, None)
            gradients = torch.autograd.grad(out, leaves, grad)
            results.append((out.detach() * reads[..., None, None], gradients))
        assert torch.equal(attend((q, k, v), Scores(0.5), seen, None)[~reads], q[~reads] * 0.0)
        assert_equal(*results, 1e-12)


# ------------------------------------------------------------------------------------ operation


def task_of(layout: Layout, **changes: Any) -> Task:
    cu = count_boundaries(layout.documents_BS).cu_seqlens
    fields = {"cu_q": cu, "cu_k": cu, "device_cu_q": cu, "device_cu_k": cu,
              "window": make_window(layout.window), "slopes_N": slopes_of(layout), "key": None,
              "samples_B1": None, "positions_1S": None, "causal": layout.causal, "scale": 0.3,
              "softcap": layout.softcap, "rate": 0.0, "first_head": 0}  # fmt: skip
    return Task(**fields | changes)


PACKED = Layout(
    torch.tensor([[0] * 9 + [1] * 20 + [2] * 11, [0] * 30 + [-1] * 10]), 4, 2, 8, True, 12, False,
    None, 0.0,
)  # fmt: skip


def test_the_operation_is_sound_in_graphs() -> None:
    """Schema, fake results, gradients and traced graphs agree with the operation itself."""
    q, k, v, _ = drawn_tensors(PACKED, torch.float64)
    torch.library.opcheck(_attend, (q, k, v, *unpack(task_of(PACKED)), "segments"))


def test_one_graph_serves_all_documents_and_windows() -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    compiled = torch.compile(attend, backend=count, fullgraph=True, dynamic=False)
    single = replace(PACKED, documents_BS=torch.zeros(2, 40, dtype=torch.int64))
    for layout in (PACKED, single, replace(PACKED, window=0), replace(single, window=0)):
        q, k, v, grad = drawn_tensors(layout, torch.float64)
        found = []
        for run in (compiled, attend):
            out = run((q, k, v), Scores(0.4), visible(layout), None)
            found.append((out.detach(), torch.autograd.grad(out, (q, k, v), grad)))
        assert_equal(*found, 1e-14)
    assert len(graphs) == 1


def test_varlen_makes_no_scores_under_fake_tensors(monkeypatch) -> None:
    """What the flash kernel takes and gives on CUDA, as far as torch tells without a GPU. A fake
    mode hides the numbers in tensors of the CPU, so they are read before."""
    S, B = 2048, 2
    lengths = np.tile([200] * 10 + [48], B)
    host = from_lengths(lengths, B, S)
    for window in (0, 64):
        monkeypatch.setattr(segments.Task, "window_size", window)
        kept = make_window(window)  # Kept for later tests, which could not read a fake one.
        with FakeTensorMode(allow_non_fake_inputs=True), LargestTensor() as seen:
            device = torch.empty(len(lengths) + 1, dtype=torch.int32, device="cuda")
            monkeypatch.setattr(varlen, "arguments", lambda task, d=device: (d, d, 200, 200))
            monkeypatch.setattr(varlen, "end_of_keys", lambda task: B * S)
            task = Task(
                host.cu_seqlens, host.cu_seqlens, device, device, kept, None, None,
                None, None, True, 0.1, None, 0.0, 0,
            )  # fmt: skip
            q = torch.empty(B, S, 8, 64, device="cuda", dtype=torch.bfloat16)
            k, v = (torch.empty(B, S, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in "kv")
            out, lse = run_forward(q, k, v, task, "varlen")
            gradients = run_backward(out, q, k, v, out, lse, task, "varlen")
        assert out.shape == q.shape and lse.shape == (8, B * S) and out.device.type == "cuda"
        assert [g.shape for g in gradients] == [q.shape, k.shape, v.shape]
        assert 0 < seen.elements < S * S


# ------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize(
    "changes",
    [{}, {"window": 100}, {"slopes": True}, {"softcap": 2.0}, {"rate": 0.2}, {"causal": False},
     {"causal": False, "softcap": 2.0}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("packed", [True, False])
def test_no_tensor_has_a_score_of_all_pairs(changes: dict[str, Any], packed: bool) -> None:
    S = 1280  # S x S elements are more than those of a block of scores.
    numbers = torch.arange(S) // 200 if packed else torch.zeros(S, dtype=torch.int64)
    layout = Layout(numbers.expand(2, S), 4, 2, 8, **{"causal": True, "window": 0, "slopes": False,
                    "softcap": None, "rate": 0.0, **changes})  # fmt: skip
    with LargestTensor() as seen:
        differentiate(layout, visible(layout), torch.float32)
    assert 0 < seen.elements < S * S
    if changes:
        return
    with LargestTensor() as seen:
        differentiate(
            layout, Visibility(mask=layout.oracle_mask(torch.float32, None)), torch.float32
        )
    assert seen.elements >= S * S


@pytest.mark.parametrize("attention", ["auto", "dense"])
def test_no_encoder_decoder_has_a_score_of_all_pairs(attention: str) -> None:
    """Of long sentences of unequal lengths: both stacks, and the decoder's look at the encoder."""
    S, whole = 384, torch.arange(385) % VOCABULARY
    layers = {"kind": "dense", "num_layers": 1}
    config = pair_config(layers, layers, "fp32", train={"attention": attention},
                         model={"max_positions": S})  # fmt: skip
    batch = collate([whole[:S], whole[:200]], [whole[:150], whole])
    with LargestTensor() as seen:
        run_pairs(Transformer(config), batch, training=True)
    assert (seen.elements >= S * S) == (attention == "dense")


def test_no_model_of_pictures_has_a_score_of_all_pairs() -> None:
    config = picture_config(
        {"kind": "dense", "num_layers": 1}, "fp32", task={"image_size": 32}, model={"dropout": 0.1}
    )
    S = config.num_positions
    with LargestTensor() as seen:
        run_pictures(Transformer(config), make_pictures(config, 1), training=True)
    assert 0 < seen.elements < S * S


def test_varlen_knows_where_the_keys_that_it_reads_end() -> None:
    """Rows of padding behind the last source sentence have no queries: their gradient is zero."""
    batch = make_pair_batch(4)
    assert batch.source is not None
    seen = see_source(batch.source, tuple(batch.tokens_BS.shape), "varlen", torch.float32)
    assert seen.queries is not None and seen.keys is not None
    task = Task(
        seen.queries.cu_seqlens, seen.keys.cu_seqlens, seen.queries.on_device, seen.keys.on_device,
        make_window(0), None, None, None, None, False, 1.0, None, 0.0, 0,
    )  # fmt: skip
    rows, span = batch.source.tokens_BS.shape
    real = int((batch.source.documents_BS[-1] >= 0).sum())
    assert real < span and varlen.end_of_keys(task) == (rows - 1) * span + real


@pytest.mark.parametrize(("key_heads", "shared"), [(2, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("causal", [False, True])
def test_dropout_of_whole_samples_is_one_group(
    key_heads: int, shared: int, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples of one document each, such as pictures, are attended to together under dropout too,
    with the masks of the oracle; other documents one by one."""
    groups: list[int] = []
    find = segments.find_layout

    def count(task: Task, device: torch.device) -> segments.Layout:
        found = find(task, device)
        groups.append(len(found.gathered) + len(found.in_place))
        return found

    monkeypatch.setattr(segments, "find_layout", count)
    whole = torch.zeros(3, 17, dtype=torch.long)
    parted = whole.clone()
    parted[1, 9:] = 1
    for documents, expected in ((whole, 1), (parted, 4)):
        layout = Layout(documents, key_heads * shared, key_heads, 8, causal, 0, False, None, 0.3)
        found = differentiate(layout, visible(layout), torch.float64)
        mask = layout.oracle_mask(torch.float64, None)
        assert_equal(found, differentiate(layout, Visibility(mask=mask), torch.float64), 1e-12)
        assert set(groups) == {expected}
        groups.clear()
