"""The layers of convolutional networks in NumPy, written out: float64[B, H, W, C] to the same."""

import itertools

import jax
import numpy as np


def conv(x, kernel, stride=1):
    """A convolution of an image with size // 2 pixels of zeros on all sides."""
    size = kernel.shape[0]
    p = size // 2
    x = np.pad(x, ((0, 0), (p, p), (p, p), (0, 0)))
    rows, columns = ((n - size) // stride + 1 for n in x.shape[1:3])
    out = np.zeros((x.shape[0], rows, columns, kernel.shape[-1]))
    for i, j in itertools.product(range(rows), range(columns)):
        window = x[:, i * stride : i * stride + size, j * stride : j * stride + size]
        out[:, i, j] = np.tensordot(window, kernel, axes=3)
    return out


def window_starts(pixels, size, stride, padding, ceil):
    """Where windows begin; those that do not end inside the padding are left out, or cut off."""
    end = pixels + padding if ceil else pixels + padding - size + 1
    starts = []
    start = -padding
    while start < end:
        starts.append(start)
        if start + size >= pixels + padding:
            break
        start += stride
    return starts


def pool(x, size, stride, padding=0, ceil=False, of=np.max):
    """The maximum, or another reduction, of what windows see of an image."""
    rows, columns = (window_starts(n, size, stride, padding, ceil) for n in x.shape[1:3])
    out = np.zeros((x.shape[0], len(rows), len(columns), x.shape[-1]))
    for (a, i), (b, j) in itertools.product(enumerate(rows), enumerate(columns)):
        window = x[:, max(i, 0) : i + size, max(j, 0) : j + size]
        out[:, a, b] = of(window, axis=(1, 2))
    return out


def relu(x):
    return np.maximum(x, 0)


class Net:
    """A model's layers by their names in its variables.

    Args:
      variables: of the model, in float64.
      groups: parts of the batch that are normalised apart in training; None in evaluation.
    """

    def __init__(self, variables, groups=None):
        self.variables = variables
        self.groups = groups

    def find(self, collection, path):
        found = self.variables[collection]
        for name in path.split("/"):
            found = found[name]
        return found

    def conv(self, x, path, stride=1):
        p = self.find("params", path)
        return conv(x, p["kernel"], stride) + p.get("bias", 0)

    def dense(self, x, path):
        p = self.find("params", path)
        return x @ p["kernel"] + p["bias"]

    def norm(self, x, path, epsilon=1e-5):
        p, running = self.find("params", path), self.find("batch_stats", path)
        out = []
        for part in np.split(x, self.groups or 1):
            mean, var = running["mean"], running["var"]
            if self.groups:
                mean, var = part.mean((0, 1, 2)), part.var((0, 1, 2))
            out.append((part - mean) / np.sqrt(var + epsilon) * p["scale"] + p["bias"])
        return np.concatenate(out)


def random_variables(model, images, seed=0):
    """Random values for all of a model's variables, kernels scaled by their inputs: float64."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images))
    rng = np.random.default_rng(seed)

    def values(path, shape):
        x = rng.normal(size=shape.shape)
        name = path[-1].key
        if name == "kernel":
            return x / np.sqrt(np.prod(shape.shape[:-1]))
        return {"var": np.exp(x), "scale": 1 + 0.3 * x}.get(name, 0.3 * x)

    return jax.tree_util.tree_map_with_path(values, shapes)


def apply(model, variables, images, train=False, **rngs):
    """The model's logits, compiled; what it writes in training is dropped."""

    def run(variables):
        mutable = ["batch_stats"] if train else False
        out = model.apply(variables, images, train=train, mutable=mutable, rngs=rngs)
        return out[0] if train else out

    return np.asarray(jax.jit(run)(variables))


def outputs(model, images, kinds):
    """The shapes of what the model's modules of some kinds return, by module name."""

    def run():
        return model.init_with_output(
            jax.random.key(0),
            images,
            capture_intermediates=lambda module, _: isinstance(module, kinds),
        )[1]["intermediates"]

    shapes = jax.eval_shape(run)
    return {name: value["__call__"][0].shape for name, value in shapes.items()}
