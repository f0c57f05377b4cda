"""The stages: paths in, paths out, no arithmetic. Each is `python -m tasks.STAGE`, run by DVC (dvc.yaml)."""
