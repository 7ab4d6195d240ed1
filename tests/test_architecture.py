"""The house of design.md, read from the imports: which way they run, and who may import what."""

from __future__ import annotations

import ast
from collections.abc import Iterator
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
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "megarecur" else ("megarecur", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module or module.name) of every import, lazy and annotation-only ones included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the whole name of the module"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def room(module: str) -> str | None:
    return next((name for name in FLOORS if inside(module, name)), None)


CODE = sources("megarecur", "data_prep", "launch")


def by_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", CODE, ids=by_name)
def test_imports_run_one_way(path: Path) -> None:
    here = room(module_name(path))
    if here is None:
        assert module_name(path) == "megarecur", "a new room needs a floor in FLOORS"
        return
    for line, imported in imports(path):
        there = room(imported)
        if there is None or there == here:
            continue
        where = f"{by_name(path)}:{line}: {here} imports {imported}"
        assert FLOORS[there] < FLOORS[here], f"{where}, which lies above or beside it"
        if here == "megarecur.plot":
            assert there in PLOT_MAY_IMPORT, where
        assert there != "megarecur.plot" or here == "megarecur.launch", where


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


@pytest.mark.parametrize("path", CODE, ids=by_name)
def test_libraries_stay_with_their_owners(path: Path) -> None:
    module = module_name(path)
    for line, imported in imports(path):
        where = f"{by_name(path)}:{line}: {module} imports {imported}"
        if any(inside(module, package) for package in NO_TORCH):
            assert not inside(imported, "torch"), where
        for library, owners in OWNERS.items():
            if inside(imported, library):
                assert any(inside(module, owner) for owner in owners), where


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


@pytest.mark.parametrize("path", sources("megarecur/model", "megarecur/objective"), ids=by_name)
def test_models_hold_mathematics_not_collectives(path: Path) -> None:
    for line, imported in imports(path):
        assert not inside(imported, "torch.distributed"), f"{by_name(path)}:{line}"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr == "distributed":
            pytest.fail(f"{by_name(path)}:{node.lineno}: torch.distributed")


@pytest.mark.parametrize("path", sources("tests"), ids=by_name)
def test_nothing_imports_from_a_test_module(path: Path) -> None:
    """What tests share lies in tests/support, under a name that says what it is."""
    for line, imported in imports(path):
        where = f"{by_name(path)}:{line}: {imported}"
        assert not imported.startswith("test_") and ".test_" not in imported, where


def test_no_room_without_an_idea() -> None:
    nameless = {"utils", "util", "helpers", "helper", "common", "misc"}
    code = sources("megarecur", "data_prep", "launch", "tests", "benchmarks")
    assert [by_name(path) for path in code if path.stem in nameless] == []


@pytest.mark.parametrize("path", CODE, ids=by_name)
def test_nothing_prints_but_say_which_escapes(path: Path) -> None:
    """The package logs; commands use launch/output.py."""
    if by_name(path) == "launch/output.py":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"{by_name(path)}:{node.lineno}"


MAY_RENAME = {"megarecur/files.py"}
"""Whatever appears under its name is written aside and synced first: files.py does that."""


@pytest.mark.parametrize("path", CODE, ids=by_name)
def test_files_are_renamed_in_one_place(path: Path) -> None:
    if by_name(path) in MAY_RENAME:
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner, name = node.func.value, node.func.attr
        module = owner.id if isinstance(owner, ast.Name) else ""
        # One argument: Path.replace; str.replace has two, dataclasses.replace keywords.
        renames = name == "rename" or (name, len(node.args), node.keywords) == ("replace", 1, [])
        renames |= module == "os" and name in ("replace", "renames")
        renames |= module == "shutil" and name == "move"
        assert not renames, f"{by_name(path)}:{node.lineno}: use megarecur.files"


MAY_PARSE_JSON = {
    "megarecur/reading.py",
    # Large messages between ranks, which trust each other; the checks would slow every save.
    "megarecur/checkpoint/planning.py",
}
"""json itself bounds no depth and no digits: reading.py does."""


@pytest.mark.parametrize("path", CODE, ids=by_name)
def test_json_is_parsed_by_one_reader(path: Path) -> None:
    if by_name(path) in MAY_PARSE_JSON or path.name == "hub_model.py":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr in ("load", "loads"):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            assert owner != "json", f"{by_name(path)}:{node.lineno}: use megarecur.reading"


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


@pytest.mark.parametrize("path", PURE, ids=by_name)
def test_public_functions_are_annotated_and_explained(path: Path) -> None:
    for function in public_functions(path):
        where = f"{by_name(path)}:{function.lineno}: {function.name}"
        assert function.returns is not None, where
        given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        unnamed = [a.arg for a in given if a.annotation is None and a.arg not in ("self", "cls")]
        assert not unnamed, f"{where}: {unnamed}"
        assert ast.get_docstring(function), f"{where} has no docstring"
