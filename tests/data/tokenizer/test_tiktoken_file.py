"""tiktoken's files: the same ids as the package gives."""

import base64
import itertools
import json
import shutil
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from mlm_jax.data.tokenizer import load_tokenizer
from mlm_jax.data.tokenizer.byte_level import byte_level_backend, characters
from mlm_jax.data.tokenizer.split_patterns import CL100K, GPT2, LLAMA3, O200K, for_oniguruma
from mlm_jax.data.tokenizer.tiktoken_file import PUBLISHED, merges, read_ranks
from mlm_jax.errors import DataError

GOLDEN = Path(__file__).parents[2] / "golden"
FILE = GOLDEN / "tokenizers" / "code.tiktoken"
RANKS = read_ranks(FILE)
SPECIAL = {"<|end|>": 1030, "<|x|>": 1024}  # with a gap between their ids
CODE = [json.loads(line)["text"] for line in (GOLDEN / "data" / "prose_a.jsonl").open()]
NASTY = st.one_of(
    st.text(),
    st.text(" \t\n\r\v\x85\xa0\u2003\u3000'sStTLlRrEeVvDdMm\u017fK019٣²ǅßÉé漢\u0301\U0001f642"),
    st.lists(
        st.sampled_from([" def", "'LL", "\r\n", "    ", "<|end|>", "<|x|>", "1234", "//"])
    ).map("".join),
)


def published(name, monkeypatch):
    """An encoding as tiktoken publishes it, without the file that it would download."""
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: RANKS)
    return getattr(openai_public, name)()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """By pattern: our tokenizer of the same file, and tiktoken's encoding."""
    made = {}
    for name, pattern in {"gpt2": GPT2, "cl100k": CL100K, "o200k": O200K, "llama3": LLAMA3}.items():
        folder = tmp_path_factory.mktemp(name)
        shutil.copy(FILE, folder / "tokenizer.model")  # as Llama 3 calls it
        decoder = {str(id): {"content": c, "special": True} for c, id in SPECIAL.items()}
        config = {"pat_str": pattern, "added_tokens_decoder": decoder}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        theirs = tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=RANKS, special_tokens=SPECIAL
        )
        made[name] = load_tokenizer(folder), theirs
    return made


@given(NASTY)
@settings(deadline=None, max_examples=300)
def test_ids_are_those_of_tiktoken(pairs, text):
    for ours, theirs in pairs.values():
        assert ours.encode(text) == theirs.encode(text, allowed_special="all")
        assert ours.decode(theirs.encode_ordinary(text)) == text


def test_code_has_the_ids_of_tiktoken(pairs):
    for ours, theirs in pairs.values():
        for text in CODE[:40]:
            assert ours.encode(text) == theirs.encode_ordinary(text)


def test_size_and_special_tokens_are_those_of_the_config(pairs):
    for ours, _ in pairs.values():
        assert ours.vocab_size == 1031
        assert ours.encode("<|x|><|end|>") == [1024, 1030]
        assert (ours.id_of("<|end|>"), ours.eod_id) == (1030, None)


def test_patterns_are_those_that_tiktoken_publishes(monkeypatch):
    assert for_oniguruma(published("cl100k_base", monkeypatch)["pat_str"]) == CL100K
    assert for_oniguruma(published("o200k_base", monkeypatch)["pat_str"]) == O200K
    assert for_oniguruma(LLAMA3) == LLAMA3


@given(NASTY)
@settings(deadline=None)
def test_gpt2s_pattern_cuts_as_the_one_that_tiktoken_made_faster(text):
    fixed = {"mergeable_ranks": RANKS, "special_tokens": {}}
    theirs = tiktoken.Encoding("theirs", pat_str=openai_public.r50k_pat_str, **fixed)
    ours = tiktoken.Encoding("ours", pat_str=GPT2, **fixed)
    assert ours.encode_ordinary(text) == theirs.encode_ordinary(text)


@given(
    st.lists(st.text("abc", min_size=2, max_size=6), unique=True, max_size=40),
    st.lists(st.text("abc", max_size=40), max_size=5),
)
@settings(deadline=None, max_examples=300)
def test_any_ranks_at_all_merge_alike(tokens, texts):
    """Also those that no training gives, whose tokens are not made of each other."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {token.encode(): 256 + n for n, token in enumerate(tokens)}
    theirs = tiktoken.Encoding("any", pat_str=GPT2, mergeable_ranks=ranks, special_tokens={})
    vocab = {characters(token): rank for token, rank in ranks.items()}
    ours = byte_level_backend(vocab, merges(ranks), GPT2, ignore_merges=True)
    for text in [*texts, *tokens]:
        assert ours.encode(text).ids == theirs.encode_ordinary(text)


def many_ranks(n: int) -> bytes:
    """A file with n ranks: all single bytes, pairs, and as many triples as it takes."""
    bytes_ = [bytes([byte]) for byte in range(256)]
    tokens = itertools.chain(
        bytes_, map(b"".join, itertools.product(bytes_, bytes_)),
        map(b"".join, itertools.product(bytes_, bytes_, bytes_)),
    )  # fmt: skip
    lines = (base64.b64encode(t) + f" {r}\n".encode() for r, t in enumerate(tokens) if r < n)
    return b"".join(itertools.islice(lines, n))


LLAMA3_SOME = {"<|begin_of_text|>": 128000, "<|eot_id|>": 128009, "<|end_header_id|>": 128007}


@pytest.mark.parametrize(
    ("n", "size", "eod", "some"),
    [
        (50256, 50257, 50256, {}),
        (100256, 100277, 100257, {"<|fim_suffix|>": 100260, "<|endofprompt|>": 100276}),
        (128000, 128256, 128001, LLAMA3_SOME | {"<|reserved_special_token_250|>": 128255}),
        (199998, 200019, 199999, {"<|endofprompt|>": 200018}),
    ],
)
def test_published_vocabularies_are_known_by_their_size(n, size, eod, some, tmp_path):
    (tmp_path / "x.tiktoken").write_bytes(many_ranks(n))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (size, eod)
    assert {name: tokenizer.id_of(name) for name in some} == some
    theirs = tiktoken.Encoding(
        "n",
        pat_str=PUBLISHED[n].split,
        mergeable_ranks=read_ranks(tmp_path / "x.tiktoken"),
        special_tokens=PUBLISHED[n].special,
    )
    for text in [CODE[0], "It'll be 12345 <|endoftext|> \n\n  end  \n  "]:
        assert tokenizer.encode(text) == theirs.encode(text, allowed_special="all")


LINES = FILE.read_bytes().split(b"\n")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (
            LINES[:300] + [b"broken"] + LINES[300:],
            r"x\.tiktoken: .* line 301: b'broken' is no token",
        ),
        (LINES[:300] + [b"!!!! 1030"], r"x\.tiktoken: .* line 301: b'!!!! 1030' is no token"),
        (LINES[:300] + [b"IQ== x"], r"x\.tiktoken: .* line 301: b'IQ== x' is no token"),
        (
            LINES[:300] + [LINES[3].split()[0] + b" 1040"],
            r"x\.tiktoken: .* line 301: .* repeats a token",
        ),
        (LINES[:300] + [b"aGVsbG8= 4"], r"x\.tiktoken: .* line 301: .* repeats a token or a rank"),
        (LINES[:200], r"x\.tiktoken: .* lacks the bytes \["),
        (LINES[:300], r"x\.tiktoken: .* has 300 ranks, .* put pat_str .* GPT-2 \(50256\)"),
        ([], r"x\.tiktoken: .* lacks the bytes"),
    ],
)
def test_a_damaged_file_is_refused(lines, said, tmp_path):
    (tmp_path / "x.tiktoken").write_bytes(b"\n".join(lines))
    with pytest.raises(DataError, match=said):
        load_tokenizer(tmp_path)


def test_an_added_token_with_the_id_of_another_is_refused(tmp_path):
    shutil.copy(FILE, tmp_path)
    config = {"pat_str": GPT2, "added_tokens_decoder": {"300": {"content": "<|end|>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(
        DataError, match=r"code\.tiktoken: .* id 300 is .* but '<\|end\|>' in token"
    ):
        load_tokenizer(tmp_path)
