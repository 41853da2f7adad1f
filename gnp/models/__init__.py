"""Models by name. A model's file is imported when the model is made."""

import importlib
from typing import TYPE_CHECKING, Any

from gnp.errors import UserError, unknown

if TYPE_CHECKING:
    import flax.linen as nn

# name: (file, class, sizes)
_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit_ti": ("vit", "VisionTransformer", {"width": 192, "depth": 12, "num_heads": 3}),
    "vit_s": ("vit", "VisionTransformer", {"width": 384, "depth": 12, "num_heads": 6}),
    "vit_b": ("vit", "VisionTransformer", {"width": 768, "depth": 12, "num_heads": 12}),
}


def list_models() -> list[str]:
    """The names of all models."""
    return list(_MODELS)


def create(name: str, num_classes: int, *, image_size: int, **overrides: Any) -> "nn.Module":
    """Makes a model.

    Args:
      name: one of `list_models()`.
      num_classes: the number of logits.
      image_size: the height and width of the images in pixels; it sets sizes that depend on it,
        as a transformer's patch.
      **overrides: fields of the model's module, in place of the registered ones.

    Returns:
      A Flax Linen module with `init(key, images)` and `apply(variables, images, train=…)`, for
      `images` float32[B, H, W, C]; logits are float32[B, num_classes].

    Raises:
      UserError: for an unknown name or field, or sizes that do not fit together.
    """
    if name not in _MODELS:
        raise unknown("model", name, list_models())
    file, class_name, sizes = _MODELS[name]
    module = getattr(importlib.import_module(f"gnp.models.{file}"), class_name)
    fields = [f for f in module.__dataclass_fields__ if f not in ("parent", "name")]
    for field in overrides:
        if field not in fields:
            error = unknown("field", field, fields)
            raise UserError(f"model {name!r} has an {error}")
    return module.for_images(num_classes=num_classes, image_size=image_size, **sizes | overrides)
