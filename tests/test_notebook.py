"""The notebook's cells run as they stand, on runs that were never trained."""

import json
import pathlib

import pytest

from tests.analysis import made_runs

NOTEBOOK = pathlib.Path(__file__).parents[1] / "scripts" / "examples" / "analysis.ipynb"


def test_the_cells(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    errors = {"off": (0.1, 0.12, 0.14), "none": (0.2, 0.22, 0.24), "zero": (0.08, 0.1, 0.09)}
    for policy, of_seeds in errors.items():
        folder = tmp_path / "runs" / "policies" / "trials" / policy
        made_runs.seeds(folder, of_seeds, gr__policy=policy)
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
    assert (tmp_path / "gradient_norm_by_policy.pdf").stat().st_size > 1000
    assert capsys.readouterr().out.count(": 3 runs") == 3
