"""What does a LoRA's page on the hub say? Its front matter is as diffusers' training scripts write it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from k5cache.shared.template import PIPELINES

MARK = "<!-- Written by `k5train push`, which replaces this page. Remove this line to keep your own. -->"
_MOST_PROMPT = 300


@dataclass(frozen=True)
class Facts:
    """What is known of a LoRA that is pushed."""

    repo: str
    name: str
    file: str
    pipeline: str
    """The class of diffusers that it is for."""
    algo: str
    """``lora``, ``rslora``, ``dora`` or ``lokr``."""
    base_model: str | None
    """A hub repository. None: the base was a folder, and the user did not say which model it holds."""
    trigger: str | None
    step: int
    caches: Sequence[Mapping[str, Any]]
    """Of each: the number of images, and the hash of its rows."""
    base_fingerprint: str
    versions: Mapping[str, str]
    settings: Mapping[str, Any]
    """The options of [train]."""
    samples: Sequence[tuple[str, str]]
    """(file in the repository, prompt) of each picture."""
    license: str | None = None


def card(facts: Facts) -> str:
    """The page, with its front matter."""
    from huggingface_hub import ModelCardData

    is_i2i = facts.pipeline == PIPELINES["i2i"]
    task = "image-to-image" if is_i2i else "text-to-image"
    data = ModelCardData(
        base_model=facts.base_model,
        base_model_relation="adapter" if facts.base_model else None,
        license=facts.license,
        library_name="diffusers",
        pipeline_tag=task,
        instance_prompt=facts.trigger,
        tags=[task, "diffusers-training", "diffusers", "lora", "template:sd-lora", "kandinsky-5", "kandinsky5-lora"],
        widget=[{"text": prompt or " ", "output": {"url": file}} for file, prompt in facts.samples] or None,
    )
    return f"---\n{data.to_yaml().strip()}\n---\n{MARK}\n\n{_body(facts)}"


def _body(facts: Facts) -> str:
    model = facts.base_model
    base = f" ([{model}](https://huggingface.co/{model}))" if model else ""
    kind = {"lokr": "LoKr", "dora": "DoRA", "rslora": "LoRA (rsLoRA)"}.get(facts.algo, "LoRA")
    gallery = "<Gallery />\n\n" if facts.samples else ""
    parts = [
        f"# {_plain(facts.name)}",
        f"{gallery}A {kind} for Kandinsky 5.0 Image Lite{base}, trained with kandinsky5-lora.",
        f"## Trigger words\n\nUse `{_code(facts.trigger)}` in the prompt." if facts.trigger else "",
        f"## Use it\n\n{_use(facts)}",
        f"## How it was trained\n\n{_training(facts)}",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _use(facts: Facts) -> str:
    base = facts.base_model or "FOLDER"
    is_i2i = facts.pipeline == PIPELINES["i2i"]
    arguments = 'image=picture, prompt="make it night"' if is_i2i else f'"{_example(facts)}"'
    guidance = facts.settings.get("validation", {}).get("guidance_scale", 5.0)
    return f"""```py
import torch
from diffusers import {facts.pipeline}

pipe = {facts.pipeline}.from_pretrained("{base}", torch_dtype=torch.bfloat16).to("cuda")
{call_for(facts)}
image = pipe({arguments}, guidance_scale={guidance}).image[0]
```

{_for_comfyui(facts)}"""


def _for_comfyui(facts: Facts) -> str:
    if facts.algo == "dora":
        return "ComfyUI leaves a DoRA's magnitudes out: export the file first, with `k5train export FILE --model DIR`."
    return f"For ComfyUI, put [{facts.file}]({facts.file}?download=true) into `models/loras`."


def call_for(facts: Facts) -> str:
    """The call by which diffusers loads it from the hub. The usual one refuses the keys of a LoKr."""
    if facts.algo == "lokr":
        return f'pipe.transformer.load_lora_adapter("{facts.repo}", weight_name="{facts.file}", prefix="transformer")'
    return f'pipe.load_lora_weights("{facts.repo}", weight_name="{facts.file}")'


def _example(facts: Facts) -> str:
    prompt = next((prompt for _, prompt in facts.samples if prompt), facts.trigger or "a lighthouse at dusk")
    return " ".join(prompt.split())[:_MOST_PROMPT].replace("\\", "\\\\").replace('"', '\\"')


def _training(facts: Facts) -> str:
    lora, optim = facts.settings.get("lora", {}), facts.settings.get("optim", {})
    accumulated = facts.settings.get("gradient_accumulation_steps", 1)
    rows = [
        ("steps", facts.step),
        ("batch", f"{facts.settings.get('batch_size', 1)} x {accumulated}"),
        ("rank, alpha", f"{lora.get('rank')}, {lora.get('alpha') or lora.get('rank')}"),
        ("optimizer, rate", f"{optim.get('optimizer')}, {optim.get('lr') or 'the usual rate'}"),
        ("shift", facts.settings.get("flow_schedule_shift")),
        *(("images, cache fingerprint", f"{c.get('images')}, `{str(c.get('rows'))[:16]}`") for c in facts.caches),
        ("base fingerprint", f"`{facts.base_fingerprint[:16]}`"),
        ("versions", ", ".join(f"{name} {number}" for name, number in facts.versions.items())),
    ]
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows if value is not None)
    return f"| what | value |\n|---|---|\n{table}\n\nAll options are in [recipe.toml](recipe.toml)."


def _plain(text: str) -> str:
    return text.replace("<", "&lt;").replace("\n", " ")


def _code(text: str) -> str:
    return text.replace("`", "'").replace("\n", " ")


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
