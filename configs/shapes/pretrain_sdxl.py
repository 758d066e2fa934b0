"""The embedded world's SDXL-shaped teacher, from the SD3-shaped one's autoencoder.

Command:  python -m dmdr_jax.shapes.pretrain --config=configs/shapes/pretrain_sdxl.py --out=DIR
Stages:   the shipped autoencoder, its latents centred; then teacher (U-Net and its two CLIP text
          encoders trained together to predict noise).
The folder this made, with its measurements, is dmdr_jax/shapes/assets/sdxl.
"""

from ml_collections import ConfigDict

from configs.shapes import pretrain_sd3


def get_config() -> ConfigDict:
    c = pretrain_sd3.get_config()
    c.family = "sdxl"
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
    c.teacher.steps = 9500
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
