"""Tables of runs: means and tests against hand-worked figures, and four formats."""

import csv
import html.parser
import io
import math
import re
import statistics

import pytest

from gnp.analysis import paper_tables, scores, table_formats, tables
from gnp.analysis.published import Published
from gnp.analysis.scores import Cell, Paired, Scores
from gnp.analysis.table_formats import Column, Table
from gnp.errors import UserError
from tests.analysis.made_runs import make, seeds

OFF, NONE = (0.20, 0.22, 0.24), (0.19, 0.20, 0.215)


def student_p_2(t):
    """The two-sided p of Student's t with 2 degrees of freedom, in closed form."""
    return 1 - abs(t) / math.sqrt(2 + t * t)


def column(table, name):
    index = [column.name for column in table.columns].index(name)
    return [row[index] for row in table.rows]


def cells(table):
    """The cells by the texts of their row and the heading of their column."""
    return {
        (*(x for x in row if isinstance(x, str)), head.name): x
        for row in table.rows
        for head, x in zip(table.columns, row, strict=True)
        if isinstance(x, Cell)
    }


# --- Scores -------------------------------------------------------------------------------------


def test_mean_and_sample_deviation_over_seeds(tmp_path):
    scored = scores.score(seeds(tmp_path, OFF))
    assert scored.values == pytest.approx({0: 20, 1: 22, 2: 24})
    assert scored.mean == pytest.approx(22) and scored.std == pytest.approx(2) and scored.n == 3


def test_runs_of_one_seed_count_once(tmp_path):
    runs = [
        make(tmp_path / str(i), error, seed=s)
        for i, (error, s) in enumerate([(0.1, 4), (0.3, 4), (0.5, 5)])
    ]
    scored = scores.score(runs)
    assert scored.values == pytest.approx({4: 20, 5: 50})


def test_unfinished_and_diverged_runs_have_no_score(tmp_path):
    scored = scores.score(seeds(tmp_path, [0.1, None, math.nan, 0.2]))
    assert scored.values == pytest.approx({0: 10, 3: 20})
    assert (scored.diverged, scored.unfinished) == (1, 1)
    assert math.isnan(scores.Scores({}).mean) and math.isnan(scores.Scores({0: 1.0}).std)


def test_the_paired_test_is_that_of_the_textbook():
    one, other = Scores({0: 1.0, 1: 2.0, 2: 6.0, 7: 9.0}), Scores({2: 3.0, 0: 0.0, 1: 0.0, 8: 9.0})
    differences = [1.0, 2.0, 3.0]
    t = statistics.mean(differences) / (statistics.stdev(differences) / math.sqrt(3))
    test = scores.paired(one, other)
    assert test.pairs == 3 and test.p == pytest.approx(student_p_2(t), rel=1e-10)


@pytest.mark.filterwarnings("error")
def test_the_paired_test_where_there_is_nothing_to_test():
    scored = Scores({0: 1.0, 1: 2.0, 2: 6.0})
    assert scores.paired(scored, scored) == Paired(1.0, 3)
    assert scores.paired(scored, Scores({0: 0.0, 1: 1.0, 2: 5.0})) == Paired(None, 3)
    # One image of 360 more on each seed, whose differences are equal but for rounding.
    errors = [100 * (1 - images / 360) for images in (350, 347, 345)]
    fewer = [100 * (1 - images / 360) for images in (351, 348, 346)]
    assert len({a - b for a, b in zip(errors, fewer, strict=True)}) > 1
    one, other = (Scores(dict(enumerate(each))) for each in (errors, fewer))
    assert scores.paired(one, other) == Paired(None, 3)
    assert table_formats.p_value(Paired(None, 3)) == "– (all differ by the same)"
    assert scores.paired(scored, Scores({0: 5.0, 1: 5.0, 9: 5.0})) == Paired(None, 2)


def test_the_best_is_the_lowest_mean_of_two_or_more_that_did_not_diverge():
    low, high, none = Scores({0: 1.0, 1: 2.0, 2: 3.0}), Scores({0: 2.0, 1: 2.5, 2: 4.5}), Scores({})
    judged = scores.compared([high, low, none], [1, None, 1], [None] * 3)
    assert [cell.best for cell in judged] == [False, True, False]
    assert judged[1].against_best is None and judged[2].against_best is None
    # Differences 1, 0.5, 1.5: t = 1 / (0.5 / √3)
    p = student_p_2(2 * math.sqrt(3))
    assert judged[0].against_best.p == pytest.approx(p) and judged[0].is_close
    assert judged[0].against_baseline == judged[0].against_best and not judged[0].differs
    assert not scores.compared([low, none], [None] * 2, [None] * 2)[0].best
    judged = scores.compared([high, low._replace(diverged=1)], [None] * 2, [None] * 2)
    assert [cell.best for cell in judged] == [True, False]


def test_the_best_lacks_no_run_that_others_have():
    lucky = Scores({0: 0.5}, unfinished=2)
    whole = Scores({0: 1.0, 1: 2.0, 2: 3.0})
    under_way = Scores({0: 0.9, 1: 1.9, 2: 2.9}, unfinished=1)
    judged = scores.compared([lucky, whole, under_way], [None] * 3, [None] * 3)
    assert [cell.best for cell in judged] == [False, False, True]
    assert min(lucky, whole, under_way, Scores({}), key=scores.preference) is whole


# --- Any settings -------------------------------------------------------------------------------


def policies(folder, errors, **fields):
    """Runs of policies with the test errors of each seed."""
    fields = {"lr__warmup": "2ep", **fields}
    return [
        run
        for policy, each in errors.items()
        for run in seeds(folder / policy, each, gr__policy=policy, **fields)
    ]


def test_all_settings_with_significance_and_cost(tmp_path):
    runs = policies(tmp_path, {"zero": (0.18, 0.185, 0.19), "none": (0.2, 0.21, 0.21)})
    runs += seeds(tmp_path / "off", OFF, lr__warmup="2ep", wall_time=50.0, speed=300.0)
    table = tables.compare(runs)
    assert [c.name for c in table.columns] == [
        *("setting", "test error (%)", "seeds", "p, best", "p, baseline"),
        *("gradients a step", "time", "time / without GR"),
    ]
    assert column(table, "setting") == ["gr off", "gr none", "gr zero"]
    off, none, zero = column(table, "test error (%)")
    assert (zero.best, none.best, off.best) == (True, False, False)
    assert zero.scores.mean == pytest.approx(18.5) and zero.scores.std == pytest.approx(0.5)
    # off − zero: 2, 3.5, 5; off − none: 0, 1, 3
    assert off.against_best.p == pytest.approx(student_p_2(3.5 * math.sqrt(3) / 1.5))
    expected = student_p_2((4 / 3) * math.sqrt(3) / statistics.stdev([0, 1, 3]))
    assert none.against_baseline.p == pytest.approx(expected)
    assert off.against_baseline is None and off.is_close == (off.against_best.p >= 0.05)
    assert column(table, "gradients a step") == pytest.approx([1, 2, 1.8])
    assert column(table, "time") == pytest.approx([50, 100, 100])
    # Of the steps alone: a short run's time is that of compiling.
    assert column(table, "time / without GR") == [None, pytest.approx(3), pytest.approx(3)]


def test_the_baseline_has_the_same_other_fields(tmp_path):
    runs = policies(tmp_path / "a", {"off": OFF, "none": NONE})
    runs += policies(tmp_path / "b", {"none": OFF}, lr__base=0.1)  # has none
    runs += policies(tmp_path / "c", {"off": NONE, "none": (0.2, 0.22, 0.23)}, lr__base=0.01)
    table = tables.compare(runs)
    against = dict(zip(column(table, "setting"), column(table, "p, baseline"), strict=True))
    assert against["gr none, lr 0.1"] is None
    expected = student_p_2(1.5 * math.sqrt(3) / statistics.stdev([1, 2, 1.5]))
    assert against["gr none, lr 0.01"].p == pytest.approx(expected)


def test_lengths_do_not_compete(tmp_path):
    runs = seeds(tmp_path / "a", [0.1, 0.1]) + seeds(tmp_path / "b", [0.2, 0.2], epochs=5.0)
    runs += seeds(tmp_path / "c", [0.3, 0.3], epochs=5.0, lr__base=0.1)
    table = tables.compare(runs)
    best = {row[0] for row in table.rows if row[1].best}
    assert best == {"lr 0.001, epochs 5"}


def test_models_and_data_sets_do_not_compete(tmp_path):
    runs = seeds(tmp_path / "a", [0.1, 0.1]) + seeds(tmp_path / "b", [0.2, 0.2], lr__base=0.1)
    other = {"model__name": "vit_s"}
    runs += seeds(tmp_path / "c", [0.3, 0.3], **other)
    runs += seeds(tmp_path / "d", [0.4, 0.4], lr__base=0.1, **other)
    found = column(tables.compare(runs), "test error (%)")
    assert [cell.best for cell in found] == [True, False, True, False]


def test_the_baseline_of_other_decays_is_adamw(tmp_path):
    def runs(kind, value, errors):
        fields = {"weight_decay__kind": kind, "weight_decay__value": value}
        return seeds(tmp_path / f"{kind}-{value}", errors, **fields)

    made = runs("scheduled", 5e-4, (0.1, 0.11, 0.12)) + runs("decoupled", 0.5, (0.2, 0.22, 0.23))
    made += runs("decoupled", 0.1, (0.3, 0.3, 0.3)) + runs("l2", 5e-4, (0.4, 0.4, 0.4))
    table = tables.compare(made)
    labels = column(table, "setting")
    against = dict(zip(labels, column(table, "p, baseline"), strict=True))
    # The better of the two λ of AdamW: differences 10, 11, 11
    expected = student_p_2((32 / 3) * math.sqrt(3) / statistics.stdev([10, 11, 11]))
    assert against["decay scheduled 5e-4"].p == pytest.approx(expected)
    assert against["decay decoupled 0.5"] is None
    assert against["decay l2 5e-4"].pairs == 3


def test_runs_that_did_not_end_are_not_in_means(tmp_path):
    runs = seeds(tmp_path / "a", [0.1, 0.2, None, math.nan]) + seeds(
        tmp_path / "b", [math.nan, math.nan], lr__base=0.1
    )
    runs += seeds(tmp_path / "c", [None], lr__base=0.2)
    table = tables.compare(runs)
    text = table.to_markdown()
    assert "15.00 ± 7.07 (1 of 4 diverged, 1 of 4 not finished)" in text
    assert "| diverged |" in text and "Runs that have not ended are not in the mean" in text
    assert column(table, "seeds") == [2, 0, 0] and "**" not in text


def test_no_p_with_fewer_than_three_seeds(tmp_path):
    runs = policies(tmp_path, {"off": OFF[:2], "none": NONE[:2]})
    table = tables.compare(runs)
    assert column(table, "p, best") == [Paired(None, 2), None]
    assert "– (2 pairs)" in table.to_markdown() and "fewer than 3 seeds" in table.caption


def test_several_runs_of_one_seed_are_told(tmp_path):
    runs = seeds(tmp_path / "a", OFF)
    assert "of one seed" not in tables.compare(runs).caption
    assert "of one seed" in tables.compare([*runs, make(tmp_path / "again", seed=1)]).caption


def test_perplexity_is_no_percentage(tmp_path):
    run = make(tmp_path / "run", 0.5)
    test = run.result["test"] | {"perplexity": 83.25}
    run.result["test"] = test
    table = tables.compare([run])
    assert column(table, "test perplexity")[0].scores.mean == 83.25


def test_no_runs_are_a_mistake():
    with pytest.raises(UserError, match="no runs to compare"):
        tables.compare([])


# --- The papers' --------------------------------------------------------------------------------

RECIPE = {"data__name": "cifar10", "weight_decay__kind": "decoupled", "weight_decay__value": 0.03}


def test_gr_table_1(tmp_path):
    runs = policies(tmp_path / "yes", {"off": OFF, "none": NONE}, **RECIPE)
    runs += policies(tmp_path / "no", {"off": NONE, "none": OFF}, **RECIPE | {"lr__warmup": "0st"})
    runs += policies(tmp_path / "zero", {"zero": OFF}, **RECIPE)  # has no place there
    table = paper_tables.gr_table_1(runs)
    found = cells(table)
    assert set(found) == {
        ("ViT-Ti", "AdamW", warmup, f"CIFAR-10, {policy}")
        for warmup in ("no", "yes")
        for policy in ("no GR", "GR")
    }
    cell = found["ViT-Ti", "AdamW", "yes", "CIFAR-10, GR"]
    assert cell.best and cell.scores.mean == pytest.approx(20.1666667)
    assert cell.published.mean == 13.92
    assert not found["ViT-Ti", "AdamW", "no", "CIFAR-10, GR"].best
    # 1, 2, 2.5
    p = student_p_2((5.5 / 3) * math.sqrt(3) / statistics.stdev([1, 2, 2.5]))
    assert cell.against_baseline.p == pytest.approx(p)
    assert p < 0.06


def test_gr_table_2_has_the_published_figures_of_both_tables(tmp_path):
    errors = {"off": OFF, "none": OFF, "r": OFF, "lambda": OFF, "zero": NONE}
    runs = policies(tmp_path / "10", errors, **RECIPE)
    runs += policies(tmp_path / "100", errors, **RECIPE | {"data__name": "cifar100"})
    table = paper_tables.gr_table_2(runs)
    assert [c.name for c in table.columns] == [
        *("model", "optimizer", "policy", "CIFAR-10", "CIFAR-100", "gradients a step"),
    ]
    names = ["no GR", "GR", "GR, r-warmup", "GR, λ-warmup", "GR, zero-warmup"]
    assert column(table, "policy") == names
    means = [cell.published.mean for cell in column(table, "CIFAR-100")]
    assert means == [39.25, 39.38, 39.24, 39.12, 38.53]
    assert [cell.best for cell in column(table, "CIFAR-10")] == [False] * 4 + [True]
    assert column(table, "gradients a step") == pytest.approx([1, 2, 2, 2, 1.8])


def test_runs_of_different_length_do_not_compete(tmp_path):
    runs = policies(tmp_path / "long", {"off": OFF, "none": OFF, "zero": NONE}, **RECIPE)
    short = RECIPE | {"epochs": 2.0}
    runs += policies(tmp_path / "short", {"none": (0.5, 0.5, 0.51), "zero": OFF}, **short)
    table = paper_tables.gr_table_2(runs)
    names = ["CIFAR-10, 2 epochs", "CIFAR-10, 10 epochs"]
    assert [c.name for c in table.columns][3:5] == names
    found = cells(table)
    assert [key[2:] for key, cell in found.items() if cell.best] == [
        ("GR, zero-warmup", name) for name in names
    ]
    assert ("ViT-Ti", "AdamW", "no GR", names[0]) not in found


def test_what_else_rivals_differ_in_is_told(tmp_path):
    runs = policies(tmp_path / "a", {"off": OFF}, gr__radius=0.5, **RECIPE)
    runs += policies(tmp_path / "b", {"none": OFF}, **RECIPE)
    assert (
        "differs in"
        not in paper_tables.gr_table_2(
            runs + policies(tmp_path / "c", {"zero": NONE}, **RECIPE)
        ).caption
    )
    runs += policies(tmp_path / "d", {"zero": NONE}, lr__base=0.5, gr__radius=0.2, **RECIPE)
    caption = paper_tables.gr_table_2(runs).caption
    assert "What is compared differs in gr.radius, lr.base too." in caption


def test_what_lacks_seeds_is_shown_where_nothing_else_is(tmp_path):
    runs = policies(tmp_path / "a", {"none": OFF, "zero": OFF}, **RECIPE)
    lucky = policies(tmp_path / "b", {"zero": (0.01, math.nan, None)}, lr__base=0.5, **RECIPE)
    table = paper_tables.gr_table_2(runs + lucky)
    assert cells(table)["ViT-Ti", "AdamW", "GR, zero-warmup", "CIFAR-10"].scores.mean == 22
    table = paper_tables.gr_table_2(runs[:3] + lucky)
    shown = cells(table)["ViT-Ti", "AdamW", "GR, zero-warmup", "CIFAR-10"]
    assert shown.scores.mean == 1 and not shown.best


def test_gr_tables_4_and_5_take_their_models_and_data_sets(tmp_path):
    errors = {"none": OFF, "zero": NONE}
    swin = policies(tmp_path / "s", errors, **RECIPE | {"model__name": "swin_t"})
    image = policies(tmp_path / "i", errors, **RECIPE | {"data__name": "tiny_imagenet"})
    vit = policies(tmp_path / "v", errors, **RECIPE)
    runs = swin + image + vit
    assert column(paper_tables.gr_table_4(runs), "model") == ["Swin-Tiny"] * 2
    assert column(paper_tables.gr_table_2(runs), "model") == ["ViT-Ti"] * 2
    five = paper_tables.gr_table_5(runs)
    assert [cell.published.mean for cell in column(five, "Tiny-ImageNet")] == [51.08, 50.19]


CNN = {"model__name": "resnet18", "data__name": "cifar10"}


def decays(folder, kind, value, errors, **fields):
    fields = {**CNN, "weight_decay__kind": kind, "weight_decay__value": value, **fields}
    name = f"{fields.get('optimizer__name')}-{kind}-{value}"
    return seeds(folder / name, errors, **fields)


def test_swd_table_1(tmp_path):
    runs = decays(tmp_path, "decoupled", 0.5, OFF) + decays(tmp_path, "scheduled", 5e-4, NONE)
    runs += decays(tmp_path, "scheduled", 1e-3, (0.9, 0.9, 0.9))  # another λ, not the best one
    runs += decays(tmp_path, "l2", 5e-4, OFF, optimizer__name="sgd", lr__base=0.1)
    table = paper_tables.swd_table_1(runs)
    assert [c.name for c in table.columns] == ["data set", "model", "AdamS", "SGD", "AdamW"]
    (row,) = table.rows
    assert row[2].best and row[2].scores.mean == pytest.approx(20.1666667)
    assert [cell.published.mean for cell in row[2:]] == [4.91, 5.01, 5.08]
    assert row[2].against_baseline.pairs == 3 and row[4].against_baseline is None
    assert "up to 2 settings" in table.caption


def test_the_study_of_weight_decay(tmp_path):
    runs = [
        run
        for value, error in ((5e-4, 0.1), (1e-4, 0.2), (0.01, 0.3))
        for run in decays(tmp_path, "scheduled", value, [error, error + 0.01])
    ]
    runs += decays(tmp_path, "decoupled", 0.5, OFF)  # one value alone is no study
    table = paper_tables.weight_decay_study(runs)
    names = ["data set", "model", "optimizer", "λ = 1e-4", "λ = 5e-4", "λ = 0.01"]
    assert [c.name for c in table.columns] == names
    assert column(table, "optimizer") == ["AdamS"]
    assert [cell.best for cell in table.rows[0][3:]] == [False, True, False]


@pytest.mark.parametrize("name", list(paper_tables.PAPER_TABLES))
def test_tables_say_which_runs_they_need(tmp_path, name):
    with pytest.raises(UserError, match=r"needs runs") as caught:
        paper_tables.PAPER_TABLES[name].make([make(tmp_path / "run")])
    assert "\n" not in str(caught.value)


def test_a_smaller_model_has_its_size_and_no_published_figure(tmp_path):
    fields = RECIPE | {"model__width": 48}
    table = paper_tables.gr_table_2(policies(tmp_path, {"none": OFF, "r": NONE}, **fields))
    assert column(table, "model") == ["ViT-Ti (width 48)"] * 2
    assert all(cell.published is None for cell in column(table, "CIFAR-10"))


# --- Formats ------------------------------------------------------------------------------------

HOSTILE = "</td><script>a&b|_*`$x^2$ \\input{x}%#~{}\n\r=1"
PUBLISHED = Published(13.92, 0.19, 5, "GR 1", "")
BEST = Cell(Scores({0: 20.0, 1: 21.0, 2: 22.0}), best=True, published=PUBLISHED)
CLOSE = Cell(Scores({0: 1 / 3, 1: 1.0}), against_best=Paired(0.3, 3))
DIFFERENT = Cell(Scores({0: 30.0}), False, Paired(0.01, 3), Paired(0.02, 3))
TABLE = Table(
    "made",
    "Made",
    "How to read it.",
    (Column("setting"), Column("error (%)"), Column("p"), Column("time", "{:.1f} s".format)),
    (
        ("a", BEST, None, 1 / 3),
        (HOSTILE, CLOSE, Paired(0.0123456789, 3), math.nan),
        ("c", DIFFERENT, Paired(None, 2), 2.0),
    ),
)


class Parsed(html.parser.HTMLParser):
    """The texts of cells, row by row."""

    def __init__(self, source):
        super().__init__()
        self.rows, self.tags = [], set()
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def test_html():
    parsed = Parsed(TABLE.to_html(caption=False))
    head, first, second, third = [[text.strip() for text in row] for row in parsed.rows]
    assert head == ["setting", "error (%)", "p", "time"]
    assert first == ["a", "21.00 ± 1.00 published 13.92 ± 0.19", "–", "0.3 s"]
    assert second[0] == HOSTILE.replace("\r", "\n") or second[0] == HOSTILE
    assert second[1:] == ["0.67 ± 0.47†", "0.012", "–"]
    assert third == ["c", "30.00*", "– (2 pairs)", "2.0 s"]
    assert "script" not in parsed.tags
    assert "<strong>21.00 ± 1.00</strong>" in TABLE.to_html()
    assert "<caption>How to read it.</caption>" in TABLE.to_html() == TABLE._repr_html_()


def test_markdown():
    lines = TABLE.to_markdown().splitlines()
    assert lines[0] == "### Made" and lines[-1] == "How to read it."
    assert lines[2:5] == [
        "| setting | error (%) | p | time |",
        "| :-- | --: | --: | --: |",
        "| a | **21.00 ± 1.00** (published 13.92 ± 0.19) | – | 0.3 s |",
    ]
    row = lines[5]
    assert row.startswith(
        r"| &lt;/td&gt;&lt;script&gt;a&amp;b\|\_\*\`\$x^2\$ \\input{x}%\#\~{} =1 |"
    )
    assert len(re.findall(r"(?<!\\)\|", row)) == 5


def test_latex():
    text = TABLE.to_latex()
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert rows[0] == r"setting & error (\%) & p & time \\"
    assert rows[1] == (
        r"a & \textbf{21.00 $\pm$ 1.00} {\footnotesize (published 13.92 $\pm$ 0.19)} & -- & "
        r"0.3 s \\"
    )
    assert rows[2] == (
        r"\textless{}/td\textgreater{}\textless{}script\textgreater{}a\&b\textbar{}\_$^*$`\$x"
        r"\textasciicircum{}2\$ \textbackslash{}input\{x\}\%\#\textasciitilde{}\{\} =1 & "
        r"0.67 $\pm$ 0.47$^\dagger$ & 0.012 & -- \\"
    )
    assert r"\begin{tabular}{lrrr}" in text and r"\bottomrule" in text
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")


def test_csv_has_full_precision():
    head, *body = csv.reader(io.StringIO(TABLE.to_csv()))
    rows = [dict(zip(head, row, strict=True)) for row in body]
    assert len(head) == len(set(head))
    assert rows[1]["setting"] == HOSTILE
    assert float(rows[1]["error (%)"]) == statistics.mean([1 / 3, 1.0])
    assert float(rows[1]["p"]) == 0.0123456789 and rows[2]["p"] == ""
    assert rows[2]["p, pairs"] == "2" and rows[0]["p"] == ""
    assert rows[0]["error (%), best"] == "1" and rows[0]["error (%), published"] == "13.92"
    assert float(rows[0]["time"]) == 1 / 3 and rows[1]["time"] == ""
    assert float(rows[2]["error (%), p against baseline"]) == 0.02
    assert rows[2]["error (%), std"] == ""


def test_captions_explain_what_is_shown_and_nothing_else():
    everything = " ".join(table_formats.legend([BEST, CLOSE, DIFFERENT], "AdamW"))
    assert "over 1 to 3 seeds" in everything and "significantly different from AdamW" in everything
    for text in ("Bold", "†", "t-test", "Published"):
        assert text in everything
    assert "diverged" not in everything and "left out" not in everything
    assert list(table_formats.legend([Cell(Scores({0: 1.0}))], "")) == []


def test_p_values_are_short():
    shown = [table_formats.p_value(Paired(p, 3)) for p in (0.0123, 0.0009, 0.9999)]
    assert shown == ["0.012", "< 0.001", "1.000"]
