"""YAML for LightningCLI, read with importlib.resources."""
