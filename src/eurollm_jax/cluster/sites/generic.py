"""Slurm machines that are not listed, to be completed in a user's file, and the computer that this runs on."""

from eurollm_jax.cluster.site import Container, Site
from eurollm_jax.parallel.hardware import CHIPS_BY_NAME, Chip

ASSUMED = "assumed"
UNVERIFIED = dict.fromkeys(("chip", "devices_per_node", "processes_per_node", "options", "container"), ASSUMED)

GENERIC_NVIDIA = Site(
    name="generic-nvidia",
    title="Slurm with NVIDIA GPUs",
    chip=CHIPS_BY_NAME["H100"],
    devices_per_node=8,
    processes_per_node=8,
    cores_per_node=None,
    scheduler="slurm",
    options=("--gpus-per-node=8", "--exclusive", "--mem=0"),
    container=Container("apptainer exec --nv"),
    notes=("Whole nodes of eight H100 are assumed: say in a file of your own what yours have.",),
    unverified=UNVERIFIED,
)

GENERIC_AMD = Site(
    name="generic-amd",
    title="Slurm with AMD GPUs",
    chip=CHIPS_BY_NAME["MI300X"],
    devices_per_node=8,
    processes_per_node=8,
    cores_per_node=None,
    scheduler="slurm",
    options=("--gpus-per-node=8", "--exclusive", "--mem=0"),
    container=Container("apptainer exec --rocm"),
    notes=("Whole nodes of eight MI300X are assumed: say in a file of your own what yours have.",),
    unverified=UNVERIFIED,
)

LOCAL = Site(
    name="local",
    title="This computer",
    chip=Chip("CPU", ("cpu",), "cpu", None, None, None, None, "measured where it is needed"),
    devices_per_node=1,
    processes_per_node=1,
    cores_per_node=None,
    scheduler="none",
    notes=("No figure of a processor is stated: training measures one at its start, and a plan does without.",),
)
