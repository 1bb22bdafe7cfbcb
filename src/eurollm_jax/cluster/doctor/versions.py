"""Whether the installed distributions are those that their own metadata ask for: ours, jax's and its plug-ins'.

Nothing is imported, so that it is told, too, where an import fails. `pip check` looks at all distributions; this at
those without which there is no training.
"""

import importlib.metadata as installed
import platform
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from eurollm_jax.cluster.doctor.finding import Finding, failed, guarded, passed
from eurollm_jax.parallel.hardware import Backend

OURS = "eurollm_jax"
PLUGIN = re.compile(r"jax-(?P<kind>cuda|rocm)(?P<major>\d*)-(?P<part>plugin|pjrt)")
NVIDIA_WHEELS = "with-cuda"  # extra of the CUDA plug-in


def version_findings(expected: Backend | None) -> list[Finding]:
    """All of this module; `expected` is the backend of the site, None where there is no site."""
    try:
        import packaging  # noqa: F401
    except ImportError:
        missing = "the package packaging is not there, and nothing can be compared without it"
        return [failed("dependencies", missing, "pip install packaging")]
    return [
        *guarded("python", python),
        *guarded("dependencies", dependencies),
        *guarded("jax and jaxlib", jax_and_jaxlib),
        *guarded("plug-in", lambda: plugins(expected)),
    ]


def version_facts() -> dict[str, str]:
    """Distribution -> version, of ours, what we require, and jax's plug-ins."""
    names = [OURS, *_required_names(), *_plugin_names()]
    found = {name: _version(name) for name in dict.fromkeys(names)}
    return {"python": platform.python_version(), **{name: version or "missing" for name, version in found.items()}}


def python() -> Finding:
    """The interpreter against our Requires-Python."""
    from packaging.specifiers import SpecifierSet

    here, wanted = platform.python_version(), _asked_for()[0]
    if SpecifierSet(wanted).contains(here, prereleases=True):
        return passed("python", here)
    return failed("python", f"{here}, and {OURS} needs {wanted}", f"make an environment with Python {wanted}")


def dependencies() -> Finding:
    """Each requirement of ours against the version that is installed."""
    lines = _asked_for()[1]
    wrong = unsatisfied(lines)
    if wrong:
        return failed("dependencies", "; ".join(wrong.values()), _install(wrong))
    return passed("dependencies", f"all {len(lines)} satisfied")


def jax_and_jaxlib() -> Finding:
    """What jax's own metadata say of jaxlib and the rest: a jaxlib that is newer, or much older, is refused by jax."""
    jax, jaxlib = _version("jax"), _version("jaxlib")
    if jax is None or jaxlib is None:
        return failed("jax and jaxlib", f"jax {jax or 'missing'}, jaxlib {jaxlib or 'missing'}", "pip install jax")
    wrong = unsatisfied(installed.requires("jax") or [])
    if wrong:
        return failed("jax and jaxlib", f"jax {jax}: " + "; ".join(wrong.values()), _install(wrong))
    return passed("jax and jaxlib", f"jax {jax}, jaxlib {jaxlib}")


def plugins(expected: Backend | None) -> Finding:
    """The accelerator's plug-in: that it is there where it should be, is one alone, and fits jaxlib and its parts."""
    names = _plugin_names()
    found = ", ".join(f"{name} {_version(name)}" for name in names) or "none: jax computes on the CPU"
    kinds = sorted({match["kind"] + match["major"] for name in names if (match := PLUGIN.fullmatch(name))})
    if len(kinds) > 1:
        return failed(
            "plug-in", f"more than one: {found}", f"uninstall all but one: pip uninstall {' '.join(names)}, then one"
        )
    if expected in ("cuda", "rocm") and not any(kind.startswith(expected) for kind in kinds):
        return failed("plug-in", f"{found}; the site needs {expected}", f'pip install "{OURS}[{expected}]"')
    wrong: dict[str, str] = {}
    for name in names:
        wrong |= unsatisfied(installed.requires(name) or [])
        of = PLUGIN.fullmatch(name)
        if of and of["kind"] == "cuda" and release(_version(name)) != release(_version("jaxlib")):
            wrong[f"{name}=={_version('jaxlib')}"] = (
                f"{name} {_version(name)} beside jaxlib {_version('jaxlib')}, which uses only its own version"
            )
    if wrong:
        return failed("plug-in", "; ".join(dict.fromkeys(wrong.values())), _install(wrong))
    return passed("plug-in", found)


def cuda_release() -> int | None:
    """The major release of CUDA that the plug-in is built for; None without one."""
    matches = [PLUGIN.fullmatch(name) for name in _plugin_names()]
    return next(
        (int(match["major"]) for match in matches if match and match["kind"] == "cuda" and match["major"]), None
    )


def unsatisfied(lines: Sequence[str]) -> dict[str, str]:
    """Requirements, as metadata write them, that are not met -> what is there instead.

    NVIDIA's libraries are looked at where they are installed as wheels: a wrong cuDNN is told, and a machine's own CUDA
    is not taken for a missing one.
    """
    from packaging.requirements import Requirement

    wrong = {}
    for line in lines:
        requirement = Requirement(line)
        marker = requirement.marker
        needed = marker is None or marker.evaluate({"extra": ""})
        if marker is not None and not needed and not marker.evaluate({"extra": NVIDIA_WHEELS}):
            continue
        version = _version(requirement.name)
        asked = f"{requirement.name}{requirement.specifier}"
        if version is None and needed:
            wrong[asked] = f"{requirement.name} is missing"
        elif version is not None and not requirement.specifier.contains(version, prereleases=True):
            wrong[asked] = f"{requirement.name} {version}, needed is {requirement.specifier}"
    return wrong


def _asked_for() -> tuple[str, list[str]]:
    """(Requires-Python, requirements) of ours: of pyproject.toml where the package lies in its repository, for what was
    installed from there long ago says what was needed then; else of the installed metadata."""
    project = Path(__file__).parents[4] / "pyproject.toml"
    if project.is_file() and (table := tomllib.loads(project.read_text())["project"])["name"] == OURS:
        return table["requires-python"], table["dependencies"]
    metadata = installed.metadata(OURS)
    lines = [line for line in metadata.get_all("Requires-Dist") or [] if "extra ==" not in line]
    return metadata["Requires-Python"] or "", lines


def _required_names() -> list[str]:
    names = [match[0] for line in _asked_for()[1] if (match := re.match(r"[\w.-]+", line))]
    return list(dict.fromkeys([*names, "jaxlib"]))


def _plugin_names() -> list[str]:
    """The parts of jax's plug-ins that are installed, by the names of their wheels."""
    names = {(found.metadata["Name"] or "").replace("_", "-").lower() for found in installed.distributions()}
    return sorted(name for name in names if PLUGIN.fullmatch(name))


def _version(name: str) -> str | None:
    try:
        return installed.version(name)
    except installed.PackageNotFoundError:
        return None


def release(version: str | None) -> tuple[int, ...]:
    """The numbers before any suffix: jaxlib compares these."""
    digits = re.match(r"\d+(?:\.\d+)*", version or "")
    return tuple(map(int, digits[0].split("."))) if digits else ()


def _install(wrong: Mapping[str, str]) -> str:
    return "pip install " + " ".join(f'"{asked}"' for asked in wrong)
