"""A site by its name, or from a user's TOML file that says how a machine differs from one that is known.

Machines change faster than this package: what a file says stands above the profile that it is based on. A value that
cannot be right ends with the file's name, the key and what is allowed there, before anything is queued.
"""

import difflib
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from eurollm_jax.cluster.site import Container, Site
from eurollm_jax.cluster.sites import SITES
from eurollm_jax.errors import UserError
from eurollm_jax.parallel.hardware import CHIPS_BY_NAME, Chip

type Parser = Callable[[object, str], Any]  # a value as TOML has it, and where it stands


def site_of(name_or_path: str) -> Site:
    """The site of that name, or of a TOML file.

    Raises UserError for a name that is not known, with those that are near, and for a file that cannot be read.
    """
    by_name = {site.name: site for site in SITES}
    if name_or_path in by_name:
        return by_name[name_or_path]
    if name_or_path.endswith(".toml"):
        return _read(Path(name_or_path), by_name)
    raise UserError(
        f"--site {name_or_path}: no such site: {_near(name_or_path, by_name)};"
        " a file of your own ends in .toml (docs/sites.md)"
    )


def _read(path: Path, by_name: Mapping[str, Site]) -> Site:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not TOML: {error}") from error
    base_name = table.pop("based_on", None)
    if not isinstance(base_name, str) or base_name not in by_name:
        said = "is missing" if base_name is None else f"is {base_name!r}"
        raise UserError(f"{path}: based_on {said}: it names a known site: {_near(str(base_name), by_name)}")
    base = by_name[base_name]
    table = {"name": path.stem, "title": path.stem, "sources": {}, "unverified": {}} | table
    site = replace(base, **_fields(table, {**_PARSERS, **_merging(base, table)}, str(path)))
    if site.processes_per_node != base.processes_per_node and "step_options" not in table:
        # The base's masks are one for each of its own processes: another number of them would get the wrong cores.
        kept = tuple(option for option in site.step_options if not option.startswith("--cpu-bind"))
        site = replace(site, step_options=kept)
    if site.devices_per_node % site.processes_per_node:
        raise UserError(
            f"{path}: processes_per_node: {site.processes_per_node} processes cannot share {site.devices_per_node}"
            " devices evenly"
        )
    if site.cores_per_node is not None and site.cores_per_node < site.processes_per_node:
        raise UserError(f"{path}: cores_per_node: {site.cores_per_node} is less than one for each process")
    return site


def _merging(base: Site, table: Mapping[str, object]) -> dict[str, Parser]:
    """Readers of those tables that say how they differ from the base's."""

    def added(entries: Mapping[str, str], parser: Parser) -> Parser:
        return lambda value, where: dict(entries) | parser(value, where)

    def kept(entries: Mapping[str, str]) -> dict[str, str]:
        # What a file says is its writer's to vouch for: a source of ours for the value before would be wrong now.
        return {key: value for key, value in entries.items() if key.split(".")[0] not in table}

    return {
        "chip": _chip(base.chip),
        "container": _container(base.container),
        "environment": added(base.environment, _variables),
        "sources": added(kept(base.sources), _mapping),
        "unverified": added(kept(base.unverified), _mapping),
    }


def _fields(table: Mapping[str, object], parsers: Mapping[str, Parser], where: str) -> dict[str, Any]:
    for key in table:
        if key not in parsers:
            raise UserError(f"{where}: {key}: no such key: {_near(key, parsers)}")
    return {key: parsers[key](value, f"{where}: {key}") for key, value in table.items()}


def _near(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(known)}"


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value or "\n" in value:
        raise UserError(f"{where}: {value!r}: expected text on one line")
    return value


def _flag(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"{where}: {value!r}: expected true or false")
    return value


def _count(value: object, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{where}: {value!r}: expected a whole number of 1 or more")
    return value


def _number(value: object, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise UserError(f"{where}: {value!r}: expected a number above 0")
    return float(value)


def _folder(value: object, where: str) -> str:
    text = _text(value, where)
    if text.startswith("~"):
        raise UserError(f"{where}: {value!r}: no shell replaces that in a script: write $HOME for ~")
    return text


def _overhead(value: object, where: str) -> float:
    if (number := _number(value, where)) < 1:
        raise UserError(f"{where}: {value!r}: expected 1 or more: the building's power over the computer's")
    return number


def _one_of(*allowed: str) -> Parser:
    def parse(value: object, where: str) -> str:
        if value not in allowed:
            raise UserError(f"{where}: {value!r}: expected one of {', '.join(allowed)}")
        return str(value)

    return parse


def _duration(value: object, where: str) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"\d{1,3}:[0-5]\d:[0-5]\d", value):
        raise UserError(f'{where}: {value!r}: expected hours, minutes and seconds such as "24:00:00"')
    return value


def _texts(value: object, where: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise UserError(f"{where}: {value!r}: expected a list of texts")
    return tuple(_text(item, where) for item in value)


def _options(value: object, where: str) -> tuple[str, ...]:
    texts = _texts(value, where)
    for text in texts:
        if not re.fullmatch(r"--[a-z][a-z0-9-]*(=\S+)?", text):
            raise UserError(f'{where}: {text!r}: expected one long option for each entry, such as "--gres=gpu:4"')
    return texts


def _mapping(value: object, where: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: {value!r}: expected a table of texts")
    return {key: _text(item, f"{where}.{key}") for key, item in value.items()}


def _variables(value: object, where: str) -> dict[str, str]:
    variables = _mapping(value, where)
    for name in variables:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise UserError(f"{where}: {name!r}: not a name of an environment variable")
    return variables


def _container(base: Container | None) -> Parser:
    def parse(value: object, where: str) -> Container:
        if not isinstance(value, dict):
            raise UserError(f"{where}: {value!r}: expected a table with command and binds")
        fields = _fields(value, {"command": _text, "binds": _texts}, where)
        if base is None and "command" not in fields:
            raise UserError(f'{where}: command is missing: it runs an image, such as "apptainer exec --nv"')
        return Container(**fields) if base is None else replace(base, **fields)

    return parse


def _chip(base: Chip) -> Parser:
    def parse(value: object, where: str) -> Chip:
        if isinstance(value, str):
            if value not in CHIPS_BY_NAME:
                raise UserError(f"{where}: {value!r}: no such chip: {_near(value, CHIPS_BY_NAME)}")
            return CHIPS_BY_NAME[value]
        if not isinstance(value, dict):
            raise UserError(f"{where}: {value!r}: expected a chip's name, or a table of what differs from {base.name}")
        return replace(base, **_fields(value, _CHIP_PARSERS, where))

    return parse


_CHIP_PARSERS: Mapping[str, Parser] = {
    "name": _text,
    "kinds": _texts,
    "backend": _one_of("cpu", "cuda", "rocm"),
    "bfloat16": _number,
    "memory": _count,
    "bandwidth": _number,
    "watts": _number,
    "source": _text,
}

_PARSERS: Mapping[str, Parser] = {
    "name": _text,
    "title": _text,
    "devices_per_node": _count,
    "processes_per_node": _count,
    "cores_per_node": _count,
    "scheduler": _one_of("slurm", "none"),
    "node_memory": _count,
    "nodes": _count,
    "link_bandwidth": _number,
    "network_bandwidth": _number,
    "storage_bandwidth": _number,
    "node_watts": _number,
    "pue": _overhead,
    "partition": _text,
    "qos": _text,
    "account": _flag,
    "time_limit": _duration,
    "options": _options,
    "step_options": _options,
    "modules": _texts,
    "internet": _one_of("everywhere", "login", "nowhere"),
    "scratch": _folder,
    "notes": _texts,
}
