"""How is the frozen transformer loaded? From bf16 safetensors to int8 blocks, one tensor in host memory at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from diffusers import Kandinsky5Transformer3DModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from k5cache.shared.checkpoint import read_config
from k5cache.shared.disk_errors import named
from k5cache.shared.errors import ModelError
from k5cache.shared.part_files import weight_files
from k5train.base.linear import Float32Linear, Int8Linear

# What becomes int8: 5.4 of the 6.0 billion parameters. The embeddings, the output head and the modulations do not,
# because of the velocity's error for each gigabyte that int8 saves (``pipelines.measure.gradients.error_by_part`` on 6
# blocks of full width, random weights, float32): attention 2.0 %, feed-forward 1.8 %, text blocks 0.9 %; modulations
# 6 %, embeddings 83 %, head 5,000 %.
INT8_MODULES = re.compile(
    r"(text|visual)_transformer_blocks\.\d+\.((self|cross)_attention\.(to_query|to_key|to_value|out_layer)"
    r"|feed_forward\.(in_layer|out_layer))"
)
# Mapped pages count as resident until they are unmapped. Reopened after so many bytes, a file of 1.93 GiB adds 0.12 GiB
# of resident memory and not 1.92.
_BYTES_MAPPED_AT_ONCE = 100 * 2**20
_DOWNLOAD = "Download the model again, or give another folder with --model DIR"
Precision = Literal["int8-quanto", "int8-dynamic", "no_change"]
"""How the frozen weights are stored and multiplied. Both int8 precisions store the same weights."""


def load_transformer(
    folder: Path,
    precision: Precision,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Kandinsky5Transformer3DModel:
    """The frozen transformer, in evaluation mode, on ``device``.

    ``no_change`` computes bit for bit what ``from_pretrained(folder, torch_dtype=dtype)`` computes. The others have
    exactly the int8 weights and scales of ``quanto.quantize(weights=qint8)`` and ``freeze`` on ``INT8_MODULES``. In all
    of them, what diffusers keeps in float32 is computed in float32, from weights in the checkpoint's dtype.

    Args:
        folder: a checkpoint in the diffusers layout; ``folder/transformer`` is read.
        dtype: dtype of activations, scales and unquantised weights.

    Raises:
        ModelError: the architecture is another, or tensors are missing, unexpected, misshapen or unreadable.
    """
    transformer = empty_transformer(folder)
    for name, tensor in converted(folder, transformer, precision, dtype, device):
        place(transformer, name, tensor)
    return finish(transformer, device)


def converted(
    folder: Path,
    transformer: Kandinsky5Transformer3DModel,
    precision: Precision,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the frozen transformer under its name, on ``device``, one at a time.

    An int8 weight is followed by its ``scale``.

    Args:
        transformer: from ``empty_transformer``, with nothing placed in it yet.

    Raises:
        ModelError: tensors are missing, unexpected, misshapen or unreadable.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in transformer.state_dict().items()}
    loaded: set[str] = set()
    for file in weight_files(folder, "transformer"):
        for name, tensor in _stream(file, expected):
            loaded.add(name)
            module_name, _, leaf = name.rpartition(".")
            tensor = tensor.to(device, copy=True)  # a copy, because the file is unmapped
            if _is_float32(transformer, module_name):
                # Not converted in a 16-bit run: float32 would be the same numbers in twice the memory.
                yield name, tensor if tensor.dtype.itemsize == 2 and dtype.itemsize == 2 else tensor.float()
            elif precision != "no_change" and INT8_MODULES.fullmatch(module_name) and leaf == "weight":
                weight, scale = quantize_int8(tensor.to(dtype))
                yield name, weight
                yield f"{module_name}.scale", scale
            else:
                yield name, tensor.to(dtype)
    if missing := sorted(set(expected) - loaded):
        raise ModelError(f"{folder / 'transformer'} lacks {_some(missing)}", _DOWNLOAD)


def place(transformer: Kandinsky5Transformer3DModel, name: str, tensor: Tensor) -> None:
    """Put one of the tensors of ``converted`` into the transformer."""
    module_name, _, leaf = name.rpartition(".")
    module: Any = transformer.get_submodule(module_name)
    if leaf == "scale":
        module.scale = tensor
    elif tensor.dtype == torch.int8:
        scale = torch.empty(tensor.shape[0], 1, device=tensor.device)  # the next tensor is the real one
        replace_linear(transformer, module_name, Int8Linear(tensor, scale), bias=module.bias)
    elif leaf == "weight" and type(module) is nn.Linear and _is_float32(transformer, module_name):
        replace_linear(transformer, module_name, Float32Linear(tensor), bias=module.bias)
    else:
        module.register_parameter(leaf, _frozen(tensor))


def finish(transformer: Kandinsky5Transformer3DModel, device: torch.device | str) -> Kandinsky5Transformer3DModel:
    """The last step of loading, once every tensor is placed: freeze, set evaluation mode, move tables to ``device``."""
    _move_tables(transformer, torch.device(device))
    return transformer.requires_grad_(False).eval()


def _is_float32(transformer: Kandinsky5Transformer3DModel, module_name: str) -> bool:
    """Whether diffusers keeps a module in float32."""
    return not set(transformer._keep_in_fp32_modules).isdisjoint(module_name.split("."))


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """quanto's ``qint8`` of one weight, the same as from ``quantize`` and ``freeze``.

    Args:
        weight: ``[out, in]`` in the dtype that the scale gets.

    Returns:
        ``[out, in]`` int8 and ``[out, 1]`` scale, on the weight's device.
    """
    # The import takes 0.4 s, and only the first use of a checkpoint needs it.
    from optimum.quanto import AbsmaxOptimizer, qint8, quantize_weight

    scale = AbsmaxOptimizer()(weight, qtype=qint8, axis=0)
    quantized = quantize_weight(weight, qtype=qint8, axis=0, scale=scale, optimized=False)
    return quantized._data, quantized._scale.reshape(-1, 1)


def empty_transformer(folder: Path) -> Kandinsky5Transformer3DModel:
    """The modules with parameters on the meta device. RoPE and frequency tables are real, as diffusers makes them."""
    config = read_config(folder, "transformer")
    path = folder / "transformer" / "config.json"
    class_name = config.get("_class_name")
    if class_name != Kandinsky5Transformer3DModel.__name__:
        raise ModelError(
            f"{path} describes a {class_name}, not a {Kandinsky5Transformer3DModel.__name__}",
            "Give a Kandinsky 5 Image checkpoint in the diffusers layout with --model DIR",
        )
    if config.get("attention_type", "regular") != "regular":
        raise ModelError(
            f"{path} has attention_type = {config['attention_type']!r}: a video model",
            "Give a Kandinsky 5 Image checkpoint (T2I-Lite or I2I-Lite) with --model DIR",
        )
    try:
        with init_empty_weights():
            return Kandinsky5Transformer3DModel.from_config(config)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ModelError(f"{path} cannot be built: {error}", _DOWNLOAD) from error


def _stream(file: Path, expected: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of everything in one file, checked against ``expected`` first. A tensor lives until the next."""
    try:
        with named(file), safe_open(file, framework="pt") as opened:
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in list(opened.keys())}
        if unexpected := sorted(set(shapes) - set(expected)):
            raise ModelError(f"{file} has tensors that this model does not know: {_some(unexpected)}", _DOWNLOAD)
        if wrong := [n for n in sorted(shapes) if shapes[n] != expected[n]]:
            text = _some([f"{n} is {list(shapes[n])}, expected {list(expected[n])}" for n in wrong])
            raise ModelError(f"{file} does not fit its config.json: {text}", _DOWNLOAD)
        names = iter(sorted(shapes))
        name = next(names, None)
        while name is not None:
            num_bytes = 0
            with named(file), safe_open(file, framework="pt") as opened:
                while name is not None and num_bytes < _BYTES_MAPPED_AT_ONCE:
                    tensor = opened.get_tensor(name)
                    num_bytes += tensor.nbytes
                    yield name, tensor
                    name = next(names, None)
    except SafetensorError as error:
        raise ModelError(f"{file} cannot be read: {error}", _DOWNLOAD) from error


def replace_linear(root: nn.Module, name: str, new: nn.Module, bias: nn.Parameter | None) -> None:
    """Put ``new`` at ``name``, with the old module's bias, which may not be loaded yet."""
    new.register_parameter("bias", bias)
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, new)


def _move_tables(transformer: nn.Module, device: torch.device) -> None:
    """Move what is not in the checkpoint: RoPE buffers, and the frequencies, which are a plain attribute.

    Weights stay where they were placed: the streamed ones are in host memory.
    """
    for name, module in transformer.named_modules():
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        assert not any(t.is_meta for _, t in tensors), f"{name} was not loaded"
        if isinstance(module, Int8Linear):
            continue
        for key, table in module.named_buffers(recurse=False):
            module._buffers[key] = table.to(device)
        attributes: dict[str, Any] = vars(module)
        for key, value in attributes.items():
            if isinstance(value, Tensor):
                attributes[key] = value.to(device)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _some(items: list[str], most: int = 4) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
