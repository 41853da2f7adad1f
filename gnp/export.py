"""python -m gnp.export: a checkpoint's weights in a file that timm reads."""

import pathlib
from typing import TYPE_CHECKING, Any

from etils import epath

from gnp.command_line import Parser, config_of, directory, run
from gnp.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from ml_collections import ConfigDict

DESCRIPTION = """\
Writes the weights of a run's checkpoint under timm's names, float32, to a .safetensors file, and
says how timm loads them. Beside the weights the file has the model's name, the step and the
images' size."""

# What timm calls our models; where it has none of the size, one that the sizes are given to.
_NAMES = {
    "vit_ti": "vit_tiny_patch16_224",
    "vit_s": "vit_small_patch16_224",
    "vit_b": "vit_base_patch16_224",
    "swin_t": "swin_tiny_patch4_window7_224",
    "swin_s": "swin_small_patch4_window7_224",
    "swin_b": "swin_base_patch4_window7_224",
    "cait_xxs12": "cait_xxs24_224",
    "cait_xxs24": "cait_xxs24_224",
    "cait_xs12": "cait_xs24_384",
    "cait_s12": "cait_s24_224",
}


def main() -> int:
    """Parses the flags, writes the file, and says what it holds."""
    parser = Parser("gnp.export", DESCRIPTION)
    parser.add_argument("--workdir", required=True, type=directory, help="the run's directory")
    parser.add_argument("--step", help="which checkpoint, or best; by default the newest")
    parser.add_argument(
        "--out", required=True, type=pathlib.Path, metavar="FILE.safetensors", help="what to write"
    )
    parser.add_argument(
        "--average", action="store_true", help="the moving average of the parameters"
    )
    parser.add_argument("--data_dir", help="where the data set is, if not where the run had it")
    flags = parser.parse_args()
    if flags.out.suffix != ".safetensors":
        raise UserError(f"--out={flags.out} does not end in .safetensors, by which timm knows it")
    if not flags.out.parent.is_dir():
        raise UserError(f"--out: there is no directory {flags.out.parent}")
    config = config_of(flags.workdir)
    if flags.data_dir:
        config.data.data_dir = flags.data_dir

    # Here, since JAX is slow to import.
    from gnp.training.evaluation import find_step

    step = find_step(config, flags.workdir, flags.step)
    tensors, metadata, call = export(config, flags.workdir, step=step, average=flags.average)
    _write(flags.out, tensors, metadata)
    print(
        f"{flags.out}: {metadata['model']} at step {metadata['step']} of {flags.workdir}, "
        f"{len(tensors)} tensors"
    )
    if call is None:
        print("timm has the names of these tensors, but no model of its own that takes them all")
    else:
        print(f"in timm: {call}, checkpoint_path={str(flags.out)!r})")
    return 0


def export(
    config: "ConfigDict",
    workdir: epath.PathLike,
    *,
    step: int | None = None,
    average: bool = False,
) -> tuple[dict[str, "np.ndarray"], dict[str, str], str | None]:
    """Reads a checkpoint as timm's tensors.

    Args:
      config: the run's.
      workdir: the run's directory.
      step: which checkpoint; by default the newest.
      average: whether to take the moving average of the parameters.

    Returns:
      The tensors by timm's names; "model", "step" and "image_size" as text; and the beginning of
      the call that makes the model in timm, None if timm has none.

    Raises:
      UserError: if there is no such checkpoint or average, or timm has no models of the kind.
    """
    # Here, since JAX is slow to import.
    import jax

    from gnp.models import pretrained
    from gnp.training.checkpoint import Checkpoints
    from gnp.training.experiment import make_experiment, on_one_device
    from gnp.training.state import with_average
    from gnp.training.workdir import essential

    pretrained.check_counterpart(config.model.name)
    if average and config.ema.decay is None:
        raise UserError(f"{workdir} has no average of the parameters; train with config.ema.decay")
    experiment = make_experiment(on_one_device(config))
    checkpoints = Checkpoints(workdir, config=essential(config))
    state = checkpoints.restore(experiment.abstract_state, step)
    if average:
        state = with_average(state)
    variables = jax.device_get({"params": state.params, **state.model_state})
    tensors = pretrained.to_timm(config.model.name, variables)
    _, image_size, _, channels = experiment.example.shape
    metadata = {
        "model": config.model.name,
        "step": str(int(state.step)),
        "image_size": str(image_size),
    }
    call = timm_call(config.model.name, experiment.model, image_size, channels)
    return tensors, metadata, call


def timm_call(name: str, model: Any, image_size: int, channels: int = 3) -> str | None:
    """The call that makes a model of ours in timm, but for its end: "timm.create_model(…".

    None if timm has no model of the kind.
    """
    from gnp import models

    file = models.list_models()[name].file
    arguments: dict[str, Any] = {"num_classes": model.num_classes}
    if channels != 3:
        arguments["in_chans"] = channels
    if file in ("vit", "swin", "cait"):
        arguments |= {
            "img_size": image_size,
            "patch_size": model.patch_size,
            "embed_dim": model.width,
            "mlp_ratio": model.mlp_ratio,
        }
        if not float(model.mlp_ratio * model.width).is_integer():
            return None  # timm cuts off what we round
    if file in ("vit", "cait"):
        arguments |= {"depth": model.depth, "num_heads": model.num_heads}
    if file == "vit" and model.pool == "mean":
        arguments |= {"class_token": False, "global_pool": "avg", "fc_norm": False}
    elif file == "cait":
        arguments |= {
            "depth_token_only": model.class_depth,
            "mlp_ratio_token_only": model.mlp_ratio,
        }
    elif file == "swin":
        heads = tuple(model.num_heads * 2**stage for stage in range(len(model.depths)))
        arguments |= {
            "window_size": model.window_size,
            "depths": tuple(model.depths),
            "num_heads": heads,
        }
    elif file in ("resnet", "vgg", "densenet"):
        registered = models.create(name, model.num_classes, image_size=224)
        sizes = ("stem", "depths", "bottleneck", "width", "batch_norm", "hidden_size")
        more = ("growth_rate", "bottleneck_size", "compression")
        if any(getattr(model, x, None) != getattr(registered, x, None) for x in sizes + more):
            return None
    text = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    return f"timm.create_model({_NAMES.get(name, name)!r}, {text}"


def _write(path: pathlib.Path, tensors: dict[str, "np.ndarray"], metadata: dict[str, str]) -> None:
    """Writes the file in one step: an interruption leaves the old file, if any, or the new one."""
    from safetensors.numpy import save

    from gnp.files import write_atomically

    try:
        write_atomically(path, save(tensors, metadata))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


if __name__ == "__main__":
    run(main)
