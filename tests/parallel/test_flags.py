"""XLA's flags for the backends are ones that the installed XLA knows: an unknown one ends a process at its start."""

import os
import subprocess
import sys

import pytest

from eurollm_jax.parallel.flags import FLAGS, xla_flags


def start(flags):
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    return subprocess.run(
        command, env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True
    )


@pytest.mark.parametrize("backend", sorted(FLAGS))
def test_xla_knows_them(backend):
    done = start(xla_flags(backend))
    assert done.returncode == 0, done.stderr


def test_xla_would_refuse_what_it_does_not_know():
    done = start(xla_flags("cuda") + " --xla_gpu_enable_nothing_of_the_kind=true")
    assert done.returncode != 0
    assert "nothing_of_the_kind" in done.stderr


def test_each_is_given_with_its_reason():
    assert xla_flags("rocm").split() == [f"--{flag.name}={flag.value}" for flag in FLAGS["rocm"]]
    assert all(len(flag.reason) > 20 for flags in FLAGS.values() for flag in flags)
