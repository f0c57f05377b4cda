"""Native mixture architectures, one file each: the file NAME.py holds the container NAME as `ROW`.

Only an expert's down projection is linear, so only it can be rescaled. A container multiplies the chosen experts by a
gate formula; the down projections are divided by what that formula gives under equal scores. With a router of zeros
the chosen experts of

    softmax        weigh 1/E: scale E, for any K        (Qwen2-MoE without renormalisation)
    softmax_topk   weigh 1/K: scale K, for that K only  (Mixtral, Qwen3-MoE, GraniteMoe)
    sigmoid        weigh 1/2: scale 2, for any K        (GLM4-MoE without renormalisation)

so that K = E is the dense model exactly. Tensor names are those that transformers' own `save_pretrained` writes; vLLM,
SGLang and llama.cpp read the same names. docs/containers.md gives the reason for each rule.
"""
