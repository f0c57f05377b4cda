// The path of any processor.
#include "generic.h"

const ffn2moe::Path* ffn2moe::plain() {
    static const Path path = {"plain",         Generic::tile_bytes, Generic::load,   Generic::hidden,
                              Generic::output, Generic::nothing,    Generic::nothing};
    return &path;
}
