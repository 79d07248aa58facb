"""Zero-shot classifiers by hand."""

import numpy as np
import pytest

from llmprep_jax.evaluate.zero_shot import PLAIN, TEMPLATES, class_vectors, top_k_accuracy


def test_prompts_are_made_unit_vectors_before_and_after_the_mean():
    vectors = {
        "a cat": [3.0, 0.0],
        "the cat": [0.0, 4.0],
        "a dog": [-1.0, 0.0],
        "the dog": [0.0, 7.0],
    }
    found = class_vectors(
        lambda prompts: np.array([vectors[prompt] for prompt in prompts]),
        ["cat", "dog"],
        ["a {}", "the {}"],
    )
    half = 0.5**0.5  # without the first step: 0.6 and 0.8
    assert found == pytest.approx(np.array([[half, half], [-half, half]]))


def test_prompts_go_through_in_batches_and_names_as_they_are():
    seen = []

    def encode(prompts):
        seen.append(prompts)
        return np.ones((len(prompts), 2))

    class_vectors(encode, ["{x}", "cat", "dog"], PLAIN, batch_size=2)
    assert seen == [["a photo of a {x}.", "a photo of a cat."], ["a photo of a dog."]]


def test_templates_have_one_place_for_the_name():
    assert all(template.count("{}") == 1 for template in (*PLAIN, *TEMPLATES))
    for templates in (["a photo"], ["{} and {}"], []):
        with pytest.raises(ValueError, match="not one {}"):
            class_vectors(lambda prompts: np.ones((len(prompts), 2)), ["cat"], templates)
    with pytest.raises(ValueError, match="'cat'"):
        class_vectors(lambda prompts: np.zeros((len(prompts), 2)), ["cat"], PLAIN)


def test_the_right_class_among_the_first_k():
    classes = np.eye(4)
    images = np.array([[0.9, 0.1, 0, 0], [0.9, 0.5, 0.1, 0], [0.9, 0.5, 0.6, 0.1]])
    assert top_k_accuracy(images, classes, [0, 1, 1], ks=(1, 2, 3)) == pytest.approx(
        {1: 1 / 3, 2: 2 / 3, 3: 1}
    )


def test_a_model_that_says_one_thing_scores_chance():
    ones = np.ones((10, 7), np.float32)
    labels = np.arange(30) % 10
    found = top_k_accuracy(np.ones((30, 7), np.float32), ones, labels)
    assert found == pytest.approx({1: 0.1, 5: 0.5})


def test_labels_must_fit():
    with pytest.raises(ValueError, match="from 0 to 4 and classes 4"):
        top_k_accuracy(np.eye(4)[:2], np.eye(4), [0, 4])
    with pytest.raises(ValueError, match="1 labels for 2 images"):
        top_k_accuracy(np.eye(4)[:2], np.eye(4), [0])
