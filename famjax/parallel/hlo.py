"""What a compiled program does and sends between devices, read from its text.

What stands in the body of a loop counts as often as the loop turns. XLA's text says so beside the
loop, or gives its end as a constant of its condition; its own cost analysis counts the body once.
"""

import collections
import math
import re
from typing import Any, NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "s16": 2,
    "u16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip
_HEAD = re.compile(r"^(ENTRY )?(%[\w.\-]+) .*\{$")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
_WHILE = re.compile(r"\bwhile\(.*condition=(%[\w.\-]+), body=(%[\w.\-]+)")
_CALLED = re.compile(
    "(?:calls|to_apply|called_computations|branch_computations|true_computation|false_computation)"
    r"=\{?((?:%[\w.\-]+(?:, )?)+)"
)
_KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONSTANT = re.compile(r"\bconstant\((\d+)\)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_SHAPE = re.compile(r"\b(\w+)\[([\d,]*)\]")
_LAID_OUT = re.compile(r"\b(\w+)\[([\d,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"^ +(?:ROOT )?(%[\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_MOVES_NOTHING = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy-done", "slice-done",
)  # fmt: skip


def memory_of(program: Any) -> dict[str, int]:
  """Bytes of a compiled program on a device, as its compiler counts them.

  Returns:
    "argument", "temp", "output", "alias" (of the output in arguments' place), and "used" by all.
  """
  analysis = program.memory_analysis()
  names = ("argument", "temp", "output", "alias")
  parts = {name: getattr(analysis, f"{name}_size_in_bytes") for name in names}
  return parts | {"used": parts["argument"] + parts["temp"] + parts["output"] - parts["alias"]}


class Collective(NamedTuple):
  """Collectives of a kind in the same loops.

  Attributes:
    kind: one of KINDS.
    loops: turns of the loops around it, the outermost first: (4, 18).
    count: how many there are in the program.
    bytes: of all of their results, each once.
  """

  kind: str
  loops: tuple[int, ...]
  count: int
  bytes: int

  @property
  def times(self) -> int:
    """How often they run."""
    return self.count * math.prod(self.loops)

  @property
  def total_bytes(self) -> int:
    """Bytes of all results of a run."""
    return self.bytes * math.prod(self.loops)


def collectives(text: str) -> list[Collective]:
  """Counts a compiled program's collectives by kind and loops.

  Args:
    text: of an optimised HLO module, `compiled.as_text()`.
  """
  bodies, entry = _computations(text)
  loops = _loops_around(bodies, entry)
  found = {}  # by channel: the parts of an asynchronous one stand in several computations
  for name, lines in bodies.items():
    for line in lines:
      match = _COLLECTIVE.search(line)
      if match is None or name not in loops:
        continue
      kind = match[2]
      if kind == "all-reduce" and name.startswith("%all-reduce-scatter"):  # TPU's way to write one
        kind = "reduce-scatter"
      channel = re.search(r"channel_id=(\d+)", line)
      key = (channel[1] if channel else (name, line), kind, loops[name])
      found[key] = (kind, loops[name], _bytes(match[1], kind if "-start(" in line else None))
  counts, sizes = collections.Counter(), collections.Counter()
  for kind, around, size in found.values():
    counts[kind, around] += 1
    sizes[kind, around] += size
  return [Collective(*key, count, sizes[key]) for key, count in sorted(counts.items())]


def estimated_cycles(text: str) -> dict[tuple[int, ...], int]:
  """Cycles of one chip's core by the TPU compiler's estimate; empty: it has made none.

  What chips send one another has no estimate.

  Args:
    text: as above.

  Returns:
    By turns of the loops around it, the outermost first: cycles of all of these turns.
  """
  bodies, entry = _computations(text)
  found = collections.Counter()
  for name, around in _loops_around(bodies, entry).items():
    cycles = sum(int(cycles) for line in bodies[name] for cycles in _CYCLES.findall(line))
    found[around] += cycles * math.prod(around)
  return {around: cycles for around, cycles in found.items() if cycles}


class Kernels(NamedTuple):
  """What a program starts on a device in the same loops.

  Attributes:
    loops: turns of the loops around it, the outermost first.
    count: how many there are in the program.
    bytes: of all of their results, each once; what is written into a part of an array that is there
      already counts nothing.
  """

  loops: tuple[int, ...]
  count: int
  bytes: int


def kernels(text: str) -> list[Kernels]:
  """Counts what a compiled program starts: fusions, copies, calls of libraries.

  Args:
    text: as above. Branches of conditions are left out.
  """
  bodies, entry = _computations(text)
  counts, sizes = collections.Counter(), collections.Counter()
  for name, around in _loops_around(bodies, entry, called_too=False).items():
    for result, shapes, kind, _ in filter(None, map(_parts, bodies[name])):
      if kind not in (*_MOVES_NOTHING, "while", "conditional"):
        counts[around] += 1
        sizes[around] += 0 if "dynamic-update-slice" in result.replace("_", "-") else _bytes(shapes, None)
  return [Kernels(around, count, sizes[around]) for around, count in sorted(counts.items())]


def moved_bytes(text: str) -> int:
  """Bytes that a TPU program without loops takes from a chip's main memory, and brings there.

  The compiler's own count takes what is fetched ahead into fast memory, `S(1)`, three times.

  Args:
    text: as above.
  """
  bodies, entry = _computations(text)
  sizes, total = {}, 0
  for name, shapes, kind, rest in filter(None, map(_parts, bodies[entry])):
    laid_out = [(_size(dtype, dims), "S(1)" in at) for dtype, dims, at in _LAID_OUT.findall(shapes)]
    sizes[name] = sum(size for size, fast in laid_out if not fast)
    if kind in ("copy-start", "slice-start"):  # the source is among what it gives, and a flag
      total += min(size for size, _ in laid_out if size > 4)
    elif kind not in _MOVES_NOTHING:
      operands = re.findall(r"%[\w.\-]+", rest.partition("), ")[0])
      total += sizes[name] + sum(sizes.get(one, 0) for one in operands)
  return total


def _parts(line: str) -> tuple[str, ...] | None:
  """Name, shapes of the result, kind and the rest of an instruction."""
  match = _INSTRUCTION.match(line)
  return match and match.groups()


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  """The lines of each computation by name, and the name of the one that the program begins with."""
  bodies, entry, lines = {}, None, []
  for line in text.splitlines():
    head = _HEAD.match(line)
    if head:
      lines = bodies[head[2]] = []
      entry = head[2] if head[1] else entry
    else:
      lines.append(line)
  return bodies, entry


def _loops_around(
    bodies: dict[str, list[str]], entry: str, called_too: bool = True
) -> dict[str, tuple[int, ...]]:
  """Turns of the loops around every computation that the program reaches, the innermost last.

  Without those that are `called_too`, fused ones and branches say, bodies of loops are left.
  """
  loops, to_do = {entry: ()}, [entry]
  while to_do:
    name = to_do.pop()
    for line in bodies[name]:
      named = _CALLED.findall(line) if called_too else []
      called = [(c, ()) for names in named for c in names.split(", ")]
      if match := _WHILE.search(line):
        known = _KNOWN.search(line)
        turns = int(known[1]) if known else _turns(bodies[match[1]])
        called.append((match[2], (turns,)))
      for other, turns in called:
        around = loops[name] + turns
        if other in bodies and math.prod(around) > math.prod(loops.get(other, (0,))):
          loops[other] = around
          to_do.append(other)
  return loops


def _turns(condition: list[str]) -> int:
  """How often a loop turns; 1 where its condition does not say it."""
  constants = [int(c) for line in condition for c in _CONSTANT.findall(line)]
  return max(constants, default=1)


def _bytes(shapes: str, started: str | None) -> int:
  """Bytes of a result.

  Args:
    shapes: of the result; for an asynchronous start of most kinds, of its operands, as many results
      and scalars that the two ends need.
    started: the kind of collective that is started; None: the result is all.
  """
  sizes = [
      _size(dtype, dims)
      for dtype, dims in _SHAPE.findall(shapes)
      if dtype in _BYTES and (dims or not started)
  ]
  return sum(sizes[len(sizes) // 2 :] if started not in (None, "all-reduce") else sizes)


def _size(dtype: str, dims: str) -> int:
  """Bytes of an array, of its dtype and its sizes, "2,3"."""
  return math.prod(map(int, filter(None, dims.split(",")))) * _BYTES[dtype]
