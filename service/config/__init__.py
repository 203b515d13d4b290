"""Settings of the commands: one definition gives flags, environment, configuration file and the tables of docs/cli.md.

`definition` says what exists, `describe` puts it into words, `flags` reads argument lists, `load` joins the sources and gives
`types/settings`, `bundled` finds the models that come with the program.
Only `cli` imports this room. Invariant: nothing outside this package reads the environment.
"""
