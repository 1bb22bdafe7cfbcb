"""A small corpus in five languages and three scripts, a tokenizer trained on it, and the store prepared from both."""

import os
import tempfile

# Before jax: eight devices, and one compilation for all tests and processes that run the same program.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="eurollm-tests-"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import json
from pathlib import Path
from random import Random

import pytest

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
