"""The definitions of images: known sections, the versions of constraints.txt, and shell that parses."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEFINITIONS = sorted((ROOT / "scripts" / "containers").glob("*.def"))
# https://apptainer.org/docs/user/main/definition_files.html
SECTIONS = {"files", "post", "environment", "test", "runscript", "labels", "help"}
SHELL = ("post", "environment", "test", "runscript")
each = pytest.mark.parametrize("path", DEFINITIONS, ids=lambda path: path.stem)


def parts(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The head's keys, and the text of each section."""
    head, *sections = re.split(r"^%", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    keys = dict(line.split(": ", 1) for line in head.splitlines() if line and not line.startswith("#"))
    named = [section.split("\n", 1) for section in sections]
    assert len({name for name, _ in named}) == len(named), "a section twice"
    return keys, dict(named)


def pinned(package: str) -> str:
    found = re.search(rf"^{re.escape(package)}==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found, f"{package} is not in constraints.txt"
    return found[1]


def test_both_are_there():
    assert [path.stem for path in DEFINITIONS] == ["cuda", "rocm"]


@each
def test_the_base_has_a_dated_tag(path):
    keys, _ = parts(path)
    assert keys.keys() == {"Bootstrap", "From"}
    assert keys["Bootstrap"] == "docker"
    assert re.fullmatch(r"docker\.io/[\w-]+/[\w-]+:[\w.-]*20\d{6}[\w]*", keys["From"])


@each
def test_sections_are_those_that_apptainer_knows(path):
    _, sections = parts(path)
    assert set(sections) == SECTIONS
    assert all(text.strip() for text in sections.values())


@each
def test_files_are_there(path):
    _, sections = parts(path)
    for line in sections["files"].split("\n"):
        if line.strip():
            source, target = line.split()
            assert (ROOT / source).exists()
            assert target == f"/opt/eurollm_jax/{source}"


@each
def test_shell_parses(path):
    _, sections = parts(path)
    for name in SHELL:
        done = subprocess.run(["bash", "-n"], input=sections[name], text=True, capture_output=True)
        assert (done.returncode, done.stderr) == (0, ""), name


@each
def test_versions_are_the_pinned_ones(path):
    _, sections = parts(path)
    labels = dict(line.split() for line in sections["labels"].splitlines() if line.strip())
    extra = path.stem
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extra in extras
    assert f"'.[{extra}]'" in sections["post"]
    assert "--constraint constraints.txt --build-constraint constraints.txt" in sections["post"]
    rocm = labels.pop("rocm", None)
    assert labels == {package: pinned(package) for package in labels}
    plugins = {"cuda": "jax-cuda13-plugin", "rocm": "jax-rocm7-plugin"}
    assert labels.keys() >= {"jax", plugins[extra]}
    others = set(re.findall(r"'([\w-]+)\[.*?\]==([\d.]+)'", sections["post"]))
    assert others == ({("rocm", rocm)} if rocm else set()), "all else comes from constraints.txt"


@each
def test_the_installer_is_cut_out_of_the_constraints_with_its_hashes(path, tmp_path):
    """%post's own command, run on the real file."""
    _, sections = parts(path)
    (command,) = re.findall(r"^ *(sed .*) > /tmp/uv\.txt$", sections["post"], re.MULTILINE)
    cut = subprocess.run(["bash", "-c", command], cwd=ROOT, text=True, capture_output=True, check=True).stdout
    lines = cut.splitlines()
    assert lines[0] == f"uv=={pinned('uv')} \\"
    assert len(lines) > 1
    assert all(re.fullmatch(r" +--hash=sha256:[0-9a-f]{64}( \\)?", line) for line in lines[1:])
    assert lines[-1][-1] != "\\"
