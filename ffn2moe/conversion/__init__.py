"""The steps of a conversion, in the order in which `ffn2moe.convert.convert` takes them."""
