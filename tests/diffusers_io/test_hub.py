"""Hub ids: which files are asked for, and what is said when they cannot be had."""

import fnmatch
import json

import pytest

from dmdr_jax.diffusers_io import hub
from dmdr_jax.errors import UserError

REPOSITORY = [
    "README.md",
    "sd3_medium.safetensors",
    "text_encoders/t5xxl_fp16.safetensors",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/vocab.json",
    "tokenizer_3/spiece.model",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "transformer/diffusion_pytorch_model.fp16.safetensors",
    "text_encoder_3/config.json",
    "text_encoder_3/model-00001-of-00002.safetensors",
    "text_encoder_3/model-00002-of-00002.safetensors",
    "text_encoder_3/model.safetensors.index.json",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.bin",
]


@pytest.fixture
def repository(monkeypatch, tmp_path):
    """A stand-in for the hub; records the files it was asked for."""
    fetched = set()

    def snapshot_download(name, allow_patterns):
        assert name == "someone/some-model"
        for file in REPOSITORY:
            if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                fetched.add(file)
                (tmp_path / file).parent.mkdir(exist_ok=True)
                content = {"_class_name": "StableDiffusion3Pipeline"} if file == hub.INDEX else {}
                (tmp_path / file).write_text(json.dumps(content))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return fetched


def test_only_what_is_needed_is_fetched(repository, tmp_path):
    assert hub.locate("someone/some-model", ["transformer", "text_encoder_3"]) == tmp_path
    assert repository == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
        "tokenizer_3/spiece.model",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        *(file for file in REPOSITORY if file.startswith("text_encoder_3/")),
    }


def test_a_variant_is_fetched_where_there_is_one(repository):
    hub.locate("someone/some-model", ["transformer", "vae"], variant="fp16")
    assert "transformer/diffusion_pytorch_model.fp16.safetensors" in repository
    assert "transformer/diffusion_pytorch_model.safetensors" not in repository
    assert "vae/diffusion_pytorch_model.safetensors" in repository


def test_a_folder_is_itself(tmp_path):
    assert hub.locate(str(tmp_path)) == tmp_path


def test_names_that_lead_nowhere(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        hub.locate(str(tmp_path / "nowhere"))

    def offline(name, allow_patterns):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(UserError, match=r"someone/model.*no route to host.*hf auth login.*hf download someone/model"):
        hub.locate("someone/model")
