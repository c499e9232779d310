// Convolution by 64-entry tables: six weights index a table of the sums of six activations (vpermb).
//
// A pixel's table of six channels is the sum of two tables of three channels, of which there are 64 each: two loads and
// an addition. It serves all taps and all outputs. 64 outputs add up in bytes and are widened every few groups.
#include <immintrin.h>

#include "binary.h"
#include "threads.h"

namespace fx {
namespace {

constexpr int64_t RUN = 1024;                // pixels of a plane that are quantised at a time
constexpr int64_t CODES_BYTES = 8 << 20;     // of the images that are quantised together

struct ThreeTables {
    alignas(64) uint8_t low[64][64], high[64][64], total[64];
    ThreeTables() {
        for (int code = 0; code < 64; code++) {
            const int level[3] = {code & 3, code >> 2 & 3, code >> 4};
            total[code] = uint8_t(level[0] + level[1] + level[2]);
            for (int j = 0; j < 64; j++) {
                low[code][j] = high[code][j] = 0;
                for (int i = 0; i < 3; i++) {
                    low[code][j] = uint8_t(low[code][j] + (j >> i & 1) * level[i]);
                    high[code][j] = uint8_t(high[code][j] + (j >> (i + 3) & 1) * level[i]);
                }
            }
        }
    }
};

// Filled at the first call: code of this file must not run while the library is loaded.
const ThreeTables& three() {
    static const ThreeTables made;
    return made;
}

struct Job {
    const BinaryCall& call;
    int64_t first, images;   // of the batch
    uint8_t* codes;          // [image][block]: CODES planes of all pixels, or of 32 bytes per pixel
    int16_t* totals;         // [image][block][pixel]
    int64_t plane;           // bytes of a plane: pixels rounded up
    bool planar;

    int64_t blocks() const { return call.layout.blocks(); }
    int64_t block_bytes() const { return planar ? CODES * plane : 32 * plane; }
    uint8_t* codes_of(int64_t image, int64_t block) const { return codes + (image * blocks() + block) * block_bytes(); }
    int16_t* totals_of(int64_t image, int64_t block) const { return totals + (image * blocks() + block) * plane; }
};

// -- activations to codes ---------------------------------------------------------------------------------------------

struct Thresholds {
    __m512 t[3], flip;
    __m512i one = _mm512_set1_epi32(1), two = _mm512_set1_epi32(2), three = _mm512_set1_epi32(3);
    // of one channel, in all lanes
    Thresholds(const BinaryEdges& from, int64_t channel) : flip(_mm512_setzero_ps()) {
        for (int i = 0; i < 3; i++) t[i] = _mm512_set1_ps(from.edges[from.step ? i * from.step + channel : i]);
        if (from.step) flip = _mm512_set1_ps(from.flip[channel]);
    }
    // of 16 channels, those of the mask
    Thresholds(const BinaryEdges& from, int64_t channel, __mmask16 mask) : flip(_mm512_setzero_ps()) {
        for (int i = 0; i < 3; i++)
            t[i] = from.step ? _mm512_maskz_loadu_ps(mask, from.edges + i * from.step + channel)
                             : _mm512_set1_ps(from.edges[i]);
        if (from.step) flip = _mm512_maskz_loadu_ps(mask, from.flip + channel);
    }
    // levels as 32-bit lanes
    FX_INLINE __m512i level(__m512 x) const {
        x = _mm512_xor_ps(x, flip);
        __m512i found = _mm512_maskz_mov_epi32(_mm512_cmp_ps_mask(x, t[0], _CMP_GT_OQ), one);
        found = _mm512_mask_mov_epi32(found, _mm512_cmp_ps_mask(x, t[1], _CMP_GT_OQ), two);
        return _mm512_mask_mov_epi32(found, _mm512_cmp_ps_mask(x, t[2], _CMP_GT_OQ), three);
    }
};

// `count` pixels of one plane of codes from FIELDS channels
template <int FIELDS>
void codes_planar(const float* x, int64_t step, int64_t count, const BinaryEdges& edges, int64_t channel,
                  uint8_t* codes) {
    const Thresholds at(edges, channel), second(edges, channel + (FIELDS > 1 ? CODES : 0)),
        third(edges, channel + (FIELDS > 2 ? 2 * CODES : 0));
    for (int64_t p = 0; p < count; p += 16) {
        const __mmask16 mask = count - p >= 16 ? 0xffff : __mmask16((1 << (count - p)) - 1);
        __m512i code = at.level(_mm512_maskz_loadu_ps(mask, x + p));
        if (FIELDS > 1)
            code = _mm512_or_si512(
                code, _mm512_slli_epi32(second.level(_mm512_maskz_loadu_ps(mask, x + CODES * step + p)), 2));
        if (FIELDS > 2)
            code = _mm512_or_si512(
                code, _mm512_slli_epi32(third.level(_mm512_maskz_loadu_ps(mask, x + 2 * CODES * step + p)), 4));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + p), _mm512_cvtepi32_epi8(code));
    }
}

void quantise_planar(const Job& job, int64_t image, int64_t block, int64_t begin, int64_t end) {
    const BinaryCall& call = job.call;
    const int64_t pixels = call.pixels(), channels = least(64, call.channels - 64 * block);
    const float* x = static_cast<const float*>(call.x) + ((job.first + image) * call.channels + 64 * block) * pixels;
    uint8_t* codes = job.codes_of(image, block);
    int16_t* totals = job.totals_of(image, block);
    const __m512i total = _mm512_load_si512(three().total);
    // long runs, because every channel is a stream of its own for the memory
    for (int64_t p = begin; p < end; p += RUN)
        for (int64_t t = 0; t < CODES; t++) {
            const int64_t count = least(RUN, least(end, pixels) - p), fields = ceil_div(channels - t, CODES);
            uint8_t* to = codes + t * job.plane + p;
            const float* from = x + t * pixels + p;
            if (fields >= 3) codes_planar<3>(from, pixels, count, call.edges, 64 * block + t, to);
            else if (fields == 2) codes_planar<2>(from, pixels, count, call.edges, 64 * block + t, to);
            else if (fields == 1) codes_planar<1>(from, pixels, count, call.edges, 64 * block + t, to);
            else for (int64_t i = 0; i < count; i += 16) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), __m128i());
        }
    for (int64_t p = begin; p < end; p += 64) {
        __m512i sum = _mm512_setzero_si512();
        for (int64_t t = 0; t < CODES; t++)
            sum = _mm512_add_epi8(
                sum, _mm512_permutexvar_epi8(_mm512_loadu_si512(codes + t * job.plane + p), total));
        _mm512_storeu_si512(totals + p, _mm512_cvtepu8_epi16(_mm512_castsi512_si256(sum)));
        _mm512_storeu_si512(totals + p + 32, _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(sum, 1)));
    }
}

// 64 levels of one pixel -> 22 codes; returns their sum
FX_INLINE int16_t store_pixel(__m512i levels, uint8_t* codes) {
    alignas(64) static const struct Places {
        uint8_t second[64], third[64];
        Places() : second(), third() {
            for (int i = 0; i < 22; i++) second[i] = uint8_t(i + 22), third[i] = uint8_t(i < 20 ? i + 44 : 63);
        }
    } places;
    levels = _mm512_and_si512(levels, _mm512_set1_epi8(3));
    const __m512i one = _mm512_maskz_permutexvar_epi8(0x3fffff, _mm512_load_si512(places.second), levels);
    const __m512i two = _mm512_maskz_permutexvar_epi8(0x0fffff, _mm512_load_si512(places.third), levels);
    __m512i code = _mm512_or_si512(_mm512_maskz_mov_epi8(0x3fffff, levels), _mm512_slli_epi16(one, 2));
    code = _mm512_or_si512(code, _mm512_slli_epi16(two, 4));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), _mm512_castsi512_si256(code));
    return int16_t(_mm512_reduce_add_epi64(_mm512_sad_epu8(levels, _mm512_setzero_si512())));
}

void quantise_pixels(const Job& job, int64_t image, int64_t block, int64_t begin, int64_t end) {
    const BinaryCall& call = job.call;
    const int64_t count = least(64, call.channels - 64 * block);
    uint8_t* codes = job.codes_of(image, block);
    int16_t* totals = job.totals_of(image, block);
    const __mmask64 mask = count == 64 ? ~__mmask64(0) : (__mmask64(1) << count) - 1;
    for (int64_t p = begin; p < least(end, call.pixels()); p++) {
        const int64_t at = ((job.first + image) * call.pixels() + p) * call.channels + 64 * block;
        __m512i levels;
        if (call.levels_in) {
            levels = _mm512_maskz_loadu_epi8(mask, static_cast<const uint8_t*>(call.x) + at);
        } else {
            __m128i part[4];
            for (int i = 0; i < 4; i++) {
                const __mmask16 some = __mmask16(mask >> 16 * i);
                const Thresholds thresholds(call.edges, 64 * block + 16 * i, some);
                part[i] = _mm512_cvtepi32_epi8(thresholds.level(
                    _mm512_maskz_loadu_ps(some, static_cast<const float*>(call.x) + at + 16 * i)));
            }
            levels = _mm512_inserti64x4(
                _mm512_castsi256_si512(_mm256_inserti128_si256(_mm256_castsi128_si256(part[0]), part[1], 1)),
                _mm256_inserti128_si256(_mm256_castsi128_si256(part[2]), part[3], 1), 1);
            levels = _mm512_maskz_mov_epi8(mask, levels);
        }
        totals[p] = store_pixel(levels, codes + 32 * p);
    }
}

// -- sums of a few pixels and 64 outputs -----------------------------------------------------------------------------

struct Tile {
    const uint8_t* tables[4];  // [row] of the first group, from the tile's first column on
    const uint8_t* weights;    // [group][kx][64]
    int64_t kw, groups, group_bytes, tap_bytes;
    uint16_t* sums[4];         // [row] of the first pixel
};

FX_INLINE __m512i added(__m512i sum, __m512i index, __m512i table) {
    return _mm512_add_epi8(sum, _mm512_permutexvar_epi8(index, table));
}

// Three taps side by side: a table is loaded once and serves the three columns that it lies under.
template <int ROWS, int COLUMNS>
FX_INLINE void add_three(__m512i (&sum)[ROWS][COLUMNS], const Tile& at, int64_t group) {
    const __m512i* index = reinterpret_cast<const __m512i*>(at.weights + group * 3 * 64);
    const __m512i left = _mm512_loadu_si512(index), middle = _mm512_loadu_si512(index + 1);
    const __m512i right = _mm512_loadu_si512(index + 2);
    FX_UNROLL
    for (int r = 0; r < ROWS; r++) {
        const uint8_t* from = at.tables[r] + group * at.group_bytes;
        FX_UNROLL
        for (int c = 0; c < COLUMNS + 2; c++) {
            const __m512i table = _mm512_load_si512(from + 64 * c);
            if (c < COLUMNS) sum[r][c] = added(sum[r][c], left, table);
            if (c > 0 && c <= COLUMNS) sum[r][c - 1] = added(sum[r][c - 1], middle, table);
            if (c > 1) sum[r][c - 2] = added(sum[r][c - 2], right, table);
        }
    }
}

template <int ROWS, int COLUMNS, int STEP>
FX_INLINE void add_each(__m512i (&sum)[ROWS][COLUMNS], const Tile& at, int64_t group) {
    for (int64_t kx = 0; kx < at.kw; kx++) {
        const __m512i index = _mm512_loadu_si512(at.weights + (group * at.kw + kx) * 64);
        FX_UNROLL
        for (int r = 0; r < ROWS; r++) {
            const uint8_t* from = at.tables[r] + group * at.group_bytes + kx * at.tap_bytes;
            FX_UNROLL
            for (int c = 0; c < COLUMNS; c++)
                sum[r][c] = added(sum[r][c], index, _mm512_load_si512(from + c * STEP * 64));
        }
    }
}

template <int ROWS, int COLUMNS, int STEP, bool THREE>
void tile(const Tile& at) {
    __m512i sum[ROWS][COLUMNS];
    FX_UNROLL
    for (int r = 0; r < ROWS; r++) {
        FX_UNROLL
        for (int c = 0; c < COLUMNS; c++) sum[r][c] = _mm512_setzero_si512();
    }
    for (int64_t group = 0; group < at.groups; group++) {
        if constexpr (THREE) add_three<ROWS, COLUMNS>(sum, at, group);
        else add_each<ROWS, COLUMNS, STEP>(sum, at, group);
    }
    FX_UNROLL
    for (int r = 0; r < ROWS; r++) {
        __m512i* to = reinterpret_cast<__m512i*>(at.sums[r]);
        FX_UNROLL
        for (int c = 0; c < COLUMNS; c++, to += 2) {
            _mm512_store_si512(to, _mm512_add_epi16(_mm512_load_si512(to), sum[r][c]));
            _mm512_store_si512(
                to + 1, _mm512_add_epi16(_mm512_load_si512(to + 1), _mm512_srli_epi16(sum[r][c], 8)));
        }
    }
}

using TileFunction = void(const Tile& at);

// Three taps side by side, any taps in steps of one column, of two.
struct Shape {
    int rows, columns;
    TileFunction *three, *one, *two;
};

template <int ROWS, int COLUMNS>
constexpr Shape shape_of() {
    return {ROWS, COLUMNS, tile<ROWS, COLUMNS, 1, true>, tile<ROWS, COLUMNS, 1, false>, tile<ROWS, COLUMNS, 2, false>};
}

const Shape SHAPES[] = {shape_of<1, 14>(), shape_of<1, 16>(), shape_of<2, 8>(), shape_of<2, 7>(),
                        shape_of<4, 4>(),  shape_of<1, 8>(),  shape_of<1, 4>(), shape_of<1, 1>()};

// The shape that computes the fewest columns beyond the last, and of these the largest. Rows lie beside each other only
// where their steps are one.
const Shape& shape_for(int64_t columns, int64_t rows, bool many_rows) {
    const Shape* best = nullptr;
    double least_cost = 1e30;
    for (const Shape& shape : SHAPES) {
        if (shape.rows > 1 && !many_rows) continue;
        // look-ups and additions, loads of tables, loads of indices
        const double work = double(3 * shape.rows * shape.columns + shape.rows * (shape.columns + 2) + 3);
        const double cost = double(ceil_div(columns, shape.columns) * ceil_div(rows, shape.rows)) * work;
        if (cost < least_cost) least_cost = cost, best = &shape;
    }
    return *best;
}

// -- one part of an image ---------------------------------------------------------------------------------------------

// Output rows [top, bottom) and blocks of 64 outputs [first, last) of one image. Rows of tables are made from the top
// on, a few groups at a time, and added at once to the output rows that they reach: the tables stay in the L1 cache.
struct Part {
    const Job& job;
    int64_t image, top, bottom, first, last;
    const Shape* shape;
    TileFunction* run_tile;
    uint8_t* tables;   // [row][group][column, padded][64]
    uint16_t* sums;    // [output block][row % ring][column][even lanes, odd lanes]
    uint16_t* spare;   // for rows of a tile that are none
    int16_t* windows;  // [column] levels of the whole window
    int64_t groups_at_once, ring, columns, wide, group_bytes, row_bytes;

    uint16_t* sums_of(int64_t output_block, int64_t line) const {
        return sums + ((output_block - first) * ring + line % ring) * wide * 64;
    }
    int64_t output_row(int64_t y, int64_t ky) const;
    void build_row(int64_t block, int64_t y, int64_t begin, int64_t end, uint8_t* to) const;
    void add_windows(int64_t y) const;
    void clear(int64_t line) const;
    void compute(int64_t y, int64_t count) const;
    void compute(int64_t block, int64_t y, int64_t count, int64_t begin, int64_t end) const;
    void finish(int64_t line) const;
    void plan();
    bool run();
};

// The output row of this part that sees input row y under tap ky, or -1.
int64_t Part::output_row(int64_t y, int64_t ky) const {
    const BinaryCall& call = job.call;
    const int64_t at = y + call.padding[0] - ky * call.dilation[0];
    if (at < 0 || at % call.stride[0]) return -1;
    const int64_t line = at / call.stride[0];
    return line >= top && line < bottom ? line : -1;
}

void Part::build_row(int64_t block, int64_t y, int64_t begin, int64_t end, uint8_t* to) const {
    const BinaryCall& call = job.call;
    const __m512i zero = _mm512_setzero_si512();
    const int64_t left = call.padding[1], step = job.planar ? 1 : 32, other = job.planar ? job.plane : 1;
    const ThreeTables& known = three();
    for (int64_t group = begin; group < end; group++, to += group_bytes) {
        for (int64_t x = 0; x < left; x++) _mm512_store_si512(to + 64 * x, zero);
        for (int64_t x = left + call.width; x < columns; x++) _mm512_store_si512(to + 64 * x, zero);
        const uint8_t* codes = job.codes_of(image, block) + y * call.width * step + 2 * group * other;
        uint8_t* table = to + 64 * left;
        uint8_t* const stop = table + 64 * call.width;
        for (; table < stop; codes += step, table += 64)
            _mm512_store_si512(table, _mm512_add_epi8(_mm512_load_si512(known.low[codes[0]]),
                                                      _mm512_load_si512(known.high[codes[other]])));
    }
}

void Part::add_windows(int64_t y) const {
    const BinaryCall& call = job.call;
    const int64_t kh = call.layout.kh, kw = call.layout.kw, step = call.stride[1];
    for (int64_t x = 0; x < call.out_width; x++) windows[x] = 0;
    for (int64_t ky = 0; ky < kh; ky++) {
        const int64_t from = y * call.stride[0] - call.padding[0] + ky * call.dilation[0];
        if (from < 0 || from >= call.height) continue;
        for (int64_t block = 0; block < job.blocks(); block++) {
            const int16_t* totals = job.totals_of(image, block) + from * call.width;
            for (int64_t kx = 0; kx < kw; kx++) {
                const int64_t shift = kx * call.dilation[1] - call.padding[1];
                const int64_t begin = shift < 0 ? ceil_div(-shift, step) : 0;
                const int64_t end =
                    call.width <= shift ? 0 : least(call.out_width, ceil_div(call.width - shift, step));
                if (step == 1)
                    for (int64_t x = begin; x < end; x++) windows[x] = int16_t(windows[x] + totals[x + shift]);
                else
                    for (int64_t x = begin; x < end; x++) windows[x] = int16_t(windows[x] + totals[x * step + shift]);
            }
        }
    }
}

void Part::clear(int64_t line) const {
    for (int64_t o = first; o < last; o++) {
        __m512i* at = reinterpret_cast<__m512i*>(sums_of(o, line));
        for (int64_t i = 0; i < 2 * wide; i++) _mm512_store_si512(at + i, _mm512_setzero_si512());
    }
}

// Input rows y .. y + count - 1, all channels.
void Part::compute(int64_t y, int64_t count) const {
    for (int64_t block = 0; block < job.blocks(); block++) {
        for (int64_t begin = 0; begin < GROUPS; begin += groups_at_once)
            compute(block, y, count, begin, least(GROUPS, begin + groups_at_once));
    }
}

void Part::compute(int64_t block, int64_t y, int64_t count, int64_t begin, int64_t end) const {
    const BinaryLayout& layout = job.call.layout;
    const int64_t kh = layout.kh, blocks = ceil_div(layout.outputs, 64), step = job.call.stride[1] * 64;
    for (int64_t r = 0; r < count; r++) build_row(block, y + r, begin, end, tables + r * row_bytes);
    Tile at{};
    at.kw = layout.kw, at.groups = end - begin, at.group_bytes = group_bytes, at.tap_bytes = job.call.dilation[1] * 64;
    const int64_t tile_bytes = at.groups * layout.kw * 64;
    const uint8_t* weights = layout.payload + (block * GROUPS + begin) * blocks * kh * layout.kw * 64;
    for (int64_t o = first; o < last; o++)
        for (int64_t ky = 0; ky < kh; ky++) {
            int64_t lines[4];
            bool any = false;
            for (int64_t r = 0; r < shape->rows; r++) {
                lines[r] = r < count ? output_row(y + r, ky) : -1;
                any = any || lines[r] >= 0;
            }
            if (!any) continue;
            at.weights = weights + (o * kh + ky) * tile_bytes;
            for (int64_t x = 0; x < wide; x += shape->columns) {
                for (int64_t r = 0; r < shape->rows; r++) {
                    at.tables[r] = tables + least(r, count - 1) * row_bytes + x * step;
                    at.sums[r] = lines[r] >= 0 ? sums_of(o, lines[r]) + x * 64 : spare;
                }
                run_tile(at);
            }
        }
}

// -- what the sums become ---------------------------------------------------------------------------------------------

// Sums of 64 outputs: the even lanes hold outputs 0..31, the odd ones 32..63; in place.
FX_INLINE void settle(uint16_t* sums, int16_t window) {
    __m512i* at = reinterpret_cast<__m512i*>(sums);
    const __m512i odd = _mm512_load_si512(at + 1), minus = _mm512_set1_epi16(window);
    const __m512i even = _mm512_sub_epi16(_mm512_load_si512(at), _mm512_slli_epi16(odd, 8));
    _mm512_store_si512(at, _mm512_sub_epi16(_mm512_slli_epi16(even, 1), minus));
    _mm512_store_si512(at + 1, _mm512_sub_epi16(_mm512_slli_epi16(odd, 1), minus));
}

struct Scales {
    __m512 scale, bias;
    __mmask16 mask;
    Scales(const BinaryCall& call, int64_t output) {
        const int64_t count = most(0, least(16, int64_t(call.layout.outputs) - output));
        mask = __mmask16((1u << count) - 1);
        scale = _mm512_maskz_loadu_ps(mask, call.scale + output);
        bias = call.bias ? _mm512_maskz_loadu_ps(mask, call.bias + output) : _mm512_setzero_ps();
    }
    FX_INLINE __m512 operator()(const uint16_t* sums) const {
        const __m256i words = _mm256_load_si256(reinterpret_cast<const __m256i*>(sums));
        return _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(words)), scale), bias);
    }
};

// What comes after scale and bias; the place `at` of y is that of the residual. NaN stays NaN.
FX_INLINE __m512 ended(const BinaryCall& call, __m512 y, const float* at, __mmask16 mask) {
    const __m512 zero = _mm512_setzero_ps();
    if (call.residual) {
        const __m512 residual = _mm512_maskz_loadu_ps(mask, call.residual + (at - static_cast<const float*>(call.y)));
        y = _mm512_add_ps(y, call.residual_relu ? _mm512_max_ps(zero, residual) : residual);
    }
    return call.relu ? _mm512_max_ps(zero, y) : y;
}

FX_INLINE void transpose(__m512* v) {
    __m512 t[16];
    FX_UNROLL
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
    FX_UNROLL
    for (int i = 0; i < 16; i += 4) FX_UNROLL for (int j = 0; j < 2; j++) {
        const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + j + 2]);
        v[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
        v[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
    FX_UNROLL
    for (int half = 0; half < 16; half += 8) FX_UNROLL for (int j = 0; j < 4; j++) {
        t[half + j] = _mm512_shuffle_f32x4(v[half + j], v[half + j + 4], 0x88);
        t[half + j + 4] = _mm512_shuffle_f32x4(v[half + j], v[half + j + 4], 0xdd);
    }
    FX_UNROLL
    for (int j = 0; j < 8; j++) {
        v[j] = _mm512_shuffle_f32x4(t[j], t[j + 8], 0x88);
        v[j + 8] = _mm512_shuffle_f32x4(t[j], t[j + 8], 0xdd);
    }
}

// Row y of 64 outputs -> (outputs, pixels)
void write_channels(const Part& part, int64_t block, int64_t y) {
    const BinaryCall& call = part.job.call;
    const int64_t wide = call.out_width, outputs = call.layout.outputs;
    float* to = static_cast<float*>(call.y) + (part.job.first + part.image) * outputs * call.out_pixels() + y * wide;
    const uint16_t* sums = part.sums_of(block, y);
    for (int64_t o = 64 * block; o < least(outputs, 64 * block + 64); o += 16) {
        const Scales scales(call, o);
        const int64_t rows = least(16, outputs - o);
        for (int64_t x = 0; x < wide; x += 16) {
            __m512 v[16];
            const int64_t pixels = least(16, wide - x);
            const uint16_t* from = sums + x * 64 + o % 64;
            if (pixels == 16) {
                FX_UNROLL
                for (int i = 0; i < 16; i++) v[i] = scales(from + 64 * i);
            } else {
                FX_UNROLL
                for (int i = 0; i < 16; i++) v[i] = scales(from + 64 * least(i, pixels - 1));
            }
            transpose(v);
            const __mmask16 mask = __mmask16((1u << pixels) - 1);
            const int64_t step = call.out_pixels();
            float* at = to + o * step + x;
            if (rows == 16) {
                FX_UNROLL
                for (int i = 0; i < 16; i++)
                    _mm512_mask_storeu_ps(at + i * step, mask, ended(call, v[i], at + i * step, mask));
            } else {
                for (int64_t i = 0; i < rows; i++)
                    _mm512_mask_storeu_ps(at + i * step, mask, ended(call, v[i], at + i * step, mask));
            }
        }
    }
}

void write_pixels(const Part& part, int64_t block, int64_t y) {
    const BinaryCall& call = part.job.call;
    const int64_t outputs = call.layout.outputs;
    const int64_t pixel = (part.job.first + part.image) * call.out_pixels() + y * call.out_width;
    for (int64_t o = 64 * block; o < least(outputs, 64 * block + 64); o += 16) {
        const Scales scales(call, o);
        const uint16_t* from = part.sums_of(block, y) + o % 64;
        float* to = static_cast<float*>(call.y) + pixel * outputs + o;
        for (int64_t x = 0; x < call.out_width; x++)
            _mm512_mask_storeu_ps(to + x * outputs, scales.mask,
                                  ended(call, scales(from + 64 * x), to + x * outputs, scales.mask));
    }
}

// 32 thresholds of 32 bits -> words; what lies beyond any sum stays beyond it.
FX_INLINE __m512i threshold_words(const int32_t* from, int64_t count) {
    const int64_t rest = most(0, least(32, count));
    const uint32_t bits = rest == 32 ? 0xffffffffu : (1u << rest) - 1;
    const __m256i low = _mm512_cvtsepi32_epi16(_mm512_maskz_loadu_epi32(__mmask16(bits), from));
    const __m256i high = _mm512_cvtsepi32_epi16(_mm512_maskz_loadu_epi32(__mmask16(bits >> 16), from + 16));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

void write_levels(const Part& part, int64_t block, int64_t y) {
    const BinaryCall& call = part.job.call;
    const int64_t outputs = call.layout.outputs;
    const int64_t pixel = (part.job.first + part.image) * call.out_pixels() + y * call.out_width;
    for (int64_t half = 0; half < 2; half++) {
        const int64_t o = 64 * block + 32 * half, count = least(32, outputs - o);
        if (count <= 0) continue;
        const __mmask32 mask = count == 32 ? ~__mmask32(0) : (__mmask32(1) << count) - 1;
        __m512i at[3];
        for (int i = 0; i < 3; i++) at[i] = threshold_words(call.cuts + i * outputs + o, count);
        const uint16_t* from = part.sums_of(block, y) + 32 * half;
        uint8_t* to = static_cast<uint8_t*>(call.y) + pixel * outputs + o;
        for (int64_t x = 0; x < call.out_width; x++) {
            const __m512i sum = _mm512_load_si512(from + 64 * x), one = _mm512_set1_epi16(1);
            __m512i level = _mm512_maskz_mov_epi16(_mm512_cmpge_epi16_mask(sum, at[0]), one);
            level = _mm512_mask_add_epi16(level, _mm512_cmpge_epi16_mask(sum, at[1]), level, one);
            level = _mm512_mask_add_epi16(level, _mm512_cmpge_epi16_mask(sum, at[2]), level, one);
            _mm256_mask_storeu_epi8(to + x * outputs, mask, _mm512_cvtepi16_epi8(level));
        }
    }
}

void Part::finish(int64_t line) const {
    const BinaryCall& call = job.call;
    add_windows(line);
    for (int64_t o = first; o < last; o++) {
        uint16_t* at = sums_of(o, line);
        for (int64_t x = 0; x < call.out_width; x++) settle(at + 64 * x, windows[x]);
        if (call.cuts) write_levels(*this, o, line);
        else if (call.y_channels_last) write_pixels(*this, o, line);
        else write_channels(*this, o, line);
    }
}

void Part::plan() {
    const BinaryCall& call = job.call;
    const BinaryLayout& layout = call.layout;
    shape = &shape_for(call.out_width, bottom - top, call.stride[0] == 1);
    const bool three = layout.kw == 3 && call.stride[1] == 1 && call.dilation[1] == 1;
    run_tile = three ? shape->three : call.stride[1] == 1 ? shape->one : shape->two;
    groups_at_once = least(GROUPS, BYTE_SUMS / layout.kw);
    wide = ceil_div(call.out_width, shape->columns) * shape->columns;
    columns = most(call.width + 2 * call.padding[1],
                   (wide - 1) * call.stride[1] + (layout.kw - 1) * call.dilation[1] + 1);
    group_bytes = columns * 64, row_bytes = groups_at_once * group_bytes;
    ring = ceil_div((layout.kh - 1) * call.dilation[0] + 1, call.stride[0]) + shape->rows;
}

bool Part::run() {
    const BinaryCall& call = job.call;
    plan();
    const size_t sum_bytes = size_t((last - first) * ring * wide * 128);
    tables = static_cast<uint8_t*>(scratch(SLOT_CONV_IMAGE, size_t(shape->rows * row_bytes)));
    uint8_t* found = static_cast<uint8_t*>(scratch(SLOT_CONV_ROWS, sum_bytes + 16 * 128));
    windows = static_cast<int16_t*>(scratch(SLOT_CONV_EXACT, size_t(call.out_width + 64) * sizeof(int16_t)));
    if (!tables || !found || !windows) return false;
    sums = reinterpret_cast<uint16_t*>(found), spare = reinterpret_cast<uint16_t*>(found + sum_bytes);
    const int64_t reach = (call.layout.kh - 1) * call.dilation[0];
    int64_t y = most(0, top * call.stride[0] - call.padding[0]), cleared = top;
    const int64_t end = least(call.height, (bottom - 1) * call.stride[0] - call.padding[0] + reach + 1);
    int64_t done = top;
    // rows that no input row from `until` on reaches
    auto finish_before = [&](int64_t until) {
        for (; done < bottom && done * call.stride[0] - call.padding[0] + reach < until; done++) {
            if (done >= cleared) clear(done), cleared = done + 1;
            finish(done);
        }
    };
    for (; y < end; y += shape->rows) {
        const int64_t count = least(shape->rows, end - y);
        const int64_t reached = least(bottom, (y + count - 1 + call.padding[0]) / call.stride[0] + 1);
        finish_before(y);
        for (; cleared < reached; cleared++) clear(cleared);
        compute(y, count);
    }
    finish_before(INT64_MAX);
    return true;
}

int run_images(Job& job) {
    const BinaryCall& call = job.call;
    const int64_t pieces = call.threads == 1 ? 1 : ceil_div(job.plane, 512), blocks = job.blocks();
    parallel(
        call.threads, job.images * blocks * pieces,
        [](void* data, int64_t task) {
            const Job& all = *static_cast<Job*>(data);
            const int64_t parts = all.call.threads == 1 ? 1 : ceil_div(all.plane, 512), each = parts == 1 ? all.plane : 512;
            const int64_t piece = task % parts, rest = task / parts;
            (all.planar ? quantise_planar : quantise_pixels)(all, rest / all.blocks(), rest % all.blocks(),
                                                             piece * each, least(all.call.pixels(), piece * each + each));
        },
        &job);
    struct Split {
        const Job& job;
        int64_t bands, slices, outputs;
        bool failed;
    } split{job, 1, 1, ceil_div(call.layout.outputs, 64), false};
    if (job.images < 2 * call.threads && call.threads > 1) {
        split.bands = call.out_height >= 14 ? least(call.out_height / 7, 2 * call.threads) : 1;
        if (split.bands < call.threads) split.slices = least(split.outputs, call.threads);
    }
    parallel(
        call.threads, job.images * split.bands * split.slices,
        [](void* data, int64_t task) {
            Split& all = *static_cast<Split*>(data);
            const int64_t slice = task % all.slices, band = task / all.slices % all.bands;
            const int64_t height = all.job.call.out_height;
            Part part{all.job, task / (all.slices * all.bands), height * band / all.bands,
                      height * (band + 1) / all.bands, all.outputs * slice / all.slices,
                      all.outputs * (slice + 1) / all.slices, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, 0, 0,
                      0, 0, 0, 0};
            if (!part.run()) all.failed = true;
        },
        &split);
    return split.failed ? fail(NO_MEMORY, "No memory for the tables of a binary convolution") : int(OK);
}

int run(const BinaryCall& call) {
    const bool planar = !call.levels_in && !call.channels_last;
    Job job{call, 0, 0, nullptr, nullptr, ceil_div(call.pixels(), 64) * 64, planar};
    const int64_t bytes = job.blocks() * (job.block_bytes() + 2 * job.plane);
    const int64_t together = most(1, least(call.batch, CODES_BYTES / most(1, bytes)));
    job.codes = static_cast<uint8_t*>(scratch(SLOT_CONV_CALL, size_t(together * job.blocks() * job.block_bytes())));
    job.totals = static_cast<int16_t*>(scratch(SLOT_CONV_INDEX, size_t(together * job.blocks() * job.plane * 2)));
    if (!job.codes || !job.totals) return fail(NO_MEMORY, "No memory for the levels of a binary convolution");
    for (; job.first < call.batch; job.first += together) {
        job.images = least(together, call.batch - job.first);
        const int status = run_images(job);
        if (status) return status;
    }
    return OK;
}

}  // namespace

BinaryRun* const binary_table_avx512 = run;

}  // namespace fx
