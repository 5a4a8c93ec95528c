"""Questions and answers about functions and classes, from docstrings, signatures and doctests.

They teach the form of a conversation, not facts: turns, following up, answering in short. Which
questions are asked of an object, and in which words, is drawn at random, seeded by its name.
"""

import ast
import random
import re
from typing import NamedTuple

from mlm_jax.data.corpora.docstrings import Docstring, docstrings, documented, is_prose, marked
from mlm_jax.data.corpora.sources import Example, Package, Recipe, folded, unique

# As Qwen and others write a conversation.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SYSTEM = (
    "You are a helpful assistant.",
    "You answer questions about Python and its libraries.",
    "Answer briefly and correctly.",
)
OPENING = {  # questions that a conversation begins with, by what they ask for
    "name": ("What in `{home}` is described like this? {summary}",
             "{summary} What is that called in `{home}`?"),
    "summary": ("Describe {x}.", "Explain {x} in short.", "What do the docs say about {x}?"),
    "signature": ("What is the signature of {x}?", "How do I call {x}?"),
    "example": ("Show me an example of {x}.", "Can you show me how {x} is used?"),
}  # fmt: skip
LATER = {  # when it is clear what of
    "more": ("Tell me more.", "What else should I know?", "Is there more to know?"),
    "signature": ("And its signature?", "How do I call it?", "Which arguments does it take?"),
    "example": ("Can you show me an example?", "Show me an example.", "How does that look?"),
}
SHORT = 300  # characters of an answer
SESSION = re.compile(r"(?:^(?:>>>|\.\.\.) .*\n)+(?:^(?!>>>|\.\.\.).+\n)+", re.MULTILINE)
ODD = re.compile(r"Traceback|doctest:|BLANKLINE|[^\0-\x7f]")


class Subject(NamedTuple):
    """name: within its module; home: the module, of a private one the package it is in.

    answers: by what is asked for, in the order in which one asks: what is told is asked no more.
    """

    name: str
    home: str
    answers: dict[str, str]

    @property
    def full(self) -> str:
        return f"{self.home}'s `{self.name}`"


def harvest(packages: list[Package]) -> list[Example]:
    """One conversation about each object; of those that share a name or summary, about the first.

    The source of each is the last of its object's names, so that the means of numpy and of jax are
    held out together.
    """
    found = [s for package in packages for d in docstrings(package) if (s := subject(d))]
    named = unique(found, key=lambda s: s.full)
    clear = unique(named, key=lambda s: folded(s.answers["summary"]))
    return [Example(last_name(s.name), {"messages": conversation(s)}) for s in clear]


def subject(docstring: Docstring) -> Subject | None:
    """None where it has no public name, or no summary that can stand alone."""
    name, home = docstring.name, re.split(r"(?:^|\.)_", docstring.module)[0]
    summary, more = map(sentence, [*docstring.text.split("\n\n"), ""][:2])
    if not (name and home and summary) or re.search(r"(?:^|\.)_", name):
        return None
    answers = {
        "name": f"That is `{name}`.",
        "summary": summary,
        "more": more,
        "signature": signature(docstring),
        "example": example(docstring),
    }
    return Subject(name, home, {kind: answer for kind, answer in answers.items() if answer})


def sentence(block: str) -> str:
    """A paragraph that can stand alone, with a full stop; or ''."""
    text = "" if "\n " in block else marked(block)  # that is a list
    if text[-1:].isalnum() and "\n" not in block:  # summaries often have none
        text += "."
    return text if is_prose(text) and len(text) <= SHORT else ""


def signature(docstring: Docstring) -> str:
    """'`dedent(text, width=70)`', without self; '' of a class, a property, and where it is long."""
    node = docstring.node
    if isinstance(node, ast.Module | ast.ClassDef):
        return ""
    if "property" in "".join(map(ast.unparse, node.decorator_list)):
        return ""
    arguments = re.sub(r"^(self|cls)\b(, /)?(, )?", "", ast.unparse(node.args))
    return f"`{docstring.name}({arguments})`" if len(arguments) <= 100 else ""


def example(docstring: Docstring) -> str:
    """The first session of its doctest that calls it and has a result, where that is short."""
    for session in SESSION.findall(docstring.text + "\n"):
        if f"{last_name(docstring.name)}(" in session and len(session) <= SHORT:
            return "" if ODD.search(session) else f"```python\n{session}```"
    return ""


def last_name(name: str) -> str:
    return name.rpartition(".")[2]


def conversation(s: Subject) -> list[dict[str, str]]:
    """One to four turns on it, in half of the cases after a system prompt."""
    drawn = random.Random(s.full)
    kinds = list(s.answers)
    first = drawn.choice([kind for kind in kinds if kind in OPENING])
    opening = drawn.choice(OPENING[first])
    opening = opening.format(x=s.full, home=s.home, summary=s.answers["summary"])
    turns = [(opening, s.answers[first])]
    for kind in kinds[kinds.index(first) + 1 :]:
        if kind in LATER and drawn.random() < 0.7:
            turns.append((drawn.choice(LATER[kind]), s.answers[kind]))
    system = [("system", drawn.choice(SYSTEM))] if drawn.random() < 0.5 else []
    spoken = [m for q, a in turns for m in (("user", q), ("assistant", a))]
    return [{"role": role, "content": text} for role, text in [*system, *spoken]]


RECIPE = Recipe(
    objective="chat",
    packages=documented,
    harvest=harvest,
    special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    settings={"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHATML},
)
