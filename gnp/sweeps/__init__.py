"""Sweeps: many runs of one config file, each `python -m gnp.train` in a process of its own.

`parameters` reads what is varied, `trials` makes a trial of each combination, `directory` is where
they lie, `jobs` and `search` say which trial is next, `runner` has `processes` train them on
`slots`, `display` shows how far they are (`progress`), and `summary` is the table at the end.
`together` and `group` have one program train several; `slurm` writes an array job instead.
"""
