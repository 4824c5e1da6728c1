"""Rules between a model's leaves and the tensors of a released checkpoint, read in both directions.

A rule names a leaf of a layer, a tensor, and their layouts by letters: '(n h) d -> d n h' says that
the tensor has the shape [N·H, D], that heads are its rows, and that the leaf is [D, N, H]. Where
{expert} is in the name, the leaf's first dimension counts tensors. A `Take` says which of a
letter's numbers in the tensor the leaf holds, and in which order; then several leaves share it.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from config import ConfigError, ModelConfig
from model import block_names, model_params
from parallel import Param, Tree, is_param, map_params
from storage.leaves import leaf_names

LAYER, EXPERT = '{layer}', '{expert}'


@dataclasses.dataclass(frozen=True)
class Take:
    """The indices along a letter of a tensor, `whole` long there, that a leaf holds, in order."""

    index: tuple[int, ...]
    whole: int


@dataclasses.dataclass(frozen=True)
class Rule:
    """One leaf of a layer, or of the model, and where it is in a released checkpoint.

    leaf: the keys on its path within the layer, joined by dots.
    name: of the tensor, with {layer} and {expert}; '' if there is none: the leaf is all zeros.
    form: the layouts of tensor and leaf, as this file's docstring says.
    take: by letter.
    float32: released in float32, whatever the type of the others.
    """

    leaf: str
    name: str
    form: str = ''
    take: Mapping[str, Take] = dataclasses.field(default_factory=dict)
    float32: bool = False


# What the models have in common outside of their layers.
MODEL = (
    Rule('embed.w_VD', 'model.embed_tokens.weight', 'v d -> v d'),
    Rule('final_norm', 'model.norm.weight', 'd -> d'),
    Rule('head.w_VD', 'lm_head.weight', 'v d -> v d'),
)


def slices(start: int, stop: int, whole: int, step: int = 1) -> Take:
    """Takes a range of the numbers of a letter."""
    return Take(tuple(range(start, stop, step)), whole)


def rotary_last(size: int, rotary: int) -> Take:
    """Takes heads whose first `rotary` numbers rotate with those at their end, as here."""
    return Take((*range(rotary, size), *range(rotary)), size)


def halves_of_pairs(before: int, rotary: int) -> Take:
    """Takes `before` numbers as they are; of the `rotary` next, which are rotated in neighbouring
    pairs there, all first ones and then all second ones, as `rope.rope` pairs them."""
    pairs = np.arange(rotary).reshape(-1, 2).T.reshape(-1)
    return Take((*range(before), *(before + pairs).tolist()), before + rotary)


# ---------------------------------------------------------------------------------------------
# Layouts
# ---------------------------------------------------------------------------------------------


@functools.cache
def parse_form(form: str) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """Returns the letters of each dimension of the tensor, and those of the leaf."""
    there, here = form.split('->')
    groups = re.findall(r'\(([^)]*)\)|(\S+)', there)
    return tuple(tuple((a or b).split()) for a, b in groups), tuple(here.split())


def tensor_shape(rule: Rule, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of a tensor, of which a leaf holds a part of this shape."""
    groups, letters = parse_form(rule.form)
    sizes = dict(zip(letters, shape, strict=True))
    sizes |= {letter: take.whole for letter, take in rule.take.items()}
    return tuple(math.prod(sizes[letter] for letter in group) for group in groups)


def _split(rule: Rule, x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns a view of a tensor with a dimension for each letter, in the leaf's order."""
    groups, letters = parse_form(rule.form)
    sizes = dict(zip(letters, shape, strict=True))
    sizes |= {letter: take.whole for letter, take in rule.take.items()}
    order = [letter for group in groups for letter in group]
    x = x.reshape([sizes[letter] for letter in order])
    return x.transpose([order.index(letter) for letter in letters])


def _parts(rule: Rule) -> Iterator[tuple[tuple, tuple]]:
    """Yields pairs of indices, of a tensor split by letters and of the leaf, that hold the same."""
    _, letters = parse_form(rule.form)
    whole = (slice(None),) * len(letters)
    taken = [i for i, letter in enumerate(letters) if letter in rule.take]
    assert len(taken) <= 1, 'one letter is taken in parts'
    if not taken:
        yield whole, whole
        return
    (axis,) = taken
    for there, here in runs(rule.take[letters[axis]].index):
        yield (*whole[:axis], there, *whole[axis + 1 :]), (*whole[:axis], here, *whole[axis + 1 :])


@functools.cache
def runs(index: tuple[int, ...]) -> tuple[tuple[slice, slice], ...]:
    """Splits a list of indices into slices with a step, each with its place in the list."""
    found, i = [], 0
    while i < len(index):
        step = index[i + 1] - index[i] if i + 1 < len(index) else 1
        n = 1
        while step > 0 and i + n < len(index) and index[i + n] - index[i + n - 1] == step:
            n += 1
        found.append((slice(index[i], index[i] + n * max(step, 1), max(step, 1)), slice(i, i + n)))
        i += n
    return tuple(found)


def fill_leaf(rule: Rule, out: np.ndarray, x: np.ndarray) -> None:
    """Copies a tensor, or of one with the leaf's rows some rows, to the part of the leaf."""
    split = _split(rule, x, out.shape)
    for there, here in _parts(rule):
        copy(out[here], split[there])


def fill_tensor(rule: Rule, out: np.ndarray, x: np.ndarray) -> None:
    """Copies the part of a leaf to where it is in a contiguous tensor."""
    split = _split(rule, out, x.shape)
    for there, here in _parts(rule):
        copy(split[there], x[here])


def row_wise(rule: Rule) -> bool:
    """Returns True if rows of the tensor are rows of the leaf's part, so that it may be read in
    parts."""
    groups, letters = parse_form(rule.form)
    return groups[0] == letters[:1] and letters[0] not in rule.take


# ---------------------------------------------------------------------------------------------
# A whole model
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf of the model, and the tensors that hold its parts.

    name: in a checkpoint, below 'params'.
    param: its declaration, with its blocks stacked.
    names: by the index of its first dimensions, which count tensors: (), (block,), or
        (block, expert); none if the leaf is all zeros.
    """

    name: str
    param: Param
    rule: Rule
    names: Mapping[tuple[int, ...], str]

    @property
    def counted(self) -> int:
        """Returns how many of the first dimensions count tensors."""
        return len(next(iter(self.names), ()))

    @property
    def part(self) -> tuple[int, ...]:
        """Returns the shape of what one tensor holds."""
        return self.param.shape[self.counted :]


def leaves(cfg: ModelConfig, layer_rules: Mapping[str, Rule], family: str) -> list[Leaf]:
    """Returns the leaves of a model whose layers follow these rules, in the order of `leaf_names`.

    Raises ConfigError, with the leaf, if the family has no tensor for it.
    """
    declared = model_params(cfg)
    rules = {rule.leaf: rule for rule in MODEL}
    found = []
    for name, (path, param) in declared_leaves(declared).items():
        if path[0] not in ('blocks', 'first'):
            rule, layers = rules['.'.join(path)], []
        else:
            leaf = '.'.join(path[2:])
            if leaf not in layer_rules:
                raise ConfigError(
                    f'{family} models have no tensor for {leaf} of a layer {path[1]!r}: the model '
                    f'is not one of this family'
                )
            rule, layers = layer_rules[leaf], layer_numbers(cfg, path[0], path[1])
        found.append(Leaf(name, param, rule, tensor_names(rule, param, layers)))
    return found


def declared_leaves(declared: Tree) -> dict[str, tuple[tuple[str, ...], Param]]:
    """Returns the path and the declaration of each leaf, by its name in a checkpoint."""
    found = jax.tree_util.tree_flatten_with_path(declared, is_leaf=is_param)[0]
    paths = [tuple(entry.key for entry in keys) for keys, _ in found]
    names = leaf_names(map_params(lambda p: 0, declared))  # in the same order
    return {name: (path, param) for name, path, (_, param) in zip(names, paths, found, strict=True)}


def layer_numbers(cfg: ModelConfig, group: str, name: str) -> list[int]:
    """Returns the numbers in the model of the stacked layers of this name."""
    if group == 'first':
        return list(range(cfg.first_dense))
    place, n = block_names(cfg.block).index(name), len(cfg.block)
    return [cfg.first_dense + n * i + place for i in range(cfg.n_blocks)]


def tensor_names(rule: Rule, param: Param, layers: list[int]) -> dict[tuple[int, ...], str]:
    """Returns the tensors of a leaf by the index of its first dimensions."""
    if not rule.name:
        return {}
    counts: list[list[tuple[int, str]]] = []
    if layers:
        counts.append([(i, str(layer)) for i, layer in enumerate(layers)])
    if EXPERT in rule.name:
        counts.append([(i, str(i)) for i in range(param.shape[len(counts)])])
    found = {}
    for numbers in itertools.product(*counts):
        name = rule.name.replace(LAYER, numbers[0][1]) if layers else rule.name
        if EXPERT in rule.name:
            name = name.replace(EXPERT, numbers[-1][1])
        found[tuple(i for i, _ in numbers)] = name
    return found


# ---------------------------------------------------------------------------------------------
# Copies
# ---------------------------------------------------------------------------------------------

TILE = 128  # numbers; rows and columns of a tile are then in the cache together


def copy(out: np.ndarray, x: np.ndarray) -> None:
    """Copies an array to another of its shape, whatever the strides of both, tile by tile.

    A transposition in the order of one side meets each cache line of the other as often as it holds
    numbers: three times slower.
    """
    if out.dtype == x.dtype:  # NumPy moves plain words faster than bfloat16
        words = np.dtype(f'u{x.dtype.itemsize}')
        out, x = out.view(words), x.view(words)
    fast = {fastest(out), fastest(x)}
    if len(fast) < 2 or 0 in x.shape:
        out[...] = x
        return
    steps = [range(0, n, TILE if i in fast else 1) for i, n in enumerate(x.shape)]
    for corner in itertools.product(*steps):
        at = tuple(slice(i, i + (TILE if axis in fast else 1)) for axis, i in enumerate(corner))
        out[at] = x[at]


def fastest(x: np.ndarray) -> int:
    """Returns the dimension along which neighbours are nearest in memory."""
    return min(range(x.ndim), key=lambda i: (x.shape[i] == 1, x.strides[i]))
