// The products in float32, written with the compiler's vectors: one source for the plain, the AVX2 and (of bfloat16
// weights) the AVX-512 path. Everything is in an anonymous namespace, as each file compiles it for its own processor.
#pragma once

#include "kernels.h"

#include <cstring>

namespace ffn2moe {
namespace {

typedef float f32x16 __attribute__((vector_size(64), aligned(4)));
typedef int32_t s32x16 __attribute__((vector_size(64), aligned(4)));

struct Generic {
    static size_t tile_bytes(const Layer&, int depth) { return size_t(depth) * kRows * sizeof(float); }

    static void load(const Layer&, const Rows& source, int width, const Operand& operand) {
        float* at = reinterpret_cast<float*>(operand.tiles);
        for (int row = 0; row < operand.rows; ++row, at += operand.depth) {
            std::memcpy(at, source[row], width * sizeof(float));
            std::memset(at + width, 0, (operand.depth - width) * sizeof(float));
        }
    }

    static void hidden(const Layer& layer, const uint8_t* expert, const Operand& x, int first, int last, float* h,
                       size_t stride) {
        const size_t bytes = layer.hidden_bytes();
        for (int panel = first; panel < last; ++panel) {
            const uint8_t* in = expert + panel * bytes * (layer.gated ? 2 : 1);
            for (int row = 0; row < x.rows; row += kTogether) {
                const int count = x.rows - row < kTogether ? x.rows - row : kTogether;
                f32x16 up[kTogether], gate[kTogether];
                product(layer, in, x, row, count, up, true);
                if (layer.gated) product(layer, in + bytes, x, row, count, gate, true);
                for (int r = 0; r < count; ++r) {
                    f32x16 value = activate(*layer.activation, layer.gated ? gate[r] : up[r]);
                    if (layer.gated) value *= up[r];
                    std::memcpy(h + (row + r) * stride + panel * kRows, &value, sizeof value);
                }
            }
        }
    }

    static void output(const Layer& layer, const uint8_t* expert, const Operand& h, int first, int last, float* y,
                       size_t stride, const int32_t* index, const float* gates) {
        const uint8_t* out = layer.output_at(expert);
        for (int panel = first; panel < last; ++panel) {
            const int valid = layer.width - panel * kRows < kRows ? layer.width - panel * kRows : kRows;
            for (int row = 0; row < h.rows; row += kTogether) {
                const int count = h.rows - row < kTogether ? h.rows - row : kTogether;
                f32x16 sum[kTogether];
                product(layer, out + panel * layer.output_bytes(), h, row, count, sum, false);
                for (int r = 0; r < count; ++r) {
                    float* at = y + stride * size_t(index[row + r]) + panel * kRows;
                    for (int n = 0; n < valid; ++n) at[n] += gates[row + r] * sum[r][n];
                }
            }
        }
    }

    static void nothing() {}

  private:
    static constexpr int kTogether = 4;

    // sum[r] = W x_r (+ b): one panel, `count` tokens.
    static void product(const Layer& layer, const uint8_t* panel, const Operand& x, int row, int count, f32x16* sum,
                        bool biased) {
        // Always for four tokens, so that a token's sum does not depend on how many come with it.
        const float* at[kTogether];
        for (int r = 0; r < kTogether; ++r) {
            at[r] = reinterpret_cast<const float*>(x.tiles) + size_t(row + (r < count ? r : 0)) * x.depth;
            sum[r] = f32x16{};
        }
        switch (layer.weights) {
        case Weights::bf16: product_bf16(panel, x.depth, at, sum); break;
        case Weights::int8: product_int8(panel, x.depth, at, sum); break;
        default: product_int4(panel, x.depth, at, sum); break;
        }
        const uint8_t* after = panel + layer.numbers(x.depth);
        f32x16 scale, bias;
        if (layer.weights != Weights::bf16) {
            std::memcpy(&scale, after, sizeof scale);
            for (int r = 0; r < kTogether; ++r) sum[r] *= scale;
            after += sizeof scale;
        }
        if (biased) {
            std::memcpy(&bias, after, sizeof bias);
            for (int r = 0; r < kTogether; ++r) sum[r] += bias;
        }
    }

    static f32x16 from_bits(s32x16 bits) {
        f32x16 value;
        std::memcpy(&value, &bits, sizeof value);
        return value;
    }

    static s32x16 dwords(const uint8_t* at) {
        s32x16 value;
        std::memcpy(&value, at, sizeof value);
        return value;
    }

    static void add(f32x16 weight, int k, const float* const* at, f32x16* sum) {
        for (int r = 0; r < kTogether; ++r) sum[r] += weight * at[r][k];
    }

    static void product_bf16(const uint8_t* panel, int depth, const float* const* at, f32x16* sum) {
        for (int k = 0; k < depth; k += 2, panel += kLine) {
            const s32x16 pair = dwords(panel);
            add(from_bits(pair << 16), k, at, sum);
            add(from_bits(pair & s32x16(s32x16{} + int32_t(0xFFFF0000u))), k + 1, at, sum);
        }
    }

    // Signed bytes at four neighbouring inputs.
    static void add_four(s32x16 four, int k, const float* const* at, f32x16* sum) {
        add(__builtin_convertvector((four << 24) >> 24, f32x16), k, at, sum);
        add(__builtin_convertvector((four << 16) >> 24, f32x16), k + 1, at, sum);
        add(__builtin_convertvector((four << 8) >> 24, f32x16), k + 2, at, sum);
        add(__builtin_convertvector(four >> 24, f32x16), k + 3, at, sum);
    }

    static void product_int8(const uint8_t* panel, int depth, const float* const* at, f32x16* sum) {
        for (int k = 0; k < depth; k += 4, panel += kLine) add_four(dwords(panel), k, at, sum);
    }

    static void product_int4(const uint8_t* panel, int depth, const float* const* at, f32x16* sum) {
        const uint8_t* factors = panel + size_t(depth) * kRows / 2;
        for (int block = 0; block < depth; block += kBlock, factors += kRows) {
            s32x16 factor;
            for (int n = 0; n < kRows; ++n) factor[n] = factors[n];
            const f32x16 scale = __builtin_convertvector(factor, f32x16);
            for (int k = block; k < block + kBlock; k += 8, panel += kLine) {
                const s32x16 line = dwords(panel);
                for (int place = 0; place < 4; ++place) {
                    const s32x16 low = ((line >> (8 * place)) & 15) - kMiddle;
                    const s32x16 high = ((line >> (8 * place + 4)) & 15) - kMiddle;
                    add(__builtin_convertvector(low, f32x16) * scale, k + place, at, sum);
                    add(__builtin_convertvector(high, f32x16) * scale, k + 4 + place, at, sum);
                }
            }
        }
    }

    static f32x16 activate(const Activation& act, f32x16 z) {
        f32x16 value;
        for (int n = 0; n < kRows; ++n) {
            const float size = z[n] < 0 ? -z[n] : z[n];
            float place = size * act.pieces_per_unit;
            place = place < act.last ? place : act.last; // also of NaN
            const int piece = int(place);
            const float t = place - float(piece);
            float g = act.coefficient[kDegree][piece];
            for (int power = kDegree - 1; power >= 0; --power) g = g * t + act.coefficient[power][piece];
            value[n] = (z[n] < 0 ? 0.0f : z[n]) - g;
        }
        return value;
    }
};

} // namespace
} // namespace ffn2moe
