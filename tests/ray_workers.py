"""Workers that die, and workers whose encoders are small: the processes of Ray import them from here."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa

from k5cache.encode.job import Job
from k5cache.engines.wire import Report
from k5cache.engines.workers import Decoder, Order, Shards, TextWorker, VaeWorker

HIDDEN = 8


class DiesOnce(VaeWorker):
    """Is killed after it has written the shards of an order, before it can report them; only the first time."""

    def encode(self, job: Job, sink: Shards, order: Order) -> Report:
        report = super().encode(job, sink, order)
        if _is_first(job):
            os.kill(os.getpid(), signal.SIGKILL)
        return report


class DiesAlways(VaeWorker):
    """Is killed by every order, as one whose images take all memory."""

    def encode(self, job: Job, sink: Shards, order: Order) -> Report:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("still alive")


class SmallText(TextWorker):
    """Has encoders that need no libraries, whose import takes longer than all else. The first order kills one."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        use_small_encoders()

    def encode(self, job: Job, sink: Shards, order: Order) -> Report:
        report = super().encode(job, sink, order)
        if _is_first(job):
            os.kill(os.getpid(), signal.SIGKILL)
        return report


class SmallVae(VaeWorker):
    """Has an encoder that needs no library. Notes each order as it begins."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        use_small_encoders()

    def encode(self, job: Job, sink: Shards, order: Order) -> Report:
        with (job.root.parent / "begun").open("a") as file:
            file.write(f"{order['order'].as_py()}\n")
        return super().encode(job, sink, order)


class FirstIsLate(Decoder):
    """Gives the first order only when three others are decoded."""

    def __call__(self, orders: pa.Table) -> pa.Table:
        decoded = super().__call__(orders)
        folder, (number,) = self.setup.place.root.parent, orders["order"].to_pylist()
        (folder / f"decoded-{number}").touch()
        end = time.monotonic() + 60
        while number == 0 and time.monotonic() < end and len(list(folder.glob("decoded-*"))) < 4:
            time.sleep(0.05)
        return decoded


def _is_first(job: Job) -> bool:
    try:
        (job.root.parent / "died").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def use_small_encoders() -> None:
    """Replace the encoders of this process by arithmetic on all characters and pixels. The passes stay as they are."""
    for owner, functions in small_encoders().items():
        for name, function in functions.items():
            setattr(owner, name, function)


def small_encoders() -> dict[Any, dict[str, Any]]:
    """Module -> name -> what stands in for that function."""
    import torch

    from k5cache.encoders import clip, pipeline, qwen, vae

    def vector(values: Sequence[int], num: int) -> torch.Tensor:
        return torch.tensor([sum(values[i::num]) for i in range(num)], dtype=torch.bfloat16)

    def tokenize(tokenizer: None, caption: str, limit: int) -> qwen.Tokens:
        return qwen.Tokens(list(caption[:limit].encode()) or [0], len(caption[:limit].encode()) or 1, caption[limit:])

    def prompt_embeds(encoder: Any, tokens: Any, *rest: Any, **options: Any) -> Iterator[tuple[int, torch.Tensor]]:
        for i in sorted(range(len(tokens)), key=lambda i: -len(tokens[i].ids)):  # longest first, as Qwen's
            yield i, torch.stack([vector([token + place], HIDDEN) for place, token in enumerate(tokens[i].ids)])

    def moments(model: Any, pixels: torch.Tensor, in_strips: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        means = torch.nn.functional.avg_pool2d(pixels, 8).permute(0, 2, 3, 1)
        mean = torch.cat([means * (i + 1) for i in range(6)], dim=-1)[..., :16].contiguous()
        return mean, mean.abs()

    return {
        clip: {
            "load_clip": lambda *_: None,
            "encode_pooled": lambda _, captions, exact: torch.stack([vector(list(c.encode()), 4) for c in captions]),
        },
        pipeline: {"pipeline_template": lambda *_: None},
        qwen: {
            "load_qwen": lambda *_, **__: SimpleNamespace(embeddings=torch.zeros(1, HIDDEN)),
            "load_tokenizer": lambda _: None,
            "tokenize": tokenize,
            "iter_prompt_embeds": prompt_embeds,
        },
        vae: {"load_vae": lambda *_: None, "keep_encoder_only": lambda model: model, "encode_on_device": moments},
    }


def write_configs(folder: Path) -> Path:
    """A checkpoint of configs alone: what plans are made of."""
    text = {"hidden_size": HIDDEN, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text |= {"num_key_value_heads": 1, "vocab_size": 256}
    vae = {"latent_channels": 16, "block_out_channels": [8, 16, 16, 16]}
    for name, config in (("text_encoder", text), ("text_encoder_2", text), ("vae", vae)):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
