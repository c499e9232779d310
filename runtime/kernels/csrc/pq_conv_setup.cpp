// What all images of a call share: sizes, 16-bit code words, indices, bias.
#include <cmath>
#include <cstring>

#include "pq_conv_call.h"

namespace fx {

constexpr int64_t NARROW = 16;

void lay_out(Call& call) {
    const ConvShape& s = call.shape;
    ConvTables& t = call.tables;
    t.entries = most(16, s.codewords);
    call.kernels->choose(&t, s.subspaces);
    t.terms = ceil_div(s.subspaces, t.gang), t.term_bytes = t.gang * t.entries;
    t.pairs = ceil_div(least(s.subwidth, s.group_channels), 2);
    t.columns = (s.out_width - 1) * s.stride[1] + (s.kernel[1] - 1) * s.dilation[1] + 1;
    t.blocks = ceil_div(s.group_outputs, BLOCK), t.acc_bytes = t.gang == 4 ? BLOCK * 4 : BLOCK * 2;
    // what a run of build() costs to begin counts in narrow images; each row must be of use
    call.batch = s.width <= NARROW && s.stride[0] <= s.kernel[0] && s.dilation[0] == 1 ? 2 : 1;
    int64_t log = 0;
    while ((int64_t(1) << log) < s.subwidth) log++;
    const int64_t code_bits = least(14, (31 - log) / 2), sample_bits = least(14, (30 - log) / 2);
    call.sample_top = float((1 << sample_bits) - 1);
    call.code_scale = float((1 << code_bits) - 1);  // divided by the largest code below
    // sums of 14-bit entries must fit 32 bits; a code book of more than 2^18 inputs per word has no bits left
    call.quantized = call.mode != FP32 && log <= 12 && call.taps() < (1 << 17) &&
                     call.taps() * ceil_div(s.subspaces, 4) * 4 < (1 << 17);
}

namespace {

// Columns of tables that some output pixel reads and that lie inside of the image.
void list_columns(Call& call, uint8_t* used) {
    const ConvShape& s = call.shape;
    memset(used, 0, size_t(call.tables.columns));
    for (int64_t x = 0; x < s.out_width; x++)
        for (int64_t k = 0; k < s.kernel[1]; k++) used[x * s.stride[1] + k * s.dilation[1]] = 1;
    for (int64_t c = 0; c < call.tables.columns; c++) {
        const int64_t input = c - s.padding[1];
        if (!used[c] || input < 0 || input >= s.width) continue;
        call.inputs[call.count] = int32_t(input), call.targets[call.count++] = int32_t(c);
    }
    for (int64_t i = call.count; i < call.batch * call.count; i++) {  // the next row, of x and of tables
        call.inputs[i] = int32_t(call.inputs[i - call.count] + s.width);
        call.targets[i] = int32_t(call.targets[i - call.count] + call.tables.terms * call.tables.columns);
    }
}

float largest_code(const Call& call) {
    const int64_t size = call.shape.subspaces * call.shape.codewords * call.shape.subwidth;
    const uint32_t bits = call.kernels->largest(call.codebook, size);
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// Words of one sub-space, [pair][entry], in the order of build(): groups of 4 entries stay together.
void place(const Call& call, int64_t slot, const int32_t* words) {
    const ConvTables& t = call.tables;
    const int64_t lanes = call.kernels->lanes, sub = slot % t.gang, entry = t.gang == 4 ? 0 : sub * t.entries;
    const int64_t chunk = t.gang == 4 ? lanes : 4 * lanes;  // entries of this sub-space in a chunk
    int32_t* base = call.codes + slot / t.gang * t.term_bytes * t.pairs;
    for (int64_t k = 0, number = entry / chunk, r = entry % chunk; k < t.entries; k += 4) {
        const int64_t vector = t.gang == 4 ? sub : r / 4 % 4, lane = t.gang == 4 ? r : r / 16 * 4;
        for (int64_t p = 0; p < t.pairs; p++)
            memcpy(base + ((number * t.pairs + p) * 4 + vector) * lanes + lane, words + p * t.entries + k, 16);
        r += 4;
        if (r == chunk) r = 0, number++;
    }
}

// 16-bit code words in the order of build(), and the length of the longest of each sub-space. `words` has room for one
// sub-space, `rows` for its code words.
void round_codebook(Call& call, int32_t* words, float* rows, float* lengths) {
    const ConvShape& s = call.shape;
    const ConvTables& t = call.tables;
    memset(call.codes, 0, size_t(call.slots() * t.entries * t.pairs) * 4);
    memset(words, 0, size_t(t.entries * t.pairs) * 4);
    for (int64_t slot = 0; slot < call.slots(); slot++) {
        call.longest[slot] = 0;
        if (slot >= s.subspaces) continue;
        const float* from = call.codebook + slot * s.codewords * s.subwidth;
        if (!call.dims_major) {
            call.kernels->transpose(from, s.subwidth, s.codewords, s.subwidth, rows, s.codewords);
            from = rows;
        }
        for (int64_t p = 0; p < t.pairs; p++) {
            const float* even = from + 2 * p * s.codewords;
            call.kernels->samples(even, 2 * p + 1 < s.subwidth ? even + s.codewords : nullptr, s.codewords, call.code_scale,
                                  words + p * t.entries);
        }
        call.longest[slot] = call.kernels->bounds(words, t.entries, t.pairs, t.entries, 1, lengths);
        place(call, slot, words);
    }
}

void pad_bias(Call& call) {
    const ConvShape& s = call.shape;
    const int64_t width = call.tables.blocks * BLOCK;
    memset(call.padded_bias, 0, size_t(s.groups * width) * 4);
    for (int64_t g = 0; call.bias && g < s.groups; g++)
        memcpy(call.padded_bias + g * width, call.bias + g * s.group_outputs, size_t(s.group_outputs) * 4);
}

}  // namespace

int prepare(Call& call) {
    const ConvShape& s = call.shape;
    const ConvTables& t = call.tables;
    for (Arena arena{nullptr};;) {
        const bool real = arena.base;
        arena.used = 0;
        call.codes = arena.take<int32_t>(call.slots() * t.entries * t.pairs);
        int32_t* words = arena.take<int32_t>(t.entries * t.pairs);
        float* rows = arena.take<float>(s.codewords * s.subwidth + t.entries);
        call.longest = arena.take<float>(call.slots());
        call.padded_bias = arena.take<float>(s.groups * t.blocks * BLOCK);
        call.inputs = arena.take<int32_t>(call.batch * t.columns);
        call.targets = arena.take<int32_t>(call.batch * t.columns);
        uint8_t* used = arena.take<uint8_t>(t.columns);
        call.exact = arena.take<uint8_t>(s.images);
        if (!real) {
            arena.base = static_cast<uint8_t*>(scratch(SLOT_CONV_CALL, arena.used));
            if (!arena.base) return fail(NO_MEMORY, "No memory for a code book of %zu bytes", arena.used);
            continue;
        }
        list_columns(call, used);
        memset(call.exact, 0, size_t(s.images));
        pad_bias(call);
        const float largest = largest_code(call);
        call.quantized = call.quantized && (largest == 0 || (largest >= SMALLEST_RANGE && largest <= LARGEST_RANGE));
        if (!call.quantized) return OK;
        call.code_scale = largest == 0 ? 0 : call.code_scale / largest;
        round_codebook(call, words, rows, rows + s.codewords * s.subwidth);
        break;
    }
    if (int64_t(call.layout.id) == (t.gang == 4 ? CONV4 : t.gang == 2 ? CONV2 : CONV1)) {
        call.index = call.layout.payload;
        return OK;
    }
    const int64_t bytes = s.groups * t.blocks * call.taps() * t.terms * t.gang * BLOCK;
    uint8_t* payload = static_cast<uint8_t*>(scratch(SLOT_CONV_INDEX, size_t(bytes + s.outputs)));
    if (!payload) return fail(NO_MEMORY, "No memory for %lld bytes of indices", (long long)bytes);
    conv_pack(call.layout, t.gang, payload, payload + bytes);
    call.index = payload;
    return OK;
}

int prepare_exact(Call& call) {
    const ConvShape& s = call.shape;
    const int64_t entries = call.tables.entries, rows = call.taps() * s.subspaces;
    for (Arena arena{nullptr};;) {
        const bool real = arena.base;
        arena.used = 0;
        uint8_t* plain = arena.take<uint8_t>(call.layout.id == PLAIN ? 0 : rows * s.outputs);
        float* codes = arena.take<float>(s.subspaces * s.subwidth * entries);
        if (!real) {
            arena.base = static_cast<uint8_t*>(scratch(SLOT_CONV_EXACT, arena.used));
            if (!arena.base) return fail(NO_MEMORY, "No memory for indices of %zu bytes", arena.used);
            continue;
        }
        for (int64_t i = 0; call.layout.id != PLAIN && i < rows; i++)
            unpack_row(call.layout, i / s.subspaces, i % s.subspaces, 0, s.outputs, plain + i * s.outputs);
        call.plain = call.layout.id == PLAIN ? call.layout.payload : plain;
        for (int64_t i = 0; i < s.subspaces * s.subwidth; i++)
            for (int64_t k = 0; k < entries; k++)
                codes[i * entries + k] = k < s.codewords ? call.code(i / s.subwidth, k, i % s.subwidth) : 0;
        call.exact_codes = codes;
        return OK;
    }
}

}  // namespace fx
