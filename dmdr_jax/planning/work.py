"""The work in a traced program: operations, the memory traffic of its products, what it gathers.

All are counted in the jaxpr, every turn of a loop included, which the compiler's own analysis does not. Operations are
those of matrix products and convolutions, two to a multiply-add, and of device kernels by their own bodies.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any


def mean_turns(scopes: str) -> float:
    """Of a loop whose turns are unknown: as the innermost of the scopes that it stands in says, else 1."""
    # Imports jax, which programs that only show their help must not.
    from dmdr_jax.diffusion.sampler import MEAN_TURNS

    told = re.findall(rf"{MEAN_TURNS}(\d+(?:\.\d+)?)", scopes)
    return float(told[-1]) if told else 1.0


@dataclasses.dataclass(frozen=True)
class Work:
    """Totals over all devices, but for ``gathered``, which every device receives.

    Attributes:
      flops: operations.
      traffic: bytes of the operands and results of products, as if each went to memory and back.
      gathered: bytes of parameters made whole by `dmdr_jax.models.placement`.
    """

    flops: float = 0.0
    traffic: float = 0.0
    gathered: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.traffic + other.traffic, self.gathered + other.gathered)

    def __mul__(self, times: float) -> "Work":
        return Work(self.flops * times, self.traffic * times, self.gathered * times)


def measure(jaxpr: Any, split: Sequence[bool] | None = None) -> Work:
    """The work of a (closed) jaxpr and of all it calls.

    A `while`, whose turns are unknown, counts once or as its scope says (`mean_turns`), a `cond` as its dearest branch.

    Args:
      split: of each input, whether its parts lie on several devices: what is made of inputs that are whole everywhere
        need not be gathered. None: all of them may be.
    """
    return _walk(jaxpr, split)[0]


def count(jaxpr: Any) -> float:
    """The operations alone."""
    return measure(jaxpr).flops


Found = tuple[Work, list[bool]]
"""Some work, and which of its results come from what is split."""


def _walk(jaxpr: Any, split: Sequence[bool] | None) -> Found:
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    known = dict.fromkeys(inner.invars, True) if split is None else dict(zip(inner.invars, split, strict=True))

    def comes_from_split(variable: Any) -> bool:
        is_literal = hasattr(variable, "val")
        return not is_literal and known.get(variable, split is None)

    total = Work()
    for equation in inner.eqns:
        work, results = _one(equation, [comes_from_split(variable) for variable in equation.invars])
        total += work
        known.update(zip(equation.outvars, results, strict=True))
    return total, [comes_from_split(variable) for variable in inner.outvars]


def _one(equation: Any, given: list[bool]) -> Found:
    name, parameters = equation.primitive.name, equation.params
    mixed = [any(given)] * len(equation.outvars)
    if name == "dot_general":
        return Work(2 * equation.outvars[0].aval.size * _contracted(equation), _bytes(equation)), mixed
    if name == "conv_general_dilated":
        return Work(2 * equation.outvars[0].aval.size * _kernel_size(equation), _bytes(equation)), mixed
    if name == "scan":
        first, carried = parameters["num_consts"], parameters["num_carry"]
        given = [*given[:first], *[any(given)] * carried, *given[first + carried :]]
        work, results = _walk(parameters["jaxpr"], given)
        return work * parameters["length"], results
    if name == "cond":
        branches = [_walk(branch, given[1:]) for branch in parameters["branches"]]
        return max((work for work, _ in branches), key=lambda work: work.flops), mixed
    if name == "pallas_call":
        return _kernel(equation), mixed
    if name == "name":
        return _named(equation) if given[0] else Work(), given
    work, results = Work(), mixed
    for jaxpr in (jaxpr for value in parameters.values() for jaxpr in _jaxprs(value)):
        arguments = len(getattr(jaxpr, "jaxpr", jaxpr).invars)
        own, found = _walk(jaxpr, given if arguments == len(given) else [any(given)] * arguments)
        work += own
        results = found if len(found) == len(mixed) else mixed
    if name == "while":
        return work * mean_turns(str(equation.source_info.name_stack)), results
    if name == "shard_map":  # its body is what one device does
        return dataclasses.replace(work * parameters["mesh"].size, gathered=work.gathered), results
    return work, results


def _kernel(equation: Any) -> Work:
    """A Pallas kernel: its body, for every point of the grid."""
    turns = math.prod(n for n in equation.params["grid_mapping"].grid if isinstance(n, int))
    return Work(measure(equation.params["jaxpr"]).flops * turns, _bytes(equation))


def _named(equation: Any) -> Work:
    # Imports jax, which programs that only show their help must not.
    from dmdr_jax.models.placement import GATHER_NAME

    gathered = equation.params["name"] == GATHER_NAME
    return Work(gathered=_size(equation.outvars[0].aval) if gathered else 0.0)


def _contracted(equation: Any) -> int:
    (contracting, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return math.prod(shape[axis] for axis in contracting)


def _kernel_size(equation: Any) -> int:
    """Multiply-adds for one output element: the kernel's taps times the input features of a group."""
    spec, kernel = equation.params["dimension_numbers"].rhs_spec, equation.invars[1].aval.shape
    return math.prod(kernel) // kernel[spec[0]]


def _bytes(equation: Any) -> float:
    return float(sum(_size(variable.aval) for variable in (*equation.invars, *equation.outvars)))


def _size(aval: Any) -> int:
    shape = getattr(aval, "shape", ())
    return math.prod(shape) * getattr(getattr(aval, "dtype", None), "itemsize", 0)


def _jaxprs(value: Any) -> Iterator[Any]:
    for v in value if isinstance(value, tuple | list) else [value]:
        if hasattr(v, "eqns") or hasattr(v, "jaxpr"):
            yield v
