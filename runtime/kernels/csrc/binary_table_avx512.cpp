// Convolution by tables: images are dealt out to threads in bands of output rows and slices of outputs.
//
// A band goes from output row to output row. The tables of the input rows in sight are kept in a ring. A few groups at a
// time, as many as add up in a byte, tables of new rows are made and all sums of the output row are taken further: the
// tables of a few groups, the weights of these and the sums fit the L1 cache.
#include "binary_table_avx512.h"

#include "threads.h"

namespace fx {
namespace table {
namespace {

constexpr int64_t CODES_BYTES = 8 << 20;  // of the images that are computed together
constexpr int64_t PIECE = 512;            // pixels that a thread quantises at a time
constexpr int64_t WRITTEN = 112;          // pixels that are written together, whole vectors of 16 for many widths

// Tables of three channels by their code: of the index bits 0..2, and of the bits 3..5.
struct ThreeTables {
    alignas(64) uint8_t low[64][64], high[64][64];
    ThreeTables() {
        for (int code = 0; code < 64; code++)
            for (int j = 0; j < 64; j++) {
                low[code][j] = high[code][j] = 0;
                for (int i = 0; i < 3; i++) {
                    const int level = code >> 2 * i & 3;
                    low[code][j] = uint8_t(low[code][j] + (j >> i & 1) * level);
                    high[code][j] = uint8_t(high[code][j] + (j >> (i + 3) & 1) * level);
                }
            }
    }
};

// Filled at the first call: code of this file must not run while the library is loaded.
const ThreeTables& three_tables() {
    static const ThreeTables made;
    return made;
}

// Output rows [top, bottom) and blocks of 64 outputs [first, last) of one image.
class Band {
public:
    Band(const Job& of, int64_t of_image, int64_t row, int64_t row_end, int64_t block, int64_t block_end)
        : job(of), image(of_image), top(row), bottom(row_end), first(block), last(block_end) {}
    bool run();

private:
    const Job& job;
    const int64_t image, top, bottom, first, last;
    const BinaryCall& call = job.call;
    const BinaryLayout& layout = call.layout;
    bool three;               // three taps side by side, nothing to be read beyond the padding of one
    int64_t at_once, pieces;  // groups that add up in a byte; pieces of so many
    int64_t step, columns;    // input columns from table to table; tables of a row
    int64_t group_bytes, row_bytes, ring;
    int64_t tiles, lines;     // tiles of an output row; rows that are written together
    uint8_t* tables;          // [input row % ring][piece][group][column][64]
    uint16_t* sums;           // [block - first][line][column][64]
    int16_t* windows;         // [line][column]
    int64_t* made;            // [input row % ring] which row's tables are there

    bool plan();
    int64_t input_row(int64_t y, int64_t ky) const { return y * call.stride[0] - call.padding[0] + ky * call.dilation[0]; }
    bool is_inside(int64_t row) const { return row >= 0 && row < call.height; }
    void compute(int64_t y, int64_t line);
    void run_tiles(Tile* tile, int64_t piece, int64_t line) const;
    void make_tables(int64_t row, int64_t piece) const;
    void make_tables(int64_t row, int64_t group, uint8_t* to) const;
    void add_windows(int64_t y, int16_t* to) const;
};

bool Band::plan() {
    three = layout.kw == 3 && call.stride[1] == 1 && call.dilation[1] == 1 && call.padding[1] <= 1;
    at_once = six_at_once(layout);
    pieces = ceil_div(job.groups, at_once);
    step = layout.kw == 1 ? call.stride[1] : 1;
    columns = ((call.out_width - 1) * call.stride[1] + (layout.kw - 1) * call.dilation[1]) / step + 1;
    group_bytes = columns * 64, row_bytes = job.groups * group_bytes;
    ring = (layout.kh - 1) * call.dilation[0] + 1;
    tiles = ceil_div(call.out_width, MOST_COLUMNS);
    lines = least(bottom - top, ceil_div(WRITTEN, call.out_width));
    tables = static_cast<uint8_t*>(scratch(SLOT_CONV_IMAGE, size_t(ring * row_bytes)));
    sums = static_cast<uint16_t*>(scratch(SLOT_CONV_ROWS, size_t((last - first) * lines * call.out_width * 128)));
    void* found = scratch(SLOT_CONV_EXACT, size_t(ring) * sizeof(int64_t) + size_t(lines * call.out_width + 64) * 2);
    if (!tables || !sums || !found) return false;
    made = static_cast<int64_t*>(found);
    windows = reinterpret_cast<int16_t*>(made + ring);
    for (int64_t i = 0; i < ring; i++) made[i] = -1;
    return true;
}

void Band::make_tables(int64_t row, int64_t piece) const {
    const int64_t begin = piece * at_once, end = least(job.groups, begin + at_once);
    uint8_t* to = tables + row % ring * row_bytes + begin * group_bytes;
    for (int64_t group = begin; group < end; group++, to += group_bytes) make_tables(row, group, to);
}

// Tables of one group and the columns of an input row; those of the padding are zeros, which three taps never read.
void Band::make_tables(int64_t row, int64_t group, uint8_t* to) const {
    const ThreeTables& known = three_tables();
    const int64_t left = ceil_div(call.padding[1], step);
    const int64_t begin = least(columns, left), shift = left * step - call.padding[1];
    const int64_t inside = call.width <= shift ? 0 : ceil_div(call.width - shift, step);
    const int64_t end = least(columns, begin + inside);
    if (!three) {
        for (uint8_t* at = to; at < to + begin * 64; at += 64) _mm512_store_si512(at, _mm512_setzero_si512());
        for (uint8_t* at = to + end * 64; at < to + columns * 64; at += 64)
            _mm512_store_si512(at, _mm512_setzero_si512());
    }
    const int64_t other = job.groups * job.code_step(), next = step * job.pixel_step();
    const uint8_t* codes =
        job.codes_of(image) + (row * call.width + shift) * job.pixel_step() + group * job.code_step();
    uint8_t *at = to + begin * 64, *const stop = to + end * 64;
        for (; at < stop; at += 64, codes += next)
        _mm512_store_si512(
            at, _mm512_add_epi8(_mm512_load_si512(known.low[codes[0]]), _mm512_load_si512(known.high[codes[other]])));
}

// The sums of output row y.
void Band::compute(int64_t y, int64_t line) {
    Tile tile{};
    tile.kw = layout.kw, tile.group_bytes = group_bytes;
    tile.tap_bytes = layout.kw == 1 ? 0 : call.dilation[1] * 64;
    tile.column_bytes = call.stride[1] / step * 64;
    int64_t taps[TABLE_ROWS], rows[TABLE_ROWS];  // kernel rows that lie in the image, and where
    for (int64_t ky = 0; ky < layout.kh; ky++)
        if (is_inside(input_row(y, ky))) taps[tile.rows] = ky, rows[tile.rows++] = input_row(y, ky);
    for (int64_t i = 0; i < tile.rows; i++) tile.table_row[i] = rows[i] % ring * row_bytes;
    for (int64_t piece = 0; piece < pieces; piece++) {
        tile.groups = least(at_once, job.groups - piece * at_once), tile.begins = piece == 0;
        for (int64_t i = 0; i < tile.rows; i++) {
            if (made[rows[i] % ring] != rows[i]) make_tables(rows[i], piece);
            tile.weight_row[i] = taps[i] * tile.groups * layout.kw * 64;
        }
        run_tiles(&tile, piece, line);
    }
    for (int64_t i = 0; i < tile.rows; i++) made[rows[i] % ring] = rows[i];
}

// All columns and outputs of a piece; the tables of a tile stay in the L1 cache.
void Band::run_tiles(Tile* tile, int64_t piece, int64_t line) const {
    const int64_t begin = piece * at_once, block_words = lines * call.out_width * 64;
    const int64_t block_bytes = tile->groups * layout.taps() * 64;
    const uint8_t* const weights =
        layout.payload + begin * ceil_div(layout.outputs, 64) * layout.taps() * 64 + first * block_bytes;
    for (int64_t t = 0; t < tiles; t++) {
        const int64_t x = call.out_width * t / tiles, count = call.out_width * (t + 1) / tiles - x;
        TileFunction* const run_tile = tile_function(count, three);
        tile->tables = tables + begin * group_bytes + x * tile->column_bytes;
        tile->left = x < call.padding[1], tile->right = x + count + 2 - call.padding[1] > call.width;
        tile->weights = weights, tile->sums = sums + (line * call.out_width + x) * 64;
        for (int64_t block = first; block < last; block++) {
            run_tile(*tile);
            tile->weights += block_bytes, tile->sums += block_words;
        }
    }
}

void Band::add_windows(int64_t y, int16_t* to) const {
    const int64_t stride = call.stride[1];
    for (int64_t x = 0; x < call.out_width; x++) to[x] = 0;
    for (int64_t ky = 0; ky < layout.kh; ky++) {
        if (!is_inside(input_row(y, ky))) continue;
        const int16_t* totals = job.totals_of(image) + input_row(y, ky) * call.width;
        for (int64_t kx = 0; kx < layout.kw; kx++) {
            const int64_t shift = kx * call.dilation[1] - call.padding[1];
            const int64_t begin = shift < 0 ? ceil_div(-shift, stride) : 0;
            const int64_t end = call.width <= shift ? 0 : least(call.out_width, ceil_div(call.width - shift, stride));
            if (stride == 1)
                for (int64_t x = begin; x < end; x++) to[x] = int16_t(to[x] + totals[x + shift]);
            else
                for (int64_t x = begin; x < end; x++) to[x] = int16_t(to[x] + totals[x * stride + shift]);
        }
    }
}

bool Band::run() {
    if (!plan()) return false;
    for (int64_t y = top; y < bottom; y += lines) {
        const int64_t count = least(lines, bottom - y);
        for (int64_t line = 0; line < count; line++) {
            compute(y + line, line);
            add_windows(y + line, windows + line * call.out_width);
        }
        write({job, image, y * call.out_width, count * call.out_width, first, last, sums, lines * call.out_width * 64,
               windows});
    }
    return true;
}

// How the images of a job are dealt out.
struct Split {
    const Job& job;
    int64_t pieces;          // of an image, to quantise
    int64_t bands, slices;   // of an image, to compute
    int64_t outputs;         // blocks of 64
    bool failed;

    explicit Split(const Job& of)
        : job(of), pieces(1), bands(1), slices(1), outputs(ceil_div(of.call.layout.outputs, 64)), failed(false) {
        const BinaryCall& call = of.call;
        if (call.threads == 1) return;
        pieces = ceil_div(of.plane, PIECE);
        if (of.images >= 2 * call.threads) return;
        if (call.out_height >= 14) bands = least(call.out_height / 7, 2 * call.threads);
        if (bands < call.threads) slices = least(outputs, call.threads);
    }
};

void quantise(void* data, int64_t task) {
    Split& of = *static_cast<Split*>(data);
    const int64_t begin = task % of.pieces * PIECE;
    if (!find_codes(of.job, task / of.pieces, begin, of.pieces == 1 ? of.job.plane : least(of.job.plane, begin + PIECE)))
        of.failed = true;
}

void convolve(void* data, int64_t task) {
    Split& of = *static_cast<Split*>(data);
    const int64_t slice = task % of.slices, band = task / of.slices % of.bands, height = of.job.call.out_height;
    Band part(of.job, task / (of.slices * of.bands), height * band / of.bands, height * (band + 1) / of.bands,
              of.outputs * slice / of.slices, of.outputs * (slice + 1) / of.slices);
    if (!part.run()) of.failed = true;
}

int run(const BinaryCall& call) {
    const int64_t plane = ceil_div(call.pixels(), 64) * 64;
    Job job{call, six_groups(call.layout), 0, 0, !call.levels_in && !call.channels_last, plane, nullptr,
            nullptr};
    const int64_t together = most(1, least(call.batch, CODES_BYTES / most(1, job.image_bytes())));
    job.codes = static_cast<uint8_t*>(scratch(SLOT_CONV_CALL, size_t(together * job.image_bytes())));
    job.totals = static_cast<int16_t*>(scratch(SLOT_CONV_INDEX, size_t(together * plane) * 2));
    if (!job.codes || !job.totals) return fail(NO_MEMORY, "No memory for the levels of a binary convolution");
    for (; job.first < call.batch; job.first += together) {
        job.images = least(together, call.batch - job.first);
        Split split(job);
        parallel(call.threads, job.images * split.pieces, quantise, &split);
        parallel(call.threads, job.images * split.bands * split.slices, convolve, &split);
        if (split.failed) return fail(NO_MEMORY, "No memory for the tables of a binary convolution");
    }
    return OK;
}

}  // namespace
}  // namespace table

BinaryRun* const binary_table_avx512 = table::run;

}  // namespace fx
