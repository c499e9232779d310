// Reading an image: 16-bit samples and the scale of its tables.
#include <cmath>
#include <cstring>

#include "pq_conv_call.h"

namespace fx {

void Image::reserve(Arena& arena) {
    const ConvShape& s = call.shape;
    planar = arena.take<float>(call.last ? s.channels * call.pixels() : 0);
    words = arena.take<int32_t>(call.quantized ? s.groups * sub_pairs() * call.words() : 0);
    bounds = arena.take<float>(call.quantized ? s.subspaces * call.words() : 0), reach = arena.take<float>(s.subspaces);
    planes = arena.take<const int32_t*>(call.slots() * call.tables.pairs);
}

void Image::plane_list(int64_t group, int64_t offset, const int32_t** list) const {
    const int64_t count = call.slots() * call.tables.pairs, known = sub_pairs();
    for (int64_t i = 0; i < count; i++)
        list[i] = words + (group * known + (i < known ? i : 0)) * call.words() + offset;
}

void Image::read() {
    const ConvShape& s = call.shape;
    const float* x = call.x + number * s.channels * call.pixels();
    if (call.last)
        call.kernels->transpose(x, s.channels, call.pixels(), s.channels, const_cast<float*>(planar), call.pixels());
    else
        planar = x;
}

void Image::quantize() {
    const ConvShape& s = call.shape;
    const uint32_t bits = call.kernels->largest(planar, s.channels * call.pixels());
    float largest;
    memcpy(&largest, &bits, 4);
    exact = !(largest == 0 || (largest >= SMALLEST_RANGE && largest <= LARGEST_RANGE));
    if (exact) return;
    scale = largest == 0 ? 0 : call.sample_top / largest;
    for (int64_t g = 0; g < s.groups; g++)
        for (int64_t m = 0; m < s.subspaces; m++) make_samples(g, m);
    choose_scale(peak());
}

void Image::make_samples(int64_t group, int64_t m) {
    const ConvShape& s = call.shape;
    const float* first = planar + group * s.group_channels * call.pixels();
    for (int64_t p = 0; p < call.tables.pairs; p++) {
        const int64_t channel = m * s.subwidth + 2 * p;
        const int64_t end = least(s.group_channels, (m + 1) * s.subwidth);
        int32_t* to = words + (group * sub_pairs() + m * call.tables.pairs + p) * call.words();
        if (channel >= end) {
            memset(to, 0, size_t(call.words()) * 4);
            continue;
        }
        const float* even = first + channel * call.pixels();
        call.kernels->samples(even, channel + 1 < end ? even + call.pixels() : nullptr, call.pixels(), scale, to);
    }
}

// The largest |a| of all tables of the image. The sub-space that can reach farthest is looked at first: what it reaches
// rules out most pixels of the others.
int32_t Image::peak() {
    const ConvShape& s = call.shape;
    int32_t found = 0;
    for (int64_t g = 0; g < s.groups; g++) {
        plane_list(g, 0, planes);
        int64_t first = 0;
        for (int64_t m = 0; m < s.subspaces; m++) {
            reach[m] = bound(g, m);
            if (reach[m] > reach[first]) first = m;
        }
        found = peak_of(first, found);
        for (int64_t m = 0; m < s.subspaces; m++)
            if (m != first && reach[m] > peak_limit(found)) found = peak_of(m, found);
    }
    return found;
}

// Squares of what the tables of a sub-space can reach, by Cauchy and Schwarz; returns the largest.
float Image::bound(int64_t group, int64_t m) {
    const ConvTables& t = call.tables;
    const int32_t* from = words + (group * call.shape.subspaces + m) * t.pairs * call.words();
    return call.kernels->bounds(from, call.words(), t.pairs, call.pixels(), call.longest[m],
                                bounds + m * call.words());
}

int32_t Image::peak_of(int64_t m, int32_t found) {
    const ConvTables& t = call.tables;
    const int64_t term = m / t.gang;
    return call.kernels->peak(&t, call.codes + term * t.term_bytes * t.pairs, planes + term * t.gang * t.pairs,
                              m % t.gang, bounds + m * call.words(), call.pixels(), found);
}

void Image::choose_scale(int32_t most) {
    while ((most >> shift) >= (1 << 15)) shift++;
    multiplier = int(least(32767, most ? (int64_t(127) << 14) / (most >> shift) : 0));
    factor = most ? float(MIDDLE * 128 - 1) / float(most) : 0;
    const double step = call.mode == INT8 ? std::ldexp(double(multiplier), -15 - shift) : double(factor);
    const double all = step * (double(scale) * double(call.code_scale));
    unit = all > 0 ? float(1 / all) : 0;
}

}  // namespace fx
