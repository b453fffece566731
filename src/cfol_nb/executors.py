"""Runs on other machines, through engines that exist: each is a `concurrent.futures.Executor` of a few lines.

What is sent to a worker and what comes back is the business of `runs`; here it is a function and its arguments.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Executor, Future
from urllib.parse import parse_qsl, urlsplit

import torch

from cfol_nb.config import choose
from cfol_nb.files import runs_dir


def chosen(executor: Executor | str | None) -> Executor | str | None:
    """The executor that was given, else the one that CFOL_NB_EXECUTOR names, if any."""
    return executor or os.environ.get("CFOL_NB_EXECUTOR")


def connect(text: str, cpus: int = 1) -> Executor:
    """An executor by name: "ray" starts Ray here, "ray:ADDRESS" joins the cluster at HOST:PORT, or the one that runs on
    this machine ("auto"); "slurm" submits jobs, "slurm:local" starts them here.

    Options follow a question mark: "ray:auto?cpus=4&gpus=0.5" is what each run is given, by default `cpus` and one GPU
    if there are any; those of "slurm?slurm_partition=gpu&gpus_per_node=1&timeout_min=600" are submitit's.
    An executor has `cuda`, whether runs have a GPU, and `places`, how many it runs at a time.
    Raises ValueError for an unknown name or option, a library that is missing, and a cluster that does not answer.
    """
    text, _, query = text.partition("?")
    name, _, address = text.partition(":")
    options = dict(parse_qsl(query, keep_blank_values=True))
    if query and not all(options.values()):
        raise ValueError(f"executor options {query!r}: NAME=VALUE is needed, such as ray?cpus=2")
    if name == "ray" and (odd := options.keys() - {"cpus", "gpus"}):
        raise ValueError(f"executor 'ray' has no option {min(odd)!r} (it has cpus and gpus)")
    for option in options.keys() & {"cpus", "gpus"}:
        if isinstance(value := _number(options[option]), str) or value < 0 or (value == 0 and option == "cpus"):
            raise ValueError(f"executor {name!r}: {option}={value} is no number of them")
    kind = {"ray": RayExecutor, "slurm": SlurmExecutor}[choose("executor", name, ("ray", "slurm"))]
    return kind(address, **{"cpus": cpus, **{k: _number(v) for k, v in options.items()}})


def _number(text: str) -> str | float:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _library(name: str, extra: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"{name} is not installed: pip install 'cfol-nb[{extra}]'") from error


def _call(threads: int, function: Callable, args: tuple):
    """At a worker, whose process has nothing else to do."""
    warnings.simplefilter("ignore")  # who asked hears of it from what comes back
    torch.set_num_threads(max(1, int(threads)))
    return function(*args)


class RayExecutor(Executor):
    """Tasks on a Ray cluster. One whose node dies is done again on another, up to three times."""

    def __init__(self, address: str = "", cpus: float = 1, gpus: float = 1):
        self.ray = ray = _library("ray", "ray")
        if ":" in address:
            where = urlsplit(address if "//" in address else f"//{address}")
            try:
                socket.create_connection((where.hostname, where.port), timeout=10).close()
            except OSError as error:
                raise ValueError(f"no Ray cluster at {address}: {error.strerror or error}") from error
        self.own = not ray.is_initialized()
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            quiet = {"log_to_driver": False, "logging_level": "error", "include_dashboard": None if address else False}
            ray.init(address or "local", ignore_reinit_error=True, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ValueError(f"no Ray cluster at {address or 'this machine'}: {error}") from error
        nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]
        self.cuda = gpus > 0 and any(n.get("GPU", 0) >= gpus for n in nodes)
        share = {"CPU": cpus, "GPU": gpus if self.cuda else 0}
        self.places = sum(int(min(n.get(k, 0) // v for k, v in share.items() if v)) for n in nodes)
        if not self.places:
            self.shutdown()
            raise ValueError(f"executor 'ray': no node has {cpus} CPUs and {share['GPU']} GPUs for a run")
        self.call = ray.remote(num_cpus=cpus, num_gpus=share["GPU"], max_retries=3)(_call)
        self.cpus, self.told = cpus, ray.remote(num_cpus=0)(_Told).remote()

    def submit(self, function: Callable, /, *args) -> Future:
        return self.call.remote(self.cpus, function, args).future()

    def teller(self, job: str) -> Callable[[int, int], None]:
        """What a worker calls with (done, total), and `shares` then says."""
        return _Teller(self.told, job)

    def shares(self) -> dict[str, float]:
        """Of each job that told: how much of it is done."""
        with contextlib.suppress(self.ray.exceptions.RayError):  # its node has died
            return self.ray.get(self.told.all.remote(), timeout=5)
        return {}

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        if self.own:
            self.ray.shutdown()


class _Told:
    def __init__(self):
        self.share: dict[str, float] = {}

    def tell(self, job: str, share: float) -> None:
        self.share[job] = share

    def all(self) -> dict[str, float]:
        return self.share


class _Teller:
    def __init__(self, told, job: str):
        self.told, self.job, self.next = told, job, 0.0

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() >= self.next:
            self.told.tell.remote(self.job, done / total)
            self.next = time.monotonic() + 1


class SlurmExecutor(Executor):
    """Slurm jobs through submitit, which keeps its files in runs/slurm/ and needs that folder to be shared.

    address: "" for Slurm, "local" for processes on this machine. One that Slurm pre-empts is queued again.
    """

    def __init__(self, address: str = "", cpus: int = 1, **options):
        submitit = _library("submitit", "slurm")
        cluster = choose("cluster of slurm", address or "slurm", ("slurm", "local"))
        try:
            self.executor = submitit.AutoExecutor(runs_dir() / "slurm", cluster=cluster)
            self.executor.update_parameters(**{"cpus_per_task": cpus, **options})
        except (RuntimeError, NameError, TypeError, ValueError) as error:
            raise ValueError(f"executor 'slurm': {str(error).strip().splitlines()[0]}") from error
        self.cpus, self.cuda, self.places = cpus, bool(options.get("gpus_per_node")), 1000  # the queue decides
        self.open: dict[Future, object] = {}
        self.over = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def submit(self, function: Callable, /, *args) -> Future:
        future = Future()
        self.open[future] = self.executor.submit(_Again(), self.cpus, function, args)
        return future

    def _watch(self) -> None:
        while not self.over.wait(1):
            for future, job in [(f, j) for f, j in list(self.open.items()) if j.done()]:
                del self.open[future]
                error = job.exception()
                future.set_exception(error) if error else future.set_result(job.result())

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Ends what still runs."""
        self.over.set()
        for job in self.open.values():
            job.cancel()


class _Again:
    """`_call`, submitted anew when it is pre-empted: the run goes on from its checkpoint."""

    def __call__(self, *args):
        return _call(*args)

    def checkpoint(self, *args):
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *args)
