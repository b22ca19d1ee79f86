"""What `cuobjdump -sass` says of compiled kernels: their instructions, loops, and the shortest ways through them.

A way is counted in instructions of a warp. It may be asked to pass given work, so many tensor core products, stores or
barriers, or blocks by their number: without that the shortest one would take every branch that skips. Calls are slow
paths of arithmetic that nothing takes (a denormal's square root) and count as one instruction.
"""

from __future__ import annotations

import heapq
import itertools
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

BYTES = 16  # of an instruction
CODE = re.compile(r"code for (sm_\w+)|arch = (sm_\w+)")
FUNCTION = re.compile(r"Function : (\S+)")
LINE = re.compile(r"\s+/\*([0-9a-f]{4,6})\*/\s+(?:(@!?U?P\w+) )?\s*([\w.]+)(.*?);")
TARGET = re.compile(r"(0x[0-9a-f]+)\s*$")
TABLE = re.compile(r"\.nv\.constant2\.(\S+)")  # a kernel's addresses that it jumps to by a number
ENTRY = re.compile(r"c\[0x2\]\[R\d+(?:\+(0x[0-9a-f]+))?\]")  # where it reads one: the table's beginning
DIVISION = ("I2F.RP", "I2F.U32.RP", "I2F.U64.RP", "I2F.S64.RP")  # how a division of integers begins


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str  # a predicate, or empty
    opcode: str
    operands: str

    def counts_as(self, kind: str) -> bool:
        """Whether it is of a kind: an opcode, or one with its first modifiers (LDG, MUFU.EX2)."""
        return self.opcode == kind or self.opcode.startswith(kind + ".")

    @property
    def is_branch(self) -> bool:
        """A call under a condition is one: sm_80 leaves loops so, and no subroutine is called like that."""
        return self.counts_as("BRA") or (self.counts_as("CALL") and bool(self.guard))

    @property
    def target(self) -> int | None:
        """Where a branch goes. One that only a warp which has come apart takes is none."""
        if not self.is_branch or ".DIV" in self.opcode:
            return None
        found = TARGET.search(self.operands)
        return int(found[1], 16) if found else None

    @property
    def falls_through(self) -> bool:
        if ".CONV" in self.opcode:  # taken by a warp that is together
            return False
        ends = self.is_branch or any(self.counts_as(kind) for kind in ("EXIT", "RET", "BRX"))
        conditional = bool(self.guard) or re.match(r"\s+!?U?P\d", self.operands) is not None or ".DIV" in self.opcode
        return not ends or conditional


@dataclass
class Block:
    """Instructions that run one after the other."""

    instructions: list[Instruction]
    after: list[int] = field(default_factory=list)

    def count(self, kind: str) -> int:
        return sum(i.counts_as(kind) for i in self.instructions)


@dataclass(frozen=True)
class Loop:
    """A natural loop: its first block, and all of its blocks."""

    head: int
    blocks: frozenset[int]


class Kernel:
    """One compiled kernel as a graph of blocks."""

    def __init__(self, name: str, instructions: list[Instruction], addresses: Sequence[int] = ()) -> None:
        """`addresses`: of its tables of jumps, one after the other."""
        self.name = name
        self.instructions = instructions
        self.blocks = _blocks(instructions, _jumps(instructions, addresses))

    @property
    def code_bytes(self) -> int:
        return BYTES * len(self.instructions)

    def count(self, blocks: Iterable[int], kind: str) -> int:
        return sum(self.blocks[b].count(kind) for b in blocks)

    def size(self, blocks: Iterable[int]) -> int:
        return sum(len(self.blocks[b].instructions) for b in blocks)

    @cached_property
    def reachable(self) -> frozenset[int]:
        return frozenset(_reach(0, lambda b: self.blocks[b].after))

    @cached_property
    def loops(self) -> list[Loop]:
        """Innermost first. Loops with one head are one loop."""
        dominators = self._dominators
        before: dict[int, list[int]] = {b: [] for b in self.reachable}
        for b in self.reachable:
            for after in self.blocks[b].after:
                before[after].append(b)
        bodies: dict[int, set[int]] = {}
        for b in sorted(self.reachable):
            for head in self.blocks[b].after:
                if head in dominators[b]:
                    body = bodies.setdefault(head, {head})
                    body.update(_reach(b, lambda x, head=head: () if x == head else before[x]))
        return sorted((Loop(h, frozenset(body)) for h, body in bodies.items()), key=lambda loop: len(loop.blocks))

    @cached_property
    def _dominators(self) -> dict[int, frozenset[int]]:
        order = sorted(self.reachable)
        before: dict[int, list[int]] = {b: [] for b in order}
        for b in order:
            for after in self.blocks[b].after:
                before[after].append(b)
        found: dict[int, frozenset[int]] = dict.fromkeys(order, self.reachable)
        found[0] = frozenset((0,))
        changed = True
        while changed:
            changed = False
            for b in order[1:]:
                new = frozenset.intersection(*(found[p] for p in before[b])) | {b}
                if new != found[b]:
                    found[b], changed = new, True
        return found

    def innermost(self, *kinds: str) -> list[Loop]:
        """Loops that hold all of these and no smaller loop that does, in the order of the code."""
        chosen: list[Loop] = []
        for loop in self.loops:
            if all(self.count(loop.blocks, kind) for kind in kinds) and not any(
                inner.blocks < loop.blocks for inner in chosen
            ):
                chosen.append(loop)
        return sorted(chosen, key=lambda loop: loop.head)

    def around(self, loop: Loop) -> Loop | None:
        """The smallest loop around this one."""
        return next((outer for outer in self.loops if loop.blocks < outer.blocks), None)

    def once_round(self, loop: Loop, work: Mapping[str | int, int], without: Iterable[int] = ()) -> int | None:
        """Instructions of the shortest turn that does this work."""
        return self.shortest(loop.head, lambda b: loop.head in self.blocks[b].after, work, loop.blocks - set(without))

    def through(self, work: Mapping[str | int, int], without: Iterable[int] = ()) -> int | None:
        """Instructions of the shortest way from the beginning to an end that does this work."""
        ends = {b for b in self.reachable if any(i.counts_as("EXIT") for i in self.blocks[b].instructions)}
        return self.shortest(0, ends.__contains__, work, self.reachable - set(without))

    def shortest(
        self, first: int, ends: Callable[[int], bool], work: Mapping[str | int, int], blocks: Iterable[int]
    ) -> int | None:
        """Dijkstra's algorithm over (block, work done so far); work above what is asked for is not told apart."""
        allowed, kinds = set(blocks), list(work)
        does = {
            b: tuple(int(b == k) if isinstance(k, int) else self.blocks[b].count(k) for k in kinds) for b in allowed
        }
        asked = tuple(work[kind] for kind in kinds)

        def with_work_of(b: int, done: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(min(x + y, most) for x, y, most in zip(done, does[b], asked, strict=True))

        start = (first, with_work_of(first, (0,) * len(kinds)))
        queue, seen = [(len(self.blocks[first].instructions), *start)], set()
        while queue:
            length, b, done = heapq.heappop(queue)
            if (b, done) in seen:
                continue
            seen.add((b, done))
            if done == asked and ends(b):
                return length
            for after in self.blocks[b].after:
                if after in allowed:
                    state = (after, with_work_of(after, done))
                    if state not in seen:
                        heapq.heappush(queue, (length + len(self.blocks[after].instructions), *state))
        return None

    def calls(self, blocks: Iterable[int]) -> int:
        return sum(i.counts_as("CALL") and not i.is_branch for b in blocks for i in self.blocks[b].instructions)

    def divisions(self, blocks: Iterable[int]) -> int:
        """Divisions of integers."""
        return sum(i.opcode in DIVISION for b in blocks for i in self.blocks[b].instructions)


def parse(text: str, elf: str = "") -> dict[str, dict[str, Kernel]]:
    """Target -> mangled name -> kernel. `elf` is what `cuobjdump -elf` says, for kernels that jump by a table."""
    code: dict[str, dict[str, list[Instruction]]] = {}
    target = name = ""
    for line in text.splitlines():
        if found := CODE.search(line):
            target = found[1] or found[2]
        elif found := FUNCTION.search(line):
            name = found[1]
            code.setdefault(target, {})[name] = []
        elif name and (found := LINE.match(line)):
            instruction = Instruction(int(found[1], 16), found[2] or "", found[3], found[4])
            code[target][name].append(instruction)
    tables = _tables(elf)
    return {
        t: {n: Kernel(n, found, tables.get((t, n), ())) for n, found in kernels.items()} for t, kernels in code.items()
    }


def _tables(elf: str) -> dict[tuple[str, str], list[int]]:
    """(Target, mangled name) -> the words of its tables of jumps."""
    tables: dict[tuple[str, str], list[int]] = {}
    target, words = "", None
    for line in elf.splitlines():
        if found := CODE.search(line):
            target = found[1] or found[2]
        elif found := TABLE.match(line):
            words = tables.setdefault((target, found[1]), [])
        elif words is not None and line.startswith("0x"):
            words += [int(word, 16) for word in line.split()]
        else:
            words = None
    return tables


def _jumps(instructions: list[Instruction], addresses: Sequence[int]) -> dict[int, list[int]]:
    """Where each jump by a table goes, by its address: its table reaches to the next one."""
    begins: dict[int, int] = {}
    last = 0
    for instruction in instructions:
        if found := ENTRY.search(instruction.operands):
            last = int(found[1] or "0", 16)
        if instruction.counts_as("BRX"):
            begins[instruction.address] = last
    end_of = dict(itertools.pairwise([*sorted(set(begins.values())), 4 * len(addresses)]))
    return {address: sorted(set(addresses[first // 4 : end_of[first] // 4])) for address, first in begins.items()}


def cuobjdump() -> str | None:
    """The tool and nvdisasm, which it calls: on the PATH, or beside each other of PyPI's packages of their names."""
    installed = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/cuobjdump"))
    for tool in (shutil.which("cuobjdump"), *map(str, installed)):
        if tool and (shutil.which("nvdisasm") or Path(tool).with_name("nvdisasm").exists()):
            return tool
    return None


def disassembled(tool: str, binary: Path, targets: Iterable[str] = ()) -> dict[str, dict[str, Kernel]]:
    """All kernels of a library, object or cubin; of a library's targets these alone."""
    text = elf = ""
    for arguments in [["-arch", target] for target in targets] or [[]]:
        command = [tool, "-sass", *arguments, str(binary)]
        text += subprocess.run(command, capture_output=True, text=True, check=True).stdout
        if " BRX " in text:
            command[1] = "-elf"
            elf += subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return parse(text, elf)


def _reach(first: int, after: Callable[[int], Iterable[int]]) -> set[int]:
    seen, todo = {first}, [first]
    while todo:
        for b in after(todo.pop()):
            if b not in seen:
                seen.add(b)
                todo.append(b)
    return seen


def _blocks(instructions: list[Instruction], jumps: Mapping[int, list[int]]) -> list[Block]:
    starts = {instructions[0].address, *(target for targets in jumps.values() for target in targets)}
    for i, instruction in enumerate(instructions):
        ends = instruction.target is not None or not instruction.falls_through or instruction.counts_as("EXIT")
        if instruction.target is not None:
            starts.add(instruction.target)
        if ends and i + 1 < len(instructions):
            starts.add(instructions[i + 1].address)
    blocks = list(_split(instructions, starts))
    number = {block.instructions[0].address: b for b, block in enumerate(blocks)}
    for b, block in enumerate(blocks):
        last = block.instructions[-1]
        if last.target is not None and last.target in number:
            block.after.append(number[last.target])
        block.after += [number[target] for target in jumps.get(last.address, ())]
        if last.falls_through and b + 1 < len(blocks):
            block.after.append(b + 1)
    return blocks


def _split(instructions: list[Instruction], starts: set[int]) -> Iterator[Block]:
    block: list[Instruction] = []
    for instruction in instructions:
        if block and instruction.address in starts:
            yield Block(block)
            block = []
        block.append(instruction)
    yield Block(block)
