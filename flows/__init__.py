"""The order of service: flows drive the DVC stages of dvc.yaml under Prefect."""
