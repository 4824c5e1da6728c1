"""The training step of a run, compiled anew where config.schedule changes its sizes."""

import dataclasses
from collections.abc import Callable

import jax

from config import Phase, in_phase, phase_at, phases
from data import Loader, Mixture
from parallel import Tree
from train_step import Setup, put_batch

Step = Callable[[Tree, jax.Array], tuple[Tree, dict]]


class PhasedStep:
    """The step and the batches of each phase of a run; without a schedule there is one phase.

    The setups of phases differ in the sizes of the batch alone, so that one state goes through all.
    `compile` makes the step of a setup; one step at a time is held.
    """

    def __init__(
        self,
        s: Setup,
        loader: Loader | Mixture,
        start: int,
        compile: Callable[[Setup], Step],
    ):
        """Compiles the step that follows on `start` steps."""
        self._loader, self._compile = loader, compile
        self._setups = {
            phase: dataclasses.replace(s, config=in_phase(s.config, phase))
            for phase in phases(s.config)
        }
        self.enter(start)

    def batch(self, i: int) -> jax.Array:
        """Puts the batch that follows on i steps on the mesh, as `train_step.put_batch` does."""
        return put_batch(self._loader.batch_at, i, self._setups[self._at(i)])

    def begins(self, i: int) -> bool:
        """Returns whether another phase than the present one follows on i steps."""
        return self._at(i) != self.phase

    def enter(self, i: int) -> None:
        """Compiles the step of the phase that follows on i steps."""
        self.phase = self._at(i)
        self.step = self._compile(self._setups[self.phase])

    def _at(self, i: int) -> Phase:
        return phase_at([*self._setups], i)
