"""What JAX's devices of this process are and can do. Imports jax: probe.py alone calls it, in a process of its own."""

import ctypes
import importlib
import math
import os
import pkgutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eurollm_jax.cluster.doctor.finding import Finding, Status, failed, passed, said_by, unchecked, warned
from eurollm_jax.cluster.site import Site
from eurollm_jax.errors import UserError
from eurollm_jax.model.attention import attention_choice, packed_attention
from eurollm_jax.model.config import AttentionKernel, Gated, TransformerConfig
from eurollm_jax.parallel.flags import FLAGS, FRACTION_VARIABLE, JAX_FRACTION, MEMORY_FRACTION
from eurollm_jax.parallel.hardware import Backend, chip_of
from eurollm_jax.parallel.mesh import Layout, MeshConfig

NEWER_VARIABLE = "XLA_CLIENT_MEM_FRACTION"  # jaxlib's newer name of FRACTION_VARIABLE
WINDOWS, WINDOW_SECONDS = 3, 0.3  # of products on one device; the best window counts
MEMORY_SHARE = 0.9  # of what the site's profile says that must be there: drivers and ECC keep some per cent
MODEL = TransformerConfig(
    vocab_size=512, width=512, depth=1, heads=4, kv_heads=2, head_dim=128, max_positions=256, mlp=Gated(512)
)
ERROR = 0.03  # of the largest value: bfloat16 rounds to 2^-9 of a value, several times over in attention


def own_devices() -> list[jax.Device]:
    """Those of this process that are worth a measurement: of a CPU, all are the same cores."""
    return jax.local_devices()[: 1 if jax.default_backend() == "cpu" else None]


def backend_here() -> Backend:
    return _layout().backend


def _layout() -> Layout:
    return Layout(MeshConfig().build(jax.local_devices()[:1]))


def backend_finding(site: Site | None, accelerators: Sequence[Backend], said: Sequence[str]) -> Finding:
    """Whether the backend that came up is the one that is wanted; JAX goes on with the CPU where a plug-in fails.

    Without a site, that of the host's driver is wanted. `said` are the warnings that JAX has logged meanwhile.
    """
    here = backend_here()
    wanted = site.chip.backend if site is not None else next(iter(accelerators), here)
    reasons = [*library_errors(), *said]
    why = f" ({reasons[0][:300]})" if reasons else ""
    if here == wanted:
        broken = [text for text in reasons if "plugin" in text.lower()]
        if broken:
            return warned("backend", f"{here}, though {broken[0][:300]}", "uninstall that plug-in, or mend it")
        return passed("backend", here)
    forced = os.environ.get("JAX_PLATFORMS")
    if forced and here in forced:
        remedy = f"unset JAX_PLATFORMS, which is {forced}"
    elif wanted == "cpu":
        remedy = "choose the site that has these devices, or set JAX_PLATFORMS=cpu"
    elif clash := fractions_clash(os.environ):
        remedy = clash
    else:
        remedy = f'pip install "eurollm_jax[{wanted}]", and see what JAX says where the plug-in is there'
    return failed("backend", f"{here}, and {wanted} is wanted{why}", remedy)


def fractions_clash(environment: Mapping[str, str]) -> str:
    """What to do where both names of the share of memory are set, since jaxlib then takes no GPU; else empty."""
    if environment.get(FRACTION_VARIABLE) and environment.get(NEWER_VARIABLE):
        return f"unset {NEWER_VARIABLE} or {FRACTION_VARIABLE}: jaxlib refuses GPUs where both are set"
    return ""


def library_errors() -> list[str]:
    """What the system says of plug-ins' libraries that cannot be loaded: JAX leaves some of them out without a word."""
    try:
        folders = importlib.import_module("jax_plugins").__path__
    except ImportError:
        return []
    found = []
    for module in pkgutil.iter_modules(folders, "jax_plugins."):
        try:
            plugin = importlib.import_module(module.name)
            library = plugin._get_library_path() if hasattr(plugin, "_get_library_path") else None
            if library is not None:
                ctypes.CDLL(str(library))
        except Exception as error:
            found.append(f"the plugin {module.name}: {said_by(error)}")
    return found


def kind_finding(site: Site) -> Finding:
    """The device's kind against the site's chip, by the table that utilisation is reckoned with."""
    kind = jax.local_devices()[0].device_kind
    if any(part in kind for part in site.chip.kinds):
        return passed("device kind", f"{kind}, as {site.name} says")
    listed = chip_of(kind)
    what = f"{kind}{f' ({listed.name})' if listed and listed.name not in kind else ''}"
    return failed(
        "device kind",
        f"{what}, and {site.name} has {site.chip.name}",
        "ask for the site's partition, or choose another site or a site file: plans and utilisation go by its figures",
    )


def memory_finding(site: Site | None) -> Finding:
    """What JAX may use of each device, and what the device then has, against the site's figure."""
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in own_devices()]
    known = [limit for limit in limits if limit]
    if not known:
        return unchecked("device memory", "the backend does not tell it")
    asked = os.environ.get(FRACTION_VARIABLE) or os.environ.get(NEWER_VARIABLE)
    share = float(asked) if asked else JAX_FRACTION
    least = min(known)
    seen = f"JAX may use {least / 2**30:.1f} GiB, {share:.0%} of {least / share / 2**30:.1f} GiB"
    wanted = site.chip.memory if site is not None else None
    if wanted and least / share < MEMORY_SHARE * wanted:
        return failed(
            "device memory",
            f"{seen}; {site.name if site else ''} has {wanted / 2**30:.1f} GiB",
            "another model of the device, or a part of one: choose another site or a site file",
        )
    if not asked:
        return warned(
            "device memory",
            seen,
            f"export {FRACTION_VARIABLE}={MEMORY_FRACTION}, as the scripts of eurollm launch do: the rest stays idle",
        )
    return passed("device memory", seen)


def flags_finding(backend: Backend, environment: Mapping[str, str]) -> Finding:
    """Which of the flags that we know to matter on a backend are not set, or set otherwise."""
    given = (part.lstrip("-").partition("=") for part in environment.get("XLA_FLAGS", "").split())
    there = {name: value.strip("'\"") for name, _, value in given}
    missing = [flag for flag in FLAGS[backend] if there.get(flag.name) != flag.value]
    if not missing:
        return passed("XLA_FLAGS", environment.get("XLA_FLAGS") or "none set, none needed")
    seen = "; ".join(f"without {flag} ({flag.reason})" for flag in missing)
    return warned("XLA_FLAGS", seen, f'export XLA_FLAGS="$XLA_FLAGS {" ".join(map(str, missing))}"')


# ------------------------------------------------------------------------------------------------------ products


def product_rate(device: jax.Device) -> float:
    """FLOP/s of products of square matrices: bfloat16 on an accelerator, float32 on a CPU, which has few others.

    What is measured is sustained over a window, since a device that is throttled computes at full speed at times. The
    values are random: the power that a product takes depends on them.
    """
    size, kind, times = (512, jnp.float32, 8) if device.platform == "cpu" else (8192, jnp.bfloat16, 4)
    with jax.default_device(device):
        x, y = (jax.random.normal(jax.random.key(seed), (size, size), kind) for seed in (0, 1))
        y = (y / math.sqrt(size)).astype(kind)  # which keeps the size of what it is multiplied with
        products = jax.jit(lambda x, y: jax.lax.fori_loop(0, times, lambda _, x: (x @ y).astype(kind), x))
        products(x, y).block_until_ready()
        return max(_rate(products, x, y) for _ in range(WINDOWS)) * times * 2 * size**3


def _rate(products: Any, x: jax.Array, y: jax.Array) -> float:
    """Calls a second, one after the other, for a window of time: what stops the process in between counts."""
    calls, began = 0, time.perf_counter()
    while (seconds := time.perf_counter() - began) < WINDOW_SECONDS:
        products(x, y).block_until_ready()
        calls += 1
    return calls / seconds


# ----------------------------------------------------------------------------------------------------- attention


def attention_findings() -> list[Finding]:
    """Which implementation of attention a model gets here, and whether it computes what the reference does; on NVIDIA
    GPUs also cuDNN's, which some models get. A broken library shows here."""
    layout = _layout()
    kernel, why = attention_choice(MODEL, layout)
    found = [_attention("attention", kernel, why, layout, "fail")]
    if layout.backend == "cuda" and kernel != "cudnn":
        try:
            attention_choice(replace(MODEL, attention_kernel="cudnn"), layout)
            found.append(_attention("attention by cuDNN", "cudnn", "for models that need it", layout, "warn"))
        except UserError as error:
            found.append(unchecked("attention by cuDNN", str(error)))
        except Exception as error:
            found.append(warned("attention by cuDNN", said_by(error), "install cuDNN anew; other models do without it"))
    return found


def _attention(check: str, kernel: AttentionKernel, why: str, layout: Layout, otherwise: Status) -> Finding:
    """Forward and backward, two packed rows, with heads as EuroLLM has them."""
    dice = np.random.default_rng(0)
    shapes = [(2, 256, heads, 128) for heads in (4, 2, 2, 4)]
    query, key, value, weights = (jnp.asarray(dice.standard_normal(shape), jnp.bfloat16) for shape in shapes)
    segments = jnp.asarray(np.repeat([[1, 2], [1, 1]], 128, axis=1), jnp.int32)

    def attended(kind: AttentionKernel, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        how: dict[str, Any] = dict(window=None, scale=None, cap=None, kernel=kind, layout=layout)
        return packed_attention(query, key, value, segments, **how)

    def both(kind: AttentionKernel, *inputs: jax.Array) -> list[jax.Array]:
        out, back = jax.vjp(lambda *x: attended(kind, *x), *inputs)
        return [out, *back(weights.astype(out.dtype))]

    found = jax.jit(lambda *x: both(kernel, *x))(query, key, value)
    exact = jax.jit(lambda *x: both("reference", *x))(*(x.astype(jnp.float32) for x in (query, key, value)))
    errors = [_error(one, other) for one, other in zip(found, exact, strict=True)]
    names = ("what is attended", "the gradient of queries", "the gradient of keys", "the gradient of values")
    wrong = [f"{name} by {error:.2g}" for name, error in zip(names, errors, strict=True) if not error <= ERROR]
    seen = f"{kernel}: {why}"
    if wrong:
        other = "blockwise" if kernel != "blockwise" else "reference"
        remedy = f"attention_kernel={other!r} in the model until the library is replaced"
        return Finding(check, otherwise, f"{seen}; differs from the reference: {', '.join(wrong)}", remedy)
    return passed(check, f"{seen}; within {max(errors):.2g} of the reference, forward and backward")


def _error(found: jax.Array, exact: jax.Array) -> float:
    """The largest difference, as a share of the largest value; nan where one is not finite."""
    one, other = (np.asarray(x, np.float64) for x in (found, exact))
    return float(np.abs(one - other).max() / np.abs(other).max())
