"""For the fuzzers: an action on hostile input ends in a result or in a UserError of one line, soon,
and within memory.
"""

import resource
import signal
import threading
from contextlib import contextmanager

from flowgrove.errors import UserError

SECONDS, MEMORY_KIB = 10, 1 << 20


class HungError(BaseException):
    """No handler of the code under test may take it for an error of its input."""


@contextmanager
def bounded(case):
    """The block ends within SECONDS, and the process's peak of memory stays within MEMORY_KIB of what it was before."""

    def hung(*_):
        raise HungError(f"{case} takes longer than {SECONDS} s")

    assert threading.current_thread() is threading.main_thread()
    before, handler = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, signal.signal(signal.SIGALRM, hung)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < MEMORY_KIB, f"{case} takes {grown >> 10} MiB"


def outcome(case, action, *arguments):
    """(result, None), or (None, the error's text). Anything else fails, and names the case."""
    try:
        with bounded(case):
            return action(*arguments), None
    except UserError as error:
        text = str(error)
        assert text.strip(), f"{case}: an error without a text"
        assert len(text.splitlines()) == 1, f"{case}: {text!r}"
        assert text.isprintable() or not any(letter in text for letter in "\x1b\0\r"), f"{case}: {text!r}"
        text.encode()
        return None, text
    except BaseException as error:
        raise AssertionError(f"{case}: {type(error).__name__}: {str(error)[:300]}") from error


def damaged(draw, content, texts=None):
    """Bytes with one to four of the things that happen to files; with `texts`, those written over and between."""
    content = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at, length = draw.randrange(len(content) + 1), draw.choice((1, 1, 2, 8, 64))
        if texts is not None:
            content[at : at + draw.randrange(2)] = draw.choice(texts).encode()
            continue
        match draw.randrange(7):
            case 0:
                content[at : at + length] = draw.randbytes(length)
            case 1:
                content[at:at] = draw.randbytes(length)
            case 2:
                del content[at : at + length]
            case 3:
                del content[at:]
            case 4:
                content[at:at] = content[at : at + length] * draw.choice((2, 3, 500))
            case 5:
                content[at : at + length] = bytes(length)
            case _:
                content[at:at] = draw.choice(NASTY).encode("utf-8", "surrogatepass")
    return bytes(content)


NASTY = (
    "[", "{", "}", "]", ":", "- ", "? ", "*a", "&a ", "!!int ", "!!binary ", "<<: ", "|\n", ">", "\t", "\n", "\r", "\0",
    "%", "@", "`", "#", "---\n", "...\n", "'", '"', "\u2028", "\x85", "\ufeff", "\ud800", "\u202e", "~", "null", "true",
    "yes", "1e999", "-1", "0x", ".nan", "9" * 50, "9" * 5000, "a" * 5000, '"\\ud800"', "$_$", "../", "/dev/zero",
)  # fmt: skip
