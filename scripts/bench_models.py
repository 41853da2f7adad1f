"""What the models cost: compile time, step time and memory, against bare JAX and in a loop.

    python scripts/bench_models.py

Each family's repeated block is compared with the same block written bare, as plain functions of the
same parameters, without Flax. Both first have to agree in their output, running statistics and
gradients. A step is the output, and from a given gradient of it those of the parameters and the
input, jitted, with a batch that stays on the device.

Each family's model is compiled as a whole for images of 32 pixels, with its loss and gradient; a
transformer also with its blocks in a loop (`scan`), which is compared with its default, the blocks
one after another.

A ratio compares two programs, A and B, that are timed in turn (A B A B …), each for about
`--seconds`; it is taken pair by pair, and the figure is the median over the pairs. Beside it stand
the quartiles. Compile time is tracing, lowering and compiling with all of JAX's caches empty or
off. Memory is the compiled program's own accounting, and does not vary. On a CPU, freed memory is
kept for the next step; see `scripts/bench_transforms.py`.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import benchmark
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from benchmark import Row
from jax import lax

from gnp import models
from gnp.command_line import Parser, run
from gnp.errors import unknown
from gnp.memory import keep_freed_memory
from gnp.models import cait, densenet, googlenet, lstm, resnet, swin, vit

TARGET = 1.03  # of ours over bare
AGREEMENT = 1e-3  # of the norm of each array; rounding makes less than 1e-5 of it on a CPU
VOCABULARY = 10_000

Params = Any
Block = Callable[[Params, Any, jax.Array], tuple[jax.Array, Any]]


def layer_norm(p: Params, x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """Over the features."""
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) * lax.rsqrt(var + epsilon) * p["scale"] + p["bias"]


def linear(p: Params, x: jax.Array) -> jax.Array:
    """A dense layer."""
    return x @ p["kernel"] + p["bias"]


def mlp(p: Params, x: jax.Array) -> jax.Array:
    """Dense, GELU, dense."""
    return linear(p["fc2"], jax.nn.gelu(linear(p["fc1"], x), approximate=False))


def conv(p: Params, x: jax.Array) -> jax.Array:
    """A convolution of stride 1."""
    dimensions = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", dimension_numbers=dimensions)
    return y + p["bias"] if "bias" in p else y


def batch_norm(p: Params, running: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    """In training."""
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    new = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, running, {"mean": mean, "var": var})
    return (x - mean) * (p["scale"] * lax.rsqrt(var + 1e-5)) + p["bias"], new


def bare_vit(params: Params, stats: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    """As `vit.Block`, with 3 heads."""
    p, y = params["attn"], layer_norm(params["norm1"], x)
    qkv = linear(p["qkv"], y).reshape(*x.shape[:2], 3, 3, -1)
    y = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
    x = x + linear(p["proj"], y.reshape(x.shape))
    return x + mlp(params["mlp"], layer_norm(params["norm2"], x)), stats


def bare_swin(params: Params, stats: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    """As `swin.Pair`."""
    x = bare_swin_block(params["regular"], x, 0)
    return bare_swin_block(params["shifted"], x, 2), stats


def bare_swin_block(params: Params, x: jax.Array, shift: int) -> jax.Array:
    """As `swin.Block`, with windows of 4 × 4 pixels and 3 heads."""
    p, (batch, side, _, width), n = params["attn"], x.shape, x.shape[1] // 4
    y = jnp.roll(layer_norm(params["norm1"], x, 1e-5), (-shift, -shift), (1, 2))
    y = y.reshape(batch, n, 4, n, 4, width).swapaxes(2, 3).reshape(batch, n * n, 16, width)
    q, k, v = jnp.moveaxis(linear(p["qkv"], y).reshape(*y.shape[:3], 3, 3, -1), 3, 0)
    scores = jnp.einsum("bwqhd,bwkhd->bwhqk", q, k) * q.shape[-1] ** -0.5
    scores += p["relative_position_bias_table"][swin.relative_position_index(4)].transpose(2, 0, 1)
    if shift:
        scores = jnp.where(swin.shift_mask(side, 4, shift)[:, None], scores, -jnp.inf)
    y = jnp.einsum("bwhqk,bwkhd->bwqhd", jax.nn.softmax(scores), v)
    y = y.reshape(batch, n, n, 4, 4, width).swapaxes(2, 3).reshape(x.shape)
    x = x + jnp.roll(linear(p["proj"], y), (shift, shift), (1, 2))
    return x + mlp(params["mlp"], layer_norm(params["norm2"], x, 1e-5))


def bare_cait(params: Params, stats: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    """As `cait.Block`, of patches, with 4 heads."""

    def mix(p: Params, x: jax.Array) -> jax.Array:
        return jnp.einsum("bhqk,hg->bgqk", x, p["kernel"]) + p["bias"][:, None, None]

    p, y = params["attn"], layer_norm(params["norm1"], x)
    q, k, v = jnp.moveaxis(linear(p["qkv"], y).reshape(*x.shape[:2], 3, 4, -1), 2, 0)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k)
    weights = mix(p["proj_w"], jax.nn.softmax(mix(p["proj_l"], scores)))
    y = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
    x = x + params["gamma_1"] * linear(p["proj"], y)
    return x + params["gamma_2"] * mlp(params["mlp"], layer_norm(params["norm2"], x)), stats


def bare_resnet(params: Params, stats: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    """As `resnet.Block`, without a bottleneck or a stride."""
    y, bn1 = batch_norm(params["bn1"], stats["bn1"], conv(params["conv1"], x))
    y = conv(params["conv2"], jax.nn.relu(y))
    y, bn2 = batch_norm(params["bn2"], stats["bn2"], y)
    return jax.nn.relu(x + y), {"bn1": bn1, "bn2": bn2}


def bare_conv_norm(params: Params, stats: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    """As VGG's unit, and `googlenet.ConvNorm`."""
    y, bn = batch_norm(params["bn"], stats["bn"], conv(params["conv"], x))
    return jax.nn.relu(y), {"bn": bn}


def bare_densenet(params: Params, stats: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    """As `densenet.DenseLayer`."""
    y, norm1 = batch_norm(params["norm1"], stats["norm1"], x)
    y = conv(params["conv1"], jax.nn.relu(y))
    y, norm2 = batch_norm(params["norm2"], stats["norm2"], y)
    y = conv(params["conv2"], jax.nn.relu(y))
    return jnp.concatenate([x, y], -1), {"norm1": norm1, "norm2": norm2}


def bare_googlenet(params: Params, stats: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    """As `googlenet.Inception` of the "cifar" kind."""
    new = {}

    def unit(name: str, x: jax.Array) -> jax.Array:
        y, new[name] = bare_conv_norm(params[name], stats[name], x)
        return y

    pooled = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")
    branches = [
        unit("branch1", x),
        unit("branch2_1", unit("branch2_0", x)),
        unit("branch3_2", unit("branch3_1", unit("branch3_0", x))),
        unit("branch4", pooled),
    ]
    return jnp.concatenate(branches, -1), new


def bare_lstm(params: Params, stats: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    """As `lstm.LSTM`, from a state of zeros."""

    def step(state: Any, inputs: jax.Array) -> Any:
        c, h = state
        i, f, o, g = jnp.split(inputs + h @ params["recurrent"], 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (c, h), h

    zeros = jnp.zeros((x.shape[0], params["recurrent"].shape[0]))
    inputs = linear(params["input"], x).swapaxes(0, 1)
    return lax.scan(step, (zeros, zeros), inputs)[1].swapaxes(0, 1), stats


class Family(NamedTuple):
    """What is compared.

    Attributes:
      model: the name of the model that is compiled as a whole.
      quick: its sizes for --quick.
      block: what it repeats.
      args: of the block, after its input.
      bare: the same block, bare.
      shape: of the block's input for one example, as in the model.
    """

    model: str
    quick: dict[str, Any]
    block: nn.Module
    args: tuple[Any, ...]
    bare: Block
    shape: tuple[int, ...]


F32 = jnp.float32
_features = googlenet.INCEPTIONS["inception3a"]
_unit = functools.partial(googlenet.ConvNorm, use_bias=True)

FAMILIES = {
    "vit": Family(
        *("vit_ti", {"depth": 4}, vit.Block(3, 4.0, 0.0, F32)),
        *((None, True), bare_vit, (65, 192)),
    ),
    "swin": Family(
        *("swin_t", {"depths": (4,)}, swin.Pair(3, 4, 4.0, 0.0, F32)),
        *((None, True), bare_swin, (16, 16, 96)),
    ),
    "cait": Family(
        *("cait_xxs12", {"depth": 4}, cait.Block(False, 4, 4.0, 1e-5, 0.0, F32)),
        *((None, True), bare_cait, (64, 192)),
    ),
    "resnet": Family(
        *("resnet18", {"depths": (1, 1)}, resnet.Block(64, 1, False, 1, F32)),
        *((True,), bare_resnet, (32, 32, 64)),
    ),
    # VGG writes its convolution, norm and ReLU in a loop; as one module GoogLeNet has them.
    "vgg": Family(
        *("vgg16_bn", {"depths": (2, 2)}, _unit(64, 3)),
        *((True,), bare_conv_norm, (32, 32, 64)),
    ),
    "densenet": Family(
        *("densenet121", {"depths": (2, 2)}, densenet.DenseLayer(32, 4, 1, F32)),
        *((True,), bare_densenet, (32, 32, 128)),
    ),
    "googlenet": Family(
        *("googlenet", {}, googlenet.Inception(_features, (3, 3), _unit)),
        *((True,), bare_googlenet, (32, 32, 192)),
    ),
    "lstm": Family("lstm", {}, lstm.LSTM(512, F32), (), bare_lstm, (35, 512)),
}


class Case:
    """A program and its arguments."""

    def __init__(self, step: Callable[..., Any], *args: Any):
        self.step, self.args = step, args

    def compile(self) -> float:
        """Compiles it, and returns the seconds from Python code to a program."""
        jax.clear_caches()
        start = time.perf_counter()
        self.program = jax.jit(self.step).lower(*self.args).compile()
        return time.perf_counter() - start

    def seconds(self, steps: int) -> float:
        """The wall time of a step, over this many."""
        start = time.perf_counter()
        for _ in range(steps):
            out = self.program(*self.args)
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / steps


def random_like(shapes: Any) -> Any:
    """Kernels normal over √inputs, vectors around 1: there is no part that has no effect."""
    rng = np.random.default_rng(0)

    def values(x: jax.ShapeDtypeStruct) -> jax.Array:
        normal = rng.standard_normal(x.shape, np.float32)
        return jnp.asarray(
            normal / np.prod(x.shape[:-1]) ** 0.5 if x.ndim > 1 else 1 + 0.3 * normal
        )

    return jax.tree.map(values, shapes)


def block_cases(family: Family, batch_size: int) -> dict[str, Case]:
    """Steps of the block, ours and bare, from the same variables, input and output's gradient."""
    key = jax.random.key(0)
    x = jax.random.normal(key, (batch_size, *family.shape))
    variables = random_like(jax.eval_shape(lambda: family.block.init(key, x, *family.args)))
    params, stats = variables.pop("params"), variables.pop("batch_stats", {})

    def ours(params: Params, stats: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": stats}
        y, new = family.block.apply(variables, x, *family.args, mutable=["batch_stats"])
        return y, new.get("batch_stats", {})

    cotangent = random_like(jax.eval_shape(ours, params, stats, x)[0])

    def case(block: Block) -> Case:
        def step(params: Params, stats: Any, x: jax.Array, cotangent: jax.Array) -> Any:
            def output(params: Params, x: jax.Array) -> tuple[jax.Array, Any]:
                return block(params, stats, x)

            y, gradients, stats_after = jax.vjp(output, params, x, has_aux=True)
            return {"output": y, "gradients": gradients(cotangent), "statistics": stats_after}

        return Case(step, params, stats, x, cotangent)

    return {"ours": case(ours), "bare": case(family.bare)}


def model_cases(family: Family, batch_size: int, overrides: dict[str, Any]) -> dict[str, Case]:
    """The model's loss and gradient; a transformer's with its blocks in a loop, and without."""
    info = models.list_models()[family.model]
    key = jax.random.key(0)
    if info.takes == "tokens":
        create = functools.partial(models.create, family.model, VOCABULARY)
        x = jax.random.randint(key, (batch_size, *family.shape[:1]), 0, VOCABULARY)
        labels = x
    else:
        create = functools.partial(models.create, family.model, 10, image_size=32)
        x = jax.random.normal(key, (batch_size, 32, 32, 3))
        labels = jax.random.randint(key, (batch_size,), 0, 10)

    def case(**fields: Any) -> Case:
        model = create(**overrides, **fields)

        def step(
            params: Params, stats: Any, x: jax.Array, labels: jax.Array, key: jax.Array
        ) -> Any:
            def loss_fn(params: Params) -> tuple[jax.Array, Any]:
                logits, stats_after = model.apply(
                    {"params": params, **stats},
                    x,
                    train=True,
                    mutable=["batch_stats"],
                    rngs={"dropout": key},
                )
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
                return losses.mean(), stats_after

            return jax.value_and_grad(loss_fn, has_aux=True)(params)

        variables = random_like(jax.eval_shape(model.init, key, x))
        return Case(step, variables.pop("params"), variables, x, labels, key)

    if hasattr(create(), "scan"):
        return {"scanned": case(scan=True), "unrolled": case(scan=False)}
    return {"": case()}


def check_agreement(name: str, ours: Case, bare: Case) -> None:
    """Raises an error unless the two programs have the same results."""
    expected, found = (jax.tree.map(np.asarray, case.program(*case.args)) for case in (bare, ours))
    # A gradient that is zero but for rounding (of a bias before a norm) is held against the others.
    largest = max(map(np.linalg.norm, jax.tree.leaves(expected)))

    def check(path: Any, a: np.ndarray, b: np.ndarray) -> None:
        # A norm, as single elements may differ: ReLU's gradient where its input is nearly 0.
        if not np.linalg.norm(a - b) <= AGREEMENT * (np.linalg.norm(b) + 1e-3 * largest):
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            raise RuntimeError(f"{name}: the bare block is another, its {where} differ")

    jax.tree_util.tree_map_with_path(check, found, expected)


def rows_of(name: str, what: str, of: list[str], pairs: Any, unit: str, target: Any) -> list[Row]:
    """The ratio, and the two that it is of."""
    ratios = [x / y for x, y in pairs]
    rows = [benchmark.row(f"{name}: {what}, {of[0]} / {of[1]}", ratios, "ratio", target)]
    for kind, values in zip(of, zip(*pairs, strict=True), strict=True):
        rows.append(benchmark.row(f"{name}: {what}, {kind}", list(values), unit))
    return rows


def compare(
    name: str,
    cases: dict[str, Case],
    sizes: dict[str, Any],
    target: float | None = None,
    check: Callable[[str, Case, Case], None] | None = None,
) -> list[Row]:
    """All rows on two programs; the target is for a step's time and memory."""
    of, (a, b) = list(cases), cases.values()
    compile_times = [(a.compile(), b.compile()) for _ in range(sizes["compiles"])]
    if check is not None:
        check(name, a, b)
    times = benchmark.pairs(a, b, sizes["rounds"], sizes["seconds"])
    milliseconds = [(1e3 * x, 1e3 * y) for x, y in times]
    mebibytes = [tuple(benchmark.temporary_bytes(case.program) / 2**20 for case in (a, b))]
    return [
        *rows_of(name, "compile time", of, compile_times, "s", None),
        *rows_of(name, "a step", of, milliseconds, "ms", target),
        *rows_of(name, "temporary memory", of, mebibytes, "MiB", target),
    ]


def measure(name: str, sizes: dict[str, Any]) -> list[Row]:
    """All rows of a family."""
    family, batch_size = FAMILIES[name], sizes["batch_size"]
    blocks = block_cases(family, batch_size)
    rows = compare(f"{name} block", blocks, sizes, TARGET, check_agreement)
    whole = model_cases(family, batch_size, family.quick if sizes["quick"] else {})
    if len(whole) > 1:
        return rows + compare(family.model, whole, sizes)
    times = [whole[""].compile() for _ in range(sizes["compiles"])]
    return [*rows, benchmark.row(f"{family.model}: compile time", times, "s")]


def main() -> int:
    """Measures, prints, writes."""
    parser = Parser("scripts/bench_models.py", __doc__ or "")
    parser.prog = "python scripts/bench_models.py"
    benchmark.add_flags(parser, rounds=(15, 9))
    parser.add_argument("--family", help=f"only this one of {', '.join(FAMILIES)}")
    parser.add_argument("--compiles", type=int, help="of each program, in turn (3; quick: 1)")
    parser.add_argument("--batch_size", type=int, help="examples of a batch (64; quick: 8)")
    sizes = benchmark.sizes(
        parser.parse_args(),
        {"rounds": 15, "seconds": 1.0, "compiles": 3, "batch_size": 64, "family": None},
        {"rounds": 9, "seconds": 0.3, "compiles": 1, "batch_size": 8},
    )
    if sizes["family"] not in (None, *FAMILIES):
        raise unknown("family", sizes["family"], FAMILIES)

    keep_freed_memory()
    jax.config.update("jax_enable_compilation_cache", False)
    with benchmark.opened(sizes.get("json")) as file:
        print(f"{jax.devices()[0].device_kind}, batch {sizes['batch_size']}", flush=True)
        Case(jax.grad(jnp.sin), 1.0).compile()  # the first is slow
        for name in FAMILIES if sizes["family"] is None else [sizes["family"]]:
            benchmark.report(measure(name, sizes), file)
    return 0


if __name__ == "__main__":
    run(main)
