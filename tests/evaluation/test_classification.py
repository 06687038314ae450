"""Zero-shot classification is what its formula says, by ITC and with the best classes judged again by ITM."""

import json

import jax
import numpy as np
import pytest

from blip2_jax import tasks
from blip2_jax.data.text import clean_caption
from blip2_jax.evaluation import classification, retrieval
from tests import tiny

TEMPLATES = ("a {}", "a red {}")


def test_templates_are_parted_and_checked():
    assert classification.parse_templates(" a photo of a {}. | {}") == ("a photo of a {}.", "{}")
    assert classification.parse_templates("") == ()
    for wrong in ("a photo", "{} {}", "a {} | "):
        with pytest.raises(ValueError, match=r"needs one \{\} where the class goes"):
            classification.parse_templates(wrong)


def test_a_class_is_the_mean_of_its_prompts(rng):
    assert classification.prompts(["cat", "dog"], TEMPLATES) == ["a cat", "a red cat", "a dog", "a red dog"]
    features = rng.normal(size=(4, 3)).astype(np.float32)
    found = classification.class_features(features, 2)
    for number in range(2):
        mean = features[2 * number] + features[2 * number + 1]
        np.testing.assert_allclose(found[number], mean / np.linalg.norm(mean), rtol=1e-6)


def test_accuracies():
    found = np.array([[3, 1, 0, 2, 4, 5], [0, 1, 2, 3, 4, 5], [1, 0, 2, 3, 5, 4]])
    assert classification.accuracies(found, np.array([3, 4, 4])) == {"top1": 1 / 3, "top5": 2 / 3}


@pytest.mark.usefixtures("own_cache")
def test_a_task_classifies_as_the_formula_says(folder):
    """Of pictures whose category is their shape, two of whose three classes ITM judges again."""
    config = tiny.recipe("stage1", folder, **{"evaluation.templates": "|".join(TEMPLATES)})
    lines = [json.loads(line) for line in (folder / "pictures" / "pictures.jsonl").read_text().splitlines()]
    file = folder / "pictures" / "shapes.jsonl"
    shapes = [line["caption"].rstrip(".").split()[-1] for line in lines]
    pairs = zip(lines, shapes, strict=True)
    file.write_text("\n".join(json.dumps(line | {"category": shape}) for line, shape in pairs))
    config.data.eval = f"jsonl:{file}"
    task = tasks.create(config)
    trainable = task.initialize(jax.random.key(0))
    pictures = task.pictures(config.data.eval, training=False)
    metrics, _ = task.evaluate(trainable, pictures)

    embeds = np.stack([pictures.example(index)["image_embeds"] for index in range(len(lines))])
    images, classes = np.asarray(task.image_features(trainable, embeds)), sorted(set(shapes))
    labels = np.array([classes.index(shape) for shape in shapes])
    texts = [clean_caption(template.replace("{}", name)) for name in classes for template in TEMPLATES]
    ids, mask = task.caption_tokenizer(texts, config.data.max_text_tokens)
    means = np.asarray(task.text_features(trainable, ids, mask)).reshape(3, 2, -1).mean(1)
    means /= np.linalg.norm(means, axis=-1, keepdims=True)
    scores = np.einsum("iqe,ce->icq", images, means).max(-1)
    order = np.argsort(-scores, axis=1)
    assert metrics["classification/itc/top1"] == pytest.approx(np.mean(order[:, 0] == labels))
    assert metrics["classification/itc/top5"] == 1.0
    right = []
    for image, first in enumerate(order[:, :2]):
        judged = []
        for name in first:
            rows = slice(2 * name, 2 * name + 2)
            logits = np.asarray(task.match_logits(trainable, np.stack([embeds[image]] * 2), ids[rows], mask[rows]))
            judged.append(retrieval.posterior(logits, scores[image, name], float(trainable["temperature"])).mean())
        right.append(first[np.argmax(judged)] == labels[image])
    assert metrics["classification/itm/top1"] == pytest.approx(np.mean(right))
