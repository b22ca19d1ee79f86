"""Check and time every op, as `hrmcore bench` does, and keep the result: a JSON file and, with matplotlib, a picture.

python -m bench.speed.ops --out runs/out/ops.json
"""

import argparse
import json
import sys
from pathlib import Path

from hrmcore import microbench, plots


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", help="names of ops (default: all)")
    parser.add_argument("--threads", type=int, help="default: every processor that this process may use")
    parser.add_argument("--seconds", type=float, default=2.0, help="spent on each line (default: 2)")
    parser.add_argument("--out", type=Path, default=Path("runs/out/ops.json"), help="default: runs/out/ops.json")
    arguments = parser.parse_args()
    try:
        report = microbench.run(arguments.ops or None, arguments.threads, arguments.seconds, as_json=False)
    except ValueError as error:
        parser.error(str(error))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwrote {arguments.out}")
    picture = arguments.out.with_suffix(".png")
    try:
        plots.ops(report, picture)
    except ModuleNotFoundError as error:
        print(f"no picture: {error}")
    else:
        print(f"wrote {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
