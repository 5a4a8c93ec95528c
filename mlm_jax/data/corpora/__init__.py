"""What every machine has that one can learn from: the recipes of the built-in corpora.

kind             made from                                                  under
python           sources of Python's standard library                       PSF-2.0
prose            docstrings of the standard library and of numpy, scipy,    PSF-2.0; BSD-3-Clause;
                 jax, flax, optax and orbax                                 Apache-2.0
sentences        the same, as sentences for BERT                            the same
conversations    their docstrings, signatures and doctests                  the same
en-fr, en-de     message catalogues of django                               BSD-3-Clause

Files are read where they are installed, and nothing is imported or run. A package that is not
installed is left out; the pairs need django. Each corpus holds out one source in twenty, of pairs
one in ten, by a hash of its name: a file, an object, a sentence.
"""
