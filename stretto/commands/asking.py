"""Asking before something long begins."""

from __future__ import annotations

import sys


def declined(yes: bool) -> int | None:
    """Exit code where what was printed is not to be started: 0 after a no, 2 where nobody can be asked; else none."""
    if yes:
        return None
    if not sys.stdin.isatty():
        print("nobody to ask here: give --yes to start", file=sys.stderr)
        return 2
    try:
        answer = input("start? [y/N] ")
    except EOFError:
        return 0
    return None if answer.strip().lower() in ("y", "yes") else 0
