"""How Hugging Face names the parts of a model with a language model and a tower.

Released files have the language model with its head below `language_model.`, and the tower's
tensors as their own class names them. Newer files of transformers leave `vision_model.` out, and in
memory all but the head is below `model.`.
"""

TOWER, PROJECTOR, LANGUAGE = (
    "vision_tower.vision_model.",
    "multi_modal_projector.",
    "language_model.",
)
RENAMES = (
    (r"^(_orig_mod\.|module\.)+", ""),
    (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
    (r"^vision_tower\.(?!vision_model\.)", TOWER),
    (r"^(model\.)?language_model\.(model\.)*(?!lm_head\.)", f"{LANGUAGE}model."),
    (r"^(language_model\.model\.)?lm_head\.", f"{LANGUAGE}lm_head."),
)
IN_MEMORY = (
    (f"{LANGUAGE}model.", "model.language_model."),
    (f"{LANGUAGE}lm_head.", "lm_head."),
    (TOWER, "model.vision_tower."),
    (PROJECTOR, f"model.{PROJECTOR}"),
)
