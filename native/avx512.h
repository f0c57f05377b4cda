// What the AVX-512 and the AMX path share: operands of whole numbers, numbers of 4 bits, the activation.
//
// A token's vector becomes 16-bit whole numbers with one scale, kept as a signed high and an unsigned low byte, so that
// x = scale * (256 * high + low) and a product with signed bytes is two exact sums. Tiles: [K/64][high, low][16][64].
#pragma once

#include "kernels.h"

#include <immintrin.h>

namespace ffn2moe {
namespace {

constexpr int kDepth = 64; // inputs in a tile of bytes
constexpr size_t kTile = 1024;

inline __mmask16 first_of(int count) { return count >= 16 ? 0xFFFF : count <= 0 ? 0 : __mmask16((1u << count) - 1); }

inline __m512 vector(const void* at) { return _mm512_loadu_ps(at); }

// A row that is needed soon.
inline void prefetch_row(const Rows& source, int row, int rows, int width) {
    if (row >= rows) return;
    const float* x = source[row];
    for (int k = 0; k < width; k += 16) _mm_prefetch(reinterpret_cast<const char*>(x + k), _MM_HINT_T0);
}

// The scale of a vector of whole numbers: NaN where it holds NaN or infinity, 0 where it is nothing.
inline float scale_of(const float* x, int width) {
    __m512i largest = _mm512_setzero_si512(); // of the bits without sign: NaN is above all numbers
    const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
    for (int k = 0; k < width; k += 16) {
        const __m512i bits = _mm512_castps_si512(_mm512_maskz_loadu_ps(first_of(width - k), x + k));
        largest = _mm512_max_epi32(largest, _mm512_and_si512(bits, magnitude));
    }
    const int bits = _mm512_reduce_max_epi32(largest);
    const float size = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(bits)));
    return bits >= 0x7F800000 ? __builtin_nanf("") : size < 1e-30f ? 0 : size / 32767;
}

inline void load_whole(const Rows& source, int width, const Operand& operand) {
    const int steps = operand.depth / kDepth;
    // Packing works within quarters of a register: bytes 4i to 4i + 3 of part j come out at dword 4i + j.
    const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    const __m512i below = _mm512_set1_epi16(0x00FF);
    for (int row = 0; row < round_up(operand.rows, kRows); ++row) {
        uint8_t* tile = operand.tiles + size_t(row / kRows) * steps * 2 * kTile + row % kRows * kDepth;
        const float* x = row < operand.rows ? source[row] : nullptr;
        float scale = 0;
        if (x) {
            prefetch_row(source, row + 1, operand.rows, width);
            operand.scales[row] = scale = scale_of(x, width);
        }
        if (!(scale > 0)) { // nothing, or NaN: that is in the scale
            for (int step = 0; step < steps * 2; ++step, tile += kTile) _mm512_storeu_si512(tile, _mm512_setzero_si512());
            continue;
        }
        const __m512 factor = _mm512_set1_ps(1 / scale);
        const auto whole = [&](int k) __attribute__((always_inline)) {
            const __mmask16 valid = first_of(width - k);
            return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(valid, x + k), factor));
        };
        for (int k = 0; k < operand.depth; k += kDepth, tile += 2 * kTile) {
            const __m512i first = _mm512_packs_epi32(whole(k), whole(k + 16));
            const __m512i second = _mm512_packs_epi32(whole(k + 32), whole(k + 48));
            const __m512i high = _mm512_packs_epi16(_mm512_srai_epi16(first, 8), _mm512_srai_epi16(second, 8));
            const __m512i low = _mm512_packus_epi16(_mm512_and_si512(first, below), _mm512_and_si512(second, below));
            _mm512_storeu_si512(tile, _mm512_permutexvar_epi32(order, high));
            _mm512_storeu_si512(tile + kTile, _mm512_permutexvar_epi32(order, low));
        }
    }
}

// Signed bytes [from .. to) of K of a panel of 4-bit numbers, in the layout of an int8 panel.
inline void decode_int4(const uint8_t* panel, int depth, int from, int to, uint8_t* bytes) {
    const uint8_t* factors = panel + size_t(depth) * kRows / 2 + from / kBlock * kRows;
    const uint8_t* line = panel + size_t(from) * kRows / 2;
    const __m512i low = _mm512_set1_epi16(0x000F), high = _mm512_set1_epi16(0x0F00), even = _mm512_set1_epi16(0x00FF);
    for (int k = from; k < to; k += kBlock, factors += kRows) {
        // The factor of a row in both words of its four bytes.
        const __m128i factor16 = _mm_loadu_si128(reinterpret_cast<const __m128i*>(factors));
        const __m512i factor = _mm512_cvtepu8_epi32(factor16);
        const __m512i words = _mm512_or_si512(factor, _mm512_slli_epi32(factor, 16));
        const __m512i middle = _mm512_slli_epi16(_mm512_or_si512(words, _mm512_slli_epi16(words, 8)), 3); // 8 * factor
        for (int eight = 0; eight < kBlock; eight += 8, line += kLine, bytes += 2 * kLine) {
            const __m512i both = _mm512_loadu_si512(line);
            const __m512i shifted = _mm512_srli_epi16(both, 4);
            for (int half = 0; half < 2; ++half) {
                const __m512i numbers = half ? shifted : both;
                const __m512i first = _mm512_mullo_epi16(_mm512_and_si512(numbers, low), words);
                const __m512i second = _mm512_mullo_epi16(_mm512_and_si512(numbers, high), words);
                const __m512i joined = _mm512_ternarylogic_epi32(even, first, second, 0xCA); // even ? first : second
                _mm512_storeu_si512(bytes + half * kLine, _mm512_sub_epi8(joined, middle));
            }
        }
    }
}

inline __m512 activate(const Activation& act, __m512 z) {
    const __m512 place = _mm512_min_ps(_mm512_mul_ps(_mm512_abs_ps(z), _mm512_set1_ps(act.pieces_per_unit)),
                                       _mm512_set1_ps(act.last)); // the second, where the first is NaN
    const __m512i piece = _mm512_cvttps_epi32(place);
    const __m512 t = _mm512_sub_ps(place, _mm512_cvtepi32_ps(piece));
    const auto of = [&](int power) __attribute__((always_inline)) {
        return _mm512_permutex2var_ps(vector(act.coefficient[power]), piece, vector(act.coefficient[power] + 16));
    };
    __m512 g = of(kDegree);
    for (int power = kDegree - 1; power >= 0; --power) g = _mm512_fmadd_ps(g, t, of(power));
    return _mm512_sub_ps(_mm512_max_ps(_mm512_setzero_ps(), z), g); // the maximum keeps NaN
}

// h of 16 tokens and the outputs of a panel, from z (gated: of W_gate) and up.
inline void store_hidden(const Layer& layer, float* at, __m512 z, __m512 up) {
    const __m512 value = activate(*layer.activation, z);
    _mm512_storeu_ps(at, layer.gated ? _mm512_mul_ps(value, up) : value);
}

inline void add_output(float* at, __mmask16 valid, __m512 value) {
    _mm512_mask_storeu_ps(at, valid, _mm512_add_ps(_mm512_maskz_loadu_ps(valid, at), value));
}

} // namespace
} // namespace ffn2moe
