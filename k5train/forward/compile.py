"""How are blocks compiled, and where is compiled code kept for the next start?"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k5cache.shared.errors import RunError
from k5cache.shared.home import check_trusted, make_home
from k5train.forward import attention, block, feed_forward, ops, rotary
from k5train.forward.choices import choose_rows
from k5train.forward.levels import opaque_block, run_at_level

_VARIANTS = 64  # levels x batch sizes x captions of one token or more x training or drawing; torch allows 8


def compile_block() -> Callable[..., Tensor]:
    """``run_at_level``, compiled for what it is first called with."""
    set_up_compiler()
    return torch.compile(run_at_level, fullgraph=True, dynamic=False)


def set_up_compiler() -> None:
    """Set the compiler's options and the folder where it keeps compiled code."""
    import torch._dynamo
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # inductor keeps compiled code in /tmp, which a restart empties; compiling again takes a minute. The import of
    # dynamo has already written that folder to the environment, so only another folder is the user's own choice.
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir()) == default_cache_dir():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(make_home("compiled", 0o700))
    _distrust_headers()
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _VARIANTS)
    config.force_parameter_static_shapes = False  # adapters are parameters, of any rank
    mark_opaque()
    if torch.cuda.is_available():
        choose_rows()
    # It warns once that in-place ops would be wrong under selective checkpointing. A block has none.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)


def _distrust_headers() -> None:
    """Let inductor precompile no headers where another user could have put them before it.

    It keeps those for its CPU kernels in the temporary folder, under a name that anyone can tell, wherever compiled
    code is. Without them a kernel takes some seconds more to compile.
    """
    import torch._inductor.config as inductor
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    folder = Path(default_cache_dir()) / "precompiled_headers"
    try:
        for part in (folder.parent, folder):
            part.mkdir(mode=0o755, exist_ok=True)
        for part in (folder.parent.parent, folder.parent, folder):
            check_trusted(part)
        is_safe = not folder.parent.is_symlink() and not folder.is_symlink()
    except (RunError, OSError):
        is_safe = False
    if not is_safe and hasattr(inductor, "cpp_cache_precompile_headers"):
        inductor.cpp_cache_precompile_headers = False


def mark_opaque() -> None:
    """Tell dynamo not to look into ``opaque_block``, and AOTAutograd's cache by which hash to know it."""
    import torch._inductor.config as inductor

    torch.compiler.allow_in_graph(opaque_block)  # type: ignore[no-untyped-call, unused-ignore]
    # Not in torch 2.7. Without it a later process finds the kernels, but traces the block again.
    if hasattr(inductor, "unsafe_marked_cacheable_functions"):
        sources = "".join(inspect.getsource(module) for module in (block, feed_forward, rotary, ops, attention))
        digest = hashlib.sha256(sources.encode()).hexdigest()
        for named in (opaque_block, block.Attention, block.Block, block.Linears, block.Modes):
            inductor.unsafe_marked_cacheable_functions[f"{named.__module__}.{named.__name__}"] = digest


def import_compiler() -> None:
    """Import what the first compilation imports, and hash torch's and Triton's sources as it does: this takes seconds.

    Meant for a thread beside the reading of weights, which leaves the processor idle. A failure is ignored here: it
    comes again, and is answered, where the compiler is used.
    """
    with suppress(Exception):
        set_up_compiler()
        importlib.import_module("torch._inductor.compile_fx")
        from torch._inductor.codecache import CacheBase, torch_key

        CacheBase.get_system()
        torch_key()
