"""Fail the build when a non-baseline kernel object defines a weak symbol outside its instruction set's namespace.

The linker keeps one copy of every weak (inline) function. If objects built with different -march flags shared one,
a machine without AVX-512 could end up running the AVX-512 copy.
"""

import re
import subprocess
import sys

ISA_NAMESPACE = re.compile(r"hrmcore::(avx2|avxvnni|avx512|vnni|bf16|amx|dotprod|i8mm)::")


def main() -> int:
    nm, objects = sys.argv[1], [o for arg in sys.argv[2:] for o in arg.split(";")]
    leaks = []
    for path in objects:
        listing = subprocess.run([nm, "-C", "--defined-only", path], check=True, capture_output=True, text=True).stdout
        for line in listing.splitlines():
            kind, name = line[17:18], line[19:]
            if kind in "WVu" and not ISA_NAMESPACE.search(name) and not name.startswith("DW.ref."):
                leaks.append(f"{path}: {name}")
    if leaks:
        print("weak symbols shared between instruction sets:", *leaks, sep="\n  ", file=sys.stderr)
    return 1 if leaks else 0


if __name__ == "__main__":
    sys.exit(main())
