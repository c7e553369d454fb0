"""Every configuration key with its default. The other files override a few; every key is also a flag:

python train.py --config=configs/digits.py --config.optimizer.learning_rate=0.05
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()

    config.seed = 0  # seed of the initial weights, the order of the examples and the augmentation

    config.model = ConfigDict()
    config.model.name = "resnet50"  # a network of hga_flax.models, e.g. resnext50_32x4d, cifar_resnet20
    config.model.options = ""  # keyword arguments of the network, e.g. "zero_init_residual=True"
    config.model.attention = "none"  # an attention of hga_flax.attention, e.g. none, hga, hga_table2
    config.model.attention_options = ""  # keyword arguments of the attention, e.g. "kernels=(7,), mfe_act='relu'"
    config.model.dtype = "float32"  # data type of the computation: float32 or bfloat16; parameters stay float32

    config.init = ConfigDict()
    config.init.weights = ""  # a run (DIR, DIR@latest, DIR@STEP) or a .pth or .safetensors file; "": random weights

    config.data = ConfigDict()
    config.data.name = "imagenet2012"  # "digits" (embedded), "folder", or a TFDS or packed data set
    config.data.dir = ""  # folder of images or of TFDS data sets; "": $TFDS_DATA_DIR or ~/tensorflow_datasets
    config.data.fake = False  # use synthetic images instead of the data set
    config.data.fake_examples = 256  # number of examples in each synthetic split
    config.data.train_split = "train"  # split to train on, in TFDS notation: "train[:90%]"
    config.data.eval_split = "validation"  # split to evaluate on, in TFDS notation
    config.data.image_size = 224  # height and width of the network's input, in pixels
    config.data.mean = (0.485, 0.456, 0.406)  # mean per channel, for values in 0..1 (ImageNet's)
    config.data.std = (0.229, 0.224, 0.225)  # standard deviation per channel, for values in 0..1 (ImageNet's)
    config.data.augmentation = "imagenet"  # "imagenet": random crops on the host; "small": on the device; "none"
    config.data.flip = True  # mirror each training image with probability 1/2
    config.data.alternating_flip = False  # mirror each image in every second epoch, instead of at random
    config.data.rotation_degrees = 10.0  # rotate training images by a random angle within +- this many degrees
    config.data.crop_padding = 0  # "small": pad each side by this many pixels, then crop at random
    config.data.random_erasing = 0.0  # probability of filling a random rectangle of a training image with noise
    config.data.randaugment_ops = 0  # RandAugment operations drawn per training image, on the host; 0: no RandAugment
    config.data.randaugment_magnitude = 9.0  # mean magnitude of an operation, 0 to 10 (standard deviation 0.5)
    config.data.mixup = 0.0  # parameter of mixup's beta distribution; 0: no mixup
    config.data.cutmix = 0.0  # parameter of CutMix's beta distribution; 0: no CutMix; with mixup: half the images each
    config.data.eval_crop_fraction = 0.875  # "imagenet": share of the short side to evaluate, e.g. 224 of 256
    config.data.num_threads = 16  # threads that read and decode, at most one per core; 0: read in the main thread
    config.data.num_workers = 0  # processes that read and decode whole batches, instead of the threads; 0: none
    config.data.cache_mb = 1024  # "small", "none": keep decoded splits of up to this many MB in memory; 0: never
    config.data.max_bad_images = 100  # number of undecodable images to skip per split; more end the run

    config.training = ConfigDict()
    config.training.epochs = 100.0  # passes over the training split
    config.training.steps = 0  # optimizer steps; if above 0, used instead of epochs
    config.training.batch_size = 1024  # size of the global batch, over all devices
    config.training.loss = "cross_entropy"  # or "binary_cross_entropy": one per class, averaged over the classes
    config.training.label_smoothing = 0.0  # share of the target that is spread over all classes
    # The parts of a batch are computed one after the other: this needs the memory of one part and gives the gradient
    # of all. But each part has its own batch statistics and updates the running ones, as a batch of that size would.
    config.training.accumulation_steps = 1  # number of parts into which each device's batch is split
    config.training.ema_decay = 0.0  # decay of the weights' moving average, which is then evaluated; 0: no average
    config.training.freeze_batch_stats = False  # normalise by the running statistics and do not update them
    config.training.batch_norm_scope = "global"  # batch statistics of the "global" batch or of each "device"'s part
    config.training.log_every_steps = 100  # steps between two lines of training metrics
    config.training.skip_nonfinite = 0  # number of non-finite steps that a run may skip; 0: the first one ends it
    config.training.grace_seconds = 25.0  # seconds from SIGTERM or Ctrl-C to exit, to save the last step
    config.training.cpu_devices = 0  # devices that share the CPU's cores; 0: one per core if the batches divide evenly
    config.training.deterministic = True  # on GPUs: use only kernels that give the same bits in every run
    config.training.lost_process_seconds = 100.0  # multi-process: seconds without a heartbeat until the run ends
    config.training.compilation_cache = "~/.cache/hga_flax/xla"  # folder for compiled steps; "": do not save them

    config.optimizer = ConfigDict()
    config.optimizer.name = "sgd"  # "sgd" (stochastic gradient descent), "adamw" or "lamb"
    config.optimizer.learning_rate = 0.6  # peak learning rate
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = False
    config.optimizer.b1 = 0.9  # "adamw", "lamb": decay rate of the gradient's mean
    config.optimizer.b2 = 0.999  # "adamw", "lamb": decay rate of the squared gradient's mean
    config.optimizer.eps = 1e-8  # "adamw", "lamb": added to the root of the squared gradient's mean
    config.optimizer.weight_decay = 1e-4  # "sgd": added to the gradient (L2 regularisation); others: decoupled
    config.optimizer.decay_norm_and_bias = True  # also decay (and "lamb": scale) 1-d parameters, as the baselines do
    config.optimizer.clip_norm = 0.0  # scale the gradient down to at most this norm; 0: never

    config.optimizer.freeze = ()  # path patterns of the parameters to freeze, e.g. ("stem*", "stage[12]*")
    config.optimizer.learning_rate_factors = ()  # "PATTERN=FACTOR", first match wins, e.g. ("classifier=10",)

    config.schedule = ConfigDict()
    config.schedule.name = "step"  # "step", "cosine", "linear" or "constant"
    config.schedule.decay_every_epochs = 30.0  # "step": epochs between two decays
    config.schedule.decay_at_steps = ()  # "step": decay at these steps instead, e.g. (32000, 48000)
    config.schedule.decay_factor = 0.1  # "step": factor by which each decay multiplies the learning rate
    config.schedule.end_learning_rate = 0.0  # "cosine", "linear": final learning rate
    config.schedule.warmup_epochs = 0.0  # length of the warm-up in epochs; set at most one of these three
    config.schedule.warmup_steps = 0  # length of the warm-up in steps
    config.schedule.warmup_share = 0.0  # length of the warm-up as a share of the training
    config.schedule.warmup_shape = "linear"  # "linear": from warmup_learning_rate to the peak; "constant": stay at it
    config.schedule.warmup_learning_rate = 0.0  # where a linear warm-up starts, or the rate of a constant one

    config.evaluation = ConfigDict()
    config.evaluation.every_epochs = 1.0  # epochs between two evaluations; there is always one at the end
    config.evaluation.image_size = 0  # height and width of the images in evaluation; 0: as in training
    config.evaluation.batch_size = 0  # size of the global batch in evaluation; 0: as in training

    config.checkpoint = ConfigDict()  # a checkpoint is written after each evaluation
    config.checkpoint.every_steps = 0  # also write one every this many steps; 0: do not
    config.checkpoint.keep = 3  # number of latest checkpoints to keep, besides the best

    config.lock()
    return config
