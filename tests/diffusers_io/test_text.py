"""Prompt encoding against diffusers, with T5 and without."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dmdr_jax.diffusers_io import text  # noqa: E402
from dmdr_jax.diffusers_io.pipeline import load_pipeline  # noqa: E402
from dmdr_jax.errors import UserError  # noqa: E402
from dmdr_jax.shapes.tokenizer import make_vocabulary  # noqa: E402
from tests import tiny_pipelines  # noqa: E402

CLIP_TOKENS = tiny_pipelines.CONTEXT


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("text")
    return {kind: tiny_pipelines.save(root / kind, kind) for kind in ("sd3", "sd3_no_t5", "sdxl")}


def encode_both(folder, length):
    """diffusers' (prompt_embeds, pooled) of the prompts, and ours."""
    pipe = tiny_pipelines.load(folder)
    with torch.no_grad():
        embeds, _, pooled, _ = pipe.encode_prompt(
            tiny_pipelines.PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=length
        )
    encoders = ["text_encoder", "text_encoder_2", "text_encoder_3"]
    pipeline = load_pipeline(folder, encoders if pipe.text_encoder_3 else encoders[:2])
    pipeline.t5_length = length
    ids = text.tokenize(pipeline, tiny_pipelines.PROMPTS)
    encode = jax.jit(functools.partial(text.encode, pipeline.modules, size=(16, 24), max_sequence_length=length))
    return embeds.numpy(), pooled.numpy(), encode(pipeline.params, ids)


@pytest.mark.parametrize("length", [256, 20])
def test_encoding_is_diffusers(folders, length):
    embeds, pooled, ours = encode_both(folders["sd3"], length)
    assert ours.prompt_embeds.shape == (3, CLIP_TOKENS + length, 48) and ours.key_bias is None
    np.testing.assert_allclose(ours.prompt_embeds, embeds, rtol=0, atol=1e-5 * np.abs(embeds).max())
    np.testing.assert_allclose(ours.pooled, pooled, rtol=0, atol=1e-5 * np.abs(pooled).max())


def test_without_t5_one_token_stands_for_all(folders):
    embeds, pooled, ours = encode_both(folders["sd3_no_t5"], 256)
    assert ours.prompt_embeds.shape == (3, CLIP_TOKENS + 1, 48)
    np.testing.assert_allclose(ours.prompt_embeds, embeds[:, : CLIP_TOKENS + 1], atol=1e-5)
    assert embeds.shape[1] == CLIP_TOKENS + 256 and not embeds[:, CLIP_TOKENS:].any()
    np.testing.assert_allclose(ours.pooled, pooled, atol=1e-5)
    np.testing.assert_allclose(ours.key_bias, [0] * CLIP_TOKENS + [np.log(256)], rtol=1e-6)


def test_the_one_token_gives_the_transformers_output(folders):
    embeds, pooled, ours = encode_both(folders["sd3_no_t5"], 256)
    pipe = tiny_pipelines.load(folders["sd3_no_t5"])
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(3, 8, 8, 4)).astype(np.float32)
    times = np.array([1000.0, 500.0, 20.0], np.float32)
    with torch.no_grad():
        theirs = pipe.transformer(
            torch.from_numpy(latents).permute(0, 3, 1, 2),
            torch.from_numpy(embeds),
            torch.from_numpy(pooled),
            torch.from_numpy(times),
        ).sample.permute(0, 2, 3, 1)
    pipeline = load_pipeline(folders["sd3_no_t5"], ["transformer"])
    apply = jax.jit(pipeline.modules["transformer"].apply)
    variables = {"params": pipeline.params["transformer"]}
    out = apply(variables, latents, times, ours.prompt_embeds, ours.pooled, key_bias=ours.key_bias)
    np.testing.assert_allclose(out, theirs.numpy(), atol=2e-5 * np.abs(theirs.numpy()).max())


def test_sdxl_encoding_is_diffusers(folders):
    pipe = tiny_pipelines.load(folders["sdxl"])
    with torch.no_grad():
        embeds, negative, pooled, negative_pooled = pipe.encode_prompt(tiny_pipelines.PROMPTS)
    times = pipe._get_add_time_ids((16, 24), (0, 0), (16, 24), torch.float32, pooled.shape[-1])
    pipeline = load_pipeline(folders["sdxl"], ["text_encoder", "text_encoder_2"])
    ids, sized = text.tokenize(pipeline, tiny_pipelines.PROMPTS), (pipeline.modules, pipeline.params)
    ours = text.encode(*sized, ids, (16, 24))
    np.testing.assert_allclose(ours.prompt_embeds, embeds, rtol=0, atol=1e-5 * np.abs(embeds).max())
    np.testing.assert_allclose(ours.pooled, pooled, rtol=0, atol=1e-5 * np.abs(pooled).max())
    np.testing.assert_array_equal(ours.time_ids, np.repeat(times.numpy(), 3, 0))
    empty = text.tokenize(pipeline, [""])
    zeros = text.encode_uncond(*sized, empty, (16, 24), zeros=True)
    assert not negative.any() and not negative_pooled.any()
    assert zeros.prompt_embeds.shape == (1, *negative.shape[1:]) and not zeros.prompt_embeds.any()
    assert zeros.pooled.shape == (1, *negative_pooled.shape[1:]) and not zeros.pooled.any()
    np.testing.assert_array_equal(zeros.time_ids, ours.time_ids[:1])
    encoded = text.encode_uncond(*sized, empty, (16, 24), zeros=False)
    np.testing.assert_allclose(encoded.prompt_embeds[0], ours.prompt_embeds[2], atol=1e-6)


def test_ids_are_diffusers(folders):
    pipe = tiny_pipelines.load(folders["sd3"])
    ids = text.tokenize(load_pipeline(folders["sd3"]), tiny_pipelines.PROMPTS)
    for name, tokenizer, length in (
        ("text_encoder", pipe.tokenizer, CLIP_TOKENS),
        ("text_encoder_2", pipe.tokenizer_2, CLIP_TOKENS),
        ("text_encoder_3", pipe.tokenizer_3, 256),
    ):
        expected = tokenizer(tiny_pipelines.PROMPTS, padding="max_length", max_length=length, truncation=True).input_ids
        assert ids[name].dtype == np.int32
        np.testing.assert_array_equal(ids[name], expected)
    assert (ids["text_encoder"] != ids["text_encoder_2"]).any()


def test_text_encoders_must_be_loaded(folders):
    with pytest.raises(UserError, match="text_encoder and text_encoder_2"):
        text.tokenize(load_pipeline(folders["sd3"], ["transformer"]), ["a"])


def test_tokenizer_files_as_published(folders, tmp_path):
    """vocab.json with merges.txt and spiece.model, under the class names that published folders have."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = shutil.copytree(folders["sd3"], tmp_path / "sd3")
    pipeline = load_pipeline(folder)
    pipeline.t5_length = 20
    expected = text.tokenize(pipeline, tiny_pipelines.PROMPTS)
    vocabulary, merges = make_vocabulary(tiny_pipelines.WORDS)
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        (folder / name / "tokenizer.json").unlink()
        (folder / name / "vocab.json").write_text(json.dumps(vocabulary))
        (folder / name / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n")
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CLIP_TOKENS, "pad_token": pad}
        (folder / name / "tokenizer_config.json").write_text(json.dumps(config))

    shutil.rmtree(folder / "tokenizer_3")
    (folder / "tokenizer_3").mkdir()
    model = str(folder / "tokenizer_3" / "spiece")
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(tiny_pipelines.WORDS)] * 20),
        model_prefix=model,
        vocab_size=24,
        minloglevel=2,
        **ids,
    )
    (folder / "tokenizer_3" / "spiece.vocab").unlink()
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"tokenizer_3": ["transformers", "T5TokenizerFast"]}))

    pipeline = load_pipeline(folder)
    pipeline.t5_length = 20
    ours = text.tokenize(pipeline, tiny_pipelines.PROMPTS)
    for name in ("text_encoder", "text_encoder_2"):
        np.testing.assert_array_equal(ours[name], expected[name])
    pieces = sentencepiece.SentencePieceProcessor(model_file=model + ".model").encode(tiny_pipelines.PROMPTS[0])
    np.testing.assert_array_equal(ours["text_encoder_3"][0], [*pieces[:19], 1])
