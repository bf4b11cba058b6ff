"""The doctor: what farmem needs from this host, what is there, and what to type to mend it.

A module per subject holds the checks; findings.py says what a check is, host.py asks the
host, report.py writes it all down.  Nothing of this is imported by `farmem run`.
"""

from farmem.doctor import container, kernel, limits, rdma, trial, userfaultfd
from farmem.doctor.findings import Group

_EXTENSION, _LIBRARY, _TRIAL = trial.REQUIRED

GROUPS = (
    Group(
        "required",
        "Required",
        (
            *kernel.REQUIRED,
            *limits.REQUIRED,
            _EXTENSION,
            _LIBRARY,
            *userfaultfd.REQUIRED,
            _TRIAL,
        ),
    ),
    Group(
        "cases",
        "Needed for some cases",
        (*userfaultfd.CASES, *kernel.CASES, *container.CASES, *limits.CASES),
    ),
    Group(
        "optional",
        "Optional",
        (
            *userfaultfd.OPTIONAL,
            *kernel.OPTIONAL,
            *limits.OPTIONAL,
            *rdma.OPTIONAL,
            *trial.OPTIONAL,
        ),
    ),
)
