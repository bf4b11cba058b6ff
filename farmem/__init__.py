"""farmem: far memory for unmodified Linux programs.

The package is the control side: the command line, the supervisor of a job, and the
Python API to come.  The data plane is C (libfarmem.so).  Nothing is imported here,
so that `farmem run` starts fast.
"""

__version__ = "0.1.0"
