"""What is answered for the URLs of data: folders and caches, pictures, captions, what comes in, and the encode."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import cast

from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request
from starlette.responses import Response

from k5cache.options import CacheConfig, with_source_dir
from k5cache.shared.errors import CacheError, K5Error, RecipeError
from k5cache.sources.folder import ImageEntry
from k5cache.sources.items import METADATA, UnreadableImage
from k5train.ui import actions, listing
from k5train.ui.data import (
    cache_pictures,
    cache_view,
    folder_pictures,
    folder_view,
    item_view,
    limits,
    options,
    origin,
    panel,
    state,
    uploads,
)
from k5train.ui.data import captions as caption_editor
from k5train.ui.data.cache_pictures import What
from k5train.ui.data.commands import argv
from k5train.ui.data.opened import LARGE, open_index
from k5train.ui.data.query import Query, read_query
from k5train.ui.data.thumbnails import as_reason, placeholder
from k5train.ui.events import stream
from k5train.ui.jobs import queue
from k5train.ui.listing import NotHere
from k5train.ui.pages import project_of, render
from k5train.ui.project import Project
from k5train.ui.static_files import UNCHANGING
from k5train.ui.templating import fragment

Buttons = Callable[[Collection[str]], dict[str, object]]
_WHATS = ("tile", "crop", "source", "whole")


def data(request: Request) -> Response:
    """All folders and caches."""
    return render(request, "data.html", overview=state.overview(project_of(request)))


def make_folder(request: Request, form: FormData) -> Response:
    """A new folder under ``datasets/``."""
    made = uploads.new_folder(project_of(request), actions.text(form, "name", 300))
    return actions.redirect(f"/data/f/{made.id}", "folder")


# A folder of pictures


class _Folder:
    """A folder that a request is about, with the options that it is shown with."""

    def __init__(self, request: Request, is_fresh: bool = True) -> None:
        self.project = project_of(request)
        self.entry = listing.find(listing.folders(self.project), request.path_params["id"])
        self.cache = state.first_cache(self.project, self.entry)
        self.base, self.kind = options.safe_base(self.cache)
        if self.cache is None and any((self.entry.path / name).is_file() for name in METADATA):
            self.base = CacheConfig(caption_strategy="metadata")
        self.problem: RecipeError | None = None
        self.config = self.base
        try:
            self.config = options.with_values(self.base, request.query_params)
        except RecipeError as error:
            self.problem = error
        self.tried = options.changes(self.base, self.config)
        self.listing = self.list(self.config, is_fresh)

    def list(self, config: CacheConfig, is_fresh: bool) -> folder_view.Listing:
        """What the folder holds."""
        config = state.folder_config(self.project, self.cache, config, self.entry)
        return folder_view.list_folder(self.project, self.entry, config, self.kind, is_fresh)

    @property
    def extra(self) -> str:
        """``&resolution=512``: the options that are tried, behind other values of a URL."""
        return Query(rest=self.tried).url().replace("?", "&", 1) if self.tried else ""

    def buttons(self, under_way: Collection[str]) -> dict[str, object]:
        """Of ``data_buttons.html``."""
        is_empty = not self.listing.images and not self.listing.has_tables
        label = "Encode again" if self.cache else "Encode"
        return {"label": label, "is_busy": "encode" in under_way, "is_empty": is_empty, "diff": None}

    @property
    def about(self) -> str:
        """The place of its cache, which may not be there yet."""
        return self.cache.relative if self.cache else f"cache/{self.entry.name}"


def folder(request: Request) -> Response:
    """A folder: its pictures as an encode would take them."""
    return _folder_page(request)


def _folder_page(request: Request, received: list[uploads.Received] | None = None, status: int = 200) -> Response:
    here = _Folder(request)
    query = read_query(request.query_params, here.tried)
    source = here.entry
    caches = [state.cache_state(here.project, cache, source) for cache in origin.caches_of(here.project, source)]
    return render(
        request, "data_folder.html", status, entry=here.entry, listing=here.listing, caches=caches, received=received,
        grid=folder_view.grid(here.listing, query, here.extra), fields=options.form_fields(here.config),
        tried=here.tried, option_problem=here.problem, panel=panel.panel_of(here.project, here.about), cache=here.cache,
        has_captions=any(image.text for image in here.listing.images), most=limits,
        buttons=fragment("data_buttons.html", **here.buttons(panel.under_way(here.project, here.about))),
    )  # fmt: skip


def receive(request: Request, form: FormData) -> Response:
    """Pictures that were dropped or chosen."""
    project = project_of(request)
    entry = listing.find(listing.folders(project), request.path_params["id"])
    files = [file for file in form.getlist("pictures") if isinstance(file, UploadFile) and file.filename]
    if not files:
        raise actions.BadForm("No file was chosen", "Choose pictures, or drop them on the page")
    received = uploads.receive(project, entry, [uploads.Sent(file.filename or "", file.file) for file in files])
    if not any(one.problem or one.renamed_from for one in received):
        return actions.redirect(f"/data/f/{entry.id}", "received")
    return _folder_page(request, received)


def folder_item(request: Request) -> Response:
    """One picture of a folder."""
    here = _Folder(request)
    image = folder_view.find_picture(here.listing, request.path_params["picture"])
    return _item_page(request, _view(here, here.listing, image, here.extra), here.entry.name)


def _view(here: _Folder, its: folder_view.Listing, image: ImageEntry, extra: str) -> item_view.ItemView:
    item = folder_view.items_of(its, [image])[image.path]
    return item_view.view_of_folder(its, image, folder_view.frame(its, image, item), extra)


def _item_page(
    request: Request, view: item_view.ItemView, name: str, status: int = 200, typed: str | None = None,
    refused: K5Error | None = None, back: tuple[str, str] = ("", ""),
) -> Response:  # fmt: skip
    return render(
        request, "data_item.html", status, view=view, owner=name, typed=typed, refused=refused,
        back_cache=back[0], back_number=back[1],
    )  # fmt: skip


def save_caption(request: Request, form: FormData) -> Response:
    """A caption, into its file; from the page of a folder's picture or of a cache's item."""
    here = _Folder(request)
    its = here.list(here.base, is_fresh=True)
    image = folder_view.find_picture(its, request.path_params["picture"])
    back = (actions.text(form, "cache", 12), actions.text(form, "number", 10))
    typed = actions.text(form, "caption", 1 << 20)
    try:
        caption_editor.save(its, image, typed, actions.text(form, "digest", 64))
    except caption_editor.NotSaved as error:
        view = _view(here, its, image, "")
        return _item_page(request, view, here.entry.name, 409, typed, error, back)
    caches = {cache.id for cache in listing.caches(here.project)}
    if back[0] in caches and back[1].isascii() and back[1].isdigit():
        return actions.redirect(f"/data/c/{back[0]}/{back[1]}", "caption")
    return actions.redirect(f"/data/f/{here.entry.id}/{request.path_params['picture']}", "caption")


def folder_picture(request: Request) -> Response:
    """The crop of a picture, the whole of it, or its source."""
    try:
        here = _Folder(request, is_fresh=False)
        image = folder_view.find_picture(here.listing, request.path_params["picture"])
    except NotHere as error:  # deleted while the page was open
        return _placeholder(error.problem, 404)
    item = folder_view.items_of(here.listing, [image])[image.path]
    framed = folder_view.frame(here.listing, image, item)
    try:
        content = folder_pictures.picture(here.listing, framed, _what(request))
    except (UnreadableImage, OSError) as error:
        return _placeholder(as_reason(error))
    return _picture(request, content, folder_view.version_of(framed))


def encode_folder(request: Request, form: FormData) -> Response:
    """Encode a folder, into a new cache or the one that is there."""
    here = _Folder(request)
    config = options.with_values(here.base, {name: str(value) for name, value in form.items()})
    panel.check_not_under_way(here.project, here.about, "encode")
    changed = options.changes(here.base, config)
    words = argv("encode", here.project, here.entry, here.cache, config, bool(changed))
    queue.add(here.project, words, f"encode {here.entry.name}", "encode", here.about, uses=(here.entry.relative,))
    # Until there is a cache, the pictures go on being shown with the options that they are encoded with.
    return actions.redirect(f"/data/f/{here.entry.id}{Query(rest=changed).url().rstrip('?')}", "encoding")


def folder_events(request: Request) -> Response:
    """How the encode of a folder goes."""
    here = _Folder(request, is_fresh=False)
    return _events(request, here.project, here.about, here.buttons)


def _events(request: Request, project: Project, about: str, buttons: Buttons) -> Response:
    return stream(request, lambda: {
        "job": fragment("data_job.html", panel=panel.panel_of(project, about)),
        "encode-buttons": fragment("data_buttons.html", **buttons(panel.under_way(project, about))),
    })  # fmt: skip


# A cache


class _Cache:
    """A cache that a request is about."""

    def __init__(self, request: Request) -> None:
        self.project = project_of(request)
        self.entry = listing.find(listing.caches(self.project), request.path_params["id"])
        self.project.inside(self.entry.path)
        folders = {folder.id: folder for folder in listing.folders(self.project)}
        chosen = folders.get(request.query_params.get("folder", ""))
        self.source = chosen or origin.source_of(self.project, self.entry)

    def buttons(self, under_way: Collection[str]) -> dict[str, object]:
        """Of ``data_buttons.html``."""
        diff = {"url": f"/data/c/{self.entry.id}/diff", "is_busy": bool(under_way)}
        return {"label": "Encode again", "is_busy": "encode" in under_way, "is_empty": False, "diff": diff}

    def open(self) -> cache_view.Shown:
        """Its index. Raises ``CacheError``."""
        opened = open_index(self.entry.path)
        apart = None
        if opened.cache.kind == "i2i":
            apart = origin.sources_of(self.project, self.entry, self.source)
        return cache_view.Shown(self.project, self.entry, opened, self.source, apart)


def cache(request: Request) -> Response:
    """A cache: its pictures as they are trained on."""
    here = _Cache(request)
    how = state.cache_state(here.project, here.entry, here.source)
    grid, problem = None, None
    try:
        shown = here.open()
        grid = cache_view.grid(shown, read_query(request.query_params))
    except (CacheError, FileNotFoundError) as error:  # not finished yet, or damaged: the state says it
        problem = error if isinstance(error, CacheError) and how.word == "damaged" else None
    base, _ = options.safe_base(here.entry)
    return render(
        request, "data_cache.html", entry=here.entry, how=how, grid=grid, problem=problem, source=here.source,
        fields=options.form_fields(base), panel=panel.panel_of(here.project, here.entry.relative),
        buttons=fragment("data_buttons.html", **here.buttons(panel.under_way(here.project, here.entry.relative))),
        runs=state.used_by(here.project, here.entry), is_large=bool(how.num_items and how.num_items > LARGE),
    )  # fmt: skip


def cache_item(request: Request) -> Response:
    """One item of a cache."""
    here = _Cache(request)
    shown = here.open()
    item = cache_view.read_item(shown, request.path_params["number"])
    its = None
    if here.source and not shown.opened.is_large:
        base, kind = options.safe_base(here.entry)
        config = state.folder_config(here.project, here.entry, base, here.source)
        its = folder_view.list_folder(here.project, here.source, config, kind, shown.opened.has_captions)
    view = item_view.view_of_cache(shown, item, its)
    return _item_page(request, view, here.entry.name, back=(here.entry.id, str(item.number)))


def cache_picture(request: Request) -> Response:
    """The crop of an item under its mask, its source, or the whole picture."""
    try:
        shown = _Cache(request).open()
        row = cache_view.row_of(shown, request.path_params["number"])
    except (NotHere, CacheError, FileNotFoundError):
        return _placeholder("The cache no longer has this picture", 404)
    try:
        content = cache_pictures.picture(shown, row, _what(request))
    except (UnreadableImage, OSError) as error:
        return _placeholder(as_reason(error))
    return _picture(request, content, cache_view.version_of(row))


def encode_cache(request: Request, form: FormData) -> Response:
    """Bring a cache up to date, perhaps with other options."""
    return _run(request, form, "encode", "encoding")


def diff_cache(request: Request, form: FormData) -> Response:
    """Ask what an encode would do."""
    return _run(request, form, "diff", "comparing")


def _run(request: Request, form: FormData, what: str, notice: str) -> Response:
    here = _Cache(request)
    if here.source is None:
        raise NotHere(
            "The folder that this cache was made of is not in the project",
            "Move it to datasets/, under the name of the cache, or encode in a terminal",
        )
    base, _ = options.base_of(here.entry)
    config = options.with_values(base, {name: str(value) for name, value in form.items()})
    panel.check_not_under_way(here.project, here.entry.relative, what)
    kept = with_source_dir(config, None)
    words = argv(
        "encode" if what == "encode" else "diff", here.project, here.source, here.entry, kept,
        bool(options.changes(base, config)),
    )  # fmt: skip
    label = f"encode {here.entry.name}" if what == "encode" else f"compare {here.source.name} with {here.entry.name}"
    queue.add(here.project, words, label, what, here.entry.relative, uses=(here.source.relative,))
    return actions.redirect(f"/data/c/{here.entry.id}", notice)


def cache_events(request: Request) -> Response:
    """How the encode of a cache goes."""
    here = _Cache(request)
    return _events(request, here.project, here.entry.relative, here.buttons)


def _what(request: Request) -> What:
    what = request.query_params.get("what", "tile")
    return cast(What, what) if what in _WHATS else "tile"


def _picture(request: Request, content: bytes, version: str) -> Response:
    """A picture, which a browser keeps for good if its URL names its content."""
    is_versioned = request.query_params.get("v") == version
    return Response(
        content, media_type="image/webp", headers={"Cache-Control": UNCHANGING if is_versioned else "no-store"}
    )


def _placeholder(reason: str, status: int = 200) -> Response:
    """In the place of a picture that there is none of: never a broken one."""
    return Response(placeholder(reason), status, media_type="image/svg+xml", headers={"Cache-Control": "no-store"})
