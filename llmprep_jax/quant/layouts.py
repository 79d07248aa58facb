"""How packed folders store a linear layer: which tensors, of which shapes, and what they stand for.

A layout is made from `quantization_config` of config.json and answers for one layer at a time: what
its tensors must be (`expected`), its format (`kind`), and the weight itself (`read`). Letters: O
outputs, I inputs, G groups. Which layers are packed is seen from their tensors and not from the
config's lists, so a layer that was left alone needs no entry.
"""

import abc
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llmprep_jax.quant import bitsandbytes_format, fp8, int4_formats, int8
from llmprep_jax.quant.int4 import Int4
from llmprep_jax.quant.nf4 import CODES, NESTED_BLOCK
from llmprep_jax.quant.packed import Packed
from llmprep_jax.weights.safetensors import quoted

Parts = Mapping[str, np.ndarray]  # a layer's tensors by their names within it, e.g. "qweight"
Expected = dict[str, tuple[tuple[str, ...], tuple[int, ...] | int]]  # dtypes, and shape or size
FLOATS = ("float16", "bfloat16", "float32")
_WORDS, _INDICES = ("int32", "uint32"), ("int32", "int64")
_STATE = "weight.quant_state.bitsandbytes__"
REMEDY = "load the original weights"


class Layout(abc.ABC):
    """One way to store packed linear layers.

    Attributes:
      parts: names of a packed layer's tensors; the beginning of one if it ends in "__".
      optional: those of them that may be absent.
    """

    parts: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @abc.abstractmethod
    def is_packed(self, dtypes: Mapping[str, str]) -> bool:
        """Whether a layer with such tensors is packed, whole or not."""

    @abc.abstractmethod
    def kind(self, names: tuple[str, ...]) -> str:
        """The format of a layer with tensors of these names, one of `kinds.KINDS`."""

    @abc.abstractmethod
    def expected(self, parts: Parts, shape: tuple[int, int]) -> Expected:
        """What a layer [O, I] is stored as; a tensor of `parts` may describe it.

        A size of -1 is any, and no dtype is any too, with the size in bytes.

        Raises:
          ValueError: it describes another one, or nothing.
        """

    def shape(self, parts: Parts) -> tuple[int, ...]:
        """(O, I) of a layer, from its tensors."""
        return tuple(parts["weight"].shape)

    @abc.abstractmethod
    def read(self, parts: Parts) -> Packed:
        """The weight.

        Raises:
          ValueError: the tensors' values make no sense.
        """


class BitsAndBytes4(Layout):
    """NF4 and FP4 of bitsandbytes: codes, magnitudes, code books and a JSON text."""

    parts = (
        *("weight", "weight.absmax", "weight.quant_map"),
        *("weight.nested_absmax", "weight.nested_quant_map", _STATE),
    )

    def is_packed(self, dtypes: Mapping[str, str]) -> bool:
        return len(dtypes) > 1 or dtypes.get("weight") == "uint8"

    def kind(self, names: tuple[str, ...]) -> str:
        kinds = [name.removeprefix(_STATE) for name in names if name.startswith(_STATE)]
        return kinds[0] if kinds and kinds[0] in CODES else "nf4"

    def expected(self, parts: Parts, shape: tuple[int, int]) -> Expected:
        name = next((name for name in parts if name.startswith(_STATE)), None)
        if name is None:  # and with it all sizes
            due = {part: ((), -1) for part in (*self.parts[:3], *parts)}
            return due | {f"{_STATE}nf4": (("uint8",), -1)}
        state = bitsandbytes_format.read_state(parts[name], name)
        if tuple(state["shape"]) != shape:
            raise ValueError(f"{name} describes a matrix {state['shape']}, expected {list(shape)}")
        size = shape[0] * shape[1]
        blocks = -(-size // state["blocksize"])
        nested = "nested_offset" in state
        wanted: Expected = {
            name: (("uint8",), -1),
            # what holds the codes may be any dtype (bnb_4bit_quant_storage); bytes are counted
            "weight": ((), -(-size // 2)),
            "weight.absmax": (("uint8" if nested else "float32",), blocks),
            "weight.quant_map": (("float32",), 16),
        }
        if nested:
            wanted["weight.nested_absmax"] = (("float32",), -(-blocks // NESTED_BLOCK))
            wanted["weight.nested_quant_map"] = (("float32",), 256)
        return wanted

    def shape(self, parts: Parts) -> tuple[int, ...]:
        name = next(name for name in parts if name.startswith(_STATE))
        return tuple(bitsandbytes_format.read_state(parts[name], name)["shape"])

    def read(self, parts: Parts) -> Packed:
        codes = np.ascontiguousarray(parts["weight"]).reshape(-1).view(np.uint8)
        return bitsandbytes_format.from_tensors({**parts, "weight": codes}, "weight")


class BitsAndBytes8(Layout):
    """LLM.int8() of bitsandbytes: int8 codes, and each row's largest magnitude."""

    parts = ("weight", "SCB", "weight_format")
    optional = ("weight_format",)

    def is_packed(self, dtypes: Mapping[str, str]) -> bool:
        return len(dtypes) > 1 or dtypes.get("weight") == "int8"

    def kind(self, names: tuple[str, ...]) -> str:
        return "int8"

    def expected(self, parts: Parts, shape: tuple[int, int]) -> Expected:
        wanted: Expected = {"weight": (("int8",), shape), "SCB": (FLOATS, (shape[0],))}
        return wanted | {"weight_format": (("uint8",), 1)}

    def read(self, parts: Parts) -> Packed:
        order = parts.get("weight_format")
        if order is not None and order.reshape(-1)[0] != 0:
            raise ValueError(
                f"weight_format is {order.reshape(-1)[0]}, an order of rows for one GPU; save it"
                " again with bitsandbytes 0.43 or newer"
            )
        scale = np.asarray(parts["SCB"], np.float32) / np.float32(int8.LARGEST)
        return int8.Int8(np.asarray(parts["weight"]), scale, tuple(parts["weight"].shape))


class Words(Layout):
    """Four bits in words of 32: scales of groups, zeros beside them."""

    group: int

    def is_packed(self, dtypes: Mapping[str, str]) -> bool:
        return bool(dtypes)

    def kind(self, names: tuple[str, ...]) -> str:
        return "int4"

    def group_of(self, inputs: int) -> int:
        """How many inputs a group has."""
        return inputs if self.group == -1 else self.group

    def expected(self, parts: Parts, shape: tuple[int, int]) -> Expected:
        outs, inputs = shape
        groups = -(-inputs // self.group_of(inputs))
        return {
            "qweight": (_WORDS, self.words(outs, inputs)),
            "qzeros": (_WORDS, (groups, -(-outs // 8))),
            "scales": (FLOATS, (groups, outs)),
        }

    @abc.abstractmethod
    def words(self, outs: int, inputs: int) -> tuple[int, int]:
        """Shape of "qweight", of [O, I]."""


@dataclasses.dataclass(frozen=True)
class Gptq(Words):
    """Four bits of GPTQ. `group`: inputs a group, -1 for all; `v2`: zeros as they are."""

    group: int
    desc_act: bool
    v2: bool
    parts = ("qweight", "qzeros", "scales", "g_idx")

    @property
    def optional(self) -> tuple[str, ...]:
        return () if self.desc_act else ("g_idx",)

    def words(self, outs: int, inputs: int) -> tuple[int, int]:
        return -(-inputs // 8), outs

    def expected(self, parts: Parts, shape: tuple[int, int]) -> Expected:
        return super().expected(parts, shape) | {"g_idx": (_INDICES, (shape[1],))}

    def shape(self, parts: Parts) -> tuple[int, ...]:
        return parts["qweight"].shape[-1], 8 * parts["qweight"].shape[0]

    def read(self, parts: Parts) -> Packed:
        inputs = self.shape(parts)[1]
        group = self.group_of(inputs)
        tensors = [parts[name] for name in ("qweight", "qzeros", "scales")]
        packed = int4_formats.from_gptq(*tensors, parts.get("g_idx"), v2=self.v2, group=group)
        if self.desc_act and packed.group_of is None:  # the other layers of a stack may have it
            in_order = (np.arange(inputs) // group).astype(np.int32)
            packed = dataclasses.replace(packed, group_of=in_order)
        return packed


@dataclasses.dataclass(frozen=True)
class Awq(Words):
    """Four bits of AWQ, in the order of its version "gemm"."""

    group: int
    parts = ("qweight", "qzeros", "scales")

    def words(self, outs: int, inputs: int) -> tuple[int, int]:
        return inputs, -(-outs // 8)

    def shape(self, parts: Parts) -> tuple[int, ...]:
        return 8 * parts["qweight"].shape[-1], parts["qweight"].shape[0]

    def read(self, parts: Parts) -> Int4:
        group = self.group_of(self.shape(parts)[1])
        return int4_formats.from_awq(*(parts[name] for name in self.parts), group=group)


@dataclasses.dataclass(frozen=True)
class BlockFp8(Layout):
    """float8_e4m3fn with a scale a block, as DeepSeek-V3 is released."""

    block: int
    parts = ("weight", "weight_scale_inv")

    def is_packed(self, dtypes: Mapping[str, str]) -> bool:
        return len(dtypes) > 1 or dtypes.get("weight") == "float8_e4m3fn"

    def kind(self, names: tuple[str, ...]) -> str:
        return "fp8"

    def expected(self, parts: Parts, shape: tuple[int, int]) -> Expected:
        blocks = tuple(-(-size // self.block) for size in shape)
        return {
            "weight": (("float8_e4m3fn",), shape),
            "weight_scale_inv": ((*FLOATS, "float8_e8m0fnu"), blocks),
        }

    def read(self, parts: Parts) -> Packed:
        return fp8.from_tensors(parts["weight"], parts["weight_scale_inv"], self.block)


def layout_of(config: Mapping[str, Any], path: Path) -> Layout | None:
    """The layout that a config.json describes; None: the weights are not packed.

    Raises:
      ValueError: it is none that is read here.
    """
    fields = config.get("quantization_config")
    if not fields:
        return None
    if not isinstance(fields, Mapping):
        raise ValueError(f"{path}: quantization_config is {quoted(fields)}; {REMEDY}")
    four, eight = (bool(fields.get(f"load_in_{bits}bit")) for bits in (4, 8))
    # old configs of bitsandbytes do not name the method
    method = str(fields.get("quant_method") or ("bitsandbytes" if four or eight else None))
    makers = {
        "bitsandbytes": lambda fields: BitsAndBytes8() if eight else BitsAndBytes4(),
        "gptq": _gptq,
        "awq": _awq,
        "fp8": _fp8,
    }
    if method not in makers:
        raise ValueError(
            f"{path}: the weights are packed by {quoted(method)}; {', '.join(makers)} are read;"
            f" {REMEDY}"
        )
    try:
        return makers[method](fields)
    except ValueError as error:
        raise ValueError(f"{path}: quantization_config of {method}: {error}; {REMEDY}") from None


def _gptq(fields: Mapping[str, Any]) -> Gptq:
    _only(fields, ("bits",), (4,))
    version = _only(fields, ("checkpoint_format", "format"), ("gptq", "gptq_v2"))
    group = _group(fields, ("group_size",))
    return Gptq(group, bool(fields.get("desc_act")), version == "gptq_v2")


def _awq(fields: Mapping[str, Any]) -> Awq:
    _only(fields, ("bits", "w_bit"), (4,))
    _only(fields, ("version", "format"), ("gemm",))
    return Awq(_group(fields, ("group_size", "q_group_size")))


def _fp8(fields: Mapping[str, Any]) -> BlockFp8:
    _only(fields, ("fmt",), ("e4m3",))
    block = fields.get("weight_block_size")
    square = isinstance(block, list | tuple) and len(block) == 2 and block[0] == block[1]
    if not square or type(block[0]) is not int or block[0] < 1:
        raise ValueError(f"weight_block_size is {quoted(block)}; square blocks are read")
    return BlockFp8(block[0])


def _only(fields: Mapping[str, Any], names: tuple[str, ...], allowed: tuple) -> Any:
    """The first of some fields, the first allowed value if there is none; refuses other values."""
    value = next((fields[name] for name in names if fields.get(name) is not None), allowed[0])
    value = value.lower() if isinstance(value, str) else value
    if value not in allowed:
        raise ValueError(f"{names[0]} is {quoted(value)}; {_or(allowed)} is read")
    return value


def _or(values: tuple) -> str:
    return " or ".join(map(str, values))


def _group(fields: Mapping[str, Any], names: tuple[str, ...]) -> int:
    value = next((fields[name] for name in names if name in fields), 128)
    if type(value) is not int or not (value == -1 or value > 0):
        raise ValueError(f"{names[0]} is {quoted(value)}; it must be -1 or a positive number")
    return value
