"""The named models are the published ones: every weight's shape is written down, and the totals agree."""

from pathlib import Path

import pytest

from eurollm_jax.model import families
from eurollm_jax.model.param import count, table
from eurollm_jax.model.transformer import specs

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.mark.parametrize("name", ["EUROLLM_1_7B", "EUROLLM_9B", "NANO"])
def test_golden_table(name):
    config = getattr(families, name)
    written = (GOLDEN / f"{name.lower()}.txt").read_text()
    assert table(specs(config)) == written, f"write the new table to {GOLDEN} if the change is meant"


@pytest.mark.parametrize(("name", "published"), [("EUROLLM_1_7B", 1.657e9), ("EUROLLM_9B", 9.154e9)])
def test_published_parameter_counts(name, published):
    assert count(specs(getattr(families, name))) == pytest.approx(published, rel=1e-3)
