"""A compiled program is found again by the next process, in a folder that stays small."""

import json
import os
import subprocess
import sys

import jax
import pytest

from eurollm_jax.parallel.programs import keep_programs, remove_oldest

PROGRAM = """
import json
from functools import partial
import jax
import jax.numpy as jnp
from eurollm_jax.parallel.programs import compile_times, keep_programs
folder = keep_programs()
step = jax.jit(lambda state, x: (state + jnp.sin(x) @ x.T, jnp.sum(x)), donate_argnums=0)
with compile_times() as times:
    compiled = step.lower(*(jax.ShapeDtypeStruct((8, 8), jnp.float32),) * 2).compile()
state, total = compiled(jnp.ones((8, 8)), jnp.ones((8, 8)))
print(json.dumps([str(folder), times.programs, times.found, times.lowering > 0, times.compiling > 0, float(total)]))
"""


def in_a_process(**environment):
    passed_on = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    said = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=passed_on | environment, capture_output=True, text=True, check=True
    )
    return json.loads(said.stdout)


def test_a_second_process_finds_the_program_of_the_first(tmp_path):
    kept = str(tmp_path / "eurollm_jax" / "xla")
    assert in_a_process(XDG_CACHE_HOME=str(tmp_path)) == [kept, 1, 0, True, True, 64.0]
    assert in_a_process(XDG_CACHE_HOME=str(tmp_path)) == [kept, 1, 1, True, True, 64.0]
    elsewhere = str(tmp_path / "elsewhere")
    named = in_a_process(XDG_CACHE_HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR=elsewhere)
    assert named == [elsewhere, 1, 0, True, True, 64.0]


def test_jax_may_be_told_to_keep_nothing(tmp_path):
    found = in_a_process(XDG_CACHE_HOME=str(tmp_path), JAX_ENABLE_COMPILATION_CACHE="false")
    assert found == ["None", 1, 0, True, True, 64.0]
    assert not any(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_said(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "file" / "kept"))
        assert keep_programs() is None
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert f"COMPILED PROGRAMS ARE NOT KEPT: {tmp_path}/file/kept cannot hold them (Not a directory)" in caplog.text


@pytest.mark.parametrize(("limit", "left"), [(300, "abc"), (299, "ac"), (150, "c"), (99, "")])
def test_the_oldest_programs_are_removed_beyond_a_limit(tmp_path, limit, left):
    for name, age in (("b", 30), ("a", 20), ("c", 10)):
        path = tmp_path / f"{name}-cache"
        path.write_bytes(bytes(100))
        os.utime(path, (10**9 - age, 10**9 - age))
    (tmp_path / "of another program").write_bytes(bytes(1000))
    remove_oldest(tmp_path, limit)
    assert sorted(path.name[0] for path in tmp_path.glob("*-cache")) == list(left)
    assert (tmp_path / "of another program").exists()
