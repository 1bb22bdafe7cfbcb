"""Jean Zay's H100 and A100 partitions, at IDRIS in Orsay, France."""

from eurollm_jax.cluster.site import Container, Site
from eurollm_jax.parallel.hardware import A100, CHIPS_BY_NAME, GB, H100

PARTITIONS = "http://www.idris.fr/en/docs/jean-zay/slurm/slurm_partitions_gpu"
A100_SCRIPT = "https://github.com/meteofrance/py4cast/pull/77"
TEMPLATE = "read in users' job scripts that keep the comments of IDRIS's own example; the page was not read so far"
NOT_READ = "not on the pages that we read"
UNVERIFIED = {
    "chip": TEMPLATE,
    "devices_per_node": TEMPLATE,
    "processes_per_node": TEMPLATE,
    "cores_per_node": TEMPLATE,
    "node_memory": NOT_READ,
    "nodes": NOT_READ,
    "link_bandwidth": "NVIDIA's figure for its module; how the devices of a node are joined was not read",
    "network_bandwidth": NOT_READ,
    "storage_bandwidth": NOT_READ,
    "pue": NOT_READ,
    "node_watts": NOT_READ,
    "partition": TEMPLATE,
    "qos": TEMPLATE,
    "account": TEMPLATE,
    "time_limit": TEMPLATE,
    "options": TEMPLATE,
    "modules": TEMPLATE,
    "container": "read in users' job scripts",
    "internet": "read in users' notes",
    "scratch": "read in users' job scripts",
}
NOTES = (
    "An account names the kind of device too: PROJECT@h100 or PROJECT@a100.",
    "Images run from $SINGULARITY_ALLOWED_DIR alone, where `idrcontmgr cp IMAGE` puts them.",
    "$SCRATCH is cleaned of files that have not been used for about 30 days.",
)

JEAN_ZAY_H100 = Site(
    name="jean-zay-h100",
    title="Jean Zay, H100",
    chip=CHIPS_BY_NAME["H100"],
    devices_per_node=4,
    processes_per_node=4,
    cores_per_node=96,
    scheduler="slurm",
    link_bandwidth=450 * GB,
    partition="gpu_p6",
    qos="qos_gpu_h100-t3",
    account=True,
    time_limit="20:00:00",
    options=("--constraint=h100", "--gres=gpu:4", "--hint=nomultithread"),
    modules=("arch/h100", "singularity"),
    container=Container("singularity exec --nv"),
    internet="login",
    scratch="$SCRATCH",
    notes=NOTES,
    sources={"link_bandwidth": H100, "partition": PARTITIONS, "time_limit": PARTITIONS},
    unverified=UNVERIFIED,
)

JEAN_ZAY_A100 = Site(
    name="jean-zay-a100",
    title="Jean Zay, A100",
    chip=CHIPS_BY_NAME["A100"],
    devices_per_node=8,
    processes_per_node=8,
    cores_per_node=64,
    scheduler="slurm",
    link_bandwidth=300 * GB,
    partition="gpu_p5",
    qos="qos_gpu_a100-t3",
    account=True,
    time_limit="20:00:00",
    options=("--constraint=a100", "--gres=gpu:8", "--hint=nomultithread"),
    modules=("arch/a100", "singularity"),
    container=Container("singularity exec --nv"),
    internet="login",
    scratch="$SCRATCH",
    notes=NOTES,
    sources={
        "processes_per_node": A100_SCRIPT,
        "cores_per_node": A100_SCRIPT,
        "link_bandwidth": A100,
        "partition": PARTITIONS,
        "account": A100_SCRIPT,
        "time_limit": PARTITIONS,
        "options": A100_SCRIPT,
    },
    unverified=UNVERIFIED,
)
