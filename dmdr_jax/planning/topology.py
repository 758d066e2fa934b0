"""TPU slices by name: which chips they have, how many, in which torus, and what one chip can do.

Understood are `v5e:4x4` (as JAX names topologies), `v5litepod-16` and `v5p-64` (as Google Cloud names accelerator
types; v4 and v5p count cores, two per chip), and `2*v5e:16x16` for two slices with a slower network between them.
"""

import dataclasses
import difflib
import math
import re
from typing import Any

from dmdr_jax.errors import UserError

GIB = 2**30
_LARGEST = 2**16  # chips


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, and what its maker says of it.

    Attributes:
      name: as in a topology's name.
      hbm: bytes that the compiler lets a program have (its own message when one asks for more).
      flops: bf16 operations per second at most.
      bandwidth: bytes per second between HBM and chip.
      link: bytes per second, both ways together, along one axis of the torus.
      axes: of the torus.
      per_core: accelerator types count cores, two per chip.
    """

    name: str
    hbm: float
    flops: float
    bandwidth: float
    link: float
    axes: int
    per_core: bool = False


CHIPS = {
    "v4": Chip("v4", 30.75 * GIB, 275e12, 1.23e12, 90e9, 3, per_core=True),
    "v5e": Chip("v5e", 15.75 * GIB, 197e12, 0.82e12, 90e9, 2),
    "v5p": Chip("v5p", 95.74 * GIB, 459e12, 2.77e12, 180e9, 3, per_core=True),
    "v6e": Chip("v6e", 31.25 * GIB, 918e12, 1.64e12, 180e9, 2),
}
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "trillium": "v6e"}
_MEGACORE = ("v4", "v5p")


@dataclasses.dataclass(frozen=True)
class Slice:
    """Slices of one shape.

    Attributes:
      shape: chips along each axis of one slice's torus.
      count: how many slices.
    """

    chip: Chip
    shape: tuple[int, ...]
    count: int = 1

    @property
    def in_slice(self) -> int:
        return math.prod(self.shape)

    @property
    def chips(self) -> int:
        return self.in_slice * self.count

    def __str__(self) -> str:
        name = f"{self.chip.name}:{'x'.join(map(str, self.shape))}"
        return name if self.count == 1 else f"{self.count}*{name}"


def parse(name: str) -> Slice:
    """The slice of a name.

    Raises:
      UserError: no such chip, or no such size.
    """
    match = re.fullmatch(r"(?:(\d+)\*)?([a-z]\w*?)(?::(\d+(?:x\d+)*)|-(\d+))", name.strip().lower())
    if match is None:
        raise UserError(f"topology {name!r} is not understood; write v5e:4x4, v5p-64, v5litepod-16 or 2*v5e:16x16.")
    count, kind, shape, number = match.groups()
    kind = _ALIASES.get(kind, kind)
    if kind not in CHIPS:
        near = difflib.get_close_matches(kind, CHIPS, n=1) or list(CHIPS)
        raise UserError(f"topology {name!r}: there is no chip {kind!r} here; the known ones are {', '.join(near)}.")
    chip = CHIPS[kind]
    sizes = tuple(map(int, shape.split("x"))) if shape else _shape(name, chip, int(number))
    slices = int(count or 1)
    if len(sizes) != chip.axes or min(sizes) < 1 or slices < 1 or math.prod(sizes) > _LARGEST:
        example = "x".join(["4"] * chip.axes)
        raise UserError(f"topology {name!r}: a {kind} slice has {chip.axes} axes of chips, such as {kind}:{example}.")
    return Slice(chip, sizes, slices)


def kind_of(name: str) -> str | None:
    """The kind of chip of that name; None where there is none."""
    kind = _ALIASES.get(name.strip().lower(), name.strip().lower())
    return kind if kind in CHIPS else None


def _shape(name: str, chip: Chip, number: int) -> tuple[int, ...]:
    """The torus of an accelerator type: as near to a cube (or square) as powers of two allow."""
    chips = number // 2 if chip.per_core else number
    if chips < 1 or chips & (chips - 1) or chips * (2 if chip.per_core else 1) != number:
        raise UserError(
            f"topology {name!r}: {chip.name} types come in powers of two; give the shape, as {chip.name}:4x4."
        )
    exponent = chips.bit_length() - 1
    if chip.axes == 2:
        return tuple(2 ** ((exponent + i) // 2) for i in range(2))
    if exponent < 3:  # a host's chips lie in a plane
        return tuple(2 ** int(i < exponent) for i in range(3))
    return tuple(2 ** ((exponent + i) // 3) for i in range(3))


def describe_devices(where: Slice) -> list[Any]:
    """The devices of a slice that is not here, as libtpu describes them to JAX.

    Raises:
      UserError: libtpu knows no such slice.
    """
    from jax.experimental import topologies

    shape = "x".join(map(str, where.shape))
    options: dict[str, Any] = {"chip_config_name": "megacore"} if where.chip.name in _MEGACORE else {}
    if where.in_slice < 4:
        options["chips_per_host_bounds"] = [*where.shape, 1][:3]
    if where.count > 1:
        options["num_slices"] = where.count
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=f"{where.chip.name}:{shape}", **options)
    except Exception as error:  # of libtpu, of several kinds
        raise UserError(f"libtpu does not know the topology {where}: {str(error).splitlines()[0]}") from error
    devices = list(found.devices)
    if len(devices) != where.chips:
        raise UserError(f"libtpu gives {len(devices)} devices for the {where.chips} chips of {where}.")
    return devices


def smaller_and_larger(chip: Chip, largest: int) -> list[Slice]:
    """The slices of a chip up to a number of chips, ascending, as accelerator types name them."""
    step = 2 if chip.per_core else 1
    sizes = [2**k for k in range(largest.bit_length()) if 2**k <= largest]
    usable = [n for n in sizes if n >= 4 or (n == 1 and chip.axes == 2)]
    return [parse(f"{chip.name}-{n * step}") for n in usable]
