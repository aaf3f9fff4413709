"""README tells the truth: its commands exist, its tree is the tree, its links lead somewhere, its example runs."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from sparsek_dist.cli import parse

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = [path for path in ROOT.rglob("*.md") if not {".venv", "runs", ".cache"} & set(path.relative_to(ROOT).parts)]


def _blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for name, text in fenced if name == language]


def _commands() -> list[list[str]]:
    return [shlex.split(line) for block in _blocks("sh") for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize("command", _commands(), ids=" ".join)
def test_commands_exist(command):
    if command[0] == "make":
        known = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert command[1] in known
        settings = dict(word.split("=", 1) for word in command[2:])
        assert set(settings) <= {"ARGS", "CONFIG"}
        assert (ROOT / settings.get("CONFIG", "configs/quickstart.yaml")).is_file()
    else:
        assert command[0] == ".venv/bin/sparsek"
        parse(command[1:])


def test_tree_names_what_is_there():
    tree = next(block for block in _blocks("") if "kernels/sparsek_kernels/" in block)
    folder = ROOT
    named = set()
    for line in tree.splitlines():
        names = [word for word in line.split("   ")[0].split() if word.endswith(("/", ".py"))]
        folder = ROOT if not line.startswith(" ") else ROOT / "sparsek_dist"
        for name in names:
            assert (folder / name).exists(), name
            named.add((folder / name).relative_to(ROOT).parts[0])
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout of git, as in an image: what is tracked is not known")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    folders = {path.split("/")[0] for path in tracked if "/" in path and not path.startswith(".")}
    assert folders <= named, folders - named


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_stands_twice(document):
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    long = [part for part in re.split(r"\n\n|\n(?=- )", text) if len(part) > 200 or part.startswith("#")]
    assert len(long) == len(set(long)), {part[:80] for part in long if long.count(part) > 1}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
        assert (document.parent / target).exists(), target


def test_files_named_in_backticks_exist():
    for document in DOCUMENTS:
        for name in re.findall(
            r"`((?:tests|configs|launch|docs|benchmarks)/[\w./-]+)(?:::\w+)?`", document.read_text()
        ):
            assert (ROOT / name).exists(), f"{document.name}: {name}"


def test_the_python_example_runs():
    for block in _blocks("python"):
        exec(block, {})
