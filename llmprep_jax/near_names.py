"""What may have been meant by an unknown key: a slip, another level, another tool's word."""

import difflib
from collections.abc import Sequence

# what other tools call a setting
SYNONYMS = {
    **dict.fromkeys(("learning_rate", "peak_lr", "max_lr"), "lr"),
    **dict.fromkeys(("r", "lora_r", "lora_rank"), "rank"),
    **dict.fromkeys(("lora_alpha", "scaling"), "alpha"),
    **dict.fromkeys(("target_modules", "lora_targets"), "targets"),
    **dict.fromkeys(("batch", "bs", "train_batch_size", "micro_batch_size"), "batch_size"),
    **dict.fromkeys(("max_steps", "num_steps", "iterations", "max_iters", "train_steps"), "steps"),
    **dict.fromkeys(("num_train_epochs", "n_epochs"), "epochs"),
    **dict.fromkeys(("max_length", "max_seq_len", "max_seq_length", "context_length"), "seq_len"),
    **dict.fromkeys(("block_size", "sequence_length", "context"), "seq_len"),
    **dict.fromkeys(("gradient_accumulation_steps", "grad_accum"), "accumulate"),
    **dict.fromkeys(("warmup", "num_warmup_steps"), "warmup_steps"),
    **dict.fromkeys(("wd", "decay"), "weight_decay"),
    **dict.fromkeys(("max_grad_norm", "grad_clip", "clip"), "clip_norm"),
    **dict.fromkeys(("lr_scheduler_type", "lr_schedule", "scheduler"), "schedule"),
    **dict.fromkeys(("output_dir", "output", "outdir", "out_dir"), "out"),
    **dict.fromkeys(("dataset", "train_file", "files", "file", "path"), "paths"),
    **dict.fromkeys(("save_steps", "save_every", "checkpoint_every"), "every"),
    **dict.fromkeys(("eval_steps", "eval_interval"), "eval_every"),
    **dict.fromkeys(("val_split", "validation_split", "test_size"), "holdout"),
    **dict.fromkeys(("gradient_checkpointing", "checkpointing"), "remat"),
    **dict.fromkeys(("precision",), "dtype"),
    **dict.fromkeys(("ema",), "ema_decay"),
}


def suggest(keys: Sequence[str], path: Sequence[str], key: str) -> str | None:
    """A question that names up to three keys in full; None where nothing is near.

    Names of the section that are alike come first, then the same name, or what it is called here,
    in any section.

    Args:
      keys: of the whole config, dotted.
      path, key: of the section, and what it does not have.
    """
    prefix = ".".join((*path, ""))
    names = [name.removeprefix(prefix) for name in keys if name.startswith(prefix)]
    names = [name for name in names if "." not in name]
    near = [prefix + name for name in difflib.get_close_matches(key, names, n=3, cutoff=0.6)]
    if not near:
        lasts = {name.rpartition(".")[2] for name in keys}
        known = difflib.get_close_matches(key.lower(), SYNONYMS, n=1, cutoff=0.9)
        words = [SYNONYMS[known[0]]] if known else [key]
        words = words if lasts & set(words) else difflib.get_close_matches(key, lasts, 1, 0.7)
        near = [name for name in keys if name.rpartition(".")[2] in words][:3]
    return f"did you mean {' or '.join(near)}?" if near else None
