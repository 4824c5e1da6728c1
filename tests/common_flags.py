"""Sets the flags of XLA for small programs."""

import os
from importlib.metadata import version
from importlib.util import find_spec


def set_flags() -> None:
    """Lets small programs compile faster; to be called before anything asks jax for devices.

    Most of the time goes into compiling programs that run for milliseconds: LLVM's part of that is
    halved, and jaxlib 0.10 is told to emit fusions as it did before MLIR, which halves it again.
    Later ones have no choice, and end over a flag that they do not know, as do the compilers of
    TPUs and GPUs. XLA's own passes, which decide what is computed, stay as they are.
    """
    old = version('jaxlib').startswith('0.10.')
    compilers = find_spec('libtpu') or find_spec('jax_cuda12_plugin')
    flags = [
        os.environ.get('XLA_FLAGS', ''),
        '--xla_backend_optimization_level=0',
        *(['--xla_cpu_use_fusion_emitters=false'] if old and not compilers else []),
    ]
    os.environ['XLA_FLAGS'] = ' '.join(flags)
