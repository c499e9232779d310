// Convolution by tables: what its files (binary_*_avx512.cpp) share.
//
// Six weights are an index into a table of the 64 sums of as many levels (vpermb). A pixel's table serves all taps and all
// outputs. Group g of G holds the channels g, g + G, ... g + 5 G.
//
//     binary_codes_avx512.cpp    levels of three channels -> a code of six bits; sums of all levels of a pixel
//     binary_table_avx512.cpp    images, bands and rows; codes -> tables
//     binary_tile_avx512.cpp     tables -> sums of a few pixels and 64 outputs
//     binary_write_avx512.cpp    sums -> float32 or levels
#pragma once

#include <immintrin.h>

#include "binary.h"

namespace fx {
namespace table {

// The images of a call that are computed together.
struct Job {
    const BinaryCall& call;
    int64_t groups;         // of six channels
    int64_t first, images;  // of the batch
    bool planar;            // x is (N, C, H, W)
    // [image]: planes of all pixels [half][group][pixel], or [pixel][half][group]. Half 0 has the levels of the first
    // three channels of a group, two bits each, half 1 those of the other three.
    uint8_t* codes;
    int16_t* totals;  // [image][pixel] sum of all levels

    int64_t pixel_step() const { return planar ? 1 : 2 * groups; }
    int64_t code_step() const { return planar ? call.pixels() : 1; }
    int64_t image_bytes() const { return 2 * groups * call.pixels() + 64; }
    int64_t image_totals() const { return ceil_div(call.pixels(), 64) * 64; }  // written by whole vectors
    uint8_t* codes_of(int64_t image) const { return codes + image * image_bytes(); }
    int16_t* totals_of(int64_t image) const { return totals + image * image_totals(); }
};

// Of a code, the sum of its levels.
struct CodeTotals {
    alignas(64) uint8_t of[64] = {};
    constexpr CodeTotals() {
        for (int code = 0; code < 64; code++) of[code] = uint8_t((code & 3) + (code >> 2 & 3) + (code >> 4));
    }
};

// Codes and totals of the pixels [begin, end) of an image; `begin` is a multiple of 64. False if there is no memory.
bool find_codes(const Job& job, int64_t image, int64_t begin, int64_t end);

constexpr int64_t MOST_COLUMNS = 8;  // output pixels of a tile

// Sums of `columns` pixels and 64 outputs over some groups and all kernel rows that lie in the image.
struct Tile {
    const uint8_t *tables, *weights;  // of the first group; weights of the first of these kernel rows
    int64_t rows, groups, kw;
    int64_t look_ups;                 // at most, or of one kernel row, that are added up in a byte
    int64_t table_row[TABLE_ROWS];    // where the tables of a kernel row begin
    int64_t group_bytes, tap_bytes, column_bytes;  // steps in `tables`
    int64_t group_weights;            // step in `weights`
    bool begins;       // whether these are the first groups: what `sums` held does not count
    uint16_t* sums;    // [pixel]: 32 words S[o] + 256 S[o + 32] for the outputs o = 0..31, 32 words S[o + 32]
};
// False, and `sums` is as it was, if look_ups > BYTE_SUMS and a byte may have overflowed.
using TileFunction = bool(const Tile& tile);

// One tap has functions of its own, and so have three taps side by side under columns side by side or two apart. Of
// THREE_TAPS, `left` and `right` tell whether the first and the last of columns + 2 tables count: not if they lie in
// the padding.
enum Taps { ANY_TAPS, ONE_TAP, THREE_TAPS, THREE_TAPS_OF_TWO };
TileFunction* tile_function(int64_t rows, int64_t columns, Taps taps, bool left, bool right);

// Sums of the pixels [place, place + pixels) of an image -> y.
struct Finished {
    const Job& job;
    int64_t image, place, pixels;
    int64_t first, last;     // blocks of 64 outputs
    uint16_t* sums;          // [block - first][pixel][64] as a tile leaves them; overwritten
    int64_t block_step;      // from block to block in `sums`
    const int16_t* windows;  // [pixel] sum of all levels of the window
};
void write(const Finished& finished);

}  // namespace table
}  // namespace fx
