"""Count the instructions of the GEMM's hot loops on aarch64: what stands in for their speed where no such machine is.

usage: check_neon.py BUILD TABLE [--update]   BUILD: a build folder of the preset aarch64; TABLE: the committed figures

The loop is a tile's innermost; weights are what it loads as whole registers, for activations come by the lane.
Fails when the figures are not the committed ones, and when a loop goes to the stack. As with check_ptxas.py, figures
of another compiler are not compared.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from committed import compare

SETS = ("generic", "dotprod", "i8mm")
# Symbol -> what it is; the cells are numbered as in gemm.cpp.
TILES = {
    r"float_tile<\(.*Cells\)0, 1>": "float32, 1 token",
    r"float_tile<\(.*Cells\)1, 1>": "bfloat16, 1 token",
    r"int_tile<\(.*Cells\)2, 1>": "int8, 1 token",
    r"int_tile<\(.*Cells\)3, 1>": "int4, 1 token",
    r"float_tile<\(.*Cells\)0, 6>": "float32 or bfloat16, 6 tokens",
    r"int_tile<\(.*Cells\)2, 3>": "int8, 3 tokens",
    r"int_tile<\(.*Cells\)4, 3>": "int4, 3 tokens",
    r"pair_tile<3>": "int8 or int4, 6 tokens",
}
PRODUCTS = {"fmla": 4, "sdot": 16, "usdot": 16, "smull": 8, "smull2": 8, "smmla": 32}
FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")
INSTRUCTION = re.compile(r"^ +([0-9a-f]+):\t(\S+)(?:\t(.*))?$")


class Instruction(NamedTuple):
    address: int
    name: str
    operands: str

    @property
    def weight_bytes(self) -> int:
        whole = len(re.findall(r"\bq\d+", self.operands))
        return 16 * whole if self.name in ("ldr", "ldp", "ldur") else 0


class Loop(NamedTuple):
    instructions: int
    weight_bytes: int
    products: int


def disassembled(binary: Path) -> dict[str, list[Instruction]]:
    command = ["aarch64-linux-gnu-objdump", "-d", "-C", "--no-show-raw-insn", str(binary)]
    functions: dict[str, list[Instruction]] = {}
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        if function := FUNCTION.match(line):
            body = functions.setdefault(function[1], [])
        elif found := INSTRUCTION.match(line):
            body.append(Instruction(int(found[1], 16), found[2], found[3] or ""))
    return functions


def hot_loop(what: str, body: list[Instruction]) -> Loop:
    """The loop with the most products an instruction. Exits when it goes to the stack."""
    loops = []
    for last, instruction in enumerate(body):
        target = re.match(r"(?:\w+, )?([0-9a-f]+) <", instruction.operands)
        if not target or not re.match(r"(b|cbn?z|tbn?z)(\.|$)", instruction.name):
            continue
        if int(target[1], 16) >= instruction.address:
            continue
        inside = [i for i in body[: last + 1] if i.address >= int(target[1], 16)]
        if products := sum(PRODUCTS.get(i.name, 0) for i in inside):
            loops.append((products, inside))
    products, inside = max(loops, key=lambda loop: loop[0] / len(loop[1]))
    if spills := [f"{i.name} {i.operands}" for i in inside if "[sp" in i.operands and re.search(r"\bq\d", i.operands)]:
        sys.exit(f"the hot loop of {what} keeps vectors on the stack: {', '.join(spills)}")
    return Loop(len(inside), sum(i.weight_bytes for i in inside), products)


def table(build: Path, compiler: str) -> str:
    rows: dict[str, dict[str, Loop]] = {}
    for isa in SETS:
        functions = disassembled(build / f"CMakeFiles/kernels_{isa}.dir/csrc/gemm/gemm.cpp.o")
        for pattern, what in TILES.items():
            for name, body in functions.items():
                if re.search(pattern, name):
                    rows.setdefault(what, {})[isa] = hot_loop(f"{what}, {isa}", body)
    if set(rows) != set(TILES.values()):
        sys.exit(f"no code found for {', '.join(set(TILES.values()) - set(rows))}")
    width = max(map(len, rows))
    lines = [f"the GEMM's hot loops on aarch64, no vector on the stack; {compiler}"]
    for title, figure in [
        ("instructions a byte of weights", lambda loop: f"{loop.instructions / loop.weight_bytes:.3f}"),
        ("products an instruction", lambda loop: f"{loop.products / loop.instructions:.2f}"),
    ]:
        lines += ["", f"{title:<{width}}" + "".join(f"{isa:>9}" for isa in SETS)]
        for what in TILES.values():
            cells = [figure(rows[what][isa]) if isa in rows[what] else "-" for isa in SETS]
            lines.append(f"{what:<{width}}" + "".join(f"{cell:>9}" for cell in cells))
    return "\n".join(lines) + "\n"


def main() -> None:
    build, path = Path(sys.argv[1]), Path(sys.argv[2])
    version = subprocess.run(["aarch64-linux-gnu-g++", "-dumpfullversion"], capture_output=True, text=True, check=True)
    found = table(build, f"GCC {version.stdout.strip()}")
    compare({path: found}, "give --update")


if __name__ == "__main__":
    main()
