"""What is printed is read in a terminal of 80 columns."""

from textwrap import wrap

WIDTH = 80


def folded(text: str, indent: int = 10) -> str:
    """The text with its long lines in pieces; paths and commands stay whole."""
    pieces = (wrap(line, WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False) or [""]
              for line in text.split("\n"))
    return "\n".join(piece for line in pieces for piece in line)
