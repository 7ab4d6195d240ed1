"""Pages of the documentation: their links, their blocks, and what the code generates of them."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import pytest
import yaml
from support.markdown import (
    LINK,
    PAGES,
    ROOT,
    explain_metric,
    read_anchors,
    read_blocks,
    read_prose,
)

from megarecur.train.metrics import METRICS

LINKED = (
    *PAGES,
    ROOT / "CHANGELOG.md",
    ROOT / "benchmarks/RESULTS.md",
    *sorted((ROOT / ".github").rglob("*.md")),
)


def by_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs/hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", LINKED, ids=by_name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(read_prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{by_name(page)}: {target}"
        assert found.is_relative_to(ROOT), f"{by_name(page)}: {target}"
        if anchor:
            assert anchor in read_anchors(found), f"{by_name(page)}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_every_block_has_a_language_that_is_tested(page: Path) -> None:
    for block in read_blocks(page):
        assert block.language in ("sh", "python", "yaml", "text"), block.where
        assert not block.why_not or block.language in ("sh", "python"), block.where
        if block.language == "yaml":
            assert isinstance(yaml.safe_load(block.text), dict), block.where
    hidden = re.findall(r"^(?: {4}|\t)(?:megarecur|make|sbatch|python) .*", read_prose(page), re.M)
    assert not hidden, f"{by_name(page)}: put commands into fenced blocks: {hidden}"


def test_the_readme_is_short() -> None:
    assert (ROOT / "README.md").stat().st_size <= 9_000


def test_every_page_is_in_the_navigation_and_can_be_reached_from_the_readme() -> None:
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    listed = re.findall(r"^ *- .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.M)
    assert sorted(listed) == sorted(pages)
    targets = [target for page in PAGES for target in LINK.findall(read_prose(page))]
    linked = {Path(target.partition("#")[0]).name for target in targets}
    includes = {p.name for p in PAGES if "<!-- include:" in p.read_text(encoding="utf-8")}
    assert pages - includes <= linked


def test_pages_are_assembled_from_files_and_from_code(hooks: ModuleType) -> None:
    for page in sorted((ROOT / "docs").glob("*.md")):
        source = page.read_text(encoding="utf-8")
        marks = len(hooks.GENERATED_MARK.findall(source))
        assert marks == len(hooks.GENERATED.get(page.name, ())), page.name
        text = hooks.assemble(page.name, source)
        assert "<!-- include" not in text and "<!-- generated" not in text, page.name
        for target in LINK.findall(hooks.FENCE.sub("", text)):
            path = target.partition("#")[0]
            if path and not re.match(r"[a-z]+:", path):
                at_home = (ROOT / "docs" / path).exists()
                assert at_home or (ROOT / "benchmarks" / path).exists(), f"{page.name}: {target}"


def test_included_pages_link_to_pages_of_the_site(hooks: ModuleType) -> None:
    text = hooks.assemble("index.md", "<!-- include: ../README.md -->")
    assert "](getting-started.md)" in text and "](results.md)" in text
    assert "](pictures/layer_map.png)" in text
    assert "of\n[configs" not in text and "](configs/" not in text


def test_the_map_of_packages_is_drawn_from_the_imports(hooks: ModuleType) -> None:
    floors = hooks.place_rooms(hooks.read_rooms())
    assert floors["config"] < floors["recurrence"] < floors["plan"] < floors["model"]
    assert max(floors, key=floors.__getitem__) == "launch"
    drawn = hooks.draw_rooms()
    assert all(f">{name}</text>" in drawn for name in floors)
    listed = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/architecture.md").read_text(), re.M))
    assert set(floors) <= listed
    with pytest.raises(ValueError, match="a -> b -> a"):
        hooks.place_rooms({"a": {"b"}, "b": {"a"}})


def test_metrics_are_explained_by_pattern() -> None:
    assert explain_metric("train/loss") == METRICS["train/loss"]
    assert explain_metric("val/depth_4/exit_1/loss") == METRICS["val/depth_{n}/{metric}"]
    assert explain_metric("recurrence/halted_at/03") == METRICS["recurrence/halted_at/{steps}"]
    assert explain_metric("train/losses") is None and explain_metric("speed/made_up") is None


def test_the_table_of_metrics_names_only_what_the_code_writes() -> None:
    folders = ("train", "model", "optim", "objective", "checkpoint")
    code = "".join(
        re.sub(r"METRICS = \{.*?\n\}", "", path.read_text(encoding="utf-8"), flags=re.S)
        for folder in folders
        for path in (ROOT / "megarecur" / folder).rglob("*.py")
    )
    for tag in METRICS:
        for word in re.sub(r"\{\w+\}", " ", tag).replace("/", " ").split():
            assert word in code, f"{tag}: nothing writes {word}"
