"""The command line: `cfol-nb run | train | suite | publish | verify | audit | compare | fetch | list`."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import textwrap
import threading
import time
import traceback
import types
from collections.abc import Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer

from cfol_nb.__main__ import main
from cfol_nb.config import MAX_SIDE

SEEDS, MINUTES = 10_000, 1e6  # at most
_STOPS = {signal.SIGINT, signal.SIGTERM}
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="How robust is the class that is worst off? Class-wise robust accuracy, and CFOL.",
)


def _narrow(table, **how) -> str:
    """A DataFrame as text of at most 80 columns: what does not fit goes below."""
    return table.to_string(line_width=80, **how)


_PRESET = "Settings by name: fast (N-FGSM, 30 epochs, averaged weights, bfloat16); -s wins."
_EXECUTOR = "Where runs are computed: ray or ray:ADDRESS, slurm; options as in ray:auto?cpus=4&gpus=0.5."
_NESTED = "model", "method", "objective", "schedule", "imbalance", "ensembling", "remake", "training_attack"


def _pairs(texts: list[str]) -> dict[str, str]:
    for text in texts:
        name, given, _ = text.partition("=")
        if not given or not all(part.strip() for part in name.split(".")):
            raise ValueError(f"{text!r} is not of the form name=value")
    return dict(t.split("=", 1) for t in texts)


def _settings(dataset: str, texts: list[str], recipe: str | None = None, **values) -> dict:
    """RunConfig's arguments from a preset, from `values` and from texts such as epochs=10 or model.width=16."""
    from cfol_nb.config import RunConfig, preset
    from cfol_nb.headless import parse

    pairs = _pairs(texts)
    values = {"dataset": dataset, **(preset(recipe, pairs.get("dataset", dataset)) if recipe else {}), **values}
    values |= {k: v if k == "dataset" else parse(v) for k, v in pairs.items() if "." not in k}
    for name, text in pairs.items():
        key, _, inner = name.partition(".")
        if inner:
            if key not in _NESTED:
                raise ValueError(f"{key} takes no options, so {name} means nothing")
            held = values.get(key, RunConfig(dataset=values["dataset"]).model_dump()[key])
            held = {} if held is None else held
            if not isinstance(held, str | dict):
                raise ValueError(f"{key}={held!r} has no options, so {name} means nothing")
            values[key] = {**({"name": held} if isinstance(held, str) else held), inner: parse(text)}
    return values


@app.command()
def run(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NOTEBOOK]...", help="Paths, names or numbers (04); all if none.")
    ] = None,
    parameters: Annotated[
        list[str],
        typer.Option(
            "-p",
            "--parameter",
            metavar="NAME=VALUE",
            help="""A parameter of the notebook, as JSON: seeds=2, 'settings={"epochs": 3}'; may be repeated.""",
        ),
    ] = [],  # noqa: B006
    file: Annotated[
        Path | None, typer.Option("-f", "--file", help="YAML file of parameters, as in notebooks/parameters/; -p wins.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder of the executed notebooks; default runs/notebooks.")
    ] = None,
    store: Annotated[
        bool, typer.Option("--store", help="Renew the stored runs in notebooks/ (defaults only).")
    ] = False,
) -> None:
    """Run notebooks headless, and print where they lie and their headlines.

    Examples: cfol-nb run 04 -p seeds=5 -p "dataset=imagefolder:data/cifar10"

    cfol-nb run 00 -p seeds=2 -p 'settings={"epochs": 3}'

    cfol-nb run 01 -f notebooks/parameters/01_short.yaml
    """
    from cfol_nb import headless

    given = {**(headless.from_file(file) if file else {}), **_pairs(parameters)}
    if store and given:
        raise ValueError("--store keeps the run with the notebook's own defaults: leave out -p and -f")
    sources = [headless.find(n) for n in names] if names else headless.notebooks()
    for source in sources:
        headless.typed(source, given)  # all are checked before the first one starts
    known = "" if given else headless.expected([source.stem for source in sources])
    typer.echo(known or "how long this takes is measured on its first steps, and then shown", err=True)
    done = []
    for source in sources:
        start = time.perf_counter()
        typer.echo(f"{source.name} ...", err=True)
        if store:
            headless.store(source)
        else:
            done.append(headless.run(source, out / source.name if out else None, given))
        typer.echo(f"{source.name}: {time.perf_counter() - start:.0f} s", err=True)
    for path in done:
        for text in headless.headlines(path):
            typer.echo(f"\n{path.stem}\n{text.rstrip()}")
    if done:
        typer.echo("\nExecuted notebooks:\n" + "\n".join(f"  {p}" for p in done))


@app.command()
def train(
    dataset: Annotated[str, typer.Option(help="See `cfol-nb list`.")] = "digits",
    method: Annotated[str, typer.Option(help="How classes are treated; several: cfol+dafa.")] = "cfol",
    objective: Annotated[str, typer.Option(help="What is minimised.")] = "at",
    seeds: Annotated[int, typer.Option(min=1, max=SEEDS, help="Runs with seed 0, 1, ...")] = 1,
    preset: Annotated[str | None, typer.Option(help=_PRESET)] = None,
    settings: Annotated[
        list[str],
        typer.Option(
            "-s",
            "--set",
            metavar="NAME=VALUE",
            help=("Any setting of RunConfig, for example epochs=10, eps=8/255, model.width=16, method.drift=100."),
        ),
    ] = [],  # noqa: B006
    recompute: Annotated[bool, typer.Option("--recompute", help="Compute stored runs anew, too.")] = False,
    executor: Annotated[str | None, typer.Option(help=_EXECUTOR)] = None,
) -> None:
    """Train (or load) runs; print the class-wise table of the last weights, and the summary of all kinds of weights.

    Example: cfol-nb train --method cfol --objective trades --seeds 3 -s epochs=20 -s method.drift=100
    """
    from cfol_nb.checks import said
    from cfol_nb.config import RunConfig
    from cfol_nb.distributed import launched, rank
    from cfol_nb.runs import compute
    from cfol_nb.stats import class_table, headline, last_attack, weakest

    shared = {"devices": launched()} if launched() > 1 else {}
    values = _settings(dataset, settings, preset, method=method, objective=objective, **shared)
    first = RunConfig(**values).seed
    configs = [RunConfig(**values | {"seed": first + s}) for s in range(seeds)]
    runs = compute(configs, executor, recompute=recompute)
    if rank():
        return  # the first process of a run on several says it
    outcomes = {f"{method} {objective} {w}": [r.outcomes[w] for r in runs] for w in runs[0].outcomes}
    for r in runs:
        made, attack = r.provenance, last_attack(r.outcomes["last"])
        typer.echo(
            f"{r.folder.name}: {made['seconds']['training']:.0f} s of training, "
            f"{made['images_per_second']:.0f} images per second, {made['peak_memory_mib']} MiB at most, "
            f"weakest class under {attack}: {weakest(r.outcomes['last'])}\n"
            f"{_narrow(class_table(r.outcomes['last']).round(3), index=False)}\n"
            f"{said(r.outcomes['last'].checks.get(attack))}\n"
        )
    typer.echo(
        f"per cent [95 % interval], {len(runs)} run(s)\n{_narrow(headline(outcomes).T)}"
        f"\n\nStored in {runs[0].folder.parent}"
    )


@app.command()
def suite(
    dataset: Annotated[str, typer.Argument(help="See `cfol-nb list`.")] = "cifar10",
    methods: Annotated[
        str, typer.Option(help="Names, comma-separated, in this order.")
    ] = "erm,cfol,cfol-trades,trades",
    seeds: Annotated[
        int, typer.Option(min=1, max=SEEDS, help="Runs per method; all methods once, then all again.")
    ] = 1,
    minutes: Annotated[
        float, typer.Option(min=0, max=MINUTES, help="No run is started that the time left cannot hold.")
    ] = 60,
    paper: Annotated[
        bool, typer.Option("--paper", help="200 epochs, decay at 100 and 150; else 30, one-cycle.")
    ] = False,
    preset: Annotated[str | None, typer.Option(help=_PRESET)] = None,
    results: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder of the JSONs; default results/.")
    ] = None,
    settings: Annotated[
        list[str], typer.Option("-s", "--set", metavar="NAME=VALUE", help="Any setting of RunConfig, as for train.")
    ] = [],  # noqa: B006
    recompute: Annotated[bool, typer.Option("--recompute", help="Compute stored runs anew, too.")] = False,
    executor: Annotated[str | None, typer.Option(help=_EXECUTOR)] = None,
) -> None:
    """Train and evaluate method after method inside a time limit; one JSON per run.

    The same call goes on where an earlier one stopped. Methods: erm, cfol, cfol-trades, trades, fol, cvar, lcvar,
    frl, frl-remargin.

    Example: cfol-nb suite cifar10 --methods erm,cfol --seeds 3 --minutes 120 -s dtype=bfloat16 -s ema=0.999
    """
    from cfol_nb import suite as s
    from cfol_nb.config import choose
    from cfol_nb.stats import headline

    names = list(dict.fromkeys(choose("method of the suite", m.strip(), s.METHODS) for m in methods.split(",")))
    if paper and preset:
        raise ValueError(f"--paper and --preset {preset} are two recipes: choose one")
    values = {**(s.PAPER if paper else {}), **_settings(dataset, settings, preset)}
    if fixed := sorted({"method", "objective", "seed", "seeds"} & set(values)):
        raise ValueError(f"the suite sets {fixed[0]} itself: use --methods and --seeds")
    configs = s.configurations(methods=names, seeds=seeds, **values)
    done = list(s.suite(configs, minutes, results, typer.echo, recompute=recompute, executor=executor))
    groups: dict[str, list] = {}
    for run in done:
        for which, outcomes in run.outcomes.items():
            label = f"{run.config.method['name']} {run.config.objective['name']} {which}"
            groups.setdefault(label, []).append(outcomes)
    if groups:
        typer.echo(_narrow(headline(groups)))
    else:
        raise typer.Exit(1)


@app.command()
def publish(
    names: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Names of `cfol-nb list`; * stands for any text.")
    ],
    results: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder of the JSONs; default results/.")
    ] = None,
    autoattack: Annotated[
        str | None,
        typer.Option(metavar="VERSION", help="Judge the last weights by AutoAttack first: standard or fast."),
    ] = None,
    survivors: Annotated[
        int, typer.Option(min=0, help="So many images that AutoAttack did not break are attacked by FAB and Square.")
    ] = 0,
    weights: Annotated[
        bool, typer.Option("--weights", help="The last weights, too, in half precision: at most 1.5 MB.")
    ] = False,
    executor: Annotated[str | None, typer.Option(help=_EXECUTOR)] = None,
) -> None:
    """Write stored runs to results/, one small JSON each: configuration, provenance, counts and predictions.

    Example: cfol-nb publish "cifar10-*" --autoattack standard
    """
    from fnmatch import fnmatch

    from cfol_nb import suite as s
    from cfol_nb.checks import said
    from cfol_nb.config import choose
    from cfol_nb.files import ROOT
    from cfol_nb.runs import Run, judge, stored, verdicts

    results = results or ROOT / "results"
    results.mkdir(parents=True, exist_ok=True)
    folders = {f.name: f for f in stored()}
    found = {}
    for name in names:
        of_name = {n: f for n, f in folders.items() if fnmatch(n, name)}
        found |= of_name or {name: folders[choose("stored run", name, folders)]}
    runs = [Run.load(f) for f in found.values()]
    if autoattack:
        version = choose("version", autoattack, ("standard", "fast"))
        for eps, norm in dict.fromkeys((r.config.eps, r.config.norm) for r in runs):
            options, alike = {"eps": eps, "norm": norm, "version": version}, []
            for run in (r for r in runs if (r.config.eps, r.config.norm) == (eps, norm)):
                _, kept = verdicts(run, "last").get("autoattack", (None, {}))
                if kept.get("asked") == {**options, "version": "standard"} and version == "fast":
                    typer.echo(f"{run.folder.name}: was judged by the standard version, which is kept")
                else:
                    alike.append(run)
            judge(alike, {"autoattack": options}, executor=executor)
    for run in runs:
        if survivors:
            typer.echo(f"{run.folder.name}: {s.attack_survivors(run, survivors)}")
        typer.echo(s.publish(run, results))
        if weights:
            typer.echo(s.publish_weights(run, results))
        for name, (outcomes, _) in verdicts(run, "last").items():
            if text := said(outcomes.checks.get(name)):
                typer.echo(f"  {name}: {text}")


@app.command()
def verify(
    results: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder of the JSONs; default results/.")
    ] = None,
) -> None:
    """Check every stored file: runs, verdicts, audits, image caches, results/. One line for each that was changed.

    Example: cfol-nb verify
    """
    from cfol_nb import suite as s

    fine, bad = s.verify(results)
    for line in bad:
        typer.echo(line)
    typer.echo(f"{fine} stored files are as they were written, {len(bad)} are not")
    if bad:
        raise typer.Exit(1)


@app.command()
def report(out: Annotated[Path, typer.Option(file_okay=False, help="Folder of the pages.")] = Path("site")) -> None:
    """Turn the executed notebooks into a small site of HTML that needs no network.

    Example: cfol-nb report --out site
    """
    from cfol_nb import headless

    typer.echo(headless.report(out))


# -- code of others runs in a process of its own -----------------------------------------------------------------------


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(3)
    os.killpg(0, signal.SIGKILL)


def _child(pipe: Connection, target, args: tuple) -> None:
    """What runs in the process that `_watched` starts. Only `say` reaches standard output: what is printed here goes to
    standard error. With its session, whatever it starts can be ended with it."""
    os.setsid()
    os.dup2(2, 1)
    multiprocessing.set_start_method(None, force=True)  # the default again, as in any process
    with contextlib.suppress(OSError):  # Linux: where memory ends, this process goes, and no other
        Path("/proc/self/oom_score_adj").write_text("1000")
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def say(*words) -> None:
        pipe.send_bytes(json.dumps(words).encode())

    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # of the parent alone, which may ignore its own
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
        say("done", target(say, *args))
    except BaseException as error:
        kind = "refused" if isinstance(error, ValueError | FileNotFoundError) else "failed"
        with contextlib.suppress(OSError):
            say(kind, type(error).__name__, " ".join(str(error).split())[:1000], traceback.format_exc()[-10_000:])
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(0)  # whatever threads and exit handlers are left


def _watched(target, *args, until: float) -> object:
    """Run `target(say, *args)` in a process of its own, print what it says, and return what it returns, as JSON has it.

    say("doing", text, until): what it does from now on, and the time (of `time.monotonic`) by which that has to end.
    say("print", text): for standard output. ValueError for what it refuses; RuntimeError or TimeoutError, in a sentence
    with what it did, if it fails, ends early or late. It never outlives the call, nor this process.
    """
    context, doing, start = multiprocessing.get_context("spawn"), "starting", time.monotonic()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, target, args))
    resource_tracker.ensure_running()  # or `start` does this, which unblocks both
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)  # they are for this process alone, once there is a child
    process.start()
    sender.close()
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        while True:
            # its end is asked for, since processes that it forked keep the pipe open
            while not receiver.poll(min(max(until - time.monotonic(), 0), 0.5)) and process.is_alive():
                if time.monotonic() >= until:
                    took = time.monotonic() - start
                    raise TimeoutError(f"{doing} did not end within {took:.0f} s: is more time needed (--minutes)?")
            try:
                kind, *words = json.loads(receiver.recv_bytes()) if receiver.poll() else ["end"]
            except (EOFError, ConnectionError):
                kind = "end"
            if kind == "doing":
                doing, until = words
            elif kind == "print":
                typer.echo(words[0])
            elif kind == "done":
                return words[0]
            elif kind == "refused":
                raise ValueError(words[1]) from RuntimeError(words[2])
            elif kind == "failed":
                raise RuntimeError(f"{doing} failed: {': '.join(filter(None, words[:2]))}") from RuntimeError(words[2])
            else:
                process.join()
                code = process.exitcode
                how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
                short = " (was memory short?)" * (code == -signal.SIGKILL)
                raise RuntimeError(f"{doing} ended the process with {how}{short}, before it was done")
    except (KeyboardInterrupt, SystemExit, TimeoutError):
        if process.is_alive():
            os.kill(process.pid, signal.SIGINT)  # so that it leaves no half-written file
            process.join(3)
        raise
    finally:
        process.kill()
        with contextlib.suppress(ProcessLookupError):  # what it started
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


def _place(text: str) -> str:
    """The name of a model, weights or data with the paths in it made absolute, and with the contents of files."""
    parts = []
    for part in text.split(":"):
        path = Path(part).expanduser()
        if path.is_file():
            with open(path, "rb") as f:
                parts.append(hashlib.file_digest(f, "sha256").hexdigest())
        parts.append(str(path.resolve()) if part and path.exists() else part)
    return ":".join(parts)


@app.command()
def audit(
    model: Annotated[
        str,
        typer.Option(
            help="FILE.py:function, FILE.pt (TorchScript), FILE.pt2, FILE.onnx, torchvision:NAME, timm:NAME, hf:NAME "
            "(or a folder), or run:NAME (a stored run)."
        ),
    ],
    data: Annotated[
        str, typer.Option(help="A data set of `cfol-nb list` or imagefolder:PATH; its test split, if it has one.")
    ],
    weights: Annotated[Path | None, typer.Option(help="Of the module: .safetensors, .pt, .pth, .ckpt or .bin.")] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Of torchvision's and timm's networks: they need no weights.")
    ] = False,
    classes: Annotated[
        Path | None, typer.Option(help="Names of the model's outputs in their order, one on a line; else its own.")
    ] = None,
    only: Annotated[
        bool, typer.Option("--only", help="Audit the classes that have images; the model's other outputs compete.")
    ] = False,
    mean: Annotated[str | None, typer.Option(help="That the model subtracts: one number, or R,G,B.")] = None,
    std: Annotated[str | None, typer.Option(help="By which it then divides.")] = None,
    scale: Annotated[
        float | None, typer.Option(help="Of images in [0, 1] before that: 255 for a model of bytes.")
    ] = None,
    bgr: Annotated[bool | None, typer.Option("--bgr/--rgb", help="The model's order of channels.")] = None,
    channels: Annotated[int | None, typer.Option(help="That the model takes: 1 (grey) or 3.")] = None,
    interpolation: Annotated[
        str | None, typer.Option(help="To the model's own size: bilinear, bicubic or nearest.")
    ] = None,
    eps: Annotated[str, typer.Option(help="Radius in the unit of images in [0, 1].")] = "8/255",
    norm: Annotated[str, typer.Option(help="linf or l2.")] = "linf",
    version: Annotated[str, typer.Option(help="Of AutoAttack: standard or fast.")] = "standard",
    seed: Annotated[int, typer.Option(min=0, help="Of the attacks' random draws.")] = 0,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images at a time; default by their size.")] = None,
    surrogate: Annotated[
        str | None, typer.Option(help="Another model, as --model, whose adversarial images are transferred.")
    ] = None,
    black_box: Annotated[
        bool,
        typer.Option("--black-box", help="For models without gradients: Square and HopSkipJump, which need foolbox."),
    ] = False,
    worst_only: Annotated[
        bool, typer.Option("--worst-only", help="Spend on the classes that can still be the worst, until one is left.")
    ] = False,
    minutes: Annotated[
        float | None, typer.Option(min=0, max=MINUTES, help="Stop after so long, with what was found.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Images per class.")] = None,
    image_size: Annotated[int | None, typer.Option(min=1, max=MAX_SIDE, help="Resize to this side.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    compiled: Annotated[bool, typer.Option("--compile", help="Attack a compiled copy; pays in long audits.")] = False,
    out: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder of the page; default runs/audits/MODEL-HASH.")
    ] = None,
    attributes: Annotated[
        Path | None, typer.Option(dir_okay=False, help="CSV or Parquet: image, and columns such as camera or site.")
    ] = None,
    corruptions: Annotated[
        bool, typer.Option("--corruptions", help="Fog, noise and five more, beside the attacks.")
    ] = False,
    images: Annotated[
        bool, typer.Option("--images", help="Keep adversarial images and a list of all images, too.")
    ] = False,
    fail_below: Annotated[
        float | None, typer.Option(min=0, max=1, help="Exit with 3 if the worst class may lie below, by its interval.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print all of it as JSON instead.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print the classes as CSV instead.")] = False,
    latex: Annotated[bool, typer.Option("--latex", help="Print the classes as a LaTeX table instead.")] = False,
) -> None:
    """Audit any model: which class is weakest, how sure is that, what attacks it? Prints it and writes one HTML page.

    The same command goes on where an earlier one stopped. Exit status: 4 if a check of the numbers failed, else 3 with
    --fail-below, else 0.

    Example: cfol-nb audit --model net.py:make --weights net.safetensors --data imagefolder:photos --minutes 30
    """
    given = locals() | {"form": _form(json=json_, csv=csv, latex=latex)}
    start = time.monotonic()  # importing torch, decoding images and loading weights count, too
    if minutes is not None and not minutes < math.inf:
        raise ValueError(f"minutes={minutes}: a finite number is needed")
    until = math.inf if minutes is None else start + 60 * minutes
    raise typer.Exit(_watched(_audit, start, given, until=until))


def _form(**asked: bool) -> str | None:
    """Which form of output was asked for."""
    forms = [name for name, wanted in asked.items() if wanted]
    if len(forms) > 1:
        raise ValueError(f"--{forms[0]} and --{forms[1]} are two forms of the answer: choose one")
    return forms[0] if forms else None


def _numbers(name: str, text: str | None) -> tuple[float, ...] | None:
    """One number, or three with commas between."""
    try:
        return None if text is None else tuple(float(t) for t in text.split(","))
    except ValueError:
        raise ValueError(f"{name}={text}: a number is needed, or three as 0.5,0.5,0.5") from None


def _audit(say, start: float, given: dict) -> int:
    """The command `audit` in its own process: the exit status. given: its arguments."""
    import torch

    from cfol_nb import audit as a
    from cfol_nb import data as d
    from cfol_nb.audit import show
    from cfol_nb.config import choose
    from cfol_nb.corruptions import CORRUPTIONS
    from cfol_nb.files import runs_dir
    from cfol_nb.headless import parse

    model, data, weights, minutes = (given[k] for k in ("model", "data", "weights", "minutes"))
    if (device := choose("device", given["device"], ("auto", "cpu", "cuda"))) == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda: there is no CUDA device here")
    if isinstance(radius := parse(given["eps"]), bool) or not isinstance(radius, int | float):
        raise ValueError(f"eps={given['eps']}: a number is needed, such as 8/255")
    if given["black_box"] and given["form"]:
        raise ValueError(f"--black-box prints text alone: leave out --{given['form']}")
    if not radius > 0:
        raise ValueError(f"eps={given['eps']}: a radius above 0 is needed")
    preprocessing = {k: _numbers(k, given[k]) for k in ("mean", "std")}
    preprocessing |= {k: given[k] for k in ("scale", "bgr", "channels", "interpolation")}
    known = given["classes"] and a.read_classes(given["classes"])
    end = math.inf if minutes is None else start + 60 * minutes
    side, own = given["image_size"], a.own_transform(model)
    folder_of_files = data.startswith("imagefolder:")
    say("doing", f"reading {data}", end)
    images = d.limit(a.unseen(model, data, side or (folder_of_files and own.resize) or None), given["limit"])
    if folder_of_files and not side and own.side:
        images = a.middle(images, own.side)
    names = images.class_names
    attributes = given["attributes"] and a.read_attributes(given["attributes"], images.files)
    tell = print if given["form"] else functools.partial(say, "print")  # here print goes to standard error
    tell(show.wrapped(f"{len(images)} images of {len(names)} classes, in this order: {', '.join(names)}"))
    asked = [_place(str(given[k])) for k in ("model", "weights", "data")]
    asked += [given[k] for k in ("eps", "norm", "version", "limit", "image_size")]
    asked += [_place(str(given[k])) for k in ("classes", "surrogate")]
    asked += [given[k] for k in (*preprocessing, "only", "seed", "batch_size", "random_weights", "black_box")]
    settings = hashlib.sha256(repr(asked).encode()).hexdigest()[:8]
    title = re.sub(r"[^A-Za-z0-9]+", "-", Path(model).name)
    folder = (given["out"] or runs_dir() / "audits" / f"{title}-{settings}").resolve()
    soon = time.monotonic() + 600 if minutes is None else end
    say("doing", f"loading {model}", soon)
    restore = a.settings()

    def load(source: str, file: Path | None, **more) -> tuple[a.Loaded, list[int], tuple[str, ...], str]:
        loaded = a.load(source, file, len(names), images.images.shape[1], **more)
        loaded.body.to(device)
        k = a.outputs_of(loaded.model.to(device), images.images)
        return loaded, *a.match(names, known or loaded.names, k, only=given["only"])

    random = given["random_weights"]
    more = {"random_weights": random, "preprocessing": preprocessing, "black_box": given["black_box"]}
    loaded, order, outputs, how = load(model, weights and weights.resolve(), **more)
    shape = " x ".join(map(str, images.images.shape[1:]))
    tell(f"images: {shape}; preprocessing in the model: {loaded.transform}")
    said = f"weights: {'; '.join(loaded.said)}\n" if loaded.said else ""
    tell(f"{said}outputs: {len(outputs)}; class order: {how}")
    how_made = {"seed": str(given["seed"]), "preprocessing": str(loaded.transform), "class order": how}
    clean, wrong = a.first_look(loaded, order, images.images, images.labels, outputs)
    if wrong and not random:
        raise ValueError(wrong)
    tell(f"clean accuracy: {clean}")
    net = loaded.ordered(order).to(device)
    if not given["compiled"]:  # there it would be in the way
        net.register_forward_hook(lambda *_: restore())
    other = None
    if given["surrogate"]:
        say("doing", f"loading {given['surrogate']}", soon)
        other, order, *_ = load(given["surrogate"], None)
        other = other.ordered(order).to(device)
    # what a call in time may still take: the last batch, and the gallery
    say("doing", f"attacking {model}", end + max(15, 6 * (minutes or 0)))
    title = f"{model}{f', {weights.name},' if weights else ''} on {data}"
    if given["black_box"]:
        more = {k: v for k in ("norm", "batch_size", "seed") if (v := given[k]) is not None}
        outcomes = a.black_box(net, images.images, images.labels, outputs, eps=float(radius), **more)
        outcomes.save(folder / "outcomes.safetensors")
        page = a.blackbox.write(outcomes, title, folder / "audit.html")
        say("print", f"{a.blackbox.table(outcomes).to_string(index=False)}\n\n{a.blackbox.told(outcomes)}\n\n{page}")
        return 0
    found = a.audit(
        net,
        images.images,
        images.labels,
        outputs,
        eps=float(radius),
        norm=given["norm"],
        version=given["version"],
        name=title,
        worst_only=given["worst_only"],
        minutes=None if minutes is None else max(minutes - (time.monotonic() - start) / 60, 0),
        folder=folder,
        compiled=given["compiled"],
        files=images.files,
        attributes=attributes,
        corruptions=tuple(CORRUPTIONS) * given["corruptions"],
        keep_images=given["images"],
        surrogate=other,
        batch_size=given["batch_size"],
        seed=given["seed"],
        only=given["only"],
    )
    say("doing", "writing the page", math.inf)
    found.outcomes.save(folder / "outcomes.safetensors")
    if given["images"]:
        found.images().to_csv(folder / "images" / "images.csv", index=False)
    page = found.html(
        folder / "audit.html", show.made(net, images.images, images.labels, radius=given["eps"], **how_made)
    )
    form = given["form"]
    say("print", show.rendered(form, found.answer) if form else f"{show.text(found)}\n\n{page}")
    status, why = show.status(found.answer, given["fail_below"])
    if why:
        print(why)
    return status


@app.command()
def compare(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Folders of audits, runs of `cfol-nb list`, published ones, or CSVs."),
    ],
    attack: Annotated[str | None, typer.Option(help="By default the last one that all have.")] = None,
    classes: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Of CSVs with numbers: one name a line, in their order.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(dir_okay=False, help="The page; default runs/compared/MODELS.html.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print all of it as JSON instead.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print the classes as CSV instead.")] = False,
    latex: Annotated[bool, typer.Option("--latex", help="Print the classes as a LaTeX table instead.")] = False,
) -> None:
    """Compare models on the same images, class by class: what changed from the first to each other one, with paired
    tests and intervals. Prints it and writes one HTML page. A CSV has columns label, clean, one for each attack, and
    image, if they have names.

    Example: cfol-nb compare before.csv after.csv --attack pgd20
    """
    from cfol_nb import audit as a
    from cfol_nb.audit import show
    from cfol_nb.files import as_name, runs_dir

    form = _form(json=json_, csv=csv, latex=latex)
    names = classes and [line for line in classes.read_text().splitlines() if line.strip()]
    short = [Path(m).stem if Path(m).exists() else m.removeprefix("run:") for m in models]
    labels = short if len(set(short)) == len(models) else models
    if len(set(labels)) < len(labels):
        raise ValueError(f"{' '.join(models)}: the same model is named twice")
    found = a.compare({k: a.outcomes_of(m, names) for k, m in zip(labels, models, strict=True)}, attack)
    page = found.html(out or runs_dir() / "compared" / f"{as_name('-'.join(short))}.html")
    typer.echo(show.rendered(form, found.answer) if form else f"{found.text()}\n\n{page}")


@app.command()
def fetch(dataset: Annotated[str, typer.Argument(help="One of torchvision's data sets in `cfol-nb list`.")]) -> None:
    """Download a data set into data/ and decode it.

    Example: cfol-nb fetch cifar10
    """
    from cfol_nb.config import choose
    from cfol_nb.data import SOURCES, load

    data = load(choose("data set to fetch", dataset, SOURCES), download=True)
    typer.echo(
        f"{dataset}: {len(data.train)} training and {len(data.test)} test images, {len(data.class_names)} classes"
    )


LISTS = ("data sets", "models", "objectives", "methods", "attacks", "runs", "settings")


@app.command(name="list")
def list_(
    what: Annotated[
        str | None, typer.Argument(help=f"One of: {', '.join(LISTS)}; all but the settings if none.")
    ] = None,
) -> None:
    """Data sets, models, objectives, methods, attacks, stored runs and settings, with their options.

    Examples: cfol-nb list methods

    cfol-nb list settings
    """
    from cfol_nb.attacks import LOSSES
    from cfol_nb.config import choose, keywords
    from cfol_nb.data import DATASETS
    from cfol_nb.methods import GIVEN, METHODS
    from cfol_nb.models import MODELS
    from cfol_nb.objectives import OBJECTIVES
    from cfol_nb.runs import stored

    def entries(made: dict, hidden: set[str]) -> Iterator[tuple[str, str]]:
        for name, make in made.items():
            taken = [f"{k}={p.default!r}" for k, p in keywords(make).items() if k not in hidden]
            said = (inspect.getdoc(make) or "").split("\n\n")[0].replace("\n", " ")
            text = re.split(r"(?<! al)\. ", said)[0].rstrip(".")
            yield name, text + (f"  [{', '.join(taken)}]" if taken else "")

    found = stored()
    attacks = f"in norm linf or l2 with loss {', '.join(LOSSES)}; options eps, step, steps, restarts, random_start"
    lists = {
        "data sets": [("", ", ".join(DATASETS))],
        "models": entries(MODELS, {"num_classes", "channels"}),
        "objectives": entries(OBJECTIVES, set()),
        "methods": [*entries(METHODS, GIVEN), ("", "several in one run: --method cfol+dafa -s method.cfol.drift=100")],
        "attacks": [("pgd", attacks), ("n-fgsm", "in training only (training_attack.k=2.0)")],
        "runs": [("", folder.name) for folder in found],
        "settings": [(name, f"{text}  [{kind}; {usual}]") for name, kind, usual, text in settings()],
    }
    asked = [choose("list", what, LISTS)] if what else LISTS[:-1]
    for title in asked:
        typer.echo({"runs": f"stored runs: {len(found)}"}.get(title, title))
        for name, text in lists[title]:
            indent = 28 if title == "settings" else 20
            typer.echo(
                textwrap.fill(
                    text,
                    80,
                    initial_indent=f"  {name:{indent - 3}} " if name else "  ",
                    subsequent_indent=" " * indent if name else "  ",
                    break_long_words=False,
                    break_on_hyphens=False,
                )
            )
        typer.echo()


def settings() -> list[tuple[str, str, str, str]]:
    """Every setting of RunConfig: name, type, default and what it is; those of its parts as part.name."""
    from pydantic import BaseModel

    from cfol_nb.config import RunConfig

    def kind(of) -> str:
        if get_origin(of) is Annotated:
            return kind(get_args(of)[0])
        if get_origin(of) is Literal:
            return " | ".join(get_args(of))
        if get_origin(of) in (Union, types.UnionType):
            return " | ".join(map(kind, get_args(of)))
        if of is RunConfig:
            return "settings of a run"
        if isinstance(of, type) and issubclass(of, BaseModel):
            return "options"
        if get_origin(of) is dict:
            return "name or options" if get_args(of)[1] is Any else "options by name"
        return {tuple: "list", type(None): "None"}.get(get_origin(of) or of, getattr(of, "__name__", ""))

    def said(value) -> str:
        if isinstance(value, BaseModel):
            value = value.model_dump(exclude_defaults=True) or {"name": value.name}
        if isinstance(value, dict):
            return value["name"] if set(value) == {"name"} else ", ".join(value)
        if isinstance(value, float) and value and round(255 * value, 9) in range(1, 9):
            return f"{255 * value:.0f}/255"
        return f"{value:g}" if isinstance(value, float) else ", ".join(value) if value == () else str(value)

    digits, images = RunConfig(dataset="digits"), RunConfig(dataset="cifar10")
    rows = []

    def add(model: type[BaseModel], before: str) -> None:
        for name, field in model.model_fields.items():
            if model is RunConfig and name != "dataset":
                a, b = said(getattr(digits, name)), said(getattr(images, name))
                usual = a if a == b else f"{a} for digits, else {b}"
            else:
                usual = "needed" if field.is_required() else said(field.get_default(call_default_factory=True))
            rows.append((before + name, kind(field.annotation), usual or "none", field.description or ""))
            for part in (field.annotation, *get_args(field.annotation)):
                if isinstance(part, type) and issubclass(part, BaseModel) and part is not RunConfig:
                    add(part, f"{before}{name}.")

    add(RunConfig, "")
    return rows


if __name__ == "__main__":
    main()
