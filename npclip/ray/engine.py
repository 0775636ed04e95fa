"""Bulk embedding in many processes, on one machine or many, by Ray: `npclip embed --engine ray`.

    open_sources -> groups of Items -> workers: read, decode, encode -> store.Writer
    `---------- the driver --------'   `-- one model each --'   `-- the driver --'

Only the driver writes, and in the order of the sources, so a run goes on where another stopped,
whichever engine that had. A group whose worker died, or whose machine did, is done by another.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import platform
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any

from .. import ops, threads
from ..bulk import (
    Embedded,
    Options,
    Report,
    at_least_1,
    collect,
    default_batch,
    embedded,
    let_pillow_open,
    paths,
)
from ..clip import CLIP, load
from ..errors import BackendError, CheckpointError, InputError, ModelNotFoundError
from ..hub import available_models
from ..provenance import Provenance
from ..sources import Item, Kind, open_sources
from .groups import Run, import_ray

CPUS = 4  # of a worker, where nobody says: beyond, another one gains more


def embed(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    model: str | os.PathLike[str] = "ViT-B/32",
    kind: Kind = "image",
    *,
    address: str | None = None,
    workers: int | None = None,
    cpus_per_worker: int | None = None,
    device: str | None = None,
    model_dtype: str | None = None,
    download_root: str | os.PathLike[str] | None = None,
    activation: str | None = None,
    dtype: str = "float16",
    format: str = "parquet",
    normalize: bool = True,
    batch: int | None = None,
    column: str | None = None,
    id_column: str | None = None,
    max_pixels: int | None = None,
    fast_decode: bool = False,
    truncate: bool = False,
    on_progress: Callable[[Report], None] | None = None,
) -> Report:
    """As bulk.embed(), with the same result, by the workers of a Ray cluster.

    address: of a cluster, "auto" for the one that this machine belongs to. By default the one that
        ray.init() has connected this process to, else one of this machine alone, for this call.
    workers: processes with a model each; by default a worker for every GPU, or for every
        cpus_per_worker CPUs.
    cpus_per_worker: threads that read and decode, and compute on the CPU; by default as many as
        there are for each worker, up to 4 where workers is not given either.
    model, download_root, activation: as of load(); the driver reads it, too, for its provenance.
    device: "cpu", or "cuda" for a GPU a worker; by default what load() would take in this process.
    model_dtype: the dtype of load(). dtype: of storage.
    batch: items that go to a worker at a time, and through its encoder.
    max_pixels: also allows images of that size where Pillow's own limit is lower.

    Files must have the same paths on all machines, and the model, too, or a name; relative ones
    are looked up in the driver's working directory, where a machine has it.

    Raises what bulk.embed() and load() do, of the workers as well, where a model of another
    SHA-256 is a ProvenanceError; BackendError where ray is missing, where the cluster cannot be
    reached, and where workers die again and again.
    """
    options = Options(kind, normalize, max_pixels, fast_decode, truncate)
    at_least_1(batch=batch, workers=workers, cpus_per_worker=cpus_per_worker)
    import_ray()
    if device not in (None, "cpu", "cuda"):
        raise InputError(f'device must be "cpu" or "cuda" with Ray, not {device!r}')
    if device is None:
        device, model_dtype = ops.resolve(None, model_dtype)
        device = device.partition(":")[0]
    name = os.fspath(model)
    name = name if name in available_models() else os.path.abspath(name)
    dtype_or_default = model_dtype or ("float32" if device == "cpu" else "float16")
    load_it = partial(
        load,
        name,
        dtype=dtype_or_default,
        download_root=download_root,
        towers=(kind,),
        activation=activation,
    )
    provenance = load_it(device="cpu").provenance(normalize, fast_decode)
    engine = Engine(
        Task(partial(load_it, device=device), options, provenance, os.getcwd()),
        batch or default_batch(kind, device),
        address=address,
        workers=workers,
        cpus=cpus_per_worker,
        on_gpu=device == "cuda",
    )
    return collect(
        open_sources(paths(sources), kind, column=column, id_column=id_column),
        out,
        engine,
        provenance,
        kind,
        dtype=dtype,
        format=format,
        on_progress=on_progress,
    )


@dataclass(frozen=True)
class Task:
    """What a worker needs to know."""

    load: Callable[[], CLIP]
    options: Options
    provenance: Provenance  # of the driver's model
    folder: str  # the driver's working directory


class Worker:
    """An actor: one model in a process of its own."""

    def __init__(self, task: Task, cpus: int) -> None:
        """Nothing that may fail: what an actor's __init__ raises is a lost worker."""
        self._task = task
        threads.set_num_threads(cpus)
        let_pillow_open(task.options.max_pixels)
        with suppress(OSError):  # sources may all be absolute
            os.chdir(task.folder)

    def load(self) -> None:
        """The model. Raises what load() does, and ProvenanceError where it is not the driver's."""
        where = f"on {platform.node()}"
        try:
            self._model = self._task.load()
        except (ModelNotFoundError, CheckpointError) as error:
            needed = "workers need the model under the same path or name as the driver"
            raise type(error)(f"{where}: {error}; {needed}") from error
        options = self._task.options
        found = self._model.provenance(options.normalize, options.fast_decode)
        self._task.provenance.check(found, f"the worker {where}")

    def embed(self, items: list[Item]) -> Embedded:
        """Of a group. What comes back has no data of the items."""
        (some,) = embedded(iter(items), self._model, self._task.options, batch=len(items))
        failed = [(_bare(item), reason) for item, reason in some.failed]
        return Embedded([_bare(item) for item in some.items], some.embeddings, failed)


def _bare(item: Item) -> Item:
    return dataclasses.replace(item, read=str)


@dataclass(frozen=True)
class Engine:
    """Items to embeddings, by workers; for bulk.collect. Ray is started when it is called."""

    task: Task
    size: int  # of a group
    address: str | None = None
    workers: int | None = None
    cpus: int | None = None  # of a worker
    on_gpu: bool = False

    def __call__(self, items: Iterator[Item]) -> Generator[Embedded, None, None]:
        """In the order of the items. Raises what embed() says of workers."""
        ray, groups = import_ray(), iter(lambda: list(islice(items, self.size)), [])
        if (first := next(groups, None)) is None:
            return  # a run that was done: nothing is started
        wanted = (self.workers or 1) * (self.cpus or 1)
        with _connected(self.address, max(wanted, threads.available_cpus())):
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            workers, cpus = share_out(nodes, self.workers, self.cpus, self.on_gpu)
            actor = ray.remote(Worker).options(
                num_cpus=cpus,
                num_gpus=1 if self.on_gpu else None,
                max_concurrency=1 + self.on_gpu,  # one group is decoded as another is encoded
            )
            start = partial(actor.remote, self.task, cpus)
            run = Run(chain([first], groups), start, workers)
            try:
                yield from run.results()
            finally:
                run.end()


@contextmanager
def _connected(address: str | None, cpus: int) -> Iterator[None]:
    """To a cluster. One that is started here ends with it, one that the caller has stays."""
    ray = import_ray()
    if ray.is_initialized():
        if address is not None:
            raise InputError("this process has a Ray cluster already: leave the address out")
        yield
        return
    options: dict[str, Any] = {"address": address}
    if address is None:
        options = {"address": "local", "num_cpus": cpus, "include_dashboard": False}
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody was asked
    try:
        ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        raise BackendError(f"Ray: {' '.join(str(error).split())}") from error
    try:
        yield
    finally:
        ray.shutdown()


def share_out(
    nodes: Sequence[Mapping[str, float]], workers: int | None, cpus: int | None, on_gpu: bool
) -> tuple[int, int]:
    """How many workers, and CPUs for each; None is what suits the machines (their resources)."""
    kind = "GPU" if on_gpu else "CPU"
    usable = [node for node in nodes if node.get(kind, 0) >= 1] or [{kind: 1}]
    if cpus is None and on_gpu:
        cpus = int(max(1, min(node.get("CPU", 1) // node["GPU"] for node in usable)))
    elif cpus is None:
        fair = sum(node["CPU"] for node in usable) // workers if workers else CPUS
        cpus = int(max(1, min(fair, *(node["CPU"] for node in usable))))
    if workers is None:
        workers = int(sum(node["GPU"] if on_gpu else node["CPU"] // cpus for node in usable))
    return max(1, workers), cpus
