"""The subcommands of `hrmcore`, one module each: `add_arguments(parser)` and `run(args) -> int`.

`options` and `session` are what these modules are made of, and no commands themselves.
"""
