"""The house stands on its ground floor: a part imports, at run time, only parts below it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "stretto"
ORDER = ["core", "timed", "shards", "plan", "losses", "wrapping", "batch_norms", "update", "optim", "models",
         "data", "sparse", "methods", "recipes", "train", "workloads", "measure", "lottery", "adapters", "doctor",
         "commands", "cli", "__main__"]  # fmt: skip
NEVER = {"core": set(ORDER), "optim": set(ORDER), "measure": {"recipes", "methods", "adapters", "cli"}}
FILES = sorted(PACKAGE.rglob("*.py"))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def run_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING`, those inside functions too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and is_type_checking(child):
            children: list[ast.AST] = list(child.orelse)
        else:
            children = [child]
        for each in children:
            yield each
            yield from run_time_nodes(each)


def imported(tree: ast.Module) -> set[str]:
    """The parts of stretto that a module imports."""
    names: set[str] = set()
    for node in run_time_nodes(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level < 2, "imports from another folder are written in full"
            if node.module == "stretto":  # parts, or the public names of __init__, which all may read
                names |= {f"stretto.{alias.name}" for alias in node.names if alias.name in ORDER}
            elif node.level == 0 and node.module:
                names.add(node.module)
    return {name.split(".")[1] for name in names if is_ours(name)}


def is_ours(name: str) -> bool:
    return name.startswith("stretto.")


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_arrow_points_upward(path):
    """A core that knows its methods, an apparatus that knows what it measures, circles."""
    mine = part(path)
    found = imported(ast.parse(path.read_text(), str(path)))
    if mine == "__init__":
        return
    found -= {mine}
    assert not found & NEVER.get(mine, set()), f"{mine} imports {', '.join(sorted(found & NEVER[mine]))}"
    assert mine in ORDER, f"{mine} has no place in the house yet: put it into ORDER"
    below = set(ORDER[: ORDER.index(mine)])
    assert found <= below, f"{mine} imports {', '.join(sorted(found - below))}, which stand above it"


def test_the_reader_of_imports_sees_what_it_must():
    """A test of imports that finds none."""
    text = "\n".join([
        "from typing import TYPE_CHECKING", "import stretto.plan", "from stretto import optim",
        "if TYPE_CHECKING:", "    from stretto.cli import main", "else:", "    import stretto.data.tokens",
        "def f():", "    from stretto.train.trainer import Trainer",
    ])  # fmt: skip
    assert imported(ast.parse(text)) == {"plan", "optim", "data", "train"}
    assert len(FILES) > 20
