"""Formulas for the weights of the chosen experts: one file, one row of `ffn2moe.choices.GATES`."""
