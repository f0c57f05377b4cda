// What stands around the experts of a layer, token by token in float32: norms, residuals, router and output bias.
//
// A row's result does not depend on the rows beside it: each of its sums is in one order.
// Letters: D width, E experts, K chosen ones.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ffn2moe {

enum class NormKind { none, layer, rms };
enum class Gate { unit, softmax, softmax_topk, sigmoid };
enum class Residual { none, input, sum };

struct Norm {
    NormKind kind;
    float epsilon;
    const float *scale, *bias; // [D]
};

// x = norm_in(given + residual), or given without norm_in; y = norm_out(what is added + b_out + experts(x)).
struct Frame {
    int width, num_experts, num_active;
    Gate gate;
    Residual added; // to the experts' output: x, or the sum before norm_in
    Norm norm_in, norm_out;
    const float *router, *router_bias, *choice_bias, *b_out; // [E, D], [E], [E], [D]
};

// Rows of the graph: float32, or bfloat16 (`half`).
struct Given {
    const void* at;
    bool half;
    Given from(size_t number) const { return {static_cast<const char*>(at) + number * (half ? 2 : 4), half}; }
};

struct Taken {
    void* at;
    bool half;
    Taken from(size_t number) const { return {static_cast<char*>(at) + number * (half ? 2 : 4), half}; }
};

struct RowWork {
    // Of each row: x [D], y [D] with all but the experts' output, and the K chosen experts with their gates.
    void (*before)(const Frame&, int rows, Given given, Given residual, float* x, float* y, int32_t* chosen,
                   float* gates);
    // norm_out of y.
    void (*after)(const Frame&, int rows, const float* y, Taken out);
};

// The same work in the instructions of a path, by its name.
const RowWork& row_work(const char* path);

namespace rows_avx512 {
const RowWork& work();
}
namespace rows_avx2 {
const RowWork& work();
}
namespace rows_plain {
const RowWork& work();
}

} // namespace ffn2moe
