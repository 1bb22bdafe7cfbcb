"""MareNostrum 5 ACC, at the Barcelona Supercomputing Center, Spain."""

from dataclasses import replace

from eurollm_jax.cluster.site import Container, Site
from eurollm_jax.parallel.hardware import CHIPS_BY_NAME, GB, GIB, H100

OVERVIEW = "https://www.bsc.es/supportkc/docs/MareNostrum5/overview/"
SLURM = "https://www.bsc.es/supportkc/docs/MareNostrum5/slurm/"
BOOK = "https://jorditorresbcn.github.io/supercomputing-for-ai-book/ch02.html"
AUTOEXP = "https://github.com/OpenEuroLLM/oellm-autoexp/blob/main/config"
SECOND_HAND = "read in a user's transcript of BSC's page, not on the page itself"

MARENOSTRUM5 = Site(
    name="marenostrum5",
    title="MareNostrum 5 ACC",
    chip=replace(CHIPS_BY_NAME["H100"], name="H100 64 GB", memory=64 * GIB, bandwidth=None, watts=None, source=BOOK),
    devices_per_node=4,
    processes_per_node=4,
    cores_per_node=80,
    scheduler="slurm",
    node_memory=512 * GIB,
    nodes=100,
    link_bandwidth=450 * GB,
    network_bandwidth=4 * 25 * GB,
    partition="acc",
    qos="acc_ehpc",
    account=True,
    time_limit="72:00:00",
    options=("--gres=gpu:4", "--exclusive"),
    modules=("singularity",),
    environment={
        "NCCL_SOCKET_IFNAME": "ib0,ib1,ib2,ib3",
        "NCCL_IB_HCA": "mlx5_0,mlx5_1,mlx5_4,mlx5_5",
    },
    container=Container("singularity exec --nv", ("/gpfs",)),
    internet="nowhere",
    scratch="/gpfs/scratch/$(id -gn)/$USER",
    notes=(
        "Nothing inside reaches the internet, login nodes neither: build the image elsewhere and copy it in by scp.",
        "The QOS depends on who granted the time: acc_ehpc for EuroHPC, acc_resa to acc_resc for RES; acc_debug is for"
        " two hours on 8 nodes. `bsc_queues` lists yours; --qos names another.",
        "Each GPU comes with 20 cores: jobs that ask for another ratio are refused.",
        "/gpfs/scratch is wiped of old files: keep checkpoints that you need in /gpfs/projects.",
    ),
    sources={
        "chip": BOOK,
        "devices_per_node": BOOK,
        "processes_per_node": SLURM,
        "cores_per_node": BOOK,
        "node_memory": BOOK,
        "nodes": SLURM,
        "link_bandwidth": H100,
        "network_bandwidth": BOOK,
        "partition": "https://github.com/OpenEuroLLM/clusterenv/blob/main/clusters/marenostrum.sh",
        "qos": SLURM,
        "account": SLURM,
        "time_limit": SLURM,
        "options": SLURM,
        "modules": f"{AUTOEXP}/slurm/marenostrum.yaml",
        "environment": f"{AUTOEXP}/slurm/marenostrum.yaml",
        "container": f"{AUTOEXP}/container/marenostrum.yaml",
        "internet": BOOK,
        "scratch": BOOK,
    },
    unverified={
        "chip": "the peak is that of the 80 GB module; whether this one's clock is lower, its memory's bandwidth and"
        " its power are not on the pages that we read",
        "processes_per_node": SECOND_HAND,
        "nodes": SECOND_HAND,
        "link_bandwidth": "NVIDIA's figure for 18 links; that all of them join the four devices is usual",
        "qos": SECOND_HAND,
        "account": SECOND_HAND,
        "time_limit": SECOND_HAND,
        "options": SECOND_HAND,
        "environment": "as OpenEuroLLM's jobs have it; the names of the adapters were not seen",
        "scratch": "that a user's folder is below that of the primary group is as users' scripts have it",
        "storage_bandwidth": "not on the pages that we read",
        "pue": "not on the pages that we read",
        "node_watts": "not on the pages that we read",
    },
)
