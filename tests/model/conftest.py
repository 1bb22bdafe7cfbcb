import jax
import pytest

from eurollm_jax.parallel.mesh import Layout, MeshConfig


@pytest.fixture(scope="session")
def one_device():
    return Layout(MeshConfig().build(jax.devices()[:1]))
