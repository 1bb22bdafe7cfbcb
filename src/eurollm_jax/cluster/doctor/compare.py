"""What shows only when all processes are looked at together: the odd one out, the slow one, the one whose clock is off.

Pure judgements on what the processes have reported.
"""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence

from eurollm_jax.cluster.doctor.finding import Finding, Report, Status, failed, passed, unchecked, warned
from eurollm_jax.cluster.site import Site
from eurollm_jax.parallel.hardware import chip_of

SLOW = 1.5  # times the usual time of a product: as training/slow_hosts.py
SLOW_ON_CPU = 2.0  # where processes share cores with each other and with whatever else runs
SLOWER = 1.2  # that is said, and no failure: devices of one kind differ by some per cent
SKEW_SECONDS = 1.0  # between the clocks of two processes
NAMED = 6  # processes by name in one line
LOW, TOO_LOW = 0.5, 0.2  # shares of the maker's peak for a product of large matrices

# Facts that may differ without harm to a run, though they should not.
HARMLESS = ("driver",)


def called(report: Report) -> str:
    return f"process {report.process} on {report.host}"


def names_of(reports: Sequence[Report]) -> str:
    """The processes by name, the first of many."""
    if len(reports) == 1:
        return called(reports[0])
    hosts = {report.host for report in reports}
    numbers = ", ".join(str(report.process) for report in reports[:NAMED])
    more = f" and {len(reports) - NAMED} more" if len(reports) > NAMED else ""
    return f"processes {numbers}{more} on {next(iter(hosts)) if len(hosts) == 1 else f'{len(hosts)} hosts'}"


def alike(reports: Sequence[Report]) -> list[Finding]:
    """Each fact that is not the same in all processes, with those that differ from most of them."""
    found = []
    for fact in dict.fromkeys(name for report in reports for name in report.facts):
        values = Counter(report.facts.get(fact, "missing") for report in reports)
        if len(values) == 1:
            continue
        (usual, _), *others = values.most_common()
        odd = [
            f"{names_of([r for r in reports if r.facts.get(fact, 'missing') == value])}: {fact} {value or 'empty'}"
            for value, _ in others
        ]
        seen = f"{'; '.join(odd[:NAMED])}; all others {usual or 'empty'}"
        status: Status = "warn" if fact in HARMLESS else "fail"
        found.append(Finding("processes alike", status, seen, "start all processes from one environment"))
    if not found and len(reports) > 1:
        what = f"{len(reports[0].facts)} versions and settings are the same in all {len(reports)} processes"
        found.append(passed("processes alike", what))
    return found


def all_there(reports: Sequence[Report | None], what: str, seconds: float) -> list[Finding]:
    """The processes that have not told `what` they found in time."""
    silent = [str(process) for process, report in enumerate(reports) if report is None]
    if not silent:
        return []
    which = f"process {silent[0]}" if len(silent) == 1 else f"processes {', '.join(silent[:NAMED])}"
    more = f" and {len(silent) - NAMED} more" if len(silent) > NAMED else ""
    return [
        failed(
            "processes there",
            f"{which}{more} said nothing of {what} within {seconds:g} s",
            "see what that process itself prints; exclude its node if it prints nothing",
        )
    ]


def obstacle(reports: Sequence[Report | None]) -> str:
    """Why devices are not asked for; "" for nothing. Those of all processes wait for each other, and end together."""
    there = [report for report in reports if report is not None]
    if len(there) < len(reports):
        return "not all processes are there"
    without = [r for r in there if not any(f.check == "import of jax" and f.status == "pass" for f in r.findings)]
    if without:
        return f"jax cannot be imported by {names_of(without)}"
    names = dict.fromkeys(name for report in there for name in report.facts if _decides_devices(name))
    differ = [name for name in names if len({report.facts.get(name) for report in there}) > 1]
    return f"processes have different versions of {', '.join(differ)}" if differ else ""


def _decides_devices(distribution: str) -> bool:
    return distribution in ("jax", "jaxlib") or distribution.startswith("jax-")


def device_counts(reports: Sequence[Report], site: Site | None) -> Finding:
    """The devices that the processes of each node have together, against those that the site's profile names.

    Each report measures "devices": how many its process has.
    """
    by_host: Counter[str] = Counter()
    for report in reports:
        by_host[report.host] += int(report.measured["devices"][0])
    kinds = sorted({report.facts.get("device kind", "") for report in reports} - {""})
    total = f"{sum(by_host.values())} × {' and '.join(kinds)} on {len(by_host)} node(s)"
    uneven = len(set(by_host.values())) > 1
    if site is not None and site.scheduler != "none":
        wanted = site.devices_per_node
        fewer = [f"{host} has {count}" for host, count in by_host.items() if count < wanted]
        more = [f"{host} has {count}" for host, count in by_host.items() if count > wanted]
        if fewer:
            return failed(
                "devices",
                f"{site.name} names {wanted} a node, and {', '.join(fewer[:NAMED])}",
                f"ask the scheduler for whole nodes ({' '.join(site.options) or f'{wanted} GPUs a node'}) and start "
                f"{site.processes_per_node} process(es) on each, or write a site file with what there is",
            )
        if more:
            seen = f"{site.name} names {wanted} a node, and {', '.join(more[:NAMED])}"
            return warned("devices", seen, "write a site file with what there is: the rest stays idle or is shared")
    if uneven:
        counts = ", ".join(f"{host} has {count}" for host, count in sorted(by_host.items())[:NAMED])
        return failed(
            "devices", f"not the same on each node: {counts}", "ask the scheduler for whole nodes of one kind"
        )
    return passed("devices", total)


def clocks(reports: Sequence[Report]) -> Finding:
    """Each report measures "clock": seconds that its clock is ahead of process 0's, and how far that may be wrong."""
    if len(reports) < 2:
        return unchecked("clocks", "one process")
    told = [report for report in reports if "clock" in report.measured]
    measured = [(report, report.measured["clock"][0], report.measured["clock"][1]) for report in told]
    certain = {called(report): max(0.0, abs(ahead) - unsure) for report, ahead, unsure in measured}
    off = {name: skew for name, skew in certain.items() if skew > SKEW_SECONDS}
    if off:
        which = ", ".join(f"{name} by {skew:.1f} s at least" for name, skew in list(off.items())[:NAMED])
        remedy = "tell the site's operators: its logs and files do not tell what came first, and tickets may expire"
        return failed("clocks", f"differ from process 0's: {which}", remedy)
    widest = max((abs(ahead) + unsure for _, ahead, unsure in measured), default=0.0)
    return passed("clocks", f"within {widest * 1e3:.3g} ms of process 0's")


def products(reports: Sequence[Report]) -> Finding:
    """The rate of a large matrix product on each device, against the others' and against the maker's figure.

    Each report measures "products": FLOP/s of each of its devices.
    """
    rates = [
        (f"{called(report)}, device {device}", rate, report.facts.get("device kind", ""))
        for report in reports
        for device, rate in enumerate(report.measured.get("products", ()))
    ]
    if not rates:
        return unchecked("products", "no device has computed")
    usual = statistics.median_high(rate for _, rate, _ in rates)
    kind = rates[0][2]
    chip = chip_of(kind)
    bound, noted = (SLOW_ON_CPU, SLOW_ON_CPU) if reports[0].facts.get("backend") == "cpu" else (SLOW, SLOWER)
    seen = f"{_teraflops(usual)} as a rule over {len(rates)} device(s)"
    if len(rates) > 1:
        seen += f", {_teraflops(min(rate for _, rate, _ in rates))} to {_teraflops(max(rate for _, rate, _ in rates))}"
    peak = chip.bfloat16 if chip is not None else None
    if peak:
        seen += f"; {usual / peak:.0%} of the {peak / 1e12:g} TFLOP/s that its maker states for a {chip_name(kind)}"
    slow = {name: usual / rate for name, rate, _ in rates if rate * bound < usual}
    slower = {name: usual / rate for name, rate, _ in rates if rate * noted < usual}
    if slow:
        return failed(
            "products", f"{_times(slow)} of {seen}", "exclude that node, or see what else uses it and its heat"
        )
    if peak and usual < TOO_LOW * peak:
        return failed(
            "products", seen, "look at clock rates and power limits, and whether other programs compute there"
        )
    if slower:
        return warned("products", f"{_times(slower)} of {seen}", "all wait for it: look at its clock rate and its heat")
    if peak and usual < LOW * peak:
        return warned("products", seen, "look at clock rates and power limits: half of the peak is usual")
    return passed("products", seen)


def chip_name(kind: str) -> str:
    chip = chip_of(kind)
    return kind if chip is None else chip.name


def _times(slow: Mapping[str, float]) -> str:
    most = sorted(slow.items(), key=lambda one: -one[1])[:NAMED]
    more = f" and {len(slow) - NAMED} more" if len(slow) > NAMED else ""
    return f"{'; '.join(f'{name} is at {1 / times:.0%}' for name, times in most)}{more}"


def _teraflops(rate: float) -> str:
    return f"{rate / 1e12:.3g} TFLOP/s"
