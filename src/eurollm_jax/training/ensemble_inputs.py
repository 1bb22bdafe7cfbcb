"""What the members of an ensemble have in common, what each reads, and the folder that says which ensemble it holds."""

import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from eurollm_jax.corpus.folders import write_json
from eurollm_jax.corpus.tokenizing.parity import parity_report
from eurollm_jax.data.loader import Data, differences
from eurollm_jax.data.shared_rows import SharedRows
from eurollm_jax.errors import UserError
from eurollm_jax.evaluation.perplexity import HeldOut
from eurollm_jax.experiment import Experiment, encode, environment, fingerprint, identity
from eurollm_jax.training.ensemble_measurements import is_finished, read_measurements
from eurollm_jax.training.inputs import Inputs, open_inputs

RECORD = "ensemble.json"
OWN = ("name", "seed", "schedule")  # fields that members may differ in
OWN_OF_DATA = ("mixture", "seed")  # and of `data`
MEASURING = ("evaluate_every", "evaluate_rows")  # the same from an ensemble's begin to its end
PARTS = {"members": list, "measuring": dict, "experiments": dict}  # of an ensemble's identity
SPLIT = ("fsdp", "expert", "context", "tensor")  # axes of a mesh that parts of one model lie along


@dataclass(frozen=True)
class EnsembleInputs:
    """What the members' paths point to, opened once."""

    shared: Inputs  # `data` are those of the first member
    data: tuple[Data, ...]  # of each member
    rows: SharedRows
    reads: Float[np.ndarray, "K S"]  # shares of each member's rows in the language of each held-out source

    @property
    def hashes(self) -> dict[str, str]:
        """Of what the paths point to."""
        return {
            "tokenizer": self.shared.tokenizer.sha256,
            "store": self.shared.data.fingerprint,
            "heldout": self.shared.heldout.store.fingerprint,
        }


def require_alike(members: Sequence[Experiment]) -> None:
    """UserError where members differ in more than OWN and OWN_OF_DATA, or are what no ensemble trains."""
    if not members:
        raise UserError("an ensemble without members: give one experiment or more.")
    first = members[0]
    names = [member.name for member in members]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"several members have the name {twice[0]!r}: give each a name of its own.")
    for member in members:
        if differing := differences(_shared(first), _shared(member)):
            raise UserError(
                f"members {first.name!r} and {member.name!r} differ in {differing[0].partition(' was ')[0]}: the "
                "members of an ensemble share all but name, seed, schedule, data.mixture and data.seed, so train them "
                "apart."
            )
    for field in ("start_from", "branch_from"):
        if (value := getattr(first, field)) is not None:
            raise UserError(f"{field}={value}: members of an ensemble begin with weights of their own: set it to None.")
    if first.accumulate != 1:
        raise UserError(
            f"accumulate={first.accumulate}: an ensemble reads each batch at once: set accumulate=1, and train fewer "
            "members at once where memory is short."
        )
    for axis in SPLIT:
        if (ways := getattr(first.mesh, axis)) != 1:
            raise UserError(f"mesh: {axis}={ways}: each member of an ensemble lies whole on one device: set {axis}=1.")


def _shared(member: Experiment) -> dict[str, Any]:
    """The fields that are the same for all members."""
    fields: dict[str, Any] = {name: value for name, value in encode(member).items() if name not in OWN}
    for name in OWN_OF_DATA:
        del fields["data"][name]
    return fields


def open_ensemble(members: Sequence[Experiment]) -> EnsembleInputs:
    """Opens what the first member names, and lays out the mixtures of all. Raises UserError as `open_inputs` does."""
    shared = open_inputs(members[0])
    data = [shared.data]
    for member in members[1:]:
        try:
            mixed = Data.from_stores(shared.data.stores, member.data, member.total_rows)
            shares = {planned.name: planned.share for planned in mixed.plan(member.total_rows)}
            parity_report(member.parity, mixed.sources, shares).require()
        except UserError as error:
            raise UserError(f"member {member.name!r}: {error}") from None
        data.append(mixed)
    reads = [_reads(of_member, members[0].total_rows, shared.heldout) for of_member in data]
    return EnsembleInputs(shared, tuple(data), SharedRows(data), np.array(reads))


def _reads(data: Data, total_rows: int, heldout: HeldOut) -> list[float]:
    by_language: defaultdict[str, float] = defaultdict(float)
    for planned in data.plan(total_rows):
        by_language[data.sizes[planned.name].language] += planned.share
    return [by_language[source.language] for source in heldout.sources]


def claim_folder(folder: Path, members: Sequence[Experiment], inputs: EnsembleInputs, question: str) -> None:
    """Makes the folder, or refuses one that holds another ensemble, naming the differences. One that is finished stays
    as it was measured, however often that would be done now."""
    path = folder / RECORD
    mine = json.loads(json.dumps(_identity(members, inputs)))
    if path.exists():
        _require_same(folder, _saved_identity(folder), mine)
        return
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no {RECORD}: choose another folder, or move it away.")
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "question": question,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "fingerprints": {member.name: member_fingerprint(member, inputs.hashes) for member in members},
        "identity": mine,
        "experiments": {member.name: encode(member) for member in members},
        **environment(),
    }
    write_json(path, record)


def member_fingerprint(member: Experiment, hashes: Mapping[str, str]) -> str:
    """What experiment.json states of the run that this member would be alone."""
    return fingerprint(identity(member, hashes))


def _identity(members: Sequence[Experiment], inputs: EnsembleInputs) -> dict[str, Any]:
    """All that decides what the members learn and what is measured of them."""
    of_each = zip(members, inputs.data, strict=True)
    return {
        "members": [member.name for member in members],
        "measuring": {field: getattr(members[0], field) for field in MEASURING},
        "experiments": {
            member.name: {**identity(member, inputs.hashes), "reads": data.describe()} for member, data in of_each
        },
    }


def recorded_members(folder: Path) -> list[str]:
    """The names of the members of the ensemble in a folder. Raises UserError where its record is damaged."""
    return list(_saved_identity(folder)["members"])


def _saved_identity(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    try:
        identity = json.loads(path.read_text(encoding="utf-8"))["identity"]
        whole = all(isinstance(identity[name], kind) for name, kind in PARTS.items())
        why = "" if whole else "it has no list of members, or not what they are"
    except (ValueError, KeyError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"
    if why:
        raise UserError(f"{path} is damaged ({why}): restore it, or move that ensemble's folder away.")
    found: dict[str, Any] = identity
    return found


def _require_same(folder: Path, saved: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    if saved["members"] != mine["members"]:
        raise UserError(
            f"{folder} holds another ensemble (its members are {_listed(saved['members'])}, and not "
            f"{_listed(mine['members'])}): choose another folder, or move that one away."
        )
    saved_measuring, measuring = saved["measuring"], mine["measuring"]
    if found := differences({**saved, "measuring": measuring}, mine):
        raise UserError(
            f"{folder} holds another ensemble ({'; '.join(found[:4])}{' ...' if len(found) > 4 else ''}): choose "
            "another folder, or move that one away."
        )
    if saved_measuring != measuring and not is_finished(read_measurements(folder), mine["members"]):
        found = differences(saved_measuring, measuring)
        raise UserError(
            f"{folder} holds an ensemble under way, of which {'; '.join(found)}: set that back, or take another name "
            "for the study, or another folder."
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
