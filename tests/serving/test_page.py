"""The page at /, in a browser: texts token by token, coloured by the loop at which they left."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.browser import NAMES, Browser, find_browser
from support.served import RECURRENT, Served, make_run

pytestmark = pytest.mark.slow

SECONDS = 200
"""Patience with a busy machine."""
WORDS_OF_PAGE = "[...document.querySelectorAll('#text span')].map(part => part.textContent)"
LOOPS_OF_PAGE = (
    "[...document.querySelectorAll('#text span')].slice(1).map(part => +part.dataset.loops)"
)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Browser, Served]]:
    """A server, and a browser at its page."""
    program = find_browser()
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is on the PATH")
    folder = tmp_path_factory.mktemp("page")
    server = Served(make_run(folder / "tiny", RECURRENT), "--device", "cpu")
    page = Browser(program, folder / "profile", f"{server.url}/")
    yield page, server
    page.close()
    assert server.end() == (0, "")


@pytest.fixture
def browser(opened: tuple[Browser, Served]) -> tuple[Browser, Served]:
    """The page of a server, loaded anew and ready for input."""
    page, server = opened
    page.evaluate("window.before = true")
    page.call("Page.navigate", url=f"{server.url}/")
    ready = "document.querySelectorAll('.key').length === 3"
    page.wait_until(f"!window.before && {ready}", SECONDS)
    return opened


def fill(page: Browser, **values: object) -> None:
    """Fill in the form, and press the button."""
    for name, value in values.items():
        page.evaluate(f"document.getElementById('{name}').value = {json.dumps(str(value))}")
    page.evaluate("document.getElementById('go').click()")
    page.wait_until("!document.getElementById('go').disabled", SECONDS)


def test_a_person_sees_at_which_loop_each_token_left(
    browser: tuple[Browser, Served], tmp_path: Path
) -> None:
    page, server = browser
    assert page.evaluate("document.getElementById('model').textContent") == "tiny"
    options = {"prompt": "they can <b>", "max_tokens": 40, "temperature": 0}
    fill(page, exit="confidence", threshold=0.15, **options)
    rule = {"kind": "confidence", "threshold": 0.15}
    wanted = server.complete(**options, exit=rule).choices[0]
    words = page.evaluate(WORDS_OF_PAGE)
    assert words[0] == "they can <b>" and "".join(words[1:]) == wanted.text
    assert page.evaluate(LOOPS_OF_PAGE) == wanted.loops
    assert set(wanted.loops) == {1, 2, 3}
    assert "<b>" in wanted.text, "the model writes a tag"
    assert page.evaluate("document.querySelectorAll('#text b').length") == 0
    assert page.evaluate("document.getElementById('state').textContent") == "done (length)"

    colors = page.evaluate(
        "[...document.querySelectorAll('.key i')].map(key => getComputedStyle(key).backgroundColor)"
    )
    assert len(set(colors)) == 3
    shown = page.evaluate(
        "[...document.querySelectorAll('#text span')].slice(1)"
        ".map(part => getComputedStyle(part).backgroundColor)"
    )
    assert shown == [colors[loops - 1] for loops in wanted.loops]
    keys = page.evaluate("[...document.querySelectorAll('.key')].map(key => key.textContent)")
    for number, key in enumerate(keys, 1):
        assert key.startswith(f"{number} loop")
        assert f": {wanted.loops.count(number)} (" in key

    page.take_screenshot(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    for color in colors:
        rgb = [int(part) for part in color.removeprefix("rgb(").removesuffix(")").split(",")]
        # Each colour covers more than the swatch of the legend.
        assert (abs(pixels.astype(int) - rgb).max(-1) <= 2).sum() > 500, color


def test_errors_are_shown_as_text(browser: tuple[Browser, Served]) -> None:
    page, _ = browser
    fill(page, prompt="the", max_tokens=5, depth=9)
    assert page.evaluate("document.getElementById('state').className") == "error"
    message = page.evaluate("document.getElementById('state').textContent")
    assert message == "depth=9 was never trained; set it to at most 3"


def test_the_page_can_stop_a_text(browser: tuple[Browser, Served]) -> None:
    page, server = browser
    page.evaluate("document.getElementById('prompt').value = 'the'")
    page.evaluate("document.getElementById('max_tokens').value = '4000'")
    page.evaluate("document.getElementById('temperature').value = '0'")
    page.evaluate("document.getElementById('go').click()")
    page.wait_until("document.querySelectorAll('#text span').length > 3", SECONDS)
    page.evaluate("document.getElementById('stop').click()")
    page.wait_until("document.getElementById('state').textContent === 'stopped'", SECONDS)
    page.wait_until("!document.getElementById('go').disabled", SECONDS)
    assert page.evaluate("document.querySelectorAll('#text span').length") < 4000
    deadline = time.monotonic() + SECONDS
    while server.metrics()["running_texts"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert server.metrics()["generated_tokens_total"] < 4000
