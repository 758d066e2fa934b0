"""Every key of a training run, with its default: near what DMDR's authors ran; docs/methods.md lists the departures.

Other files start from `get_config` and change what they must; each key stands here once, with its meaning.
"""

from ml_collections import ConfigDict


def reward(
    path: str, weight: float, *, margin: float = 0.7, prompt_prefix: str = "", start: int = 0, ramp: int = 0
) -> ConfigDict:
    """One reward of the joint stage: ``weight * mean relu(margin - score)`` from generator step ``start`` on."""
    c = ConfigDict()
    c.path = path  # a CLIPModel folder
    c.weight = weight
    c.margin = margin
    c.units = "raw"  # or "z": in standard deviations of the teacher's scores, given by mean and std
    c.mean = 0.0
    c.std = 1.0
    c.prompt_prefix = prompt_prefix
    c.start = start  # first generator step with this reward; the cold start comes before
    c.ramp = ramp  # steps over which the weight then grows from 0
    return c


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.model = ""  # a diffusers folder, a hub id, or shapes:NAME
    c.variant = ""  # weights to prefer, such as fp16
    c.prompts = ""  # .txt, .jsonl, .parquet, tfds:NAME or shapes:WORLD:train
    c.steps = 4000  # generator updates
    c.batch = 192  # prompts per update, over all devices
    c.seed = 30
    c.t5_length = 256  # tokens of SD3's T5; the authors trained with 128
    c.reward_decoder = ""  # an AutoencoderTiny folder (TAESDXL) to decode with for rewards, in place of the model's own
    c.height = 0  # pixels; 0: the model's own size
    c.width = 0
    c.compute_dtype = "float32"  # of activations and matrix products; bfloat16 on accelerators
    c.base_dtype = "float32"  # of the frozen networks in memory; bfloat16 on accelerators
    c.remat = "none"  # recompute in the backward pass: none, full, dots, names

    c.student = ConfigDict()
    c.student.steps = 4
    c.student.shift = 3.0  # of the student's grid
    c.student.timesteps = ()  # the network's own timesteps in place of the grid, such as (399,) for one SDXL step
    c.student.grid = "uniform"  # or "authors": the released code's, ending at t = 0.001
    c.student.simulation = "renoise"  # training inputs: renoise, ode, cps(eta), or ode_final as the authors ran SD3
    c.student.shared_index = False  # one grid index per batch in place of one per sample

    c.generator = ConfigDict()
    c.generator.kind = "lora"  # or "full"
    c.generator.lora = _lora(64, 128.0)

    c.ode = ConfigDict()  # before all else, the student's first weights by regression on the teacher's ODE
    c.ode.steps = 0  # updates; 0: off
    c.ode.pairs = 10_000  # of noise and the latents that the teacher makes of it
    c.ode.teacher_steps = 50
    c.ode.guidance = 0.0  # of the teacher; 0: guidance.scale
    c.ode.batch = 256
    c.ode.loss = "mse"  # on latents; or "huber"
    c.ode.lr = 1e-5
    c.ode.weight_decay = 0.01
    c.ode.warmup = 0
    c.ode.ema = 0.99  # of the student that the run then starts from

    c.fake = ConfigDict()
    c.fake.lora = _lora(32, 32.0)
    c.fake.scale = 2.0  # runtime scale of the guidance LoRA on the fake score
    c.fake.data = "student_x0"  # or "simulated"; they differ with ode_final only, where the authors took the simulated
    c.fake.updates = 5  # fake updates per generator update

    c.guidance = ConfigDict()
    c.guidance.scale = 7.0  # of the real score
    c.guidance.jitter = 0.5
    c.guidance.uncond = "pipeline"  # the absent prompt: as the model's own pipeline has it, "zeros", or "empty"

    c.dynamics = ConfigDict()
    c.dynamics.steps = 2000  # S of DynaDG and DynaRS
    c.dynamics.dg = 0.5  # DynaDG: initial runtime scale of the guidance LoRA on the real score; 0: off
    c.dynamics.rs = "dynamic"  # DynaRS; or "uniform" from the start, or "hold" the starting density
    c.dynamics.tau_low = 0.02
    c.dynamics.tau_high = 0.98

    c.dm = ConfigDict()
    c.dm.weight = 1.0
    c.dm.normaliser_floor = 1e-3

    c.rewards = ConfigDict()  # name -> reward(...)

    c.optim = ConfigDict()
    c.optim.generator = ConfigDict(dict(lr=1e-6, weight_decay=0.01, warmup=0))
    c.optim.fake = ConfigDict(dict(lr=5e-6, weight_decay=0.0, warmup=0))
    c.optim.b1 = 0.9
    c.optim.b2 = 0.999
    c.optim.clip = 1.0  # global gradient norm
    c.ema = 0.99  # of the generator, for previews, evaluation and export

    c.mesh = ConfigDict(dict(data=-1, fsdp=1))  # devices per axis; -1: all that are left
    c.preview = ConfigDict(dict(every=250, images=16, teacher_steps=25))
    c.checkpoint = ConfigDict(dict(every=250, keep=2))
    return c


def _lora(rank: int, alpha: float) -> ConfigDict:
    c = ConfigDict()
    c.rank = rank
    c.alpha = alpha
    c.targets = "attention"  # or "wide": also feed-forward and modulation (SD3), all layers that DMD2 adapts (SDXL)
    return c
