"""A study's folder as `eurollm ablate` leaves it, of a planted law: what the report says can be held against it."""

import json
import math
from dataclasses import dataclass

import numpy as np

from eurollm_jax.ablation.outputs import write_outputs
from eurollm_jax.ablation.report import write_report
from eurollm_jax.ablation.table import Replica, write_results
from eurollm_jax.corpus.folders import write_json
from eurollm_jax.data.groups import SourceSize
from eurollm_jax.data.mixture import Mixture
from eurollm_jax.training.ensemble_measurements import Measurement
from tests.evaluation.test_report import Page

GROUPS = {
    "Slavic": {"bg-web": 0.3, "cs-web": 0.25, "pl-web": 0.45},
    "Germanic": {"de-web": 0.6, "sv-web": 0.4},
    "Romance": {"it-web": 0.5, "ro-web": 0.5},
    "Uralic": {"fi-web": 0.55, "fi-books": 0.45},
    "Greek & <old>": {"el-web": 1.0},
    "Maltese": {"mt-web": 1.0},
}
LANGUAGES = ("bg", "cs", "de", "el", "fi", "it", "mt", "pl", "ro", "sv")
PRIOR = (0.35, 0.3, 0.2, 0.07, 0.05, 0.03)
PROPOSAL = (0.28, 0.22, 0.18, 0.14, 0.1, 0.08)
FINGERPRINT = "5f0a" * 16
QUESTION = "Which shares of families do ten languages learn best from?\n\nAsked of a <planted> law & nothing else."
RUNS, DIVERGED, STEPS = 24, "draw-05", (32, 64, 96, 128)
PART = 0.3  # bits per byte by which the part of the held-out text that is read along a run is harder than the whole
WEIGHTS = {code: (0.2 if code in ("fi", "mt") else 0.075) for code in LANGUAGES}


def interval(value, half):
    return {"value": value, "low": value - half, "high": value + half}


@dataclass(frozen=True)
class Planted:
    """L_i = c_i + exp(b_i + sum_j t_ij r_j); shapes [10], [10], [10, 6]."""

    floor: np.ndarray
    bias: np.ndarray
    transfer: np.ndarray

    def bits(self, shares):
        return self.floor + np.exp(self.bias + self.transfer @ np.asarray(shares))


def planted(seed=0):
    rng = np.random.default_rng(seed)
    transfer = rng.normal(0, 0.3, (len(LANGUAGES), len(GROUPS)))
    for i, code in enumerate(LANGUAGES):
        transfer[i, [any(s.startswith(f"{code}-") for s in sources) for sources in GROUPS.values()].index(True)] -= 1.5
    return Planted(rng.uniform(1.0, 1.4, len(LANGUAGES)), rng.uniform(-0.6, 0.0, len(LANGUAGES)), transfer)


def objective(bits):
    return float(sum(WEIGHTS[code] * value for code, value in zip(LANGUAGES, bits, strict=True)))


def by_group(shares):
    return {group: float(share) for group, share in zip(GROUPS, shares, strict=True)}


def fix(folder, group):
    """As it would be if the share of `group` were fixed: nothing is known of moving it."""
    study, findings = (json.loads((folder / name).read_text()) for name in ("study.json", "findings.json"))
    prior = study["groups"][group]["prior"]
    study["groups"][group] |= {"lower": prior, "upper": prior}
    for arm in study["arms"]:
        arm["shares"][group] = prior
    for row in findings["transfer"].values():
        row[group] = {"value": None, "low": None, "high": None}
    findings["proposal"][group] = {"value": prior, "low": prior, "high": prior}
    change(folder / "study.json", **study)
    change(folder / "findings.json", **findings)


def write_study(folder, *, recommended=True, held="yes", name="families", seed=0):
    """Write every file of the study and return what the JSON files hold, the planted law and the measured rows."""
    folder.mkdir(parents=True)
    law, rng = planted(seed), np.random.default_rng(seed + 1)
    arms = [("prior-0", "prior", 0, PRIOR), ("prior-1", "prior", 1, PRIOR)]
    for i in range(RUNS - 2):
        shares = rng.dirichlet(6 * np.array(PRIOR) + 0.3)
        if i % 5 == 4:
            shares[i % len(GROUPS)] = 0.0
            shares /= shares.sum()
        arms.append((f"draw-{i:02d}", "zeroed" if i % 5 == 4 else "draw", 0, tuple(shares)))
    study = _study(name, arms)
    runs = [(Replica("proxy", n, k, s, "ab" * 32, by_group(r)), _measured(n, law, r, rng)) for n, k, s, r in arms]
    final = {r.name: objective(_final(m)) for r, m in runs if not m[-1].diverged}
    findings = _findings(law, final, {n: r for n, _, _, r in arms}, rng, recommended)
    confirmation = _confirmation(law, held, rng)
    write_json(folder / "study.json", study)
    write_json(folder / "findings.json", findings)
    write_json(folder / "confirmation.json", confirmation)
    write_table(folder, name, runs)
    write_outputs(
        folder, _mixture(PROPOSAL), sizes(), 1000, study=name, fingerprint=FINGERPRINT,
        declined=() if recommended else findings["reasons"],
    )  # fmt: skip
    return {"study": study, "findings": findings, "confirmation": confirmation, "runs": runs, "final": final}


def write_table(folder, name, runs):
    write_results(folder / "results.parquet", name, FINGERPRINT, runs, _language_of())


def report(folder):
    """The report of the study, written and well-formed."""
    made = write_report(folder)
    assert made == folder / "report.html"
    page = Page(made.read_text(encoding="utf-8"))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    return page


def signed(value, digits=4):
    return f"{value:+.{digits}f}".replace("-", "−")


def change(path, **fields):
    """Replace fields of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def sizes():
    rng = np.random.default_rng(7)
    made = {}
    for sources in GROUPS.values():
        for source in sources:
            tokens = int(rng.integers(200_000, 3_000_000))
            made[source] = SourceSize(tokens, 4 * tokens, -(-tokens // 512), source[:2])
    return made


def _mixture(shares):
    parts = {s: r * w for (_, held), r in zip(GROUPS.items(), shares, strict=True) for s, w in held.items()}
    return Mixture.shares(parts, "tokens", over="source")


def _language_of():
    return {f"{code}-{i}": code for code in LANGUAGES for i in range(2 if code in ("fi", "de") else 1)}


def _measured(name, law, shares, rng):
    measured = []
    final = law.bits(shares) + rng.normal(0, 0.002, len(LANGUAGES))
    for step, complete in [*((step, False) for step in STEPS), (STEPS[-1], True)]:
        diverged = "the loss was not finite, from step 70" if name == DIVERGED and step > 64 else ""
        nats, size = {}, {}
        for source, code in _language_of().items():
            size[source] = 40_000 + 1000 * len(nats) if complete else 4_000
            bits = final[LANGUAGES.index(code)] + 2 * math.exp(-step / 24) * (1 - step / STEPS[-1])
            bits += 0 if complete else PART
            nats[source] = math.nan if diverged else bits * size[source] * math.log(2)
        tokens = {source: n // 3 for source, n in size.items()}
        measured.append(Measurement(name, step, 8 * step, 4000 * step, complete, diverged, nats, tokens, size))
    return measured


def _final(measured):
    last, names = measured[-1], _language_of()
    return [
        sum(last.nats[s] for s in names if names[s] == code)
        / math.log(2)
        / sum(last.bytes[s] for s in names if names[s] == code)
        for code in LANGUAGES
    ]


def _study(name, arms):
    groups = {
        group: {"prior": prior, "lower": 0.01, "upper": 0.5 if group == "Slavic" else 1.0, "sources": sources}
        for (group, sources), prior in zip(GROUPS.items(), PRIOR, strict=True)
    }
    cost = {"expected_seconds": None, "rate": "", "seconds": 1234.5}
    return {
        "name": name,
        "question": QUESTION,
        "fingerprint": FINGERPRINT,
        "created": "2026-11-22T10:00:00+0000",
        "study": {"type": "Study", "name": name, "analysis": {"min_rho": 0.8}},
        "identity": {"proxy": {"inputs": {"heldout": "aa"}}},
        "target": "given",
        "targets": WEIGHTS,
        "groups": groups,
        "holds": {c: {g: sum(w for s, w in h.items() if s[:2] == c) for g, h in GROUPS.items()} for c in LANGUAGES},
        "arms": [{"name": n, "kind": k, "seed": s, "shares": by_group(r)} for n, k, s, r in arms],
        "laws": {"log-linear": 7, "power": 3},
        "cost": {
            "devices": "2 x cpu of 2 cores",
            "device_count": 2,
            "proxies": {"runs": RUNS, "parameters": 1_721_664, "tokens": RUNS * 512_000, "flops": 1.25e14, **cost},
            "confirmation": {"runs": 6, "parameters": 5_100_000, "tokens": 6 * 2_048_000, "flops": 3.75e14, **cost},
        },
        "versions": {"eurollm_jax": "0.1.0", "jax": "0.12.0"},
        "code": None,
    }


def _findings(law, final, shares, rng, recommended):
    prior, proposed = law.bits(PRIOR), law.bits(PROPOSAL)
    slopes = (prior - law.floor)[:, None] * law.transfer
    transfer = 0.01 * (slopes - (slopes @ np.array(PRIOR))[:, None]) / (1 - np.array(PRIOR))
    gain = objective(prior) - objective(proposed)
    foretold = {name: objective(law.bits(shares[name])) for name in final}
    half = 0.2 * abs(gain) if recommended else 1.5 * abs(gain)
    rules = {"prior": PRIOR, "proposal": PROPOSAL, "UniMax": (1 / 6,) * 6, "temperature 0.3": (0.2,) * 4 + (0.1,) * 2}
    return {
        "law": "log-linear",
        "transfer_law": "log-linear",
        "runs": len(final),
        "confidence": 0.9,
        "bootstraps": 200,
        "proposal": {g: interval(s, 0.02) for g, s in by_group(PROPOSAL).items()},
        "gain": interval(gain, half),
        "gain_of_law": gain,
        "predicted": {
            "prior": {c: interval(float(v), 0.004) for c, v in zip(LANGUAGES, prior, strict=True)},
            "proposal": {c: interval(float(v), 0.006) for c, v in zip(LANGUAGES, proposed, strict=True)},
        },
        "changes": {c: interval(float(v), 0.01) for c, v in zip(LANGUAGES, proposed - prior, strict=True)},
        "transfer": {
            c: {g: interval(float(t), 0.0015) for g, t in zip(GROUPS, row, strict=True)}
            for c, row in zip(LANGUAGES, transfer, strict=True)
        },
        "scores": {
            "log-linear": {"rho_heldout": 0.93, "r2_heldout": 0.88, "rho_loo": 0.95, "r2_loo": 0.91, "languages": {}},
            "power": {"rho_heldout": 0.71, "r2_heldout": 0.44, "rho_loo": None, "r2_loo": None, "languages": {}},
            "trees": {"rho_heldout": 0.62, "r2_heldout": math.nan, "rho_loo": None, "r2_loo": None, "languages": {}},
        },
        "heldout": {
            law_name: [
                {"name": n, "predicted": foretold[n] + rng.normal(0, spread), "observed": final[n]} for n in final
            ]
            for law_name, spread in {"log-linear": 0.004, "power": 0.01}.items()
        },
        "baselines": {
            n: {
                "shares": by_group(r),
                **interval(objective(law.bits(r)), 0.004),
                "gain": interval(objective(prior) - objective(law.bits(r)), 0.003),
            }
            for n, r in rules.items()
        },
        "noise": 0.0021,
        "recommended": recommended,
        "reasons": [f"The gain is {gain:+.4f} & sound."] if recommended else ["The gain's interval covers 0."],
        "further": "" if recommended else "About 12 more runs would settle it.",
        "caveats": ["The law misses runs by 0.0100 bits per byte."],
    }


def _confirmation(law, held, rng):
    def seeds(shares):
        return [law.bits(shares) - 0.2 + rng.normal(0, 0.002, len(LANGUAGES)) for _ in range(3)]

    arms = {
        name: {
            "seeds": [4, 5, 6],
            "objective": [objective(bits) for bits in found],
            "bits_per_byte": {c: [float(bits[i]) for bits in found] for i, c in enumerate(LANGUAGES)},
        }
        for name, found in {"prior": seeds(PRIOR), "proposal": seeds(PROPOSAL), "UniMax": seeds((1 / 6,) * 6)}.items()
    }
    gains = [a - b for a, b in zip(arms["prior"]["objective"], arms["proposal"]["objective"], strict=True)]
    mean = sum(gains) / 3
    return {
        "held": held,
        "sentence": f"The gain over 3 seeds is {mean:+.4f}.",
        "confidence": 0.9,
        "gain": {"mean": mean, "low": mean - 0.004, "high": mean + 0.004, "of_seeds": gains},
        "predicted_gain": {"mean": mean, "low": mean - 0.01, "high": mean + 0.01},
        "arms": arms,
        "shares": {"prior": by_group(PRIOR), "proposal": by_group(PROPOSAL)},
        "diverged": {},
    }
