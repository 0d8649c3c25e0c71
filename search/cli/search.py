"""The command ``search``."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from search.cli.options import Json, RunFolder
from search.cli.output import Bars, make_table, note, show
from space.io.names import check_name

if TYPE_CHECKING:
    from rich.table import Table

    from search.config import RunConfig
    from search.engine.config import SearchConfig
    from search.select.search_command import SearchResult


def search(
    context: typer.Context,
    run: RunFolder,
    device: Annotated[
        list[str],
        typer.Option(
            metavar="NAME",
            help="Device card. Repeatable. A limit without a device applies to the first --device.",
        ),
    ],
    limit: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LIMIT",
            help="'decode@256<=2ms', 'prefill@256<=60%', 'phone:decode@256<=9ms'... Repeatable. Replaces the "
            "limits of the run's configuration.",
        ),
    ] = None,
    objective: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OBJECTIVE",
            help="loss, recall_loss, kl, latency:WORKLOAD, memory:WORKLOAD, rss:WORKLOAD, params or a "
            "registered one. Repeatable.",
        ),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="nsga2, mip-nsga2, hat, random, optuna-nsga2, optuna-tpe or a registered one.",
        ),
    ] = None,
    surrogate: Annotated[bool | None, typer.Option(help="Screen candidates by predicted quality.")] = None,
    generations: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Number of generations.")
    ] = None,
    population: Annotated[
        int | None, typer.Option(min=2, metavar="N", help="Architectures of a generation.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Ray actors that evaluate; 0 evaluates in this process. [default: the run's, or 2]",
        ),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="HOST:PORT of a running Ray cluster, or auto. [default: local]"),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, metavar="N", help="Random seed.")] = None,
    confidence: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Probability that a measured latency or rss stays below the estimate that is compared with "
            "the limit. [default: 0.975]",
        ),
    ] = None,
    baseline: Annotated[
        Literal["none", "random"] | None,
        typer.Option(help="Run random search at equal evaluations too, for the report."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Measure the finalists and search again if they miss a limit.")
    ] = False,
    distill_top: Annotated[
        int, typer.Option(min=0, metavar="K", help="Distil the K best briefly before one is chosen.")
    ] = 0,
    max_noise: Annotated[
        float | None,
        typer.Option(min=0.01, metavar="PERCENT", help="Largest difference of two timings, with --verify."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the search. [default: the first device's]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Search a supernet for the Pareto front under limits. Resumes."""
    from search.config import trained_config
    from search.engine.config import check_search

    run_config = trained_config(run)
    given = {
        "limits": limit and tuple(limit),
        "objectives": objective and tuple(objective),
        "strategy": strategy,
        "surrogate": surrogate,
        "generations": generations,
        "population": population,
        "workers": workers,
        "ray_address": ray_address,
        "seed": seed,
        "confidence": confidence,
        "baseline": baseline,
    }
    config = search_config(run_config, given)
    for given_name in device:
        check_name(given_name, "--device")
    check_name(name or device[0], "--name")
    check_search(config, device)
    if max_noise is not None:
        measuring = run_config.verify.model_copy(update={"max_noise": max_noise / 100})
        run_config = run_config.model_copy(update={"verify": measuring})

    from latency import load_card

    for each in device:
        load_card(context.obj, each)
    # Limits that cannot be met are refused before torch is imported, which takes seconds.
    from search.engine.devices import open_devices

    bars = Bars()
    cards, predictors = open_devices(context.obj, device, run_config.space, run_config.profile, config, bars)

    from search.config import Run
    from search.select.measured_search import require_kept
    from search.select.search_command import require_tuned, search_and_select

    result = search_and_select(
        Run(run, run_config, context.obj), cards, predictors, config, name or device[0], bars,
        verify=verify, distill_top=distill_top,
    )  # fmt: skip
    show(result.to_json(), as_json, lambda: search_tables(result))
    if result.distillation and result.distillation.tuned and not as_json:
        note(f"tuned sub-model: {result.distillation.tuned.folder}")
    if result.measured:
        if result.measured.unmeasured:
            note(result.measured.unmeasured)
        require_kept(result.measured)
    if result.distillation:
        require_tuned(result.distillation)


def search_config(run: "RunConfig", given: Mapping[str, Any]) -> "SearchConfig":
    """A run's search settings, with options in their place.

    Args:
        run: the run's configuration.
        given: values by setting; None leaves the run's.

    Raises:
        InputError: a value is not allowed.
    """
    from search.engine.config import SearchConfig
    from space.io.config import parse

    changes = {name: value for name, value in given.items() if value is not None}
    return parse(SearchConfig, run.search.model_dump() | changes, "search")


def search_tables(result: "SearchResult") -> "list[Table]":
    """The front of a search, its measured finalists and its distilled ones.

    Args:
        result: of the search.
    """
    from search.cli.tables import distilled_table, front_tables

    tables = front_tables(result.front.members, result.front.picks)
    if result.measured:
        chosen = result.measured.chosen
        rows = [
            [
                str(turn),
                finalist.key + (" chosen" if finalist.key == chosen.key else ""),
                f"{finalist.member.loss_nats:.4f}",
                *(f"{value:.3f}" for value in finalist.latency_ms.values()),
                f"{100 * finalist.used:.1f}%",
                finalist.outcome,
            ]
            for turn, one in enumerate(result.measured.rounds, start=1)
            for finalist in one.finalists
        ]
        workloads = (f"{w}, ms" for w in chosen.latency_ms)
        columns = ["round", "key", "loss, nats", *workloads, "of the limit", "limits"]
        tables.append(make_table("Finalists, measured", columns, rows))
    if result.distillation and result.distillation.finalists:
        tables.append(distilled_table(result.distillation.to_json()))
    return tables
