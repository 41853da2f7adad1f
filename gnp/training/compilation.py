"""How programs are compiled."""

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
