"""What a compiled program sends between devices, read from XLA's text of it."""

import math
import re
from functools import cached_property, partial
from typing import Any, NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
PASSED_ON = ("get-tuple-element", "bitcast", "copy", "convert", "add", "transpose", "reshape")
HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
SHAPE = re.compile(r"\b([a-z]+(\d+)?\w*)\[([\d,]*)\]")
NAME = re.compile(r"%([\w.\-]+)")
CALLED = re.compile(r"(?:calls|to_apply|body|condition|\w+_computations?)=(%[\w.\-]+|\{%[^}]*\})")
TRIP_COUNT = re.compile(r'known_trip_count"?:\{"?n"?:"(\d+)"')
OP_NAME = re.compile(r'op_name="([^"]*)"')


class Collective(NamedTuple):
    kind: str  # one of KINDS; an all-reduce of which each device keeps a slice is a reduce-scatter
    shapes: tuple[tuple[int, ...], ...]  # of the results on one device; several where XLA combined
    bytes: int  # of all results on one device; of a reduce-scatter, before it is scattered
    times: int  # how often a step runs it: trip counts of the loops around it, multiplied
    looped: bool  # inside a loop, such as the scan over layers
    op_name: str  # where in the traced program: "jit(train_step)/transpose(jvp())/while/body/add"

    @property
    def backward(self) -> bool:
        return "transpose(" in self.op_name

    @property
    def recomputed(self) -> bool:
        return "rematted_computation" in self.op_name


class Instruction(NamedTuple):
    name: str
    opcode: str
    type: str  # of the result: f32[8,32]{1,0}, or a tuple of these
    operands: tuple[str, ...]
    rest: str  # what follows the operands, metadata included


def collectives(text: str) -> list[Collective]:
    """All collectives of a compiled program, from `compiled.as_text()`."""
    return Program(text).collectives()


class Program:
    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        inside: list[Instruction] = []
        for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
            if header := HEADER.match(line):
                inside = self.computations.setdefault(header[2], [])
                self.entry = header[2] if header[1] else self.entry
            elif found := INSTRUCTION.match(line):
                inside.append(parse(found[1], found[2]))

    def collectives(self) -> list[Collective]:
        found = []
        for computation, (times, looped) in self.runs.items():
            for op in self.computations[computation]:
                kind = op.opcode.removesuffix("-start")
                if kind not in KINDS:
                    continue
                if kind == "all-reduce" and self.scattered(computation, op):
                    kind = "reduce-scatter"
                shapes, size = shapes_of(op)
                where = OP_NAME.search(op.rest)
                found.append(
                    Collective(kind, shapes, size, times, looped, where[1] if where else "")
                )
        return found

    @cached_property
    def runs(self) -> dict[str, tuple[int, bool]]:
        """Of each computation reached from the entry: how often it runs, and whether in a loop."""
        runs = {name: (0, False) for name in self.computations}

        def visit(name: str, times: int, looped: bool) -> None:
            runs[name] = (runs[name][0] + times, runs[name][1] or looped)
            for op in self.computations[name]:
                loop, trips = op.opcode == "while", TRIP_COUNT.search(op.rest)
                each = times * int(trips[1] if trips else 1)  # of unknown length: at least once
                for callee in set(called(op)) & self.computations.keys():
                    visit(callee, each, looped or loop)

        visit(self.entry, 1, False)
        return {name: run for name, run in runs.items() if run[0]}

    def scattered(self, computation: str, op: Instruction, outside: Any = lambda: False) -> bool:
        """Whether each device uses only a slice of op's result.

        XLA's CPU backend has no reduce-scatter: it writes an all-reduce and a dynamic-slice, which
        may be fused with what comes before or after it. outside: for what a fusion hands back.
        """
        users = [user for user in self.computations[computation] if op.name in user.operands]
        if not users:
            return outside()
        return all(self.sliced(computation, op, user, outside) for user in users)

    def sliced(self, computation: str, op: Instruction, user: Instruction, outside: Any) -> bool:
        if user.opcode == "dynamic-slice":
            return user.operands[0] == op.name
        if user.opcode in PASSED_ON:
            return self.scattered(computation, user, outside)
        if user.opcode != "fusion":
            return False
        fused = called(user)[0]
        places = {str(i) for i, operand in enumerate(user.operands) if operand == op.name}
        inside = [p for p in self.computations[fused] if p.opcode == "parameter"]
        on = partial(self.scattered, computation, user, outside)
        return all(self.scattered(fused, p, on) for p in inside if p.operands[0] in places)


def parse(name: str, text: str) -> Instruction:
    kind, text = split_off(text) if text.startswith("(") else text.split(" ", 1)
    opcode, _, text = text.strip().partition("(")
    operands, rest = split_off("(" + text)
    names = [operands[1:-1]] if opcode == "parameter" else NAME.findall(operands)
    return Instruction(name, opcode, kind, tuple(names), rest)


def called(op: Instruction) -> list[str]:
    """The computations that op runs."""
    return [name for names in CALLED.findall(op.rest) for name in NAME.findall(names)]


def split_off(text: str) -> tuple[str, str]:
    """The parenthesised group that text starts with, and what follows it."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[: i + 1], text[i + 1 :]
    raise ValueError(f"no closing parenthesis in {text[:80]!r}")


def shapes_of(op: Instruction) -> tuple[tuple[tuple[int, ...], ...], int]:
    found = SHAPE.findall(op.type)
    if op.opcode in ("all-gather-start", "collective-permute-start"):
        found = found[len(found) // 2 :]  # its type is (operands, results)
    shapes = tuple(tuple(map(int, filter(None, dims.split(",")))) for _, _, dims in found)
    widths = [int(bits or 8) / 8 for _, bits, _ in found]  # pred has no number
    size = sum(math.prod(shape) * width for shape, width in zip(shapes, widths, strict=True))
    return shapes, int(size)
