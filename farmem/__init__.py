"""farmem: far memory for Linux programs.

`farmem run` pages a whole program that was not changed; `farmem.Region` is memory that a
Python program asks for, larger than what may stay on this host:

    import farmem
    region = farmem.Region("64G", local="4G", pool="mem:")
    array = region.ndarray((1 << 33,), "float64")

The data plane is C (libfarmem.so); this package is the control side.  Nothing is imported
until it is used, so that `farmem run` starts fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from farmem.errors import FarmemError, PageLost, RegionInUse
    from farmem.region import Budget, BudgetStats, Region, RegionStats

__version__ = "0.1.0"
__all__ = [
    "Budget",
    "BudgetStats",
    "FarmemError",
    "PageLost",
    "Region",
    "RegionInUse",
    "RegionStats",
    "__version__",
]
_ERRORS = ("FarmemError", "PageLost", "RegionInUse")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'farmem' has no attribute {name!r}")
    return getattr(import_module("farmem.errors" if name in _ERRORS else "farmem.region"), name)
