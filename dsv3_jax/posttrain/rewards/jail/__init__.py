"""What runs on the other side of `sandbox.py`, in a bare interpreter: the standard library alone.

    trainer -> supervisor (one an answer) -> monitor (one a run) -> program: code that nobody trusts

The supervisor is a fresh `python -I -S` with an empty environment. For every run it forks a
monitor, which makes the namespaces, forks the program into them, feeds it, captures what it writes,
and kills it when it exceeds a limit. The program is a fork of both, so it costs milliseconds and no
start of an interpreter; what it inherits in memory is the answer's own code and the inputs, never
what is expected of it. Each of the three is killed by the kernel when the one before it dies.

 - `kernel`: system calls that Python does not wrap (namespaces, mounts, prctl, seccomp).
 - `walls`: how a program gives up what it could do; which of it this machine permits.
 - `program`: runs the code: as a script, function by function, or as tests of functions elsewhere.
 - `values`: plain Python values as JSON, so that no object crosses over.
"""
