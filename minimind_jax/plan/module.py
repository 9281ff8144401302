"""Reading the text of a compiled program: which custom calls and collectives are in it, and how often they run.

The text is a list of computations. One line is one operation: `%name = shape operation(operands), attributes`. Loops
name their body and condition, fusions and calls the computation they run; so each computation runs as many times as
those that name it, times the rounds of a loop. The compilers of GPU, TPU and CPU write the same language with habits of
their own, which are named where they matter.
"""

import dataclasses
import graphlib
import math
import re
from typing import NamedTuple

COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "c64": 8, "c128": 16}  # the others say their bits: f32, f8e4m3fn
ATTENTION_CALLS = ("__cudnn$fmha", "tpu_custom_call", "mosaic_gpu")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations|true_computation|false_computation)"
    r"=\{?((?:%[\w.\-]+(?:, )?)+)"
)


class Operation(NamedTuple):
    name: str
    shape: str
    kind: str
    rest: str  # operands and attributes

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.partition(")")[0])


@dataclasses.dataclass
class Collective:
    """count: in the program. runs: in one step, loops counted. bytes: that one device puts in or gets out, whichever is
    more, in one step."""

    count: int = 0
    runs: int = 0
    bytes: int = 0


class Module(NamedTuple):
    """collectives: by kind. custom_calls: by target, (count, runs). unknown_loops: taken for one round."""

    collectives: dict[str, Collective]
    custom_calls: dict[str, tuple[int, int]]
    unknown_loops: int


def read_module(text: str) -> Module:
    """What is in a compiled program's text (`compiled.as_text()`)."""
    computations, entry = split_computations(text)
    runs, unknown_loops = count_runs(computations, entry)
    collectives: dict[str, Collective] = {}
    custom_calls: dict[str, tuple[int, int]] = {}
    seen_channels = set()
    for name, operations in computations.items():
        shapes = {operation.name: operation.shape for operation in operations}
        for operation in operations:
            if operation.kind == "custom-call":
                target = re.search(r'custom_call_target="([^"]+)"', operation.rest)[1]
                count, times = custom_calls.get(target, (0, 0))
                custom_calls[target] = (count + 1, times + runs[name])
                continue
            kind = operation.kind.removesuffix("-start")
            if kind not in COLLECTIVES or _is_repeated(operation, seen_channels):
                continue
            if name.startswith("all-reduce-scatter"):  # TPU: an all-reduce of which each device keeps a slice
                kind = "reduce-scatter"
            found = collectives.setdefault(kind, Collective())
            found.count += 1
            found.runs += runs[name]
            found.bytes += runs[name] * _moved_bytes(operation, shapes)
    return Module(collectives, custom_calls, unknown_loops)


def split_computations(text: str) -> tuple[dict[str, list[Operation]], str]:
    """The operations of each computation, and the name of the one that is run."""
    computations: dict[str, list[Operation]] = {}
    entry = current = ""
    for line in text.splitlines():
        if line[:1] not in (" ", "}", ""):
            if match := _COMPUTATION.match(line):
                current = match[1]
                computations[current] = []
                entry = current if line.startswith("ENTRY") else entry
        elif current and (match := _OPERATION.match(line)):
            computations[current].append(Operation(*match.groups()))
    return computations, entry


def count_runs(computations: dict[str, list[Operation]], entry: str) -> tuple[dict[str, int], int]:
    """How often each computation runs in one run of the entry, and the loops whose rounds the text does not tell."""
    runs = dict.fromkeys(computations, 0)
    runs[entry] = 1
    unknown = 0
    called = {name: {c for operation in found for c in _called(operation)} for name, found in computations.items()}
    callees_first = tuple(graphlib.TopologicalSorter(called).static_order())
    for name in reversed(callees_first):
        if not runs.get(name):
            continue
        for operation in computations[name]:
            rounds = loop_rounds(operation, computations) if operation.kind == "while" else 1
            unknown += rounds is None
            for inner in _called(operation):
                if inner in runs:
                    runs[inner] += runs[name] * (1 if rounds is None else rounds)
    return runs, unknown


def loop_rounds(loop: Operation, computations: dict[str, list[Operation]]) -> int | None:
    """Rounds of a loop: what the compiler notes, or the constant its counter, from 0, is compared with."""
    if match := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(match[1])
    condition = computations.get(re.search(r"condition=%?([\w.\-]+)", loop.rest)[1], [])
    constants = {o.name: o.rest for o in condition if o.kind == "constant" and re.match(r"[su]32\[\]", o.shape)}
    for operation in condition:
        if operation.kind == "compare" and "direction=LT" in operation.rest:
            limits = [constants[name] for name in operation.operands if name in constants]
            return int(limits[0].partition(")")[0]) if limits else None
    if len(constants) == 1 and any(o.kind == "fusion" for o in condition):  # CPU, GPU: the comparison is fused
        return int(next(iter(constants.values())).partition(")")[0])
    return None


def _called(operation: Operation) -> list[str]:
    return [name for group in _CALLED.findall(operation.rest) for name in re.findall(r"%([\w.\-]+)", group)]


def _is_repeated(operation: Operation, seen_channels: set[str]) -> bool:
    """TPU: a collective that runs beside products is written into its start, each of those fusions, and its end."""
    if "async_collective_fusion_config" not in operation.rest:
        return False
    channel = re.search(r"channel_id=(\d+)", operation.rest)[1]
    is_repeated = channel in seen_channels
    seen_channels.add(channel)
    return is_repeated


def _moved_bytes(operation: Operation, shapes: dict[str, str]) -> int:
    operands = sum(shape_bytes(shapes.get(name, "")) for name in operation.operands)
    results = shape_bytes(operation.shape)
    if operation.kind in ("all-gather-start", "collective-permute-start"):  # their result holds the operand as well
        results -= operands
    return max(operands, results)


def shape_bytes(shape: str) -> int:
    """Bytes of `f32[8,128]{1,0}` or of all parts of a tuple of such."""
    total = 0.0
    for dtype, sizes in _SHAPE.findall(shape):
        bits = re.search(r"\d+", dtype)
        size = BYTES[dtype] if dtype in BYTES else int(bits[0]) / 8 if bits else 0  # token[] has none
        total += size * math.prod(int(n) for n in sizes.split(",") if n)
    return int(total)
