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
    c.weight = weight  # in the loss; 0 leaves the reward out
    c.margin = margin  # score above which a sample is no longer pushed
    c.units = "raw"  # of score and margin; or "z": in standard deviations of the teacher's scores
    c.mean = 0.0  # of the teacher's scores, for units "z"
    c.std = 0.0  # of the teacher's scores, for units "z"; 0: mean and std are measured before the first step
    c.prompt_prefix = prompt_prefix  # put before every prompt that this reward reads
    c.start = start  # first generator step with this reward; the cold start comes before
    c.ramp = ramp  # steps over which the weight then grows from 0
    c.tokenizer = ""  # its folder, where it does not lie beside the weights
    c.backbone = ""  # CLIP ViT-L/14 of an aesthetic head
    c.arch = ""  # open_clip's name of the architecture, where the weights leave it open
    c.activation = ""  # gelu or quick_gelu, against what the files say
    c.resize = ""  # squash, crop or pad, in place of the kind's own
    return c


def judge(path: str, *, kind: str = "", prompt_prefix: str = "") -> ConfigDict:
    """A held-out reward: watched, never trained on."""
    return reward(path, 0.0, kind=kind, prompt_prefix=prompt_prefix)


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.method = "dmdr_refl"  # a name in dmdr_jax/methods.py
    c.model = ""  # a diffusers folder, a hub id, or shapes:NAME
    c.variant = ""  # weights to prefer, such as fp16
    c.prompts = ""  # .txt, .jsonl, .parquet, tfds:NAME or shapes:WORLD:train
    c.steps = 4000  # generator updates
    c.batch = 192  # prompts per update, over all devices
    c.seed = 30  # of first weights, prompts and noise
    c.t5 = True  # False: SD3 without its T5, the largest of its networks in memory, with zeros in place of its tokens
    c.encode_once = False  # True: the text encoders read all prompts first and leave; the host keeps what they made
    c.t5_length = 256  # tokens of SD3's T5; the authors trained with 128
    c.reward_decoder = ""  # an AutoencoderTiny folder (TAESDXL) to decode with for rewards, in place of the model's own
    c.height = 0  # pixels; 0: the model's own size
    c.width = 0  # pixels; 0: the model's own size
    c.compute_dtype = "float32"  # of activations and matrix products; bfloat16 on accelerators
    c.base_dtype = "float32"  # of the frozen networks in memory; bfloat16 on accelerators
    c.calibration = 256  # teacher's images that mean and std are measured on, where a reward wants that
    c.reward_microbatch = 0  # images of a device that are decoded and scored at a time; 0: all
    c.decode_split = False  # for rewards: one image at a time is decoded by all devices along fsdp together
    c.reward_dtype = ""  # in which samples are decoded for rewards; "": as the decoder is read; bfloat16: half of that
    c.remat = "none"  # recompute in the backward pass: none, full, dots, names
    c.compile_cache = ""  # folder that keeps compiled programs; "": WORKDIR/compiled, on accelerators; "none": nowhere
    c.attention = "auto"  # of a thousand tokens and more: plain, splash (TPU), cudnn (NVIDIA GPU); auto: what fits
    c.on_nonfinite = "stop"  # a number that is not finite ends the run; or "skip": its update alone, ten times in a row

    c.student = ConfigDict()
    c.student.steps = 4  # network evaluations of an image
    c.student.shift = 3.0  # of the student's grid towards noise; 1: equidistant
    c.student.timesteps = ()  # the network's own timesteps in place of the grid, such as (399,) for one SDXL step
    c.student.grid = "uniform"  # to t = 0; or "authors": the released code's, ending at t = 0.001
    c.student.simulation = "renoise"  # training inputs: renoise, ode, cps(eta), or ode_final as the authors ran SD3
    c.student.shared_index = False  # one grid index per batch in place of one per sample

    c.generator = ConfigDict()
    c.generator.kind = "lora"  # what is trained: a LoRA on the teacher, or "full": all its weights
    c.generator.lora = _lora(64, 128.0)  # the student's own
    c.generator.lora.start = ""  # a LoRA to start from, file or hub id, of PEFT, diffusers or kohya's scripts

    c.ode = ConfigDict()  # before all else, the student's first weights by regression on the teacher's ODE
    c.ode.steps = 0  # updates; 0: off
    c.ode.pairs = 10_000  # of noise and the latents that the teacher makes of it
    c.ode.teacher_steps = 50  # of the sampler that makes the pairs
    c.ode.guidance = 0.0  # of the teacher; 0: guidance.scale
    c.ode.batch = 256  # pairs per update
    c.ode.loss = "mse"  # on latents; or "huber"
    c.ode.lr = 1e-5  # learning rate
    c.ode.weight_decay = 0.01  # AdamW's
    c.ode.warmup = 0  # updates over which the rate grows from 0
    c.ode.ema = 0.99  # of the student that the run then starts from

    c.fake = ConfigDict()
    c.fake.lora = _lora(32, 32.0)  # the guidance LoRA, which makes the fake score of the teacher
    c.fake.scale = 2.0  # runtime scale of the guidance LoRA on the fake score
    c.fake.data = "student_x0"  # or "simulated"; they differ in ode_final only, where the authors had the latter
    c.fake.updates = placeholder(int)  # fake updates per generator update

    c.guidance = ConfigDict()
    c.guidance.scale = 7.0  # of the real score
    c.guidance.jitter = 0.5  # the scale is uniform within +- this, drawn for each update
    c.guidance.uncond = "pipeline"  # the absent prompt: as the model's own pipeline has it, "zeros", or "empty"

    c.dynamics = ConfigDict()
    c.dynamics.steps = 2000  # generator updates over which DynaDG and DynaRS decay
    c.dynamics.dg = placeholder(float)  # DynaDG: initial runtime scale of the guidance LoRA on the real score; 0: off
    c.dynamics.rs = placeholder(str)  # "dynamic": DynaRS; or "uniform" from the start, or "hold" the starting density
    c.dynamics.tau_low = 0.02  # lowest noise level at which the scores are compared
    c.dynamics.tau_high = 0.98  # highest noise level of them

    c.dm = ConfigDict()
    c.dm.weight = placeholder(float)  # of distribution matching; 0: rewards alone
    c.dm.form = placeholder(str)  # plain, split (Decoupled DMD), boundary (AC-DMD), renoise_group, prompt_group (GNDM)
    c.dm.normaliser_floor = 1e-3  # added to what the gradient is divided by

    c.rewards = ConfigDict()  # by name, each made by `reward`

    _add_methods(c)

    c.optim = ConfigDict()
    c.optim.generator = _optim(1e-6, 0.01)  # of the student
    c.optim.fake = _optim(5e-6, 0.0)  # of the fake score
    c.optim.b1 = 0.9  # Adam's memory of the gradient
    c.optim.b2 = 0.999  # Adam's memory of its square
    c.optim.clip = 1.0  # global gradient norm beyond which an update is scaled down
    c.ema = 0.99  # of the generator, for previews, evaluation and export

    c.mesh = ConfigDict()  # devices per axis
    c.mesh.data = -1  # each has its part of a batch and all of the parameters; -1: all devices that are left
    c.mesh.fsdp = 0  # parameters are split over these, as is the batch; 0: as many as memory asks for
    c.mesh.base = "auto"  # the frozen denoiser is split over fsdp too, or "whole" on every device; auto: by memory

    c.watch = ConfigDict()  # for over-optimisation, on canaries: prompts and noise that never change
    c.watch.every = 250  # generator updates; 0: never. A run without any reward, trained or held out, is not watched
    c.watch.rewards = ConfigDict()  # held out, never trained on: name -> judge(...)
    c.watch.prompts = ""  # a source of prompts; "": some of those of training
    c.watch.count = 16  # prompts
    c.watch.per_prompt = 4  # images of each
    c.watch.fall = 0.3  # alarm: held-out rewards so far below their best, in the teacher's standard deviations, while
    c.watch.gap = 0.3  # the gap between trained and held-out ones is so much wider than it was there; both together
    c.watch.diversity = 0.7  # alarm: a smaller share of the teacher's, of what images show or of their colours
    c.watch.chroma = 0.0  # alarm: more than so many times the teacher's; 0: not asked
    c.watch.clipped = 0.0  # alarm: so much more of the pixels clipped than of the teacher's; 0: not asked
    c.watch.patience = 2  # times in a row that make an alarm
    c.watch.stop = False  # an alarm ends the run; the checkpoint from before it is WORKDIR/best either way

    c.preview = ConfigDict()  # grids of images in samples/ and TensorBoard
    c.preview.every = 250  # generator updates
    c.preview.images = 16  # of a grid; 0: no grids
    c.preview.teacher_steps = 25  # of the sampler that draws the teacher's grid

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 250  # generator updates
    c.checkpoint.keep = 2  # of the latest
    return c


def _add_methods(c: ConfigDict) -> None:
    """The groups that only some methods read."""
    c.group = ConfigDict()  # several rows of a batch with one prompt
    c.group.size = placeholder(int)  # rows of one prompt; must divide the batch
    c.group.normalise = "group"  # deviation of an advantage: of the group, of the whole "batch", or "none"
    c.group.combine = "each"  # several rewards are normalised each by itself, or their weighted "sum"
    c.group.limit = 5.0  # at which an advantage is cut off
    c.group.shared_start = False  # a group's rollouts start from one noise

    c.rollout = ConfigDict()
    c.rollout.kernel = ""  # of stored rollouts: "" the student's; renoise, cps(eta), flow_sde(a), dance(eta)
    c.rollout.updates = placeholder(int)  # generator updates on one rollout
    c.rollout.reuse = False  # fake updates on the generator's rollout and prompts, in place of one rollout for each

    c.policy = ConfigDict()
    c.policy.weight = placeholder(float)  # of the policy gradient
    c.policy.clip = placeholder(float)  # of the likelihood ratio, to 1 +- this
    c.policy.kl = placeholder(float)  # weight of the KL to the reference
    c.policy.steps = placeholder(int)  # stochastic steps that get a gradient, drawn anew each time; 0: all
    c.policy.steps_of = "batch"  # they are the same for all prompts; or "prompt": each one's own
    c.policy.shared_noise = placeholder(bool)  # the others share their noise within a group
    c.policy.balance = placeholder(float)  # scaled to this part of distribution matching's gradient; 0: not scaled
    c.policy.density = "gaussian"  # of a step; or "rtdmd": without the factor 1 / (2 std^2)
    c.policy.kl_form = "gaussian"  # squared means over s^2 |dt|; or "flow_grpo": over s^2 in place of s^2 |dt|
    c.policy.refresh = 0  # steps after which the reference of the KL is renewed; 0: never

    c.dpo = ConfigDict()
    c.dpo.form = "transitions"  # likelihoods of stored steps, or "denoising": errors at one noise level
    c.dpo.beta = placeholder(float)  # how sharply a preference is read
    c.dpo.clip = 0.1  # of the likelihood ratio to the reference, to 1 +- this
    c.dpo.weight = placeholder(float)  # of the preference loss
    c.dpo.refresh = 0  # steps after which the reference is renewed; 0: never

    c.refl = ConfigDict()
    c.refl.anchor = 0.0  # refl_only: weight of the pull to the student of the end of the cold start

    c.gdmd = ConfigDict()
    c.gdmd.beta = 1.0  # how far the implicit policies lie from the student
    c.gdmd.weight = 0.5  # the paper's gamma; 2 beta weight <= dm.weight keeps the sign of distribution matching
    c.gdmd.group = "both"  # implicit targets differ in their "renoise" draw, in the "fake" score's version, or both
    c.gdmd.old = "block"  # the old student: of the beginning of the updates on a rollout, or the run's "average"
    c.gdmd.normalised = True  # targets at DMD's normalised gradient; False: at the bare difference of estimates
    c.gdmd.spread = 0.99  # memory of the running deviation of gains; 0: the block's own

    c.gndm = ConfigDict()
    c.gndm.mode = "renoise"  # what makes a group: renoised points; or "prompt", "scalar"; see docs/methods.md
    c.gndm.draws = 4  # renoise: points of a sample
    c.gndm.rms = True  # their normaliser: root mean square of the differences, or the mean of their own
    c.gndm.importance = 0.2  # clip of the importance weight, where rollout.updates > 1
    c.gndm.share = 1.0  # scalar: of R_dm beside the rewards' advantages

    c.split = ConfigDict()
    c.split.schedule = "hybrid"  # noise levels of the two parts; or "independent", "cleaner", "tied"
    c.split.normaliser = "guided"  # real score in the normaliser; or "conditional"

    c.boundary = ConfigDict()
    c.boundary.normaliser = "transition"  # mean |x_s - real x_s|, or "estimate": mean |x0 - real x0|
    c.boundary.consistency = 0.01  # weight of the fake score's consistency term
    c.boundary.times = "renoised"  # it starts where the fake score is trained; or "grid": at the student's times
    c.boundary.jump = 0.2  # of its two reverse steps, at most; on the grid they end at the next time

    c.augmentation = ConfigDict()  # ddmd_adv's dose of guidance: shift + kappa * advantage
    c.augmentation.kappa = 0.5  # of the advantage
    c.augmentation.shift = 1.0  # without one

    c.last_step = ConfigDict()
    c.last_step.dm_weight = 1e-3  # of distribution matching beside policy gradient and reward gradient
    c.last_step.weight = 1e-4  # of the reward gradient
    c.last_step.margin = 3.0  # of the weighted sum of rewards
    c.last_step.every_step = True  # match at every step of the grid, or at the last alone
    c.last_step.fake_updates = 1  # on each rollout

    c.drpo = ConfigDict()
    c.drpo.weight = 1.0  # of the drift
    c.drpo.count = 0  # best and worst samples; 0: half the group each
    c.drpo.anchor = "reference"  # what holds: the drift to the reference, or "dm": distribution matching
    c.drpo.reference_weight = 0.25  # of the reference's samples
    c.drpo.radii = (0.02, 0.05, 0.2)  # of the kernels, relative to the mean distance of features
    c.drpo.weights = (3000.0, 2000.0, 3500.0, 5000.0)  # best, worst; reference, own samples
    c.drpo.time = 0.1  # noise level at which the base's features are taken
    c.drpo.cells = 4  # features are averaged to this many cells a side

    c.gan = ConfigDict()
    c.gan.images = ""  # folder of images and captions (.txt), .npy [n, h, w, 3], or shapes:WORLD:train; "": no GAN
    c.gan.weight = 5e-3  # of the discriminator in the generator's loss
    c.gan.fake_weight = 1e-2  # of the discriminator in the fake score's loss
    c.gan.lr = 1e-4  # of the discriminator's head

    c.srpo = ConfigDict()
    c.srpo.rewards = ()  # names of the rewards whose texts are contrasted; (): those with hps in their name
    c.srpo.positive = ()  # words before a prompt, drawn for each batch; (): the authors', for shapes:... others
    c.srpo.negative = ()  # words of the texts that are subtracted; (): as above
    c.srpo.contrast = 0.1  # k in (1 + k) positive - negative


def _lora(rank: int, alpha: float) -> ConfigDict:
    c = ConfigDict()
    c.rank = rank  # of the low-rank factors
    c.alpha = alpha  # the delta is scaled by alpha / rank
    c.targets = "attention"  # its layers; or "wide": also feed-forward, modulation (SD3), all that DMD2 adapts (SDXL)
    return c


def _optim(lr: float, weight_decay: float) -> ConfigDict:
    c = ConfigDict()
    c.lr = lr  # learning rate, constant after the warm-up
    c.weight_decay = weight_decay  # AdamW's
    c.warmup = 0  # updates over which the rate grows from 0
    return c
