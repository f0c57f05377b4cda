// What the AVX-512 and the AMX path share: operands of whole numbers, numbers of 4 bits, the activation.
//
// A token's vector becomes whole numbers with one scale. Of 8 bits: x = scale * byte. Of 16 bits, kept as two signed
// bytes: x = scale * (256 * high + low), so that a product with signed bytes is two exact sums.
// Tiles: [K/64][parts: high, low; or one][16][64]. Where few tokens meet numbers of 4 bits, after them, for each block
// of 32 inputs: [K/32][parts][16], -7 times the sum of each token's block.
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

// 16 numbers of a vector from place k on, with zeros after its last one.
inline __m512 sixteen(const float* x, int k, int width) {
    return k + 16 <= width ? vector(x + k) : _mm512_maskz_loadu_ps(first_of(width - k), x + k);
}

// The largest magnitude of a vector: NaN where it holds NaN or infinity.
inline float largest_of(const float* x, int width) {
    __m512i first = _mm512_setzero_si512(), second = first; // of the bits without sign: NaN is above all numbers
    const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
    const auto bits_at = [&](int k) __attribute__((always_inline)) {
        return _mm512_and_si512(_mm512_castps_si512(sixteen(x, k, width)), magnitude);
    };
    int k = 0;
    for (; k + 64 <= width; k += 64) {
        first = _mm512_max_epi32(first, _mm512_max_epi32(bits_at(k), bits_at(k + 16)));
        second = _mm512_max_epi32(second, _mm512_max_epi32(bits_at(k + 32), bits_at(k + 48)));
    }
    for (; k < width; k += 16) first = _mm512_max_epi32(first, bits_at(k));
    const int bits = _mm512_reduce_max_epi32(_mm512_max_epi32(first, second));
    return bits >= 0x7F800000 ? __builtin_nanf("") : _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(bits)));
}

inline bool wide(const Layer& layer) { return layer.activations == Activations::int16; }

// Bytes of the numbers in a tile of 16 tokens for all its depth, and of the whole of it.
inline size_t numbers_bytes(const Layer& layer, int depth) { return size_t(depth) * kRows * (wide(layer) ? 2 : 1); }
inline size_t whole_bytes(const Layer& layer, int depth) {
    const size_t parts = wide(layer) ? 2 : 1;
    const size_t sums = layer.weights == Weights::int4 ? parts * (depth / kBlock) * kRows * sizeof(int32_t) : 0;
    return numbers_bytes(layer, depth) + sums;
}

// Bytes of 64 numbers, from whole numbers of 16 bits; packing works within quarters of a register: bytes 4i to 4i + 3 of
// part j come out at dword 4i + j.
inline void store_bytes(uint8_t* at, __m512i packed) {
    const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    _mm512_storeu_si512(at, _mm512_permutexvar_epi32(order, packed));
}

template <bool wide> inline void load_row(const float* x, int width, int depth, float factor, uint8_t* tile) {
    const __m512 factors = _mm512_set1_ps(factor);
    const auto store = [&](uint8_t* at, __m512 x0, __m512 x1, __m512 x2, __m512 x3) __attribute__((always_inline)) {
        const auto whole = [&](__m512 v) { return _mm512_cvtps_epi32(_mm512_mul_ps(v, factors)); };
        const __m512i first = _mm512_packs_epi32(whole(x0), whole(x1)), second = _mm512_packs_epi32(whole(x2), whole(x3));
        if (!wide) return store_bytes(at, _mm512_packs_epi16(first, second));
        const __m512i half = _mm512_set1_epi16(128), below = _mm512_set1_epi16(0x00FF);
        store_bytes(at, _mm512_packs_epi16(_mm512_srai_epi16(_mm512_add_epi16(first, half), 8),
                                           _mm512_srai_epi16(_mm512_add_epi16(second, half), 8)));
        store_bytes(at + kTile, _mm512_packus_epi16(_mm512_and_si512(first, below), _mm512_and_si512(second, below)));
    };
    constexpr size_t bytes = (wide ? 2 : 1) * kTile;
    int k = 0;
    for (; k + kDepth <= width; k += kDepth, tile += bytes)
        store(tile, vector(x + k), vector(x + k + 16), vector(x + k + 32), vector(x + k + 48));
    for (; k < depth; k += kDepth, tile += bytes)
        store(tile, sixteen(x, k, width), sixteen(x, k + 16, width), sixteen(x, k + 32, width),
              sixteen(x, k + 48, width));
}

// Whole numbers of the rows; `sums`: those of blocks as well.
inline void load_whole(const Layer& layer, const Rows& source, int width, const Operand& operand, bool sums) {
    const int steps = operand.depth / kDepth, parts = wide(layer) ? 2 : 1;
    const float most = parts == 2 ? 32639 : 127; // 127 * 256 + 127: two signed bytes
    const size_t bytes = whole_bytes(layer, operand.depth);
    for (int row = 0; row < round_up(operand.rows, kRows); ++row) {
        uint8_t* all = operand.tiles + row / kRows * bytes;
        uint8_t* tile = all + row % kRows * kDepth;
        const float* x = row < operand.rows ? source[row] : nullptr;
        float largest = 0;
        if (x) {
            prefetch_row(source, row + 1, operand.rows, width);
            largest = largest_of(x, width);
            operand.scales[row] = largest * (1 / most);
        }
        if (largest > 1e-30f) {
            if (parts == 2)
                load_row<true>(x, width, operand.depth, most / largest, tile);
            else
                load_row<false>(x, width, operand.depth, most / largest, tile);
        } else { // nothing, or NaN: that is in the scale
            for (int step = 0; step < steps * parts; ++step)
                _mm512_storeu_si512(tile + step * kTile, _mm512_setzero_si512());
        }
        if (!sums) continue;
        int32_t* sum = reinterpret_cast<int32_t*>(all + numbers_bytes(layer, operand.depth)) + row % kRows;
        for (int step = 0; step < steps; ++step)
            for (int part = 0; part < parts; ++part, tile += kTile) {
                const __m512i four =
                    _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), _mm512_loadu_si512(tile));
                sum[((2 * step) * parts + part) * kRows] = -kMiddle * _mm512_mask_reduce_add_epi32(0x00FF, four);
                sum[((2 * step + 1) * parts + part) * kRows] = -kMiddle * _mm512_mask_reduce_add_epi32(0xFF00, four);
            }
    }
}

// Signed bytes [from .. to) of K of a panel of 4-bit numbers, in the layout of an int8 panel. A number, 0 to 14, times
// its factor, up to 18, is a byte, so that one product of words makes two of them.
inline void decode_int4(const uint8_t* panel, int depth, int from, int to, uint8_t* bytes) {
    const uint8_t* factors = panel + size_t(depth) * kRows / 2 + from / kBlock * kRows;
    const uint8_t* line = panel + size_t(from) * kRows / 2;
    const __m512i low = _mm512_set1_epi8(0x0F);
    for (int k = from; k < to; k += kBlock, factors += kRows) {
        // The factor of a row in both words of its four bytes.
        const __m512i factor = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(factors)));
        const __m512i words = _mm512_or_si512(factor, _mm512_slli_epi32(factor, 16));
        const __m512i middle = _mm512_mullo_epi16(words, _mm512_set1_epi16(kMiddle * 0x0101));
        for (int eight = 0; eight < kBlock; eight += 8, line += kLine, bytes += 2 * kLine) {
            const __m512i both = _mm512_loadu_si512(line);
            for (int half = 0; half < 2; ++half) {
                const __m512i numbers = _mm512_and_si512(half ? _mm512_srli_epi16(both, 4) : both, low);
                _mm512_storeu_si512(bytes + half * kLine, _mm512_sub_epi8(_mm512_mullo_epi16(numbers, words), middle));
            }
        }
    }
}

// An activation in registers.
struct Activate {
    __m512 low[kDegree + 1], high[kDegree + 1], pieces_per_unit, last;

    explicit Activate(const Activation& act)
        : pieces_per_unit(_mm512_set1_ps(act.pieces_per_unit)), last(_mm512_set1_ps(act.last)) {
        for (int power = 0; power <= kDegree; ++power) {
            low[power] = vector(act.coefficient[power]);
            high[power] = vector(act.coefficient[power] + 16);
        }
    }

    __m512 operator()(__m512 z) const {
        // The second of the two, where the first is NaN.
        const __m512 place = _mm512_min_ps(_mm512_mul_ps(_mm512_abs_ps(z), pieces_per_unit), last);
        const __m512i piece = _mm512_cvttps_epi32(place);
        const __m512 t = _mm512_sub_ps(place, _mm512_cvtepi32_ps(piece));
        __m512 g = _mm512_permutex2var_ps(low[kDegree], piece, high[kDegree]);
        for (int power = kDegree - 1; power >= 0; --power)
            g = _mm512_fmadd_ps(g, t, _mm512_permutex2var_ps(low[power], piece, high[power]));
        return _mm512_sub_ps(_mm512_max_ps(_mm512_setzero_ps(), z), g); // the maximum keeps NaN
    }
};

inline void add_output(float* at, __mmask16 valid, __m512 sum, __m512 factor) {
    _mm512_mask_storeu_ps(at, valid, _mm512_fmadd_ps(sum, factor, _mm512_maskz_loadu_ps(valid, at)));
}

} // namespace
} // namespace ffn2moe
