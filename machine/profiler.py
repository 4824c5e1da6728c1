"""Profiles of single steps, for TensorBoard's profile plugin, XProf or Perfetto.

Operations carry the names of the scopes in the code that created them: layer_0_moe/moe/experts,
attention, all_gather_fsdp, reduce_scatter_tp, optimizer, ...
"""

import contextlib
import importlib.util
from typing import Any

import jax

from config import ConfigError


def parse_steps(text: str) -> tuple[int, int] | None:
    """Parses the first and the last step to trace: '10:13' -> (10, 13); '' -> None.

    Raises ConfigError for other texts, and where the profiler would end the process.
    """
    if not text:
        return None
    first, _, last = text.partition(':')
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise ConfigError(
            f'--profile={text} names no steps; use FIRST:LAST, both from 1 '
            f'up and both traced, as in --profile=10:13'
        )
    platforms = jax.config.jax_platforms or ''
    if jax.default_backend() == 'cpu' and platforms != 'cpu' and importlib.util.find_spec('libtpu'):
        raise ConfigError(
            '--profile on the CPU while libtpu is installed and loaded: its '
            'profiler ends the process if its version does not match jaxlib; use --cpu_devices=1, '
            'which does not load it'
        )
    return int(first), int(last)


class Tracer:
    """Traces the steps first..last into a folder; each process traces its own devices.

    All queued work is awaited before the first and after the last step, so that the trace holds
    exactly these steps. Outside of them it costs a comparison per step.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: str):
        self.first, self.last = steps or (0, 0)
        self.folder = folder
        self._running = False
        self._annotation: contextlib.AbstractContextManager | None = None

    def before(self, step: int, state: Any) -> None:
        """Starts or continues the trace if it holds this step, which takes this state."""
        if not self.first <= step <= self.last:
            return
        if not self._running:
            jax.block_until_ready(state)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # or every Python call would be in the trace
            jax.profiler.start_trace(self.folder, profiler_options=options)
            self._running = True
        self._annotation = jax.profiler.StepTraceAnnotation('train', step_num=step)
        self._annotation.__enter__()

    def after(self, step: int, state: Any) -> bool:
        """Returns True if this step, which gave this state, ended the trace: it is written."""
        if not self._running:
            return False
        self._annotation.__exit__(None, None, None)
        return step == self.last and self.close(state)

    def close(self, state: Any) -> bool:
        """Ends and writes a trace that is still running; returns True if there was one."""
        if not self._running:
            return False
        jax.block_until_ready(state)
        jax.profiler.stop_trace()
        self._running = False
        return True
