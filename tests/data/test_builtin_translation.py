import json
import re
from pathlib import Path

import pytest

from mlm_jax.data.builtin import builtin_corpus
from mlm_jax.data.corpora import translation
from mlm_jax.data.corpora.catalogues import Message, read_catalogue
from mlm_jax.data.corpora.sources import Package, folded, is_held_out
from mlm_jax.data.corpora.translation import catalogue_sizes, harvest, pairs
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
msgstr "Bonjour, %(name)s !"
msgctxt "a name of a month"
msgid "May"
msgstr "mai"

#, fuzzy, python-format
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
msgstr[1] "%d jours"

#~ msgid "Obsolete"
#~ msgstr "Obsolète"

msgid "Missing"
msgstr ""
"""


def test_a_catalogue_is_read(tmp_path):
    file = tmp_path / "django.po"
    file.write_text(CATALOGUE, encoding="utf-8")
    assert read_catalogue(file) == [
        Message("Hello, %(name)s!", None, ("Bonjour, %(name)s !",), None, False),
        Message("May", None, ("mai",), "a name of a month", False),
        Message("See you, %s", None, ("Au revoir, %s",), None, True),
        Message(
            'A long "text"\nwith a tab\tand a back\\slash', None,
            ("Un long « texte »\navec un tab\tet une barre\\oblique",), None, False,
        ),
        Message("%d day", "%d days", ("%d jour", "%d jours"), None, False),
        Message("Missing", None, ("",), None, False),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "line", "wrong"),
    [
        ('msgid "a"\nmsgstr "b"\nmsgfoo "c"\n', 3, "msgfoo"),
        ('msgid "a\nmsgstr "b"\n', 1, "msgid"),
        ('msgid "a"\nmsgstr "b"c"\n', 2, "msgstr"),
        ('\n"a"\n', 2, "a"),
        ("plain text\n", 1, "plain text"),
    ],
)
def test_what_is_no_catalogue_is_refused_by_line(text, line, wrong, tmp_path):
    (tmp_path / "a.po").write_text(text)
    with pytest.raises(DataError, match=rf"a\.po, line {line}: .*{wrong}.* is no line of a \.po"):
        read_catalogue(tmp_path / "a.po")


def test_what_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "a.po").write_bytes(b'msgid "\xff"')
    for name in ("a.po", "b.po"):
        with pytest.raises(DataError, match=rf"{name}: cannot be read as a catalogue"):
            read_catalogue(tmp_path / name)


@pytest.mark.parametrize(
    ("source", "translations", "taken"),
    [
        ("Yes?", ["Oui\u202f?"], [("Yes?", "Oui ?")]),
        (" A\u00a0long\n line ", ["Une longue\n\nligne\n"], [("A long line", "Une longue ligne")]),
        ("caf", ["cafe\u0301"], [("caf", "café")]),
        ("Portal", ["portal!"], []),  # the same letters
        ("Tu", ["ma"], []),  # too little to learn from
        ("Missing", [""], []),
        ("%s is", ["%s est"], [("%s is", "%s est")]),
        ("%(a)s is {b}", ["{b} : %(a)s, %(a)s"], [("%(a)s is {b}", "{b} : %(a)s, %(a)s")]),
        ("%(a)s is", ["%(b)s est"], []),
        ("<b>is</b>", ["<i>est</i>"], []),
        ("12:30", ["12 h 30"], []),
    ],
)
def test_which_pairs_are_taken(source, translations, taken):
    assert list(pairs(Message(source, None, tuple(translations), None, False))) == taken
    assert list(pairs(Message(source, None, tuple(translations), None, True))) == []


def test_a_plural_goes_with_the_last_form():
    forms = ("%d jour", "%d journaux", "%d jours")
    assert list(pairs(Message("%d day", "%d days", forms, None, False))) == [
        ("%d day", "%d jour"),
        ("%d days", "%d jours"),
    ]
    one = Message("%d day", "%d days", ("%d Tag(e)",), None, False)  # a language without plurals
    assert list(pairs(one)) == [("%d day", "%d Tag(e)")]


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
    package = Package("django", "5.2", "BSD-3-Clause", tmp_path / "site" / "django", "django.")
    monkeypatch.setattr(translation, "installed", lambda names: [package])
    return package


def lines(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_pairs_of_a_package(django):
    assert sorted(catalogue_sizes("fr", django.folder)) == [
        "conf/locale/fr/LC_MESSAGES/django.po",
        "conf/locale/fr/LC_MESSAGES/djangojs.po",
    ]
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
    monkeypatch.setattr(translation, "installed", lambda names: [newer])
    assert builtin_corpus("en-fr", 300).train != first.train


def test_without_django_the_remedy_is_named(django, monkeypatch):
    with pytest.raises(DataError, match=r"django: django without its \.po files for 'de'; pip"):
        builtin_corpus("en-de", 300)
    monkeypatch.setattr(translation, "installed", lambda names: [])
    remedy = re.escape("en-de are django's: it is missing; pip install django, or mlm_jax[transl")
    with pytest.raises(DataError, match=remedy):
        builtin_corpus("en-de", 300)


@pytest.mark.smoke
@pytest.mark.parametrize("language", ["fr", "de"])
def test_the_pairs_have_their_known_size(language, tmp_path, monkeypatch):
    pytest.importorskip("django")
    monkeypatch.setenv("MLM_JAX_CACHE", str(tmp_path))
    corpus = builtin_corpus(f"en-{language}", 1024)
    assert 600 < corpus.documents < 8000  # wagtail and sphinx, where they are, have more
    train, valid = lines(corpus.train), lines(corpus.valid)
    assert 0.04 < len(valid) / corpus.documents < 0.2
    assert not {p["source"] for p in train} & {p["source"] for p in valid}
    assert not any("\u00a0" in p["target"] or "\u202f" in p["target"] for p in train + valid)
    assert {"de": "Januar", "fr": "Janvier"}[language] in {p["target"] for p in train + valid}
