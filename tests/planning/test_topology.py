"""Names of slices."""

import pytest

from dmdr_jax.errors import UserError
from dmdr_jax.planning import topology


@pytest.mark.parametrize(
    "name, shape, chips",
    [
        ("v5e:4x4", (4, 4), 16),
        ("v5litepod-1", (1, 1), 1),
        ("v5litepod-8", (2, 4), 8),
        ("v5e-16", (4, 4), 16),
        ("v5litepod-128", (8, 16), 128),
        ("v6e-64", (8, 8), 64),
        ("V5P-8", (2, 2, 1), 4),
        ("v5p-16", (2, 2, 2), 8),
        ("v5p-64", (2, 4, 4), 32),
        ("v5p-128", (4, 4, 4), 64),
        ("v4-32", (2, 2, 4), 16),
        ("v5p-1024", (8, 8, 8), 512),
        ("2*v5e:16x16", (16, 16), 512),
    ],
)
def test_names(name, shape, chips):
    where = topology.parse(name)
    assert (where.shape, where.chips) == (shape, chips)
    assert topology.parse(str(where)) == where


@pytest.mark.parametrize(
    "name, message",
    [
        ("v5e", "not understood"),
        ("v5e:4x", "not understood"),
        ("v9-4", "no chip 'v9'"),
        ("v5lite:4x4x4", "2 axes"),
        ("v5p:4x4", "3 axes"),
        ("v5p-63", "powers of two"),
        ("v5e-24", "powers of two"),
        ("0*v5e:4x4", "2 axes"),
        ("v5e:0x4", "2 axes"),
        ("v5e:999x999", "2 axes"),
    ],
)
def test_what_is_no_slice(name, message):
    with pytest.raises(UserError, match=message):
        topology.parse(name)


def test_slices_of_a_kind():
    assert [s.chips for s in topology.smaller_and_larger(topology.CHIPS["v5e"], 32)] == [1, 4, 8, 16, 32]
    assert [s.chips for s in topology.smaller_and_larger(topology.CHIPS["v5p"], 16)] == [4, 8, 16]
    assert topology.kind_of("v5litepod") == "v5e" and topology.kind_of("tpu") is None
