"""A small corpus in five languages and three scripts, a tokenizer trained on it, and the store prepared from both."""

import os
import tempfile

# Before jax: eight devices, one compilation for all tests and processes that run the same program, and a quick one, for
# most of a test's time is the compiler's.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="eurollm-tests-"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as FastTokenizer

from eurollm_jax.corpus.preparing.prepare import prepare
from eurollm_jax.corpus.store import TokenStore
from eurollm_jax.corpus.tokenizing.tokenizer import Tokenizer
from eurollm_jax.corpus.tokenizing.tokenizer_training import train_tokenizer

DOCUMENTS = 150

SENTENCES = {
    "bg": [
        "Сутринта влакът тръгна от гарата с десет минути закъснение.",
        "Баба ми разказваше, че реката някога замръзвала чак до март.",
        "Купих два хляба, бурканче мед и вестник от ъгъла.",
        "Ученикът попита защо жабите пеят само нощем.",
        "Прозорецът остана отворен и дъждът намокри пода.",
        "Никой не знаеше къде е ключът за мазето.",
        "След работа съседите играят шах под големия орех.",
        "Утре ще поправим покрива, стига времето да е сухо.",
    ],
    "de": [
        "Der Bäcker öffnet um fünf Uhr, obwohl die Straße noch leer ist.",
        "Auf dem Dachboden fanden wir einen Koffer voller Postkarten.",
        "Die Katze schläft am liebsten auf der warmen Heizung.",
        "Übermorgen fährt keine Straßenbahn, weil die Gleise erneuert werden.",
        "Mein Bruder zählt jeden Abend die Sterne über dem Fluss.",
        "Im Garten wachsen Möhren, Zwiebeln und drei große Kürbisse.",
        "Sie schrieb ihren Namen mit Kreide an die Mauer.",
        "Das Wasser im Brunnen schmeckt seit dem Regen nach Eisen.",
    ],
    "el": [
        "Το καράβι έφυγε από το λιμάνι πριν ξημερώσει.",
        "Ο παππούς φύτεψε μια ελιά τη χρονιά που γεννήθηκα.",
        "Στην πλατεία τα παιδιά έπαιζαν ώσπου άναψαν τα φώτα.",
        "Ξέχασα τα γυαλιά μου στο λεωφορείο και γύρισα με τα πόδια.",
        "Η δασκάλα ρώτησε ποιο ποτάμι περνά από την πόλη μας.",
        "Κάθε Κυριακή μυρίζει το σπίτι φρέσκο ψωμί.",
        "Δεν θυμάμαι πού έβαλα το κλειδί της αποθήκης.",
        "Ο άνεμος έσπασε ένα κλαδί από τη συκιά.",
    ],
    "en": [
        "The ferry leaves at noon unless the fog comes in again.",
        "My aunt keeps every button she has ever found in a jar.",
        "Nobody could explain why the clock struck thirteen.",
        "We walked along the canal until the lamps were lit.",
        "The baker sells yesterday's bread for half the price.",
        "A fox crossed the yard and looked back at us once.",
        "They painted the bridge green so that the ducks would not mind.",
        "It rained for six days and on the seventh it snowed.",
    ],
    "mt": [
        "Il-vapur telaq mill-port qabel ma telgħet ix-xemx.",
        "In-nanna dejjem iżżomm ħobż frisk fuq il-mejda.",
        "It-tfal lagħbu fil-pjazza sakemm dalam.",
        "Għada se nżuru lil zijuwi f'Għawdex bil-lanċa.",
        "Il-qattus jorqod ħdejn it-tieqa meta tkun ix-xita.",
        "Ħadd ma kien jaf fejn hi ċ-ċavetta tal-kantina.",
        "Ġibt żewġ kotba mil-librerija u qrajthom f'ġurnata.",
        "Ir-riħ kisser fergħa mis-siġra tal-ħarrub.",
    ],
}


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one .jsonl file a language, 150 different documents each; read it, never write to it."""
    folder = tmp_path_factory.mktemp("corpus")
    for language, sentences in SENTENCES.items():
        dice = Random(language)
        with (folder / f"{language}.jsonl").open("w", encoding="utf-8") as file:
            for number in range(DOCUMENTS):
                chosen = dice.choices(sentences, k=dice.randint(2, 6))
                text = (
                    f"{number}. " + "".join(sentence + dice.choice(["\n", " ", "  "]) for sentence in chosen).rstrip()
                )
                record = {"text": text, "id": f"{language}-{number}", "language": language}
                record |= (
                    {"source": "letters", "licence": "CC0-1.0"}
                    if number % 3
                    else {"source": "diary", "licence": "CC-BY-4.0"}
                )
                record |= {"url": f"https://example.org/{language}/{number}"} if number % 2 else {}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return folder


@pytest.fixture(scope="session")
def tokenizer(corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """640 pieces, trained on all of `corpus_dir`."""
    return train_tokenizer(corpus_dir, tmp_path_factory.mktemp("tokenizer") / "small", vocab_size=640)


@pytest.fixture(scope="session")
def store(corpus_dir: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """All of `corpus_dir`; its sources are bg, de, el, en and mt."""
    return prepare(corpus_dir, tokenizer, tmp_path_factory.mktemp("store") / "small", workers=1)


# Tokenizers as labs publish them, trained on the sentences above. A byte-level one splits text by a pattern like that
# of GPT-4 or Llama 3; one of SentencePiece's kind marks spaces, and writes as bytes what no piece covers.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(special: list[str], added: list[str], normalizer: Any = None) -> FastTokenizer:
    fast = FastTokenizer(models.BPE())
    if normalizer is not None:
        fast.normalizer = normalizer
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    fast.train_from_iterator((line for lines in SENTENCES.values() for line in lines), trainer)
    fast.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    fast.add_tokens([AddedToken(name, special=False, normalized=False) for name in added])
    return fast


def _of_pieces(first: list[str], added: list[str]) -> FastTokenizer:
    """Without what puts a space in front; `first` have the first ids, the bytes the next."""
    learner = FastTokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=500, show_progress=False)
    learner.train_from_iterator((line for lines in SENTENCES.values() for line in lines), trainer)
    model = json.loads(learner.to_str())["model"]
    names = [*first, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"], *added]
    vocab = {name: index for index, name in enumerate(dict.fromkeys(names))}
    fast = FastTokenizer(
        models.BPE(
            vocab, [tuple(pair) for pair in model["merges"]], unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    fast.normalizer = normalizers.Replace(" ", "▁")
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in first])
    fast.add_tokens([AddedToken(name, special=False, normalized=False) for name in added])
    return fast


def _begins_with(fast: FastTokenizer, bos: str) -> Any:
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, fast.token_to_id(bos))]
    )


def _qwen(normalizer: Any) -> tuple[FastTokenizer, dict[str, Any]]:
    chat = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    fast = _byte_level(chat, ["<think>", "</think>"], normalizer)
    named = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_bos_token": False}
    ids = [fast.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>")]
    return fast, {
        "tokenizer_config.json": named | {"chat_template": "{{ messages }}"},
        "generation_config.json": {"bos_token_id": ids[1], "eos_token_id": ids, "top_p": 0.8},
    }


def _llama3() -> tuple[FastTokenizer, dict[str, Any]]:
    fast = _byte_level(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], [])
    fast.model.ignore_merges = True
    template = _begins_with(fast, "<|begin_of_text|>")
    fast.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return fast, {"tokenizer_config.json": {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}}


def _olmo() -> tuple[FastTokenizer, dict[str, Any]]:
    fast = _byte_level(["<|endoftext|>", "<|pad|>"], ["   ", "    "])
    fast.post_processor = processors.ByteLevel(trim_offsets=False)
    mark = {"content": "<|endoftext|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    named = {"bos_token": "<|endoftext|>", "eos_token": mark, "pad_token": "<|pad|>"}
    return fast, {"tokenizer_config.json": {}, "special_tokens_map.json": named}


def _llama2(*, metaspace: bool) -> tuple[FastTokenizer, dict[str, Any]]:
    fast = _of_pieces(["<unk>", "<s>", "</s>"], [])
    if metaspace:
        fast.normalizer = None
        fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.post_processor = _begins_with(fast, "<s>")
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    return fast, {"tokenizer_config.json": named, "config.json": {"eos_token_id": 2, "pad_token_id": 0}}


def _gemma() -> tuple[FastTokenizer, dict[str, Any]]:
    fast = _of_pieces(["<pad>", "<eos>", "<bos>", "<unk>", "<end_of_turn>"], ["▁▁", "\n\n"])
    fast.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    fast.post_processor = _begins_with(fast, "<bos>")
    turn = fast.token_to_id("<end_of_turn>")
    return fast, {
        "tokenizer_config.json": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
        "config.json": {"text_config": {"eos_token_id": [1, turn]}},
    }


@pytest.fixture(scope="session")
def hub_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind -> a folder with the tokenizer files of a model of that kind; read them, never write to them."""
    makers: dict[str, Callable[[], tuple[FastTokenizer, dict[str, Any]]]] = {
        "qwen": lambda: _qwen(normalizers.NFC()),
        "qwen without NFC": lambda: _qwen(None),
        "llama 3": _llama3,
        "olmo": _olmo,
        "llama 2": lambda: _llama2(metaspace=False),
        "mistral": lambda: _llama2(metaspace=True),
        "gemma": _gemma,
    }
    folders = {}
    for kind, make in makers.items():
        folders[kind] = folder = tmp_path_factory.mktemp("hub") / kind.replace(" ", "-")
        folder.mkdir()
        fast, files = make()
        fast.save(str(folder / "tokenizer.json"))
        for name, content in files.items():
            if name == "tokenizer_config.json":
                content = {
                    "tokenizer_class": "PreTrainedTokenizerFast",
                    "clean_up_tokenization_spaces": False,
                    **content,
                }
            (folder / name).write_text(json.dumps(content, indent=1))
    return folders
