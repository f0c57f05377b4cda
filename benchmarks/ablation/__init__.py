"""Every method of the field on the same model, data and budget: `python -m benchmarks.ablation`."""
