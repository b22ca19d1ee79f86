"""Exit with 0 when the torch of this environment is built for CUDA, without importing it: that takes seconds."""

import importlib.util
import runpy
import sys
from pathlib import Path

spec = importlib.util.find_spec("torch")
if spec is None or spec.origin is None:
    sys.exit(1)
sys.exit(runpy.run_path(str(Path(spec.origin).with_name("version.py")))["cuda"] is None)
