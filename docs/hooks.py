"""Hooks of mkdocs: what the pages take from the repository and from the code.

In the source of a page,

    <!-- include: ../README.md -->      becomes the text of that file;
    <!-- generated: the table of ... --> becomes what GENERATED makes for this page;

and links that lead out of docs/ lead to the page that includes the file, or become plain text.
"""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import config_pages

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PICTURES = "benchmarks/pictures"

INCLUDE = re.compile(r"<!-- include: (\S+) -->")
GENERATED_MARK = re.compile(r"<!-- generated: [^>]*-->")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)


# -------------------------------------------------------------------------- called by mkdocs


def on_files(files: Any, config: Any) -> Any:
    """Add the pictures of benchmarks/ to the site."""
    from mkdocs.structure.files import File

    for path in sorted((ROOT / PICTURES).iterdir()):
        files.append(File.generated(config, f"pictures/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Assemble the Markdown of a page."""
    return assemble(page.file.src_uri, markdown)


# ---------------------------------------------------------------------------------- assembly


def assemble(page: str, markdown: str) -> str:
    """Return the Markdown of a page with inclusions and generated parts in place.

    Args:
        page: its path below docs/.
        markdown: its source.
    """
    markdown = move_links(markdown, f"docs/{page}")

    def include(found: re.Match[str]) -> str:
        source = posixpath.normpath(f"docs/{found[1]}")
        return move_links((ROOT / source).read_text(encoding="utf-8"), source)

    markdown = INCLUDE.sub(include, markdown)
    parts = iter([make() for make in GENERATED.get(page, ())])
    return GENERATED_MARK.sub(lambda _: next(parts), markdown)


def included_files() -> dict[str, str]:
    """Return the page below docs/ that includes each file of the repository, by the file's path."""
    found = {}
    for page in sorted(DOCS.glob("*.md")):
        for mark in INCLUDE.finditer(page.read_text(encoding="utf-8")):
            found[posixpath.normpath(f"docs/{mark[1]}")] = page.name
    return found


def move_links(markdown: str, source: str) -> str:
    """Return Markdown whose links work in the site.

    Args:
        markdown: text of a file of the repository.
        source: the path of that file, from the root.
    """
    pages, folder = included_files(), posixpath.dirname(source)

    def move(found: re.Match[str]) -> str:
        picture, text, target = found.groups()
        if re.match(r"[a-z]+:|#", target):
            return found[0]
        path, mark, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(folder, path))
        if path in pages:
            return f"{picture}[{text}]({pages[path]}{mark}{anchor})"
        if path.startswith("docs/"):
            return f"{picture}[{text}]({path.removeprefix('docs/')}{mark}{anchor})"
        if path.startswith(PICTURES + "/"):
            return f"{picture}[{text}]({path.removeprefix('benchmarks/')})"
        return text  # A file of the repository that the site does not show.

    pieces, end = [], 0
    for fence in FENCE.finditer(markdown):
        pieces += [LINK.sub(move, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*pieces, LINK.sub(move, markdown[end:])])


# --------------------------------------------------------------------------- generated parts


def table(head: tuple[str, str], rows: Mapping[str, str]) -> str:
    """Return a table in Markdown, its first column as code."""
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    lines += [f"| `{key}` | {escape(meaning)} |" for key, meaning in rows.items()]
    return "\n".join(lines)


def escape(text: str) -> str:
    """Return a text that can stand in a cell of a table."""
    return text.replace("|", "\\|")


def render_run_files() -> str:
    """Return the table of the files of a run folder."""
    from megarecur.launch.folder import FILES

    return table(("file", "contents"), FILES)


def render_metrics() -> str:
    """Return the table of the keys of metrics.jsonl, in sections by their first word."""
    from megarecur.train.metrics import METRICS

    sections: dict[str, dict[str, str]] = {}
    for tag, meaning in METRICS.items():
        sections.setdefault(tag.partition("/")[0] if "/" in tag else "", {})[tag] = meaning
    return "\n\n".join(
        (f"### {name}\n\n" if name else "") + table(("key", "meaning"), rows)
        for name, rows in sections.items()
    )


# ------------------------------------------------------------------------------ map of packages


def read_rooms() -> dict[str, set[str]]:
    """Return the packages that each package of megarecur imports from, lazily or not."""
    rooms: dict[str, set[str]] = {}
    for folder in sorted((ROOT / "megarecur").iterdir()):
        if not (folder / "__init__.py").is_file():
            continue
        names = set()
        for path in folder.resolve().rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.module:
                    names |= {f"{node.module}.{alias.name}" for alias in node.names}
                elif isinstance(node, ast.Import):
                    names |= {alias.name for alias in node.names}
        rooms[folder.name] = {n.split(".")[1] for n in names if n.startswith("megarecur.")}
    return {name: (found & rooms.keys()) - {name} for name, found in rooms.items()}


def place_rooms(rooms: Mapping[str, set[str]]) -> dict[str, int]:
    """Return the floor of each package: one above the highest that it imports from."""
    floors: dict[str, int] = {}

    def place(name: str, above: tuple[str, ...] = ()) -> int:
        if name in above:
            raise ValueError(f"packages import in a circle: {' -> '.join((*above, name))}")
        if name not in floors:
            below = [place(other, (*above, name)) for other in sorted(rooms[name])]
            floors[name] = 1 + max(below, default=-1)
        return floors[name]

    for name in rooms:
        place(name)
    return floors


def draw_rooms() -> str:
    """Return an SVG of the packages by floor, with the imports that no other import implies."""
    rooms = read_rooms()
    floors = place_rooms(rooms)
    reached: dict[str, set[str]] = {}
    for name in sorted(rooms, key=floors.__getitem__):
        reached[name] = rooms[name].union(*(reached[other] for other in rooms[name]))
    width, height, gap, row = 130, 34, 30, 68
    rows = [[n for n in rooms if floors[n] == i] for i in range(max(floors.values()) + 1)]
    across = max(map(len, rows)) * (width + gap) + gap
    places = {}
    for i, names in enumerate(rows):
        left = (across - len(names) * (width + gap) + gap) / 2
        for j, name in enumerate(names):
            places[name] = (left + j * (width + gap), (len(rows) - 1 - i) * row + 8)
    lines, boxes = [], []
    for name, (x, y) in places.items():
        for other in sorted(rooms[name]):
            if not any(other in reached[third] for third in rooms[name] - {other}):
                x2, y2 = places[other]
                lines.append(
                    f'<line x1="{x + width / 2}" y1="{y + height}" x2="{x2 + width / 2}" '
                    f'y2="{y2}" stroke="currentColor" stroke-opacity="0.45"/>'
                )
        boxes.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" '
            'fill="var(--md-default-bg-color, white)" stroke="currentColor"/>'
            f'<text x="{x + width / 2}" y="{y + 22}" text-anchor="middle" font-size="15" '
            f'font-family="monospace" fill="currentColor">{name}</text>'
        )
    size = f"{across} {len(rows) * row}"
    return (
        f'<svg viewBox="0 0 {size}" style="max-width: {across}px; width: 100%" role="img" '
        'aria-label="Packages by floor">' + "".join([*lines, *boxes]) + "</svg>"
    )


GENERATED: dict[str, tuple[Callable[[], str], ...]] = {
    "architecture.md": (draw_rooms,),
    "configuration.md": (config_pages.render_reference,),
    "metrics.md": (render_run_files, render_metrics),
    "rules.md": (config_pages.render_rules, config_pages.render_section_rules),
}
"""What stands in the place of the marks of each page, in order."""
