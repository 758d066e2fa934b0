"""Between two steps the host waits for nothing: what it reads of the device is a step old, and the state is donated."""

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.array import ArrayImpl

from dmdr_jax.errors import UserError
from dmdr_jax.training import loop, runtime
from dmdr_jax.training.ahead import Ahead
from tests.training import tiny


def test_the_loop_reads_metrics_a_step_late_and_donates_the_state(monkeypatch, teacher, prompts_file, tmp_path):
    events, reporting = [], []
    value = ArrayImpl._value

    def read(array):
        events.append(("read", bool(reporting)))
        return value.fget(array)

    def report(pending, *args, **kwargs):
        reporting.append(True)
        try:
            if pending is not None:
                events.append(("fetch", pending[0]))
            return original(pending, *args, **kwargs)
        finally:
            reporting.pop()

    def watched(kind, update):
        def run(self, step, state, frozen, batch):
            new, metrics = update(self, step, state, frozen, batch)
            gone = all(leaf.is_deleted() for leaf in jax.tree.leaves((state.generator, state.fake, state.fake_opt)))
            events.append((kind, step, gone))
            return new, metrics

        return run

    original = loop.report
    monkeypatch.setattr(loop, "report", report)
    for kind in ("fake", "generator"):
        monkeypatch.setattr(loop.Updates, kind, watched(kind, getattr(loop.Updates, kind)))
    monkeypatch.setattr(ArrayImpl, "_value", property(read))
    config = tiny.config(teacher, prompts_file, steps=4)
    config.checkpoint.every = config.preview.every = 100
    loop.train(config, tmp_path)

    updates = [i for i, event in enumerate(events) if event[0] in ("fake", "generator")]
    between = events[updates[0] : updates[-1]]
    assert ("read", True) in between  # the spy sees what is read
    assert ("read", False) not in between
    assert all(event[2] for event in between if event[0] in ("fake", "generator"))
    for step in (1, 2, 3):
        # The metrics of the update that made step n are fetched when that of step n + 1 is under way.
        assert events.index(("fetch", step)) > events.index(("generator", step, True))
        assert events.index(("fetch", step)) > [e[:2] for e in events].index(("fake", step))


def test_what_comes_next_is_made_in_another_thread():
    calls = []

    def square(n):
        calls.append((n, threading.current_thread() is threading.main_thread()))
        if n == 7:
            raise UserError("seven")
        return n * n

    with Ahead(square, depth=2) as squares:
        assert [squares(n) for n in (3, 4, 5)] == [9, 16, 25]
        with pytest.raises(UserError, match="seven"):
            squares(7)
        assert squares(1) == 1  # a number that was passed over is made again
    assert {n for n, _ in calls} >= {3, 4, 5, 6, 7}
    assert not any(is_main for _, is_main in calls)
    assert len([n for n, _ in calls if n == 4]) == 1


def test_tokens_are_there_before_they_are_needed():
    made = threading.Event()
    with Ahead(lambda n: made.set() if n == 2 else n) as numbers:
        numbers(0)
        assert made.wait(10)  # by nobody's asking


@pytest.fixture
def cache_settings():
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, setting in before.items():
        jax.config.update(name, setting)
    jax.experimental.compilation_cache.compilation_cache.reset_cache()


def test_compiled_programs_are_kept(cache_settings, tmp_path):
    from jax.experimental.compilation_cache import compilation_cache

    runtime.keep_compiled("", tmp_path)
    assert not jax.config.jax_compilation_cache_dir  # no accelerator here
    folder = tmp_path / "programs"
    runtime.keep_compiled(str(folder), tmp_path)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()
    jax.jit(lambda x: jnp.tanh(x) @ x + time.monotonic())(np.eye(3)).block_until_ready()
    assert list(folder.iterdir())
    runtime.keep_compiled("none", tmp_path)
    assert jax.config.jax_compilation_cache_dir is None
