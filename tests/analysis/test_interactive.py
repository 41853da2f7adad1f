"""The interactive page: what is in its figure, and how it behaves in a browser."""

import html
import json
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from gnp.analysis import interactive
from gnp.analysis.runs import Run
from gnp.errors import UserError
from tests.analysis.runs_in_memory import made_run
from tests.browser import LISTEN, browse, needs_browser

HOSTILE = "</script><script>window.hacked = 1</script><b>bold</b> %{y} %{meta[0]} $x$ &amp;"


def traces_of(figure, axis_title):
    """The traces of the panel with a title."""
    (place,) = (i for i, a in enumerate(figure.layout.annotations) if a.text == axis_title)
    name = f"y{place + 1}" if place else "y"
    return [trace for trace in figure.data if (trace.yaxis or "y") == name]


def test_the_panels_hold_the_runs_values():
    runs = [made_run(gr_policy="off"), made_run(gr_policy="zero")]
    figure = interactive.make(runs)
    for run, trace in zip(runs, traces_of(figure, "test error (%)"), strict=True):
        epochs, errors = run.series("test", "error")
        np.testing.assert_allclose(trace.x, epochs)
        np.testing.assert_allclose(trace.y, 100 * errors)
        np.testing.assert_allclose(np.array(trace.customdata)[:, 1], run.series("test", "step")[1])
    titles = [annotation.text for annotation in figure.layout.annotations]
    assert titles == [
        *("test error (%)", "training loss", "test loss", "gradient norm", "weight norm"),
        *("learning rate", "std of ln 1/√v", "radius r", "ratio λ/r", "final test error (%)"),
    ]
    assert len(traces_of(figure, "radius r")) == 1  # only one has GR
    (first, second) = traces_of(figure, "final test error (%)")
    assert (first.x, first.y) == ((0.3,), (20.0,)) and second.mode == "markers"


def test_a_run_has_one_entry_in_the_legend_and_one_look_in_all_panels():
    figure = interactive.make(
        [made_run(gr_policy=p, seed=s) for p in ("off", "none") for s in (0, 1)]
    )
    shown = [trace.name for trace in figure.data if trace.showlegend]
    assert shown == [f"gr {p}, seed {s}" for p in ("off", "none") for s in (0, 1)]
    for name in shown:
        of_run = [trace for trace in figure.data if trace.name == name]
        assert len({trace.legendgroup for trace in of_run}) == 1 and len(of_run) >= 7
        assert len({trace.marker.color for trace in of_run}) == 1
    assert len({trace.legendgroup for trace in figure.data}) == 4
    colors = {trace.name: trace.line.color for trace in figure.data}
    assert colors["gr off, seed 0"] == colors["gr off, seed 1"] != colors["gr none, seed 0"]


def test_runs_of_equal_names_are_told_apart_by_their_directories():
    names = [
        t.name for t in interactive.make([made_run(workdir="a/x"), made_run(workdir="b/y")]).data
    ]
    assert {*names} == {"x: seed 0", "y: seed 0"}


def test_what_is_not_finite_is_a_gap_and_no_final_point():
    figure = interactive.make([made_run(diverges=4)])
    (errors,) = traces_of(figure, "test error (%)")
    assert errors.y[4:] == (None,) * 6 and None not in errors.y[:4]
    assert not any(trace.mode == "markers" for trace in figure.data)


def test_of_many_rows_a_thousand_are_shown_with_the_first_and_the_last():
    (trace,) = traces_of(interactive.make([made_run(rows=5000)]), "training loss")
    assert len(trace.x) == 1000 and trace.mode == "lines"
    assert (trace.x[0], trace.x[-1]) == pytest.approx((10 / 5000, 10))


def test_names_are_text():
    run = made_run(optimizer_name=HOSTILE, workdir=f"/runs/{HOSTILE.replace('/', '|')}")
    figure = interactive.make([run, made_run()])
    for trace in figure.data:
        assert "<b>" not in trace.name and "%" not in trace.name.replace("&#37;", "")
        assert "<script" not in trace.hovertemplate and "%{meta" not in trace.hovertemplate


def test_without_any_row_there_is_nothing_to_show():
    for runs in ([], [Run(made_run().workdir, {}, {}, None)]):
        with pytest.raises(UserError, match="have logged something"):
            interactive.make(runs)


def test_the_page_is_one_file_of_the_same_bytes(tmp_path):
    runs = [made_run(gr_policy="off"), made_run(gr_policy="zero")]
    path = interactive.write(runs, tmp_path / "page.html")
    page = path.read_text()
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)", page)
    assert "default-src 'none'" in page and "Plotly.newPlot" in page
    assert interactive.write(runs, tmp_path / "again.html").read_bytes() == path.read_bytes()


def test_a_file_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "page.html").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*page\.html"):
        interactive.write([made_run()], tmp_path / "page.html")


# --- In a browser -------------------------------------------------------------------------------

# Clicks through the page, a step after another has been painted, and writes what it sees.
ACT = """<script>
const pause = (ms) => new Promise((done) => setTimeout(done, ms));
const press = (set, to) => document.querySelector(`[data-set=${set}][data-to="${to}"]`).click();
const look = () => ({
  visible: curves._fullData.map((t) => t.visible),
  x: curves._fullData.map((t) => [...t.x]),
  xTitle: curves._fullLayout.xaxis.title.text,
  types: [curves._fullLayout.xaxis.type, curves._fullLayout.yaxis2.type],
  paper: curves._fullLayout.paper_bgcolor,
});
addEventListener("load", async () => {
  await pause(500);
  const seen = {start: look(), names: curves._fullData.map((t) => t.name)};
  seen.legend = [...document.querySelectorAll(".legendtext")].map((e) => e.textContent);
  const curveNumber = seen.names.findIndex((name) => name.includes("&lt;/script"));
  Plotly.Fx.hover(curves, [{curveNumber, pointNumber: 2}], "xy");
  await pause(200);
  seen.hover = [...document.querySelectorAll(".hoverlayer .nums tspan")].map((e) => e.textContent);
  const entry = document.querySelector(".legendtoggle");
  for (const kind of ["mousedown", "mouseup"])
    entry.dispatchEvent(new MouseEvent(kind, {bubbles: true, view: window}));
  await pause(1500);
  seen.hidden = look();
  press("x", 1);
  await pause(300);
  seen.steps = look();
  press("xaxis", "log");
  press("yaxis", "log");
  await pause(300);
  seen.log = look();
  seen.pressed = [...document.querySelectorAll("[aria-pressed=true]")].map((e) => e.textContent);
  paint("dark");
  await pause(300);
  seen.dark = look();
  seen.hacked = window.hacked || 0;
  seen.tools = [...document.querySelectorAll("[data-title]")].map((e) => e.dataset.title);
  seen.said = said;
  const outcome = document.createElement("pre");
  outcome.id = "outcome";
  outcome.textContent = JSON.stringify(seen);
  document.body.append(outcome);
});
</script>"""


@needs_browser
@pytest.mark.slow
def test_in_a_browser(tmp_path):
    hostile = made_run(optimizer_name=HOSTILE, workdir=f"/runs/{HOSTILE.replace('/', '|')}")
    runs = [
        made_run(seed=0),
        made_run(seed=1, gr_policy="zero"),
        hostile,
        made_run(diverges=3, seed=2),
    ]
    path = interactive.write(runs, tmp_path / "page.html")
    page = pathlib.Path(path).read_text()
    assert page.count("<head>") == 1 and page.count("</body>") == 1
    acted = tmp_path / "acted.html"
    acted.write_text(page.replace("<head>", f"<head>{LISTEN}").replace("</body>", f"{ACT}</body>"))
    dumped = browse(acted, "--dump-dom")
    (outcome,) = re.findall(r'<pre id="outcome">(.*?)</pre>', dumped, re.DOTALL)
    seen = json.loads(html.unescape(outcome))
    assert seen["said"] == [] and seen["hacked"] == 0
    assert "Zoom" in seen["tools"] and not any("Share" in title for title in seen["tools"])
    # Every trace of the figure is there, and every run in the legend as it is called.
    figure = interactive.make(runs)
    assert len(seen["start"]["visible"]) == len(figure.data) and all(seen["start"]["visible"])
    called = [html.unescape(trace.name) for trace in figure.data if trace.showlegend]
    assert seen["legend"] == called and len(called) == 4
    assert any(name.startswith(HOSTILE[:20]) for name in called)
    # Hovering over the run of the hostile names shows these as they are.
    name, folder, value, place = seen["hover"]
    assert name == f"{HOSTILE}, gr off, seed 0" and folder == hostile.workdir.name
    assert (value, place) == ("test error (%): 62", "epoch 3, step 300")
    # A click on the first run hides it in every panel, and nothing else.
    group = [trace.legendgroup for trace in figure.data]
    expected = ["legendonly" if name == group[0] else True for name in group]
    assert seen["hidden"]["visible"] == expected and expected.count("legendonly") >= 7
    # Epochs become steps, a hundred each, but of the final values.
    xs = zip(figure.data, seen["start"]["x"], seen["steps"]["x"], strict=True)
    for trace, before, after in xs:
        np.testing.assert_allclose(
            after, np.multiply(before, 1 if trace.mode == "markers" else 100)
        )
    assert (seen["start"]["xTitle"], seen["steps"]["xTitle"]) == ("epoch", "step")
    assert seen["steps"]["types"] == ["linear", "linear"] and seen["log"]["types"] == ["log", "log"]
    assert seen["pressed"] == ["step", "log", "log"]
    assert seen["start"]["paper"] == "#ffffff" and seen["dark"]["paper"] == "#15181c"

    browse(pathlib.Path(path), f"--screenshot={tmp_path / 'page.png'}")
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).reshape(-1, 3)
    blue = np.abs(pixels - np.array([0x1A, 0x7F, 0xC1])).sum(axis=1) < 12
    assert blue.sum() > 200  # a line's colour
    assert (pixels == 255).all(axis=1).mean() > 0.5
