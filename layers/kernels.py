"""The record of a kernel: attention_kernels.py and expert_kernels.py each have a table of them.

To add one, write its functions and add a line to the table: choice by platform, rules of the
config, rematerialization and planning read the record.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from config import ConfigError

AUTO = 'auto'
PLATFORMS = ('cpu', 'gpu', 'tpu')


def no_rules(_: ConfigDict, __: int) -> Iterator[str]:
    """Yields nothing: takes any config."""
    yield from ()


def always(_: ConfigDict, __: int) -> bool:
    """Returns True: 'auto' may take the kernel for any config."""
    return True


def never(_: ConfigDict, __: int) -> bool:
    """Returns False: 'auto' never takes the kernel."""
    return False


def no_partials(_: int, __: int, ___: Any) -> int:
    """Returns 0: backward adds the gradients of queries where they are."""
    return 0


class Kernel(NamedTuple):
    """One way to compute the middle of a layer, the same numbers by other means.

    compute: the function, or functions, as the table says.
    platforms: those of jax that it is written for; 'auto' chooses among them.
    checked: its results carry the replication types that check_vma=True checks.
    rules: (config, head size of queries and keys) -> errors, if the kernel does not take them:
        the rule, the values, the remedy.
    chosen: (the same) -> False where 'auto' goes on to the next kernel though no rule is broken.
    elsewhere: the name of the kernel that runs in its place on other platforms; '': itself.
    keeps: the primitive whose results rematerialization keeps as a whole; '': those with a name.
    scores: arrays of scores reach the memory (attention), which planning counts.
    partials: (T, S, ModelConfig) -> gradients of all queries that backward has in memory beside
        their sum (attention), which planning counts.
    latent: makes queries, keys and values of `mla`'s latents itself: none of them reach the memory.
    """

    compute: Any
    platforms: tuple[str, ...] = PLATFORMS
    checked: bool = True
    rules: Callable[[ConfigDict, int], Iterator[str]] = no_rules
    chosen: Callable[[ConfigDict, int], bool] = always
    elsewhere: str = ''
    keeps: str = ''
    scores: bool = False
    partials: Callable[[int, int, Any], int] = no_partials
    latent: bool = False


Kernels = Mapping[str, Kernel]


def names(table: Kernels) -> tuple[str, ...]:
    """Lists what a config may name. A kernel for no platform only stands in for another."""
    return (AUTO, *(name for name, kernel in table.items() if kernel.platforms))


# The config of a layer (`config.config_of_layer`), and its head size of queries and keys.
Layer = tuple[ConfigDict, int]


def choose(table: Kernels, name: str, layers: Sequence[Layer], platform: str) -> str:
    """Returns the name of the kernel that runs in these layers where their config names `name`.

    'auto' takes the first of the table that is made for the platform, passes the check of
    replication types if the config asks for it, and finds no rule broken in any layer. Raises
    ConfigError if what runs in the named one's place has no such types and the config asks for it.
    """
    checked = any(config.check_vma for config, _ in layers)
    if name != AUTO:
        stand_in = table[name].elsewhere
        if not stand_in or platform in table[name].platforms:
            return name
        if checked and not table[stand_in].checked:
            raise ConfigError(
                f'the kernel {name!r} is interpreted on {platform}, without replication types, '
                f'which check_vma=True checks; use check_vma=False'
            )
        return stand_in
    for candidate, kernel in table.items():
        written = platform in kernel.platforms or kernel.platforms == PLATFORMS
        if not written or (checked and not kernel.checked):
            continue
        if all(kernel.chosen(*layer) and not any(kernel.rules(*layer)) for layer in layers):
            return candidate
    raise ValueError(f'no kernel of {", ".join(table)} runs on {platform}')


def portable(table: Kernels) -> str:
    """Returns the first kernel that runs on every platform, with replication types."""
    return next(n for n, k in table.items() if k.checked and k.platforms == PLATFORMS)


def kernel_errors(table: Kernels, field: str, config: ConfigDict, head: int) -> Iterator[str]:
    """Yields why the kernel that a field of the config names cannot run."""
    name = config.model[field]
    if name == AUTO:
        return
    if not table[name].checked and config.check_vma:
        yield (
            f'model.{field}={name!r} has no replication types, which check_vma=True checks; use '
            f'check_vma=False, or {portable(table)!r}'
        )
    yield from table[name].rules(config, head)
