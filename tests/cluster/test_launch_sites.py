"""What a user's own site and a container change of a job: which of a known site's options stay, what is mounted."""

from dataclasses import replace
from pathlib import Path

import pytest

from eurollm_jax.cluster.launch.mounts import to_mount
from eurollm_jax.cluster.launch.script import render
from eurollm_jax.cluster.site import Container
from eurollm_jax.cluster.site_files import site_of
from eurollm_jax.errors import UserError
from tests.cluster.test_launch_scripts import CPU, training


def site_from(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return site_of(str(path))


def test_masks_for_eight_processes_are_not_for_another_number(tmp_path):
    alone = site_from(tmp_path, 'based_on = "lumi"\nprocesses_per_node = 1\n')
    assert "--cpu-bind" not in render(alone, training(alone))
    same = site_from(tmp_path, 'based_on = "lumi"\nprocesses_per_node = 8\n')
    assert "--cpu-bind=mask_cpu:" in render(same, training(same))
    given = 'based_on = "lumi"\nprocesses_per_node = 2\nstep_options = ["--cpu-bind=mask_cpu:0xfe,0xfe00"]\n'
    own = site_from(tmp_path, given)
    assert "--cpu-bind=mask_cpu:0xfe,0xfe00" in render(own, training(own))


def test_a_home_that_no_shell_would_replace_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"mine.toml: scratch: '~/x': .* write \$HOME for ~"):
        site_from(tmp_path, 'based_on = "lumi"\nscratch = "~/x"\n')


def test_folders_are_mounted_once_and_not_where_the_site_or_the_job_has_them(tmp_path, monkeypatch):
    monkeypatch.setenv("PLACE", str(tmp_path / "scratch"))
    site = replace(CPU, scratch="$PLACE/$SLURM_JOB_ACCOUNT", container=Container("x", ("/appl", "$UNKNOWN")))
    folders = ["scratch/p1/a", "scratch/p2/a", "work/a", "data/b", "data/b/c", "with,comma"]
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "data/tokenizer.model").touch()

    def mounted(*names):
        return to_mount(site, tmp_path / "work", "p1", [tmp_path / name for name in names])

    assert mounted("scratch/p1/a", "work/a", "work") == ()
    assert to_mount(site, tmp_path, "p1", [Path("/appl/x")]) == ()
    assert mounted("scratch/p2/a", "data/b", "data/b/c") == (str(tmp_path / "scratch/p2/a"), str(tmp_path / "data/b"))
    assert mounted("data/tokenizer.model", "data/**/*.jsonl") == (str(tmp_path / "data"),)
    (tmp_path / "work/link").symlink_to(tmp_path / "data/b")
    assert mounted("work/link") == (str(tmp_path / "data/b"),)
    with pytest.raises(UserError, match="with,comma has a ',' in its name"):
        mounted("with,comma")


def test_a_dollar_sign_of_a_folder_begins_no_variable():
    assert "binds=\"$PWD\"',/data/$HOME'\n" in render(CPU, training(CPU, image="x.sif", mounts=("/data/$HOME",)))
