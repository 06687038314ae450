"""Stage 2: the Q-Former speaks to a frozen language model.

python -m blip2_jax.main --config=configs/stage2.py --workdir=DIR --config.init=STAGE1_WORKDIR
"""

from ml_collections import ConfigDict


def get_config(variant: str = "nano") -> ConfigDict:
    variants = {"nano": nano, "nano_long": nano_long}
    if variant not in variants:
        raise ValueError(f"configs/stage2.py has no variant {variant!r}; there are {', '.join(variants)}")
    return variants[variant]()


def nano() -> ConfigDict:
    """SmolLM2-135M-Instruct behind the Q-Former of stage 1; captions, and every seventh row asks for the category."""
    config = ConfigDict()
    config.task = "stage2"
    config.seed = 0
    config.total_steps = 170
    config.batch_size = 32
    config.log_every = 5
    config.checkpoint_every = 60
    config.keep_checkpoints = 2
    config.eval_every = 0  # Only at the end.
    config.mesh = "data=-1,fsdp=1,tensor=1"

    config.vision = "nano:"
    config.bert = "nano:"
    config.llm = "nano:"
    config.init = ""  # A stage-1 workdir; "scratch" trains without stage 1.
    config.image_size = 160

    config.data = ConfigDict()
    config.data.train = "nano:train"
    config.data.questions = "nano:train"  # Pictures with a category; "" trains on captions alone.
    config.data.question_share = 0.15  # Of the rows.
    config.data.eval = "nano:val_drawing + nano:val_concept"
    config.data.feature_views = 4
    config.data.view_seed = 0
    config.data.min_crop_scale = 0.5
    config.data.flip = False
    # Stands before the soft prompt. Language models park attention on the first token, which must be one they know:
    # without it the first query takes that place, and training is slow and unstable. "": nothing.
    config.data.begin = "<|endoftext|>"
    config.data.prompt = "A drawing of"
    # What ends a text: as in the paper's OPT models; "" is the model's own token, which it hardly expects here.
    config.data.end = "\n"
    config.data.question = "Question: category? Answer:"
    config.data.max_text_tokens = 8
    config.data.max_answer_tokens = 5
    config.data.lower_case = True
    config.data.threads = 2

    config.model = ConfigDict()
    config.model.layers = 6
    config.model.queries = 8
    config.model.cross_attention_every = 2
    config.model.dropout = 0.0
    config.model.image_positions = True
    config.model.embed_width = 256
    config.model.text_pooling = "mean"
    config.model.keep_token_type = True
    config.model.remat = False
    config.model.unroll = 3

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 2.5e-4
    config.optimizer.fresh_multiplier = 4.0
    config.optimizer.warmup = 0.1
    config.optimizer.final_share = 0.05
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.98
    config.optimizer.epsilon = 1e-8
    config.optimizer.weight_decay = 0.05
    config.optimizer.clip_norm = 1.0

    config.evaluation = ConfigDict()
    config.evaluation.batch_size = 64
    config.evaluation.max_new_tokens = 10
    return config


def nano_long() -> ConfigDict:
    """The same parts for hours: larger pictures, more views, BERT's dropout."""
    config = nano()
    config.total_steps = 2000
    config.checkpoint_every = 50
    config.log_every = 10
    config.eval_every = 500
    config.image_size = 224
    config.data.feature_views = 12
    config.model.dropout = 0.1
    config.optimizer.learning_rate = 1.5e-4
    return config
