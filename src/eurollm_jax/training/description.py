"""How a run is computed: the facts of one start, for its records, and in one line for whoever watches."""

from collections.abc import Mapping
from typing import Any

import jax

from eurollm_jax.experiment import Experiment, environment
from eurollm_jax.model.attention import attention_choice
from eurollm_jax.model.param import count
from eurollm_jax.model.transformer import flops_per_token, specs
from eurollm_jax.parallel.distributed import host_names
from eurollm_jax.parallel.mesh import Layout
from eurollm_jax.training.inputs import Inputs
from eurollm_jax.training.metrics import MFU, Peak
from eurollm_jax.training.replicas import ReplicaCheck


def facts_of(
    experiment: Experiment, inputs: Inputs, layout: Layout, replicas: ReplicaCheck, peak: Peak
) -> dict[str, Any]:
    """What may be another at each start of a run, beside its plan; all processes call this."""
    leaves = len(replicas.copies)
    return {
        **environment(),
        "processes": jax.process_count(),
        "hosts": host_names(),
        "stores": list(experiment.data.stores),
        "workers": experiment.data.workers,
        "removed": [removed.describe() for removed in inputs.data.removed],
        "parity_allowed": inputs.parity.describe()["allowed_beyond"],
        "mesh": {axis: size for axis, size in layout.mesh.shape.items() if size > 1},
        "replicas": f"{replicas.checked} of {leaves} leaves of the state have copies that can be compared",
        "compute": experiment.model.compute,
        "remat": experiment.model.remat,
        "accumulate": experiment.accumulate,
        "attention": dict(zip(("kernel", "why"), attention_choice(experiment.model, layout), strict=True)),
        "flops_per_token": flops_per_token(experiment.model, experiment.data.sequence_length),
        "peak_flops": peak.flops,
        "peak_source": peak.source,
        "mfu_formula": MFU,
    }


def in_words(experiment: Experiment, facts: Mapping[str, Any]) -> str:
    """How a run is computed, in one line."""
    mesh = " x ".join(f"{axis}={size}" for axis, size in facts["mesh"].items()) or "one device"
    kept = jax.config.jax_compilation_cache_dir if jax.config.jax_enable_compilation_cache else None
    attention = facts["attention"]
    return (
        f"{facts['devices']}, {mesh}; {count(specs(experiment.model)):,} parameters, "
        f"{type(experiment.optimizer).__name__}, products in {facts['compute']}, remat {facts['remat']}, "
        f"attention {attention['kernel']} ({attention['why']}); "
        f"{facts['flops_per_token']:.3g} FLOP a token, peak {facts['peak_flops'] / 1e12:.3g} TFLOP/s "
        f"({facts['peak_source']}); programs are {f'kept in {kept}' if kept else 'not kept'}"
    )
