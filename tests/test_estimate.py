"""The plan of an encode: what fits which card, how long it takes, and whether strips leave a seam."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from k5cache.cli import app
from k5cache.encode import estimate, one_encoder, text_pass
from k5cache.encoders import clip, memory_plan, qwen, vae
from k5cache.encoders.memory_plan import TextArchitecture, plan_text, plan_vae
from k5cache.encoders.speed import text_lengths
from k5cache.encoders.strips import moments_in_strips
from k5cache.shared import host_memory
from k5cache.shared.console import parse_bytes
from k5cache.shared.errors import DoesNotFit
from tests.cli import Cli

GIB = 2**30
# Qwen2.5-VL-7B-Instruct's config.json, flat as published, and FLUX.1's ae
QWEN = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064,
}  # fmt: skip
FLUX = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}
ARCHITECTURE = TextArchitecture.of(QWEN)


def text_plan(vram_gib: float | None, precision="bf16", batching="exact", ram_gib=24.0, **options):
    vram = None if vram_gib is None else int(vram_gib * GIB)
    return plan_text(ARCHITECTURE, precision, batching, 512, vram=vram, ram=int(ram_gib * GIB), **options)


def test_the_arithmetic_counts_the_parameters_of_the_real_layers(toy_model):
    config = json.loads((toy_model / "text_encoder" / "config.json").read_text())
    architecture = TextArchitecture.of(config)
    model = qwen.empty_text_model(toy_model, torch.bfloat16)
    assert architecture.layer_parameters == sum(p.numel() for p in model.layers[0].parameters())
    assert architecture.num_layers == len(model.layers)
    assert ARCHITECTURE.layer_parameters == 233_057_792  # 0.47 GB in bf16, 28 of them 13.05 GB


def test_flops_are_those_that_torch_counts(toy_model):
    model = qwen.load_qwen(toy_model, "cpu", torch.float32).model
    architecture = TextArchitecture.of(json.loads((toy_model / "text_encoder" / "config.json").read_text()))
    with FlopCounterMode(display=False) as counter:
        for layer in model.layers:
            for linear in [m for m in layer.modules() if isinstance(m, torch.nn.Linear)]:
                linear(torch.zeros(1, linear.in_features))
    assert architecture.flops_per_token == pytest.approx(counter.get_total_flops(), rel=0.02)  # norms and biases
    config = {**FLUX, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
    with torch.device("meta"):
        encoder = AutoencoderKL(
            **config, down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4
        ).encoder
        image = torch.zeros(1, 3, 256, 256)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(image)
    assert memory_plan.vae_flops(FLUX, 256 * 256) == pytest.approx(counter.get_total_flops(), rel=0.03)


@pytest.mark.parametrize(
    ("vram", "precision", "mode", "parking"),
    [
        (24, "bf16", "resident", "device"),
        (16, "bf16", "resident", "device"),
        (12, "bf16", "streamed", "device"),
        (12, "int8", "resident", "device"),
        (4, "bf16", "streamed", "device"),
        (2, "bf16", "streamed", "host"),
        (None, "bf16", "resident", "device"),
    ],
)
def test_the_text_encoder_is_resident_where_it_fits_and_streamed_where_it_does_not(vram, precision, mode, parking):
    plan = text_plan(vram, precision, num_tokens=110_000)
    assert (plan.mode, plan.parking) == (mode, parking)


def test_a_cpu_without_the_memory_streams_too():
    assert text_plan(None, ram_gib=8).mode == "streamed"
    assert text_plan(None, ram_gib=8).ram < 8 * GIB


@pytest.mark.parametrize("batching", ["exact", "fast"])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32", "int8"])
def test_no_plan_needs_more_than_the_card_has(precision, batching):
    refused = []
    for quarter in range(4, 160):
        try:
            plan = text_plan(quarter / 4, precision, batching, num_tokens=2_000_000)
        except DoesNotFit:
            refused.append(quarter)
            continue
        assert plan.vram <= quarter / 4 * GIB
        assert plan.chunk_tokens >= 576, "a chunk holds at least the longest caption"
    assert refused == list(range(4, 4 + len(refused))), "what fits a small card fits a larger one"
    assert 0 < len(refused) < 16


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_layers_that_are_cast_are_planned_with_those_that_are_still_as_the_file_has_them(precision):
    num_bytes = ARCHITECTURE.layer_parameters * (4 if precision == "fp32" else 2)
    assert text_plan(40, precision).vram > 28 * num_bytes + 2 * ARCHITECTURE.layer_parameters * 2


@pytest.mark.parametrize("ram_gib", [1, 5, 7, 64])
def test_pinned_memory_is_planned_as_torch_takes_it(ram_gib):
    plan = text_plan(2, ram_gib=ram_gib, num_tokens=2_000_000)
    parked = plan.chunk_tokens * ARCHITECTURE.hidden_size * 2
    rounded = 1 << (parked - 1).bit_length()
    assert parked <= rounded <= min(2 * GIB, max(ram_gib * GIB // 4, GIB // 4))


def test_what_cannot_fit_is_refused_with_what_it_needs():
    with pytest.raises(DoesNotFit) as refused:
        text_plan(1)
    assert refused.value.problem == (
        "The text encoder needs 1.9 GiB of VRAM with one layer at a time, 1.0 GiB are available"
    )
    assert "--device cpu" in refused.value.fix


def test_memory_does_not_grow_with_the_captions():
    few, many = (text_plan(4, num_tokens=n) for n in (400_000, 400_000_000))
    assert (few.vram, few.ram, few.chunk_tokens) == (many.vram, many.ram, many.chunk_tokens)
    assert many.num_chunks(400_000_000) > 100


def test_a_slow_device_commits_every_three_minutes():
    plan = text_plan(None, tokens_per_second=20.0)
    assert plan.chunk_tokens == 3600
    assert text_plan(None, tokens_per_second=0.5).chunk_tokens == 576, "but never less than a caption"


def test_streaming_takes_the_longer_of_computing_and_reading():
    plan = text_plan(4, num_tokens=100_000)
    speed = memory_plan.Speed(text_flops=1e14, vae_flops=1e13, read_bytes=3e9)
    compute = 100_000 * ARCHITECTURE.flops_per_token / 1e14
    assert memory_plan.text_seconds(plan, ARCHITECTURE, [200] * 500, speed) == pytest.approx(compute, rel=0.02)
    slow_disk = replace(speed, read_bytes=1e8)
    assert memory_plan.text_seconds(plan, ARCHITECTURE, [200] * 500, slow_disk) == pytest.approx(130, rel=0.05)


def test_the_vae_is_whole_then_in_strips_then_refused():
    modes = {gib: plan_vae(FLUX, "fp32", 1024 * 1024, vram=gib * GIB, ram=GIB).mode for gib in (8, 3)}
    assert modes == {8: "whole", 3: "strips"}
    assert plan_vae(FLUX, "bf16", 1024 * 1024, vram=3 * GIB, ram=GIB).mode == "whole"
    with pytest.raises(DoesNotFit, match=r"VAE needs .* of VRAM"):
        plan_vae(FLUX, "fp32", 1024 * 1024, vram=1 * GIB, ram=64 * GIB)


def test_on_a_cpu_memory_decides_the_same():
    plans = {gib: plan_vae(FLUX, "fp32", 2048 * 2048, vram=None, ram=gib * GIB) for gib in (32, 10)}
    assert {gib: plan.mode for gib, plan in plans.items()} == {32: "whole", 10: "strips"}
    assert all(plan.ram <= gib * GIB and plan.vram == 0 for gib, plan in plans.items())
    with pytest.raises(DoesNotFit, match=r"VAE needs .* of RAM .* 4\.0 GiB") as refused:
        plan_vae(FLUX, "fp32", 2048 * 2048, vram=None, ram=4 * GIB)
    assert "--device" not in refused.value.fix


@pytest.mark.parametrize(
    ("group", "files", "left"),
    [
        ("0::/", {"": ("6000000", "5000000", "active_file 300000\ninactive_file 700000")}, 2_000_000),
        ("0::/docker/1", {"": ("max", "5000000", "active_file 0")}, 8_000_000),
        ("0::/a/b", {"a": ("3000000", "1000000", ""), "a/b": ("max", "1000000", "")}, 2_000_000),
        ("4:memory:/pod/1", {"memory": ("5000000", "4000000", "")}, 1_000_000),
    ],
)
def test_a_containers_limit_is_what_is_free(tmp_path, group, files, left):
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 7812 kB\n")
    (proc / "self" / "cgroup").write_text(group + "\n")
    for folder, texts in files.items():
        where = tmp_path / "sys/fs/cgroup" / folder
        where.mkdir(parents=True, exist_ok=True)
        names = ("limit_in_bytes", "usage_in_bytes") if folder == "memory" else ("max", "current")
        for name, text in zip((*names, "stat"), texts, strict=True):
            (where / f"memory.{name}").write_text(text)
    assert host_memory.free_ram(tmp_path) == pytest.approx(left, rel=1e-3)


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("4GB", 4 * GIB), ("4 GiB", 4 * GIB), ("4", 4 * GIB), ("3500MB", 3500 * 2**20)]
)
def test_memory_is_written_as_people_write_it(text, num_bytes):
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "0", "-4GB", "nan", "inf", "1e-9MB", "4TB", "GB", "lots"])
def test_what_is_no_amount_of_memory_is_refused(text):
    with pytest.raises(ValueError, match=f"float|{text}"):
        parse_bytes(text)


@pytest.fixture(scope="module")
def loaded_vae(toy_model):
    return vae.load_vae(toy_model, "cpu", torch.float32)


@pytest.mark.parametrize("strip_pixels", [1, 1000, 2**17])
def test_strips_leave_no_seam(loaded_vae, strip_pixels):
    pixels = torch.rand(1, 3, 208, 144, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected = loaded_vae._encode(pixels)
        moments = moments_in_strips(loaded_vae, pixels, strip_pixels)
    # float32, sums in another order; latents have a standard deviation of 0.3
    torch.testing.assert_close(moments, expected, rtol=0, atol=1e-5)


def test_tiles_do_leave_seams(toy_model):
    tiled = AutoencoderKL.from_pretrained(toy_model, subfolder="vae")
    pixels = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected = tiled.encode(pixels).latent_dist.mean
        tiled.enable_tiling()
        tiled.tile_sample_min_size, tiled.tile_latent_min_size = 64, 8
        error = tiled.encode(pixels).latent_dist.mean - expected
    assert error.norm() / expected.norm() > 0.1, "if this fails, strips are no longer needed"


def test_latents_in_strips_are_those_of_the_whole_image(loaded_vae):
    pixels = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1
    for a, b in zip(
        vae.encode_on_device(loaded_vae, pixels), vae.encode_on_device(loaded_vae, pixels, in_strips=True), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (80, 70 + i), (10 * i, 20, 30)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a red fox in the snow " * (i + 1))
    return folder


def test_plan_prints_what_an_encode_would_take_and_loads_no_encoder(toy_model, source, tmp_path, monkeypatch):
    for module, name in ((qwen, "load_qwen"), (vae, "load_vae"), (qwen, "load_tokenizer")):
        monkeypatch.setattr(module, name, None)
    command = ("plan", "pictures", "--model", str(toy_model), "--set", "cache.resolution=64")
    here = Cli(tmp_path)(app, *command, "--json")
    assert here.code == 0, here.err
    report = json.loads(here.out)
    assert (report["num_captions"], report["num_images"], report["text"]["mode"]) == (4, 3, "resident")
    assert report["text_seconds"] > 0 < report["vae_seconds"]
    card = Cli(tmp_path)(app, *command, "--vram", "1GB")
    assert "a card of 1.0 GiB" in card.out
    assert "there is no GPU here to measure" in card.out
    assert not (tmp_path / "cache").exists()


def test_a_plan_that_does_not_fit_ends_in_two_lines(toy_model, source, tmp_path):
    done = Cli(tmp_path)(app, "plan", "pictures", "--model", str(toy_model), "--vram", "700MB")
    assert done.code == 2
    assert "The text encoder needs" in done.err
    done = Cli(tmp_path)(app, "plan", "pictures", "--model", str(toy_model), "--vram", "lots")
    assert "--vram lots is not an amount of memory" in done.err


def test_an_encode_on_a_cpu_says_first_how_long_it_will_take(toy_model, source, tmp_path, monkeypatch):
    speed = memory_plan.Speed(text_flops=5e5, vae_flops=1e7, read_bytes=1e9)
    monkeypatch.setattr(estimate, "measured", lambda *_: speed)
    command = ("encode", "pictures", "--model", str(toy_model), "--set", "cache.resolution=64")
    done = Cli(tmp_path)(app, *command, "--set", "cache.text_encoder_1_precision=int8")
    assert done.code == 0, done.err
    first, second = (line for line in done.err.splitlines() if line.strip())
    assert "takes about" in first
    assert "4 captions" in first
    assert "3 images" in first
    assert "int8 gives embeddings that differ from bf16 by" in second


COMMAND = ("encode", "pictures", "--set", "cache.resolution=64")


def test_an_encode_says_its_modes_and_refuses_what_does_not_fit_before_it_loads_anything(
    toy_model, source, tmp_path, monkeypatch
):
    monkeypatch.setattr(text_pass, "encode_texts", None)
    monkeypatch.setattr(memory_plan, "VAE_VALUES", {"whole": 2**20, "strips": 2**20})
    done = Cli(tmp_path)(app, *COMMAND, "--model", str(toy_model), "--vram", "2GB")
    assert done.code == 2
    assert "The VAE needs" in done.err
    monkeypatch.undo()
    done = Cli(tmp_path)(app, *COMMAND, "--model", str(toy_model), "--vram", "2GB")
    assert done.code == 0, done.err
    assert "Planned: text encoder resident (" in done.err
    assert "then VAE whole (" in done.err


@pytest.mark.parametrize(
    ("module", "name"), [(clip, "encode_pooled"), (qwen, "iter_prompt_embeds"), (vae, "encode_on_device")]
)
def test_memory_that_ends_in_an_encoder_is_two_lines_and_the_next_encode_goes_on(
    toy_model, source, tmp_path, monkeypatch, module, name
):
    def ends(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(module, name, ends)
    done = Cli(tmp_path)(app, *COMMAND, "--model", str(toy_model))
    assert done.code == 2
    assert "ran out of memory: CUDA out of memory" in done.err
    assert "what was finished is kept" in done.err
    monkeypatch.undo()
    assert Cli(tmp_path)(app, *COMMAND, "--model", str(toy_model)).code == 0


def test_memory_that_ends_on_a_gpu_is_answered_by_the_plan_to_ask_for():
    with pytest.raises(DoesNotFit) as refused, one_encoder.when_memory_ends("cuda", "The VAE", 4 * GIB):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nSee the manual")
    assert refused.value.problem.startswith("The VAE ran out of memory, 4.0 GiB of VRAM were planned: CUDA out of")
    assert "the same `k5cache encode` with --vram 3.6GB" in refused.value.fix
    with pytest.raises(RuntimeError, match="shapes"), one_encoder.when_memory_ends("cuda", "The VAE", 0):
        raise RuntimeError("shapes do not match")


@pytest.mark.parametrize(
    ("module", "name", "option"),
    [
        (qwen, "iter_prompt_embeds", "cache.text_encoder_1_precision"),
        (clip, "encode_pooled", "cache.text_encoder_2_precision"),
        (vae, "encode_on_device", "cache.vae_precision"),
    ],
)
def test_numbers_that_overflow_are_refused_and_not_stored(
    toy_model, source, tmp_path, monkeypatch, module, name, option
):
    right = getattr(module, name)

    def overflows(*args, **options):
        result = right(*args, **options)
        if name == "iter_prompt_embeds":
            return ((i, row * float("inf")) for i, row in result)
        return result * float("inf") if name == "encode_pooled" else tuple(tensor * float("nan") for tensor in result)

    monkeypatch.setattr(module, name, overflows)
    done = Cli(tmp_path)(app, *COMMAND, "--model", str(toy_model))
    assert done.code == 2
    assert "not finite" in done.err
    assert f"Set {option} = " in done.err
    assert not list((tmp_path / "cache").rglob("latents/*.parquet"))


def test_estimates_of_captions_are_near_their_token_counts(toy_model):
    tokenizer = qwen.load_tokenizer(toy_model)
    captions = ["a red fox asleep in the deep snow of a very long winter", "birds", "", "a red fox " * 300]
    for caption, about in zip(captions, text_lengths(captions, 40), strict=True):
        assert about == pytest.approx(len(qwen.tokenize(tokenizer, caption, 40).ids), abs=20)
    russian, chinese = "рыжая лиса спит в глубоком снегу", "一只红狐狸睡在深雪里"
    # By Qwen2.5's own vocabulary they take 17 and 8 tokens
    assert [n - 45 for n in text_lengths([russian, chinese], 512)] == [14, 7]
