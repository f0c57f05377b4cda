// What the operator asks of a path (AMX, AVX-512, AVX2, plain): the layout of packed experts, and three functions.
// ffn2moe/runtime/native/pack.py packs the weights and defines the layout.
//
// Letters: D width, M width of an expert, N outputs and K inputs of a matrix. A panel is 16 outputs of a matrix.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ffn2moe {

enum class Weights { bf16, int8, int4 };
enum class Activations { bf16, int16, int8 }; // what a token's vectors are rounded to: bf16 where the weights are

constexpr int kRows = 16;    // outputs in a panel, tokens in a tile
constexpr int kBlock = 32;   // inputs that share a factor, int4
constexpr int kMiddle = 7;   // is stored for a number of 0, int4
constexpr size_t kLine = 64; // bytes

constexpr int round_up(int value, int step) { return (value + step - 1) / step * step; }

// act(z) = max(z, 0) - g(|z|): of every activation here g is smooth and falls to nothing, so that a polynomial of
// degree 4 on each of 32 equal pieces of [0, limit) has it to about one unit of float32.
constexpr int kPieces = 32;
constexpr int kDegree = 4;
struct Activation {
    alignas(64) float coefficient[kDegree + 1][kPieces]; // of the place within the piece, 0 to 1
    float pieces_per_unit;
    float last; // the largest place, just below kPieces
};

struct Layer {
    Weights weights;
    Activations activations;
    const Activation* activation;
    bool gated;
    int width;        // D
    int expert_width; // M

    int step() const { return weights == Weights::bf16 ? 32 : 64; }
    int width_depth() const { return round_up(width, step()); }
    int expert_depth() const { return round_up(expert_width, step()); }
    int hidden_panels() const { return (expert_width + kRows - 1) / kRows; }
    int output_panels() const { return (width + kRows - 1) / kRows; }
    // Bytes of the numbers of a panel, up to its 16 scales.
    size_t numbers(int depth) const {
        switch (weights) {
        case Weights::bf16: return size_t(depth) * kRows * 2;
        case Weights::int8: return size_t(depth) * kRows;
        default: return size_t(depth) * kRows / 2 + (size_t(depth) / kBlock * kRows + kLine - 1) / kLine * kLine;
        }
    }
    size_t scales() const { return weights == Weights::bf16 ? 0 : kRows * sizeof(float); }
    size_t hidden_bytes() const { return numbers(width_depth()) + scales() + kRows * sizeof(float); } // biases
    size_t output_bytes() const { return numbers(expert_depth()) + scales(); }
    size_t expert_bytes() const {
        return hidden_panels() * hidden_bytes() * (gated ? 2 : 1) + output_panels() * output_bytes();
    }
    const uint8_t* output_at(const uint8_t* expert) const {
        return expert + hidden_panels() * hidden_bytes() * (gated ? 2 : 1);
    }
};

// Vectors of some tokens as the products read them: in tiles of 16 tokens, the last one filled up by zeros.
struct Operand {
    uint8_t* tiles;
    float* scales; // [rows], of whole-numbered operands
    int rows;
    int depth; // K, filled up
};

// Rows of a matrix of float32 [*, width], picked by `index` (none: rows 0, 1, ...).
struct Rows {
    const float* at;
    size_t stride;
    const int32_t* index;
    const float* operator[](int row) const { return at + stride * size_t(index ? index[row] : row); }
};

struct Path {
    const char* name;
    // Bytes of a tile of an operand, for all its depth.
    size_t (*tile_bytes)(const Layer&, int depth);
    void (*load)(const Layer&, const Rows&, int width, const Operand&);
    // Hidden vectors h [rows, stride]: of the panels from `first` up to `last`.
    void (*hidden)(const Layer&, const uint8_t* expert, const Operand& x, int first, int last, float* h, size_t stride);
    // y[index] += gate * W_out h: of the panels from `first` up to `last`.
    void (*output)(const Layer&, const uint8_t* expert, const Operand& h, int first, int last, float* y, size_t stride,
                   const int32_t* index, const float* gates);
    // Around the work of a thread.
    void (*enter)();
    void (*leave)();
};

// A path of this processor by its name; null where it cannot run here.
const Path* amx();
const Path* avx512();
const Path* avx2();
const Path* plain();

// The first of these, or the one that the environment variable FFN2MOE_NATIVE names.
const Path& path_of_this_processor();

} // namespace ffn2moe
