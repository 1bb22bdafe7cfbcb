"""Imports go one way: from what a user runs down to what knows nothing of users."""

import ast
from pathlib import Path

import pytest

import eurollm_jax

PACKAGE = Path(eurollm_jax.__file__).parent
LEVELS = [  # each may import its own level's own package, and what stands below
    {"__main__"},
    {"cli"},
    {"hf", "ablation", "cluster"},
    {"training", "experiment"},  # an Experiment holds schedules and optimizers; the loop reads an Experiment
    {"evaluation"},
    {"model", "data"},
    {"parallel", "corpus"},
    {"languages"},
    {"errors"},
]
MEETING_POINT = "eurollm_jax.data.batch"  # the one module of data/ that model/ may import
WITHOUT_JAX = ("corpus", "data")


def level(part: str) -> int:
    return next(i for i, parts in enumerate(LEVELS) if part in parts)


def imports(path: Path) -> list[str]:
    tree = ast.parse(path.read_text())
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names.append(node.module or "")
    return names


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    part = part_of(path)
    for name in imports(path):
        if not name.startswith("eurollm_jax."):
            continue
        other = name.split(".")[1]
        if other == part or name == MEETING_POINT or {other, part} == {"training", "experiment"}:
            continue
        assert level(other) > level(part), f"{path} ({part}) imports {name} ({other})"


@pytest.mark.parametrize("path", [path for path in MODULES if part_of(path) in WITHOUT_JAX], ids=str)
def test_corpus_and_data_do_without_jax(path):
    for name in imports(path):
        assert name.split(".")[0] not in {"jax", "jaxlib", "flax", "optax", "orbax"}, f"{path} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) <= 400
