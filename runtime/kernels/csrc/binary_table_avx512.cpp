// Convolution by tables: images are dealt out to threads in bands of output rows and slices of outputs.
//
// A band takes a chunk of groups and a strip of columns at a time, and goes through them from output row to output
// row. The tables of the input rows in sight are kept in a ring, which the L1 cache holds beside the weights of the
// chunk. The sums of some rows, up to a part of the L2 cache, wait for the other chunks.
#include "binary_table_avx512.h"

#include <cstring>

#include "threads.h"

namespace fx {
namespace table {
namespace {

constexpr int64_t CODES_BYTES = 8 << 20;  // of the images that are computed together
constexpr int64_t PIECE = 512;            // pixels that a thread quantises at a time
constexpr int64_t FEW_BYTES = 34 << 10;   // of tables, where as many groups as that allows are taken together
constexpr int64_t MOST_BYTES = 40 << 10;  // of tables that the L1 cache holds beside a stream of weights and sums
constexpr int64_t PART_BYTES = 100 << 10;  // of tables and weights
constexpr int64_t SUMS_BYTES = 256 << 10;  // a part of the L2 cache
// Look-ups that are added up in a byte at first, half as many after one that may have overflowed, and so on. The sums
// of usual activations are far below 255; of as few as SURE even those of the highest levels are, unless nearly all
// weights are +1.
constexpr int64_t MANY = 72, SURE = 18;
constexpr int64_t WRITTEN = 112;          // pixels that are written together, whole vectors of 16 for many widths

struct TableBytes {
    CodeTotals totals;
    alignas(64) uint8_t kept[64] = {};      // [j]: the levels of a code that the low three bits of j pick
    alignas(64) uint8_t round[8][64] = {};  // [i]: 8 i to 8 i + 7 in turn
    alignas(64) uint8_t each[8][64] = {};   // [i]: 8 i to 8 i + 7, each eight times
    constexpr TableBytes() {
        for (int j = 0; j < 64; j++) {
            kept[j] = uint8_t((j & 1 ? 3 : 0) + (j & 2 ? 12 : 0) + (j & 4 ? 48 : 0));
            for (int i = 0; i < 8; i++) round[i][j] = uint8_t(8 * i + j % 8), each[i][j] = uint8_t(8 * i + j / 8);
        }
    }
};
constexpr TableBytes TABLE_BYTES;

// Codes -> tables, eight at a time.
class TableMaker {
public:
    TableMaker() {
        const TableBytes* bytes = &TABLE_BYTES;
#if defined(__GNUC__)
        // constants that a compiler knows it makes anew, by instructions that compete with the permutes
        asm("" : "+r"(bytes));
#endif
        total_ = _mm512_load_si512(bytes->totals.of), kept_ = _mm512_load_si512(bytes->kept);
        FX_UNROLL
        for (int i = 0; i < 8; i++)
            round_[i] = _mm512_load_si512(bytes->round[i]), each_[i] = _mm512_load_si512(bytes->each[i]);
    }
    // By the codes of their first and of their other three channels, eight bytes each; the first `count` are stored,
    // `step` bytes apart.
    FX_INLINE void make(const uint8_t* low_codes, const uint8_t* high_codes, uint8_t* to, int64_t step,
                        int64_t count) const {
        const __m512i low = sums(low_codes), high = sums(high_codes);
        if (count >= 8) {
            FX_UNROLL
            for (int i = 0; i < 8; i++) _mm512_store_si512(to + i * step, table(low, high, i));
            return;
        }
        FX_UNROLL
        for (int i = 0; i < 8; i++) {
            if (i >= count) return;
            _mm512_store_si512(to + i * step, table(low, high, i));
        }
    }

private:
    // [code][8]: the sums of three levels by three bits of an index
    FX_INLINE __m512i sums(const uint8_t* codes) const {
        const __m512i eight = _mm512_broadcastq_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
        const __m512i picked = _mm512_and_si512(_mm512_permutexvar_epi8(each_[0], eight), kept_);
        return _mm512_permutexvar_epi8(picked, total_);
    }
    // Of an index, the low three bits come round eight times, and the high ones change every eight times.
    FX_INLINE __m512i table(__m512i low, __m512i high, int i) const {
        return _mm512_add_epi8(_mm512_permutexvar_epi8(round_[i], low), _mm512_permutexvar_epi8(each_[i], high));
    }
    __m512i total_, kept_, round_[8], each_[8];
};

// Output rows [top, bottom) and blocks of 64 outputs [first, last) of one image.
class Band {
public:
    Band(const Job& of, int64_t of_image, int64_t row, int64_t row_end, int64_t block, int64_t block_end)
        : job(of), image(of_image), top(row), bottom(row_end), first(block), last(block_end) {}
    bool run();

private:
    // Tiles [begin, end) of a row, the output columns from x on, the tables from `column` on.
    struct Strip {
        int64_t begin, end, x, column, columns;
    };

    const Job& job;
    const int64_t image, top, bottom, first, last;
    const BinaryCall& call = job.call;
    const BinaryLayout& layout = call.layout;
    Taps taps;                   // THREE_TAPS only if nothing is to be read beyond the padding of one
    int64_t chunk;               // groups whose tables are made together
    int64_t look_ups = MANY;     // that are added up in a byte; fewer after one that may have overflowed
    int64_t step, column_step;   // input columns from table to table; tables from output to output
    int64_t ring;                // rows of tables
    int64_t group_bytes, row_bytes;
    int64_t tiles, strips;       // of an output row
    bool keeps_tables;           // whether they stay when the sums of some rows are done
    int64_t lines;               // rows whose sums are held
    uint8_t* tables;             // [input row % ring][group of the chunk][column of the strip][64]
    uint16_t* sums;              // [block - first][line][column][64]
    int16_t* windows;            // [line][column]
    int16_t* column_sums;        // [input column] of all levels under the kernel's rows, zeros in the padding
    int64_t* made;               // [input row % ring] which row's tables are there

    bool plan();
    bool fits(int64_t groups, int64_t strip_tiles, int64_t most_bytes) const;
    void plan_parts();
    int64_t columns_of(int64_t outputs) const;
    int64_t tile_column(int64_t tile) const { return call.out_width * tile / tiles; }
    int64_t input_row(int64_t y, int64_t ky) const {
        return y * call.stride[0] - call.padding[0] + ky * call.dilation[0];
    }
    bool is_inside(int64_t row) const { return row >= 0 && row < call.height; }
    Strip strip_of(int64_t index) const;
    void forget_tables();
    void compute(int64_t y, int64_t line, int64_t group, const Strip& strip);
    void run_tiles(Tile* tile, int64_t line, int64_t group, const Strip& strip);
    void make_tables(int64_t row, int64_t group, const Strip& strip) const;
    void clear_tables(uint8_t* to, int64_t groups, int64_t count) const;
    void make_inside(const uint8_t* codes, uint8_t* to, int64_t groups, int64_t pixels) const;
    void add_windows(int64_t y, int16_t* to) const;
    void write_lines(int64_t y, int64_t count) const;
};

// Tables under `outputs` outputs side by side.
int64_t Band::columns_of(int64_t outputs) const {
    return ((outputs - 1) * call.stride[1] + (layout.kw - 1) * call.dilation[1]) / step + 1;
}

bool Band::plan() {
    const bool three = layout.kw == 3 && call.dilation[1] == 1;
    taps = three && call.stride[1] == 1 && call.padding[1] <= 1 ? THREE_TAPS
           : three && call.stride[1] == 2                       ? THREE_TAPS_OF_TWO
           : layout.kw == 1                                     ? ONE_TAP
                                                                : ANY_TAPS;
    step = layout.kw == 1 ? call.stride[1] : 1, column_step = call.stride[1] / step;
    ring = (layout.kh - 1) * call.dilation[0] + 1;
    tiles = ceil_div(call.out_width, MOST_COLUMNS);
    plan_parts();
    tables = static_cast<uint8_t*>(scratch(SLOT_CONV_IMAGE, size_t(ring * row_bytes)));
    sums = static_cast<uint16_t*>(scratch(SLOT_CONV_ROWS, size_t((last - first) * lines * call.out_width * 128)));
    // whole vectors are read and written
    const int64_t held = lines * call.out_width + 32, across = call.width + 2 * call.padding[1] + 32;
    void* found = scratch(SLOT_CONV_EXACT, size_t(ring) * sizeof(int64_t) + size_t(held + across) * 2);
    if (!tables || !sums || !found) return false;
    made = static_cast<int64_t*>(found);
    windows = reinterpret_cast<int16_t*>(made + ring);
    column_sums = windows + held;
    memset(column_sums, 0, size_t(across) * 2);
    forget_tables();
    return true;
}

// Whether the tables that a strip of so many tiles goes through for each output row are at most `most_bytes`, and a cache
// holds them and their weights.
bool Band::fits(int64_t groups, int64_t strip_tiles, int64_t most_bytes) const {
    const int64_t width = least(call.out_width, strip_tiles * ceil_div(call.out_width, tiles));
    const int64_t of_tables = groups * 64 * ring * columns_of(width);
    return of_tables <= most_bytes && of_tables + groups * 64 * (last - first) * layout.taps() <= PART_BYTES;
}

// As many groups at a time as leave room for a strip of one tile, because all sums are read and written for each chunk;
// then strips as wide as there is room for; as many rows as their sums may take.
void Band::plan_parts() {
    int64_t strip_tiles = 1;
    chunk = 1;
    while (chunk < job.groups && fits(chunk + 1, 1, FEW_BYTES)) chunk++;
    chunk = ceil_div(job.groups, ceil_div(job.groups, chunk));
    while (strip_tiles < tiles && fits(chunk, strip_tiles + 1, MOST_BYTES)) strip_tiles++;
    strips = ceil_div(tiles, strip_tiles), strip_tiles = ceil_div(tiles, strips);
    group_bytes = columns_of(least(call.out_width, strip_tiles * ceil_div(call.out_width, tiles))) * 64;
    row_bytes = chunk * group_bytes + 3 * 64;
    keeps_tables = strips == 1 && chunk == job.groups;
    const int64_t rows = bottom - top, written = ceil_div(WRITTEN, call.out_width);
    const int64_t held = SUMS_BYTES / ((last - first) * call.out_width * 128);
    lines = least(rows, keeps_tables ? written : most(written, held));
    lines = ceil_div(rows, ceil_div(rows, lines));
}

Band::Strip Band::strip_of(int64_t index) const {
    const int64_t begin = tiles * index / strips, end = tiles * (index + 1) / strips, x = tile_column(begin);
    return {begin, end, x, x * column_step, columns_of(tile_column(end) - x)};
}

void Band::forget_tables() {
    for (int64_t i = 0; i < ring; i++) made[i] = -1;
}

// Tables of an input row and the groups of a chunk from `group` on; those of the padding are zeros, which three taps
// never read.
void Band::make_tables(int64_t row, int64_t group, const Strip& strip) const {
    const int64_t groups = least(chunk, job.groups - group), padding = call.padding[1];
    const int64_t stop = strip.column + strip.columns;
    const int64_t begin = least(stop, most(strip.column, ceil_div(padding, step)));
    const int64_t end = most(begin, least(stop, ceil_div(call.width + padding, step)));
    uint8_t* const to = tables + row % ring * row_bytes;
    const uint8_t* const codes = job.codes_of(image) + (row * call.width + begin * step - padding) * job.pixel_step() +
                                 group * job.code_step();
    make_inside(codes, to + (begin - strip.column) * 64, groups, end - begin);
    if (taps == THREE_TAPS) return;
    clear_tables(to, groups, begin - strip.column);
    clear_tables(to + (end - strip.column) * 64, groups, stop - end);
}

void Band::clear_tables(uint8_t* to, int64_t groups, int64_t count) const {
    for (int64_t group = 0; group < groups; group++, to += group_bytes)
        for (int64_t i = 0; i < count; i++) _mm512_store_si512(to + i * 64, _mm512_setzero_si512());
}

// Tables of pixels, from codes that lie side by side: of eight pixels or of eight groups. Up to three tables behind
// those of a group are overwritten.
void Band::make_inside(const uint8_t* codes, uint8_t* to, int64_t groups, int64_t pixels) const {
    const TableMaker maker;
    const int64_t other = job.groups * job.code_step(), next = step * job.pixel_step();
    if (!job.planar) {
        for (int64_t p = 0; p < pixels; p++, codes += next, to += 64)
            for (int64_t g = 0; g < groups; g += 8)
                maker.make(codes + g, codes + other + g, to + g * group_bytes, group_bytes, groups - g);
        return;
    }
    for (int64_t group = 0; group < groups; group++, codes += job.code_step(), to += group_bytes)
        for (int64_t p = 0; p < pixels; p += 8) {
            if (next == 1) {
                // without branches, unless most of the eight would be made for nothing
                maker.make(codes + p, codes + other + p, to + p * 64, 64, pixels - p > 4 ? 8 : pixels - p);
                continue;
            }
            uint8_t found[2][8] = {};
            for (int64_t i = 0; i < least(8, pixels - p); i++)
                found[0][i] = codes[(p + i) * next], found[1][i] = codes[other + (p + i) * next];
            maker.make(found[0], found[1], to + p * 64, 64, pixels - p);
        }
}

// What the groups of a chunk from `group` on add to the sums of a strip of output row y.
void Band::compute(int64_t y, int64_t line, int64_t group, const Strip& strip) {
    Tile tile{};
    for (int64_t ky = 0; ky < layout.kh; ky++) {
        const int64_t row = input_row(y, ky);
        if (!is_inside(row)) continue;
        if (made[row % ring] != row) make_tables(row, group, strip);
        made[row % ring] = row;
        if (!tile.rows) tile.weights = layout.payload + (group * layout.kh + ky) * layout.kw * 64;
        tile.table_row[tile.rows++] = row % ring * row_bytes;
    }
    run_tiles(&tile, line, group, strip);
}

void Band::run_tiles(Tile* tile, int64_t line, int64_t group, const Strip& strip) {
    tile->groups = least(chunk, job.groups - group), tile->kw = layout.kw, tile->begins = group == 0;
    tile->group_bytes = group_bytes, tile->column_bytes = column_step * 64;
    tile->tap_bytes = layout.kw == 1 ? 0 : call.dilation[1] * 64;
    tile->group_weights = layout.taps() * 64;
    const int64_t block_weights = job.groups * tile->group_weights;
    const uint8_t* const weights = tile->weights + first * block_weights;
    for (int64_t t = strip.begin; t < strip.end; t++) {
        const int64_t x = tile_column(t), count = tile_column(t + 1) - x;
        const bool left = x >= call.padding[1], right = x + count + 2 - call.padding[1] <= call.width;
        TileFunction* const run_tile = tile_function(tile->rows, count, taps, left, right);
        tile->tables = tables + (x - strip.x) * tile->column_bytes, tile->weights = weights;
        for (int64_t block = first; block < last; block++, tile->weights += block_weights) {
            tile->sums = sums + (((block - first) * lines + line) * call.out_width + x) * 64;
            tile->look_ups = look_ups;
            while (!run_tile(*tile)) tile->look_ups = look_ups = look_ups > SURE ? look_ups / 2 : BYTE_SUMS;
        }
    }
}

// Sums of all levels of the windows of output row y: first down the kernel rows, then across.
void Band::add_windows(int64_t y, int16_t* to) const {
    for (int64_t x = 0; x < call.width; x += 32) {
        __m512i sum = _mm512_setzero_si512();
        for (int64_t ky = 0; ky < layout.kh; ky++)
            if (is_inside(input_row(y, ky)))
                sum = _mm512_add_epi16(
                    sum, _mm512_loadu_si512(job.totals_of(image) + input_row(y, ky) * call.width + x));
        const uint32_t there = call.width - x >= 32 ? ~0u : (1u << (call.width - x)) - 1;
        _mm512_mask_storeu_epi16(column_sums + call.padding[1] + x, there, sum);
    }
    if (call.stride[1] == 1) {
        for (int64_t x = 0; x < call.out_width; x += 32) {
            __m512i sum = _mm512_setzero_si512();
            for (int64_t kx = 0; kx < layout.kw; kx++)
                sum = _mm512_add_epi16(sum, _mm512_loadu_si512(column_sums + x + kx * call.dilation[1]));
            _mm512_storeu_si512(to + x, sum);  // what lies behind the row is the next one's
        }
        return;
    }
    for (int64_t x = 0; x < call.out_width; x++) {
        int16_t sum = 0;
        for (int64_t kx = 0; kx < layout.kw; kx++)
            sum = int16_t(sum + column_sums[x * call.stride[1] + kx * call.dilation[1]]);
        to[x] = sum;
    }
}

// The sums of `count` rows from output row y on -> y; as many pixels at a time as the L1 cache holds.
void Band::write_lines(int64_t y, int64_t count) const {
    for (int64_t line = 0; line < count; line++) add_windows(y + line, windows + line * call.out_width);
    const int64_t pixels = count * call.out_width;
    for (int64_t p = 0; p < pixels; p += WRITTEN)
        write({job, image, y * call.out_width + p, least(WRITTEN, pixels - p), first, last, sums + p * 64,
               lines * call.out_width * 64, windows + p});
}

bool Band::run() {
    if (!plan()) return false;
    for (int64_t y = top; y < bottom; y += lines) {
        const int64_t count = least(lines, bottom - y);
        for (int64_t group = 0; group < job.groups; group += chunk)
            for (int64_t i = 0; i < strips; i++) {
                const Strip strip = strip_of(i);
                if (!keeps_tables) forget_tables();
                for (int64_t line = 0; line < count; line++) compute(y + line, line, group, strip);
            }
        write_lines(y, count);
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
        pieces = ceil_div(call.pixels(), PIECE);
        if (of.images >= 2 * call.threads) return;
        if (call.out_height >= 14) bands = least(call.out_height / 7, 2 * call.threads);
        if (bands < call.threads) slices = least(outputs, call.threads);
    }
};

void quantise(void* data, int64_t task) {
    Split& of = *static_cast<Split*>(data);
    const int64_t begin = task % of.pieces * PIECE, pixels = of.job.call.pixels();
    if (!find_codes(of.job, task / of.pieces, begin, of.pieces == 1 ? pixels : least(pixels, begin + PIECE)))
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
    Job job{call, six_groups(call.layout), 0, 0, !call.levels_in && !call.channels_last, nullptr, nullptr};
    const int64_t together = most(1, least(call.batch, CODES_BYTES / most(1, job.image_bytes())));
    job.codes = static_cast<uint8_t*>(scratch(SLOT_CONV_CALL, size_t(together * job.image_bytes())));
    job.totals = static_cast<int16_t*>(scratch(SLOT_CONV_INDEX, size_t(together * job.image_totals() + 32) * 2));
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
