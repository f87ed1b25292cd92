"""What does k5-micro-edit consist of? k5-micro with another transformer and text encoder; the rest is the same files.

    python -m pipelines.demo.micro_edit.model build/k5-micro-edit

puts the whole model folder together: the weights of ``pipelines/demo/k5-micro-edit`` (18 MB), and VAE, CLIP, tokenizers
and scheduler of ``pipelines/demo/k5-micro``. ``Kandinsky5I2IPipeline.from_pretrained`` loads it, given a
``Qwen2VLProcessor`` where torchvision is missing (``processor``).
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import Kandinsky5T2IPipeline, Kandinsky5Transformer3DModel
from safetensors.torch import load_file

from pipelines.demo.make_checkpoint import IMAGE_PROCESSOR, TOKENIZERS, to_bfloat16
from pipelines.demo.micro import model as micro

DEMO = TOKENIZERS.parent
MICRO, EDIT = DEMO / "k5-micro", DEMO / "k5-micro-edit"
SHARED = ("vae", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
WEIGHTS = {
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


def start(weights: Path | None = None) -> Kandinsky5T2IPipeline:
    """k5-micro in float32. Its transformer takes a source's 17 channels too; their weights are 0 at the start.

    It is a ``Kandinsky5T2IPipeline``, because that of image-to-image takes no bare tokenizer.

    Args:
        weights: a folder with the two files of ``save_weights``, for k5-micro-edit as it was then.
    """
    pipeline = micro.load(MICRO)
    plain: Any = pipeline.transformer
    edit = Kandinsky5Transformer3DModel.from_config({**plain.config, "visual_cond": True})
    tensors = plain.state_dict()
    narrow = tensors.pop("visual_embeddings.in_layer.weight")  # [256, 2 x 2 x 16]: of each patch, pixel by pixel
    wide = torch.zeros(len(narrow), 4, 33)
    wide[:, :, :16] = narrow.view(-1, 4, 16)
    edit.load_state_dict({**tensors, "visual_embeddings.in_layer.weight": wide.flatten(1)})
    text_encoder: Any = pipeline.text_encoder
    if weights:
        edit.load_state_dict(load_file(weights / "transformer.safetensors"))
        with TemporaryDirectory() as folder:
            assemble(Path(folder), weights)
            text_encoder = type(text_encoder).from_pretrained(Path(folder) / "text_encoder")
    for part in (edit, text_encoder):
        torch.nn.Module.to(part, torch.float32)
    pipeline.register_modules(transformer=edit, text_encoder=text_encoder)
    return pipeline


def save_weights(pipeline: Kandinsky5T2IPipeline, folder: Path) -> None:
    """Write what was trained, in bfloat16: ``transformer.safetensors`` and ``text_encoder.safetensors``."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, file in WEIGHTS.items():
        with TemporaryDirectory(dir=folder) as temporary:
            trained: Any = to_bfloat16(copy.deepcopy(getattr(pipeline, part)).to("cpu"))
            trained.save_pretrained(temporary)
            shutil.copyfile(Path(temporary) / Path(file).name, folder / f"{part}.safetensors")


def assemble(folder: Path, weights: Path = EDIT) -> None:
    """Write the whole model to ``folder``, which must not exist yet or be one that this wrote.

    Args:
        weights: the folder with the two files of ``save_weights``.
    """
    for part in SHARED:
        shutil.copytree(MICRO / part, folder / part, dirs_exist_ok=True)
    for part, file in WEIGHTS.items():
        (folder / part).mkdir(exist_ok=True)
        shutil.copyfile(weights / f"{part}.safetensors", folder / file)
        config = json.loads((MICRO / part / "config.json").read_text(encoding="utf8"))
        if part == "transformer":
            config["visual_cond"] = True
        write_json(folder / part / "config.json", config)
    write_json(folder / "tokenizer" / "preprocessor_config.json", IMAGE_PROCESSOR)
    index = json.loads((MICRO / "model_index.json").read_text(encoding="utf8"))
    index["tokenizer"] = ["transformers", "Qwen2VLProcessor"]
    write_json(folder / "model_index.json", {**index, "_class_name": "Kandinsky5I2IPipeline"})


def write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf8")


def processor(folder: Path) -> Any:
    """The ``Qwen2VLProcessor`` of a model folder without torchvision: one that has no video processor."""
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor

    class OfPictures(Qwen2VLProcessor):  # type: ignore[misc, unused-ignore]
        def check_argument_for_proper_class(self, argument_name: str, argument: object) -> type:
            return type(argument)

    images = Qwen2VLImageProcessorPil.from_pretrained(folder / "tokenizer")
    return OfPictures(images, AutoTokenizer.from_pretrained(folder / "tokenizer"), None)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Put k5-micro-edit's model folder together.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights", type=Path, default=EDIT)
    arguments = parser.parse_args()
    assemble(arguments.folder, arguments.weights)
    print(arguments.folder)
