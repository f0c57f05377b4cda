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

inline __m512i four_at(const uint8_t* at) {
    int32_t four;
    __builtin_memcpy(&four, at, sizeof four);
    return _mm512_set1_epi32(four);
}

template <bool wide> inline __m512 joined(__m512i high, __m512i low) {
    const __m512 sum = _mm512_cvtepi32_ps(high);
    return wide ? _mm512_fmadd_ps(sum, _mm512_set1_ps(256), _mm512_cvtepi32_ps(low)) : sum;
}

// Brings weights closer that are read soon: experts are read from their first byte to the last.
inline void prefetch_line(const uint8_t* at) { _mm_prefetch(at + 4096, _MM_HINT_T1); }

// x W^T of a panel of signed bytes and some tokens, without the scales. Bytes go in + 128, which makes them unsigned.
template <bool wide, int rows>
inline void product_int8(const uint8_t* panel, int depth, const uint8_t* tile, Sums& sums) {
    __m512i high[rows], low[rows], ones = _mm512_setzero_si512();
    for (int r = 0; r < rows; ++r) high[r] = low[r] = ones;
    const __m512i middle = _mm512_set1_epi8(-128);
    for (int k = 0; k < depth; k += kDepth, tile += (wide ? 2 : 1) * kTile)
        for (int group = 0; group < kDepth; group += 4, panel += kLine) {
            prefetch_line(panel);
            const __m512i weight = _mm512_loadu_si512(panel);
            ones = _mm512_dpbusd_epi32(ones, middle, weight);
            for (int r = 0; r < rows; ++r) {
                const uint8_t* at = tile + r * kDepth + group;
                high[r] = _mm512_dpbusd_epi32(high[r], _mm512_xor_si512(four_at(at), middle), weight);
                if (wide) low[r] = _mm512_dpbusd_epi32(low[r], _mm512_xor_si512(four_at(at + kTile), middle), weight);
            }
        }
    for (int r = 0; r < rows; ++r)
        sums.of[r] = joined<wide>(_mm512_sub_epi32(high[r], ones), _mm512_sub_epi32(low[r], ones));
}

// The same of numbers of 4 bits. They are unsigned as they stand, so a block's sum begins with what the middle makes
// too much; that sum is a signed 16-bit number (32 * 7 * 128 at most), and a product of words times its factor.
template <bool wide, int rows>
inline void product_int4(const uint8_t* panel, int depth, const uint8_t* tile, const int32_t* middles, Sums& sums) {
    constexpr int parts = wide ? 2 : 1;
    __m512i total[parts][rows];
    for (int part = 0; part < parts; ++part)
        for (int r = 0; r < rows; ++r) total[part][r] = _mm512_setzero_si512();
    const __m512i nibble = _mm512_set1_epi8(0x0F);
    const uint8_t* factors = panel + size_t(depth) * kRows / 2;
    for (int k = 0; k < depth; k += kBlock, factors += kRows, middles += parts * kRows) {
        const uint8_t* block = tile + size_t(k / kDepth) * parts * kTile + k % kDepth;
        __m512i sum[parts][rows];
        for (int part = 0; part < parts; ++part)
            for (int r = 0; r < rows; ++r) sum[part][r] = _mm512_set1_epi32(middles[part * kRows + r]);
        for (int eight = 0; eight < kBlock; eight += 8, panel += kLine) {
            prefetch_line(panel);
            const __m512i both = _mm512_loadu_si512(panel);
            const __m512i first = _mm512_and_si512(both, nibble);
            const __m512i second = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
            for (int part = 0; part < parts; ++part)
                for (int r = 0; r < rows; ++r) {
                    const uint8_t* at = block + part * kTile + r * kDepth + eight;
                    sum[part][r] = _mm512_dpbusd_epi32(sum[part][r], first, four_at(at));
                    sum[part][r] = _mm512_dpbusd_epi32(sum[part][r], second, four_at(at + 4));
                }
        }
        const __m512i factor = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(factors)));
        for (int part = 0; part < parts; ++part)
            for (int r = 0; r < rows; ++r) total[part][r] = _mm512_dpwssd_epi32(total[part][r], sum[part][r], factor);
    }
    for (int r = 0; r < rows; ++r) sums.of[r] = joined<wide>(total[0][r], total[parts - 1][r]);
}

template <bool wide, int rows>
inline void product(const Layer& layer, const uint8_t* panel, const Operand& x, int row, Sums& sums) {
    const uint8_t* all = x.tiles + row / kRows * whole_bytes(layer, x.depth);
    const uint8_t* tile = all + row % kRows * kDepth;
    if (layer.weights == Weights::int8) return product_int8<wide, rows>(panel, x.depth, tile, sums);
    const auto* middles = reinterpret_cast<const int32_t*>(all + numbers_bytes(layer, x.depth)) + row % kRows;
    product_int4<wide, rows>(panel, x.depth, tile, middles, sums);
}

// One panel and up to four tokens.
inline Sums product(const Layer& layer, const uint8_t* panel, const Operand& x, int row) {
    Sums sums;
    const int left = x.rows - row;
    if (wide(layer))
        left == 1   ? product<true, 1>(layer, panel, x, row, sums)
        : left == 2 ? product<true, 2>(layer, panel, x, row, sums)
                    : product<true, kTogether>(layer, panel, x, row, sums);
    else
        left == 1   ? product<false, 1>(layer, panel, x, row, sums)
        : left == 2 ? product<false, 2>(layer, panel, x, row, sums)
                    : product<false, kTogether>(layer, panel, x, row, sums);
    return sums;
}

struct Vnni {
    static size_t tile_bytes(const Layer& layer, int depth) {
        return layer.weights == Weights::bf16 ? Generic::tile_bytes(layer, depth) : whole_bytes(layer, depth);
    }

    static void load(const Layer& layer, const Rows& source, int width, const Operand& operand) {
        if (layer.weights == Weights::bf16) return Generic::load(layer, source, width, operand);
        load_whole(layer, source, width, operand, layer.weights == Weights::int4);
    }

    static void hidden(const Layer& layer, const uint8_t* expert, const Operand& x, int first, int last, float* h,
                       size_t stride) {
        if (layer.weights == Weights::bf16) return Generic::hidden(layer, expert, x, first, last, h, stride);
        const size_t bytes = layer.hidden_bytes(), after = layer.numbers(x.depth);
        const Activate act(*layer.activation);
        for (int panel = first; panel < last; ++panel) {
            const uint8_t* in = expert + panel * bytes * (layer.gated ? 2 : 1);
            const uint8_t* gate = layer.gated ? in + bytes : in;
            const __m512 scale = vector(gate + after), bias = vector(gate + after + kLine);
            const __m512 up_scale = vector(in + after), up_bias = vector(in + after + kLine);
            for (int row = 0; row < x.rows; row += kTogether) {
                const Sums up = product(layer, in, x, row);
                const Sums z = layer.gated ? product(layer, gate, x, row) : up;
                for (int r = 0; r < kTogether && row + r < x.rows; ++r) {
                    const __m512 factor = _mm512_set1_ps(x.scales[row + r]);
                    const __m512 value = act(_mm512_fmadd_ps(z.of[r], _mm512_mul_ps(factor, scale), bias));
                    const __m512 other = _mm512_fmadd_ps(up.of[r], _mm512_mul_ps(factor, up_scale), up_bias);
                    _mm512_storeu_ps(h + (row + r) * stride + panel * kRows,
                                     layer.gated ? _mm512_mul_ps(value, other) : value);
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
                    add_output(y + stride * size_t(index[row + r]) + panel * kRows, valid, sums.of[r],
                               _mm512_mul_ps(factor, scale));
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
