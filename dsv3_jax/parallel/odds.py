"""How many rows cross between nodes if the router chose at random; without jax."""

import math


def expected_units(experts: int, active: int, groups: int, active_groups: int, units: int) -> float:
  """Mean number of units that a token's experts lie on, if the router chose at random.

  `active_groups` of `groups` groups, then `active` experts of these, all choices equally likely.
  A unit is missed if none of its experts is chosen: with n experts to choose from and u of them in
  the unit, with probability C(n - u, A) / C(n, A).

  Args:
    experts: E.
    active: A.
    groups, active_groups: 1, 1 without a limit.
    units: nodes or devices, each a part of one group or made of whole groups.
  """
  per_group, per_unit = experts // groups, experts // units
  n = active_groups * per_group
  within = max(per_unit // per_group, 1)  # groups of a unit
  mean = 0.0
  for chosen in range(max(0, within + active_groups - groups), min(within, active_groups) + 1):
    probability = (math.comb(within, chosen) * math.comb(groups - within, active_groups - chosen)
                   / math.comb(groups, active_groups))
    held = chosen * min(per_unit, per_group)
    mean += probability * (1 - math.comb(n - held, active) / math.comb(n, active))
  return units * mean


def expected(experts: int, active: int, groups: int, active_groups: int, nodes: int, gpus: int
             ) -> tuple[float, float, float]:
  """Crossings of one token under random routing: two hops, flat, naive.

  Every node is as likely as any other, so all but one part in `nodes` of what is sent crosses.
  """
  away = 1 - 1 / nodes
  args = experts, active, groups, active_groups
  return (expected_units(*args, nodes) * away, expected_units(*args, nodes * gpus) * away,
          active * away)
