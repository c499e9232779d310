// A whole binarized network in one call: what its program says, the shapes of all values, and where these lie.
#include <cstring>

#include "binary.h"
#include "binary_network.h"

namespace fx {
namespace network {
namespace {

constexpr int64_t SIZE_LIMIT = 1 << 24;             // of a dimension
constexpr int64_t VALUE_LIMIT = int64_t(1) << 40;   // values of a tensor
constexpr int64_t STEP_LIMIT = 1 << 16;

int wrong(int64_t step, const char* what) {
    return fail(BAD_ARGUMENT, "Step %lld of a binary network: %s", (long long)step, what);
}

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

}  // namespace

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

}  // namespace network
}  // namespace fx
