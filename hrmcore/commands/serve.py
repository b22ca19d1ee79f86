"""`hrmcore serve`: a model behind an address, for programs that speak OpenAI's protocol and for a browser."""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import sys
from pathlib import Path

EXAMPLE = """\
examples:
  hrmcore serve
  hrmcore serve --model checkpoint/ --dtype int8 --port 9000
  hrmcore serve --model checkpoint/ --host 0.0.0.0 --api-key-file keys.txt
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"messages": [{"role": "user", "content": "Spell this word backward (example: sun -> nus): lantern"}]}'

Needs the extra `serve`: pip install 'hrmcore[serve]'.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hrmcore serve`."""
    parser.epilog = EXAMPLE
    loading = parser.add_argument_group("the model")
    loading.add_argument("--model", help="checkpoint folder or cached hub id (default: the embedded model)")
    loading.add_argument(
        "--dtype", default="auto", help="weights in float32, bfloat16, int8 or int4 (auto: as the checkpoint has them)"
    )
    loading.add_argument(
        "--kv-dtype",
        help="keys and values in float32, bfloat16 or int8, on CUDA one of the last two "
        "(default: bfloat16; float32 beside such weights)",
    )
    loading.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (cpu)")
    loading.add_argument("--threads", type=int, metavar="N", help="threads to compute with (default: all cores)")
    address = parser.add_argument_group("the address")
    address.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine only)")
    address.add_argument("--port", type=int, default=8000, metavar="P", help="port; 0 takes a free one (8000)")
    address.add_argument(
        "--api-key-file", type=Path, metavar="F", help="file of API keys, one a line; a caller must give one of them"
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-queue", type=int, default=256, metavar="N", help="answers that may wait (256)")
    limits.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="seconds in which an answer must be complete (600)"
    )
    limits.add_argument(
        "--grace", type=float, default=30.0, metavar="S", help="seconds that answers may take to end after SIGTERM (30)"
    )


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{' and '.join(missing)} missing: pip install 'hrmcore[serve]'")
    for name, value in (("--timeout", args.timeout), ("--grace", args.grace)):
        if not 0 <= value <= 1e9 or (name == "--timeout" and value == 0):
            raise ValueError(f"{name} must be a number of seconds, got {value}")
    if not 0 <= args.port < 1 << 16:
        raise ValueError(f"--port must be between 0 and 65535, got {args.port}")
    keys = read_keys(args.api_key_file) if args.api_key_file else []

    from hrmcore.commands.session import read_samples
    from hrmcore.engine.async_engine import AsyncEngine
    from hrmcore.engine.engine import load
    from hrmcore.serving.app import Service
    from hrmcore.serving.server import Server, listen

    engine = load(args.model, args.dtype, args.device, args.threads, args.kv_dtype)
    if engine.tokenizer is None:
        raise ValueError(f"{engine.source} has no tokenizer, so it cannot take a question")
    samples = [{"task": s.task, "instruction": s.instruction} for s in read_samples(engine.source)]
    name = model_name(args.model)
    service = Service(AsyncEngine(engine, args.max_queue), name, keys, samples, args.timeout)
    listener = listen(args.host, args.port)
    url = f"http://{'[%s]' if ':' in args.host else '%s'}:%d" % (args.host, listener.getsockname()[1])
    if not keys and not is_loopback(args.host):
        print(
            "hrmcore serve: warning: anyone who reaches this machine may ask the model; --api-key-file asks for a key",
            file=sys.stderr,
            flush=True,
        )

    def ready() -> None:
        print(f"{name} ({engine.dtype}) is served at\n  {url}/    a page\n  {url}/v1  OpenAI's protocol", flush=True)

    Server(service, args.grace, ready).run([listener])
    return 0


def model_name(model: str | None) -> str:
    """What callers know a model by: a hub id, or a folder's name without the path to it."""
    if model is None:
        return "hrmcore-tiny"
    return Path(model).resolve().name if Path(model).is_dir() else model


def read_keys(path: Path) -> list[str]:
    """The API keys in a file, one a line. Raises ValueError when there is none, or one that no header can carry."""
    try:
        lines = path.read_text(encoding="ascii").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: API keys are in ASCII") from None
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise ValueError(f"{path}: no API key in it; write one a line")
    if any(not key.isprintable() or " " in key for key in keys):
        raise ValueError(f"{path}: an API key is printable and has no spaces")
    return keys


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host's address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
