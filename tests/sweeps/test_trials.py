"""Configurations, names and commands of trials."""

import pathlib

import pytest

from gnp import config as gnp_config
from gnp.errors import UserError
from gnp.sweeps.parameters import parse_grid
from gnp.sweeps.trials import Recipe, product, resolve

ROOT = pathlib.Path(__file__).parents[2]
DIGITS = str(ROOT / "configs/digits.py")


def trials_of(grid, *overrides, seeds=None, config=DIGITS):
    recipe = Recipe.parse(config, overrides)
    return product(recipe, *resolve(recipe, parse_grid([grid])), seeds)


def test_the_product_of_arguments_fields_and_seeds():
    trials = trials_of("gr=off,zero;lr.base=1e-3,0.002", ("epochs", "2"), seeds=(0, 5))
    assert [(trial.name, trial.setting) for trial in trials] == [
        (f"gr={gr},lr.base={rate},seed={seed}", f"gr={gr},lr.base={rate}")
        for gr in ("off", "zero")
        for rate in ("0.001", "0.002")
        for seed in (0, 5)
    ]
    trial = trials[-1]
    assert trial.flags == (
        *(f"--config={DIGITS}:gr=zero", "--config.epochs=2", "--config.lr.base=0.002"),
        "--config.seed=5",
    )
    expected = gnp_config.load(
        f"{DIGITS}:gr=zero", [("epochs", "2"), ("lr.base", "0.002"), ("seed", "5")]
    )
    assert trial.config.to_dict() == expected.to_dict()
    assert trial.workdir(pathlib.Path("out")) == pathlib.Path("out/trials") / trial.name


def test_arguments_that_the_command_line_gives_already_are_replaced():
    trials = trials_of("gr=off", config=f"{DIGITS}:optimizer=sgd,gr=zero")
    assert trials[0].flags[0] == f"--config={DIGITS}:optimizer=sgd,gr=off"
    assert (trials[0].config.gr.policy, trials[0].config.optimizer.name) == ("off", "sgd")


def test_a_name_without_a_dot_that_is_no_argument_is_a_field():
    trials = trials_of("epochs=1,2")
    assert [trial.config.epochs for trial in trials] == [1.0, 2.0]
    assert [trial.name for trial in trials] == ["epochs=1.0,seed=0", "epochs=2.0,seed=0"]


def test_without_seeds_the_seed_is_the_configurations():
    assert [trial.seed for trial in trials_of("gr=off", ("seed", "4"))] == [4]


@pytest.mark.parametrize(
    ("field", "texts", "values", "names"),
    [
        ("lr.drops", "[50%,75%],[1ep]", [("50%", "75%"), ("1ep",)], ["50%,75%", "1ep"]),
        ("model.depth", "none,2", [None, 2], ["none", "2"]),
        ("optimizer.nesterov", "true,0", [True, False], ["true", "false"]),
    ],
)
def test_values_are_typed_as_the_field_is(field, texts, values, names):
    trials = trials_of(f"{field}={texts}")
    group, name = field.split(".")
    assert [trial.config[group][name] for trial in trials] == values
    assert [trial.name for trial in trials] == [f"{field}={text},seed=0" for text in names]


def test_names_are_safe_as_files_and_unique():
    trials = trials_of("data.data_dir=a/b,a:b,../c," + "d" * 300, seeds=(0, 1))
    names = [trial.name for trial in trials]
    assert len({*names}) == 8
    for name in names:
        assert "/" not in name and ":" not in name and len(name.encode()) < 200
    again = trials_of("data.data_dir=a:b", seeds=(1,))
    assert again[0].name in names  # a name depends on nothing but the trial


@pytest.mark.parametrize(
    ("grid", "overrides", "message"),
    [
        ("gr=zreo,off", [], "trial gr=zreo,seed=0: unknown config.gr.policy 'zreo'; did you mean"),
        ("polcy=a", [], "there is no field config.polcy, and unknown argument of the config file"),
        ("gr.polcy=off", [], "unknown field 'config.gr.polcy'; did you mean 'config.gr.policy'?"),
        ("lr=1", [], "for a field write lr.FIELD (base, "),
        ("lr.base=a", [], "--config.lr.base=a: 'a' is not a number"),
        ("model.depth=1,0", [], "trial model.depth=0,seed=0: config.model.depth is 0; it must be"),
        ("lr.base=1e-3,0.001", [], "lr.base has the value 0.001 twice"),
        ("gr=off,zero", [("gr.policy", "r")], "by the argument gr and by --config.gr.policy"),
        ("gr=off", [("gr.policy", "zero")], "by the argument gr and by --config.gr.policy"),
        ("gr=zero", [("gr.policy", "off")], "by the argument gr and by --config.gr.policy"),
        ("gr=off;gr.policy=zero,none", [], "by the argument gr and by gr.policy, and a trial's"),
        ("optimizer=adam,sgd", [("optimizer.name", "adam")], "and by --config.optimizer.name"),
        ("lr.base=1,2", [("lr.base", "1")], "config.lr.base is both varied and set"),
        ("seed=1,2", [], "seeds are given by --seeds"),
        ("gr=[off,zero]", [], "an argument of the config file has no commas"),
        ("lr.base=linspace(1,2,200);gr.ratio=linspace(1,2,200)", [], "this makes 40,000 trials"),
    ],
)
def test_mistakes(grid, overrides, message):
    with pytest.raises(UserError) as error:
        trials_of(grid, *overrides)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("config", "grid", "overrides"),
    [
        ("digits.py", "gr=off,zero", [("gr.radius", "0.07")]),
        ("digits.py", "gr=off", [("lr.base", "0.01")]),
        ("digits.py", "optimizer=adam,sgd;lr.base=1e-3,1e-2", []),
        ("cifar_cnn.py", "decay=l2,scheduled;weight_decay.value=1e-4,1e-3", []),
    ],
)
def test_a_field_beside_an_argument_that_keeps_its_meaning(config, grid, overrides):
    assert trials_of(grid, *overrides, config=str(ROOT / "configs" / config))


def test_an_argument_without_a_field_of_its_value_is_told_by_the_fields_that_differ():
    folder = str(ROOT / "configs/folder.py")
    for grid in ("augment=crop,heavy", "augment=heavy"):
        assert trials_of(grid, ("data.image_size", "64"), config=folder)
        with pytest.raises(UserError, match=r"config.data.augment is set by the argument augment"):
            trials_of(grid, ("data.augment", "flip"), config=folder)


def test_values_that_the_config_file_makes_nothing_of(tmp_path):
    file = tmp_path / "recipe.py"
    file.write_text(
        "from gnp.config import default\ndef get_config(argument=''): return default()\n"
    )
    with pytest.raises(UserError, match="have the same configuration: the config file makes"):
        trials_of("x=1,2", config=str(file))


def test_without_regularization_its_fields_make_no_trials():
    for radii in ("0.05,0.1", "0.1,0.05"):
        made = trials_of(f"gr=off,zero;gr.radius={radii}", seeds=(0, 1))
        assert {trial.name for trial in made} == {
            f"gr={setting},seed={seed}"
            for setting in ("off", "zero,gr.radius=0.05", "zero,gr.radius=0.1")
            for seed in (0, 1)
        }
        assert not any("gr.radius" in flag for flag in made[0].flags)
    with pytest.raises(UserError, match=r"gr.radius does nothing in any trial: gr.policy is off"):
        trials_of("gr=off;gr.radius=0.05,0.1")


def test_an_argument_of_many_fields_may_be_combined_with_one_of_them():
    config = str(ROOT / "configs/cifar_cnn.py")
    made = trials_of("scale=small;optimizer=adam", ("epochs", "2"), config=config)
    assert [trial.config.epochs for trial in made] == [2]
    assert len(trials_of("scale=small;epochs=4,8", config=config)) == 2


def test_a_seed_is_given_once():
    with pytest.raises(UserError, match="by --seeds and by --config"):
        trials_of("gr=off", ("seed", "4"), seeds=(0, 1))
