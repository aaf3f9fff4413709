"""What keeps the code readable, as tests: floors' sole importers, no shadowing package, files one can hold."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("sparsek_dist", "kernels/sparsek_kernels")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

SOLE_IMPORTERS = {
    "omegaconf": ("sparsek_dist/settings.py",),
    "deepspeed": (
        "sparsek_dist/attention/ulysses.py",
        "sparsek_dist/parallel/comm.py",
        "sparsek_dist/parallel/loss.py",
        "sparsek_dist/parallel/rendezvous.py",
        "sparsek_dist/training/engine.py",
    ),
    "transformers": ("sparsek_dist/models/", "sparsek_dist/generation/"),
    "datasets": ("sparsek_dist/data/",),
    "peft": ("sparsek_dist/models/lora.py",),
    "mpi4py": ("sparsek_dist/parallel/rendezvous.py",),
    "tensorboard": ("sparsek_dist/training/metrics.py",),
    "torch.utils.tensorboard": ("sparsek_dist/training/metrics.py",),
    "matplotlib": (
        "sparsek_dist/evaluation/plots.py",
        "sparsek_dist/models/observe.py",
        "sparsek_dist/training/metrics.py",
    ),
}

LONGEST_FILE, LONGEST_FUNCTION = 320, 70


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("library", SOLE_IMPORTERS)
def test_each_heavy_library_has_its_importers(library):
    importers = {
        str(path.relative_to(ROOT))
        for path in SOURCES
        if any(name == library or name.startswith(library + ".") for name in _imports(path))
    }
    allowed = SOLE_IMPORTERS[library]
    assert all(name.startswith(allowed) for name in importers), importers
    assert importers or library == "tensorboard", f"{library} is a dependency that nothing imports"


def test_kernels_is_a_folder_and_not_a_package():
    # A package of this name would shadow Hugging Face's `kernels` for everyone who runs from the repository's root.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_kernels_need_torch_only():
    for path in (ROOT / "kernels" / "sparsek_kernels").rglob("*.py"):
        roots = {name.split(".")[0] for name in _imports(path)}
        assert not roots & {"sparsek_dist", "omegaconf", "transformers", "deepspeed", "datasets"}, path


def test_the_reference_shares_no_code_with_what_it_judges():
    assert not any("sparsek" in name for name in _imports(ROOT / "kernels" / "sparsek_kernels" / "reference.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_can_be_held_in_mind(path):
    text = path.read_text()
    assert len(text.splitlines()) <= LONGEST_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            documented = ast.get_docstring(node) or ""
            assert length - len(documented.splitlines()) <= LONGEST_FUNCTION, node.name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled_by_us_and_nothing_swallowed(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: a bare except"
            swallows = len(node.body) == 1 and isinstance(node.body[0], ast.Pass)
            assert not swallows, f"line {node.lineno}: an error that disappears"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
            called = ast.unparse(node.func)
            safe = any(
                keyword.arg == "weights_only" and ast.unparse(keyword.value) == "True" for keyword in node.keywords
            )
            assert called not in ("torch.load", "pickle.load") or safe, f"line {node.lineno}: {called}"
