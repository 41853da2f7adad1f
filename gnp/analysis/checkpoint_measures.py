"""Measures the sharpness at a run's checkpoints; see `gnp.analysis.measures` for what they are."""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from etils import epath
from ml_collections import ConfigDict

from gnp.analysis import adaptive_lr, measures, sharpness
from gnp.analysis.loss_surface import direction, loss_surface
from gnp.analysis.mean_loss import MeanLoss, split_loss
from gnp.analysis.measures import Settings
from gnp.data.loading import device_memory
from gnp.errors import UserError
from gnp.training.checkpoint import Checkpoints
from gnp.training.experiment import Experiment, make_experiment, on_one_device
from gnp.training.state import TrainState, num_params
from gnp.training.workdir import essential

_log = logging.getLogger(__name__)

_SPLIT = "train"
_LARGEST_SHARE = 0.8  # of the memory that vectors as long as the parameters may take
_OTHERS = 8  # such vectors, beside Lanczos': the state's, the gradient, products
_DIGITS = 7  # of the numbers of densities and surfaces, of which there are many


def measure_checkpoints(
    config: ConfigDict,
    workdir: epath.PathLike,
    settings: Settings,
    *,
    steps: Sequence[int] | None = None,
    on_start: Callable[[int, int], None] = lambda step, num_passes: None,
    on_pass: Callable[[], None] = lambda: None,
) -> Iterator[dict[str, Any]]:
    """Measures checkpoints one after another, and appends each to the run's `sharpness.jsonl`.

    What has been measured of the same checkpoint with the same settings is read from there, the
    loss surface and all else each by itself. In float32, on one device, over the split "train" as
    in evaluation: no augmentation, no dropout, running statistics, and the cross-entropy without an
    L2 penalty. All checkpoints see the same random vectors.

    Args:
      config: the run's.
      workdir: the run's directory.
      settings: what to measure.
      steps: which checkpoints; by default all.
      on_start: called with the step and the number of passes over the data before one is measured.
      on_pass: called after each pass.

    Yields:
      Rows, in the order of the steps.

    Raises:
      UserError: if there is no such checkpoint, or it cannot be measured.
    """
    config = on_one_device(config)
    checkpoints = Checkpoints(workdir, config=essential(config))
    config.dtype = "float32"
    there = checkpoints.steps()
    wanted = sorted(there if steps is None else steps)
    sums = {step: checkpoints.checksum(step) for step in there}
    rows: dict[int, list[dict[str, Any]]] = {step: [] for step in wanted}
    for old in measures.load_all(workdir):
        # A run that was begun anew has other values at the same step.
        if old["checksum"] in (None, sums.get(old["step"], old["checksum"])):
            rows.setdefault(old["step"], []).append(old)
    known = {step: measures.known(rows[step], settings) for step in wanted}
    if not wanted:
        raise UserError(f"no checkpoint in {workdir}; has the run been started?")
    for step in wanted:
        if step not in there and None in known[step]:
            raise UserError(f"no checkpoint of step {step} in {workdir}; there are {there[::-1]}")
    measured: _Measured | None = None
    for step in wanted:
        row, plane = known[step]
        missing = (row is None) * settings.num_passes + (plane is None) * settings.surface**2
        if missing:
            if measured is None:
                measured = _Measured(config, settings, on_pass)
            on_start(step, missing)
            state = checkpoints.restore(measured.experiment.abstract_state, step)
            row = row or measured.but_surface(state)
            plane = plane or {"surface": measured.surface(state, row)}
        assert row is not None and plane is not None
        row = {
            **row,
            "surface": plane["surface"],
            "settings": dataclasses.asdict(settings),
            "checksum": sums.get(step, row["checksum"]),
        }
        if missing:
            measures.append(workdir, row)
        yield row


class _Measured:
    """The measures of states, with programs that are compiled once."""

    def __init__(self, config: ConfigDict, settings: Settings, on_pass: Callable[[], None]):
        self.experiment = make_experiment(config)
        _check_memory(self.experiment, settings)
        self._settings, self._on_pass = settings, on_pass
        self._data = self.experiment.load_data()
        self._mean_loss: MeanLoss | None = None

    def _loss(self, state: TrainState) -> MeanLoss:
        if self._mean_loss is None:
            self._mean_loss = split_loss(
                *(self.experiment.model, self._data, _SPLIT, self.experiment.mesh, state),
                max_examples=self._settings.max_examples,
                on_pass=self._on_pass,
            )
        return self._mean_loss

    def but_surface(self, state: TrainState) -> dict[str, Any]:
        """The row of a state, without the loss surface."""
        settings, experiment = self._settings, self.experiment
        loss, others = self._loss(state), state.model_state
        here, grad = loss.value_and_grad(state.params, others)
        grad_norm = float(optax.tree.norm(grad))
        rates = adaptive_rates(state.opt_state, experiment.config.optimizer)
        if rates.left_out:
            _log.warning(
                "step %d: %d of the %d parameters have no adaptive learning rate, since their "
                "second moment is 0; what is said of it is about the others",
                *(state.step, rates.left_out, num_params(state.params)),
            )
        row: dict[str, Any] = {
            "step": int(state.step),
            "epoch": int(state.step) / experiment.steps_per_epoch,
            "split": _SPLIT,
            "num_examples": round(loss.num_examples),
            "loss": here,
            "grad_norm": grad_norm,
            "weight_norm": float(optax.tree.norm(state.params)),
            **_not_finite(),
            "radius": settings.radius,
            "adaptive_lr_variance": rates.variance,
            "adaptive_lr_spread": rates.spread,
            "checksum": None,
        }
        if math.isfinite(here) and math.isfinite(grad_norm):
            row |= _spectrum(lambda v: loss.hvp(state.params, v, others), state.params, settings)
            row["sam_sharpness"] = sharpness.sam_sharpness(
                lambda params: loss.value(params, others),
                lambda params: loss.value_and_grad(params, others),
                state.params,
                settings.radius,
                num_ascents=settings.ascents,
                at_params=(here, grad),
            )
        return row

    def surface(self, state: TrainState, row: dict[str, Any]) -> dict[str, Any] | None:
        """The loss surface of a state, whose other measures are known."""
        if not math.isfinite(row["loss"]) or not math.isfinite(row["grad_norm"]):
            return None
        loss, settings, params = self._loss(state), self._settings, state.params
        keys = jax.random.split(jax.random.fold_in(jax.random.key(settings.seed), 1))
        places = np.linspace(-settings.extent, settings.extent, settings.surface)
        values = loss_surface(
            lambda moved: loss.value(moved, state.model_state),
            params,
            (direction(keys[0], params), direction(keys[1], params)),
            *(places, places),
        )
        x = _rounded(places)
        return {"x": x, "y": x, "loss": [_rounded(line) for line in values]}


class AdaptiveRates(NamedTuple):
    """The adaptive learning rates of the parameters, in three numbers.

    Attributes:
      variance: `adaptive_lr.measured_variance`.
      spread: `adaptive_lr.measured_spread`.
      left_out: how many parameters have none, since their second moment is 0.
    """

    variance: float | None
    spread: float | None
    left_out: int


def adaptive_rates(opt_state: optax.OptState, config: ConfigDict) -> AdaptiveRates:
    r"""The adaptive learning rates :math:`1 / \sqrt{\hat v}` in an optimizer's state.

    :math:`\hat v` is what the optimizer divides by the root of, or by another power of: the
    bias-corrected second moment, of AMSGrad and Padam its running maximum, of RMSProp the moment as
    it is.

    Args:
      opt_state: the optimizer's state, however deep in chains.
      config: a configuration's `optimizer`.

    Returns:
      With None for what is not finite, or if the optimizer has no second moment.
    """
    name = "nu_max" if config.name in ("amsgrad", "padam") else "nu"
    moments = adaptive_lr.second_moments(opt_state, name)
    if len(moments) != 1:
        return AdaptiveRates(None, None, 0)
    nu, count = moments[0]
    if config.name == "rmsprop":
        variance = adaptive_lr.measured_variance(nu, 1, 0.0)  # nothing to correct
    else:
        variance = adaptive_lr.measured_variance(nu, count, config.b2)
    spread = adaptive_lr.measured_spread(nu)
    left_out = sum(int(np.sum(np.asarray(x) == 0)) for x in jax.tree.leaves(nu))
    return AdaptiveRates(_finite(variance), _finite(spread), left_out)


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def _not_finite() -> dict[str, Any]:
    """What the spectrum and SAM's sharpness are where the loss or its gradient is not finite."""
    nan = math.nan
    return {
        **{"eigenvalues": [], "eigenvalue_errors": [], "trace": nan, "trace_error": nan},
        **{"density": {"eigenvalue": [], "density": []}, "sam_sharpness": nan},
    }


def _spectrum(matvec: sharpness.Matvec, like: Any, settings: Settings) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(settings.seed), settings.trace_probes)
    systems, samples = [], []
    for i, key in enumerate(keys):
        probe = sharpness.rademacher(key, like)
        if i < settings.density_probes:
            systems.append(sharpness.tridiagonalise(matvec, probe, settings.lanczos_steps))
            samples.append(systems[-1].quadratic_form)
        else:
            samples.append(sharpness.quadratic_form(matvec, probe))
    if not all(np.isfinite([*x.diagonal, *x.off_diagonal]).all() for x in systems):
        return _not_finite()
    values, errors = sharpness.top_eigenvalues(systems[0], settings.eigenvalues)
    trace, trace_error = sharpness.trace(samples)
    grid, density = sharpness.spectral_density(systems)
    return {
        **{"eigenvalues": values.tolist(), "eigenvalue_errors": errors.tolist()},
        **{"trace": trace, "trace_error": trace_error},
        "density": {"eigenvalue": _rounded(grid), "density": _rounded(density)},
    }


def _rounded(values: np.ndarray) -> list[float]:
    """To a few digits; what nobody could see beside the largest is 0."""
    values = np.where(np.abs(values) < 1e-12 * np.abs(values).max(), 0, values)
    return [float(f"{x:.{_DIGITS}g}") for x in values]


def _check_memory(experiment: Experiment, settings: Settings) -> None:
    """Refuses what would not fit, before anything is computed."""
    size = num_params(experiment.abstract_state.params)
    needed = 4 * size * (min(settings.lanczos_steps, size) + _OTHERS)
    memory = device_memory(experiment.mesh)
    if needed > _LARGEST_SHARE * memory:
        raise UserError(
            f"lanczos_steps is {settings.lanczos_steps}: so many vectors of {size:,} parameters "
            f"are {needed / 1e9:.3g} GB, and there are {memory / 1e9:.3g} GB of memory; lower it"
        )
