"""Proves that a folder is the model that it should be: `transformers` reads it, alone and offline, and both compute the
same.

A wrong rotary base or a tokenizer that adds a space loads without a word and costs most of the model's quality, so each
part is compared rather than trusted.
"""

import os
from collections.abc import Iterator, Mapping
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
from eurollm_jax.corpus.tokenizing.sentencepiece_tokenizer import SentencePieceTokenizer
from eurollm_jax.corpus.tokenizing.tokenizer import Tokenizer
from eurollm_jax.errors import UserError
from eurollm_jax.hf.families.family import canonical
from eurollm_jax.hf.folder import HASHES_NAME, HubFolder, few, recorded_hashes
from eurollm_jax.hf.load import load
from eurollm_jax.hf.mapping import Weights
from eurollm_jax.model.config import TransformerConfig
from eurollm_jax.model.param import Params, flatten
from eurollm_jax.model.transformer import empty_cache, extend, forward, logits, specs
from eurollm_jax.parallel.mesh import Layout, MeshConfig

LOGITS_TOLERANCE = 2e-4  # between two float32 implementations of the same weights
LOSS_TOLERANCE = 1e-5  # nats per token
LENGTH = 512  # tokens of each text that are compared at most
PROMPT, NEW = 16, 32  # tokens of a text that are continued, and of the continuation

# What tokenizers get wrong: spaces at edges, runs of them, newlines, scripts, rare characters, spelled control tokens.
ODD_STRINGS = (
    *("", " ", "  ", "\n", "\r\n", "\t", " a", "a ", "a  b", "a\n\nb", "\n a", "0123456789", "3,14 €"),
    *("Ελληνικά: ΐ ΰ ς", "Ѐѝ Български език", "Għaż-żmien ħafif", "Šťastný, žluťoučký kůň", "ġ ħ ż ċ", "ქართული ენა"),
    *("Íslenska þæð", "İıŞşĞğ", "ﬁ ﬂ ½", "e\u0301 é", "🙂👩‍👩‍👧🇪🇺", "日本語", "\u00a0\u2009\u200b", "\u2581 \u2581a"),
    *("<s>", "</s> <unk><pad>", "<0x0A>", "\x00\x07"),
)

# Article 1 of the Universal Declaration of Human Rights (United Nations, 1948), for models that bring no texts.
TEXTS = (
    "All human beings are born free and equal in dignity and rights. They are endowed with reason and conscience and "
    "should act towards one another in a spirit of brotherhood.",
    "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt und "
    "sollen einander im Geiste der Brüderlichkeit begegnen.",
    "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison et de "
    "conscience et doivent agir les uns envers les autres dans un esprit de fraternité.",
    "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw. Są oni obdarzeni rozumem i "
    "sumieniem i powinni postępować wobec innych w duchu braterstwa.",
    "'Ολοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα. Είναι προικισμένοι με λογική "
    "και συνείδηση, και οφείλουν να συμπεριφέρονται μεταξύ τους με πνεύμα αδελφοσύνης.",
    "Всички хора се раждат свободни и равни по достойнство и права. Те са надарени с разум и съвест и следва да се "
    "отнасят помежду си в дух на братство.",
)


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison: what was found, and what would have been accepted."""

    check: str
    result: str
    tolerance: str
    ok: bool


def verify(
    folder: Path,
    weights: Weights,
    config: TransformerConfig,
    tokenizer: Tokenizer | None,
    *,
    texts: list[str],
    recorded: Mapping[str, str] | None = None,
) -> list[Row]:
    """Compare the folder with the model that it should hold; the caller fails where a row is not ok.

    Checked are the hashes of the files, the configuration and the weights read back by us (equal to `weights` rounded
    to the folder's dtype), and then against transformers in float32: logits, the likeliest next token and the loss at
    each position of `texts` (their first 512 tokens), greedy continuations by both caches, and the ids of `texts` and
    of odd strings. `recorded` are the hashes that an import took down, for a folder without a list of its own. Without
    a tokenizer the ids are drawn at random. Needs torch and transformers; raises UserError without them.
    """
    if not texts:
        raise ValueError("no texts to compare the models on")
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give one that an export wrote.")
    torch, transformers = require_libraries()
    rows = [_hashes(folder, recorded or {})]
    try:
        hub = HubFolder(folder)
        _, loaded = load(hub, _one_device())
    except UserError as error:
        return [*rows, Row("reads back", str(error), "no error", False)]
    rows.append(_same_config(hub.config, config))
    if _shapes(hub.config) != _shapes(config):
        return [*rows, Row("weights read back", "other names or shapes", "equal", False)]
    rows.append(_same_weights(hub, weights))

    transformers.logging.disable_progress_bar()
    with _offline():
        try:
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                local_files_only=True,
                dtype=torch.float32,
                output_loading_info=True,
                attn_implementation="eager",
            )
            theirs = [] if tokenizer is None else _their_tokenizers(transformers, folder, tokenizer)
        except Exception as error:  # whatever it is, the folder is not what transformers reads
            return [*rows, Row("transformers loads it", f"{type(error).__name__}: {error}", "no error", False)]
    model.generation_config = transformers.GenerationConfig()  # what is likeliest: no end mark, no penalties
    faults = [f"{kind}: {', '.join(map(str, names))}" for kind, names in report.items() if names]
    rows.append(Row("transformers loads it", "; ".join(faults) or "every tensor used", "every tensor used", not faults))

    encoded = _encoded(tokenizer, config, texts)
    ours = _Ours(loaded, replace(config, compute="float32", remat="none"), max(map(len, encoded)))
    rows += _same_function(ours, _Theirs(model, torch), encoded)
    if tokenizer is not None:
        rows.append(_same_ids(tokenizer, theirs, [*ODD_STRINGS, *texts]))
    return rows


def _their_tokenizers(transformers: Any, folder: Path, tokenizer: Tokenizer) -> list[Any]:
    """The tokenizer that has to agree, and those whose differences are only told.

    Of ours, it is the one that AutoTokenizer makes. For an imported one it is the pipeline that tokenizer.json states:
    version 5 of transformers builds that of some classes (LlamaTokenizer) anew from the vocabulary and the merges.
    """
    automatic = transformers.AutoTokenizer.from_pretrained(folder)
    if isinstance(tokenizer, SentencePieceTokenizer):
        return [automatic]
    return [transformers.PreTrainedTokenizerFast.from_pretrained(folder), automatic]


def verify_table(rows: list[Row]) -> Table:
    table = Table("check", "result", "tolerance", "", title="The folder against the model")
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


def _one_device() -> Layout:
    return Layout(MeshConfig().build(jax.devices()[:1]))


def _shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    return {path: spec.shape for path, spec in flatten(specs(config)).items()}


def _encoded(tokenizer: Tokenizer | None, config: TransformerConfig, texts: list[str]) -> list[np.ndarray]:
    """The ids of each text as a document has them, cut to what is compared."""
    length = min(LENGTH, config.max_positions)
    if tokenizer is None:
        dice = np.random.default_rng(0)
        return [dice.integers(0, config.vocab_size, min(64, length), dtype=np.int32) for _ in texts]
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    documents = [np.array([*begin, *tokenizer.encode(text), tokenizer.eos_id], np.int32) for text in texts]
    return [ids[:length] for ids in documents]


def _hashes(folder: Path, imported: Mapping[str, str]) -> Row:
    """Of an export, all of its files and no others; of a folder that was imported, those that were read then."""
    listed = (folder / HASHES_NAME).is_file()
    if not listed and not imported:
        return Row(f"files agree with {HASHES_NAME}", "there is no such list", "all", False)
    recorded = recorded_hashes(folder) if listed else imported
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {HASHES_NAME}
    bad = sorted(present ^ recorded.keys() if listed else recorded.keys() - present)
    bad += [name for name in sorted(present & recorded.keys()) if file_sha256(folder / name) != recorded[name]]
    said = f"differ: {', '.join(bad)}" if bad else f"{len(recorded)} files"
    return Row(f"files agree with {HASHES_NAME if listed else 'the import'}", said, "all", not bad)


def _same_config(loaded: TransformerConfig, config: TransformerConfig) -> Row:
    found, wanted = canonical(loaded), canonical(config)
    names = [name for name in vars(wanted) if getattr(found, name) != getattr(wanted, name)]
    said = [f"{name} is {getattr(found, name)}, not {getattr(wanted, name)}" for name in names]
    return Row("configuration read back", "; ".join(said) or "equal", "equal", not said)


def _same_weights(hub: HubFolder, weights: Weights) -> Row:
    dtype = np.dtype(jnp.dtype(hub.dtype))
    differing = []
    for path, index, value in hub.pieces():
        with np.errstate(over="ignore"):
            expected = weights.read(path, index).astype(dtype).astype(np.float32)
        if not np.array_equal(expected, value):
            differing.append(f"{path}{list(index) or ''}")
    said = f"differ: {few(differing)}" if differing else f"equal in {dtype.name}"
    return Row("weights read back", said, "equal", not differing)


class _Ours:
    """The model as we compute it, on one device in float32."""

    def __init__(self, params: Params, config: TransformerConfig, longest: int) -> None:
        self._params, self._config, self._longest, self._layout = params, config, longest, _one_device()
        self._forward, self._extend = jax.jit(self._all_logits), jax.jit(self._next_logits)

    def logits(self, ids: Int[np.ndarray, "T"]) -> Float[np.ndarray, "T V"]:
        padded = np.pad(ids, (0, self._longest - len(ids)))  # what comes after a token has no effect on it
        return np.asarray(self._forward(self._params, padded))[: len(ids)]

    def greedy(self, prompt: Int[np.ndarray, "T"]) -> tuple[list[int], list[float]]:
        """The likeliest continuation by the cache, and how far each of its tokens was ahead of the next best."""
        cache = empty_cache(1, len(prompt) + NEW, self._config)
        tokens, written, leads = prompt, [], []
        for _ in range(NEW):
            scores, cache = self._extend(self._params, jnp.asarray(tokens)[None], cache)
            best_two = np.sort(np.asarray(scores))[-2:]
            tokens = np.array([int(np.argmax(scores))], np.int32)
            written.append(int(tokens[0]))
            leads.append(float(best_two[1] - best_two[0]))
        return written, leads

    def _all_logits(self, params: Params, tokens: Array) -> Array:
        positions = jnp.arange(self._longest)[None]
        with jax.default_matmul_precision("highest"):  # some GPUs round float32 products to TF32 otherwise
            segments = jnp.ones_like(positions)
            hidden, _ = forward(params, tokens[None], segments, positions, self._config, self._layout)
            return logits(params, hidden, self._config)[0]

    def _next_logits(self, params: Params, tokens: Array, cache: Any) -> tuple[Array, Any]:
        with jax.default_matmul_precision("highest"):
            valid = jnp.full(1, tokens.shape[1])
            hidden, cache = extend(params, tokens, valid, cache, self._config, self._layout)
            return logits(params, hidden[:, -1:], self._config)[0, 0], cache


@dataclass(frozen=True)
class _Theirs:
    """The model as transformers computes it."""

    model: Any
    torch: Any

    def logits(self, ids: Int[np.ndarray, "T"]) -> Float[np.ndarray, "T V"]:
        with self.torch.no_grad():
            found: np.ndarray = self.model(self._tensor(ids)).logits[0].float().numpy()
            return found

    def greedy(self, prompt: Int[np.ndarray, "T"]) -> list[int]:
        ids = self._tensor(prompt)
        with self.torch.no_grad():
            whole = self.model.generate(
                ids,
                attention_mask=self.torch.ones_like(ids),
                max_new_tokens=NEW,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
            )
        found: list[int] = whole[0, len(prompt) :].tolist()
        return found

    def _tensor(self, ids: np.ndarray) -> Any:
        return self.torch.from_numpy(ids.astype(np.int64))[None]


def _same_function(ours: _Ours, theirs: _Theirs, encoded: list[np.ndarray]) -> list[Row]:
    """Logits, next tokens, loss and greedy continuations of both, on the same weights and the same ids, in float32."""
    worst, agree, clear, positions = 0.0, 0, 0, 0
    nats = np.zeros(2)
    for ids in encoded:
        mine, other = ours.logits(ids), theirs.logits(ids)
        worst = float(np.maximum(worst, np.abs(mine - other).max()))  # NaN stays NaN, and fails
        best_two = np.partition(mine, -2, axis=-1)[:, -2:]
        decided = best_two[:, 1] - best_two[:, 0] > 2 * LOGITS_TOLERANCE
        agree += int((mine.argmax(-1) == other.argmax(-1))[decided].sum())
        clear += int(decided.sum())
        positions += len(ids) - 1
        nats += [_nats(mine, ids), _nats(other, ids)]
    mean = nats / max(positions, 1)
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
        _same_continuations(ours, theirs, [ids[:PROMPT] for ids in encoded]),
    ]


def _same_continuations(ours: _Ours, theirs: _Theirs, prompts: list[np.ndarray]) -> Row:
    """Both caches; what follows a tie is not compared."""
    compared, differing = 0, 0
    for prompt in prompts:
        (mine, leads), other = ours.greedy(prompt), theirs.greedy(prompt)
        tie = next((at for at, lead in enumerate(leads) if lead <= 2 * LOGITS_TOLERANCE), NEW)
        compared += tie
        differing += mine[:tie] != other[:tie]
    said = f"{len(prompts) - differing} of {len(prompts)} equal, {compared} tokens"
    return Row("greedy continuations, cached", said, "all, up to ties", not differing and compared > 0)


def _nats(logits: Float[np.ndarray, "T V"], ids: Int[np.ndarray, "T"]) -> float:
    """-log p of each token but the first, summed."""
    wide = logits[:-1].astype(np.float64)
    top = wide.max(-1)
    return float((np.log(np.exp(wide - top[:, None]).sum(-1)) + top - wide[np.arange(len(ids) - 1), ids[1:]]).sum())


def _same_ids(tokenizer: Tokenizer, theirs: list[Any], texts: list[str]) -> Row:
    """Ids with the leading bos, and the text that they give back. What spells a control token is text here."""
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    spelled = [piece.name for piece in tokenizer.pieces if piece.kind == "control"]

    def differing(other: Any) -> list[str]:
        found = []
        for text in texts:
            ids = [*begin, *tokenizer.encode(text).tolist()]
            split = any(name in text for name in spelled)
            said = other(text, split_special_tokens=split, verbose=False)["input_ids"]
            if said != ids or other.decode(ids, skip_special_tokens=True) != tokenizer.decode(np.array(ids)):
                found.append(repr(text[:40]))
        return found

    bad = differing(theirs[0])
    said = f"differ: {', '.join(bad[:5])}" if bad else f"{len(texts)} texts equal"
    for other in theirs[1:]:
        if more := differing(other):
            said += f"; {len(more)} differ in the {type(other).__name__} that transformers builds instead"
    return Row("tokenizer, ids and text back", said, "equal", not bad)
