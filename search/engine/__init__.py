"""The search engine: evaluators, the record of evaluations, the front.

From the command ``formfit search`` to ``front.json``:

1. ``search.cli.search`` merges the options into the run's :class:`search.engine.config.SearchConfig`.
2. ``devices.open_targets`` opens cards and predictors, and refuses limits that cannot be met.
3. ``search.select.search_command`` opens the trained supernet; with ``--verify``, it measures finalists.
4. ``entry.search_supernet`` reads a finished ``front.json``, or makes the evaluators, this process or Ray
   actors (``workers``), and calls ``search.Search.run``, which holds the folder's lock.
5. First a strategy's probes, if it has any (``mip-nsga2``), are evaluated: ``evaluations/part-probes-NNNN``.
   Each generation: the strategy proposes genomes, they are evaluated, ``evaluations/part-NNNN.parquet`` is
   written, the strategy is told the values, and ``study.log`` gets the same as an Optuna study.
6. Re-evaluation: the 64 best on more windows (``part-middle.parquet``), the 32 best of these on the final
   number (``part-front.parquet``).
7. ``make_front`` makes the non-dominated part of the last 32 into ``front.json``.

The same command resumes an interrupted search: parts that exist are read instead of evaluated and told to the
strategy again, which therefore proposes the same genomes.
"""
