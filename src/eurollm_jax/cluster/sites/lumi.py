"""LUMI-G, the GPU partition of LUMI, at CSC in Kajaani, Finland."""

from eurollm_jax.cluster.site import Container, Site
from eurollm_jax.parallel.hardware import CHIPS_BY_NAME, GB, GIB

GUIDE = "https://docs.lumi-supercomputer.eu"
HARDWARE = f"{GUIDE}/hardware/lumig/"
PARTITIONS = f"{GUIDE}/runjobs/scheduled-jobs/partitions/"
EXAMPLES = f"{GUIDE}/runjobs/scheduled-jobs/lumig-job/"
BINDING = f"{GUIDE}/runjobs/scheduled-jobs/distribution-binding/"
COURSE = "https://lumi-supercomputer.github.io/LUMI-training-materials"
CONTAINERS = f"{COURSE}/2day-20260422/205-Containers/"
RCCL = f"{COURSE}/2day-20251020/205-Containers/"
SCALE = "https://github.com/Lumi-supercomputer/Getting_Started_with_AI_workshop/tree/main/09_Extreme_scale_AI"
AI_GUIDE = "https://github.com/Lumi-supercomputer/LUMI-AI-Guide/blob/main/05-multi-gpu-and-node/run_ddp_srun_4.sh"
AUTOEXP = "https://github.com/OpenEuroLLM/oellm-autoexp/blob/main/config/slurm/lumi.yaml"
CQ_SIZE = "https://huggingface.co/datablations/lm1-4b2-84b-c4seeds/blob/main/launch.sh"

# The first of the seven cores beside each GCD, in the order of the GCDs; the core before each is kept for the system.
FIRST_CORES = (49, 57, 17, 25, 1, 9, 33, 41)
MASKS = ",".join(f"{0x7F << first:#x}" for first in FIRST_CORES)

LUMI = Site(
    name="lumi",
    title="LUMI-G",
    chip=CHIPS_BY_NAME["MI250X"],
    devices_per_node=8,
    processes_per_node=8,
    cores_per_node=56,
    scheduler="slurm",
    node_memory=512 * GIB,
    nodes=1024,
    link_bandwidth=300 * GB,  # 200 to the other die of its module, and at least two links of 50 to other modules
    network_bandwidth=4 * 25 * GB,
    storage_bandwidth=240 * GB,
    partition="standard-g",
    account=True,
    time_limit="48:00:00",
    options=("--gpus-per-node=8", "--mem=480G"),
    step_options=(f"--cpu-bind=mask_cpu:{MASKS}",),
    modules=("Local-LAIF", "lumi-aif-singularity-bindings"),
    environment={
        "NCCL_SOCKET_IFNAME": "hsn0,hsn1,hsn2,hsn3",
        "NCCL_NET_GDR_LEVEL": "PHB",
        "HSA_ENABLE_SDMA": "0",
        "FI_CXI_DEFAULT_CQ_SIZE": "131072",
        "MIOPEN_USER_DB_PATH": "/tmp/$USER-miopen-$SLURM_JOB_ID",
        "MIOPEN_CUSTOM_CACHE_DIR": "/tmp/$USER-miopen-$SLURM_JOB_ID",
    },
    container=Container("singularity exec"),
    internet="login",
    scratch="/scratch/$SLURM_JOB_ACCOUNT/$USER",
    notes=(
        "JAX counts each of the two dies (GCDs) of an MI250X as a device: a node has eight.",
        "The container must hold aws-ofi-nccl (once aws-ofi-rccl) and libfabric with the cxi provider, or RCCL goes"
        " over TCP: scripts/containers/rocm.def starts from an image of LUMI's that does. With NCCL_DEBUG=INFO a run's"
        ' log names "NET/OFI" where it is used.',
        "The module lumi-aif-singularity-bindings sets SINGULARITY_BIND: project folders, /appl, what Slingshot needs.",
        "MIOpen's caches are in /tmp: its locks do not work on Lustre.",
    ),
    sources={
        "chip": HARDWARE,
        "devices_per_node": HARDWARE,
        "processes_per_node": EXAMPLES,
        "cores_per_node": BINDING,
        "node_memory": HARDWARE,
        "nodes": PARTITIONS,
        "link_bandwidth": HARDWARE,
        "network_bandwidth": f"{GUIDE}/hardware/network/",
        "storage_bandwidth": f"{GUIDE}/storage/parallel-filesystems/lumip/",
        "partition": PARTITIONS,
        "account": EXAMPLES,
        "time_limit": PARTITIONS,
        "options": AI_GUIDE,
        "step_options": BINDING,
        "modules": CONTAINERS,
        "environment": RCCL,
        "environment.NCCL_NET_GDR_LEVEL": SCALE,
        "environment.HSA_ENABLE_SDMA": AUTOEXP,
        "environment.FI_CXI_DEFAULT_CQ_SIZE": CQ_SIZE,
        "container": AI_GUIDE,
        "internet": "https://github.com/OpenEuroLLM/oellm-autoexp/blob/main/docs/bridge_eval_setup.md",
        "scratch": AI_GUIDE,
    },
    unverified={
        "environment.NCCL_NET_GDR_LEVEL": "another course of LUMI's says that ROCm 6.2 and later no longer need it",
        "environment.HSA_ENABLE_SDMA": "set by OpenEuroLLM's job scripts; LUMI's own pages do not name it",
        "environment.FI_CXI_DEFAULT_CQ_SIZE": "from runs on LUMI in 2023; not tried with its libfabric of 2026",
        "internet": "OpenEuroLLM counts compute nodes as offline; LUMI's AI guide (09) shows a job that reports to a"
        " service outside. Jobs are written as if they were offline",
        "pue": "not on the pages that we read",
        "node_watts": "not on the pages that we read",
    },
)
