// Index layouts of the convolution, for the general reader in layout.cpp and for instruction sets that want another.
#include <cstring>

#include "pq_conv.h"

namespace fx {
namespace {

struct Shape {
    int64_t gang, entries, terms, group_outputs, blocks, taps;

    Shape(const Layout& layout, int64_t gang_)
        : gang(gang_),
          entries(conv_entries(layout)),
          terms(ceil_div(layout.subspaces, gang_)),
          group_outputs(layout.outputs / layout.groups),
          blocks(ceil_div(group_outputs, BLOCK)),
          taps(layout.taps) {}

    // Byte of an index: vector and lane are those of the block's channel and the term's sub-space.
    int64_t at(int64_t tap, int64_t m, int64_t output) const {
        const int64_t group = output / group_outputs, channel = output % group_outputs;
        const int64_t c = channel % BLOCK, per_vector = BLOCK / gang;
        const int64_t vector = gang == 1 ? 0 : c / per_vector;
        const int64_t lane = gang == 1 ? c % 32 * 2 + c / 32 : c % per_vector * gang + m % gang;
        const int64_t block = group * blocks + channel / BLOCK;
        return (((block * terms + m / gang) * taps + tap) * gang + vector) * BLOCK + lane;
    }
};

}  // namespace

int64_t conv_gang(const Layout& layout) { return layout.id == CONV4 ? 4 : layout.id == CONV2 ? 2 : 1; }

int64_t conv_entries(const Layout& layout) { return most(16, layout.codewords); }

int64_t conv_tap_bytes(const Layout& layout) {
    const int64_t gang = conv_gang(layout), entries = conv_entries(layout);
    if ((gang == 4 && entries > 32) || (gang == 2 && entries != 64)) return -1;
    const int64_t blocks = ceil_div(layout.outputs / layout.groups, BLOCK);
    return layout.groups * blocks * ceil_div(layout.subspaces, gang) * gang * BLOCK;
}

void conv_unpack_row(const Layout& layout, int64_t tap, int64_t m, int64_t begin, int64_t count, uint8_t* row) {
    const Shape shape(layout, conv_gang(layout));
    const uint8_t mask = uint8_t(layout.codewords - 1);
    for (int64_t i = 0; i < count; i++) {
        const int64_t byte = layout.payload[shape.at(tap, m, begin + i)];
        row[i] = uint8_t(shape.gang == 4 ? byte / 64 * 16 + byte / 16 % 4 * 4 + byte % 4 : byte) & mask;
    }
}

void conv_pack(const Layout& layout, int64_t gang, uint8_t* payload, uint8_t* row) {
    const Shape shape(layout, gang);
    const int64_t blocks = shape.blocks * layout.groups;
    memset(payload, 0, size_t(blocks * shape.taps * shape.terms * gang * BLOCK));
    for (int64_t tap = 0; tap < shape.taps; tap++)
        for (int64_t m = 0; m < shape.terms * gang; m++) {
            if (m < layout.subspaces)
                unpack_row(layout, tap, m, 0, layout.outputs, row);
            else
                memset(row, 0, layout.outputs);  // a sub-space beyond the last has tables of its own, of zeros
            for (int64_t o = 0; o < layout.outputs; o++)
                payload[shape.at(tap, m, o)] = uint8_t(term_byte(gang, shape.entries, m % gang, row[o]));
        }
}

}  // namespace fx
