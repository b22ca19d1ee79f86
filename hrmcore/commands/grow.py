"""`hrmcore grow`: the command around `hrmcore.growth.files`."""

from __future__ import annotations

import argparse

EXAMPLE = """\
examples:
  hrmcore grow checkpoint/ wider/ --hidden-size 512 --heads 8
  hrmcore grow checkpoint/ deeper/ --layers 6 --interleaved
  hrmcore grow run/ larger-run/ --hidden-size 512 --ffn 1536 --mode ramped --mask-steps 200

The last one grows the newest training state of a run: weights, averages and the optimizer's state. To train on, write
the larger sizes into [model] of the run file, and out = "larger-run/".

the embedded model as the checkpoint:
  hrmcore grow $(python -c "import hrmcore.engine; print(hrmcore.engine.EMBEDDED_MODEL)") wider/ --ffn 1024
"""

# Of a config's key, the flag and what it says.
_SIZES = {
    "hidden_size": ("--hidden-size", "width of the residual stream"),
    "num_layers_per_stack": ("--layers", "layers of each stack, L and H alike"),
    "L_layers": ("--L-layers", "layers of L alone"),
    "H_layers": ("--H-layers", "layers of H alone; if they differ from L's, only hrmcore loads the result"),
    "intermediate_size": ("--ffn", "width of the FFN"),
    "num_attention_heads": ("--heads", "heads of attention"),
    "vocab_size": ("--vocab-size", "tokens of the vocabulary"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hrmcore grow`."""
    parser.epilog = EXAMPLE
    parser.add_argument("checkpoint", help="checkpoint folder, cached hub id, run folder or training state")
    parser.add_argument("out", help="folder to write; it must not exist")
    for name, (flag, described) in _SIZES.items():
        parser.add_argument(flag, dest=name, type=int, metavar="N", help=f"{described}; at least as before")
    parser.add_argument(
        "--cycles",
        nargs=2,
        type=int,
        metavar=("H", "L"),
        help="cycles of H and of L; other cycles than before need --change-function",
    )
    parser.add_argument(
        "--change-function", action="store_true", help="allow cycles that change what the model computes (experimental)"
    )
    parser.add_argument(
        "--interleaved", action="store_true", help="new layers between the old ones, not on top (experimental)"
    )
    parser.add_argument(
        "--mode",
        default="zero",
        help="how new entries begin: zero, or ramped (experimental), random and rising over --mask-steps steps (zero)",
    )
    parser.add_argument("--mask-steps", type=int, default=0, metavar="N", help="training steps that mode ramped takes")
    parser.add_argument("--seed", type=int, default=0, help="seed of the new entries (0)")


def run(args: argparse.Namespace) -> int:
    """Grow from file to file; the source is left as it is."""
    from hrmcore import planner
    from hrmcore.growth.files import grow_files

    sizes = {name: getattr(args, name) for name in _SIZES if getattr(args, name) is not None}
    if args.cycles:
        sizes |= {"H_cycles": args.cycles[0], "L_cycles": args.cycles[1]}
    names = ("change_function", "interleaved", "mode", "mask_steps", "seed")
    if not sizes:
        raise ValueError(f"say what grows: {', '.join(flag for flag, _ in _SIZES.values())} or --cycles")
    if args.cycles and not args.change_function:
        raise ValueError("other cycles change what the model computes; if that is meant, add --change-function")
    growth = grow_files(args.checkpoint, args.out, sizes, **{name: getattr(args, name) for name in names})
    before, after = (planner.parameters(config) / 1e6 for config in (growth.before, growth.after))
    print(f"{args.out}: {before:.2f} M -> {after:.2f} M parameters")
    return 0
