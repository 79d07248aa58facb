"""Zero-shot classification: a class is the mean direction of sentences about it.

CLIP (arXiv 2103.00020), section 3.1.4: each class name is put into several templates, the
embeddings of these prompts are made unit vectors, averaged, and the mean made a unit vector again.
Leaving out the first of the two gives long embeddings more weight.

Letters: I images, C classes, P prompts, D width.
"""

from collections.abc import Callable, Sequence

import numpy as np

from llmprep_jax.evaluate.retrieval import chance, ranks, unit
from llmprep_jax.types import Array, Float, Int

PLAIN = ("a photo of a {}.",)
# the seven of CLIP's 80 ImageNet templates that its authors found, by forward selection, to do a
# little better than all 80 (notebooks/Prompt_Engineering_for_ImageNet of openai/CLIP)
TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)


def class_vectors(
    encode_text: Callable[[list[str]], Float[Array, "P D"]],
    names: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
    batch_size: int = 256,
) -> Float[np.ndarray, "C D"]:
    """Unit vectors of classes, in float64.

    Args:
      encode_text: embeds prompts, up to `batch_size` at a time.
      templates: texts with one {} each, where the name goes.

    Raises:
      ValueError: a template has not one {}, there is no name or no template, prompts of a class
        cancel out.
    """
    strange = [template for template in templates if template.count("{}") != 1]
    if strange or not templates or not names:
        raise ValueError(
            f"{len(names)} names and {len(templates)} templates, of which not one {{}}: {strange}"
        )
    prompts = [template.replace("{}", name) for name in names for template in templates]
    batches = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
    vectors_PD = np.concatenate([unit(encode_text(batch)) for batch in batches])
    means_CD = vectors_PD.reshape(len(names), len(templates), -1).mean(1)
    lost = [name for name, mean in zip(names, means_CD, strict=True) if not mean.any()]
    if lost:
        raise ValueError(f"the prompts of {lost[:5]} have no mean direction")
    return unit(means_CD)


def top_k_accuracy(
    images: Float[Array, "I D"],
    classes: Float[Array, "C D"],
    labels: Int[Array, " I"] | Sequence[int],
    ks: Sequence[int] = (1, 5),
) -> dict[int, float]:
    """The fraction of images whose class is among the k nearest by cosine, by k.

    Equal scores count by the chance of a random order, as in `retrieval.recall`: a model that maps
    all to one vector has k / C.

    Raises:
      ValueError: no images, not as many labels, a label that is no row of `classes`, or an
        embedding that is not finite.
    """
    labels_I = np.asarray(labels)
    if len(labels_I) != len(images) or not len(images):
        raise ValueError(f"{len(labels_I)} labels for {len(images)} images")
    if labels_I.min() < 0 or labels_I.max() >= len(classes):
        raise ValueError(
            f"labels are from {labels_I.min()} to {labels_I.max()} and classes {len(classes)}"
        )
    above_I, tied_I = ranks(unit(images), unit(classes), labels_I)
    return {k: float(np.mean(chance(above_I, tied_I, np.ones_like(tied_I), k))) for k in ks}
