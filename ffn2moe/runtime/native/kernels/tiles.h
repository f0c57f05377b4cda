// The shapes of a thread's AMX tiles. The engine's own kernels keep theirs between calls, so they are brought back.
#pragma once

#include <cstdint>
#include <immintrin.h>

namespace ffn2moe {
namespace {

// How tiles 0 to 7 are shaped: sums 0 to 3 and operands 4, 5 have `rows` rows, operands 6, 7 have 16.
struct alignas(64) Shape {
    uint8_t palette, start_row, zero[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

inline void shape_tiles(int rows) {
    Shape shape = {};
    shape.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
        shape.bytes[tile] = 64;
        shape.rows[tile] = uint8_t(tile < 6 ? rows : 16);
    }
    __asm__ volatile("" : : "r"(&shape) : "memory"); // the compiler believes that eight bytes of it are read
    _tile_loadconfig(&shape);
}

thread_local Shape others; // the shape that the thread had

inline void keep_tiles() { _tile_storeconfig(&others); }

inline void restore_tiles() {
    if (others.palette)
        _tile_loadconfig(&others);
    else
        _tile_release();
}

} // namespace
} // namespace ffn2moe
