"""Writes every figure of README and docs anew from profiling/figures/*.csv: plots, tables, numbers in sentences.

python profiling/make_figures.py                            # make figures
python profiling/make_figures.py --run runs/quickstart-42   # make figures RUN=…: takes the quickstart's from a run
python profiling/make_figures.py --predictions              # make figures PREDICTIONS=1: what plan predicts, minutes
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import doc_figures  # noqa: F401 (registers everything)
from doc_figures import drawings, pages, plan_memory, plan_time, quickstart
from doc_figures.registry import ROOT
from flowgrove.files import write_text


def main() -> None:
    """Prints what it has changed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run", type=Path, metavar="FOLDER", help="the folder of a whole run of recipes/quickstart.yaml"
    )
    parser.add_argument(
        "--predictions", action="store_true", help="first predict memory and time of shipped recipes anew"
    )
    options = parser.parse_args()
    if options.predictions:
        plan_memory.write_memory()
        plan_time.write_time()
    if options.run is not None:
        try:
            quickstart.take_run(options.run)
        except ValueError as error:
            parser.error(str(error))
    changed = [path.relative_to(ROOT).as_posix() for path in drawings.redraw()]
    for page in pages.pages():
        text = pages.renewed(page)
        if text != (ROOT / page).read_text(encoding="utf-8"):
            write_text(ROOT / page, text)
            changed.append(page)
    print("\n".join(f"changed {name}" for name in changed) or "nothing has changed")


if __name__ == "__main__":
    main()
