"""Chat templates in the manner of well-known ones, written small; and conversations for them."""

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import pre_tokenizers

# Each turn in a header of its own; the system turn holds a date and the tools.
LLAMA3 = """\
{{- bos_token }}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + strftime_now("%d %b %Y") }}
{%- if tools is not none %}
{%- for tool in tools %}
{{- "\\n" + tool | tojson(indent=4) }}
{%- endfor %}
{%- endif %}
{%- if messages and messages[0].role == "system" %}
{{- "\\n" + messages[0].content | trim }}
{%- set messages = messages[1:] %}
{%- endif %}
{{- "<|eot_id|>" }}
{%- for message in messages %}
{%- set role = "ipython" if message.role == "tool" else message.role %}
{{- "<|start_header_id|>" + role + "<|end_header_id|>\\n\\n" }}
{%- if role == "assistant" %}
<SAID>
{%- if message.tool_calls %}
{{- message.tool_calls[0].function | tojson }}
{%- else %}
{{- message.content | trim }}
{%- endif %}
{{- "<|eot_id|>" }}
<DIAS>
{%- else %}
{{- message.content | trim + "<|eot_id|>" }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
{%- endif %}
"""
# ChatML with a system turn of its own; answers of tools are put together in a user turn.
QWEN = """\
{%- set first = messages[0].content if messages[0].role == "system" else "Be helpful." %}
{{- "<|im_start|>system\\n" + first }}
{%- if tools %}
{{- "\\n<tools>" }}{% for tool in tools %}{{ "\\n" + tool | tojson }}{% endfor %}{{ "\\n</tools>" }}
{%- endif %}
{{- "<|im_end|>\\n" }}
{%- for message in messages %}
{%- if message.role == "user" or (message.role == "system" and not loop.first) %}
{{- "<|im_start|>" + message.role + "\\n" + message.content + "<|im_end|>\\n" }}
{%- elif message.role == "assistant" %}
{{- "<|im_start|>assistant\\n" }}
<SAID>
{{- message.content or "" }}
{%- for call in message.tool_calls or [] %}
{{- "\\n<tool_call>\\n" + call.function | tojson + "\\n</tool_call>" }}
{%- endfor %}
{{- "<|im_end|>" }}
<DIAS>
{{- "\\n" }}
{%- elif message.role == "tool" %}
{%- if loop.first or messages[loop.index0 - 1].role != "tool" %}{{ "<|im_start|>user" }}{% endif %}
{{- "\\n<tool_response>\\n" + message.content + "\\n</tool_response>" }}
{%- if loop.last or messages[loop.index0 + 1].role != "tool" %}{{ "<|im_end|>\\n" }}{% endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}{% endif %}
"""
# No generation prompt, strict turns, an answer that begins with a space.
MISTRAL = """\
{%- if messages[0].role == "system" %}
{%- set system = messages[0].content + "\\n\\n" %}
{%- set messages = messages[1:] %}
{%- endif %}
{{- bos_token }}
{%- for message in messages %}
{%- if (message.role == "user") != (loop.index0 % 2 == 0) %}
{{- raise_exception("turns must alternate user/assistant/user/assistant/...") }}
{%- endif %}
{%- if message.role == "user" %}
{{- "[INST] " + (system | default("") if loop.first else "") + message.content + " [/INST]" }}
{%- elif message.role == "assistant" %}
<SAID>
{{- " " + message.content | trim + eos_token }}
<DIAS>
{%- else %}
{{- raise_exception("only user and assistant, not " + message.role) }}
{%- endif %}
{%- endfor %}
"""
TEMPLATES = {"llama3": LLAMA3, "qwen": QWEN, "mistral": MISTRAL}
SPECIAL = (
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "[INST]", "[/INST]",
)  # fmt: skip
# Of Llama 3 and Qwen: line breaks are a token whatever comes behind them.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

TOOL = {"type": "function", "function": {"name": "add", "description": "a < b & 'c' — é"}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2, "<x>"]}}}


def chat_backend(words: str | None = WORDS) -> tokenizers.Tokenizer:
    """The golden BPE with the special tokens; words: how texts are cut, None: as GPT-2 does."""
    golden = Path(__file__).parents[1] / "golden/data/tokenizer/tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(golden))
    backend.add_special_tokens(list(SPECIAL))
    if words:
        split = pre_tokenizers.Split(tokenizers.Regex(words), behavior="isolated")
        as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    return backend


def turns(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    """user, assistant, user, ... with these contents."""
    said = [
        {"role": ("user", "assistant")[i % 2], "content": content}
        for i, content in enumerate(contents)
    ]
    return [{"role": "system", "content": system}] * (system is not None) + said


CONVERSATIONS: dict[str, dict[str, Any]] = {
    "one": {"messages": turns("What is 1 + 1?", "Two.")},
    "system": {"messages": turns("Hi", "Hello there!", system="  Answer briefly. ")},
    "many": {"messages": turns("a", "Bé\n\n def f():\n    0", "漢字 🙂?", "  spaces  ", "b", "c")},
    "open": {"messages": turns("a", "b", "a question without an answer")},
    "tools": {
        "messages": [
            *turns("What is 1 + 2?", system="Use tools."),
            {"role": "assistant", "content": "Adding.", "tool_calls": [CALL]},
            {"role": "tool", "content": "3", "name": "add"},
            {"role": "assistant", "content": "It is 3."},
        ],
        "tools": [TOOL],
    },
}  # fmt: skip


def tagged(template: str, tags: bool) -> str:
    """With the assistant's part in `generation` tags, or without."""
    begin, end = ("{%- generation %}", "{%- endgeneration %}") if tags else ("", "")
    return template.replace("<SAID>\n", begin).replace("<DIAS>\n", end)
