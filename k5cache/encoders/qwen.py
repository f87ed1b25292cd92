"""Qwen2.5-VL as a text encoder: only the layers a caption passes through, and the hidden states the pipeline keeps.

The lm_head and the vision tower (2.5 of 16.6 GB) are never read. Weights are read tensor by tensor from mapped
safetensors files, so host memory never holds a copy of the model.
"""

from __future__ import annotations

import copy
import functools
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from k5cache.encoders.hostio import fetched, read_ahead
from k5cache.encoders.layers import Pack, Positions, attend_side_by_side, attention_kernels, make_packs, run_layer
from k5cache.encoders.pipeline import pipeline_template, pipeline_token_ids
from k5cache.encoders.weights import Weights
from k5cache.shared.checkpoint import read_config
from k5cache.shared.errors import ModelError
from k5cache.shared.handed_over import handed_over
from k5cache.shared.kind import Kind

if TYPE_CHECKING:
    import torch

# Where the text layers live in a file: published Qwen2.5-VL, saved by newer versions, bare base or text models.
_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.", "")


@dataclass(frozen=True)
class Place:
    """Where a picture is among the tokens of its instruction."""

    start: int
    """Of its first token."""
    count: int
    """Its tokens."""
    grid: tuple[int, int, int]
    """Its patches: frames (1), rows, columns."""


@dataclass(frozen=True)
class Tokens:
    """One cleaned caption in its template, as the pipeline tokenises it alone."""

    ids: list[int]
    """Template included, no padding."""
    n_tokens: int
    """Rows of ``prompt_embeds``: ids after the pipeline's crop."""
    truncated: str
    """The end of the caption that was cut off; "" if all of it is encoded."""
    place: Place | None = None
    """Of the picture. None if there is none: only image-to-image has one."""


@dataclass(frozen=True)
class Qwen:
    """The text layers, loaded for ``encode_prompt_embeds`` or left in their files for ``streaming``."""

    model: Any
    """``Qwen2_5_VLTextModel`` in evaluation mode, without gradients. Its norm and rotary table are on the device, and
    its layers too unless they are streamed. Its embeddings are on the meta device."""
    encode_start_idx: int
    """How many hidden states are cropped off the front: those of the template."""
    weights: Weights
    embeddings: torch.Tensor
    """``[vocabulary, 3584]`` in the file's dtype, mapped: a caption's rows are read when it is encoded."""
    dtype: torch.dtype
    """Of the arithmetic."""
    rope: Callable[[Tokens], torch.Tensor]
    """Positions ``[3, 1, tokens]`` of an instruction with a picture, from the library's own ``get_rope_index``."""
    is_int8: bool = False
    """Whether the layers' matrices are in 8 bits (quanto's ``qint8``)."""

    @property
    def device(self) -> torch.device:
        """Where the layers compute."""
        return cast("torch.device", self.model.norm.weight.device)

    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        """Embeddings ``[1, tokens, 3584]`` on the device. The copy is queued and not waited for."""
        import torch

        is_cuda = self.device.type == "cuda"
        rows = torch.empty(len(ids), self.embeddings.shape[1], dtype=self.embeddings.dtype, pin_memory=is_cuda)
        torch.index_select(self.embeddings, 0, torch.tensor(ids), out=rows)
        return rows.to(self.device, non_blocking=True).to(self.dtype)[None]


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in ``folder/tokenizer``, without the processor around it, which needs torchvision.

    Raises:
        ModelError: it is missing or cannot be read.
    """
    from transformers import AutoTokenizer

    with handed_over(folder, "tokenizer") as only:
        tokenizer = AutoTokenizer.from_pretrained(only, local_files_only=True, trust_remote_code=False)
    # The pipeline passes no attention mask and crops from the left: left padding would move the crop.
    tokenizer.padding_side = "right"
    return tokenizer


def tokenize(tokenizer: Any, caption: str, max_sequence_length: int) -> Tokens:
    """Token ids of one cleaned caption, cut where the pipeline cuts.

    Args:
        caption: after ``clean``.
        max_sequence_length: tokens kept after the crop, the template's closing tag among them.
    """
    template = pipeline_template()
    ids = pipeline_token_ids(tokenizer, caption, max_sequence_length)
    uncut_ids = tokenizer(text=template.text.format(caption))["input_ids"]
    truncated = "" if ids == uncut_ids else cut_off(tokenizer, template.text, caption, ids)
    return Tokens(ids=ids, n_tokens=len(ids) - template.encode_start_idx, truncated=truncated)


def cut_off(tokenizer: Any, template: str, caption: str, ids: list[int]) -> str:
    """The end of a caption that ``ids``, its tokens in the template, lack."""
    # The tokenizer composes characters (NFC); a character cut in half decodes to another, so it counts as lost.
    caption = unicodedata.normalize("NFC", caption)
    encoded = tokenizer.decode(ids).removeprefix(template.partition("{}")[0])
    return caption[_num_equal(encoded, caption) :]


def load_qwen(
    folder: Path,
    device: str | torch.device,
    dtype: torch.dtype,
    *,
    streamed: bool = False,
    int8: bool = False,
    kind: Kind = "t2i",
) -> Qwen:
    """Load the text layers of ``folder/text_encoder``.

    On the CPU in the file's own dtype the weights stay mapped. For a GPU, a layer is read while the one before it is
    copied.

    Args:
        dtype: of weights and arithmetic. Rotary frequencies stay float32, as ``from_pretrained`` keeps them.
        streamed: leave the layers in their files, for ``streaming.stream_prompt_embeds``.
        int8: round each layer's matrices to 8 bits as soon as it is read.
        kind: which pipeline's template is cropped off.

    Raises:
        ModelError: a tensor is missing, has another shape, or the folder holds another model.
    """
    import torch

    device = torch.device(device)
    model = empty_text_model(folder, dtype)
    weights = Weights(folder, _PREFIXES, "embed_tokens.weight", "text layers")
    weights.check({name: tuple(value.shape) for name, value in model.state_dict().items()})
    model.norm.load_state_dict(
        {"weight": weights.tensor("norm.weight").to(device=device, dtype=dtype)}, strict=True, assign=True
    )
    model.rotary_emb = type(model.rotary_emb)(model.config).to(device)  # made on the CPU, then moved: the same bits
    attend_side_by_side(model.config)
    embeddings = weights.tensor("embed_tokens.weight")
    start = pipeline_template(kind).encode_start_idx
    qwen = Qwen(model, start, weights, embeddings, dtype, functools.partial(_rope_index, folder), int8)
    if not streamed:
        for i, layer in enumerate(read_layers(qwen, reuse=False)):
            model.layers[i] = layer
    model.eval().requires_grad_(False)
    return qwen


def read_layers(qwen: Qwen, *, reuse: bool) -> Iterator[Any]:
    """Yield the decoder layers in turn on the device, while the next one is read from its file.

    Args:
        reuse: use the memory of two layers for all. A layer is then valid until the next one is asked for.
    """
    for layer, tensors in raw_layers(qwen, reuse=reuse):
        yield finish_layer(qwen, layer, tensors)


def raw_layers(qwen: Qwen, *, reuse: bool) -> Iterator[tuple[Any, dict[str, torch.Tensor]]]:
    """Yield each layer as a module without memory, and its tensors on the device in the file's dtype."""
    names = [[f"layers.{i}.{name}" for name in layer.state_dict()] for i, layer in enumerate(qwen.model.layers)]
    weights, skeleton = qwen.weights, copy.deepcopy(qwen.model.layers)
    if qwen.device.type == "cpu" and not reuse:
        for layer, layer_names in zip(skeleton, names, strict=True):
            yield layer, {name.split(".", 2)[2]: weights.tensor(name) for name in layer_names}
        return
    groups = [[weights.stored(name) for name in layer_names] for layer_names in names]
    for layer, tensors in zip(skeleton, read_ahead(groups, qwen.device, reuse=reuse), strict=True):
        yield layer, {weights.own_name(name).split(".", 2)[2]: tensor for name, tensor in tensors.items()}


def finish_layer(qwen: Qwen, layer: Any, tensors: dict[str, torch.Tensor], *, int8: bool | None = None) -> Any:
    """Give ``layer`` its weights, in the dtype and precision of ``qwen``, or of ``int8`` if that is given."""
    layer.load_state_dict({name: t.to(qwen.dtype) for name, t in tensors.items()}, strict=True, assign=True)
    layer.eval().requires_grad_(False)
    if qwen.is_int8 if int8 is None else int8:
        from optimum.quanto import freeze, qint8, quantize

        quantize(layer, weights=qint8)
        freeze(layer)
    return layer


Pictures = Sequence["torch.Tensor | None"]
"""For each caption, the picture's tokens ``[count, 3584]`` as the vision tower gives them, on the CPU; or None."""


def encode_prompt_embeds(
    qwen: Qwen,
    tokens: Sequence[Tokens],
    pictures: Pictures | None = None,
    *,
    exact: bool = True,
    batch_tokens: int = 8192,
) -> list[torch.Tensor]:
    """Last hidden states after the final norm, the template cropped off: what the transformer is conditioned on.

    Args:
        exact: one caption in a forward pass, so that every bit is what ``Kandinsky5T2IPipeline.encode_prompt`` gives
            for that caption alone. False puts captions side by side in one pass (never padded); matrix products of
            another size may round differently.
        batch_tokens: most tokens, template included, in one forward pass of ``exact=False``.

    Returns:
        ``[n_tokens, 3584]`` for each caption, in the order given, on the CPU, in the model's dtype.
    """
    by_position = dict(iter_prompt_embeds(qwen, tokens, pictures, exact=exact, batch_tokens=batch_tokens))
    return [by_position[i].clone() for i in range(len(tokens))]


def iter_prompt_embeds(
    qwen: Qwen,
    tokens: Sequence[Tokens],
    pictures: Pictures | None = None,
    *,
    exact: bool = True,
    batch_tokens: int = 8192,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield ``encode_prompt_embeds``'s results as (position, rows), longest first. The rows may share memory."""
    import torch

    _check_places(tokens, pictures)

    def results() -> Iterator[tuple[Pack, torch.Tensor]]:
        positions = positions_of(qwen, tokens)
        for pack in make_packs([len(t.ids) for t in tokens], 1 if exact else batch_tokens):
            states = embedded(qwen, tokens, pictures, pack)
            table = positions.of(pack)
            for layer in qwen.model.layers:
                states = run_layer(layer, states, table, pack.runs)
            yield pack, qwen.model.norm(states)[0]

    with torch.no_grad(), attention_kernels(exact):
        for pack, rows in fetched(results()):
            yield from cropped(qwen, pack, rows)


def embedded(qwen: Qwen, tokens: Sequence[Tokens], pictures: Pictures | None, pack: Pack) -> torch.Tensor:
    """Embeddings ``[1, tokens, 3584]`` of a pack on the device, with its pictures at their places."""
    states = qwen.embed([i for member in pack.members for i in tokens[member].ids])
    start = 0
    for member, length in zip(pack.members, pack.lengths, strict=True):
        place, picture = tokens[member].place, pictures[member] if pictures else None
        if place and picture is not None:
            at = start + place.start
            states[0, at : at + place.count].copy_(picture, non_blocking=True)
        start += length
    return states


def positions_of(qwen: Qwen, tokens: Sequence[Tokens]) -> Positions:
    """The rotary tables of these captions."""
    import torch

    like = torch.empty(0, device=qwen.device, dtype=qwen.dtype)
    return Positions(qwen.model.rotary_emb, like, [t.place for t in tokens], lambda member: qwen.rope(tokens[member]))


def _check_places(tokens: Sequence[Tokens], pictures: Pictures | None) -> None:
    for i, t in enumerate(tokens):
        picture = pictures[i] if pictures else None
        assert (t.place.count if t.place else None) == (None if picture is None else len(picture)), "another picture"


@functools.cache
def _shapes_only(folder: Path) -> Any:
    """``Qwen2_5_VLModel`` of the folder's config with a layer of each kind, on the meta device."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

    config = Qwen2_5_VLConfig.from_dict(read_config(folder, "text_encoder"))
    config.text_config.num_hidden_layers = config.vision_config.depth = 1
    config.text_config.layer_types = config.text_config.layer_types[:1]
    with torch.device("meta"):
        return Qwen2_5_VLModel(config)


def _rope_index(folder: Path, tokens: Tokens) -> torch.Tensor:
    """``Qwen2_5_VLModel.get_rope_index`` of one instruction with its picture: ``[3, 1, tokens]`` on the CPU."""
    import torch

    assert tokens.place is not None
    types = torch.zeros(1, len(tokens.ids), dtype=torch.int32)
    types[0, tokens.place.start : tokens.place.start + tokens.place.count] = 1
    ids, _ = _shapes_only(folder).get_rope_index(
        torch.tensor([tokens.ids]), mm_token_type_ids=types, image_grid_thw=torch.tensor([tokens.place.grid])
    )
    return cast("torch.Tensor", ids)


def cropped(qwen: Qwen, pack: Pack, rows: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """(position, rows after the template) of each caption in a pack."""
    import torch

    for member, own in zip(pack.members, torch.split(rows, list(pack.lengths)), strict=True):
        yield member, own[qwen.encode_start_idx :]


def empty_text_model(folder: Path, dtype: torch.dtype) -> Any:
    """``Qwen2_5_VLTextModel`` of the folder's config on the meta device: shapes, no memory."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLTextModel

    config = read_config(folder, "text_encoder")
    if config.get("model_type") != "qwen2_5_vl":
        raise ModelError(
            f"{folder / 'text_encoder'} is a {config.get('model_type', 'model without a type')}, not Qwen2.5-VL",
            "Give a Kandinsky 5 Image repository in the diffusers layout with --model DIR",
        )
    text_config = Qwen2_5_VLConfig.from_dict(config).text_config
    text_config.dtype = dtype
    with torch.device("meta"):
        return Qwen2_5_VLTextModel(text_config).to(dtype)


def _num_equal(a: str, b: str) -> int:
    """How many characters at the start of two texts are equal."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
