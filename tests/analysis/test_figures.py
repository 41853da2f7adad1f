"""The figures of many runs: what is drawn, read back from the axes, and that all can be drawn."""

import io
import json
import warnings

import matplotlib
import numpy as np
import pytest
from matplotlib.text import Text

from gnp.analysis import comparison, figures
from gnp.analysis.figures import many_runs
from gnp.errors import UserError
from tests.analysis.runs_in_memory import made_run, measured_run

SEEDS = (0, 1, 2)
POLICIES = ("off", "none", "r", "lambda", "zero")


def seeds(shifts=(0.0, 0.02, 0.07), **fields):
    """Runs that differ in their seed, and are shifted by so much."""
    return [made_run(seed=seed, shift=shift, **fields) for seed, shift in enumerate(shifts)]


def over(name, values, **fields):
    return [run for value in values for run in seeds(**{name: value}, **fields)]


def lines(axes):
    """The lines with data in data coordinates, and not the marks of error bars."""
    return [line for line in axes.lines if line.get_linestyle() != "None"]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


# --- What every figure of the catalogue keeps to ------------------------------------------------

GRID = [
    run
    for rate in (1e-4, 1e-3, 1e-2)
    for strength in (1e-5, 1e-4, 1e-3)
    for run in seeds(lr_base=rate, weight_decay_kind="decoupled", weight_decay_value=strength)
]
KINDS = over("weight_decay_kind", ("vanilla", "coupled", "scheduled"), weight_decay_value=1e-3)
SUITABLE = {
    "error_by_policy": over("gr_policy", POLICIES),
    "gradient_norm_with_gr": over("gr_policy", POLICIES),
    "theoretical_variance": over("gr_policy", ("zero",)),
    "gradient_norm_by_policy": over("gr_policy", POLICIES),
    "vanilla_against_coupled": KINDS,
    "gradient_norm_by_decay": KINDS,
    "scheduled_decay": KINDS,
    "learning_curves": KINDS,
    "adaptive_lr_by_policy": over("gr_policy", POLICIES),
    "error_against_decay": GRID,
    "error_against_searched": GRID,
    "error_over_lr_and_decay": GRID,
    "warm_restarts": over("lr_schedule", ("restarts",)),
    "perplexity_curves": over("optimizer_name", ("adam", "sgd"), text=True),
    "loss_against_error": KINDS,
    "long_training": seeds(epochs=10.0) + seeds(epochs=100.0),
}
MEASURED = (
    *("adaptive_lr_variance", "adaptive_lr_spread", "hessian_eigenvalues", "spectral_density"),
    *("sam_sharpness", "loss_surface"),
)
# What no figure of the catalogue can be drawn from.
NOTHING = [made_run(ended=False)]
for columns in NOTHING[0].metrics.values():
    columns |= {key: np.full(10, np.nan) for key in columns if key not in ("step", "epoch")}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    return [
        measured_run(folder / f"{policy}-{seed}", scale, seed=seed, gr_policy=policy)
        for policy, scales in {"off": (1.0, 2.0, 6.0), "zero": (0.5, 0.5, 0.5)}.items()
        for seed, scale in enumerate(scales)
    ]


@pytest.fixture
def suitable(measured):
    return SUITABLE | dict.fromkeys(MEASURED, measured)


@pytest.fixture
def check(monkeypatch):
    """Draws a figure, and sees that no text that is drawn reaches out of it."""
    drawn = []
    draw = Text.draw

    def noted(text, renderer):
        if text.get_visible() and text.get_text().strip():
            drawn.append((text.get_text(), text.get_window_extent(renderer)))
        draw(text, renderer)

    def check(figure):
        drawn.clear()
        with warnings.catch_warnings(), monkeypatch.context() as patch:
            warnings.simplefilter("error")  # glyphs that are missing, layouts that do not fit
            patch.setattr(Text, "draw", noted)
            figure.savefig(io.BytesIO(), format="png", dpi="figure")
        width, height = figure.bbox.size
        assert drawn
        for text, box in drawn:
            inside = box.x0 > -1 and box.y0 > -1 and box.x1 < width + 1 and box.y1 < height + 1
            assert inside, f"{text!r} at {box} is outside of {width} × {height}"

    return check


def test_the_catalogue_names_what_is_exported(suitable):
    for name, entry in figures.PAPER_FIGURES.items():
        assert entry.name == name and entry.draw is getattr(figures, name)
        assert entry.title and entry.source
    assert list(suitable) and {*suitable} == {*figures.PAPER_FIGURES}


@pytest.mark.parametrize("name", figures.PAPER_FIGURES)
def test_every_figure_can_be_drawn_and_kept(name, suitable, check):
    figure = figures.PAPER_FIGURES[name].draw(suitable[name])
    check(figure)
    figure.savefig(buffer := io.BytesIO(), format="svg")
    assert b"</svg>" in buffer.getvalue()


@pytest.mark.parametrize("name", figures.PAPER_FIGURES)
def test_runs_with_nothing_to_show_are_a_user_error_in_one_line(name):
    for runs in ([], NOTHING):
        with pytest.raises(UserError) as error:
            figures.PAPER_FIGURES[name].draw(runs)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", figures.PAPER_FIGURES)
def test_every_figure_survives_what_goes_wrong(name, suitable, tmp_path, check):
    """A run that diverged, one that has not ended, one of a single row, and single seeds."""
    fields = {"gr_policy": "r", "weight_decay_kind": "scheduled", "weight_decay_value": 5e-4}
    broken = [
        made_run(seed=7, diverges=3, workdir=tmp_path, **fields),
        made_run(seed=8, diverges=0, workdir=tmp_path, optimizer_name="sgd"),
        made_run(seed=9, ended=False, rows=4, workdir=tmp_path),
        made_run(seed=10, rows=1, workdir=tmp_path, optimizer_name="yogi"),
    ]
    alone = [run for run in suitable[name] if run.setting("seed") == 0]
    check(figures.PAPER_FIGURES[name].draw([*broken, *alone]))


def test_a_damaged_file_of_measures_takes_no_other_run_with_it(tmp_path):
    whole = measured_run(tmp_path / "a", gr_policy="off")
    damaged = measured_run(tmp_path / "b", gr_policy="zero")
    (tmp_path / "b" / "sharpness.jsonl").write_text("{\n{}\n")
    (line,) = lines(figures.sam_sharpness([whole, damaged]).axes[0])
    assert len(line.get_xdata()) == 3
    with pytest.raises(UserError, match=r"b/sharpness\.jsonl, line 1"):
        figures.sam_sharpness([damaged])


def test_error_by_policy_has_a_row_for_each_radius(check):
    """And in each the runs without regularization, which has none."""
    runs = [
        *seeds((0.3, 0.4), gr_policy="off", gr_radius=0.7),
        *seeds((0.1, 0.2), gr_policy="zero", gr_radius=0.05),
        *seeds((0.5, 0.6), gr_policy="zero", gr_radius=0.1),
    ]
    figure = figures.error_by_policy(runs)
    check(figure)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["r 0.05", "r 0.1"]
    means = {container[0].get_xdata()[0] for container in axes.containers}
    assert {round(float(mean), 6) for mean in means} == {35.0 + 20, 15.0 + 20, 55.0 + 20}
    assert len(axes.containers) == 4


def test_what_was_searched_has_an_axis_each_and_all_points_in_each(check):
    found = [(1e-4, 0.1, "off"), (3e-3, 0.3, "zero"), (0.02, 0.2, "zero"), (0.5, 0.1, "zero")]
    runs = [
        made_run(lr_base=rate, gr_radius=radius, gr_policy=policy, shift=rate)
        for rate, radius, policy in found
    ]
    runs += [
        made_run(lr_base=9.0, gr_radius=0.3, gr_policy="zero", diverges=3),
        made_run(lr_base=0.02, gr_radius=0.2, gr_policy="zero", seed=1, diverges=3),
    ]
    figure = figures.error_against_searched(runs)
    check(figure)
    radii, rates = figure.axes
    assert (rates.get_xlabel(), rates.get_xscale()) == ("lr.base", "log")
    assert (radii.get_xlabel(), radii.get_xscale()) == ("gr.radius", "linear")
    assert {*legend(figure)} == {"gr off", "gr zero", "seeds diverged"}

    def points(axes, *, crosses):
        drawn = [line for line in axes.lines if (line.get_marker() == "x") == crosses]
        values = [(line.get_xdata()[0], line.get_ydata()[0]) for line in drawn]
        return sorted((float(x), round(float(y), 6)) for x, y in values if np.isfinite(y))

    expected = sorted((rate, round(100 * (0.2 + rate), 6)) for rate, _, _ in found)
    assert points(rates, crosses=False) == expected
    # Without regularization a radius does nothing, and has no point.
    assert points(radii, crosses=False) == [(0.1, 70.0), (0.2, 22.0), (0.3, 20.3)]
    # One of whose seeds one diverged has a cross; one that is lost has it at the upper edge.
    assert points(rates, crosses=True) == [(0.02, 22.0), (9.0, 1.0)]


@pytest.mark.parametrize("name", ["learning_curves", "error_by_policy", "loss_against_error"])
def test_names_of_any_kind_are_text(name, check):
    hostile = "_$\\frac$ </svg>&{} " + "long " * 400
    runs = [
        made_run(gr_policy=policy, optimizer_name=optimizer, data_name=data)
        for policy in ("off", "zero")
        for optimizer in ("adam", hostile)
        for data in ("cifar10", hostile)
    ]
    figure = figures.PAPER_FIGURES[name].draw(runs)
    check(figure)
    texts = [*legend(figure), *(label.get_text() for label in figure.axes[0].get_yticklabels())]
    assert any("_$\\frac$ </svg>&{}" in text for text in texts)


@pytest.mark.parametrize("num", [2, 5, 12, 50])
def test_settings_in_any_number_are_told_apart(num, check):
    runs = [
        run for i in range(num) for run in seeds(lr_base=1e-3 * (1 + i), gr_policy=POLICIES[i % 2])
    ]
    figure = figures.learning_curves(runs)
    check(figure)
    (axes,) = figure.axes
    drawn = lines(axes)
    assert len(drawn) == min(num, 18) == len(legend(figure))
    assert len({(line.get_color(), line.get_marker()) for line in drawn}) == len(drawn)
    assert (figure.legends[0].get_title().get_text() == "the 18 best of 50 settings") == (num == 50)


def test_of_more_settings_the_best_are_shown():
    runs = [made_run(lr_base=1e-3 * (1 + i), shift=-0.001 * (i % 25)) for i in range(30)]
    shown = [line.get_ydata()[-1] for line in lines(figures.learning_curves(runs).axes[0])]
    errors = sorted(20 - 0.1 * (i % 25) for i in range(30))
    np.testing.assert_allclose(sorted(shown), errors[:18])


def test_of_many_settings_one_field_decides_the_colour_and_the_other_the_dashes():
    runs = [
        made_run(optimizer_name=optimizer, weight_decay_kind=kind, weight_decay_value=1e-3)
        for optimizer in ("adam", "sgd", "yogi", "radam")
        for kind in ("decoupled", "scheduled")
    ]
    drawn = lines(figures.learning_curves(runs).axes[0])
    labels = [setting.label for setting in comparison.group(runs)]
    by_label = dict(zip(labels, drawn, strict=True))
    for label, line in by_label.items():
        for other, another in by_label.items():
            same_optimizer = label.split(", ")[0] == other.split(", ")[0]
            assert (line.get_color() == another.get_color()) == same_optimizer
            same_kind = label.split(", ")[1] == other.split(", ")[1]
            assert (line.get_marker() == another.get_marker()) == same_kind


def test_figures_leave_matplotlib_as_it_was_and_can_be_dark():
    before = dict(matplotlib.rcParams)
    light = figures.learning_curves(KINDS)
    with figures.dark():
        dark = figures.learning_curves(KINDS)
    assert dict(matplotlib.rcParams) == before
    again = figures.learning_curves(KINDS)
    for figure, paper, ink in (
        (light, "white", figures.INK),
        (dark, "#15181c", "#e4e6e9"),
        (again, "white", figures.INK),
    ):
        assert matplotlib.colors.same_color(figure.get_facecolor(), paper)
        assert matplotlib.colors.same_color(figure.axes[0].xaxis.label.get_color(), ink)
        assert matplotlib.colors.same_color(figure.legends[0].get_texts()[0].get_color(), ink)


# --- Curves -------------------------------------------------------------------------------------


def test_a_line_is_the_mean_over_seeds_in_a_band_of_one_sample_deviation():
    figure = figures.learning_curves(over("optimizer_name", ("adam", "sgd")))
    (axes,) = figure.axes
    expected = 100 * (0.2 + 0.03 + 0.6 * (1 - np.arange(1, 11) / 10))
    for line in lines(axes):
        np.testing.assert_array_equal(line.get_xdata(), np.arange(1, 11))
        np.testing.assert_allclose(line.get_ydata(), expected)
    std = 100 * np.sqrt((0.03**2 + 0.01**2 + 0.04**2) / 2)
    for band in axes.collections:
        edges = band.get_paths()[0].vertices
        at_end = sorted({round(y, 6) for x, y in edges if x == 10})
        np.testing.assert_allclose(at_end, [23 - std, 23 + std], rtol=1e-5)
    assert legend(figure) == [f"{name}: 23.00 ± {std:.2f} %" for name in ("adam", "sgd")]


def test_seeds_that_were_evaluated_at_other_epochs_are_a_line_each_and_others_drawn_as_ever():
    runs = over("optimizer_name", ("adam", "sgd"))
    for seed, run in enumerate(runs[:3]):
        run.metrics["test"]["epoch"] += 0.1 * seed
    figure = figures.learning_curves(runs)
    *adam, sgd = lines(figure.axes[0])
    for shift, line in zip((0, 2, 7), adam, strict=True):
        np.testing.assert_allclose(line.get_ydata()[[0, -1]], [74 + shift, 20 + shift])
        assert line.get_color() == adam[0].get_color() != sgd.get_color()
        assert line.get_linewidth() < sgd.get_linewidth()
    np.testing.assert_allclose(sgd.get_ydata()[-1], 23)
    assert len(figure.axes[0].collections) == 1, "only the mean has a band"
    assert [label.partition(": ")[2] for label in legend(figure)] == 2 * ["23.00 ± 3.61 %"]


def test_half_of_the_epochs_in_common_make_a_mean():
    x = np.arange(1.0, 9.0)
    [mean] = many_runs.of_seeds([(x, x), (x[1::2], 3 * x[1::2])])
    np.testing.assert_array_equal(mean.x, [2, 4, 6, 8])
    np.testing.assert_array_equal(mean.mean, [4, 8, 12, 16])
    assert len(many_runs.of_seeds([(x, x), (x[2::2], x[2::2])])) == 2


@pytest.mark.parametrize("rows", [120, 121])
def test_running_means_are_said_and_the_legend_has_what_was_logged(rows, check):
    noise = np.where(np.arange(rows) % 2, 0.5, -0.5)
    runs = over("gr_policy", ("off", "zero"), rows=rows)
    for run in runs:
        run.metrics["train"]["grad_norm"] += noise
    figure = figures.gradient_norm_by_policy(runs)
    check(figure)
    (axes,) = figure.axes
    assert ("running mean if > 120 rows" in axes.get_ylabel()) == (rows > 120)
    jumps = np.abs(np.diff(lines(axes)[0].get_ydata())).max()
    assert (jumps < 0.6) == (rows > 120)
    at_end = 1.03 + noise[-1]
    assert legend(figure)[0].startswith(f"gr off: {at_end:.4g} ±")
    check(figures.scheduled_decay(over("weight_decay_kind", ("scheduled",), rows=rows)))


def test_seeds_that_have_not_ended_are_left_out_and_said():
    runs = [*seeds(), made_run(seed=3, shift=9, rows=3, ended=False)]
    runs += [made_run(optimizer_name="sgd", rows=5, ended=False)]
    figure = figures.learning_curves(runs)
    assert [label[label.index(" (") :] for label in legend(figure)] == [
        *(" (3 of 4 runs)", " (not finished)"),
    ]
    assert lines(figure.axes[0])[0].get_ydata()[-1] == pytest.approx(23)


def test_a_seed_that_diverges_ends_the_mean():
    figure = figures.gradient_norm_by_policy(
        [made_run(diverges=4), made_run(seed=1), made_run(gr_policy="zero")]
    )
    off, zero = lines(figure.axes[0])
    np.testing.assert_array_equal(np.isfinite(off.get_ydata()), np.arange(1, 11) <= 4)
    assert np.isfinite(zero.get_ydata()).all()
    assert legend(figure)[0] == "gr off (1 of 2 diverged)"


def test_runs_that_diverged_before_they_were_evaluated_are_counted(check):
    runs = over("optimizer_name", ("adam", "sgd"))
    runs += [made_run(seed=3, diverges=0, ended=ended) for ended in (True, False)]
    runs += [made_run(optimizer_name="yogi", diverges=0, ended=False)]
    runs += [made_run(data_name="cifar100", diverges=0)]  # alone there
    figure = figures.learning_curves(runs)
    check(figure)
    assert legend(figure) == [
        *("adam: 23.00 ± 3.61 % (2 of 5 diverged)", "yogi (diverged)", "sgd: 23.00 ± 3.61 %"),
    ]
    np.testing.assert_allclose(lines(figure.axes[0])[0].get_ydata()[-1], 23)


def test_panels_are_of_data_sets_and_models_and_a_setting_looks_alike_in_all():
    runs = [
        run
        for model in ("vgg16", "vgg16_bn")
        for run in over("weight_decay_kind", ("vanilla", "coupled"), model_name=model)
    ]
    figure = figures.gradient_norm_by_decay(runs)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["vgg16", "vgg16_bn"]
    for first, second in zip(*map(lines, figure.axes), strict=True):
        assert first.get_color() == second.get_color()
        np.testing.assert_allclose(first.get_ydata(), 1.03 + 4 * (1 - np.arange(1, 11) / 10))
    assert legend(figure) == ["decay vanilla", "decay coupled"]


def test_only_what_a_figure_is_about_is_drawn():
    others = [made_run(data_name="cifar100", gr_policy="none"), made_run(text=True)]
    runs = over("gr_policy", POLICIES)
    assert len(lines(figures.gradient_norm_with_gr([*runs, others[0]]).axes[0])) == 2
    assert len(figures.gradient_norm_by_policy([*runs, others[0]]).axes) == 1
    assert len(lines(figures.vanilla_against_coupled(KINDS).axes[0])) == 2
    assert len(lines(figures.learning_curves([*KINDS, others[1]]).axes[0])) == 3
    restarts = seeds(lr_schedule="restarts")
    assert len(lines(figures.warm_restarts([*KINDS, *restarts]).axes[0])) == 1


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("error_by_policy", ({"gr_policy": "zero"}, {})),
        ("gradient_norm_by_policy", ({"gr_policy": "zero"}, {})),
        ("gradient_norm_with_gr", ({"gr_policy": "none"}, {})),
        ("vanilla_against_coupled", [{"weight_decay_kind": k} for k in ("vanilla", "coupled")]),
        ("gradient_norm_by_decay", [{"weight_decay_value": value} for value in (1e-4, 1e-3)]),
        ("error_against_decay", [{"weight_decay_value": value} for value in (1e-4, 1e-3)]),
        ("long_training", ({"epochs": 10.0}, {"epochs": 100.0})),
    ],
)
def test_what_differs_between_models_alone_is_not_compared(name, fields):
    first, second = ({"weight_decay_kind": "coupled"} | each for each in fields)
    runs = [made_run(model_name="vit_s", **first), made_run(model_name="vit_b", **second)]
    with pytest.raises(UserError):
        figures.PAPER_FIGURES[name].draw(runs)


def test_the_legend_has_the_order_of_the_settings_and_one_alone_is_called_by_its_size():
    runs = over("optimizer_name", ("rmsprop", "adam"), model_name="vit_b")
    runs += over("optimizer_name", ("sgd",), model_name="vit_ti")
    runs += [made_run(optimizer_name="yogi", model_name="vit_ti")]
    labels = [setting.label for setting in comparison.group(seeds_alone(runs))]
    assert legend(figures.loss_against_error(runs)) == labels
    assert legend(figures.learning_curves(seeds()))[0].startswith("3 runs: 23.00 ±")
    assert legend(figures.learning_curves([made_run()])) == ["1 run: 20.00 %"]
    assert not figures.loss_against_error(seeds()).legends  # nothing to tell apart


def seeds_alone(runs):
    """The same settings, on one model."""
    return [made_run(optimizer_name=run.setting("optimizer.name")) for run in runs]


def test_the_warmup_is_shaded_where_all_runs_have_the_same():
    runs = over("gr_policy", ("off", "none"))
    (shade,) = figures.gradient_norm_with_gr(runs).axes[0].patches
    assert (shade.get_x(), shade.get_width()) == (0, 2)
    runs += over("gr_policy", ("off", "none"), lr_warmup="1ep")
    assert not figures.gradient_norm_with_gr(runs).axes[0].patches


def test_scheduled_decay_has_its_factor_the_gradient_norm_and_the_loss():
    figure = figures.scheduled_decay(KINDS)
    factor, norm, loss = figure.axes
    (line,) = lines(factor)
    left = 1 - np.arange(1, 11) / 10
    norms = [1 + shift + 4 * left for shift in (0.0, 0.02, 0.07)]
    np.testing.assert_allclose(line.get_ydata(), np.mean([100 / each for each in norms], axis=0))
    assert len(lines(norm)) == len(lines(loss)) == 3
    np.testing.assert_allclose(lines(norm)[0].get_ydata(), np.mean(norms, axis=0))
    np.testing.assert_allclose(lines(loss)[0].get_ydata(), 0.3 + 2 * left)


def test_perplexity_is_drawn_as_it_is():
    figure = figures.perplexity_curves(seeds(text=True))
    (line,) = lines(figure.axes[0])
    np.testing.assert_allclose(line.get_ydata(), 100 * (1.03 + 1 - np.arange(1, 11) / 10))


def test_long_trainings_have_a_logarithmic_epoch():
    (axes,) = figures.long_training(SUITABLE["long_training"]).axes
    assert axes.get_xscale() == "log"
    short, long = lines(axes)
    assert short.get_xdata()[-1] == 10 and long.get_xdata()[-1] == 100
    assert axes.get_xlim()[0] < 1 and axes.get_xlim()[1] > 100


# --- Final errors -------------------------------------------------------------------------------


def test_the_error_by_policy_has_means_and_deviations_over_seeds():
    runs = seeds(gr_policy="off") + seeds((0.01,), gr_policy="zero")
    (axes,) = figures.error_by_policy(runs).axes
    off, zero = axes.containers
    (mean,), (low,) = off.lines[0].get_xdata(), off.lines[2][0].get_segments()
    std = 100 * np.sqrt((0.03**2 + 0.01**2 + 0.04**2) / 2)
    assert mean == pytest.approx(23) and low[:, 0] == pytest.approx([23 - std, 23 + std])
    assert zero.lines[0].get_xdata() == pytest.approx([21]) and not zero.has_xerr
    (points,) = [line for line in axes.lines if len(line.get_xdata()) == 3]
    np.testing.assert_allclose(np.sort(points.get_xdata()), [20, 22, 27])


def test_the_error_by_policy_has_a_row_a_setting_and_a_panel_a_data_set():
    runs = [
        made_run(gr_policy=policy, optimizer_name=optimizer, data_name=data)
        for policy in ("off", "zero")
        for optimizer in ("adam", "rmsprop")
        for data in ("cifar10", "cifar100")
    ]
    figure = figures.error_by_policy(runs)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["cifar10", "cifar100"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["adam", "rmsprop"]
    for axes in figure.axes:
        assert [round(bar.lines[0].get_ydata()[0], 9) for bar in axes.containers] == [
            *(-0.2, 0.2, 0.8, 1.2),
        ]


def test_settings_of_a_single_policy_have_a_row_and_one_row_alone_has_no_tick(check):
    runs = [made_run(lr_base=rate) for rate in (1e-2, 1e-4)]
    figure = figures.error_by_policy([*runs, made_run(lr_base=1e-3, gr_policy="zero")])
    check(figure)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["lr 1e-4", "lr 0.001", "lr 0.01"]
    at = [bar.lines[0].get_ydata()[0] for bar in figure.axes[0].containers]
    assert at == pytest.approx([-0.2, 1.2, 1.8])
    (axes,) = figures.error_by_policy([made_run(), made_run(gr_policy="zero")]).axes
    assert not len(axes.get_yticks())


def test_runs_that_diverged_or_have_not_ended_have_no_final_error():
    runs = [*seeds(gr_policy="off"), *seeds(gr_policy="zero")]
    runs += [made_run(seed=5, shift=9, ended=False), made_run(seed=6, shift=9, diverges=2)]
    (axes,) = figures.error_by_policy(runs).axes
    assert axes.containers[0].lines[0].get_xdata() == pytest.approx([23])


def test_the_error_against_the_decay():
    runs = [
        made_run(seed=seed, shift=shift + seed / 100, weight_decay_kind=kind, weight_decay_value=x)
        for kind, x, shift in (
            *(("scheduled", 1e-4, 0.1), ("scheduled", 1e-3, 0.0), ("scheduled", 1e-2, 0.2)),
            *(("decoupled", 1e-2, 0.3), ("decoupled", 1e-1, 0.1), ("none", 0.0, 0.4)),
        )
        for seed in (0, 2)
    ]
    figure = figures.error_against_decay(runs)
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    decoupled, scheduled = axes.containers
    np.testing.assert_allclose(scheduled.lines[0].get_xdata(), [1e-4, 1e-3, 1e-2])
    np.testing.assert_allclose(scheduled.lines[0].get_ydata(), [31, 21, 41])
    np.testing.assert_allclose(decoupled.lines[0].get_ydata(), [51, 31])
    for segment, middle in zip(scheduled.lines[2][0].get_segments(), (31, 21, 41), strict=True):
        np.testing.assert_allclose(segment[:, 1], [middle - np.sqrt(2), middle + np.sqrt(2)])
    (level,) = [line for line in axes.lines if list(line.get_xdata()) == [0, 1]]  # all the width
    assert level.get_ydata() == pytest.approx([61, 61])
    assert len(legend(figure)) == 3


def test_the_error_over_learning_rate_and_decay():
    rates, strengths = (1e-4, 1e-3, 1e-2), (1e-5, 1e-3)
    shifts = {(r, s): 0.01 * i for i, (r, s) in enumerate((r, s) for r in rates for s in strengths)}
    runs = [
        made_run(
            seed=seed,
            shift=shift + 0.01 * seed,
            lr_base=rate,
            weight_decay_kind="decoupled",
            weight_decay_value=strength,
        )
        for (rate, strength), shift in shifts.items()
        for seed in (0, 1)
    ]
    lost = {"lr_base": 0.1, "weight_decay_value": 1e-3, "weight_decay_kind": "decoupled"}
    figure = figures.error_over_lr_and_decay([*runs, made_run(diverges=3, **lost)])
    axes, bar = figure.axes
    assert bar.get_ylabel() == "test error (%)"
    figure.draw_without_rendering()
    assert [label.get_text() for label in bar.get_yticklabels()] == ["21", "22", "23", "24", "25"]
    assert axes.get_xscale() == axes.get_yscale() == "log"
    (dots,) = [c for c in axes.collections if len(c.get_offsets()) == 6]
    drawn = {tuple(xy): z for xy, z in zip(dots.get_offsets(), dots.get_array(), strict=True)}
    assert drawn == {at: pytest.approx(20.5 + 100 * shift) for at, shift in shifts.items()}
    star, cross = axes.lines
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (1e-4, 1e-5)
    assert (cross.get_xdata()[0], cross.get_ydata()[0]) == (0.1, 1e-3)


def test_what_survived_where_others_diverged_is_marked_and_never_the_best():
    def grid(kind):
        return [
            made_run(
                seed=seed,
                shift=-0.1 if (rate, strength) == (1e-2, 1e-3) else 0.1 * rate,
                diverges=3 if (rate, strength) == (1e-2, 1e-3) and seed else None,
                lr_base=rate,
                weight_decay_kind=kind,
                weight_decay_value=strength,
            )
            for rate in (1e-3, 1e-2)
            for strength in (1e-4, 1e-3, 1e-2)
            for seed in SEEDS
        ]

    figure = figures.error_over_lr_and_decay(grid("l2"))
    star, cross = figure.axes[0].lines
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (1e-3, 1e-4)
    assert (cross.get_xdata()[0], cross.get_ydata()[0]) == (1e-2, 1e-3)
    assert [text.get_text() for text in figure.axes[0].texts] == ["2 of 3"]
    assert legend(figure) == ["so many of the seeds diverged"]

    figure = figures.error_against_decay([r for r in grid("l2") if r.setting("lr.base") == 1e-2])
    (bar,) = figure.axes[0].containers
    ends = [len(segment) for segment in bar.lines[2][0].get_segments()]
    assert ends == [2, 0, 2], "one seed has no deviation"
    (cross,) = [line for line in figure.axes[0].lines if line.get_marker() == "x"]
    assert (cross.get_xdata()[0], cross.get_ydata()[0]) == (1e-3, pytest.approx(10))
    assert legend(figure) == ["all (2 of 9 diverged)"]

    figure = figures.loss_against_error(grid("l2"))
    assert [label for label in legend(figure) if "diverged" in label] == [
        "lr 0.01, decay 0.001 (2 of 3 diverged)"
    ]


def test_policies_of_which_seeds_diverged_say_so(check):
    runs = [*seeds(gr_policy="off"), made_run(gr_policy="r")]
    runs += [made_run(gr_policy="r", seed=seed, diverges=2) for seed in (1, 2)]
    runs += [made_run(gr_policy="zero", seed=seed, diverges=2) for seed in SEEDS]
    figure = figures.error_by_policy(runs)
    check(figure)
    assert [text.get_text() for text in figure.axes[0].texts] == [
        *("× 2 of 3 diverged", "× 3 of 3 diverged"),
    ]
    assert legend(figure) == ["gr off", "gr r", "gr zero"]


def test_the_contour_has_a_panel_an_optimizer_and_needs_more_than_a_line():
    two = [
        made_run(optimizer_name=name, lr_base=r, weight_decay_kind="l2", weight_decay_value=s)
        for name in ("adam", "sgd")
        for r in (1e-3, 1e-2)
        for s in (1e-4, 1e-3)
    ]
    figure = figures.error_over_lr_and_decay(two)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["adam", "sgd", ""]
    diagonal = {1e-4: 1e-5, 1e-3: 1e-4, 1e-2: 1e-3}
    line = [
        made_run(lr_base=rate, weight_decay_kind="l2", weight_decay_value=strength)
        for rate, strength in diagonal.items()
    ]
    with pytest.raises(UserError, match="grid"):
        figures.error_over_lr_and_decay(line)


def test_a_point_is_a_run_at_its_losses_and_errors():
    runs = [made_run(shift=0.05), made_run(seed=1), made_run(optimizer_name="sgd", shift=0.1)]
    runs += [made_run(seed=2, diverges=5), made_run(seed=3, ended=False)]
    adam, sgd = figures.loss_against_error(runs).axes[0].lines
    np.testing.assert_allclose(adam.get_xdata(), [0.3, 0.3])
    np.testing.assert_allclose(adam.get_ydata(), [25, 20])
    np.testing.assert_allclose(sgd.get_ydata(), [30])


# --- Measures of sharpness ----------------------------------------------------------------------


def test_eigenvalues_by_rank_are_those_of_the_last_checkpoint(measured):
    figure = figures.hessian_eigenvalues(measured)
    off, zero = lines(figure.axes[0])
    np.testing.assert_array_equal(off.get_xdata(), [1, 2, 3, 4])
    np.testing.assert_allclose(off.get_ydata(), 3 * 3 * np.array([8, 4, 2, 1]))
    np.testing.assert_allclose(zero.get_ydata(), 3 * 0.5 * np.array([8, 4, 2, 1]))
    edges = figure.axes[0].collections[0].get_paths()[0].vertices
    std = 3 * 8 * np.sqrt((2**2 + 1 + 3**2) / 2)
    at_first = sorted({round(y, 6) for x, y in edges if x == 1})
    np.testing.assert_allclose(at_first, [72 - std, 72 + std], rtol=1e-5)


def test_measures_along_training(measured):
    draws = figures.sam_sharpness, figures.adaptive_lr_variance, figures.adaptive_lr_spread
    for draw, scale in zip(draws, (1, 10, 20), strict=True):
        off, zero = lines(draw(measured).axes[0])
        np.testing.assert_array_equal(off.get_xdata(), [0, 5, 10])
        np.testing.assert_allclose(off.get_ydata(), 3 * scale * np.array([1, 2, 3]))
        np.testing.assert_allclose(zero.get_ydata(), 0.5 * scale * np.array([1, 2, 3]))


def test_seeds_that_were_measured_at_other_epochs_are_a_line_each(tmp_path):
    runs = [
        measured_run(tmp_path / str(seed), epochs=(seed, 3 + seed, 10), seed=seed)
        for seed in range(3)
    ]
    drawn = lines(figures.sam_sharpness(runs).axes[0])
    assert [list(line.get_xdata()) for line in drawn] == [[0, 3, 10], [1, 4, 10], [2, 5, 10]]


def test_the_spectral_density_has_a_line_a_run_of_what_is_positive(measured):
    drawn = lines(figures.spectral_density(measured).axes[0])
    assert len(drawn) == 6
    np.testing.assert_array_equal(drawn[1].get_xdata(), [0, 1, 2])
    np.testing.assert_array_equal(drawn[1].get_ydata(), [0.5, 6, np.nan])


def test_loss_surfaces_share_their_bands(measured):
    figure = figures.loss_surface(measured)
    first, second, _ = figure.axes
    levels = [axes.collections[0].levels for axes in (first, second)]
    np.testing.assert_array_equal(*levels)
    assert (levels[0][0], levels[0][-1]) == (0.5, 4)  # 0.5 (1 + 0) and 1 (1 + 1 + 2)
    assert [axes.get_title(loc="left") for axes in (first, second)] == ["gr off", "gr zero"]


@pytest.mark.parametrize("scale", [2.25, 0.01, 30.0])
@pytest.mark.parametrize("curvature", [0.0, 0.02, 1.0, 40.0, 1e5])
def test_colour_bars_have_round_labels_that_differ(tmp_path, scale, curvature):
    run = measured_run(tmp_path)
    path = tmp_path / "sharpness.jsonl"
    row = json.loads(path.read_text().splitlines()[-1])
    row["surface"]["loss"] = [
        [scale * (1 + curvature * (x * x + y * y)) for x in (-1, 0, 1)] for y in (-1, 0, 1)
    ]
    path.write_text(json.dumps(row) + "\n")
    figure = figures.loss_surface([run])
    figure.draw_without_rendering()
    shown = [label.get_text() for label in figure.axes[-1].get_yticklabels()]
    assert 2 <= len(shown) <= 12 and len({*shown}) == len(shown)
    digits = [f"{float(label):.9e}".partition("e")[0].rstrip("0") for label in shown]
    assert max(map(len, digits)) <= (5 if curvature else 7), shown


def test_a_loss_surface_with_nothing_finite_is_left_out(measured, tmp_path, check):
    lost = measured_run(tmp_path, gr_policy="r")
    path = tmp_path / "sharpness.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["surface"]["loss"] = [[None] * 3] * 3
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    figure = figures.loss_surface([*measured, lost])
    check(figure)
    assert len(figure.axes) == 3
    with pytest.raises(UserError, match="no finite value"):
        figures.loss_surface([lost])


def test_a_loss_surface_of_one_point_is_none(measured, tmp_path):
    """As older versions measured with --surface=1."""
    point = measured_run(tmp_path, gr_policy="r")
    path = tmp_path / "sharpness.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    one = {"x": [0.0], "y": [0.0], "loss": [[1.0]]}
    path.write_text("".join(json.dumps(row | {"surface": one}) + "\n" for row in rows))
    assert len(figures.loss_surface([*measured, point]).axes) == 3
    with pytest.raises(UserError, match="--surface=21"):
        figures.loss_surface([point])


def test_a_surface_is_found_though_its_checkpoint_was_measured_without_one_since(tmp_path):
    run = measured_run(tmp_path)
    path = tmp_path / "sharpness.jsonl"
    row = json.loads(path.read_text().splitlines()[-1])
    rows = row, row | {"surface": None, "eigenvalues": [9.0] * 4}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert figures.loss_surface([run]).axes
    assert lines(figures.hessian_eigenvalues([run]).axes[0])[0].get_ydata()[0] == 9


def test_only_what_was_measured_alike_is_averaged(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    few, many = {"max_examples": 10, "lanczos_steps": 40}, {"max_examples": 200, "radius": 0.1}
    runs = [measured_run(one, settings=few), measured_run(two, 3.0, settings=many, seed=1)]
    for name in MEASURED:
        if name.startswith("adaptive_lr"):  # which no setting bears upon
            assert figures.PAPER_FIGURES[name].draw(runs).axes
            continue
        with pytest.raises(UserError, match=f"different settings; measure .*={one} --sharp") as e:
            figures.PAPER_FIGURES[name].draw(runs)
        assert "--max_examples=200" in str(e.value)
        assert ("--surface=" in str(e.value)) == (name == "loss_surface")
        assert ("--radius=0.1" in str(e.value)) == (name == "sam_sharpness")
    measured_run(one, 5.0, settings=many)
    measured_run(one, 7.0, settings=few)
    (line,) = lines(figures.sam_sharpness(runs).axes[0])
    np.testing.assert_allclose(line.get_ydata(), [4, 8, 12])


def test_runs_that_were_not_measured_say_how_to(tmp_path):
    for name in MEASURED:
        with pytest.raises(UserError, match=r"gnp\.evaluate .*--sharpness"):
            figures.PAPER_FIGURES[name].draw([made_run(workdir=tmp_path)])


@pytest.mark.parametrize(("last", "count"), [(10.02, 10), (10.6, 11)])
def test_a_row_over_the_few_steps_that_were_left_is_no_point_of_a_curve(last, count):
    """Of 10 rows an epoch apart and one more: of its loss, while the evaluation keeps it."""
    run = made_run()
    for columns in run.metrics.values():
        for key, values in columns.items():
            columns[key] = np.append(values, last if key == "epoch" else 7.0)
    (setting,) = comparison.group([run])
    [train], [test] = (many_runs.curves(setting, split, "loss") for split in ("train", "test"))
    assert len(train.x) == count and len(test.x) == 11
