"""Making a card of a kit's result, and fitting the predictor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from latency.card import Card, open_card
from latency.config import ProfileConfig
from latency.device_runner.timing import Timing
from latency.kit.manifest import KIT_RUNTIME, KitManifest, KitModel
from latency.kit.pack import first_ops, mixer_item
from latency.kit.result import Result, ResultGroup, read_result, read_timings, require_design
from latency.predictor.design import ModelRole
from latency.predictor.predictor import Predictor
from latency.profiling import load_prior, require_accurate, settings_digest
from latency.records import Records, model_name
from latency.runtimes.reference import reference_work
from space import Architecture, InputError, Space, Workload
from space.cost import flops, op_flops
from space.onnx.graph import VERSION

Timings = Mapping[str, Timing]


@dataclass(frozen=True)
class MeasuredGroup:
    """A group of a kit that was measured.

    Attributes:
        timings: by name.
        problems: reasons to distrust the group.
    """

    timings: Timings
    problems: Sequence[str]


@dataclass(frozen=True)
class _Wanted:
    """The part of a kit that the device can run."""

    space: Space
    workloads: Sequence[Workload]
    models: Sequence[KitModel]

    def model_names(self, model: KitModel) -> list[str]:
        return [model_name(model.role, model.architecture, w) for w in self.workloads]

    def work(self) -> dict[str, int]:
        """FLOPs of all items by name, the reference work included."""
        found = {
            name: flops(model.architecture, w, self.space.config)
            for model in self.models
            for name, w in zip(self.model_names(model), self.workloads, strict=True)
        }
        found |= reference_work()
        first = self.workloads[0]
        ops = first_ops(self.space)
        return found | {
            name: op_flops(ops[mixer], first, self.space.config) for mixer, name in self.mixer_names().items()
        }

    def mixer_names(self) -> dict[str, str]:
        """Name of the timing that shows that the device runs a mixer, by mixer."""
        return {mixer: f"{mixer_item(op)}|{self.workloads[0]}" for mixer, op in first_ops(self.space).items()}

    def without(self, unsupported: Mapping[str, str]) -> "_Wanted":
        """The part without some mixers."""
        models = [m for m in self.models if not any(x.mixer in unsupported for x in m.architecture.layers)]
        return _Wanted(self.space, self.workloads, models)


def unpack(space: Space, folder: Path, path: Path, prior: str | None = None) -> Predictor:
    """Add the result of a kit to the device's card, and fit the predictor.

    Args:
        space: the space that the kit was packed for.
        folder: folder of the card, with the kit's manifest.
        path: the result.
        prior: name of a known device's card beside this one.

    Returns:
        The predictor, which is also written to the card.

    Raises:
        InputError: the result is not whole, not of this kit, of another device, or holds impossible values.
    """
    manifest = KitManifest.read(folder, space)
    result = read_result(path, manifest.kit, folder.name)
    config = manifest.settings
    require_design(path, result, config.threads, manifest.groups, first_ops(space), ())
    source = load_prior(space, folder.parent, prior, config) if prior else None
    packed = _Wanted(space, config.parsed(space), manifest.models)
    wanted = packed.without(result.unsupported)
    card = open_card(folder.parent, folder.name, result.device)
    # Everything is checked before anything is kept.
    work = packed.work()
    timed = [group for group in result.groups if group.anchor_reference is not None]
    groups = [_measured_group(path, group, work, config) for group in timed]
    chosen = _chosen(path, result, wanted, groups)
    card.unsupported |= result.unsupported
    records = _recorded(card, config, wanted, groups)
    predictor = records.predictor(wanted.workloads, chosen, source)
    if config.max_error is not None:
        require_accurate(predictor, config.max_error, folder.name)
    target = card.predictor_path(space.name, KIT_RUNTIME, config.threads, config.precision)
    inputs = {"settings": settings_digest(config), "card": card.digest, "graphs": str(VERSION)}
    predictor.save(target, inputs)
    return predictor


def _measured_group(
    path: Path, group: ResultGroup, work: Mapping[str, int], config: ProfileConfig
) -> MeasuredGroup:
    timer = config.timer()
    return MeasuredGroup(
        read_timings(path, group, work, (timer.min_rounds, timer.max_rounds)), group.problems
    )


def _chosen(
    path: Path, result: Result, wanted: _Wanted, groups: Sequence[MeasuredGroup]
) -> dict[ModelRole, list[Architecture]]:
    """The measured whole models by role.

    Raises:
        InputError: a mixer is missing, or there are too few models to fit and test on.
    """
    measured = {name for group in groups for name in group.timings}
    for mixer, name in wanted.mixer_names().items():
        if mixer not in result.unsupported and name not in measured:
            raise InputError(f"{path}: lacks {name} that its kit measures")
    chosen: dict[ModelRole, list[Architecture]] = {"optimal": [], "random": [], "held_out": [], "repeat": []}
    for model in wanted.models:
        if measured.issuperset(wanted.model_names(model)):
            chosen[model.role].append(model.architecture)
    if not (chosen["optimal"] and chosen["random"] and chosen["held_out"]):
        lacking = ", ".join(result.unsupported) or "nothing"
        raise InputError(f"{path}: too few whole models ran to fit and test on (the device lacks {lacking})")
    return chosen


def _recorded(card: Card, config: ProfileConfig, wanted: _Wanted, groups: Sequence[MeasuredGroup]) -> Records:
    """The records of a card, extended by the groups."""
    records = Records(card, wanted.space, KIT_RUNTIME, config.threads, config.precision)
    for number, group in enumerate(groups):
        card.problems += group.problems
        names = group.timings.keys()
        models = [
            (model.role, model.architecture)
            for model in wanted.models
            if names >= set(wanted.model_names(model))
        ]
        if models:
            records.add_models(models, wanted.workloads, group.timings, f"kit {number}")
    return records
