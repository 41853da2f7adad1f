"""Configurations: every file in configs/, overrides, durations, and what is refused."""

import contextlib
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gnp import config as gnp_config
from gnp import transforms
from gnp.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def overridden(**fields):
    config = gnp_config.default()
    for field, text in fields.items():
        gnp_config.override(config, field.replace("__", "."), text)
    return config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_is_valid_and_says_its_command(path):
    gnp_config.validate(gnp_config.load(str(path)))
    assert f"python -m gnp.train --config=configs/{path.name}" in path.read_text()


def test_the_default_is_valid():
    gnp_config.validate(gnp_config.default())


def test_the_policies_are_those_of_the_transform():
    assert gnp_config.GR_POLICIES == transforms.POLICIES


def test_the_argument_of_a_config_file():
    path = str(ROOT / "configs" / "cifar_vit.py")
    config = gnp_config.load(f"{path}:model=vit_b,gr=r,optimizer=rmsprop", [("seed", "7")])
    assert (config.model.name, config.gr.policy) == ("vit_b", "r")
    assert (config.optimizer.name, config.seed) == ("rmsprop", 7)


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("gr.radius", "0.05", 0.05),
        ("epochs", "3", 3.0),
        ("seed", "12", 12),
        ("optimizer.nesterov", "true", True),
        ("lr.drops", "80ep,160ep", ("80ep", "160ep")),
        ("lr.warmup", "10%", "10%"),
        ("model.depth", "2", 2),
        ("clip_norm", "0.5", 0.5),
        ("clip_norm", "none", None),
        ("gr.warmup", "none", None),
    ],
)
def test_overrides_have_the_type_of_their_field(field, text, value):
    config = gnp_config.default()
    config.clip_norm = 1.0
    gnp_config.override(config, field, text)
    for part in field.split("."):
        config = config[part]
    assert config == value and type(config) is type(value)


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        ("gr.polcy", "zero", "unknown field 'config.gr.polcy'; did you mean 'config.gr.policy'?"),
        ("grr.policy", "zero", "did you mean 'config.gr'?"),
        (
            "gr",
            "zero",
            "config.gr is a group; set one of its fields: estimator, num_groups, policy",
        ),
        ("seed.x", "1", "config.seed is a value, it has no field 'x'"),
        ("gr.radius", "big", "'big' is not a number"),
        ("seed", "1.5", "'1.5' is not a whole number"),
        ("seed", "none", "'none' is not a whole number"),
        ("optimizer.nesterov", "yes", "'yes' is not true or false"),
    ],
)
def test_a_wrong_override_says_what_would_be_right(field, text, message):
    with pytest.raises(UserError) as error:
        gnp_config.override(gnp_config.default(), field, text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gr__policy": "zerro"}, "unknown config.gr.policy 'zerro'; did you mean 'zero'?"),
        ({"model__name": "vit_tl"}, "unknown config.model.name 'vit_tl'; did you mean 'vit_ti'?"),
        ({"data__resident": "ture"}, "unknown config.data.resident 'ture'; did you mean 'true'?"),
        ({"data__mean": "0.5,128"}, "config.data.mean is (0.5, 128); it must be a number for"),
        ({"data__std": "0,0.2,0.2"}, "config.data.std is (0, 0.2, 0.2); it must be a number for"),
        ({"data__augment": "bassic"}, "unknown augmentation 'bassic'; did you mean 'basic'?"),
        ({"optimizer__name": "adamm"}, "did you mean 'adam'?"),
        ({"weight_decay__kind": "decopled"}, "did you mean 'decoupled'?"),
        ({"lr__schedule": "cosin"}, "did you mean 'cosine'?"),
        ({"lr__warmup": "10"}, "config.lr.warmup: '10' is no duration: write epochs as '40ep'"),
        ({"lr__drops": "80ep,x"}, "config.lr.drops: 'x' is no duration"),
        ({"lr__warmup": "90ep"}, "config.lr.warmup is '90ep', longer than the run of 80 epochs"),
        ({"checkpoint__every": "0ep"}, "config.checkpoint.every is '0ep'; it must be above 0"),
        ({"gr__radius": "-0.1"}, "config.gr.radius is -0.1; it must be 0 or more"),
        ({"lr__base": "nan"}, "config.lr.base is nan; it must be a finite number"),
        ({"epochs": "0"}, "config.epochs is 0.0; it must be above 0"),
        ({"data__batch_size": "0"}, "config.data.batch_size is 0; it must be 1 or more"),
        ({"optimizer__b2": "1"}, "config.optimizer.b2 is 1.0; it must be at least 0 and below 1"),
        (
            {"gr__policy": "none", "gr__radius": "0"},
            "config.gr.ratio is 1.0 but config.gr.radius is 0; set a radius",
        ),
        ({"gr__policy": "zero"}, "config.gr.policy is 'zero' but there is no warmup; set"),
        (
            {"weight_decay__kind": "decoupled"},
            "config.weight_decay.kind is 'decoupled' but config.weight_decay.value is 0; set a",
        ),
        ({"weight_decay__value": "0.1"}, "but config.weight_decay.kind is 'none'; choose a kind"),
    ],
)
def test_an_impossible_value_says_what_would_be_right(fields, message):
    with pytest.raises(UserError) as error:
        gnp_config.validate(overridden(**fields))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("modle=vit_b", "unknown argument of the config file 'modle'; did you mean 'model'?"),
        ("model", "argument 'model' of the config file has no value; write model=…"),
        ("scale=smal", "did you mean 'small'?"),
    ],
)
def test_a_wrong_argument_of_a_config_file(argument, message):
    with pytest.raises(UserError) as error:
        gnp_config.load(f"{ROOT}/configs/cifar_vit.py:{argument}")
    assert message in str(error.value)


def test_a_missing_config_file_names_the_nearest(tmp_path):
    with pytest.raises(UserError, match=r"does not exist; did you mean '.*digits\.py'"):
        gnp_config.load(str(ROOT / "configs" / "digit.py"))
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UserError, match="does not define get_config"):
        gnp_config.load(str(tmp_path / "empty.py"))
    (tmp_path / "none.py").write_text("def get_config(argument):\n  pass\n")
    with pytest.raises(UserError, match="returns a NoneType; it must return a ConfigDict"):
        gnp_config.load(str(tmp_path / "none.py"))


def test_an_error_in_a_config_file_keeps_its_traceback(tmp_path):
    (tmp_path / "broken.py").write_text("def get_config(argument):\n  return undefined\n")
    with pytest.raises(NameError):
        gnp_config.load(str(tmp_path / "broken.py"))


@pytest.mark.parametrize(
    ("text", "steps"),
    [("40ep", 420), ("500st", 500), ("10%", 300), ("0ep", 0), ("0.01ep", 1), ("2.5ep", 26)],
)
def test_durations_in_steps(text, steps):
    duration = gnp_config.parse_duration(text)
    assert duration.steps(steps_per_epoch=10.5, total_steps=3000) == steps


@given(st.text())
def test_any_text_is_a_duration_or_a_user_error(text):
    try:
        duration = gnp_config.parse_duration(text)
    except UserError:
        return
    assert duration.value >= 0
    assert text.endswith(duration.unit)


FIELDS = list(gnp_config.flat(gnp_config.default()))


@given(st.sampled_from([*FIELDS, "gr", "nope", "gr.", ".", ""]), st.text(max_size=20))
def test_any_override_is_taken_or_a_user_error(field, text):
    """And whatever is taken is then valid or refused with a user's error."""
    config = gnp_config.default()
    with contextlib.suppress(UserError):
        gnp_config.override(config, field, text)
        gnp_config.validate(config)


def test_json_and_back():
    import json

    config = gnp_config.load(f"{ROOT}/configs/cifar_vit.py:scale=small")
    text = json.dumps(config.to_dict())
    assert gnp_config.from_json(text, where="x").to_dict() == config.to_dict()
    with pytest.raises(UserError, match="x is not a configuration"):
        gnp_config.from_json('{"nope": 1}', where="x")
    with pytest.raises(UserError, match="x is not valid JSON"):
        gnp_config.from_json("{", where="x")


def test_difference_names_the_fields():
    config = gnp_config.default()
    old = config.to_dict()
    config.gr.radius = 0.2
    assert gnp_config.difference(old, config.to_dict()) == ["config.gr.radius: 0.1 there, 0.2 here"]
