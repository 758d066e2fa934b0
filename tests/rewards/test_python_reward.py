"""A user's own function as a reward: in JAX with a gradient, on the host without, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmdr_jax.errors import UserError
from dmdr_jax.rewards.base import Reward, RewardSpec, require_gradient
from dmdr_jax.rewards.python_reward import from_bytes, load_python_reward, to_bytes

SOURCE = """
import jax.numpy as jnp
import numpy as np
import torch
from dmdr_jax.rewards.python_reward import host_scorer, text_encoder

def sharpness(images, prompts):
    return jnp.abs(jnp.diff(images, axis=1)).mean((1, 2, 3))

@text_encoder(lambda prompts: np.array([[p.count("red")] for p in prompts], np.float32))
def redness(images, wanted):
    return images[..., 0].mean((1, 2)) * wanted[:, 0]

@host_scorer
def judge(images, prompts):
    assert isinstance(images, np.ndarray) and all(isinstance(p, str) for p in prompts)
    return [image.mean() + len(prompt) for image, prompt in zip(images, prompts)]

def unmarked(images, prompts):
    return torch.from_numpy(np.array(images)).mean((1, 2, 3)) + torch.tensor([len(p) for p in prompts])

def reads_strings(images, prompts):
    return images.mean((1, 2, 3)) + jnp.array([len(p) for p in prompts])

def scalar(images, prompts):
    return images.mean()

SIZE = 32
def of_one_size(images, prompts):
    return images.reshape(-1, SIZE * SIZE * 3).mean(-1)
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("mine") / "my_rewards.py"
    path.write_text(SOURCE)
    return path


def load(file, name, **fields):
    return load_python_reward(RewardSpec("mine", f"{file}:{name}", **fields))


IMAGES = np.random.default_rng(0).random((3, 8, 8, 3)).astype(np.float32)
PROMPTS = ["red", "a red red circle", "ünïcode"]


def compiled(reward):
    return jax.jit(reward.score)({}, IMAGES, reward.text_features(reward.tokenize(PROMPTS)))


def test_a_jax_function_has_a_gradient_and_is_the_same_compiled(file):
    reward = load(file, "sharpness")
    assert isinstance(reward, Reward) and reward.differentiable
    expected = np.abs(np.diff(IMAGES, axis=1)).mean((1, 2, 3))
    np.testing.assert_allclose(compiled(reward), expected, rtol=1e-5)
    np.testing.assert_allclose(reward.score_prompts(IMAGES, PROMPTS, batch=2), expected, rtol=1e-5)
    features = reward.tokenize(PROMPTS)
    grad = jax.grad(lambda x: reward.score({}, x, features).sum())(jnp.asarray(IMAGES))
    signs = np.sign(np.diff(IMAGES, axis=1)) / (7 * 8 * 3)
    np.testing.assert_allclose(
        grad,
        np.pad(signs, ((0, 0), (1, 0), (0, 0), (0, 0))) - np.pad(signs, ((0, 0), (0, 1), (0, 0), (0, 0))),
        atol=1e-6,
    )
    require_gradient([reward], "ReFL")


def test_a_text_encoder_gives_numbers_for_the_prompts(file):
    reward = load(file, "redness", prompt_prefix="red ")
    expected = IMAGES[..., 0].mean((1, 2)) * [2, 3, 1]
    np.testing.assert_allclose(compiled(reward), expected, rtol=1e-5)
    np.testing.assert_allclose(reward.score_prompts(IMAGES, PROMPTS), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["judge", "unmarked", "reads_strings"])
def test_a_host_scorer_gets_strings_and_has_no_gradient(file, name):
    reward = load(file, name)
    assert isinstance(reward, Reward) and not reward.differentiable
    expected = IMAGES.mean((1, 2, 3)) + [len(p) for p in PROMPTS]
    np.testing.assert_allclose(compiled(reward), expected, rtol=1e-5)
    np.testing.assert_allclose(reward.score_prompts(IMAGES, PROMPTS), expected, rtol=1e-5)
    features = reward.tokenize(PROMPTS)
    with pytest.raises(UserError, match=r"'mine' has no gradient \(.*write it in JAX"):
        jax.grad(lambda x: reward.score({}, x, features).sum())(jnp.asarray(IMAGES))
    with pytest.raises(UserError, match=r"'mine' has no gradient .* and ReFL needs one"):
        require_gradient([reward], "ReFL")


def test_without_its_gradient_a_host_scorer_may_stand_in_a_differentiated_program(file):
    """Group methods differentiate a loss that is weighted by scores, not the scores."""
    reward = load(file, "judge")
    features = reward.tokenize(PROMPTS)

    def loss(x):
        return (reward.score({}, jax.lax.stop_gradient(x), features) * x.mean((1, 2, 3))).sum()

    grad = jax.jit(jax.grad(loss))(jnp.asarray(IMAGES))
    expected = (IMAGES.mean((1, 2, 3)) + [len(p) for p in PROMPTS]) / IMAGES[0].size
    np.testing.assert_allclose(grad.mean((1, 2, 3)), expected, rtol=1e-5)


def test_reasons_are_given(file):
    assert "marked as a host_scorer" in load(file, "judge").reason
    assert "JAX cannot trace it: TracerArrayConversionError" in load(file, "unmarked").reason
    assert "text_encoder" in load(file, "reads_strings").reason


def test_a_function_for_one_size_is_found_to_be_jax(file):
    assert load(file, "of_one_size").differentiable


def test_a_module_by_name(file, monkeypatch):
    monkeypatch.syspath_prepend(str(file.parent))
    reward = load_python_reward(RewardSpec("mine", "my_rewards:sharpness"))
    assert reward.differentiable and reward.score_files([(255 * IMAGES[0]).astype(np.uint8)], ["x"]).shape == (1,)


def test_bad_input_is_named(file, tmp_path):
    with pytest.raises(UserError, match="has no function 'none'; it has judge, of_one_size, reads_strings, redness"):
        load(file, "none")
    with pytest.raises(UserError, match=r"there is no file .*nothing\.py"):
        load(tmp_path / "nothing.py", "f")
    with pytest.raises(UserError, match="no_such_module cannot be imported"):
        load("no_such_module", "f")
    (tmp_path / "bad.py").write_text("1 / 0")
    with pytest.raises(UserError, match=r"bad\.py cannot be imported \(ZeroDivisionError"):
        load(tmp_path / "bad.py", "f")
    with pytest.raises(UserError, match=r"gave scores of shape \(\) for 2 images"):
        load(file, "scalar")


def test_texts_survive_as_bytes():
    texts = ["", "plain", "ünï", "日本語" * 200]
    back = from_bytes(to_bytes(texts))
    assert back[:3] == texts[:3] and texts[3].startswith(back[3]) and len(back[3]) > 300
