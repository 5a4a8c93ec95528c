import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors

from mlm_jax.data.tokenizer import load_tokenizer
from mlm_jax.data.tokenizer.fast import FastTokenizer
from mlm_jax.data.tokenizer.split_patterns import PYTHON
from mlm_jax.data.tokenizer.training import train_bpe
from mlm_jax.data.tokenizer.vocabulary_files import read_wordpiece
from mlm_jax.errors import DataError

GOLDEN = Path(__file__).parents[2] / "golden" / "data"
TEXTS = [json.loads(line)["text"] for line in (GOLDEN / "prose_b.jsonl").open()]
STRANGE = "naïve 漢字 🙂\t\r\n\n  \x00 <|endoftext|> end "


@pytest.fixture(scope="module")
def golden():
    return load_tokenizer(GOLDEN / "tokenizer")


@pytest.fixture(scope="module")
def small():
    return train_bpe(TEXTS[:8], 500)


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(GOLDEN / "tokenizer", tmp_path / "tokenizer")


def as_lists(many):
    return [np.asarray(ids).tolist() for ids in many]


def test_knows_its_size_and_its_end_of_document(golden):
    assert (golden.vocab_size, golden.eod_id) == (8192, 0)
    assert golden.config["model_max_length"] == 1024


def test_every_way_to_load_it_gives_the_same_ids(golden, folder):
    from_file = load_tokenizer(folder / "tokenizer.json")
    (folder / "tokenizer.json").unlink()
    from_merges = load_tokenizer(str(folder))
    for other in (from_file, from_merges):
        assert (other.vocab_size, other.eod_id) == (8192, 0)
        for text in [*TEXTS[:5], STRANGE, ""]:
            assert other.encode(text) == golden.encode(text)


@pytest.mark.parametrize("text", [*TEXTS[:3], STRANGE, "", "\n"])
def test_text_comes_back(golden, small, text):
    for tokenizer in (golden, small):
        assert tokenizer.decode(np.array(tokenizer.encode(text), np.int32)) == text


def test_many_texts_are_each_encoded_alone(golden):
    texts = [STRANGE, "", "a"]
    assert as_lists(golden.encode_many(texts)) == [golden.encode(text) for text in texts]
    assert as_lists(golden.encode_many([])) == []


def test_padding_truncation_and_templates_of_a_file_are_off(golden, folder):
    damaged = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    damaged.enable_truncation(3)
    damaged.enable_padding(length=16, pad_token="<|endoftext|>")
    template = {"single": "<|endoftext|> $A", "special_tokens": [("<|endoftext|>", 0)]}
    damaged.post_processor = processors.TemplateProcessing(**template)
    damaged.save(str(folder / "tokenizer.json"))
    loaded = load_tokenizer(folder)
    assert loaded.encode(TEXTS[0]) == golden.encode(TEXTS[0])
    texts = ["a", TEXTS[0]]
    assert as_lists(loaded.encode_many(texts)) == [golden.encode(text) for text in texts]


@pytest.mark.parametrize(
    ("vocab", "eos", "eod"),
    [
        (["a", "</s>"], None, "</s>"),
        (["<eos>", "<|end_of_text|>"], None, "<|end_of_text|>"),
        (["a", "<stop>"], "<stop>", "<stop>"),
        (["a", "<stop>"], {"content": "<stop>", "special": True}, "<stop>"),
        (["<|endoftext|>", "<stop>"], "<stop>", "<|endoftext|>"),  # chats end with <stop>
        (["a"], "<stop>", None),
        (["a"], None, None),
    ],
)
def test_eod_id(vocab, eos, eod, tmp_path):
    backend = tokenizers.Tokenizer(models.WordLevel(dict(zip(vocab, range(9), strict=False))))
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eod_id == (None if eod is None else vocab.index(eod))
    tokenizer.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").eod_id == tokenizer.eod_id


def test_a_gap_in_the_ids_counts(tmp_path):
    tokenizer = FastTokenizer(tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 7})))
    assert tokenizer.vocab_size == 8
    assert tokenizer.token_bytes().shape == (8,)


def test_token_bytes_add_up_to_the_text(golden, small):
    for tokenizer in (golden, small):
        sizes = tokenizer.token_bytes()
        assert (sizes.dtype, sizes.shape) == (np.int32, (tokenizer.vocab_size,))
        assert sizes[0] == 0
        assert np.all(sizes[1:] > 0)
        for text in [*TEXTS, STRANGE]:
            expected = len(text.replace("<|endoftext|>", "").encode())
            assert sizes[tokenizer.encode(text)].sum() == expected


def test_token_bytes_of_added_tokens(small, tmp_path):
    small.save(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.add_tokens(["漢漢"])
    backend.add_special_tokens(["<stop>"])
    assert FastTokenizer(backend).token_bytes()[-2:].tolist() == [6, 0]


def test_token_bytes_of_sentencepiece():
    vocab = {"a": 0, "▁the": 1, "漢": 2, "<0xE6>": 3, "▁": 4}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    assert FastTokenizer(backend).token_bytes().tolist() == [1, 4, 3, 1, 1]


def test_token_bytes_of_wordpiece():
    backend = tokenizers.Tokenizer(models.WordPiece({"the": 0, "##ory": 1, ",": 2, "[UNK]": 3}))
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(["[UNK]"])
    assert FastTokenizer(backend).token_bytes().tolist() == [4, 3, 1, 0]  # a word with its space


def test_a_saved_tokenizer_is_the_same(golden, small, tmp_path):
    for name, tokenizer in (("golden", golden), ("small", small)):
        tokenizer.save(tmp_path / name)
        loaded = load_tokenizer(tmp_path / name)
        assert loaded.encode(STRANGE) == tokenizer.encode(STRANGE)
        config = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        assert config["eos_token"] == "<|endoftext|>"
    assert loaded.config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert load_tokenizer(tmp_path / "golden").config == golden.config


def test_each_is_equal_to_itself_only(small, tmp_path):
    small.save(tmp_path)
    assert len({small, small, load_tokenizer(tmp_path)}) == 2


def test_train_bpe(small):
    assert (small.vocab_size, small.eod_id) == (500, 0)
    assert small.backend.id_to_token(0) == "<|endoftext|>"
    again = train_bpe(iter(TEXTS[:8]), 500)
    assert again.backend.to_str() == small.backend.to_str()
    assert len(small.encode(TEXTS[9])) < len(TEXTS[9].encode()) / 1.5
    assert train_bpe([], 257).vocab_size == 257
    with pytest.raises(DataError, match=r"vocab_size=256 .* 257"):
        train_bpe(TEXTS, 256)


def test_a_newline_keeps_its_indent():
    words = pre_tokenizers.Split(tokenizers.Regex(PYTHON), "isolated")
    split = [word for word, _ in words.pre_tokenize_str("def f(x1):\n    return  x_ + 12\n\n\tü")]
    code = ["def", " f", "(", "x", "1", "):", "\n    ", "return", " ", " x_", " +", " 12"]
    assert split == [*code, "\n", "\n", "\t", "ü"]


# Every kind of file

KINDS = GOLDEN.parent / "tokenizers"
PAT = {"pat_str": r" ?\p{L}+|\s+|[^\s\p{L}]+"}
CHAT = "{% for message in messages %}{{ message.content }}{% endfor %} «é»"


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """A tokenizer of each kind, by its kind, each from a folder with a chat template."""
    files = {
        "json": [GOLDEN / "tokenizer" / "tokenizer.json"],
        "merges": [GOLDEN / "tokenizer" / "vocab.json", GOLDEN / "tokenizer" / "merges.txt"],
        "unigram": [KINDS / "unigram.model"],
        "bpe": [KINDS / "bpe.model"],
        "tiktoken": [KINDS / "code.tiktoken"],
        "wordpiece": [KINDS / "vocab.txt"],
    }
    made = {"bytes": load_tokenizer("bytes")}
    for kind, paths in files.items():
        folder = tmp_path_factory.mktemp(kind)
        for path in paths:
            shutil.copy(path, folder)
        (folder / "tokenizer_config.json").write_text(json.dumps(PAT))
        (folder / "chat_template.jinja").write_text(CHAT)
        made[kind] = load_tokenizer(folder)
        for path in paths:  # one that was given as a file is the same
            assert load_tokenizer(folder / path.name).same_as(made[kind])
    return made


def test_every_kind_keeps_what_the_protocol_says(kinds):
    for kind, tokenizer in kinds.items():
        size = tokenizer.vocab_size
        for text in [TEXTS[0], STRANGE, "", "the words"]:
            ids = tokenizer.encode(text)
            assert all(0 <= id < size for id in ids), kind
            assert as_lists(tokenizer.encode_many([text, "a"])) == [ids, tokenizer.encode("a")]
        assert (tokenizer.token_bytes().shape, tokenizer.token_bytes().dtype) == ((size,), np.int32)
        continues = tokenizer.continues_word()
        assert (continues.shape, continues.dtype) == ((size,), np.bool_)
        assert not continues[list(tokenizer.special.values())].any()
        assert tokenizer.id_of("no such token") is None
        assert all(0 <= id < size for id in tokenizer.special.values())


@pytest.mark.smoke
def test_every_kind_is_saved_with_its_config_and_the_same_again(kinds, tmp_path):
    for kind, tokenizer in kinds.items():
        tokenizer.save(tmp_path / kind)
        again = load_tokenizer(tmp_path / kind)
        assert again.same_as(tokenizer), kind
        assert again.config == tokenizer.config
        assert kind == "bytes" or again.config["chat_template"] == CHAT
        assert (again.special, again.eod_id) == (tokenizer.special, tokenizer.eod_id)
        assert again.vocab_size == tokenizer.vocab_size
        assert again.encode(STRANGE) == tokenizer.encode(STRANGE)


def test_fingerprints_tell_tokenizers_apart(kinds, golden):
    prints = {kind: tokenizer.fingerprint() for kind, tokenizer in kinds.items()}
    assert len(set(prints.values())) == len(prints)
    assert all(len(print) == 64 and int(print, 16) for print in prints.values())
    assert golden.fingerprint() == kinds["json"].fingerprint()  # a config decides no ids
    for kind, tokenizer in kinds.items():
        assert [k for k, other in kinds.items() if other.same_as(tokenizer)] == [kind]


def test_a_fingerprint_knows_added_tokens(small, tmp_path):
    backend = tokenizers.Tokenizer.from_str(small.backend.to_str())
    backend.add_tokens(["return"])
    assert not FastTokenizer(backend).same_as(small)


def test_bytes_are_ids(kinds, tmp_path, monkeypatch):
    tokenizer = kinds["bytes"]
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (257, 256)
    assert tokenizer.encode("é\0 <|endoftext|>") == [*"é\0 ".encode(), 256]
    assert tokenizer.decode([*"é漢".encode(), 256]) == "é漢<|endoftext|>"
    assert tokenizer.token_bytes().tolist() == [1] * 256 + [0]
    monkeypatch.chdir(tmp_path)  # a path of that name comes first
    shutil.copytree(GOLDEN / "tokenizer", "bytes")
    assert load_tokenizer("bytes").vocab_size == 8192


def test_megatrons_names_of_gpt2s_files(tmp_path):
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(GOLDEN / "tokenizer" / name, tmp_path / f"gpt2-{name}")
    for path in (tmp_path, tmp_path / "gpt2-vocab.json", tmp_path / "gpt2-merges.txt"):
        assert (
            load_tokenizer(path).encode(TEXTS[0])[:3]
            == load_tokenizer(GOLDEN / "tokenizer").encode(TEXTS[0])[:3]
        )


def test_a_model_is_known_by_its_content(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(PAT))
    kinds = {"code.tiktoken": "FastTokenizer", "bpe.model": "SentencePieceTokenizer"}
    for name, is_of in kinds.items():
        shutil.copy(KINDS / name, tmp_path / "tokenizer.model")
        assert type(load_tokenizer(tmp_path)).__name__ == is_of
    shutil.copy(GOLDEN / "tokenizer" / "tokenizer.json", tmp_path / "any")
    assert load_tokenizer(tmp_path / "any").vocab_size == 8192


# Special tokens and words


@pytest.mark.parametrize(
    ("config", "mapped", "special"),
    [
        ({}, {}, {"sep": 3, "cls": 2, "unk": 1, "pad": 0, "mask": 4}),
        ({"eos_token": "[SEP]"}, {}, {"eos": 3}),
        ({}, {"bos_token": {"content": "[CLS]"}, "eos_token": "the"}, {"bos": 2}),
        ({"eos_token": None}, {"eos_token": "[SEP]"}, {}),
        ({"pad_token": "nowhere"}, {}, {}),
    ],
)
def test_special_tokens_by_config_by_map_and_by_berts_names(config, mapped, special, tmp_path):
    shutil.copy(KINDS / "vocab.txt", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(mapped))
    tokenizer = load_tokenizer(tmp_path)
    assert special.items() <= tokenizer.special.items()
    assert ("pad" in tokenizer.special) == ("pad_token" not in config)
    assert tokenizer.eod_id == tokenizer.special.get("eos", 3)  # without EOS, SEP


def test_wordpiece_takes_the_longest_piece_first(kinds):
    tokenizer = kinds["wordpiece"]
    vocab = {line: n for n, line in enumerate((KINDS / "vocab.txt").read_text().splitlines())}
    for word in ("returning", "import", "multiprocessing", "xyzzy", "é", "\u6f22"):
        rest, pieces, mark = word.replace("é", "e"), [], ""
        while rest:
            fits = [n for n in range(len(rest), 0, -1) if mark + rest[:n] in vocab]
            pieces.append(vocab[mark + rest[: fits[0]]] if fits else None)
            rest, mark = rest[fits[0] :] if fits else "", "##"
        assert tokenizer.encode(word) == ([vocab["[UNK]"]] if None in pieces else pieces)
    assert tokenizer.encode("Import [MASK]\tIMPORT") == tokenizer.encode("import [MASK] import")
    assert tokenizer.encode("[MASK]") == [4]
    assert tokenizer.vocab_size == len(vocab)


@pytest.mark.parametrize(
    ("more", "config", "keeps_capitals"),
    [
        ("", {}, False),
        ("Import\n", {}, True),
        ("", {"do_lower_case": False}, True),
        ("Import\n", {"do_lower_case": True}, False),
    ],
)
def test_wordpiece_is_cased_by_its_config_or_its_vocabulary(more, config, keeps_capitals, tmp_path):
    (tmp_path / "vocab.txt").write_text((KINDS / "vocab.txt").read_text() + more)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.encode("IMPORT") != tokenizer.encode("import")) == keeps_capitals


def test_which_tokens_continue_a_word(kinds, golden):
    wordpiece, vocab = kinds["wordpiece"], (KINDS / "vocab.txt").read_text().splitlines()
    assert wordpiece.continues_word().tolist() == [token.startswith("##") for token in vocab]
    for tokenizer in (golden, kinds["tiktoken"], kinds["bytes"]):
        ids = tokenizer.encode("a word,\n\tnaïve")
        continues = tokenizer.continues_word()[ids]
        tokens = [tokenizer.decode([id]) for id in ids]
        assert continues.tolist() == [not token[0].isspace() for token in tokens]
        assert 2 <= (~continues).sum() <= 3  # " w", and the newline with or without its tab
    assert not golden.continues_word()[golden.eod_id]
    words = FastTokenizer(tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1})))
    assert not words.continues_word().any()
    pieces = tokenizers.Tokenizer(models.Unigram([("\u2581a", -1.0), ("b", -1.0)], 0))
    pieces.decoder = decoders.Metaspace()
    assert FastTokenizer(pieces).continues_word().tolist() == [False, True]


def test_added_tokens_count_and_keep_their_ids(tmp_path):
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(GOLDEN / "tokenizer" / name, tmp_path)
    decoder = {
        "8200": {"content": "<|im|>", "special": True},
        "8195": {"content": "word", "special": False, "single_word": True},
        "0": {"content": "<|endoftext|>", "special": True},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 8201
    assert tokenizer.encode("word<|im|>words<|endoftext|>")[:2] == [8195, 8200]
    assert 8195 not in tokenizer.encode("words")
    assert tokenizer.token_bytes()[[8195, 8200]].tolist() == [4, 0]


@given(
    st.text() | st.text("iImpoORTt#[]éÉİß漢\u0301\u200b\xad\0\ufffd .,'\n") | st.sampled_from(TEXTS)
)
@settings(deadline=None)
def test_wordpiece_has_the_ids_of_the_librarys_own_bert(text):
    for cased in (False, True):
        ours = load_wordpiece(cased)
        theirs = tokenizers.BertWordPieceTokenizer(str(KINDS / "vocab.txt"), lowercase=not cased)
        for words in (text, f"[CLS]{text}[MASK]"):
            assert ours.encode(words) == theirs.encode(words, add_special_tokens=False).ids


@functools.cache
def load_wordpiece(cased):
    backend = read_wordpiece(KINDS / "vocab.txt", {"do_lower_case": not cased})
    return FastTokenizer(backend)


# What cannot be read

ONE = b'{"eos_token": "</s>"}'


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, r"t: no such file in it; give a tokenizer\.json"),
        ({"tokenizer_config.json": ONE}, r"t: no such file in it; give a tokenizer\.json"),
        ({"tokenizer.json": b""}, r"tokenizer\.json: this tokenizer cannot be read"),
        ({"tokenizer.json": b"{}"}, r"tokenizer\.json: this tokenizer cannot be read"),
        ({"tokenizer.json": b"[1]"}, r"tokenizer\.json: this tokenizer cannot be read"),
        ({"tokenizer.json": b'{"model": '}, r"tokenizer\.json: this tokenizer cannot be read"),
        ({"vocab.json": b'{"a": 0}'}, r"vocab\.json: .* merges\.txt is not beside it; add it"),
        ({"vocab.json": b"[]", "merges.txt": b""}, r"vocab\.json: this tokenizer cannot be read"),
        ({"a.model": b""}, r"a\.model: .* neither a SentencePiece model nor lines"),
        ({"a.model": b"\x0a\x0bjunk\xff"}, r"a\.model: .* neither a SentencePiece model"),
        ({"a.model": b"#version: 0.2\na b\n"}, r"a\.model: .* neither a SentencePiece model"),
        (
            {"a.model": b"", "b.model": b""},
            r"t: holds several .*, a\.model, b\.model; give",
        ),
        ({"vocab.txt": b"a\n##b\n"}, r"vocab\.txt: .* no line is \[UNK\]"),
        ({"vocab.txt": b"[UNK]\na\na\n"}, r"vocab\.txt: .* line 3: 'a' is there twice"),
        ({"vocab.txt": b"[UNK]\n\xff\n"}, r"vocab\.txt: this tokenizer cannot be read: .*utf-8"),
        (
            {"vocab.txt": b"[UNK]\n", "tokenizer_config.json": b"[1]"},
            r"vocab\.txt: .* tokenizer_config\.json holds no JSON",
        ),
        (
            {"vocab.txt": b"[UNK]\n", "tokenizer_config.json": b"{"},
            r"vocab\.txt: .* tokenizer_config\.json: Expec",
        ),
        (
            {"vocab.txt": b"[UNK]\n", "tokenizer_config.json": b'{"added_tokens_decoder": [1]}'},
            r"vocab\.txt: .* added_tokens_decoder of .* is no map like",
        ),
        (
            {"vocab.txt": b"[UNK]\n", "special_tokens_map.json": b"{"},
            r"vocab\.txt: .* special_tokens_map\.json: Expec",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(files, said, tmp_path):
    folder = tmp_path / "t"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        load_tokenizer(folder)


def test_what_is_not_there_is_refused(folder):
    with pytest.raises(DataError, match=r"tokenizer\.jsn: no such file; give a tokenizer\.json"):
        load_tokenizer(folder / "tokenizer.jsn")
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").unlink()
    with pytest.raises(DataError, match=r"merges\.txt: .* vocab\.json is not beside it"):
        load_tokenizer(folder / "merges.txt")


def test_a_prompt_begins_with_what_the_tokenizer_puts_before_it():
    backend = tokenizers.Tokenizer(
        models.WordLevel({"<s>": 0, "[UNK]": 1, "a": 2, "b": 3}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer = FastTokenizer(backend)
    assert tokenizer.encode("a b") == [2, 3]
    assert tokenizer.prompt("a b") == [0, 2, 3]
