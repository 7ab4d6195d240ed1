"""What exports must do with any transformers: run by the Python of an environment that has it.

    python tests/support/check_exports.py CASES.json ANSWERS.json

CASES.json lists exports: folder, texts, ids and what the run itself computes. Needs transformers,
peft, accelerate and torch; nothing of this project but the modelling files in the folders.
"""

import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers import dynamic_module_utils as loading
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging


def load(folder: str | Path, **options: Any) -> Any:
    """The model; every tensor has its place."""
    model, faults = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options
    )
    assert not any(faults.values()), faults
    return model.eval()


@torch.no_grad()
def logits_of(model: Any, ids: list[int], **options: Any) -> Tensor:
    """[S, V]."""
    logits: Tensor = model(torch.tensor([ids]), **options).logits[0]
    return logits


def greedy(model: Any, inputs: Any, **options: Any) -> list[list[int]]:
    """New ids of each row."""
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None} | options
    found = model.generate(**inputs, **options)
    return [row[inputs["input_ids"].shape[1] :].tolist() for row in found]


def assert_equal(found: Tensor, wanted: Tensor) -> None:
    """Up to the rounding of sums in another order."""
    scale = max(1.0, float(wanted.abs().max()))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * scale)


def check_text(case: dict[str, Any], model: Any, tokenizer: Any) -> dict[str, Any]:
    """Cached equals uncached equals the run itself: logits, greedy, beams, batches."""
    wanted = load_file(case["expected"])
    for i, ids in enumerate(case["ids"]):
        assert tokenizer(case["texts"][i])["input_ids"] == ids
        assert_equal(logits_of(model, ids), wanted[f"logits.{i}"])
        assert_equal(logits_of(model, ids, use_cache=False), wanted[f"logits.{i}"])
    # Piece by piece: one token, several, the rest, each after what is cached.
    ids, cache, found = torch.tensor([case["ids"][0]]), None, []
    with torch.no_grad():
        for piece in (ids[:, :1], ids[:, 1:5], ids[:, 5:]):
            out = model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits[0])
    assert_equal(torch.cat(found), wanted["logits.0"])
    # A batch as the tokenizer makes it, padded on the left.
    inputs = tokenizer(case["texts"], padding=True, return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert inputs["attention_mask"][:, -1].all() and not inputs["attention_mask"].all()
    for use_cache in (True, False):
        assert greedy(model, inputs, use_cache=use_cache) == case["greedy"], use_cache
    with torch.no_grad():
        padded = model(**inputs).logits
    for i, ids in enumerate(case["ids"]):
        assert_equal(padded[i, -len(ids) :], wanted[f"logits.{i}"])
    single = tokenizer(case["texts"][1], return_tensors="pt")
    beams = [
        model.generate(
            **single, max_new_tokens=6, num_beams=4, do_sample=False, use_cache=use_cache,
            eos_token_id=None, return_dict_in_generate=True, output_scores=True,
            length_penalty=0.0,
        )
        for use_cache in (True, False)
    ]  # fmt: skip
    assert torch.equal(beams[0].sequences, beams[1].sequences)
    for loops, tokens in case.get("loops", {}).items():
        found = greedy(model, single, num_loops=int(loops))
        assert found == [tokens], f"num_loops={loops}: {found}"
        assert greedy(model, single) == [case["greedy"][1]], "num_loops outlived its call"
    return {
        "beam": beams[0].sequences[0].tolist(),
        "score": float(beams[0].sequences_scores[0]),
    }


def check_tools(case: dict[str, Any], model: Any, tokenizer: Any) -> None:
    """Pipelines, save and reload, bf16, peft and the Trainer, without hand-work."""
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    texts = pipe(case["texts"], batch_size=2, max_new_tokens=8, do_sample=False)
    for text, found in zip(case["texts"], texts, strict=True):
        assert found[0]["generated_text"].startswith(text)
    ids = case["ids"][0]
    before = logits_of(model, ids)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        again = load(folder)
        assert_equal(logits_of(again, ids), before)
        assert AutoTokenizer.from_pretrained(folder)(case["texts"][0])["input_ids"] == ids
    rounded = logits_of(again.to(torch.bfloat16), ids).float()
    assert (rounded - before).norm() < 0.1 * before.norm(), "bf16 is far away"
    adapted = get_peft_model(
        load(case["folder"]),
        LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=case["linear"]),
    )
    assert_equal(logits_of(adapted.eval(), ids), before)
    adapted.train()
    labels = torch.tensor([ids])
    adapted(labels, labels=labels).loss.backward()
    grads = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}
    assert grads and all(g is not None for n, g in grads.items() if "lora_B" in n), grads.keys()
    assert len(greedy(adapted.eval(), tokenizer(case["texts"], padding=True, return_tensors="pt")))
    trained = load(case["folder"])
    tokens = [{"input_ids": i} for i in case["ids"]]
    train_one_step(trained, tokens, DataCollatorForLanguageModeling(tokenizer, mlm=False))
    assert not torch.equal(logits_of(trained.eval(), ids), before)


def check_thoroughly(case: dict[str, Any], model: Any, tokenizer: Any) -> None:
    """What compact exports support beyond that."""
    ids = torch.tensor([case["ids"][0]])
    length, wanted = ids.shape[1], load_file(case["expected"])["logits.0"]
    for wrong in ({"kache": None}, {"token_type_ids": torch.zeros_like(ids)}):
        try:
            model(ids, **wrong)
        except TypeError as error:
            assert next(iter(wrong)) in str(error), error
        else:
            raise AssertionError(f"{wrong} is accepted")
    with torch.no_grad():
        seen = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        window = model.config.block["sliding_window"]
        if window is None:
            for mask in (seen, seen.long(), torch.zeros(seen.shape).masked_fill(~seen, -1e9)):
                out = model(ids, attention_mask=mask, use_cache=False)
                assert_equal(out.logits[0], wanted)
        out = model(ids, output_attentions=True, output_hidden_states=True)
        assert_equal(out.logits[0], wanted)
        depth = model.config.num_hidden_layers
        assert len(out.attentions) == depth and len(out.hidden_states) == depth + 1
        heads = model.config.num_attention_heads
        for weights in out.attentions:
            assert weights.shape == (1, heads, length, length)
            torch.testing.assert_close(weights.sum(-1), torch.ones(1, heads, length))
        base = AutoModel.from_pretrained(case["folder"], trust_remote_code=True).eval()
        torch.testing.assert_close(base(ids).last_hidden_state, out.hidden_states[-1])
        eager = load(case["folder"], attn_implementation="eager")
        assert_equal(eager(ids).logits[0], wanted)
    inputs = tokenizer(case["texts"], padding=True, return_tensors="pt")
    static = greedy(model, inputs, cache_implementation="static", disable_compile=True)
    assert static == case["greedy"], "static cache"
    if case["compiles"]:
        check_compile(model, ids, wanted)
    if model.config.block["positions"] != "alibi":
        check_layer_indices(case, ids, wanted)
    check_gradient_checkpointing(case, ids)


def check_offload(
    model: Any, load: Callable[..., Any], compute: Callable[[Any], Tensor], wanted: Tensor
) -> None:
    """Compare logits of a compact export whose blocks, or all of whose weights, are on disk."""
    for rest in ("cpu", "disk"):
        places = {name: rest for name, _ in model.named_children() if name != "blocks"}
        places |= {f"blocks.{i}": "disk" for i in range(len(model.blocks))}
        with tempfile.TemporaryDirectory() as folder:
            spread = load(model.name_or_path, device_map=places, offload_folder=folder)
            assert_equal(compute(spread), wanted)


def check_classifier(case: dict[str, Any]) -> None:
    """The run's own logits, alone, in batches padded on either side; loss, save, bf16, Trainer."""
    kind, wanted = case["task"], load_file(case["expected"])["logits"]
    auto = (
        AutoModelForTokenClassification if kind == "token" else AutoModelForSequenceClassification
    )

    def load_classifier(folder: str, **options: Any) -> Any:
        model, faults = auto.from_pretrained(
            folder, trust_remote_code=True, output_loading_info=True, **options
        )
        assert not any(faults.values()), faults
        return model.eval()

    def batch(side: str) -> dict[str, Tensor]:
        length = max(map(len, case["ids"]))
        pads = [[0] * (length - len(row)) for row in case["ids"]]
        rows = list(zip(case["ids"], pads, strict=True))
        ids = [p + r if side == "left" else r + p for r, p in rows]
        mask = [p + [1] * len(r) if side == "left" else [1] * len(r) + p for r, p in rows]
        inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        return {k: v.unflatten(0, (-1, 2)) if kind == "pair" else v for k, v in inputs.items()}

    model, padded = load_classifier(case["folder"]), batch("right")
    with torch.no_grad():
        for side in ("right", "left"):
            inputs = batch(side)
            found = model(**inputs).logits
            found = found[inputs["attention_mask"].bool()] if kind == "token" else found
            assert_equal(found, wanted)
        if kind != "pair":
            alone = model(torch.tensor(case["ids"][:1])).logits[0]
            assert_equal(alone, wanted[: len(case["ids"][0])] if kind == "token" else wanted[0])
        before = model(**padded).logits
    try:
        model(**padded, kache=None)
    except TypeError as error:
        assert "kache" in str(error)
    else:
        raise AssertionError("an unknown argument is accepted")
    if not case["tools"]:
        return
    labels = before.argmin(-1)  # The unlikeliest: there is something to learn.
    if kind == "token":
        labels = labels.masked_fill(padded["attention_mask"] == 0, -100)
    check_offload(model, load_classifier, lambda spread: spread(**padded).logits, before)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        again = load_classifier(folder)
        assert_equal(again(**padded).logits, before)
        assert again.to(torch.bfloat16)(**padded).logits.isfinite().all()
    names = ["query", "value"]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=names)).train()
    adapted(**padded, labels=labels).loss.backward()
    samples = [
        {name: value[i] for name, value in (padded | {"labels": labels}).items()}
        for i in range(len(labels))
    ]
    trained = load_classifier(case["folder"])
    train_one_step(trained, samples, None)
    with torch.no_grad():
        assert not torch.equal(trained.eval()(**padded).logits, before)


def check_encoder_decoder(case: dict[str, Any]) -> None:
    """Everything in `check_pairs.py`, with adapters of peft, the Trainer and weights on disk."""
    # Python runs this file isolated, without its folder among those of modules.
    sys.path.append(str(Path(__file__).parent))
    from check_pairs import check_pairs

    def load_pair(folder: str, **options: Any) -> Any:
        model, faults = AutoModelForSeq2SeqLM.from_pretrained(
            folder, trust_remote_code=True, output_loading_info=True, **options
        )
        assert not any(faults.values()), faults
        return model.eval()

    check_pairs(case, load_pair, tools=case["tools"])
    if not case["tools"]:
        return
    model, tokenizer = load_pair(case["folder"]), AutoTokenizer.from_pretrained(case["folder"])
    batch = tokenizer(case["lines"], padding=True, return_tensors="pt")
    found = model.generate(**batch)
    static = model.generate(**batch, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, found), "static cache"
    labels = torch.tensor([row[1:3] for row in case["targets"] if len(row) > 2])
    inputs = {name: value[: len(labels)] for name, value in batch.items()} | {"labels": labels}
    with torch.no_grad():
        before = model(**inputs).logits
        check_offload(model, load_pair, lambda spread: spread(**inputs).logits, before)
        eager = load_pair(case["folder"], attn_implementation="eager")
        assert_equal(eager(**inputs).logits, before)
    config = LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, target_modules=case["linear"])
    adapted = get_peft_model(model, config).train()
    adapted(**inputs).loss.backward()
    assert adapted.eval().generate(**batch).equal(found)
    trained = load_pair(case["folder"])
    rows = [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]
    samples = [
        {name: value[mask.bool()] for name, value in row.items()} | {"labels": own}
        for row, mask, own in zip(rows, batch["attention_mask"], labels, strict=False)
    ]
    train_one_step(trained, samples, DataCollatorForSeq2Seq(tokenizer, trained))
    with torch.no_grad():
        assert not torch.equal(trained.eval()(**inputs).logits, before)


def train_one_step(model: Any, samples: list[Any], collator: Any) -> None:
    """By the library's Trainer."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                folder, max_steps=1, per_device_train_batch_size=2, learning_rate=0.1,
                report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
            ),
            train_dataset=samples,
            data_collator=collator,
        )  # fmt: skip
        assert 0.0 < trainer.train().training_loss < 1000.0


def check_compile(model: Any, ids: Tensor, wanted: Tensor) -> None:
    """One graph, without breaks."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        found = compiled(ids, use_cache=False).logits[0]
        assert_equal(found, wanted)
        mask = torch.ones_like(ids)
        found = compiled(ids, attention_mask=mask, use_cache=False).logits[0]
    assert_equal(found, wanted)
    torch._dynamo.reset()


def check_layer_indices(case: dict[str, Any], ids: Tensor, wanted: Tensor) -> None:
    """A foreign backend of attention is given every use of a block under an index of its own, and
    its own keywords, as vLLM's does."""
    called = []

    def attend(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        assert mask is None, "a backend that makes its own masks is given one"
        called.append(options["attention_instances"][module.layer_idx])
        cap, window = options.get("softcap"), options.get("sliding_window")
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) * options["scaling"]
        scores = scores if cap is None else cap * torch.tanh(scores / cap)
        seen = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
        seen = seen if window is None else seen & ~seen.tril(-window)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        return (weights @ v).transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register("foreign", attend)
    model = load(case["folder"])
    model.config._attn_implementation = "foreign"
    depth = model.config.num_hidden_layers
    with torch.no_grad():
        positions = torch.arange(ids.shape[1])[None]
        found = model(
            inputs_embeds=model.get_input_embeddings()(ids), position_ids=positions,
            use_cache=False, attention_instances=list(range(depth)), return_dict=False,
        )[0]  # fmt: skip
    assert called == list(range(depth))
    assert_equal(found[0], wanted)


def check_gradient_checkpointing(case: dict[str, Any], ids: Tensor) -> None:
    """The same gradients, with either kind of recomputation."""
    grads = []
    for options in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model = load(case["folder"]).train()
        if options is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
            assert model.is_gradient_checkpointing
        model(ids, labels=ids).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert len(grads[-1]) == len(list(model.parameters()))
    for other in grads[1:]:
        for name, grad in grads[0].items():
            torch.testing.assert_close(other[name], grad, rtol=1e-4, atol=1e-6, msg=name)


@contextmanager
def named(case: dict[str, Any], failures: dict[str, str]) -> Iterator[None]:
    """Go on with the next export after a failure."""
    try:
        yield
    except Exception:
        failures[case["folder"]] = traceback.format_exc(limit=8)


def find_imports_once() -> None:
    """Have transformers parse the code of models once: every export has a copy of the same files,
    and each load of it would parse them again."""
    find, known = loading.get_imports, {}

    def get_imports(path: str | Path) -> list[str]:
        text = Path(path).read_bytes()
        if text not in known:
            known[text] = find(path)
        return known[text]

    loading.get_imports = get_imports


def main(cases: Path, answers: Path) -> None:
    """Check all; write what is found, and every failure by its folder."""
    find_imports_once()
    logging.set_verbosity_error()
    torch.manual_seed(0)
    failures: dict[str, str] = {}
    found: dict[str, Any] = {}
    for case in json.loads(cases.read_text()):
        with named(case, failures):
            found[case["folder"]] = check(case)
        answer = {"failures": failures, "found": found, "version": transformers.__version__}
        answers.write_text(json.dumps(answer))


def check(case: dict[str, Any]) -> dict[str, Any]:
    """All of one export; what is to be compared with the run."""
    if "task" in case:
        check_classifier(case)
        return {}
    if "pairs" in case:
        check_encoder_decoder(case)
        return {}
    model, tokenizer = load(case["folder"]), AutoTokenizer.from_pretrained(case["folder"])
    found = check_text(case, model, tokenizer)
    if case["tools"]:
        check_tools(case, model, tokenizer)
    if case["tools"] and hasattr(model, "blocks"):
        wanted = load_file(case["expected"])["logits.0"]
        check_offload(model, load, lambda spread: logits_of(spread, case["ids"][0]), wanted)
    if case.get("thorough"):
        check_thoroughly(case, model, tokenizer)
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
