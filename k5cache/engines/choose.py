"""Which engine runs the passes of an encode? What was asked for is checked before anything is read."""

from __future__ import annotations

from k5cache.encode.engine import Engine
from k5cache.engines.cluster import check_installed
from k5cache.shared.errors import EngineError
from k5cache.shared.gpus import choose_gpus

EMBEDDED, RAY = "embedded", "ray"


def engine_for(name: str | None, address: str | None, gpus: int | None, device: str) -> Engine | None:
    """The engine that the options mean. None: the passes run in this process, on one device.

    Args:
        name: ``embedded`` or ``ray``; None: ``ray`` if an address or a number of GPUs is given.
        device: ``auto``, ``cuda``, ``cuda:1`` or ``cpu``.

    Raises:
        EngineError: the options do not go together, or Ray is not installed.
        K5Error: this machine has not so many GPUs.
    """
    given = [option for option, value in (("--address", address), ("--gpus", gpus)) if value is not None]
    if address is not None and not address.strip():  # of a variable that is not set, perhaps
        raise EngineError(
            "--address is empty", "Give auto or HOST:6379; or leave it out, and a Ray of this machine is started"
        )
    name = name or (RAY if given else EMBEDDED)
    if name not in (EMBEDDED, RAY):
        raise EngineError(f"--engine {name} is not an engine", f"Use {EMBEDDED} or {RAY}")
    if name == EMBEDDED:
        if given:
            raise EngineError(
                f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'} for --engine ray: the embedded engine "
                "uses one GPU",
                "Leave --engine out, or choose the GPU with --device cuda:1",
            )
        return None
    if device.startswith("cuda:"):
        raise EngineError(
            f"--device {device} is one GPU, and --engine ray uses all or --gpus N",
            f"Leave --engine out; or hide the others: CUDA_VISIBLE_DEVICES={device[5:]}",
        )
    if gpus is not None and device == "cpu":
        raise EngineError(f"--gpus {gpus} and --device cpu exclude each other", "Leave one of them out")
    check_installed()
    if gpus is not None and address is None:
        choose_gpus(gpus)
    from k5cache.engines.ray_engine import RayEngine

    return RayEngine(address, gpus)
