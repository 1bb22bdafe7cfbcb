"""Proves that an exported folder is the model that was trained: `transformers` reads it, alone and offline, and both
compute the same.

A wrong rotary base or a tokenizer that adds a space loads without a word and costs most of the model's quality, so each
part is compared rather than trusted.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from rich.table import Table

from eurollm_jax.corpus.folders import file_sha256
from eurollm_jax.corpus.tokenizing.tokenizer import Tokenizer
from eurollm_jax.errors import UserError
from eurollm_jax.hf.export import HASHES_NAME, recorded_hashes
from eurollm_jax.hf.load import load, read_object
from eurollm_jax.hf.mapping import CONFIG_NAME
from eurollm_jax.model.param import Params, flatten
from eurollm_jax.model.transformer import TransformerConfig, forward, logits
from eurollm_jax.parallel.mesh import Layout, MeshConfig

LOGITS_TOLERANCE = 1e-4  # between two float32 implementations of the same weights
LOSS_TOLERANCE = 1e-5  # nats per token
LENGTH = 512  # tokens of each text that are compared at most

# What tokenizers get wrong: spaces at edges, runs of them, newlines, scripts, rare characters, spelled control tokens.
ODD_STRINGS = (
    *("", " ", "  ", "\n", "\r\n", "\t", " a", "a ", "a  b", "a\n\nb", "\n a", "0123456789", "3,14 €"),
    *("Ελληνικά: ΐ ΰ ς", "Ѐѝ Български език", "Għaż-żmien ħafif", "Šťastný, žluťoučký kůň", "ġ ħ ż ċ", "ქართული ენა"),
    *("Íslenska þæð", "İıŞşĞğ", "ﬁ ﬂ ½", "e\u0301 é", "🙂👩‍👩‍👧🇪🇺", "日本語", "\u00a0\u2009\u200b", "\u2581 \u2581a"),
    *("<s>", "</s> <unk><pad>", "<0x0A>", "\x00\x07"),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison: what was found, and what would have been accepted."""

    check: str
    result: str
    tolerance: str
    ok: bool


def verify(
    folder: Path, params: Params, config: TransformerConfig, tokenizer: Tokenizer, *, texts: list[str]
) -> list[Row]:
    """Compare the folder with the model that it should hold; the caller fails where a row is not ok.

    Checked are the hashes of the files, the configuration and the weights read back by us (equal to `params` rounded to
    the folder's dtype), and then against transformers in float32: logits, the likeliest next token and the loss at each
    position of `texts` (their first 512 tokens), and the ids of `texts` and of odd strings. Needs torch and
    transformers; raises UserError without them.
    """
    if not texts:
        raise ValueError("no texts to compare the models on")
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give one that an export wrote.")
    torch, transformers = require_libraries()
    rows = [_hashes(folder)]
    try:
        loaded_config, loaded = load(folder)
        dtype = jnp.dtype(read_object(folder / CONFIG_NAME).get("dtype"))
    except UserError as error:
        return [*rows, Row("reads back", str(error), "no error", False)]
    rows += [_same_config(loaded_config, config), _same_weights(loaded, params, dtype)]

    transformers.logging.disable_progress_bar()
    with _offline():
        try:
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
            )
            theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # whatever it is, the folder is not what transformers reads
            return [*rows, Row("transformers loads it", f"{type(error).__name__}: {error}", "no error", False)]
    faults = [f"{kind}: {', '.join(map(str, names))}" for kind, names in report.items() if names]
    rows.append(Row("transformers loads it", "; ".join(faults) or "every tensor used", "every tensor used", not faults))

    def their_logits(ids: Int[np.ndarray, "T"]) -> Float[np.ndarray, "T V"]:
        with torch.no_grad():
            return model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].numpy()

    encoded = [np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id], np.int32) for text in texts]
    encoded = [ids[: min(LENGTH, config.max_positions)] for ids in encoded]
    rows += _same_function(loaded, config, encoded, their_logits)
    rows.append(_same_ids(tokenizer, theirs, [*ODD_STRINGS, *texts]))
    return rows


def verify_table(rows: list[Row]) -> Table:
    table = Table("check", "result", "tolerance", "", title="The export against the model")
    for row in rows:
        table.add_row(row.check, row.result, row.tolerance, "[green]ok[/]" if row.ok else "[bold red]FAILED[/]")
    return table


def require_libraries() -> tuple[Any, Any]:
    try:
        with _offline():
            import torch
            import transformers
    except ImportError as error:
        raise UserError(
            f"the export cannot be verified, since torch and transformers do not import ({error}): "
            "install the extra `verify`, in a clone: .venv/bin/uv pip install -c constraints.txt -e '.[verify]'"
        ) from None
    return torch, transformers


@contextmanager
def _offline() -> Iterator[None]:
    """Nothing may come from the network: the folder has to stand alone."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before


def _hashes(folder: Path) -> Row:
    recorded = recorded_hashes(folder) if (folder / HASHES_NAME).is_file() else {}
    present = {file.name for file in folder.iterdir()} - {HASHES_NAME}
    bad = sorted(present ^ recorded.keys())
    bad += [name for name in sorted(present & recorded.keys()) if file_sha256(folder / name) != recorded[name]]
    said = f"differ: {', '.join(bad)}" if bad else f"{len(recorded)} files"
    return Row(f"files agree with {HASHES_NAME}", said, "all", not bad)


def _same_config(loaded: TransformerConfig, config: TransformerConfig) -> Row:
    loaded = replace(loaded, compute=config.compute, remat=config.remat)  # not part of the model, so not in the file
    names = [name for name in vars(config) if getattr(loaded, name) != getattr(config, name)]
    said = [f"{name} is {getattr(loaded, name)}, not {getattr(config, name)}" for name in names]
    return Row("configuration read back", "; ".join(said) or "equal", "equal", not said)


def _same_weights(loaded: Params, params: Params, dtype: np.dtype) -> Row:
    ours, theirs = flatten(params), flatten(loaded)
    if ours.keys() != theirs.keys():
        return Row("weights read back", f"other weights: {sorted(ours.keys() ^ theirs.keys())}", "equal", False)
    differing = [
        path
        for path, value in theirs.items()
        if not np.array_equal(np.asarray(ours[path]).astype(dtype).astype(np.float32), value)
    ]
    said = f"differ: {', '.join(differing)}" if differing else f"equal in {dtype.name}"
    return Row("weights read back", said, "equal", not differing)


def _same_function(
    params: Params, config: TransformerConfig, encoded: list[np.ndarray], their_logits: Any
) -> list[Row]:
    """Logits, next tokens and loss of both, on the same weights and the same ids, in float32."""
    ours = replace(config, compute="float32", remat="none")
    layout = Layout(MeshConfig().build(jax.devices()[:1]))
    longest = max(map(len, encoded))

    @jax.jit
    def our_logits(params: Params, tokens: Array) -> Array:
        positions = jnp.arange(longest)[None]
        with jax.default_matmul_precision("highest"):  # some GPUs round float32 products to TF32 otherwise
            hidden = forward(params, tokens[None], jnp.ones_like(positions), positions, ours, layout)
            return logits(params, hidden, ours)[0]

    worst, agree, clear, positions = 0.0, 0, 0, 0
    nats = np.zeros(2)
    for ids in encoded:
        padded = np.pad(ids, (0, longest - len(ids)))  # what comes after a token has no effect on it
        mine, other = np.asarray(our_logits(params, padded))[: len(ids)], their_logits(ids)
        worst = float(np.maximum(worst, np.abs(mine - other).max()))  # NaN stays NaN, and fails
        best_two = np.partition(mine, -2, axis=-1)[:, -2:]
        decided = best_two[:, 1] - best_two[:, 0] > 2 * LOGITS_TOLERANCE
        agree += int((mine.argmax(-1) == other.argmax(-1))[decided].sum())
        clear += int(decided.sum())
        positions += len(ids) - 1
        nats += [_nats(mine, ids), _nats(other, ids)]
    mean = nats / positions
    gap = float(abs(mean[0] - mean[1]))
    return [
        Row("logits, float32", f"max difference {worst:.1e}", f"{LOGITS_TOLERANCE:.0e}", worst <= LOGITS_TOLERANCE),
        Row("likeliest next token", f"{agree} of {clear} equal", "all but ties", agree == clear),
        Row(
            "loss on text, nats per token",
            f"{mean[0]:.6f} here, {mean[1]:.6f} there",
            f"{LOSS_TOLERANCE:.0e}",
            gap <= LOSS_TOLERANCE,
        ),
    ]


def _nats(logits: Float[np.ndarray, "T V"], ids: Int[np.ndarray, "T"]) -> float:
    """-log p of each token but the first, summed."""
    wide = logits[:-1].astype(np.float64)
    top = wide.max(-1)
    return float((np.log(np.exp(wide - top[:, None]).sum(-1)) + top - wide[np.arange(len(ids) - 1), ids[1:]]).sum())


def _same_ids(tokenizer: Tokenizer, theirs: Any, texts: list[str]) -> Row:
    """Ids with the leading bos, and the text that they give back. What spells a control token is text here."""
    spelled = [piece.name for piece in tokenizer.pieces if piece.kind == "control"]
    differing = []
    for text in texts:
        ids = [tokenizer.bos_id, *tokenizer.encode(text).tolist()]
        found = theirs(text, split_special_tokens=any(name in text for name in spelled), verbose=False)["input_ids"]
        if found != ids or theirs.decode(ids, skip_special_tokens=True) != text:
            differing.append(repr(text[:40]))
    said = f"differ: {', '.join(differing[:5])}" if differing else f"{len(texts)} texts equal"
    return Row("tokenizer, ids and text back", said, "equal", not differing)
