"""Presets: what a method fills in, what is kept, what is refused."""

import pytest

from configs import base
from dmdr_jax import cli, methods
from dmdr_jax.errors import UserError
from dmdr_jax.rewards.base import RewardSpec
from dmdr_jax.rewards.registry import open_spec
from dmdr_jax.shapes import assets
from dmdr_jax.shapes.prompts import balanced_train_prompts
from dmdr_jax.shapes.world import SMALL
from dmdr_jax.training import compose, setup
from tests.training import gaussian


def config(method="dmdr_refl", **changes):
    c = gaussian.configuration(method, **changes)
    c.rewards.hps = base.reward("", weight=0.5)
    return c


def test_the_default_is_dmdr_as_it_was():
    c = methods.resolve(base.get_config())
    assert (c.method, c.dm.weight, c.dm.form, c.dynamics.dg, c.dynamics.rs, c.fake.updates) == (
        "dmdr_refl",
        1.0,
        "plain",
        0.5,
        "dynamic",
        5,
    )
    assert c.group.size == 1 and c.rollout.updates == 1


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_leaves_nothing_open_and_resolves_twice_alike(method):
    c = methods.resolve(config(method))
    assert [key for key, value in cli.config_keys(c) if value is None] == []
    assert methods.resolve(c).to_dict() == c.to_dict()
    assert methods.METHODS[method].doc.count("Passes") == 1


def test_what_is_set_is_kept():
    c = methods.resolve(config("rtdmd", fake__updates=2, policy__clip=0.2, dynamics__rs="hold"))
    assert (c.fake.updates, c.policy.clip, c.dynamics.rs, c.dynamics.dg) == (2, 0.2, "hold", 0.0)


@pytest.mark.parametrize("name", ["gdmd", "rtdmd", "drpo", "dmd"])
def test_the_command_line_switches_the_method(name):
    c = methods.resolve(cli.load_config("configs/shapes/sd3.py", [f"method={name}", "dm.weight=0.5"]))
    assert c.method == name and c.dm.weight == 0.5
    assert c.fake.updates == 2 and c.dynamics.rs == "hold"  # the file's own


@pytest.mark.parametrize(
    "method, changes, message",
    [
        ("gdnd", {}, "config.method is 'gdnd'"),
        ("dmd", {"dpo__beta": 3.0}, "config.dpo.beta is set, but the method 'dmd' does not read"),
        ("dmdr_refl", {"gndm__draws": 8}, "config.gndm.draws is set"),
        ("gndm", {"gndm__mode": "median"}, "config.gndm.mode"),
        ("dmdr_grpo", {"group__size": 1}, "config.group.size is 1"),
        ("dmdr_grpo", {"group__size": 3}, "must be a multiple of config.group.size 3"),
        ("dmd", {"group__size": 4}, "has no groups"),
        ("dmdr_grpo", {"student__simulation": "ode"}, "needs a sampler with randomness"),
        ("dmdr_grpo", {"student__simulation": "ode_final"}, "needs a sampler with randomness"),
        ("dmdr_grpo", {"student__steps": 1}, "leaves 0 steps for a policy gradient"),
        ("dmdr_dpo", {"policy__steps": 5}, "asks for 5"),
        ("dmdr_grpo", {"group__normalise": "max"}, "config.group.normalise"),
        ("dmdr_dpo", {"dpo__form": "pairs"}, "config.dpo.form"),
        ("dmdr_refl", {"dm__form": "double"}, "config.dm.form"),
        ("ddmd", {"split__schedule": "late"}, "config.split.schedule"),
        ("rtdmd", {"boundary__normaliser": "none", "group__size": 4, "policy__steps": 1}, "config.boundary.normaliser"),
        ("gdmd", {"gdmd__group": "sde"}, "config.gdmd.group"),
        ("gdmd", {"gdmd__old": "new"}, "config.gdmd.old"),
        ("gdmd", {"dm__form": "boundary"}, "plain or split, not boundary"),
        ("gdmd", {"dm__form": "renoise_group"}, "plain or split, not renoise_group"),
        ("gdmd", {"rollout__updates": 2}, "config.rollout.updates is set"),
        ("gndm", {"rollout__updates": 2, "student__simulation": "ode"}, "needs a sampler with randomness"),
        ("dmdr_dpo", {"dpo__form": "denoising", "student__simulation": "ode_final"}, "keeps whole rollouts"),
        ("dmdr_refl", {"refl__anchor": 0.1}, "config.refl.anchor is set"),
        ("dmdr_refl", {"rollout__updates": 2}, "config.rollout.updates is set"),
        ("dmdr_refl", {"group__normalise": "none"}, "config.group.normalise is set"),
        ("dmd", {"rollout__kernel": "cps(0.5)"}, "config.rollout.kernel is set"),
        ("dmdr_dpo", {"policy__weight": 0.1}, "config.policy.weight is set"),
        ("dmdr_dpo", {"policy__refresh": 10}, "config.policy.refresh is set"),
        ("drpo", {"drpo__count": 3, "group__size": 4}, "more than half"),
        ("drpo", {"drpo__anchor": "mae", "group__size": 4}, "config.drpo.anchor"),
        ("dmdr_srpo", {"srpo__rewards": ("clip",)}, "names 'clip'"),
    ],
)
def test_what_does_not_fit_is_one_clear_sentence(method, changes, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        gaussian.make(method, **changes)


def test_rewards_that_a_method_needs_or_does_not_read():
    with pytest.raises(UserError, match="needs a reward"):
        setup.make_terms(gaussian.configuration("gdmd"), ())
    assert setup.reward_specs(config("dmd")) == [] and len(setup.reward_specs(config())) == 1


def test_a_reward_without_gradient_is_refused_where_one_is_needed():
    class Blind:
        differentiable, reason = False, "it asks a detector"
        spec = gaussian.RewardSpec("geneval")

    with pytest.raises(UserError, match=r"geneval.*dmdr_refl"):
        setup.make_terms(config("dmdr_refl"), (Blind(),))
    assert setup.make_terms(config("gdmd"), (Blind(),))


def test_a_group_stays_on_its_device():
    c = config("dmdr_grpo", batch=16)
    compose.check_groups(c, 2)
    with pytest.raises(UserError, match="each of 4 devices has 4 rows"):
        compose.check_groups(c, 4)


def test_srpo_contrasts_the_texts_of_hps_alone():
    c = config("dmdr_srpo")
    c.rewards.clip = base.reward("", weight=0.1)
    c = methods.resolve(c)
    assert c.rewards.hps.positive_words == ("Natural-lighting", "Detailed", "Realistic")
    assert c.rewards.hps.contrast == 0.1 and not c.rewards.clip.get("positive_words")


def test_srpo_takes_words_that_the_embedded_rewards_can_read():
    c = methods.resolve(cli.load_config("configs/shapes/sd3.py", ["method=dmdr_srpo"]))
    reward = open_spec(RewardSpec("hps", assets.resolve(c.rewards.shapes_hps.path), **words_of(c.rewards.shapes_hps)))
    assert reward.spec.contrasted
    reward.check_prompts(balanced_train_prompts(SMALL))

    c = methods.resolve(cli.load_config("configs/shapes/sd3.py", ["method=dmdr_srpo", "srpo.positive=('red',)"]))
    assert words_of(c.rewards.shapes_hps) == {"positive_words": ("red",), "negative_words": ("below",)}


def words_of(reward):
    return {key: tuple(reward[key]) for key in ("positive_words", "negative_words")}


def test_gndms_modes_are_forms_of_distribution_matching():
    forms = {mode: methods.resolve(config("gndm", gndm__mode=mode)) for mode in ("renoise", "prompt", "scalar")}
    assert [c.dm.form for c in forms.values()] == ["renoise_group", "prompt_group", "plain"]
    assert [c.group.size for c in forms.values()] == [1, 8, 8]
