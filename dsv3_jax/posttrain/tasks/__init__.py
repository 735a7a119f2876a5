"""Problems with known answers, generated: families of graded difficulty (report 5, small).

| family | question | hard is |
|---|---|---|
| `add`, `subtract`, `multiply` | `47 + 85 = ?` | digits |
| `polynomial` | `Expand and simplify: 3(2x-1)+4x` | terms, degree |
| `equation` | `Solve for x: 3x+4=19` | brackets, fractions |
| `fraction` | `1/2 + 2/3 = ?` | terms, denominators |
| `sort` | `Sort ascending: 47 12 85 33` | items, orders |
| `program` | `Reverse, then drop repeats: a b a c` | steps, items |
| `python` | `What does Python say to (3+4)*2` | kinds of value, depth |
| `recall` | one of many keys' value | length |

Every problem has two worked solutions that end in the boxed answer: `worked`, the steps alone, and
`worked_long`, which also verifies the result (for distillation of long chains of thought). Train
and test share no problem by construction; statements.py says how. Needs no jax.
"""

from dsv3_jax.posttrain.tasks.records import read, write
from dsv3_jax.posttrain.tasks.sets import count, describe, families, family, make, mixture, named

__all__ = ["count", "describe", "families", "family", "make", "mixture", "named", "read", "write"]
