"""The lease of a run folder, whatever another process wrote into it."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

import pytest

from megarecur.train.state import RunFolder

CONTENTS = {
    b"\xff\xfe\x00": "\ufffd\ufffd\\x00",
    b"\x1b]52;c;eA==\x07": "\\x1b]52;c;eA==\\x07",
    b"a\nb": "a\\nb",
    b"x" * 5000: "x" * 1000 + ";",
    b"": "another process",
    b"[" * 5000: "[" * 1000 + ";",
}


@pytest.mark.parametrize("content", CONTENTS, ids=range(len(CONTENTS)))
def test_the_holder_of_a_lease_is_named_as_plain_text(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "lease"
    path.write_bytes(content)
    with path.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        folder = RunFolder(tmp_path)
        refusal = folder.open()
        folder.close()
    assert f"is in use by {CONTENTS[content]}" in refusal and refusal.isprintable()


@pytest.mark.parametrize("content", CONTENTS, ids=range(len(CONTENTS)))
def test_a_lease_that_nobody_holds_is_taken(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "lease").write_bytes(content)
    folder = RunFolder(tmp_path)
    assert folder.open() == ""
    assert json.loads((tmp_path / "lease").read_text())["pid"]
    folder.close()
