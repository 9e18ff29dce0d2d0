"""What the tasks of instrumental regression share: `formulas` all of them, the rest those with covariates.

It is no task: iv, demand and schooling import it beside `_experiment` and `data`, and never one another.
"""
