"""Options and arguments that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

AllowPython = Annotated[
    bool, typer.Option("--allow-python", help="let a reward named python run the file that the recipe names")
]
RecipePath = Annotated[Path, typer.Argument(help="a recipe (YAML)", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object on stdout")]
AsMarkdown = Annotated[bool, typer.Option("--markdown", help="all of them, as the page of the documentation")]
Which = Annotated[
    str | None,
    typer.Option("--checkpoint", metavar="N|best|PATH", help="after N iterations, best, or a folder; default: newest"),
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change a recipe key; may be given several times")
]
