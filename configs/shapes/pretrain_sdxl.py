"""The embedded world's SDXL-shaped teacher, from the SD3-shaped one's autoencoder.

Command:  python -m dmdr_jax.shapes.pretrain --config=configs/shapes/pretrain_sdxl.py --out=DIR
Stages:   the shipped autoencoder, its latents centred; then teacher (U-Net and its two CLIP text
          encoders trained together to predict noise).
The folder this made, with its measurements, is dmdr_jax/shapes/assets/sdxl.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.family = "sdxl"  # architecture: sd3 or sdxl
    c.world = "small"  # a name in dmdr_jax/shapes/world.py
    c.seed = 0  # of first weights, scenes and noise

    c.vae = ConfigDict(dict(source="shapes:sd3"))  # the folder whose autoencoder is taken

    # The U-Net's configuration, as diffusers has it.
    c.denoiser = ConfigDict(
        dict(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(64, 128),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            transformer_layers_per_block=(1, 2),
            attention_head_dim=(2, 4),  # the numbers of heads, as in SDXL's own file
            norm_num_groups=8,
            cross_attention_dim=128,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=16,
            projection_class_embeddings_input_dim=160,
        )
    )
    c.context = 12  # tokens per prompt, start and end included
    # Both text encoders, CLIP's in transformers' names.
    c.text = ConfigDict(dict(hidden_size=64, intermediate_size=256, projection_dim=64, num_hidden_layers=2, heads=4))

    c.teacher = ConfigDict()
    c.teacher.scenes = 65536  # encoded once, drawn from afterwards
    c.teacher.rich_captions = 0.5  # share of scenes described in freer wording than the prompts'
    c.teacher.steps = 9500  # updates
    c.teacher.batch = 64  # pictures per update
    c.teacher.lr = 1.5e-3  # highest, at the end of the warm-up
    c.teacher.warmup = 500  # updates over which the rate grows from 0
    c.teacher.uncond_probability = 0.1  # share of pictures whose caption is left out
    c.teacher.ema = 0.999  # of the weights that are kept
    c.teacher.save_every = 1000  # updates; the command then goes on from there
    c.scheduler = ConfigDict(  # as Stable Diffusion XL's
        dict(
            num_train_timesteps=1000,
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="epsilon",
            timestep_spacing="leading",
            steps_offset=1,
        )
    )
    return c
