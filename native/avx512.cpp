// AVX-512 with VNNI: whole-numbered weights by byte products, bfloat16 weights in float32.
#if defined(__AVX512F__)
#include "avx512.h"
#include "generic.h"

namespace ffn2moe {
namespace {

constexpr int kTogether = 4; // tokens

struct Sums {
    __m512 of[kTogether];
};

// x W^T of one panel and four tokens, without the scales. A high byte h goes in as h + 128, which makes it unsigned.
inline Sums product(const Layer& layer, const uint8_t* panel, const Operand& x, int row) {
    const int depth = x.depth;
    __m512i high[kTogether], low[kTogether], ones = _mm512_setzero_si512();
    for (int r = 0; r < kTogether; ++r) high[r] = low[r] = ones;
    const uint8_t* tile = x.tiles + size_t(row / kRows) * depth * kRows * 2 + row % kRows * kDepth;
    alignas(64) uint8_t decoded[kTile];
    for (int k = 0; k < depth; k += kDepth, tile += 2 * kTile) {
        const uint8_t* bytes = panel + size_t(k) * kRows;
        if (layer.weights == Weights::int4) {
            decode_int4(panel, depth, k, k + kDepth, decoded);
            bytes = decoded;
        }
        for (int group = 0; group < kDepth / 4; ++group) {
            const __m512i weight = _mm512_loadu_si512(bytes + group * kLine);
            ones = _mm512_dpbusd_epi32(ones, _mm512_set1_epi8(1), weight);
            for (int r = 0; r < kTogether; ++r) {
                int32_t four, below;
                __builtin_memcpy(&four, tile + r * kDepth + group * 4, 4);
                __builtin_memcpy(&below, tile + kTile + r * kDepth + group * 4, 4);
                high[r] = _mm512_dpbusd_epi32(high[r], _mm512_set1_epi32(four ^ int32_t(0x80808080)), weight);
                low[r] = _mm512_dpbusd_epi32(low[r], _mm512_set1_epi32(below), weight);
            }
        }
    }
    Sums sums;
    const __m512i excess = _mm512_slli_epi32(ones, 7);
    for (int r = 0; r < kTogether; ++r) {
        const __m512 above = _mm512_cvtepi32_ps(_mm512_sub_epi32(high[r], excess));
        sums.of[r] = _mm512_fmadd_ps(above, _mm512_set1_ps(256), _mm512_cvtepi32_ps(low[r]));
    }
    return sums;
}

struct Vnni {
    static size_t tile_bytes(Weights weights, int depth) {
        return weights == Weights::bf16 ? Generic::tile_bytes(weights, depth) : size_t(depth) * kRows * 2;
    }

    static void load(Weights weights, const Rows& source, int width, const Operand& operand) {
        weights == Weights::bf16 ? Generic::load(weights, source, width, operand) : load_whole(source, width, operand);
    }

    static void hidden(const Layer& layer, const uint8_t* expert, const Operand& x, int first, int last, float* h,
                       size_t stride) {
        if (layer.weights == Weights::bf16) return Generic::hidden(layer, expert, x, first, last, h, stride);
        const size_t bytes = layer.hidden_bytes(), after = layer.numbers(x.depth);
        for (int panel = first; panel < last; ++panel) {
            const uint8_t* in = expert + panel * bytes * (layer.gated ? 2 : 1);
            const uint8_t* gate = layer.gated ? in + bytes : in;
            const __m512 scale = vector(gate + after), bias = vector(gate + after + kLine);
            const __m512 up_scale = vector(in + after), up_bias = vector(in + after + kLine);
            for (int row = 0; row < x.rows; row += kTogether) {
                const Sums z = product(layer, gate, x, row);
                const Sums up = layer.gated ? product(layer, in, x, row) : z;
                for (int r = 0; r < kTogether && row + r < x.rows; ++r) {
                    const __m512 factor = _mm512_set1_ps(x.scales[row + r]);
                    store_hidden(layer, h + (row + r) * stride + panel * kRows,
                                 _mm512_fmadd_ps(z.of[r], _mm512_mul_ps(factor, scale), bias),
                                 _mm512_fmadd_ps(up.of[r], _mm512_mul_ps(factor, up_scale), up_bias));
                }
            }
        }
    }

    static void output(const Layer& layer, const uint8_t* expert, const Operand& h, int first, int last, float* y,
                       size_t stride, const int32_t* index, const float* gates) {
        if (layer.weights == Weights::bf16)
            return Generic::output(layer, expert, h, first, last, y, stride, index, gates);
        const uint8_t* out = layer.output_at(expert);
        for (int panel = first; panel < last; ++panel) {
            const uint8_t* at = out + panel * layer.output_bytes();
            const __m512 scale = vector(at + layer.numbers(h.depth));
            const __mmask16 valid = first_of(layer.width - panel * kRows);
            for (int row = 0; row < h.rows; row += kTogether) {
                const Sums sums = product(layer, at, h, row);
                for (int r = 0; r < kTogether && row + r < h.rows; ++r) {
                    const __m512 factor = _mm512_set1_ps(gates[row + r] * h.scales[row + r]);
                    add_output(y + stride * size_t(index[row + r]) + panel * kRows, valid,
                               _mm512_mul_ps(sums.of[r], _mm512_mul_ps(factor, scale)));
                }
            }
        }
    }
};

} // namespace
} // namespace ffn2moe

const ffn2moe::Path* ffn2moe::avx512() {
    static const Path path = {"avx512",     Vnni::tile_bytes, Vnni::load,      Vnni::hidden,
                              Vnni::output, Generic::nothing, Generic::nothing};
    const bool here = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
    return here ? &path : nullptr;
}
#else
#include "kernels.h"
const ffn2moe::Path* ffn2moe::avx512() { return nullptr; }
#endif
