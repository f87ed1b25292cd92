"""What is left to compute when a folder is encoded again?"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from dataclasses import replace
from hashlib import sha256

import pytest

from k5cache.buckets import Bucket, Framing, bucket_table, cover
from k5cache.encode.keys import latent_key, latent_key_of, source_of, text_key, text_key_of
from k5cache.encode.plan import Plan, make_plan
from k5cache.encode.wanted import Probes, Stored, Wanted
from k5cache.options import CacheConfig
from k5cache.sources.items import PictureFile, Skipped, SourceItem, UnreadableImage

VAE, TEXT = {"vae": "aaaa", "resize": "bicubic"}, {"qwen": "bbbb", "max_sequence_length": 512}
TABLE = bucket_table(1024, "native")


def no_mask(item: SourceItem, width: int, height: int) -> str:
    raise AssertionError(f"{item.path} has no mask")


class Folder:
    """A folder in memory: path -> (content, (width, height), captions), and the cache that encoding it leaves."""

    def __init__(self) -> None:
        self.images: dict[str, tuple[str, tuple[int, int], tuple[str, ...]]] = {}
        self.touched: dict[str, int] = {}
        self.probed: list[str] = []
        self.known, self.latents, self.texts, self.prompts = {}, set(), set(), {}
        self.failed: dict[str, str] = {}

    def put(self, path: str, content: str, *captions: str, size: tuple[int, int] = (2000, 2000)) -> None:
        self.images[path] = (content, size, captions or ("a cat",))
        self.touched[path] = len(self.touched) + self.touched.get(path, 0) + 1

    def plan(self, vae=VAE, text=TEXT, prompts=("",), table=TABLE, skipped=(), rehash=False) -> Plan:
        self.probed, self.cleaned = [], []
        items = [
            SourceItem(path, len(content), self.touched[path], 7, captions)
            for path, (content, _, captions) in sorted(self.images.items())
        ]

        def probe(item: SourceItem) -> tuple[str, int, int]:
            self.probed.append(item.path)
            content, size, _ = self.images[item.path]
            if content == "damaged":
                raise UnreadableImage("is damaged")
            return f"hash of {content}", *size

        stored = Stored(
            tuple(self.known.values()),
            self.latents,
            self.texts,
            failed=self.failed,
            prompts=self.prompts if text == TEXT else None,
        )
        wanted = Wanted(items, skipped, prompts, Framing(table), vae, text)
        return make_plan(wanted, stored, Probes(probe, no_mask, self.clean), rehash)

    def encode(self, **options) -> Plan:
        plan = self.plan(**options)
        self.known = {row.path: row for row in plan.rows}
        self.latents |= {job.key for job in plan.latent_jobs}
        self.texts |= {job.key for job in plan.text_jobs}
        self.prompts = plan.prompts
        return plan

    def clean(self, caption: str) -> str:
        self.cleaned.append(caption)
        return caption.strip()


@pytest.fixture
def three() -> Folder:
    """Three images with a caption each, encoded."""
    folder = Folder()
    for name in ("cat", "dog", "owl"):
        folder.put(f"{name}.jpg", name, f"a {name}")
    folder.encode()
    return folder


def summary(plan: Plan) -> dict[str, object]:
    """The counts and lists of a plan that are not empty."""
    said = {
        "latents": [job.path for job in plan.latent_jobs],
        "texts": [job.caption for job in plan.text_jobs],
        "added": list(plan.added), "removed": list(plan.removed), "renamed": list(plan.renamed),
        "changed": list(plan.changed),
        "skipped": list(plan.skipped),
    }  # fmt: skip
    return {name: value for name, value in said.items() if value}


def test_a_new_folder_is_encoded_whole_and_the_prompts_with_it():
    folder = Folder()
    folder.put("cat.jpg", "cat", "a cat")
    folder.put("sub/dog.jpg", "dog", " a dog ", "a hound", size=(4000, 3000))
    plan = folder.plan(prompts=("", "a fox "))
    assert summary(plan) == {
        "latents": ["cat.jpg", "sub/dog.jpg"],
        "texts": ["", "a fox", "a cat", "a dog", "a hound"],
        "added": ["cat.jpg", "sub/dog.jpg"],
    }
    assert (plan.num_reused_latents, plan.num_reused_texts) == (0, 0)
    row = plan.rows[1]
    geometry = cover(4000, 3000, Bucket(1152, 896))
    assert (row.path, row.content_hash, row.num_bytes, row.inode) == ("sub/dog.jpg", "hash of dog", 3, 7)
    assert (row.width, row.height, row.bucket_width, row.bucket_height) == (4000, 3000, 1152, 896)
    assert (row.resized_width, row.resized_height, row.left, row.top, row.flipped) == (1195, 896, 21, 0, False)
    assert row.latent_key == plan.latent_jobs[1].key == latent_key("hash of dog", geometry, VAE)
    assert row.caption_keys == (text_key("a dog", TEXT), text_key("a hound", TEXT))
    assert plan.latent_jobs[1].geometry == geometry


def test_an_unchanged_folder_leaves_nothing_to_do_and_no_image_is_read(three):
    plan = three.plan()
    assert summary(plan) == {}
    assert three.probed == []
    assert plan.rows == tuple(three.known.values())
    assert (plan.num_reused_latents, plan.num_reused_texts) == (3, 4)


def test_one_image_more_is_one_more_to_encode(three):
    three.put("fox.jpg", "fox", "a fox")
    assert summary(three.plan()) == {"latents": ["fox.jpg"], "texts": ["a fox"], "added": ["fox.jpg"]}
    assert three.probed == ["fox.jpg"]


def test_an_edited_caption_is_encoded_alone_and_its_image_is_not_read(three):
    three.images["dog.jpg"] = ("dog", (2000, 2000), ("a spaniel",))
    assert summary(three.plan()) == {"texts": ["a spaniel"], "changed": ["dog.jpg"]}
    assert three.probed == []


def test_an_edited_image_is_encoded_alone(three):
    three.put("dog.jpg", "dog, retouched", "a dog")
    assert summary(three.plan()) == {"latents": ["dog.jpg"], "changed": ["dog.jpg"]}


def test_an_image_that_was_only_touched_is_read_and_not_encoded(three):
    three.put("dog.jpg", "dog", "a dog")
    plan = three.plan()
    assert summary(plan) == {}
    assert three.probed == ["dog.jpg"]
    assert plan.rows[1].mtime_ns == three.touched["dog.jpg"] != three.known["dog.jpg"].mtime_ns


@pytest.mark.parametrize("field", ["num_bytes", "mtime_ns", "inode"])
def test_any_difference_of_size_or_time_or_inode_is_doubt_enough_to_read_the_image(three, field):
    before = three.known["dog.jpg"]
    three.known["dog.jpg"] = replace(before, **{field: getattr(before, field) + 1})
    three.plan()
    assert three.probed == ["dog.jpg"]


def test_rehash_reads_every_image(three):
    assert summary(three.plan(rehash=True)) == {}
    assert three.probed == ["cat.jpg", "dog.jpg", "owl.jpg"]


@pytest.mark.parametrize("is_copied", [True, False])
def test_a_renamed_image_keeps_its_latents_and_is_read_only_when_its_stat_changed(three, is_copied):
    three.put("new/hound.jpg", "dog", "a dog")
    if not is_copied:
        three.touched["new/hound.jpg"] = three.touched["dog.jpg"]
    del three.images["dog.jpg"]
    plan = three.plan()
    assert summary(plan) == {"renamed": [("dog.jpg", "new/hound.jpg")]}
    assert three.probed == (["new/hound.jpg"] if is_copied else [])
    assert plan.num_reused_latents == 3


def test_of_two_copies_that_are_gone_one_is_renamed_and_one_removed(three):
    three.put("dog2.jpg", "dog", "a dog")
    three.encode()
    del three.images["dog.jpg"], three.images["dog2.jpg"]
    three.put("hound.jpg", "dog", "a dog")
    assert summary(three.plan()) == {"renamed": [("dog.jpg", "hound.jpg")], "removed": ["dog2.jpg"]}


def test_captions_that_did_not_change_are_not_cleaned_again(three):
    three.images["dog.jpg"] = ("dog", (2000, 2000), ("a spaniel",))
    three.plan()
    assert three.cleaned == ["a spaniel"]
    three.put("fox.jpg", "fox", "a cat")  # known from another image
    three.plan()
    assert three.cleaned == ["a spaniel"]
    del three.images["fox.jpg"]
    three.plan(text={**TEXT, "max_sequence_length": 256})
    assert three.cleaned == ["", "a cat", "a spaniel", "a owl"]


def test_captions_that_are_divided_elsewhere_are_others(three):
    three.put("fox.jpg", "fox", "a fox\0a vixen")
    three.encode()
    three.images["fox.jpg"] = ("fox", (2000, 2000), ("a fox", "a vixen"))
    assert summary(three.plan()) == {"texts": ["a fox", "a vixen"], "changed": ["fox.jpg"]}


def test_a_deleted_image_leaves_the_rows_and_its_latents_are_found_when_it_comes_back(three):
    dog = three.images.pop("dog.jpg")
    assert summary(three.encode()) == {"removed": ["dog.jpg"]}
    assert list(three.known) == ["cat.jpg", "owl.jpg"]
    three.images["dog.jpg"] = dog
    assert summary(three.plan()) == {"added": ["dog.jpg"]}


def test_an_image_found_twice_is_encoded_once(three):
    three.put("a.jpg", "fox", "a fox")
    three.put("b.jpg", "fox", "a red fox")
    three.put("c.jpg", "cat", "a cat")
    plan = three.plan()
    assert summary(plan) == {
        "latents": ["a.jpg"],
        "texts": ["a fox", "a red fox"],
        "added": ["a.jpg", "b.jpg", "c.jpg"],
    }
    keys = {row.path: row.latent_key for row in plan.rows}
    assert keys["a.jpg"] == keys["b.jpg"]
    assert keys["c.jpg"] == keys["cat.jpg"]
    assert plan.num_reused_latents == 3


def test_a_caption_that_several_images_and_a_prompt_share_is_encoded_once(three):
    for name in "ab":
        three.put(f"{name}.jpg", name, "a fox", " a fox", "a cat")
    plan = three.plan(prompts=("", "a fox"))
    assert summary(plan)["texts"] == ["a fox"]
    assert plan.rows[0].caption_keys == (text_key("a fox", TEXT), text_key("a fox", TEXT), text_key("a cat", TEXT))
    assert plan.num_reused_texts == 4  # the empty prompt, cat, dog, owl


def test_another_vae_recipe_leaves_the_texts_alone(three):
    plan = three.plan(vae={**VAE, "vae": "cccc"})
    everything = ["cat.jpg", "dog.jpg", "owl.jpg"]
    assert summary(plan) == {"latents": everything, "changed": everything}
    assert (plan.num_reused_latents, plan.num_reused_texts) == (0, 4)
    assert three.probed == []


def test_another_text_recipe_leaves_the_latents_alone(three):
    plan = three.plan(text={**TEXT, "max_sequence_length": 256})
    assert summary(plan) == {
        "texts": ["", "a cat", "a dog", "a owl"],
        "changed": ["cat.jpg", "dog.jpg", "owl.jpg"],
    }
    assert (plan.num_reused_latents, plan.num_reused_texts) == (3, 0)


def test_other_buckets_encode_only_the_images_that_fall_into_other_ones(three):
    three.put("wide.jpg", "wide", size=(4000, 2000))
    three.encode()
    assert summary(three.plan(table=bucket_table(1024, "square"))) == {"latents": ["wide.jpg"], "changed": ["wide.jpg"]}


def test_an_unreadable_image_is_skipped_with_its_reason_and_leaves_the_rows(three):
    three.put("dog.jpg", "damaged", "a rare caption")
    plan = three.plan(skipped=[Skipped("fox.jpg", "missing caption")])
    assert summary(plan) == {
        "removed": ["dog.jpg"],
        "skipped": [Skipped("fox.jpg", "missing caption"), Skipped("dog.jpg", "is damaged")],
    }
    assert [row.path for row in plan.rows] == ["cat.jpg", "owl.jpg"]


def test_captions_of_which_cleaning_leaves_nothing_are_not_trained_on_as_the_empty_prompt(three):
    three.put("nbsp.jpg", "nbsp", "\xa0", " ")
    three.put("fox.jpg", "fox", "\xa0", " a fox", "")
    for _ in range(2):
        plan = three.encode()
        assert plan.skipped == (Skipped("nbsp.jpg", "empty caption"),)
        assert {row.path: row.caption_keys for row in plan.rows}["fox.jpg"] == (text_key("a fox", TEXT),)
    assert three.probed == ["nbsp.jpg"]


def test_what_is_known_to_fail_is_skipped_without_a_job_and_kept_only_while_an_image_has_its_key(three):
    three.put("fox.jpg", "fox", "a fox")
    plan = three.plan()
    three.failed = {plan.latent_jobs[0].key: "cannot be read", "of an image that is gone": "cannot be read"}
    plan = three.plan()
    assert summary(plan) == {"skipped": [Skipped("fox.jpg", "cannot be read")]}
    assert plan.failed == dict.fromkeys([*three.failed][:1], "cannot be read")


def test_rows_lost_with_their_shard_are_encoded_again(three):
    three.latents.discard(three.known["cat.jpg"].latent_key)
    three.texts.discard(three.known["owl.jpg"].caption_keys[0])
    assert summary(three.plan()) == {"latents": ["cat.jpg"], "texts": ["a owl"]}


def test_images_smaller_than_their_bucket_are_counted(three):
    three.put("icon.png", "icon", size=(8, 8))
    plan = three.plan()
    assert plan.upscaled == ("icon.png",)


def test_a_key_is_half_the_sha256_of_canonical_json():
    crop = '{"bucket":[1152,896],"flipped":false,"left_top":[21,0],"resized":[1195,896]}'
    written = f'{{"content":"ba7816bf","crop":{crop},"recipe":{{"resize":"bicubic","vae":"aaaa"}}}}'
    assert (
        latent_key("ba7816bf", cover(4000, 3000, Bucket(1152, 896)), VAE) == sha256(written.encode()).hexdigest()[:32]
    )
    written = r'{"caption":"K\u00e4tzchen","recipe":{"max_sequence_length":512,"qwen":"bbbb"}}'
    assert text_key("Kätzchen", TEXT) == sha256(written.encode()).hexdigest()[:32]


def test_the_key_of_an_instruction_has_its_source_and_nothing_else_changes():
    geometry = cover(4000, 3000, Bucket(1152, 896))
    crop = '{"bucket":[1152,896],"flipped":false,"left_top":[21,0],"resized":[1195,896]}'
    recipe = '{"max_sequence_length":512,"qwen":"bbbb"}'
    for view, seen, shape in (
        ("crop", f'{{"content":"ba78","crop":{crop}}}', geometry),
        ("whole", '{"content":"ba78","flipped":false}', geometry),
        ("crop", f'{{"content":"ba78","crop":{crop[:-1]},"stretched":true}}}}', replace(geometry, stretched=True)),
    ):
        key = sha256(f'{{"caption":"make it blue","recipe":{recipe},"source":{seen}}}'.encode()).hexdigest()[:32]
        assert text_key_of("make it blue", recipe, source_of("ba78", shape, view)) == key
    written = f'{{"content":"ba78","crop":{crop[:-1]},"stretched":true}},"recipe":{recipe}}}'
    stretched = replace(geometry, stretched=True)
    assert latent_key_of("ba78", stretched, recipe) == sha256(written.encode()).hexdigest()[:32]


def test_a_key_depends_on_the_content_and_the_crop_and_each_field_of_the_recipe_and_not_on_their_order():
    geometry = cover(4000, 3000, Bucket(1152, 896))
    variants = [
        latent_key("b", geometry, VAE),
        *(latent_key("a", replace(geometry, **{name: getattr(geometry, name) + 1}), VAE)
          for name in ("resized_width", "resized_height", "left", "top")),
        latent_key("a", replace(geometry, flipped=True), VAE),
        latent_key("a", replace(geometry, bucket=Bucket(1152, 880)), VAE),
        latent_key("a", replace(geometry, bucket=Bucket(1136, 896)), VAE),
        *(latent_key("a", geometry, VAE | {name: "other"}) for name in VAE),
        latent_key("a", geometry, VAE | {"posterior": "mean"}),
        latent_key("a", geometry, VAE),
    ]  # fmt: skip
    assert len(set(variants)) == len(variants)
    assert latent_key("a", geometry, dict(reversed(VAE.items()))) == variants[-1]
    assert len({text_key("a", TEXT), text_key("b", TEXT), text_key("a", TEXT | {"qwen": "c"}), text_key("a", VAE)}) == 4


def test_planning_ten_thousand_unchanged_images_takes_well_under_a_second():
    folder = Folder()
    for i in range(10_000):
        folder.put(f"{i:05}.jpg", str(i), f"a photo of number {i}")
    folder.encode()

    def seconds() -> float:
        started = time.process_time()
        assert summary(folder.plan()) == {}
        return time.process_time() - started

    assert min(seconds() for _ in range(3)) < 0.9  # 0.3 s measured; twice that beside ten other processes


def test_planning_needs_no_torch():
    code = "import sys, k5cache.encode.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- flips, random crops, guards and masks ---


def plan_of(*items: SourceItem, known=(), probed=None, masks=frozenset(), **options: object) -> Plan:
    """A plan for images of 2000x2000 pixels, or of the size that starts an item's name."""

    def probe(item: SourceItem) -> tuple[str, int, int]:
        size = re.match(r"(\d+)x(\d+)", item.path) or re.match(r"(\d+)x(\d+)", "2000x2000")
        return f"hash of {item.path}", int(size[1]), int(size[2])

    def probe_mask(item: SourceItem, width: int, height: int) -> str:
        assert item.mask is not None
        if probed is not None:
            probed.append(item.mask.path)
        if item.mask.num_bytes == 0:
            raise UnreadableImage("its mask is empty")
        return f"hash of {item.mask.path}"

    wanted = Wanted(items, [], [""], CacheConfig(**options).framing, VAE, TEXT)
    return make_plan(wanted, Stored(known, masks=masks), Probes(probe, probe_mask, str.strip))


CAT = SourceItem("cat.jpg", 1, 2, 3, ("a cat",), PictureFile("cat.mask.png", 4, 5, 6))


def test_a_flip_is_a_second_row_of_the_same_path_and_another_key():
    plan = plan_of(CAT, flip=True)
    first, second = plan.rows
    assert (first.path, first.flipped, second.path, second.flipped) == ("cat.jpg", False, "cat.jpg", True)
    assert first.latent_key != second.latent_key
    assert first.caption_keys == second.caption_keys
    assert [(job.key, job.geometry.flipped) for job in plan.latent_jobs] == [
        (first.latent_key, False),
        (second.latent_key, True),
    ]
    assert (plan.added, plan.changed, plan.removed) == (("cat.jpg",), (), ())
    again = plan_of(CAT, flip=True, known=plan.rows)
    assert (again.added, again.changed, again.removed, again.rows) == ((), (), (), plan.rows)
    without = plan_of(CAT, known=plan.rows)
    assert (without.added, without.changed, without.removed, without.rows) == ((), (), (), plan.rows[:1])


def test_images_of_one_size_have_random_crops_of_their_own():
    items = [replace(CAT, path=f"3000x1000.{name}.jpg", mask=None) for name in "abcdef"]
    plan = plan_of(*items, crop="random")
    assert {(row.resized_width, row.top) for row in plan.rows} == {(1920, 0)}
    assert len({row.left for row in plan.rows}) == 6
    assert plan.rows == plan_of(*reversed(items), crop="random").rows[::-1]
    assert {row.left for row in plan_of(*items).rows} == {(1920 - 1408) // 2}


def test_images_below_a_guard_are_skipped_with_their_size():
    items = [replace(CAT, path=f"{size}x{size}.jpg", mask=None) for size in (100, 1024, 500)]
    plan = plan_of(*items, minimum_image_size=200)
    assert [row.path for row in plan.rows] == ["1024x1024.jpg", "500x500.jpg"]
    assert plan.skipped == (Skipped("100x100.jpg", "is 100x100 pixels, a side is below minimum_image_size = 200"),)
    assert plan.upscaled == ("500x500.jpg",)
    plan = plan_of(*items, no_upscale=True)
    assert [row.path for row in plan.rows] == ["1024x1024.jpg"]
    assert [skip.path for skip in plan.skipped] == ["100x100.jpg", "500x500.jpg"]
    assert plan.upscaled == ()


def test_a_mask_is_a_job_of_its_own_with_its_images_crops():
    plan = plan_of(CAT, flip=True)
    assert [(job.path, job.geometry) for job in plan.mask_jobs] == [
        ("cat.mask.png", job.geometry) for job in plan.latent_jobs
    ]
    assert [job.key for job in plan.mask_jobs] == [row.mask_key for row in plan.rows]
    crop = '{"bucket":[1024,1024],"flipped":false,"left_top":[0,0],"resized":[1024,1024]}'
    written = f'{{"crop":{crop},"mask":"hash of cat.mask.png"}}'
    assert plan.rows[0].mask_key == sha256(written.encode()).hexdigest()[:32]
    row = plan.rows[0]
    assert (row.mask_hash, row.mask_num_bytes, row.mask_mtime_ns, row.mask_inode) == ("hash of cat.mask.png", 4, 5, 6)


@pytest.mark.parametrize("field", ["num_bytes", "mtime_ns", "inode"])
def test_a_mask_is_read_only_when_its_stat_is_new(field):
    before = plan_of(CAT)
    probed: list[str] = []
    keys = {row.mask_key for row in before.rows}
    same = plan_of(CAT, known=before.rows, probed=probed, masks=keys)
    assert (probed, same.rows, same.mask_jobs) == ([], before.rows, ())
    assert CAT.mask is not None
    touched = replace(CAT, mask=replace(CAT.mask, **{field: 9}))
    plan = plan_of(touched, known=before.rows, probed=probed, masks=keys)
    assert (probed, plan.mask_jobs, plan.changed) == (["cat.mask.png"], (), ())
    assert getattr(plan.rows[0], f"mask_{field}") == 9


def test_a_mask_that_comes_goes_or_is_broken_changes_its_image():
    before = plan_of(CAT)
    bare = replace(CAT, mask=None)
    gone = plan_of(bare, known=before.rows)
    assert (gone.changed, gone.rows[0].mask_key, gone.rows[0].mask_num_bytes) == (("cat.jpg",), None, 0)
    assert plan_of(CAT, known=gone.rows).changed == ("cat.jpg",)
    assert gone.rows[0].latent_key == before.rows[0].latent_key
    broken = plan_of(replace(CAT, mask=PictureFile("cat.mask.png", 0, 5, 6)), known=before.rows)
    assert (broken.rows, broken.skipped) == ((), (Skipped("cat.jpg", "its mask is empty"),))
