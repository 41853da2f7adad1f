"""Every recipe in `configs/`, with every value of each argument that its header names."""

import json
import pathlib
import re

import pytest

from gnp import config as gnp_config
from gnp import models
from gnp.training import optimizer as optimizers

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").glob("*.py"))


def header(path):
    return path.read_text().split('"""')[1]


def choices(path):
    """{argument: its values} from the header's lines "    argument   value, value (remark)"."""
    text = header(path)
    lines = re.findall(r"^    ([a-z]+) {2,}(\S[^(\n]*)", text, re.M)
    inline = re.search(r"Arguments: (.*?), as in", text, re.DOTALL)
    lines += re.findall(r"(\w+) \(([^)]*)\)", inline[1] if inline else "")
    return {name: re.findall(r"\w+", values) for name, values in lines}


CASES = [
    (path, f"{name}={value},scale={scale}" if scale else f"{name}={value}")
    for path in FILES
    for name, values in choices(path).items()
    for value in values
    for scale in choices(path).get("scale", [None])
]


def test_headers_name_commands_and_choices():
    assert {path.name for path in FILES} >= {
        *("digits.py", "cifar_vit.py", "cifar_swin.py", "cifar_cait.py", "cifar_cnn.py"),
        *("ptb_lstm.py", "imagenet_swin.py", "imagenet_resnet.py", "imagenet_vit.py"),
        *("tiny_imagenet_vit.py", "folder.py"),
    }
    for path in FILES:
        assert f"python -m gnp.train --config=configs/{path.name}" in header(path), path
        assert choices(path), path
        for name in choices(path).get("model", []):
            assert name in models.list_models()


@pytest.mark.parametrize(
    ("path", "argument"), CASES, ids=lambda x: x if isinstance(x, str) else x.name
)
def test_a_recipe(path, argument):
    """It is valid, survives JSON, and its model and optimizer can be made."""
    config = gnp_config.load(f"{path}:{argument}")
    gnp_config.validate(config)
    text = json.dumps(config.to_dict())
    again = gnp_config.from_json(text, where="here")
    assert not gnp_config.difference(config.to_dict(), again.to_dict())
    overrides = {
        key: value
        for key, value in config.model.items()
        if value is not None and key not in ("name", "pretrained")
    }
    sizes = {"digits": 8, "ptb": None, "tiny_imagenet": 64}
    size = config.data.image_size or sizes.get(config.data.name, 32)
    models.create(config.model.name, 10, image_size=size, **overrides)
    steps = round(config.epochs * 100)
    optimizers.build(config, steps_per_epoch=100.0, total_steps=steps, params=dict)
