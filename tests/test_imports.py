"""Imports go one way, and light parts stay light."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# What each part may import of ours, beside itself and `gnp.errors`.
ALLOWED = {
    "errors": set(),
    "files": set(),
    "memory": set(),
    "environment": {"memory"},
    "peers": set(),
    "distributed": {"peers"},
    "command_line": {"config", "peers", "training"},
    "transforms": set(),
    "models": set(),
    "data": {"memory"},
    "config": {"data", "models"},
    "training": {"config", "data", "models", "transforms"},
    "analysis": {"config", "data", "models", "transforms", "training"},
    "report": {"analysis", "config", "command_line"},
    "replay": {"analysis", "config", "training"},
    # gnp/data/preview.py, a command line
    "preview": {"config", "data", "training", "command_line"},
    "prepare": {"data", "command_line"},
    "train": {
        "config",
        "distributed",
        "models",
        "peers",
        "training",
        "replay",
        "report",
        "command_line",
        "environment",
    },
    "evaluate": {"analysis", "config", "environment", "training", "command_line"},
    "export": {"config", "models", "training", "command_line"},
    "sweeps": {
        *("analysis", "config", "data", "training"),
        *("report", "command_line", "environment"),
    },
    "sweep": {"sweeps", "command_line", "environment"},
}


def part_of(path):
    if path == ROOT / "gnp/data/preview.py":
        return "preview"
    return path.relative_to(ROOT / "gnp").parts[0].removesuffix(".py")


def imported(path):
    """Our parts that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "gnp":
            names = [f"gnp.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("gnp."))


FILES = [path for path in sorted((ROOT / "gnp").rglob("*.py")) if part_of(path) != "__init__"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    part = part_of(path)
    allowed = ALLOWED[part] | {part}
    if part != "transforms":
        allowed |= {"errors", "files"}
    assert set(imported(path)) <= allowed


def loaded_after(statement):
    """The names of the modules that a statement loads in a new process."""
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    command = [sys.executable, "-c", code]
    return set(subprocess.run(command, capture_output=True, check=True).stdout.decode().split())


def test_transforms_need_jax_and_optax_alone():
    ours = loaded_after("from gnp import transforms")
    theirs = loaded_after("import jax, optax")
    new = {name for name in ours - theirs if not name.startswith("gnp")}
    assert not new, "modules beside jax, optax and theirs"
    assert {name for name in ours if name.startswith("gnp.")} == {
        name for name in ours if name.startswith("gnp.transforms")
    }


@pytest.mark.parametrize("module", ["gnp.models", "gnp.models.vit", "gnp.transforms"])
def test_light_parts_load_neither_tfds_nor_orbax(module):
    assert not {"tensorflow_datasets", "orbax", "tensorflow"} & loaded_after(f"import {module}")


@pytest.mark.parametrize(
    "module",
    ["gnp.train", "gnp.evaluate", "gnp.export", "gnp.report", "gnp.prepare", "gnp.sweep"],
)
def test_the_command_lines_do_not_wait_for_jax(module):
    """So that --help and a typo answer at once."""
    assert not {"jax", "flax", "orbax", "tensorflow_datasets"} & loaded_after(f"import {module}")
