"""timm's files: names written out by hand, layouts against loops in NumPy, every error.

Logits are compared with timm's own in `tests/parity`.
"""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from gnp import models
from gnp.errors import UserError
from gnp.models.pretrained import _FAMILIES, _resize, from_timm, load_pretrained, to_timm

NAMES = [name for name, info in models.list_models().items() if info.file in _FAMILIES]
# Fields that make each family small.
SMALL = {
    "vit": {"width": 12, "depth": 2, "num_heads": 3},
    "swin": {"width": 8, "depths": (2, 4), "num_heads": 2},
    "cait": {"width": 12, "depth": 3, "num_heads": 3},
    "resnet": {"width": 4, "depths": (1, 2)},
    "vgg": {"width": 4, "hidden_size": 6},
    "densenet": {"growth_rate": 4, "depths": (1, 2)},
}


def small(name):
    return SMALL[models.list_models()[name].file]


def random_variables(name, image_size, num_classes=5, channels=3, **fields):
    """Random values for every variable of a model, which is never run."""
    model = models.create(name, num_classes, image_size=image_size, **small(name) | fields)
    images = jnp.zeros((1, image_size, image_size, channels))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(np.float32),
        jax.eval_shape(lambda: model.init(jax.random.key(0), images)),
    )


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(name="vit")
def _vit(tmp_path):
    """A small ViT: its variables, timm's tensors, and a path to write them to."""
    variables = random_variables("vit_ti", 32)
    return variables, to_timm("vit_ti", variables), tmp_path / "vit.safetensors"


# --- Both directions ----------------------------------------------------------------------------


@pytest.mark.parametrize("image_size", [32, 224])
@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_is_the_identity(name, image_size):
    variables = random_variables(name, image_size)
    tensors = to_timm(name, variables)
    assert all(tensor.flags.c_contiguous for tensor in tensors.values())
    counters = [t for key, t in tensors.items() if key.endswith("num_batches_tracked")]
    values = sum(t.size for t in tensors.values()) - len(counters)
    assert values == sum(x.size for x in jax.tree.leaves(variables))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
    assert_equal(from_timm(name, tensors, shapes), variables)


def expand(text):
    """Names from lines of "prefix: leaf leaf", where "0-2" in a prefix stands for 0, 1 and 2."""
    names = []
    for line in text.split("\n"):
        prefix, _, leaves = line.strip().partition(": ")
        prefixes = [prefix]
        if match := re.search(r"(\d+)-(\d+)", prefix):
            numbers = range(int(match[1]), int(match[2]) + 1)
            prefixes = [prefix.replace(match[0], str(i), 1) for i in numbers]
        names += [f"{p}.{leaf}".lstrip(".") for p in prefixes for leaf in leaves.split()]
    return set(names) - {""}


BLOCK = """\
blocks.0-1.norm1: weight bias
blocks.0-1.norm2: weight bias
blocks.0-1.attn.proj: weight bias
blocks.0-1.mlp.fc1: weight bias
blocks.0-1.mlp.fc2: weight bias
"""
EMBEDDED = BLOCK + "blocks.0-1.attn.qkv: weight bias\n"
BATCH_NORM = "weight bias running_mean running_var num_batches_tracked"
TIMM_NAMES = {
    "vit": (
        {},
        EMBEDDED
        + """: cls_token pos_embed
        patch_embed.proj: weight bias
        norm: weight bias
        head: weight bias""",
    ),
    "cait": (
        {"depth": 2},
        EMBEDDED
        + BLOCK.replace("blocks.", "blocks_token_only.")
        + """blocks.0-1: gamma_1 gamma_2
        blocks.0-1.attn.proj_l: weight bias
        blocks.0-1.attn.proj_w: weight bias
        blocks_token_only.0-1: gamma_1 gamma_2
        blocks_token_only.0-1.attn.q: weight bias
        blocks_token_only.0-1.attn.k: weight bias
        blocks_token_only.0-1.attn.v: weight bias
        : cls_token pos_embed
        patch_embed.proj: weight bias
        norm: weight bias
        head: weight bias""",
    ),
    "swin": (
        {},
        EMBEDDED.replace("blocks.", "layers.0.blocks.")
        + EMBEDDED.replace("blocks.0-1", "layers.1.blocks.0-3")
        + """layers.0.blocks.0-1.attn: relative_position_bias_table
        layers.1.blocks.0-3.attn: relative_position_bias_table
        layers.1.downsample.norm: weight bias
        layers.1.downsample.reduction: weight
        patch_embed.proj: weight bias
        patch_embed.norm: weight bias
        norm: weight bias
        head.fc: weight bias""",
    ),
    "resnet": (
        {"bottleneck": True},
        f""": conv1.weight
        bn1: {BATCH_NORM}
        layer1.0: conv1.weight conv2.weight conv3.weight downsample.0.weight
        layer1.0.bn1-3: {BATCH_NORM}
        layer1.0.downsample.1: {BATCH_NORM}
        layer2.0: conv1.weight conv2.weight conv3.weight downsample.0.weight
        layer2.0.bn1-3: {BATCH_NORM}
        layer2.0.downsample.1: {BATCH_NORM}
        layer2.1: conv1.weight conv2.weight conv3.weight
        layer2.1.bn1-3: {BATCH_NORM}
        fc: weight bias""",
    ),
    "vgg": (
        {"batch_norm": True, "depths": (1, 2), "stem": "imagenet"},
        f"""features.0: weight bias
        features.1: {BATCH_NORM}
        features.4: weight bias
        features.5: {BATCH_NORM}
        features.7: weight bias
        features.8: {BATCH_NORM}
        pre_logits.fc1-2: weight bias
        head.fc: weight bias""",
    ),
    "densenet": (
        {},
        f"""features.conv0: weight
        features.norm0: {BATCH_NORM}
        features.denseblock1.denselayer1: conv1.weight conv2.weight
        features.denseblock1.denselayer1.norm1: {BATCH_NORM}
        features.denseblock1.denselayer1.norm2: {BATCH_NORM}
        features.transition1.norm: {BATCH_NORM}
        features.transition1.conv: weight
        features.denseblock2.denselayer1: conv1.weight conv2.weight
        features.denseblock2.denselayer1.norm1: {BATCH_NORM}
        features.denseblock2.denselayer1.norm2: {BATCH_NORM}
        features.denseblock2.denselayer2: conv1.weight conv2.weight
        features.denseblock2.denselayer2.norm1: {BATCH_NORM}
        features.denseblock2.denselayer2.norm2: {BATCH_NORM}
        features.norm5: {BATCH_NORM}
        classifier: weight bias""",
    ),
}


@pytest.mark.parametrize("file", TIMM_NAMES)
def test_names_are_timms(file):
    fields, names = TIMM_NAMES[file]
    name = next(name for name in NAMES if models.list_models()[name].file == file)
    image_size = 28 if file == "vgg" else 224  # 28 with two stages: 7 × 7 positions
    assert set(to_timm(name, random_variables(name, image_size, **fields))) == expand(names)


# --- Layouts ------------------------------------------------------------------------------------


def test_a_patch_embedding_is_timms_convolution():
    """Σ over channel c, row i, column j of weight[d, c, i, j] · patch[i, j, c], with loops."""
    from gnp.models.layers import patches

    for channels, size in ((3, 2), (1, 4), (3, 16)):
        name, image_size = "vit_ti", 2 * size
        fields = {"patch_size": size, "channels": channels}
        variables = random_variables(name, image_size, **fields)
        weight = to_timm(name, variables)["patch_embed.proj.weight"]
        assert weight.shape == (12, channels, size, size)
        image = np.random.default_rng(1).normal(size=(image_size, image_size, channels))
        ours = patches(image[None], size)[0] @ variables["params"]["patch_embed"]["kernel"]
        for row, column, d in ((0, 1, 3), (1, 0, 11)):
            patch = image[row * size : (row + 1) * size, column * size : (column + 1) * size]
            theirs = 0.0
            for i, j, c in np.ndindex(patch.shape):
                theirs += weight[d, c, i, j] * patch[i, j, c]
            np.testing.assert_allclose(ours[row, column, d], theirs, rtol=1e-4, atol=1e-4)


def test_a_vggs_hidden_layer_is_timms_convolution():
    """Over all of 7 × 7 positions, and flattened in our order."""
    variables = random_variables("vgg16", 28, depths=(1, 2), stem="imagenet")
    weight = to_timm("vgg16", variables)["pre_logits.fc1.weight"]
    assert weight.shape == (6, 8, 7, 7)
    features = np.random.default_rng(1).normal(size=(7, 7, 8))
    theirs = np.zeros(6)
    for o, c, y, x in np.ndindex(weight.shape):
        theirs[o] += weight[o, c, y, x] * features[y, x, c]
    kernel = variables["params"]["pre_logits_fc1"]["kernel"]
    np.testing.assert_allclose(features.reshape(-1) @ kernel, theirs, rtol=1e-4)


def test_elements_of_known_places():
    vit = random_variables("vit_ti", 32)["params"]
    tensors = to_timm("vit_ti", {"params": vit})
    assert tensors["blocks.1.attn.qkv.weight"].shape == (36, 12)
    assert (
        tensors["blocks.1.attn.qkv.weight"][20, 7]
        == (vit["blocks"]["attn"]["qkv"]["kernel"][1, 7, 20])
    )
    assert tensors["blocks.1.norm2.weight"][3] == vit["blocks"]["norm2"]["scale"][1, 3]
    assert tensors["head.weight"][4, 2] == vit["head"]["kernel"][2, 4]

    swin = random_variables("swin_t", 32)["params"]
    tensors = to_timm("swin_t", {"params": swin})
    for block, (kind, pair) in enumerate(
        [("regular", 0), ("shifted", 0), ("regular", 1), ("shifted", 1)]
    ):
        ours = swin["layers_1"]["blocks"][kind]["attn"]["relative_position_bias_table"][pair]
        theirs = tensors[f"layers.1.blocks.{block}.attn.relative_position_bias_table"]
        np.testing.assert_array_equal(theirs, ours)

    resnet = random_variables("resnet18", 224)
    tensors = to_timm("resnet18", resnet)
    conv = resnet["params"]["layer2_0"]["conv1"]["kernel"]  # height, width, inputs, outputs
    assert tensors["layer2.0.conv1.weight"].shape == (8, 4, 3, 3)
    assert tensors["layer2.0.conv1.weight"][5, 3, 0, 2] == conv[0, 2, 3, 5]
    norm = resnet["batch_stats"]["layer2_0"]["bn1"]
    np.testing.assert_array_equal(tensors["layer2.0.bn1.running_mean"], norm["mean"])
    np.testing.assert_array_equal(tensors["layer2.0.bn1.running_var"], norm["var"])
    assert tensors["layer2.0.bn1.num_batches_tracked"].shape == ()


def test_old_swin_files():
    """Downsampling at a stage's end, the head without a prefix, and buffers."""
    variables = random_variables("swin_t", 32, depths=(2, 2, 2))
    old = {}
    for key, value in to_timm("swin_t", variables).items():
        key = key.replace("layers.1.downsample", "layers.0.downsample")
        key = key.replace("layers.2.downsample", "layers.1.downsample")
        old[key.replace("head.fc.", "head.")] = value
    assert "layers.1.downsample.norm.weight" in old and "head.bias" in old
    old["layers.0.blocks.1.attn_mask"] = np.zeros((16, 16, 16))
    old["layers.0.blocks.1.attn.relative_position_index"] = np.zeros((16, 16), np.int64)
    assert_equal(from_timm("swin_t", old, variables), variables)


# --- Files --------------------------------------------------------------------------------------


def test_the_files_head_tells_the_number_of_classes(vit):
    variables, tensors, path = vit
    save_file(tensors, path)
    read = load_pretrained("vit_ti", path, image_size=32, **small("vit_ti"))
    assert_equal(read, variables)
    assert all(type(x) is np.ndarray for x in jax.tree.leaves(read))


@pytest.mark.parametrize(
    ("name", "head", "depths"), [("swin_t", "head", (2,)), ("resnet18", "fc", (1,))]
)
def test_a_head_of_other_classes_is_as_the_model_initialises_it(name, head, depths, tmp_path):
    variables = random_variables(name, 32, depths=depths)
    path = tmp_path / "file.safetensors"
    save_file(to_timm(name, variables), path)
    fields = small(name) | {"depths": depths}
    read = load_pretrained(name, path, num_classes=7, image_size=32, seed=3, **fields)
    model = models.create(name, 7, image_size=32, **fields)
    initial = jax.jit(model.init)(jax.random.key(3), jnp.zeros((1, 32, 32, 3)))
    assert initial["params"][head]["kernel"].any()
    assert_equal(read["params"].pop(head), initial["params"].pop(head))
    variables["params"].pop(head)
    assert_equal(read, variables)
    assert all(type(x) is np.ndarray for x in jax.tree.leaves(read))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_precisions_are_read_as_float32(vit, dtype):
    variables, tensors, path = vit
    save_file({key: tensor.astype(dtype) for key, tensor in tensors.items()}, path)
    read = load_pretrained("vit_ti", path, image_size=32, **small("vit_ti"))
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(read))
    rounded = jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), variables)
    assert_equal(read, rounded)


def test_images_of_one_channel(tmp_path):
    variables = random_variables("vit_ti", 8, channels=1)
    save_file(to_timm("vit_ti", variables), tmp_path / "file.safetensors")
    read = load_pretrained(
        "vit_ti", tmp_path / "file.safetensors", image_size=8, channels=1, **small("vit_ti")
    )
    assert_equal(read, variables)


# --- Resizing -----------------------------------------------------------------------------------


def keys_cubic(x):
    """Keys's kernel with a = −1/2."""
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    return np.where(x < 1, near, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))


def weights(old, new):
    """The new points' weights on the old ones, on one axis: float64[new, old]."""
    scale = max(old / new, 1)  # antialiasing: the kernel is as wide as a new point
    at = (np.arange(new) + 0.5) * old / new - 0.5
    matrix = keys_cubic((at[:, None] - np.arange(old)) / scale)
    return matrix / matrix.sum(1, keepdims=True)


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize(("old", "new"), [(4, 7), (7, 4), (3, 12), (14, 6), (5, 1)])
def test_tables_are_resized_bicubically(old, new, extra):
    table = np.random.default_rng(0).normal(size=(1, extra + old**2, 3)).astype(np.float32)
    resized = _resize(table, extra + new**2)
    assert resized.shape == (1, extra + new**2, 3)
    np.testing.assert_array_equal(resized[:, :extra], table[:, :extra])
    image = table[0, extra:].reshape(old, old, 3)
    axis = weights(old, new)
    expected = np.einsum("yi,xj,ijc->yxc", axis, axis, image).reshape(-1, 3)
    np.testing.assert_allclose(resized[0, extra:], expected, atol=1e-5)


def test_a_constant_table_stays_constant():
    np.testing.assert_allclose(_resize(np.full((49, 2), 3.0), 225), np.full((225, 2), 3.0), 1e-6)


@pytest.mark.parametrize(
    ("name", "size", "fields"),
    [
        ("vit_ti", 64, {"patch_size": 4}),
        ("vit_ti", 64, {"patch_size": 4, "pool": "mean"}),
        ("cait_xxs12", 16, {"patch_size": 4}),
        ("swin_t", 32, {"window_size": 8}),
        ("swin_t", 32, {"window_size": 2}),
    ],
)
def test_tables_are_resized_for_another_grid(name, size, fields):
    """And nothing else is touched: what has no grid is as in the file."""
    theirs = {key: value for key, value in fields.items() if key == "pool"}
    tensors = to_timm(name, random_variables(name, 32, **theirs))
    like = random_variables(name, size, **fields)
    read = flatten_dict(from_timm(name, tensors, like), sep="/")
    resized = 0
    for path, part in flatten_dict(random_variables(name, 32, **theirs), sep="/").items():
        if read[path].shape == part.shape:
            np.testing.assert_array_equal(read[path], part)
            continue
        resized += 1
        assert path.endswith(("pos_embed", "relative_position_bias_table"))
        assert read[path].shape == flatten_dict(like, sep="/")[path].shape
        tables = zip(read[path], part, strict=True)  # of each block; a position embedding's only
        for ours, old in tables:
            np.testing.assert_array_equal(ours, _resize(old, len(ours)))
    assert resized


# --- Mistakes -----------------------------------------------------------------------------------


def message(function, *args, **kwargs):
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    text = str(error.value)
    assert "\n" not in text
    return text


def without(tensors, *keys):
    return {key: value for key, value in tensors.items() if key not in keys}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda t: without(t, "norm.bias", "blocks.1.norm1.weight"),
            "are not those of vit_ti: 2 missing (blocks.1.norm1.weight, norm.bias)",
        ),
        (
            lambda t: t | {f"blocks.2.mlp.fc{i}.weight": t["norm.bias"] for i in range(5)},
            "5 left over (blocks.2.mlp.fc0.weight, blocks.2.mlp.fc1.weight, "
            "blocks.2.mlp.fc2.weight, …)",
        ),
        (
            lambda t: without(t, "norm.bias") | {"fc_norm.bias": t["norm.bias"]},
            "1 missing (norm.bias); 1 left over (fc_norm.bias)",
        ),
        (
            lambda t: t | {"blocks.1.attn.qkv.weight": np.zeros((12, 36))},
            "blocks.1.attn.qkv.weight has the shape (12, 36), but this vit_ti needs (36, 12)",
        ),
        (
            lambda t: t | {"norm.bias": np.zeros(13), "norm.weight": np.zeros(13)},
            "has the shape (13,), but this vit_ti needs (12,) (and 1 more do not fit)",
        ),
        (
            lambda t: t | {"patch_embed.proj.weight": np.zeros((12, 3, 16, 16))},
            "needs (12, 3, 4, 4); set model.patch_size to 16",
        ),
        (
            lambda t: t | {"patch_embed.proj.weight": np.zeros((12, 1, 4, 4))},
            "has the shape (12, 1, 4, 4), but this vit_ti needs (12, 3, 4, 4)",
        ),
        (
            lambda t: t | {"pos_embed": np.zeros((1, 64, 12))},  # without the class token's
            "pos_embed has the shape (1, 64, 12), but this vit_ti needs (1, 65, 12)",
        ),
        (
            lambda t: t | {"pos_embed": np.zeros((1, 18, 12))},  # no square grid
            "pos_embed has the shape (1, 18, 12)",
        ),
        (
            lambda t: t | {"pos_embed": np.zeros((1, 65, 24))},
            "pos_embed has the shape (1, 65, 24)",
        ),
        (
            lambda t: t | {"head.weight": np.zeros((5, 24))},
            "head.weight has the shape (5, 24), but this vit_ti needs (5, 12)",
        ),
        (
            lambda t: t | {"head.weight": np.zeros((7, 24)), "head.bias": np.zeros(7)},
            "head.bias has the shape (7,), but this vit_ti needs (5,) (and 1 more do not fit)",
        ),
        (
            lambda t: t | {"head.bias": np.zeros(7)},
            "head.bias has the shape (7,), but this vit_ti needs (5,)",
        ),
        (
            lambda t: t | {"dist_token": t["cls_token"], "head_dist.bias": t["head.bias"]},
            "holds a distilled model (with a dist_token)",
        ),
        (
            lambda t: {f"vit.{key}": value for key, value in t.items()},
            "holds none of timm's models that are known here; its tensors are vit.blocks.0.",
        ),
        (lambda t: {}, "holds none of timm's models"),
    ],
)
def test_tensors_that_are_not_the_models(vit, change, expected):
    variables, tensors, _ = vit
    text = message(from_timm, "vit_ti", change(tensors), variables, where="x.safetensors")
    assert "x.safetensors" in text and expected in text


@pytest.mark.parametrize("file", _FAMILIES)
def test_another_familys_file_is_called_so(file):
    name = next(name for name in NAMES if models.list_models()[name].file == file)
    tensors = to_timm(name, random_variables(name, 32))
    for other in NAMES:
        if models.list_models()[other].file != file:
            text = message(from_timm, other, tensors, {})
            assert f"holds no {other} but a model as" in text and name in text


@pytest.mark.parametrize(
    ("name", "file_fields", "fields", "expected"),
    [
        ("vit_ti", {}, {"pool": "mean"}, "set model.pool to 'token' with a class token"),
        ("vit_ti", {"pool": "mean"}, {}, "set model.pool to 'token' with a class token"),
        (
            "vit_ti",
            {"width": 24},
            {},
            "blocks.0.attn.proj.bias has the shape (24,), but this vit_ti ",
        ),
        ("vit_ti", {"depth": 3}, {}, "12 left over (blocks.2.attn.proj.bias, "),
        ("resnet18", {"stem": "imagenet"}, {}, "timm's is the model with model.stem 'imagenet'"),
        ("densenet121", {"stem": "imagenet"}, {}, "timm's is the model with model.stem 'imagen"),
        ("swin_t", {"num_heads": 4}, {}, "relative_position_bias_table has the shape (49, 4)"),
    ],
)
def test_fields_that_are_not_the_files(name, file_fields, fields, expected):
    tensors = to_timm(name, random_variables(name, 32, **file_fields))
    assert expected in message(from_timm, name, tensors, random_variables(name, 32, **fields))


def test_a_vgg_over_other_positions_than_timms():
    large = to_timm("vgg16", random_variables("vgg16", 224))
    text = message(from_timm, "vgg16", large, random_variables("vgg16", 32))
    assert "timm's is the model with model.stem 'imagenet'" in text
    wider = random_variables("vgg16", 448)  # 14 × 14 positions: as many values as 7 × 7 of 4 times
    for function, *args in ((to_timm, "vgg16", wider), (from_timm, "vgg16", large, wider)):
        assert "over 7 × 7 positions" in message(function, *args)


@pytest.mark.parametrize("name", ["googlenet", "lstm"])
def test_models_that_timm_does_not_have(name, tmp_path):
    assert f"no counterpart of model '{name}'" in message(to_timm, name, {"params": {}})
    assert "no counterpart" in message(load_pretrained, name, tmp_path / "x.safetensors")
    assert "unknown model 'vit_tt'" in message(load_pretrained, "vit_tt", tmp_path)


def test_files_that_cannot_be_read(vit):
    _, tensors, path = vit
    load = ("vit_ti", path)
    assert message(load_pretrained, *load) == f"there is no file {path}"
    assert message(load_pretrained, "vit_ti", path.parent) == f"there is no file {path.parent}"
    save_file(tensors, path)
    whole = path.read_bytes()
    for content in (b"", b"weights", whole[:40], whole[:-1], whole + b"x"):
        path.write_bytes(content)
        assert f"{path} is not a whole safetensors file" in message(load_pretrained, *load)
    save_file({"norm.bias": np.zeros(3, np.int32)}, path)
    assert "norm.bias is of type I32; readable are F64, F32" in message(load_pretrained, *load)
    save_file(without(tensors, "head.bias", "head.weight"), path)
    assert "has no head.bias: its model is without a head" in message(load_pretrained, *load)


@pytest.mark.parametrize("start", [b"PK\x03\x04", b"\x80\x02\x8a\n"])
def test_a_file_of_pytorchs(start, tmp_path):
    path = tmp_path / "vit.pth"
    path.write_bytes(start + b"\0" * 40)
    text = message(load_pretrained, "vit_ti", path)
    assert f"{path} is a file of PyTorch's; convert it" in text
    assert f"torch.load('{path}'" in text and f"'{tmp_path / 'vit.safetensors'}')" in text
