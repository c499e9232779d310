#include "layout.h"

#include <cstring>

#include "pq_conv.h"

namespace fx {
namespace {

constexpr uint32_t LIMIT = 1u << 24;

// Little endian on any machine.
uint32_t word(const uint8_t* data) {
    return uint32_t(data[0]) | uint32_t(data[1]) << 8 | uint32_t(data[2]) << 16 | uint32_t(data[3]) << 24;
}

bool is_sane(const Layout& layout) {
    uint32_t k = layout.codewords;
    const uint32_t sizes[] = {layout.taps, layout.subspaces, layout.outputs, layout.groups};
    for (uint32_t size : sizes)
        if (size < 1 || size >= LIMIT) return false;
    return k >= 2 && k <= 256 && (k & (k - 1)) == 0 && layout.outputs % layout.groups == 0;
}

int64_t bits(const Layout& layout) { return layout.codewords <= 16 ? 4 : 5; }

// Bytes per sub-space step (one lane word, row or pair) over all panels: outputs rounded up to `unit`.
int64_t rounded(const Layout& layout, int64_t unit) { return ceil_div(layout.outputs, unit) * unit; }

// Outputs of the panel that begins at output `begin`, rounded up to `unit`.
int64_t panel_width(const Layout& layout, int64_t begin, int64_t unit) {
    return least(PANEL, rounded(layout, unit) - begin);
}

}  // namespace

int64_t tap_bytes(const Layout& layout) {
    int64_t m = layout.subspaces;
    switch (layout.id) {
        case PLAIN: return m * layout.outputs;
        case LANES: return layout.codewords > 32 ? -1 : ceil_div(m, 32 / bits(layout)) * rounded(layout, 16) * 4;
        case ROWS: return m * rounded(layout, 64);
        case PAIRS: return layout.codewords > 16 ? -1 : ceil_div(m, 2) * rounded(layout, 32);
        case CONV1: case CONV2: case CONV4: return conv_tap_bytes(layout);
        default: return -1;
    }
}

int read_layout(const uint8_t* data, int64_t bytes, Layout* layout) {
    if (!data || bytes < HEADER_BYTES || memcmp(data, "FXPQIDX1", 8) != 0)
        return fail(BAD_LAYOUT, "Not an index layout: %lld bytes without its mark", (long long)bytes);
    layout->id = word(data + 8), layout->codewords = word(data + 12), layout->taps = word(data + 16);
    layout->subspaces = word(data + 20), layout->outputs = word(data + 24), layout->groups = word(data + 28);
    layout->payload = data + HEADER_BYTES;
    uint64_t payload = uint64_t(word(data + 32)) | uint64_t(word(data + 36)) << 32;
    int64_t per_tap = is_sane(*layout) ? tap_bytes(*layout) : -1;
    // 2^24 * 2^24 * 1 fits 63 bits, a further 2^24 may not: compare by division
    bool fits = per_tap > 0 && payload / uint64_t(per_tap) == layout->taps && payload % uint64_t(per_tap) == 0 &&
                uint64_t(bytes - HEADER_BYTES) == payload;
    if (fits) return OK;
    return fail(BAD_LAYOUT,
                "An index layout whose header does not fit its %lld bytes: layout %u, %u code words, %u taps, "
                "%u sub-spaces, %u outputs, %u groups, payload %llu",
                (long long)bytes, layout->id, layout->codewords, layout->taps, layout->subspaces, layout->outputs,
                layout->groups, (unsigned long long)payload);
}

void unpack_row(const Layout& layout, int64_t tap, int64_t m, int64_t begin, int64_t count, uint8_t* row) {
    if (layout.id >= CONV1 && layout.id <= CONV4) return conv_unpack_row(layout, tap, m, begin, count, row);
    const uint8_t* data = layout.payload + tap * tap_bytes(layout);
    const uint8_t mask = uint8_t(layout.codewords - 1);
    const int64_t per_lane = 32 / bits(layout), shift = m % per_lane * bits(layout);
    const int64_t steps_lanes = ceil_div(layout.subspaces, per_lane), steps_pairs = ceil_div(layout.subspaces, 2);
    for (int64_t i = 0; i < count; i++) {
        int64_t output = begin + i, panel = output / PANEL * PANEL, column = output - panel;
        uint32_t value = 0;
        switch (layout.id) {
            case PLAIN: value = data[m * layout.outputs + output]; break;
            case LANES: {
                int64_t width = panel_width(layout, panel, 16);
                value = word(data + 4 * (panel * steps_lanes + m / per_lane * width + column)) >> shift;
                break;
            }
            case ROWS: value = data[panel * layout.subspaces + m * panel_width(layout, panel, 64) + column]; break;
            case PAIRS:
                value = data[panel * steps_pairs + m / 2 * panel_width(layout, panel, 32) + column] >> (m % 2 * 4);
                break;
            default: break;
        }
        row[i] = uint8_t(value) & mask;
    }
}

}  // namespace fx
