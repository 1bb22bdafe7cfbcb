"""Sites against second sources, against each other, and against docs/sites.md, whose tables are written from them.

python tests/cluster/test_sites.py    # writes the tables of docs/sites.md anew
"""

import json
import re
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from eurollm_jax.cluster.site import Container, Site
from eurollm_jax.cluster.site_files import site_of
from eurollm_jax.cluster.sites import SITES
from eurollm_jax.errors import UserError
from eurollm_jax.parallel.hardware import CHIPS, CHIPS_BY_NAME, GIB, Chip, chip_of

DOCUMENT = Path(__file__).parents[2] / "docs" / "sites.md"
DEVICES = """Dense bfloat16 is half of what makers print, where they count products with half of the entries zero.
Memory is what is soldered on; bandwidth and power are at most. The links are to the makers' pages; their figures were
compared with those in copies and tables of others, where the 760 W of the MI300A were **not found**.

"""
BEGIN, END = "<!-- written by tests/cluster/test_sites.py -->\n", "<!-- until here -->\n"
MEASURED = [site for site in SITES if site.chip.bfloat16 is not None]
each_site = pytest.mark.parametrize("site", SITES, ids=lambda site: site.name)

# What docs/sites.md calls each field.
LABELS = {
    "chip": "device",
    "devices_per_node": "devices of a node",
    "processes_per_node": "processes of a node",
    "cores_per_node": "cores of a node",
    "scheduler": "scheduler",
    "node_memory": "memory of a node",
    "nodes": "nodes of a job",
    "link_bandwidth": "a device to its node's others",
    "network_bandwidth": "a node to the network",
    "storage_bandwidth": "a job to the file system",
    "node_watts": "power of a node without devices",
    "pue": "PUE",
    "partition": "partition",
    "qos": "QOS",
    "account": "account needed",
    "time_limit": "time limit",
    "options": "sbatch",
    "step_options": "srun",
    "modules": "modules",
    "environment": "environment",
    "container": "container",
    "internet": "internet",
    "scratch": "scratch",
}
TEXTS = ("name", "title", "notes", "sources", "unverified")


def shown_chip(chip: Chip) -> str:
    parts = [chip.name]
    if chip.bfloat16 is not None:
        parts.append(f"{chip.bfloat16 / 1e12:g} TFLOP/s bfloat16")
    if chip.memory is not None:
        parts.append(f"{chip.memory / GIB:g} GiB")
    if chip.bandwidth is not None:
        parts.append(f"{chip.bandwidth / 1e12:g} TB/s")
    if chip.watts is not None:
        parts.append(f"{chip.watts:g} W")
    return ", ".join(parts)


def shown(name: str, value: object) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case Chip():
            return shown_chip(value)
        case Container():
            binds = f", with {' '.join(f'`{bind}`' for bind in value.binds)}" if value.binds else ""
            return f"`{value.command}`{binds}"
        case tuple():
            return " ".join(f"`{item}`" for item in value) or "none"
        case int() if name == "node_memory":
            return f"{value / GIB:.4g} GiB"
        case float() if name.endswith("_bandwidth"):
            return f"{value / 1e9:g} GB/s"
        case str() if name in ("partition", "qos", "scratch"):
            return f"`{value}`"
        case _:
            return str(value)


def rows(site: Site) -> list[tuple[str, str, str]]:
    """Label, value and source, as the document has them: what is at its default and without a remark is left out."""
    found = []
    for name in LABELS:
        value = getattr(site, name)
        if value is None or (value == default(name) and name not in site.unverified):
            continue
        if name == "environment":
            found += [(name, f"`{key}={text}`", checked(site, f"{name}.{key}")) for key, text in value.items()]
        else:
            found.append((LABELS[name], shown(name, value), checked(site, name)))
    return found


def unknown(site: Site) -> str:
    """Reasons, each with the fields that it is given for."""
    names = {reason: [] for reason in site.unverified.values()}
    for key, reason in site.unverified.items():
        if getattr(site, key.split(".")[0]) is None:
            names[reason].append(LABELS[key])
    return "; ".join(f"{', '.join(labels)} ({reason})" for reason, labels in names.items() if labels)


def checked(site: Site, key: str) -> str:
    whole = key.split(".")[0]
    url = site.sources.get(key, site.sources.get(whole))
    doubt = site.unverified.get(key, site.unverified.get(whole))
    link = f"[{urlsplit(url).netloc}]({url})" if url else ""
    return f"{link}; **not verified**: {doubt}" if link and doubt else f"**not verified**: {doubt}" if doubt else link


def default(name: str) -> object:
    field = next(field for field in fields(Site) if field.name == name)
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default


def section(site: Site) -> str:
    table = ["| what | value | source |", "|---|---|---|"]
    table += [f"| {label} | {value} | {source} |" for label, value, source in rows(site)]
    notes = [f"- {note}\n" for note in site.notes]
    if unknown(site):
        notes.append(f"- Not known: {unknown(site)}.\n")
    return f"## `{site.name}`: {site.title}\n\n" + "\n".join(table) + "\n\n" + "".join(notes)


def devices() -> str:
    table = ["| device | bfloat16, dense | memory | its bandwidth | power | source |", "|---|---|---|---|---|---|"]
    for chip in CHIPS:
        assert None not in (chip.bfloat16, chip.memory, chip.bandwidth, chip.watts)
        cells = [chip.name, f"{chip.bfloat16 / 1e12:g} TFLOP/s", f"{chip.memory / GIB:g} GiB"]
        cells += [f"{chip.bandwidth / 1e12:g} TB/s", f"{chip.watts:g} W"]
        table.append(f"| {' | '.join(cells)} | [{urlsplit(chip.source).netloc}]({chip.source}) |")
    return "## Devices\n\n" + DEVICES + "\n".join(table) + "\n"


def generated() -> str:
    return BEGIN + "\n" + "\n".join([*map(section, SITES), devices()]) + "\n" + END


def test_document_holds_the_values():
    document = DOCUMENT.read_text(encoding="utf-8")
    between = document[document.index(BEGIN) : document.index(END) + len(END)]
    assert between == generated(), "run python tests/cluster/test_sites.py"


@each_site
def test_labels_are_all_fields(site):
    assert [*LABELS, *TEXTS] == sorted([field.name for field in fields(site)], key=[*LABELS, *TEXTS].index)


@each_site
def test_every_value_has_a_source_or_says_that_it_has_none(site):
    if site.name == "local":
        return  # states nothing of a machine
    bare = [
        field.name
        for field in fields(Site)
        if field.name not in (*TEXTS, "scheduler", "internet")
        and getattr(site, field.name) != default(field.name)
        and getattr(site, field.name) is not None
        and not {field.name} & (site.sources.keys() | site.unverified.keys())
    ]
    assert bare == []


@each_site
def test_sources_and_doubts_are_of_fields_that_are_there(site):
    for key in [*site.sources, *site.unverified]:
        name, _, variable = key.partition(".")
        assert name in LABELS
        assert not variable or variable in site.environment
    for key, url in site.sources.items():
        assert re.fullmatch(r"https?://[\w.-]+/\S+", url), key
        assert getattr(site, key.split(".")[0]) is not None, f"a source for {key}, which is not known"
    assert all(site.unverified.values())


@each_site
def test_figures_fit_each_other(site):
    assert site.devices_per_node % site.processes_per_node == 0
    if site.cores_per_node is not None:
        assert site.cores_per_node % site.processes_per_node == 0
    if site.time_limit is not None:
        assert re.fullmatch(r"\d{2}:[0-5]\d:[0-5]\d", site.time_limit)
    if site.link_bandwidth and site.network_bandwidth:
        assert site.link_bandwidth > site.network_bandwidth / site.devices_per_node
    if site.scheduler == "none":
        assert (site.options, site.step_options, site.partition) == ((), (), None)
    counts = [int(found[1]) for option in site.options if (found := re.fullmatch(r"--g\S+[:=](\d+)", option))]
    assert all(count == site.devices_per_node for count in counts)
    if site.scheduler == "slurm":
        assert len(counts) == 1, "one option asks for all devices of a node"


@pytest.mark.parametrize("chip", [*CHIPS, *(site.chip for site in MEASURED)], ids=lambda chip: chip.name)
def test_devices_are_plausible(chip):
    assert chip.source.startswith("http")
    assert chip.memory % (1 << 30) == 0
    if chip.bandwidth is not None:
        assert 10e-3 < chip.memory / chip.bandwidth < 50e-3, "seconds to read all of the memory"
        assert 100 < chip.bfloat16 / chip.bandwidth < 400, "FLOP for each byte of memory"
    if chip.watts is not None:
        assert 0.5e12 < chip.bfloat16 / chip.watts < 2.5e12, "FLOP for each joule"


@each_site
def test_a_sites_device_differs_from_its_makers_in_what_is_its_own(site):
    base = chip_of(site.chip.kinds[0])
    if base is None:
        assert site.chip.backend == "cpu"
    else:
        assert (site.chip.bfloat16, site.chip.backend) == (base.bfloat16, base.backend)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100 40 GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 PCIe 40 GB"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe"),
        ("NVIDIA A100-SXM-64GB", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA GH200 120GB", "GH200"),
        ("AMD Instinct MI250X", "MI250X"),
        ("AMD Instinct MI250X/MI250", "MI250X"),
        ("AMD Instinct MI300X", "MI300X"),
        ("AMD Instinct MI300A", "MI300A"),
        ("cpu", None),
    ],
)
def test_devices_are_known_by_what_jax_calls_them(kind, name):
    chip = chip_of(kind)
    assert (chip and chip.name) == name


def test_memory_is_counted_as_drivers_count_it():
    reported = {"A100 40 GB": 42_405_855_232, "H100": 81_559 << 20, "H200": 143_771 << 20}  # by cudaGetDeviceProperties
    for name, value in reported.items():
        assert 0.98 < value / CHIPS_BY_NAME[name].memory < 1, name


@each_site
def test_nothing_belongs_to_one_user_or_project(site):
    texts = json.dumps([asdict(site)[name] for name in ("environment", "scratch", "container", "options", "modules")])
    assert not re.search(r"/home/|/root|/Users/|project_?\d|ehpc\d|OELLM|jureap|/appl/local|\.sif", texts)
    if site.scratch is not None:
        assert "$" in site.scratch, "a folder of the user who starts it"


def test_lumi_binds_each_process_to_the_cores_beside_its_die():
    lumi = site_of("lumi")
    (option,) = lumi.step_options
    masks = [int(mask, 16) for mask in option.removeprefix("--cpu-bind=mask_cpu:").split(",")]
    # As LUMI's AI guide writes them, and the NUMA node of each die as rocm-smi --showtoponuma prints it there.
    guide = (
        "0x00fe000000000000,0xfe00000000000000,0x0000000000fe0000,0x00000000fe000000,"
        "0x00000000000000fe,0x000000000000fe00,0x000000fe00000000,0x0000fe0000000000"
    )
    assert masks == [int(mask, 16) for mask in guide.split(",")]
    numa = [3, 3, 1, 1, 0, 0, 2, 2]
    taken = 0
    for mask, node in zip(masks, numa, strict=True):
        cores = [core for core in range(64) if mask >> core & 1]
        assert (mask >> 64, mask & taken) == (0, 0)
        assert len(cores) == lumi.cores_per_node // lumi.processes_per_node == 7
        assert {core // 16 for core in cores} == {node}
        assert all(core % 8 for core in cores), "the first core of each eight is the system's"
        taken |= mask


def test_names_are_known_and_near_ones_proposed():
    assert [site_of(site.name) for site in SITES] == list(SITES)
    assert len({site.name for site in SITES}) == len(SITES)
    with pytest.raises(UserError, match=r"leonrdo.*did you mean leonardo"):
        site_of("leonrdo")
    with pytest.raises(UserError, match=r"xyz.*known are lumi.*\.toml"):
        site_of("xyz")


def test_the_documented_file_is_read(tmp_path):
    document = DOCUMENT.read_text(encoding="utf-8")
    name, text = re.search(r"`(\w+)\.toml`.*?```toml\n(.*?)```", document, re.DOTALL).groups()
    path = tmp_path / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    site, base = site_of(str(path)), site_of("generic-nvidia")
    assert (site.name, site.scheduler) == (name, "slurm")
    assert site.chip == replace(CHIPS_BY_NAME["H100"], name="H100 96 GB", memory=96 * GIB, watts=500.0)
    assert (site.devices_per_node, site.processes_per_node, site.cores_per_node) == (4, 4, 96)
    assert (site.network_bandwidth, site.account, site.internet) == (100e9, True, "login")
    assert site.options == ("--gres=gpu:4", "--exclusive", "--mem=0")
    assert site.environment == {"NCCL_SOCKET_IFNAME": "ib0"}
    assert site.container == replace(base.container, binds=("/data",))
    assert site.scratch == "/scratch/$USER"
    assert not {"chip", "container"} & site.unverified.keys()


def toml(value: object) -> str:
    """A JSON text is TOML but for tables."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)


@each_site
def test_a_site_written_out_is_read_back(site, tmp_path):
    table = {key: value for key, value in asdict(site).items() if value is not None}
    table["chip"] = {key: value for key, value in table["chip"].items() if value is not None}
    path = tmp_path / "mine.toml"
    path.write_text(f'based_on = "{site.name}"\n' + "".join(f"{key} = {toml(value)}\n" for key, value in table.items()))
    assert site_of(str(path)) == site


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "based_on is missing.*lumi"),
        ('based_on = "lummi"', "based_on is 'lummi'.*did you mean lumi"),
        ("based_on = 3", "based_on is 3"),
        ('based_on = "lumi', "not TOML"),
        ('based_on = "lumi"\nnode = 4', "node: no such key: did you mean nodes"),
        ('based_on = "lumi"\nnodes = 0', "nodes: 0: expected a whole number of 1 or more"),
        ('based_on = "lumi"\nnodes = true', "nodes: True"),
        ('based_on = "lumi"\nnodes = "4"', "nodes: '4'"),
        ('based_on = "lumi"\nnetwork_bandwidth = -1.0', "network_bandwidth: -1.0: expected a number above 0"),
        ('based_on = "lumi"\nnetwork_bandwidth = nan', "network_bandwidth: nan"),
        ('based_on = "lumi"\nnetwork_bandwidth = inf', "network_bandwidth: inf"),
        ('based_on = "lumi"\npue = 0.9', "pue: 0.9: expected 1 or more"),
        ('based_on = "lumi"\naccount = "yes"', "account: 'yes': expected true or false"),
        ('based_on = "lumi"\ntime_limit = "2 days"', "time_limit: '2 days': expected hours, minutes and seconds"),
        ('based_on = "lumi"\ntime_limit = 24:00:00', "not TOML"),
        ('based_on = "lumi"\ninternet = "some"', "internet: 'some': expected one of everywhere, login, nowhere"),
        ('based_on = "lumi"\nscheduler = "pbs"', "scheduler: 'pbs': expected one of slurm, none"),
        ('based_on = "lumi"\noptions = "--mem=0"', "options: '--mem=0': expected a list of texts"),
        ('based_on = "lumi"\noptions = ["--mem 0"]', "options: '--mem 0': expected one long option"),
        ('based_on = "lumi"\nmodules = [1]', "modules: 1: expected text on one line"),
        ('based_on = "lumi"\npartition = ""', "partition: '': expected text"),
        ('based_on = "lumi"\nenvironment = { "A-B" = "1" }', "environment: 'A-B': not a name"),
        ('based_on = "lumi"\nenvironment = { A = 1 }', r"environment\.A: 1: expected text"),
        ('based_on = "lumi"\nenvironment = ["A=1"]', "environment: .*expected a table"),
        ('based_on = "lumi"\nchip = "H1000"', "chip: 'H1000': no such chip: did you mean H100"),
        ('based_on = "lumi"\nchip = 3', "chip: 3: expected a chip's name, or a table of what differs from MI250X"),
        ('based_on = "lumi"\nchip = { memory = 1.5 }', "chip: memory: 1.5: expected a whole number"),
        ('based_on = "lumi"\nchip = { flops = 1.5 }', "chip: flops: no such key"),
        ('based_on = "lumi"\nchip = { backend = "tpu" }', "chip: backend: 'tpu': expected one of cpu, cuda, rocm"),
        ('based_on = "local"\ncontainer = { binds = [] }', "container: command is missing"),
        ('based_on = "lumi"\ncontainer = "singularity"', "container: 'singularity': expected a table"),
        ('based_on = "lumi"\nprocesses_per_node = 3', "processes_per_node: 3 processes cannot share 8 devices evenly"),
        ('based_on = "lumi"\ncores_per_node = 4', "cores_per_node: 4 is less than one for each process"),
    ],
)
def test_what_a_file_gets_wrong_is_named(text, message, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=rf"mine\.toml: .*{message}"):
        site_of(str(path))


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.toml: cannot be read: No such file"):
        site_of(str(tmp_path / "gone.toml"))
    path = tmp_path / "latin.toml"
    path.write_bytes(b'title = "J\xfclich"')
    with pytest.raises(UserError, match=r"latin\.toml: not UTF-8 at byte 10"):
        site_of(str(path))


if __name__ == "__main__":
    text = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(text[: text.index(BEGIN)] + generated() + text[text.index(END) + len(END) :], encoding="utf-8")
