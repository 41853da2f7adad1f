"""The trials of a sweep: their configurations, names, directories and commands."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import pathlib
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from gnp import config as gnp_config
from gnp.errors import UserError
from gnp.sweeps.parameters import MAX_TRIALS

_LONGEST_NAME = 160  # characters; file systems take 255 bytes, and ".log" is added


class Trial(NamedTuple):
    """One run of a sweep.

    Attributes:
      name: of its directory and its log, unique in the sweep.
      setting: the name without the seed, which the seeds of one setting share.
      seed: its seed.
      config: the configuration that it is to have.
      flags: those of `gnp.train`, but for --workdir.
    """

    name: str
    setting: str
    seed: int
    config: ConfigDict
    flags: tuple[str, ...]

    def workdir(self, out: pathlib.Path) -> pathlib.Path:
        """Its work directory in a sweep's directory."""
        return out / "trials" / self.name

    def log(self, out: pathlib.Path) -> pathlib.Path:
        """What it prints."""
        return out / "logs" / f"{self.name}.log"

    def command(self, out: pathlib.Path) -> list[str]:
        """The command line that trains it, or continues it."""
        return [sys.executable, "-m", "gnp.train", *self.flags, f"--workdir={self.workdir(out)}"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What all trials of a sweep have in common.

    Attributes:
      file: the config file.
      argument: its argument, "" for none.
      overrides: pairs of a field's path and its value as text, from the command line.
    """

    file: str
    argument: str
    overrides: tuple[tuple[str, str], ...]

    @classmethod
    def parse(cls, flag: str, overrides: Sequence[tuple[str, str]]) -> "Recipe":
        """From --config=FILE.py:ARGUMENT and what --config.FIELD=VALUE there is."""
        file, _, argument = flag.partition(":")
        return cls(file, argument, tuple(overrides))

    def load(self) -> ConfigDict:
        """The configuration before anything is varied."""
        return gnp_config.load(self._config_flag({}), self.overrides)

    def is_argument(self, name: str, texts: Sequence[str]) -> bool:
        """Whether a name is one of the config file's arguments, or else a field.

        A name with a dot is a field. Any other is an argument if the file loads with it.

        Raises:
          UserError: if it is neither.
        """
        config = self.load()
        if "." in name:
            gnp_config.override(config, name, texts[0])  # refuses an unknown field
            return False
        refused: UserError | None = None
        for text in texts:
            try:
                gnp_config.load(self._config_flag({name: text}))
            except UserError as error:
                refused = refused or error
            else:
                return True
        if name not in config:
            raise UserError(f"there is no field config.{name}, and {refused}")
        if isinstance(config[name], ConfigDict):
            raise UserError(
                f"{refused}; for a field write {name}.FIELD ({', '.join(config[name])})"
            )
        return False

    def undone(self, argument: str, texts: Sequence[str], fields: Iterable[str]) -> list[str]:
        """Which of the fields undo what an argument of the config file sets, if they are set too.

        They are those that take its value as it is; where there is none, all that differ among its
        values (or from the file's own, if there is but one), if all of them are set. So `decay` may
        be combined with weight_decay.value, which it sets too, but not with weight_decay.kind, and
        `scale` with epochs.
        """
        configs = {}
        for text in texts:
            with contextlib.suppress(UserError):  # which its trial will tell
                configs[text] = gnp_config.flat(
                    gnp_config.load(self._config_flag({argument: text}))
                )
        compared = list(configs.values())
        if len(compared) == 1:
            compared.append(gnp_config.flat(gnp_config.load(self._config_flag({}))))
        known = set().union(*compared)
        differing = {x for x in known if len({repr(config.get(x)) for config in compared}) > 1}
        verbatim = {
            x
            for x in known
            if all(str(config.get(x)).lower() == text.lower() for text, config in configs.items())
        }
        given = {*fields}
        if told := verbatim & differing or (verbatim if not differing else set()):
            return sorted(told & given)
        return sorted(differing) if differing and differing <= given else []

    def canonical(self, name: str, text: str) -> str:
        """A field's value as it is written in names, so that 1e-3 and 0.001 are one value.

        Raises:
          UserError: if it is not of the field's type.
        """
        config = self.load()
        gnp_config.override(config, name, text)
        value: Any = config
        for part in name.split("."):
            value = value[part]
        if isinstance(value, tuple):
            return ",".join(map(str, value))
        return str(value).lower() if value is None or isinstance(value, bool) else str(value)

    def trial(
        self,
        values: Mapping[str, str],
        arguments: Sequence[str],
        seed: int,
        *,
        label: str = "",
        check: bool = True,
    ) -> Trial:
        """The trial with these values of what is varied.

        Args:
          values: parameter → value as text.
          arguments: the parameters that are arguments of the config file.
          seed: the seed.
          label: what its name begins with in place of the values.
          check: whether the configuration is to be validated.

        Raises:
          UserError: if its configuration cannot be loaded or is not valid, with its name.
        """
        setting = label or ",".join(f"{name}={value}" for name, value in values.items())
        name = _safe(f"{setting},seed={seed}".removeprefix(","))
        flag = self._config_flag({key: values[key] for key in values if key in arguments})
        fields = [(key, text) for key, text in values.items() if key not in arguments]
        overrides = [*self.overrides, *fields, ("seed", str(seed))]
        try:
            config = gnp_config.load(flag, overrides)
            if check:
                gnp_config.validate(config)
        except UserError as error:
            raise UserError(f"trial {name}: {error}") from None
        flags = (f"--config={flag}", *(f"--config.{field}={text}" for field, text in overrides))
        return Trial(name, setting, seed, config, flags)

    def _config_flag(self, arguments: Mapping[str, str]) -> str:
        """FILE.py:ARGUMENT with some of its arguments replaced or added."""
        for name, text in arguments.items():
            if "," in text:
                raise UserError(f"{name}={text}: an argument of the config file has no commas")
        kept = [x for x in self.argument.split(",") if x and x.partition("=")[0] not in arguments]
        argument = ",".join([*kept, *(f"{name}={text}" for name, text in arguments.items())])
        return f"{self.file}:{argument}" if argument else self.file


def resolve(
    recipe: Recipe, grid: Mapping[str, Sequence[str]]
) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """The grid with its values as they are written in names, and which names are arguments.

    Raises:
      UserError: for a name that is neither argument nor field or is set already, for values that
        are not of their field's type or come twice, and for a field that would undo an argument,
        whose trials would be other ones than their names say.
    """
    set_already = {field for field, _ in recipe.overrides}
    resolved, arguments = {}, []
    for name, texts in grid.items():
        if name == "seed":
            raise UserError("seeds are given by --seeds, as --seeds=5 or --seeds=3,7")
        if name in set_already:
            raise UserError(f"config.{name} is both varied and set by --config.{name}; leave one")
        if recipe.is_argument(name, texts):
            arguments.append(name)
        else:
            texts = [recipe.canonical(name, text) for text in texts]
        if twice := [text for i, text in enumerate(texts) if text in texts[:i]]:
            raise UserError(f"{name} has the value {twice[0]} twice")
        resolved[name] = tuple(texts)
    flags = {field: f"--config.{field}" for field in set_already}
    flags |= {name: name for name in resolved if name not in arguments}
    for argument in arguments:
        if undone := recipe.undone(argument, resolved[argument], flags):
            raise UserError(
                f"config.{undone[0]} is set by the argument {argument} and by {flags[undone[0]]}, "
                "and a trial's name would say what it does not train; leave one"
            )
    return resolved, tuple(arguments)


def product(
    recipe: Recipe,
    values: Mapping[str, Sequence[str]],
    arguments: Sequence[str],
    seeds: Sequence[int] | None,
) -> list[Trial]:
    """The trials of all combinations of the values, all seeds of a setting one after another.

    Without gradient regularization its other fields do nothing: such trials are trained once, and
    have none of them.

    Args:
      recipe: what they have in common.
      values: the values of each parameter, as `resolve` gives them.
      arguments: the parameters that are arguments of the config file.
      seeds: the seeds; None for the configuration's own.

    Raises:
      UserError: for too many trials, one that is not valid, two of one configuration, or fields of
        gradient regularization without any.
    """
    seeds = own_seed(recipe, seeds)
    count = len(seeds)
    for texts in values.values():
        count *= len(texts)
    if count > MAX_TRIALS:
        raise UserError(f"this makes {count:,} trials; a sweep has at most {MAX_TRIALS:,}")
    of_gr = {x for x in values if x.startswith("gr.") and x not in ("gr.policy", *arguments)}
    trials: dict[str, Trial] = {}
    for combination in itertools.product(*values.values()):
        for seed in seeds:
            chosen = dict(zip(values, combination, strict=True))
            trial = recipe.trial(chosen, arguments, seed)
            if of_gr and trial.config.gr.policy == "off":
                used = {name: text for name, text in chosen.items() if name not in of_gr}
                trial = recipe.trial(used, arguments, seed)
            trials[trial.name] = trial
    if of_gr and all(trial.config.gr.policy == "off" for trial in trials.values()):
        raise UserError(f"{min(of_gr)} does nothing in any trial: gr.policy is off")
    names: dict[str, str] = {}
    for trial in trials.values():
        other = names.setdefault(json.dumps(trial.config.to_dict()), trial.name)
        if other != trial.name:
            raise UserError(
                f"trials {other} and {trial.name} have the same configuration: the config file "
                "makes nothing of what differs"
            )
    return list(trials.values())


def own_seed(recipe: Recipe, seeds: Sequence[int] | None) -> tuple[int, ...]:
    """The seeds of a sweep: those asked for, or the configuration's own.

    Raises:
      UserError: if they are given twice.
    """
    if seeds is None:
        return (int(recipe.load().seed),)
    if any(field == "seed" for field, _ in recipe.overrides):
        raise UserError("the seed is given by --seeds and by --config.seed; leave one")
    return tuple(seeds)


def shell(command: Sequence[str]) -> str:
    """A command as one types it."""
    return shlex.join(command)


def _safe(name: str) -> str:
    """The name as a file's; where that changes it, a hash keeps it unique."""
    safe = re.sub(r"[^\w.=,+%-]", "_", name, flags=re.ASCII)[:_LONGEST_NAME]
    if safe == name:
        return name
    return f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
