import ast

import pytest

from mlm_jax.data.builtin import builtin_corpus
from mlm_jax.data.corpora import prose
from mlm_jax.data.corpora.docstrings import docstrings, documented, is_prose, marked, paragraphs
from mlm_jax.data.corpora.sources import Package, installed
from mlm_jax.data.indexed import IndexedDataset
from mlm_jax.data.tokenizer import load_tokenizer

NUMPY_STYLE = """
    Compute the **mean** of ``a`` along the axis that `axis` names.

    Return the average of the elements, as :func:`~numpy.average` does.

    .. versionadded:: 1.7

    Parameters
    ----------
    a : array_like
        The numbers whose mean is wanted; an array is made of
        what is none.

        .. note::
            Nothing is returned where nothing was given.

    See Also
    --------
    average : The weighted mean of the numbers that are in an array.

    Notes
    -----
    The mean is the sum of the elements divided by their number::

        some = code_that_is_not_read(at_all)

    >>> mean([1, 2])
    1.5
    """
GOOGLE_STYLE = """Trains a model on the data.

    Args:
      model (nnx.Module): the model that is trained here, which is
        a module of the library.
      data: An iterable.

    Returns:
      The trained model together with what was learned about its metrics.

    - an item of a list

    ```python
    code = "however much it looks like a sentence."
    ```

    ======  ======
    A table of     numbers.
    ======  ======
    """


def cleaned(source: str) -> str:
    return ast.get_docstring(ast.parse(f'class A:\n    """{source}"""').body[0])


def test_paragraphs():
    assert paragraphs(cleaned(NUMPY_STYLE)) == [
        "Compute the mean of `a` along the axis that `axis` names.",
        "Return the average of the elements, as `numpy.average` does.",
        "The numbers whose mean is wanted; an array is made of what is none.",
        "Nothing is returned where nothing was given.",
    ]
    assert paragraphs(cleaned(GOOGLE_STYLE)) == [
        "Trains a model on the data.",
        "The trained model together with what was learned about its metrics.",
    ]


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("a ``b c`` d", "a `b c` d"),
        (":class:`~x.y.Z` and :func:`f <x.f>`", "`x.y.Z` and `f`"),
        ("*all* of **them** 2 * 3 * 4", "all of them 2 * 3 * 4"),
        ("two\n  lines", "two lines"),
    ],
)
def test_markup_is_read(text, read):
    assert marked(text) == read


@pytest.mark.parametrize(
    "text",
    [
        "Too short.",
        "a paragraph that begins with a small letter.",
        "A paragraph that ends with a colon:",
        "A paragraph with `code left over.",
        "A paragraph with an address https://x.org is none.",
        "A paragraph with a x = y formula.",
        "A paragraph with a citation [1]_ in it.",
        "A paragraph (with a parenthesis.",
        "A 1 2 3 4 5 6 7 8 9 10 11 12 list of numbers.",
        "A paragraph with a gap , is none.",
        "Half a character: \ud800 is none.",
    ],
)
def test_what_does_not_read_as_prose(text):
    assert not is_prose(text)


def test_what_reads_as_prose():
    assert is_prose("This reads as prose (doesn't it), for all of the os.path_sep and axis=0.")


@pytest.fixture
def package(tmp_path):
    """Writes files below tmp_path / "pkg"; gives the package."""

    def write(**files: str) -> Package:
        for name, text in files.items():
            file = tmp_path / "pkg" / f"{name.replace('__', '/')}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text + "\n# padding" * 20)
        return Package("pkg", "1.0", "MIT", tmp_path / "pkg")

    return write


MODULE = '''
"""The module."""
class Shown:
    """A class."""
    def method(self): "A method."
def f():
    """A function."""
    def inner(): "No docstring of ours."
async def g(): "Another."
def h(): pass
'''


def test_docstrings_of_a_package(package):
    found = list(docstrings(package(sub__a=MODULE, test_b=MODULE)))
    assert [(d.module, d.name, d.text) for d in found] == [
        ("pkg.sub.a", "", "The module."),
        ("pkg.sub.a", "Shown", "A class."),
        ("pkg.sub.a", "Shown.method", "A method."),
        ("pkg.sub.a", "f", "A function."),
        ("pkg.sub.a", "g", "Another."),
    ]
    assert {d.file for d in found} == {"sub/a.py"}


def test_prose_of_a_package_is_one_document_a_file_without_repetitions(package):
    sentence = "The sentence number {} is long enough to count."
    a = f'"""{sentence.format("one")}\n\n{sentence.format("two")}\n\nThis is short."""'
    b = f'"""{sentence.format("TWO")}"""\ndef f():\n    """{sentence.format("`three`")}"""'
    both = f"{sentence.format('one')}\n\n{sentence.format('two')}\n"
    assert prose.harvest([package(b=b, a=a, c=a)]) == [
        ("pkg/a.py", both),
        ("pkg/b.py", f"{sentence.format('three')}\n"),
    ]


def test_packages_are_found_by_their_metadata(tmp_path, monkeypatch):
    info = tmp_path / "built_in_fake-2.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.4\nName: built-in-fake\nVersion: 2.5\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert list(installed("no-such-thing", "MIT", "nothing")) == []
    found = Package("built-in-fake", "2.5", "MIT", tmp_path / "fake")
    assert list(installed("built-in-fake", "MIT", "fake")) == [found]


def test_what_is_read_here():
    names = [package.name for package in documented()]
    assert names[0] == "Python"
    assert {"numpy", "jax", "flax", "optax", "orbax-checkpoint"} <= {*names}


@pytest.mark.slow
def test_the_prose_has_its_known_size(tmp_path, monkeypatch):
    monkeypatch.setenv("MLM_JAX_CACHE", str(tmp_path))
    found = builtin_corpus("prose", 1024)
    assert (found.kind, found.objective) == ("prose", "causal")
    assert 900 < found.documents < 2000
    assert 1.8e6 < found.train_bytes < 4e6
    assert 0.02 < found.valid_bytes / found.train_bytes < 0.1
    assert "PSF-2.0" in found.licence
    assert "Apache-2.0" in found.licence
    assert 2.0 < found.baselines["xz"] < found.baselines["unigram"] < 3.5
    text = load_tokenizer(found.tokenizer).decode(IndexedDataset(found.valid).tokens(0)[:-1])
    assert text.endswith("\n")
    assert all(map(is_prose, text.strip().split("\n\n")))
