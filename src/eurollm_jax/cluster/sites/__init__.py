"""The machines that the project knows, plain values in a module for each; docs/sites.md shows their sources."""

from eurollm_jax.cluster.site import Site
from eurollm_jax.cluster.sites.generic import GENERIC_AMD, GENERIC_NVIDIA, LOCAL
from eurollm_jax.cluster.sites.jean_zay import JEAN_ZAY_A100, JEAN_ZAY_H100
from eurollm_jax.cluster.sites.jupiter import JUPITER
from eurollm_jax.cluster.sites.karolina import KAROLINA
from eurollm_jax.cluster.sites.leonardo import LEONARDO
from eurollm_jax.cluster.sites.lumi import LUMI
from eurollm_jax.cluster.sites.marenostrum5 import MARENOSTRUM5

SITES: tuple[Site, ...] = (
    LUMI,
    LEONARDO,
    MARENOSTRUM5,
    JUPITER,
    JEAN_ZAY_H100,
    JEAN_ZAY_A100,
    KAROLINA,
    GENERIC_NVIDIA,
    GENERIC_AMD,
    LOCAL,
)
