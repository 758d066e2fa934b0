"""Every key of a training run, with its default: near what DMDR's authors ran; docs/methods.md lists the departures.

A key that is None is the method's to say (`dmdr_jax/methods.py`); a value here or on the command line is kept.
Other files start from `get_config` and change what they must; each key stands here once, with its meaning.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def reward(
    path: str,
    weight: float,
    *,
    kind: str = "",
    margin: float = 0.7,
    prompt_prefix: str = "",
    start: int = 0,
    ramp: int = 0,
) -> ConfigDict:
    """One reward of the joint stage: ``weight * mean relu(margin - score)`` from generator step ``start`` on."""
    c = ConfigDict()
    c.path = path  # folder or file of its weights, or file.py:function for one of your own
    c.kind = kind  # a name in dmdr_jax/rewards/kinds.py; "": inferred from name and path
    c.weight = weight
    c.margin = margin
    c.units = "raw"  # or "z": in standard deviations of the teacher's scores, given by mean and std
    c.mean = 0.0
    c.std = 1.0
    c.prompt_prefix = prompt_prefix
    c.start = start  # first generator step with this reward; the cold start comes before
    c.ramp = ramp  # steps over which the weight then grows from 0
    c.tokenizer = ""  # its folder, where it does not lie beside the weights
    c.backbone = ""  # CLIP ViT-L/14 of an aesthetic head
    c.arch = ""  # open_clip's name of the architecture, where the weights leave it open
    c.activation = ""  # gelu or quick_gelu, against what the files say
    c.resize = ""  # squash, crop or pad, in place of the kind's own
    return c


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.method = "dmdr_refl"  # a name in dmdr_jax/methods.py
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
    c.on_nonfinite = "stop"  # a number that is not finite ends the run; or "skip": its update alone, ten times in a row

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
    c.generator.lora.start = ""  # a LoRA file to start from, of PEFT, diffusers or kohya's scripts

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
    c.fake.updates = placeholder(int)  # fake updates per generator update

    c.guidance = ConfigDict()
    c.guidance.scale = 7.0  # of the real score
    c.guidance.jitter = 0.5
    c.guidance.uncond = "pipeline"  # the absent prompt: as the model's own pipeline has it, "zeros", or "empty"

    c.dynamics = ConfigDict()
    c.dynamics.steps = 2000  # S of DynaDG and DynaRS
    c.dynamics.dg = placeholder(float)  # DynaDG: initial runtime scale of the guidance LoRA on the real score; 0: off
    c.dynamics.rs = placeholder(str)  # "dynamic": DynaRS; or "uniform" from the start, or "hold" the starting density
    c.dynamics.tau_low = 0.02
    c.dynamics.tau_high = 0.98

    c.dm = ConfigDict()
    c.dm.weight = placeholder(float)
    c.dm.form = placeholder(str)  # plain, split (Decoupled DMD), boundary (AC-DMD), renoise_group, prompt_group (GNDM)
    c.dm.normaliser_floor = 1e-3

    c.rewards = ConfigDict()  # name -> reward(...)

    _add_methods(c)

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


def _add_methods(c: ConfigDict) -> None:
    """The groups that only some methods read."""
    c.group = ConfigDict()  # several rows of a batch with one prompt
    c.group.size = placeholder(int)  # must divide the batch
    c.group.normalise = "group"  # deviation of an advantage: of the group, of the whole "batch", or "none"
    c.group.combine = "each"  # several rewards are normalised each by itself, or their weighted "sum"
    c.group.limit = 5.0  # of an advantage
    c.group.shared_start = False  # a group's rollouts start from one noise

    c.rollout = ConfigDict()
    c.rollout.kernel = ""  # of stored rollouts: "" the student's; renoise, cps(eta), flow_sde(a), dance(eta)
    c.rollout.updates = placeholder(int)  # generator updates on one rollout

    c.policy = ConfigDict()
    c.policy.weight = placeholder(float)
    c.policy.clip = placeholder(float)
    c.policy.kl = placeholder(float)  # weight of the KL to the reference
    c.policy.steps = placeholder(int)  # stochastic steps that get a gradient, drawn anew each time; 0: all
    c.policy.shared_noise = placeholder(bool)  # the others share their noise within a group
    c.policy.balance = placeholder(float)  # scaled to this part of distribution matching's gradient; 0: not scaled
    c.policy.density = "gaussian"  # or "rtdmd": without the factor 1 / (2 std^2)
    c.policy.kl_form = "gaussian"  # or "flow_grpo": over s^2 in place of s^2 |dt|
    c.policy.refresh = 0  # steps after which the reference of the KL is renewed; 0: never

    c.dpo = ConfigDict()
    c.dpo.form = "transitions"  # or "denoising"
    c.dpo.beta = placeholder(float)
    c.dpo.clip = 0.1
    c.dpo.weight = placeholder(float)
    c.dpo.refresh = 0  # steps after which the reference is renewed; 0: never

    c.refl = ConfigDict(dict(anchor=0.0))  # refl_only: pull to the student of the end of the cold start

    c.gdmd = ConfigDict()
    c.gdmd.beta = 1.0
    c.gdmd.weight = 0.5  # the paper's gamma; 2 beta weight <= dm.weight keeps the sign of distribution matching
    c.gdmd.group = "both"  # implicit targets differ in their "renoise" draw, in the "fake" score's version, or both
    c.gdmd.spread = 0.99  # memory of the running deviation of gains; 0: the block's own

    c.gndm = ConfigDict()
    c.gndm.mode = "renoise"  # or "prompt", "scalar"
    c.gndm.draws = 4  # renoised points of a sample
    c.gndm.rms = True  # their normaliser: root mean square of the differences, or the mean of their own
    c.gndm.importance = 0.2  # clip of the importance weight, where rollout.updates > 1
    c.gndm.share = 1.0  # scalar: of R_dm beside the rewards' advantages

    c.split = ConfigDict()
    c.split.schedule = "hybrid"  # or "independent", "cleaner", "tied"
    c.split.normaliser = "guided"  # or "conditional"

    c.boundary = ConfigDict()
    c.boundary.normaliser = "transition"  # or "estimate"
    c.boundary.consistency = 0.01  # of the fake score
    c.boundary.jump = 0.2  # of its two reverse steps, at most

    c.augmentation = ConfigDict(dict(kappa=0.5, shift=1.0))  # dose of guidance: shift + kappa * advantage

    c.last_step = ConfigDict()
    c.last_step.dm_weight = 1e-3  # of distribution matching beside policy gradient and reward gradient
    c.last_step.weight = 1e-4  # of the reward gradient
    c.last_step.margin = 3.0  # of the weighted sum of rewards
    c.last_step.every_step = True  # match at every step of the grid, or at the last alone
    c.last_step.fake_updates = 1  # on each rollout

    c.drpo = ConfigDict()
    c.drpo.weight = 1.0
    c.drpo.count = 0  # best and worst samples; 0: half the group each
    c.drpo.anchor = "reference"  # or "dm": distribution matching in place of the reference drift
    c.drpo.reference_weight = 0.25
    c.drpo.radii = (0.02, 0.05, 0.2)
    c.drpo.weights = (3000.0, 2000.0, 3500.0, 5000.0)  # best, worst; reference, own samples
    c.drpo.time = 0.1  # noise level at which the base's features are taken
    c.drpo.cells = 4  # features are averaged to this many cells a side

    c.gan = ConfigDict()
    c.gan.images = ""  # a folder of images with captions in .txt files beside them, or a .npy [n, h, w, 3]; "": no GAN
    c.gan.weight = 5e-3
    c.gan.fake_weight = 1e-2  # of the discriminator in the fake score's loss
    c.gan.lr = 1e-4  # of its head

    c.srpo = ConfigDict(dict(rewards=(), positive=(), negative=(), contrast=0.1))  # (): those named hps; the authors'


def _lora(rank: int, alpha: float) -> ConfigDict:
    c = ConfigDict()
    c.rank = rank
    c.alpha = alpha
    c.targets = "attention"  # or "wide": also feed-forward and modulation (SD3), all layers that DMD2 adapts (SDXL)
    return c
