"""How a program gives up what it could do, and which of these walls a machine permits.

 - user: another user id that no one has (for root), else a user namespace of its own. Without
   either, RLIMIT_NPROC counts the user's other processes too (and root's not at all).
 - processes: a pid namespace. The program is its process 1: it sees no other, cannot leave, and
   when it ends the kernel kills all that it started, daemons too.
 - network: a network namespace without any interface that is up.
 - files: a mount namespace whose root is a small file system in memory, with Python's library and
   the system's shared libraries read-only beside it. No other file of the machine can be named;
   there is no /proc, and no program to execute.
 - ipc: shared memory and semaphores of its own.
 - calls: the filter of `kernel.filter_calls`.

What stands everywhere: an empty environment, no descriptor but its own, no new privileges, limits
on memory, CPU and wall time, output, file sizes and descriptors, death with the monitor.
"""

import os
import resource
import sys

from . import kernel

NAMES = ("user", "processes", "network", "files", "ipc", "calls")
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
_DEVICES = ("null", "zero", "random", "urandom")


def spare_user() -> int:
  """A user id that nobody has but this process's own programs; 0 where none can be taken."""
  if os.geteuid():
    return 0
  first, _, count = map(int, open("/proc/self/uid_map").read().split()[-3:])
  if count < 60_000:
    return 0
  # Far from all that are given to users; process ids tell apart those that run now.
  span = 4_194_304 if count > 2**31 else 20_000
  return first + count - 1_000 - span + os.getpid() % span


def namespaces(walls: list[str]) -> None:
  """Of the next child, not of this process (but for the user's and the network's)."""
  flags = 0
  for name, flag in (("processes", kernel.CLONE_NEWPID), ("network", kernel.CLONE_NEWNET),
                     ("ipc", kernel.CLONE_NEWIPC)):
    flags |= flag if name in walls else 0
  uid, gid = os.geteuid(), os.getegid()
  apart = "user" in walls and not spare_user()
  kernel.unshare(flags | (kernel.CLONE_NEWUSER if apart else 0))
  if apart:
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"),
                       ("gid_map", f"{gid} {gid} 1")):
      with open(f"/proc/self/{name}", "w") as file:
        file.write(text)


def enter(walls: list[str], limits: dict, folder: str, user: int) -> None:
  """Gives up everything; called in the child, after `namespaces` in its parent.

  Args:
    walls: which of NAMES to build; one that cannot be built raises.
    limits: of `sandbox.Limits`.
    folder: an empty folder, becomes the working directory (or the root's mount point).
    user: of `spare_user`, in the supervisor.

  Raises:
    OSError: a wall cannot be built.
  """
  if "files" in walls:
    _root(folder, limits["files"])
    folder = "/tmp"
  elif user and "user" in walls:
    os.chown(folder, user, user)
  os.chdir(folder)
  pairs = [("AS", limits["memory"]), ("CPU", limits["cpu"]), ("FSIZE", limits["files"]),
           ("NOFILE", 64), ("CORE", 0), ("MSGQUEUE", 0)]
  if "user" in walls:
    pairs.append(("NPROC", limits["processes"]))
  for name, value in pairs:
    kind = getattr(resource, f"RLIMIT_{name}")
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))
  os.umask(0o077)
  if user and "user" in walls:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
  kernel.no_new_privileges()
  kernel.drop_capabilities()
  kernel.die_with_parent()
  if "calls" in walls:
    kernel.filter_calls(alone="processes" not in walls)


def _root(folder: str, size: int) -> None:
  kernel.unshare(kernel.CLONE_NEWNS)
  kernel.mount("none", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
  kernel.mount("none", folder, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC,
               f"size={size},nr_inodes=2048,mode=755")
  done: list[str] = []
  for path in (*_LIBRARIES, os.path.join(sys.base_prefix, "lib"), *sys.path):
    if os.path.islink(path):
      os.symlink(os.readlink(path), folder + path)
    elif os.path.isdir(path) and not any(os.path.commonpath((p, path)) == p for p in done):
      os.makedirs(folder + path, exist_ok=True)
      kernel.mount(path, folder + path, flags=kernel.MS_BIND | kernel.MS_REC)
      kernel.read_only(folder + path)
      done.append(path)
  os.makedirs(f"{folder}/dev", exist_ok=True)
  for name in _DEVICES:
    open(f"{folder}/dev/{name}", "w").close()
    kernel.mount(f"/dev/{name}", f"{folder}/dev/{name}", flags=kernel.MS_BIND)
  os.makedirs(f"{folder}/tmp", exist_ok=True)  # an interpreter may lie below it
  os.chmod(f"{folder}/tmp", 0o777)
  kernel.new_root(folder)


def probe(limits: dict, folder: str) -> list[str]:
  """Which walls this machine permits: each is tried in a process of its own, with the user's."""
  found: list[str] = []
  user = spare_user()
  for name in NAMES:
    if _possible([*found, name], limits, folder, user):
      found.append(name)
  if "user" in found and not _possible(found, limits, folder, user, reads=True):
    found.remove("user")  # Python lies where only its owner may read
  return found


def _possible(walls: list[str], limits: dict, folder: str, user: int, reads: bool = False) -> bool:
  child = os.fork()
  if child == 0:
    try:
      namespaces(walls)
      inner = os.fork()  # a pid namespace begins with a child
      if inner == 0:
        enter(walls, limits, folder, user)
        if reads:
          os.listdir(os.path.dirname(os.__file__))
        os._exit(0)
      os._exit(1 if os.waitpid(inner, 0)[1] else 0)
    except BaseException:
      os._exit(1)
  return os.waitpid(child, 0)[1] == 0
