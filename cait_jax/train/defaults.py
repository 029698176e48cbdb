"""Every key of a config, with one comment each. A recipe starts from these and states only what differs.

The defaults are the paper's ImageNet recipe (Touvron et al., arXiv 2103.17239, after DeiT's) with a rate for
every step; `configs/imagenet.py` adds the authors' rate for every epoch.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    """The defaults, locked: a key that is not here cannot be set."""
    config = ConfigDict()
    config.seed = 0  # every random draw of the run follows from it and the step
    config.batch_size = 1024  # images a step, over all devices and processes
    config.epochs = 400.0  # length of the run, in passes over the training split
    config.steps = placeholder(int)  # length in steps instead, where given
    config.image_size = 224  # side in pixels; in a config file also (height, width)

    config.model = ConfigDict()
    config.model.name = "cait_xs24"  # a name of cait_jax.list_models()
    config.model.width = placeholder(int)  # channels of a token; None: the named model's, as below
    config.model.depth = placeholder(int)  # self-attention blocks
    config.model.num_heads = placeholder(int)  # heads of both kinds of attention
    config.model.patch_size = placeholder(int)  # side of a patch in pixels
    config.model.mlp_ratio = placeholder(float)  # hidden width of the MLPs over the width
    config.model.residual = placeholder(str)  # layerscale, scalar, plain, rezero, fixup, t_fixup
    config.model.block_norm = placeholder(bool)  # whether residual branches are normalised
    config.model.layer_scale_init = placeholder(float)  # start value of gammas, or of scalars
    config.model.talking_heads = placeholder(bool)  # mix the heads of self-attention
    config.model.class_token = placeholder(str)  # class_attention, input, mean, or a block's number
    config.model.class_depth = placeholder(int)  # class-attention blocks
    config.model.class_mlp_ratio = placeholder(float)  # mlp_ratio in them; 0: no MLP
    config.model.distilled = placeholder(bool)  # a second token and head, for a teacher
    config.model.drop_path_rate = placeholder(float)  # stochastic-depth rate
    config.model.drop_path_growth = placeholder(str)  # constant over the depth, or linear
    config.model.embedding_dropout = 0.0  # dropout after the position embedding
    config.model.attention_dropout = 0.0  # dropout on attention weights
    config.model.projection_dropout = placeholder(float)  # after attention's; None: dropout
    config.model.dropout = 0.0  # dropout in MLPs
    config.model.dtype = "float32"  # of the computation: bfloat16, float32 or float64
    config.model.param_dtype = "float32"  # of parameters, optimiser state and EMA
    config.model.precision = placeholder(str)  # of matrix products: None, "high" or "highest"
    config.model.remat = "none"  # what is computed anew going back: elementwise, attention, block
    config.model.attention = placeholder(str)  # its implementation; None: the best one known here
    config.model.stacked = True  # blocks in one scan: compiles fast

    config.init = ConfigDict()  # a checkpoint in the workdir comes first; then these; then the seed
    config.init.weights = placeholder(str)  # a file, a saved directory or a run's workdir
    config.init.pretrained = False  # the released weights of model.name
    config.init.reset_head = False  # start the head anew, as other classes need
    config.init.ema = False  # of a run in init.weights, the averaged parameters

    config.data = ConfigDict()
    config.data.name = "imagenet2012"  # "digits" or a TFDS data set prepared as array_record
    config.data.data_dir = placeholder(str)  # where TFDS data sets lie; None: TFDS's own default
    config.data.train_split = "train"  # split, or part of one such as "train[:90%]"
    config.data.eval_split = "validation"  # split for evaluation
    config.data.mean = (0.485, 0.456, 0.406)  # of each channel, on a scale from 0 to 1
    config.data.std = (0.229, 0.224, 0.225)  # of each channel, likewise
    config.data.aug_repeats = 3  # how often an image comes in a row, augmented anew
    config.data.balanced = False  # every class equally often, however many images it has
    config.data.resize = "exact"  # Pillow's bicubic, as published; "fast": OpenCV's, which differs
    config.data.workers = 0  # processes that decode images; 0: threads of this one

    config.augment = ConfigDict()
    config.augment.scale = (0.08, 1.0)  # random resized crop: share of the image's area
    config.augment.ratio = (0.75, 4 / 3)  # random resized crop: width over height
    config.augment.simple_crop = False  # DeiT III's crop instead: short side resized, shifted by 4
    config.augment.hflip = True  # mirror left and right, with probability 1/2
    config.augment.pad_crop = 0  # pixels of padding before a crop at the image's own size
    config.augment.rotate = 0.0  # largest rotation in degrees
    config.augment.zoom = 0.0  # largest relative change of size
    config.augment.shear = 0.0  # largest horizontal shear
    config.augment.translate = 0.0  # largest shift, as a share of the side
    config.augment.rand_augment = "rand-m9-mstd0.5-inc1"  # RandAugment's policy; "": none
    config.augment.three_augment = False  # DeiT III's: grayscale, solarisation or blur
    config.augment.color_jitter = 0.0  # brightness, contrast and saturation change by up to this
    config.augment.reprob = 0.25  # probability that a box becomes noise
    config.augment.mixup = 0.8  # alpha of mixup; 0: none
    config.augment.cutmix = 1.0  # alpha of CutMix; 0: none
    config.augment.mixup_prob = 1.0  # of mixing a group of rows at all
    config.augment.mixup_switch_prob = 0.5  # of CutMix where there are both
    config.augment.mix_rows = 0  # rows that share a draw and are mixed, even; 0: the whole batch

    config.loss = ConfigDict()
    config.loss.name = "softmax"  # or "binary": each class a yes or no of its own
    config.loss.smoothing = 0.1  # share of a label spread over all classes
    config.loss.target_threshold = placeholder(float)  # of "binary": targets above it count as 1

    config.distill = ConfigDict()
    config.distill.kind = "none"  # "hard" (the paper's; on CaiT's one head an assumption) or "soft"
    config.distill.teacher = "regnety_160"  # a released name, a saved directory or a run's workdir
    config.distill.weights = placeholder(str)  # of a named teacher, a file instead of the release
    config.distill.logits = placeholder(str)  # a file of recorded logits instead of a teacher
    config.distill.alpha = 0.5  # the teacher's part of the loss
    config.distill.temperature = 1.0  # of "soft"

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # adamw, lamb, lion or sgd
    config.optimizer.learning_rate = 5e-4  # peak, for a batch of reference_batch images
    config.optimizer.reference_batch = 512  # the peak grows with batch_size over this; 0: not
    config.optimizer.warmup_epochs = 5.0  # linear warm-up, counted in the length of the run
    config.optimizer.warmup_learning_rate = 1e-6  # learning rate of step 0
    config.optimizer.schedule = "cosine"  # after the warm-up; or "step"
    config.optimizer.final_learning_rate = 1e-5  # where the cosine ends
    config.optimizer.decay_epochs = placeholder(float)  # of "step": epochs between drops; None: 30
    config.optimizer.decay_rate = placeholder(float)  # of "step": factor of a drop; None: 0.1
    config.optimizer.per_epoch = False  # one rate an epoch, as in DeiT's published code
    config.optimizer.weight_decay = 0.05  # of kernels only, times the learning rate
    config.optimizer.b1 = 0.9  # decay of the first moment
    config.optimizer.b2 = 0.999  # decay of the second moment; lion wants 0.99
    config.optimizer.eps = placeholder(float)  # beside the second moment; None: 1e-8, lamb 1e-6
    config.optimizer.momentum = 0.9  # of sgd
    config.optimizer.nesterov = False  # of sgd
    config.optimizer.layer_decay = 1.0  # learning rate of a layer over that of the one above
    config.optimizer.train = "all"  # or head, class_attention, a number of last blocks
    config.optimizer.sam_rho = 0.0  # rho of sharpness-aware minimisation; 0: none
    config.optimizer.grad_clip_norm = placeholder(float)  # of the gradient; 0: none; None: lamb 1
    config.optimizer.grad_accum = 1  # micro batches a step, their gradients averaged
    config.optimizer.ema_decay = 0.99996  # of the average of the parameters; 0: none is kept

    config.phases = ConfigDict()  # first the head alone, then the last blocks too
    config.phases.head_epochs = 0.0  # 0: no phases; else these replace rate, schedule and length
    config.phases.head_learning_rate = 1e-3  # constant in the first phase
    config.phases.blocks = 4  # last blocks that learn in the second
    config.phases.blocks_epochs = 15.0  # length of the second
    config.phases.blocks_learning_rate = 1e-5  # constant in the second

    config.mesh = ConfigDict()  # how the devices are used; their number is the product
    config.mesh.data = -1  # devices with other images and the same parameters; -1: what is left
    config.mesh.fsdp = 1  # devices with other images, each holding a part of the parameters
    config.mesh.tensor = 1  # devices that share images and divide the layers; within a process

    config.eval = ConfigDict()
    config.eval.batch_size = 1024  # images at a time; the result does not depend on it
    config.eval.every_epochs = 1.0  # epochs between evaluations; the last step is always evaluated
    config.eval.crop_pct = 1.0  # side of the centre crop over the short side of the image

    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 1000  # steps between checkpoints; evaluations save one too
    config.checkpoint.keep = 2  # newest checkpoints kept, beside the best by eval/accuracy

    config.report = ConfigDict()
    config.report.every_steps = 50  # steps between lines of the log and of metrics.jsonl
    config.report.tensorboard = False  # TensorBoard files in WORKDIR/tensorboard too
    return config.lock()
