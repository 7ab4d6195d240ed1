"""A tiny run that is served by `megarecur serve`, in a process of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import yaml
from support.decoding import disturb

from megarecur.checkpoint import checkpoint
from megarecur.config.load import load_config
from megarecur.data.tokenizer import WordTokenizer
from megarecur.model.transformer import Transformer
from megarecur.parallel.shards import whole

RECURRENT = {"kind": "block_recurrence", "num_blocks": 2, "num_loops": 3}
TEXT = """
a all and as at be but by can do for from go had has have he her him his if in is it its like man
may more new no not now of on one or out say see she so some than that the then there they this time
to two up was way we what when who will with you <b> & été 世界
"""
WORDS = TEXT.split()


def make_run(folder: Path, recurrence: dict[str, Any], **sections: Any) -> Path:
    """Write a run of an untrained model over words, whose tokens and exits vary; in fp64, because a
    batch rounds differently from a single text."""
    shape = {"hidden_size": 24, "num_heads": 4, "head_dim": 6, "ffn_hidden_size": 32,
             "tie_embeddings": False, "vocab_size": 2 + len(WORDS), "init_std": 0.3}  # fmt: skip
    values: dict[str, Any] = {
        "run_dir": str(folder),
        "model": shape | sections.pop("model", {}),
        "recurrence": recurrence,
        "data": {
            "train": [{"path": "unused"}],
            "tokenizer": str(folder / "words.json"),
            "seq_length": 64,
        },
        "optimizer": {"lr": 1e-3},
        "train": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "precision": "fp64"},
    }
    folder.mkdir(parents=True)
    (folder / "words.json").write_bytes(WordTokenizer.describe(WORDS))
    (folder / "config.yaml").write_text(yaml.safe_dump(values | sections), encoding="utf-8")
    model = disturb(Transformer(load_config(folder / "config.yaml")))
    shards = {name: whole(value.detach()) for name, value in model.parameters_by_name.items()}
    checkpoint.save(folder / "checkpoints", 1, shards, {"step": 1}).result()
    return folder


class Served:
    """A server of a run, once it accepts requests."""

    def __init__(self, run: Path, *options: object) -> None:
        command = [sys.executable, "-m", "megarecur.launch.cli", "serve", str(run), "--port", "0"]
        self.process = subprocess.Popen(
            [*command, *map(str, options)], text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.fullmatch(r"serving (.+) at (http://\S+:(\d+))\n", line)
        assert found, (line, self.process.communicate())
        self.name, self.url, self.port = found[1], found[2], int(found[3])
        from openai import OpenAI  # A second, which workers without servers save.

        self.client = OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def complete(self, prompt: Any, **options: Any) -> Any:
        """Return the answer to a request for completions, as the official client reads it."""
        extra = {name: options.pop(name) for name in ("depth", "exit", "draft", "top_k")
                 if name in options}  # fmt: skip
        return self.client.completions.create(
            model=self.name, prompt=prompt, extra_body=extra, **options
        )

    def metrics(self) -> dict[str, float]:
        """Return the metrics by name and labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        samples = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
        return {name.removeprefix("megarecur_"): float(value) for name, value in samples}

    def get(self, path: str) -> Any:
        """Return the JSON at a path."""
        with urllib.request.urlopen(f"{self.url}{path}", timeout=60) as answer:
            return json.loads(answer.read())

    def end(self) -> tuple[int, str]:
        """Send SIGTERM; return the exit code and what was written to stderr."""
        self.client.close()
        self.process.terminate()
        _, err = self.process.communicate(timeout=120)
        return self.process.returncode, err
