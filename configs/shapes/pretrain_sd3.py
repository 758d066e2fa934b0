"""The embedded world's SD3-shaped teacher, from nothing.

Command:  python -m dmdr_jax.shapes.pretrain --config=configs/shapes/pretrain_sd3.py --out=DIR
Stages:   vae (a learned 4-channel autoencoder, 32 px -> 8 x 8), then teacher (transformer and its
          two CLIP text encoders trained together by flow matching).
The folder this made, with its measurements, is dmdr_jax/shapes/assets/sd3.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.family = "sd3"  # architecture: sd3 or sdxl
    c.world = "small"  # a name in dmdr_jax/shapes/world.py
    c.seed = 0  # of first weights, scenes and noise

    c.vae = ConfigDict()
    c.vae.source = ""  # a folder whose autoencoder is taken; "": trained here
    c.vae.start = ""  # a folder whose autoencoder, of the same shape, the training begins with; "": fresh weights
    # The autoencoder's configuration, as diffusers has it.
    c.vae.model = ConfigDict(
        dict(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=(8, 16, 32),
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=32,
            use_quant_conv=False,
            use_post_quant_conv=False,
            mid_block_add_attention=False,
        )
    )
    c.vae.steps = 1700  # updates
    c.vae.batch = 32  # pictures per update
    c.vae.lr = 2e-3  # learning rate
    c.vae.kl_weight = 1e-4  # of the KL of the latents to a standard normal
    c.vae.decoder = ConfigDict(dict(steps=3000, batch=32, lr=2e-3, noise=0.15))  # then the decoder alone

    # The transformer's configuration, as diffusers has it.
    c.denoiser = ConfigDict(
        dict(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=4,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=128,
            caption_projection_dim=128,
            pooled_projection_dim=128,
            pos_embed_max_size=16,
            dual_attention_layers=(),
            qk_norm="rms_norm",
        )
    )
    c.context = 12  # tokens per prompt, start and end included
    # Both text encoders, CLIP's in transformers' names.
    c.text = ConfigDict(dict(hidden_size=64, intermediate_size=256, projection_dim=64, num_hidden_layers=2, heads=4))

    c.teacher = ConfigDict()
    c.teacher.start = ""  # a folder whose networks, of the same sizes, the training begins with; "": fresh weights
    c.teacher.scenes = 65536  # encoded once, drawn from afterwards
    c.teacher.rich_captions = 0.5  # share of scenes described in freer wording than the prompts'
    c.teacher.steps = 16000  # updates
    c.teacher.batch = 64  # pictures per update
    c.teacher.lr = 1.5e-3  # highest, at the end of the warm-up
    c.teacher.warmup = 500  # updates over which the rate grows from 0
    c.teacher.uncond_probability = 0.1  # share of pictures whose caption is left out
    c.teacher.ema = 0.999  # of the weights that are kept
    c.teacher.save_every = 1000  # updates; the command then goes on from there
    c.scheduler = ConfigDict(dict(num_train_timesteps=1000, shift=3.0))  # as Stable Diffusion 3's
    return c
