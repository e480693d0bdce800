"""Simulated breasts with known labels: `python -m dataset_scripts.phantom`."""
