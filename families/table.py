"""The families by name.

To add one, write its file and add it here.
"""

from config import ConfigError, ModelConfig
from families import (
    deepseek,
    glm4_moe,
    gpt_oss,
    llama,
    mistral,
    mixtral,
    olmo2,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)
from families.family import Family
from families.fields import Released

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        llama.FAMILY, mistral.FAMILY, qwen2.FAMILY, qwen3.FAMILY, olmo2.FAMILY, mixtral.FAMILY,
        qwen2_moe.FAMILY, qwen3_moe.FAMILY, deepseek.V3, deepseek.V2, glm4_moe.FAMILY,
        gpt_oss.FAMILY,
    )
}  # fmt: skip


def family_of(released: Released) -> Family:
    """Returns the family of a config.json. Raises ConfigError if none has its model_type."""
    kind = released.need('model_type')
    for family in FAMILIES.values():
        if kind in family.model_types:
            return family
    known = ', '.join(kind for family in FAMILIES.values() for kind in family.model_types)
    raise ConfigError(
        f'{released.where} has model_type={kind!r}, which families/ does not have; it has {known}'
    )


def check_name(name: str) -> None:
    """Raises ConfigError for the name of no family; '' is right."""
    if name and name not in FAMILIES:
        raise ConfigError(f'--family={name} is no family: use one of {", ".join(FAMILIES)}')


def family_for(m: ModelConfig, name: str = '') -> Family:
    """Returns the family of this name, or the first whose models compute what this model does.

    Raises ConfigError, with what each of them lacks, if there is none.
    """
    check_name(name)
    lacks = []
    for family in [FAMILIES[name]] if name else FAMILIES.values():
        try:
            family.released_config(m)
            family.model_leaves(m)
            return family
        except ConfigError as error:
            lacks.append(f'{family.name}: {error}')
    raise ConfigError(
        'no family of released models computes what this model does.\n' + '\n'.join(lacks)
    )
