"""Objects between ranks: what is not signed with the job's secret is never unpickled."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megarecur.errors import MeshError
from megarecur.parallel import objects
from megarecur.private import SECRET_VARIABLE, make_secret

ROOT = Path(__file__).resolve().parents[2]


class Attack:
    """Creates a folder where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.makedirs, (f"{self.path}/loaded-{os.getpid()}",)


def exchange(secret: str) -> list[Any]:
    """Every rank's objects, of different lengths, and that of the last rank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SECRET_VARIABLE, secret)
        rank, last = dist.get_rank(), dist.get_world_size() - 1
        own = {"rank": rank, "text": "x" * 1000 * rank, "error": MeshError(f"of {rank}")}
        pair = dist.new_group([0, last])
        found = objects.gather_objects(own)
        found.append(objects.broadcast_object(own if rank == last else None, last))
        if rank in (0, last):
            found.append(objects.broadcast_object(own, 1, pair))
        return [(each["rank"], len(each["text"]), str(each["error"])) for each in found]


@pytest.mark.parametrize("secret", ["", "of the job"])
def test_objects_arrive_as_they_were_sent(world: Any, secret: str) -> None:
    expected = [(rank, 1000 * rank, f"of {rank}") for rank in range(4)]
    for rank, found in enumerate(world(4).run(exchange, secret)):
        assert found == [*expected, expected[3], *([expected[3]] if rank in (0, 3) else [])]


def be_strange(path: Path, how: str, collective: str) -> str:
    """Rank 1 plays a stranger who does not know the secret of the job."""
    stranger = dist.get_rank() == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SECRET_VARIABLE, "another" if stranger and how == "signs" else "secret")
        if stranger and how != "signs":
            plain = {"plain": pickle.dumps, "short": lambda value: b"x" * 32, "empty": bytes}[how]
            patch.setattr(objects, "sign", (lambda value: b"") if how == "empty" else plain)
        try:
            if collective == "gather":
                objects.gather_objects(Attack(path) if stranger else dist.get_rank())
            else:
                objects.broadcast_object(Attack(path) if stranger else None, 1)
        except MeshError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("collective", ["gather", "broadcast"])
@pytest.mark.parametrize("how", ["signs", "plain", "short", "empty"])
def test_nothing_of_a_stranger_is_unpickled(
    world: Any, tmp_path: Path, how: str, collective: str
) -> None:
    for rank, said in enumerate(world(4).run(be_strange, tmp_path, how, collective)):
        if rank != 1:
            assert re.search(r"rank 1 .* (is not signed|announces a message of 0 bytes)", said)
    assert not list(tmp_path.iterdir())


def test_a_message_of_any_length_is_not_allocated() -> None:
    with pytest.raises(MeshError, match="announces a message of 9223372036854775807 bytes"):
        objects.check_length((1 << 63) - 1, 4)


def test_each_job_has_a_secret_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)
    first, second = make_secret()[SECRET_VARIABLE], make_secret()[SECRET_VARIABLE]
    assert first != second and len(first) == 64
    monkeypatch.setenv(SECRET_VARIABLE, "given")
    assert make_secret() == {SECRET_VARIABLE: "given"}


def test_no_other_code_unpickles_what_arrives_over_a_port() -> None:
    """Torch's own collectives of objects load pickles without a signature."""
    unsigned = re.compile(r"\b(all_gather|gather|broadcast|scatter|send|recv)_object(_list)?\(")
    own = re.compile(r"def (broadcast|gather)_object|(?<!dist\.)\bbroadcast_object\(")
    for folder in ("megarecur", "data_prep", "launch"):
        for path in (ROOT / folder).rglob("*.py"):
            for line in path.read_text(encoding="utf-8").splitlines():
                assert not unsigned.search(line) or own.search(line), f"{path}: {line}"
