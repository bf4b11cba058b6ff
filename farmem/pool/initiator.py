"""The other end of a queue pair, as a client has it: for `farmem serve --self-test` alone.

A buffer and a queue pair on the server's own device, in a protection domain of their own;
one request at a time.
"""

import asyncio
import mmap
import time

from farmem import _native
from farmem.pool.rdma import Adapter, Failed, Half, new_psn

ffi = _native.ffi

ANSWER_SECONDS = 20.0
# Numbers of the verbs' binary interface, as in rdma.py.
_LOCAL_WRITE = 1
_WRITE, _READ = 0, 4
_SIGNALED = 2
_SUCCESS = 0


class Initiator:
    """Reads and writes a lease's memory one-sidedly."""

    def __init__(self, adapter: Adapter, size_bytes: int) -> None:
        verbs = adapter.verbs
        self._adapter = adapter
        self._buffer = mmap.mmap(-1, size_bytes)
        self._view = ffi.from_buffer(self._buffer)
        self._address = int(ffi.cast("uintptr_t", self._view))
        self._rkey = self._remote = 0
        self._psn = new_psn()
        try:
            self._domain = verbs.pd.PD(adapter.context)
            self._region = verbs.mr.MR(
                self._domain, size_bytes, _LOCAL_WRITE, address=self._address
            )
            self._completions = verbs.cq.CQ(adapter.context, 1, None, None, 0)
            self._queue_pair = adapter.new_queue_pair(self._domain, self._completions)
        except verbs.Error as error:
            raise Failed(error) from error

    @property
    def half(self) -> Half:
        """What the server must know."""
        return self._adapter.half_of(self._queue_pair, self._psn, self._adapter.mtu)

    def connect(self, theirs: Half, rkey: int, remote: int) -> None:
        """To the server's half."""
        try:
            self._adapter.join(self._queue_pair, self._psn, theirs)
        except self._adapter.verbs.Error as error:
            raise Failed(error) from error
        self._rkey, self._remote = rkey, remote

    async def write(self, offset: int, data: bytes) -> None:
        """Put bytes into the lease."""
        self._buffer[: len(data)] = data
        await self._do(_WRITE, offset, len(data))

    async def read(self, offset: int, length: int) -> bytes:
        """Bytes of the lease."""
        await self._do(_READ, offset, length)
        return self._buffer[:length]

    async def _do(self, opcode: int, offset: int, length: int) -> None:
        wr = self._adapter.verbs.wr
        place = wr.SGE(self._address, length, self._region.lkey)
        request = wr.SendWR(opcode=opcode, num_sge=1, sg=[place], send_flags=_SIGNALED)
        request.set_wr_rdma(self._rkey, self._remote + offset)
        try:
            self._queue_pair.post_send(request)
        except self._adapter.verbs.Error as error:
            raise Failed(error) from error
        end = time.monotonic() + ANSWER_SECONDS
        while not (found := self._completions.poll(1))[0]:
            if time.monotonic() > end:
                raise TimeoutError(f"an RDMA request had no answer in {ANSWER_SECONDS:g} s")
            await asyncio.sleep(0)
        status = found[1][0].status
        if status != _SUCCESS:
            raise ConnectionError(f"an RDMA request failed with status {status}")

    def close(self) -> None:
        """Leave nothing behind."""
        self._queue_pair.close()
        self._completions.close()
        self._region.close()
        self._domain.close()
        ffi.release(self._view)
        self._buffer.close()
