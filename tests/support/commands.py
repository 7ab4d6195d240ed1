"""The command line in this process, and a program that lists its heavy imports."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from megarecur.launch.cli import main

CHECK_WITHOUT_TORCH = """
import sys
from megarecur.launch.cli import main
try:
    main()
finally:
    print(sorted({"torch", "matplotlib", "streaming"} & set(sys.modules)), file=sys.stderr)
"""


def megarecur(capture: pytest.CaptureFixture[Any], *arguments: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command, in this process."""
    before, sys.argv = sys.argv, ["megarecur", *map(str, arguments)]
    try:
        main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    finally:
        sys.argv = before
    captured = capture.readouterr()
    return code, captured.out, captured.err
