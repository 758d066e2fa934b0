"""A teacher of the harder world, SD3-shaped: 64 px, eight shapes and colours, up to four objects.

Command:  python -m dmdr_jax.shapes.pretrain --config=configs/shapes/pretrain_sd3_64px.py --out=DIR
Stages:   as configs/shapes/pretrain_sd3.py, whose sizes these are. Both begin with what is shipped for 32 px: the
          autoencoder knows half of the colours, and the transformer, with 64 patches for 16, half of the words.
"""

from ml_collections import ConfigDict

from configs.shapes import pretrain_sd3


def get_config() -> ConfigDict:
    c = pretrain_sd3.get_config()
    c.world = "large"
    c.vae.start = c.teacher.start = "shapes:sd3"
    c.vae.update(steps=800, batch=16, lr=1e-3)
    c.vae.decoder.update(steps=1200, batch=16)
    c.vae.model.sample_size = 64
    c.denoiser.sample_size = 16
    c.context = 16
    c.teacher.update(steps=8000, batch=48, lr=1e-3)
    return c
