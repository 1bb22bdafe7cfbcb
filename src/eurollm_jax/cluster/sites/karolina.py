"""Karolina's GPU nodes, at IT4Innovations in Ostrava, Czechia."""

from eurollm_jax.cluster.site import Container, Site
from eurollm_jax.parallel.hardware import A100, CHIPS_BY_NAME, GB

POLICY = "https://docs.it4i.cz/general/resources-allocation-policy/"
OLD_POLICY = (
    "https://code.it4i.cz/sccs/docs.it4i.cz/-/blob/a89d3a19fad4c5e68a9bf6f58f1b6291f512b275"
    "/docs.it4i/general/resources-allocation-policy.md"
)
ACCOUNTING = "https://docs.it4i.cz/en/docs/general/run-jobs/resource-allocation/resource-accounting"

KAROLINA = Site(
    name="karolina",
    title="Karolina, GPU nodes",
    chip=CHIPS_BY_NAME["A100 40 GB"],
    devices_per_node=8,
    processes_per_node=8,
    cores_per_node=128,
    scheduler="slurm",
    nodes=16,
    link_bandwidth=300 * GB,
    partition="qgpu",
    account=True,
    time_limit="48:00:00",
    options=("--gpus-per-node=8",),
    container=Container("apptainer exec --nv"),
    internet="login",
    scratch="/scratch/project/$SLURM_JOB_ACCOUNT/$USER",
    notes=(
        "A job of more than 16 nodes goes to --partition qgpu_big.",
        "The project's head asks support once that its users may use qgpu.",
    ),
    sources={
        "chip": POLICY,
        "devices_per_node": ACCOUNTING,
        "cores_per_node": POLICY,
        "nodes": POLICY,
        "link_bandwidth": A100,
        "partition": POLICY,
        "account": POLICY,
        "time_limit": OLD_POLICY,
    },
    unverified={
        "chip": "the page says eight A100 with 320 GB together; that they are SXM4 modules was not read",
        "processes_per_node": "one for each device; the pages that we read do not say",
        "node_memory": "not on the pages that we read",
        "link_bandwidth": "NVIDIA's figure for its SXM4 module; how the devices of a node are joined was not read",
        "network_bandwidth": "not on the pages that we read",
        "storage_bandwidth": "not on the pages that we read",
        "pue": "not on the pages that we read",
        "node_watts": "not on the pages that we read",
        "time_limit": "of the queue qnvidia, which came before qgpu",
        "options": "plain Slurm; the site's examples were not read",
        "container": "which of the two runtimes is there was not read",
        "internet": "not read: jobs are written as if compute nodes were offline",
        "scratch": "the folder of a project; its exact name was not read",
    },
)
