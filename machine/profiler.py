"""Profiles of single steps, for TensorBoard's profile plugin, XProf or Perfetto.

Operations carry the names of the scopes in which the code made them: layer_0_moe/moe/experts,
attention, all_gather_fsdp, reduce_scatter_tp, optimizer, ...
"""

import contextlib
import importlib.util
import os

import jax

from parallel import Tree


def parse_steps(text: str) -> tuple[int, int] | None:
    """'10:13' -> (10, 13), the first and the last step to trace; '' -> None."""
    if not text:
        return None
    first, _, last = text.partition(':')
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise ValueError(
            f'the config cannot run: --profile={text} names no steps; use FIRST:LAST, both from 1 '
            f'up and both traced, as in --profile=10:13'
        )
    platforms = jax.config.jax_platforms or ''
    if jax.default_backend() == 'cpu' and platforms != 'cpu' and importlib.util.find_spec('libtpu'):
        raise ValueError(
            'the config cannot run: --profile on the CPU while libtpu is installed and loaded: its '
            'profiler ends the process where its version is not the one of this jaxlib; use '
            '--cpu_devices=1, which leaves it out'
        )
    return int(first), int(last)


class Tracer:
    """Traces the steps first..last into WORKDIR/profile, each process its own devices.

    The devices are left to run dry before the first and after the last, so that the trace holds
    whole steps and no others. Outside of these steps it costs a comparison.
    """

    def __init__(self, steps: tuple[int, int] | None, workdir: str):
        self.first, self.last = steps or (0, 0)
        self.folder = os.path.join(workdir, 'profile')
        self._running = False
        self._annotation: contextlib.AbstractContextManager | None = None

    def before(self, step: int, state: Tree) -> None:
        if not self.first <= step <= self.last:
            return
        if not self._running:
            jax.block_until_ready(state)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # a call a line of Python would bury the rest
            jax.profiler.start_trace(self.folder, profiler_options=options)
            self._running = True
        self._annotation = jax.profiler.StepTraceAnnotation('train', step_num=step)
        self._annotation.__enter__()

    def after(self, step: int, state: Tree) -> bool:
        """Whether this was the last step of the trace, which is written now."""
        if not self._running:
            return False
        self._annotation.__exit__(None, None, None)
        return step == self.last and self.close(state)

    def close(self, state: Tree) -> bool:
        """Ends a trace that is still running; whether there was one."""
        if not self._running:
            return False
        jax.block_until_ready(state)
        jax.profiler.stop_trace()
        self._running = False
        return True
