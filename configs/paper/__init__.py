"""What DMDR's authors ran (arXiv 2511.13649 and the training code they released and withdrew), number by number.

Each file takes the stage as its argument, as the authors' scripts were two: `FILE.py:cold`, then the same command with
`FILE.py:joint` in the same workdir, which goes on from the last checkpoint with the joint stage's batch, rates and
rewards. Common to all:

AdamW (.9, .999), weight decay 0.01 for the generator and 0 for the fake score, gradients clipped at 1, constant rates,
no EMA, seed 30, five fake updates per generator update, fake LoRA of rank 32 and alpha 32 at runtime scale 2, tau not
clipped, guidance drawn within 0.5 of its centre, rewards relu(0.7 - cosine) of DFN5B-CLIP H/14 and HPSv2.1, the latter
with "Realistic photo " before each prompt.

Kept different here, as they are precision and not method: Adam's moments are fp32 (theirs 8-bit), times, latents and
score differences are fp32 (theirs bf16 or fp16, which rounds the grid), and the guidance scale is drawn once per step
(theirs per process). DFN5B-CLIP runs with QuickGELU, as its weights want; the released code ran it with GELU.
"""
