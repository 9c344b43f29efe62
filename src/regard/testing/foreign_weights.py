"""Weights from files of other runtimes, under the names that transformers gives them."""

from __future__ import annotations

import importlib
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

CTRANSLATE2_TYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}


def require(module: str, extra: str) -> Any:
    """An optional module, or an ImportError that says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} is needed and cannot be imported ({error}): pip install 'regard[{extra}]'"
        ) from error


def read_ctranslate2(path: Path) -> dict[str, Tensor]:
    """All variables of a CTranslate2 model file (binary version 6).

    Layout, little endian: version u32; specification (string) and its revision u32; the number of
    variables u32, and for each its name (string), rank u8, sizes u32, type u8, bytes u32, data;
    then the number of aliases u32 and pairs of strings. A string is its length with the final
    zero u16, and the bytes.

    Raises:
        ValueError: not such a file, or cut short.
    """
    content = path.read_bytes()
    place = 0

    def number(code: str) -> int:
        nonlocal place
        (value,) = struct.unpack_from(f"<{code}", content, place)
        place += struct.calcsize(code)
        return value

    def string() -> str:
        nonlocal place
        length = number("H")
        text = content[place : place + length].rstrip(b"\0").decode()
        place += length
        return text

    found: dict[str, Tensor] = {}
    try:
        version = number("I")
        if version != 6:
            raise ValueError(f"version {version}, and 6 is read")
        string()  # the specification
        number("I")  # and its revision
        for _ in range(number("I")):
            name = string()
            sizes = [number("I") for _ in range(number("B"))]
            code, size = number("B"), number("I")
            if place + size > len(content):
                raise ValueError("it ends within a variable")
            kind = np.dtype(CTRANSLATE2_TYPES[code])
            array = np.frombuffer(content, kind, size // kind.itemsize, offset=place)
            found[name] = torch.from_numpy(array.reshape(sizes).copy())
            place += size
        for _ in range(number("I")):
            alias, name = string(), string()
            found[alias] = found[name]
    except (struct.error, KeyError, ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"read_ctranslate2: {path.name} cannot be read: {error}") from error
    return found


def whisper_from_ctranslate2(path: Path, *, layers: int) -> dict[str, Tensor]:
    """The float32 state of transformers' Whisper; `proj_out` is left to be tied."""
    found = {name: value.float() for name, value in read_ctranslate2(path).items()}
    state: dict[str, Tensor] = {}

    def both(target: str, source: str) -> None:
        state[f"{target}.weight"] = found[f"{source}/weight"]
        state[f"{target}.bias"] = found[f"{source}/bias"]

    def norm(target: str, source: str) -> None:
        state[f"{target}.weight"] = found[f"{source}/gamma"]
        state[f"{target}.bias"] = found[f"{source}/beta"]

    def split(target: str, source: str, names: tuple[str, ...]) -> None:
        for part in ("weight", "bias"):
            pieces = found[f"{source}/{part}"].chunk(len(names))
            for name, piece in zip(names, pieces, strict=True):
                # Whisper's keys have no bias; the file holds zeros for it.
                if (name, part) != ("k_proj", "bias"):
                    state[f"{target}.{name}.{part}"] = piece.clone()

    for side in ("encoder", "decoder"):
        model = f"model.{side}"
        state[f"{model}.embed_positions.weight"] = found[f"{side}/position_encodings/encodings"]
        norm(f"{model}.layer_norm", f"{side}/layer_norm")
        for layer in range(layers):
            target, source = f"{model}.layers.{layer}", f"{side}/layer_{layer}"
            own = f"{source}/self_attention"
            norm(f"{target}.self_attn_layer_norm", f"{own}/layer_norm")
            split(f"{target}.self_attn", f"{own}/linear_0", ("q_proj", "k_proj", "v_proj"))
            both(f"{target}.self_attn.out_proj", f"{own}/linear_1")
            norm(f"{target}.final_layer_norm", f"{source}/ffn/layer_norm")
            both(f"{target}.fc1", f"{source}/ffn/linear_0")
            both(f"{target}.fc2", f"{source}/ffn/linear_1")
            if side == "decoder":
                cross = f"{source}/attention"
                norm(f"{target}.encoder_attn_layer_norm", f"{cross}/layer_norm")
                both(f"{target}.encoder_attn.q_proj", f"{cross}/linear_0")
                split(f"{target}.encoder_attn", f"{cross}/linear_1", ("k_proj", "v_proj"))
                both(f"{target}.encoder_attn.out_proj", f"{cross}/linear_2")
    both("model.encoder.conv1", "encoder/conv1")
    both("model.encoder.conv2", "encoder/conv2")
    state["model.decoder.embed_tokens.weight"] = found["decoder/embeddings/weight"]
    return state


def dinov2_from_onnx(path: Path) -> dict[str, Tensor]:
    """The state of transformers' Dinov2Model from an exported graph that names its places.

    Biases, norms and the patch embedding keep their names in the graph. The matrices of linear
    layers are nameless, [in, out]; the node that multiplies by one tells which it is. The table
    of positions is in two pieces, for the class token and for the 37 × 37 patches.
    """
    onnx = require("onnx", "dev")
    graph = onnx.load(str(path)).graph
    values = {
        item.name: torch.from_numpy(onnx.numpy_helper.to_array(item).copy())
        for item in graph.initializer
    }
    prefix, state = "backbone.", {}
    positions: dict[int, Tensor] = {}
    for name, value in values.items():
        if name.startswith(prefix):
            state[_dinov2_name(name.removeprefix(prefix))] = value
        elif value.dim() == 3 and value.shape[0] == 1:
            positions[value.shape[1]] = value
    for node in graph.node:
        if node.op_type == "MatMul" and len(node.input) == 2 and node.input[1] in values:
            place = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            name = _dinov2_name(place.removeprefix(prefix))
            state[f"{name}.weight"] = values[node.input[1]].T.contiguous()
    if sorted(positions) != [1, 1369]:
        raise ValueError(f"dinov2_from_onnx: {path.name} holds no table of 1 + 1369 positions")
    state["embeddings.position_embeddings"] = torch.cat([positions[1], positions[1369]], dim=1)
    return state


def _dinov2_name(name: str) -> str:
    for letter, word in (("q", "query"), ("k", "key"), ("v", "value")):
        name = name.replace(f"attention.attention.{word}", f"attention.{letter}_proj")
    return name.replace("attention.output.dense", "attention.o_proj")
