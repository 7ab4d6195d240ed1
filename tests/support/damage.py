"""Damage to one file of a run, a corpus, a model or an export, and what its readers say of it.

    PYTHONPATH=tests python -m support.damage /tmp/damage 1000      resumes after the last trial

A command that reads a damaged file must name it and end with exit code 2, or say that it passed it
over, or give what it gives of the undamaged one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import yaml
from support.configs import TEXT
from support.fuzz import FAILED, bases_of, find_fault_in, in_process

DETECTED, TOLD, HARMLESS, UNSEALED = "detected", "told", "harmless", "unsealed"
"""Unsealed: another value in a file of another program, whose format has no checksum."""
KINDS = ("flip", "cut", "hole", "swap", "delete")


# ------------------------------------------------------------------------------------ what there is


def make_everything(folder: Path) -> None:
    """A corpus with its source and tokenizer, a run of two checkpoints, a converted model with what
    it was converted from, and two exports; all by the command line, in `folder`."""
    if (folder / "ready").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with inside(folder):
        Path("source").mkdir()
        for number, part in enumerate((TEXT[:9000], TEXT[9000:15000])):
            Path(f"source/{number}.txt").write_text(part, encoding="utf-8")
        command("prep", "tokenizer", "source", "--out", "tokenizer.model", "--vocab-size", "400")
        command(*PREP)
        values = bases_of(folder)["text"]
        values["data"] = {
            "train": [{"path": "corpus/train"}], "val": [{"path": "corpus/val"}],
            "tokenizer": "tokenizer.model", "seq_length": 16,
        }  # fmt: skip
        values |= {"run_dir": "run", "checkpoint": {"every": 2, "keep_last": 5}}
        values["train"] = values["train"] | {"steps": 4, "eval_every": 2}
        Path("config.yaml").write_text(yaml.safe_dump(values))
        command("train", "config.yaml")
        add_launch_files(Path("run"))
        make_llama(Path("llama"))
        command("convert", "llama", "--to", "converted")
        command("export", "run", "export", "--to", "hf", "--unrolled")
    (folder / "ready").touch()


PREP = ("prep", "shards", "source", "--out", "corpus", "--tokenizer", "tokenizer.model",
        "--val-fraction", "0.1", "--text-split", "blank_line", "--workers", "1")  # fmt: skip


def add_launch_files(run: Path) -> None:
    """What a job of Slurm leaves in a run folder: the starts, and the config it was given."""
    (run / "launch").mkdir()
    shutil.copy(run / "config.yaml", run / "launch" / "config.yaml")
    events = [
        {"event": "start", "attempt": 1, "job": "7", "time": 1e9, "nodes": ["a"], "step": 0},
        {"event": "end", "attempt": 1, "time": 1e9 + 60, "step": 2, "reason": "node failed",
         "detail": "a", "action": "requeued"},
        {"event": "start", "attempt": 2, "job": "7", "time": 1e9 + 90, "nodes": ["b"], "step": 2},
        {"event": "end", "attempt": 2, "time": 1e9 + 120, "step": 4, "reason": "done"},
    ]  # fmt: skip
    (run / "attempts.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def make_llama(folder: Path) -> None:
    """A small Llama in two files, with its tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT[:4000]], trainer)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="20KB")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


class inside:
    """Work in a folder for a while."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        self.former = os.getcwd()
        os.chdir(self.folder)

    def __exit__(self, *_: object) -> None:
        os.chdir(self.former)


def command(*words: str) -> None:
    """Run a command that must succeed."""
    code, message = in_process(*words)[:2]
    assert code == 0, f"{' '.join(words)}: {message}"


# ------------------------------------------------------------------------------------------ readers


@dataclass(frozen=True)
class Reader:
    """A command that reads files, and what tells whether it gave the right thing."""

    words: tuple[str, ...]
    result: Callable[[str], Any]
    """From what it printed; run in the folder."""


def tensors_of(run: str) -> Callable[[str], Any]:
    """The bytes of the newest checkpoint of a run."""

    def digest(printed: str) -> str:
        newest = max(Path(run, "checkpoints").glob("step-*/rank-00000.safetensors"))
        return newest.parent.name + hashlib.sha256(newest.read_bytes()).hexdigest()

    return digest


def files_of(folder: str) -> Callable[[str], Any]:
    """The bytes of all files of a folder."""

    def digest(printed: str) -> dict[str, str]:
        return {
            str(path): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(Path(folder).rglob("*"))
            if path.is_file() and not path.name.startswith(".")
        }

    return digest


def nothing(printed: str) -> str:
    """Of commands that only look, and say what they see."""
    return ""


def printed_numbers(printed: str) -> str:
    """What was printed."""
    return printed


RESUME = Reader(("train", "config.yaml", "train.steps=6"), tensors_of("run"))
EVAL = Reader(("eval", "run"), printed_numbers)
GENERATE = Reader(("generate", "run", "str.", "--max-new-tokens", "8"), printed_numbers)
STATUS = Reader(("status", "run"), nothing)
PLOT = Reader(("plot", "run"), nothing)
EXPORT = Reader(("export", "run", "made", "--to", "hf", "--unrolled"), files_of("made"))
NEW = Reader(("train", "config.yaml", "run_dir=new"), tensors_of("new"))
AGAIN = Reader(PREP, files_of("corpus"))
INSPECT = Reader(("prep", "inspect", "corpus/train"), printed_numbers)
CONVERT = Reader(("convert", "llama", "--to", "new"), tensors_of("new"))
CONVERT_EXPORT = Reader(("convert", "export", "--to", "new"), tensors_of("new"))
EVAL_CONVERTED = Reader(("generate", "converted", "str.", "--max-new-tokens", "8"), printed_numbers)

READERS: dict[str, tuple[Reader, ...]] = {
    r"run/config\.yaml": (EVAL, GENERATE, STATUS, PLOT, EXPORT, RESUME),
    r"run/checkpoints/.*": (RESUME, EVAL, EXPORT, STATUS, PLOT),
    r"run/(metrics\.jsonl|tensorboard/.*)": (RESUME, PLOT, STATUS),
    r"run/(lease|heartbeat\.json|attempts\.jsonl|launch/.*|skipped_steps\.json)": (STATUS, RESUME),
    r"run/tokenizer\..*": (GENERATE, EVAL, EXPORT, RESUME),
    r"run/(?!plots/).*": (RESUME, STATUS, PLOT),
    r"tokenizer\.model": (NEW, RESUME, AGAIN),
    r"corpus/.*": (NEW, INSPECT, AGAIN),
    r"llama/.*": (CONVERT,),
    r"export/.*": (CONVERT_EXPORT,),
    r"converted/.*": (EVAL_CONVERTED,),
}
"""By a pattern of paths; the first that matches counts."""


def find_targets(folder: Path) -> dict[str, tuple[Reader, ...]]:
    """Files to damage, and who reads them."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file():
            continue
        for pattern, readers in READERS.items():
            if re.fullmatch(pattern, name):
                found[name] = readers
                break
    return found


def group_of(name: str) -> str:
    """Kinds of files, so that each is damaged as often."""
    name = re.sub(r"events\.out.*", "events", name)
    return re.sub(r"\d+", "N", name)


# ------------------------------------------------------------------------------------------- damage


def damage(folder: Path, name: str, others: list[str], kind: str, random: Random) -> str:
    """Damage a file; returns what was done."""
    path = folder / name
    content = bytearray(path.read_bytes())
    size = len(content)
    if kind == "delete" or not size:
        path.unlink()
        return "deleted"
    if kind == "flip":
        place, bit = random.randrange(size), random.randrange(8)
        content[place] ^= 1 << bit
        path.write_bytes(content)
        return f"bit {bit} of byte {place} of {size} flipped"
    if kind == "cut":
        length = random.randrange(size)
        path.write_bytes(content[:length])
        return f"cut to {length} of {size} bytes"
    if kind == "hole":
        start = random.randrange(size)
        stop = min(size, start + random.choice([1, 8, 64, 512, 4096]))
        content[start:stop] = bytes(stop - start)
        path.write_bytes(content)
        return f"bytes {start}:{stop} of {size} zero"
    if others and random.random() < 0.6:
        other = folder / random.choice(others)
        theirs = other.read_bytes()
        other.write_bytes(content)
        path.write_bytes(theirs)
        return f"exchanged with {other.relative_to(folder)}"
    length = max(min(random.choice([8, 64, 512]), size // 2), 1)
    first, second = random.randrange(size - length + 1), random.randrange(size - length + 1)
    one, two = content[first : first + length], content[second : second + length]
    content[first : first + length], content[second : second + length] = two, one
    path.write_bytes(content)
    return f"{length} bytes at {first} and {second} of {size} exchanged"


@dataclass(frozen=True)
class Trial:
    """A file that was damaged, and what a reader made of it."""

    name: str
    kind: str
    done: str
    reader: str
    outcome: str
    why: str = ""


class Damage:
    """Trials in copies of what `make_everything` made."""

    def __init__(self, folder: Path) -> None:
        self.source, self.work = folder / "data", folder / "work"
        make_everything(self.source)
        self.targets = find_targets(self.source)
        self.groups: dict[str, list[str]] = {}
        for name in self.targets:
            self.groups.setdefault(group_of(name), []).append(name)
        self.expected: dict[tuple[str, ...], list[Any]] = {}

    def copy(self) -> None:
        """A fresh copy to damage."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.source, self.work, symlinks=True)

    def run(self, reader: Reader) -> tuple[int, str, Any]:
        """(exit code, what it said, result) of a reader in the copy."""
        with inside(self.work):
            code, message, printed = in_process(*reader.words)
            try:
                result = reader.result(printed) if code == 0 else None
            except (OSError, ValueError) as error:
                result = f"{error}"
        return code, message + printed, result

    def trial(self, number: int) -> Iterator[Trial]:
        """Damage a file, and let each of its readers read a copy of its own."""
        random = Random(number)
        group = self.groups[list(self.groups)[number % len(self.groups)]]
        name, kind = random.choice(group), KINDS[random.randrange(len(KINDS))]
        others = [other for other in self.targets if other != name and (
            other.split("/")[0] == name.split("/")[0])]  # fmt: skip
        seed = random.random()
        readers = self.targets[name]
        for reader in random.sample(readers, min(2, len(readers))):
            if reader.words not in self.expected:
                self.expected[reader.words] = [self.undamaged(reader, n) for n in (4, 2)]
            self.copy()
            done = damage(self.work, name, others, kind, Random(seed))
            what = (name, kind, done, " ".join(reader.words))
            yield Trial(*what, *self.judge(reader, name, done))

    def undamaged(self, reader: Reader, newest: int) -> Any:
        """What a reader gives of a copy whose run ends with a step."""
        self.copy()
        if newest == 2:
            shutil.rmtree(self.work / "run/checkpoints/step-00000004")
        code, said, result = self.run(reader)
        assert code == 0, said
        return result

    def judge(self, reader: Reader, name: str, done: str) -> tuple[str, str]:
        """(outcome, why) of a reader of the damaged copy."""
        code, said, result = self.run(reader)
        names = [name, *re.findall(r"exchanged with (\S+)", done)]
        named = any(part in said for each in names for part in (each, *self.parents(each)))
        if code == 2:
            error = said[said.find("error: ") :].split("\x00")[0]
            fault = find_fault_in(error) if "error: " in error else "no error message"
            if not named:
                fault = "the file is not named"
            return (FAILED, f"{fault}: {said[-2500:]}") if fault else (DETECTED, error[:200])
        if code != 0:
            return FAILED, f"exit code {code}: {said[-3000:]}"
        newest, former = self.expected[reader.words]
        if result == newest:
            return (TOLD if "damaged" in said else HARMLESS), ""
        told = ("the export has no tokenizer", "put the run's own tokenizer back")
        if named and any(text in said for text in told):
            return TOLD, ""
        if name.startswith("llama/"):
            return UNSEALED, ""
        if result == former and name.startswith("run/checkpoints/step-00000004") and named:
            return TOLD, ""
        return (
            FAILED,
            f"another result, {'with a word of it' if named else 'in silence'}: {said[-1500:]}",
        )

    def parents(self, name: str) -> list[str]:
        """Other names by which a message may call a file."""
        path = Path(name)
        kind = ["tokenizer"] if path.stem == "tokenizer" else []
        return [path.name, str(path.parent) + ":", *kind]


def run_trials(folder: Path, first: int, count: int) -> None:
    """Try damages from number `first` on, a line of outcomes.jsonl for each reading."""
    trials = Damage(folder)
    with (folder / "outcomes.jsonl").open("a") as file:
        for number in range(first, first + count):
            (folder / "now").write_text(f"{number}")
            for trial in trials.trial(number):
                file.write(json.dumps({"trial": number, **vars(trial)}) + "\n")
                file.flush()


if __name__ == "__main__":
    at, number = Path(sys.argv[1]) / "now", int(sys.argv[2])
    begin = int(at.read_text()) + 1 if at.exists() else 0
    run_trials(at.parent, begin, number - begin)
