"""Rules that choose the experts of each token: one file, one row of `ffn2moe.choices.SELECTIONS`."""
