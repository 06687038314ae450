"""Stage 2: the Q-Former speaks to a frozen language model.

python -m blip2_jax.main --config=configs/stage2.py --workdir=DIR --config.init=STAGE1_WORKDIR
"""

from ml_collections import ConfigDict

from blip2_jax import compat
from blip2_jax.data import corpora, filters
from blip2_jax.durations import duration
from blip2_jax.models import lora
from blip2_jax.monitoring import alarms, weights_and_biases


def get_config(variant: str = "nano") -> ConfigDict:
    variants = {
        "nano": nano,
        "nano_long": nano_long,
        "opt_2_7b": opt_2_7b,
        "opt_6_7b": opt_6_7b,
        "instruct_vicuna_7b": instruct_vicuna_7b,
        "instruct_flan_t5_xl": instruct_flan_t5_xl,
        "flan_t5_xl": flan_t5_xl,
        "flan_t5_xxl": flan_t5_xxl,
    }
    if variant not in variants:
        raise ValueError(f"configs/stage2.py has no variant {variant!r}; there are {', '.join(variants)}")
    return variants[variant]()


def nano() -> ConfigDict:
    """SmolLM2-135M-Instruct behind the Q-Former of stage 1; captions, and every seventh row asks for the category."""
    config = ConfigDict()
    config.task = "stage2"
    config.seed = 0
    config.total_steps = duration(170)  # Or "3 epochs", "1e6 examples"; see blip2_jax/durations.py.
    config.batch_size = 32
    config.log_every = duration(5)
    config.checkpoint_every = duration(60)
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
    config.llm = "nano:"
    config.llm_activation = ""  # "gelu": Flan-T5 with exact GELU, as LAVIS runs it; "": the model's own.
    config.llm_remat = False  # Recompute the language model's layers in the backward pass: less memory, more time.
    config.instruct = False  # The Q-Former reads the instruction, as InstructBLIP's.
    config.init = ""  # A stage-1 workdir; "scratch" trains without stage 1.
    config.image_size = 160

    config.data = ConfigDict()
    config.data.train = "nano:train"
    config.data.questions = "nano:train"  # Pictures with a category; "" trains on captions alone.
    config.data.question_share = 0.15  # Of the rows.
    config.data.eval = "nano:val_drawing + nano:val_concept"
    config.data.feature_views = 4
    config.data.feature_dtype = "float16"
    config.data.features = ""
    config.data.view_seed = 0
    config.data.min_crop_scale = 0.5
    config.data.flip = False
    # Stands before the soft prompt. Language models park attention on the first token, which must be one they know:
    # without it the first query takes that place, and training is slow and unstable. "": nothing.
    config.data.begin = "<|endoftext|>"
    config.data.bos = ""  # Stands between the soft prompt and the text: "</s>" in the paper's OPT models; "": nothing.
    config.data.prompt = "A drawing of"
    # For encoder-decoders, as in the paper: the encoder reads the beginning of a caption, the decoder writes the rest.
    config.data.split_captions = False
    # What ends a text: as in the paper's OPT models; "" is the model's own token, which it hardly expects here.
    config.data.end = "\n"
    config.data.question = "Question: category? Answer:"
    config.data.max_text_tokens = 8
    config.data.max_answer_tokens = 5
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
    config.model.text_pooling = "mean"
    config.model.keep_token_type = True
    config.model.ln_vision_epsilon = 1e-5  # 1e-6 in transformers' BLIP-2.
    config.model.remat = False
    config.model.unroll = 3

    config.lora = lora.block()  # Adapters instead of whole matrices; see blip2_jax/models/lora.py.

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 2.5e-4
    config.optimizer.fresh_multiplier = 4.0
    config.optimizer.warmup = duration(0.1)
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
    config.evaluation.batch_size = 64  # A multiple of data x fsdp.
    config.evaluation.max_new_tokens = 10

    config.profile = ConfigDict()
    config.profile.steps = ""  # To trace: "5:8" are the steps 5, 6 and 7; SIGUSR1 traces three at any time.
    config.wandb = weights_and_biases.block()  # Weights & Biases; off while wandb.project is "".
    config.alarms = alarms.block()  # Where alarms begin; see blip2_jax/monitoring/alarms.py.
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


def opt_2_7b() -> ConfigDict:
    """The paper's stage 2 with EVA-CLIP ViT-g and OPT-2.7B: 107,133,696 trainable parameters.

    The paper: 80,000 steps of 1,920; here as many images in batches that 64, 128 and 256 chips divide.
    """
    config = nano()
    config.total_steps = 75_000
    config.batch_size = 2048
    config.log_every = 50
    config.checkpoint_every = 2000
    config.eval_every = 0  # With data.eval, such as "5%".
    config.vision = "lavis:eva_vit_g.pth"
    config.bert = "hf:google-bert/bert-base-uncased"
    config.llm = "hf:facebook/opt-2.7b"
    config.llm_remat = True
    config.image_size = 224
    config.data.train = corpora.mixture()  # All of the paper's corpora, with weights of ours.
    config.data.questions = ""
    config.data.question_share = 0.0
    config.data.eval = ""
    config.data.feature_views = 0
    config.data.flip = True
    config.data.begin = ""
    config.data.bos = "</s>"
    config.data.prompt = ""
    config.data.max_text_tokens = 32
    config.data.threads = 16
    config.model.layers = 12
    config.model.queries = 32
    config.model.dropout = 0.1
    config.model.image_positions = False
    config.model.text_pooling = "cls"
    config.model.keep_token_type = False
    config.model.unroll = 1
    config.optimizer.learning_rate = 1e-4
    config.optimizer.fresh_multiplier = 1.0
    config.optimizer.warmup = 2000
    config.optimizer.final_share = 0.5
    config.optimizer.clip_norm = 0.0
    config.evaluation.batch_size = 256
    return config


def opt_6_7b() -> ConfigDict:
    """With OPT-6.7B: 108,314,880 trainable parameters."""
    config = opt_2_7b()
    config.mesh = "data=-1,fsdp=4,tensor=1"  # Its 12.4 GiB are too much for a chip of 16 GB.
    config.llm = "hf:facebook/opt-6.7b"
    return config


def instruct_vicuna_7b() -> ConfigDict:
    """InstructBLIP with Vicuna-7B: to import, export and train on; what it was trained with is not published."""
    config = opt_2_7b()
    config.llm = "hf:lmsys/vicuna-7b-v1.1"
    config.data.bos = "</s>"  # With which its texts begin and end.
    config.data.end = ""
    config.instruct = True
    return config


def instruct_flan_t5_xl() -> ConfigDict:
    """InstructBLIP with Flan-T5-XL, whose GELU is exact there."""
    config = flan_t5_xl()
    config.data.split_captions = False
    config.instruct = True
    config.llm_activation = "gelu"
    return config


def flan_t5_xl() -> ConfigDict:
    """With Flan-T5-XL: 106,739,968 trainable parameters. The paper: 80,000 steps of 1,520."""
    config = opt_2_7b()
    config.total_steps = 79_000
    config.batch_size = 1536
    config.mesh = "data=-1,fsdp=8,tensor=1"
    config.llm = "hf:google/flan-t5-xl"
    config.data.bos = ""
    config.data.end = ""
    config.data.split_captions = True
    return config


def flan_t5_xxl() -> ConfigDict:
    """With Flan-T5-XXL: 108,314,880 trainable parameters."""
    config = flan_t5_xl()
    config.llm = "hf:google/flan-t5-xxl"
    return config
