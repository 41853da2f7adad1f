"""python -m gnp.data.preview: draws augmented training images, as the train step sees them."""

import pathlib
from collections.abc import Sequence
from typing import Any

from gnp import config as gnp_config
from gnp.command_line import Parser, run
from gnp.errors import UserError

DESCRIPTION = """\
Draws training images with their labels, augmented and cut as the train step sees them.

Every field of the configuration can be set, as --config.data.augment=heavy."""


def main() -> int:
    """Parses the flags, makes a batch, and draws it."""
    parser = Parser("gnp.data.preview", DESCRIPTION)
    parser.add_argument("--config", required=True, metavar="FILE.py[:ARGUMENT]")
    parser.add_argument("--out", required=True, type=pathlib.Path, help="a file to write, .png")
    parser.add_argument("--step", type=int, default=0, help="of which step (default: 0)")
    parser.add_argument("--rows", type=int, default=4, help="of images (default: 4)")
    parser.add_argument("--columns", type=int, default=8, help="of images (default: 8)")
    flags, fields = parser.parse_with_fields()
    for name in ("rows", "columns"):
        if not 1 <= getattr(flags, name) <= 50:
            raise UserError(f"--{name} is {getattr(flags, name)}; it must be from 1 to 50")
    config = gnp_config.load(flags.config, fields)
    gnp_config.validate(config)

    # Here, so that --help and a mistyped field do not wait for JAX.
    import jax
    import numpy as np
    from matplotlib.figure import Figure

    from gnp.data import loading
    from gnp.data.records import Source
    from gnp.training.experiment import make_experiment

    experiment = make_experiment(config)
    source = experiment.source
    if not isinstance(source, Source):
        raise UserError(f"{source.name} is a text; there are no images to draw")
    if not 0 <= flags.step < experiment.total_steps:
        raise UserError(
            f"--step is {flags.step}; the run has the steps 0 to {experiment.total_steps - 1}"
        )
    data = experiment.load_data()
    batch = jax.device_get(loading.train_batch(data, flags.step))

    batches: Any = data.train_batches
    mean, std = batches.preprocessing.mean, batches.preprocessing.std
    pixels = np.clip(batch["input"] * std + mean, 0, 1)
    classes = source.classes
    figure = Figure(figsize=(1.5 * flags.columns, 1.7 * flags.rows + 0.5), layout="constrained")
    axes = figure.subplots(flags.rows, flags.columns, squeeze=False)
    for i, axis in enumerate(axes.flat):
        axis.set_axis_off()
        if i < len(pixels):
            image = pixels[i, ..., 0] if pixels.shape[-1] == 1 else pixels[i, ..., :3]
            axis.imshow(image, cmap="gray", vmin=0, vmax=1)
            axis.set_title(_caption(batch["label"][i], classes), fontsize=8)
    shown = min(len(pixels), axes.size)
    title = (
        f"{source.name}, step {flags.step}: {shown} of {len(pixels)} images of "
        f"{pixels.shape[2]} × {pixels.shape[1]} pixels, augment = {config.data.augment}"
    )
    figure.suptitle(title, fontsize=9, wrap=True)
    try:
        figure.savefig(flags.out, dpi=120)
    except (OSError, ValueError) as error:  # ValueError: of a suffix that is no image's
        raise UserError(f"cannot write {flags.out}: {error}") from None
    print(f"wrote {flags.out}: {title}; {data.about}")
    return 0


def _caption(label: Any, classes: Sequence[str]) -> str:
    """A class's name, or of mixed labels the names of the largest two with their shares."""
    if label.ndim == 0:
        return _shorten(str(classes[int(label)]))
    first, second = label.argsort()[::-1][:2]
    if label[second] < 2 * label.min() + 0.01:  # what smoothing gives to every class
        return f"{_shorten(str(classes[first]))} {label[first]:.2f}"
    return "\n".join(f"{_shorten(str(classes[k]))} {label[k]:.2f}" for k in (first, second))


def _shorten(name: str) -> str:
    # Dollar signs would be mathematics to Matplotlib.
    name = name if len(name) <= 16 else name[:15] + "…"
    return name.replace("$", r"\$")


if __name__ == "__main__":
    run(main)
