"""Rules that say what routers read: one file, one row of `ffn2moe.choices.ROUTINGS`."""
