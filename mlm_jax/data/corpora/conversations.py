"""Questions and answers about functions and classes, from docstrings, signatures and doctests.

They teach the form of a conversation, not facts: turns, following up, answering in short. Which
questions are asked of an object, and in which words, is drawn by a hash of its name.
"""

from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

from mlm_jax.data.corpora.docstrings import docstrings, documented, documented_sizes
from mlm_jax.data.corpora.sources import Example, Package, Recipe, folded, hashed
from mlm_jax.data.corpora.subjects import Arguments, Subject, called, subject, third_person

T = TypeVar("T")
CONVERSATIONS = 5000
# As Qwen and others write a conversation.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SYSTEM = (
    "You are a helpful assistant.",
    "You answer questions about Python and its libraries.",
    "You are a patient teacher of programming.",
    "Answer briefly and correctly.",
)
THANKS = (
    ("Thanks!", "You are welcome."),
    ("Thank you.", "Glad to help."),
    ("Great, thanks.", "You are welcome!"),
)
# The words of each question: when it opens a conversation, and later, when it is clear what of.
WORDS = {
    "what": (
        ("What does {x} do?", "What is {x} for?", "Explain {x}.", "Tell me what {x} does."),
        ("What does it do?", "And what is it for?"),
    ),
    "what is": (
        ("What is {x}?", "What is {x} for?", "Explain {x}."),
        ("What is it for?", "And what is it?"),
    ),
    "which": (
        (
            "I need something from `{home}`. {summary} Is there anything?",
            "What in `{home}` is described like this? {summary}",
            "{summary} What is that called in `{home}`?",
        ),
        (),
    ),
    "arguments": (
        ("Which arguments does {x} take?", "What arguments does {x} accept?"),
        ("Which arguments does it take?", "What does it accept?", "And its arguments?"),
    ),
    "call": (
        ("How do I call {x}?", "What is the signature of {x}?"),
        ("How do I call it?", "And its signature?"),
    ),
    "default": (
        ("What is the default of `{name}` in {x}?", "What is `{name}` in {x} if I leave it out?"),
        ("What is the default of `{name}`?", "And if I leave out `{name}`?"),
    ),
    "example": (
        ("Can you show me an example of {x}?", "Show me an example of {x}."),
        ("Can you show me an example?", "Show me an example.", "How does that look?"),
    ),
    "more": ((), ("Tell me more.", "What else should I know?", "Is there more to know?")),
    "where": (
        ("Where do I find {x}?", "How do I import {x}?"),
        ("Where do I find it?", "How do I import it?"),
    ),
}
OPENINGS = [*2 * ("what", "what is"), *(kind for kind, (opening, _) in WORDS.items() if opening)]
SAYS = {  # what a question or its answer has told besides
    "which": ("what", "what is", "where"), "call": ("arguments",), "arguments": ("call",),
}  # fmt: skip


def harvest(packages: list[Package]) -> list[Example]:
    """The conversations, in the order of a hash.

    The source of each is the last of its object's names, so that the means of numpy and of jax are
    held out together. Objects that share a name or a summary are left out: there would be several
    answers to one question.
    """
    found = [subject(package, d) for package in packages for d in docstrings(package) if d.public]
    subjects = [s for s in found if s]
    names = Counter(s.full for s in subjects)
    summaries = Counter(folded(s.summary) for s in subjects)
    clear = [s for s in subjects if names[s.full] == summaries[folded(s.summary)] == 1]
    drawn = sorted(clear, key=lambda s: hashed(s.full))[:CONVERSATIONS]
    return [Example(s.name.rpartition(".")[2], {"messages": conversation(s)}) for s in drawn]


def conversation(s: Subject) -> list[dict[str, str]]:
    """One to four turns on it, in half of the cases after a system prompt."""
    answers = answers_on(s)
    kinds = [pick([kind for kind in OPENINGS if kind in answers], s.full)]
    for _ in range(pick((0, 0, 1, 1, 2), s.full, "turns")):
        said = {told for kind in kinds for told in (kind, *SAYS.get(kind, ()))}
        more = {"what", "what is"} & said
        left = [k for k in answers if WORDS[k][1] and k not in said and (more or k != "more")]
        kinds += [pick(left, s.full, str(len(kinds)))] if left else []
    turns = [(words(s, kind, later=n > 0), answers[kind]) for n, kind in enumerate(kinds)]
    if len(turns) > 1 and pick(range(6), s.full, "thanks") == 0:
        turns.append(pick(THANKS, s.full))
    system = [("system", pick(SYSTEM, s.full))] if pick((0, 1), s.full, "system") else []
    spoken = [m for q, a in turns for m in (("user", q), ("assistant", a))]
    return [{"role": role, "content": text} for role, text in [*system, *spoken]]


def words(s: Subject, kind: str, later: bool) -> str:
    wording = pick(WORDS[kind][later], s.full, kind)
    return wording.format(x=s.full, home=s.home, summary=s.summary, name=optional(s)[0])


def answers_on(s: Subject) -> dict[str, str]:
    """What there is to say about it, by the kind of question."""
    name, default = optional(s)
    answers = {
        "what is" if s.is_class else "what": third_person(s.summary),
        "which": f"That is {s.full}.",
        "more": s.more,
        "default": f"`{default}`." if name else "",
        "example": f"```python\n{s.example}\n```" if s.example else "",
    }
    if s.is_public:
        top = s.name.partition(".")[0]
        answers["where"] = f"In the module `{s.home}`: `from {s.home} import {top}`."
    if s.arguments is not None:
        answers["arguments"] = taken(s.arguments)
        answers["call"] = f"`{called(s.name, s.arguments)}`"
    return {kind: answer for kind, answer in answers.items() if answer}


def optional(s: Subject) -> tuple[str, str]:
    """One of the arguments with a default, and that; ('', '') where there is none."""
    having = [(n, default) for n, default in s.arguments or () if default and n[0] != "_"]
    return pick(having, s.full, "default") if having else ("", "")


def taken(arguments: Arguments) -> str:
    """'It takes `a`, and optionally `b` and `c`.'"""
    needed = enumerated([f"`{name}`" for name, default in arguments if default is None])
    optional = enumerated([f"`{name}`" for name, default in arguments if default is not None])
    if needed and optional:
        return f"It takes {needed}, and optionally {optional}."
    return f"It optionally takes {optional}." if optional else f"It takes {needed or 'nothing'}."


def enumerated(names: Sequence[str]) -> str:
    """'a, b and c'"""
    return " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


def pick(options: Sequence[T], *salt: str) -> T:
    return options[hashed("/".join(salt)) % len(options)]


RECIPE = Recipe(
    objective="chat",
    packages=documented,
    sizes=documented_sizes,
    harvest=harvest,
    special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    settings={"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHATML},
)
