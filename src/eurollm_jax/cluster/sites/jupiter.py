"""JUPITER Booster, at Forschungszentrum Jülich, Germany."""

from dataclasses import replace

from eurollm_jax.cluster.site import Container, Site
from eurollm_jax.parallel.hardware import CHIPS_BY_NAME, GB

CONFIGURATION = "https://apps.fz-juelich.de/jsc/hps/jupiter/configuration.html"
BATCH = "https://apps.fz-juelich.de/jsc/hps/jupiter/batchsystem.html"
ENVIRONMENT = "https://apps.fz-juelich.de/jsc/hps/jupiter/environment.html"
COURSE = "https://github.com/FZJ-JSC/tutorial-multi-gpu/blob/main/.etc/common-env/jsccourse-bashrc.sh"
AUTOEXP = "https://github.com/OpenEuroLLM/oellm-autoexp/blob/main/config"

JUPITER = Site(
    name="jupiter",
    title="JUPITER Booster",
    chip=replace(CHIPS_BY_NAME["GH200"], name="GH200 (680 W)", watts=680, source=CONFIGURATION),
    devices_per_node=4,
    processes_per_node=4,
    cores_per_node=4 * 72,
    scheduler="slurm",
    node_memory=4 * 120 * 10**9,
    link_bandwidth=3 * 150 * GB,
    network_bandwidth=4 * 25 * GB,
    partition="booster",
    account=True,
    time_limit="12:00:00",
    options=("--gres=gpu:4",),
    step_options=("--gpu-bind=none",),  # all processes of a node see its devices, and take their own
    environment={"NCCL_SOCKET_IFNAME": "ib0", "NCCL_IB_HCA": "mlx5_0,mlx5_1,mlx5_2,mlx5_3"},
    container=Container("apptainer exec --nv", ("/e",)),
    internet="login",
    scratch="$SCRATCH",
    notes=(
        "The processors are Arm (aarch64): build the container on such a machine, a login node for one."
        " docs/sites.md says which of the pinned packages have wheels for it.",
        "$SCRATCH is set by `jutil env activate -p PROJECT`, to be called before the job is submitted.",
        "A GPU's watts here are those of the whole superchip, its processor and memory with it.",
        "Nodes are given whole and cost the same whatever is used of them.",
    ),
    sources={
        "chip": CONFIGURATION,
        "devices_per_node": CONFIGURATION,
        "processes_per_node": COURSE,
        "cores_per_node": CONFIGURATION,
        "node_memory": CONFIGURATION,
        "link_bandwidth": CONFIGURATION,
        "network_bandwidth": CONFIGURATION,
        "partition": COURSE,
        "account": f"{AUTOEXP}/slurm/jupiter.yaml",
        "time_limit": f"{AUTOEXP}/slurm/jupiter.yaml",
        "options": COURSE,
        "step_options": f"{AUTOEXP}/slurm/jupiter.yaml",
        "environment": f"{AUTOEXP}/slurm/jupiter.yaml",
        "container": f"{AUTOEXP}/container/jupiter.yaml",
        "internet": ENVIRONMENT,
    },
    unverified={
        "time_limit": f"read in OpenEuroLLM's configuration and in users' notes on {BATCH}, not on that page itself",
        "nodes": "not on the pages that we read",
        "environment": "as OpenEuroLLM's jobs have it; the names of the adapters were not seen",
        "internet": "read in users' notes on that page, not on the page itself",
        "scratch": "as on the other machines of the centre; JUPITER's page of file systems was not read",
        "storage_bandwidth": "not on the pages that we read",
        "pue": "not on the pages that we read",
        "node_watts": "not on the pages that we read",
    },
)
