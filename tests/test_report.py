"""The report of a run, and its figures."""

import collections
import html.parser
import json
import os
import pathlib
import re
import subprocess
import sys
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from gnp import report
from gnp.analysis import figures, runs
from gnp.analysis.page import document
from gnp.errors import UserError

ALWAYS = ["Error", "Loss", "Gradient norm", "Learning rate", "Weight norm"]
VOID = {"meta", "br", "hr", "input"}


def config(policy="zero", decay="scheduled", **fields):
    return {
        "seed": 3,
        "epochs": 10.0,
        "model": {"name": "vit_ti"},
        "data": {"name": "cifar10", "batch_size": 256},
        "optimizer": {"name": "adam"},
        "weight_decay": {"kind": decay, "value": 0.0005},
        "lr": {"base": 0.001, "schedule": "cosine", "warmup": "2ep"},
        "gr": {"policy": policy, "radius": 0.1, "ratio": 0.8, "warmup": None},
    } | fields


def rows(policy="zero", decay="scheduled", epochs=10):
    for epoch in range(1, epochs + 1):
        at = {"step": 20 * epoch, "epoch": float(epoch), "wall_time": 9.0 * epoch}
        train = {
            "loss": 2 / epoch,
            "error": 0.9 / epoch,
            "learning_rate": 0.001 / epoch,
            "grad_norm": 1 + 1 / epoch,
            "weight_norm": 50.0 + epoch,
            "images_per_second": 1000.0,
        }
        if policy != "off":
            on = epoch > 2
            train |= {"perturbed_grad_norm": 3.0 if on else None, "radius": 0.1, "ratio": 0.8 * on}
        if decay == "scheduled":
            train["swd_factor"] = 100.0 * epoch
        yield at | {"split": "train"} | train
        yield at | {"split": "test", "loss": 1 + 1 / epoch, "error": 0.2 + 0.6 / epoch}


RESULT = {
    "steps": 200,
    "epochs": 10.0,
    "wall_time": 3723.0,
    "params_sha256": "abc123",
    "train": {"loss": 0.2, "error": 0.09},
    "test": {"loss": 1.1, "error": 0.26},
    "command": "python -m gnp.train --config=a.py --workdir=b",
    "num_params": 5362762,
    "devices": "cpu × 1",
}


def make(workdir, config_=None, rows_=None, result=RESULT):
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(json.dumps(config_ or config()))
    lines = [json.dumps(row) + "\n" for row in (rows() if rows_ is None else rows_)]
    (workdir / "metrics.jsonl").write_text("".join(lines))
    if result is not None:
        (workdir / "result.json").write_text(json.dumps(result))
    return workdir


class Page(html.parser.HTMLParser):
    """A report as elements and text; asserts that every element is closed where it should be."""

    def __init__(self, path):
        super().__init__()
        self.source = pathlib.Path(path).read_text(encoding="utf-8")
        self.elements = []  # (tag, attributes)
        self.texts = collections.defaultdict(list)  # innermost tag → texts
        self._open = []
        self.feed(self.source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert "svg" in self._open  # HTML's own elements have no <x/>
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open:
            self.texts[self._open[-1]].append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self):
        return " ".join("".join(part) for part in self.texts.values())

    def titles(self):
        return self.texts["h3"]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return Page(report.write(make(tmp_path_factory.mktemp("page") / "run")))


def test_the_report_lies_in_the_work_directory(tmp_path):
    assert report.write(make(tmp_path)) == tmp_path / "report.html"


def test_the_page_needs_nothing_from_outside(page):
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "img", "image", "iframe", "object", "embed", "base"}
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if not name.startswith("xmlns"):
                assert "//" not in (value or ""), (tag, name, value)
            if name in ("href", "src", "xlink:href"):
                assert value.startswith("#"), (tag, name, value)
    styles = "".join(page.texts["style"])
    assert "@import" not in styles and "url(" not in styles


def test_the_figures_are_xml_and_share_the_page(page):
    svgs = re.findall(r"<svg.*?</svg>", page.source, re.DOTALL)
    assert len(svgs) == len(page.all("svg")) == len(page.titles())
    ids = collections.Counter(attributes.get("id") for _, attributes in page.elements)
    del ids[None]
    assert ids and max(ids.values()) == 1
    for svg in svgs:
        root = ElementTree.fromstring(svg)
        own = {element.get("id") for element in root.iter()}
        used = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
        assert used and used <= own
        assert root.get("viewBox") and not root.get("width")
        assert not root.findall(".//{*}style")  # it would apply to the page
        assert figures.INK not in svg and "currentColor" in svg
        assert root.findall(".//{*}text")  # text is text


def test_the_page_is_accessible(page):
    assert page.all("html") == [{"lang": "en"}]
    assert page.texts["title"] == ["vit_ti on cifar10: run"]
    assert page.texts["h1"] == ["vit_ti on cifar10"]
    viewport = [meta["content"] for meta in page.all("meta") if meta.get("name") == "viewport"]
    assert viewport == ["width=device-width, initial-scale=1"]
    for svg, title in zip(page.all("svg"), page.titles(), strict=True):
        assert svg["role"] == "img" and svg["aria-label"].startswith(title)
    label = page.all("svg")[0]["aria-label"]
    assert "test: 80.00\xa0% at epoch 1, 26.00\xa0% at epoch 10." in label
    assert "prefers-color-scheme: dark" in page.source and "@media print" in page.source


def test_the_head_shows_the_final_figures(page):
    values = [text.strip() for text in page.texts["dd"] if text.strip()]
    assert values == [
        *("26.00\xa0%", "9.00\xa0%", "1.1000", "0.2000"),
        *("10", "1\xa0h 02\xa0min", "5,362,762", "cpu × 1"),
    ]
    assert "finished" in page.text() and "not finished" not in page.text()
    for part in ("zero-warmup (r = 0.1, λ/r = 0.8)", "scheduled weight decay 0.0005", "abc123"):
        assert part in page.text()


def test_the_configuration_and_the_command_are_there(page):
    assert page.texts["caption"][:3] == ["config", "model", "data"]
    assert {"batch_size", "policy", "warmup"} <= set(page.texts["th"])
    assert {"256", "zero", "2ep", "–", "10.0"} <= set(page.texts["td"])
    assert page.texts["span"] == RESULT["command"].split()


def test_a_given_command_replaces_that_of_the_result(tmp_path):
    page = Page(report.write(make(tmp_path), command="python mine.py"))
    assert page.texts["span"] == ["python", "mine.py"]
    page = Page(report.write(make(tmp_path, result=RESULT | {"command": None})))
    assert "not recorded" in " ".join(page.texts["span"])


HOSTILE = "</code><script>alert(1)</script><img src=x onerror='a()'>&amp;\"$title ${x}\\1"


def test_hostile_strings_are_text(tmp_path):
    settings = config(
        model={"name": HOSTILE, HOSTILE: HOSTILE},
        data={"name": HOSTILE, "batch_size": HOSTILE},
        gr={"policy": HOSTILE, "radius": HOSTILE},
        seed=HOSTILE,
    )
    settings[HOSTILE] = {HOSTILE: [HOSTILE]}
    result = RESULT | {"devices": HOSTILE, "params_sha256": HOSTILE}
    workdir = make(tmp_path / HOSTILE.replace("/", "|"), settings, result=result)
    page = Page(report.write(workdir, command=HOSTILE))
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img"}
    assert "".join(page.texts["span"]) == HOSTILE.replace(" ", "")
    for tag in ("td", "th", "caption", "dd"):
        assert any(HOSTILE in text for text in page.texts[tag]), tag
    assert page.texts["title"] == [f"{HOSTILE} on {HOSTILE}: {workdir.name}"]


def test_text_that_is_not_utf_8_is_shown_with_a_stand_in(tmp_path):
    page = Page(report.write(make(tmp_path), command="python \udcff.py"))
    assert page.texts["span"] == ["python", "?.py"]


@pytest.mark.parametrize(
    ("policy", "decay", "more"),
    [
        ("zero", "scheduled", ["Radius and ratio", "Scheduled weight decay"]),
        ("r", "decoupled", ["Radius and ratio"]),
        ("off", "scheduled", ["Scheduled weight decay"]),
        ("off", "none", []),
    ],
)
def test_the_report_has_the_figures_that_have_data(tmp_path, policy, decay, more):
    settings = config(policy, decay)
    page = Page(report.write(make(tmp_path, settings, rows(policy, decay))))
    assert sorted(page.titles()) == sorted(ALWAYS + more)
    assert ("at θ + ε" in page.texts["text"]) == (policy != "off")
    assert "at θ" in page.texts["text"]


def test_an_unfinished_run_says_so_and_shows_its_last_values(tmp_path):
    page = Page(report.write(make(tmp_path, rows_=rows(epochs=4), result=None)))
    assert "not finished: at epoch 4 of 10" in page.texts["p"]
    assert "✓" not in page.texts["p"]
    values = [text.strip() for text in page.texts["dd"] if text.strip()]
    assert values == ["35.00\xa0%", "22.50\xa0%", "1.2500", "0.5000", "4", "36\xa0s"]
    assert len(page.titles()) == 7


def test_a_run_without_test_rows(tmp_path):
    train = [row for row in rows() if row["split"] == "train"]
    page = Page(report.write(make(tmp_path, rows_=train, result=None)))
    assert page.texts["dd"][0].strip() == "–"
    assert "test" not in page.texts["text"]
    assert len(page.titles()) == 7


def test_a_run_that_has_logged_nothing(tmp_path):
    page = Page(report.write(make(tmp_path, rows_=[], result=None)))
    assert "Nothing has been logged yet." in page.texts["p"]
    assert "not finished: at epoch 0 of 10" in page.texts["p"] and page.all("svg") == []
    assert "diverged" not in page.text()


def test_one_row_is_seen_as_a_marker(tmp_path):
    one = [row for row in rows(epochs=3) if row["epoch"] == 3.0]
    workdir = make(tmp_path, rows_=one, result=None)
    page = Page(report.write(workdir))
    assert len(page.titles()) == 7
    for draw in (figures.error, figures.learning_rate, figures.regularization):
        for line in draw(runs.load(workdir)).axes[0].lines:
            assert line.get_marker() == "o" and line.get_markevery() == 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bad", [float("nan"), None, float("inf"), -float("inf")])
def test_values_that_are_not_finite_leave_gaps(tmp_path, bad):
    broken = [
        {
            k: bad if isinstance(v, float) and k not in ("epoch", "wall_time") else v
            for k, v in row.items()
        }
        if row["epoch"] > 7
        else row
        for row in rows()
    ]
    page = Page(report.write(make(tmp_path, rows_=broken, result=None)))
    assert len(page.titles()) == 7
    assert "diverged: the last training loss is not finite" in page.texts["p"]
    assert "at epoch 7." in page.all("svg")[0]["aria-label"]
    numbers = re.findall(r'\bd="([^"]*)"', page.source)
    assert numbers and not any("nan" in path or "inf" in path for path in numbers)


def test_a_metric_without_any_value_leaves_no_trace(tmp_path):
    none = {"swd_factor": None, "perturbed_grad_norm": None}
    missing = [row | (none if row["split"] == "train" else {}) for row in rows()]
    page = Page(report.write(make(tmp_path, rows_=missing)))
    assert "Scheduled weight decay" not in page.titles() and len(page.titles()) == 6
    assert "at θ" in page.texts["text"] and "at θ + ε" not in page.texts["text"]


def test_the_same_run_gives_the_same_bytes(tmp_path):
    first = report.write(make(tmp_path / "run")).read_bytes()
    assert report.write(tmp_path / "run").read_bytes() == first
    code = f"from gnp import report; report.write({str(tmp_path / 'run')!r})"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
    assert (tmp_path / "run" / "report.html").read_bytes() == first


def test_many_rows_make_a_small_page(tmp_path):
    random = np.random.default_rng(0)
    many = (
        {"step": i, "epoch": i / 200, "split": "train", "loss": x, "grad_norm": x}
        for i, x in enumerate(random.uniform(0.1, 1, 20_000))
    )
    assert report.write(make(tmp_path, rows_=many)).stat().length < 1_000_000


def test_the_command_line(tmp_path):
    good = make(tmp_path / "good")
    command = [sys.executable, "-m", "gnp.report"]
    done = subprocess.run([*command, good], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == f"{good / 'report.html'}\n"
    done = subprocess.run([*command, tmp_path / "none"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and f"no directory {tmp_path / 'none'}" in done.stderr


def test_a_directory_that_cannot_be_written_is_a_user_error(tmp_path):
    workdir = make(tmp_path)
    (workdir / "report.html").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*report\.html"):
        report.write(workdir)


# --- Figures ------------------------------------------------------------------------------------

RUN_FIGURES = (
    figures.error,
    figures.loss,
    figures.gradient_norm,
    figures.regularization,
    figures.learning_rate,
    figures.weight_norm,
    figures.decay_factor,
)


def shades(figure):
    """The intervals of the warmup's shading, one a panel."""
    patches = [[p for p in axes.patches if p.get_label() == "_warmup"] for axes in figure.axes]
    return [[(p.get_x(), p.get_x() + p.get_width()) for p in panel] for panel in patches]


@pytest.mark.parametrize("draw", RUN_FIGURES)
@pytest.mark.parametrize(("warmup", "end"), [("2ep", 2), ("30%", 3), ("50st", 2.5), ("0st", None)])
def test_the_shading_covers_the_warmup(tmp_path, draw, warmup, end):
    settings = config(lr={"warmup": warmup})
    figure = draw(runs.load(make(tmp_path, settings)))
    expected = [] if end is None else [(0, pytest.approx(end))]
    assert shades(figure) == [expected] * len(figure.axes)
    assert all(axes.get_xlim() == (0, 10) for axes in figure.axes)


def test_the_shading_is_of_the_warmup_that_bears_on_the_figure(tmp_path):
    settings = config(gr={"policy": "zero", "radius": 0.1, "ratio": 1, "warmup": "4ep"})
    run = runs.load(make(tmp_path, settings))
    assert shades(figures.gradient_norm(run)) == [[(0, 4)]]
    assert shades(figures.regularization(run)) == [[(0, 4)], [(0, 4)]]
    assert shades(figures.learning_rate(run)) == [[(0, 2)]]


def test_errors_are_drawn_in_percent(tmp_path):
    train, test = figures.error(runs.load(make(tmp_path))).axes[0].lines
    np.testing.assert_allclose(train.get_ydata(), 90 / np.arange(1, 11))
    np.testing.assert_allclose(test.get_ydata(), 20 + 60 / np.arange(1, 11))


def test_many_noisy_rows_have_a_running_mean_that_keeps_gaps(tmp_path):
    many = [
        {
            "step": i,
            "epoch": i / 40,
            "split": "train",
            "grad_norm": 1.0 + i % 2,
            "perturbed_grad_norm": None if i < 80 else 3.0 + i % 2,
        }
        for i in range(400)
    ]
    axes = figures.gradient_norm(runs.load(make(tmp_path, rows_=many))).axes[0]
    raw, mean, raw_perturbed, mean_perturbed = (line.get_ydata() for line in axes.lines)
    np.testing.assert_array_equal(raw[:2], [1, 2])
    np.testing.assert_allclose(mean[10:-10], 1.5)
    np.testing.assert_array_equal(np.isnan(mean_perturbed), np.isnan(raw_perturbed))
    np.testing.assert_allclose(mean_perturbed[90:-10], 3.5)
    assert 3 <= mean_perturbed[80] <= 4  # nothing of the gap is in the mean


def test_figures_leave_matplotlib_as_it_was(tmp_path):
    run = runs.load(make(tmp_path))
    with matplotlib.rc_context({"font.size": 33.0, "svg.fonttype": "path"}):
        before = dict(matplotlib.rcParams)
        for draw in RUN_FIGURES:
            assert draw(run).axes[0].yaxis.label.get_size() == 10.5
        report.write(tmp_path)
        assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("color", figures.COLORS)
@pytest.mark.parametrize("paper", ["#ffffff", "#15181c"])
def test_colors_are_legible_on_white_and_on_dark(color, paper):
    def luminance(text):
        parts = np.array([int(text[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return linear @ (0.2126, 0.7152, 0.0722) + 0.05

    assert paper.replace("ffffff", "fff") in document("", "")
    ratio = luminance(color) / luminance(paper)
    assert max(ratio, 1 / ratio) >= 3
