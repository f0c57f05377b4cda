"""What happens to the experts that a task uses least: one file a method, which holds it as `ROW`."""
