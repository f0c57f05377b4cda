"""Acceptance tests: minutes to an hour each, so pytest does not collect them. CONTRIBUTING.md lists the commands."""
