"""A teacher of the harder world, SD3-shaped, from nothing: 64 px, eight shapes and colours, up to four objects.

Command:  python -m dmdr_jax.shapes.pretrain --config=configs/shapes/pretrain_sd3_large.py --out=DIR
Stages:   as configs/shapes/pretrain_sd3.py, whose sizes these are but for the autoencoder: 64 px -> 8 x 8 as Stable
          Diffusion's eightfold one, with SD3's 16 channels.
"""

from ml_collections import ConfigDict

from configs.shapes import pretrain_sd3


def get_config() -> ConfigDict:
    c = pretrain_sd3.get_config()
    c.world = "large"
    c.vae.model.update(latent_channels=16, block_out_channels=(8, 16, 32, 32), sample_size=64)
    c.vae.update(steps=2500, batch=16)
    c.vae.decoder.update(steps=2500, batch=16)
    c.denoiser.update(in_channels=16, out_channels=16)
    c.context = 16
    return c
