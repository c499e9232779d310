// Convolution by tables: sums of a few pixels and 64 outputs in registers.
//
// A look-up is one instruction for 64 outputs, and so is its addition, in bytes. From time to time sums are widened to
// words: three instructions, because the even bytes are not taken apart from the odd ones before the end. BYTE_SUMS
// look-ups fit a byte whatever they find; several times as many do in nearly all cases. A tile tells if a byte may have
// overflowed: additions are saturating. On Zen 5 these also leave the two ports to the look-ups that need them (8.5
// pairs a nanosecond), and plain ones take them from time to time (7.4).
#include "binary_table_avx512.h"

namespace fx {
namespace table {
namespace {

FX_INLINE __m512i added(__m512i sum, __m512i index, __m512i table) {
    return _mm512_adds_epu8(sum, _mm512_permutexvar_epi8(index, table));
}

FX_INLINE __m512i added(__m512i sum, const uint8_t* index, const uint8_t* table) {
    return added(sum, _mm512_loadu_si512(index), _mm512_load_si512(table));
}

// -- three taps side by side -------------------------------------------------------------------------------------------

// A table is loaded once and serves the three columns that it lies under. Of the tables 0 to COLUMNS + 1 the first and
// the last serve one; those of a tile at the edge lie in the padding and do not count.

#if defined(__GNUC__)
// The order of instructions matters: on Zen 4 two look-ups followed by two additions go to different ports, 3.6 pairs a
// nanosecond, and one after the other get into each other's way, 2.9. A compiler mixes them, copies sums, and reads tables
// from memory again. Registers 24 to 26 are the weights of the left, middle and right tap, 27 and 28 tables, and 30 and
// 31 what is looked up; operands are the sums.
#define FX_TABLE(PLACE, REGISTER) "vmovdqa64 64*" PLACE "(%[tables]), %%zmm" REGISTER "\n\t"
#define FX_LOOK_UP(TABLE, TAP, TO) "vpermb %%zmm" TABLE ", %%zmm" TAP ", %%zmm" TO "\n\t"
#define FX_ADD(FROM, SUM) "vpaddusb %%zmm" FROM ", %" SUM ", %" SUM "\n\t"
#define FX_ONE(T1, TAP1, SUM1) FX_LOOK_UP(T1, TAP1, "30") FX_ADD("30", SUM1)
#define FX_PAIR(T1, TAP1, SUM1, T2, TAP2, SUM2) \
    FX_LOOK_UP(T1, TAP1, "30") FX_LOOK_UP(T2, TAP2, "31") FX_ADD("30", SUM1) FX_ADD("31", SUM2)
#define FX_LEFT "24"
#define FX_MIDDLE "25"
#define FX_RIGHT "26"
// table 0 and the last one: one tap each
#define FX_FROM(PLACE, TAP, SUM) "vpermb 64*" PLACE "(%[tables]), %%zmm" TAP ", %%zmm30\n\t" FX_ADD("30", SUM)
#define FX_LEFT_EDGE FX_FROM("0", FX_LEFT, "0")
#define FX_RIGHT_EDGE(TABLE, SUM) FX_FROM(TABLE, FX_RIGHT, SUM)
// table 1, without its right tap
#define FX_BEGIN FX_TABLE("1", "27") FX_PAIR("27", FX_MIDDLE, "0", "27", FX_LEFT, "1")
// tables C and C + 1, A = C - 2 and so on
#define FX_TWO(A, B, C, D) \
    FX_TABLE(C, "27") FX_TABLE(D, "28") FX_PAIR("27", FX_RIGHT, A, "27", FX_MIDDLE, B) \
    FX_PAIR("27", FX_LEFT, C, "28", FX_RIGHT, B) FX_PAIR("28", FX_MIDDLE, C, "28", FX_LEFT, D)
// the last table but one, without its left tap; the two before it, of an odd number of columns
#define FX_END(A, B, C) FX_TABLE(C, "27") FX_PAIR("27", FX_RIGHT, A, "27", FX_MIDDLE, B)
#define FX_ODD_END(A, B, C, D) \
    FX_TABLE(C, "27") FX_TABLE(D, "28") FX_PAIR("27", FX_RIGHT, A, "27", FX_MIDDLE, B) \
    FX_PAIR("27", FX_LEFT, C, "28", FX_RIGHT, B) FX_ONE("28", FX_MIDDLE, C)
#define FX_RUN(CODE, ...) \
    asm volatile("vmovdqu64 (%[weights]), %%zmm24\n\tvmovdqu64 64(%[weights]), %%zmm25\n\t" \
                 "vmovdqu64 128(%[weights]), %%zmm26\n\t" CODE \
                 : __VA_ARGS__ \
                 : [tables] "r"(tables), [weights] "r"(weights) \
                 : "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm30", "xmm31")
#define FX_S(C) "+v"(sum[C])
#define FX_TILE(CODE, TABLE, SUM, ...) \
    { \
        if constexpr (LEFT && RIGHT) FX_RUN(FX_LEFT_EDGE CODE FX_RIGHT_EDGE(TABLE, SUM), __VA_ARGS__); \
        else if constexpr (LEFT) FX_RUN(FX_LEFT_EDGE CODE, __VA_ARGS__); \
        else if constexpr (RIGHT) FX_RUN(CODE FX_RIGHT_EDGE(TABLE, SUM), __VA_ARGS__); \
        else FX_RUN(CODE, __VA_ARGS__); \
    }

template <int COLUMNS, bool LEFT, bool RIGHT>
FX_INLINE void add_in_order(__m512i* sum, const uint8_t* tables, const uint8_t* weights) {
    if constexpr (COLUMNS == 1) FX_TILE(FX_TABLE("1", "27") FX_ONE("27", FX_MIDDLE, "0"), "2", "0", FX_S(0))
    if constexpr (COLUMNS == 2) FX_TILE(FX_BEGIN FX_END("0", "1", "2"), "3", "1", FX_S(0), FX_S(1))
    if constexpr (COLUMNS == 3) FX_TILE(FX_BEGIN FX_ODD_END("0", "1", "2", "3"), "4", "2", FX_S(0), FX_S(1), FX_S(2))
    if constexpr (COLUMNS == 4)
        FX_TILE(FX_BEGIN FX_TWO("0", "1", "2", "3") FX_END("2", "3", "4"), "5", "3", FX_S(0), FX_S(1), FX_S(2), FX_S(3))
    if constexpr (COLUMNS == 5)
        FX_TILE(FX_BEGIN FX_TWO("0", "1", "2", "3") FX_ODD_END("2", "3", "4", "5"), "6", "4", FX_S(0), FX_S(1), FX_S(2),
                FX_S(3), FX_S(4))
    if constexpr (COLUMNS == 6)
        FX_TILE(FX_BEGIN FX_TWO("0", "1", "2", "3") FX_TWO("2", "3", "4", "5") FX_END("4", "5", "6"), "7", "5", FX_S(0),
                FX_S(1), FX_S(2), FX_S(3), FX_S(4), FX_S(5))
    if constexpr (COLUMNS == 7)
        FX_TILE(FX_BEGIN FX_TWO("0", "1", "2", "3") FX_TWO("2", "3", "4", "5") FX_ODD_END("4", "5", "6", "7"), "8", "6",
                FX_S(0), FX_S(1), FX_S(2), FX_S(3), FX_S(4), FX_S(5), FX_S(6))
    if constexpr (COLUMNS == 8)
        FX_TILE(FX_BEGIN FX_TWO("0", "1", "2", "3") FX_TWO("2", "3", "4", "5") FX_TWO("4", "5", "6", "7")
                    FX_END("6", "7", "8"),
                "9", "7", FX_S(0), FX_S(1), FX_S(2), FX_S(3), FX_S(4), FX_S(5), FX_S(6), FX_S(7))
}
#endif

// LEFT, RIGHT: whether the first, the last of COLUMNS + 2 tables counts.
template <bool LEFT, bool RIGHT>
struct ThreeTaps {
    static constexpr int TAPS = 3;
    template <int COLUMNS>
    static FX_INLINE void add(__m512i (&sum)[COLUMNS], const Tile&, const uint8_t* tables, const uint8_t* weights) {
#if defined(__GNUC__)
        add_in_order<COLUMNS, LEFT, RIGHT>(sum, tables, weights);
#else
        for (int c = LEFT ? 0 : 1; c < COLUMNS + (RIGHT ? 2 : 1); c++)
            for (int kx = 0; kx < 3; kx++)
                if (c - kx >= 0 && c - kx < COLUMNS)
                    sum[c - kx] = added(sum[c - kx], weights + 64 * kx, tables + 64 * c);
#endif
    }
};

// -- any taps ------------------------------------------------------------------------------------------------------------

struct AnyTaps {
    static constexpr int TAPS = 0;
    template <int COLUMNS>
    static FX_INLINE void add(__m512i (&sum)[COLUMNS], const Tile& tile, const uint8_t* tables,
                              const uint8_t* weights) {
        for (int64_t kx = 0; kx < tile.kw; kx++, tables += tile.tap_bytes, weights += 64) {
            const __m512i index = _mm512_loadu_si512(weights);
            FX_UNROLL
            for (int c = 0; c < COLUMNS; c++)
                sum[c] = added(sum[c], index, _mm512_load_si512(tables + c * tile.column_bytes));
        }
    }
};

// One tap, columns side by side.
struct OneTap {
    static constexpr int TAPS = 1;
    template <int COLUMNS>
    static FX_INLINE void add(__m512i (&sum)[COLUMNS], const Tile&, const uint8_t* tables, const uint8_t* weights) {
        const __m512i index = _mm512_loadu_si512(weights);
        FX_UNROLL
        for (int c = 0; c < COLUMNS; c++) sum[c] = added(sum[c], index, _mm512_load_si512(tables + 64 * c));
    }
};

// Three taps side by side, columns two apart: places that the compiler knows.
struct ThreeTapsOfTwo {
    static constexpr int TAPS = 3;
    template <int COLUMNS>
    static FX_INLINE void add(__m512i (&sum)[COLUMNS], const Tile&, const uint8_t* tables, const uint8_t* weights) {
        FX_UNROLL
        for (int kx = 0; kx < 3; kx++) {
            const __m512i index = _mm512_loadu_si512(weights + 64 * kx);
            FX_UNROLL
            for (int c = 0; c < COLUMNS; c++)
                sum[c] = added(sum[c], index, _mm512_load_si512(tables + 64 * (2 * c + kx)));
        }
    }
};

// -- a tile --------------------------------------------------------------------------------------------------------------

// Sums of bytes -> words, and zero again; `largest` keeps how large they were.
template <int COLUMNS>
FX_INLINE void widen(__m512i (&sum)[COLUMNS], __m512i (&all)[COLUMNS], __m512i (&odd)[COLUMNS], __m512i& largest) {
    FX_UNROLL
    for (int c = 0; c < COLUMNS; c++) {
        largest = _mm512_max_epu8(largest, sum[c]);
        all[c] = _mm512_add_epi16(all[c], sum[c]);
        odd[c] = _mm512_adds_epu16(odd[c], _mm512_srli_epi16(sum[c], 8));
        sum[c] = _mm512_setzero_si512();
    }
}

// A loop for any kernel rows (ROWS = 0), and one for some numbers of them that the compiler knows.
template <int COLUMNS, int ROWS, class Adder>
bool run(const Tile& tile) {
    __m512i all[COLUMNS], odd[COLUMNS], sum[COLUMNS], largest = _mm512_setzero_si512();
    uint16_t* const sums = tile.sums;
    FX_UNROLL
    for (int c = 0; c < COLUMNS; c++) {
        all[c] = tile.begins ? _mm512_setzero_si512() : _mm512_load_si512(sums + 64 * c);
        odd[c] = tile.begins ? _mm512_setzero_si512() : _mm512_load_si512(sums + 64 * c + 32);
        sum[c] = _mm512_setzero_si512();
    }
    const uint8_t* weights = tile.weights;
    if constexpr (ROWS > 0) {
        const int64_t span = most(1, tile.look_ups / (Adder::TAPS * ROWS));
        const int64_t step = tile.group_bytes, next = tile.group_weights;
        const uint8_t* row[ROWS];
        FX_UNROLL
        for (int i = 0; i < ROWS; i++) row[i] = tile.tables + tile.table_row[i];
        for (int64_t rest = tile.groups; rest > 0; rest -= span) {
            for (int64_t group = least(span, rest); group > 0; group--, weights += next) {
                FX_UNROLL
                for (int i = 0; i < ROWS; i++) {
                    Adder::add(sum, tile, row[i], weights + Adder::TAPS * 64 * i);
                    row[i] += step;
                }
            }
            widen(sum, all, odd, largest);
        }
    } else {
        const int64_t span = most(1, tile.look_ups / tile.kw);
        for (int64_t group = 0; group < tile.groups; group += span) {
            const int64_t count = least(span, tile.groups - group);
            for (int64_t i = 0; i < tile.rows; i++) {
                const uint8_t* table = tile.tables + tile.table_row[i] + group * tile.group_bytes;
                const uint8_t* index = weights + group * tile.group_weights + i * tile.kw * 64;
                for (int64_t j = 0; j < count; j++, table += tile.group_bytes, index += tile.group_weights)
                    Adder::add(sum, tile, table, index);
                widen(sum, all, odd, largest);
            }
        }
    }
    if (_mm512_cmpeq_epi8_mask(largest, _mm512_set1_epi8(-1))) return false;
    FX_UNROLL
    for (int c = 0; c < COLUMNS; c++) {
        _mm512_store_si512(sums + 64 * c, all[c]);
        _mm512_store_si512(sums + 64 * c + 32, odd[c]);
    }
    return true;
}

template <int ROWS, class Adder>
TileFunction* of_columns(int64_t columns) {
    static constexpr TileFunction* FUNCTIONS[MOST_COLUMNS] = {
        run<1, ROWS, Adder>, run<2, ROWS, Adder>, run<3, ROWS, Adder>, run<4, ROWS, Adder>,
        run<5, ROWS, Adder>, run<6, ROWS, Adder>, run<7, ROWS, Adder>, run<8, ROWS, Adder>};
    return FUNCTIONS[columns - 1];
}

template <class Adder>
TileFunction* of_rows(int64_t rows, int64_t columns) {
    if (rows == 2) return of_columns<2, Adder>(columns);
    return rows == 3 ? of_columns<3, Adder>(columns) : of_columns<0, Adder>(columns);
}

}  // namespace

TileFunction* tile_function(int64_t rows, int64_t columns, Taps taps, bool left, bool right) {
    if (taps == ONE_TAP && rows == 1) return of_columns<1, OneTap>(columns);
    if (taps == ANY_TAPS || taps == ONE_TAP) return of_columns<0, AnyTaps>(columns);
    if (taps == THREE_TAPS_OF_TWO) return of_rows<ThreeTapsOfTwo>(rows, columns);
    if (left)
        return right ? of_rows<ThreeTaps<true, true>>(rows, columns) : of_rows<ThreeTaps<true, false>>(rows, columns);
    return right ? of_rows<ThreeTaps<false, true>>(rows, columns) : of_rows<ThreeTaps<false, false>>(rows, columns);
}

}  // namespace table
}  // namespace fx
