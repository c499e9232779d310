// Output rows: tables of the input rows that they read, in a ring; sums of entries; numbers.
#include <cstring>

#include "pq_conv_call.h"

namespace fx {
namespace {

constexpr int64_t CHUNK_BYTES = 24 << 10;  // tables that are used together should stay in the first-level cache
constexpr int64_t PAIR_BYTES = 40 << 10;   // and so many may be, where it takes two terms to have entries in pairs

// Kernel rows that lie inside of the image for one output row, and the slots of the ring where their tables are.
struct Window {
    int64_t first = 0, count = 0, input = 0;  // first kernel row, how many, input row of the first

    Window(const ConvShape& s, int64_t out) {
        const int64_t top = out * s.stride[0] - s.padding[0];
        first = top >= 0 ? 0 : least(s.kernel[0], ceil_div(-top, s.dilation[0]));
        input = top + first * s.dilation[0];
        count = input < s.height ? least(s.kernel[0] - first, (s.height - 1 - input) / s.dilation[0] + 1) : 0;
    }
};

struct Rows {
    const Image& image;
    const Call& call;
    const ConvShape& s;
    const ConvTables& t;
    int64_t group = 0;
    int64_t* held = nullptr;  // [ring] the input row in each slot
    float* tile = nullptr;    // [pixel][BLOCK]
    float* unpooled = nullptr;         // [kernel row of the pool][block][pixel][BLOCK], in a ring
    const float** pool_rows = nullptr;  // [kernel row of the pool]

    explicit Rows(const Image& image_) : image(image_), call(image_.call), s(call.shape), t(call.tables) {}

    // What kernels write before it goes elsewhere.
    void reserve_outputs(Arena& arena) {
        tile = arena.take<float>(most(s.out_width, call.pool.width) * BLOCK);
        unpooled = arena.take<float>(call.pool.kernel[0] * t.blocks * s.out_width * BLOCK);
        pool_rows = arena.take<const float*>(call.pool.kernel[0]);
    }
    bool pooled() const { return call.pool.kernel[0] > 0; }
    float* unpooled_row(int64_t block, int64_t row) const {
        return unpooled + (row % call.pool.kernel[0] * t.blocks + block) * s.out_width * BLOCK;
    }
    // Channels of a block, and where its first one's output of a row of y begins.
    int64_t channels(int64_t block) const { return least(BLOCK, s.group_outputs - block * BLOCK); }
    float* output(int64_t block, int64_t out) const {
        const int64_t width = call.pool.width, area = call.pool.height * width;
        const int64_t channel = group * s.group_outputs + block * BLOCK;
        float* y = call.y + image.number * s.outputs * area;
        return call.y_last ? y + out * width * s.outputs + channel : y + channel * area + out * width;
    }
    void forget() {
        for (int64_t i = 0; i < call.ring(); i++) held[i] = -1;
    }
    void write(int64_t block, int64_t out, const float* from) {
        const int64_t width = call.pool.width;
        if (!call.y_last)
            return call.kernels->transpose(from, BLOCK, width, channels(block), output(block, out),
                                           call.pool.height * width);
        for (int64_t x = 0; x < width; x++)
            memcpy(output(block, out) + x * s.outputs, from + x * BLOCK, size_t(channels(block)) * sizeof(float));
    }
    // One row of y from the rows of the convolution begin..end-1, which are in the ring.
    void pool(int64_t out, int64_t begin, int64_t end) {
        const ConvPool& of = call.pool;
        PoolJob job{pool_rows, end - begin, s.out_width, of.kernel[1], of.stride[1], of.padding[1], tile, of.width, BLOCK,
                    BLOCK};
        for (int64_t block = 0; block < t.blocks; block++) {
            for (int64_t row = begin; row < end; row++) pool_rows[row - begin] = unpooled_row(block, row);
            if (call.y_last) job.y = output(block, out), job.y_stride = s.outputs, job.channels = channels(block);
            call.kernels->pool(&job);
            if (!call.y_last) write(block, out, tile);
        }
    }
};

struct Quantized : Rows {
    using Rows::Rows;
    bool wide = false;
    uint8_t* tables[2] = {};   // [ring][row_bytes()], the low (or only) and the high 7 bits
    uint8_t* acc[2] = {};      // [block][pixel][acc_bytes], of both planes
    int32_t* sums[2] = {};     // [block][pixel][BLOCK], what did not fit there
    bool some[2] = {};         // whether it did not
    const int32_t** planes = nullptr;
    ConvStep* steps = nullptr;

    int64_t acc_bytes() const { return t.blocks * s.out_width * t.acc_bytes; }

    bool reserve() {
        wide = call.mode == INT16;
        const int64_t area = t.blocks * s.out_width * BLOCK;
        for (Arena arena{nullptr};;) {
            const bool real = arena.base;
            arena.used = 0;
            held = arena.take<int64_t>(call.ring());
            reserve_outputs(arena);
            // corrupt indices of 8 bits may read beyond the last table, never beyond this
            for (int i = 0; i <= wide; i++) tables[i] = arena.take<uint8_t>(call.ring() * call.row_bytes() + 256);
            for (int i = 0; i <= wide; i++) acc[i] = arena.take<uint8_t>(acc_bytes());
            for (int i = 0; i <= wide; i++) sums[i] = arena.take<int32_t>(area);
            planes = arena.take<const int32_t*>(call.slots() * t.pairs);
            steps = arena.take<ConvStep>(call.taps() * t.terms);
            if (real) return true;
            arena.base = static_cast<uint8_t*>(scratch(SLOT_CONV_ROWS, arena.used));
            if (!arena.base) return false;
        }
    }

    void start(int64_t group_) {
        group = group_;
        forget();
        for (int64_t c = 0, next = 0; c < t.columns; c++) {
            if (next < call.count && call.targets[next] == c)
                next++;
            else
                pad(c);
        }
    }

    // Tables of zeros, in a column that lies outside of the image.
    void pad(int64_t column) {
        for (int64_t i = 0; i < call.ring() * t.terms; i++) {
            const int64_t at = (i * t.columns + column) * t.term_bytes;
            memset(tables[0] + at, wide ? 0 : MIDDLE, size_t(t.term_bytes));
            if (wide) memset(tables[1] + at, MIDDLE, size_t(t.term_bytes));
        }
    }

    // The batch of rows in which `input` is.
    void build(int64_t input) {
        if (held[input % call.ring()] == input) return;
        const int64_t begin = input / call.batch * call.batch, slot = begin % call.ring();
        const int64_t count = least(call.batch, s.height - begin);
        for (int64_t i = 0; i < count; i++) held[slot + i] = begin + i;
        image.plane_list(group, begin * s.width, planes);
        BuildJob job{call.codes, planes, call.inputs, call.targets, count * call.count, {}, wide, image.shift,
                     image.multiplier, image.factor};
        for (int i = 0; i <= wide; i++) job.tables[i] = tables[i] + slot * call.row_bytes();
        call.kernels->build(&t, &job);
    }

    // About as many terms, such that steps, `taps` of each term, which are added in pairs of bytes, leave none over.
    static int64_t paired(int64_t terms, int64_t taps, int64_t bytes) {
        if (terms % 2 == 0 || taps % 2 == 0) return terms;
        return terms > 1 ? terms - 1 : 2 * bytes <= PAIR_BYTES ? 2 : 1;
    }

    // Sums of one plane over kernel rows `window`, all terms, in parts that fit 16 bits and the cache.
    void sum(const Window& window, int plane) {
        const int64_t columns = least(s.kernel[1], t.gang == 4 ? s.kernel[1] : SUM_LIMIT / t.gang);
        const int64_t bound = t.gang == 4 ? INT64_MAX : SUM_LIMIT / t.gang;  // steps times rows
        const int64_t kernel_rows = least(window.count, most(1, bound / columns));
        int64_t terms = most(1, least(t.terms, bound / (columns * most(1, kernel_rows))));
        const int64_t bytes = t.columns * t.term_bytes * most(1, window.count);
        if (terms > 1) terms = paired(least(terms, most(1, CHUNK_BYTES / bytes)), columns * kernel_rows, bytes);
        int64_t done = 0;
        some[plane] = false;
        memset(acc[plane], 0, size_t(acc_bytes()));
        for (int64_t term = 0; term < t.terms; term += terms)
            for (int64_t row = 0; row < window.count; row += kernel_rows)
                for (int64_t column = 0; column < s.kernel[1]; column += columns) {
                    const int64_t counts[] = {least(terms, t.terms - term), least(columns, s.kernel[1] - column),
                                              least(kernel_rows, window.count - row)};
                    const int64_t more = counts[0] * counts[1] * counts[2];
                    if (t.gang != 4 && done + more > bound) {
                        call.kernels->decode(&t, acc[plane], t.blocks * s.out_width, sums[plane], some[plane]);
                        memset(acc[plane], 0, size_t(acc_bytes()));
                        some[plane] = true, done = 0;
                    }
                    done += more;
                    part(window, plane, term, column, row, counts);
                }
    }

    void part(const Window& window, int plane, int64_t term, int64_t column, int64_t row, const int64_t counts[3]) {
        const int64_t codes = t.gang * BLOCK, index_block = t.terms * call.taps() * codes;
        const int64_t column_bytes = s.dilation[1] * t.term_bytes;
        ConvStep* to = steps;
        for (int64_t i = term; i < term + counts[0]; i++)
            for (int64_t r = row; r < row + counts[2]; r++) {
                const int64_t slot = (window.input + r * s.dilation[0]) % call.ring();
                const int64_t tap = (window.first + r) * s.kernel[1] + column;
                ConvStep step{tables[plane] + slot * call.row_bytes() + i * t.columns * t.term_bytes + column * column_bytes,
                              call.index + group * t.blocks * index_block + (i * call.taps() + tap) * codes};
                for (int64_t k = 0; k < counts[1]; k++, step.table += column_bytes, step.index += codes) *to++ = step;
            }
        const SumJob job{steps, to - steps, index_block, s.stride[1] * t.term_bytes, s.out_width, acc[plane]};
        call.kernels->accumulate(&t, &job);
    }

    void row(int64_t out) {
        const Window window(s, out);
        for (int64_t i = 0; i < window.count; i++) build(window.input + i * s.dilation[0]);
        for (int i = 0; i <= wide; i++) sum(window, i);
        const int64_t entries = window.count * s.kernel[1] * t.terms * t.gang;
        const int32_t constant = int32_t(entries * (wide ? MIDDLE * 128 : MIDDLE));
        for (int64_t block = 0; block < t.blocks; block++) {
            const bool direct = call.y_last && !pooled();
            const float* bias = call.padded_bias + (group * t.blocks + block) * BLOCK;
            FinishJob job{{}, {}, s.out_width, constant, image.unit, bias, call.relu,
                          pooled() ? unpooled_row(block, out) : direct ? output(block, out) : tile,
                          direct ? s.outputs : BLOCK, direct ? channels(block) : BLOCK};
            for (int i = 0; i <= wide; i++) {
                job.acc[i] = acc[i] + block * s.out_width * t.acc_bytes;
                job.sums[i] = some[i] ? sums[i] + block * s.out_width * BLOCK : nullptr;
            }
            call.kernels->finish(&t, &job);
            if (!call.y_last && !pooled()) write(block, out, tile);
        }
    }
};

struct Exact : Rows {
    using Rows::Rows;
    float* tables = nullptr;  // [ring][m][column][entry]
    const float **planes = nullptr, **rows = nullptr;
    const uint8_t** index = nullptr;

    int64_t row_floats() const { return s.subspaces * t.columns * t.entries; }

    bool reserve() {
        for (Arena arena{nullptr};;) {
            const bool real = arena.base;
            arena.used = 0;
            held = arena.take<int64_t>(call.ring());
            reserve_outputs(arena);
            tables = arena.take<float>(call.ring() * row_floats() + 256);  // as above
            planes = arena.take<const float*>(s.subspaces * s.subwidth);
            rows = arena.take<const float*>(s.kernel[0]), index = arena.take<const uint8_t*>(s.kernel[0]);
            if (real) return true;
            arena.base = static_cast<uint8_t*>(scratch(SLOT_CONV_ROWS, arena.used));
            if (!arena.base) return false;
        }
    }

    void start(int64_t group_) {
        group = group_;
        forget();
        memset(tables, 0, size_t(call.ring() * row_floats() + 256) * sizeof(float));
    }

    void build(int64_t input, ExactJob job) {
        const int64_t slot = input % call.ring();
        if (held[slot] == input) return;
        held[slot] = input;
        for (int64_t c = 0; c < s.subspaces * s.subwidth; c++) {
            const float* plane = image.planar + (group * s.group_channels + c) * call.pixels() + input * s.width;
            planes[c] = c < s.group_channels ? plane : nullptr;
        }
        job.tables = tables + slot * row_floats();
        call.kernels->exact_build(&job);
    }

    void row(int64_t out) {
        const Window window(s, out);
        ExactJob job{};
        job.subspaces = s.subspaces, job.entries = t.entries, job.columns = t.columns, job.codebook = call.exact_codes;
        job.planes = planes, job.subwidth = s.subwidth, job.inputs = call.inputs, job.targets = call.targets;
        job.count = call.count, job.rows = rows, job.index = index, job.row_count = window.count;
        job.kernel_columns = s.kernel[1], job.column_step = s.dilation[1], job.pixel_step = s.stride[1];
        job.index_step = s.outputs, job.pixels = s.out_width;
        for (int64_t i = 0; i < window.count; i++) {
            const int64_t input = window.input + i * s.dilation[0];
            build(input, job);
            rows[i] = tables + input % call.ring() * row_floats();
        }
        for (int64_t block = 0; block < t.blocks; block++) {
            const int64_t channel = group * s.group_outputs + block * BLOCK, tap = s.subspaces * s.outputs;
            for (int64_t i = 0; i < window.count; i++)
                index[i] = call.plain + (window.first + i) * s.kernel[1] * tap + channel;
            float* y = job.y = pooled() ? unpooled_row(block, out) : tile;
            memset(y, 0, size_t(s.out_width * BLOCK) * sizeof(float));
            job.channels = channels(block);
            call.kernels->exact_sum(&job);
            const float* bias = call.padded_bias + (group * t.blocks + block) * BLOCK;
            for (int64_t i = 0; i < s.out_width * BLOCK; i++) {
                y[i] += bias[i % BLOCK];
                if (call.relu) y[i] = y[i] > 0 || y[i] != y[i] ? y[i] : 0;
            }
            if (!pooled()) write(block, out, tile);
        }
    }
};

// Each row of the convolution is made once, when the first row of y wants it.
template <class Kind>
void pooled_rows(Kind& rows, int64_t begin, int64_t end) {
    const ConvPool& pool = rows.call.pool;
    int64_t next = 0;
    for (int64_t out = begin; out < end; out++) {
        const int64_t top = out * pool.stride[0] - pool.padding[0];
        const int64_t first = most(top, 0), last = least(top + pool.kernel[0], rows.s.out_height);
        for (next = most(next, first); next < last; next++) rows.row(next);
        rows.pool(out, first, last);
    }
}

template <class Kind>
bool run(const Image& image, int64_t begin, int64_t end) {
    Kind rows(image);
    if (!rows.reserve()) return false;
    for (int64_t group = 0; group < image.call.shape.groups; group++) {
        rows.start(group);
        if (rows.pooled())
            pooled_rows(rows, begin, end);
        else
            for (int64_t out = begin; out < end; out++) rows.row(out);
    }
    return true;
}

}  // namespace

bool quantized_rows(const Image& image, int64_t begin, int64_t end) { return run<Quantized>(image, begin, end); }

bool exact_rows(const Image& image, int64_t begin, int64_t end) { return run<Exact>(image, begin, end); }

}  // namespace fx
