"""Every method of the grid: each module of this folder registers its own. Importing the package imports all modules.

A method that left the core registers its row in the core's table (`ffn2moe.table.Table.register`) from here, too, so
that its name works in the core as long as this package is imported.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
