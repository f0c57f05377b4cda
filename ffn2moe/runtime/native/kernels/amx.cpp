// AMX: tiles of 16 tokens by 16 outputs. Whole-numbered weights by TDPBSSD, bfloat16 weights by TDPBF16PS.
#if defined(__AMX_INT8__) && defined(__linux__)
#include "avx512.h"
#include "tiles.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace ffn2moe {
namespace {

constexpr int kDepth16 = 32; // inputs in a tile of bfloat16
constexpr int kFewest = 4;   // tokens of an expert

constexpr int kChunk = 256; // inputs that are decoded at once where few tokens read them

struct alignas(64) Scratch {
    int32_t sums[4][kRows][kRows];
    uint8_t decoded[2][2][kChunk * kRows]; // in turn; of two panels
};

// Brings a tile of weights closer that is needed soon.
inline void prefetch_tile(const uint8_t* tile) {
    for (size_t line = 0; line < kTile; line += kLine) _mm_prefetch(tile + line, _MM_HINT_T1);
}

// What two panels are multiplied by at once: 16 tokens of 16 bits (a tile of high bytes and one of low ones), else 32
// or 16 tokens. Sums 0 and 1 are of panel 0 and 1 and the first tile of activations, 2 and 3 of the second.
enum class Form { wide, two, one };

inline void begin_sums(Form form) {
    _tile_zero(0);
    _tile_zero(1);
    if (form != Form::one) {
        _tile_zero(2);
        _tile_zero(3);
    }
}

inline void end_sums(Form form, Scratch& scratch) {
    _tile_stored(0, scratch.sums[0], 64);
    _tile_stored(1, scratch.sums[1], 64);
    if (form != Form::one) {
        _tile_stored(2, scratch.sums[2], 64);
        _tile_stored(3, scratch.sums[3], 64);
    }
}

// One step in K. `x` and `others` are the tiles of activations.
template <bool whole, Form form>
inline void multiply(const uint8_t* x, const uint8_t* others, const uint8_t* panel0, const uint8_t* panel1) {
    _tile_loadd(4, x, 64);
    _tile_loadd(6, panel0, 64);
    if (whole)
        _tile_dpbssd(0, 4, 6);
    else
        _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, panel1, 64);
    if (whole)
        _tile_dpbssd(1, 4, 7);
    else
        _tile_dpbf16ps(1, 4, 7);
    if (form == Form::one) return;
    _tile_loadd(5, others, 64);
    if (whole) {
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    } else {
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

inline void load_bf16(const Rows& source, int width, const Operand& operand) {
    const int steps = operand.depth / kDepth16;
    for (int row = 0; row < round_up(operand.rows, kRows); ++row) {
        uint8_t* tile = operand.tiles + size_t(row / kRows) * steps * kTile + row % kRows * 64;
        const float* x = row < operand.rows ? source[row] : nullptr;
        prefetch_row(source, row + 1, operand.rows, width);
        for (int step = 0; step < steps; ++step, tile += kTile) {
            const int k = step * kDepth16;
            const __m512 first = x ? _mm512_maskz_loadu_ps(first_of(width - k), x + k) : _mm512_setzero_ps();
            const __m512 second = x ? _mm512_maskz_loadu_ps(first_of(width - k - 16), x + k + 16) : _mm512_setzero_ps();
            _mm512_storeu_si512(tile, (__m512i)_mm512_cvtne2ps_pbh(second, first));
        }
    }
}

// Two panels as they are. `tile`: the first of the tokens' tiles, `next`: that of the 16 tokens after them (two).
template <bool whole, Form form>
inline void product(const uint8_t* tile, const uint8_t* next, int steps, const uint8_t* panel0, const uint8_t* panel1,
                    bool ahead, Scratch& scratch) {
    const size_t distance = 2 * (panel1 - panel0); // to the next two panels
    begin_sums(form);
    for (int step = 0; step < steps; ++step, panel0 += kTile, panel1 += kTile) {
        if (ahead) {
            prefetch_tile(panel0 + distance);
            prefetch_tile(panel1 + distance);
        }
        const size_t at = step * (form == Form::wide ? 2 : 1) * kTile;
        multiply<whole, form>(tile + at, form == Form::wide ? tile + at + kTile : next + at, panel0, panel1);
    }
    end_sums(form, scratch);
}

// The same of numbers of 4 bits, which are decoded on the way: the next chunk while tiles multiply this one.
template <Form form>
inline void product_int4(const uint8_t* tile, const uint8_t* next, int depth, const uint8_t* panel0,
                         const uint8_t* panel1, Scratch& scratch) {
    const auto decode = [&](int from) __attribute__((always_inline)) {
        const int to = from + kChunk < depth ? from + kChunk : depth;
        const size_t distance = 2 * (panel1 - panel0) + size_t(from) * kRows / 2;
        for (size_t line = 0; line < size_t(to - from) * kRows / 2; line += kLine) {
            _mm_prefetch(panel0 + distance + line, _MM_HINT_T1);
            _mm_prefetch(panel1 + distance + line, _MM_HINT_T1);
        }
        decode_int4(panel0, depth, from, to, scratch.decoded[from / kChunk % 2][0]);
        decode_int4(panel1, depth, from, to, scratch.decoded[from / kChunk % 2][1]);
    };
    begin_sums(form);
    decode(0);
    for (int from = 0; from < depth; from += kChunk) {
        if (from + kChunk < depth) decode(from + kChunk);
        __asm__ volatile("" ::: "memory"); // the compiler does not know that tiles are loaded from memory it has written
        const uint8_t* bytes0 = scratch.decoded[from / kChunk % 2][0];
        const uint8_t* bytes1 = scratch.decoded[from / kChunk % 2][1];
        const int to = from + kChunk < depth ? from + kChunk : depth;
        for (int k = from; k < to; k += kDepth, bytes0 += kTile, bytes1 += kTile) {
            const size_t at = k / kDepth * (form == Form::wide ? 2 : 1) * kTile;
            multiply<true, form>(tile + at, form == Form::wide ? tile + at + kTile : next + at, bytes0, bytes1);
        }
        __asm__ volatile("" ::: "memory"); // nor that they are read before they are written again
    }
    end_sums(form, scratch);
}

// Panels as the products read them: numbers of 4 bits that many tokens read are decoded, into memory of the thread.
struct Panels {
    const uint8_t *first, *second;
};

inline Panels decoded_panels(const uint8_t* panel0, const uint8_t* panel1, int depth) {
    thread_local struct Decoded {
        uint8_t* bytes = nullptr;
        size_t size = 0;
        ~Decoded() { __builtin_free(bytes); }
    } decoded;
    const size_t size = size_t(depth) * kRows;
    if (decoded.size < 2 * size) {
        __builtin_free(decoded.bytes);
        void* fresh = nullptr;
        if (posix_memalign(&fresh, kLine, 2 * size)) __builtin_trap();
        decoded.bytes = static_cast<uint8_t*>(fresh);
        decoded.size = 2 * size;
    }
    decode_int4(panel0, depth, 0, depth, decoded.bytes);
    if (panel1 != panel0) decode_int4(panel1, depth, 0, depth, decoded.bytes + size);
    return {decoded.bytes, panel1 == panel0 ? decoded.bytes : decoded.bytes + size};
}

size_t tile_bytes(const Layer& layer, int depth) {
    return layer.weights == Weights::bf16 ? size_t(depth) * kRows * 2 : whole_bytes(layer, depth);
}

// For tiles of tokens: soon(row, count) before the products, body(row, count, (r, which panel) -> sums) after them.
template <class Soon, class Body>
inline void products(const Layer& layer, const uint8_t* panel0, const uint8_t* panel1, const Operand& x,
                     Scratch& scratch, const Soon& soon, const Body& body) {
    const bool whole = layer.weights != Weights::bf16;
    const int steps = x.depth / (whole ? kDepth : kDepth16), together = wide(layer) ? kRows : 2 * kRows;
    const bool on_the_way = layer.weights == Weights::int4 && x.rows <= together;
    const bool decoded = layer.weights == Weights::int4 && !on_the_way;
    const Panels panels = decoded ? decoded_panels(panel0, panel1, x.depth) : Panels{panel0, panel1};
    __asm__ volatile("" ::: "memory"); // the compiler does not know that tiles are loaded from memory it has written
    const size_t bytes = tile_bytes(layer, x.depth);
    for (int row = 0; row < x.rows; row += together) {
        const uint8_t *tile = x.tiles + row / kRows * bytes, *next = tile + bytes;
        const int left = x.rows - row < together ? x.rows - row : together;
        const Form form = wide(layer) ? Form::wide : left > kRows ? Form::two : Form::one;
        const bool ahead = row == 0 && !decoded;
        soon(row, left);
        if (on_the_way)
            form == Form::wide  ? product_int4<Form::wide>(tile, next, x.depth, panel0, panel1, scratch)
            : form == Form::two ? product_int4<Form::two>(tile, next, x.depth, panel0, panel1, scratch)
                                : product_int4<Form::one>(tile, next, x.depth, panel0, panel1, scratch);
        else if (form == Form::wide)
            product<true, Form::wide>(tile, next, steps, panels.first, panels.second, ahead, scratch);
        else if (whole)
            form == Form::two ? product<true, Form::two>(tile, next, steps, panels.first, panels.second, ahead, scratch)
                              : product<true, Form::one>(tile, next, steps, panels.first, panels.second, ahead, scratch);
        else
            form == Form::two
                ? product<false, Form::two>(tile, next, steps, panels.first, panels.second, ahead, scratch)
                : product<false, Form::one>(tile, next, steps, panels.first, panels.second, ahead, scratch);
        const auto at = [&](int which, int r) { return _mm512_load_si512(scratch.sums[which][r]); };
        if (form == Form::wide) {
            const __m512 above = _mm512_set1_ps(256);
            body(row, left, [&](int r, int which) {
                return _mm512_fmadd_ps(_mm512_cvtepi32_ps(at(which, r)), above, _mm512_cvtepi32_ps(at(2 + which, r)));
            });
            continue;
        }
        for (int half = 0; half < left; half += kRows)
            body(row + half, left - half < kRows ? left - half : kRows, [&](int r, int which) {
                const __m512i sum = at(half / kRows * 2 + which, r);
                return whole ? _mm512_cvtepi32_ps(sum) : _mm512_castsi512_ps(sum);
            });
    }
}

// Whether vector products are faster than tiles: of numbers of 4 bits, which then need not become bytes.
inline bool by_vectors(const Layer& layer, int rows) {
    return layer.weights == Weights::int4 && rows <= kFewest;
}

void load(const Layer& layer, const Rows& source, int width, const Operand& operand) {
    if (layer.weights == Weights::bf16)
        load_bf16(source, width, operand);
    else
        load_whole(layer, source, width, operand, by_vectors(layer, operand.rows));
}

// What a token's sums are multiplied by, beside the scales of the weights.
inline __m512 scale_of(const Layer& layer, const Operand& x, int row, float gate) {
    return _mm512_set1_ps(layer.weights == Weights::bf16 ? gate : gate * x.scales[row]);
}

void hidden(const Layer& layer, const uint8_t* expert, const Operand& x, int first, int last, float* h,
            size_t stride) {
    if (by_vectors(layer, x.rows)) return avx512()->hidden(layer, expert, x, first, last, h, stride);
    Scratch scratch;
    shape_tiles(x.rows < kRows ? x.rows : kRows);
    const size_t bytes = layer.hidden_bytes(), after = layer.numbers(x.depth);
    const bool scaled = layer.weights != Weights::bf16;
    const size_t bias_after = after + (scaled ? kLine : 0);
    const __m512 one = _mm512_set1_ps(1);
    const Activate act(*layer.activation);
    for (int panel = first; panel < last; panel += layer.gated ? 1 : 2) {
        // Gated: the panel of W_in and that of W_gate. Else: two panels of W_in.
        const uint8_t* in0 = expert + panel * bytes * (layer.gated ? 2 : 1);
        const uint8_t* in1 = layer.gated || panel + 1 < last ? in0 + bytes : in0;
        const __m512 scale0 = scaled ? vector(in0 + after) : one, bias0 = vector(in0 + bias_after);
        const __m512 scale1 = scaled ? vector(in1 + after) : one, bias1 = vector(in1 + bias_after);
        products(layer, in0, in1, x, scratch, [](int, int) {}, [&](int row, int count, const auto& sum) {
            for (int r = 0; r < count; ++r) {
                const __m512 factor = scale_of(layer, x, row + r, 1);
                const __m512 first_z = _mm512_fmadd_ps(sum(r, 0), _mm512_mul_ps(factor, scale0), bias0);
                const __m512 second_z = _mm512_fmadd_ps(sum(r, 1), _mm512_mul_ps(factor, scale1), bias1);
                float* at = h + (row + r) * stride + panel * kRows;
                if (layer.gated) {
                    _mm512_storeu_ps(at, _mm512_mul_ps(act(second_z), first_z));
                } else {
                    _mm512_storeu_ps(at, act(first_z));
                    if (in1 != in0) _mm512_storeu_ps(at + kRows, act(second_z));
                }
            }
        });
    }
}

void output(const Layer& layer, const uint8_t* expert, const Operand& h, int first, int last, float* y, size_t stride,
            const int32_t* index, const float* gates) {
    if (by_vectors(layer, h.rows)) return avx512()->output(layer, expert, h, first, last, y, stride, index, gates);
    Scratch scratch;
    shape_tiles(h.rows < kRows ? h.rows : kRows);
    const size_t bytes = layer.output_bytes(), after = layer.numbers(h.depth);
    const bool scaled = layer.weights != Weights::bf16;
    const __m512 one = _mm512_set1_ps(1);
    const uint8_t* out = layer.output_at(expert);
    for (int panel = first; panel < last; panel += 2) {
        const uint8_t* out0 = out + panel * bytes;
        const uint8_t* out1 = panel + 1 < last ? out0 + bytes : out0;
        const __m512 scale0 = scaled ? vector(out0 + after) : one, scale1 = scaled ? vector(out1 + after) : one;
        const __mmask16 valid0 = first_of(layer.width - panel * kRows);
        const __mmask16 valid1 = out1 == out0 ? 0 : first_of(layer.width - (panel + 1) * kRows);
        const auto soon = [&](int row, int count) {
            for (int r = row; r < row + count; ++r) {
                const float* at = y + stride * size_t(index[r]) + panel * kRows;
                _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0);
                _mm_prefetch(reinterpret_cast<const char*>(at + kRows), _MM_HINT_T0);
            }
        };
        products(layer, out0, out1, h, scratch, soon, [&](int row, int count, const auto& sum) {
            for (int r = 0; r < count; ++r) {
                const __m512 factor = scale_of(layer, h, row + r, gates[row + r]);
                float* at = y + stride * size_t(index[row + r]) + panel * kRows;
                add_output(at, valid0, sum(r, 0), _mm512_mul_ps(factor, scale0));
                add_output(at + kRows, valid1, sum(r, 1), _mm512_mul_ps(factor, scale1));
            }
        });
    }
}

bool supported() {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const unsigned wanted = 1u << 22 | 1u << 24 | 1u << 25; // amx-bf16, amx-tile, amx-int8
    if ((d & wanted) != wanted) return false;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & 1u << 5)) return false; // avx512-bf16
    constexpr long request_permission = 0x1023, tile_data = 18;                   // ARCH_REQ_XCOMP_PERM
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

} // namespace
} // namespace ffn2moe

const ffn2moe::Path* ffn2moe::amx() {
    static const Path path = {"amx", tile_bytes, load, hidden, output, keep_tiles, restore_tiles};
    static const bool here = avx512() && supported();
    return here ? &path : nullptr;
}
#else
#include "kernels.h"
const ffn2moe::Path* ffn2moe::amx() { return nullptr; }
#endif
