import json
import re
from pathlib import Path

import pytest

from mlm_jax.data.builtin import builtin_corpus
from mlm_jax.data.corpora import translation
from mlm_jax.data.corpora.sources import Package, folded, is_held_out
from mlm_jax.data.corpora.translation import catalogues, fit, harvest, read_catalogue
from mlm_jax.data.tokenizer import load_tokenizer
from mlm_jax.errors import DataError

CATALOGUE = r"""# A comment of the translator
msgid ""
msgstr ""
"Language: fr\n"

#. of the author
#: views.py:12
#, python-format
msgid "Hello, %(name)s!"
msgstr "Bonjour, %(name)s\u202f!"

msgctxt "a name of a month"
msgid "May"
msgstr "mai"

#, python-format, fuzzy
#| msgid "Bye, %s"
msgid "See you, %s"
msgstr "Au revoir, %s"

msgid ""
"A long \"text\"\n"
"with a tab\tand a back\\slash"
msgstr ""
"Un long « texte »\n"
"avec un tab\tet une barre\\oblique"

#, python-format
msgid "%d day"
msgid_plural "%d days"
msgstr[0] "%d jour"
msgstr[1] "%d journaux"
msgstr[2] "%d jours"

#~ msgid "Obsolete"
#~ msgstr "Obsolète"

msgid "Missing"
msgstr ""
"""


def test_a_catalogue_is_read(tmp_path):
    file = tmp_path / "django.po"
    file.write_text(CATALOGUE.replace(r"\u202f", "\u202f"), encoding="utf-8")
    assert list(read_catalogue(file)) == [
        ("", "Language: fr"),
        ("Hello, %(name)s!", "Bonjour, %(name)s !"),
        ("May", "mai"),
        ('A long "text" with a tab and a back\\slash',
         "Un long « texte » avec un tab et une barre\\oblique"),
        ("%d day", "%d jour"),
        ("%d days", "%d jours"),
        ("Missing", ""),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "target", "taken"),
    [
        ("%s is", "%s est", True),
        ("Portal", "portal!", False),  # the same letters
        ("Tu", "ma", False),  # too little to learn from
        ("Missing", "", False),
        ("", "Language: fr", False),
    ],
)
def test_which_pairs_are_taken(source, target, taken):
    assert fit(source, target) is taken


def entry(source: str, target: str) -> str:
    return f'msgid "{source}"\nmsgstr "{target}"\n\n'


@pytest.fixture
def django(tmp_path, monkeypatch):
    """A package of this name with 120 messages in French, and an empty cache."""
    words = [a + b for a in ("ar", "be", "co", "di") for b in "abcdefghijklmnopqrstuvwxyzäöüß"]
    folder = tmp_path / "site" / "django" / "conf" / "locale" / "fr" / "LC_MESSAGES"
    folder.mkdir(parents=True)
    messages = [entry(f"The {word} of %s", f"Le {word}e de %s") for word in words]
    (folder / "django.po").write_text("".join(messages), encoding="utf-8")
    again = [entry("the ara of %s.", "L'ara de %s."), entry("The ara of %s", "Le arae de %s")]
    again += [entry("A <|fr|> text", "Un texte <|fr|>")]
    (folder / "djangojs.po").write_text("".join(again), encoding="utf-8")
    monkeypatch.setenv("MLM_JAX_CACHE", str(tmp_path / "cache"))
    package = Package("django", "5.2", "BSD-3-Clause", tmp_path / "site" / "django")
    monkeypatch.setattr(translation, "installed", lambda *names: iter([package]))
    return package


def lines(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_pairs_of_a_package(django):
    assert [file.name for file in catalogues("fr", django)] == ["django.po", "djangojs.po"]
    found = harvest("fr", [django])
    assert found[0] == ("thearaofs", {"source": "The ara of %s", "target": "Le arae de %s"})
    assert len(found) == 122  # not the one that is there twice
    assert found[-2].source == found[0].source  # so that both are held out, or none


def test_the_corpus_is_written_as_pairs(django):
    corpus = builtin_corpus("en-fr", 300)
    assert (corpus.objective, corpus.documents, corpus.baselines) == ("pairs", 121, {})
    assert corpus.licence == "django 5.2: BSD-3-Clause"
    train, valid = lines(corpus.train), lines(corpus.valid)
    assert len(train) + len(valid) == 121
    assert 4 < len(valid) < 25
    assert not any(is_held_out(folded(pair["source"]), 10) for pair in train)
    assert all(is_held_out(folded(pair["source"]), 10) for pair in valid)
    text = "".join(pair["source"] + pair["target"] for pair in valid)
    assert len(text.encode()) == corpus.valid_bytes
    tokenizer = load_tokenizer(corpus.tokenizer)
    tags = [tokenizer.id_of(tag) for tag in ("<|endoftext|>", "<|en|>", "<|fr|>")]
    assert tags == [0, 1, 2]
    assert tokenizer.eod_id == 0


def test_another_version_is_another_corpus(django, monkeypatch):
    first = builtin_corpus("en-fr", 300)
    assert builtin_corpus("en-fr", 300) == first
    newer = django._replace(version="5.3")
    monkeypatch.setattr(translation, "installed", lambda *names: iter([newer]))
    assert builtin_corpus("en-fr", 300).train != first.train


def test_without_django_the_remedy_is_named(django, monkeypatch):
    with pytest.raises(DataError, match=r"en-de are in django's \.po files: .*site/django; pip"):
        builtin_corpus("en-de", 300)
    monkeypatch.setattr(translation, "installed", lambda *names: iter([]))
    remedy = re.escape("files: not installed; pip install django, or mlm_jax[translation]")
    with pytest.raises(DataError, match=remedy):
        builtin_corpus("en-de", 300)


@pytest.mark.smoke
@pytest.mark.parametrize("language", ["fr", "de"])
def test_the_pairs_have_their_known_size(language, tmp_path, monkeypatch):
    pytest.importorskip("django")
    monkeypatch.setenv("MLM_JAX_CACHE", str(tmp_path))
    corpus = builtin_corpus(f"en-{language}", 1024)
    assert 600 < corpus.documents < 1500
    train, valid = lines(corpus.train), lines(corpus.valid)
    assert 0.04 < len(valid) / corpus.documents < 0.2
    assert not {p["source"] for p in train} & {p["source"] for p in valid}
    assert not any("\u00a0" in p["target"] or "\u202f" in p["target"] for p in train + valid)
    assert {"de": "Januar", "fr": "Janvier"}[language] in {p["target"] for p in train + valid}
