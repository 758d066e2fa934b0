import numpy as np
import pytest

from tests import tiny_pipelines
from tests.training import tiny


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """A random SD3 folder without T5."""
    return tiny_pipelines.save(tmp_path_factory.mktemp("teacher") / "sd3", "sd3_no_t5")


@pytest.fixture(scope="session")
def reward_folder(tmp_path_factory):
    from tests.rewards.test_clip_reward import make_folder

    folder = tmp_path_factory.mktemp("reward")
    make_folder(folder)
    return folder


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(tiny.PROMPTS) + "\n")
    return file


def leaves_equal(a, b) -> bool:
    import jax

    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)
