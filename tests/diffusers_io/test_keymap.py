"""The naming rule: paths to checkpoint keys, layouts, stacks, old spellings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmdr_jax.diffusers_io import keymap


def shape(*axes):
    return jax.ShapeDtypeStruct(axes, jnp.float32)


TREE = {
    "conv": {"kernel": shape(3, 3, 4, 8), "bias": shape(8)},
    "norm": {"scale": shape(8)},
    "table": {"embedding": shape(10, 4), "class_embedding": shape(4)},
    "blocks.1:3": {"attn": {"to_out.0": {"kernel": shape(2, 8, 6), "bias": shape(2, 6)}}},
}


def test_keys_shapes_and_places():
    found = {e.key: e for e in keymap.entries(TREE)}
    assert {key: e.shape for key, e in found.items()} == {
        "conv.weight": (8, 4, 3, 3),
        "conv.bias": (8,),
        "norm.weight": (8,),
        "table.weight": (10, 4),
        "table.class_embedding": (4,),
        "blocks.1.attn.to_out.0.weight": (6, 8),
        "blocks.2.attn.to_out.0.weight": (6, 8),
        "blocks.1.attn.to_out.0.bias": (6,),
        "blocks.2.attn.to_out.0.bias": (6,),
    }
    last = found["blocks.2.attn.to_out.0.weight"]
    assert last.path == ("blocks.1:3", "attn", "to_out.0", "kernel") and last.index == (1,)


def test_layouts_are_inverse_and_pytorchs():
    found = {e.key: e for e in keymap.entries(TREE)}
    for entry in found.values():
        tensor = np.random.default_rng(0).normal(size=entry.shape)
        np.testing.assert_array_equal(entry.to_torch(entry.to_ours(tensor)), tensor)
    tensor = np.arange(8 * 4 * 3 * 3).reshape(8, 4, 3, 3)
    assert found["conv.weight"].to_ours(tensor)[2, 1, 3, 5] == tensor[5, 3, 2, 1]
    assert found["table.weight"].to_ours(np.zeros((10, 4))).shape == (10, 4)


def test_stacks_within_stacks():
    tree = {"down.0:2": {"blocks.0:3": {"fc": {"kernel": shape(2, 3, 4, 5)}}}}
    found = {e.key: e for e in keymap.entries(tree)}
    assert len(found) == 6 and found["down.1.blocks.2.fc.weight"].index == (1, 2)


def test_a_tree_that_breaks_the_rule():
    with pytest.raises(ValueError, match="stack"):
        keymap.entries({"blocks.0:3": {"bias": shape(2, 4)}})
    with pytest.raises(ValueError, match="2 or 4 axes"):
        keymap.entries({"fc": {"kernel": shape(2, 3, 4)}})


def test_flatten_round_trip():
    assert keymap.unflatten(dict(keymap.leaves(TREE))) == TREE


@pytest.mark.parametrize(
    "key, old",
    [
        ("text_model.encoder.layers.0.mlp.fc1.weight", "encoder.layers.0.mlp.fc1.weight"),
        ("encoder.layers.0.mlp.fc1.weight", "text_model.encoder.layers.0.mlp.fc1.weight"),
        ("shared.weight", "encoder.embed_tokens.weight"),
        ("encoder.embed_tokens.weight", "shared.weight"),
        ("decoder.mid_block.attentions.0.to_q.weight", "decoder.mid_block.attentions.0.query.weight"),
        ("decoder.mid_block.attentions.0.to_out.0.bias", "decoder.mid_block.attentions.0.proj_attn.bias"),
    ],
)
def test_old_spellings_resolve(key, old):
    entry = keymap.Entry(key, ("x",), (), (1,), False)
    assert keymap.resolve([entry], [old]) == ({key: old}, [], [])
    assert keymap.resolve([entry], [old, key]) == ({key: key}, [], [])


def test_unmatched_keys_are_reported_and_position_ids_are_not():
    entry = keymap.Entry("fc.weight", ("x",), (), (1,), False)
    held = ["fc.weights", "text_model.embeddings.position_ids"]
    assert keymap.resolve([entry], held) == ({}, ["fc.weight"], ["fc.weights"])
    assert keymap.closest("fc.weight", ["fc.weights", "abc"]) == "fc.weights"
    assert keymap.closest("fc.weight", ["zzz"]) == "none alike"
