"""Numbers as people read them."""


def size(value: float, unit: str = "B") -> str:
  """A number of `unit` with the prefix that makes it readable, powers of 1000."""
  for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("K", 1e3)):
    if value >= scale:
      return f"{value / scale:.4g} {prefix}{unit}"
  return f"{value:.4g} {unit}"


def duration(value: float) -> str:
  """Seconds in a readable unit: 54.2 days, 19.82 s, 7.4 ms."""
  for unit, scale, least in (("days", 86400, 2), ("h", 3600, 2), ("s", 1.0, 1), ("ms", 1e-3, 1)):
    if value >= least * scale:
      return f"{value / scale:.4g} {unit}"
  return f"{value / 1e-6:.3g} us"
