"""Imports point one way, and PyTorch stays out of what runs."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("core_jax", "vlv_jax", "massv_jax", "miniature", "configs", "launch")

# package -> packages of ours that it must not import, at any depth of the code.
FORBIDDEN = {
    "core_jax": {"vlv_jax", "massv_jax", "miniature", "configs", "launch", "tests"},
    "vlv_jax": {"massv_jax", "miniature", "configs", "launch", "tests"},
    "massv_jax": {"vlv_jax", "miniature", "configs", "launch", "tests"},
    "miniature": {"massv_jax", "launch", "tests"},
    "configs": {"launch", "tests"},
    # Its plans are of what others may install: only what runs is imported.
    "launch": {"miniature", "benchmarks", "tests"},
}
# Between packages that meet in a command only, an import inside a function is allowed.
FORBIDDEN_AT_MODULE_LEVEL = {"miniature": {"vlv_jax", "massv_jax"}}
ORACLES = {"torch", "diffusers", "torchvision", "accelerate"}


def _files(folder):
    return sorted(p for p in (ROOT / folder).rglob("*.py") if "checkpoints" not in p.parts)


def _imported(nodes):
    """(top-level package, line) of every import among the nodes; relative ones stay inside."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0], node.lineno


def _at_module_level(tree):
    """Statements that run when the module is imported, those in `if` and `try` included."""
    todo = list(tree.body)
    while todo:
        node = todo.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            todo.extend(ast.iter_child_nodes(node))


def _violations(source, forbidden, forbidden_at_module_level=frozenset()):
    tree = ast.parse(source)
    found = {(name, line) for name, line in _imported(ast.walk(tree)) if name in forbidden}
    found |= {
        (name, line)
        for name, line in _imported(_at_module_level(tree))
        if name in forbidden_at_module_level
    }
    return sorted(found)


def test_the_checker_sees_what_it_should():
    source = "if 1:\n  import torch.nn\ndef f():\n  from vlv_jax.train import x\n  import torch"
    assert _violations(source, {"vlv_jax"}, {"torch"}) == [("torch", 2), ("vlv_jax", 4)]
    assert _violations("from . import massv_jax\nimport core_jax", {"massv_jax"}) == []
    assert _violations("class A:\n  import diffusers", (), ORACLES) == [("diffusers", 2)]


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package):
    problems = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file in _files(package)
        for name, line in _violations(
            file.read_text(), FORBIDDEN[package], FORBIDDEN_AT_MODULE_LEVEL.get(package, set())
        )
    ]
    assert not problems, "\n".join(problems)


def test_nobody_imports_launch():
    """It starts the others, as processes; what they share with it is in core_jax."""
    allowed = {package for package in PACKAGES if "launch" not in FORBIDDEN[package]}
    assert allowed == {"launch"}


def test_printing_a_launch_needs_no_jax():
    code = "import sys, launch.__main__; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_pytorch_is_imported_lazily():
    problems = [
        f"{file.relative_to(ROOT)}:{line} imports {name} when it is imported"
        for folder in (*PACKAGES, "tests")
        for file in _files(folder)
        for name, line in _violations(file.read_text(), (), ORACLES)
    ]
    assert not problems, "\n".join(problems)


def _plain_imports(source):
    """Lines that import PyTorch by a statement, which fails where it is not installed."""
    return [line for name, line in _imported(ast.walk(ast.parse(source))) if name == "torch"]


def test_tests_skip_themselves_without_pytorch():
    """They run on the newest Python and jax too, for which there may be no PyTorch."""
    assert _plain_imports("import numpy\ndef f():\n  import torch.nn as nn") == [3]
    assert _plain_imports('torch = pytest.importorskip("torch")') == []
    problems = [
        f'{file.relative_to(ROOT)}:{line}: write torch = pytest.importorskip("torch")'
        for file in _files("tests")
        for line in _plain_imports(file.read_text())
    ]
    assert not problems, "\n".join(problems)
