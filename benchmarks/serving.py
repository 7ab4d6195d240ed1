"""Throughput of the inference engine, in tokens per second of CPU time, which neighbours on a busy
machine disturb less than wall time.

    OMP_NUM_THREADS=1 python benchmarks/serving.py [--hidden 256] [--prompt 24] [--new 96]

New tokens are four times those of the prompt, as in the table of Bae et al. 2025. A core of two
blocks runs 4 loops; weights are random, which costs the same time as trained ones.
Compared, with sides that alternate: one request with `generate`, with Hugging Face's `generate` of
a Llama of 8 layers of the same width, and with the engine; 16 requests one by one and at once; 16
requests at once with exits at a mean of 2 loops, for both rules that fill the skipped keys and
values; `--waves` times as many requests as `--places` (16), of which that number runs at a time,
without exits and with exits after 1 to 3 loops, so that places of requests that end early do not
stay empty; and one request with and without a draft whose proposals are all accepted (later loops
add nothing). Every text is checked against `generate` in fp32, and the share of equal tokens is
printed. `--sides` selects rows by number.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from megarecur.config.run import Config
from megarecur.data.torchvision_stub import make_torchvision_importable
from megarecur.inference.engine import Engine
from megarecur.inference.generate import generate
from megarecur.inference.request import Draft, Exit, Request
from megarecur.model.transformer import Transformer
from megarecur.plan.schedule import Schedules

VOCABULARY, LOOPS, REQUESTS, PAGE = 2048, 4, 16, 16
"""Sizes of the model and of the sides without `--places`."""


def build(hidden: int, is_idle: bool = False) -> Transformer:
    """Return a random model; `is_idle`: one whose blocks add nothing to the stream."""
    config = Config.model_validate({
        "run_dir": "none",
        "model": {"hidden_size": hidden, "num_heads": hidden // 32, "vocab_size": VOCABULARY,
                  "tie_embeddings": False},
        "recurrence": {"kind": "block_recurrence", "num_blocks": 2, "num_loops": LOOPS,
                       "injection": "none"},
        "data": {"train": [{"path": "none"}], "tokenizer": "bytes", "seq_length": 256},
        "optimizer": {"lr": 1e-4},
        "train": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
    })  # fmt: skip
    model = Transformer(config)
    for block in model.blocks().values() if is_idle else ():
        for matrix in (block.attention.output, block.feed_forward.down):
            matrix.weight.parameter.data.zero_()
    return model


def prepare(
    model: Transformer,
    requests: Sequence[Request],
    at_once: bool = True,
    max_texts: int = 64,
) -> Callable[[], list[list[int]]]:
    """Return a function that serves requests which arrive together, or each after the end of the
    last, and returns their texts. Its engine is new, so that rounds share no page."""
    pages = sum(-(-request.most_tokens // PAGE) for request in requests)
    engine = Engine(model, num_pages=pages, page_size=PAGE, max_texts=max_texts)

    def run() -> list[list[int]]:
        handles = []
        for request in requests:
            handles.append(engine.submit(request))
            if not at_once:
                engine.run()
        engine.run()
        return [[e.token for e in handle if e.token is not None] for handle in handles]

    return run


def prepare_llama(model: Transformer, request: Request) -> Callable[[], list[list[int]]]:
    """Return a function that continues one prompt with Hugging Face's `generate`, of a Llama whose
    layers have the shapes of the model's blocks, one for each step of its map."""
    make_torchvision_importable()
    from transformers import LlamaConfig, LlamaForCausalLM

    shape, new = model.config.model, request.max_new_tokens
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=shape.hidden_size,
            intermediate_size=shape.ffn_hidden_size, num_hidden_layers=2 * LOOPS,
            num_attention_heads=shape.num_heads, tie_word_embeddings=False,
            attn_implementation="sdpa",
        )
    ).eval()  # fmt: skip
    prompt = torch.tensor([request.tokens])

    def run() -> list[list[int]]:
        with torch.inference_mode():
            ids = llama.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                max_new_tokens=new, min_new_tokens=new, pad_token_id=0,
            )  # fmt: skip
        return [ids[0, prompt.shape[1] :].tolist()]

    return run


def measure(
    sides: dict[str, Callable[[], Callable[[], list[list[int]]]]], rounds: int
) -> dict[str, float]:
    """Return tokens per CPU second of each side, medians over rounds in which sides alternate."""
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, make in sides.items():
            run = make()
            began = time.process_time()
            tokens = sum(map(len, run()))
            if number:  # The first round warms up.
                speeds[name].append(tokens / (time.process_time() - began))
    return {name: statistics.median(found) for name, found in speeds.items()}


def main() -> None:
    """Measure all sides, and print a table."""
    parser = argparse.ArgumentParser()
    for name, default in (
        ("hidden", 256), ("rounds", 3), ("new", 96), ("prompt", 24), ("waves", 3),
        ("places", 16),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--sides", help="numbers of rows, such as 0,1,2 (default: all)")
    options = parser.parse_args()
    model, idle = build(options.hidden), build(options.hidden, is_idle=True)
    prompts = torch.randint(VOCABULARY, (REQUESTS, options.prompt)).tolist()
    requests = [
        Request(tokens=tuple(prompt), max_new_tokens=options.new, temperature=0.0)
        for prompt in prompts
    ]

    def exiting(fill: str, loops: Sequence[int] = (2, 2, 2, 2)) -> list[Request]:
        """Return the requests with exits after these loops, in turn."""
        return [
            replace(request, exit=Exit("loop", loops[i % 4], fill))  # type: ignore[arg-type]
            for i, request in enumerate(requests)
        ]

    schedules = Schedules(model.config)

    def plain(request: Request) -> list[int]:
        """Return the text of `generate`."""
        return list(
            generate(model, request.tokens, max_new_tokens=options.new, temperature=0.0,
                     schedules=schedules)
        )  # fmt: skip

    if options.sides is None:
        found = prepare(model, requests)()
        wanted = [plain(request) for request in requests]
        pairs = [
            (a, b) for x, y in zip(found, wanted, strict=True) for a, b in zip(x, y, strict=True)
        ]
        print(f"equal tokens: {sum(a == b for a, b in pairs) / len(pairs):.2%} of {len(pairs)}")
    first = requests[:1]
    drafting = [replace(first[0], draft=Draft(1, 4))]
    many = [
        replace(first[0], tokens=tuple(prompt))
        for prompt in torch.randint(
            VOCABULARY, (options.waves * options.places, options.prompt)
        ).tolist()
    ]
    mixed = (2, 1, 3, 2)
    places = f"{len(many)} in {options.places} places"
    sides: dict[str, Callable[[], Callable[[], list[list[int]]]]] = {
        "generate, one request": lambda: lambda: [plain(first[0])],
        "Hugging Face, one request": lambda: prepare_llama(model, first[0]),
        "engine, one request": lambda: prepare(model, first),
        "one by one": lambda: prepare(model, requests, at_once=False),
        "at once": lambda: prepare(model, requests),
        "at once, all exit at 2, fill state": lambda: prepare(model, exiting("state")),
        "at once, all exit at 2, fill share": lambda: prepare(model, exiting("share")),
        "at once, exits at 1 to 3, fill state": lambda: prepare(model, exiting("state", mixed)),
        places: lambda: prepare(model, many, max_texts=options.places),
        f"{places}, exits at 1 to 3": lambda: prepare(
            model,
            [
                replace(request, exit=Exit("loop", mixed[i % 4], "state"))
                for i, request in enumerate(many)
            ],
            max_texts=options.places,
        ),
        "idle loops, one request": lambda: prepare(idle, first),
        "idle loops, one request, draft": lambda: prepare(idle, drafting),
    }
    if options.sides is not None:
        names = list(sides)
        sides = {names[int(i)]: sides[names[int(i)]] for i in options.sides.split(",")}
    speeds = measure(sides, options.rounds)
    over = {
        "engine, one request": "generate, one request",
        "Hugging Face, one request": "generate, one request",
        "at once": "one by one",
        "at once, all exit at 2, fill state": "at once",
        "at once, all exit at 2, fill share": "at once",
        "at once, exits at 1 to 3, fill state": "at once",
        f"{places}, exits at 1 to 3": places,
        "idle loops, one request, draft": "idle loops, one request",
    }
    print("| side | tokens per CPU second | ratio | over |\n|---|---|---|---|")
    for name, speed in speeds.items():
        base = over.get(name) if over.get(name) in speeds else None
        ratio = f"{speed / speeds[base]:.2f} | {base}" if base else "|"
        print(f"| {name} | {speed:.0f} | {ratio} |")


if __name__ == "__main__":
    main()
