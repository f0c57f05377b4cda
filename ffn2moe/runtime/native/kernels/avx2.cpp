// The plain path, compiled for AVX2 and FMA.
#if defined(__AVX2__)
#include "generic.h"

const ffn2moe::Path* ffn2moe::avx2() {
    static const Path path = {"avx2",          Generic::tile_bytes, Generic::load,   Generic::hidden,
                              Generic::output, Generic::nothing,    Generic::nothing};
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &path : nullptr;
}
#else
#include "kernels.h"
const ffn2moe::Path* ffn2moe::avx2() { return nullptr; }
#endif
