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
    from farmem.region import Region, RegionStats
    from farmem.regionbudget import Budget, BudgetStats

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
_HOMES = {
    "FarmemError": "errors",
    "PageLost": "errors",
    "RegionInUse": "errors",
    "Region": "region",
    "RegionStats": "region",
    "Budget": "regionbudget",
    "BudgetStats": "regionbudget",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'farmem' has no attribute {name!r}")
    return getattr(import_module(f"farmem.{_HOMES[name]}"), name)
