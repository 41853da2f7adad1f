"""What the transforms cost: time over a plain step, and temporary memory above it.

    python scripts/bench_transforms.py

Every case is a whole training step of the CIFAR recipe's ViT-Ti, jitted and donated: gradient,
transforms, Adam, learning rate, on a batch that stays on the device. A ratio compares two steps, A
and B, that are timed in turn (A B A B …), each for about `--seconds`; it is taken pair by pair, so
that what slows the machine for a while slows both, and the figure is the median over the pairs.
Beside it stand the quartiles. Memory is the compiled program's own accounting, and does not vary.

On a CPU, freed memory is kept for the next step. By default glibc returns a program's temporary
memory to the system after each call, and the next call pays for fresh pages (a third of a small
step): a cost that is not a gradient's, and that would make a step of two gradients look cheap.
"""

import time
from collections.abc import Callable
from typing import Any

import benchmark
import jax
import jax.numpy as jnp
import optax
from benchmark import Row

from gnp import models, transforms
from gnp.command_line import Parser, run
from gnp.memory import keep_freed_memory

RADIUS, RATE, DECAY = 0.1, 1e-3, 5e-4
WARMUP_STEPS = 10**9  # of zero-warmup: no measurement comes to its end


class Case:
    """A compiled training step, and the state that it has come to.

    Args:
      tx: the optimizer.
      loss_fn: the loss of the parameters on the batch.
      params: the initial parameters; they are copied, since the step consumes its own.
      with_step: whether `grad_fn` takes the number of the ascent step too, as `optax.contrib.sam`
        has it.
    """

    def __init__(
        self,
        tx: optax.GradientTransformation,
        loss_fn: Callable[..., jax.Array],
        params: Any,
        batch: Any,
        *,
        with_step: bool = False,
    ):
        tx = optax.with_extra_args_support(tx)

        def train_step(state: Any, batch: Any) -> tuple[Any, jax.Array]:
            params, opt_state = state

            def grad_fn(params: Any) -> Any:
                return jax.grad(loss_fn)(params, batch)

            loss, grads = jax.value_and_grad(loss_fn)(params, batch)
            updates, opt_state = tx.update(
                grads,
                opt_state,
                params,
                grad_fn=(lambda params, _: grad_fn(params)) if with_step else grad_fn,
            )
            return (optax.apply_updates(params, updates), opt_state), loss

        self.batch = batch
        self.state = (jax.tree.map(jnp.copy, params), tx.init(params))
        step = jax.jit(train_step, donate_argnums=0)
        self.step = step.lower(self.state, batch).compile()

    def seconds(self, steps: int) -> float:
        """The wall time of a step, over this many."""
        jax.block_until_ready(self.state)
        start = time.perf_counter()
        for _ in range(steps):
            self.state, loss = self.step(self.state, self.batch)
        jax.block_until_ready((self.state, loss))
        return (time.perf_counter() - start) / steps

    def temporary_bytes(self) -> int:
        """What the step allocates beside its arguments and results."""
        return benchmark.temporary_bytes(self.step)


def measure(cases: dict[str, Case], rounds: int, seconds: float, size: int) -> list[Row]:
    """All rows; `size` is that of the parameters in bytes."""
    rows: list[Row] = []
    milliseconds: dict[str, list[float]] = {}

    def ratio(a: str, b: str, target: float | None = None) -> None:
        case_a, case_b = (cases[name.partition(",")[0]] for name in (a, b))
        times = benchmark.pairs(case_a, case_b, rounds, seconds)
        rows.append(benchmark.row(f"{a} / {b}", [x / y for x, y in times], "ratio", target))
        for name, of_case in zip((a, b), zip(*times, strict=True), strict=True):
            milliseconds.setdefault(name, []).extend(1e3 * x for x in of_case)

    ratio("GR α = 0.5", "plain", 2.05)
    ratio("GR α = 1", "plain", 2.05)
    ratio("zero-warmup, in the warmup", "plain", 1.03)
    # After the warmup it is the same program: only the count is another.
    zero = cases["zero-warmup"]
    params, (gr_state, *rest) = zero.state
    gr_state = gr_state._replace(count=jnp.asarray(WARMUP_STEPS, jnp.int32))
    zero.state = (params, (gr_state, *rest))
    ratio("zero-warmup, after it", "GR α = 1")
    ratio("AdamS", "AdamW", 1.01)
    ratio("GR α = 1", "optax.contrib.sam")
    rows += [benchmark.row(f"{name}: a step", times, "ms") for name, times in milliseconds.items()]

    copies = "copies of the parameters"
    plain = cases["plain"].temporary_bytes()
    rows.append(Row("plain: temporary memory", plain / size, copies))
    for name, case in cases.items():
        if name != "plain":
            extra = (case.temporary_bytes() - plain) / size
            target = 2.0 if name.startswith(("GR", "zero")) else None
            rows.append(Row(f"{name}: temporary memory above plain", extra, copies, target=target))
    return rows


def make_cases(loss_fn: Callable[..., jax.Array], params: Any, batch: Any) -> dict[str, Case]:
    """The compiled steps by name, all from the same parameters."""

    def adam() -> optax.GradientTransformation:
        return optax.adam(RATE)

    def gr(policy: str, ratio: float) -> optax.GradientTransformation:
        schedules = transforms.warmup(policy, radius=RADIUS, ratio=ratio, warmup_steps=WARMUP_STEPS)
        return optax.chain(transforms.gradient_regularization(*schedules), adam())

    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(RADIUS))
    optimizers = {
        "plain": adam(),
        "GR α = 0.5": gr("none", 0.5),
        "GR α = 1": gr("none", 1.0),
        "zero-warmup": gr("zero", 1.0),
        "AdamS": transforms.adams(RATE, weight_decay=DECAY),
        "AdamW": optax.adamw(RATE, weight_decay=DECAY),
        "optax.contrib.sam": optax.contrib.sam(adam(), ascent, opaque_mode=True),
    }
    return {
        name: Case(tx, loss_fn, params, batch, with_step=name == "optax.contrib.sam")
        for name, tx in optimizers.items()
    }


def main() -> int:
    """Measures, prints, writes."""
    parser = Parser("scripts/bench_transforms.py", __doc__ or "")
    parser.prog = "python scripts/bench_transforms.py"
    benchmark.add_flags(parser, rounds=(15, 9))
    parser.add_argument("--batch_size", type=int, help="examples of a batch (128; quick: 32)")
    parser.add_argument("--width", type=int, help="of the ViT (192; quick: 64)")
    parser.add_argument("--depth", type=int, help="of the ViT (12; quick: 4)")
    parser.add_argument("--num_heads", type=int, help="of the ViT (3; quick: 2)")
    flags = parser.parse_args()
    sizes = benchmark.sizes(
        flags,
        {"rounds": 15, "seconds": 1.0, "batch_size": 128},
        {"rounds": 9, "seconds": 0.3, "batch_size": 32, "width": 64, "depth": 4, "num_heads": 2},
    )

    keep_freed_memory()
    overrides = {name: sizes[name] for name in ("width", "depth", "num_heads") if name in sizes}
    model = models.create("vit_ti", 10, image_size=32, **overrides)
    key = jax.random.key(0)
    images = jax.random.normal(key, (sizes["batch_size"], 32, 32, 3))
    batch = {"images": images, "labels": jax.random.randint(key, (sizes["batch_size"],), 0, 10)}
    params = jax.jit(model.init)(key, images[:1])

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        logits = model.apply(params, batch["images"], train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()

    with benchmark.opened(flags.json) as file:
        device = jax.devices()[0]
        size = sum(x.nbytes for x in jax.tree.leaves(params))
        number = sum(x.size for x in jax.tree.leaves(params))
        print(f"{device.device_kind}, {number:,} parameters, batch {sizes['batch_size']}")
        cases = make_cases(loss_fn, params, batch)
        rows = measure(cases, sizes["rounds"], sizes["seconds"], size)
        benchmark.report(rows, file)
    return 0


if __name__ == "__main__":
    run(main)
