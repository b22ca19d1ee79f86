"""atheris on one reader, which it leads into what it has not reached. Needs the extra `fuzz`; from tests/:

python -m fuzz.guided READER [libFuzzer's options, such as -max_total_time=60]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["hrmcore"]):
    from fuzz.files import make_files
    from fuzz.found import FOUND
    from fuzz.readers import READERS, try_reader


def main(name: str, options: list[str]) -> None:
    """Begin with the whole file and the corpus; end with the first fault."""
    reader = READERS[name]
    with tempfile.TemporaryDirectory() as place:
        folder, corpus = Path(place) / "files", Path(place) / "corpus"
        folder.mkdir()
        corpus.mkdir()
        make_files(folder)
        seeds = [reader.unpack((folder / reader.file).read_bytes()), *FOUND.get(name, [])]
        for number, seed in enumerate(seeds):
            (corpus / str(number)).write_bytes(seed)

        def give(data: bytes) -> None:
            if fault := try_reader(name, folder, reader.sign(data)):
                raise AssertionError(fault)

        atheris.Setup([sys.argv[0], *options, "-timeout=5", "-max_len=65536", str(corpus)], give)
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
