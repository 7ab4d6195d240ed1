"""Cost of folding a 1B-shaped model: time by part, and peak memory against its limit.

    python benchmarks/folding.py FOLDER [--layers 22] [--rank 64] [--init average]

FOLDER receives a Llama of random weights with the shapes of TinyLlama (about 2.2 GB in bf16, reused
by later runs) and the folded run. `megarecur convert` runs as a separate process, whose anonymous
memory (pages without a file) is read every 20 ms; the memory of a process that only imports the
libraries is reported separately. The limit is twice the largest layer in fp32, plus one file of the
result.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

MIB = 2**20


def make_source(folder: Path, layers: int) -> None:
    """Write a Llama of random weights, unless it exists."""
    if (folder / "config.json").exists():
        return
    from megarecur.data.torchvision_stub import make_torchvision_importable

    make_torchvision_importable()
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=2048,
        tie_word_embeddings=False, torch_dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="1GB")


def anonymous_bytes(pid: int) -> int:
    """Return the anonymous memory of a process in bytes; 0 once the process has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"RssAnon:\s+(\d+)", status)
    return 1024 * int(found[1]) if found else 0


def watch(command: list[str]) -> tuple[int, float]:
    """Run a command; return (peak of anonymous bytes, seconds)."""
    began, most = time.perf_counter(), 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            most = max(most, anonymous_bytes(process.pid))
            time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return most, time.perf_counter() - began


def main() -> None:
    """Make the source if it is missing, fold it, and print time and memory."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--init", default="average")
    options = parser.parse_args()
    source, run = options.folder / f"llama-{options.layers}", options.folder / "folded"
    make_source(source, options.layers)
    shutil.rmtree(run, ignore_errors=True)
    words = [
        "-c",
        "import megarecur.launch.cli, megarecur.convert.recursive; import time; time.sleep(1)",
    ]
    idle, _ = watch([sys.executable, *words])
    lora = ["--lora-rank", str(options.rank)] if options.rank else []
    peak, seconds = watch(
        [sys.executable, "-m", "megarecur.launch.cli", "convert", str(source), "--to", str(run),
         "--scheme", "relaxed" if lora else "cycle", "--loops", "2", "--init", options.init, *lora]
    )  # fmt: skip
    spent = json.loads((run / "fold.json").read_text())["seconds"]
    config = json.loads((source / "config.json").read_text())
    hidden, ffn, heads = (
        config[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads")
    )
    keys = hidden // heads * config["num_key_value_heads"]
    layer = 4 * (2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * ffn)
    largest = max(path.stat().st_size for path in run.rglob("*.safetensors"))
    rest = spent["all"] - spent["reading"] - spent["svd"]
    print(
        f"{seconds:.1f} s: reading {spent['reading']:.1f}, factors {spent['svd']:.1f}, means, "
        f"checks and writing {rest:.1f}, start {seconds - spent['all']:.1f}\n"
        f"peak {(peak - idle) / MIB:.0f} MiB above the {idle / MIB:.0f} MiB of an idle process; "
        f"limit {(2 * layer + largest) / MIB:.0f} MiB: two layers of {layer / MIB:.0f} and a file "
        f"of {largest / MIB:.0f}"
    )


if __name__ == "__main__":
    main()
