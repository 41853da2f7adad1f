"""The report of many runs."""

import csv
import json
import math
import re
import sys
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

from gnp import report
from gnp.analysis import comparison_page, figures
from gnp.analysis.figures import PaperFigure
from gnp.errors import UserError
from tests.analysis.made_runs import make, seeds
from tests.test_report import HOSTILE, Page

TABLES = ("comparison", "gr_table_2")
RECIPE = {"lr__warmup": "2ep", "weight_decay__kind": "decoupled", "weight_decay__value": 0.03}
RECIPE |= {"data__name": "cifar10"}


def draw(runs):
    figure = Figure(figsize=(3, 2))
    axes = figure.subplots()
    axes.set_title(f"{len(runs)} runs", color=figures.INK)
    axes.plot([1, 2], [3, 4])
    return figure


def refuse(runs):
    raise UserError("it needs <other> runs")


@pytest.fixture(autouse=True)
def two_figures(monkeypatch):
    """In place of those of the papers, which have tests of their own, and take long."""
    made = {
        "one": PaperFigure("one", "One <figure>", "a & b", draw),
        "two": PaperFigure("two", "Another", "c", refuse),
    }
    monkeypatch.setattr(figures, "PAPER_FIGURES", made)
    monkeypatch.setattr(
        comparison_page.interactive, "write", lambda runs, path: path.write_text("curves")
    )


@pytest.fixture
def sweep(tmp_path):
    """Three policies by three seeds, a run under way and one that diverged."""
    folder = tmp_path / "sweep" / "trials"
    for policy, error in (("off", 0.2), ("none", 0.19), ("zero", 0.18)):
        errors = [error, error + 0.012, error + 0.01]
        seeds(folder / policy, errors, gr__policy=policy, **RECIPE)
    make(folder / "under-way", None, rows=4, seed=7, gr__policy="zero", **RECIPE)
    make(folder / "broken", math.nan, seed=8, gr__policy="none", **RECIPE)
    return tmp_path / "sweep"


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_report_has_its_files(sweep, tmp_path):
    out = tmp_path / "report"
    assert report.write_comparison([sweep], out) == out / "index.html"
    suffixes = ("html", "md", "tex", "csv")
    names = {f"tables/{name}.{suffix}" for name in TABLES for suffix in suffixes}
    names |= {f"figures/one.{suffix}" for suffix in ("svg", "pdf", "png")}
    assert set(files(out)) == names | {"index.html", "interactive.html", "runs.csv"}
    rows = list(csv.DictReader((out / "runs.csv").read_text().splitlines()))
    assert len(rows) == 11 and {row["gr.policy"] for row in rows} == {"off", "none", "zero"}
    assert (out / "figures/one.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "figures/one.pdf").read_bytes().startswith(b"%PDF")
    ElementTree.parse(out / "figures/one.svg")
    for name in TABLES:
        Page(out / f"tables/{name}.html")


def test_the_page_tells_what_came_out(sweep, tmp_path):
    page = Page(report.write_comparison([sweep], tmp_path / "report"))
    assert page.texts["title"] == ["vit_ti on cifar10: 11 runs"] == page.texts["h1"]
    assert {"10 of 11 finished", "1 diverged"} <= set(page.texts["p"])
    assert "3 settings, which differ in gr.policy." in page.texts["p"]
    values = [text.strip() for text in page.texts["dd"] if text.strip()]
    assert values == ["18.73 ± 0.64", "3", "3 to 4", "11", "16\xa0min\xa0" + "40\xa0s"]
    assert page.texts["strong"].count("18.73 ± 0.64") == 2  # in both tables
    assert page.texts["li"][:2] == [
        "broken: diverged",
        "under-way: not finished, at epoch 4 of 10",
    ]
    assert "19.73 ± 0.64" in page.text() and "(1 of 4 diverged)" in page.text()
    assert "(1 of 4 not finished)" in page.text()
    assert "published 13.61 ± 0.20" in page.texts["small"]


def test_what_cannot_be_drawn_is_told(sweep, tmp_path):
    page = Page(report.write_comparison([sweep], tmp_path / "report"))
    items = page.texts["li"][2:]
    assert "Another (c): it needs <other> runs" in items
    assert sum("Table" in item for item in items) == 4
    assert "One <figure>" in page.titles() and "Another" not in page.titles()
    assert page.all("svg")[0]["aria-label"] == "One <figure>, a & b"


def test_the_page_is_whole_and_its_links_lead_somewhere(sweep, tmp_path):
    out = tmp_path / "report"
    page = Page(report.write_comparison([sweep], out))
    assert not {tag for tag, _ in page.elements} & {"script", "link", "img", "iframe", "object"}
    links = [link["href"] for link in page.all("a")]
    assert len(links) == len(set(links)) == 2 + 4 * len(TABLES) + 3
    for link in links:
        assert (out / link).is_file()
    for _, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if not name.startswith("xmlns") and name != "content":
                assert "//" not in (value or "")
    assert "prefers-color-scheme: dark" in page.source and "@media print" in page.source


def test_the_same_runs_give_the_same_bytes(sweep, tmp_path):
    report.write_comparison([sweep], tmp_path / "a")
    first = files(tmp_path / "a")
    report.write_comparison([sweep], tmp_path / "a")
    report.write_comparison([sweep], tmp_path / "b")
    assert files(tmp_path / "a") == first == files(tmp_path / "b")


def test_hostile_strings_are_text(tmp_path):
    names = [HOSTILE.replace("/", "|"), "\x1b[31m\u2028 |", "=1+1"]
    for i, name in enumerate(names):
        error = None if i == 0 else 0.1
        make(tmp_path / "in" / name, error, data__name=HOSTILE + str(i), model__name=HOSTILE)
    page = Page(report.write_comparison([tmp_path / "in"], tmp_path / "report"))
    assert not {tag for tag, _ in page.elements} & {"script", "img"}
    assert page.texts["h1"][0].startswith(HOSTILE)
    assert page.texts["li"][0] == f"{names[0]}: not finished, at epoch 10 of 10"
    assert all(any(name in text for text in page.texts["th"]) for name in names)
    latex = (tmp_path / "report/tables/comparison.tex").read_text()
    assert r"\$title \$\{x\}\textbackslash{}1" in latex and "<script>" not in latex
    markdown = (tmp_path / "report/tables/comparison.md").read_text()
    assert "<" not in markdown and len(markdown.splitlines()) == 9


def test_one_run_and_runs_without_a_row(tmp_path):
    make(tmp_path / "in" / "a", None, rows=0)
    page = Page(report.write_comparison([tmp_path / "in"], tmp_path / "report"))
    assert "0 of 1 finished" in page.texts["p"]
    assert page.texts["li"][0] == "a: not finished, at epoch 0 of 10"


def test_what_other_runs_have_left_is_removed(sweep, tmp_path, monkeypatch):
    out = tmp_path / "report"
    report.write_comparison([sweep], out)
    before = set(files(out))
    monkeypatch.setitem(figures.PAPER_FIGURES, "one", PaperFigure("one", "One", "a", refuse))
    (out / "figures" / "mine.png").write_text("")
    report.write_comparison([sweep / "trials" / "off"], out)
    after = set(files(out))
    assert "tables/gr_table_2.csv" in before - after and "figures/one.png" in before - after
    assert {"figures/mine.png", "tables/comparison.md", "index.html"} <= after


def test_a_damaged_run_is_told_and_stops_nothing(sweep, tmp_path, caplog):
    (sweep / "trials" / "off" / "seed-0" / "config.json").write_text("{")
    other = sweep / "trials" / "zero" / "seed-1" / "config.json"
    other.write_text(json.dumps(json.loads(other.read_text()) | {"x": 1}))
    (sweep / "trials" / "zero" / "seed-2" / "sharpness.jsonl").write_text("{\n{}\n")
    page = Page(report.write_comparison([sweep], tmp_path / "report"))
    assert page.texts["title"] == ["vit_ti on cifar10: 9 runs"]
    told = [item for item in page.texts["li"] if ".json" in item]
    assert "seed-0/config.json is not valid JSON" in told[0] and "unknown field 'x'" in told[1]
    assert "seed-2/sharpness.jsonl, line 1" in told[2]
    assert [record.getMessage() for record in caplog.records] == [f"left out: {x}" for x in told]


def test_what_a_search_has_pruned_is_told(sweep, tmp_path):
    for name in ("under-way", "off/seed-0"):  # which was continued, and has finished
        (sweep / "trials" / name / "pruned").touch()
    page = Page(report.write_comparison([sweep], tmp_path / "report"))
    assert "1 pruned" in page.texts["p"]
    assert page.texts["li"][1] == "under-way: pruned by the search, at epoch 4 of 10"


def test_curves_that_cannot_be_drawn_are_told(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison_page.interactive, "write", lambda runs, path: refuse(runs))
    page = Page(report.write_comparison([sweep], tmp_path / "report"))
    assert any(item.startswith("Interactive curves") for item in page.texts["li"])
    assert "interactive.html" not in [link["href"] for link in page.all("a")]


def test_a_report_that_cannot_be_written_is_a_user_error(sweep, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/tables"):
        report.write_comparison([sweep], tmp_path / "file")
    (tmp_path / "report" / "runs.csv").mkdir(parents=True)
    with pytest.raises(UserError, match=r"cannot write .*runs\.csv"):
        report.write_comparison([sweep], tmp_path / "report")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["sweep"], "sweep/report/index.html"),
        (["sweep/trials/off", "sweep/trials/zero/seed-0"], "report/index.html"),
        (["sweep", "--out=there"], "there/index.html"),
        (["sweep/trials/off/seed-0", "--out=there"], "there/index.html"),
        (["sweep/trials/off/seed-0"], "sweep/trials/off/seed-0/report.html"),
    ],
)
def test_where_the_report_goes(sweep, tmp_path, monkeypatch, capsys, arguments, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report", *arguments])
    assert report.main() == 0
    assert capsys.readouterr().out == f"{expected}\n"
    assert (tmp_path / expected).is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--out=there"], "no directory nowhere"),
        (["empty"], "empty holds no run"),
        (["bad", "--out=there"], "bad/a/config.json is not a configuration of this version"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    run = make(tmp_path / "bad" / "a")
    (tmp_path / "bad/a/config.json").write_text(json.dumps(run.config | {"x": 1}))
    monkeypatch.setattr(sys, "argv", ["report", *arguments])
    with pytest.raises(UserError, match=re.escape(message)):
        report.main()
