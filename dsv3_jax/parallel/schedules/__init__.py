"""Pipeline schedules as data: what each rank does, in which order (report 3.2.1, table 2).

A model is cut into stages that lie on the ranks of a pipeline, and a batch into micro-batches. One
micro-batch on one stage is a *unit*. A unit takes three pieces of work: forward (F), backward for
the input (I), which the stage before waits for, and backward for the weights (W), which nobody
waits for. B is I and W at once. FB is the forward of one unit together with the whole backward of
another: two micro-batches that know nothing of each other, so that one computes while the other's
all-to-alls travel. A schedule is a list of such ops for each rank. A rank that has to wait for its
next op's input idles; that is the bubble.

    gpipe       all forwards, then all backwards: every activation is alive at once.
    1f1b        each rank turns to backwards as soon as it can: same bubble, fewer activations.
    zb1p        1f1b with I in place of B; the W's fill what was bubble (ZB-H1 of the Zero Bubble
                paper, 1F1B's memory).
    dualpipe    micro-batches enter at both ends: rank r holds stage r for one direction and stage
                R-1-r for the other, two copies of the parameters. In the middle of the batch every
                op of a rank is an FB, forward of one direction and backward of the other.
    dualpipe_v  the same with one copy: 2R stages in the shape of a V, rank r holding stages r and
                2R-1-r, so that the way back down is the other direction. First and last stage share
                a rank.

A *route* is the chain of (rank, chunk) that a micro-batch visits, a chunk being one of the stages
that a rank holds. The place along the route is the model's stage. All else follows from the routes:
who waits for whom, what is sent where, who is first and last.

    plan = make("dualpipe", ranks=8, microbatches=20)
    plan.orders[3][0]                      # Op(kind="F", forward=Unit(microbatch=0, stage=3, ...))
    plan.string(3)                         # FFFFFFFFFBXXXXXXXXXXXBBBBbbbbwwww
    plan.simulate(overlapped=2.4).bubble   # time that each rank idles
    plan.ticks()                           # the same in lockstep, for one program on all ranks

Files: ops (these words as types), generate (the five orders), validate, simulate (each rank on its
own clock), lockstep (all ranks on one clock), tables (that as numbers, for an executor), formulas
(table 2). Nothing here imports jax.

    forward(plan)                          # the same stages, forward passes alone: evaluation

What is legal: any number of ranks and micro-batches with gpipe, 1f1b and zb1p;
with dualpipe_v at least 2 * ranks micro-batches, since both directions must be in flight at once;
with dualpipe also even numbers of both, since each direction gets half. These are the demands of
the authors' code.
"""

from dsv3_jax.parallel.schedules.generate import NAMES, forward, make
from dsv3_jax.parallel.schedules.ops import Op, Unit
from dsv3_jax.parallel.schedules.schedule import Schedule

__all__ = ["NAMES", "Op", "Schedule", "Unit", "forward", "make"]
