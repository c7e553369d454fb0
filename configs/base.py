"""Every configuration key with its default. The other files override a few; any key is also a flag:

python train.py --config=configs/digits.py --config.optimizer.learning_rate=0.05
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()

    config.seed = 0  # initial weights, order of the examples, augmentation

    config.model = ConfigDict()
    config.model.name = "resnet50"  # a name of hga_flax.models, e.g. resnext50_32x4d, cifar_resnet20
    config.model.options = ""  # keyword arguments of the network, e.g. "zero_init_residual=True"
    config.model.attention = "none"  # a name of hga_flax.attention, e.g. none, hga, hga_table2
    config.model.attention_options = ""  # keyword arguments of the attention, e.g. "kernels=(7,), mfe_act='relu'"
    config.model.dtype = "float32"  # of the computation: float32 or bfloat16; parameters are always float32

    config.init = ConfigDict()
    config.init.weights = ""  # weights of a new run: a run's folder, also DIR@latest, DIR@STEP; a .pth, .safetensors

    config.data = ConfigDict()
    config.data.name = "imagenet2012"  # "digits" (embedded), "folder", or a TFDS or packed data set
    config.data.dir = ""  # the folder of "folder", else of TFDS; "": $TFDS_DATA_DIR or ~/tensorflow_datasets
    config.data.fake = False  # synthetic images in the data set's place
    config.data.fake_examples = 256  # examples in each split of the synthetic data
    config.data.train_split = "train"  # in TFDS's notation
    config.data.eval_split = "validation"  # in TFDS's notation
    config.data.image_size = 224  # height and width of the network's input, pixels
    config.data.mean = (0.485, 0.456, 0.406)  # per channel, of values in 0..1 (ImageNet's)
    config.data.std = (0.229, 0.224, 0.225)  # per channel, of values in 0..1 (ImageNet's)
    config.data.augmentation = "imagenet"  # "imagenet": random crop on the host; "small": on the device; "none"
    config.data.flip = True  # mirror half of the training images
    config.data.alternating_flip = False  # mirror each of them in every second epoch, in place of at random
    config.data.rotation_degrees = 10.0  # rotate training images by up to +- this angle
    config.data.crop_padding = 0  # "small": pad by this many pixels, then crop at random
    config.data.random_erasing = 0.0  # share of the training images of which a random rectangle becomes noise
    config.data.randaugment_ops = 0  # RandAugment, on the host: operations drawn for each training image; 0: none
    config.data.randaugment_magnitude = 9.0  # of its operations, 0 to 10; each time +- a draw of deviation 0.5
    config.data.mixup = 0.0  # mix training images, with shares from a beta distribution of this parameter
    config.data.cutmix = 0.0  # the same, pasting boxes; half of the images get each where both are above 0
    config.data.eval_crop_fraction = 0.875  # "imagenet": evaluate the centre 224 of a short side of 256
    config.data.num_threads = 16  # threads that read and decode, at most one a core; 0 reads in the main thread
    config.data.num_workers = 0  # processes that read and decode whole batches; above 0 in the threads' place
    config.data.cache_mb = 1024  # small images are kept decoded in memory where a split takes no more, 0: never
    config.data.max_bad_images = 100  # of a split, that are skipped because they cannot be decoded; more end the run

    config.training = ConfigDict()
    config.training.epochs = 100.0  # passes over the training split
    config.training.steps = 0  # optimizer steps; wins over epochs when above 0
    config.training.batch_size = 1024  # of the global batch, over all devices
    config.training.loss = "cross_entropy"  # or "binary_cross_entropy": each class apart, the mean over them
    config.training.label_smoothing = 0.0  # share of the target spread over all classes
    # A batch in so many parts, one after the other: the memory of one part, the gradient of all. But each part is
    # normalised by its own batch statistics, and the running ones move once a part, as with a batch of that size.
    config.training.accumulation_steps = 1  # parts of each device's batch
    config.training.ema_decay = 0.0  # of the moving average of the weights, which is then evaluated; 0 keeps none
    config.training.freeze_batch_stats = False  # normalise by the running statistics and leave them as they are
    config.training.batch_norm_scope = "global"  # batch statistics over the "global" batch or one "device"'s part
    config.training.log_every_steps = 100  # steps between two lines of training metrics
    config.training.skip_nonfinite = 0  # steps of the run that may be skipped as not finite; 0: the first ends it
    config.training.grace_seconds = 25.0  # from SIGTERM or Ctrl-C to the end, by which the last step is saved
    config.training.deterministic = True  # on GPUs: kernels that give the same bits in every run
    config.training.lost_process_seconds = 100.0  # of several processes: end when one sends no heartbeat for so long
    config.training.compilation_cache = "~/.cache/hga_flax/xla"  # compiled steps are kept here; "" keeps none

    config.optimizer = ConfigDict()
    config.optimizer.name = "sgd"  # "sgd" (stochastic gradient descent), "adamw" or "lamb"
    config.optimizer.learning_rate = 0.6  # at its peak
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = False
    config.optimizer.b1 = 0.9  # "adamw", "lamb": decay of the gradient's mean
    config.optimizer.b2 = 0.999  # "adamw", "lamb": decay of the squared gradient's mean
    config.optimizer.eps = 1e-8  # "adamw", "lamb": added to the root of the squared gradient's mean
    config.optimizer.weight_decay = 1e-4  # "sgd": joins the gradient, as L2 regularisation; the others: decoupled
    config.optimizer.decay_norm_and_bias = True  # weight decay on 1-d parameters too, as the paper's baselines do
    config.optimizer.clip_norm = 0.0  # the gradient is scaled down to this norm where it is longer; 0: never

    config.optimizer.freeze = ()  # patterns of parameters' paths that are held still, e.g. ("stem*", "stage[12]*")
    config.optimizer.learning_rate_factors = ()  # "PATTERN=FACTOR", the first that fits, e.g. ("classifier=10",)

    config.schedule = ConfigDict()
    config.schedule.name = "step"  # "step", "cosine", "linear" or "constant"
    config.schedule.decay_every_epochs = 30.0  # "step": epochs between two decays
    config.schedule.decay_at_steps = ()  # "step": the steps at which to decay instead, when given
    config.schedule.decay_factor = 0.1  # "step": multiplies the learning rate at each decay
    config.schedule.end_learning_rate = 0.0  # "cosine", "linear": where it ends
    config.schedule.warmup_epochs = 0.0  # length of the warm-up
    config.schedule.warmup_steps = 0  # length of the warm-up; wins over warmup_epochs when above 0
    config.schedule.warmup_share = 0.0  # length of the warm-up as a share of the training, however long that is
    config.schedule.warmup_shape = "linear"  # "linear" from warmup_learning_rate to the peak, or "constant"
    config.schedule.warmup_learning_rate = 0.0  # where a linear warm-up starts, or what a constant one holds

    config.evaluation = ConfigDict()
    config.evaluation.every_epochs = 1.0  # epochs between two evaluations; always one at the end
    config.evaluation.image_size = 0  # height and width, where they differ from the training's; 0: the same
    config.evaluation.batch_size = 0  # of the global batch; 0: the training's

    config.checkpoint = ConfigDict()  # written after each evaluation, and
    config.checkpoint.every_steps = 0  # also every so many steps, when above 0
    config.checkpoint.keep = 3  # latest checkpoints kept; the best is kept beside them

    config.lock()
    return config
