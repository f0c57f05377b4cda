// AMX: the products of 16 keys and 16 queries come out with one key in each row. So the softmax of a query runs down the
// rows, without sums across a register, and its weights leave in the order in which the next product reads them.
#if defined(__AMX_BF16__) && defined(__linux__)
#include "attention.h"
#include "kernels.h"
#include "tiles.h"

#include <cfloat>
#include <cstring>

namespace ffn2moe {
namespace {

constexpr int kTogether = 32;           // queries, and keys
constexpr size_t kTile = 1024;          // bytes: 16 rows of 32 numbers of bfloat16
constexpr float kLog2e = 1.44269504089f;

inline void barrier() { __asm__ volatile("" ::: "memory"); } // the compiler does not know what tiles are loaded from

// 16 numbers of a row, as float32.
inline __m512 sixteen(const void* row, size_t from, bool half) {
    if (!half) return _mm512_loadu_ps(static_cast<const float*>(row) + from);
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(row) + from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}

inline const void* row_of(const void* rows, size_t number, bool half) {
    return static_cast<const char*>(rows) + number * (half ? 2 : 4);
}

// The row of one token, and the next head's part of it closer: heads are worked through one after another.
inline const void* token_row(const Head& head, const void* rows, int token) {
    const char* row = static_cast<const char*>(row_of(rows, head.stride * token, head.half));
    const size_t bytes = size_t(head.size) * (head.half ? 2 : 4);
    for (size_t line = 0; line < bytes; line += kLine) _mm_prefetch(row + bytes + line, _MM_HINT_T0);
    return row;
}

// Two vectors as pairs of bfloat16: dword i has number i of both.
inline __m512i pairs(__m512 first, __m512 second) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

// Turns 16 rows of 16 dwords.
inline void turn(__m512i (&r)[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

// 2^x of x <= 0, to 1e-4 of itself: the weights are rounded to bfloat16.
inline __m512 power_of_two(__m512 x) {
    const __m512 part = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 p = _mm512_set1_ps(0.0780245226f);
    p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(0.226067155f));
    p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(0.695833541f));
    p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(0.999892986f));
    return _mm512_scalef_ps(p, x);
}

// Where the parts of a head's work are.
struct Places {
    int steps, keys; // of 32 numbers of a head; kept tokens, filled up
    uint8_t *key_tiles;   // [keys/16][steps][16 keys][32 numbers]
    uint8_t *value_tiles; // [keys/32][2 * steps][16 numbers][32 keys]
    uint8_t *query_tiles; // [2][steps][16 pairs of numbers][16 queries]
    float *scores;        // [2][keys][16 queries]
    uint8_t *weights;     // [2][keys/32][16 pairs of keys][16 queries]
    float *sums;          // [4][16 numbers][16 queries]

    Places(const Head& head, Buffer& buffer)
        : steps(head.size / kHeadStep), keys(round_up(head.count, kTogether)) {
        const size_t all = size_t(keys) * steps * 64;
        uint8_t* at = buffer.of<uint8_t>(2 * all + 2 * steps * kTile + size_t(keys) * 2 * 64 * 2 + 4 * kTile);
        const auto take = [&at](size_t bytes) { return (at += bytes) - bytes; };
        key_tiles = take(all);
        value_tiles = take(all);
        query_tiles = take(2 * steps * kTile);
        scores = reinterpret_cast<float*>(take(size_t(keys) * 2 * 64));
        weights = take(size_t(keys) * 2 * 64);
        sums = reinterpret_cast<float*>(take(4 * kTile));
    }
};

void lay_out_keys(const Head& head, const Places& to) {
    for (int i = 0; i < to.keys; ++i) {
        uint8_t* tile = to.key_tiles + size_t(i / 16) * to.steps * kTile + i % 16 * 64;
        const void* key = i < head.count ? token_row(head, head.key, head.kept[i]) : nullptr;
        for (int step = 0; step < to.steps; ++step, tile += kTile) {
            __m512i numbers = _mm512_setzero_si512();
            if (key && head.half)
                numbers = _mm512_loadu_si512(static_cast<const uint16_t*>(key) + step * kHeadStep);
            else if (key)
                numbers = (__m512i)_mm512_cvtne2ps_pbh(sixteen(key, step * kHeadStep + 16, false),
                                                       sixteen(key, step * kHeadStep, false));
            _mm512_store_si512(tile, numbers);
        }
    }
}

void lay_out_values(const Head& head, const Places& to) {
    uint8_t* tile = to.value_tiles;
    for (int from = 0; from < to.keys; from += kTogether)
        for (int part = 0; part < 2 * to.steps; ++part, tile += kTile) {
            __m512i rows[16];
            for (int pair = 0; pair < 16; ++pair) {
                const auto numbers = [&](int i) {
                    return i < head.count ? sixteen(token_row(head, head.value, head.kept[i]), part * 16, head.half)
                                          : _mm512_setzero_ps();
                };
                rows[pair] = pairs(numbers(from + 2 * pair), numbers(from + 2 * pair + 1));
            }
            turn(rows);
            for (int i = 0; i < 16; ++i) _mm512_store_si512(tile + i * 64, rows[i]);
        }
}

void lay_out_queries(const Head& head, const Places& to, int first, int blocks) {
    const __m512 scale = _mm512_set1_ps(head.scale * kLog2e); // so that weights are powers of two
    uint8_t* tile = to.query_tiles;
    for (int block = 0; block < blocks; ++block)
        for (int step = 0; step < to.steps; ++step, tile += kTile) {
            __m512i rows[16];
            for (int i = 0; i < 16; ++i) {
                const int token = first + block * 16 + i;
                if (token >= head.length) {
                    rows[i] = _mm512_setzero_si512();
                    continue;
                }
                const void* query = token_row(head, head.query, token);
                rows[i] = (__m512i)_mm512_cvtne2ps_pbh(
                    _mm512_mul_ps(sixteen(query, step * kHeadStep + 16, head.half), scale),
                    _mm512_mul_ps(sixteen(query, step * kHeadStep, head.half), scale));
            }
            turn(rows);
            for (int i = 0; i < 16; ++i) _mm512_store_si512(tile + i * 64, rows[i]);
        }
}

// The largest of some scores of 16 queries, and those before.
inline __m512 largest(__m512 most, const float* scores, int keys) {
    __m512 four[4] = {most, most, most, most};
    int key = 0;
    for (; key + 4 <= keys; key += 4)
        for (int i = 0; i < 4; ++i) four[i] = _mm512_max_ps(four[i], _mm512_load_ps(scores + (key + i) * 16));
    for (; key < keys; ++key) four[0] = _mm512_max_ps(four[0], _mm512_load_ps(scores + key * 16));
    return _mm512_max_ps(_mm512_max_ps(four[0], four[1]), _mm512_max_ps(four[2], four[3]));
}

// The products of all keys with one or two blocks of 16 queries, and the largest one of each query. Vectors work on the
// keys before those that tiles are multiplied for.
template <bool two> void score(const Places& at, int count, __m512 (&most)[2]) {
    const size_t other = size_t(at.steps) * kTile;
    most[0] = most[1] = _mm512_set1_ps(-FLT_MAX);
    const auto compare = [&](int key) {
        const int keys = count - key < kTogether ? count - key : kTogether;
        for (int block = 0; block < (two ? 2 : 1); ++block)
            most[block] = largest(most[block], at.scores + size_t(block * at.keys + key) * 16, keys);
    };
    for (int key = 0; key < at.keys; key += kTogether) {
        const uint8_t* keys = at.key_tiles + size_t(key / 16) * other;
        _tile_zero(0);
        _tile_zero(1);
        if (two) _tile_zero(2);
        if (two) _tile_zero(3);
        for (int step = 0; step < at.steps; ++step) {
            _tile_loadd(4, keys + step * kTile, 64);
            _tile_loadd(5, keys + other + step * kTile, 64);
            _tile_loadd(6, at.query_tiles + step * kTile, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
            if (!two) continue;
            _tile_loadd(7, at.query_tiles + other + step * kTile, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
        if (key) compare(key - kTogether);
        _tile_stored(0, at.scores + size_t(key) * 16, 64);
        _tile_stored(1, at.scores + size_t(key + 16) * 16, 64);
        if (two) _tile_stored(2, at.scores + size_t(at.keys + key) * 16, 64);
        if (two) _tile_stored(3, at.scores + size_t(at.keys + key + 16) * 16, 64);
        barrier();
    }
    compare(at.keys - kTogether);
}

// The weights of 32 keys for 16 queries, and their sums.
inline void weigh(const float* scores, uint8_t* weights, int keys, __m512 most, __m512 (&sum)[2]) {
    const auto weight = [&](int key) {
        return power_of_two(_mm512_sub_ps(_mm512_load_ps(scores + size_t(key) * 16), most));
    };
    int key = 0;
    for (; key + 2 <= keys; key += 2, weights += 64) {
        const __m512 first = weight(key), second = weight(key + 1);
        sum[0] = _mm512_add_ps(sum[0], first);
        sum[1] = _mm512_add_ps(sum[1], second);
        _mm512_store_si512(weights, pairs(first, second));
    }
    if (key < keys) {
        const __m512 last = weight(key);
        sum[0] = _mm512_add_ps(sum[0], last);
        _mm512_store_si512(weights, pairs(last, _mm512_setzero_ps()));
        key += 2;
        weights += 64;
    }
    for (; key < kTogether; key += 2, weights += 64) _mm512_store_si512(weights, _mm512_setzero_si512());
}

// 32 numbers of each of 16 or 32 queries: values times weights, of 32 keys.
template <bool two> inline void add_values(const Places& at, int step, int key) {
    const uint8_t* values = at.value_tiles + (size_t(key / kTogether) * at.steps + step) * 2 * kTile;
    _tile_loadd(4, values, 64);
    _tile_loadd(5, values + kTile, 64);
    _tile_loadd(6, at.weights + size_t(key) * 32, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    if (!two) return;
    _tile_loadd(7, at.weights + size_t(at.keys + key) * 32, 64);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
}

template <bool two> inline void begin_values() {
    _tile_zero(0);
    _tile_zero(1);
    if (two) _tile_zero(2);
    if (two) _tile_zero(3);
}

template <bool two> inline void end_values(const Places& at) {
    _tile_stored(0, at.sums, 64);
    _tile_stored(1, at.sums + 256, 64);
    if (two) _tile_stored(2, at.sums + 512, 64);
    if (two) _tile_stored(3, at.sums + 768, 64);
    barrier();
}

// The weights of all keys for one or two blocks of queries, one over their sums, and the first 32 numbers of what they
// sum up. Tiles are multiplied for the keys before those that vectors work on.
template <bool two> void softmax(const Places& at, int count, const __m512 (&most)[2], __m512 (&factor)[2]) {
    __m512 sum[2][2] = {{_mm512_setzero_ps(), _mm512_setzero_ps()}, {_mm512_setzero_ps(), _mm512_setzero_ps()}};
    begin_values<two>();
    for (int key = 0; key < at.keys; key += kTogether) {
        const int keys = count - key < kTogether ? count - key : kTogether;
        for (int block = 0; block < (two ? 2 : 1); ++block) {
            const size_t place = size_t(block) * at.keys + key;
            weigh(at.scores + place * 16, at.weights + place * 32, keys, most[block], sum[block]);
        }
        barrier();
        if (key) add_values<two>(at, 0, key - kTogether);
    }
    add_values<two>(at, 0, at.keys - kTogether);
    end_values<two>(at);
    for (int block = 0; block < 2; ++block)
        factor[block] = _mm512_div_ps(_mm512_set1_ps(1), _mm512_add_ps(sum[block][0], sum[block][1]));
}

template <bool two> void sum_values(const Places& at, int step) {
    begin_values<two>();
    for (int key = 0; key < at.keys; key += kTogether) add_values<two>(at, step, key);
    end_values<two>(at);
}

void store(const Head& head, const Places& at, int step, int first, int block, __m512 factor) {
    for (int half = 0; half < 2; ++half) {
        const float* sums = at.sums + (block * 2 + half) * 256;
        __m512i rows[16];
        for (int i = 0; i < 16; ++i) rows[i] = _mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(sums + i * 16), factor));
        turn(rows);
        const int left = head.length - first < 16 ? head.length - first : 16;
        for (int i = 0; i < left; ++i) {
            const size_t place = head.stride * (first + i) + step * kHeadStep + half * 16;
            const __m512 numbers = _mm512_castsi512_ps(rows[i]);
            if (head.half_out)
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(head.out) + place),
                                    (__m256i)_mm512_cvtneps_pbh(numbers));
            else
                _mm512_storeu_ps(static_cast<float*>(head.out) + place, numbers);
        }
    }
}

template <bool two> void attend(const Head& head, const Places& at, int first) {
    __m512 most[2], factor[2];
    lay_out_queries(head, at, first, two ? 2 : 1);
    barrier();
    score<two>(at, head.count, most);
    softmax<two>(at, head.count, most, factor);
    for (int step = 0; step < at.steps; ++step) {
        if (step) sum_values<two>(at, step);
        store(head, at, step, first, 0, factor[0]);
        if (two) store(head, at, step, first + 16, 1, factor[1]);
    }
}

void leave_nothing(const Head& head) {
    const size_t number = head.half_out ? 2 : 4;
    for (int token = 0; token < head.length; ++token)
        std::memset(static_cast<char*>(head.out) + head.stride * token * number, 0, head.size * number);
}

void run(const Head& head, Buffer& buffer) {
    if (head.count == 0) return leave_nothing(head);
    const Places at(head, buffer);
    lay_out_keys(head, at);
    lay_out_values(head, at);
    for (int first = 0; first < head.length; first += kTogether)
        head.length - first > 16 ? attend<true>(head, at, first) : attend<false>(head, at, first);
}

void enter() {
    keep_tiles();
    shape_tiles(16);
}

} // namespace

const AttentionPath* attention_amx() {
    static const AttentionPath path = {run, enter, restore_tiles};
    return &path;
}

} // namespace ffn2moe
#else
#include "attention.h"
const ffn2moe::AttentionPath* ffn2moe::attention_amx() { return nullptr; }
#endif
