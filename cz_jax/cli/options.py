"""Arguments that several commands share."""

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else, on stdout.")]
Settings = Annotated[list[str], typer.Argument(metavar="section.key=value", help="Laid over the file's values.")]
Sets = Annotated[list[str], typer.Option("--set", metavar="section.key=value", help="A setting; may be repeated.")]
