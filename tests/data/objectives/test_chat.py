"""Chat templates beside Hugging Face's: the text, the tokens, and which the assistant says."""

import datetime
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlm_jax.data.objectives import chat
from mlm_jax.data.objectives.chat import CHATML, ChatTemplate
from mlm_jax.data.objectives.examples import conversation_text, encode
from mlm_jax.data.tokenizer.fast import FastTokenizer
from mlm_jax.data.tokenizer.training import train_bpe
from mlm_jax.errors import DataError
from tests.data.chat_templates import (
    CONVERSATIONS,
    TEMPLATES,
    TOOL,
    WORDS,
    chat_backend,
    tagged,
    turns,
)

GOLDEN = Path(__file__).parents[2] / "golden"
CASES = json.loads((GOLDEN / "objectives/chat.json").read_text())
ALL = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
NAMES = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}


@pytest.fixture(scope="module")
def tokenizer():
    return FastTokenizer(chat_backend(), NAMES)


@pytest.mark.smoke
@pytest.mark.parametrize("tags", [False, True], ids=["by prefixes", "by tags"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['template']} {c['conversation']}")
def test_equals_hugging_face(case, tags, tokenizer):
    template = ChatTemplate(tagged(TEMPLATES[case["template"]], tags), NAMES)
    messages = CONVERSATIONS[case["conversation"]]["messages"]
    tools = CONVERSATIONS[case["conversation"]].get("tools")
    if "error" in case:
        with pytest.raises(DataError, match=case["error"]):
            template.spans(messages, tools=tools)
        return
    text, spans = template.spans(messages, tools=tools)
    assert text == case["text"]
    assert len(spans) == sum(message["role"] == "assistant" for message in messages)
    (example,) = encode([conversation_text(template, messages, tools)], tokenizer)
    assert example.tokens.tolist() == case["tokens"]
    assert example.trained.astype(int).tolist() == case["trained"]


@pytest.mark.parametrize("words", [WORDS, None], ids=["llama3's words", "gpt2's words"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_trained_prompt_has_the_tokens_of_inference(name, words, monkeypatch):
    """GPT-2's words join a line break and what is behind it, but not over the edge."""
    monkeypatch.setattr(chat, "TRAINING_DAY", datetime.datetime.now())
    tokenizer = FastTokenizer(chat_backend(words), NAMES)
    template = ChatTemplate(tagged(TEMPLATES[name], False), NAMES)
    messages = turns("What is 1 + 1?", "  Two\n.")
    (example,) = encode([conversation_text(template, messages)], tokenizer)
    prompt = template.render(messages[:1], add_generation_prompt=True)
    n = example.trained.argmax()
    assert tokenizer.encode(prompt) == example.tokens[:n].tolist()


def test_the_date_is_todays_but_in_training():
    template = ChatTemplate("{{ strftime_now('%Y') }}" + ALL)
    assert template.spans([{"role": "assistant", "content": "x"}])[0] == "2024[assistant]x"
    assert int(template.render([])) > 2024


CHATML_TEXT = """\
<|im_start|>system
Be brief.<|im_end|>
<|im_start|>user
Hi<|im_end|>
<|im_start|>assistant
Hello<|im_end|>
<|im_start|>assistant
"""


def test_chatml_where_there_is_no_template(tokenizer, caplog):
    template = ChatTemplate.of(tokenizer)
    messages = turns("Hi", "Hello", system="Be brief.")
    assert template.render(messages, add_generation_prompt=True) == CHATML_TEXT
    text, spans = template.spans(messages)
    assert [text[begin:end] for begin, end in spans] == ["Hello<|im_end|>"]
    assert not caplog.records

    with caplog.at_level(logging.WARNING):
        ChatTemplate.of(train_bpe([], 257))
    assert "lacks the special tokens <|im_start|> and <|im_end|>" in caplog.text


def test_chatml_keeps_tools_and_calls():
    template, with_tools = ChatTemplate(CHATML), CONVERSATIONS["tools"]
    messages = [{**m, "content": None} if "tool_calls" in m else m for m in with_tools["messages"]]
    text, spans = template.spans(messages, tools=with_tools["tools"])
    assert text.startswith("<|im_start|>system\nTools, one JSON object a line:\n{")
    assert json.dumps(TOOL, ensure_ascii=False) in text
    assert "<|im_start|>tool\n3<|im_end|>\n" in text
    first, last = (text[begin:end] for begin, end in spans)
    assert first.startswith('\n<tool_call>{"type": "function"')
    assert first.endswith("</tool_call><|im_end|>")
    assert last == "It is 3.<|im_end|>"


def test_the_template_of_a_tokenizer_knows_its_special_tokens():
    config = {"chat_template": "{{ bos_token }}{{ unk_token is defined }}"}
    tokenizer = SimpleNamespace(config=config, special={"bos": 1}, decode=lambda ids: f"<{ids[0]}>")
    assert ChatTemplate.of(tokenizer).render([]) == "<1>False"


@pytest.mark.parametrize("found", [7, [], {"tool_use": "b"}, [{"name": "a", "template": "b"}]])
def test_a_strange_configuration_is_refused(found):
    with pytest.raises(DataError, match="no text; of several, write one into chat_template"):
        ChatTemplate.of(SimpleNamespace(config={"chat_template": found}, special={}))


ONLY_LAST = "{% for m in messages %}{% if loop.last %}(last){% endif %}{{ m.content }}{% endfor %}"
OTHER_PROMPT = ALL + "{% if add_generation_prompt %}<think>{% endif %}"


@pytest.mark.parametrize("source", [ONLY_LAST, OTHER_PROMPT])
def test_a_template_that_cannot_be_told_apart_is_refused(source):
    with pytest.raises(DataError, match=r"messages 1 to 2 otherwise .*\{% generation %\}"):
        ChatTemplate(source).spans(turns("a", "b", "c", "d"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% if %}", "cannot be read"),
        ("{% generation %}", "cannot be read"),
        ("{{ raise_exception('no ' + 'way') }}", "refuses: no way"),
        ("{{ messages[0].missing.more }}", "refuses"),
        ("{{ messages + 1 }}", "refuses"),
        ("{{ messages.append(1) }}", "refuses"),  # an immutable sandbox
        ("{{ messages.__class__.__mro__ }}", "refuses"),
        ("{{ 1 / 0 }}", "refuses"),
        ("{{ '{a}'.format() }}", "refuses"),
    ],
)
def test_a_bad_template_is_refused(source, message):
    with pytest.raises(DataError, match=message):
        ChatTemplate(source).render(turns("a"))


@pytest.mark.parametrize(
    ("content", "close", "expected"),
    [
        ("ab \n", "</s>\n", "ab \n</s>"),
        ("ab \n", "", "ab \n"),  # nothing closes it: its own line break stays
        ("", "</s>\n", "</s>"),
        ("", "\n", ""),
    ],
)
def test_an_answer_ends_with_what_closes_it(content, close, expected):
    source = f"{{% for m in messages %}}[{{{{ m.role }}}}]{{{{ m.content }}}}{close}{{% endfor %}}"
    source += "{% if add_generation_prompt %}[assistant]{% endif %}" + "{{ '' }}"
    text, spans = ChatTemplate(source).spans(turns("q", content))
    assert [text[begin:end] for begin, end in spans] == [expected]


@pytest.mark.parametrize("tags", [False, True])
def test_only_what_comes_behind_the_first_messages_counts(tags):
    template = ChatTemplate(tagged(TEMPLATES["qwen"], tags))
    messages = turns("a", "b", "c", "d")
    text, spans = template.spans(messages, first=3)
    assert [text[begin:end] for begin, end in spans] == ["d<|im_end|>"]
