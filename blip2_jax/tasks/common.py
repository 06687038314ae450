"""What both stages share: the frozen encoder, the pictures, and the tables that steer the optimizer."""

from __future__ import annotations

import abc
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from blip2_jax import params
from blip2_jax.checkpoints import base, frozen, mapping
from blip2_jax.checkpoints.bert import initialize_qformer, qformer_config
from blip2_jax.checkpoints.downloads import cache_directory
from blip2_jax.checkpoints.qformer import INSTRUCTION_TOKENIZER
from blip2_jax.data.features import FeaturePlan, FeatureTable, View, batch_dtype, compute
from blip2_jax.data.filters import EVERYTHING, Filters, filters
from blip2_jax.data.mixture import parse_mixture
from blip2_jax.data.pipeline import Batch, Part, Pictures, Schema
from blip2_jax.data.records import Record, Source
from blip2_jax.data.sources import open_source
from blip2_jax.data.text import CaptionTokenizer, clean_caption
from blip2_jax.decoding import Draws, GenerationConfig
from blip2_jax.evaluation.batches import Layout, in_batches
from blip2_jax.models import lora
from blip2_jax.models.blip2 import Blip2Config
from blip2_jax.models.qformer import QFormer
from blip2_jax.parallel import gathering, sharding
from blip2_jax.parallel import mesh as meshes

Metrics = dict[str, jax.Array]

_ENCODED_AT_ONCE = 64  # Pictures.

# What no pretrained checkpoint provides, and so may learn at a higher rate.
FRESH = (
    r"qformer/(query_tokens|image_projection/.*|.*/cross_attention/.*|lm_head/.*)",
    r"(ln_vision|vision_proj|text_proj|itm_head|language_projection)/.*",
    r"temperature",
)


class Batches(Protocol):
    """How a stage makes batches of examples; it can be pickled."""

    def collate(self, examples: Sequence[Record]) -> Batch:
        """A batch of what the parts prepare."""

    def schema(self, batch_size: int) -> Schema:
        """Shapes and dtypes of what `collate` adds to images."""


class Task(abc.ABC):
    """One stage of training: what is frozen, what is trained, its loss, its data and its evaluation."""

    name: str
    adapted_parts: tuple[str, ...] = ("qformer",)  # Those that adapters can be trained for.
    model: nn.Module
    mesh: Mesh | None = None  # What frozen parameters are spread over, if it is set before they are read.

    def __init__(self, config: ml_collections.ConfigDict, dtype: Any = None):
        """Build the modules; weights and tokenizers are read when they are first needed.

        Args:
          config: the recipe.
          dtype: of frozen parameters and of matrix products; None: as suits the accelerator that is here.
        """
        self.config = config
        self.dtype = frozen.frozen_dtype() if dtype is None else jnp.dtype(dtype)
        self.parts = {"vision": frozen.find("vision", config.vision), "bert": frozen.find("bert", config.bert)}
        self.lora = lora.resolve(config.lora, self.adapted_parts)
        if "qformer" in self.lora.targets:
            self.parts["qformer"] = base.find(config.init)
        self.encoder = frozen.vision_encoder(self.parts["vision"], config.image_size, self.dtype)
        self._encode = jax.jit(self.encoder.encode)
        self._sources: dict[str, Source] = {}
        model = config.model
        self.blip2 = Blip2Config(
            qformer=qformer_config(
                self.parts["bert"].config,
                layers=model.layers,
                queries=model.queries,
                cross_attention_every=model.cross_attention_every,
                dropout=model.dropout,
                attention_dropout=model.dropout,
                remat=model.remat,
                unroll=model.unroll,
                dtype=self.dtype,
            ),
            image_tokens=self.encoder.tokens,
            image_positions=model.image_positions,
            embed_width=model.embed_width,
            text_pooling=model.text_pooling,
            ln_vision_epsilon=model.ln_vision_epsilon,
        )

    # What a stage says of itself.

    @abc.abstractmethod
    def training_parts(self) -> list[Part]:
        """What the rows of training batches are made of."""

    @property
    @abc.abstractmethod
    def batches(self) -> Batches:
        """How examples become batches."""

    @abc.abstractmethod
    def fresh_model(self, key: jax.Array) -> params.Tree:
        """The newly initialised parameters of `model`."""

    @abc.abstractmethod
    def value_and_gradients(
        self, trainable: params.Tree, frozen: params.Tree, batch: Batch, key: jax.Array
    ) -> tuple[tuple[jax.Array, Metrics], params.Tree]:
        """The training loss of a batch, float32[], with what to log, and its gradient by `trainable`."""

    @abc.abstractmethod
    def read_image(self, model: nn.Module, image_embeds: jax.Array) -> jax.Array:
        """The pass in which the queries of this stage's `model` read an image: float[B, P, D] -> float[B, Q, ...]."""

    @abc.abstractmethod
    def evaluate(self, trainable: params.Tree, pictures: Pictures) -> tuple[dict[str, float], list[dict]]:
        """Metrics on all of `pictures`, by path, and samples for the report."""

    @property
    @abc.abstractmethod
    def writes(self) -> bool:
        """Whether captions can be written with what this task has learnt."""

    @abc.abstractmethod
    def captions(
        self, trainable: params.Tree, image_embeds: jax.Array, config: GenerationConfig, draws: Draws | None = None
    ) -> list[list[str]]:
        """What the model writes about images float[B, P, D]: for each of them R captions.

        Raises:
          ValueError: it does not write.
        """

    def rows_in_step(self) -> int:
        """What a device's rows of a batch must be a multiple of."""
        return self.config.pieces

    # What follows from it.

    @functools.cached_property
    def vision_parameters(self) -> params.Tree:
        return frozen.load_vision(self.parts["vision"], self.encoder, self.dtype, self.put("vision"))

    def put(self, part: str) -> mapping.Put:
        """Where the parameters of a frozen tree go as they are read: to their places on the mesh, if there is one."""
        return sharding.placer(self.frozen_shapes()[part], self.mesh) if self.mesh else mapping.to_device

    @property
    def caption_tokenizer_folder(self) -> pathlib.Path:
        """Where the BERT's tokenizer is; an InstructBLIP's has a folder of its own."""
        folder = self.parts["bert"].path
        own = folder / INSTRUCTION_TOKENIZER
        return own if own.is_dir() else folder

    @functools.cached_property
    def caption_tokenizer(self) -> CaptionTokenizer:
        """That of the BERT.

        Raises:
          ValueError: it has more tokens than the Q-Former has rows.
        """
        tokenizer, rows = CaptionTokenizer(self.caption_tokenizer_folder), self.blip2.qformer.vocab_size
        if tokenizer.decoder_start >= rows:
            raise ValueError(
                f"{self.parts['bert'].path}: the tokenizer's [DEC] is token {tokenizer.decoder_start}, but the "
                f"Q-Former's vocabulary has {rows} rows: tokenizer and config.json do not belong together"
            )
        return tokenizer

    def adaptable(self, part: str) -> lora.Adaptable:
        """A part that adapters can be trained for."""
        return lora.adaptable(self.fresh_model, part)

    def fresh(self, key: jax.Array) -> params.Tree:
        """A newly initialised trainable tree: that of `model`, or what of it learns beside adapters, and these."""
        tree, adapters = dict(self.fresh_model(key)), {}
        for part in self.lora.targets:
            adapters[part] = lora.fresh(key, part, self.adaptable(part), self.lora)
            tree.pop(part, None)
        return tree | {"lora": adapters} if adapters else tree

    def assembled(self, trainable: params.Tree) -> params.Tree:
        """Trainable parameters as evaluation and generation take them: the Q-Former with its adapters, if it has any.

        Adapters of a language model remain beside it, for `Stage2.language`.
        """
        if "qformer" not in trainable.get("lora", {}):
            return trainable
        rest = {part: adapters for part, adapters in trainable["lora"].items() if part != "qformer"}
        whole, _ = lora.assemble(trainable, {"qformer": self._qformer}, self.lora.scale)
        return whole | ({"lora": rest} if rest else {})

    @functools.cached_property
    def _qformer(self) -> params.Tree:
        """The one that adapters are trained beside."""
        shapes = self.frozen_shapes()["qformer"]
        return base.load(self.parts["qformer"], shapes, self.blip2.qformer, self.put("qformer"))

    def shapes(self) -> params.Tree:
        """The trainable tree without its values."""
        return mapping.template(self.fresh)

    def frozen_shapes(self) -> params.Tree:
        """The whole frozen trees without their values."""
        shapes = {"vision": mapping.template(self.encoder.init, self.dtype)}
        return shapes | ({"qformer": self.adaptable("qformer").shapes} if "qformer" in self.lora.targets else {})

    @property
    def frozen(self) -> params.Tree:
        """The frozen parameters that the training step needs; empty where image tokens are computed before."""
        vision = {} if self.config.data.feature_views else {"vision": self.vision_parameters}
        return vision | ({"qformer": self._qformer} if "qformer" in self.lora.targets else {})

    def frozen_identity(self) -> dict[str, dict[str, str]]:
        """Source, content hash and dtype of every part that this run is built on, for frozen.json."""
        return {name: part.identity(self.dtype) for name, part in self.parts.items()}

    def encode(self, images: np.ndarray) -> jax.Array:
        """uint8[B, S, S, 3] -> image_embeds float[B, P, D], by the frozen encoder."""
        if self.mesh and len(images) % meshes.batch_shards(self.mesh) == 0:
            images = jax.device_put(images, meshes.batch_sharding(self.mesh))
        return self._encode(self.vision_parameters, images)

    def schema(self) -> Schema:
        """Shapes and dtypes of a training batch."""
        batch, size = self.config.batch_size, self.config.image_size
        image = {"image": jax.ShapeDtypeStruct((batch, size, size, 3), np.uint8)}
        tokens = (batch, self.encoder.tokens, self.encoder.width)
        data = self.config.data
        cached = {"image_embeds": jax.ShapeDtypeStruct(tokens, batch_dtype(data.feature_dtype))}
        images = (cached if data.feature_views else image) | {
            "image_id": jax.ShapeDtypeStruct((batch, 2), np.uint32),
            "example_mask": jax.ShapeDtypeStruct((batch,), np.bool_),
        }
        return images | self.batches.schema(batch)

    def initialize(self, key: jax.Array) -> params.Tree:
        """The trainable tree at the start of the paper's recipe: BERT's weights where it has them.

        Where config.bert is a whole BLIP-2, which has no BERT inside, everything is fresh.
        """
        tree = dict(jax.jit(self.fresh)(key))
        if not self.has_bert or "qformer" not in tree:
            return tree
        tree["qformer"] = initialize_qformer(
            tree["qformer"], self.parts["bert"].tensors, self.blip2.qformer, self.config.model.keep_token_type
        )
        return jax.tree.map(jnp.asarray, tree)

    @property
    def has_bert(self) -> bool:
        """Whether config.bert has weights that the Q-Former can start from, not only sizes and a tokenizer."""
        return "qformer_config" not in self.parts["bert"].config

    def rate_table(self, trainable: params.Tree) -> params.Table[float]:
        """Multipliers of the learning rate."""
        fresh = [(row, self.config.optimizer.fresh_multiplier) for row in FRESH]
        return params.relevant([(r"lora/.*", self.lora.multiplier), *fresh, (r".*", 1.0)], trainable)

    def source(self, name: str) -> Source:
        """Open a source, once."""
        if name not in self._sources:
            self._sources[name] = open_source(name)
        return self._sources[name]

    def pictures(self, name: str, training: bool) -> Pictures:
        """Open a source; where a run takes image tokens that were computed before, they are found or computed now."""
        data, table = self.config.data, None
        if data.feature_views or not training:
            if not (training and data.features):
                self.compute_features(name, training)
            table = FeatureTable(self.feature_plan(name, training), self.features_root(training))
        used = self.filters if training else EVERYTHING
        return Pictures(name, self.source(name), self.view(training), table, used)

    def view(self, training: bool) -> View:
        """How pictures are looked at."""
        size, data = self.config.image_size, self.config.data
        if not training:
            return View(size)
        views, limits = max(data.feature_views, 1), self.filters.limits
        return View(size, data.min_crop_scale, data.flip, views, data.view_seed, limits)

    @functools.cached_property
    def filters(self) -> Filters:
        """Which records are trained on."""
        return filters(self.config.data.filters)

    def feature_plan(self, name: str, training: bool) -> FeaturePlan:
        """What the image tokens of a source depend on."""
        return FeaturePlan(
            self.source(name).identity,
            len(self.source(name)),
            self.parts["vision"].sha256,
            self.view(training),
            self.config.data.feature_dtype,
            (self.encoder.tokens, self.encoder.width),
        )

    def features_root(self, training: bool) -> pathlib.Path:
        """Where image tokens are: data.features is for training alone."""
        named = self.config.data.features if training else ""
        return pathlib.Path(named) if named else cache_directory() / "features"

    def compute_features(self, name: str, training: bool) -> None:
        """Compute a source's image tokens where they are not there yet.

        Of several processes, which have to call together, those that see the same folder share its files, and all wait
        until every file is whole.

        Raises:
          OSError: there is no room, here or in another process.
        """
        root, encoder = self.features_root(training), self._in_this_process()
        shards = meshes.batch_shards(encoder.mesh) if encoder.mesh else 1
        sharing = gathering.sharers(root)
        with gathering.together(f"image features of {name}"):
            compute(
                self.source(name),
                self.feature_plan(name, training),
                encoder.encode,
                root,
                f"image features of {name}",
                batch_size=shards * max(1, _ENCODED_AT_ONCE // shards),
                threads=self.config.data.threads,
                own=slice(sharing.index(jax.process_index()), None, len(sharing)),
            )

    def _in_this_process(self) -> Task:
        """The same task on a mesh that no other process has a part of."""
        if self.mesh is None or not self.mesh.is_multi_process:
            return self
        alone = type(self)(self.config, self.dtype)
        alone.mesh = meshes.make_mesh("data=-1", jax.local_devices())
        return alone

    def mixture(
        self, text: str, prepare: Callable[[dict, np.random.Generator], dict], share: float = 1.0
    ) -> list[Part]:
        """The parts of a mixture such as "SRC@0.7 + SRC@0.3", which together make up `share` of the rows."""
        parts = [
            Part(self.pictures(name, training=True), prepare, share * weight) for name, weight in parse_mixture(text)
        ]
        for part in parts:
            if not len(part.pictures.source):
                raise ValueError(f"{part.pictures.name} holds no record")
        return parts

    def sentence_embeddings(self, texts: Sequence[str]) -> np.ndarray:
        """float32[N, D] of unit length: the mean of what BERT, as it was before training, makes of a text's tokens."""
        config = self.blip2.qformer
        qformer, clean = QFormer(config), [clean_caption(text) for text in texts]
        ids, mask = self.caption_tokenizer(clean, min(32, config.max_positions))
        ids, mask = ids[:, : mask.sum(1).max()], mask[:, : mask.sum(1).max()]
        init = jax.jit(lambda key: qformer.init(key, ids[:1], mask[:1], method="encode_text"))
        fresh = init(jax.random.key(0))["params"]
        weights = initialize_qformer(fresh, self.parts["bert"].tensors, config, keep_token_type=True)

        @jax.jit
        def encode(ids: jax.Array, mask: jax.Array) -> jax.Array:
            tokens = qformer.apply({"params": weights}, ids, mask, method="encode_text")
            mean = jnp.mean(tokens, axis=1, where=mask[..., None]).astype(jnp.float32)
            return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)

        return in_batches(Layout(meshes.one_device(), 64), encode, (ids, mask), "sentence embeddings")

    def evaluation_layout(self) -> Layout:
        """How batches of evaluation lie on the mesh of a run, or on one device.

        Raises:
          ValueError: config.evaluation.batch_size does not divide over the mesh.
        """
        return Layout(self.mesh or meshes.one_device(), self.config.evaluation.batch_size)

    def evaluation_pictures(self) -> dict[str, Pictures]:
        """The sources of config.data.eval, each evaluated by itself."""
        return {name: self.pictures(name, training=False) for name, _ in parse_mixture(self.config.data.eval)}
