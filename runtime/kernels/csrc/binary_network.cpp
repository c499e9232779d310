// A whole binarized network in one call: a short list of steps over values that lie in one piece of scratch memory.
//
// The program is numbers: steps, outputs, then per step its kind, how many numbers follow, and these (`Kind`). A step
// makes one value, which later ones name by its place: inputs first, then the steps in order. Values are channels-last,
// float32 or levels in bytes. What a step reads of `data` lies in sections: a table (count, then offset and bytes of
// each) at its head, in the order of the steps. Shapes, sections and places in memory are worked out and checked for all
// steps before the first one runs.
#include <cstring>
#include <new>
#include <vector>

#include "binary.h"
#include "binary_elements.h"
#include "dispatch.h"
#include "threads.h"

namespace fx {
namespace {

constexpr int64_t SIZE_LIMIT = 1 << 24;             // of a dimension
constexpr int64_t VALUE_LIMIT = int64_t(1) << 40;   // values of a tensor
constexpr int64_t STEP_LIMIT = 1 << 16;
constexpr int64_t TASK = 1 << 14;  // values per task

// Kinds of steps, with their numbers and sections; x, y, z are values. The same as in network_program.py.
enum Kind : int64_t {
    LEVELS = 0,       // x | float (3, channels) thresholds
    CONV_LEVELS = 1,  // x outputs channels kernel[2] stride[2] padding[2] dilation[2] groups | weights, int32 cuts (3, outputs)
    CONV = 2,         // the same, then added (or -1), relu of it, relu | weights, float (2, outputs) scale and bias
    AFFINE = 3,       // x relu | float (2, channels) factor and term
    ADD = 4,          // x y (relu of y) relu
    RELU = 5,         // x
    MAX_POOL = 6,     // x kernel[2] stride[2] padding[2] dilation[2] ceil
    AVERAGE_POOL = 7, // x kernel[2] stride[2] padding[2] count_padding
    MEAN = 8,         // x
    SHORTCUT = 9,     // x stride[2] before after
    CAT = 10,         // x y ...
    FLATTEN = 11,     // x
    DECODE = 12,      // x | float (1) step
    KINDS = 13
};

struct Value {
    bool levels = false;
    int64_t n = 0, c = 0, h = 0, w = 0;
    void* at = nullptr;  // of inputs and outputs; else by offset
    int64_t offset = -1, last = -1;

    int64_t pixels() const { return n * h * w; }
    int64_t count() const { return pixels() * c; }
    int64_t bytes() const { return count() * (levels ? 1 : 4); }
    bool same(const Value& other) const { return n == other.n && c == other.c && h == other.h && w == other.w; }
    const float* floats() const { return static_cast<const float*>(at); }
};

struct Step {
    int64_t kind = 0, count = 0, section = 0;
    const int64_t* numbers = nullptr;
    int64_t operator[](int64_t i) const { return numbers[i]; }
};

// Numbers of each kind (-1: at least one), how many of the first are values, and sections.
struct Form {
    int64_t numbers, values, sections;
};
constexpr Form FORMS[KINDS] = {{1, 1, 1}, {12, 1, 2}, {15, 1, 2}, {2, 1, 1}, {4, 2, 0}, {1, 1, 0}, {10, 1, 0},
                               {8, 1, 0}, {1, 1, 0},  {5, 1, 0},  {-1, -1, 0}, {1, 1, 0}, {1, 1, 1}};

struct Section {
    const uint8_t* data;
    int64_t bytes;
};

const BinaryElements& elements(int isa) {
#if defined(FX_HAVE_AVX512)
    if (isa >= AVX512 && can_run(AVX512)) return binary_elements_avx512;
#endif
#if defined(FX_HAVE_AVX2)
    if (isa >= AVX2 && can_run(AVX2)) return binary_elements_avx2;
#endif
    (void)isa;
    return binary_elements_portable;
}

int wrong(int64_t step, const char* what) {
    return fail(BAD_ARGUMENT, "Step %lld of a binary network: %s", (long long)step, what);
}

class Network {
public:
    Network(int threads, int isa) : threads_(threads), isa_(isa), run_(elements(isa)) {}

    int read(const int64_t* program, int64_t length, const uint8_t* data, int64_t bytes);
    int shape(const Value* inputs, int64_t inputs_count, const Value* outputs, int64_t outputs_count);
    int run();

private:
    int read_sections(const uint8_t* data, int64_t bytes, int64_t needed);
    int infer(int64_t index, const Step& step, Value* y);
    int infer_conv(int64_t index, const Step& step, const Value& x, Value* y);
    int infer_pool(int64_t index, const Step& step, const Value& x, Value* y);
    int infer_cat(int64_t index, const Step& step, Value* y);
    int infer_add(int64_t index, const Step& step, const Value& x, Value* y);
    int infer_shortcut(int64_t index, const Step& step, const Value& x, Value* y);
    int place();
    bool in_place(const Step& step, const Value& y, size_t index, std::vector<size_t>* live);
    int execute(int64_t index, const Step& step, const Value& x, Value& y);
    int conv(const Step& step, const Value& x, Value& y);
    void levels(const Step& step, const Value& x, Value& y);
    void pool(const Step& step, const Value& x, Value& y);
    void shortcut(const Step& step, const Value& x, Value& y);
    void cat(const Step& step, Value& y);
    void flatten(const Value& x, Value& y);

    // As many values of a step as FORMS says, all of them values that are there.
    template <class Work>
    int each_operand(const Step& step, Work&& work) const {
        const int64_t count = FORMS[step.kind].values < 0 ? step.count : FORMS[step.kind].values;
        for (int64_t i = 0; i < count; i++) work(step[i]);
        if (step.kind == CONV && step[12] >= 0) work(step[12]);
        return OK;
    }
    template <class Work>
    void rows(int64_t pixels, int64_t channels, Work&& work) const {
        const int64_t each = most(1, TASK / most(1, channels));
        parallel_for(threads_, ceil_div(pixels, each),
                     [&](int64_t task) { work(task * each, least(each, pixels - task * each)); });
    }
    template <class Work>
    void pieces(int64_t count, Work&& work) const {
        parallel_for(threads_, ceil_div(count, TASK),
                     [&](int64_t task) { work(task * TASK, least(TASK, count - task * TASK)); });
    }

    int threads_, isa_;
    const BinaryElements& run_;
    std::vector<Step> steps_;
    std::vector<int64_t> outputs_;
    std::vector<Section> sections_;
    std::vector<Value> values_;
    size_t inputs_ = 0;
};

// -- what a program says ----------------------------------------------------------------------------------------------

int Network::read(const int64_t* program, int64_t length, const uint8_t* data, int64_t bytes) {
    if (length < 2 || program[0] < 0 || program[0] > STEP_LIMIT || program[1] < 1 || program[1] > length - 2)
        return fail(BAD_ARGUMENT, "Not a program of a binary network: %lld numbers", (long long)length);
    outputs_.assign(program + 2, program + 2 + program[1]);
    int64_t at = 2 + program[1], sections = 0;
    for (int64_t i = 0; i < program[0]; i++) {
        if (length - at < 2) return wrong(i, "it is missing");
        Step step;
        step.kind = program[at], step.count = program[at + 1], step.numbers = program + at + 2, step.section = sections;
        if (step.kind < 0 || step.kind >= KINDS) return wrong(i, "its kind is unknown");
        const Form& form = FORMS[step.kind];
        if (step.count < 1 || step.count > length - at - 2 || (form.numbers >= 0 && step.count != form.numbers))
            return wrong(i, "another count of numbers than its kind has");
        at += 2 + step.count, sections += form.sections;
        steps_.push_back(step);
    }
    if (at != length) return fail(BAD_ARGUMENT, "A program of a binary network does not end with its last step");
    return read_sections(data, bytes, sections);
}

int Network::read_sections(const uint8_t* data, int64_t bytes, int64_t needed) {
    int64_t count = -1;
    if (data && bytes >= 8) memcpy(&count, data, 8);
    if (count != needed || (bytes - 8) / 16 < count || reinterpret_cast<uintptr_t>(data) % 64)
        return fail(BAD_LAYOUT, "Data of a binary network: %lld bytes do not begin with a table of %lld sections",
                    (long long)bytes, (long long)needed);
    for (int64_t i = 0; i < count; i++) {
        int64_t place[2];
        memcpy(place, data + 8 + 16 * i, 16);
        if (place[0] < 0 || place[0] % 64 || place[0] > bytes || place[1] < 0 || place[1] > bytes - place[0])
            return fail(BAD_LAYOUT, "Section %lld of a binary network lies outside of its data", (long long)i);
        sections_.push_back({data + place[0], place[1]});
    }
    return OK;
}

// -- shapes -----------------------------------------------------------------------------------------------------------

bool sane(const Value& value) {
    const int64_t sizes[4] = {value.n, value.c, value.h, value.w};
    int64_t count = 1;
    for (int64_t size : sizes) {
        if (size < 1 || size >= SIZE_LIMIT || count > VALUE_LIMIT / size) return false;
        count *= size;
    }
    return true;
}

// Places of a window of `kernel` along one dimension; 0 where there is none.
int64_t places(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, bool ceil) {
    if (kernel < 1 || stride < 1 || dilation < 1 || padding < 0 || kernel >= SIZE_LIMIT || stride >= SIZE_LIMIT ||
        dilation >= SIZE_LIMIT || padding >= SIZE_LIMIT)
        return 0;
    const int64_t room = size + 2 * padding - dilation * (kernel - 1) - 1;
    if (room < 0) return 0;
    int64_t count = (ceil ? ceil_div(room, stride) : room / stride) + 1;
    if (ceil && (count - 1) * stride >= size + padding) count--;  // no window begins in the padding behind
    return count;
}

int Network::infer(int64_t index, const Step& step, Value* y) {
    bool known = true;
    const int64_t there = int64_t(values_.size());
    each_operand(step, [&](int64_t value) { known = known && value >= 0 && value < there; });
    if (!known) return wrong(index, "it reads a value that is not there");
    const Value& x = values_[size_t(step[0])];
    *y = x, y->at = nullptr, y->offset = -1, y->last = -1;
    const int64_t table = x.c * 4;
    const int64_t bytes = FORMS[step.kind].sections ? sections_[size_t(step.section)].bytes : 0;
    switch (step.kind) {
        case LEVELS:
            y->levels = true;
            return x.levels || bytes != 3 * table ? wrong(index, "thresholds do not fit what it reads") : int(OK);
        case CONV_LEVELS:
        case CONV: return infer_conv(index, step, x, y);
        case AFFINE: return x.levels || bytes != 2 * table ? wrong(index, "factors do not fit what it reads") : int(OK);
        case ADD: return infer_add(index, step, x, y);
        case RELU: return x.levels ? wrong(index, "it reads levels") : int(OK);
        case MAX_POOL:
        case AVERAGE_POOL: return infer_pool(index, step, x, y);
        case MEAN: y->h = y->w = 1; return x.levels ? wrong(index, "it reads levels") : int(OK);
        case SHORTCUT: return infer_shortcut(index, step, x, y);
        case CAT: return infer_cat(index, step, y);
        case FLATTEN: y->c = x.c * x.h * x.w, y->h = y->w = 1; return OK;
        default:
            y->levels = false;
            return !x.levels || bytes != 4 ? wrong(index, "it reads no levels, or has no step") : int(OK);
    }
}

int Network::infer_conv(int64_t index, const Step& step, const Value& x, Value* y) {
    const Section& weights = sections_[size_t(step.section)];
    const Section& ends = sections_[size_t(step.section) + 1];
    const int64_t* s = step.numbers;
    BinaryLayout layout;
    const int status = binary_read(weights.data, weights.bytes, &layout);
    if (status) return status;
    if (!x.levels || int64_t(layout.outputs) != s[1] || int64_t(layout.channels) != s[2] || int64_t(layout.groups) != s[11] ||
        int64_t(layout.kh) != s[3] || int64_t(layout.kw) != s[4] || s[2] * int64_t(layout.groups) != x.c)
        return wrong(index, "weights do not fit the levels that it reads");
    y->levels = step.kind == CONV_LEVELS;
    y->c = s[1];
    y->h = places(x.h, s[3], s[5], s[7], s[9], false), y->w = places(x.w, s[4], s[6], s[8], s[10], false);
    if (ends.bytes != s[1] * 4 * (y->levels ? 3 : 2)) return wrong(index, "cuts or scales do not fit its outputs");
    if (step.kind == CONV && s[12] >= 0) {
        const Value& added = values_[size_t(s[12])];
        if (added.levels || !added.same(*y)) return wrong(index, "what is added to its outputs has another shape");
    } else if (step.kind == CONV && s[12] < -1)
        return wrong(index, "it adds a value that is not there");
    return OK;
}

int Network::infer_add(int64_t index, const Step& step, const Value& x, Value* y) {
    const Value& other = values_[size_t(step[1])];
    (void)y;
    return x.levels || other.levels || !x.same(other) ? wrong(index, "it adds values of two shapes") : int(OK);
}

int Network::infer_pool(int64_t index, const Step& step, const Value& x, Value* y) {
    const int64_t* s = step.numbers;
    const bool max = step.kind == MAX_POOL;
    if (!max && x.levels) return wrong(index, "it takes averages of levels");
    for (int axis = 0; axis < 2; axis++) {
        const int64_t size = axis ? x.w : x.h, dilation = max ? s[7 + axis] : 1;
        if (2 * s[5 + axis] > s[1 + axis]) return wrong(index, "a pool is padded by more than half its window");
        (axis ? y->w : y->h) = places(size, s[1 + axis], s[3 + axis], s[5 + axis], dilation, max && s[9]);
    }
    return OK;
}

int Network::infer_shortcut(int64_t index, const Step& step, const Value& x, Value* y) {
    const int64_t* s = step.numbers;
    if (s[1] < 1 || s[2] < 1 || s[3] < 0 || s[4] < 0 || s[3] >= SIZE_LIMIT || s[4] >= SIZE_LIMIT)
        return wrong(index, "a stride or padding is out of range");
    y->h = (x.h - 1) / s[1] + 1, y->w = (x.w - 1) / s[2] + 1, y->c = s[3] + x.c + s[4];
    return OK;
}

int Network::infer_cat(int64_t index, const Step& step, Value* y) {
    const Value& first = values_[size_t(step[0])];
    int64_t channels = 0;
    for (int64_t i = 0; i < step.count; i++) {
        const Value& part = values_[size_t(step[i])];
        if (part.levels != first.levels || part.n != first.n || part.h != first.h || part.w != first.w)
            return wrong(index, "it joins values of two shapes");
        channels += part.c;
    }
    y->c = channels;
    return OK;
}

int Network::shape(const Value* inputs, int64_t inputs_count, const Value* outputs, int64_t outputs_count) {
    inputs_ = size_t(inputs_count);
    values_.assign(inputs, inputs + inputs_count);
    for (const Value& input : values_)
        if (!sane(input) || !input.at) return fail(BAD_ARGUMENT, "An input of a binary network is empty or too large");
    values_.reserve(inputs_ + steps_.size());
    for (size_t i = 0; i < steps_.size(); i++) {
        Value y;
        const int status = infer(int64_t(i), steps_[i], &y);
        if (status) return status;
        if (!sane(y)) return wrong(int64_t(i), "what it makes is empty or too large");
        values_.push_back(y);
        each_operand(steps_[i], [&](int64_t value) { values_[size_t(value)].last = int64_t(inputs_ + i); });
    }
    if (outputs_count != int64_t(outputs_.size()))
        return fail(BAD_ARGUMENT, "A binary network with %lld outputs was given room for %lld",
                    (long long)outputs_.size(), (long long)outputs_count);
    for (int64_t i = 0; i < outputs_count; i++) {
        const int64_t made = outputs_[size_t(i)];
        if (made < int64_t(inputs_) || made >= int64_t(values_.size()))
            return fail(BAD_ARGUMENT, "Output %lld of a binary network is not made by a step", (long long)i);
        Value& value = values_[size_t(made)];
        if (value.at || value.levels || !value.same(outputs[i]) || !outputs[i].at)
            return fail(BAD_ARGUMENT, "Output %lld of a binary network does not fit the room for it", (long long)i);
        value.at = outputs[i].at;
    }
    return place();
}

// -- memory -----------------------------------------------------------------------------------------------------------

// Whether a step that goes value by value may write over what it reads, as nothing reads that any more.
bool Network::in_place(const Step& step, const Value& y, size_t index, std::vector<size_t>* live) {
    if (step.kind != AFFINE && step.kind != ADD && step.kind != RELU) return false;
    for (size_t& old : *live) {
        const Value& x = values_[old];
        const bool read = int64_t(old) == step[0] || (step.kind == ADD && int64_t(old) == step[1]);
        if (!read || x.last != int64_t(index) || x.bytes() != y.bytes()) continue;
        values_[index].offset = x.offset;
        old = index;
        return true;
    }
    return false;
}

// Every value gets the first gap between those that are still to be read; `live` is in the order of offsets.
int Network::place() {
    std::vector<size_t> live;
    int64_t total = 0;
    for (size_t index = inputs_; index < values_.size(); index++) {
        Value& value = values_[index];
        size_t kept = 0;
        for (size_t old : live)
            if (values_[old].last >= int64_t(index)) live[kept++] = old;
        live.resize(kept);
        if (value.at || in_place(steps_[index - inputs_], value, index, &live)) continue;
        const int64_t room = ceil_div(value.bytes(), 64) * 64;
        int64_t offset = 0;
        size_t before = 0;
        for (; before < live.size() && values_[live[before]].offset - offset < room; before++)
            offset = values_[live[before]].offset + ceil_div(values_[live[before]].bytes(), 64) * 64;
        value.offset = offset;
        live.insert(live.begin() + int64_t(before), index);
        total = most(total, offset + room);
        if (total > VALUE_LIMIT) return fail(NO_MEMORY, "The values of a binary network take more than a terabyte");
    }
    uint8_t* memory = static_cast<uint8_t*>(scratch(SLOT_NETWORK, size_t(most(total, 64))));
    if (!memory) return fail(NO_MEMORY, "No memory for the %lld bytes of a binary network's values", (long long)total);
    for (Value& value : values_)
        if (!value.at) value.at = memory + value.offset;
    return OK;
}

// -- running ----------------------------------------------------------------------------------------------------------

int Network::run() {
    for (size_t i = 0; i < steps_.size(); i++) {
        const int status = execute(int64_t(i), steps_[i], values_[size_t(steps_[i][0])], values_[inputs_ + i]);
        if (status) return status;
    }
    return OK;
}

int Network::execute(int64_t index, const Step& step, const Value& x, Value& y) {
    float* to = static_cast<float*>(y.at);
    const float* factors =
        FORMS[step.kind].sections ? reinterpret_cast<const float*>(sections_[size_t(step.section)].data) : nullptr;
    switch (step.kind) {
        case LEVELS: levels(step, x, y); return OK;
        case CONV_LEVELS:
        case CONV: return conv(step, x, y);
        case AFFINE:
            rows(x.pixels(), x.c, [&](int64_t first, int64_t count) {
                run_.affine(x.floats() + first * x.c, count, x.c, factors, step[1] != 0, to + first * x.c);
            });
            return OK;
        case ADD: {
            const float* other = values_[size_t(step[1])].floats();
            pieces(x.count(), [&](int64_t first, int64_t count) {
                run_.add(x.floats() + first, other + first, count, step[2] != 0, step[3] != 0, to + first);
            });
            return OK;
        }
        case RELU:
            pieces(x.count(), [&](int64_t first, int64_t count) { run_.relu(x.floats() + first, count, to + first); });
            return OK;
        case MAX_POOL:
        case AVERAGE_POOL: pool(step, x, y); return OK;
        case MEAN:
            parallel_for(threads_, x.n, [&](int64_t image) {
                run_.mean(x.floats() + image * x.h * x.w * x.c, x.h * x.w, x.c, to + image * x.c);
            });
            return OK;
        case SHORTCUT: shortcut(step, x, y); return OK;
        case CAT: cat(step, y); return OK;
        case FLATTEN: flatten(x, y); return OK;
        case DECODE: {
            const uint8_t* from = static_cast<const uint8_t*>(x.at);
            pieces(x.count(),
                   [&](int64_t first, int64_t count) { run_.decode(from + first, count, *factors, to + first); });
            return OK;
        }
        default: return wrong(index, "its kind is unknown");
    }
}

int Network::conv(const Step& step, const Value& x, Value& y) {
    const Section& weights = sections_[size_t(step.section)];
    const uint8_t* ends = sections_[size_t(step.section) + 1].data;
    BinaryCall call{};
    const int status = binary_read(weights.data, weights.bytes, &call.layout);
    if (status) return status;
    call.x = x.at, call.levels_in = true, call.channels_last = true;
    call.batch = x.n, call.channels = x.c, call.height = x.h, call.width = x.w;
    call.out_height = y.h, call.out_width = y.w;
    for (int i = 0; i < 2; i++)
        call.stride[i] = step[5 + i], call.padding[i] = step[7 + i], call.dilation[i] = step[9 + i];
    call.y = y.at, call.y_channels_last = true, call.threads = threads_;
    if (step.kind == CONV_LEVELS) {
        call.cuts = reinterpret_cast<const int32_t*>(ends);
    } else {
        call.scale = reinterpret_cast<const float*>(ends), call.bias = call.scale + y.c;
        call.residual = step[12] < 0 ? nullptr : values_[size_t(step[12])].floats();
        call.residual_relu = step[13] != 0, call.relu = step[14] != 0;
    }
    return binary_layer(call, isa_);
}

// Thresholds that descend count what a value stays below: they and the value change sign.
void Network::levels(const Step& step, const Value& x, Value& y) {
    const float* from = reinterpret_cast<const float*>(sections_[size_t(step.section)].data);
    std::vector<float> edges(size_t(4 * x.c));
    for (int64_t c = 0; c < x.c; c++) {
        const float sign = from[c] > from[x.c + c] || from[x.c + c] > from[2 * x.c + c] ? -1.0f : 1.0f;
        for (int64_t i = 0; i < 3; i++) edges[size_t(i * x.c + c)] = sign * from[i * x.c + c];
        edges[size_t(3 * x.c + c)] = sign;
    }
    uint8_t* to = static_cast<uint8_t*>(y.at);
    rows(x.pixels(), x.c, [&](int64_t first, int64_t count) {
        run_.levels(x.floats() + first * x.c, count, x.c, edges.data(), to + first * x.c);
    });
}

void Network::pool(const Step& step, const Value& x, Value& y) {
    BinaryPool at{};
    at.channels = x.c, at.height = x.h, at.width = x.w, at.out_width = y.w;
    for (int i = 0; i < 2; i++) {
        at.kernel[i] = step[1 + i], at.stride[i] = step[3 + i], at.padding[i] = step[5 + i];
        at.dilation[i] = step.kind == MAX_POOL ? step[7 + i] : 1;
    }
    at.count_padding = step.kind == AVERAGE_POOL && step[7] != 0;
    parallel_for(threads_, x.n * y.h, [&](int64_t task) {
        const int64_t from = task / y.h * x.h * x.w * x.c, to = task * y.w * y.c, row = task % y.h;
        if (x.levels)
            run_.max_levels(static_cast<const uint8_t*>(x.at) + from, at, row, static_cast<uint8_t*>(y.at) + to);
        else
            (step.kind == MAX_POOL ? run_.max_floats : run_.average)(x.floats() + from, at, row,
                                                                     static_cast<float*>(y.at) + to);
    });
}

void Network::shortcut(const Step& step, const Value& x, Value& y) {
    const size_t unit = x.levels ? 1 : 4, before = size_t(step[3]) * unit, kept = size_t(x.c) * unit;
    const size_t after = size_t(step[4]) * unit;
    const uint8_t* source = static_cast<const uint8_t*>(x.at);
    uint8_t* target = static_cast<uint8_t*>(y.at);
    parallel_for(threads_, y.n * y.h, [&](int64_t task) {
        const uint8_t* from = source + size_t((task / y.h * x.h + task % y.h * step[1]) * x.w) * kept;
        uint8_t* to = target + size_t(task * y.w) * (before + kept + after);
        for (int64_t column = 0; column < y.w; column++, to += before + kept + after) {
            memset(to, 0, before);
            memcpy(to + before, from + size_t(column * step[2]) * kept, kept);
            memset(to + before + kept, 0, after);
        }
    });
}

void Network::cat(const Step& step, Value& y) {
    const size_t unit = y.levels ? 1 : 4, row = size_t(y.c) * unit;
    rows(y.pixels(), y.c, [&](int64_t first, int64_t count) {
        uint8_t* to = static_cast<uint8_t*>(y.at) + size_t(first) * row;
        for (int64_t i = 0; i < step.count; i++) {
            const Value& part = values_[size_t(step[i])];
            const size_t width = size_t(part.c) * unit;
            const uint8_t* from = static_cast<const uint8_t*>(part.at) + size_t(first) * width;
            for (int64_t p = 0; p < count; p++) memcpy(to + size_t(p) * row, from + size_t(p) * width, width);
            to += width;
        }
    });
}

// (n, h, w, c) -> (n, c h w): channels go first, as in the networks that are compiled.
void Network::flatten(const Value& x, Value& y) {
    const int64_t pixels = x.h * x.w;
    for (int64_t n = 0; n < x.n; n++)
        for (int64_t p = 0; p < pixels; p++)
            for (int64_t c = 0; c < x.c; c++) {
                const int64_t from = (n * pixels + p) * x.c + c, to = (n * x.c + c) * pixels + p;
                if (x.levels) static_cast<uint8_t*>(y.at)[to] = static_cast<const uint8_t*>(x.at)[from];
                else static_cast<float*>(y.at)[to] = x.floats()[from];
            }
}

Value external(const int64_t* sizes, void* at) {
    Value value;
    value.n = sizes[0], value.c = sizes[1], value.h = sizes[2], value.w = sizes[3], value.at = at;
    return value;
}

}  // namespace
}  // namespace fx

// Inputs and outputs are float32, channels-last, four sizes (N, C, H, W) each.
FX_EXPORT int fxpress_binary_network(const int64_t* program, int64_t length, const uint8_t* data, int64_t bytes,
                                     void* const* inputs, const int64_t* input_sizes, int64_t input_count,
                                     void* const* outputs, const int64_t* output_sizes, int64_t output_count, int threads,
                                     int isa) {
    using namespace fx;
    try {
        std::vector<Value> given, made;
        for (int64_t i = 0; i < input_count; i++) given.push_back(external(input_sizes + 4 * i, inputs[i]));
        for (int64_t i = 0; i < output_count; i++) made.push_back(external(output_sizes + 4 * i, outputs[i]));
        Network network(threads, isa);
        int status = network.read(program, length, data, bytes);
        if (!status) status = network.shape(given.data(), input_count, made.data(), output_count);
        return status ? status : network.run();
    } catch (const std::bad_alloc&) {
        return fail(NO_MEMORY, "No memory for the steps of a binary network");
    }
}
