"""What a process may do to its machine, taken away before it runs what a stranger or a model wrote.

    limit_resources(memory=1 << 29, seconds=3)      the kernel counts, and ends the process
    confine(folder)                                 no network, no other process, no file outside the folder

Both hold until the process ends and cannot be undone, by root neither. They need no right and no other program, so that
they work in a container and for any user: Linux on x86-64 or ARM64, with seccomp filters (every kernel since 3.17).

* A seccomp filter lets through the system calls that a Python program which computes is made of, and no other: there
  are no sockets, processes, threads, signals to others, mounts, devices, changes of owners or of limits.
* Landlock (Linux 6.2) closes all files but those of Python, to read, and the folder's. Where it is missing, the filter
  refuses to open any file for writing, also in the folder; what the user may read, the process may then read as well.
"""

import ctypes
import errno
import os
import platform
import resource
import struct
import sys

# Name of a system call, its number on x86-64 and on ARM64 ("-": it has none there).
ALWAYS = """
read 0 63, write 1 64, close 3 57, stat 4 -, fstat 5 80, lstat 6 -, poll 7 -, lseek 8 62, mmap 9 222, mprotect 10 226,
munmap 11 215, brk 12 214, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, pread64 17 67,
pwrite64 18 68, readv 19 65, writev 20 66, access 21 -, select 23 -, sched_yield 24 124, mremap 25 216, madvise 28 233,
dup 32 23, dup2 33 -, nanosleep 35 101, getpid 39 172, exit 60 93, uname 63 160, ftruncate 77 46, getcwd 79 17,
chdir 80 49, readlink 89 -, gettimeofday 96 169, getrusage 98 165, sysinfo 99 179, times 100 153, getuid 102 174,
getgid 104 176, geteuid 107 175, getegid 108 177, getppid 110 173, sigaltstack 131 132, gettid 186 178, time 201 -,
futex 202 98, sched_getaffinity 204 123, getdents64 217 61, restart_syscall 219 128, clock_gettime 228 113,
clock_getres 229 114, clock_nanosleep 230 115, exit_group 231 94, newfstatat 262 79, readlinkat 267 78,
faccessat 269 48, pselect6 270 72, ppoll 271 73, dup3 292 24, getrandom 318 278, membarrier 324 283, statx 332 291,
rseq 334 293, faccessat2 439 439"""
IN_FOLDER = "rename 82 -, unlink 87 -, unlinkat 263 35, renameat 264 38, renameat2 316 276"
# Those of which an argument decides.
OPEN = "open 2 -, openat 257 56"
# The second argument of fcntl and ioctl is a command: F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC; FIONCLEX and
# FIOCLEX. Others send signals to strangers, or are a device's.
COMMANDS = {"fcntl 72 25": (0, 1, 2, 3, 1030), "ioctl 16 29": (0x5450, 0x5451)}
# The kernel's name of a machine's system calls, and which number of a row is its.
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}

LOAD, EQUALS, HAS_BITS, RETURN = 0x20, 0x15, 0x45, 0x06         # BPF: ld [k]; jeq; jset; ret
KILL, REFUSE, ALLOW = 0x80000000, 0x00050000 | errno.EPERM, 0x7FFF0000
# Where the number of the call, its machine and its arguments stand in what a filter sees.
NUMBER, MACHINE, ARGUMENTS = 0, 4, 16
SET_PARENT_DEATH_SIGNAL, SET_NO_NEW_PRIVILEGES, SET_SECCOMP, FILTER = 1, 38, 22, 2
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
# Landlock's rights over files: 15 bits in its third version, the first that knows about truncation.
ALL_RIGHTS, LANDLOCK_VERSION = (1 << 15) - 1, 3
WRITE_FILE, READ_FILE, READ_FOLDER, REMOVE_FILE, MAKE_FILE, TRUNCATE = 1 << 1, 1 << 2, 1 << 3, 1 << 5, 1 << 8, 1 << 14


def limit_resources(memory: int, seconds: int | None = None, file_bytes: int = 0, files: int = 3) -> None:
    """From now on this process has `memory` bytes of addresses, `seconds` of computing, `files` open files of
    `file_bytes` at most, no other process and no core file."""
    limits = {resource.RLIMIT_AS: memory, resource.RLIMIT_FSIZE: file_bytes, resource.RLIMIT_CORE: 0,
              resource.RLIMIT_NPROC: 0, resource.RLIMIT_NOFILE: files}
    if seconds is not None:
        limits[resource.RLIMIT_CPU] = seconds
    for limit, most in limits.items():
        resource.setrlimit(limit, (most, most))


def confine(folder: str | None, readable: list[str] = ()) -> None:
    """From now on this process can do nothing but compute, read the files below `readable` and write in `folder`.
    folder: None where there is no Landlock (`has_landlock`): it may then read any file, and write none.

    OSError where the kernel has no seccomp filters."""
    libc = ctypes.CDLL(None, use_errno=True)
    # Who waits for this process may be killed, and it could sleep for ever.
    call(libc.prctl, SET_PARENT_DEATH_SIGNAL, 9, 0, 0, 0)
    call(libc.prctl, SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    if folder is not None:
        close_files(libc, folder, readable)
    words = make_filter(platform.machine(), writes=folder is not None)
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *word) for word in words))
    # A struct of the number of words and of where they are.
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(words), ctypes.addressof(code)))
    call(libc.prctl, SET_SECCOMP, FILTER, ctypes.byref(program), 0, 0)


def call(function, *arguments) -> int:
    """The result of one of C's functions; OSError where it fails."""
    ctypes.set_errno(0)
    result = function(*(ctypes.c_ulong(value) if isinstance(value, int) else value for value in arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def has_filters() -> bool:
    """Whether this is a machine whose system calls can be filtered; a kernel may still refuse it."""
    return sys.platform == "linux" and sys.maxsize > 1 << 32 and platform.machine() in MACHINES


def has_landlock() -> bool:
    try:
        # Asked for nothing, and with this flag, it tells its version.
        return call(ctypes.CDLL(None, use_errno=True).syscall, LANDLOCK_CREATE, None, 0, 1) >= LANDLOCK_VERSION
    except OSError:
        return False


def close_files(libc, folder: str, readable: list[str]) -> None:
    """Landlock: read below `readable`, read and write in `folder`, and nothing else."""
    rights = struct.pack("Q", ALL_RIGHTS)
    ruleset = call(libc.syscall, LANDLOCK_CREATE, rights, len(rights), 0)
    in_folder = WRITE_FILE | READ_FILE | READ_FOLDER | REMOVE_FILE | MAKE_FILE | TRUNCATE
    rules = {path: READ_FILE | (READ_FOLDER if os.path.isdir(path) else 0) for path in readable if os.path.exists(path)}
    for path, allowed in {**rules, folder: in_folder}.items():
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        call(libc.syscall, LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", allowed, fd), 0)
        os.close(fd)
    call(libc.syscall, LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)


def numbers(table: str, column: int) -> list[int]:
    rows = (row.split() for row in table.split(","))
    return [int(row[1 + column]) for row in rows if row[1 + column] != "-"]


def make_filter(machine: str, writes: bool) -> list[tuple[int, int, int, int]]:
    """The filter as words of BPF (operation, words to skip if true, words to skip if false, operand).
    writes: whether files may be opened for writing and removed; where, Landlock says."""
    code, column = MACHINES[machine]
    words = [(LOAD, 0, 0, MACHINE), (EQUALS, 1, 0, code), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
    for number in numbers(ALWAYS, column) + (numbers(IN_FOLDER + "," + OPEN, column) if writes else []):
        words += [(EQUALS, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    change = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
    # open(path, flags) and openat(folder, path, flags)
    for number, argument in () if writes else zip(numbers(OPEN, column)[::-1], (2, 1)):
        words += [(EQUALS, 0, 4, number), (LOAD, 0, 0, ARGUMENTS + 8 * argument), (HAS_BITS, 0, 1, change),
                  (RETURN, 0, 0, REFUSE), (RETURN, 0, 0, ALLOW)]
    for call_name, commands in COMMANDS.items():
        words += [(EQUALS, 0, 2 * len(commands) + 2, *numbers(call_name, column)), (LOAD, 0, 0, ARGUMENTS + 8)]
        for command in commands:
            words += [(EQUALS, 0, 1, command), (RETURN, 0, 0, ALLOW)]
        words.append((RETURN, 0, 0, REFUSE))
    return [*words, (RETURN, 0, 0, REFUSE)]
