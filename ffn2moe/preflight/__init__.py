"""Check a conversion before its work: whether it can be done, what it will do, and what that takes.

Config, headers of weights, tokenizer, the beginning of the corpus and facts of the machine are read, never a weight.
`ffn2moe convert`, `ffn2moe check` and the pipeline ask the same `checks` about the same `Request`.
"""
