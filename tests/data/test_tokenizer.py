import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from mlm_jax.data.bpe_trainer import train_bpe
from mlm_jax.data.fast_tokenizer import FastTokenizer
from mlm_jax.data.split_patterns import PYTHON
from mlm_jax.data.tokenizer import load_tokenizer
from mlm_jax.errors import DataError

GOLDEN = Path(__file__).parents[1] / "golden" / "data"
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
    assert golden.encode_many([STRANGE, "", "a"]) == [golden.encode(t) for t in (STRANGE, "", "a")]
    assert golden.encode_many([]) == []


def test_padding_truncation_and_templates_of_a_file_are_off(golden, folder):
    damaged = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    damaged.enable_truncation(3)
    damaged.enable_padding(length=16, pad_token="<|endoftext|>")
    template = {"single": "<|endoftext|> $A", "special_tokens": [("<|endoftext|>", 0)]}
    damaged.post_processor = tokenizers.processors.TemplateProcessing(**template)
    damaged.save(str(folder / "tokenizer.json"))
    loaded = load_tokenizer(folder)
    assert loaded.encode(TEXTS[0]) == golden.encode(TEXTS[0])
    assert loaded.encode_many(["a", TEXTS[0]]) == [golden.encode("a"), golden.encode(TEXTS[0])]


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


def test_a_tokenizer_that_is_not_there_or_damaged_is_refused(folder, tmp_path):
    with pytest.raises(DataError, match=r"tokenizer\.jsn: no such file; give a tokenizer\.json"):
        load_tokenizer(folder / "tokenizer.jsn")
    whole = (folder / "tokenizer.json").read_text()
    for content in ("", "{}", "[1]", whole[: len(whole) // 2]):
        (folder / "tokenizer.json").write_text(content)
        with pytest.raises(DataError, match=f"^{folder}: this tokenizer cannot be read"):
            load_tokenizer(folder)
    (folder / "tokenizer.json").write_text(whole)
    for content in ("", "[1]", '{"eos_token": {}}'):
        (folder / "tokenizer_config.json").write_text(content)
        with pytest.raises(DataError, match=f"^{folder}: this tokenizer cannot be read"):
            load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "merges.txt").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json: no such file"):
        load_tokenizer(folder)
