"""Fail when a CUDA kernel spills registers or uses a stack on any target; print what each one takes.

usage: check_ptxas.py LOG TABLE [--update]   LOG: what nvcc printed under -Xptxas=-v; TABLE: the committed figures

Registers fit the launch bounds by construction: ptxas spills rather than exceed them. Dynamic shared memory is chosen
at the launch and bounded there by static_assert. The table is compared when it was made by the same ptxas, since
another one allocates registers differently.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from committed import compare

ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(sm_\w+)'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
FILE = re.compile(r"_GLOBAL__N__\w+?_\d+_(\w+)_cu_")


def readable(mangled: str) -> str:
    """rms_norm: forward<float, 4> for a kernel in an unnamed namespace of rms_norm.cu."""
    plain = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    for part in ("(anonymous namespace)::", "hrmcore::", "cuda::"):
        plain = plain.replace(part, "")
    plain = plain.removeprefix("void ")
    file = FILE.search(mangled)
    return f"{file[1] if file else '?'}: {plain[: plain.rindex('(')]}"


def parse(log: str) -> dict[str, dict[str, int]]:
    """Kernel -> target -> registers. Exits on a spill or a stack."""
    kernels: dict[str, dict[str, int]] = {}
    name = target = ""
    faults = []
    for line in log.splitlines():
        if entry := ENTRY.search(line):
            name, target = readable(entry[1]), entry[2]
        elif name and (stack := STACK.search(line)):
            if stack.groups() != ("0", "0", "0"):
                faults.append(f"{name} on {target}: {stack[0]}")
        elif name and (used := REGISTERS.search(line)):
            kernels.setdefault(name, {})[target] = int(used[1])
            name = ""
    if faults:
        sys.exit("\n".join(["kernels that spill or need a stack:", *faults]))
    if not kernels:
        sys.exit("no kernel in the log: was it built with -Xptxas=-v?")
    return kernels


def table(kernels: dict[str, dict[str, int]], compiler: str) -> str:
    targets = sorted({t for row in kernels.values() for t in row}, key=lambda t: int(t[3:]))
    missing = [name for name, row in kernels.items() if set(row) != set(targets)]
    if missing:
        sys.exit(f"not compiled for every one of {', '.join(targets)}: {', '.join(missing)}")
    width = max(map(len, kernels))
    lines = [f"registers a thread, no spills, no stack; {compiler}", " " * width + "".join(f"{t:>8}" for t in targets)]
    lines += [f"{name:<{width}}" + "".join(f"{kernels[name][t]:>8}" for t in targets) for name in sorted(kernels)]
    return "\n".join(lines) + "\n"


def main() -> None:
    log, path = Path(sys.argv[1]).read_text(encoding="utf-8"), Path(sys.argv[2])
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = table(parse(log), "nvcc " + re.findall(r"V([\d.]+)", version)[0])
    compare({path: found}, "make cuda-table")


if __name__ == "__main__":
    main()
