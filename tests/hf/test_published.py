"""The configurations that the families' authors published are read as the families that we name after them."""

import json
from pathlib import Path

import pytest

from eurollm_jax.hf.export import config_json
from eurollm_jax.hf.families import family_for, family_of_folder
from eurollm_jax.hf.families.family import canonical
from eurollm_jax.hf.mapping import tensors
from eurollm_jax.model import families
from eurollm_jax.model.param import count
from eurollm_jax.model.transformer import specs

PUBLISHED = json.loads((Path(__file__).parent.parent / "golden/published.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_is_read_as_its_family_and_written_again(name):
    raw = PUBLISHED[name]
    family = family_of_folder(raw, name)
    config = family.config(raw, name)
    assert canonical(config) == canonical(getattr(families, name))
    written = config_json(family_for(config, family.architecture), config, "bfloat16", {})
    assert canonical(family.config(written, name)) == canonical(config)
    assert sum(tensor.size for tensor in tensors(family.table, config)) == count(specs(config))
