"""Drive the DVC stages of dvc.yaml under Prefect: when to run, and when to run again."""
