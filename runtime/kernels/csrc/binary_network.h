// A whole binarized network in one call: a short list of steps over values that lie in one piece of scratch memory.
//
// The program is numbers: steps, outputs, then per step its kind, how many numbers follow, and these (`Kind`). A step
// makes one value, which later ones name by its place: inputs first, then the steps in order. Values are channels-last,
// float32 or levels in bytes. What a step reads of `data` lies in sections: a table (count, then offset and bytes of
// each) at its head, in the order of the steps. Shapes, sections and places in memory are worked out and checked for all
// steps before the first one runs.
//
//     binary_network_plan.cpp    reads a program; shapes, sections, places in memory
//     binary_network.cpp         runs the steps
#pragma once

#include <vector>

#include "binary_elements.h"
#include "threads.h"

namespace fx {
namespace network {

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

class Network {
public:
    Network(int threads, int isa);

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
    int execute(const Step& step, const Value& x, Value& y);
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

}  // namespace network
}  // namespace fx
