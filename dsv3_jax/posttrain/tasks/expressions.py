"""Python expressions: the model predicts a value, which the generator computes.

Expressions come from a small grammar (whole numbers, lists, strings, conditions, comprehensions)
and are reduced as Python would, one operation a line, the first that is ready. Values come from the
tables below; nothing is handed to Python to execute.
"""

import ast
import operator
import re
from typing import Any

from dsv3_jax.posttrain.tasks.statements import Choices, Family, Solution

_BINARY = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
           ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod}
_COMPARE = {ast.Lt: operator.lt, ast.Gt: operator.gt, ast.Eq: operator.eq, ast.NotEq: operator.ne,
            ast.LtE: operator.le, ast.GtE: operator.ge, ast.In: lambda a, b: a in b}
_CALLS = {"len": len, "sum": sum, "max": max, "min": min, "sorted": sorted, "abs": abs}
_METHODS = {"upper": str.upper, "count": str.count, "find": str.find, "replace": str.replace}


def source(node: ast.expr) -> str:
  """As Python writes it, without the spaces around signs."""
  return re.sub(r" ([-+*/%<>=!]+) ", r"\1", ast.unparse(node))


def parse(text: str) -> ast.expr:
  """The expression, a negative number being a value like any other."""
  return _Negative().visit(ast.parse(text, mode="eval").body)


class _Negative(ast.NodeTransformer):
  def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
    self.generic_visit(node)
    if isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
      return ast.Constant(-node.operand.value)
    return node


def _is_value(node: ast.AST) -> bool:
  if isinstance(node, ast.List):
    return all(map(_is_value, node.elts))
  return isinstance(node, ast.Constant)


def _value(node: ast.expr) -> Any:
  return [_value(e) for e in node.elts] if isinstance(node, ast.List) else node.value


def _node(value: Any) -> ast.expr:
  if isinstance(value, list):
    return ast.List([_node(v) for v in value], ast.Load())
  return ast.Constant(value)


def reduce(node: ast.expr) -> tuple[ast.expr, tuple[ast.expr, ast.expr]]:
  """One operation, the first that is ready.

  Args:
    node: not yet a value.

  Returns:
    The expression after it; and the operation alone, with its result.
  """
  for name, part in _parts(node):
    if not _is_value(part):
      done, operation = reduce(part)
      return _replaced(node, name, done), operation
  result = _apply(node)
  return result, (node, result)


def _parts(node: ast.expr) -> list[tuple[Any, ast.expr]]:
  """What must be a value before this is computed, in Python's order, with where it stands."""
  listed = lambda name: [((name, i), e) for i, e in enumerate(getattr(node, name))]
  match node:
    case ast.BinOp():
      return [("left", node.left), ("right", node.right)]
    case ast.UnaryOp():
      return [("operand", node.operand)]
    case ast.Compare():
      return [("left", node.left), *listed("comparators")]
    case ast.BoolOp():
      return [(("values", 0), node.values[0])]
    case ast.IfExp():
      return [("test", node.test)]
    case ast.List():
      return listed("elts")
    case ast.Call(func=ast.Attribute()):
      return [("func", node.func.value), *listed("args")]
    case ast.Call():
      return listed("args")
    case ast.Subscript(slice=ast.Slice()):
      return [("value", node.value)]
    case ast.Subscript():
      return [("value", node.value), ("slice", node.slice)]
    case ast.ListComp():
      return [("generators", node.generators[0].iter)]
  raise ValueError(f"{ast.unparse(node)} is not of the grammar")


def _replaced(node: ast.expr, name: Any, part: ast.expr) -> ast.expr:
  fields = {f: getattr(node, f) for f in node._fields}
  match name:
    case (name, i):
      fields[name] = [part if j == i else e for j, e in enumerate(fields[name])]
    case "func":
      fields["func"] = ast.Attribute(part, node.func.attr, ast.Load())
    case "generators":
      old = node.generators[0]
      fields["generators"] = [ast.comprehension(old.target, part, old.ifs, 0)]
    case _:
      fields[name] = part
  return type(node)(**fields)


def _apply(node: ast.expr) -> ast.expr:
  """Of an expression whose parts are values."""
  match node:
    case ast.BinOp():
      return _node(_BINARY[type(node.op)](_value(node.left), _value(node.right)))
    case ast.UnaryOp():
      return _node(not _value(node.operand))
    case ast.Compare():
      return _node(_COMPARE[type(node.ops[0])](_value(node.left), _value(node.comparators[0])))
    case ast.BoolOp():
      first, *rest = node.values
      if bool(_value(first)) is isinstance(node.op, ast.Or):
        return first
      return rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)
    case ast.IfExp():
      return node.body if _value(node.test) else node.orelse
    case ast.Call(func=ast.Attribute()):
      return _node(_METHODS[node.func.attr](_value(node.func.value), *map(_value, node.args)))
    case ast.Call():
      return _node(_CALLS[node.func.id](*map(_value, node.args)))
    case ast.Subscript(slice=ast.Slice()):
      ends = [e and _value(e) for e in (node.slice.lower, node.slice.upper, node.slice.step)]
      return _node(_value(node.value)[slice(*ends)])
    case ast.Subscript():
      return _node(_value(node.value)[_value(node.slice)])
  (loop,) = node.generators
  kept = [item for item in loop.iter.elts
          if all(evaluate(_with(test, loop.target.id, item)) for test in loop.ifs)]
  return ast.List([_with(node.elt, loop.target.id, item) for item in kept], ast.Load())


def _with(node: ast.expr, name: str, item: ast.expr) -> ast.expr:
  """The expression with an item for a name."""
  class Put(ast.NodeTransformer):
    def visit_Name(self, found: ast.Name) -> ast.expr:
      return item if found.id == name else found
  return Put().visit(parse(ast.unparse(node)))


def evaluate(node: ast.expr) -> Any:
  while not _is_value(node):
    node, _ = reduce(node)
  return _value(node)


LEVELS = ("2 operations on numbers", "4 operations on numbers, // and %", "lists", "strings",
          "conditions", "comprehensions")


def _draw(level: int, choices: Choices) -> str:
  text = (_short, _numbers, _lists, _strings, _conditions, _comprehensions)[level](choices)
  return ast.unparse(parse(text))


def _digit(choices: Choices) -> int:
  return choices.between(0, 9)


def _short(c: Choices) -> str:
  a, b, d = _digit(c), _digit(c), _digit(c)
  first, second = c.one("+-*"), c.one("+-*")
  return c.one((f"({a}{first}{b}){second}{d}", f"{a}{first}({b}{second}{d})"))


def _numbers(c: Choices) -> str:
  inner = f"({_digit(c)}{c.one('+-*')}{_digit(c)})"
  other = f"({_digit(c)}{c.one('+-*')}{_digit(c)})"
  sign = c.one(("//", "%", "*"))
  whole = f"({inner}{c.one('+-')}{other}){sign}{c.between(2, 9)}"
  return f"{c.between(0, 99)}{c.one('+-')}{whole}" if sign != "*" else f"{whole}"


def _list(c: Choices, least: int = 3, most: int = 5) -> str:
  return repr([_digit(c) for _ in range(c.between(least, most))])


def _lists(c: Choices) -> str:
  items = c.one((lambda: _list(c), lambda: f"sorted({_list(c)})",
                 lambda: f"({_list(c, 2, 3)} + {_list(c, 2, 3)})"))()
  part = c.one((f"{items}[::-1]", f"{items}[1:]", f"{items}[:2]", items))
  one = f"{c.one(('len', 'sum', 'max', 'min'))}({part})"
  return c.one((f"{one} {c.one('+-*')} {_digit(c)}", part, f"{items}[{c.one((0, 1, -1))}]"))


def _word(c: Choices, least: int = 3, most: int = 6) -> str:
  return repr("".join(c.one("abcde") for _ in range(c.between(least, most))))


def _strings(c: Choices) -> str:
  word = c.one((lambda: _word(c), lambda: f"({_word(c, 2, 3)} + {_word(c, 2, 3)})"))()
  part = c.one((f"{word}[::-1]", f"{word}[1:]", f"{word}[:-1]", f"{word}[::2]", f"{word}.upper()",
                f"{word}.replace({_word(c, 1, 1)}, {_word(c, 1, 2)})"))
  return c.one((part, f"{part} * {c.between(2, 3)}", f"len({part}) {c.one('+-')} {_digit(c)}",
                f"{word}.count({_word(c, 1, 1)})", f"{part}.find({_word(c, 1, 1)})"))


def _test(c: Choices) -> str:
  sign = c.one(("<", ">", "==", "!=", "<=", ">="))
  return c.one((
      lambda: f"{_digit(c)} {c.one('+-*')} {_digit(c)} {sign} {c.between(0, 20)}",
      lambda: f"{_digit(c)} in {_list(c)}", lambda: f"len({_word(c)}) {sign} {_digit(c)}"))()


def _conditions(c: Choices) -> str:
  test = c.one((lambda: f"{_test(c)} {c.one(('and', 'or'))} {_test(c)}",
                lambda: f"not {_test(c)} {c.one(('and', 'or'))} {_test(c)}"))()
  return c.one((lambda: test, lambda: f"({_short(c)} if {test} else {_short(c)})"))()


def _comprehensions(c: Choices) -> str:
  element = f"x {c.one('+-*')} {_digit(c)}"
  test = c.one((f"x > {c.between(1, 5)}", f"x % 2 == {c.below(2)}"))
  found = f"[{element} for x in {_list(c, 4, 6)} if {test}]"
  return c.one((lambda: f"sorted({found})[::-1]",
                lambda: f"sum({found}) {c.one('+-')} len({_list(c)})",
                lambda: f"sum({found}) if {_test(c)} else len({found})",
                lambda: f"[{found}, {_list(c)}][{c.one((0, 1))}]"))()


def _solve(text: str) -> Solution:
  node, lines, checks = parse(text), [], []
  lines.append(source(node))
  while not _is_value(node):
    node, (before, after) = reduce(node)
    lines.append(source(node))
    checks.append(f"{source(before)} is {source(after)}")
  return Solution(f"What does Python say to {lines[0]}", repr(_value(node)), lines,
                  ["Check:", *checks, "All fits."])


FAMILIES = (Family("python", LEVELS, _draw, lambda text: text, _solve),)
