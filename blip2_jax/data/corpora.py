"""The corpora that the paper trains on: where they come from, how they become ours, and how they are mixed.

Images: COCO 113 K, Visual Genome 100 K, SBU 860 K, CC3M 3 M, CC12M 10 M and 115 M of LAION-400M, with the captions that
BLIP filtered and wrote for web images. How the paper mixes them is not published; the weights here are ours.
"""

from __future__ import annotations

import dataclasses
import pathlib

# Addresses become tar shards with pip install img2dataset; the shorter side keeps enough for random crops at 224 px.
_IMG2DATASET = (
    "img2dataset --url_list={0} --input_format={1} --url_col={2} --caption_col={3} --output_format=webdataset "
    "--output_folder={4} --resize_mode=keep_ratio --resize_only_if_bigger=True --image_size=320 --processes_count=16 "
    "--thread_count=64"
)
_BLIP = "https://storage.googleapis.com/sfr-vision-language-research/BLIP/datasets"


@dataclasses.dataclass(frozen=True)
class Corpus:
    """One of the paper's corpora.

    Attributes:
      name: of its folder.
      title: for people.
      published: the form in which it is published.
      download: shell commands that fetch it.
      source: what `prepare` reads.
      images, captions: how many are published; of addresses, a part is gone.
      paper_images, paper_captions: how many the paper used.
      weight: its share of our mixture.
      reason: for that share.
    """

    name: str
    title: str
    published: str
    download: tuple[str, ...]
    source: str
    images: int
    captions: int
    paper_images: int
    paper_captions: int
    weight: float
    reason: str

    def prepare(self, folder: str = "data") -> str:
        """The command that makes ArrayRecord files of it in FOLDER/NAME."""
        return f"python -m blip2_jax.data prepare --source '{self.source}' --output {folder}/{self.name}"


CORPORA = (
    Corpus(
        name="coco",
        title="COCO captions, Karpathy's training split",
        published="zip files of images, and a JSON file with the captions of all splits",
        download=(
            "wget http://images.cocodataset.org/zips/train2014.zip http://images.cocodataset.org/zips/val2014.zip",
            "wget https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip",
            "unzip train2014.zip -d coco && unzip val2014.zip -d coco && unzip caption_datasets.zip -d coco",
        ),
        source="coco:coco/dataset_coco.json+coco?split=train,restval",
        images=113_287,
        captions=566_747,
        paper_images=113_000,
        paper_captions=567_000,
        weight=0.04,
        reason="people wrote five sentences an image: nine times its share of captions, 30 draws of each in stage 1",
    ),
    Corpus(
        name="visual_genome",
        title="Visual Genome, region descriptions",
        published="zip files of images, and a JSON file of 50 phrases an image, of which the paper used some",
        download=(
            "wget https://cs.stanford.edu/people/rak248/VG_100K_2/images.zip",
            "wget https://cs.stanford.edu/people/rak248/VG_100K_2/images2.zip",
            "wget https://homes.cs.washington.edu/~ranjay/visualgenome/data/dataset/region_descriptions.json.zip",
            "for file in images images2 region_descriptions.json; do unzip $file.zip -d visual_genome; done",
        ),
        source="vg:visual_genome/region_descriptions.json+visual_genome",
        images=108_077,
        captions=5_408_689,
        paper_images=100_000,
        paper_captions=769_000,
        weight=0.04,
        reason="people wrote what is in parts of an image: as often as COCO, which has as many images",
    ),
    Corpus(
        name="sbu",
        title="SBU captions",
        published="a JSON file of addresses and captions",
        download=(
            "wget https://www.cs.rice.edu/~vo9/sbucaptions/sbu-captions-all.tar.gz && tar -xzf sbu-captions-all.tar.gz",
            _IMG2DATASET.format("sbu-captions-all.json", "json", "image_urls", "captions", "sbu"),
        ),
        source="webdataset:sbu/*.tar",
        images=1_000_000,
        captions=1_000_000,
        paper_images=860_000,
        paper_captions=860_000,
        weight=0.02,
        reason="people wrote to their own photos, often of what cannot be seen: ten draws of each in stage 1",
    ),
    Corpus(
        name="cc3m",
        title="Conceptual Captions (CC3M)",
        published="a table of captions and addresses, from https://ai.google.com/research/ConceptualCaptions/download",
        download=(
            "sed '1i caption\\turl' Train_GCC-training.tsv > cc3m.tsv",
            _IMG2DATASET.format("cc3m.tsv", "tsv", "url", "caption", "cc3m"),
        ),
        source="webdataset:cc3m/*.tar",
        images=3_318_333,
        captions=3_318_333,
        paper_images=3_000_000,
        paper_captions=3_000_000,
        weight=0.08,
        reason="alt texts, cleaned until they describe the image: eleven draws of each in stage 1",
    ),
    Corpus(
        name="cc12m",
        title="Conceptual 12M",
        published="a table of addresses and captions",
        download=(
            "wget https://storage.googleapis.com/conceptual_12m/cc12m.tsv && sed -i '1i url\\tcaption' cc12m.tsv",
            _IMG2DATASET.format("cc12m.tsv", "tsv", "url", "caption", "cc12m"),
        ),
        source="webdataset:cc12m/*.tar",
        images=12_423_374,
        captions=12_423_374,
        paper_images=10_000_000,
        paper_captions=10_000_000,
        weight=0.17,
        reason="alt texts, cleaned less: seven draws of each in stage 1",
    ),
    Corpus(
        name="laion",
        title="115 million images of LAION-400M",
        published="a JSON file of addresses with the captions that BLIP (ViT-L) wrote and filtered",
        download=(
            f"wget {_BLIP}/laion_synthetic_filtered_large.json",
            _IMG2DATASET.format("laion_synthetic_filtered_large.json", "json", "url", "caption", "laion"),
        ),
        source="webdataset:laion/*.tar",
        images=115_000_000,
        captions=115_000_000,
        paper_images=115_000_000,
        paper_captions=115_000_000,
        weight=0.65,
        reason="nine tenths of the images, and all that is rare; 2.4 draws of each in stage 1",
    ),
)


def mixture(folder: str = "data") -> str:
    """All corpora with our weights, as `data.train` takes them, of what `prepare` has written to FOLDER/NAME."""
    return " + ".join(f"arrayrecord:{folder}/{corpus.name}/*.arrayrecord@{corpus.weight}" for corpus in CORPORA)


def instructions(pattern: str) -> str:
    """How to make the corpus whose files a pattern such as "data/coco/*.arrayrecord" means; "" if it means none."""
    folder = pathlib.PurePath(pattern).parent
    corpus = next((corpus for corpus in CORPORA if corpus.name == folder.name), None)
    if corpus is None:
        return ""
    steps = [*corpus.download, corpus.prepare(str(folder.parent))]
    return "\n".join([f"{corpus.title}, published as {corpus.published}, is made by", *(f"  {step}" for step in steps)])
