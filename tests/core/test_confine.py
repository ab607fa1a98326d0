"""core/confine.py: the numbers of system calls, and what a filter lets through. Truth: the kernel's own headers, and an
interpreter of BPF written here from its manual. What a confined process cannot do is tried in test_run_code.py."""

import errno
import os
import re
import struct
from pathlib import Path

import pytest

from core import confine

HEADERS = {"x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "/usr/include/asm-generic/unistd.h"}
TABLES = [confine.ALWAYS, confine.IN_FOLDER, confine.OPEN, *confine.COMMANDS]
ROWS = [row.split() for table in TABLES for row in table.split(",")]
EPERM = 0x50000 | errno.EPERM


@pytest.mark.parametrize("machine", HEADERS)
def test_numbers_are_the_kernels(machine):
    if not (file := Path(HEADERS[machine])).exists():
        pytest.skip(f"the kernel's headers are not installed here ({file})")
    # fstatat has two names: the one that 64-bit machines use is newfstatat.
    found = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", file.read_text())
    known = {name.replace("fstatat", "newfstatat") if machine == "aarch64" else name: number for name, number in found}
    column = 1 + confine.MACHINES[machine][1]
    assert {row[0]: row[column] for row in ROWS} == {row[0]: known.get(row[0], "-") for row in ROWS}


def decide(words, machine: int, number: int, *arguments: int) -> int:
    """What a filter returns for a system call: the four operations of BPF that ours are made of."""
    seen = struct.pack("<IIQ6Q", number, machine, 0, *arguments, *[0] * (6 - len(arguments)))
    at = value = 0
    while True:
        operation, if_true, if_false, operand = words[at]
        at += 1
        if operation == 0x20:                   # BPF_LD | BPF_W | BPF_ABS
            value, = struct.unpack_from("<I", seen, operand)
        elif operation == 0x15:                 # BPF_JMP | BPF_JEQ | BPF_K
            at += if_true if value == operand else if_false
        elif operation == 0x45:                 # BPF_JMP | BPF_JSET | BPF_K
            at += if_true if value & operand else if_false
        else:
            assert operation == 0x06            # BPF_RET | BPF_K
            return operand


@pytest.mark.parametrize("machine", confine.MACHINES)
@pytest.mark.parametrize("writes", [False, True])
def test_a_filter_lets_through_what_computes(machine, writes):
    words = confine.make_filter(machine, writes)
    code, column = confine.MACHINES[machine]
    known = {row[0]: int(row[1 + column]) for row in ROWS if row[1 + column] != "-"}
    ask = {name: lambda *arguments, number=number: decide(words, code, number, *arguments)
           for name, number in known.items()}
    always = {row.split()[0] for row in confine.ALWAYS.split(",")} & known.keys()
    assert {ask[name]() for name in always} == {0x7FFF0000}
    assert len(words) <= 4096                   # the kernel's limit
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC):
        assert ask["openat"](0, 0, flags | os.O_CLOEXEC) == (0x7FFF0000 if writes else EPERM)
    assert ask["openat"](0, 0, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY) == 0x7FFF0000
    assert ask["unlinkat"]() == (0x7FFF0000 if writes else EPERM)
    # F_SETFL, F_SETOWN and F_SETSIG; TCGETS, TIOCSTI, FIOCLEX
    assert [ask["fcntl"](5, command) for command in (1, 4, 8, 10)] == [0x7FFF0000, EPERM, EPERM, EPERM]
    assert [ask["ioctl"](5, command) for command in (0x5401, 0x5412, 0x5451)] == [EPERM, EPERM, 0x7FFF0000]
    # All others: of 600 numbers, those that are in no table; and with the bit of x32, or of another machine, none.
    for number in set(range(600)) - set(known.values()):
        assert decide(words, code, number) == EPERM
    assert decide(words, code, 0x40000000) == EPERM
    assert decide(words, 0x40000003, 1) == 0x80000000


def test_a_failed_call_of_c_is_an_error_of_python():
    with pytest.raises(OSError, match="Bad file descriptor"):
        confine.call(confine.ctypes.CDLL(None, use_errno=True).close, 10**6)
