"""The record of a family of released models, and the comparison of its two directions."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from config import ConfigError, ModelConfig
from families.fields import ALWAYS, OF_EXPERTS, PLAIN, ROPE, Released, shortest_block
from families.rules import Leaf, Rule, leaves


class Family(NamedTuple):
    """One family: what its config.json means, and where its layers' weights are.

    model_types: in config.json; the first one is written.
    architecture: in config.json, as it is written.
    fields(released) returns fields of `model`, and raises ConfigError, with the key, for what the
        code does not compute.
    config(m) returns keys of config.json for a model.
    rules(m) returns the rules of a layer's leaves.
    left_out(released) returns beginnings of tensors' names that the model does without, each with
        a word for what they are.
    """

    model_types: tuple[str, ...]
    architecture: str
    fields: Callable[[Released], dict[str, Any]]
    config: Callable[[ModelConfig], dict[str, Any]]
    rules: Callable[[ModelConfig], list[Rule]]
    left_out: Callable[[Released], Mapping[str, str]] = lambda _: {}

    @property
    def name(self) -> str:
        return self.model_types[0]

    def model_fields(self, released: Released) -> dict[str, Any]:
        """Returns all fields of `model` that count for a config.json."""
        found = PLAIN | self.fields(released)
        if 'router' in found and 'bias_rate' not in found:
            found['bias_rate'] = 0.0  # its routers have no biases to balance with
        return found

    def model_leaves(self, m: ModelConfig) -> list[Leaf]:
        """Returns the leaves of a model, and where its tensors are."""
        return leaves(m, {rule.leaf: rule for rule in self.rules(m)}, self.name)

    def released_config(self, m: ModelConfig) -> dict[str, Any]:
        """Returns the config.json of a model, without its type.

        Raises ConfigError, with the fields, if the family's models do not compute what it does.
        """
        config = {
            'architectures': [self.architecture],
            'model_type': self.name,
            **self.config(m),
        }
        config = dict(sorted(config.items()))
        there = self.model_fields(Released(config, 'the config.json of the export'))
        m = shortest_block(m)  # of several ways to name the same layers
        wrong = [
            f'model.{name}={value(m, name)!r}, and a {self.name} model has {there[name]!r}'
            for name in counting(m, there)
            if value(m, name) != there[name]
        ]
        if wrong:
            raise ConfigError(
                f'{self.name} models do not compute what this model does:\n'
                + '\n'.join(f'  - {line}' for line in wrong)
            )
        return config


def counting(m: ModelConfig, there: Mapping[str, Any]) -> list[str]:
    """Returns the fields by which the model of a family, with the fields `there`, computes."""
    rope = {name for names in ROPE.values() for name in names}
    names = {*ALWAYS, *PLAIN, *there} - rope - {'bias_rate'}
    kinds = [kind.rpartition('+')[2] for kind in m.block] + ['dense'] * m.first_dense
    if 'moe' not in kinds:
        names -= {*OF_EXPERTS}
    if 'dense' not in kinds:
        names -= {'d_ff'}
    if not m.qk_norm:
        names -= {'qk_norm_over'}
    if m.attention != 'gqa':
        names -= {'qk_norm', 'qk_norm_over', 'rotary_dim'}
    if m.n_expert_groups == 1:
        names -= {'n_top_groups', 'group_score'}
    return sorted(names | set(ROPE[m.rope_scaling]))


def value(m: ModelConfig, name: str) -> Any:
    """Returns a field of a model, or what stands for its 0."""
    return getattr(m, name) or getattr(m, MEANT.get(name, name))


MEANT = {'latent_norm_eps': 'norm_eps'}  # the fields that 0 of another one stands for
