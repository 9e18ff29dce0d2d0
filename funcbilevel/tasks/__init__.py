"""Experiments with the library, on its public API only. They need the extra `tasks`.

A task is one folder: `problem.py` (data, networks, objectives), `methods.py` (a table of `Method`s, from which command
line, help, colours, selection and report derive), `train.py` (the list of runs, and what makes a group of them),
`report.py` (a pure function of the records), and `__init__.py` (options and `TASK`). `_experiment` is the engine under
all of them, `data` loads and checks data sets, `_instrumental` is what the instrumental regressions share; no task
imports another. To add one, write the folder and one entry in `cli.TASKS`; CONTRIBUTING says how.
"""
