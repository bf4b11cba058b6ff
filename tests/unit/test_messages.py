"""The ring of messages: order, losses, levels, and writers that die in the middle."""

from typing import Any

from farmem import _native
from farmem.messages import Ring

ffi, lib = _native.ffi, _native.lib


def write(control: Any, text: str, level: int = 1, is_done: bool = True) -> None:
    """What the engine does."""
    ticket = control.message_next
    control.message_next = ticket + 1
    message = control.messages[ticket % lib.FM_MESSAGES_MAX]
    message.seq = 0
    message.pid, message.level, message.text = 7, level, text.encode()
    if is_done:
        message.seq = ticket + 1


def test_messages_come_in_order_and_once() -> None:
    control = ffi.new("struct fm_control *")
    ring = Ring(control, 0)
    assert ring.read() == []
    write(control, "one")
    write(control, "two")
    assert ring.read() == ["farmem: [7] one", "farmem: [7] two"]
    assert ring.read() == []


def test_small_messages_are_left_out() -> None:
    control = ffi.new("struct fm_control *")
    for level in range(4):
        write(control, f"level {level}", level)
    assert Ring(control, lib.FM_LEVEL_WARNING).read() == [
        "farmem: [7] level 2",
        "farmem: [7] level 3",
    ]


def test_a_reader_that_is_late_is_told_how_many_were_lost() -> None:
    control = ffi.new("struct fm_control *")
    for number in range(lib.FM_MESSAGES_MAX + 10):
        write(control, str(number))
    lines = Ring(control, 0).read()
    assert "10 messages were lost" in lines[0]
    assert lines[1] == "farmem: [7] 10"
    assert len(lines) == lib.FM_MESSAGES_MAX + 1


def test_a_writer_that_dies_in_the_middle_does_not_stop_the_others() -> None:
    control = ffi.new("struct fm_control *")
    ring = Ring(control, 0)
    write(control, "never finished", is_done=False)
    write(control, "next")
    assert ring.read() == []
    assert ring.read(is_last=True) == ["farmem: [7] next"]
