"""Leonardo Booster, at CINECA in Bologna, Italy."""

from dataclasses import replace

from eurollm_jax.cluster.site import Container, Site
from eurollm_jax.parallel.hardware import CHIPS_BY_NAME, GB, GIB

DOCS = "https://docs.hpc.cineca.it/hpc/leonardo.html"
SYSTEM = "https://leonardo-supercomputer.cineca.eu/hpc-system"
WIKI = "https://wiki.u-gov.it/confluence/display/SCAIUS/LEONARDO+User+Guide"
AUTOEXP = "https://github.com/OpenEuroLLM/oellm-autoexp/blob/main/config"

LEONARDO = Site(
    name="leonardo",
    title="Leonardo Booster",
    chip=replace(
        CHIPS_BY_NAME["A100"],
        name="A100 64 GB (custom)",
        kinds=("A100-SXM-64GB",),
        memory=64 * GIB,
        bandwidth=None,
        watts=None,
        source=SYSTEM,
    ),
    devices_per_node=4,
    processes_per_node=4,
    cores_per_node=32,
    scheduler="slurm",
    node_memory=512 * GIB,
    link_bandwidth=3 * 100 * GB,  # NVLink 3 to each of three others: 200 GB/s, both ways together
    network_bandwidth=50 * GB,
    partition="boost_usr_prod",
    account=True,
    time_limit="24:00:00",
    options=("--gres=gpu:4", "--exclusive", "--mem=0"),
    container=Container("singularity exec --nv", ("/leonardo", "/leonardo_work", "/leonardo_scratch")),
    internet="login",
    scratch="$SCRATCH",
    notes=(
        "Compute nodes reach no network: data, tokenizers and images are fetched on a login node first.",
        "The default QOS is for jobs of moderate size: larger ones take --qos boost_qos_bprod, whose limits"
        " `sacctmgr show qos` names.",
        "$SCRATCH is cleaned of files that have not been used for weeks: keep checkpoints that you need in $WORK.",
    ),
    sources={
        "chip": SYSTEM,
        "devices_per_node": SYSTEM,
        "processes_per_node": f"{AUTOEXP}/slurm/leonardo.yaml",
        "cores_per_node": SYSTEM,
        "node_memory": SYSTEM,
        "link_bandwidth": WIKI,
        "network_bandwidth": SYSTEM,
        "partition": f"{AUTOEXP}/slurm/leonardo.yaml",
        "account": f"{AUTOEXP}/slurm/leonardo.yaml",
        "time_limit": f"{AUTOEXP}/slurm/leonardo.yaml",
        "options": f"{AUTOEXP}/slurm/leonardo.yaml",
        "container": f"{AUTOEXP}/container/leonardo.yaml",
        "internet": f"{AUTOEXP.removesuffix('/config')}/docs/bridge_eval_setup.md",
    },
    unverified={
        "chip": "the peak is that of the A100 that NVIDIA sells; CINECA's has been made for it, and the machine's 309"
        " PFLOP/s of float64 over 13,824 devices are 22.4 TFLOP/s each where that A100 has 19.5: utilisation may"
        " read up to 15 % high. The memory's bandwidth and the power are not on the pages that we read",
        "processes_per_node": "OpenEuroLLM starts one process a node with torchrun in it; ours is one for each device",
        "partition": "read in OpenEuroLLM's configuration; CINECA's page of limits could not be read to its end",
        "time_limit": "as partition",
        "nodes": "CINECA's page of limits could not be read to its end: the scheduler refuses what is too large",
        "options": "--exclusive and --mem=0 are plain Slurm for a whole node; what CINECA advises was not read",
        "scratch": "the variable is CINECA's; its page of file systems was not read",
        "storage_bandwidth": "not on the pages that we read",
        "pue": "not on the pages that we read",
        "node_watts": "not on the pages that we read",
    },
)
