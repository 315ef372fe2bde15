"""The command line: parse, call `build`, print. Nothing heavy is imported before a command runs."""
