"""What is asked of measures of sharpness, and the file that they are kept in."""

import copy
import dataclasses
import json
import math

import pytest

from gnp.analysis import measures
from gnp.analysis.measures import Settings
from gnp.errors import UserError

ROW = {
    **{"step": 10, "epoch": 1.5, "split": "train", "num_examples": 100},
    **{"loss": 2.25, "grad_norm": 0.5, "weight_norm": 30.0},
    **{"eigenvalues": [3.0, 1.0], "eigenvalue_errors": [1e-6, 0.25]},
    **{"trace": 5.0, "trace_error": math.nan},
    "density": {"eigenvalue": [0.0, 1.0, 2.0], "density": [0.5, 0.25, 0.0]},
    **{"sam_sharpness": 0.125, "radius": 0.05, "adaptive_lr_variance": None},
    "adaptive_lr_spread": 40.0,
    "surface": {"x": [-1.0, 1.0], "y": [-1.0, 0.0, 1.0], "loss": [[1.0, 2.0]] * 3},
    "settings": {"eigenvalues": 2},
    "checksum": 123,
}


def changed(**values):
    return copy.deepcopy(ROW) | values


def test_rows_are_read_as_they_were_written(tmp_path):
    assert measures.load(tmp_path) == []
    measures.append(tmp_path, ROW)
    measures.append(tmp_path, changed(step=5, surface=None, adaptive_lr_variance=7))
    first, second = measures.load(tmp_path)
    assert (first["step"], second["step"]) == (5, 10)
    assert first["surface"] is None and first["adaptive_lr_variance"] == 7.0
    assert math.isnan(second.pop("trace_error"))
    assert second == {key: value for key, value in ROW.items() if key != "trace_error"}
    lines = (tmp_path / "sharpness.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["trace_error"] is None, "NaN is not JSON"


def test_the_newest_row_of_a_step_counts_and_none_is_lost(tmp_path):
    for loss in (1.0, 2.0):
        measures.append(tmp_path, changed(loss=loss))
    measures.append(tmp_path, changed(step=11))
    assert [row["loss"] for row in measures.load(tmp_path)] == [2.0, 2.25]
    assert [row["loss"] for row in measures.load_all(tmp_path)] == [1.0, 2.0, 2.25]


def test_rows_of_a_checkpoint_that_was_replaced_are_not_current(tmp_path):
    for step, checksum, loss in ((10, 1, 1.0), (10, None, 2.0), (11, 1, 3.0), (10, 2, 4.0)):
        measures.append(tmp_path, changed(step=step, checksum=checksum, loss=loss))
    assert [row["loss"] for row in measures.current(tmp_path)] == [2.0, 3.0, 4.0]


def test_what_is_known_of_a_checkpoint():
    """Rows of two settings, with a surface each, and the newer ones of other examples."""

    def row(name, **settings):
        return {"name": name, "settings": dataclasses.asdict(Settings(**settings))}

    rows = [row("a", surface=3), row("b", radius=0.1, surface=5), row("c", max_examples=9)]

    def known(**settings):
        found = measures.known(rows, Settings(**settings))
        return [each and each.get("name", "not asked for") for each in found]

    assert known() == ["a", "not asked for"]
    assert known(surface=3) == ["a", "a"]
    assert known(surface=5) == ["a", "b"], "which does not depend on the radius"
    assert known(surface=7) == ["a", None]
    assert known(surface=3, extent=2.0) == ["a", None]
    assert known(radius=0.2, surface=3) == [None, "a"]
    assert known(max_examples=9, surface=3) == ["c", None]


def test_a_last_line_without_its_end_is_not_run_into(tmp_path):
    (tmp_path / "sharpness.jsonl").write_text(json.dumps(changed(trace_error=1.0)))
    measures.append(tmp_path, changed(step=11))
    assert [row["step"] for row in measures.load(tmp_path)] == [10, 11]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1]",
        "null",
        "[" * 100_000,
        "9" * 5000,
        *(
            json.dumps(changed(**values))
            for values in (
                {"step": -1},
                {"step": 1.5},
                {"step": True},
                {"step": 10**12},
                {"epoch": None},
                {"split": 3},
                {"num_examples": "many"},
                {"eigenvalues": [1.0]},
                {"eigenvalues": None},
                {"density": {"eigenvalue": [0.0], "density": []}},
                {"density": [0.0]},
                {"surface": {"x": [0.0], "y": [0.0], "loss": [[1.0, 2.0]]}},
                {"surface": {"x": [0.0], "y": [0.0], "loss": [1.0]}},
                {"surface": {"x": [0.0], "y": [0.0]}},
                {"surface": "flat"},
                {"settings": None},
            )
        ),
    ],
)
def test_a_line_that_is_no_row_is_a_user_error_that_names_it(tmp_path, line):
    (tmp_path / "sharpness.jsonl").write_text(f"{json.dumps(changed(trace=1))}\n\n{line}\n")
    with pytest.raises(UserError, match=r"sharpness\.jsonl, line 3 is not a row") as error:
        measures.load(tmp_path)
    assert str(tmp_path) in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("value", [None, "high", True, math.nan, math.inf, 1e300, 10**400, [1]])
def test_what_is_no_number_is_nan(tmp_path, value):
    (tmp_path / "sharpness.jsonl").write_text(json.dumps(changed(trace=value)) + "\n")
    assert math.isnan(measures.load(tmp_path)[0]["trace"])


def test_where_nothing_can_be_read_or_written(tmp_path):
    with pytest.raises(UserError, match="no directory"):
        measures.load(tmp_path / "none")
    (tmp_path / "sharpness.jsonl").mkdir()
    with pytest.raises(UserError, match="no plain file"):
        measures.load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        measures.append(tmp_path / "file", ROW)


def test_a_file_that_is_far_too_large_is_not_read(tmp_path):
    with open(tmp_path / "sharpness.jsonl", "wb") as file:
        file.truncate(300_000_000)  # takes no room
    with pytest.raises(UserError, match="300,000,000 bytes"):
        measures.load(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eigenvalues": 0}, "eigenvalues is 0; it must be 1 or more"),
        ({"max_examples": 0}, "max_examples is 0; it must be 1 or more"),
        ({"ascents": -1}, "ascents is -1; it must be 0 or more"),
        ({"radius": 0.0}, "radius is 0.0; it must be more than 0, and finite"),
        ({"extent": math.inf}, "extent is inf"),
        ({"surface": 501}, "surface is 501, which is 251,001 passes"),
        ({"surface": 1}, "surface is 1; it must be odd and 3 or more"),
        ({"surface": 20}, "surface is 20; it must be odd and 3 or more"),
        ({"eigenvalues": 50}, "lanczos_steps is 40, which gives at most as many eigenvalues"),
        ({"trace_probes": 1}, "trace_probes is 1, but the 2 of density_probes are among them"),
    ],
)
def test_settings_that_make_no_sense(values, message):
    with pytest.raises(UserError, match=message):
        Settings(**values)


def test_how_many_passes_the_measures_take():
    some = Settings(lanczos_steps=10, density_probes=2, trace_probes=5, ascents=3)
    # the gradient, Lanczos, what is left of the trace, SAM's gradients and its loss
    assert some.num_passes == 1 + 2 * 10 + 3 + 3 + 1
