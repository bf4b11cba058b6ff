"""Limits of the process, the host's memory, and the folder for temporary files."""

import errno
import mmap
import os
import tempfile

from farmem.doctor.container import THREADS_WISHED
from farmem.doctor.findings import Answer, Check, Mark, missing, ok, warning
from farmem.doctor.host import NO_LIMIT, Host
from farmem.sizes import format_bytes

# Seen here: a job of one process works with 16 descriptors and not with 13.  Each more
# takes three of the supervisor's: its connection, its pidfd, its userfaultfd.
DESCRIPTORS_OF_A_JOB = 13
DESCRIPTORS_OF_A_PROCESS = 3
PROCESSES_WISHED = 64
LOCKED_BYTES_WISHED = 64 << 20
TABLES_BYTES = 16 << 30  # address space that an engine reserves for its tables
_BLOCK_BYTES = 4096


def _raise(option: str, wanted: int, hard: int, item: str) -> str:
    """What to type to have a limit raised."""
    if hard == NO_LIMIT or hard >= wanted:
        return f"ulimit -{option} {wanted}"
    return f"let the administrator raise it: {item} in /etc/security/limits.conf"


def look_descriptors(host: Host) -> Answer:
    """RLIMIT_NOFILE."""
    soft, hard = host.limit("NOFILE")
    if soft == NO_LIMIT:
        return ok("no limit", soft=None)
    processes = (soft - DESCRIPTORS_OF_A_JOB) // DESCRIPTORS_OF_A_PROCESS
    mend = _raise("n", 4096, hard, "nofile")
    if processes < 1:
        return missing(f"{soft}: too few for any job", mend, soft=soft)
    plural = "" if processes == 1 else "es"
    found = f"{soft}: enough for a job of about {processes} process{plural}"
    if processes < PROCESSES_WISHED:
        return warning(found, mend, soft=soft)
    return ok(found, soft=soft)


def look_address_space(host: Host) -> Answer:
    """RLIMIT_AS: the pool and the engine's tables are reserved in every process."""
    soft, _ = host.limit("AS")
    if soft == NO_LIMIT:
        return ok("no limit", soft_bytes=None)
    need_bytes = host.memory_bytes()[0] + TABLES_BYTES
    found = (
        f"{format_bytes(soft)}; with a mem: pool farmem reserves {format_bytes(need_bytes)} of it"
    )
    if soft < need_bytes:
        return warning(
            found, "ulimit -v unlimited, or a smaller pool: --pool mem:1G", soft_bytes=soft
        )
    return ok(found, soft_bytes=soft)


def look_locked(host: Host) -> Answer:
    """RLIMIT_MEMLOCK: RDMA pins its buffers, and a server all that it lends.  Nothing else does."""
    soft, hard = host.limit("MEMLOCK")
    if soft == NO_LIMIT:
        return ok("no limit", soft_bytes=None)
    size = format_bytes(soft)
    if (
        soft >= LOCKED_BYTES_WISHED
        or host.user.uid == 0
        or not host.names_in("/sys/class/infiniband")
    ):
        return ok(f"{size}: counts for RDMA alone", soft_bytes=soft)
    mend = _raise("l", LOCKED_BYTES_WISHED >> 10, hard, "memlock")
    return warning(
        f"{size}: little for RDMA, which pins what farmem serve lends", mend, soft_bytes=soft
    )


def look_threads(host: Host) -> Answer:
    """RLIMIT_NPROC: threads of ours in each managed process, and the supervisor's."""
    soft, hard = host.limit("NPROC")
    if soft == NO_LIMIT:
        return ok("no limit", soft=None)
    if host.user.uid == 0:
        return ok(f"{soft}, and root is not held to it", soft=soft)
    used = host.threads_of_user()
    found = f"{soft}, {used} of them in use"
    if soft - used >= THREADS_WISHED:
        return ok(found, soft=soft, used=used)
    mend = _raise("u", used + 1024, hard, "nproc")
    return warning(
        f"{found}: a process takes three threads more, nine with a pool on a server",
        mend,
        soft=soft,
        used=used,
    )


def look_memory(host: Host) -> Answer:
    """The host's memory: what mem: lends is taken from it."""
    total_bytes, available_bytes, swap_bytes = host.memory_bytes()
    swap = format_bytes(swap_bytes) if swap_bytes else "none"
    return ok(
        f"{format_bytes(total_bytes)}, {format_bytes(available_bytes)} of it available; "
        f"swap: {swap}",
        total_bytes=total_bytes,
        available_bytes=available_bytes,
        swap_bytes=swap_bytes,
    )


def _write_directly(folder: str) -> int:
    """The errno of writing a block past the page cache, or 0."""
    path = os.path.join(folder, f".farmem-doctor-{os.getpid()}")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_DIRECT
    try:
        fd = os.open(path, flags, 0o600)
    except OSError as error:
        if error.errno == errno.EINVAL and os.path.exists(path):
            os.unlink(path)  # the file is made before the flag is refused
        return error.errno or errno.EIO
    try:
        os.write(fd, mmap.mmap(-1, _BLOCK_BYTES))
    except OSError as error:
        return error.errno or errno.EIO
    finally:
        os.close(fd)
        os.unlink(path)
    return 0


def look_direct_io(host: Host) -> Answer:
    """Whether a file: pool in the temporary folder would bypass the page cache."""
    folder = tempfile.gettempdir()
    error = _write_directly(folder)
    if error == 0:
        return ok(f"works in {folder}", folder=folder)
    if error == errno.EINVAL:
        return missing(
            f"not in {folder}: a file: pool there would go through the page cache",
            "put a file: pool on a local disk's file system (ext4, xfs)",
            folder=folder,
        )
    return Answer(
        Mark.UNKNOWN, f"could not be looked at in {folder}: {os.strerror(error)}",
        ("name another folder: TMPDIR=/var/tmp farmem doctor",), {"folder": folder},
    )  # fmt: skip


REQUIRED = (Check("limit_nofile", "open files (ulimit -n)", look_descriptors),)
CASES = (
    Check("limit_as", "address space (ulimit -v)", look_address_space),
    Check("limit_nproc", "threads (ulimit -u)", look_threads),
    Check("limit_memlock", "locked memory (ulimit -l)", look_locked),
    Check("memory", "this host's memory", look_memory),
)
OPTIONAL = (Check("direct_io", "direct I/O", look_direct_io),)
