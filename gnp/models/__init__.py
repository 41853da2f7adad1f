"""Models by name. A model's file is imported when the model is made."""

import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

from gnp.errors import UserError, unknown

if TYPE_CHECKING:
    import flax.linen as nn

    from gnp.models.pretrained import load_pretrained

__all__ = ["ModelInfo", "ModelList", "create", "fields", "list_models", "load_pretrained"]

Count = tuple[int, float]  # parameters, GFLOPs


class ModelInfo(NamedTuple):
    """What is known of a model before it is made.

    Attributes:
      file: of `gnp/models/`, without its ending.
      class_name: the module's class there.
      sizes: fields of the module.
      small: (parameters, GFLOPs) with 10 classes at 32 × 32 pixels. GFLOPs are 10⁹ multiply-adds
        of the convolutions and matrix products for one image, as papers count them.
      large: the same with 1000 classes at 224 × 224 pixels. A language model's numbers are those
        with 10,000 words, for one word, in both places.
      paper: where the model is from.
      takes: "images" or "tokens".
    """

    file: str
    class_name: str
    sizes: dict[str, Any]
    small: Count
    large: Count
    paper: str
    takes: str = "images"


def _vit(width: int, num_heads: int, small: Count, large: Count) -> ModelInfo:
    sizes = {"width": width, "depth": 12, "num_heads": num_heads}
    paper = "Dosovitskiy et al. 2021, arXiv:2010.11929"
    return ModelInfo("vit", "VisionTransformer", sizes, small, large, paper)


def _swin(width: int, depth: int, num_heads: int, small: Count, large: Count) -> ModelInfo:
    sizes = {"width": width, "depths": (2, 2, depth, 2), "num_heads": num_heads}
    paper = "Liu et al. 2021, arXiv:2103.14030"
    return ModelInfo("swin", "SwinTransformer", sizes, small, large, paper)


def _cait(width: int, depth: int, num_heads: int, small: Count, large: Count) -> ModelInfo:
    sizes = {"width": width, "depth": depth, "num_heads": num_heads}
    return ModelInfo("cait", "CaiT", sizes, small, large, "Touvron et al. 2021, arXiv:2103.17239")


def _resnet(depths: tuple[int, ...], bottleneck: bool, small: Count, large: Count) -> ModelInfo:
    sizes = {"depths": depths, "bottleneck": bottleneck}
    return ModelInfo("resnet", "ResNet", sizes, small, large, "He et al. 2016, arXiv:1512.03385")


def _vgg(batch_norm: bool, small: Count, large: Count) -> ModelInfo:
    paper = "Simonyan & Zisserman 2015, arXiv:1409.1556"
    return ModelInfo("vgg", "VGG", {"batch_norm": batch_norm}, small, large, paper)


_MODELS: dict[str, ModelInfo] = {
    "vit_ti": _vit(192, 3, (5_362_762, 0.3651), (5_717_416, 1.2537)),
    "vit_s": _vit(384, 6, (21_342_346, 1.4203), (22_050_664, 4.5989)),
    "vit_b": _vit(768, 12, (85_152_010, 5.6010), (86_567_656, 17.5638)),
    "swin_t": _swin(96, 6, 3, (27_505_108, 0.3578), (28_288_354, 4.4906)),
    "swin_s": _swin(96, 18, 3, (48_805_732, 0.6999), (49_606_258, 8.7409)),
    "swin_b": _swin(128, 18, 4, (86_701_186, 1.2415), (87_768_224, 15.4309)),
    "cait_xxs12": _cait(192, 12, 4, (6_258_154, 0.3711), (6_612_808, 1.2913)),
    "cait_xxs24": _cait(192, 24, 4, (11_601_610, 0.7313), (11_956_264, 2.5235)),
    "cait_xs12": _cait(288, 12, 6, (14_032_378, 0.8204), (14_563_864, 2.7506)),
    "cait_s12": _cait(384, 12, 8, (24_903_370, 1.4456), (25_611_688, 4.7525)),
    "resnet18": _resnet((2, 2, 2, 2), False, (11_173_962, 0.5554), (11_689_512, 1.8141)),
    "resnet34": _resnet((3, 4, 6, 3), False, (21_282_122, 1.1594), (21_797_672, 3.6638)),
    "resnet50": _resnet((3, 4, 6, 3), True, (23_520_842, 1.2978), (25_557_032, 4.0892)),
    "vgg16": _vgg(False, (14_719_818, 0.3132), (138_357_544, 15.4703)),
    "vgg16_bn": _vgg(True, (14_728_266, 0.3132), (138_365_992, 15.4703)),
    "densenet121": ModelInfo(
        *("densenet", "DenseNet", {"depths": (6, 12, 24, 16)}),
        *((6_956_298, 0.8884), (7_978_856, 2.8342)),
        "Huang et al. 2017, arXiv:1608.06993",
    ),
    "googlenet": ModelInfo(
        *("googlenet", "GoogLeNet", {}),
        *((6_166_250, 1.5218), (6_624_904, 1.4984)),
        "Szegedy et al. 2015, arXiv:1409.4842",
    ),
    "lstm": ModelInfo(
        *("lstm", "LanguageModel", {"depth": 2, "embedding_size": 512, "hidden_size": 512}),
        *((14_448_400, 0.0093), (14_448_400, 0.0093)),
        "Zaremba et al. 2014, arXiv:1409.2329",
        takes="tokens",
    ),
}


class ModelList(dict[str, ModelInfo]):
    """The models by name; printed, it is a table."""

    def __repr__(self) -> str:
        """One model a line: its size and cost at 224 pixels and at 32, and its paper."""
        form = "{:<12} {:>12} {:>8} {:>12} {:>8}  {}"
        lines = [
            form.format("", "224 pixels,", "1000 cl.", "32 pixels,", "10 cl.", ""),
            form.format("model", "parameters", "GFLOPs", "parameters", "GFLOPs", "paper"),
        ]
        for name, info in self.items():
            (large, large_flops), (small, small_flops) = info.large, info.small
            sizes = (f"{large:,}", f"{large_flops:.2f}", f"{small:,}", f"{small_flops:.2f}")
            paper = info.paper
            if info.takes == "tokens":
                sizes = (f"{large:,}", f"{large_flops:.3f}", "", "")
                paper += " (10,000 words, GFLOPs for one)"
            lines.append(form.format(name, *sizes, paper))
        return "\n".join(line.rstrip() for line in lines)

    __str__ = __repr__


def __getattr__(name: str) -> Any:
    """Gives `load_pretrained`, whose file loads JAX, when it is asked for."""
    if name == "load_pretrained":
        return importlib.import_module("gnp.models.pretrained").load_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def list_models() -> ModelList:
    """All models, a dictionary from names to what is known of them; print it to see a table."""
    return ModelList(_MODELS)


def create(
    name: str, num_classes: int, *, image_size: int | None = None, **overrides: Any
) -> "nn.Module":
    """Makes a model.

    Args:
      name: one of `list_models()`.
      num_classes: the number of logits; for a language model, of words.
      image_size: the height and width of the images in pixels; it sets sizes that depend on it,
        as a transformer's patch or a CNN's stem. A language model has none.
      **overrides: fields of the model's module, in place of the registered ones.

    Returns:
      A Flax Linen module with `init(key, inputs)` and `apply(variables, inputs, train=…)`. Inputs
      are images float32[B, H, W, C], logits float32[B, num_classes]; for a language model, words
      int32[B, T] and logits float32[B, T, num_classes].

    Raises:
      UserError: for an unknown name or field, or sizes that do not fit together.
    """
    known = fields(name)
    info = _MODELS[name]
    for field in overrides:
        if field not in known:
            error = unknown("field", field, known)
            raise UserError(f"model {name!r} has an {error}")
    module = _module(info)
    arguments = {"num_classes": num_classes} | info.sizes | overrides
    if info.takes == "tokens":
        return module.for_tokens(**arguments)
    if image_size is None:
        raise UserError(f"model {name!r} wants the size of its images (image_size)")
    return module.for_images(image_size=image_size, **arguments)


def fields(name: str) -> list[str]:
    """The fields of a model's module that `create` takes.

    Raises:
      UserError: for an unknown name.
    """
    if name not in _MODELS:
        raise unknown("model", name, _MODELS)
    others = ("parent", "name", "num_classes")
    return [field for field in _module(_MODELS[name]).__dataclass_fields__ if field not in others]


def _module(info: ModelInfo) -> Any:
    return getattr(importlib.import_module(f"gnp.models.{info.file}"), info.class_name)
