"""What defines a run. No torch here: a configuration can be read, checked and hashed anywhere."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PydanticUserError,
    Tag,
    TypeAdapter,
    ValidationError,
    model_validator,
)


def choose(kind: str, name: str, known: Iterable[str]) -> str:
    """`name` if it is known. Raises ValueError with the nearest names otherwise."""
    known = sorted(known)
    if name in known:
        return name
    near = difflib.get_close_matches(str(name), known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown {kind} {name!r}{hint} (known: {', '.join(known)})")


def keywords(make: Callable) -> dict[str, inspect.Parameter]:
    """The named arguments of a callable; those of a class that passes `**named` on include its parent's."""
    found: dict[str, inspect.Parameter] = {}
    for part in [c.__init__ for c in make.__mro__ if "__init__" in vars(c)] if inspect.isclass(make) else [make]:
        try:
            taken = inspect.signature(part, eval_str=True).parameters.values()
        except Exception:  # annotations that are only there for a type checker
            taken = inspect.signature(part).parameters.values()
        named = {p.name: p for p in taken if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "self"}
        found = {**named, **found}
        if not any(p.kind is p.VAR_KEYWORD for p in taken):
            break
    return found


def options(kind: str, spec: Mapping[str, Any], table: Mapping[str, Callable], given: Iterable[str] = ()) -> dict:
    """The options of `spec` for `table[spec["name"]]`, refused if that callable does not take them.

    `given`: argument names that the program supplies itself, so a user may not. Values must be of the annotated types,
    numbers finite; without an annotation, of the default's type if that is a number, text or a truth value.
    """
    known = {k: p for k, p in keywords(table[choose(kind, spec["name"], table)]).items() if k not in given}
    rest = {k: v for k, v in spec.items() if k != "name"}
    for key, value in rest.items():
        if key not in known:
            raise ValueError(f"{kind} {spec['name']!r} has no option {key!r}; it takes: {', '.join(known) or 'none'}")
        wanted, default = known[key].annotation, known[key].default
        if wanted is known[key].empty:
            wanted = {bool: bool, int: float, float: float, str: str}.get(type(default), Any)
        try:
            of_type(wanted, value)
        except ValidationError:
            shown = getattr(wanted, "__name__", str(wanted)) if inspect.isclass(wanted) else str(wanted)
            raise ValueError(
                f"{key}={value!r} of {kind} {spec['name']!r}: {shown.replace('collections.abc.', '')} is needed"
                + ("" if default in (None, known[key].empty) else f", as in {default!r}")
            ) from None
    return rest


@contextlib.contextmanager
def of_its_kind(what: str, spec: Mapping[str, Any]) -> Iterator[None]:
    """ValueError, with the name, for options of a wrong type."""
    try:
        yield
    except (TypeError, AttributeError, RuntimeError) as error:
        given = ", ".join(f"{k}={v!r}" for k, v in spec.items() if k != "name")
        raise ValueError(f"{what} {spec['name']!r} does not take {given}: {error}") from error


def of_type(kind: Any, value: Any) -> Any:
    """`value`, if it is of this type, strictly: 1 is a float, 1.0 is no int, True is neither, and nan is no number.

    What pydantic cannot check, such as an annotation that names no type, is taken as it is. Raises ValidationError.
    """
    strict = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
    try:
        return TypeAdapter(kind, config=strict).validate_python(value)
    except (PydanticUserError, NameError):  # also of a class that brings its own configuration
        return value


def check_radius(eps: float, norm: str) -> float:
    """A radius in the unit of images in [0, 1]. Raises ValueError for a negative one, or an L-inf one above 1."""
    if not eps >= 0 or (norm == "linf" and eps > 1) or eps == float("inf"):
        raise ValueError(
            f"eps={eps:g} is not a radius for images in [0, 1]: use 0 to 1 for linf"
            + (f" (did you mean {eps:g}/255?)" if 1 < eps <= 255 else ", a finite number >= 0 for l2")
        )
    return eps


def _spec(value: Any) -> Any:
    """'cfol' and {"name": "cfol"} mean the same."""
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, Mapping) and not isinstance(value.get("name"), str):
        raise ValueError(f"{dict(value)} names nothing: give a name, or {{'name': ..., option: ...}}")
    return value


def _plain(value: dict) -> dict:
    for name, given in value.items():
        try:
            json.dumps(given, allow_nan=False)
        except (ValueError, TypeError, RecursionError):
            raise ValueError(f"{name}={given!r} is not what JSON holds: finite numbers, texts, lists of them") from None
    return value


def method_parts(spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The methods of a spec: those of {"name": "a+b", "a.x": 1} are [{"name": "a", "x": 1}, {"name": "b"}]."""
    names = spec["name"].split("+")
    if len(names) == 1:
        return [dict(spec)]
    if twice := [n for n in names if names.count(n) > 1]:
        raise ValueError(f"the method {twice[0]!r} is there twice")
    parts = {name: {"name": name} for name in names}
    for key, value in spec.items():
        name, _, option = key.partition(".")
        if key != "name" and (name not in parts or not option):
            raise ValueError(f"{key}={value!r} is of no method: say of which, as in {names[0]}.{option or key}")
        if key != "name":
            parts[name][option] = value
    return list(parts.values())


def _methods(value: Any) -> Any:
    """One or several methods: "a+b", {"name": "a+b", "a.x": 1} or [{"name": "a", "x": 1}, "b"] are the same, whatever
    their order, and "erm" adds nothing."""
    if isinstance(value, list | tuple):
        parts = [_spec(part) for part in value]
        if not parts or not all(isinstance(part, Mapping) for part in parts):
            return value
        parts = [p for part in parts for p in method_parts(part)]
    elif isinstance(value := _spec(value), Mapping) and "+" in value["name"]:
        parts = method_parts(value)
    else:
        return value
    parts = [p for p in parts if p != {"name": "erm"}] or parts[:1]
    if len(parts) == 1:
        return parts[0]
    parts = sorted(parts, key=lambda part: part["name"])
    name = "+".join(part["name"] for part in parts)
    spec = {"name": name, **{f"{p['name']}.{k}": v for p in parts for k, v in p.items() if k != "name"}}
    method_parts(spec)  # refuses what is there twice
    return spec


def as_json(value: Any, where: str = "") -> Any:
    """The same in Python's own types, as JSON gives them: NumPy's numbers, tuples, and numbers as names of options."""
    if isinstance(value, Mapping):
        for key in value:
            if isinstance(key, bool) or not isinstance(key, int | str):
                raise ValueError(f"{where or dict(value)}: {key!r} is no name")
        return {str(k): as_json(v, f"{where}.{k}" if where else k) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(v, where) for v in value]
    return value.tolist() if hasattr(value, "tolist") else value


_AsTuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
Spec = Annotated[dict[str, Any], BeforeValidator(_spec), AfterValidator(_plain)]
Methods = Annotated[dict[str, Any], BeforeValidator(_methods), AfterValidator(_plain)]


class _Strict(BaseModel):
    """Refuses what it does not know or what is of another type, and in a sentence: ValueError."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def __init__(self, **given):
        try:
            super().__init__(**as_json(given))
        except ValidationError as error:
            said = dict.fromkeys(self._said(e) for e in error.errors())
            raise ValueError("; ".join(said)) from None

    @classmethod
    def _said(cls, error: Mapping[str, Any]) -> str:
        """One of pydantic's errors: the field, and what is wrong."""
        where, kind, what = error["loc"], error["type"], error["msg"].removeprefix("Value error, ")
        if kind == "extra_forbidden":
            what = f"there is no such setting (known: {', '.join(cls.model_fields)})"
        elif kind not in ("missing", "value_error"):
            what += f", got {error['input']!r}"
        return ": ".join([".".join(map(str, where)), what] if where else [what])


class _Ball(_Strict):
    eps: float
    norm: Literal["linf", "l2"] = "linf"

    @model_validator(mode="after")
    def _radius(self):
        check_radius(self.eps, self.norm)
        return self


class Attack(_Ball):
    """PGD as an evaluation: see `cfol_nb.attacks.pgd`. FGSM is steps=1, step=eps, random_start=False."""

    step: float = Field(gt=0)
    steps: int = Field(ge=1)
    loss: Literal["ce", "margin", "normalised-margin", "kl"] = "ce"
    restarts: int = Field(1, ge=1)
    random_start: bool = True
    retire: bool = False

    @property
    def passes(self) -> int:
        """Forward passes of an image; a gradient costs as much as a pass."""
        return self.restarts * (2 * self.steps + 1)


class AutoAttack(_Ball):
    """AutoAttack as an evaluation: see `cfol_nb.autoattack`."""

    version: Literal["standard", "fast"]

    @property
    def passes(self) -> int:
        """Forward passes of an image that is never broken (of 10 classes)."""
        return 9700 if self.version == "standard" else 800


def as_attack(options: Mapping[str, Any] | Attack | AutoAttack) -> Attack | AutoAttack:
    """AutoAttack if there is a version, else PGD. Raises ValueError for what neither takes."""
    return (AutoAttack if "version" in dict(options) else Attack)(**dict(options))


AnyAttack = Annotated[
    Annotated[Attack, Tag("pgd")] | Annotated[AutoAttack, Tag("autoattack")],
    Discriminator(
        lambda v: "autoattack" if isinstance(v, AutoAttack) or (isinstance(v, Mapping) and "version" in v) else "pgd"
    ),
]


class Imbalance(_Strict):
    """Long-tail subsampling: the largest class keeps all, the smallest 1/factor of it."""

    kind: Literal["exp", "step"] = Field(
        "exp", description="sizes fall exponentially, or half of the classes are small"
    )
    factor: float = Field(ge=1, description="size of the largest class over that of the smallest")


class Schedule(_Strict):
    """Learning rate over the run: 'onecycle' (up for 30 %, down to zero), 'cosine', 'step' (x factor at milestones),
    'cyclic' (triangles from zero up to the peak and down again, Smith 2017)."""

    name: Literal["onecycle", "cosine", "step", "cyclic"] = Field(description="its form")
    milestones: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], _AsTuple] = Field(
        (0.5, 0.75), description="of step: where it falls, as fractions of the run"
    )
    factor: float = Field(0.1, gt=0, description="of step: what it is multiplied by there")
    cycles: int = Field(3, ge=1, description="of cyclic: triangles in the run")

    @model_validator(mode="after")
    def _taken(self):
        for field, name in (("milestones", "step"), ("factor", "step"), ("cycles", "cyclic")):
            if name != self.name and getattr(self, field) != type(self).model_fields[field].default:
                raise ValueError(f"schedule {self.name!r} has no option {field!r}: {name!r} has")
        return self

    def __call__(self, progress: float) -> float:
        """Factor on the peak learning rate when `progress` in [0, 1) of the run is done."""
        if self.name == "onecycle":
            return progress / 0.3 if progress < 0.3 else (1 - progress) / 0.7
        if self.name == "cosine":
            import math

            return 0.5 * (1 + math.cos(math.pi * progress))
        if self.name == "cyclic":
            return 1 - abs(2 * (progress * self.cycles % 1) - 1)
        return self.factor ** sum(progress >= m for m in self.milestones)


class Ensembling(_Strict):
    """Temporal ensembling: see `cfol_nb.objectives.TemporalEnsemble`."""

    weight: float = Field(30.0, ge=0, description="of its term in the loss, at the end of the ramp")
    momentum: float = Field(0.9, ge=0, lt=1, description="of the running average of the outputs")
    ramp: float = Field(0.5, gt=0, le=1, description="part of the run in which the weight grows")


class Augment(_Strict):
    """More than crop and flip: see `cfol_nb.data.jitter`. Defaults: the CFOL submission's and its released code's."""

    colour: float = Field(0.25, ge=0, le=1, description="brightness, contrast and saturation: factors 1 -+ so much")
    degrees: float = Field(2.0, ge=0, le=180, description="rotation: up to so much either way")


MAX_SIDE = 4096  # pixels that an image is resized to at most


class TrainingAttack(_Strict):
    """What training images are attacked with: 'pgd', or the single step 'n-fgsm', see `cfol_nb.attacks.n_fgsm`."""

    name: Literal["pgd", "n-fgsm"] = Field("pgd", description="projected gradient descent, or a single step from noise")
    k: float = Field(2.0, ge=0, description="of n-fgsm: the noise reaches k radii; 0 is FGSM")

    @model_validator(mode="after")
    def _taken(self):
        if self.name == "pgd" and self.k != 2.0:
            raise ValueError("training attack 'pgd' has no option 'k': 'n-fgsm' has")
        return self


# What a data set is usually trained with; every value can be given instead.
_COLUMNS = ("model", "eps", "epochs", "batch_size", "lr", "dtype", "holdout")
_DIGITS = dict(zip(_COLUMNS, ("smallcnn", 0.15, 40, 64, 0.2, "float64", 0.1), strict=True)) | {"device": "cpu"}
_IMAGES = dict(zip(_COLUMNS, ("preactresnet18", 8 / 255, 30, 128, 0.1, "float32", 0.1), strict=True))

# Settings by the name of a recipe.
PRESETS = {
    "fast": {
        "training_attack": {"name": "n-fgsm"},
        "epochs": 30,
        "lr": 0.2,
        "schedule": {"name": "cyclic", "cycles": 1},
        "ema": 0.999,
        "dtype": "bfloat16",
        "validate_every": 3,
    }
}


def preset(name: str, dataset: str) -> dict[str, Any]:
    """The settings of a preset. Raises ValueError for one that is unknown or that the data set has not."""
    values = PRESETS[choose("preset", name, PRESETS)]
    if dataset == "digits":
        raise ValueError(
            f"preset {name!r} is for image data sets in bfloat16, digits repeats in float64 and has none: "
            "use the setting training_attack=n-fgsm"
        )
    return values


class RunConfig(_Strict):
    """All that defines a run: the same values on the same device and versions give the same bytes.

    Fields without a default here take the data set's: digits train a small CNN in float64 at an L-inf radius of 0.15
    for 40 epochs of batches of 64, on the CPU, where they repeat everywhere; image data sets a PreActResNet-18 in
    float32 at 8/255 for 30 epochs.
    """

    # data
    dataset: str = Field("digits", description="a data set of `cfol-nb list`, or imagefolder:PATH")
    image_size: int | None = Field(None, ge=8, le=MAX_SIDE, description="resize to this side; None: as stored")
    split_seed: int = Field(0, ge=0, lt=2**63, description="seed of every split made here")
    holdout: float = Field(gt=0, lt=1, description="stratified part of the training split, for selection")
    train_limit: int | None = Field(None, ge=1, description="images per class, before the hold-out is taken")
    test_limit: int | None = Field(None, ge=1, description="test images per class")
    imbalance: Imbalance | None = Field(None, description="long-tail subsampling of the training images")
    without: Annotated[tuple[str, ...], _AsTuple] = Field(
        (), description="names of classes that are left out, in training and test"
    )
    crop: int | None = Field(None, ge=0, description="random crop after padding by so many pixels; None: data set's")
    flip: bool | None = Field(None, description="random horizontal flip; None: data set's")
    augment: Augment | None = Field(None, description="colour jitter and rotation; {} for usual")
    # what is trained
    model: Spec = Field(description="a network of `cfol-nb list`, with options as model.width")
    objective: Spec = Field(
        default_factory=lambda: {"name": "at"}, description="what is minimised: at, clean or trades (objective.beta)"
    )
    method: Methods = Field(
        default_factory=lambda: {"name": "erm"}, description="one, or several: cfol+dafa, with options as cfol.drift"
    )
    ensembling: Ensembling | None = Field(None, description="temporal ensembling beside the objective; {} for usual")
    # what it starts from
    parent: RunConfig | None = Field(None, description="a run whose last weights this one starts from, or uses")
    teacher: RunConfig | None = Field(None, description="a run, of any network, whose last weights teach this one")
    remake: Spec | None = Field(
        None, description="replace the training images by ones with the parent's features: see cfol_nb.features"
    )
    # training attack
    training_attack: Annotated[TrainingAttack, BeforeValidator(_spec)] = Field(
        TrainingAttack(), description="what training images are attacked with"
    )
    norm: Literal["linf", "l2"] = Field("linf", description="norm of the attack's radius")
    eps: float = Field(description="radius in the unit of images in [0, 1]")
    step: float = Field(gt=0, description="attack step; default eps / 4, n-fgsm's is eps")
    steps: int = Field(7, ge=1, description="steps of the training attack; n-fgsm has 1")
    # optimisation
    awp: float | None = Field(
        None, gt=0, le=1, description="adversarial weight perturbation: its size, as a part of each layer's weights"
    )
    epochs: int = Field(ge=1, description="passes over the training images")
    batch_size: int = Field(ge=1, description="images of a step")
    lr: float = Field(gt=0, description="peak of the learning rate")
    optimizer: Literal["sgd", "adam"] = Field("sgd", description="SGD with momentum, or Adam")
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD; Adam's first beta")
    weight_decay: float = Field(5e-4, ge=0, description="L2 penalty on the weights")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all classes")
    schedule: Annotated[Schedule, BeforeValidator(_spec)] = Field(
        Schedule(name="onecycle"), description="learning rate over the run, as a factor on lr"
    )
    dtype: Literal["float64", "float32", "bfloat16"] = Field(description="floating type of the training steps")
    # selection and evaluation
    select: Literal["mean", "worst"] = Field(
        "mean", description="the selected weights are best at this, on the held-out images"
    )
    validate_every: int = Field(
        1, ge=1, description="epochs between two looks at the held-out split, after which methods adapt, too"
    )
    validate_steps: int | None = Field(
        None, ge=1, description="attack steps of such a look; None: as in training (1 if clean, 10 if in a single step)"
    )
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay per step of averaged weights, kept beside the others"
    )
    attacks: dict[str, AnyAttack] = Field(
        description="evaluation attacks by name; default PGD-20 at the training radius"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of weights, order, augmentation and attacks")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU where there is one")
    devices: int = Field(1, ge=1, description="processes that share each batch, a device each")
    engine: Literal["auto", "eager", "compile", "graph"] = Field(
        "auto", description="how a step is computed; auto: eager on the CPU, one CUDA graph on a GPU"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        values = {**(_DIGITS if values.get("dataset", "digits") == "digits" else _IMAGES), **values}
        try:
            eps, norm = of_type(float, values["eps"]), values.get("norm", "linf")
            known = norm in ("linf", "l2")
        except ValidationError:
            known = False
        if not known:
            return {"step": 1.0, "attacks": {}, **values}  # refused below, with the field's name
        check_radius(eps, norm)
        attack = _spec(values.get("training_attack"))
        if (attack.get("name") if isinstance(attack, Mapping) else getattr(attack, "name", "")) == "n-fgsm":
            values = {"step": eps or 1.0, "steps": 1, **values}
        values.setdefault("step", eps / 4 or 1.0)
        values.setdefault(
            "attacks",
            {"pgd20": {"eps": values["eps"], "step": eps / 8 or 1.0, "steps": 20, "norm": values.get("norm", "linf")}},
        )
        return values

    @model_validator(mode="after")
    def _check(self):
        check_radius(self.eps, self.norm)
        if self.training_attack.name == "n-fgsm":
            if self.norm != "linf":
                raise ValueError(f"training_attack='n-fgsm' is for norm='linf': norm={self.norm!r} needs 'pgd'")
            for field, own in (("steps", 1), ("step", self.eps or 1.0)):
                if (given := getattr(self, field)) != own:
                    raise ValueError(
                        f"{field}={given:g}: training_attack='n-fgsm' takes one step of the size eps={self.eps:g}, "
                        f"so leave out {field}"
                    )
        if self.batch_size % self.devices:
            raise ValueError(f"batch_size={self.batch_size} cannot be divided by devices={self.devices}")
        if "clean" in self.attacks:
            raise ValueError("the attack name 'clean' is taken: clean images are always evaluated")
        if self.remake is not None and self.parent is None:
            raise ValueError("remake needs a parent: the run whose features the images shall have")
        for role, run in self.sources().items():
            for field in ("dataset", "without", "image_size", "split_seed", "holdout", "train_limit"):
                if getattr(run, field) != getattr(self, field):
                    raise ValueError(
                        f"the {role} has another {field}: it would have other classes, or have learnt from images that "
                        "are held out here"
                    )
        if self.parent and self.remake is None and self.parent.model != self.model:
            raise ValueError(f"the parent is a {self.parent.model}, this run a {self.model}: its weights do not fit")
        return self

    def sources(self) -> dict[str, RunConfig]:
        """The runs that this one needs: "parent" and "teacher", those that there are."""
        return {k: run for k in ("parent", "teacher") if (run := getattr(self, k))}

    def key(self) -> str:
        """Canonical text of the values that are not defaults: a new field with a default changes no key."""
        return json.dumps(self.model_dump(mode="json", exclude_defaults=True), sort_keys=True)

    def hash(self) -> str:
        """16 hexadecimal digits: the run's identity."""
        return hashlib.sha256(self.key().encode()).hexdigest()[:16]
