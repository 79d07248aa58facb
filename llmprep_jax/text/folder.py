"""Hugging Face folders: the tokenizer files as transformers 5 reads them.

tokenizer.json (else tokenizer.model) holds the ids; tokenizer_config.json, special_tokens_map.json,
added_tokens.json, generation_config.json and chat_template.jinja say the rest. Where there is a
tokenizer.json, its own post-processor decides whether BOS is added, and `add_bos_token` in
tokenizer_config.json is not consulted (transformers 5; version 4 did for some classes).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import normalizers

from llmprep_jax.text import spm, towers
from llmprep_jax.text.vocab import ROLES, Parts, add_special, one_line, set_template


def read_folder(folder: str | Path) -> Parts:
    """Reads the tokenizer of a folder.

    Raises FileNotFoundError when there is none, ValueError on a damaged file; each names the file.
    """
    folder = Path(folder)
    config = _read_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:  # the older files count only where it is missing
        config = {**config, **_read_json(folder / "special_tokens_map.json")}
    special = _special_tokens(folder, config)
    if (folder / "tokenizer.json").is_file():
        core = _read_core(folder / "tokenizer.json")
    elif (folder / "tokenizer.model").is_file():
        core, special = _read_spm(folder / "tokenizer.model", config, special)
    elif _kind(config) == "CLIPTokenizer" and (folder / "merges.txt").is_file():
        core = towers.read_clip(folder / "vocab.json", folder / "merges.txt")
        config, special = {"add_eos_token": True, **config}, towers.CLIP_SPECIAL | special
    elif _kind(config) == "SiglipTokenizer" and (folder / "spiece.model").is_file():
        core, special = _read_spm(folder / "spiece.model", config, towers.SIGLIP_SPECIAL | special)
        core.normalizer = normalizers.Sequence([towers.canonical_normalizer(), core.normalizer])
        config = {"add_eos_token": True, **config, "add_bos_token": False}
    else:
        raise FileNotFoundError(
            f"{folder}: no tokenizer.json or tokenizer.model; copy the model's files there"
        )
    _add_tokens(folder, core, config, special)
    if not (folder / "tokenizer.json").is_file():
        bos = special.get("bos_token") if config.get("add_bos_token", True) else None
        set_template(core, bos, special.get("eos_token") if config.get("add_eos_token") else None)
    eos_ids = _ids(folder, "eos_token_id") or _eos_saved(folder, config)
    _fill_roles(folder, core, special)
    return Parts(core, special, eos_ids, _read_template(folder, config), str(folder))


def _kind(config: Mapping[str, Any]) -> str:
    """The class that tokenizer_config.json names, fast or not."""
    return str(config.get("tokenizer_class", "")).removesuffix("Fast")


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; {} when the file is not there."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({one_line(error)}); download it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds {type(value).__name__}, not an object; download it again")
    return value


def _read_core(path: Path) -> tokenizers.Tokenizer:
    try:
        core = tokenizers.Tokenizer.from_file(str(path))
    except (
        Exception
    ) as error:  # the library raises bare Exception, for a missing brace as for a bad merge
        raise ValueError(
            f"{path}: not a tokenizer ({one_line(error)}); download it again"
        ) from None
    core.no_padding()
    core.no_truncation()
    return core


def _text_of(path: Path, name: str, value: Any) -> str:
    """The text of a token given as a string or as {"content": ...}."""
    text = value.get("content") if isinstance(value, Mapping) else value
    if not isinstance(text, str):
        raise ValueError(f"{path}: {name} is {value!r}, not a token; write its text there")
    return text


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    path = folder / "tokenizer_config.json"
    texts = {role: _text_of(path, role, config[role]) for role in ROLES if config.get(role)}
    for (
        role,
        value,
    ) in config.items():  # a model's own, such as image_token, which its template uses
        if role.endswith("_token") and isinstance(value, str | Mapping):
            texts[role] = _text_of(path, role, value)
    return texts


def _read_spm(
    path: Path, config: Mapping[str, Any], special: dict[str, str]
) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """Pieces may be renamed by tokenizer_config.json (Gemma's unused ones are)."""
    model = spm.read_spm(path)
    texts = {text for text, _, _ in model.pieces}
    for i, token in _added_decoder(path.parent, config).items():
        if i < len(model.pieces) and token.content not in texts:
            model.pieces[i] = (token.content, *model.pieces[i][1:])
    prefix = None
    if config.get("add_prefix_space") is False:
        prefix = "never"
    elif config.get("legacy") and model.add_dummy_prefix:
        prefix = "always"
    try:
        core = spm.build_core(model, prefix)
    except Exception as error:  # the library raises bare Exception on a vocabulary it refuses
        raise ValueError(
            f"{path}: cannot be built ({one_line(error)}); download it again"
        ) from None
    return core, model.special_tokens() | special


def _added_decoder(folder: Path, config: Mapping[str, Any]) -> dict[int, tokenizers.AddedToken]:
    """The added tokens by id, of tokenizer_config.json or else of added_tokens.json."""
    path = folder / "tokenizer_config.json"
    rows = config.get("added_tokens_decoder")
    if rows is None:
        path = folder / "added_tokens.json"
        rows = {i: {"content": text} for text, i in _read_json(path).items()}
    try:
        return {int(i): tokenizers.AddedToken(**row) for i, row in rows.items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path}: bad added tokens ({one_line(error)}); download it again"
        ) from None


def _add_tokens(
    folder: Path, core: tokenizers.Tokenizer, config: Mapping[str, Any], special: Mapping[str, str]
) -> None:
    """Adds, by id, what tokenizer_config.json has and the core lacks, then the special tokens."""
    known = {token.content for token in core.get_added_tokens_decoder().values()}
    for i, token in sorted(_added_decoder(folder, config).items()):
        if token.content in known:
            continue
        core.add_special_tokens([token]) if token.special else core.add_tokens([token])
        if core.token_to_id(token.content) != i:
            raise ValueError(
                f"{folder}: tokenizer_config.json has {token.content!r} as {i}, the vocabulary as"
                f" {core.token_to_id(token.content)}; take both files from one tokenizer"
            )
    path = folder / "tokenizer_config.json"
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, Mapping) else extra
    if not isinstance(extra, list):
        raise ValueError(f"{path}: extra_special_tokens is {extra!r}; write a list of tokens there")
    named = [_text_of(path, "extra_special_tokens", token) for token in extra]
    add_special(core, [*special.values(), *named])


def _ids(folder: Path, name: str) -> tuple[int, ...]:
    """A token id, or a list of them, of generation_config.json or else of config.json."""
    for path in (folder / "generation_config.json", folder / "config.json"):
        value = _read_json(path).get(name)
        if value is not None:
            return _checked_ids(path, name, value)
    return ()


def _checked_ids(path: Path, name: str, value: Any) -> tuple[int, ...]:
    ids = tuple(value) if isinstance(value, list) else (value,)
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ValueError(f"{path}: {name} is {value!r}; write a token id or a list of them there")
    return tuple(i for i in ids if i >= 0)


def _eos_saved(folder: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """The stop ids that `Tokenizer.save` keeps in tokenizer_config.json."""
    ids = config.get("stop_token_ids")
    return (
        () if ids is None else _checked_ids(folder / "tokenizer_config.json", "stop_token_ids", ids)
    )


def _fill_roles(folder: Path, core: tokenizers.Tokenizer, special: dict[str, str]) -> None:
    """Takes BOS, EOS and PAD from the model's config where the tokenizer's files lack them."""
    for role in ("bos_token", "eos_token", "pad_token"):
        ids = () if role in special else _ids(folder, f"{role}_id")
        text = core.id_to_token(ids[0]) if ids else None
        if text is not None:
            special[role] = text


def _read_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else the entry of tokenizer_config.json, else chat_template.json."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    path, value = folder / "tokenizer_config.json", config.get("chat_template")
    if value is None:
        path = folder / "chat_template.json"
        value = _read_json(path).get("chat_template")
    if isinstance(value, list):  # several, by name
        named = {row.get("name"): row.get("template") for row in value if isinstance(row, Mapping)}
        value = named.get("default", named)
    if value is None or isinstance(value, str):
        return value
    raise ValueError(
        f"{path}: no chat template named default; write the one to use into chat_template.jinja"
    )
