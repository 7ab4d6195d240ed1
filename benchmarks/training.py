"""Training speed of a reuse-mapped model against Hugging Face Llama of equal executed depth.

    python benchmarks/training.py [fp32] [bf16] [--rounds 7] [--compile] [--cuda] [--documents 60]

One step is forward, backward, clipping and fused AdamW on 4 sequences of 512 tokens: hidden 512,
feed-forward 1,408, 8 heads, 8 executed layers, 8,192 tokens of vocabulary, tied. Our model runs 4
blocks twice each (a step of the engine), theirs 8 layers (sdpa; in bf16, fp32 weights under
autocast). With --compile both sides run under torch.compile: our block, and their whole model.
With --documents N, samples are packed from documents of N tokens on average; theirs get a 4-D
mask, made beforehand, and positions that begin again with each document. Both sides, and products
of the model's shapes, alternate in one run; medians are printed. "Share"
is executed FLOPs over those that the machine's fp32 products (bf16 ones on CUDA) would execute in
the same time. On a machine shared with other work, OMP_NUM_THREADS=1 counts processor time instead
of wall time.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable

import torch
from attention import make_batch
from trained import Trained

from megarecur.config.run import Config
from megarecur.data.torchvision_stub import make_torchvision_importable
from megarecur.launch.bench import pick_clock
from megarecur.plan.cost import count_flops
from megarecur.recurrence.schemes import layer_map

HIDDEN, FFN, HEADS, DEPTH, VOCABULARY, LENGTH, BATCH = 512, 1408, 8, 8, 8192, 512, 4
TOKENS = LENGTH * BATCH
DEVICE = torch.device("cuda" if "--cuda" in sys.argv else "cpu")
COMPILE = "--compile" in sys.argv


def option(name: str, default: int) -> int:
    """Return the number after a flag."""
    return int(sys.argv[sys.argv.index(name) + 1]) if name in sys.argv else default


DOCUMENTS = option("--documents", 0)
Step = Callable[[], float]


def make_config(precision: str) -> Config:
    """Return our config: 4 blocks, each run twice in a row."""
    return Config.model_validate({
        "run_dir": "run",
        "model": {"hidden_size": HIDDEN, "num_heads": HEADS, "ffn_hidden_size": FFN,
                  "vocab_size": VOCABULARY},
        "recurrence": {"kind": "reuse_map", "reuse_map": [2, 2, 2, 2]},
        "data": {"train": [{"path": "none"}], "tokenizer": "bytes", "seq_length": LENGTH,
                 "mask_documents": DOCUMENTS > 0},
        "optimizer": {"lr": 1e-4},
        "train": {"steps": 1, "global_batch_size": BATCH, "micro_batch_size": BATCH,
                  "precision": precision},
    })  # fmt: skip


def our_step(config: Config) -> Step:
    """Return a function that runs one optimizer step of the trainer's engine and returns the
    loss."""
    trained = Trained(config, DEVICE, COMPILE)
    batch = make_batch(DOCUMENTS, BATCH, LENGTH, VOCABULARY)
    return lambda: trained.step(batch).item()


def their_step(precision: str) -> Step:
    """Return a function that runs one step with transformers, as its users write it."""
    make_torchvision_importable()
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=FFN,
            num_hidden_layers=DEPTH, num_attention_heads=HEADS, max_position_embeddings=LENGTH,
            tie_word_embeddings=True, attn_implementation="sdpa", use_cache=False,
        )
    ).to(DEVICE)  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    batch = make_batch(DOCUMENTS, BATCH, LENGTH, VOCABULARY)
    inputs = {
        "input_ids": batch.tokens_BS, "labels": batch.labels_BS, "shift_labels": batch.labels_BS
    }  # fmt: skip
    if DOCUMENTS:
        same = batch.documents_BS[:, None, :, None] == batch.documents_BS[:, None, None]
        inputs |= {"attention_mask": same.tril(), "position_ids": batch.positions_BS}
    forward = torch.compile(model) if COMPILE else model

    def step() -> float:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = forward(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def products_step() -> tuple[Step, float]:
    """Return a function that computes the feed-forward's three products, and its FLOPs.

    The products are the forward one and both backward ones.
    """
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    x = torch.randn(TOKENS, HIDDEN, device=DEVICE, dtype=dtype)
    weight = torch.randn(FFN, HIDDEN, device=DEVICE, dtype=dtype)
    dy = torch.randn(TOKENS, FFN, device=DEVICE, dtype=dtype)
    repeats = 10

    def step() -> float:
        for _ in range(repeats):
            _ = x @ weight.t(), dy @ weight, dy.t() @ x
        return 0.0

    return step, 6.0 * TOKENS * HIDDEN * FFN * repeats


def seconds(step: Step) -> float:
    """Return the seconds of one call: wall time, or of a single thread processor time."""
    clock = pick_clock(DEVICE)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    began = clock()
    step()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return clock() - began


def compare(precision: str, rounds: int) -> None:
    """Alternate the sides, and print medians."""
    config = make_config(precision)
    flops = count_flops(config, layer_map(config.recurrence)).train * TOKENS
    products, product_flops = products_step()
    sides = {"ours": our_step(config), "theirs": their_step(precision), "products": products}
    losses = {name: step() for name, step in sides.items()}
    _ = [step() for step in sides.values()]
    assert abs(losses["ours"] - losses["theirs"]) < 0.2, f"different work? {losses}"
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, step in sides.items():
            times[name].append(seconds(step))
    median = {name: statistics.median(values) for name, values in times.items()}
    rate = product_flops / median["products"]
    print(f"{precision}{', compiled' if COMPILE else ''}: products {rate / 1e9:,.0f} GFLOP/s")
    for name in ("ours", "theirs"):
        share = flops / median[name] / rate
        print(f"  {name:7} {TOKENS / median[name]:8,.0f} tokens/s   share {share:.2f}")
    ratios = sorted(t / o for o, t in zip(times["ours"], times["theirs"], strict=True))
    print(f"  ratio   {median['theirs'] / median['ours']:.3f}  (pairs: {ratios[0]:.3f} to "
          f"{ratios[-1]:.3f})", flush=True)  # fmt: skip


def main() -> None:
    """Compare both sides in the precisions named on the command line, or in fp32 and bf16."""
    rounds = option("--rounds", 7)
    for precision in [p for p in ("fp32", "bf16") if p in sys.argv] or ["fp32", "bf16"]:
        compare(precision, rounds)


if __name__ == "__main__":
    main()
