"""One module for each subcommand of ``lit-deconv``, imported when that subcommand is chosen.

A module has ``add_arguments(parser)``, which imports nothing heavy, and ``run(options)``.
"""
