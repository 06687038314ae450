"""Stage 1: ITC + ITM + ITG.

python -m blip2_jax.main --config=configs/stage1.py --workdir=DIR              # nano: minutes on two cores
python -m blip2_jax.main --config=configs/stage1.py:nano_long --workdir=DIR    # hours there
python -m blip2_jax.main --config=configs/stage1.py:eva_g --workdir=DIR --config.data.train=... --config.data.eval=...
"""

from ml_collections import ConfigDict

from blip2_jax import compat
from blip2_jax.data import corpora, filters
from blip2_jax.durations import duration
from blip2_jax.models import lora
from blip2_jax.monitoring import alarms, weights_and_biases


def get_config(variant: str = "nano") -> ConfigDict:
    variants = {"nano": nano, "nano_long": nano_long, "clip_l": clip_l, "eva_g": eva_g}
    if variant not in variants:
        raise ValueError(f"configs/stage1.py has no variant {variant!r}; there are {', '.join(variants)}")
    return variants[variant]()


def nano() -> ConfigDict:
    """EfficientNet-Lite0 at 160 px, a Q-Former from MiniLM-L6 with 8 queries, 2,614 drawings."""
    config = ConfigDict()
    config.task = "stage1"
    config.seed = 0
    config.total_steps = duration(150)  # Or "3 epochs", "1e6 examples"; see blip2_jax/durations.py.
    config.batch_size = 128
    config.log_every = duration(5)
    config.checkpoint_every = duration(50)
    config.keep_checkpoints = 2  # The newest ones.
    config.keep_every = duration(0)  # Those of every so many steps stay, too,
    config.keep_best = ""  # and the best by a metric of an evaluation, "eval/..."; "-eval/...": the lowest.
    config.eval_every = duration(0)  # Only at the end.
    config.mesh = "data=-1,fsdp=1,tensor=1"
    config.pieces = 1  # In which a batch goes through the model, to save memory; the gradient is that of the whole.
    config.shard_trainable = True  # Over fsdp and tensor, as the frozen parts are; False: whole on every device.
    config.max_skipped_in_a_row = 20  # So many steps that are not finite end the run.
    config.watchdog_minutes = 30.0  # Without the end of a step; then all stacks are printed. 0: never.

    config.vision = "nano:"
    config.bert = "nano:"
    config.init = ""
    config.image_size = 160

    config.data = ConfigDict()
    config.data.train = "nano:train"
    config.data.eval = "nano:val_drawing + nano:val_concept"
    # Random crops whose image tokens are computed once; 0 runs the encoder in every step.
    config.data.feature_views = 4
    config.data.feature_dtype = "float16"  # How they are stored: float32, float16, bfloat16 or float8.
    config.data.features = ""  # Where cache_features put them; "": the cache, where a run computes what is missing.
    config.data.view_seed = 0
    config.data.min_crop_scale = 0.5
    config.data.flip = False  # Captions say left and right.
    config.data.max_text_tokens = 8
    config.data.lower_case = True
    config.data.threads = 2  # That make batches ahead.
    config.data.workers = 0  # Processes with so many threads each; 0: all in the one that trains.
    config.data.max_rejected = 0.1  # Share of records that cannot be used past which the run ends.
    config.data.filters = filters.block()  # Which records can be used; see blip2_jax/data/filters.py.

    config.model = ConfigDict()
    config.model.layers = 6
    config.model.queries = 8
    config.model.cross_attention_every = 2
    config.model.dropout = 0.0
    config.model.image_positions = True
    config.model.embed_width = 256
    config.model.text_pooling = "mean"  # How this MiniLM was trained; the paper's BERT uses "cls".
    config.model.keep_token_type = True
    config.model.ln_vision_epsilon = 1e-5  # 1e-6 in transformers' BLIP-2.
    config.model.remat = False
    config.model.unroll = 3

    config.objective = ConfigDict()
    config.objective.itc = 1.0
    config.objective.itm = 1.0
    config.objective.itg = 1.0
    config.objective.itm_share = 0.125  # Of the batch's rows, every eighth, to save time.
    config.objective.itg_share = 0.25
    config.objective.block = 512  # Captions that ITC compares at once with a device's images.
    config.objective.exchange = "ring"  # How wrong images travel between devices; see blip2_jax/parallel/exchange.py.
    config.objective.label_smoothing = 0.1
    # A language head that BERT does not bring starts from the token frequencies of so many captions; 0: from zeros.
    config.objective.itg_prior = 4096
    config.objective.diversity = 0.5  # Not in the paper; see blip2_jax/objectives/diversity.py.

    config.lora = lora.block()  # Adapters instead of whole matrices; see blip2_jax/models/lora.py.

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 5e-4
    config.optimizer.fresh_multiplier = 4.0  # For what no checkpoint provides.
    config.optimizer.text_multiplier = 1.0  # For what reads text alone; below 1 unseen words keep more of their sense.
    config.optimizer.warmup = duration(0.15)
    config.optimizer.final_share = 0.05
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.98
    config.optimizer.epsilon = 1e-8
    config.optimizer.weight_decay = 0.05
    config.optimizer.clip_norm = 1.0
    config.optimizer.warmup_rate = 0.0  # Where warm-up starts.
    config.optimizer.steps_per_epoch = duration(0)  # For compat.epoch_schedule.

    config.compat = compat.block()  # What is to be done as LAVIS does it; see blip2_jax/compat.py.

    config.evaluation = ConfigDict()
    config.evaluation.batch_size = 64  # A multiple of data x fsdp; stage 1's losses depend on it.
    config.evaluation.rerank = 4  # Candidates of each query that ITM judges again; 0: none.
    config.evaluation.rerank_rule = "posterior"  # Or "tempered", "match", "lavis"; see evaluation/retrieval.py.
    # Zero-shot classification of pictures with a category; "|" stands between templates, "": none.
    config.evaluation.templates = "a drawing of {} | {}"

    config.profile = ConfigDict()
    config.profile.steps = ""  # To trace: "5:8" are the steps 5, 6 and 7; SIGUSR1 traces three at any time.
    config.wandb = weights_and_biases.block()  # Weights & Biases; off while wandb.project is "".
    config.alarms = alarms.block()  # Where alarms begin; see blip2_jax/monitoring/alarms.py.
    return config


def nano_long() -> ConfigDict:
    """The same parts for hours: larger pictures, more views, BERT's dropout, slow words."""
    config = nano()
    config.total_steps = 1200
    config.checkpoint_every = 50
    config.log_every = 10
    config.eval_every = 300
    config.image_size = 224
    config.data.feature_views = 12
    config.data.max_text_tokens = 12
    config.model.dropout = 0.1
    config.objective.itm_share = 0.25
    config.optimizer.learning_rate = 3e-4
    config.optimizer.text_multiplier = 0.1
    config.evaluation.rerank = 16
    config.evaluation.rerank_rule = "tempered"
    return config


def eva_g() -> ConfigDict:
    """The paper's stage 1 with EVA-CLIP ViT-g: 186,705,470 trainable parameters.

    The paper: 250,000 steps of 1,680, which is 3.3 epochs of 129 million images; here as many images in batches that
    64, 128 and 256 chips divide. Peak rate, warm-up, beta2 and decay are the paper's. `eva_vit_g.pth` is the file that
    LAVIS downloads.
    """
    config = nano()
    config.total_steps = 205_000
    config.batch_size = 2048
    config.log_every = 50
    config.checkpoint_every = 2000
    config.eval_every = 0  # With data.eval, such as "5%".
    config.vision = "lavis:eva_vit_g.pth"
    config.bert = "hf:google-bert/bert-base-uncased"
    config.image_size = 224
    config.data.train = corpora.mixture()  # All of the paper's corpora, with weights of ours.
    config.data.eval = ""
    config.data.feature_views = 0
    config.data.flip = True
    config.data.max_text_tokens = 32
    config.data.threads = 16
    config.model.layers = 12
    config.model.queries = 32
    config.model.dropout = 0.1
    config.model.image_positions = False  # A ViT has its own.
    config.model.text_pooling = "cls"
    config.model.keep_token_type = False
    config.model.unroll = 1
    config.objective.itm_share = 1.0
    config.objective.itg_share = 1.0
    config.objective.itg_prior = 0
    config.objective.diversity = 0.0
    config.optimizer.learning_rate = 1e-4
    config.optimizer.fresh_multiplier = 1.0
    config.optimizer.warmup = 2000
    config.optimizer.final_share = 0.1
    config.optimizer.clip_norm = 0.0
    config.evaluation.batch_size = 256
    config.evaluation.rerank = 128
    config.evaluation.templates = "a photo of a {}."
    return config


def clip_l() -> ConfigDict:
    """The same with CLIP ViT-L: 183,165,758 trainable parameters. The paper: 250,000 steps of 2,320."""
    config = eva_g()
    config.total_steps = 283_000
    config.vision = "lavis:clip_vit_L.pth"
    return config
