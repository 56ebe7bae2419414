"""The error that a user can cause: one line that says what is wrong, where, and what to write instead.

Commands end with exit code 2.
"""

import unicodedata

_LONGEST = 2000


class UserError(ValueError):
    """Its text is shown as it is, without a traceback: always one line that a terminal can show. `everywhere`: every
    rank of the run has been told.
    """

    everywhere = False

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


def one_line(text: str, longest: int = _LONGEST) -> str:
    """A text that may quote anything, as one line of at most `longest` characters.

    Line ends are spaces; what controls a terminal or cannot be encoded stands as its escape.
    """
    text = " ".join(stripped for line in text[: 8 * longest].splitlines() if (stripped := line.strip()))
    shown = "".join(_escape(letter) for letter in text)
    return shown if len(shown) <= longest else shown[: longest - 3] + "..."


def _escape(letter: str) -> str:
    return ascii(letter)[1:-1] if unicodedata.category(letter) in ("Cc", "Cs") else letter
