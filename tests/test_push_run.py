"""What of a run goes to the hub: one LoRA with its page, private, without a credential and without places on this
machine."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from k5cache.shared.console import print_error
from k5cache.shared.credentials import without_credentials
from k5cache.shared.hub import fix_of, without_tokens
from k5train.cli import app
from k5train.options.validation import TrackersConfig, ValidationConfig
from k5train.pictures.saved import save_pictures
from k5train.publish.card import Facts, call_for, card
from k5train.runs.folder import Run
from k5train.training.metadata import metadata
from tests.cli import Cli
from tests.hub_server import TOKEN, Hub, Repository, point_client_at, serving
from tests.parity import PROMPTS
from tests.runs import CONFIG, start_run

# The client's upload of a file by LFS, which xet replaces on the hub itself.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
WANDB_KEY = "0123456789abcdef" * 2 + "deadbeef"
REPO = "models/me/fox"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, toy_cache, toy_model) -> Path:
    """A run of two steps with pictures, trained with credentials in the environment and a tracker."""
    root = tmp_path_factory.mktemp("runs") / "fox"
    drawn = ValidationConfig(
        prompts=PROMPTS[:1], num_inference_steps=1, guidance_scale=1.0, width=32, height=32, before=False
    )
    trackers = TrackersConfig(use=("wandb",), offline=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setenv("WANDB_API_KEY", WANDB_KEY)
        start_run(root, toy_cache("fp32"), toy_model, replace(CONFIG, steps=2, validation=drawn, trackers=trackers))
    return root


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", WANDB_KEY)
    with serving(Hub()) as server:
        point_client_at(server, tmp_path / "downloads", monkeypatch, TOKEN)
        yield server


@pytest.fixture
def run(tmp_path, finished) -> Path:
    shutil.copytree(finished, tmp_path / "fox")
    return tmp_path / "fox"


@pytest.fixture
def cli(tmp_path) -> Cli:
    return Cli(tmp_path)


def test_a_run_is_pushed_private_with_its_pictures_recipe_and_a_page_as_diffusers_writes_it(hub, run, cli):
    base = ("--base-model", "kandinskylab/Kandinsky-5.0-T2I-Lite-sft-Diffusers")
    done = cli(app, "push", "fox", *base)
    assert done.code == 0, done.err
    repository = hub.repositories[REPO]
    assert repository.private
    names = {"README.md", "fox.safetensors", "images/00.png", "recipe.toml", ".gitattributes"}
    assert set(repository.files) == names
    assert repository.files["fox.safetensors"] == (run / "fox.safetensors").read_bytes()
    page = repository.files["README.md"].decode()
    data = ModelCard(page).data.to_dict()
    assert data["base_model"] == "kandinskylab/Kandinsky-5.0-T2I-Lite-sft-Diffusers"
    assert data["library_name"] == "diffusers"
    assert data["pipeline_tag"] == "text-to-image"
    assert {"text-to-image", "diffusers", "lora", "template:sd-lora"} <= set(data["tags"])
    assert data["widget"] == [{"text": PROMPTS[0], "output": {"url": "images/00.png"}}]
    with safe_open(run / "fox.safetensors", framework="pt") as file:
        rows = json.loads(file.metadata()["k5.caches"])[0]["rows"]
    assert f"`{rows[:16]}`" in page
    call = 'pipe.load_lora_weights("me/fox", weight_name="fox.safetensors")'
    assert call in page
    assert done.out.splitlines()[-1] == f"Loads by {call}"
    assert "rank = 2" in repository.files["recipe.toml"].decode()

    again = cli(
        app, "push", "fox", "fox", "--base-model", "kandinskylab/Kandinsky-5.0-T2I-Lite-sft-Diffusers", "--json"
    )
    assert (json.loads(again.out)["files"], json.loads(again.out)["num_there"]) == ([], 4)


def test_no_credential_and_no_place_on_this_machine_is_in_a_run_or_in_what_is_pushed(hub, run, cli, toy_model):
    for path in (p for p in run.rglob("*") if p.is_file()):
        content = path.read_bytes()
        for secret in (TOKEN, WANDB_KEY):
            assert secret.encode() not in content, path
    done = cli(app, "push", "fox", "me/fox")
    assert done.code == 0, done.err
    texts = {name: data for name, data in hub.repositories[REPO].files.items() if not name.endswith(".safetensors")}
    for name, data in {**texts, "out": (done.out + done.err).encode()}.items():
        for secret in (TOKEN, WANDB_KEY, str(toy_model)):
            assert secret.encode() not in data, name
    assert not any("wandb" in name for name in hub.repositories[REPO].files)


def test_a_credential_in_a_prompt_is_hidden_and_one_in_the_header_of_a_lora_is_refused(hub, run, cli):
    folder = Run(run).samples(2)
    save_pictures(folder, [Image.new("RGB", (8, 8))], {"prompts": [f"a fox {WANDB_KEY} {TOKEN}"]})
    assert cli(app, "push", "fox", "me/fox").code == 0
    page = hub.repositories[REPO].files["README.md"].decode()
    assert "a fox (hidden) (hidden)" in page

    other = run / "checkpoints" / "step-000007.safetensors"
    save_file(load_file(run / "fox.safetensors"), other, {"k5.recipe": f"https://me:{WANDB_KEY}@host"})
    done = cli(app, "push", "fox", "me/fox", "--which", "7")
    assert (done.code, "has a credential in its header, and is not pushed" in done.err) == (2, True)


def test_nothing_is_sent_that_the_run_did_not_write_and_nothing_over_what_is_something_else(hub, run, cli, tmp_path):
    hub.repositories["models/me/theirs"] = Repository(private=True)
    hub.repositories["models/me/theirs"].put({"model.safetensors": b"1"})
    assert "me/theirs holds other files" in cli(app, "push", "fox", "me/theirs").err
    assert cli(app, "push", "fox").code == 0
    hub.repositories[REPO].put({"README.md": b"my own"})
    done = cli(app, "push", "fox", "--license", "mit")
    assert (done.code, "your own, which stays" in done.out) == (0, True)
    assert hub.repositories[REPO].files["README.md"] == b"my own"
    hub.repositories[REPO].private = False
    assert "me/fox is public" in cli(app, "push", "fox").err

    (run / "fox.safetensors").write_bytes((run / "fox.safetensors").read_bytes()[:-1] + b"\1")
    assert "is not the file that the run wrote" in cli(app, "push", "fox").err
    assert "There is no" in cli(app, "push", "fox", "--which", "best").err
    hub.requests.clear()
    assert "is not a run" in cli(app, "push", str(tmp_path / "downloads")).err
    assert hub.requests == []


def test_a_dry_run_shows_the_page_and_asks_nobody_and_refusals_end_in_two_lines(hub, run, cli, monkeypatch):
    done = cli(app, "push", "fox", "--dry-run")
    assert (done.code, hub.requests) == (0, []), done.err
    assert "# fox" in done.out
    assert "fox.safetensors" in done.out
    for status, fix in ((401, "Log in with"), (403, "Use a token that may do this"), (500, "Check the network")):
        hub.refuse = lambda request, status=status: None if "whoami" in request else status
        done = cli(app, "push", "fox")
        lines = [line for line in done.err.splitlines() if line and not line.startswith("The page names no")]
        assert (done.code, len(lines)) == (2, 2), done.err
        assert fix in lines[1]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "Offline mode is set" in cli(app, "push", "fox").err
    from huggingface_hub.errors import LocalTokenNotFoundError

    assert "Offline mode is set: unset HF_HUB_OFFLINE. Log in with" in fix_of(LocalTokenNotFoundError())


FACTS = Facts(
    "me/x", "x", "x.safetensors", "Kandinsky5I2IPipeline", "lokr", None, 'ohwx: "a|b"\n- c', 3, [], "", {}, {}, []
)


def test_a_page_of_an_edit_model_and_of_a_lokr_says_how_they_load_and_odd_words_stay_words():
    page = card(FACTS)
    data = ModelCard(page).data
    assert (data.pipeline_tag, data.instance_prompt, data.base_model) == ("image-to-image", FACTS.trigger, None)
    assert call_for(FACTS) in page
    assert "load_lora_adapter" in call_for(FACTS)
    assert "from diffusers import Kandinsky5I2IPipeline" in page
    assert "ComfyUI leaves a DoRA's magnitudes out" in card(replace(FACTS, algo="dora"))


def test_the_trigger_of_a_cache_is_in_the_lora_and_on_its_page(hub, run, cli):
    with safe_open(run / "fox.safetensors", framework="pt") as file:
        header = file.metadata()
    assert "modelspec.trigger_phrase" not in header
    recipe = {"model": {"source": "x"}, "selection": {"resolution": 64, "trigger": "ohwx cat"}}
    data = SimpleNamespace(first=SimpleNamespace(manifest=SimpleNamespace(recipe=recipe), kind="t2i"))
    identity = {"transformer": "ab", "train": {}}
    header = metadata(data, CONFIG, identity, Run(run), 7)
    save_file(load_file(run / "fox.safetensors"), run / "checkpoints" / "step-000007.safetensors", header)
    assert cli(app, "push", "fox", "--which", "7").code == 0
    page = hub.repositories[REPO].files["README.md"].decode()
    assert "Use `ohwx cat` in the prompt." in page
    assert ModelCard(page).data.instance_prompt == "ohwx cat"


def test_what_is_a_credential_is_hidden_wherever_it_comes_from(tmp_path, monkeypatch, capsys):
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {WANDB_KEY}\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("MY_SERVICE_API_KEY", "a-key-of-mine")
    monkeypatch.setenv("HF_TOKEN", "an-odd-token-of-a-company")
    harmless = "a fox, shf_wordsandmore, me@host.org, commit 0123456789abcdef"
    for text, shown in (
        (f"key {WANDB_KEY}", "key (hidden)"),
        ("a-key-of-mine", "(hidden)"),
        ("an-odd-token-of-a-company", "(hidden)"),
        ("hf_abcdefgh12345678", "(hidden)"),
        ("https://me:word@host/a", "https://(hidden)@host/a"),
        ("Authorization: Bearer xyz", "Authorization: (hidden)"),
        (harmless, harmless),
    ):
        assert without_credentials(text) == shown
        assert without_tokens(text) == shown
    print_error(f"cannot load https://me:{WANDB_KEY}@host", "again with hf_abcdefgh12345678")
    said = capsys.readouterr().err
    assert WANDB_KEY not in said
    assert "hf_" not in said
    assert os.environ["HF_TOKEN"]
