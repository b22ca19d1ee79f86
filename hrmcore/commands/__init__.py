"""The subcommands of `hrmcore`, one module each: `add_arguments(parser)` and `run(args) -> int`."""
