"""timm's model trained in PyTorch, beside ours: the part "torch" of `scripts/bench_train.py`."""

import sys
import time
import unittest.mock
from collections.abc import Iterator
from typing import Any

import benchmark
import jax
import numpy as np
from benchmark import Row
from train_steps import DECAY, RADIUS, RATE, OurSteps, Task, make_config

from gnp.errors import UserError
from gnp.export import timm_call

# timm imports transforms, data sets and one class of torchvision's, none of which a model needs to
# be built and run. So a stand-in will do where torchvision is missing or fits another PyTorch.
_TORCHVISION = ("", ".datasets", ".ops", ".ops.misc", ".transforms", ".transforms.functional")


def import_torch() -> tuple[Any, Any]:
    """PyTorch and timm.

    Raises:
      UserError: if they are not installed, or this PyTorch lacks the device that JAX has.
    """
    try:
        import torch

        try:
            import torchvision  # noqa: F401
        except (ImportError, RuntimeError, OSError):
            for part in _TORCHVISION:
                sys.modules[f"torchvision{part}"] = unittest.mock.MagicMock()
        import timm
    except ImportError as error:
        raise UserError(
            f"--compare=torch: {error.name} is not installed; "
            "pip install -c constraints.txt -e '.[parity]'"
        ) from None
    if jax.default_backend() == "gpu" and not torch.cuda.is_available():
        raise UserError("--compare=torch: JAX has a GPU, but this PyTorch has none; install one")
    return torch, timm


class TorchSteps:
    """Training steps of a model of timm's in PyTorch, on the device that JAX has.

    Eager, as timm's own script trains, with the fused AdamW. In bfloat16 by autocast.

    Args:
      task: what is learned.
      sam: whether it takes a second gradient, at parameters that are perturbed.
    """

    def __init__(self, task: Task, *, sam: bool):
        self._torch, timm = import_torch()
        name, image_size, dtype = task.case
        call = timm_call(name, task.model, image_size)
        if call is None:
            raise UserError(f"--compare=torch: timm has no {name} of these sizes")
        self._device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        # As JAX's default: products of float32 matrices by TensorFloat-32 where there is such.
        self._torch.set_float32_matmul_precision("high" if self._device == "cuda" else "highest")
        self._model = eval(f"{call})", {"timm": timm}).to(self._device).train()
        self._params = list(self._model.parameters())
        self._optimizer = self._torch.optim.AdamW(
            self._params, lr=RATE, weight_decay=DECAY, fused=True
        )
        images = np.asarray(task.batch["input"]).transpose(0, 3, 1, 2)
        self._images = self._torch.tensor(np.ascontiguousarray(images)).to(self._device)
        labels = np.asarray(task.batch["label"], np.int64)
        self._labels = self._torch.tensor(labels).to(self._device)
        self._half, self._sam = dtype == "bfloat16", sam

    def _gradient(self) -> None:
        torch = self._torch
        with torch.autocast(self._device, torch.bfloat16, enabled=self._half):
            logits = self._model(self._images)
            loss = torch.nn.functional.cross_entropy(logits, self._labels)
        self._optimizer.zero_grad()
        loss.backward()

    def _step(self) -> None:
        torch = self._torch
        self._gradient()
        if self._sam:
            with torch.no_grad():
                grads = [x.grad for x in self._params]
                norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
                epsilon = torch._foreach_mul(grads, RADIUS / norm)
                torch._foreach_add_(self._params, epsilon)
            self._gradient()
            with torch.no_grad():
                torch._foreach_sub_(self._params, epsilon)
        self._optimizer.step()

    def _wait(self) -> None:
        if self._device == "cuda":
            self._torch.cuda.synchronize()

    def seconds(self, steps: int) -> float:
        """The wall time of a step, over this many."""
        self._wait()
        start = time.perf_counter()
        for _ in range(steps):
            self._step()
        self._wait()
        return (time.perf_counter() - start) / steps


def measure_torch(task: Task, sizes: Any) -> Iterator[list[Row]]:
    """The rows of "torch"."""
    torch, timm = import_torch()
    print(
        f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, timm {timm.__version__}"
    )
    for method, policy in (("plain", "off"), ("SAM", "none")):
        ours = OurSteps(task, make_config(policy))
        theirs = TorchSteps(task, sam=method == "SAM")
        times = benchmark.pairs(ours, theirs, sizes["rounds"], sizes["seconds"])
        of_ours, of_theirs = map(list, zip(*times, strict=True))
        label = f"{task.label}: {method}"
        least = min(of_ours) / min(of_theirs)
        rows = [
            benchmark.row(f"{label}, ours / PyTorch", [x / y for x, y in times], "ratio", 1.0),
            Row(f"{label}, ours / PyTorch, of the least times", least, "ratio", target=1.0),
        ]
        for name, values in (("ours", of_ours), ("PyTorch", of_theirs)):
            milliseconds = [1e3 * x for x in values]
            rows.append(benchmark.row(f"{label}, {name}: a step", milliseconds, "ms"))
            rows.append(Row(f"{label}, {name}: the least time", min(milliseconds), "ms"))
        yield rows
