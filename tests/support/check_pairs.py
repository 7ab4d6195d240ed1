"""What exports of encoder-decoders must do with any transformers; see `check_exports.py`.

Needs transformers and torch; nothing of this project but the modelling file in the folder.
"""

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

Load = Callable[..., Any]


def assert_equal(found: Tensor, wanted: Tensor) -> None:
    """Up to the rounding of sums in another order, which large random weights amplify."""
    scale = max(1.0, float(wanted.abs().max()))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * scale)


def check_pairs(case: dict[str, Any], load: Load, tools: bool = True) -> None:
    """All of one export: tokens, logits, loss, caches, searches; tools: saving, training too."""
    from transformers import AutoTokenizer  # Seconds, which workers without exports save.

    model, tokenizer = load(case["folder"]), AutoTokenizer.from_pretrained(case["folder"])
    batch = tokenizer(case["lines"], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    for row, mask, ids in zip(*batch.values(), case["sources"], strict=True):
        assert row[mask.bool()].tolist() == ids and mask[0] == 1, "padding is on the right"
    logits, labels = check_forward(case, model, tokenizer, batch)
    check_caches(case, model, batch, logits)
    for found in case["searches"]:
        check_search(model, tokenizer, batch, found, case["most"])
    plain = next(found for found in case["searches"] if found["beam"] > 1)
    check_search(model, tokenizer, batch, plain, case["most"], use_cache=False)
    check_single(model, tokenizer, case, plain)
    # Without arguments; texts are long enough for rounding to decide between equal hypotheses.
    default = model.generate(**batch, return_dict_in_generate=True, output_scores=True)
    scores = torch.tensor(case["default"]["scores"])
    torch.testing.assert_close(default.sequences_scores, scores, rtol=1e-3, atol=1e-3)
    longest = max(len(ids) for ids in case["default"]["ids"])
    assert default.sequences.shape[1] == longest + 2, "start and end token"
    if tools:
        check_gradients(case, load, batch, labels)
        check_saved(model, load, batch, labels)


def check_forward(
    case: dict[str, Any], model: Any, tokenizer: Any, batch: Any
) -> tuple[Tensor, Tensor]:
    """The run's logits and loss, padded on either side, from encoder outputs, by attention
    backends; returns logits and labels."""
    wanted, length = load_file(case["expected"]), max(map(len, case["targets"])) - 1
    labels = torch.tensor([row[1:] + [-100] * (length + 1 - len(row)) for row in case["targets"]])
    real = labels != -100
    inputs = model.prepare_decoder_input_ids_from_labels(labels)
    for row, own, ids in zip(inputs, real, case["targets"], strict=True):
        assert row[own].tolist() == ids[:-1]
    with torch.no_grad():
        output = model(**batch, labels=labels)
        assert_equal(output.logits[real], wanted["logits"][real])
        assert_equal(output.loss[None], wanted["loss"])
        encoded = model.get_encoder()(**batch)
        again = model(
            attention_mask=batch["attention_mask"], encoder_outputs=encoded,
            decoder_input_ids=inputs, use_cache=False, return_dict=False,
        )  # fmt: skip
        assert_equal(again[0][real], wanted["logits"][real])
        left = tokenizer(case["lines"], padding=True, padding_side="left", return_tensors="pt")
        assert left["attention_mask"].sum() == batch["attention_mask"].sum()
        assert not left["attention_mask"].equal(batch["attention_mask"])
        found = model(**left, decoder_input_ids=inputs, output_attentions=True,
                      output_hidden_states=True)  # fmt: skip
        assert_equal(found.logits[real], wanted["logits"][real])
    depth = model.config.num_hidden_layers
    assert len(found.decoder_attentions) == len(found.cross_attentions) == depth
    assert len(found.decoder_hidden_states) == depth + 1
    assert len(found.encoder_attentions) == len(model.config.encoder["layer_map"])
    seen = found.cross_attentions[-1].sum(1)[:, 0] > 0
    assert seen.equal(left["attention_mask"].bool()), "padding of sources is attended to"
    try:
        model(**batch, labels=labels, kache=None)
    except TypeError as error:
        assert "kache" in str(error), error
    else:
        raise AssertionError("an unknown argument is accepted")
    return output.logits, labels


def check_caches(case: dict[str, Any], model: Any, batch: Any, logits: Tensor) -> None:
    """Piece by piece: the same logits, with keys and values of the source once per block."""
    longest = max(case["targets"], key=len)[:-1]
    row = case["targets"].index([*longest, case["targets"][0][-1]])
    one = {name: value[row : row + 1] for name, value in batch.items()}
    ids, found, cache = torch.tensor([longest]), [], None
    with torch.no_grad():
        encoded = model.get_encoder()(**one)
        for piece in (ids[:, :1], ids[:, 1:3], ids[:, 3:]):
            out = model(
                attention_mask=one["attention_mask"], encoder_outputs=encoded,
                decoder_input_ids=piece, past_key_values=cache, use_cache=True,
            )  # fmt: skip
            cache = out.past_key_values
            found.append(out.logits[0])
            encoded = (torch.full_like(encoded[0], torch.nan),)  # It is read once.
    assert_equal(torch.cat(found), logits[row, : len(longest)])
    kept = [number for number, is_kept in cache.is_updated.items() if is_kept]
    assert sorted(kept) == list(range(case["blocks"])), cache.is_updated
    assert cache.get_seq_length() == len(longest)


def cut(model: Any, row: Tensor) -> list[int]:
    """New ids up to the end token."""
    ids = row.tolist()
    assert ids[0] == model.generation_config.decoder_start_token_id
    end = model.generation_config.eos_token_id
    return ids[1 : ids.index(end, 1)]


def options_of(found: dict[str, Any], most: int) -> dict[str, Any]:
    """Options of `generate` for a search."""
    options = {"num_beams": found["beam"], "max_new_tokens": most, "do_sample": False}
    if found["beam"] > 1:
        options["length_penalty"] = found.get("alpha", 1.0)
    return options | ({"num_loops": found["loops"]} if "loops" in found else {})


def check_search(
    model: Any, tokenizer: Any, batch: Any, found: dict[str, Any], most: int, use_cache: bool = True
) -> None:
    """A search over a batch: the run's ids, texts and scores."""
    output = model.generate(
        **batch, **options_of(found, most), use_cache=use_cache, return_dict_in_generate=True,
        output_scores=True,
    )  # fmt: skip
    ids = [cut(model, row) for row in output.sequences]
    assert ids == found["ids"], (options_of(found, most), use_cache)
    if found["beam"] > 1:
        torch.testing.assert_close(
            output.sequences_scores, torch.tensor(found["scores"]), rtol=1e-3, atol=1e-3
        )
    texts = tokenizer.batch_decode(output.sequences, skip_special_tokens=True)
    assert texts == found["texts"]


def check_single(model: Any, tokenizer: Any, case: dict[str, Any], found: dict[str, Any]) -> None:
    """A sentence by itself: what it is in a batch."""
    options = options_of(found, case["most"])
    for line, ids in list(zip(case["lines"], found["ids"], strict=True))[:3]:
        single = tokenizer([line], return_tensors="pt")
        assert cut(model, model.generate(**single, **options)[0]) == ids


def check_gradients(case: dict[str, Any], load: Load, batch: Any, labels: Tensor) -> None:
    """Every parameter has a gradient, the same with either kind of recomputation, in fp64."""
    gradients = []
    for options in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model = load(case["folder"]).double().train()
        if options is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
            assert model.is_gradient_checkpointing
        model(**batch, labels=labels).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        missing = {n for n, _ in model.named_parameters()} - set(gradients[-1])
        assert not missing, missing
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-6, atol=1e-9, msg=name)


def check_saved(model: Any, load: Load, batch: Any, labels: Tensor) -> None:
    """Saved and loaded again, the same; in bf16, near."""
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        before = model(**batch, labels=labels).logits
        model.save_pretrained(folder)
        again = load(folder)
        assert_equal(again(**batch, labels=labels).logits, before)
        rounded = again.to(torch.bfloat16)(**batch, labels=labels).logits.float()
        assert (rounded - before).norm() < 0.1 * before.norm(), "bf16 is far away"
