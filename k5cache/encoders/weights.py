"""Where are the weights of one model inside a file that holds several? Mapped tensors, by the model's own names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from k5cache.encoders.hostio import DTYPES
from k5cache.shared.disk_errors import named
from k5cache.shared.errors import ModelError
from k5cache.shared.part_files import StoredTensor, read_header, weight_files

if TYPE_CHECKING:
    import torch


class Weights:
    """One model in ``folder/text_encoder``: mapped, addressed by its own names.

    Args:
        prefixes: what may stand before its names in the file.
        mark: the name of a tensor that it always has.
        what: the model, for a message: ``text layers``.

    Raises:
        ModelError: the files hold no such model.
    """

    def __init__(self, folder: Path, prefixes: tuple[str, ...], mark: str, what: str) -> None:
        from safetensors import SafetensorError, safe_open

        self._files: dict[str, Any] = {}
        self._where = folder / "text_encoder"
        self._paths = weight_files(folder, "text_encoder")
        for path in self._paths:
            try:
                with named(path):
                    opened: Any = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ModelError(f"{path} is damaged: {error}", "Download the model again") from error
            self._files.update(dict.fromkeys(opened.keys(), opened))
        found = [prefix for prefix in prefixes if f"{prefix}{mark}" in self._files]
        if not found:
            raise ModelError(f"{self._where} lacks {mark}: no {what}", "Give a whole Qwen2.5-VL text encoder")
        self._prefix = found[0]
        self._stored: dict[str, StoredTensor] = {}

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Check before anything is read that every tensor is there, has its shape and is not quantised.

        Raises:
            ModelError: a tensor is missing, has another shape or is not floating point; the first three are named.
        """
        absent = [self._prefix + name for name in shapes if self._prefix + name not in self._files]
        if absent:
            raise ModelError(f"{self._where} lacks {_listed(absent)}", "Download the model again")
        stored = {name: tuple(self._slice(name).get_shape()) for name in shapes}
        wrong = [f"{self._prefix + n} {stored[n]} instead of {shapes[n]}" for n in shapes if stored[n] != shapes[n]]
        if wrong:
            raise ModelError(
                f"{self._where} does not match its config.json: {_listed(wrong)}", "Download the model again"
            )

        dtypes = {name: str(self._slice(name).get_dtype()) for name in shapes}
        # 8-bit values mean nothing without the scales that another library stores beside them.
        odd = [f"{self._prefix + name} as {dtype}" for name, dtype in dtypes.items() if dtype not in DTYPES]
        if odd:
            raise ModelError(
                f"{self._where} holds {_listed(odd)}",
                'Use a checkpoint in bfloat16; cache.text_encoder_1_precision = "int8" quantises it',
            )

    def tensor(self, name: str) -> torch.Tensor:
        """One mapped tensor: its bytes are read when they are used."""
        return cast("torch.Tensor", self._files[self._prefix + name].get_tensor(self._prefix + name))

    def stored(self, name: str) -> StoredTensor:
        """Where one tensor's bytes are. It carries the name that it has in the file."""
        if not self._stored:
            for path in self._paths:
                self._stored.update({tensor.name: tensor for tensor in read_header(path)})
        return self._stored[self._prefix + name]

    def own_name(self, stored_name: str) -> str:
        """The model's name for a tensor of the file."""
        return stored_name.removeprefix(self._prefix)

    def _slice(self, name: str) -> Any:
        return self._files[self._prefix + name].get_slice(self._prefix + name)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
