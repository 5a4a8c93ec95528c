import ast

import pytest

from mlm_jax.data.builtin import builtin_corpus
from mlm_jax.data.corpora import docstrings as corpus
from mlm_jax.data.corpora import prose
from mlm_jax.data.corpora.docstrings import docstrings, documented, documented_sizes
from mlm_jax.data.corpora.rest import blocks, is_prose, paragraphs, plain
from mlm_jax.data.corpora.sources import Package, installed
from mlm_jax.data.indexed import IndexedDataset
from mlm_jax.data.tokenizer import load_tokenizer

NUMPY_STYLE = """
    Compute the **mean** of ``a`` along the axis that `axis` names [1]_.

    Return the average of the elements, as :func:`~numpy.average` does.

    .. versionadded:: 1.7
       This text belongs to a directive that nobody wants to read here.

    Parameters
    ----------
    a : array_like
        The numbers whose mean is wanted; an array is made of what is none.
    axis : int, optional
        Which axis

    Returns
    -------
    m : ndarray
        A new array that holds the mean values of all of the numbers.

        .. note::
            Nothing is returned where nothing was given to the function.

    See Also
    --------
    average : The weighted mean of the numbers that are in an array.

    Notes
    -----
    The mean is the sum of the elements divided by their number::

        some = code_that_is_not_read(at_all)

    It is the same as what the function `sum` gives, divided.

    Examples
    --------
    This paragraph introduces an example that shall not be read.

    >>> mean([1, 2])
    1.5
    """
GOOGLE_STYLE = """Trains a model on the data that is given to it.

    Args:
      model (nnx.Module): the model that is trained here, which is
        a module of the library in its newer version.
      *rest: short.
      data: An iterable.

    Returns:
      The trained model together with what was learned about its metrics.

    Raises:
      ValueError: If the data that was given has no batch at all.

    Note:
      The model is changed in place and must not be used meanwhile.

      - The first item of this list is a whole sentence here.
      - second item

    ```python
    This line is code, however much it may look like a sentence.
    ```

    ======  ======
    A table of     numbers that has nothing in it to be read here.
    ======  ======
    """


def cleaned(source: str) -> str:
    return ast.get_docstring(ast.parse(f'class A:\n    """{source}"""').body[0])


def test_paragraphs_of_numpy_style():
    assert paragraphs(cleaned(NUMPY_STYLE)) == [
        "Compute the mean of a along the axis that axis names.",
        "Return the average of the elements, as average does.",
        "The numbers whose mean is wanted; an array is made of what is none.",
        "A new array that holds the mean values of all of the numbers.",
        "Nothing is returned where nothing was given to the function.",
        "It is the same as what the function sum gives, divided.",
    ]


def test_paragraphs_of_google_style():
    assert paragraphs(cleaned(GOOGLE_STYLE)) == [
        "Trains a model on the data that is given to it.",
        "The model that is trained here, which is a module of the library in its newer version.",
        "The trained model together with what was learned about its metrics.",
        "The model is changed in place and must not be used meanwhile.",
        "The first item of this list is a whole sentence here.",
    ]


def test_descriptions_of_arguments_can_be_left_out():
    of_args = list(blocks(cleaned(GOOGLE_STYLE), {"args", "returns"}))
    assert of_args[0] == "Trains a model on the data that is given to it."
    assert not any("that is trained here" in b or "together" in b for b in of_args)
    assert any("changed in place" in b for b in of_args)


@pytest.mark.parametrize(
    ("marked", "read", "with_code"),
    [
        ("a ``b c`` d", "a b c d", "a `b c` d"),
        ("a `b` d", "a b d", "a `b` d"),
        (":class:`~x.y.Z` and :func:`f <x.f>`", "Z and f", "`Z` and `f`"),
        ("see `the page <https://x.org>`_ now", "see the page now", "see the page now"),
        ("*all* of **them** 2 * 3 * 4", "all of them 2 * 3 * 4", "all of them 2 * 3 * 4"),
        ("as shown [12]_ and [Knuth]_.", "as shown and.", "as shown and."),
        ("two\n  lines", "two lines", "two lines"),
    ],
)
def test_markup_is_read(marked, read, with_code):
    assert plain(marked) == read
    assert plain(marked, code="`") == with_code


@pytest.mark.parametrize(
    "text",
    [
        "Too short to be a paragraph.",
        "a paragraph that begins with a small letter is half.",
        "A paragraph that ends with a colon introduces code:",
        "A paragraph without a full stop at its very end",
        "A paragraph with `code left over in it is none.",
        "A paragraph with an address https://x.org is none.",
        "A paragraph with a x = y formula in it is none.",
        "A paragraph that tells what is shown in. Nobody knows.",
        "A paragraph (with a parenthesis that does not close is none.",
        "A 1 2 3 4 5 6 7 8 9 10 11 12 list of numbers.",
        "A paragraph with a gap where something was , is none.",
    ],
)
def test_what_does_not_read_as_prose(text):
    assert not is_prose(text)


def test_what_reads_as_prose():
    assert is_prose("This reads as prose (doesn't it), for all of the os.path_sep and axis=0.")
    assert is_prose("Three words do.", words=3)


@pytest.fixture
def package(tmp_path):
    """Writes files below tmp_path / "pkg"; gives the package."""

    def write(**files: str) -> Package:
        for name, text in files.items():
            file = tmp_path / "pkg" / f"{name.replace('__', '/')}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text + "\n# padding" * 20)
        return Package("pkg", "1.0", "MIT", tmp_path / "pkg", "pkg.")

    return write


MODULE = '''
"""The module."""
__all__ = ["Shown", "f"]

class Shown:
    """A class."""
    def method(self): "A method."
    def _private(self): "Hidden."

class Other:
    """Not exported."""
def f():
    """A function."""
    def inner(): "No docstring of ours."
async def g(): "Not exported either."
def h(): "Half a character: \\ud800."
'''


def test_docstrings_of_a_package(package):
    found = list(docstrings(package(sub__a=MODULE, test_b=MODULE, c_test=MODULE, d="def (")))
    assert [(d.module, ".".join(d.names), d.text, d.public) for d in found] == [
        ("pkg.sub.a", "", "The module.", True),
        ("pkg.sub.a", "Shown", "A class.", True),
        ("pkg.sub.a", "Shown.method", "A method.", True),
        ("pkg.sub.a", "Shown._private", "Hidden.", False),
        ("pkg.sub.a", "Other", "Not exported.", False),
        ("pkg.sub.a", "f", "A function.", True),
        ("pkg.sub.a", "g", "Not exported either.", False),
    ]
    assert {d.file for d in found} == {"sub/a.py"}


def test_prose_of_a_package_is_one_document_a_file_without_repetitions(package):
    sentence = "The sentence number {} is long enough to count."
    a = f'"""{sentence.format("one")}\n\n{sentence.format("two")}"""'
    b = f'"""{sentence.format("TWO")}"""\ndef f():\n    """{sentence.format("three")}"""'
    first, second = prose.harvest([package(a=a, b=b, c=a)])
    both = f"{sentence.format('one')}\n\n{sentence.format('two')}\n"
    assert first == ("pkg/a.py", both)
    assert second == ("pkg/b.py", f"{sentence.format('three')}\n")


LICENCES = {
    "License-Expression: MIT AND 0BSD": "MIT AND 0BSD",
    "License: Apache-2.0": "Apache-2.0",
    "License: Copyright\n  and all of it\nClassifier: License :: OSI Approved :: BSD License": (
        "BSD License"
    ),
    "Classifier: Topic :: Software": "licence not named",
}


@pytest.mark.parametrize("fields", LICENCES, ids=LICENCES.values())
def test_packages_are_found_by_their_metadata(fields, tmp_path, monkeypatch):
    info = tmp_path / "built_in_fake-2.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.4\nName: built-in-fake\nVersion: 2.5\n{fields}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    names = {"no-such-thing": "nothing", "built-in-fake": "fake"}
    assert installed(names) == []  # an entry without its folder
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "__init__.py").write_text("raise RuntimeError('imported')")
    found = Package("built-in-fake", "2.5", LICENCES[fields], tmp_path / "fake", "fake.")
    assert installed(names) == [found]


def test_what_is_read_here():
    names = [package.name for package in documented()]
    assert names[0] == "Python"
    assert {"numpy", "jax", "flax", "optax", "orbax-checkpoint"} <= {*names}
    assert len(documented_sizes(documented()[names.index("jax")].folder)) > 300


@pytest.mark.slow
def test_the_prose_has_its_known_size(tmp_path, monkeypatch):
    monkeypatch.setenv("MLM_JAX_CACHE", str(tmp_path))
    found = builtin_corpus("prose", 1024)
    assert (found.kind, found.objective) == ("prose", "causal")
    assert 900 < found.documents < 2000
    assert 1.8e6 < found.train_bytes < 4e6
    assert 0.02 < found.valid_bytes / found.train_bytes < 0.1
    assert "PSF-2.0" in found.licence
    assert "jax" in found.licence
    assert 2.0 < found.baselines["xz"] < found.baselines["unigram"] < 3.5
    text = load_tokenizer(found.tokenizer).decode(IndexedDataset(found.valid).tokens(0)[:-1])
    assert text.endswith("\n")
    assert all(map(is_prose, text.strip().split("\n\n")))


def test_the_order_does_not_depend_on_the_file_system(package, monkeypatch):
    packages = [package(**{name: MODULE for name in "cab"})]
    first = [d.file for d in docstrings(packages[0])]
    walk = corpus.source_sizes
    monkeypatch.setattr(corpus, "source_sizes", lambda folder: dict(reversed(walk(folder).items())))
    assert [d.file for d in docstrings(packages[0])] == first == sorted(first)
