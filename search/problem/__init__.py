"""The problem of a search: metrics, objectives, limits and their feasibility.

A limit goes through these modules in this order; docs/limits.md has the whole chain up to the exit code:

- ``metric``: the metrics that a limit can bound, with their units, costs and measurements.
- ``limit``: a text such as ``decode@256<=60%`` becomes a ``Limit``.
- ``objective``: a text such as ``latency:decode@256`` becomes an ``Objective``, by the same grammar.
- ``problem``: on a space and devices, limits become ``Constraint`` values: a cost and a bound in base units.
- ``feasibility``: decides if an architecture keeps all constraints; explains conflicts.
- ``dynamic_program``: the least value over a space of one cost without a footprint.
- ``milp``: architectures under several constraints and with footprints, by integer programmes.
- ``integer_program``: the integer programme of one width.
- ``solution_pool`` and ``slot_program``: the architectures with the least scores of blocks under them.
"""
