"""System calls of Linux that Python does not wrap, through ctypes; errors are OSErrors.

The system call filter (seccomp) is a program for the kernel's packet filter: it loads the number of
a call, compares it with each forbidden one, and answers with an error number. It refuses what an
answer never needs and what would break out, reach another process, or take memory that no limit
counts. It needs no privilege, and thus holds in containers that permit no namespaces.
"""

import ctypes
import errno
import os
import platform
import signal
import struct

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER = 0x20000, 0x8000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
_CLONE_NEW = 0x7E020080  # all namespaces
_CLONE_THREAD = 0x10000

MS_REC, MS_BIND, MS_PRIVATE = 0x4000, 0x1000, 0x40000
MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
_MNT_DETACH = 2
_RDONLY, _AT_FDCWD, _AT_RECURSIVE = 1, -100, 0x8000
_PDEATHSIG, _SECCOMP, _NO_NEW_PRIVS, _SECCOMP_FILTER = 1, 22, 38, 2

# Calls by their numbers on x86-64 and on arm64; None: there is none.
_SYSCALLS = {
    "pivot_root": (155, 41), "capset": (126, 91), "clone": (56, 220), "prctl": (157, 167),
    "mount_setattr": (442, 442)}
_REFUSED = {  # with EPERM
    # Network, and ways around this filter.
    "socket": (41, 198), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    # Other processes, their groups and their memory.
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438), "kcmp": (312, 272), "setsid": (112, 157), "setpgid": (109, 154),
    # Memory that RLIMIT_AS does not count.
    "shmget": (29, 194), "memfd_create": (319, 279), "memfd_secret": (447, 447),
    "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    # Namespaces, mounts, the kernel itself.
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428),
    "move_mount": (429, 429), "fsopen": (430, 430), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "kexec_load": (246, 104), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106),
}
# Where no namespace keeps processes apart, none is made and none receives a signal.
_REFUSED_ALONE = {
    "fork": (57, None), "vfork": (58, None), "kill": (62, 129), "tkill": (200, 130),
    "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424)}
_CLONE3 = 435  # its flags lie in memory: refused as unknown, whereupon C libraries use clone
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, AUDIT_ARCH

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> int:
  if result == -1:
    number = ctypes.get_errno()
    raise OSError(number, f"{what}: {os.strerror(number)}")
  return result


def _number(name: str) -> int:
  column, _ = _machine()
  return _SYSCALLS[name][column]


def _machine() -> tuple[int, int]:
  try:
    return _MACHINES[platform.machine()]
  except KeyError:
    raise OSError(errno.ENOSYS, f"no table of system calls for {platform.machine()}") from None


def unshare(flags: int) -> None:
  _checked(_libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
  _checked(_libc.mount(source.encode(), target.encode(), kind.encode() or None,
                       ctypes.c_ulong(flags), data.encode() or None), f"mount {target}")


def read_only(target: str) -> None:
  """Makes a mount and all below it read-only, without set-user-id and devices."""
  attributes = struct.pack("QQQQ", _RDONLY | MS_NOSUID | MS_NODEV, 0, 0, 0)
  _checked(_libc.syscall(_number("mount_setattr"), _AT_FDCWD, target.encode(), _AT_RECURSIVE,
                         attributes, len(attributes)), f"mount_setattr {target}")


def new_root(folder: str) -> None:
  """Makes a mount point the root; the old root is gone."""
  os.chdir(folder)
  _checked(_libc.syscall(_number("pivot_root"), b".", b"."), "pivot_root")
  _checked(_libc.umount2(b".", _MNT_DETACH), "umount2")
  os.chdir("/")


def die_with_parent() -> None:
  """SIGKILL when the thread that forked this process ends; lost when user ids change."""
  _checked(_libc.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl PDEATHSIG")


def no_new_privileges() -> None:
  """No set-user-id program helps from here on."""
  _checked(_libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl NO_NEW_PRIVS")


def drop_capabilities() -> None:
  """All; the user id stays."""
  header = struct.pack("Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
  _checked(_libc.syscall(_number("capset"), header, bytes(24)), "capset")


def filter_calls(alone: bool) -> None:
  """Installs the filter for good, for this process and its children.

  Args:
    alone: also refuse new processes (threads are allowed) and signals.
  """
  program = b"".join(struct.pack("HBBI", *line) for line in _filter(alone))
  text = ctypes.create_string_buffer(program, len(program))
  header = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(text))
  _checked(_libc.prctl(_SECCOMP, _SECCOMP_FILTER, header, 0, 0), "prctl SECCOMP")


def _filter(alone: bool) -> list[tuple[int, int, int, int]]:
  """Lines of (operation, lines to skip if so, if not, operand)."""
  load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
  kill, allow = 0x80000000, 0x7FFF0000

  def refuse(number: int) -> tuple[int, int, int, int]:
    return answer, 0, 0, 0x50000 | number

  column, arch = _machine()
  lines = [(load, 0, 0, 4), (equal, 1, 0, arch), (answer, 0, 0, kill), (load, 0, 0, 0)]
  if column == 0:  # the x32 numbers of an x86-64 machine
    lines += [(at_least, 0, 1, 0x40000000), (answer, 0, 0, kill)]
  for numbers in (_REFUSED | (_REFUSED_ALONE if alone else {})).values():
    if numbers[column] is not None:
      lines += [(equal, 0, 1, numbers[column]), refuse(errno.EPERM)]
  lines += [(equal, 0, 1, _CLONE3), refuse(errno.ENOSYS)]
  # prctl(PDEATHSIG, ..): would survive its monitor. The first argument's low half is at offset 16.
  lines += [(equal, 0, 4, _number("prctl")), (load, 0, 0, 16), (equal, 0, 1, _PDEATHSIG),
            refuse(errno.EPERM), (answer, 0, 0, allow)]
  lines += [(equal, 0, 6 if alone else 4, _number("clone")), (load, 0, 0, 16),
            (any_bit, 0, 1, _CLONE_NEW), refuse(errno.EPERM)]
  if alone:
    lines += [(any_bit, 1, 0, _CLONE_THREAD), refuse(errno.EAGAIN)]
  return [*lines, (answer, 0, 0, allow), (answer, 0, 0, allow)]
