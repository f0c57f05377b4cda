"""Time the plans of an export on this machine and choose one for each shape."""
