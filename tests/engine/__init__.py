"""The engine's tests: rules, the walk, the tape and receptive fields against slow definitions."""
