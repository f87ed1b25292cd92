"""A cache made under another diffusers template is refused, in words that say what differs and what to do."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
from diffusers import Kandinsky5T2IPipeline

from k5cache.encoders.pipeline import pipeline_template
from k5cache.shared import template as template_module
from k5cache.shared.errors import CacheStale
from k5cache.shared.template import installed_template, read_template
from k5cache.store.manifest import lock, read_manifest, write_manifest
from k5cache.store.reader import open_cache
from k5train.data.template import check_template

OLD = "promt engineer"  # diffusers before 0.42 spelt it so, and cropped 41


@pytest.fixture
def cache_made_with(toy_cache, tmp_path):
    """The toy cache with other facts in its manifest. Its rows are never read here."""
    manifest = read_manifest(toy_cache("bf16"))

    def make(diffusers: str = "0.41.0", **text: object) -> Path:
        root = tmp_path / "cache"
        original = toy_cache("bf16")
        recipe = manifest.recipe | {"text": manifest.recipe["text"] | text}
        with lock(root):  # of an empty folder
            for path in original.rglob("*.parquet"):
                target = root / path.relative_to(original)
                target.parent.mkdir(exist_ok=True)
                target.hardlink_to(path)
            write_manifest(
                root, replace(manifest, recipe=recipe, created_by=manifest.created_by | {"diffusers": diffusers})
            )
        return root

    return make


def test_the_template_read_from_the_source_is_the_pipelines():
    template = installed_template("t2i")
    pipeline = Kandinsky5T2IPipeline(
        **dict.fromkeys(Kandinsky5T2IPipeline._get_signature_keys(Kandinsky5T2IPipeline)[0])
    )
    assert template == pipeline_template()
    assert template.text == pipeline.prompt_template
    assert template.encode_start_idx == pipeline.prompt_template_encode_start_idx


def test_it_is_read_without_importing_diffusers():
    code = (
        "import sys\nfrom k5cache.shared.template import installed_template\nfor kind in ('t2i', 'i2i'):\n"
        "    assert '{}' in installed_template(kind).text\n"
        "print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_cache_of_the_installed_template_passes(cache_made_with):
    check_template(open_cache(cache_made_with()))


def test_a_cache_of_another_template_is_refused_with_both_wordings_versions_and_the_way_out(cache_made_with):
    old = pipeline_template().text.replace("prompt engineer", OLD)
    root = cache_made_with(prompt_template=old, prompt_template_encode_start_idx=41)
    with pytest.raises(CacheStale) as refused:
        check_template(open_cache(root))
    assert "under diffusers 0.41.0" in refused.value.problem
    assert OLD in refused.value.problem
    assert "prompt engineer" in refused.value.problem
    assert f"k5cache encode SOURCE -o {root} --update" in refused.value.fix
    assert "pip install diffusers==0.41.0" in refused.value.fix


def test_a_cache_of_another_crop_is_refused(cache_made_with):
    with pytest.raises(CacheStale, match="another crop"):
        check_template(open_cache(cache_made_with(prompt_template_encode_start_idx=41)))


def test_a_template_that_the_source_does_not_state_refuses_nothing():
    assert read_template("class Kandinsky5T2IPipeline:\n    def __init__(self):\n        self.x = 1\n", "A") is None
    assert installed_template("t2v") is None


def test_k5cache_encode_refuses_it_too_and_offers_to_bring_it_up_to_date(cache_made_with, toy_cache, toy_model):
    from k5cache.cli import app
    from tests.cli import Cli

    old = pipeline_template().text.replace("prompt engineer", OLD)
    root, workplace = cache_made_with(prompt_template=old), toy_cache("bf16").parent.parent
    done = Cli(workplace)(
        app, "encode", "datasets/pictures", "-o", str(root), "-r", "recipe.toml", "--model", str(toy_model)
    )
    assert done.code == 2
    assert OLD in done.err
    assert "prompt engineer" in done.err
    assert "--update" in done.err


def test_a_cache_records_what_cleaned_its_captions_and_knows_when_ftfy_came_or_went(toy_cache, monkeypatch):
    manifest = read_manifest(toy_cache("bf16"))
    assert manifest.created_by["ftfy"] == version("ftfy")
    assert manifest.recipe["cleaning"] == template_module.cleaning()
    true = template_module.version
    monkeypatch.setattr(template_module, "version", lambda package: None if package == "ftfy" else true(package))
    assert manifest.recipe["cleaning"] != template_module.cleaning()


def test_k5train_run_refuses_before_it_loads_anything(cache_made_with, toy_model, tmp_path):
    from k5train.cli import app
    from tests.cli import Cli

    old = pipeline_template().text.replace("prompt engineer", OLD)
    root = cache_made_with(prompt_template=old)
    done = Cli(tmp_path)(app, "run", str(root), "--model", str(toy_model), "-o", "runs/a")
    assert done.code == 2
    assert OLD in done.err
    assert "Loading the transformer" not in done.err
