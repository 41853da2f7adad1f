"""How programs are compiled, and how often."""

import collections
from typing import Any

import jax

# Of a CPU with AVX-512 only half is used by default: 10 to 20 % of a ViT's step.
_OPTIONS: dict[str, dict[str, str | bool]] = {"cpu": {"xla_cpu_prefer_vector_width": "512"}}


def compiled(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """The program, with the compiler's options that its platform is faster with."""
    options = _OPTIONS.get(jax.default_backend())
    if options:
        try:
            return lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if "No such compile option" not in str(error):  # another version of XLA
                raise
    return lowered.compile()


class Compilations:
    """Counts what XLA compiles while it is entered, by the name of the function."""

    def __init__(self) -> None:
        self._counts: collections.Counter[str] = collections.Counter()

    def of(self, name: str) -> int:
        """How often the function has been compiled, or taken from the compilation cache."""
        return self._counts[f"jit({name})"]

    def _listen(self, event: str, duration_secs: float, **about: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self._counts[str(about.get("fun_name"))] += 1

    def __enter__(self) -> "Compilations":
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_: Any) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)
