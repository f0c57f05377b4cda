"""python -m ffn2moe.runtime.native: build the operator and print where it is."""

from __future__ import annotations

import sys

from ffn2moe.runtime.native.compiler import build


def main() -> int:
    """Build the operator and print its path; return the exit status, 2 where it cannot be built."""
    from rich.console import Console

    try:
        path = build()
    except (FileNotFoundError, RuntimeError) as error:
        Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(f"error: {error}")
        return 2
    Console(soft_wrap=True, highlight=False, markup=False).print(f"the experts operator is built: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
