"""Qwen streamed layer by layer gives the bits of the whole model, reads each weight once, and survives a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from optimum.quanto import freeze, qint8, quantize
from rich.progress import Progress
from safetensors.torch import load_file, save_file

from k5cache.encode import estimate, text_pass
from k5cache.encode.commit import Committer
from k5cache.encode.job import Job, TextJob
from k5cache.encode.sink import Collector
from k5cache.encoders import clip, hostio, memory_plan, qwen, streaming
from k5cache.encoders.layers import make_packs
from k5cache.encoders.pipeline import clean
from k5cache.options import CacheConfig
from k5cache.shared.errors import ModelError
from k5cache.store.manifest import Manifest, read_manifest
from k5cache.store.shards import Shard

CAPTIONS = [
    *("fox", "a red fox", "box", "", "a fox asleep in the deep snow of a very long winter", "a blue fox", "cat"),
    *("two birds on a wire over a street in the rain", "one", "birds", "a tall tower by the sea"),
]
NUM_LAYERS = 7


@pytest.fixture(scope="module")
def deep_model(toy_model, tmp_path_factory) -> Path:
    """The toy with seven text layers, in two files as large models are published."""
    folder = tmp_path_factory.mktemp("deep") / "model"
    shutil.copytree(toy_model, folder)
    where = folder / "text_encoder"
    config = json.loads((where / "config.json").read_text())
    config["text_config"] |= {"num_hidden_layers": NUM_LAYERS, "layer_types": ["full_attention"] * NUM_LAYERS}
    config["text_config"]["max_window_layers"] = NUM_LAYERS
    (where / "config.json").write_text(json.dumps(config))
    tensors = load_file(where / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    late = {}
    for i in range(2, NUM_LAYERS):
        for name in [n for n in tensors if n.startswith("model.layers.1.")]:
            like = tensors[name]
            noise = torch.randn(like.shape, generator=generator) * like.float().std().nan_to_num(0)
            late[name.replace(".1.", f".{i}.", 1)] = (noise + like.float().mean()).to(like.dtype)
    (where / "model.safetensors").unlink()
    files = {"model-00001-of-00002.safetensors": tensors, "model-00002-of-00002.safetensors": late}
    for name, part in files.items():
        save_file(part, where / name)
    weight_map = {tensor: name for name, part in files.items() for tensor in part}
    (where / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture(scope="module")
def tokens(deep_model):
    tokenizer = qwen.load_tokenizer(deep_model)
    return [qwen.tokenize(tokenizer, clean(caption), 512) for caption in CAPTIONS]


def resident(folder, tokens, dtype=torch.bfloat16, int8=False, **options) -> list[torch.Tensor]:
    return qwen.encode_prompt_embeds(qwen.load_qwen(folder, "cpu", dtype, int8=int8), tokens, **options)


def streamed(folder, tokens, dtype=torch.bfloat16, int8=False, **options) -> list[torch.Tensor]:
    encoder = qwen.load_qwen(folder, "cpu", dtype, streamed=True, int8=int8)
    rows = {i: row.clone() for i, row in streaming.stream_prompt_embeds(encoder, tokens, **options)}
    return [rows[i] for i in range(len(tokens))]


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_streaming_gives_the_bits_of_the_whole_model(deep_model, tokens, dtype, exact):
    options = {"exact": exact, "batch_tokens": 150}
    expected = resident(deep_model, tokens, dtype, **options)
    states = streamed(deep_model, tokens, dtype, **options)
    for caption, a, b in zip(CAPTIONS, expected, states, strict=True):
        assert torch.equal(a, b), caption
    assert not torch.equal(expected[1][-4:], expected[5][-4:]), "a red fox and a blue fox are told apart"


def test_every_byte_of_the_layers_is_read_once_for_all_captions(deep_model, tokens, monkeypatch):
    read = []
    preadv = os.preadv

    def counted(descriptor, buffers, offset):
        count = preadv(descriptor, buffers, offset)
        read.append((descriptor, offset, count))
        return count

    encoder = qwen.load_qwen(deep_model, "cpu", torch.bfloat16, streamed=True)
    monkeypatch.setattr(os, "preadv", counted)
    dict(streaming.stream_prompt_embeds(encoder, tokens))
    weights = 2 * sum(p.numel() for p in encoder.model.layers.parameters())
    assert sum(count for *_, count in read) == weights
    assert len(set(read)) == len(read)


def test_two_layers_are_held_at_a_time(deep_model):
    encoder = qwen.load_qwen(deep_model, "cpu", torch.bfloat16, streamed=True)
    assert {p.device.type for p in encoder.model.layers.parameters()} == {"meta"}
    places = {layer.mlp.up_proj.weight.untyped_storage().data_ptr() for layer in qwen.read_layers(encoder, reuse=True)}
    assert len(places) == 2


def test_a_file_that_is_cut_short_while_it_is_read_is_named(deep_model, tmp_path):
    shutil.copytree(deep_model, tmp_path / "model")
    encoder = qwen.load_qwen(tmp_path / "model", "cpu", torch.bfloat16, streamed=True)
    file = tmp_path / "model" / "text_encoder" / "model-00002-of-00002.safetensors"
    assert encoder.weights.stored("layers.6.mlp.up_proj.weight").path == file
    os.truncate(file, 2 * file.stat().st_size // 3)
    with pytest.raises(ModelError, match=file.name):
        list(qwen.read_layers(encoder, reuse=True))


def test_a_text_encoder_that_somebody_quantised_is_refused_not_taken_for_its_bits(deep_model, tmp_path):
    shutil.copytree(deep_model, tmp_path / "model")
    file = tmp_path / "model" / "text_encoder" / "model-00002-of-00002.safetensors"
    tensors = load_file(file)
    name = "model.layers.6.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, file)
    with pytest.raises(ModelError, match=rf"holds {name} as F8_E4M3"):
        qwen.load_qwen(tmp_path / "model", "cpu", torch.bfloat16)


def test_packs_hold_every_caption_once_longest_first_within_their_size():
    lengths = [5, 300, 7, 5, 5, 90, 41, 7]
    packs = make_packs(lengths, 100)
    assert sorted(i for pack in packs for i in pack.members) == list(range(8))
    assert [pack.lengths for pack in packs] == [(300,), (90,), (41, 7, 7, 5, 5, 5)]
    assert packs[2].runs == ((1, 41), (2, 7), (3, 5))
    assert [pack.lengths for pack in make_packs(lengths, 1)] == [(n,) for n in sorted(lengths, reverse=True)]


def test_captions_side_by_side_do_not_see_each_other(deep_model, tokens):
    alone = resident(deep_model, tokens, torch.float32)
    together = resident(deep_model, tokens, torch.float32, exact=False)
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)  # another size of product, another order of additions


def test_an_int8_text_encoder_is_quantos_own_streamed_or_not(deep_model, tokens):
    whole = qwen.load_qwen(deep_model, "cpu", torch.bfloat16)
    for layer in whole.model.layers:
        layer.load_state_dict({k: v.clone() for k, v in layer.state_dict().items()}, assign=True)
    quantize(whole.model, weights=qint8)
    freeze(whole.model)
    expected = qwen.encode_prompt_embeds(whole, tokens)
    for a, b, c in zip(
        expected, resident(deep_model, tokens, int8=True), streamed(deep_model, tokens, int8=True), strict=True
    ):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_the_error_of_int8_is_measured_without_either_model_in_memory(deep_model, tokens):
    plain, rounded = (torch.cat(resident(deep_model, tokens, int8=int8)).double() for int8 in (False, True))
    expected = ((rounded - plain).norm() / plain.norm()).item()
    error = streaming.int8_error(qwen.load_qwen(deep_model, "cpu", torch.bfloat16, streamed=True, int8=True), tokens)
    assert error == pytest.approx(expected, rel=1e-3)
    assert 0.001 < error < 0.2


def test_a_pack_parked_in_host_memory_is_put_away_before_it_is_brought_again(deep_model, tokens, monkeypatch):
    """A stand-in for the copying stream: on the CPU copies are made in the order in which they are queued."""

    class Stream:
        def wait_stream(self, _): ...
        def wait_event(self, _): ...

    class Event:
        def synchronize(self): ...

    empty, order = torch.empty, []
    monkeypatch.setattr(streaming, "new_stream", lambda _: Stream())
    monkeypatch.setattr(streaming, "record_event", lambda device: Event())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)

    class Watched(streaming._OnHost):
        def put(self, k, states):
            order.append(("put", k))
            super().put(k, states.clone())

        def _bring(self, k):
            order.append(("bring", k))
            number, states, event = super()._bring(k)
            return number, states.clone(), event  # on a GPU it is a copy

    monkeypatch.setattr(streaming, "_OnDevice", Watched)
    hidden = streamed(deep_model, tokens, exact=False, batch_tokens=150)
    monkeypatch.undo()
    for a, b in zip(resident(deep_model, tokens, exact=False, batch_tokens=150), hidden, strict=True):
        assert torch.equal(a, b)
    first = order.index(("put", 0), 1)
    assert order[first - 1] == ("bring", 1), "the next pack is on its way before this one leaves"


def text_job(root: Path, folder: Path, **options) -> Job:
    root.mkdir(exist_ok=True)
    return Job(Path, root, folder, CacheConfig(**options), "cpu", Progress(disable=True))


def in_chunks_of(monkeypatch, num_tokens: int, mode: str = "streamed") -> None:
    plan = memory_plan.TextPlan(mode, "device", num_tokens, 8192, 0, 0, 0)
    monkeypatch.setattr(estimate, "plan_text", lambda *_: plan)


def text_jobs() -> list[TextJob]:
    return [TextJob(f"{i:032x}", caption) for i, caption in enumerate(CAPTIONS)]


@pytest.mark.parametrize("mode", ["resident", "streamed"])
def test_rows_of_many_chunks_have_their_own_captions_and_vectors(deep_model, tokens, tmp_path, monkeypatch, mode):
    in_chunks_of(monkeypatch, 120, mode)
    monkeypatch.setattr(text_pass, "_POOLED_IN_MEMORY", 100)  # bytes: the vectors go to a file
    rows = {}

    class Kept(Committer):
        def shards(self, kind, specs, bucket=None):
            chunks.append(kind)
            return nullcontext(lambda row: rows.update({row["key"]: row}))

    chunks: list[str] = []
    commit = Kept(tmp_path, Manifest(recipe={}), 2**20)
    text_pass.encode_texts(text_job(tmp_path / "cache", deep_model), commit, text_jobs())
    pooled = clip.encode_pooled(clip.load_clip(deep_model, "cpu", torch.bfloat16), CAPTIONS)
    for i, expected in enumerate(resident(deep_model, tokens)):
        row = rows[f"{i:032x}"]
        assert row["caption"] == CAPTIONS[i]
        assert row["n_tokens"] == len(expected)
        assert torch.equal(row["prompt_embeds"], expected)
        assert torch.equal(row["pooled"], pooled[i])
    assert len(chunks) > 3


def test_clip_and_qwen_take_turns_over_many_captions(deep_model, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(text_pass, "_CLIP_CAPTIONS", 4)
    turns = []
    for module, name in ((clip, "load_clip"), (qwen, "load_qwen")):
        right = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, right=right, name=name, **k: turns.append(name) or right(*a, **k))
    commit = Collector()
    text_pass.encode_texts(text_job(tmp_path / "cache", deep_model), commit, text_jobs())
    assert turns == ["load_clip", "load_qwen"] * 3
    for i, expected in enumerate(resident(deep_model, tokens)):
        assert commit.rows[f"{i:032x}"]["caption"] == CAPTIONS[i]
        assert torch.equal(commit.rows[f"{i:032x}"]["prompt_embeds"], expected)
    pooled = clip.encode_pooled(clip.load_clip(deep_model, "cpu", torch.bfloat16), CAPTIONS)
    assert torch.equal(torch.stack([commit.rows[f"{i:032x}"]["pooled"] for i in range(len(CAPTIONS))]), pooled)


def test_a_kill_in_mid_stream_costs_one_chunk(deep_model, tmp_path, monkeypatch):
    in_chunks_of(monkeypatch, 120)
    root, jobs = tmp_path / "cache", text_jobs()
    job = text_job(root, deep_model)
    child = os.fork()
    if child == 0:
        begun = iter(range(100))

        def killed_in_the_third_chunk(encoder, *arguments, **options):
            if next(begun) == 2:
                options["on_layer"] = lambda i: os.kill(os.getpid(), signal.SIGKILL) if i == 3 else None
            return stream(encoder, *arguments, **options)

        stream = streaming.stream_prompt_embeds
        streaming.stream_prompt_embeds = killed_in_the_third_chunk
        text_pass.encode_texts(job, Committer(root, Manifest(recipe={}), 2**20), jobs)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    manifest = read_manifest(root)
    done = [key for shard in manifest.shards for key in Shard(root, shard).keys]
    assert len(manifest.shards) == 2
    assert 0 < len(done) < len(jobs)
    rest = [text for text in jobs if text.key not in done]
    commit = Committer(root, manifest, 2**20)
    text_pass.encode_texts(job, commit, rest)
    assert commit.keys("text") == {text.key for text in jobs}


def test_a_row_that_cannot_be_written_ends_the_pass_with_its_own_error(deep_model, tmp_path, monkeypatch):
    in_chunks_of(monkeypatch, 2**20)
    written = []

    def full(row):
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(row)

    class Full(Committer):
        def shards(self, kind, specs, bucket=None):
            return nullcontext(full)

    with pytest.raises(OSError, match="No space left"):
        text_pass.encode_texts(
            text_job(tmp_path / "cache", deep_model), Full(tmp_path, Manifest(recipe={}), 1), text_jobs()
        )
    assert len(written) == 2, "nothing is written after the row that failed"


def test_results_reach_the_cpu_in_order(deep_model):
    rows = [(i, torch.full((2,), i)) for i in range(5)]
    assert [(i, row.tolist()) for i, row in hostio.fetched(rows)] == [(i, [i, i]) for i in range(5)]
