"""The house of design.md, read from the imports: which way they run, and who may import what."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

FLOORS = {
    "megarecur.errors": -1,
    "megarecur.progress": 0,
    "megarecur.files": 0,
    "megarecur.lease": 0,
    "megarecur.reading": 0,
    "megarecur.private": 1,
    "megarecur.config": 1,
    "megarecur.recurrence": 2,
    "megarecur.plan": 3,
    "megarecur.parallel": 4,
    "megarecur.attention": 5,
    "megarecur.batch": 6,
    "megarecur.data": 7,
    "megarecur.objective": 8,
    "megarecur.model": 9,
    "megarecur.optim": 10,
    # Fills engines and models from checkpoints; read by training, inference and conversion.
    "megarecur.checkpoint": 11,
    "megarecur.inference": 12,
    "megarecur.serving": 13,
    "megarecur.train": 13,
    "megarecur.convert": 14,
    "megarecur.plot": 15,
    "megarecur.data_prep": 15,
    "megarecur.launch": 16,
}
"""A room imports from itself and from lower floors; names for annotations may come from above."""

PLOT_MAY_IMPORT = {"megarecur.errors", "megarecur.reading", "megarecur.config",
                   "megarecur.recurrence", "megarecur.plan"}  # fmt: skip
"""plot reads files; of the code it needs only what explains a config."""

NO_TORCH = ("megarecur.errors", "megarecur.reading", "megarecur.config", "megarecur.recurrence",
            "megarecur.plan", "megarecur.plot")  # fmt: skip

OWNERS = {
    "streaming": ("megarecur.data", "megarecur.data_prep"),
    "submitit": ("megarecur.launch",),
    "deepspeed": ("megarecur.optim.deepspeed",),
    "tensorboard": ("megarecur.train.metrics",),
    "sacrebleu": ("megarecur.inference.bleu",),
    "torch.utils.tensorboard": ("megarecur.train.metrics",),
    "matplotlib": ("megarecur.plot",),
    "fsspec": ("megarecur.checkpoint.mirror",),
    "pyarrow": ("megarecur.data_prep.tables",),
    "datasets": ("megarecur.data_prep.hub", "megarecur.inference.harness"),
    "lm_eval": ("megarecur.inference.harness", "megarecur.launch.lm_eval"),
    "datasketch": ("megarecur.data_prep.duplicates",),
    "transformers": ("megarecur.convert.hub_model",),
    "fastapi": ("megarecur.serving.app",),
    "starlette": ("megarecur.serving.app",),
    "uvicorn": ("megarecur.serving.server",),
    "typer": ("megarecur.launch",),
    "rich": ("megarecur.launch", "megarecur.data_prep"),
}
"""A library and the only places that may import it."""


def sources(*folders: str) -> list[Path]:
    found = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    assert found, folders
    return found


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "megarecur" else ("megarecur", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache  # Each file is read by several rules.
def nodes_of(path: Path) -> Sequence[ast.AST]:
    """Every node of a file."""
    return tuple(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


@cache
def imports(path: Path) -> Sequence[tuple[int, str]]:
    """(line, module or module.name) of every import, lazy and annotation-only ones included."""
    found: list[tuple[int, str]] = []
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the whole name of the module"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def room(module: str) -> str | None:
    return next((name for name in FLOORS if inside(module, name)), None)


CODE = sources("megarecur", "data_prep", "launch")


def by_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports_between_rooms() -> Iterator[tuple[str, str, str]]:
    """(room, room that it imports from, where) of every import of another room."""
    for path in CODE:
        here = room(module_name(path))
        if here is None:
            assert module_name(path) == "megarecur", f"{path}: a new room needs a floor in FLOORS"
            continue
        for line, imported in imports(path):
            there = room(imported)
            if there is not None and there != here:
                yield here, there, f"{by_name(path)}:{line}: {here} imports {imported}"


def test_imports_run_one_way() -> None:
    found = list(imports_between_rooms())
    upward = [where for here, there, where in found if FLOORS[there] >= FLOORS[here]]
    assert not upward, f"rooms above or beside the importing one: {upward}"
    assert not [
        where
        for here, there, where in found
        if here == "megarecur.plot" and there not in PLOT_MAY_IMPORT
    ]
    assert not [
        where
        for here, there, where in found
        if there == "megarecur.plot" and here != "megarecur.launch"
    ]


MAY_IMPORT_UPWARD = {
    # For an annotation: the context carries the chunks, whose attention reads the context.
    ("megarecur.model.context", "megarecur.model.temporal"),
}
"""(importer, imported) that close a circle between files."""


def test_files_import_in_no_circles() -> None:
    """Between rooms and inside them, lazy and annotation-only imports included."""
    modules = {module_name(path): path for path in CODE}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        found = {
            name if name in modules else name.rpartition(".")[0] for _, name in imports(path)
        } & modules.keys()
        graph[module] = {name for name in found if (module, name) not in MAY_IMPORT_UPWARD}
    for importer, imported in MAY_IMPORT_UPWARD:
        assert imported not in graph[importer] and importer in modules
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def is_foreign(module: str, imported: str) -> bool:
    """Return True if a module may not import something, because of the library that it is of."""
    if inside(imported, "torch") and any(inside(module, package) for package in NO_TORCH):
        return True
    return any(
        inside(imported, library) and not any(inside(module, owner) for owner in owners)
        for library, owners in OWNERS.items()
    )


def test_libraries_stay_with_their_owners() -> None:
    assert not [
        f"{by_name(path)}:{line}: {imported}"
        for path in CODE
        for line, imported in imports(path)
        if is_foreign(module_name(path), imported)
    ]


def test_the_modelling_file_stands_alone() -> None:
    """It is copied into exported folders, and nobody here imports it."""
    path = ROOT / "megarecur/convert/hub_model.py"
    assert not [name for _, name in imports(path) if room(name) or inside(name, "megarecur")]
    own = module_name(path)
    assert not [p for p in CODE if any(inside(name, own) for _, name in imports(p))]


@pytest.mark.parametrize("name", ["cli.py", "prep.py"])
def test_the_command_line_imports_torch_only_inside_commands(name: str) -> None:
    tree = ast.parse((ROOT / "launch" / name).read_text(encoding="utf-8"))
    top = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    top |= {
        alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names
    }
    assert {str(module).split(".")[0] for module in top} <= {
        "__future__", "collections", "errno", "inspect", "megarecur", "pathlib", "sys",
        "time", "typer", "typing",
    }  # fmt: skip
    ours = {
        m for m in top if inside(str(m), "megarecur") and not inside(str(m), "megarecur.launch")
    }
    assert ours <= {"megarecur.errors", "megarecur.reading"}


def test_models_hold_mathematics_not_collectives() -> None:
    files = sources("megarecur/model", "megarecur/objective")
    found = [
        f"{by_name(path)}:{line}"
        for path in files
        for line, imported in imports(path)
        if inside(imported, "torch.distributed")
    ]
    found += [
        f"{by_name(path)}:{node.lineno}"
        for path in files
        for node in nodes_of(path)
        if isinstance(node, ast.Attribute) and node.attr == "distributed"
    ]
    assert not found, f"torch.distributed: {found}"


def test_nothing_imports_from_a_test_module() -> None:
    """What tests share lies in tests/support, under a name that says what it is."""
    files = sources("tests")
    assert not [
        f"{by_name(path)}:{line}: {imported}"
        for path in files
        for line, imported in imports(path)
        if imported.startswith("test_") or ".test_" in imported
    ]


def test_no_room_without_an_idea() -> None:
    nameless = {"utils", "util", "helpers", "helper", "common", "misc"}
    code = sources("megarecur", "data_prep", "launch", "tests", "benchmarks")
    assert [by_name(path) for path in code if path.stem in nameless] == []


def test_nothing_prints_but_say_which_escapes() -> None:
    """The package logs; commands use launch/output.py."""
    found = {
        by_name(path): node.lineno
        for path in CODE
        for node in nodes_of(path)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    }
    assert found.keys() == {"launch/output.py"}, found


MAY_RENAME = {"megarecur/files.py"}
"""Whatever appears under its name is written aside and synced first: files.py does that."""


def renames(node: ast.AST) -> bool:
    """Return True for a call that renames a file."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    owner, name = node.func.value, node.func.attr
    module = owner.id if isinstance(owner, ast.Name) else ""
    # One argument: Path.replace; str.replace has two, dataclasses.replace keywords.
    found = name == "rename" or (name, len(node.args), node.keywords) == ("replace", 1, [])
    found |= module == "os" and name in ("replace", "renames")
    return found or (module == "shutil" and name == "move")


def test_files_are_renamed_in_one_place() -> None:
    found = {
        by_name(path): node.lineno for path in CODE for node in nodes_of(path) if renames(node)
    }
    assert found.keys() == MAY_RENAME, f"use megarecur.files: {found}"


MAY_PARSE_JSON = {
    "megarecur/reading.py",
    # Large messages between ranks, which trust each other; the checks would slow every save.
    "megarecur/checkpoint/planning.py",
}
"""json itself bounds no depth and no digits: reading.py does."""


def parses_json(node: ast.AST) -> bool:
    """Return True for json.load and json.loads."""
    if not isinstance(node, ast.Attribute) or node.attr not in ("load", "loads"):
        return False
    return isinstance(node.value, ast.Name) and node.value.id == "json"


def test_json_is_parsed_by_one_reader() -> None:
    found = {
        by_name(path): node.lineno
        for path in CODE
        if path.name != "hub_model.py"
        for node in nodes_of(path)
        if parses_json(node)
    }
    assert found.keys() == MAY_PARSE_JSON, f"use megarecur.reading: {found}"


def public_functions(path: Path) -> Iterator[ast.FunctionDef]:
    """Functions and methods that others may call; those inside functions are nobody's."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        for node in ast.iter_child_nodes(pending.pop()):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                yield node
            if isinstance(node, ast.ClassDef | ast.If | ast.Try):
                pending.append(node)


PURE = sources("megarecur/config", "megarecur/recurrence", "megarecur/plan")


def what_is_missing(function: ast.FunctionDef) -> list[str]:
    """Return what readers miss: annotations by the name of an argument, and the docstring."""
    given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    missing = [a.arg for a in given if a.annotation is None and a.arg not in ("self", "cls")]
    if function.returns is None:
        missing.append("return")
    if not ast.get_docstring(function):
        missing.append("docstring")
    return missing


def test_public_functions_are_annotated_and_explained() -> None:
    assert not [
        f"{by_name(path)}:{function.lineno}: {function.name}: {missing}"
        for path in PURE
        for function in public_functions(path)
        if (missing := what_is_missing(function))
    ]
