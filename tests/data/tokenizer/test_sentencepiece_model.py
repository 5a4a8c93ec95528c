"""SentencePiece models: the package's own ids, and the tokens that a config adds."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from mlm_jax.data.tokenizer import load_tokenizer

GOLDEN = Path(__file__).parents[2] / "golden"
MODELS = [GOLDEN / "tokenizers" / f"{kind}.model" for kind in ("unigram", "bpe")]
TEXTS = [json.loads(line)["text"] for line in (GOLDEN / "data" / "prose_b.jsonl").open()][:8]
BOTH = [(load_tokenizer(m), sentencepiece.SentencePieceProcessor(str(m))) for m in MODELS]


@given(st.text() | st.text(" \t\n▁<s>/unk漢é"))
@settings(deadline=None)
def test_ids_are_those_of_the_package(text):
    for ours, theirs in BOTH:
        assert ours.encode(text) == theirs.encode(text)


def test_texts_are_each_encoded_alone():
    for ours, theirs in BOTH:
        many = ours.encode_many([*TEXTS, "", "a"])
        assert [ids.tolist() for ids in many] == theirs.encode([*TEXTS, "", "a"])
        assert {ids.dtype for ids in many} == {np.dtype(np.int32)}
        assert list(ours.encode_many([])) == []


def test_control_pieces_are_special_and_not_found_in_a_text():
    unigram, bpe = (ours for ours, _ in BOTH)
    assert unigram.special == {"bos": 1, "eos": 2, "unk": 0, "pad": 3}
    assert bpe.special == {"bos": 1, "eos": 2, "unk": 0}
    for tokenizer in (unigram, bpe):
        assert (tokenizer.vocab_size, tokenizer.eod_id) == (600, 2)
        assert not {1, 2} & set(tokenizer.encode("<s> a </s>"))
        assert tokenizer.id_of("</s>") == 2
        assert tokenizer.id_of("no such piece") is None
    assert unigram.id_of("<sep>") in unigram.encode("a<sep>b")  # a symbol of the user's


def test_text_comes_back():
    unigram, bpe = (ours for ours, _ in BOTH)
    for text in [*TEXTS, "", "def f(x):\n\treturn x  # naïve 漢字 🙂"]:
        assert bpe.decode(np.array(bpe.encode(text), np.int32)) == text
    assert unigram.decode(unigram.encode("return  x\n")) == "return  x<unk>"  # it has no newline
    assert bpe.decode([*bpe.encode("a b"), 2, *bpe.encode("c")]) == "a b</s>c"


def test_token_bytes_add_up_to_the_text_and_the_space_before_it():
    bpe = BOTH[1][0]
    sizes = bpe.token_bytes()
    assert (sizes.dtype, sizes.shape) == (np.int32, (600,))
    for text in (TEXTS[0], "naïve 漢字 🙂"):
        assert sizes[bpe.encode(text)].sum() == len(text.encode()) + 1
    assert sizes[[0, 1, 2]].tolist() == [0, 0, 0]


def test_a_token_without_its_space_continues_a_word():
    bpe = BOTH[1][0]
    continues = bpe.continues_word()
    pieces = {"▁the": False, "re": True, "▁": False, "</s>": False, "<0x0A>": False, "<0xE6>": True}
    assert {piece: bool(continues[bpe.id_of(piece)]) for piece in pieces} == pieces


@pytest.fixture
def chat(tmp_path):
    """A model with tokens behind it, as chats have, one with a gap before it."""
    shutil.copy(MODELS[1], tmp_path / "tokenizer.model")
    added = {"<|im|>": 600, "<|im|>end": 605}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im|>end"}}')
    (tmp_path / "chat_template.jinja").write_text("{{ messages }} «é»")
    return tmp_path


def test_added_tokens_are_found_by_name(chat):
    tokenizer, bpe = load_tokenizer(chat), BOTH[1][0]
    assert (tokenizer.vocab_size, tokenizer.id_of("<|im|>end")) == (606, 605)
    expected = [600, *bpe.encode("a b"), 605, *bpe.encode("c")]
    assert tokenizer.encode("<|im|>a b<|im|>endc") == expected
    assert tokenizer.decode(expected) == "<|im|>a b<|im|>endc"
    assert (tokenizer.special["eos"], tokenizer.special["bos"]) == (605, 1)
    assert tokenizer.token_bytes()[600:].tolist() == [0] * 6
    assert not tokenizer.continues_word()[600:].any()


def test_a_gap_between_added_tokens_has_no_text(chat):
    assert load_tokenizer(chat).decode([600, 601, 604, 605]) == "<|im|><|im|>end"


def test_a_config_may_repeat_what_the_model_says(tmp_path):
    """As Llama 2's does, of <unk>, <s> and </s>."""
    shutil.copy(MODELS[1], tmp_path / "tokenizer.model")
    decoder = {str(id): {"content": name} for id, name in enumerate(("<unk>", "<s>", "</s>"))}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    tokenizer, bpe = load_tokenizer(tmp_path), BOTH[1][0]
    assert tokenizer.encode(TEXTS[0]) == bpe.encode(TEXTS[0])
    assert tokenizer.same_as(bpe)


def test_it_goes_to_another_process(chat):
    tokenizer = load_tokenizer(chat)
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.same_as(tokenizer)
    assert again.encode("<|im|>a b") == tokenizer.encode("<|im|>a b")


def test_a_saved_one_is_the_same(chat, tmp_path):
    tokenizer = load_tokenizer(chat)
    tokenizer.save(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert again.same_as(tokenizer)
    assert again.config == tokenizer.config
    assert again.config["chat_template"] == "{{ messages }} «é»"
    assert again.encode("<|im|>a") == tokenizer.encode("<|im|>a")
    assert not tokenizer.same_as(BOTH[1][0])
