"""The notebook's cells and the README's lines run as they stand, on runs never trained."""

import json
import pathlib
import re

import pytest

from tests.analysis import made_runs

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOK, README = ROOT / "scripts" / "examples" / "analysis.ipynb", ROOT / "README.md"


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """The current folder has the sweep that they name."""
    monkeypatch.chdir(tmp_path)
    errors = {"off": (0.1, 0.12, 0.14), "none": (0.2, 0.22, 0.24), "zero": (0.08, 0.1, 0.09)}
    for policy, of_seeds in errors.items():
        folder = tmp_path / "runs" / "policies" / "trials" / policy
        made_runs.seeds(folder, of_seeds, gr__policy=policy)
    return tmp_path


def test_the_cells(sweep, capsys):
    notebook = json.loads(NOTEBOOK.read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] for cell in cells)
    namespace = {}
    for cell in cells:
        exec(compile("".join(cell["source"]), cell["id"], "exec"), namespace)
    assert len(namespace["table"]) == 9
    shown = namespace["errors"]
    assert shown.loc["none", "mean"] == pytest.approx(22)
    assert shown.loc["zero", "std"] == pytest.approx(1)  # sample: of 8, 10 and 9
    assert (sweep / "gradient_norm_by_policy.pdf").stat().st_size > 1000
    assert capsys.readouterr().out.count(": 3 runs") == 3


def test_the_readmes_lines(sweep):
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    (program,) = (block for block in blocks if "gnp.analysis" in block)
    namespace = {}
    exec(compile(program, "README.md", "exec"), namespace)
    assert len(namespace["table"]) == 9
    assert (sweep / "norms.pdf").stat().st_size > 1000
