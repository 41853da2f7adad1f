"""Our models against timm's, with the same weights: logits both ways through files.

Needs the extra `parity` (torch and timm); skipped without.
"""

import sys
import unittest.mock

import jax
import numpy as np
import pytest
import safetensors.numpy

from gnp import export, models
from gnp.models.pretrained import load_pretrained, to_timm

torch = pytest.importorskip("torch")


try:
    import torchvision  # noqa: F401
except (ImportError, RuntimeError, OSError):
    # timm imports transforms, data sets and one class of torchvision's, none of which a model
    # needs to be built and run. So a stand-in will do where torchvision is missing or is, as some
    # registries have it, for CUDA only.
    for part in ("", ".datasets", ".ops", ".ops.misc", ".transforms", ".transforms.functional"):
        sys.modules[f"torchvision{part}"] = unittest.mock.MagicMock()
timm = pytest.importorskip("timm")
from safetensors.torch import save_file  # noqa: E402  it comes with timm

# All registered models that timm has; the larger ones take long.
QUICK = ("vit_ti", "vit_s", "swin_t", "cait_xxs12", "resnet18", "resnet34", "resnet50")
SLOW = ("vit_b", "swin_s", "swin_b", "cait_xxs24", "cait_xs12", "cait_s12", "vgg16", "vgg16_bn")
SLOW += ("densenet121",)
FULL_SIZE = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
# (name, image size, fields): sizes for small images, and fields other than the registered ones.
OTHER_SIZES = [
    ("vit_ti", 32, {}),
    ("vit_ti", 32, {"pool": "mean", "depth": 3, "mlp_ratio": 3.0}),
    ("swin_t", 32, {}),
    ("swin_t", 64, {"depths": (2, 4), "num_heads": 2, "width": 32}),
    ("cait_xxs12", 32, {}),
    ("cait_xxs12", 32, {"class_depth": 3, "depth": 2, "mlp_ratio": 2.0}),
    ("resnet50", 96, {}),
]


def make(name, image_size, num_classes=1000, **fields):
    """A model of ours, and timm's by the call that the command line prints, and the call."""
    model = models.create(name, num_classes, image_size=image_size, **fields)
    call = export.timm_call(name, model, image_size)
    return model, called(f"{call})"), call


def called(call):
    return eval(call, {"timm": timm}).eval()


def randomize(model, seed=0):
    """Gives every parameter, BatchNorm's statistics too, values that matter for the logits."""
    generator = torch.Generator().manual_seed(seed)

    def normal(like, deviation, mean=0.0):
        return mean + deviation * torch.randn(like.shape, generator=generator)

    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("weight") and value.ndim > 1:  # 4: before a ReLU, in the CNNs
                value.copy_(normal(value, (value.ndim / 2 / value[0].numel()) ** 0.5))
            elif name.endswith("weight") or "gamma" in name:
                value.copy_(normal(value, 0.2, mean=0.7))
            else:  # biases, class tokens, tables
                value.copy_(normal(value, 0.3))
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    if norms:
        # The statistics of some images' features: with any others the logits overflow or vanish.
        for norm in norms:
            norm.momentum = 1.0
        model.train()
        with torch.no_grad():
            model(torch.randn(4, 3, 96, 96, generator=generator))
        model.eval()


def logits_of_theirs(model, images):
    with torch.no_grad():
        return model(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()


def logits_of_ours(model, variables, images):
    return np.asarray(jax.jit(model.apply)(variables, images))


def compare(name, image_size, path, **fields):
    """(our logits, timm's, timm's with our export of what we read) for random weights, images."""
    ours, theirs, call = make(name, image_size, **fields)
    randomize(theirs)
    save_file(theirs.state_dict(), path)
    variables = load_pretrained(name, path, image_size=image_size, **fields)
    images = np.random.default_rng(0).normal(size=(2, image_size, image_size, 3))
    images = images.astype(np.float32)
    logits, expected = logits_of_ours(ours, variables, images), logits_of_theirs(theirs, images)
    safetensors.numpy.save_file(to_timm(name, variables), path)
    again = called(f"{call}, checkpoint_path={str(path)!r})")
    return logits, expected, logits_of_theirs(again, images)


def is_transformer(name):
    return models.list_models()[name].file in ("vit", "swin", "cait")


def check(name, image_size, path, **fields):
    logits, expected, exported = compare(name, image_size, path, **fields)
    assert 0.1 < np.std(expected) < 10  # the tolerance is absolute
    # Nothing normalises a CNN's features again: what float32 rounds grows from layer to layer.
    tolerance = 1e-5 if is_transformer(name) else 1e-4
    np.testing.assert_allclose(logits, expected, rtol=0, atol=tolerance)
    np.testing.assert_array_equal(exported, expected)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_registered_sizes_at_224_pixels(name, tmp_path):
    fields = {"scan": True} if is_transformer(name) else {}  # quicker to compile, and the same
    check(name, 224, tmp_path / "model.safetensors", **fields)


@pytest.mark.parametrize(("name", "image_size", "fields"), OTHER_SIZES)
def test_other_sizes(name, image_size, fields, tmp_path):
    check(name, image_size, tmp_path / "model.safetensors", **fields)


@pytest.mark.parametrize("old", [5, 8])
@pytest.mark.parametrize("extra", [0, 1])
def test_position_embeddings_are_resized_as_timm_resizes_them(old, extra):
    from gnp.models.pretrained import _resize

    table = np.random.default_rng(0).normal(size=(1, old**2 + extra, 6)).astype(np.float32)
    for new in (3, 7, 14):
        expected = timm.layers.resample_abs_pos_embed(
            torch.from_numpy(table), [new, new], num_prefix_tokens=extra
        )
        np.testing.assert_allclose(_resize(table, new**2 + extra), expected, atol=1e-5)


def test_a_file_for_large_images_is_read_for_small_ones(tmp_path):
    """Position embeddings of 14 × 14 patches for 6 × 6, in the model as a whole."""
    path = tmp_path / "model.safetensors"
    _, theirs, _ = make("vit_ti", 224, depth=2)
    randomize(theirs)
    save_file(theirs.state_dict(), path)
    ours, smaller, _ = make("vit_ti", 96, depth=2, patch_size=16)
    timm.models.load_checkpoint(
        smaller, str(path), filter_fn=timm.models.vision_transformer.checkpoint_filter_fn
    )
    images = np.random.default_rng(0).normal(size=(2, 96, 96, 3)).astype(np.float32)
    variables = load_pretrained("vit_ti", path, image_size=96, depth=2, patch_size=16)
    logits = logits_of_ours(ours, variables, images)
    np.testing.assert_allclose(logits, logits_of_theirs(smaller, images), rtol=0, atol=1e-4)


def test_swin_of_the_original_repository(tmp_path):
    """Its names, as timm reads them, with the buffers that it kept."""
    path = tmp_path / "model.safetensors"
    ours, theirs, _ = make("swin_t", 32)
    randomize(theirs)
    old = {}
    for key, value in theirs.state_dict().items():
        if ".downsample." in key:
            stage = int(key.split(".")[1])
            key = key.replace(f"layers.{stage}.", f"layers.{stage - 1}.")
        old[key.replace("head.fc.", "head.")] = value
    old["layers.0.blocks.1.attn_mask"] = torch.zeros(16, 16, 16)
    old["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.int64)
    save_file(old, path)
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    logits = logits_of_ours(ours, load_pretrained("swin_t", path, image_size=32), images)
    np.testing.assert_allclose(logits, logits_of_theirs(theirs, images), rtol=0, atol=1e-4)

    _, again, _ = make("swin_t", 32)
    again.load_state_dict(timm.models.swin_transformer.checkpoint_filter_fn(old, again))
    np.testing.assert_array_equal(logits_of_theirs(again, images), logits_of_theirs(theirs, images))
