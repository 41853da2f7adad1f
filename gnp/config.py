"""The configuration: defaults, loading, overrides, validation, durations.

A config file is Python that defines `get_config(argument: str = "")`, which returns a
`ConfigDict` made from `default()`.
"""

import contextlib
import dataclasses
import importlib.util
import json
import math
import pathlib
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from gnp.errors import UserError, nearest, unknown

DTYPES = ("float32", "bfloat16")
OPTIMIZERS = ("adam", "amsgrad", "yogi", "radam", "adabound", "padam", "rmsprop", "sgd")
WEIGHT_DECAYS = ("none", "l2", "vanilla", "coupled", "decoupled", "scheduled")
LR_SCHEDULES = ("constant", "cosine", "step", "restarts")
LR_WARMUPS = ("linear", "constant")
_REMOVED = ("data.padding",)  # fields that older configurations have
DATA_RESIDENT = ("auto", "true", "false")
DATA_ON_DAMAGED = ("stop", "skip")
ON_NONFINITE = ("stop", "skip", "rollback")
GR_POLICIES = ("off", "none", "r", "lambda", "zero")
GR_ESTIMATORS = ("finite_difference", "exact")


def default() -> ConfigDict:
    """The configuration with every field at its default, locked.

    A `placeholder` is a field that is unset (None): for the model's sizes this means the
    registered ones (a model refuses a field that it does not have), for `gr.warmup` that of the
    learning rate, for `clip_norm` no clipping.
    """
    config = ConfigDict(
        {
            "seed": 0,
            "epochs": 80.0,
            "dtype": "float32",  # of the model's arithmetic; parameters, logits, loss: float32
            "steps_per_call": 16,  # at most so many steps run in one call of the compiled program
            "accumulate": 1,  # parts that a batch is gone through in, to save memory
            "clip_norm": placeholder(float),  # the global norm that gradients are clipped to
            "on_nonfinite": "stop",  # stop, skip, rollback: when loss or gradients are not finite
            "max_nonfinite": 10,  # steps in a row that are left out, or rollbacks; then it stops
            "watchdog": 300.0,  # seconds without progress after which all stacks are printed; 0: no
            "model": {
                "name": "vit_ti",
                "pretrained": placeholder(str),  # a .safetensors file of timm's to begin from
                "width": placeholder(int),  # of the first stage, where stages differ
                "depth": placeholder(int),  # vit, cait, lstm
                "depths": placeholder(tuple),  # blocks of each stage: swin, resnet, densenet
                "dropout": placeholder(float),  # vit, swin, cait, vgg, googlenet, lstm
                "stochastic_depth": placeholder(float),  # vit, swin, cait
                "patch_size": placeholder(int),  # vit, swin, cait: this and the next four
                "num_heads": placeholder(int),
                "mlp_ratio": placeholder(float),
                "scan": placeholder(bool),  # compile repeated blocks once, and run them in a loop
                "remat": placeholder(str),  # computed twice to save memory: none, full, dots
                "pool": placeholder(str),  # vit: token, mean
                "window_size": placeholder(int),  # swin
                "class_depth": placeholder(int),  # cait
                "layer_scale": placeholder(float),  # cait
                "stem": placeholder(str),  # CNNs: cifar, imagenet
                "batch_norm_groups": placeholder(int),  # CNNs: parts of a batch with own statistics
                "growth_rate": placeholder(int),  # densenet
                "embedding_size": placeholder(int),  # lstm
                "hidden_size": placeholder(int),  # lstm, vgg
            },
            "data": {
                "name": "digits",
                "data_dir": placeholder(str),  # None: TensorFlow Datasets' own
                "train": "train",  # a split, or a part of one as train[:90%]
                "validation": placeholder(str),  # likewise: evaluated beside test
                "test": placeholder(str),  # likewise; None: the data set's own
                "resident": "auto",  # auto, true, false: kept on the devices, or streamed
                "workers": placeholder(int),  # processes that decode what is streamed; None: cores
                "on_damaged": "stop",  # stop, skip: what a damaged image does
                "batch_size": 128,  # over all devices; of text, streams that are read side by side
                "sequence_length": 35,  # text: words of each stream in a step
                "image_size": placeholder(int),  # pixels on a side; None: the data set's own
                "resize": placeholder(int),  # side of images before a crop; None: 8/7 image_size
                "augment": "none",  # none, basic, heavy, or operations: pad_crop:4,flip
                "mean": placeholder(tuple),  # of each channel over 255; None: the data set's own
                "std": placeholder(tuple),
            },
            "optimizer": {
                "name": "adam",
                "b1": 0.9,  # all but rmsprop and sgd
                "b2": 0.999,  # likewise; also of the second moment of scheduled weight decay
                "eps": 1e-8,  # all but sgd
                "final_learning_rate": 0.1,  # adabound; scaled with the schedule
                "gamma": 1e-3,  # adabound
                "partial": 0.125,  # padam
                "decay": 0.9,  # rmsprop
                "momentum": 0.9,  # sgd
                "nesterov": False,  # sgd
                "freeze": (),  # patterns of parameters that stay as they are, as patch_embed,pos
            },
            # exclude: patterns of parameters without decay, as bias,norm
            "weight_decay": {"kind": "none", "value": 0.0, "exclude": ()},
            "lr": {
                "base": 1e-3,
                "schedule": "cosine",
                "warmup": "0st",
                "warmup_kind": "linear",
                "warmup_factor": 0.1,  # of base, during a constant warmup
                "drops": ("50%", "75%"),  # step: when the rate is multiplied by drop_factor
                "drop_factor": 0.1,
                "restart_period": "14ep",  # restarts: T_0
                "restart_multiplier": 2,  # restarts: T_mult
                "multipliers": (),  # of parameters' rates, PATTERN=FACTOR, as head=10
                "layer_decay": placeholder(float),  # of a layer's rate for each layer above it
            },
            "gr": {
                "policy": "off",
                "radius": 0.1,  # r
                "ratio": 1.0,  # lambda / r
                "warmup": placeholder(str),
                "num_groups": placeholder(int),  # parts of a batch with own perturbations
                "estimator": "finite_difference",  # finite_difference, exact
            },
            "ema": {"decay": placeholder(float)},  # average of the parameters, as 0.9999
            "mesh": {
                "data": -1,  # devices that have all parameters and a part of the batch; -1: all
                "fsdp": 1,  # devices that have a part of the parameters and a part of the batch
                "min_size": 65536,  # elements of an array that is divided over fsdp
                "rules": (),  # PATTERN=AXIS or PATTERN=none: how parameters are divided instead
            },
            "checkpoint": {
                "every": "10min",  # a duration, or minutes
                "keep": 2,  # the newest so many
                "best": placeholder(str),  # and that of the least metric, as validation/error
            },
            "log": {
                "every": "1ep",
                "adaptive_lr": False,  # how far apart the parameters' adaptive learning rates are
                "wandb": placeholder(str),  # a project of Weights & Biases
                "group": placeholder(str),  # and a group of runs in it
            },
            "eval": {"every": "1ep", "batch_size": 256},
        }
    )
    return config.lock()


# --- Durations ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Duration:
    """A length of training: `value` epochs ("ep"), steps ("st") or percent of the run ("%").

    For saving also minutes ("min"), which are no number of steps.
    """

    value: float
    unit: str

    def steps(self, steps_per_epoch: float, total_steps: int) -> int:
        """The duration in steps, to the nearest (at least 1 if the duration is not 0)."""
        if self.unit == "min":
            raise ValueError("minutes are no number of steps")
        scale = {"ep": steps_per_epoch, "st": 1.0, "%": total_steps / 100}[self.unit]
        return max(round(self.value * scale), 1) if self.value else 0


def parse_duration(text: str, *, minutes: bool = False) -> Duration:
    """Reads "40ep" (epochs), "500st" (steps), "10%" (of the run) or, where asked, "10min".

    Raises:
      UserError: if the text is none of these.
    """
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,12})?)(ep|st|%|min)", str(text))
    if not match or (match[2] == "min" and not minutes):
        raise UserError(
            f"{text!r} is no duration{' of training' if match else ''}: write epochs as '40ep', "
            "steps as '500st' or a share of the run as '10%'" + minutes * ", or minutes as '10min'"
        )
    return Duration(float(match[1]), match[2])


# --- Loading and overriding ---------------------------------------------------------------------


def load(path: str, overrides: Iterable[tuple[str, str]] = ()) -> ConfigDict:
    """Runs a config file and applies the command line's overrides.

    Args:
      path: "configs/file.py", or "configs/file.py:key=value,…" to pass an argument.
      overrides: pairs of a field's path and its value as text, as ("gr.radius", "0.05").

    Raises:
      UserError: if there is no such file, field, or value of the field's type.
    """
    filename, _, argument = path.partition(":")
    file = pathlib.Path(filename)
    if not file.is_file():
        others = sorted(str(p) for p in file.parent.glob("*.py"))
        hint = nearest(filename, others) if others else f"no config files in {file.parent}/"
        raise UserError(f"config file {filename!r} does not exist; {hint}")
    spec = importlib.util.spec_from_file_location("gnp_config_file", file)
    if spec is None or spec.loader is None:
        raise UserError(f"config file {filename!r} is not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"config file {filename!r} does not define get_config(argument)")
    config = module.get_config(argument)
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"get_config in {filename!r} returns a {type(config).__name__}; it must return a "
            "ConfigDict made from gnp.config.default()"
        )
    for field, text in overrides:
        override(config, field, text)
    return config


def override(config: ConfigDict, field: str, text: str) -> None:
    """Sets the field at a dotted path, as "gr.radius", to the value written in `text`.

    "none" unsets a field that may be unset; a tuple's elements are separated by commas.

    Raises:
      UserError: if there is no such field, or the text is not of the field's type.
    """
    *parents, name = field.split(".")
    node, path = config, "config"
    for part in [*parents, name]:
        if not isinstance(node, ConfigDict):
            raise UserError(f"{path} is a value, it has no field {part!r}")
        if part not in node:
            fields = [f"{path}.{key}" for key in node]
            raise unknown("field", f"{path}.{part}", fields)
        parent, node, path = node, node[part], f"{path}.{part}"
    if isinstance(node, ConfigDict):
        raise UserError(f"{path} is a group; set one of its fields: {', '.join(node)}")

    optional = flat(default()).get(field, ...) is None
    if optional and text.lower() == "none":
        parent[name] = None
        return
    kind = parent.get_type(name)
    parsers: dict[type, tuple[Callable[[str], Any], str]] = {
        bool: (_parse_bool, "true or false"),
        int: (int, "a whole number"),
        float: (float, "a number"),
        str: (str, "text"),
        tuple: (_parse_tuple, "a list a,b,c"),
    }
    parse, meaning = parsers[kind]
    try:
        parent[name] = parse(text)
    except ValueError:
        raise UserError(f"--{path}={text}: {text!r} is not {meaning}") from None


def from_json(text: str, *, where: str) -> ConfigDict:
    """Reads what `config.json` holds; `where` names it in errors.

    Raises:
      UserError: if it is not the JSON of a configuration.
    """
    config = default()
    known = flat(config)
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON: {error}") from None
    try:
        for field, value in flat(fields).items():
            if field not in known and field not in _REMOVED:
                raise ValueError(unknown("field", field, known))
            if value is not None and field in known:
                config.update_from_flattened_dict({field: value})
    except (
        *(ValueError, TypeError, KeyError, AttributeError),
        *(RecursionError, OverflowError),  # brackets without an end, numbers too large for a float
    ) as error:
        raise UserError(f"{where} is not a configuration of this version: {error}") from None
    return config


def arguments(text: str, **defaults: Any) -> types.SimpleNamespace:
    """Reads the argument of a config file, "key=value,key=value", with defaults and types.

    >>> arguments("gr=zero,depth=2", gr="off", depth=12, model="vit_ti")
    namespace(gr='zero', depth=2, model='vit_ti')

    Raises:
      UserError: if a key has no default (it is unknown), or a value is not of its type.
    """
    holder = ConfigDict(defaults)
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        if key not in defaults:
            raise unknown("argument of the config file", key, defaults)
        if not equals:
            raise UserError(f"argument {key!r} of the config file has no value; write {key}=…")
        override(holder, key, value)
    return types.SimpleNamespace(**{key: holder[key] for key in defaults})


def choose(argument: str, value: str, valid: Sequence[str]) -> None:
    """Checks that an argument of a config file has one of the valid values.

    Raises:
      UserError: if it has not, with the nearest valid one.
    """
    if value not in valid:
        raise unknown(f"{argument} in the argument of the config file", value, valid)


def _parse_bool(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise ValueError
    return text.lower() in ("true", "1")


def _parse_tuple(text: str) -> tuple[str | int | float, ...]:
    items = [item.strip() for item in text.split(",") if item.strip()]
    return tuple(map(_parse_item, items))


def _parse_item(text: str) -> str | int | float:
    for parse in (int, float):
        with contextlib.suppress(ValueError):
            return parse(text)
    return text


# --- Validation ---------------------------------------------------------------------------------


def validate(config: ConfigDict) -> None:
    """Checks all that can be known without the data and the devices.

    Raises:
      UserError: for the first value that is impossible, with what would be right.
    """
    fields, known = flat(config), flat(default())
    for field in fields:
        if field not in known:
            raise unknown("field", f"config.{field}", [f"config.{f}" for f in known])
    for field in known:
        if field not in fields:
            raise UserError(f"config.{field} is missing; start from gnp.config.default()")
    for field, value in fields.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"config.{field} is {value}; it must be a finite number")

    from gnp import data, models  # here, so that --help does not wait for JAX

    for field, valid in {
        "dtype": DTYPES,
        "model.name": models.list_models(),
        "data.resident": DATA_RESIDENT,
        "data.on_damaged": DATA_ON_DAMAGED,
        "on_nonfinite": ON_NONFINITE,
        "optimizer.name": OPTIMIZERS,
        "weight_decay.kind": WEIGHT_DECAYS,
        "lr.schedule": LR_SCHEDULES,
        "lr.warmup_kind": LR_WARMUPS,
        "gr.policy": GR_POLICIES,
        "gr.estimator": GR_ESTIMATORS,
    }.items():
        if fields[field] not in valid:
            raise unknown(f"config.{field}", fields[field], valid)
    operations = data.parse_augment(config.data.augment)
    holds, takes = data.holds(config.data.name), models.list_models()[config.model.name].takes
    if holds != takes:
        raise UserError(
            f"config.model.name is {config.model.name!r}, which takes {takes}, but "
            f"config.data.name is {config.data.name!r}, which holds {holds}"
        )
    if holds == "tokens" and operations:
        raise UserError(
            f"config.data.augment is {config.data.augment!r}, but {config.data.name} is a text; "
            "set it to none"
        )

    def require(field: str, holds: Callable[[Any], bool], meaning: str) -> None:
        value = fields[field]
        if value is not None and not holds(value):
            raise UserError(f"config.{field} is {value}; it must be {meaning}")

    for field in (
        *("epochs", "clip_norm", "lr.base", "model.mlp_ratio", "model.layer_scale"),
        *("optimizer.eps", "optimizer.final_learning_rate", "optimizer.gamma"),
    ):
        require(field, lambda x: x > 0, "above 0")
    for field in (
        *("steps_per_call", "data.batch_size", "eval.batch_size", "checkpoint.keep"),
        *("accumulate", "gr.num_groups", "mesh.fsdp", "mesh.min_size"),
        *("model.patch_size", "model.width", "model.depth", "model.num_heads"),
        *("model.window_size", "model.class_depth", "model.batch_norm_groups"),
        *("model.growth_rate", "model.embedding_size", "model.hidden_size", "max_nonfinite"),
        *("data.image_size", "data.resize", "data.sequence_length", "lr.restart_multiplier"),
    ):
        require(field, lambda x: x >= 1, "1 or more")
    require(
        "model.depths",
        lambda x: len(x) > 0 and all(isinstance(d, int) and d >= 1 for d in x),
        "a list of whole numbers, 1 or more, as 2,2,6,2",
    )
    for field in ("weight_decay.value", "gr.radius", "gr.ratio", "data.workers", "watchdog"):
        require(field, lambda x: x >= 0, "0 or more")
    for field in (
        *("optimizer.b1", "optimizer.b2", "optimizer.decay", "optimizer.momentum"),
        *("model.dropout", "model.stochastic_depth", "ema.decay"),
    ):
        require(field, lambda x: 0 <= x < 1, "at least 0 and below 1")
    for field in ("lr.warmup_factor", "lr.drop_factor", "lr.layer_decay"):
        require(field, lambda x: 0 < x <= 1, "above 0 and at most 1")
    for field, least in (("data.mean", 0.0), ("data.std", 1e-6)):
        if config.data[field.removeprefix("data.")] is not None:
            _check_channels(field, fields[field], least)
    require("optimizer.partial", lambda x: 0 <= x <= 0.5, "from 0 to 0.5")
    require("seed", lambda x: 0 <= x < 2**31, "from 0 to 2147483647")
    require("mesh.data", lambda x: x == -1 or x >= 1, "1 or more, or -1 for all devices")

    durations = {
        field: _parse_field(field, fields[field])
        for field in (
            *("lr.warmup", "gr.warmup", "lr.restart_period"),
            *("checkpoint.every", "log.every", "eval.every"),
        )
        if fields[field] is not None
    }
    for field in ("lr.restart_period", "checkpoint.every", "log.every", "eval.every"):
        if not durations[field].value:
            raise UserError(f"config.{field} is {fields[field]!r}; it must be above 0")
    for text in config.lr.drops:
        _parse_field("lr.drops", text)
    for field, duration in durations.items():
        length = {"ep": config.epochs, "%": 100}.get(duration.unit, math.inf)
        if field.endswith("warmup") and duration.value > length:
            raise UserError(
                f"config.{field} is {fields[field]!r}, longer than the run of "
                f"{config.epochs:g} epochs"
            )

    gr, decay = config.gr, config.weight_decay
    divisor = config.accumulate * (gr.num_groups or 1)
    if config.data.batch_size % divisor:
        raise UserError(
            f"config.data.batch_size is {config.data.batch_size}, which does not divide into "
            f"config.accumulate {config.accumulate} × config.gr.num_groups {gr.num_groups or 1} "
            f"parts; use a multiple of {divisor}"
        )
    if gr.num_groups is not None and gr.policy == "off":
        raise UserError(
            f"config.gr.num_groups is {gr.num_groups} but config.gr.policy is 'off'; unset it with "
            "--config.gr.num_groups=none, or choose a policy"
        )
    if gr.policy != "off" and gr.ratio > 0 and not gr.radius:
        raise UserError(
            f"config.gr.ratio is {gr.ratio} but config.gr.radius is 0; set a radius (the paper "
            "uses 0.05 or 0.1), or config.gr.policy=off"
        )
    warms = durations.get("gr.warmup", durations["lr.warmup"]).value > 0
    if gr.policy in ("r", "lambda", "zero") and not warms:
        raise UserError(
            f"config.gr.policy is {gr.policy!r} but there is no warmup; set config.lr.warmup or "
            "config.gr.warmup (as '10%'), or config.gr.policy=none"
        )
    if decay.kind != "none" and not decay.value:
        raise UserError(
            f"config.weight_decay.kind is {decay.kind!r} but config.weight_decay.value is 0; set a "
            "value (the papers use 5e-4 scheduled, 0.03 decoupled), or the kind to 'none'"
        )
    if decay.kind == "none" and decay.exclude:
        raise UserError(
            f"config.weight_decay.exclude is {','.join(map(str, decay.exclude))} but "
            f"config.weight_decay.kind is 'none'; choose a kind ({', '.join(WEIGHT_DECAYS[1:])})"
        )
    if decay.kind == "none" and decay.value:
        raise UserError(
            f"config.weight_decay.value is {decay.value} but config.weight_decay.kind is 'none'; "
            f"choose a kind ({', '.join(WEIGHT_DECAYS[1:])}), or set the value to 0"
        )


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The fields in which two configurations (as nested dicts) differ, a line each."""
    a, b = flat(old), flat(new)
    return [
        f"config.{field}: {a.get(field, 'missing')!r} there, {b.get(field, 'missing')!r} here"
        for field in sorted({*a, *b})
        if a.get(field, "missing") != b.get(field, "missing")
    ]


def _check_channels(field: str, values: Sequence[Any], least: float) -> None:
    if not values or not all(isinstance(x, int | float) and least <= x <= 1 for x in values):
        raise UserError(
            f"config.{field} is {values}; it must be a number for each channel, of pixels from 0 "
            "to 1, as 0.485,0.456,0.406"
        )


def _parse_field(field: str, text: str) -> Duration:
    try:
        return parse_duration(text, minutes=field == "checkpoint.every")
    except UserError as error:
        raise UserError(f"config.{field}: {error}") from None


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields by dotted path; lists as tuples, since JSON has only lists."""
    fields: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, (ConfigDict, Mapping)):
            fields |= flat(value, f"{prefix}{key}.")
        else:
            fields[f"{prefix}{key}"] = tuple(value) if isinstance(value, list) else value
    return fields
