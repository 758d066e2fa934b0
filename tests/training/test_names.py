"""Every number that a run writes has a name and an explanation; the stages are what is trained on."""

import re
from pathlib import Path

import jax
import pytest

from dmdr_jax import methods
from dmdr_jax.objectives.base import stage
from dmdr_jax.training.names import name_of, short
from dmdr_jax.training.step import fake_step, generator_step
from tests.training.test_method_terms import START, TERMS, active, world

DOCS = Path(__file__).parents[2] / "docs"
STAGES = dict.fromkeys(methods.METHODS, ("cold start", "joint stage"))
STAGES |= {
    **dict.fromkeys(("dmd", "dmd2", "ddmd", "gndm"), ("matching", "matching")),
    **dict.fromkeys(("refl_only", "dpo_only", "grpo_only", "drpo"), ("cold start", "rewards alone")),
}


@pytest.mark.parametrize("method", TERMS)
def test_all_metrics_and_stages_of_a_method_have_names(method):
    w = world(method)
    for step, expected in zip((0, START), STAGES[method]):
        updates = [lambda *args: fake_step(w.plan, *args), lambda *args: generator_step(w.plan, active(w, step), *args)]
        names = {name for update in updates for name in jax.eval_shape(update, w.state, w.frozen, w.batch)[1]}
        assert len(names) > 5
        assert [name for name in names if name_of(name) is None] == []
        assert stage(w.terms, step) == expected


def test_names_with_parts():
    assert short("reward/hps") == "hps" and short("reward/hps/weight") == "hps weight"
    assert short("fake_by_noise/tau_0.2_0.4") == "fake loss, noise 0.2 to 0.4"
    assert short("unknown/thing") == "thing" and name_of("unknown/thing") is None


def test_the_metrics_that_the_docs_explain_exist():
    text = (DOCS / "methods.md").read_text() + (DOCS / "training.md").read_text()
    named = set(re.findall(r"`((?:dm|fake|generator|policy|dpo|gdmd|gan|drift|ode)/[a-z_]+)`", text))
    assert {"dm/score_gap", "fake/loss"} <= named
    assert [name for name in named if name_of(name) is None] == []
