"""What would an encode do, and what would it take? Takes no lock, loads no model and writes nothing."""

from __future__ import annotations

from dataclasses import dataclass

from rich.progress import Progress

from k5cache.encode.commit import Committer
from k5cache.encode.estimate import Estimate, estimate
from k5cache.encode.plan import Plan
from k5cache.encode.probe import plan_request
from k5cache.encode.request import EncodeOptions, ListedRequest
from k5cache.encode.shares import own_share
from k5cache.shared.device import pick_device
from k5cache.sources.items import Flawed, Skipped
from k5cache.store.manifest import require_files


@dataclass(frozen=True)
class Preview:
    """What an encode would do."""

    differences: tuple[str, ...]
    """Between the cache's recipe and the one asked for: an encode would need ``update``."""
    num_items: int
    num_latents: int
    num_texts: int
    reused_latents: int
    reused_texts: int
    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    """(path before, path now)."""
    skipped: tuple[Skipped, ...] = ()
    upscaled: tuple[str, ...] = ()
    num_multiline: int = 0
    """As in ``find.Source``, and the next."""
    notices: tuple[str, ...] = ()
    stretched: tuple[str, ...] = ()
    """As in ``EncodeReport``, and the next two."""
    turned: tuple[str, ...] = ()
    same_as_target: tuple[str, ...] = ()
    flawed: tuple[Flawed, ...] = ()


def preview_encode(request: ListedRequest, rehash: bool, bars: Progress | None) -> Preview:
    """What an encode would compute, reuse and report."""
    plan = _plan(request, rehash, bars)
    return Preview(
        differences=tuple(map(str, request.differences)),
        num_items=len(plan.rows),
        num_latents=len(plan.latent_jobs),
        num_texts=len(plan.text_jobs),
        reused_latents=plan.num_reused_latents,
        reused_texts=plan.num_reused_texts,
        added=plan.added,
        changed=plan.changed,
        removed=plan.removed,
        renamed=plan.renamed,
        skipped=plan.skipped,
        upscaled=plan.upscaled,
        num_multiline=request.listing.num_multiline,
        notices=request.listing.notices,
        stretched=plan.stretched,
        turned=plan.turned,
        same_as_target=plan.same_as_target,
        flawed=plan.flawed,
    )


def estimate_encode(request: ListedRequest, options: EncodeOptions, bars: Progress | None) -> Estimate:
    """What an encode would take on this machine.

    Raises:
        DoesNotFit: an encoder fits in no mode.
    """
    plan = _plan(request, False, bars)
    device = pick_device(options.device)
    return estimate(request.folder, request.config, device, options.vram, plan.text_jobs, plan.latent_jobs)


def _plan(request: ListedRequest, rehash: bool, bars: Progress | None) -> Plan:
    require_files(request.root, request.manifest)
    share, _ = own_share(request, rehash, bars)
    return plan_request(share, Committer(request.root, request.manifest, 0), rehash, bars)
